"""Limits of routes: who gets a place, who waits, and who comes next, on real servers and through the scripts alone.

What runs under a limit is taken by hand here; workers that ask for places themselves are in test_execution and
test_worker.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import pytest
from audit import audit
from drive import ERROR, LIMIT, Rig, server_ms

from rqarm import flows
from rqarm.calls import Call
from rqarm.model import Outcome, State
from rqarm.replies import Attempt, Found
from rqarm.request import BatchRequest


def submit(rig: Rig, *uris: str, **options: Any) -> None:
    for uri in uris:
        assert rig.word(rig.submit(BatchRequest(uri, **options))) == "new"


def take(rig: Rig, uri: str = "") -> Attempt:
    """The next attempt, which is that of ``uri``."""
    attempt = rig.ask(rig.take())
    assert isinstance(attempt, Attempt), f"nothing is queued, not even {uri}"
    assert attempt.request.uri == uri or not uri
    return attempt


def ask(rig: Rig, uri: str, max_running: int = 1) -> tuple[Attempt, str]:
    """The next attempt, which is that of ``uri``, asks for a place."""
    attempt = take(rig, uri)
    return attempt, rig.word(rig.admit(attempt, max_running))


def members(rig: Rig, kind: str, limit: str = LIMIT) -> list[str]:
    """The URIs under a limit, in the order of the index."""
    keys = rig.client.zrange(rig.named(kind, limit=limit), 0, -1)
    return [rig.record(key.decode())["uri"].split("\n")[-1] for key in keys]  # type: ignore[arg-type]


def queued(rig: Rig) -> list[str]:
    """The URIs of the tickets in RQ's list of the default priority, next first."""
    by_job = {rig.record(key)["job_id"]: rig.record(key)["uri"].split("\n")[-1] for key in rig.line()}  # type: ignore[arg-type]
    return [by_job[job_id] for job_id in rig.waiting()[1]]


def three(rig: Rig) -> tuple[Attempt, Attempt]:
    """One runs, two are parked. Gives who runs, and who ran first of those who wait."""
    submit(rig, "/1", "/2", "/3")
    first, word = ask(rig, "/1")
    assert word == "admitted"
    second, word = ask(rig, "/2")
    assert word == "parked"
    assert ask(rig, "/3")[1] == "parked"
    assert rig.waiting() == [[], [], []]
    assert members(rig, "parked") == ["/2", "/3"]
    return first, second


# -- places


def test_a_limit_has_as_many_places_as_it_says(rig: Rig) -> None:
    submit(rig, "/1", "/2", "/3")
    assert [ask(rig, uri, 2)[1] for uri in ("/1", "/2", "/3")] == ["admitted", "admitted", "parked"]
    assert (sorted(members(rig, "running")), members(rig, "parked")) == (["/1", "/2"], ["/3"])
    audit(rig.client, rig.keys)


def test_limits_do_not_meet(rig: Rig) -> None:
    submit(rig, "/1", "/2")
    first, second = take(rig, "/1"), take(rig, "/2")
    assert rig.word(rig.admit(first, limit="thumbnail")) == "admitted"
    assert rig.word(rig.admit(second, limit="report")) == "admitted"


def test_a_parked_request_loses_nothing(rig: Rig) -> None:
    submit(rig, "/1", "/2")
    assert ask(rig, "/1")[1] == "admitted"
    before = rig.record(BatchRequest("/2").key)
    parked, word = ask(rig, "/2")
    assert word == "parked"
    after = rig.record(parked.key)
    kept = ("ticket", "priority", "queue", "submitted_ms", "est_ms", "sticky", "ttl_ms")
    assert [after[name] for name in kept] == [before[name] for name in kept]
    assert (after["state"], after["attempts"]) == ("pending", "0")
    assert not {"token", "exec", "lease_until", "crashes", "retries"} & after.keys()
    assert after["job_id"] != before["job_id"]
    assert rig.client.zscore("rq:scheduled:arm", after["job_id"]) is not None
    located = rig.ask(rig.calls.locate(parked.key, "arm"))
    assert (located.state, located.position) == (State.PENDING, 1)


def test_joins_and_hits_take_no_place(rig: Rig) -> None:
    submit(rig, "/1")
    first, _ = ask(rig, "/1", 2)
    for _ in range(3):
        assert rig.word(rig.submit(BatchRequest("/1"))) == "joined"
    assert members(rig, "running") == ["/1"]
    assert rig.word(rig.complete(first)) == "stored"
    found: Found = rig.ask(rig.submit(BatchRequest("/1")))
    assert found.status.outcome is Outcome.HIT
    assert members(rig, "running") == []
    audit(rig.client, rig.keys)


# -- who comes next


def renamed(rig: Rig, first: Attempt) -> Call[Any]:
    """The route has got another name: its requests ask under another limit."""
    return rig.admit(first, limit="new name")


ENDS: dict[str, tuple[Callable[[Rig, Attempt], Call[Any]], str]] = {
    "complete": (lambda rig, first: rig.complete(first), "stored"),
    "fail": (lambda rig, first: rig.fail(first), "failed"),
    "retry": (
        lambda rig, first: rig.retry(first, rig.ticket(first.request, delay=3600), delay_ms=3_600_000),
        "retried",
    ),
    "crash": (lambda rig, first: rig.crash(first.key, first.token, rig.ticket(first.request, delay=3600)), "requeued"),
    "cancel": (lambda rig, first: rig.calls.cancel(first.key), "cancelled"),
    "put": (lambda rig, first: rig.put(first.request, secrets.token_hex(8)), "stored"),
    "rename": (renamed, "admitted"),
}


@pytest.mark.parametrize("end", ENDS)
def test_every_end_calls_up_the_first_in_line(rig: Rig, end: str) -> None:
    first, parked = three(rig)
    submit(rig, "/new")
    call, word = ENDS[end][0](rig, first), ENDS[end][1]
    assert rig.word(call) == word
    assert queued(rig) == ["/2", "/new"], "at the front, and the others wait on"
    assert (members(rig, "running"), members(rig, "called"), members(rig, "parked")) == ([], ["/2"], ["/3"])
    record = rig.record(parked.key)
    assert not {"due_ms", "recall", "recall_data"} & record.keys()
    assert rig.client.zscore("rq:scheduled:arm", record["job_id"]) is None
    audit(rig.client, rig.keys)
    rig.word(call)
    assert members(rig, "called") == ["/2"], "the same end again calls nobody"
    assert ask(rig, "/2")[1] == "admitted"
    assert (members(rig, "running"), members(rig, "called")) == (["/2"], [])
    audit(rig.client, rig.keys)


def test_a_claim_that_is_taken_over_frees_its_place(rig: Rig) -> None:
    for crashes, word in (0, "new"), (rig.settings.max_attempts - 1, "negative"):
        rig.client.flushdb()
        first, _ = three(rig)
        rig.client.hset(rig.keys.status(first.key), "crashes", crashes)
        rig.lapse(first.key)
        assert rig.word(rig.submit(first.request)) == word
        assert members(rig, "called") == ["/2"]
        assert queued(rig)[0] == "/2"
        audit(rig.client, rig.keys)


def test_a_quarantined_request_frees_its_place(rig: Rig) -> None:
    first, _ = three(rig)
    rig.client.hset(rig.keys.status(first.key), "crashes", rig.settings.max_attempts - 1)
    assert rig.word(rig.crash(first.key, first.token, rig.ticket(first.request))) == "quarantined"
    assert members(rig, "called") == ["/2"]
    audit(rig.client, rig.keys)


def test_a_lapsed_lease_frees_its_place_when_it_is_swept(rig: Rig) -> None:
    first, _ = three(rig)
    rig.lapse(first.key)
    assert rig.run(flows.sweep(rig.core)) == 1
    assert members(rig, "called") == ["/2"]
    audit(rig.client, rig.keys)


def test_who_is_handed_back_comes_before_those_who_wait(rig: Rig) -> None:
    """A deploy: the request that ran is ahead in line of the one that was called in its place."""
    first, _ = three(rig)
    assert rig.word(rig.calls.release(first, rig.front_ticket(first.request))) == "released"
    assert queued(rig) == ["/1", "/2"]
    assert ask(rig, "/1")[1] == "admitted"
    assert ask(rig, "/2")[1] == "parked"
    assert (members(rig, "running"), members(rig, "parked")) == (["/1"], ["/2", "/3"])
    audit(rig.client, rig.keys)


def test_better_priorities_are_called_up_first(rig: Rig) -> None:
    submit(rig, "/1")
    first, _ = ask(rig, "/1")
    submit(rig, "/low", priority="low")
    submit(rig, "/default")
    submit(rig, "/high", priority="high")
    assert [ask(rig, uri)[1] for uri in ("/high", "/default", "/low")] == ["parked"] * 3
    assert members(rig, "parked") == ["/high", "/default", "/low"]
    rig.reply(rig.complete(first))
    for uri in ("/high", "/default", "/low"):
        attempt, word = ask(rig, uri)
        assert word == "admitted"
        rig.reply(rig.complete(attempt))


def test_a_place_is_kept_for_who_was_called(rig: Rig) -> None:
    first, _ = three(rig)
    submit(rig, "/4")
    fourth = take(rig, "/4")
    rig.reply(rig.complete(first))
    assert rig.word(rig.admit(fourth)) == "parked"
    assert ask(rig, "/2")[1] == "admitted"
    assert members(rig, "parked") == ["/3", "/4"]


def test_a_kept_place_goes_to_whoever_is_ahead_in_line(rig: Rig) -> None:
    first, second = three(rig)
    rig.reply(rig.complete(first))
    assert members(rig, "called") == ["/2"]
    submit(rig, "/urgent", priority="high")
    assert ask(rig, "/urgent")[1] == "admitted"
    audit(rig.client, rig.keys)
    assert ask(rig, "/2")[1] == "parked"
    assert rig.record(second.key)["limit"] == LIMIT
    assert members(rig, "parked") == ["/2", "/3"]
    audit(rig.client, rig.keys)


def test_of_several_who_were_called_the_last_in_line_gives_way(rig: Rig) -> None:
    submit(rig, "/1", "/2", "/3", "/4")
    runs = [ask(rig, uri, 2)[0] for uri in ("/1", "/2")]
    assert [ask(rig, uri, 2)[1] for uri in ("/3", "/4")] == ["parked", "parked"]
    for attempt in runs:
        rig.reply(rig.complete(attempt))
    assert sorted(members(rig, "called")) == ["/3", "/4"]
    submit(rig, "/urgent", priority="high")
    assert ask(rig, "/urgent", 2)[1] == "admitted"
    assert members(rig, "called") == ["/3"]


def test_a_kept_place_that_nobody_fetches_goes_to_who_asks(rig: Rig) -> None:
    """The queue of the one who was called may have no workers."""
    first, second = three(rig)
    rig.reply(rig.complete(first))
    rig.client.zadd(rig.named("called", limit=LIMIT), {second.key: server_ms(rig.client) - 60_000})
    submit(rig, "/4")
    rig.client.lpop("rq:queue:arm")  # the ticket of /2: nobody listens there
    assert ask(rig, "/4")[1] == "admitted"
    assert members(rig, "called") == []
    assert "limit" not in rig.record(second.key)
    audit(rig.client, rig.keys, lost=[second.key])


# -- those who wait


def test_a_parked_request_that_was_cancelled_is_not_called_up(rig: Rig) -> None:
    first, second = three(rig)
    assert rig.word(rig.calls.cancel(second.key)) == "cancelled"
    assert members(rig, "parked") == ["/3"]
    rig.reply(rig.complete(first))
    assert queued(rig) == ["/3"]
    audit(rig.client, rig.keys)


def test_who_is_cancelled_after_the_call_hands_the_place_on(rig: Rig) -> None:
    first, second = three(rig)
    rig.reply(rig.complete(first))
    assert rig.word(rig.calls.cancel(second.key)) == "cancelled"
    assert members(rig, "called") == ["/3"]
    assert take(rig, "/3")
    audit(rig.client, rig.keys)


def test_a_joiner_with_a_better_priority_moves_a_parked_request_up(rig: Rig) -> None:
    first, _ = three(rig)
    assert rig.word(rig.submit(BatchRequest("/3", priority="high"))) == "joined"
    assert members(rig, "parked") == ["/2"]
    assert ask(rig, "/3")[1] == "parked"
    assert members(rig, "parked") == ["/3", "/2"]
    rig.reply(rig.complete(first))
    assert members(rig, "called") == ["/3"]
    audit(rig.client, rig.keys)


def test_a_parked_ticket_that_rqs_scheduler_puts_back_asks_again(rig: Rig) -> None:
    _, second = three(rig)
    job_id = rig.record(second.key)["job_id"]
    again = rig.ask(rig.start(second.key, job_id))
    assert isinstance(again, Attempt)
    assert members(rig, "parked") == ["/3"]
    audit(rig.client, rig.keys)
    assert rig.word(rig.admit(again)) == "parked"
    assert members(rig, "parked") == ["/2", "/3"]
    assert rig.record(second.key)["attempts"] == "0"
    assert rig.ask(rig.start(second.key, job_id)) is State.PENDING, "the ticket from before is superseded"
    audit(rig.client, rig.keys)


def test_a_sweep_leaves_parked_requests_in_peace_before_their_time(rig: Rig) -> None:
    _, second = three(rig)
    rig.age(second.key)
    assert rig.run(flows.sweep(rig.core)) == 0
    rig.client.hset(rig.keys.status(second.key), "due_ms", server_ms(rig.client) - 3_600_000)
    assert rig.run(flows.sweep(rig.core)) == 1, "nobody runs RQ's scheduler"
    assert queued(rig) == ["/2"]
    audit(rig.client, rig.keys)


def test_who_waits_costs_no_crash_and_no_attempt_however_often_it_asks(rig: Rig) -> None:
    submit(rig, "/1", "/2")
    assert ask(rig, "/1")[1] == "admitted"
    second, _ = ask(rig, "/2")
    for _ in range(5):
        again = rig.ask(rig.start(second.key, rig.record(second.key)["job_id"]))
        assert (again.number, again.crashes, again.retries) == (1, 0, 0)
        assert rig.word(rig.admit(again)) == "parked"


# -- other numbers of places


def test_more_places_are_filled_in_the_order_of_the_line(rig: Rig) -> None:
    submit(rig, "/1", "/2", "/3", "/4", "/5")
    assert [ask(rig, uri)[1] for uri in ("/1", "/2", "/3", "/4")] == ["admitted", *["parked"] * 3]
    fifth = take(rig, "/5")
    assert rig.word(rig.admit(fifth, 3)) == "parked"
    assert members(rig, "parked") == ["/4", "/5"]
    assert queued(rig) == ["/2", "/3"]
    audit(rig.client, rig.keys)


def test_with_fewer_places_nobody_is_called_up_until_enough_have_ended(rig: Rig) -> None:
    submit(rig, "/1", "/2", "/3", "/4")
    runs = [ask(rig, uri, 3)[0] for uri in ("/1", "/2", "/3")]
    assert ask(rig, "/4", 1)[1] == "parked"
    for attempt in runs[:2]:
        rig.reply(rig.complete(attempt))
        assert members(rig, "called") == []
    rig.reply(rig.complete(runs[2]))
    assert members(rig, "called") == ["/4"]
    audit(rig.client, rig.keys)


# -- damage


def test_a_sweep_frees_the_places_of_records_that_are_gone(rig: Rig) -> None:
    first, second = three(rig)
    for gone, called in (first, "/2"), (second, "/3"):
        rig.client.delete(rig.keys.status(gone.key))
        rig.client.delete("rq:queue:arm")
        assert rig.run(flows.sweep(rig.core)) == 0
        assert members(rig, "called") == [called]
    assert ask(rig, "/3")[1] == "admitted"


def test_a_sweep_forgets_a_limit_that_nobody_is_under(rig: Rig) -> None:
    submit(rig, "/1")
    first, _ = ask(rig, "/1")
    rig.run(flows.sweep(rig.core))
    assert rig.client.hgetall(rig.named("limits")) == {LIMIT.encode(): b"1"}
    rig.reply(rig.complete(first))
    rig.run(flows.sweep(rig.core))
    assert not rig.client.exists(rig.named("limits"))


def test_a_place_that_others_wrote_into_goes_to_the_next(rig: Rig) -> None:
    first, second = three(rig)
    rig.client.set(rig.keys.status(second.key), "foreign")
    assert rig.word(rig.complete(first)) == "stored"
    assert rig.waiting()[1] == [rig.record(BatchRequest("/3").key)["job_id"]]


def test_a_call_that_rqs_keys_refuse_does_not_stop_the_end_that_frees_the_place(rig: Rig) -> None:
    first, second = three(rig)
    rig.client.set("rq:queue:arm", "foreign")
    assert rig.word(rig.complete(first)) == "stored"
    assert rig.state(first.key) is State.COMPLETED
    assert members(rig, "called") == ["/2"]
    rig.client.delete("rq:queue:arm")
    rig.age(second.key)
    assert rig.run(flows.sweep(rig.core)) == 1, "its ticket is missed"
    assert queued(rig) == ["/3", "/2"]
    assert ask(rig, "/3")[1] == "admitted"
    audit(rig.client, rig.keys)


def test_flushdb_leaves_no_limit_behind(rig: Rig) -> None:
    first, _ = three(rig)
    rig.client.flushdb()
    assert rig.word(rig.complete(first)) == "lost"
    assert rig.word(rig.admit(first)) == "lost"
    assert rig.client.keys(f"{rig.keys.prefix}*") == [rig.named("stats", family="refusals").encode()]
    submit(rig, "/1")
    assert ask(rig, "/1")[1] == "admitted"


def test_the_flow_says_whether_there_is_a_place(rig: Rig) -> None:
    submit(rig, "/1", "/2")
    assert rig.run(flows.admit(rig.core, take(rig, "/1"), LIMIT, 1)) is True
    assert rig.run(flows.admit(rig.core, take(rig, "/2"), LIMIT, 1)) is False
    due = rig.client.zscore("rq:scheduled:arm", rig.record(BatchRequest("/2").key)["job_id"])
    assert due is not None
    assert due == pytest.approx(server_ms(rig.client) / 1000 + flows.PARK_DELAY, abs=10)


def test_the_end_of_a_request_without_a_limit_looks_at_none(rig: Rig) -> None:
    submit(rig, "/free")
    attempt = take(rig, "/free")
    rig.client.config_resetstat()
    assert rig.word(rig.calls.fail(attempt, ERROR, failure_ttl_ms=1000, negative_ms=0)) == "failed"
    used = set(rig.client.info("commandstats"))
    assert not used & {"cmdstat_zpopmin", "cmdstat_zcard", "cmdstat_hget"}
