# SPDX-License-Identifier: Apache-2.0
"""Counters of this process: what was served natively, what went to stock and why, bytes, seconds.

The C core counts what it does; hand-overs to stock are counted here. `stats()` joins the two.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from typing import Any

from . import _native

_PHASES = ("header", "filter", "plan", "read", "wrap")


@dataclasses.dataclass(frozen=True)
class Stats:
    """What happened since import, the last `reset_stats()`, or the begin of a `patched()` block.

    Attributes:
        opens: files opened natively.
        headers_reused: of these, files opened before whose header was the same, byte by byte.
        tensors_native: tensors handed out that our core made.
        tensors_stock: tensors stock made and we passed on. A handle that is stock's own and has no
            filter is not watched: its hand-over is in `fallbacks`, its tensors are not here.
        fallbacks: reason -> number of calls handed to stock.
        keys_kept, keys_skipped: header entries of native opens, by the filter's decision.
        bytes_kept, bytes_skipped: their sizes.
        bytes_wanted: sizes of the tensors in `tensors_native`.
        bytes_read: what was asked of the system: headers, and what was read ahead of the consumer
            so far: that goes on beside it. What a mapping faults in by itself is not known here.
        bytes_over_read: of it, beyond the tensors (page rounding, small gaps).
        requests: number of these requests.
        files_cold, files_warm, files_unknown: files by what the page cache held of what is kept:
            less than 90 %, at least that, or the system does not tell. Asked when a second tensor
            is, or all are.
        retries: requests that were repeated, for what a short or interrupted read left.
        loads_direct, loads_buffered: reads into memory of our own (`backend="pread"`, `tensors()`)
            that went past the page cache, or through it.
        loads_pageable: of these, to a device that could not pin the staging memory.
        bytes_to_device: what was copied to devices.
        engine: what did the last such read that was worth an engine: "uring", "threads" or None.
        engine_reason: why it was not a better one, or not direct; None if nothing was in the way.
        seconds: phase -> time: header, filter, plan, read (waiting for memory of our own), wrap
            (making tensors).
    """

    opens: int = 0
    headers_reused: int = 0
    tensors_native: int = 0
    tensors_stock: int = 0
    fallbacks: dict[str, int] = dataclasses.field(default_factory=dict)
    keys_kept: int = 0
    keys_skipped: int = 0
    bytes_kept: int = 0
    bytes_skipped: int = 0
    bytes_wanted: int = 0
    bytes_read: int = 0
    bytes_over_read: int = 0
    requests: int = 0
    files_cold: int = 0
    files_warm: int = 0
    files_unknown: int = 0
    retries: int = 0
    loads_direct: int = 0
    loads_buffered: int = 0
    loads_pageable: int = 0
    bytes_to_device: int = 0
    engine: str | None = None
    engine_reason: str | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All counters as a plain dict."""
        return dataclasses.asdict(self)

    def __sub__(self, earlier: Stats) -> Stats:
        """What happened between `earlier` and this."""
        return Stats(
            **{
                field.name: _subtract(getattr(self, field.name), getattr(earlier, field.name))
                for field in dataclasses.fields(self)
            }
        )


class Report:
    """The live `Stats` of a block: of the whole process, from the block's begin to its end.

    It has the attributes of `Stats`; they move until the block ends. `stats()` gives a frozen copy.
    """

    def __init__(self) -> None:
        self._begin = _totals()
        self._end: Stats | None = None

    def stats(self) -> Stats:
        """The counters of the block up to now, or of the whole block once it has ended."""
        return (self._end or _totals()) - self._begin

    def _finish(self) -> None:
        self._end = _totals()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.stats(), name)

    def __repr__(self) -> str:
        return repr(self.stats())


_lock = threading.RLock()  # an allocation under it may run a finaliser that counts


def _renew_lock() -> None:
    """In a forked child: the thread that may have held it is not there."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)

_fallbacks: dict[str, int] = {}
_tensors_stock = 0
_baseline = Stats()


def stats() -> Stats:
    """The counters of this process since import or the last `reset_stats()`."""
    return _totals() - _baseline


def reset_stats() -> None:
    """Count from here. Reports of running blocks are not touched."""
    global _baseline
    _baseline = _totals()


def count_fallback(reason: str) -> None:
    """One call was handed to stock."""
    with _lock:
        _fallbacks[reason] = _fallbacks.get(reason, 0) + 1
    if _native.core is not None:
        _native.core.trace_fallback(reason)


def count_stock_tensors(count: int) -> None:
    """Stock made `count` tensors for a call of ours."""
    global _tensors_stock
    with _lock:
        _tensors_stock += count


def _totals() -> Stats:
    counters: dict[str, int] = {} if _native.core is None else _native.core.counters()
    seconds = {phase: counters.pop(phase + "_ns", 0) / 1e9 for phase in _PHASES}
    engine, *reasons = (None, None) if _native.core is None else _native.core.engine()
    if engine != "threads":
        reasons = reasons[1:]  # io_uring was refused only where something else did the work
    with _lock:
        return Stats(
            **counters,
            engine=engine,
            engine_reason="; ".join(filter(None, reasons)) or None,
            seconds=seconds,
            tensors_stock=_tensors_stock,
            fallbacks=dict(_fallbacks),
        )


def _subtract(later: Any, earlier: Any) -> Any:
    if later is None or isinstance(later, str):
        return later
    if not isinstance(later, dict):
        return later - earlier
    differences = {key: value - earlier.get(key, 0) for key, value in later.items()}
    return {key: value for key, value in differences.items() if value or isinstance(value, float)}
