# SPDX-License-Identifier: Apache-2.0
"""`dtype=`: floating-point tensors as another dtype; others stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def check(dtype: Any) -> None:
    """Raise TypeError for what is neither None nor a floating-point torch.dtype."""
    if dtype is None:
        return
    import torch

    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, not {dtype!r}")


def convert(tensors: Iterable[tuple[str, Any]], dtype: Any) -> Iterator[tuple[str, Any]]:
    """`tensors`, one after the other, as `dtype`; they are closed with the iterator."""
    try:
        for name, tensor in tensors:
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
            del tensor
    finally:
        close = getattr(tensors, "close", None)
        if close is not None:
            close()
