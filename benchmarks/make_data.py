# SPDX-License-Identifier: Apache-2.0
"""Files to measure with: random, fully written, synced; made once, kept in benchmarks/data/.

    make_data.py [SET ...]

STX_BENCH_DATA names another folder, STX_BENCH_FACTOR (such as 0.01) makes everything smaller: for
trying the scripts, not for numbers. Models for bench_consumers.py are made here, too.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("STX_BENCH_DATA", Path(__file__).with_name("data")))
FACTOR = float(os.environ.get("STX_BENCH_FACTOR", "1"))


@dataclass(frozen=True)
class Set:
    """Equal tensors in one file, or in `shards` files of a folder with an index."""

    text: str
    count: int
    elements: int  # of each
    dtype: str  # float32 or int64
    shards: int = 0

    @property
    def tensor_bytes(self) -> int:
        """The size of one tensor."""
        return self.elements * (4 if self.dtype == "float32" else 8)

    def wanted(self, part: str) -> list[int]:
        """The tensors of a part, by number: "whole", or every fourth."""
        return list(range(0, self.count, 1 if part == "whole" else 4))


def _fewer(count: int) -> int:
    return max(16, int(count * FACTOR))


def _smaller(elements: int) -> int:
    return max(64, int(elements * FACTOR))


SETS: dict[str, Set] = {
    "tiny": Set("100,000 x 64 B", _fewer(100_000), 16, "float32"),
    "small": Set("20,000 x 50 KiB", _fewer(20_000), 12_800, "float32"),  # 1 GB
    "medium": Set("256 x 8 MiB", 256, _smaller(1 << 20), "int64"),  # 2 GiB
    "large": Set("4 GiB in 300", 300, _smaller(1_789_569), "int64"),
    "shards": Set("4 shards of 1 GiB", 300, _smaller(1_789_569), "int64", shards=4),
}
MODELS = ("llama", "llama-sharded", "unet", "minilm")


def tensor_name(index: int) -> str:
    """Names as mixture-of-experts checkpoints have them."""
    return f"model.layers.{index // 1000:03d}.experts.{index % 1000:03d}.weight"


def data_files(name: str) -> list[Path]:
    """The files of one of SETS, made if they are not there."""
    return set_files(name, SETS[name])


def set_files(name: str, kind: Set) -> list[Path]:
    """The files of a set under a name, made if they are not there."""
    if not kind.shards:
        paths = [FOLDER / f"{name}.safetensors"]
    else:
        stem = FOLDER / name / "model"
        paths = [
            Path(f"{stem}-{i + 1:05d}-of-{kind.shards:05d}.safetensors") for i in range(kind.shards)
        ]
    per_file = kind.count // len(paths)
    for number, path in enumerate(paths):
        data = per_file * kind.tensor_bytes
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, kind, range(number * per_file, (number + 1) * per_file))
        elif not data <= path.stat().st_size <= data + 300 * per_file + 4096:
            raise SystemExit(f"{path} was made with another size or STX_BENCH_FACTOR: remove it")
    index = FOLDER / name / "model.safetensors.index.json"
    if kind.shards and not index.exists():
        names = {tensor_name(i): paths[i // per_file].name for i in range(kind.count)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return paths


def warm_up_file() -> Path:
    """A file of one small tensor, for whatever a process does at its first load."""
    path = FOLDER / "warm-up.safetensors"
    if not path.exists():
        import torch
        from safetensors.torch import save_file

        FOLDER.mkdir(parents=True, exist_ok=True)
        save_file({tensor_name(0): torch.ones(4)}, path)
    return path


def sync(path: Path) -> None:
    """To the disk, all of it; SystemExit for a file with holes."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    status = path.stat()
    if status.st_blocks * 512 < status.st_size:
        raise SystemExit(f"{path} is not fully on disk")


def _write(path: Path, kind: Set, numbers: range) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(numbers.start)
    make: Callable[..., Any] = torch.randn if kind.dtype == "float32" else _random_integers
    block = make(kind.elements, generator=generator)
    # Differs everywhere, without drawing billions of numbers.
    tensors = {tensor_name(i): block + i for i in numbers}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    sync(partial)
    partial.rename(path)


def _random_integers(elements: int, generator: Any) -> Any:
    import torch

    return torch.randint(0, 2**62, (elements,), generator=generator)


# --- models ---


def model_folder(name: str) -> Path:
    """The folder of one of MODELS, made if it is not there."""
    target = FOLDER / f"model-{name}"
    if not target.exists():
        partial = FOLDER / f"partial-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        FOLDER.mkdir(parents=True, exist_ok=True)
        makers: dict[str, Callable[[Path], None]] = {
            "llama": lambda folder: _make_llama(folder, "100GB"),
            "llama-sharded": lambda folder: _make_llama(folder, "300MB"),
            "unet": _make_unet,
            "minilm": _copy_minilm,
        }
        makers[name](partial)
        for path in partial.rglob("*.safetensors"):
            sync(path)
        partial.rename(target)
    return target


def _make_llama(target: Path, max_shard_size: str) -> None:
    """A Llama-shaped model with random weights, about 1 GB in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    scale = 1 if FACTOR >= 1 else 8
    config = LlamaConfig(
        hidden_size=2048 // scale,
        intermediate_size=5632 // scale,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32_000 // scale,
    )
    make: Any = AutoModelForCausalLM.from_config
    model = make(config, dtype=torch.bfloat16)
    model.save_pretrained(target, max_shard_size=max_shard_size if scale == 1 else "4MB")


def _make_unet(target: Path) -> None:
    """A UNet of diffusers with random weights, about 1 GB in float32."""
    import torch
    from loaders import find_peers, peer

    find_peers()
    torch.manual_seed(0)
    widths = (192, 384, 768, 768) if FACTOR >= 1 else (32, 32, 64, 64)
    make = peer("diffusers").UNet2DConditionModel
    make(block_out_channels=widths, cross_attention_dim=768).save_pretrained(target)


def _copy_minilm(target: Path) -> None:
    """The real MiniLM, 90 MB, out of the package that ships it."""
    from demo import find_minilm

    shutil.copytree(find_minilm(), target)


if __name__ == "__main__":
    for each in sys.argv[1:] or SETS:
        print(*data_files(each), sep="\n")
