# SPDX-License-Identifier: Apache-2.0
"""transformers v5 takes a slice of a file on the CPU and moves what it gives: here it is read onto
the device it is meant for, and converted there.

One function of transformers is rebound while a patch is in force, if it has the signature that is
known. Whatever it is given that is not ours, or not for a CUDA device, goes to the original.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from . import _device, _native, _stock

HOME = "transformers.core_model_loading"
NAME = "_materialize_copy"
_PARAMETERS = ("tensor", "device", "dtype")


def replacements() -> list[tuple[Any, Any]]:
    """Pairs of an original and ours; none where transformers is not imported, or another one."""
    if _native.core is None or not _stock.is_executed(HOME, NAME):
        return []
    return [
        (original, stand_in(original))
        for original in _stock.known_functions(HOME, NAME)
        if tuple(inspect.signature(original).parameters) == _PARAMETERS
    ]


@functools.cache
def stand_in(original: Callable[..., Any]) -> Callable[..., Any]:
    """What takes the place of transformers' function. One object for each original."""

    @functools.wraps(original)
    def _materialize_copy(tensor: Any, device: Any = None, dtype: Any = None) -> Any:
        found = _materialize(tensor, device, dtype)
        return original(tensor, device, dtype) if found is None else found

    return _materialize_copy


def _materialize(entry: Any, device: Any, dtype: Any) -> Any:
    """The tensor of a native slice on a CUDA device; None for anything else."""
    if type(entry) is not _native.core.Slice or device is None:
        return None
    spelled = _device.cuda.spell(device)
    index = _device.index_in(spelled)
    if index is None or not _device.cuda.serves(spelled) or _device.is_stocks():
        return None
    handle, staging_bytes = entry._origin.reader()
    if handle is None:
        return None
    place = _device.place_of(handle, entry._name)
    if place.dtype is None:
        return None
    load = _device.Load(handle, [place], _device.Target(index, staging_bytes, dtype))
    load.run()
    tensor = load.tensors[place.name]
    if dtype is not None and tensor.dtype != dtype:
        tensor = tensor.to(dtype)
        _device.cuda.stream(index).synchronize()
    return tensor
