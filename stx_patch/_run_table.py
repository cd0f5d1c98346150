# SPDX-License-Identifier: Apache-2.0
"""The table that `stx-patch run` ends with, and its sentence on what bounded the load.

Everything is derived from counters (stx_patch.Stats), and says no more than they do.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

from ._cli_text import count_text, printable, size_text, table

TYPE_CHECKING = False  # as in typing, which is not imported for it
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ._stats import Stats

    # pid, name, stats of a process, and whether they are final; the first is the program's own
    Report = dict[str, Any]

_NAMES_MAX = 8  # that a line has room for
_NOTHING: dict[str, Any] = {  # of what is looked at below
    "opens": 0,
    "tensors_native": 0,
    "tensors_stock": 0,
    "keys_kept": 0,
    "keys_skipped": 0,
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
    try:  # noqa: SIM105 (contextlib is not imported at an exit: _run_report)
        sys.stdout.flush()  # what the program printed comes before
    except Exception:  # there is none, or it is closed, or of the program's own making
        pass
    try:
        sys.stderr.flush()
        _write(text)
    except Exception:
        pass


def _write(text: str) -> None:
    """Past the buffer of stderr: with what that cannot get rid of, Python ends with status 120."""
    try:
        number = sys.stderr.fileno()
    except (AttributeError, OSError):  # it leads elsewhere
        sys.stderr.write(text)
        return
    rest = text.encode(sys.stderr.encoding or "utf-8", "backslashreplace")
    while rest:
        rest = rest[os.write(number, rest) :]


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
    cut_off = [f"{one['pid']} {one['name']}" for one in reports if not one["final"]]
    if not cut_off and not any(map(_is_used, stats)):
        return f"{title}, no safetensors file was opened through stx_patch"
    lines = [title]
    if any(map(_is_used, stats)):
        lines.append(_make_table(reports, stats))
    else:
        lines[0] += ", the program itself opened no safetensors file through stx_patch"
    if cut_off:
        lines.append(_unfinished(cut_off))
    lines += _kept_nothing(stats)
    lines += [f"went to stock: {text}" for text in _hand_overs(stats)]
    lines += [f"engine: {text}" for text in _engines(stats)]
    return "\n".join([*lines, f"bounded by: {_bounded_by(reports)}"])


def _is_used(stats: Stats) -> bool:
    return bool(stats.opens or stats.fallbacks)


def _make_table(reports: Sequence[Report], stats: Sequence[Stats]) -> str:
    """A row for the program, and for each other process of which something is known."""
    phases = list(dict.fromkeys(phase for one in stats for phase in one.seconds))
    rows = [["process", "files", "native/stock", "kept", "read", *(f"{p} s" for p in phases)]]
    for report, one in zip(reports, stats, strict=True):
        if report["name"] and not report["stats"]:
            continue
        name = printable(f"{report['pid']} {report['name']}") if report["name"] else "the program"
        tensors = f"{one.tensors_native:,}/{one.tensors_stock:,}"
        sizes = [size_text(one.bytes_kept), size_text(one.bytes_read)]
        times = [f"{one.seconds.get(phase, 0.0):.3f}" for phase in phases]
        rows.append([name, f"{one.opens:,}", tensors, *sizes, *times])
    return table(rows, "<" + ">" * (len(rows[0]) - 1))


def _unfinished(names: Sequence[str]) -> str:
    """Processes whose counters were read before their end."""
    ended = "1 process ended without a last word, or goes on"
    if len(names) > 1:
        ended = f"{len(names):,} processes ended without their last word, or go on"
    shown = [*names[:_NAMES_MAX], *(["..."] if len(names) > _NAMES_MAX else [])]
    return f"{ended}: {printable(', '.join(shown))}"


def _kept_nothing(stats: Sequence[Stats]) -> list[str]:
    """One line, if a filter left nothing at all."""
    skipped = sum(one.keys_skipped for one in stats)
    if not skipped or any(one.keys_kept for one in stats):
        return []
    files = count_text(sum(one.opens for one in stats), "file")
    return [f"the filter kept nothing of {count_text(skipped, 'tensor')} in {files}"]


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
    if number != 0:
        text = f"{text} (process {reports[number]['pid']})"
    if all(report["final"] for report in reports):
        return text
    return f"{text}, as far as is known" if _is_used(stats[number]) else "what is not known"


def _weight(stats: Stats) -> tuple[bool, float]:
    return _is_used(stats), sum(stats.seconds.values())


def what_bounded(stats: Stats) -> str:
    """What kept the loads of one process from being faster, as far as its counters show it."""
    if stats.tensors_native == 0:
        if stats.fallbacks:
            return f"safetensors itself, which served everything: {_reasons(stats.fallbacks)}"
        if stats.keys_skipped and not stats.keys_kept:
            return "nothing: no tensor was kept"
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
