"""Proves: `stx-patch run` runs a program as Python does, patched, with its child processes, and
ends with a table of what was loaded where, and why not natively."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from patch_helpers import clean_environment, floats, write_raw

from stx_patch import Stats, _cli, _run_table

ROOT = Path(__file__).resolve().parent.parent
START = ROOT / "stx_patch/_start"
TITLE = "\nstx-patch run "
LAYERS = 20


@pytest.fixture
def path(tmp_path):
    names = [f"model.layers.{number}.weight" for number in range(LAYERS)] + ["lm_head"]
    entries = [(name, "F32", [2], floats(1.0, 2.0)) for name in names]
    return write_raw(tmp_path / "file.safetensors", entries)


@pytest.fixture
def place(tmp_path):
    """A folder for temporary files; none of ours is in it at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    yield folder
    assert list(folder.glob("stx*")) == []


@pytest.fixture
def call(tmp_path, place):
    """Write `code` into program.py and run it: by Python alone, or by us with these options."""

    def call(code, *arguments, options=None, env=None, python=(sys.executable,)):
        tmp_path.joinpath("program.py").write_text(textwrap.dedent(code))
        by_us = [] if options is None else ["-m", "stx_patch", "run", *map(str, options)]
        environment = {**clean_environment(), "PYTHONPATH": str(ROOT), "TMPDIR": str(place)}
        return subprocess.run(
            [*python, *by_us, "program.py", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env={**environment, **(env or {})},
        )

    return call


def take_filters(place):
    """Take the folders of filters away. A child may have left its counters there, too, for a
    program that is dead, but not waited for."""
    filters = list(place.glob("stx*/filter"))
    for path in filters:
        shutil.rmtree(path.parent)
    return filters


def told(done):
    """What a program said on stderr, and the table."""
    assert done.stderr.count(TITLE) == 1, done.stderr
    said, _, table = done.stderr.partition(TITLE)
    return said, table


# --- as Python does ---

SEEN = """
import os, pickle, sys
class Mine:
    pass
print(__name__, __file__, sys.argv, sys.path, sys.flags, __spec__, __builtins__)
print(sorted(set(globals())), pickle.loads(pickle.dumps(Mine)) is Mine, os.getcwd())
print([name for name in sys.modules if "site" in name or "runpy" in name])
print(sys.stdin.read(), sys.executable, sys.warnoptions)
"""


@pytest.mark.parametrize(
    "flags", [[], ["-X", "utf8", "-W", "error", "-O", "-s"]], ids=["", "flags"]
)
def test_a_program_sees_what_it_sees_under_python(flags, call):
    arguments = ["-h", "--json", "x", "--", "-m", "--inc"]
    python = [sys.executable, *flags]
    alone = call(SEEN, *arguments, python=python)
    assert alone.returncode == 0, alone.stderr
    done = call(SEEN, *arguments, python=python, options=[])
    assert (done.returncode, done.stdout) == (0, alone.stdout)
    assert told(done)[0] == "" and told(done)[1].startswith(f"program.py {' '.join(arguments)}: ")


@pytest.mark.parametrize(
    "flags",
    [
        ["-u", "-Xno_debug_ranges", "-W", "ignore", "--check-hash-based-pycs", "always", "-BOOm"],
        ["-X", "importtime=0", "-bW", "error", "-m"],
    ],
)
def test_all_options_of_python_are_taken_over(flags, tmp_path, place):
    tmp_path.joinpath("program.py").write_text("import sys; print(sys.orig_argv[1:], sys.argv)")
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT), "TMPDIR": str(place)}
    command = [sys.executable, *flags, "stx_patch", "run", "--quiet", "program.py", "-X"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    kept = [*flags[:-1], *(["-BOO"] if flags[-1] == "-BOOm" else [])]
    program = ["program.py", "-X"]
    assert done.stdout == f"{[*kept, *program]} {program}\n", done.stderr


def test_a_module_is_found_and_run_as_python_does(tmp_path, call):
    package = tmp_path / "package"
    package.mkdir()
    package.joinpath("__main__.py").write_text(SEEN)
    outputs = []
    for command in (["-m"], ["-m", "stx_patch", "run", "-m"]):
        environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *command, "package", "-m", "--quiet", "--", "--x"]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, input="in"
        )
        assert done.returncode == 0, done.stderr
        outputs.append(re.sub("0x[0-9a-f]*", "", done.stdout))
    assert outputs[0] == outputs[1] and "'-m', '--quiet', '--', '--x'" in outputs[0]
    assert told(done)[1].startswith("-m package -m --quiet -- --x: ")


ENDINGS = {
    "return": "pass",
    "status": "import sys; sys.exit(3)",
    "text": "import sys; sys.exit('no')",
    "exception": "def f():\n    1 / 0\nf()",
    "interrupt": "import os, signal; os.kill(os.getpid(), signal.SIGINT)\nwhile True: pass",
    "syntax": "(",
}


@pytest.mark.parametrize("code", ENDINGS.values(), ids=ENDINGS)
def test_it_ends_as_under_python_and_the_table_follows(code, call):
    alone, done = call(code), call(code, options=[])
    assert done.returncode == alone.returncode
    assert told(done)[0] == alone.stderr
    nothing = r"program.py: \d+\.\d s, no safetensors file was opened through stx_patch\n"
    assert re.fullmatch(nothing, told(done)[1])


def test_an_interrupt_ends_it_as_under_python_after_a_child_has_loaded(path, call):
    """Python forgets that it was interrupted when text is compiled at its exit."""
    code = """
        import os, signal, subprocess, sys
        code = f"from safetensors import safe_open; safe_open({sys.argv[1]!r}, 'np')"
        subprocess.run([sys.executable, "-c", code])
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            pass
        """
    done = call(code, path, options=[])
    assert done.returncode == -signal.SIGINT
    assert "went to stock: framework np (1 call)" in told(done)[1]


@pytest.mark.parametrize(
    "code, status",
    [
        ("import os; os._exit(4)", 4),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ],
)
def test_what_ends_without_pythons_exit_shows_no_table(code, status, call):
    for options in (None, []):
        done = call(code, options=options)
        assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_the_users_own_sitecustomize_is_run(tmp_path, call):
    """Found at the same place, under its name; an error of it is told as Python tells it."""
    folder = tmp_path / "site"
    folder.mkdir()
    own = folder / "sitecustomize.py"
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    code = "import sys, sitecustomize; print(sitecustomize.__file__, sitecustomize.mark, sys.path)"
    own.write_text("mark = __name__\n")
    alone, done = call(code, env=env), call(code, env=env, options=[])
    assert alone.returncode == 0 and done.stdout == alone.stdout
    own.write_text("1 / 0\n")
    alone, done = call("pass", env=env), call("pass", env=env, options=[])
    assert "Error in sitecustomize" in alone.stderr
    assert told(done)[0].count(alone.stderr) == 2  # ours, and the program's


def test_an_interpreter_without_us_notices_nothing():
    """Such as another program's, of any version, started by the one that is run."""
    code = "import sys; print(sys.path, 'sitecustomize' in sys.modules)"
    outputs = []
    for path in ({}, {"PYTHONPATH": str(START), "STX_PATCH_RUN_PREFIX": "/other"}):
        env = {**clean_environment(), "STX_PATCH": "1", "STX_PATCH_RUN": "{}"}
        env.pop("PYTHONPATH", None)
        done = subprocess.run(
            [sys._base_executable, "-c", code], capture_output=True, text=True, env={**env, **path}
        )
        assert (done.returncode, done.stderr) == (0, "")
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    "code, told",
    [("1 / 0", False), ("def activate(): 1 / 0", True)],
    ids=["import", "activate"],
)
def test_the_users_own_sitecustomize_is_run_whatever_is_wrong_with_ours(code, told, tmp_path):
    package = tmp_path / "stx_patch"
    package.mkdir()
    package.joinpath("__init__.py").touch()
    package.joinpath("_autopatch.py").write_text(code)
    tmp_path.joinpath("sitecustomize.py").write_text("mark = 7\n")
    env = {**clean_environment(), "PYTHONPATH": f"{START}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", "import sys; print(sys.modules['sitecustomize'].mark)"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.stdout, "ZeroDivisionError" in done.stderr) == ("7\n", told), done.stderr
    assert told or done.stderr == ""


# --- what goes wrong before ---


@pytest.mark.parametrize(
    "arguments, env, text",
    [
        ([], {}, "which program?"),
        (["-m"], {}, "which program?"),
        (["missing.py"], {}, "no such file: missing.py"),
        (["sh"], {}, "no such file: sh; if you mean the command, give its path: /"),
        (["--engine", "fast", "program.py"], {}, "engine must be one of"),
        (["program.py"], {"STX_PATCH_ENGINE": "fast"}, "STX_PATCH_ENGINE: engine must be one of"),
        (["program.py"], {"STX_PATCH_FILTER": "json:{"}, "STX_PATCH_FILTER: "),
        (["--nonsense", "program.py"], {}, "--nonsense"),
        (["--json", "no/x", "program.py"], {}, "no/x: there is no folder "),
        (["--trace", "no/x", "program.py"], {}, "no/x: there is no folder "),
        (["--json", "program.py/x", "program.py"], {}, "program.py/x: there is no folder "),
        (["--trace", ".", "program.py"], {}, "it is a folder"),
        (["--json", "", "program.py"], {}, "it is a folder"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_runs_nothing(arguments, env, text, tmp_path, place):
    tmp_path.joinpath("program.py").write_text("print('ran')")
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT), "TMPDIR": str(place), **env}
    command = [sys.executable, "-m", "stx_patch", "run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("stx-patch: error: ") and done.stderr.count("\n") == 1
    assert text in done.stderr


def test_without_the_environment_it_is_refused(call):
    """The program would not be patched."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from stx_patch._cli import main"
    for flag in ("-E", "-I"):
        done = call(
            "pass", python=[sys.executable, flag, "-c", f"{code}; sys.exit(main(['run', '-']))"]
        )
        assert done.returncode == 2 and "without -E, -I and -S" in done.stderr


def test_switched_off_it_runs_the_program_alone(path, call):
    done = call("print(3)", options=[], env={"STX_PATCH": "0"})
    assert (done.returncode, done.stdout) == (0, "3\n")
    assert done.stderr == "stx-patch: note: STX_PATCH=0: the program runs without stx_patch\n"
    assert call("pass", options=["--quiet"], env={"STX_PATCH": "0"}).stderr == ""


def test_the_help_says_what_the_variable_of_the_filter_may_be(capsys):
    for command in ("run", "autopatch"):
        assert _cli.main([command, "--help"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        for part in ("STX_PATCH_FILTER", "globs", "call:package.module:function", "json:", "USAGE"):
            assert part in said


def test_a_closed_pipe_for_the_table_changes_no_exit_status(tmp_path, place):
    tmp_path.joinpath("program.py").touch()
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT), "TMPDIR": str(place)}
    environment.pop("PYTHONUNBUFFERED", None)  # nothing would be left over for the end
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "stx_patch", "run", "program.py"]
    done = subprocess.run(command, stderr=write, cwd=tmp_path, env=environment)
    os.close(write)
    assert done.returncode == 0


def test_a_script_whose_name_looks_like_an_option_is_run(tmp_path, place):
    tmp_path.joinpath("-x.py").write_text("import sys; print(sys.argv)")
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT), "TMPDIR": str(place)}
    command = [sys.executable, "-m", "stx_patch", "run", "--quiet", "--", "-x.py", "-m"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.stdout, done.stderr) == ("['./-x.py', '-m']\n", "")


def test_only_a_long_filter_needs_a_folder_for_temporary_files(path, tmp_path, monkeypatch, capsys):
    def fail():
        raise FileNotFoundError(2, "No usable temporary directory found")

    environments = []
    monkeypatch.setattr("tempfile.gettempdir", fail)
    monkeypatch.setattr("os.execve", lambda *given: environments.append(given[2]))
    _cli.main(["run", "--layers", "3:5", str(path)])
    assert len(environments) == 1, capsys.readouterr().err
    names = tmp_path / "names"
    names.write_text("\n".join(f"of.another.model.{i}" for i in range(5000)))
    assert _cli.main(["run", "--names-from", str(names), str(path)]) == 2
    assert "set TMPDIR" in capsys.readouterr().err and len(environments) == 1


def test_children_without_such_a_folder_load_and_leave_nothing(path, tmp_path, call):
    code = """
        import json, os, subprocess, sys
        settings = json.loads(os.environ["STX_PATCH_RUN"])
        environment = {**os.environ, "STX_PATCH_RUN": json.dumps({**settings, "folder": ""})}
        child = f"from safetensors.numpy import load_file; print(len(load_file({sys.argv[1]!r})))"
        subprocess.run([sys.executable, "-c", child], env=environment, check=True)
        """
    before = sorted(tmp_path.iterdir())
    done = call(code, path, options=[])
    assert done.stdout == f"{LAYERS + 1}\n" and told(done)[0] == ""
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "program.py"])


def test_other_interpreters_of_a_process_show_no_table(path, call):
    code = """
        import sys
        try:
            import _interpreters as interpreters
        except ImportError:
            import _xxsubinterpreters as interpreters
        number = interpreters.create()
        script = "import stx_patch._run_report as r; assert not r._said; r.follow(r)"
        assert interpreters.run_string(number, script) is None
        interpreters.destroy(number)
        """
    assert told(call(code, path, options=[]))[0] == ""


@pytest.mark.parametrize("code", ["sys.stdout = None", "sys.stdout.close()", "del sys.stdout"])
def test_the_table_comes_without_a_stdout(code, call):
    said, table = told(call(f"import sys; {code}", options=[]))
    assert said == "" and table.startswith("program.py: ")


def test_the_table_goes_where_the_program_has_put_stderr(call):
    code = """
        import atexit, io, sys
        sys.stderr = io.StringIO()
        before, write = sys.stderr, sys.stdout.write
        sys.stderr.write = lambda text: write(f"to mine: {text}")
        """
    assert "to mine: \nstx-patch run " in call(code, options=[]).stdout


# --- what is loaded, and told of ---

NUMPY = """
import sys
from safetensors.numpy import load_file
if __name__ == "__main__":
    print(len(load_file(sys.argv[1])))
"""


def test_the_table_and_the_counters(path, tmp_path, call):
    done = call(NUMPY, path, options=["--json", "told.json", "--quiet"])
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{LAYERS + 1}\n", "")
    counters = json.loads(tmp_path.joinpath("told.json").read_text())
    assert counters["program"] == ["program.py", str(path)] and counters["seconds"] > 0
    (process,) = counters["processes"]
    assert process["stats"]["fallbacks"] == {"framework np": 1}
    table = told(call(NUMPY, path, options=[]))[1]
    assert "went to stock: framework np (1 call)\n" in table
    assert table.endswith(
        "bounded by: safetensors itself, which served everything: framework np (1 call)\n"
    )


def test_a_json_that_cannot_be_written_after_all_changes_nothing_else(tmp_path, call):
    tmp_path.joinpath("gone").mkdir()
    code = "import os, sys; os.rmdir('gone'); sys.exit(5)"
    done = call(code, options=["--json", "gone/x", "--quiet"])
    assert done.returncode == 5
    assert done.stderr == f"stx-patch: error: {tmp_path}/gone/x: No such file or directory\n"


def test_what_is_to_be_written_into_may_be_there_already(path, tmp_path, call):
    for name in ("told.json", "trace.json"):
        tmp_path.joinpath(name).write_text("older")
    done = call(NUMPY, path, options=["--json", "told.json", "--trace", "trace.json", "--quiet"])
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(tmp_path.joinpath("told.json").read_text())["processes"]


@pytest.mark.parametrize("option", ["--json", "--trace"])
def test_a_file_that_may_not_be_written_is_refused(option, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.delattr("os.execve")
    tmp_path.joinpath("program.py").touch()
    for name in ("there", "new"):
        tmp_path.joinpath("there").touch()
        file = tmp_path / name
        assert _cli.main(["run", option, str(file), str(tmp_path / "program.py")]) == 2
        assert f"cannot write {option} {file}: " in capsys.readouterr().err


EVERYWHERE = """
import multiprocessing
import os
import subprocess
import sys

def load(path):
    from safetensors import safe_open
    with safe_open(path, "pt") as file:
        for name in file.keys():
            file.get_tensor(name)
        print(len(file.keys()), flush=True)

if __name__ == "__main__":
    path = sys.argv[1]
    for method in ("spawn", "fork", "forkserver")[: int(sys.argv[2])]:
        worker = multiprocessing.get_context(method).Process(target=load, args=(path,))
        worker.start()
        worker.join()
    code = f"from safetensors import safe_open; print(len(safe_open({path!r}, 'np').keys()))"
    subprocess.run([sys.executable, "-c", code])
    load(path)
    if os.fork() == 0:
        load(path)
        sys.exit(9)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_children_are_patched_with_the_filter_and_have_a_line_each(path, tmp_path, call):
    """Spawned, forked, started anew, and forked by hand: none shows a table of its own."""
    done = call(EVERYWHERE, path, 1, options=["--layers", "3:5", "--json", "told.json"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"] * 4 + ["9"]
    said, table = told(done)
    assert said == ""
    rows = [line.split() for line in table.splitlines()[2:-2]]
    assert [row[1:][:3] for row in rows] == [
        ["program", "1", "2/0"],
        ["SpawnProcess-1", "1", "2/0"],
        ["-c", "0", "0/0"],
        ["program.py", "1", "2/0"],
    ]
    assert "went to stock: framework np (1 call)" in table
    processes = json.loads(tmp_path.joinpath("told.json").read_text())["processes"]
    assert [one["stats"]["keys_kept"] for one in processes] == [2, 2, 0, 2]
    assert all(one["stats"]["bytes_read"] >= 0 for one in processes)
    assert len({one["pid"] for one in processes}) == 4


def test_children_that_multiprocessing_forks_have_a_line_with_their_own_counters(path, call):
    code = """
        import multiprocessing, sys
        from safetensors.numpy import load_file
        def load(path, times):
            for _ in range(times):
                load_file(path)
        if __name__ == "__main__":
            load(sys.argv[1], 1)
            for times, method in ((2, "fork"), (3, "forkserver")):
                context = multiprocessing.get_context(method)
                worker = context.Process(target=load, args=(sys.argv[1], times))
                worker.start()
                worker.join()
        """
    done = call(code, path, options=["--json", "/dev/stdout", "--quiet"])
    assert done.stderr == ""
    processes = json.loads(done.stdout)["processes"]
    assert [(one["name"], one["stats"]["fallbacks"]) for one in processes] == [
        ("", {"framework np": 1}),
        ("ForkProcess-1", {"framework np": 2}),
        ("ForkServerProcess-2", {"framework np": 3}),
    ]


ABRUPT = """
import multiprocessing, os, signal, sys

def load(path, how):
    from safetensors.torch import load_file
    if how != "none":
        load_file(path)
    if how == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    os._exit(0)

if __name__ == "__main__":
    path, method, how = sys.argv[1:]
    if method == "by hand":
        if os.fork() == 0:
            load(path, how)
        os.wait()
    else:
        worker = multiprocessing.get_context(method).Process(target=load, args=(path, how))
        worker.start()
        worker.join()
"""
LAST_WORD = r"1 process ended without a last word, or goes on: \d+ (\S+)\n"


@pytest.mark.parametrize("how", ["term", "exit"])
@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver", "by hand"])
def test_a_child_that_ends_without_pythons_exit_is_told_of(method, how, path, tmp_path, call):
    done = call(ABRUPT, path, method, how, options=["--json", "told.json"])
    said, table = told(done)
    assert (done.returncode, said) == (0, "")
    title, _, rest = table.partition("\n")
    assert title.endswith("s, the program itself opened no safetensors file through stx_patch")
    name = re.match(LAST_WORD, rest)[1]
    names = {"spawn": "SpawnProcess-1", "fork": "ForkProcess-1", "by hand": "program.py"}
    assert name == names.get(method, "ForkServerProcess-1")
    assert rest.endswith("\nbounded by: what is not known\n") and rest.count("\n") == 2
    counters = json.loads(tmp_path.joinpath("told.json").read_text())
    assert [(one["name"], one["final"]) for one in counters["processes"]] == [
        ("", True),
        (name, False),
    ]


def test_what_cannot_be_read_of_a_child_costs_no_table(path, call):
    code = """
        import json, os, subprocess, sys
        from pathlib import Path
        code = f"from safetensors.numpy import load_file; load_file({sys.argv[1]!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
        folder = Path(json.loads(os.environ["STX_PATCH_RUN"])["folder"])
        folder.joinpath("1-1.json").write_text("{")
        folder.joinpath("1-2.json").write_bytes(b"\\xff")
        folder.joinpath("1-3.json").symlink_to("missing")
        """
    said, table = told(call(code, path, options=[]))
    assert said == "" and "went to stock: framework np (1 call)" in table


def test_a_child_that_ended_so_and_opened_nothing_is_not(path, call):
    table = told(call(ABRUPT, path, "fork", "none", options=[]))[1]
    assert table.endswith(" s, no safetensors file was opened through stx_patch\n")


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_the_workers_of_a_pool_are_told_of(method, path, call):
    """The pool may end them by SIGTERM, or they end by themselves just before."""
    code = """
        import multiprocessing, sys
        def load(path):
            import stx_patch
            stx_patch.patch("lm_*")  # the program's own
            from safetensors import safe_open
            with safe_open(path, "pt") as file:
                return file.keys()
        if __name__ == "__main__":
            with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
                print(pool.map(load, sys.argv[1:2] * 8))
        """
    done = call(code, path, method, options=[])
    said, table = told(done)
    assert (done.stdout, said) == (f"{[['lm_head']] * 8}\n", "")
    assert "PoolWorker-" in table and "no safetensors file was opened" not in table


def test_a_child_says_later_what_it_has_loaded_meanwhile(path, tmp_path, call):
    """At most once a second. A patch of the program's own changes nothing."""
    code = """
        import os, sys, time
        from safetensors.numpy import load_file
        from stx_patch import patch, patched
        def load(times):
            for _ in range(times):
                load_file(sys.argv[1])
        load(1)
        if os.fork() == 0:
            now_s, passed_s = time.monotonic(), 0
            time.monotonic = lambda: now_s + passed_s
            load(2)
            passed_s = 60
            patch("lm*")
            with patched("lm*"):
                load(3)
            os._exit(0)
        os.wait()
        """
    table = told(call(code, path, options=["--json", "told.json"]))[1]
    processes = json.loads(tmp_path.joinpath("told.json").read_text())["processes"]
    assert [one["final"] for one in processes] == [True, False]
    assert [one["stats"]["fallbacks"] for one in processes] == [
        {"framework np": 1},
        {"framework np": 2},
    ]
    assert "program.py" in table.splitlines()[3]
    assert re.search(LAST_WORD, table)[1] == "program.py"
    assert table.endswith(", as far as is known\n")


def test_a_forked_child_that_uses_its_parents_file_has_a_line(path, call):
    code = """
        import os, sys
        from safetensors import safe_open
        file = safe_open(sys.argv[1], "pt")
        if os.fork() == 0:
            file.get_tensor("lm_head")
            sys.argv.clear()
            sys.exit()
        os.wait()
        """
    said, table = told(call(code, path, options=[]))
    assert said == ""
    rows = [line.split()[:4] for line in table.splitlines()[2:4]]
    assert rows[0] == ["the", "program", "1", "0/0"] and rows[1][1:] == ["python", "0", "1/0"]
    assert "last word" not in table


def test_a_filter_that_keeps_nothing_is_told_of(path, call):
    code = "import sys; from safetensors.torch import load_file; print(load_file(sys.argv[1]))"
    done = call(code, path, options=["--prefix", "nope"])
    assert done.stdout == "{}\n"
    assert told(done)[1].endswith(
        f"\nthe filter kept nothing of {LAYERS + 1} tensors in 1 file\n"
        "bounded by: nothing: no tensor was kept\n"
    )
    assert "kept nothing" not in told(call(code, path, options=["--prefix", "lm_head"]))[1]


def test_a_spawned_worker_that_imports_transformers_first_is_native(path, call):
    code = """
        import multiprocessing, sys
        def work(path):
            import transformers.modeling_utils
            with transformers.modeling_utils.safe_open(path, "pt") as file:
                file.get_tensor("lm_head")
        if __name__ == "__main__":
            worker = multiprocessing.get_context("spawn").Process(target=work, args=sys.argv[1:])
            worker.start()
            worker.join()
        """
    said, table = told(call(code, path, options=[]))
    assert said == ""
    rows = table.splitlines()
    assert rows[2].split()[:4] == ["the", "program", "0", "0/0"]
    assert rows[3].split()[1:4] == ["SpawnProcess-1", "1", "1/0"]
    assert len(rows) == 5 and re.search(r"bounded by: nothing.*\(process \d+\)$", rows[4])


@pytest.mark.parametrize("count", [2, 5000], ids=["variable", "file"])
def test_names_reach_children_however_many_there_are(count, path, tmp_path, place, call):
    """More than a variable can hold are in a file."""
    names = tmp_path / "names"
    names.write_text("\n".join(["lm_head", *(f"of.another.model.{i}" for i in range(count))]))
    code = """
        import subprocess, sys
        if len(sys.argv) == 2:
            subprocess.run([sys.executable, __file__, sys.argv[1], "child"], check=True)
        from safetensors.numpy import load_file
        print(*load_file(sys.argv[1]))
        """
    done = call(code, path, options=["--names-from", names, "--quiet"])
    assert (done.stdout, done.stderr) == ("lm_head\nlm_head\n", "")
    assert len(take_filters(place)) == (count == 5000)


def test_a_child_that_goes_on_after_the_program_still_has_a_long_filter(
    path, tmp_path, place, call
):
    names = tmp_path / "names"
    names.write_text("\n".join(["lm_head", *(f"of.another.model.{i}" for i in range(5000))]))
    code = """
        import os, subprocess, sys
        child = (
            "import sys; sys.stdin.read(); from safetensors.numpy import load_file; "
            "print(*load_file(sys.argv[1]))"
        )
        subprocess.Popen([sys.executable, "-c", child, sys.argv[1]], stdin=os.pipe()[0])
        """
    done = call(code, path, options=["--names-from", names, "--quiet"])
    assert (done.stdout, done.stderr) == ("lm_head\n", "")
    assert len(take_filters(place)) == 1


def test_a_long_filter_is_taken_away_when_the_program_cannot_be_started(
    path, tmp_path, place, monkeypatch, capsys
):
    names = tmp_path / "names"
    names.write_text("\n".join(f"of.another.model.{i}" for i in range(5000)))
    seen = []

    def refuse(*_):
        seen.extend(place.glob("stx*/filter"))
        raise OSError(7, "Argument list too long")

    monkeypatch.setattr("tempfile.tempdir", str(place))
    monkeypatch.setattr("os.execve", refuse)
    assert _cli.main(["run", "--names-from", str(names), str(path)]) == 2
    assert "Argument list too long" in capsys.readouterr().err
    assert len(seen) == 1 and list(place.iterdir()) == []


def test_options_and_a_trace_are_variables_of_the_program(tmp_path, call):
    code = """
        import os
        print(*(os.environ.get("STX_PATCH" + name) for name in (
            "", "_ENGINE", "_READ_AHEAD", "_INFLIGHT_BYTES", "_DIRECT_IO", "_STAGING_BYTES",
            "_TRACE", "_FILTER")))
        """
    given = ["--engine", "threads", "--read-ahead", "1MiB", "--inflight-bytes", "8M"]
    given += ["--direct-io", "off", "--staging-bytes", "1G"]
    done = call(
        code,
        options=[*given, "--trace", "t.json", "--quiet"],
        env={"STX_PATCH_ENGINE": "uring", "STX_PATCH_FILTER": "a*"},
    )
    trace = tmp_path / "t.json"
    assert done.stdout == f"1 threads 1MiB 8M off 1G {trace} a*\n"


# --- the sentence ---

SENTENCES = [
    (
        {"opens": 3},
        "nothing: no tensor was asked for in 3 files",
    ),
    (
        {"opens": 2, "tensors_native": 5, "files_warm": 2, "seconds": {"header": 0.2, "wrap": 0.1}},
        "nothing: what was kept was in the page cache; 0.200 of 0.300 s in stx_patch went into "
        "opening 2 files",
    ),
    (
        {"opens": 3, "tensors_native": 5, "files_warm": 1, "files_cold": 2, "seconds": {"wrap": 1}},
        "the disk: 2 of 3 files not in the page cache, read beside the program, whose waiting is "
        "not in these counters; 1.000 of 1.000 s in stx_patch went into making 5 tensors",
    ),
    (
        {"opens": 1, "tensors_native": 1, "files_unknown": 1, "seconds": {"plan": 0.5}},
        "what is not known: of 1 of 1 file the system does not tell what the page cache had; "
        "0.500 of 0.500 s in stx_patch went into planning reads",
    ),
    (
        {"opens": 1, "tensors_native": 1, "seconds": {"wrap": 0.5}},
        "nothing that was counted; 0.500 of 0.500 s in stx_patch went into making 1 tensor",
    ),
    (
        {"opens": 1, "tensors_native": 9, "keys_kept": 9, "keys_skipped": 2,
         "seconds": {"filter": 3.0, "wrap": 1.0}},
        "the filter, 3.000 of 4.000 s, which was asked about 11 names",
    ),
    (
        {"opens": 1, "tensors_native": 9, "bytes_read": 3 * 10**9, "loads_direct": 1,
         "files_cold": 1, "seconds": {"read": 2.0, "wrap": 1.0}},
        "waiting for reads, 2.000 of 3.000 s: at most 1.5 GB/s, 3.0 GB past the page cache",
    ),
    (
        {"opens": 1, "tensors_native": 9, "bytes_read": 10**9, "loads_direct": 1,
         "loads_buffered": 1, "seconds": {"read": 1.0}},
        "waiting for reads, 1.000 of 1.000 s: at most 1 GB/s, 1.0 GB past the page cache and "
        "through it",
    ),
    (
        {"opens": 1, "tensors_native": 1, "tensors_stock": 2, "fallbacks": {"tensor": 2}},
        "safetensors itself, which made 2 tensors: tensor (2 calls)",
    ),
]  # fmt: skip


@pytest.mark.parametrize("counters, sentence", SENTENCES)
def test_the_sentence_says_what_the_counters_show(counters, sentence):
    assert _run_table.what_bounded(Stats(**counters)) == sentence


def test_the_sentence_is_about_the_process_that_took_longest():
    def report(number, **counters):
        stats = dataclasses.asdict(Stats(**counters))
        return {"pid": number, "name": "x", "final": True, "stats": stats}

    idle = report(1)
    slow = report(3, opens=1, fallbacks={"torch missing": 1})
    quick = report(2, opens=1)
    for reports in ([idle, quick, slow], [idle, slow, quick]):
        reports[1]["stats"]["seconds"] = {"header": 1.0}
        text = _run_table.make_text(["p.py"], 1.0, reports)
        assert text.endswith(f"(process {reports[1]['pid']})")
        reports[1]["stats"]["seconds"] = {}


def test_odd_names_cannot_drive_a_terminal():
    stats = dataclasses.asdict(Stats(opens=1, fallbacks={"framework \x1b[2J": 1}))
    for final in (True, False):
        report = {"pid": 1, "name": "\x07", "final": final, "stats": stats}
        text = _run_table.make_text(["a\x1b.py"], 1.0, [report])
        assert text.replace("\n", "").isprintable()
