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
import os
import secrets
import shutil
from collections.abc import Callable, Iterator

from . import _header, _stock
from ._layout import Layout

_COPY_BYTES = 8 << 20  # of one call: Ctrl-C and progress wait no longer
_AHEAD_BYTES = 64 << 20  # asked of the disk before it is copied
_BUFFER_BYTES = 1 << 20
_NAME_BYTES_MAX = 200  # of the target's in the temporary one's
# What kernels and file systems say that do not copy from file to file, or not these files. Whatever
# else may be behind it, reading and writing says again.
_NO_COPY = (
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EACCES,
    errno.EBADF,
    errno.ENOTTY,
    errno.ENOENT,
    errno.ETXTBSY,
)
# What a file system says that has no hard links.
_NO_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)

Progress = Callable[[int], object]  # done_bytes


# --- the file ---


class Draft:
    """A file under a temporary name from `open` until `publish`; `discard` removes it.

    Args:
        target: its path, as errors have it.
        folder: where it lies meanwhile and gets its name, if not in the target's own.
    """

    __slots__ = ("_fd", "_folder", "_path", "target")

    def __init__(self, target: str, folder: str | None = None) -> None:
        self.target = target
        self._folder = os.path.dirname(target) if folder is None else folder
        self._path: str | None = None
        self._fd = -1

    def open(self) -> None:
        """Make the file. Not part of the making of this, so that there is who discards it."""
        # The path comes first: whoever interrupts the next call leaves nothing behind.
        self._path = temporary_path(os.path.join(self._folder, os.path.basename(self.target)))
        with naming(self.target):
            # Mode bits as a new file's: the umask takes from them.
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o666)

    def fill(self, layout: Layout, check: bool, progress: Progress | None) -> None:
        """Write it to the disk, and read its header again with safetensors.

        Raises:
            OSError: of the target (a full disk), naming it.
            SafetensorError: a source ends early or was changed meanwhile, or `check` has found a
                tensor that is not its source's.
        """
        assert self._path is not None
        with naming(self.target):
            _write(self._fd, layout.header)
        copy_runs(layout, self._fd, self.target, progress)
        with naming(self.target):
            os.fsync(self._fd)
        check_header(self._path, self.target, layout)
        if check:
            _check_bytes(self._path, self._fd, layout)
        for source in {id(piece.source): piece.source for piece in layout.pieces}.values():
            source.check_unchanged()
        self._close()

    def write(self, text: bytes) -> None:
        """Another kind of file."""
        with naming(self.target):
            _write(self._fd, text)
            os.fsync(self._fd)
        self._close()

    def publish(self, overwrite: bool) -> None:
        """Give it its name. FileExistsError if that is taken and not to be overwritten."""
        assert self._path is not None
        with naming(self.target):
            name = os.path.join(self._folder, os.path.basename(self.target))
            if overwrite:
                os.replace(self._path, name)
            else:
                _link(self._path, name)
        self._path = None
        sync_folder(self._folder)

    def discard(self) -> None:
        """Remove it if it was not published. Twice is fine."""
        self._close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            self._path = None

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # what it has to say, fsync has said
                os.close(fd)


def temporary_path(target: str) -> str:
    """A hidden name beside `target` that nobody has."""
    folder, name = os.path.split(target)
    kept = os.fsdecode(os.fsencode(name)[:_NAME_BYTES_MAX])
    return os.path.join(folder, f".{kept}.{secrets.token_hex(6)}.tmp")


def publish_folder(made: str, folder: str, overwrite: bool) -> None:
    """Give a folder its name, over an empty one or, to overwrite, in the place of another."""
    with naming(folder):
        try:
            os.rename(made, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not overwrite:
                raise
            _exchange(made, folder)
    sync_folder(os.path.dirname(folder))


def _exchange(made: str, folder: str) -> None:
    before = temporary_path(folder)
    try:
        os.rename(folder, before)
        os.rename(made, folder)
    except BaseException:
        if os.path.lexists(before) and not os.path.lexists(folder):
            os.rename(before, folder)
        raise
    shutil.rmtree(before, ignore_errors=True)


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


def sync_folder(folder: str) -> None:
    """The name, too, has to be on the disk; not every file system can be told."""
    with contextlib.suppress(OSError):
        fd = -1
        try:
            fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            os.fsync(fd)
        finally:
            if fd >= 0:
                os.close(fd)


@contextlib.contextmanager
def naming(target: str) -> Iterator[None]:
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
            _advise(source.fd, begin, size_bytes, "POSIX_FADV_WILLNEED")
            self._asked_bytes += size_bytes


def _advise(fd: int, begin: int, size_bytes: int, advice: str) -> None:
    """A hint, where the system takes such."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, begin, size_bytes, getattr(os, advice))


def _copy_in_kernel(
    source: _header.Header, begin: int, fd: int, target: str, size_bytes: int
) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
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
    with naming(target):
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


def check_header(path: str, target: str, layout: Layout) -> None:
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
        raise RuntimeError(
            f"{target}: {wrong} was written as something else: this is a bug of stx_patch"
        )


def _check_bytes(path: str, fd: int, layout: Layout) -> None:
    """Every tensor, from the disk again, equals its source; else SafetensorError."""
    _advise(fd, 0, 0, "POSIX_FADV_DONTNEED")
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


def is_same_file(path: str, other: str) -> bool:
    """Whether both lead to one file that is there."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False
