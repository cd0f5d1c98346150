# SPDX-License-Identifier: Apache-2.0
"""What is to be said of the machine's own part in a load: kernel, files, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import _machine
from ._cli_text import count_text, size_text
from ._finding import NOTE, OK, Finding

_LITTLE_MEMORY_BYTES = 1 << 30


def check_uring(root: Path, core: Any) -> Finding:
    """io_uring, by opening a ring."""
    name = "io_uring"
    if core is None:
        return Finding(name, NOTE, "not tried without the native core")
    if core.probe_engine(0) == "uring":
        return Finding(name, OK, "usable: reads into memory of our own go through it")
    reason = core.engine()[1] or "refused"
    seen = [f"not usable ({reason}): threads read instead, about as fast with large requests"]
    advice = None
    disabled = _machine.uring_disabled(root)
    if disabled:
        seen.append(f"kernel.io_uring_disabled is {disabled}")
        advice = "if you administer this machine: sysctl kernel.io_uring_disabled=0"
    if _machine.has_seccomp_filter(root):
        seen.append("system calls of this process are filtered (seccomp)")
        if advice is None and "build" not in reason and "kernel" not in reason:
            advice = (
                "let the container's seccomp profile allow io_uring_setup, io_uring_enter and"
                " io_uring_register"
            )
    return Finding(name, NOTE, "; ".join(seen), advice)


def check_direct(tried: _machine.Tried) -> Finding:
    """Reads past the page cache."""
    name = "direct I/O"
    if tried.worked is None:
        return Finding(name, NOTE, f"not tried: {tried.why_not}")
    if tried.worked:
        return Finding(name, OK, f"works, tried with {tried.with_what}")
    reason = f" ({tried.why_not})" if tried.why_not else ""
    seen = f"refused{reason}, tried with {tried.with_what}: reads go through the page cache"
    return Finding(name, NOTE, seen)


def check_file_system(mount: _machine.Mount | None) -> Finding:
    """What the files lie on."""
    name = "file system"
    if mount is None:
        return Finding(name, NOTE, "unknown: /proc/self/mountinfo does not say")
    seen = f"{mount.kind} of {mount.source} at {mount.point}"
    advice = 'load with backend="pread": it has many reads under way at a time'
    if mount.is_network:
        return Finding(name, NOTE, f"{seen}: a network file system", advice)
    if mount.is_process:
        return Finding(name, NOTE, f"{seen}: served by a process (FUSE)", advice)
    return Finding(name, OK, f"{seen}: no network file system")


def check_read_ahead(found: _machine.ReadAhead | None) -> Finding:
    """What page faults of other programs read; ours ask for what they need."""
    name = "read-ahead"
    if found is None:
        return Finding(name, NOTE, "unknown: /sys has no read_ahead_kb for this device")
    seen = f"{found.kib:,} KiB ({found.path})"
    if found.kib == 0:
        return Finding(
            name, NOTE, f"{seen}: page faults read page by page", f"echo 128 > {found.path}"
        )
    return Finding(name, OK, seen)


def check_huge_pages(found: _machine.HugePages) -> Finding:
    """Memory of our own, and mapped files, in pages of 2 MiB."""
    name = "huge pages"
    if found.mode is None:
        return Finding(name, NOTE, "unknown: /sys has no transparent_hugepage")
    seen = f"{found.mode}"
    if found.of_files is not None:
        seen += f"; the page cache holds {size_text(found.of_files)} of files in them"
    if not found.in_process:
        return Finding(name, NOTE, f"{seen}; switched off for this process (prctl)")
    if found.mode == "never":
        return Finding(
            name,
            NOTE,
            f"{seen}: memory of our own comes in small pages, which takes longer",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    return Finding(name, OK, seen)


def check_page_cache(release: str | None, refusal: str | None, can_populate: bool) -> Finding:
    """What the kernel can say about the page cache, and do with it."""
    seen = [f"Linux {release}" if release else "kernel unknown"]
    seen.append("cachestat works" if refusal is None else f"no cachestat ({refusal})")
    seen.append("MADV_POPULATE_READ works" if can_populate else "no MADV_POPULATE_READ")
    if refusal is None and can_populate:
        return Finding("page cache", OK, "; ".join(seen))
    wanted = (6, 5) if can_populate else (5, 14)
    is_old = release is not None and _machine.version_numbers(release) < wanted
    advice = f"Linux {wanted[0]}.{wanted[1]} or newer has it" if is_old else None
    return Finding("page cache", NOTE, "; ".join(seen), advice)


def check_residency(path: str) -> Finding:
    """Whether we are told what is cached of the files themselves."""
    name = "residency"
    models = _machine.list_models(path)
    if not models:
        return Finding(name, OK, "no safetensors files there to ask about")
    untold = [model for model in models if not _machine.is_residency_told(model)]
    if not untold:
        return Finding(name, OK, f"told of {count_text(len(models), 'file')}")
    return Finding(
        name,
        NOTE,
        f"of {len(untold):,} of {count_text(len(models), 'file')} the system does not tell what is"
        f" cached, since neither their owner nor a writer asks (the first: {untold[0]}): they are"
        " read as if nothing were",
        "let who loads them own them, or be allowed to write them",
    )


def check_memory(found: _machine.Memory) -> Finding:
    """How much there is to read ahead into."""
    name = "memory"
    if found.free is None:
        return Finding(name, NOTE, "unknown: /proc/meminfo does not say")
    seen = []
    if found.available is not None:
        total = "" if found.total is None else f" of {size_text(found.total)}"
        seen.append(f"{size_text(found.available)}{total} available")
    if found.limit is None:
        seen.append("no limit by a control group")
    else:
        used, limit = size_text(found.used), size_text(found.limit)
        seen.append(f"the control group has {used} of {limit} in use")
    seen.append(f"files are read ahead up to {size_text(found.free // 4)}")
    if found.free < _LITTLE_MEMORY_BYTES:
        return Finding(name, NOTE, "; ".join(seen), "give the process more memory")
    return Finding(name, OK, "; ".join(seen))


def check_locked() -> Finding:
    """RLIMIT_MEMLOCK, which drivers may hold against pinned memory."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    told = "no limit" if limit == resource.RLIM_INFINITY else f"at most {size_text(limit)}"
    return Finding("locked memory", OK, f"{told} (RLIMIT_MEMLOCK)")
