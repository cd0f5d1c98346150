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
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from . import (
    _files,
    _filter,
    _native,
    _options,
    _origin,
    _progress,
    _stats,
    _stock,
)
from ._request import Request, check_result, fspath, is_stock_call, open_native, open_sharded

if TYPE_CHECKING:

    class SafeOpen:
        """How `stx_patch.safe_open` looks to a type checker."""

        def __init__(
            self,
            filename: _files.Source,
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
            staging_bytes: _options.Size = "auto",
        ) -> None: ...
        def __enter__(self) -> SafeOpen: ...
        def __exit__(self, *exc_info: object) -> None: ...
        def keys(self) -> list[str]: ...
        def offset_keys(self) -> list[str]: ...
        def metadata(self) -> dict[str, str] | None: ...
        def get_tensor(self, name: str) -> Any: ...
        def get_tensors(self) -> dict[str, Any]: ...
        def get_slice(self, name: str) -> Any: ...
        def tensors(self, dtype: Any = None) -> Iterator[tuple[str, Any]]: ...
        def get_dtype(self, name: str) -> str: ...
        def get_shape(self, name: str) -> list[int]: ...
        def nbytes(self, name: str) -> int: ...
        def filename_of(self, name: str) -> str: ...
        @property
        def total_tensor_size(self) -> int: ...


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


def _open_stock(request: Request) -> Any:
    """Stock's handle, or stock's exception, for the same arguments; behind the filter."""
    with _stock.bypass():
        handle = _stock.safe_open(*request.arguments, **request.keywords)
    if request.rule is None and not request.public:
        return handle
    filename = request.arguments[0] if request.arguments else request.keywords.get("filename")
    return _origin.narrow(handle, request.rule, fspath(filename))


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
            (*native, _origin.Disguised, _stock.safe_open),
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
        own: tuple[Any, ...] = (_origin.Disguised,)
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
        staging_bytes: Any = "auto",
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
