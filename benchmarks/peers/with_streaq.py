"""streaQ.

* concurrency 32, with as many prefetched: what streaQ's own benchmark uses; 100 was no faster.
* uvloop through anyio's option.
* enqueue_many for the pile.
* The latency polls the result's key without a pause. Task.result waits on PUB/SUB, but to close the
  subscription takes coredis' time-out of 100 ms (streaQ 7.2, coredis 6.9): p50 would be 104 ms.
"""

from __future__ import annotations

import asyncio
import logging

import part
import uvloop
from streaq import Worker

worker = Worker(redis_url=part.URL, concurrency=32, anyio_kwargs={"use_uvloop": True})


@worker.task(name="noop")
async def noop() -> int:
    return part.job()


async def main() -> None:
    async with worker:

        async def enqueue(count: int) -> list[str]:
            ids = []
            for start in range(0, count, 500):
                tasks = [noop.enqueue() for _ in range(min(500, count - start))]
                await worker.enqueue_many(tasks)
                ids += [task.id for task in tasks]
            return ids

        async def submit_and_wait() -> object:
            task = await noop.enqueue()
            while not (packed := await worker.redis.get(worker.results_key + task.id)):
                await asyncio.sleep(0)
            return (await worker.deserialize(packed))["r"]

        async def right(name: str) -> object:
            return (await worker.result_by_id(name, 1)).result

        await part.play_async(enqueue, submit_and_wait, right)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    if part.is_worker():
        worker.run_sync()
    else:
        uvloop.run(main())
