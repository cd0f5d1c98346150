"""Fixtures of all tests. Every test ends unpatched."""

import pytest

import stx_patch


@pytest.fixture
def patched():
    """The process is patched, without a filter, for one test."""
    stx_patch.patch()
    yield stx_patch
    stx_patch.unpatch()


@pytest.fixture
def sample(tmp_path):
    """A file with a matrix, a vector, a scalar, an empty tensor and metadata."""
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "sample.safetensors"
    tensors = {
        "matrix": torch.arange(24, dtype=torch.float32).reshape(4, 6),
        "vector": torch.arange(7, dtype=torch.int64),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "cube": torch.arange(60, dtype=torch.bfloat16).reshape(3, 4, 5),
    }
    save_file(tensors, path, {"format": "pt"})
    return path
