"""Redirects: aliases in flight and completed, chains that meet, what ends them, what heals them."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import managers
import pytest
import redis
import servers
from audit import audit
from bench import Bench
from drive import Rig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from managers import Threads, round_trips, threads
from servers import eventually
from workers import crew

from rqarm import (
    BatchRequest,
    Context,
    InvalidRequest,
    RequestCancelled,
    RequestFailed,
    ResultNotReady,
    State,
    connect,
    embedded,
    flows,
    redirects,
)
from rqarm.browse import cached
from rqarm.context import Redirected
from rqarm.errors import AliasesFull, LeaseLost, RedirectLoop, Refused
from rqarm.model import Key, Outcome, Priority
from rqarm.replies import Attempt

APP = Path(__file__).parent / "redirect_app.py"
LARGE = os.urandom(300_000)


@pytest.fixture
def rig(redis_client: redis.Redis) -> Iterator[Rig]:
    made = Rig(redis_client)
    yield made
    audit(redis_client, made.keys)


def begin(rig: Rig, uri: str, **options: Any) -> Attempt:
    return rig.begin(BatchRequest(uri, **options))


def link(rig: Rig, chain: str, **options: Any) -> dict[str, Attempt]:
    """``A>B>C``: each leads to the next, in this order; the last one runs."""
    attempts: dict[str, Attempt] = {}
    names = chain.split(">")
    for name in names:
        attempts[name] = begin(rig, f"/{name}", **options)
    for name, target in itertools.pairwise(names):
        assert rig.word(rig.redirect(attempts[name], key(target))) == "linked"
    return attempts


def key(name: str) -> Key:
    return BatchRequest(f"/{name}").key


def value_of(rig: Rig, name: str) -> Any:
    return rig.run(flows.result(rig.core, key(name)))


def states(rig: Rig, names: str) -> set[State]:
    return {rig.state(key(name)) for name in names}


# -- chains


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(order=st.permutations(["A>B", "B>C", "C>D", "F>E", "E>B"]))
def test_chains_that_meet_share_one_result_whatever_the_order_of_the_links(rig: Rig, order: list[str]) -> None:
    rig.client.flushall()
    attempts = {name: begin(rig, f"/{name}") for name in "ABCDEF"}
    for each in order:
        name, target = each.split(">")
        assert rig.word(rig.redirect(attempts[name], key(target))) == "linked"
    for name in "ABCEF":
        status = rig.run(flows.status(rig.core, key(name)))
        assert (status.state, status.redirect) == (State.PENDING, key("D"))
    assert rig.word(rig.complete(attempts["D"], "once")) == "stored"
    assert [value_of(rig, name) for name in "ABCDEF"] == ["once"] * 6
    assert len(rig.client.keys("arm:result:*")) == 1
    for name in "ABCEF":
        status = rig.run(flows.submit(rig.core, f"/{name}"))
        assert (status.outcome, status.value, status.redirect) == (Outcome.HIT, "once", key("D"))
        assert status.to_dict()["redirect"] == key("D")


def test_a_large_result_is_read_through_every_alias(redis_client: redis.Redis) -> None:
    rig = Rig(redis_client, inline_bytes=1_000, chunk_bytes=100_000)
    attempts = link(rig, "A>B>C")
    rig.run(flows.finish(rig.core, attempts["C"], LARGE))
    assert [value_of(rig, name) for name in "ABC"] == [LARGE] * 3
    assert rig.run(flows.get(rig.core, "/A")) == LARGE
    assert rig.run(flows.result_bytes(rig.core, key("B"))) == LARGE


@pytest.mark.parametrize("how", ["complete", "put"])
def test_every_uri_of_a_chain_is_woken_once(rig: Rig, how: str) -> None:
    attempts = link(rig, "A>B>C")
    with rig.client.pubsub() as pubsub:
        pubsub.psubscribe("arm:done:*")
        assert pubsub.get_message(timeout=5) is not None
        rig.ask(rig.complete(attempts["C"]) if how == "complete" else rig.put(BatchRequest("/C"), "owner"))
        heard = [pubsub.get_message(timeout=5) for _ in "ABC"]
        assert sorted(message["channel"].decode() for message in heard) == sorted(f"arm:done:{key(n)}" for n in "ABC")
        assert {message["data"].partition(b":")[0] for message in heard} == {b"completed"}
        assert pubsub.get_message(timeout=0.1) is None


def test_a_redirect_to_what_is_cached_ends_at_once(rig: Rig) -> None:
    rig.ask(rig.complete(begin(rig, "/B"), "there"))
    assert rig.word(rig.redirect(begin(rig, "/A"), key("B"))) == "aliased"
    assert value_of(rig, "A") == "there"


def test_a_redirect_to_an_alias_leads_to_its_root(rig: Rig) -> None:
    attempts = link(rig, "B>C")
    rig.ask(rig.complete(attempts["C"], "there"))
    assert rig.word(rig.redirect(begin(rig, "/A"), key("B"))) == "aliased"
    assert rig.run(flows.status(rig.core, key("A"))).redirect == key("C")


def test_who_led_to_a_request_that_is_led_to_a_cached_one_is_completed_too(rig: Rig) -> None:
    rig.ask(rig.complete(begin(rig, "/C"), "there"))
    attempts = link(rig, "A>B")
    assert rig.word(rig.redirect(attempts["B"], key("C"))) == "aliased"
    assert [value_of(rig, name) for name in "AB"] == ["there"] * 2


def test_a_root_keeps_its_aliases_over_retry_release_crash_and_a_takeover(rig: Rig) -> None:
    attempt = link(rig, "A>B")["B"]
    request = BatchRequest("/B")
    for end in ("retry", "release", "crash"):
        if end == "retry":
            rig.ask(rig.retry(attempt, rig.ticket(request)))
        elif end == "release":
            rig.ask(rig.calls.release(attempt, rig.front_ticket(request)))
        else:
            rig.ask(rig.crash(attempt.key, attempt.token, rig.ticket(request)))
        assert rig.word(rig.submit(BatchRequest("/A"))) == "joined"
        attempt = rig.ask(rig.take())
    rig.lapse(attempt.key)
    assert rig.word(rig.submit(request)) == "new"
    rig.ask(rig.complete(rig.ask(rig.take()), "late"))
    assert value_of(rig, "A") == "late"


# -- ends without a result


def test_a_failure_is_that_of_every_alias_and_each_lasts_as_its_route_says(rig: Rig) -> None:
    attempts = {name: begin(rig, f"/{name}") for name in "ABC"}
    for name, target, ttl_ms in (("A", "B", 10_000), ("B", "C", 50_000)):
        rig.ask(rig.calls.redirect(attempts[name], key(target), failure_ttl_ms=ttl_ms))
    rig.ask(rig.fail(attempts["C"], negative_ms=5_000))
    for name, ttl_ms in (("A", 10_000), ("B", 50_000)):
        status = rig.run(flows.status(rig.core, key(name)))
        assert (status.state, status.error["message"], status.redirect) == (State.FAILED, "it did not work", key("C"))
        assert ttl_ms - 5_000 < rig.client.pttl(rig.keys.status(key(name))) <= ttl_ms
        assert rig.word(rig.submit(BatchRequest(f"/{name}"))) == "negative"


def test_a_root_that_kills_its_workers_fails_its_aliases(rig: Rig) -> None:
    attempt = link(rig, "A>B")["B"]
    for _ in range(rig.settings.max_attempts - 1):
        rig.ask(rig.crash(attempt.key, attempt.token, rig.ticket(attempt.request)))
        attempt = rig.ask(rig.take())
    assert rig.word(rig.crash(attempt.key, attempt.token, rig.ticket(attempt.request))) == "quarantined"
    assert states(rig, "AB") == {State.FAILED}
    with pytest.raises(RequestFailed, match="it did not work"):
        value_of(rig, "A")


def test_a_cancelled_root_cancels_its_aliases_and_a_cancelled_alias_nobody(rig: Rig) -> None:
    attempts = link(rig, "A>B>C>D")
    rig.ask(rig.calls.cancel(key("B")))
    assert (states(rig, "B"), states(rig, "AC")) == ({State.CANCELLED}, {State.PENDING})
    assert rig.run(flows.status(rig.core, key("A"))).redirect == key("D")
    rig.ask(rig.calls.cancel(key("D")))
    assert states(rig, "ABCD") == {State.CANCELLED}
    with pytest.raises(RequestCancelled):
        value_of(rig, "A")
    assert rig.word(rig.complete(attempts["D"])) == "lost"


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_a_target_that_ended_between_the_two_steps_ends_the_request_likewise(rig: Rig, end: str) -> None:
    target = begin(rig, "/B")
    rig.ask(rig.fail(target) if end == "failed" else rig.calls.cancel(target.key))
    assert rig.word(rig.redirect(begin(rig, "/A"), key("B"))) == end
    assert rig.state(key("A")) == end
    assert ("error" in rig.record(key("A"))) == (end == "failed")


def test_an_alias_that_failed_runs_anew_when_it_is_submitted(rig: Rig) -> None:
    rig.ask(rig.fail(link(rig, "A>B")["B"]))
    assert rig.word(rig.submit(BatchRequest("/A"))) == "new"
    assert "alias" not in rig.record(key("A"))


# -- wishes


def test_a_request_brings_its_wishes_and_payloads_to_its_root(rig: Rig) -> None:
    rig.ask(rig.submit(BatchRequest("/A", ttl=7200), payload=b"one"))
    first = rig.ask(rig.take())
    second = begin(rig, "/B")
    root = begin(rig, "/C", ttl=60)
    rig.ask(rig.redirect(first, second.key))
    rig.ask(rig.submit(BatchRequest("/A"), payload=b"two"))
    rig.ask(rig.redirect(second, root.key))
    rig.ask(rig.submit(BatchRequest("/A", ttl=9000), payload=b"one"))
    rig.ask(rig.submit(BatchRequest("/B"), payload=b"three"))
    payloads = rig.client.hgetall(rig.named("callbacks", key=root.key))
    assert set(payloads.values()) == {b"one", b"two", b"three"}
    assert len(rig.client.keys("arm:callbacks:*")) == 1
    rig.ask(rig.complete(root))
    ends = {rig.client.pexpiretime(rig.keys.status(key(name))) for name in "ABC"}
    assert len(ends) == 1
    assert ends.pop() - int(rig.record(root.key)["ended_ms"]) == 9_000_000


@pytest.mark.parametrize("who", ["joiner", "hit"])
def test_sticky_for_one_is_sticky_for_all(rig: Rig, who: str) -> None:
    attempts = link(rig, "A>B>C")
    if who == "joiner":
        assert rig.word(rig.submit(BatchRequest("/A", sticky=True))) == "joined"
    rig.ask(rig.complete(attempts["C"]))
    if who == "hit":
        assert rig.word(rig.submit(BatchRequest("/A", sticky=True))) == "hit"
    assert {rig.client.ttl(rig.keys.status(key(name))) for name in "ABC"} == {-1}
    assert {rig.record(key(name))["sticky"] for name in "ABC"} == {"1"}
    assert rig.run(cached.clear(rig.core, None, None, temporary_only=True)) == 0


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_a_hit_on_any_of_them_lengthens_all(rig: Rig, name: str) -> None:
    rig.ask(rig.complete(link(rig, "A>B>C")["C"]))
    before = rig.client.pexpiretime(rig.keys.status(key("A")))
    assert rig.word(rig.submit(BatchRequest(f"/{name}", ttl=500_000))) == "hit"
    ends = {rig.client.pexpiretime(rig.keys.status(key(other))) for other in "ABC"}
    assert len(ends) == 1
    assert ends.pop() > before
    assert rig.client.pexpiretime(rig.named("aliases", key=key("C"))) > before


def test_a_joiner_of_an_alias_with_a_better_priority_queues_nothing(rig: Rig) -> None:
    link(rig, "A>B")
    assert rig.word(rig.submit(BatchRequest("/A", priority="high"))) == "joined"
    assert rig.waiting() == [[], [], []]


def test_the_target_gets_the_wishes_of_the_attempt_where_it_does_not_say_better(rig: Rig) -> None:
    attempt = begin(rig, "/A", priority="high", ttl=100, queue="bulk")
    assert rig.run(redirects.redirected(rig.core, attempt, "/B")) is State.PENDING
    record = rig.record(key("B"))
    assert (record["priority"], record["ttl_ms"], record["queue"]) == ("0", "100000", "bulk")
    other = begin(rig, "/C", ttl=100, priority="low")
    target = BatchRequest("/D", {"x": ["1", "2"]}, sticky=True, queue="own", priority=Priority.DEFAULT, tags=["t"])
    assert rig.run(redirects.redirected(rig.core, other, target)) is State.PENDING
    record = rig.record(target.key)
    assert (record["priority"], record["sticky"], record["queue"]) == ("1", "1", "own")
    assert rig.run(flows.find(rig.core, target.key)).tags == ("t",)


# -- the end of a result


def test_forget_of_a_root_drops_its_aliases_and_of_an_alias_only_that(rig: Rig) -> None:
    rig.ask(rig.complete(link(rig, "A>B>C")["C"], "kept"))
    assert rig.run(flows.forget(rig.core, key("A")))
    assert (states(rig, "A"), states(rig, "BC")) == ({State.UNKNOWN}, {State.COMPLETED})
    assert value_of(rig, "B") == "kept"
    assert rig.run(flows.forget(rig.core, key("C")))
    assert states(rig, "ABC") == {State.UNKNOWN}
    assert rig.client.keys("arm:aliases:*") == rig.client.keys("arm:result*") == []


@pytest.mark.parametrize("how", ["clear", "clear_temporary", "resubmit", "put"])
def test_with_the_result_of_the_root_its_aliases_are_gone(rig: Rig, how: str) -> None:
    rig.ask(rig.complete(link(rig, "A>B>C")["C"]))
    if how in ("clear", "clear_temporary"):
        assert rig.run(cached.clear(rig.core, None, None, temporary_only=how != "clear")) == 3
    else:
        rig.ask(rig.submit(BatchRequest("/C"), again=True) if how == "resubmit" else rig.put(BatchRequest("/C"), "x"))
    assert states(rig, "AB") == {State.UNKNOWN}
    assert rig.word(rig.submit(BatchRequest("/A"))) == "new"


def test_an_alias_whose_root_was_evicted_is_a_miss_and_runs_anew(rig: Rig) -> None:
    rig.ask(rig.complete(link(rig, "A>B")["B"]))
    rig.evict(key("B"))
    assert rig.word(rig.submit(BatchRequest("/A"))) == "new"
    attempt = rig.ask(rig.take())
    assert rig.run(redirects.redirected(rig.core, attempt, "/B")) is State.PENDING
    rig.ask(rig.complete(rig.ask(rig.take()), "again"))
    assert value_of(rig, "A") == "again"


def test_an_evicted_set_of_aliases_costs_nothing_but_the_upgrade(rig: Rig) -> None:
    rig.ask(rig.complete(link(rig, "A>B")["B"], "there"))
    rig.client.delete(rig.named("aliases", key=key("B")))
    assert rig.run(flows.submit(rig.core, "/A")).value == "there"
    rig.run(flows.forget(rig.core, key("B")))
    assert rig.word(rig.submit(BatchRequest("/A"))) == "new"


def test_a_set_that_was_to_expire_does_not_when_somebody_in_flight_enters_it(rig: Rig) -> None:
    rig.ask(rig.complete(link(rig, "A>B")["B"]))
    rig.client.delete(rig.keys.status(key("B")))
    rig.run(cached.clear(rig.core, None, None, temporary_only=False))
    rig.client.sadd(rig.named("aliases", key=key("B")), key("A"))
    rig.client.expire(rig.named("aliases", key=key("B")), 1_000)
    root = begin(rig, "/B")
    rig.ask(rig.redirect(begin(rig, "/C"), root.key))
    assert rig.client.ttl(rig.named("aliases", key=root.key)) == -1
    rig.ask(rig.complete(root, "new"))
    assert value_of(rig, "C") == "new"


def test_a_put_that_is_said_twice_keeps_the_aliases_of_its_request(rig: Rig) -> None:
    begin(rig, "/root")
    rig.ask(rig.redirect(begin(rig, "/alias"), BatchRequest("/root").key))
    put = rig.put(BatchRequest("/root"), "owner")
    assert [rig.word(put), rig.word(put)] == ["stored", "stored"]
    audit(rig.client, rig.keys)
    rig.ask(rig.calls.forget(BatchRequest("/root").key))
    assert rig.state(BatchRequest("/alias").key) is State.UNKNOWN


def test_a_result_put_for_an_alias_is_its_own(rig: Rig) -> None:
    attempt = link(rig, "A>B")["B"]
    rig.ask(rig.put(BatchRequest("/A"), "owner", "mine"))
    rig.ask(rig.complete(attempt, "theirs"))
    assert (value_of(rig, "A"), value_of(rig, "B")) == ("mine", "theirs")


# -- healing


def lose_record(rig: Rig) -> None:
    rig.client.delete(rig.keys.status(key("B")))
    rig.client.zrem(rig.named("leases"), key("B"))


def lose_all_of_it(rig: Rig) -> None:
    lose_record(rig)
    rig.client.delete(rig.named("aliases", key=key("B")))


def end_unseen(rig: Rig) -> None:
    """As a version without redirects would end it."""
    rig.client.hset(rig.keys.status(key("B")), "state", "failed")
    rig.client.hdel(rig.keys.status(key("B")), "token", "exec", "lease_until")
    rig.client.zrem(rig.named("leases"), key("B"))
    rig.client.zadd(rig.named("ended", state="failed"), {key("B"): 1})
    rig.client.delete(rig.named("aliases", key=key("B")))


@pytest.mark.parametrize("lose", [lose_record, lose_all_of_it, end_unseen])
@pytest.mark.parametrize("who", ["sweep", "submit"])
def test_an_alias_whose_root_is_gone_runs_again(rig: Rig, lose: Any, who: str) -> None:
    attempts = link(rig, "A>B")
    lose(rig)
    if who == "sweep":
        assert rig.run(flows.sweep(rig.core)) == 0, "a lease of patience"
        rig.age(key("A"))
        assert rig.run(flows.sweep(rig.core)) == 1
        assert rig.run(flows.sweep(rig.core)) == 0
    else:
        assert rig.word(rig.submit(BatchRequest("/A"))) == "new"
    attempt = rig.ask(rig.take())
    assert (attempt.key, attempt.number) == (key("A"), 2)
    assert rig.word(rig.redirect(attempts["A"], key("B"))) == "lost"
    assert "alias" not in rig.record(key("A"))


def test_the_sweep_leaves_alone_what_leads_to_something_in_flight(rig: Rig) -> None:
    link(rig, "A>B")
    rig.age(key("A"))
    assert rig.run(flows.sweep(rig.core)) == 0
    score = rig.client.zscore(rig.named("redirected"), key("A"))
    assert score == pytest.approx(int(rig.client.time()[0]) * 1000, abs=60_000), "its turn is a lease later"


def test_a_deleted_root_that_is_submitted_again_answers_for_its_aliases(rig: Rig) -> None:
    link(rig, "A>B")
    lose_record(rig)
    assert rig.word(rig.submit(BatchRequest("/B"))) == "new"
    assert rig.word(rig.submit(BatchRequest("/A"))) == "joined"
    rig.ask(rig.complete(rig.ask(rig.take()), "after all"))
    assert value_of(rig, "A") == "after all"


def test_an_emptied_queue_heals_root_and_alias(rig: Rig) -> None:
    attempt = begin(rig, "/A")
    rig.ask(rig.submit(BatchRequest("/B")))
    rig.ask(rig.redirect(attempt, key("B")))
    for name in rig.jobs.lists("arm"):
        rig.client.delete(name)
    rig.client.delete(f"{rig.jobs.job_prefix}{rig.record(key('B'))['job_id']}")
    assert rig.word(rig.submit(BatchRequest("/A"))) == "new", "a dead root is a dead alias"
    assert rig.run(redirects.redirected(rig.core, rig.ask(rig.take()), "/B")) is State.PENDING
    rig.ask(rig.complete(rig.ask(rig.take()), "healed"))
    assert value_of(rig, "A") == "healed"


def test_a_duplicate_ticket_of_a_redirected_request_starts_nothing(rig: Rig) -> None:
    link(rig, "A>B")
    job_id = rig.record(key("A"))["job_id"]
    assert rig.word(rig.start(key("A"), job_id)) == "superseded"
    rig.client.rpush(rig.jobs.lists("arm")[1], job_id)
    assert rig.word(rig.take()) == "empty"


# -- loops


@pytest.mark.parametrize("chain", ["A", "A>B", "A>B>C>D"])
def test_a_loop_is_refused_by_name_and_writes_nothing(rig: Rig, chain: str) -> None:
    names = chain.split(">")
    attempts = link(rig, chain)
    last = attempts[names[-1]]
    with pytest.raises(RedirectLoop) as caught:
        rig.run(redirects.redirect(rig.core, last, f"/{names[0]}"))
    assert caught.value.chain == tuple(f"/{name}" for name in [names[-1], *names])
    assert rig.word(rig.complete(last, "still mine")) == "stored"
    assert [value_of(rig, name) for name in names] == ["still mine"] * len(names)


def test_a_loop_through_meeting_chains_is_seen(rig: Rig) -> None:
    attempts = link(rig, "A>B>D")
    other = link(rig, "F>E")
    assert rig.word(rig.redirect(other["E"], key("B"))) == "linked"
    with pytest.raises(RedirectLoop, match="/D -> /E -> /B -> /D"):
        rig.run(redirects.redirect(rig.core, attempts["D"], "/E"))


def test_secrets_in_the_chain_are_not_told(rig: Rig) -> None:
    attempt = begin(rig, "/A?token=hidden")
    with pytest.raises(RedirectLoop) as caught:
        rig.run(redirects.redirect(rig.core, attempt, "/A?token=hidden"))
    assert "hidden" not in str(caught.value)


# -- the pull interface, sync and async


def test_a_lease_is_redirected(rm: Any, redis_client: redis.Redis) -> None:
    rm.submit("/A")
    lease = rm.queues.next_request()
    assert lease.redirect("/B") is State.PENDING
    assert rm.status(lease.key).redirect == key("B")
    with pytest.raises(ResultNotReady):
        rm.result(lease.key)
    target = rm.queues.next_request()
    assert target.key == key("B")
    with threads() as waiting:
        assert isinstance(waiting, Threads)
        answer = waiting.start(rm.get, "/A", timeout=20)
        managers.watched(redis_client, key("A"))
        target.finish([1, 2])
        assert answer.result(20) == [1, 2]
    assert lease.redirect("/B") is State.COMPLETED, "said again"
    with pytest.raises(LeaseLost):
        lease.renew()


def test_a_lease_survives_a_redirect_that_is_refused(kind: str, url: str, redis_client: redis.Redis) -> None:
    with managers.opened(kind, url, max_pending=1) as rm:
        rm.submit("/A")
        lease = rm.queues.next_request()
        rm.submit("/other")
        with pytest.raises(Refused):
            lease.redirect("/B")
        with pytest.raises(RedirectLoop):
            lease.redirect("/A")
        with pytest.raises(InvalidRequest):
            lease.redirect("/%zz")
        lease.finish("after all")
        assert rm.get("/A") == "after all"


def test_position_and_eta_of_an_alias_are_those_of_its_root(rm: Any) -> None:
    rm.submit("/A")
    lease = rm.queues.next_request()
    rm.submit(BatchRequest("/before", estimated_time=10))
    rm.submit(BatchRequest("/B", estimated_time=20))
    lease.redirect("/B")
    alias, root = rm.full_status(key("A")), rm.full_status(key("B"))
    assert (alias.position, alias.eta) == (root.position, root.eta) == (2, 30.0)


def test_a_hit_through_an_alias_is_one_round_trip(
    rig: Rig, kind: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with managers.opened(kind, url) as rm:
        rm.get_or_submit("/warm")
        rig.ask(rig.take())
        rig.ask(rig.complete(link(rig, "A>B")["B"], "there"))
        with round_trips(monkeypatch) as sent:
            assert rm.get_or_submit("/A") == (True, "there")
        assert len(sent) == 1


# -- handlers


@pytest.fixture
def bench(bench: Bench, redis_client: redis.Redis) -> Iterator[Bench]:
    yield bench
    audit(redis_client, bench.rm.core.keys)


def once(value: Any) -> tuple[Any, list[int]]:
    calls: list[int] = []

    def compute() -> Any:
        calls.append(1)
        return value

    return compute, calls


async def async_get(context: Context) -> Any:
    return await context.aget_or_redirect("/B")


def sync_get(context: Context) -> Any:
    return context.get_or_redirect("/B")


def unconditional(context: Context) -> Any:
    raise context.redirect("/B")


@pytest.mark.parametrize("handler", [sync_get, async_get, unconditional])
@pytest.mark.parametrize("is_cached", [False, True])
def test_a_handler_redirects_and_nothing_is_stored_twice(bench: Bench, handler: Any, is_cached: bool) -> None:
    compute, calls = once({"rows": [1, 2]})
    bench.route(compute, "/B")
    bench.route(handler, "/A")
    if is_cached:
        bench.run("/B")
    status = bench.run("/A")
    assert (status.state, status.redirect, status.attempts) == (State.COMPLETED, key("B"), 1)
    assert bench.rm.result(key("A")) == bench.rm.result(key("B")) == {"rows": [1, 2]}
    assert len(calls) == 1
    assert len(bench.rm.connection.keys("arm:result:*")) == 1


def test_a_handler_may_change_what_it_got_and_then_has_a_result_of_its_own(bench: Bench) -> None:
    bench.route(lambda: [3, 1, 2], "/B")
    bench.route(lambda context: sorted(context.get_or_redirect("/B")), "/A")
    bench.run("/B")
    assert bench.run("/A").redirect is None
    assert bench.rm.result(key("A")) == [1, 2, 3]


def test_a_corrupt_target_counts_as_a_miss(bench: Bench) -> None:
    compute, calls = once("good")
    bench.route(compute, "/B")
    bench.route(sync_get, "/A")
    bench.run("/B")
    bench.rm.connection.hset(f"arm:result:{key('B')}", "bytes", b"spoilt")
    assert bench.run("/A").state is State.COMPLETED
    assert bench.rm.result(key("A")) == "good"
    assert len(calls) == 2


@pytest.mark.parametrize("target", ["/%zz", "http://[", "/" + "x" * 9_000, "/a\x00b"])
def test_an_invalid_target_fails_the_request_and_is_not_tried_again(bench: Bench, target: str) -> None:
    bench.route(lambda context: context.get_or_redirect(target), "/A", retry=_often())
    status = bench.run("/A")
    assert (status.state, status.attempts) == (State.FAILED, 1)
    assert status.error is not None
    assert status.error["type"].endswith("InvalidRequest")
    assert status.error["message"].startswith("redirect target ")


def _often() -> Any:
    from rqarm import Retry

    return Retry(max=5)


def test_handlers_that_lead_to_each_other_fail_with_the_chain(bench: Bench) -> None:
    bench.route(lambda context: context.get_or_redirect("/B"), "/A", retry=_often())
    bench.route(lambda context: context.get_or_redirect("/A"), "/B", retry=_often())
    status = bench.run("/A")
    assert (status.state, status.attempts) == (State.FAILED, 1)
    assert status.error is not None
    assert status.error["type"].endswith("RedirectLoop")
    assert "/B -> /A -> /B" in status.error["message"]
    assert bench.rm.status(key("B")).error == status.error


def test_redirects_without_end_are_ended(bench: Bench) -> None:
    @bench.handlers.route("/next/{n:int}")
    def following(request: BatchRequest, context: Context, n: int) -> Any:
        raise context.redirect(f"/next/{n + 1}")

    status = bench.run("/next/0")
    assert status.error is not None
    assert "too many redirects in a row: ... -> /next/20 -> /next/21" in status.error["message"]
    assert bench.rm.status(BatchRequest("/next/20").key).state is State.FAILED
    assert bench.rm.status(BatchRequest("/next/21").key).state is State.UNKNOWN


def test_a_target_that_nobody_handles_fails_both(bench: Bench) -> None:
    bench.route(unconditional, "/A", retry=_often())
    status = bench.run("/A")
    assert status.error is not None
    assert (status.state, status.error["type"].rpartition(".")[2]) == (State.FAILED, "NoHandler")
    assert "/B" in status.error["message"]


def test_a_target_that_is_refused_is_tried_again_later(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redirects, "REFUSED_DELAY", 3600.0)
    bench.set(max_pending=1)
    bench.route(unconditional, "/A")
    bench.rm.submit("/A")
    bench.rm.connection.zadd("arm:pending:arm", {"somebody": 9e18})  # the line is full when /A runs
    bench.work()
    bench.rm.connection.zrem("arm:pending:arm", "somebody")
    status = bench.rm.status(key("A"))
    assert (status.state, status.redirect) == (State.PENDING, None)
    assert status.error is not None
    assert "max_pending" in status.error["message"]
    assert bench.rm.status(key("B")).state is State.UNKNOWN


@contextmanager
def nearly_full(client: redis.Redis, uri: str) -> Iterator[None]:
    """Room for two more aliases; those that are there already are as real as they must be for this."""
    root = str(BatchRequest(uri).key)
    names = [f"alias-{n}" for n in range(998)]
    with client.pipeline() as pipeline:
        pipeline.sadd(f"arm:aliases:{root}", *names)
        for name in names:
            pipeline.hset(f"arm:status:{name}", mapping={"state": "completed", "alias": root})
        pipeline.execute()
    yield
    client.srem(f"arm:aliases:{root}", *names)
    client.delete(*(f"arm:status:{name}" for name in names))


def test_who_finds_too_many_aliases_gets_a_copy_of_the_result(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redirects, "REFUSED_DELAY", 0.0)

    @bench.handlers.route("/alias/{n:int}")
    def alias(request: BatchRequest, context: Context, n: int) -> Any:
        raise context.redirect("/root")

    bench.route(lambda: "the result", "/root")
    keys = [bench.rm.submit(f"/alias/{n}").key for n in range(4)]
    with nearly_full(bench.rm.connection, "/root"):
        bench.work()
    statuses = [bench.rm.status(each) for each in keys]
    assert [bench.rm.result(each) for each in keys] == ["the result"] * 4
    root = BatchRequest("/root").key
    assert [status.redirect for status in statuses] == [root, root, None, None]
    assert bench.calls == 1
    bench.rm.forget(root)
    assert [bench.rm.status(each).state for each in keys] == [State.UNKNOWN] * 2 + [State.COMPLETED] * 2


def test_a_lease_that_finds_too_many_aliases_stays(rig: Rig) -> None:
    first, second, late, ahead = (begin(rig, uri) for uri in ("/1", "/2", "/late", "/ahead"))
    with nearly_full(rig.client, "/root"):
        for attempt in (first, second):
            assert rig.run(redirects.redirected(rig.core, attempt, "/root")) is State.PENDING
        with pytest.raises(AliasesFull, match="too many aliases"):
            rig.run(redirects.redirected(rig.core, late, "/root"))
    assert rig.state(late.key) is State.IN_PROGRESS
    # who leads to it comes along
    assert rig.run(redirects.redirected(rig.core, ahead, "/late")) is State.PENDING
    assert rig.run(redirects.redirected(rig.core, late, "/other")) is State.PENDING
    assert rig.client.scard(rig.named("aliases", key=BatchRequest("/other").key)) == 2


def test_a_redirect_by_a_lost_attempt_changes_nothing(bench: Bench) -> None:
    def late(context: Context) -> Any:
        bench.rm.cancel(context.key)
        raise context.redirect("/B")

    bench.route(late, "/A")
    assert bench.run("/A").state is State.CANCELLED
    assert bench.rm.status(key("A")).redirect is None


def test_a_lease_that_was_lost_is_not_redirected(rig: Rig) -> None:
    attempt = begin(rig, "/A")
    rig.ask(rig.calls.cancel(attempt.key))
    with pytest.raises(LeaseLost):
        rig.run(redirects.redirect(rig.core, attempt, "/B"))
    assert rig.state(key("A")) is State.CANCELLED


def test_a_target_that_vanishes_is_submitted_again(rig: Rig) -> None:
    attempt = begin(rig, "/A")
    asked: list[str] = []

    def ask(step: Any) -> Any:
        asked.append(step.script.name)
        answer = yield step
        if asked == ["redirect", "submit"]:
            rig.ask(rig.calls.cancel(key("B")))
            rig.ask(rig.calls.forget(key("B")))
        return answer

    assert rig.run(flows.through(redirects.redirect(rig.core, attempt, "/B"), ask)) == "linked"
    assert asked == ["redirect", "submit"] * 2 + ["redirect"]


def test_a_context_made_by_hand_says_what_it_lacks() -> None:
    context = Context(BatchRequest("/A"), key("A"), 1, {}, None, lambda *_: None, lambda: False)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="only a worker can look up results"):
        context.get_or_redirect("/B")
    assert isinstance(context.redirect("/B"), Redirected)
    assert (
        Context(
            BatchRequest("/A"),
            key("A"),
            1,
            {},
            None,
            lambda *_: None,
            lambda: False,
            look_up=lambda request: request.uri,  # type: ignore[arg-type]
        ).get_or_redirect("/B")
        == "/B"
    )


# -- real workers


@pytest.fixture(scope="module")
def home() -> Iterator[embedded.PrivateServer]:
    with servers.throwaway(servers.VALKEY or servers.REDIS) as server:
        yield server


WORKERS = [
    ("rq.worker.Worker", {}),
    ("rqarm.Worker", {}),
    ("rqarm.Worker", {"concurrency": 4}),
]


@pytest.mark.parametrize(("worker", "options"), WORKERS, ids=["rq", "one", "many"])
@pytest.mark.parametrize("path", ["chain", "async-chain"])
def test_workers_compute_meeting_chains_once(
    home: embedded.PrivateServer, tmp_path: Path, worker: str, options: dict[str, Any], path: str
) -> None:
    with crew(home.url, tmp_path, handlers=APP, **options) as hired, threads() as waiting:
        for each in [hired.start(worker) for _ in range(2)]:
            hired.wait_for(each)
        tag = secrets.token_hex(3)
        answers = [waiting.start(hired.rm.get, f"/{path}/{tag}/{name}", timeout=30) for name in "AFCDEB"]
        hired.let_go(tag)
        assert [answer.result(40) for answer in answers] == [f"{tag}: D"] * 6
        assert (hired.directory / "notes" / f"computed-{tag}").read_text() == "D\n"
        assert hired.rm.status(BatchRequest(f"/{path}/{tag}/F").key).redirect == BatchRequest(f"/{path}/{tag}/D").key
        audit(hired.rm.connection, hired.rm.core.keys)
        assert len(hired.rm.connection.keys(f"{hired.name}:result:*")) == 1
        eventually(lambda: hired.rm.cache.stats().in_progress == 0)


def test_a_blocking_look_up_on_an_event_loop_is_refused(home: embedded.PrivateServer, tmp_path: Path) -> None:
    with crew(home.url, tmp_path, handlers=APP, concurrency=2) as hired:
        hired.hire()
        with pytest.raises(RequestFailed, match=r"await context\.aget_or_redirect"):
            hired.rm.get("/blocking/x", timeout=30)


@pytest.mark.parametrize("worker", ["rq.worker.Worker", "rqarm.Worker"])
def test_a_death_between_the_two_steps_costs_an_attempt_and_nothing_else(
    home: embedded.PrivateServer, tmp_path: Path, worker: str
) -> None:
    with crew(home.url, tmp_path, crash_delay=0.1, handlers=APP) as hired:
        hired.let_go("cut-x")
        hired.hire(worker)
        cut, target = (BatchRequest(uri).key for uri in ("/cut/x", "/chain/cut-x/D"))
        assert hired.rm.get("/cut/x", timeout=40) == "cut-x: D"
        assert hired.note(f"cut-{target}")
        status = hired.rm.status(cut)
        assert (status.state, status.attempts, status.redirect) == (State.COMPLETED, 2, target)
        assert (hired.directory / "notes" / "computed-cut-x").read_text() == "D\n"
        if worker == "rqarm.Worker":  # RQ leaves a hash without data behind of a job whose horse was killed
            audit(hired.rm.connection, hired.rm.core.keys)


def test_a_root_deleted_by_hand_is_found_by_the_workers(home: embedded.PrivateServer, tmp_path: Path) -> None:
    with crew(home.url, tmp_path, handlers=APP) as hired, connect.open_client(home.url) as client:
        worker = hired.hire()
        root = hired.rm.core.identify(BatchRequest("/chain/lost/D")).key
        alias = hired.rm.submit("/chain/lost/C").key
        hired.running("lost")
        eventually(lambda: hired.rm.status(alias).redirect == root)
        client.delete(f"{hired.name}:status:{root}")
        client.zrem(f"{hired.name}:leases", root)
        hired.let_go("lost")
        (status,) = hired.settle(alias)
        assert (status.state, status.attempts) == (State.COMPLETED, 2)
        assert hired.rm.result(alias) == "lost: D"
        assert worker.lives


# -- who is told of the end of an alias


def test_a_request_whose_target_is_cached_has_its_callback_with_the_payloads(bench: Bench) -> None:
    bench.set(inline_bytes=10, chunk_bytes=1_000, failure_ttl=60)
    heard: list[Any] = []
    bench.route(lambda: b"x" * 4_000, "/B")

    @bench.handlers.route("/A")
    def lead(request: Any, context: Context) -> Any:
        raise context.redirect("/B")

    @lead.callback
    def ready(result: Any, payloads: list[Any]) -> None:
        heard.append((result, sorted(payloads)))

    bench.rm.get_or_submit("/B")
    bench.work()
    bench.rm.submit("/A", payload="p")
    bench.rm.submit("/A", payload="q")
    bench.work()
    assert bench.rm.status(key("A")).state is State.COMPLETED
    assert heard == [(b"x" * 4_000, ["p", "q"])]
    assert bench.rm.connection.keys("arm:callbacks:*") == []


def test_a_request_whose_target_has_failed_has_its_failure_told(bench: Bench) -> None:
    heard: list[Any] = []

    def give_up(context: Context) -> Any:
        raise context.quarantine("gone for good")

    bench.route(give_up, "/B")

    @bench.handlers.route("/A")
    def lead(request: Any, context: Context) -> Any:
        raise context.redirect("/B")

    @lead.on_failure
    def failed(error: dict[str, str], payloads: list[Any]) -> None:
        heard.append((error["message"], payloads))

    bench.run("/B")
    bench.rm.submit("/A", payload="p")
    bench.work()
    assert bench.rm.status(key("A")).state is State.FAILED
    assert heard == [("gone for good", ["p"])]


def test_the_callback_of_the_target_has_the_payloads_of_those_who_lead_to_it(bench: Bench) -> None:
    heard: list[Any] = []

    @bench.handlers.route("/A")
    def lead(request: Any, context: Context) -> Any:
        raise context.redirect("/B")

    @lead.callback
    def unheard(result: Any, payloads: list[Any]) -> None:
        heard.append(("A", result, payloads))

    @bench.handlers.route("/B")
    def compute(request: Any, context: Context) -> Any:
        return 7

    @compute.callback
    def ready(result: Any, payloads: list[Any]) -> None:
        heard.append(("B", result, payloads))

    bench.rm.submit("/A", payload="p")
    bench.work()
    assert bench.rm.result(key("A")) == 7
    assert heard == [("B", 7, ["p"])]


@pytest.mark.parametrize("seconds", [None, 3600.0])
def test_an_operator_keeps_or_ends_the_result_of_a_root_through_its_alias(rig: Rig, seconds: float | None) -> None:
    attempts = link(rig, "A>B")
    rig.reply(rig.complete(attempts["B"]))
    assert rig.word(cached.retain_call(rig.core, key("A"), seconds)) == "retained"
    ends = {rig.client.pexpiretime(rig.keys.status(key(name))) for name in "AB"}
    assert len(ends) == 1
    assert (ends == {-1}) == (seconds is None)
