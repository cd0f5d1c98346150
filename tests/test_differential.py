"""Proves: on thousands of damaged files we answer as stock, and the fuzzer that says so can fail.

The long runs are by hand: `python tests/fuzz/differential.py --seeds 1 2 3 4 5 --cases 10000`.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import cases, damage, differential
from helpers import STOCK, in_a_child

import stx_patch
from stx_patch import _C, _safe_open

CASES = 1000
VALID = '"dtype":"U8","shape":[1],"data_offsets":[0,1]'


def unread(value):
    """A file of one entry with a field that nobody reads."""
    return cases.pack(f'{{"a":{{{VALID},"x":{value}}}}}'.encode(), b"x")


# Every file about which stock and we ever differed, as small as it gets.
FOUND = {
    # stock computes these numbers as infinite; rounded correctly they are the largest double
    "the largest double": unread("1.7976931348623158e308"),
    "the largest double, negative": unread("-1.7976931348623158e308"),
    "the largest double, many digits": unread("1.797693134862315807e308"),
    "the largest double, an integer": unread("17976931348623158e292"),
    "the largest double, zeros in front": unread("0.00017976931348623158e312"),
    "the largest double, nested": unread('[{"y":17976931348623158e292}]'),
}


@pytest.fixture
def place():
    with differential.workplace() as place:
        yield place


def judge(place, content):
    return differential.judge(place.put(cases.Case(0, 0, (), content)))


# --- we are as stock ---


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_no_differences(place, seed):
    totals = differential.run(seed, CASES, place)
    assert not totals.reports, "\n".join(totals.reports)
    print(totals.line())
    # And the seed was worth its time: files of both kinds, most of the good ones native.
    assert 0.3 * CASES < totals.accepted < 0.7 * CASES
    assert totals.left_to_stock < 0.2 * totals.accepted
    assert totals.opens >= 2 * (totals.accepted - totals.left_to_stock)


@pytest.mark.parametrize("name", FOUND)
def test_found_once_and_mended(place, name):
    assert judge(place, FOUND[name]).differences == {}


# --- the cases ---


def test_a_case_is_a_function_of_its_numbers():
    """Also in another process, whose strings hash otherwise."""
    # By the path itself: PYTHONSAFEPATH, where it is set, keeps the current folder off it.
    script = f"import sys, zlib; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script += "from fuzz.damage import make_case\n"
    script += "print([zlib.crc32(make_case(7, i).content) for i in range(300)])"
    made = []
    for hash_seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made.append(json.loads(done.stdout))
    assert made[0] == made[1]
    assert len(set(made[0])) > 280


def test_every_kind_of_damage_occurs():
    made = [damage.make_case(1, index) for index in range(1500)]
    kinds = {kind for case in made for kind in case.damages}
    assert kinds == {*damage.DRAFT, *damage.TEXT, *damage.FILE}
    assert {len(case.damages) for case in made} == {0, 1, 2, 3}
    assert sum(len(case.content) > 2 * cases.PIECE_BYTES for case in made) > 10
    assert sum(len(case.content) < cases.PREFIX.size for case in made) > 3


def test_a_case_that_ends_the_process_is_known(place):
    case = damage.make_case(3, 14)

    def work():
        place.put(case)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(work) == -signal.SIGKILL
    assert place.position.read_bytes().split() == [b"3", b"14"]
    assert Path(place.path).read_bytes() == case.content


# --- the fuzzer can fail ---

GOOD = cases.pack(
    b'{"__metadata__":{"k":"v"},"a":{"dtype":"I16","shape":[2],"data_offsets":[0,4]},'
    b'"b":{"dtype":"U8","shape":[3,1],"data_offsets":[4,7]}}',
    b"abcdefg",
)
BAD = GOOD + b"x"


class Liar:
    """A native handle that answers one question wrongly."""

    def __init__(self, handle, method, lie):
        self._handle, self._method, self._lie = handle, method, lie

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._handle.__exit__(*exc_info)

    def __getattr__(self, name):
        method = getattr(self._handle, name)
        if name != self._method:
            return method
        return lambda *arguments: self._lie(method(*arguments))


def flipped(tensor):
    tensor = tensor.clone()
    tensor.flatten()[-1] ^= 1
    return tensor


class OtherShape:
    def __init__(self, slice_):
        self._slice = slice_

    def get_shape(self):
        return [*self._slice.get_shape(), 1]

    def get_dtype(self):
        return self._slice.get_dtype()

    def __getitem__(self, index):
        return self._slice[index]


LIES = {
    "keys": ("keys", lambda names: names[::-1]),
    "offset_keys": ("offset_keys", lambda names: names[::-1]),
    "metadata": ("metadata", lambda pairs: {**pairs, "k": "w"}),
    "get_tensor: 'b'": ("get_tensor", flipped),
    "get_shape": ("get_slice", OtherShape),
    "load_file: 'b'": ("get_tensors", lambda found: {**found, "b": flipped(found["b"])}),
    "load_file: order": ("get_tensors", lambda found: dict(reversed(found.items()))),
}


@pytest.mark.parametrize("question", LIES)
def test_a_wrong_answer_is_reported(place, monkeypatch, question):
    real = _C.open
    assert judge(place, GOOD).differences == {}
    monkeypatch.setattr(_C, "open", lambda *given: Liar(real(*given), *LIES[question]))
    assert question in judge(place, GOOD).differences


def open_damaged(real, good):
    """A core that takes every file: instead of those it refuses, it shows another."""

    def open_any(path, *arguments):
        try:
            return real(path, *arguments)
        except _C.Refused:
            return real(str(good), *arguments)

    return open_any


def test_a_damaged_file_that_is_accepted_is_reported(place, monkeypatch, tmp_path, capsys):
    good = tmp_path / "good"
    good.write_bytes(GOOD)
    assert judge(place, BAD).differences == {}
    monkeypatch.setattr(_C, "open", open_damaged(_C.open, good))
    monkeypatch.setattr(differential, "TRIES_MAX", 60)
    found = judge(place, BAD).differences
    assert {"the core", "open", "load_file"} <= found.keys()
    totals = differential.run(1, 50, place)
    assert len(totals.reports) > 10
    assert totals.reports[0].startswith("seed 1 index ")
    assert differential.main(["--seeds", "1", "--cases", "50"]) == 1
    assert f", {len(totals.reports)} differences, " in capsys.readouterr().out


def test_another_error_is_reported(place, monkeypatch):
    def refuse(request):
        raise STOCK.SafetensorError("not stock's words")

    monkeypatch.setattr(_safe_open, "_open_stock", refuse)
    assert judge(place, BAD).differences.keys() == {"open"}


def test_what_is_left_to_stock_is_counted(place, monkeypatch):
    def refuse(path, *arguments):
        raise _C.Refused("unsupported", "all", 0)

    monkeypatch.setattr(_C, "open", refuse)
    totals = differential.run(1, 60, place)
    assert not totals.reports
    assert totals.accepted == totals.left_to_stock > 10
    assert totals.opens == 0


def test_stock_is_asked_itself(place):
    """Or we would be compared with ourselves."""
    path = place.put(cases.Case(0, 0, (), GOOD))
    before = stx_patch.stats()
    answers = differential.ask_stock(path)
    assert answers["open"] == "accepted" and "load_file: 'b'" in answers
    assert stx_patch.stats() == before
    assert differential.ask_ours(path) == answers
    assert stx_patch.stats().opens == before.opens + 2


def test_chance_of_stock_is_no_difference(place):
    """Two entries of one range: which is the wrong one differs from call to call."""
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    content = cases.pack(f'{{"a":{entry},"b":{entry}}}'.encode(), b"x")
    path = place.put(cases.Case(0, 0, (), content))
    said = {differential.ask_stock(path)["open"] for _ in range(100)}
    assert len(said) == 2
    for _ in range(20):
        assert differential.judge(path).differences == {}


def test_the_order_of_empty_neighbours_is_settled():
    order = [("b", True), ("a", True), ("d", False), ("c", False), ("f", True), ("e", True)]
    assert differential.settled(order) == ["a", "b", "d", "c", "e", "f"]


def test_a_case_again_with_all_its_bytes(capsys):
    assert differential.main(["--one", "1", "3"]) == 0
    assert damage.make_case(1, 3).content.hex() in capsys.readouterr().out
