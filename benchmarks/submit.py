"""What a submit costs: new, joined, hit and many, against redis-py's GET and RQ's own enqueue, in one run.

    python benchmarks/submit.py [--rounds 7] [--calls 1500] [--server /usr/bin/redis-server]

Every contestant runs in every round, one after the other, so that a noisy machine is noisy for all. What counts are the
ratios; each is the median over the rounds of the ratio within a round. Round trips are counted, not timed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import redis
import rq
from rq.exceptions import DuplicateJobError
from rq.serializers import JSONSerializer

from rqarm import BatchRequest, RequestManager, embedded

PERFORM = "rqarm.worker.perform"


class Contest:
    """The contestants, one method each; ``n`` makes every call of a round different where it has to be."""

    def __init__(self, client: redis.Redis, manager: RequestManager) -> None:
        self.client, self.manager = client, manager
        self.queue = rq.Queue("rq-own", connection=client, serializer=JSONSerializer)
        self.round = 0

    def prepare(self, calls: int) -> None:
        self.client.flushall()
        self.round += 1
        self.client.set("value", b"x" * 20)
        self.manager.cache.put("/hit?a=1", {"rows": [1, 2, 3]})
        self.manager.submit("/joined?a=1")
        self.queue.enqueue(PERFORM, "arm", "k", job_id="unique", unique=True)

    def get(self, n: int) -> None:
        self.client.get("value")

    def hit(self, n: int) -> None:
        assert self.manager.submit("/hit?a=1").value is not None

    def joined(self, n: int) -> None:
        self.manager.submit("/joined?a=1")

    def new(self, n: int) -> None:
        self.manager.submit(f"/new?a={n}")

    def rq_enqueue(self, n: int) -> None:
        self.queue.enqueue(PERFORM, "arm", str(n), description=f"/new?a={n}", result_ttl=60, failure_ttl=60)

    def rq_unique(self, n: int) -> None:
        try:
            self.queue.enqueue(PERFORM, "arm", "k", job_id="unique", unique=True)
        except DuplicateJobError:
            return
        raise AssertionError("RQ took the same job twice")

    def many(self, calls: int) -> None:
        self.manager.submit_many([f"/many?a={n}" for n in range(calls)])

    def rq_many(self, calls: int) -> None:
        prepare = rq.Queue.prepare_data
        self.queue.enqueue_many(
            [prepare(PERFORM, ("arm", str(n)), description=f"/many?a={n}", result_ttl=60) for n in range(calls)]
        )


def rate(calls: int, work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return calls / (time.perf_counter() - began)


def play(contest: Contest, calls: int) -> dict[str, float]:
    """Calls per second of each contestant in one round."""
    contest.prepare(calls)
    singles = (contest.get, contest.hit, contest.joined, contest.new, contest.rq_enqueue, contest.rq_unique)

    def repeat(one: Callable[[int], None]) -> Callable[[], None]:
        def work() -> None:
            for n in range(calls):
                one(n)

        return work

    rates = {one.__name__: rate(calls, repeat(one)) for one in singles}
    rates["many"] = rate(calls, lambda: contest.many(calls))
    rates["rq_many"] = rate(calls, lambda: contest.rq_many(calls))
    return rates


def bytes_per_pending(client: redis.Redis, put: Callable[[int], None], n: int = 2000) -> float:
    """MEMORY USAGE of all keys for each pending request; the capped stream of events aside."""
    client.flushall(asynchronous=False)
    for i in range(n):
        put(i)
    keys = list(client.scan_iter(count=1000))
    return sum(client.memory_usage(key, samples=0) or 0 for key in keys if b"events" not in key) / n


def round_trips(client: redis.Redis, manager: RequestManager) -> dict[str, float]:
    """Scripts that one call runs, as MONITOR sees them; the tests assert that a client sends nothing else."""
    client.flushall()
    counts: dict[str, float] = {}

    def count(name: str, call: Callable[[], object]) -> None:
        with client.monitor() as monitor:
            call()
            client.echo("end")
            seen = 0
            for command in monitor.listen():
                if command["command"].startswith("ECHO"):
                    break
                # what the script does inside costs no round trip
                seen += command["command"].startswith("EVALSHA")
        counts[name] = seen

    manager.submit("/warm")
    count("submit new", lambda: manager.submit("/a"))
    count("submit joined", lambda: manager.submit("/a"))
    manager.cache.put("/b", 1)
    count("submit hit", lambda: manager.submit("/b"))
    count("get, cached", lambda: manager.get("/b"))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=1500)
    parser.add_argument("--server", help="the server program; default: the embedded one's")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="rqarm-") as directory,
        embedded.private(Path(directory), binary=options.server) as server,
        RequestManager(server.url, allow_volatile=True) as manager,
    ):
        report(manager, options.rounds, options.calls)


def report(manager: RequestManager, rounds: int, calls: int) -> None:
    client = manager.connection
    contest = Contest(client, manager)
    play(contest, 200)
    played = [play(contest, calls) for _ in range(rounds)]
    info = client.info("server")
    print(f"server {info.get('valkey_version') or info['redis_version']}, {rounds} rounds of {calls} calls\n")
    print(f"{'call':<12}{'calls/s':>10}{'us/call':>10}")
    for name in played[0]:
        middle = statistics.median(rates[name] for rates in played)
        print(f"{name:<12}{middle:>10.0f}{1e6 / middle:>10.0f}")
    print(f"\n{'ratio':<28}{'median':>8}{'lowest':>8}{'highest':>8}{'aim':>8}")
    for name, other, aim in (
        ("hit", "get", 0.6),
        ("new", "rq_enqueue", 1.5),
        ("joined", "rq_unique", 2.0),
        ("many", "rq_many", 1.0),
    ):
        ratios = [rates[name] / rates[other] for rates in played]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"{name + ' / ' + other:<28}{middle:>8.2f}{low:>8.2f}{high:>8.2f}{aim:>8.2f}")
    print()
    for name, trips in round_trips(client, manager).items():
        print(f"round trips, {name:<15}{trips:>8.0f}")
    ours = bytes_per_pending(client, lambda n: manager.submit(BatchRequest(f"/reports/2026?region={n:06}")))
    theirs = bytes_per_pending(client, contest.rq_enqueue)
    print(f"bytes per pending request   {ours:>8.0f}   (RQ alone, no status, claim or position: {theirs:.0f})")


if __name__ == "__main__":
    main()
