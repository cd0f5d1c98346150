"""Proves: `stx-patch inspect` shows what headers say, all of it and nothing else, folded where it
looks the same, and reads no tensor."""

import contextlib
import json
import random
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import DTYPE_BITS, STOCK, write_raw
from patch_helpers import PageCache, drop_from_cache

from stx_patch import _cli, _headers, _native, _stock, _tree


def write(path, entries, metadata=None):
    """A file of (name, dtype, shape), one behind the other."""
    header, at = {}, 0
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, dtype, shape in entries:
        size_bytes = torch.Size(shape).numel() * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size_bytes]}
        at += size_bytes
    return write_raw(path, header, bytes(at))


def layers(numbers, *parts):
    """Tensors of 8 bytes."""
    return [(f"model.layers.{n}.{part}", "BF16", [2, 2]) for n in numbers for part in parts]


def inspect(capsys, *arguments):
    """The lines of the tree, and those below it."""
    assert _cli.main(["inspect", *map(str, arguments)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    end = next(
        number
        for number, line in enumerate(lines)
        if line.startswith(("metadata", "note")) or number == len(lines) - 1
    )
    return lines[:end], lines[end:]


def labels(lines):
    """The first column, with its indentation."""
    end = lines[0].index("tensors")
    return [line[:end].rstrip() for line in lines[1:]]


def document(capsys, *arguments):
    assert _cli.main(["inspect", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


# --- the tree ---


def test_it_reads_well(capsys, tmp_path):
    entries = [("lm_head.weight", "F32", [10, 4]), *layers(range(3), "up.weight", "norm.weight")]
    path = write(tmp_path / "a.safetensors", entries, {"format": "pt"})
    tree, rest = inspect(capsys, path)
    assert tree == [
        "name                   tensors  dtype  shape         size  share",
        "lm_head.weight               1  F32    [10, 4]  160 bytes  76.9%",
        "model.layers.0-2 (3x)        6  BF16             48 bytes  23.1%",
        "  norm.weight                3  BF16   [2, 2]    24 bytes  11.5%",
        "  up.weight                  3  BF16   [2, 2]    24 bytes  11.5%",
    ]
    assert rest == [
        "metadata: format = pt",
        "7 tensors, 208 bytes, 64 parameters, F32 160 bytes, BF16 48 bytes, 1 file",
    ]


def test_only_what_looks_the_same_is_folded(capsys, tmp_path):
    """By name, dtype and shape of all that lies below."""
    entries = layers([0, 1, 2, 5, 7, 8, 9, 10], "w")
    entries += [*layers([3], "other"), ("model.layers.4.w", "F32", [2, 2])]
    entries += [("model.layers.6.w", "BF16", [4])]
    tree, _ = inspect(capsys, write(tmp_path / "a", entries))
    assert labels(tree) == [
        "model.layers",
        "  0-2,5,7-10.w (8x)",
        "  3.other",
        "  4.w",
        "  6.w",
    ]


def test_folds_lie_in_folds_and_sums_are_whole(capsys, tmp_path):
    parts = [f"experts.{e}.{name}" for e in range(4) for name in ("up", "down")]
    tree, rest = inspect(capsys, write(tmp_path / "a", layers(range(3), "norm", *parts)))
    assert labels(tree) == [
        "model.layers.0-2 (3x)",
        "  experts.0-3 (4x)",
        "    down",
        "    up",
        "  norm",
    ]
    begin = tree[0].index("tensors")
    assert [line[begin : begin + 7].strip() for line in tree[1:]] == ["27", "24", "12", "12", "3"]
    assert rest[-1].startswith("27 tensors, 216 bytes")


def test_numbered_tensors_are_folded_too_but_not_words_with_digits(capsys, tmp_path):
    names = ["list.0", "list.1", "list.10", "w1", "w2", "pad.00", "pad.01"]
    tree, _ = inspect(capsys, write(tmp_path / "a", [(name, "U8", [1]) for name in names]))
    assert labels(tree) == ["list.0-1,10 (3x)", "pad", "  00", "  01", "w1", "w2"]


def test_many_runs_are_cut(capsys, tmp_path):
    entries = layers(range(0, 40, 2), "a") + layers(range(1, 40, 2), "b")
    tree, _ = inspect(capsys, write(tmp_path / "a", entries))
    assert labels(tree) == [
        "model.layers",
        "  0,2,4,6,8,10,....a (20x)",
        "  1,3,5,7,9,11,....b (20x)",
    ]


def test_all_shows_every_tensor(capsys, tmp_path):
    entries = layers(range(12), "b", "a")
    tree, _ = inspect(capsys, write(tmp_path / "a", entries), "--all")
    expected = ["model.layers"]
    for number in range(12):
        expected += [f"  {number}", "    a", "    b"]
    assert labels(tree) == expected


def test_a_name_may_be_a_tensor_and_a_module(capsys, tmp_path):
    entries = [("a", "U8", [3]), ("a.b", "U8", [5]), ("a.b.c", "U8", [7])]
    tree, _ = inspect(capsys, write(tmp_path / "a", entries))
    rows = [line.split() for line in tree[1:]]
    assert labels(tree) == ["a", "a", "  b", "  b.c"]
    assert [row[1] for row in rows] == ["1", "2", "1", "1"]


def test_names_of_any_form_are_shown(capsys, tmp_path):
    names = ["", ".", "a.", ".b", "x..y", ".".join(["deep"] * 3000)]
    tree, rest = inspect(capsys, write(tmp_path / "a", [(name, "U8", [1]) for name in names]))
    assert rest[-1].startswith("6 tensors, 6 bytes")
    assert any(line.strip().startswith("deep.deep") for line in tree)


def test_depth_folds_what_lies_below(capsys, tmp_path):
    entries = [("head", "F32", [1]), *layers(range(2), "a.x", "a.y", "b")]
    path = write(tmp_path / "a", [*entries, ("model.norm", "F32", [1])])
    assert labels(inspect(capsys, path, "--depth", 1)[0]) == ["head", "model"]
    tree, _ = inspect(capsys, path, "--depth", 2)
    assert labels(tree) == ["head", "model", "  layers.0-1 (2x)", "  norm"]
    assert tree[2].split()[:3] == ["model", "7", "BF16,F32"]
    tree, rest = inspect(capsys, path, "--depth", 0)
    assert labels(tree) == [] and rest[-1].startswith("8 tensors")


def test_siblings_are_sorted(capsys, tmp_path):
    entries = [("b", "U8", [2]), ("c10", "U8", [9]), ("c9", "U8", [1]), ("a.x", "U8", [5])]
    path = write(tmp_path / "a", entries)
    assert labels(inspect(capsys, path)[0]) == ["a.x", "b", "c9", "c10"]
    assert labels(inspect(capsys, path, "--sort", "size")[0]) == ["c10", "a.x", "b", "c9"]
    assert labels(inspect(capsys, path, "--sort", "file")[0]) == ["b", "c10", "c9", "a.x"]


def test_metadata_is_shown_cut_and_harmless(capsys, tmp_path):
    path = write(tmp_path / "a", [], {"long": "x" * 1000, "code": "\x1b[2J\n"})
    tree, rest = inspect(capsys, path)
    assert tree == []
    assert rest[:2] == ["metadata: code = \\x1b[2J\\n", f"metadata: long = {'x' * 77}..."]
    assert rest[2] == "0 tensors, 0 bytes, 0 parameters, 1 file"
    assert document(capsys, path)["metadata"]["long"] == "x" * 1000


# --- against stock ---


@pytest.mark.parametrize("seed", range(4))
def test_the_document_says_what_stock_says(capsys, tmp_path, seed):
    """Names, dtypes and shapes as a handle has them, and the bytes at the offsets."""
    chosen = random.Random(seed)
    tensors = {
        f"a.{chosen.randrange(4)}.{number}": torch.randint(0, 99, (chosen.randrange(1, 4), 3)).to(
            chosen.choice([torch.uint8, torch.float32, torch.bfloat16, torch.int64])
        )
        for number in range(30)
    }
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    found = document(capsys, path)
    content = path.read_bytes()
    with STOCK.safe_open(path, "pt") as handle:
        assert [entry["name"] for entry in found["tensors"]] == handle.offset_keys()
        for entry in found["tensors"]:
            tensor = handle.get_tensor(entry["name"])
            kept = handle.get_slice(entry["name"])
            assert (entry["dtype"], entry["shape"]) == (kept.get_dtype(), kept.get_shape())
            begin, end = entry["offsets"]
            expected = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert content[begin:end] == expected and entry["bytes"] == len(expected)
            assert entry["file"] == str(path)
    assert found["metadata"] == {"format": "pt"} and found["notes"] == []
    assert found["totals"]["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["totals"]["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert sum(sums["tensors"] for sums in found["totals"]["dtypes"].values()) == 30
    (file,) = found["files"]
    assert (file["bytes"], file["tensors"]) == (len(content), 30)


def test_every_dtype_is_shown(capsys, tmp_path):
    entries = [(name, name, [8]) for name in DTYPE_BITS]
    path = write(tmp_path / "a", entries)
    found = {entry["name"]: entry for entry in document(capsys, path)["tensors"]}
    assert found.keys() == DTYPE_BITS.keys()
    assert all(found[name]["dtype"] == name for name in DTYPE_BITS)
    assert all(found[name]["bytes"] == bits for name, bits in DTYPE_BITS.items())


ODD_HEADERS = {
    "fields as an array": b'{"a":["U8",[1],[0,1]]}',
    "dtype as a dict": b'{"a":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}',
    "a name twice": b'{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},'
    b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "a long number": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":'
    + b"1" * 300
    + b"}}",
}


@pytest.mark.parametrize("name", ODD_HEADERS)
def test_a_header_that_only_stock_takes(capsys, tmp_path, name):
    path = write_raw(tmp_path / "odd", ODD_HEADERS[name], b"x")
    with STOCK.safe_open(path, "pt") as handle:
        expected = handle.get_slice("a").get_dtype()
    (entry,) = document(capsys, path)["tensors"]
    assert (entry["dtype"], entry["shape"], entry["bytes"]) == (expected, [1], 1)
    assert entry["offsets"][1] == path.stat().st_size


def test_the_same_without_numpy(capsys, tmp_path, monkeypatch):
    path = write(tmp_path / "a", layers(range(2), "w"))
    expected = document(capsys, path)
    opened = []

    @contextlib.contextmanager
    def accept(path):
        yield

    def refuse(path, framework):
        opened.append(framework)
        if framework == "np":
            raise ModuleNotFoundError("No module named 'numpy'")
        return accept(path)

    monkeypatch.setattr(_native, "core", None)
    monkeypatch.setattr(_stock, "safe_open", refuse)
    assert document(capsys, path) == expected and opened == ["np", "pt"]


def test_only_headers_are_read(capsys, tmp_path):
    path = tmp_path / "large"
    safetensors.torch.save_file({f"t{n}": torch.zeros(1 << 20) for n in range(4)}, path)
    assert drop_from_cache(path)
    inspect(capsys, path)
    document(capsys, path)
    cache = PageCache(path)
    assert cache.resident_bytes(8 << 20, 16 << 20) == 0
    cache.close()


# --- filters, and many files ---


def test_filters_narrow_it(capsys, tmp_path):
    path = write(tmp_path / "a", [("head", "F32", [4]), *layers(range(4), "w", "b")])
    tree, rest = inspect(capsys, path, "--layers", "1:3", "--exclude", "*.b", "--prefix", "head")
    assert labels(tree) == ["head", "model.layers.1-2.w (2x)"]
    assert rest == ["3 tensors of 9, 32 bytes, 12 parameters, F32 16 bytes, BF16 16 bytes, 1 file"]
    assert "50.0%" in tree[1]  # of what is kept
    found = document(capsys, path, "--prefix", "head")
    assert [entry["name"] for entry in found["tensors"]] == ["head"]


def shards(folder, index=True):
    write(folder / "m-1.safetensors", [("head", "F32", [4]), *layers([0, 1], "w")], {"a": "1"})
    write(folder / "m-2.safetensors", layers([2, 3], "w"), {"a": "2", "b": "3"})
    if index:
        weight_map = dict.fromkeys(
            ["head", "model.layers.0.w", "model.layers.1.w"], "m-1.safetensors"
        )
        weight_map |= dict.fromkeys(["model.layers.2.w", "model.layers.3.w"], "m-2.safetensors")
        text = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("form", ["folder", "index", "list"])
def test_many_files_are_one_tree(capsys, tmp_path, form):
    shards(tmp_path)
    sources = {
        "folder": [tmp_path],
        "index": [tmp_path / "model.safetensors.index.json"],
        "list": [tmp_path / "m-1.safetensors", tmp_path / "m-2.safetensors"],
    }
    tree, rest = inspect(capsys, *sources[form])
    assert labels(tree) == ["head", "model.layers.0-3.w (4x)"]
    assert [line.split("%")[1].strip() for line in tree[1:]] == ["m-1.safetensors", "2 files"]
    assert rest == [
        "metadata: a = 1",
        "metadata: b = 3",
        "5 tensors, 48 bytes, 20 parameters, BF16 32 bytes, F32 16 bytes, 2 files",
    ]


def test_under_an_index_only_the_files_that_are_needed_are_read(capsys, tmp_path):
    shards(tmp_path)
    (tmp_path / "m-1.safetensors").unlink()
    tree, rest = inspect(capsys, tmp_path, "--layers", "2:9")
    assert labels(tree) == ["model.layers.2-3.w (2x)"]
    assert rest[-1] == "2 tensors of 5, 16 bytes, 8 parameters, BF16 16 bytes, 1 file"


def test_a_name_in_two_files_is_shown_twice_and_noted(capsys, tmp_path):
    shards(tmp_path, index=False)
    write(tmp_path / "m-3.safetensors", [("head", "BF16", [4])])
    tree, rest = inspect(capsys, tmp_path)
    assert labels(tree) == ["head", "head", "model.layers.0-3.w (4x)"]
    assert rest[2] == (
        f"note: 1 name in two files, the first: head in {tmp_path}/m-1.safetensors and"
        f" {tmp_path}/m-3.safetensors"
    )
    assert len(document(capsys, tmp_path)["notes"]) == 1


def test_an_index_settles_whose_a_name_is_and_is_held_to_what_it_lists(capsys, tmp_path):
    shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    write(tmp_path / "m-2.safetensors", [*layers([2, 3], "w"), ("head", "I64", [1])])
    assert [e["dtype"] for e in document(capsys, index, "--prefix", "head")["tensors"]] == ["F32"]
    tree, rest = inspect(capsys, index)
    assert labels(tree)[0] == "head" and tree[1].split()[2] == "F32" and len(rest) == 2
    weight_map["gone"] = "m-2.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    _, rest = inspect(capsys, index)
    assert rest[1] == (
        "note: 1 tensor of an index not found where it lists them, the first: gone in"
        f" {tmp_path}/m-2.safetensors"
    )


# --- sums ---


def test_every_tensor_is_counted_once_however_it_is_shown(tmp_path):
    """Rows that are leaves sum up to all tensors and bytes, folded or not."""
    chosen = random.Random(1)
    entries = {
        f"m.{chosen.randrange(5)}.e.{chosen.randrange(6)}.{chosen.choice('abc')}": (
            chosen.choice(["U8", "F32"]),
            [chosen.randrange(3)],
        )
        for _ in range(300)
    }
    path = write(tmp_path / "a", [(name, *rest) for name, rest in entries.items()])
    headers = _headers.read_headers([str(path)])
    for view in (_tree.View(), _tree.View(fold=False), _tree.View(sort="size")):
        leaves = [row for row in _tree.Tree(headers.tensors).rows(view) if row.shape is not None]
        assert sum(row.tensors for row in leaves) == len(entries)
        expected = sum(tensor.end_bytes - tensor.begin_bytes for tensor in headers.tensors)
        assert sum(row.size_bytes for row in leaves) == expected
    (top,) = _tree.Tree(headers.tensors).rows(_tree.View(depth=1))
    assert top.tensors == len(entries)


# --- the document ---


LLAMA = [("q", 4096, 4096), ("k", 1024, 4096), ("v", 1024, 4096), ("o", 4096, 4096)]
MLP = [("gate", 14336, 4096), ("up", 14336, 4096), ("down", 4096, 14336)]


def write_llama(folder):
    """The headers of a model of 8 billion parameters in four files, before holes."""
    shapes = {"lm_head.weight": [128256, 4096], "model.embed_tokens.weight": [128256, 4096]}
    shapes["model.norm.weight"] = [4096]
    for number in range(32):
        layer = f"model.layers.{number}."
        shapes |= {f"{layer}self_attn.{part}_proj.weight": shape for part, *shape in LLAMA}
        shapes |= {f"{layer}mlp.{part}_proj.weight": shape for part, *shape in MLP}
        for place in ("input", "post_attention"):
            shapes[f"{layer}{place}_layernorm.weight"] = [4096]
    folder.mkdir()
    names, weight_map = sorted(shapes), {}
    for shard in range(4):
        file = f"model-{shard + 1:05}-of-00004.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name in names[shard * len(names) // 4 : (shard + 1) * len(names) // 4]:
            end = at + 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, end]}
            at, weight_map[name] = end, file
        path = write_raw(folder / file, header)
        with path.open("r+b") as opened:
            opened.truncate(path.stat().st_size + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def examples():
    """(command, what it prints) of docs/CLI.md."""
    text = Path(__file__).parent.parent.joinpath("docs", "CLI.md").read_text()
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for example in re.split(r"^\$ stx-patch ", block, flags=re.MULTILINE)[1:]:
            command, _, output = example.partition("\n")
            yield command, output


def test_the_examples_of_the_document_print_what_they_show(capsys, tmp_path, monkeypatch):
    """Those that look, and those that fail; what is written and what is cached are not the same
    everywhere."""
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "llama")
    checked = 0
    for command, expected in examples():
        if command.startswith("inspect") or "error:" in expected:
            _cli.main(command.split())
            said = capsys.readouterr()
            assert said.out + said.err == expected, command
            checked += 1
    assert checked >= 6
