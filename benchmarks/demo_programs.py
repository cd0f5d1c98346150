# SPDX-License-Identifier: Apache-2.0
"""The programs of the demo, each run in a fresh process: `demo_programs.py PROGRAM MODE DATA`.

MODE is stock, before (patched before the libraries are imported) or after. Each program prints one
line of JSON: seconds of its load, a digest of all it loaded and computed, and our counters. The
programs themselves are unmodified user code: only `main` knows about stx_patch.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from system import device_bytes, drop_cache

Result = dict[str, Any]
SENTENCES = ["A loader should be boring.", "Read only what is needed.", "Wrong weights are worse."]


def digest_tensors(named: Iterator[tuple[str, Any]]) -> str:
    """One digest over names, shapes and bytes, in the order of the names."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(flat.numpy()))
    return digest.hexdigest()


def run_minilm(data: Path, timed: Callable[[], float]) -> Result:
    """The real MiniLM weights, through sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    start = timed()
    model = SentenceTransformer(str(data), device="cpu")
    seconds = timed() - start
    embeddings = model.encode(SENTENCES, convert_to_tensor=True)
    named = [*model.state_dict().items(), ("embeddings", embeddings)]
    return {"seconds": seconds, "digest": digest_tensors(iter(named))}


def run_llama(data: Path, timed: Callable[[], float]) -> Result:
    """A Llama-shaped model of about 1 GB in four shards, through transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    start = timed()
    model = AutoModelForCausalLM.from_pretrained(data, dtype=torch.bfloat16)
    seconds = timed() - start
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits
    named = [*model.state_dict().items(), ("logits", logits)]
    return {"seconds": seconds, "digest": digest_tensors(iter(named))}


def run_many(data: Path, timed: Callable[[], float]) -> Result:
    """20,000 small tensors in one file, through safetensors.torch.load_file."""
    from safetensors.torch import load_file

    start = timed()
    tensors = load_file(data)
    seconds = timed() - start
    return {"seconds": seconds, "digest": digest_tensors(iter(tensors.items()))}


def run_cold_part(
    data: Path, timed: Callable[[], float], names: list[str], filtered: bool
) -> Result:
    """Two layers of the Llama from a cold cache, everything read: by a filter, or name by name."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    shards = sorted(data.glob("*.safetensors"))
    cached = sum(drop_cache(shard) for shard in shards)
    read_before, start = device_bytes(), timed()
    tensors: dict[str, Any] = {}
    for shard in shards:
        if filtered:
            tensors.update(load_file(shard))
        else:
            with safe_open(shard, framework="pt") as file:
                here = [name for name in file.keys() if name in names]  # noqa: SIM118
                tensors.update((name, file.get_tensor(name)) for name in here)
    for tensor in tensors.values():
        tensor.sum()
    return {
        "seconds": timed() - start,
        "device_bytes": device_bytes() - read_before,
        "cached_before": cached,
        "digest": digest_tensors(iter(tensors.items())),
    }


def warm_up(program: str) -> None:
    """Do the libraries' lazy imports, which are no part of a load."""
    import numpy  # noqa: F401
    import torch

    torch.ones(4).sum()
    if program == "minilm":
        import sentence_transformers  # noqa: F401
    if program == "llama":
        from transformers import AutoModelForCausalLM  # noqa: F401
        from transformers.models.llama import modeling_llama  # noqa: F401
    import safetensors.torch  # noqa: F401


def main() -> None:
    """Run one program in one mode."""
    program, mode, data = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    programs = {"minilm": run_minilm, "llama": run_llama, "many": run_many}
    import stx_patch

    parts = stx_patch.filters.layers(0, 2)
    if mode == "before":
        stx_patch.patch()
    warm_up(program)
    if mode == "after":
        stx_patch.patch()
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        if program == "part":
            index = json.loads((data / "model.safetensors.index.json").read_text())
            names = [name for name in index["weight_map"] if parts(name)]
            if mode == "filter":
                stx_patch.patch(tensor_filter=parts)
            result = run_cold_part(data, time.perf_counter, names, mode == "filter")
        else:
            result = programs[program](data, time.perf_counter)
    print(json.dumps({**result, "stats": stx_patch.stats().as_dict()}))


if __name__ == "__main__":
    main()
