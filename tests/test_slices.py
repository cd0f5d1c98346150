"""Proves: slices take every expression torch takes, with stock's results, views and errors."""

import numpy as np
import pytest
import torch
from helpers import STOCK, facts, ours, outcome, seen

INDEXES = [
    0, -1, 3, 4, -5, True, False, None, ..., (), slice(None), slice(1, 3), slice(-2, None),
    slice(None, None, 2), slice(3, 1), slice(0, 100), slice(None, None, -1), slice(2, 2),
    [0, 2], [], [1], (0, 1), (0, 1, 2, 3), (slice(None), 1), (slice(1, 2), slice(2, 4)),
    (..., 0), (0, ...), (..., slice(0, 2)), (..., ...), (None, 0), (slice(None), None),
    ([0, 1], [1, 2]), (slice(None), [0, 2]), torch.tensor([1, 0]), torch.tensor(1),
    torch.tensor([True, False, True, False]), np.int64(1), np.array([0, 1]), "text", 1.5, {"a": 1},
    (0, "text"), range(2),
]  # fmt: skip


def index_name(index):
    return str(index)[:40]


@pytest.mark.parametrize("index", INDEXES, ids=index_name)
@pytest.mark.parametrize("name", ["matrix", "vector", "scalar", "empty", "cube"])
def test_indexing_as_stock(sample, name, index):
    own, stock = ours(sample), STOCK.safe_open(sample, "pt")
    mine = outcome(lambda: own.get_slice(name)[index])
    theirs = outcome(lambda: stock.get_slice(name)[index])
    assert seen(mine) == seen(theirs)
    if mine[0] == "value":
        base, stock_base = own.get_tensor(name), stock.get_tensor(name)
        shares = mine[1].data_ptr() - base.data_ptr()
        stock_shares = theirs[1].data_ptr() - stock_base.data_ptr()
        if 0 <= stock_shares < base.nbytes:  # a view in stock is a view here
            assert shares == stock_shares


def test_iterating_as_stock(sample):
    own, stock = ours(sample), STOCK.safe_open(sample, "pt")
    mine, theirs = list(own.get_slice("matrix")), list(stock.get_slice("matrix"))
    assert [facts(row) for row in mine] == [facts(row) for row in theirs]
    assert outcome(lambda: list(own.get_slice("scalar"))) == outcome(
        lambda: list(stock.get_slice("scalar"))
    )
    for use in (len, lambda s: s.get_shape(1), lambda s: s.nothing, lambda s: s()):
        assert outcome(use, own.get_slice("matrix")) == outcome(use, stock.get_slice("matrix"))


def test_a_slice_outlives_its_handle(sample):
    with ours(sample) as handle:
        slice_ = handle.get_slice("matrix")
    del handle
    assert slice_.get_shape() == [4, 6] and slice_.get_dtype() == "F32"
    assert slice_[1].tolist() == [6, 7, 8, 9, 10, 11]


def test_default_devices_as_stock(sample):
    own, stock = ours(sample), STOCK.safe_open(sample, "pt")

    def devices(handle):
        return handle.get_tensor("matrix").device, handle.get_slice("matrix")[:].device

    with torch.device("meta"):
        assert devices(own) == devices(stock)
        assert seen(outcome(lambda: own.get_slice("cube")[1])) == seen(
            outcome(lambda: stock.get_slice("cube")[1])
        )
    torch.set_default_device("meta")
    try:
        assert devices(own) == devices(stock)
    finally:
        torch.set_default_device(None)
    assert devices(own) == devices(stock) == (torch.device("cpu"), torch.device("cpu"))


def test_inference_mode_as_stock(sample):
    own, stock = ours(sample), STOCK.safe_open(sample, "pt")
    with torch.inference_mode():
        assert facts(own.get_tensor("matrix")) == facts(stock.get_tensor("matrix"))
        assert own.get_tensor("matrix").is_inference()
        assert facts(own.get_slice("matrix")[1]) == facts(stock.get_slice("matrix")[1])
        assert all(tensor.is_inference() for tensor in own.get_tensors().values())


def test_fake_tensors_as_stock(sample):
    """Stock refuses under FakeTensorMode; so do we, by asking stock."""
    from torch._subclasses import FakeTensorMode

    own, stock = ours(sample), STOCK.safe_open(sample, "pt")
    with FakeTensorMode():
        for use in (lambda h: h.get_tensor("matrix"), lambda h: h.get_slice("matrix")[0]):
            expected = outcome(use, stock)
            assert expected[0] == "error" and outcome(use, own) == expected
    assert own.get_tensor("matrix").shape == (4, 6)
