"""Proves: the benchmark of loads to a CUDA device runs all of its programs and tables, here on the
CPU; it checks what is loaded, survives sides that fail or hang, and judges by what was measured."""

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
NAMES = ("processes", "cuda_child", "cuda_table", "bench_cuda", "runner")
PEERS = {"stock prefetch", "fastsafetensors", "instanttensor"}


def is_of_the_benchmarks(module):
    return Path(getattr(module, "__file__", None) or "/").is_relative_to(BENCHMARKS)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The modules of the benchmark, for sizes that are nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setenv("STX_BENCH_FACTOR", "0.001")
        patch.setenv("STX_BENCH_DATA", str(tmp_path_factory.mktemp("data")))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name in [name for name, module in sys.modules.items() if is_of_the_benchmarks(module)]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("bench-cuda")


def run(data, *arguments, **variables):
    """What bench_cuda.py answers: status, output, complaints."""
    tiny = {"STX_BENCH_FACTOR": "0.001", "STX_BENCH_DATA": str(data), **variables}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench_cuda.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **tiny},
    )
    return done.returncode, done.stdout, done.stderr


# --- all of it ---


def test_every_program_and_table_runs(data):
    results, empty = data / "all.json", data / "empty"
    empty.mkdir()
    status, printed, complaints = run(
        data, "--dry-run", "--rounds", "1", "--output", str(results),
        "--next-safetensors", str(empty), "--case", "20,000", "pretrained", "convert: warm",
    )  # fmt: skip
    assert status == 0, complaints
    found = json.loads(results.read_text())
    assert [row["kind"] for row in found["rows"]] == ["load", "load", "pretrained", "convert"]
    for row in found["rows"]:
        assert f"\n{row['case']}  (" in printed
        for label, side in row["sides"].items():
            if label not in PEERS:
                assert side["runs"] == 1 and side["error"] is None, (label, side)
                assert f"\n  {label:30} " in printed
            elif not side["runs"]:
                assert f"\n  {label:30} failed: {side['error']}\n" in printed
        ours, stock = row["sides"]["ours"], row["sides"][row["sides"]["ours"]["pair"]]
        assert ours["kept_bytes"] == stock["kept_bytes"] and ours["ratio_read"]["median"] > 0
    assert "12 goals; " in printed

    status, shown, _ = run(data, "--show", str(results))
    assert status == 1, "goals that are not reached"
    assert shown.strip() == printed[printed.index("\ndevice ") :].strip()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "bench_cuda: no CUDA device (torch "),
        (["--case", "nothing"], "bench_cuda: no case has one of these words in its name"),
        (["--show", "missing.json"], "bench_cuda: missing.json has no results: "),
    ],
)
def test_nothing_to_measure_is_one_line_and_status_2(data, arguments, line):
    status, printed, complaints = run(data, *arguments, CUDA_VISIBLE_DEVICES="")
    assert (status, printed) == (2, "")
    assert complaints.startswith(line) and complaints.count("\n") == 1


# --- what is loaded ---


def test_a_digest_sees_every_bit_and_every_place(bench, monkeypatch):
    monkeypatch.setattr(bench.cuda_child, "PIECE", 8)
    digest = bench.cuda_child.digest
    tensor = torch.arange(100, dtype=torch.float32)
    swapped, across, changed = tensor.clone(), tensor.clone(), tensor.clone()
    swapped[[3, 4]] = tensor[[4, 3]]
    across[[3, 51]] = tensor[[51, 3]]
    changed.view(torch.int32)[77] ^= 1
    found = [tuple(digest(each)) for each in (tensor, swapped, across, changed, -tensor)]
    assert len(set(found)) == len(found)
    assert digest(tensor.reshape(10, 10)) == digest(tensor)
    assert digest(torch.zeros(0)) == [0, 0]


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"a": torch.ones(3)}, "1 tensors missing, such as b"),
        ({"a": torch.ones(3), "b": torch.ones(3)}, "loaded other bits than the CPU: b"),
        ({"a": torch.ones(3), "b": torch.zeros(3, device="meta")}, "b is on meta"),
    ],
)
def test_other_tensors_than_the_cpus_are_refused(bench, tensors, reason):
    right = {"a": torch.ones(3), "b": torch.zeros(3)}
    expected = {name: bench.cuda_child.digest(tensor) for name, tensor in right.items()}
    bench.cuda_child.compare(right, expected, "cpu")
    with pytest.raises(SystemExit, match=reason):
        bench.cuda_child.compare(tensors, expected, "cpu")


# --- processes ---


def start(bench, code):
    return bench.processes.start([sys.executable, "-c", code])


def test_a_process_that_hangs_is_killed(bench):
    child = start(bench, "import signal; signal.pause()")
    with pytest.raises(bench.processes.TimedOut, match="took more than 0 s"):
        bench.processes.watch(child, 0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", "killed by signal 11"),
        ("print('loading'); raise ValueError('no such thing')", "ValueError: no such thing"),
        ("print('loading')", "ended without an answer"),
        ("import os; os.close(1); raise SystemExit('closed')", "closed"),
    ],
)
def test_what_goes_wrong_is_a_line(bench, code, reason):
    with pytest.raises(bench.runner.Failed, match=reason):
        bench.processes.watch(start(bench, code), 60)


def test_memory_of_the_device_counts_from_when_a_process_is_ready(bench):
    code = "print('noise'); print('ready', flush=True); input(); print('{\"read_s\": 1}')"
    free = itertools.chain([100, 40], itertools.repeat(70))
    measured = bench.processes.watch(start(bench, code), 60, lambda: next(free))
    assert measured == {"read_s": 1, "device_bytes": 60}


def test_memory_of_a_device_that_nobody_knows(bench):
    memory = bench.processes.DeviceMemory()
    memory.find("no-such-device")
    assert memory.free_bytes() is None


# --- rounds ---


@pytest.fixture
def make_session(bench, tmp_path):
    options = {
        "dry_run": True, "size": 1 << 20, "case": None, "spawn": False, "budget_s": 1000,
        "rounds": 9, "next_safetensors": None, "device": "cuda:0",
        "output": str(tmp_path / "results.json"),
    }  # fmt: skip

    def make(**others):
        return bench.bench_cuda.Session(argparse.Namespace(**{**options, **others}))

    return make


@pytest.fixture
def session(make_session):
    return make_session()


def test_sides_that_fail_do_not_stop_the_others(bench, session, monkeypatch, capsys):
    asked = []

    def sample(case, side, is_first):
        asked.append((case.name, side.label, is_first))
        if side.label == "instanttensor":
            raise bench.processes.TimedOut("took more than 90 s")
        if side.label == "fastsafetensors":
            raise bench.runner.Failed("ImportError: none")
        if side.label == "stock" and len(asked) < 3:
            raise bench.runner.Failed("not cold")
        return {"kept_bytes": 8, "return_s": 1.0, "read_s": 2.0}

    monkeypatch.setattr(session, "sample", sample)
    monkeypatch.setattr(session, "write", lambda: None)
    session.measure()
    cold, warm = (
        next(row for row in session.rows() if row["case"].startswith(cache))
        for cache in ("cold 20", "warm 20")
    )
    counts = {label: side["runs"] for label, side in cold["sides"].items()}
    assert counts.pop("fastsafetensors") == counts.pop("instanttensor") == 0
    assert set(counts.values()) == {9}
    first = next(row for row in session.rows() if row["case"].startswith("cold 32"))
    assert first["sides"]["stock"]["runs"] == 8 and first["sides"]["stock"]["failures"] == 1
    tried = [case for case, label, _ in asked if label == "instanttensor"]
    assert len(tried) == 1, "what hung is not asked again, in no case"
    tried = [case for case, label, _ in asked if label == "fastsafetensors"]
    assert len(tried) == 2 * 4
    checked = [case for case, label, is_first in asked if label == "ours" and is_first]
    assert len(checked) == len(session.cases) == len(set(checked))
    for row in (first, warm):
        bench.cuda_table.show(row)
    printed = capsys.readouterr().out
    assert "stock: 8 rounds; 1 more failed, at last: not cold" in printed
    assert "failed: took more than 90 s" in printed


def test_python_anew_for_each_sample(session, tmp_path):
    session.spawns = True
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))
    found = session.run({"do": "cache", "path": str(path), "cache": "warm"})
    assert found == {"cache_proven": True}


def test_a_budget_that_is_over_ends_with_what_is_there(bench, session, capsys):
    session.options.budget_s = 0
    session.measure()
    assert bench.bench_cuda.show_all({}, session.rows()) == 22
    printed = capsys.readouterr().out
    assert printed.count("no round was done") == 4 * 11 + 3 * 2 and "22 goals; ?: 22" in printed


def test_rounds_are_added_to_results_of_the_same_machine(bench, make_session):
    sessions = [make_session(rounds=rounds) for rounds in (1, 3, 3)]
    for session, cores in zip(sessions, (2, 2, 4), strict=True):
        session.about = {"cores": cores}
        session.sample = lambda case, side, is_first: {
            "kept_bytes": 8, "return_s": 1.0, "read_s": 2.0, "is_first": is_first,
        }  # fmt: skip
    first, second, elsewhere = sessions
    first.measure()
    second.resume()
    second.measure()
    for case in second.cases:
        runs = second.results[case.name]["runs"]["ours"]
        assert [(number, run["is_first"]) for number, run in runs.items()] == [
            (0, True), (1, False), (2, False),
        ]  # fmt: skip
    with pytest.raises(bench.bench_cuda.CannotMeasure, match="with another cores"):
        elsewhere.resume()


def test_a_round_that_does_not_fit_is_not_begun(session):
    case = session.cases[0]
    assert session.fits(case)
    session.results[case.name]["last_s"] = session.options.budget_s
    assert not session.fits(case)


# --- goals ---


def made_up(kind="load", **sides):
    """A case of these sides: (seconds to return, seconds to use, bytes of device memory)."""
    runs = {
        label.replace("_", " "): {
            number: {
                "kept_bytes": 1000,
                "return_s": back_s * (1 + number / 100),
                "read_s": used_s * (1 + number / 100),
                "allocated_bytes": size_bytes,
                "reserved_bytes": size_bytes,
            }
            for number in range(9)
        }
        for label, (back_s, used_s, size_bytes) in sides.items()
    }
    runs |= {"limit: pinned copy": runs.pop("copy")} if "copy" in runs else {}
    runs |= {"limit: direct reads": runs.pop("reads")} if "reads" in runs else {}
    pairs = {label: "stock" if label != "stock" else None for label in runs}
    about = {"name": "made up", "kind": kind, "seconds": 1.0, "errors": {}, "failures": {}}
    return {**about, "pairs": pairs, "runs": runs}


def verdicts(bench, case):
    return {
        judged["what"]: (judged["verdict"], judged["value"])
        for judged in bench.cuda_table.judge(bench.cuda_table.summarize(case))
    }


def test_goals_that_are_reached(bench):
    mib = 1 << 20
    case = made_up(
        stock=(8, 8, 5 * mib), ours=(2, 2, 69 * mib), stock_prefetch=(3, 3, 0),
        fastsafetensors=(5, 5, 0), copy=(1, 1, 0), reads=(1.9, 1.9, 0),
    )  # fmt: skip
    assert verdicts(bench, case) == {
        "limit": ("PASS", pytest.approx(0.95)),
        "stock": ("PASS", pytest.approx(4)),
        "rival": ("PASS", pytest.approx(1.5)),
        "memory": ("PASS", 64 * mib),
    }


def test_goals_that_are_short(bench):
    mib = 1 << 20
    case = made_up(
        stock=(5, 5, 5 * mib), ours=(2, 2, 70 * mib), stock_prefetch=(2.2, 2.2, 0),
        copy=(1.7, 1.7, 0), reads=(1, 1, 0),
    )  # fmt: skip
    assert verdicts(bench, case) == {
        "limit": ("short", pytest.approx(0.85)),
        "stock": ("short", pytest.approx(2.5)),
        "rival": ("short", pytest.approx(1.1)),
        "memory": ("short", 65 * mib),
    }


def test_goals_that_were_not_measured(bench):
    case = made_up(stock=(5, 5, None), ours=(2, 2, None), copy=(1, 1, 0))
    found = verdicts(bench, case)
    assert {what: found[what] for what in ("limit", "rival", "memory")} == {
        what: ("?", None) for what in ("limit", "rival", "memory")
    }


def test_an_interval_that_reaches_a_goal_is_said_to(bench):
    case = made_up("convert", stock=(3.8, 3.8, 0), ours=(2, 2, 0))
    for number in (6, 7, 8):
        case["runs"]["stock"][number]["read_s"] = 9
    assert verdicts(bench, case)["stock"] == ("PASS by interval", pytest.approx(1.9))


def test_ratios_are_of_runs_of_one_round(bench):
    ratio = bench.cuda_table.ratio_of({0: 8.0, 1: 9.0, 3: 1.0}, {1: 3.0, 2: 1.0, 3: 1.0})
    assert ratio["rounds"] == [3.0, 1.0] and ratio["median"] == 2.0
