"""Wake-ups: one pub/sub connection for a process, however many wait.

A waiter watches keys and sleeps until one of them is published. Losing a message costs nothing but time: flows read the
record again every few seconds, and a broken connection wakes everybody at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import redis
import redis.asyncio

from rqarm.keys import Keys
from rqarm.model import Key

log = logging.getLogger("rqarm")

#: seconds until a subscription must be confirmed, and between attempts to reconnect
CONFIRM, RECONNECT = 5.0, 0.5
#: seconds that the reader sleeps at most before it looks whether it should stop
READ = 5.0


class Watching:
    """What one waiter hears. Made by ``Listener.watch``."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self.keys = keys
        self._woken: set[Key] = set()
        self._condition = threading.Condition()

    def wait(self, timeout: float) -> set[Key]:
        """Sleep until a watched key wakes, at most ``timeout`` seconds. Which woke since the last call."""
        with self._condition:
            if not self._woken:
                self._condition.wait(timeout)
            woken, self._woken = self._woken, set()
            return woken

    def wake(self, keys: Sequence[Key]) -> None:
        with self._condition:
            self._woken.update(keys)
            self._condition.notify_all()


class Listener:
    """The subscription of this process, read by one thread. After a fork the child starts its own."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client, self._keys = client, keys
        self._start_anew()

    def _start_anew(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._watchers: dict[str, set[Watching]] = {}
        self._confirmed: set[str] = set()
        self._pubsub: Any = None
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @contextlib.contextmanager
    def watch(self, keys: Sequence[Key]) -> Iterator[Watching]:
        """Hear of these keys; entered when the subscription stands. Raises redis ConnectionError."""
        if self._pid != os.getpid():
            self._start_anew()
        watching = Watching(keys)
        channels = [self._keys.done(key) for key in keys]
        try:
            self._subscribe(watching, channels)
            yield watching
        finally:
            self._unsubscribe(watching, channels)

    def close(self) -> None:
        """Stop the thread and give the connection back."""
        with self._changed:
            self._is_closed = True
            thread, pubsub = self._thread, self._pubsub
        if pubsub is not None and self._pid == os.getpid():
            # a message that no waiter knows: it only ends the read in which the thread sleeps
            with contextlib.suppress(redis.exceptions.RedisError):
                pubsub.subscribe(self._keys.pubsub_prefix)
            if thread is not None:
                thread.join(CONFIRM)
            pubsub.close()

    def _subscribe(self, watching: Watching, channels: Sequence[str]) -> None:
        with self._changed:
            fresh = [channel for channel in channels if channel not in self._watchers]
            for channel in channels:
                self._watchers.setdefault(channel, set()).add(watching)
            if self._pubsub is None:
                self._pubsub = self._client.pubsub()
            if fresh:
                self._pubsub.subscribe(*fresh)
            if self._thread is None:
                self._thread = threading.Thread(target=self._read, name="rqarm-listener", daemon=True)
                self._thread.start()
            if not self._changed.wait_for(lambda: self._confirmed.issuperset(channels), CONFIRM):
                raise redis.exceptions.TimeoutError(f"a subscription was not confirmed within {CONFIRM:g} s")

    def _unsubscribe(self, watching: Watching, channels: Sequence[str]) -> None:
        with self._changed:
            for channel in channels:
                self._watchers.get(channel, set()).discard(watching)
            idle = [channel for channel in dict.fromkeys(channels) if not self._watchers.get(channel)]
            for channel in idle:
                self._watchers.pop(channel, None)
                self._confirmed.discard(channel)
            if idle and self._pubsub is not None:
                # the record is the truth: a subscription too many does no harm
                with contextlib.suppress(redis.exceptions.RedisError):
                    self._pubsub.unsubscribe(*idle)

    def _read(self) -> None:
        while not self._is_closed:
            try:
                message = self._pubsub.get_message(timeout=READ)
            except redis.exceptions.RedisError as error:
                log.warning("lost the wake-up connection, trying again in %g s: %s", RECONNECT, error)
                self._wake_all()
                time.sleep(RECONNECT)
            else:
                if message is not None:
                    self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        channel = message["channel"].decode()
        with self._changed:
            watchers = tuple(self._watchers.get(channel, ()))
            if message["type"] == "subscribe":
                if watchers:
                    self._confirmed.add(channel)
                self._changed.notify_all()
        if message["type"] == "message":
            for watching in watchers:
                watching.wake([Key(channel.removeprefix(self._keys.pubsub_prefix))])

    def _wake_all(self) -> None:
        with self._changed:
            everybody = {watching for watchers in self._watchers.values() for watching in watchers}
        for watching in everybody:
            watching.wake(watching.keys)


class AsyncWatching:
    """What one waiting coroutine hears."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self.keys = keys
        self._woken: set[Key] = set()
        self._event = asyncio.Event()

    async def wait(self, timeout: float) -> set[Key]:
        """Sleep until a watched key wakes, at most ``timeout`` seconds. Which woke since the last call."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._event.wait()
        woken, self._woken = self._woken, set()
        self._event.clear()
        return woken

    def wake(self, keys: Sequence[Key]) -> None:
        self._woken.update(keys)
        self._event.set()


class AsyncListener:
    """The subscription of one event loop, read by one task."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys) -> None:
        self._client, self._keys = client, keys
        self._watchers: dict[str, set[AsyncWatching]] = {}
        self._confirmed: dict[str, asyncio.Event] = {}
        self._pubsub: Any = None
        self._task: asyncio.Task[None] | None = None
        self._sending = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def watch(self, keys: Sequence[Key]) -> AsyncIterator[AsyncWatching]:
        """Hear of these keys; entered when the subscription stands. Raises redis ConnectionError."""
        watching = AsyncWatching(keys)
        channels = [self._keys.done(key) for key in keys]
        try:
            await self._subscribe(watching, channels)
            yield watching
        finally:
            await self._unsubscribe(watching, channels)

    async def close(self) -> None:
        """Stop the task and give the connection back."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._pubsub is not None:
            await self._pubsub.aclose()

    async def _subscribe(self, watching: AsyncWatching, channels: Sequence[str]) -> None:
        fresh = [channel for channel in channels if channel not in self._watchers]
        for channel in channels:
            self._watchers.setdefault(channel, set()).add(watching)
            self._confirmed.setdefault(channel, asyncio.Event())
        confirmed = [self._confirmed[channel] for channel in channels]
        async with self._sending:
            if self._pubsub is None:
                self._pubsub = self._client.pubsub()
            if fresh:
                await self._pubsub.subscribe(*fresh)
            if self._task is None:
                self._task = asyncio.create_task(self._read(), name="rqarm-listener")
        async with asyncio.timeout(CONFIRM):
            for event in confirmed:
                await event.wait()

    async def _unsubscribe(self, watching: AsyncWatching, channels: Sequence[str]) -> None:
        for channel in channels:
            self._watchers.get(channel, set()).discard(watching)
        idle = [channel for channel in dict.fromkeys(channels) if not self._watchers.get(channel)]
        for channel in idle:
            self._watchers.pop(channel, None)
            self._confirmed.pop(channel, None)
        if idle and self._pubsub is not None:
            with contextlib.suppress(redis.exceptions.RedisError):
                async with self._sending:
                    await self._pubsub.unsubscribe(*idle)

    async def _read(self) -> None:
        while True:
            try:
                message = await self._pubsub.get_message(timeout=READ)
            except redis.exceptions.RedisError as error:
                log.warning("lost the wake-up connection, trying again in %g s: %s", RECONNECT, error)
                self._wake_all()
                await asyncio.sleep(RECONNECT)
            else:
                if message is not None:
                    self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        channel = message["channel"].decode()
        if message["type"] == "subscribe" and channel in self._confirmed:
            self._confirmed[channel].set()
        elif message["type"] == "message":
            for watching in tuple(self._watchers.get(channel, ())):
                watching.wake([Key(channel.removeprefix(self._keys.pubsub_prefix))])

    def _wake_all(self) -> None:
        for watching in {watching for watchers in self._watchers.values() for watching in watchers}:
            watching.wake(watching.keys)
