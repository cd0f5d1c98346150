"""Helpers of the tests of patching, filters, statistics and consumers."""

import contextlib
import ctypes
import gc
import json
import mmap
import os
import subprocess
import sys
import tempfile
import textwrap
import types
from pathlib import Path

import pytest
import safetensors
import safetensors._safetensors_rust
import safetensors.numpy
import safetensors.torch

from stx_patch import _native, _patch

PAGE_BYTES = mmap.PAGESIZE

# The originals. Not names of this module: patching would find and replace them here too.
STOCK = types.SimpleNamespace(
    safe_open=safetensors._safetensors_rust.safe_open,
    load_file=safetensors.torch.load_file,
    load=safetensors.torch.load,
)

# Where stock's functions live: (module, name, what it holds while nothing is patched).
HOMES = [
    (safetensors, "safe_open", STOCK.safe_open),
    (safetensors.torch, "safe_open", STOCK.safe_open),
    (safetensors.torch, "load_file", STOCK.load_file),
    (safetensors.torch, "load", STOCK.load),
    (safetensors.numpy, "load", safetensors.numpy.load),
    (safetensors.numpy, "safe_open", STOCK.safe_open),
]
if hasattr(safetensors, "PySafeSlice"):  # from safetensors 0.9 on
    HOMES.append((safetensors, "PySafeSlice", safetensors.PySafeSlice))


def homes_are_stock():
    """Whether every home holds stock's own object."""
    return all(vars(module)[name] is stock for module, name, stock in HOMES)


def homes_are_ours():
    """Whether no home holds stock's own object."""
    return all(vars(module)[name] is not stock for module, name, stock in HOMES)


@pytest.fixture(autouse=True)
def leaves_stock():
    """Each test ends as it began: nothing in force, every home stock's. Mends it for the next."""
    assert homes_are_stock() and not _patch.is_patched()
    yield
    left = _patch._entries
    hooked = any(type(finder).__module__.startswith("stx_patch") for finder in sys.meta_path)
    with _patch._lock:
        _patch._entries = ()
        _patch._process_entry = None
        _patch._restore()
    stock = homes_are_stock()
    for module, name, original in HOMES:
        setattr(module, name, original)
    assert left == (), "the test left a patch in force"
    assert not hooked, "the test left an import hook"
    assert stock, "a home did not get its original back"


# --- files ---


def write_raw(path, entries, metadata=None):
    """Write a safetensors file whose tensors lie in the order given.

    `entries` are (name, dtype, shape, bytes). The header lists them by name, so that its own order
    says nothing about the order of the data.
    """
    path = Path(path)
    offsets, at = {}, 0
    for name, dtype, shape, data in entries:
        offsets[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [at, at + len(data)],
        }
        at += len(data)
    header = {name: offsets[name] for name in sorted(offsets)}
    if metadata is not None:
        header = {"__metadata__": metadata, **header}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, _, data in entries:
            file.write(data)
    return path


def floats(*values):
    """The bytes of float32 values."""
    import struct

    return struct.pack(f"<{len(values)}f", *values)


# --- modules ---


@contextlib.contextmanager
def temporary_module(name, module=None, **namespace):
    """A module in `sys.modules` for a block, with `namespace` in it."""
    if module is None:
        module = types.ModuleType(name)
    if isinstance(module, types.ModuleType):
        object.__getattribute__(module, "__dict__").update(namespace)
    assert name not in sys.modules
    sys.modules[name] = module
    try:
        yield module
    finally:
        del sys.modules[name]


# --- processes ---


def run_python(code, *arguments, env=None, expect_output="", timeout=120):
    """Run `code` in a fresh interpreter. It must succeed and print exactly `expect_output`.

    `expect_output` None: whatever it prints is returned.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")  # a file, so that tracebacks show its lines
        script.write_text(textwrap.dedent(code))
        process = subprocess.run(
            [sys.executable, str(script), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**clean_environment(), **(env or {})},
        )
    assert process.returncode == 0, process.stderr + process.stdout
    if expect_output is None:
        return process.stdout
    assert (process.stdout, process.stderr) == (expect_output, "")
    return process.stdout


def clean_environment():
    """This process's environment without what would change a consumer, and without a network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STX_PATCH")}
    kept.pop("PYTHONWARNINGS", None)
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }


# --- what the system holds ---


def open_descriptors():
    """The descriptors of this process, without the one that lists them."""
    return sorted(set(os.listdir("/proc/self/fd")) - {str(_probe_descriptor())})


def _probe_descriptor():
    descriptor = os.open("/", os.O_RDONLY)
    os.close(descriptor)
    return descriptor


def mappings_of(path):
    """How many mappings of this process lie over `path`."""
    gc.collect()
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


class PageCache:
    """Which pages of a file the system holds in memory, as mincore() tells the file's owner."""

    def __init__(self, path):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._size_bytes = os.path.getsize(path)
        with open(path, "rb") as file:
            # Writable and private, so that ctypes can take its address. No page is touched.
            self._map = mmap.mmap(
                file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
            )
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(self._anchor)

    def resident_bytes(self, begin, end):
        """Bytes of whole pages inside [begin, end) that are in memory."""
        first = -(-begin // PAGE_BYTES)
        last = min(end, self._size_bytes) // PAGE_BYTES
        if last <= first:
            return 0
        pages = (ctypes.c_ubyte * (last - first))()
        failed = self._libc.mincore(
            ctypes.c_void_p(self._address + first * PAGE_BYTES),
            ctypes.c_size_t((last - first) * PAGE_BYTES),
            pages,
        )
        assert failed == 0, os.strerror(ctypes.get_errno())
        return sum(page & 1 for page in pages) * PAGE_BYTES

    def close(self):
        del self._anchor
        self._map.close()


def settle():
    """Wait until nothing is read ahead any more: helpers run on beside the consumer."""
    assert _native.core.settle(20_000)


def drop_from_cache(path):
    """Have the system forget the file's pages. False where this file system cannot."""
    cache = PageCache(path)
    try:
        for _ in range(5):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if cache.resident_bytes(0, os.path.getsize(path)) == 0:
                return True
        return False
    finally:
        cache.close()
