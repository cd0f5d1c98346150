# SPDX-License-Identifier: Apache-2.0
"""The class that takes the place of `safetensors.safe_open`, and the decision who serves a call.

A stand-in is a class, because callers use `isinstance` and annotations, but it never has instances:
calling it returns a native handle, stock's own handle, or stock's handle behind a filter, and
`isinstance` accepts all three. There are two: the *ambient* one is installed by `patch()` and is
stock while no patch is in force; the *public* one is `stx_patch.safe_open`.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from . import _filter, _native, _options, _origin, _patch, _progress, _sharded, _stats, _stock
from ._errors import StxFilterWarning, warn

_FRAMEWORKS = frozenset(("pt", "torch", "pytorch"))
_OWN_KEYWORDS = frozenset(("tensor_filter", "include_keys", "strict_filter", *_options.NAMES))
_BACKENDS = ("mmap", "pread")

if TYPE_CHECKING:

    class SafeOpen:
        """How `stx_patch.safe_open` looks to a type checker."""

        def __init__(
            self,
            filename: _sharded.Source,
            framework: str = "pt",
            device: str | int | None = "cpu",
            *,
            backend: str = "mmap",
            tensor_filter: _filter.TensorFilter = None,
            include_keys: Iterable[str] | None = None,
            strict_filter: bool = False,
            engine: str = "auto",
            read_ahead: _options.Size = "auto",
            inflight_bytes: _options.Size = "auto",
            direct_io: str = "auto",
            progress: _progress.Target = False,
        ) -> None: ...
        def __enter__(self) -> SafeOpen: ...
        def __exit__(self, *exc_info: object) -> None: ...
        def keys(self) -> list[str]: ...
        def offset_keys(self) -> list[str]: ...
        def metadata(self) -> dict[str, str] | None: ...
        def get_tensor(self, name: str) -> Any: ...
        def get_tensors(self) -> dict[str, Any]: ...
        def get_slice(self, name: str) -> Any: ...
        def tensors(self) -> Iterator[tuple[str, Any]]: ...
        def get_dtype(self, name: str) -> str: ...
        def get_shape(self, name: str) -> list[int]: ...
        def nbytes(self, name: str) -> int: ...
        def filename_of(self, name: str) -> str: ...
        @property
        def total_tensor_size(self) -> int: ...


class Request:
    """One call of `safe_open` or `load_file`: stock's arguments, and the filter that holds.

    Attributes:
        arguments, keywords: stock's, untouched, without our own keywords.
        rule: what both the filter in force and the call's own keep; None keeps everything.
        own_rule: the call's own part of it.
        strict: the call's `strict_filter`.
        options: how to read: the call's, else those in force.
        progress: what they make of `progress=`: one for all files of the call, or None.
        public: whether it came through `stx_patch` itself, not through a patched name.
    """

    __slots__ = (
        "arguments",
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
        keywords = {"framework": framework, "device": device, "backend": backend}
        known = {name: keywords[name] for name in keywords if name in _stock.parameters}
        origin = _origin.Origin(path, (), known, request.progress)
        try:
            how = request.options.core
            return _native.core.open(path, rule, origin, how, backend == "pread")
        except _native.core.Refused as refusal:
            reason = explain_refusal(path, refusal)
    _stats.count_fallback(reason)
    return None


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
    if device is not None and not (isinstance(device, str) and device == "cpu"):
        return f"device {device}" if isinstance(device, (str, int)) else "arguments"
    if not isinstance(backend, str) or backend not in _BACKENDS:
        return f"backend {backend}" if isinstance(backend, str) else "arguments"
    return None if _native.torch_is_ready() else "torch missing"


def _bind(
    filename: Any, framework: Any, device: Any = "cpu", *, backend: Any = "mmap"
) -> tuple[Any, Any, Any, Any]:
    return filename, framework, device, backend


def _open(public: bool, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """The body of a call of a stand-in."""
    _stock.take()
    if is_stock_call(public):
        return _stock.safe_open(*arguments, **keywords)
    request = Request(public, arguments, keywords)
    if public and len(arguments) < 2:
        keywords.setdefault("framework", "pt")
    try:
        bound = _bind(*arguments, **keywords)
    except TypeError:  # stock says what is wrong
        _stats.count_fallback("arguments")
        return _open_stock(request)
    handle = open_sharded(request, *bound) if public else None
    if handle is None:
        handle = open_native(request, request.rule, *bound)
    if handle is None:
        handle = _open_stock(request)
    check_result(request, handle, bound[0])
    return handle


def open_sharded(
    request: Request, filename: Any, framework: Any, device: Any, backend: Any
) -> Any | None:
    """One handle over the files of a list, a folder or an index; None for a single file."""
    files = _sharded.find_files(filename)
    if files is None:
        return None

    def open_one(path: str, rule: _filter.Rule | None) -> Any:
        handle = open_native(request, rule, path, framework, device, backend)
        if handle is not None:
            return handle
        keywords = {"framework": framework, "device": device, "backend": backend}
        known = {name: value for name, value in keywords.items() if name in _stock.parameters}
        with _stock.bypass():
            opened = _stock.safe_open(path, **known)
        return _origin.narrow(opened, rule, path)

    return _sharded.open_files(files, request.rule, open_one, request.progress)


def _open_stock(request: Request) -> Any:
    """Stock's handle, or stock's exception, for the same arguments; behind the filter."""
    with _stock.bypass():
        handle = _stock.safe_open(*request.arguments, **request.keywords)
    if request.rule is None and not request.public:
        return handle
    filename = request.arguments[0] if request.arguments else request.keywords.get("filename")
    return _origin.narrow(handle, request.rule, fspath(filename))


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


# --- the class ---


def _is_instance(cls: type, instance: object) -> bool:
    """As isinstance() has it: by the type, else by what `__class__` says."""
    if issubclass(type(instance), cls):
        return True
    claimed = getattr(instance, "__class__", None)
    return isinstance(claimed, type) and issubclass(claimed, cls)


class _Meta(type):
    """Makes a class look like stock's from outside and decide per call who serves it."""

    _stx_public: bool

    def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
        return _open(cls._stx_public, arguments, keywords)

    def __instancecheck__(cls, instance: object) -> bool:
        return _is_instance(cls, instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        native = () if _native.core is None else (_native.core.Handle,)
        return subclass is cls or issubclass(
            subclass,
            (*native, _origin.FilteredHandle, _sharded.ShardedHandle, _stock.safe_open),
        )

    def __repr__(cls) -> str:
        return "<class 'stx_patch.safe_open'>" if cls._stx_public else repr(_stock.safe_open)

    def __dir__(cls) -> list[str]:
        return dir(_stock.safe_open)


class _SliceMeta(type):
    """The same for 0.9's exported slice class, which is never called."""

    def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
        return _stock.PySafeSlice(*arguments, **keywords)

    def __instancecheck__(cls, instance: object) -> bool:
        return _is_instance(cls, instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        native = () if _native.core is None else (_native.core.Slice,)
        return subclass is cls or issubclass(subclass, (*native, _stock.PySafeSlice))

    def __repr__(cls) -> str:
        return repr(_stock.PySafeSlice)


class _Method:
    """A method of a stand-in, called unbound: `safe_open.keys(handle)`."""

    def __init__(self, name: str, stock_method: Any) -> None:
        self.__name__ = name
        self.__qualname__ = f"safe_open.{name}"
        self.__doc__ = stock_method.__doc__
        self.__text_signature__ = getattr(stock_method, "__text_signature__", None)

    def __get__(self, instance: object, owner: type | None = None) -> _Method:
        return self

    def __call__(self, /, *arguments: Any, **keywords: Any) -> Any:
        own: tuple[Any, ...] = (_origin.FilteredHandle, _sharded.ShardedHandle)
        if _native.core is not None:
            own += (_native.core.Handle,)
        if arguments and isinstance(arguments[0], own):
            return getattr(arguments[0], self.__name__)(*arguments[1:], **keywords)
        return getattr(_stock.safe_open, self.__name__)(*arguments, **keywords)

    def __repr__(self) -> str:
        return f"<method '{self.__name__}' of 'builtins.safe_open' objects>"


def _new(cls: _Meta, *arguments: Any, **keywords: Any) -> Any:
    return cls(*arguments, **keywords)


def _refuse_subclass(cls: type, /, **keywords: Any) -> None:
    raise TypeError("type 'builtins.safe_open' is not an acceptable base type")


def _make_class(public: bool) -> Any:
    stock = _stock.safe_open
    namespace: dict[str, Any] = {
        "__slots__": (),
        "__doc__": stock.__doc__,
        "__module__": "stx_patch" if public else stock.__module__,
        "__init_subclass__": classmethod(_refuse_subclass),
        "__new__": _new,
        "_stx_public": public,
    }
    for name, method in vars(stock).items():
        if callable(method) and (not name.startswith("_") or name in ("__enter__", "__exit__")):
            namespace[name] = _Method(name, method)
    if not public:
        namespace["__text_signature__"] = stock.__text_signature__
    namespace["__signature__"] = _public_signature() if public else inspect.signature(stock)
    return _Meta("safe_open", (), namespace)


def _public_signature() -> inspect.Signature:
    def signature(
        filename: Any,
        framework: str = "pt",
        device: Any = "cpu",
        *,
        backend: str = "mmap",
        tensor_filter: Any = None,
        include_keys: Any = None,
        strict_filter: bool = False,
        engine: str = "auto",
        read_ahead: Any = "auto",
        inflight_bytes: Any = "auto",
        direct_io: str = "auto",
        progress: Any = False,
    ) -> None: ...

    return inspect.signature(signature).replace(return_annotation=inspect.Signature.empty)


@functools.cache
def stand_in() -> Any:
    """What `patch()` installs as `safetensors.safe_open`. One object for the process."""
    _stock.take()
    return _make_class(public=False)


@functools.cache
def public_safe_open() -> Any:
    """`stx_patch.safe_open`."""
    _stock.take()
    return _make_class(public=True)


@functools.cache
def slice_stand_in() -> Any:
    """What takes the place of 0.9's `safetensors.PySafeSlice`."""
    stock = _stock.PySafeSlice
    namespace = {"__doc__": stock.__doc__, "__module__": stock.__module__}
    return _SliceMeta("PySafeSlice", (), namespace)


def _reduce_class(cls: _Meta) -> tuple[Callable[[str], Any], tuple[str]]:
    """Pickle as a look-up by name, which works after unpatch() and where stx_patch is absent."""
    home = "stx_patch" if cls._stx_public else "safetensors"
    return pkgutil.resolve_name, (f"{home}:safe_open",)


def _reduce_slice_class(cls: _SliceMeta) -> tuple[Callable[[str], Any], tuple[str]]:
    return pkgutil.resolve_name, ("safetensors:PySafeSlice",)


copyreg.pickle(_Meta, _reduce_class)
copyreg.pickle(_SliceMeta, _reduce_slice_class)
