"""Drive flows against a server: blocking (Shell) or on an event loop (AsyncShell).

The only code that runs a script. No decision about requests is made here: a flow says what it needs, a shell fetches
it and hands it back, errors included.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import hiredis
import redis
import redis.asyncio
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from rqarm import connect
from rqarm.calls import Batch, Call, Command
from rqarm.cancelling import cancellable
from rqarm.config import Settings
from rqarm.errors import ConfigError, RqarmError
from rqarm.flows import Emit, Flow, Listen, Step, Watch
from rqarm.keys import Keys
from rqarm.listen import AsyncListener, AsyncWatching, Listener, Watching
from rqarm.replies import foreign_data
from rqarm.scripts import Script

T = TypeVar("T")
C = TypeVar("C", redis.Redis, redis.asyncio.Redis)
log = logging.getLogger("rqarm")

#: connections that submits and reads of one event loop use at a time. One thread keeps no more than these busy, and ten
#: thousand coroutines that start at once must not open ten thousand.
IN_FLIGHT = 32
#: redis-py's default is 100 for a pool, and one more is an error
UNLIMITED = 1 << 31
#: how often a server is taught a script for one call: one that restarts may forget it again at once
LESSONS = 5
#: bytes up to which commands are sent in one piece
JOINED = 1 << 16
#: what a manager calls a server whose URL it was not told
GIVEN = "the given connection"


class _Wire:
    """What both shells say to the server in the same way."""

    def __init__(self, url: str, is_fake: bool) -> None:
        self.url = url
        self._is_fake = is_fake
        self.is_checked = is_fake

    def sha(self, script: Script) -> str:
        return script.plain_sha if self._is_fake else script.sha

    def text(self, script: Script) -> str:
        return script.plain_text if self._is_fake else script.text

    def argv(self, step: Call[Any] | Command[Any]) -> tuple[Any, ...]:
        """The step as a command of Redis."""
        if isinstance(step, Call):
            return ("EVALSHA", self.sha(step.script), len(step.keys), *step.keys, *step.argv)
        return step.argv

    def loads(self, steps: Sequence[Call[Any] | Command[Any]]) -> list[Command[Any]]:
        """What teaches the server the scripts of these steps."""
        scripts = {step.script for step in steps if isinstance(step, Call)}
        return [Command(("SCRIPT", "LOAD", self.text(script)), bytes) for script in scripts]

    def check(self, info: dict[str, Any], settings: Settings) -> None:
        """Refuse a server that would lose requests; say once what is doubtful."""
        for warning in connect.check_server(
            info, allow_volatile=settings.allow_volatile, durability=settings.durability
        ):
            log.warning("%s: %s", connect.redact_url(self.url), warning)
        self.is_checked = True

    def read(self, step: Call[Any] | Command[Any], reply: Any) -> Any:
        if isinstance(reply, Exception):
            raise self.explain(step, reply)
        return step.parse(reply)

    def read_all(self, batch: Batch[Any], replies: list[Any]) -> list[Any]:
        """The answers to a batch."""
        if not batch.settles:
            return [self.read(step, reply) for step, reply in zip(batch.steps, replies, strict=True)]
        answers: list[Any] = []
        for step, reply in zip(batch.steps, replies, strict=True):
            try:
                answers.append(self.read(step, reply))
            except Exception as error:  # noqa: BLE001 -- the answer to this step
                answers.append(error)
        return answers

    def explain(self, step: Step, error: Exception) -> Exception:
        """The error as the caller should see it."""
        if isinstance(error, RqarmError):
            return error
        if isinstance(error, RedisConnectionError | RedisTimeoutError):
            return connect.translate(error, self.url)
        if isinstance(error, ResponseError) and "WRONGTYPE" in str(error) and isinstance(step, Call | Command):
            return foreign_data(step.keys if isinstance(step, Call) else step.argv[1:2], error)
        return error


@dataclass(frozen=True, slots=True)
class Sent:
    """A batch whose answers have not been read. ``connection``: on which they come; None = it could not be sent."""

    batch: Batch[Any]
    connection: Any


class Shell:
    """Runs flows on a blocking client."""

    def __init__(self, keys: Keys, settings: Settings, url: str, client: redis.Redis | None = None) -> None:
        """A shell for the server at ``url``, or for somebody else's ``client``; then ``url`` only explains."""
        self._keys, self._settings, self._owns = keys, settings, client is None
        self.client = connect.open_client(url) if client is None else _usable(client)
        if client is None:
            _roomy(self.client)
        self._open_waiting: Callable[[], redis.Redis] = (
            partial(connect.open_client, url, for_waiting=True) if client is None else partial(sibling, client)
        )
        self._wire = _Wire(url, is_fake(self.client))
        # what waits is made by the first who needs it; no lock, which a fork could leave locked for ever
        self._made: dict[str, Any] = {}
        #: connections for the next call, and the process that they are of: the pool's part of a call takes as long as
        #: the server's. A pool of somebody else may be small, and one of Sentinel drops its own when the master moves.
        self._kept: list[Any] = []
        self._pid = os.getpid()
        self._keeps = self._owns and type(self.client.connection_pool) is redis.ConnectionPool

    def run(self, flow: Flow[T]) -> T:
        """The value of a flow. What it emits on its way is dropped."""
        steps = self._drive(flow)
        try:
            while True:
                next(steps)
        except StopIteration as end:
            value: T = end.value
            return value

    def iterate(self, flow: Flow[Any]) -> Iterator[Any]:
        """What the flow emits, as it comes."""
        yield from self._drive(flow)

    def _drive(self, flow: Flow[Any]) -> Generator[Any, None, Any]:
        watchings: list[Watching] = []
        answer: Any = None
        failure: Exception | None = None
        try:
            while True:
                try:
                    step = flow.send(answer) if failure is None else flow.throw(failure)
                except StopIteration as end:
                    return end.value
                answer = failure = None
                try:
                    if isinstance(step, Emit):
                        yield step.item
                    elif isinstance(step, Watch) and watchings and watchings[-1].keys == step.keys:
                        if step.is_sure:
                            watchings[-1].confirm()
                    elif isinstance(step, Watch):
                        watchings.append(self._listening().watch(step.keys, step.is_sure).__enter__())
                    elif isinstance(step, Listen):
                        answer = watchings[-1].wait(step.timeout)
                    else:
                        answer = self.execute(step)
                except Exception as error:  # noqa: BLE001 -- it belongs to the flow, which may have to tidy up
                    failure = self._wire.explain(step, error)
        finally:
            for watching in watchings:
                watching.__exit__()
            flow.close()

    def execute(self, step: Call[Any] | Command[Any] | Batch[Any]) -> Any:
        """The answer to one step. Raises redis errors, ServerUnavailable, ForeignData, ServerUnsuitable."""
        try:
            if not self._wire.is_checked:
                self._wire.check(self.client.info(), self._settings)
            if isinstance(step, Batch):
                return self._batch(step)
            if isinstance(step, Command) and step.waits:
                return step.parse(self._waiting_client().execute_command(*step.argv))
            (reply,) = self._replies((step,))
            if isinstance(reply, Exception):
                raise reply
        except redis.exceptions.RedisError as error:
            explained = self._wire.explain(step, error)
            if explained is error:
                raise
            raise explained from error
        return step.parse(reply)

    def _batch(self, batch: Batch[Any]) -> list[Any]:
        return self._wire.read_all(batch, self._replies(batch.steps))

    def _replies(self, steps: Sequence[Call[Any] | Command[Any]]) -> list[Any]:
        """One round trip; what met a server without its script is sent again."""
        replies = self._exchange(steps)
        for _ in range(LESSONS):
            again = _to_say_again(steps, replies)
            if not again:
                break
            for reply in self._exchange(self._wire.loads(steps)):
                if isinstance(reply, Exception):
                    raise reply
            for i, reply in zip(again, self._exchange([steps[i] for i in again]), strict=True):
                replies[i] = reply
        return replies

    def send(self, batch: Batch[Any]) -> Sent:
        """Ask now and read later, by ``receive``: the server works meanwhile. For calls, in a batch that settles."""
        connection = None
        try:
            connection = self._borrow(is_tried=False)  # what has broken is found when the answers are read
            connection.send_packed_command(self.packed(*batch.steps))
        except (redis.exceptions.RedisError, OSError):
            if connection is not None:
                connection.disconnect()
                self.client.connection_pool.release(connection)
            return Sent(batch, None)
        return Sent(batch, connection)

    def receive(self, sent: Sent) -> list[Any]:
        """The answers to what was sent. A connection that breaks between is none's loss: all is asked again."""
        connection = sent.connection
        if connection is None:
            return list(self.execute(sent.batch))
        try:
            replies = [self._reply(step, connection) for step in sent.batch.steps]
            self._kept.append(connection)
        except (redis.exceptions.RedisError, OSError):
            connection.disconnect()
            self.client.connection_pool.release(connection)
            replies = None
        if replies is None or any(isinstance(reply, NoScriptError) for reply in replies):
            return list(self.execute(sent.batch))
        return self._wire.read_all(sent.batch, replies)

    def packed(self, *steps: Call[Any] | Command[Any]) -> list[bytes]:
        """Steps as they are sent: redis-py's own way in C, without what it does to every argument before."""
        packed = [hiredis.pack_command(self._wire.argv(step)) for step in steps]
        return packed if sum(map(len, packed)) > JOINED else [b"".join(packed)]

    def answer(self, call: Call[T], connection: Any) -> T:
        """The answer to a call that was sent on this connection, which is read now. Raises its error."""
        answer: T = self._wire.read(call, self._reply(call, connection))
        return answer

    def _exchange(self, steps: Sequence[Call[Any] | Command[Any]]) -> list[Any]:
        """The replies. Redis-py's client and its pipeline take several times as long for the same; retries are those of
        its connection.
        """
        packed, connection = self.packed(*steps), self._borrow()

        def send_and_read() -> list[Any]:
            connection.send_packed_command(packed)
            return [self._reply(step, connection) for step in steps]

        is_whole = False
        try:
            replies: list[Any] = connection.retry.call_with_retry(send_and_read, lambda _: connection.disconnect())
            is_whole = True
            return replies
        finally:
            if is_whole and self._keeps:
                self._kept.append(connection)
            else:
                self.client.connection_pool.release(connection)

    def _reply(self, step: Call[Any] | Command[Any], connection: Any) -> Any:
        """The reply to a step; an error of the server is one. Of scripts redis-py knows nothing."""
        try:
            if isinstance(step, Command):
                return self.client.parse_response(connection, step.argv[0])
            return connection.read_response()
        except ResponseError as error:
            return error

    def _borrow(self, *, is_tried: bool = True) -> Any:
        """A connection for one exchange; one that stands, if it is to be tried. Raises RedisError."""
        pool = self.client.connection_pool
        if self._pid != os.getpid():
            self._kept, self._pid = [], os.getpid()  # those of the parent, who goes on with them
        while self._kept:
            connection = self._kept.pop()
            if not is_tried or _is_quiet(connection):
                return connection
            connection.disconnect()
            pool.release(connection)
        return pool.get_connection()

    def _waiting_client(self) -> redis.Redis:
        client: redis.Redis = self._made.get("client") or self._made.setdefault("client", _roomy(self._open_waiting()))
        return client

    def _listening(self) -> Listener:
        listener: Listener | None = self._made.get("listener")
        if listener is None:
            listener = self._made.setdefault("listener", Listener(self._waiting_client(), self._keys))
        return listener

    def close(self) -> None:
        """Give all connections back."""
        listener, waiting = self._made.pop("listener", None), self._made.pop("client", None)
        while self._kept:
            self.client.connection_pool.release(self._kept.pop())
        if listener is not None:
            listener.close()
        if waiting is not None:
            waiting.close()
            waiting.connection_pool.disconnect()
        if self._owns:
            self.client.close()


class AsyncShell:
    """Runs flows on an asyncio client."""

    def __init__(self, keys: Keys, settings: Settings, url: str, client: redis.asyncio.Redis | None = None) -> None:
        """A shell for the server at ``url``, or for somebody else's ``client``; then ``url`` only explains."""
        self._keys, self._settings, self._owns = keys, settings, client is None
        self.client = connect.open_async_client(url) if client is None else _usable(client)
        self._open_waiting: Callable[[], redis.asyncio.Redis] = (
            partial(connect.open_async_client, url, for_waiting=True) if client is None else partial(sibling, client)
        )
        self._wire = _Wire(url, is_fake(self.client))
        room = getattr(self.client.connection_pool, "max_connections", IN_FLIGHT)
        self._sending = asyncio.Semaphore(min(IN_FLIGHT, room))
        self._waiting: redis.asyncio.Redis | None = None
        self._listener: AsyncListener | None = None

    async def run(self, flow: Flow[T]) -> T:
        """The value of a flow. What it emits on its way is dropped."""
        result: list[T] = []
        async for _ in self._drive(flow, result.append):
            continue
        return result[0]

    def iterate(self, flow: Flow[Any]) -> AsyncIterator[Any]:
        """What the flow emits, as it comes."""
        return self._drive(flow, lambda _: None)

    async def _drive(self, flow: Flow[Any], give: Callable[[Any], None]) -> AsyncIterator[Any]:
        watching: AsyncWatching | None = None
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(flow.close)
            answer: Any = None
            failure: Exception | None = None
            while True:
                try:
                    step = flow.send(answer) if failure is None else flow.throw(failure)
                except StopIteration as end:
                    give(end.value)
                    return
                answer = failure = None
                try:
                    if isinstance(step, Emit):
                        yield step.item
                    elif isinstance(step, Watch) and watching is not None and watching.keys == step.keys:
                        if step.is_sure:
                            await watching.confirm()
                    elif isinstance(step, Watch):
                        watching = await stack.enter_async_context(self._listening().watch(step.keys, step.is_sure))
                    elif isinstance(step, Listen):
                        assert watching is not None, "a flow listens to what it watches"
                        answer = await watching.wait(step.timeout)
                    else:
                        answer = await self.execute(step)
                except Exception as error:  # noqa: BLE001 -- it belongs to the flow, which may have to tidy up
                    failure = self._wire.explain(step, error)

    async def execute(self, step: Call[Any] | Command[Any] | Batch[Any]) -> Any:
        """The answer to one step. Raises redis errors, ServerUnavailable, ForeignData, ServerUnsuitable."""
        try:
            with cancellable():
                if isinstance(step, Command) and step.waits:
                    reply = await self._waiting_client().execute_command(*self._wire.argv(step))
                else:
                    async with self._sending:
                        reply = await self._send(step)
        except redis.exceptions.RedisError as error:
            explained = self._wire.explain(step, error)
            if explained is error:
                raise
            raise explained from error
        return reply if isinstance(step, Batch) else step.parse(reply)

    async def _send(self, step: Call[Any] | Command[Any] | Batch[Any]) -> Any:
        """The reply to one step; to a batch, the list of its answers."""
        if not self._wire.is_checked:
            self._wire.check(await self.client.info(), self._settings)
        if isinstance(step, Batch):
            return await self._batch(step)
        argv = self._wire.argv(step)
        for _ in range(LESSONS):
            try:
                return await self.client.execute_command(*argv)
            except NoScriptError:
                assert isinstance(step, Call)
                await self.client.script_load(self._wire.text(step.script))
        return await self.client.execute_command(*argv)

    async def _batch(self, batch: Batch[Any]) -> list[Any]:
        """One round trip; what met a server without its script is sent again."""
        replies = await self._pipeline(batch.steps)
        for _ in range(LESSONS):
            again = _to_say_again(batch.steps, replies)
            if not again:
                break
            for reply in await self._pipeline(self._wire.loads(batch.steps)):
                if isinstance(reply, Exception):
                    raise reply
            for i, reply in zip(again, await self._pipeline([batch.steps[i] for i in again]), strict=True):
                replies[i] = reply
        return self._wire.read_all(batch, replies)

    async def _pipeline(self, steps: Any) -> list[Any]:
        async with self.client.pipeline(transaction=False) as pipeline:
            for step in steps:
                pipeline.execute_command(*self._wire.argv(step))
            return list(await pipeline.execute(raise_on_error=False))

    def _waiting_client(self) -> redis.asyncio.Redis:
        if self._waiting is None:
            self._waiting = _roomy(self._open_waiting())
        return self._waiting

    def _listening(self) -> AsyncListener:
        if self._listener is None:
            self._listener = AsyncListener(self._waiting_client(), self._keys)
        return self._listener

    async def close(self) -> None:
        """Give all connections back."""
        listener, waiting = self._listener, self._waiting
        self._listener = self._waiting = None
        if listener is not None:
            await listener.close()
        if waiting is not None:
            await waiting.aclose()
            await waiting.connection_pool.disconnect()
        if self._owns:
            await self.client.aclose()


def _to_say_again(steps: Sequence[Call[Any] | Command[Any]], replies: Sequence[Any]) -> list[int]:
    """The calls whose script the server does not know, and plain commands behind the first, which may be about it."""
    unknown = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
    return unknown and [i for i in range(unknown[0], len(steps)) if i in unknown or isinstance(steps[i], Command)]


def _is_quiet(connection: Any) -> bool:
    """Whether it stands and nothing has come that nobody asked for: a server that has gone says so by an end."""
    end = connection._sock
    if end is None:
        return False
    poll = select.poll()
    poll.register(end, select.POLLIN)
    return not poll.poll(0)


def is_fake(client: Any) -> bool:
    """fakeredis knows neither INFO nor the flags of scripts."""
    return str(client.connection_pool.connection_class.__module__).startswith("fakeredis")


def _usable(client: C) -> C:
    """The client of somebody else. Raises ConfigError for one that turns answers into text: results are bytes."""
    if client.connection_pool.connection_kwargs.get("decode_responses"):
        raise ConfigError("connection: decode_responses does not fit, results are bytes; give a client without it")
    return client


def sibling(client: Any, **changes: Any) -> Any:
    """A client of the same server with a pool of its own: what blocks must not use up the pool of submits.

    ``changes``: options of its connections; without any it may wait for ever.
    """
    pool = client.connection_pool
    options = {**pool.connection_kwargs, "connection_class": pool.connection_class, "socket_timeout": None, **changes}
    if hasattr(pool, "sentinel_manager"):
        del options["connection_pool"]
        chosen = {"is_master": pool.is_master, "check_connection": pool.check_connection}
        twin = type(pool)(pool.service_name, pool.sentinel_manager, **chosen, **options)
    else:
        plain = redis.asyncio.ConnectionPool if isinstance(pool, redis.asyncio.ConnectionPool) else redis.ConnectionPool
        twin = plain(**options)
    return type(client)(connection_pool=twin)


def _roomy(client: C) -> C:
    """As many connections as there are threads or tasks that block; redis-py raises at the 101st."""
    client.connection_pool.max_connections = UNLIMITED
    return client


def same_docs(origin: type) -> Callable[[type[T]], type[T]]:
    """The docstrings of the blocking class for its asyncio twin, where that has none: each is written once."""

    def dress(twin: type[T]) -> type[T]:
        twin.__doc__ = twin.__doc__ or origin.__doc__
        for name, member in vars(twin).items():
            model = getattr(origin, name, None)
            if not name.startswith("_") and not member.__doc__ and model is not None:
                member.__doc__ = model.__doc__
        return twin

    return dress
