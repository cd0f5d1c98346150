"""Proves: what is extracted is what the filter keeps, bit for bit, in a file that safetensors could
have written; and under the target's name there is that file or nothing."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import stat

import numpy as np
import pytest
import safetensors
import torch
from helpers import DTYPE_BITS, STOCK, in_a_child, native, to_bytes, write_raw
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_helpers import run_python
from safetensors.torch import save_file
from test_parity import files

import stx_patch
from stx_patch import _header, _layout, _native, _writer, filters

MIB = 1 << 20


def raw_tensors(path):
    """Name -> (dtype, shape, bytes), by the format's own rules."""
    data = path.read_bytes()
    size_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size_bytes])
    metadata = header.pop("__metadata__", None)
    begin = 8 + size_bytes
    return metadata, {
        name: (
            entry["dtype"],
            entry["shape"],
            data[begin + entry["data_offsets"][0] : begin + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def leftovers(folder):
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


@pytest.fixture
def model(tmp_path):
    """A file of some layers."""
    torch.manual_seed(0)
    tensors = {
        f"model.layers.{n}.{part}.weight": torch.randn(5, n + 1).to(dtype)
        for n in range(12)
        for part, dtype in (("a", torch.float32), ("b", torch.bfloat16), ("c", torch.int8))
    }
    tensors["model.embed.weight"] = torch.randn(300, 7)
    tensors["empty"] = torch.empty(0, 3)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.fixture
def target(tmp_path):
    return tmp_path / "part.safetensors"


# --- what is written ---


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("extract")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(file=files(), data=st.data())
def test_round_trip(place, file, data):
    source, first, again = (place / name for name in ("source", "first", "again"))
    write_raw(source, *file)
    metadata, tensors = raw_tensors(source)
    chosen = frozenset(data.draw(st.lists(st.sampled_from(sorted(tensors) or [""]))))
    kept = {name: tensor for name, tensor in tensors.items() if name in chosen}
    if not kept:
        with pytest.raises(ValueError, match="keeps nothing"):
            stx_patch.extract(source, first, tensor_filter=chosen.__contains__, overwrite=True)
        return
    for target in (first, again):
        result = stx_patch.extract(source, target, tensor_filter=chosen, overwrite=True)
        assert result.paths == (str(target),)
        assert (result.tensors, result.tensors_total) == (len(kept), len(tensors))
        assert result.size_bytes == sum(len(tensor[2]) for tensor in kept.values())
        assert result.total_bytes == sum(len(tensor[2]) for tensor in tensors.values())
    assert raw_tensors(first) == (metadata, kept)
    assert first.read_bytes() == again.read_bytes()
    handle = STOCK.safe_open(first, "pt")
    assert sorted(kept) == handle.keys() and handle.metadata() == metadata
    source_handle = STOCK.safe_open(source, "pt")
    for name, (dtype, shape, _) in kept.items():
        if dtype.startswith("F6") or len(shape) == 0:
            continue  # torch has none, or stock's own tensor of it differs
        try:
            expected = source_handle.get_tensor(name)
        except (safetensors.SafetensorError, RuntimeError):
            continue
        assert to_bytes(handle.get_tensor(name)) == to_bytes(expected)


def test_everything_equals_what_safetensors_writes(tmp_path, target):
    """All dtypes of whole bytes, in an order of safetensors' own: the same bytes."""
    tensors = {}
    for number, (dtype, bits) in enumerate(DTYPE_BITS.items()):
        if bits < 8:
            continue
        for name in (f"z{number}", f"a.{number}", f"é{number}"):
            values = np.frombuffer(random.Random(name).randbytes(bits), np.uint8)
            tensors[name] = (dtype, values)
    specs = {}
    for name, (dtype, values) in tensors.items():
        shape = [values.nbytes * 8 // DTYPE_BITS[dtype]]
        specs[name] = make_spec(dtype, shape, values)
    data = safetensors.serialize(specs, {"format": "pt"})
    source = tmp_path / "source.safetensors"
    source.write_bytes(data)
    stx_patch.extract(source, target)
    assert target.read_bytes() == source.read_bytes()
    shuffled = tmp_path / "shuffled.safetensors"
    entries = raw_tensors(source)[1]
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name in random.Random(1).sample(sorted(entries), len(entries)):
        dtype, shape, part = entries[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(part)]}
        at += len(part)
    write_raw(shuffled, header, b"".join(entries[name][2] for name in list(header)[1:]))
    stx_patch.extract(shuffled, target, overwrite=True)
    assert target.read_bytes() == source.read_bytes()


def make_spec(dtype, shape, values):
    """A tensor as this safetensors takes it."""
    if hasattr(safetensors, "TensorSpec"):
        names = {
            "BOOL": "bool", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
            "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
            "F8_E5M2FNUZ": "float8_e5m2fnuz", "BF16": "bfloat16", "C64": "complex64",
        }  # fmt: skip
        plain = {"F": "float", "I": "int", "U": "uint"}
        name = names.get(dtype) or plain[dtype[0]] + dtype[1:]
        address = values.__array_interface__["data"][0]
        return safetensors.TensorSpec(
            dtype=name, shape=shape, data_ptr=address, data_len=values.nbytes
        )
    return {"dtype": dtype, "shape": shape, "data": values.tobytes()}


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "z": "1", "a": 'é"\n'}])
def test_metadata_is_kept(tmp_path, target, metadata):
    entry = {"w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}
    header = entry if metadata is None else {"__metadata__": metadata, **entry}
    source = write_raw(tmp_path / "source", header, b"ab")
    stx_patch.extract(source, target)
    assert raw_tensors(target)[0] == metadata
    assert STOCK.safe_open(target, "pt").metadata() == metadata
    assert int.from_bytes(target.read_bytes()[:8], "little") % 8 == 0


def test_layers(model, target):
    result = stx_patch.extract(model, target, prefixes=["model.layers.1", "model.embed.weight"])
    stock = STOCK.load_file(model)
    kept = {n: t for n, t in stock.items() if n.startswith(("model.layers.1.", "model.embed"))}
    loaded = STOCK.load_file(target)
    assert loaded.keys() == kept.keys() and result.tensors == 4
    assert all(to_bytes(loaded[name]) == to_bytes(tensor) for name, tensor in kept.items())


@pytest.mark.parametrize(
    "tensor_filter", ["*.a.*", {"empty"}, filters.layers(2, 4), lambda key: key.nbytes < 30]
)
def test_any_filter(model, target, tensor_filter):
    stx_patch.extract(model, target, tensor_filter=tensor_filter)
    kept = stx_patch.load_file(model, tensor_filter=tensor_filter)
    loaded = STOCK.load_file(target)
    assert loaded.keys() == kept.keys()
    assert all(to_bytes(loaded[name]) == to_bytes(tensor) for name, tensor in kept.items())


def test_the_filter_in_force_counts(model, target):
    with stx_patch.patched(tensor_filter="*.a.*"):
        stx_patch.extract(model, target, tensor_filter=filters.layers(0, 2))
        with pytest.raises(safetensors.SafetensorError, match=r"contain 'empty'"):
            stx_patch.extract(model, target, names=["empty"], overwrite=True)
    kept = {"model.layers.0.a.weight", "model.layers.1.a.weight"}
    assert STOCK.load_file(target).keys() == kept


# --- several files ---


@pytest.fixture
def llama(tmp_path):
    """A transformers model in shards, and its tensors."""
    from consumers.tiny import llama_config
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path / "llama"
    LlamaForCausalLM(llama_config()).save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    return folder, {name: t for shard in shards for name, t in STOCK.load_file(shard).items()}


def test_a_model_split_and_merged_loads_equal(llama, tmp_path):
    from transformers import LlamaForCausalLM

    folder, tensors = llama
    parts = tmp_path / "parts"
    parts.mkdir()
    first, second, whole = parts / "first", parts / "second", parts / "model.safetensors"
    layers = ["model.layers.0", "model.layers.1"]
    begin = stx_patch.extract(folder, first, prefixes=layers)
    rest = filters.none_of(filters.prefixes(*layers))
    end = stx_patch.extract(folder / "model.safetensors.index.json", second, tensor_filter=rest)
    assert begin.tensors + end.tensors == len(tensors)
    merged = stx_patch.merge([second, first], whole, check=True)
    assert (merged.tensors, merged.tensors_total) == (len(tensors), len(tensors))
    shutil.copy(folder / "config.json", parts)
    whole_again = tmp_path / "again.safetensors"
    stx_patch.extract(folder, whole_again)
    assert whole_again.read_bytes() == whole.read_bytes()
    before = LlamaForCausalLM.from_pretrained(folder).state_dict()
    after = LlamaForCausalLM.from_pretrained(parts).state_dict()
    assert before.keys() == after.keys()
    assert all(to_bytes(after[name]) == to_bytes(tensor) for name, tensor in before.items())


def test_shards_and_an_index(llama, tmp_path):
    folder, tensors = llama
    target = tmp_path / "sharded"
    result = stx_patch.extract(folder, target, max_shard_size="15KB", check=True)
    *shards, index = result.paths
    assert [os.path.basename(path) for path in result.paths] == sorted(os.listdir(target))
    assert len(shards) > 3 and index.endswith("model.safetensors.index.json")
    weight_map = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in shards:
        loaded = STOCK.load_file(shard)
        assert sum(t.nbytes for t in loaded.values()) <= 15_000 or len(loaded) == 1
        assert {name for name, file in weight_map.items() if file == os.path.basename(shard)} == (
            loaded.keys()
        )
    loaded = stx_patch.load_file(target)
    assert loaded.keys() == tensors.keys()
    assert all(to_bytes(loaded[name]) == to_bytes(tensor) for name, tensor in tensors.items())
    one = stx_patch.extract(target, tmp_path / "one", max_shard_size="1GB")
    assert [os.path.basename(path) for path in one.paths] == ["model.safetensors"]
    with pytest.raises(ValueError, match="max_shard_size"):
        stx_patch.extract(folder, tmp_path / "no", max_shard_size="much")
    assert not (tmp_path / "no").exists()


def test_a_folder_appears_whole(llama, tmp_path, monkeypatch):
    """Whoever loads a folder without an index takes what there is: there is never only a part."""
    folder, tensors = llama
    target = tmp_path / "sharded"
    seen = []

    def look(done_bytes, total_bytes):
        seen.append(target.exists())
        if done_bytes > total_bytes / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stx_patch.extract(folder, target, max_shard_size="15KB", progress=look)
    assert seen and not any(seen) and os.listdir(tmp_path) == ["llama"]
    target.mkdir()
    stx_patch.extract(folder, target, max_shard_size="15KB")  # over an empty one
    before = what_is_in(target)
    for refusal in (False, True):
        (target / "config.json").write_text("{}") if refusal else None
        with pytest.raises(FileExistsError, match=r"config\.json" if refusal else "not empty"):
            stx_patch.extract(
                folder, target, max_shard_size="50KB", overwrite=refusal, names=["lm_head.weight"]
            )
    (target / "config.json").unlink()
    assert what_is_in(target) == before

    monkeypatch.setattr(_writer, "sync_folder", lambda folder: 1 / 0)  # as late as can be
    with pytest.raises(ZeroDivisionError):
        stx_patch.extract(folder, target, max_shard_size="15KB", overwrite=True, prefixes=["model"])
    assert what_is_in(target) == before and not leftovers(tmp_path)
    monkeypatch.undo()
    stx_patch.extract(folder, target, max_shard_size="1GB", overwrite=True, prefixes=["model"])
    assert os.listdir(target) == ["model.safetensors"] and not leftovers(tmp_path)
    expected = {name for name in tensors if name.startswith("model.")}
    assert stx_patch.load_file(target).keys() == expected
    with pytest.raises(FileExistsError, match="is no folder"):
        stx_patch.extract(folder, target / "model.safetensors", max_shard_size="1GB")
    with pytest.raises(ValueError, match="is the folder of what is read"):
        stx_patch.extract(target, target, max_shard_size="1GB", overwrite=True)


def test_a_folder_that_cannot_be_exchanged_is_as_it_was(llama, tmp_path, monkeypatch):
    target = tmp_path / "sharded"
    stx_patch.extract(llama[0], target, max_shard_size="15KB")
    before, real = what_is_in(target), os.rename

    def fail(old, new):
        if new == str(target) and not target.exists():
            monkeypatch.undo()
            raise OSError(errno.EIO, "gone")
        real(old, new)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="sharded"):
        stx_patch.extract(llama[0], target, max_shard_size="1GB", overwrite=True)
    assert what_is_in(target) == before and not leftovers(tmp_path)


def test_more_shards_than_a_process_may_have_files(tmp_path):
    save_file({f"t{n}": torch.zeros(1) for n in range(100)}, tmp_path / "many")

    def work():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        result = stx_patch.extract(tmp_path / "many", tmp_path / "s", max_shard_size=1)
        assert len(result.paths) == 101

    assert in_a_child(work) == 0


def save_settled(folder):
    """An index that says which of two files counts for "twice"."""
    folder.mkdir()
    save_file({"a": torch.zeros(3), "twice": torch.zeros(3)}, folder / "m-1.safetensors")
    save_file({"b": torch.ones(3), "twice": torch.ones(3)}, folder / "m-2.safetensors")
    files = {"a": "m-1.safetensors", "b": "m-2.safetensors", "twice": "m-2.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    return index, files


@pytest.mark.parametrize("merges", [False, True])
def test_what_an_index_says_counts(tmp_path, target, merges):
    index, files = save_settled(tmp_path / "m")
    other = tmp_path / "other.safetensors"
    save_file({"c": torch.zeros(1)}, other)
    if merges:
        stx_patch.merge([index, other], target)
    else:
        stx_patch.extract(tmp_path / "m", target)
    loaded = STOCK.load_file(target)
    assert loaded.keys() == {"a", "b", "twice"} | ({"c"} if merges else set())
    assert loaded["twice"].equal(torch.ones(3))
    index.write_text(json.dumps({"weight_map": files | {"z": "m-2.safetensors"}}))
    with pytest.raises(safetensors.SafetensorError, match="lists tensor z"):
        stx_patch.merge([tmp_path / "m", other], tmp_path / "no")


def test_the_order_of_files_is_one(tmp_path):
    """Names that are equal by their numbers, too: the first file's metadata counts."""
    for name in ("m-01", "m-1", "m-001"):
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors", metadata={"of": name})
    code = f"""
        import stx_patch
        stx_patch.extract({str(tmp_path)!r}, {str(tmp_path)!r} + "/out", overwrite=True)
        print(stx_patch.safe_open({str(tmp_path)!r} + "/out", "np").metadata()["of"])
    """
    for seed in ("1", "2", "3"):
        said = run_python(code, env={"PYTHONHASHSEED": seed}, expect_output=None)
        assert said.strip() == "m-001"


def test_two_files_with_a_tensor_of_the_same_name(model, tmp_path, target):
    twin = tmp_path / "twin.safetensors"
    shutil.copy(model, twin)
    with pytest.raises(safetensors.SafetensorError, match="two files have a tensor"):
        stx_patch.merge([model, twin], target)
    assert not target.exists() and not leftovers(tmp_path)


def test_metadata_of_several_files(tmp_path, target):
    for name, metadata in (("a", {"x": "1", "y": "2"}), ("b", {"x": "3", "z": "4"}), ("c", None)):
        save_file({name: torch.zeros(1)}, tmp_path / name, metadata=metadata)
    stx_patch.merge([tmp_path / "a", tmp_path / "b", tmp_path / "c"], target)
    assert raw_tensors(target)[0] == {"x": "1", "y": "2", "z": "4"}


# --- what is refused ---


def refused(exception, match, source, target, **keywords):
    """It raises, and leaves everything as it was."""
    before = what_is_in(os.path.dirname(target))
    with pytest.raises(exception, match=match) as caught:
        stx_patch.extract(source, target, **keywords)
    assert what_is_in(os.path.dirname(target)) == before
    return caught.value


def what_is_in(folder):
    """The files of a folder that may not be there, and when they were written."""
    if not os.path.isdir(folder):
        return None
    with os.scandir(folder) as entries:
        return {entry.name: (entry.inode(), entry.stat().st_mtime_ns) for entry in entries}


def test_missing_names(model, target):
    refused(
        safetensors.SafetensorError,
        r"does not contain 'no\.1', 'no\.2'; nothing was written",
        model,
        target,
        names=["no.2", "empty", "no.1"],
    )


def test_prefixes_that_match_nothing(model, target):
    with pytest.warns(stx_patch.StxExtractWarning, match="'model.layers.99': the whole model"):
        result = stx_patch.extract(model, target, prefixes=["model.layers.99"])
    assert result.tensors == result.tensors_total
    with pytest.warns(stx_patch.StxExtractWarning, match=r"begins with 'model.layers.99'$"):
        result = stx_patch.extract(
            model, target, prefixes=["model.layers.99", "model.layers.3"], overwrite=True
        )
    assert result.tensors == 3


def test_what_is_refused(model, target, tmp_path):
    refused(ValueError, "keeps nothing of .*model.safetensors", model, target, tensor_filter="x*")
    refused(ValueError, "names or prefixes, not both", model, target, names=[], prefixes=[])
    refused(TypeError, "prefixes is a list", model, target, prefixes="model")
    refused(FileNotFoundError, "nothing.safetensors", tmp_path / "nothing.safetensors", target)
    refused(FileNotFoundError, "No such file", model, tmp_path / "no" / "such" / "target")
    refused(IsADirectoryError, str(tmp_path), model, tmp_path, overwrite=True)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(model.read_bytes()[:-1])
    refused(safetensors.SafetensorError, "incomplete metadata", cut, target)


def test_what_no_file_can_be_written_to(model, target, tmp_path):
    refused(IsADirectoryError, "part.safetensors/", model, f"{target}/")
    refused(OSError, "File name too long", model, tmp_path / ("x" * 300))
    os.mkfifo(target)
    error = refused(FileExistsError, "is no file", model, target, overwrite=True)
    assert error.filename == str(target)
    refused(OSError, "is not a regular file: .*part", target, tmp_path / "other")
    refused(IsADirectoryError, str(tmp_path), [tmp_path], tmp_path / "other")
    with pytest.raises(TypeError, match="names must be a collection"):
        stx_patch.extract(model, target, names="empty")
    for source, place in ((1, target), (model, b"target"), (model, None)):
        with pytest.raises(TypeError, match="a source is a path" if source == 1 else "a target is"):
            stx_patch.extract(source, place)
    with pytest.raises(TypeError, match="a list of files"):
        stx_patch.merge(model, target)
    with pytest.raises(ValueError, match="empty list"):
        stx_patch.merge([], target)
    (tmp_path / "cut").write_bytes(model.read_bytes()[:-1])
    with pytest.raises(safetensors.SafetensorError, match=r"/cut: .*incomplete metadata"):
        stx_patch.merge([model, tmp_path / "cut"], tmp_path / "other")


def test_a_path_means_what_the_system_means_by_it(model, tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    monkeypatch.chdir(tmp_path)
    result = stx_patch.extract("model.safetensors", "link/../out", names=["empty"])
    assert (tmp_path / "a" / "out").exists() and not (tmp_path / "out").exists()
    assert os.path.samefile(result.paths[0], tmp_path / "a" / "out")


def test_a_header_that_is_too_long(model, target, monkeypatch):
    monkeypatch.setattr(_layout, "_HEADER_BYTES_MAX", 100)
    refused(ValueError, r"38 tensors need .* 100: write several", model, target)


def test_the_filter_in_force_may_keep_nothing(model, target):
    with stx_patch.patched(tensor_filter="nothing*"):
        refused(ValueError, "keeps nothing", model, target)
    with stx_patch.patched(tensor_filter="*.b.*"), pytest.warns(stx_patch.StxExtractWarning):
        # One prefix is there, but for the filter: that is no reason to take everything.
        refused(ValueError, "keeps nothing", model, target, prefixes=["empty", "nothing"])


def test_a_target_that_exists(model, target):
    target.write_bytes(b"precious")
    error = refused(FileExistsError, "part.safetensors", model, target)
    assert error.errno == errno.EEXIST and error.filename == str(target)
    assert target.read_bytes() == b"precious"
    stx_patch.extract(model, target, names=["empty"], overwrite=True)
    assert STOCK.load_file(target).keys() == {"empty"}


@pytest.mark.parametrize("link", [None, os.link, os.symlink])
def test_the_source_as_target(model, target, link):
    if link is None:
        target = model
    else:
        link(model, target)
    before = model.read_bytes()
    refused(ValueError, "is what is read", model, target, overwrite=True)
    assert model.read_bytes() == before


def test_what_belongs_to_the_source_as_target(llama):
    """Also what needs not be opened for the part that is wanted."""
    folder, _ = llama
    for name in sorted(os.listdir(folder)):
        if name.endswith((".safetensors", ".index.json")):
            refused(
                ValueError,
                "is what is read",
                folder,
                folder / name,
                overwrite=True,
                names=["lm_head.weight"],
            )


@pytest.mark.parametrize("links", [True, False])
def test_a_target_that_appears_meanwhile(model, target, monkeypatch, links):
    """Nobody's file is replaced without being asked."""
    if not links:
        forbid_links(monkeypatch)

    def appear(done_bytes, total_bytes):
        target.write_bytes(b"somebody's")

    with pytest.raises(FileExistsError):
        stx_patch.extract(model, target, progress=appear)
    assert target.read_bytes() == b"somebody's" and not leftovers(target.parent)


def test_mode_bits_are_a_new_files(model, target):
    before = os.umask(0o027)
    try:
        stx_patch.extract(model, target)
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o640


# --- what goes wrong on the way ---


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_progress_raises_leaves_nothing(model, target, error):
    def fail(done_bytes, total_bytes):
        assert leftovers(target.parent)
        raise error

    with pytest.raises(error):
        stx_patch.extract(model, target, progress=fail)
    assert not target.exists() and not leftovers(target.parent)


def test_progress_reaches_the_end(llama, tmp_path):
    seen = []
    result = stx_patch.extract(
        llama[0], tmp_path / "s", max_shard_size="15KB", progress=lambda *at: seen.append(at)
    )
    assert seen == sorted(seen) and seen[-1] == (result.size_bytes, result.size_bytes)


def test_a_full_disk(model, tmp_path, target):
    """The kernel refuses to make the file longer."""

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
        with pytest.raises(OSError, match="File too large") as caught:
            stx_patch.extract(model, target)
        assert caught.value.filename == str(target)

    assert in_a_child(work) == 0
    assert not target.exists() and not leftovers(tmp_path)


def test_a_source_that_is_changed_meanwhile(model, target):
    def change(done_bytes, total_bytes):
        os.utime(model, ns=(1, 1))

    with pytest.raises(safetensors.SafetensorError, match=r"model\.safetensors was changed"):
        stx_patch.extract(model, target, progress=change)
    assert not target.exists() and not leftovers(target.parent)


def test_a_source_whose_time_was_put_back(model, target):
    """As rsync and cp -p do, but for the time of the change itself."""
    before = model.stat()

    def change(done_bytes, total_bytes):
        with open(model, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
        os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))

    refused_meanwhile = pytest.raises(safetensors.SafetensorError, match="was changed")
    with refused_meanwhile:
        stx_patch.extract(model, target, progress=change)
    assert not target.exists()


@pytest.mark.parametrize("copies", [True, False])
def test_a_source_that_is_cut_meanwhile(model, target, monkeypatch, copies):
    if not copies:
        forbid_copying(monkeypatch, errno.EXDEV)
    real = _writer.Draft.fill

    def cut(self, *arguments):
        os.truncate(model, model.stat().st_size - 4000)
        real(self, *arguments)

    monkeypatch.setattr(_writer.Draft, "fill", cut)
    with pytest.raises(safetensors.SafetensorError, match=r"model\.safetensors: file truncated at"):
        stx_patch.extract(model, target)
    assert not target.exists() and not leftovers(target.parent)


def forbid_copying(monkeypatch, number):
    def refuse(*arguments, **keywords):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refuse)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS])
def test_where_the_kernel_does_not_copy(model, target, monkeypatch, number):
    forbid_copying(monkeypatch, number)
    stx_patch.extract(model, target, check=True)
    assert target.read_bytes() == model.read_bytes()


def test_where_there_are_no_hard_links(model, target, monkeypatch):
    forbid_links(monkeypatch)
    stx_patch.extract(model, target)
    assert target.read_bytes() == model.read_bytes()
    refused(FileExistsError, "part", model, target)


def forbid_links(monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)


def test_where_there_is_no_such_call(model, target, monkeypatch):
    monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.delattr(os, "posix_fadvise")
    stx_patch.extract(model, target, check=True)
    assert target.read_bytes() == model.read_bytes()


def test_a_source_that_cannot_be_read(model, target, monkeypatch):
    """The kernel says EIO and not of which file: the one that reading fails for."""

    def fail(*arguments, **keywords):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "copy_file_range", fail)
    assert refused(OSError, "part", model, target).filename == str(target)
    monkeypatch.setattr(os, "pread", fail)
    assert refused(OSError, "model", model, target).filename == str(model)


def test_it_is_on_the_disk_before_it_has_its_name(model, target, monkeypatch):
    happened = []

    def watch(name):
        real = getattr(os, name)

        def call(*arguments, **keywords):
            what = (
                "folder" if name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else ""
            )
            happened.append(name + what)
            return real(*arguments, **keywords)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "link", "replace", "rename"):
        watch(name)
    stx_patch.extract(model, target)
    assert happened == ["fsync", "link", "fsyncfolder"]
    happened.clear()
    stx_patch.extract(model, target, overwrite=True)
    assert happened == ["fsync", "replace", "fsyncfolder"]
    happened.clear()
    stx_patch.extract(model, target.with_name("folder"), max_shard_size="1KB")
    shards = len(os.listdir(target.with_name("folder"))) - 1
    assert shards > 3
    written = ["fsync", "link", "fsyncfolder"]
    assert happened == [*written * shards, *written, "rename", "fsyncfolder"]


def test_interrupted_when_the_file_has_just_been_made(model, target, monkeypatch):
    real = os.open

    def interrupt(path, flags, *more, **keywords):
        fd = real(path, flags, *more, **keywords)
        if flags & os.O_EXCL:
            os.close(fd)
            raise KeyboardInterrupt
        return fd

    monkeypatch.setattr(os, "open", interrupt)
    for keywords in ({}, {"max_shard_size": "1KB"}):
        refused(KeyboardInterrupt, None, model, target, **keywords)


def test_checking_finds_a_wrong_byte(model, target, monkeypatch):
    real = _writer._copy_in_kernel

    def spoil(source, begin, fd, path, size_bytes):
        copied_bytes = real(source, begin, fd, path, size_bytes)
        os.pwrite(fd, b"\xa5\x5a", os.lseek(fd, 0, os.SEEK_CUR) - 2)
        return copied_bytes

    monkeypatch.setattr(_writer, "_copy_in_kernel", spoil)
    monkeypatch.setattr(_writer, "_BUFFER_BYTES", 10)  # of a tensor not the first part alone
    with pytest.raises(safetensors.SafetensorError, match=r"tensor \S+ is not what .*model\.safe"):
        stx_patch.extract(model, target, check=True)
    assert not target.exists() and not leftovers(target.parent)
    stx_patch.extract(model, target)  # nobody looked


def test_a_header_that_was_written_wrongly(model, target, monkeypatch):
    real = _layout.Layout.__init__

    def spoil(self, *arguments):
        real(self, *arguments)
        self.header = self.header.replace(b'"F32","shape":[300,7]', b'"F32","shape":[7,300]')

    monkeypatch.setattr(_layout.Layout, "__init__", spoil)
    with pytest.raises(RuntimeError, match=r"embed\.weight was written as something else"):
        stx_patch.extract(model, target)
    assert not target.exists() and not leftovers(target.parent)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """512 MiB of zeros that lie on no disk, and a folder in memory to copy them to, if there is
    one."""
    folder = tmp_path_factory.mktemp("sparse")
    source = folder / "sparse.safetensors"
    size_bytes = 512 * MIB
    entry = {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}
    write_raw(source, {"w": entry})
    os.truncate(source, source.stat().st_size + size_bytes)
    memory = "/dev/shm"
    usable = os.path.isdir(memory) and shutil.disk_usage(memory).free > 2 * size_bytes
    target = os.path.join(memory, f"stx-extract-{os.getpid()}") if usable else folder / "target"
    os.mkdir(target)
    yield source, str(target)
    shutil.rmtree(target)


def copied_bytes(folder):
    """The size of the temporary file; -1 while there is none."""
    try:
        return max(
            (os.path.getsize(os.path.join(folder, n)) for n in leftovers(folder)), default=-1
        )
    except FileNotFoundError:  # it got its name just now
        return -1


def test_killed_in_the_middle(sparse):
    """Whenever it is killed, there is the whole file under the target's name, or none."""
    source, folder = sparse
    target = os.path.join(folder, "target.safetensors")
    stx_patch.extract(source, target)
    size_bytes = os.path.getsize(target)
    os.unlink(target)
    while_copying, draw = 0, random.Random(3)
    for _ in range(50):
        child = os.fork()
        if child == 0:
            stx_patch.extract(source, target)
            os._exit(0)
        until_bytes = draw.uniform(0, 0.7) * size_bytes
        while not os.path.exists(target) and copied_bytes(folder) <= until_bytes:
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while_copying += bool(leftovers(folder))
        if os.path.exists(target):
            assert os.path.getsize(target) == size_bytes
            assert STOCK.safe_open(target, "pt").keys() == ["w"]
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
    assert while_copying >= 30


def test_it_is_not_held_in_memory(sparse):
    """512 MiB go through a process that may have 64 MiB more than it has."""
    source, folder = sparse
    target = os.path.join(folder, "bounded.safetensors")
    assert stx_patch.extract  # its modules are imported

    def work():
        for line in open("/proc/self/status"):
            if line.startswith("VmData"):
                now_bytes = int(line.split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (now_bytes + 64 * MIB,) * 2)
        stx_patch.extract(source, target, check=True)

    assert in_a_child(work) == 0
    os.unlink(target)


# --- as a stream ---


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
def test_a_stream_is_the_file(model, target, block_bytes):
    stx_patch.extract(model, target, tensor_filter="*.b.*")
    keywords = {"tensor_filter": "*.b.*", "block_bytes": block_bytes}
    with stx_patch.extract_stream(model, **keywords) as stream:
        for _ in range(2):
            blocks = list(stream)
            assert b"".join(blocks) == target.read_bytes()
            assert stream.size_bytes == target.stat().st_size and stream.tensors == 12
            assert max(map(len, blocks)) <= block_bytes and {type(b) for b in blocks} == {bytes}
    with pytest.raises(ValueError, match="closed"):
        list(stream)


def test_a_stream_of_what_changes(model):
    stream = stx_patch.extract_stream(model)
    blocks = iter(stream)
    next(blocks)
    os.utime(model, ns=(1, 1))
    with pytest.raises(safetensors.SafetensorError, match="was changed"):
        list(blocks)
    with pytest.raises(ValueError, match="block_bytes"):
        stx_patch.extract_stream(model, block_bytes=0)


def test_nothing_stays_open(model, target, tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    stx_patch.extract(model, target)
    with stx_patch.extract_stream(model) as stream:
        next(iter(stream))
    for keywords in ({"names": ["no"]}, {"tensor_filter": "no"}):
        with pytest.raises(Exception, match=r"no|nothing"):
            stx_patch.extract(model, target, **keywords)
    with pytest.raises(safetensors.SafetensorError):
        stx_patch.merge([model, target], tmp_path / "both")
    assert set(os.listdir("/proc/self/fd")) == before


# --- who reads the header ---


@pytest.fixture
def without_core(monkeypatch):
    monkeypatch.setattr(_native, "core", None)


def test_without_the_core(model, target, without_core):
    stx_patch.extract(model, target, tensor_filter=lambda key: key.dtype != "F32")
    assert STOCK.load_file(target).keys() == {
        name for name, t in STOCK.load_file(model).items() if t.dtype != torch.float32
    }
    stx_patch.extract(model, target, overwrite=True)
    assert target.read_bytes() == model.read_bytes()


def test_headers_are_the_same_with_and_without_the_core(model, without_core, monkeypatch):
    stocks = _header.read_header(str(model))
    monkeypatch.undo()
    cores = _header.read_header(str(model))
    assert cores.entries == stocks.entries and cores.metadata == stocks.metadata
    stocks.check_unchanged()
    cores.check_unchanged()


@pytest.mark.parametrize(
    "entry", ['["U8",[2],[0,2]]', '{"data_offsets":[0,2],"dtype":{"U8":null},"shape":[2]}']
)
def test_what_only_stock_opens(tmp_path, target, entry):
    source = write_raw(tmp_path / "odd", f'{{"w":{entry},"v":["I8",[1],[2,3]]}}'.encode(), b"abc")
    assert not native(source)
    stx_patch.extract(source, target, tensor_filter=lambda key: key.dtype == "U8")
    assert raw_tensors(target)[1] == {"w": ("U8", [2], b"ab")}


def test_torch_is_not_imported(model, target):
    run_python(f"""
        import sys
        import stx_patch
        stx_patch.extract({str(model)!r}, {str(target)!r}, tensor_filter="*.a.*", check=True)
        assert "torch" not in sys.modules
    """)
