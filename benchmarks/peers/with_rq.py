"""RQ: rq.Worker, or rq.SimpleWorker when BENCH_OPTIONS says so.

* The worker is started by a script that has imported the jobs: RQ's documentation ("Performance notes") recommends it,
  because else every fork imports them anew.
* RQ's default serializer (pickle) and result TTL: results are retrievable.
* latest_result(timeout=...) blocks on the result's stream (XREAD), the only way of RQ that does not poll.
* Logging at WARNING: RQ writes three lines for each job else.
"""

from __future__ import annotations

import os

import part
import redis
import rq
from rq.job import Job

connection = redis.from_url(part.URL)
queue = rq.Queue("bench", connection=connection)


def enqueue(count: int) -> list[str]:
    jobs = [rq.Queue.prepare_data(part.job) for _ in range(count)]
    return [job.id for start in range(0, count, 500) for job in queue.enqueue_many(jobs[start : start + 500])]


def worker() -> None:
    kind = {"simple": rq.SimpleWorker, "": rq.Worker}[os.environ.get("BENCH_OPTIONS", "")]
    kind([queue], connection=connection).work(logging_level="WARNING")


def submit_and_wait() -> object:
    result = queue.enqueue(part.job).latest_result(timeout=part.PATIENCE)
    return None if result is None else result.return_value


def right(name: str) -> object:
    return Job.fetch(name, connection=connection).return_value()


if __name__ == "__main__":
    part.play(enqueue, worker, submit_and_wait, right)
