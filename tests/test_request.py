"""BatchRequest: its checks, its identity and the packed form."""

from __future__ import annotations

import copy
import math
import pickle
import zlib
from collections import OrderedDict
from typing import Any

import msgpack  # type: ignore[import-untyped, unused-ignore] # it ships no types
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rqarm.errors import InvalidRequest, RqarmError, VersionSkew
from rqarm.model import Priority
from rqarm.request import MAX_PACKED_BYTES, SCHEMA, BatchRequest, as_request, unpack
from rqarm.uri import MAX_CHARS, MAX_PARAMS, canonicalize

FULL: dict[str, Any] = {
    "operation": "report",
    "ttl": 60.5,
    "key": "my-report",
    "queue": "slow",
    "priority": "high",
    "estimated_time": 2,
    "tags": ("b", "a", "b"),
}


# -- what it shows ---------------------------------------------------------------------------------------------------


def test_a_request_has_the_identity_of_its_uri_and_params() -> None:
    request = BatchRequest("/cities/FR?z=1#top", {"min_population": 100_000})
    canonical = canonicalize("/cities/FR", "min_population=100000&z=1")
    assert request.uri == "/cities/FR?z=1#top"
    assert request.params == (("min_population", "100000"),)
    assert request.canonical == canonical.uri == "/cities/FR?min_population=100000&z=1"
    assert request.identity == canonical.text
    assert request.key == canonical.key
    assert not request.has_readable_key
    assert request.family == "/cities"
    assert request.query == {"min_population": ["100000"], "z": ["1"]}


def test_the_defaults() -> None:
    request = BatchRequest("/a")
    assert request.params == ()
    assert request.operation == ""
    assert request.sticky is False
    assert [request.ttl, request.queue, request.estimated_time] == [None, None, None]
    assert request.priority is Priority.DEFAULT
    assert request.tags == ()


def test_all_options_are_kept_and_normalised() -> None:
    request = BatchRequest("", "a=1&b", **FULL)
    assert request.params == (("a", "1"), ("b", None))
    assert request.query == {"a": ["1"], "b": [""]}
    assert request.ttl == 60.5
    assert request.key == "my-report"
    assert request.has_readable_key
    assert request.queue == "slow"
    assert request.priority is Priority.HIGH
    assert request.estimated_time == 2.0
    assert request.tags == ("a", "b")
    assert request.family == "report"


def test_the_caller_cannot_change_params_afterwards() -> None:
    params = {"x": ["1"]}
    request = BatchRequest("/a", params)
    params["x"].append("2")
    request.query["x"].append("3")
    assert request.canonical == "/a?x=1"
    assert request.identify(("nothing",)).uri == "/a?x=1"


@pytest.mark.parametrize("name", ["uri", "ttl", "key", "_forms", "other"])
def test_a_request_is_immutable(name: str) -> None:
    request = BatchRequest("/a")
    with pytest.raises(AttributeError):
        setattr(request, name, "x")
    with pytest.raises(AttributeError):
        delattr(request, name)


def test_repr_is_short_and_hides_secrets() -> None:
    assert repr(BatchRequest("/a?x=1")) == "BatchRequest('/a?x=1')"
    assert repr(BatchRequest("/a?token=hunter2")) == "BatchRequest('/a?token=***')"
    shown = repr(BatchRequest("/a", "b", **FULL))
    assert shown == (
        "BatchRequest('/a?b', operation='report', ttl=60.5, key='my-report', queue='slow', priority='high')"
    )
    assert len(repr(BatchRequest("/" + "a" * 5_000))) < 130


def test_as_request_takes_a_request_or_a_uri() -> None:
    request = BatchRequest("/a")
    assert as_request(request) is request
    assert as_request("/a") == request
    for thing in (None, 5, b"/a", {"uri": "/a"}):
        with pytest.raises(InvalidRequest):
            as_request(thing)  # type: ignore[arg-type]


# -- equality --------------------------------------------------------------------------------------------------------


def test_equality_is_by_identity_and_options() -> None:
    request = BatchRequest("/a?x=1&b=2", ttl=60, tags=["a", "b"])
    same = BatchRequest("/x/../a", OrderedDict(b="2", x="1"), ttl=60.0, tags={"b", "a"})
    assert request == same
    assert hash(request) == hash(same)
    others = [
        BatchRequest("/a?x=1&b=2"),
        BatchRequest("/a?x=1", ttl=60, tags=["a", "b"]),
        BatchRequest("/a?x=1&b=2", ttl=60, tags=["a", "b"], operation="o"),
        BatchRequest("/a?x=1&b=2", ttl=60, tags=["a", "b"], queue="q"),
        BatchRequest("/a?x=1&b=2", ttl=60, tags=["a", "b"], priority="low"),
        BatchRequest("/a?x=1&b=2", ttl=60, tags=["a", "b"], key="k"),
        BatchRequest("/a?x=1&b=2", ttl=60, tags=["a", "b"], estimated_time=1),
        BatchRequest("/a?x=1&b=2", sticky=True, tags=["a", "b"]),
    ]
    assert request not in others
    assert request != "/a?b=2&x=1"
    assert len({request, same, *others}) == 9


# -- ignored parameters ----------------------------------------------------------------------------------------------


def test_identify_leaves_ignored_parameters_out_and_remembers() -> None:
    request = BatchRequest("/a?utm_x=1", {"_": "2", "b": "3"})
    form = request.identify(("utm_*", "_"))
    assert form == canonicalize("/a?b=3")
    assert request.identify(("utm_*", "_")) is form
    assert request.identify() is request.identify(())
    assert request.identify().key == request.key != form.key
    assert request.canonical == "/a?_=2&b=3&utm_x=1"


def test_a_readable_key_stays_the_key_whatever_is_ignored() -> None:
    request = BatchRequest("/a?utm_x=1", key="k")
    assert request.key == request.identify(("utm_*",)).key == "k"
    assert request.identity == BatchRequest("/a?utm_x=1").identity
    assert request.identify(("utm_*",)).text == BatchRequest("/a").identity


def test_patterns_that_are_no_list_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        BatchRequest("/a?utm_x=1").identify("utm_*")  # type: ignore[arg-type]


# -- checks ----------------------------------------------------------------------------------------------------------


BAD: dict[str, list[Any]] = {
    "ttl": [0, -1, 0.0, -0.0, 0.0001, math.nan, math.inf, -math.inf, 1e11, 10**400, "60", True, False, [], b"1", 1j],
    "sticky": [1, 0, "yes", None],
    "estimated_time": [-1, -0.001, math.nan, math.inf, "1", True],
    "priority": ["urgent", "HIGH", "", 0, 1, None, [], "high\n", "\ud800"],
    "queue": ["", "a b", "a:b", "a{b}", "a*", "a?", "a[0]", "\u00e9", "a\n", 5, "a" * 101],
    "key": ["", "a b", "a:b", "a" * 201, 5, b"k", "\u00e9"],
    "tags": ["tag", b"tag", 5, None, {"a": "b"}, iter(["a"]), [str(number) for number in range(21)]],
    "operation": ["a\nb", None, " a"],
    "params": [5, [5], {5: "x"}],
}
BAD["tags"] += [[tag] for tag in ("", "a" * 101, "a\nb", "a\x00", "\ud800", 5, None, b"a")]


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in BAD.items() for value in values])
def test_a_bad_option_is_refused_by_its_name(option: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        BatchRequest("/a", **{option: value})
    assert caught.value.where == option


def test_sticky_and_ttl_exclude_each_other() -> None:
    with pytest.raises(InvalidRequest, match="not both"):
        BatchRequest("/a", sticky=True, ttl=60)


@pytest.mark.parametrize(
    "options",
    [
        {"ttl": 0.001},
        {"ttl": 1e10},
        {"ttl": 86_400},
        {"sticky": True},
        {"estimated_time": 0},
        {"priority": "low"},
        {"priority": Priority.LOW},
        {"queue": "arm-slow_2.x/y"},
        {"key": "A" * 200},
        {"tags": [f"tag {number}" for number in range(20)]},
        {"tags": frozenset({"\u00e9" * 100})},
    ],
)
def test_a_good_option_is_taken_and_survives_packing(options: dict[str, Any]) -> None:
    request = BatchRequest("/a", **options)
    assert unpack(request.pack()) == request


@pytest.mark.parametrize("uri", ["", "/a b", "http://u:p@x.org/", None, 5])
def test_a_bad_uri_is_refused_at_once(uri: Any) -> None:
    with pytest.raises(InvalidRequest):
        BatchRequest(uri)


# -- packed ----------------------------------------------------------------------------------------------------------


def test_a_small_request_packs_small() -> None:
    packed = BatchRequest("/cities/FR").pack()
    assert msgpack.unpackb(packed) == {"v": SCHEMA, "u": "/cities/FR"}
    assert len(packed) == 17


def test_the_packed_form_is_pinned() -> None:
    """Redis holds it: a change needs another SCHEMA."""
    assert msgpack.unpackb(BatchRequest("/a#f", "x=1&b", **FULL).pack()) == {
        "v": 1,
        "u": "/a#f",
        "p": [["x", "1"], ["b", None]],
        "o": "report",
        "t": 60.5,
        "k": "my-report",
        "q": "slow",
        "r": "high",
        "e": 2,
        "g": ["a", "b"],
    }
    assert msgpack.unpackb(BatchRequest("/a", sticky=True).pack()) == {"v": 1, "u": "/a", "s": True}


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
seconds = st.floats(0.001, 1e10)
options = st.fixed_dictionaries(
    {},
    optional={
        "params": st.one_of(
            st.dictionaries(text, st.one_of(text, st.lists(text, max_size=3))), st.just("b=1&a&b=&a=2")
        ),
        "operation": st.sampled_from(["", "op", "\u00e9 x"]),
        "key": st.from_regex(r"[A-Za-z0-9_-]{1,200}", fullmatch=True),
        "queue": st.sampled_from(["q", "slow-1"]),
        "priority": st.sampled_from([*Priority, "high", "default", "low"]),
        "estimated_time": st.one_of(st.just(0), seconds, st.integers(0, 10**10)),
        "tags": st.lists(st.sampled_from(["a", "b", "\u00e9"]), max_size=4),
    },
)
lives: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}), st.just({"sticky": True}), seconds.map(lambda ttl: {"ttl": ttl})
)


@given(st.sampled_from(["/a", "/\u00e9?b=%2f&a#top", "HTTP://X.org:80", "report/7"]), options, lives)
def test_a_packed_request_comes_back_the_same(uri: str, chosen: dict[str, Any], life: dict[str, Any]) -> None:
    request = BatchRequest(uri, **chosen, **life)
    packed = request.pack()
    again = unpack(packed)
    assert again == request
    assert (again.uri, again.params, again.key, again.identity) == (uri, request.params, request.key, request.identity)
    assert again.identify(("a*",)) == request.identify(("a*",))
    assert again.pack() == packed
    assert len(packed) <= MAX_PACKED_BYTES
    assert copy.deepcopy(request) == pickle.loads(pickle.dumps(request)) == request


def test_the_largest_requests_fit_the_bound() -> None:
    tags = [f"{number:02}" + "\U0001f600" * 98 for number in range(20)]
    requests = [
        BatchRequest("/a#" + "\U0001f600" * (MAX_CHARS - 3), {"x": "a" * (MAX_CHARS - 5)}, tags=tags),
        BatchRequest("/a#" + "\U0001f600" * (MAX_CHARS - 3), [("a" * 5, "1")] * MAX_PARAMS, tags=tags),
    ]
    for request in requests:
        assert unpack(request.pack()) == request


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\xc1",
        b"\x80",
        b"\x81",
        b"\x93\x01\x02\x03",
        b"\x81\xa1v\x01",
        b"\x82\xa1v\x01\xa1u\xa2/a\x00",
        b"\x91" * 5_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x82\xa1v\x01\xa1u\xa1\xff",
        b"\x81\x01\x01",
        b"\x81\x90\x01",
        b"\x81\xa1v\xd6\xff\x00\x00\x00\x00",
        b"x" * (MAX_PACKED_BYTES + 1),
        msgpack.packb({"v": True, "u": "/a"}),
        msgpack.packb({"v": "1", "u": "/a"}),
        msgpack.packb({"v": 1, "u": b"/a"}),
        msgpack.packb({"v": 1, "u": "/a b"}),
        msgpack.packb({"v": 1, "u": "/a", "t": 0}),
        msgpack.packb({"v": 1, "u": "/a", "t": 5, "s": True}),
        msgpack.packb({"v": 1, "u": "/a", "p": [["x"]]}),
        msgpack.packb({"v": 1, "u": "/a", "r": 0}),
        msgpack.packb({"v": 1, "u": "/a", "o": None}),
        "text",
        None,
        5,
    ],
    ids=range(28),
)
def test_bytes_that_are_no_request_are_refused(blob: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        unpack(blob)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("fields", [{"v": 2}, {"v": 0, "u": "/a"}, {"v": 1, "u": "/a", "new": 1}, {"v": 1, b"x": 1}])
def test_a_request_of_another_version_says_upgrade(fields: dict[Any, Any]) -> None:
    with pytest.raises(VersionSkew, match="upgrade"):
        unpack(msgpack.packb(fields))


LONG = "https://api.example.org/v1/cities/FR?min_population=100000&format=csv"


def test_beside_its_identity_a_request_takes_a_third() -> None:
    request = BatchRequest(LONG)
    packed = request.pack_beside(request.identity)
    assert len(packed) < 30 < 77 == len(request.pack())
    again = unpack(packed, request.identity.encode())
    assert (again, again.uri, again.query) == (request, LONG, request.query)


def test_what_gets_no_smaller_beside_its_identity_stays_readable_alone() -> None:
    request = BatchRequest("/a")
    assert request.pack_beside(request.identity) == request.pack()


@given(st.sampled_from(["/a", LONG, f"{LONG}#top", "x" * 5_000]), options, lives)
def test_a_request_packed_beside_its_identity_comes_back_the_same(
    uri: str, chosen: dict[str, Any], life: dict[str, Any]
) -> None:
    request = BatchRequest(uri, **chosen, **life)
    again = unpack(request.pack_beside(request.identity), request.identity.encode())
    assert (again, again.uri, again.params) == (request, request.uri, request.params)


def test_a_request_beside_another_identity_is_an_error_of_ours() -> None:
    packed = BatchRequest(LONG).pack_beside(BatchRequest(LONG).identity)
    for identity in (b"", b"1\n\n/a"):
        with pytest.raises(InvalidRequest, match="packed request"):
            unpack(packed, identity)


def test_a_packed_request_does_not_unfold_without_end() -> None:
    deflated = zlib.compress(b"\x00" * 10_000_000, wbits=-15)
    with pytest.raises(InvalidRequest, match="too many"):
        unpack(msgpack.packb({"v": 2, "z": deflated}), b"identity")


def test_other_buffers_are_read_too() -> None:
    packed = BatchRequest("/a").pack()
    assert unpack(bytearray(packed)) == unpack(memoryview(packed)) == BatchRequest("/a")  # type: ignore[arg-type]


def outcome(blob: bytes, identity: bytes = b"") -> BatchRequest | RqarmError:
    try:
        return unpack(blob, identity)
    except (InvalidRequest, VersionSkew) as error:
        return error


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), text, st.binary(max_size=5)),
    lambda children: st.one_of(st.lists(children, max_size=3), st.dictionaries(text, children, max_size=3)),
    max_leaves=5,
)


@given(
    st.one_of(
        st.binary(max_size=60),
        anything.map(msgpack.packb),
        st.fixed_dictionaries(
            {"v": st.just(1), "u": st.sampled_from(["/a", "", "x:y"])},
            optional=dict.fromkeys("postkqreg", anything),
        ).map(msgpack.packb),
        st.fixed_dictionaries({"v": st.just(2), "z": st.one_of(anything, st.binary(max_size=60))}).map(msgpack.packb),
    )
)
def test_any_bytes_give_a_request_or_an_error_of_ours(blob: bytes) -> None:
    result = outcome(blob)
    if isinstance(result, BatchRequest):
        assert unpack(result.pack()) == result


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_damaged_request_never_breaks_the_reader(position: int, byte: int) -> None:
    packed = bytearray(BatchRequest("/a?x=1", {"y": ["1", "2"]}, **FULL).pack())
    packed[position % len(packed)] = byte
    outcome(bytes(packed))
    outcome(bytes(packed[: position % len(packed)]))


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_damaged_request_beside_its_identity_never_breaks_the_reader(position: int, byte: int) -> None:
    request = BatchRequest(LONG, **FULL)
    packed = bytearray(request.pack_beside(request.identity))
    packed[position % len(packed)] = byte
    outcome(bytes(packed), request.identity.encode())
    outcome(bytes(packed[: position % len(packed)]), request.identity.encode())
