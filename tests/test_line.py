"""Position and eta on real servers, against a naive model."""

from __future__ import annotations

import itertools
from typing import Any

from audit import audit
from drive import Rig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rqarm import connect, embedded
from rqarm.model import Priority
from rqarm.replies import Attempt
from rqarm.request import BatchRequest


class Line:
    """A queue as three lists: what position and eta should be."""

    def __init__(self) -> None:
        self.lists: tuple[list[str], ...] = ([], [], [])
        self.estimates: dict[str, int] = {}

    def order(self) -> list[str]:
        return [uri for waiting in self.lists for uri in waiting]

    def drop(self, uri: str) -> None:
        for waiting in self.lists:
            if uri in waiting:
                waiting.remove(uri)


LINE_STEPS = st.tuples(
    st.sampled_from(["submit", "submit", "submit", "submit", "take", "cancel"]),
    st.integers(0, 7),
    st.sampled_from(Priority),
    st.integers(0, 90),
)


@given(steps=st.lists(LINE_STEPS, min_size=10, max_size=40))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_position_and_eta_are_those_of_a_naive_model(server: embedded.PrivateServer, steps: list[Any]) -> None:
    with connect.open_client(server.url) as client:
        client.flushdb()
        rig, line = Rig(client), Line()
        for verb, n, priority, estimate in steps:
            uri = f"/{n}"
            if verb == "submit":
                submit_in_line(rig, line, uri, priority, estimate)
            elif verb == "cancel":
                rig.reply(rig.calls.cancel(BatchRequest(uri).key))
                line.drop(uri)
            else:
                attempt = rig.ask(rig.take())
                first = line.order()[:1]
                assert [attempt.request.uri] == first if isinstance(attempt, Attempt) else not first
                if isinstance(attempt, Attempt):
                    line.drop(attempt.request.uri)
                    rig.reply(rig.calls.cancel(attempt.key))
        ahead = 0
        for position, uri in enumerate(line.order(), 1):
            status = rig.ask(rig.calls.locate(BatchRequest(uri).key, "arm"))
            assert status.position == position
            estimate = line.estimates[uri]
            assert status.eta == (ahead + estimate if estimate else None)
            ahead += estimate
        audit(client, rig.keys)


def submit_in_line(rig: Rig, line: Line, uri: str, priority: Priority, estimate: int) -> None:
    word = rig.word(rig.submit(BatchRequest(uri, priority=priority, estimated_time=estimate)))
    if word == "new":
        line.estimates[uri] = estimate
        line.lists[priority].append(uri)
    else:
        assert word == "joined"
        now_at = next(rank for rank, waiting in enumerate(line.lists) if uri in waiting)
        if priority < now_at:
            line.drop(uri)
            line.lists[priority].append(uri)


def test_the_eta_stays_exact_over_the_blocks_of_the_sums(rig: Rig) -> None:
    requests = [BatchRequest(f"/{n}", estimated_time=n % 7 + 1) for n in range(400)]
    for request in requests:
        rig.reply(rig.submit(request))
    for n in range(0, 400, 3):
        rig.reply(rig.calls.cancel(requests[n].key))
    left = [request for n, request in enumerate(requests) if n % 3]
    ahead = list(itertools.accumulate(request.estimated_time or 0 for request in left))
    for n in (0, 1, 84, 85, 86, 170, 171, 265):
        status = rig.ask(rig.calls.locate(left[n].key, "arm"))
        assert (status.position, status.eta) == (n + 1, ahead[n])
    audit(rig.client, rig.keys)


def test_a_request_that_comes_back_after_the_line_was_empty_stands_before_those_that_came_since(rig: Rig) -> None:
    for n in range(5):
        rig.seed("pending", BatchRequest(f"/gone/{n}", estimated_time=1))
    last = rig.seed("pending", BatchRequest("/back", estimated_time=10))
    for _ in range(5):
        rig.reply(rig.calls.cancel(rig.ask(rig.take()).key))
    attempt = rig.ask(rig.take())
    behind = rig.seed("pending", BatchRequest("/behind", estimated_time=4))
    rig.reply(rig.calls.release(attempt, rig.front_ticket(last.request)))
    located = {key: rig.ask(rig.calls.locate(key, "arm")) for key in (last.key, behind.key)}
    assert {key: (status.position, status.eta) for key, status in located.items()} == {
        last.key: (1, 10.0),
        behind.key: (2, 14.0),
    }
    audit(rig.client, rig.keys)


def test_the_workers_that_live_share_the_time_ahead(rig: Rig) -> None:
    for n in range(4):
        rig.seed("pending", BatchRequest(f"/{n}", estimated_time=10))
    last = BatchRequest("/3").key
    assert rig.ask(rig.calls.locate(last, "arm")).eta == 40
    sets = rig.jobs.worker_sets("arm")
    for name in ("rq:worker:a", "rq:worker:b", "rq:worker:dead"):
        rig.client.sadd(sets[1], name)
        rig.client.sadd(sets[0], name)
    for name in ("rq:worker:a", "rq:worker:b"):
        rig.client.hset(name, "state", "busy")
    assert rig.ask(rig.calls.locate(last, "arm")).eta == 20


def test_what_runs_is_at_position_0_and_what_has_ended_has_none(rig: Rig) -> None:
    running = rig.seed("mine", BatchRequest("/runs", estimated_time=100))
    status = rig.ask(rig.calls.locate(running.key, "arm"))
    assert status.position == 0
    assert 90 < status.eta <= 100
    waiting = rig.seed("pending", BatchRequest("/waits", estimated_time=10))
    eta = rig.ask(rig.calls.locate(waiting.key, "arm")).eta
    assert 100 < eta <= 110, "what is left of the running one is ahead"
    rig.reply(rig.complete(running.attempt))
    ended = rig.ask(rig.calls.locate(running.key, "arm"))
    assert (ended.position, ended.eta) == (None, None)


def test_a_run_time_is_learned_for_the_next_of_its_family(rig: Rig) -> None:
    attempt = rig.begin(BatchRequest("/slow/1"))
    rig.client.hincrby(rig.keys.status(attempt.key), "started_ms", -20_000)
    rig.reply(rig.complete(attempt))
    found = rig.ask(rig.submit(BatchRequest("/slow/2")))
    assert 20 <= found.status.estimated_time < 30
