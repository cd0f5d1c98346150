"""Proves: wrong paths, arguments, devices and uses raise what stock raises, in its words."""

import copy
import enum
import inspect
import operator
import os
import pickle
import resource
import stat
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import STOCK, in_a_child, native, outcome, seen, write_raw

import stx_patch


class PathOf:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        if isinstance(self.path, Exception):
            raise type(self.path)(*self.path.args)  # a new one: newer versions add notes to it
        return self.path


class Text(str):
    """A str of another class."""


class Word(str, enum.Enum):
    VECTOR = "vector"


def same(use):
    """`use` of the patched function answers as of stock's; handles count as equal."""
    found, expected = outcome(use, safetensors.safe_open), outcome(use, STOCK.safe_open)
    if expected[0] == "value":
        assert found[0] == "value", found
    else:
        assert found == expected
    return expected


def check_opens(found, expected):
    """The same class and text, or both open."""
    assert found[0] == expected[0] == "value" or found == expected


# --- paths ---


def linked(folder, target):
    (folder / "link").symlink_to(target)
    return folder / "link"


def piped(folder):
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def socketed(folder):
    os.mknod(folder / "socket", stat.S_IFSOCK | 0o600)
    return folder / "socket"


# Made of a folder and of a good file in it.
PATHS = {
    "missing": lambda folder, file: folder / "missing",
    "missing below": lambda folder, file: folder / "missing" / "file",
    "below a file": lambda folder, file: file / "below",
    "slash behind a file": lambda folder, file: f"{file}/",
    "folder": lambda folder, file: folder,
    "folder as text": lambda folder, file: f"{folder}/",
    "loop": lambda folder, file: linked(folder, "link"),
    "dangling": lambda folder, file: linked(folder, "missing"),
    "link to a folder": lambda folder, file: linked(folder, folder),
    "link": linked,
    "name too long": lambda folder, file: folder / ("n" * 256),
    "path too long": lambda folder, file: f"{folder}/" + "./" * 3000 + "x",
    "socket": lambda folder, file: socketed(folder),
    "empty": lambda folder, file: "",
    "dot": lambda folder, file: Path(),
    "blank": lambda folder, file: " ",
    "NUL": lambda folder, file: "\0",
    "NUL behind": lambda folder, file: f"{file}\0",
    "NUL inside": lambda folder, file: f"{file}\0.x",
    "lone surrogate": lambda folder, file: "missing\ud800",
    "escaped byte": lambda folder, file: f"{folder}/\udcff",
    "URL": lambda folder, file: f"file://{file}",
    "percent": lambda folder, file: f"{folder}/%s%d{{}}",
    "null device": lambda folder, file: "/dev/null",
    "zero device": lambda folder, file: "/dev/zero",
    "file of /proc": lambda folder, file: "/proc/self/status",
    "bytes": lambda folder, file: bytes(file),
    "bytearray": lambda folder, file: bytearray(bytes(file)),
    "int": lambda folder, file: 3,
    "bool": lambda folder, file: True,
    "None": lambda folder, file: None,
    "float": lambda folder, file: 1.5,
    "list": lambda folder, file: [str(file)],
    "dict": lambda folder, file: {},
    "class": lambda folder, file: Path,
    "tensor": lambda folder, file: torch.zeros(1),
    "open file": lambda folder, file: file.open("rb"),
    "path of str": lambda folder, file: PathOf(str(file)),
    "path of str subclass": lambda folder, file: PathOf(Text(file)),
    "path of bytes": lambda folder, file: PathOf(bytes(file)),
    "path of int": lambda folder, file: PathOf(3),
    "path of None": lambda folder, file: PathOf(None),
    "path that raises": lambda folder, file: PathOf(ZeroDivisionError("no path")),
    "path that raises OSError": lambda folder, file: PathOf(FileNotFoundError("no path")),
    "path that raises TypeError": lambda folder, file: PathOf(TypeError("no path")),
    "str subclass": lambda folder, file: Text(file),
    "numpy str": lambda folder, file: np.str_(file),
    "relative": lambda folder, file: os.path.relpath(file),
    "two slashes": lambda folder, file: f"/{file}",
}


# What our own functions take for many files.
MANY_FILES = {"folder", "folder as text", "link to a folder", "dot", "list"}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", PATHS)
def test_paths_as_stock(patched, tmp_path, sample, name):
    path = PATHS[name](tmp_path, sample)
    same(lambda opener: opener(path, "pt"))
    same(lambda opener: opener(filename=path, framework="pt", device="cpu", backend="mmap"))
    same(lambda opener: opener(path, "np"))
    same(lambda opener: opener(path, "pt", backend="pread"))
    expected = outcome(STOCK.load_file, path)
    check_opens(outcome(safetensors.torch.load_file, path), expected)
    check_opens(outcome(safetensors.torch.load_file, filename=path, device="cpu"), expected)
    if name not in MANY_FILES:
        check_opens(outcome(stx_patch.load_file, path), expected)


def test_a_path_that_is_no_utf8(patched, sample):
    odd = os.fsencode(sample.parent) + b"/\xff"
    os.link(sample, odd)
    assert same(lambda opener: opener(os.fsdecode(odd), "pt"))[0] == "error"
    assert same(lambda opener: opener(os.fsdecode(odd), "np"))[0] == "value"


def test_an_odd_name_is_served_natively(patched, sample):
    odd = sample.with_name('a b\n"%s 🦙\\')
    os.rename(sample, odd)
    assert native(odd)
    assert safetensors.safe_open(odd, "pt").get_tensor("vector")[3] == 3


def test_a_pipe_is_stocks(patched, tmp_path):
    """The core does not wait for a writer; that is left to stock, which has one here."""
    pipe = piped(tmp_path)
    assert not native(pipe)
    writer = os.open(pipe, os.O_RDWR)
    try:
        assert same(lambda opener: opener(pipe, "pt"))[0] == "error"
    finally:
        os.close(writer)


def test_text_of_another_class_is_its_own_text(patched, sample):
    """Not what its __str__, __eq__ or __hash__ say, as those of an enum's members do."""
    other = sample.with_name("other")
    safetensors.torch.save_file({"Liar": torch.zeros(1)}, other)

    class Liar(str):
        def __str__(self):
            return str(other)

        __repr__ = __fspath__ = __format__ = __str__

        def __eq__(self, value):
            return False

        def __hash__(self):
            return 7

    path = Liar(sample)
    for opener in (safetensors.safe_open, stx_patch.safe_open, STOCK.safe_open):
        assert len(opener(path, "pt").keys()) == 5
        assert opener(sample, "pt").get_tensor(Liar("vector")).shape == (7,)
        assert opener(sample, "pt").get_tensor(Word.VECTOR).shape == (7,)
    assert len(safetensors.torch.load_file(path)) == len(STOCK.load_file(path)) == 5
    for chosen in ({Word.VECTOR}, [Word.VECTOR], Word.VECTOR, {Word.VECTOR: 1}):
        assert list(stx_patch.load_file(sample, tensor_filter=chosen)) == ["vector"]
    assert list(stx_patch.load_file(sample, include_keys=[Word.VECTOR])) == ["vector"]


# --- what the system refuses ---


def compare_in_a_child(prepare, path):
    """Stock's and our answers in a process that `prepare` has restricted."""

    def work():
        prepare()
        expected = outcome(STOCK.safe_open, path, "pt")
        assert expected[0] == "error", "the system allows it"
        assert outcome(stx_patch.safe_open, path) == expected
        assert outcome(stx_patch.load_file, path) == outcome(STOCK.load_file, path)

    assert in_a_child(work) == 0


def become_nobody():
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_no_permission_as_stock(sample, what):
    (sample if what == "file" else sample.parent).chmod(0)
    try:
        compare_in_a_child(become_nobody, sample)
    finally:
        sample.parent.chmod(0o700)


def test_no_descriptor_left_as_stock(sample):
    def use_up():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        try:
            while True:
                os.dup(0)
        except OSError:
            return

    STOCK.safe_open(sample, "pt"), stx_patch.load_file(sample)  # all imports are done
    compare_in_a_child(use_up, sample)


def test_no_address_space_as_stock(sample, tmp_path):
    """A file larger than what may be mapped."""
    size_bytes = 1 << 40
    large = write_raw(
        tmp_path / "large",
        {"a": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}},
    )
    os.truncate(large, large.stat().st_size + size_bytes)

    def limit():
        used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used_bytes + (1 << 30),) * 2)

    STOCK.safe_open(sample, "pt"), stx_patch.load_file(sample)
    compare_in_a_child(limit, large)


# --- arguments ---

CALLS = {
    "nothing": lambda o, p: o(),
    "no framework": lambda o, p: o(p),
    "no filename": lambda o, p: o(framework="pt"),
    "only a device": lambda o, p: o(device="cpu"),
    "too many": lambda o, p: o(p, "pt", "cpu", "mmap"),
    "far too many": lambda o, p: o(*"abcdefgh"),
    "too many and unknown": lambda o, p: o(p, "pt", "cpu", "mmap", foo=1),
    "unknown keyword": lambda o, p: o(p, "pt", foo=1),
    "unknown keywords": lambda o, p: o(p, "pt", foo=1, bar=2),
    "unknown keyword, no framework": lambda o, p: o(p, foo=1),
    "unknown empty keyword": lambda o, p: o(p, "pt", **{"": 1}),
    "later keyword": lambda o, p: o(p, "pt", prefetch=True),
    "keyword in upper case": lambda o, p: o(p, Framework="pt"),
    "filename twice": lambda o, p: o(p, filename=p, framework="pt"),
    "framework twice": lambda o, p: o(p, "pt", framework="pt"),
    "device twice": lambda o, p: o(p, "pt", "cpu", device="cpu"),
    "all by keyword": lambda o, p: o(framework="pt", filename=p, backend="mmap", device="cpu"),
    "missing file and unknown framework": lambda o, p: o("missing", "zz"),
    "missing file and unknown device": lambda o, p: o("missing", "pt", "zz"),
    "missing file and unknown backend": lambda o, p: o("missing", "pt", backend="zz"),
    "missing file and unknown keyword": lambda o, p: o("missing", "pt", zz=1),
    "all wrong": lambda o, p: o(1, 2, 3, backend=4),
    "wrong device and backend": lambda o, p: o(p, "pt", "zz", backend="zz"),
}
FRAMEWORKS = [
    "pt", "torch", "pytorch", "PT", "Torch", "", " pt", "pt\0", "zz", "np", "numpy", "pt\ud800",
    Text("pt"), np.str_("pt"), Word.VECTOR, b"pt", None, 1, True, [], ["pt"], torch, object,
]  # fmt: skip
BACKENDS = [
    "mmap", "pread", "MMAP", "", "zz", "mmap\0", "io_uring", Text("mmap"), np.str_("mmap"), b"mmap",
    None, 0, True, [],
]  # fmt: skip
DEVICES = [
    "cpu", None, "cuda", "cuda:0", "cuda:x", "cuda:-1", "cuda:0:1", "cuda:", "mps", "mps:0",
    "mps:1", "xpu", "meta", "gpu", "cpu:0", "cpu ", "", "CPU", "cpu\0", 0, 1, -1, 2**70, True,
    False, 1.0, b"cpu", torch.device("cpu"), torch.device("cuda:0"), torch.device("meta"),
    np.int64(0), np.int64(-1), np.bool_(True), np.str_("cpu"), Text("cpu"), Text("zz"), [], (),
    torch.tensor(0), object,
]  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_as_stock(patched, sample, name):
    same(lambda opener: CALLS[name](opener, sample))
    loaders = [safetensors.torch.load_file, STOCK.load_file]
    found, expected = (outcome(CALLS[name], loader, sample) for loader in loaders)
    check_opens(found, expected)


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=ascii)
def test_frameworks_as_stock(patched, sample, framework):
    same(lambda opener: opener(sample, framework))
    same(lambda opener: opener(filename=sample, framework=framework))
    same(lambda opener: opener("missing", framework))


@pytest.mark.parametrize("backend", BACKENDS, ids=ascii)
def test_backends_as_stock(patched, sample, backend):
    same(lambda opener: opener(sample, "pt", backend=backend))
    same(lambda opener: opener(sample, "np", backend=backend))
    same(lambda opener: opener("missing", "pt", backend=backend))
    expected = outcome(STOCK.load_file, sample, backend=backend)
    check_opens(outcome(safetensors.torch.load_file, sample, backend=backend), expected)


@pytest.mark.parametrize("device", DEVICES, ids=ascii)
def test_devices_as_stock(patched, sample, device):
    def load_all(opener):
        handle = opener(sample, framework="pt", device=device)
        return handle.keys(), seen(outcome(handle.get_tensor, "vector"))

    mine, theirs = outcome(load_all, safetensors.safe_open), outcome(load_all, STOCK.safe_open)
    assert mine == theirs
    same(lambda opener: opener(sample, "np", device))
    same(lambda opener: opener("missing", "pt", device))
    expected = outcome(STOCK.load_file, sample, device)
    check_opens(outcome(safetensors.torch.load_file, sample, device), expected)
    check_opens(outcome(stx_patch.load_file, sample, device), expected)


# --- handles and slices ---


def comparable(result):
    """`outcome` without what differs between any two handles."""
    if result[0] == "value" and isinstance(result[1], dict):
        return {name: seen(("value", tensor)) for name, tensor in result[1].items()}
    if result[0] == "value" and type(result[1]).__module__ == "builtins":
        address = f" at {id(result[1]):#x}"
        return "value", str(result[1]).replace(address, "").split(" object at ")[0]
    return seen(result)


VALUES = [
    "vector", Text("vector"), np.str_("vector"), Word.VECTOR, "missing", Text("missing"), "",
    "vector\0", "\ud800", "%s %d {} 🦙", "n" * 2000, b"vector", None, 3, True, 1.5, [], ["vector"],
    {}, (), ..., NotImplemented, slice(1), object, print, np.int64(1), range(3), Path("vector"),
]  # fmt: skip
METHODS = ["keys", "offset_keys", "metadata", "get_tensor", "get_tensors", "get_slice"]
ARGUMENTS = {
    "none": ((), {}),
    "one": (("vector",), {}),
    "two": (("vector", 2), {}),
    "three": (("vector", 2, 3), {}),
    "four": ((1, 2, 3, 4), {}),
    "name": ((), {"name": "vector"}),
    "name and foo": ((), {"name": "vector", "foo": 1}),
    "one and name": (("vector",), {"name": "vector"}),
    "one and foo": (("vector",), {"foo": 1}),
    "wrong one and foo": ((1,), {"foo": 1}),
    "foo": ((), {"foo": 1}),
    "foo and bar": ((), {"foo": 1, "bar": 2}),
    "empty keyword": ((), {"": 1}),
    "self": ((), {"self": 1}),
    "all of exit": ((), {"_exc_type": 1, "_exc_value": 2, "_traceback": 3}),
    "two and the third": ((1, 2), {"_traceback": 3}),
    "three and the third": ((1, 2, 3), {"_traceback": 3}),
    "one and the first": ((1,), {"_exc_type": 3}),
}


@pytest.mark.parametrize("value", VALUES, ids=lambda value: ascii(value)[:30])
def test_names_as_stock(patched, sample, value):
    mine, theirs = safetensors.safe_open(sample, "pt"), STOCK.safe_open(sample, "pt")
    for method in ("get_tensor", "get_slice"):
        for arguments, keywords in (((value,), {}), ((), {"name": value})):
            found, expected = (
                outcome(getattr(handle, method), *arguments, **keywords)
                for handle in (mine, theirs)
            )
            assert comparable(found) == comparable(expected)


@pytest.mark.parametrize("form", ARGUMENTS)
def test_arguments_of_methods_as_stock(patched, sample, form):
    arguments, keywords = ARGUMENTS[form]
    for method in (*METHODS, "__enter__", "__exit__"):
        found, expected = (
            outcome(getattr(opener(sample, "pt"), method), *arguments, **keywords)
            for opener in (safetensors.safe_open, STOCK.safe_open)
        )
        assert comparable(found) == comparable(expected), method
        unbound, of_stock = (
            outcome(getattr(opener, method), opener(sample, "pt"), *arguments, **keywords)
            for opener in (safetensors.safe_open, STOCK.safe_open)
        )
        assert comparable(unbound) == comparable(of_stock), method
    for method in ("get_shape", "get_dtype", "__getitem__"):
        found, expected = (
            outcome(getattr(opener(sample, "pt").get_slice("cube"), method), *arguments, **keywords)
            for opener in (safetensors.safe_open, STOCK.safe_open)
        )
        assert comparable(found) == comparable(expected), method


USES = {
    "attribute": lambda h: h.nothing,
    "private attribute": lambda h: h._nothing,
    "dunder attribute": lambda h: h.__nothing__,
    "empty attribute": lambda h: getattr(h, ""),
    "attribute 1": lambda h: getattr(h, operator.index(1)),
    "set attribute": lambda h: setattr(h, "x", 1),
    "set method": lambda h: setattr(h, "keys", 1),
    "delete method": lambda h: delattr(h, "keys"),
    "set class": lambda h: setattr(h, "__class__", int),
    "iter": lambda h: [len(iter(h)), 1],
    "next": next,
    "len": len,
    "bool": bool,
    "int": int,
    "index by name": lambda h: h["vector"],
    "set item": lambda h: operator.setitem(h, 0, 1),
    "delete item": lambda h: operator.delitem(h, 0),
    "call": lambda h: h(),
    "dict": lambda h: h.__dict__,
    "vars": vars,
    "weakref": weakref.ref,
    "weakref proxy": weakref.proxy,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "reduce": lambda h: type(h.__reduce__()),
    "reduce 0": lambda h: type(h.__reduce_ex__(0)),
    "reduce 2": lambda h: type(h.__reduce_ex__(2)),
    "getstate": lambda h: h.__getstate__() if hasattr(h, "__getstate__") else None,
    "less": lambda h: h < h,
    "equal": lambda h: (h == h, h != h, h == 1, hash(h) == object.__hash__(h)),
    "add": lambda h: h + h,
    "buffer": memoryview,
    "format": lambda h: format(h, "d"),
    "repr": lambda h: (repr(h).split(" at ")[0], str(h).split(" at ")[0]),
    "subclass": lambda h: type("Sub", (type(h),), {}),
    "initialise": lambda h: h.__init__(),
    "initialise with one": lambda h: h.__init__(1),
    "subscript class": lambda h: type(h)[int],
    "names of the class": lambda h: [
        getattr(type(h), name) for name in ("__name__", "__qualname__", "__module__")
    ],
    "bases": lambda h: type(h).__mro__[1:],
    "slots": lambda h: (type(h).__dictoffset__, type(h).__weakrefoffset__),
    "make by object": lambda h: object.__new__(type(h)),
}


@pytest.mark.parametrize("name", [*USES, "in", "same entered", "signature of __exit__"])
def test_uses_of_a_handle_as_stock(patched, sample, name):
    uses = {
        **USES,
        "in": lambda h: "vector" in h,
        "same entered": lambda h: h.__enter__() is h,
        "signature of __exit__": lambda h: [
            str(inspect.signature(getattr(h, method))) for method in (*METHODS, "__exit__")
        ],
    }
    mine = outcome(uses[name], safetensors.safe_open(sample, "pt"))
    assert mine == outcome(uses[name], STOCK.safe_open(sample, "pt"))


@pytest.mark.parametrize("name", [*USES, "make", "make with"])
def test_uses_of_a_slice_as_stock(patched, sample, name):
    uses = {**USES, "make": lambda s: type(s)(), "make with": lambda s: type(s)(1, a=2)}
    mine = outcome(uses[name], safetensors.safe_open(sample, "pt").get_slice("cube"))
    assert mine == outcome(uses[name], STOCK.safe_open(sample, "pt").get_slice("cube"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_is_refused_as_stock_does(patched, sample, protocol):
    mine, theirs = safetensors.safe_open(sample, "pt"), STOCK.safe_open(sample, "pt")
    for get in (lambda h: h, lambda h: [h], lambda h: h.get_slice("cube")):
        found = outcome(pickle.dumps, get(mine), protocol)
        assert found[0] == "error"
        assert found == outcome(pickle.dumps, get(theirs), protocol)


def test_the_patched_class_is_no_base(patched):
    for use in (
        lambda cls: type("Sub", (cls,), {}),
        lambda cls: type("Sub", (cls, dict), {"x": 1}),
    ):
        assert outcome(use, safetensors.safe_open) == outcome(use, STOCK.safe_open)
