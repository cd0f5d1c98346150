"""What `test_leaks.py` runs, each scenario in a process of its own, forked from this one.

    python leak_scenarios.py GOOD BAD DOUBLE HALF

GOOD is a sample file, BAD the same cut by a byte, DOUBLE one that only stock serves, HALF one whose
second tensor cannot be made. Two larger ones are written beside GOOD. A scenario is repeated; what
the process holds after a warm-up and at the end is printed as a line of JSON. Two processes run at
a time.
"""

import ctypes
import gc
import json
import mmap
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

import stx_patch
from stx_patch import filters

REPEATS = 10_000
GOOD, BAD, DOUBLE, HALF = sys.argv[1:5]
LARGE, CUT = Path(GOOD).with_name("large"), Path(GOOD).with_name("cut")
BYTES = safetensors.torch.save({"a": torch.ones(3), "b": torch.zeros(0, 2)})
PAGE_BYTES = mmap.PAGESIZE
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


class Countdown:
    """A filter that raises when it is asked for the `count`th time."""

    def __init__(self, count):
        self.count = count

    def __call__(self, key):
        self.count -= 1
        if self.count == 0:
            raise StopIteration(key)
        return True


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


def iterators():
    """Left in the middle."""
    for name in ("matrix", "cube"):
        next(iter(safetensors.safe_open(GOOD, "pt").get_slice(name)))


def left_by_exception():
    def leave():
        with safetensors.safe_open(GOOD, "pt") as handle:
            handle.get_slice("cube"), handle.get_tensor("vector")
            raise ValueError

    swallow(leave)


def dropped_after_close():
    """The handle goes first, then what was taken from it, in another order each time."""
    with safetensors.safe_open(GOOD, "pt") as handle:
        held = [handle.get_tensor("matrix"), handle.get_slice("cube"), handle.get_slice("matrix")]
    del handle
    held.append(held[1][0])
    while held:
        held.pop(len(held) // 2)


def failed_open():
    swallow(safetensors.safe_open, BAD, "pt")


def failed_load():
    swallow(safetensors.torch.load_file, BAD)


def failed_half_way():
    """One tensor was made, stock cannot make the next."""
    swallow(safetensors.torch.load_file, HALF)


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


def raising_late():
    """The last entry's answer, and one that has no truth value."""
    swallow(stx_patch.load_file, GOOD, tensor_filter=Countdown(7))
    swallow(stx_patch.load_file, GOOD, tensor_filter=lambda key: np.zeros(2))


def raising_by_stock():
    """Of a file that only stock serves."""
    swallow(stx_patch.safe_open, DOUBLE, tensor_filter=refuse)
    swallow(stx_patch.load_file, DOUBLE, backend="pread", tensor_filter=refuse)


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


def owned_load():
    """Whole, in part, and one tensor after the other; 4-bit tensors cannot be read this way."""
    stx_patch.load_file(GOOD, backend="pread", tensor_filter=["[!n]*"])
    with stx_patch.safe_open(GOOD, backend="pread", tensor_filter=["m*", "large"]) as handle:
        tensors = [*handle.get_tensors().values(), handle.get_tensor("large")]
    while tensors:
        tensors.pop(len(tensors) // 2).zero_()


def owned_load_fails():
    """For the filter, for the file, and for a tensor that cannot be made after others were."""
    swallow(stx_patch.load_file, GOOD, backend="pread", tensor_filter=Countdown(7))
    swallow(stx_patch.load_file, BAD, backend="pread")
    swallow(stx_patch.load_file, GOOD, backend="pread")
    swallow(stx_patch.load_file, HALF, backend="pread")


def owned_slices():
    """Of handles that are closed, dropped and left open; some are used, some are not."""
    with stx_patch.safe_open(GOOD, backend="pread") as handle:
        first, second = handle.get_slice("cube"), handle.get_slice("matrix")
    first[0], first[1:, 2], first[..., ::2], second[:, 1]
    swallow(first.__getitem__, "text")
    stx_patch.safe_open(GOOD, backend="pread").get_slice("vector")
    next(iter(stx_patch.safe_open(GOOD, backend="pread").get_slice("matrix")))
    ring = [stx_patch.safe_open(GOOD, backend="pread"), second]
    ring.append(ring)


def owned_handles_abandoned():
    stx_patch.safe_open(GOOD, backend="pread")
    handle = stx_patch.safe_open(GOOD, backend="pread")
    swallow(handle.get_tensor, "none")
    swallow(stx_patch.safe_open, GOOD, backend="pread", tensor_filter={"none"}, strict_filter=True)


def owned_by_engines():
    """Large enough for one; what is kept is dropped in another order than it lies."""
    for engine in ("uring", "threads"):
        for direct_io in ("on", "off"):
            how = {"backend": "pread", "engine": engine, "direct_io": direct_io}
            tensors = stx_patch.load_file(LARGE, **how)
            del tensors["b"]
            with stx_patch.safe_open(LARGE, **how) as handle:
                tensors["b"] = handle.get_tensor("b")


def owned_by_engines_fails():
    """The file is cut while it is open."""
    for engine in ("uring", "threads"):
        handle = stx_patch.safe_open(CUT, backend="pread", engine=engine, direct_io="on")
        entry = handle.get_slice("b")
        os.truncate(CUT, 2_000_000)
        swallow(handle.get_tensors)
        swallow(handle.get_tensor, "b")
        swallow(entry.__getitem__, slice(None))
        os.truncate(CUT, LARGE.stat().st_size)


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


def dropped_by_another_thread():
    """The last user of a mapping is a thread that did not make it."""
    held = [safetensors.safe_open(GOOD, "pt").get_slice("cube"), stx_patch.load_file(GOOD)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()


def forked():
    """The child closes what it has inherited; it holds for the parent."""
    with safetensors.safe_open(GOOD, "pt") as handle:
        tensors = handle.get_tensors()
        child = os.fork()
        if child == 0:
            handle.__exit__(None, None, None)
            tensors.clear()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert tensors["scalar"] == handle.get_tensor("scalar") == 1.5


def leaking_descriptors():
    """Not flat on purpose, as all below: shows that a descriptor left behind is seen."""
    os.dup(0)


def leaking_threads():
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def leaking_pages():
    """No mapping more, but one page of it."""
    kept.append(None)
    AREA[PAGE_BYTES * len(kept)] = 1


def leaking_objects():
    kept.append(object())


def leaking_handles():
    kept.append(safetensors.safe_open(GOOD, "pt"))


def leaking_bytes():
    """One small block left behind by C."""
    LIBC.malloc(24)


SCENARIOS = {
    function.__name__: function
    for function in (
        load_file, load_file_and_write, open_and_drop, every_method, abandoned_slices,
        views_outlive, iterators, left_by_exception, dropped_after_close, failed_open, failed_load,
        failed_half_way, missing_file, wrong_calls, raising_filter, raising_late, raising_by_stock,
        callable_filter, globs, names, combined_filter, strict_filter, empty_filter,
        missing_tensor, closed_handle, blocks, patch_and_unpatch, cycle, tensor_by_stock,
        file_by_stock, other_backend, owned_load, owned_load_fails, owned_slices,
        owned_handles_abandoned, owned_by_engines, owned_by_engines_fails, other_framework,
        load_bytes, threads, dropped_by_another_thread, forked, leaking_descriptors,
        leaking_threads, leaking_pages, leaking_objects, leaking_handles, leaking_bytes,
    )
}  # fmt: skip
FEWER = {
    # What costs milliseconds: each patch() walks every name of every module, each fork copies the
    # page tables.
    "patch_and_unpatch": 80, "forked": 200,
    # What reads megabytes each time.
    "owned_by_engines": 150, "owned_by_engines_fails": 300,
    # What is stock's work, or the system's, for the greater part.
    "tensor_by_stock": 4000, "file_by_stock": 4000, "failed_half_way": 4000,
    "owned_load_fails": 2000, "threads": 6000,
    "dropped_by_another_thread": 4000,
    # What has to grow needs no more to show it, and a system limits threads and mappings.
    "leaking_descriptors": 400, "leaking_threads": 100, "leaking_pages": 1600,
    "leaking_objects": 1600, "leaking_handles": 1600, "leaking_bytes": 1600,
}  # fmt: skip

# --- measuring ---

AREA = mmap.mmap(-1, 4000 * PAGE_BYTES)
LIBC = ctypes.CDLL(None)
LIBC.malloc.restype = ctypes.c_void_p
if hasattr(LIBC, "mallinfo2"):  # from glibc 2.33 on
    LIBC.mallinfo2.restype = Heap


def threads_count():
    """The kernel's threads, once those that Python has joined are gone from there too."""
    give_up = time.monotonic() + 10
    while (count := len(os.listdir("/proc/self/task"))) > threading.active_count():
        if time.monotonic() > give_up:
            break
        time.sleep(0.001)
    return count


def measure():
    """What the process holds."""
    gc.collect()
    count = threads_count()
    held = {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": Path("/proc/self/maps").read_text().count("\n"),
        "resident_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES,
        "threads": count,
        "python_blocks": sys.getallocatedblocks(),
        "heap_bytes": 0,
    }
    if hasattr(LIBC, "mallinfo2"):
        heap = LIBC.mallinfo2()
        held["heap_bytes"] = heap.uordblks + heap.hblkhd
    return held


def settle_interned_strings():
    """Python's table of them is rebuilt, larger, once enough of them have come and gone."""
    for number in range(200_000):
        sys.intern(f"interned {number}")


def run(name):
    repeats = FEWER.get(name, REPEATS)
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


def start(name):
    """A process that runs one scenario, and is ended should it hang."""
    if os.fork() != 0:
        return
    status = 1
    try:
        signal.alarm(120)
        run(name)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for path in (LARGE, CUT):
        safetensors.torch.save_file({"a": torch.ones(3), "b": torch.ones(700_001)}, path)
    stx_patch.patch()
    settle_interned_strings()
    for number, name in enumerate(SCENARIOS):
        if number >= 2:
            os.wait()
        start(name)
    os.wait()
    os.wait()


if __name__ == "__main__":
    main()
