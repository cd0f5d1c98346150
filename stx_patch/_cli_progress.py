# SPDX-License-Identifier: Apache-2.0
"""A bar for work that takes a while: on stderr, where that is a terminal and tqdm is there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import _progress


@contextmanager
def bar(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Gives what is told how many bytes more are done."""
    wanted = importlib.util.find_spec("tqdm") is not None
    shown = _progress.make_progress(wanted, title) if total_bytes else None
    part = None if shown is None else shown.part()
    done_bytes = 0

    def add(size_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += size_bytes
        if part is not None:
            part.report(done_bytes, total_bytes)

    try:
        yield add
    finally:
        if part is not None:
            part.stop()
