"""What attempts emit, on real servers: how long it is kept, and what takes it away."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import pytest
import redis
from audit import audit
from drive import LEASE_MS, Rig
from transitions import REQUEST, stored

from rqarm import calls as calls_module
from rqarm import packing
from rqarm.model import Key
from rqarm.replies import Attempt
from rqarm.request import BatchRequest


def emit(rig: Rig, attempt: Attempt, *values: Any, first: int = 1) -> None:
    for number, value in enumerate(values, first):
        assert rig.word(rig.calls.emit(attempt, number, packing.pack(value))) == "emitted"


def emitted(rig: Rig, key: Key) -> list[Any]:
    """What a late joiner is given."""
    seen = rig.ask(rig.calls.follow(key, "", 0))
    return [] if seen is None else [packing.unpack(packed) for packed in seen.values]


@pytest.mark.parametrize("end", ["complete", "sticky", "fail", "cancel"])
def test_what_was_emitted_lives_as_long_as_the_end_of_its_attempt(rig: Rig, end: str) -> None:
    attempt = rig.begin(REQUEST)
    emit(rig, attempt, 1, 2)
    name = rig.named("emitted", key=attempt.key)
    assert rig.client.pexpiretime(name) == -1
    ends = {
        "complete": rig.complete(attempt),
        "sticky": rig.complete(attempt, sticky=True),
        "fail": rig.fail(attempt),
        "cancel": rig.calls.cancel(attempt.key),
    }
    rig.reply(ends[end])
    assert rig.client.pexpiretime(name) == rig.client.pexpiretime(rig.keys.status(attempt.key))
    assert (rig.client.pexpiretime(name) == -1) == (end == "sticky")
    assert emitted(rig, attempt.key) == [1, 2]
    audit(rig.client, rig.keys)


def test_a_hit_that_lengthens_the_result_lengthens_what_was_emitted(rig: Rig) -> None:
    attempt = rig.begin(REQUEST)
    emit(rig, attempt, 1)
    rig.reply(rig.complete(attempt))
    assert rig.word(rig.submit(BatchRequest(REQUEST.uri, key=REQUEST.key, sticky=True))) == "hit"
    assert rig.client.pexpiretime(rig.named("emitted", key=attempt.key)) == -1
    audit(rig.client, rig.keys)


@pytest.mark.parametrize("way", ["retry", "release", "crash", "lapsed submit", "parked", "rq requeue"])
def test_another_attempt_begins_with_nothing_emitted(rig: Rig, way: str) -> None:
    if way == "parked":
        rig.placed("/holder")
    attempt = rig.begin(REQUEST)
    emit(rig, attempt, 1, 2)
    rig.reply(rig.calls.renew(attempt, LEASE_MS, b'{"fraction": 0.5, "message": "half"}'))
    ticket = rig.ticket(REQUEST)
    if way == "lapsed submit":
        rig.lapse(attempt.key)
    elif way == "rq requeue":
        rig.reply(rig.fail(attempt))
    job_id = rig.record(attempt.key)["job_id"]
    calls = {
        "retry": lambda: rig.retry(attempt, ticket),
        "release": lambda: rig.calls.release(attempt, rig.front_ticket(REQUEST)),
        "crash": lambda: rig.crash(attempt.key, attempt.token, ticket),
        "lapsed submit": lambda: rig.submit(REQUEST),
        "parked": lambda: rig.admit(attempt),
        "rq requeue": lambda: rig.start(attempt.key, job_id),
    }
    rig.reply(calls[way]())
    assert not rig.client.exists(rig.named("emitted", key=attempt.key))
    assert {"emitted", "progress"} & rig.record(attempt.key).keys() == set()
    audit(rig.client, rig.keys)


@pytest.mark.parametrize("way", ["resubmit", "forget", "clear", "put", "submit of what failed", "put in flight"])
def test_what_drops_a_result_drops_what_was_emitted(rig: Rig, way: str) -> None:
    attempt = rig.begin(REQUEST)
    emit(rig, attempt, 1)
    if way != "put in flight":
        rig.reply(rig.fail(attempt) if way == "submit of what failed" else rig.complete(attempt))
    calls = {
        "resubmit": rig.submit(REQUEST, again=True),
        "submit of what failed": rig.submit(REQUEST),
        "forget": rig.calls.forget(attempt.key),
        "clear": rig.calls.clear(temporary_only=True),
    }
    rig.reply(calls.get(way) or rig.put(REQUEST, secrets.token_hex(8)))
    assert not rig.client.exists(rig.named("emitted", key=attempt.key))
    assert emitted(rig, attempt.key) == []
    audit(rig.client, rig.keys)


def test_a_list_that_an_earlier_claim_left_behind_counts_for_nothing(rig: Rig) -> None:
    first = rig.begin(REQUEST)
    emit(rig, first, "old")
    rig.reply(rig.complete(first))
    rig.client.delete(rig.keys.status(first.key), rig.named("result", key=first.key))  # the server made room
    second = rig.begin(REQUEST)
    assert emitted(rig, second.key) == []
    emit(rig, second, "new")
    assert emitted(rig, second.key) == ["new"]
    assert rig.client.pexpiretime(rig.named("emitted", key=second.key)) == -1


def test_an_evicted_list_goes_on_with_the_next_number(rig: Rig) -> None:
    attempt = rig.begin(REQUEST)
    emit(rig, attempt, "a", "b")
    rig.client.delete(rig.named("emitted", key=attempt.key))
    emit(rig, attempt, "c", first=3)
    seen = rig.ask(rig.calls.follow(attempt.key, str(attempt.token), 2))
    assert (seen.first, [packing.unpack(packed) for packed in seen.values]) == (3, ["c"])
    audit(rig.client, rig.keys)


def test_the_newest_emissions_are_kept_by_number_and_by_size(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "EMISSIONS_KEPT", 3)
    monkeypatch.setattr(calls_module, "EMITTED_BYTES", 20)
    attempt = rig.begin(REQUEST)
    emit(rig, attempt, *range(5))
    assert emitted(rig, attempt.key) == [2, 3, 4]
    emit(rig, attempt, "x" * 18, first=6)
    assert emitted(rig, attempt.key) == [4, "x" * 18]
    emit(rig, attempt, "y" * 30, first=7)
    assert emitted(rig, attempt.key) == ["y" * 30], "one is always kept"
    audit(rig.client, rig.keys)


def test_out_of_memory_an_emission_is_refused_and_writes_nothing(rig: Rig, full: Callable[[], None]) -> None:
    attempt = rig.begin(REQUEST)
    emit(rig, attempt, 1)
    before = stored(rig)
    full()
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        rig.reply(rig.calls.emit(attempt, 2, b"\x02"))
    assert stored(rig) == before
