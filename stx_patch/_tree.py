# SPDX-License-Identifier: Apache-2.0
"""Tensors as a tree of modules, in which siblings that look the same are one row.

A name is cut at its dots; the last component names a tensor of the module that the others name. A
module knows its *structure*: a number that is equal for modules with the same names, dtypes and
shapes below them. Numbered siblings of equal structure are walked together, as one row that stands
for all of them, so each tensor is still looked at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ._files import natural
from ._headers import Tensor

_COMPONENTS_MAX = 64  # of a module; what is beyond stays in the last one
_DIGITS_MAX = 18
_RUNS_MAX = 6  # of numbers in a label
_NOWHERE = (1 << 64, 0)


class Module:
    """What the names with one beginning share: tensors, modules, and sums over all of it."""

    __slots__ = (
        "count",
        "dtypes",
        "files",
        "modules",
        "place",
        "size_bytes",
        "structure",
        "tensors",
    )

    def __init__(self) -> None:
        self.modules: dict[str, Module] = {}
        self.tensors: list[tuple[str, Tensor]] = []  # a name twice where two files have it
        self.count = 0
        self.size_bytes = 0
        self.dtypes = 0  # a bit for each, as in Tree
        self.files = 0  # a bit for each file's number
        self.place = _NOWHERE  # of the first tensor: file, offset
        self.structure = 0


class Row(NamedTuple):
    """A line of the tree: a tensor, a module, or several of equal structure.

    Attributes:
        depth: of the line, from 0.
        label: components of names, with how many of them the line stands for.
        tensors, size_bytes: how many tensors the line stands for, and their size.
        dtypes: their dtypes, sorted.
        shape: of each tensor; None for modules.
        files: their files' numbers.
    """

    depth: int
    label: str
    tensors: int
    size_bytes: int
    dtypes: list[str]
    shape: list[int] | None
    files: list[int]


class View(NamedTuple):
    """How a tree is shown.

    Attributes:
        depth: how many levels, None for all.
        sort: siblings by "name", by "size", largest first, or by their place in the "file".
        fold: whether numbered siblings of equal structure are one row.
    """

    depth: int | None = None
    sort: str = "name"
    fold: bool = True


class Branch(NamedTuple):
    """What one line stands for: tensors of one dtype and shape, or modules of one structure."""

    label: str
    tensors: list[Tensor]
    modules: list[Module]


class Tree:
    """The tree of `tensors`."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._dtypes: dict[str, int] = {}  # dtype -> its bit
        self._structures: dict[Any, int] = {}
        self._root = Module()
        known: dict[str, Module] = {}
        for tensor in tensors:
            path, dot, last = tensor[0].rpartition(".")
            module = known.get(path)
            if module is None:
                module = known[path] = self._find(path) if dot else self._root
            module.tensors.append((last, tensor))
        self._sum_up(self._root)

    def rows(self, view: View) -> Iterator[Row]:
        """The lines from top to bottom."""
        return self._rows_below([self._root], 0, view)

    def _find(self, path: str) -> Module:
        module = self._root
        for component in path.split(".", _COMPONENTS_MAX):
            below = module.modules.get(component)
            if below is None:
                below = module.modules[component] = Module()
            module = below
        return module

    def _sum_up(self, module: Module) -> None:
        """Fill in the sums and the structure; what is equal comes to stand at equal places."""
        count, size_bytes, dtypes, files, place = len(module.tensors), 0, 0, 0, _NOWHERE
        structure: list[Any] = [count]
        if count > 1:
            module.tensors.sort(key=lambda pair: (pair[0], pair[1].file))
        for last, (_name, dtype, shape, begin_bytes, end_bytes, file) in module.tensors:
            size_bytes += end_bytes - begin_bytes
            dtypes |= self._dtypes.setdefault(dtype, 1 << len(self._dtypes))
            files |= 1 << file
            if (file, begin_bytes) < place:
                place = (file, begin_bytes)
            structure.append((last, dtype, *shape))
        if len(module.modules) > 1:
            module.modules = dict(sorted(module.modules.items()))
        for component, below in module.modules.items():
            self._sum_up(below)
            count += below.count
            size_bytes += below.size_bytes
            dtypes |= below.dtypes
            files |= below.files
            if below.place < place:
                place = below.place
            structure.append((component, below.structure))
        module.count, module.size_bytes = count, size_bytes
        module.dtypes, module.files, module.place = dtypes, files, place
        module.structure = self._structures.setdefault(tuple(structure), len(self._structures))

    def _rows_below(self, modules: list[Module], depth: int, view: View) -> Iterator[Row]:
        """The lines below modules of equal structure, which are shown as one."""
        if depth == view.depth:
            return
        branches = [_follow(branch, view.fold) for branch in _branches(modules, view.fold)]
        branches.sort(key=_ORDERS[view.sort])
        for label, tensors, below in branches:
            times = (len(tensors) or len(below)) // len(modules)
            label = f"{label} ({times}x)" if times > 1 else label or '""'
            if tensors:
                yield _tensor_row(depth, label, tensors)
            else:
                yield self._module_row(depth, label, below)
                yield from self._rows_below(below, depth + 1, view)

    def _module_row(self, depth: int, label: str, modules: list[Module]) -> Row:
        dtypes = files = 0
        for module in modules:
            dtypes |= module.dtypes
            files |= module.files
        return Row(
            depth,
            label,
            sum(module.count for module in modules),
            sum(module.size_bytes for module in modules),
            sorted(dtype for dtype, bit in self._dtypes.items() if dtypes & bit),
            None,
            [number for number in range(files.bit_length()) if files >> number & 1],
        )


def _tensor_row(depth: int, label: str, tensors: list[Tensor]) -> Row:
    _name, dtype, shape, begin_bytes, end_bytes, file = tensors[0]
    files = [file] if len(tensors) == 1 else sorted({tensor.file for tensor in tensors})
    size_bytes = (end_bytes - begin_bytes) * len(tensors)
    return Row(depth, label, len(tensors), size_bytes, [dtype], shape, files)


def _branches(modules: list[Module], fold: bool) -> list[Branch]:
    """What stands directly below modules of equal structure; numbers that look the same, once."""
    branches = []
    groups: dict[Any, list[int]] = {}  # what looks the same -> the places of its tensors
    for place, (last, tensor) in enumerate(modules[0].tensors):
        key = (tensor.dtype, *tensor.shape) if fold and _is_number(last) else place
        groups.setdefault(key, []).append(place)
    for places in groups.values():
        label = _label([modules[0].tensors[place][0] for place in places])
        tensors = [module.tensors[place][1] for place in places for module in modules]
        branches.append(Branch(label, tensors, []))
    alike: dict[int | str, list[str]] = {}
    for component, below in modules[0].modules.items():
        same = below.structure if fold and _is_number(component) else component
        alike.setdefault(same, []).append(component)
    for components in alike.values():
        found = [module.modules[component] for component in components for module in modules]
        branches.append(Branch(_label(components), [], found))
    return branches


def _follow(branch: Branch, fold: bool) -> Branch:
    """Go down as long as there is one way, so that it makes one line."""
    while branch.modules:
        below = _branches(branch.modules, fold)
        if len(below) != 1:
            break
        branch = below[0]._replace(label=f"{branch.label}.{below[0].label}")
    return branch


def _is_number(component: str) -> bool:
    if not (component.isascii() and component.isdigit() and len(component) <= _DIGITS_MAX):
        return False
    return component[0] != "0" or component == "0"


def _label(components: list[str]) -> str:
    """One component, or the runs of several numbers: "0-2,5,7-9"."""
    if len(components) == 1:
        return components[0]
    runs: list[list[int]] = []
    for number in sorted(map(int, components)):
        if runs and runs[-1][1] >= number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [f"{begin}-{end}" if end > begin else str(begin) for begin, end in runs[:_RUNS_MAX]]
    return ",".join(shown + ["..."] * (len(runs) > _RUNS_MAX))


def _size(branch: Branch) -> int:
    tensors = sum(tensor.end_bytes - tensor.begin_bytes for tensor in branch.tensors)
    return tensors + sum(module.size_bytes for module in branch.modules)


def _place(branch: Branch) -> tuple[int, int]:
    tensors = [(tensor.file, tensor.begin_bytes) for tensor in branch.tensors]
    return min(tensors or [module.place for module in branch.modules])


_ORDERS: dict[str, Callable[[Branch], Any]] = {
    "name": lambda branch: natural(branch.label),
    "size": lambda branch: -_size(branch),
    "file": _place,
}
