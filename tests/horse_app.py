"""Handlers for tests of the warm horse (RQARM_HANDLERS), beside those of app.py."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator

import app
from app import LONGEST, note, notes, wait_for

from rqarm import BatchRequest, Context, Handlers

handlers = Handlers()
_kept: list[bytearray] = []
_lock = threading.Lock()


def noted(name: str, word: str) -> None:
    """Add a word to a file; O_APPEND keeps those of many processes apart."""
    with (notes / name).open("a") as log:
        log.write(f"{word}\n")


def begun(context: Context, name: str) -> None:
    note(f"horse-{os.getpid()}", context.worker)
    note(f"running-{name}", os.getpid())


# -- the process


@handlers.resource("once")
def once() -> Iterator[int]:
    noted("built", str(os.getpid()))
    yield os.getpid()
    noted("torn-down", str(os.getpid()))


@handlers.resource("pool")
async def pool() -> AsyncIterator[int]:
    noted("async-built", str(os.getpid()))
    yield os.getpid()
    noted("async-torn-down", str(os.getpid()))


@handlers.route("/with/{n}")
def with_resource(request: BatchRequest, context: Context, n: str) -> int:
    return int(context.resources.once)


@handlers.route("/keep/{mib:int}/{n}")
def keep(request: BatchRequest, context: Context, mib: int, n: str) -> int:
    """Keeps memory for as long as the process lives."""
    _kept.append(bytearray(mib << 20))
    _kept[-1][::4096] = b"x" * len(_kept[-1][::4096])
    return os.getpid()


@handlers.route("/last-words/{how}")
def last_words(request: BatchRequest, context: Context, how: str) -> None:
    print(f"printed before {how}")
    print(f"complained before {how}", file=sys.stderr)
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)


@handlers.route("/surrogate")
def surrogate(request: BatchRequest, context: Context) -> None:
    raise ValueError("of \udc80")


def log_error(job: object, kind: type, error: BaseException, trace: object) -> bool:
    """RQ's way to be told of failures: ``--exception-handler``."""
    noted("handled", f"{kind.__name__} {error}")
    return True


@handlers.route("/order/{name}")
def order(request: BatchRequest, context: Context, name: str) -> None:
    noted("order", name)


def plain_order(name: str) -> None:
    """An ordinary RQ job."""
    noted("order", name)


@handlers.route("/orphan/{name}")
def orphan(request: BatchRequest, context: Context, name: str) -> int:
    """See orphan_worker.py."""
    return context.attempt


# -- many at a time


async def together(kind: str, name: str, count: int) -> None:
    """Until ``count`` of a kind have come here."""
    note(f"{kind}-{name}", os.getpid())
    while len(list(notes.glob(f"{kind}-*"))) < count:
        await asyncio.sleep(0.01)


@handlers.route("/async-barrier/{count:int}/{name}", timeout=LONGEST)
async def async_barrier(request: BatchRequest, context: Context, count: int, name: str) -> int:
    await together("async-barrier", name, count)
    return os.getpid()


@handlers.route("/barrier/{count:int}/{name}", thread_safe=True, timeout=LONGEST)
def barrier(request: BatchRequest, context: Context, count: int, name: str) -> int:
    note(f"barrier-{name}", os.getpid())
    while len(list(notes.glob("barrier-*"))) < count:
        time.sleep(0.01)
    return threading.get_ident()


@handlers.route("/async-wait/{name}")
async def async_wait(request: BatchRequest, context: Context, name: str) -> str:
    begun(context, name)
    try:
        while not (notes / f"go-{name}").exists():
            await asyncio.sleep(0.01)
    except asyncio.CancelledError:
        note(f"cancelled-{name}", context.cancelled)
        raise
    return f"{name} {context.attempt}"


@handlers.route("/thread-wait/{name}", thread_safe=True)
def thread_wait(request: BatchRequest, context: Context, name: str) -> str:
    begun(context, name)
    try:
        wait_for(f"go-{name}")
    except BaseException as error:
        note(f"interrupted-{name}", type(error).__name__)
        raise
    return f"{name} {context.attempt}"


@handlers.route("/async-slow/{name}", timeout=0.5)
async def async_slow(request: BatchRequest, context: Context, name: str) -> None:
    await asyncio.sleep(LONGEST)


@handlers.route("/thread-slow/{name}", timeout=0.5, thread_safe=True)
def thread_slow(request: BatchRequest, context: Context, name: str) -> None:
    while True:
        time.sleep(0.01)


@handlers.route("/one-at-a-time/{name}", timeout=1.5)
def one_at_a_time(request: BatchRequest, context: Context, name: str) -> str:
    assert _lock.acquire(blocking=False), "another one runs beside"
    try:
        noted("one-at-a-time", f"+{name}")
        time.sleep(1.0)
        noted("one-at-a-time", f"-{name}")
    finally:
        _lock.release()
    return name


@handlers.route("/thread-deaf/{name}", timeout=0.5, thread_safe=True)
def thread_deaf(request: BatchRequest, context: Context, name: str) -> None:
    """Hangs in C: no exception gets there."""
    begun(context, name)
    ctypes.CDLL(None).sleep(int(LONGEST))


@handlers.route("/async-busy/{name}", timeout=0.5)
async def async_busy(request: BatchRequest, context: Context, name: str) -> None:
    """Blocks the event loop in C, which nothing on it can end."""
    begun(context, name)
    ctypes.CDLL(None).sleep(int(LONGEST))


@handlers.route("/segfault/{name}", thread_safe=True)
def segfault(request: BatchRequest, context: Context, name: str) -> int:
    """Kills the whole process at its first attempt."""
    if context.attempt > 1:
        return context.attempt
    wait_for(f"go-{name}")
    ctypes.string_at(0)
    return 0


@handlers.route("/async-with/{n}")
async def async_with(request: BatchRequest, context: Context, n: str) -> int:
    return int(context.resources.pool)


@handlers.route("/async-progress/{name}")
async def async_progress(request: BatchRequest, context: Context, name: str) -> None:
    context.progress(0.5, "half of it")
    while not (notes / f"go-{name}").exists():
        await asyncio.sleep(0.01)


@handlers.route("/async-fail/{n}")
async def async_fail(request: BatchRequest, context: Context, n: str) -> None:
    raise ValueError(f"no {n}")


@handlers.route("/async-pid/{n}")
async def async_pid(request: BatchRequest, context: Context, n: str) -> int:
    return os.getpid()


@handlers.route("/pair/{n:int}")
async def pair(request: BatchRequest, context: Context, n: int) -> int:
    """All that run at a time end at the same turn of the loop."""
    await asyncio.sleep(0.05)
    return n


handlers.include(app.handlers)
