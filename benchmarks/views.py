"""What each view of an operator, and each page of the dashboard, costs at full size: time and round trips.

    python benchmarks/views.py [--cached 1000000] [--pending 100000] [--server /usr/bin/redis-server] [--json FILE]

Every cached key is written by the same script as ``rm.cache.put``, every pending one by ``submit``, in pipelines;
that takes some minutes and 1 GB. One client, one server, a unix socket. A view fails the run when it takes more
than three round trips.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

from rqarm import BatchRequest, RequestManager, codec, embedded
from rqarm.calls import Batch
from rqarm.dashboard import create_app

ROUTES = ("/cities", "/exports", "/reports", "https://api.example.org/v1", "https://api.example.org/v2")
TAGS = ("geo", "sales", "2026-11")
IN_A_PIPELINE = 500
RUNNING, FAILED = 200, 2_000
MOST_TRIPS = 3


def cached_request(n: int) -> BatchRequest:
    """One in twenty is sticky, one in ten has a tag; the others live from a minute to some weeks."""
    uri = f"{ROUTES[n % len(ROUTES)]}/{n:07x}?min_population=100000&format=csv"
    life: dict[str, Any] = {"sticky": True} if n % 20 == 0 else {"ttl": 600.0 + n * 7919 % 2_000_000}
    return BatchRequest(uri, tags=(TAGS[n // 10 % len(TAGS)],) if n % 10 == 3 else (), **life)


def fill_cache(rm: RequestManager, count: int) -> None:
    encoded = codec.encode({"rows": [1, 2, 3]}, rm.settings)
    for first in range(0, count, IN_A_PIPELINE):
        steps = []
        for n in range(first, min(first + IN_A_PIPELINE, count)):
            request = cached_request(n)
            identity = rm.core.identify(request)
            steps.append(rm.core.calls.put(request, identity, secrets.token_hex(8), encoded.envelope, encoded.inline))
        rm.shell.execute(Batch(tuple(steps)))


def fill_queues(rm: RequestManager, count: int) -> None:
    for first in range(0, count, IN_A_PIPELINE):
        numbers = range(first, min(first + IN_A_PIPELINE, count))
        rm.submit_many(BatchRequest(f"/slow/{n:06x}?waits=1", queue=("arm", "bulk")[n % 4 == 0]) for n in numbers)
    for n in range(RUNNING + FAILED):
        lease = rm.queues.next_request()
        if lease is not None and n >= RUNNING:
            lease.fail("it did not work")


def pages(rm: RequestManager, count: int, **filters: Any) -> Callable[[], Any]:
    """The pages of one search, one for each call."""

    def walk() -> Iterator[Any]:
        while True:
            page = rm.search(**filters)
            yield page
            for _ in range(count):
                if not page.cursor:
                    break
                page = rm.search(**filters, cursor=page.cursor)
                yield page

    walked = walk()
    return lambda: next(walked)


def views(rm: RequestManager, cached: int) -> dict[str, Callable[[], Any]]:
    middle = cached_request(cached // 2)
    sticky = cached_request(0).key
    waiting = rm.search(state="pending").entries[0].key
    return {
        "search: first page": rm.search,
        "search: a key": lambda: rm.search(middle.key),
        "search: a URI": lambda: rm.search(middle.uri),
        "search: a part of a URI": pages(rm, 20, text="ff?min"),
        "search: what is nowhere": pages(rm, 20, text="no such thing"),
        "search: a route": pages(rm, 20, route="/exports"),
        "search: a route, cached": pages(rm, 20, route="api.example.org/v2/{n}", state="completed"),
        "search: a tag": pages(rm, 20, tag="geo"),
        "search: failed": pages(rm, 20, state="failed"),
        "search: a queue": pages(rm, 20, queue="bulk", state="pending"),
        "search: 500 a page": pages(rm, 20, state="completed", limit=500),
        "inspect: cached": lambda: rm.inspect(middle.key),
        "inspect: pending": lambda: rm.inspect(waiting),
        "claims": lambda: rm.claims(limit=200),
        "workers": rm.workers,
        "cache.overview": rm.cache.overview,
        "cache.page: by expiry": rm.cache.page,
        "cache.page: largest": lambda: rm.cache.page(order="size", limit=500),
        "cache.pin": lambda: rm.cache.pin(middle.key),
        "cache.unpin": lambda: rm.cache.unpin(sticky, 3600),
        "overview": rm.overview,
        "quarantine: 100": lambda: list(rm.quarantine.list(limit=100)),
    } | pages_of_the_dashboard(rm, waiting)


def pages_of_the_dashboard(rm: RequestManager, key: str) -> dict[str, Callable[[], Any]]:
    """Each page as a browser gets it, without the browser."""
    client = create_app(rm).test_client()
    paths = ("/", "/requests", f"/requests/{key}", "/cache", "/claims", "/quarantine", "/workers", "/metrics")

    def page(path: str) -> Callable[[], None]:
        def get() -> None:
            answer = client.get(path)
            assert answer.status_code == 200, answer.text

        return get

    return {f"page: {path.replace(key, 'KEY')}": page(path) for path in paths}


class Trips:
    """Counts writes to sockets; a pipeline is one."""

    def __init__(self) -> None:
        self.count = 0
        connection = redis.connection.AbstractConnection
        send = connection.send_packed_command

        def counted(its: Any, command: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return send(its, command, *args, **kwargs)

        connection.send_packed_command = counted  # type: ignore[method-assign]


def measure(view: Callable[[], Any], trips: Trips, repeats: int) -> dict[str, float]:
    view()  # the script is loaded
    times, most = [], 0
    for _ in range(repeats):
        before, begun = trips.count, time.perf_counter()
        view()
        times.append((time.perf_counter() - begun) * 1000)
        most = max(most, trips.count - before)
    return {"median_ms": statistics.median(times), "worst_ms": max(times), "trips": most}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cached", type=int, default=1_000_000)
    parser.add_argument("--pending", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--server", help="a server program; default: the first that is found")
    parser.add_argument("--json", help="write the figures here as well")
    options = parser.parse_args()
    trips = Trips()
    with (
        tempfile.TemporaryDirectory(prefix="rqarm-", dir="/tmp") as directory,
        embedded.private(Path(directory), binary=options.server) as server,
        RequestManager(server.url, allow_volatile=True, lease=3_600.0) as rm,
    ):
        begun = time.monotonic()
        fill_cache(rm, options.cached)
        fill_queues(rm, options.pending)
        info = rm.connection.info("memory")
        numbers = rm.cache.stats()
        print(
            f"{numbers.temporary + numbers.sticky:,} cached, {sum(numbers.pending.values()):,} pending, "
            f"{numbers.in_progress:,} running; {info['used_memory'] >> 20:,} MiB; filled in "
            f"{time.monotonic() - begun:.0f} s\n"
        )
        figures = {name: measure(view, trips, options.repeats) for name, view in views(rm, options.cached).items()}
        begun = time.monotonic()
        cleared = rm.cache.clear(route="/exports")
        figures["cache.clear: a route (all steps)"] = {"cleared": cleared, "s": time.monotonic() - begun}
        begun = time.monotonic()
        dropped = rm.cache.invalidate("geo")
        figures["cache.invalidate: a tag (all steps)"] = {"cleared": dropped, "s": time.monotonic() - begun}
    print(f"{'view':<34}{'median ms':>10}{'worst ms':>10}{'trips':>7}")
    for name, figure in figures.items():
        if "trips" in figure:
            print(f"{name:<34}{figure['median_ms']:>10.2f}{figure['worst_ms']:>10.2f}{figure['trips']:>7.0f}")
        else:
            print(f"{name:<34}{figure['cleared']:>10,.0f} forgotten in {figure['s']:.1f} s")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    dear = [name for name, figure in figures.items() if figure.get("trips", 0) > MOST_TRIPS]
    if dear:
        print(f"more than {MOST_TRIPS} round trips: {', '.join(dear)}")
    return 1 if dear else 0


if __name__ == "__main__":
    sys.exit(main())
