"""Celery with Redis as broker and result backend.

* `-P solo`: one process without pipes to children. prefork with one child and threads were tried and are slower.
* worker_prefetch_multiplier 128: Celery's guide ("Optimizing") names 64 or 128 for many short tasks.
* --without-gossip --without-mingle --without-heartbeat: no chatter between workers.
* acks early, the default; results on PUB/SUB, which AsyncResult.get uses by itself.
"""

from __future__ import annotations

import os
import sys

import part
from celery import Celery
from celery.result import AsyncResult

url = f"redis+socket://{part.SOCKET}"
app = Celery("with_celery", broker=url, backend=url)
app.conf.update(worker_prefetch_multiplier=128, task_default_queue="bench", broker_connection_retry_on_startup=True)


@app.task(name="noop")
def noop() -> int:
    return part.job()


def enqueue(count: int) -> list[str]:
    return [noop.delay().id for _ in range(count)]


def worker() -> None:
    os.chdir(os.path.dirname(__file__))
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING"]
    command = [sys.executable, "-m", "celery", "-A", "with_celery", "worker", "-P", "solo", "-c", "1", *quiet]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    part.play(
        enqueue,
        worker,
        lambda: noop.delay().get(timeout=part.PATIENCE),
        lambda name: AsyncResult(name, app=app).get(timeout=1),
    )
