"""The rules of rqarm.uri: the vectors, which other programs may use too, and laws that hold for any text."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rqarm.errors import InvalidRequest
from rqarm.uri import (
    MAX_CHARS,
    MAX_PARAMS,
    VERSION,
    Canonical,
    canonicalize,
    check_key,
    family,
    normalize_params,
    parse_query,
    redact,
)

VECTORS = json.loads((Path(__file__).parent / "vectors" / "uri.json").read_text())
SECRETS = ("*token*", "*password*", "sig*")


def form(vector: Any, **more: Any) -> Canonical:
    arguments = dict(vector) if isinstance(vector, dict) else {"uri": vector}
    return canonicalize(arguments.pop("uri"), arguments.pop("params", None), **arguments, **more)


def attempt(*arguments: Any, **options: Any) -> Canonical | InvalidRequest:
    """The form or the refusal; any other exception passes and fails the test."""
    try:
        return canonicalize(*arguments, **options)
    except InvalidRequest as error:
        return error


def cases(group: str) -> list[Any]:
    return [pytest.param(*case, id=f"{number}-{case[2]}") for number, case in enumerate(VECTORS[group])]


# -- vectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other", "why"), cases("equal"))
def test_requests_that_ask_the_same_have_one_form(one: Any, other: Any, why: str) -> None:
    assert form(one) == form(other), why
    assert_canonical(form(one), one)


@pytest.mark.parametrize(("one", "other", "why"), cases("different"))
def test_requests_that_ask_different_things_stay_apart(one: Any, other: Any, why: str) -> None:
    assert form(one).text != form(other).text, why
    assert form(one).key != form(other).key
    assert_canonical(form(one), one)
    assert_canonical(form(other), other)


@pytest.mark.parametrize(("vector", "reason", "why"), cases("rejected"))
def test_what_has_no_one_meaning_is_refused_and_says_where(vector: Any, reason: str, why: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        form(vector)
    assert reason in caught.value.reason, why
    assert caught.value.where
    with pytest.raises(InvalidRequest):
        form(vector, explain=True)


def assert_canonical(canonical: Canonical, vector: Any = "") -> None:
    operation = vector.get("operation", "") if isinstance(vector, dict) else ""
    again = canonicalize(canonical.uri, operation=operation)
    assert again == canonical
    assert again.key == canonical.key
    explained = canonicalize(canonical.uri, operation=operation, explain=True)
    assert explained == canonical
    assert explained.steps == ()
    assert canonical.uri.isascii()
    assert canonical.uri.isprintable()


def test_there_are_enough_vectors_and_none_twice() -> None:
    seen = [json.dumps(case[:2]) for group in ("equal", "different") for case in VECTORS[group]]
    assert len(seen) == len(set(seen))
    assert sum(map(len, VECTORS.values())) >= 130


# -- the form --------------------------------------------------------------------------------------------------------


def test_the_key_is_pinned() -> None:
    """A change here orphans every stored result: raise VERSION and say so in the changelog."""
    assert VERSION == 1
    assert canonicalize("/cities/FR?x=1").text == "1\n\n/cities/FR?x=1"
    assert canonicalize("/cities/FR?x=1").key == "b69da5828d16c3021f177a6e6039326f"
    assert canonicalize("/b", operation="op").text == "1\nop\n/b"
    assert canonicalize("/b", operation="op").key == "7b940ca75966f8214684f907579a611d"


@pytest.mark.parametrize(
    ("uri", "params", "where"),
    [
        ("/a b", None, "uri at character 3"),
        ("http://x.org/a\\", None, "uri at character 15"),
        ("/a/%zz", None, "uri at character 4"),
        ("/%41%ff", None, "uri at character 5"),
        ("/a?x=1&y=%41%FF", None, "uri at character 13"),
        ("/a?x=1&%FF=1", None, "uri at character 8"),
        ("/a?\u00e9=%FF", None, "uri at character 6"),
        ("http://u:p@x.org/", None, "uri at character 8"),
        ("http://x.org:y/", None, "uri at character 14"),
        ("http://-/", None, "uri at character 8"),
        ("http://%FF/", None, "uri at character 8"),
        ("/a", "?x=%FF", "params at character 4"),
        ("/a", "x=%FF", "params at character 3"),
        ("/a", {"x": None}, "params['x']"),
        ("/a", {"\ud800": "1"}, "params['\\ud800'] at character 1"),
        ("", None, "uri"),
    ],
)
def test_an_error_names_the_place(uri: str, params: Any, where: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        canonicalize(uri, params)
    assert caught.value.where == where
    assert str(caught.value).startswith(where)


def test_credentials_are_not_repeated_in_the_error() -> None:
    with pytest.raises(InvalidRequest) as caught:
        canonicalize("http://alice:hunter2@x.org/")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "params", "reason"),
    [
        ("/" + "a" * MAX_CHARS, None, "8,192"),
        ("/a", {"x": "a" * (MAX_CHARS + 1)}, "8,192"),
        ("/a", "x" * (MAX_CHARS + 1), "8,192"),
        ("/" + "a" * 5_000, {"x": "a" * 5_000}, "canonical form"),
        ("/" + "\u00e9" * 3_000, None, "canonical form"),
        ("/a?" + "x&" * (MAX_PARAMS + 1), None, "1,000"),
        ("/a?" + "\u00e9&" * (MAX_PARAMS + 1), None, "1,000"),
        ("/a?" + "x&" * 600, {"y": ["1"] * 401}, "1,000"),
        ("/a", {"y": ["1"] * (MAX_PARAMS + 1)}, "1,000"),
        ("/a", {"n": 10**1_300}, "too large"),
        ("http://" + "a." * 127 + "org/", None, "longer"),
    ],
    ids=range(11),
)
def test_limits_are_kept(uri: str, params: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        canonicalize(uri, params)


def test_the_largest_allowed_pass() -> None:
    assert len(canonicalize("/" + "a" * (MAX_CHARS - 1)).uri) == MAX_CHARS
    assert len(canonicalize("/a?" + "&".join(["x"] * MAX_PARAMS)).params) == MAX_PARAMS


def test_an_operation_has_at_most_200_characters() -> None:
    canonicalize("", operation="a" * 200)
    with pytest.raises(InvalidRequest, match="200"):
        canonicalize("", operation="a" * 201)


def test_a_form_shows_its_decoded_parts() -> None:
    canonical = canonicalize("https://x.org/K%c3%b6ln?b=1&a", {"b": "x y", "c": ""})
    assert canonical.path == "/K%C3%B6ln"
    assert canonical.params == (("a", None), ("b", "1"), ("b", "x y"), ("c", ""))
    assert canonicalize("urn:a").path == "a"
    assert canonicalize("/a").params == ()


class MultiDict(dict):  # type: ignore[type-arg]
    """As werkzeug's and Django's: items() gives one value per name."""

    def lists(self) -> list[tuple[str, list[str]]]:
        return [(name, list(values)) for name, values in super().items()]

    def items(self) -> Any:
        return [(name, values[0]) for name, values in super().items()]


def test_a_multi_dict_gives_all_its_values() -> None:
    assert canonicalize("/a", MultiDict(x=["1", "2"])).uri == "/a?x=1&x=2"


class Color(str):
    """A str whose str() differs, as that of str-and-Enum classes does between Python versions."""

    def __str__(self) -> str:
        return "Color.RED"

    __format__ = object.__format__


class Number(int):
    def __repr__(self) -> str:
        return "Number(1)"

    __str__ = __repr__


def test_subclasses_count_as_their_base() -> None:
    assert canonicalize(Color("/red"), {Color("c"): Color("red"), "n": Number(1)}).uri == "/red?c=red&n=1"
    assert canonicalize("", operation=Color("paint")).text == "1\npaint\n"
    assert type(canonicalize(Color("/red")).uri) is str


def test_the_steps_say_which_rule_did_what() -> None:
    steps = canonicalize(
        "HTTP://B\u00fccher.Example:080/%7ea/../\u00e9%2f?b=1&&a=x+y&_=9#top",
        {"c": 1},
        ignore_params=["_"],
        explain=True,
    ).steps
    assert [(step.rule, step.before, step.after) for step in steps] == [
        ("drop fragment", "#top", ""),
        ("lower-case scheme", "HTTP", "http"),
        ("IDNA host", "B\u00fccher.Example", "xn--bcher-kva.example"),
        ("normalise port", ":080", ":80"),
        ("drop default port", ":80", ""),
        ("percent-encode non-ASCII", "/%7ea/../\u00e9%2f", "/%7ea/../%C3%A9%2f"),
        ("upper-case escapes", "/%7ea/../%C3%A9%2f", "/%7Ea/../%C3%A9%2F"),
        ("decode unreserved", "/%7Ea/../%C3%A9%2F", "/~a/../%C3%A9%2F"),
        ("remove dot segments", "/~a/../%C3%A9%2F", "/%C3%A9%2F"),
        ("drop empty parameters", "b=1&&a=x+y&_=9", "b=1&a=x+y&_=9"),
        ("normalise escapes of parameters", "b=1&a=x+y&_=9", "b=1&a=x%20y&_=9"),
        ("merge params", "?b=1&a=x%20y&_=9", "?b=1&a=x%20y&_=9&c=1"),
        ("ignore parameter", "_=9", ""),
        ("sort parameters", "?b=1&a=x%20y&c=1", "?a=x%20y&b=1&c=1"),
    ]


def test_params_are_normalised_to_pairs_and_taken_back() -> None:
    pairs = normalize_params("?b=1&a&c=")
    assert pairs == (("b", "1"), ("a", None), ("c", ""))
    assert normalize_params(pairs) == pairs
    assert normalize_params(None) == ()
    assert normalize_params({"x": (1, 2.5, True, "y"), "z": []}) == (
        ("x", "1"),
        ("x", "2.5"),
        ("x", "true"),
        ("x", "y"),
    )


# -- laws ------------------------------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
# A seed only: drawing every choice from hypothesis makes its smallest example too large to shrink.
rngs = st.integers(0, 2**32 - 1).map(random.Random)
edgy = st.text(st.sampled_from("aZ09-._~!$&'()*+,;=:@/?%#[]\\ \t{}|\u00e9\u0301\u3000\U0001f600\ud800"), max_size=12)
name = st.one_of(st.sampled_from(["a", "b", "a b", "\u00e9", "=", "%41", "+", ""]), text)
value = st.one_of(st.none(), st.sampled_from(["", "1", "a&b", "=", "+", "%20", " "]), text)
pairs = st.lists(st.tuples(name, value).filter(lambda pair: pair != ("", None)), max_size=6)
segments = st.lists(
    st.one_of(st.sampled_from(["", "a", "a b", "~", "%", "\u00e9"]), text).filter(
        lambda segment: segment not in (".", "..")
    ),
    min_size=1,
    max_size=4,
)

#: what a path may hold raw without being unreserved: its escape is another request, so the writer has no choice there
_KEPT_RAW = "!$&'()*+,;=:@"


def write(part: str, rng: random.Random, raw: str, *, plus: bool) -> str:
    """One of the many spellings of a text."""
    out = []
    for char in part:
        escape = "".join(rng.choice((f"%{byte:02X}", f"%{byte:02x}")) for byte in char.encode())
        if plus and char == " ":
            out.append(rng.choice(("+", escape)))
        elif char in raw or (not char.isascii() and ord(char) > 0x3000 and char not in "\u3000\ufeff"):
            out.append(rng.choice((char, escape)))
        else:
            out.append(escape)
    return "".join(out)


def spell(path: list[str], params: list[tuple[str, str | None]], rng: random.Random) -> tuple[str, Any]:
    """A URI and params that decode to these segments and parameters: any order of names, any split, any escapes."""
    unreserved = string.ascii_letters + string.digits + "-._~"
    written = [write(segment, rng, unreserved, plus=False) for segment in path]
    while rng.random() < 0.3:
        written[rng.randrange(len(written)) : 0] = rng.choice(
            ([rng.choice((".", "%2e"))], ["x", rng.choice(("..", "%2E."))])
        )
    uri = "/" + "/".join(written)
    if uri.startswith("//"):
        uri = "/." + uri
    groups: dict[str, list[str | None]] = {}
    for key, each in params:
        groups.setdefault(key, []).append(each)
    ordered = [key for key, values in groups.items() for _ in values]
    rng.shuffle(ordered)
    mixed = [(key, groups[key].pop(0)) for key in ordered]
    cut = rng.randint(0, len(mixed))
    query = []
    for key, each in mixed[:cut]:
        piece = write(key, rng, unreserved + "/?:@!$'()*,;[]{}", plus=True)
        if each is not None:
            piece += "=" + write(each, rng, unreserved + "/?:@!$'()*,;[]{}=", plus=True)
        query.append(piece)
        query.extend([""] * (rng.random() < 0.1))
    if query:
        uri += "?" + "&".join(query)
    return uri + rng.choice(("", "#top")), mixed[cut:]


def meaning(path: list[str], params: list[tuple[str, str | None]]) -> Any:
    groups: dict[str, list[str | None]] = {}
    for key, each in params:
        groups.setdefault(key, []).append(each)
    return path, groups


@given(segments, pairs, rngs)
def test_all_spellings_of_a_request_have_one_form(path: list[str], params: Any, rng: random.Random) -> None:
    one = canonicalize(*spell(path, params, rng))
    other = canonicalize(*spell(path, params, rng))
    assert one == other
    assert_canonical(one)


@given(segments, pairs, segments, pairs, st.integers(0, 3), rngs)
def test_no_two_different_requests_share_a_form(
    path: list[str], params: Any, other_path: list[str], other_params: Any, same: int, rng: random.Random
) -> None:
    if same == 1:
        other_path = path
    elif same == 2:
        other_params = params
    elif same == 3:
        other_path, other_params = path, rng.sample(params, len(params))
    one, other = canonicalize(*spell(path, params, rng)), canonicalize(*spell(other_path, other_params, rng))
    is_same = meaning(path, params) == meaning(other_path, other_params)
    assert (one.text == other.text) is is_same
    assert (one.key == other.key) is is_same


@given(pairs, rngs)
def test_the_form_decodes_to_what_was_asked(params: Any, rng: random.Random) -> None:
    canonical = canonicalize(*spell(["a"], params, rng))
    assert canonical.params == tuple(sorted(params, key=lambda pair: pair[0]))


@given(st.dictionaries(name, text, max_size=6), rngs)
def test_the_order_of_names_does_not_matter(params: dict[str, str], rng: random.Random) -> None:
    shuffled = dict(rng.sample(list(params.items()), len(params)))
    assert canonicalize("/a", params) == canonicalize("/a", shuffled)


@given(name, text, text)
def test_the_order_of_repeated_values_matters(key: str, one: str, other: str) -> None:
    assume(one != other)
    assert canonicalize("/a", {key: [one, other]}).key != canonicalize("/a", {key: [other, one]}).key


@given(segments, pairs, rngs)
def test_the_explained_form_is_the_same(path: list[str], params: Any, rng: random.Random) -> None:
    """The fast path and the rules step by step agree."""
    spelled = spell(path, params, rng)
    assert canonicalize(*spelled) == canonicalize(*spelled, explain=True)


plain = st.text(st.sampled_from("abzAZ019-._~!$&'()*+,;=:@/?"), max_size=20)
host = st.text(st.sampled_from("abxnz019-_.:A"), max_size=12)


@given(st.sampled_from(["", "http://", "https://", "ftp://", "ws://", "//", "s:", "HTTP://"]), host, plain)
def test_the_fast_path_and_the_rules_agree_on_plain_text(scheme: str, authority: str, rest: str) -> None:
    uri = scheme + authority + "/" + rest if scheme.endswith("//") else scheme + "/" + rest
    explained, outcome = attempt(uri, explain=True), attempt(uri)
    if isinstance(explained, InvalidRequest):
        assert str(outcome) == str(explained)
    else:
        assert outcome == explained
        assert_canonical(explained)


@given(
    st.one_of(st.text(), edgy, edgy.map("http://".__add__), edgy.map("/a?".__add__), edgy.map("http://x.".__add__)),
    st.one_of(st.none(), edgy, st.text(), st.dictionaries(edgy, st.one_of(edgy, st.lists(edgy), st.floats()))),
    st.one_of(st.just(""), edgy),
)
def test_garbage_is_refused_or_has_a_stable_form(uri: str, params: Any, operation: str) -> None:
    canonical = attempt(uri, params, operation=operation)
    if isinstance(canonical, InvalidRequest):
        assert canonical.where
        return
    assert canonicalize(canonical.uri, operation=operation) == canonical
    assert canonicalize(uri, params, operation=operation, explain=True) == canonical
    assert canonical.text.split("\n") == ["1", operation, canonical.uri]


class Odd:
    pass


json_like = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), edgy, st.binary(max_size=4), st.builds(Odd)),
    lambda children: st.one_of(st.lists(children, max_size=3), st.dictionaries(edgy, children, max_size=3)),
    max_leaves=6,
)


@given(json_like, json_like, json_like)
def test_any_other_type_is_refused_cleanly(uri: Any, params: Any, operation: Any) -> None:
    outcome = attempt(uri, params, operation=operation)
    assert isinstance(outcome, Canonical) or outcome.reason


@given(pairs, rngs)
def test_an_ignored_parameter_leaves_no_trace(params: Any, rng: random.Random) -> None:
    noisy = [*params, ("utm_x", "1")]
    rng.shuffle(noisy)
    kept = [pair for pair in noisy if not pair[0].startswith("utm_")]
    assert canonicalize("/a", noisy, ignore_params=("utm_*",)) == canonicalize("/a", kept)


@given(pairs)
def test_parse_query_reads_what_the_form_writes(params: Any) -> None:
    assert parse_query(canonicalize("/a", params).uri.partition("?")[2]) == tuple(sorted(params, key=lambda p: p[0]))


# -- key, family -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["a", "report-2024_Q1", "0" * 32, "A" * 200])
def test_a_readable_key_is_kept(key: str) -> None:
    assert check_key(key) == key


@pytest.mark.parametrize("key", ["", "a b", "a:b", "a\n", "\u00e9", "A" * 201, None, 5, b"a", "\u0661", "\ud800"])
def test_a_bad_key_is_refused(key: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_key(key)
    assert caught.value.where == "key"


@pytest.mark.parametrize(
    ("uri", "operation", "expected"),
    [
        ("/cities/FR?x=1", "", "/cities"),
        ("/cities", "", "/cities"),
        ("/", "", "/"),
        ("https://api.x.org/v1/items", "", "api.x.org/v1"),
        ("https://api.x.org:8443/v1/items", "", "api.x.org:8443/v1"),
        ("https://api.x.org/?a=1", "", "api.x.org/"),
        ("//api.x.org/v1/items", "", "api.x.org/v1"),
        ("http://u:p@x.org/a/b", "", "x.org/a"),
        ("report/7", "", "report"),
        ("urn:isbn:123", "", "urn:isbn"),
        ("/cities/FR", "thumbnail", "thumbnail"),
        ("", "thumbnail", "thumbnail"),
        ("?a=1", "", ""),
        ("/" + "a" * 500, "", "/" + "a" * 99),
        ("", "o" * 200, "o" * 100),
    ],
)
def test_the_family_is_coarse(uri: str, operation: str, expected: str) -> None:
    assert family(uri, operation) == expected


def test_a_form_has_the_family_of_its_uri() -> None:
    assert family(canonicalize("/Cities/FR", {"x": "1"})) == "/Cities"


@given(st.one_of(st.text(), edgy))
def test_family_never_raises(uri: str) -> None:
    assert len(family(uri)) <= 100


# -- redact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/a?x=1", "/a?x=1"),
        ("/a?token=abc&x=1", "/a?token=***&x=1"),
        ("/a?x=1&Access_Token=abc", "/a?x=1&Access_Token=***"),
        ("/a?%74oken=abc", "/a?%74oken=***"),
        ("/a?my+token=abc", "/a?my+token=***"),
        ("/a?token=a=b?c;d", "/a?token=***"),
        ("/a?token=", "/a?token=***"),
        ("/a?token", "/a?token"),
        ("/a?x=1;token=abc;y", "/a?x=1;token=***"),
        ("/a?x=1?token=abc", "/a?x=1?token=***"),
        ("/a#access_token=abc&x=1", "/a#access_token=***&x=1"),
        ("/a?x=1#token=abc", "/a?x=1#token=***"),
        ("token=abc", "token=abc"),
        ("?token=abc", "?token=***"),
        ("http://u:p@x.org/a", "http://***@x.org/a"),
        ("//u:p@x.org/a", "//***@x.org/a"),
        ("http:\\\\u:p@x.org/a", "http:\\\\***@x.org/a"),
        ("u:p@x.org/a", "u:***@x.org/a"),
        ("http://u:p/q#r@x.org/a", "http://***@x.org/a"),
        ("http://u:a@b@x.org/a", "http://***@x.org/a"),
        ("http://x.org:80/@user", "http://x.org:80/@user"),
        ("/@user/a@b", "/@user/a@b"),
        ("/a?next=http://u:p@x.org/&b=1", "/a?next=http://***@x.org/&b=1"),
        ("/a?mail=a@b.org", "/a?mail=a@b.org"),
        ("/a?%zz=1&token=abc&%ff=\ud800", "/a?%zz=1&token=***&%ff=\ud800"),
        ("", ""),
    ],
)
def test_redact_hides_secrets_and_nothing_else(uri: str, expected: str) -> None:
    assert redact(uri, SECRETS) == expected
    assert redact(expected, SECRETS) == expected


def test_redact_without_patterns_still_hides_userinfo() -> None:
    assert redact("http://u:p@x.org/?token=abc", ()) == "http://***@x.org/?token=abc"


@pytest.mark.parametrize("thing", [None, 5, b"http://u:p@x.org/", ["/a?token=abc"]])
def test_what_is_no_text_is_hidden(thing: Any) -> None:
    assert redact(thing, SECRETS) == "***"


@given(st.one_of(st.text(), edgy, edgy.map("//".__add__)), st.lists(st.one_of(edgy, st.just("*token*")), max_size=3))
def test_redact_never_raises_and_is_idempotent(uri: str, patterns: list[str]) -> None:
    once = redact(uri, patterns)
    assert redact(once, patterns) == once


@given(
    st.lists(st.tuples(name, text), max_size=3),
    st.sampled_from(["token", "TOKEN", "my token", "%token\u00e9", "to;ken=token", "?token", "sig"]),
    st.sampled_from([quote, quote_plus, lambda part: quote(part, safe="=;?/:@+")]),
    st.sampled_from(["/a?", "http://x.org?", "/a#", "/a?z=1#", "garbage \\?"]),
    rngs,
)
def test_redact_never_leaks_a_secret_value(
    others: Any, key: str, write_value: Any, lead: str, rng: random.Random
) -> None:
    secret = "hunter2;x=hunter2?hunter2=hunter2&hunter2#hunter2@hunter2/"
    query = [f"{quote(each)}={quote_plus(item)}" for each, item in others]
    query.insert(rng.randint(0, len(query)), f"{quote(key)}={write_value(secret)}")
    shown = redact(lead + "&".join(query), SECRETS)
    assert "hunter2" not in shown
    assert "***" in shown


@given(st.dictionaries(name, text, max_size=3), st.sampled_from(["token", "a token=", "&password", "Sig[]"]))
def test_redact_hides_secrets_in_a_canonical_uri(params: dict[str, str], key: str) -> None:
    shown = redact(canonicalize("/a", {**params, key: ["hunter2", "&hunter2"]}).uri, SECRETS)
    assert "hunter2" not in shown
