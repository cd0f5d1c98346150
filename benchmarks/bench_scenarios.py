# SPDX-License-Identifier: Apache-2.0
"""Whether any scenario of tests/consumers takes longer with us: seconds of tiny models, so that
overhead shows and speed does not. What a scenario does beside loading is in them.

    bench_scenarios.py [--pairs N] [--case WORD ...]

Each scenario runs in one process by stock, by stock again and patched, in turn. A ratio is stock's
seconds over ours of the same round; the second stock says what such a ratio is worth. Prints the
scenarios whose 95 % interval ends below 1, and how many of stock's own do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import runner

TESTS = Path(__file__).resolve().parent.parent / "tests"
CONSUMERS = sorted(
    path.stem
    for path in (TESTS / "consumers").glob("*.py")
    if path.stem.endswith(("_models", "_users"))
)


def take_times(consumer: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Scenario -> side -> seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"consumers.{consumer}", f"{folder}/run", str(rounds)]
        kept = {name: text for name, text in os.environ.items() if not name.startswith("STX_")}
        environment = kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise runner.Failed(done.stderr[-2000:])
        found: dict[str, dict[str, list[float]]] = json.loads(
            Path(folder, "run", "results", "seconds.json").read_text()
        )
    return found


def ratio(seconds: dict[str, list[float]], side: str) -> tuple[float, float, float]:
    """Median and 95 % interval of stock's seconds over this side's."""
    ratios = [a / b for a, b in zip(seconds["stock"], seconds[side], strict=True)]
    return (statistics.median(ratios), *runner.bootstrap(ratios))


def main() -> int:
    """Print each scenario; 1 if more are slower with us than stock is against itself."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9, help="rounds")
    parser.add_argument("--case", nargs="*", help="only consumers with one of these in their name")
    options = parser.parse_args()
    slower = {"ours": 0, "stock again": 0}
    medians: list[float] = []
    for consumer in CONSUMERS:
        if not runner.is_asked_for(consumer, options.case):
            continue
        for scenario, seconds in take_times(consumer, options.pairs).items():
            found = {side: ratio(seconds, side) for side in slower}
            for side, (_, _, high) in found.items():
                slower[side] += high < 1
            middle, low, high = found["ours"]
            medians.append(middle)
            print(
                f"{consumer.split('_')[0]:12} {scenario:32} "
                f"{statistics.median(seconds['stock']) * 1e3:8.1f} ms  {middle:5.2f}x "
                f"[{low:.2f}, {high:.2f}]{'  SLOWER' if high < 1 else ''}",
                flush=True,
            )
    if not medians:
        parser.error("no consumer has such a name")
    print(
        f"{len(medians)} scenarios, median {statistics.median(medians):.2f}x; slower beyond the "
        f"interval: {slower['ours']}, and of stock against itself: {slower['stock again']}"
    )
    return int(slower["ours"] > slower["stock again"])


if __name__ == "__main__":
    sys.exit(main())
