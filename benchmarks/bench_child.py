# SPDX-License-Identifier: Apache-2.0
"""One measurement, in a process of its own: `bench_child.py ACTION SIDE FILE` prints JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from demo_programs import device_bytes, drop_cache
from make_data import tensor_name


def private_bytes() -> int:
    """Anonymous and privately copied memory of this process."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/smaps_rollup has no Private_Dirty")


def touch_memory(size_bytes: int) -> None:
    """Touch and free memory: a virtual machine's host takes it back when it is idle, and whoever
    touches it first pays for that."""
    import torch

    torch.ones(size_bytes, dtype=torch.uint8)


def read_everything(tensors: Any) -> None:
    """One sum over each tensor, the same on both sides."""
    for tensor in tensors:
        tensor.sum()


def act(action: str, side: str, path: Path) -> Any:
    """The load to be timed; returns what has to be read."""
    import safetensors
    import safetensors.torch

    if action == "load_file":
        return safetensors.torch.load_file(path).values()
    if action == "open_keys":
        return [] if safetensors.safe_open(path, framework="pt").keys() else None
    if action == "open_one":
        return [safetensors.safe_open(path, framework="pt").get_tensor(tensor_name(50_000))]
    if action != "cold_quarter":
        raise SystemExit(f"no such action: {action}")
    if side == "ours":
        return safetensors.torch.load_file(path).values()
    with safetensors.safe_open(path, framework="pt") as file:
        return [file.get_tensor(name) for name in file.keys() if is_wanted(name)]  # noqa: SIM118


def is_wanted(name: str) -> bool:
    """Every fourth tensor."""
    return int(name.split(".")[4]) % 4 == 0


def warm_file(path: Path) -> None:
    """Bring a file into the page cache."""
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def main() -> None:
    """Prepare, measure, print."""
    action, side, path = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    import numpy  # noqa: F401
    import safetensors.torch
    import torch

    small = path.with_name("warm-up.safetensors")
    if not small.exists():
        safetensors.torch.save_file({tensor_name(0): torch.ones(4)}, small)
    if side == "ours":
        import stx_patch

        stx_patch.patch(is_wanted if action == "cold_quarter" else None)
    for tensor in safetensors.torch.load_file(small).values():  # whatever happens once
        tensor.sum()
    if action != "cold_quarter":
        warm_file(path)
    touch_memory(min(4 << 30, 2 * path.stat().st_size))
    cold = action == "cold_quarter"
    if cold and drop_cache(path) * 4096 > path.stat().st_size / 100:
        raise SystemExit(f"{path} could not be dropped from the page cache")
    private, device, start = private_bytes(), device_bytes(), time.perf_counter()
    loaded = act(action, side, path)
    returned = time.perf_counter()
    read_everything(loaded)
    done = time.perf_counter()
    result = {
        "return_s": returned - start,
        "read_s": done - start,
        "device_bytes": device_bytes() - device if cold else None,
        "private_bytes": private_bytes() - private if action == "load_file" else None,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
