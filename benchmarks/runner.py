# SPDX-License-Identifier: Apache-2.0
"""Cases and sides: interleaved fresh processes, medians, ratios with intervals, bounds, tables.

Used by bench_load.py and bench_engines.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import random
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_data
import system

FOLDER = Path(__file__).resolve().parent
CHILD = FOLDER / "bench_child.py"
# Results of a try-out with small data do not mix with others.
RESULTS = (FOLDER if make_data.FACTOR == 1 else make_data.FOLDER) / "results"
TIMEOUT_S = 600
SAMPLE_S = 0.005
MIB = 1 << 20

Run = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """One loader with options. `pair` is the label of the side it is compared with."""

    label: str
    loader: str
    pair: str | None = None
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Bound:
    """What has to hold for one side.

    `what`: "read", "return" (times faster than its pair, at least), "ceiling" (part of it, at
    least), "device" (times the kept bytes, at most), "private" (bytes of growth, at most).
    """

    side: str
    what: str
    value: float


@dataclass(frozen=True)
class Case:
    """One load by several sides. `read_ahead` in KiB, None is the machine's own."""

    data: str
    part: str  # whole, quarter
    cache: str  # cold, warm
    consumer: str  # sum, copy
    sides: tuple[Side, ...]
    bounds: tuple[Bound, ...] = ()
    read_ahead: int | None = None
    ceiling: bool = False
    group: str = "load"
    accept: bool = False  # belongs to what has to be reached
    note: str = ""

    @property
    def name(self) -> str:
        """What is printed and asked for by --case."""
        part = "" if self.part == "whole" else ", every 4th"
        ahead = "" if self.cache == "warm" else f", read-ahead {self.read_ahead or 'own'}"
        return (
            f"{self.group}: {self.cache} {make_data.SETS[self.data].text}{part}, "
            f"{self.consumer}{ahead}{self.note}"
        )


class Failed(Exception):
    """A side that gives no number; says why, in a line."""


# --- one run ---


def last_line(text: str) -> str:
    """What an error says at its end."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no message"


def run_process(command: list[str]) -> Run:
    """One measurement in a fresh process."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise Failed(f"took more than {TIMEOUT_S} s") from None
    if done.returncode != 0:
        raise Failed(_reason(done.returncode, done.stderr))
    measured: Run = json.loads(done.stdout.splitlines()[-1])
    return measured


def _reason(returned: int, stderr: str) -> str:
    return last_line(stderr) if returned > 0 else f"killed by signal {-returned}"


def run_child(case: Case, side: Side, do: str) -> Run:
    """One measurement of one side."""
    specification = {
        "loader": side.loader,
        "options": dict(side.options),
        "data": case.data,
        "part": case.part,
        "cache": case.cache,
        "consumer": case.consumer,
        "do": do,
    }
    command = [sys.executable, str(CHILD), json.dumps(specification)]
    return run_memory(command) if do == "memory" else run_process(command)


def run_memory(command: list[str]) -> Run:
    """One load, while its anonymous memory is looked at from here, every 5 ms."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child,
    ):
        assert child.stdin is not None and child.stdout is not None
        peak = 0
        try:
            if child.stdout.readline().strip() == "ready":
                child.stdin.write("go\n")
                child.stdin.flush()
            deadline = time.monotonic() + TIMEOUT_S
            while not select.select([child.stdout], [], [], SAMPLE_S)[0]:
                with contextlib.suppress(RuntimeError, OSError):
                    peak = max(peak, system.private_bytes(child.pid))
                if time.monotonic() > deadline:
                    raise Failed(f"took more than {TIMEOUT_S} s")
            text = child.stdout.read()
            if child.wait() != 0:
                errors.seek(0)
                raise Failed(_reason(child.returncode, errors.read()))
        finally:
            if child.poll() is None:
                child.kill()
    measured: Run = json.loads(text.splitlines()[-1])
    measured["private_bytes"] = max(0, peak - measured["private_before"])
    return measured


# --- the ceiling ---


def build_ceiling() -> Path:
    """ceiling.c, compiled once."""
    source, program = FOLDER / "ceiling.c", make_data.FOLDER / "ceiling"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        command = ["cc", "-O2", "-pthread", "-o", str(program), str(source)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise Failed(f"cc: {error.strerror}") from None
        if done.returncode != 0:
            raise Failed(last_line(done.stderr))
    return program


def run_ceiling(data: str) -> Run:
    """Direct reads of a whole set, 4 threads x 4 MiB."""
    program, paths = build_ceiling(), make_data.data_files(data)
    for path in paths:
        system.drop_cache(path)
    measured = run_process([str(program), "4", str(4 * MIB), *map(str, paths)])
    return {**measured, "read_s": measured["return_s"], "memory_s": measured["return_s"]}


# --- one case ---


def bootstrap(ratios: list[float]) -> tuple[float, float]:
    """The 95 % interval of the median, by resampling."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[1949]


def measure(case: Case, pairs: int, with_memory: bool) -> dict[str, Any]:
    """All rounds of one case: every side once in each, in an order that turns around."""
    started = time.monotonic()
    row: dict[str, Any] = {"case": case.name, "skipped": None, "sides": {}}
    row |= {"data": case.data, "part": case.part, "cache": case.cache, "consumer": case.consumer}
    row |= {"group": case.group, "read_ahead_kb": None}
    try:
        with system.read_ahead(make_data.FOLDER, case.read_ahead):
            row["read_ahead_kb"] = system.read_ahead_kb(make_data.FOLDER)
            _measure(case, pairs, with_memory, row)
    except system.CannotSet as error:
        row["skipped"] = str(error)
    row["seconds"] = round(time.monotonic() - started, 1)
    return row


def _measure(case: Case, pairs: int, with_memory: bool, row: dict[str, Any]) -> None:
    runs: dict[str, list[Run]] = {side.label: [] for side in case.sides}
    errors: dict[str, str] = {}
    memory: dict[str, Run] = {}
    make_data.data_files(case.data)

    def attempt(label: str, work: Any) -> Any:
        if label in errors:
            return None
        try:
            return work()
        except Failed as error:
            errors[label] = str(error)
            return None

    for side in case.sides:
        if side.loader in loaders_to_prepare():
            attempt(side.label, lambda side=side: run_child(case, side, "prepare"))
    if with_memory:
        for side in case.sides:
            measured = attempt(side.label, lambda side=side: run_child(case, side, "memory"))
            if measured is not None:
                memory[side.label] = measured
        _compare_digests(memory, errors)
    if case.ceiling:
        runs["ceiling"] = []
    for number in range(pairs):
        labels = [*case.sides, None] if case.ceiling else list(case.sides)
        for each in labels if number % 2 == 0 else reversed(labels):
            label = each.label if each else "ceiling"
            measured = attempt(
                label,
                lambda each=each: run_child(case, each, "time") if each else run_ceiling(case.data),
            )
            if measured is not None:
                runs[label].append(measured)
    for side in case.sides:
        private = memory.get(side.label, {}).get("private_bytes")
        row["sides"][side.label] = summarize(
            runs, side.label, side.pair, errors.get(side.label), private
        )
    if case.ceiling:
        row["sides"]["ceiling"] = summarize(runs, "ceiling", None, errors.get("ceiling"), None)
    row["bounds"] = [_judge(bound, row["sides"]) for bound in case.bounds]


def loaders_to_prepare() -> frozenset[str]:
    """Those that read a format of their own."""
    return frozenset({"torch.load(mmap)", "flashpack"})


def _compare_digests(memory: dict[str, Run], errors: dict[str, str]) -> None:
    """Everybody has to have loaded the same bits; the first side is right."""
    digests = {label: run["digest"] for label, run in memory.items()}
    right = next(iter(digests.values()), None)
    for label, digest in digests.items():
        if digest != right:
            errors[label] = "loaded other bits than the first side"


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _spread(values: list[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return [min(known), max(known)] if known else None


def _ratio(over: list[Run], under: list[Run], key: str) -> dict[str, Any] | None:
    """Of the runs of one round each, `over` by `under`."""
    values = [
        a[key] / b[key]
        for a, b in zip(over, under, strict=False)
        if a.get(key) is not None and b.get(key) is not None
    ]
    if not values:
        return None
    return {"median": statistics.median(values), "interval": bootstrap(values)}


def summarize(
    runs: dict[str, list[Run]], label: str, pair: str | None, error: str | None, private: int | None
) -> dict[str, Any]:
    mine = runs[label]
    """Medians and ratios of the runs of one side."""
    summary: dict[str, Any] = {"error": error, "private_bytes": private, "pair": pair}
    if error or not mine:
        return summary
    kept = mine[-1]["kept_bytes"]
    void = [run for run in mine if run.get("device_void")]
    summary |= {
        "version": mine[-1].get("version"),
        "runs": len(mine),
        "kept_bytes": kept,
        "return_s": _median([run["return_s"] for run in mine]),
        "read_s": _median([run["read_s"] for run in mine]),
        "read_s_spread": _spread([run["read_s"] for run in mine]),
        "device_bytes": _median(
            [run.get("device_bytes") for run in mine if not run.get("device_void")]
        ),
        "device_void": f"{len(void)} of {len(mine)}: {void[-1]['device_void']}" if void else None,
        "ratio_return": None,
        "ratio_read": None,
        "of_ceiling": None,
    }
    other = runs.get(pair or "", [])
    summary["ratio_return"] = _ratio(other, mine, "return_s")
    summary["ratio_read"] = _ratio(other, mine, "read_s")
    if label != "ceiling":
        summary["of_ceiling"] = _ratio(runs.get("ceiling", []), mine, "memory_s")
    return summary


def _judge(bound: Bound, sides: dict[str, Any]) -> dict[str, Any]:
    """Whether a bound holds: ratios by the upper end of their interval; "?" where unknown."""
    side = sides[bound.side]
    judged: dict[str, Any] = {"side": bound.side, "what": bound.what, "bound": bound.value}
    value: float | None = None
    reached: float | None = None
    if bound.what in ("read", "return", "ceiling"):
        ratio = side.get("of_ceiling" if bound.what == "ceiling" else f"ratio_{bound.what}")
        if ratio is not None:
            value, reached = ratio["median"], ratio["interval"][1]
        holds = None if reached is None else reached >= bound.value
    else:
        if bound.what == "device" and side.get("device_bytes") is not None:
            value = side["device_bytes"] / side["kept_bytes"]
        if bound.what == "private":
            value = side["private_bytes"]
        holds = None if value is None else value <= bound.value
    missed = "OVER" if bound.what in ("device", "private") else "BELOW"
    return {**judged, "value": value, "verdict": {None: "?", True: "ok", False: missed}[holds]}


# --- showing ---


def heading(about: dict[str, Any], pairs: int) -> str:
    """What a table was made on, and how."""
    text = ", ".join(f"{key} {value}" for key, value in about.items())
    return (
        f"{text}\n{pairs} rounds of fresh processes; medians; ratios are pair/this of the same "
        "round, median [95 % interval]; an upper end that reaches a bound is ok\n"
    )


COLUMNS = (
    f"  {'':26} {'return ms':>10} {'read ms':>9} {'GB/s':>6}  {'return x':>18}  {'read x':>18}  "
    f"{'of ceiling':>18} {'disk/kept':>9} {'priv. MB':>8}"
)


def show_ratio(ratio: dict[str, Any] | None) -> str:
    """A ratio with its interval."""
    if ratio is None:
        return ""
    low, high = ratio["interval"]
    digits = 0 if ratio["median"] >= 100 else 2
    return f"{ratio['median']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _number(value: float | None, text: str) -> str:
    return "" if value is None else format(value, text)


def show(row: dict[str, Any]) -> None:
    """One case: a line for each side, one for each bound."""
    print(f"{row['case']}  ({row['read_ahead_kb']} KiB, {row['seconds']:.0f} s)")
    if row["skipped"]:
        print(f"  skipped: {row['skipped']}")
    for label, side in row["sides"].items():
        if side["error"]:
            print(f"  {label:26} failed: {side['error']}")
            continue
        if "read_s" not in side:
            continue
        back = None if side["return_s"] is None else side["return_s"] * 1e3
        speed = side["kept_bytes"] / side["read_s"] / 1e9
        disk = "void" if side["device_void"] and row["cache"] == "cold" else ""
        if side["device_bytes"] is not None and row["cache"] == "cold":
            disk = f"{side['device_bytes'] / side['kept_bytes']:.2f}"
        private = None if side["private_bytes"] is None else side["private_bytes"] / 1e6
        print(
            f"  {label:26} {_number(back, '.2f'):>10} {side['read_s'] * 1e3:9.1f} {speed:6.2f}  "
            f"{show_ratio(side['ratio_return']):>18}  {show_ratio(side['ratio_read']):>18}  "
            f"{show_ratio(side['of_ceiling']):>18} {disk:>9} {_number(private, '.0f'):>8}"
        )
    for judged in row.get("bounds", []):
        print(f"  {show_bound(judged)}")
    print(flush=True)


def show_bound(judged: dict[str, Any]) -> str:
    """A bound and whether it was reached."""
    value, bound, unit = judged["value"], judged["bound"], "x"
    if judged["what"] == "private":
        bound, unit, value = bound / MIB, " MiB", None if value is None else value / MIB
    sign = "<=" if judged["what"] in ("device", "private") else ">="
    digits = 3 if judged["what"] == "device" else 2
    shown = "nothing measured" if value is None else f"{value:.{digits}f}{unit}"
    return (
        f"{judged['verdict']:6} {judged['side']}, {judged['what']} {sign} {bound:g}{unit}: {shown}"
    )


# --- a suite ---


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """One benchmark at a time on a data folder; waits for its turn."""
    make_data.FOLDER.mkdir(parents=True, exist_ok=True)
    with open(make_data.FOLDER / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("another benchmark uses this folder: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_results(kind: str, about: dict[str, Any], pairs: int, rows: list[dict[str, Any]]) -> None:
    """The newest results of a kind. Rows of other cases stay if they are of the same machine."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / f"{kind}.json"
    for row in rows:
        row |= {"pairs": pairs, "date": about["date"]}
    here = {key: value for key, value in about.items() if key != "date"}
    known: dict[str, dict[str, Any]] = {}
    if target.exists():
        before = json.loads(target.read_text())
        if before["machine"] == here:
            known = {row["case"]: row for row in before["rows"]}
    known |= {row["case"]: row for row in rows}
    partial = target.with_suffix(".partial")
    partial.write_text(
        json.dumps({"kind": kind, "machine": here, "rows": list(known.values())}, indent=1)
    )
    partial.rename(target)


def run_suite(kind: str, cases: list[Case], pairs: int, with_memory: bool = True) -> int:
    """Measure and print; results are written after each case. The number of bounds not reached."""
    system.end_on_signals()
    with one_at_a_time():
        about = {**system.machine(make_data.FOLDER), "factor": make_data.FACTOR}
        print(heading(about, pairs))
        print(COLUMNS)
        rows: list[dict[str, Any]] = []
        for case in cases:
            rows.append(measure(case, pairs, with_memory))
            show(rows[-1])
            write_results(kind, about, pairs, rows)
    judged = [(row["case"], bound) for row in rows for bound in row.get("bounds", [])]
    missed = [(name, bound) for name, bound in judged if bound["verdict"] != "ok"]
    print(f"{len(judged) - len(missed)} of {len(judged)} bounds reached; {len(rows)} cases")
    for name, bound in missed:
        print(f"  {name}: {show_bound(bound)}")
    return len(missed)


def is_asked_for(name: str, words: list[str] | None) -> bool:
    """Whether a case is among those a command line names: each word is a part of names."""
    return not words or any(word in name for word in words)
