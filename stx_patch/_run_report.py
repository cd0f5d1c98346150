# SPDX-License-Identifier: Apache-2.0
"""What the processes of `stx-patch run` tell: the first shows the table of all at its exit, the
others leave a small file for it if they have loaded anything.

The first process is the program itself: `run` has become it, so its pid is known. Files are left in
a folder that the first one to need it makes. Not every process comes to its exit: pools end their
workers by SIGTERM. So a file is there from the moment a process is about to open its first one, is
renewed at most once a second when it opens others, and is final at its exit.

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

_INTERVAL_S = 1.0  # between the words of a process that opens files

_said = ""  # by STX_PATCH_RUN: JSON, made by stx_patch._cli_run
_begin_s = 0.0
_at_fork: Stats | None = None  # the counters at the latest fork
_baseline: Stats | None = None  # in a forked child: those at its own
_finished_in = 0  # pid
_follows_multiprocessing = False
_path = ""  # of what this process has left
_next_s = 0.0  # when it says something again


def watch(said: str) -> None:
    """Have `_finish` called at the exit of this process and of those that it forks. Of what other
    interpreters in it do, nothing is told."""
    global _said, _begin_s
    if not _is_main_interpreter():
        return
    _said, _begin_s = said, time.monotonic()
    atexit.register(_finish)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def _is_main_interpreter() -> bool:
    import _thread

    try:
        known: Any = _thread._is_main_interpreter  # type: ignore[attr-defined]
        return bool(known())
    except AttributeError:  # Python < 3.13
        pass
    try:
        interpreters: Any = __import__("_xxsubinterpreters")
    except ImportError:  # there are no others
        return True
    return bool(interpreters.get_current() == interpreters.get_main())


def follow(patch: Any) -> None:
    """Note what is opened through this module stx_patch._patch: all who open ask it what is in
    force, whatever patch the program has made."""
    if not _said:
        return
    current = patch.current

    def noting() -> Any:
        if time.monotonic() >= _next_s:
            _note()
        return current()

    patch.current = noting


def _note() -> None:
    global _next_s
    settings = json.loads(_said)
    if settings["pid"] == os.getpid():
        _next_s = float("inf")  # it shows the table, or there is none
    else:
        _next_s = time.monotonic() + _INTERVAL_S
        _leave(settings, final=False)


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
    global _baseline, _path, _next_s
    _baseline, _path, _next_s = _at_fork, "", 0.0


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
    elif _path or _used() is not None:
        _leave(settings, final=True)


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
    if name == "MainProcess":
        name = os.path.basename(str(next(iter(sys.argv), "")))
    return str(name) or "python"


def _report(name: str, final: bool) -> dict[str, Any]:
    used = _used()
    stats = {} if used is None else used.as_dict()
    return {"pid": os.getpid(), "name": name, "final": final, "stats": stats}


def _leave(settings: dict[str, Any], final: bool) -> None:
    """In the place of what this process has left before."""
    global _path
    if not settings["folder"] or not _is_alive(settings["pid"]):
        return
    now_ns = time.time_ns()
    _path = _path or os.path.join(settings["folder"], f"{os.getpid()}-{now_ns}.json")
    partial = f"{_path}.{now_ns}"
    try:
        os.makedirs(settings["folder"], 0o700, exist_ok=True)
        with open(partial, "x", encoding="utf-8") as file:
            json.dump(_report(_name(), final), file)
        os.replace(partial, _path)
    except OSError:  # no room, or no right: the program has nothing to do with it
        pass


def _conclude(settings: dict[str, Any]) -> None:
    from . import _run_table

    seconds = time.monotonic() - _begin_s
    reports = [_report("", final=True), *_collect(settings["folder"])]
    if settings["json"] is not None:
        _run_table.write_json(settings, seconds, reports)
    if not settings["quiet"]:
        _run_table.show(settings["program"], seconds, reports)


def _collect(folder: str) -> list[dict[str, Any]]:
    """What the others have left, oldest first. The folder goes, unless the filter is in it, which
    children that go on still need."""
    try:
        entries = list(os.scandir(folder))
    except OSError:  # nobody has left anything
        return []
    found = []
    for entry in entries:
        if entry.name.endswith(".json"):
            try:
                with open(entry, encoding="utf-8") as file:
                    found.append((entry.stat().st_mtime_ns, json.load(file)))
            except (OSError, ValueError):  # of one process nothing is known then
                pass
    try:
        for entry in entries:
            if entry.name != "filter":
                os.unlink(entry)
        os.rmdir(folder)
    except OSError:  # the filter is in it, or somebody is still writing
        pass
    found.sort(key=lambda one: one[0])
    return [report for _, report in found]
