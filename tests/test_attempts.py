"""Attempts on real servers: their tokens, how they are taken, whom their end wakes, their traces."""

from __future__ import annotations

import os
from typing import Any

import pytest
import redis
from audit import audit
from drive import Rig, server_ms
from transitions import REQUEST, call_of, last_crash, stored

from rqarm import codec, flows, followups, packing
from rqarm.calls import Call, Calls
from rqarm.errors import LeaseLost
from rqarm.model import FollowUp
from rqarm.replies import Attempt
from rqarm.request import BatchRequest

# -- tokens


def test_tokens_rise_from_attempt_to_attempt_and_over_flushdb(rig: Rig) -> None:
    tokens = []
    for round_ in range(4):
        attempt = rig.begin(BatchRequest("/slow"))
        tokens.append(int(attempt.token))
        rig.reply(rig.calls.release(attempt, rig.front_ticket(attempt.request)))
        tokens.append(int(rig.ask(rig.take()).token))
        if round_ % 2:
            rig.client.flushdb()
        else:
            rig.reply(rig.calls.cancel(attempt.key))
            rig.reply(rig.calls.forget(attempt.key))
    assert tokens == sorted(set(tokens))


def test_tokens_rise_also_when_the_clock_has_been_ahead(rig: Rig) -> None:
    ahead = server_ms(rig.client) * 1000 + 3_600_000_000
    rig.client.set(rig.named("seq"), ahead)
    first = rig.begin(BatchRequest("/a")).token
    second = rig.begin(BatchRequest("/b")).token
    assert ahead < first < second


@pytest.mark.parametrize("verb", ["renew", "complete", "fail", "retry", "release"])
def test_a_zombie_is_told_so_and_changes_nothing(rig: Rig, verb: str) -> None:
    seeded = rig.seed("mine")
    rig.lapse(seeded.key)
    assert rig.run(flows.sweep(rig.core)) == 1
    rig.client.hdel(rig.keys.status(seeded.key), "due_ms")
    assert rig.word(rig.submit(seeded.request, again=True)) == "joined"
    ticket = rig.record(seeded.key)["job_id"]
    assert isinstance(rig.ask(rig.start(seeded.key, ticket, worker="another")), Attempt)
    before = stored(rig)
    with pytest.raises(LeaseLost) as caught:
        rig.ask(call_of(rig, verb, "mine", seeded))
    assert caught.value.state == "in_progress"
    assert stored(rig) == before


# -- take


def test_take_gives_high_before_default_before_low_and_each_in_order(rig: Rig) -> None:
    for uri, priority in (("/l", "low"), ("/d1", "default"), ("/h", "high"), ("/d2", "default")):
        rig.seed("pending", BatchRequest(uri, priority=priority))
    assert [rig.ask(rig.take()).request.uri for _ in range(4)] == ["/h", "/d1", "/d2", "/l"]
    audit(rig.client, rig.keys)


def test_a_job_of_somebody_else_is_not_taken_and_what_stands_behind_it_waits(rig: Rig) -> None:
    (_, default, _) = rig.jobs.lists("arm")
    rig.client.rpush(default, "somebody-elses-job")
    rig.seed("pending")
    before = stored(rig)
    assert isinstance(rig.ask(rig.take()), str)
    rig.client.lset(default, 0, "lookalike-0123abcd")
    rig.client.hset(f"{rig.jobs.job_prefix}lookalike-0123abcd", mapping={"status": "queued", "data": "not ours"})
    assert isinstance(rig.ask(rig.take()), str)
    assert len(stored(rig)[default][1]) == len(before[default][1])


def test_who_starts_a_request_of_his_own_takes_its_ticket_out_of_the_list(rig: Rig) -> None:
    seeded, behind = rig.seed("pending"), rig.seed("pending", "/behind")
    (_, default, _) = rig.jobs.lists("arm")
    job = f"{rig.jobs.job_prefix}{seeded.job_id}"
    assert rig.client.exists(job)
    assert isinstance(rig.ask(rig.start(seeded.key, seeded.job_id, own_list=default)), Attempt)
    assert rig.client.lrange(default, 0, -1) == [behind.job_id.encode()]
    assert not rig.client.exists(job)


def test_the_ticket_of_a_forgotten_request_does_not_block_the_queue(rig: Rig) -> None:
    seeded = rig.seed("cancelled")
    assert rig.word(rig.calls.forget(seeded.key)) == "forgotten"
    behind = rig.seed("pending", "/behind")
    attempt = rig.ask(rig.take())
    assert isinstance(attempt, Attempt)
    assert attempt.key == behind.key
    assert not rig.client.exists(f"{rig.jobs.job_prefix}{seeded.job_id}")


def test_the_ticket_of_another_namespace_stays_in_a_shared_queue(redis_client: redis.Redis) -> None:
    ours, theirs = Rig(redis_client), Rig(redis_client, namespace="their")
    waiting = theirs.seed("pending")
    assert isinstance(ours.ask(ours.take()), str)
    assert theirs.waiting() == [[], [waiting.job_id], []]
    assert isinstance(theirs.ask(theirs.take()), Attempt)


def test_for_an_rq_worker_a_job_of_somebody_else_is_the_next_one(rig: Rig) -> None:
    high, default, _ = lists = rig.jobs.lists("arm")
    rig.client.rpush(high, "somebody-elses-job")
    seeded = rig.seed("pending")
    taken = rig.ask(rig.take_any(lists, for_rq=True))
    assert (taken.attempt, taken.reason, taken.list) == (None, "foreign", high)
    rig.client.delete(high)
    taken = rig.ask(rig.take_any(lists, for_rq=True))
    assert (taken.attempt.key, taken.list) == (seeded.key, default)


def test_a_ticket_whose_record_somebody_else_has_written_is_left_to_rqs_way(rig: Rig) -> None:
    seeded = rig.seed("pending")
    _, default, _ = lists = rig.jobs.lists("arm")
    rig.client.set(rig.keys.status(seeded.key), "somebody else's")
    before = stored(rig)
    taken = rig.ask(rig.take_any(lists, for_rq=True))
    assert (taken.attempt, taken.reason, taken.list) == (None, "foreign", default)
    assert stored(rig) == before


def test_the_rq_job_of_what_an_rq_worker_takes_lies_there_until_the_attempt_ends(rig: Rig) -> None:
    for end in ("complete", "retry", "release"):
        seeded = rig.seed("pending", f"/{end}")
        (job_id,) = rig.waiting()[1]
        attempt = rig.ask(rig.take_any(rig.jobs.lists("arm"), for_rq=True)).attempt
        assert (attempt.key, attempt.job_id, attempt.owns_job) == (seeded.key, job_id, True)
        assert rig.client.hget(f"{rig.jobs.job_prefix}{job_id}", "status") == b"queued"
        ticket = rig.ticket(attempt.request)
        call = {
            "complete": lambda attempt=attempt: rig.complete(attempt),
            "retry": lambda attempt=attempt, ticket=ticket: rig.retry(attempt, ticket),
            "release": lambda attempt=attempt, ticket=ticket: rig.calls.release(attempt, ticket),
        }[end]()
        rig.reply(call)
        assert not rig.client.exists(f"{rig.jobs.job_prefix}{job_id}")
        rig.client.delete(*rig.jobs.lists("arm"))


def test_a_second_ticket_of_what_an_rq_worker_runs_does_not_cost_it_its_job(rig: Rig) -> None:
    rig.seed("pending")
    (job_id,) = rig.waiting()[1]
    lists = rig.jobs.lists("arm")
    assert rig.ask(rig.take_any(lists, for_rq=True)).attempt is not None
    rig.client.rpush(lists[1], job_id)
    assert rig.ask(rig.take_any(lists, for_rq=True)).reason == "empty"
    assert rig.client.exists(f"{rig.jobs.job_prefix}{job_id}")


def test_an_rq_worker_that_is_suspended_takes_nothing(rig: Rig) -> None:
    rig.seed("pending")
    lists = rig.jobs.lists("arm")
    rig.client.set(rig.jobs.suspended, 1)
    before = stored(rig)
    assert rig.ask(rig.take_any(lists, for_rq=True)).reason == "suspended"
    assert stored(rig) == before
    assert isinstance(rig.ask(rig.take()), Attempt), "the pull interface is no worker of RQ"


def test_a_take_without_lists_finds_only_what_the_same_execution_took(rig: Rig) -> None:
    """How the parent of a dead process learns what that had taken."""
    seeded = rig.seed("pending")
    lists = rig.jobs.lists("arm")
    assert rig.ask(rig.take_any((), "horse.1", for_rq=True)).attempt is None
    attempt = rig.ask(rig.take_any(lists, "horse.1", for_rq=True)).attempt
    rig.client.set(rig.jobs.suspended, 1)
    found = rig.ask(rig.take_any((), "horse.1", for_rq=True))
    assert (found.attempt.key, found.attempt.token, found.list) == (seeded.key, attempt.token, "")
    assert rig.ask(rig.take_any((), "horse.2", for_rq=True)).attempt is None


@pytest.mark.parametrize("end", ["complete", "fail", "release", "cancel"])
def test_an_execution_starts_once(rig: Rig, end: str) -> None:
    """A take of it that was sent before, behind an empty list, may come when what it is for has ended."""
    lists = rig.jobs.lists("arm")
    rig.seed("pending", "/first")
    attempt = rig.ask(rig.take_any(lists, "horse.1", for_rq=True)).attempt
    rig.seed("pending", "/second")
    ends = {
        "complete": lambda: rig.complete(attempt),
        "fail": lambda: rig.fail(attempt),
        "release": lambda: rig.calls.release(attempt, rig.front_ticket(attempt.request)),
        "cancel": lambda: rig.calls.cancel(attempt.key),
    }
    rig.reply(ends[end]())
    before = stored(rig)
    assert rig.ask(rig.take_any(lists, "horse.1", for_rq=True)).reason == "spent"
    assert rig.ask(rig.take_any(lists, "horse.1", for_rq=True, is_last=True)).reason == "spent"
    assert stored(rig) == before, "a refusal writes nothing"
    assert rig.ask(rig.take_any(lists, "horse.2", for_rq=True)).attempt is not None


def test_an_execution_starts_nothing_behind_a_later_one_of_its_taker(rig: Rig) -> None:
    """It may have waited behind another list for as long as that was empty, while the worker was busy with this one."""
    lists = rig.jobs.lists("arm")
    for number in (2, 10):
        rig.seed("pending", f"/{number}")
        rig.reply(rig.complete(rig.ask(rig.take_any(lists, f"horse.{number}", for_rq=True)).attempt))
    rig.seed("pending", "/waits")
    before = stored(rig)
    for is_last in (False, True):
        assert rig.ask(rig.take_any(lists, "horse.2", for_rq=True, is_last=is_last)).reason == "spent"
    assert stored(rig) == before, "a refusal writes nothing"
    assert rig.ask(rig.take_any(lists, "other.2", for_rq=True)).attempt is not None


def test_an_execution_that_is_given_up_starts_nothing(rig: Rig) -> None:
    """Whichever comes first, what a dead horse has sent or the question of its parent: nothing is taken in between."""
    lists = rig.jobs.lists("arm")
    assert rig.ask(rig.take_any((), "horse.1", for_rq=True, is_last=True)).reason == "empty"
    rig.seed("pending")
    assert rig.ask(rig.take_any(lists, "horse.1", for_rq=True)).reason == "spent"
    attempt = rig.ask(rig.take_any(lists, "horse.2", for_rq=True)).attempt
    found = rig.ask(rig.take_any((), "horse.2", for_rq=True, is_last=True))
    assert found.attempt.token == attempt.token


def test_two_takers_of_one_worker_do_not_forget_each_other(rig: Rig) -> None:
    rig.seed("pending", "/a")
    rig.seed("pending", "/b")
    lists = rig.jobs.lists("arm")
    calls = [rig.calls.take(lists, f"x.{lane}", f"w/{lane}", "w", 60_000, for_rq=True) for lane in (0, 1)]
    first = [rig.ask(call).attempt.key for call in calls]
    again = [rig.ask(call).attempt.key for call in calls]
    assert first == again
    assert len(set(first)) == 2


@pytest.mark.parametrize("state", ["failed", "quarantined"])
def test_the_ticket_of_a_failed_request_starts_it_anew_for_a_taker_too(rig: Rig, state: str) -> None:
    """What `rq requeue` does."""
    seeded = rig.seed(state)
    rig.client.hset(rig.keys.status(seeded.key), mapping={"crashes": 2, "retries": 1})
    job_id = rig.record(seeded.key)["job_id"]
    (_, default, _) = rig.jobs.lists("arm")
    rig.client.delete(default)
    rig.client.rpush(default, job_id)
    attempt = rig.ask(rig.take_any(rig.jobs.lists("arm"), for_rq=True)).attempt
    assert (attempt.key, attempt.crashes, attempt.retries, attempt.job_id) == (seeded.key, 0, 0, job_id)
    assert rig.client.ttl(rig.keys.status(seeded.key)) == -1
    rig.reply(rig.complete(attempt))
    audit(rig.client, rig.keys)


def test_a_duplicate_ticket_starts_nothing(rig: Rig) -> None:
    seeded = rig.seed("pending")
    (_, default, _) = rig.jobs.lists("arm")
    rig.client.rpush(default, seeded.job_id, seeded.job_id)
    assert isinstance(rig.ask(rig.take()), Attempt)
    assert isinstance(rig.ask(rig.take()), str)
    assert rig.word(rig.start(seeded.key, seeded.job_id)) == "superseded"
    assert rig.record(seeded.key)["attempts"] == "1"


def test_a_retry_with_new_arguments_hands_them_to_the_next_attempt(rig: Rig) -> None:
    seeded = rig.seed("mine")
    kwargs = packing.pack({"page": 2})
    rig.reply(rig.retry(seeded.attempt, rig.ticket(seeded.request), kwargs=kwargs))
    again = rig.ask(rig.take())
    assert (again.kwargs, again.number, again.retries) == ({"page": 2}, 2, 1)
    rig.reply(rig.retry(again, rig.ticket(seeded.request)))
    assert rig.ask(rig.take()).kwargs == {"page": 2}


def test_a_released_attempt_counts_for_nothing_and_is_next(rig: Rig) -> None:
    first = rig.seed("mine", "/first")
    rig.seed("pending", "/second")
    rig.reply(rig.calls.release(first.attempt, rig.front_ticket(first.request)))
    assert rig.line()[0] == first.key
    again = rig.ask(rig.take())
    assert (again.key, again.number, again.retries, again.crashes) == (first.key, 1, 0, 0)


# -- wake-ups


def woken(pubsub: Any) -> list[tuple[str, str]]:
    """Channel and state of what was published so far; ``bell`` closes the list."""
    heard = []
    while True:
        message = pubsub.get_message(ignore_subscribe_messages=True, timeout=10)
        if message is None:
            continue
        if message["channel"] == b"arm:done:bell":
            return heard
        heard.append((message["channel"].decode(), message["data"].decode().partition(":")[0]))


@pytest.mark.parametrize(
    ("verb", "variant", "state", "word"),
    [
        ("complete", "mine", "mine", "completed"),
        ("fail", "mine", "mine", "failed"),
        ("cancel", "-", "pending", "cancelled"),
        ("cancel", "-", "mine", "cancelled"),
        ("put", "new", "pending", "completed"),
        ("forget", "-", "completed", "unknown"),
        ("complete", "other", "mine", None),
        ("fail", "mine", "other", None),
        ("cancel", "-", "failed", None),
        ("retry", "mine", "mine", None),
        ("crash", "clock", "lapsed", None),
    ],
)
def test_an_end_wakes_who_waits_once_and_nothing_else_does(
    rig: Rig, verb: str, variant: str, state: str, word: str | None
) -> None:
    seeded = rig.seed(state, REQUEST)
    call = call_of(rig, verb, variant, seeded)
    with rig.client.pubsub() as pubsub:
        pubsub.psubscribe("arm:done:*")
        assert pubsub.get_message(timeout=10)["type"] == "psubscribe"
        rig.reply(call)
        rig.reply(call)
        rig.client.publish("arm:done:bell", "")
        assert woken(pubsub) == ([(f"arm:done:{seeded.key}", word)] if word else [])


@pytest.mark.parametrize(("size", "is_told"), [(0, True), (900, True), (1024, False), (200_000, False)])
@pytest.mark.parametrize("how", ["complete", "put"])
def test_a_small_result_goes_with_the_wake_up(redis_client: redis.Redis, how: str, size: int, is_told: bool) -> None:
    rig = Rig(redis_client, inline_bytes=100_000, chunk_bytes=100_000)
    value = os.urandom(size)
    rig.seed("pending", REQUEST)
    attempt = rig.ask(rig.take())
    with rig.client.pubsub() as pubsub:
        pubsub.subscribe(f"arm:done:{REQUEST.key}")
        assert pubsub.get_message(timeout=10)["type"] == "subscribe"
        if how == "complete":
            rig.run(flows.finish(rig.core, attempt, value))
        else:
            rig.run(flows.put(rig.core, REQUEST, value))
        said = pubsub.get_message(timeout=10)["data"]
    found = Calls.told(REQUEST.key, said)
    assert len(said) < 1100
    assert (found is not None) == is_told
    assert is_told or said == b"completed"
    assert found is None or (found.stored is not None and found.stored.value() == value)


def test_the_last_crash_wakes_who_waits(rig: Rig) -> None:
    call = last_crash(rig)
    with rig.client.pubsub() as pubsub:
        pubsub.psubscribe("arm:done:*")
        assert pubsub.get_message(timeout=10)["type"] == "psubscribe"
        rig.reply(call)
        rig.client.publish("arm:done:bell", "")
        assert woken(pubsub) == [(f"arm:done:{REQUEST.key}", "failed")]


# -- traces


def test_a_new_claim_keeps_the_trace_of_its_submit_until_it_has_a_result(rig: Rig) -> None:
    def traced(context: str) -> Call[Any]:
        return rig.calls.submit(REQUEST, rig.core.identify(REQUEST), rig.ticket(REQUEST), trace=context, again=True)

    assert rig.word(traced("00-1-2-01")) == "new"
    assert rig.word(traced("00-5-6-01")) == "joined"
    first = rig.ask(rig.take())
    assert isinstance(first, Attempt)
    assert first.trace == "00-1-2-01"
    assert (first.request.uri, first.request.tags, first.key) == (REQUEST.uri, REQUEST.tags, REQUEST.key)
    assert rig.word(rig.retry(first, rig.ticket(REQUEST))) == "retried"
    second = rig.ask(rig.start(first.key, rig.record(first.key)["job_id"]))
    assert isinstance(second, Attempt)
    assert second.trace == "00-1-2-01"
    assert rig.word(rig.complete(second)) == "stored"
    assert "trace" not in rig.record(first.key)


@pytest.mark.parametrize("traced", [True, False])
def test_a_follow_up_belongs_to_the_trace_of_what_made_it(rig: Rig, traced: bool) -> None:
    rig.word(rig.calls.submit(REQUEST, rig.core.identify(REQUEST), rig.ticket(REQUEST), trace="00-1-2-01 a=b"))
    attempt = rig.ask(rig.take())
    assert isinstance(attempt, Attempt)
    if traced:
        assert rig.word(rig.calls.trace(attempt, "00-3-4-01")) == "traced"
    follow_up = followups._of_attempt(rig.core, FollowUp.CALLBACK, attempt)
    encoded = codec.encode(1, rig.settings)
    call = rig.calls.complete(attempt, encoded.envelope, encoded.inline, sticky=False, ttl_ms=0, follow_up=follow_up)
    assert rig.word(call) == "stored"
    assert rig.record(follow_up.identity.key)["trace"] == ("00-3-4-01" if traced else "00-1-2-01 a=b")
    assert rig.record(attempt.key).get("traced") == ("1:00-3-4-01" if traced else None)
    assert "trace" not in rig.record(attempt.key)


def test_the_end_of_a_traced_execution_takes_the_contexts_of_the_joiners_away(rig: Rig) -> None:
    attempt = rig.begin(REQUEST)
    name = rig.named("traces", key=attempt.key)
    assert rig.word(rig.calls.link(attempt.key, "00-1-2-01")) == "left"
    rig.client.sadd(name, "12345 00-8-9-01")
    call = rig.calls.trace(attempt, "00-3-4-01")
    assert call.parse(rig.reply(call)) == ["00-1-2-01"], "what is left of another claim does not count"
    assert rig.word(rig.complete(attempt)) == "stored"
    assert not rig.client.exists(name)
