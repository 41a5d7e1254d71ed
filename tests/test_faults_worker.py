"""Workers, horses and servers are killed, stopped and refused while requests run. Nothing is lost, nothing ends twice.

The rows are those of the fault table: each test names what is done and claims what must hold.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import redis
import servers
from audit import audit
from redis.exceptions import RedisError, ResponseError
from rq.command import send_stop_job_command
from rq.exceptions import InvalidJobOperation
from rq.serializers import JSONSerializer
from servers import eventually
from workers import LEASE, Crew, WorkerProcess, crew, is_alive

from rqarm import RequestManager, State, embedded

pytestmark = [pytest.mark.faults]

SEED = 20
KILLS = 20


@pytest.fixture
def team(home: embedded.PrivateServer, tmp_path: Any) -> Iterator[Crew]:
    with crew(home.url, tmp_path, crash_delay=0) as hired:
        yield hired


@pytest.fixture
def own(tmp_path: Any) -> Iterator[tuple[embedded.PrivateServer, Crew]]:
    """A server of its own, with AOF, and a crew on it."""
    with (
        servers.throwaway(servers.VALKEY or servers.REDIS, aof=True) as server,
        crew(server.url, tmp_path, crash_delay=0) as hired,
    ):
        yield server, hired


def ends(team: Crew) -> Counter[str]:
    """How often each key was completed, by the scripts' own account."""
    return Counter(event.key for event in team.rm.events("0", timeout=0.01) if event.verb == "complete")


def check(team: Crew, *keys: str) -> None:
    """Each request has one result, and nothing else is left of it."""
    assert ends(team) == Counter(keys)
    audit(team.rm.connection, team.rm.core.keys)
    for name in (team.name, f"{team.name}-high", f"{team.name}-low"):
        assert team.rm.connection.llen(f"rq:queue:{name}") == 0


# -- workers and horses


@pytest.mark.parametrize("kind", ["rqarm.Worker", "rq.worker.Worker"])
def test_a_worker_is_killed_its_horse_goes_with_it_and_another_takes_over(team: Crew, kind: str) -> None:
    first = team.hire(kind)
    key = team.rm.submit("/turn/orphan").key
    horse = int(team.note("running-orphan-1"))
    second = team.hire("rqarm.Worker")
    first.kill()
    if kind == "rqarm.Worker":
        eventually(lambda: not is_alive(horse), 5, "the horse dies with its parent")
    else:
        os.kill(horse, signal.SIGKILL)  # RQ's goes on, see the next test
    team.let_go("orphan-2")
    assert team.rm.result(key, timeout=20) == 2
    assert team.rm.status(key).worker == second.name
    assert team.field(key, "crashes") == b"1"
    check(team, key)


def test_a_killed_worker_frees_its_place_under_a_limit(team: Crew) -> None:
    first = team.hire()
    keys = [team.rm.submit("/limited/killed").key]
    team.running("killed")
    second, third = team.start(), team.start()
    team.wait_for(second)
    team.wait_for(third)
    for name in ("other", "next"):
        keys.append(team.rm.submit(f"/limited/{name}").key)
        if name == "other":
            team.running(name)
    parked = f"{team.name}:parked:/limited/{{name}}"
    eventually(lambda: team.rm.connection.zcard(parked) == 1, 20, "the third waits for a place")
    first.kill()
    team.running("next")
    for name in ("killed", "other", "next"):
        team.let_go(name)
    assert [status.state for status in team.settle(*keys)] == [State.COMPLETED] * 3
    assert team.rm.result(keys[0]) == 2
    check(team, *keys)


@pytest.mark.parametrize("whole", [False, True], ids=["the worker", "worker and horse"])
def test_who_was_stopped_for_longer_than_its_lease_comes_too_late(team: Crew, whole: bool) -> None:
    """A zombie: it wakes while another runs the request, ends first, and is refused."""
    first = team.hire()
    key = team.rm.submit("/turn/zombie").key
    horse = int(team.note("running-zombie-1"))
    job = team.job(key)
    first.signal(signal.SIGSTOP)
    if whole:
        os.kill(horse, signal.SIGSTOP)
    second = team.hire()
    team.note("running-zombie-2")
    team.let_go("zombie-1")
    if whole:
        os.kill(horse, signal.SIGCONT)
    eventually(lambda: not team.rm.connection.exists(job.key), 15, "the first one ends, is refused and clears up")
    assert (team.rm.status(key).state, team.rm.status(key).worker) == (State.IN_PROGRESS, second.name)
    team.let_go("zombie-2")
    assert team.rm.result(key, timeout=20) == 2
    first.signal(signal.SIGCONT)
    second.stop()
    extra = team.rm.submit("/add/1/2").key
    assert team.rm.result(extra, timeout=20) == 3, "the first one works on"
    check(team, key, extra)


def test_a_horse_whose_worker_wakes_too_late_is_killed(team: Crew) -> None:
    first = team.hire()
    key = team.rm.submit("/turn/late").key
    horse = int(team.note("running-late-1"))
    first.signal(signal.SIGSTOP)
    second = team.hire()
    team.note("running-late-2")
    first.signal(signal.SIGCONT)
    eventually(lambda: not is_alive(horse), 15, "its worker kills it")
    team.let_go("late-2")
    assert team.rm.result(key, timeout=20) == 2
    assert first.lives
    assert second.lives
    check(team, key)


def test_a_worker_that_is_killed_idle_is_missed_by_nobody(team: Crew) -> None:
    first, second = team.hire(), team.hire()
    first.kill()
    keys = [status.key for status in team.rm.submit_many([f"/add/{n}/1" for n in range(10)])]
    team.settle(*keys, timeout=20)
    assert second.lives
    check(team, *keys)


def test_a_poisonous_request_is_set_aside_and_the_others_run(team: Crew) -> None:
    team.hire()
    team.hire()
    poison, *others = team.rm.submit_many(["/kill/poison", *(f"/add/{n}/1" for n in range(50))])
    good = [status.key for status in others]
    assert {status.state for status in team.settle(*good)} == {State.COMPLETED}
    (status,) = team.settle(poison.key)
    assert (status.state, status.quarantined, status.attempts) == (State.FAILED, True, 3)
    assert (team.directory / "notes" / "kills-poison").read_text() == "xxx"
    assert all(worker.lives for worker in team.workers)
    check(team, *good)


# -- queues and keys


def popped(team: Crew, key: str) -> None:
    assert team.rm.connection.lpop(f"rq:queue:{team.name}") is not None


def emptied(team: Crew, key: str) -> None:
    assert team.rm.connection.delete(f"rq:queue:{team.name}")


def job_deleted(team: Crew, key: str) -> None:
    assert team.rm.connection.delete(team.job(key).key)


def flushed(team: Crew, key: str) -> None:
    client = team.rm.connection
    assert client.delete(*(name for name in client.keys("rq:*") if team.name.encode() in name or b":job:" in name))


@pytest.mark.parametrize("lose", [popped, emptied, job_deleted, flushed])
def test_a_lost_ticket_is_replaced_without_human_help(team: Crew, lose: Callable[[Crew, str], None]) -> None:
    worker = team.hire()
    running = team.rm.submit("/wait/busy").key
    team.running("busy")
    waiting = team.rm.submit("/add/1/2").key
    lose(team, waiting)
    team.let_go("busy")
    team.settle(running, waiting, timeout=20)
    assert worker.lives
    check(team, running, waiting)


def test_the_job_of_a_running_request_is_deleted_and_its_result_counts(team: Crew) -> None:
    worker = team.hire()
    key = team.rm.submit("/wait/deleted").key
    team.running("deleted")
    team.job(key).delete()
    team.let_go("deleted")
    assert team.rm.result(key, timeout=20) == "deleted 1"
    extra = team.rm.submit("/add/1/2").key
    assert team.rm.result(extra, timeout=20) == 3
    assert worker.lives
    check(team, key, extra)


def test_everything_is_flushed_and_work_goes_on(own: tuple[embedded.PrivateServer, Crew]) -> None:
    _, team = own
    worker = team.hire()
    key = team.rm.submit("/turn/flushed").key
    horse = int(team.note("running-flushed-1"))
    token = int(team.field(key, "token") or 0)
    team.rm.connection.flushdb()
    eventually(lambda: not is_alive(horse), 15, "an attempt without a record is stopped")
    assert team.rm.status(key).state is State.UNKNOWN
    team.let_go("flushed-1")
    assert team.rm.get("/turn/flushed", timeout=20) == 1
    assert int(team.field(key, "done_token") or 0) > token
    assert worker.lives
    check(team, key)


# -- the server


def test_a_server_killed_under_load_loses_nothing(own: tuple[embedded.PrivateServer, Crew]) -> None:
    server, team = own
    team.hire()
    team.hire()
    pids = [worker.pid for worker in team.workers]
    keys = [status.key for status in team.rm.submit_many([f"/soak/{n}" for n in range(30)])]
    eventually(lambda: len(ends(team)) >= 5)
    server.kill()
    server.start()
    assert {status.state for status in team.settle(*keys)} == {State.COMPLETED}
    assert [worker.pid for worker in team.workers if worker.lives] == pids
    check(team, *keys)


@contextmanager
def read_only(client: redis.Redis) -> Iterator[None]:
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        yield
    finally:
        client.execute_command("REPLICAOF", "NO", "ONE")


@contextmanager
def out_of_memory(client: redis.Redis) -> Iterator[None]:
    client.config_set("maxmemory", 1)
    try:
        yield
    finally:
        client.config_set("maxmemory", 0)


@contextmanager
def scripts_flushed(client: redis.Redis) -> Iterator[None]:
    client.script_flush()
    yield
    client.script_flush()


@contextmanager
def connections_cut(client: redis.Redis) -> Iterator[None]:
    client.client_kill_filter(_type="normal", skipme=True)
    yield
    client.client_kill_filter(_type="normal", skipme=True)
    client.client_kill_filter(_type="pubsub", skipme=True)


@contextmanager
def busy(client: redis.Redis) -> Iterator[None]:
    """A script without end; the server answers BUSY to everybody."""
    client.config_set("busy-reply-threshold", 50)

    def for_ever() -> None:
        with pytest.raises(ResponseError), redis.Redis(connection_pool=client.connection_pool) as other:
            other.eval("while true do end", 0)

    thread = threading.Thread(target=for_ever, daemon=True)
    thread.start()
    eventually(lambda: _refuses(client))
    try:
        yield
    finally:
        client.script_kill()
        thread.join(10)


def _refuses(client: redis.Redis) -> bool:
    try:
        client.get("x")
    except ResponseError as error:
        return "BUSY" in str(error)
    return False


FAULTS = [read_only, out_of_memory, scripts_flushed, connections_cut, busy]


@pytest.fixture(scope="module")
def tough(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[redis.Redis, Crew]]:
    """One worker that must outlive all faults, with a lease that is longer than they are."""
    with (
        servers.throwaway(servers.VALKEY or servers.REDIS) as server,
        crew(server.url, tmp_path_factory.mktemp("tough"), lease=6) as hired,
        redis.Redis(unix_socket_path=str(server.socket)) as client,
    ):
        hired.hire()
        yield client, hired


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_outlives_a_server_that_refuses(tough: tuple[redis.Redis, Crew], fault: Any) -> None:
    """While it is idle, then while a handler ends: the result that is there is not computed again. It still obeys."""
    client, team = tough
    (worker,) = team.workers
    name, before = fault.__name__, ends(team)
    with fault(client):
        if fault is not busy:  # then not even a BLPOP comes back
            _is_noticed(worker, fault)
    key = team.rm.submit(f"/turn/{name}").key
    team.note(f"running-{name}-1")
    with fault(client):
        team.let_go(f"{name}-1")
        _is_noticed(worker, fault)
    assert team.rm.result(key, timeout=20) == 1
    uris = [f"/async/{10 * FAULTS.index(fault) + n}" for n in range(5)]
    keys = [status.key for status in team.rm.submit_many(uris)]
    team.settle(*keys, timeout=20)
    stopped = team.rm.submit(f"/wait/{name}").key
    team.running(name)
    eventually(lambda: _obeys(team, stopped), 20, "the worker hears RQ's commands")
    print(worker.said())
    assert worker.lives
    assert ends(team) - before == Counter([key, *keys])


def _is_noticed(worker: WorkerProcess, fault: Any) -> None:
    """Until the worker has met the fault and said so; some it does not even notice."""
    complaint = re.compile("the server refused|no heartbeat|not renewed|the sweep did not run")
    if fault in (read_only, out_of_memory, busy):
        before = len(complaint.findall(worker.log.read_text()))
        eventually(lambda: len(complaint.findall(worker.log.read_text())) > before, 20, "the worker is refused")


def _obeys(team: Crew, key: str) -> bool:
    """Say it again and again: a command that comes while the listener reconnects is lost, which is RQ's way."""
    if team.rm.status(key).state is State.IN_PROGRESS:
        with suppress(InvalidJobOperation):  # it has been heard, the record will follow
            send_stop_job_command(team.rm.connection, team.job(key).id, serializer=JSONSerializer)
    return team.rm.status(key).state is State.CANCELLED


# -- all at once


def test_random_kills_lose_nothing_and_end_nothing_twice(own: tuple[embedded.PrivateServer, Crew]) -> None:
    """40 requests, each submitted three times by two clients, while horses and workers are killed 20 times."""
    server, team = own
    chance = random.Random(SEED)
    for _ in range(2):
        team.start(max_attempts=100)
    for worker in team.workers:
        team.wait_for(worker)
    uris = [f"/soak/{n}" for n in range(40)]
    clients = [threading.Thread(target=_submit_all, args=(server.url, team, uris, seed)) for seed in (1, 2)]
    for client in clients:
        client.start()
    eventually(lambda: _kill_a_horse(team, chance), 20, "something runs and is killed")
    for number in range(KILLS - 1):
        if chance.random() >= 0.6 or not _kill_a_horse(team, chance):
            victim = chance.choice([worker for worker in team.workers if worker.lives])
            victim.kill()
            team.wait_for(team.start(max_attempts=100))
        assert sum(worker.lives for worker in team.workers) == 2, number
    for client in clients:
        client.join(20)
    keys = [status.key for status in team.rm.submit_many(uris)]
    statuses = team.settle(*keys)
    assert {status.state for status in statuses} == {State.COMPLETED}
    assert [team.rm.result(key) for key in keys] == [n * n for n in range(40)]
    assert sum(status.attempts for status in statuses) > 40, "no kill has hit a running request"
    check(team, *keys)


def _submit_all(url: str, team: Crew, uris: list[str], seed: int) -> None:
    """Half of three times each, in an order of its own."""
    order = [uri for uri in uris for _ in range(2 if (hash(uri) + seed) % 2 else 1)]
    random.Random(seed).shuffle(order)
    with RequestManager(url, namespace=team.name, queue=team.name, lease=LEASE) as rm:
        for uri in order:
            rm.submit(uri)


def _kill_a_horse(team: Crew, chance: random.Random) -> bool:
    """False when none runs any more, because everything is done."""

    def horses() -> list[int]:
        pids = [int(note.name.removeprefix("horse-")) for note in (team.directory / "notes").glob("horse-*")]
        return [pid for pid in pids if is_alive(pid)]

    def found() -> list[int] | bool:
        return horses() or (not team.rm.cache.stats().in_progress and not team.rm.queue())

    running = eventually(found)
    if running is True:
        return False
    with suppress(ProcessLookupError):  # it has just ended by itself
        os.kill(chance.choice(running), signal.SIGKILL)
    return True


def test_the_faults_above_are_real(own: tuple[embedded.PrivateServer, Crew]) -> None:
    """A fault that the server does not notice tests nothing."""
    server, _ = own
    with redis.Redis(unix_socket_path=str(server.socket)) as client:
        for fault in (read_only, out_of_memory, busy):
            with fault(client), pytest.raises(RedisError):
                client.set("x", "1")
            client.set("x", "1")
