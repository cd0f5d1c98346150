# SPDX-License-Identifier: Apache-2.0
"""Tensors compared bit for bit, a piece at a time, so that no file has to fit into memory.

Tensors of two files are read into a small buffer for each, by the core where it is there: so any
dtype can be compared, and a disk that fails is an error and not a signal. A file's own two readings
are compared as they come: ours as it streams, and stock's mapping.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

from . import _check, _dtype, _files, _filter, _header, _native, _options, _origin, _sharded, _stock
from ._cli_text import printable
from ._request import stock_keywords

PIECE_BYTES = 16 << 20  # compared at a time
MAPPED_BYTES_MAX = 256 << 20  # read through one mapping: its pages are this process's till it ends
_COUNT_BYTES = 4 << 20  # of which values are made, up to eight times as large

_FLOATS = {
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
_INTEGERS = {8: "uint8", 16: "int16", 32: "int32", 64: "int64"}  # of a size in bits
# What torch may lack, and what it calls it; nothing where no torch has it.
_RARE = {"F4": "float4_e2m1fn_x2", "F8_E8M0": "float8_e8m0fnu", "F6_E2M3": "", "F6_E3M2": ""}

Bytes = bytes | bytearray


class Side:
    """A file, a folder or an index, of whose tensors a rule keeps some; whatever is patched.

    Attributes:
        entries: what is kept, by name, in the order of files and places.
        metadata: the files' `__metadata__` in one dict, the first one's word first.

    Raises:
        OSError, SafetensorError, ValueError: what loading it raises.
    """

    def __init__(self, source: str, rule: _filter.Rule | None = None) -> None:
        files = _files.find_files(source) or _files.Files([source])
        paths = _sharded.choose_paths(files, rule)
        self._buffer = bytearray(PIECE_BYTES)
        with ExitStack() as stack:
            headers = [stack.enter_context(_header.read_header(path, rule)) for path in paths]
            if len(paths) > 1 or files.index is not None:
                for number, names in _sharded.settle(files, paths, headers).items():
                    kept = frozenset(headers[number].offset_keys()).difference(names)
                    headers[number].keep_names(kept)
            self._stack = stack.pop_all()
        self._headers = {entry[0]: header for header in headers for entry in header.kept}
        self.entries = {entry[0]: entry for header in headers for entry in header.kept}
        self.metadata: dict[str, str] = {}
        for header in reversed(headers):
            self.metadata.update(header.metadata or {})

    def kind(self, name: str) -> tuple[str, list[int]]:
        """The dtype as the header spells it, and the shape."""
        return self.entries[name][1:3]

    def nbytes(self, name: str) -> int:
        """A tensor's size."""
        _, _, _, begin, end = self.entries[name]
        return end - begin

    def piece(self, name: str, begin: int, end: int) -> Bytes:
        """Bytes [begin, end) of a tensor, at most PIECE_BYTES; they stay until the next piece.
        OSError if they cannot be read."""
        header, size_bytes = self._headers[name], end - begin
        read_bytes(header, self.entries[name][3] + begin, self._buffer, size_bytes)
        return self._buffer if size_bytes == len(self._buffer) else self._buffer[:size_bytes]

    def check_unchanged(self) -> None:
        """SafetensorError if somebody has written to a file since it was opened."""
        for header in dict.fromkeys(self._headers.values()):
            header.check_unchanged()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()


def read_bytes(header: _header.Header, offset: int, memory: bytearray, size_bytes: int) -> None:
    """Fill the begin of `memory` with bytes of a file; OSError if that cannot be."""
    if _native.core is not None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        _native.core.read_into(header.path, offset, size_bytes, address, -1, 0, PIECE_BYTES)
        return
    with memoryview(memory) as view:
        done = 0
        while done < size_bytes:
            got = os.preadv(header.fd, [view[done:size_bytes]], offset + done)
            if got == 0:
                raise OSError(f"{header.path}: the file ends at byte {offset + done:,}")
            done += got


def first_difference(left: Side, right: Side, name: str) -> int | None:
    """The first byte at which the tensors of one name and size differ, or None."""
    for begin, end in cut(left.nbytes(name), PIECE_BYTES):
        found = first_byte(left.piece(name, begin, end), right.piece(name, begin, end))
        if found is not None:
            return begin + found
    return None


def first_byte(left: Bytes, right: Bytes) -> int | None:
    """The first byte at which two runs of bytes of one length differ, or None."""
    if left == right:
        return None
    begin, end = 0, len(left)
    while end - begin > 1:
        middle = (begin + end) // 2
        if left[begin:middle] == right[begin:middle]:
            begin = middle
        else:
            end = middle
    return begin


def cut(size_bytes: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """[0, size_bytes) in pieces."""
    for begin in range(0, size_bytes, piece_bytes):
        yield begin, min(begin + piece_bytes, size_bytes)


# --- how much differs ---


class Difference(NamedTuple):
    """By how much two tensors of one dtype and shape differ.

    Attributes:
        elements: of each.
        differing: of these, those whose bits differ; None where they cannot be told apart: for a
            dtype of 6 bits, and without torch.
        largest: the largest absolute difference of two finite values; None where there are none,
            or they are no floating-point values.
        not_finite: of those that differ, pairs with a NaN or infinity among them.
    """

    elements: int
    differing: int | None
    largest: float | None
    not_finite: int


def measure(left: Side, right: Side, name: str) -> Difference:
    """How much the tensors of one name, dtype and shape differ."""
    dtype, shape = left.kind(name)
    elements, bits = math.prod(shape), _dtype.BITS.get(dtype, 0)
    if bits not in (4, *_INTEGERS) or not _native.torch_is_ready():
        return Difference(elements, None, None, 0)
    import torch

    integer = getattr(torch, _INTEGERS.get(bits, "uint8"))
    floats = getattr(torch, _FLOATS.get(dtype, ""), None)
    differing, not_finite, largest = 0, 0, -1.0
    for begin, end in cut(left.nbytes(name), min(_COUNT_BYTES, PIECE_BYTES)):
        pieces = left.piece(name, begin, end), right.piece(name, begin, end)
        if pieces[0] == pieces[1]:
            continue
        ours, theirs = (torch.frombuffer(piece, dtype=integer) for piece in pieces)
        if bits == 4:
            apart = ours ^ theirs
            differing += int((apart & 15).count_nonzero() + (apart >> 4).count_nonzero())
            continue
        differ = ours != theirs
        differing += int(differ.count_nonzero())
        if floats is not None:
            most, count = _measure_floats(_values(ours, floats), _values(theirs, floats), differ)
            largest = max(largest, most)
            not_finite += count
    return Difference(elements, differing, largest if largest >= 0 else None, not_finite)


def _measure_floats(ours: Any, theirs: Any, differ: Any) -> tuple[float, int]:
    """The largest difference of finite values, -1 if there is none; and how many pairs of those
    that differ are not finite."""
    apart = (ours - theirs).abs()
    most = float(apart.max())
    if math.isfinite(most):
        return most, 0
    finite = ours.isfinite() & theirs.isfinite()
    apart = apart[differ & finite]
    return float(apart.max()) if apart.numel() else -1.0, int((differ & ~finite).count_nonzero())


def _values(bits: Any, dtype: Any) -> Any:
    """Elements as numbers that can be subtracted."""
    import torch

    return bits.view(dtype).to(torch.complex128 if dtype.is_complex else torch.float64)


# --- a file by both readers ---


class Readings(NamedTuple):
    """What is wrong with a file's two readings, or None; and how many tensors safetensors does not
    make, so that it is their plain bytes that were the same."""

    problem: str | None
    plain_count: int


def check_readings(path: str, tell: Callable[[int], None]) -> Readings:
    """Read every byte of every tensor natively and by safetensors. Needs torch. `tell` is called
    with how many bytes more are done.

    Raises:
        ValueError: the native core leaves the file to safetensors: there is one reader only.
    """
    _stock.take()
    with _open_core(path, None), _header.read_header(path) as header, _Stock(header) as stock:
        try:
            problem = _disagreement(header, stock.handle)
            plain_count = sum(not _is_made(*entry[1:3]) for entry in header.entries)
            return Readings(problem or _compare_readings(header, stock, tell), plain_count)
        except (OSError, _stock.SafetensorError) as error:
            return Readings(printable(" ".join(str(error).split())), 0)


class _Stock:
    """What stock reads of a file, in pieces. Its handle is opened anew after a while."""

    def __init__(self, header: _header.Header) -> None:
        self._header = header
        self._mapped_bytes = 0
        self.handle = open_stock(header.path)

    def piece(self, entry: _header.Entry, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a tensor."""
        name, dtype, shape, first, _ = entry
        if not _is_made(dtype, shape):
            return os.pread(self._header.fd, end - begin, first + begin)
        if self._mapped_bytes > MAPPED_BYTES_MAX:
            self.handle.__exit__(None, None, None)
            self.handle = open_stock(self._header.path)
            self._mapped_bytes = 0
        self._mapped_bytes += end - begin
        return _bytes_of(self.handle.get_tensor(name), begin, end)

    def __enter__(self) -> _Stock:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.handle.__exit__(None, None, None)


def open_stock(path: str) -> Any:
    """Stock's handle for torch, whatever is patched."""
    with _stock.bypass():
        return _stock.safe_open(path, **stock_keywords("pt", "cpu", "mmap"))


def _bytes_of(tensor: Any, begin: int, end: int) -> bytes:
    """A copy of some bytes of a contiguous tensor."""
    return ctypes.string_at(tensor.data_ptr() + begin, end - begin)


def _is_made(dtype: str, shape: list[int]) -> bool:
    """Whether safetensors makes a tensor of torch of this."""
    import torch

    if dtype == "F4" and (not shape or shape[-1] % 2):  # two of them are one element of torch
        return False
    return dtype not in _RARE or hasattr(torch, _RARE[dtype])


def _open_core(path: str, rule: _filter.Rule | None) -> Any:
    """A native handle that knows this rule and no other. What it streams goes through the page
    cache, and is there for the other reader."""
    if _native.core is None:
        raise ValueError(f"there is no native core here ({_native.import_error})")
    options = _options.Options(direct_io="off")
    origin = _origin.Origin(path, (), stock_keywords("pt", "cpu", "mmap"), None, options)
    try:
        return _native.core.open(path, rule, origin, options.core, False)
    except _native.core.Refused as refusal:
        reason = f"the native core leaves it to safetensors: {refusal.args[1]}"
        raise ValueError(f"{path}: {reason}") from None


def _disagreement(header: _header.Header, handle: Any) -> str | None:
    """What the two make of the header, where that is not the same."""
    if sorted(header.offset_keys()) != sorted(handle.keys()):
        return "the native reader and safetensors find other names in it"
    for name, dtype, shape, _, _ in header.entries:
        theirs = handle.get_slice(name)
        if (dtype, shape) != (theirs.get_dtype(), theirs.get_shape()):
            return f"tensor {_check.shown(name)} is another one natively and by safetensors"
    return None


def _compare_readings(
    header: _header.Header, stock: _Stock, tell: Callable[[int], None]
) -> str | None:
    for entry, begin, piece in _read_natively(header):
        tell(len(piece))
        found = first_byte(piece, stock.piece(entry, begin, begin + len(piece)))
        if found is not None:
            return (
                f"tensor {_check.shown(entry[0])}: its byte {begin + found:,} is not the same"
                " natively and by safetensors"
            )
    return None


def _read_natively(header: _header.Header) -> Iterator[tuple[_header.Entry, int, Bytes]]:
    """(entry, offset in the tensor, bytes) of everything: small tensors as they stream, large ones
    and those that the stream leaves to stock piece by piece."""
    entries = {entry[0]: entry for entry in header.entries}
    streamed = frozenset(
        name
        for name, (_, dtype, shape, begin, end) in entries.items()
        if dtype != "F4" and _is_made(dtype, shape) and end - begin < PIECE_BYTES
    )
    with _open_core(header.path, ("names", streamed)) as small:
        for name, tensor in small.tensors():
            yield entries[name], 0, _bytes_of(tensor, 0, tensor.nbytes)
    memory = bytearray(PIECE_BYTES)
    for name, entry in entries.items():
        first, behind = entry[3:]
        for begin, end in cut(0 if name in streamed else behind - first, PIECE_BYTES):
            read_bytes(header, first + begin, memory, end - begin)
            yield entry, begin, memory[: end - begin]
