"""Handlers with callbacks for worker processes in tests (RQARM_HANDLERS). What each is told is a line of a note."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

from app import note, notes, wait_for

from rqarm import BatchRequest, Context, Handlers, Retry

handlers = Handlers()


def tell(name: str, **what: Any) -> None:
    with (notes / f"told-{name}").open("a") as log:
        log.write(json.dumps(what) + "\n")


@handlers.route("/report/{name}", ttl=1.0)
def report(request: BatchRequest, context: Context, name: str) -> str:
    if name.startswith("wait"):
        note(f"horse-{os.getpid()}", context.worker)
        note(f"running-{name}", os.getpid())
        wait_for(f"go-{name}")
    return f"report {name}"


@report.callback(retry=Retry(max=2))
def report_ready(result: str, payloads: list[Any], context: Context) -> None:
    name = result.removeprefix("report ")
    tell(name, result=result, payloads=sorted(payloads), attempt=context.attempt)
    if name.startswith("kill") and context.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("stumble") and context.attempt < 3:
        raise ConnectionError("not yet")


@handlers.route("/large/{name}", ttl=1.0)
def large(request: BatchRequest, context: Context, name: str) -> bytes:
    return os.urandom(3 << 20)


@large.callback
async def large_ready(result: bytes, payloads: list[Any], context: Context) -> None:
    await asyncio.sleep(0.01)
    tell(context.request.uri.rpartition("/")[2], result=len(result), payloads=payloads)


@handlers.route("/bad/{name}")
def bad(request: BatchRequest, context: Context, name: str) -> None:
    raise ValueError(f"no {name}")


@bad.on_failure
def bad_failed(error: dict[str, str], payloads: list[Any], context: Context) -> None:
    tell(error["message"].removeprefix("no "), error=error["type"], payloads=payloads)


@handlers.route("/die/{name}")
def die(request: BatchRequest, context: Context, name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@die.on_failure
def die_failed(error: dict[str, str], payloads: list[Any], context: Context) -> None:
    tell(context.request.uri.rpartition("/")[2], error=error["type"], payloads=payloads)


@handlers.route("/late/{name}", timeout=0.3)
def late(request: BatchRequest, context: Context, name: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))  # no alarm wakes it
    wait_for(f"never-{name}")


@late.on_failure
def late_failed(error: dict[str, str], payloads: list[Any], context: Context) -> None:
    tell(context.request.uri.rpartition("/")[2], error=error["type"].rpartition(".")[2], payloads=payloads)


@handlers.quarantine
def set_aside(entry: Any, context: Context) -> None:
    tell("quarantine", uri=context.request.uri, key=context.key)
