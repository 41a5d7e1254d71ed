"""What issue 4 promises of resources and look-ups, on real workers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import command
from managers import PATIENCE
from workers import TESTS, Crew, crew

import rqarm
from rqarm import BatchRequest, ConfigError, Context, Handlers, RequestFailed, RequestManager, embedded

FOLLOW_APP = TESTS / "follow_app.py"
#: how a worker runs requests
ENGINES = [
    pytest.param("rqarm.Worker", 1, id="warm"),
    pytest.param("rqarm.Worker", 4, id="lanes"),
    pytest.param("rq.worker.Worker", 1, id="rq"),
    pytest.param("rq.worker.SimpleWorker", 1, id="simple"),
]


@pytest.fixture
def team(home: embedded.PrivateServer, tmp_path: Path) -> Iterator[Crew]:
    with crew(home.url, tmp_path, handlers=FOLLOW_APP, crash_delay=0) as hired:
        yield hired


def lines(team: Crew, name: str) -> list[str]:
    """What was added to a file of notes."""
    path = team.directory / "notes" / name
    return path.read_text().splitlines() if path.exists() else []


def stopped(team: Crew) -> None:
    """Return when every worker has ended by itself."""
    for worker in team.workers:
        worker.signal(signal.SIGTERM)
    for worker in team.workers:
        worker.wait()


# -- resources


@pytest.mark.parametrize(("worker", "concurrency"), ENGINES)
def test_set_up_and_tear_down_come_once_for_each_process_that_runs_requests(
    team: Crew, worker: str, concurrency: int
) -> None:
    team.hire(worker, concurrency=concurrency)
    keys = [team.rm.submit(f"/db/{n}").key for n in range(12)]
    team.settle(*keys)
    users = {team.rm.result(key) for key in keys}
    assert len(users) == (12 if worker == "rq.worker.Worker" else 1)
    stopped(team)
    assert sorted(lines(team, "db")) == sorted(f"{way} {pid}" for pid in users for way in ("up", "down"))


@pytest.mark.parametrize(("worker", "concurrency"), ENGINES)
def test_async_resources_too(team: Crew, worker: str, concurrency: int) -> None:
    team.hire(worker, concurrency=concurrency)
    keys = [team.rm.submit(f"/found-later/{n}").key for n in range(1, 16, 2)]
    team.settle(*keys)
    assert [team.rm.result(key) for key in keys] == [f"found {n} with the archive" for n in range(1, 16, 2)]
    stopped(team)
    noted = lines(team, "archive")
    count = len(keys) if worker == "rq.worker.Worker" else 1
    assert [line.split()[0] for line in noted].count("up") == count
    assert sorted(line.split()[1] for line in noted if line.startswith("up")) == sorted(
        line.split()[1] for line in noted if line.startswith("down")
    )


@pytest.mark.parametrize(("worker", "concurrency"), ENGINES)
def test_a_set_up_that_fails_fails_its_request_and_is_tried_again_by_the_next(
    team: Crew, worker: str, concurrency: int
) -> None:
    team.hire(worker, concurrency=concurrency)
    team.let_go("x")  # makes the directory
    (team.directory / "notes" / "db-is-down").touch()
    for n in range(2):
        with pytest.raises(RequestFailed) as failure:
            team.rm.get(f"/db/{n}", timeout=PATIENCE)
        assert failure.value.error["type"].endswith("ResourceError")
        assert "resource 'db': set-up failed with ConnectionRefusedError: the database is down" in str(failure.value)
        assert "ConnectionRefusedError" in failure.value.error["traceback"]
    (team.directory / "notes" / "db-is-down").unlink()
    assert isinstance(team.rm.get("/db/2", timeout=PATIENCE), int)
    assert [line.split()[0] for line in lines(team, "db")][:3] == ["refused", "refused", "up"]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_horse_that_is_replaced_tears_down_what_it_built(team: Crew, concurrency: int) -> None:
    team.hire(concurrency=concurrency, max_jobs_per_horse=3)
    for n in range(9):
        team.rm.get(f"/db/{n}", timeout=PATIENCE)
    stopped(team)
    noted = [tuple(line.split()) for line in lines(team, "db")]
    ups = [pid for way, pid in noted if way == "up"]
    assert len(set(ups)) == len(ups) >= 3
    assert sorted(pid for way, pid in noted if way == "down") == sorted(ups)


@pytest.mark.parametrize(("worker", "concurrency"), ENGINES)
def test_a_tear_down_that_fails_is_logged_and_the_others_are_torn_down(
    team: Crew, worker: str, concurrency: int
) -> None:
    hired = team.hire(worker, concurrency=concurrency)
    assert isinstance(team.rm.get("/torn/1", timeout=PATIENCE), int)
    stopped(team)
    assert "resource 'torn': tear-down failed with OSError: the other side is gone" in hired.said()
    assert [line.split()[0] for line in lines(team, "db")] == ["up", "down"]


def test_a_process_that_is_killed_tears_nothing_down_and_the_next_one_builds_anew(team: Crew) -> None:
    team.hire(max_attempts=1)
    first = team.rm.get("/db/1", timeout=PATIENCE)
    team.settle(team.rm.submit("/kill-me").key)
    second = team.rm.get("/db/2", timeout=PATIENCE)
    stopped(team)
    assert lines(team, "db") == [f"up {first}", f"up {second}", f"down {second}"]


# -- look-ups


@pytest.mark.parametrize(("worker", "concurrency"), ENGINES)
def test_what_a_look_up_finds_completes_the_request_and_else_the_handler_is_called(
    team: Crew, worker: str, concurrency: int
) -> None:
    team.hire(worker, concurrency=concurrency)
    wanted: dict[str, Any] = {
        "/found/0": None,
        "/found/1?other=x": "found 1x",
        "/found/2": "computed 2",
        "/found-later/1": "found 1 with the archive",
        "/async-found/1": "found 1",
        "/async-found/2": "computed 2",
    }
    keys = {uri: team.rm.submit(uri).key for uri in wanted}
    called = team.rm.submit("/found-later/2").key
    team.settle(*keys.values(), called)
    assert {uri: team.rm.result(key) for uri, key in keys.items()} == wanted
    text, is_main = team.rm.result(called)
    assert (text, is_main) == ("computed 2", concurrency == 1), "a handler that is not async keeps off the loop"


@pytest.mark.parametrize(("worker", "concurrency"), ENGINES)
def test_the_error_and_the_time_of_a_look_up_are_those_of_the_handler(
    team: Crew, worker: str, concurrency: int
) -> None:
    team.hire(worker, concurrency=concurrency)
    failed, late = team.rm.submit("/found/1?other=error").key, team.rm.submit("/async-found/99").key
    statuses = team.settle(failed, late)
    assert [status.error["type"].rpartition(".")[2] for status in statuses if status.error] == ["KeyError", "TimeLimit"]


def test_the_line_of_the_log_says_that_the_look_up_had_it(home: embedded.PrivateServer, tmp_path: Path) -> None:
    with RequestManager(home.url, namespace="log", queue="log", allow_volatile=True) as rm:
        found, computed = rm.submit("/found/1").key, rm.submit("/found/2").key
        options = ("--handlers", str(FOLLOW_APP), "--burst", "log")
        with command(home.url, tmp_path, *options, RQARM_NAMESPACE="log") as running:
            assert running.wait() == 0
            said = running.said.splitlines()
    (line,) = [line for line in said if found in line and "completed" in line]
    assert "lookup" in line
    (line,) = [line for line in said if computed in line and "completed" in line]
    assert "lookup" not in line


def test_a_look_up_is_checked_when_it_is_registered() -> None:
    handlers = Handlers()

    @handlers.route("/x/{n:int}")
    def handler(request: BatchRequest, context: Context, n: int, page: int = 1) -> int:
        return n

    with pytest.raises(ConfigError, match=r"must take \(request, context, n, page\)"):

        @handler.lookup
        def too_few(request: BatchRequest, context: Context, n: int) -> int:
            return n

    @handler.lookup
    def right(request: BatchRequest, context: Context, **others: int) -> Any:
        return rqarm.MISS

    with pytest.raises(ConfigError, match=r"is the look-up of '/x/\{n:int\}' already"):
        handler.lookup(right)
    assert repr(rqarm.MISS) == "rqarm.MISS"
