"""Sentinel promotes a replica while workers run: its links lag, its master dies, or only seemed to.

An asynchronous failover loses what was not replicated. Nothing else may be lost, nobody may wait for ever, and what the
old master still takes must count nowhere.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import servers
from audit import audit
from commands import Command, command
from redis.exceptions import RedisError, ResponseError
from servers import FaultProxy, eventually
from workers import APP, in_environment

from rqarm import AsyncRequestManager, RequestLost, RequestManager, State, embedded, flows

pytestmark = pytest.mark.faults

BINARY = servers.VALKEY or servers.REDIS
LEASE = 3.0
PATIENCE = 60.0


@dataclass
class Pair:
    """A master and its replica on ports of their own, a Sentinel that watches them, and a manager that asks it."""

    master: embedded.PrivateServer
    replica: embedded.PrivateServer
    ports: tuple[int, int]
    url: str
    rm: RequestManager
    directory: Path

    def client(self, which: int) -> redis.Redis:
        return redis.Redis(port=self.ports[which], socket_timeout=5)

    def is_promoted(self) -> bool:
        with self.client(1) as client:
            return bool(client.info("replication")["role"] == "master")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    assert BINARY is not None
    ports = (servers.free_port(), servers.free_port())
    links = [("--bind", "127.0.0.1", "--protected-mode", "no", "--port", str(port)) for port in ports]
    follows = ("--replicaof", f"127.0.0.1 {ports[0]}", "--repl-diskless-sync-delay", "0")
    extra = "sentinel failover-timeout mymaster 4000\n"
    with (
        servers.throwaway(BINARY, args=(*links[0], "--repl-diskless-sync-delay", "0")) as master,
        servers.throwaway(BINARY, args=(*links[1], *follows)) as replica,
        servers.sentinel(BINARY, ports[0], extra=extra) as sentinel_port,
    ):
        url = f"redis+sentinel://127.0.0.1:{sentinel_port}/mymaster"
        with redis.Redis(port=sentinel_port) as sentinel:
            eventually(lambda: sentinel.sentinel_slaves("mymaster"), 20, "the Sentinel knows the replica")
        with RequestManager(url, allow_volatile=True, lease=LEASE, crash_delays=(0.0,)) as rm:
            made = Pair(master, replica, ports, url, rm, tmp_path)
            eventually(lambda: made.client(1).info("replication")["master_link_status"] == "up", 20)
            yield made


@pytest.fixture
def workers(pair: Pair) -> Iterator[list[Command]]:
    """Two, which listen."""
    settings = in_environment({"lease": LEASE, "crash_delays": (0.0,)})
    places = [pair.directory / name for name in ("one", "two")]
    for place in places:
        place.mkdir()
        (place / "notes").symlink_to(pair.directory / "notes")
    (pair.directory / "notes").mkdir()
    with (
        command(pair.url, places[0], "--handlers", str(APP), **settings) as one,
        command(pair.url, places[1], "--handlers", str(APP), **settings) as two,
    ):
        eventually(lambda: len(pair.rm.connection.smembers("rq:workers")) == 2, 30, "both listen")
        yield [one, two]


def patiently(ask: Any) -> Any:
    """What the server says, once there is one."""
    answers: list[Any] = []

    def asked() -> bool:
        try:
            answers.append(ask())
        except RedisError:
            return False
        return True

    eventually(asked, PATIENCE, "a server answers")
    return answers[0]


def token_of(client: redis.Redis, key: str) -> int:
    running, ended = client.hmget(f"arm:status:{key}", "token", "done_token")
    return int(running or ended or 0)


def test_a_failover_under_load_loses_only_what_was_not_replicated(pair: Pair, workers: list[Command]) -> None:
    """Row 34."""
    rm, replica = pair.rm, pair.client(1)
    kept = [status.key for status in rm.submit_many([f"/soak/{n}" for n in range(40)])]
    eventually(lambda: rm.status(kept[5]).state is State.COMPLETED, 20, "there is load")
    assert rm.connection.wait(1, 5000) == 1, "the replica has all of them"
    with FaultProxy(("127.0.0.1", pair.ports[0])) as dark, ThreadPoolExecutor(8) as pool:
        dark.blackhole = True
        replica.replicaof("127.0.0.1", int(dark.url.rpartition(":")[2]))
        lost = [status.key for status in rm.submit_many([f"/soak/{n}" for n in range(40, 50)])]
        waiting: list[Future[Any]] = [pool.submit(rm.result, key, PATIENCE) for key in (lost[0], lost[-1], kept[-1])]
        assert rm.connection.wait(1, 50) == 0, "the replica has none of these"
        before = {key: token_of(pair.client(0), key) for key in (*kept, *lost)}
        pair.master.kill()
        eventually(pair.is_promoted, 30, "the Sentinel promotes the replica")
        assert {patiently(lambda key=key: rm.status(key)).state for key in lost} == {State.UNKNOWN}  # type: ignore[misc]
        assert {patiently(lambda key=key: rm.result(key, PATIENCE)) for key in kept} == {n * n for n in range(40)}  # type: ignore[misc]
        for future in waiting[:2]:
            assert isinstance(future.exception(PATIENCE), RequestLost)
        assert waiting[2].result(PATIENCE) == 39 * 39
    again = [status.key for status in rm.submit_many([f"/soak/{n}" for n in range(40, 50)])]
    assert again == lost
    assert {status.state for status in rm.wait(again, PATIENCE)} == {State.COMPLETED}
    after = {key: token_of(replica, key) for key in before}
    assert all(after[key] > before[key] for key in lost)
    assert all(after[key] >= before[key] for key in kept[:5])
    ends = Counter(event.key for event in rm.events("0", timeout=0) if event.verb == "complete")
    assert ends == Counter([*kept, *lost])
    audit(replica, rm.core.keys)
    assert [worker.process.poll() for worker in workers] == [None, None], "no worker has ended"


def test_what_an_old_master_takes_after_its_pause_counts_nowhere(pair: Pair) -> None:
    """Row 35: with ``min-replicas-to-write`` it refuses at once."""
    rm, old = pair.rm, pair.client(0)
    key = rm.submit("/soak/1").key
    far = AsyncRequestManager(pair.url, allow_volatile=True, lease=LEASE)
    with (
        asyncio.Runner() as looping,
        RequestManager(f"redis://127.0.0.1:{pair.ports[0]}", allow_volatile=True, lease=LEASE) as stale,
    ):
        lease = stale.queues.next_request()
        assert lease is not None
        assert rm.connection.wait(1, 5000) == 1
        assert looping.run(far.status(key)).state is State.IN_PROGRESS
        old.config_set("min-replicas-to-write", 1)
        old.config_set("min-replicas-max-lag", 1)
        pair.master.pause()
        try:
            eventually(pair.is_promoted, 30, "the Sentinel promotes the replica")
            began = time.monotonic()
            patiently(lambda: rm.status(key))
            patiently(lambda: looping.run(far.status(key)))
            assert time.monotonic() - began < 20, "it does not wait for the one that is silent"
            taken = eventually(lambda: patiently(lambda: next_of(rm)), 20, "somebody else takes it")
            assert taken.token > lease.token
            taken.finish("new")
        finally:
            pair.master.resume()
        with pytest.raises(ResponseError, match="NOREPLICAS"):
            lease.finish("old")
        assert rm.result(key) == looping.run(far.result(key)) == "new"
        looping.run(far.close())


def next_of(rm: RequestManager) -> Any:
    rm.shell.run(flows.sweep(rm.core))
    return rm.queues.next_request()
