# SPDX-License-Identifier: Apache-2.0
"""Writes one safetensors file out of parts of others: their bytes go from file to file in the
kernel, tensors are never made.

Guarantee: under the target's name there is the whole file or nothing new. It is written to a
temporary file beside the target, which goes to disk before it gets the name; it stays behind only
where the process is killed. Not here: which tensors, and of which files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from . import _dtype, _header, _stock

_ALIGN_BYTES = 8
_HEADER_BYTES_MAX = 100_000_000  # the format's limit
_COPY_BYTES = 8 << 20  # of one call: Ctrl-C and progress wait no longer
_AHEAD_BYTES = 64 << 20  # asked of the disk before it is copied
_BUFFER_BYTES = 1 << 20
_NAME_BYTES_MAX = 200  # of the target's in the temporary one's
# What a kernel or a file system says that does not copy from file to file.
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY)
# What a file system says that has no hard links.
_NO_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
_RANKS = {dtype: rank for rank, dtype in enumerate(_dtype.BITS)}

Progress = Callable[[int], object]  # done_bytes


class Piece:
    """A tensor and the file it is in.

    Attributes:
        source: its file.
        entry: it in that file's header.
    """

    __slots__ = ("entry", "source")

    def __init__(self, source: _header.Header, entry: _header.Entry) -> None:
        self.source = source
        self.entry = entry

    @property
    def nbytes(self) -> int:
        return self.entry[4] - self.entry[3]


class Layout:
    """What a file is made of: the header's bytes, then tensors in safetensors' own order, which
    aligns them and depends on nothing but their dtypes and names.

    Attributes:
        header: length and JSON, padded.
        pieces: the tensors.
        data_bytes: their sizes.
    """

    __slots__ = ("data_bytes", "header", "pieces")

    def __init__(self, pieces: Iterable[Piece], metadata: dict[str, str] | None) -> None:
        """ValueError if the header would be longer than the format allows."""
        self.pieces = sorted(pieces, key=_place_in_order)
        header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        end = 0
        for piece in self.pieces:
            name, dtype, shape = piece.entry[:3]
            begin, end = end, end + piece.nbytes
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        self.data_bytes = end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGN_BYTES)
        if len(text) > _HEADER_BYTES_MAX:
            raise ValueError(f"a header of {len(text):,} bytes: the format ends at 100,000,000")
        self.header = len(text).to_bytes(_header.PREFIX_BYTES, "little") + text

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return len(self.header) + self.data_bytes

    def runs(self) -> Iterator[tuple[_header.Header, int, int]]:
        """(file, begin, end) of what follows the header, neighbours in one."""
        source, begin, end = None, 0, 0
        for piece in self.pieces:
            if piece.source is source and piece.entry[3] == end:
                end = piece.entry[4]
                continue
            if source is not None and begin != end:
                yield source, begin, end
            source, (begin, end) = piece.source, piece.entry[3:]
        if source is not None and begin != end:
            yield source, begin, end


def _place_in_order(piece: Piece) -> tuple[int, str]:
    name, dtype = piece.entry[:2]
    return -_RANKS.get(dtype, -1), name  # one that only a newer safetensors knows comes last


# --- the file ---


class Draft:
    """A file under a temporary name until `publish`; `discard` removes it."""

    __slots__ = ("_fd", "_path", "target")

    def __init__(self, target: str) -> None:
        folder, name = os.path.split(target)
        kept = os.fsdecode(os.fsencode(name)[:_NAME_BYTES_MAX])
        path = os.path.join(folder, f".{kept}.{secrets.token_hex(6)}.tmp")
        self.target = target
        self._path: str | None = None
        with _naming(target):
            # Mode bits as a new file's: the umask takes from them.
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._path = path

    def fill(self, layout: Layout, check: bool, progress: Progress | None) -> None:
        """Write it to the disk, and read its header again with safetensors.

        Raises:
            OSError: of the target (a full disk), naming it.
            SafetensorError: a source ends early or was changed meanwhile, or `check` has found a
                tensor that is not its source's.
        """
        with _naming(self.target):
            _write(self._fd, layout.header)
        copy_runs(layout, self._fd, self.target, progress)
        for source in {id(piece.source): piece.source for piece in layout.pieces}.values():
            source.check_unchanged()
        with _naming(self.target):
            os.fsync(self._fd)
        assert self._path is not None
        check_header(self._path, layout)
        if check:
            _check_bytes(self._path, self._fd, layout)

    def write(self, text: bytes) -> None:
        """Another kind of file."""
        with _naming(self.target):
            _write(self._fd, text)
            os.fsync(self._fd)

    def publish(self, overwrite: bool) -> None:
        """Give it its name. FileExistsError if that is taken and not to be overwritten."""
        assert self._path is not None
        with _naming(self.target):
            if overwrite:
                os.replace(self._path, self.target)
            else:
                _link(self._path, self.target)
        self._path = None
        self.discard()
        _sync_folder(os.path.dirname(self.target))

    def discard(self) -> None:
        """Close it, and remove it if it was not published. Twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            self._path = None


def _link(path: str, target: str) -> None:
    """Rename, but over nothing."""
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
        os.rename(path, target)
    else:
        os.unlink(path)


def _sync_folder(folder: str) -> None:
    """The name, too, has to be on the disk; not every file system can be told."""
    with contextlib.suppress(OSError):
        fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _naming(target: str) -> Iterator[None]:
    """What the system says of a file of ours is about the target, as far as a caller knows."""
    try:
        yield
    except OSError as error:
        assert error.errno is not None
        raise type(error)(error.errno, os.strerror(error.errno), target) from None


# --- copying ---


def copy_runs(layout: Layout, fd: int, target: str, progress: Progress | None) -> None:
    """Append the data of a layout to `fd`. Raises as Draft.fill."""
    done_bytes = 0
    ahead = _Ahead(layout)
    in_kernel = True
    for source, begin, end in layout.runs():
        while begin < end:
            ahead.reach(done_bytes + _AHEAD_BYTES)
            size_bytes = min(end - begin, _COPY_BYTES)
            copied_bytes = (
                _copy_in_kernel(source, begin, fd, target, size_bytes) if in_kernel else 0
            )
            if copied_bytes == 0:  # or it is the end of the file, which reading tells
                in_kernel = False
                copied_bytes = _copy_by_buffer(source, begin, fd, target, size_bytes)
            begin += copied_bytes
            done_bytes += copied_bytes
            if progress is not None:
                progress(done_bytes)


class _Ahead:
    """Asks for what will be copied, exactly: the sources read nothing else beside it."""

    __slots__ = ("_asked_bytes", "_runs")

    def __init__(self, layout: Layout) -> None:
        self._runs = self._cut(layout)
        self._asked_bytes = 0

    @staticmethod
    def _cut(layout: Layout) -> Iterator[tuple[_header.Header, int, int]]:
        for source, begin, end in layout.runs():
            for at in range(begin, end, _COPY_BYTES):
                yield source, at, min(end, at + _COPY_BYTES) - at

    def reach(self, bytes_end: int) -> None:
        """Have asked for this much of the data."""
        while self._asked_bytes < bytes_end:
            run = next(self._runs, None)
            if run is None:
                return
            source, begin, size_bytes = run
            with contextlib.suppress(OSError):  # a hint
                os.posix_fadvise(source.fd, begin, size_bytes, os.POSIX_FADV_WILLNEED)
            self._asked_bytes += size_bytes


def _copy_in_kernel(
    source: _header.Header, begin: int, fd: int, target: str, size_bytes: int
) -> int:
    try:
        return os.copy_file_range(source.fd, fd, size_bytes, offset_src=begin)
    except OSError as error:
        if error.errno in _NO_COPY:
            return 0
        raise _explain(error, source, begin, target) from None


def _copy_by_buffer(
    source: _header.Header, begin: int, fd: int, target: str, size_bytes: int
) -> int:
    part = read_part(source, begin, min(size_bytes, _BUFFER_BYTES))
    with _naming(target):
        _write(fd, part)
    return len(part)


def _explain(error: OSError, source: _header.Header, begin: int, target: str) -> OSError:
    """Whose fault it was: the kernel does not say. A source that can be read is not it."""
    read_part(source, begin, 1)
    assert error.errno is not None
    return type(error)(error.errno, os.strerror(error.errno), target)


def read_part(source: _header.Header, begin: int, size_bytes: int) -> bytes:
    """Some bytes of a source from `begin` on, at least one.

    Raises:
        OSError: what reading says, with the source's name.
        SafetensorError: the file ends there.
    """
    try:
        part = os.pread(source.fd, size_bytes, begin)
    except OSError as error:
        assert error.errno is not None
        raise type(error)(error.errno, os.strerror(error.errno), source.path) from None
    if not part:
        raise _stock.SafetensorError(f"{source.path}: file truncated at byte {begin}")
    return part


def _write(fd: int, text: bytes) -> None:
    view = memoryview(text)
    while view:
        view = view[os.write(fd, view) :]


# --- what was written ---


def check_header(path: str, layout: Layout) -> None:
    """What safetensors reads in the file is what was to be written; else RuntimeError."""
    with _header.open_with_stock(path) as handle:
        names = handle.keys()
        found = {
            name: (entry.get_dtype(), entry.get_shape())
            for name, entry in ((name, handle.get_slice(name)) for name in names)
        }
    wanted = {piece.entry[0]: piece.entry[1:3] for piece in layout.pieces}
    if found != wanted:
        wrong = next(name for name in {**wanted, **found} if found.get(name) != wanted.get(name))
        raise RuntimeError(f"{wrong} was written as something else: this is a bug of stx_patch")


def _check_bytes(path: str, fd: int, layout: Layout) -> None:
    """Every tensor, from the disk again, equals its source; else SafetensorError."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    with _header.read_header(path) as written:
        places = {entry[0]: entry[3:] for entry in written.entries}
        for piece in layout.pieces:
            at, end = places[piece.entry[0]]
            begin = piece.entry[3]
            while at < end:
                part = read_part(written, at, min(end - at, _BUFFER_BYTES))
                wanted = _read_whole(piece.source, begin, len(part))
                if part != wanted:
                    name = piece.entry[0]
                    raise _stock.SafetensorError(
                        f"tensor {name} is not what {piece.source.path} has"
                    )
                at, begin = at + len(part), begin + len(part)


def _read_whole(source: _header.Header, begin: int, size_bytes: int) -> bytes:
    parts = bytearray()
    while len(parts) < size_bytes:
        parts += read_part(source, begin + len(parts), size_bytes - len(parts))
    return bytes(parts)


def is_same_file(path: str, source: _header.Header) -> bool:
    """Whether `path` leads to the file that `source` is of."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(source.fd))
    except OSError:
        return False
