"""Dead claims on real servers: what is lost is found, once, and runs again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from audit import audit
from drive import LEASE_MS, Rig, Seeded, server_ms
from transitions import REQUEST, call_of, heal, lose_job, stored

from rqarm import flows
from rqarm.model import Key, State, Token
from rqarm.replies import Attempt
from rqarm.request import BatchRequest


def test_a_lapsed_lease_is_found_and_queued_again_once(rig: Rig) -> None:
    seeded = rig.seed("lapsed")
    assert heal(rig) == 1
    assert heal(rig) == 0
    record = rig.record(seeded.key)
    assert (record["state"], record["crashes"]) == ("pending", "1")
    assert "due_ms" in record, "a crash waits before it runs again"
    audit(rig.client, rig.keys)


def test_a_lease_that_has_not_lapsed_is_left_alone(rig: Rig) -> None:
    rig.seed("mine")
    before = stored(rig)
    assert heal(rig) == 0
    assert stored(rig) == before


def test_a_submit_takes_over_a_lapsed_lease_at_once(rig: Rig) -> None:
    seeded = rig.seed("lapsed")
    assert rig.word(rig.submit(seeded.request)) == "new"
    attempt = rig.ask(rig.take())
    assert (attempt.number, attempt.crashes) == (2, 1)
    audit(rig.client, rig.keys)


@pytest.mark.parametrize("how", ["crash", "sweep", "submit"])
def test_a_request_that_kills_its_workers_is_set_aside_after_max_attempts(rig: Rig, how: str) -> None:
    seeded = rig.seed("mine")
    words = []
    for n in range(rig.settings.max_attempts):
        if n:
            ticket = rig.record(seeded.key)["job_id"]
            assert isinstance(rig.ask(rig.start(seeded.key, ticket)), Attempt)
        token = Token(int(rig.record(seeded.key)["token"]))
        if how == "crash":
            words.append(rig.word(rig.crash(seeded.key, token, rig.ticket(seeded.request))))
            continue
        rig.lapse(seeded.key)
        words.append(str(heal(rig)) if how == "sweep" else rig.word(rig.submit(seeded.request)))
    assert (
        words
        == {
            "crash": ["requeued", "requeued", "quarantined"],
            "sweep": ["1", "1", "1"],
            "submit": ["new", "new", "negative"],
        }[how]
    )
    status = rig.ask(rig.calls.read(seeded.key, with_value=False)).status
    assert (status.state, status.quarantined) == (State.FAILED, True)
    assert status.error is not None
    assert rig.record(seeded.key)["crashes"] == "3"
    assert rig.ask(rig.calls.stats()).executions["crashed"] == 3
    assert rig.ask(rig.calls.stats()).quarantined == 1
    audit(rig.client, rig.keys)
    assert rig.word(rig.submit(seeded.request)) == "negative"
    assert rig.word(rig.submit(seeded.request, again=True)) == "new", "asked for by name, it gets a new life"
    assert rig.ask(rig.take()).crashes == 0


def test_a_damaged_lease_is_shortened_to_one_lease_and_counted(rig: Rig) -> None:
    seeded = rig.seed("mine")
    rig.set_lease(seeded.key, server_ms(rig.client) + 10 * LEASE_MS)
    assert heal(rig) == 0
    left = int(rig.record(seeded.key)["lease_until"]) - server_ms(rig.client)
    assert 0 < left <= LEASE_MS
    assert rig.ask(rig.calls.stats()).sweeps == {"clamped": 1}
    audit(rig.client, rig.keys)
    rig.lapse(seeded.key)
    assert heal(rig) == 1


def test_an_index_entry_without_its_record_is_tidied(rig: Rig) -> None:
    running, waiting = rig.seed("mine"), rig.seed("pending", BatchRequest("/waits", estimated_time=5))
    rig.client.delete(rig.keys.status(running.key), rig.keys.status(waiting.key))
    rig.lapse(Key("never-was"))
    rig.client.delete(rig.keys.status(Key("never-was")))
    rig.client.zadd(rig.named("leases"), {str(running.key): 1})
    assert heal(rig) == 0
    for kind in ("leases", "pending", "load"):
        name = rig.named(kind, queue="arm") if kind != "leases" else rig.named(kind)
        assert not rig.client.exists(name), f"{kind} is left"


def lose_list(rig: Rig, seeded: Seeded) -> None:
    rig.client.delete(*rig.jobs.lists("arm"))


def rq_empty(rig: Rig, seeded: Seeded) -> None:
    from rq import Queue

    Queue("arm", connection=rig.client).empty()


def popped(rig: Rig, seeded: Seeded) -> None:
    """The worker dies before it forks."""
    rig.client.lpop(rig.jobs.lists("arm")[1])


def flush_rq(rig: Rig, seeded: Seeded) -> None:
    rig.client.delete(*rig.client.keys("rq:*"))


LOSSES = [lose_job, lose_list, rq_empty, popped, flush_rq]


@pytest.mark.parametrize("lose", LOSSES)
def test_a_request_whose_ticket_is_lost_gets_one_new_ticket_in_a_lease(
    rig: Rig, lose: Callable[[Rig, Seeded], None]
) -> None:
    seeded = rig.seed("pending")
    lose(rig, seeded)
    assert heal(rig) == 0, "patience: a worker may have it in hand"
    rig.age(seeded.key)
    assert heal(rig) == 1
    audit(rig.client, rig.keys)
    assert heal(rig) == 0
    assert rig.word(rig.start(seeded.key, seeded.job_id)) == "superseded"
    assert isinstance(rig.ask(rig.start(seeded.key, rig.record(seeded.key)["job_id"])), Attempt)


@pytest.mark.parametrize("verb", ["retry", "release", "crash", "revive", "submit"])
def test_the_job_of_a_replaced_ticket_does_not_stay_for_ever(rig: Rig, verb: str) -> None:
    """Who popped it may have died before telling RQ; then nobody else deletes it."""
    seeded = rig.seed("pending", REQUEST)
    assert rig.client.ttl(f"{rig.jobs.job_prefix}{seeded.job_id}") == -1
    if verb != "revive":
        seeded = replace(seeded, attempt=rig.ask(rig.start(seeded.key, seeded.job_id)))
    if verb == "submit":
        rig.lapse(seeded.key)
    rig.reply(call_of(rig, verb, "mine", seeded))
    current = rig.record(seeded.key)["job_id"]
    assert current != seeded.job_id
    assert rig.client.ttl(f"{rig.jobs.job_prefix}{current}") == -1
    assert 0 < rig.client.ttl(f"{rig.jobs.job_prefix}{seeded.job_id}") <= 86_400


def test_the_end_that_rq_gave_a_replaced_ticket_stays(rig: Rig) -> None:
    seeded = rig.seed("pending")
    attempt = rig.ask(rig.start(seeded.key, seeded.job_id))
    rig.client.expire(f"{rig.jobs.job_prefix}{seeded.job_id}", 60)
    rig.reply(rig.calls.release(attempt, rig.front_ticket(seeded.request)))
    assert 0 < rig.client.ttl(f"{rig.jobs.job_prefix}{seeded.job_id}") <= 60


@pytest.mark.parametrize("lose", [lose_job, rq_empty, flush_rq])
def test_a_submit_gives_a_dead_claim_a_ticket_at_once(rig: Rig, lose: Callable[[Rig, Seeded], None]) -> None:
    seeded = rig.seed("pending")
    lose(rig, seeded)
    assert rig.word(rig.submit(seeded.request)) == "new"
    audit(rig.client, rig.keys)
    assert rig.word(rig.submit(seeded.request)) == "joined"
    assert rig.ask(rig.take()).key == seeded.key


def test_a_deleted_list_with_300_in_line_is_filled_again_each_once_and_in_order(rig: Rig) -> None:
    seeded = [rig.seed("pending", f"/{n}") for n in range(300)]
    lose_list(rig, seeded[0])
    for each in seeded:
        rig.age(each.key)
    assert heal(rig) == 300
    assert [entry.rpartition("-")[0] for entry in rig.waiting()[1]] == [each.key for each in seeded]
    audit(rig.client, rig.keys)
    assert heal(rig) == 0


def test_two_sweeps_at_once_push_each_lost_ticket_once(rig: Rig) -> None:
    for n in range(3):
        rig.age(rig.seed("pending", f"/{n}").key)
    lose_list(rig, Seeded(REQUEST, "", "", None))  # type: ignore[arg-type]
    lapsed = rig.seed("lapsed", "/lapsed")
    for n in range(3):
        rig.age(BatchRequest(f"/{n}").key)
    lose_list(rig, lapsed)
    both = [flows.sweep(rig.core), flows.sweep(rig.core)]
    healed, answers = 0, [rig.ask(flow.send(None)) for flow in both]
    for flow, answer in zip(both, answers, strict=True):
        step = flow.send(answer)
        while True:
            try:
                step = flow.send(rig.ask(step))
            except StopIteration as end:
                healed += end.value
                break
    assert healed == 4
    assert len(rig.waiting()[1]) == 3
    audit(rig.client, rig.keys)


def test_an_rq_worker_that_has_popped_a_ticket_may_load_its_handlers(rig: Rig) -> None:
    seeded = rig.seed("pending")
    rig.age(seeded.key)
    assert rig.client.lpop(rig.jobs.lists("arm")[1]).decode() == seeded.job_id
    rig.client.hset(rig.jobs.job_prefix + seeded.job_id, "status", "started")
    assert heal(rig) == 0
    before = stored(rig)
    job_id, seen_ms = rig.record(seeded.key)["popped"].split()
    assert job_id == seeded.job_id
    assert heal(rig) == 0
    assert stored(rig) == before
    # a worker that died there: a lease later, and 10 s at the least, the request is taken back
    rig.client.hset(rig.keys.status(seeded.key), "popped", f"{job_id} {int(seen_ms) - 15_001}")
    assert heal(rig) == 1
    assert "popped" not in rig.record(seeded.key)
    audit(rig.client, rig.keys)
    # the next ticket has a time of its own
    new = rig.record(seeded.key)["job_id"]
    rig.client.hset(rig.keys.status(seeded.key), "popped", f"{job_id} 1")
    rig.age(seeded.key)
    rig.client.lpop(rig.jobs.lists("arm")[1])
    rig.client.hset(rig.jobs.job_prefix + new, "status", "started")
    assert heal(rig) == 0
    assert rig.record(seeded.key)["popped"].split()[0] == new


def test_a_request_that_waits_for_its_delay_is_not_pushed_before(rig: Rig) -> None:
    seeded = rig.seed("scheduled")
    rig.age(seeded.key)
    before = stored(rig)
    assert heal(rig) == 0
    assert stored(rig) == before
    rig.client.hset(rig.keys.status(seeded.key), "due_ms", server_ms(rig.client) - 3_600_000)
    assert heal(rig) == 1, "no scheduler runs: the sweep delivers"
    audit(rig.client, rig.keys)


def test_the_oldest_of_too_many_quarantined_requests_go(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqarm.calls.QUARANTINE_KEPT", 2)
    seeded = [rig.seed("quarantined", f"/{n}") for n in range(4)]
    for n, each in enumerate(seeded):
        rig.client.zadd(rig.named("quarantine"), {str(each.key): n})
    heal(rig)
    assert [rig.state(each.key) for each in seeded] == [State.UNKNOWN, State.UNKNOWN, State.FAILED, State.FAILED]
    audit(rig.client, rig.keys)


def test_a_result_that_has_expired_leaves_the_indexes_with_a_sweep(rig: Rig) -> None:
    seeded = rig.seed("completed")
    # due: the record and the result went at their TTL, the index has to follow
    rig.client.delete(rig.keys.status(seeded.key), rig.named("result", key=seeded.key))
    rig.client.zadd(rig.named("results"), {str(seeded.key): 1})
    heal(rig)
    assert rig.client.zcard(rig.named("results")) == 0
    stats = rig.ask(rig.calls.stats())
    assert (stats.temporary, stats.bytes) == (0, 0)
    audit(rig.client, rig.keys)


def test_foreign_data_does_not_stop_the_sweep(rig: Rig) -> None:
    """Row 61: one bad job hash and one bad record; what is behind them is healed all the same."""
    bad_job, bad_record, lost = (rig.run(flows.submit(rig.core, f"/{name}")).key for name in ("job", "record", "lost"))
    for key in (bad_job, lost):
        rig.client.hset(rig.keys.status(key), "pushed_ms", 1)
    job_id = rig.client.hget(rig.keys.status(bad_job), "job_id").decode()
    rig.client.delete(rig.core.jobs.lists(rig.core.settings.queue)[1])
    rig.client.set(rig.core.jobs.job_prefix + job_id, "not a job")
    rig.client.delete(rig.keys.status(bad_record))
    rig.client.set(rig.keys.status(bad_record), "not a record")
    assert rig.run(flows.sweep(rig.core)) == 2
    attempts = [rig.run(flows.take(rig.core, None, "w", 0)) for _ in range(2)]
    assert {attempt.key for attempt in attempts} == {bad_job, lost}
