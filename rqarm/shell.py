"""Drive flows against a server: blocking (Shell) or on an event loop (AsyncShell).

The only code that runs a script. No decision about requests is made here: a flow says what it needs, a shell fetches
it and hands it back, errors included.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from functools import partial
from typing import Any, TypeVar

import redis
import redis.asyncio
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from rqarm import connect
from rqarm.calls import Batch, Call, Command, foreign_data
from rqarm.config import Settings
from rqarm.errors import RqarmError
from rqarm.flows import Emit, Flow, Listen, Step, Watch
from rqarm.keys import Keys
from rqarm.listen import AsyncListener, AsyncWatching, Listener, Watching
from rqarm.scripts import Script

T = TypeVar("T")
log = logging.getLogger("rqarm")

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

    def check(self, info: dict[str, Any], settings: Settings) -> None:
        """Refuse a server that would lose requests; say once what is doubtful."""
        for warning in connect.check_server(info, allow_volatile=settings.allow_volatile):
            log.warning("%s: %s", connect.redact_url(self.url), warning)
        self.is_checked = True

    def read(self, step: Call[Any] | Command[Any], reply: Any) -> Any:
        if isinstance(reply, Exception):
            raise self.explain(step, reply)
        return step.parse(reply)

    def explain(self, step: Step, error: Exception) -> Exception:
        """The error as the caller should see it."""
        if isinstance(error, RqarmError):
            return error
        if isinstance(error, RedisConnectionError | RedisTimeoutError):
            return connect.translate(error, self.url)
        if isinstance(error, ResponseError) and "WRONGTYPE" in str(error) and isinstance(step, Call):
            return foreign_data(step.keys, error)
        return error


class Shell:
    """Runs flows on a blocking client."""

    def __init__(self, keys: Keys, settings: Settings, url: str, client: redis.Redis | None = None) -> None:
        """A shell for the server at ``url``, or for somebody else's ``client``; then ``url`` only explains."""
        self._keys, self._settings, self._owns = keys, settings, client is None
        self.client = connect.open_client(url) if client is None else client
        self._open_waiting: Callable[[], redis.Redis] = (
            partial(connect.open_client, url, for_waiting=True) if client is None else partial(_sibling, client)
        )
        self._wire = _Wire(url, is_fake(self.client))
        self._waiting: redis.Redis | None = None
        self._listener: Listener | None = None

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
        watching: Watching | None = None
        with contextlib.ExitStack() as stack:
            stack.callback(flow.close)
            answer: Any = None
            failure: Exception | None = None
            while True:
                try:
                    step = flow.send(answer) if failure is None else flow.throw(failure)
                except StopIteration as end:
                    return end.value
                answer = failure = None
                try:
                    if isinstance(step, Emit):
                        yield step.item
                    elif isinstance(step, Watch):
                        watching = stack.enter_context(self._listening().watch(step.keys))
                    elif isinstance(step, Listen):
                        assert watching is not None, "a flow listens to what it watches"
                        answer = watching.wait(step.timeout)
                    else:
                        answer = self.execute(step)
                except Exception as error:  # noqa: BLE001 -- it belongs to the flow, which may have to tidy up
                    failure = self._wire.explain(step, error)

    def execute(self, step: Call[Any] | Command[Any] | Batch[Any]) -> Any:
        """The answer to one step. Raises redis errors, ServerUnavailable, ForeignData, ServerUnsuitable."""
        try:
            if not self._wire.is_checked:
                self._wire.check(self.client.info(), self._settings)
            if isinstance(step, Batch):
                return self._batch(step)
            client = self._waiting_client() if isinstance(step, Command) and step.waits else self.client
            argv = self._wire.argv(step)
            try:
                reply = client.execute_command(*argv)
            except NoScriptError:
                assert isinstance(step, Call)
                client.script_load(self._wire.text(step.script))
                reply = client.execute_command(*argv)
        except redis.exceptions.RedisError as error:
            explained = self._wire.explain(step, error)
            if explained is error:
                raise
            raise explained from error
        return step.parse(reply)

    def _batch(self, batch: Batch[Any]) -> list[Any]:
        """One round trip; the few calls that met a server without their script are sent again."""
        replies = self._pipeline(batch.steps)
        lost = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if lost:
            for script in {step.script for step in batch.steps if isinstance(step, Call)}:
                self.client.script_load(self._wire.text(script))
            for i, reply in zip(lost, self._pipeline([batch.steps[i] for i in lost]), strict=True):
                replies[i] = reply
        return [self._wire.read(step, reply) for step, reply in zip(batch.steps, replies, strict=True)]

    def _pipeline(self, steps: Any) -> list[Any]:
        with self.client.pipeline(transaction=False) as pipeline:
            for step in steps:
                pipeline.execute_command(*self._wire.argv(step))
            return list(pipeline.execute(raise_on_error=False))

    def _waiting_client(self) -> redis.Redis:
        if self._waiting is None:
            self._waiting = self._open_waiting()
        return self._waiting

    def _listening(self) -> Listener:
        if self._listener is None:
            self._listener = Listener(self._waiting_client(), self._keys)
        return self._listener

    def close(self) -> None:
        """Give all connections back."""
        if self._listener is not None:
            self._listener.close()
        if self._waiting is not None:
            self._waiting.close()
            self._waiting.connection_pool.disconnect()
        if self._owns:
            self.client.close()


class AsyncShell:
    """Runs flows on an asyncio client."""

    def __init__(self, keys: Keys, settings: Settings, url: str, client: redis.asyncio.Redis | None = None) -> None:
        """A shell for the server at ``url``, or for somebody else's ``client``; then ``url`` only explains."""
        self._keys, self._settings, self._owns = keys, settings, client is None
        self.client = connect.open_async_client(url) if client is None else client
        self._open_waiting: Callable[[], redis.asyncio.Redis] = (
            partial(connect.open_async_client, url) if client is None else partial(_sibling, client)
        )
        self._wire = _Wire(url, is_fake(self.client))
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
                    elif isinstance(step, Watch):
                        watching = await stack.enter_async_context(self._listening().watch(step.keys))
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
            if not self._wire.is_checked:
                self._wire.check(await self.client.info(), self._settings)
            if isinstance(step, Batch):
                return await self._batch(step)
            client = self._waiting_client() if isinstance(step, Command) and step.waits else self.client
            argv = self._wire.argv(step)
            try:
                reply = await client.execute_command(*argv)
            except NoScriptError:
                assert isinstance(step, Call)
                await client.script_load(self._wire.text(step.script))
                reply = await client.execute_command(*argv)
        except redis.exceptions.RedisError as error:
            explained = self._wire.explain(step, error)
            if explained is error:
                raise
            raise explained from error
        return step.parse(reply)

    async def _batch(self, batch: Batch[Any]) -> list[Any]:
        """One round trip; the few calls that met a server without their script are sent again."""
        replies = await self._pipeline(batch.steps)
        lost = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if lost:
            for script in {step.script for step in batch.steps if isinstance(step, Call)}:
                await self.client.script_load(self._wire.text(script))
            for i, reply in zip(lost, await self._pipeline([batch.steps[i] for i in lost]), strict=True):
                replies[i] = reply
        return [self._wire.read(step, reply) for step, reply in zip(batch.steps, replies, strict=True)]

    async def _pipeline(self, steps: Any) -> list[Any]:
        async with self.client.pipeline(transaction=False) as pipeline:
            for step in steps:
                pipeline.execute_command(*self._wire.argv(step))
            return list(await pipeline.execute(raise_on_error=False))

    def _waiting_client(self) -> redis.asyncio.Redis:
        if self._waiting is None:
            self._waiting = self._open_waiting()
        return self._waiting

    def _listening(self) -> AsyncListener:
        if self._listener is None:
            self._listener = AsyncListener(self._waiting_client(), self._keys)
        return self._listener

    async def close(self) -> None:
        """Give all connections back."""
        if self._listener is not None:
            await self._listener.close()
        if self._waiting is not None:
            await self._waiting.aclose()
            await self._waiting.connection_pool.disconnect()
        if self._owns:
            await self.client.aclose()


def is_fake(client: Any) -> bool:
    """fakeredis knows neither INFO nor the flags of scripts."""
    return str(client.connection_pool.connection_class.__module__).startswith("fakeredis")


def _sibling(client: Any) -> Any:
    """A client of the same server with a pool of its own: what blocks must not use up the pool of submits."""
    pool = client.connection_pool
    options = {**pool.connection_kwargs, "socket_timeout": None}
    twin = type(pool)(connection_class=pool.connection_class, **options)
    return type(client)(connection_pool=twin)


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
