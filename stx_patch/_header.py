# SPDX-License-Identifier: Apache-2.0
"""The header of a file for whoever copies or lists tensors and makes none: torch is not needed.

The core reads and checks it. What the core will not serve, stock is asked about: its error is
raised, or, if it opens the file, the header that it accepted is read here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from typing import Any

from . import _filter, _native, _stock

PREFIX_BYTES = 8
Entry = tuple[str, str, list[int], int, int]  # name, dtype, shape, begin and end in the file
Identity = tuple[int, int, int, int]  # device, inode, size_bytes, mtime_ns


class Header:
    """A file's header, and a descriptor of that very file until it is closed.

    Attributes:
        path: as it was given.
        fd: the descriptor.
        metadata: `__metadata__`, or None.
        entries: of all tensors, in file order.
        kept: of those that the rule keeps.
    """

    __slots__ = ("_changed_ns", "_identity", "entries", "fd", "kept", "metadata", "path")

    def __init__(
        self,
        path: str,
        fd: int,
        identity: Identity,
        metadata: dict[str, str] | None,
        entries: list[Entry],
        keep: bytes | None,
    ) -> None:
        self.fd = fd
        self.path = path
        self._identity = identity
        self._changed_ns = os.fstat(fd).st_ctime_ns  # a time stamp may be put back, this one not
        self.metadata = metadata
        self.entries = entries
        self.kept = entries
        if keep is not None:
            self.kept = [entry for entry, is_kept in zip(entries, keep, strict=True) if is_kept]

    def keep_names(self, names: frozenset[str]) -> None:
        """Keep these of what is kept."""
        self.kept = [entry for entry in self.kept if entry[0] in names]

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return self._identity[2]

    @property
    def data_begin_bytes(self) -> int:
        """Where the header ends: a file without tensors ends there, too."""
        return self.entries[0][3] if self.entries else self.size_bytes

    def offset_keys(self) -> list[str]:
        """Names of what is kept, in file order."""
        return [entry[0] for entry in self.kept]

    def _all_names(self) -> list[str]:
        return [entry[0] for entry in self.entries]

    def check_unchanged(self) -> None:
        """SafetensorError if the file was changed since it was opened, as far as its times tell."""
        found = os.fstat(self.fd)
        if identity_of(found) != self._identity or found.st_ctime_ns != self._changed_ns:
            raise _stock.SafetensorError(f"{self.path} was changed while it was read")

    def close(self) -> None:
        """Close the descriptor. Closed already is fine."""
        fd, self.fd = self.fd, -1  # in this order: whoever interrupts must not close it again
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Header:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def read_header(path: str, rule: _filter.Rule | None = None) -> Header:
    """The header of the file at `path`.

    Raises:
        FileNotFoundError, OSError, SafetensorError: what opening it with safetensors raises.
        OSError: it is no regular file.
        Exception: what a callable filter raises.
    """
    _stock.take()
    _check_kind(path)
    if _native.core is not None:
        try:
            return Header(path, *_native.core.read_header(path, rule))
        except _native.core.Refused as refusal:
            if refusal.args[0] == "memory":
                raise MemoryError(f"{path}: {refusal.args[1]}") from None
    return _read_stocks(path, rule)


def _check_kind(path: str) -> None:
    """Stock would wait for whoever writes to a pipe. What is not there is stock's to say."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is not a regular file", path)


def open_with_stock(path: str) -> Any:
    """A handle of stock's. numpy is enough for it, where torch would take seconds to import."""
    with _stock.bypass():
        try:
            return _stock.safe_open(path, framework="np")
        except ImportError:
            return _stock.safe_open(path, framework="pt")


def _read_stocks(path: str, rule: _filter.Rule | None) -> Header:
    with open_with_stock(path):  # raises for whatever is no safetensors file
        pass
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        identity = identity_of(os.fstat(fd))
        size_bytes = int.from_bytes(os.pread(fd, PREFIX_BYTES, 0), "little")
        text = _read_exactly(path, fd, PREFIX_BYTES, size_bytes)
        values: dict[str, Any] = json.loads(text.decode())  # of a name that is there twice the last
        metadata = values.pop("__metadata__", None)
        data_begin = PREFIX_BYTES + size_bytes
        entries: list[Entry] = []
        for name, value in values.items():
            dtype, shape, (begin, end) = _fields_of(value)
            entries.append((name, dtype, shape, data_begin + begin, data_begin + end))
        entries.sort(key=lambda entry: entry[3:])
        keep = _ask(rule, entries, path)
    except BaseException:
        os.close(fd)
        raise
    return Header(path, fd, identity, metadata, entries, keep)


def _fields_of(value: Any) -> tuple[str, list[int], list[int]]:
    """dtype, shape and offsets of an entry. Stock also takes the fields as an array, in this order,
    and a dtype as {"F32": null}."""
    if isinstance(value, dict):
        value = value["dtype"], value["shape"], value["data_offsets"]
    dtype, shape, offsets = value
    return dtype if isinstance(dtype, str) else next(iter(dtype)), shape, offsets


def _ask(rule: _filter.Rule | None, entries: list[Entry], path: str) -> bytes | None:
    if rule is None:
        return None
    keys = (
        _filter.TensorKey(name, dtype, tuple(shape), end - begin, path)
        for name, dtype, shape, begin, end in entries
    )
    return bytes(_filter.matches(rule, key) for key in keys)


def _read_exactly(path: str, fd: int, offset: int, size_bytes: int) -> bytes:
    parts = []
    while size_bytes > 0:
        part = os.pread(fd, size_bytes, offset)
        if not part:
            raise _stock.SafetensorError(f"{path}: the file ends within its header")
        parts.append(part)
        offset += len(part)
        size_bytes -= len(part)
    return b"".join(parts)


def identity_of(found: os.stat_result) -> Identity:
    """What tells a file from another one, and from what it was."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
