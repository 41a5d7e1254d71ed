"""The pull interface: ``rm.queues``. For programs that fetch their own work instead of being run by an RQ worker."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from rqarm import flows, following, followups, packing, redirects
from rqarm.flows import Core
from rqarm.model import Key, Reason, State, Token
from rqarm.replies import Attempt
from rqarm.request import BatchRequest
from rqarm.shell import AsyncShell, Shell, same_docs


class _Held:
    """What is known of an execution that is held."""

    _attempt: Attempt

    @property
    def request(self) -> BatchRequest:
        return self._attempt.request

    @property
    def key(self) -> Key:
        return self._attempt.key

    @property
    def token(self) -> Token:
        """The fencing token of this attempt; it rises from attempt to attempt."""
        return self._attempt.token

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments that a retry changed."""
        return self._attempt.kwargs

    @property
    def attempt(self) -> int:
        """1 for the first."""
        return self._attempt.number

    @property
    def trace(self) -> str:
        """The W3C trace context of who submitted it, "traceparent" or "traceparent tracestate"; "" = none was sent."""
        return self._attempt.trace


class Lease(_Held):
    """One execution that is yours until you end it or fall silent for longer than the lease.

    As a context manager it fails the request when the block raises, and releases it when the block ends without a word.
    """

    def __init__(self, core: Core, shell: Shell, attempt: Attempt) -> None:
        self._core, self._shell, self._attempt = core, shell, attempt
        self._is_ended, self._emitted = False, 0

    def renew(self, fraction: float | None = None, message: str = "") -> None:
        """Keep the lease for another period; with a fraction (0 to 1), note the progress. Raises LeaseLost."""
        progress = None if fraction is None else (fraction, message)
        self._shell.run(flows.renew(self._core, self._attempt, progress))

    def emit(self, value: Any) -> None:
        """An intermediate response, for those who follow the request. A round trip; one at a time.

        Raises LeaseLost, UnpackableResult, EmissionTooLarge.
        """
        packed = following.pack_emission(value)
        self._emitted += 1
        self._shell.run(following.emit(self._core, self._attempt, self._emitted, packed))

    def finish(self, value: Any, *, ttl: float | None = None, sticky: bool = False) -> list[Any]:
        """Store the result and wake the waiters; the payloads of all who submitted the request, in no order.

        What a callback would do with them is yours to do. ``ttl`` in seconds counts when the request does not say.
        Raises LeaseLost; UnpackableResult and ResultTooLarge leave the lease as it is.
        """
        payloads = self._shell.run(followups.finish(self._core, self._attempt, value, sticky=sticky, ttl=ttl))
        self._is_ended = True
        return payloads

    def fail(
        self, error: BaseException | str, *, negative_ttl: float | None = None, quarantine: bool = False, **info: Any
    ) -> None:
        """End the request without a result; for ``negative_ttl`` seconds the error answers it.

        ``quarantine``: set it aside, with ``info``, until somebody requeues or discards it. Raises LeaseLost;
        UnpackableResult leaves the lease as it is.
        """
        self._shell.run(_failing(self._core, self._attempt, error, negative_ttl, quarantine, info))
        self._is_ended = True

    def retry(self, error: BaseException | str, *, delay: float = 0.0, **kwargs: Any) -> None:
        """Run the request again after ``delay`` seconds, with changed ``kwargs``.

        Raises LeaseLost; UnpackableResult leaves the lease as it is.
        """
        packed = _packed("Retry", error)
        self._shell.run(flows.retry(self._core, self._attempt, packed, delay=delay, kwargs=kwargs or None))
        self._is_ended = True

    def redirect(self, target: BatchRequest | str) -> State:
        """Let another request answer: this one becomes an alias of it. What it is now: pending, or as the target ended.

        Raises LeaseLost, InvalidRequest. RedirectLoop, Refused when the target's queue is full, AliasesFull: the lease
        stays.
        """
        state = self._shell.run(redirects.redirected(self._core, self._attempt, target))
        self._is_ended = True
        return state

    def release(self) -> None:
        """Hand it back unharmed: it is next in line and the attempt does not count. Raises LeaseLost."""
        self._shell.run(flows.release(self._core, self._attempt))
        self._is_ended = True

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self._is_ended:
            return
        if isinstance(error, Exception):
            self.fail(error)
        else:
            self.release()


class Queues:
    """Fetch work, one request at a time."""

    def __init__(self, core: Core, shell: Shell) -> None:
        self._core, self._shell = core, shell

    def next_request(self, timeout: float | None = 0, *, queue: str | None = None) -> Lease | None:
        """The next request of the queue, started, or None after ``timeout`` seconds (None = wait for ever).

        Whoever holds the lease must end or renew it within the lease time (15 s by default), else another gets it.
        """
        with _taking() as name:
            attempt = self._shell.run(flows.take(self._core, queue, name, timeout))
        return None if attempt is None else Lease(self._core, self._shell, attempt)

    def sweep(self, queue: str | None = None) -> int:
        """Set going again what died without a word, in one queue or in all; how many. Workers do it by themselves."""
        return self._shell.run(flows.sweep(self._core, queue))


def _packed(name: str, error: BaseException | str) -> bytes:
    return packing.pack_error(name, error, "") if isinstance(error, str) else packing.pack_error(error)


def _failing(
    core: Core,
    attempt: Attempt,
    error: BaseException | str,
    negative_ttl: float | None,
    quarantine: bool,
    info: dict[str, Any],
) -> flows.Flow[None]:
    packed, note, reason = _packed("Failed", error), b"", ""
    if quarantine:
        reason, note = Reason.ASKED, packing.pack_arguments({"kwargs": attempt.kwargs, "info": info})
    yield from flows.fail(core, attempt, packed, negative_ttl=negative_ttl, reason=reason, note=note)


def taker() -> str:
    """The name of this thread."""
    return f"{socket.gethostname()}.{os.getpid()}.{threading.get_native_id()}"


class _Asking(threading.local):
    """Which names of this thread ask for work at the moment."""

    def __init__(self) -> None:
        self.names: set[str] = set()


_asking = _Asking()


@contextmanager
def _taking() -> Iterator[str]:
    """A name under which nobody else takes work meanwhile.

    Coroutines of a thread ask at the same time. Under one name, a call that is sent again because its reply was lost
    would not find what it had started, once the next one has started something.
    """
    thread = taker()
    name = next(name for n in count() if (name := f"{thread}.{n}" if n else thread) not in _asking.names)
    _asking.names.add(name)
    try:
        yield name
    finally:
        _asking.names.discard(name)


@same_docs(Lease)
class AsyncLease(_Held):
    def __init__(self, core: Core, shell: AsyncShell, attempt: Attempt) -> None:
        self._core, self._shell, self._attempt = core, shell, attempt
        self._is_ended, self._emitted = False, 0

    async def renew(self, fraction: float | None = None, message: str = "") -> None:
        progress = None if fraction is None else (fraction, message)
        await self._shell.run(flows.renew(self._core, self._attempt, progress))

    async def emit(self, value: Any) -> None:
        packed = following.pack_emission(value)
        self._emitted += 1
        await self._shell.run(following.emit(self._core, self._attempt, self._emitted, packed))

    async def finish(self, value: Any, *, ttl: float | None = None, sticky: bool = False) -> list[Any]:
        payloads = await self._shell.run(followups.finish(self._core, self._attempt, value, sticky=sticky, ttl=ttl))
        self._is_ended = True
        return payloads

    async def fail(
        self, error: BaseException | str, *, negative_ttl: float | None = None, quarantine: bool = False, **info: Any
    ) -> None:
        await self._shell.run(_failing(self._core, self._attempt, error, negative_ttl, quarantine, info))
        self._is_ended = True

    async def retry(self, error: BaseException | str, *, delay: float = 0.0, **kwargs: Any) -> None:
        packed = _packed("Retry", error)
        await self._shell.run(flows.retry(self._core, self._attempt, packed, delay=delay, kwargs=kwargs or None))
        self._is_ended = True

    async def redirect(self, target: BatchRequest | str) -> State:
        state = await self._shell.run(redirects.redirected(self._core, self._attempt, target))
        self._is_ended = True
        return state

    async def release(self) -> None:
        await self._shell.run(flows.release(self._core, self._attempt))
        self._is_ended = True

    async def __aenter__(self) -> AsyncLease:
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self._is_ended:
            return
        if isinstance(error, Exception):
            await self.fail(error)
        else:
            await self.release()


@same_docs(Queues)
class AsyncQueues:
    def __init__(self, core: Core, shell: AsyncShell) -> None:
        self._core, self._shell = core, shell

    async def next_request(self, timeout: float | None = 0, *, queue: str | None = None) -> AsyncLease | None:
        with _taking() as name:
            attempt = await self._shell.run(flows.take(self._core, queue, name, timeout))
        return None if attempt is None else AsyncLease(self._core, self._shell, attempt)

    async def sweep(self, queue: str | None = None) -> int:
        return await self._shell.run(flows.sweep(self._core, queue))
