# SPDX-License-Identifier: Apache-2.0
"""Filters as plain objects: they compare, pickle, print themselves and have a digest.

    filters.prefixes("model.embed_tokens", "lm_head")
    filters.any_of(filters.layers(0, 2), "model.norm.*")

A combination takes whatever `tensor_filter=` takes. Called with a name, a filter answers itself.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

__all__ = [
    "Filter",
    "all_of",
    "any_of",
    "experts",
    "from_index",
    "glob",
    "indexed",
    "layers",
    "names",
    "none_of",
    "prefixes",
    "regex",
]

_DIGITS_MAX = 20  # of a 64-bit number; int() refuses thousands
_LAYER_WORDS = frozenset(("layers", "layer", "blocks", "block", "h"))
_WEIGHT_WORDS = frozenset(("weight", "weight_packed", "qweight"))


class Filter:
    """The base of all filters. Immutable; equal when class and operands are equal."""

    __slots__ = ("_operands",)

    def __init__(self, *operands: Any) -> None:
        self._operands = operands

    def rule(self) -> tuple[Any, ...]:
        """The normalised form (see stx_patch._filter)."""
        raise NotImplementedError

    def digest(self) -> str:
        """SHA-256 of what this filter means, in hex: equal on every machine for equal filters.

        Raises TypeError when a callable is part of it: code has no digest.
        """
        for operand in self._operands:
            if isinstance(operand, Filter):
                operand.digest()
            elif callable(operand):
                raise TypeError("a filter with a callable in it has no digest")
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def __call__(self, name: str) -> bool:
        from ._filter import TensorKey, matches

        key = name if isinstance(name, TensorKey) else TensorKey(name, "", (), 0, None)
        return matches(self.rule(), key)

    def __repr__(self) -> str:
        return f"filters.{type(self).__name__}({', '.join(map(_stable_repr, self._operands))})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._operands == other._operands

    def __hash__(self) -> int:
        return hash((type(self), repr(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._operands


class prefixes(Filter):
    """Names that are, or lie below, one of the given modules.

    `prefixes("model.layers.1")` means `model.layers.1.` and never layer 10.
    """

    __slots__ = ()

    def __init__(self, *prefixes: str) -> None:
        if "" in prefixes:
            raise ValueError("an empty prefix would keep everything")
        super().__init__(*_all_str(prefixes))

    def rule(self) -> tuple[Any, ...]:
        return ("prefixes", self._operands)


class names(Filter):
    """Exactly these names."""

    __slots__ = ()

    def __init__(self, names: Iterable[str]) -> None:
        if isinstance(names, (str, bytes)):
            raise TypeError("names() takes a collection of names")
        super().__init__(frozenset(_all_str(names)))

    def rule(self) -> tuple[Any, ...]:
        return ("names", self._operands[0])


class glob(Filter):
    """Names that match one of the patterns as a whole (`*`, `?`, `[set]`, `[!set]`)."""

    __slots__ = ()

    def __init__(self, *patterns: str) -> None:
        super().__init__(*_all_str(patterns))

    def rule(self) -> tuple[Any, ...]:
        return ("glob", self._operands)


class regex(Filter):
    """Names in which the regular expression is found (`re.search`; anchor it with ^ and $)."""

    __slots__ = ()

    def __init__(self, pattern: str) -> None:
        re.compile(pattern)
        super().__init__(*_all_str((pattern,)))

    def rule(self) -> tuple[Any, ...]:
        return ("call", re.compile(self._operands[0]).search)


class layers(Filter):
    """Names of the layers from `start` up to, not including, `stop`.

    A layer is a component layers, layer, blocks, block or h followed by an integer. What belongs to
    no layer (embeddings, heads) is left out: combine with `prefixes`.
    """

    __slots__ = ()

    def __init__(self, start: int, stop: int) -> None:
        for bound in (start, stop):
            if isinstance(bound, bool) or not isinstance(bound, int):
                raise TypeError("layers() takes two integers")
        if not 0 <= start <= stop < 2**64:
            raise ValueError(f"layers({start}, {stop}) is no range of layers")
        super().__init__(start, stop)

    def rule(self) -> tuple[Any, ...]:
        return ("layers", *self._operands)


class experts(Filter):
    """All but the weights of other experts: what a rank of an expert-parallel model needs.

    A name belongs to an expert if a component `experts` is followed by an integer, its number. What
    belongs to none (attention, routers, shared experts) is kept: combine with others to narrow it.

    Args:
        ids: the numbers of the experts to keep, such as range(0, 8).
        keep_scales: keep the scales, zero points and biases of all experts: they are small, and
            quantised kernels may need them all. What is left out of another expert is then only
            what ends in weight, weight_packed or qweight.
    """

    __slots__ = ()

    def __init__(self, ids: Iterable[int], keep_scales: bool = True) -> None:
        numbers = frozenset(ids)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError("experts() takes a collection of integers")
            if not 0 <= number < 2**64 - 1:
                raise ValueError(f"{number} is no number of an expert")
        super().__init__(frozenset(map(int, numbers)), bool(keep_scales))

    def rule(self) -> tuple[Any, ...]:
        return ("experts", *self._operands)


class indexed(Filter):
    """What an index lists, in the file where it lists it.

    A tensor of the same name in another listed file is left out: a shard that was reused may hold
    stale ones. In a file that the index does not list, the name alone counts.

    Args:
        weight_map: tensor name -> path of its file; its last component counts.
    """

    __slots__ = ()

    def __init__(self, weight_map: Mapping[str, str]) -> None:
        if not isinstance(weight_map, Mapping):
            raise TypeError("indexed() takes a mapping of names to files")
        names = _all_str(weight_map)
        files = _all_str(weight_map.values())
        super().__init__({n: f.rpartition("/")[2] for n, f in zip(names, files, strict=True)})

    def rule(self) -> tuple[Any, ...]:
        weight_map = self._operands[0]
        return ("index", weight_map, frozenset(weight_map.values()))


def from_index(path: str | os.PathLike[str]) -> indexed:
    """What a `model.safetensors.index.json` lists, in the file where it lists it (`indexed`).

    Raises OSError if it cannot be read, ValueError if it is no such index.
    """
    from ._files import read_index

    return indexed(read_index(path))


class _Combination(Filter):
    __slots__ = ()
    _operation = ""

    def __init__(self, *filters: Any) -> None:
        super().__init__(*map(_frozen, filters))
        self.rule()  # TypeError for what is no filter, here and now

    def rule(self) -> tuple[Any, ...]:
        from ._filter import make_rule

        if None in self._operands:
            raise TypeError("None is no filter")
        return (self._operation, tuple(make_rule(operand) for operand in self._operands))


class all_of(_Combination):
    """Names that every filter keeps. Of nothing: everything."""

    __slots__ = ()
    _operation = "all"


class any_of(_Combination):
    """Names that at least one filter keeps. Of nothing: nothing."""

    __slots__ = ()
    _operation = "any"


class none_of(_Combination):
    """Names that no filter keeps."""

    __slots__ = ()
    _operation = "none"


def is_below(prefix: str, name: str) -> bool:
    """Whether `name` is `prefix` or lies below that module."""
    if not name.startswith(prefix):
        return False
    return len(name) == len(prefix) or prefix.endswith(".") or name[len(prefix)] == "."


def is_in_layers(start: int, stop: int, name: str) -> bool:
    """Whether `name` has a layer component with a number in [start, stop)."""
    return any(start <= number < stop for number in layers_of(name))


def layers_of(name: str) -> list[int]:
    """The numbers of the layer components of `name`."""
    return [number for word, number in _numbered(name.split(".")) if word in _LAYER_WORDS]


def is_of_experts(ids: Set[int], keep_scales: bool, name: str) -> bool:
    """Whether `name` is of one of these experts, of none, or a scale that is wanted."""
    components = name.split(".")
    for word, number in _numbered(components):
        if word == "experts":
            is_wanted = keep_scales and components[-1] not in _WEIGHT_WORDS
            return is_wanted or number in ids
    return True


def _numbered(components: list[str]) -> Iterator[tuple[str, int]]:
    """Each component that is followed by a number, with it."""
    for word, digits in itertools.pairwise(components):
        if digits.isascii() and digits.isdigit():
            significant = digits.lstrip("0")
            yield word, int(significant or "0") if len(significant) <= _DIGITS_MAX else 2**64


def _frozen(operand: Any) -> Any:
    """A container as an immutable one: what a filter means is settled when it is made."""
    if isinstance(operand, (Set, Mapping)):
        return frozenset(operand)
    return tuple(operand) if isinstance(operand, list) else operand


def _all_str(values: Iterable[object]) -> tuple[str, ...]:
    from ._filter import _exact_str

    return tuple(_exact_str(value) for value in values)


def _stable_repr(operand: object) -> str:
    """A repr that is equal for equal operands: sets and dicts are printed in order."""
    if isinstance(operand, dict):
        return "{" + ", ".join(f"{key!r}: {operand[key]!r}" for key in sorted(operand)) + "}"
    if isinstance(operand, (set, frozenset)):
        return "{" + ", ".join(map(repr, sorted(operand))) + "}"
    return repr(operand)
