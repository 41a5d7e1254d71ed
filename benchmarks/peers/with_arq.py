"""ARQ, tuned: its defaults look for new jobs twice a second.

* poll_delay 1 ms in the worker and in Job.result: ARQ can only poll. 500 ms are the defaults; 0 was no faster.
* max_jobs 300 (default 10) and so 1,500 ids a look; 32, 100 and 300 were tried.
* log_results False and logging at WARNING; uvloop, which ARQ does not install by itself.
"""

from __future__ import annotations

import logging

import part
import uvloop
from arq import create_pool
from arq.connections import RedisSettings
from arq.jobs import Job
from arq.worker import Worker, func


async def noop(context: object) -> int:
    return part.job()


async def work() -> None:
    worker = Worker(
        [func(noop, name="noop")],
        redis_settings=RedisSettings.from_dsn(part.URL),
        poll_delay=0.001,
        max_jobs=300,
        log_results=False,
        handle_signals=False,
    )
    await worker.async_run()


async def main() -> None:
    pool = await create_pool(RedisSettings.from_dsn(part.URL))

    async def enqueue(count: int) -> list[str]:
        jobs = await part.some_at_once([lambda: pool.enqueue_job("noop")] * count)
        return [job.job_id for job in jobs]

    async def submit_and_wait() -> object:
        job = await pool.enqueue_job("noop")
        return await job.result(timeout=part.PATIENCE, poll_delay=0.001)

    async def right(name: str) -> object:
        return await Job(name, pool).result(timeout=1)

    await part.play_async(enqueue, submit_and_wait, right)
    await pool.aclose()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    uvloop.run(work() if part.is_worker() else main())
