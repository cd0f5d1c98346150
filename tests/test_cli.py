"""Proves: the command line finds its commands, says what went wrong in one line that helps, and
ends quietly wherever its output goes."""

import argparse
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import write_raw

import stx_patch
from stx_patch import _cli, _cli_errors, _cli_filters, _cli_text, filters

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("inspect", "explain", "extract", "merge")


def run(*arguments, **keywords):
    """`stx-patch` in a process of its own; stdout is a pipe unless `keywords` say more."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **keywords.pop("env", {})}
    environment.pop("PYTHONUNBUFFERED", None)
    keywords.setdefault("stdout", subprocess.PIPE)
    return subprocess.run(
        [sys.executable, "-m", "stx_patch", *map(str, arguments)],
        stderr=subprocess.PIPE,
        env=environment,
        timeout=60,
        **keywords,
    )


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A file with three layers of two tensors, and others; the current folder is its own."""
    monkeypatch.chdir(tmp_path)
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{n}.mlp.{part}.weight" for n in range(3) for part in ("up", "down")]
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({name: torch.zeros(4, 2) for name in names}, path)
    return path


def fails(capsys, *arguments):
    """What a command says that ends with 2: one line on stderr, nothing on stdout."""
    assert _cli.main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("stx-patch: error: ")
    assert said.err.count("\n") == 1 and said.err.endswith("\n")
    return said.err.removeprefix("stx-patch: error: ").rstrip("\n")


# --- the frame ---


def test_help_teaches_by_examples(capsys):
    assert _cli.main(["--help"]) == 0
    whole = capsys.readouterr().out
    for command in COMMANDS:
        assert f"    {command}" in whole and f"  stx-patch {command} " in whole
        assert _cli.main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert "examples:" in text and text.count(f"stx-patch {command} ") >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_help_parse(command, capsys, monkeypatch):
    """Each line is taken, without remarks and what stands before and behind a pipe."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"name")))
    _cli.main([command, "--help"])
    lines = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
    for line in lines:
        (part,) = [part for part in line.split(" | ") if f"stx-patch {command} " in part]
        words = shlex.split(re.split(r"\s{2,}", part.strip())[0])
        arguments = _cli._parse(*_cli._make_parser(), words[1:])
        assert arguments.run is not None


def test_the_version(capsys):
    assert _cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"stx-patch {stx_patch.__version__}\n"


def test_no_command_shows_the_help_and_is_wrong_usage(capsys):
    assert _cli.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "examples:" in said.err


def test_wrong_usage_is_one_line_that_names_the_help(capsys):
    assert "invalid choice: 'nope'" in fails(capsys, "nope")
    assert fails(capsys, "inspect").endswith("(see stx-patch inspect --help)")
    assert "'x'" in fails(capsys, "inspect", "a", "--depth", "x")
    assert "--dep" in fails(capsys, "inspect", "a", "--dep", "1")  # no guessing


def test_nothing_heavy_is_imported_to_look(model):
    script = """
import sys
from stx_patch._cli import main
assert main(["--help"]) == 0
assert not {"torch", "safetensors", "numpy"} & sys.modules.keys()
assert main(["inspect", "model.safetensors", "--json"]) == 0
assert main(["inspect", "model.safetensors", "--prefix", "model.nrom"]) == 2
assert "torch" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_it_is_a_script_and_a_module(model):
    text = (ROOT / "pyproject.toml").read_text()
    assert 'stx-patch = "stx_patch._cli:main"' in text
    done = run("inspect", model)
    assert done.returncode == 0 and done.stderr == b"" and b"lm_head.weight" in done.stdout
    assert run("inspect", "nope").returncode == 2


def test_a_mistake_of_our_own_keeps_its_traceback(monkeypatch, model):
    def fail(arguments):
        raise KeyError("ours")

    monkeypatch.setattr("stx_patch._cli_inspect._run", fail)
    with pytest.raises(KeyError):
        _cli.main(["inspect", str(model)])


# --- errors ---


def test_a_missing_file_is_named_with_its_like(capsys, model):
    assert fails(capsys, "inspect", "nope") == "no such file: nope"
    expected = "no such file: modle.safetensors; did you mean model.safetensors?"
    for command in (["inspect"], ["explain"]):
        assert fails(capsys, *command, "modle.safetensors") == expected
    text = fails(capsys, "inspect", "no/model")
    assert text == "no such file: no/model, for there is no folder no"
    text = fails(capsys, "inspect", "*.safetensors")
    assert text == "no such file: *.safetensors; give the folder . for all in it"


def test_a_file_that_is_there_and_cannot_be_opened(capsys, model):
    """safetensors calls it missing."""
    os.symlink("gone.safetensors", "link.safetensors")
    for command in ("inspect", "explain"):
        text = fails(capsys, command, "link.safetensors")
        target = model.parent / "gone.safetensors"
        assert text == f"link.safetensors is a link to {target}, which is not there"
    message = _cli_errors._explain_unopened("/proc/self/task")
    assert message == "/proc/self/task: Is a directory"


def test_options_may_stand_anywhere(capsys, model):
    shutil.copy(model, "other.safetensors")
    assert _cli.main(["inspect", model.name, "--depth", "1", "other.safetensors"]) == 0
    assert "2 files" in capsys.readouterr().out
    text = fails(capsys, "inspect", model.name, "--frob")
    assert text == "unrecognized arguments: --frob (see stx-patch inspect --help)"


@pytest.mark.parametrize("command", ["inspect", "explain", "diff"])
def test_a_miss_beside_a_hit_is_told(capsys, model, command, tmp_path):
    (tmp_path / "names").write_text("model.layers.0.mlp.up.weight\nnope\n")
    sources = [model.name] * (2 if command == "diff" else 1)
    hit = ["--prefix", "model.layers"]
    for option, value in (("--names-from", "names"), ("--prefix", "nope"), ("--include", "nope")):
        text = fails(capsys, command, *sources, *hit, option, value)
        assert text.startswith(f"{option} nope: no such name; there is "), text


def test_no_standard_input_to_read_names_from(capsys, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    text = fails(capsys, "inspect", model.name, "--names-from", "-")
    assert "there is no standard input" in text


def test_a_folder_without_files_says_where_some_are(capsys, model):
    (model.parent / "empty").mkdir()
    for command in ("inspect", "explain"):
        assert fails(capsys, command, "empty") == "no safetensors files in the folder empty"
    (model.parent / "empty" / "unet").mkdir()
    model.rename(model.parent / "empty" / "unet" / model.name)
    expected = "no safetensors files in the folder empty; there are some in unet"
    assert fails(capsys, "inspect", "empty") == expected


BAD = {
    "empty": (b"", "is empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "zip": (b"PK\x03\x04" + bytes(30), "zip archive"),
    "pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(30), "pickle"),
    "gguf": (b"GGUF" + bytes(40), "GGUF"),
    "html": (b"<!doctype html><html>" + bytes(30), "web page"),
    "json": (b'{"weight_map": {}}', "JSON"),
    "text": (b"a plain text, and nothing else\n", "no safetensors file: header too large"),
    "header": (b"\x02" + bytes(7) + b"[]", "no safetensors file"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["inspect", "explain"])
def test_a_file_that_is_none_is_named_and_guessed_at(capsys, tmp_path, command, name):
    content, expected = BAD[name]
    path = tmp_path / "bad"
    path.write_bytes(content)
    text = fails(capsys, command, path)
    assert text.startswith(f"{path} is ") and expected in text


def test_a_bad_file_among_many_is_the_one_that_is_named(capsys, model, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"x" * 40)
    for command in ("inspect", "explain"):
        assert fails(capsys, command, model, bad).startswith(f"{bad} is no safetensors file")


@pytest.mark.parametrize("cut_bytes", [1, 60, 700])
def test_a_file_that_was_cut_short_says_so(capsys, model, cut_bytes):
    """In the data, and in the header."""
    whole = model.read_bytes()
    model.write_bytes(whole[:-cut_bytes])
    text = fails(capsys, "inspect", model)
    assert "is cut short: " in text and f"{len(whole) - cut_bytes:,} of" in text


def test_what_is_not_a_file_is_refused(capsys):
    assert fails(capsys, "inspect", "/dev/null") == "/dev/null is not a file"


def test_an_error_of_several_lines_is_one(capsys, monkeypatch, model):
    def fail(arguments):
        raise ValueError("one\n  two\x1b[31m\n")

    monkeypatch.setattr("stx_patch._cli_inspect._run", fail)
    assert fails(capsys, "inspect", model) == "one two\\x1b[31m"


def test_memory_that_is_missing_is_said(capsys, monkeypatch, model):
    def fail(arguments):
        raise MemoryError

    monkeypatch.setattr("stx_patch._cli_inspect._run", fail)
    assert fails(capsys, "inspect", model) == "not enough memory"


# --- output ---


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("option", ["--all", "--json"])
def test_a_reader_that_is_gone_ends_it_quietly(model, option, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [sys.executable, "-m", "stx_patch", "inspect", option, model],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environment,
        timeout=60,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_help_into_a_pipe_that_is_gone_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    done = run("--help", stdout=writer)
    os.close(writer)
    assert done.stderr == b""


def test_a_full_disk_is_an_error_of_one_line(model):
    with open("/dev/full", "wb") as full:
        done = run("inspect", model, stdout=full)
    assert done.returncode == 2
    assert done.stderr == b"stx-patch: error: No space left on device\n"


def test_without_stdout_it_still_ends_well(model):
    done = run("inspect", model, preexec_fn=lambda: os.close(1), stdout=None)
    assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c_ends_with_130_and_nothing_said(model):
    """Whoever reads names from a pipe waits, until it is interrupted."""
    child = subprocess.Popen(
        [sys.executable, "-m", "stx_patch", "inspect", model, "--names-from", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    wait_until_it_reads(child)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, b"", b"")


def wait_until_it_reads(child):
    """Fill the pipe beyond what it holds: that ends only when the child reads from it."""
    child.stdin.write(b"name\n" * 100_000)
    child.stdin.flush()


NAMES = ["unicode.é中🙂", "terminal.\x1b[31mred", "line\nend", "bell\x07", "bidi\u202e", ""]


@pytest.fixture
def odd_names(tmp_path):
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    return write_raw(tmp_path / "odd.safetensors", {name: entry for name in NAMES})


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-16"])
def test_any_name_is_shown_in_any_encoding(odd_names, encoding):
    done = run("inspect", odd_names, env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 0 and done.stderr == b""
    text = done.stdout.decode(encoding)
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert "\\x1b[31mred" in text and "line\\nend" in text and "bidi\\u202e" in text
    shown = {"ascii": "\\xe9\\u4e2d", "latin-1": "é\\u4e2d"}.get(encoding, "é中🙂")
    assert f"unicode.{shown}" in text
    assert json.loads(run("inspect", "--json", odd_names).stdout)["totals"]["tensors"] == len(NAMES)


def test_a_path_that_is_no_text_is_shown(tmp_path, sample):
    path = os.fsencode(tmp_path) + b"/\xff.safetensors"
    os.rename(sample, path)
    command = [sys.executable, "-m", "stx_patch", "inspect"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for paths, expected in ([path, path], b"cube"), ([path, path + b"x"], b"\\udcff.safetensorsx"):
        done = subprocess.run([*command, *paths], capture_output=True, env=environment, timeout=60)
        assert expected in done.stdout + done.stderr and b"Traceback" not in done.stderr


def test_a_table_lines_up():
    rows = [("name", "size"), ("a", "1"), ("longer", "100"), ("", "")]
    expected = "name    size\na          1\nlonger   100\n"
    assert _cli_text.table(rows, "<>") == expected
    assert _cli_text.table([], "") == ""


# --- filters ---


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    _cli_filters.add_filters(parser)
    return parser.parse_args(arguments)


def filter_of(*arguments):
    return _cli_filters.filter_of(parsed(*arguments))


def test_options_make_filters(tmp_path):
    listed = tmp_path / "names.txt"
    listed.write_bytes(b"a.b\r\n\n# c\n a\n")
    assert filter_of() is None
    assert filter_of("--include", "a*") == filters.glob("a*")
    assert filter_of("--include", "a*", "--include", "b") == filters.glob("a*", "b")
    assert filter_of("--prefix", "a") == filters.prefixes("a")
    assert filter_of("--layers", "2:4") == filters.layers(2, 4)
    assert filter_of("--layers", ":4") == filters.layers(0, 4)
    assert filter_of("--layers", "3:")("h.99999.w") and not filter_of("--layers", "3:")("h.2.w")
    assert filter_of("--names-from", str(listed)) == filters.names(["a.b", "# c", " a"])


def test_what_is_named_is_kept_but_what_is_excluded():
    kept = filter_of("--layers", "0:1", "--prefix", "norm", "--exclude", "*.bias")
    names = ["h.0.w", "h.0.bias", "h.1.w", "norm.w", "norm.bias", "other"]
    assert list(filter(kept, names)) == ["h.0.w", "norm.w"]
    assert list(filter(filter_of("--exclude", "*.bias"), names)) == [
        "h.0.w", "h.1.w", "norm.w", "other",
    ]  # fmt: skip


def test_names_come_from_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("b\né\nb\n".encode())))
    arguments = parsed("--names-from", "-")
    assert _cli_filters.names_of(arguments) == ["b", "é"]


def test_wrong_filters_are_wrong_usage(capsys, model, tmp_path):
    for text in ("3", "4:2", "a:b", "-1:2", "1:1"):
        assert "no range of layers" in fails(capsys, "inspect", model, f"--layers={text}")
    assert "empty prefix" in fails(capsys, "inspect", model, "--prefix", "")
    assert fails(capsys, "inspect", model, "--names-from", "gone") == "no such file: gone"
    (tmp_path / "bytes").write_bytes(b"\xff\n")
    assert "UTF-8" in fails(capsys, "inspect", model, "--names-from", tmp_path / "bytes")


@pytest.mark.parametrize("command", ["inspect", "explain", "extract"])
def test_a_filter_that_keeps_nothing_suggests(capsys, model, command):
    def say(*arguments):
        words = [command, model, "out"] if command == "extract" else [command, model]
        return fails(capsys, *words, *arguments)

    assert "did you mean model.layers" in say("--prefix", "model.layrs")
    assert "did you mean model.embed_tokens.weight" in say("--include", "model.embed_token.weight")
    assert say("--layers", "7:9") == "nothing is left of 9 tensors: the layers are 0 to 2"
    assert "the names begin with lm_head, model" in say("--include", "xyz")
    assert "nothing is left of 9 tensors" in say("--exclude", "*")
    (model.parent / "names").write_text("lm_head.weigth\n")
    assert "did you mean lm_head.weight" in say("--names-from", "names")
    assert not (model.parent / "out").exists()


def test_a_folder_in_which_only_what_is_needed_is_there(capsys, model):
    """A shard that a filter leaves closed may be missing, for all commands that look."""
    folder = model.parent / "shards"
    folder.mkdir()
    model.rename(folder / "one.safetensors")
    index = {"model.layers.0.mlp.up.weight": "one.safetensors", "model.layers.9.x": "two"}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    for command in ("inspect", "explain"):
        assert _cli.main([command, str(folder), "--layers", "0:2"]) == 0
        capsys.readouterr()
        text = fails(capsys, command, folder)
        assert text.startswith(f"no such file: {folder}/two, which an index there lists")
        text = fails(capsys, command, folder, "--layers", "20:")
        assert text == "nothing is left of 2 tensors: the layers are 0 to 9"
