"""Proves: `stx-patch extract` and `merge` ask for what the options say, refuse what is most likely
a mistake before anything is written, and tell what was written."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import warnings

import pytest
import safetensors.torch
import torch
from helpers import write_raw

import stx_patch
from stx_patch import StxWarning, _cli, filters


@dataclasses.dataclass
class Result:
    """As `extract` and `merge` return it."""

    paths: tuple = ("out.safetensors",)
    tensors: int = 2
    tensors_total: int = 5
    size_bytes: int = 1500
    total_bytes: int = 7_000_000


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """What the functions are called with, in place of their work; a file to begin with."""
    monkeypatch.chdir(tmp_path)
    names = ["model.norm.weight", "lm_head.weight", "h.0.w", "h.1.w"]
    safetensors.torch.save_file({name: torch.zeros(2) for name in names}, "model.safetensors")
    made = []

    def note(*arguments, **keywords):
        made.append((arguments, keywords))
        return Result()

    monkeypatch.setattr(stx_patch, "extract", note, raising=False)
    monkeypatch.setattr(stx_patch, "merge", note, raising=False)
    return made


def extract(*options):
    return _cli.main(["extract", "model.safetensors", "out.safetensors", *options])


WRITING = {"overwrite": False, "check": False, "max_shard_size": None, "progress": True}


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (["--prefix", "h.1", "--prefix", "lm_head"], {"prefixes": ["h.1", "lm_head"]}),
        (["--names-from", "names"], {"names": ["h.0.w", "h.1.w"]}),
        (["--include", "h.*"], {"tensor_filter": filters.glob("h.*")}),
        (["--layers", "0:1"], {"tensor_filter": filters.layers(0, 1)}),
        (
            ["--prefix", "h", "--exclude", "*.w", "--include", "lm_head.weight"],
            {
                "tensor_filter": filters.all_of(
                    filters.any_of(filters.glob("lm_head.weight"), filters.prefixes("h")),
                    filters.none_of(filters.glob("*.w")),
                )
            },
        ),
        (["--all"], {}),
        (["--prefix", "nothing", "--allow-whole"], {"prefixes": ["nothing"]}),
    ],
)
def test_options_say_what_is_extracted(calls, tmp_path, options, chosen):
    (tmp_path / "names").write_text("h.0.w\nh.1.w\n")
    assert extract(*options) == 0
    assert calls == [(("model.safetensors", "out.safetensors"), {**chosen, **WRITING})]


def test_options_say_how_it_is_written(calls):
    assert extract("--all", "--overwrite", "--check", "--max-shard-size", "5GB") == 0
    expected = {"overwrite": True, "check": True, "max_shard_size": "5GB", "progress": True}
    assert calls[0][1] == expected
    assert _cli.main(["merge", "a", "b", "out", "--check"]) == 0
    assert calls[1] == ((["a", "b"], "out"), {**WRITING, "check": True})


def test_what_was_written_is_told(calls, capsys):
    assert extract("--all") == 0
    assert capsys.readouterr().out == "wrote out.safetensors\n2 of 5 tensors, 1.5 kB of 7.0 MB\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "nothing says which tensors: give --include"),
        (["--all", "--prefix", "h"], "--all is everything"),
        (["--prefix", "h", "--prefix", "lm_haed"], "--prefix lm_haed: no such name; there is lm_h"),
        (["--prefix", "lm_haed"], "did you mean lm_head?"),
        (["--prefix", "nothing", "--allow-whole", "--include", "*.x"], "nothing is left of 4"),
    ],
)
def test_a_likely_mistake_writes_nothing(calls, capsys, options, expected):
    assert extract(*options) == 2
    assert expected in capsys.readouterr().err and calls == []


def test_a_source_that_is_none_is_named(calls, capsys):
    with open("bad", "wb") as file:
        file.write(b"x" * 50)
    assert _cli.main(["extract", "bad", "out", "--prefix", "a"]) == 2
    assert capsys.readouterr().err.startswith("stx-patch: error: bad is no safetensors file")
    assert calls == []


@pytest.mark.parametrize("command", ["extract", "merge"])
def test_errors_of_the_work_say_what_to_do(calls, capsys, monkeypatch, command):
    def fail(*arguments, **keywords):
        raise errors[0]

    monkeypatch.setattr(stx_patch, command, fail)
    arguments = [command, "model.safetensors", "out", *(["--all"] if command == "extract" else [])]
    errors = [FileExistsError("out is there already"), safetensors.SafetensorError("odd")]
    assert _cli.main(arguments) == 2
    assert capsys.readouterr().err == "stx-patch: error: out exists: --overwrite replaces it\n"
    errors.pop(0)
    assert _cli.main(arguments) == 2
    assert capsys.readouterr().err == "stx-patch: error: odd\n"


def test_a_warning_is_a_line_and_no_error(calls, capsys, monkeypatch):
    def warn(*arguments, **keywords):
        warnings.warn("the whole model,\nas nothing lies below", StxWarning, stacklevel=1)
        return Result()

    monkeypatch.setattr(stx_patch, "extract", warn)
    for _ in range(2):
        assert extract("--prefix", "h") == 0
        expected = "stx-patch: warning: the whole model,\\nas nothing lies below\n"
        assert capsys.readouterr().err == expected


# --- with the functions themselves ---


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a", "b", "c"]
    safetensors.torch.save_file({name: torch.zeros(2) for name in names}, "model.safetensors")
    safetensors.torch.save_file({"d": torch.zeros(2)}, "other.safetensors")
    return tmp_path


def fails(capsys, *words):
    assert _cli.main(list(map(str, words))) == 2
    return capsys.readouterr().err.removeprefix("stx-patch: error: ").rstrip("\n")


def test_what_the_functions_wrote_is_told(capsys, model):
    assert extract("--prefix", "a", "--check") == 0
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "wrote out.safetensors",
        "1 of 3 tensors, 8 bytes of 24 bytes; each of them equals its source",
    ]
    merge = ["merge", "model.safetensors", "other.safetensors", "--max-shard-size", "8", "whole"]
    assert _cli.main(merge) == 0
    assert capsys.readouterr().out.endswith("\n4 of 4 tensors, 32 bytes of 32 bytes\n")
    assert _cli.main(["extract", "whole", "one", "--prefix", "d"]) == 0  # three need no opening
    assert capsys.readouterr().out.endswith("\n1 of 4 tensors, 8 bytes of 32 bytes\n")


def test_targets_that_are_wrong(capsys, model):
    (model / "folder").mkdir()
    for target in ("folder", "folder/"):
        text = fails(capsys, "extract", "model.safetensors", target, "--all")
        assert text == (
            f"{target} is a folder: give the path of a file, or --max-shard-size for a folder"
        )
    text = fails(capsys, "extract", "model.safetensors", "no/model", "--all")
    assert text == f"no such file: {model}/no/model, for there is no folder {model}/no"
    text = fails(capsys, "merge", "model.safetensors", "folder", "other.safetensors")
    assert text.startswith("no safetensors files in the folder folder")
    (model / "third").write_bytes(b"")
    text = fails(capsys, "merge", "model.safetensors", "other.safetensors", "third")
    assert text == (
        "third, the last argument, is what is to be written and exists: --overwrite replaces it"
    )
    (model / "folder" / "readme").write_text("")
    size = ("--max-shard-size", "1GB")
    text = fails(capsys, "merge", "model.safetensors", *size, "folder")
    assert text == f"{model}/folder is a folder that is not empty"
    text = fails(capsys, "merge", "model.safetensors", *size, "folder", "--overwrite")
    assert text.startswith(f"{model}/folder holds readme, which is no part of a model")
    text = fails(capsys, "merge", "model.safetensors", "--max-shard-size", "0", "new")
    assert text == "max_shard_size must be more than 0" and not (model / "new").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_ended_by_a_signal_it_leaves_nothing(model, number):
    size_bytes = 64 << 20
    entry = {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}
    source = write_raw(model / "large", {"w": entry})
    os.truncate(source, source.stat().st_size + size_bytes)
    before = sorted(os.listdir(model))
    code = """
        import os, signal, sys
        from stx_patch import _cli, _writer
        real = _writer.copy_runs
        def end(*arguments):
            real(*arguments)
            os.kill(os.getpid(), int(sys.argv[1]))
        _writer.copy_runs = end
        sys.exit(_cli.main(["extract", "large", "out", "--all"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(int(number))], capture_output=True
    )
    assert done.returncode == -number and done.stderr == b""
    assert sorted(os.listdir(model)) == before
