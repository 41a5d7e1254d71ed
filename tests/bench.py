"""Requests run by RQ's SimpleWorker in the process of the test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from workers import burst

from rqarm import BatchRequest, BatchStatus, Handlers, RequestManager, connect
from rqarm.worker import equipment, use_handlers


class Bench:
    """Handlers, a manager, and a worker that runs what was submitted.

    ``calls`` counts those of what ``route`` was given; ``told`` is for what other functions are called with.
    """

    def __init__(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.handlers = Handlers()
        self.url, self._monkeypatch = url, monkeypatch
        self.settings: dict[str, Any] = {}
        self.rm = RequestManager(url)
        self.calls = 0
        self.told: list[Any] = []

    def set(self, **settings: Any) -> None:
        """Settings of the worker, as its operator gives them, and of the manager."""
        for name, value in settings.items():
            self._monkeypatch.setenv(f"RQARM_{name.upper()}", str(value))
        self.rm.close()
        self.rm = RequestManager(self.url)

    def route(self, function: Callable[..., Any], template: str = "/x", **options: Any) -> None:
        """``function`` with no parameters, with the context, or with request and context, as the handler."""
        wanted = function.__code__.co_argcount

        if asyncio.iscoroutinefunction(function):

            async def handler(request: Any, context: Any) -> Any:
                self.calls += 1
                return await function(*[(), (context,), (request, context)][wanted])
        else:

            def handler(request: Any, context: Any) -> Any:
                self.calls += 1
                return function(*[(), (context,), (request, context)][wanted])

        self.handlers.route(template, **options)(handler)

    def run(self, request: BatchRequest | str = "/x", **options: Any) -> BatchStatus:
        """Submit, work until nothing is queued, and say what became of it."""
        key = self.rm.submit(request, **options).key
        self.work()
        return self.rm.status(key)

    def work(self) -> None:
        use_handlers(self.handlers)
        with connect.open_client(self.url) as client:
            burst(client)

    def ttl(self, key: str) -> float:
        """Seconds that the record is kept, -1 = for ever."""
        return self.rm.connection.pttl(f"arm:status:{key}") / 1000

    def verbs(self) -> list[str]:
        return [event.verb for event in self.rm.events("0", timeout=0.001)]

    def close(self) -> None:
        self.rm.close()
        runner = equipment.of_this_process().runner
        if runner is not None:
            runner.close()
