"""For the tests of programs that use rqarm: run what was submitted, in this process; fixtures of pytest.

``drain`` is a worker without processes: the same matching, retries, callbacks and ends, one request after the other in
the thread of the test. ``context`` calls a handler alone. The fixtures, which pytest finds by an entry point, give a
manager on an empty server of the test session.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis

from rqarm import embedded, flows
from rqarm.browse import listing
from rqarm.calls import ms
from rqarm.connect import open_client
from rqarm.context import Context, Needed, Redirected
from rqarm.errors import RqarmError
from rqarm.handlers import Handlers
from rqarm.manager import RequestManager
from rqarm.model import Key, State
from rqarm.replies import Attempt, Taken
from rqarm.request import BatchRequest, as_request
from rqarm.resources import Resources
from rqarm.worker.equipment import serving
from rqarm.worker.execution import Drive, Execution, Hold

#: under which drain works
WORKER = "rqarm.testing"
#: attempts of one drain; more are taken for a handler that asks for another one for ever
MOST_ATTEMPTS = 1000


@dataclass(frozen=True, slots=True)
class Ran:
    """One attempt of ``drain``.

    ``outcome`` is the word of the worker's log: ``completed``, ``failed``, ``retried in 5 s``, ``redirected to ...``,
    ``parked``, ``given up``. ``error`` is what the handler raised. ``operation`` of a callback is ``rqarm:callback``.
    """

    key: Key
    uri: str
    operation: str
    route: str
    attempt: int
    outcome: str
    error: BaseException | None = field(default=None, repr=False)


def drain(
    manager: RequestManager,
    handlers: Handlers,
    *,
    with_delayed: bool = True,
    reraise: bool = False,
    most: int = MOST_ATTEMPTS,
) -> list[Ran]:
    """Run what is pending in all queues of the manager, and what comes of it, until nothing waits: every attempt.

    Callbacks, retries and redirects are run too. ``with_delayed``: delays are skipped; False leaves what has one.
    Resources are built for this call and torn down at its end. ``reraise``: raise what a handler raises when its
    request has failed for good, instead of going on. It blocks: on an event loop write
    ``await asyncio.to_thread(drain, ...)``, with a RequestManager of the same server.

    Raises RqarmError after ``most`` attempts.
    """
    ran: list[Ran] = []
    with serving(handlers):
        parked: set[Key] = set()
        while (attempt := _next(manager, with_delayed, parked)) is not None:
            if len(ran) == most:
                raise RqarmError(
                    f"{most} attempts, and still something waits: does a handler ask for retries for ever?"
                )
            execution = Execution(manager.core, attempt, WORKER, Hold())
            try:
                Drive(execution, manager.shell).run(manager.shell.execute)
            except Exception:
                if reraise:
                    raise
            if execution.outcome == "parked" or execution.outcome.startswith("waits"):
                parked.add(attempt.key)  # whoever it waits for calls it up: to start it now would be in vain
            request, family = attempt.request, execution.family
            ran.append(
                Ran(
                    attempt.key,
                    request.uri,
                    request.operation,
                    family,
                    attempt.number,
                    execution.outcome,
                    execution.error,
                )
            )
    return ran


def _next(manager: RequestManager, with_delayed: bool, parked: set[Key]) -> Attempt | None:
    """The next in RQ's lists, else the first in line that has a delay."""
    core, run = manager.core, manager.shell.run
    queues = sorted(manager.shell.execute(core.calls.queues())) or [core.settings.queue]
    lists = [name for queue in queues for name in core.jobs.lists(queue)]
    taken: Taken = manager.shell.execute(
        core.calls.take(lists, secrets.token_hex(8), WORKER, WORKER, ms(core.settings.lease))
    )
    if taken.attempt is not None or not with_delayed:
        return taken.attempt
    for queue in queues:
        for status in run(listing.pending(core, queue)):
            _, job_id = manager.shell.execute(core.calls.ticket(status.key))
            started = None if status.key in parked else run(flows.start(core, status.key, job_id, WORKER))
            if started is not None and not isinstance(started, State):
                manager.shell.execute(core.calls.drop_job(started))
                return started
    return None


class RecordingContext(Context):
    """A Context that runs nowhere and keeps what the handler says: ``reports`` and ``emitted``."""

    __slots__ = ("emitted", "is_cancelled", "reports")

    def __init__(
        self,
        request: BatchRequest,
        attempt: int,
        kwargs: Mapping[str, Any],
        resources: Resources,
        found: Mapping[Key, Any],
    ) -> None:
        self.reports: list[tuple[float, str]] = []
        self.emitted: list[Any] = []
        #: set it to have the handler find itself cancelled
        self.is_cancelled = False

        def look_up(target: BatchRequest) -> Any:
            if target.key not in found:
                raise Redirected(target)
            return found[target.key]

        def require(targets: tuple[BatchRequest, ...]) -> list[Any]:
            missing = tuple(target for target in targets if target.key not in found)
            if missing:
                raise Needed(missing)
            return [found[target.key] for target in targets]

        super().__init__(
            request,
            request.key,
            attempt,
            kwargs,
            resources,
            lambda fraction, message: self.reports.append((fraction, message)),
            lambda: self.is_cancelled,
            worker=WORKER,
            emit=self.emitted.append,
            look_up=look_up,
            look_up_async=lambda target: asyncio.to_thread(look_up, target),
            require=require,
            require_async=lambda targets: asyncio.to_thread(require, targets),
        )


def context(
    request: BatchRequest | str = "/",
    *,
    attempt: int = 1,
    kwargs: Mapping[str, Any] | None = None,
    handlers: Handlers | None = None,
    found: Mapping[str, Any] | None = None,
) -> RecordingContext:
    """What a handler is called with in a test of the handler alone.

    ``handlers``: whose resources it has. ``found``: results of other requests, by URI, for ``get_or_redirect`` and
    ``require``; what is not there raises Redirected or Needed.
    """
    results = {BatchRequest(uri).key: value for uri, value in (found or {}).items()}
    resources = (handlers or Handlers()).resources
    return RecordingContext(as_request(request), attempt, kwargs or {}, resources, results)


@pytest.fixture(scope="session")
def rqarm_server() -> Iterator[embedded.PrivateServer]:
    """A Valkey or Redis of this test session, which ends with it. ``rqarm_server.url`` names it."""
    with tempfile.TemporaryDirectory(prefix="rqarm-") as directory, embedded.private(Path(directory)) as server:
        yield server


@pytest.fixture
def rqarm_connection(rqarm_server: embedded.PrivateServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    """A client of the emptied server; managers that the program opens without a URL are on the same one.

    Override it to test on a server of your own, or on ``fakeredis.FakeRedis()``.
    """
    monkeypatch.setenv("RQARM_URL", rqarm_server.url)
    monkeypatch.setenv("RQARM_ALLOW_VOLATILE", "1")
    with open_client(rqarm_server.url) as client:
        client.flushall()
        yield client


@pytest.fixture
def rqarm_manager(rqarm_connection: redis.Redis) -> Iterator[RequestManager]:
    """A RequestManager with nothing in it."""
    with RequestManager(connection=rqarm_connection) as manager:
        yield manager
