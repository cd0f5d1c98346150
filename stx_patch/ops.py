# SPDX-License-Identifier: Apache-2.0
"""Importing this module registers our torch operators:

    torch.ops.stx_patch.read_into(target, path, offset)

fills a contiguous tensor with the bytes of a file from `offset` on, whatever they are, on the CPU
or a CUDA device. Compiled code may call it: it has a fake implementation.

Raises (when it is called):
    OSError: the file cannot be read, or ends before the tensor is full.
    ValueError: a tensor that is not contiguous, or a negative offset.
    MemoryError, RuntimeError: no memory; what a device's runtime refuses.
"""

from __future__ import annotations

from typing import Any

import torch

from . import _device, _native, _options

__all__ = ["read_into"]

_NAME = "stx_patch::read_into"


def _check(target: Any, offset: int) -> None:
    if not target.is_contiguous():
        raise ValueError("read_into: the target has to be contiguous")
    if offset < 0:
        raise ValueError(f"read_into: the offset has to be 0 or more, not {offset}")


def _read(target: Any, path: str, offset: int, device: int, stream: int) -> None:
    _check(target, offset)
    if _native.core is None:
        raise RuntimeError(f"stx_patch has no native core here ({_native.import_error})")
    staging_bytes = _options.from_environment({}).staging
    address = target.data_ptr()
    _native.core.read_into(path, offset, target.nbytes, address, device, stream, staging_bytes)


def _read_on_cpu(target: Any, path: str, offset: int) -> None:
    _read(target, path, offset, -1, 0)


def _read_on_cuda(target: Any, path: str, offset: int) -> None:
    index = target.device.index
    _read(target, path, offset, index, _device.cuda.stream(index).cuda_stream)


def _read_fake(target: Any, path: str, offset: int) -> None:
    _check(target, offset)


torch.library.define(_NAME, "(Tensor(a!) target, str path, int offset) -> ()")
torch.library.impl(_NAME, "CPU", _read_on_cpu)
torch.library.impl(_NAME, "CUDA", _read_on_cuda)
torch.library.register_fake(_NAME, _read_fake)

read_into = torch.ops.stx_patch.read_into
