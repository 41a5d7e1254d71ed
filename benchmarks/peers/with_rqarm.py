"""rqarm, as its documentation tells: handlers, `rqarm worker`, `RequestManager.get`.

Nothing is tuned. allow_volatile is set by the benchmark because its throwaway server keeps no file, for nobody.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time

import part

from rqarm import Context, Handlers, RequestManager
from rqarm.request import BatchRequest

handlers = Handlers()


@handlers.route("/noop/{n}")
def noop(request: BatchRequest, context: Context, n: str) -> int:
    return part.job()


@handlers.route("/nap/{n:path}")
async def nap(request: BatchRequest, context: Context, n: str) -> int:
    """For --async: the marks are the starts."""
    part.job()
    await asyncio.sleep(0.1)
    return part.VALUE


def worker() -> None:
    more = os.environ.get("BENCH_OPTIONS", "").split()
    arguments = ["worker", "--handlers", "with_rqarm:handlers", *more]
    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    os.execv(sys.executable, [sys.executable, "-m", "rqarm.cli", *arguments])


def main() -> None:
    if part.is_worker():
        worker()
    with RequestManager(part.URL) as manager:
        numbers = itertools.count(time.time_ns())  # distinct requests, or the cache would answer

        def enqueue(count: int) -> list[str]:
            statuses = manager.submit_many(f"/noop/{next(numbers)}" for _ in range(count))
            return [status.key for status in statuses]

        part.play(
            enqueue,
            worker,
            lambda: manager.get(f"/noop/{next(numbers)}", timeout=part.PATIENCE),
            manager.result,
        )


if __name__ == "__main__":
    main()
