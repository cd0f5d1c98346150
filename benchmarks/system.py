# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks ask of Linux: page cache, counters, read-ahead, memory, the machine."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import signal
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

PAGE = mmap.PAGESIZE
CACHESTAT = 451  # Linux 6.5; the same number on every architecture


# --- page cache ---


def cached_pages(path: Path) -> int:
    """How many pages of a file are in the page cache.

    OSError where the system does not tell (before Linux 6.5): then nothing is known to be cold.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        whole, pages = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(CACHESTAT, descriptor, whole, pages, 0) != 0:
            raise OSError(ctypes.get_errno(), "cachestat: cannot tell what is cached")
        return int(pages[0])
    finally:
        os.close(descriptor)


def drop_cache(path: Path) -> int:
    """Put a file out of the page cache; returns how many of its pages stayed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return cached_pages(path)


def cached_share(paths: Iterable[Path]) -> float:
    """The part of some files that is in the page cache, from 0 to 1."""
    files = list(paths)
    pages = sum(-(-path.stat().st_size // PAGE) for path in files)
    return sum(cached_pages(path) for path in files) / max(pages, 1)


def warm_file(path: Path) -> None:
    """Bring a file into the page cache, where it is not there already."""
    if cached_share([path]) >= 1:
        return
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 24)
        while file.readinto(buffer):
            pass


# --- counters ---


def device_bytes() -> int:
    """What this process, all its threads, has had read from storage."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/io has no read_bytes")


def disk_bytes(path: Path) -> int | None:
    """What everybody has read from the device that a file is on; None where that has no row."""
    device = path.stat().st_dev
    for line in Path("/proc/diskstats").read_text().splitlines():
        fields = line.split()
        if (int(fields[0]), int(fields[1])) == (os.major(device), os.minor(device)):
            return int(fields[5]) * 512
    return None


def private_bytes(process: int | str = "self") -> int:
    """Anonymous memory of a process: its own allocations and privately copied pages."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/PID/status has no RssAnon")


def touch_memory(size_bytes: int) -> None:
    """Touch and free memory: a virtual machine's host takes it back when it is idle, and whoever
    touches it first pays for that. Never more than 80 % of what is available."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            available = int(line.split()[1]) * 1024
    size_bytes = min(size_bytes, available * 8 // 10)
    if size_bytes <= 0:
        return
    with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        count = -(-size_bytes // PAGE)
        memory[::PAGE] = bytes(count)


# --- read-ahead ---


def read_ahead_file(folder: Path) -> Path | None:
    """Where the read-ahead of the device of a folder is set."""
    device = os.stat(folder).st_dev
    base = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (base / "queue", base / "../queue"):
        if (queue / "read_ahead_kb").exists():
            return (queue / "read_ahead_kb").resolve()
    return None


def read_ahead_kb(folder: Path) -> int | None:
    """The read-ahead of the device of a folder."""
    setting = read_ahead_file(folder)
    return int(setting.read_text()) if setting else None


class CannotSet(Exception):
    """The read-ahead cannot be set here; says why."""


@contextlib.contextmanager
def read_ahead(folder: Path, size_kb: int | None) -> Iterator[None]:
    """The read-ahead for a block, put back however the block ends. None leaves it as it is."""
    if size_kb is None:
        yield
        return
    setting = read_ahead_file(folder)
    if setting is None:
        raise CannotSet(f"the device of {folder} has no read_ahead_kb")
    before = setting.read_text()
    try:
        setting.write_text(f"{size_kb}\n")
    except OSError as error:
        raise CannotSet(f"{setting}: {error.strerror}") from None
    try:
        yield
    finally:
        setting.write_text(before)


def end_on_signals() -> None:
    """SIGTERM and SIGHUP raise SystemExit, so that every `finally` runs, as SIGINT does anyway."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, leave)


# --- the machine ---


def version_of(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(folder: Path) -> dict[str, Any]:
    """What numbers were made on."""
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    memory = Path("/proc/meminfo").read_text().splitlines()[0].split()
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    mode = huge.read_text().partition("[")[2].partition("]")[0] if huge.exists() else None
    setting = read_ahead_file(folder)
    return {
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory[1]) / (1 << 20)),
        "kernel": platform.release(),
        "disk": setting.parts[-3] if setting else None,
        "filesystem": _filesystem(folder),
        "read_ahead_kb": read_ahead_kb(folder),
        "huge_pages": mode,
        "python": platform.python_version(),
        "torch": version_of("torch"),
        "safetensors": version_of("safetensors"),
        "stx_patch": version_of("stx-patch"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _filesystem(folder: Path) -> str | None:
    device = os.stat(folder).st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == f"{os.major(device)}:{os.minor(device)}":
            return fields[fields.index("-") + 1]
    return None
