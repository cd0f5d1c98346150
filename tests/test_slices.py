"""Proves: slices take every expression torch takes, with stock's results, views and errors."""

from operator import getitem

import numpy as np
import pytest
import torch
from helpers import STOCK, facts, ours, outcome, seen
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import stx_patch


class Index:
    """An object that is an integer, or fails to be."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    def __repr__(self):
        return f"Index({self.value!r})"


INDEXES = [
    0, -1, 3, 4, -5, True, False, None, ..., (), slice(None), slice(1, 3), slice(-2, None),
    slice(None, None, 2), slice(3, 1), slice(0, 100), slice(None, None, -1), slice(2, 2),
    slice(None, None, 0), slice(-100, 100), slice(100, None), slice(None, None, 2**70),
    slice("a"), slice(1.5), slice(Index(1), Index(3)), slice(torch.tensor(1), None),
    [0, 2], [], [1], [[0, 1], [1, 0]], [True, False, True, False], [None], [...], [slice(1)],
    ["a"], [1.5], [0, 99], (0, 1), (0, 1, 2, 3), (slice(None), 1), (slice(1, 2), slice(2, 4)),
    (..., 0), (0, ...), (..., slice(0, 2)), (..., ...), (None, 0), (slice(None), None),
    (None, ..., None), (True, 0), ([0, 1], [1, 2]), (slice(None), [0, 2]), ([0, 1], slice(None), 1),
    (((0,),),), ([],), (slice(None),) * 6, torch.Size([1, 1]), torch.tensor([1, 0]),
    torch.tensor(1), torch.tensor(9), torch.tensor([9]), torch.tensor([]), torch.tensor([1.0]),
    torch.tensor([True, False, True, False]), torch.tensor([True]), torch.tensor(True),
    torch.tensor([[True] * 6] * 4), torch.tensor([1, 0, 1, 0], dtype=torch.uint8),
    torch.tensor([1], dtype=torch.int16), torch.zeros(2, 0, dtype=torch.int64),
    np.int64(1), np.uint8(2), np.bool_(True), np.float32(1), np.array([0, 1]), np.array(1),
    np.array([True, False, True, False]), np.array(["a"]), Index(1), Index(-9), Index(2**70),
    Index(ValueError("no index")), 2**31, 2**63, -(2**63), 2**64, 2**70, "text", "", b"text", 1.5,
    1j, {"a": 1}, {1}, frozenset(), (0, "text"), range(2), object, NotImplemented,
    torch.float32, torch.device("cpu"), lambda: 0,
]  # fmt: skip
NAMES = ["matrix", "vector", "scalar", "empty", "cube"]


def place(base, tensor):
    """Where in the memory of `base` a tensor begins; None where it lies elsewhere."""
    at = tensor.data_ptr() - base.data_ptr()
    return at if 0 <= at < base.nbytes else None


def check_index(own, stock, name, index):
    mine = outcome(getitem, own.get_slice(name), index)
    theirs = outcome(getitem, stock.get_slice(name), index)
    assert seen(mine) == seen(theirs)
    if mine[0] == "value":  # a view of the tensor in stock is a view of it here
        bases = own.get_tensor(name), stock.get_tensor(name)
        assert place(bases[0], mine[1]) == place(bases[1], theirs[1])


@pytest.mark.parametrize("index", INDEXES, ids=lambda index: ascii(index)[:40])
def test_indexing_as_stock(sample, index):
    own, stock = ours(sample), STOCK.safe_open(sample, "pt")
    for name in NAMES:
        check_index(own, stock, name, index)


NUMBERS = st.integers(-6, 6)
BOUNDS = st.none() | st.integers(-8, 8)
PARTS = st.one_of(
    NUMBERS,
    NUMBERS,
    st.builds(slice, BOUNDS, BOUNDS, st.none() | st.integers(-1, 4)),
    st.builds(slice, BOUNDS, BOUNDS),
    st.sampled_from([..., None, True, False]),
    st.lists(NUMBERS, max_size=3),
    st.lists(st.booleans(), min_size=3, max_size=4),
    st.lists(NUMBERS, max_size=3).map(lambda numbers: torch.tensor(numbers, dtype=torch.int64)),
    NUMBERS.map(np.int64),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The same file for all generated indexes."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("slices") / "file"
    tensors = {
        "matrix": torch.arange(24, dtype=torch.int32).reshape(4, 6),
        "cube": torch.arange(60, dtype=torch.bfloat16).reshape(3, 4, 5),
        "four": torch.arange(48).reshape(2, 3, 4, 2) % 2 == 0,
        "empty": torch.zeros(3, 0, 2),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
    }
    save_file(tensors, path)
    return ours(path), STOCK.safe_open(path, "pt")


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["matrix", "cube", "cube", "four", "four", "empty", "scalar"]),
    index=PARTS | st.lists(PARTS, max_size=4).map(tuple),
)
def test_generated_indexes_as_stock(shared, name, index):
    check_index(*shared, name, index)


def test_writes_through_a_view_are_seen_as_in_stock(sample):
    own, stock = ours(sample), STOCK.safe_open(sample, "pt")
    for index in (1, slice(1, 3), (slice(None), 2), ..., [0, 1], (None, 0)):
        for handle in (own, stock):
            handle.get_slice("matrix")[index].add_(100)
        assert facts(own.get_tensor("matrix")) == facts(stock.get_tensor("matrix"))


ITERATIONS = {
    "list": list,
    "tuple": tuple,
    "iter": lambda s: [next(iter(s)), next(iter(s))],
    "enumerate": lambda s: [row for _, row in enumerate(s)],
    "unpack": lambda s: [*s],
    "reversed": reversed,
    "in": lambda s: 0 in s,
    "sum": lambda s: [sum(s)],
    "sorted": sorted,
    "max": lambda s: [max(s)],
    "map": lambda s: list(map(torch.sum, s)),
    "stack": lambda s: [torch.stack(list(s))],
    "tensor": torch.tensor,
    "asarray": lambda s: [torch.asarray(s)],
    "numpy": lambda s: np.asarray(s).shape,
    "bool": bool,
}


def rows(result):
    """`outcome` of an iteration in comparable form."""
    if result[0] == "error" or not isinstance(result[1], (list, tuple)):
        return seen(result)
    return type(result[1]), [seen(("value", row)) for row in result[1]]


@pytest.mark.parametrize("how", ITERATIONS)
def test_iterating_as_stock(sample, how):
    own, stock = ours(sample), STOCK.safe_open(sample, "pt")
    for name in NAMES:
        found, expected = (
            outcome(ITERATIONS[how], handle.get_slice(name)) for handle in (own, stock)
        )
        assert rows(found) == rows(expected)


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


class Passing(TorchFunctionMode):
    """A mode that changes nothing."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


class Dispatching(TorchDispatchMode):
    """The same, below."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


MODES = {
    "cpu": lambda: torch.device("cpu"),
    "meta": lambda: torch.device("meta"),
    "function mode": Passing,
    "dispatch mode": Dispatching,
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_torch_as_stock(sample, mode):
    """Tensors and slices, made under a mode and used under it and after it."""
    answers = []
    for opener in (ours, STOCK.safe_open):
        with MODES[mode]():
            inside = opener(sample, "pt")
        for handle in (inside, opener(sample, "pt")):
            with MODES[mode]():
                results = [
                    seen(outcome(get, handle, name))
                    for name in NAMES
                    for get in (
                        lambda h, n: h.get_tensor(n),
                        lambda h, n: h.get_slice(n)[...],
                        lambda h, n: h.get_slice(n)[1],
                        lambda h, n: h.get_slice(n)[:, [0]],
                        lambda h, n: h.get_tensors()[n],
                    )
                ]
                views = [place(handle.get_tensor(n), handle.get_slice(n)[...]) for n in NAMES]
            answers.append((results, views, facts(handle.get_slice("cube")[1])))
    assert answers[0] == answers[2] and answers[1] == answers[3]


@pytest.mark.parametrize("mode", ["cpu", "meta", "function mode", "dispatch mode"])
def test_whole_files_under_a_mode_as_stock(sample, mode):
    with MODES[mode]():
        found, expected = stx_patch.load_file(sample), STOCK.load_file(sample)
    assert {n: facts(t) for n, t in found.items()} == {n: facts(t) for n, t in expected.items()}


def test_default_dtype_changes_nothing(sample):
    torch.set_default_dtype(torch.float64)
    try:
        assert ours(sample).get_slice("matrix")[0].dtype is torch.float32
        assert ours(sample).get_tensor("scalar").dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


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
