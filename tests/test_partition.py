"""Workers that lose their server without being told: half-open connections, partitions, flapping, no place left."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from audit import audit, server_ms
from commands import command
from servers import FaultProxy, eventually, short_directory
from workers import APP, Crew, crew, in_environment, is_alive

from rqarm import State, embedded

pytestmark = pytest.mark.faults

LEASE = 3.0
#: how often the network goes away
AWAY = 5


@pytest.fixture
def proxy(home: embedded.PrivateServer) -> Iterator[FaultProxy]:
    with short_directory() as directory, FaultProxy(home.socket, directory / "proxy.sock") as started:
        yield started


@pytest.fixture
def team(home: embedded.PrivateServer, tmp_path: Path) -> Iterator[Crew]:
    with crew(home.url, tmp_path, crash_delay=0, lease=LEASE) as hired:
        yield hired


def check(team: Crew, *keys: str) -> None:
    """Each request has one result, and nothing else is left of it."""
    ends = Counter(event.key for event in team.rm.events("0", timeout=0) if event.verb == "complete")
    assert ends == Counter(keys)
    audit(team.rm.connection, team.rm.core.keys)


def through(team: Crew, proxy: FaultProxy, url: str, **settings: object) -> None:
    """Hire a worker that reaches the server by the proxy; those after it come straight again."""
    team.url = proxy.url
    team.hire(**settings)
    team.url = url


# -- silence


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_worker_that_is_cut_off_in_silence_ends_its_horse_before_the_lease_does(
    home: embedded.PrivateServer, proxy: FaultProxy, team: Crew, concurrency: int
) -> None:
    """Row 43: all that it asks waits for ever, and it may not wait with it."""
    through(team, proxy, home.url, concurrency=concurrency)
    key = team.rm.submit("/turn/dark").key
    horse = int(team.note("running-dark-1"))
    proxy.blackhole = True
    eventually(lambda: not is_alive(horse), 2 * LEASE, "its worker kills it")
    left_ms = int(team.field(key, "lease_until") or 0) - server_ms(team.rm.connection)
    assert left_ms > 0, "somebody else may have begun it"
    team.hire()
    team.note("running-dark-2")
    team.let_go("dark-2")
    assert team.rm.result(key, timeout=20) == 2
    check(team, key)


def test_a_partition_that_heals_brings_a_result_too_late(
    home: embedded.PrivateServer, proxy: FaultProxy, team: Crew
) -> None:
    """Row 44: the first worker's commit is on its way when the lease ends, and arrives after that of the second."""
    through(team, proxy, home.url)
    before = team.rm.submit("/add/0/0").key
    assert team.rm.result(before, timeout=20) == 0, "the horse has a connection on which it tells the end"
    key = team.rm.submit("/turn/late").key
    horse = int(team.note("running-late-1"))
    proxy.blackhole = True
    team.let_go("late-1")
    eventually(lambda: not is_alive(horse), 2 * LEASE, "its worker kills it")
    second = team.hire()
    team.note("running-late-2")
    team.let_go("late-2")
    assert team.rm.result(key, timeout=20) == 2
    proxy.blackhole = False
    eventually(lambda: team.rm.overview().refusals.get("duplicate", 0) >= 1, 20, "the late commit is refused")
    assert (team.rm.result(key), team.field(key, "crashes")) == (2, b"1")
    second.stop()
    again = team.rm.submit("/add/1/2").key
    assert team.rm.result(again, timeout=30) == 3, "the first one is back"
    assert team.workers[0].lives
    check(team, before, key, again)


def test_connections_that_are_half_open_are_replaced_within_the_lease(
    home: embedded.PrivateServer, proxy: FaultProxy, team: Crew
) -> None:
    """Row 43: a router has forgotten them all, and new ones come through: what runs is not lost."""
    through(team, proxy, home.url, lease=6)
    key = team.rm.submit("/turn/open").key
    horse = team.note("running-open-1")
    proxy.freeze()
    until = team.field(key, "lease_until")
    eventually(lambda: team.field(key, "lease_until") != until, 6, "the lease is renewed on another connection")
    assert is_alive(int(horse))
    team.let_go("open-1")
    assert team.rm.result(key, timeout=30) == 1
    check(team, key)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_result_that_is_ready_while_nobody_can_connect_is_told_later(
    home: embedded.PrivateServer, proxy: FaultProxy, team: Crew, concurrency: int
) -> None:
    """Row 42: the connection with which it was to be told is cut, and another one cannot be made at once."""
    through(team, proxy, home.url, concurrency=concurrency)
    (worker,) = team.workers
    key = team.rm.submit("/turn/ready").key
    team.note("running-ready-1")
    proxy.refuse = True
    proxy.reset_all()
    team.let_go("ready-1")
    told = re.compile("ready: the server refused|asking again|cannot reach")
    eventually(lambda: told.search(worker.log.read_text()), what="it could not be told")
    proxy.refuse = False
    assert team.rm.result(key, timeout=20) == 1
    assert (team.rm.status(key).attempts, team.field(key, "crashes")) == (1, None)
    check(team, key)


def test_a_network_that_comes_and_goes_stops_nothing_for_long(
    home: embedded.PrivateServer, proxy: FaultProxy, team: Crew
) -> None:
    """Row 47: half a second each. There is progress whenever it is there, and no storm when it is not."""
    through(team, proxy, home.url, lease=8)
    through(team, proxy, home.url, lease=8)
    keys = [status.key for status in team.rm.submit_many([f"/soak/{n}" for n in range(30)])]
    pause, tried = threading.Event(), 0

    def ended() -> int:
        return sum(event.verb == "complete" for event in team.rm.events("0", timeout=0))

    for _ in range(AWAY):
        before = ended()
        eventually(lambda before=before: ended() > before, 10, "there is progress")  # type: ignore[misc]
        accepted = proxy.accepted
        proxy.refuse = True
        proxy.reset_all()
        pause.wait(0.5)
        proxy.refuse = False
        tried += proxy.accepted - accepted
    assert ended() < len(keys), "it was hardly away"
    assert tried < 100 * AWAY, "a storm of connections"
    statuses = team.settle(*keys)
    assert {status.state for status in statuses} == {State.COMPLETED}
    assert {team.field(key, "crashes") or b"0" for key in keys} == {b"0"}
    assert all(worker.lives for worker in team.workers)
    check(team, *keys)


def test_a_slow_network_costs_no_lease(home: embedded.PrivateServer, proxy: FaultProxy, team: Crew) -> None:
    """Row 45: each command takes 200 ms."""
    through(team, proxy, home.url)
    proxy.delay = 0.2
    keys = [team.rm.submit(uri).key for uri in ("/nap/1", "/add/1/2", "/turn/slow")]
    horse = int(team.note("running-slow-1"))
    until = {team.field(keys[2], "lease_until")}
    eventually(lambda: until.add(team.field(keys[2], "lease_until")) or len(until) >= 4, 20, "it is renewed and again")
    team.let_go("slow-1")
    statuses = team.settle(*keys)
    assert {status.attempts for status in statuses} == {1}
    assert is_alive(horse)
    assert team.rm.cache.stats().executions.get("crashed", 0) == 0
    check(team, *keys)


# -- no place left


def test_a_server_without_a_free_connection_lets_new_workers_wait(tmp_path: Path) -> None:
    """Row 40."""
    with (
        servers.throwaway(servers.VALKEY or servers.REDIS) as server,
        crew(server.url, tmp_path, lease=LEASE) as team,
    ):
        worker, client = team.hire(), team.rm.connection
        keys = [team.rm.submit("/nap/1").key]
        for n in range(3):
            keys += [status.key for status in team.rm.submit_many([f"/soak/{5 * n + m}" for m in range(5)])]
            team.settle(*keys)
            eventually(lambda: client.info("clients")["blocked_clients"] == 3, 20, "all its connections are open")
        client.config_set("maxclients", client.info("clients")["connected_clients"])
        options = ("--handlers", str(APP), "--no-scheduler")
        with command(server.url, team.directory, *options, **in_environment(team.settings)) as late:
            eventually(lambda: client.info("stats")["rejected_connections"] >= 5, 30, "it asks again")
            assert worker.lives
            client.config_set("maxclients", 100)
            keys += [status.key for status in team.rm.submit_many([f"/soak/{n}" for n in range(15, 30)])]
            team.settle(*keys)
            worker.stop()
            keys.append(team.rm.submit("/add/1/2").key)
            assert team.rm.result(keys[-1], timeout=30) == 3, late.said
        check(team, *keys)
