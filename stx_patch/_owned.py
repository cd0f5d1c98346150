# SPDX-License-Identifier: Apache-2.0
"""Slices of a file that is read instead of mapped (`backend="pread"`): only the rows they need.

Which rows an index needs is found out here. Whatever stock words in its own way, or refuses, is not
known here and stays stock's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_WHOLE = slice(None)


def plan_rows(shape: Sequence[int], index: Any) -> tuple[int, int, tuple[Any, ...]] | None:
    """What an index takes of a tensor of at least one dimension.

    Returns:
        The first row, the number of rows, and the index that these rows are then to be given; None
        if stock is to judge.
    """
    items = _spell_out(index if isinstance(index, tuple) else (index,), len(shape))
    if items is None or not all(map(_is_plain, items, shape)):
        return None
    row = items[0]
    if isinstance(row, slice):
        start = row.start or 0
        stop = shape[0] if row.stop is None else row.stop
        return start, stop - start, (slice(None, None, row.step), *items[1:])
    return row % shape[0], 1, (0, *items[1:])


def _spell_out(items: tuple[Any, ...], rank: int) -> list[Any] | None:
    """One item per dimension, without `...`."""
    dots = [place for place, item in enumerate(items) if item is Ellipsis]
    missing = rank - (len(items) - len(dots))
    if len(dots) > 1 or missing < 0:
        return None
    place = dots[0] if dots else len(items)
    behind = items[place + 1 :] if dots else ()
    return [*items[:place], *[_WHOLE] * missing, *behind]


def _is_plain(item: Any, extent: int) -> bool:
    """Whether stock takes this item for this dimension, in the way torch does."""
    if type(item) is int:
        return -extent <= item < extent
    if type(item) is not slice:
        return False
    start = 0 if item.start is None else item.start
    stop = extent if item.stop is None else item.stop
    step = 1 if item.step is None else item.step
    if not (type(start) is type(stop) is type(step) is int):
        return False
    return 0 <= start <= stop <= extent and start < extent and step >= 1


def take(entry: Any, shape: Sequence[int], index: Any) -> Any:
    """`entry[index]`, with exactly its own bytes; NotImplemented if stock is to judge."""
    import torch

    planned = plan_rows(shape, index)
    if planned is None:
        return NotImplemented
    first, count, rest = planned
    rows = entry._rows(first, count)
    found = rows[rest]
    size_bytes = found.nbytes
    if size_bytes == 0:
        return torch.zeros(found.shape, dtype=found.dtype)
    if size_bytes == rows.nbytes:
        return rows.view(found.shape)  # steps over single elements leave odd strides
    if found.dtype is torch.bool:  # copying bool values would make every byte 0 or 1
        found = found.view(torch.uint8)
    memory = torch.frombuffer(bytearray(size_bytes), dtype=found.dtype)
    return memory.reshape(found.shape).copy_(found).view(rows.dtype)
