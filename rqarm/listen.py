"""Wake-ups: one pub/sub connection for a process, however many wait.

A waiter watches keys and sleeps until one of them is published. Losing a message costs nothing but time: flows read the
record again every few seconds, and a connection that was broken wakes everybody when it stands again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import weakref
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
UNCONFIRMED = "a subscription was not confirmed in time"


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
    """The subscription of this process, read by one thread. After a fork the child starts its own.

    Not redis-py's PubSub: that connects again in whichever thread meets the error, and two that do so at once mix up
    their sockets. Here the thread alone connects and reads. Who watches only writes, and when the connection does not
    stand, the thread will ask for all that is watched by then.
    """

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._pool: Any = client.connection_pool
        self._keys = keys
        self._start_anew()
        _LISTENERS.add(self)

    def _start_anew(self) -> None:
        self._changed = threading.Condition()
        self._watchers: dict[str, set[Watching]] = {}
        self._confirmed: set[str] = set()
        self._connection: Any = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    @contextlib.contextmanager
    def watch(self, keys: Sequence[Key], is_sure: bool = True) -> Iterator[Watching]:
        """Hear of these keys; entered when the subscription stands, or at once when that need not be sure.

        Raises redis TimeoutError when it does not stand in time.
        """
        watching = Watching(keys)
        channels = [self._keys.done(key) for key in keys]
        try:
            self._subscribe(watching, channels, is_sure)
            yield watching
        finally:
            self._unsubscribe(watching, channels)

    def close(self) -> None:
        """Stop the thread, which gives the connection back."""
        self._closing.set()
        if self._thread is not None:
            with self._changed:
                # its confirmation ends the read in which the thread sleeps
                self._send("SUBSCRIBE", [self._keys.pubsub_prefix])
            self._thread.join(CONFIRM)

    def _subscribe(self, watching: Watching, channels: Sequence[str], is_sure: bool) -> None:
        with self._changed:
            fresh = [channel for channel in dict.fromkeys(channels) if channel not in self._watchers]
            for channel in channels:
                self._watchers.setdefault(channel, set()).add(watching)
            self._send("SUBSCRIBE", fresh)
            if self._thread is None:
                self._thread = threading.Thread(target=self._read, name="rqarm-listener", daemon=True)
                self._thread.start()
            if is_sure and not self._changed.wait_for(lambda: self._confirmed.issuperset(channels), CONFIRM):
                raise redis.exceptions.TimeoutError(UNCONFIRMED)

    def _unsubscribe(self, watching: Watching, channels: Sequence[str]) -> None:
        with self._changed:
            for channel in channels:
                self._watchers.get(channel, set()).discard(watching)
            idle = [channel for channel in dict.fromkeys(channels) if not self._watchers.get(channel)]
            for channel in idle:
                self._watchers.pop(channel, None)
                self._confirmed.discard(channel)
            self._send("UNSUBSCRIBE", idle)

    def _send(self, verb: str, channels: Sequence[str]) -> None:
        """Write under the lock: what is watched and what the server was told never differ.

        Straight to the socket: redis-py's own send closes a connection that is broken, here under the reader's feet.
        The reader finds out by itself, connects again and asks for everything.
        """
        end = None if self._connection is None else self._connection._sock
        if channels and end is not None:
            with contextlib.suppress(OSError):
                end.sendall(b"".join(self._connection.pack_command(verb, *channels)))

    def _read(self) -> None:
        while not self._closing.is_set():
            connection = None
            try:
                connection = self._pool.get_connection()
                with self._changed:
                    # one channel of ours that nothing is published on: SUBSCRIBE needs at least one
                    channels = (self._keys.pubsub_prefix, *self._watchers)
                    connection.send_command("SUBSCRIBE", *channels, check_health=False)
                    self._connection = connection
                while not self._closing.is_set():
                    if connection.can_read(timeout=READ):
                        self._take(connection.read_response(disconnect_on_error=False, push_request=True))
            except Exception as error:  # noqa: BLE001 -- the only reader must not die, whatever breaks
                log.warning("lost the wake-up connection, trying again in %g s: %s", RECONNECT, error)
            finally:
                with self._changed:
                    self._connection = None
                if connection is not None:
                    connection.disconnect()
                    self._pool.release(connection)
            self._closing.wait(RECONNECT)

    def _take(self, message: list[Any]) -> None:
        kind, channel = message[0], message[1].decode()
        with self._changed:
            watchers = tuple(self._watchers.get(channel, ()))
            # subscribed again after a break: what ended meanwhile was not heard
            is_again = kind == b"subscribe" and channel in self._confirmed
            if kind == b"subscribe" and watchers:
                self._confirmed.add(channel)
                self._changed.notify_all()
        if kind == b"message" or is_again:
            for watching in watchers:
                watching.wake([Key(channel.removeprefix(self._keys.pubsub_prefix))])


#: those of this process. A child has to begin anew before its first thread runs: neither the reader nor the locks of
#: its parent live there.
_LISTENERS: weakref.WeakSet[Listener] = weakref.WeakSet()


def _after_fork() -> None:
    for listener in tuple(_LISTENERS):
        listener._start_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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
    """The subscription of one event loop, read by one task.

    Not redis-py's PubSub: that connects again in whichever coroutine meets the error, and sends a PING of its own; two
    coroutines then read from one stream, which raises. Here the task alone connects and reads. Who watches only writes,
    and when the connection does not stand, the task will ask for all that is watched by then.
    """

    def __init__(self, client: redis.asyncio.Redis, keys: Keys) -> None:
        self._pool: Any = client.connection_pool
        self._keys = keys
        self._watchers: dict[str, set[AsyncWatching]] = {}
        self._confirmed: dict[str, asyncio.Event] = {}
        self._connection: Any = None
        self._task: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def watch(self, keys: Sequence[Key], is_sure: bool = True) -> AsyncIterator[AsyncWatching]:
        """Hear of these keys; entered when the subscription stands, or at once when that need not be sure.

        Raises redis TimeoutError when it does not stand in time.
        """
        watching = AsyncWatching(keys)
        channels = [self._keys.done(key) for key in keys]
        try:
            await self._subscribe(watching, channels, is_sure)
            yield watching
        finally:
            await self._unsubscribe(watching, channels)

    async def close(self) -> None:
        """Stop the task and give the connection back."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _subscribe(self, watching: AsyncWatching, channels: Sequence[str], is_sure: bool) -> None:
        fresh = [channel for channel in dict.fromkeys(channels) if channel not in self._watchers]
        for channel in channels:
            self._watchers.setdefault(channel, set()).add(watching)
            self._confirmed.setdefault(channel, asyncio.Event())
        confirmed = [self._confirmed[channel] for channel in channels]
        if self._task is None:
            self._task = asyncio.create_task(self._read(), name="rqarm-listener")
        await self._send("SUBSCRIBE", fresh)
        if not is_sure:
            return
        try:
            async with asyncio.timeout(CONFIRM):
                for event in confirmed:
                    await event.wait()
        except TimeoutError:
            raise redis.exceptions.TimeoutError(UNCONFIRMED) from None

    async def _unsubscribe(self, watching: AsyncWatching, channels: Sequence[str]) -> None:
        for channel in channels:
            self._watchers.get(channel, set()).discard(watching)
        idle = [channel for channel in dict.fromkeys(channels) if not self._watchers.get(channel)]
        for channel in idle:
            self._watchers.pop(channel, None)
            self._confirmed.pop(channel, None)
        await self._send("UNSUBSCRIBE", idle)

    async def _send(self, verb: str, channels: Sequence[str]) -> None:
        """Write without a pause before it: what is watched and what the server was told never differ."""
        if channels and self._connection is not None and self._connection.is_connected:
            # the task meets the same error, connects again and asks for everything
            with contextlib.suppress(redis.exceptions.RedisError):
                await self._connection.send_command(verb, *channels, check_health=False)

    async def _read(self) -> None:
        while True:
            connection = None
            try:
                connection = self._connection = await self._pool.get_connection()
                # one channel of ours that nothing is published on: SUBSCRIBE needs at least one
                channels = (self._keys.pubsub_prefix, *self._watchers)
                await connection.send_command("SUBSCRIBE", *channels, check_health=False)
                while True:
                    message = await connection.read_response(timeout=READ, disconnect_on_error=False, push_request=True)
                    if message is not None:
                        self._take(message)
            except Exception as error:  # noqa: BLE001 -- the only reader must not die, whatever breaks
                log.warning("lost the wake-up connection, trying again in %g s: %s", RECONNECT, error)
            finally:
                self._connection = None
                if connection is not None:
                    await connection.disconnect(nowait=True)
                    await self._pool.release(connection)
            await asyncio.sleep(RECONNECT)

    def _take(self, message: list[Any]) -> None:
        kind, channel = message[0], message[1].decode()
        confirmed = self._confirmed.get(channel)
        if kind == b"message" or (kind == b"subscribe" and confirmed is not None and confirmed.is_set()):
            # subscribed again after a break: what ended meanwhile was not heard
            for watching in tuple(self._watchers.get(channel, ())):
                watching.wake([Key(channel.removeprefix(self._keys.pubsub_prefix))])
        elif kind == b"subscribe" and confirmed is not None:
            confirmed.set()
