# SPDX-License-Identifier: Apache-2.0
"""Tensors on a CUDA device: torch makes their memory, the core fills it through its staging ring.

Whoever loads decides what is read; here it is decided where it goes, and converted on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from . import _native, _progress

_WINDOW_BYTES = 64 << 20  # of stored bytes on the device while they are converted
_ALIGN_BYTES = 16  # of each tensor in it


class Cuda:
    """What is asked of torch about CUDA, in one place: tests put another one here."""

    def serves(self, device: Any) -> bool:
        """Whether there is such a device here, and we can use it. Initialises nothing."""
        index = index_in(device)
        try:
            import torch

            if index is None or not torch.cuda.is_available():
                return False
            is_there = index < torch.cuda.device_count()
        except (ImportError, RuntimeError):  # a driver that does not answer
            return False
        return bool(is_there and _native.core is not None and _native.core.device_runtime())

    def spell(self, device: Any) -> Any:
        """What torch calls a device, as safetensors would be told of it."""
        if device != "cuda" and getattr(device, "type", None) != "cuda":
            return device
        import torch

        given = getattr(device, "index", None) if device != "cuda" else None
        return f"cuda:{torch.cuda.current_device() if given is None else given}"

    def is_capturing(self) -> bool:
        """Whether work of the current stream is recorded: nothing may wait for it then."""
        import torch

        return bool(torch.cuda.is_current_stream_capturing())

    def device(self, index: int) -> AbstractContextManager[Any]:
        """A block in which that device is the calling thread's."""
        import torch

        return torch.cuda.device(index)

    def allocate(self, shape: Sequence[int], dtype: Any, index: int) -> Any:
        """A tensor whose contents do not matter yet."""
        import torch

        return torch.empty(shape, dtype=dtype, device=f"cuda:{index}")

    def stream(self, index: int) -> Any:
        """The current stream of a device; its `cuda_stream` is the runtime's pointer."""
        import torch

        return torch.cuda.current_stream(index)

    def index_of(self, tensor: Any) -> int | None:
        """The number of the device that a tensor is on; None for another kind."""
        return int(tensor.get_device()) if tensor.is_cuda else None

    def current(self, stream: Any) -> AbstractContextManager[Any]:
        """A block in which that stream is the calling thread's."""
        import torch

        return torch.cuda.stream(stream)


cuda = Cuda()


def index_in(device: Any) -> int | None:
    """The number of the CUDA device that safetensors takes `device` for; None for another kind."""
    if isinstance(device, int) and not isinstance(device, bool):
        return device if device >= 0 else None
    found = re.fullmatch(r"cuda(?::([0-9]+))?", device) if isinstance(device, str) else None
    return None if found is None else int(found[1] or 0)


class Target:
    """Where the tensors of a load go, and as what.

    Attributes:
        index: number of the CUDA device.
        staging_bytes: how large its ring is made, if it is not there yet.
        dtype: what floating-point tensors are converted to, or None.
    """

    __slots__ = ("dtype", "index", "staging_bytes")

    def __init__(self, index: int, staging_bytes: int, dtype: Any = None) -> None:
        self.index = index
        self.staging_bytes = staging_bytes
        self.dtype = dtype

    def converts(self, dtype: Any) -> bool:
        """Whether tensors of this dtype are converted."""
        return (
            self.dtype is not None
            and self.dtype != dtype
            and dtype.is_floating_point
            and self.dtype.is_floating_point
        )


class Place:
    """A tensor in its file.

    Attributes:
        name: its name.
        dtype: torch's, or None where stock has to make it.
        shape: its shape.
        begin, end: its bytes, as offsets in the file.
    """

    __slots__ = ("begin", "dtype", "end", "name", "shape")

    def __init__(self, name: str, dtype: Any, shape: list[int], begin: int, end: int) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.begin = begin
        self.end = end

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return self.end - self.begin

    def rows(self, first: int, count: int) -> Place:
        """Rows [first, first + count) of it, as if they were a tensor."""
        row_bytes = self.nbytes // self.shape[0] if self.shape[0] else 0
        begin = self.begin + first * row_bytes
        shape = [count, *self.shape[1:]]
        return Place(self.name, self.dtype, shape, begin, begin + count * row_bytes)


def place_of(handle: Any, name: str) -> Place:
    """Where a native handle has a tensor. Raises what the handle raises for a name it has not."""
    import torch

    dtype, shape, begin, end = _native.core.device_place(handle, name)
    known = None if dtype is None else getattr(torch, dtype, None)
    return Place(name, known, shape, begin, end)


class Load:
    """Tensors on their way to a device: memory now, contents when it is run.

    What is converted travels as it is stored, and is converted on the device a window at a time, so
    that it is never there twice.

    Attributes:
        tensors: name -> tensor, in the order of `places`; without meaning until `run` returned.
    """

    def __init__(
        self,
        handle: Any,
        places: Sequence[Place],
        target: Target,
        progress: _progress.Part | None = None,
    ) -> None:
        """`places` ascend and have a dtype. `progress`: the native `handle`'s, which is told, if
        they are all of its tensors."""
        self._handle = handle
        self._target = target
        self._stream = cuda.stream(target.index)
        self._plain: list[Place] = []
        self._converted: list[Place] = []
        self._progress = progress
        self._done_bytes = 0
        self._total_bytes = sum(place.nbytes for place in places)
        self.tensors: dict[str, Any] = {}
        for place in places:
            converts = target.converts(place.dtype)
            dtype = target.dtype if converts else place.dtype
            self.tensors[place.name] = cuda.allocate(place.shape, dtype, target.index)
            (self._converted if converts else self._plain).append(place)
        self._window = self._make_window()

    def run(self) -> None:
        """Read. Any thread, once.

        Raises:
            SafetensorError, MemoryError, RuntimeError: what reading raises.
        """
        extents = [
            (place.begin, place.end, self.tensors[place.name].data_ptr())
            for place in self._plain
            if place.nbytes
        ]
        is_told = self._progress is not None and not self._converted  # by the core
        self._read(extents, len(self._plain), is_told)
        if not self._converted:
            return
        try:
            with cuda.current(self._stream):
                self._convert()
            self._stream.synchronize()  # whoever uses them may do so on another stream
        finally:
            if self._progress is not None:
                self._progress.stop()

    def _read(
        self, extents: list[tuple[int, int, int]], tensors_count: int, tells: bool = False
    ) -> None:
        with cuda.device(self._target.index):
            _native.core.device_read(
                self._handle,
                extents,
                self._target.index,
                self._stream.cuda_stream,
                self._target.staging_bytes,
                tensors_count,
                tells,
            )
        self._done_bytes += sum(end - begin for begin, end, _ in extents)
        if self._progress is not None and not tells:
            self._progress.report(self._done_bytes, self._total_bytes)

    def _make_window(self) -> Any:
        """Memory for stored bytes that are to be converted, or None."""
        if not self._converted:
            return None
        import torch

        wanted_bytes = sum(map(_aligned_bytes, (place.nbytes for place in self._converted)))
        size_bytes = min(_WINDOW_BYTES, wanted_bytes)
        return cuda.allocate([size_bytes], torch.uint8, self._target.index)

    def _convert(self) -> None:
        for group in groups(self._converted, self._window.numel()):
            if group[0].nbytes > self._window.numel():
                self._convert_in_parts(group[0])
                continue
            offsets = _offsets(group)
            address = self._window.data_ptr()
            self._read(
                [
                    (place.begin, place.end, address + offset)
                    for place, offset in zip(group, offsets, strict=True)
                    if place.nbytes
                ],
                len(group),
            )
            for place, offset in zip(group, offsets, strict=True):
                stored = self._window[offset : offset + place.nbytes].view(place.dtype)
                self.tensors[place.name].view(-1).copy_(stored)

    def _convert_in_parts(self, place: Place) -> None:
        flat = self.tensors[place.name].view(-1)
        item_bytes = place.dtype.itemsize
        step = self._window.numel() // item_bytes
        for first in range(0, flat.numel(), step):
            count = min(step, flat.numel() - first)
            begin, size_bytes = place.begin + first * item_bytes, count * item_bytes
            is_last = first + count == flat.numel()
            self._read([(begin, begin + size_bytes, self._window.data_ptr())], int(is_last))
            flat[first : first + count].copy_(self._window[:size_bytes].view(place.dtype))


def groups(places: Sequence[Place], window_bytes: int) -> Iterator[list[Place]]:
    """Neighbours that fit into a window together; a larger one alone."""
    group: list[Place] = []
    filled_bytes = 0
    for place in places:
        size_bytes = _aligned_bytes(place.nbytes)
        if group and filled_bytes + size_bytes > window_bytes:
            yield group
            group, filled_bytes = [], 0
        group.append(place)
        filled_bytes += size_bytes
    if group:
        yield group


def _offsets(places: Sequence[Place]) -> list[int]:
    """Where each of them begins in a window."""
    offsets, offset = [], 0
    for place in places:
        offsets.append(offset)
        offset += _aligned_bytes(place.nbytes)
    return offsets


def _aligned_bytes(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


def is_stocks() -> bool:
    """Whether stock has to load: torch is made to do something else with what is called here, or
    records it."""
    import torch

    depth = getattr(torch._C, "_len_torch_dispatch_stack", int)
    return bool(depth()) or cuda.is_capturing()
