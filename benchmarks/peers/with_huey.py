"""Huey on Redis.

* notify_result=True: the option for "low-latency result fetching" (release notes of 3.0); else a waiter polls.
* blocking=True (default): workers wait in BRPOP.
* 4 threads in one process (`-w 4 -k thread`): threads overlap their round trips. 1, 4 and 8 were tried.
* No periodic tasks (`-n`), no health checks (`-C`): less beside the tasks.
"""

from __future__ import annotations

import logging

import part
from huey import RedisHuey

huey = RedisHuey("bench", url=part.URL, notify_result=True, blocking=True)


@huey.task()
def noop() -> int:
    return part.job()


def enqueue(count: int) -> list[str]:
    return [noop().id for _ in range(count)]


def worker() -> None:
    logging.basicConfig(level=logging.WARNING)
    huey.create_consumer(workers=4, worker_type="thread", periodic=False, check_worker_health=False).run()


if __name__ == "__main__":
    part.play(
        enqueue,
        worker,
        lambda: noop().get(blocking=True, timeout=part.PATIENCE),
        lambda name: huey.result(name, preserve=True),
    )
