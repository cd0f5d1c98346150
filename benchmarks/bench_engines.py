# SPDX-License-Identifier: Apache-2.0
"""Our engines, with and without direct I/O, against the disk's ceiling: GB/s, cold and warm.

    bench_engines.py [--pairs N] [--quick] [--case WORD ...]

The ceiling is measured in the same rounds: direct reads, 4 threads x 4 MiB, into touched memory.
"""

from __future__ import annotations

import argparse
import sys

from runner import Case, Side, is_asked_for, run_suite


def side(engine: str, direct_io: str, inflight: str = "auto") -> Side:
    """load_file(backend="pread") with these options."""
    options = {"engine": engine, "direct_io": direct_io, "inflight_bytes": inflight}
    label = f"{engine}, direct {direct_io}" + ("" if inflight == "auto" else f", {inflight}")
    return Side(
        label, "ours pread", "stock pread", tuple((k, v) for k, v in options.items() if v != "auto")
    )


STOCK = Side("stock pread", "stock pread")
BASIC = tuple(side(engine, direct) for engine in ("uring", "threads") for direct in ("on", "off"))
AUTO = side("auto", "auto")
INFLIGHT = tuple(side("uring", "on", size) for size in ("4MiB", "16MiB", "64MiB"))

CASES = (
    Case("large", "whole", "cold", "sum", (STOCK, AUTO, *BASIC), ceiling=True, group="engines"),
    Case("large", "whole", "warm", "sum", (STOCK, AUTO, *BASIC), group="engines"),
    Case("medium", "quarter", "cold", "sum", (STOCK, AUTO, *BASIC), group="engines"),
    Case("small", "quarter", "cold", "sum", (STOCK, AUTO, *BASIC), group="engines"),
    Case(
        "large",
        "whole",
        "cold",
        "sum",
        (STOCK, *INFLIGHT),
        ceiling=True,
        group="engines",
        note=", bytes in flight",
    ),
)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, help="rounds of each case; 9, or 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="3 rounds of the first two cases")
    parser.add_argument("--case", nargs="*", help="only cases with one of these in their name")
    options = parser.parse_args()
    cases = [case for case in CASES if is_asked_for(case.name, options.case)]
    cases = cases[:2] if options.quick else cases
    run_suite("engines", cases, options.pairs or (3 if options.quick else 9), with_memory=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
