"""Proves: the core and its Python twin keep the same names, and globs are fnmatch's."""

import fnmatch
import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stx_patch import _C, filters
from stx_patch._filter import TensorKey, make_rule, matches

EXAMPLES = settings(max_examples=500, deadline=None, derandomize=True)

LETTERS = st.sampled_from([*"aabc.-_01", "é", "🦙", "\0", "\n", "A", " "])
SPECIAL = st.sampled_from(
    ["*", "*", "?", "[", "]", "!", "-", "^", "\\", "&&", "~~", "||", "--", "[!", "]]", "[]", "{,}"]
)
SETS = st.builds(
    "[{}{}]".format,
    st.sampled_from(["", "!", "^", "]", "!]", "-", "!-"]),
    st.lists(LETTERS | SPECIAL | st.sampled_from(["a-c", "c-a", "à-ÿ", "0-9", "!-~"]), max_size=4)
    .map("".join),
)  # fmt: skip
TEXTS = st.lists(LETTERS, max_size=8).map("".join)
PATTERNS = st.lists(LETTERS | SPECIAL | SETS, max_size=7).map("".join)

WORDS = st.sampled_from(
    ["layers", "layer", "blocks", "block", "h", "model", "layersx", "Layers", "", "w", "hh"]
)
NUMBERS = st.sampled_from(
    [
        "0", "1", "2", "10", "007", "-1", "+1", "1x", "1_0", "", "٣", "²", " 1", "1 ",
        "18446744073709551615", "18446744073709551616", "9" * 30, "0" * 40 + "1",
    ]
)  # fmt: skip
NAMES = st.lists(WORDS | NUMBERS | TEXTS, max_size=6).map(".".join)
BOUNDS = st.sampled_from([0, 1, 2, 3, 8, 11, 2**63, 2**64 - 2, 2**64 - 1])


def twins(rule, name):
    """What both say; they have to agree."""
    core = _C.match_rule(rule, name)
    assert core is matches(rule, TensorKey(name, "", (), 0, None))
    return core


@st.composite
def patterns_and_names(draw):
    """A pattern, and a name that often matches it: the pattern with its specials filled in."""
    pattern = draw(PATTERNS)
    if draw(st.booleans()):
        return pattern, draw(TEXTS | PATTERNS)
    filled = [draw(TEXTS) if character in "*?" else character for character in pattern]
    return pattern, "".join(filled)


@EXAMPLES
@given(pair=patterns_and_names())
@example(pair=("[a-]", "-"))
@example(pair=("[a-c-e]", "-"))
@example(pair=("[c-a-e]", "d"))
@example(pair=("[--a]", "a"))
@example(pair=("[]-a]", "^"))
@example(pair=("[!]-a]x", "bx"))
@example(pair=("[^a]", "^"))
@example(pair=("[\\]", "\\"))
@example(pair=("[a&&b]", "&"))
@example(pair=("[!]", "[!]"))
@example(pair=("a\n*", "a\n\n"))
@example(pair=("?", "🦙"))
def test_globs_are_fnmatch(pair):
    pattern, name = pair
    expected = name == pattern or fnmatch.fnmatchcase(name, pattern)
    assert twins(("glob", (pattern,)), name) == expected
    assert filters.glob(pattern)(name) == expected


def test_every_short_set():
    """All sets of up to four characters of the seven that matter, against some names."""
    names = ["a", "b", "-", "]", "!", "^", "[", "", "ab", "\\"]
    for length in range(5):
        for inner in itertools.product("ac-]!^\\", repeat=length):
            pattern = f"[{''.join(inner)}]"
            for name in names:
                expected = name == pattern or fnmatch.fnmatchcase(name, pattern)
                assert _C.match_rule(("glob", (pattern,)), name) == expected, (pattern, name)


@EXAMPLES
@given(prefix=NAMES | TEXTS, name=NAMES | TEXTS, joined=st.booleans())
def test_prefixes(prefix, name, joined):
    whole = prefix + name if joined else name
    below = whole.startswith(prefix) and (
        whole == prefix or prefix.endswith(".") or whole[len(prefix)] == "."
    )
    assert twins(("prefixes", (prefix,)), whole) == below
    assert twins(("prefixes", ("zzz", prefix)), whole) == below
    assert not twins(("prefixes", ()), whole)


@EXAMPLES
@given(name=NAMES, start=BOUNDS, stop=BOUNDS)
@example(name="layers.18446744073709551615.w", start=0, stop=2**64 - 1)
@example(name="layers.18446744073709551616.w", start=0, stop=2**64 - 1)
@example(name="layers.layers.1", start=1, stop=2)
@example(name="h.1", start=1, stop=2)
@example(name=".h.1.", start=1, stop=2)
def test_layers(name, start, stop):
    components = name.split(".")
    expected = any(
        word in ("layers", "layer", "blocks", "block", "h")
        and number.isascii()
        and number.isdigit()
        and start <= int(number) < stop
        for word, number in itertools.pairwise(components)
    )
    assert twins(("layers", start, stop), name) == expected


RULES = st.recursive(
    st.one_of(
        st.lists(PATTERNS, max_size=3).map(lambda texts: ("glob", tuple(texts))),
        st.lists(NAMES, max_size=3).map(lambda texts: ("prefixes", tuple(texts))),
        st.lists(NAMES | TEXTS, max_size=3).map(lambda texts: ("names", frozenset(texts))),
        st.tuples(st.just("layers"), BOUNDS, BOUNDS),
        st.sampled_from(["a", "1", ".", ""]).map(lambda part: ("call", ContainsPart(part))),
    ),
    lambda rules: st.tuples(
        st.sampled_from(["all", "any", "none"]), st.lists(rules, max_size=3).map(tuple)
    ),
    max_leaves=8,
)


class ContainsPart:
    """A callable of a filter that answers with any true or false object."""

    def __init__(self, part):
        self.part = part

    def __call__(self, key):
        return [self.part] if self.part in key else ""

    def __repr__(self):
        return f"ContainsPart({self.part!r})"


@EXAMPLES
@given(rule=RULES, name=NAMES | TEXTS)
@example(rule=("all", ()), name="x")
@example(rule=("any", ()), name="x")
@example(rule=("none", ()), name="x")
def test_combinations(rule, name):
    twins(rule, name)


@EXAMPLES
@given(names=st.sets(NAMES | TEXTS, max_size=4), name=NAMES | TEXTS)
def test_exact_names(names, name):
    assert twins(make_rule(names), name) == (name in names)
    assert twins(make_rule(dict.fromkeys(names)), name) == (name in names)


def test_a_star_heavy_pattern_is_quick():
    """Time is at most the product of the lengths: this would be 2**60 steps of backtracking."""
    assert not _C.match_rule(("glob", ("*a" * 60 + "b",)), "a" * 4000)
    assert _C.match_rule(("glob", ("*a" * 60,)), "a" * 4000)


@pytest.mark.parametrize(
    "rule",
    [
        ("glob", ("\ud800",)),
        ("glob", (1,)),
        ("glob", 1),
        ("layers", -1, 2),
        ("layers", 0, 2**64),
        ("layers", 0),
        ("sort", ()),
        (),
        1,
        ("all", (1,)),
        ("all", 1),
        ("all", (("all", (("glob", ("\ud800",)),)),)),
    ],
    ids=repr,
)
def test_a_rule_that_is_none_raises(rule):
    with pytest.raises(Exception) as raised:
        _C.match_rule(rule, "name")
    assert not isinstance(raised.value, SystemError) or "bad argument" in str(raised.value)
