# SPDX-License-Identifier: Apache-2.0
"""Files to measure with: random, fully written, synced; made once, kept in benchmarks/data/.

STX_BENCH_DATA names another folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("STX_BENCH_DATA", Path(__file__).with_name("data")))

Shapes = tuple[int, int, str]  # tensors, elements of each, torch dtype

SETS: dict[str, Shapes] = {
    "tiny": (100_000, 16, "float32"),
    "small": (20_000, 12_800, "float32"),  # 50 KiB each, 1 GB
    "large": (300, 1_789_569, "int64"),  # 4 GiB
    "medium": (256, 1 << 20, "int64"),  # 8 MiB each, 2 GiB
}


def tensor_name(index: int) -> str:
    """Names as mixture-of-experts checkpoints have them."""
    return f"model.layers.{index // 1000:03d}.experts.{index % 1000:03d}.weight"


def data_file(name: str) -> Path:
    """The file of one set, made if it is not there."""
    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        _write(path, *SETS[name])
    return path


def _write(path: Path, count: int, elements: int, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    make: Callable[..., Any] = torch.randn if dtype == "float32" else _random_integers
    block = make(elements, generator=generator)
    # Differs everywhere, without drawing billions of numbers.
    tensors = {tensor_name(i): block + i for i in range(count)}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    status = partial.stat()
    if status.st_blocks * 512 < status.st_size:
        raise SystemExit(f"{partial} is not fully on disk")
    partial.rename(path)


def _random_integers(elements: int, generator: Any) -> Any:
    import torch

    return torch.randint(0, 2**62, (elements,), generator=generator)


if __name__ == "__main__":
    for each in SETS:
        print(data_file(each))
