# SPDX-License-Identifier: Apache-2.0
"""Loads, stock against ours and others: interleaved fresh processes, medians, ratios, bounds.

    bench_load.py [--accept | --quick | --peers] [--pairs N] [--case WORD ...] [--list]

How a number is made is in benchmarks/README.md. Results go to benchmarks/results/load.json (after
each case, so that an interrupted run leaves what it has).
"""

from __future__ import annotations

import argparse
import sys

import make_data
from runner import MIB, Bound, Case, Side, is_asked_for, run_suite

STOCK = Side("stock", "stock")
STOCK_AGAIN = Side("stock again", "stock", "stock")
OURS = Side("ours", "ours", "stock")
STOCK_PREAD = Side("stock pread", "stock pread")
OURS_PREAD = Side("ours pread", "ours pread", "stock pread")
OURS_TENSORS = Side("ours tensors()", "ours tensors()", "stock")
OURS_PREAD_HERE = Side("ours pread", "ours pread", "stock")
PEERS = tuple(
    Side(name, name, "stock")
    for name in (
        "torch.load(mmap)",
        "fastsafetensors",
        "runai streamer",
        "flashpack",
        "safetensors-streaming",
        "cattensors",
        "instanttensor",
    )
)
PAIR, PREAD = (STOCK, OURS), (STOCK_PREAD, OURS_PREAD)
NO_PRIVATE = Bound("ours", "private", 16 * MIB)
SMALL_AHEAD = 128  # KiB, what distributions set


def kept_bytes(data: str, part: str) -> int:
    """What a part of a set holds."""
    kind = make_data.SETS[data]
    return len(kind.wanted(part)) * kind.tensor_bytes


def read(value: float) -> Bound:
    """`ours` is read whole this many times faster than stock."""
    return Bound("ours", "read", value)


def device(value: float) -> Bound:
    """`ours` reads at most this many times the kept bytes."""
    return Bound("ours", "device", value)


def cold_cases() -> list[Case]:
    """backend="mmap", out of the page cache, at a small read-ahead and the machine's own."""
    cases = []
    for ahead in (SMALL_AHEAD, None):
        is_small = ahead == SMALL_AHEAD
        bounds = (read(1.5),) if is_small else (read(1.25), Bound("ours", "return", 50))
        cases.append(
            Case("large", "whole", "cold", "sum", PAIR, (*bounds, NO_PRIVATE), ahead, accept=True)
        )
        cases.append(Case("large", "whole", "cold", "copy", PAIR, (read(1.5),), ahead, accept=True))
        accept = not is_small
        small = (read(3.5), device(1.1))
        medium = (read(1.3), device(1.05), NO_PRIVATE)
        cases += [
            Case("small", "whole", "cold", "sum", PAIR, (read(1.6),), ahead, accept=accept),
            Case("small", "quarter", "cold", "sum", PAIR, small, ahead, accept=accept),
            Case("medium", "quarter", "cold", "sum", PAIR, medium, ahead, accept=accept),
            Case("small", "whole", "cold", "copy", PAIR, (), ahead),
            Case("medium", "quarter", "cold", "copy", PAIR, (), ahead),
            Case("tiny", "whole", "cold", "sum", PAIR, (), ahead),
            Case("tiny", "quarter", "cold", "sum", PAIR, (), ahead),
            Case("shards", "whole", "cold", "sum", PAIR, (NO_PRIVATE,), ahead),
            Case("shards", "quarter", "cold", "sum", PAIR, (), ahead),
        ]
    return cases


def warm_cases() -> list[Case]:
    """backend="mmap", in the page cache: never slower than stock."""
    at_least = read(0.97)
    cases = []
    for data in ("small", "tiny", "large", "shards"):
        bounds = (at_least, NO_PRIVATE) if data in ("large", "shards") else (at_least,)
        cases.append(Case(data, "whole", "warm", "sum", PAIR, bounds, accept=True))
    for data in ("small", "tiny", "large", "shards"):
        cases.append(Case(data, "quarter", "warm", "sum", PAIR, (at_least,)))
    for data in ("small", "large"):
        cases.append(Case(data, "whole", "warm", "copy", PAIR, (at_least,)))
    return cases


def pread_cases() -> list[Case]:
    """Owned memory: against stock's own pread, and against what the disk gives."""

    def bounds(data: str, part: str, faster: float) -> tuple[Bound, ...]:
        limit = kept_bytes(data, part) + 80 * MIB
        return (Bound("ours pread", "read", faster), Bound("ours pread", "private", limit))

    cold = (*bounds("large", "whole", 1.4), Bound("ours pread", "ceiling", 0.9))
    cases = [
        Case(
            "large", "whole", "cold", "sum", PREAD, cold, ceiling=True, group="pread", accept=True
        ),
        Case(
            "large",
            "whole",
            "warm",
            "sum",
            PREAD,
            bounds("large", "whole", 1.5),
            group="pread",
            accept=True,
        ),
        Case("large", "whole", "cold", "sum", PREAD, cold, SMALL_AHEAD, True, "pread"),
    ]
    for data, part, cache in (
        ("small", "whole", "cold"),
        ("small", "quarter", "cold"),
        ("medium", "quarter", "cold"),
        ("shards", "whole", "cold"),
        ("small", "whole", "warm"),
        ("shards", "whole", "warm"),
    ):
        limits = bounds(data, part, 1.4 if cache == "cold" else 1.5)
        cases.append(Case(data, part, cache, "sum", PREAD, limits, group="pread"))
    cases.append(Case("large", "whole", "cold", "copy", PREAD, (), group="pread"))
    return cases


def peer_cases() -> list[Case]:
    """Everybody in one table. Medium: formats of one's own are second and third copies on disk."""
    everybody = (STOCK, OURS, OURS_PREAD_HERE, OURS_TENSORS, *PEERS)
    cases = [
        Case("medium", part, cache, consumer, everybody, group="peers", ceiling=ceiling)
        for part, cache, consumer, ceiling in (
            ("whole", "cold", "sum", True),
            ("quarter", "cold", "sum", False),
            ("whole", "warm", "sum", False),
            ("whole", "cold", "copy", False),
        )
    ]
    cases.append(Case("small", "whole", "warm", "sum", everybody, group="peers"))
    cases.append(Case("small", "whole", "cold", "sum", everybody, group="peers"))
    return cases


def same_cases() -> list[Case]:
    """A/A: how much of a ratio is noise here."""
    twice = (STOCK, STOCK_AGAIN)
    return [
        Case("small", "whole", "cold", "sum", twice, group="A/A", accept=True),
        Case("small", "whole", "warm", "sum", twice, group="A/A", accept=True),
        Case("large", "whole", "cold", "sum", twice, group="A/A"),
    ]


def all_cases() -> list[Case]:
    """The suite, what has to be reached first."""
    cases = [*cold_cases(), *pread_cases(), *warm_cases(), *same_cases(), *peer_cases()]
    return sorted(cases, key=lambda case: not case.accept)


def main() -> int:
    """Measure and print; 1 where a bound was not reached."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, help="rounds of each case; 9, or 3 with --quick")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--accept", action="store_true", help="only what has to be reached")
    choice.add_argument("--quick", action="store_true", help="3 rounds of what has to be reached")
    choice.add_argument("--peers", action="store_true", help="only the tables with everybody")
    parser.add_argument("--case", nargs="*", help="only cases with one of these in their name")
    parser.add_argument("--no-memory", action="store_true", help="no runs that look at memory")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    options = parser.parse_args()
    cases = [
        case
        for case in all_cases()
        if is_asked_for(case.name, options.case)
        and (case.accept or not (options.accept or options.quick))
        and (case.group == "peers" or not options.peers)
    ]
    if options.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    pairs = options.pairs or (3 if options.quick else 9)
    missed = run_suite("load", cases, pairs, not options.no_memory)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
