# SPDX-License-Identifier: Apache-2.0
"""Many files as one: a list of paths, a folder, or the index of a sharded model.

The files are opened together: headers first, in parallel, then the filter over all of them in
order, then what two files both claim is settled. From there on each file is a handle of its own
(csrc/py_handle.c), so that a tensor comes as it would from that file alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from . import _dtype, _filter, _native, _origin, _progress, _stock
from ._files import Files

_THREADS_MAX = 8
_TAIL_BYTES = 64 << 20  # of a file, unread by the consumer, when the next one is begun

Opener = Callable[[str, "_filter.Rule | None"], Any]


def open_files(
    files: Files,
    rule: _filter.Rule | None,
    opener: Opener,
    progress: _progress.Progress | None = None,
) -> ShardedHandle:
    """One handle over all files. `opener(path, rule)` opens one of them; `progress` is theirs.

    Raises:
        SafetensorError: two files have a tensor of the same name and no index says which one
            counts; an index lists a tensor that its files do not contain.
        OSError, SafetensorError: what opening a file raises. Nothing stays open.
    """
    paths, unopened = choose_paths(files, rule), list[str]()
    if files.index is not None and len(paths) != len(files.paths):
        opened = set(paths)
        others = {file for file, path in files.listed.items() if path not in opened}
        unopened = [name for name, file in files.index.items() if file in others]
    handles = _open_all(paths, rule, opener)
    try:
        for number, names in settle(files, paths, handles).items():
            rest = frozenset(handles[number].offset_keys()).difference(names)
            handles[number].__exit__(None, None, None)
            handles[number] = opener(paths[number], ("names", rest))  # nobody is asked again
    except BaseException:
        for handle in handles:
            handle.__exit__(None, None, None)
        raise
    return ShardedHandle(paths, handles, unopened, progress)


def choose_paths(files: Files, rule: _filter.Rule | None) -> list[str]:
    """The files to open: under an index and a filter that the names alone decide, those in which
    the index has something that is kept. The others need not be there. At least one."""
    if files.index is None or rule is None or _filter.asks_python(rule):
        return files.paths
    needed = {
        files.listed[file]
        for name, file in files.index.items()
        if _filter.matches(rule, _filter.TensorKey(name, "", (), 0, files.listed[file]))
    }
    there = (path for path in files.paths if os.path.exists(path))
    return [path for path in files.paths if path in needed] or [next(there, files.paths[0])]


def _open_all(paths: list[str], rule: _filter.Rule | None, opener: Opener) -> list[Any]:
    """All handles, or the first file's exception and none of them.

    Several at once, but for a callable filter: that is asked in file order, by one thread.
    """
    is_asked = rule is not None and _filter.asks_python(rule)
    threads_count = 1 if is_asked else min(_THREADS_MAX, len(paths), len(os.sched_getaffinity(0)))
    handles: list[Any] = []
    try:
        if threads_count == 1:
            for path in paths:
                handles.append(opener(path, rule))
        else:
            _open_beside(paths, rule, opener, threads_count, handles)
    except BaseException:
        for handle in handles:
            handle.__exit__(None, None, None)
        raise
    return handles


def _open_beside(
    paths: list[str],
    rule: _filter.Rule | None,
    opener: Opener,
    threads_count: int,
    handles: list[Any],
) -> None:
    opened: list[Any] = [None] * len(paths)
    errors: dict[int, BaseException] = {}

    def open_some(first: int) -> None:
        for number in range(first, len(paths), threads_count):
            if any(not isinstance(error, Exception) for error in errors.values()):
                return  # Ctrl-C
            try:
                opened[number] = opener(paths[number], rule)
            except BaseException as error:  # the first file's is raised by the caller
                errors[number] = error
                return

    others = []
    with ThreadPoolExecutor(threads_count - 1) as pool:
        for number in range(1, threads_count):
            try:
                others.append(pool.submit(open_some, number))
            except RuntimeError:  # no thread is to be had
                open_some(number)
        open_some(0)
        wait(others)
    handles.extend(handle for handle in opened if handle is not None)
    for error in errors.values():
        if not isinstance(error, Exception):
            raise error
    if errors:
        raise errors[min(errors)]


def settle(files: Files, paths: list[str], handles: list[Any]) -> dict[int, list[str]]:
    """File -> names that it has and that count in another one."""
    shadowed: dict[int, list[str]] = {}
    core = _native.core
    may_clash = core is None or core.names_overlap(handles)
    for name, numbers in _find_clashes(handles).items() if may_clash else ():
        chosen = files.path_of(name)
        if chosen not in [paths[number] for number in numbers]:
            first, second = (paths[number] for number in numbers[:2])
            raise _stock.SafetensorError(f"two files have a tensor {name}: {first} and {second}")
        for number in numbers:
            if paths[number] != chosen:
                shadowed.setdefault(number, []).append(name)
    if files.index is not None:
        _check_index(files, paths, handles)
    return shadowed


def _find_clashes(handles: list[Any]) -> dict[str, list[int]]:
    """The names that several files have -> which."""
    claims: dict[str, list[int]] = {}
    for number, handle in enumerate(handles):
        for name in handle.offset_keys():
            claims.setdefault(name, []).append(number)
    return {name: numbers for name, numbers in claims.items() if len(numbers) > 1}


def _check_index(files: Files, paths: list[str], handles: list[Any]) -> None:
    """What an index lists has to be in the file where it lists it, kept or not."""
    assert files.index is not None
    listed: dict[str, set[str]] = {}
    for name, file in files.index.items():
        listed.setdefault(files.listed[file], set()).add(name)
    for path, handle in zip(paths, handles, strict=True):
        missing = listed.get(path, set()).difference(handle._all_names())
        if missing:
            raise _stock.SafetensorError(
                f"{files.index_path} lists tensor {min(missing)} in {path}, which does not contain "
                "it"
            )


class ShardedHandle(_origin.Disguised):
    """Several files behind the methods of one handle, in the order of the files.

    No two of them have a name in common. `unopened` is what else an index lists: all of it left out
    by the filter.
    """

    __slots__ = ("_closed", "_handles", "_owners", "_paths", "_progress", "_unopened")

    def __init__(
        self,
        paths: list[str],
        handles: list[Any],
        unopened: list[str],
        progress: _progress.Progress | None,
    ) -> None:
        self._progress = progress
        if progress is not None:
            progress.total_bytes = sum(handle.total_tensor_size for handle in handles)
        self._paths = paths
        self._unopened = unopened
        self._handles = handles
        self._owners: dict[str, int] = {}  # name -> number of its file; made when first needed
        self._closed = False

    @property
    def _skipped_count(self) -> int:
        self._check_open()
        skipped: int = sum(handle._skipped_count for handle in self._handles)
        return skipped + len(self._unopened)

    def _all_names(self) -> list[str]:
        self._check_open()
        opened = [name for handle in self._handles for name in handle._all_names()]
        return opened + self._unopened

    def keys(self) -> list[str]:
        """Names of the tensors of all files, sorted."""
        self._check_open()
        return sorted([name for handle in self._handles for name in handle.keys()])  # noqa: SIM118

    def offset_keys(self) -> list[str]:
        """Names of the tensors in the order of files and places."""
        self._check_open()
        return [name for handle in self._handles for name in handle.offset_keys()]

    def metadata(self) -> dict[str, str] | None:
        """The files' `__metadata__` in one dict, the first file's word first; None without any."""
        self._check_open()
        found = [handle.metadata() for handle in self._handles]
        merged: dict[str, str] = {}
        for metadata in reversed(found):
            merged.update(metadata or {})
        return merged if any(metadata is not None for metadata in found) else None

    def get_tensor(self, name: str) -> Any:
        """The tensor called name; SafetensorError if there is none."""
        return self._of(name).get_tensor(name)

    def get_slice(self, name: str) -> Any:
        """A lazy slice of the tensor called name; SafetensorError if there is none."""
        return self._of(name).get_slice(name)

    def get_tensors(self) -> dict[str, Any]:
        """All tensors: a dict in the order of `offset_keys`."""
        self._check_open()
        tensors: dict[str, Any] = {}
        with self._one_load():
            for handle in self._handles:
                tensors.update(handle.get_tensors())
        return tensors

    @contextmanager
    def _one_load(self) -> Iterator[None]:
        """What the files report is about one load of all of them."""
        if self._progress is None:
            yield
            return
        try:
            yield
            self._progress.complete()
        finally:
            self._progress.finish()

    def tensors(self, dtype: Any = None) -> Iterator[tuple[str, Any]]:
        """Iterate over (name, tensor), each in memory of its own, floating-point ones as `dtype`.

        The next file is begun when little of one is left. Both together stay within two windows.
        """
        self._check_open()
        _dtype.check(dtype)
        return self._stream(list(self._handles), dtype)

    def _stream(self, handles: list[Any], dtype: Any) -> Iterator[tuple[str, Any]]:
        with self._one_load():
            yield from self._stream_each(handles, dtype)

    def _stream_each(self, handles: list[Any], dtype: Any) -> Iterator[tuple[str, Any]]:
        begun: Any = None  # the iterator of the next file
        for number, handle in enumerate(handles):
            stream = handle.tensors(dtype=dtype) if begun is None else begun
            begun = None
            left_bytes = handle.total_tensor_size
            try:
                for name, tensor in stream:
                    left_bytes -= tensor.nbytes  # as it is handed out: about when is enough
                    if begun is None and left_bytes < _TAIL_BYTES and number + 1 < len(handles):
                        begun = handles[number + 1].tensors(dtype=dtype)
                    yield name, tensor
                    del tensor
            except BaseException:
                for unfinished in (stream, begun):
                    if unfinished is not None:
                        unfinished.close()
                raise

    def get_dtype(self, name: str) -> str:
        """Its dtype as the header spells it, such as "BF16"."""
        dtype: str = self._of(name).get_dtype(name)
        return dtype

    def get_shape(self, name: str) -> list[int]:
        """Its shape: a list of int."""
        shape: list[int] = self._of(name).get_shape(name)
        return shape

    def nbytes(self, name: str) -> int:
        """Its size in the file, in bytes."""
        size_bytes: int = self._of(name).nbytes(name)
        return size_bytes

    def filename_of(self, name: str) -> str:
        """The path of the file it lies in."""
        path: str = self._of(name).filename_of(name)
        return path

    @property
    def total_tensor_size(self) -> int:
        """Bytes of all tensors that are kept."""
        self._check_open()
        return sum(handle.total_tensor_size for handle in self._handles)

    def __enter__(self) -> ShardedHandle:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._closed = True
        for handle in self._handles:
            handle.__exit__(None, None, None)

    def __repr__(self) -> str:
        return f"<stx_patch.safe_open of {len(self._paths)} files at {id(self):#x}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("cannot pickle 'safe_open' object")

    def _check_open(self) -> None:
        if self._closed:
            raise _stock.SafetensorError("File is closed")

    def _of(self, name: object) -> Any:
        """The handle that has `name`, or one that says that it is missing."""
        self._check_open()
        if not isinstance(name, str):
            return self._handles[0]
        if not self._owners:
            owners: dict[str, int] = {}
            for number, handle in enumerate(self._handles):
                owners.update(dict.fromkeys(handle.offset_keys(), number))
            self._owners = owners
        found = self._owners.get(name)
        if found is not None:
            return self._handles[found]
        if name in self._unopened:
            raise _stock.SafetensorError(
                f"File does not contain tensor {name} (left out by tensor_filter)"
            )
        for handle in self._handles:
            if handle._skipped_count and name in handle._all_names():
                return handle
        return self._handles[0]
