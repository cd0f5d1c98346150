# SPDX-License-Identifier: Apache-2.0
"""What each process of `stx-patch run` does at its exit: the first shows the table of all, the
others leave a small file for it if they have loaded anything.

The first process is the program itself: `run` has become it, so its pid is known. Files are left in
a folder that the first one to need it makes. What ends without Python's exit (os._exit, a signal)
shows and leaves nothing.

At the exit nothing may be imported that compiles code from text (dataclasses, named tuples): after
Ctrl-C, Python would then end with status 1 instead of by the signal.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time

TYPE_CHECKING = False  # as in typing, which is not imported for it
if TYPE_CHECKING:
    from typing import Any

    from ._stats import Stats

_said = ""  # by STX_PATCH_RUN: JSON, made by stx_patch._cli_run
_begin_s = 0.0
_at_fork: Stats | None = None  # the counters at the latest fork
_baseline: Stats | None = None  # in a forked child: those at its own
_finished_in = 0  # pid
_follows_multiprocessing = False


def watch(said: str) -> None:
    """Have `_finish` called at the exit of this process and of those that it forks."""
    global _said, _begin_s
    _said, _begin_s = said, time.monotonic()
    atexit.register(_finish)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def _before_fork() -> None:
    """For the child: the counters it starts from, which take a lock to read; and its exit, which
    multiprocessing makes without atexit."""
    global _at_fork, _follows_multiprocessing
    _at_fork = _totals()
    util = sys.modules.get("multiprocessing.util")
    register = getattr(util, "register_after_fork", None)
    if register is not None and not _follows_multiprocessing:
        _follows_multiprocessing = True
        register(_before_fork, _follow_multiprocessing)  # the first one only has to live on


def _after_fork() -> None:
    global _baseline
    _baseline = _at_fork


def _follow_multiprocessing(_: Any) -> None:
    from multiprocessing.util import Finalize

    Finalize(None, _finish, exitpriority=-100)  # after its own children were waited for


def _totals() -> Stats | None:
    stats = sys.modules.get("stx_patch._stats")
    return None if stats is None else stats._totals()


def _used() -> Stats | None:
    """What this process has done itself; None if that is nothing."""
    totals = _totals()
    if totals is None:
        return None
    if _baseline is not None:
        totals = totals - _baseline
    return totals if totals.opens or totals.fallbacks or totals.tensors_native else None


def _finish() -> None:
    global _finished_in
    if _finished_in == os.getpid():
        return
    _finished_in = os.getpid()
    settings = json.loads(_said)
    if settings["pid"] == os.getpid():
        _conclude(settings)
        return
    used = _used()
    if used is not None and _is_alive(settings["pid"]):
        _leave(settings["folder"], {"pid": os.getpid(), "name": _name(), "stats": used.as_dict()})


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:  # nobody would take the file away
        return False
    return True


def _name() -> str:
    """What this process is called: by multiprocessing, or by its script."""
    process = sys.modules.get("multiprocessing.process")
    current: Any = getattr(process, "current_process", lambda: None)()
    name = getattr(current, "name", "MainProcess")
    return str(os.path.basename(sys.argv[0]) if name == "MainProcess" else name)


def _leave(folder: str, report: dict[str, Any]) -> None:
    path = os.path.join(folder, f"{os.getpid()}-{time.time_ns()}")
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            json.dump(report, file)
        os.replace(path, path + ".json")
    except OSError:  # no room, or no right: the program has nothing to do with it
        pass


def _conclude(settings: dict[str, Any]) -> None:
    from . import _run_table

    seconds = time.monotonic() - _begin_s
    used = _used()
    first = {"pid": os.getpid(), "name": "", "stats": {} if used is None else used.as_dict()}
    reports = [first, *_collect(settings["folder"])]
    if settings["json"] is not None:
        _run_table.write_json(settings, seconds, reports)
    if not settings["quiet"]:
        _run_table.show(settings["program"], seconds, reports)


def _collect(folder: str) -> list[dict[str, Any]]:
    """What the others have left, oldest first. The folder goes."""
    try:
        entries = list(os.scandir(folder))
    except OSError:  # nobody has left anything
        return []
    found = [entry for entry in entries if entry.name.endswith(".json")]
    reports = []
    for entry in sorted(found, key=lambda entry: entry.stat().st_mtime_ns):
        with open(entry, encoding="utf-8") as file:
            reports.append(json.load(file))
    try:
        for entry in entries:
            os.unlink(entry)
        os.rmdir(folder)
    except OSError:  # somebody is still writing
        pass
    return reports
