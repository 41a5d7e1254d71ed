"""Handlers that emit, look up and hold resources, for worker processes in tests (RQARM_HANDLERS)."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import app
from app import note, notes, wait_for

import rqarm
from rqarm import BatchRequest, Context, Handlers, Retry

handlers = Handlers()


def noted(name: str, text: object) -> None:
    """Add a line to a file of notes."""
    with (notes / name).open("a") as log:
        log.write(f"{text}\n")


def step(context: Context, name: str, n: int) -> None:
    """Emit, and go on when the test says so."""
    context.emit([context.attempt, n])
    wait_for(f"go-{name}-{context.attempt}-{n}")


@handlers.route("/steps/{name}/{count:int}")
def steps(request: BatchRequest, context: Context, name: str, count: int) -> str:
    note(f"horse-{os.getpid()}", context.worker)
    note(f"running-{name}-{context.attempt}", os.getpid())
    for n in range(count):
        step(context, name, n)
    return f"{name} {context.attempt}"


@handlers.route("/retried/{name}", retry=Retry(max=1))
def retried(request: BatchRequest, context: Context, name: str) -> int:
    step(context, name, 0)
    if context.attempt == 1:
        raise ConnectionError("not yet")
    return context.attempt


@handlers.route("/failing/{name}")
def failing(request: BatchRequest, context: Context, name: str) -> None:
    context.emit("before it failed")
    raise ValueError(name)


@handlers.route("/many/{count:int}", thread_safe=True)
def many(request: BatchRequest, context: Context, count: int) -> int:
    for n in range(count):
        context.emit(n)
    return count


@handlers.route("/async-many/{count:int}")
async def async_many(request: BatchRequest, context: Context, count: int) -> int:
    """The loop turns while the emissions go out."""
    turns = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    for n in range(count):
        context.emit(n)
        if n % 10 == 0:
            await asyncio.sleep(0)
    context.emit("last")
    ticking.cancel()
    return turns


@handlers.route("/async-mixed/{count:int}")
async def async_mixed(request: BatchRequest, context: Context, count: int) -> None:
    """On the loop and in a thread beside it, one after the other."""
    for n in range(0, count, 2):
        context.emit(n)
        await asyncio.to_thread(context.emit, n + 1)


@handlers.route("/async-failing")
async def async_failing(request: BatchRequest, context: Context) -> None:
    context.emit("before it failed")
    raise ValueError("x")


@handlers.route("/refused/{what}")
def refused(request: BatchRequest, context: Context, what: str) -> str:
    value: Any = object() if what == "unpackable" else b"x" * (2 << 20)
    try:
        context.emit(value)
    except rqarm.RqarmError as error:
        return f"{type(error).__name__}: {error}"
    return "it was taken"


# -- look-ups


@handlers.route("/found/{n:int}")
def found(request: BatchRequest, context: Context, n: int, other: str = "") -> str:
    return f"computed {n}"


@found.lookup
def find(request: BatchRequest, context: Context, n: int, other: str = "") -> Any:
    if other == "error":
        raise KeyError("the archive is closed")
    return None if n == 0 else f"found {n}{other}" if n % 2 else rqarm.MISS


@handlers.route("/found-later/{n:int}", thread_safe=True)
def found_later(request: BatchRequest, context: Context, n: int) -> tuple[str, bool]:
    return f"computed {n}", threading.current_thread() is threading.main_thread()


@found_later.lookup
async def find_later(request: BatchRequest, context: Context, n: int) -> Any:
    await asyncio.sleep(0)
    return f"found {n} with {context.resources.archive}" if n % 2 else rqarm.MISS


@handlers.route("/async-found/{n:int}", timeout=1.0)
async def async_found(request: BatchRequest, context: Context, n: int) -> str:
    return f"computed {n}"


@async_found.lookup
async def async_find(request: BatchRequest, context: Context, n: int) -> Any:
    if n == 99:
        await asyncio.sleep(app.LONGEST)
    return f"found {n}" if n % 2 else rqarm.MISS


# -- resources


@handlers.resource("db")
def open_db() -> Iterator[int]:
    """Cannot be opened as long as the test says so."""
    if (notes / "db-is-down").exists():
        noted("db", "refused")
        raise ConnectionRefusedError("the database is down")
    noted("db", f"up {os.getpid()}")
    yield os.getpid()
    noted("db", f"down {os.getpid()}")


@handlers.resource("torn")
def torn() -> Iterator[int]:
    yield os.getpid()
    raise OSError("the other side is gone")


@handlers.resource("archive")
async def archive() -> AsyncIterator[str]:
    noted("archive", f"up {os.getpid()}")
    yield "the archive"
    noted("archive", f"down {os.getpid()}")


@handlers.route("/db/{n}", thread_safe=True)
def use_db(request: BatchRequest, context: Context, n: str) -> int:
    return int(context.resources.db)


@handlers.route("/torn/{n}")
def use_torn(request: BatchRequest, context: Context, n: str) -> int:
    return int(context.resources.db) + 0 * int(context.resources.torn)


@handlers.route("/kill-me")
def kill_me(request: BatchRequest, context: Context) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


handlers.include(app.handlers)
