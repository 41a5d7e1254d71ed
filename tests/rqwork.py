"""Ordinary RQ jobs for worker processes in tests, one for each way in which a job can go."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import rq
from redis import Redis
from rq.job import Job


def add(a: int, b: int) -> int:
    return a + b


def fail(what: str) -> None:
    raise ValueError(f"no {what}")


def fail_first(times: int) -> int:
    """Fails as often as it is told, and counts in Redis."""
    job = rq.get_current_job()
    assert job is not None
    count = int(job.connection.incr(f"count:{job.id}"))
    if count <= times:
        raise ConnectionError(f"failure {count}")
    return count


def write_meta() -> None:
    job = rq.get_current_job()
    assert job is not None
    job.meta["written"] = [1, 2]
    job.save_meta()


def not_json() -> object:
    return {1, 2}


def over_time() -> None:
    threading.Event().wait(60)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(code: int) -> None:
    os._exit(code)


def enqueue_another(job_id: str) -> None:
    job = rq.get_current_job()
    assert job is not None
    rq.Queue("second", connection=job.connection, serializer=job.serializer).enqueue(add, 5, 6, job_id=job_id)


def on_success(job: Job, connection: Redis, result: Any) -> None:
    connection.rpush("called", f"success of {job.id}: {result}")


def on_failure(job: Job, connection: Redis, kind: type, value: BaseException, traceback: Any) -> None:
    connection.rpush("called", f"failure of {job.id}: {kind.__name__}: {value}")


def bad_callback(*_: Any) -> None:
    raise KeyError("in the callback")


def handle_exception(job: Job, *error: Any) -> bool:
    """A custom exception handler; for some jobs RQ's own does not come after it."""
    job.connection.rpush("handled", f"{job.id}: {error[1]}")
    return job.id != "swallowed"
