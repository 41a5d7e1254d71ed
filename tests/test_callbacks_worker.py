"""Callbacks in real worker processes: each is told once, also when its process is killed in the middle."""

from __future__ import annotations

import json
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from audit import audit
from servers import eventually
from workers import PATIENCE, Crew, crew

from rqarm import State, embedded

APP = Path(__file__).parent / "callbacks_app.py"
#: (class of the worker, requests at a time)
WORKERS = [("rq.worker.Worker", 1), ("rqarm.Worker", 1), ("rqarm.Worker", 3)]


@pytest.fixture(scope="module")
def home() -> Iterator[embedded.PrivateServer]:
    with servers.throwaway(servers.VALKEY or servers.REDIS) as server:
        yield server


@pytest.fixture(scope="module", params=WORKERS, ids=[f"{kind.rpartition('.')[2]}-{number}" for kind, number in WORKERS])
def staff(
    home: embedded.PrivateServer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Crew]:
    """One worker of each kind for all tests, with RQ's scheduler, which delayed tries need."""
    kind, number = request.param
    directory = tmp_path_factory.mktemp("staff")
    with crew(home.url, directory, handlers=APP, max_attempts=2, crash_delay=0, concurrency=number) as staff:
        staff.hire(kind, "--with-scheduler")
        yield staff
        drained(staff)
        audit(staff.rm.connection, staff.rm.core.keys)


def told(team: Crew, name: str, times: int = 1) -> list[dict[str, Any]]:
    """What was told under this name, once it was told so often and nothing more is to come."""
    path = team.directory / "notes" / f"told-{name}"
    wait_for(team, lambda: path.exists() and len(path.read_text().splitlines()) >= times, f"{name} is told")
    drained(team)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == times
    return lines


def wait_for(team: Crew, what: Callable[[], Any], description: str) -> None:
    """Until it is so. Plain RQ workers look for the dead when they have run something, and somebody must sweep."""

    def look() -> Any:
        if team.workers[0].kind != "rqarm.Worker":
            team.rm.queues.sweep()
            if not is_busy(team):
                team.rm.submit(f"/report/nudge-{secrets.token_hex(4)}")
        return what()

    eventually(look, PATIENCE, description)


def is_busy(team: Crew) -> bool:
    client, names = team.rm.connection, team.rm.core.keys
    return bool(client.exists(names.named("leases"), names.named("pending", queue=team.name)))


def drained(team: Crew) -> None:
    """Nothing waits or runs."""
    eventually(lambda: not is_busy(team), PATIENCE, "all has ended")


def kept(team: Crew) -> list[bytes]:
    """What is kept of follow-ups."""
    return [name for name in team.rm.connection.keys(f"{team.name}:*cb-*") if not name.startswith(b"rq:")]


def test_every_payload_reaches_the_callback_once(staff: Crew) -> None:
    rm, uri = staff.rm, "/report/wait-once"
    for payload in ("a", "b", "a"):
        rm.submit(uri, payload=payload)
    staff.running("wait-once")
    rm.submit(uri, payload="c", payload_id="mail")
    rm.resubmit(uri, payload="the same id", payload_id="mail")
    rm.get_or_submit(uri, "d")
    staff.let_go("wait-once")
    (line,) = told(staff, "wait-once")
    assert line == {"result": "report wait-once", "payloads": ["a", "b", "c", "d"], "attempt": 1}
    assert kept(staff) == []


def test_a_callback_whose_process_is_killed_runs_again_with_all_it_needs(staff: Crew) -> None:
    key = staff.rm.submit("/report/kill", payload="p").key
    lines = told(staff, "kill", 2)
    assert lines == [{"result": "report kill", "payloads": ["p"], "attempt": n} for n in (1, 2)]
    ends = [event.verb for event in staff.rm.events("0", timeout=0) if event.key == key]
    assert ends.count("complete") == 1
    assert kept(staff) == []


def test_a_callback_that_raises_is_called_again_and_needs_no_result_any_more(staff: Crew) -> None:
    key = staff.rm.submit("/report/stumble", payload="p").key
    lines = told(staff, "stumble", 3)
    assert [line["attempt"] for line in lines] == [1, 2, 3]
    assert {(line["result"], *line["payloads"]) for line in lines} == {("report stumble", "p")}
    eventually(lambda: staff.rm.status(key).state is State.UNKNOWN, 5, "the result lived for a second")
    assert kept(staff) == []


def test_a_large_result_with_a_short_life_reaches_its_callback(staff: Crew) -> None:
    staff.rm.submit("/large/one", payload="p")
    (line,) = told(staff, "one")
    assert line == {"result": 3 << 20, "payloads": ["p"]}
    eventually(lambda: staff.rm.connection.keys(f"{staff.name}:chunk:*") == [], 5, "its pieces live no longer than it")


def test_a_final_failure_is_told_once_with_all_payloads(staff: Crew) -> None:
    # in one round trip: an idle worker has run the first of two submits before the second is sent
    staff.rm.bulk_get_or_submit([("/bad/luck", "a"), ("/bad/luck", "b")])
    assert told(staff, "luck") == [{"error": "ValueError", "payloads": ["a", "b"]}]


def test_a_request_that_kills_its_workers_is_told_of_and_consumed_once(staff: Crew) -> None:
    before = quarantined(staff)
    key = staff.rm.submit("/die/twice", payload="p").key
    (line,) = told(staff, "twice")
    assert line["payloads"] == ["p"]
    wait_for(staff, lambda: len(quarantined(staff)) > len(before), "the consumer is told")
    drained(staff)
    assert quarantined(staff)[len(before) :] == [{"uri": "/die/twice", "key": key}]
    status = staff.rm.status(key)
    assert (status.state, status.quarantined) == (State.FAILED, True)


def quarantined(team: Crew) -> list[dict[str, Any]]:
    path = team.directory / "notes" / "told-quarantine"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_handler_that_its_parent_must_kill_is_told_of(home: embedded.PrivateServer, tmp_path: Path) -> None:
    with crew(home.url, tmp_path, handlers=APP) as hired:
        hired.hire("rqarm.Worker")
        hired.rm.submit("/late/one", payload="p")
        (line,) = told(hired, "one")
        assert line == {"error": "TimeLimit", "payloads": ["p"]}


def test_a_worker_that_is_killed_between_the_end_and_the_callback_loses_neither(
    home: embedded.PrivateServer, tmp_path: Path
) -> None:
    with crew(home.url, tmp_path, handlers=APP) as hired:
        worker = hired.hire("rqarm.Worker")
        keys = [hired.rm.submit(f"/report/{n}", payload=n).key for n in map(str, range(30))]
        keys.append(hired.rm.submit("/report/wait-last", payload="last").key)
        os.kill(hired.running("wait-last"), signal.SIGKILL)
        worker.kill()
        hired.let_go("wait-last")
        hired.hire("rqarm.Worker")
        hired.settle(keys[-1])
        drained(hired)
        for name in (*map(str, range(30)), "wait-last"):
            path = hired.directory / "notes" / f"told-{name}"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            assert {line["result"] for line in lines} == {f"report {name}"}
            attempts = [line["attempt"] for line in lines]
            assert attempts == sorted(set(attempts)), "none runs twice; one that was only taken may count"
        assert kept(hired) == []
        audit(hired.rm.connection, hired.rm.core.keys)
