# SPDX-License-Identifier: Apache-2.0
"""Loads, stock against ours: interleaved fresh processes, medians, ratios with their intervals.

    bench_load.py [--pairs N] [--quick] [--case NAME ...]

How a number is made is in benchmarks/README.md. Results go to benchmarks/results/ as JSON.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_data

CHILD = Path(__file__).with_name("bench_child.py")
RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Case:
    """One load. `bounds` are the ratios to reach: (to return, to return and read everything)."""

    name: str
    action: str  # of bench_child.py
    data: str
    bounds: tuple[float | None, float | None]


CASES = (
    Case("100,000 tiny tensors", "load_file", "tiny", (10, 3)),
    Case("20,000 x 50 KiB", "load_file", "small", (8, 1.5)),
    Case("4 GiB in 300 tensors", "load_file", "large", (4, 1.0)),
    Case("open + keys of 100,000", "open_keys", "tiny", (3, None)),
    Case("open + one of 100,000", "open_one", "tiny", (3, None)),
    Case("cold, quarter of 256 x 8 MiB", "cold_quarter", "medium", (None, 1.0)),
    Case("cold, quarter of 20,000 x 50 KiB", "cold_quarter", "small", (None, 1.0)),
    Case("A/A: stock twice, 20,000 x 50 KiB", "load_file", "small", (None, None)),
)


def run_child(action: str, side: str, path: Path) -> dict[str, Any]:
    """One measurement in a fresh process."""
    command = [sys.executable, str(CHILD), action, side, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def bootstrap(ratios: list[float]) -> tuple[float, float]:
    """The 95 % interval of the median, by resampling."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[1949]


def measure(case: Case, pairs: int) -> dict[str, Any]:
    """All pairs of one case; sides alternate, and who begins alternates, too."""
    path = make_data.data_file(case.data)
    second = "stock" if case.name.startswith("A/A") else "ours"
    runs: dict[str, list[dict[str, Any]]] = {"stock": [], "ours": []}
    for number in range(pairs):
        sides = [("stock", "stock"), ("ours", second)]
        for label, side in sides if number % 2 == 0 else reversed(sides):
            runs[label].append(run_child(case.action, side, path))
    row: dict[str, Any] = {"case": case.name, "runs": runs}
    for what in ("return_s", "read_s"):
        ratios = [a[what] / b[what] for a, b in zip(runs["stock"], runs["ours"], strict=True)]
        row[what] = {
            "stock": statistics.median(run[what] for run in runs["stock"]),
            "ours": statistics.median(run[what] for run in runs["ours"]),
            "ratio": statistics.median(ratios),
            "interval": bootstrap(ratios),
        }
    return row


def machine() -> dict[str, Any]:
    """What the numbers were made on."""
    from importlib.metadata import version

    device = os.stat(make_data.FOLDER).st_dev
    base = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    queue = next((q for q in (base / "queue", base / "../queue") if q.exists()), None)
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return {
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "safetensors": version("safetensors"),
        "read_ahead_kb": int((queue / "read_ahead_kb").read_text()) if queue else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def show(case: Case, row: dict[str, Any]) -> None:
    """One case, two lines: to return, and to return and read everything."""
    for what, label, bound in (
        ("return_s", "to return", case.bounds[0]),
        ("read_s", "and read all", case.bounds[1]),
    ):
        part = row[what]
        low, high = part["interval"]
        wanted = "" if bound is None else f">= {bound:g}x {'ok' if high >= bound else 'BELOW'}"
        name = case.name if what == "return_s" else ""
        print(
            f"{name:34} {label:13} {part['stock'] * 1e3:9.2f} {part['ours'] * 1e3:9.2f} "
            f"{part['ratio']:6.2f}x [{low:.2f}, {high:.2f}]  {wanted}"
        )
    last = {side: runs[-1] for side, runs in row["runs"].items()}
    for key, label in (("device_bytes", "MB from disk"), ("private_bytes", "MB private")):
        if last["stock"][key] is not None:
            stock, ours = (last[side][key] / 1e6 for side in ("stock", "ours"))
            print(f"{'':34} {label:13} {stock:9.0f} {ours:9.0f}")
    sys.stdout.flush()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="3 pairs")
    parser.add_argument("--case", nargs="*", help="only cases with one of these words in the name")
    options = parser.parse_args()
    pairs = 3 if options.quick else options.pairs
    make_data.FOLDER.mkdir(parents=True, exist_ok=True)
    with open(make_data.FOLDER / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one benchmark at a time on this disk
        about = machine()
        print(", ".join(f"{key} {value}" for key, value in about.items()))
        print(f"{pairs} pairs of fresh processes; medians in ms; ratio stock/ours, 95 % interval\n")
        print(f"{'':34} {'':13} {'stock':>9} {'ours':>9} {'ratio':>7}")
        rows = []
        for case in CASES:
            if options.case and not any(word in case.name for word in options.case):
                continue
            rows.append(measure(case, pairs))
            show(case, rows[-1])
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"load-{time.strftime('%Y%m%d-%H%M%S')}.json"
    target.write_text(json.dumps({"machine": about, "pairs": pairs, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
