"""Dramatiq on Redis with the Results middleware.

* One process (`-p 1`) with the default 8 threads.
* The Redis result backend, which Dramatiq's documentation recommends: a waiter blocks on a list.
* Prefetch stays at its default, two messages for each thread.
* dramatiq_worker_timeout=1: the consumer polls and waits longer and longer, 5 ms at first; so it waits 1 ms at most.
"""

from __future__ import annotations

import os
import sys

import dramatiq
import part
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

broker = RedisBroker(url=part.URL)
broker.add_middleware(Results(backend=RedisBackend(url=part.URL), store_results=True))
dramatiq.set_broker(broker)


@dramatiq.actor
def noop() -> int:
    return part.job()


def enqueue(count: int) -> list[str]:
    return [noop.send().message_id for _ in range(count)]


def worker() -> None:
    os.environ["dramatiq_worker_timeout"] = "1"  # noqa: SIM112 -- it is spelled so
    os.chdir(os.path.dirname(__file__))
    os.execv(sys.executable, [sys.executable, "-m", "dramatiq", "with_dramatiq", "-p", "1"])


def right(name: str) -> object:
    return noop.message().copy(message_id=name).get_result()


if __name__ == "__main__":
    part.play(
        enqueue,
        worker,
        lambda: noop.send().get_result(block=True, timeout=part.PATIENCE * 1000),
        right,
    )
