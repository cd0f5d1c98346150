"""Proves: options reach the core from whichever of keyword, patch, environment and default says
them first, a wrong one is refused at once and by its name, and none changes what is loaded."""

import copy
import dataclasses
import inspect
import pickle
import threading

import pytest
import safetensors
import safetensors.torch
import torch
from helpers import STOCK, facts, outcome
from patch_helpers import (
    drop_from_cache,
    leaves_stock,  # noqa: F401
    run_python,
    settle,
)

import stx_patch
from stx_patch import Options, _native, _options

MIB = 1 << 20
NAMES = ["engine", "read_ahead", "inflight_bytes", "direct_io"]
OTHERS = ["progress", "staging_bytes"]  # not told to the core with the rest
VARIABLES = {name: f"STX_PATCH_{name.upper()}" for name in NAMES}
DEFAULT = (0, -1, 0, 0)
# For each option one value that is not the default, and what the core is told.
OTHER = {
    "engine": ("threads", (2, -1, 0, 0)),
    "read_ahead": ("off", (0, 0, 0, 0)),
    "inflight_bytes": ("3MiB", (0, -1, 3 * MIB, 0)),
    "direct_io": ("off", (0, -1, 0, 2)),
}
WRONG = {
    "engine": ["fast", "", "AUTO", "uring,threads", 1, None, b"auto", True, ["auto"]],
    "read_ahead": ["on", "", "-1", "1.5MiB", "1 2", "MiB", "12parsecs", "0x10", -1, 1 << 63, None,
                   1.5, True, b"1"],
    "inflight_bytes": ["off", "", "0", "0MiB", 0, -5, "many", "9" * 30, None, 2.0, False],
    "direct_io": ["yes", "1", "", "ON", True, 1, None],
}  # fmt: skip
options = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def told(monkeypatch):
    """What the core was told at each open, the options first."""
    calls, real = [], _native.core.open

    def record(path, rule, origin, how, reads):
        calls.append(how)
        return real(path, rule, origin, how, reads)

    monkeypatch.setattr(_native.core, "open", record)
    return calls


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file that is worth an engine."""
    path = tmp_path_factory.mktemp("options") / "large.safetensors"
    safetensors.torch.save_file(
        {"a": torch.arange(MIB, dtype=torch.int32), "b": torch.ones(5)}, path
    )
    return path


# --- the type ---


def test_the_options_are_what_is_documented():
    assert [field.name for field in dataclasses.fields(Options)] == [*NAMES, *OTHERS]
    assert list(_options.NAMES) == [*NAMES, *OTHERS]
    assert set(vars(Options()).values()) == {"auto", False} and Options().core == DEFAULT


def test_staging_bytes(monkeypatch):
    assert Options().staging == 64 * MIB and Options(staging_bytes="8MiB").staging == 8 * MIB
    monkeypatch.setenv("STX_PATCH_STAGING_BYTES", "1GiB")
    assert _options.from_environment({}).staging == 1024 * MIB
    for wrong in ("many", -1, 1.5, None, "off"):
        with pytest.raises((TypeError, ValueError), match="staging_bytes"):
            Options(staging_bytes=wrong)


def test_options_are_values():
    made = Options(engine="threads", inflight_bytes="1MiB", direct_io="on", read_ahead=5)
    for other in (
        pickle.loads(pickle.dumps(made)),
        copy.copy(made),
        copy.deepcopy(made),
        dataclasses.replace(made),
        Options(**dataclasses.asdict(made)),
        eval(repr(made)),
    ):
        assert other == made and hash(other) == hash(made) and other.core == made.core
    assert made != Options() and made.core == (2, 5, MIB, 1)
    assert repr(made) == (
        "Options(engine='threads', read_ahead=5, inflight_bytes=1048576, direct_io='on', "
        "progress=False, staging_bytes='auto')"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.engine = "uring"
    with pytest.raises(ValueError):
        dataclasses.replace(made, engine="fast")
    with pytest.raises(TypeError):
        Options(no_such_option=1)


SIZES = {
    "1": 1, "12B": 12, "7b": 7, "1k": 1 << 10, "1K": 1 << 10, "1KiB": 1 << 10, "3 MiB": 3 << 20,
    "3mib": 3 << 20, "3m": 3 << 20, " 2GiB ": 2 << 30, "2g": 2 << 30, "1kB": 1000, "1KB": 1000,
    "5MB": 5_000_000, "2GB": 2_000_000_000, "0001": 1, 17: 17, (1 << 63) - 1: (1 << 63) - 1,
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=repr)
@pytest.mark.parametrize("name", ["read_ahead", "inflight_bytes"])
def test_sizes(monkeypatch, told, sample, name, size):
    made = Options(**{name: size})
    assert getattr(made, name) == SIZES[size] and SIZES[size] in made.core
    assert made == Options(**{name: SIZES[size]})
    stx_patch.safe_open(sample, **{name: size})
    monkeypatch.setenv(VARIABLES[name], str(size))
    stx_patch.safe_open(sample)
    assert told == [made.core] * 2


def test_nothing_to_read_ahead_is_off():
    assert Options(read_ahead=0).core == Options(read_ahead="off").core == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in NAMES for value in WRONG[name]], ids=repr
)
def test_a_wrong_value_is_refused_by_name_wherever_it_is_said(monkeypatch, sample, name, value):
    """As a keyword of everything that takes it, before anything is opened or patched; and, what can
    be a variable, there."""
    before = stx_patch.stats()
    kind = ValueError if isinstance(value, (str, int)) and value is not True else TypeError
    kind = TypeError if type(value) is bool or (type(value) is int and name in CHOICES) else kind
    given = {name: value}
    missing = sample.with_name("missing")
    for call in (
        lambda: Options(**given),
        lambda: stx_patch.patch(**given),
        lambda: stx_patch.patched(**given).__enter__(),
        lambda: stx_patch.safe_open(missing, **given),
        lambda: stx_patch.safe_open(missing, "np", **given),
        lambda: stx_patch.load_file(missing, backend="pread", **given),
        lambda: stx_patch.explain(missing, **given),
    ):
        with pytest.raises(kind, match=name):
            call()
    assert not stx_patch.is_patched()
    with stx_patch.patched():
        for call in (
            lambda: safetensors.safe_open(sample, "pt", **given),
            lambda: safetensors.torch.load_file(sample, **given),
        ):
            with pytest.raises(kind, match=name):
                call()
    assert stx_patch.stats() == before
    if isinstance(value, str) and value:
        monkeypatch.setenv(VARIABLES[name], value)
        for call in (
            stx_patch.patch,
            lambda: stx_patch.patched().__enter__(),
            lambda: stx_patch.load_file(missing),
            lambda: stx_patch.explain(missing),
        ):
            with pytest.raises(ValueError, match=f"{VARIABLES[name]}: {name} must be"):
                call()
        assert not stx_patch.is_patched()


CHOICES = ("engine", "direct_io")


def test_unknown_keywords_are_refused(sample):
    for call in (
        lambda: stx_patch.patch(no_such_option=1),
        lambda: stx_patch.patched(no_such_option=1).__enter__(),
        lambda: stx_patch.load_file(sample, no_such_option=1),
        lambda: stx_patch.safe_open(sample, no_such_option=1),
        lambda: stx_patch.explain(sample, no_such_option=1),
        lambda: stx_patch.patch(None, backend="pread"),
    ):
        with pytest.raises(TypeError, match=r"no_such_option|backend"):
            call()
    assert not stx_patch.is_patched()


# --- which one counts ---


@options
def test_each_option_reaches_the_core(told, sample, name):
    value, core = OTHER[name]
    given = {name: value}
    stx_patch.load_file(sample, **given)
    stx_patch.load_file(sample, backend="pread", **given)
    stx_patch.safe_open(sample, **given)
    with stx_patch.patched(**given):
        safetensors.torch.load_file(sample)
        safetensors.safe_open(sample, "pt")
        stx_patch.load_file(sample)
        stx_patch.safe_open(sample)
    stx_patch.patch(**given)
    safetensors.torch.load_file(sample)
    stx_patch.unpatch()
    with stx_patch.patched():
        safetensors.torch.load_file(sample, **given)
        safetensors.safe_open(sample, "pt", **given)
    assert told == [core] * 10
    stx_patch.load_file(sample)
    assert told[10:] == [DEFAULT]


@options
def test_keyword_then_patch_then_environment_then_default(monkeypatch, told, sample, name):
    first, second, third = {
        "engine": ("threads", "uring", "auto"),
        "read_ahead": (1, 2, 3),
        "inflight_bytes": (1, 2, 3),
        "direct_io": ("on", "off", "auto"),
    }[name]
    core = {value: Options(**{name: value}).core for value in (first, second, third)}

    def load(**keywords):
        safetensors.torch.load_file(sample, **keywords)
        stx_patch.load_file(sample, **keywords)
        found = told[-2:]
        told.clear()
        return found

    monkeypatch.setenv(VARIABLES[name], str(third))
    with stx_patch.patched(**{name: second}):
        assert load(**{name: first}) == [core[first]] * 2
        assert load() == [core[second]] * 2
        with stx_patch.patched():  # whole: nothing of the block around it
            assert load() == [core[third]] * 2
            monkeypatch.delenv(VARIABLES[name])
            assert load() == [core[third]] * 2, "what was in force when the block began"
        with stx_patch.patched():
            assert load() == [DEFAULT] * 2
        assert load() == [core[second]] * 2
    stx_patch.load_file(sample)
    monkeypatch.setenv(VARIABLES[name], f" {third}\n")
    stx_patch.load_file(sample)
    stx_patch.load_file(sample, **{name: first})
    assert told == [DEFAULT, core[third], core[first]]


def test_options_come_from_several_places_at_once(monkeypatch, told, sample):
    monkeypatch.setenv("STX_PATCH_READ_AHEAD", "7")
    monkeypatch.setenv("STX_PATCH_ENGINE", "uring")
    monkeypatch.setenv("STX_PATCH_DIRECT_IO", "")  # says nothing
    with stx_patch.patched(engine="threads"):
        safetensors.torch.load_file(sample, inflight_bytes=9)
        stx_patch.load_file(sample, direct_io="on", read_ahead="off")
    assert told == [(2, 7, 9, 0), (2, 0, 0, 1)]


def test_a_keyword_hides_a_wrong_variable(monkeypatch, told, sample):
    """And only its own."""
    monkeypatch.setenv("STX_PATCH_ENGINE", "fast")
    stx_patch.load_file(sample, engine="auto")
    with stx_patch.patched(engine="threads"):
        stx_patch.load_file(sample)
    assert told == [DEFAULT, (2, -1, 0, 0)]
    with pytest.raises(ValueError, match="STX_PATCH_ENGINE"):
        stx_patch.load_file(sample, direct_io="on")


def test_a_patch_again_replaces_the_options(told, sample):
    stx_patch.patch("m*", engine="threads")
    safetensors.torch.load_file(sample)
    stx_patch.patch(direct_io="on")
    assert len(safetensors.torch.load_file(sample)) == 5
    with pytest.raises(ValueError):
        stx_patch.patch(engine="fast")
    safetensors.torch.load_file(sample)  # as before
    stx_patch.patch()
    safetensors.torch.load_file(sample)
    stx_patch.unpatch()
    assert told == [(2, -1, 0, 0), (0, -1, 0, 1), (0, -1, 0, 1), DEFAULT]


def test_overlapping_blocks(told, sample):
    """The youngest that is left counts, whichever ends first."""
    first, second = stx_patch.patched("m*", engine="threads"), stx_patch.patched(direct_io="on")
    first.__enter__()
    safetensors.torch.load_file(sample)
    second.__enter__()
    assert len(safetensors.torch.load_file(sample)) == 5
    first.__exit__(None, None, None)
    safetensors.torch.load_file(sample)
    third = stx_patch.patched(read_ahead=4)
    third.__enter__()
    second.__exit__(None, None, None)
    safetensors.torch.load_file(sample)
    third.__exit__(None, None, None)
    assert told == [(2, -1, 0, 0), (0, -1, 0, 1), (0, -1, 0, 1), (0, 4, 0, 0)]


def test_the_options_in_force_are_the_processes(told, sample):
    """Other threads', too."""
    with stx_patch.patched(engine="threads"):
        thread = threading.Thread(target=lambda: safetensors.torch.load_file(sample))
        thread.start()
        thread.join(60)
    assert told == [(2, -1, 0, 0)]


def test_a_handle_keeps_what_was_in_force_when_it_was_opened(large):
    with stx_patch.patched(engine="threads"):
        handle = safetensors.safe_open(large, "pt", backend="pread")
    with stx_patch.patched(engine="uring"):
        handle.get_tensor("a")
    assert stx_patch.stats().engine == "threads"


def test_a_variable_that_became_wrong_does_not_reach_into_libraries(monkeypatch, told, sample):
    """What was in force at patch() holds: nobody inside a library is told about a variable."""
    with stx_patch.patched(engine="threads"):
        for variable in VARIABLES.values():
            monkeypatch.setenv(variable, "nonsense")
        model = torch.nn.Module()
        model.register_buffer("vector", torch.zeros(7, dtype=torch.int64))
        safetensors.torch.load_model(model, sample, strict=False)
        assert model.vector.tolist() == list(range(7))
        assert len(torch.load(sample)) == 5
        safetensors.safe_open(sample, "pt", backend="pread").get_tensors()
        safetensors.safe_open(sample, "np")
        stx_patch.load_file(sample)
        assert stx_patch.explain(sample).native
    assert told == [(2, -1, 0, 0)] * 4
    stx_patch.patch(engine="auto", read_ahead="auto", inflight_bytes="auto", direct_io="auto")
    assert len(safetensors.torch.load_file(sample)) == 5
    stx_patch.unpatch()


def test_without_a_patch_stock_asks_no_variable(monkeypatch, sample):
    for variable in VARIABLES.values():
        monkeypatch.setenv(variable, "nonsense")
    assert len(safetensors.torch.load_file(sample)) == 5
    for use in (stx_patch.load_file, stx_patch.safe_open, stx_patch.explain):
        with pytest.raises(ValueError, match="STX_PATCH_"):
            use(sample)


def test_a_wrong_variable_stops_the_automatic_patch_with_its_name(sample):
    code = """
        try:
            import stx_patch.auto
        except ValueError as error:
            print(error)
        import stx_patch
        assert not stx_patch.is_patched()
        """
    output = run_python(code, env={"STX_PATCH_ENGINE": "fast"}, expect_output=None)
    assert output.startswith("STX_PATCH_ENGINE: engine must be one of")
    code = """
        import sys, stx_patch.auto, safetensors.torch
        safetensors.torch.load_file(sys.argv[1], backend="pread")
        print(stx_patch.stats().engine)
        """
    large = sample.with_name("large")
    safetensors.torch.save_file({"a": torch.zeros(MIB)}, large)
    environment = {"STX_PATCH_ENGINE": "threads"}
    assert run_python(code, large, env=environment, expect_output=None) == "threads\n"


# --- the stand-ins ---


def test_the_stand_ins_know_the_options_while_a_patch_is_in_force(told, sample):
    with stx_patch.patched():
        opener, load = safetensors.safe_open, safetensors.torch.load_file
        handle = opener(sample, "pt", engine="threads", tensor_filter="m*", read_ahead=3)
        assert handle.keys() == ["matrix"]
        assert list(load(sample, direct_io="on", include_keys=["cube"])) == ["cube"]
        assert opener(sample, framework="np", engine="threads").keys()  # stock hears nothing of it
        assert "engine" not in inspect.signature(opener).parameters
        for call in (opener, load):
            with pytest.raises(TypeError, match="engines"):
                call(sample, engines="threads")
    assert told == [(2, 3, 0, 0), (0, -1, 0, 1)]
    for use, stock in ((opener, STOCK.safe_open), (load, STOCK.load_file)):
        assert outcome(use, sample, engine="threads") == outcome(stock, sample, engine="threads")


def test_the_public_signature_names_them():
    parameters = inspect.signature(stx_patch.safe_open).parameters
    for name in NAMES:
        assert parameters[name].default == "auto"
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


# --- what they do ---


@pytest.mark.parametrize("engine", ["uring", "threads", "auto"])
@pytest.mark.parametrize("direct_io", ["on", "off", "auto"])
@pytest.mark.parametrize("inflight_bytes", ["auto", 1, 100_000, "1GiB"])
def test_none_changes_what_is_loaded(large, engine, direct_io, inflight_bytes):
    expected = {name: facts(tensor) for name, tensor in load_as_stock(large).items()}
    before = stx_patch.stats()
    how = {"engine": engine, "direct_io": direct_io, "inflight_bytes": inflight_bytes}
    loaded = stx_patch.load_file(large, backend="pread", **how)
    made = stx_patch.stats() - before
    assert {name: facts(tensor) for name, tensor in loaded.items()} == expected
    assert made.fallbacks == {} and made.loads_direct + made.loads_buffered == 1
    assert made.loads_direct == (direct_io == "on")  # what was just written is in the page cache
    assert (made.engine_reason is None) == (direct_io == "on")
    assert made.engine == engine or engine == "auto"


def load_as_stock(path):
    return STOCK.load_file(path, backend="pread")


def test_read_ahead_off_reads_nothing_ahead(large):
    assert drop_from_cache(large)
    before = stx_patch.stats()
    tensors = stx_patch.load_file(large, read_ahead="off")
    settle()
    made = stx_patch.stats() - before
    assert made.requests == 1 and made.bytes_read < MIB  # the header
    assert tensors["a"][-1] == MIB - 1
    assert drop_from_cache(large)
    before = stx_patch.stats()
    tensors = stx_patch.load_file(large)
    settle()
    assert (stx_patch.stats() - before).bytes_read >= 4 * MIB
    assert tensors["a"][-1] == MIB - 1
