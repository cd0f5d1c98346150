# SPDX-License-Identifier: Apache-2.0
"""The options that say which tensors a command is about.

A tensor is kept if any of --include, --prefix, --layers and --names-from names it (all are, where
none of these is given) and no --exclude does.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import _filter, filters
from ._cli_errors import CliError, near
from ._cli_text import count_text

_LAYERS = re.compile(r"([0-9]{0,18}):([0-9]{0,18})")
_LAYERS_END = 2**64 - 1
_CANDIDATES_MAX = 5000  # names that a misspelt one is compared with: some 20 us each
_SHOWN_MAX = 8


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Add the options; `filter_of` makes a filter of what is given."""
    group = parser.add_argument_group(
        "which tensors",
        "Those that any of --include, --prefix, --layers and --names-from names, without those\n"
        "that an --exclude names. Each can be given several times.",
    )
    group.add_argument(
        "--include", action="append", metavar="GLOB", help="names that match as a whole (* ? [set])"
    )
    group.add_argument("--exclude", action="append", metavar="GLOB", help="all but these")
    group.add_argument(
        "--prefix",
        action="append",
        metavar="P",
        help="the tensor or module P and all below it: model.layers.1 is never layer 10",
    )
    group.add_argument(
        "--layers",
        action="append",
        metavar="A:B",
        type=_parse_layers,
        help="layers from A up to, not including, B; 4: is from 4 on",
    )
    group.add_argument(
        "--names-from",
        action="append",
        metavar="FILE",
        type=_read_names,
        help="exact names, one a line; - is stdin",
    )


def filter_of(arguments: argparse.Namespace) -> filters.Filter | None:
    """What the options ask for; None where they ask for everything.

    Raises:
        ValueError: a pattern or prefix that cannot be one.
    """
    wanted: list[filters.Filter] = []
    if arguments.include:
        wanted.append(filters.glob(*arguments.include))
    if arguments.prefix:
        wanted.append(filters.prefixes(*arguments.prefix))
    wanted += [filters.layers(*bounds) for bounds in arguments.layers or ()]
    names = names_of(arguments)
    if names is not None:
        wanted.append(filters.names(names))
    kept = filters.any_of(*wanted) if len(wanted) > 1 else wanted[0] if wanted else None
    if not arguments.exclude:
        return kept
    rest = filters.none_of(filters.glob(*arguments.exclude))
    return rest if kept is None else filters.all_of(kept, rest)


def names_of(arguments: argparse.Namespace) -> list[str] | None:
    """The names of --names-from, in order; None where it is not given."""
    if arguments.names_from is None:
        return None
    return list(dict.fromkeys(name for names in arguments.names_from for name in names))


def is_alone(arguments: argparse.Namespace, option: str) -> bool:
    """Whether this is the only one of the options that is given."""
    options = ("include", "exclude", "prefix", "layers", "names_from")
    return [name for name in options if getattr(arguments, name)] == [option]


def nothing_kept(arguments: argparse.Namespace, names: Sequence[str]) -> CliError:
    """What to say where the options keep none of `names`."""
    if not names:
        return CliError("there are no tensors in it")
    text = f"nothing is left of {count_text(len(names), 'tensor')}"
    asked = [*(arguments.prefix or ()), *(arguments.include or ()), *(names_of(arguments) or ())]
    for word in asked[:_SHOWN_MAX]:
        found = _near_names(word, names)
        if found:
            return CliError(f"{text}: no {word}; did you mean {' or '.join(found)}?")
    if arguments.layers and not asked:
        return CliError(f"{text}: {_explain_layers(names)}")
    return CliError(f"{text}: the names begin with {', '.join(top_names(names))}")


def check_asked(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise CliError for a prefix, a name or a glob that nothing is meant by: a typing error beside
    others that are right would be missed."""
    asked: list[tuple[str, filters.Filter]] = []
    if arguments.prefix:
        asked.append(("--prefix", filters.prefixes(*arguments.prefix)))
    if arguments.include:
        asked.append(("--include", filters.glob(*arguments.include)))
    listed = names_of(arguments)
    if listed:
        asked.append(("--names-from", filters.names(listed)))
    for option, wanted in asked:
        for missing in _filter.unmatched(wanted.rule(), list(names)):
            found = _near_names(missing, names) or top_names(names)
            raise CliError(f"{option} {missing}: no such name; there is {', '.join(found)}")


def top_names(names: Iterable[str]) -> list[str]:
    """What the names begin with, as far down as they are one."""
    split = [name.split(".") for name in names]
    depth = 1
    while True:
        tops = {".".join(parts[:depth]): None for parts in split}
        if len(tops) > 1 or all(len(parts) <= depth for parts in split):
            break
        depth += 1
    shown = list(tops)[:_SHOWN_MAX]
    return shown + ["..."] * (len(tops) > len(shown))


def _near_names(word: str, names: Iterable[str]) -> list[str]:
    """Names and modules as deep as `word` that look like it; as many components, to be few."""
    depth = word.rstrip(".").count(".") + 1
    modules = dict.fromkeys(".".join(name.split(".", depth)[:depth]) for name in names)
    return near(word, list(modules)[:_CANDIDATES_MAX])


def _explain_layers(names: Iterable[str]) -> str:
    numbers = set[int]()
    for name in names:
        numbers.update(filters.layers_of(name))
    if not numbers:
        return "no name has a layer with a number"
    return f"the layers are {min(numbers)} to {max(numbers)}"


def _parse_layers(text: str) -> tuple[int, int]:
    found = _LAYERS.fullmatch(text)
    bounds = None if found is None else (int(found[1] or 0), int(found[2] or _LAYERS_END))
    if bounds is None or bounds[0] >= bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of layers such as 0:2 or 4:")
    return bounds


def _read_names(path: str) -> list[str]:
    if path == "-" and sys.stdin is None:
        raise argparse.ArgumentTypeError("there is no standard input to read names from")
    data: Any = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{path} is not a list of names in UTF-8") from None
    return [line.removesuffix("\r") for line in lines if line.strip()]
