# SPDX-License-Identifier: Apache-2.0
"""`dtype=`: floating-point tensors as another dtype; others stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

# Of safetensors' dtypes, in its own order.
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


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
