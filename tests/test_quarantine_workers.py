"""Quarantine and retries on real processes: rqarm.Worker, and RQ's own with the JSON serializer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from audit import audit
from managers import threads
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer
from servers import eventually
from workers import TESTS, Crew, crew, rq_cli

from rqarm import Outcome, State, embedded

pytestmark = pytest.mark.faults
APP = TESTS / "quarantine_app.py"
EXAMPLES = Path(__file__).parents[1] / "examples"
REASONS = ("poison", "asked", "exhausted", "unpackable")


@pytest.fixture(scope="module")
def home() -> Iterator[embedded.PrivateServer]:
    with servers.throwaway(servers.VALKEY or servers.REDIS) as server:
        yield server


def failed_jobs(hired: Crew) -> set[str]:
    registry = FailedJobRegistry(hired.name, connection=hired.rm.connection, serializer=JSONSerializer)
    return set(registry.get_job_ids())


@pytest.mark.parametrize("kind", ["rqarm.Worker", "rq.worker.Worker"])
@pytest.mark.parametrize("way", ["rm", "rq"])
def test_each_reason_is_set_aside_shown_by_rq_and_goes_on_when_it_is_mended(
    home: embedded.PrivateServer, tmp_path: Path, kind: str, way: str
) -> None:
    with crew(home.url, tmp_path, max_attempts=1, handlers=APP, lease=3.0) as hired:
        hired.hire(kind)
        rm = hired.rm
        keys = {reason: rm.submit(f"/{reason}/1", payload=reason).key for reason in REASONS}
        # who waits sweeps: an idle worker of RQ's own does not, and so its poison is found
        assert {status.state for status in rm.wait(keys.values(), timeout=60)} == {State.FAILED}
        entries = {entry.reason: entry for entry in rm.quarantine.list()}
        assert {reason: entry.key for reason, entry in entries.items()} == keys
        jobs = {entry.job_id: reason for reason, entry in entries.items()}
        eventually(lambda: jobs.keys() <= failed_jobs(hired), 20, f"RQ shows {jobs}, not only {failed_jobs(hired)}")
        assert (entries["poison"].crashes, entries["asked"].info) == (1, {"status_code": 503})
        if kind == "rqarm.Worker":
            assert {entry.route for entry in entries.values()} == {"/{how}/{n:int}"}
        assert len(list(rm.quarantine.list(route="/{how}/{n:int}"))) == 4
        blocked = {reason: rm.explain(f"/{reason}/1").would for reason in REASONS}
        assert blocked == {"poison": "negative", "asked": "negative", "exhausted": "new", "unpackable": "new"}
        (hired.directory / "notes" / "mended").touch()
        if way == "rm":
            assert set(rm.quarantine.requeue(all=True).values()) == {"requeued"}
            assert not failed_jobs(hired) & {entry.job_id for entry in entries.values()}
        else:
            for entry in entries.values():
                rq_cli(hired.url, "requeue", entry.job_id, "--queue", hired.name, "-S", "json")
        for reason, key in keys.items():
            status = hired.reaches(key, State.COMPLETED)  # after `rq requeue` it is failed until a worker has it
            assert (rm.result(key), status.quarantined) == (f"{reason} mended", False)
        assert rm.quarantine.count() == 0
        audit(rm.connection, rm.core.keys)


@pytest.mark.parametrize(
    ("kind", "options"), [("rqarm.Worker", ["--with-scheduler"]), ("rq.worker.Worker", ["--with-scheduler"])]
)
def test_a_request_stays_claimed_until_its_delayed_retry(
    home: embedded.PrivateServer, tmp_path: Path, kind: str, options: list[str]
) -> None:
    with crew(home.url, tmp_path, handlers=APP) as hired, threads() as waiters:
        rm = hired.rm
        key = rm.submit("/report").key
        waiting = waiters.start(rm.result, key, 40)
        watched_key = f"{hired.name}:done:{key}"
        eventually(lambda: dict(rm.connection.pubsub_numsub(watched_key))[watched_key.encode()] > 0)
        hired.hire(kind, *options)
        retried = eventually(lambda: rm.status(key) if rm.status(key).error else None, 20, "the first attempt ended")
        assert (retried.state, retried.attempts) == (State.PENDING, 1)
        assert rm.submit("/report", payload="late").outcome is Outcome.JOINED
        assert waiting.result(40) == 2
        assert (hired.directory / "notes" / "runs-report").read_text() == "xx"
        assert rm.status(key).attempts == 2


def test_without_a_scheduler_a_sweep_brings_the_delayed_retry(home: embedded.PrivateServer, tmp_path: Path) -> None:
    with crew(home.url, tmp_path, handlers=APP, lease=1.0) as hired:
        rm = hired.rm
        hired.hire("rq.worker.Worker")
        key = rm.submit("/report").key
        assert rm.result(key, timeout=40) == 2, "who waits sweeps"
        assert (hired.directory / "notes" / "runs-report").read_text() == "xx"


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "quarantine",
            [
                "exhausted: /invoice/-3: -3 is no invoice",
                "asked: /invoice/502: the archive is broken {'status_code': 502, 'shelf': 'B7'}",
                "submit: negative",
                "1 discarded, 2 requeued",
                "['invoice 1', 'invoice 502', 'invoice 7'] left: 0",
            ],
        ),
        ("retry", ["new joined", "sales, on attempt 3", "NotFound negative", "attempts: 1"]),
    ],
)
def test_the_example_runs(home: embedded.PrivateServer, tmp_path: Path, name: str, lines: list[str]) -> None:
    environment: dict[str, Any] = {"RQARM_URL": home.url, "RQARM_ALLOW_VOLATILE": "1", "RQARM_NAMESPACE": f"x{name}"}
    environment |= {"RQARM_QUEUE": f"x{name}", "PYTHONPATH": str(TESTS.parent), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line for line in lines if line not in said] == [], done.stdout + done.stderr
