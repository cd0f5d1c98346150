# SPDX-License-Identifier: Apache-2.0
"""What is kept of a model that is extracted: its files, opened, and the tensors in each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from . import _files, _filter, _header, _patch, _sharded, _stock, _writer, filters
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
        return _filter.make_keys_rule(names), "names"
    if prefixes is not None:
        if isinstance(prefixes, str):
            raise TypeError("prefixes is a list of str")
        return _filter.make_rule(filters.prefixes(*prefixes)), "prefixes"
    return _filter.make_rule(tensor_filter), "tensor_filter"


class Selection:
    """The files of a source, opened, and what is kept of them."""

    def __init__(self, source: _files.Source, rule: _filter.Rule | None, asked: str) -> None:
        """Raises as extract(), with nothing left open."""
        _stock.take()
        entry = _patch.current()
        in_force = None if entry is None else entry.rule
        self._shown = _show(source)
        self._files = _files.find_files(source) or _files.Files([single_path(source)])
        self.headers: list[_header.Header] = []
        try:
            self._open(_filter.both(in_force, rule))
            if asked == "names":
                self._check_names(rule)
            if asked == "prefixes":
                self._check_prefixes(rule, in_force)
            if rule is not None and not any(header.kept for header in self.headers):
                raise ValueError(f"the filter keeps nothing of {self._shown}")
        except BaseException:
            self.close()
            raise

    def _open(self, rule: _filter.Rule | None) -> None:
        self.close()
        self.headers = []
        paths = _sharded.choose_paths(self._files, rule)
        for path in paths:
            self.headers.append(_header.read_header(path, rule))
        if len(paths) == 1 and self._files.index is None:
            return
        for number, names in _sharded.settle(self._files, paths, self.headers).items():
            kept = frozenset(self.headers[number].offset_keys()).difference(names)
            self.headers[number].keep_names(kept)

    def _check_names(self, rule: _filter.Rule | None) -> None:
        assert rule is not None
        missing = rule[1].difference(*(header.offset_keys() for header in self.headers))
        if missing:
            raise _stock.SafetensorError(
                f"{self._shown} does not contain {_list(sorted(missing))}; nothing was written"
            )

    def _check_prefixes(self, rule: _filter.Rule | None, in_force: _filter.Rule | None) -> None:
        names = [entry[0] for header in self.headers for entry in header.entries]
        names += self._files.index or ()  # files of which nothing is kept are not opened
        missing = _filter.unmatched(rule, names)
        if not missing:
            return
        text = f"nothing in {self._shown} begins with {_list(missing)}"
        if any(header.kept for header in self.headers):
            warn(text, StxExtractWarning)
            return
        warn(f"{text}: the whole model is kept", StxExtractWarning)
        self._open(in_force)

    def pieces(self) -> Iterator[_writer.Piece]:
        """What is kept, in the order of files and places."""
        for header in self.headers:
            for entry in header.kept:
                yield _writer.Piece(header, entry)

    def metadata(self) -> dict[str, str] | None:
        """The files' `__metadata__` in one dict, the first one's word first; None without any."""
        merged: dict[str, str] = {}
        for header in self.headers:
            for key, value in (header.metadata or {}).items():
                merged.setdefault(key, value)
        return merged if any(header.metadata is not None for header in self.headers) else None

    def total(self) -> tuple[int, int]:
        """Tensors of the whole source, and their bytes, as far as it was opened."""
        entries = [entry for header in self.headers for entry in header.entries]
        return len(entries), sum(entry[4] - entry[3] for entry in entries)

    def close(self) -> None:
        for header in self.headers:
            header.close()

    def __enter__(self) -> Selection:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


def single_path(source: Any) -> str:
    path = os.fspath(source)
    if not isinstance(path, str):
        raise TypeError(f"a source is a path, not {type(path).__name__}")
    return path


def _show(source: Any) -> str:
    if isinstance(source, (list, tuple)):
        return f"{len(source)} files" if len(source) != 1 else _show(source[0])
    return str(os.fspath(source))


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" * (len(names) > 10))
