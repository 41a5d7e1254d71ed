"""A handler called without a server: what it is given, and what it returns."""

from __future__ import annotations

from typing import Any

from rqarm.context import Context
from rqarm.handlers import Handlers
from rqarm.request import BatchRequest
from rqarm.resources import Resources


def make_context(request: BatchRequest | None = None, **changed: Any) -> Context:
    request = request or BatchRequest("/x")
    fields: dict[str, Any] = {
        "key": request.key,
        "attempt": 1,
        "kwargs": {},
        "resources": Resources(),
        "report": lambda fraction, message: None,
        "is_cancelled": lambda: False,
    }
    return Context(request, **(fields | changed))


def run(handlers: Handlers, request: BatchRequest | str, **changed: Any) -> Any:
    request = BatchRequest(request) if isinstance(request, str) else request
    return handlers.match(request).call(request, make_context(request, **changed))


def echo(handlers: Handlers, template: str, **options: Any) -> None:
    """Register a route for one placeholder ``x`` that returns the template and the value."""

    @handlers.route(template, **options)
    def answer(request: BatchRequest, context: Context, x: Any) -> Any:
        return template, x
