# SPDX-License-Identifier: Apache-2.0
"""What a Linux machine says of itself, in /proc and /sys and where it is tried. No judgement.

Whoever asks gives the root below which /proc and /sys are; None is what is not told there.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

_CACHESTAT = 451  # Linux 6.5; the same number on every architecture
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_NO_LIMIT_BYTES = 1 << 62  # what a control group of version 1 says is close to 2^63
_NETWORKS = frozenset(
    ("9p", "afs", "beegfs", "ceph", "cifs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "smbfs")
)


def read_text(path: Path) -> str | None:
    """A small file's text, or None where there is none to be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def number_after(text: str | None, label: str) -> int | None:
    """The number behind `label`, which begins a line."""
    found = re.search(rf"^{re.escape(label)}\s*([0-9]+)", text or "", re.MULTILINE)
    return None if found is None else int(found[1])


def _number_in(path: Path) -> int | None:
    return number_after(read_text(path), "")


def version_numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"[0-9]+", version)[:2])


# --- the kernel, and what it lets a process do ---


def kernel_release(root: Path) -> str | None:
    """Such as "6.8.0-31-generic"."""
    text = read_text(root / "proc/sys/kernel/osrelease")
    return None if text is None else text.strip()


def uring_disabled(root: Path) -> int | None:
    """kernel.io_uring_disabled: 0 allowed, 1 for the privileged, 2 forbidden. Linux 6.6."""
    return _number_in(root / "proc/sys/kernel/io_uring_disabled")


def has_seccomp_filter(root: Path) -> bool | None:
    """Whether system calls of this process are filtered."""
    mode = number_after(read_text(root / "proc/self/status"), "Seccomp:")
    return None if mode is None else mode == 2


def has_module(root: Path, name: str) -> bool | None:
    """Whether a module of the kernel is loaded."""
    text = read_text(root / "proc/modules")
    return None if text is None else any(line.split()[:1] == [name] for line in text.splitlines())


def try_cachestat() -> str | None:
    """None where the system tells what the page cache holds of a file, else why it does not."""
    pages = (ctypes.c_uint64 * 5)()
    whole = (ctypes.c_uint64 * 2)(0, 0)
    try:
        descriptor = os.memfd_create("stx-patch-doctor")
    except (OSError, AttributeError):
        return "no file to try it with"
    try:
        call = ctypes.CDLL(None, use_errno=True).syscall
        number, file, flags = map(ctypes.c_long, (_CACHESTAT, descriptor, 0))
        if call(number, file, ctypes.byref(whole), ctypes.byref(pages), flags) == 0:
            return None
        return os.strerror(ctypes.get_errno())
    finally:
        os.close(descriptor)


def can_populate() -> bool:
    """Whether pages of a mapping can be entered ahead of their use."""
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        try:
            memory.madvise(_POPULATE_READ)
        except (OSError, AttributeError):
            return False
    return True


# --- memory ---


class Memory(NamedTuple):
    """Bytes. `limit` is that of the tightest control group, `used` what it has in use, but for
    what of files it can give up at once."""

    total: int | None
    available: int | None
    limit: int | None
    used: int

    @property
    def free(self) -> int | None:
        """What this process may still take."""
        left = None if self.limit is None else max(0, self.limit - self.used)
        known = [each for each in (self.available, left) if each is not None]
        return min(known) if known else None


def memory(root: Path) -> Memory:
    """What memory there is, and what of it this process may have."""
    text = read_text(root / "proc/meminfo")
    total, available = (number_after(text, label) for label in ("MemTotal:", "MemAvailable:"))
    limit, used = _group(root)
    return Memory(
        None if total is None else total * 1024,
        None if available is None else available * 1024,
        limit,
        used,
    )


def _group(root: Path) -> tuple[int | None, int]:
    """(limit, in use) of the control group that has least left, of this process's and those above;
    those of a container may be all at the top."""
    found: list[tuple[int, int]] = []
    base = root / "sys/fs/cgroup"
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2) if line.count(":") >= 2 else ("", "", "")
        if controllers == "" and group:
            names = ("memory.max", "memory.current", "inactive_file")
            found += _limits(base, group, *names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found += _limits(base / "memory", group, *names)
    return min(found, key=lambda each: each[0] - each[1]) if found else (None, 0)


def _limits(base: Path, group: str, limit: str, usage: str, inactive: str) -> list[tuple[int, int]]:
    parts = [part for part in group.split("/") if part not in ("", ".", "..")]
    found = []
    for depth in range(len(parts), -1, -1):
        folder = base.joinpath(*parts[:depth])
        limit_bytes = _number_in(folder / limit)
        if limit_bytes is None or limit_bytes >= _NO_LIMIT_BYTES:
            continue
        cached = number_after(read_text(folder / "memory.stat"), f"{inactive} ") or 0
        found.append((limit_bytes, max(0, (_number_in(folder / usage) or 0) - cached)))
    return found


class HugePages(NamedTuple):
    """`mode` is "always", "madvise" or "never"; `in_process` whether this process may have any;
    `of_files` bytes of files that the page cache holds in them."""

    mode: str | None
    in_process: bool
    of_files: int | None


def huge_pages(root: Path) -> HugePages:
    """Transparent huge pages."""
    text = read_text(root / "sys/kernel/mm/transparent_hugepage/enabled") or ""
    mode = re.search(r"\[(\w+)\]", text)
    enabled = number_after(read_text(root / "proc/self/status"), "THP_enabled:")
    of_files = number_after(read_text(root / "proc/meminfo"), "FileHugePages:")
    return HugePages(
        None if mode is None else mode[1],
        enabled != 0,
        None if of_files is None else of_files * 1024,
    )


# --- where files lie ---


class Mount(NamedTuple):
    """A mounted file system: its type, where, and of what."""

    kind: str
    point: str
    source: str

    @property
    def is_network(self) -> bool:
        """Whether its files lie on another machine."""
        return self.kind in _NETWORKS

    @property
    def is_process(self) -> bool:
        """Whether a process serves it (FUSE), from wherever it has its data."""
        return self.kind.partition(".")[0] in ("fuse", "fuseblk")


def find_mount(root: Path, path: str) -> Mount | None:
    """The file system that a path is on."""
    real = os.path.realpath(path)
    found: Mount | None = None
    for line in (read_text(root / "proc/self/mountinfo") or "").splitlines():
        before, _, behind = line.partition(" - ")
        fields, kinds = before.split(), behind.split()
        if len(fields) < 5 or len(kinds) < 2:
            continue
        point = _unescape(fields[4])
        is_above = real == point or real.startswith(point.rstrip("/") + "/")
        if is_above and (found is None or len(point) >= len(found.point)):  # the last one covers
            found = Mount(kinds[0], point, _unescape(kinds[1]))
    return found


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


class ReadAhead(NamedTuple):
    """How far the kernel reads ahead of page faults, and the file that says so."""

    kib: int
    path: Path


def read_ahead(root: Path, device: int) -> ReadAhead | None:
    """The read-ahead of the device of a file, as `os.stat` has its number."""
    number = f"{os.major(device)}:{os.minor(device)}"
    block = root / "sys/dev/block" / number
    for path in (
        block / "queue/read_ahead_kb",
        block / "../queue/read_ahead_kb",  # of a partition
        root / "sys/class/bdi" / number / "read_ahead_kb",  # of what is no block device
    ):
        kib = _number_in(path)
        if kib is not None:
            return ReadAhead(kib, Path(os.path.realpath(path)))
    return None


class Tried(NamedTuple):
    """What became of a direct read: `worked` None where there was nothing to try it with."""

    worked: bool | None
    with_what: str
    why_not: str | None = None


def try_direct_read(path: str) -> Tried:
    """Read past the page cache: a file, or what is found in a folder or can be written there for a
    moment."""
    if os.path.isdir(path):
        try:
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(bytes(mmap.PAGESIZE))
                file.flush()
                os.fsync(file.fileno())
                return _read_directly(f"/proc/self/fd/{file.fileno()}", "a temporary file")
        except OSError as error:
            models = list_models(path)
            if not models:
                return Tried(None, path, f"no file can be written there ({error.strerror})")
            path = models[0]
    if not os.path.getsize(path):
        return Tried(None, path, "the file is empty")
    return _read_directly(path, os.path.basename(path))


def _read_directly(path: str, with_what: str) -> Tried:
    if not hasattr(os, "O_DIRECT"):
        return Tried(None, with_what, "this system has none")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        worked = False if error.errno == errno.EINVAL else None
        return Tried(worked, with_what, error.strerror)
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as memory:  # a direct read wants an aligned address
            return Tried(os.preadv(descriptor, [memory], 0) > 0, with_what)
    except OSError as error:
        return Tried(False, with_what, error.strerror)
    finally:
        os.close(descriptor)


def list_models(path: str) -> list[str]:
    """The safetensors files that a path stands for."""
    if not os.path.isdir(path):
        return [path]
    try:
        return [str(file) for file in sorted(Path(path).glob("*.safetensors")) if file.is_file()]
    except OSError:
        return []


def is_residency_told(path: str) -> bool:
    """Whether the system tells this process what the page cache holds of a file: to its owner, and
    to who may write it."""
    return os.stat(path).st_uid == os.geteuid() or os.access(path, os.W_OK, effective_ids=True)
