# SPDX-License-Identifier: Apache-2.0
"""Progress of loads that wait: a bar, or a call of the user's.

A load that returns at once (a mapped file) has none. Each file of a load reports how far it is;
several files that are loaded as one are parts of one `Progress`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from ._errors import StxWarning, warn

Target = bool | str | Callable[[int, int], Any]

_DELAY_S = 0.3  # a load that is over sooner shows no bar
_INTERVAL_S = 0.05
_TITLE = "Loading safetensors"
_warned = False


class Progress:
    """Where a load stands: parts report, a bar or a callable is shown.

    Args:
        target: True for a bar where stderr is a terminal, "force" for a bar anyway, or a callable
            that is given (done_bytes, total_bytes); what it raises ends the load.
        title: of the bar.
    """

    __slots__ = (
        "_bar",
        "_done",
        "_lock",
        "_shown_at",
        "_shown_bytes",
        "_target",
        "_title",
        "total_bytes",
    )

    def __init__(self, target: Target, title: str = _TITLE) -> None:
        self._target = target
        self._title = title
        # A collection in the middle of a bar may end another load of these files.
        self._lock = threading.RLock()
        self.total_bytes = 0  # of all files; 0: of the one that reports
        self._bar: Any = None
        self._done: dict[Part, int] = {}
        self._shown_at = float("-inf")
        self._shown_bytes = -1

    def part(self) -> Part:
        """What one file reports to."""
        return Part(self)

    def update(self, part: Part, done_bytes: int, total_bytes: int) -> None:
        """A part stands at `done_bytes`; twenty times a second, and at the end, that is shown."""
        with self._lock:
            self._done[part] = done_bytes
            whole_bytes = self.total_bytes or total_bytes
            whole_done_bytes = min(sum(self._done.values()), whole_bytes)
            is_due = time.monotonic() - self._shown_at >= _INTERVAL_S
            is_end = whole_done_bytes == whole_bytes
            if whole_done_bytes < self._shown_bytes or not (is_due or is_end):
                return
            if is_end and self._shown_bytes == whole_bytes:  # told already
                return
        self._tell(whole_done_bytes, whole_bytes)

    def _tell(self, done_bytes: int, total_bytes: int) -> None:
        self._shown_at = time.monotonic()
        self._shown_bytes = done_bytes
        if not callable(self._target):
            with self._lock:
                self._show(done_bytes, total_bytes)
            return
        try:
            self._target(done_bytes, total_bytes)
        except StopIteration as error:  # it would end an iteration in silence
            raise RuntimeError("progress raised StopIteration") from error

    def complete(self) -> None:
        """A load of all files has succeeded: what never reported (stock's files) is done, too."""
        if 0 <= self._shown_bytes < self.total_bytes:
            self._tell(self.total_bytes, self.total_bytes)

    def finish(self) -> None:
        """The load is over, however it ended."""
        with self._lock:
            bar, self._bar = self._bar, None
            self._done = {}
            self._shown_at = float("-inf")
            self._shown_bytes = -1
        if bar is not None:
            bar.close()

    def _show(self, done_bytes: int, total_bytes: int) -> None:
        bar = self._bar
        if bar is None:
            bar = self._bar = _make_bar(self._title, total_bytes)
        if bar is not None:
            bar.update(done_bytes - bar.n)


class Part:
    """One file's progress. The core calls `report` and `stop`."""

    __slots__ = ("_whole",)

    def __init__(self, whole: Progress) -> None:
        self._whole = whole

    def report(self, done_bytes: int, total_bytes: int) -> None:
        """The file stands at `done_bytes` of `total_bytes`."""
        if total_bytes != 0:
            self._whole.update(self, done_bytes, total_bytes)

    def stop(self) -> None:
        """The load of the file is over, however it ended."""
        if self._whole.total_bytes == 0:  # others may follow otherwise
            self._whole.finish()


def make_progress(target: Target, title: str = _TITLE) -> Progress | None:
    """The progress of an option's value, or None for none."""
    if target is False or (target is True and not _is_terminal()):
        return None
    return Progress(target, title)


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def _make_bar(title: str, total_bytes: int) -> Any:
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
        desc=title,
        unit="B",
        unit_scale=True,
        delay=_DELAY_S,
        leave=False,
    )
