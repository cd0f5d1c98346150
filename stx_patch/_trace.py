# SPDX-License-Identifier: Apache-2.0
"""The flight recorder: what loads did, as a file that chrome://tracing and ui.perfetto.dev show.

The core records into a ring of fixed size that keeps the newest (csrc/trace.h). A recording is a
stretch of what went into it: of a `patched(trace=…)` block, or of the whole process where
STX_PATCH_TRACE names a file. Recordings may overlap; each sees all that happens meanwhile.
Nothing here makes a load fail: what cannot be recorded or written is one StxWarning.
"""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from . import _environment, _native, _options
from ._errors import StxWarning, warn

Path = str | os.PathLike[str]
Event = tuple[str, int, int, int, int, dict[str, int | str]]

_BESIDE, _MOMENT = 1, 2  # of the core's enum stx_trace_shape
_LANES = 1 << 24  # numbers of lanes begin here: the system's threads have lower ones


class Recording:
    """What is recorded from here on until `finish`."""

    __slots__ = ("_options", "_path", "first")

    def __init__(self, path: str, options: _options.Options) -> None:
        self._path = path
        self._options = options
        self.first = 0  # number of its first record


_lock = threading.RLock()  # an allocation under it may run a finaliser that ends another block
_recordings: list[Recording] = []
_process: Recording | None = None  # the one of the variable
_is_looked_at = False  # the variable, by this process
_is_forked = False  # from a process that recorded because of the variable


def _forget_parent() -> None:
    """In a forked child: what was being recorded is the parent's, and the core has forgotten it."""
    global _lock, _process, _is_looked_at, _is_forked
    _lock = threading.RLock()
    _recordings.clear()
    _is_forked = _is_forked or _process is not None
    _process = None
    _is_looked_at = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)


def start(path: Path, options: _options.Options) -> Recording | None:
    """Record for a block that is to be written to `path`; None where nothing can be recorded.

    Raises:
        TypeError: `path` is no path.
    """
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"trace must be a str or a path of str, not {type(name).__name__}")
    return _start(name, options)


def _start(path: str, options: _options.Options) -> Recording | None:
    try:
        if _native.core is None:
            raise OSError("there is no native core here")
        absolute = os.path.abspath(path)  # somebody may change the directory
        with _lock:
            recording = Recording(absolute, options)
            _recordings.append(recording)  # first: a finaliser may end the only other one
            try:
                _native.core.trace_start()  # which may be on
            except BaseException:
                _recordings.remove(recording)
                raise
            recording.first = _native.core.trace_count()
            return recording
    except (OSError, MemoryError) as error:
        _complain(path, error)
        return None


def finish(recording: Recording) -> None:
    """Write the file, in the place of one that is there. In a child forked meanwhile: nothing."""
    try:
        taken = _take(recording)
        if taken is not None:
            _write(recording._path, *taken)
    except Exception as error:  # whatever it is, the loads went well
        _complain(recording._path, error)


def look_at_environment() -> None:
    """Record this process if STX_PATCH_TRACE says so. Called before the first file is opened."""
    global _process, _is_looked_at
    if _is_looked_at:
        return
    with _lock:
        path = os.environ.get(_environment.TRACE, "").strip()
        if path and not _is_looked_at:
            _process = _start(path, _known_options())
            _end_with_process()
        _is_looked_at = True


def _known_options() -> _options.Options:
    try:
        return _options.from_environment({})
    except ValueError:  # whoever loads is told
        return _options.DEFAULT


def _end_with_process() -> None:
    atexit.register(_finish_process)
    multiprocessing_util = sys.modules.get("multiprocessing.util")
    if multiprocessing_util is not None:  # its forked processes end without atexit
        multiprocessing_util.Finalize(None, _finish_process, exitpriority=0)


def _finish_process() -> None:
    """The process ends: write what it did, if it did anything."""
    global _process
    recording, _process = _process, None
    if recording is None:
        return
    try:
        taken = _take(recording)
        if taken is not None and taken[0]:
            _write_beside_others(recording._path, *taken)
    except Exception as error:  # whatever it is, the loads went well
        _complain(recording._path, error)


def _complain(path: str, error: Exception) -> None:
    warn(f"no trace is written to {path}: {error}", StxWarning)


def _take(recording: Recording) -> tuple[list[Event], dict[str, Any]] | None:
    """What was recorded, and what else the file says; the core's memory goes with the last one."""
    with _lock:
        if recording not in _recordings:
            return None
        try:
            events, lost_count = _native.core.trace_events(recording.first)
        finally:
            _recordings.remove(recording)
            if not _recordings:
                _native.core.trace_stop()
    return events, _describe(recording._options, lost_count)


def _describe(options: _options.Options, lost_count: int) -> dict[str, Any]:
    from . import __version__

    versions = {"stx_patch": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "safetensors"):
        versions[name] = str(getattr(sys.modules.get(name), "__version__", None))
    chosen = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    if not isinstance(options.progress, (bool, str)):
        chosen["progress"] = "callable"
    return {
        "versions": versions,
        "options": chosen,
        "lost_records": lost_count,
        "clock": "monotonic",
    }


# --- the file ---


def _reserve(path: str) -> str:
    """Make an empty file that nobody else has: `path`, or with the process's number before the
    suffix. A forked child leaves `path` to its parent."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a directory")
    root, suffix = os.path.splitext(path)
    own = f"{root}.{os.getpid()}"
    others = (f"{own}-{number}{suffix}" for number in itertools.count(2))
    for name in itertools.chain([] if _is_forked else [path], [own + suffix], others):
        try:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        return name
    raise AssertionError("there is always another number")


def _write_beside_others(path: str, events: list[Event], others: dict[str, Any]) -> None:
    """In a file that no other process has written, or ever will."""
    reserved = _reserve(path)
    try:
        _write(reserved, events, others)
    except BaseException:
        os.unlink(reserved)
        raise


def _write(path: str, events: list[Event], others: dict[str, Any]) -> None:
    """All of it, or nothing."""
    partial = f"{path}.{os.getpid()}-{threading.get_ident()}.partial"
    try:
        with open(partial, "w", encoding="ascii") as file:
            file.writelines(_lines(events, others))
        os.replace(partial, path)
    except BaseException:
        if os.path.lexists(partial):
            os.unlink(partial)
        raise


def _lines(events: list[Event], others: dict[str, Any]) -> Iterator[str]:
    import json

    yield '{"traceEvents": [\n'
    for number, event in enumerate(_chrome_events(events)):
        yield (",\n" if number else "") + json.dumps(event)
    yield '\n], "displayTimeUnit": "ms", "otherData": ' + json.dumps(others) + "}\n"


def _chrome_events(events: list[Event]) -> Iterator[dict[str, Any]]:
    """In the order of their begins. Times are microseconds of the system's monotonic clock, so that
    files of several processes fit together."""
    process = os.getpid()
    lanes = _Lanes()
    in_order = sorted(events, key=lambda event: (event[2], -event[3]))  # what others are in first
    for name, shape, begin_ns, end_ns, thread, arguments in in_order:
        if shape == _BESIDE:
            thread = lanes.place(name, begin_ns, end_ns)
        event = {"name": name, "cat": "stx_patch", "pid": process, "tid": thread}
        event |= {"ts": begin_ns / 1000, "args": arguments}
        if shape == _MOMENT:
            yield {**event, "ph": "i", "s": "t"}
        else:
            yield {**event, "ph": "X", "dur": (end_ns - begin_ns) / 1000}
    names = _thread_names(events) | lanes.names
    program = os.path.basename(str((getattr(sys, "argv", None) or [""])[0])) or "python"
    yield _metadata("process_name", process, 0, name=f"{program} (stx_patch)")
    for thread, name in names.items():
        yield _metadata("thread_name", process, thread, name=name)
        yield _metadata("thread_sort_index", process, thread, sort_index=thread)


def _metadata(kind: str, process: int, thread: int, **arguments: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": arguments}


def _thread_names(events: list[Event]) -> dict[int, str]:
    """Of the threads that recorded something themselves."""
    kinds: dict[int, set[str]] = {}
    for name, shape, _, _, thread, _ in events:
        if shape != _BESIDE:
            kinds.setdefault(thread, set()).add(name)
    known = {thread.native_id: thread.name for thread in threading.enumerate()}
    return {thread: known.get(thread) or _guess(thread, found) for thread, found in kinds.items()}


def _guess(thread: int, kinds: set[str]) -> str:
    """What a thread that Python does not know is, by all that it recorded."""
    if kinds == {"read ahead"}:
        return "read-ahead helper"
    if "engine" in kinds and kinds <= {"engine", "wait", "error"}:
        return "reader of tensors()"
    return f"thread {thread}"


class _Lanes:
    """Places for what overlaps: a row of the picture holds one thing at a time."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self._ends_ns: dict[str, list[tuple[int, int]]] = {}  # name -> (end, lane) of each

    def place(self, name: str, begin_ns: int, end_ns: int) -> int:
        """The first lane of `name` that is free; asked in the order of begins."""
        lanes = self._ends_ns.setdefault(name, [])
        for number, (last_ns, lane) in enumerate(lanes):
            if last_ns <= begin_ns:
                lanes[number] = (end_ns, lane)
                return lane
        lane = _LANES + len(self.names)
        lanes.append((end_ns, lane))
        self.names[lane] = f"{name} {len(lanes)}"
        return lane
