"""What is done to the fuzzer's files: to a draft's parts, to its text, to the bytes around it.

`make_case(seed, index)` is the whole generator: a draft (cases.py), none to three damages, a file.
A damage may leave the file valid: that is as good a case as a file that is refused.
"""

import random
import re
from collections.abc import Callable

from .cases import (
    METADATA,
    NAMES,
    PREFIX,
    Case,
    Draft,
    Entry,
    find_cuts,
    make_draft,
    make_unread,
    pack,
)

# Where a number is expected. The first half is at the edges of what 64 bits hold.
NUMBERS = [
    "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616",
    "18446744073709551614", "4294967295", "4294967296", "2305843009213693952",
    "1152921504606846976", "-9223372036854775808", "-9223372036854775809", "9" * 30, "9" * 400,
    "0", "1", "2", "-1", "-0", "0.0", "1.0", "-0.0", "1e0", "1E2", "0e0", "01", "00", "+1", ".5",
    "1.", "0x1", "1e400", "1e-400", "1_0", "-", "1e", "1e+", '"1"', "null", "true", "[1]", "{}", "",
    "NaN", "Infinity", "0 ", " 1", "1 1", "1,", "\u0661", "1\0", "--1",
]  # fmt: skip

DTYPES = [
    '"U8"', '"I8"', '"F32"', '"I64"', '"F4"', '"F6_E2M3"', '"F6_E3M2"', '"BOOL"', '"u8"', '"X8"',
    '""', '"U8 "', '"U8\\u0000"', '"\\u0055\\u0038"', '"F8"', '"C128"', "null", "8", '["U8"]',
    '{"U8":null}', '{"U8":1}', '{"F4":null,"U8":null}', "U8", "'U8'", '"U8',
]  # fmt: skip

ODD_NAMES = [
    "__metadata__", "\\u005f_metadata__", "__metadata__\\u0000", "\\ud800", "\\udc00", "\\ud800x",
    "\\ud800\\ud800", "\\udc00\\ud800", "\\x61", "\\u12", "\\u12g4", "\\u", "\\", '"', "a\nb",
    "a\tb", "\0", "\x1f", "\x7f", "\\U00000061", "\\ud83d\\ude00", "\\uD83D\\uDE00", "\\u00C3",
    "\udc80", "\udcff", "a" * 3000,
]  # fmt: skip

BAD_METADATA = [
    '"__metadata__":{"a":1}', '"__metadata__":{"a":null}', '"__metadata__":{"a":{}}',
    '"__metadata__":{"a":["b"]}', '"__metadata__":[]', '"__metadata__":"a"', '"__metadata__":1',
    '"__metadata__":true', '"__metadata__":{"a":true,"a":"b"}', '"__metadata__":{"a":"b",}',
    '"__metadata__":{a:"b"}', '"__metadata__":{"a"}', '"__metadata__":{"\\ud800":""}',
    '"__metadata__":{"a":"\\udfff"}', '"__metadata__":{"a":"\t"}', '"__metadata__":{1:"a"}',
    '"__metadata__":{"a":"\udcc3"}', '"__metadata__":', '"__metadata__"',
    '"__metadata__":{"dtype":"U8","shape":[],"data_offsets":[0,1]}', '"__metadata__":NULL',
]  # fmt: skip

BAD_FIELDS = [
    '"x":1e999', '"x":"\\ud800"', '"\\u0064type":"U8"', '"\\udc00":1', '"x":NaN', '"x":01', '"x":',
    '"x":"\\x"', '"x":1.', '"x":-', '"x":[1,]', '"x":{"a":1,}', '"x":{"a"}', '"x":{1:2}', '"x":tru',
    '"x":"\n"', '"x":"\x7f"', '"x":"\udcff"', '"x" 1', '"x":1 2', "'x':1", "x:1", '"x"',
    '"x":"\\u00g0"', '"x":[}', '"x":{]', '"x":1e', '"x":+1', '"x":.1', '"x":\ufeff1', '"x":-a',
]  # fmt: skip

INSTEAD = [
    "{}", "[]", "null", "1", '"U8"', "true", '["U8",[1],[0,1]]', '["U8",[1]]', '["U8",[],[0,1],1]',
    '[null,[1],[0,1]]', "[[]]", "{{}}", "{1}", "",
]  # fmt: skip

TOKENS = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"{}", b"[]", b'""', b'"a"', b'},"', b'{"',
    b"},{", b",,", b"0", b"-0", b"1.0", b"1e2", b"9" * 22, b"18446744073709551615", b"-", b"+",
    b"null", b"true", b"Null", b" ", b"\n", b"\r", b"\t", b"\f", b"\v", b"\0", b"\x7f", b"\xc2\xa0",
    b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"//", b"/**/", b"#", b"'", b"\\u0000", b"\\ud800", b"\\u00",
    b'"dtype":"U8",', b'"shape":[],', b'"data_offsets":[0,0],', b'"__metadata__":{},',
    b'"x":-0,', b"[" * 20, b"]" * 20, b'{"":' * 130, b"[" * 200, b" " * 40,
]  # fmt: skip

BAD_UTF8 = [
    b"\x80", b"\xbf", b"\xc0\xaf", b"\xc1\xbf", b"\xc3", b"\xe0\x80\xaf", b"\xed\xa0\x80",
    b"\xed\xb0\x80", b"\xe2\x82", b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xf0\x9f\xa6",
    b"\xf8\x88\x80\x80\x80", b"\xfe", b"\xff", b"\xff\xfe",
]  # fmt: skip

# --- to a draft ---


def damage_offsets(rng: random.Random, draft: Draft) -> None:
    entries = draft.entries()
    if not entries:
        return
    entry, other = rng.choice(entries), rng.choice(entries)
    kind = rng.randrange(11)
    if kind == 0:
        entry.offsets, other.offsets = other.offsets, entry.offsets
    elif kind == 1:
        entry.offsets = list(other.offsets)
    elif kind == 2:
        entry.offsets.reverse()
    elif kind == 3:
        entry.offsets = entry.offsets[: rng.randrange(2)]
        entry.offsets += rng.choices(["0", "1"], k=rng.choice([0, 2]))
    elif kind < 6:  # empty ones where another begins or ends, or inside of it
        for i in range(rng.randint(1, 4)):
            at = shift(rng.choice([*entry.offsets, *other.offsets, "0"]), rng.choice([0, 0, 0, 1]))
            empty = Entry(f"empty{i}", '"U8"', ["0"], [at, at])
            draft.members.insert(rng.randint(0, len(draft.members)), empty)
    elif kind == 6:
        entry.offsets.append(rng.choice(["0", entry.offsets[-1] if entry.offsets else "0"]))
    elif kind == 7 and entry.offsets:
        entry.offsets[rng.randrange(len(entry.offsets))] = rng.choice(NUMBERS)
    elif kind == 8:  # a hole, or an overlap, from here on
        by = rng.choice([-8, -1, 1, 1, 8, 2**32, 2**63])
        for later in entries[entries.index(entry) :]:
            later.offsets = [shift(text, by) for text in later.offsets]
    elif entry.offsets:
        at = rng.randrange(len(entry.offsets))
        entry.offsets[at] = shift(entry.offsets[at], rng.choice([-2, -1, 1, 2]))


def shift(text: str, by: int) -> str:
    return str(int(text) + by) if text.isascii() and text.isdigit() and len(text) < 25 else text


def damage_shapes(rng: random.Random, draft: Draft) -> None:
    entries = draft.entries()
    if not entries:
        return
    entry = rng.choice(entries)
    kind = rng.randrange(8)
    if kind == 0:
        entry.dtype = rng.choice(DTYPES)
    elif kind == 1:
        entry.shape.insert(rng.randint(0, len(entry.shape)), rng.choice(["0", "1", "2", "3", "8"]))
    elif kind == 2:
        entry.shape = list(rng.choice(entries).shape)
    elif kind == 3:
        entry.shape = [rng.choice(NUMBERS[:9]) for _ in range(rng.randint(1, 3))]
        entry.shape.insert(rng.randint(0, len(entry.shape)), rng.choice(["0", "1", "2"]))
    elif kind == 4 and entry.shape:
        rng.shuffle(entry.shape)
        entry.shape.pop()
    elif kind == 5:
        entry.shape.insert(rng.randint(0, len(entry.shape)), rng.choice(NUMBERS))
    elif entry.shape:
        entry.shape[rng.randrange(len(entry.shape))] = rng.choice(NUMBERS)


def damage_names(rng: random.Random, draft: Draft) -> None:
    entries = draft.entries()
    if not entries:
        return
    entry, other = rng.choice(entries), rng.choice(entries)
    kind = rng.randrange(6)
    if kind == 0:  # twice, the later one perhaps another
        twin = Entry(entry.name, other.dtype, list(other.shape), list(other.offsets))
        draft.members.insert(rng.randint(0, len(draft.members)), twin)
    elif kind == 1:
        entry.name = other.name
    elif kind == 2 and other.name:  # the same name by an escape
        entry.name = f"\\u{ord(other.name[0]) & 0xFFFF:04x}{other.name[1:]}"
    elif kind == 3:
        entry.name = rng.choice(NAMES)
    else:
        at = rng.randint(0, len(entry.name)) if rng.random() < 0.5 else 0
        entry.name = entry.name[:at] + rng.choice(ODD_NAMES)


def damage_metadata(rng: random.Random, draft: Draft) -> None:
    member = rng.choice(BAD_METADATA if rng.random() < 0.5 else METADATA)
    draft.members.insert(rng.randint(0, len(draft.members)), member)
    if rng.random() < 0.3:
        draft.members = [m for m in draft.members if isinstance(m, Entry) or m is member]


def damage_fields(rng: random.Random, draft: Draft) -> None:
    entries = draft.entries()
    if not entries:
        return
    entry = rng.choice(entries)
    kind = rng.randrange(5)
    if kind == 0:
        entry.order.pop()
    elif kind == 1:
        entry.order.insert(rng.randint(0, len(entry.order)), rng.randrange(3))
    elif kind == 2:
        entry.instead = rng.choice(INSTEAD)
    elif kind == 3:  # as an array, which stock takes too
        shape, offsets = ",".join(entry.shape), ",".join(entry.offsets)
        entry.instead = f"[{entry.dtype},[{shape}],[{offsets}]]"
    elif rng.random() < 0.5:
        entry.unread.append(make_unread(rng))
    else:
        entry.unread.append(rng.choice(BAD_FIELDS))


# --- to its text ---


def pick(rng: random.Random, text: bytearray, cuts: list[int]) -> int:
    """A place in a header: near a cut between pieces if it has any, else often at a token."""
    if cuts and rng.random() < 0.7:
        return max(0, min(len(text), rng.choice(cuts) + rng.randint(-4, 4)))
    at = rng.randint(0, len(text))
    if rng.random() < 0.5:
        token = re.compile(rb'[{}\[\],:"]').search(text, at)
        at = token.start() + rng.randrange(2) if token else at
    return at


def damage_bytes(rng: random.Random, text: bytearray, cuts: list[int]) -> None:
    at = pick(rng, text, cuts)
    kind = rng.randrange(5)
    if kind == 0:
        del text[at : at + rng.choice([1, 1, 1, 2, 5, 50])]
    elif kind == 1:
        text[at : at + 1] = bytes([rng.randrange(256)])
    elif kind == 2:
        text[at : at + 1] = rng.choice(
            [b"{", b"}", b"[", b"]", b",", b":", b'"', b"0", b"\\", b" "]
        )
    elif kind == 3:
        source = pick(rng, text, cuts)
        text[at:at] = text[source : source + rng.choice([1, 2, 5, 20, 70])]
    elif at < len(text):
        text[at] ^= 1 << rng.randrange(8)


def damage_grammar(rng: random.Random, text: bytearray, cuts: list[int]) -> None:
    token = rng.choice(TOKENS)
    where = rng.randrange(10)
    if where == 0:
        text[:0] = token
    elif where == 1:
        text += token
    elif where == 2 and cuts:  # a gap where the parser looks for a cut
        cut = rng.choice(cuts)
        text[cut:cut] = rng.choice([b" ", b"\n", b",", b"}", b"{", b'"x":0', b"},", b',"x":{'])
    elif where < 6:
        at = pick(rng, text, cuts)
        text[at : at + 1] = token
    else:
        at = pick(rng, text, cuts)
        text[at:at] = token


def damage_utf8(rng: random.Random, text: bytearray, cuts: list[int]) -> None:
    at = pick(rng, text, cuts)
    if rng.random() < 0.7:  # inside of a string
        at = text.find(b'"', at) + 1
    text[at:at] = rng.choice(BAD_UTF8)


# --- to the file ---


def damage_length(rng: random.Random, content: bytearray) -> None:
    length = PREFIX.unpack_from(content)[0]
    edges = [0, 1, 2, 2**32, 2**63, 2**64 - 1, 2**64 - 8, 100_000_000, 100_000_001]
    edges += [len(content), len(content) - 8, len(content) - 7, length << 56 & 2**64 - 1]
    near = length + rng.choice([-8, -2, -1, 1, 2, 8, 100])
    claimed = rng.choice(edges) if rng.random() < 0.5 else max(0, min(near, 2**64 - 1))
    PREFIX.pack_into(content, 0, claimed)


def damage_ends(rng: random.Random, content: bytearray) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        del content[rng.randint(0, len(content)) :]
    elif kind == 1:
        del content[rng.randint(0, 16) :]
    elif kind == 2:
        del content[len(content) - rng.randint(1, min(9, len(content))) :]
    elif kind == 3:
        content += bytes(rng.randint(1, 9))
    else:
        content += rng.choice([b"}", b" ", b"{}", bytes(content)])


DRAFT: dict[str, Callable[[random.Random, Draft], None]] = {
    "offsets": damage_offsets,
    "shapes": damage_shapes,
    "names": damage_names,
    "metadata": damage_metadata,
    "fields": damage_fields,
}
TEXT: dict[str, Callable[[random.Random, bytearray, list[int]], None]] = {
    "bytes": damage_bytes,
    "grammar": damage_grammar,
    "utf8": damage_utf8,
}
FILE: dict[str, Callable[[random.Random, bytearray], None]] = {
    "length": damage_length,
    "ends": damage_ends,
}
KINDS = [*DRAFT, "offsets", "shapes", "names", *TEXT, "bytes", "grammar", "grammar", *FILE]


def data_end(draft: Draft, rng: random.Random) -> int:
    """How many bytes of data: as before the damage, or as far as the entries now reach."""
    numbers = [text for entry in draft.entries() for text in entry.offsets]
    ends = [int(text) for text in numbers if re.fullmatch("[0-9]{1,5}", text)]
    return max(ends, default=0) if rng.random() < 0.5 else draft.data_bytes


def make_case(seed: int, index: int) -> Case:
    """The file of this number. The same in every process."""
    rng = random.Random(f"{seed}:{index}")
    draft = make_draft(rng)
    kinds = rng.choices(KINDS, k=rng.choice([0, 0, 0, 1, 1, 1, 1, 2, 2, 3]))
    for kind in kinds:
        if kind in DRAFT:
            DRAFT[kind](rng, draft)
    data = rng.randbytes(data_end(draft, rng) if DRAFT.keys() & kinds else draft.data_bytes)
    text = bytearray(draft.text())
    for kind in kinds:
        if kind in TEXT:
            TEXT[kind](rng, text, find_cuts(text) if draft.is_long else [])
    content = bytearray(pack(text, data))
    for kind in kinds:
        if kind in FILE and len(content) >= PREFIX.size:
            FILE[kind](rng, content)
    return Case(seed, index, tuple(kinds), bytes(content))
