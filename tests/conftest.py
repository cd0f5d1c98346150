"""Fixtures of all tests. Every test ends unpatched."""

from pathlib import Path

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


def _allowed_skips():
    lines = Path(__file__).with_name("allowed_skips.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that skips for a reason that is not allowed has failed."""
    result = yield
    report = result.get_result()
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(allowed in reason for allowed in _allowed_skips()):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: this skip is not allowed: {reason}"


@pytest.fixture
def poisoned(monkeypatch):
    """Stock can open nothing, and torch map nothing."""
    import torch

    from stx_patch import _stock

    def refuse(*arguments, **keywords):
        raise AssertionError("stock was asked")

    monkeypatch.setattr(_stock, "safe_open", refuse)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)
