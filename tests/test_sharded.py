"""Proves: many files are opened, filtered, read and refused as one; what two of them claim is
settled by the index or not at all."""

import json
import os
import resource
import time
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from helpers import STOCK, facts, in_a_child, outcome
from patch_helpers import (
    PageCache,
    drop_from_cache,
    leaves_stock,  # noqa: F401
    open_descriptors,
    run_python,
    settle,
)

import stx_patch
from stx_patch import _native, filters

MIB = 1 << 20
SHARDS = 3
both = pytest.mark.parametrize("backend", ["mmap", "pread"])


def tensors_of(shard):
    generator = torch.Generator().manual_seed(shard)
    return {
        f"model.layers.{shard}.{name}": torch.randn(shape, generator=generator).to(dtype)
        for name, shape, dtype in [
            ("q", (8, 16), torch.float32),
            ("a", (3,), torch.bfloat16),
            ("scale", (), torch.float64),
            ("none", (0, 4), torch.int32),
        ]
    }


def write_model(folder, shards=SHARDS, index=True):
    """Shards of a few tensors, of which number 10 comes behind number 9; the paths in order."""
    folder.mkdir(exist_ok=True)
    weight_map, paths = {}, []
    for shard in range(shards):
        path = folder / f"model-{shard + 1}-of-{shards}.safetensors"
        safetensors.torch.save_file(tensors_of(shard), path, {"format": "pt", "shard": str(shard)})
        weight_map.update(dict.fromkeys(tensors_of(shard), path.name))
        paths.append(str(path))
    if index:
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
    return paths


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model")


def stock_facts(paths, backend="mmap"):
    """Name -> tensor, by stock, in the order of files and places."""
    expected = {}
    for path in paths:
        with STOCK.safe_open(path, "pt", backend=backend) as handle:
            expected.update((name, handle.get_tensor(name)) for name in handle.offset_keys())
    return {name: facts(tensor) for name, tensor in expected.items()}


def as_list(paths):
    return paths


def as_paths(paths):
    return tuple(map(Path, paths))


def as_folder(paths):
    return os.path.dirname(paths[0])


def as_folder_path(paths):
    return Path(paths[0]).parent


def as_index(paths):
    return os.path.join(os.path.dirname(paths[0]), "model.safetensors.index.json")


def as_folder_without_index(paths):
    os.unlink(as_index(paths))
    return os.path.dirname(paths[0])


FORMS = [as_list, as_paths, as_folder, as_folder_path, as_index, as_folder_without_index]
each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


# --- the same tensors ---


@both
@each_form
def test_all_methods(model, form, backend):
    expected = stock_facts(model, backend)
    source = form(model)
    before = stx_patch.stats()
    with stx_patch.safe_open(source, backend=backend) as handle:
        assert (stx_patch.stats() - before).opens == SHARDS
        assert isinstance(handle, stx_patch.safe_open) and isinstance(handle, STOCK.safe_open)
        assert handle.keys() == sorted(expected)
        assert handle.offset_keys() == list(expected)
        assert handle.metadata() == {"format": "pt", "shard": "0"}
        assert handle.total_tensor_size == sum(len(f["bytes"]) for f in expected.values())
        assert {n: facts(t) for n, t in handle.get_tensors().items()} == expected
        for name, found in expected.items():
            assert facts(handle.get_tensor(name)) == found
            if found["bytes"] and found["shape"]:
                assert facts(handle.get_slice(name)[:]) == found
            assert handle.get_shape(name) == list(found["shape"])
            assert handle.nbytes(name) == len(found["bytes"])
            shard = int(name.split(".")[2])
            assert handle.filename_of(name) == model[shard]
        assert handle.get_dtype("model.layers.1.a") == "BF16"
        pairs = [(name, facts(tensor)["bytes"]) for name, tensor in handle.tensors()]
        assert pairs == [(name, found["bytes"]) for name, found in expected.items()]
    assert (stx_patch.stats() - before).fallbacks == {}
    loaded = stx_patch.load_file(source, backend=backend)
    assert list(loaded) == list(expected) and {n: facts(t) for n, t in loaded.items()} == expected


def test_more_than_nine_shards_come_in_the_order_of_their_numbers(tmp_path):
    paths = write_model(tmp_path / "model", 12)
    for source in (tmp_path / "model", as_folder_without_index(paths)):
        names = stx_patch.safe_open(source).offset_keys()
        assert names == [name for shard in range(12) for name in tensors_of_file(paths[shard])]
    assert stx_patch.safe_open(paths[::-1]).offset_keys()[0] == tensors_of_file(paths[11])[0]


def tensors_of_file(path):
    with STOCK.safe_open(path, "pt") as handle:
        return handle.offset_keys()


def test_one_file_in_a_list(model):
    handle = stx_patch.safe_open(model[:1])
    assert handle.offset_keys() == tensors_of_file(model[0])
    assert stx_patch.safe_open(model[0]).filename_of("model.layers.0.q") == model[0]


def test_what_stock_serves_is_served_behind_the_same_methods(model):
    handle = stx_patch.safe_open(model, framework="np", tensor_filter="*.q")
    assert handle.offset_keys() == [f"model.layers.{shard}.q" for shard in range(SHARDS)]
    for name, array in handle.get_tensors().items():
        assert (array == STOCK.load_file(handle.filename_of(name))[name].numpy()).all()
    assert handle.filename_of("model.layers.2.q") == model[2]


def test_patched_names_take_single_files_as_stock_does(model):
    """A list of files is ours alone."""
    folder = os.path.dirname(model[0])
    expected = [outcome(STOCK.safe_open, source, "pt") for source in (model, folder)]
    with stx_patch.patched():
        assert [outcome(safetensors.safe_open, source, "pt") for source in (model, folder)] == (
            expected
        )


def test_tensors_outlive_the_handle(model):
    with stx_patch.safe_open(model) as handle:
        kept = handle.get_tensors()
        part = handle.get_slice("model.layers.1.q")
    assert {n: facts(t) for n, t in kept.items()} == stock_facts(model)
    assert part[0].shape == (16,)
    for use in (handle.keys, handle.offset_keys, handle.metadata, handle.get_tensors):
        with pytest.raises(safetensors.SafetensorError, match="File is closed"):
            use()
    with pytest.raises(safetensors.SafetensorError, match="File is closed"):
        handle.get_tensor("model.layers.1.q")
    with pytest.raises(safetensors.SafetensorError, match="File is closed"):
        handle.tensors()


# --- filters ---


def test_the_filter_runs_once_over_all_files_in_order(model):
    asked = []

    def keep(key):
        asked.append((str(key), key.filename))
        return key.dtype == "F32"

    handle = stx_patch.safe_open(model, tensor_filter=keep)
    expected = [(name, path) for path in model for name in tensors_of_file(path)]
    assert asked == expected
    assert handle.keys() == [f"model.layers.{shard}.q" for shard in range(SHARDS)]
    assert handle.total_tensor_size == SHARDS * 8 * 16 * 4
    with pytest.raises(safetensors.SafetensorError, match="left out by tensor_filter"):
        handle.get_tensor("model.layers.1.a")
    with pytest.raises(safetensors.SafetensorError, match=r"does not contain tensor nothing$"):
        handle.get_tensor("nothing")
    with pytest.raises(safetensors.SafetensorError, match="left out by tensor_filter"):
        handle.get_slice("model.layers.1.a")


def test_a_filter_that_raises_leaves_nothing_open(model):
    error, before = KeyError("mine"), open_descriptors()

    def keep(key):
        if key.startswith("model.layers.1"):
            raise error
        return True

    with pytest.raises(KeyError) as caught:
        stx_patch.safe_open(model, backend="pread", tensor_filter=keep)
    assert caught.value is error and open_descriptors() == before


@pytest.mark.parametrize("form", [as_folder, as_index])
def test_files_of_which_an_index_lists_nothing_that_is_kept_need_not_be_there(model, form):
    os.unlink(model[1])
    source = form(model)
    with pytest.raises(FileNotFoundError, match="model-2-of-3"):
        stx_patch.safe_open(source)
    before = stx_patch.stats()
    handle = stx_patch.safe_open(source, tensor_filter=filters.layers(2, 3), strict_filter=True)
    assert (stx_patch.stats() - before).opens == 1
    assert sorted(handle.keys()) == sorted(tensors_of(2))
    with pytest.raises(safetensors.SafetensorError, match="left out by tensor_filter"):
        handle.get_tensor("model.layers.1.q")
    with pytest.raises(safetensors.SafetensorError, match=r"does not contain tensor nothing$"):
        handle.get_tensor("nothing")


@pytest.mark.parametrize("form", [as_list, as_folder])
def test_strictness_looks_at_all_files(model, form):
    names = {"model.layers.0.q", "model.layers.2.a"}
    handle = stx_patch.safe_open(form(model), include_keys=names, strict_filter=True)
    assert set(handle.keys()) == names
    with pytest.raises(safetensors.SafetensorError, match=r"does not contain: 'model.layers.9.q'"):
        stx_patch.safe_open(
            form(model), include_keys=names | {"model.layers.9.q"}, strict_filter=True
        )


@pytest.mark.parametrize("form", [as_list, as_folder])
def test_nothing_kept_of_all_of_them_is_told_once(model, form):
    with pytest.warns(stx_patch.StxFilterWarning) as warnings:
        handle = stx_patch.safe_open(form(model), tensor_filter="nothing")
    assert len(warnings) == 1 and handle.keys() == [] and handle.get_tensors() == {}
    assert list(handle.tensors()) == [] and handle.total_tensor_size == 0
    with pytest.warns(stx_patch.StxFilterWarning):
        assert stx_patch.load_file(form(model), tensor_filter="nothing") == {}


# --- names that two files claim ---


def duplicate(model, folder, name="shared"):
    """Two more files with a tensor of one name; their paths."""
    paths = []
    for number, value in enumerate((1.0, 2.0, 3.0)):
        path = folder / f"extra-{number}.safetensors"
        tensors = {name: torch.full((4,), value), f"own.{number}": torch.zeros(2)}
        safetensors.torch.save_file(tensors, path)
        paths.append(str(path))
    return paths


def test_without_an_index_a_name_in_two_files_is_an_error(model, tmp_path):
    first, second, _ = duplicate(model, tmp_path)
    with pytest.raises(safetensors.SafetensorError) as caught:
        stx_patch.safe_open([*model, first, second])
    assert str(caught.value) == f"two files have a tensor shared: {first} and {second}"
    handle = stx_patch.safe_open([first, second], tensor_filter=filters.none_of({"shared"}))
    assert handle.keys() == ["own.0", "own.1"]


@pytest.mark.parametrize("winner", [0, 1, 2])
def test_the_index_says_which_one_counts(model, tmp_path, winner):
    paths = duplicate(model, tmp_path)
    files = [os.path.basename(path) for path in paths]
    weight_map = {f"own.{number}": files[number] for number in range(3)}
    weight_map["shared"] = files[winner]
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    handle = stx_patch.safe_open(index)
    assert handle.keys() == ["own.0", "own.1", "own.2", "shared"]
    assert handle.get_tensor("shared").tolist() == [winner + 1.0] * 4
    assert handle.filename_of("shared") == paths[winner]
    assert handle.get_tensors()["shared"].tolist() == [winner + 1.0] * 4
    assert dict(handle.tensors())["shared"].tolist() == [winner + 1.0] * 4
    assert handle.total_tensor_size == 16 + 3 * 8


def test_an_index_that_lists_what_is_not_there(model):
    index = as_index(model)
    content = json.loads(Path(index).read_text())
    content["weight_map"]["missing"] = "model-2-of-3.safetensors"
    Path(index).write_text(json.dumps(content))
    with pytest.raises(safetensors.SafetensorError, match=r"lists tensor missing in .*model-2-of"):
        stx_patch.safe_open(index)
    assert len(stx_patch.safe_open(index, tensor_filter=filters.layers(0, 1)).keys()) == 4
    with pytest.raises(safetensors.SafetensorError, match="lists tensor missing"):
        stx_patch.safe_open(index, tensor_filter=lambda key: True)


@pytest.mark.parametrize("keep", [None, lambda key: True, {"p", "q"}, "*"])
def test_an_index_that_confuses_its_files(tmp_path, keep):
    for name, file in (("p", "b"), ("q", "a")):
        tensors = {name: torch.zeros(2)}
        safetensors.torch.save_file(tensors, tmp_path / f"{file}.safetensors")
    index = {"weight_map": {"p": "a.safetensors", "q": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(safetensors.SafetensorError, match=r"lists tensor p in .*a.safetensors"):
        stx_patch.safe_open(tmp_path, tensor_filter=keep)


def test_a_callable_is_asked_once_about_names_that_two_files_claim(tmp_path):
    duplicate(None, tmp_path)
    weight_map = {f"own.{number}": f"extra-{number}.safetensors" for number in range(3)}
    weight_map["shared"] = "extra-1.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    asked = []

    def first_five(key):
        asked.append(str(key))
        return len(asked) <= 5

    handle = stx_patch.safe_open(tmp_path, tensor_filter=first_five)
    assert len(asked) == 6
    assert len(handle.keys()) + 1 + (asked[:5].count("shared") - 1) == 5 + 1


def test_filters_that_look_at_the_file_under_an_index(tmp_path):
    """The same as over a list of the files."""
    paths = []
    for file, names in (("1", ("x", "stale")), ("2", ("y", "z"))):
        paths.append(str(tmp_path / f"{file}.safetensors"))
        safetensors.torch.save_file({name: torch.zeros(2) for name in names}, paths[-1])
    weight_map = {"x": "1.safetensors", "stale": "1.safetensors"}
    weight_map |= {"y": "2.safetensors", "z": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    other = filters.indexed({"y": "1.safetensors", "z": "2.safetensors"})
    for keep in (filters.none_of(other), other, filters.regex("^[xy]$")):
        expected = stx_patch.safe_open(paths, tensor_filter=keep).keys()
        assert stx_patch.safe_open(tmp_path, tensor_filter=keep).keys() == expected


def test_a_regex_needs_no_more_files_than_a_glob(model):
    os.unlink(model[1])
    for keep in (filters.regex(r"layers\.2\."), "model.layers.2.*"):
        handle = stx_patch.safe_open(as_folder(model), tensor_filter=keep)
        assert len(handle.keys()) == 4
        told = stx_patch.explain(as_folder(model), tensor_filter=keep)
        assert [file.filename for file in told.files] == [model[2]]


def test_nothing_kept_needs_one_file_that_is_there(model):
    os.unlink(model[0])
    with pytest.warns(stx_patch.StxFilterWarning):
        assert stx_patch.load_file(as_folder(model), tensor_filter="nothing") == {}


# --- what is refused ---


def test_ctrl_c_while_files_are_opened(model, monkeypatch):
    """It comes before what a file's opening raises."""
    from stx_patch import _files, _sharded

    def opener(path, rule):
        raise KeyboardInterrupt if path == model[1] else FileNotFoundError(path)

    with pytest.raises(KeyboardInterrupt):
        _sharded.open_files(_files.find_files(model), None, opener)


def test_what_is_no_set_of_files(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        stx_patch.safe_open(tmp_path / "empty")
    with pytest.raises(ValueError, match="empty list"):
        stx_patch.safe_open([])
    with pytest.raises(TypeError):
        stx_patch.safe_open([1])
    (tmp_path / "none.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="lists no tensors"):
        stx_patch.safe_open(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="is no index"):
        stx_patch.load_file(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError):
        stx_patch.load_file(tmp_path / "missing.json")


def test_hidden_files_of_a_folder_are_left_alone(model):
    folder = as_folder_without_index(model)
    Path(folder, "._model.safetensors").write_bytes(b"of another system")
    assert len(stx_patch.safe_open(folder).keys()) == 12


def test_a_path_twice(model):
    with pytest.raises(ValueError, match="twice"):
        stx_patch.safe_open([model[0], model[1], model[0]])


def test_a_folder_of_two_models(model):
    folder = Path(model[0]).parent
    (folder / "other.safetensors.index.json").write_text('{"weight_map": {}}')
    assert len(stx_patch.safe_open(folder).keys()) == 12, "the usual name counts"
    (folder / "model.safetensors.index.json").rename(folder / "third.safetensors.index.json")
    with pytest.raises(ValueError, match="several indexes"):
        stx_patch.safe_open(folder)


@both
@pytest.mark.parametrize("damaged", range(SHARDS))
def test_a_damaged_file_among_them(model, backend, damaged):
    Path(model[damaged]).write_bytes(b"nothing of the kind")
    before = open_descriptors()
    expected = outcome(STOCK.safe_open, model[damaged], "pt")
    assert outcome(stx_patch.safe_open, model, backend=backend) == expected
    os.unlink(model[damaged])
    expected = outcome(STOCK.safe_open, model[damaged], "pt")
    assert outcome(stx_patch.load_file, model, backend=backend) == expected
    assert open_descriptors() == before


# --- resources ---


def write_large(folder, shards, tensors, size_bytes):
    folder.mkdir(exist_ok=True)
    paths = []
    for shard in range(shards):
        path = folder / f"{shard:03}.safetensors"
        content = {
            f"s{shard}.t{number}": torch.full((size_bytes,), (shard + number) % 251).byte()
            for number in range(tensors)
        }
        safetensors.torch.save_file(content, path)
        paths.append(str(path))
    return paths


def has_one_thread():
    """Now, or soon: a thread that has ended may be listed for a moment."""
    for _ in range(200):
        if len(os.listdir("/proc/self/task")) == 1:
            return True
        time.sleep(0.01)
    return False


def test_two_hundred_shards_hold_no_descriptor_and_no_thread(tmp_path):
    paths = write_large(tmp_path / "m", 200, 5, 64)

    def work():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        before = len(open_descriptors())
        handle = stx_patch.safe_open(paths)
        assert len(handle.keys()) == 1000
        assert len(open_descriptors()) == before and has_one_thread()
        assert sum(1 for _ in handle.tensors()) == 1000
        assert len(open_descriptors()) == before and has_one_thread()

    assert in_a_child(work) == 0


def test_a_cold_model_is_read_once_and_only_what_is_kept(tmp_path):
    paths = write_large(tmp_path / "m", 3, 8, 2 * MIB)
    for path in paths:
        drop_from_cache(path)
    tensors = stx_patch.load_file(paths, tensor_filter="*.t[04]")
    settle()
    assert len(tensors) == 6
    for path in paths:
        cache = PageCache(path)
        resident = cache.resident_bytes(0, os.path.getsize(path))
        cache.close()
        assert resident <= 4 * MIB + MIB


def test_streaming_more_than_the_process_may_hold(tmp_path):
    """Twelve shards of 64 MiB in a process whose anonymous memory may grow by 400 MiB."""
    folder = tmp_path / "m"
    folder.mkdir()
    for shard in range(12):
        path = folder / f"{shard}.safetensors"
        size_bytes = 8 * MIB
        header = {
            f"s{shard}.t{n}": {
                "dtype": "U8",
                "shape": [size_bytes],
                "data_offsets": [n * size_bytes, (n + 1) * size_bytes],
            }
            for n in range(8)
        }
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, path.stat().st_size + 8 * size_bytes)
    run_python(
        """
        import resource, sys
        import torch
        torch.set_num_threads(1)
        import stx_patch
        handle = stx_patch.safe_open(sys.argv[1])
        assert handle.total_tensor_size == 12 * 64 << 20
        used_bytes = int(open("/proc/self/statm").read().split()[0]) * 4096
        limit = used_bytes + (400 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        names = []
        for name, tensor in handle.tensors():
            assert tensor[0] == 0 and tensor[-1] == 0
            names.append(name)
            del tensor
        assert names == handle.offset_keys()
        """,
        folder,
    )


@both
@pytest.mark.parametrize("taken", [0, 3, 9])
def test_a_stream_that_is_left_leaves_nothing(tmp_path, backend, taken):
    paths = write_large(tmp_path / "m", 3, 4, 64 << 10)
    handle = stx_patch.safe_open(paths, backend=backend)
    before = len(open_descriptors())
    for end in ("close", "drop"):
        stream = handle.tensors()
        for _ in range(taken):
            next(stream)
        if end == "close":
            stream.close()
        del stream
        assert len(open_descriptors()) == before


def test_whether_handles_have_names_in_common(model):
    overlap = _native.core.names_overlap
    handles = [stx_patch.safe_open(path) for path in model]
    assert overlap([]) is overlap(handles) is False
    assert overlap([*handles, stx_patch.safe_open(model[0])]) is True
    assert overlap([*handles, object()]) is True  # cannot be told
    with pytest.raises(TypeError):
        overlap(tuple(handles))
    handles[0].__exit__(None, None, None)
    assert overlap(handles) is True


def test_closing_the_handle_ends_its_stream(tmp_path):
    paths = write_large(tmp_path / "m", 3, 4, 64 << 10)
    handle = stx_patch.safe_open(paths)
    stream = handle.tensors()
    next(stream)
    handle.__exit__(None, None, None)
    with pytest.raises(safetensors.SafetensorError, match="File is closed"):
        next(stream)


def test_explaining_many_files(model):
    for source in (model, as_folder(model), as_index(model)):
        told = stx_patch.explain(source, tensor_filter="*.q")
        assert [file.filename for file in told.files] == model
        assert told.native and told.tensors_kept == SHARDS and told.tensors_skipped == 3 * SHARDS
        assert told.bytes_kept == SHARDS * 8 * 16 * 4
