"""What every contender's script shares. Standard library only: it runs in the contenders' own environments.

A script is called by benchmarks/worker.py with one word and answers in JSON on its last line of stdout:

    enqueue N       put N no-op jobs in the queue; the ids of some of them, from the front of the queue
    worker          become the worker
    latency N WARM  submit a job and wait for its result, N times behind WARM that do not count: the seconds of each
    check ID...     how many of these jobs have the right result in Redis, and what went wrong with the last other one

BENCH_URL is the server, BENCH_MARKS the file of job().
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

URL = os.environ.get("BENCH_URL", "")
SOCKET = URL.removeprefix("unix://")
#: what every job returns: small and constant, so that stored bytes are the queue's own
VALUE = 1
#: jobs whose results are looked at
SAMPLE = 50
#: seconds until a job that does not end counts as lost
PATIENCE = 20

_MARK = struct.Struct("d")
_marks = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) if (path := os.environ.get("BENCH_MARKS")) else -1


def job() -> int:
    """The job of every contender. It notes when it ran in a file: no poll, no Redis, and a fork may do it too.

    One write of 8 bytes, 1 to 2 us, the same for all.
    """
    if _marks >= 0:
        os.write(_marks, _MARK.pack(time.monotonic()))
    return VALUE


class Verdict:
    """Counts right results. Each library has an error of its own for one that is not there (yet)."""

    def __init__(self) -> None:
        self.right, self.why = 0, ""

    def look(self, value: object) -> None:
        if value == VALUE:
            self.right += 1
        else:
            self.why = f"{value!r} instead of {VALUE}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception):
            self.why = f"{type(error).__name__}: {error}"
            return True
        return False

    def say(self) -> None:
        _say({"right": self.right, "why": self.why})


def sample(ids: list[str]) -> list[str]:
    return ids[:SAMPLE]


def play(
    enqueue: Callable[[int], list[str]],
    worker: Callable[[], Any],
    submit_and_wait: Callable[[], Any],
    right: Callable[[str], Any],
) -> None:
    """Do what the command line says, for a blocking client."""
    word, arguments = sys.argv[1], sys.argv[2:]
    if word == "worker":
        worker()
    elif word == "enqueue":
        _say(sample(enqueue(int(arguments[0]))))
    elif word == "check":
        verdict = Verdict()
        for name in arguments:
            with verdict:
                verdict.look(right(name))
        verdict.say()
    elif word == "latency":
        count, warm = map(int, arguments)
        taken = []
        for _ in range(warm + count):
            began = time.perf_counter()
            value = submit_and_wait()
            taken.append(time.perf_counter() - began)
            assert value == VALUE, value
        _say(taken[warm:])


async def play_async(
    enqueue: Callable[[int], Awaitable[list[str]]],
    submit_and_wait: Callable[[], Awaitable[Any]],
    right: Callable[[str], Awaitable[Any]],
) -> None:
    """The same for an asyncio client. Its worker is started by the script, which knows its event loop."""
    word, arguments = sys.argv[1], sys.argv[2:]
    if word == "enqueue":
        _say(sample(await enqueue(int(arguments[0]))))
    elif word == "check":
        verdict = Verdict()
        for name in arguments:
            with verdict:
                verdict.look(await right(name))
        verdict.say()
    elif word == "latency":
        count, warm = map(int, arguments)
        taken = []
        for _ in range(warm + count):
            began = time.perf_counter()
            value = await asyncio.wait_for(submit_and_wait(), PATIENCE)
            taken.append(time.perf_counter() - began)
            assert value == VALUE, value
        _say(taken[warm:])


async def some_at_once(calls: list[Callable[[], Awaitable[Any]]], width: int = 20) -> list[Any]:
    """Enqueue with a few connections: what is measured is not the enqueueing."""
    answers: list[Any] = []
    for start in range(0, len(calls), width):
        answers += await asyncio.gather(*(call() for call in calls[start : start + width]))
    return answers


def is_worker() -> bool:
    return sys.argv[1:2] == ["worker"]


def _say(answer: Any) -> None:
    print(json.dumps(answer), flush=True)
