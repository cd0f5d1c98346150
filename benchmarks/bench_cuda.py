# SPDX-License-Identifier: Apache-2.0
"""Loads to a CUDA device: stock, ours, others and the limits; cold and warm; memory; goals.

    bench_cuda.py [--quick] [--rounds N] [--size 8GiB] [--budget-s 500] [--resume] [--case WORD ...]
    bench_cuda.py --make-data | --show FILE | --list

Every sample is a process of its own; all sides of a case run once in each round, in an order that
turns around. Results are written after each round, and the tables printed however it ends: after
the rounds, after the budget (a round that was begun is finished), or by a signal. --resume adds
rounds to the results that are there. Exit status: 0 all goals reached, 1 not, 2 nothing to measure.
How a number is made is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cuda_child
import cuda_table
import make_data
import processes
import runner
import system

ROOT = runner.FOLDER.parent
CHILD = runner.FOLDER / "cuda_child.py"
SAMPLE_TIMEOUT_S = 90
MAKE_TIMEOUT_S = 400
GRACE_S = 45  # after the budget, to finish a round
TRIES = 2  # of a side in a case, while it gives nothing
LARGE_COUNT = 32
LIMIT_THREADS = (4, 16)
SPARE_BYTES = 2 << 30 if make_data.FACTOR >= 1 else 64 << 20  # of disk, the model among it
# Of what was found out about a machine: in which of it results that are added to each other agree.
SAME = ("device", "cuda", "driver", "cpu", "cores", "torch", "safetensors", "stx_patch", "size")


class CannotMeasure(Exception):
    """Nothing can be measured here; says why, in a line."""


@dataclasses.dataclass(frozen=True)
class Side:
    """A loader of cuda_loaders.py, or a limit. `pair`: the side it is compared with."""

    label: str
    loader: str
    pair: str | None = None
    threads: int = 0  # of a limit of reading


@dataclasses.dataclass(frozen=True)
class Case:
    """A load by several sides. `kind`: of cuda_table.GOALS."""

    name: str
    kind: str
    data: str  # large, small, model
    cache: str
    sides: tuple[Side, ...]
    dtype: str | None = None


STOCK = Side("stock", "stock")
LOADS = (
    STOCK,
    Side("stock again", "stock", "stock"),
    Side("ours", "ours", "stock"),
    Side("ours, patched load_file", "ours patched", "stock"),
    Side("ours, tensors()", "ours tensors()", "stock"),
    *(Side(name, name, "stock") for name in cuda_table.RIVALS),
)
CONVERSIONS = (Side("stock, then .to()", "stock"), Side("ours", "ours", "stock, then .to()"))
PRETRAINED = (STOCK, Side("ours", "ours", "stock"))


def limits(cache: str) -> tuple[Side, ...]:
    """What no loader can beat: the copy, and reading past the page cache or from it."""
    what = "direct reads" if cache == "cold" else "cached reads"
    reads = [
        Side(f"{cuda_table.READS}{what}, {count} threads", "reads", threads=count)
        for count in LIMIT_THREADS
    ]
    return (Side(cuda_table.COPY, "copy"), *reads)


def all_cases(large: make_data.Set) -> list[Case]:
    """In the order of a round: what needs the files out of the page cache first."""
    small = make_data.SETS["small"]
    loads = [
        Case(f"{cache} {kind.text}", "load", data, cache, LOADS + limits(cache))
        for cache in ("cold", "warm")
        for data, kind in (("large", large), ("small", small))
    ]
    text = f"{large.text} float32 to bfloat16"
    conversions = [
        Case(f"convert: {cache} {text}", "convert", "large", cache, CONVERSIONS, "bfloat16")
        for cache in ("warm", "cold")
    ]
    model = Case("from_pretrained: warm Llama of 1 GB", "pretrained", "model", "warm", PRETRAINED)
    return [*loads, model, *conversions]


def large_set(size_bytes: int) -> make_data.Set:
    """Few large tensors of about that size."""
    elements = max(64, int(size_bytes * min(make_data.FACTOR, 1)) // LARGE_COUNT // 4)
    tensor_bytes = elements * 4
    mebibytes = f"{tensor_bytes / runner.MIB:.6g}"
    return make_data.Set(f"{LARGE_COUNT} x {mebibytes} MiB", LARGE_COUNT, elements, "float32")


class Session:
    """One benchmark on one device: what is known, and what was measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = "cpu" if options.dry_run else options.device
        self.sets = {"large": large_set(options.size), "small": make_data.SETS["small"]}
        self.cases = [
            case
            for case in all_cases(self.sets["large"])
            if runner.is_asked_for(case.name, options.case)
        ]
        self.begun = time.monotonic()
        self.spawns = options.spawn
        self.gone: dict[str, str] = {}  # label of a side that hung -> how
        self.paths: dict[str, str] = {}
        self.about: dict[str, Any] = {}
        self.memory = processes.DeviceMemory()
        self.results: dict[str, dict[str, Any]] = {
            case.name: {
                "name": case.name,
                "kind": case.kind,
                "pairs": {side.label: side.pair for side in case.sides},
                "runs": {side.label: {} for side in case.sides},
                "errors": {},
                "failures": {},
                "rounds": 0,
                "seconds": 0.0,
                "last_s": 0.0,
            }
            for case in self.cases
        }

    # --- one process ---

    def run(self, specification: dict[str, Any], timeout_s: float = SAMPLE_TIMEOUT_S) -> runner.Run:
        """What a process of cuda_child.py answers."""
        specification = {"device": self.device, **specification}
        if self.spawns:
            child = processes.start([sys.executable, str(CHILD), json.dumps(specification)])
        else:
            child = processes.fork(cuda_child.run, specification)
        return processes.watch(child, timeout_s, self.memory.free_bytes)

    def elapsed_s(self) -> float:
        """Since this program began."""
        return time.monotonic() - self.begun

    def time_left_s(self) -> float:
        """Until the last sample has to be done."""
        return self.options.budget_s + GRACE_S - self.elapsed_s()

    # --- before ---

    def probe(self) -> None:
        """Find the device. CannotMeasure where there is none, or ours does not serve it."""
        try:
            found = self.run({"do": "probe"})
        except runner.Failed as error:
            found = {"missing": f"{self.device}: {error}"}
        if found["missing"] and not self.spawns and found.get("cuda", "unknown"):
            self.spawns = True  # a driver that cannot be used after a fork
            with contextlib.suppress(runner.Failed):
                found = self.run({"do": "probe"})
        if found["missing"]:
            raise CannotMeasure(found["missing"])
        self.memory.find(found.get("uuid"))
        free_bytes = found.get("free_bytes")
        large = self.sets["large"]
        needed_bytes = large.count * large.tensor_bytes * 3 // 2
        if free_bytes is not None and free_bytes < needed_bytes:
            raise CannotMeasure(
                f"{free_bytes / 1e9:.1f} GB of the device are free, "
                f"{needed_bytes / 1e9:.1f} GB are needed: try a smaller --size"
            )
        self.about = {
            "device": found["device"],
            "cuda": found["cuda"],
            "driver": self.memory.driver(),
            **machine(),
            "processes": "started anew" if self.spawns else "forked",
            "transformers": system.version_of("transformers"),
            "factor": make_data.FACTOR,
            "size": self.options.size,
        }

    def make(self) -> None:
        """The files, where they are not there yet. CannotMeasure where there is no room."""
        make_data.FOLDER.mkdir(parents=True, exist_ok=True)
        needed = {case.data for case in self.cases}
        sets = {name: kind for name, kind in self.sets.items() if name in needed}
        missing = [
            kind.count * kind.tensor_bytes
            for name, kind in sets.items()
            if not (make_data.FOLDER / f"{cuda_child.label_of(name, kind)}.safetensors").exists()
        ]
        needed_bytes = int(sum(missing) * 1.1) + SPARE_BYTES
        free_bytes = shutil.disk_usage(make_data.FOLDER).free
        if free_bytes < needed_bytes:
            raise CannotMeasure(
                f"{make_data.FOLDER} has {free_bytes / 1e9:.1f} GB free, {needed_bytes / 1e9:.1f} "
                "GB are needed: set STX_BENCH_DATA to another folder, or try a smaller --size"
            )
        work = {
            "do": "make",
            "sets": {name: dataclasses.asdict(kind) for name, kind in sets.items()},
            "model": "model" in needed,
        }
        try:
            self.paths = self.run(work, MAKE_TIMEOUT_S)
        except runner.Failed as error:
            raise CannotMeasure(f"the files could not be made: {error}") from None

    # --- rounds ---

    def measure(self) -> None:
        """Rounds, until they or the budget are done."""
        say(f"files are there after {self.elapsed_s():.0f} s")
        for _ in range(self.options.rounds):
            for case in self.cases:
                if self.results[case.name]["rounds"] < self.options.rounds and self.fits(case):
                    self.measure_round(case)
                    self.write()

    def fits(self, case: Case) -> bool:
        """Whether a round of a case ends within the budget, if it takes as long as its last one."""
        last_s: float = self.results[case.name]["last_s"]
        return self.elapsed_s() + last_s < self.options.budget_s

    def measure_round(self, case: Case) -> None:
        """Each side once."""
        started = time.monotonic()
        result = self.results[case.name]
        number = result["rounds"]
        for side in case.sides if number % 2 == 0 else reversed(case.sides):
            if self.time_left_s() > 0:
                self.attempt(case, side, number)
        result["rounds"] += 1
        result["last_s"] = time.monotonic() - started
        result["seconds"] += result["last_s"]
        say(f"round {number + 1} of {case.name}: {result['last_s']:.0f} s")

    def attempt(self, case: Case, side: Side, number: int) -> None:
        """One sample. A side that hung is left out from then on; one that failed is tried again,
        unless it never gave anything."""
        label, result = side.label, self.results[case.name]
        runs, errors, failures = result["runs"][label], result["errors"], result["failures"]
        if label in self.gone:
            errors[label] = self.gone[label]
            return
        if not runs and failures.get(label, 0) >= TRIES:
            return
        try:
            runs[number] = self.sample(case, side, is_first=not runs)
            return
        except processes.TimedOut as error:
            errors[label] = self.gone[label] = str(error)
        except (runner.Failed, OSError) as error:
            errors[label] = str(error)
        failures[label] = failures.get(label, 0) + 1
        say(f"{label}: {errors[label]}")

    def sample(self, case: Case, side: Side, is_first: bool) -> runner.Run:
        """What one process measures. The first of a side checks what it loaded, too."""
        timeout_s = max(10.0, min(SAMPLE_TIMEOUT_S, self.time_left_s()))
        path = Path(self.paths[case.data])
        if side.loader == "reads":
            return self.read(path, case.cache, side.threads, timeout_s)
        files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
        kept_bytes = sum(file.stat().st_size for file in files)
        if case.kind != "pretrained":
            kind = self.sets[case.data]
            kept_bytes = kind.count * kind.tensor_bytes
        copies = side.loader == "copy"
        specification = {
            "do": "copy" if copies else "pretrained" if case.kind == "pretrained" else "load",
            "loader": side.loader,
            "path": str(path),
            "warm_up": self.paths["warm_up"],
            "cache": case.cache,
            "dtype": case.dtype,
            "kept_bytes": kept_bytes,
            "check": is_first,
            "next_safetensors": self.options.next_safetensors,
        }
        return self.run(specification, timeout_s)

    def read(self, path: Path, cache: str, threads: int, timeout_s: float) -> runner.Run:
        """The whole file into touched memory, by threads that do nothing else."""
        is_proven = self.run({"do": "cache", "path": str(path), "cache": cache})["cache_proven"]
        how = ["cached"] if cache == "warm" else []
        program = str(runner.build_ceiling())
        command = [program, *how, str(threads), str(4 * runner.MIB), str(path)]
        measured = processes.watch(processes.start(command), timeout_s)
        return {**measured, "read_s": measured["return_s"], "cache_proven": is_proven}

    # --- after ---

    def rows(self) -> list[cuda_table.Row]:
        """What was measured so far."""
        return [cuda_table.summarize(case) for case in self.results.values()]

    def write(self, rows: Sequence[cuda_table.Row] = ()) -> None:
        """The results, whole or as they were: every run, and at the end what they come to."""
        target = Path(self.options.output)
        target.parent.mkdir(parents=True, exist_ok=True)
        kept = {
            "kind": "cuda",
            "machine": self.about,
            "rows": rows,
            "goals": {row["case"]: cuda_table.judge(row) for row in rows},
            "gone": self.gone,
            "cases": list(self.results.values()),
        }
        partial = target.with_name(target.name + ".partial")
        partial.write_text(json.dumps(kept, indent=1))
        partial.rename(target)

    def resume(self) -> None:
        """Take up the results that are there. CannotMeasure if they are of something else."""
        target = Path(self.options.output)
        if not target.exists():
            return
        before = read_results(target)
        differs = [key for key in SAME if before["machine"].get(key) != self.about.get(key)]
        if differs:
            raise CannotMeasure(f"{target} was measured with another {', '.join(differs)}")
        self.gone |= before["gone"]
        for case in before["cases"]:  # who never gave anything may have been installed since
            failures = {label: n for label, n in case["failures"].items() if case["runs"][label]}
            self.results[case["name"]] = {**case, "failures": failures}


def read_results(path: Path) -> dict[str, Any]:
    """What write() wrote; rounds are numbers again. CannotMeasure for anything else."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        for case in found["cases"]:
            for label, runs in case["runs"].items():
                case["runs"][label] = {int(number): run for number, run in runs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CannotMeasure(f"{path} has no results: {error}") from None
    return found


def machine() -> dict[str, Any]:
    """What system.machine() tells, and nothing where it cannot."""
    try:
        return system.machine(make_data.FOLDER)
    except (OSError, ValueError, IndexError) as error:
        return {"machine": f"unknown: {error}", "date": time.strftime("%Y-%m-%d")}


def say(text: str) -> None:
    """A line, at once."""
    print(text, flush=True)


def show_all(about: dict[str, Any], rows: list[cuda_table.Row]) -> int:
    """The tables; the number of goals that were not reached."""
    say("")
    say(", ".join(f"{key} {value}" for key, value in about.items()))
    say(cuda_table.versions_of(rows))
    say(cuda_table.LEGEND + "\n")
    say(cuda_table.COLUMNS)
    for row in rows:
        cuda_table.show(row, say)
    verdicts = [goal["verdict"] for row in rows for goal in cuda_table.judge(row)]
    counts = ", ".join(f"{each}: {verdicts.count(each)}" for each in sorted({*verdicts}))
    say(f"{len(verdicts)} goals; {counts}")
    return sum(not each.startswith("PASS") for each in verdicts)


def size_of(text: str) -> int:
    """Bytes: 8GiB, 512MiB or a number."""
    found = re.fullmatch(r"([0-9]+)(KiB|MiB|GiB|)", text)
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 8GiB")
    return int(found[1]) << {"": 0, "KiB": 10, "MiB": 20, "GiB": 30}[found[2]]


def next_safetensors() -> str | None:
    """Where the set-up of the tests puts the safetensors that comes next."""
    found = sorted((ROOT / ".upstream").glob("site-*"))
    return str(found[-1]) if found else None


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, help="of each case; 9, or 3 with --quick")
    add("--size", type=size_of, help="of the few large tensors; 8GiB, or 2GiB with --quick")
    add("--quick", action="store_true", help="3 rounds, 2 GiB")
    add("--budget-s", type=float, default=500, help="no round is begun after it; 500")
    add("--case", nargs="*", help="only cases with one of these in their name")
    add("--resume", action="store_true", help="add rounds to the results that are there")
    add("--output", default=str(runner.RESULTS / "cuda.json"), help="where results are kept")
    add("--device", default="cuda:0")
    add("--next-safetensors", default=next_safetensors(), help="folder with a newer safetensors")
    add("--spawn", action="store_true", help="start Python anew for each sample: slower")
    add("--make-data", action="store_true", help="make the files and end")
    add("--show", type=Path, metavar="FILE", help="print the tables of results and end")
    add("--list", action="store_true", help="print the names of the cases and end")
    add("--dry-run", action="store_true", help=argparse.SUPPRESS)  # all of it, tiny, on the CPU
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else 9)
    options.size = options.size or (2 << 30 if options.quick else 8 << 30)
    options.device = "cuda:0" if options.device == "cuda" else options.device
    if not re.fullmatch(r"cuda:[0-9]+", options.device):
        parser.error(f"--device: {options.device} is no CUDA device such as cuda:0")
    folder = options.next_safetensors
    if folder is not None:
        options.next_safetensors = str(Path(folder).resolve())
        if not Path(folder).is_dir():
            parser.error(f"--next-safetensors: no folder {folder}")
    return options


def run(session: Session) -> int:
    """Measure and print; 1 where a goal was not reached."""
    options = session.options
    session.probe()
    session.make()
    if options.make_data:
        say(f"{make_data.FOLDER} has the files after {session.elapsed_s():.0f} s")
        return 0
    if options.resume:
        session.resume()
    missed = 0
    try:
        session.measure()
    finally:  # also of what was measured before a signal
        rows = session.rows()
        session.write(rows)
        missed = show_all(session.about, rows)
    return 1 if missed and not options.dry_run else 0


def main() -> int:
    """What the command line asks for."""
    options = parse()
    if options.dry_run and make_data.FACTOR == 1:
        tiny = {"STX_BENCH_FACTOR": "0.001", "STX_BENCH_DATA": str(make_data.FOLDER / "dry-run")}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **tiny})
    system.end_on_signals()
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        session = Session(options)
        if options.list:
            print(*(case.name for case in session.cases), sep="\n")
            return 0
        if options.show:
            results = read_results(options.show)
            rows = [cuda_table.summarize(case) for case in results["cases"]]
            return 1 if show_all(results["machine"], rows) else 0
        if not session.cases:
            raise CannotMeasure("no case has one of these words in its name: see --list")
        try:
            import torch  # noqa: F401  # once, for all that are forked
        except ImportError as error:
            raise CannotMeasure(str(error)) from None
        with contextlib.nullcontext() if options.dry_run else runner.one_at_a_time():
            return run(session)
    except CannotMeasure as error:
        print(f"bench_cuda: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
