# SPDX-License-Identifier: Apache-2.0
"""from_pretrained of unmodified libraries, stock against patched: seconds inside it, and to the
first full read of the parameters.

    bench_consumers.py [--pairs N] [--quick] [--case WORD ...]

Models have random weights (transformers, diffusers: about 1 GB) or are real (MiniLM, 90 MB).
Results go to benchmarks/results/consumers.json.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_data
import runner
import system

CHILD = Path(__file__).with_name("consumer_child.py")


@dataclass(frozen=True)
class Consumer:
    """A library and the model it loads."""

    library: str
    model: str  # of make_data.MODELS
    text: str
    cache: str

    @property
    def name(self) -> str:
        """What is printed and asked for by --case."""
        return f"consumers: {self.cache} {self.library}, {self.text}"


CONSUMERS = tuple(
    Consumer(library, model, text, cache)
    for cache in ("warm", "cold")
    for library, model, text in (
        ("transformers", "llama", "Llama of 1 GB"),
        ("transformers", "llama-sharded", "the same in 4 shards"),
        ("diffusers", "unet", "UNet of 1 GB"),
        ("sentence-transformers", "minilm", "MiniLM of 90 MB"),
    )
)


def make_model(name: str) -> Path:
    """The folder of a model, made in a process of its own: memory stays as it was here."""
    code = f"import make_data; make_data.model_folder({name!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CHILD.parent
    )
    if done.returncode != 0:
        raise runner.Failed(runner.last_line(done.stderr))
    return make_data.model_folder(name)


def measure(consumer: Consumer, pairs: int) -> dict[str, Any]:
    """All rounds of one consumer; who begins alternates."""
    started = time.monotonic()
    row: dict[str, Any] = {
        "case": consumer.name,
        "group": "consumers",
        "cache": consumer.cache,
        "data": consumer.model,
        "read_ahead_kb": system.read_ahead_kb(make_data.FOLDER),
        "skipped": None,
        "sides": {},
    }
    runs: dict[str, list[runner.Run]] = {"stock": [], "ours": []}
    errors: dict[str, str] = {}
    folder = None
    try:
        folder = make_model(consumer.model)
    except runner.Failed as error:
        row["skipped"] = str(error)
    for number in range(pairs if folder else 0):
        for label in ("stock", "ours") if number % 2 == 0 else ("ours", "stock"):
            if label in errors:
                continue
            command = [sys.executable, str(CHILD), consumer.library, label, consumer.cache]
            try:
                runs[label].append(runner.run_process([*command, str(folder)]))
            except runner.Failed as error:
                errors[label] = str(error)
    digests = {
        hashlib.sha256(run["digest"].encode()).digest() for each in runs.values() for run in each
    }
    if len(digests) > 1:
        errors["ours"] = "loaded other weights than stock"
    for label, pair in (("stock", None), ("ours", "stock")):
        row["sides"][label] = runner.summarize(runs, label, pair, errors.get(label), None)
    row["seconds"] = round(time.monotonic() - started, 1)
    return row


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, help="rounds of each case; 9, or 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="3 rounds of fewer models")
    parser.add_argument("--case", nargs="*", help="only cases with one of these in their name")
    options = parser.parse_args()
    chosen = [each for each in CONSUMERS if runner.is_asked_for(each.name, options.case)]
    if options.quick:
        chosen = [each for each in chosen if each.model in ("llama", "minilm")]
    pairs = options.pairs or (3 if options.quick else 9)
    system.end_on_signals()
    with runner.one_at_a_time():
        about = {**system.machine(make_data.FOLDER), "factor": make_data.FACTOR}
        print(runner.heading(about, pairs))
        print(runner.COLUMNS)
        rows = []
        for consumer in chosen:
            rows.append(measure(consumer, pairs))
            runner.show(rows[-1])
            runner.write_results("consumers", about, pairs, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
