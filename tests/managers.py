"""One way to call both managers, so that each test is written once.

``opened`` gives a manager of either kind. The asyncio one is driven by an event loop in a thread and looks like the
blocking one: ``rm.submit(...)`` sleeps until the coroutine is done, from any thread. ``round_trips`` counts what goes
out, ``Threads`` runs what must wait while the test goes on.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import redis
import redis.asyncio.connection
import redis.connection
from servers import eventually

from rqarm import AsyncRequestManager, BulkResult, RequestManager
from rqarm.cache import AsyncCache
from rqarm.quarantine import AsyncQuarantine
from rqarm.queue import AsyncLease, AsyncQueues

KINDS = ("blocking", "asyncio")
#: seconds after which a test that waits for something is wrong
PATIENCE = 20.0

_PARTS = (AsyncRequestManager, AsyncCache, AsyncQuarantine, AsyncQueues, AsyncLease)


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="test-loop", daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    def close(self) -> None:
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Driven:
    """An asyncio manager, a part of it or a lease, called as if it were the blocking one."""

    def __init__(self, inner: Any, loop: Loop) -> None:
        self.inner, self._loop = inner, loop

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if not inspect.ismethod(found):
            return self._dressed(found)
        return lambda *args, **kwargs: self._answer(found(*args, **kwargs))

    def _answer(self, answer: Any) -> Any:
        if inspect.iscoroutine(answer):
            return self._dressed(self._loop.run(answer))
        return self._iterated(answer) if isinstance(answer, AsyncIterator) else answer

    def _dressed(self, value: Any) -> Any:
        if isinstance(value, BulkResult):
            return replace(value, leases=tuple(Driven(lease, self._loop) for lease in value.leases))
        return Driven(value, self._loop) if isinstance(value, _PARTS) else value

    def _iterated(self, items: Any) -> Iterator[Any]:
        async def following() -> tuple[Any, ...]:
            async for item in items:
                return (item,)
            return ()

        try:
            while item := self._loop.run(following()):
                yield item[0]
        finally:
            self._loop.run(items.aclose())

    def __enter__(self) -> Any:
        return self._dressed(self._loop.run(self.inner.__aenter__()))

    def __exit__(self, *error: Any) -> Any:
        return self._loop.run(self.inner.__aexit__(*error))


@contextmanager
def opened(kind: str, url: str | None = None, **settings: Any) -> Iterator[Any]:
    """A manager of this kind. ``connection``: a function that makes the client of somebody else, ``(module) -> client``
    where module is ``redis`` or ``redis.asyncio``."""
    settings.setdefault("allow_volatile", True)
    make = settings.pop("connection", None)
    if kind == "blocking":
        client = make(redis) if make else None
        with RequestManager(url, connection=client, **settings) as manager:
            yield manager
        if client is not None:
            client.close()
            client.connection_pool.disconnect()
        return
    loop = Loop()
    client = make(redis.asyncio) if make else None
    try:
        with Driven(AsyncRequestManager(url, connection=client, **settings), loop) as manager:
            yield manager
        if client is not None:
            loop.run(client.aclose())
            loop.run(client.connection_pool.disconnect())
    finally:
        loop.close()


class Threads:
    """Runs what waits. ``start`` returns at once; the future has the answer or the error."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def start(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 -- the test asks for it
                future.set_exception(error)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return future

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "something still waits at the end of the test"


@contextmanager
def threads() -> Iterator[Threads]:
    started = Threads()
    yield started
    started.join()


@contextmanager
def round_trips(monkeypatch: Any) -> Iterator[list[Any]]:
    """What is sent while the block runs, one entry for each write to a socket; a pipeline is one."""
    sent: list[Any] = []
    blocking, looping = redis.connection.AbstractConnection, redis.asyncio.connection.AbstractConnection
    send, send_async = blocking.send_packed_command, looping.send_packed_command

    def count(self: Any, command: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(command)
        return send(self, command, *args, **kwargs)

    async def count_async(self: Any, command: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(command)
        return await send_async(self, command, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(blocking, "send_packed_command", count)
        patch.setattr(looping, "send_packed_command", count_async)
        yield sent


def watched(client: redis.Redis, *keys: str) -> None:
    """Return when somebody listens for each of these keys, which are in flight: who submits may subscribe before."""
    channels = [f"arm:done:{key}" for key in keys]
    eventually(lambda: all(n > 0 for _, n in client.pubsub_numsub(*channels)), PATIENCE, "a waiter subscribes")
    eventually(
        lambda: all(client.hget(f"arm:status:{key}", "state") in (b"pending", b"in_progress") for key in keys),
        PATIENCE,
        "what a waiter waits for is in flight",
    )


def blocked(client: redis.Redis, count: int = 1) -> None:
    """Return when this many clients sleep in a blocking command."""
    eventually(lambda: client.info("clients")["blocked_clients"] >= count, PATIENCE, "a taker blocks")


def queued(client: redis.Redis, queue: str = "arm") -> list[bytes]:
    """The RQ jobs of a queue, next first."""
    found: Any = client.lrange(f"rq:queue:{queue}", 0, -1)
    return list(found)


def snapshot(client: redis.Redis) -> dict[bytes, Any]:
    """Everything the server holds, but for counters: two are equal when nothing was written."""
    read: dict[bytes, Callable[[bytes], Any]] = {
        b"string": client.get,
        b"hash": client.hgetall,
        b"list": lambda name: client.lrange(name, 0, -1),
        b"set": client.smembers,
        b"zset": lambda name: client.zrange(name, 0, -1, withscores=True),
    }
    names = [name for name in client.scan_iter() if not name.startswith((b"arm:stats:", b"arm:noted:", b"arm:events"))]
    return {name: read[client.type(name)](name) for name in names}
