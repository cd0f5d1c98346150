# SPDX-License-Identifier: Apache-2.0
"""Runs of bench_cuda.py as rows, goals and tables: nothing is measured here.

A ratio is that of two runs of one round. The limit of a round is the slower of what the pinned copy
and the best reading gave in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runner import MIB, Run, bootstrap, show_ratio

Runs = dict[str, dict[int, Run]]  # side -> round -> what was measured
Ratio = dict[str, Any]
Row = dict[str, Any]

OURS = "ours"
COPY, READS = "limit: pinned copy", "limit: "
RIVALS = ("stock prefetch", "fastsafetensors", "instanttensor")
STAGING_BYTES = 64 * MIB  # what ours may need on the device beside what stock does


@dataclass(frozen=True)
class Goal:
    """What `ours` has to reach in cases of a kind: "limit", a part of the lower limit; "stock" and
    "rival", times faster until used; "memory", bytes of the device's over stock's, at most."""

    kind: str
    what: str
    bound: float


GOALS = (
    Goal("load", "limit", 0.9),
    Goal("load", "stock", 3),
    Goal("load", "rival", 1.2),
    Goal("load", "memory", STAGING_BYTES),
    Goal("pretrained", "stock", 2),
    Goal("pretrained", "memory", STAGING_BYTES),
    Goal("convert", "stock", 2),
    Goal("convert", "memory", STAGING_BYTES),
)


# --- rows ---


def ratio_of(over: dict[int, float], under: dict[int, float]) -> Ratio | None:
    """Of the rounds that both have: median and interval."""
    values = [over[number] / under[number] for number in sorted(over.keys() & under.keys())]
    if not values:
        return None
    return {"median": statistics.median(values), "interval": bootstrap(values), "rounds": values}


def values_of(runs: dict[int, Run], key: str) -> dict[int, float]:
    """One figure of each round that has it."""
    return {number: run[key] for number, run in runs.items() if run.get(key) is not None}


def seconds_per_byte(runs: dict[int, Run]) -> dict[int, float]:
    """Until the load is back, in each round."""
    return {number: run["return_s"] / run["kept_bytes"] for number, run in runs.items()}


def limits_of(runs: Runs) -> dict[int, float]:
    """Seconds for each byte that nothing can go below, in each round that measured both."""
    copies = seconds_per_byte(runs.get(COPY, {}))
    reads = [
        seconds_per_byte(each)
        for label, each in runs.items()
        if label.startswith(READS) and label != COPY
    ]
    return {
        number: max(copy, min(each[number] for each in reads if number in each))
        for number, copy in copies.items()
        if any(number in each for each in reads)
    }


def _largest(runs: dict[int, Run], key: str) -> float | None:
    return max(values_of(runs, key).values(), default=None)


def _median(runs: dict[int, Run], key: str) -> float | None:
    values = values_of(runs, key).values()
    return statistics.median(values) if values else None


def summarize(case: dict[str, Any]) -> Row:
    """A case as a row: medians, ratios and peaks of each side.

    `case` has name, kind, seconds, pairs (side -> the one it is compared with, or None), runs,
    errors and failures (side -> the last one's text, how many there were).
    """
    runs: Runs = case["runs"]
    limits = limits_of(runs)
    row: Row = {"case": case["name"], "kind": case["kind"], "sides": {}, "seconds": case["seconds"]}
    for label, pair in case["pairs"].items():
        mine = runs.get(label, {})
        side: dict[str, Any] = {
            "error": case["errors"].get(label),
            "failures": case["failures"].get(label, 0),
            "pair": pair,
            "runs": len(mine),
        }
        row["sides"][label] = side
        if not mine:
            continue
        last = mine[max(mine)]
        read_s = values_of(mine, "read_s")
        side |= {
            "version": last.get("version"),
            "notes": last.get("notes"),
            "kept_bytes": last["kept_bytes"],
            "cache_proven": all(run.get("cache_proven", True) for run in mine.values()),
            "return_s": _median(mine, "return_s"),
            "read_s": _median(mine, "read_s"),
            "read_s_spread": [min(read_s.values()), max(read_s.values())],
            "first_s": _median(mine, "first_s"),
            "disk_bytes": _median(mine, "disk_bytes"),
            "ratio_return": None,
            "ratio_read": None,
            "of_limit": None,
        }
        for key in ("allocated_bytes", "reserved_bytes", "device_bytes"):
            side[key] = _largest(mine, key)
        other = runs.get(pair or "", {})
        for key in ("return", "read"):
            over = values_of(other, f"{key}_s")
            side[f"ratio_{key}"] = ratio_of(over, values_of(mine, f"{key}_s"))
        if not label.startswith(READS):
            side["of_limit"] = ratio_of(limits, seconds_per_byte(mine))
    row["rivals"] = {
        label: ratio_of(values_of(runs[label], "read_s"), values_of(runs.get(OURS, {}), "read_s"))
        for label in RIVALS
        if runs.get(label)
    }
    return row


# --- goals ---


def judge(row: Row) -> list[dict[str, Any]]:
    """The goals of a row. "PASS": its median reaches the bound; "PASS by interval": the upper end
    of its 95 % interval does; "short"; "?": not measured."""
    judged = []
    for goal in GOALS:
        if goal.kind == row["kind"]:
            found = _measured_memory(row) if goal.what == "memory" else _measured_ratio(goal, row)
            judged.append({"what": goal.what, "bound": goal.bound, **found})
    return judged


def _measured_ratio(goal: Goal, row: Row) -> dict[str, Any]:
    side = row["sides"].get(OURS, {})
    text, ratio = "", None
    if goal.what == "limit":
        ratio, text = side.get("of_limit"), "of the lower limit"
    elif goal.what == "stock":
        ratio, text = side.get("ratio_read"), f"times {side.get('pair')}"
    else:
        text = "times the best rival"
        known = {label: ratio for label, ratio in row["rivals"].items() if ratio is not None}
        if known:
            best = min(known, key=lambda label: known[label]["median"])
            ratio, text = known[best], f"times the best rival, {best}"
    if ratio is None:
        return {"text": text, "value": None, "verdict": "?"}
    verdict = "short"
    if ratio["median"] >= goal.bound:
        verdict = "PASS"
    elif ratio["interval"][1] >= goal.bound:
        verdict = "PASS by interval"
    return {
        "text": text,
        "value": ratio["median"],
        "interval": ratio["interval"],
        "rounds": len(ratio["rounds"]),
        "verdict": verdict,
    }


def _measured_memory(row: Row) -> dict[str, Any]:
    """What ours needed more than stock did, by torch's own counters, the worse of the two."""
    ours = row["sides"].get(OURS, {})
    stock = row["sides"].get(ours.get("pair"), {})
    over = [
        ours[key] - stock[key]
        for key in ("allocated_bytes", "reserved_bytes")
        if ours.get(key) is not None and stock.get(key) is not None
    ]
    text = "over stock's peak of device memory"
    if not over:
        return {"text": text, "value": None, "verdict": "?"}
    verdict = "PASS" if max(over) <= STAGING_BYTES else "short"
    return {"text": text, "value": max(over), "verdict": verdict}


# --- tables ---

COLUMNS = (
    f"  {'':30} {'return ms':>10} {'use ms':>9} {'GB/s':>6}  {'return x':>18}  {'use x':>18}  "
    f"{'of limit':>18} {'first ms':>8} {'torch MB':>8} {'reserved':>8} {'device':>8} "
    f"{'disk/kept':>9}"
)
LEGEND = """\
return: until a dict of all tensors is there; use: until a reduction over each of them is done, too.
x: stock's time by this one's in the same round, median [95 % interval]. of limit: the time of the
lower limit (pinned copy, best reading) by the one to return. first: a first load of 16 MiB in the
process. MB: peaks of device memory while loading, by torch (allocated, reserved) and, over all
allocators, by the driver."""


def _cell(value: float | None, scale: float = 1, digits: int = 0) -> str:
    return "" if value is None else f"{value / scale:.{digits}f}"


def show(row: Row, say: Callable[[str], None] = print) -> None:
    """One case: a line for each side, one for each goal."""
    say(f"{row['case']}  ({row['seconds']:.0f} s)")
    proven = [side["cache_proven"] for side in row["sides"].values() if side["runs"]]
    if not all(proven):
        say("  NOT PROVEN: the system does not tell what is in the page cache")
    for label, side in row["sides"].items():
        if not side["runs"]:
            reason = side["error"] or "no round was done"
            say(f"  {label:30} {'failed: ' if side['error'] else ''}{reason}")
            continue
        disk = None if side["disk_bytes"] is None else side["disk_bytes"] / side["kept_bytes"]
        say(
            f"  {label:30} {_cell(side['return_s'], 1e-3, 1):>10} "
            f"{_cell(side['read_s'], 1e-3, 1):>9} "
            f"{side['kept_bytes'] / side['read_s'] / 1e9:6.2f}  "
            f"{show_ratio(side['ratio_return']):>18}  {show_ratio(side['ratio_read']):>18}  "
            f"{show_ratio(side['of_limit']):>18} {_cell(side['first_s'], 1e-3):>8} "
            f"{_cell(side['allocated_bytes'], 1e6):>8} {_cell(side['reserved_bytes'], 1e6):>8} "
            f"{_cell(side['device_bytes'], 1e6):>8} {_cell(disk, 1, 2):>9}".rstrip()
        )
    for label, side in row["sides"].items():
        if side["runs"] and side["error"]:
            failed = f"{side['failures']} more failed, at last: {side['error']}"
            say(f"  {label}: {side['runs']} rounds; {failed}")
        if side["runs"] and side["notes"]:
            told = ", ".join(f"{name} {value}" for name, value in side["notes"].items())
            say(f"  {label}: {told}")
    for judged in judge(row):
        say(f"  {show_goal(judged)}")
    say("")


def show_goal(judged: dict[str, Any]) -> str:
    """A goal and whether it was reached."""
    if judged["what"] == "memory":
        value = "" if judged["value"] is None else f"{judged['value'] / MIB:.0f} MiB "
        wanted = f"<= {judged['bound'] / MIB:.0f} MiB"
    else:
        value, wanted = "", f">= {judged['bound']:g}"
        if judged["value"] is not None:
            low, high = judged["interval"]
            value = f"{judged['value']:.2f} [{low:.2f}, {high:.2f}] "
    rounds = f"; rounds: {judged['rounds']}" if "rounds" in judged else ""
    value = value or "nothing measured "
    return f"{judged['verdict']:16} {value}{judged['text']} ({wanted}{rounds})"


def versions_of(rows: list[Row]) -> str:
    """The package that each side was, in a line."""
    found = {
        label: side["version"]
        for row in rows
        for label, side in row["sides"].items()
        if side["runs"] and side["version"]
    }
    return ", ".join(f"{label} {version}" for label, version in found.items())
