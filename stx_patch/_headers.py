# SPDX-License-Identifier: Apache-2.0
"""Headers of files for commands that only look, what is odd about them together, and, of a file
that is none, what it may be instead. Nothing but headers is read.
"""

from __future__ import annotations

import gc
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from . import _files, _filter, _header, _sharded
from ._cli_errors import CliError, is_format_error
from ._cli_text import count_text

_HEAD_BYTES = 32
_HEADER_MAX_BYTES = 100_000_000  # safetensors reads no longer one
_MAGICS = (
    (b"version https://git-lfs", "a git-lfs pointer: `git lfs pull` fetches the file itself"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes: convert it first"),
    (b"\x80\x02", "a pickle, as torch.save wrote once: convert it first"),
    (b"\x80\x03", "a pickle: convert it first"),
    (b"\x80\x04", "a pickle: convert it first"),
    (b"\x80\x05", "a pickle: convert it first"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"<!", "a web page in place of what was to be downloaded"),
    (b"<html", "a web page in place of what was to be downloaded"),
    (b'{"', "JSON: an index has to end in .json"),
)


class Tensor(NamedTuple):
    """An entry of a header. Its bytes are at [begin_bytes, end_bytes) of the file."""

    name: str
    dtype: str
    shape: list[int]
    begin_bytes: int
    end_bytes: int
    file: int  # the number of its header


class Header(NamedTuple):
    """One file. Tensors are in the order in which they lie there."""

    path: str
    size_bytes: int
    data_begin_bytes: int
    metadata: dict[str, str] | None
    tensors: list[Tensor]


class Headers(NamedTuple):
    """All files of a command, and what about them would keep them from being loaded as one."""

    files: list[Header]
    tensors: list[Tensor]
    tensors_total: int  # with those of files that a filter leaves closed
    notes: list[str]

    @property
    def metadata(self) -> dict[str, str]:
        """The files' metadata in one dict, the first file's word first."""
        merged: dict[str, str] = {}
        for header in reversed(self.files):
            merged.update(header.metadata or {})
        return merged


def read_headers(sources: Sequence[str], rule: _filter.Rule | None = None) -> Headers:
    """The headers of files, folders and indexes; of an index only files with something that `rule`
    keeps.

    Raises:
        OSError: a file that cannot be read, or is not there.
        CliError: one that is no safetensors file.
        ValueError: an index that is none, a folder of several.
    """
    found = _find(sources)
    chosen = (path for files in found for path in _sharded.choose_paths(files, rule))
    paths = list(dict.fromkeys(chosen))
    with no_collections():
        headers = [_read_header(path, number) for number, path in enumerate(paths)]
        tensors = [tensor for header in headers for tensor in header.tensors]
        listed: dict[str, str] = {}
        for files in found:
            listed.update((name, files.listed[file]) for name, file in (files.index or {}).items())
        opened = set(paths)
        owners = {name: path for name, path in listed.items() if path in opened}
        notes: list[str] = []
        if owners or len(headers) > 1:
            tensors, notes = _settle(owners, headers, tensors)
    return Headers(headers, tensors, len(tensors) + len(listed) - len(owners), notes)


def names_in(sources: Sequence[str]) -> list[str]:
    """The names in files, folders and indexes; of the latter as they list them, without a look at
    the files, of which not all need be there. Raises as `read_headers` does."""
    names: dict[str, None] = {}
    for files in _find(sources):
        if files.index is None:
            names.update((tensor.name, None) for tensor in read_headers(files.paths).tensors)
        else:
            names.update(dict.fromkeys(files.index))
    return list(names)


def _find(sources: Sequence[str]) -> list[_files.Files]:
    return [_files.find_files(source) or _files.Files([source]) for source in sources]


@contextmanager
def naming_bad_files(sources: Sequence[str]) -> Iterator[None]:
    """An error of safetensors in the block says which file is bad, if one is."""
    try:
        yield
    except Exception as error:
        if is_format_error(error):
            with suppress(OSError):  # a file that a filter leaves closed need not be there
                read_headers(sources)
        raise


def _read_header(path: str, number: int) -> Header:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CliError(f"{path} is not a file")
    try:
        with _header.read_header(path) as found:
            tensors = [Tensor(*entry, number) for entry in found.entries]
            size_bytes, data_begin_bytes = found.size_bytes, found.data_begin_bytes
            return Header(path, size_bytes, data_begin_bytes, found.metadata, tensors)
    except Exception as error:
        if not is_format_error(error):
            raise
        raise CliError(_explain_bad(path, error)) from None


def kind_of(head: bytes) -> str | None:
    """What a file that is no safetensors file seems to be, by its first bytes."""
    return next((what for magic, what in _MAGICS if head.startswith(magic)), None)


def _explain_bad(path: str, error: Exception) -> str:
    """What the file seems to be instead."""
    with open(path, "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        head = file.read(_HEAD_BYTES)
        header_bytes = int.from_bytes(head[: _header.PREFIX_BYTES], "little")
        file.seek(_header.PREFIX_BYTES)
        text = file.read(header_bytes) if header_bytes <= _HEADER_MAX_BYTES else b""
    if size_bytes == 0:
        return f"{path} is empty: was it downloaded wholly?"
    what = kind_of(head)
    if what is not None:
        return f"{path} is no safetensors file but {what}"
    expected_bytes = _expected_bytes(head, text)
    if expected_bytes > size_bytes:
        return (
            f"{path} is cut short: {size_bytes:,} of {expected_bytes:,} bytes;"
            " was it downloaded wholly?"
        )
    reason = str(error).removeprefix("Error while deserializing header: ")
    return f"{path} is no safetensors file: {reason}"


def _expected_bytes(head: bytes, text: bytes) -> int:
    """The size that a file with this beginning has at least; 0 if it is none."""
    header_bytes = int.from_bytes(head[: _header.PREFIX_BYTES], "little")
    if (
        head[_header.PREFIX_BYTES : _header.PREFIX_BYTES + 1] != b"{"
        or header_bytes > _HEADER_MAX_BYTES
    ):
        return 0
    begin_bytes = _header.PREFIX_BYTES + header_bytes
    if len(text) < header_bytes:
        return begin_bytes
    try:
        entries = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name[:2] != "__"]
        return begin_bytes + int(max(ends))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return 0


def _settle(
    owners: dict[str, str], headers: list[Header], tensors: list[Tensor]
) -> tuple[list[Tensor], list[str]]:
    """The tensors that count, of a name in several files the one in its owner, which is where an
    index lists it; and what a load would refuse."""
    present = {(tensor.name, headers[tensor.file].path) for tensor in tensors}
    notes = []
    missing = [listed for listed in owners.items() if listed not in present]
    if missing:
        name, path = missing[0]
        notes.append(
            f"{count_text(len(missing), 'tensor')} of an index not found where it lists them,"
            f" the first: {name} in {path}"
        )
    places: dict[str, list[str]] = {}
    kept = []
    for tensor in tensors:
        path = headers[tensor.file].path
        owner = owners.get(tensor.name, path)
        if owner == path or (tensor.name, owner) not in present:
            kept.append(tensor)
            places.setdefault(tensor.name, []).append(path)
    twice = [name for name, paths in places.items() if len(paths) > 1]
    if twice:
        first, second = places[twice[0]][:2]
        notes.append(
            f"{count_text(len(twice), 'name')} in two files, the first: {twice[0]} in {first} and"
            f" {second}"
        )
    return kept, notes


@contextmanager
def no_collections() -> Iterator[None]:
    """No full collections while many values are made, of which none can be garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
