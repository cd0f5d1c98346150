# SPDX-License-Identifier: Apache-2.0
"""What is kept of a model that is extracted: its files, opened, and the tensors in each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from . import _files, _filter, _header, _layout, _patch, _sharded, _stock, filters
from ._errors import StxExtractWarning, warn


def make_rule(
    tensor_filter: _filter.TensorFilter,
    names: Iterable[str] | None,
    prefixes: Iterable[str] | None,
) -> tuple[_filter.Rule | None, str]:
    """The rule, and which argument it was: the three differ in what a miss means."""
    given = {"tensor_filter": tensor_filter, "names": names, "prefixes": prefixes}
    asked = [name for name, value in given.items() if value is not None]
    if len(asked) > 1:
        raise ValueError(f"give {' or '.join(asked)}, not both")
    if names is not None:
        return _filter.make_keys_rule(names, "names"), "names"
    if prefixes is not None:
        if isinstance(prefixes, str):
            raise TypeError("prefixes is a list of str")
        return _filter.make_rule(filters.prefixes(*prefixes)), "prefixes"
    return _filter.make_rule(tensor_filter), "tensor_filter"


class Selection:
    """The files of some sources, opened, and what is kept of them.

    Attributes:
        headers: of the files in which something may be kept.
        paths: of all that belongs to the sources, those that need not be opened and indexes too.
        is_closed: whether it was closed.
    """

    def __init__(self, sources: list[Any], rule: _filter.Rule | None, asked: str) -> None:
        """Raises as extract(), with nothing left open."""
        _stock.take()
        entry = _patch.current()
        in_force = None if entry is None else entry.rule
        both = _filter.both(in_force, rule)
        self._groups = [
            _files.find_files(source) or _files.Files([path_of("a source", source)])
            for source in sources
        ]
        if not self._groups:
            raise ValueError("an empty list of files")
        self._shown = _show(sources)
        self.paths = [path for files in self._groups for path in files.paths]
        self.paths += [files.index_path for files in self._groups if files.index_path is not None]
        self.headers: list[_header.Header] = []
        self.is_closed = False
        try:
            self._open(both)
            if asked == "names":
                self._check_names(rule)
            if asked == "prefixes":
                self._check_prefixes(rule, in_force)
            if both is not None and not any(header.kept for header in self.headers):
                raise ValueError(f"the filter keeps nothing of {self._shown}")
        except BaseException:
            self.close()
            raise

    def _open(self, rule: _filter.Rule | None) -> None:
        for header in self.headers:
            header.close()
        self.headers = []
        for files in self._groups:
            self._open_group(files, rule)
        owners: dict[str, str] = {}
        for header in self.headers if len(self._groups) > 1 else ():
            for name in header.offset_keys():
                other = owners.setdefault(name, header.path)
                if other != header.path:
                    raise _stock.SafetensorError(
                        f"two files have a tensor {name}: {other} and {header.path}"
                    )

    def _open_group(self, files: _files.Files, rule: _filter.Rule | None) -> None:
        """The files of one source, as they would be loaded together."""
        paths = _sharded.choose_paths(files, rule)
        first = len(self.headers)
        for path in paths:
            self.headers.append(_read(path, rule))
        if len(paths) == 1 and files.index is None:
            return
        opened = self.headers[first:]
        for number, names in _sharded.settle(files, paths, opened).items():
            kept = frozenset(opened[number].offset_keys()).difference(names)
            opened[number].keep_names(kept)

    def _check_names(self, rule: _filter.Rule | None) -> None:
        assert rule is not None
        missing = rule[1].difference(*(header.offset_keys() for header in self.headers))
        if missing:
            raise _stock.SafetensorError(
                f"{self._shown} does not contain {_list(sorted(missing))}; nothing was written"
            )

    def _check_prefixes(self, rule: _filter.Rule | None, in_force: _filter.Rule | None) -> None:
        assert rule is not None
        names = [entry[0] for header in self.headers for entry in header.entries]
        for files in self._groups:
            names += files.index or ()  # files of which nothing is kept are not opened
        missing = _filter.unmatched(rule, names)
        if not missing:
            return
        text = f"nothing in {self._shown} begins with {_list(missing)}"
        if len(missing) < len(set(rule[1])):
            warn(text, StxExtractWarning)
            return
        warn(f"{text}: the whole model is kept", StxExtractWarning)
        self._open(in_force)

    def pieces(self) -> Iterator[_layout.Piece]:
        """What is kept, in the order of files and places."""
        for header in self.headers:
            for entry in header.kept:
                yield _layout.Piece(header, entry)

    def metadata(self) -> dict[str, str] | None:
        """The files' `__metadata__` in one dict, the first one's word first; None without any."""
        merged: dict[str, str] = {}
        for header in self.headers:
            for key, value in (header.metadata or {}).items():
                merged.setdefault(key, value)
        return merged if any(header.metadata is not None for header in self.headers) else None

    def total(self) -> tuple[int, int]:
        """Tensors of all files of the sources, and their bytes; of files that needed not be opened,
        as far as they are there."""
        opened = {header.path for header in self.headers}
        sums = [_sum_of(header) for header in self.headers]
        for path in (path for files in self._groups for path in files.paths):
            if path not in opened:
                with (
                    contextlib.suppress(OSError, _stock.SafetensorError),
                    _read(path, None) as other,
                ):
                    sums.append(_sum_of(other))
        return sum(tensors for tensors, _ in sums), sum(size_bytes for _, size_bytes in sums)

    def close(self) -> None:
        """Close the files. Twice is fine."""
        self.is_closed = True
        for header in self.headers:
            header.close()

    def __enter__(self) -> Selection:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


def _sum_of(header: _header.Header) -> tuple[int, int]:
    return len(header.entries), sum(entry[4] - entry[3] for entry in header.entries)


def _read(path: str, rule: _filter.Rule | None) -> _header.Header:
    """A header. What stock says of a bad one names no file."""
    try:
        return _header.read_header(path, rule)
    except _stock.SafetensorError as error:
        if path in str(error):
            raise
        raise _stock.SafetensorError(f"{path}: {error}") from None


def path_of(what: str, given: Any) -> str:
    """`given` as a path; TypeError if it is none. `what` it is, for the error."""
    try:
        path = os.fspath(given)
    except TypeError:
        path = given
    if not isinstance(path, str):
        raise TypeError(f"{what} is a path, not {type(path).__name__}")
    return path


def _show(sources: list[Any] | tuple[Any, ...]) -> str:
    """A source, or what stands for several."""
    only = sources[0] if len(sources) == 1 else sources
    if isinstance(only, (list, tuple)):
        return f"{len(only)} files" if len(only) != 1 else _show(only)
    return str(os.fspath(only))


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" * (len(names) > 10))
