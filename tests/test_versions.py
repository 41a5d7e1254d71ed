"""Two versions of rqarm on one queue, as in a deploy that takes its time.

The newer one is a copy of this one with another version, other scripts (so other SHAs) and a schema of requests that
this one cannot read, which its clients use for what has ``new`` in its URI.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from audit import audit
from servers import eventually
from workers import TESTS, Crew, crew, in_environment

from rqarm import BatchRequest, State, embedded
from rqarm.inspect import Overview

pytestmark = pytest.mark.faults

LEASE = 2.0
CHANGES = {
    "version.py": ('__version__ = "', '__version__ = "9.'),
    "lua/prelude/base.lua": ("local EVENTS_KEPT = 10000", "local EVENTS_KEPT = 10001"),
    "request.py": ('{"v": SCHEMA, "u": self.uri}', '{"v": 9 if "new" in self.uri else SCHEMA, "u": self.uri}'),
}
READS_BOTH = ('if fields["v"] != SCHEMA:', 'if fields["v"] not in (SCHEMA, 9):')

CLIENT = """
import sys
from rqarm import RequestManager, version
assert version.__version__.startswith("9."), version.__version__
with RequestManager() as rm:
    for uri in sys.argv[1:]:
        print(rm.submit(uri).key)
"""


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the newer package lies."""
    place = tmp_path_factory.mktemp("newer")
    shutil.copytree(TESTS.parent / "rqarm", place / "rqarm", ignore=shutil.ignore_patterns("__pycache__"))
    for name, changes in [*CHANGES.items(), ("request.py", READS_BOTH)]:
        file = place / "rqarm" / name
        text = file.read_text()
        assert text.count(changes[0]) == 1, name
        file.write_text(text.replace(*changes))
    return place


@pytest.fixture
def team(home: embedded.PrivateServer, tmp_path: Path) -> Iterator[Crew]:
    with crew(home.url, tmp_path, lease=LEASE) as hired:
        yield hired


def submit_as(package: Path, team: Crew, *uris: str) -> list[str]:
    """The keys of what a client of another version has submitted."""
    environment = in_environment({**team.settings, "url": team.url, "allow_volatile": 1})
    done = subprocess.run(
        [sys.executable, "-P", "-c", CLIENT, *uris],
        env=environment | {"PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def check(team: Crew, keys: list[str]) -> None:
    """Each request has run once, and nothing else is left of it."""
    assert {(status.attempts, status.state) for status in map(team.rm.status, keys)} == {(1, State.COMPLETED)}
    assert Counter(e.key for e in team.rm.events("0", timeout=0) if e.verb == "complete") == Counter(keys)
    assert "crashed" not in team.rm.cache.stats().executions
    audit(team.rm.connection, team.rm.core.keys)


def test_what_an_older_worker_cannot_read_waits_for_a_newer_one(team: Crew, newer: Path) -> None:
    """Row 68: the older one hands it back, which counts as nothing, and runs what it knows."""
    older = team.hire("rqarm.Worker", "--with-scheduler")
    keys = submit_as(newer, team, "/pid/new", "/pid/old")
    eventually(lambda: team.rm.cache.stats().executions.get("released", 0) >= 1, 30, "it was offered and handed back")
    status = team.rm.status(keys[0])
    assert (status.state, status.attempts, status.uri) == (State.PENDING, 0, "/pid/new")
    assert team.rm.status(keys[1]).state is State.COMPLETED
    keys.append(team.rm.submit("/add/1/2").key)
    assert team.rm.result(keys[-1], timeout=20) == 3
    team.package = newer
    team.hire()
    team.settle(*keys)
    assert team.rm.status(keys[0]).worker == team.workers[1].name
    assert team.rm.status(keys[1]).worker == older.name
    check(team, keys)


def test_two_versions_share_a_queue_and_one_replaces_the_other(team: Crew, newer: Path) -> None:
    """Row 68: requests of both and of both kinds of clients, while the older workers are told to go."""
    keys = [team.rm.submit(f"/soak/{n}").key for n in range(20)]
    older = [team.hire("rqarm.Worker", "--with-scheduler")]
    team.package = newer
    # a field that the older one does not know is left alone
    team.rm.connection.hset(f"{team.name}:status:{keys[-1]}", "novelty", "1")
    keys += submit_as(newer, team, *(f"/soak/{n}{'?new' if n % 2 else ''}" for n in range(20, 41)))
    newest = [team.hire("rqarm.Worker", "--with-scheduler")]
    found: Overview = team.rm.overview()
    assert len(found.workers.versions) == 2
    assert "version_skew" in {each.code for each in found.attention}
    eventually(lambda: team.rm.cache.stats().executions.get("completed", 0) >= 10, 30, "both are at work")
    older[0].signal(signal.SIGTERM)
    assert older[0].wait() == 0
    keys += [team.rm.submit(f"/soak/{n}").key for n in range(41, 50)]
    statuses = team.settle(*keys, timeout=60)
    assert {status.worker for status in statuses} == {worker.name for worker in (*older, *newest)}
    assert {status.worker for status in statuses if "new" in status.uri} == {newest[0].name}
    assert team.field(keys[19], "novelty") == b"1"
    check(team, keys)
    assert team.rm.submit(BatchRequest("/soak/0")).outcome == "hit"
