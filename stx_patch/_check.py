# SPDX-License-Identifier: Apache-2.0
"""Whether files are what they promise to be, by their headers and their index alone.

Of a header safetensors is the judge. What is found out here says where it goes wrong, in bytes of
the file and names, and holds the one rule of the format that safetensors lets pass: no name may
stand twice. No tensor is read, and torch is not imported.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from . import _dtype, _files, _header, _headers, _stock
from ._cli_text import count_text, printable

_HEAD_BYTES = 32
_HEADER_BYTES_MAX = 100_000_000
_NAME_MAX = 120
_TEXT_MAX = 500


class Checked(NamedTuple):
    """What is wrong with a header, and what it says: its names in the order of the file, or None
    where safetensors refuses it."""

    problem: str | None
    names: list[str] | None
    data_bytes: int


class Entry(NamedTuple):
    """A tensor in a header. Its bytes are [begin, end) of the file."""

    name: str
    dtype: str
    shape: list[int]
    begin: int
    end: int


class _Broken(Exception):
    """A rule that does not hold; the text says where."""


Pairs = list[tuple[str, Any]]


class _Object(Pairs):
    """A JSON object as it is written, with what stands twice."""


def check_file(path: str) -> Checked:
    """Check length, header and coverage of one file.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with _open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        found, twice = _explain(file, size_bytes)
    _stock.take()
    try:
        with _header.open_with_stock(path) as handle:
            names = list(getattr(handle, "offset_keys", handle.keys)())
    except _stock.SafetensorError as error:
        text = _shorten(printable(" ".join(str(error).split())), _TEXT_MAX)
        return Checked(text + ("" if found is None else f"; {found}"), None, 0)
    return Checked(twice, names, size_bytes - _data_begin(path))


def shown(name: str) -> str:
    """A tensor's name in a line of text."""
    return _shorten(printable(name) if name else "''", _NAME_MAX)


def _shorten(text: str, length_max: int) -> str:
    return text if len(text) <= length_max else f"{text[:length_max]}..."


def _open_regular(path: str) -> BinaryIO:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait
        raise OSError(f"{path} is no regular file")
    return open(path, "rb")


def _data_begin(path: str) -> int:
    with open(path, "rb") as file:
        return _header.PREFIX_BYTES + int.from_bytes(file.read(_header.PREFIX_BYTES), "little")


# --- why safetensors refuses a file ---


def _explain(file: BinaryIO, size_bytes: int) -> tuple[str | None, str | None]:
    """What explains a refusal, if there is one; and what is wrong even where there is none."""
    twice = None
    try:
        pairs, data_begin = _parse(file, size_bytes)
        twice = _find_twice(pairs)
        _check_entries(pairs, data_begin, size_bytes)
    except _Broken as broken:
        file.seek(0)
        kind = _headers.kind_of(file.read(_HEAD_BYTES))
        return twice or str(broken) if kind is None else f"by its beginning it is {kind}", twice
    except (ValueError, RecursionError):  # Python's parser has limits of its own
        return None, None
    return twice, twice


def _parse(file: BinaryIO, size_bytes: int) -> tuple[Pairs, int]:
    """The header's entries in its order, and where the data begins."""
    prefix = file.read(_header.PREFIX_BYTES)
    if len(prefix) < _header.PREFIX_BYTES:
        raise _Broken(f"the file has {count_text(size_bytes, 'byte')}, a header's length takes 8")
    header_bytes = int.from_bytes(prefix, "little")
    data_begin = _header.PREFIX_BYTES + header_bytes
    if header_bytes > _HEADER_BYTES_MAX:
        raise _Broken(
            f"its first 8 bytes give the header {header_bytes:,} bytes; at most"
            f" {_HEADER_BYTES_MAX:,} are allowed"
        )
    if data_begin > size_bytes:
        raise _Broken(
            f"the header goes up to byte {data_begin:,}, the file ends at byte {size_bytes:,}"
        )
    return _parse_json(file.read(header_bytes)), data_begin


def _parse_json(header: bytes) -> Pairs:
    def refuse(word: str) -> None:
        raise _Broken(f"{word} is no JSON")

    try:
        text = header.decode()
        root = json.loads(text, object_pairs_hook=_Object, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise _Broken(
            f"byte {_header.PREFIX_BYTES + error.start:,} of the file is no UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        position = _header.PREFIX_BYTES + len(error.doc[: error.pos].encode())
        raise _Broken(f"{error.msg}: byte {position:,} of the file") from None
    if not isinstance(root, _Object):
        raise _Broken("the header is no JSON object")
    metadata = [value for name, value in root if name == "__metadata__"]
    if len(metadata) > 1:
        raise _Broken("__metadata__ is twice in the header")
    for value in metadata:
        _check_metadata(value)
    return [(name, value) for name, value in root if name != "__metadata__"]


def _check_metadata(value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, _Object):
        raise _Broken("__metadata__ is no JSON object")
    for key, text in value:
        if not isinstance(text, str):
            raise _Broken(f"__metadata__: the value of {shown(key)} is no string")


def _find_twice(pairs: Pairs) -> str | None:
    names = set[str]()
    for name, _ in pairs:
        if name in names:
            return f"tensor {shown(name)} is twice in the header"
        names.add(name)
    return None


def _entry(name: str, value: Any, data_begin: int) -> Entry:
    """An entry as safetensors takes it: it may also be an array, and its dtype an object."""
    fields = value
    if isinstance(value, _Object):
        named = dict(value)
        missing = [key for key in ("dtype", "shape", "data_offsets") if key not in named]
        if missing:
            raise _Broken(f"tensor {shown(name)} has no {missing[0]}")
        if len(named) < len(value):
            raise _Broken(f"tensor {shown(name)} has a field twice")
        fields = [named["dtype"], named["shape"], named["data_offsets"]]
    if not isinstance(fields, list) or len(fields) != 3:
        raise _Broken(f"tensor {shown(name)} is no JSON object")
    dtype, shape, offsets = fields
    if isinstance(dtype, _Object) and len(dtype) == 1:
        dtype = dtype[0][0]
    if not isinstance(dtype, str):
        raise _Broken(f"tensor {shown(name)}: its dtype is no string")
    if not _are_counts(shape):
        raise _Broken(f"tensor {shown(name)}: its shape is no array of counts")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _Broken(f"tensor {shown(name)}: its data_offsets are not two positions")
    return Entry(name, dtype, shape, data_begin + offsets[0], data_begin + offsets[1])


def _are_counts(value: Any) -> bool:
    """Whether it is an array of integers of at least 0 that fit 64 bits."""
    return type(value) is list and all(type(each) is int and 0 <= each < 2**64 for each in value)


def _check_entries(pairs: Pairs, data_begin: int, size_bytes: int) -> None:
    """What safetensors checks, in its order."""
    entries = [_entry(name, value, data_begin) for name, value in pairs]
    for entry in entries:
        if entry.dtype not in _dtype.BITS:
            raise _Broken(f"tensor {shown(entry.name)}: no dtype is called {shown(entry.dtype)}")
    covered, before = data_begin, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        name = f"tensor {shown(entry.name)}"
        _check_begin(entry, covered, before)
        bits = math.prod(entry.shape) * _dtype.BITS[entry.dtype]
        if bits % 8:
            raise _Broken(f"{name}: {entry.dtype} {entry.shape} does not fill whole bytes")
        if bits // 8 != entry.end - entry.begin:
            raise _Broken(
                f"{name}: {entry.dtype} {entry.shape} takes {count_text(bits // 8, 'byte')}, its"
                f" data_offsets give it {entry.end - entry.begin:,}, from byte {entry.begin:,} of"
                " the file on"
            )
        covered, before = entry.end, name
    if covered != size_bytes:
        missing = covered - size_bytes
        raise _Broken(
            f"{before} ends at byte {covered:,}, the file at byte {size_bytes:,}:"
            f" {count_text(abs(missing), 'byte')} {'missing' if missing > 0 else 'too many'}"
        )


def _check_begin(entry: Entry, covered: int, before: str) -> None:
    if entry.begin != covered:
        what = "a hole" if entry.begin > covered else "an overlap"
        raise _Broken(
            f"tensor {shown(entry.name)} begins at byte {entry.begin:,} of the file, {before} ends"
            f" at byte {covered:,}: {what} of {count_text(abs(entry.begin - covered), 'byte')}"
        )
    if entry.end < entry.begin:
        raise _Broken(
            f"tensor {shown(entry.name)} begins at byte {entry.begin:,} of the file and ends at"
            f" byte {entry.end:,}"
        )


# --- the index ---


class Index(NamedTuple):
    """An index, or what is wrong with it: tensor name -> the path of its file."""

    problem: str | None
    places: dict[str, str]


def read_index(path: str) -> Index:
    """Read an index; OSError if it cannot be read."""
    try:
        weight_map = _files.read_index(path)
    except ValueError as error:
        return Index(printable(str(error).removeprefix(f"{path} ")), {})
    if not weight_map:
        return Index("it lists no tensors", {})
    folder = os.path.dirname(path)
    places = {name: os.path.join(folder, file) for name, file in weight_map.items()}
    return Index(_find_twice_in_index(path), places)


def _find_twice_in_index(path: str) -> str | None:
    root = json.loads(Path(path).read_bytes(), object_pairs_hook=_Object)
    listed = next(value for key, value in reversed(root) if key == "weight_map")
    twice = _find_twice(listed)
    return None if twice is None else twice.replace("in the header", "in its weight_map")


def check_places(
    places: Mapping[str, str], held: Mapping[str, list[str]], name_file: Callable[[str], str]
) -> list[str]:
    """What an index says that its files do not hold, or that they hold twice.

    Args:
        places: what the index says: tensor name -> path.
        held: path -> its names, of the files that can be read.
        name_file: a path in a line of text.
    """
    owners: dict[str, list[str]] = {}
    for path, names in held.items():
        for name in names:
            owners.setdefault(name, []).append(path)
    problems = []
    for name, path in places.items():
        found = owners.get(name, [])
        if path in held and path not in found:
            elsewhere = f", but in {name_file(found[0])}" if found else ""
            problems.append(
                f"tensor {shown(name)} is not in {name_file(path)}, where it is listed{elsewhere}"
            )
    for name, found in owners.items():
        if len(found) > 1:
            files = " and ".join(map(name_file, found[:2]))
            problems.append(f"tensor {shown(name)} is in {files}")
    return problems
