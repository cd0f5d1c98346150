# SPDX-License-Identifier: Apache-2.0
"""`load_file` and `load`: what takes the place of safetensors' functions, and our own.

The stand-ins are plain functions that name themselves as stock's, so that they pickle by name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from . import _dtype, _files, _filter, _native, _origin, _patch, _stats, _stock
from ._request import (
    Request,
    check_result,
    explain_refusal,
    fspath,
    is_cpu,
    is_stock_call,
    open_native,
    open_sharded,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def load_file(
    filename: _files.Source,
    device: str | int = "cpu",
    *,
    backend: str = "mmap",
    tensor_filter: _filter.TensorFilter = None,
    include_keys: Iterable[str] | None = None,
    strict_filter: bool = False,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file, or of many files, that a filter keeps.

    Args:
        filename: path of the file; or a list of paths, a folder, or a
            `model.safetensors.index.json`: many files as one (docs/USAGE.md).
        device: "cpu", or what safetensors takes.
        backend: "mmap" or "pread", as safetensors has them.
        tensor_filter: which tensors exist for this call (docs/FILTERS.md); also the filter of
            `patch()`, if one is in force, has to keep them.
        include_keys: exact names, instead of `tensor_filter`.
        strict_filter: an error where a name or pattern matches nothing, or nothing is kept.
        dtype: what floating-point tensors are converted to; others stay as they are. On a CUDA
            device the stored bytes travel, and are converted there, never whole in both dtypes.
        **options: how to read: the fields of `stx_patch.Options`.

    Returns:
        A dict in file order. Each tensor owns its storage and stays valid by itself.

    Raises:
        FileNotFoundError, OSError, SafetensorError: as safetensors raises them; SafetensorError
            also for a `strict_filter` that is not met.
        TypeError, ValueError: a filter or dtype that is none, or contradictory keywords.
    """
    _dtype.check(dtype)
    keywords = {
        "device": device,
        "backend": backend,
        "tensor_filter": tensor_filter,
        "include_keys": include_keys,
        "strict_filter": strict_filter,
        **options,
    }
    return _load_file(True, (filename,), keywords, dtype)


def _bind_file(
    filename: Any, device: Any = "cpu", *, backend: Any = "mmap"
) -> tuple[Any, Any, Any]:
    return filename, device, backend


def _load_file(
    public: bool, arguments: tuple[Any, ...], keywords: dict[str, Any], dtype: Any = None
) -> dict[str, Any]:
    """The body of both `load_file`s."""
    if is_stock_call(public):
        return _load_file_stock(arguments, keywords)
    _stock.take()
    request = Request(public, arguments, keywords)
    request.dtype = dtype
    try:
        filename, device, backend = _bind_file(*arguments, **keywords)
    except TypeError:  # stock says what is wrong
        _stats.count_fallback("arguments")
        return _load_file_stock(arguments, keywords)
    handle = open_sharded(request, filename, "pt", device, backend) if public else None
    if handle is None:
        handle = open_native(request, request.rule, filename, "pt", device, backend)
    if handle is not None:
        with handle:
            check_result(request, handle, filename)
            if dtype is not None and backend == "pread" and is_cpu(device):
                return dict(handle.tensors(dtype=dtype))  # while the next ones are read
            tensors: dict[str, Any] = handle.get_tensors()
            return tensors if dtype is None else dict(_dtype.convert(tensors.items(), dtype))
    if request.rule is None:
        tensors = _load_file_stock(arguments, keywords)
        _stats.count_stock_tensors(len(tensors))
    else:
        tensors = _load_filtered_stock(request, filename, keywords)
    return tensors if dtype is None else dict(_dtype.convert(tensors.items(), dtype))


def _load_file_stock(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    stock = _stock.function(_stock.TORCH, "load_file")
    if stock is load_file:  # somebody bound ours to stock's name before stock's was taken
        stock = _load_by_stock_handle
    with _stock.bypass():
        tensors: dict[str, Any] = stock(*arguments, **_known(keywords))
        return tensors


def _load_by_stock_handle(filename: Any, device: Any = "cpu", **keywords: Any) -> dict[str, Any]:
    """What stock's load_file does, by its class."""
    with _stock.safe_open(filename, framework="pt", device=device, **keywords) as handle:
        names = _origin.keep_names(handle, None, None)
        return {name: handle.get_tensor(name) for name in names}


def _known(keywords: dict[str, Any]) -> dict[str, Any]:
    """Without a default `backend` that a safetensors before 0.8 would not know."""
    if keywords.get("backend") == "mmap" and "backend" not in _stock.parameters:
        return {name: value for name, value in keywords.items() if name != "backend"}
    return keywords


def _load_filtered_stock(
    request: Request, filename: Any, keywords: dict[str, Any]
) -> dict[str, Any]:
    device = request.arguments[1] if len(request.arguments) > 1 else keywords.get("device", "cpu")
    others = {name: value for name, value in keywords.items() if name == "backend"}
    with _stock.bypass():
        opened = _stock.safe_open(filename, framework="pt", device=device, **_known(others))
    with _origin.narrow(opened, request.rule, fspath(filename)) as handle:
        check_result(request, handle, filename)
        tensors: dict[str, Any] = handle.get_tensors()
        return tensors


def _load_bytes(home: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """The body of the stand-ins of `load`: stock's values, our filter."""
    entry = None if _stock.is_bypassed() else _patch.current()
    stock = _stock.function(home, "load")
    if entry is not None and home == _stock.TORCH:
        native = _load_bytes_native(entry.rule, arguments, keywords)
        if native is not None:
            return native
    with _stock.bypass():  # one home's load may call another's
        tensors: dict[str, Any] = stock(*arguments, **keywords)
    if entry is None:
        return tensors
    _stats.count_fallback("load(bytes)")
    if entry.rule is not None:
        kept = _keep_items(entry.rule, arguments[0] if arguments else keywords["data"])
        tensors = {name: tensor for name, tensor in tensors.items() if name in kept}
    _stats.count_stock_tensors(len(tensors))
    return tensors


def _load_bytes_native(
    rule: _filter.Rule | None, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> dict[str, Any] | None:
    """One owned copy of what is kept, or None for what stock is to serve or to refuse."""
    if len(arguments) + len(keywords) != 1 or _native.core is None or not _native.torch_is_ready():
        return None
    data = arguments[0] if arguments else keywords.get("data")
    if type(data) is not bytes or _modes_are_active():
        return None
    try:
        tensors: dict[str, Any] = _native.core.load_bytes(data, rule)
    except _native.core.Refused as refusal:
        explain_refusal("bytes", refusal)  # no memory for the header would end stock's process
        return None
    return tensors


def _modes_are_active() -> bool:
    """Whether torch is made to do something else with the functions that stock calls."""
    import torch

    depths = ("_len_torch_dispatch_stack", "_len_torch_function_stack")
    return any(getattr(torch._C, name, int)() for name in depths)


def _keep_items(rule: _filter.Rule, data: bytes) -> frozenset[str]:
    """The names that `rule` keeps of a whole file in memory, asked in file order.

    `data` has just passed stock's own checks.
    """
    import json

    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    entries = []
    for name, entry in header.items():
        if isinstance(entry, dict):  # stock also takes the fields as an array, in this order
            entry = entry["dtype"], entry["shape"], entry["data_offsets"]
        dtype, shape, (begin, end) = entry
        if isinstance(dtype, dict):  # and a dtype as {"F32": null}
            (dtype,) = dtype
        entries.append((begin, end, name, dtype, tuple(shape)))
    kept = []
    for begin, end, name, dtype, shape in sorted(entries, key=lambda entry: entry[:2]):
        key = _filter.TensorKey(name, dtype, shape, end - begin, None)
        if _filter.matches(rule, key):
            kept.append(name)
    return frozenset(kept)


def _disguise(stand_in: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """Give `stand_in` the name, signature, docstring and annotations of `stock`."""
    functools.update_wrapper(stand_in, stock)
    del stand_in.__wrapped__  # type: ignore[attr-defined]
    stand_in.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
    return stand_in


@functools.cache
def load_file_stand_in() -> Callable[..., Any]:
    """What `patch()` installs as `safetensors.torch.load_file`. One object for the process."""

    def load_file(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        return _load_file(False, arguments, keywords)

    return _disguise(load_file, _stock.function(_stock.TORCH, "load_file"))


@functools.cache
def load_stand_in(home: str) -> Callable[..., Any]:
    """What `patch()` installs as the `load` of one of FRAMEWORKS. One object each."""

    def load(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        return _load_bytes(home, arguments, keywords)

    return _disguise(load, _stock.function(home, "load"))
