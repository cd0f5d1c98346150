# SPDX-License-Identifier: Apache-2.0
"""One from_pretrained, in a process of its own: `consumer_child.py LIBRARY SIDE CACHE FOLDER`.

Prints JSON: seconds inside from_pretrained, seconds until every parameter was read once after it,
and a digest of all of them.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import system
from bench_child import device_figures, set_cache
from loaders import find_peers, peer

HIDDEN_BYTES = 256 << 20


def loader_of(library: str) -> Callable[[Path], Any]:
    """The library, imported, and what a user of it writes."""
    if library == "transformers":
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.models.llama import modeling_llama  # noqa: F401

        load: Any = AutoModelForCausalLM.from_pretrained
        return lambda folder: load(folder, dtype=torch.bfloat16)
    if library == "diffusers":
        find_peers()
        unet = peer("diffusers").UNet2DConditionModel
        return lambda folder: unet.from_pretrained(str(folder), use_safetensors=True)
    if library == "sentence-transformers":
        from sentence_transformers import SentenceTransformer

        return lambda folder: SentenceTransformer(str(folder), device="cpu")
    raise SystemExit(f"no such library: {library}")


def read_all(model: Any) -> list[Any]:
    """One sum over each parameter and buffer."""
    return [tensor.detach().sum() for tensor in model.state_dict().values()]


def main() -> None:
    """Prepare, measure, print."""
    library, side, cache, folder = *sys.argv[1:4], Path(sys.argv[4])
    import numpy  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch

    load = loader_of(library)
    if side == "ours":
        import stx_patch

        stx_patch.patch()  # after the libraries: they have bound stock's names by now
    paths = sorted(folder.rglob("*.safetensors"))
    size_bytes = sum(path.stat().st_size for path in paths)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        torch.ones(1 << 20).sum()
        set_cache(paths, "warm")
        read_all(load(folder))  # whatever happens once: lazy imports, thread pools
        gc.collect()  # a mapping of that load would keep the files in the page cache
        set_cache(paths, cache)
        system.touch_memory(2 * size_bytes + HIDDEN_BYTES)
        set_cache(paths, cache)
        disk, device = system.disk_bytes(paths[0]), system.device_bytes()
        start = time.perf_counter()
        model = load(folder)
        returned = time.perf_counter()
        sums = read_all(model)
        done = time.perf_counter()
    measured: dict[str, Any] = {
        "return_s": returned - start,
        "read_s": done - start,
        "memory_s": done - start,
        "kept_bytes": size_bytes,
        "digest": repr([float(each) for each in sums]),
        **device_figures(device, disk, paths[0]),
    }
    if side == "ours":
        stats = stx_patch.stats()
        if stats.fallbacks or not stats.tensors_native:
            raise SystemExit(f"not loaded natively: {stats.fallbacks}")
    measured["version"] = system.version_of(library)
    print(json.dumps(measured), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
