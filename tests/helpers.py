"""What the tests of reading share: raw files, and comparing what stock and we answer."""

import json
import os
import signal
import struct
import traceback
import types
import warnings

import safetensors
import safetensors._safetensors_rust
import safetensors.torch
import torch

import stx_patch
from stx_patch import _C
from stx_patch._origin import Origin

# The originals. Not names of this module: patching would find and replace them here too.
STOCK = types.SimpleNamespace(
    safe_open=safetensors._safetensors_rust.safe_open,
    load_file=safetensors.torch.load_file,
    SafetensorError=safetensors.SafetensorError,
)

DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def write_raw(path, header, data=b""):
    """A file from the bytes of a header, or from what JSON makes of it."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def ours(path, *arguments, **keywords):
    """A handle opened natively: the test fails where the core did not serve it."""
    before = stx_patch.stats().opens
    handle = stx_patch.safe_open(path, *arguments, **keywords)
    assert stx_patch.stats().opens == before + 1, "not native"
    return handle


def outcome(function, *arguments, **keywords):
    """What a call answers, or the class and text of what it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "value", function(*arguments, **keywords)
        except Exception as error:
            text = str(error).split("\nException raised from")[0]  # torch's addresses
            return "error", type(error), "\n".join([text, *getattr(error, "__notes__", ())])


def facts(tensor):
    """All that a caller can see of a tensor, but where it lies."""
    storage = tensor.untyped_storage()
    return {
        "bytes": to_bytes(tensor),
        "dtype": tensor.dtype,
        "shape": tuple(tensor.shape),
        "stride": tensor.stride(),
        "storage_bytes": storage.nbytes(),
        "offset": tensor.storage_offset(),
        "resizable": storage.resizable(),
        "contiguous": tensor.is_contiguous(),
        "requires_grad": tensor.requires_grad,
        "inference": tensor.is_inference(),
        "device": tensor.device,
        "type": type(tensor),
    }


def to_bytes(tensor):
    """The tensor's elements as bytes, whatever the dtype."""
    if tensor.device.type == "meta":
        return None
    if tensor.numel() == 0:
        return b""
    whole = tensor.contiguous()
    flat = whole.as_strided((whole.numel(),), (1,), whole.storage_offset())
    return bytes(flat.view(torch.uint8).numpy())


def seen(result):
    """`outcome` in comparable form."""
    if result[0] == "value" and isinstance(result[1], torch.Tensor):
        return "tensor", facts(result[1])
    return result


def native(path):
    """Whether the core takes this file."""
    try:
        _C.open(str(path), None, Origin(str(path), (), {}), stx_patch.Options().core, False)
    except _C.Refused:
        return False
    return True


def in_a_child(work):
    """The exit status of a forked child that runs `work`, and is ended if it hangs."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
