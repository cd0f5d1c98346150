"""Makes the fuzzer's files: each a function of (seed, index), valid first, then damaged.

A case begins as a `Draft`: the entries and other members of a header, every name and number kept
as the JSON text that will stand in the file, so that damage can put there what no JSON library
would write. The draft is damaged, written out as text, the text is damaged, a length and data are
put around it, and the whole is damaged (damage.py). A draft without damage is a file that the
format allows, unless one of its unread numbers is beyond a double or its nesting beyond stock's.

Does not compare anything (differential.py does) and knows neither safetensors nor torch.
"""

import math
import random
import struct
from dataclasses import dataclass, field

from helpers import DTYPE_BITS

PREFIX = struct.Struct("<Q")
PIECE_BYTES = 65536  # csrc/json_simdjson.cpp parses headers of more than two in pieces
LONG_SHARE = 1 / 25

# As JSON spells them, without the quotes. No two are the same name.
NAMES = [
    "", "a", "b", "w.", "layers.0.w", "layers.10.w", "é", "\\u00e8", "ü.ü", "🦙", "\\ud83e\\udd9a",
    "\\u0000", "a\\u0000b", "a\\u0000", "\\n", "\\t\\b\\f\\r", '\\"', "\\\\", "\\/", "/x",
    '},\\"', "},", '\\"},\\"x', "{", "}", "[-0", " ", "  ", "\x7f", "\ufffe\uffff",
    "\U0010ffff", "\\udbff\\udffe", "__metadata_", "__Metadata__", "dtype", "shape", "data_offsets",
    "\u202e", "\u2028", "e\u0301", "\ufeff", "-0", "null", "//", "/* */", "0", "00", "\\u0061a",
    "n" * 130, "é" * 70, "long." * 300,
]  # fmt: skip

# Members that may stand in a valid header, each as JSON text.
METADATA = [
    '"__metadata__":{}', '"__metadata__":null', '"__metadata__":{"format":"pt"}',
    '"__metadata__":{"a":"b","c":"d","e":"f"}', '"__metadata__":{"k":"1","k":"2"}',
    '"__metadata__":{"k":"1","\\u006b":"2","l":""}', '"__metadata__":{"":"","\\u0000":"\\u0000"}',
    '"__metadata__":{"é":"🦙","\\n":"\\"\\\\"}', '"__metadata__":{"a":"},","},":"},"}',
    '"\\u005f_metadata__":{"k":"v"}', '"__metadata__" : { "k" : "[-0]" }',
    '"__metadata__":{"\\ud83d\\ude00":"\\/"}',
]  # fmt: skip

# Fields that nobody reads. make_unread() has more.
UNREAD = [
    '"x":1', '"x":-1', '"x":1.5e-300', '"x":null', '"x":[1,{"a":2}]', '"x":{"y":{},"z":1}',
    '"x":[{},{}]', '"x":"\\ud83d\\ude00"', '"":[]', '"x":1,"x":2', '"Dtype":"U8"', '"x":false',
    '"x":{"dtype":"U8","dtype":1}', '"x":"},"', '"},":"},"', '"x":"\\u2028"', '"__metadata__":{}',
    '"x":"\\u0000"', '"x\\u0000":""', '"\\udbff\\udfff":"\U0010ffff"', '"shape ":[]',
]  # fmt: skip

# Numbers whose value is near an edge of what 64 bits or a double hold.
EDGES = [
    "-0", "-0.0", "-0e9", "18446744073709551615", "18446744073709551616", "9223372036854775807",
    "9223372036854775808", "-9223372036854775808", "-9223372036854775809", "1e308", "1e309",
    "123456789012345678901234567890", "1.7976931348623157e308", "1.7976931348623158e308",
    "1.797693134862315807e308", "1.797693134862315808e308", "1.7976931348623159e308",
    "17976931348623157e292", "17976931348623158e292", "0.00017976931348623158e312", "5e-324",
    "2.2250738585072011e-308", "2e-324", "1e-999", "0e99999", "0e-99999999999999999999",
    "0e99999999999999999999", "1e-99999999999999999999", "1e99999999999999999999", "0.1e+1",
    "9007199254740993", "4.35", "1E5", "1e+005", "0.0000000000000000000000000000000000001",
]  # fmt: skip

SPACES = ["", "", "", "", " ", "  ", "\n", "\r\n\t", "\t", " \n  "]


@dataclass
class Entry:
    """A member of the header that describes a tensor; all parts are JSON text."""

    name: str
    dtype: str
    shape: list[str]
    offsets: list[str]
    unread: list[str] = field(default_factory=list)
    order: list[int] = field(default_factory=lambda: [0, 1, 2])
    instead: str | None = None  # of the whole object

    def fields(self) -> list[str]:
        named = [
            f'"dtype":{self.dtype}',
            f'"shape":[{",".join(self.shape)}]',
            f'"data_offsets":[{",".join(self.offsets)}]',
        ]
        return [named[i] for i in self.order] + self.unread

    def text(self) -> str:
        value = "{" + ",".join(self.fields()) + "}" if self.instead is None else self.instead
        return f'"{self.name}":{value}'


@dataclass
class Draft:
    """A header before it is text, and how many bytes of data come behind it."""

    members: list[Entry | str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=lambda: [""])
    before: str = ""
    inside: str = ""
    behind: str = ""
    data_bytes: int = 0
    is_long: bool = False

    def entries(self) -> list[Entry]:
        return [member for member in self.members if isinstance(member, Entry)]

    def text(self) -> bytes:
        """The header. A lone surrogate in U+DC80.. stands for a byte that is no UTF-8."""
        parts = [member if isinstance(member, str) else member.text() for member in self.members]
        gaps = self.gaps
        joined = "".join(
            gaps[i % len(gaps)] + ("," if i else "") + gaps[(i + 1) % len(gaps)] + part
            for i, part in enumerate(parts)
        )
        whole = f"{self.before}{{{self.inside}{joined}{gaps[0]}}}{self.behind}"
        return whole.encode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Case:
    """One file, and how it came about."""

    seed: int
    index: int
    damages: tuple[str, ...]
    content: bytes


def is_whole(dtype: str, shape: list[int]) -> bool:
    return DTYPE_BITS[dtype] * math.prod(shape) % 8 == 0


def make_shape(rng: random.Random, dtype: str) -> list[int]:
    shape = [rng.choice([0, 1, 1, 2, 2, 3, 4, 7]) for _ in range(rng.choice([0, 1, 1, 2, 2, 3]))]
    odd = rng.random()
    if odd < 0.01:
        shape = [1] * rng.choice([8, 63, 64, 65, 70])
    elif odd < 0.03:
        shape = rng.choice([[0, 2**40], [2**50, 0], [0, 2**31, 2**28], [3, 0, 2**40]])
    if not is_whole(dtype, shape):
        shape.append(rng.choice([4, 8]))
    return shape


def make_number(rng: random.Random) -> str:
    """Any JSON number."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(EDGES)
    sign = rng.choice(["", "-"])
    digits = str(rng.randrange(1, 10 ** rng.randint(1, 25)))
    if kind == 1:
        return f"{sign}{digits}"
    if kind == 2:
        return f"{sign}{digits}{'0' * rng.randint(0, 400)}e{-rng.randint(0, 400)}"
    if kind == 3:
        return f"{sign}0.{'0' * rng.randint(0, 400)}{digits}e{rng.randint(0, 700)}"
    exponent = rng.choice(["e", "E", "e+", "e-", "E-"]) + str(rng.randint(0, 330))
    return f"{sign}{digits[0]}.{digits}{exponent}"


def make_unread(rng: random.Random) -> str:
    """A field that nobody reads, as JSON text."""
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(UNREAD)
    if kind < 0.85:
        return f'"x":{make_number(rng)}'
    depth = rng.choice([*range(9, 19), rng.randint(19, 130)])
    if rng.random() < 0.5:
        return f'"x":{"[" * depth}{"]" * depth}'
    return '"x":{"":' + '{"":' * (depth - 1) + "0" + "}" * depth


def make_entry(rng: random.Random, name: str, begin: int) -> tuple[Entry, int]:
    """An entry of data from `begin` on, and where they end."""
    dtype = rng.choice(list(DTYPE_BITS))
    shape = make_shape(rng, dtype)
    end = begin + DTYPE_BITS[dtype] * math.prod(shape) // 8
    entry = Entry(name, f'"{dtype}"', [str(n) for n in shape], [str(begin), str(end)])
    if rng.random() < 0.2:
        rng.shuffle(entry.order)
    if rng.random() < 0.1:
        entry.unread.append(make_unread(rng))
    return entry, end


def make_small(rng: random.Random) -> Draft:
    """0 to 6 tensors, with whatever a valid header may have."""
    draft = Draft(gaps=[""] if rng.random() < 0.6 else rng.choices(SPACES, k=5))
    for name in rng.sample(NAMES, rng.choice([0, 1, 1, 2, 2, 3, 4, 5, 6])):
        plain = name if rng.random() < 0.5 else f"t{len(draft.members)}"
        entry, draft.data_bytes = make_entry(rng, plain, draft.data_bytes)
        draft.members.append(entry)
    if rng.random() < 0.3:
        rng.shuffle(draft.members)
    if rng.random() < 0.4:
        draft.members.insert(rng.randint(0, len(draft.members)), rng.choice(METADATA))
    draft.before = rng.choice(SPACES) if rng.random() < 0.1 else ""
    draft.behind = " " * rng.choice([0, 0, 0, 1, 3, 7]) if rng.random() < 0.9 else "\n\t\r "
    return draft


def inflate(rng: random.Random, draft: Draft, number: int) -> int:
    """One more member of many bytes; about how many."""
    size = rng.choice([3000, 9000, 20_000, 40_000])
    look = rng.choice(["x", "}", "},", "{}", ",", '\\"', '},\\"', "é", "\\u0061", "[-1,"])
    filler = look * (size // len(look))
    pairs = "{" + ",".join([f'"{i}}},":"{look}}},"' for i in range(size // 20)]) + "}"
    entry, draft.data_bytes = make_entry(rng, f"t{number}", draft.data_bytes)
    kind = rng.randrange(6)
    if kind == 0 and not any(isinstance(member, str) for member in draft.members):
        draft.members.append(f'"__metadata__":{pairs}')
    elif kind == 1:
        entry.name += filler
    elif kind == 2:
        entry.unread.append(f'"x":["{filler}"],"y":{{"z":{{}},"":0}},"z":"}},"')
    elif kind == 3:
        entry.unread.append('"x":[' + ",".join(['{"y":{},"z":0}'] * (size // 15)) + "]")
    elif kind == 4:
        entry.unread.append('"x":' + " " * size + "0")
    else:
        entry.unread.append(f'"x":{pairs}')
    draft.members.append(entry)
    return size


def make_many(rng: random.Random, draft: Draft) -> None:
    """Many short entries."""
    suffix = rng.choice(["", "},", "é"])
    for i in range(rng.choice([1700, 2200, 3100])):
        dtype = rng.choice(['"U8"', '"I8"', '"BOOL"'])
        draft.members.append(Entry(f"{i}{suffix}", dtype, ["1"], [str(i), str(i + 1)]))
    draft.data_bytes = len(draft.members)
    if rng.random() < 0.5:
        draft.members.insert(rng.randint(0, len(draft.members)), rng.choice(METADATA))


def make_long(rng: random.Random) -> Draft:
    """A header that is parsed in pieces, or nearly."""
    draft = Draft(is_long=True)
    if rng.random() < 0.25:
        make_many(rng, draft)
    else:
        wanted = rng.choice([120_000, 140_000, 200_000, 300_000])
        while wanted > 0:
            wanted -= inflate(rng, draft, len(draft.members))
    if rng.random() < 0.2:
        draft.gaps = rng.choices(SPACES, k=5)
    align(rng, draft)
    return draft


def align(rng: random.Random, draft: Draft) -> None:
    """Put spaces behind the first brace, so that a border of pieces lies where it may hurt."""
    text, kind, add = draft.text(), rng.randrange(3), 0
    if kind == 0:  # the first cut at the first byte that may be one, or just before it
        target = 1 + PIECE_BYTES + rng.randint(-3, 3)
        add = target - text.rfind(b'},"', 0, target + 1)
    elif kind == 1:  # the length at which cutting begins
        add = 2 * PIECE_BYTES + rng.randint(-2, 5) - len(text)
    draft.inside = rng.choice(" \n\t") * max(0, min(add, 2 * PIECE_BYTES))


def find_cuts(text: bytes | bytearray) -> list[int]:
    """Where the parser cuts a header: at commas behind each piece's worth of bytes."""
    begin, cuts = 1, []
    while len(text) - 1 - begin > 2 * PIECE_BYTES:
        found = text.find(b'},"', begin + PIECE_BYTES)
        if found < 0:
            break
        cuts.append(found + 1)
        begin = found + 2
    return cuts


def make_draft(rng: random.Random) -> Draft:
    return make_long(rng) if rng.random() < LONG_SHARE else make_small(rng)


def pack(header: bytes | bytearray, data: bytes, length: int | None = None) -> bytes:
    """A file's bytes. `length` is what the prefix claims, the truth if it is None."""
    return PREFIX.pack(len(header) if length is None else length) + bytes(header) + data
