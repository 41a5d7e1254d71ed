"""The server's clock steps, or that of a worker is wrong; nobody changes the clock of this machine.

libfaketime (Debian's package ``faketime``) is loaded into one process and reads its offset from a file. It works with
Valkey; Redis as Debian builds it hangs with it.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
import servers
from audit import audit, server_ms
from servers import eventually
from workers import TESTS, Crew, crew

from rqarm import State, embedded

FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        FAKETIME is None, reason="no libfaketime here (apt-get install faketime): the clock tests are left out"
    ),
    pytest.mark.skipif(servers.VALKEY is None, reason=servers.MISSING["valkey"]),
]

LEASE = 4.0


def with_clock(file: Path) -> dict[str, str]:
    """The environment of a process whose clock is that of the file; what counts durations is left alone."""
    return {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


@contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({name: value} if value is not None else {})


class Clock:
    """The clock of the server."""

    def __init__(self, file: Path, client: redis.Redis) -> None:
        self._file, self._client = file, client

    def step(self, seconds: int) -> None:
        """Put it so far from the right time; back when it has taken effect."""
        before = server_ms(self._client)
        self._file.write_text(f"{seconds:+d}\n")
        eventually(lambda: abs(server_ms(self._client) - before) > 30_000, what="the server's clock steps")


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[tuple[Clock, Crew]]:
    """A server with a clock of its own, and a crew on it."""
    file = tmp_path / "clock"
    file.write_text("+0\n")
    with servers.short_directory() as directory:
        with environment(with_clock(file)):
            server = embedded.private(directory, binary=servers.VALKEY, args=servers.TEST_ARGS)
        with server, crew(server.url, tmp_path, crash_delay=0, lease=LEASE) as team:
            yield Clock(file, team.rm.connection), team


def ends(team: Crew) -> Counter[str]:
    return Counter(event.key for event in team.rm.events("0", timeout=0) if event.verb == "complete")


def running(team: Crew, count: int) -> list[str]:
    """Requests that run until they are let go, each on a worker of its own."""
    keys = [team.rm.submit(f"/turn/{n}").key for n in range(count)]
    for n in range(count):
        team.note(f"running-{n}-1")
    return keys


def tokens(team: Crew, keys: list[str]) -> list[int]:
    return [int(team.field(key, "token") or team.field(key, "done_token") or 0) for key in keys]


def each_ends_within_two_attempts(team: Crew, keys: list[str]) -> None:
    for n in range(2):
        for attempt in (1, 2):
            team.let_go(f"{n}-{attempt}")
    statuses = team.settle(*keys)
    assert {status.state for status in statuses} == {State.COMPLETED}
    assert all(status.attempts <= 2 for status in statuses)


def test_a_clock_put_forward_lets_all_leases_lapse_and_nothing_counts_twice(stage: tuple[Clock, Crew]) -> None:
    """Row 48: each runs once more at the most, one of the attempts commits, and the step is told."""
    clock, team = stage
    for _ in range(2):
        team.hire()
    keys = running(team, 2)
    before = tokens(team, keys)
    clock.step(120)
    steps = eventually(lambda: team.rm.cache.stats().sweeps.get("clock_steps"), 20, "a worker has seen it")
    assert steps <= 2
    each_ends_within_two_attempts(team, keys)
    assert all(after >= earlier for earlier, after in zip(before, tokens(team, keys), strict=True))
    assert any("clock has stepped by +120 s" in worker.log.read_text() for worker in team.workers)
    assert all(worker.lives for worker in team.workers)
    again = team.rm.submit("/add/1/2").key
    assert team.rm.result(again, timeout=20) == 3
    assert ends(team) == Counter([*keys, again])
    audit(team.rm.connection, team.rm.core.keys)


def test_a_clock_put_back_keeps_no_dead_lease_alive(stage: tuple[Clock, Crew]) -> None:
    """Row 49: a lease that ends in minutes is cut to one, and tokens rise all the same."""
    clock, team = stage
    worker = team.hire()
    keys = running(team, 1)
    before = tokens(team, keys)
    os.kill(int(team.note("running-0-1")), signal.SIGSTOP)
    worker.kill()
    clock.step(-420)
    assert int(team.field(keys[0], "lease_until") or 0) > server_ms(team.rm.connection) + 400_000
    team.hire()
    team.let_go("0-2")
    assert team.rm.result(keys[0], timeout=30) == 2
    assert tokens(team, keys)[0] > before[0]
    assert team.rm.cache.stats().sweeps["clamped"] == 1
    assert ends(team) == Counter(keys)
    audit(team.rm.connection, team.rm.core.keys)


def test_a_clock_put_back_costs_a_living_worker_nothing(stage: tuple[Clock, Crew]) -> None:
    """Row 49: what runs is renewed, what waits is run, and the step is told."""
    clock, team = stage
    team.hire()
    keys = running(team, 1)
    clock.step(-420)
    eventually(lambda: team.rm.cache.stats().sweeps.get("clock_steps"), 20, "the worker has seen it")
    keys.append(team.rm.submit("/add/1/2").key)
    team.let_go("0-1")
    assert team.rm.result(keys[0], timeout=20) == 1
    assert team.rm.result(keys[1], timeout=20) == 3
    assert [status.attempts for status in team.settle(*keys)] == [1, 1]
    assert ends(team) == Counter(keys)
    audit(team.rm.connection, team.rm.core.keys)


@pytest.mark.parametrize("hours", [-1, 1])
def test_the_clock_of_a_worker_means_nothing(home: embedded.PrivateServer, tmp_path: Path, hours: int) -> None:
    """Row 50: it is an hour wrong and renews, sweeps, delays and ends like any other, beside one that is right."""
    with crew(home.url, tmp_path, crash_delay=0, lease=LEASE / 2) as team:
        with environment({"PYTHONPATH": str(TESTS / "wrong_clock"), "WRONG_BY": str(hours * 3600)}):
            wrong = team.hire()
        delayed = team.rm.submit("/later/1").key
        eventually(lambda: (status := team.rm.status(delayed)).attempts == 1 and status.state is State.PENDING)
        keys = [*running(team, 1), delayed]
        right = team.hire()
        until = {team.field(keys[0], "lease_until")}
        eventually(lambda: until.add(team.field(keys[0], "lease_until")) or len(until) >= 4, 20, "it is renewed")
        team.let_go("0-1")
        statuses = team.settle(*keys)
        assert [(status.attempts, status.state) for status in statuses] == [(1, State.COMPLETED), (2, State.COMPLETED)]
        assert statuses[0].worker == wrong.name
        assert right.lives
        assert wrong.lives
        assert ends(team) == Counter(keys)
        audit(team.rm.connection, team.rm.core.keys)


def test_a_machine_that_was_suspended_runs_everything_once_more_at_the_most(
    stage: tuple[Clock, Crew],
) -> None:
    """Row 51: server and workers stop together for longer than a lease; only the server's clock has gone on."""
    clock, team = stage
    for _ in range(2):
        team.hire()
    keys = running(team, 2)
    everybody = [worker.pid for worker in team.workers] + [int(team.note(f"running-{n}-1")) for n in range(2)]
    for pid in everybody:
        os.kill(pid, signal.SIGSTOP)
    clock.step(300)
    for pid in everybody:
        os.kill(pid, signal.SIGCONT)
    each_ends_within_two_attempts(team, keys)
    assert all(worker.lives for worker in team.workers)
    assert ends(team) == Counter(keys)
    audit(team.rm.connection, team.rm.core.keys)
