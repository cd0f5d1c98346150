# SPDX-License-Identifier: Apache-2.0
"""Results as tables for the README and as a chart: `report.py [--no-chart]`.

Reads benchmarks/results/{load,engines,consumers}.json, writes summary.json (small, meant to be
committed) and chart.png (with the matplotlib of `tools/setup.sh with-peers`), prints markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from loaders import find_peers, peer
from runner import RESULTS

KINDS = ("load", "engines", "consumers")
GROUPS = (
    ("load", "Loads (`backend='mmap'`)"),
    ("pread", "Loads into owned memory (`backend='pread'`)"),
    ("consumers", "`from_pretrained` of unmodified libraries"),
    ("A/A", "A/A: stock against stock"),
)

Row = dict[str, Any]


def round_all(value: Any) -> Any:
    """Four digits of every number, however deep."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: round_all(each) for key, each in value.items()}
    if isinstance(value, list):
        return [round_all(each) for each in value]
    return value


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What is worth keeping of the results."""
    machine = {key: value for result in results for key, value in result["machine"].items()}
    rows = [round_all(row) for result in results for row in result["rows"]]
    return {"machine": machine, "rows": rows}


def write_summary(summary: dict[str, Any]) -> None:
    """One line for each row, so that changes can be read."""
    rows = ",\n".join(json.dumps(row) for row in summary["rows"])
    machine = json.dumps(summary["machine"])
    (RESULTS / "summary.json").write_text(f'{{"machine": {machine},\n"rows": [\n{rows}\n]}}\n')


def ratio_text(ratio: dict[str, Any] | None) -> str:
    """A ratio with its interval."""
    if ratio is None:
        return ""
    low, high = ratio["interval"]
    digits = 0 if ratio["median"] >= 20 else 2
    return f"{ratio['median']:.{digits}f}x [{low:.{digits}f}, {high:.{digits}f}]"


def seconds_text(seconds: float | None) -> str:
    """Milliseconds below one second."""
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def case_text(row: Row) -> str:
    """The name of a case without its group, with the read-ahead as a number."""
    name: str = row["case"].partition(": ")[2]
    return name.replace("read-ahead own", f"read-ahead {row['read_ahead_kb']}")


def measured_sides(row: Row) -> dict[str, Any]:
    """The sides of a case that gave numbers."""
    sides = {label: side for label, side in row["sides"].items() if "read_s" in side}
    return {label: side for label, side in sides.items() if not side["error"]}


def pair_table(rows: list[Row]) -> list[str]:
    """Stock beside ours; one line a case."""
    lines = [
        "| case | stock | ours | faster | to return | from disk / kept | private MB |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        sides = measured_sides(row)
        label = next((label for label, side in sides.items() if side["pair"] in sides), None)
        if label is None:
            reason = row["skipped"] or "; ".join(
                f"{label}: {side['error']}" for label, side in row["sides"].items() if side["error"]
            )
            lines.append(f"| {case_text(row)} | {reason} | | | | | |")
            continue
        ours, stock = sides[label], sides[sides[label]["pair"]]
        disk = ""
        if row["cache"] == "cold" and ours["device_bytes"] is not None:
            disk = f"{ours['device_bytes'] / ours['kept_bytes']:.2f}"
            if stock["device_bytes"] is not None:
                disk += f" (stock {stock['device_bytes'] / stock['kept_bytes']:.2f})"
        private = ours["private_bytes"]
        cells = (
            case_text(row),
            seconds_text(stock["read_s"]),
            seconds_text(ours["read_s"]),
            ratio_text(ours["ratio_read"]),
            ratio_text(ours["ratio_return"]),
            disk,
            "" if private is None else f"{private / 1e6:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def everybody_table(row: Row) -> list[str]:
    """Every loader of one case, fastest first, failures last."""
    sides = measured_sides(row)
    lines = [
        f"**{case_text(row)}**",
        "",
        "| loader | version | read everything | GB/s | against stock | from disk / kept "
        "| private MB |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    for label, side in sorted(sides.items(), key=lambda item: float(item[1]["read_s"])):
        device, private = side["device_bytes"], side["private_bytes"]
        is_cold = row["cache"] == "cold" and device is not None
        cells = (
            label,
            side["version"] or "",
            seconds_text(side["read_s"]),
            f"{side['kept_bytes'] / side['read_s'] / 1e9:.2f}",
            ratio_text(side["ratio_read"]),
            f"{device / side['kept_bytes']:.2f}" if is_cold else "",
            "" if private is None else f"{private / 1e6:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    for label, side in row["sides"].items():
        if side["error"]:
            lines.append(f"| {label} | | failed: `{side['error']}` | | | | |")
    return [*lines, ""]


def markdown(summary: dict[str, Any]) -> str:
    """All tables."""
    about = ", ".join(f"{key} {value}" for key, value in summary["machine"].items())
    lines = [f"Measured on: {about}.", ""]
    for group, title in GROUPS:
        rows = [row for row in summary["rows"] if row["group"] == group]
        if rows:
            lines += [f"### {title}", "", *pair_table(rows), ""]
    for group, title in (("peers", "Everybody"), ("engines", "Our engines")):
        rows = [row for row in summary["rows"] if row["group"] == group]
        if rows:
            lines += [f"### {title}", ""]
        for row in rows:
            lines += everybody_table(row)
    judged = [(row, bound) for row in summary["rows"] for bound in row.get("bounds", [])]
    if judged:
        lines += ["### Bounds", "", "| case | bound | measured | |", "| --- | --- | --: | --- |"]
    for row, bound in judged:
        sign = "<=" if bound["what"] in ("device", "private") else ">="
        scale = 1e6 if bound["what"] == "private" else 1
        unit = " MB" if bound["what"] == "private" else "x"
        value = "-" if bound["value"] is None else f"{bound['value'] / scale:.2f}{unit}"
        wanted = f"{bound['side']}: {bound['what']} {sign} {bound['bound'] / scale:.4g}{unit}"
        lines.append(
            f"| {row['group']}: {case_text(row)} | {wanted} | {value} | {bound['verdict']} |"
        )
    return "\n".join(lines) + "\n"


def draw_chart(summary: dict[str, Any], target: Path) -> None:
    """How much faster ours is, case by case; beside it everybody on one cold load, if measured."""
    find_peers()
    peer("matplotlib").use("Agg")
    plot = peer("matplotlib.pyplot")
    bars = []
    for row in summary["rows"]:
        if row["group"] not in ("load", "pread", "consumers"):
            continue
        for side in measured_sides(row).values():
            if side["ratio_read"] is not None:
                text = f"{row['group']}: {case_text(row)}"
                bars.append((text, side["ratio_read"]["median"], side["ratio_read"]["interval"]))
    everybody = next((row for row in summary["rows"] if row["group"] == "peers"), None)
    panels = 1 if everybody is None else 2
    figure, axes = plot.subplots(
        1,
        panels,
        figsize=(7.5 * panels, max(3.5, 0.28 * len(bars) + 1)),
        layout="constrained",
        squeeze=False,
    )
    left = axes[0][0]
    places = range(len(bars))
    errors = [[m - i[0] for _, m, i in bars], [i[1] - m for _, m, i in bars]]
    left.barh(places, [m for _, m, _ in bars], xerr=errors, color="#4477aa", height=0.7)
    left.set_yticks(places, [text for text, _, _ in bars], fontsize=8)
    left.axvline(1, color="black", linewidth=0.8)
    left.invert_yaxis()
    left.set_title("times faster than stock, load and read everything (95 % interval)", fontsize=9)
    if everybody is not None:
        right = axes[0][1]
        sides = sorted(measured_sides(everybody).items(), key=lambda item: float(item[1]["read_s"]))
        colors = ["#4477aa" if label.startswith("ours") else "#bbbbbb" for label, _ in sides]
        places = range(len(sides))
        right.barh(places, [side["read_s"] for _, side in sides], color=colors, height=0.7)
        right.set_yticks(places, [label for label, _ in sides], fontsize=8)
        right.invert_yaxis()
        right.set_title(f"seconds, {case_text(everybody)}", fontsize=9)
    figure.savefig(target, dpi=110)


def main() -> int:
    """Write the summary and the chart, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-chart", action="store_true", help="no chart.png")
    options = parser.parse_args()
    files = [RESULTS / f"{kind}.json" for kind in KINDS]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    if not results:
        print(f"no results in {RESULTS}: run `make bench` first", file=sys.stderr)
        return 1
    summary = summarize(results)
    write_summary(summary)
    print(markdown(summary))
    if not options.no_chart:
        try:
            draw_chart(summary, RESULTS / "chart.png")
        except ImportError as error:
            print(f"no chart: {error} (tools/setup.sh with-peers)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
