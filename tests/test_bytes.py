"""Proves: `safetensors.torch.load(data)` under a patch answers as stock does, in tensors and in
errors; it is one copy of our own that keeps neither the data nor other tensors alive."""

import gc
import json
import pickle
import random
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import DTYPE_BITS, facts, outcome
from patch_helpers import STOCK, leaves_stock, run_python  # noqa: F401
from test_header_errors import REFUSED, TAKEN
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import stx_patch

KIB, MIB = 1 << 10, 1 << 20
PAGE_BYTES = 4096
SHAPES = [(), (0,), (3, 0, 2), (1,), (8,), (2, 3, 4), (5, 1, 8), (1, 1, 2), (16, 8)]


def make(entries, shift=0, metadata=None):
    """A file of (name, dtype, shape) in this order, of bytes that do not repeat; the data begins
    `shift` bytes beyond a multiple of 8."""
    header, at = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, dtype, shape in entries:
        size_bytes = int(np.prod(shape, dtype=object)) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size_bytes]}
        at += size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + shift)
    return struct.pack("<Q", len(text)) + text + np.random.default_rng(at).bytes(at)


def all_facts(tensors):
    return {name: facts(tensor) for name, tensor in tensors.items()}


def load_ours(data):
    """What the patched function answers; the test fails where that is not our own."""
    with stx_patch.patched() as report:
        tensors = safetensors.torch.load(data)
    assert report.fallbacks == {} and report.tensors_stock == 0
    assert report.tensors_native == len(tensors)
    return tensors


def same(*arguments, **keywords):
    """Stock's answer, which the patched function must give too, or another one of stock's: of
    several errors it names one by chance."""

    def ask(load):
        return outcome(lambda: all_facts(load(*arguments, **keywords)))

    if stx_patch.is_patched():
        found = ask(safetensors.torch.load)
    else:
        with stx_patch.patched():
            found = ask(safetensors.torch.load)
    expected = ask(STOCK.load)
    for _ in range(100):
        if found == expected or expected[0] == "value":
            break
        expected = ask(STOCK.load)
    assert found == expected
    return expected


@pytest.fixture
def poisoned(monkeypatch):
    """Stock can read no bytes."""

    def refuse(*arguments, **keywords):
        raise AssertionError("stock was asked")

    monkeypatch.setattr(safetensors.torch, "deserialize", refuse)


@pytest.fixture(scope="module")
def large():
    """About 40 MiB: tensors of odd sizes at odd places, small and empty ones between them."""
    entries = [
        ("a", "U8", [5 * MIB + 1]), ("b", "BF16", [3, 5]), ("c", "F32", [0, 4]),
        ("d", "I8", [13 * MIB + 4095]), ("e", "F64", []), ("f", "F32", [1024, 3000]),
        ("g", "U8", [PAGE_BYTES]), ("h", "U8", [1]), ("i", "F8_E4M3", [2 * MIB, 3]),
        ("j", "BOOL", [7]), ("k", "I64", [3, 123_457]), ("l", "I16", [MIB // 2 + 3]),
        ("m", "U8", [0]),
    ]  # fmt: skip
    return make(entries, shift=5)


@pytest.fixture(scope="module")
def large_facts(large):
    return all_facts(STOCK.load(large))


SMALL = make([("a", "F32", [2, 3]), ("b", "I64", [5]), ("c", "U8", [0]), ("d", "BF16", [])])


# --- the same values ---


@pytest.mark.parametrize("shift", [0, 1, 3, 7])
@pytest.mark.parametrize("order", ["up", "down"])
def test_every_dtype_in_many_shapes(shift, order):
    dtypes = [dtype for dtype in DTYPE_BITS if DTYPE_BITS[dtype] >= 8]
    known = [d for d in dtypes if outcome(STOCK.load, make([("x", d, [2])]))[0] == "value"]
    assert len(known) > 15
    entries = [(f"{d}{list(shape)}", d, list(shape)) for d in known for shape in SHAPES]
    data = make(entries if order == "up" else entries[::-1], shift, {"format": "pt"})
    assert all_facts(load_ours(data)) == all_facts(STOCK.load(data))


@pytest.mark.parametrize("dtype", DTYPE_BITS)
@pytest.mark.parametrize("shape", [[], [0], [4], [2, 4]], ids=str)
def test_each_dtype_as_stock_if_only_in_its_error(dtype, shape):
    data = make([("a", "F32", [3]), ("x", dtype, shape), ("z", "U8", [1])])
    same(data)
    same(data=data)


def test_a_large_file(large, large_facts, poisoned):
    assert all_facts(load_ours(large)) == large_facts


@pytest.mark.parametrize(
    "entries", [[], [("a", "F32", [0])], [("a", "F32", [0, 7]), ("b", "I8", [3, 0])]], ids=len
)
def test_nothing_in_it(entries, poisoned):
    data = make(entries)
    assert list(load_ours(data)) == [name for name, _, _ in entries]
    assert all(tensor.numel() == 0 for tensor in load_ours(data).values())


@pytest.mark.parametrize("size_bytes", [1, 63, 64, 65, 256 * KIB - 1, 256 * KIB, 2 * MIB, 9 * MIB])
def test_sizes_where_memory_changes(size_bytes):
    """From malloc() or in pages, copied by one thread or by several."""
    data = make([("x", "U8", [3]), ("y", "U8", [size_bytes]), ("z", "U8", [5])], shift=1)
    assert all_facts(load_ours(data)) == all_facts(STOCK.load(data))


def test_many_tensors():
    data = make([(f"t{i}", "F32", [i % 7]) for i in range(20_000)])
    assert all_facts(load_ours(data)) == all_facts(STOCK.load(data))


def test_names_of_any_kind():
    names = [
        "",
        " ",
        "\0",
        "🦙",
        "a.b/c",
        "__proto__",
        "%s{}",
        "\u2028",
        "x" * 3000,
        "é",
        "e\u0301",
    ]
    data = make([(name, "U8", [2]) for name in names])
    assert load_ours(data).keys() == STOCK.load(data).keys() == set(names)
    assert all_facts(load_ours(data)) == all_facts(STOCK.load(data))


def test_in_file_order():
    """Stock's own order differs from run to run."""
    names = random.Random(1).sample([f"t{i}" for i in range(500)], 500)
    assert list(load_ours(make([(name, "U8", [1]) for name in names]))) == names


MODES = {
    "inference": torch.inference_mode,
    "no inference": lambda: torch.inference_mode(False),
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "default device": lambda: torch.device("cpu"),
    "default dtype": lambda: DefaultDtype(),
}


class DefaultDtype:
    def __enter__(self):
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *exc_info):
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_in_modes_of_torch_as_stock(mode, large):
    with MODES[mode]():
        assert same(SMALL)[0] == "value"
        tensors = safetensors.torch.load(SMALL)
        assert all(tensor.is_inference() == (mode == "inference") for tensor in tensors.values())


class Renamed(TorchFunctionMode):
    """Sees every function of torch that is called by its name."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [Renamed, Recording])
def test_modes_that_watch_torch_see_what_they_see_of_stock(kind):
    def watch(load):
        with kind() as mode:
            tensors = load(SMALL)
        return sorted(mode.seen), all_facts(tensors)

    expected = watch(STOCK.load)
    with stx_patch.patched() as report:
        assert watch(safetensors.torch.load) == expected
    assert expected[0] and report.fallbacks == {"load(bytes)": 1}


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_is_a_function_mode(device):
    torch.set_default_device(device)
    try:
        expected = {name: (t.device, t.shape) for name, t in STOCK.load(SMALL).items()}
        with stx_patch.patched() as report:
            found = safetensors.torch.load(SMALL)
        assert {name: (t.device, t.shape) for name, t in found.items()} == expected
    finally:
        torch.set_default_device(None)
    assert report.fallbacks == {"load(bytes)": 1}


def test_a_fake_tensor_mode_as_stock():
    def load(loader):
        with FakeTensorMode(allow_non_fake_inputs=True):
            tensors = loader(SMALL)
            return {name: (type(t), t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    expected = outcome(load, STOCK.load)
    with stx_patch.patched():
        assert outcome(load, safetensors.torch.load) == expected


# --- what stock refuses ---


def test_damaged_bytes_in_stocks_words():
    """Every file that stock refuses to open."""
    with stx_patch.patched():
        for name, data in REFUSED.items():
            assert same(data)[0] == "error", name


def test_odd_bytes_as_stock():
    """Every odd file that stock takes."""
    with stx_patch.patched():
        for name, data in TAKEN.items():
            assert same(data)[0] in ("value", "error"), name


def test_cut_at_every_byte():
    with stx_patch.patched():
        for size_bytes in range(len(SMALL)):
            assert same(SMALL[:size_bytes])[0] == "error"
        assert same(SMALL + b"x")[0] == "error"
        assert same(SMALL + SMALL)[0] == "error"


def test_bytes_changed_at_random():
    generator = random.Random(2)
    kinds = set()
    with stx_patch.patched():
        for _ in range(3000):
            data = bytearray(SMALL)
            for _ in range(generator.randint(1, 3)):
                place = generator.randrange(len(data))
                data[place] = generator.choice([*b'0123456789[]{}",:', generator.randrange(256)])
            kinds.add(same(bytes(data))[0])
    assert kinds == {"value", "error"}


class Bytes(bytes):
    """Bytes of another class, which says something else of itself."""

    def __len__(self):
        return 3


class Buffer:
    def __buffer__(self, flags):
        return memoryview(SMALL)

    def __bytes__(self):
        return SMALL


ARGUMENTS = {
    "bytearray": bytearray(SMALL), "memoryview": memoryview(SMALL), "str": "abc", "None": None,
    "int": 3, "list": [SMALL], "array": np.frombuffer(SMALL, np.uint8), "path": Path("missing"),
    "tensor": torch.zeros(8, dtype=torch.uint8), "buffer": Buffer(), "bytes of another class":
    Bytes(SMALL), "empty": b"", "class": bytes,
}  # fmt: skip


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments_of_other_kinds_as_stock(kind):
    result = same(ARGUMENTS[kind])
    assert (result[0] == "value") == (kind == "bytes of another class")
    assert same(data=ARGUMENTS[kind]) == result


def test_calls_of_other_forms_as_stock():
    same()
    same(SMALL, SMALL)
    same(SMALL, data=SMALL)
    same(SMALL, device="cpu")
    same(bytes=SMALL)
    assert same(data=SMALL)[0] == "value"


# --- the filter in force ---

FILTERS = {
    "names": ["a", "d", "missing"],
    "glob": "[ab]",
    "callable": lambda key: key.nbytes > 4 and key.dtype != "I64",
    "all": "*",
    "empty ones": lambda key: key.nbytes == 0,
    "nothing": [],
}
KEPT = {"names": "ad", "glob": "ab", "callable": "a", "all": "abcd", "empty ones": "c"}


@pytest.mark.parametrize("name", FILTERS)
def test_the_filter_in_force_holds(name, poisoned):
    with stx_patch.patched(tensor_filter=FILTERS[name]) as report:
        tensors = safetensors.torch.load(SMALL)
    assert list(tensors) == list(KEPT.get(name, ""))
    assert report.fallbacks == {} and report.tensors_native == len(tensors)
    whole = load_ours(SMALL)
    assert all_facts(tensors) == {name: facts(whole[name]) for name in tensors}


def test_a_callable_filter_is_asked_as_for_a_file(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(SMALL)
    asked = []

    def keep(key):
        asked.append((str(key), key.dtype, tuple(key.shape), key.nbytes))
        return True

    with stx_patch.patched(tensor_filter=keep):
        safetensors.torch.load_file(path)
        by_file = asked[:]
        asked.clear()
        safetensors.torch.load(SMALL)
    assert asked == by_file and len(asked) == 4


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, Stop, MemoryError])
def test_a_filter_that_raises_comes_through(error):
    def keep(key):
        if key == "b":
            raise error("so")
        return True

    before = sys.getrefcount(SMALL)
    with stx_patch.patched(tensor_filter=keep), pytest.raises(error, match="so"):
        safetensors.torch.load(SMALL)
    assert sys.getrefcount(SMALL) == before


def test_a_filter_may_load_itself():
    """What it loads inside is filtered as well, so it must end that itself."""
    asked = []

    def keep(key):
        asked.append(str(key))
        if len(asked) == 1:
            assert list(safetensors.torch.load(SMALL)) == ["b"]
        return key == "b"

    with stx_patch.patched(tensor_filter=keep):
        assert list(safetensors.torch.load(SMALL)) == ["b"]
    assert asked == ["a", *"abcd", *"bcd"]


def test_what_is_left_out_needs_no_kind_of_its_own():
    """F4 is nothing that stock loads from bytes; where it is left out, the rest is ours."""
    data = make([("a", "F32", [3]), ("x", "F4", [4]), ("y", "F6_E2M3", [4])])
    assert same(data)[0] == "error"
    with stx_patch.patched(tensor_filter="a"):
        result = outcome(safetensors.torch.load, data)
    assert result[0] == "error" or list(result[1]) == ["a"]


# --- memory ---


def anonymous_bytes():
    gc.collect()
    (line,) = [
        line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line
    ]
    return int(line.split()[1]) * KIB


def as_bytes(tensor):
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())


def test_no_tensor_shares_memory(large, large_facts):
    """Each is filled with its own bytes; none shows in another, nor in the data."""
    content = bytes(bytearray(large))
    held = [load_ours(large), load_ours(large)]
    tensors = [tensor for group in held for tensor in group.values()]
    for number, tensor in enumerate(tensors):
        as_bytes(tensor).fill_(number + 1)
    for number, tensor in enumerate(tensors):
        assert bool((as_bytes(tensor) == number + 1).all())
    assert large == content
    assert all_facts(load_ours(large)) == large_facts


@pytest.mark.parametrize("seed", range(3))
def test_dropping_tensors_leaves_the_others_alone(large, large_facts, seed):
    names = list(large_facts)
    random.Random(seed).shuffle(names)
    tensors = load_ours(large)
    for name in names:
        del tensors[name]
        assert all_facts(tensors) == {other: large_facts[other] for other in tensors}


def test_dropping_tensors_returns_their_memory():
    data = make([(name, "U8", [16 * MIB]) for name in "abcd"])
    load_ours(data)
    before = anonymous_bytes()
    tensors = load_ours(data)
    for left in (4, 3, 2, 1, 0):
        held = (anonymous_bytes() - before) / MIB
        assert abs(held - 16 * left) < 5, (left, held)
        if left:
            del tensors["bdac"[left - 1]]
    with stx_patch.patched(tensor_filter="c"):
        view = safetensors.torch.load(data)["c"][5:9]
    assert abs((anonymous_bytes() - before) / MIB - 16) < 5, "only what is kept has memory"
    assert view.tolist() == list(data[-32 * MIB + 5 : -32 * MIB + 9])


def test_the_data_is_not_kept_alive(large, large_facts):
    data = bytes(bytearray(large))
    before, count = anonymous_bytes(), sys.getrefcount(data)
    tensors = load_ours(data)
    assert sys.getrefcount(data) == count
    del data
    gc.collect()
    assert anonymous_bytes() - before < 5 * MIB, "the tensors and not the data"
    assert all_facts(tensors) == large_facts


def test_tensors_lie_where_torchs_own_do(large):
    """At multiples of 64, as stock's buffers need not."""
    for tensor in (*load_ours(large).values(), *load_ours(SMALL).values()):
        assert tensor.data_ptr() % 64 == 0


@pytest.mark.parametrize("use", ["model", "save", "resize", "pickle", "share", "numpy", "in place"])
def test_tensors_may_be_used_as_stocks(use, tmp_path):
    def save_and_load(tensors):
        torch.save(tensors, tmp_path / "saved")
        assert (tmp_path / "saved").stat().st_size < 20_000
        return torch.load(tmp_path / "saved")

    uses = {
        "model": lambda tensors: {"a": tensors["a"] @ tensors["a"].T},
        "save": save_and_load,
        "resize": lambda tensors: {"b": tensors["b"].resize_(20)},
        "pickle": lambda tensors: pickle.loads(pickle.dumps(tensors)),
        "share": lambda tensors: {"b": tensors["b"].share_memory_()},
        "numpy": lambda tensors: {"b": torch.from_numpy(tensors["b"].numpy() + 1)},
        "in place": lambda tensors: {"a": tensors["a"].add_(1), "c": tensors["c"].add_(1)},
    }
    expected = outcome(lambda: all_facts(uses[use](STOCK.load(SMALL))))
    assert outcome(lambda: all_facts(uses[use](load_ours(SMALL)))) == expected


def test_no_memory_for_the_tensors(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(make([("a", "U8", [300 * MIB])]))
    run_python(
        """
        import resource, sys
        from pathlib import Path
        import safetensors.torch, stx_patch
        data = open(sys.argv[1], "rb").read()
        stx_patch.patch()
        small = safetensors.torch.save({"a": __import__("torch").ones(3)})
        assert len(safetensors.torch.load(small)) == 1
        used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used_bytes + (200 << 20), -1))
        try:
            safetensors.torch.load(data)
        except MemoryError as error:
            assert "bytes of tensors" in str(error), error
        else:
            raise AssertionError
        assert len(safetensors.torch.load(small)) == 1
        """,
        path,
    )


# --- who asks ---


def test_many_threads_at_once(large, large_facts, poisoned):
    failures, small_facts = [], all_facts(load_ours(SMALL))

    def work(number):
        try:
            for _ in range(2):
                assert all_facts(safetensors.torch.load(large)) == large_facts
                for _ in range(50):
                    assert all_facts(safetensors.torch.load(SMALL)) == small_facts
        except BaseException as error:
            failures.append(error)

    with stx_patch.patched() as report:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == [] and report.fallbacks == {}


def test_who_bound_the_function_before_or_reads_a_file_itself(tmp_path, poisoned):
    """As loaders do that must not map: `load(f.read())`, the function imported by name."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(SMALL)
    with stx_patch.patched() as report:
        from safetensors.torch import load as safe_load

        with open(path, "rb") as file:
            tensors = safe_load(file.read())
        assert list(tensors) == list("abcd") and report.tensors_native == 4
    tensors["a"] += 1
    path.unlink()
    assert tensors["b"].shape == (5,)


def test_without_a_patch_it_is_stocks(monkeypatch):
    before = stx_patch.stats()
    assert safetensors.torch.load is STOCK.load
    safetensors.torch.load(SMALL)
    assert stx_patch.stats() == before


def test_an_undone_patch_leaves_the_tensors(large, large_facts):
    with stx_patch.patched():
        tensors = safetensors.torch.load(large)
    gc.collect()
    assert all_facts(tensors) == large_facts
