"""Taskiq with taskiq-redis: RedisStreamBroker, or ListQueueBroker when BENCH_OPTIONS says so.

* The stream is the broker of taskiq-redis' first example; the list takes no acknowledgement, so a task dies with its
  worker, and is faster. Both are here.
* One worker process, --max-async-tasks 32 --max-prefetch 32: streaQ's published comparison runs Taskiq so.
* --no-parse: nothing to parse, and one step less for each task; uvloop is used because it is installed.
* consumer_id 0: the jobs are there before the worker and its consumer group.
* wait_result can only poll; 200 ms by default, 1 ms here; 0 was no faster.
"""

from __future__ import annotations

import logging
import os
import sys

import part
import uvloop
from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend, RedisStreamBroker

if os.environ.get("BENCH_OPTIONS") == "list":
    broker = ListQueueBroker(part.URL)
else:
    broker = RedisStreamBroker(part.URL, consumer_id="0")
broker = broker.with_result_backend(RedisAsyncResultBackend(part.URL, result_ex_time=3600))


@broker.task(task_name="noop")
async def noop() -> int:
    return part.job()


async def main() -> None:
    await broker.startup()

    async def kick() -> str:
        return (await noop.kiq()).task_id

    async def enqueue(count: int) -> list[str]:
        return await part.some_at_once([kick] * count)

    async def submit_and_wait() -> object:
        task = await noop.kiq()
        return (await task.wait_result(check_interval=0.001, timeout=part.PATIENCE)).return_value

    async def right(name: str) -> object:
        return (await broker.result_backend.get_result(name)).return_value

    await part.play_async(enqueue, submit_and_wait, right)
    await broker.shutdown()


def worker() -> None:
    os.chdir(os.path.dirname(__file__))
    options = ["--workers", "1", "--max-async-tasks", "32", "--max-prefetch", "32", "--no-parse"]
    command = [sys.executable, "-m", "taskiq", "worker", "with_taskiq:broker", "--log-level", "WARNING", *options]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    if part.is_worker():
        worker()
    else:
        uvloop.run(main())
