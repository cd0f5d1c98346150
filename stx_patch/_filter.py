# SPDX-License-Identifier: Apache-2.0
"""What a `tensor_filter` may be, and what it means.

Every form is normalised once into a *rule*, nested tuples that the C core evaluates for each
header entry (csrc/py_filter.c lists them) and that `matches` evaluates in Python where stock serves
a file. Both give the same answers.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, Union

from . import filters

_DEPTH_MAX = 24

Rule = tuple[Any, ...]
TensorFilter = Union[
    None, str, "list[str]", "tuple[str, ...]", "Set[str]", "Mapping[str, Any]",
    "filters.Filter", "Callable[[TensorKey], Any]",
]  # fmt: skip


class TensorKey(str):
    """What a filter is asked about: the tensor's name, a `str`, with the header's facts on it.

    Attributes:
        dtype: as the header spells it, such as "BF16".
        shape: a tuple of int.
        nbytes: size in the file, in bytes.
        filename: the path it was opened by; None where there is no file.
    """

    __slots__ = ("dtype", "filename", "nbytes", "shape")

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    filename: str | None

    def __new__(
        cls, name: str, dtype: str, shape: tuple[int, ...], nbytes: int, filename: str | None
    ) -> TensorKey:
        key = super().__new__(cls, name)
        key.dtype = dtype
        key.shape = shape
        key.nbytes = nbytes
        key.filename = filename
        return key

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (str(self), self.dtype, self.shape, self.nbytes, self.filename)
        return TensorKey, fields


def make_rule(tensor_filter: TensorFilter) -> Rule | None:
    """Normalise a filter. None means: keep everything.

    Raises TypeError for anything that is no filter, so that a mistake shows where it was made and
    not inside some library's load.
    """
    if tensor_filter is None:
        return None
    if isinstance(tensor_filter, filters.Filter):
        rule = tensor_filter.rule()
        _check_depth(rule, 0)
        return rule
    if isinstance(tensor_filter, str):
        return ("glob", (_exact_str(tensor_filter),))
    if isinstance(tensor_filter, (list, tuple)):
        return ("glob", tuple(_exact_str(pattern) for pattern in tensor_filter))
    if isinstance(tensor_filter, (Set, Mapping)):
        return ("names", frozenset(_exact_str(name) for name in tensor_filter))
    if callable(tensor_filter):
        return ("call", tensor_filter)
    raise TypeError(
        "tensor_filter must be a callable, a glob or a list of globs, a set of names or a "
        f"filters.* object, not {type(tensor_filter).__name__}"
    )


def _check_depth(rule: Rule, depth: int) -> None:
    """The core nests so far (csrc/py_filter.c, with room for our own combinations)."""
    if depth > _DEPTH_MAX:
        raise ValueError(f"filters are nested more than {_DEPTH_MAX} deep")
    if rule[0] in ("all", "any", "none"):
        for child in rule[1]:
            _check_depth(child, depth + 1)


def make_keys_rule(include_keys: Iterable[str], argument: str = "include_keys") -> Rule:
    """The rule of `include_keys=`, or of another argument: exact names."""
    if isinstance(include_keys, (str, bytes)) or not isinstance(include_keys, Iterable):
        raise TypeError(
            f"{argument} must be a collection of names, not {type(include_keys).__name__}"
        )
    return ("names", frozenset(_exact_str(name) for name in include_keys))


def asks_python(rule: Rule) -> bool:
    """Whether a callable is part of `rule` that may look at more than the name: no regex."""
    if rule[0] in ("all", "any", "none"):
        return any(asks_python(child) for child in rule[1])
    return rule[0] == "call" and not isinstance(getattr(rule[1], "__self__", None), re.Pattern)


def both(first: Rule | None, second: Rule | None) -> Rule | None:
    """The rule that keeps what both keep."""
    if first is None or second is None:
        return second if first is None else first
    return ("all", (first, second))


def matches(rule: Rule, key: TensorKey) -> bool:
    """Whether `rule` keeps `key`. The Python twin of csrc/py_filter.c."""
    operation: str = rule[0]
    operand = rule[1]
    if operation == "call":
        return bool(operand(key))
    if operation == "names":
        return str(key) in operand
    if operation == "glob":
        return any(match_glob(pattern, key) for pattern in operand)
    if operation == "prefixes":
        return any(filters.is_below(prefix, key) for prefix in operand)
    if operation == "layers":
        return filters.is_in_layers(rule[1], rule[2], key)
    if operation == "experts":
        return filters.is_of_experts(rule[1], rule[2], key)
    if operation == "index":
        file = (getattr(key, "filename", None) or "").rpartition("/")[2]
        return key in operand and (file not in rule[2] or bool(operand[key] == file))
    for child in operand:  # no generator: it would turn a callable's StopIteration into another
        decided = matches(child, key)
        if operation == "all" and not decided:
            return False
        if operation != "all" and decided:
            return operation == "any"
    return operation != "any"


def match_glob(pattern: str, name: str) -> bool:
    """A name equal to the pattern matches before the pattern is read as a glob."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def unmatched(rule: Rule | None, names: list[str]) -> list[str]:
    """The exact names, patterns and prefixes in `rule` that match none of `names`."""
    if rule is None:
        return []
    operation, operand = rule[0], rule[1]
    if operation in ("names", "index"):
        return sorted(set(operand) - set(names))
    if operation == "glob":
        return [p for p in operand if not any(match_glob(p, name) for name in names)]
    if operation == "prefixes":
        return [p for p in operand if not any(filters.is_below(p, name) for name in names)]
    if operation in ("all", "any"):
        return [text for child in operand for text in unmatched(child, names)]
    return []


def _exact_str(value: object) -> str:
    """`value` as a plain str that UTF-8 can spell; TypeError or ValueError otherwise."""
    if not isinstance(value, str):
        raise TypeError(f"a filter's names and patterns are str, not {type(value).__name__}")
    value.encode()  # a name that is no UTF-8 is in no file: say so now
    return str.__str__(value)  # the text itself, whatever a subclass says of it
