"""Values and errors come back from their bytes with their types, or are refused with the place that is at fault."""

from __future__ import annotations

import contextlib
import enum
import math
import uuid
from collections import Counter, OrderedDict, namedtuple
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from zoneinfo import ZoneInfo

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from values import same, traced

from rqarm import packing
from rqarm.errors import CorruptResult, UnpackableResult
from rqarm.packing import EXT_CODE, MAX_DEPTH, pack, pack_error, unpack, unpack_error
from rqarm.result import Result

# --- values -----------------------------------------------------------------------------------------------------------

PARIS = ZoneInfo("Europe/Paris")

VALUES = [
    None, True, False, 0, -1, 2**63, -(2**63), 2**64 - 1, 2**64, -(2**63) - 1, 2**200, -(2**200), 10**5_000,
    0.0, -0.0, 1.5, math.nan, math.inf, -math.inf, 5e-324, "", "äöü \U0001f600 \x00", b"", b"\x00\xff", [], {}, (),
    set(), frozenset(), [1, [2, (3, {4: (5,)})]], (1, (2,), [3]), {1, "a", (2, 3), frozenset({4})}, frozenset({b"x"}),
    {1: "int", "1": "str", b"1": "bytes", None: 0, 2.5: 1, (1, ("a",)): 2, frozenset({1}): 3, True and 7: 4},
    {math.nan: 1}, {date(2026, 1, 1): 1, Decimal("1.0"): 2},
    datetime(2026, 1, 2, 3, 4, 5, 678901), datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59, 59, 999999),
    datetime(2026, 10, 25, 2, 30, fold=1), datetime(2026, 1, 1, tzinfo=UTC),
    datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=-5, minutes=-30))),
    datetime(2026, 1, 1, 0, 0, 0, 7, tzinfo=timezone(timedelta(seconds=3723, microseconds=5))),
    date(2026, 2, 28), date.min, time(23, 59, 59, 999999), time(1, tzinfo=timezone(timedelta(hours=2))),
    time(2, fold=1),
    timedelta(0), timedelta.min, timedelta.max, timedelta(days=-1, microseconds=1),
    Decimal("0"), Decimal("-0"), Decimal("1.500"), Decimal("NaN"), Decimal("sNaN12"), Decimal("-Infinity"),
    Decimal("1E+999999"), Decimal("3." + "1" * 100), uuid.UUID(int=0), uuid.UUID(int=2**128 - 1), 1 + 2j,
    complex(-0.0, math.inf), msgpack.Timestamp(1, 2), msgpack.ExtType(5, b"theirs"),
    [(), [()], {(): ()}], [set(), {frozenset()}], ["\ud7ff", "\ue000"],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_with_its_types(value):
    assert same(unpack(pack(value)), value)
    assert same(unpack(pack([value, {"a": value}])), [value, {"a": value}])


def test_buffers_come_back_as_bytes():
    assert same(unpack(pack([bytearray(b"ab"), memoryview(b"cd")])), [b"ab", b"cd"])


@pytest.mark.parametrize("moment", [datetime(2026, 1, 1, tzinfo=PARIS), datetime(2026, 7, 1, tzinfo=PARIS),
                                    datetime(2026, 10, 25, 2, 30, tzinfo=PARIS),
                                    datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=PARIS),
                                    datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/London"))])  # fmt: skip
def test_a_time_zone_becomes_its_offset_at_that_moment(moment):
    back = unpack(pack(moment))
    assert back.astimezone(UTC) == moment.astimezone(UTC)
    assert back.utcoffset() == moment.utcoffset()
    assert type(back.tzinfo) is timezone


scalars = (
    st.none() | st.booleans() | st.integers() | st.integers(-(2**300), 2**300) | st.floats() | st.text() | st.binary()
    | st.datetimes() | st.datetimes(timezones=st.just(UTC)) | st.dates() | st.times() | st.timedeltas() | st.uuids()
    | st.decimals() | st.complex_numbers()
)  # fmt: skip
keys = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.dates(),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner) | st.sets(keys),
    max_leaves=40,
)


@given(values)
def test_any_nested_value_comes_back(value):
    assert same(unpack(pack(value)), value)


@given(values, st.randoms(use_true_random=False))
def test_damaged_bytes_give_a_value_or_corrupt_result(value, rng):
    packed = bytearray(pack(value))
    for _ in range(rng.randint(1, 4)):
        packed[rng.randrange(len(packed))] = rng.randrange(256)
    for damaged in (bytes(packed), bytes(packed[: rng.randint(0, len(packed))])):
        with contextlib.suppress(CorruptResult):
            unpack(damaged)


crumbs = [b"\xd4R", b"t", b"s", b"\x91", b"\xc7\x01R", b"\x81", b"\x01", b"\xdd\xff\xff\xff\xff", b"\xc1"]


@given(st.binary(max_size=300) | st.lists(st.sampled_from(crumbs)).map(b"".join))
def test_any_bytes_give_a_value_or_corrupt_result(packed):
    with contextlib.suppress(CorruptResult):
        unpack(packed)


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class NoOffset(tzinfo):
    def utcoffset(self, moment):
        return None


class Raises(tzinfo):
    def utcoffset(self, moment):
        raise LookupError("no such zone")


class Hostile:
    def __repr__(self):
        raise RuntimeError("repr")


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "path", "reason"),
    [
        (lambda: 0, "$", "function"),
        (object(), "$", "object is not a plain value"),
        ({"rows": [1, 2, 3, {"when": object()}]}, "$['rows'][3]['when']", "object"),
        ([{"a": (x for x in ())}], "$[0]['a']", "generator is an iterator"),
        ({"a": Hostile()}, "$['a']", "Hostile"),
        ({1: {b"k": {None: Colour.RED}}}, "$[1][b'k'][None]", "enum"),
        ([Level.LOW], "$[0]", "enum"),
        (OrderedDict(a=1), "$", "a kind of dict"),
        ([Counter("a")], "$[0]", "a kind of dict"),
        ((Point(1, 2),), "$[0]", "a kind of tuple"),
        ({"s": "ok\ud800"}, "$['s']", "lone surrogate (\\ud800) at character 2"),
        ({"x": {"\udfff": 1}}, "$['x'].key('\\udfff')", "lone surrogate"),
        ({"x": {(1, object()): 1}}, "$['x'].key(<tuple>)[1]", "object"),
        ({"x": {(1, "\ud800")}}, "$['x'].member(<tuple>)[1]", "lone surrogate"),
        ([datetime(2026, 1, 1, tzinfo=NoOffset())], "$[0]", "gives no offset"),
        ([datetime(2026, 1, 1, tzinfo=Raises())], "$[0]", "LookupError: no such zone"),
        ([time(1, tzinfo=PARIS)], "$[0]", "gives no offset"),
        ([Result(b"x")], "$[0]", "return it alone"),
        ([range(3)], "$[0]", "range"),
        ({"k" * 500: object()}, "$['" + "k" * 56 + "...]", "object"),
        ([memoryview(b"abcd")[::2]], "$[0]", "contiguous"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_its_place(value, path, reason):
    with pytest.raises(UnpackableResult) as caught:
        pack(value)
    assert caught.value.path == path
    assert reason in caught.value.reason
    str(caught.value).encode()


def test_numpy_scalars_are_refused():
    float64 = type("float64", (float,), {"__module__": "numpy"})
    with pytest.raises(UnpackableResult, match=r"at \$\['x'\]: numpy.float64 .*\.item\(\)"):
        pack({"x": float64(1)})


def nested(levels, wrap, inside=1):
    value = inside
    for _ in range(levels):
        value = wrap(value)
    return value


WRAPS = {
    "list": lambda value: [value],
    "tuple": lambda value: (value,),
    "dict": lambda value: {"a": value},
    "mixed": lambda value: [({1: value},)],
}


@pytest.mark.parametrize("wrap", [WRAPS["list"], WRAPS["tuple"], WRAPS["dict"]], ids=["list", "tuple", "dict"])
def test_the_depth_ends_at_64(wrap):
    deepest = nested(MAX_DEPTH, wrap)
    assert same(unpack(pack(deepest)), deepest)
    with pytest.raises(UnpackableResult, match="more than 64 containers inside each other") as caught:
        pack(wrap(deepest))
    assert caught.value.path.count("[") == MAX_DEPTH


def test_keys_and_sets_count_as_depth():
    key = nested(MAX_DEPTH - 1, WRAPS["tuple"])
    assert unpack(pack({key: 1})) == {key: 1}
    with pytest.raises(UnpackableResult, match="more than 64"):
        pack({(key,): 1})
    with pytest.raises(UnpackableResult, match="more than 64"):
        pack([{key}])


@pytest.mark.parametrize("levels", [65, 300, 600, 5_000, 100_000])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_deeper_value_is_refused_cleanly(wrap, levels):
    value = nested(levels, wrap)
    with pytest.raises(UnpackableResult, match="more than 64"):
        pack(value)
    while type(value) in (list, tuple, dict):  # take it apart: comparing or freeing it must not recurse
        value = (
            value["a"]
            if isinstance(value, dict) and "a" in value
            else (value[1] if isinstance(value, dict) else value[0])
        )


def test_a_value_that_contains_itself_is_refused():
    straight: list = []
    straight.append(straight)
    wide: list = []
    wide.extend([wide, wide, wide])
    through_tuple: list = []
    through_tuple.append((1, through_tuple))
    mapping: dict = {}
    mapping["a"] = {"b": [mapping]}
    for value, path in [(straight, "$[0]"), (wide, "$[0]"), (through_tuple, "$[0][1]"), (mapping, "$['a']['b'][0]")]:
        with pytest.raises(UnpackableResult, match="contains itself") as caught:
            pack(value)
        assert caught.value.path == path


def test_one_object_in_two_places_is_no_recursion():
    row = [1, 2]
    assert unpack(pack({"a": row, "b": (row, row)})) == {"a": row, "b": (row, row)}
    with pytest.raises(UnpackableResult) as caught:
        pack({"a": row, "b": (row, row, object())})
    assert caught.value.path == "$['b'][2]"


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 200, 1_000, 2_000, 50_000])
@pytest.mark.parametrize("head", [b"\x91", b"\x81\x01", b"\x92\xd4Rt", b"\xdd\x00\x00\x00\x01"])
def test_bytes_that_nest_deeper_are_corrupt(head, levels):
    with pytest.raises(CorruptResult):
        unpack(head * levels + b"\x01")


@pytest.mark.parametrize(
    "packed",
    [
        b"", b"\xc1", b"\x01\x01", b"\x92\x01", b"\x81\x90\x01", b"\x81\x80\x01", b"\xa1\xff", b"\xd4Rt",
        b"\x92\x01\xd4Rt", b"\x82\xd4Rt\x01\x02\x03", b"\x92\xd4Rs\x90", b"\xd4Rz", b"\xc7\x01Rt", b"\xc7\x00R",
        b"\xd8R" + b"u" * 16,
        b"\xc7\x05Rn1,00", b"\xc7\x04Rnabc", b"\xd7RD2026-0", b"\xc7\x0cRp" + b"\xff\x7f" * 5 + b"x", b"\xd4\xff\x00",
        b"\xc7\x0b\xff" + b"\xff" * 11,
    ],
)  # fmt: skip
def test_malformed_bytes_are_corrupt(packed):
    with pytest.raises(CorruptResult):
        unpack(packed)


def test_more_bytes_than_the_reader_allows_are_corrupt():
    with pytest.raises(CorruptResult, match="more than 10"):
        unpack(pack("x" * 10), max_bytes=10)


BOMBS = {
    "a huge array of nil": lambda: b"\xdd" + (2_000_000).to_bytes(4, "big") + b"\xc0" * 2_000_000,
    "empty lists in lists": lambda: b"\x92" + (b"\xdd" + (990_000).to_bytes(4, "big") + b"\x90" * 990_000) * 2,
    "headers that claim and nest": lambda: b"\xdd\x00\x00\xff\x00" * 400_000,
    "claims within the depth": lambda: b"\xdd\x00\x0f\x00\x00" * 60 + b"\xc0" * 1_900_000,
    "a cut array": lambda: b"\xdd\x00\x0f\x00\x00" + b"\xc0" * 100_000,
    "a str that claims": lambda: b"\xdb\x7f\xff\xff\xff" + b"x" * 100_000,
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_within_bounded_memory(bomb, monkeypatch):
    """At a tenth of the real limit. tracemalloc counts what is asked for, touched or not."""
    monkeypatch.setattr(packing, "MAX_ITEMS", 1_000_000)
    packed = bomb()
    with traced(100_000_000), pytest.raises(CorruptResult):
        unpack(packed)


def test_more_items_than_the_reader_takes_are_refused_when_packed(monkeypatch):
    monkeypatch.setattr(packing, "MAX_ITEMS", 100)
    assert unpack(pack(list(range(100)))) == list(range(100))
    tagged = [tuple(range(100)), dict.fromkeys(range(100), ())]
    assert unpack(pack(tagged[:1])) == tagged[:1]
    with pytest.raises(UnpackableResult, match=r"\$\['a'\]: more than 100 items"):
        pack({"a": list(range(101))})
    with pytest.raises(UnpackableResult, match="more than 100 items or containers"):
        pack([[[] for _ in range(60)], [{} for _ in range(60)]])


def test_the_scan_leaves_exactly_the_depth():
    packing._scan(b"\x91" * MAX_DEPTH + b"\xc0")
    with pytest.raises(ValueError):
        packing._scan(b"\x91" * (MAX_DEPTH + 1) + b"\xc0")


def test_a_wide_value_of_shared_parts_is_blamed_quickly():
    value: object = [object()]
    for _ in range(40):
        value = [value, value]
    with pytest.raises(UnpackableResult, match="object"):
        pack(value)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_comes_back_as_text():
    try:
        raise LookupError("no such country")
    except LookupError as error:
        fields = unpack_error(pack_error(error))
    assert (fields["type"], fields["message"]) == ("LookupError", "no such country")
    assert "raise LookupError" in fields["traceback"]
    assert unpack_error(pack_error(CorruptResult, "bad", "trace")) == {
        "type": "rqarm.errors.CorruptResult", "message": "bad", "traceback": "trace",
    }  # fmt: skip
    assert unpack_error(pack_error("Timeout", "after 5 s"))["type"] == "Timeout"


def test_a_long_error_keeps_the_head_of_its_message_and_the_tail_of_its_traceback():
    packed = pack_error("E", "m\ud800" + "ä" * 9_000, "t" * 99_000 + "ä" * 4_000 + "the end")
    fields = unpack_error(packed)
    assert len(packed) < 21_000
    assert fields["message"].startswith("m\\ud800ää")
    assert len(fields["message"].encode()) <= 4_096
    assert fields["traceback"].startswith("...t")
    assert fields["traceback"].endswith("äthe end")
    assert len(fields["traceback"].encode()) <= 16_384


def test_an_exception_whose_text_fails_is_still_packed():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no")

    assert "RuntimeError" in unpack_error(pack_error(Mute()))["message"]


@given(st.binary(max_size=100) | values.map(pack))
def test_any_bytes_are_read_as_an_error(packed):
    fields = unpack_error(packed)
    assert set(fields) == {"type", "message", "traceback"}
    assert all(type(text) is str for text in fields.values())


def test_the_code_of_the_extension_is_fixed():
    """Stored results of older versions depend on it."""
    assert pack((1, 2**64)) == b"\x93" + bytes([0xD4, EXT_CODE]) + b"t\x01" + bytes(
        [0xC7, 10, EXT_CODE]
    ) + b"i\x01" + bytes(8)
