"""Every point at which a worker can be cut off or die: at each command of its life, before it, after it, in its reply.

A life is what the processes of a worker say to the server from a submit until all is quiet again. It is recorded once,
through a proxy, then lived again for each of its commands with a fault at that command. Every request must end once, a
lost connection costs no execution, and the worker is the same process afterwards.

The full product takes minutes; the tests take a sample with a fixed seed, and RQARM_EXPLORE=1 all of it.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import servers
from audit import audit
from commands import command
from servers import FaultProxy, eventually, short_directory
from workers import APP, Crew, WorkerProcess, crew, in_environment, is_alive

from rqarm import BatchStatus, State
from rqarm.rqjobs import queue_names

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="who has sent a command is known by SO_PEERCRED"),
]

SEED = 43
EXPLORE = bool(os.environ.get("RQARM_EXPLORE"))
LEASE = 2.0
_names = itertools.count()


class Lives:
    """A crew whose workers reach the server through a proxy; the crew's own manager goes straight."""

    def __init__(self, team: Crew, proxy: FaultProxy) -> None:
        self.team, self.proxy = team, proxy
        self.chance = random.Random(SEED)
        self.keys: list[str] = []
        self.met = self.lived = 0

    def hire(self, **settings: Any) -> WorkerProcess:
        worker = self.team.hire(**settings)
        self.quiet()
        return worker

    def horse(self, worker: WorkerProcess) -> int:
        """The process that takes and ends requests."""
        (pid,) = {pid for pid, name in self.proxy.seen if name == "BLMOVE" and pid != worker.pid and is_alive(pid)}
        return pid

    def quiet(self) -> None:
        """Until one horse waits for work in every list."""
        lists, server = len(queue_names(self.team.name)), self.team.rm.connection
        eventually(lambda: server.info("clients")["blocked_clients"] == lists, 30, "a horse waits for work")

    def live(self, uri: str, state: State = State.COMPLETED) -> BatchStatus:
        """One request, from its submit until all is quiet again."""
        key = self.team.rm.submit(uri).key
        (status,) = self.team.settle(key, timeout=30)
        assert status.state is state, status.error
        if state is State.COMPLETED:
            self.keys.append(key)
        self.quiet()
        return status

    def record(self, sender: int, life: Callable[[], Any]) -> list[str]:
        """What one process says in one life. The first one loads scripts; of the others the shorter counts, for now and
        then one also opens a connection or sweeps.
        """
        said = []
        for _ in range(4):
            self.proxy.seen.clear()
            life()
            said.append([name for pid, name in self.proxy.seen if pid == sender])
        return min(said[1:], key=len)

    def points(self, commands: list[str], modes: tuple[str, ...], sample: int) -> Iterator[tuple[int, str]]:
        """Number and mode of each fault to try; counts how many of them are met."""
        # each command once, as far as the sample goes, before any for the second time
        turns = [self.chance.sample(modes, len(modes)) for _ in commands]
        rounds = [[(at + 1, turn[n]) for at, turn in enumerate(turns)] for n in range(len(modes))]
        product = [point for each in rounds for point in self.chance.sample(each, len(each))]
        for point in product if EXPLORE else product[:sample]:
            yield point
            self.lived += 1
            self.met += self.proxy.disarm()

    def crashes(self, status: BatchStatus) -> int:
        return int(self.team.field(status.key, "crashes") or 0)

    def check(self) -> None:
        """Every request of all lives has ended once, and nothing else is left."""
        ends = Counter(event.key for event in self.team.rm.events("0", timeout=0) if event.verb == "complete")
        assert ends == Counter(self.keys)
        audit(self.team.rm.connection, self.team.rm.core.keys)
        assert self.met >= self.lived / 2, f"only {self.met} of {self.lived} faults were met"


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Lives]:
    with (
        servers.throwaway(servers.VALKEY or servers.REDIS) as server,
        short_directory() as directory,
        FaultProxy(server.socket, directory / "proxy.sock") as proxy,
        crew(server.url, tmp_path, crash_delay=0, lease=LEASE) as team,
    ):
        team.url = proxy.url
        yield Lives(team, proxy)


#: what the handler does, how it ends, after how many attempts, and how many faults are tried
KINDS = {
    "completed": ("/add/{n}/1", State.COMPLETED, 1, 18),
    "failed": ("/fail/{n}", State.FAILED, 2, 9),
    "in pieces": (f"/stream/3/{1 << 20}?n={{n}}", State.COMPLETED, 1, 4),
}


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_cut_at_any_command_of_the_horse_costs_no_execution(
    lives: Lives, kind: str, concurrency: int
) -> None:
    """Rows 9, 10, 17, 23, 42. A request that fails is retried once; then RQ is told of its failure."""
    uri, state, attempts, sample = KINDS[kind]
    worker = lives.hire(concurrency=concurrency)
    horse = lives.horse(worker)

    def life() -> BatchStatus:
        return lives.live(uri.format(n=next(_names)), state)

    commands = lives.record(horse, life)
    for at, mode in lives.points(commands, ("before", "after", "mid"), sample):
        lives.proxy.arm(mode, at=at, sender=horse)
        status = life()
        where = f"{mode} {at} of {commands}"
        assert (status.attempts, lives.crashes(status)) == (attempts, 0), where
        assert lives.horse(worker) == horse, where
    assert worker.lives
    lives.check()


def test_what_was_taken_unheard_while_the_worker_is_told_to_stop_goes_back(lives: Lives) -> None:
    """Rows 10, 15: the reply is lost, and nobody will ask for it again."""
    worker = lives.hire(concurrency=3)
    lives.live("/add/1/1")
    lives.proxy.arm("after", command="EVALSHA", sender=lives.horse(worker), then=partial(worker.signal, signal.SIGTERM))
    key = lives.team.rm.submit("/add/2/1").key
    assert worker.wait() == 0
    status = lives.team.rm.status(key)
    assert (status.state, status.attempts, lives.crashes(status)) == (State.PENDING, 0, 0)
    lives.hire(concurrency=3)
    lives.team.settle(key)
    lives.keys.append(key)
    lives.check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_horse_killed_at_any_of_its_commands_is_missed_for_one_attempt(lives: Lives, kind: str) -> None:
    """Rows 18, 22: its parent hears of it, and says how the attempt ended unless it had said so itself."""
    uri, state, attempts, sample = KINDS[kind]
    worker = lives.hire()

    def life() -> BatchStatus:
        return lives.live(uri.format(n=next(_names)), state)

    commands = lives.record(lives.horse(worker), life)
    for at, mode in lives.points(commands, ("before", "after"), min(sample, 6)):
        horse = lives.horse(worker)
        lives.proxy.arm(mode, at=at, sender=horse, then=partial(os.kill, horse, signal.SIGKILL))
        status = life()
        where = f"{mode} {at} of {commands}"
        assert lives.crashes(status) <= 1, where
        assert attempts <= status.attempts <= attempts + lives.crashes(status), where
    assert worker.lives
    lives.check()


def test_a_worker_killed_at_any_command_of_its_horse_is_succeeded(lives: Lives) -> None:
    """Rows 9, 11, 12, 17, 22: horse and worker die at once, and the lease is all that tells."""
    worker = lives.hire()

    def life() -> BatchStatus:
        return lives.live(f"/add/{next(_names)}/1")

    commands = lives.record(lives.horse(worker), life)
    for at, mode in lives.points(commands, ("before", "after"), 3):
        killed = threading.Event()

        def both_die(worker: WorkerProcess = worker, killed: threading.Event = killed) -> None:
            os.kill(lives.horse(worker), signal.SIGKILL)
            worker.kill()
            killed.set()

        lives.proxy.arm(mode, at=at, sender=lives.horse(worker), then=both_die)
        key = lives.team.rm.submit(f"/add/{next(_names)}/1").key
        if not killed.wait(5):
            worker.kill()
        worker = lives.hire()
        (status,) = lives.team.settle(key, timeout=30)
        lives.keys.append(key)
        lives.quiet()
        assert lives.crashes(status) <= 1, f"{mode} {at} of {commands}"
    lives.check()


def test_a_connection_cut_at_any_command_of_the_parent_costs_no_execution(lives: Lives) -> None:
    """Rows 13, 16, 42: it renews what runs, shows it to RQ's tools and hides it, gives signs of life, and sweeps."""
    worker = lives.hire()

    def life() -> BatchStatus:
        return lives.live(f"/nap/{next(_names)}")

    commands = lives.record(worker.pid, life)
    for at, mode in lives.points(commands, ("before", "after", "mid"), 6):
        lives.proxy.arm(mode, at=at, sender=worker.pid)
        status = life()
        assert (status.attempts, lives.crashes(status)) == (1, 0), f"{mode} {at} of {commands}"
    assert worker.lives
    lives.check()


def test_a_worker_cut_off_at_any_command_of_its_birth_and_of_its_end_hands_back_what_it_runs(
    lives: Lives, tmp_path: Path
) -> None:
    """Row 15: each worker ends what the one before it has handed back, then takes another and is told to stop."""
    team, proxy = lives.team, lives.proxy
    settings = in_environment(team.settings | {"shutdown_timeout": 0.1})
    options = ("--handlers", str(APP), "--no-scheduler")

    def life(birth: Callable[[], None], end: Callable[[int], None]) -> tuple[list[str], list[str]]:
        """What a worker says until it runs a request, and after it was told to stop."""
        name = str(next(_names))
        proxy.seen.clear()
        birth()
        with command(proxy.url, team.directory, *options, **settings) as running:
            key = team.rm.submit(f"/wait/{name}").key
            team.let_go(str(int(name) - 1))
            team.running(name)
            born, met = [said for _, said in proxy.seen], proxy.disarm()
            proxy.seen.clear()
            end(running.pid)
            running.signal(signal.SIGTERM)
            assert running.wait(20) == 0, running.said
            status = team.rm.status(key)
            assert (status.state, status.attempts, lives.crashes(status)) == (State.PENDING, 0, 0), running.said
        lives.keys.append(key)
        lives.met += met
        return born, [said for pid, said in proxy.seen if pid == running.pid]

    born, ended = life(lambda: None, lambda _: None)
    lives.met = 0
    births = lives.points(born, ("before", "after", "mid"), 3)
    ends = lives.points(ended, ("before", "after", "mid"), 3)
    for (at, mode), (last_at, last_mode) in zip_longest(births, ends, fillvalue=(1, "before")):
        life(partial(proxy.arm, mode, at=at), lambda pid, m=last_mode, n=last_at: proxy.arm(m, at=n, sender=pid))  # type: ignore[misc]
    team.let_go(str(next(_names) - 1))
    lives.hire()
    team.settle(*lives.keys, timeout=20)
    lives.check()
