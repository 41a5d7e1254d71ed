"""What a request takes in Redis: bytes while it waits and bytes when it is done, by kind of key, on each server.

    python benchmarks/memory.py [--requests 4000] [--server /usr/bin/redis-server ...]

The total is what the server says it uses (``used_memory``) with the requests, less what it used without, divided by
their number; the rows are ``MEMORY USAGE`` of all keys of a kind. The difference is the server's own table of keys and
what the allocator rounds up. Servers run with their defaults. The result of a finished request is seven bytes.
"""

from __future__ import annotations

import argparse
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import redis
import rq
from rq.serializers import JSONSerializer

from rqarm import BatchRequest, RequestManager, embedded

#: 70 characters, as a data API has them
URI = "https://api.example.org/v1/cities/{n:04x}?min_population=100000&format=csv"
#: more events than are kept, so that the stream does not grow during the measurement
EVENTS = 12_000
RESULT = "result"

Counted = tuple[float, dict[str, float]]


def request(n: int) -> BatchRequest:
    return BatchRequest(URI.format(n=n))


def pending(manager: RequestManager, n: int) -> None:
    for i in range(n):
        manager.submit(request(i))


def finished(manager: RequestManager, n: int, result: str = RESULT) -> None:
    """Through the pull interface, in turns, so that the line is never long."""
    for i in range(n):
        manager.submit(request(i))
        lease = manager.queues.next_request()
        assert lease is not None
        lease.finish(result)


def finished_with_1000_bytes(manager: RequestManager, n: int) -> None:
    finished(manager, n, secrets.token_urlsafe(750))


def rq_pending(manager: RequestManager, n: int) -> None:
    queue = rq.Queue("rq-own", connection=manager.connection, serializer=JSONSerializer)
    for i in range(n):
        queue.enqueue("rqarm.worker.perform", "arm", request(i).key, description=request(i).uri, result_ttl=60)


def rq_finished(manager: RequestManager, n: int) -> None:
    """RQ's own job with its own result, by RQ's quickest worker; what it keeps for 500 s after each job."""
    queue = rq.Queue("rq-own", connection=manager.connection, serializer=JSONSerializer)
    for i in range(n):
        queue.enqueue("builtins.str", RESULT, description=request(i).uri)
    rq.SimpleWorker([queue], connection=manager.connection, serializer=JSONSerializer).work(
        burst=True, logging_level="ERROR"
    )


def measure(manager: RequestManager, put: Callable[[RequestManager, int], None], n: int) -> Counted:
    """Bytes for each request: of the server, and of the keys of each kind."""
    client = manager.connection
    client.flushall(asynchronous=False)
    put(manager, 50)  # scripts are loaded, buffers are as large as they get
    client.flushall(asynchronous=False)
    with client.pipeline(transaction=False) as pipeline:
        for i in range(EVENTS):
            fields = {"verb": "complete", "key": request(i).key, "state": "completed"}
            pipeline.xadd("arm:events", fields, maxlen=10_000, approximate=True)
        pipeline.execute()
    before = settled(client)
    put(manager, n)
    total = (settled(client) - before) / n
    return total, by_kind(client, n)


def settled(client: redis.Redis) -> int:
    """``used_memory`` when the server's tables have stopped to grow: rehashing goes on while it is idle."""
    last = -1
    while (used := int(client.info("memory")["used_memory"])) != last:
        last = used
        time.sleep(0.3)
    return used


def by_kind(client: redis.Redis, n: int) -> dict[str, float]:
    keys = [key for key in client.scan_iter(count=1000) if key != b"arm:events"]
    with client.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.memory_usage(key, samples=0)
            pipeline.object("ENCODING", key)
        answers = pipeline.execute()
    sums: Counter[str] = Counter()
    for key, used, encoding in zip(keys, answers[::2], answers[1::2], strict=True):
        sums[f"{':'.join(key.decode().split(':')[:2])} ({encoding.decode()})"] += used or 0
    return {kind: used / n for kind, used in sums.items() if used >= n}


def report(title: str, columns: dict[str, Counted]) -> None:
    print(f"\n{title:<40}" + "".join(f"{name:>16}" for name in columns))
    kinds = sorted({kind for _, kinds in columns.values() for kind in kinds})
    for kind in kinds:
        shown = [kinds.get(kind) for _, kinds in columns.values()]
        print(f"{kind:<40}" + "".join(f"{'-' if used is None else f'{used:.0f}':>16}" for used in shown))
    print(f"{'all keys':<40}" + "".join(f"{sum(kinds.values()):>16.0f}" for _, kinds in columns.values()))
    print(f"{'the server':<40}" + "".join(f"{total:>16.0f}" for total, _ in columns.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--server", action="append", help="a server program; default: all that are found")
    parser.add_argument("--rq", action="store_true", help="what RQ alone takes, as well")
    options = parser.parse_args()
    cases = {
        "pending": (pending, rq_pending),
        "finished": (finished, rq_finished),
        "finished with 1,000 bytes": (finished_with_1000_bytes, None),
    }
    tables: dict[str, dict[str, Counted]] = {title: {} for title in cases}
    for binary in options.server or embedded.binaries():
        with (
            tempfile.TemporaryDirectory(prefix="rqarm-", dir="/tmp") as directory,
            embedded.private(Path(directory), binary=binary) as server,
            RequestManager(server.url, allow_volatile=True) as manager,
        ):
            info = manager.connection.info("server")
            version = info.get("valkey_version") or info["redis_version"]
            name = f"{info.get('server_name', 'redis')} {version}"
            for title, (put, rq_put) in cases.items():
                tables[title][name] = measure(manager, put, options.requests)
                if options.rq and rq_put is not None:
                    tables[title][f"RQ, {name}"] = measure(manager, rq_put, options.requests)
    for title, columns in tables.items():
        report(f"bytes per request, {title}", columns)


if __name__ == "__main__":
    main()
