# SPDX-License-Identifier: Apache-2.0
"""What recording costs: warm loads with a trace, by loads without. `bench_trace.py [--pairs N]
[--case WORD ...]` prints seconds with / seconds without, median [95 % interval], 1.00 is nothing.

    load_file    100,000 tiny tensors, mapped: few records
    get_tensor   the same, one by one, of an open handle
    pread        2 GiB read into memory, a record for every request

All sides of a round run in one process, in an order that turns around: of two processes no two
percent could be told apart. A/A is without by without: what such a ratio is worth. Writing the file
at the end of the block is not part of the load: it has a column of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import runner
from make_data import FOLDER, SETS, data_files
from system import machine, warm_file

Load = Callable[[str], Any]
SIDES = ("without", "with", "without again")


def load_file(path: str) -> Any:
    """The whole file, mapped."""
    import stx_patch

    return stx_patch.load_file(path)


def get_tensor(path: str) -> Any:
    """Every tensor by its name."""
    import stx_patch

    with stx_patch.safe_open(path) as handle:
        return [handle.get_tensor(name) for name in handle.offset_keys()]


def pread(path: str) -> Any:
    """The whole file, read."""
    import stx_patch

    return stx_patch.load_file(path, backend="pread")


CASES: tuple[tuple[str, str, Load], ...] = (
    ("load_file", "tiny", load_file),
    ("get_tensor", "tiny", get_tensor),
    ("pread", "medium", pread),
)


def time_once(load: Load, path: str, trace: Path | None) -> tuple[float, float]:
    """Seconds of the load, and of leaving the block."""
    import stx_patch

    gc.collect()
    with stx_patch.patched(trace=trace):
        start = time.perf_counter()
        loaded = load(path)
        end = time.perf_counter()
        del loaded
        leaving = time.perf_counter()
    return end - start, time.perf_counter() - leaving


def ratio(over: list[float], under: list[float]) -> str:
    """Of the two of each round: median and interval."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    low, high = runner.bootstrap(ratios)
    return f"{statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]"


def measure(name: str, data: str, load: Load, pairs: int) -> str:
    """A line of the table."""
    (path,) = data_files(data)
    warm_file(path)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    writing: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        for side in SIDES:  # whatever a process does once
            time_once(load, str(path), trace if side == "with" else None)
        for number in range(pairs):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                taken, left = time_once(load, str(path), trace if side == "with" else None)
                seconds[side].append(taken)
                if side == "with":
                    writing.append(left)
        whole = json.loads(trace.read_text())
    records = sum(event["ph"] != "M" for event in whole["traceEvents"])
    return (
        f"{name:10} {SETS[data].text:15} {statistics.median(seconds['without']) * 1e3:9.2f} ms  "
        f"{ratio(seconds['with'], seconds['without']):>22}  "
        f"{ratio(seconds['without again'], seconds['without']):>22}  {records:7,} "
        f"{statistics.median(writing) * 1e3:9.1f} ms"
    )


def main() -> int:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=21, help="rounds, at least 9")
    parser.add_argument("--case", nargs="*", help="only cases with one of these in their name")
    options = parser.parse_args()
    if options.pairs < 9:
        parser.error("fewer than 9 rounds have no interval")
    with runner.one_at_a_time():
        print(", ".join(f"{key} {value}" for key, value in machine(FOLDER).items()))
        print(f"{'':27}{'without':>11}  {'with/without':>22}  {'A/A':>22}  records   writing it")
        for name, data, load in CASES:
            if runner.is_asked_for(name, options.case):
                print(measure(name, data, load, options.pairs), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
