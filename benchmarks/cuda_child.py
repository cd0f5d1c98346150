# SPDX-License-Identifier: Apache-2.0
"""What one process of bench_cuda.py does: `cuda_child.py SPECIFICATION`, or run() after a fork.

The specification, JSON, says what to do: "probe" the device, "make" the files, "load" a file,
"pretrained", "copy" pinned memory, or have a file in the page "cache". Prints JSON. What is loaded
is checked after it was timed: sums of each tensor's bits, on the device, against those that "make"
took on the CPU.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cuda_loaders
import make_data
import system
from processes import wait_until_watched

HIDDEN_BYTES = 256 << 20
PIECE = 1 << 22  # elements of which bits are summed at a time
COPY_BYTES, COPIES = 1 << 30, 8
ATTEMPTS = 3  # at having a file in the page cache, or out of it
WARM_UP = make_data.Set("16 x 1 MiB", 16, max(64, int((1 << 18) * make_data.FACTOR)), "float32")

Specification = dict[str, Any]
Digests = dict[str, list[int]]


# --- what is loaded ---


def use_all(tensors: Iterable[Any], device: str) -> None:
    """A reduction over each tensor, and waiting for it: what is used has to be there."""
    import torch

    with torch.no_grad():
        torch._foreach_norm(list(tensors))
    wait_for(device)


def wait_for(device: str) -> None:
    """All that was queued is done."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize(device)


def begin_with(device: str) -> None:
    """The device is this process's, and was used."""
    import torch

    if device != "cpu":
        torch.cuda.set_device(device)
    torch.ones(1 << 20, device=device).sum()
    wait_for(device)


def digest(tensor: Any) -> list[int]:
    """Two sums of its bits: of the integers it is made of, and of these times their place."""
    import torch

    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.detach().contiguous().view(-1).view(kind)
    sums = [torch.zeros(2, dtype=torch.int64, device=tensor.device)]
    place = torch.arange(1, min(PIECE, flat.numel()) + 1, device=tensor.device)
    for number, piece in enumerate(flat.split(PIECE)):
        wide = piece.to(torch.int64)
        weighted = (
            wide * (place[: wide.numel()] + number * PIECE)
        ).sum()  # wraps, everywhere alike
        sums.append(torch.stack([wide.sum(), weighted]))
    found: list[int] = torch.stack(sums).sum(0).tolist()
    return found


def digests_path(path: Path) -> Path:
    """Where the digests of a file, or of a model's folder, are kept."""
    return path.parent / f"{path.name}.digests.json"


def compare(tensors: dict[str, Any], expected: Digests, device: str) -> None:
    """Everything is there, on its device, bit by bit; SystemExit else."""
    import torch

    missing = expected.keys() - tensors.keys()
    if missing:
        raise SystemExit(f"{len(missing)} tensors missing, such as {min(missing)}")
    for name, wanted in expected.items():
        tensor = tensors[name]
        if tensor.device != torch.device(device):
            raise SystemExit(f"{name} is on {tensor.device}")
        if digest(tensor) != wanted:
            raise SystemExit(f"loaded other bits than the CPU: {name}")


def expected_of(specification: Specification) -> Digests:
    """The digests of what a load has to give."""
    kinds: dict[str, Digests] = json.loads(digests_path(Path(specification["path"])).read_text())
    return kinds[specification["dtype"] or "stored"]


# --- files ---


def label_of(name: str, kind: make_data.Set) -> str:
    """What the file of a set is called: "small" is that of the other benchmarks."""
    return name if name == "small" else f"device-{name}-{kind.count * kind.tensor_bytes}"


def make(specification: Specification) -> dict[str, Any]:
    """The files, and the digests of what is in them."""
    paths = {"model": make_data.model_folder("llama")} if specification["model"] else {}
    sets = {name: make_data.Set(**kind) for name, kind in specification["sets"].items()}
    for name, kind in {**sets, "warm_up": WARM_UP}.items():
        (paths[name],) = make_data.set_files(label_of(name, kind), kind)
    for name, path in paths.items():
        if name == "warm_up" or digests_path(path).exists():
            continue
        kinds = {"stored": _digests(path, None)}
        if name == "large":
            kinds["bfloat16"] = _digests(path, "bfloat16")
        partial = digests_path(path).with_suffix(".partial")
        partial.write_text(json.dumps(kinds))
        partial.rename(digests_path(path))
    return {name: str(path) for name, path in paths.items()}


def _digests(path: Path, dtype: str | None) -> Digests:
    import safetensors
    import torch

    found: Digests = {}
    opened: Any = safetensors.safe_open
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        with opened(file, framework="pt") as handle:
            for name in handle.offset_keys():
                tensor = handle.get_tensor(name)
                found[name] = digest(tensor if dtype is None else tensor.to(getattr(torch, dtype)))
    return found


def set_cache(paths: list[Path], cache: str) -> bool:
    """Make files cold or warm; whether the system confirms it. SystemExit where it denies it."""
    share = 0.0
    for _ in range(ATTEMPTS):
        try:
            for path in paths:
                if cache == "warm":
                    system.warm_file(path)
                else:
                    system.drop_cache(path)
            share = system.cached_share(paths)
        except OSError:  # it does not tell: Linux before 6.5
            for path in paths if cache == "warm" else ():
                _read_through(path)
            return False
        if share <= 0.01 if cache == "cold" else share >= 0.99:
            return True
    raise SystemExit(f"not {cache}: {share:.1%} of {paths[0].name} is in the page cache")


def _read_through(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


# --- what is measured ---


def probe(specification: Specification) -> dict[str, Any]:
    """What the device is; "missing" says why nothing can be measured on it."""
    import torch

    device = specification["device"]
    about: dict[str, Any] = {"device": device, "cuda": torch.version.cuda, "missing": None}
    if device != "cpu":
        if not torch.cuda.is_available():
            built = "" if torch.version.cuda or torch.version.hip else ", built without CUDA"
            return about | {"missing": f"no CUDA device (torch {torch.__version__}{built})"}
        properties = torch.cuda.get_device_properties(device)
        begin_with(device)
        about |= {
            "device": properties.name,
            "uuid": str(getattr(properties, "uuid", "")) or None,
            "free_bytes": torch.cuda.mem_get_info(device)[0],
        }
    ours = cuda_loaders.Ours(device)
    try:
        ours.start()
        ours.load(make_data.warm_up_file())
        wrong = ours.check(0)
    except ImportError as error:
        wrong = str(error)
    return about | {"missing": wrong and f"stx_patch does not serve {device} here: {wrong}"}


class Memory:
    """The peak of torch's allocator, over what was in use before."""

    def __init__(self, device: str) -> None:
        import torch

        self.device = device
        gc.collect()
        if device == "cpu":
            return
        wait_for(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        self.allocated = torch.cuda.memory_allocated(device)
        self.reserved = torch.cuda.memory_reserved(device)

    def peak(self) -> dict[str, int | None]:
        """Since this was made."""
        import torch

        if self.device == "cpu":
            return {"allocated_bytes": None, "reserved_bytes": None}
        return {
            "allocated_bytes": torch.cuda.max_memory_allocated(self.device) - self.allocated,
            "reserved_bytes": torch.cuda.max_memory_reserved(self.device) - self.reserved,
        }


def disk_bytes() -> int | None:
    """What this process has had read from storage, where the system tells."""
    try:
        return system.device_bytes()
    except (OSError, RuntimeError):
        return None


def load(specification: Specification) -> dict[str, Any]:
    """One load of a file by one loader."""
    path, device = Path(specification["path"]), specification["device"]
    name, dtype = specification["loader"], specification["dtype"]
    make_loader = cuda_loaders.LOADERS[name]
    import torch

    wanted = None if dtype is None else getattr(torch, dtype)
    loader = make_loader(device, wanted, specification["next_safetensors"])
    loader.start()
    begin_with(device)
    # Whatever a process does once: lazy imports, thread pools, staging memory, kernels.
    begun = time.perf_counter()
    use_all(loader.load(Path(specification["warm_up"])).values(), device)
    first_s = time.perf_counter() - begun
    loader.release()

    wanted_cache = specification["cache"]
    set_cache([path], wanted_cache)
    system.touch_memory(HIDDEN_BYTES + (path.stat().st_size if wanted_cache == "cold" else 0))
    is_proven = set_cache([path], wanted_cache)
    kept_bytes = specification["kept_bytes"]
    memory, disk = Memory(device), disk_bytes()
    loader.reset()
    wait_until_watched()
    start = time.perf_counter()
    tensors = loader.load(path)
    returned = time.perf_counter()
    use_all(tensors.values(), device)
    done = time.perf_counter()

    peak, disk_now = memory.peak(), disk_bytes()
    wrong = loader.check(kept_bytes)
    if wrong:
        raise SystemExit(wrong)
    if specification["check"]:
        compare(tensors, expected_of(specification), device)
    return {
        "kept_bytes": kept_bytes,
        "return_s": returned - start,
        "read_s": done - start,
        "first_s": first_s,
        "disk_bytes": None if disk is None or disk_now is None else disk_now - disk,
        "cache_proven": is_proven,
        "version": loader.version(),
        "notes": loader.notes(),
        **peak,
    }


def pretrained(specification: Specification) -> dict[str, Any]:
    """One from_pretrained of transformers, stock or patched, onto the device."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401

    is_ours = specification["loader"] == "ours"
    if is_ours:
        import stx_patch

        stx_patch.patch()  # after the library: it has bound stock's names by now
    folder, device = Path(specification["path"]), specification["device"]
    device_map = "cuda" if device == "cuda:0" else device
    begin_with(device)
    load: Any = AutoModelForCausalLM.from_pretrained
    paths = sorted(folder.rglob("*.safetensors"))
    set_cache(paths, specification["cache"])
    measured: dict[str, Any] = {"kept_bytes": specification["kept_bytes"]}
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        for key in ("first_s", "return_s"):  # whatever happens once, happens in the first
            memory = Memory(device)
            if key == "return_s":
                set_cache(paths, specification["cache"])
                wait_until_watched()
            if is_ours:
                stx_patch.reset_stats()
            start = time.perf_counter()
            model = load(folder, dtype=torch.bfloat16, device_map=device_map)
            measured[key] = time.perf_counter() - start
            use_all(model.parameters(), device)
            measured["read_s"] = time.perf_counter() - start
            if key == "first_s":
                del model
    measured |= memory.peak()
    if is_ours:
        wrong = cuda_loaders.not_native("cpu", 0)
        if wrong:
            raise SystemExit(wrong)
        measured["notes"] = {"bytes_to_device": stx_patch.stats().bytes_to_device}
    if specification["check"]:
        compare(model.state_dict(), expected_of(specification), device)
    package = "stx-patch" if is_ours else "safetensors"
    return measured | {"version": system.version_of(package)}


def copy(specification: Specification) -> dict[str, Any]:
    """Pinned memory to the device, nothing else: what no loader can beat."""
    import torch

    device = specification["device"]
    begin_with(device)
    size_bytes = min(COPY_BYTES, specification["kept_bytes"])
    source = torch.ones(size_bytes, dtype=torch.uint8, pin_memory=device != "cpu")
    target = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(COPIES):
        wait_for(device)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    each_s = sorted(seconds[1:])[(COPIES - 1) // 2]
    return {"kept_bytes": size_bytes, "return_s": each_s, "read_s": each_s}


def cache(specification: Specification) -> dict[str, Any]:
    """A file in the page cache or out of it."""
    return {"cache_proven": set_cache([Path(specification["path"])], specification["cache"])}


WORK = {
    "probe": probe,
    "make": make,
    "cache": cache,
    "load": load,
    "pretrained": pretrained,
    "copy": copy,
}


def run(specification: Specification) -> None:
    """Do it, print one line of JSON."""
    print(json.dumps(WORK[specification["do"]](specification)), flush=True)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
    os._exit(0)  # without giving back gigabytes one by one
