# SPDX-License-Identifier: Apache-2.0
"""One call of `safe_open` or `load_file`: what was asked, who serves it, what we owe the result.

A file is opened natively, or the reason why stock is to serve it is counted. Many files are opened
one by one and put together (stx_patch._sharded).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from . import (
    _device,
    _device_handle,
    _files,
    _filter,
    _native,
    _options,
    _origin,
    _patch,
    _progress,
    _sharded,
    _stats,
    _stock,
    _trace,
)
from ._errors import StxFilterWarning, warn

_FRAMEWORKS = frozenset(("pt", "torch", "pytorch"))
_OWN_KEYWORDS = frozenset(("tensor_filter", "include_keys", "strict_filter", *_options.NAMES))
_BACKENDS = ("mmap", "pread")


class Request:
    """One call of `safe_open` or `load_file`: stock's arguments, and the filter that holds.

    Attributes:
        arguments, keywords: stock's, untouched, without our own keywords.
        rule: what both the filter in force and the call's own keep; None keeps everything.
        own_rule: the call's own part of it.
        strict: the call's `strict_filter`.
        options: how to read: the call's, else those in force.
        progress: what they make of `progress=`: one for all files of the call, or None.
        dtype: what floating-point tensors are loaded as, or None.
        public: whether it came through `stx_patch` itself, not through a patched name.
    """

    __slots__ = (
        "arguments",
        "dtype",
        "keywords",
        "options",
        "own_rule",
        "progress",
        "public",
        "rule",
        "strict",
    )

    def __init__(self, public: bool, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        own = {name: keywords.pop(name) for name in _OWN_KEYWORDS & keywords.keys()}
        self.public = public
        self.dtype: Any = None
        self.arguments = arguments
        self.keywords = keywords
        self.strict = bool(own.pop("strict_filter", False))
        self.own_rule = _own_rule(own.pop("tensor_filter", None), own.pop("include_keys", None))
        entry = _patch.current()
        if entry is None:
            self.options = _options.from_environment(own)
        else:
            self.options = _options.with_keywords(entry.options, own)
        self.progress = _progress.make_progress(self.options.progress)
        self.rule = _filter.both(None if entry is None else entry.rule, self.own_rule)


def _own_rule(
    tensor_filter: _filter.TensorFilter, include_keys: Iterable[str] | None
) -> _filter.Rule | None:
    if include_keys is None:
        return _filter.make_rule(tensor_filter)
    if tensor_filter is not None:
        raise ValueError("give include_keys or tensor_filter, not both")
    return _filter.make_keys_rule(include_keys)


def is_stock_call(public: bool) -> bool:
    """Whether a call is stock's from the start: no patch in force, or stock is calling itself."""
    return _stock.is_bypassed() or not (public or _patch.current() is not None)


def open_native(
    request: Request,
    rule: _filter.Rule | None,
    filename: Any,
    framework: Any,
    device: Any,
    backend: Any,
) -> Any | None:
    """A native handle, or None after counting why stock is to serve this."""
    path = fspath(filename)
    reason = refuse(request.keywords, path, framework, device, backend)
    if reason is None:
        assert path is not None
        _trace.look_at_environment()
        index = None if is_cpu(device) else _device.index_in(device)
        known = stock_keywords(framework, device, backend)
        part = None if request.progress is None else request.progress.part()
        origin = _origin.Origin(path, (), known, part, request.options)
        try:
            how = request.options.core
            reads = backend == "pread" or index is not None
            handle = _native.core.open(path, rule, origin, how, reads)
        except _native.core.Refused as refusal:
            reason = explain_refusal(path, refusal)
        else:
            if index is None:
                return handle
            target = _device.Target(index, request.options.staging, request.dtype)
            return _device_handle.DeviceHandle(handle, origin, target)
    _stats.count_fallback(reason)
    return None


def is_cpu(device: Any) -> bool:
    """Whether this is how stock is told of the CPU."""
    return device is None or (isinstance(device, str) and device == "cpu")


def stock_keywords(framework: Any, device: Any, backend: Any) -> dict[str, Any]:
    """Stock's keywords for these values, without what an older safetensors does not know."""
    keywords = {"framework": framework, "device": device, "backend": backend}
    return {name: value for name, value in keywords.items() if name in _stock.parameters}


def fspath(filename: Any) -> str | None:
    """The path as str, or None for what stock has to judge."""
    if not isinstance(filename, str):
        if not isinstance(filename, os.PathLike):
            return None
        try:
            filename = os.fspath(filename)
        except Exception:  # stock asks again, and says what is wrong
            return None
    return str.__str__(filename) if isinstance(filename, str) else None


def explain_refusal(path: str, refusal: Any) -> str:
    """Why the core left a file to stock, for the counters.

    Raises:
        MemoryError: it had no memory for the header. Stock's parser would need as much, and ends
            the process where it does not get it.
    """
    kind, text, _position = refusal.args
    if kind == "memory":
        raise MemoryError(f"{path}: {text}")
    return f"file refused ({kind})"


def refuse(
    keywords: dict[str, Any], path: str | None, framework: Any, device: Any, backend: Any
) -> str | None:
    """Why a call is not ours, or None."""
    if _native.core is None:
        return "extension missing"
    if path is None or not keywords.keys() <= _stock.parameters:
        return "arguments"
    if not isinstance(framework, str) or framework not in _FRAMEWORKS:
        return f"framework {framework}" if isinstance(framework, str) else "arguments"
    if not is_cpu(device) and _device.index_in(device) is None:
        return f"device {device}" if isinstance(device, (str, int)) else "arguments"
    if not isinstance(backend, str) or backend not in _BACKENDS:
        return f"backend {backend}" if isinstance(backend, str) else "arguments"
    if not _native.torch_is_ready():
        return "torch missing"
    return None if is_cpu(device) or _device.cuda.serves(device) else f"device {device}"


def open_sharded(
    request: Request, filename: Any, framework: Any, device: Any, backend: Any
) -> Any | None:
    """One handle over the files of a list, a folder or an index; None for a single file."""
    files = _files.find_files(filename)
    if files is None:
        return None

    def open_one(path: str, rule: _filter.Rule | None) -> Any:
        handle = open_native(request, rule, path, framework, device, backend)
        if handle is not None:
            return handle
        with _stock.bypass():
            opened = _stock.safe_open(path, **stock_keywords(framework, device, backend))
        return _origin.narrow(opened, rule, path)

    return _sharded.open_files(files, request.rule, open_one, request.progress)


def check_result(request: Request, handle: Any, filename: Any) -> None:
    """What our own API owes for a complete set: strictness, and a warning when nothing is left."""
    if request.rule is None:
        return
    if request.strict:
        _check_strict(request, handle, filename)
    if request.public and handle._skipped_count != 0 and not handle.offset_keys():
        text = f"tensor_filter keeps nothing of {_shown(filename)}"
        if request.strict:
            raise _stock.SafetensorError(text)
        warn(text, StxFilterWarning)


def _check_strict(request: Request, handle: Any, filename: Any) -> None:
    missing = _filter.unmatched(request.own_rule, handle._all_names())
    if missing:
        shown = ", ".join(map(repr, missing[:10])) + (", …" if len(missing) > 10 else "")
        raise _stock.SafetensorError(
            f"tensor_filter asks for what {_shown(filename)} does not contain: {shown}"
        )


def _shown(filename: Any) -> str:
    """A path, or what stands for several."""
    if isinstance(filename, (list, tuple)):
        return f"{len(filename)} files, the first {fspath(filename[0])}"
    return str(fspath(filename))
