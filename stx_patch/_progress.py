# SPDX-License-Identifier: Apache-2.0
"""Progress of loads that wait: a bar, or a call of the user's.

A load that returns at once (a mapped file) has none. The core reports about twenty times a second;
several files that are loaded as one share one `Progress`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from ._errors import StxWarning, warn

Target = bool | str | Callable[[int, int], Any]

_DELAY_S = 0.3  # a load that is over sooner shows no bar
_warned = False


class Progress:
    """Where a load stands: `report` is told, a bar or a callable is shown.

    Args:
        target: True for a bar where stderr is a terminal, "force" for a bar anyway, or a callable
            that is given (done_bytes, total_bytes); what it raises ends the load.
    """

    __slots__ = ("_bar", "_before_bytes", "_lock", "_target", "_total_bytes")

    def __init__(self, target: Target) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._bar: Any = None
        self._before_bytes = 0  # of files that are done
        self._total_bytes = 0  # of all files of this load; 0: of the one that reports

    def expect(self, total_bytes: int) -> None:
        """What comes is one load of several files: `total_bytes` in all."""
        with self._lock:
            self._close()
            self._total_bytes = total_bytes

    def report(self, done_bytes: int, total_bytes: int) -> None:
        """A file stands at `done_bytes` of `total_bytes`; when these are equal it is done."""
        if total_bytes == 0:
            return
        with self._lock:
            whole_bytes = self._total_bytes or total_bytes
            whole_done_bytes = min(self._before_bytes + done_bytes, whole_bytes)
            if done_bytes == total_bytes:
                self._before_bytes += total_bytes
            if not callable(self._target):
                self._show(whole_done_bytes, whole_bytes)
            if self._before_bytes >= whole_bytes:
                self._close()
        if callable(self._target):  # without the lock: it may load something itself
            self._target(whole_done_bytes, whole_bytes)

    def stop(self) -> None:
        """The load of a file is over, however it ended. Called by the core."""
        with self._lock:
            if self._total_bytes == 0:  # others may follow otherwise
                self._close()

    def finish(self) -> None:
        """The load of what was expected is over, however it ended."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
        self._before_bytes = 0
        self._total_bytes = 0

    def _show(self, done_bytes: int, total_bytes: int) -> None:
        if self._bar is None:
            self._bar = _make_bar(total_bytes)
        if self._bar is not None:
            self._bar.update(done_bytes - self._bar.n)


def make_progress(target: Target) -> Progress | None:
    """The progress of an option's value, or None for none."""
    if target is False or (target is True and not _is_terminal()):
        return None
    return Progress(target)


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def _make_bar(total_bytes: int) -> Any:
    global _warned
    try:
        from tqdm.auto import tqdm
    except ImportError:
        if not _warned:
            _warned = True
            warn("progress=True needs tqdm: pip install tqdm", StxWarning)
        return None
    return tqdm(
        total=total_bytes,
        desc="Loading safetensors",
        unit="B",
        unit_scale=True,
        delay=_DELAY_S,
        leave=False,
    )
