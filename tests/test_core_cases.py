"""Proves: single cases that once went wrong in the core stay mended."""

import gc
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import STOCK, native, write_raw
from patch_helpers import PAGE_BYTES, PageCache, drop_from_cache
from torch.utils._python_dispatch import TorchDispatchMode

import stx_patch

RAISING_MODE = """
    import sys
    import torch
    from torch.overrides import TorchFunctionMode
    import stx_patch

    class Raising(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            if getattr(function, "__name__", "") == "__get__":
                raise {error}
            return function(*arguments, **(keywords or {{}}))

    try:
        with Raising():
            stx_patch.load_file(sys.argv[1])
    except {error}:
        pass
    tensors = stx_patch.load_file(sys.argv[1])
    assert torch.equal(tensors["wide"], torch.arange(12.0).reshape(3, 4)), tensors
    assert tensors["byte"].tolist() == [1, 2, 3] and tensors["byte"].dtype == torch.uint8, tensors
    assert tensors["eighth"].dtype == torch.float8_e4m3fn, tensors
"""


@pytest.mark.parametrize("error", ["RuntimeError", "KeyboardInterrupt", "MemoryError"])
def test_an_error_while_torch_is_asked_is_no_answer(tmp_path, error):
    """Whatever comes up when a process meets a dtype first, its later loads are right."""
    path = tmp_path / "file.safetensors"
    tensors = {
        "wide": torch.arange(12.0).reshape(3, 4),
        "byte": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "eighth": torch.zeros(4).to(torch.float8_e4m3fn),
    }
    safetensors.torch.save_file(tensors, path)
    script = textwrap.dedent(RAISING_MODE.format(error=error))
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def cold(tmp_path):
    """A file that is not in the page cache, of two tensors of 512 rows, 64 KiB each."""
    path = tmp_path / "cold.safetensors"
    safetensors.torch.save_file({name: torch.ones(512, 16384) for name in "ab"}, path)
    assert drop_from_cache(path)
    return path


INDEXES = {
    "one row": (3, 65536),
    "rows": (slice(3, 8), 5 * 65536),
    "rows and columns": ((slice(3, 8), slice(0, 100)), 4 * 65536 + 400),
    "an element": ((3, 5), 4),
    "nothing": (slice(3, 3), 0),
    "a copy": ([3, 9], 0),
}


@pytest.mark.parametrize("name", INDEXES)
def test_a_slice_of_a_cold_file_reads_what_it_shows(cold, name):
    index, expected_bytes = INDEXES[name]
    with stx_patch.safe_open(cold, tensor_filter="a") as handle:
        rows = handle.get_slice("a")
        before = stx_patch.stats().bytes_read
        found = rows[index]
        asked_bytes = stx_patch.stats().bytes_read - before
        rounding_bytes = 2 * PAGE_BYTES if expected_bytes else 0
        assert expected_bytes <= asked_bytes <= expected_bytes + rounding_bytes
    assert torch.equal(found, torch.ones(512, 16384)[index])


def test_the_rest_of_a_sliced_tensor_stays_on_disk(cold):
    with stx_patch.safe_open(cold, tensor_filter="a") as handle:
        assert handle.get_slice("a")[0:1].sum() == 16384
    cache = PageCache(cold)
    assert cache.resident_bytes(0, 65536) > 0
    assert cache.resident_bytes(8 << 20, 60 << 20) == 0
    cache.close()


def colliding_names(count):
    """Names of 16 bytes whose second word undoes what the first did to the hash's state."""
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", dtype=np.uint8)
    random = np.random.default_rng(0)
    printable = np.zeros(256, bool)
    printable[[byte for byte in range(0x21, 0x7F) if byte not in b'"\\']] = True
    names = []
    with np.errstate(over="ignore"):
        while len(names) < count:
            first = random.choice(letters, (500_000, 8)).view("<u8").ravel()
            state = (first ^ np.uint64(0x9E3779B97F4A7C15 ^ 16)) * np.uint64(0xFF51AFD7ED558CCD)
            second = state ^ (state >> np.uint64(32))
            good = printable[second.view(np.uint8).reshape(-1, 8)].all(1)
            words = np.stack([first[good], second[good]], 1)
            names += [word.tobytes().decode() for word in words]
    return names[:count]


def test_names_made_to_collide_are_left_to_stock(tmp_path):
    """Each name would be compared with all before it."""
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    for count, served in ((200, True), (1000, False)):
        names = colliding_names(count)
        path = write_raw(tmp_path / "flood.safetensors", dict.fromkeys(names, entry))
        assert native(path) == served
        assert stx_patch.safe_open(path).keys() == STOCK.safe_open(path, "pt").keys()


def test_a_handle_cannot_be_found_while_its_filter_runs(sample):
    found = []

    def look(key):
        found.extend(o for o in gc.get_objects() if hasattr(type(o), "_all_names"))
        return True

    known = sum(hasattr(type(o), "_all_names") for o in gc.get_objects())
    with stx_patch.safe_open(sample, tensor_filter=look) as handle:
        assert len(handle.keys()) == 5
    assert len(found) == 5 * known


def test_the_collector_stays_on_where_others_code_runs(sample):
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.append(gc.isenabled())
            return function(*arguments, **(keywords or {}))

    with Mode():
        stx_patch.load_file(sample)
    assert seen and all(seen) and gc.isenabled()
