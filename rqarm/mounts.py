"""WSGI and ASGI apps that answer requests, each as a GET of the canonical URI."""

from __future__ import annotations

import io
import itertools
import re
import sys
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from email.message import Message
from typing import Any, TypeVar
from urllib.parse import unquote, unquote_to_bytes

from rqarm.context import Context
from rqarm.errors import ConfigError, RqarmError
from rqarm.request import BatchRequest
from rqarm.result import Result
from rqarm.templates import Target, Template

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])

#: how much of a mounted app's error page is kept
_ERROR_BYTES = 1024
#: a mounted WSGI app's answer up to this size is one bytes object, a larger one is streamed
_AHEAD_BYTES = 1_048_576


class AppError(RqarmError):
    """A mounted app answered with a server error. Look at ``status`` and ``body`` (its first 1 KiB), mend the app."""

    def __init__(self, status: int, target: str, body: str = "") -> None:
        super().__init__(f"the mounted app answered {status} to {target}: {body}".rstrip(": "))
        self.status, self.target, self.body = status, target, body


class AppRefusal(AppError):
    """A mounted app answered with a redirect or a client error. Correct the request: it is not tried again."""


@dataclass(frozen=True, slots=True)
class _Get:
    """A GET as both gateway protocols see it. ``script`` and ``path`` are encoded, ``script`` is the prefix."""

    scheme: str
    host: str
    server: tuple[str, int]
    script: str
    path: str
    query: str

    @property
    def target(self) -> str:
        # without the query: its values may be secret
        return self.script + self.path


def template_under(prefix: str, app: object) -> Template:
    try:
        return Template.under(prefix)
    except ConfigError as error:
        raise ConfigError(f"mount of {app!r}: {error}") from error


def wsgi_handler(app: Callable[..., Iterable[bytes]], template: Template) -> Callable[[BatchRequest, Context], Result]:
    """The handler that passes the requests of a template on to a WSGI app; it goes by the app's name."""

    def answer(request: BatchRequest, context: Context) -> Result:
        return _ask_wsgi(app, _mounted(request, template), context)

    return _named(answer, app)


def asgi_handler(
    app: Callable[..., Awaitable[None]], template: Template
) -> Callable[[BatchRequest, Context], Awaitable[Result]]:
    """As ``wsgi_handler``, for an ASGI app."""

    async def answer(request: BatchRequest, context: Context) -> Result:
        return await _ask_asgi(app, _mounted(request, template), context)

    return _named(answer, app)


def _named(function: AnyFunction, app: object) -> AnyFunction:
    kind = app if hasattr(app, "__qualname__") else type(app)
    function.__module__, function.__qualname__ = kind.__module__, kind.__qualname__
    return function


def _mounted(request: BatchRequest, template: Template) -> _Get:
    target = Target.of(request.canonical)
    scheme, _, authority = target.site.partition("://")
    host = authority.rpartition("@")[2] or "localhost"
    name, port = re.fullmatch(r"(.*?)(?::([0-9]*))?", host).groups()  # type: ignore[union-attr]
    # segments are never merged by decoding, so they can be counted
    parts = target.path.split("/")
    depth = template.pieces[0].count("/") + 1
    return _Get(
        scheme or "http",
        host,
        (name, int(port or (443 if scheme == "https" else 80))),
        "/".join(parts[:depth]),
        "/".join(["", *parts[depth:]]) if parts[depth:] else "",
        target.query,
    )


def _result(
    status: int, headers: Iterable[tuple[str, str]], start: bytes, rest: Iterator[bytes] | None, get: _Get
) -> Result:
    """The result that a mounted app's answer stands for; ``rest`` is what follows ``start``, if anything does.

    Raises AppRefusal or AppError when the answer is no result.
    """
    message = Message()
    for name, value in headers:
        message[name] = value
    if 200 <= status < 300:
        filename = re.split(r"[/\\]", message.get_filename() or "")[-1]
        return Result(
            start if rest is None else itertools.chain([start], rest),
            content_type=message["Content-Type"],
            filename=filename if filename not in ("", ".", "..") else None,
        )
    shown = start[:_ERROR_BYTES].decode("utf-8", "replace")
    if 300 <= status < 400:
        shown = f"redirects to {message['Location']} are not followed"
    raise (AppRefusal if 300 <= status < 500 else AppError)(status, get.target, shown)


def _ask_wsgi(app: Callable[..., Iterable[bytes]], get: _Get, context: Context) -> Result:
    # PEP 3333: paths are bytes, each as the Latin-1 character of its number
    environ = {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": unquote_to_bytes(get.script).decode("latin-1"),
        "PATH_INFO": unquote_to_bytes(get.path).decode("latin-1"),
        "QUERY_STRING": get.query,
        "SERVER_NAME": get.server[0],
        "SERVER_PORT": str(get.server[1]),
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_HOST": get.host,
        "HTTP_ACCEPT": "*/*",
        "HTTP_ACCEPT_ENCODING": "identity",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": get.scheme,
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "rqarm.context": context,
    }
    started: list[tuple[str, list[tuple[str, str]]]] = []
    start = bytearray()

    def start_response(
        status: str, headers: list[tuple[str, str]], exc_info: object = None
    ) -> Callable[[bytes], object]:
        started.append((status, headers))
        return start.extend

    stream = _closing(app(environ, start_response))
    for chunk in stream:
        start += chunk
        if len(start) > _AHEAD_BYTES:
            break
    if not started:
        raise AppError(500, get.target, "the app returned without calling start_response")
    status, headers = started[-1]
    code = int(status.split(" ", 1)[0])
    if not 200 <= code < 300:
        stream.close()
    return _result(code, headers, bytes(start), stream if len(start) > _AHEAD_BYTES else None, get)


def _closing(chunks: Iterable[bytes]) -> Generator[bytes, None, None]:
    try:
        yield from chunks
    finally:
        close = getattr(chunks, "close", None)
        if close:
            close()


async def _ask_asgi(app: Callable[..., Awaitable[None]], get: _Get, context: Context) -> Result:
    scope = {
        "type": "http",
        # with 2.4 a failed send tells of a client that left, so Starlette does not listen for it while it streams
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": get.scheme,
        # the path includes the root_path (ASGI, HTTP connection scope)
        "path": unquote(get.script + get.path),
        "raw_path": (get.script + get.path).encode("ascii"),
        "query_string": get.query.encode("ascii"),
        "root_path": unquote(get.script),
        "headers": [(b"host", get.host.encode("ascii")), (b"accept", b"*/*"), (b"accept-encoding", b"identity")],
        "client": ("127.0.0.1", 0),
        "server": get.server,
        "rqarm.context": context,
    }
    # The core imports no event loop. Whoever awaits this runs one already, and only it can let `receive` sleep:
    # Quart and Django listen for a disconnect as long as they work, and one that comes at once ends their work.
    over = sys.modules["asyncio"].Event()
    events: list[dict[str, Any]] = [{"type": "http.request", "body": b"", "more_body": False}]
    started: list[MutableMapping[str, Any]] = []
    body = io.BytesIO()

    async def receive() -> dict[str, Any]:
        if events:
            return events.pop()
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            started.append(message)
        elif message["type"] == "http.response.body":
            body.write(message.get("body", b""))
            if not message.get("more_body", False):
                over.set()

    try:
        await app(scope, receive, send)
    finally:
        over.set()
    if not started:
        raise AppError(500, get.target, "the app returned without an answer")
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in started[-1].get("headers", ())]
    return _result(started[-1]["status"], headers, body.getvalue(), None, get)
