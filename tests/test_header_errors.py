"""Proves: whatever stock refuses is refused with stock's words, and never opened natively."""

import json
import os
import re
import struct

import pytest
import safetensors
import torch
from helpers import STOCK, native, outcome, seen
from hypothesis import given, settings
from hypothesis import strategies as st

import stx_patch
from stx_patch import _C

LIMIT_BYTES = 100_000_000


def entry(dtype="U8", shape=(1,), begin=0, end=1):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def file(header, data=b"", length=None):
    """A file's bytes. `length` is what the prefix claims, the truth if it is None."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def one(fields, data=b"x"):
    """A file of one entry whose fields are given as JSON text."""
    return file('{"a":{' + fields + "}}", data)


def shaped(text, data=b"x"):
    """A file of one entry of bytes, its shape given as JSON text."""
    return one(f'"dtype":"U8","shape":{text},"data_offsets":[0,1]', data)


def placed(text, data=b"x"):
    """A file of one entry of a byte, its offsets given as JSON text."""
    return one(f'"dtype":"U8","shape":[1],"data_offsets":{text}', data)


def extra(text):
    """A valid file whose one entry has a field more, given as JSON text."""
    return one(f'"dtype":"U8","shape":[1],"data_offsets":[0,1],"more":{text}')


def names(*pairs, data=b"x"):
    """A file of entries that may share a name: pairs of the name as JSON spells it, and JSON."""
    return file("{" + ",".join(f'"{name}":{value}' for name, value in pairs) + "}", data)


def nested(depth):
    return "[" * depth + "]" * depth


GOOD = '"dtype":"U8","shape":[1],"data_offsets":[0,1]'
A, B = entry(), entry(begin=1, end=2)
EMPTY = entry(shape=(0,), end=0)
A_TEXT, B_TEXT, EMPTY_TEXT = json.dumps(A), json.dumps(B), json.dumps(EMPTY)
SIGNED_TEXT = json.dumps(entry("I8", ()))
META = '{"__metadata__":'
MANY = ",".join(f'"t{i}":{json.dumps(entry(begin=i, end=i + 1))}' for i in range(4000))

# What stock refuses: row of the contract's table (or "json") and what is wrong -> the file.
REFUSED = {
    # 1: shorter than the prefix
    "1 empty file": b"",
    "1 one byte": b"\x02",
    "1 seven bytes": b"\x02" + bytes(6),
    # 2: the length is over the limit
    "2 limit and one": file("{}", length=LIMIT_BYTES + 1),
    "2 all ones": file("{}", length=2**64 - 1),
    "2 top bit": file("{}", length=2**63),
    "2 2**32": file("{}", length=2**32),
    "2 wraps with the prefix": file("{}", length=2**64 - 8),
    "2 big-endian": struct.pack(">Q", 2) + b"{}",
    "2 text in front": b"{}".ljust(8) + b"{}",
    # 3: the length is over the file's
    "3 one more": file("{}", length=3),
    "3 at the limit": file("{}", length=LIMIT_BYTES),
    "3 only a prefix": struct.pack("<Q", 2),
    # 4: no UTF-8
    "4 0xff in a name": file(b'{"\xff":1}'),
    "4 0xff alone": file(b"\xff"),
    "4 overlong": file(b'{"\xc0\xaf":{%s}}' % GOOD.encode(), b"x"),
    "4 surrogate": file(b'{"\xed\xa0\x80":{%s}}' % GOOD.encode(), b"x"),
    "4 above 10ffff": file(b'{"\xf4\x90\x80\x80":{%s}}' % GOOD.encode(), b"x"),
    "4 cut sequence": file(b'{"a":{%s}}\xc3' % GOOD.encode(), b"x"),
    "4 in metadata": file(b'{"__metadata__":{"k":"\x80"}}'),
    "4 in an unread field": file(b'{"a":{%s,"more":"\xfe"}}' % GOOD.encode(), b"x"),
    "4 outside of strings": file(b'{"a":{%s}\xa0}' % GOOD.encode(), b"x"),
    # 5: not the expected JSON
    "5 no bytes": file(b""),
    "5 spaces": file(b"  "),
    "5 NULs": file(bytes(8)),
    "5 bare word": file("hello"),
    "5 array": file("[]"),
    "5 null": file("null"),
    "5 number": file("1"),
    "5 string": file('"a"'),
    "5 open": file("{"),
    "5 closed only": file("}"),
    "5 two objects": file("{}{}"),
    "5 trailing comma": file('{"a":{' + GOOD + "},}", b"x"),
    "5 trailing comma in shape": shaped("[1,]"),
    "5 leading comma": file('{,"a":{' + GOOD + "}}", b"x"),
    "5 no comma": file('{"a":{' + GOOD + '}"b":{' + GOOD + "}}", b"x"),
    "5 no colon": file('{"a"{' + GOOD + "}}", b"x"),
    "5 single quotes": file("{'a':{}}"),
    "5 name without quotes": file("{a:{" + GOOD + "}}", b"x"),
    "5 comment": file("{/* */}"),
    "5 line comment": file("{}//x"),
    "5 NaN": extra("NaN"),
    "5 Infinity": extra("-Infinity"),
    "5 True": extra("True"),
    "5 BOM": file(b"\xef\xbb\xbf{}"),
    "5 NUL behind": file(b"{}\0"),
    "5 NULs behind": file(b"{}" + bytes(6)),
    "5 NUL before": file(b"\0{}"),
    "5 letter behind": file("{} x"),
    "5 form feed behind": file("{}\f"),
    "5 no-break space behind": file("{}\u00a0"),
    "5 vertical tab inside": file('{\v"a":{' + GOOD + "}}", b"x"),
    "5 raw newline in a name": file('{"a\n":{' + GOOD + "}}", b"x"),
    "5 raw NUL in a name": file(b'{"a\0":{%s}}' % GOOD.encode(), b"x"),
    "5 raw tab in metadata": file(META + '{"a":"\t"}}'),
    "5 unknown escape": file('{"\\x61":{' + GOOD + "}}", b"x"),
    "5 short unicode escape": file('{"\\u12":{' + GOOD + "}}", b"x"),
    "5 unicode escape of no hex": file('{"\\u12g4":{' + GOOD + "}}", b"x"),
    "5 lone high surrogate": file('{"\\ud800":{' + GOOD + "}}", b"x"),
    "5 lone low surrogate": file('{"\\udc00":{' + GOOD + "}}", b"x"),
    "5 high surrogate and a letter": file('{"\\ud800x":{' + GOOD + "}}", b"x"),
    "5 two high surrogates": file('{"\\ud800\\ud800":{' + GOOD + "}}", b"x"),
    "5 lone surrogate in metadata": file(META + '{"\\udfff":""}}'),
    "5 lone surrogate in a field's name": file('{"a":{' + GOOD + ',"\\ud800":1}}', b"x"),
    "5 string without end": file('{"a'),
    "5 backslash at the end": file('{"a\\'),
    "5 entry is a number": file('{"a":1}'),
    "5 entry is null": file('{"a":null}'),
    "5 entry is a string": file('{"a":"U8"}'),
    "5 entry is true": file('{"a":true}'),
    "5 entry is an empty object": file('{"a":{}}'),
    "5 entry is an empty array": file('{"a":[]}'),
    "5 entry is an array of two": file('{"a":["U8",[1]]}', b"x"),
    "5 entry is an array of four": file('{"a":["U8",[1],[0,1],1]}', b"x"),
    "5 no dtype": one('"shape":[1],"data_offsets":[0,1]'),
    "5 no shape": one('"dtype":"U8","data_offsets":[0,1]'),
    "5 no offsets": one('"dtype":"U8","shape":[1]'),
    "5 dtype twice": one('"dtype":"U8",' + GOOD),
    "5 shape twice": one('"shape":[1],' + GOOD),
    "5 offsets twice": one('"data_offsets":[0,1],' + GOOD),
    "5 dtype twice by an escape": one('"\\u0064type":"U8",' + GOOD),
    "5 unknown dtype": one('"dtype":"X8","shape":[1],"data_offsets":[0,1]'),
    "5 dtype in lower case": one('"dtype":"u8","shape":[1],"data_offsets":[0,1]'),
    "5 dtype empty": one('"dtype":"","shape":[1],"data_offsets":[0,1]'),
    "5 dtype longer": one('"dtype":"U88","shape":[1],"data_offsets":[0,1]'),
    "5 dtype with NUL": one('"dtype":"U8\\u0000","shape":[1],"data_offsets":[0,1]'),
    "5 dtype null": one('"dtype":null,"shape":[1],"data_offsets":[0,1]'),
    "5 dtype number": one('"dtype":8,"shape":[1],"data_offsets":[0,1]'),
    "5 dtype array": one('"dtype":["U8"],"shape":[1],"data_offsets":[0,1]'),
    "5 C128": one('"dtype":"C128","shape":[1],"data_offsets":[0,16]', bytes(16)),
    "5 shape null": shaped("null"),
    "5 shape number": shaped("1"),
    "5 shape string": shaped('"1"'),
    "5 shape object": shaped('{"0":1}'),
    "5 extent -1": shaped("[-1]"),
    "5 extent -0": shaped("[-0]", b""),
    "5 extent 1.0": shaped("[1.0]"),
    "5 extent 1e0": shaped("[1e0]"),
    "5 extent 1E2": shaped("[1E2]"),
    "5 extent 01": shaped("[01]"),
    "5 extent +1": shaped("[+1]"),
    "5 extent .5": shaped("[.5]"),
    "5 extent 1.": shaped("[1.]"),
    "5 extent 0x1": shaped("[0x1]"),
    "5 extent string": shaped('["1"]'),
    "5 extent null": shaped("[null]"),
    "5 extent true": shaped("[true]"),
    "5 extent array": shaped("[[1]]"),
    "5 extent 2**64": shaped("[18446744073709551616]"),
    "5 extent of 30 digits": shaped("[" + "9" * 30 + "]"),
    "5 extent of 400 digits": shaped("[" + "9" * 400 + "]"),
    "5 extent 1e400": shaped("[1e400]"),
    "5 offsets null": placed("null"),
    "5 offsets one": placed("[0]"),
    "5 offsets none": placed("[]"),
    "5 offsets three": placed("[0,1,2]"),
    "5 offsets strings": placed('["0","1"]'),
    "5 offsets floats": placed("[0.0,1.0]"),
    "5 offsets negative": placed("[-1,0]"),
    "5 offsets -0": placed("[-0,1]"),
    "5 offsets 0e0": placed("[0e0,1]"),
    "5 offsets 2**64": placed("[0,18446744073709551616]"),
    "5 offsets object": placed('{"begin":0,"end":1}'),
    "5 metadata array": file(META + "[]}"),
    "5 metadata string": file(META + '"a"}'),
    "5 metadata number": file(META + "1}"),
    "5 metadata true": file(META + "true}"),
    "5 metadata value number": file(META + '{"a":1}}'),
    "5 metadata value null": file(META + '{"a":null}}'),
    "5 metadata value object": file(META + '{"a":{}}}'),
    "5 metadata value array": file(META + '{"a":["b"]}}'),
    "5 metadata is a tensor": file({"__metadata__": A}, b"x"),
    "5 metadata twice": file(META + '{},"__metadata__":{}}'),
    "5 metadata twice, null first": file(META + 'null,"__metadata__":{}}'),
    "5 metadata twice, null both": file(META + 'null,"__metadata__":null}'),
    "5 metadata twice by an escape": file(META + '{},"\\u005f_metadata__":{}}'),
    "5 depth 200": extra(nested(200)),
    "5 depth 126": extra(nested(126)),
    "5 not closed deep": extra("[" * 20),
    "5 huge number with a bad exponent": extra("1e"),
    "5 number over a double": extra("1e400"),
    "5 wrong at the end of many": file("{" + MANY + ",}", bytes(4000)),
    "5 cut in many": file("{" + MANY[:-1] + "}", bytes(4000)),
    "5 metadata twice in many": file(META + "{}," + MANY + ',"__metadata__":{}}', bytes(4000)),
    "5 array of many": file("[" + MANY + "]", bytes(4000)),
    "5 brace inside of many": file("{" + MANY + "}," + MANY + "}", bytes(4000)),
    # 6: offsets are not one behind the other from 0 on
    "6 begins at 1": file({"a": entry(begin=1, end=2)}, b"xy"),
    "6 ends before it begins": file({"a": entry(begin=1, end=0)}, b"x"),
    "6 hole": file({"a": A, "b": entry(begin=2, end=3)}, b"xyz"),
    "6 overlap": file({"a": entry(shape=(2,), end=2), "b": entry(begin=1, end=2)}, b"xy"),
    "6 same range": file({"a": A, "b": A}, b"x"),
    "6 inside": file({"a": entry(shape=(3,), end=3), "b": entry(begin=1, end=2)}, b"xyz"),
    "6 empty one inside": file({"a": entry(shape=(2,), end=2), "b": entry(shape=(0,), begin=1)}),
    "6 huge end": file({"a": entry(end=2**64 - 1), "b": B}, b"xy"),
    "6 huge begin": file({"a": entry(begin=2**64 - 1, end=2**64 - 1, shape=(0,))}),
    "6 duplicate name, last begins late": names(("a", A_TEXT), ("a", B_TEXT), data=b"xy"),
    "6 duplicate name, last in another's place": names(
        ("a", A_TEXT), ("b", B_TEXT), ("a", B_TEXT), data=b"xy"
    ),
    "6 long name": file({"n" * 5000: B}, b"xy"),
    "6 name of many bytes": file({"é" * 300: B}, b"xy"),
    # 7: sizes overflow
    "7 shape": file({"a": entry(shape=(2**63, 2))}, b"x"),
    "7 shape of three": file({"a": entry(shape=(2**32, 2**32, 2))}, b"x"),
    "7 elements times bits": file({"a": entry("F64", (2**58,), 0, 1)}, b"x"),
    "7 bits of bytes": file({"a": entry(shape=(2**61,))}, b"x"),
    "7 an empty dimension behind": file({"a": entry(shape=(2**63, 2, 0), end=0)}),
    "7 largest": file({"a": entry("U64", (2**64 - 1,), 0, 1)}, b"x"),
    # 8: not whole bytes
    "8 F4 of one": file({"a": entry("F4", (1,), 0, 1)}, b"x"),
    "8 F4 scalar": file({"a": entry("F4", (), 0, 1)}, b"x"),
    "8 F6 of two": file({"a": entry("F6_E2M3", (2,), 0, 2)}, b"xy"),
    "8 F4 of 3x3": file({"a": entry("F4", (3, 3), 0, 5)}, b"vwxyz"),
    # 9: size and range differ
    "9 too short": file({"a": entry(shape=(2,))}, b"x"),
    "9 too long": file({"a": entry(end=2)}, b"xy"),
    "9 dtype": file({"a": entry("U16")}, b"x"),
    "9 scalar": file({"a": entry("F32", (), 0, 0)}),
    "9 empty with bytes": file({"a": entry(shape=(0,))}, b"x"),
    "9 bytes but empty": file({"a": entry(shape=(3,), end=0)}),
    "9 in the second": file({"a": A, "b": entry("F32", (1,), 1, 2)}, b"xy"),
    # 10: the file ends elsewhere
    "10 a byte more": file({"a": A}, b"xy"),
    "10 a byte less": file({"a": A}, b""),
    "10 no tensors but data": file("{}", b"x"),
    "10 only an empty tensor but data": file({"a": EMPTY}, b"x"),
    "10 only metadata but data": file(META + "{}}", b"x"),
    "10 end far behind": file({"a": entry(shape=(2**40,), end=2**40)}, b"x"),
    "10 end wraps": file({"a": entry(shape=(2**61 - 1,), end=2**61 - 1)}, b"x"),
    # several at once: the first row wins
    "6 before 9": file({"a": entry("F32", (9,), 1, 2)}, b"xy"),
    "9 before 10": file({"a": entry("F32", (9,), 0, 1)}, b"xyz"),
    "7 before 9": file({"a": entry("F32", (2**63, 4), 0, 1)}, b"xyz"),
    "8 before 9": file({"a": entry("F4", (1,), 0, 7)}, b"xyz"),
    "5 before 6": file({"a": entry("X", (1,), 5, 6)}, b"xyz"),
    "4 before 5": file(b'{"\xff":}', b"xyz"),
    "9 of the first before 6 of the second": file({"a": entry("U16"), "b": A}, b"x"),
}  # fmt: skip

# What stock takes although it looks odd.
TAKEN = {
    "empty object": file("{}"),
    "white space before": file(" \t\r\n{}"),
    "white space behind": file("{} \t\r\n"),
    "white space inside": file(json.dumps({"a": A}, indent="\t").replace("\n", "\r\n"), b"x"),
    "much white space": file(" " * 5000 + json.dumps({"a": A}) + " " * 5000, b"x"),
    "long runs of white space": file("{" + " " * 200_000 + MANY + " " * 200_000 + "}", bytes(4000)),
    "metadata empty": file(META + "{}}"),
    "metadata null": file(META + "null}"),
    "metadata behind": file({"a": A, "__metadata__": {"k": "v"}}, b"x"),
    "metadata among many": file("{" + MANY + ',"__metadata__":{"k":"v"}}', bytes(4000)),
    "metadata with equal keys": file(META + '{"k":"1","k":"2"}}'),
    "metadata by an escape": file('{"\\u005f_metadata__":{"k":"v"}}'),
    "metadata with odd texts": file({"__metadata__": {"": "", "\0": "\0", "é": "🦙", "\n": '"\\'}}),
    "names like metadata": file({"__metadata": A, "__Metadata__": B}, b"xy"),
    "name empty": file({"": A}, b"x"),
    "name NUL": file({"\0": A, "a\0b": B}, b"xy"),
    "name by escapes": file('{"\\u0061\\/\\b\\f\\n\\r\\t\\"\\\\":{' + GOOD + "}}", b"x"),
    "name by surrogates": file('{"\\ud83e\\udd99":{' + GOOD + "}}", b"x"),
    "name DEL": file({"\x7f": A}, b"x"),
    "name of non-characters": file({"\ufffe\uffff\U0010ffff": A}, b"x"),
    "name long": file({"n" * 100_000: A}, b"x"),
    "name with braces": file({'},"': A, '"},"a":{"': B}, b"xy"),
    "fields in another order": one('"data_offsets":[0,1],"shape":[1],"dtype":"U8"'),
    "unknown field": extra("1"),
    "unknown field null": extra("null"),
    "unknown field -1.5e-300": extra("-1.5e-300"),
    "unknown field of a big integer": extra("123456789012345678901234567890"),
    "unknown field of a big negative integer": extra("-123456789012345678901234567890"),
    "unknown field of 400 digits with exponent": extra("1" * 400 + "e-399"),
    "unknown field -0": extra("-0"),
    "unknown field -0.0": extra("-0.0"),
    "unknown field twice": extra('1,"more":2'),
    "unknown field deep": extra(nested(10)),
    "unknown field depth 100": extra(nested(100)),
    "unknown field depth 125": extra(nested(125)),
    "unknown field empty name": extra('1,"":2'),
    "minus zero in a name": file({"[-0": A}, b"x"),
    "minus zero in metadata": file({"__metadata__": {"a": "[-0]", "b": ",-01"}}),
    "entries in another order": file({"b": B, "a": A}, b"xy"),
    "empty tensors at one place": file({"a": EMPTY, "b": EMPTY, "c": A}, b"x"),
    "empty tensor behind": file({"a": A, "b": entry(shape=(0,), begin=1)}, b"x"),
    "empty with a large shape": file({"a": entry(shape=(0, 2**40), end=0)}),
    "empty, product fits": file({"a": entry(shape=(2**60, 0), end=0)}),
    "duplicate name, equal entries": names(("a", A_TEXT), ("a", A_TEXT)),
    "duplicate name, last wins": names(("a", SIGNED_TEXT), ("a", A_TEXT)),
    "duplicate name, the first is wrong": names(("a", B_TEXT), ("a", A_TEXT)),
    "duplicate empty tensors": names(("a", EMPTY_TEXT), ("a", EMPTY_TEXT), data=b""),
    "duplicate by an escape": names(("a", A_TEXT), ("\\u0061", A_TEXT)),
    "entry is an array": names(("a", '["U8",[1],[0,1]]')),
    "entry is an array among objects": names(("a", '["U8",[1],[0,1]]'), ("b", B_TEXT), data=b"xy"),
    "dtype as an object": one('"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]'),
    "rank 0": shaped("[]"),
    "rank 70": shaped("[" + ",".join(["1"] * 70) + "]"),
    "F4": file({"a": entry("F4", (2,), 0, 1)}, b"x"),
    "F4 odd last dimension": file({"a": entry("F4", (2, 1), 0, 1)}, b"x"),
    "F6": file({"a": entry("F6_E3M2", (4,), 0, 3)}, b"xyz"),
    "many": file("{" + MANY + "}", bytes(4000)),
    "many, with names that end like entries": file(
        {f"{i}}},": entry(begin=i, end=i + 1) for i in range(4000)}, bytes(4000)
    ),
    "many, with such metadata": file(
        {"__metadata__": {f"{i}}},": '},"' for i in range(20_000)}, "a": A}, b"x"
    ),
    "many, twice": file("{" + MANY + "," + MANY + "}", bytes(4000)),
}  # fmt: skip

# Of these, what only stock serves: it decides which of two equal names counts, and so on.
BY_STOCK = {
    "unknown field of a big integer",
    "unknown field of a big negative integer",
    "unknown field -0",
    "unknown field -0.0",
    "unknown field depth 100",
    "unknown field depth 125",
    "duplicate name, equal entries",
    "duplicate name, last wins",
    "duplicate name, the first is wrong",
    "duplicate empty tensors",
    "duplicate by an escape",
    "entry is an array",
    "entry is an array among objects",
    "dtype as an object",
    "many, twice",
    "minus zero in a name",
    "minus zero in metadata",
}


# Where several entries begin at one place, stock complains about one of them by chance.
BY_CHANCE = {
    "6 same range",
    "6 duplicate name, last in another's place",
    "9 of the first before 6 of the second",
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


def everything(opened):
    """All that a handle tells, in comparable form; or the error there was instead of it."""
    if opened[0] == "error":
        return opened
    handle = opened[1]
    names = handle.keys()
    tensors = {name: seen(outcome(handle.get_tensor, name)) for name in names}
    shapes = {name: handle.get_slice(name).get_shape() for name in tensors}
    return handle.keys(), sorted(handle.offset_keys()), handle.metadata(), tensors, shapes


def loaded(result):
    if result[0] == "error":
        return result
    return {name: seen(("value", tensor)) for name, tensor in result[1].items()}


def check_as_stock(path):
    """Every way to open answers as stock's. Returns whether stock opens it."""
    expected = outcome(STOCK.safe_open, path, "pt")
    whole = loaded(outcome(STOCK.load_file, path))
    with stx_patch.patched():
        found = outcome(safetensors.safe_open, path, framework="pt")
        assert everything(found) == everything(expected)
        assert loaded(outcome(safetensors.torch.load_file, path)) == whole
    assert everything(outcome(stx_patch.safe_open, path)) == everything(expected)
    assert loaded(outcome(stx_patch.load_file, path)) == whole
    return expected[0] == "value"


def check_one_of_stocks_answers(path):
    """For files about which stock is not of one mind (it walks a hash map)."""
    found = everything(outcome(stx_patch.safe_open, path))
    for _ in range(60):
        if found == everything(outcome(STOCK.safe_open, path, "pt")):
            return
    raise AssertionError(f"stock never says {found}")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_stocks_words(path, name):
    path.write_bytes(REFUSED[name])
    if name in BY_CHANCE:
        check_one_of_stocks_answers(path)
    else:
        assert not check_as_stock(path), "stock takes it"
    assert not native(path)


@pytest.mark.parametrize("name", TAKEN)
def test_taken_as_stock_takes_it(path, name):
    path.write_bytes(TAKEN[name])
    assert check_as_stock(path), "stock refuses it"
    assert native(path) == (name not in BY_STOCK)


SMALL = file(
    {
        "__metadata__": {"k": "é"},
        "b": entry("F32", (2,), 1, 9),
        "a": A,
        "c": entry("I16", (0,), 9, 9),
    },
    b"012345678",
)


def test_cut_at_every_byte(path):
    for length in range(len(SMALL)):
        path.write_bytes(SMALL[:length])
        expected = outcome(STOCK.safe_open, path, "pt")
        assert expected[0] == "error"
        assert outcome(stx_patch.safe_open, path) == expected
        assert not native(path)
    path.write_bytes(SMALL)
    assert check_as_stock(path) and native(path)


def test_one_byte_too_long(path):
    path.write_bytes(SMALL + b"\0")
    assert not check_as_stock(path)
    assert not native(path)


def test_every_length_in_the_prefix(path):
    for length in range(len(SMALL) + 2):
        path.write_bytes(struct.pack("<Q", length) + SMALL[8:])
        expected = outcome(STOCK.safe_open, path, "pt")
        assert everything(outcome(stx_patch.safe_open, path)) == everything(expected)
        assert native(path) == (expected[0] == "value")


def test_every_byte_of_the_header_changed(path):
    """A header with one byte replaced: stock decides, and the core never takes what it refuses."""
    end = len(SMALL) - 9
    for at in range(8, end):
        for byte in b'\0 "{}[],:0-9.eE\\\x80\xffx':
            path.write_bytes(SMALL[:at] + bytes([byte]) + SMALL[at + 1 :])
            expected = outcome(STOCK.safe_open, path, "pt")
            if native(path):
                assert expected[0] == "value", (at, byte)
                check_one_of_stocks_answers(path)


def find_cuts(text):
    """Where a long header may be cut in pieces (csrc/json_simdjson.cpp): behind each 64 KiB."""
    begin, cuts = 1, []
    while len(text) - begin > 2 * 65536:
        cuts.append(text.index('},"', begin + 65536) + 1)
        begin = cuts[-1] + 1
    return cuts


def test_long_headers_changed_where_they_are_cut(path):
    text = "{" + MANY + "}"
    cuts = find_cuts(text)
    assert cuts
    for cut in cuts:
        for at in range(cut - 3, cut + 4):
            for put in ("", " ", ",", "}", "},", "{", '"', "\\", "\0", ',"', '{},"', "\n,\n"):
                path.write_bytes(file(text[:at] + put + text[at + 1 :], bytes(4000)))
                if native(path):
                    expected = STOCK.safe_open(path, "pt")
                    handle = stx_patch.safe_open(path)
                    assert handle.keys() == expected.keys()
                    assert handle.offset_keys() == expected.offset_keys()
        path.write_bytes(file(text[:cut] + " " + text[cut:], bytes(4000)))
        assert native(path)


TOKENS = [
    "{", "}", "[", "]", ":", ",", " ", '"a"', '"b"', '"dtype"', '"shape"', '"data_offsets"', '"U8"',
    '"F4"', '"F32"', '"__metadata__"', "0", "1", "2", "9", "-0", "-1", "1.0", "1e0", "00", "null",
    "true", '"\\u0061"', '"\\ud800"', "{}", "[]", "\0", "\ufeff", "18446744073709551615",
    "18446744073709551616", "9223372036854775808",
]  # fmt: skip
PIECES = re.findall(r'"[^"]*"|\d+|.', SMALL[8:-9].decode())


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(PIECES) - 1),
            st.sampled_from(["delete", "double", "replace", "insert"]),
            st.sampled_from(TOKENS),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_headers_with_pieces_changed(tmp_path_factory, edits):
    """The same for tokens that are missing, twice or others."""
    pieces = list(PIECES)
    for at, edit, token in edits:
        if edit == "delete":
            pieces[at] = ""
        elif edit == "replace":
            pieces[at] = token
        else:
            pieces[at] += token if edit == "insert" else pieces[at]
    path = tmp_path_factory.getbasetemp() / "changed"
    path.write_bytes(file("".join(pieces), SMALL[-9:]))
    expected = outcome(STOCK.safe_open, path, "pt")
    assert expected[0] == "value" or not native(path)
    check_one_of_stocks_answers(path)


def test_the_longest_header(path):
    """A header of exactly the limit, and one byte more, which the prefix alone decides."""
    text = json.dumps({"a": A}).encode()
    for length in (LIMIT_BYTES, LIMIT_BYTES + 1):
        with open(path, "wb") as out:
            out.write(struct.pack("<Q", length) + text)
            out.write(b" " * (length - len(text)) + b"x")
        expected = outcome(STOCK.safe_open, path, "pt")
        assert native(path) == (expected[0] == "value") == (length == LIMIT_BYTES)
        if expected[0] == "error":
            assert outcome(stx_patch.safe_open, path) == expected
        os.truncate(path, 0)


def test_a_refusal_counts_and_tells_why(path):
    path.write_bytes(REFUSED["6 hole"])
    before = stx_patch.stats()
    for call in (stx_patch.safe_open, stx_patch.load_file):
        assert outcome(call, path)[1] is STOCK.SafetensorError
    made = stx_patch.stats() - before
    assert made.fallbacks == {"file refused (format)": 2}
    assert made.opens == made.tensors_native == made.tensors_stock == 0


def test_a_refused_file_is_refused_under_a_filter_too(path):
    """The filter is not asked about a file that nobody opens."""
    path.write_bytes(REFUSED["9 in the second"])
    asked = []
    expected = outcome(STOCK.safe_open, path, "pt")
    assert outcome(stx_patch.safe_open, path, tensor_filter=asked.append) == expected
    assert asked == []


def test_a_file_by_stock_is_filtered_as_well(path):
    path.write_bytes(TAKEN["entry is an array among objects"])
    with stx_patch.safe_open(path, tensor_filter="b") as handle:
        assert handle.keys() == ["b"]
        assert torch.equal(handle.get_tensor("b"), torch.tensor([ord("y")], dtype=torch.uint8))
        assert not isinstance(handle, _C.Handle)
