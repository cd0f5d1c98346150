"""Every name bound to stock is ours while a patch is in force, wherever and whenever it was bound,
nothing is imported or woken to find it, and stock's own again afterwards."""

import contextlib
import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from patch_helpers import (
    HOMES,
    STOCK,
    homes_are_ours,
    homes_are_stock,
    leaves_stock,  # noqa: F401
    run_python,
    temporary_module,
)

import stx_patch
from stx_patch import _patch

ALIASES = {
    "safe_open": STOCK.safe_open,
    "opener": STOCK.safe_open,
    "safe_load_file": STOCK.load_file,
    "_safe_load_bytes": STOCK.load,
}


@contextlib.contextmanager
def by_patch():
    stx_patch.patch()
    try:
        yield
    finally:
        stx_patch.unpatch()


in_force = pytest.mark.parametrize(
    "in_force", [by_patch, stx_patch.patched], ids=["patch", "patched"]
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "two.safetensors"
    safetensors.torch.save_file({"a": torch.arange(3.0), "b": torch.ones(2, 2)}, path)
    return path


# --- the homes themselves ---


@in_force
def test_every_home_is_ours_inside_and_stock_before_and_after(in_force):
    assert homes_are_stock()
    with in_force():
        assert homes_are_ours()
        inside = {(module.__name__, name): vars(module)[name] for module, name, _ in HOMES}
    assert homes_are_stock()
    # One class is in all three homes of safe_open, as stock's is.
    openers = {inside[key] for key in inside if key[1] == "safe_open"}
    assert len(openers) == 1


def test_the_same_objects_are_installed_each_time():
    with stx_patch.patched():
        first = [vars(module)[name] for module, name, _ in HOMES]
    with stx_patch.patched():
        second = [vars(module)[name] for module, name, _ in HOMES]
    assert all(a is b for a, b in zip(first, second, strict=True))


def test_nothing_but_the_homes_changes():
    modules = [
        safetensors,
        safetensors.torch,
        safetensors.numpy,
        sys.modules["safetensors._safetensors_rust"],
    ]
    before = {module.__name__: dict(vars(module)) for module in modules}
    changed = set()
    with stx_patch.patched():
        for module in modules:
            assert vars(module).keys() == before[module.__name__].keys()
            for name, value in vars(module).items():
                if value is not before[module.__name__][name]:
                    changed.add((module.__name__, name))
    assert changed == {(module.__name__, name) for module, name, _ in HOMES}
    for module in modules:
        assert all(vars(module)[name] is value for name, value in before[module.__name__].items())


def test_the_native_module_of_stock_is_never_touched():
    native = sys.modules["safetensors._safetensors_rust"]
    with stx_patch.patched():
        assert native.safe_open is STOCK.safe_open
        assert vars(stx_patch._stock)["safe_open"] is STOCK.safe_open


def test_safetensors_error_keeps_its_identity(path):
    before = safetensors.SafetensorError
    with stx_patch.patched():
        assert safetensors.SafetensorError is before
        with pytest.raises(before):
            safetensors.safe_open(path, "pt").get_tensor("missing")


# --- names bound earlier ---


@in_force
def test_aliases_of_modules_imported_earlier(in_force, path):
    with temporary_module("made_early", **ALIASES) as module:
        with in_force():
            assert module.safe_open is safetensors.safe_open
            assert module.opener is safetensors.safe_open
            assert module.safe_load_file is safetensors.torch.load_file
            assert module._safe_load_bytes is safetensors.torch.load
            stx_patch.reset_stats()
            assert list(module.opener(path, framework="pt").keys()) == ["a", "b"]
            assert module.safe_load_file(path).keys() == {"a", "b"}
            assert stx_patch.stats().opens == 2
        assert {name: vars(module)[name] for name in ALIASES} == ALIASES


def test_patching_again_finds_what_has_come_since():
    stx_patch.patch()
    with temporary_module("late", held=STOCK.safe_open) as module:
        stx_patch.patch()
        assert module.held is safetensors.safe_open
        stx_patch.unpatch()
        assert module.held is STOCK.safe_open


def test_names_of_the_main_module():
    main = vars(sys.modules["__main__"])
    assert "stx_alias" not in main
    main["stx_alias"] = STOCK.load_file
    try:
        with stx_patch.patched():
            assert main["stx_alias"] is safetensors.torch.load_file
        assert main["stx_alias"] is STOCK.load_file
    finally:
        del main["stx_alias"]


def test_a_module_in_two_places_is_restored():
    module = types.ModuleType("one")
    module.opener = STOCK.safe_open
    with temporary_module("one", module), temporary_module("two", module):
        with stx_patch.patched():
            assert module.opener is safetensors.safe_open
        assert module.opener is STOCK.safe_open


def test_a_module_that_left_sys_modules_is_restored():
    with stx_patch.patched():
        pass
    with temporary_module("leaves", opener=STOCK.safe_open) as module:
        stx_patch.patch()
        assert module.opener is safetensors.safe_open
    stx_patch.unpatch()
    assert module.opener is STOCK.safe_open


def test_a_name_bound_anew_while_patched_is_left_alone():
    def theirs():
        pass

    with temporary_module("busy", **ALIASES) as module:
        with stx_patch.patched():
            module.safe_open = theirs
            module.opener = STOCK.safe_open
            del module.safe_load_file
            module.added = 1
        assert module.safe_open is theirs
        assert module.opener is STOCK.safe_open
        assert not hasattr(module, "safe_load_file")
        assert module._safe_load_bytes is STOCK.load


def test_a_home_bound_anew_while_patched_is_left_alone(monkeypatch):
    def theirs(*arguments, **keywords):
        return STOCK.load_file(*arguments, **keywords)

    with stx_patch.patched():
        safetensors.torch.load_file = theirs
    assert safetensors.torch.load_file is theirs
    # It stays theirs in the next patch too: it is not stock's.
    with stx_patch.patched():
        assert safetensors.torch.load_file is theirs
    assert safetensors.torch.load_file is theirs
    safetensors.torch.load_file = STOCK.load_file


def test_a_name_that_compares_equal_is_not_taken_for_stock():
    class Equal:
        def __eq__(self, other):
            return True

        __hash__ = None

    class Loud:
        def __eq__(self, other):
            raise AssertionError("compared")

        __hash__ = None

    names = {"equal": Equal(), "loud": Loud(), "array": np.zeros(3), "tensor": torch.zeros(3)}
    with temporary_module("look_alikes", **names) as module:
        with stx_patch.patched():
            assert all(vars(module)[name] is value for name, value in names.items())


def test_what_kept_ours_reaches_stock_afterwards(path):
    """Containers, closures and attributes of objects are not looked through: what they hold of ours
    stays ours, and is stock in effect."""
    stx_patch.patch({"a"})
    held = types.SimpleNamespace(
        safe_open=safetensors.safe_open,
        load_file=safetensors.torch.load_file,
        load=safetensors.torch.load,
    )
    assert list(held.load_file(path)) == ["a"]
    stx_patch.unpatch()
    assert held.safe_open is not STOCK.safe_open
    stx_patch.reset_stats()
    handle = held.safe_open(path, framework="pt")
    assert type(handle) is STOCK.safe_open
    assert sorted(held.load_file(path)) == ["a", "b"]
    assert sorted(held.load(path.read_bytes())) == ["a", "b"]
    stats = stx_patch.stats()
    assert (stats.opens, stats.fallbacks) == (0, {})
    with pytest.raises(TypeError, match="tensor_filter"):
        held.safe_open(path, framework="pt", tensor_filter={"a"})
    with pytest.raises(TypeError, match="tensor_filter"):
        held.load_file(path, tensor_filter={"a"})
    with stx_patch.patched({"b"}):
        assert list(held.load_file(path)) == ["b"]
        assert held.safe_open(path, "pt").keys() == ["b"]


def test_a_module_imported_while_patched_binds_ours_and_gets_stock_back(
    path, tmp_path, monkeypatch
):
    (tmp_path / "stx_test_late.py").write_text(
        "from safetensors import safe_open\n"
        "from safetensors.torch import load, load_file as loader\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with stx_patch.patched():
        module = importlib.import_module("stx_test_late")
        try:
            assert module.safe_open is safetensors.safe_open
            assert module.loader is safetensors.torch.load_file
            with stx_patch.patched({"a"}):
                assert list(module.loader(path)) == ["a"]
            assert module.loader is safetensors.torch.load_file  # a block is still in force
            stx_patch.patch()
            stx_patch.unpatch()
            assert module.loader is safetensors.torch.load_file
        except BaseException:
            del sys.modules["stx_test_late"]
            raise
    del sys.modules["stx_test_late"]
    assert module.safe_open is STOCK.safe_open
    assert module.loader is STOCK.load_file and module.load is STOCK.load


def test_a_lazy_module_woken_while_patched_gets_stock_back(path):
    class Late(types.ModuleType):
        def __getattr__(self, name):
            value = getattr(safetensors, name)
            vars(self)[name] = value
            return value

    with temporary_module("late", Late("late")) as module:
        with stx_patch.patched({"a"}):
            assert module.safe_open(path, "pt").keys() == ["a"]
            assert "safe_open" in vars(module)
        assert vars(module)["safe_open"] is STOCK.safe_open


# --- what must not be touched, woken or asked ---


class Sleeping(types.ModuleType):
    """A lazy module: looking at any attribute would import things."""

    def __getattr__(self, name):
        raise AssertionError(f"woken by {name}")


class SleepingDeeply(types.ModuleType):
    """A lazy module that notices even a look at `__dict__`."""

    def __getattribute__(self, name):
        raise AssertionError(f"woken by {name}")

    def __dir__(self):
        raise AssertionError("woken by dir()")


@pytest.mark.parametrize("kind", [Sleeping, SleepingDeeply])
def test_lazy_modules_are_not_woken_and_yet_found(kind):
    module = kind("sleeping")
    namespace = object.__getattribute__(module, "__dict__")
    with temporary_module("sleeping", module, opener=STOCK.safe_open):
        with stx_patch.patched():
            assert namespace["opener"] is safetensors.safe_open
        assert namespace["opener"] is STOCK.safe_open


def test_a_lazy_loader_module_stays_unloaded(tmp_path):
    source = tmp_path / "stx_test_lazy.py"
    source.write_text("loaded = True\nfrom safetensors import safe_open\n")
    spec = importlib.util.spec_from_file_location("stx_test_lazy", source)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    with temporary_module("stx_test_lazy", module):
        spec.loader.exec_module(module)
        lazy_type = object.__getattribute__(module, "__class__")
        with stx_patch.patched():
            pass
        stx_patch.patch()
        stx_patch.unpatch()
        assert object.__getattribute__(module, "__class__") is lazy_type
        assert lazy_type is not types.ModuleType
        assert "loaded" not in object.__getattribute__(module, "__dict__")
        assert module.loaded  # and now it is awake
        assert module.safe_open is STOCK.safe_open


@pytest.mark.parametrize(
    "entry",
    [
        None,
        7,
        "text",
        object(),
        type("Class", (), {"opener": STOCK.safe_open}),
        type("Slotted", (), {"__slots__": ("opener",)})(),
        type("Odd", (), {"__slots__": (), "__dict__": property(lambda self: 1 / 0)})(),
        type("Text", (), {"__slots__": (), "__dict__": property(lambda self: "text")})(),
    ],
    ids=["None", "int", "str", "object", "class", "slots", "raising", "no-dict"],
)
def test_odd_entries_of_sys_modules_do_no_harm(entry):
    with temporary_module("odd", entry):
        with stx_patch.patched():
            assert homes_are_ours()


def test_an_object_that_stands_for_a_module_is_swept():
    class Namespace:
        pass

    stand_in = Namespace()
    stand_in.opener = STOCK.safe_open
    with temporary_module("object_module", stand_in):
        with stx_patch.patched():
            assert stand_in.opener is safetensors.safe_open
        assert stand_in.opener is STOCK.safe_open


def test_an_import_while_sweeping_does_no_harm(monkeypatch):
    """A module that appears while the sweep runs must not break the walk over sys.modules."""

    class Growing(dict):
        def items(self):
            sys.modules.setdefault("stx_grown", types.ModuleType("stx_grown"))
            return super().items()

    module = types.ModuleType("growing")
    module.__dict__["opener"] = STOCK.safe_open
    with temporary_module("growing", module):
        monkeypatch.delitem(sys.modules, "stx_grown", raising=False)
        with stx_patch.patched():
            assert module.opener is safetensors.safe_open
    assert module.opener is STOCK.safe_open


def test_a_failing_installation_leaves_nothing_in_force(monkeypatch):
    def fail(ours):
        raise KeyboardInterrupt

    monkeypatch.setattr(_patch, "_sweep", fail)
    with pytest.raises(KeyboardInterrupt), stx_patch.patched(tensor_filter=[]):
        pass
    assert not stx_patch.is_patched()
    with pytest.raises(KeyboardInterrupt):
        stx_patch.patch(tensor_filter=[])
    assert not stx_patch.is_patched()


# --- homes that are imported later: each in a fresh process ---


def test_import_of_the_package_is_silent_and_imports_nothing():
    run_python(
        """
        import os, sys
        before = set(sys.modules)
        import stx_patch
        import stx_patch.filters
        tops = {name.split(".")[0] for name in set(sys.modules) - before}
        assert not tops & {"torch", "safetensors", "numpy", "transformers"}, tops
        assert len(os.listdir("/proc/self/task")) == 1
        assert not stx_patch.is_patched()
        stx_patch.stats(); stx_patch.reset_stats(); stx_patch.unpatch()
        assert "torch" not in sys.modules and "safetensors" not in sys.modules
        """
    )


def test_patch_before_the_import_imports_nothing_and_leaves_one_hook():
    run_python(
        """
        import sys, stx_patch
        finders = list(sys.meta_path)
        stx_patch.patch()
        stx_patch.patch()
        with stx_patch.patched():
            assert len(sys.meta_path) == len(finders) + 1
        assert stx_patch.is_patched()
        assert "torch" not in sys.modules and "safetensors" not in sys.modules
        stx_patch.unpatch()
        assert sys.meta_path == finders
        stx_patch.unpatch()
        assert not stx_patch.is_patched() and sys.meta_path == finders
        """
    )


# Scenarios in forks of one process, which has imported torch and nothing else.
FORKS = """
import importlib, os, sys, types, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
import torch
import stx_patch

path = sys.argv[1]
failed = []

def fork(scenario):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            scenario()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
            print("^ in", scenario.__name__, file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(child, 0)[1] != 0:
        failed.append(scenario.__name__)

def hooks():
    return [finder for finder in sys.meta_path if type(finder).__module__.startswith("stx_patch")]

def rust():
    return sys.modules["safetensors._safetensors_rust"].safe_open
"""


def run_forks(path, code):
    """Run the functions that `code` defines, each in a fork."""
    call = "\nfor name, scenario in list(globals().items()):\n"
    call += "    if name.startswith('test_'):\n        fork(scenario)\n"
    call += "assert not failed, failed\n"
    run_python(FORKS + code + call, path)


def test_names_imported_after_patch_are_ours(path):
    run_forks(
        path,
        """
def check_all(filtered=True):
    import safetensors, safetensors.torch
    assert safetensors.safe_open is not rust()
    assert safetensors.torch.safe_open is safetensors.safe_open
    assert safetensors.torch.load_file.__code__.co_filename != safetensors.torch.__file__
    assert list(safetensors.torch.load_file(path)) == ["a"]
    assert safetensors.safe_open(path, "pt").keys() == ["a"]
    assert stx_patch.stats().fallbacks == {}
    stx_patch.unpatch()
    assert safetensors.safe_open is rust()
    assert safetensors.torch.load_file.__code__.co_filename == safetensors.torch.__file__
    assert safetensors.torch.load.__code__.co_filename == safetensors.torch.__file__
    assert not hooks()

def test_import_the_package():
    stx_patch.patch({"a"})
    import safetensors
    assert safetensors.safe_open is not rust()
    assert "safetensors.torch" not in sys.modules
    assert safetensors.safe_open(path, framework="pt").keys() == ["a"]
    check_all()

def test_import_the_module():
    stx_patch.patch({"a"})
    import safetensors.torch
    check_all()

def test_from_import():
    stx_patch.patch({"a"})
    from safetensors.torch import load_file as theirs, load, safe_open as opener
    assert list(theirs(path)) == ["a"] and opener(path, "pt").keys() == ["a"]
    assert list(load(open(path, "rb").read())) == ["a"]
    stx_patch.reset_stats()
    check_all()
    # What was bound while patched is stock's in effect.
    assert sorted(theirs(path)) == ["a", "b"] and type(opener(path, "pt")) is rust()

def test_import_of_another_framework_first():
    stx_patch.patch({"a"})
    import safetensors.numpy
    assert list(safetensors.numpy.load_file(path)) == ["a"]
    assert stx_patch.stats().fallbacks == {"framework np": 1}
    stx_patch.reset_stats()
    check_all()

def test_in_a_block():
    with stx_patch.patched({"a"}):
        import safetensors.torch
        assert list(safetensors.torch.load_file(path)) == ["a"]
    assert safetensors.safe_open is rust() and not hooks()
    assert safetensors.torch.load_file.__code__.co_filename == safetensors.torch.__file__

def test_half_imported_before():
    import safetensors
    opener = safetensors.safe_open
    stx_patch.patch({"a"})
    assert safetensors.safe_open is not opener
    check_all()

def test_our_own_functions_import_what_they_need():
    assert list(stx_patch.load_file(path, tensor_filter={"a"})) == ["a"]
    import safetensors
    assert safetensors.safe_open is rust()
    assert not stx_patch.is_patched() and not hooks()
    stx_patch.patch({"a"})
    check_all()

def test_our_own_functions_while_patched():
    stx_patch.patch({"a"})
    assert list(stx_patch.load_file(path)) == ["a"]
    check_all()

def test_unpatch_before_the_import():
    stx_patch.patch()
    stx_patch.unpatch()
    assert not hooks()
    import safetensors.torch
    assert safetensors.safe_open is rust()
    assert safetensors.torch.load_file.__code__.co_filename == safetensors.torch.__file__

def test_a_block_that_ends_before_the_import():
    with stx_patch.patched():
        pass
    assert not hooks()
    import safetensors.torch
    assert safetensors.safe_open is rust()

def test_other_modules_see_the_real_loaders():
    from importlib.machinery import SourceFileLoader
    stx_patch.patch()
    found = importlib.util.find_spec("safetensors")
    assert found.origin.endswith("__init__.py") and "safetensors" not in sys.modules
    import safetensors.torch
    for module in (safetensors, safetensors.torch):
        assert type(module.__loader__) is SourceFileLoader
        assert type(module.__spec__.loader) is SourceFileLoader
        assert module.__spec__.loader is module.__loader__
        assert module.__spec__.name == module.__name__ and module.__spec__.origin == module.__file__
        assert not module.__spec__._initializing
    import importlib.resources as resources, inspect, pkgutil
    assert resources.files("safetensors").joinpath("torch.py").is_file()
    assert pkgutil.get_data("safetensors", "torch.py").startswith(b"import")
    assert "def save_file" in inspect.getsource(safetensors.torch)
    assert "safetensors.torch" in [m.name for m in pkgutil.walk_packages(
        safetensors.__path__, "safetensors.", onerror=lambda name: None)]

def test_find_spec_gives_a_spec_that_works():
    stx_patch.patch()
    spec = importlib.util.find_spec("safetensors")
    module = importlib.util.module_from_spec(spec)
    sys.modules["safetensors"] = module
    spec.loader.exec_module(module)
    assert module.safe_open is not rust()
    import copy
    copy.copy(importlib.util.find_spec("safetensors.torch"))

def test_an_import_that_fails_can_be_repeated():
    stx_patch.patch({"a"})
    sys.modules["safetensors._safetensors_rust"] = None
    try:
        import safetensors
    except ImportError:
        pass
    else:
        raise AssertionError
    assert "safetensors" not in sys.modules
    del sys.modules["safetensors._safetensors_rust"]
    check_all()

def test_a_finder_without_find_spec_is_passed_over():
    class Old:
        find_module = staticmethod(lambda name, path: None)
    stx_patch.patch({"a"})
    sys.meta_path.insert(1, Old())
    check_all()

def test_somebody_cleared_the_hook():
    stx_patch.patch({"a"})
    sys.meta_path.remove(hooks()[0])
    import safetensors.torch
    stx_patch.patch({"a"})
    check_all()

def test_a_lazy_home_is_not_woken():
    spec = importlib.util.find_spec("safetensors")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules["safetensors"] = module
    spec.loader.exec_module(module)
    stx_patch.patch()
    assert type(module).__name__ == "_LazyModule"
    assert "safe_open" not in object.__getattribute__(module, "__dict__")
    assert "safetensors._safetensors_rust" not in sys.modules

def test_a_lazy_home_that_was_found_by_the_hook():
    stx_patch.patch({"a"})
    spec = importlib.util.find_spec("safetensors")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules["safetensors"] = module
    spec.loader.exec_module(module)
    assert "safetensors._safetensors_rust" not in sys.modules
    assert module.safe_open is not rust()
    check_all()

def test_a_home_that_another_thread_is_still_executing():
    import safetensors.torch
    module = sys.modules["safetensors.torch"]
    load = vars(module).pop("load")  # defined behind load_file
    stx_patch.patch({"a"})
    module.load = load
    stx_patch.unpatch()
    stx_patch.patch({"a"})
    check_all()

def test_without_safetensors():
    sys.modules["safetensors"] = None
    stx_patch.patch()
    with stx_patch.patched():
        pass
    stx_patch.unpatch()
    assert sys.modules["safetensors"] is None

def test_modules_that_bind_at_import_are_covered_from_then_on():
    stx_patch.patch({"a"})
    module = types.ModuleType("library")
    exec("from safetensors.torch import load_file, safe_open", vars(module))
    assert list(module.load_file(path)) == ["a"] and module.safe_open(path, "pt").keys() == ["a"]

def test_a_module_that_is_part_way_through_its_import_of_us():
    import stx_patch.auto
    import safetensors.torch
    assert stx_patch.is_patched() and safetensors.safe_open is not rust()
    import stx_patch.auto
    stx_patch.unpatch()
    assert safetensors.safe_open is rust()
""",
    )


def test_reloading_while_patched(path):
    run_forks(
        path,
        """
def is_native_and_filtered():
    import safetensors.torch
    stx_patch.reset_stats()
    assert list(safetensors.torch.load_file(path)) == ["a"]
    assert safetensors.torch.safe_open(path, "pt").keys() == ["a"]
    assert stx_patch.stats().opens == 2 and stx_patch.stats().fallbacks == {}
    assert list(safetensors.torch.load(open(path, "rb").read())) == ["a"]

def is_stock():
    import safetensors.torch
    assert safetensors.safe_open is rust() and safetensors.torch.safe_open is rust()
    stx_patch.reset_stats()
    assert sorted(safetensors.torch.load_file(path)) == ["a", "b"]
    assert sorted(safetensors.torch.load(open(path, "rb").read())) == ["a", "b"]
    assert stx_patch.stats().opens == 0 and stx_patch.stats().fallbacks == {}

def test_torch_imported_before():
    import safetensors.torch
    stx_patch.patch({"a"})
    importlib.reload(safetensors.torch)
    is_native_and_filtered()
    stx_patch.unpatch()
    is_stock()
    stx_patch.patch({"a"})
    is_native_and_filtered()
    stx_patch.unpatch()
    is_stock()

def test_torch_imported_through_the_hook():
    stx_patch.patch({"a"})
    import safetensors.torch
    importlib.reload(safetensors.torch)
    is_native_and_filtered()
    stx_patch.unpatch()
    is_stock()

def test_the_package_through_the_hook():
    stx_patch.patch({"a"})
    import safetensors.torch
    importlib.reload(safetensors)
    importlib.reload(safetensors.torch)
    is_native_and_filtered()
    stx_patch.unpatch()
    is_stock()

def test_torch_imported_anew():
    import safetensors.torch
    first = sys.modules["safetensors.torch"]
    stx_patch.patch({"a"})
    del sys.modules["safetensors.torch"]
    importlib.import_module("safetensors.torch")
    assert sys.modules["safetensors.torch"] is not first
    is_native_and_filtered()
    assert list(first.load_file(path)) == ["a"]
    stx_patch.unpatch()
    is_stock()
    data = open(path, "rb").read()
    assert sorted(first.load_file(path)) == sorted(first.load(data)) == ["a", "b"]
    assert first.safe_open is rust()

def test_torch_imported_anew_while_nothing_is_patched():
    import safetensors.torch
    with stx_patch.patched():
        pass
    del sys.modules["safetensors.torch"]
    importlib.import_module("safetensors.torch")
    stx_patch.patch({"a"})
    is_native_and_filtered()
    stx_patch.unpatch()
    is_stock()

def test_torch_while_nothing_is_patched():
    import safetensors.torch
    with stx_patch.patched():
        pass
    importlib.reload(safetensors.torch)
    stx_patch.patch({"a"})
    is_native_and_filtered()
    stx_patch.unpatch()
    is_stock()
""",
    )


def test_two_threads_that_import_and_patch_do_not_wait_for_each_other(path):
    """One thread's import ends in our hook, which waits for our lock; meanwhile another thread that
    holds the lock must not wait for that import."""
    run_forks(
        path,
        """
import threading, time
from stx_patch import _patch

def race(module, last_name):
    def lock_and_patch():
        with _patch._lock:
            locked.set()
            while last_name not in getattr(sys.modules.get(module), "__dict__", {}):
                time.sleep(0.01)
            time.sleep(0.3)  # now the import waits for the lock
            stx_patch.patch()

    stx_patch.patch()
    locked = threading.Event()
    patching = threading.Thread(target=lock_and_patch, daemon=True)
    patching.start()
    assert locked.wait(10)
    importing = threading.Thread(target=lambda: importlib.import_module(module), daemon=True)
    importing.start()
    for thread in (patching, importing):
        thread.join(20)
        assert not thread.is_alive(), "the two threads wait for each other"
    import safetensors.torch
    assert safetensors.safe_open is not rust()
    stx_patch.unpatch()
    assert safetensors.safe_open is rust()

def test_package():
    race("safetensors", "serialize_file")

def test_torch():
    import safetensors
    race("safetensors.torch", "load")
""",
    )


def test_import_tools_work_beside_the_hook():
    import importlib.metadata

    with stx_patch.patched():
        importlib.invalidate_caches()
        assert importlib.metadata.version("safetensors")[:3] == safetensors.__version__[:3]
        assert list(importlib.metadata.distributions(name="safetensors"))
        assert importlib.util.find_spec("safetensors").loader is safetensors.__spec__.loader
        assert importlib.util.find_spec("no_such_module_anywhere") is None
        for finder in sys.meta_path:
            if hasattr(finder, "find_spec"):
                assert finder.find_spec("no_such_module_anywhere", None) is None


def test_a_process_may_end_while_patched():
    for code in (
        "import stx_patch.auto",
        "import stx_patch, safetensors; stx_patch.patch()",
        "import stx_patch; block = stx_patch.patched(); block.__enter__()",
        "import stx_patch, safetensors; block = stx_patch.patched(); block.__enter__()",
        """
        import stx_patch, safetensors, threading
        def work():
            with stx_patch.patched():
                started.set()
                threading.Event().wait()
        started = threading.Event()
        threading.Thread(target=work, daemon=True).start()
        started.wait()
        """,
        """
        import stx_patch, safetensors, sys
        class Cycle: pass
        cycle = Cycle(); cycle.me = cycle; cycle.block = stx_patch.patched()
        cycle.block.__enter__()
        sys.cycle = cycle
        """,
    ):
        run_python(code)


def test_a_filter_is_let_go_by_unpatch(path):
    import gc
    import weakref

    def keep(name):
        return True

    alive = weakref.ref(keep)
    stx_patch.patch(keep)
    safetensors.torch.load_file(path)
    stx_patch.patch({"a"})
    del keep
    gc.collect()
    assert alive() is None
    stx_patch.unpatch()


def test_stocks_function_held_somewhere_reaches_us_through_its_own_globals(path):
    held = [STOCK.load_file]
    stx_patch.reset_stats()
    with stx_patch.patched({"a"}) as report:
        assert list(held[0](path)) == ["a"]
    assert report.opens == 1 and report.fallbacks == {}


def test_somebody_elses_wrapper_stays_and_works(path):
    original = safetensors.torch.load_file
    calls = []

    def wrapper(*arguments, **keywords):
        calls.append(arguments)
        return held[0](*arguments, **keywords)

    held = [original]
    safetensors.torch.load_file = wrapper
    try:
        with stx_patch.patched({"a"}) as report:
            assert safetensors.torch.load_file is wrapper
            assert list(safetensors.torch.load_file(path)) == ["a"]
        assert report.opens == 1 and report.fallbacks == {} and len(calls) == 1
        assert safetensors.torch.load_file is wrapper
    finally:
        safetensors.torch.load_file = original


def test_a_script_that_imported_first_is_patched_in_its_own_namespace(path):
    run_python(
        """
        import sys
        from safetensors import safe_open
        from safetensors.torch import load_file as loader
        import stx_patch
        path = sys.argv[1]
        stock = safe_open, loader
        with stx_patch.patched() as report:
            assert safe_open is not stock[0] and loader is not stock[1]
            loader(path)
            safe_open(path, "pt")
        assert (safe_open, loader) == stock
        assert report.opens == 2 and report.fallbacks == {}
        """,
        path,
    )


# --- switched off, incomplete, or without the extension ---


def test_auto_patches_and_the_environment_switches_it_off(path):
    script = """
        import sys
        import stx_patch.auto
        print(stx_patch.is_patched())
        if sys.argv[2] == "0":
            stx_patch.patch()
            with stx_patch.patched({"a"}) as report:
                assert not stx_patch.is_patched()
                import safetensors.torch
                native = sys.modules["safetensors._safetensors_rust"]
                assert safetensors.safe_open is native.safe_open
                assert sorted(safetensors.torch.load_file(sys.argv[1])) == ["a", "b"]
                assert sorted(safetensors.torch.load(open(sys.argv[1], "rb").read())) == ["a", "b"]
            assert report.opens == 0 and report.fallbacks == {}
            assert not any(type(f).__module__.startswith("stx_patch") for f in sys.meta_path)
            try:
                stx_patch.patch(tensor_filter=3)
            except TypeError:
                pass
            else:
                raise AssertionError("a filter is checked even then")
            stx_patch.unpatch()
            # Asked for by name, it works.
            assert list(stx_patch.load_file(sys.argv[1], tensor_filter={"a"})) == ["a"]
            assert report.opens == 0, "the report of a block that has ended moves"
        """
    run_python(script, path, "1", expect_output="True\n")
    run_python(script, path, "0", env={"STX_PATCH": "0"}, expect_output="False\n")


def test_without_torch_the_other_frameworks_work(path):
    run_python(
        """
        import sys
        sys.modules["torch"] = None
        import stx_patch
        stx_patch.patch({"a"})
        from safetensors import safe_open
        path = sys.argv[1]
        assert safe_open(path, "np").keys() == ["a"]
        assert safe_open(path, "np").get_tensor("a").tolist() == [0.0, 1.0, 2.0]
        stock = [sys.modules["safetensors._safetensors_rust"].safe_open]
        def error(opener):
            try:
                opener(path, "pt")
            except Exception as error:
                return type(error), str(error)
        assert error(safe_open) == error(stock[0]) != None
        assert stx_patch.stats().fallbacks == {"framework np": 2, "torch missing": 1}
        stx_patch.unpatch()
        assert safe_open is stock[0]  # a name of this module, given back
        """,
        path,
    )


def test_without_the_extension_everything_goes_to_stock(path):
    run_python(
        """
        import sys, warnings
        sys.modules["stx_patch._C"] = None
        import stx_patch
        path = sys.argv[1]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            stx_patch.patch(); line = 8
            stx_patch.patch()
            stx_patch.unpatch()
            with stx_patch.patched():
                pass
        assert [w.category for w in caught] == [stx_patch.StxWarning], caught
        assert caught[0].lineno == line and caught[0].filename == __file__, str(caught[0])

        import safetensors.torch, safetensors.numpy, torch
        stock = [sys.modules["safetensors._safetensors_rust"].safe_open]
        loaded = safetensors.torch.load_file(path)
        stx_patch.reset_stats()
        with stx_patch.patched({"a"}) as report:
            assert list(safetensors.torch.load_file(path)) == ["a"]
            assert torch.equal(safetensors.torch.load_file(path)["a"], loaded["a"])
            handle = safetensors.safe_open(path, "pt")
            assert handle.keys() == ["a"] and isinstance(handle, safetensors.safe_open)
            assert safetensors.safe_open.keys(handle) == ["a"]
            try:
                handle.get_tensor("b")
            except safetensors.SafetensorError as error:
                assert "left out by tensor_filter" in str(error)
            else:
                raise AssertionError
            assert list(safetensors.torch.load(open(path, "rb").read())) == ["a"]
            assert list(safetensors.numpy.load_file(path)) == ["a"]
        assert report.fallbacks == {"extension missing": 4, "load(bytes)": 1}, report.fallbacks
        assert report.opens == 0 and report.tensors_native == 0 and report.tensors_stock == 4
        assert isinstance(report.as_dict(), dict)
        with stx_patch.patched():
            assert type(safetensors.safe_open(path, "pt")) is stock[0]
            assert sorted(safetensors.torch.load_file(path)) == ["a", "b"]
        assert list(stx_patch.load_file(path, tensor_filter="b*")) == ["b"]
        assert stx_patch.safe_open(path, tensor_filter="b*").keys() == ["b"]
        assert safetensors.safe_open is stock[0]
        """,
        path,
    )
