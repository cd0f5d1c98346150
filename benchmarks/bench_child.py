# SPDX-License-Identifier: Apache-2.0
"""One measurement of a load, in a process of its own: `bench_child.py SPECIFICATION` prints JSON.

The specification, JSON, too: loader and options (loaders.py), data and part (make_data.py), cache
("cold" or "warm"), consumer ("sum", or "copy" into tensors that exist), and do: "time", "memory"
(the parent samples this process; it sends a line when it is ready) or "prepare".
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import loaders
from make_data import SETS, data_files, tensor_name, warm_up_file
from system import (
    cached_share,
    device_bytes,
    disk_bytes,
    drop_cache,
    private_bytes,
    touch_memory,
    warm_file,
)

HIDDEN_BYTES = 256 << 20  # what a load may need beside the tensors


def sum_all(pairs: loaders.Pairs) -> None:
    """One sum over each tensor, the same for every loader."""
    for _, tensor in pairs:
        tensor.sum()


def copy_all(pairs: loaders.Pairs, model: dict[str, Any]) -> None:
    """Each tensor into the one of a model, as load_state_dict does it."""
    for name, tensor in pairs:
        model[name].copy_(tensor)


def digest_all(pairs: loaders.Pairs) -> tuple[int, int]:
    """How many tensors, and a sum of all of their bits."""
    import torch

    count = total = 0
    for name, tensor in pairs:
        count += 1
        weight = sum(name.encode())  # a tensor under another's name is seen
        # In pieces: a sum of integers makes a wider copy first, and that is no memory of a loader.
        for piece in tensor.view(torch.int32).flatten().split(1 << 18):
            total += weight * int(piece.sum())
    return count, total % (1 << 64)


def make_model(specification: dict[str, Any]) -> dict[str, Any]:
    """Tensors to copy into, touched."""
    import torch

    kind = SETS[specification["data"]]
    dtype = torch.float32 if kind.dtype == "float32" else torch.int64
    return {
        tensor_name(i): torch.zeros(kind.elements, dtype=dtype).fill_(1)
        for i in kind.wanted(specification["part"])
    }


def set_cache(paths: list[Path], cache: str) -> None:
    """Make the files cold or warm, and see to it that they are."""
    for path in paths:
        if cache == "cold":
            drop_cache(path)
        else:
            warm_file(path)
    share = cached_share(paths)
    if (cache == "cold" and share > 0.01) or (cache == "warm" and share < 0.99):
        raise SystemExit(f"not {cache}: {share:.1%} of {paths[0].name} is in the page cache")


def measure(specification: dict[str, Any]) -> dict[str, Any]:
    """Prepare, load, consume."""
    import numpy  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch

    kind = SETS[specification["data"]]
    numbers = kind.wanted(specification["part"])
    wanted = None if specification["part"] == "whole" else frozenset(map(tensor_name, numbers))
    kept = len(numbers) * kind.tensor_bytes
    cold = specification["cache"] == "cold"
    loader = loaders.make(specification["loader"], specification["options"])
    small = warm_up_file()
    sources = data_files(specification["data"])
    paths = [loader.file_of(path) for path in sources]

    # Whatever a process does once: lazy imports, thread pools, a first load.
    torch.ones(1 << 20).sum()
    torch.empty(1 << 20).copy_(torch.ones(1 << 20))
    loader.start(wanted)
    loader.prepare(small)
    first = wanted and frozenset([tensor_name(0)])
    sum_all(loader.load([loader.file_of(small)], first))

    is_copied = specification["consumer"] == "copy"
    model = make_model(specification) if is_copied else {}
    set_cache(paths, specification["cache"])
    needed = (kept if loader.owned else 0) + (kept if cold else 0)
    touch_memory(needed + HIDDEN_BYTES if needed else 0)
    set_cache(paths, specification["cache"])

    measured: dict[str, Any] = {"kept_bytes": kept}
    if specification["do"] == "memory":
        print("ready", flush=True)
        sys.stdin.readline()
        private = private_bytes()
        count, digest = digest_all(loader.load(paths, wanted))
        measured |= {"private_before": private, "tensors": count, "digest": digest}
        if count != len(numbers):
            raise SystemExit(f"{count} tensors instead of {len(numbers)}")
    else:
        disk, device = disk_bytes(paths[0]), device_bytes()
        start = time.perf_counter()
        pairs = loader.load(paths, wanted)
        returned = time.perf_counter()
        if is_copied:
            copy_all(pairs, model)
        else:
            sum_all(pairs)
        done = time.perf_counter()
        measured |= {
            "return_s": None if loader.streams else returned - start,
            "read_s": done - start,
            "memory_s": (returned if loader.owned and not loader.streams else done) - start,
            **device_figures(device, disk, paths[0]),
        }
    wrong = loader.check()
    if wrong:
        raise SystemExit(wrong)
    measured["version"] = loader.version()
    return measured


def device_figures(device: int, disk: int | None, path: Path) -> dict[str, Any]:
    """Bytes from the device since then; void where others read as well."""
    read, disk_now = device_bytes() - device, disk_bytes(path)
    if disk is None or disk_now is None:
        return {"device_bytes": read, "device_void": "no diskstats"}
    difference = abs((disk_now - disk) - read)
    is_void = difference > max(0.05 * max(read, disk_now - disk), 4 << 20)
    return {"device_bytes": read, "device_void": "others read, too" if is_void else None}


def main() -> None:
    """One measurement, one line of JSON."""
    specification = json.loads(sys.argv[1])
    if specification["do"] == "prepare":
        loader = loaders.make(specification["loader"], specification["options"])
        loader.start(None)
        for path in (*data_files(specification["data"]), warm_up_file()):
            loader.prepare(path)
        measured: dict[str, Any] = {}
    else:
        measured = measure(specification)
    print(json.dumps(measured), flush=True)
    os._exit(0)  # without giving back gigabytes one by one


if __name__ == "__main__":
    main()
