# SPDX-License-Identifier: Apache-2.0
"""`stx-patch verify` and `stx-patch diff`: files held to what they promise, and to each other.

Both go through their files once and say what they find as they find it.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack
from typing import Any, NamedTuple

from . import _check, _compare, _files, _filter, _native, _stock, filters
from ._cli_errors import CliError
from ._cli_filters import add_filters, check_asked, filter_of, nothing_kept
from ._cli_progress import bar
from ._cli_text import count_text, printable, size_text, write
from ._headers import names_in

_SHOWN_MAX = 3  # names in a line

_VERIFY_EXAMPLES = """\
examples:
  stx-patch verify model.safetensors               header and coverage
  stx-patch verify llama/                          and the index: every name where it says
  stx-patch verify llama/ --full                   every byte, by two readers
  stx-patch verify part.safetensors --against llama/

Exit status: 0 all is well, 1 something does not verify, 2 trouble (no such file).
"""

_DIFF_EXAMPLES = """\
examples:
  stx-patch diff base.safetensors tuned.safetensors
  stx-patch diff llama/ llama-2/ --layers 0:2      of a part
  stx-patch diff a/ b/ --names-only                names, dtypes, shapes and metadata
  stx-patch diff a/ b/ --json

Exit status: 0 equal, 1 different, 2 trouble.
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands."""
    verify = commands.add_parser(
        "verify",
        help="whether files are whole, and what is wrong with them",
        description="Check headers, that tensors cover their file without holes and overlaps, and\n"
        "an index against its files. One line for each file.",
        epilog=_VERIFY_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("path", metavar="FILE|FOLDER|INDEX")
    verify.add_argument(
        "--full",
        action="store_true",
        help="read every byte of every tensor natively and by safetensors, and compare",
    )
    verify.add_argument(
        "--against",
        metavar="SOURCE",
        help="a file, folder or index that has to have every tensor, bit for bit",
    )
    verify.set_defaults(run=run_verify)
    diff = commands.add_parser(
        "diff",
        help="what differs between two files or models",
        description="Compare names, dtypes, shapes, bytes and metadata of two files, folders or\n"
        "indexes. Values are compared bit for bit.",
        epilog=_DIFF_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    diff.add_argument("a", metavar="A", help="a file, a folder or an index")
    diff.add_argument("b", metavar="B", help="another")
    diff.add_argument(
        "--names-only", action="store_true", help="read no tensor: all but the bytes is compared"
    )
    diff.add_argument("--json", action="store_true", help="for programs")
    add_filters(diff)
    diff.set_defaults(run=run_diff)


# --- verify ---


def run_verify(arguments: argparse.Namespace) -> int:
    """Print a line for each file; 1 if one of them does not verify."""
    path = arguments.path
    if arguments.full and not _native.torch_is_ready():
        raise CliError("--full needs PyTorch, which cannot be imported here")
    with ExitStack() as stack:
        source = None
        if arguments.against is not None:
            source = _Source(arguments.against, stack.enter_context(_open_side(arguments.against)))
        verify = functools.partial(_verify_file, arguments.full, source)
        if path.endswith(".json"):
            return _verify_index(path, verify)
        if not os.path.isdir(path):
            return 0 if verify(path).problem is None else 1
        index = _files.index_in(path)
        if index is not None:
            return _verify_index(index, verify)
        found = _files.find_files(path)
        assert found is not None
        return 1 if any([verify(one).problem for one in found.paths]) else 0


class _Source(NamedTuple):
    """What --against names."""

    path: str
    side: _compare.Side


def _open_side(path: str, kept: filters.Filter | None = None) -> _compare.Side:
    """A side of a comparison. CliError for a file that does not verify, naming it."""
    _stock.take()
    try:
        return _compare.Side(path, _filter.make_rule(kept))
    except _stock.SafetensorError as error:
        files = _files.find_files(path)
        for file in [path] if files is None else files.paths:
            problem = _check.check_file(file).problem if os.path.exists(file) else None
            if problem is not None:
                raise CliError(f"{file}: {problem}") from None
        raise CliError(str(error)) from None


def _verify_index(path: str, verify: Callable[[str], _check.Checked]) -> int:
    """The files of an index, and then what it says of them."""
    index = _check.read_index(path)
    held: dict[str, list[str]] = {}
    problems = [] if index.problem is None else [index.problem]
    for file in sorted(set(index.places.values()), key=_files.natural):
        if not os.path.exists(file):
            write(f"{printable(file)}: wrong: it is missing")
            problems.append(f"{_file_name(file)} is missing")
            continue
        checked = verify(file)
        if checked.names is not None:
            held[file] = checked.names
        if checked.problem is not None:
            problems.append(f"{_file_name(file)} does not verify")
    problems += _check.check_places(index.places, held, _file_name)
    if problems:
        more = "" if len(problems) == 1 else f"; and {len(problems) - 1:,} more"
        write(f"{printable(path)}: wrong: {problems[0]}{more}")
        return 1
    unlisted = sum(name not in index.places for names in held.values() for name in names)
    files = f"{count_text(len(index.places), 'tensor')} in {count_text(len(held), 'file')}"
    note = f"; {count_text(unlisted, 'tensor')} in them not listed" if unlisted else ""
    write(f"{printable(path)}: ok, {files}{note}")
    return 0


def _verify_file(full: bool, source: _Source | None, path: str) -> _check.Checked:
    """Check one file and say so. Its problem may be in its tensors."""
    checked = _check.check_file(path)
    problem, notes = checked.problem, ""
    if problem is None and full:
        with bar("Verifying", checked.data_bytes) as tell:
            problem, plain_count = _compare.check_readings(path, tell)
        notes += "; every byte read natively and by safetensors: the same"
        if plain_count:
            plain = count_text(plain_count, "tensor")
            notes += f" ({plain} as plain bytes: safetensors makes none of torch of such)"
    if problem is None and source is not None:
        problem = _compare_with_source(path, source)
        notes += f"; bit-equal in {printable(source.path)}"
    told = f"{count_text(len(checked.names or ()), 'tensor')}, {size_text(checked.data_bytes)}"
    what = f"ok, {told}{notes}" if problem is None else f"wrong: {problem}"
    write(f"{printable(path)}: {what}")
    return checked._replace(problem=problem)


def _file_name(path: str) -> str:
    return printable(os.path.basename(path))


def _compare_with_source(path: str, source: _Source) -> str | None:
    """Which tensors of a file are not in `source`, bit for bit."""
    problems = []
    with _open_side(path) as part, bar("Comparing", sum(map(part.nbytes, part.entries))) as tell:
        for name in part.entries:
            tell(part.nbytes(name))
            found = _mismatch(part, source.side, name)
            if found is not None:
                problems.append(f"tensor {_check.shown(name)} {found}")
        part.check_unchanged()
    if not problems:
        return None
    more = "" if len(problems) <= _SHOWN_MAX else f"; and {len(problems) - _SHOWN_MAX:,} more"
    return f"against {printable(source.path)}: {'; '.join(problems[:_SHOWN_MAX])}{more}"


def _mismatch(part: _compare.Side, whole: _compare.Side, name: str) -> str | None:
    if name not in whole.entries:
        return "is not in it"
    if part.kind(name) != whole.kind(name):
        return f"is {_kind_text(part, name)}, there {_kind_text(whole, name)}"
    at = _compare.first_difference(part, whole, name)
    return None if at is None else f"differs from its byte {at:,} on"


def _kind_text(side: _compare.Side, name: str) -> str:
    dtype, shape = side.kind(name)
    return f"{dtype} {shape}"


# --- diff ---


class Found(NamedTuple):
    """Something that differs: `a` and `b` are what either has, None for nothing."""

    kind: str  # "only in A", "only in B", "dtype", "shape", "bytes" or "metadata"
    name: str
    a: Any = None
    b: Any = None
    difference: _compare.Difference | None = None


def run_diff(arguments: argparse.Namespace) -> int:
    """Print what differs; 1 if anything does."""
    kept = filter_of(arguments)
    with _open_side(arguments.a, kept) as a, _open_side(arguments.b, kept) as b:
        if kept is not None:
            names = names_in([arguments.a, arguments.b])
            if not a.entries and not b.entries:
                raise nothing_kept(arguments, names)
            check_asked(arguments, names)
        common = a.entries.keys() & b.entries.keys()
        found = list[Found]()
        compared = () if arguments.names_only else common
        # Lines and a bar on one terminal would run into each other.
        is_mixed = all(
            stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr)
        )
        at_once = not (arguments.json or is_mixed)
        with bar("Comparing", sum(map(a.nbytes, compared))) as tell:
            for one in _find_differences(a, b, common, arguments.names_only, tell):
                found.append(one)
                if at_once:
                    write(_line(one))
        if not at_once and not arguments.json:
            for one in found:
                write(_line(one))
        a.check_unchanged()
        b.check_unchanged()
        common_bytes = sum(map(a.nbytes, common))
    if arguments.json:
        write(json.dumps(_as_dict(arguments, found, len(common))))
    else:
        write(_summary(arguments, found, len(common), common_bytes))
    return 1 if found else 0


def _find_differences(
    a: _compare.Side,
    b: _compare.Side,
    common: Set[str],
    names_only: bool,
    tell: Callable[[int], None],
) -> Iterator[Found]:
    """In A's order, then what only B has, then metadata."""
    for name in a.entries:
        if name not in common:
            yield Found("only in A", name, _kind_text(a, name))
            continue
        for kind, ours, theirs in zip(("dtype", "shape"), a.kind(name), b.kind(name), strict=True):
            if ours != theirs:
                yield Found(kind, name, ours, theirs)
        tell(a.nbytes(name))
        if a.kind(name) != b.kind(name) or names_only:
            continue
        if _compare.first_difference(a, b, name) is not None:
            yield Found("bytes", name, difference=_compare.measure(a, b, name))
    for name in b.entries:
        if name not in common:
            yield Found("only in B", name, b=_kind_text(b, name))
    for key in sorted({*a.metadata, *b.metadata}):
        if a.metadata.get(key) != b.metadata.get(key):
            yield Found("metadata", key, a.metadata.get(key), b.metadata.get(key))


def _line(found: Found) -> str:
    name = _check.shown(found.name)
    if found.kind in ("only in A", "only in B"):
        return f"{found.kind}: {name}, {found.a or found.b}"
    if found.difference is not None:
        return f"bytes: {name}: {_difference_text(found.difference)}"
    sides = [
        f"{'none' if value is None else _check.shown(str(value))} in {side}"
        for side, value in (("A", found.a), ("B", found.b))
    ]
    return f"{found.kind}: {name}: {', '.join(sides)}"


def _difference_text(difference: _compare.Difference) -> str:
    if difference.differing is None:
        return "differs"
    elements = count_text(difference.elements, "element")
    text = f"differs in {difference.differing:,} of {elements}"
    if difference.largest is not None:
        text += f", by at most {difference.largest:.6g}"
    if difference.not_finite:
        text += f", {difference.not_finite:,} with a NaN or infinity"
    return text


def _counts(found: list[Found]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for one in found:
        counts[one.kind] = counts.get(one.kind, 0) + 1
    return counts


def _equal_count(found: list[Found], common_count: int) -> int:
    """Tensors in which nothing differs that was compared."""
    return common_count - len(
        {one.name for one in found if one.kind in ("dtype", "shape", "bytes")}
    )


def _summary(
    arguments: argparse.Namespace, found: list[Found], common_count: int, common_bytes: int
) -> str:
    what = " but for bytes, which were not compared" if arguments.names_only else ""
    if not found:
        size = "" if arguments.names_only else f", {size_text(common_bytes)}"
        return f"equal: {count_text(common_count, 'tensor')}{size}{what}"
    counts = [
        f"{count:,} {kind if kind.startswith('only') else f'in {kind}'}"
        for kind, count in _counts(found).items()
    ]
    equal = count_text(_equal_count(found, common_count), "tensor")
    return f"different: {', '.join(counts)}; {equal} equal{what}"


def _as_dict(
    arguments: argparse.Namespace, found: list[Found], common_count: int
) -> dict[str, Any]:
    """What --json prints."""

    def of(kind: str) -> list[Found]:
        return [one for one in found if one.kind == kind]

    return {
        "a": arguments.a,
        "b": arguments.b,
        "equal": not found,
        "bytes_compared": not arguments.names_only,
        "tensors_equal": _equal_count(found, common_count),
        "only_in_a": [one.name for one in of("only in A")],
        "only_in_b": [one.name for one in of("only in B")],
        "dtype": [{"name": one.name, "a": one.a, "b": one.b} for one in of("dtype")],
        "shape": [{"name": one.name, "a": one.a, "b": one.b} for one in of("shape")],
        "bytes": [{"name": one.name, **_numbers(one.difference)} for one in of("bytes")],
        "metadata": [{"key": one.name, "a": one.a, "b": one.b} for one in of("metadata")],
    }


def _numbers(difference: _compare.Difference | None) -> dict[str, Any]:
    assert difference is not None
    largest = difference.largest
    is_number = largest is not None and math.isfinite(largest)  # JSON has no infinity
    return {
        "elements": difference.elements,
        "differing": difference.differing,
        "largest_difference": largest if is_number else None,
        "not_finite": difference.not_finite,
    }
