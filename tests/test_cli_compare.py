"""Proves: `stx-patch verify` finds what is wrong and says where; `stx-patch diff` finds what is
different.

Neither needs a file to fit into memory, and what they say of bytes is what the bytes are.
"""

import json
import os
import struct
import sys

import pytest
import safetensors.torch
import torch
from helpers import DTYPE_BITS, STOCK, outcome, to_bytes, write_raw
from patch_helpers import leaves_stock, run_python  # noqa: F401
from test_cli_inspect import examples, write_llama
from test_header_errors import BY_CHANCE, BY_STOCK, REFUSED, TAKEN

import stx_patch
from stx_patch import _cli, _compare, _native, _progress

NAN = float("nan")
INF = float("inf")


@pytest.fixture
def cli(capsys):
    """Run a command: (exit status, lines of stdout, stderr)."""

    def run(*arguments):
        status = _cli.main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err

    return run


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


def save(path, tensors, metadata=None):
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "layers.0.w": torch.randn(6, 8, generator=generator),
        "layers.1.w": torch.randn(6, 8, generator=generator).bfloat16(),
        "ids": torch.arange(5),
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 3),
    }


def entry(dtype="U8", shape=(1,), begin=0, end=1):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def every_dtype(path):
    """A file with a tensor of each dtype of the format, of 48 bits or more."""
    header, at = {}, 0
    for dtype, bits in DTYPE_BITS.items():
        size = 16 * bits // 8
        header[dtype] = entry(dtype, (2, 8), at, at + size)
        at += size
    return write_raw(path, header, bytes(i % 251 for i in range(at)))


def write_model(folder, shards):
    """Shards and their index; `shards` is file name -> tensors."""
    folder.mkdir()
    for file, tensors in shards.items():
        save(folder / file, tensors)
    listed = {name: file for file, tensors in shards.items() for name in tensors}
    return write_index(folder, listed)


def write_index(folder, weight_map):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.fixture
def model(tmp_path):
    tensors = some_tensors()
    names = sorted(tensors)
    first = {name: tensors[name] for name in names[:3]}
    second = {name: tensors[name] for name in names[3:]}
    write_model(tmp_path / "model", {"m-1.safetensors": first, "m-2.safetensors": second})
    return tmp_path / "model"


# --- verify: headers ---


@pytest.mark.parametrize("case", REFUSED)
def test_what_safetensors_refuses_does_not_verify(cli, path, case):
    path.write_bytes(REFUSED[case])
    status, lines, errors = cli("verify", path)
    assert (status, len(lines), errors) == (1, 1, "")
    assert lines[0].startswith(f"{path}: wrong: Error while deserializing header: ")
    if case not in BY_CHANCE and lines[0].isascii() and len(lines[0]) < 400:
        text = outcome(STOCK.safe_open, path, "pt")[2]
        assert " ".join(text.replace("\0", "\\x00").split()) in lines[0]


@pytest.mark.parametrize("case", TAKEN)
def test_what_safetensors_takes_verifies_unless_a_name_is_twice(cli, path, case):
    path.write_bytes(TAKEN[case])
    status, lines, errors = cli("verify", path)
    is_twice = case.startswith("duplicate") or case == "many, twice"
    assert (status, len(lines), errors) == (int(is_twice), 1, "")
    with STOCK.safe_open(path, "pt") as handle:
        count = len(handle.keys())
    said = "is twice in the header" if is_twice else f"ok, {count:,} tensor"
    assert said in lines[0]


def header(*entries, data=b""):
    """A file's bytes, and where its data begins."""
    text = json.dumps(dict(entries)).encode()
    return struct.pack("<Q", len(text)) + text + data, 8 + len(text)


def two(first, second, data):
    return header(("a", first), ("b", second), data=data)


# What is wrong -> (bytes, what is to be said with {begin}, where the data begins, put in).
PLACES = {
    "hole": (
        two(entry(), entry(begin=3, end=4), b"wxyz"),
        "tensor b begins at byte {3} of the file, tensor a ends at byte {1}: a hole of 2 bytes",
    ),
    "overlap": (
        two(entry(shape=(2,), end=2), entry(begin=1, end=2), b"xy"),
        "tensor b begins at byte {1} of the file, tensor a ends at byte {2}: an overlap of 1 byte",
    ),
    "hole before the first": (
        header(("a", entry(begin=1, end=2)), data=b"xy"),
        "tensor a begins at byte {1} of the file, the header ends at byte {0}: a hole of 1 byte",
    ),
    "cut short": (
        two(entry(), entry(shape=(9,), begin=1, end=10), b"xyz"),
        "tensor b ends at byte {10}, the file at byte {3}: 7 bytes missing",
    ),
    "too long": (
        header(("a", entry()), data=b"xyz"),
        "tensor a ends at byte {1}, the file at byte {3}: 2 bytes too many",
    ),
    "size": (
        two(entry(), entry("F32", (2, 3), 1, 21), bytes(21)),
        "tensor b: F32 [2, 3] takes 24 bytes, its data_offsets give it 20, from byte {1} of the",
    ),
    "ends before it begins": (
        two(entry(), entry(shape=(0,), begin=1, end=0), b"x"),
        # sorted by its begin: it comes behind a
        "tensor b begins at byte {1} of the file and ends at byte {0}",
    ),
    "backwards": (
        header(("a", entry("F4", (3,), 0, 2)), data=b"xy"),
        "tensor a: F4 [3] does not fill whole bytes",
    ),
    "dtype": (header(("a", entry("F7")), data=b"x"), "tensor a: no dtype is called F7"),
    "no shape": (header(("a", {"dtype": "U8"}), data=b"x"), "tensor a has no shape"),
    "metadata": (
        header(("__metadata__", {"k": 1})),
        "__metadata__: the value of k is no string",
    ),
    "header longer than the file": (
        (struct.pack("<Q", 1000) + b"{}", 0),
        "the header goes up to byte 1,008, the file ends at byte 10",
    ),
    "syntax": ((struct.pack("<Q", 9) + b'{"\xc3\xa9" 1}x', 0), "byte 14 of the file"),
    "UTF-8": ((struct.pack("<Q", 5) + b'{"\xff"}', 0), "byte 10 of the file is no UTF-8"),
    "git-lfs": (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", 0),
        "header too large; by its beginning it is a git-lfs pointer: `git lfs pull`",
    ),
    "zip": ((b"PK\x03\x04" + bytes(60), 0), "by its beginning it is a zip archive"),
    "web page": ((b"<!DOCTYPE html><html>", 0), "by its beginning it is a web page"),
}


@pytest.mark.parametrize("case", PLACES)
def test_it_says_where(cli, path, case):
    (content, data_begin), expected = PLACES[case]
    path.write_bytes(content)
    status, (line,), _ = cli("verify", path)
    for offset in range(11):
        expected = expected.replace(f"{{{offset}}}", f"{data_begin + offset:,}")
    assert status == 1 and expected in line


def test_a_name_cannot_break_the_line(cli, path):
    write_raw(path, {"a\n\x1b[31mb": entry(begin=1, end=2)}, b"xy")
    _, lines, _ = cli("verify", path)
    assert len(lines) == 1 and "a\\n\\x1b[31mb" in lines[0]


def test_only_reading_twice_needs_torch(sample):
    """Without it all is found, but not by how much values differ."""
    run_python(
        """
        import sys
        sys.modules["torch"] = None
        from stx_patch import _cli
        path, other = sys.argv[1], sys.argv[1] + ".other"
        content = bytearray(open(path, "rb").read())
        content[-1] ^= 1
        open(other, "wb").write(content)
        assert _cli.main(["verify", path]) == 0
        assert _cli.main(["verify", path, "--against", path]) == 0
        assert _cli.main(["verify", path, "--against", other]) == 1
        assert _cli.main(["verify", path, "--full"]) == 2
        assert _cli.main(["diff", path, path]) == 0
        assert _cli.main(["diff", path, other]) == 1
        """,
        sample,
        expect_output=None,
    )


def test_trouble_is_no_answer(cli, tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "empty").mkdir()
    for missing in ("missing", "missing.json", "empty", "pipe.safetensors"):
        status, lines, errors = cli("verify", tmp_path / missing)
        assert (status, lines) == (2, []) and errors.startswith("stx-patch: error: ")
        assert errors.count("\n") == 1 and "Traceback" not in errors


# --- verify: folders and indexes ---


def test_an_index_and_its_files_verify(cli, model):
    for source in (model, model / "model.safetensors.index.json"):
        status, lines, _ = cli("verify", source)
        assert status == 0
        assert [line.partition(": ")[0] for line in lines] == [
            str(model / "m-1.safetensors"),
            str(model / "m-2.safetensors"),
            str(model / "model.safetensors.index.json"),
        ]
        assert "ok, 5 tensors in 2 files" in lines[2]


def test_every_file_of_a_folder_is_checked(cli, tmp_path):
    save(tmp_path / "b-2.safetensors", some_tensors())
    save(tmp_path / "b-10.safetensors", some_tensors())  # the same names: there is no index
    (tmp_path / "a.safetensors").write_bytes(b"no")
    status, lines, _ = cli("verify", tmp_path)
    assert status == 1
    assert [("ok" in line, "a.s" in line, "10" in line) for line in lines] == [
        (False, True, False),
        (True, False, False),
        (True, False, True),
    ]


def listed(model):
    return json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]


def shard_is_missing(model):
    (model / "m-2.safetensors").unlink()
    return "m-2.safetensors is missing"


def shard_is_broken(model):
    content = (model / "m-2.safetensors").read_bytes()
    (model / "m-2.safetensors").write_bytes(content[:-1])
    return "m-2.safetensors does not verify"


def name_is_elsewhere(model):
    places = listed(model)
    write_index(model, {**places, "ids": "m-2.safetensors"})
    return "ids is not in m-2.safetensors, where it is listed, but in m-1.safetensors"


def name_is_nowhere(model):
    write_index(model, {**listed(model), "ghost": "m-1.safetensors"})
    return "ghost is not in m-1.safetensors, where it is listed"


def name_is_twice(model):
    with STOCK.safe_open(model / "m-1.safetensors", "pt") as handle:
        first = handle.get_tensors()
    with STOCK.safe_open(model / "m-2.safetensors", "pt") as handle:
        second = handle.get_tensors()
    save(model / "m-2.safetensors", {**second, "ids": first["ids"]})
    return "tensor ids is in m-1.safetensors and m-2.safetensors"


def name_is_listed_twice(model):
    (model / "model.safetensors.index.json").write_text(
        '{"weight_map": {"ids": "m-2.safetensors", "ids": "m-1.safetensors"}}'
    )
    return "tensor ids is twice in its weight_map"


def no_index(model):
    (model / "model.safetensors.index.json").write_text("{}")
    return "is no index of safetensors files"


def lists_nothing(model):
    write_index(model, {})
    return "it lists no tensors"


def no_file_is_there(model):
    (model / "m-1.safetensors").write_bytes(b"")
    (model / "m-2.safetensors").unlink()
    return "m-1.safetensors does not verify; and 1 more"


@pytest.mark.parametrize(
    "damage",
    [
        shard_is_missing,
        shard_is_broken,
        name_is_elsewhere,
        name_is_nowhere,
        name_is_twice,
        name_is_listed_twice,
        no_index,
        lists_nothing,
        no_file_is_there,
    ],
    ids=lambda damage: damage.__name__,
)
def test_an_index_that_its_files_do_not_hold(cli, model, damage):
    expected = damage(model)
    status, lines, errors = cli("verify", model)
    assert (status, errors) == (1, "")
    assert lines[-1].startswith(f"{model / 'model.safetensors.index.json'}: wrong: ")
    assert expected in lines[-1]


def test_a_tensor_that_is_not_listed_is_told(cli, model):
    write_index(model, {name: file for name, file in listed(model).items() if name != "ids"})
    status, lines, _ = cli("verify", model)
    assert status == 0 and "1 tensor in them not listed" in lines[-1]


def test_a_file_without_tensors_is_none_that_is_missing(cli, tmp_path):
    index = write_model(tmp_path / "m", {"a.safetensors": {}, "b.safetensors": some_tensors()})
    write_index(index.parent, {"ghost": "a.safetensors"})
    status, lines, _ = cli("verify", index)
    assert status == 1 and "ghost is not in a.safetensors" in lines[-1]


# --- verify --full ---


@pytest.fixture
def small_pieces(monkeypatch):
    """Tensors of 64 bytes are large, and mappings are used for as much."""
    monkeypatch.setattr(_compare, "PIECE_BYTES", 64)
    monkeypatch.setattr(_compare, "MAPPED_BYTES_MAX", 64)


@pytest.mark.parametrize("case", [case for case in TAKEN if case not in BY_STOCK])
def test_what_is_taken_verifies_in_full(cli, path, small_pieces, case):
    path.write_bytes(TAKEN[case])
    status, (line,), _ = cli("verify", path, "--full")
    assert status == 0 and "every byte read natively and by safetensors: the same" in line


def test_every_dtype_verifies_in_full(cli, path, small_pieces):
    status, (line,), _ = cli("verify", every_dtype(path), "--full")
    assert status == 0 and "(2 tensors as plain bytes" in line  # 6-bit ones


def test_every_byte_is_read_natively_in_pieces(path, small_pieces, monkeypatch):
    """Small tensors stream; of the others no piece is larger than it may be."""
    tensors = {"small": torch.arange(3), "large": torch.arange(100), "wide": torch.zeros(1, 77)}
    save(path, tensors)
    seen = {name: 0 for name in tensors}
    read = _compare._read_natively

    def watch(header):
        for entry, begin, piece in read(header):
            name = entry[0]
            assert begin == seen[name] and len(piece) <= 64
            assert piece == to_bytes(tensors[name])[begin : begin + len(piece)]
            seen[name] += len(piece)
            yield entry, begin, piece

    monkeypatch.setattr(_compare, "_read_natively", watch)
    assert _compare.check_readings(str(path), print) == (None, 0)
    assert seen == {name: tensor.nbytes for name, tensor in tensors.items()}


def test_stocks_mapping_is_made_anew(path, small_pieces, monkeypatch):
    save(path, {"a": torch.arange(1000)})
    opened = []
    stock = _compare.open_stock
    monkeypatch.setattr(_compare, "open_stock", lambda p: opened.append(p) or stock(p))
    assert _compare.check_readings(str(path), print).problem is None
    assert len(opened) > 50  # 8,000 bytes, 64 to 128 at a time


@pytest.mark.parametrize("name, at", [("small", 5), ("large", 500)])
def test_readers_that_do_not_agree(cli, path, tmp_path, small_pieces, monkeypatch, name, at):
    """Stock is given another file with the same header."""
    save(path, {"small": torch.arange(3), "large": torch.arange(100)})
    changed = {"small": torch.arange(3), "large": torch.arange(100)}
    changed[name].view(torch.uint8)[at] ^= 1
    other = str(save(tmp_path / "other", changed))
    stock = _compare.open_stock
    monkeypatch.setattr(_compare, "open_stock", lambda p: stock(other))
    status, (line,), _ = cli("verify", path, "--full")
    assert status == 1
    assert f"tensor {name}: its byte {at} is not the same natively and by safetensors" in line


def test_a_file_that_cannot_be_read_does_not_verify(cli, path, small_pieces, monkeypatch):
    save(path, {"large": torch.arange(100)})

    def fail(header, *arguments):
        raise OSError(5, "Input/output error", header.path)

    monkeypatch.setattr(_compare, "read_bytes", fail)
    status, (line,), _ = cli("verify", path, "--full")
    assert status == 1 and "wrong: [Errno 5] Input/output error" in line


def test_without_two_readers_there_is_no_answer(cli, path, monkeypatch):
    path.write_bytes(TAKEN["entry is an array"])
    status, lines, errors = cli("verify", path, "--full")
    assert (status, lines) == (2, []) and "the native core leaves it to safetensors" in errors
    save(path, some_tensors())
    monkeypatch.setattr(_native, "core", None)
    status, lines, errors = cli("verify", path, "--full")
    assert (status, lines) == (2, []) and "no native core" in errors


# --- verify --against ---


def test_a_part_of_a_model_verifies_against_it(cli, path, model, small_pieces):
    part = {name: tensor for name, tensor in some_tensors().items() if name != "ids"}
    save(path, part)
    for source in (model, model / "model.safetensors.index.json"):
        status, (line,), _ = cli("verify", path, "--against", source)
        assert status == 0 and line.endswith(f"; bit-equal in {source}")
    status, lines, _ = cli("verify", model, "--against", path)
    assert status == 1 and "tensor ids is not in it" in lines[0]
    assert len(lines) == 3 and ": ok, 2 tensors" in lines[1]
    assert lines[2].endswith("wrong: m-1.safetensors does not verify")


def other_bytes(tensors):
    tensors["layers.0.w"].view(torch.uint8)[5, 31] ^= 1
    return "tensor layers.0.w differs from its byte 191 on"


def other_dtype(tensors):
    tensors["scalar"] = torch.tensor(1.5).double()
    return "tensor scalar is F32 [], there F64 []"


def other_shape(tensors):
    tensors["layers.0.w"] = tensors["layers.0.w"].reshape(8, 6).contiguous()
    return "tensor layers.0.w is F32 [6, 8], there F32 [8, 6]"


def a_sign(tensors):
    tensors["scalar"] *= -1
    return "tensor scalar differs from its byte 3 on"


def several(tensors):
    for name in ("layers.0.w", "layers.1.w", "ids", "scalar"):
        tensors[name] += 1
    return "; and 1 more"


@pytest.mark.parametrize(
    "change",
    [other_bytes, other_dtype, other_shape, a_sign, several],
    ids=lambda change: change.__name__,
)
def test_what_is_not_in_the_source(cli, path, tmp_path, small_pieces, change):
    save(path, some_tensors())
    tensors = some_tensors()
    expected = change(tensors)
    source = save(tmp_path / "source", tensors)
    status, (line,), _ = cli("verify", path, "--against", source)
    assert status == 1 and f"wrong: against {source}: " in line and expected in line


def test_a_source_that_is_no_file_is_trouble(cli, path, tmp_path):
    save(path, some_tensors())
    status, lines, errors = cli("verify", path, "--against", tmp_path / "missing")
    assert (status, lines) == (2, []) and "missing" in errors
    (tmp_path / "bad").write_bytes(b"no")
    status, lines, errors = cli("verify", path, "--against", tmp_path / "bad")
    assert (status, lines) == (2, []) and f"{tmp_path / 'bad'}: Error while" in errors


# --- diff ---


@pytest.fixture
def pair(tmp_path):
    """Write two files: their paths."""

    def write(a, b, metadata=(None, None)):
        return (
            save(tmp_path / "a.safetensors", a, metadata[0]),
            save(tmp_path / "b.safetensors", b, metadata[1]),
        )

    return write


def test_equal_files_are_equal(cli, pair, small_pieces):
    a, b = pair(some_tensors(), some_tensors())
    size = sum(tensor.nbytes for tensor in some_tensors().values())
    assert cli("diff", a, b) == (0, [f"equal: 5 tensors, {size} bytes"], "")
    told = json.loads("\n".join(cli("diff", a, b, "--json")[1]))
    assert told["equal"] and told["tensors_equal"] == 5 and told["bytes_compared"]
    assert not any(told[key] for key in ("only_in_a", "only_in_b", "dtype", "shape", "bytes"))


def test_a_folder_an_index_and_a_file_are_compared(cli, model, path):
    save(path, some_tensors())
    index = model / "model.safetensors.index.json"
    for a, b in [(model, path), (path, index), (index, model)]:
        assert cli("diff", a, b)[0] == 0


def test_all_that_differs_is_told(cli, pair):
    a, b = some_tensors(), some_tensors()
    del b["ids"]
    b["scalar"] = torch.tensor(1.5).half()
    b["layers.0.w"] = b["layers.0.w"].reshape(8, 6)
    b["layers.1.w"][0] = 0
    b["new"] = torch.zeros(2, dtype=torch.int8)
    largest = a["layers.1.w"][0].abs().max()
    paths = pair(a, b, ({"format": "pt", "old": "1"}, {"format": "np", "new": "2"}))
    status, lines, _ = cli("diff", *paths)
    assert status == 1
    assert set(lines[:-1]) == {
        "only in A: ids, I64 [5]",
        "only in B: new, I8 [2]",
        "dtype: scalar: F32 in A, F16 in B",
        "shape: layers.0.w: [6, 8] in A, [8, 6] in B",
        f"bytes: layers.1.w: differs in 8 of 48 elements, by at most {largest:.6g}",
        "metadata: format: pt in A, np in B",
        "metadata: old: 1 in A, none in B",
        "metadata: new: none in A, 2 in B",
    }
    assert lines[-1].startswith("different: ") and lines[-1].endswith("; 1 tensor equal")


def test_json_tells_the_same(cli, pair):
    a, b = some_tensors(), some_tensors()
    del a["ids"]
    b["scalar"] += 0.25
    paths = pair(a, b, ({"k": "v"}, None))
    status, lines, _ = cli("diff", *paths, "--json")
    assert status == 1
    assert json.loads("\n".join(lines)) == {
        "a": str(paths[0]),
        "b": str(paths[1]),
        "equal": False,
        "bytes_compared": True,
        "tensors_equal": 3,
        "only_in_a": [],
        "only_in_b": ["ids"],
        "dtype": [],
        "shape": [],
        "bytes": [
            {
                "name": "scalar",
                "elements": 1,
                "differing": 1,
                "largest_difference": 0.25,
                "not_finite": 0,
            }
        ],
        "metadata": [{"key": "k", "a": "v", "b": None}],
    }


# dtype, A, B -> (elements that differ, the largest difference, how many are not finite)
VALUES = {
    "float": (torch.float32, [1, 2, 3], [1, 2.5, 2], (2, 1.0, 0)),
    "zero and its sign": (torch.float32, [0.0, 1], [-0.0, 1], (1, 0.0, 0)),
    "one NaN": (torch.float32, [NAN, 1, 1], [1, 1, 3], (2, 2.0, 1)),
    "NaNs alone": (torch.float32, [NAN, 1], [1, 1], (1, None, 1)),
    "equal NaNs and infinities": (torch.float32, [NAN, INF, 1], [NAN, INF, 2], (1, 1.0, 0)),
    "infinity": (torch.float64, [INF, 1], [-INF, 1], (1, None, 1)),
    "bfloat16": (torch.bfloat16, [1, 2, 256], [1, 2, 258], (1, 2.0, 0)),
    "float16": (torch.float16, [1, 2], [1, 65504], (1, 65502.0, 0)),
    "float8": (torch.float8_e4m3fn, [1, 2, 448], [1, 2, -448], (1, 896.0, 0)),
    "complex": (torch.complex64, [1 + 1j, 0], [1 - 1j, 0], (1, 2.0, 0)),
    "integers": (torch.int64, [1, 2, 3], [1, 2, 2**40], (1, None, 0)),
    "bytes": (torch.uint8, [1, 2, 3], [0, 0, 0], (3, None, 0)),
    "bools": (torch.bool, [True, False], [False, False], (1, None, 0)),
    "int16": (torch.int16, [1, -1], [1, 1], (1, None, 0)),
}


@pytest.mark.parametrize("case", VALUES)
def test_how_much_differs(cli, pair, case):
    dtype, ours, theirs, expected = VALUES[case]
    tensors = [torch.tensor(values).to(dtype) for values in (ours, theirs)]
    paths = pair({"x": tensors[0]}, {"x": tensors[1]})
    (found,) = json.loads("\n".join(cli("diff", *paths, "--json")[1]))["bytes"]
    assert found["elements"] == len(ours)
    assert (found["differing"], found["largest_difference"], found["not_finite"]) == expected


def test_nans_of_other_bits_differ(cli, tmp_path):
    for name, bits in (("a", 0x7FC00000), ("b", 0x7FC00001)):
        write_raw(tmp_path / name, {"x": entry("F32", (1,), 0, 4)}, struct.pack("<I", bits))
    assert cli("diff", tmp_path / "a", tmp_path / "a")[0] == 0
    status, lines, _ = cli("diff", tmp_path / "a", tmp_path / "b")
    assert status == 1 and "differs in 1 of 1 element, 1 with a NaN or infinity" in lines[0]


def test_every_dtype_is_compared(cli, tmp_path, small_pieces):
    path = every_dtype(tmp_path / "a")
    assert cli("diff", path, path)[0] == 0
    content = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    sizes = [16 * bits // 8 for bits in DTYPE_BITS.values()]
    for number, size in enumerate(sizes):  # the last byte of each
        content[begin + sum(sizes[:number]) + size - 1] ^= 0x11
    (tmp_path / "b").write_bytes(content)
    status, lines, _ = cli("diff", path, tmp_path / "b", "--json")
    found = {one["name"]: one["differing"] for one in json.loads("\n".join(lines))["bytes"]}
    six_bits = dict.fromkeys(("F6_E2M3", "F6_E3M2"))
    assert status == 1 and found == {**dict.fromkeys(DTYPE_BITS, 1), "F4": 2, **six_bits}


def test_large_tensors_are_measured_in_pieces(pair, small_pieces, cli):
    a = torch.zeros(1, 1000)
    b = a.clone()
    b[0, 17], b[0, 500], b[0, 999] = 0.5, -3, 1
    status, lines, _ = cli("diff", *pair({"x": a}, {"x": b}))
    assert status == 1
    assert lines[0] == "bytes: x: differs in 3 of 1,000 elements, by at most 3"


def test_no_piece_is_larger_than_it_may_be(cli, pair, small_pieces, monkeypatch):
    asked = []
    read = _compare.read_bytes

    def watch(header, offset, memory, size_bytes):
        assert len(memory) == 64
        asked.append(size_bytes)
        read(header, offset, memory, size_bytes)

    monkeypatch.setattr(_compare, "read_bytes", watch)
    paths = pair({"x": torch.arange(1000)}, {"x": torch.arange(1000)})
    assert cli("diff", *paths)[0] == 0
    assert max(asked) == 64 and sum(asked) == 2 * 8000


def test_names_only_reads_no_tensor(cli, pair, monkeypatch):
    a, b = some_tensors(), some_tensors()
    b["ids"] += 1
    paths = pair(a, b)
    monkeypatch.setattr(_compare, "read_bytes", lambda *arguments: pytest.fail("it was read"))
    status, lines, _ = cli("diff", *paths, "--names-only")
    assert status == 0 and "bytes, which were not compared" in lines[0]
    b["scalar"] = b["scalar"].double()
    status, lines, _ = cli("diff", *pair(a, b), "--names-only")
    assert status == 1 and lines[0] == "dtype: scalar: F32 in A, F64 in B"


def test_a_filter_holds_for_both(cli, pair):
    a, b = some_tensors(), some_tensors()
    b["ids"] += 1
    del a["none"]
    paths = pair(a, b)
    assert cli("diff", *paths, "--layers", "0:2")[:2] == (
        0,
        [f"equal: 2 tensors, {48 * 4 + 48 * 2} bytes"],
    )
    assert cli("diff", *paths, "--exclude", "none", "--exclude", "ids")[0] == 0
    assert cli("diff", *paths, "--include", "i*")[0] == 1
    status, lines, errors = cli("diff", *paths, "--prefix", "nothing")
    assert (status, lines) == (2, []) and "nothing" in errors


def test_a_filter_in_force_is_none_of_a_commands(cli, pair):
    a, b = some_tensors(), some_tensors()
    b["ids"] += 1
    paths = pair(a, b)
    with stx_patch.patched(tensor_filter=["scalar"]):
        assert cli("diff", *paths)[0] == 1
        assert "5 tensors" in cli("verify", paths[0], "--full")[1][0]
        assert cli("verify", paths[0], "--against", paths[1])[0] == 1


def test_a_file_that_changes_meanwhile_is_trouble(cli, pair, monkeypatch):
    a, b = pair(some_tensors(), some_tensors())
    compare = _compare.first_difference

    def change(left, right, name):
        os.utime(a, ns=(0, 0))
        return compare(left, right, name)

    monkeypatch.setattr(_compare, "first_difference", change)
    for command in (("diff", a, b), ("verify", a, "--against", b)):
        os.utime(a)
        status, _, errors = cli(*command)
        assert status == 2 and f"{a} was changed while it was read" in errors


def test_a_bad_file_is_trouble_and_named(cli, path, tmp_path):
    save(path, some_tensors())
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(path.read_bytes()[:-1])
    for a, b in [(path, bad), (bad, path)]:
        status, lines, errors = cli("diff", a, b)
        assert (status, lines) == (2, []) and f"{bad}: Error while" in errors
        assert "1 byte missing" in errors
    assert cli("diff", path, tmp_path / "missing")[0] == 2


def test_without_the_core_the_answers_are_the_same(cli, pair, model, monkeypatch, small_pieces):
    monkeypatch.setattr(_native, "core", None)
    a, b = some_tensors(), some_tensors()
    b["layers.0.w"][5, 7] += 0.5
    a_path, b_path = pair(a, b)
    assert cli("diff", a_path, model)[0] == 0
    assert cli("verify", a_path, "--against", model)[0] == 0
    status, lines, _ = cli("diff", a_path, b_path)
    assert status == 1 and lines[0].startswith("bytes: layers.0.w: differs in 1 of 48 elements")


# --- the document ---


def test_the_examples_of_the_document_print_what_they_show(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "llama")
    norm = torch.zeros(4096).bfloat16()
    save(tmp_path / "norm.safetensors", {"model.norm.weight": norm}, {"format": "pt"})
    content = (tmp_path / "norm.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:4096])
    tuned = {"model.norm.weight": norm.clone(), "model.norm.lora_A.weight": torch.ones(16, 8)}
    tuned["model.norm.weight"][1000:1003] = torch.tensor([0.5, -0.75, INF])
    save(tmp_path / "tuned.safetensors", tuned)
    checked = 0
    for command, expected in examples():
        if command.startswith(("verify", "diff")):
            _, lines, errors = cli(*command.split())
            assert "\n".join([*lines, ""]) + errors == expected, command
            checked += 1
    assert checked >= 5


# --- how far it is ---


@pytest.mark.parametrize("words", [["verify", "--full"], ["verify", "--against", "B"], ["diff"]])
def test_long_work_says_how_far_it_is(cli, path, monkeypatch, words):
    """To whom a bar would be shown: in the end, all of it is done."""
    tensors = some_tensors()
    save(path, tensors)
    other = save(path.with_name("other.safetensors"), tensors)
    seen = []
    make = _progress.make_progress

    def watch(target, title):
        assert target is True
        return make(lambda *at: seen.append(at), title)

    monkeypatch.setattr(_progress, "make_progress", watch)
    command, *options = (str(other) if word == "B" else word for word in words)
    sources = [path, other] if command == "diff" else [path]
    assert cli(command, *options, *sources)[0] == 0
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert seen[-1] == (total_bytes, total_bytes) and seen == sorted(seen)


def test_what_differs_waits_for_the_bar_on_one_terminal(cli, path, monkeypatch):
    """Elsewhere it is told at once."""
    save(path, some_tensors())
    other = save(path.with_name("other.safetensors"), {"ids": torch.arange(5) + 1})
    plain = cli("diff", path, other)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli("diff", path, other)[:2] == plain[:2]
