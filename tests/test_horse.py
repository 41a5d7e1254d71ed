"""What issue 3 promises of the warm horse: its board, its life, RQ's ways around it, and many requests at a time."""

from __future__ import annotations

import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rq
import servers
from commands import Command, command, family, finished
from rq.command import send_shutdown_command, send_stop_job_command
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer
from servers import eventually
from workers import LEASE, PATIENCE, TESTS, Crew, WorkerProcess, crew, is_alive, timed

from rqarm import BatchRequest, RequestFailed, RequestManager, State, Worker, connect, embedded, flows
from rqarm.config import Settings
from rqarm.model import Key, Priority, Token
from rqarm.replies import NO_REQUEST, Attempt, Taken
from rqarm.rqjobs import queue_names
from rqarm.worker import board as board_module
from rqarm.worker import stable as stable_module
from rqarm.worker.board import _PAGE, Board
from rqarm.worker.horse import Horse, Waiting
from rqarm.worker.stable import Stable, _Animal, _Run

HORSE_APP = TESTS / "horse_app.py"
LANES = 20

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def team(home: embedded.PrivateServer, tmp_path: Path) -> Iterator[Crew]:
    """A crew of this test alone; it hires whom it needs."""
    with crew(home.url, tmp_path, handlers=HORSE_APP, crash_delay=0) as hired:
        yield hired


def words(team: Crew, name: str) -> list[str]:
    """What handlers added to a file of notes."""
    path = team.directory / "notes" / name
    return path.read_text().split() if path.exists() else []


def ordinary(team: Crew, name: str) -> rq.Queue:
    return rq.Queue(name, connection=team.rm.connection, serializer=JSONSerializer)


def unharmed(team: Crew, key: str, attempts: int = 1) -> None:
    """The request has ended well, and no crash was counted."""
    (status,) = team.settle(key)
    assert (status.state, status.attempts, team.field(key, "crashes")) == (State.COMPLETED, attempts, None)


# -- the board


def attempt(number: int = 1, queue: str = "arm", key: str = "k", job_id: str = "k-0123abcd") -> Attempt:
    return Attempt(
        Key(key), Token(1 << 53), number, NO_REQUEST, {}, 2, 1, queue, Priority.HIGH, job_id=job_id, owns_job=True
    )


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board(3)
    yield board
    board.close()


def test_what_is_shown_is_read(board: Board) -> None:
    assert list(board.turns()) == []
    assert board.look(1) == (0, None)
    board.show(1, 7, attempt(3), 12.5, 60.0)
    (turn,) = board.turns()
    assert (turn.lane, turn.number, turn.began, turn.limit) == (1, 7, 12.5, 60.0)
    assert turn.as_attempt() == attempt(3)
    board.show(1, 7, None)
    assert board.look(1) == (7, None)
    assert list(board.turns()) == []


def test_lanes_do_not_write_over_each_other(board: Board) -> None:
    for lane in range(3):
        board.show(lane, lane + 1, attempt(queue="q" * 3900, key=f"k{lane}"))
    assert [(turn.lane, turn.number, turn.key) for turn in board.turns()] == [(0, 1, "k0"), (1, 2, "k1"), (2, 3, "k2")]


def test_a_parent_reads_what_its_child_shows(board: Board) -> None:
    pid = os.fork()
    if pid == 0:
        board.show(2, 1, attempt(key="child"))
        board.count(0.5, is_good=True)
        os._exit(0)
    os.waitpid(pid, 0)
    assert board.look(2)[1] is not None
    assert board.counters() == (1, 1, 0.5)


class Torn(Exception):
    """The writer dies here."""


class TornMemory:
    """Memory that dies in the middle of the write of a page."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def __setitem__(self, place: slice, value: bytes) -> None:
        half = len(value) // 2
        self.memory[place.start : place.start + half] = value[:half]
        raise Torn


class Packer:
    """A struct that knows TornMemory."""

    def __init__(self, packer: struct.Struct) -> None:
        self._packer, self.size = packer, packer.size

    def pack_into(self, memory: Any, at: int, *values: int) -> None:
        self._packer.pack_into(getattr(memory, "memory", memory), at, *values)

    def unpack_from(self, memory: Any, at: int) -> Any:
        return self._packer.unpack_from(getattr(memory, "memory", memory), at)


def test_a_writer_that_dies_in_the_middle_leaves_the_old_page(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever page is the next one."""
    for name in ("_NUMBER", "_SIZE"):
        monkeypatch.setattr(board_module, name, Packer(getattr(board_module, name)))
    whole = board._memory
    for number in range(1, 5):
        board.show(0, number, attempt(key=f"whole{number}"))
        board._memory = TornMemory(whole)  # type: ignore[assignment]
        with pytest.raises(Torn):
            board.show(0, 99, attempt(key="torn" * 20))
        board._memory = whole
        (turn,) = board.turns()
        assert (turn.number, turn.key) == (number, f"whole{number}")


def test_a_stop_is_for_one_turn_of_one_lane(board: Board) -> None:
    board.show(0, 5, attempt())
    board.show(1, 5, attempt())
    assert not board.must_stop(0, 5)
    board.stop(0, 5)
    assert [board.must_stop(0, 5), board.must_stop(0, 6), board.must_stop(1, 5)] == [True, False, False]
    board.allow(0)
    assert not board.must_stop(0, 5)


def test_counters_add_up(board: Board) -> None:
    assert board.counters() == (0, 0, 0.0)
    for seconds, is_completed in ((0.25, True), (1.5, False), (0.25, True)):
        board.count(seconds, is_good=is_completed)
    assert board.counters() == (3, 2, 2.0)


def test_the_longest_key_fits_and_what_does_not_is_refused(board: Board) -> None:
    board.show(0, 1, attempt(key="k" * 200, job_id="k" * 209, queue="q" * 1000))
    (turn,) = board.turns()
    assert (len(turn.key), len(turn.queue)) == (200, 1000)
    with pytest.raises(ValueError, match="do not fit"):
        board.show(0, 2, attempt(queue="q" * _PAGE))
    assert board.look(0)[0] == 1, "the old one stands"


# -- one process for many requests


def test_many_requests_run_in_one_process(team: Crew) -> None:
    worker = team.hire()
    pids = {team.rm.get(f"/pid/{n}", timeout=20) for n in range(10)}
    keys = [status.key for status in team.rm.submit_many([f"/pid/many{n}" for n in range(30)])]
    team.settle(*keys)
    assert pids | {team.rm.result(key) for key in keys} == (only := pids)
    assert len(only) == 1
    assert worker.pid not in only


def test_the_process_is_replaced_after_its_number_of_requests(team: Crew) -> None:
    team.hire(max_jobs_per_horse=3)
    keys = [status.key for status in team.rm.submit_many([f"/with/{n}" for n in range(9)])]
    team.settle(*keys)
    pids = [team.rm.result(key) for key in keys]
    assert list(Counter(pids).values()) == [3, 3, 3]
    assert [key for key, _ in itertools.groupby(pids)] == list(dict.fromkeys(pids))
    eventually(lambda: not any(is_alive(pid) for pid in pids[:6]))


def test_the_process_is_replaced_when_it_keeps_too_much_memory(team: Crew) -> None:
    team.hire(max_horse_memory=200)
    small = {team.rm.get(f"/keep/1/{n}", timeout=20) for n in range(3)}
    assert len(small) == 1
    assert {team.rm.get("/keep/250/x", timeout=20)} == small
    names = itertools.count()
    eventually(lambda: {team.rm.get(f"/pid/{next(names)}", timeout=20)} != small, 10, "another one")
    assert next(names) <= 52, "after so many requests or half a second at the latest"


def test_a_resource_is_built_once_for_a_process_and_torn_down_at_its_end(team: Crew) -> None:
    worker = team.hire(max_jobs_per_horse=4)
    pids = [team.rm.get(f"/with/{n}", timeout=20) for n in range(6)]
    first, second = dict.fromkeys(pids)
    eventually(lambda: words(team, "torn-down") == [str(first)], 10, "its process was replaced")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert words(team, "built") == [str(first), str(second)]
    assert words(team, "torn-down") == [str(first), str(second)]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_async_resources_too(team: Crew, concurrency: int) -> None:
    worker = team.hire(concurrency=concurrency)
    keys = [status.key for status in team.rm.submit_many([f"/async-with/{n}" for n in range(8)])]
    team.settle(*keys)
    (pid,) = {team.rm.result(key) for key in keys}
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert (words(team, "async-built"), words(team, "async-torn-down")) == ([str(pid)], [str(pid)])


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("how", ["exit", "kill"])
def test_the_last_words_of_a_handler_are_in_the_log(team: Crew, how: str, concurrency: int) -> None:
    worker = team.hire(max_attempts=1, concurrency=concurrency)
    key = team.rm.submit(f"/last-words/{how}").key
    (status,) = team.settle(key)
    assert status.quarantined
    said = worker.log.read_text()
    assert f"printed before {how}" in said
    assert f"complained before {how}" in said


def test_an_error_that_no_utf8_can_hold_is_stored_and_shown(team: Crew) -> None:
    team.hire()
    key = team.rm.submit("/surrogate").key
    job = team.job(key)
    (status,) = team.settle(key)
    assert status.state is State.FAILED
    eventually(lambda: job.get_status(refresh=True) is JobStatus.FAILED)
    assert r"of \udc80" in job.latest_result().exc_string
    assert StartedJobRegistry(team.name, connection=team.rm.connection).get_job_ids(cleanup=False) == []


# -- what a request costs


def test_a_busy_worker_asks_the_server_once_for_each_request(home: embedded.PrivateServer, tmp_path: Path) -> None:
    """The difference between a short and a long burst: what the start and the end cost goes out."""
    counted = []
    for number in (50, 450):
        with servers.throwaway(home.binary) as server, crew(server.url, tmp_path, handlers=HORSE_APP) as hired:
            hired.rm.submit_many([f"/add/{n}/1" for n in range(number)])
            before = costs(hired.rm)
            worker = hired.start("rqarm.Worker", "--burst")
            assert worker.wait(60) == 0
            after = costs(hired.rm)
            assert len(hired.rm.queue()) == 0
            counted.append([new - old for new, old in zip(after, before, strict=True)])
    reads, scripts, commands = (long - short for short, long in zip(*counted, strict=True))
    assert reads / 400 <= 1.3
    assert scripts / 400 <= 2.1, "the end of one and the start of the next"
    assert commands / 400 <= 60, "those inside the scripts too"


@pytest.fixture
def lonely(home: embedded.PrivateServer, tmp_path: Path) -> Iterator[Crew]:
    """A crew on a server where nobody else blocks or asks."""
    with servers.throwaway(home.binary) as server, crew(server.url, tmp_path, handlers=HORSE_APP) as hired:
        yield hired


def test_behind_an_idle_worker_the_start_comes_with_the_wake_up(lonely: Crew) -> None:
    """Three scripts for a lone request: its submit, its start and its end. Nobody asks whether there is one."""
    lonely.hire(lease=60)
    assert lonely.rm.get("/add/0/1", timeout=20) == 1
    before = costs(lonely.rm)
    for n in range(1, 21):
        since = list(lonely.rm.events("0", 0))[-1].id
        key = lonely.rm.submit(f"/add/{n}/1").key
        assert any((event.verb, event.key) == ("complete", key) for event in lonely.rm.events(since, 20))
        waiting_for_work(lonely)
    _, scripts, _ = (new - old for new, old in zip(costs(lonely.rm), before, strict=True))
    assert scripts <= 20 * 3 + 3, "a sweep in between"


def test_a_worker_that_was_idle_is_busy_when_much_comes_at_once(lonely: Crew) -> None:
    """Only who finds nothing behind its request ends that alone, and waits for the next."""
    lonely.hire(lease=60)
    assert lonely.rm.get("/add/0/1", timeout=20) == 1
    waiting_for_work(lonely)
    before = costs(lonely.rm)
    keys = [status.key for status in lonely.rm.submit_many([f"/add/{n}/1" for n in range(1, 401)])]
    assert {status.state for status in lonely.rm.wait(keys, timeout=30)} == {State.COMPLETED}
    reads, _, _ = (new - old for new, old in zip(costs(lonely.rm), before, strict=True))
    assert reads / 400 <= 1.4


def waiting_for_work(team: Crew) -> None:
    """Each of the three lists has somebody who blocks on it."""
    eventually(lambda: sum(entry["cmd"] == "blmove" for entry in team.rm.connection.client_list()) >= 3)  # type: ignore[union-attr]


def costs(rm: RequestManager) -> list[int]:
    """Reads from sockets, scripts, commands."""
    calls = {name: entry["calls"] for name, entry in rm.connection.info("commandstats").items()}
    return [rm.connection.info("stats")["total_reads_processed"], calls.get("cmdstat_evalsha", 0), sum(calls.values())]


# -- between the take and the handler


@pytest.mark.parametrize("concurrency", [1, 4])
def test_what_a_horse_took_but_never_began_is_handed_back_at_once(
    home: embedded.PrivateServer, tmp_path: Path, concurrency: int
) -> None:
    """By the end of the one before it, or from the idle."""
    with crew(home.url, tmp_path, handlers=HORSE_APP, lease=30, concurrency=concurrency) as team:
        # of what runs beside it, nobody could know that it was not the one
        uris = ["/orphan/a"] if concurrency > 1 else ["/add/1/2", "/orphan/a", "/add/2/2"]
        keys = [status.key for status in team.rm.submit_many(uris)]
        worker = team.hire("orphan_worker.Worker")
        for key in keys:
            unharmed(team, key)
        idle = team.rm.submit("/orphan/b").key
        assert timed(lambda: team.settle(idle)) < 10
        unharmed(team, idle)
        assert worker.lives
        assert {note.name for note in (team.directory / "notes").glob("-orphan-*")} == {"-orphan-a", "-orphan-b"}


def test_what_a_horse_was_given_while_it_stood_still_outlives_it(lonely: Crew) -> None:
    """The server starts what an idle horse has asked for before; the parent finds it without a sign of the horse."""
    team, worker = lonely, lonely.hire(lease=60)
    horse = int(team.rm.get("/pid/a", timeout=20))
    waiting_for_work(team)
    os.kill(horse, signal.SIGSTOP)
    key = team.rm.submit("/add/3/4").key
    team.reaches(key, State.IN_PROGRESS)
    os.kill(horse, signal.SIGKILL)
    unharmed(team, key)
    assert worker.lives


def test_what_an_idle_worker_has_asked_for_is_not_started_when_it_has_gone(team: Crew) -> None:
    worker = team.hire(lease=60)
    assert team.rm.get("/add/1/2", timeout=20) == 3
    waiting_for_work(team)
    worker.signal(signal.SIGTERM)
    keys = [team.rm.submit(f"/add/{n}/2").key for n in range(20)]
    worker.wait()
    ended = [key for key in keys if team.rm.status(key).state is State.COMPLETED]
    assert all(team.rm.status(key).state is State.PENDING for key in keys if key not in ended)
    team.hire(lease=60)
    for key in keys:
        unharmed(team, key)


@pytest.fixture
def manager(home: embedded.PrivateServer) -> Iterator[RequestManager]:
    with servers.throwaway(home.binary) as server, RequestManager(server.url, allow_volatile=True) as manager:
        yield manager


def test_of_two_lists_that_answer_the_one_counts_that_had_something(manager: RequestManager) -> None:
    lists = manager.core.jobs.lists("arm")
    waiting = Waiting(manager.shell, lists, 60.0)
    take = manager.core.calls.take(lists, "x.1", "w", "w", 60_000, for_rq=True)
    manager.shell.execute(take)  # the server has the script from here on
    waiting.arm(take)
    blocked = [entry["id"] for entry in manager.connection.client_list() if entry["cmd"] == "blmove"]  # type: ignore[union-attr]
    assert len(blocked) == len(lists)
    assert manager.connection.client_unblock(blocked[0])  # it finds nothing
    key = manager.submit("/a").key
    taken = waiting.wait(manager.connection.connection_pool.get_connection()._sock.fileno(), take)
    assert isinstance(taken, Taken)
    assert taken.attempt is not None
    assert (taken.attempt.key, taken.list) == (key, lists[1])
    waiting.close()


def test_the_answer_to_an_earlier_take_is_not_that_of_the_next(manager: RequestManager) -> None:
    lists = manager.core.jobs.lists("arm")
    waiting = Waiting(manager.shell, lists, 60.0)
    first, second = (manager.core.calls.take(lists, f"x.{n}", "w", "w", 60_000, for_rq=True) for n in (1, 2))
    idle = manager.connection.connection_pool.get_connection()._sock.fileno()
    manager.shell.execute(first)  # the server has the script from here on
    manager.submit("/a")
    taken = waiting.wait(idle, first)
    assert isinstance(taken, Taken)
    assert taken.attempt is not None
    manager.shell.run(flows.finish(manager.core, taken.attempt, 1))
    manager.submit(BatchRequest("/b", priority="high"))  # on whose list the first take still waits
    taken = waiting.wait(idle, second)
    assert isinstance(taken, Taken)
    assert taken.attempt is not None
    assert (taken.attempt.request.uri, taken.list) == ("/b", lists[0]), "the first has said that it is spent"
    waiting.close()


def test_what_cannot_be_read_and_is_lost_is_not_handed_back_for_ever(home: embedded.PrivateServer) -> None:
    with connect.open_client(home.url) as client:
        ours, theirs = Pipe()
        horse = Horse(Worker(["arm"], connection=client), Board(1), theirs)
        horse.unread.append(attempt(key="unread"))
        horse.hand_back()
        assert horse.unread == []
        ours.close()
        theirs.close()


# -- RQ's ways


def mixed(team: Crew) -> None:
    """Ours and ordinary jobs, in turn, in three queues."""
    for name, priority in zip(queue_names(team.name), ("high", "default", "low"), strict=True):
        for n in range(4):
            if n % 2:
                ordinary(team, name).enqueue("horse_app.plain_order", f"{priority}{n}")
            else:
                team.rm.submit(BatchRequest(f"/order/{priority}{n}", priority=priority))


def order_of(home: embedded.PrivateServer, directory: Path, kind: str, *options: str) -> list[str]:
    with crew(home.url, directory, handlers=HORSE_APP) as team:
        mixed(team)
        worker = team.start(kind, "--burst", *options)
        assert worker.wait(60) == 0, worker.said()
        return words(team, "order")


@pytest.mark.parametrize("strategy", ["default", "round_robin"])
def test_queues_are_served_in_the_order_of_rqs_strategy(
    home: embedded.PrivateServer, tmp_path: Path, strategy: str
) -> None:
    theirs, ours = (
        order_of(home, tmp_path, kind, "--dequeue-strategy", strategy) for kind in ("rq.worker.Worker", "rqarm.Worker")
    )
    assert ours == theirs
    assert len(ours) == 12
    assert (ours[:3] == ["high0", "default0", "low0"]) == (strategy == "round_robin")


def test_the_random_strategy_serves_all_queues(home: embedded.PrivateServer, tmp_path: Path) -> None:
    served = order_of(home, tmp_path, "rqarm.Worker", "--dequeue-strategy", "random")
    assert sorted(served) == sorted(f"{name}{n}" for name in ("high", "default", "low") for n in range(4))
    for name in ("high", "default", "low"):
        assert [word for word in served if word.startswith(name)] == [f"{name}{n}" for n in range(4)]


@pytest.mark.parametrize("concurrency", [1, 5])
@pytest.mark.parametrize("kinds", ["oopp", "ppoo", "popo", "oooo", "pppp"])
def test_max_jobs_counts_requests_and_jobs(team: Crew, kinds: str, concurrency: int) -> None:
    for n, kind in enumerate(2 * kinds):
        if kind == "o":
            team.rm.submit(f"/order/{n}")
        else:
            ordinary(team, team.name).enqueue("horse_app.plain_order", str(n))
    worker = team.start("rqarm.Worker", "--max-jobs", "4", concurrency=concurrency)
    assert worker.wait(30) == 0
    assert sorted(words(team, "order")) == ["0", "1", "2", "3"]
    assert team.rm.connection.llen(f"rq:queue:{team.name}") == 4


@pytest.mark.parametrize("quota", [7, 11])
def test_requests_that_end_together_do_not_take_more_than_the_quota(team: Crew, quota: int) -> None:
    team.rm.submit_many([f"/pair/{n}" for n in range(30)])
    worker = team.start("rqarm.Worker", "--max-jobs", str(quota), concurrency=5)
    assert worker.wait(30) == 0
    assert completions(team) == quota
    assert len(team.rm.queue()) == 30 - quota


def completions(team: Crew) -> int:
    return sum(event.verb == "complete" for event in team.rm.events("0", timeout=0.01))


def test_a_burst_ends_with_the_queue(team: Crew) -> None:
    keys = [status.key for status in team.rm.submit_many([f"/pair/{n}" for n in range(30)])]
    worker = team.start("rqarm.Worker", "--burst", concurrency=8)
    assert worker.wait(30) == 0
    assert {team.rm.status(key).state for key in keys} == {State.COMPLETED}


@pytest.mark.parametrize("concurrency", [1, 5])
def test_an_idle_worker_ends_after_its_idle_time(team: Crew, concurrency: int) -> None:
    worker = team.start("rqarm.Worker", "--max-idle-time", "1", concurrency=concurrency)
    assert team.rm.get("/add/1/2", timeout=20) == 3
    assert worker.wait(15) == 0


def test_a_worker_is_idle_again_behind_a_failure(team: Crew) -> None:
    worker = team.hire("rqarm.Worker")
    team.settle(team.rm.submit("/fail/quick").key)
    # a request that is shown as running, and one behind it, so that the parent has told its state since
    busy = team.rm.submit("/wait/long").key
    team.running("long")
    eventually(lambda: team.state_of(worker) == b"busy", PATIENCE, "the worker is shown as busy")
    failing = team.rm.submit("/fail/behind").key
    team.let_go("long")
    team.settle(busy, failing)
    eventually(lambda: team.state_of(worker) == b"idle", PATIENCE, "the worker is shown as idle")
    team.settle(team.rm.submit("/fail/alone").key)
    heard = FailedJobRegistry(team.name, connection=team.rm.connection, serializer=JSONSerializer)
    eventually(lambda: heard.count == 3, PATIENCE, "RQ hears of the failures")
    assert team.state_of(worker) == b"idle"


def test_rqs_pool_of_workers_runs_ours(team: Crew) -> None:
    environment = os.environ | {f"RQARM_{name.upper()}": str(value) for name, value in team.settings.items()}
    environment |= {
        "RQARM_CRASH_DELAYS": "0",
        "RQARM_HANDLERS": str(HORSE_APP),
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
    }
    environment |= {"NOTES": str(team.directory / "notes"), "RQARM_ALLOW_VOLATILE": "1"}
    (team.directory / "notes").mkdir()
    program = [sys.executable, "-m", "rq.cli", "worker-pool", "-w", "rqarm.Worker", "-u", team.url, "-S", "json"]
    pool = subprocess.Popen(
        embedded._leashed([*program, "-n", "2", *queue_names(team.name)]), env=environment, start_new_session=True
    )
    everyone: list[int] = []
    try:
        keys = [team.rm.submit(f"/wait/{name}").key for name in "ab"]
        horses = {team.running(name) for name in "ab"}
        assert len(horses) == 2, "two workers"
        everyone = family(pool.pid)
        for name in "ab":
            team.let_go(name)
        for key in keys:
            unharmed(team, key)
        pool.send_signal(signal.SIGTERM)
        assert pool.wait(30) == 0
        eventually(lambda: not any(is_alive(pid) for pid in everyone), 10, "workers and horses are gone")
    finally:
        for pid in {*everyone, *family(pool.pid), pool.pid}:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        pool.wait()


@pytest.mark.parametrize("concurrency", [1, 5])
def test_rqs_shutdown_command_lets_the_request_finish(team: Crew, concurrency: int) -> None:
    worker = team.hire(concurrency=concurrency)
    key = team.rm.submit("/wait/shut").key
    team.running("shut")
    send_shutdown_command(team.rm.connection, worker.name)
    eventually(lambda: "warm shut down requested" in worker.said())
    waiting = team.rm.submit("/add/1/2").key
    team.let_go("shut")
    assert worker.wait() == 0
    unharmed(team, key)
    assert team.rm.status(waiting).state is State.PENDING


@pytest.mark.parametrize(("concurrency", "uri"), [(1, "/fail/1"), (5, "/fail/1"), (5, "/async-fail/1")])
def test_rq_hears_of_a_failure_and_the_process_lives_on(team: Crew, concurrency: int, uri: str) -> None:
    worker = team.hire("rqarm.Worker", "--exception-handler", "horse_app.log_error", concurrency=concurrency)
    horse = team.rm.get("/pid/before", timeout=20)
    with pytest.raises(RequestFailed, match="ValueError: no 1"):
        team.rm.get(uri, timeout=20)
    registry = FailedJobRegistry(team.name, connection=team.rm.connection, serializer=JSONSerializer)
    (job_id,) = eventually(registry.get_job_ids)
    job = Job.fetch(job_id, connection=team.rm.connection, serializer=JSONSerializer)
    eventually(lambda: job.latest_result() is not None)
    assert "ValueError: no 1" in job.latest_result().exc_string
    assert "app.py" in job.latest_result().exc_string, "the handler's own lines"
    assert words(team, "handled") == ["ValueError", "no", "1"]
    eventually(lambda: int(team.rm.connection.hget(f"rq:worker:{worker.name}", "failed_job_count") or 0) == 1)
    assert team.rm.get("/pid/after", timeout=20) == horse
    assert StartedJobRegistry(team.name, connection=team.rm.connection).get_job_ids(cleanup=False) == []


# -- shutdown


@pytest.mark.parametrize("concurrency", [1, 5])
def test_an_idle_worker_that_is_told_to_stop_ends_at_once(team: Crew, concurrency: int) -> None:
    worker = team.hire(concurrency=concurrency, lease=60)
    assert team.rm.get("/add/1/2", timeout=20) == 3
    worker.signal(signal.SIGTERM)
    assert timed(worker.wait) < 5


@pytest.mark.parametrize(
    ("concurrency", "uris"), [(1, ["/wait/a"]), (5, ["/async-wait/a", "/thread-wait/b", "/wait/c"])]
)
def test_what_does_not_end_in_time_is_handed_back_unharmed(team: Crew, concurrency: int, uris: list[str]) -> None:
    worker = team.hire(concurrency=concurrency, shutdown_timeout=0.5)
    keys = [team.rm.submit(uri).key for uri in uris]
    names = [uri.rpartition("/")[2] for uri in uris]
    horses = {team.running(name) for name in names}
    worker.signal(signal.SIGTERM)
    assert timed(worker.wait) < 8
    assert worker.wait() == 0
    assert not any(is_alive(horse) for horse in horses)
    for key in keys:
        status = team.rm.status(key)
        assert (status.state, status.attempts, status.error) == (State.PENDING, 0, None)
    for name in names:
        team.let_go(name)
    team.hire(concurrency=concurrency)
    for key in keys:
        unharmed(team, key)


def test_what_ends_in_time_is_not_handed_back(team: Crew) -> None:
    worker = team.hire(concurrency=5, shutdown_timeout=20)
    keys = [team.rm.submit(f"/async-wait/{name}").key for name in "abc"]
    for name in "abc":
        team.running(name)
    worker.signal(signal.SIGTERM)
    eventually(lambda: "warm shut down requested" in worker.said())
    for name in "abc":
        team.let_go(name)
    assert worker.wait() == 0
    for key in keys:
        unharmed(team, key)


@pytest.mark.parametrize("concurrency", [1, 5])
def test_a_stopping_worker_takes_nothing_more_although_its_scheduler_is_slow_to_end(
    team: Crew, concurrency: int
) -> None:
    worker = team.hire("rqarm.Worker", "--with-scheduler", concurrency=concurrency)
    running = team.rm.submit("/wait/last").key
    team.running("last")
    schedulers = [pid for pid in family(worker.pid) if pid != team.running("last")]
    assert schedulers
    for pid in schedulers:
        os.kill(pid, signal.SIGSTOP)
    waiting = team.rm.submit("/add/1/2").key
    worker.signal(signal.SIGTERM)
    eventually(lambda: "warm shut down requested" in worker.said())
    before = team.field(running, "lease_until")
    eventually(lambda: team.field(running, "lease_until") != before, 5, "the lease is renewed")
    team.let_go("last")
    unharmed(team, running)
    for pid in schedulers:
        os.kill(pid, signal.SIGCONT)
    assert worker.wait() == 0
    status = team.rm.status(waiting)
    assert (status.state, status.attempts) == (State.PENDING, 0)


# -- leases


def test_leases_are_renewed_as_often_as_it_is_set(team: Crew) -> None:
    team.hire(lease=6, renewal=0.2)
    key = team.rm.submit("/wait/renewed").key
    team.running("renewed")
    seen: set[bytes | None] = set()

    def look() -> bool:
        seen.add(team.field(key, "lease_until"))
        return len(seen) >= 5

    eventually(look, 4, "five deadlines in less than two thirds of a lease")
    team.let_go("renewed")
    unharmed(team, key)


def test_all_that_a_stopped_worker_runs_comes_too_late(team: Crew) -> None:
    first = team.hire(concurrency=5)
    uris = ["/async-wait/a", "/thread-wait/b", "/turn/c"]
    keys = [team.rm.submit(uri).key for uri in uris]
    (horse,) = {int(team.note(name)) for name in ("running-a", "running-b", "running-c-1")}
    jobs = [team.job(key).key for key in keys]
    first.signal(signal.SIGSTOP)
    os.kill(horse, signal.SIGSTOP)
    for name in ("running-a", "running-b"):
        (team.directory / "notes" / name).unlink()
    second = team.hire(concurrency=5)
    for name in ("running-a", "running-b", "running-c-2"):
        team.note(name)
    tokens = [team.field(key, "token") for key in keys]
    team.let_go("c-1")
    os.kill(horse, signal.SIGCONT)
    first.signal(signal.SIGCONT)
    eventually(lambda: not is_alive(horse) or not team.rm.connection.exists(*jobs), 15, "the first one gives up")
    assert [team.field(key, "token") for key in keys] == tokens
    assert {team.rm.status(key).worker for key in keys} == {second.name}
    for name in ("a", "b", "c-2"):
        team.let_go(name)
    assert [status.state for status in team.settle(*keys)] == [State.COMPLETED] * 3
    ends = Counter(event.key for event in team.rm.events("0", timeout=0.01) if event.verb == "complete")
    assert ends == Counter(keys)
    assert first.lives


# -- taken ahead


def test_what_was_taken_ahead_of_a_slow_request_goes_to_another_worker(team: Crew) -> None:
    team.hire(handlers=TESTS / "app.py")
    team.settle(*(status.key for status in team.rm.submit_many(f"/mostly/{n}" for n in range(30))))
    # a horse that is busy: who was idle takes the slow one alone
    names = [*(f"/mostly/more-{n}" for n in range(50)), "/mostly/slow", "/mostly/a", "/mostly/b"]
    *_, slow, one, two = [status.key for status in team.rm.submit_many(names)]
    behind = [one, two]
    team.running("slow")
    eventually(lambda: [team.rm.status(key).state for key in behind] == [State.PENDING] * 2, 5, "they are handed back")
    verbs = [event.verb for event in team.rm.events("0", timeout=0.01) if event.key in behind]
    assert "release" in verbs, "nothing was taken ahead"
    team.hire(handlers=TESTS / "app.py")
    assert [status.attempts for status in team.settle(*behind)] == [1, 1]
    assert team.rm.status(slow).state is State.IN_PROGRESS
    team.let_go("slow")
    assert team.rm.result(slow, timeout=20) == "slow"
    assert team.rm.status(slow).attempts == 1
    assert team.field(slow, "crashes") is None


@pytest.mark.parametrize("death", ["ahead", ""])
def test_the_guard_ends_a_horse_for_no_lease_but_its_own(
    board: Board, monkeypatch: pytest.MonkeyPatch, death: str
) -> None:
    """What was handed back stands on the board, and is renewed no more, until the slow one before it has ended."""
    looks, killed = itertools.count(1), list[int]()
    stable = Stable(SimpleNamespace(settings=Settings(lease=0.3, renewal=0.1)))  # type: ignore[arg-type]
    horse = _Animal(1, board, None, None)  # type: ignore[arg-type]

    def renew(runs: list[_Run], now: float) -> None:
        for run in runs:
            run.renewed = run.renewed if run.turn.lane == 1 else now
        if next(looks) > 10:
            horse.is_gone.set()

    monkeypatch.setattr(stable, "_renew", renew)
    monkeypatch.setattr(stable_module, "kill_group", lambda pid, _: killed.append(pid))
    board.show(0, 4, attempt(), time.monotonic(), 60.0)
    board.show(1, 5, attempt(), 0.0, 60.0)
    for turn in board.turns():
        stable._run_of(turn, time.monotonic()).death = death if turn.lane == 1 else ""
    stable._guard(horse)
    assert killed == ([] if death else [1])


# -- many at a time


def test_a_worker_whose_quick_request_has_failed_is_idle_for_rq_too(team: Crew) -> None:
    worker = team.hire()
    team.settle(team.rm.submit("/fail/1").key)
    name = f"rq:worker:{worker.name}"
    eventually(lambda: team.rm.connection.hget(name, "failed_job_count") == b"1", what="RQ is told of the failure")
    assert team.state_of(worker) == b"idle"


@pytest.fixture(scope="module")
def many(home: embedded.PrivateServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """One worker with 20 lanes that all tests share which must not harm it."""
    directory = tmp_path_factory.mktemp("many")
    with crew(home.url, directory, handlers=HORSE_APP, concurrency=LANES, crash_delay=0) as hired:
        hired.hire()
        yield hired


@pytest.fixture
def lanes(many: Crew) -> Iterator[Crew]:
    """The shared worker, which must be the same process afterwards and still work."""
    (worker,) = many.workers
    yield many
    print(worker.said())
    assert worker.lives
    number = time.monotonic_ns()
    assert many.rm.get(f"/add/{number}/1", timeout=20) == number + 1


@pytest.mark.parametrize("kind", ["async-barrier", "barrier"])
def test_as_many_run_at_a_time_as_there_are_lanes(lanes: Crew, kind: str) -> None:
    keys = [status.key for status in lanes.rm.submit_many([f"/{kind}/{LANES}/{n}" for n in range(LANES)])]
    for key in keys:
        unharmed(lanes, key)
    seen = {lanes.rm.result(key) for key in keys}
    assert len(seen) == (1 if kind == "async-barrier" else LANES), "one process, or a thread for each"


def test_what_is_not_thread_safe_runs_alone_and_its_time_begins_with_it(lanes: Crew) -> None:
    """They wait for longer than their limit and the grace beyond it."""
    keys = [status.key for status in lanes.rm.submit_many([f"/one-at-a-time/{n}" for n in range(8)])]
    for key in keys:
        unharmed(lanes, key)
    marks = words(lanes, "one-at-a-time")
    assert [mark[0] for mark in marks] == ["+", "-"] * 8


@pytest.mark.parametrize("kind", ["async-slow", "thread-slow"])
def test_who_overruns_fails_alone(lanes: Crew, kind: str) -> None:
    beside = lanes.rm.submit(f"/async-wait/beside-{kind}").key
    horse = lanes.running(f"beside-{kind}")
    with pytest.raises(RequestFailed, match=r"TimeLimit.*0\.5 s"):
        lanes.rm.get(f"/{kind}/x", timeout=4)
    lanes.let_go(f"beside-{kind}")
    unharmed(lanes, beside)
    assert lanes.rm.get(f"/pid/{kind}", timeout=20) == horse


def by_cancel(team: Crew, key: str) -> None:
    assert team.rm.cancel(key)


def by_command(team: Crew, key: str) -> None:
    send_stop_job_command(team.rm.connection, team.shown(key).id, serializer=JSONSerializer)


@pytest.mark.parametrize("stop", [by_cancel, by_command])
@pytest.mark.parametrize("kind", ["async", "thread"])
def test_who_is_cancelled_stops_alone(lanes: Crew, kind: str, stop: Callable[[Crew, str], None]) -> None:
    name = f"{kind}-{stop.__name__}"
    keys = [lanes.rm.submit(f"/{kind}-wait/{which}-{name}").key for which in ("stopped", "beside")]
    (horse,) = {lanes.running(f"{which}-{name}") for which in ("stopped", "beside")}
    stop(lanes, keys[0])
    mark = "cancelled" if kind == "async" else "interrupted"
    told = timed(lambda: lanes.note(f"{mark}-stopped-{name}"))
    assert told < (LEASE if stop is by_cancel else 1.0), "within a renewal, or at once"
    assert kind == "thread" or lanes.note(f"{mark}-stopped-{name}") == "True"
    assert lanes.reaches(keys[0], State.CANCELLED).attempts == 1
    lanes.let_go(f"beside-{name}")
    unharmed(lanes, keys[1])
    assert lanes.rm.get(f"/pid/{name}", timeout=20) == horse


def test_who_waits_for_its_thread_can_be_cancelled_alone(lanes: Crew) -> None:
    first, second = (lanes.rm.submit(f"/wait/{name}-alone").key for name in ("first", "second"))
    horse = lanes.running("first-alone")
    eventually(lambda: lanes.rm.status(second).state is State.IN_PROGRESS)
    job = lanes.job(second).key
    assert lanes.rm.cancel(second)
    eventually(lambda: not lanes.rm.connection.exists(job), 10, "it is given up")
    assert is_alive(horse)
    lanes.let_go("first-alone")
    unharmed(lanes, first)
    assert lanes.rm.get("/pid/alone", timeout=20) == horse
    assert not (lanes.directory / "notes" / "running-second-alone").exists(), "its handler was not called"


def test_progress_of_async_handlers_is_told(lanes: Crew) -> None:
    key = lanes.rm.submit("/async-progress/told").key
    assert eventually(lambda: lanes.rm.status(key).progress) == 0.5
    lanes.let_go("told")
    unharmed(lanes, key)


def test_ordinary_jobs_run_on_the_same_queue(lanes: Crew) -> None:
    ours = [status.key for status in lanes.rm.submit_many([f"/pair/{n}" for n in range(10)])]
    jobs = [ordinary(lanes, lanes.name).enqueue("app.plain", n) for n in range(2)]
    ours += [status.key for status in lanes.rm.submit_many([f"/pair/{n}" for n in range(10, 20)])]
    for key in ours:
        unharmed(lanes, key)
    for n, job in enumerate(jobs):
        eventually(lambda job=job: job.get_status(refresh=True) is JobStatus.FINISHED)
        assert job.return_value(refresh=True) == n + 1


# -- one kills all


def neighbours(team: Crew) -> tuple[int, list[str]]:
    keys = [team.rm.submit(f"/{kind}-wait/{kind}").key for kind in ("async", "thread")]
    (horse,) = {team.running(kind) for kind in ("async", "thread")}
    return horse, keys


@pytest.mark.parametrize("kind", ["thread-deaf", "async-busy"])
def test_who_hears_nothing_is_killed_with_its_process_and_fails_alone(team: Crew, kind: str) -> None:
    worker = team.hire(concurrency=5)
    horse, beside = neighbours(team)
    key = team.rm.submit(f"/{kind}/x").key
    (status,) = team.settle(key)
    assert (status.state, status.attempts, status.reason) == (State.FAILED, 1, "exhausted")
    assert status.error is not None
    assert "TimeLimit" in status.error["type"]
    eventually(lambda: not is_alive(horse))
    for name in ("async", "thread"):
        team.let_go(name)
    for neighbour in beside:
        unharmed(team, neighbour)
    assert worker.lives


def test_a_segfault_costs_all_that_run_beside_it_one_attempt_at_most(team: Crew) -> None:
    """Who of them it was, nobody can know."""
    worker = team.hire(concurrency=5)
    horse, beside = neighbours(team)
    key = team.rm.submit("/segfault/x").key
    team.let_go("x")
    eventually(lambda: not is_alive(horse))
    for name in ("async", "thread"):
        team.let_go(name)
    for status in team.settle(key, *beside):
        assert (status.state, status.attempts) == (State.COMPLETED, 2)
        assert team.field(status.key, "crashes") == b"1"
    assert "SIGSEGV" in worker.log.read_text()
    assert worker.lives


# -- rqarm worker


@pytest.fixture
def rm(home: embedded.PrivateServer) -> Iterator[RequestManager]:
    with RequestManager(home.url, allow_volatile=True, namespace="cli", queue="cli") as manager:
        yield manager
        for name in manager.connection.scan_iter("cli:*"):
            manager.connection.delete(name)


def arguments(*options: str) -> list[str]:
    return ["--namespace", "cli", "--handlers", str(HORSE_APP), "--no-scheduler", "cli", *options]


def listening(rm: RequestManager, running: Command) -> None:
    eventually(lambda: " listens on " in running.said, 20, "it listens")


def test_one_line_tells_of_each_request(rm: RequestManager, home: embedded.PrivateServer, tmp_path: Path) -> None:
    good, bad = (status.key for status in rm.submit_many(["/add/1/2?api_key=hidden", "/async-fail/7"]))
    said = finished(home.url, tmp_path, *arguments("--burst")).said
    (line,) = [line for line in said.splitlines() if good in line]
    for part in ("INFO", "/add/1/2?api_key=", "completed by /add/{a:int}/{b:int}", "waited ", "ran "):
        assert part in line
    lines = [line for line in said.splitlines() if bad in line and " rqarm.worker: " in line]
    assert len(lines) == 1
    for part in ("WARNING", "/async-fail/7", "failed by /async-fail/{n}", "ValueError: no 7"):
        assert part in lines[0]
    assert "hidden" not in said


@pytest.mark.parametrize("concurrency", [1, 4])
def test_the_same_facts_are_fields_in_json(
    rm: RequestManager, home: embedded.PrivateServer, tmp_path: Path, concurrency: int
) -> None:
    good, bad = (status.key for status in rm.submit_many(["/add/1/2?api_key=hidden", "/async-fail/8"]))
    options = ("--burst", "--log-format", "json", "--concurrency", str(concurrency))
    said = finished(home.url, tmp_path, *arguments(*options)).said
    told = {each["key"]: each for each in map(json.loads, said.splitlines()) if "key" in each}
    assert set(told) == {good, bad}
    assert "hidden" not in said
    assert told[good]["uri"].startswith("/add/1/2?api_key=")
    for key, route, outcome in ((good, "/add/{a:int}/{b:int}", "completed"), (bad, "/async-fail/{n}", "failed")):
        entry = told[key]
        assert (entry["route"], entry["outcome"], entry["attempt"]) == (route, outcome, 1)
        assert 0 <= entry["run_s"] < 10
        assert 0 < entry["wait_s"] < 60
        assert entry["worker"]
    assert told[bad]["error"] == {"type": "ValueError", "message": "no 8"}


def test_the_options_of_the_worker_reach_it(rm: RequestManager, home: embedded.PrivateServer, tmp_path: Path) -> None:
    options = ("--concurrency", "3", "--max-jobs-per-horse", "3", "--shutdown-timeout", "0.5")
    with command(home.url, tmp_path, *arguments(*options)) as running:
        listening(rm, running)
        keys = [status.key for status in rm.submit_many([f"/async-barrier/3/{n}" for n in range(3)])]
        eventually(lambda: all(rm.status(key).state is State.COMPLETED for key in keys), 20, "three at a time")
        (first,) = {rm.result(key) for key in keys}
        assert rm.get("/async-pid/next", timeout=20) != first
        waiting = rm.submit("/async-wait/options").key
        eventually((tmp_path / "notes" / "running-options").exists)
        running.signal(signal.SIGTERM)
        assert timed(running.wait) < 8
        assert running.wait() == 0
    assert (rm.status(waiting).state, rm.status(waiting).attempts) == (State.PENDING, 0)


def test_the_memory_option_of_the_worker_reaches_it(
    rm: RequestManager, home: embedded.PrivateServer, tmp_path: Path
) -> None:
    with command(home.url, tmp_path, *arguments("--max-horse-memory", "1")) as running:
        listening(rm, running)
        pids = [rm.get(f"/async-pid/memory{n}", timeout=20) for n in range(3)]
        assert len(set(pids)) > 1, "any process has more than that"


def test_an_idle_worker_does_not_poll(home: embedded.PrivateServer, tmp_path: Path) -> None:
    """It blocks on the server; what it says meanwhile are signs of life."""
    with servers.throwaway(home.binary) as server, crew(server.url, tmp_path, lease=60) as team:
        worker: WorkerProcess = team.hire()
        assert team.rm.get("/add/1/2", timeout=20) == 3
        eventually(lambda: team.state_of(worker) == b"idle")
        before, began = costs(team.rm)[1], time.monotonic()
        eventually(lambda: time.monotonic() - began > 2)
        assert costs(team.rm)[1] - before <= 1
