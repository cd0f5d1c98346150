"""Proves: torch.ops.stx_patch.read_into puts a file's bytes into tensors, eagerly and compiled."""

import pytest
import torch
from device_helpers import fake_library, set_faults

import stx_patch.ops
from stx_patch import _native, _options

MIB = 1 << 20


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("ops") / "bytes"
    path.write_bytes(torch.randint(0, 256, (9 * MIB + 13,), dtype=torch.uint8).numpy().tobytes())
    return path


def test_it_is_torchs_operator():
    assert torch.ops.stx_patch.read_into is stx_patch.ops.read_into
    assert str(torch.ops.stx_patch.read_into.default._schema) == (
        "stx_patch::read_into(Tensor(a!) target, str path, int offset) -> ()"
    )


@pytest.mark.parametrize("size", [0, 1, 4096, MIB - 1, MIB, 9 * MIB])
@pytest.mark.parametrize("offset", [0, 1, 13])
def test_bytes(file, size, offset):
    target = torch.zeros(size, dtype=torch.uint8)
    torch.ops.stx_patch.read_into(target, str(file), offset)
    assert target.numpy().tobytes() == file.read_bytes()[offset : offset + size]


def test_any_dtype_and_part(file):
    target = torch.zeros((4, 1000), dtype=torch.int64)
    torch.ops.stx_patch.read_into(target[2], str(file), 8)
    expected = torch.frombuffer(bytearray(file.read_bytes()[8:8008]), dtype=torch.int64)
    assert target[2].equal(expected) and not target[[0, 1, 3]].any()


def test_what_cannot_be(file, tmp_path):
    read_into = torch.ops.stx_patch.read_into
    target = torch.zeros(10)
    with pytest.raises(FileNotFoundError):
        read_into(target, str(tmp_path / "missing"), 0)
    with pytest.raises(OSError, match="ends at byte"):
        read_into(target, str(file), 9 * MIB)
    with pytest.raises(OSError):
        read_into(target, str(tmp_path), 0)
    with pytest.raises(ValueError, match="contiguous"):
        read_into(torch.zeros((4, 4)).t()[1:], str(file), 0)
    with pytest.raises(ValueError, match="offset"):
        read_into(target, str(file), -1)
    assert not target.any()


def test_fake_and_compiled(file):
    torch.library.opcheck(torch.ops.stx_patch.read_into.default, (torch.zeros(16), str(file), 4))

    def double(target):
        torch.ops.stx_patch.read_into(target, str(file), 0)
        return target * 2

    compiled = torch.compile(double, backend="aot_eager")
    target = torch.zeros(64, dtype=torch.uint8)
    assert compiled(target).equal(double(torch.zeros(64, dtype=torch.uint8)))


def test_a_device(file):
    fake_library()
    set_faults(delay_us="300")
    for size in (1, 5000, 9 * MIB):
        target = torch.zeros(size, dtype=torch.uint8)
        arguments = (str(file), 5, size, target.data_ptr(), 0, 0, _options.DEFAULT.staging)
        _native.core.read_into(*arguments)
        assert target.numpy().tobytes() == file.read_bytes()[5 : 5 + size]
    set_faults(delay_us="0")
