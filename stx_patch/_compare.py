# SPDX-License-Identifier: Apache-2.0
"""Tensors compared bit for bit, a piece at a time, so that no file has to fit into memory.

Tensors of two files are read into two small buffers, by the core where it is there: so any dtype
can be compared, and a disk that fails is an error and not a signal. A file's own two readings are
compared as they come: ours as it streams, and stock's mapping.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

from . import _check, _dtype, _filter, _native, _options, _origin, _stock
from ._cli_text import printable
from ._request import Request, open_native, open_sharded, stock_keywords

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


def open_source(source: str, tensor_filter: _filter.TensorFilter = None) -> Any:
    """A handle over a file, a folder or an index that knows this filter and no other, whatever is
    patched."""
    _stock.take()
    request = Request(True, (), {"tensor_filter": tensor_filter})
    request.rule = request.own_rule
    handle = open_sharded(request, source, "pt", "cpu", "mmap")
    if handle is None:
        handle = open_native(request, request.rule, source, "pt", "cpu", "mmap")
    if handle is None:
        handle = _origin.narrow(_open_stock(source), request.rule, source)
    return handle


def _open_stock(path: str) -> Any:
    with _stock.bypass():
        return _stock.safe_open(path, **stock_keywords("pt", "cpu", "mmap"))


class Side:
    """A file, a folder or an index whose tensors are given in pieces of bytes.

    Attributes:
        handle: for all that is no tensor.
    """

    def __init__(self, handle: Any) -> None:
        import torch

        self.handle = handle
        self._memory = torch.empty(PIECE_BYTES, dtype=torch.uint8)
        self._entries: dict[str, dict[str, _check.Entry]] = {}  # of each file

    def piece(self, name: str, begin: int, end: int) -> Any:
        """Bytes [begin, end) of a tensor, at most PIECE_BYTES, as torch.uint8; they stay until the
        next piece. OSError if they cannot be read."""
        path = self.handle.filename_of(name)
        if path not in self._entries:
            self._entries[path] = _check.read_entries(path)
        piece = self._memory[: end - begin]
        read_bytes(path, self._entries[path][name].begin + begin, piece)
        return piece

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.handle.__exit__(None, None, None)


def read_bytes(path: str, offset: int, memory: Any) -> None:
    """Fill a tensor of bytes with those of a file from `offset` on; OSError if that cannot be."""
    address, size_bytes = memory.data_ptr(), memory.numel()
    if _native.core is not None:
        _native.core.read_into(path, offset, size_bytes, address, -1, 0, PIECE_BYTES)
        return
    with open(path, "rb") as file:
        file.seek(offset)
        if file.readinto((ctypes.c_char * size_bytes).from_address(address)) != size_bytes:
            raise OSError(f"{path}: the file was cut short")


def flat(tensor: Any) -> Any:
    """The bytes of a contiguous tensor, as a view."""
    import torch

    return tensor.reshape(-1).view(torch.uint8)


def are_equal(left: Any, right: Any) -> bool:
    """Whether two runs of bytes of one length are the same. A word at a time: that is eight times
    as fast."""
    import torch

    words = left.numel() // 8 * 8
    in_words = torch.equal(left[:words].view(torch.int64), right[:words].view(torch.int64))
    return in_words and torch.equal(left[words:], right[words:])


def first_difference(left: Side, right: Side, name: str, size_bytes: int) -> int | None:
    """The first byte at which the tensors of one name differ, or None."""
    for begin, end in cut(size_bytes, PIECE_BYTES):
        found = first_byte(left.piece(name, begin, end), right.piece(name, begin, end))
        if found is not None:
            return begin + found
    return None


def first_byte(left: Any, right: Any) -> int | None:
    """The first byte at which two runs of bytes of one length differ, or None."""
    import torch

    if are_equal(left, right):
        return None
    begin, end = 0, left.numel()
    while end - begin > 1:
        middle = (begin + end) // 2
        if torch.equal(left[begin:middle], right[begin:middle]):
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
        differing: of these, those whose bits differ; None for a dtype whose elements cannot be
            told apart here.
        largest: the largest absolute difference of two finite values; None where there are none,
            or they are no floating-point values.
        not_finite: of those that differ, pairs with a NaN or infinity among them.
    """

    elements: int
    differing: int | None
    largest: float | None
    not_finite: int


def measure(left: Side, right: Side, name: str, size_bytes: int) -> Difference:
    """How much the tensors of one name, dtype and shape differ."""
    import torch

    dtype = left.handle.get_dtype(name)
    elements = math.prod(left.handle.get_shape(name))
    bits = _dtype.BITS.get(dtype, 0)
    if bits not in (4, *_INTEGERS):
        return Difference(elements, None, None, 0)
    integer = getattr(torch, _INTEGERS.get(bits, ""), None)
    floats = getattr(torch, _FLOATS.get(dtype, ""), None)
    differing, not_finite, largest = 0, 0, -1.0
    for begin, end in cut(size_bytes, min(_COUNT_BYTES, PIECE_BYTES)):
        ours, theirs = left.piece(name, begin, end), right.piece(name, begin, end)
        if are_equal(ours, theirs):
            continue
        if bits == 4:
            apart = ours ^ theirs
            differing += int((apart & 15).count_nonzero() + (apart >> 4).count_nonzero())
            continue
        differ = ours.view(integer) != theirs.view(integer)
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


def check_readings(path: str) -> Readings:
    """Read every byte of every tensor natively and by safetensors.

    Raises:
        ValueError: the native core leaves the file to safetensors: there is one reader only.
    """
    with ExitStack() as stack:
        handle = stack.enter_context(_open_core(path, None))
        stock = stack.enter_context(_Stock(lambda: _origin.narrow(_open_stock(path), None, path)))
        try:
            problem = _disagreement(handle, stock.handle) or _compare_readings(path, handle, stock)
        except (OSError, _stock.SafetensorError) as error:
            problem = printable(" ".join(str(error).split()))
        return Readings(problem, len(stock.plain))


class _Stock:
    """A stock handle whose tensors are given in pieces of bytes, views of its mapping. It is opened
    anew after a while."""

    def __init__(self, opener: Callable[[], Any]) -> None:
        self._opener = opener
        self._mapped_bytes = 0
        self.handle = opener()
        self.plain: dict[str, _check.Entry] = {}  # tensors that stock does not make

    def piece(self, name: str, begin: int, end: int) -> Any:
        """Bytes [begin, end) of a tensor."""
        if self._mapped_bytes > MAPPED_BYTES_MAX:
            self.handle.__exit__(None, None, None)
            self.handle = self._opener()
            self._mapped_bytes = 0
        self._mapped_bytes += end - begin
        if _is_made(self.handle.get_dtype(name), self.handle.get_shape(name)):
            return flat(self.handle.get_tensor(name))[begin:end]
        return self._plain_piece(name, begin, end)

    def _plain_piece(self, name: str, begin: int, end: int) -> Any:
        import torch

        path = self.handle.filename_of(name)
        if name not in self.plain:
            self.plain[name] = _check.read_entries(path)[name]
        first = self.plain[name].begin
        mapped = torch.from_file(path, shared=False, size=first + end, dtype=torch.uint8)
        return mapped[first + begin :].clone()  # at an address that words can be compared at

    def __enter__(self) -> _Stock:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.handle.__exit__(None, None, None)


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
        raise ValueError(
            f"{path}: the native core leaves it to safetensors: {refusal.args[1]}"
        ) from None


def _disagreement(ours: Any, theirs: Any) -> str | None:
    """What the two make of the header, where that is not the same."""
    if sorted(ours.keys()) != sorted(theirs.keys()):
        return "the native reader and safetensors find other names in it"
    for name in ours.keys():  # noqa: SIM118
        if _kind(ours, name) != _kind(theirs, name):
            return f"tensor {_check.shown(name)} is another one natively and by safetensors"
    return None


def _kind(handle: Any, name: str) -> tuple[str, list[int]]:
    return handle.get_dtype(name), handle.get_shape(name)


def _compare_readings(path: str, handle: Any, stock: _Stock) -> str | None:
    for name, begin, piece in _read_natively(path, handle):
        found = first_byte(piece, stock.piece(name, begin, begin + piece.numel()))
        if found is not None:
            return (
                f"tensor {_check.shown(name)}: its byte {begin + found:,} is not the same natively"
                " and by safetensors"
            )
    return None


def _read_natively(path: str, handle: Any) -> Iterator[tuple[str, int, Any]]:
    """(name, offset in the tensor, bytes) of everything: small tensors as they stream, large ones
    and those that torch has no dtype for piece by piece."""
    import torch

    places = {name: _native.core.device_place(handle, name) for name in handle.offset_keys()}
    streamed = frozenset(
        name
        for name, (dtype, _, begin, end) in places.items()
        if dtype and end - begin < PIECE_BYTES
    )
    with _open_core(path, ("names", streamed)) as small:
        for name, tensor in small.tensors():
            yield name, 0, flat(tensor)
    memory = torch.empty(PIECE_BYTES, dtype=torch.uint8)
    for name, (_, _, first, behind) in places.items():
        for begin, end in cut(0 if name in streamed else behind - first, PIECE_BYTES):
            piece = memory[: end - begin]
            read_bytes(path, first + begin, piece)
            yield name, begin, piece
