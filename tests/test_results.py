"""Results on real servers: hits, how long they live, pieces, and how they are cleared."""

from __future__ import annotations

import os
from typing import Any

import pytest
import redis
from audit import audit
from drive import ERROR, Rig, snapshot
from transitions import REQUEST, stored

from rqarm import flows
from rqarm.browse import cached
from rqarm.calls import Call
from rqarm.errors import RqarmError
from rqarm.model import Key, State
from rqarm.request import BatchRequest

# -- hits


def expiry(rig: Rig, key: Key) -> set[int]:
    """The moments at which the record and the result of a request expire."""
    return {rig.client.pexpiretime(rig.keys.status(key)), rig.client.pexpiretime(rig.named("result", key=key))}


def test_a_hit_makes_a_result_sticky_and_no_hit_makes_it_temporary_again(rig: Rig) -> None:
    seeded = rig.seed("completed")
    assert rig.word(rig.submit(BatchRequest("/slow", sticky=True))) == "hit"
    assert expiry(rig, seeded.key) == {-1}
    audit(rig.client, rig.keys)
    before = stored(rig)
    for weaker in (BatchRequest("/slow"), BatchRequest("/slow", ttl=1), BatchRequest("/slow", ttl=10**8)):
        assert rig.word(rig.submit(weaker)) == "hit"
    assert stored(rig) == before


def test_a_hit_lengthens_the_life_of_a_result_and_never_shortens_it(rig: Rig) -> None:
    seeded = rig.seed("completed")
    (first,) = expiry(rig, seeded.key)
    assert rig.word(rig.submit(BatchRequest("/slow", ttl=10))) == "hit"
    assert expiry(rig, seeded.key) == {first}
    assert rig.word(rig.submit(BatchRequest("/slow", ttl=2 * 86_400))) == "hit"
    ended = int(rig.record(seeded.key)["ended_ms"])
    assert expiry(rig, seeded.key) == {ended + 2 * 86_400_000}
    audit(rig.client, rig.keys)


def test_a_hit_upgrades_every_piece_of_a_large_result(redis_client: redis.Redis) -> None:
    rig = Rig(redis_client, inline_bytes=10, chunk_bytes=1_000)
    rig.run(flows.put(rig.core, "/big", os.urandom(2_500)))
    assert rig.word(rig.submit(BatchRequest("/big", sticky=True))) == "hit"
    audit(rig.client, rig.keys)
    assert {rig.client.pexpiretime(name) for name in rig.client.keys("arm:chunk:*")} == {-1}


# -- TTLs


@pytest.mark.parametrize(
    ("asked_s", "route_ms", "life_ms"), [(None, 0, 86_400_000), (None, 60_000, 60_000), (30, 60_000, 30_000)]
)
def test_the_request_the_route_and_the_manager_say_in_this_order_how_long_a_result_lives(
    rig: Rig, asked_s: float | None, route_ms: int, life_ms: int
) -> None:
    request = BatchRequest("/slow", ttl=asked_s)
    attempt = rig.begin(request)
    rig.reply(rig.complete(attempt, ttl_ms=route_ms))
    assert expiry(rig, request.key) == {int(rig.record(request.key)["ended_ms"]) + life_ms}


def test_a_ttl_that_a_request_asks_for_wins_over_a_sticky_route(rig: Rig) -> None:
    attempt = rig.begin(BatchRequest("/slow", ttl=30))
    rig.reply(rig.complete(attempt, sticky=True))
    assert rig.record(attempt.key)["sticky"] == "0"
    audit(rig.client, rig.keys)


def test_nothing_expires_before_the_end_and_all_of_a_result_at_one_moment(redis_client: redis.Redis) -> None:
    rig = Rig(redis_client, inline_bytes=10, chunk_bytes=1_000)
    seeded = rig.seed("mine")
    rig.reply(rig.submit(seeded.request, payload=b"p"))
    in_flight = {name: entry[2] for name, entry in snapshot(rig.client).items() if name.startswith("arm:")}
    assert set(in_flight.values()) == {-1}
    rig.run(flows.finish(rig.core, seeded.attempt, os.urandom(2_500)))
    deadline = {entry[2] for name, entry in snapshot(rig.client).items() if str(seeded.key) in name}
    assert len(deadline) == 1
    assert len(rig.client.keys("arm:chunk:*")) == 3
    assert deadline == expiry(rig, seeded.key)
    audit(rig.client, rig.keys)


@pytest.mark.parametrize("state", ["completed", "evicted", "failed", "cancelled"])
def test_a_new_claim_after_an_end_expires_no_more(rig: Rig, state: str) -> None:
    seeded = rig.seed(state)
    if state == "failed":
        assert rig.client.pttl(rig.keys.status(seeded.key)) > 0
    assert rig.word(rig.submit(seeded.request, again=True)) == "new"
    audit(rig.client, rig.keys)
    assert not rig.client.exists(rig.named("result", key=seeded.key))


@pytest.mark.parametrize("how", ["submit", "ticket"])
def test_payloads_of_a_failed_request_outlive_it_when_it_runs_again(rig: Rig, how: str) -> None:
    seeded = rig.seed("mine")
    rig.reply(rig.submit(seeded.request, payload=b"p"))
    rig.reply(rig.fail(seeded.attempt))
    callbacks = rig.named("callbacks", key=seeded.key)
    assert rig.client.pttl(callbacks) > 0
    rig.reply(rig.submit(seeded.request) if how == "submit" else rig.start(seeded.key, seeded.job_id))
    assert rig.client.pttl(callbacks) == -1
    assert rig.client.hgetall(callbacks) == {b"p": b"p"}
    audit(rig.client, rig.keys, lost=[seeded.key])


def test_a_failed_record_outlives_its_negative_answer(rig: Rig) -> None:
    attempt = rig.begin(BatchRequest("/slow"))
    rig.reply(rig.calls.fail(attempt, ERROR, failure_ttl_ms=1_000, negative_ms=3_600_000))
    assert rig.client.pttl(rig.keys.status(attempt.key)) > 3_000_000


def test_an_evicted_sticky_result_leaves_the_indexes_with_the_next_claim(rig: Rig) -> None:
    seeded = rig.seed("sticky")
    rig.evict(seeded.key)
    assert rig.word(rig.submit(seeded.request)) == "new"
    assert rig.client.zcard(rig.named("results")) == 0
    rig.reply(rig.fail(rig.ask(rig.take())))
    stats = rig.ask(rig.calls.stats())
    assert (stats.sticky, stats.bytes) == (0, 0)
    audit(rig.client, rig.keys)


# -- large results


def test_a_torn_result_is_refused_and_leaves_the_attempt_as_it_was(redis_client: redis.Redis) -> None:
    rig = Rig(redis_client, inline_bytes=10, chunk_bytes=1_000)
    seeded = rig.seed("mine")
    staged = []
    flow = flows.finish(rig.core, seeded.attempt, os.urandom(2_500))
    step = flow.send(None)
    while not isinstance(step, Call):
        staged.append(step)
        step = flow.send(rig.ask(step))
    rig.client.delete(staged[1].argv[1])
    before = stored(rig)
    with pytest.raises(RqarmError, match="1 pieces"):
        rig.ask(step)
    assert stored(rig) == before
    rig.ask(staged[1])
    assert rig.word(step) == "stored", "written again, it is committed"


def test_a_new_result_takes_the_pieces_of_the_old_one_with_it(redis_client: redis.Redis) -> None:
    rig = Rig(redis_client, inline_bytes=10, chunk_bytes=1_000)
    rig.run(flows.put(rig.core, "/big", os.urandom(2_500)))
    old = set(rig.client.keys("arm:chunk:*"))
    rig.run(flows.put(rig.core, "/big", os.urandom(1_500)))
    assert not old & set(rig.client.keys("arm:chunk:*"))
    audit(rig.client, rig.keys)
    rig.run(flows.forget(rig.core, BatchRequest("/big").key))
    assert rig.client.keys("arm:chunk:*") == []
    audit(rig.client, rig.keys)


@pytest.mark.parametrize("value", ["small", b"x" * 200])
def test_a_put_sent_again_counts_its_bytes_once(redis_client: redis.Redis, value: Any) -> None:
    rig = Rig(redis_client)
    call = rig.put(REQUEST, "owner", value)
    rig.reply(call)
    once = rig.ask(rig.calls.stats()).bytes
    assert once > 0
    rig.reply(call)
    assert rig.ask(rig.calls.stats()).bytes == once
    audit(rig.client, rig.keys)


# -- clear


def test_clear_temporary_leaves_sticky_results_and_what_is_in_flight(rig: Rig) -> None:
    seeded = {state: rig.seed(state, f"/{state}") for state in ("completed", "sticky", "mine", "failed")}
    assert rig.run(cached.clear(rig.core, None, None, temporary_only=True)) == 1
    states = {state: rig.state(each.key) for state, each in seeded.items()}
    assert states == {
        "completed": State.UNKNOWN,
        "sticky": State.COMPLETED,
        "mine": State.IN_PROGRESS,
        "failed": State.FAILED,
    }
    audit(rig.client, rig.keys)
    assert rig.run(cached.clear(rig.core, None, None, temporary_only=False)) == 1
    assert rig.client.zcard(rig.named("results")) == 0
    audit(rig.client, rig.keys)


def test_clear_works_through_more_than_one_step(rig: Rig) -> None:
    for n in range(230):
        rig.reply(rig.put(BatchRequest(f"/{n}"), f"owner{n}"))
    assert rig.run(cached.clear(rig.core, None, None, temporary_only=False)) == 230
    audit(rig.client, rig.keys)
