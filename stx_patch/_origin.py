# SPDX-License-Identifier: Apache-2.0
"""How a handle reaches stock: the handle that stock opens for the same call, held to a filter.

`Origin` belongs to a native handle and opens stock only when something is asked that the core does
not serve. `FilteredHandle` stands before a stock handle wherever a filter is in force, and where
`stx_patch.safe_open` owes methods that stock's handle lacks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from . import _dtype, _filter, _native, _options, _owned, _progress, _stats, _stock


class Origin:
    """The call that opened a native handle, and the way back to stock.

    `arguments` and `keywords` are stock's, behind the path.

    Attributes:
        progress: whom the core tells how far a load is, or None.
        identity: (device, inode, size_bytes, mtime_ns) of the file, set by the core.
    """

    __slots__ = (
        "_arguments",
        "_filename",
        "_keywords",
        "_lock",
        "_options",
        "_path",
        "_reader",
        "_stock_handle",
        "identity",
        "progress",
    )

    def __init__(
        self,
        path: str,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        progress: _progress.Part | None = None,
        options: _options.Options = _options.DEFAULT,
    ) -> None:
        self._filename = path
        self._path = _absolute(path)  # somebody may change the directory
        self._arguments = arguments
        self._keywords = keywords
        self.progress = progress
        self._options = options
        self._lock = threading.Lock()
        self._reader: tuple[Any, int] | None = None
        self._stock_handle: Any = None
        self.identity: tuple[int, int, int, int] | None = None

    @property
    def stock_class(self) -> Any:
        """What a native handle's `__class__` says."""
        return _stock.safe_open

    def reader(self) -> tuple[Any, int]:
        """A native handle that reads this file where the one of this origin maps it, and how large
        the staging memory of a device is to be; None if the file is another one by now. Any thread.
        """
        with self._lock:
            if self._reader is None:
                self._reader = self._open_reader()
            return self._reader

    def _open_reader(self) -> tuple[Any, int]:
        other = Origin(self._path, self._arguments, self._keywords, None, self._options)
        try:
            handle = _native.core.open(self._path, None, other, self._options.core, True)
        except _native.core.Refused:
            return None, 0
        return (handle, self._options.staging) if other.identity == self.identity else (None, 0)

    def filename(self) -> str:
        """The path as it was given. Called by the core."""
        return self._filename

    def converted(self, tensors: Iterator[tuple[str, Any]], dtype: Any) -> Any:
        """The stream of a handle as another dtype. Called by the core."""
        _dtype.check(dtype)
        return _dtype.convert(tensors, dtype)

    def stock_tensor(self, name: str) -> Any:
        """The tensor as stock makes it, or stock's error. Called by the core."""
        _stats.count_fallback("tensor")
        tensor = self._stock().get_tensor(name)
        _stats.count_stock_tensors(1)
        return tensor

    def stock_slice(self, name: str, index: Any) -> Any:
        """`get_slice(name)[index]` as stock makes it, or stock's error. Called by the core."""
        _stats.count_fallback("slice")
        tensor = self._stock().get_slice(name)[index]
        _stats.count_stock_tensors(1)
        return tensor

    def owned_slice(self, entry: Any, index: Any) -> Any:
        """`entry[index]` of a file that is read, or NotImplemented. Called by the core."""
        return _owned.take(entry, entry.get_shape(), index)

    def stock_attribute(self, handle: Any, attribute: str) -> Any:
        """An attribute that stock's handle has and ours lacks, else NotImplemented."""
        if not hasattr(_stock.safe_open, attribute):
            return NotImplemented
        _stats.count_fallback(f"method {attribute}")
        kept = handle.offset_keys()
        skipped = handle._skipped_count
        stock_handle = self._stock()
        if skipped == 0:
            return getattr(stock_handle, attribute)
        return getattr(FilteredHandle(stock_handle, kept), attribute)

    def refuse_name(self, name: object) -> NoReturn:
        """Raise stock's error for a tensor name that is no str, or no Unicode. Called by the core.

        Stock looks at `framework` in the same way, and before it looks for the file.
        """
        try:
            _stock.safe_open(self._path, framework=name)
        except (TypeError, UnicodeEncodeError) as error:
            if isinstance(error, TypeError):
                error.args = (str(error).replace("'framework'", "'name'", 1),)
            if hasattr(error, "__notes__"):
                error.__notes__ = [n.replace("'framework'", "'name'") for n in error.__notes__]
            raise
        raise TypeError(f"{name!r} is no name of a tensor")

    def _stock(self) -> Any:
        """The stock handle of the file that was opened; SafetensorError if it is another now."""
        if self._stock_handle is None:
            self._check_identity()
            with _stock.bypass():
                opened = _stock.safe_open(self._path, *self._arguments, **self._keywords)
            self._check_identity()
            self._stock_handle = opened
        return self._stock_handle

    def _check_identity(self) -> None:
        if self._current_identity() != self.identity:
            raise _stock.SafetensorError(f"{self._path} has changed since it was opened")

    def _current_identity(self) -> tuple[int, int, int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _absolute(path: str) -> str:
    """Without normalising: `..` behind a symbolic link is not what the text says."""
    if os.path.isabs(path):
        return path
    try:
        return os.path.join(os.getcwd(), path)
    except OSError:  # the directory is gone, and nothing can be opened in it
        return path


class Disguised:
    """A handle of ours that `isinstance` takes for stock's, also for whoever has its own class."""

    __slots__ = ()

    @property
    def __class__(self) -> Any:
        return _stock.safe_open

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("__class__ assignment is not supported")


class FilteredHandle(Disguised):
    """A stock handle that shows only the kept names. Every method is stock's otherwise."""

    __slots__ = ("_filename", "_handle", "_kept", "_kept_set", "_left_out")

    def __init__(self, handle: Any, kept: list[str], filename: str | None = None) -> None:
        self._handle = handle
        self._filename = filename
        self._kept = kept  # in file order
        self._kept_set = frozenset(kept)
        self._left_out = frozenset(handle.keys()) - self._kept_set

    @property
    def _skipped_count(self) -> int:
        return len(self._left_out)

    def _all_names(self) -> list[str]:
        names: list[str] = self._handle.keys()
        return names

    def keys(self) -> list[str]:
        return [name for name in self._handle.keys() if name in self._kept_set]  # noqa: SIM118

    def offset_keys(self) -> list[str]:
        self._handle.keys()
        return list(self._kept)

    def metadata(self) -> dict[str, str] | None:
        metadata: dict[str, str] | None = self._handle.metadata()
        return metadata

    def get_tensor(self, name: str) -> Any:
        self._check(name)
        tensor = self._handle.get_tensor(name)
        _stats.count_stock_tensors(1)
        return tensor

    def get_tensors(self) -> dict[str, Any]:
        return {name: self.get_tensor(name) for name in self.offset_keys()}

    def tensors(self, dtype: Any = None) -> Iterator[tuple[str, Any]]:
        _dtype.check(dtype)
        found = ((name, self.get_tensor(name)) for name in self.offset_keys())
        return found if dtype is None else _dtype.convert(found, dtype)

    def get_slice(self, name: str) -> Any:
        self._check(name)
        return self._handle.get_slice(name)

    def get_dtype(self, name: str) -> str:
        dtype: str = self.get_slice(name).get_dtype()
        return dtype

    def get_shape(self, name: str) -> list[int]:
        shape: list[int] = self.get_slice(name).get_shape()
        return shape

    def nbytes(self, name: str) -> int:
        return count_bytes(self.get_dtype(name), self.get_shape(name))

    def filename_of(self, name: str) -> str | None:
        self.get_slice(name)
        return self._filename

    @property
    def total_tensor_size(self) -> int:
        return sum(self.nbytes(name) for name in self._kept)

    def __enter__(self) -> FilteredHandle:
        self._handle.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> Any:
        return self._handle.__exit__(*exc_info)

    def __getattr__(self, attribute: str) -> Any:
        """What a newer stock's handle has, held to the kept names."""
        found = getattr(self._handle, attribute)
        if attribute == "prefetch":
            return self._narrow_prefetch(found)
        if attribute == "get_tensor_meta":
            return self._narrow_meta(found)
        return found

    def __repr__(self) -> str:
        return f"<builtins.safe_open object at {id(self):#x}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._handle.__reduce_ex__(protocol)  # TypeError

    def _narrow_prefetch(self, prefetch: Callable[..., Any]) -> Callable[..., Any]:
        def narrowed(plan: Any = None, **keywords: Any) -> Any:
            if plan is None:
                plan = dict.fromkeys(self._kept)
            for name in plan:
                self._check(name)
            return prefetch(plan, **keywords)

        return narrowed

    def _narrow_meta(self, get_tensor_meta: Callable[[str], Any]) -> Callable[[str], Any]:
        def narrowed(name: str) -> Any:
            self._check(name)
            return get_tensor_meta(name)

        return narrowed

    def _check(self, name: object) -> None:
        if isinstance(name, str) and name in self._left_out:
            self._handle.keys()  # a closed handle says so first
            raise _stock.SafetensorError(
                f"File does not contain tensor {name} (left out by tensor_filter)"
            )


# Python's own errors name the class.
FilteredHandle.__name__ = "builtins.safe_open"


def narrow(handle: Any, rule: _filter.Rule | None, filename: str | None) -> FilteredHandle:
    """`handle` of stock, behind `rule`, which is asked about each name once, in file order."""
    return FilteredHandle(handle, keep_names(handle, rule, filename), filename)


def keep_names(handle: Any, rule: _filter.Rule | None, filename: str | None) -> list[str]:
    """The names of a stock handle that `rule` keeps, in file order."""
    in_file_order: list[str] = getattr(handle, "offset_keys", handle.keys)()  # 0.5 has none
    if rule is None:
        return in_file_order
    kept = []
    for name in in_file_order:
        entry = handle.get_slice(name)
        dtype, shape = entry.get_dtype(), entry.get_shape()
        size_bytes = count_bytes(dtype, shape)
        if _filter.matches(
            rule, _filter.TensorKey(name, dtype, tuple(shape), size_bytes, filename)
        ):
            kept.append(name)
    return kept


def count_bytes(dtype: str, shape: list[int]) -> int:
    """The size of a tensor in the file, in bytes; 0 for a dtype that is not known here."""
    bits = _dtype.BITS.get(dtype, 0)
    for extent in shape:
        bits *= extent
    return bits // 8
