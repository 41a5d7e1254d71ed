"""Routes, arguments, resources and the context: all without a server."""

from __future__ import annotations

import asyncio
import importlib.metadata
import math
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

import pytest
from contexts import echo, make_context, run
from hypothesis import assume, given
from hypothesis import strategies as st

from rqarm.context import Context, RetryLater
from rqarm.errors import ConfigError, InvalidRequest, NoHandler, ResultTooLarge
from rqarm.handlers import Handlers
from rqarm.model import Key, Priority
from rqarm.mounts import AppRefusal
from rqarm.request import BatchRequest
from rqarm.resources import ResourceError
from rqarm.routes import Retry, Route

if TYPE_CHECKING:
    from typing import Any as OnlyForTypeCheckers


@pytest.fixture
def handlers() -> Handlers:
    return Handlers()


# --- matching ---------------------------------------------------------------------------------------------------------


def test_the_first_match_in_order_of_registration_wins(handlers: Handlers) -> None:
    echo(handlers, "/a/{x:int}")
    echo(handlers, "/a/{x}")
    echo(handlers, "/{x:path}")
    assert run(handlers, "/a/1") == ("/a/{x:int}", 1)
    assert run(handlers, "/a/b") == ("/a/{x}", "b")
    assert run(handlers, "/a/b/c") == ("/{x:path}", "a/b/c")


@pytest.mark.parametrize(
    ("template", "uri", "value"),
    [
        ("/a/{x}", "/a/b", "b"),
        ("/a/{x}", "/a/b%20c", "b c"),
        ("/a/{x}", "/a/caf%C3%A9", "café"),
        ("/a/{x}", "/a/b%2Fc", "b/c"),
        ("/a/{x}", "/a/b%252Fc", "b%2Fc"),
        ("/a/{x}", "/a/b+c", "b+c"),
        ("/a/{x}", "/a/b%0Ac", "b\nc"),
        ("/a/{x}/c", "/a/b%2Fc/c", "b/c"),
        ("/a/{x:path}", "/a/b%2Fc/d", "b/c/d"),
        ("/a/{x:path}/z", "/a/b/c/z", "b/c"),
        ("/a/{x:int}", "/a/-07", -7),
        ("/a/{x:float}", "/a/-1.5e3", -1500.0),
        ("/a/{x:float}", "/a/3", 3.0),
        ("/a/{x}.csv", "/a/b.c.csv", "b.c"),
        ("/städte/{x}", "/st%C3%A4dte/1", "1"),
        ("/st%c3%a4dte/{x}", "/städte/1", "1"),
        ("/a%2Fb/{x}", "/a%2fb/1", "1"),
        ("/a.b/{x}", "/a.b/1", "1"),
        ("/a/{x}", "https://any.host:81/a/b?c=d", "b"),
        ("/a/{x}", "//any.host/a/b", "b"),
        ("https://API.x.org:443/v1/{x}", "https://api.x.org/v1/7", "7"),
        ("https://bücher.example/{x}", "https://xn--bcher-kva.example/7", "7"),
        ("https://api.x.org:81/{x}", "https://api.x.org:81/7", "7"),
    ],
)
def test_a_template_takes_the_decoded_value(handlers: Handlers, template: str, uri: str, value: object) -> None:
    echo(handlers, template)
    assert run(handlers, uri) == (template, value)


@pytest.mark.parametrize(
    ("template", "uri"),
    [
        ("/a/{x}", "/a/"),
        ("/a/{x}", "/a/b/c"),
        ("/a/{x}", "/a/b/"),
        ("/a/{x}", "/A/b"),
        ("/a/{x:int}", "/a/1.5"),
        ("/a/{x:int}", "/a/%D9%A1"),
        ("/a/{x:float}", "/a/nan"),
        ("/a.b/{x}", "/aXb/1"),
        ("/a/b/{x}", "/a%2Fb/1"),
        ("https://api.x.org/v1/{x}", "/v1/7"),
        ("https://api.x.org/v1/{x}", "http://api.x.org/v1/7"),
        ("https://api.x.org/v1/{x}", "https://api.x.org:81/v1/7"),
    ],
)
def test_a_template_leaves_the_rest(handlers: Handlers, template: str, uri: str) -> None:
    echo(handlers, template)
    with pytest.raises(NoHandler):
        handlers.match(BatchRequest(uri))


def test_an_operation_takes_its_name_and_routes_take_no_operation(handlers: Handlers) -> None:
    echo(handlers, "/{x:path}")

    @handlers.operation("thumbnail", timeout=9)
    def thumbnail(request: BatchRequest, context: Context, size: int = 64) -> Any:
        return request.uri, size

    request = BatchRequest("/img/1", {"size": 8}, operation="thumbnail")
    assert run(handlers, request) == ("/img/1", 8)
    assert handlers.match(request).route == Route(name="thumbnail", operation="thumbnail", timeout=9)
    with pytest.raises(NoHandler):
        handlers.match(BatchRequest("/img/1", operation="other"))


def test_the_fallback_takes_what_nothing_else_takes(handlers: Handlers) -> None:
    @handlers.fallback
    def rest(request: BatchRequest, context: Context, page: int = 1) -> Any:
        return request.uri, page

    echo(handlers, "/a/{x}")
    assert run(handlers, "/a/b") == ("/a/{x}", "b")
    assert run(handlers, "/zzz?page=3") == ("/zzz?page=3", 3)
    assert run(handlers, BatchRequest("/a/b", operation="o")) == ("/a/b", 1)
    assert [route.name for route in handlers.routes] == ["/a/{x}", "fallback"]


def test_the_rejection_names_the_closest_routes_and_no_parameters(handlers: Handlers) -> None:
    with pytest.raises(NoHandler, match="there is none"):
        handlers.match(BatchRequest("/a"))
    echo(handlers, "/cities/{x}")
    echo(handlers, "https://api.x.org/countries/{x}")
    echo(handlers, "/quite/another/{x:int}")
    with pytest.raises(NoHandler) as caught:
        handlers.match(BatchRequest("https://api.y.org/citties/FR?token=secret"))
    assert "'/citties/FR' (closest: /cities/{x}, https://api.x.org/countries/{x})" in str(caught.value)
    assert "secret" not in str(caught.value)

    @handlers.operation("thumbnail")
    def thumbnail(request: BatchRequest, context: Context) -> None: ...

    with pytest.raises(NoHandler, match=r"no operation takes 'thumnail' \(closest: thumbnail\)"):
        handlers.match(BatchRequest("", operation="thumnail"))


def test_an_async_handler_is_called_and_gives_its_coroutine(handlers: Handlers) -> None:
    @handlers.route("/a")
    async def answer(request: BatchRequest, context: Context) -> int:
        return 7

    assert answer.is_async
    assert asyncio.run(run(handlers, "/a")) == 7


# --- arguments --------------------------------------------------------------------------------------------------------


def test_parameters_are_filled_by_name_and_converted(handlers: Handlers) -> None:
    @handlers.route("/q/{n}")
    def q(  # type: ignore[no-untyped-def]
        request: BatchRequest,
        context: Context,
        n: int,
        plain,
        ratio: float,
        flag: bool,
        names: list[str],
        maybe: Optional[int],  # noqa: UP045 - the old spelling must work
        *,
        also: int | None = None,
        several: list[int] | None = None,
        left: str = "out",
        **rest: object,
    ) -> Any:
        return n, plain, ratio, flag, names, maybe, also, several, left, rest

    uri = "/q/5?plain=a%20b&ratio=.5&flag=Yes&names=b&names=a&maybe=-3&several=1&several=2&unknown=u"
    assert run(handlers, uri) == (5, "a b", 0.5, True, ["b", "a"], -3, None, [1, 2], "out", {})


@pytest.mark.parametrize(
    ("annotation", "query", "reason"),
    [
        (int, "p=x", "'x' is not of type int"),
        (int, "p=1_0", "is not of type int"),
        (int, "p=%201", "is not of type int"),
        (int, "p=1.0", "is not of type int"),
        (int, "p=" + "9" * 5000, "int"),
        (float, "p=nan", "is not of type float"),
        (float, "p=1e999", "is not of type float"),
        (bool, "p=2", "'2' is not true or false"),
        (bool, "p", "'' is not true or false"),
        (str, "p=1&p=2", "given 2 times"),
        (list[int], "p=1&p=x", "'x' is not of type int"),
        (int | None, "p=", "'' is not of type int"),
        (int, "", "is missing and has no default"),
        (int, "p=" + "x" * 100, "x…' is not of type int"),
    ],
)
def test_a_bad_parameter_is_an_invalid_request_that_names_it(
    handlers: Handlers, annotation: Any, query: str, reason: str
) -> None:
    def f(request: BatchRequest, context: Context, p: Any) -> None: ...

    f.__annotations__["p"] = annotation
    handlers.route("/f")(f)
    with pytest.raises(InvalidRequest) as caught:
        handlers.match(BatchRequest(f"/f?{query}"))
    assert "'p'" in caught.value.where
    assert reason in caught.value.reason
    assert not Retry(max=3).wants(caught.value, 0)


def test_a_path_value_wins_over_a_query_value_of_the_same_name(handlers: Handlers) -> None:
    echo(handlers, "/a/{x}")
    assert run(handlers, "/a/b?x=c&x=d") == ("/a/{x}", "b")


def test_arguments_changed_by_a_retry_win(handlers: Handlers) -> None:
    echo(handlers, "/a/{x}")
    assert run(handlers, "/a/b", kwargs={"x": [1], "unknown": 2}) == ("/a/{x}", [1])


def test_annotations_for_type_checkers_only_do_no_harm_where_they_do_not_matter(handlers: Handlers) -> None:
    @handlers.route("/a")
    def a(request: OnlyForTypeCheckers, context: OnlyForTypeCheckers, n: int = 1) -> OnlyForTypeCheckers:
        return n

    assert run(handlers, "/a?n=2") == 2


# --- building requests ------------------------------------------------------------------------------------------------


def test_a_handler_is_still_its_function_and_can_have_several_routes(handlers: Handlers) -> None:
    @handlers.route("/a/{x}")
    @handlers.route("/b/{x}")
    def f(request: BatchRequest, context: Context, x: str) -> str:
        """Say x."""
        return x

    request = BatchRequest("/a/1")
    assert f(request, make_context(), "direct") == "direct"
    assert (f.__name__, f.__doc__) == ("f", "Say x.")
    assert run(handlers, "/a/1") == run(handlers, "/b/1") == "1"
    assert f.request("1") == BatchRequest("/a/1")
    assert [route.name for route in handlers.routes] == ["/b/{x}", "/a/{x}"]


def test_request_carries_the_route_s_options(handlers: Handlers) -> None:
    @handlers.route("/c/{country}", ttl=60, queue="slow", priority="low", estimated_time=5, timeout=9)
    def cities(request: BatchRequest, context: Context, country: str, min_population: int = 0) -> None: ...

    @handlers.operation("thumbnail", sticky=True)
    def thumbnail(request: BatchRequest, context: Context, size: int = 64) -> None: ...

    request = cities.request("FR", min_population=100_000)
    assert request == BatchRequest(
        "/c/FR?min_population=100000", ttl=60, queue="slow", priority="low", estimated_time=5
    )
    assert request.priority is Priority.LOW
    assert thumbnail.request("/img/1", size=8) == BatchRequest("/img/1?size=8", operation="thumbnail", sticky=True)
    assert thumbnail.request() == BatchRequest("", operation="thumbnail", sticky=True)


def test_request_of_a_host_template_keeps_the_host(handlers: Handlers) -> None:
    @handlers.route("https://api.x.org/v1/{x}/{y:path}")
    def f(request: BatchRequest, context: Context, x: str, y: str) -> None: ...

    assert f.request("a/b", y="c/d").canonical == "https://api.x.org/v1/a%2Fb/c/d"


@pytest.mark.parametrize(
    ("args", "params", "reason"),
    [
        ((), {}, "x: missing in the path"),
        (("a", "b"), {}, "takes 1 positional arguments, not 2"),
        (("a",), {"x": "b"}, "x: given twice"),
        (("a",), {"z": 1}, "no such parameter: z; there are: x, n, many"),
        (("a",), {"n": "q"}, "'q' is not of type int"),
        (("a",), {"n": None}, "None cannot stand"),
        (("a",), {"n": [1, 2]}, "is no str, int, float or bool"),
        (("a",), {"n": True}, "'true' is not of type int"),
        (("a",), {"n": b"1"}, "is no str, int, float or bool"),
        ((None,), {}, "None cannot stand"),
        (("",), {}, "cannot stand in the URI"),
        ((".",), {}, "cannot stand in the URI"),
        (("..",), {}, "cannot stand in the URI"),
        (("\ud800",), {}, "has no UTF-8 form"),
        (("a" * 9000,), {}, "at most 8,192 are allowed"),
    ],
)
def test_request_refuses_what_the_handler_could_not_take(
    handlers: Handlers, args: tuple[Any, ...], params: dict[str, Any], reason: str
) -> None:
    @handlers.route("/a/{x}")
    def f(request: BatchRequest, context: Context, x: str, n: int = 5, many: list[str] | None = None) -> None: ...

    with pytest.raises(InvalidRequest) as caught:
        f.request(*args, **params)
    assert reason in str(caught.value)


def test_request_refuses_a_missing_query_parameter(handlers: Handlers) -> None:
    @handlers.route("/a/{x}")
    def f(request: BatchRequest, context: Context, x: str, n: int) -> None: ...

    with pytest.raises(InvalidRequest, match=r"parameter 'n' of /a/{x}: is missing"):
        f.request("a")


def test_none_and_empty_lists_leave_out_what_has_an_empty_default(handlers: Handlers) -> None:
    @handlers.route("/a")
    def f(request: BatchRequest, context: Context, n: int | None = None, many: list[str] | None = None) -> None: ...

    assert f.request(n=None, many=[]) == BatchRequest("/a")
    assert f.request(many="one") == BatchRequest("/a?many=one")
    assert f.request(many=("one", 2)) == BatchRequest("/a?many=one&many=2")


def test_request_refuses_values_that_the_template_would_split_otherwise(handlers: Handlers) -> None:
    @handlers.route("/a/{x}-{y}")
    def f(request: BatchRequest, context: Context, x: str, y: str) -> None: ...

    assert handlers.match(f.request("a-b", "c")).kwargs == {"x": "a-b", "y": "c"}
    with pytest.raises(InvalidRequest, match="y='b-c'"):
        f.request("a", "b-c")


texts = st.text(st.characters(codec="utf-8"), max_size=60)


@given(
    texts,
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=9), min_size=1, max_size=4),
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    texts,
    st.lists(texts, min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(["", "https://api.x.org"]),
)
def test_request_and_match_are_inverse(
    segment: str, path: list[str], n: int, ratio: float, word: str, words: list[str], flag: bool, site: str
) -> None:
    handlers = Handlers()

    @handlers.route(site + "/s/{segment}/{n:int}/{path:path}")
    def f(
        request: BatchRequest,
        context: Context,
        segment: str,
        n: int,
        path: str,
        ratio: float,
        word: str,
        words: list[str],
        flag: bool,
    ) -> None: ...

    assume(segment not in ("", ".", ".."))
    joined = "/".join(path)
    assume(not {".", ".."} & set(joined.split("/")))
    request = f.request(segment, n, joined, ratio=ratio, word=word, words=words, flag=flag)
    assert handlers.match(request).kwargs == {
        "segment": segment,
        "n": n,
        "path": joined,
        "ratio": ratio,
        "word": word,
        "words": words,
        "flag": flag,
    }


@given(texts)
def test_a_path_of_any_text_survives_or_is_refused(path: str) -> None:
    handlers = Handlers()
    echo(handlers, "/{x:path}")
    (handler,) = handlers
    impossible = path == "" or bool({".", ".."} & set(path.split("/")))
    if impossible:
        with pytest.raises(InvalidRequest):
            handler.request(path)
    else:
        assert handlers.match(handler.request(path)).kwargs == {"x": path}


# --- registration errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("cities/{x}", "must start with /"),
        ("", "must start with /"),
        ("//host/{x}", "must start with /"),
        ("https://{x}/a", "must start with /"),
        ("https://u:p@host/{x}", "userinfo"),
        ("/a/{x", "a brace stands alone"),
        ("/a/{x}}", "a brace stands alone"),
        ("/a/{}", "{} is none of {name}, {name:int}, {name:float}, {name:path}"),
        ("/a/{x:}", "{x:} is none of"),
        ("/a/{x:uuid}", "{x:uuid} is none of"),
        ("/a/{1}", "{1} is none of"),
        ("/a/{x}/{x}", "{x} stands there twice"),
        ("/a/{x}{y}", "text must stand between"),
        ("/a/{x}?q=1", "? and # cannot stand there"),
        ("/a/../{x}", "segments . and .."),
        ("/a/%2e/{x}", "segments . and .."),
        ("/a/{y}", "lacks y of the template"),
        ("/taken/{x}", "is taken by"),
    ],
)
def test_a_bad_template_is_refused_at_once_naming_the_function(handlers: Handlers, template: str, reason: str) -> None:
    echo(handlers, "/taken/{x}")
    with pytest.raises(ConfigError) as caught:
        echo(handlers, template)
    assert reason in str(caught.value)
    assert "echo.<locals>.answer" in str(caught.value)
    assert len(handlers.routes) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"ttl": -1},
        {"ttl": 0},
        {"ttl": "60"},
        {"ttl": 60, "sticky": True},
        {"timeout": 0},
        {"timeout": math.inf},
        {"failure_ttl": 0},
        {"negative_ttl": -1},
        {"negative_ttl": True},
        {"estimated_time": -1},
        {"sticky": 1},
        {"retry": 3},
        {"queue": "a b"},
        {"priority": "urgent"},
        {"name": ""},
        {"name": "taken"},
        {"max_running": 0},
        {"max_running": True},
        {"max_running": 2.0},
        {"max_running": ("exports", 3)},
        {"tll": 60},
    ],
    ids=str,
)
def test_a_bad_option_is_refused_at_once_naming_option_and_function(
    handlers: Handlers, options: dict[str, Any]
) -> None:
    echo(handlers, "/taken/{x}", name="taken")
    with pytest.raises(ConfigError, match=rf"echo.*answer: .*{list(options)[-1]}"):
        echo(handlers, "/a/{x}", **options)


def test_routes_and_operations_take_a_limit(handlers: Handlers) -> None:
    limited = handlers.route("/a/{x}", max_running=3)(lambda request, context, x: None)
    thumbnail = handlers.operation("thumbnail", max_running=1)(lambda request, context: None)
    free = handlers.route("/b/{x}")(lambda request, context, x: None)
    assert [each.route.max_running for each in (limited, thumbnail, free)] == [3, 1, None]
    assert (limited.route.name, thumbnail.route.name) == ("/a/{x}", "thumbnail")


def test_a_signature_that_cannot_be_filled_is_refused(handlers: Handlers) -> None:
    def no_context(request: Any) -> None: ...
    def keyword_context(request: Any, *, context: Any) -> None: ...
    def positional(request: Any, context: Any, x: str, /) -> None: ...
    def starred(request: Any, context: Any, *x: str) -> None: ...
    def odd(request: Any, context: Any, x: dict[str, str]) -> None: ...
    def two(request: Any, context: Any, x: int | str) -> None: ...
    def listed(request: Any, context: Any, x: list[str]) -> None: ...
    def unknown(request: Any, context: Any, x: OnlyForTypeCheckers) -> None: ...

    refused: list[tuple[Callable[..., Any], str]] = [
        (no_context, "first two parameters"),
        (keyword_context, "first two parameters"),
        (positional, "cannot be filled by name"),
        (starred, "cannot be filled by name"),
        (odd, "the annotation dict"),
        (two, "the annotation int | str is none of"),
        (listed, "the annotation list"),
        (unknown, "the annotation cannot be read"),
    ]
    for function, reason in refused:
        with pytest.raises(ConfigError, match=rf"{function.__name__}: .*{reason.replace('|', '.')}"):
            handlers.route("/a/{x}")(function)

    def text(request: Any, context: Any, x: str) -> None: ...

    with pytest.raises(ConfigError, match="the template gives int, the annotation is str"):
        handlers.route("/a/{x:int}")(text)
    assert handlers.routes == ()


def test_a_second_fallback_and_a_nameless_operation_are_refused(handlers: Handlers) -> None:
    def first(request: Any, context: Any) -> None: ...
    def second(request: Any, context: Any) -> None: ...
    def third(request: Any) -> None: ...

    with pytest.raises(ConfigError, match="third: its first two"):
        handlers.fallback(third)
    handlers.fallback(first)
    with pytest.raises(ConfigError, match=r"second: .*first is the fallback already"):
        handlers.fallback(second)
    with pytest.raises(ConfigError, match="second: an operation needs a name"):
        handlers.operation("")(second)


# --- include and plugins ----------------------------------------------------------------------------------------------


def test_included_routes_come_after_and_what_stands_here_wins(handlers: Handlers) -> None:
    other = Handlers()

    @handlers.route("/a")
    def mine(request: Any, context: Any) -> str:
        return "mine"

    @other.route("/a")
    def theirs(request: Any, context: Any) -> str:
        return "theirs"

    @other.fallback
    def rest(request: Any, context: Any) -> str:
        return f"rest {context.resources.db}"

    @other.resource("db")
    def db() -> str:
        return "db"

    handlers.include(other)
    assert run(handlers, "/a") == "mine"
    assert run(handlers, "/b", resources=handlers.resources) == "rest db"


def test_a_conflict_includes_nothing(handlers: Handlers) -> None:
    def f(request: Any, context: Any) -> None: ...

    handlers.route("/a", name="n")(f)
    handlers.resource("db")(lambda: None)
    handlers.fallback(f)
    conflicts: list[tuple[str, Callable[[Handlers], object]]] = [
        ("resource db is registered on both sides", lambda other: other.resource("db")(lambda: None)),
        ("the name 'n' is taken", lambda other: other.route("/b", name="n")(f)),
        ("is the fallback already", lambda other: other.fallback(f)),
    ]
    for reason, fill in conflicts:
        other = Handlers()
        other.route("/c")(f)
        fill(other)
        with pytest.raises(ConfigError, match=reason):
            handlers.include(other)
    with pytest.raises(ConfigError, match="include themselves"):
        handlers.include(handlers)
    assert [route.name for route in handlers.routes] == ["n", "fallback"]


class EntryPoint:
    def __init__(self, name: str, plugin: object) -> None:
        self.name, self.value, self.plugin = name, f"{name}_package:handlers", plugin

    def load(self) -> object:
        if isinstance(self.plugin, Exception):
            raise self.plugin
        return self.plugin


def install(monkeypatch: pytest.MonkeyPatch, *found: EntryPoint) -> None:
    def entry_points(*, group: str) -> list[EntryPoint]:
        return list(found) if group == "rqarm.handlers" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def test_plugins_are_loaded_in_order_of_name(handlers: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Handlers()
    echo(other, "/b/{x}")
    install(monkeypatch, EntryPoint("two", other), EntryPoint("one", lambda ours: echo(ours, "/a/{x}")))
    assert handlers.load_plugins() == ["one", "two"]
    assert [route.name for route in handlers.routes] == ["/a/{x}", "/b/{x}"]
    assert handlers.load_plugins("another.group") == []


@pytest.mark.parametrize("plugin", [7, ImportError("gone"), lambda ours: 1 / 0])
def test_a_broken_plugin_is_named(handlers: Handlers, monkeypatch: pytest.MonkeyPatch, plugin: object) -> None:
    install(monkeypatch, EntryPoint("bad", plugin))
    with pytest.raises(ConfigError, match=r"plugin 'bad' \(bad_package:handlers\): (it is a int|gone|division)"):
        handlers.load_plugins()


# --- resources --------------------------------------------------------------------------------------------------------


def test_a_resource_is_built_once_on_first_use(handlers: Handlers) -> None:
    built: list[object] = []

    @handlers.resource("db")
    def db() -> object:
        built.append(object())
        return built[-1]

    resources = handlers.resources
    assert built == []
    assert resources.db is resources["db"] is resources.db
    assert len(built) == 1
    assert list(resources) == ["db"]
    assert "db" in resources


def test_generators_tear_down_in_reverse_order_of_building(handlers: Handlers) -> None:
    said: list[str] = []

    def maker(name: str) -> Callable[[], Any]:
        def factory() -> Any:
            said.append(f"+{name}")
            yield name
            said.append(f"-{name}")

        return factory

    for name in "abc":
        handlers.resource(name)(maker(name))
    assert (handlers.resources.b, handlers.resources.a) == ("b", "a")
    handlers.resources.close()
    handlers.resources.close()
    assert said == ["+b", "+a", "-a", "-b"]
    assert handlers.resources.a == "a"


def test_all_tear_downs_run_and_the_first_failure_is_raised(handlers: Handlers) -> None:
    said: list[str] = []

    @handlers.resource("first")
    def first() -> Any:
        yield 1
        said.append("first")

    @handlers.resource("broken")
    def broken() -> Any:
        yield 2
        raise OSError("wire cut")

    @handlers.resource("twice")
    def twice() -> Any:
        yield 3
        yield 4

    assert [handlers.resources[name] for name in handlers.resources] == [1, 2, 3]
    with pytest.raises(ResourceError, match="resource 'twice': it yields more than once") as caught:
        handlers.resources.close()
    assert caught.value.__notes__ == ["resource 'broken': tear-down failed with OSError: wire cut"]
    assert said == ["first"]


def test_an_error_in_set_up_names_the_resource_and_can_pass(handlers: Handlers) -> None:
    answers = iter([OSError("no route to host"), "db"])

    @handlers.resource("db")
    def db() -> object:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @handlers.resource("empty")
    def empty() -> Any:
        yield from ()

    with pytest.raises(ResourceError, match="resource 'db': set-up failed with OSError: no route to host") as caught:
        _ = handlers.resources.db
    assert Retry(max=1).wants(caught.value, 0)
    assert handlers.resources.db == "db"
    with pytest.raises(ResourceError, match="resource 'empty': it yields nothing"):
        _ = handlers.resources.empty


def test_an_unknown_resource_names_those_there_are(handlers: Handlers) -> None:
    handlers.resource("db")(lambda: 1)
    with pytest.raises(AttributeError, match="no resource 'dv' is registered; there are: db"):
        _ = handlers.resources.dv
    with pytest.raises(KeyError, match="no resource 'dv'"):
        _ = handlers.resources["dv"]
    assert not hasattr(handlers.resources, "__deepcopy__")


@pytest.mark.parametrize("name", ["", "a b", "_a", "close", "add", "factories", "db", 7])
def test_a_bad_resource_name_is_refused(handlers: Handlers, name: Any) -> None:
    handlers.resource("db")(lambda: 1)
    with pytest.raises(ConfigError, match="resource"):
        handlers.resource(name)(lambda: 2)


def test_threads_build_a_resource_once(handlers: Handlers) -> None:
    entered, go_on = threading.Event(), threading.Event()
    built: list[int] = []
    seen: list[object] = []

    @handlers.resource("db")
    def db() -> object:
        entered.set()
        assert go_on.wait(10)
        built.append(1)
        return object()

    threads = [threading.Thread(target=lambda: seen.append(handlers.resources.db)) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert entered.wait(10)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(built) == 1
    assert len(seen) == 4
    assert len(set(map(id, seen))) == 1


def test_a_fork_builds_anew_and_leaves_the_parent_s_alone(handlers: Handlers) -> None:
    torn: list[int] = []

    @handlers.resource("pid")
    def pid() -> Any:
        yield os.getpid()
        torn.append(os.getpid())

    assert handlers.resources.pid == os.getpid()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            handlers.resources.close()
            untouched = not torn
            anew = handlers.resources.pid == os.getpid()
            handlers.resources.close()
            status = 0 if untouched and anew and torn == [os.getpid()] else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (handlers.resources.pid, torn) == (os.getpid(), [])


async def test_async_resources_are_there_after_start_and_end_with_aclose(handlers: Handlers) -> None:
    said: list[str] = []

    @handlers.resource("plain")
    def plain() -> Any:
        yield "plain"
        said.append("plain")

    @handlers.resource("pool")
    async def pool() -> Any:
        await asyncio.sleep(0)
        yield "pool"
        await asyncio.sleep(0)
        said.append("pool")

    @handlers.resource("client")
    async def client() -> str:
        return "client"

    resources = handlers.resources
    with pytest.raises(ResourceError, match=r"resource 'pool': it is async: .* after start\(\)"):
        _ = resources.pool
    assert resources.plain == "plain"
    await resources.start()
    await resources.start()
    assert (resources.pool, resources.client) == ("pool", "client")
    with pytest.raises(ResourceError, match=r"resource 'pool': it is async: aclose\(\)"):
        resources.close()
    assert resources.plain == "plain"
    await resources.aclose()
    assert said == ["plain", "plain", "pool"]


async def test_errors_of_async_resources_name_them(handlers: Handlers) -> None:
    @handlers.resource("late")
    async def late() -> Any:
        yield 1
        raise OSError("wire cut")

    @handlers.resource("pool")
    async def pool() -> Any:
        raise OSError("refused")

    with pytest.raises(ResourceError, match="resource 'pool': set-up failed with OSError: refused"):
        await handlers.resources.start()
    with pytest.raises(ResourceError, match="resource 'late': tear-down failed with OSError: wire cut"):
        await handlers.resources.aclose()


# --- retry ------------------------------------------------------------------------------------------------------------


def test_the_last_interval_repeats_and_jitter_adds_a_share() -> None:
    retry = Retry(max=5, interval=[1, 5, 30])
    assert [retry.delay(nth, lambda: 0.5) for nth in range(1, 6)] == [1, 5, 30, 30, 30]
    assert Retry(max=1).delay(1, lambda: 0.5) == 0
    assert Retry(max=1, interval=10, jitter=0.2).delay(3, lambda: 0.5) == pytest.approx(11)
    assert hash(retry) == hash(Retry(max=5, interval=(1, 5, 30)))


def test_retry_wants_its_errors_up_to_max_and_never_hopeless_ones() -> None:
    retry = Retry(max=2, on=(OSError,))
    assert [retry.wants(TimeoutError(), so_far) for so_far in range(4)] == [True, True, False, False]
    assert not retry.wants(ValueError(), 0)
    assert not Retry(max=0).wants(OSError(), 0)
    for hopeless in (InvalidRequest("bad"), NoHandler("none"), AppRefusal(404, "/"), ResultTooLarge(1)):
        assert not Retry(max=2).wants(hopeless, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max": -1},
        {"max": 1.5},
        {"max": True},
        {"max": 1, "interval": -1},
        {"max": 1, "interval": []},
        {"max": 1, "interval": [1, math.nan]},
        {"max": 1, "interval": "1"},
        {"max": 1, "jitter": -0.1},
        {"max": 1, "on": ()},
        {"max": 1, "on": ("OSError",)},
    ],
    ids=str,
)
def test_a_retry_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"Retry: {list(wrong)[-1]}"):
        Retry(**wrong)


# --- context ----------------------------------------------------------------------------------------------------------


def test_progress_goes_out_once_a_second_and_the_end_always() -> None:
    now = [100.0]
    said: list[tuple[float, str]] = []
    context = make_context(report=lambda fraction, message: said.append((fraction, message)), clock=lambda: now[0])
    for at, fraction in [
        (100.0, 0),
        (100.5, 0.1),
        (101.0, 0.2),
        (101.9, 0.3),
        (101.95, 1.0),
        (102.5, 0.9),
        (102.95, 1),
    ]:
        now[0] = at
        context.progress(fraction, f"at {at:g}")
    assert said == [(0.0, "at 100"), (0.2, "at 101"), (1.0, "at 101.95"), (1.0, "at 102.95")]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan, math.inf])
def test_progress_outside_of_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="a fraction from 0 to 1"):
        make_context().progress(fraction)


def test_cancelled_asks_each_time() -> None:
    answers = iter([False, True])
    context = make_context(is_cancelled=lambda: next(answers))
    assert not context.cancelled
    assert context.cancelled


def test_retry_makes_the_exception_with_delay_and_arguments() -> None:
    context = make_context(key=Key("k"), attempt=2, kwargs={"page": 1}, deadline=5.0, worker="w")
    assert (context.key, context.attempt, context.deadline, context.worker) == ("k", 2, 5.0, "w")
    with pytest.raises(RetryLater) as caught:
        raise context.retry(delay=30, page=2)
    assert (caught.value.delay, caught.value.kwargs) == (30, {"page": 2})
    assert (context.retry().delay, context.retry().kwargs) == (None, {})
    assert str(context.retry(0)) == "at once"
    with pytest.raises(TypeError):
        context.kwargs["page"] = 3  # type: ignore[index]
    for delay in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match="delay"):
            context.retry(delay)
