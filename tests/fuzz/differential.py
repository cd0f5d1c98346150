"""A seeded differential fuzzer: stock safetensors against us, on damaged files, in one process.

    python tests/fuzz/differential.py --seeds 1 2 3 4 5 --cases 10000
    python tests/fuzz/differential.py --one 3 1234          # one case again, with all its bytes

For each file (damage.py) the same questions are asked of stock's own functions and, under
`stx_patch.patch()`, of the names that a program uses. A difference is an answer of ours that stock
never gives. Stock is not always of one mind: it walks hash maps, so which of several errors it
raises is by chance. Where we differ, both sides are asked again, and only an answer that stock
does not show in hundreds of tries is reported. Two things are compared in an order made canonical
instead, since chance has too many to show: neighbouring empty tensors, and the keys of metadata.
The core is also asked directly: it must never take a file that stock refuses.

It does not look for leaks, races, other devices or slices in depth, and needs no GPU. Should a
case end the process, its seed and index stand in the file named at the start.
"""

import argparse
import contextlib
import faulthandler
import os
import shutil
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import STOCK, native, outcome, seen

import stx_patch
from fuzz.cases import Case
from fuzz.damage import make_case

TRIES_MAX = 400  # of stock, before a difference counts
TRIES_OURS = 5
TENSORS_MAX = 40  # that are compared of a file with more, evenly spread
SHOWN_BYTES_MAX = 6000
QUESTIONS_MAX = 6

Answers = dict[str, Any]  # question -> comparable answer


def _stock_load_file() -> Callable[..., Any]:
    """Stock's `load_file` whatever is patched: it looks `safe_open` up among its globals."""
    stock: Any = STOCK.load_file
    names = {**stock.__globals__, "safe_open": STOCK.safe_open}
    copy = types.FunctionType(stock.__code__, names, stock.__name__, stock.__defaults__)
    copy.__kwdefaults__ = stock.__kwdefaults__
    return copy


_STOCK = types.SimpleNamespace(safe_open=STOCK.safe_open, load_file=_stock_load_file())


def ask_stock(path: str) -> Answers:
    return ask(_STOCK.safe_open, _STOCK.load_file, path)


def ask_ours(path: str) -> Answers:
    """What a program sees that imported safetensors and is patched."""
    return ask(safetensors.safe_open, safetensors.torch.load_file, path)


def ask(safe_open: Callable[..., Any], load_file: Callable[..., Any], path: str) -> Answers:
    answers: Answers = {}
    opened = outcome(safe_open, path, "pt")
    if opened[0] == "error":
        answers["open"] = opened
    else:
        answers["open"] = "accepted"
        answers["methods"] = outcome(ask_handle, opened[1], answers)
    loaded = outcome(load_file, path)
    if loaded[0] == "error":
        answers["load_file"] = loaded
        return answers
    tensors = loaded[1]
    answers["load_file"] = type(tensors)
    answers["load_file: order"] = settled([(n, t.numel() == 0) for n, t in tensors.items()])
    for name in spread(sorted(tensors)):
        answers[f"load_file: {name!r}"] = seen(("value", tensors[name]))
    return answers


def ask_handle(handle: Any, answers: Answers) -> None:
    names = handle.keys()
    slices = {name: handle.get_slice(name) for name in names}
    answers["keys"] = names
    shapes = {name: slices[name].get_shape() for name in slices}
    answers["get_shape"] = shapes
    answers["get_dtype"] = {name: slices[name].get_dtype() for name in slices}
    answers["offset_keys"] = settled([(n, 0 in shapes[n]) for n in handle.offset_keys()])
    answers["metadata"] = handle.metadata()
    answers["get_tensor of none"] = outcome(handle.get_tensor, "no such name")
    for name in spread(names):
        answers[f"get_tensor: {name!r}"] = seen(outcome(handle.get_tensor, name))
        answers[f"get_slice: {name!r}"] = seen(outcome(slices[name].__getitem__, ...))


def settled(order: list[tuple[str, bool]]) -> list[str]:
    """Names in their order, but those of neighbouring empty tensors sorted.

    Neighbours without bytes begin and end at one place, so their order is stock's chance.
    """
    runs = [(empty, [name for name, _ in run]) for empty, run in groupby(order, lambda x: x[1])]
    return [name for empty, run in runs for name in (sorted(run) if empty else run)]


def spread(names: list[str]) -> list[str]:
    """All names, or some from everywhere where there are very many."""
    step = len(names) // TENSORS_MAX + 1
    return names[::step]


def never_said(mine: Answers, stock: list[Answers]) -> list[str]:
    """The questions that `mine` answers as none of `stock` does."""
    missing = object()
    asked = {**stock[0], **mine}
    return [
        question
        for question in asked
        if not any(mine.get(question, missing) == one.get(question, missing) for one in stock)
    ]


@dataclass
class Verdict:
    """What one file showed."""

    accepted: bool  # by stock
    core_takes: bool
    differences: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # stock's answer, ours


def judge(path: str) -> Verdict:
    """Compare stock and us on one file. The process is patched."""
    stock, mine = [ask_stock(path)], ask_ours(path)
    verdict = Verdict(stock[0]["open"] == "accepted", native(path))
    if verdict.core_takes and not verdict.accepted:
        verdict.differences["the core"] = (stock[0]["open"], "takes it")
    if mine == stock[0]:
        return verdict
    for attempt in range(TRIES_OURS):
        mine = ask_ours(path) if attempt else mine
        while never_said(mine, stock) and len(stock) < TRIES_MAX:
            stock.append(ask_stock(path))
        for question in never_said(mine, stock):
            verdict.differences[question] = (stock[0].get(question), mine.get(question))
    return verdict


def report(case: Case, verdict: Verdict, everything: bool = False) -> str:
    """A finding in words: which case, its bytes, both answers."""
    content = case.content
    lines = [f"seed {case.seed} index {case.index}, damaged in {', '.join(case.damages) or '-'}"]
    lines.append(f"  {len(content)} bytes; stock {'accepts' if verdict.accepted else 'refuses'}")
    if everything or len(content) <= SHOWN_BYTES_MAX:
        lines += [f"  repr {content!r}", f"  hex {content.hex()}"]
    else:
        lines.append(f"  begins {content[:500]!r}")
        lines.append(f"  all of it: differential.py --one {case.seed} {case.index}")
    for question, (stock, ours) in list(verdict.differences.items())[:QUESTIONS_MAX]:
        lines += [f"  {question}", f"    stock {stock!r}", f"    ours  {ours!r}"]
    more = len(verdict.differences) - QUESTIONS_MAX
    if more > 0:
        lines.append(f"  and {more} more questions")
    return "\n".join(lines)


class Place:
    """A folder for the case in hand, in memory where there is such; gone afterwards.

    Attributes:
        path: where the case lies while it is judged.
        position: the file that holds its seed and index; left behind if the process dies.
    """

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "case.safetensors")
        self.position = folder / "position"
        self._descriptor = os.open(self.position, os.O_CREAT | os.O_WRONLY, 0o600)

    def put(self, case: Case) -> str:
        """Write the case. A new file each time: the one before may still be mapped."""
        os.pwrite(self._descriptor, b"%-20d %-20d\n" % (case.seed, case.index), 0)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        with open(self.path, "wb") as out:
            out.write(case.content)
        return self.path

    def close(self) -> None:
        os.close(self._descriptor)


@contextlib.contextmanager
def workplace() -> Iterator[Place]:
    """The process is patched, and has a place for cases."""
    memory = "/dev/shm"
    where = memory if os.access(memory, os.W_OK | os.X_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="stx-fuzz-", dir=where))
    place = Place(folder)
    try:
        with stx_patch.patched(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield place
    finally:
        place.close()
        shutil.rmtree(folder)


@dataclass
class Totals:
    """What a seed showed.

    Attributes:
        left_to_stock: files that stock accepts and the core does not.
        opens: how many of our opens were native, by our own count.
        reports: a text for each case with a difference.
    """

    seed: int
    cases: int = 0
    accepted: int = 0
    left_to_stock: int = 0
    opens: int = 0
    seconds: float = 0.0
    reports: list[str] = field(default_factory=list)

    def line(self) -> str:
        share = self.left_to_stock / max(1, self.accepted)
        rate = self.cases / max(1e-9, self.seconds) * 60
        return (
            f"seed {self.seed}: {self.cases} cases, {self.accepted} both accept, "
            f"{self.cases - self.accepted} both reject, {self.left_to_stock} left to stock "
            f"({share:.1%} of the accepted), {len(self.reports)} differences, "
            f"{rate:.0f} cases per minute"
        )


def run(seed: int, cases: int, place: Place, first: int = 0) -> Totals:
    """Judge `cases` files of a seed. The process is patched."""
    totals = Totals(seed)
    before, start = stx_patch.stats().opens, time.perf_counter()
    for index in range(first, first + cases):
        case = make_case(seed, index)
        verdict = judge(place.put(case))
        totals.cases += 1
        totals.accepted += verdict.accepted
        totals.left_to_stock += verdict.accepted and not verdict.core_takes
        if verdict.differences:
            totals.reports.append(report(case, verdict))
    totals.seconds = time.perf_counter() - start
    totals.opens = stx_patch.stats().opens - before
    return totals


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Stock safetensors against us on damaged files.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--cases", type=int, default=10_000, help="of each seed")
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument("--one", type=int, nargs=2, metavar=("SEED", "INDEX"))
    options = parser.parse_args(arguments)
    failed = False
    with workplace() as place:
        print(f"should this process die: seed and index are in {place.position}", file=sys.stderr)
        if options.one is not None:
            case = make_case(*options.one)
            verdict = judge(place.put(case))
            print(report(case, verdict, everything=True))
            return bool(verdict.differences)
        for seed in options.seeds:
            totals = run(seed, options.cases, place, options.first)
            print("\n".join([*totals.reports, totals.line()]), flush=True)
            failed = failed or bool(totals.reports)
    return failed


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
