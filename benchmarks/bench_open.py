# SPDX-License-Identifier: Apache-2.0
"""Opening: many files once, and one file many times. `bench_open.py [--pairs N]` prints ratios.

Each figure is a fresh process's, stock and ours in turn; files are in the page cache.

    shards    open + keys of 200 files of 500 tensors, none opened before
    reopen    10,000 times: open a file of 1,000 tensors, take one, close (disk offload)
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from make_data import FOLDER

SHARDS, SHARD_TENSORS = 200, 500
REOPENED_TENSORS, REOPENINGS = 1_000, 10_000
WAYS = ("stock", "ours", "ours, as one")


def make_files() -> None:
    """Written once."""
    import safetensors.torch
    import torch

    folder = FOLDER / "opened"
    folder.mkdir(parents=True, exist_ok=True)
    counts = {f"shard-{n:03}": SHARD_TENSORS for n in range(SHARDS)} | {"one": REOPENED_TENSORS}
    for stem, count in counts.items():
        path = folder / f"{stem}.safetensors"
        if not path.exists():
            tensors = {f"{stem}.layers.{n}.weight": torch.zeros(16) for n in range(count)}
            safetensors.torch.save_file(tensors, path)


def measure(case: str, way: str) -> float:
    """Seconds, in this process."""
    import safetensors
    import torch  # noqa: F401

    import stx_patch

    paths = [str(path) for path in sorted((FOLDER / "opened").glob("shard-*.safetensors"))]
    one = str(FOLDER / "opened" / "one.safetensors")
    opener = safetensors.safe_open if way == "stock" else stx_patch.safe_open
    with opener(one, "pt") as handle:
        handle.get_tensor("one.layers.0.weight")
    start = time.perf_counter()
    if case == "reopen":
        for number in range(REOPENINGS):
            with opener(one, "pt") as handle:
                handle.get_tensor(f"one.layers.{number % REOPENED_TENSORS}.weight")
    elif way == "ours, as one":
        names = stx_patch.safe_open(paths).keys()
        assert len(names) == SHARDS * SHARD_TENSORS
    else:
        handles = [opener(path, "pt") for path in paths]
        names = [name for handle in handles for name in handle.keys()]  # noqa: SIM118
        assert len(names) == SHARDS * SHARD_TENSORS
    return time.perf_counter() - start


def main() -> int:
    """Measure in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9, help="rounds")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(measure(*options.child))
        return 0
    make_files()
    for case, ways in (("shards", WAYS), ("reopen", WAYS[:2])):
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.pairs):
            for way in ways:
                command = [sys.executable, str(Path(__file__)), "--child", case, way]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds[way].append(float(done.stdout))
        for way in ways:
            ratios = [a / b for a, b in zip(seconds["stock"], seconds[way], strict=True)]
            print(
                f"{case:8} {way:14} {statistics.median(seconds[way]) * 1e3:9.1f} ms  "
                f"{statistics.median(ratios):6.2f}x [{min(ratios):.2f}, {max(ratios):.2f}]"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
