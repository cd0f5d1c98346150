# SPDX-License-Identifier: Apache-2.0
"""Extraction against cp: `bench_extract.py [--pairs N]`.

A quarter of 4 GiB, every fourth tensor, is extracted; cp and fsync copy the same bytes, which lie
in one file. Both from a cold cache, each figure a fresh process's, in turn. Bounds: 0.9 of cp's
speed, 64 MiB of private memory above the level after import, 1.05 device bytes for each that is
kept. The last row is cp against itself.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import make_data
import system
from runner import MIB, bootstrap, one_at_a_time

WAYS = ("cp", "cp again", "extract", "extract, checked")


def is_kept(name: str) -> bool:
    """Every fourth tensor, by the last number of its name."""
    return int(re.findall(r"[0-9]+", name)[-1]) % 4 == 0


class Peak(threading.Thread):
    """The largest private memory of this process, until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first_bytes = self.bytes = system.private_bytes()
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, system.private_bytes())

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.bytes - self.first_bytes


def measure(way: str, source: str, part: str, target: str) -> None:
    """In a process of its own: prints seconds, device bytes and private bytes."""
    import stx_patch

    extract = stx_patch.extract
    peak = Peak()
    peak.start()
    before_bytes, start = system.device_bytes(), time.perf_counter()
    if way.startswith("cp"):
        subprocess.run(["cp", part, target], check=True)
        descriptor = os.open(target, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    else:
        extract(source, target, tensor_filter=is_kept, check=way == "extract, checked")
    seconds = time.perf_counter() - start
    print(seconds, system.device_bytes() - before_bytes, peak.stop())


def run(way: str, source: Path, part: Path, folder: Path) -> tuple[float, int, int]:
    target = folder / "target.safetensors"
    target.unlink(missing_ok=True)
    os.sync()
    for path in (source, part):
        system.drop_cache(path)
    command = [sys.executable, __file__, "--one", way, str(source), str(part), str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    target.unlink()
    seconds, device_bytes, private_bytes = done.stdout.split()
    return float(seconds), int(device_bytes), int(private_bytes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(*arguments.one)
        return 0
    import stx_patch

    source = make_data.data_files("large")[0]
    with one_at_a_time(), tempfile.TemporaryDirectory(dir=make_data.FOLDER) as folder:
        part = Path(folder) / "part.safetensors"
        kept_bytes = stx_patch.extract(source, part, tensor_filter=is_kept).size_bytes
        figures: dict[str, list[tuple[float, int, int]]] = {way: [] for way in WAYS}
        draw = random.Random(0)
        for _ in range(arguments.pairs):
            # In an order of its own each time: who writes first is slower on some disks.
            for way in draw.sample(WAYS, len(WAYS)):
                figures[way].append(run(way, source, part, Path(folder)))
    print(f"{kept_bytes / MIB:,.0f} MiB of {source.stat().st_size / MIB:,.0f}")
    base = [seconds for seconds, _, _ in figures["cp"]]
    for way in WAYS:
        seconds = [found[0] for found in figures[way]]
        ratios = [first / second for first, second in zip(base, seconds, strict=True)]
        low, high = bootstrap(ratios)
        device = max(found[1] for found in figures[way]) / kept_bytes
        private = max(found[2] for found in figures[way]) / MIB
        print(
            f"{way:18} {statistics.median(seconds):6.2f} s"
            f"  {statistics.median(ratios):.2f}x cp [{low:.2f}, {high:.2f}]"
            f"  device {device:.3f}x kept  private {private:+.1f} MiB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
