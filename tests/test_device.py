"""Proves: tensors reach a device whole and in order, by load_file, handles, streams, slices and
transformers, over a runtime whose copies happen late; and nothing is handed out when it fails.

There is no device here: `tests/c/fake_cudart.c` is the runtime, and memory is its memory. What
needs a real one is marked `cuda`.
"""

import os

import pytest
import safetensors
import safetensors.torch
import torch
from device_helpers import FakeCuda, calls_count, fake_library, set_faults
from patch_helpers import run_python

import stx_patch
from stx_patch import _device, _native

MIB = 1 << 20


@pytest.fixture
def fake(monkeypatch):
    """A device `cuda:N`; the function sets faults."""
    fake_library()
    monkeypatch.setattr(_device, "cuda", FakeCuda())
    set_faults()
    yield set_faults
    set_faults(delay_us="0")


def make_tensors():
    generator = torch.Generator().manual_seed(1)
    tensors = {f"small.{n}": torch.rand((n % 7, 5), generator=generator) for n in range(300)}
    tensors["large"] = torch.rand((3 << 18, 8), generator=generator)
    tensors["half"] = torch.rand((1000, 33), generator=generator).half()
    tensors["brain"] = torch.rand((501, 3), generator=generator).bfloat16()
    tensors["double"] = torch.rand((77,), generator=generator).double()
    tensors["eight"] = torch.rand((64, 3), generator=generator).to(torch.float8_e4m3fn)
    tensors["ints"] = torch.arange(1 << 16)
    tensors["flags"] = torch.rand((4099,), generator=generator) > 0.5
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros((0, 4))
    tensors["complex"] = torch.rand((9, 2), generator=generator, dtype=torch.complex64)
    return tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    safetensors.torch.save_file(make_tensors(), path)
    return path


def same(left, right):
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.stride() == right.stride()
        and bytes(left.reshape(-1).view(torch.uint8).numpy())
        == bytes(right.reshape(-1).view(torch.uint8).numpy())
    )


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert same(tensor, expected[name]), name


@pytest.mark.parametrize("backend", ["mmap", "pread"])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3"])
def test_load_file(model, fake, device, backend):
    stx_patch.reset_stats()
    found = stx_patch.load_file(model, device=device, backend=backend)
    expected = stx_patch.load_file(model)
    assert_equal(found, expected)
    stats = stx_patch.stats()
    assert stats.fallbacks == {} and stats.tensors_native == 2 * len(expected)
    assert stats.bytes_to_device == sum(tensor.nbytes for tensor in expected.values())


def test_under_the_patch(model, fake):
    expected = safetensors.torch.load_file(model)
    with stx_patch.patched() as report:
        found = safetensors.torch.load_file(model, device="cuda:0")
    assert found.keys() == expected.keys() and all(same(found[n], expected[n]) for n in expected)
    assert report.fallbacks == {} and report.tensors_native == len(expected)


def test_a_filter_saves_what_it_leaves_out(model, fake):
    stx_patch.reset_stats()
    found = stx_patch.load_file(model, device="cuda", tensor_filter=["small.1*", "ints"])
    expected = stx_patch.load_file(model, tensor_filter=["small.1*", "ints"])
    assert_equal(found, expected)
    assert stx_patch.stats().bytes_read < 2 * MIB


def test_handle(model, fake):
    expected = stx_patch.load_file(model)
    with stx_patch.safe_open(model, device="cuda:1") as handle:
        assert isinstance(handle, safetensors.safe_open)
        assert handle.offset_keys() == list(expected) and handle.keys() == sorted(expected)
        assert handle.metadata() is None and handle.get_dtype("half") == "F16"
        assert handle.get_shape("large") == [3 << 18, 8] and handle.nbytes("scalar") == 4
        assert handle.filename_of("large") == str(model)
        assert handle.total_tensor_size == sum(tensor.nbytes for tensor in expected.values())
        for name in ("scalar", "empty", "large", "flags", "eight"):
            assert same(handle.get_tensor(name), expected[name])
        with pytest.raises(safetensors.SafetensorError, match="does not contain tensor missing"):
            handle.get_tensor("missing")
        with pytest.raises(TypeError):
            handle.get_tensor(3)
        assert_equal(handle.get_tensors(), expected)
    for use in (handle.keys, handle.get_tensors, lambda: handle.get_tensor("ints"), handle.tensors):
        with pytest.raises(safetensors.SafetensorError, match="File is closed"):
            use()


def test_slices_read_their_rows(model, fake):
    expected = stx_patch.load_file(model)
    indexes = [
        slice(3, 9), slice(0, 0), 5, -1, (slice(10, 20), slice(1, 3)), (7, 2), ..., (..., 3),
        slice(2, 100, 7), (slice(None), 4),
    ]  # fmt: skip
    handle = stx_patch.safe_open(model, device="cuda:0")
    entry, scalar = handle.get_slice("large"), handle.get_slice("flags")
    assert entry.get_shape() == [3 << 18, 8] and entry.get_dtype() == "F32"
    stx_patch.reset_stats()
    assert torch.equal(entry[3:9], expected["large"][3:9])
    assert stx_patch.stats().bytes_to_device == 6 * 32
    handle.__exit__(None, None, None)
    for index in indexes:
        found, wanted = entry[index], expected["large"][index]
        assert torch.equal(found, wanted), index
        assert found.is_contiguous() and found.untyped_storage().nbytes() == wanted.nbytes, index
    assert torch.equal(scalar[5:7], expected["flags"][5:7])


@pytest.mark.parametrize("taken", [0, 1, 5, None])
def test_stream(model, fake, monkeypatch, taken):
    monkeypatch.setattr("stx_patch._device_handle._PIECE_BYTES", 1 << 16)
    expected = stx_patch.load_file(model)
    handle = stx_patch.safe_open(model, device="cuda:0")
    stream = handle.tensors()
    found = {}
    for name, tensor in stream:
        found[name] = tensor
        if taken is not None and len(found) >= taken:
            break
    stream.close()
    if taken is None:
        assert_equal(found, expected)
    for name, tensor in found.items():
        assert same(tensor, expected[name])


def test_many_files(tmp_path, fake):
    expected = {}
    for shard in range(3):
        tensors = {f"{shard}.{n}": torch.rand(1000 + n) for n in range(5)}
        safetensors.torch.save_file(tensors, tmp_path / f"model-{shard}.safetensors")
        expected |= tensors
    found = stx_patch.load_file(tmp_path, device="cuda:0")
    assert found.keys() == expected.keys() and all(same(found[n], expected[n]) for n in expected)
    with stx_patch.safe_open(tmp_path, device="cuda:0") as handle:
        assert dict(handle.tensors()).keys() == expected.keys()


def test_every_call_of_the_runtime_may_fail(tmp_path, fake):
    """Not pinned is no failure; else nothing is handed out, and the next load is whole."""
    model = tmp_path / "small.safetensors"
    tensors = {f"t{n}": torch.rand(1000, 90 * n + 1) for n in range(20)}
    safetensors.torch.save_file(tensors, model)
    expected = stx_patch.load_file(model)
    stx_patch.load_file(model, device="cuda:7")  # has made the ring
    fake()
    stx_patch.load_file(model, device="cuda:7")
    count = calls_count()
    failures = 0
    for k in range(1, count + 1):
        fake(fail=f"any:{k}")
        try:
            found = stx_patch.load_file(model, device="cuda:7")
        except RuntimeError as error:
            assert "injected" in str(error)
            failures += 1
        else:
            assert_equal(found, expected)
    assert failures > count // 2
    fake()
    assert_equal(stx_patch.load_file(model, device="cuda:7"), expected)


def test_memory_that_cannot_be_pinned(model, fake):
    fake(fail_all="cudaHostRegister")
    stx_patch.reset_stats()
    assert_equal(stx_patch.load_file(model, device="cuda:9"), stx_patch.load_file(model))
    assert stx_patch.stats().loads_pageable == 1


def test_a_file_that_was_cut(model, fake, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(model.read_bytes())
    handle = stx_patch.safe_open(path, device="cuda:0")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(safetensors.SafetensorError, match="Could not read tensor"):
        handle.get_tensors()


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("streams", [False, True])
def test_progress(model, fake, monkeypatch, streams, dtype):
    monkeypatch.setattr("stx_patch._device_handle._PIECE_BYTES", 1 << 20)
    monkeypatch.setattr("stx_patch._device._WINDOW_BYTES", 1 << 20)
    monkeypatch.setattr("stx_patch._progress._INTERVAL_S", 0)
    told = []
    options = {"device": "cuda:0", "progress": lambda *sizes: told.append(sizes)}
    if streams:
        for _ in stx_patch.safe_open(model, **options).tensors(dtype=dtype):
            pass
    else:
        stx_patch.load_file(model, dtype=dtype, **options)
    with stx_patch.safe_open(model) as handle:
        total = handle.total_tensor_size
    assert told[-1] == (total, total) and told == sorted(told)
    assert len(told) > 1 or not (streams or dtype)


def test_what_watches_progress_may_end_it(model, fake):
    def refuse(done_bytes, total_bytes):
        raise ZeroDivisionError

    for dtype in (None, torch.float16):
        with pytest.raises(ZeroDivisionError):
            stx_patch.load_file(model, device="cuda:0", dtype=dtype, progress=refuse)
    with pytest.raises(ZeroDivisionError):
        list(stx_patch.safe_open(model, device="cuda:0", progress=refuse).tensors())


@pytest.mark.parametrize("at", [0, 5, 300])
def test_no_memory_on_the_device(model, fake, monkeypatch, at):
    """All memory is asked for before anything is read."""
    asked = []
    allocate = FakeCuda.allocate

    def refuse(self, shape, dtype, index):
        asked.append(shape)
        if len(asked) > at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(self, shape, dtype, index)

    monkeypatch.setattr(FakeCuda, "allocate", refuse)
    stx_patch.reset_stats()
    with pytest.raises(torch.OutOfMemoryError):
        stx_patch.load_file(model, device="cuda:0")
    assert stx_patch.stats().bytes_to_device == 0
    monkeypatch.setattr(FakeCuda, "allocate", allocate)
    assert_equal(stx_patch.load_file(model, device="cuda:0"), stx_patch.load_file(model))


@pytest.mark.parametrize("count", [1, 10_000])
def test_a_small_ring(tmp_path, fake, count):
    """Eight megabytes of staging, for one tensor of 40 or for ten thousand small ones."""
    path = tmp_path / "model.safetensors"
    tensors = {f"t{n:05}": torch.rand(10 * MIB // count + n % 3) for n in range(count)}
    safetensors.torch.save_file(tensors, path)
    fake(delay_us="20")
    found = stx_patch.load_file(path, device="cuda:11", staging_bytes="8MiB")
    assert found.keys() == tensors.keys() and all(same(found[n], tensors[n]) for n in tensors)


def test_without_a_device_it_is_stocks_to_refuse(model):
    run_python(
        """
        import sys, safetensors.torch, torch, stx_patch
        from stx_patch import _native
        if torch.cuda.is_available():
            sys.exit()
        assert not _native.core.device_runtime()
        refusals = set()
        for load in (safetensors.torch.load_file, stx_patch.load_file):
            try:
                load(sys.argv[1], device="cuda:0")
            except Exception as error:
                refusals.add((type(error), str(error)))
        assert len(refusals) == 1
        assert stx_patch.stats().fallbacks == {"device cuda:0": 1}
        """,
        model,
    )


# --- other dtypes ---


def converted(tensors, dtype):
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("window_bytes", [1 << 15, 1 << 20, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_converted_on_the_device(model, fake, monkeypatch, dtype, window_bytes):
    monkeypatch.setattr("stx_patch._device._WINDOW_BYTES", window_bytes)
    expected = converted(stx_patch.load_file(model), dtype)
    assert_equal(stx_patch.load_file(model, device="cuda:0", dtype=dtype), expected)


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_converted_on_the_cpu(model, backend):
    expected = converted(stx_patch.load_file(model), torch.float16)
    found = stx_patch.load_file(model, dtype=torch.float16, backend=backend)
    assert_equal(found, expected)
    assert stx_patch.load_file(model, dtype=torch.float32)["large"].dtype is torch.float32


def test_stored_bytes_are_never_there_whole(model, fake, monkeypatch):
    """Memory for the results, and one window."""
    monkeypatch.setattr("stx_patch._device._WINDOW_BYTES", 1 << 20)
    asked = []
    allocate = FakeCuda.allocate

    def counting(self, shape, dtype, index):
        tensor = allocate(self, shape, dtype, index)
        asked.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(FakeCuda, "allocate", counting)
    found = stx_patch.load_file(model, device="cuda:0", dtype=torch.bfloat16)
    assert sum(asked) <= sum(tensor.nbytes for tensor in found.values()) + (1 << 20)


@pytest.mark.parametrize("dtype", ["bfloat16", 3, torch.int32])
def test_what_is_no_dtype_to_load_as(model, fake, dtype):
    with pytest.raises(TypeError, match="dtype"):
        stx_patch.load_file(model, dtype=dtype)
    for device in ("cpu", "cuda:0"):
        with pytest.raises(TypeError, match="dtype"):
            stx_patch.safe_open(model, device=device).tensors(dtype=dtype)
    with pytest.raises(TypeError, match="dtype"):
        stx_patch.safe_open([model]).tensors(dtype)


@pytest.mark.parametrize("source", ["one", "many", "stock"])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_stream_of_another_dtype(model, fake, monkeypatch, device, source):
    monkeypatch.setattr("stx_patch._device_handle._PIECE_BYTES", 1 << 20)
    expected = converted(stx_patch.load_file(model), torch.bfloat16)
    if source == "stock":
        monkeypatch.setattr(_native, "core", None)
        device = "cpu"
    handle = stx_patch.safe_open([model] if source == "many" else model, device=device)
    found = dict(handle.tensors(dtype=torch.bfloat16))
    assert_equal(dict(sorted(found.items())), dict(sorted(expected.items())))
    stream = handle.tensors(torch.bfloat16)
    next(stream)
    stream.close()


# --- transformers ---


@pytest.fixture
def materialize(fake, monkeypatch):
    """transformers' function while we are patched, and what served it."""
    from transformers import core_model_loading

    original = core_model_loading._materialize_copy
    with stx_patch.patched() as report:
        assert core_model_loading._materialize_copy is not original
        yield core_model_loading._materialize_copy, report
    assert core_model_loading._materialize_copy is original


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_slice_of_transformers_goes_straight_to_the_device(model, materialize, dtype):
    function, report = materialize
    expected = {}
    with safetensors.safe_open(model, "pt") as handle:
        entries = {name: handle.get_slice(name) for name in handle.offset_keys()}
        for name in ("large", "half", "scalar", "ints", "empty", "small.3"):
            plain = handle.get_tensor(name)
            expected[name] = plain if dtype is None else plain.to(dtype)
    before = report.bytes_to_device
    for name, tensor in expected.items():
        assert same(function(entries[name], "cuda:0", dtype), tensor), name
    assert report.bytes_to_device > before and report.fallbacks == {}


@pytest.fixture
def shard_operation():
    """What transformers gives rank 1 of 2 for a parameter of a shape, with a placement."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers.distributed.sharding_utils import DtensorShardOperation

    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    mesh = init_device_mesh("cpu", (2,))

    def make(shape, placement):
        return DtensorShardOperation(distribute_tensor(torch.zeros(shape), mesh, [placement]))

    yield make
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_a_ranks_part(tmp_path, materialize, shard_operation, dim, dtype):
    """Whole rows go straight to the device; columns come from the CPU, as ever."""
    from torch.distributed.tensor import Replicate, Shard
    from transformers import core_model_loading

    _, report = materialize
    weight = torch.rand(600, 1000)
    path = tmp_path / "weight.safetensors"
    safetensors.torch.save_file({"weight": weight}, path)
    operation = shard_operation(weight.shape, Replicate() if dim is None else Shard(dim))
    with safetensors.safe_open(path, "pt") as handle:
        entry = handle.get_slice("weight")
    spawn = core_model_loading.spawn_materialize
    read = spawn(None, entry, None, dtype, operation)()
    assert report.bytes_to_device == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_device, "cuda", FakeCuda(also="cpu"))
        found = spawn(None, entry, "cpu", dtype, operation)()
    expected = {0: weight[300:], 1: weight[:, 500:], None: weight}[dim]
    expected = expected if dtype is None else expected.to(dtype)
    assert found.equal(expected) and found.dtype == expected.dtype and found.equal(read)
    assert report.bytes_to_device == (0 if dim == 1 else weight.nbytes // (2 if dim == 0 else 1))
    assert spawn(None, weight, "cpu", dtype, operation)().equal(expected)  # nothing of ours


def test_parts_that_are_put_together_on_the_device_are_waited_for(
    tmp_path, materialize, shard_operation
):
    """Fused weights: several runs of rows become one tensor, by work of the device's own."""
    from torch.distributed.tensor.placement_types import _StridedShard
    from transformers import core_model_loading

    _, report = materialize
    weight = torch.arange(64.0).view(8, 8)
    path = tmp_path / "fused.safetensors"
    safetensors.torch.save_file({"weight": weight}, path)
    operation = shard_operation(weight.shape, _StridedShard(0, split_factor=2))
    with safetensors.safe_open(path, "pt") as handle:
        entry = handle.get_slice("weight")
    happened = []
    shard = type(operation).shard_tensor

    class Watched(FakeCuda):
        def stream(self, index):
            happened.append("stream")
            return super().stream(index)

    def watched(*arguments, **keywords):
        found = shard(*arguments, **keywords)
        happened.append("shard")
        return found

    spawn = core_model_loading.spawn_materialize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(operation), "shard_tensor", watched)
        expected = spawn(None, entry, None, None, operation)()
        patch.setattr(_device, "cuda", Watched(also="cpu"))
        assert spawn(None, entry, "cpu", None, operation)().equal(expected)
    assert expected.equal(weight[[2, 3, 6, 7]]) and report.bytes_to_device == expected.nbytes
    assert happened[-2:] == ["shard", "stream"]


def test_one_expert_of_many_is_a_ranks_part(tmp_path, materialize, shard_operation):
    from torch.distributed.tensor import Shard
    from transformers import core_model_loading

    _, report = materialize
    weight = torch.rand(4, 7)
    path = tmp_path / "expert.safetensors"
    safetensors.torch.save_file({"weight": weight}, path)
    operation = shard_operation((6, 4, 7), Shard(0))
    with safetensors.safe_open(path, "pt") as handle:
        entry = handle.get_slice("weight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_device, "cuda", FakeCuda(also="cpu"))
        spawn = core_model_loading.spawn_materialize
        assert spawn(None, entry, "cpu", None, operation, 1)() is None  # the other rank's
        assert report.bytes_to_device == 0
        assert spawn(None, entry, "cpu", None, operation, 4)().equal(weight)
    assert report.bytes_to_device == weight.nbytes


def test_what_transformers_gives_that_is_not_ours_stays_its_own(model, materialize):
    function, report = materialize
    tensor = torch.rand(4)
    assert function(tensor).equal(tensor)
    assert function(tensor, "cpu", torch.float16).dtype is torch.float16
    with safetensors.safe_open(model, "pt") as handle:
        entry = handle.get_slice("half")
    assert same(function(entry, "cpu"), entry[...])
    assert same(function(entry, None, torch.float32), entry[...].float())
    assert report.bytes_to_device == 0


def test_a_file_that_was_replaced_is_read_by_its_mapping(model, materialize, tmp_path, monkeypatch):
    function, report = materialize
    monkeypatch.setattr(_device, "cuda", FakeCuda(also="cpu"))
    path = tmp_path / "replaced.safetensors"
    path.write_bytes(model.read_bytes())
    entry = safetensors.safe_open(path, "pt").get_slice("ints")
    path.unlink()
    safetensors.torch.save_file({"ints": torch.zeros(3)}, path)
    assert function(entry, "cpu").equal(torch.arange(1 << 16))
    assert report.bytes_to_device == 0
    other = safetensors.safe_open(path, "pt").get_slice("ints")
    assert function(other, "cpu").equal(torch.zeros(3))
    assert report.bytes_to_device == 12


def test_from_pretrained_through_the_device(tmp_path, fake, monkeypatch):
    """All of from_pretrained with its four threads, over a device that takes itself for the CPU."""
    from consumers.tiny import llama_config
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "m")
    monkeypatch.setattr(_device, "cuda", FakeCuda(also="cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        with stx_patch.patched() as report:
            model = LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)
        for (name, left), (_, right) in zip(
            model.named_parameters(), plain.to(dtype).named_parameters(), strict=True
        ):
            assert same(left.detach(), right.detach()), name
        assert report.fallbacks == {}
        assert report.bytes_to_device >= sum(p.nbytes for p in plain.parameters())


@pytest.mark.parametrize(
    "device_map",
    [{"": 0}, {"embed": "cuda:1", "layers": 0, "head": "cpu"}, {"embed": 0, "layers": "disk"}],
    ids=["one", "several", "disk"],
)
def test_accelerates_device_maps(tmp_path, fake, device_map):
    """What goes to a device goes through the core, and nothing else does."""
    from accelerate.utils.modeling import load_state_dict

    sizes = {"embed.weight": 700, "layers.0.weight": 300_000, "layers.1.weight": 5, "head": 9}
    tensors = {name: torch.randn(size, 2) for name, size in sizes.items()}
    path = str(tmp_path / "model.safetensors")
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with stx_patch.patched() as report:
        loaded = load_state_dict(path, device_map)
    wanted = {name: tensor for name, tensor in tensors.items() if name in loaded}
    assert all(same(loaded[name], tensor) for name, tensor in wanted.items())
    assert report.fallbacks == {} and report.tensors_native == len(loaded)
    places = {name: device_map.get(name.partition(".")[0], device_map.get("")) for name in sizes}
    on_device = [name for name, place in places.items() if place not in (None, "cpu", "disk")]
    assert set(on_device) <= loaded.keys()
    assert report.bytes_to_device == sum(tensors[name].nbytes for name in on_device)


# --- what is asked of torch ---


@pytest.fixture
def two_devices(monkeypatch):
    """torch as it is on a machine with two devices, the second one current."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    fake_library()
    return _device.Cuda()


@pytest.mark.parametrize(
    ("device", "index"),
    [
        ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), (0, 0), (1, 1), ("cuda:2", None), (2, None),
        (-1, None), (True, None), ("cuda:", None), ("cuda:x", None), ("cuda:\u0661", None),
        ("CUDA", None), ("mps", None), (None, None), (torch.device("cuda"), None), (1.0, None),
    ],
)  # fmt: skip
def test_which_devices_are_served(two_devices, device, index):
    assert two_devices.serves(device) is (index is not None)
    if index is not None:
        assert _device.index_in(device) == index


@pytest.mark.parametrize(
    ("device", "spelled"),
    [
        ("cuda", "cuda:1"), (torch.device("cuda"), "cuda:1"), (torch.device("cuda:0"), "cuda:0"),
        ("cuda:0", "cuda:0"), (0, 0), ("cpu", "cpu"), (torch.device("cpu"), torch.device("cpu")),
    ],
)  # fmt: skip
def test_what_torch_calls_a_device(two_devices, device, spelled):
    assert two_devices.spell(device) == spelled


def test_a_driver_that_does_not_answer(two_devices, monkeypatch):
    def refuse():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "device_count", refuse)
    assert not two_devices.serves("cuda")


def test_while_a_stream_is_recorded_stock_loads(model, fake, monkeypatch):
    monkeypatch.setattr(FakeCuda, "is_capturing", lambda self: True)
    handle = stx_patch.safe_open(model, device="cuda:0")
    for load in (
        handle.get_tensors,
        lambda: handle.get_tensor("ints"),
        lambda: [*handle.tensors()],
    ):
        with pytest.raises((AssertionError, RuntimeError, safetensors.SafetensorError)):
            load()  # stock's refusal here: there is no such device
    assert stx_patch.stats().fallbacks["tensor"] >= 3


def test_another_framework_does_not_need_torch():
    run_python(
        """
        import sys
        sys.modules["torch"] = None
        import safetensors, stx_patch
        stx_patch.patch()
        for framework in ("np", "paddle"):
            try:
                safetensors.safe_open("/missing", framework=framework, device="cuda:0")
            except ModuleNotFoundError as error:
                raise SystemExit(f"asked for torch: {error}")
            except Exception:
                pass
        """
    )
