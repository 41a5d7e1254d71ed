"""Large numbers: what it costs to work beside thousands that wait, and thousands of leases that lapse at once.

RQARM_EXPLORE=1 takes the numbers of the list of faults; without it they are as large as there is time for.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import servers
from audit import server_ms
from servers import eventually

from rqarm import BatchRequest, RequestManager, State, flows
from rqarm.calls import Batch, Swept, ms
from rqarm.flows import Flow

pytestmark = pytest.mark.faults

EXPLORE = bool(os.environ.get("RQARM_EXPLORE"))
FEW, MANY = 1_000, 100_000 if EXPLORE else 20_000
LAPSED = 10_000 if EXPLORE else 3_000
#: times that each step is measured
TIMES = 60
_numbers = itertools.count(1)


@pytest.fixture
def rm() -> Iterator[RequestManager]:
    with (
        servers.throwaway(servers.VALKEY or servers.REDIS) as server,
        RequestManager(server.url, allow_volatile=True, lease=2.0, crash_delays=(0.0,)) as manager,
    ):
        yield manager


def next_uri() -> str:
    return f"/n/{next(_numbers)}"


def serve_one(rm: RequestManager) -> None:
    lease = rm.queues.next_request()
    assert lease is not None
    lease.finish(1)


STEPS: dict[str, Callable[[RequestManager], Any]] = {
    "submit": lambda rm: rm.submit(next_uri()),
    "join": lambda rm: rm.submit("/last"),
    "hit": lambda rm: rm.submit("/cached"),
    "status": lambda rm: rm.status(BatchRequest("/last").key),
    "place in line": lambda rm: rm.full_status(BatchRequest("/last").key),
    "take and complete": serve_one,
    "join with a better priority": lambda rm: rm.submit(BatchRequest(rm.submit(next_uri()).uri, priority="high")),
    "cancel": lambda rm: rm.cancel(rm.submit(next_uri()).key),
    "sweep": lambda rm: rm.shell.run(flows.sweep(rm.core)),
    "counters": lambda rm: rm.cache.stats(),
}


def cost(rm: RequestManager, step: Callable[[RequestManager], Any]) -> tuple[float, float]:
    """Commands that the server runs for one step, inside of scripts too; the median of its time for a script, in us."""
    rm.connection.config_resetstat()
    for _ in range(TIMES):
        step(rm)
    calls = sum(each["calls"] for each in rm.connection.info("commandstats").values())
    return calls / TIMES, rm.connection.info("latencystats")["latency_percentiles_usec_evalsha"]["p50"]


def test_no_step_costs_more_when_thousands_wait(rm: RequestManager) -> None:
    """Row 70: no command whose work grows with the line."""
    rm.cache.put("/cached", 1)
    rm.submit_many(next_uri() for _ in range(FEW))
    rm.submit("/last")
    small = {name: cost(rm, step) for name, step in STEPS.items()}
    rm.submit_many(next_uri() for _ in range(MANY))
    rm.cancel(BatchRequest("/last").key)
    rm.submit("/last")
    large = {name: cost(rm, step) for name, step in STEPS.items()}
    print(*((name, small[name], large[name]) for name in STEPS), sep="\n")
    for name in STEPS:
        commands, us = large[name]
        # a place far behind is a sum of a few more fields; a sweep looks closer at a hundred that have waited
        assert commands <= (320 if name == "sweep" else 1.5 * small[name][0] + 5), name
        assert us <= 4 * small[name][1] + 500, name


def steps_of(rm: RequestManager, flow: Flow[int]) -> Iterator[tuple[int, int]]:
    """What each step of a sweep finds, and what it heals."""
    answer = None
    with suppress(StopIteration):
        while True:
            step = flow.send(answer)
            answer = rm.shell.execute(step)
            yield (
                len(answer.lapsed) + len(answer.ticketless) if isinstance(answer, Swept) else 0,
                len(step.steps) if isinstance(step, Batch) else 0,
            )


def test_thousands_of_leases_that_lapse_at_once_are_swept_in_small_steps(rm: RequestManager) -> None:
    """Row 74: all workers have died. The server answers others between any two steps."""
    rm.submit_many(next_uri() for _ in range(LAPSED))
    lists = rm.core.jobs.lists("arm")
    calls = [rm.core.calls.take(lists, f"e{n}", f"t{n}", "me", ms(2.0)) for n in range(LAPSED)]
    for start in range(0, LAPSED, 500):
        rm.shell.execute(Batch(tuple(calls[start : start + 500])))
    assert rm.connection.zcard("arm:leases") == LAPSED
    last = max(score for _, score in rm.connection.zrange("arm:leases", -1, -1, withscores=True))
    eventually(lambda: server_ms(rm.connection) > last, what="all have lapsed")
    steps = list(steps_of(rm, flows.sweep(rm.core)))
    assert sum(found for found, _ in steps) == LAPSED
    assert max(found for found, _ in steps) == max(healed for _, healed in steps) == 100
    assert rm.connection.zcard("arm:leases") == 0
    assert rm.connection.llen("rq:queue:arm") == rm.connection.zcard("arm:pending:arm") == LAPSED
    statuses = rm.queue()
    assert {status.state for status in statuses} == {State.PENDING}
    assert {rm.connection.hget(f"arm:status:{status.key}", "crashes") for status in statuses[:100]} == {b"1"}
