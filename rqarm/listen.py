"""Wake-ups: one pub/sub connection for a process, however many wait.

A waiter watches keys and sleeps until one of them is published. Losing a message costs nothing but time: flows read the
record again every few seconds, and a connection that was broken wakes everybody when it stands again.

A message may carry a small result. It counts for a waiter only behind the subscription that was sent for this waiter,
however long others have watched the key: what was published before may be of a claim that it has not asked about.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Generic, TypeVar

import redis
import redis.asyncio

from rqarm.cancelling import cancellable
from rqarm.keys import Keys
from rqarm.model import Key

log = logging.getLogger("rqarm")

#: seconds until a subscription must be confirmed, and between attempts to reconnect
CONFIRM, RECONNECT = 5.0, 0.5
#: seconds that the task of an event loop reads at a time
READ = 5.0
UNCONFIRMED = "a subscription was not confirmed in time"


class _Waiter:
    """What one waiter has heard. ``mark``: the number of the confirmation behind which all is news to it."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self.keys = keys
        self.mark = 0
        self.woken: dict[Key, bytes] = {}

    def ring(self) -> None:
        """There is something to look at."""
        raise NotImplementedError

    def take(self) -> dict[Key, bytes]:
        """Which keys woke since the last call, and what was said of each, b"" = nothing that counts."""
        woken, self.woken = self.woken, {}
        return woken


W = TypeVar("W", bound=_Waiter)


class _Ledger(Generic[W]):
    """Who watches which channel, and how many subscriptions were sent and confirmed.

    A server confirms them in the order in which they were sent, and in line with the messages; so their number tells
    what is behind which.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self.watchers: dict[str, set[W]] = {}
        self._sent = self._confirmed = 0
        #: the last of the subscriptions that were sent again after a break
        self._again, self._has_stood = 0, False

    def enter(self, waiter: W) -> list[str]:
        """The channels to subscribe to, also when others have: its own confirmation is its mark."""
        channels = [self._keys.done(key) for key in dict.fromkeys(waiter.keys)]
        for channel in channels:
            self.watchers.setdefault(channel, set()).add(waiter)
        self._sent += len(channels)
        waiter.mark = self._sent
        return channels

    def leave(self, waiter: W) -> list[str]:
        """The channels on which nobody listens any more."""
        idle = []
        for channel in [self._keys.done(key) for key in dict.fromkeys(waiter.keys)]:
            watchers = self.watchers.get(channel, set())
            watchers.discard(waiter)
            if not watchers and self.watchers.pop(channel, None) is not None:
                idle.append(channel)
        return idle

    def again(self) -> list[str]:
        """The channels to subscribe to on a new connection. What was not confirmed on the old one never is."""
        # one channel of ours that nothing is published on: SUBSCRIBE needs at least one
        channels = [self._keys.pubsub_prefix, *self.watchers]
        self._confirmed = self._sent
        for channel in channels:
            self._sent += 1
            for waiter in self.watchers.get(channel, ()):
                waiter.mark = self._sent
        self._again = self._sent if self._has_stood else 0
        self._has_stood = True
        return channels

    def stands(self, waiter: W) -> bool:
        return waiter.mark <= self._confirmed

    def hear(self, message: Sequence[Any]) -> None:
        """A message of the connection: whom it concerns, is rung for."""
        kind, channel, said = message[0], message[1].decode(), message[2]
        key = Key(channel.removeprefix(self._keys.pubsub_prefix))
        watchers = tuple(self.watchers.get(channel, ()))
        if kind == b"message":
            for waiter in watchers:
                waiter.woken[key] = said if self.stands(waiter) else b""
                waiter.ring()
        elif kind == b"subscribe":
            self._confirmed += 1
            for waiter in watchers:
                if self._confirmed <= self._again:
                    waiter.woken[key] = b""  # what ended during the break was not heard
                if waiter.woken or waiter.mark == self._confirmed:
                    waiter.ring()


class Watching(_Waiter):
    """One waiting thread, as a context manager. Made by ``Listener.watch``."""

    def __init__(self, keys: Sequence[Key], listener: Listener, is_sure: bool) -> None:
        super().__init__(keys)
        self._listener, self._is_sure = listener, is_sure
        #: on which it sleeps while another reads
        self.bell: threading.Condition | None = None

    def __enter__(self) -> Watching:
        self._listener.enter(self)
        if self._is_sure:
            try:
                self.confirm()
            except BaseException:
                self._listener.leave(self)
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.leave(self)

    def wait(self, timeout: float) -> dict[Key, bytes]:
        """Sleep until a watched key wakes, at most ``timeout`` seconds. Which woke since the last call, and what was
        said.
        """
        self._listener.until(self, lambda: bool(self.woken), timeout)
        return self.take()

    def confirm(self) -> None:
        """Sleep until the subscription stands. Raises redis TimeoutError when it does not in time."""
        self._listener.confirm(self)

    def ring(self) -> None:
        if self.bell is not None:
            self.bell.notify()


class Listener:
    """The subscription of this process. Of those who wait one reads it for all; who leaves passes that on.

    So a lone waiter is woken by the server itself, not by another thread, and nothing runs while nobody waits. After a
    fork the child begins anew.

    Not redis-py's PubSub: that connects again in whichever thread meets the error, and two that do so at once mix up
    their sockets. Here only who reads connects. Who watches only writes, and when the connection does not stand, who
    reads will ask for all that is watched by then.
    """

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._pool: Any = client.connection_pool
        self._keys = keys
        self._start_anew()
        _LISTENERS.add(self)

    def _start_anew(self) -> None:
        self._lock = threading.Lock()
        self._ledger: _Ledger[Watching] = _Ledger(self._keys)
        self._connection: Any = None
        self._has_heard = False
        #: somebody reads; those who sleep meanwhile; for who wants to know that nobody reads any more
        self._is_read = False
        self._asleep: set[Watching] = set()
        self._unread = threading.Condition(self._lock)
        self._closing = threading.Event()

    def watch(self, keys: Sequence[Key], is_sure: bool = True) -> Watching:
        """Hear of these keys; entered when the subscription stands, or at once when that need not be sure.

        Entering raises redis TimeoutError when it does not stand in time.
        """
        return Watching(keys, self, is_sure)

    def enter(self, watching: Watching) -> None:
        """It hears of its keys as soon as the subscription stands."""
        with self._lock:
            self._send("SUBSCRIBE", self._ledger.enter(watching))

    def leave(self, watching: Watching) -> None:
        """It hears nothing any more."""
        with self._lock:
            self._send("UNSUBSCRIBE", self._ledger.leave(watching))

    def close(self) -> None:
        """Give the connection back. Who still waits hears nothing more."""
        self._closing.set()
        with self._lock:
            end = None if self._connection is None else self._connection._sock
            if self._is_read and end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)  # ends the read
                self._unread.wait_for(lambda: not self._is_read, CONFIRM)
            if not self._is_read:
                self._drop()

    def confirm(self, watching: Watching) -> None:
        """Sleep until its subscription stands. Raises redis TimeoutError."""
        if not self.until(watching, lambda: self._ledger.stands(watching), CONFIRM):
            raise redis.exceptions.TimeoutError(UNCONFIRMED)

    def until(self, watching: Watching, is_there: Callable[[], bool], timeout: float) -> bool:
        """Sleep until it is there, at most ``timeout`` seconds. Whether it is."""
        deadline = time.monotonic() + timeout
        with self._lock:
            try:
                while not is_there() and (left := deadline - time.monotonic()) > 0:
                    if self._is_read or self._closing.is_set():
                        self._sleep(watching, left)
                    else:
                        self._read(left)
            finally:
                if not self._is_read and self._asleep:
                    next(iter(self._asleep)).ring()  # reads from now on
            return is_there()

    def _sleep(self, watching: Watching, timeout: float) -> None:
        watching.bell = threading.Condition(self._lock)
        self._asleep.add(watching)
        try:
            watching.bell.wait(timeout)
        finally:
            self._asleep.discard(watching)
            watching.bell = None

    def _read(self, timeout: float) -> None:
        """Hear one message for all. The lock is free meanwhile."""
        self._is_read = True
        self._lock.release()
        try:
            message = self._next(timeout)
        finally:
            self._lock.acquire()
            self._is_read = False
            self._unread.notify_all()
        if message is not None:
            self._ledger.hear(message)

    def _next(self, timeout: float) -> Any:
        """The next message within ``timeout`` seconds, or None."""
        try:
            message = _read(self._connection or self._connect(), timeout)
            self._has_heard = self._has_heard or message is not None
            return message
        except Exception as error:  # noqa: BLE001 -- it is not the fault of the waiter that reads, and the next look helps
            if not self._closing.is_set():
                log.warning("lost the wake-up connection: %s", error)
            with self._lock:
                self._drop()
            if not self._has_heard:
                self._closing.wait(min(RECONNECT, timeout))
            self._has_heard = False
            return None

    def _connect(self) -> Any:
        connection = self._pool.get_connection()
        with self._lock:
            self._connection = connection
            connection.send_command("SUBSCRIBE", *self._ledger.again(), check_health=False)
        return connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()
            self._pool.release(connection)

    def _send(self, verb: str, channels: Sequence[str]) -> None:
        """Write under the lock: what is watched and what the server was told never differ.

        Straight to the socket: redis-py's own send closes a connection that is broken, here under the reader's feet.
        The reader finds out by itself, connects again and asks for everything.
        """
        end = None if self._connection is None else self._connection._sock
        if channels and end is not None:
            try:
                end.sendall(b"".join(self._connection.pack_command(verb, *channels)))
            except OSError:
                # some of it may have gone, and would spoil what comes behind it
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


def _read(connection: Any, timeout: float) -> Any:
    """What a connection says next, within ``timeout`` seconds; or None. Raises RedisError, OSError."""
    end = connection._sock
    if isinstance(end, socket.socket):
        end.settimeout(timeout)  # redis-py's can_read asks the system three times
    elif not connection.can_read(timeout=timeout):
        return None  # fakeredis
    try:
        return connection.read_response(disconnect_on_error=False, push_request=True)
    except redis.exceptions.TimeoutError:
        return None


#: those of this process. A child has to begin anew before its first thread runs: who reads is not there, nor are the
#: locks of its parent free.
_LISTENERS: weakref.WeakSet[Listener] = weakref.WeakSet()


def _after_fork() -> None:
    for listener in tuple(_LISTENERS):
        listener._start_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class AsyncWatching(_Waiter):
    """One waiting coroutine. Made by ``AsyncListener.watch``."""

    def __init__(self, keys: Sequence[Key], ledger: _Ledger[AsyncWatching]) -> None:
        super().__init__(keys)
        self._ledger = ledger
        self._event = asyncio.Event()

    async def wait(self, timeout: float) -> dict[Key, bytes]:
        """Sleep until a watched key wakes, at most ``timeout`` seconds. Which woke since the last call, and what was
        said.
        """
        await self._until(lambda: bool(self.woken), timeout)
        return self.take()

    async def confirm(self) -> None:
        """Sleep until the subscription stands. Raises redis TimeoutError when it does not in time."""
        if not await self._until(lambda: self._ledger.stands(self), CONFIRM):
            raise redis.exceptions.TimeoutError(UNCONFIRMED)

    async def _until(self, is_there: Callable[[], bool], timeout: float) -> bool:
        """Sleep until it is there, at most ``timeout`` seconds. Whether it is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not is_there():
                    self._event.clear()
                    await self._event.wait()
        return is_there()

    def ring(self) -> None:
        self._event.set()


class AsyncListener:
    """The subscription of one event loop, read by one task.

    Not redis-py's PubSub: that connects again in whichever coroutine meets the error, and sends a PING of its own; two
    coroutines then read from one stream, which raises. Here the task alone connects and reads. Who watches only writes,
    and when the connection does not stand, the task will ask for all that is watched by then.
    """

    def __init__(self, client: redis.asyncio.Redis, keys: Keys) -> None:
        self._pool: Any = client.connection_pool
        self._ledger: _Ledger[AsyncWatching] = _Ledger(keys)
        self._connection: Any = None
        self._task: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def watch(self, keys: Sequence[Key], is_sure: bool = True) -> AsyncIterator[AsyncWatching]:
        """Hear of these keys; entered when the subscription stands, or at once when that need not be sure.

        Raises redis TimeoutError when it does not stand in time.
        """
        watching = AsyncWatching(keys, self._ledger)
        try:
            channels = self._ledger.enter(watching)
            if self._task is None:
                self._task = asyncio.create_task(self._read(), name="rqarm-listener")
            await self._send("SUBSCRIBE", channels)
            if is_sure:
                await watching.confirm()
            yield watching
        finally:
            await self._send("UNSUBSCRIBE", self._ledger.leave(watching))

    async def close(self) -> None:
        """Stop the task and give the connection back."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _send(self, verb: str, channels: Sequence[str]) -> None:
        """Write without a pause before it: what is watched and what the server was told never differ."""
        if channels and self._connection is not None and self._connection.is_connected:
            # the task meets the same error, connects again and asks for everything
            with cancellable(), contextlib.suppress(redis.exceptions.RedisError):
                await self._connection.send_command(verb, *channels, check_health=False)

    async def _read(self) -> None:
        while True:
            connection = None
            try:
                with cancellable():
                    connection = self._connection = await self._pool.get_connection()
                    await connection.send_command("SUBSCRIBE", *self._ledger.again(), check_health=False)
                while True:
                    message = await connection.read_response(timeout=READ, disconnect_on_error=False, push_request=True)
                    if message is not None:
                        self._ledger.hear(message)
            except Exception as error:  # noqa: BLE001 -- the only reader must not die, whatever breaks
                log.warning("lost the wake-up connection, trying again in %g s: %s", RECONNECT, error)
            finally:
                self._connection = None
                if connection is not None:
                    await connection.disconnect(nowait=True)
                    await self._pool.release(connection)
            await asyncio.sleep(RECONNECT)
