"""What `test_leaks.py` runs, each scenario in a process of its own, forked from this one.

    python leak_scenarios.py GOOD BAD DOUBLE

GOOD is a sample file, BAD the same cut by a byte, DOUBLE one that only stock serves. A scenario is
repeated; what the process holds after a warm-up and at the end is printed as a line of JSON.
"""

import ctypes
import gc
import json
import os
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

import stx_patch
from stx_patch import filters

REPEATS = 1600
GOOD, BAD, DOUBLE = sys.argv[1:4]
BYTES = safetensors.torch.save({"a": torch.ones(3), "b": torch.zeros(0, 2)})
kept = []


class Heap(ctypes.Structure):
    """struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def swallow(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except (Exception, KeyboardInterrupt):
        return
    raise AssertionError("nothing was raised")


def refuse(key):
    raise KeyError(key)


def interrupt(key):
    if key == "scalar":
        raise KeyboardInterrupt


# --- scenarios ---


def load_file():
    safetensors.torch.load_file(GOOD)


def load_file_and_write():
    for tensor in safetensors.torch.load_file(GOOD).values():
        tensor.zero_()


def open_and_drop():
    safetensors.safe_open(GOOD, "pt")


def every_method():
    with safetensors.safe_open(GOOD, "pt") as handle:
        handle.keys(), handle.offset_keys(), handle.metadata(), handle.get_tensors()
        for name in handle.offset_keys():
            handle.get_tensor(name), handle.get_slice(name).get_shape()
            handle.get_dtype(name), handle.get_shape(name), handle.nbytes(name)


def abandoned_slices():
    handle = safetensors.safe_open(GOOD, "pt")
    first, second = handle.get_slice("cube"), handle.get_slice("vector")
    first[0], first[1:], list(second)
    swallow(first.__getitem__, "text")
    swallow(first.__getitem__, 99)


def views_outlive():
    view = safetensors.safe_open(GOOD, "pt").get_tensor("matrix")[1:, 2:].T
    view.add_(1)


def failed_open():
    swallow(safetensors.safe_open, BAD, "pt")


def missing_file():
    swallow(safetensors.torch.load_file, GOOD + "x")


def wrong_calls():
    swallow(safetensors.safe_open)
    swallow(safetensors.safe_open, GOOD, "pt", "gpu")
    swallow(safetensors.safe_open, GOOD, "pt", foo=1)
    swallow(safetensors.safe_open, "\ud800", "pt")


def raising_filter():
    swallow(stx_patch.load_file, GOOD, tensor_filter=refuse)
    swallow(stx_patch.safe_open, GOOD, tensor_filter=interrupt)


def callable_filter():
    stx_patch.load_file(GOOD, tensor_filter=lambda key: key.nbytes > 4 and key.shape)


def globs():
    stx_patch.load_file(GOOD, tensor_filter=["m*", "[!m]*r"])


def names():
    stx_patch.load_file(GOOD, include_keys={"matrix", "nothing"})


def combined_filter():
    some = filters.any_of({"cube"}, "m*", filters.layers(0, 2), lambda key: key.dtype == "I64")
    stx_patch.load_file(GOOD, tensor_filter=filters.none_of(some, filters.prefixes("a.b")))


def strict_filter():
    swallow(stx_patch.load_file, GOOD, tensor_filter={"none"}, strict_filter=True)


def empty_filter():
    stx_patch.load_file(GOOD, tensor_filter=[])


def missing_tensor():
    handle = safetensors.safe_open(GOOD, "pt")
    swallow(handle.get_tensor, "none")
    swallow(handle.get_slice, "\ud800")
    swallow(handle.get_tensor, 3)
    swallow(handle.get_tensor, nam="a")
    swallow(getattr, handle, "nothing")


def closed_handle():
    handle = safetensors.safe_open(GOOD, "pt")
    handle.__exit__(None, None, None)
    swallow(handle.keys)
    swallow(handle.get_tensor, "matrix")
    handle.__exit__(None, None, None)


def blocks():
    with stx_patch.patched("m*") as report:
        safetensors.torch.load_file(GOOD)
    report.stats().as_dict()


def patch_and_unpatch():
    stx_patch.patch({"vector"})
    safetensors.torch.load_file(GOOD)
    stx_patch.patch()


def cycle():
    handle = safetensors.safe_open(GOOD, "pt")
    ring = [handle, handle.get_slice("cube")]
    ring.append(ring)


def tensor_by_stock():
    """A 4-bit slice: the native handle opens stock for it."""
    with safetensors.safe_open(GOOD, "pt") as handle:
        swallow(handle.get_slice("nibbles").__getitem__, 0)


def file_by_stock():
    safetensors.torch.load_file(DOUBLE)
    stx_patch.load_file(DOUBLE, tensor_filter="v*")


def other_backend():
    with safetensors.safe_open(GOOD, "pt", backend="pread") as handle:
        handle.get_tensor("matrix")


def other_framework():
    with safetensors.safe_open(GOOD, "np") as handle:
        assert isinstance(handle.get_tensor("matrix"), np.ndarray)


def load_bytes():
    safetensors.torch.load(BYTES)


def threads():
    opened = [threading.Thread(target=load_file) for _ in range(2)]
    for thread in opened:
        thread.start()
    for thread in opened:
        thread.join()


def leaking_handles():
    """Not flat on purpose: shows that a mapping left behind is seen."""
    kept.append(safetensors.safe_open(GOOD, "pt"))


def leaking_bytes():
    """Not flat on purpose: shows that one small block left behind by C is seen."""
    LIBC.malloc(24)


SCENARIOS = {
    function.__name__: function
    for function in (
        load_file, load_file_and_write, open_and_drop, every_method, abandoned_slices,
        views_outlive, failed_open, missing_file, wrong_calls, raising_filter, callable_filter,
        globs, names, combined_filter, strict_filter, empty_filter, missing_tensor, closed_handle,
        blocks, patch_and_unpatch, cycle, tensor_by_stock, file_by_stock, other_backend,
        other_framework, load_bytes, threads, leaking_handles, leaking_bytes,
    )
}  # fmt: skip
SLOW = {"patch_and_unpatch": 80, "file_by_stock": 400, "blocks": 400, "threads": 400}

# --- measuring ---

LIBC = ctypes.CDLL(None)
LIBC.malloc.restype = ctypes.c_void_p
if hasattr(LIBC, "mallinfo2"):  # from glibc 2.33 on
    LIBC.mallinfo2.restype = Heap


def measure():
    """What the process holds."""
    gc.collect()
    held = {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": Path("/proc/self/maps").read_text().count("\n"),
        "resident_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * 4096,
        "python_blocks": sys.getallocatedblocks(),
        "heap_bytes": 0,
    }
    if hasattr(LIBC, "mallinfo2"):
        heap = LIBC.mallinfo2()
        held["heap_bytes"] = heap.uordblks + heap.hblkhd
    return held


def run(name):
    repeats = SLOW.get(name, REPEATS)
    once = SCENARIOS[name]
    for _ in range(repeats // 4):
        once()
    measure()
    before = measure()
    for _ in range(repeats):
        once()
    after = measure()
    grown = {what: after[what] - before[what] for what in before}
    print(json.dumps({"name": name, "repeats": repeats, **grown}), flush=True)


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    stx_patch.patch()
    for name in SCENARIOS:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(name)
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
