# SPDX-License-Identifier: Apache-2.0
"""The handle and the slice of a file whose tensors go to a CUDA device.

A native handle that reads its file, behind the same methods; what it does not serve goes to stock,
which was told of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import _device, _dtype, _origin, _owned, _progress, _stock

_PIECE_BYTES = 64 << 20  # of tensors(), read while the one before is used


class DeviceHandle(_origin.Disguised):
    """A file opened natively for a device."""

    __slots__ = ("_handle", "_origin", "_target")

    def __init__(self, handle: Any, origin: _origin.Origin, target: _device.Target) -> None:
        self._handle = handle  # None: closed
        self._origin = origin
        self._target = target

    @property
    def _skipped_count(self) -> int:
        skipped: int = self._open()._skipped_count
        return skipped

    def _all_names(self) -> list[str]:
        names: list[str] = self._open()._all_names()
        return names

    def keys(self) -> list[str]:
        names: list[str] = self._open().keys()
        return names

    def offset_keys(self) -> list[str]:
        names: list[str] = self._open().offset_keys()
        return names

    def metadata(self) -> dict[str, str] | None:
        metadata: dict[str, str] | None = self._open().metadata()
        return metadata

    def get_dtype(self, name: str) -> str:
        dtype: str = self._open().get_dtype(name)
        return dtype

    def get_shape(self, name: str) -> list[int]:
        shape: list[int] = self._open().get_shape(name)
        return shape

    def nbytes(self, name: str) -> int:
        size_bytes: int = self._open().nbytes(name)
        return size_bytes

    def filename_of(self, name: str) -> str:
        path: str = self._open().filename_of(name)
        return path

    @property
    def total_tensor_size(self) -> int:
        size_bytes: int = self._open().total_tensor_size
        return size_bytes

    def get_tensor(self, name: Any) -> Any:
        """The tensor called name, on the device; SafetensorError if there is none."""
        handle = self._open()
        if not isinstance(name, str):
            return handle.get_tensor(name)  # raises what stock raises
        return self._load(handle, [_device.place_of(handle, name)])[name]

    def get_tensors(self) -> dict[str, Any]:
        """All tensors, on the device: a dict in file order."""
        handle = self._open()
        places = [_device.place_of(handle, name) for name in handle.offset_keys()]
        return self._load(handle, places, self._origin.progress)

    def tensors(self, dtype: Any = None) -> Iterator[tuple[str, Any]]:
        """Iterate over (name, tensor) in file order, floating-point ones as `dtype`. The next ones
        are read meanwhile, into no more device memory than twice 64 MiB, or the largest tensor."""
        handle = self._open()
        _dtype.check(dtype)
        places = [_device.place_of(handle, name) for name in handle.offset_keys()]
        target = _device.Target(self._target.index, self._target.staging_bytes, dtype)
        return self._stream(handle, places, target if dtype is not None else self._target)

    def _stream(
        self, handle: Any, places: list[_device.Place], target: _device.Target
    ) -> Iterator[tuple[str, Any]]:
        groups = _device.groups(places, _PIECE_BYTES)
        progress = self._origin.progress
        done_bytes, total_bytes = 0, sum(place.nbytes for place in places)
        with ThreadPoolExecutor(1) as pool:
            try:
                group = next(groups, None)
                begun = None if group is None else self._begin(pool, handle, group, target)
                while begun is not None and group is not None:
                    tensors = begun()
                    done_bytes += sum(place.nbytes for place in group)
                    if progress is not None:
                        progress.report(done_bytes, total_bytes)
                    group = next(groups, None)
                    begun = None if group is None else self._begin(pool, handle, group, target)
                    while tensors:
                        name = next(iter(tensors))
                        yield name, tensors.pop(name)
            finally:
                if progress is not None:
                    progress.stop()

    def _begin(
        self,
        pool: ThreadPoolExecutor,
        handle: Any,
        places: list[_device.Place],
        target: _device.Target,
    ) -> Callable[[], dict[str, Any]]:
        """Have tensors read by another thread; call the result for them. Their memory is asked for
        here, for which stream is current is each thread's own."""
        is_stocks = _device.is_stocks()
        native = [place for place in places if place.dtype is not None and not is_stocks]
        load = _device.Load(handle, native, target)
        future = pool.submit(load.run)

        def finish() -> dict[str, Any]:
            future.result()
            return self._complete(places, load.tensors)

        return finish

    def get_slice(self, name: str) -> Any:
        """A lazy slice of the tensor called name; indexing it reads the rows it needs."""
        handle = self._open()
        entry = handle.get_slice(name)
        return DeviceSlice(self, handle, entry, name)

    def _load(
        self,
        handle: Any,
        places: list[_device.Place],
        progress: _progress.Part | None = None,
    ) -> dict[str, Any]:
        if _device.is_stocks():
            return self._complete(places, {})
        native = [place for place in places if place.dtype is not None]
        load = _device.Load(handle, native, self._target, progress)
        load.run()
        return self._complete(places, load.tensors)

    def _complete(self, places: list[_device.Place], tensors: dict[str, Any]) -> dict[str, Any]:
        """In order, and with those that only stock makes."""
        return {
            place.name: tensors[place.name]
            if place.name in tensors
            else self._origin.stock_tensor(place.name)
            for place in places
        }

    def _open(self) -> Any:
        if self._handle is None:
            raise _stock.SafetensorError("File is closed")
        return self._handle

    def __getattr__(self, attribute: str) -> Any:
        """What a newer stock's handle has."""
        is_public = not attribute.startswith("_")
        found = self._origin.stock_attribute(self, attribute) if is_public else NotImplemented
        if found is NotImplemented:
            raise AttributeError(f"'builtins.safe_open' object has no attribute {attribute!r}")
        return found

    def __enter__(self) -> DeviceHandle:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._handle = None  # slices keep it open for themselves

    def __repr__(self) -> str:
        return f"<builtins.safe_open object at {id(self):#x}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("cannot pickle 'safe_open' object")


class DeviceSlice:
    """What `get_slice` gives: indexing reads the rows that are needed, onto the device."""

    __slots__ = ("_entry", "_handle", "_name", "_owner")

    def __init__(self, owner: DeviceHandle, handle: Any, entry: Any, name: str) -> None:
        self._owner = owner
        self._handle = handle
        self._entry = entry
        self._name = name

    @property
    def __class__(self) -> Any:
        return _stock.PySafeSlice or DeviceSlice  # exported by safetensors >= 0.9 only

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("__class__ assignment is not supported")

    def get_shape(self) -> list[int]:
        shape: list[int] = self._entry.get_shape()
        return shape

    def get_dtype(self) -> str:
        dtype: str = self._entry.get_dtype()
        return dtype

    def __getitem__(self, index: Any) -> Any:
        import torch

        place = _device.place_of(self._handle, self._name)
        planned = _owned.plan_rows(place.shape, index) if place.shape else None
        if planned is None or place.dtype is None or _device.is_stocks():
            return self._owner._origin.stock_slice(self._name, index)
        first, count, rest = planned
        rows = place.rows(first, count)
        read = self._owner._load(self._handle, [rows])[self._name]
        found = read[rest]
        if found.nbytes == read.nbytes:
            return read.view(found.shape)
        return found.clone(memory_format=torch.contiguous_format)  # memory of its own bytes only
