"""Spans for OpenTelemetry, in programs that have set a tracer provider. In others nothing is done, nothing imported.

Only this module knows OpenTelemetry's API, and it never imports it first: who sets a provider has imported it already.
No provider, exporter or sampler is chosen here. What travels in Redis is W3C trace context as text; what comes from
there is checked, and what is none counts as none. Names follow the semantic conventions for messaging.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote_plus

from rqarm.text import name_of
from rqarm.uri import redact
from rqarm.version import __version__

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import SpanContext

T = TypeVar("T")

#: bytes of a tracestate that travels; W3C asks for this many at least
TRACESTATE_BYTES = 512
#: links that a span gets at the most: the SDK keeps 128 by default
MOST_LINKS = 100
#: characters of a message and of a traceback in a span
MESSAGE_CHARS, TRACEBACK_CHARS = 1_000, 8_000
#: seconds that the end of a process waits for its spans to be exported
FLUSH_SECONDS = 5.0

_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def _api() -> ModuleType | None:
    """OpenTelemetry's API when somebody has set a tracer provider."""
    api = sys.modules.get("opentelemetry.trace")
    provider = getattr(api, "get_tracer_provider", None)  # not there yet while another thread imports it
    if api is None or provider is None or isinstance(provider(), api.ProxyTracerProvider):
        return None
    return api


def is_on() -> bool:
    """Whether this process traces."""
    return _api() is not None


class Span:
    """A span of ours. As a context manager it ends with the block, and notes the type of an error that leaves it."""

    def __init__(self, api: ModuleType, span: OtelSpan) -> None:
        self._api, self._span = api, span
        self.is_recording = span.is_recording()
        #: the span as a traceparent, and with the tracestate behind it
        self.traceparent, self.context = _written(api, span)

    def set(self, **attributes: Any) -> None:
        """Attributes by name, with ``__`` for a dot; those without a value are left out."""
        for name, value in _named(attributes):
            self._span.set_attribute(name, value)

    def link(self, contexts: Iterable[str]) -> None:
        """Link to the spans of these contexts, each once and at most MOST_LINKS of them."""
        for text in list(dict.fromkeys(contexts))[:MOST_LINKS]:
            other = _span_context(self._api, text)
            if other is not None:
                self._span.add_link(other)

    def fail(self, kind: str, message: str = "", traceback: str = "") -> None:
        """The error with which it ends. Message and traceback must hold no secrets."""
        self._span.set_attribute("error.type", kind)
        self._span.set_status(self._api.Status(self._api.StatusCode.ERROR, message or kind))
        if traceback:
            event = {
                "exception.type": kind,
                "exception.message": message,
                "exception.stacktrace": traceback,
            }
            self._span.add_event("exception", event)

    def end(self, end_ns: int | None = None) -> None:
        """It ends, now or when it did in Unix ns."""
        self._span.end(end_ns)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Spans that begin in this block are its children."""
        with self._api.use_span(self._span, record_exception=False, set_status_on_exception=False):
            yield

    def __enter__(self) -> Span:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Exception):
            # only the type: messages of ours tell the URI, which may hold secrets
            self.fail(name_of(type(error)))
        self.end()


def submission(queue: str, **attributes: Any) -> Span | None:
    """A span for a submit, a child of the caller's; None when this process does not trace."""
    return _start("submit", "send", "PRODUCER", queue, None, attributes)


def execution(queue: str, trace: str, **attributes: Any) -> Span | None:
    """A span for an attempt, a child of the submit with the context ``trace``; None: this process does not trace."""
    return _start("execute", "process", "CONSUMER", queue, trace, attributes)


def _start(verb: str, kind: str, role: str, queue: str, trace: str | None, attributes: dict[str, Any]) -> Span | None:
    api = _api()
    if api is None:
        return None
    parent = None if trace is None else _context(trace)
    named = {
        "messaging.system": "rqarm",
        "messaging.operation.name": verb,
        "messaging.operation.type": kind,
        "messaging.destination.name": queue,
        **dict(_named(attributes)),
    }
    tracer = api.get_tracer("rqarm", __version__)
    started = tracer.start_span(f"{verb} {queue}", parent, getattr(api.SpanKind, role), named)
    # a provider that makes no spans: nothing to carry
    return Span(api, started) if started.get_span_context().is_valid else None


def _named(attributes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in attributes.items():
        if value is not None and value != "":
            # a word of ours is an enum, and exporters want plain text
            yield name.replace("__", "."), str(value) if isinstance(value, str) else value


def _written(api: ModuleType, span: OtelSpan) -> tuple[str, str]:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, api.set_span_in_context(span))
    traceparent, state = carrier.get("traceparent", ""), carrier.get("tracestate", "")
    return traceparent, f"{traceparent} {state}" if state and len(state) <= TRACESTATE_BYTES else traceparent


def _context(text: str) -> Context:
    """The context that a record holds; an empty one when it holds none. What is current here is somebody else's."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    traceparent, _, state = text.partition(" ")
    if not _TRACEPARENT.fullmatch(traceparent):
        return Context()
    carrier = {"traceparent": traceparent}
    if 0 < len(state) <= TRACESTATE_BYTES and state.isascii() and state.isprintable():
        carrier["tracestate"] = state
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _span_context(api: ModuleType, text: str) -> SpanContext | None:
    found: SpanContext = api.get_current_span(_context(text)).get_span_context()
    return found if found.is_valid else None


# -- errors


def conceal(text: str, uris: Iterable[str], secret_params: tuple[str, ...]) -> str:
    """The text without the values of the secret parameters of these URIs; it may hide more than those."""
    for secret in sorted(set().union(*(_secrets(uri, secret_params) for uri in uris)), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _secrets(uri: str, secret_params: tuple[str, ...]) -> set[str]:
    found = set()
    for piece in re.split(r"[?&#]", uri):
        if redact(f"?{piece}", secret_params) != f"?{piece}":
            found.add(piece.partition("=")[2])
    found |= {unquote_plus(secret) for secret in found}
    return found - {""}


# -- the process


async def within(span: Span | None, awaitable: Coroutine[Any, Any, T]) -> T:
    """Await with the span active: an event loop of the process has a context of its own."""
    with span.active() if span is not None else contextlib.nullcontext():
        return await awaitable


def now_ns() -> int:
    return time.time_ns()


def flush() -> None:
    """Have the spans of this process exported: it ends in a way that runs no exit handlers."""
    api = _api()
    force = getattr(api.get_tracer_provider(), "force_flush", None) if api is not None else None
    if force is not None:
        force(int(FLUSH_SECONDS * 1000))
