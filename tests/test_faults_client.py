"""Faults between a client and its server: what is cut, frozen, flushed or overwritten.

Lost replies are made by FaultProxy; redis-py then sends the command again, which is what the scripts must stand.
Row numbers are those of the list of faults.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import managers
import pytest
import redis
import redis.asyncio
from managers import queued, snapshot, watched
from redis.backoff import NoBackoff
from servers import FaultProxy, connections, eventually, free_port, short_directory

from rqarm import (
    AsyncRequestManager,
    BatchRequest,
    CorruptResult,
    ForeignData,
    LeaseLost,
    Outcome,
    RequestLost,
    RequestManager,
    RequestUnknown,
    State,
    VersionSkew,
    connect,
    embedded,
    flows,
    listen,
)
from rqarm.connect import ServerUnavailable
from rqarm.errors import RqarmError
from rqarm.replies import Attempt
from rqarm.scripts import all_scripts

pytestmark = pytest.mark.faults

URI = "/cities/FR"
KEY = BatchRequest(URI).key
NEW, JOINED, HIT = Outcome.NEW, Outcome.JOINED, Outcome.HIT
MODES = ("before", "after", "mid")


@pytest.fixture
def proxy(server: embedded.PrivateServer, redis_client: redis.Redis) -> Iterator[FaultProxy]:
    with short_directory() as directory, FaultProxy(server.socket, directory / "proxy.sock") as started:
        yield started


@pytest.fixture
def far(kind: str, proxy: FaultProxy, redis_client: redis.Redis) -> Iterator[Any]:
    """A manager behind the proxy, warm: it has looked at the server, and the server has the scripts."""
    with managers.opened(kind, proxy.url) as manager:
        warm_up(manager, redis_client)
        yield manager


@pytest.fixture
def curt(kind: str, proxy: FaultProxy, redis_client: redis.Redis) -> Iterator[Any]:
    """The same with a client that never sends anything twice."""

    def client(module: Any) -> Any:
        retry = redis.asyncio.retry.Retry if module is redis.asyncio else redis.retry.Retry
        return module.Redis.from_url(proxy.url, retry=retry(NoBackoff(), 0))

    with managers.opened(kind, connection=client) as manager:
        warm_up(manager, redis_client)
        yield manager


@pytest.fixture
def threads() -> Iterator[managers.Threads]:
    with managers.threads() as started:
        yield started


def warm_up(rm: Any, client: redis.Redis) -> None:
    for script in all_scripts():
        client.script_load(script.text)
    rm.status(KEY)


def take(rm: Any) -> Any:
    lease = rm.queues.next_request()
    assert lease is not None
    return lease


# -- replies that are lost


@pytest.mark.parametrize("mode", MODES)
def test_a_submit_whose_reply_was_lost_is_new_and_queued_once(
    far: Any, proxy: FaultProxy, redis_client: redis.Redis, mode: str
) -> None:
    """Rows 2 to 4: redis-py sends it again, with the same id."""
    proxy.arm(mode, command="EVALSHA")
    status = far.submit(URI, payload={"to": "a"})
    assert proxy.fired.is_set()
    assert (status.outcome, status.state) == (NEW, State.PENDING)
    assert len(queued(redis_client)) == len(list(redis_client.scan_iter("rq:job:*"))) == 1
    assert redis_client.zcard("arm:pending:arm") == redis_client.hlen(f"arm:callbacks:{KEY}") == 1
    assert far.submit(URI).outcome is JOINED
    take(far).finish(1)
    assert far.queues.next_request() is None


@pytest.mark.parametrize("mode", MODES)
def test_redis_py_as_it_comes_does_no_harm_either(
    kind: str, proxy: FaultProxy, redis_client: redis.Redis, mode: str
) -> None:
    path = proxy.url.removeprefix("unix://")
    with managers.opened(kind, connection=lambda module: module.Redis(unix_socket_path=path)) as rm:
        warm_up(rm, redis_client)
        proxy.arm(mode, command="EVALSHA")
        assert rm.submit(URI).outcome is NEW
        assert proxy.fired.is_set()
        assert len(queued(redis_client)) == 1


def test_a_submit_that_was_never_sent_writes_nothing(curt: Any, proxy: FaultProxy, redis_client: redis.Redis) -> None:
    """Row 1."""
    proxy.arm("before", command="EVALSHA")
    with pytest.raises(ServerUnavailable):
        curt.submit(URI)
    assert redis_client.dbsize() == 0
    assert curt.submit(URI).outcome is NEW


def test_who_was_told_of_an_error_can_send_again(curt: Any, proxy: FaultProxy, redis_client: redis.Redis) -> None:
    """Row 2: the request was accepted all the same; the second submit joins it."""
    proxy.arm("after", command="EVALSHA")
    with pytest.raises(ServerUnavailable):
        curt.submit(URI)
    assert curt.submit(URI).outcome is JOINED
    assert len(queued(redis_client)) == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_that_is_cut_in_the_middle_is_queued_once(
    far: Any, proxy: FaultProxy, redis_client: redis.Redis, mode: str
) -> None:
    proxy.arm(mode, command="EVALSHA", at=5)
    statuses = far.submit_many(f"/n/{n}" for n in range(10))
    assert proxy.fired.is_set()
    assert [status.outcome for status in statuses] == [NEW] * 10
    assert len(queued(redis_client)) == 10


@pytest.mark.parametrize("mode", MODES)
def test_a_take_whose_reply_was_lost_gives_the_same_attempt(
    far: Any, proxy: FaultProxy, redis_client: redis.Redis, mode: str
) -> None:
    """Row 17."""
    far.submit_many(["/a", "/b"])
    proxy.arm(mode, command="EVALSHA")
    lease = take(far)
    assert proxy.fired.is_set()
    assert (lease.request.uri, lease.attempt) == ("/a", 1)
    assert lease.token == int(redis_client.hget(f"arm:status:{lease.key}", "token") or 0)
    assert take(far).request.uri == "/b"


@pytest.mark.parametrize("mode", MODES)
def test_a_start_whose_reply_was_lost_gives_the_same_token(
    proxy: FaultProxy, redis_client: redis.Redis, mode: str
) -> None:
    """Row 17, for the worker's own way in."""
    with RequestManager(proxy.url, allow_volatile=True) as rm:
        rm.submit(URI)
        job_id = queued(redis_client)[0].decode()
        warm_up(rm, redis_client)
        proxy.arm(mode, command="EVALSHA")
        attempt = rm.shell.run(flows.start(rm.core, KEY, job_id, "me"))
        assert isinstance(attempt, Attempt)
        assert proxy.fired.is_set()
        assert attempt.token == int(redis_client.hget(f"arm:status:{KEY}", "token") or 0)
        assert attempt.number == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [1, b"large" * 1_000_000], ids=["small", "large"])
def test_a_finish_whose_reply_was_lost_returns_and_counts_once(
    far: Any, proxy: FaultProxy, redis_client: redis.Redis, mode: str, value: Any
) -> None:
    """Row 23."""
    far.submit(URI)
    lease = take(far)
    proxy.arm(mode, command="EVALSHA")
    lease.finish(value)
    assert proxy.fired.is_set()
    assert far.result(KEY) == value
    assert far.cache.stats().executions["completed"] == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("end", "state", "attempts"),
    [
        (lambda lease: lease.fail("no"), State.FAILED, 1),
        (lambda lease: lease.retry("busy"), State.PENDING, 1),
        (lambda lease: lease.release(), State.PENDING, 0),
        (lambda lease: lease.renew(0.5), State.IN_PROGRESS, 1),
    ],
    ids=["fail", "retry", "release", "renew"],
)
def test_every_other_end_can_be_sent_twice(
    far: Any,
    proxy: FaultProxy,
    redis_client: redis.Redis,
    mode: str,
    end: Callable[[Any], None],
    state: State,
    attempts: int,
) -> None:
    far.submit(URI)
    lease = take(far)
    proxy.arm(mode, command="EVALSHA")
    end(lease)
    assert proxy.fired.is_set()
    status = far.status(KEY)
    assert (status.state, status.attempts) == (state, attempts)
    assert len(queued(redis_client)) == (state is State.PENDING)


@pytest.mark.parametrize("mode", MODES)
def test_an_emission_whose_reply_was_lost_is_kept_once(
    far: Any, proxy: FaultProxy, redis_client: redis.Redis, mode: str
) -> None:
    far.submit(URI)
    lease = take(far)
    proxy.arm(mode, command="EVALSHA")
    lease.emit("once")
    assert proxy.fired.is_set()
    lease.emit("twice")
    lease.finish(1)
    assert [event.value for event in far.follow(KEY)] == ["once", "twice", 1]


@pytest.mark.parametrize("mode", MODES)
def test_put_cancel_and_forget_can_be_sent_twice(far: Any, proxy: FaultProxy, mode: str) -> None:
    proxy.arm(mode, command="EVALSHA")
    far.cache.put(URI, "put")
    assert far.result(KEY) == "put"
    assert (far.cache.stats().temporary, far.cache.stats().bytes) == (1, far.cache.envelope(KEY).stored)
    proxy.arm(mode, command="EVALSHA")
    far.forget(KEY)
    assert far.status(KEY).state is State.UNKNOWN
    far.submit(URI)
    proxy.arm(mode, command="EVALSHA")
    far.cancel(KEY)
    assert far.status(KEY).state is State.CANCELLED


def test_connections_that_were_all_cut_are_opened_again(
    far: Any, proxy: FaultProxy, threads: managers.Threads, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 46, with the connection of submits cut as well."""
    monkeypatch.setattr(listen, "RECONNECT", 0.02)
    waiting = threads.start(far.get, URI)
    watched(redis_client, KEY)
    proxy.reset_all()
    take(far).finish("value")
    assert waiting.result(managers.PATIENCE) == "value"


# -- the server


@pytest.mark.parametrize("many", [False, True])
def test_scripts_that_the_server_forgets_again_at_once_are_loaded_again(
    rm: Any, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch, many: bool
) -> None:
    """Row 33: a server that restarts again and again knows no script when it is asked for the second time."""
    restarts = iter(range(3))

    def forgets() -> None:
        if next(restarts, None) is not None:
            redis_client.script_flush()

    send = redis.connection.AbstractConnection.send_packed_command
    send_async = redis.asyncio.connection.AbstractConnection.send_packed_command

    def is_lesson(command: Any) -> bool:
        return b"LOAD" in (command if isinstance(command, bytes) else b"".join(command))[:60]

    def sent(self: Any, command: Any, *args: Any, **kwargs: Any) -> None:
        read, learns = self.read_response, is_lesson(command)
        send(self, command, *args, **kwargs)
        if learns:
            monkeypatch.setattr(self, "read_response", lambda *a, **k: (read(*a, **k), forgets())[0], raising=False)

    async def sent_async(self: Any, command: Any, *args: Any, **kwargs: Any) -> None:
        learns = is_lesson(command)
        await send_async(self, command, *args, **kwargs)
        if learns:
            read = self.read_response

            async def reading(*a: Any, **k: Any) -> Any:
                answer = await read(*a, **k)
                forgets()
                return answer

            self.read_response = reading

    rm.submit("/known")  # it is checked before
    redis_client.script_flush()
    monkeypatch.setattr(redis.connection.AbstractConnection, "send_packed_command", sent)
    monkeypatch.setattr(redis.asyncio.connection.AbstractConnection, "send_packed_command", sent_async)
    statuses = rm.submit_many(["/new/1", "/new/2"]) if many else [rm.submit("/new")]
    assert {status.outcome for status in statuses} == {"new"}
    assert next(restarts, None) is None, "it has forgotten them three times"


def test_scripts_that_the_server_forgot_are_loaded_again(rm: Any, redis_client: redis.Redis) -> None:
    """Row 33."""
    for uri in ("/a", "/b"):
        redis_client.script_flush()
        assert rm.submit(uri).outcome is NEW
        redis_client.script_flush()
        take(rm).finish(uri)
        redis_client.script_flush()
        assert rm.get(uri) == uri


def test_a_batch_whose_script_is_gone_is_sent_again(rm: Any, redis_client: redis.Redis) -> None:
    """Row 33: a pipeline does not recover by itself."""
    for n in range(2):
        redis_client.script_flush()
        statuses = rm.submit_many(f"/{n}/{m}" for m in range(20))
        assert [status.outcome for status in statuses] == [NEW] * 20
        redis_client.script_flush()
        assert len(rm.wait([status.key for status in statuses], 0)) == 20
    assert len(queued(redis_client)) == 40


def test_a_server_that_is_not_there_is_named_without_its_password(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "RETRIES", 0)
    monkeypatch.setattr(listen, "CONFIRM", 0.05)
    port = free_port()
    with managers.opened(kind, f"redis://:hunter2@127.0.0.1:{port}/0") as rm:
        asked: list[Callable[[], Any]] = [
            lambda: rm.submit(URI),
            lambda: rm.submit_many([URI]),
            lambda: rm.status(KEY),
            lambda: rm.wait(KEY),
            lambda: rm.get(URI),
            lambda: rm.queues.next_request(1),
            lambda: list(rm.events()),
            lambda: list(rm.cache.list()),
        ]
        for ask in asked:
            with pytest.raises(ServerUnavailable) as caught:
                ask()
            assert isinstance(caught.value, RqarmError)
            assert isinstance(caught.value, redis.ConnectionError)
            assert caught.value.url == f"redis://:***@127.0.0.1:{port}/0"
            assert "rqarm server start" in str(caught.value)
            assert "hunter2" not in str(caught.value)


def test_a_waiter_is_told_when_the_server_stays_away(
    curt: Any, proxy: FaultProxy, threads: managers.Threads, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows, "RECHECK", 0.05)
    monkeypatch.setattr(listen, "RECONNECT", 0.02)
    curt.submit(URI)
    waiting = threads.start(curt.result, KEY, None)
    watched(redis_client, KEY)
    proxy.refuse = True
    proxy.reset_all()
    assert isinstance(waiting.exception(managers.PATIENCE), ServerUnavailable)
    proxy.refuse = False
    assert curt.status(KEY).state is State.PENDING


def test_a_server_that_freezes_longer_than_the_client_waits_gets_one_request(
    kind: str,
    server: embedded.PrivateServer,
    redis_client: redis.Redis,
    threads: managers.Threads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row 5."""

    def hasty(module: Any) -> Any:
        retry = redis.asyncio.retry.Retry if module is redis.asyncio else redis.retry.Retry
        return module.Redis.from_url(server.url, socket_timeout=0.3, retry=retry(NoBackoff(), 60))

    with managers.opened(kind, connection=hasty) as rm:
        warm_up(rm, redis_client)
        with managers.round_trips(monkeypatch) as sent:
            server.pause()
            try:
                submitting = threads.start(rm.submit, URI)
                eventually(lambda: len(sent) >= 3, what="the client has given up once and tries again")
            finally:
                server.resume()
            assert submitting.result(managers.PATIENCE).outcome is NEW
        assert len(queued(redis_client)) == redis_client.zcard("arm:pending:arm") == 1
        assert rm.submit(URI).outcome is JOINED


def test_a_flush_ends_every_wait_with_request_lost(
    rm: Any, threads: managers.Threads, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 66: nobody publishes anything, so the next look finds it. Tokens rise all the same."""
    monkeypatch.setattr(flows, "RECHECK", 0.05)
    rm.submit(URI)
    lease = take(rm)
    waiting = [threads.start(rm.result, KEY, None), threads.start(rm.get, URI)]
    watched(redis_client, KEY)
    eventually(lambda: "joined" in rm.cache.stats().submissions)
    redis_client.flushdb()
    for future in waiting:
        error = future.exception(managers.PATIENCE)
        assert isinstance(error, RequestLost)
        assert isinstance(error, RequestUnknown)
    for end in (lambda: lease.finish(1), lambda: lease.fail("x"), lease.renew, lease.release):
        with pytest.raises(LeaseLost, match="unknown"):
            end()
    rm.submit(URI)
    assert take(rm).token > lease.token


def test_a_record_that_is_deleted_is_lost_and_a_result_that_is_deleted_runs_again(
    rm: Any, redis_client: redis.Redis
) -> None:
    """Row 67."""
    rm.submit("/record")
    lease = take(rm)
    redis_client.delete(f"arm:status:{lease.key}")
    with pytest.raises(LeaseLost):
        lease.finish(1)
    rm.cache.put(URI, 1)
    redis_client.delete(f"arm:result:{KEY}")
    with pytest.raises(RequestUnknown):
        rm.result(KEY)
    assert rm.get_or_submit(URI)[1].outcome is NEW


# -- what somebody else wrote


def corrupt_bytes(client: redis.Redis) -> None:
    client.hset(f"arm:result:{KEY}", "bytes", b"garbage!")


def corrupt_envelope(client: redis.Redis) -> None:
    client.hset(f"arm:result:{KEY}", "envelope", b"v=1\nkind=nonsense")


def missing_piece(client: redis.Redis) -> None:
    client.delete(next(iter(client.scan_iter(f"arm:chunk:{KEY}:*:1"))))


def corrupt_piece(client: redis.Redis) -> None:
    client.setrange(next(iter(client.scan_iter(f"arm:chunk:{KEY}:*:0"))), 5000, b"garbage!")


@pytest.mark.parametrize("damage", [corrupt_bytes, corrupt_envelope, missing_piece, corrupt_piece])
def test_a_corrupt_result_is_a_miss_that_runs_again(
    rm: Any, threads: managers.Threads, redis_client: redis.Redis, damage: Callable[[redis.Redis], None]
) -> None:
    """Row 60."""
    value = os.urandom(3_000_000) if "piece" in damage.__name__ else "value"
    rm.cache.put(URI, value)
    damage(redis_client)
    for read in (rm.result, rm.cache.get, lambda key: rm.cache.open(key).read()):
        with pytest.raises(CorruptResult):
            read(KEY)
    waiting = threads.start(rm.get, URI)
    watched(redis_client, KEY)
    take(rm).finish("again")
    assert waiting.result(managers.PATIENCE) == "again"
    assert rm.queues.next_request() is None


@pytest.mark.parametrize("damage", [corrupt_bytes, corrupt_envelope])
def test_every_way_to_submit_runs_a_corrupt_result_again(
    rm: Any, redis_client: redis.Redis, damage: Callable[[redis.Redis], None]
) -> None:
    def submit_many(uri: str) -> Any:
        statuses = rm.submit_many(["/other", uri, "/one/more"])
        assert [status.outcome for status in statuses[::2]] == [NEW, NEW]
        return statuses[1]

    for submit in (rm.submit, lambda uri: rm.get_or_submit(uri)[1], rm.resubmit, submit_many):
        rm.cache.put(URI, "value")
        damage(redis_client)
        assert submit(URI).outcome is NEW
        assert rm.status(KEY).state is State.PENDING


def test_who_only_waits_is_not_stopped_by_a_corrupt_result(rm: Any, redis_client: redis.Redis) -> None:
    rm.cache.put(URI, "value")
    corrupt_envelope(redis_client)
    assert [status.state for status in rm.wait(KEY)] == [State.COMPLETED]
    assert [status.state for status in rm.as_completed([KEY])] == [State.COMPLETED]
    assert rm.status(KEY).state is State.COMPLETED


def test_data_of_somebody_else_under_a_record_is_named(rm: Any, redis_client: redis.Redis) -> None:
    redis_client.set(f"arm:status:{KEY}", "not ours")
    before = snapshot(redis_client)
    asked: list[Callable[[], Any]] = [
        lambda: rm.submit(URI),
        lambda: rm.resubmit(URI),
        lambda: rm.status(KEY),
        lambda: rm.full_status(KEY),
        lambda: rm.find(KEY),
        lambda: rm.result(KEY),
        lambda: rm.wait(KEY),
        lambda: rm.cancel(KEY),
        lambda: rm.forget(KEY),
        lambda: rm.cache.put(URI, 1),
    ]
    for ask in asked:
        with pytest.raises(ForeignData, match=f"arm:status:{KEY}"):
            ask()
    after = snapshot(redis_client)
    assert {name: after[name] for name in before} == before


def test_data_of_somebody_else_under_a_result_is_named(rm: Any, redis_client: redis.Redis) -> None:
    rm.cache.put(URI, 1)
    redis_client.delete(f"arm:result:{KEY}")
    redis_client.set(f"arm:result:{KEY}", "not ours")
    for ask in (lambda: rm.submit(URI), lambda: rm.result(KEY)):
        with pytest.raises(ForeignData, match="a key of the same request"):
            ask()


def test_a_state_of_another_version_is_left_alone(rm: Any, redis_client: redis.Redis) -> None:
    rm.submit(URI)
    redis_client.hset(f"arm:status:{KEY}", "state", "paused")
    before = snapshot(redis_client)
    asked: list[Callable[[], Any]] = [
        lambda: rm.submit(URI),
        lambda: rm.resubmit(URI),
        lambda: rm.status(KEY),
        lambda: rm.result(KEY),
        lambda: rm.wait(KEY),
        lambda: rm.get(URI),
    ]
    for ask in asked:
        with pytest.raises(VersionSkew, match="paused"):
            ask()
    assert snapshot(redis_client) == before


@pytest.mark.parametrize("reply", [[b"shiny", b"new"], [], None, b"OK", [7], ["new"]])
def test_a_word_of_another_version_is_no_answer(reply: Any) -> None:
    core = RequestManager("redis://localhost:1").core
    for flow in (
        flows.submit(core, URI),
        flows.status(core, KEY),
        flows.cancel(core, KEY),
        flows.take(core, None, "", 0),
    ):
        call: Any = flow.send(None)
        with pytest.raises(VersionSkew, match="upgrade"):
            call.parse(reply)


# -- crowds


async def test_a_thousand_submits_of_one_key_are_one_request(url: str, redis_client: redis.Redis) -> None:
    """Row 72."""
    async with AsyncRequestManager(url, allow_volatile=True) as rm:
        statuses = await asyncio.gather(*(rm.submit(URI) for _ in range(1000)))
    outcomes = [status.outcome for status in statuses]
    assert (outcomes.count(NEW), outcomes.count(JOINED)) == (1, 999)
    assert len(queued(redis_client)) == 1


async def test_more_takers_than_redis_py_has_connections_by_default(url: str, redis_client: redis.Redis) -> None:
    async with AsyncRequestManager(url, allow_volatile=True) as rm:
        taking = [asyncio.create_task(rm.queues.next_request(managers.PATIENCE)) for _ in range(120)]
        await asyncio.to_thread(managers.blocked, redis_client, 120)
        await rm.submit_many(f"/n/{n}" for n in range(120))
        assert len({lease.key for lease in await asyncio.gather(*taking) if lease}) == 120


async def test_coroutines_that_take_at_the_same_time_can_each_ask_again(url: str, redis_client: redis.Redis) -> None:
    """A name keeps what its last call has started, for the case that the reply is lost."""
    async with AsyncRequestManager(url, allow_volatile=True) as rm:
        await rm.submit_many(["/a", "/b"])
        leases = await asyncio.gather(rm.queues.next_request(), rm.queues.next_request())
        kept = redis_client.hgetall("arm:takers")
        assert {value.split()[1].decode() for value in kept.values()} == {lease.key for lease in leases if lease}
        assert await rm.queues.next_request() is None
        await rm.submit("/c")
        assert await rm.queues.next_request() is not None
    assert redis_client.hlen("arm:takers") == 2, "a name that is free is used again"


WAITERS = """
import sys, threading
from rqarm import RequestManager

rm = RequestManager(sys.argv[1], allow_volatile=True)
for n in range(50):
    threading.Thread(target=rm.get, args=(f"/n/{n}",)).start()
"""


def test_waiters_that_are_killed_leave_nothing_but_their_requests(url: str, redis_client: redis.Redis) -> None:
    """Row 6."""
    keys = [BatchRequest(f"/n/{n}").key for n in range(50)]
    ours = connections(redis_client)
    root = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", WAITERS, url], cwd=root) as process:
        try:
            watched(redis_client, *keys)
            before = snapshot(redis_client)
        finally:
            process.send_signal(signal.SIGKILL)
    eventually(lambda: connections(redis_client) <= ours)
    assert redis_client.pubsub_channels() == []
    assert snapshot(redis_client) == before
    assert len(queued(redis_client)) == 50
