# SPDX-License-Identifier: Apache-2.0
"""transformers v5 takes a slice of a file on the CPU and moves what it gives: here it is read onto
the device it is meant for, and converted there.

Two functions of transformers are rebound while a patch is in force, if they have the signatures
that are known: the one that reads a tensor, and the one that begins to read a rank's part of it.
Whatever they are given that is not ours, or not for a CUDA device, goes to the originals.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from . import _device, _native, _owned, _stock

HOME = "transformers.core_model_loading"


def replacements() -> list[tuple[Any, Any]]:
    """Pairs of an original and ours; none where transformers is not imported, or another one."""
    if _native.core is None:
        return []
    return [
        (original, stand_in(original))
        for name, (parameters, stand_in) in _KNOWN.items()
        if _stock.is_executed(HOME, name)
        for original in _stock.known_functions(HOME, name)
        if tuple(inspect.signature(original).parameters) == parameters
    ]


@functools.cache
def _materialize_stand_in(original: Callable[..., Any]) -> Callable[..., Any]:
    """What takes the place of the function that reads. One object for each original."""

    @functools.wraps(original)
    def _materialize_copy(tensor: Any, device: Any = None, dtype: Any = None) -> Any:
        found = _read(tensor, ..., device, dtype)
        if found is None:
            return original(tensor, device, dtype)
        if dtype is not None and found.dtype != dtype:
            found = _waited_for(found.to(dtype))
        return found

    return _materialize_copy


@functools.cache
def _spawn_stand_in(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same for the function that has a rank's part read."""

    @functools.wraps(original)
    def spawn_materialize(
        thread_pool: Any,
        tensor: Any,
        device: Any = None,
        dtype: Any = None,
        sharding_op: Any = None,
        tensor_idx: Any = None,
    ) -> Any:
        if sharding_op is not None and type(tensor) is _native.core.Slice:
            tensor = _Part(tensor, device, dtype)
            sharding_op = _Sharding(sharding_op)
        return original(thread_pool, tensor, device, dtype, sharding_op, tensor_idx)

    return spawn_materialize


_KNOWN = {
    "_materialize_copy": (("tensor", "device", "dtype"), _materialize_stand_in),
    "spawn_materialize": (
        ("thread_pool", "tensor", "device", "dtype", "sharding_op", "tensor_idx"),
        _spawn_stand_in,
    ),
}


class _Sharding:
    """What takes a rank's part of a tensor. What it does on the device is over when it returns, as
    it is where all of that is done on the CPU: another stream may use the tensor."""

    __slots__ = ("_operation",)

    def __init__(self, operation: Any) -> None:
        self._operation = operation

    def shard_tensor(self, *arguments: Any, **keywords: Any) -> Any:
        found = self._operation.shard_tensor(*arguments, **keywords)
        return found if found is None else _waited_for(found)


def _waited_for(tensor: Any) -> Any:
    index = _device.cuda.index_of(tensor)
    if index is not None:
        _device.cuda.stream(index).synchronize()
    return tensor


class _Part:
    """A native slice of which a rank takes its part. Whole rows go straight to the device; columns
    are gathered on the CPU, as ever, so that no more than they are goes to the device."""

    __slots__ = ("_device", "_dtype", "_entry")

    def __init__(self, entry: Any, device: Any, dtype: Any) -> None:
        self._entry = entry
        self._device = device
        self._dtype = dtype

    def get_shape(self) -> list[int]:
        shape: list[int] = self._entry.get_shape()
        return shape

    def get_dtype(self) -> str:
        dtype: str = self._entry.get_dtype()
        return dtype

    def __getitem__(self, index: Any) -> Any:
        found = _read(self._entry, index, self._device, self._dtype)
        return self._entry[index] if found is None else found


def _read(entry: Any, index: Any, device: Any, dtype: Any) -> Any:
    """Rows of a native slice on a CUDA device, floating-point ones as `dtype`; None for anything
    else."""
    if type(entry) is not _native.core.Slice or device is None:
        return None
    spelled = _device.cuda.spell(device)
    number = _device.index_in(spelled)
    if number is None or not _device.cuda.serves(spelled) or _device.is_stocks():
        return None
    handle, staging_bytes = entry._origin.reader()
    place = None if handle is None else _device.place_of(handle, entry._name)
    if place is None or place.dtype is None:
        return None
    shape: list[int] | None = place.shape
    if index is not Ellipsis:
        planned = _owned.plan_rows(place.shape, index) if place.shape else None
        if planned is None:
            return None
        first, count, rest = planned
        place = place.rows(first, count)
        shape = _shape_of_all(place.shape, rest)
    if shape is None:
        return None
    load = _device.Load(handle, [place], _device.Target(number, staging_bytes, dtype))
    load.run()
    return load.tensors[place.name].view(shape)


def _shape_of_all(shape: list[int], index: Any) -> list[int] | None:
    """The shape that an index gives a tensor of which it takes all; None if it takes less."""
    import torch

    whole = torch.empty(shape, device="meta")
    taken = whole[index]
    return list(taken.shape) if taken.numel() == whole.numel() else None
