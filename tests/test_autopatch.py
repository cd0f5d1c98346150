"""Proves: STX_PATCH=1 reaches processes that nobody edits, by a start-up hook that costs nothing
without it, with the filter and the options of the environment, and never over a patch in force."""

import importlib
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import venv
import warnings
from pathlib import Path

import pytest
import safetensors.torch
from patch_helpers import (  # noqa: F401
    clean_environment,
    floats,
    homes_are_stock,
    leaves_stock,
    run_python,
    write_raw,
)

import stx_patch
from stx_patch import _autopatch, _cli, _environment, _filter, _patch, filters

ROOT = Path(__file__).resolve().parent.parent
HOOK = "stx_patch_autopatch.pth"
VALUES = floats(1.0, 2.0)


@pytest.fixture
def path(tmp_path):
    entries = [(name, "F32", [2], VALUES) for name in ("a", "b", "c.weight")]
    return write_raw(tmp_path / "file.safetensors", entries)


@pytest.fixture
def fresh(monkeypatch):
    """As in a process that has not been activated."""
    monkeypatch.setattr(_autopatch, "_activated", False)
    monkeypatch.setattr(_patch, "_is_said", False)
    yield
    stx_patch.unpatch()


# --- STX_PATCH_FILTER ---


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a", ["a"]),
        (" a , model.*.weight,", None),
        ("a,model.[01].*", ["a", "model.[01].*"]),
        ('json:"a*"', "a*"),
        ('json:["a,b", "c"]', ["a,b", "c"]),
        ('json:{"layers": [0, 2]}', filters.layers(0, 2)),
        (
            'json:{"any_of": [{"none_of": ["x"]}, {"names": [["p", "q"]]}]}',
            filters.any_of(filters.none_of("x"), filters.names(["p", "q"])),
        ),
    ],
)
def test_what_the_variable_may_say(text, expected, monkeypatch):
    monkeypatch.setenv("STX_PATCH_FILTER", text)
    if expected is None:
        with pytest.raises(ValueError, match="empty pattern"):
            _environment.filter_rule()
    else:
        assert _environment.filter_rule() == _filter.make_rule(expected)


def test_the_environment_is_looked_up_when_it_is_asked(monkeypatch):
    """Somebody may have put another object in its place."""
    monkeypatch.setattr(os, "environ", {"STX_PATCH": "1", "STX_PATCH_FILTER": "x"})
    assert _environment.switch() is True
    assert _environment.filter_rule() == ("glob", ("x",))


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_variable_says_nothing(text, monkeypatch):
    monkeypatch.setenv("STX_PATCH_FILTER", text)
    assert _environment.filter_rule() is None


EVERY_FILTER = [
    filters.prefixes("model.norm", "lm_head"),
    filters.names(["b", "a,b", "c\n\x00é"]),
    filters.glob("*.weight", "model.[01]"),
    filters.regex(r"^a\d+"),
    filters.layers(0, 2**64 - 1),
    filters.experts(range(3), keep_scales=False),
    filters.indexed({"a": "x/one.safetensors", "b": "two.safetensors"}),
    filters.all_of(),
    filters.all_of("a*", ["b", "c"], {"d", "e"}, filters.none_of(filters.layers(1, 2))),
]


@pytest.mark.parametrize("tensor_filter", EVERY_FILTER, ids=lambda one: type(one).__name__)
def test_every_filter_can_be_written_down(tensor_filter, tmp_path):
    text = _environment.filter_text(tensor_filter)
    file = tmp_path / "filter"
    file.write_text(text.removeprefix("json:"))
    assert text.isascii()
    for written in (text, f"file:{file}"):
        found = _environment.parse_filter(written)
        assert type(found) is type(tensor_filter)
        assert _filter.make_rule(found) == _filter.make_rule(tensor_filter)


def test_every_kind_of_filter_was_written_down():
    kinds = {name for name in filters.__all__ if name not in ("Filter", "from_index")}
    assert {type(one).__name__ for one in EVERY_FILTER} | {"any_of", "none_of"} == kinds


def test_a_callable_cannot_be_written_down():
    with pytest.raises(TypeError, match="cannot be written down"):
        _environment.filter_text(filters.any_of(len))


WRONG = [
    "a,,b",
    ",",
    "json:",
    "json:3",
    "json:[1]",
    'json:{"layers": 2}',
    'json:{"layers": [2]}',
    'json:{"Filter": []}',
    'json:{"os": ["x"]}',
    'json:{"regex": ["("]}',
    'json:{"any_of": [null]}',
    'json:{"layers": [0, 2], "glob": ["a"]}',
    "json:" + '{"all_of": [' * 40 + "]}" * 40,
    "file:/no/such/file",
    "call:",
    "call:module",
    "call:module:",
    "call:a b:c",
    '{"layers": [0, 2]}',
    ' { "layers": [0, 2] }',
    '["a", "b"]',
    '[ {"layers": [0, 2]}]',
    'JSON:{"layers": [0, 2]}',
    'json :["a"]',
    "regex:^a",
    "any_of:a",
    "layers:0-2",
    "lm_head.*,call:a:b",
    "lm_head.*, layers : 0-2",
    'json:{"layers": [0, 2], "layers": [5, 6]}',
    'json:{"indexed": [{"a": "x", "a": "y"}]}',
    'json:{"experts": [[0], "false"]}',
    'json:{"experts": [[0], 0]}',
    'json:{"names": [{"a": 1}]}',
    'json:{"names": [[["a"]]]}',
]


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_understood_is_an_error_that_names_the_variable(text, monkeypatch):
    monkeypatch.setenv("STX_PATCH_FILTER", text)
    for use in (_environment.filter_rule, stx_patch.patch, stx_patch.patched().__enter__):
        with pytest.raises(ValueError, match="STX_PATCH_FILTER: "):
            use()
    assert not stx_patch.is_patched()


@pytest.mark.parametrize("kind", ["file:", "from_index"])
def test_a_path_has_to_be_absolute(kind, tmp_path, monkeypatch):
    """It is looked at when the first file is opened: from another folder, it may be."""
    monkeypatch.chdir(tmp_path)
    Path("filter").write_text('["a"]')
    Path("index").write_text('{"weight_map": {"a": "x.safetensors"}}')
    for folder in ("", f"{tmp_path}/"):
        text = (
            f"file:{folder}filter" if kind == "file:" else f'json:{{"{kind}": ["{folder}index"]}}'
        )
        monkeypatch.setenv("STX_PATCH_FILTER", text)
        if folder:
            assert _environment.filter_rule() is not None
        else:
            with pytest.raises(ValueError, match=r"STX_PATCH_FILTER: .* is no absolute path"):
                _environment.filter_rule()


@pytest.mark.parametrize("text", ["weight:0", "a,weight:0"])
def test_a_name_with_a_colon_can_be_given_as_json(text, monkeypatch):
    monkeypatch.setenv("STX_PATCH_FILTER", text)
    with pytest.raises(ValueError, match=r"""a name with a colon.* json:\["weight:0"\]"""):
        _environment.filter_rule()
    monkeypatch.setenv("STX_PATCH_FILTER", 'json:["weight:0"]')
    assert _environment.filter_rule() == ("glob", ("weight:0",))
    monkeypatch.setenv("STX_PATCH_FILTER", "dense/kernel:0,[[]x],layers.0:1")
    assert _environment.filter_rule() == ("glob", ("dense/kernel:0", "[[]x]", "layers.0:1"))


@pytest.mark.parametrize("text", ["a", "json:{", "call:nowhere:f"])
def test_a_filter_that_is_given_hides_the_variable(text, path, monkeypatch):
    monkeypatch.setenv("STX_PATCH_FILTER", text)
    with stx_patch.patched("b"):
        assert list(safetensors.torch.load_file(path)) == ["b"]
        stx_patch.patch("*")
    assert len(safetensors.torch.load_file(path)) == 3
    assert len(stx_patch.load_file(path, tensor_filter="a")) == 1
    stx_patch.unpatch()
    assert len(stx_patch.load_file(path)) == 3  # it is a filter of patches, not of our functions


def test_a_patch_without_a_filter_takes_that_of_the_variable(path, monkeypatch):
    monkeypatch.setenv("STX_PATCH_FILTER", "a,c.*")
    with stx_patch.patched():
        assert sorted(safetensors.torch.load_file(path)) == ["a", "c.weight"]
    stx_patch.patch()
    monkeypatch.setenv("STX_PATCH_FILTER", "b")  # it is looked at when a patch is made
    assert sorted(safetensors.torch.load_file(path)) == ["a", "c.weight"]
    stx_patch.unpatch()


def test_a_function_is_imported_when_the_first_file_is_opened(path, tmp_path, monkeypatch):
    tmp_path.joinpath("stx_filters_of_user.py").write_text(
        "class Wanted:\n    def test(key):\n        return key.nbytes == 8 and key < 'b'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("STX_PATCH_FILTER", "call:stx_filters_of_user:Wanted.test")
    with stx_patch.patched():
        assert "stx_filters_of_user" not in sys.modules
        assert list(safetensors.torch.load_file(path)) == ["a"]
        assert sys.modules.pop("stx_filters_of_user")


@pytest.mark.parametrize("function", ["stx_no_module:f", "os:no_such_name", "os:sep"])
def test_a_function_that_is_not_there_is_an_error_of_the_first_open(function, path, monkeypatch):
    monkeypatch.setenv("STX_PATCH_FILTER", f"call:{function}")
    with stx_patch.patched():
        for load in (safetensors.torch.load_file, safetensors.numpy.load_file):
            with pytest.raises(ValueError, match=f"^STX_PATCH_FILTER: .*{function}"):
                load(path)


# --- activate(), and STX_PATCH ---


@pytest.mark.parametrize(
    "value, is_on",
    [
        (None, False), ("", False), ("0", False), ("false", False), ("yes", False),
        ("1", True), ("true", True), (" True\n", True),
    ],
)  # fmt: skip
def test_only_1_and_true_activate(value, is_on, fresh, monkeypatch):
    monkeypatch.delenv("STX_PATCH", raising=False)
    if value is not None:
        monkeypatch.setenv("STX_PATCH", value)
    _autopatch.activate()
    assert stx_patch.is_patched() == is_on


@pytest.mark.parametrize("value", ["0", "false", "False"])
def test_0_and_false_turn_everything_off(value, fresh, monkeypatch):
    monkeypatch.setenv("STX_PATCH", value)
    stx_patch.patch()
    assert not stx_patch.is_patched() and homes_are_stock()


def test_filter_and_options_come_from_the_environment(fresh, path, monkeypatch):
    monkeypatch.setenv("STX_PATCH", "1")
    monkeypatch.setenv("STX_PATCH_FILTER", "b")
    monkeypatch.setenv("STX_PATCH_ENGINE", "threads")
    _autopatch.activate()
    assert list(safetensors.torch.load_file(path)) == ["b"]
    assert _patch.current().options.engine == "threads"


def test_a_patch_in_force_is_left_alone(fresh, path, monkeypatch):
    monkeypatch.setenv("STX_PATCH", "1")
    monkeypatch.setenv("STX_PATCH_FILTER", "b")
    stx_patch.patch("a")
    _autopatch.activate()
    assert list(safetensors.torch.load_file(path)) == ["a"]
    assert len(_patch._entries) == 1


def test_it_goes_below_the_blocks_in_force(fresh, path, monkeypatch):
    monkeypatch.setenv("STX_PATCH", "1")
    monkeypatch.setenv("STX_PATCH_FILTER", "b")
    with stx_patch.patched("a"), stx_patch.patched("c.*"):
        _autopatch.activate()
        assert list(safetensors.torch.load_file(path)) == ["c.weight"]
    assert list(safetensors.torch.load_file(path)) == ["b"]


@pytest.mark.parametrize("patches", [True, False])
def test_an_unpatch_of_the_program_holds(patches, fresh, monkeypatch):
    """An entry point may be called after it."""
    monkeypatch.setenv("STX_PATCH", "1")
    if patches:
        stx_patch.patch()
    stx_patch.unpatch()
    _autopatch.activate()
    assert not stx_patch.is_patched()


@pytest.mark.parametrize("own", [None, "a"])
def test_the_command_line_takes_back_only_what_nobody_said(own, fresh, path, monkeypatch, capsys):
    """safetensors is imported here: activate() patches at once."""
    monkeypatch.setenv("STX_PATCH", "1")
    monkeypatch.setenv("STX_PATCH_FILTER", "b")
    _autopatch.activate()
    if own is not None:
        stx_patch.patch(own)
    assert _cli.main(["explain", str(path)]) == 0
    assert stx_patch.is_patched() == (own is not None)
    assert "kept     3 tensors of 3" in capsys.readouterr().out or own is not None


def test_it_is_activated_once_so_that_unpatch_holds(fresh, monkeypatch):
    """vLLM calls its plugins several times in a process."""
    monkeypatch.setenv("STX_PATCH", "1")
    _autopatch.activate()
    _autopatch.activate()
    assert len(_patch._entries) == 1
    stx_patch.unpatch()
    _autopatch.activate()
    assert not stx_patch.is_patched()


def test_a_wrong_option_is_warned_about_and_the_filter_holds(fresh, path, monkeypatch):
    monkeypatch.setenv("STX_PATCH", "1")
    monkeypatch.setenv("STX_PATCH_FILTER", "a")
    monkeypatch.setenv("STX_PATCH_ENGINE", "fast")
    monkeypatch.setenv("STX_PATCH_READ_AHEAD", "7")
    with pytest.warns(stx_patch.StxWarning, match="^STX_PATCH_ENGINE: .*'fast'") as caught:
        _autopatch.activate()
    assert len(caught) == 1
    options = _patch.current().options
    assert (options.engine, options.read_ahead) == ("auto", 7)
    assert list(safetensors.torch.load_file(path)) == ["a"]


@pytest.mark.parametrize("text", ["json:{", "call:nothing"])
def test_a_wrong_filter_loads_neither_all_nor_nothing(text, fresh, path, monkeypatch):
    monkeypatch.setenv("STX_PATCH", "1")
    monkeypatch.setenv("STX_PATCH_FILTER", text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _autopatch.activate()
    for load in (safetensors.torch.load_file, safetensors.numpy.load_file):
        with pytest.raises(ValueError, match="STX_PATCH_FILTER: "):
            load(path)


def test_the_entry_points_name_it():
    """vLLM and sglang call what is named there."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.findall(r'\[project\.entry-points\."(.*)"\]\nstx_patch = "(.*):(.*)"\n', text)
    groups = ["vllm.general_plugins", "sglang.srt.plugins", "sglang.multimodal_gen.plugins"]
    assert [group for group, _, _ in found] == groups
    for _, module, function in found:
        assert getattr(importlib.import_module(module), function) is _autopatch.activate


# --- before safetensors is imported ---


def test_the_command_line_sees_files_as_they_are(hooked, path):
    env = {"STX_PATCH": "1", "STX_PATCH_FILTER": "a"}
    done = hooked("-m", "stx_patch", "explain", path, env=env)
    assert "kept     3 tensors of 3" in done.stdout, done


def test_it_waits_for_safetensors_and_is_in_force_for_whoever_looks():
    """In one process each: what patches, and what was imported for it before."""
    prologue = """
        import sys
        from stx_patch._autopatch import activate
        activate()
        assert not {"torch", "safetensors", "stx_patch._patch", "typing", "re"} & sys.modules.keys()
        finders = len(sys.meta_path)
    """
    epilogue = """
        assert not any("_autopatch" in type(finder).__module__ for finder in sys.meta_path)
        assert len(sys.meta_path) == finders, "the finder gives way to that of the patch"
    """
    uses = {
        "import safetensors": """
            import safetensors
            from stx_patch import _patch
            assert _patch.is_patched()
            assert safetensors.safe_open is not safetensors._safetensors_rust.safe_open
            assert type(safetensors.__spec__.loader).__module__.startswith("_frozen_importlib")
        """,
        "import a module of it": """
            import safetensors.numpy
            from stx_patch import _patch
            assert safetensors.numpy.load.__globals__["__name__"] == "stx_patch._load"
        """,
        "ask": """
            import stx_patch
            assert stx_patch.is_patched() and "safetensors" not in sys.modules
        """,
        "read": """
            import stx_patch
            assert stx_patch.load_file is not None
            from stx_patch import _patch
            assert _patch.is_patched()
        """,
        "replace": """
            import stx_patch
            stx_patch.patch("a")
            from stx_patch import _patch
            import safetensors
            assert [entry.rule for entry in _patch._entries] == [("glob", ("a",))]
        """,
        "patch past it": """
            from stx_patch import _patch
            _patch.patch("a")
            import safetensors
            assert [entry.rule for entry in _patch._entries] == [("glob", ("a",))]
        """,
    }
    code = "import os\n"
    for use in uses.values():
        body = "".join(textwrap.dedent(part) for part in (prologue, use, epilogue))
        body = textwrap.indent(body, "    ")
        code += f"if os.fork() == 0:\n{body}    os._exit(0)\nassert os.wait()[1] == 0\n"
    run_python(code, env={"STX_PATCH": "1", "STX_PATCH_FILTER": "b"})


def test_what_undoes_it_before_safetensors_is_imported():
    code = """
        import os
        from stx_patch._autopatch import activate
        activate()
        if os.fork() == 0:
            import stx_patch
            stx_patch.unpatch()
            activate()
            import safetensors
            assert safetensors.safe_open is safetensors._safetensors_rust.safe_open
            assert not stx_patch.is_patched()
            os._exit(0)
        assert os.wait()[1] == 0
        os.environ["STX_PATCH"] = "0"
        import safetensors
        assert safetensors.safe_open is safetensors._safetensors_rust.safe_open
        """
    run_python(code, env={"STX_PATCH": "1"})


def test_a_warning_that_is_an_error_leaves_the_patch_in_force():
    code = """
        from stx_patch._autopatch import activate
        activate()
        try:
            import safetensors
        except UserWarning as warning:
            assert str(warning).startswith("STX_PATCH_ENGINE: "), warning
        else:
            raise AssertionError
        import safetensors
        import stx_patch
        from stx_patch import _patch
        assert safetensors.safe_open is not safetensors._safetensors_rust.safe_open
        assert [entry.rule for entry in _patch._entries] == [("glob", ("a",))]
        """
    env = {"STX_PATCH": "1", "STX_PATCH_FILTER": "a", "STX_PATCH_ENGINE": "fast"}
    run_python(code, env={**env, "PYTHONWARNINGS": "error::UserWarning"})


def test_what_fails_meanwhile_is_tried_again():
    code = """
        import sys
        from stx_patch import _autopatch
        _autopatch.activate()
        patch_now = _autopatch._patch_now
        def fail():
            _autopatch._patch_now = patch_now
            raise KeyboardInterrupt
        _autopatch._patch_now = fail
        try:
            import safetensors
        except KeyboardInterrupt:
            pass
        import safetensors
        assert safetensors.safe_open is not safetensors._safetensors_rust.safe_open
        """
    run_python(code, env={"STX_PATCH": "1"})


def test_a_thread_that_looks_meanwhile_finds_the_patch_in_force():
    """And so does a child that is forked then, of which nobody else holds the lock."""
    code = """
        import os
        import sys
        import threading
        from stx_patch import _autopatch, _patch
        begun, forked, asked = threading.Event(), threading.Event(), threading.Event()
        put_in_force = _patch.put_in_force

        def slowly(*arguments, **keywords):
            begun.set()
            forked.wait()
            asked.wait(0.2)
            put_in_force(*arguments, **keywords)

        def ask():
            import stx_patch
            found.append(stx_patch.is_patched())
            asked.set()

        found = []
        _patch.put_in_force = slowly
        del sys.modules["stx_patch._patch"]
        _autopatch.activate()
        sys.modules["stx_patch._patch"] = _patch
        first = threading.Thread(target=_autopatch.settle)
        first.start()
        begun.wait()
        if os.fork() == 0:
            _patch.put_in_force = put_in_force
            ask()
            os._exit(found != [True])
        assert os.wait()[1] == 0
        second = threading.Thread(target=ask)
        second.start()
        forked.set()
        first.join()
        second.join()
        assert found == [True], found
        """
    run_python(code, env={"STX_PATCH": "1"})


@pytest.mark.parametrize("use", ["settle", "forget"])
def test_the_end_of_the_interpreter_has_no_finders(use, monkeypatch):
    with monkeypatch.context() as patches:
        patches.setattr(sys, "meta_path", None)
        getattr(_autopatch, use)()


def test_safetensors_that_is_missing_is_missing_as_before():
    code = """
        import sys
        from stx_patch._autopatch import activate
        activate()
        sys.path[:] = [path for path in sys.path if "site-packages" not in path]
        try:
            import safetensors
        except ModuleNotFoundError as error:
            assert str(error) == "No module named 'safetensors'"
        else:
            raise AssertionError
        """
    run_python(code, env={"STX_PATCH": "1"})


# --- the start-up hook ---


class Python:
    """A virtual environment of its own, which sees the packages of ours, and not stx_patch."""

    def __init__(self, folder):
        venv.create(folder, with_pip=False, symlinks=True)
        self.executable = folder / "bin/python"
        self.hooks = next(folder.glob("lib/python*/site-packages"))
        packages = self.hooks / "packages.pth"
        packages.write_text(sysconfig.get_path("purelib") + "\n")  # its own hooks are not run

    def __call__(self, *arguments, env=None, installed=True):
        found = {"PYTHONPATH": str(ROOT)} if installed else {}
        environment = {**clean_environment(), **found, **(env or {})}
        if not installed and "PYTHONPATH" not in (env or {}):
            environment.pop("PYTHONPATH", None)
        return subprocess.run(
            [self.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
            cwd="/",
        )

    def autopatch(self, *arguments, **keywords):
        done = self("-m", "stx_patch", "autopatch", *arguments, **keywords)
        return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return Python(tmp_path_factory.mktemp("python") / "venv")


@pytest.fixture
def hooked(python):
    """Our hook is installed."""
    status, said, trouble = python.autopatch("--install")
    assert (status, trouble) == (0, "") and str(python.hooks / HOOK) in said
    yield python
    (python.hooks / HOOK).unlink(missing_ok=True)


def test_it_is_installed_once_told_of_and_removed_without_a_trace(python):
    before = sorted(python.hooks.iterdir())
    assert python.autopatch("--status")[0] == 1
    assert python.autopatch("--install")[0] == 0
    text = (python.hooks / HOOK).read_text()
    assert (python.hooks / HOOK).stat().st_mode & 0o777 == 0o644
    status, said, trouble = python.autopatch("--install")
    assert (status, trouble) == (0, "") and "already" in said
    assert (python.hooks / HOOK).read_text() == text
    status, said, trouble = python.autopatch("--status", env={"STX_PATCH": "1"})
    assert (status, trouble) == (0, "")
    assert str(python.hooks / HOOK) in said and "1 (on)" in said and "yes" in said
    assert python.autopatch("--remove")[0] == 0
    assert sorted(python.hooks.iterdir()) == before
    assert python.autopatch("--remove")[0] == 0  # nothing to do


def test_status_says_what_the_variables_say(hooked):
    for value, meaning in (("0", "off"), ("maybe", "says nothing")):
        assert f"{value} ({meaning}" in hooked.autopatch("--status", env={"STX_PATCH": value})[1]
    said = hooked.autopatch("--status", env={"STX_PATCH_FILTER": "json:{"})[1]
    assert "wrong, each file that is opened will say so: STX_PATCH_FILTER: " in said


def test_what_has_its_name_and_is_not_ours_is_left_alone(python):
    path = python.hooks / HOOK
    path.write_text("import os; os\n")
    try:
        for action in ("--install", "--remove", "--status"):
            status, said, trouble = python.autopatch(action)
            assert (status, said) == (2, "") and "holds something else" in trouble
            assert trouble.count("\n") == 1 and "Traceback" not in trouble
        assert path.read_text() == "import os; os\n"
    finally:
        path.unlink()


def test_an_older_hook_of_ours_is_replaced(hooked):
    path = hooked.hooks / HOOK
    text = path.read_text()
    path.write_text(text.replace(str(ROOT), "/of/an/earlier/version"))
    assert hooked.autopatch("--install")[0] == 0
    assert path.read_text() == text


def test_without_the_variable_nothing_of_ours_is_imported(hooked):
    code = "import sys; sys.exit('stx_patch' in sys.modules)"
    for env in ({}, {"STX_PATCH": "0"}, {"STX_PATCH": ""}):
        done = hooked("-c", code, env=env)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_with_the_variable_neither_torch_nor_safetensors_is_imported(hooked):
    """And next to nothing else: what more there is than without the variable."""
    code = "import sys; print(*sorted(sys.modules))"
    modules = [set(hooked("-c", code, env=env).stdout.split()) for env in ({}, {"STX_PATCH": "1"})]
    assert modules[0] and modules[1] - modules[0] == {
        "__future__",
        "stx_patch",
        "stx_patch._autopatch",
        "stx_patch._environment",
    }


@pytest.mark.parametrize("env", [{}, {"STX_PATCH": "1"}], ids=["off", "on"])
def test_a_hook_that_is_left_over_says_nothing(hooked, env):
    """stx_patch was uninstalled; its folder is gone."""
    path = hooked.hooks / HOOK
    path.write_text(path.read_text().replace(str(ROOT), "/no/such/folder"))
    done = hooked("-c", "import sys; print(*sys.path)", env=env, installed=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "/no/such/folder" not in done.stdout


def test_a_hook_that_finds_something_broken_says_nothing(hooked, tmp_path):
    package = tmp_path / "stx_patch"
    package.mkdir()
    package.joinpath("__init__.py").write_text("1 / 0")
    code = "import sys; print(sys.path[-1])"
    env = {"PYTHONPATH": str(tmp_path)}
    ends = [hooked("-c", code, env={**env, **on}) for on in ({}, {"STX_PATCH": "1"})]
    assert [done.stderr for done in ends] == ["", ""] and ends[0].stdout == ends[1].stdout


def test_wrong_variables_keep_no_python_from_starting(hooked):
    env = {"STX_PATCH": "1", "STX_PATCH_FILTER": "json:{", "STX_PATCH_ENGINE": "fast"}
    done = hooked("-W", "error", "-c", "pass", env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_folder_of_a_user(tmp_path):
    """Its hooks run before the folders of all users are on the path."""
    base = sys._base_executable
    env = {**clean_environment(), "PYTHONUSERBASE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env.pop("PYTHONNOUSERSITE", None)
    command = [base, "-m", "stx_patch", "autopatch"]
    done = subprocess.run([*command, "--install", "--user"], capture_output=True, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    (hook,) = tmp_path.rglob(HOOK)
    del env["PYTHONPATH"]
    code = "import sys; sys.exit('stx_patch._autopatch' not in sys.modules)"
    path = [base, "-c", "import sys; print(*sys.path)"]
    paths = [
        subprocess.run(path, capture_output=True, env={**env, **switch}).stdout
        for switch in ({}, {"STX_PATCH": "1"})
    ]
    assert paths[0] == paths[1]
    assert subprocess.run([base, "-c", code], env={**env, "STX_PATCH": "1"}).returncode == 0
    env["PYTHONPATH"] = str(ROOT)
    assert subprocess.run([*command, "--remove"], capture_output=True, env=env).returncode == 0
    assert not hook.exists()


def test_a_folder_that_nobody_may_write_is_an_error_without_a_user_folder(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("site.ENABLE_USER_SITE", False)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for arguments, text in (([], "is not writable"), (["--user"], "no folder for its user")):
        assert _cli.main(["autopatch", "--install", *arguments]) == 2
        assert text in capsys.readouterr().err


@pytest.fixture
def unwritable(tmp_path, monkeypatch):
    """The site-packages of this Python may not be written; the folder of the user is this one."""
    folder = tmp_path / "user"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr("site.ENABLE_USER_SITE", True)
    monkeypatch.setattr("site.getusersitepackages", lambda: str(folder))
    monkeypatch.setattr("stx_patch._cli_autopatch._is_in_force", lambda: True)
    return folder


def test_a_virtual_environment_is_not_left_unless_that_is_asked_for(
    unwritable, monkeypatch, capsys
):
    monkeypatch.setattr("sys.base_prefix", "/other")
    assert _cli.main(["autopatch", "--install"]) == 2
    trouble = capsys.readouterr().err
    assert trouble.count("\n") == 1 and "--user" in trouble
    assert f"{sysconfig.get_path('purelib')} is not writable" in trouble
    assert not unwritable.exists()
    assert _cli.main(["autopatch", "--install", "--user"]) == 0
    assert (unwritable / HOOK).exists()


def test_outside_of_virtual_environments_the_fall_back_says_where_it_is(
    unwritable, monkeypatch, capsys
):
    monkeypatch.setattr("sys.base_prefix", sys.prefix)
    for words in ("is installed", "was there already"):
        assert _cli.main(["autopatch", "--install"]) == 0
        first = capsys.readouterr().out.splitlines()[0]
        assert first.startswith(f"{unwritable / HOOK} {words}: the folder of this user, since ")
        assert first.endswith(f"{sysconfig.get_path('purelib')} is not writable")


def test_a_spawned_worker_that_imports_transformers_first_is_native(hooked, path, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing
            import sys

            def work(path):
                import transformers.modeling_utils
                from safetensors.torch import load_file
                assert transformers.modeling_utils.safe_open is not None
                print(sorted(load_file(path)))
                with transformers.modeling_utils.safe_open(path, "pt") as file:
                    print(file.keys())
                import stx_patch
                stats = stx_patch.stats()
                print(stats.opens, stats.tensors_native, stats.fallbacks)

            if __name__ == "__main__":
                spawn = multiprocessing.get_context("spawn")
                worker = spawn.Process(target=work, args=sys.argv[1:])
                worker.start()
                worker.join()
                print(worker.exitcode, "safetensors" in sys.modules)
            """
        )
    )
    done = hooked(script, path, env={"STX_PATCH": "1", "STX_PATCH_FILTER": "a,b"})
    assert done.stderr == ""
    assert done.stdout == "['a', 'b']\n['a', 'b']\n2 2 {}\n0 False\n"
