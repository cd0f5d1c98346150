# SPDX-License-Identifier: Apache-2.0
"""The table that `stx-patch run` ends with, and its sentence on what bounded the load.

Everything is derived from counters (stx_patch.Stats), and says no more than they do.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

from ._cli_text import count_text, printable, size_text, table

TYPE_CHECKING = False  # as in typing, which is not imported for it
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ._stats import Stats

    Report = dict[str, Any]  # pid, name, stats of a process; the first is the program's own

_NOTHING: dict[str, Any] = {  # of what is looked at below
    "opens": 0,
    "tensors_native": 0,
    "tensors_stock": 0,
    "bytes_kept": 0,
    "bytes_read": 0,
    "engine_reason": None,
    "fallbacks": {},
    "seconds": {},
}


def show(program: Sequence[str], seconds: float, reports: Sequence[Report]) -> None:
    """Say it on stderr, if there is one."""
    _say(f"\n{make_text(program, seconds, reports)}\n")


def _say(text: str) -> None:
    try:
        sys.stdout.flush()  # what the program printed comes before
        sys.stderr.write(text)
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):  # there is none, or it is closed
        pass


def write_json(settings: dict[str, Any], seconds: float, reports: Sequence[Report]) -> None:
    """Write all counters of all processes to the file of --json."""
    told = {
        "program": settings["program"],
        "seconds": seconds,
        "bounded_by": _bounded_by(reports),
        "processes": list(reports),
    }
    try:
        with open(settings["json"], "w", encoding="utf-8") as file:
            json.dump(told, file, indent=2)
            file.write("\n")
    except OSError as error:
        _say(f"stx-patch: error: {settings['json']}: {error.strerror}\n")


def make_text(program: Sequence[str], seconds: float, reports: Sequence[Report]) -> str:
    """The lines of the table."""
    title = f"stx-patch run {printable(' '.join(program))}: {seconds:.1f} s"
    stats = [_stats_of(report) for report in reports]
    if not any(one.opens or one.fallbacks for one in stats):
        return f"{title}, no safetensors file was opened"
    phases = list(dict.fromkeys(phase for one in stats for phase in one.seconds))
    rows = [["process", "files", "native/stock", "kept", "read", *(f"{p} s" for p in phases)]]
    for report, one in zip(reports, stats, strict=True):
        name = printable(f"{report['pid']} {report['name']}") if report["name"] else "the program"
        tensors = f"{one.tensors_native:,}/{one.tensors_stock:,}"
        sizes = [size_text(one.bytes_kept), size_text(one.bytes_read)]
        times = [f"{one.seconds.get(phase, 0.0):.3f}" for phase in phases]
        rows.append([name, f"{one.opens:,}", tensors, *sizes, *times])
    lines = [title, table(rows, "<" + ">" * (len(rows[0]) - 1))]
    lines += [f"went to stock: {text}" for text in _hand_overs(stats)]
    lines += [f"engine: {text}" for text in _engines(stats)]
    return "\n".join([*lines, f"bounded by: {_bounded_by(reports)}"])


def _stats_of(report: Report) -> Stats:
    """Its counters, in the shape of Stats, whose class may not be imported here (_run_report)."""
    counters: Any = SimpleNamespace(**{**_NOTHING, **report["stats"]})
    return counters  # type: ignore[no-any-return]


def _hand_overs(stats: Sequence[Stats]) -> list[str]:
    """One text with all reasons, or none."""
    sums: dict[str, int] = {}
    for one in stats:
        for reason, count in one.fallbacks.items():
            sums[reason] = sums.get(reason, 0) + count
    return [_reasons(sums)] if sums else []


def _reasons(fallbacks: dict[str, int]) -> str:
    return ", ".join(
        f"{printable(reason)} ({count_text(count, 'call')})" for reason, count in fallbacks.items()
    )


def _engines(stats: Sequence[Stats]) -> list[str]:
    """What read into owned memory, where it was not the best there is."""
    found = {f"{one.engine} ({one.engine_reason})" for one in stats if one.engine_reason}
    return sorted(printable(text) for text in found)


def _bounded_by(reports: Sequence[Report]) -> str:
    """The sentence, about the process in which loading took longest."""
    stats = [_stats_of(report) for report in reports]
    number = max(range(len(stats)), key=lambda number: _weight(stats[number]))
    text = what_bounded(stats[number])
    return text if number == 0 else f"{text} (process {reports[number]['pid']})"


def _weight(stats: Stats) -> tuple[bool, float]:
    return bool(stats.opens or stats.fallbacks), sum(stats.seconds.values())


def what_bounded(stats: Stats) -> str:
    """What kept the loads of one process from being faster, as far as its counters show it."""
    if stats.tensors_native == 0:
        if stats.fallbacks:
            return f"safetensors itself, which served everything: {_reasons(stats.fallbacks)}"
        return f"nothing: no tensor was asked for in {count_text(stats.opens, 'file')}"
    if stats.tensors_stock > stats.tensors_native:
        made = count_text(stats.tensors_stock, "tensor")
        return f"safetensors itself, which made {made}: {_reasons(stats.fallbacks)}"
    spent_s = sum(stats.seconds.values())
    phase, phase_s = max(stats.seconds.items(), key=lambda item: item[1], default=("", 0.0))
    share = f"{phase_s:.3f} of {spent_s:.3f} s"
    if phase == "read":
        return f"waiting for reads, {share}: {_reading(stats)}"
    if phase == "filter":
        asked = count_text(stats.keys_kept + stats.keys_skipped, "name")
        return f"the filter, {share}, which was asked about {asked}"
    return f"{_residency(stats)}; {share} in stx_patch went into {_work(stats, phase)}"


def _reading(stats: Stats) -> str:
    rate = stats.bytes_read / stats.seconds["read"] / 1e9
    ways = [
        way
        for way, count in (
            ("past the page cache", stats.loads_direct),
            (
                "through it" if stats.loads_direct else "through the page cache",
                stats.loads_buffered,
            ),
        )
        if count
    ]
    # What was read ahead of mapped files is in bytes_read, too: nobody waited for it there.
    return f"at most {rate:.2g} GB/s, {size_text(stats.bytes_read)} {' and '.join(ways)}".rstrip()


def _residency(stats: Stats) -> str:
    """What there was to wait for in files that are mapped."""
    known = stats.files_cold + stats.files_warm + stats.files_unknown
    if stats.files_cold:
        text = (
            f"the disk: {stats.files_cold:,} of {count_text(known, 'file')} not in the page cache"
        )
        return f"{text}, read beside the program, whose waiting is not in these counters"
    if stats.files_unknown:
        text = f"what is not known: of {stats.files_unknown:,} of {count_text(known, 'file')}"
        return f"{text} the system does not tell what the page cache had"
    if stats.files_warm:
        return "nothing: what was kept was in the page cache"
    return "nothing that was counted"


def _work(stats: Stats, phase: str) -> str:
    works = {
        "header": f"opening {count_text(stats.opens, 'file')}",
        "plan": "planning reads",
        "wrap": f"making {count_text(stats.tensors_native, 'tensor')}",
    }
    return works.get(phase, phase)
