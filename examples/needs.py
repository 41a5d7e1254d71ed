"""A year made of twelve months: requests that need each other's results.

    python examples/needs.py

Each month is a request of its own, cached and shared. Two years run side by side in one thread here; months that both
need are computed once.
"""

from __future__ import annotations

from rqarm import BatchRequest, Context, Handlers, RequestManager
from rqarm.testing import drain

handlers = Handlers()


@handlers.route("/sales/{year:int}/{month:int}", ttl=3600)
def month(request: BatchRequest, context: Context, year: int, month: int) -> int:
    return year * month % 997


@handlers.route("/sales/{year:int}", ttl=3600)
def year(request: BatchRequest, context: Context, year: int) -> int:
    """Called twice: the first time it finds nothing, the second time all twelve are there."""
    return sum(context.require(*(f"/sales/{year}/{n}" for n in range(1, 13))))


@handlers.route("/winters/{year:int}")
def winter(request: BatchRequest, context: Context, year: int) -> int:
    return sum(context.require(f"/sales/{year}/12", f"/sales/{year}/1", f"/sales/{year}/2"))


def main() -> None:
    with RequestManager() as rm:
        rm.submit_many(["/sales/2025", "/winters/2025"])
        for ran in drain(rm, handlers):
            print(f"{ran.uri}: {ran.outcome}")
        print("the year:", rm.get("/sales/2025"), "the winter:", rm.get("/winters/2025"))


if __name__ == "__main__":
    main()
