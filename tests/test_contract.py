"""Proves: what running stock has shown, and no other file checks, holds under the patch as well.

Elsewhere: default devices, modes, iteration and memory of slices in test_slices and test_storage;
types of arguments and paths, CUDA strings in test_bad_input; the class, pickling, copying in
test_patch; load_file's late look-up of safe_open in test_patch_homes; exceptions of filters and
what is read of a file in test_filter; F4 by mmap in test_parity; descriptors in test_storage and
test_limits; torch.load, torch's distributed checkpoints and huggingface_hub, each in a process of
its own, in test_consumers.
"""

import io
import pickle

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from helpers import STOCK, facts, outcome, seen, write_raw
from torch._subclasses import FakeTensorMode

import stx_patch

NAMES = ["matrix", "vector", "scalar", "empty", "cube"]


def compared(result):
    """`outcome` of a load of one tensor, of many or of an array, in comparable form."""
    value = result[1]
    if result[0] == "value" and isinstance(value, dict):
        return {name: compared(("value", tensor)) for name, tensor in value.items()}
    if result[0] == "value" and isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.strides, value.flags.writeable, value.tobytes()
    return seen(result)


def compare(use, *arguments):
    """`use` of the names of safetensors answers the same with the patch and without."""
    expected = compared(outcome(use, *arguments))
    with stx_patch.patched():
        assert compared(outcome(use, *arguments)) == expected
    return expected


# --- slices that are read from bytes ---


class Two:
    def __index__(self):
        return 2


BYTE_INDEXES = [
    0, -1, 3, 99, -99, 2**40, True, False, None, ..., (), [], [0], (0, 0, 0, 0), (slice(None),) * 9,
    slice(None), slice(1, 3), slice(0, 2), slice(0, 3, 2), slice(None, None, 2), slice(1, None, 99),
    slice(5, 2), slice(2, 1), slice(1, 1), slice(0, 99), slice(99, None), slice(-1, None),
    slice(None, -1), slice(None, None, -1), slice(None, None, 0), slice("a"), slice(Two(), None),
    (slice(0, 2), 1), (1, slice(1, 3)), (slice(None), slice(None, None, 3)), (0, 0), (0, 0, 0),
    (..., 0), (0, ...), (..., ...), (..., slice(0, 2)), (slice(None), None), (0, [1]), np.int64(1),
    np.uint8(2), np.bool_(True), np.float32(1), np.array(1), np.array([0, 1]), torch.tensor(1),
    torch.tensor([1]), torch.tensor(True), Two(), "a", b"a", 1.5, {}, range(2), object,
]  # fmt: skip


@pytest.mark.parametrize("index", BYTE_INDEXES, ids=lambda index: ascii(index)[:40])
@pytest.mark.parametrize("how", ["pread", "np", "pread filtered"])
def test_slicing_of_bytes_as_stock(patched, sample, how, index):
    arguments = {"framework": "np" if how == "np" else "pt"}
    if how != "np":
        arguments["backend"] = "pread"
    own_arguments = {"tensor_filter": "*"} if "filtered" in how else {}
    own = safetensors.safe_open(sample, **arguments, **own_arguments)
    stock = STOCK.safe_open(sample, **arguments)
    for name in NAMES:
        if how == "np" and name == "cube":  # numpy has no bfloat16
            continue
        found, expected = (
            compared(outcome(lambda handle=handle, name=name: handle.get_slice(name)[index]))
            for handle in (own, stock)
        )
        assert found == expected, name


def test_iterating_over_slices_of_bytes_as_stock(patched, sample):
    def rows(opener, name):
        found = []
        for row in opener(sample, "pt", backend="pread").get_slice(name):
            found.append(facts(row))
            if len(found) > 20:
                break
        return found

    for name in NAMES:
        expected = outcome(rows, STOCK.safe_open, name)
        assert outcome(rows, safetensors.safe_open, name) == expected


# --- dtypes that torch and stock know in part ---


@pytest.fixture
def four(tmp_path):
    """A file with a 4-bit tensor among others."""
    entries = {
        "a": {"dtype": "F4", "shape": [2, 8], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [8, 10]},
        "c": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [10, 12]},
    }
    return write_raw(tmp_path / "four", entries, b"0123456789ab")


def open_one(path, get, **keywords):
    with safetensors.safe_open(path, "pt", **keywords) as handle:
        return get(handle)


def test_four_bits_as_stock(four):
    """Whole tensors through a mapping work, slices and reads do not, whichever way."""
    for get, works in (
        (lambda handle: handle.get_tensor("a"), True),
        (lambda handle: handle.get_tensors(), True),
        (lambda handle: handle.get_slice("a")[0], False),
        (lambda handle: handle.get_slice("a")[...], False),
        (lambda handle: list(handle.get_slice("a")), False),
    ):
        expected = compare(open_one, four, get)
        assert isinstance(expected, dict) or (expected[0] != "error") == works
        for keywords in ({"backend": "pread"}, {"device": "cuda:0"}):
            compare(lambda get=get, keywords=keywords: open_one(four, get, **keywords))
    shapes = compare(
        open_one, four, lambda handle: (handle.get_slice("a").get_shape(), handle.metadata())
    )
    assert shapes == ("value", ([2, 8], None))
    assert compare(lambda: safetensors.torch.load_file(four)).keys() == {"a", "b", "c"}
    assert compare(lambda: safetensors.torch.load_file(four, backend="pread"))[0] == "error"
    compare(lambda: safetensors.numpy.load_file(four))


def test_a_file_by_pread_loads_without_what_breaks_it(four):
    """A filter that leaves the 4-bit tensor out keeps stock from making it."""
    with stx_patch.patched({"b", "c"}):
        loaded = safetensors.torch.load_file(four, backend="pread")
    assert {name: tensor.view(torch.uint8).tolist() for name, tensor in loaded.items()} == {
        "b": [0x38, 0x39],
        "c": [0x61, 0x62],
    }


# --- what torch has set ---


def load_model(path, **keywords):
    model = torch.nn.Module()
    model.register_buffer("matrix", torch.zeros(4, 6, device="cpu"))
    safetensors.torch.load_model(model, path, strict=False, **keywords)
    return {"matrix": model.matrix}


ONE = safetensors.torch.save({"matrix": torch.arange(24.0).reshape(4, 6)})  # load() has no order
LOADS = {
    "load_file": lambda path: safetensors.torch.load_file(path),
    "pread": lambda path: safetensors.torch.load_file(path, backend="pread"),
    "load": lambda path: safetensors.torch.load(ONE),
    "load_model": load_model,
    "numpy": lambda path: safetensors.numpy.load_file(path)["matrix"],
    "slices": lambda path: open_one(
        path, lambda handle: {name: handle.get_slice(name)[...] for name in NAMES}
    ),
    "slices of bytes": lambda path: open_one(
        path, lambda handle: handle.get_slice("matrix")[1], backend="pread"
    ),
}


def under(mode, use):
    def used(*arguments):
        with mode():
            return use(*arguments)

    return used


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_as_stock(sample, load, device):
    torch.set_default_device(device)
    try:
        compare(LOADS[load], sample)
    finally:
        torch.set_default_device(None)
    compare(under(lambda: torch.device(device), LOADS[load]), sample)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode, torch.no_grad])
def test_modes_as_stock(sample, load, mode):
    compare(under(mode, LOADS[load]), sample)


def test_tensors_of_inference_mode_afterwards_as_stock(sample):
    """They may not be changed nor trained outside of it."""
    for use in (
        lambda tensor: tensor.add_(1),
        lambda tensor: tensor.requires_grad_(),
        lambda tensor: torch.nn.Parameter(tensor) * 2,
        lambda tensor: tensor.clone().add_(1),
        lambda tensor: tensor[1:],
    ):
        load = under(torch.inference_mode, LOADS["load_file"])
        compare(lambda use=use, load=load: use(load(sample)["matrix"]))


def test_a_mode_is_asked_at_each_call(sample):
    """A handle opened under one mode, used under another, and the other way round."""
    for mode in (torch.inference_mode, FakeTensorMode, lambda: torch.device("meta")):

        def mixed(mode=mode):
            with mode():
                inside = safetensors.safe_open(sample, "pt")
            outside = safetensors.safe_open(sample, "pt")
            found = {"inside": inside.get_tensor("matrix"), "slice": inside.get_slice("cube")[1]}
            with mode():
                found["again"] = outcome(outside.get_tensor, "matrix")[1]
            found["outside"] = outside.get_tensor("matrix")
            return {name: value for name, value in found.items() if torch.is_tensor(value)}

        assert compare(mixed).keys() >= {"inside", "slice", "outside"}


# --- what stock itself leaves open ---


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_an_order_that_stock_leaves_open(tmp_path):
    """Empty tensors share an offset: stock's order among them changes, ours is one of those."""
    entries = {
        "b": entry("U8", [0], 0, 0),
        "a": entry("U8", [2, 0], 0, 0),
        "c": entry("U8", [3], 0, 3),
        "e": entry("F32", [0], 3, 3),
        "d": entry("F32", [0], 3, 3),
    }
    path = write_raw(tmp_path / "file", entries, b"xyz")
    orders = {tuple(STOCK.load_file(path)) for _ in range(300)}
    assert len(orders) > 1, "stock has an order now: ours has to be that one"
    assert all(order.index("c") == 2 for order in orders)
    ours = {tuple(stx_patch.load_file(path)) for _ in range(20)}
    ours |= {tuple(stx_patch.safe_open(path).offset_keys()) for _ in range(20)}
    assert len(ours) == 1 and ours <= orders
    assert stx_patch.safe_open(path).keys() == sorted(entries)


def test_an_error_that_stock_leaves_open(tmp_path, patched):
    """Two entries at one place, and two dtypes that load() lacks: one of stock's errors."""
    path = write_raw(
        tmp_path / "file", {"a": entry("U8", [2], 0, 2), "b": entry("U8", [3], 0, 3)}, b"xyz"
    )
    expected = {outcome(STOCK.load_file, path) for _ in range(300)}
    found = {outcome(safetensors.torch.load_file, path) for _ in range(50)}
    assert found <= expected and {kind for kind, *_ in expected} == {"error"}
    write_raw(path, {"a": entry("F4", [2], 0, 1), "b": entry("F8_E8M0", [2], 1, 3)}, b"xyz")
    data = path.read_bytes()
    found = {outcome(safetensors.torch.load, data) for _ in range(50)}
    stx_patch.unpatch()
    expected = {outcome(safetensors.torch.load, data) for _ in range(300)}
    assert found <= expected and {kind for kind, *_ in expected} == {"error"}


# --- who else calls ---

PLACES = {
    "None": None,
    "cpu": "cpu",
    "device": torch.device("cpu"),
    "meta": "meta",
    "meta device": torch.device("meta"),
    "bytes": b"cpu",
    "dict": {"cpu": "cpu"},
    "callable": lambda storage, location: storage,
    "cuda": "cuda:0",
    "unknown": "gpu",
    "int": 0,
}


@pytest.mark.parametrize("place", PLACES)
def test_torch_load_as_stock(sample, place):
    def load(path, **keywords):
        return torch.load(path, map_location=PLACES[place], **keywords)

    for path in (sample, str(sample)):
        compare(load, path)
        compare(lambda path=path: load(path, weights_only=False, mmap=True))
    compare(load, sample.with_name("missing.safetensors"))


def test_torch_load_is_served_natively(patched, sample):
    before = stx_patch.stats()
    assert len(torch.load(sample, map_location=torch.device("cpu"))) == 5
    made = stx_patch.stats() - before
    assert (made.opens, made.tensors_native, made.fallbacks) == (1, 5, {})


def test_torch_load_of_something_else_is_not_ours(sample):
    """A file object, or another name, is not taken for safetensors."""
    compare(lambda: torch.load(io.BytesIO(sample.read_bytes())))
    other = sample.rename(sample.with_name("sample.bin"))
    compare(lambda: torch.load(other))
    torch.save({"a": torch.ones(2)}, other)
    assert compare(lambda: torch.load(other)).keys() == {"a"}


def test_a_model_from_the_hub_as_stock(tmp_path):
    """huggingface_hub's mixin calls load_model with `device`."""
    from huggingface_hub import PyTorchModelHubMixin

    class Model(torch.nn.Module, PyTorchModelHubMixin):
        def __init__(self, width=3):
            super().__init__()
            self.linear = torch.nn.Linear(width, 2)

    Model(width=5).save_pretrained(tmp_path)
    for keywords in ({}, {"map_location": "cpu"}, {"map_location": "cuda:0"}, {"strict": True}):

        def load(keywords=keywords):
            return Model.from_pretrained(str(tmp_path), **keywords).state_dict()

        expected = compare(load)
        assert "cuda:0" in keywords.values() or expected.keys() == {"linear.weight", "linear.bias"}


class Told(Exception):
    pass


RAISED = [Told, STOCK.SafetensorError, KeyboardInterrupt, StopIteration, ImportError, OSError]
CALLERS = {
    "torch.load": lambda path: torch.load(path),
    "load_model": load_model,
    "load_file": lambda path: safetensors.torch.load_file(path),
}


@pytest.mark.parametrize("kind", RAISED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("caller", CALLERS)
def test_a_filters_exception_through_other_callers(sample, caller, kind):
    """The same object comes out, and nobody is asked again. (torch.load rewords ImportError, a
    distributed checkpoint everything.)"""
    error, asked = kind("from the filter"), []

    def keep(key):
        asked.append(str(key))
        raise error

    with pytest.raises(BaseException) as caught, stx_patch.patched(keep) as report:
        CALLERS[caller](sample)
    is_reworded = caller == "torch.load" and kind is ImportError
    assert (caught.value.__cause__ if is_reworded else caught.value) is error
    assert len(asked) == 1 and report.fallbacks == {} and report.opens == 0


def test_load_file_pickles_by_name(sample):
    """In every protocol the same bytes as stock's, so that either process understands it."""
    for name in ("load_file", "load", "load_model", "save_file"):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            stock = pickle.dumps(getattr(safetensors.torch, name), protocol)
            with stx_patch.patched():
                data = pickle.dumps(getattr(safetensors.torch, name), protocol)
                assert data == stock
                assert pickle.loads(data) is getattr(safetensors.torch, name)
            assert pickle.loads(data) is getattr(safetensors.torch, name)
