"""Waiting: every waiter is woken, a lost wake-up costs little, and waiting takes nothing from anybody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import managers
import pytest
import redis
import redis.asyncio
from managers import blocked, queued, watched
from servers import FaultProxy, eventually, short_directory

from rqarm import (
    AsyncRequestManager,
    BatchRequest,
    BatchStatus,
    CorruptResult,
    Outcome,
    RequestLost,
    RequestManager,
    State,
    WaitTimeout,
    codec,
    connect,
    embedded,
    flows,
    listen,
)
from rqarm.calls import Batch, Call, Calls
from rqarm.config import Settings
from rqarm.flows import RECHECK, Core, Emit, Listen, Watch
from rqarm.keys import Keys
from rqarm.model import Key
from rqarm.replies import Found, Stored, Taken
from rqarm.rqjobs import RqJobs

URI = "/cities/FR"
KEY = BatchRequest(URI).key
#: so long that only a wake-up can end a wait in time
NEVER = 3600.0


@pytest.fixture
def threads() -> Iterator[managers.Threads]:
    with managers.threads() as started:
        yield started


@pytest.fixture
def no_recheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads again by himself: a wake-up that is lost shows."""
    monkeypatch.setattr(flows, "RECHECK", NEVER)
    monkeypatch.setattr(listen, "RECONNECT", 0.02)


def connections(client: redis.Redis) -> list[dict[str, Any]]:
    found: Any = client.client_list()
    return [entry for entry in found if entry["id"] != str(client.client_id())]


# -- driven by hand


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def core(clock: Clock) -> Core:
    settings = Settings()
    return Core(settings, RqJobs(settings), clock=clock)


def found(state: State, key: Key = KEY) -> Found:
    return Found(BatchStatus(key, state), None)


def verbs(step: Any) -> list[str]:
    """The scripts of a step."""
    calls = step.steps if isinstance(step, Batch) else [step]
    return [call.script.name for call in calls if isinstance(call, Call)]


def test_a_waiter_subscribes_then_reads_then_listens(core: Core) -> None:
    flow = flows.wait(core, KEY, None)
    assert flow.send(None) == Watch((KEY,))
    assert verbs(flow.send(None)) == ["read"]
    assert flow.send([found(State.PENDING)]) == Listen(RECHECK)


def test_a_result_that_came_before_the_subscription_is_found_at_once(core: Core) -> None:
    flow = flows.wait(core, KEY, None)
    flow.send(None)
    flow.send(None)
    with pytest.raises(StopIteration) as end:
        flow.send([found(State.COMPLETED)])
    assert [status.state for status in end.value.value] == [State.COMPLETED]


def test_who_had_to_wait_subscribes_before_the_next_submit(core: Core) -> None:
    """A hit needs no subscription, and behind a submit it may be later than the end."""
    encoded = codec.encode(1, core.settings)
    hit = Found(
        BatchStatus(KEY, State.COMPLETED, Outcome.HIT, value=1), Stored(KEY, "x", encoded.envelope, encoded.inline)
    )
    new = Found(BatchStatus(KEY, State.PENDING, Outcome.NEW), None)

    first = flows.get(core, URI)
    assert verbs(first.send(None)) == ["submit"]
    assert first.send(new) == Watch((KEY,), is_sure=False)

    second = flows.get(core, URI)
    assert second.send(None) == Watch((KEY,), is_sure=False)
    assert verbs(second.send(None)) == ["submit"]
    with pytest.raises(StopIteration) as end:
        second.send(hit)
    assert end.value.value == 1

    assert verbs(flows.get(core, URI).send(None)) == ["submit"]


def test_a_lost_wake_up_is_found_at_the_next_look(core: Core) -> None:
    flow = flows.wait(core, KEY, None)
    flow.send(None)
    flow.send(None)
    flow.send([found(State.IN_PROGRESS)])
    step = flow.send({})
    assert step == core.calls.claim_sweep() or step.argv == core.calls.claim_sweep().argv  # type: ignore[union-attr]
    assert verbs(flow.send(False)) == ["read"]
    with pytest.raises(StopIteration):
        flow.send([found(State.COMPLETED)])


def test_who_waits_in_vain_looks_for_the_dead(core: Core) -> None:
    flow = flows.wait(core, KEY, None)
    flow.send(None)
    flow.send(None)
    flow.send([found(State.IN_PROGRESS)])
    flow.send({})
    flow.send(True)  # asks which queues there are
    assert verbs(flow.send(["arm"])) == ["sweep"]


def test_a_sweep_that_fails_does_not_end_the_wait(core: Core) -> None:
    flow = flows.wait(core, KEY, None)
    flow.send(None)
    flow.send(None)
    flow.send([found(State.IN_PROGRESS)])
    flow.send({})
    assert verbs(flow.throw(redis.exceptions.OutOfMemoryError("OOM command not allowed"))) == ["read"]
    with pytest.raises(redis.exceptions.ConnectionError):
        flow.throw(redis.exceptions.ConnectionError("but a read that fails does"))


def test_who_waits_for_all_reads_those_that_woke_together(core: Core, clock: Clock) -> None:
    keys = [Key("a"), Key("b"), Key("c")]
    flow = flows.wait(core, keys, 20.0)
    flow.send(None)
    flow.send(None)
    assert flow.send([found(State.PENDING, key) for key in keys]) == Listen(RECHECK)
    clock.now = 1.0
    assert flow.send({Key("b"): b"", Key("stranger"): b""}) == Listen(RECHECK - 1.0)
    clock.now = 2.0
    step = flow.send({Key("a"): b"", Key("c"): b""})
    assert verbs(step) == ["read"] * 3
    with pytest.raises(StopIteration) as end:
        flow.send([found(State.COMPLETED, key) for key in keys])
    assert [status.key for status in end.value.value] == keys


def test_when_the_time_is_over_those_are_read_that_did_not_wake(core: Core, clock: Clock) -> None:
    keys = [Key("a"), Key("b")]
    flow = flows.wait(core, keys, 2.0)
    flow.send(None)
    flow.send(None)
    assert flow.send([found(State.PENDING, key) for key in keys]) == Listen(2.0)
    clock.now = 2.0
    assert verbs(flow.send({Key("a"): b""})) == ["read"] * 2


def test_who_waits_for_all_reads_what_woke_when_no_more_do(core: Core, clock: Clock) -> None:
    keys = [Key("a"), Key("b")]
    flow = flows.wait(core, keys, 6.0)
    flow.send(None)
    flow.send(None)
    flow.send([found(State.PENDING, key) for key in keys])
    assert flow.send({Key("a"): b""}) == Listen(RECHECK)
    clock.now = 5.0
    step = flow.send({})
    assert [call.keys for call in step.steps] == [("arm:status:a",)]  # type: ignore[union-attr]
    assert flow.send([found(State.COMPLETED, Key("a"))]) == Listen(1.0)
    clock.now = 6.0
    assert flow.send({Key("b"): b""}).steps[0].keys == ("arm:status:b",)  # type: ignore[union-attr]
    with pytest.raises(StopIteration) as end:
        flow.send([found(State.IN_PROGRESS, Key("b"))])
    assert [status.state for status in end.value.value] == [State.COMPLETED, State.IN_PROGRESS]


def test_only_what_woke_is_read_again(core: Core) -> None:
    keys = [Key("a"), Key("b"), Key("c")]
    flow = flows.as_completed(core, keys, None)
    flow.send(None)
    assert verbs(flow.send(None)) == ["read"] * 3
    flow.send([found(State.PENDING, key) for key in keys])
    step = flow.send({Key("b"): b"", Key("stranger"): b""})
    assert [call.keys for call in step.steps] == [("arm:status:b",)]  # type: ignore[union-attr]
    assert isinstance(flow.send([found(State.FAILED, Key("b"))]), Emit)
    assert flow.send(None) == Listen(RECHECK)


def test_a_waiter_sleeps_no_longer_than_its_time(core: Core, clock: Clock) -> None:
    flow = flows.result(core, KEY, 7.0)
    flow.send(None)
    assert flow.send(found(State.PENDING)) == Watch((KEY,))
    flow.send(None)
    assert flow.send([found(State.PENDING)]) == Listen(RECHECK)
    clock.now = 5.0
    flow.send({KEY: b""})
    assert flow.send([found(State.IN_PROGRESS)]) == Listen(2.0)
    clock.now = 7.0
    flow.send({KEY: b""})
    with pytest.raises(WaitTimeout, match="in_progress after 7 s"):
        flow.send([found(State.IN_PROGRESS)])


def test_a_result_that_comes_with_the_last_tick_counts(core: Core, clock: Clock) -> None:
    flow = flows.wait(core, KEY, 1.0)
    flow.send(None)
    flow.send(None)
    flow.send([found(State.PENDING)])
    clock.now = 1.0
    flow.send({})
    flow.send(False)
    with pytest.raises(StopIteration) as end:
        flow.send([found(State.COMPLETED)])
    assert end.value.value[0].state is State.COMPLETED


def told(value: Any, *, state: str = "completed") -> bytes:
    """The wake-up of a small result, as the prelude writes it."""
    encoded = codec.encode(value, Settings())
    envelope, inline = codec.pack_envelope(encoded.envelope), encoded.inline or b""
    return b"%s:%d:%s%s" % (state.encode(), len(envelope), envelope, inline)


def until_it_sleeps(flow: Any) -> None:
    """Drive a wait to its first sleep, the record being pending."""
    step = flow.send(None)
    while not isinstance(step, Listen):
        step = flow.send([found(State.PENDING)] if isinstance(step, Batch) else found(State.PENDING))


def test_a_wake_up_that_tells_the_value_spares_the_read(core: Core) -> None:
    flow = flows.result(core, KEY, None)
    until_it_sleeps(flow)
    with pytest.raises(StopIteration) as end:
        flow.send({KEY: told(["a", 1])})
    assert end.value.value == ["a", 1]


def test_who_waits_for_a_status_reads_it(core: Core) -> None:
    flow = flows.wait(core, KEY, None)
    until_it_sleeps(flow)
    assert verbs(flow.send({KEY: told(1)})) == ["read"]


@pytest.mark.parametrize(
    "said",
    [b"", b"completed", b"failed", b"completed:", b"completed:x:y", b"completed:-1:y", told(1, state="failed")],
    ids=lambda said: said.decode(errors="replace")[:14],
)
def test_a_wake_up_that_tells_no_value_is_a_hint(core: Core, said: bytes) -> None:
    flow = flows.result(core, KEY, None)
    until_it_sleeps(flow)
    assert verbs(flow.send({KEY: said})) == ["read"]


def test_a_value_that_was_cut_off_is_corrupt(core: Core) -> None:
    flow = flows.result(core, KEY, None)
    until_it_sleeps(flow)
    with pytest.raises(CorruptResult):
        flow.send({KEY: told("a longer value")[:-1]})


# -- who watches, and what counts for whom


class Heard(listen._Waiter):
    rung = 0

    def ring(self) -> None:
        self.rung += 1


@pytest.fixture
def ledger() -> listen._Ledger[Heard]:
    made = listen._Ledger[Heard](Keys("arm"))
    made.again()
    made.hear([b"subscribe", b"arm:done:", 1])
    return made


def confirm(ledger: listen._Ledger[Heard], key: str = KEY) -> None:
    ledger.hear([b"subscribe", f"arm:done:{key}".encode(), 1])


def publish(ledger: listen._Ledger[Heard], said: bytes, key: str = KEY) -> None:
    ledger.hear([b"message", f"arm:done:{key}".encode(), said])


def test_a_value_counts_behind_the_own_subscription_only(ledger: listen._Ledger[Heard]) -> None:
    """What a claim said before a resubmit must not answer who waits for the next one."""
    first, late = Heard([KEY]), Heard([KEY])
    assert ledger.enter(first) == [f"arm:done:{KEY}"]
    confirm(ledger)
    assert ledger.enter(late) == [f"arm:done:{KEY}"]
    publish(ledger, b"old")
    assert (first.take(), late.take()) == ({KEY: b"old"}, {KEY: b""})
    confirm(ledger)
    publish(ledger, b"new")
    assert (first.take(), late.take()) == ({KEY: b"new"}, {KEY: b"new"})


def test_the_confirmation_of_somebody_who_has_left_is_not_mine(ledger: listen._Ledger[Heard]) -> None:
    gone, late = Heard([KEY]), Heard([KEY])
    ledger.enter(gone)
    assert ledger.leave(gone) == [f"arm:done:{KEY}"]
    ledger.enter(late)
    confirm(ledger)  # of the first
    publish(ledger, b"old")
    ledger.hear([b"unsubscribe", f"arm:done:{KEY}".encode(), 1])
    assert late.take() == {KEY: b""}
    assert not ledger.stands(late)
    confirm(ledger)
    assert ledger.stands(late)


def test_a_new_connection_confirms_anew_and_wakes_all(ledger: listen._Ledger[Heard]) -> None:
    waiters = [Heard([Key(name)]) for name in "ab"]
    for waiter in waiters:
        ledger.enter(waiter)
    confirm(ledger, "a")
    assert set(ledger.again()) == {"arm:done:", "arm:done:a", "arm:done:b"}
    assert not any(ledger.stands(waiter) for waiter in waiters)
    for name in ("", "a", "b"):
        confirm(ledger, name)
    assert all(ledger.stands(waiter) for waiter in waiters)
    assert [waiter.take() for waiter in waiters] == [{"a": b""}, {"b": b""}]


def test_a_confirmation_rings_for_nobody_else(ledger: listen._Ledger[Heard]) -> None:
    waiters = [Heard([KEY]) for _ in range(5)]
    for waiter in waiters:
        ledger.enter(waiter)
    for _ in waiters:
        confirm(ledger)
    assert [waiter.rung for waiter in waiters] == [1] * 5


def test_a_record_that_vanishes_is_said_to_be_lost(core: Core) -> None:
    flow = flows.result(core, KEY, None)
    flow.send(None)
    flow.send(found(State.PENDING))
    flow.send(None)
    flow.send([found(State.PENDING)])
    flow.send({KEY: b""})
    with pytest.raises(RequestLost, match="vanished"):
        flow.send([found(State.UNKNOWN)])


def test_each_end_is_emitted_once(core: Core) -> None:
    keys = [Key("a"), Key("b")]
    flow = flows.as_completed(core, [*keys, Key("a")], None)
    assert flow.send(None) == Watch((Key("a"), Key("b")))
    assert verbs(flow.send(None)) == ["read", "read"]
    step = flow.send([found(State.PENDING, keys[0]), found(State.COMPLETED, keys[1])])
    assert isinstance(step, Emit)
    assert step.item.key == "b"
    assert flow.send(None) == Listen(RECHECK)
    flow.send({keys[0]: b""})
    step = flow.send([found(State.CANCELLED, keys[0])])
    assert isinstance(step, Emit)
    with pytest.raises(StopIteration):
        flow.send(None)


def test_a_taker_waits_behind_the_newest_event_it_knows(core: Core, clock: Clock) -> None:
    flow = flows.take(core, None, "me", 6.0)
    assert verbs(flow.send(None)) == ["take"]
    step = flow.send(Taken(None, "empty", last_event="17-3"))
    assert (step.argv[0], step.argv[-1]) == ("XREAD", "17-3")  # type: ignore[union-attr]
    assert step.waits  # type: ignore[union-attr]
    clock.now = 5.0
    assert verbs(flow.send([])) == ["take"]
    step = flow.send(Taken(None, "empty", last_event="17-9"))
    assert (step.argv[4], step.argv[-1]) == (1000, "17-9")  # type: ignore[union-attr]
    clock.now = 6.0
    flow.send([])
    with pytest.raises(StopIteration) as end:
        flow.send(Taken(None, "empty", last_event="17-9"))
    assert end.value.value is None


def test_each_take_has_an_id_of_its_own(core: Core) -> None:
    flow = flows.take(core, None, "me", None)
    first = flow.send(None)
    flow.send(Taken(None, "empty", last_event="0-0"))
    second = flow.send([])
    assert first.argv != second.argv  # type: ignore[union-attr]


def test_pieces_that_were_written_ahead_are_dropped_when_the_value_breaks(core: Core) -> None:
    def broken() -> Iterator[bytes]:
        yield os.urandom(3 << 20)
        raise OSError("gone")

    flow = flows.put(core, URI, broken())
    steps = []
    with pytest.raises(OSError, match="gone"):
        steps.extend(flow)
    assert [step.argv[0] for step in steps] == ["SET", "SET", "SET", "UNLINK"]  # type: ignore[union-attr]
    assert list(steps[-1].argv[1:]) == [step.argv[1] for step in steps[:-1]]  # type: ignore[union-attr]


# -- on a server


def test_a_wake_up_between_the_read_and_the_sleep_is_not_lost(
    rm: Any, redis_client: redis.Redis, no_recheck: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = rm.submit(URI).key
    lease = rm.queues.next_request()
    asked = threading.Event()

    def finish_first() -> None:
        if not asked.is_set():
            asked.set()
            with RequestManager(connection=redis_client, allow_volatile=True) as other:
                other.cache.put(URI, "put")

    wait, async_wait = listen.Watching.wait, listen.AsyncWatching.wait

    def late(self: listen.Watching, timeout: float) -> dict[Key, bytes]:
        finish_first()
        return wait(self, timeout)

    async def async_late(self: listen.AsyncWatching, timeout: float) -> dict[Key, bytes]:
        await asyncio.to_thread(finish_first)
        return await async_wait(self, timeout)

    monkeypatch.setattr(listen.Watching, "wait", late)
    monkeypatch.setattr(listen.AsyncWatching, "wait", async_late)
    assert rm.result(key, managers.PATIENCE) == "put"
    assert asked.is_set()
    assert lease.key == key


@pytest.mark.parametrize("keys", [1, 150], ids=["one key", "a key each"])
def test_a_hundred_and_fifty_waiting_threads_hold_a_handful_of_connections(
    url: str, redis_client: redis.Redis, threads: managers.Threads, no_recheck: None, keys: int
) -> None:
    with RequestManager(url, allow_volatile=True) as rm:
        uris = [f"/n/{n % keys}" for n in range(150)]
        wanted = [status.key for status in rm.submit_many(uris)]
        start = threading.Barrier(150)

        def wait(key: str) -> Any:
            start.wait()
            return rm.result(key, managers.PATIENCE)

        waiting = [threads.start(wait, key) for key in wanted]
        watched(redis_client, *wanted)
        eventually(lambda: sum(map(len, rm.shell._listening()._ledger.watchers.values())) == 150)
        listening = [entry for entry in connections(redis_client) if int(entry["sub"])]
        assert len(listening) == 1
        eventually(lambda: len(rm.shell._listening()._asleep) == 149)  # one reads for all
        while lease := rm.queues.next_request():
            lease.finish(lease.request.uri)
        assert [future.result(managers.PATIENCE) for future in waiting] == uris
    eventually(lambda: connections(redis_client) == [])


@pytest.mark.parametrize("keys", [1, 300], ids=["one key", "a key each"])
async def test_three_hundred_waiting_coroutines_hold_a_handful_of_connections(
    url: str, redis_client: redis.Redis, no_recheck: None, keys: int
) -> None:
    async with AsyncRequestManager(url, allow_volatile=True) as rm:
        uris = [f"/n/{n % keys}" for n in range(300)]
        await rm.submit_many(uris)
        waiting = [asyncio.create_task(rm.get(uri, managers.PATIENCE)) for uri in uris]
        wanted = {BatchRequest(uri).key for uri in uris}
        await asyncio.to_thread(watched, redis_client, *wanted)
        listening = [entry for entry in connections(redis_client) if int(entry["sub"])]
        assert len(listening) == 1
        while lease := await rm.queues.next_request():
            await lease.finish(lease.request.uri)
        assert await asyncio.gather(*waiting) == uris
        assert len(connections(redis_client)) <= 40


@pytest.mark.parametrize(("value", "reads"), [("small", 1), (os.urandom(2000), 2)], ids=["small", "large"])
def test_a_small_result_comes_with_the_wake_up(
    rm: Any,
    threads: managers.Threads,
    redis_client: redis.Redis,
    no_recheck: None,
    monkeypatch: pytest.MonkeyPatch,
    value: Any,
    reads: int,
) -> None:
    looked, read = [], Calls.read

    def counted(self: Calls, key: Key, **options: Any) -> Any:
        looked.append(key)
        return read(self, key, **options)

    key = rm.submit(URI).key
    monkeypatch.setattr(Calls, "read", counted)
    waiting = threads.start(rm.result, key, managers.PATIENCE)
    eventually(lambda: len(looked) == 2)  # before and behind the subscription
    rm.queues.next_request().finish(value)
    assert waiting.result(managers.PATIENCE) == value
    assert len(looked) == 1 + reads
    assert rm.result(key) == value


def test_a_subscription_that_went_in_part_ends_its_connection(redis_client: redis.Redis) -> None:
    """Half a command would take the next one for its own end."""
    listener = listen.Listener(redis_client, Keys("arm"))
    ours, theirs = socket.socketpair()
    with ours, theirs, contextlib.closing(listener):
        ours.setblocking(False)
        listener._connection = SimpleNamespace(
            _sock=ours,
            pack_command=lambda *words: [" ".join(words).encode() * 100_000],
            disconnect=lambda: None,
        )
        listener._pool = SimpleNamespace(release=lambda connection: None)
        with listener.watch([KEY], is_sure=False):
            theirs.settimeout(managers.PATIENCE)
            while theirs.recv(1 << 20):
                continue  # to the end of the stream, which does come


def test_what_was_said_before_a_resubmit_does_not_answer_it(
    url: str, redis_client: redis.Redis, threads: managers.Threads, no_recheck: None
) -> None:
    with RequestManager(url, allow_volatile=True) as rm:
        key = rm.submit(URI).key
        lease = rm.queues.next_request()
        assert lease is not None
        with rm.shell._listening().watch([key]):
            lease.finish("old")
            rm.resubmit(URI)
            waiting = threads.start(rm.result, key, managers.PATIENCE)
            eventually(lambda: redis_client.info("commandstats")["cmdstat_subscribe"]["calls"] >= 3)
            lease = rm.queues.next_request()
            assert lease is not None
            lease.finish("new")
            assert waiting.result(managers.PATIENCE) == "new"


def test_who_stops_reading_passes_it_on(
    url: str, redis_client: redis.Redis, threads: managers.Threads, no_recheck: None
) -> None:
    with RequestManager(url, allow_volatile=True) as rm:
        keys = [rm.submit(f"/n/{n}").key for n in range(6)]
        listener = rm.shell._listening()
        waiting = []
        for number, key in enumerate(keys):
            waiting.append(threads.start(rm.result, key, None))  # only a wake-up ends it
            watched(redis_client, *keys[: number + 1])
            eventually(lambda: listener._is_read)
            eventually(lambda number=number: len(listener._asleep) == number)  # type: ignore[misc]
        with pytest.raises(WaitTimeout):
            rm.result(keys[-1], 0.05)
        for key, future in zip(keys, waiting, strict=True):  # the first reads for all, then the next one
            lease = rm.queues.next_request()
            assert lease is not None
            assert lease.key == key
            lease.finish(key)
            assert future.result(managers.PATIENCE) == key


def test_closing_takes_the_connection_from_who_reads(
    url: str, redis_client: redis.Redis, threads: managers.Threads
) -> None:
    rm = RequestManager(url, allow_volatile=True)
    key = rm.submit(URI).key
    listener = rm.shell._listening()

    def wait() -> dict[Key, bytes]:
        with listener.watch([key]) as watching:
            return watching.wait(1.0)

    waiting = threads.start(wait)
    watched(redis_client, key)
    eventually(lambda: listener._is_read)
    rm.close()
    eventually(lambda: connections(redis_client) == [])
    assert waiting.result(managers.PATIENCE) == {}
    assert connections(redis_client) == []


def test_a_subscription_that_broke_while_nobody_waited_is_no_delay(
    url: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "RECONNECT", NEVER)
    with RequestManager(url, allow_volatile=True) as rm:
        key = rm.submit(URI).key
        for _ in range(3):
            assert rm.wait(key, 0.01)[0].state is State.PENDING
            assert redis_client.client_kill_filter(_type="pubsub") == 1  # type: ignore[comparison-overlap]


def test_a_waiter_that_gives_up_touches_nobody_else(
    rm: Any, threads: managers.Threads, redis_client: redis.Redis, no_recheck: None
) -> None:
    key = rm.submit(URI).key
    patient = threads.start(rm.result, key, None)
    watched(redis_client, key)
    for _ in range(3):
        with pytest.raises(WaitTimeout):
            rm.result(key, 0.01)
    rm.queues.next_request().finish("value")
    assert patient.result(2) == "value"


async def test_a_waiter_that_is_cancelled_touches_nobody_else(
    url: str, redis_client: redis.Redis, no_recheck: None
) -> None:
    async with AsyncRequestManager(url, allow_volatile=True) as rm:
        await rm.submit(URI)
        first, second = (asyncio.create_task(rm.get(URI)) for _ in range(2))
        await asyncio.to_thread(watched, redis_client, KEY)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        lease = await rm.queues.next_request()
        assert lease is not None
        await lease.finish("value")
        assert await asyncio.wait_for(second, managers.PATIENCE) == "value"


@pytest.mark.parametrize("nth", range(1, 6))
async def test_a_cancellation_that_redis_py_swallows_as_it_sends_ends_the_waiter(
    url: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Submit, subscribe, read, look whether a sweep is due, read again: whatever it sends just then."""
    connection = redis.asyncio.connection.AbstractConnection
    send, sent, waiters = connection.send_packed_command, 0, []

    async def swallowing(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal sent
        await send(self, *args, **kwargs)
        if asyncio.current_task() in waiters:
            sent += 1
            if sent == nth:
                waiters[0].cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)

    async with AsyncRequestManager(url, allow_volatile=True) as rm:
        await rm.submit(URI)
        monkeypatch.setattr(connection, "send_packed_command", swallowing)
        waiters.append(asyncio.create_task(rm.get(URI, timeout=1)))
        with pytest.raises(asyncio.CancelledError):
            await waiters[0]
        assert sent >= nth


async def test_who_is_cancelled_while_subscribing_leaves_the_next_one_subscribed(
    url: str, redis_client: redis.Redis
) -> None:
    """The first to watch a channel subscribes for all; the next must not depend on it."""
    async with AsyncRequestManager(url, allow_volatile=True) as rm:
        await rm.submit(URI)
        listener = rm.shell._listening()
        heard: list[dict[Key, bytes]] = []

        async def watch() -> None:
            async with listener.watch([KEY]) as watching:
                heard.append(await watching.wait(managers.PATIENCE))

        for _ in range(3):
            first, second = asyncio.create_task(watch()), asyncio.create_task(watch())
            while len(listener._ledger.watchers.get(f"arm:done:{KEY}", ())) < 2:
                await asyncio.sleep(0)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            await asyncio.to_thread(watched, redis_client, KEY)
            redis_client.publish(f"arm:done:{KEY}", "completed")
            await second
        assert heard == [{KEY: b"completed"}] * 3


async def test_a_first_subscription_sends_no_ping_into_a_read(url: str, redis_client: redis.Redis) -> None:
    """A connection that was idle for long is tried with PING; its answer must not be taken from under the reader."""
    async with AsyncRequestManager(url, allow_volatile=True) as rm:
        listener = rm.shell._listening()
        async with listener.watch([Key("a")]):
            pass
        await asyncio.to_thread(eventually, lambda: redis_client.pubsub_channels("arm:done:?*") == [])
        for _ in range(3):
            listener._connection.next_health_check = 0.0
            async with listener.watch([Key("b")]) as watching:
                await asyncio.to_thread(redis_client.publish, "arm:done:b", "completed")
                assert await watching.wait(managers.PATIENCE) == {"b": b"completed"}


def test_a_killed_subscription_comes_back_and_misses_nothing(
    rm: Any, threads: managers.Threads, redis_client: redis.Redis, no_recheck: None
) -> None:
    keys = [rm.submit(uri).key for uri in ("/a", "/b")]
    waiting = threads.start(rm.wait, keys, managers.PATIENCE)
    watched(redis_client, *keys)
    killed: Any = redis_client.client_kill_filter(_type="pubsub")
    assert killed == 1
    watched(redis_client, *keys)
    for _ in keys:
        rm.queues.next_request().finish(1)
    assert [status.state for status in waiting.result(managers.PATIENCE)] == [State.COMPLETED] * 2


def test_what_ended_while_the_subscription_was_down_is_read_when_it_is_back(
    kind: str, server: embedded.PrivateServer, redis_client: redis.Redis, threads: managers.Threads, no_recheck: None
) -> None:
    with (
        short_directory() as directory,
        FaultProxy(server.socket, directory / "proxy.sock") as proxy,
        managers.opened(kind, proxy.url) as rm,
        managers.opened("blocking", server.url) as other,
    ):
        key = rm.submit(URI).key
        waiting = threads.start(rm.result, key, managers.PATIENCE)
        watched(redis_client, key)
        proxy.refuse = True
        proxy.reset_all()
        eventually(lambda: redis_client.pubsub_numsub(f"arm:done:{key}")[0][1] == 0)
        other.queues.next_request().finish("unheard")
        proxy.refuse = False
        assert waiting.result(managers.PATIENCE) == "unheard"


def test_a_subscription_that_is_not_confirmed_is_a_server_that_is_not_there(
    kind: str, server: embedded.PrivateServer, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "RECONNECT", 0.02)
    with (
        short_directory() as directory,
        FaultProxy(server.socket, directory / "proxy.sock") as proxy,
        managers.opened(kind, proxy.url) as rm,
    ):
        rm.submit(URI)
        proxy.arm("hang", command="SUBSCRIBE")
        with monkeypatch.context() as patch:
            patch.setattr(listen, "CONFIRM", 0.1)
            with pytest.raises(connect.ServerUnavailable, match="not confirmed"):
                rm.wait(KEY)
        proxy.reset_all()
        assert rm.wait(KEY, 0.01)[0].state is State.PENDING


def test_submits_never_wait_for_waiters(
    kind: str, url: str, redis_client: redis.Redis, threads: managers.Threads
) -> None:
    """Row 73: a pool of two connections, and more than two who wait and take."""

    def small(module: Any) -> Any:
        pool = module.BlockingConnectionPool.from_url(url, max_connections=2, timeout=1)
        return module.Redis(connection_pool=pool)

    with managers.opened(kind, connection=small) as rm:
        keys = [rm.submit(f"/n/{n}").key for n in range(3)]
        waiting = [threads.start(rm.result, key, managers.PATIENCE) for key in keys]
        watched(redis_client, *keys)
        taking = [threads.start(rm.queues.next_request, managers.PATIENCE, queue="other") for _ in range(3)]
        blocked(redis_client, 3)
        assert rm.submit("/one/more").outcome is Outcome.NEW
        for n in range(3):
            rm.submit(BatchRequest(f"/other/{n}", queue="other"))
        assert len({future.result(managers.PATIENCE).key for future in taking}) == 3
        for n in range(3):
            rm.queues.next_request().finish(n)
        assert [future.result(managers.PATIENCE) for future in waiting] == [0, 1, 2]


@pytest.mark.parametrize("module", [redis, redis.asyncio])
def test_a_client_of_a_sentinel_gets_a_pool_for_waiting_too(module: Any) -> None:
    from redis.asyncio.sentinel import Sentinel as AsyncSentinel
    from redis.sentinel import Sentinel

    from rqarm.shell import sibling

    sentinel: Any = (Sentinel if module is redis else AsyncSentinel)([("localhost", 1)])
    client = sentinel.master_for("main", socket_timeout=3)
    twin = sibling(client)
    assert type(twin.connection_pool) is type(client.connection_pool)
    assert twin.connection_pool is not client.connection_pool
    assert twin.connection_pool.service_name == "main"
    assert twin.connection_pool.connection_kwargs["socket_timeout"] is None
    twin.connection_pool.make_connection()


@pytest.mark.parametrize("manager", [RequestManager, AsyncRequestManager])
def test_what_waits_is_not_cut_off_by_the_time_limit_of_a_read(manager: Any, url: str) -> None:
    rm = manager(url)
    assert rm.shell._waiting_client().connection_pool.connection_kwargs["socket_timeout"] is None


# -- processes


def script(text: str, *args: str) -> list[str]:
    return [sys.executable, "-W", "error", "-c", text, *args]


def run(command: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


FORK = """
import json, os, sys, threading
from rqarm import RequestManager

sys.setswitchinterval(1e-6)
rm = RequestManager(sys.argv[1], allow_volatile=True)
rm.submit("/before")
assert rm.wait(rm.submit("/before").key, 0.01)   # the subscription stands before the fork
read, write = os.pipe()
child = os.fork()
name = "parent" if child else "child"
assert (rm.shell._listening()._connection is None) == (child == 0), "the child begins anew before anything runs there"
seen = []

start = threading.Barrier(8)
early = []
def first(n):
    start.wait()
    early.append(rm.result(rm.submit(f"/{name}/early/{n}").key, 20) == n)
crowd = [threading.Thread(target=first, args=(n,)) for n in range(8)]
for thread in crowd:
    thread.start()
for n in range(8):
    rm.cache.put(f"/{name}/early/{n}", n)
for thread in crowd:
    thread.join()
for n in range(50):
    uri = f"/{name}/{n}"
    waiting = []
    status = rm.submit(uri)
    thread = threading.Thread(target=lambda: waiting.append(rm.get(uri, 20)))
    thread.start()
    rm.cache.put(uri, [name, n])
    thread.join()
    seen.append(status.uri == uri and waiting == [[name, n]] and rm.get(uri) == [name, n])
answer = {"good": sum(seen), "early": sum(early)}
rm.close()
if child:
    os.close(write)
    with os.fdopen(read) as pipe:
        print(json.dumps({"parent": answer, "child": json.load(pipe)}))
    os.waitpid(child, 0)
else:
    with os.fdopen(write, "w") as pipe:
        json.dump(answer, pipe)
    os._exit(0)
"""


def test_a_manager_survives_a_fork_and_no_replies_cross(url: str, redis_client: redis.Redis) -> None:
    good = {"good": 50, "early": 8}
    assert run(script(FORK, url)) == {"parent": good, "child": good}


RACE = """
import json, os, sys
from rqarm import RequestManager

def racer(go, say):
    with RequestManager(sys.argv[1], allow_volatile=True) as rm, os.fdopen(say, "w") as told:
        os.read(go, 1)
        print(rm.submit("/race").outcome, file=told, flush=True)
        os.read(go, 1)
        lease = rm.queues.next_request()
        if lease is not None:
            lease.finish("the one answer")
        print(json.dumps([lease is not None, rm.get("/race", 20)]), file=told, flush=True)

racers = []
for _ in range(8):
    (go, start), (hear, say) = os.pipe(), os.pipe()
    if os.fork() == 0:
        racer(go, say)
        os._exit(0)
    os.close(say)
    racers.append((start, os.fdopen(hear)))

def lines():
    for start, _ in racers:
        os.write(start, b".")
    return [hear.readline().strip() for _, hear in racers]

print(json.dumps({"outcomes": sorted(lines()), "ends": [json.loads(line) for line in lines()]}), flush=True)
for _ in racers:
    os.wait()
os._exit(0)
"""


def test_eight_processes_that_race_for_one_key_run_it_once(url: str, redis_client: redis.Redis) -> None:
    told = run(script(RACE, url))
    assert told["outcomes"] == ["joined"] * 7 + ["new"]
    assert sum(ran for ran, _ in told["ends"]) == 1
    assert [value for _, value in told["ends"]] == ["the one answer"] * 8
    assert RequestManager(connection=redis_client).cache.stats().executions == {"completed": 1}
    assert not queued(redis_client)
