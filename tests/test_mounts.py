"""Apps that answer requests, WSGI and ASGI: all without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import flask
import pytest
from contexts import echo, make_context, run

from rqarm.errors import ConfigError, NoHandler
from rqarm.handlers import Handlers
from rqarm.mounts import AppError, AppRefusal
from rqarm.request import BatchRequest
from rqarm.routes import Retry, Route

Asgi = Callable[..., Any]


@pytest.fixture
def handlers() -> Handlers:
    return Handlers()


def make_flask() -> flask.Flask:
    app = flask.Flask("interactive")

    @app.get("/cities/<country>")
    def cities(country: str) -> Any:
        request = flask.request
        batch = request.environ["rqarm.context"].key
        lines = [country, *request.args.getlist("n"), request.url, request.script_root, str(batch)]
        return flask.Response(
            "\n".join(lines),
            mimetype="text/csv",
            headers={
                "Content-Disposition": "attachment; filename*=UTF-8''st%C3%A4dte.csv",
            },
        )

    @app.get("/large")
    def large() -> Any:
        return flask.Response(b"x" * 500_000 for _ in range(5))

    @app.get("/slash/")
    def slash() -> str:
        return "never"

    @app.get("/bad/<int:status>")
    def bad(status: int) -> Any:
        return "é" * 5000, status

    return app


def test_a_wsgi_app_answers_what_it_would_answer_a_browser(handlers: Handlers) -> None:
    handlers.mount_wsgi(make_flask(), ttl=60)
    request = BatchRequest("https://api.x.org:81/cities/c%C3%B4te?n=2&n=1")
    result = run(handlers, request)
    url = "https://api.x.org:81/cities/côte?n=2&n=1"
    assert result.data.decode().split("\n") == ["côte", "2", "1", url, "", request.key]
    assert (result.content_type, result.filename) == ("text/csv; charset=utf-8", "städte.csv")
    assert handlers.routes == (Route(name="/*", template="/*", ttl=60),)


def test_a_prefix_becomes_the_script_name_and_is_registered_in_order(handlers: Handlers) -> None:
    echo(handlers, "/api/own/{x}")
    handlers.mount_wsgi(make_flask(), "https://x.org/api/")
    assert run(handlers, "/api/own/1") == ("/api/own/{x}", "1")
    lines = run(handlers, "https://x.org/api/cities/FR").data.decode().split("\n")
    assert lines[:3] == ["FR", "https://x.org/api/cities/FR", "/api"]
    for uri in ("https://x.org/apis/cities/FR", "/api/cities/FR", "https://x.org/cities/FR"):
        with pytest.raises(NoHandler):
            handlers.match(BatchRequest(uri))
    with pytest.raises(AppRefusal):
        run(handlers, "https://x.org/api")


def test_a_large_wsgi_answer_is_streamed(handlers: Handlers) -> None:
    handlers.mount_wsgi(make_flask())
    data = run(handlers, "/large").data
    assert not isinstance(data, bytes)
    assert sum(map(len, data)) == 2_500_000


@pytest.mark.parametrize(
    ("uri", "status", "kind", "retried"),
    [
        ("/bad/404", 404, AppRefusal, False),
        ("/nowhere", 404, AppRefusal, False),
        ("/slash", 308, AppRefusal, False),
        ("/bad/500", 500, AppError, True),
        ("/bad/503", 503, AppError, True),
    ],
)
def test_an_error_page_is_an_error(
    handlers: Handlers, uri: str, status: int, kind: type[AppError], retried: bool
) -> None:
    handlers.mount_wsgi(make_flask(), retry=Retry(max=1))
    with pytest.raises(AppError) as caught:
        run(handlers, f"{uri}?token=secret")
    assert type(caught.value) is kind
    assert caught.value.status == status
    assert len(caught.value.body) <= 1024
    assert "?token" not in str(caught.value) or status == 308
    retry = handlers.routes[0].retry
    assert retry is not None
    assert retry.wants(caught.value, 0) is retried


def test_a_wsgi_app_s_iterable_is_closed(handlers: Handlers) -> None:
    said: list[str] = []

    class Body:
        def __iter__(self) -> Any:
            yield b""
            yield b"chunk"

        def close(self) -> None:
            said.append("closed")

    def app(environ: Any, start_response: Any) -> Body:
        start_response("200 OK", [("Content-Disposition", 'attachment; filename="../../etc/passwd"')])(b"written ")
        return Body()

    handlers.mount_wsgi(app)
    result = run(handlers, "/")
    assert (result.data, result.filename, result.content_type) == (b"written chunk", "passwd", None)
    assert said == ["closed"]


def test_a_wsgi_app_that_answers_nothing_is_an_error(handlers: Handlers) -> None:
    handlers.mount_wsgi(lambda environ, start_response: [])
    with pytest.raises(AppError, match="without calling start_response"):
        run(handlers, "/")


async def test_an_asgi_app_answers(handlers: Handlers) -> None:
    scopes: list[dict[str, Any]] = []

    async def app(scope: dict[str, Any], receive: Asgi, send: Asgi) -> None:
        scopes.append(scope)
        assert await receive() == {"type": "http.request", "body": b"", "more_body": False}
        # what Quart and Django do: a disconnect that comes too early would end the answer
        listener = asyncio.create_task(receive())
        await asyncio.sleep(0)
        assert not listener.done()
        headers = [(b"content-type", b"text/csv"), (b"content-disposition", b'attachment; filename="a.csv"')]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"a,", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})
        assert await listener == {"type": "http.disconnect"}

    handlers.mount_asgi(app, "/api")
    request = BatchRequest("https://x.org/api/c%C3%B4te/a%2Fb?n=2&n=1")
    match = handlers.match(request)
    assert match.handler.is_async
    context = make_context(request)
    result = await match.call(request, context)
    assert (result.data, result.content_type, result.filename) == (b"a,b", "text/csv", "a.csv")
    (scope,) = scopes
    assert scope["path"] == "/api/côte/a/b"
    assert scope["raw_path"] == b"/api/c%C3%B4te/a%2Fb"
    assert (scope["root_path"], scope["query_string"], scope["method"]) == ("/api", b"n=2&n=1", "GET")
    assert (b"host", b"x.org") in scope["headers"]
    assert (scope["scheme"], scope["server"]) == ("https", ("x.org", 443))
    assert scope["rqarm.context"] is context


@pytest.mark.parametrize(("status", "kind"), [(404, AppRefusal), (307, AppRefusal), (502, AppError), (None, AppError)])
async def test_an_asgi_error_is_an_error(handlers: Handlers, status: int | None, kind: type[AppError]) -> None:
    async def app(scope: Any, receive: Asgi, send: Asgi) -> None:
        if status:
            await send({"type": "http.response.start", "status": status})
            await send({"type": "http.response.body", "body": b"x" * 5000})

    handlers.mount_asgi(app)
    with pytest.raises(AppError) as caught:
        await run(handlers, "/a")
    assert type(caught.value) is kind
    assert caught.value.status == (status or 500)
    assert len(caught.value.body) <= 1024


def test_a_bad_mount_is_refused(handlers: Handlers) -> None:
    for prefix, reason in [("/a/{x}", "placeholders"), ("api", "must start with /"), ("/a?b", "cannot stand there")]:
        with pytest.raises(ConfigError, match=reason):
            handlers.mount_wsgi(make_flask(), prefix)
    handlers.mount_wsgi(make_flask())
    with pytest.raises(ConfigError, match=r"flask.app.Flask: '/\*' is taken by flask.app.Flask"):
        handlers.mount_wsgi(make_flask())
