"""Time limits of handlers: an alarm for the main thread, the event loop's own for async handlers."""

from __future__ import annotations

import asyncio
import ctypes
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

from rq.timeouts import JobTimeoutException

T = TypeVar("T")

#: seconds by which the alarm comes after the limit of an async handler, which its event loop keeps better
ALARM_DELAY = 1.0
#: signal.signal without its search for the name of the handler that was there, which takes longer than all else here
_set_handler: Callable[[int, Any], Any] = import_module("_signal").signal


class TimeLimit(Exception):
    """The handler ran longer than its time limit."""

    def __init__(self, limit: float | str) -> None:
        super().__init__(limit if isinstance(limit, str) else f"the handler ran longer than its limit of {limit:g} s")


class Alarm:
    """A time limit for blocks in the main thread of a process where nobody else sets alarms: a horse of ours.

    Set ``limit`` before each. A handler may use SIGALRM for itself and leave it as it likes.
    """

    limit = 0.0

    def __enter__(self) -> None:
        _set_handler(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, max(self.limit, 0.001))

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, *_: object) -> None:
        raise TimeLimit(self.limit)


@contextmanager
def time_limit(limit: float, spent: float = 0.0) -> Iterator[None]:
    """Raise TimeLimit in the block after ``limit`` seconds, ``spent`` of them gone; RQ's alarm, if it is sooner, stays.

    Only the main thread of a POSIX process can be interrupted so. Elsewhere RQ's limit and the parent's remain.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    seconds = max(limit - spent, 0.001)
    outer, began = signal.getitimer(signal.ITIMER_REAL)[0], time.monotonic()
    if outer and outer <= seconds:
        with _as_time_limit():
            yield
        return

    def ring(*_: Any) -> None:
        raise TimeLimit(limit)

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - began), 0.001))


@contextmanager
def _as_time_limit() -> Iterator[None]:
    try:
        yield
    except JobTimeoutException as error:
        raise TimeLimit(str(error)) from error


def in_time(pieces: Iterator[T], limit: float, spent: Callable[[], float]) -> Iterator[T]:
    """The pieces of a handler's generator: what it does between them counts for its time limit."""
    while True:
        try:
            with time_limit(limit, spent()):
                piece = next(pieces)
        except StopIteration:
            return
        yield piece


async def await_in_time(handler: Awaitable[T], limit: float, spent: float) -> T:
    """The loop ends the handler at its limit: an alarm may strike another task of the loop, which would swallow it."""
    timeout = asyncio.timeout(limit - spent)
    try:
        async with timeout:
            return await handler
    except TimeoutError:
        if timeout.expired():
            raise TimeLimit(limit) from None
        raise


class _Interrupted(BaseException):
    """Raised in a thread from another one; never leaves Interruptible."""


class Interruptible:
    """A block that another thread can end, by an exception between two steps of Python: TimeLimit, or another one.

    What blocks in C hears it when that returns.
    """

    def __init__(self, limit: float) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._error: BaseException = TimeLimit(limit)
        self._is_interrupted = False

    def __enter__(self) -> None:
        with self._lock:
            self._thread = threading.get_ident()

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            with self._lock:
                self._thread = None
            while self._is_interrupted and kind is not _Interrupted:
                time.sleep(0.001)  # it is on its way
        except _Interrupted:
            raise self._error from error
        if kind is _Interrupted:
            raise self._error from None

    def interrupt(self, error: BaseException | None = None) -> None:
        """End the block, if it runs."""
        with self._lock:
            if self._thread is None or self._is_interrupted:
                return
            self._is_interrupted = True
            self._error = error or self._error
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(_Interrupted))
