"""A CUDA device for tests: `tests/c/fake_cudart.c` is its runtime, and memory is its memory."""

import atexit
import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from stx_patch import _device, _native

SOURCE = Path(__file__).parent / "c" / "fake_cudart.c"


@functools.cache
def fake_library():
    """The runtime, built and bound to this process for good: it has no other."""
    folder = Path(tempfile.mkdtemp(prefix="stx-fake-"))
    atexit.register(shutil.rmtree, folder)
    library = folder / "libfakecudart.so"
    command = ["gcc", "-std=c11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC", str(SOURCE)]
    subprocess.run([*command, "-o", str(library), "-lpthread"], check=True)
    _native.core.device_bind(str(library))
    found = ctypes.CDLL(str(library))
    found.fake_cudart_calls.restype = ctypes.c_uint64
    return found


def set_faults(fail="", fail_all="", delay_us="200"):
    """From here on; see fake_cudart.c."""
    for name, value in (("FAIL", fail), ("FAIL_ALL", fail_all), ("DELAY_US", delay_us)):
        os.environ[f"STX_FAKE_{name}"] = str(value)
    fake_library().fake_cudart_reset()


def calls_count():
    """Calls of the runtime since `set_faults`."""
    return fake_library().fake_cudart_calls(b"any")


class FakeStream:
    cuda_stream = 0

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        return None

    def synchronize(self):
        pass


class FakeCuda(_device.Cuda):
    """What is asked of torch; `also` is taken for device 0, too."""

    def __init__(self, also=None):
        self.also = also

    def serves(self, device):
        return _device.index_in(device) is not None

    def spell(self, device):
        return "cuda:0" if str(device) == self.also else device

    def is_capturing(self):
        return False

    def device(self, index):
        return contextlib.nullcontext()

    def allocate(self, shape, dtype, index):
        return torch.empty(shape, dtype=dtype)

    def index_of(self, tensor):
        return 0

    def stream(self, index):
        return FakeStream()

    def current(self, stream):
        return stream
