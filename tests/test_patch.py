"""What is in force, for whom and until when, and that what patch() installs looks like stock's:
its class, its functions, their pickles and signatures."""

import contextlib
import copy
import functools
import inspect
import os
import pickle
import pydoc
import random
import sys
import threading
import typing
import unittest.mock

import pytest
import safetensors
import safetensors.torch
import torch
from patch_helpers import (
    STOCK,
    homes_are_ours,
    homes_are_stock,
    leaves_stock,  # noqa: F401
    run_python,
)

import stx_patch

NAMES = {"a", "b", "c"}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "three.safetensors"
    tensors = {name: torch.full((2, 3), float(ord(name))) for name in NAMES}
    safetensors.torch.save_file(tensors, path, metadata={"made": "here"})
    return path


def kept(path):
    """The names that exist for whoever loads now, through a patched name."""
    return set(safetensors.torch.load_file(path))


# --- what is in force ---


def test_patch_and_unpatch(path):
    assert not stx_patch.is_patched()
    assert stx_patch.patch() is None
    assert stx_patch.is_patched() and homes_are_ours()
    assert kept(path) == NAMES
    assert stx_patch.unpatch() is None
    assert not stx_patch.is_patched() and homes_are_stock()
    assert kept(path) == NAMES


def test_patch_again_replaces_the_filter(path):
    stx_patch.patch({"a"})
    assert kept(path) == {"a"}
    stx_patch.patch(["b", "c"])
    assert kept(path) == {"b", "c"}
    stx_patch.patch()
    assert kept(path) == NAMES
    stx_patch.unpatch()
    assert homes_are_stock()


def test_unpatch_is_harmless_without_a_patch(path):
    stx_patch.unpatch()
    stx_patch.patch({"a"})
    stx_patch.unpatch()
    stx_patch.unpatch()
    assert homes_are_stock() and kept(path) == NAMES
    with stx_patch.patched({"b"}):
        stx_patch.unpatch()
        assert kept(path) == {"b"} and stx_patch.is_patched()


def test_the_youngest_block_counts_whole(path):
    with stx_patch.patched({"a", "b"}):
        with stx_patch.patched({"b", "c"}):
            assert kept(path) == {"b", "c"}
            with stx_patch.patched():
                assert kept(path) == NAMES
            assert kept(path) == {"b", "c"}
        assert kept(path) == {"a", "b"} and homes_are_ours()
    assert kept(path) == NAMES and homes_are_stock()


def test_a_block_inside_a_patch(path):
    stx_patch.patch({"a"})
    with stx_patch.patched({"b"}):
        assert kept(path) == {"b"}
    assert kept(path) == {"a"} and stx_patch.is_patched()
    stx_patch.unpatch()


def test_a_patch_inside_a_block(path):
    with stx_patch.patched({"b"}):
        stx_patch.patch({"a"})
        assert kept(path) == {"a"}
        stx_patch.unpatch()
        assert kept(path) == {"b"}
        stx_patch.patch({"c"})
    assert kept(path) == {"c"} and homes_are_ours()
    stx_patch.unpatch()
    assert homes_are_stock()


def test_patch_again_inside_a_block_does_not_come_before_the_block(path):
    stx_patch.patch({"a"})
    with stx_patch.patched({"b"}):
        stx_patch.patch({"c"})  # replaces the entry where it sits
        assert kept(path) == {"b"}
    assert kept(path) == {"c"}
    stx_patch.unpatch()


def test_unpatch_inside_a_block(path):
    stx_patch.patch({"a"})
    with stx_patch.patched({"b"}):
        stx_patch.unpatch()
        assert kept(path) == {"b"}
    assert homes_are_stock() and kept(path) == NAMES


def test_blocks_that_end_out_of_order(path):
    first, second, third = (stx_patch.patched({name}) for name in "abc")
    first.__enter__()
    second.__enter__()
    third.__enter__()
    second.__exit__(None, None, None)
    assert kept(path) == {"c"}
    third.__exit__(None, None, None)
    assert kept(path) == {"a"}
    first.__exit__(None, None, None)
    assert kept(path) == NAMES and homes_are_stock()


@pytest.mark.parametrize("first_to_leave", ["older", "younger"])
def test_overlapping_blocks_of_two_threads(path, first_to_leave):
    class Holder(threading.Thread):
        def __init__(self, name):
            super().__init__(daemon=True)
            self.kept = name
            self.entered = threading.Event()
            self.leave = threading.Event()

        def run(self):
            with stx_patch.patched({self.kept}):
                self.entered.set()
                self.leave.wait(30)

        def enter(self):
            self.start()
            assert self.entered.wait(30)

        def end(self):
            self.leave.set()
            self.join(30)
            assert not self.is_alive()

    older, younger = Holder("a"), Holder("b")
    older.enter()
    assert kept(path) == {"a"}  # the process has it, not the thread
    younger.enter()
    assert kept(path) == {"b"}
    if first_to_leave == "older":
        older.end()
        assert kept(path) == {"b"}
        younger.end()
    else:
        younger.end()
        assert kept(path) == {"a"}
        older.end()
    assert not stx_patch.is_patched() and homes_are_stock()
    assert kept(path) == NAMES


def test_many_threads_in_and_out_of_blocks_leave_nothing(path):
    errors = []

    def work(seed):
        choose = random.Random(seed)
        try:
            for _ in range(20):
                with contextlib.ExitStack() as stack:
                    for _ in range(choose.randrange(1, 4)):
                        stack.enter_context(stx_patch.patched(choose.choice([None, {"a"}, ["b*"]])))
                    assert kept(path) in (NAMES, {"a"}, {"b"})
                    assert stx_patch.is_patched()
        except BaseException as error:  # also what a thread must not swallow
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert not stx_patch.is_patched() and homes_are_stock()
    assert kept(path) == NAMES


def test_another_thread_loads_under_the_block_of_this_one(path):
    seen = []
    with stx_patch.patched({"a"}):
        thread = threading.Thread(target=lambda: seen.append(kept(path)))
        thread.start()
        thread.join(30)
    assert seen == [{"a"}]


def test_loads_go_on_while_blocks_come_and_go(path):
    """Threads that load through patched names see one state or the other, and no error."""
    errors, seen, stop = [], set(), threading.Event()

    def work():
        try:
            while not stop.is_set():
                seen.add(frozenset(kept(path)))
                handle = safetensors.safe_open(path, "pt")
                names = handle.keys()
                assert set(names) in (NAMES, {"a"}, {"b"}) and isinstance(handle, type(handle))
                assert [handle.get_tensor(name).shape for name in names] == [(2, 3)] * len(names)
        except BaseException as error:  # also what a thread must not swallow
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(40):
        with stx_patch.patched({"a"}):
            if i % 3 == 0:
                stx_patch.patch({"b"})
        stx_patch.unpatch()
    stop.set()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert seen <= {frozenset(NAMES), frozenset({"a"}), frozenset({"b"})}
    assert homes_are_stock()


def test_a_forked_child_is_patched_and_unpatches_alone(path):
    with stx_patch.patched({"a"}):
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                assert kept(path) == {"a"}
                stx_patch.patch({"b"})
                assert kept(path) == {"b"}
                code = 0
            os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert kept(path) == {"a"}


class Unusual(BaseException):
    pass


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("v"), KeyboardInterrupt(), StopIteration(3), GeneratorExit(), SystemExit(2)),
        *(Unusual("u"), RuntimeError("generator raised StopIteration")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_ends_the_block_and_comes_out_as_it_is(path, error):
    with pytest.raises(type(error)) as caught, stx_patch.patched({"a"}) as report:
        kept(path)
        raise error
    assert caught.value is error
    assert not stx_patch.is_patched() and homes_are_stock()
    assert report.opens == 1
    kept(path)
    assert report.opens == 1


def test_a_mistaken_filter_changes_nothing(path):
    stx_patch.patch({"a"})
    for mistake in (3, b"a", ["a", 3], {1}, 1.5, iter("a"), object()):
        with pytest.raises(TypeError):
            stx_patch.patch(mistake)
        assert kept(path) == {"a"}
        with pytest.raises(TypeError), stx_patch.patched(mistake):
            raise AssertionError("not reached")
        assert kept(path) == {"a"}
    stx_patch.unpatch()
    with pytest.raises(TypeError):
        stx_patch.patch(3)
    assert not stx_patch.is_patched() and homes_are_stock()


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="no_such_option"):
        stx_patch.patch(no_such_option=1)
    with pytest.raises(TypeError, match="no_such_option"), stx_patch.patched(no_such_option=1):
        raise AssertionError("not reached")
    assert not stx_patch.is_patched() and homes_are_stock()


def test_patched_decorates_a_function(path):
    @stx_patch.patched({"a"})
    def load():
        return kept(path)

    assert load() == {"a"} and load() == {"a"}
    assert homes_are_stock() and kept(path) == NAMES


def test_an_abandoned_block_ends(path):
    block = stx_patch.patched({"a"})
    block.__enter__()
    assert kept(path) == {"a"}
    del block
    assert not stx_patch.is_patched() and homes_are_stock()


def test_a_filter_may_patch_and_load_itself(path):
    calls = []

    def keep(name):
        calls.append(str(name))
        with stx_patch.patched({"b"}):
            assert kept(path) == {"b"}
        with stx_patch.patched():
            assert set(stx_patch.load_file(path)) == NAMES
        return name != "c"

    with stx_patch.patched(keep):
        assert kept(path) == {"a", "b"}
    assert calls == ["a", "b", "c"]


def test_what_is_in_force_when_a_file_is_opened_holds_for_the_handle(path):
    before = safetensors.safe_open(path, "pt")
    with stx_patch.patched({"a"}):
        inside = safetensors.safe_open(path, "pt")
        numpy_inside = safetensors.safe_open(path, "np")
        assert set(before.keys()) == NAMES
        with stx_patch.patched({"b"}):
            assert inside.keys() == ["a"]
            assert safetensors.safe_open(path, "pt").keys() == ["b"]
    after = safetensors.safe_open(path, "pt")
    for handle in (inside, numpy_inside):
        assert handle.keys() == ["a"] and list(handle.get_tensors()) == ["a"]
        with pytest.raises(safetensors.SafetensorError, match="left out"):
            handle.get_tensor("b")
    assert set(after.keys()) == NAMES and type(after) is STOCK.safe_open
    tensor = inside.get_tensor("a")
    del inside
    assert tensor[0, 0] == ord("a")


# --- how what is installed looks ---


@pytest.fixture(params=["ours", "kept"])
def opener(request):
    """Our class as installed, and as a module that kept it sees it after unpatch."""
    with stx_patch.patched():
        opener = safetensors.safe_open
        if request.param == "ours":
            yield opener
    if request.param == "kept":
        yield opener


def make_handles(path):
    """A handle of each kind a stand-in can return."""
    with stx_patch.patched():
        native = safetensors.safe_open(path, "pt")
        stock = safetensors.safe_open(path, "np")
    with stx_patch.patched(NAMES):
        filtered = safetensors.safe_open(path, "np")
    assert type(stock) is STOCK.safe_open
    assert len({type(native), type(stock), type(filtered)}) == 3
    return {"native": native, "filtered": filtered, "stock": stock}


kinds = pytest.mark.parametrize("kind", ["native", "filtered", "stock"])


def error_of(call, *arguments, **keywords):
    """(class, text) of what a call raises."""
    with pytest.raises(BaseException) as caught:
        call(*arguments, **keywords)
    return type(caught.value), str(caught.value)


def test_the_class_looks_like_stock(opener):
    stock = STOCK.safe_open
    assert opener is not stock and isinstance(opener, type) and inspect.isclass(opener)
    assert repr(opener) == repr(stock) and str(opener) == str(stock)
    assert f"{opener}" == f"{stock}"
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(opener, attribute) == getattr(stock, attribute), attribute
    assert inspect.getdoc(opener) == inspect.getdoc(stock)
    assert dir(opener) == dir(stock)
    assert inspect.signature(opener) == inspect.signature(stock)
    assert str(inspect.signature(opener)) == str(inspect.signature(stock))
    assert hash(opener) == hash(opener) and opener == opener and opener != stock
    assert {opener: 1}[opener] == 1
    assert callable(opener) and not inspect.isfunction(opener)


def test_its_methods_look_like_stock(opener):
    stock = STOCK.safe_open
    public = [name for name in vars(stock) if callable(vars(stock)[name]) and name[:2] != "__"]
    assert {"keys", "offset_keys", "get_tensor", "get_slice", "metadata"} <= set(public)
    for name in [*public, "__enter__", "__exit__"]:
        ours, theirs = getattr(opener, name), getattr(stock, name)
        assert repr(ours) == repr(theirs)
        assert (ours.__name__, ours.__qualname__) == (theirs.__name__, theirs.__qualname__)
        assert ours.__doc__ == theirs.__doc__
        assert str(inspect.signature(ours)) == str(inspect.signature(theirs)), name
        assert callable(ours) and not isinstance(ours, property)
    assert not hasattr(opener, "get_dtype")  # ours alone: only handles have it
    assert not hasattr(opener, "no_such_method")


def test_the_class_serves_annotations_and_dispatch(path, opener):
    @functools.singledispatch
    def describe(value):
        return "other"

    describe.register(opener, lambda value: "handle")

    def annotated(handle: opener | None) -> typing.Optional[opener]:  # noqa: UP045
        return handle

    assert typing.get_type_hints(annotated)["handle"] == opener | None
    for handle in make_handles(path).values():
        assert describe(handle) == "handle"
        match handle:
            case opener():
                pass
            case _:
                raise AssertionError("no match")
    assert describe(3) == "other"


def test_tools_that_look_at_classes_find_what_they_find_in_stock(opener):
    stock = STOCK.safe_open
    assert pydoc.render_doc(opener).count("safe_open") > 0
    ours, theirs = dict(inspect.getmembers(opener)), dict(inspect.getmembers(stock))
    assert {name for name in theirs if name[0] != "_"} <= ours.keys()
    for look in (inspect.getsource, inspect.getfile, inspect.getsourcelines):
        assert error_of(look, opener)[0] is error_of(look, stock)[0]
    assert inspect.getmodule(opener) is inspect.getmodule(stock)
    assert inspect.isbuiltin(opener) == inspect.isbuiltin(stock)
    assert unittest.mock.create_autospec(opener)("file", "pt").keys is not None
    with unittest.mock.patch.object(safetensors, "safe_open", autospec=True) as replaced:
        safetensors.safe_open("file", "pt")
        replaced.assert_called_once_with("file", "pt")
    assert error_of(lambda: opener.no_such_name)[0] is AttributeError


@kinds
def test_instances_of_the_class(path, opener, kind):
    handle = make_handles(path)[kind]
    assert isinstance(handle, opener) and issubclass(type(handle), opener)
    assert isinstance(handle, (int, opener))


def test_what_is_no_instance(opener):
    assert issubclass(opener, opener) and issubclass(STOCK.safe_open, opener)
    assert not isinstance(3, opener) and not isinstance(opener, opener)
    assert not issubclass(int, opener) and not issubclass(object, opener)
    assert error_of(issubclass, 3, opener) == error_of(issubclass, 3, STOCK.safe_open)


def test_a_bare_instance_cannot_be_made(path, opener):
    """Neither class can be made without its arguments; stock's `__new__` takes them."""
    assert error_of(lambda: opener.__new__(opener)) == error_of(
        lambda: STOCK.safe_open.__new__(STOCK.safe_open)
    )
    assert set(opener.__new__(opener, path, "pt").keys()) == NAMES


@kinds
def test_methods_work_unbound(path, opener, kind):
    handle = make_handles(path)[kind]
    assert opener.keys(handle) == handle.keys() == sorted(NAMES)
    assert opener.offset_keys(handle) == handle.offset_keys()
    assert opener.metadata(handle) == {"made": "here"}
    assert opener.get_tensor(handle, "a").tolist() == [[97.0] * 3] * 2
    assert opener.get_tensor(handle, name="a").tolist() == [[97.0] * 3] * 2
    assert sorted(opener.get_tensors(handle)) == sorted(NAMES)
    assert opener.get_slice(handle, "a").get_shape() == [2, 3]
    assert list(map(opener.keys, [handle])) == [sorted(NAMES)]
    assert opener.__enter__(handle) is handle
    assert opener.__exit__(handle, None, None, None) is None
    with pytest.raises(safetensors.SafetensorError, match="File is closed"):
        opener.keys(handle)


@kinds
def test_unbound_methods_refuse_as_stock_does(path, opener, kind):
    handle = make_handles(path)[kind]
    stock_handle = STOCK.safe_open(path, "pt")
    stock = STOCK.safe_open
    for self in (3, None, "text", opener):
        expected = error_of(stock.keys, self)
        assert error_of(opener.keys, self) == expected and expected[0] is TypeError
        assert error_of(opener.get_tensor, self, "a") == error_of(stock.get_tensor, self, "a")
    assert error_of(opener.keys) == error_of(stock.keys)
    exact = 2 if kind != "filtered" else 1  # the text of Python's own errors names the class
    assert error_of(opener.keys, handle, 1)[:exact] == error_of(stock.keys, stock_handle, 1)[:exact]
    for arguments in [(3,), (b"a",), ([],), ({},), ("missing",)]:
        expected = unnamed(error_of(stock.get_tensor, stock_handle, *arguments))
        assert unnamed(error_of(opener.get_tensor, handle, *arguments)) == expected
        assert unnamed(error_of(handle.get_tensor, *arguments)) == expected
        assert unnamed(error_of(handle.get_slice, *arguments)) == expected
    for arguments in [(), ("a", "b")]:
        expected = error_of(stock.get_tensor, stock_handle, *arguments)
        assert error_of(opener.get_tensor, handle, *arguments)[:exact] == expected[:exact]


def unnamed(error):
    """Without the words that name the argument: safetensors 0.9 has dropped them."""
    return error[0], error[1].removeprefix("argument 'name': ")


@kinds
def test_handles_look_like_stock(path, kind):
    handle = make_handles(path)[kind]
    stock = STOCK.safe_open(path, "pt")
    exact = 2 if kind != "filtered" else 1  # the text of Python's own errors names the class
    for use in (
        len,
        iter,
        lambda handle: handle["a"],
        lambda handle: "a" in handle,
        lambda handle: handle(),
        lambda handle: handle < handle,
        lambda handle: setattr(handle, "no_such", 1),
    ):
        assert error_of(use, handle)[:exact] == error_of(use, stock)[:exact]
    assert error_of(lambda: handle.no_such) == error_of(lambda: stock.no_such)
    assert hash(handle) == hash(handle) and handle == handle and len({handle, stock}) == 2
    assert bool(handle) and not callable(handle)
    assert hasattr(handle, "keys") and not hasattr(handle, "close")
    # copyreg leaves __slotnames__ on a class that somebody tried to pickle.
    assert all(hasattr(handle, name) for name in set(dir(stock)) - {"__slotnames__"})
    if kind == "native":
        assert repr(handle).startswith("<builtins.safe_open object at 0x")
        assert type(handle).__name__ == "safe_open"


@kinds
def test_handles_refuse_pickle_and_copy_as_stock_does(path, kind):
    handle = make_handles(path)[kind]
    stock = STOCK.safe_open(path, "pt")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        expected = error_of(pickle.dumps, stock, protocol)
        assert expected[0] is TypeError
        found = error_of(pickle.dumps, handle, protocol)
        assert found == expected or (protocol < 2 and found[0] is TypeError)
    assert error_of(copy.copy, handle) == error_of(copy.copy, stock)
    assert error_of(copy.deepcopy, handle) == error_of(copy.deepcopy, stock)
    assert error_of(copy.deepcopy, {"handle": [handle]}) == error_of(copy.deepcopy, stock)


def test_subclassing_is_refused_as_stock_does(opener):
    def subclass(base):
        class Derived(base):
            pass

    expected = error_of(subclass, STOCK.safe_open)
    assert expected == (TypeError, "type 'builtins.safe_open' is not an acceptable base type")
    assert error_of(subclass, opener) == expected
    assert error_of(lambda: type("Derived", (opener,), {})) == expected
    assert error_of(lambda: type("Derived", (dict, opener), {})) == expected


def test_wrong_arguments_are_refused_as_stock_does(path, opener):
    stock = STOCK.safe_open
    for arguments, keywords in [
        ((), {}),
        ((path,), {}),
        ((), {"framework": "pt"}),
        ((path, "pt", "cpu", "mmap"), {}),
        ((path, "pt"), {"no_such_keyword": 1}),
        ((path, "pt"), {"filename": path}),
        ((path, "pt", "cpu"), {"device": "cpu"}),
        ((path, "no such framework"), {}),
        ((path, 3), {}),
        ((3, "pt"), {}),
        ((os.fsencode(path), "pt"), {}),
        ((path, "pt", "no such device"), {}),
        ((path, "pt"), {"backend": "no such backend"}),
        ((path, "pt"), {"backend": None}),
        ((str(path) + ".missing", "pt"), {}),
        ((path.parent, "pt"), {}),
    ]:
        expected = error_of(stock, *arguments, **keywords)
        assert error_of(opener, *arguments, **keywords) == expected


def test_functions_look_like_stock():
    with stx_patch.patched():
        for name in ("load_file", "load"):
            ours, stock = getattr(safetensors.torch, name), getattr(STOCK, name)
            assert ours is not stock
            assert inspect.isfunction(ours)
            for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
                assert getattr(ours, attribute) == getattr(stock, attribute), attribute
            assert ours.__annotations__ == stock.__annotations__
            assert typing.get_type_hints(ours) == typing.get_type_hints(stock)
            assert inspect.signature(ours) == inspect.signature(stock)
            assert not hasattr(ours, "__wrapped__")
            assert inspect.unwrap(ours) is ours
            assert pydoc.render_doc(ours) == pydoc.render_doc(stock)
            assert repr(ours).startswith(f"<function {name} at 0x")


def test_functions_refuse_wrong_arguments_as_stock_does(path):
    data = path.read_bytes()
    with stx_patch.patched():
        ours, stock = safetensors.torch.load_file, STOCK.load_file
        for arguments, keywords in [
            ((), {}),
            ((path, "cpu", "mmap"), {}),
            ((path,), {"no_such_keyword": 1}),
            ((path,), {"filename": path}),
            ((3,), {}),
            ((path, torch.device("cpu")), {}),
            ((path,), {"backend": "no such backend"}),
            ((str(path) + ".missing",), {}),
        ]:
            assert error_of(ours, *arguments, **keywords) == error_of(stock, *arguments, **keywords)
        ours, stock = safetensors.torch.load, STOCK.load
        for arguments, keywords in [
            ((), {}),
            ((data, 1), {}),
            ((data,), {"no_such_keyword": 1}),
            ((bytearray(data),), {}),
            (("text",), {}),
            ((b"",), {}),
            ((data[:-1],), {}),
        ]:
            assert error_of(ours, *arguments, **keywords) == error_of(stock, *arguments, **keywords)
        assert set(ours(data=data)) == NAMES


def test_the_public_class_is_a_class_of_its_own(path):
    opener = stx_patch.safe_open
    assert isinstance(opener, type) and opener is stx_patch.safe_open
    assert opener is not STOCK.safe_open
    assert repr(opener) == "<class 'stx_patch.safe_open'>"
    parameters = inspect.signature(opener).parameters
    assert list(parameters)[:4] == ["filename", "framework", "device", "backend"]
    assert {"tensor_filter", "include_keys", "strict_filter"} <= parameters.keys()
    for handle in (*make_handles(path).values(), opener(path)):
        assert isinstance(handle, opener) and opener.keys(handle) == sorted(NAMES)
    with pytest.raises(TypeError, match="not an acceptable base type"):
        type("Derived", (opener,), {})
    assert pickle.loads(pickle.dumps(opener)) is opener
    assert error_of(opener) == error_of(STOCK.safe_open, framework="pt")
    assert stx_patch.load_file.__module__.startswith("stx_patch")
    assert pickle.loads(pickle.dumps(stx_patch.load_file)) is stx_patch.load_file


# --- pickles ---


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_class_pickles_as_a_look_up(opener, protocol):
    data = pickle.dumps({"opener": opener}, protocol)
    assert b"stx_patch" not in data
    assert pickle.loads(data)["opener"] is safetensors.safe_open
    assert copy.copy(opener) is opener and copy.deepcopy([opener])[0] is opener


def test_the_pickled_class_is_stock_after_unpatch_and_without_us():
    with stx_patch.patched():
        data = pickle.dumps(safetensors.safe_open)
        functions = pickle.dumps((safetensors.torch.load_file, safetensors.torch.load))
        assert b"stx_patch" not in functions
        assert pickle.loads(functions) == (safetensors.torch.load_file, safetensors.torch.load)
    assert pickle.loads(data) is STOCK.safe_open
    assert pickle.loads(functions) == (STOCK.load_file, STOCK.load)
    run_python(
        """
        import pickle, sys
        sys.modules["stx_patch"] = None
        opener = pickle.loads(bytes.fromhex(sys.argv[1]))
        import safetensors
        assert opener is safetensors.safe_open
        """,
        data.hex(),
    )


def test_what_users_pickle_with_it(path):
    """Functions and partials that hold a patched name, as process pools send them."""
    with stx_patch.patched({"a"}):
        partial = functools.partial(safetensors.torch.load_file, device="cpu")
        copied = pickle.loads(pickle.dumps(partial))
        assert copied.func is safetensors.torch.load_file and set(copied(path)) == {"a"}
        data = pickle.dumps(partial)
    assert pickle.loads(data).func is STOCK.load_file


def test_what_kept_our_class_can_pickle_it(path):
    with stx_patch.patched():
        held = {"opener": safetensors.safe_open}
    assert held["opener"] is not STOCK.safe_open
    assert pickle.loads(pickle.dumps(held)) == {"opener": STOCK.safe_open}


def test_exceptions_that_crossed_us_pickle(path):
    with stx_patch.patched({"a"}):
        with pytest.raises(safetensors.SafetensorError) as caught:
            safetensors.safe_open(path, "pt").get_tensor("b")
    copied = pickle.loads(pickle.dumps(caught.value))
    assert type(copied) is safetensors.SafetensorError and str(copied) == str(caught.value)


def test_the_package_has_what_it_says():
    for name in stx_patch.__all__:
        assert getattr(stx_patch, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = stx_patch.no_such_name
    assert issubclass(stx_patch.StxFilterWarning, stx_patch.StxWarning)
    assert issubclass(stx_patch.StxWarning, UserWarning)
    assert "stx_patch.auto" not in sys.modules


@kinds
def test_a_handle_is_of_stocks_class_for_everybody(path, kind):
    """Also for who holds stock's own class, and after the patch is gone."""
    handle = make_handles(path)[kind]
    assert isinstance(handle, STOCK.safe_open)
    assert handle.__class__ is STOCK.safe_open
    assert isinstance(handle, safetensors.safe_open)
