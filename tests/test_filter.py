"""What a tensor_filter may be, what it keeps, when it is asked, and that what it leaves out does
not exist: in no list, no dict, no total, no error but the one that names it, and in no read."""

import gc
import os
import pickle
import sys
import traceback
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from patch_helpers import (
    STOCK,
    PageCache,
    drop_from_cache,
    floats,
    homes_are_stock,
    mappings_of,
    open_descriptors,
    run_python,
    settle,
    write_raw,
)

import stx_patch
from stx_patch import (
    StxFilterWarning,
    TensorKey,
    _filter,
    _native,
    _origin,
    _patch,
    filters,
)

# In file order, which is neither sorted nor the header's.
ENTRIES = [
    ("model.layers.1.w", "F32", (2, 3), floats(1, 2, 3, 4, 5, 6)),
    ("lm_head", "F16", (4,), bytes(range(8))),
    ("model.layers.10.w", "F32", (1,), floats(10)),
    ("model.layers.0.w", "I64", (2,), bytes(16)),
    ("a[0]", "U8", (5,), b"\1\2\3\4\5"),
    ("model.norm", "U8", (0,), b""),
    ("a0", "U8", (1,), b"\7"),
    ("*", "U8", (2,), b"\1\2"),
    ("model.layers.2.w", "U8", (), b"\3"),
]
ORDER = [name for name, _, _, _ in ENTRIES]
SIZES = {name: len(data) for name, _, _, data in ENTRIES}


@pytest.fixture(scope="module", autouse=True)
def around_all():
    """A block without a filter around all tests here: names are bound once, not in each of them."""
    assert homes_are_stock()
    with stx_patch.patched():
        yield
    assert homes_are_stock()


@pytest.fixture(autouse=True)
def leaves_nothing():
    """Each test leaves in force what it found."""
    before = _patch._entries
    yield
    left, _patch._entries, _patch._process_entry = _patch._entries, before, None
    assert left == before, "the test left a patch in force"


@pytest.fixture
def path(tmp_path):
    return write_raw(tmp_path / "filtered.safetensors", ENTRIES, metadata={"format": "pt"})


# Every way to a set of tensors, each a function of a path that goes through a patched name.
ROUTES = {
    "safe_open": lambda path: safetensors.safe_open(path, "pt").get_tensors(),
    "safe_open-torch": lambda path: safetensors.torch.safe_open(
        filename=path, framework="torch", device="cpu", backend="mmap"
    ).get_tensors(),
    "load_file": lambda path: safetensors.torch.load_file(path),
    "load_file-pread": lambda path: safetensors.torch.load_file(path, backend="pread"),
    "safe_open-pread": lambda path: safetensors.safe_open(
        path, framework="pt", backend="pread"
    ).get_tensors(),
    "safe_open-numpy": lambda path: safetensors.safe_open(path, framework="np").get_tensors(),
    "numpy.load_file": lambda path: safetensors.numpy.load_file(path),
    "load": lambda path: safetensors.torch.load(Path(path).read_bytes()),
    "own-load_file": lambda path: stx_patch.load_file(path),
    "own-safe_open": lambda path: stx_patch.safe_open(path).get_tensors(),
    "own-safe_open-numpy": lambda path: stx_patch.safe_open(path, "np").get_tensors(),
}
NATIVE = {
    "safe_open", "safe_open-torch", "load_file", "own-load_file", "own-safe_open",
    "safe_open-pread", "load_file-pread",
}  # fmt: skip
routes = pytest.mark.parametrize("route", ROUTES)
# One route for the core and one for its Python twin.
twins = pytest.mark.parametrize("route", ["load_file", "numpy.load_file"])


def load(route, path, tensor_filter):
    """The tensors of `path` under an ambient filter, by one of the routes."""
    with stx_patch.patched(tensor_filter), warnings.catch_warnings():
        warnings.simplefilter("ignore", StxFilterWarning)
        return ROUTES[route](path)


def assert_kept(route, path, tensor_filter, expected):
    """`tensor_filter` keeps exactly `expected` (a collection of names), in file order."""
    found = load(route, path, tensor_filter)
    assert set(found) == set(expected)
    if route != "load":  # whose order is stock's: none
        assert list(found) == [name for name in ORDER if name in set(expected)]
    whole = {"np": np.array_equal, "pt": torch.equal}
    for name, tensor in found.items():
        equal = whole["pt" if isinstance(tensor, torch.Tensor) else "np"]
        reference = STOCK.load_file(path)[name]
        assert equal(tensor, reference if isinstance(tensor, torch.Tensor) else reference.numpy())


# --- the forms ---

KEEP_LAYERS = [name for name in ORDER if "layers" in name]

FORMS = {
    "None": (None, ORDER),
    "lambda": (lambda name: name.startswith("model.layers.1."), ["model.layers.1.w"]),
    "lambda-attributes": (lambda key: key.nbytes >= 8 and key.dtype == "F32", ["model.layers.1.w"]),
    "method": ({"lm_head", "a0"}.__contains__, ["lm_head", "a0"]),
    "str.isidentifier": (str.isidentifier, ["lm_head", "a0"]),
    "callable-object": (
        type("Keeps", (), {"__call__": lambda self, key: key == "lm_head"})(),
        ["lm_head"],
    ),
    "glob": ("model.layers.*", KEEP_LAYERS),
    "glob-list": (["lm_*", "model.n?rm"], ["lm_head", "model.norm"]),
    "glob-tuple": (("model.layers.[12].w",), ["model.layers.1.w", "model.layers.2.w"]),
    "glob-negated": ("model.layers.[!1].w", ["model.layers.0.w", "model.layers.2.w"]),
    "glob-range": ("a[0-9]", ["a0"]),
    "glob-is-the-name": ("a[0]", ["a[0]", "a0"]),
    "glob-of-a-star": ("\\*", []),
    "glob-star-alone": ("*", ORDER),
    "glob-is-whole": ("layers", []),
    "glob-is-case-sensitive": ("LM_HEAD", []),
    "empty-str": ("", []),
    "empty-list": ([], []),
    "empty-tuple": ((), []),
    "empty-set": (set(), []),
    "empty-dict": ({}, []),
    "set": ({"lm_head", "a[0]", "*"}, ["lm_head", "a[0]", "*"]),
    "frozenset": (frozenset(["model.norm"]), ["model.norm"]),
    "dict": ({"lm_head": 1, "missing": 2}, ["lm_head"]),
    "dict-keys": ({"lm_head": 1}.keys(), ["lm_head"]),
    "mapping-proxy": (types.MappingProxyType({"a0": 1}), ["a0"]),
    "set-of-other-names": ({"other"}, []),
    "str-subclass": (type("Text", (str,), {})("lm_*"), ["lm_head"]),
    "prefixes": (filters.prefixes("model.layers.1", "lm"), ["model.layers.1.w"]),
    "prefix-with-dot": (filters.prefixes("model.layers.1."), ["model.layers.1.w"]),
    "prefix-is-the-name": (filters.prefixes("lm_head"), ["lm_head"]),
    "prefix-model": (filters.prefixes("model"), [*KEEP_LAYERS, "model.norm"]),
    "prefixes-of-nothing": (filters.prefixes(), []),
    "names": (filters.names(["lm_head", "missing"]), ["lm_head"]),
    "filters.glob": (filters.glob("lm_*", "a*"), ["lm_head", "a[0]", "a0"]),
    "regex": (filters.regex(r"layers\.(0|2)\."), ["model.layers.0.w", "model.layers.2.w"]),
    "regex-anchored": (filters.regex(r"^a"), ["a[0]", "a0"]),
    "layers": (filters.layers(1, 3), ["model.layers.1.w", "model.layers.2.w"]),
    "layers-of-two-digits": (filters.layers(10, 11), ["model.layers.10.w"]),
    "no-layers": (filters.layers(3, 3), []),
    "all_of": (filters.all_of("model.*", filters.layers(0, 2), lambda key: key.nbytes < 20), [
        "model.layers.0.w"
    ]),
    "all_of-nothing": (filters.all_of(), ORDER),
    "any_of": (filters.any_of(filters.layers(0, 1), "lm_*", {"a0"}), [
        "lm_head", "model.layers.0.w", "a0"
    ]),
    "any_of-nothing": (filters.any_of(), []),
    "none_of": (filters.none_of("model.*", ["a*"]), ["lm_head", "*"]),
    "none_of-nothing": (filters.none_of(), ORDER),
    "nested": (
        filters.all_of(filters.any_of("a*", filters.none_of("*.*")), filters.none_of("\\*", "lm*")),
        ["a[0]", "a0", "*"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@twins
def test_every_form_keeps_what_it_says(path, route, form):
    tensor_filter, expected = FORMS[form]
    assert_kept(route, path, tensor_filter, expected)


@pytest.mark.parametrize("form", ["lambda", "glob-list", "set", "layers", "empty-list", "any_of"])
@routes
def test_it_holds_on_every_route(path, route, form):
    tensor_filter, expected = FORMS[form]
    assert_kept(route, path, tensor_filter, expected)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_can_be_given_to_a_call(path, form):
    tensor_filter, expected = FORMS[form]
    expected = [name for name in ORDER if name in expected]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StxFilterWarning)
        assert list(stx_patch.load_file(path, tensor_filter=tensor_filter)) == expected
        handle = stx_patch.safe_open(path, tensor_filter=tensor_filter)
        assert handle.offset_keys() == expected
        with stx_patch.patched():  # our keywords are known to patched names too
            handle = safetensors.safe_open(path, "pt", tensor_filter=tensor_filter)
            assert handle.offset_keys() == expected
            loaded = safetensors.torch.load_file(path, tensor_filter=tensor_filter)
            assert list(loaded) == expected


@pytest.mark.parametrize(
    "mistake",
    [
        *(3, 0, 1.5, True, b"a*", bytearray(b"a"), object(), Ellipsis),
        *(["a", 3], ("a", None), [b"a"], [["a"]], iter(["a"]), range(3)),
        *({1}, {"a", None}, frozenset([b"a"]), {1: "a"}),
    ],
    ids=lambda mistake: type(mistake).__name__,
)
def test_anything_else_is_a_type_error_at_once(path, mistake):
    for call in (
        stx_patch.patch,
        lambda f: stx_patch.patched(f).__enter__(),
        lambda f: stx_patch.load_file(path, tensor_filter=f),
        lambda f: stx_patch.safe_open(path, tensor_filter=f),
        lambda f: stx_patch.safe_open("no such file", tensor_filter=f),
        filters.all_of,
        lambda f: filters.any_of("a", f),
        filters.none_of,
    ):
        with pytest.raises(TypeError):
            call(mistake)


def test_a_name_that_no_file_can_have_is_refused_at_once():
    for mistake in ("\ud800", ["\ud800"], {"a", "\ud800"}):
        with pytest.raises(ValueError):
            stx_patch.patch(mistake)


def test_none_inside_a_combination_is_a_type_error():
    for combine in (filters.all_of, filters.any_of, filters.none_of):
        with pytest.raises(TypeError):
            combine("a", None)


def test_a_container_is_read_when_it_is_given(path):
    patterns, names = ["lm_*"], {"a0"}
    stx_patch.patch(patterns)
    patterns.append("*")
    assert list(safetensors.torch.load_file(path)) == ["lm_head"]
    stx_patch.patch(names)
    names.add("lm_head")
    assert list(safetensors.torch.load_file(path)) == ["a0"]
    stx_patch.unpatch()


def test_deep_nesting_is_accepted_or_refused_at_once(path):
    """Never an error inside a library's load."""
    for depth in (5, 30, 31, 32, 33, 40, 200):
        nested = "lm_*"
        try:
            for _ in range(depth):
                nested = filters.any_of(nested)
            stx_patch.patch(filters.all_of(nested))
        except (TypeError, ValueError):
            assert depth > 16
        else:
            assert list(safetensors.torch.load_file(path)) == ["lm_head"]
            assert list(safetensors.numpy.load_file(path)) == ["lm_head"]
            # The call's own filter on top of it must not be what breaks it either.
            loaded = safetensors.torch.load_file(path, tensor_filter=nested)
            assert list(loaded) == ["lm_head"]
        finally:
            stx_patch.unpatch()


# --- the core and its Python twin agree ---

_texts = st.text("ab.[]!*?-^01é𝄞\n\\", max_size=8)
_layer_names = st.lists(
    st.sampled_from(["layers", "h", "blocks", "0", "1", "10", "007", "1_0", "²", "x", "", "-1"]),
    max_size=6,
).map(".".join)
_expert_names = st.lists(
    st.sampled_from(["experts", "mlp", "0", "1", "007", "²", "weight", "weight_scale", "qweight"]),
    max_size=6,
).map(".".join)


@pytest.mark.skipif(_native.core is None, reason="there is no core to compare with")
class TestTwins:
    def agree(self, rule, name):
        key = TensorKey(name, "U8", (), 1, None)
        assert _native.core.match_rule(rule, name) == _filter.matches(rule, key)

    @given(_texts, _texts)
    @example("[]]", "]")
    @example("[!]a]", "b")
    @example("[b-a]", "a")
    @example("[a-]", "-")
    @example("[-a]", "-")
    @example("[^a]", "^")
    @example("[a-b-c]", "c")
    @example("[\\a]", "\\")
    @example("[[]", "[")
    @example("[é-𝄞]", "𝄞")
    @example("*a*a*a*b", "aaaaaaaa")
    @example("a\n*", "a\nb")
    @example("?", "\n")
    def test_globs(self, pattern, name):
        self.agree(("glob", (pattern,)), name)

    @given(_texts, st.text("ab.", max_size=8))
    def test_prefixes(self, prefix, name):
        self.agree(("prefixes", (prefix,)), name)

    @given(st.integers(0, 12), st.integers(0, 12), _layer_names)
    @example(0, 2**64 - 1, "layers." + "9" * 30)
    def test_layers(self, start, stop, name):
        self.agree(("layers", start, stop), name)

    @given(st.frozensets(st.integers(0, 12), max_size=3), st.booleans(), _expert_names)
    @example(frozenset([2**64 - 2]), False, "experts." + "9" * 30)
    def test_experts(self, ids, keep_scales, name):
        self.agree(("experts", ids, keep_scales), name)

    def test_layers_of_very_many_digits(self):
        for digits, expected in (("0" * 5000 + "1", True), ("1" * 5000, False)):
            for matches in (_native.core.match_rule, _filter.matches):
                key = TensorKey(f"layers.{digits}", "U8", (), 1, None)
                assert matches(("layers", 0, 5), key) is expected


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.w", 3),
        ("h.3.attn", 3),
        ("transformer.h.3.attn", 3),
        ("blocks.2.w", 2),
        ("block.2", 2),
        ("encoder.layer.11.w", 11),
        ("model.layers.1.w", 1),
        ("model.layers.10.w", 10),
        ("model.layers.01.w", 1),
        ("model.layers.3", 3),
        ("layers.3", 3),
        ("outer.layers.9.inner.layers.3.w", 3),
        ("model.layers", None),
        ("model.layers.", None),
        ("model.layers.x.3", None),
        ("model.mylayers.3.w", None),
        ("model.layers3.w", None),
        ("model.layerss.3.w", None),
        ("model.Layers.3.w", None),
        ("h3.w", None),
        ("model.layers.-3.w", None),
        ("model.layers.3_0.w", None),
        ("model.layers.³.w", None),
        ("model.layers.٣.w", None),
        ("3.layers", None),
        ("lm_head", None),
        ("", None),
    ],
)
def test_what_a_layer_is(name, layer):
    for number in (0, 1, 2, 3, 9, 10, 11, 30):
        keep = filters.layers(number, number + 1)
        expected = number == layer or (number == 9 and ".9." in name)
        assert keep(name) is expected
        if _native.core is not None:
            assert _native.core.match_rule(keep.rule(), name) is expected


@pytest.mark.parametrize(
    ("prefix", "name", "expected"),
    [
        ("model.layers.1", "model.layers.1.w", True),
        ("model.layers.1", "model.layers.1", True),
        ("model.layers.1", "model.layers.10.w", False),
        ("model.layers.1", "model.layers.1_0", False),
        ("model.layers.1.", "model.layers.1.w", True),
        ("model.layers.1.", "model.layers.1", False),
        ("model.layers.1", "x.model.layers.1.w", False),
        ("m", "model", False),
        ("model", "model", True),
        ("model.", "model.", True),
        ("é", "é.w", True),
    ],
)
def test_what_lies_below_a_prefix(prefix, name, expected):
    keep = filters.prefixes(prefix)
    assert keep(name) is expected
    if _native.core is not None:
        assert _native.core.match_rule(keep.rule(), name) is expected


@pytest.mark.parametrize(
    ("name", "scales_too", "weights_only"),
    [
        ("model.layers.3.mlp.experts.1.gate_proj.weight", True, True),
        ("model.layers.3.mlp.experts.2.gate_proj.weight", False, False),
        ("model.layers.3.mlp.experts.12.gate_proj.weight", False, False),
        ("model.layers.3.mlp.experts.2.w1.weight_packed", False, False),
        ("model.layers.3.mlp.experts.2.w1.qweight", False, False),
        ("model.layers.3.mlp.experts.2.gate_proj.weight_scale", True, False),
        ("model.layers.3.mlp.experts.2.gate_proj.bias", True, False),
        ("model.layers.3.mlp.experts.2", True, False),
        ("experts.01.weight", True, True),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", True, True),
        ("model.layers.3.mlp.experts.gate_up_proj", True, True),
        ("model.layers.3.mlp.gate.weight", True, True),
        ("model.layers.2.self_attn.q_proj.weight", True, True),
        ("experts.9.experts.1.weight", False, False),
    ],
)
def test_which_expert_a_name_belongs_to(name, scales_too, weights_only):
    for keep_scales, expected in ((True, scales_too), (False, weights_only)):
        keep = filters.experts([1, 0], keep_scales=keep_scales)
        assert keep(name) is expected
        if _native.core is not None:
            assert _native.core.match_rule(keep.rule(), name) is expected


@pytest.mark.parametrize("ids", [1, [True], ["1"], [1.0], None, "12"])
def test_experts_takes_integers(ids):
    with pytest.raises(TypeError):
        filters.experts(ids)


@pytest.mark.parametrize("weight_map", [["a"], "a", {"a": 1}, {1: "a"}, None])
def test_indexed_takes_a_mapping(weight_map):
    with pytest.raises(TypeError):
        filters.indexed(weight_map)


@pytest.mark.parametrize("number", [-1, 2**64 - 1])
def test_no_number_of_an_expert(number):
    with pytest.raises(ValueError, match="no number of an expert"):
        filters.experts([number])


def test_the_names_of_an_index(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    for form in (path, str(path)):
        assert filters.from_index(form) == filters.indexed(
            {"a": "1.safetensors", "b": "2.safetensors"}
        )


@pytest.mark.parametrize(
    ("name", "filename", "expected"),
    [
        ("a", "/m/1.safetensors", True),
        ("a", "1.safetensors", True),
        ("a", "/m/2.safetensors", False),  # a stale copy
        ("b", "/m/2.safetensors", True),
        ("c", "/m/1.safetensors", False),
        ("a", "/blobs/0123456789abcdef", True),  # the index does not know this file
        ("c", "/blobs/0123456789abcdef", False),
        ("a", None, True),
        ("c", None, False),
    ],
)
def test_what_an_index_keeps(tmp_path, name, filename, expected):
    keep = filters.indexed({"a": "sub/1.safetensors", "b": "2.safetensors"})
    assert keep(TensorKey(name, "U8", (), 1, filename)) is expected
    if _native.core is not None and filename is not None:
        folder = tmp_path / "m"
        folder.mkdir()
        path = folder / filename.rpartition("/")[2]
        write_raw(path, [(name, "U8", (1,), b"x")])
        for _ in range(3):  # and from the cache of headers
            handle = stx_patch.safe_open(str(path), include_keys={name})
            assert handle.keys() == [name]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", stx_patch.StxFilterWarning)
                assert stx_patch.safe_open(str(path), tensor_filter=keep).keys() == (
                    [name] if expected else []
                )


def test_one_header_in_two_files_of_an_index(tmp_path):
    """Two names of one file are one header and two questions."""
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    write_raw(first, [("a", "U8", (1,), b"x")])
    os.link(first, second)
    keep = filters.indexed({"a": "1.safetensors", "b": "2.safetensors"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stx_patch.StxFilterWarning)
        for _ in range(4):
            assert stx_patch.safe_open(first, tensor_filter=keep).keys() == ["a"]
            assert stx_patch.safe_open(second, tensor_filter=keep).keys() == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_what_is_no_index_says_so(tmp_path, text):
    path = tmp_path / "index.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path} is no index"):
        filters.from_index(path)
    with pytest.raises(FileNotFoundError):
        filters.from_index(tmp_path / "missing.json")


# --- filters as objects ---

OBJECTS = """
OBJECTS = [
    filters.prefixes("b", "a"),
    filters.names({"z", "a", "m", "k", "b", "q"}),
    filters.glob("a*", "[b]"),
    filters.regex("^x(y|z)$"),
    filters.layers(1, 3),
    filters.experts([3, 1, 100, 17]),
    filters.indexed({"z": "2.safetensors", "a": "sub/1.safetensors", "m": "1.safetensors"}),
    filters.experts([3, 1, 100, 17], keep_scales=False),
    filters.all_of("a*", {"z", "a", "m", "k"}, filters.layers(0, 1)),
    filters.any_of(frozenset(["q", "r", "s", "t", "u"]), ["a", "b"]),
    filters.none_of({"z": 1, "a": 2}),
    filters.all_of(),
    filters.any_of(filters.all_of(filters.none_of("é", "'", '"'))),
]
"""
_made = {"filters": filters}
exec(OBJECTS, _made)
each_object = pytest.mark.parametrize("made", _made["OBJECTS"], ids=lambda made: repr(made)[8:40])


@each_object
def test_a_filter_pickles_copies_and_compares(made):
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        copied = pickle.loads(pickle.dumps(made, protocol))
        assert copied == made and type(copied) is type(made)
        assert repr(copied) == repr(made) and hash(copied) == hash(made)
        assert copied.digest() == made.digest()
    assert made != "a" and made != filters.names(["something else"])
    assert isinstance(made, filters.Filter) and callable(made)
    assert len(made.digest()) == 64 and int(made.digest(), 16) >= 0
    with pytest.raises(AttributeError):
        made.something = 1


@each_object
def test_the_repr_makes_the_filter_again(made):
    assert eval(repr(made), {"filters": filters}) == made


def test_digests_differ():
    digests = {made.digest() for made in _made["OBJECTS"]}
    assert len(digests) == len(_made["OBJECTS"])


def test_reprs_and_digests_are_the_same_in_every_process():
    expected = "".join(f"{made!r} {made.digest()}\n" for made in _made["OBJECTS"])
    code = f"""
import sys
from stx_patch import filters
{OBJECTS}
for made in OBJECTS:
    print(repr(made), made.digest())
assert "torch" not in sys.modules and "safetensors" not in sys.modules
"""
    environment = {"PYTHONIOENCODING": "utf-8"}
    for seed in ("0", "1", "12345"):
        run_python(code, env={**environment, "PYTHONHASHSEED": seed}, expect_output=expected)


def test_equal_filters_have_equal_digests():
    for one, other in [
        (filters.names(["a", "b"]), filters.names(("b", "a", "a"))),
        (filters.any_of({"a", "b"}), filters.any_of(frozenset(["b", "a"]))),
        (filters.any_of({"a": 1, "b": 2}), filters.any_of({"b": 2, "a": 1})),
        (filters.glob("a"), filters.glob(type("Text", (str,), {})("a"))),
    ]:
        assert one == other
        assert hash(one) == hash(other) and one.digest() == other.digest()


def test_filters_that_mean_something_else_are_not_equal():
    assert filters.glob("a") != filters.prefixes("a") != filters.names(["a"])
    assert filters.layers(0, 1) != filters.layers(0, 2)
    assert filters.all_of("a") != filters.any_of("a")


def test_a_callable_has_no_digest():
    with_callable = filters.any_of("a", filters.all_of(str.isupper))
    with pytest.raises(TypeError, match="digest"):
        with_callable.digest()
    assert with_callable("A") and not with_callable("b")
    assert filters.regex("a").digest()


def test_a_filter_does_not_change_with_what_it_was_made_of():
    names, patterns = {"a"}, ["a"]
    made = [filters.names(names), filters.any_of(names), filters.any_of(patterns)]
    digests = [one.digest() for one in made]
    names.add("b")
    patterns.append("b")
    assert [one("b") for one in made] == [False, False, False]
    assert [one.digest() for one in made] == digests


@pytest.mark.parametrize(
    "make",
    [
        lambda: filters.names("abc"),
        lambda: filters.names(b"abc"),
        lambda: filters.names([1]),
        lambda: filters.names(3),
        lambda: filters.prefixes(3),
        lambda: filters.prefixes(["a"]),
        lambda: filters.glob(3),
        lambda: filters.glob(["a"]),
        lambda: filters.regex(3),
        lambda: filters.regex(b"a"),
        lambda: filters.layers("0", 1),
        lambda: filters.layers(0, 1.0),
        lambda: filters.layers(True, 2),
        lambda: filters.layers(0),
    ],
)
def test_filters_refuse_wrong_types(make):
    with pytest.raises(TypeError):
        make()


def test_filters_refuse_wrong_values():
    for start, stop in [(-1, 1), (2, 1), (0, 2**64)]:
        with pytest.raises(ValueError):
            filters.layers(start, stop)
    with pytest.raises(ValueError):
        filters.prefixes("a", "")
    with pytest.raises(Exception, match=r"unterminated|missing"):
        filters.regex("(")


# --- the question ---


@routes
def test_it_is_asked_once_about_each_entry_in_file_order(path, route):
    keys = []

    def keep(key):
        keys.append(key)
        return True

    load(route, path, keep)
    assert keys == ORDER
    for key, (name, dtype, shape, data) in zip(keys, ENTRIES, strict=True):
        assert isinstance(key, str) and type(key) is TensorKey
        assert (key, key.dtype, key.shape, key.nbytes) == (name, dtype, shape, len(data))
        assert type(key.shape) is tuple and all(type(extent) is int for extent in key.shape)
        assert type(key.nbytes) is int and type(key.dtype) is str
        assert key.filename == (None if route == "load" else str(path))
        assert {name: 1}[key] == 1 and key in {name} and hash(key) == hash(name)
        copied = pickle.loads(pickle.dumps(key))
        assert copied == key and vars_of(copied) == vars_of(key)
        assert key.upper() == name.upper()


def vars_of(key):
    return key.dtype, key.shape, key.nbytes, key.filename


@pytest.mark.parametrize("given_as", [str, Path], ids=["str", "Path"])
def test_the_filename_is_the_one_that_was_given(path, given_as, monkeypatch):
    seen = set()
    monkeypatch.chdir(path.parent)
    with stx_patch.patched(lambda key: seen.add(key.filename)):
        safetensors.safe_open(given_as(path.name), "pt")
        safetensors.safe_open(given_as(path.name), "np")
    assert seen == {path.name}


@pytest.mark.parametrize("route", sorted(ROUTES.keys() - {"load"}))
def test_it_is_asked_before_any_tensor_is_made(path, route):
    made = []

    def keep(key):
        stats = stx_patch.stats()
        made.append(stats.tensors_native + stats.tensors_stock)
        return True

    before = stx_patch.stats()
    load(route, path, keep)
    assert made == [before.tensors_native + before.tensors_stock] * len(ORDER)


@pytest.mark.parametrize("route", sorted(ROUTES.keys() - {"load"}))
def test_it_is_not_asked_again_by_the_handle(path, route):
    calls = []
    with stx_patch.patched(lambda key: calls.append(key) or "layers" in key):
        opener = stx_patch.safe_open if "own" in route else safetensors.safe_open
        framework = "np" if "numpy" in route else "pt"
        handle = opener(path, framework, backend="pread" if "pread" in route else "mmap")
        assert len(calls) == len(ORDER)
        handle.keys()
        handle.get_tensors()
        handle.get_tensor("model.layers.1.w")
        handle.get_slice("model.layers.1.w")
        assert len(calls) == len(ORDER)


@twins
def test_the_truth_value_decides(path, route):
    class Truth:
        def __init__(self, truth):
            self.truth = truth

        def __bool__(self):
            return self.truth

    answers = [0, 1, "", "no", None, [0], np.bool_(False), torch.tensor(True), Truth(False)]
    given = dict(zip(ORDER, answers, strict=True))
    assert_kept(route, path, given.get, [name for name in ORDER if given[name]])


@twins
def test_an_answer_without_a_truth_value_is_an_error(path, route):
    with pytest.raises(ValueError, match="ambiguous"):
        load(route, path, lambda key: np.zeros(2))
    with pytest.raises(RuntimeError, match="ambiguous"):
        load(route, path, lambda key: torch.zeros(2))


@twins
def test_a_combination_asks_no_more_than_it_must(path, route):
    calls = []

    def keep(key):
        calls.append(str(key))
        return True

    assert_kept(route, path, filters.all_of("lm_*", keep), ["lm_head"])
    assert calls == ["lm_head"]
    calls.clear()
    assert_kept(route, path, filters.any_of("model.*", keep), ORDER)
    assert calls == [name for name in ORDER if not name.startswith("model.")]


# --- what a filter raises ---


class Unusual(BaseException):
    pass


ERRORS = [
    ValueError,
    TypeError,
    KeyError,
    OSError,
    FileNotFoundError,
    ImportError,
    MemoryError,
    StopIteration,
    StopAsyncIteration,
    GeneratorExit,
    KeyboardInterrupt,
    SystemExit,
    AttributeError,
    NotImplementedError,
    RecursionError,
    safetensors.SafetensorError,
    Unusual,
]


def raiser(error, after=2):
    """A filter that raises `error` about the third entry, and a list of what it was asked."""
    calls = []

    def keep(key):
        calls.append(str(key))
        if len(calls) > after:
            raise error
        return True

    return keep, calls


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
@routes
def test_its_exception_comes_out_as_it_is(path, route, kind):
    error = kind("from the filter")
    keep, calls = raiser(error)
    before = stx_patch.stats()
    with pytest.raises(kind) as caught, stx_patch.patched(keep):
        ROUTES[route](path)
    assert caught.value is error
    assert error.__cause__ is None and error.__context__ is None
    frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert frames[-1] == "keep" and "test_its_exception_comes_out_as_it_is" in frames
    assert calls == ORDER[:3]  # nothing was asked again
    after = stx_patch.stats()
    assert after.tensors_native == before.tensors_native
    if route in NATIVE:
        assert after.fallbacks == before.fallbacks and after.opens == before.opens
        assert (after.keys_kept, after.keys_skipped) == (before.keys_kept, before.keys_skipped)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
@twins
def test_the_exception_of_one_of_several_filters(path, route, kind):
    for combine in (
        lambda keep: (filters.all_of("*", keep), None),
        lambda keep: (filters.any_of("x", keep), None),
        lambda keep: (filters.none_of("x", keep), None),
        lambda keep: ("*", keep),
        lambda keep: (keep, "*"),
    ):
        error = kind("from the filter")
        keep, calls = raiser(error, after=0)
        ambient, own = combine(keep)
        framework = "np" if "numpy" in route else "pt"
        with pytest.raises(kind) as caught, stx_patch.patched(ambient):
            safetensors.safe_open(path, framework, tensor_filter=own)
        assert caught.value is error and calls == ORDER[:1]


@twins
def test_the_exception_of_a_truth_value(path, route):
    error = KeyboardInterrupt()

    class Answer:
        def __bool__(self):
            raise error

    with pytest.raises(KeyboardInterrupt) as caught:
        load(route, path, lambda key: Answer())
    assert caught.value is error


@routes
def test_a_filter_that_raises_leaves_nothing_behind(path, route):
    keep, _ = raiser(ValueError())
    gc.collect()  # what earlier tests left in cycles
    descriptors = open_descriptors()
    for _ in range(3):
        try:
            load(route, path, keep)
        except ValueError as error:
            error.__traceback__ = None
        else:
            raise AssertionError
    gc.collect()
    assert mappings_of(path) == 0
    assert open_descriptors() == descriptors
    assert set(load(route, path, None)) == set(ORDER)


@routes
def test_a_filter_is_released_with_the_load(path, route):
    import weakref

    def keep(key):
        return True

    alive = weakref.ref(keep)
    load(route, path, keep)
    del keep
    gc.collect()
    assert alive() is None


ALLOCATING = {
    "native": lambda path: safetensors.safe_open(path, "pt").get_tensors(),
    "load_file": lambda path: safetensors.torch.load_file(path),
    "numpy": lambda path: safetensors.safe_open(path, "np").keys(),
}


@pytest.mark.parametrize("outcome", ["keeps", "raises", "no-truth"])
@pytest.mark.parametrize("route", ALLOCATING)
def test_asking_a_filter_leaks_nothing(path, route, outcome):
    error = ValueError()

    class Answer:
        def __bool__(self):
            raise error

    def keep(key):
        if outcome == "raises" and key == "a0":
            raise error
        return Answer() if outcome == "no-truth" and key == "a0" else key.nbytes > 4

    def ask():
        try:
            ALLOCATING[route](path)
        except ValueError:
            error.__traceback__ = error.__context__ = None

    def grown(times):
        for _ in range(times):
            ask()
        gc.collect()
        return sys.getallocatedblocks()

    with stx_patch.patched(filters.all_of("*", keep)):
        before = grown(50)
        assert grown(300) - before < 150  # less than one for two calls


def break_file(path, how):
    data = path.read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    broken = {
        "truncated": data[:-1],
        "header only": data[: 8 + header_bytes],
        "empty": b"",
        "no header": data[:8],
        "huge header": b"\xff" * 8 + data[8:],
        "no JSON": data[:8] + b"x" + data[9:],
        "longer": data + b"\0",
    }
    path.write_bytes(broken[how])


@pytest.mark.parametrize(
    "how",
    ["truncated", "header only", "empty", "no header", "huge header", "no JSON", "longer"],
)
@routes
def test_a_broken_file_fails_as_without_a_filter_and_is_not_asked_about(path, route, how):
    break_file(path, how)
    errors = []
    calls = []
    for tensor_filter in (None, calls.append, "*", set()):
        with pytest.raises(safetensors.SafetensorError) as caught:
            load(route, path, tensor_filter)
        errors.append((type(caught.value), str(caught.value)))
    assert len(set(errors)) == 1 and calls == []
    if "own" not in route:
        with pytest.raises(safetensors.SafetensorError) as caught:
            stock_of(route)(path)
        assert (type(caught.value), str(caught.value)) == errors[0]


def stock_of(route):
    """The same loading by stock alone."""
    if route == "load":
        return lambda path: STOCK.load(path.read_bytes())
    return lambda path: STOCK.safe_open(
        path,
        framework="np" if "numpy" in route else "pt",
        backend="pread" if "pread" in route else "mmap",
    )


# --- several filters, include_keys, strict_filter ---


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_the_filter_in_force_and_the_calls_own_are_anded(path, framework):
    with stx_patch.patched("model.*"):
        for opener in (safetensors.safe_open, stx_patch.safe_open):
            handle = opener(path, framework, tensor_filter=["*.w", "lm_head"])
            assert handle.offset_keys() == KEEP_LAYERS
            handle = opener(path, framework, include_keys=["lm_head", "model.norm"])
            assert handle.keys() == ["model.norm"]
            assert opener(path, framework).offset_keys() == [
                name for name in ORDER if name.startswith("model.")
            ]
        assert list(stx_patch.load_file(path, tensor_filter=lambda key: key.nbytes == 4)) == [
            "model.layers.10.w"
        ]
        loaded = safetensors.torch.load_file(path, tensor_filter={"lm_head", "model.norm"})
        assert list(loaded) == ["model.norm"]


@pytest.mark.parametrize(
    "given_as", [list, tuple, set, frozenset, dict.fromkeys, iter], ids=lambda given: str(given)
)
def test_include_keys_is_the_same_as_a_set(path, given_as):
    names = ["a[0]", "lm_head", "missing", "model.*"]
    expected = ["lm_head", "a[0]"]
    assert list(stx_patch.load_file(path, include_keys=given_as(names))) == expected
    assert stx_patch.safe_open(path, include_keys=given_as(names)).offset_keys() == expected
    handle = stx_patch.safe_open(path, "np", include_keys=given_as(names))
    assert handle.offset_keys() == expected
    with stx_patch.patched():
        loaded = safetensors.torch.load_file(path, include_keys=given_as(names))
        assert list(loaded) == expected


def test_include_keys_excludes_tensor_filter(path):
    for call in (
        stx_patch.load_file,
        stx_patch.safe_open,
        lambda path, **keywords: stx_patch.safe_open(path, "np", **keywords),
    ):
        with pytest.raises(ValueError, match="include_keys"):
            call(path, tensor_filter="*", include_keys=["a0"])
        with pytest.raises(ValueError, match="include_keys"):
            call(path, tensor_filter=[], include_keys=[])
        assert call(path, tensor_filter=None, include_keys=["a0"]) is not None


@pytest.mark.parametrize("mistake", ["a0", b"a0", 3, [3], [None], [b"a0"]], ids=repr)
def test_include_keys_refuses_what_is_no_collection_of_names(path, mistake):
    for call in (stx_patch.load_file, stx_patch.safe_open):
        with pytest.raises(TypeError):
            call(path, include_keys=mistake)


STRICT_ERRORS = {
    "set": ({"lm_head", "nope", "none"}, ["nope", "none"]),
    "dict": ({"nope": 1, "a0": 1}, ["nope"]),
    "names": (filters.names(["lm_head", "nope"]), ["nope"]),
    "glob": (["lm_*", "nope*"], ["nope*"]),
    "str": ("nope*", ["nope*"]),
    "filters.glob": (filters.glob("a*", "b*"), ["b*"]),
    "prefixes": (filters.prefixes("model", "decoder"), ["decoder"]),
    "any_of": (filters.any_of("lm_*", {"nope"}), ["nope"]),
    "all_of": (filters.all_of("*", filters.prefixes("nope")), ["nope"]),
}


def calls_with(path, **keywords):
    """Each of our functions, as something to call."""
    return [
        lambda: stx_patch.load_file(path, **keywords),
        lambda: stx_patch.load_file(path, backend="pread", **keywords),
        lambda: stx_patch.safe_open(path, **keywords),
        lambda: stx_patch.safe_open(path, "np", **keywords),
    ]


@pytest.mark.parametrize("form", STRICT_ERRORS)
def test_strict_filter_names_what_matches_nothing(path, form):
    tensor_filter, unmatched = STRICT_ERRORS[form]
    for call in calls_with(path, tensor_filter=tensor_filter, strict_filter=True):
        with pytest.raises(safetensors.SafetensorError) as caught:
            call()
        assert all(name in str(caught.value) for name in unmatched)
        assert path.name in str(caught.value)
        assert "lm_head" not in str(caught.value)
    for call in calls_with(path, include_keys=["a0", "nope"], strict_filter=True):
        with pytest.raises(safetensors.SafetensorError, match="nope"):
            call()


@pytest.mark.parametrize(
    "tensor_filter",
    [
        *([], set(), "", lambda key: False),
        *(filters.layers(99, 100), filters.any_of(), filters.none_of("*"), filters.regex("nope")),
    ],
    ids=lambda tensor_filter: type(tensor_filter).__name__,
)
def test_strict_filter_refuses_an_empty_result(path, tensor_filter):
    for call in calls_with(path, tensor_filter=tensor_filter, strict_filter=True):
        with pytest.raises(safetensors.SafetensorError), warnings.catch_warnings():
            warnings.simplefilter("error")
            call()


def test_strict_filter_accepts_what_matches(path):
    for tensor_filter in (
        None,
        "*",
        ["lm_*", "a[0]"],
        {"lm_head", "*"},
        filters.prefixes("model"),
        lambda key: key == "a0",
        filters.all_of("model.*", filters.layers(0, 1)),
        filters.none_of("nothing has this name"),
    ):
        for call in calls_with(path, tensor_filter=tensor_filter, strict_filter=True):
            call()


def test_strict_filter_looks_at_the_file_and_not_at_the_filter_in_force(path):
    """A name that only the ambient filter leaves out is there: strictness is about mistakes."""
    with stx_patch.patched("model.*"):
        for call in calls_with(path, include_keys=["lm_head", "model.norm"], strict_filter=True):
            call()
        for call in calls_with(path, include_keys=["model.norm", "nope"], strict_filter=True):
            with pytest.raises(safetensors.SafetensorError, match="nope"):
                call()


def test_a_filter_in_force_is_never_strict(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tensor_filter in ({"nope"}, "nope*", [], filters.prefixes("nope")):
            with stx_patch.patched(tensor_filter):
                for route in sorted(ROUTES):
                    if not route.startswith("own"):
                        assert ROUTES[route](path) == {}


def test_strict_filter_is_native(path, monkeypatch):
    """It needs no second opening by stock to know the names."""

    class Poisoned:
        def __new__(cls, *arguments, **keywords):
            raise AssertionError("stock was asked to open a file")

    monkeypatch.setattr(stx_patch._stock, "safe_open", Poisoned)
    stx_patch.reset_stats()
    loaded = stx_patch.load_file(path, tensor_filter=["lm_*"], strict_filter=True)
    assert list(loaded) == ["lm_head"]
    assert stx_patch.stats().fallbacks == {}


# --- warnings ---


def caught_warnings(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return caught


def test_an_empty_set_asked_of_us_warns_once_where_it_was_asked(path):
    def load_file():
        stx_patch.load_file(path, tensor_filter=[])

    def safe_open():
        stx_patch.safe_open(path, tensor_filter={"nope"}).get_tensors()

    def numpy():
        stx_patch.safe_open(path, "np", tensor_filter={"nope"}).get_tensors()

    for call in (load_file, safe_open, numpy):
        (warning,) = caught_warnings(call)
        assert warning.category is StxFilterWarning and path.name in str(warning.message)
        assert warning.filename == __file__
        assert warning.lineno == call.__code__.co_firstlineno + 1


def test_what_keeps_something_does_not_warn(path, tmp_path):
    empty = write_raw(tmp_path / "empty.safetensors", [])
    for call in (
        lambda: stx_patch.load_file(path, tensor_filter={"lm_head", "nope"}),
        lambda: stx_patch.load_file(path, tensor_filter={"model.norm"}),  # of zero bytes
        lambda: stx_patch.load_file(empty),
        lambda: stx_patch.load_file(empty, tensor_filter="*"),
        lambda: stx_patch.safe_open(empty, "np", tensor_filter="*"),
    ):
        assert caught_warnings(call) == []


# --- what is left out does not exist ---

HANDLES = {
    "native": lambda path, **keywords: safetensors.safe_open(path, "pt", **keywords),
    "pread": lambda path, **keywords: safetensors.safe_open(
        path, "pt", backend="pread", **keywords
    ),
    "numpy": lambda path, **keywords: safetensors.safe_open(path, "np", **keywords),
    "own": lambda path, **keywords: stx_patch.safe_open(path, **keywords),
}
each_handle = pytest.mark.parametrize("handle_of", HANDLES.values(), ids=HANDLES)
KEPT = ["model.layers.1.w", "model.layers.10.w", "model.layers.0.w", "model.layers.2.w"]


@each_handle
def test_a_name_left_out_does_not_exist(path, handle_of):
    stock = STOCK.safe_open(path, "pt")
    with stx_patch.patched("model.layers.*"), handle_of(path) as handle:
        assert handle.keys() == sorted(KEPT)
        assert handle.offset_keys() == KEPT
        assert list(handle.get_tensors()) == KEPT and len(handle.get_tensors()) == len(KEPT)
        assert handle.metadata() == {"format": "pt"} == stock.metadata()
        for name in KEPT:
            assert handle.get_slice(name).get_shape() == stock.get_slice(name).get_shape()
            assert handle.get_slice(name).get_dtype() == stock.get_slice(name).get_dtype()
            assert list(handle.get_tensor(name).shape) == stock.get_slice(name).get_shape()
        for left_out in set(ORDER) - set(KEPT):
            expected = f"File does not contain tensor {left_out} (left out by tensor_filter)"
            for method in (handle.get_tensor, handle.get_slice):
                with pytest.raises(safetensors.SafetensorError) as caught:
                    method(left_out)
                assert str(caught.value) == expected
                assert type(caught.value) is safetensors.SafetensorError
        with pytest.raises(safetensors.SafetensorError) as caught:
            handle.get_tensor("missing")
        assert str(caught.value) == "File does not contain tensor missing"
    with pytest.raises(safetensors.SafetensorError, match=r"^File is closed$"):
        handle.keys()
    with pytest.raises(safetensors.SafetensorError, match=r"^File is closed$"):
        handle.get_tensor(KEPT[0])


@each_handle
def test_what_our_handles_tell_besides(path, handle_of):
    with stx_patch.patched("model.layers.*"):
        handle = handle_of(path)
    assert handle.total_tensor_size == sum(SIZES[name] for name in KEPT)
    for name, dtype, shape, data in ENTRIES:
        if name in KEPT:
            assert handle.get_dtype(name) == dtype
            assert handle.get_shape(name) == list(shape)
            assert handle.nbytes(name) == len(data)
        else:
            for method in (handle.get_dtype, handle.get_shape, handle.nbytes):
                with pytest.raises(safetensors.SafetensorError, match="left out by tensor_filter"):
                    method(name)


@each_handle
def test_a_filter_that_keeps_nothing_of_a_file_is_legal(path, handle_of):
    with stx_patch.patched([]), warnings.catch_warnings():
        warnings.simplefilter("ignore", StxFilterWarning)
        handle = handle_of(path)
    assert handle.keys() == handle.offset_keys() == []
    assert handle.get_tensors() == {} and handle.total_tensor_size == 0
    assert handle.metadata() == {"format": "pt"}
    with pytest.raises(safetensors.SafetensorError, match="left out"):
        handle.get_tensor("lm_head")


@each_handle
def test_a_filter_that_keeps_everything_changes_nothing(path, handle_of):
    with stx_patch.patched("*"):
        handle = handle_of(path)
    stock = STOCK.safe_open(path, "pt")
    assert handle.keys() == stock.keys() and handle.offset_keys() == ORDER
    assert handle.total_tensor_size == sum(SIZES.values())


@routes
def test_a_file_without_tensors(tmp_path, route):
    path = write_raw(tmp_path / "empty.safetensors", [], metadata={"a": "b"})
    calls = []
    assert load(route, path, calls.append) == {}
    assert calls == []


@routes
def test_duplicate_and_odd_names(tmp_path, route):
    names = ["", "\x00", "a\nb", "é", "𝄞", " ", "__metadata", "a/b", '"', "\\"]
    path = write_raw(tmp_path / "odd.safetensors", [(n, "U8", (1,), b"\1") for n in names])
    seen = []
    assert sorted(load(route, path, lambda key: seen.append(str(key)) or key != "é")) == sorted(
        set(names) - {"é"}
    )
    assert seen == names
    for name in names:
        assert list(load(route, path, {name})) == [name]
        assert list(load(route, path, filters.names([name]))) == [name]
        if name != "\\":
            assert name in load(route, path, [name])


def test_load_model_reports_what_a_filter_left_out(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_model(model, path)
    fresh = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    with stx_patch.patched("0.*") as report:
        with pytest.raises(RuntimeError, match=r"Missing key\(s\).*1\.bias.*1\.weight"):
            safetensors.torch.load_model(fresh, path)
        missing, unexpected = safetensors.torch.load_model(fresh, path, strict=False)
    assert (set(missing), unexpected) == ({"1.bias", "1.weight"}, [])
    assert torch.equal(fresh[0].weight, model[0].weight)
    assert not torch.equal(fresh[1].weight, model[1].weight)
    assert report.fallbacks == {} and report.keys_skipped == 4


def test_tensors_that_stock_makes_for_a_native_handle_are_held_to_the_filter(tmp_path):
    """A dtype that goes to stock inside a native handle: kept or left out like any other."""
    entries = [("six", "F6_E2M3", (4,), bytes(3)), ("plain", "U8", (1,), b"\1")]
    path = write_raw(tmp_path / "six.safetensors", entries)
    with stx_patch.patched(["plain"]) as report:
        assert list(safetensors.torch.load_file(path)) == ["plain"]
        with pytest.raises(safetensors.SafetensorError, match="left out"):
            safetensors.safe_open(path, "pt").get_tensor("six")
    assert report.fallbacks == {}


def test_methods_of_a_newer_stock_are_held_to_the_filter(path):
    newer = [name for name in ("prefetch", "get_tensor_meta") if hasattr(STOCK.safe_open, name)]
    with stx_patch.patched("model.*"):
        for framework in ("pt", "np"):
            handle = safetensors.safe_open(path, framework)
            for name in ("prefetch", "get_tensor_meta"):
                assert hasattr(handle, name) == (name in newer)
            if "get_tensor_meta" in newer:
                assert handle.get_tensor_meta("model.norm").shape == [0]
                with pytest.raises(safetensors.SafetensorError, match="left out by tensor_filter"):
                    handle.get_tensor_meta("lm_head")
            if "prefetch" in newer:
                with pytest.raises(safetensors.SafetensorError, match="left out by tensor_filter"):
                    handle.prefetch({"model.norm": None, "lm_head": None})


def test_a_plan_that_names_nothing_means_what_is_kept():
    """stock's `prefetch(None)` loads everything; behind a filter everything is what it keeps."""
    plans = []

    class Handle:
        """As safetensors 0.9 has it."""

        def keys(self):
            return ["a", "b", "c"]

        def prefetch(self, plan=None, *, device=None, threads=8):
            plans.append((plan, device, threads))
            return "loader"

    handle = _origin.FilteredHandle(Handle(), ["c", "a"])
    assert handle.prefetch() == handle.prefetch(None, device="cuda:0", threads=2) == "loader"
    assert handle.prefetch({"a": slice(0, 1)}) == "loader"
    assert plans == [
        ({"c": None, "a": None}, None, 8),
        ({"c": None, "a": None}, "cuda:0", 2),
        ({"a": slice(0, 1)}, None, 8),
    ]
    with pytest.raises(safetensors.SafetensorError, match="left out"):
        handle.prefetch({"b": None})
    with pytest.raises(TypeError):
        handle.prefetch({}, None)  # keywords only, as stock's
    assert len(plans) == 3


# --- what is left out is not read ---

MIB = 1 << 20
PART_BYTES = 4 * MIB
APART_BYTES = 64 * MIB
PARTS = ["kept.0", "out.0", "kept.1", "out.1", "kept.2"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Kept and excluded tensors of real bytes, 64 MiB of holes apart: path and places of each."""
    folder = tmp_path_factory.mktemp("large")
    path = folder / "large.safetensors"
    entries, at, places = {}, 0, {}
    for i, name in enumerate(PARTS):
        entries[name] = {
            "dtype": "U8",
            "shape": [PART_BYTES],
            "data_offsets": [at, at + PART_BYTES],
        }
        places[name] = at
        at += PART_BYTES
        if i + 1 < len(PARTS):
            entries[f"hole.{i}"] = {
                "dtype": "U8",
                "shape": [APART_BYTES],
                "data_offsets": [at, at + APART_BYTES],
            }
            at += APART_BYTES
    import json

    text = json.dumps(entries).encode()
    text += b" " * (4096 - 8 - len(text))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i, name in enumerate(PARTS):
            places[name] += 4096
            file.seek(places[name])
            file.write(os.urandom(PART_BYTES - 1) + bytes([i]))
        file.truncate(4096 + at)
        file.flush()
        os.fsync(file.fileno())
    yield path, places
    path.unlink()


def touch(tensors):
    """Use every byte."""
    return {name: int(tensor.to(torch.int64).sum()) for name, tensor in tensors.items()}


def load_whole(path, keep):
    return safetensors.torch.load_file(path, tensor_filter=keep)


def load_one_by_one(path, keep):
    with safetensors.safe_open(path, "pt", tensor_filter=keep) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


def load_slices(path, keep):
    with safetensors.safe_open(path, "pt", tensor_filter=keep) as handle:
        return {name: handle.get_slice(name)[:] for name in handle.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    "keep", ["kept.*", {"kept.0", "kept.1", "kept.2"}, lambda key: key[:4] == "kept"]
)
@pytest.mark.parametrize("loader", [load_whole, load_one_by_one, load_slices])
def test_what_is_left_out_is_not_read(large, loader, keep):
    path, places = large
    kept_names = [name for name in PARTS if name.startswith("kept")]
    kept_bytes = len(kept_names) * PART_BYTES
    cold = drop_from_cache(path)
    with stx_patch.patched() as report:
        sums = touch(loader(path, keep))
        settle()
    assert sorted(sums) == kept_names
    assert report.fallbacks == {} and report.opens == 1
    assert (report.keys_kept, report.keys_skipped) == (3, len(PARTS) - 3 + len(PARTS) - 1)
    assert report.bytes_kept == kept_bytes
    assert report.bytes_wanted == kept_bytes
    assert report.bytes_read <= 1.1 * kept_bytes
    assert report.bytes_over_read <= 0.1 * kept_bytes
    if not cold:  # a file system that keeps its pages (tmpfs): the counters are all there is
        return
    assert (report.files_cold, report.files_warm) == (1, 0)
    cache = PageCache(path)
    try:
        size = path.stat().st_size
        resident = cache.resident_bytes(0, size)
        for name, begin in places.items():
            here = cache.resident_bytes(begin, begin + PART_BYTES)
            if name in kept_names:
                assert here == PART_BYTES, name
            else:
                assert here <= 0.02 * PART_BYTES, name
        assert resident <= 1.1 * kept_bytes
    finally:
        cache.close()


def test_what_is_left_out_is_not_read_by_stock_either(large):
    """Where stock serves, it is asked for the kept tensors alone."""
    path, places = large
    cold = drop_from_cache(path)
    with stx_patch.patched("kept.*") as report:
        tensors = safetensors.numpy.load_file(path)
    assert sorted(tensors) == ["kept.0", "kept.1", "kept.2"]
    assert report.fallbacks == {"framework np": 1} and report.tensors_stock == 3
    if cold:
        assert_not_read(path, places)


@pytest.mark.parametrize("direct_io", ["on", "off"])
def test_what_is_left_out_is_not_read_into_memory_of_our_own(large, direct_io):
    path, places = large
    cold = drop_from_cache(path)
    with stx_patch.patched("kept.*", direct_io=direct_io) as report:
        tensors = safetensors.torch.load_file(path, backend="pread")
    assert sorted(tensors) == ["kept.0", "kept.1", "kept.2"]
    assert report.fallbacks == {} and report.tensors_native == 3
    assert 3 * PART_BYTES <= report.bytes_read <= 3 * PART_BYTES + MIB
    if cold:
        assert_not_read(path, places)


def assert_not_read(path, places):
    cache = PageCache(path)
    try:
        for name in ("out.0", "out.1"):
            begin = places[name]
            assert cache.resident_bytes(begin, begin + PART_BYTES) == 0
    finally:
        cache.close()


def test_opening_reads_the_header_and_nothing_else(large):
    path, places = large
    cold = drop_from_cache(path)
    with stx_patch.patched(["kept.*"]) as report:
        handle = safetensors.safe_open(path, "pt")
        handle.keys()
        handle.metadata()
        slices = [handle.get_slice(name) for name in handle.keys()]  # noqa: SIM118
        assert [one.get_shape() for one in slices] == [[PART_BYTES]] * 3
    assert report.bytes_read <= MIB and report.tensors_native == 0
    if cold:
        cache = PageCache(path)
        try:
            for begin in places.values():
                assert cache.resident_bytes(begin + MIB, begin + PART_BYTES) == 0
        finally:
            cache.close()


def test_the_measure_sees_what_is_read(large):
    """The check above is not blind: what stock's user touches shows as resident."""
    path, places = large
    if not drop_from_cache(path):
        return
    with STOCK.safe_open(path, "pt") as handle:
        handle.get_tensor("out.1").sum()
    cache = PageCache(path)
    try:
        begin = places["out.1"]
        assert cache.resident_bytes(begin, begin + PART_BYTES) == PART_BYTES
        assert cache.resident_bytes(places["kept.1"], places["kept.1"] + PART_BYTES) == 0
    finally:
        cache.close()


def test_python_sees_no_module_of_ours_in_a_filters_way():
    """A filter written against plain str works unchanged on what it is given."""
    key = TensorKey("a.b.c", "F32", (1,), 4, None)
    assert key.split(".") == ["a", "b", "c"] and key.rpartition(".")[0] == "a.b"
    assert f"{key}" == "a.b.c" and str(key) == "a.b.c" and repr(key) == "'a.b.c'"
    assert key == "a.b.c" and sorted([key, "a"]) == ["a", "a.b.c"]
    assert sys.intern(str(key)) == "a.b.c"
    with pytest.raises(AttributeError):
        key.something = 1
