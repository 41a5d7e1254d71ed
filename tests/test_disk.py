"""The disk under the server: it is full, or a power cut has taken the end of the append-only file.

A full disk is a small tmpfs, so it takes the right to mount one. Killing the server alone loses nothing that it wrote,
so a power cut is played by cutting bytes off the newest file after the kill.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import servers
from audit import audit, audit_in_motion
from redis.exceptions import RedisError, ResponseError
from servers import eventually
from workers import Crew, crew

from rqarm import BatchRequest, RequestManager, State, embedded

pytestmark = pytest.mark.faults

SEED = 26


def check(team: Crew, *keys: str) -> None:
    """Each request has a result, and nothing else is left of it."""
    ends = Counter(event.key for event in team.rm.events("0", timeout=0) if event.verb == "complete")
    assert ends == Counter(keys)
    audit(team.rm.connection, team.rm.core.keys)


# -- full


class Disk:
    """A file system of a few MiB."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def mount(self, mib: int) -> bool:
        again = "remount," if self.place.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{again}size={mib}m", "tmpfs", str(self.place)]
        return sys.platform == "linux" and not subprocess.run(command, check=False, capture_output=True).returncode

    def fill(self) -> None:
        with (self.place / "ballast").open("wb", buffering=0) as ballast:
            try:
                while ballast.write(bytes(1 << 12)):
                    pass
            except OSError:
                return

    def free(self) -> None:
        (self.place / "ballast").unlink()


@pytest.fixture
def disk() -> Iterator[Disk]:
    with servers.short_directory() as directory:
        small = Disk(directory)
        if not small.mount(8):
            pytest.skip("no right to mount a tmpfs: the tests of a full disk are left out")
        try:
            yield small
        finally:
            subprocess.run(["umount", "-l", str(directory)], check=True)


def is_refused(rm: RequestManager, n: int) -> bool:
    try:
        rm.submit("/add/0/0", payload="x" * 10_000, payload_id=str(n))
    except ResponseError as error:
        return "MISCONF" in str(error)
    return False


def submit_until_refused(rm: RequestManager) -> Iterator[str]:
    """The keys of what was accepted."""
    with suppress(RedisError):
        for n in count():
            yield rm.submit(f"/add/{n}/0", payload="x" * 10_000).key


def test_a_full_disk_refuses_submits_and_keeps_what_is_in_hand(disk: Disk, tmp_path: Path) -> None:
    """Row 36: ``everysec``. The result is told again until there is space."""
    with (
        embedded.private(disk.place, binary=servers.VALKEY or servers.REDIS, aof=True) as server,
        crew(server.url, tmp_path, lease=10) as team,
    ):
        worker = team.hire()
        key = team.rm.submit("/turn/full").key
        team.note("running-full-1")
        disk.fill()
        tries = count()
        eventually(lambda: is_refused(team.rm, next(tries)), 20, "the server notices")
        team.let_go("full-1")
        eventually(lambda: "MISCONF" in worker.log.read_text(), 20, "the worker is refused")
        assert team.rm.status(key).state is State.IN_PROGRESS
        disk.free()
        assert team.rm.result(key, timeout=20) == 1
        other = team.rm.submit("/add/0/0").key
        team.settle(other)
        assert (team.rm.status(key).attempts, worker.lives) == (1, True)
        check(team, key, other)


def test_a_server_that_ends_because_the_disk_is_full_loses_nothing(disk: Disk, tmp_path: Path) -> None:
    """Row 37: with ``always`` it exits rather than confirm what it cannot write."""
    args = ("--appendfsync", "always")
    with (
        embedded.private(disk.place, binary=servers.VALKEY or servers.REDIS, aof=True, args=args) as server,
        crew(server.url, tmp_path, lease=10) as team,
    ):
        worker = team.hire()
        keys = [team.rm.submit("/turn/full").key]
        team.note("running-full-1")
        disk.fill()
        keys += submit_until_refused(team.rm)
        eventually(lambda: Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        team.let_go("full-1")
        server.kill()
        disk.free()
        server.start()
        assert {status.state for status in team.settle(*keys)} == {State.COMPLETED}
        assert (team.rm.status(keys[0]).attempts, worker.lives) == (1, True)
        extra = [event.key for event in team.rm.events("0", timeout=0) if event.verb == "submit"]
        check(team, *keys, *(set(extra) - set(keys)))


# -- cut


def newest(directory: Path) -> Path:
    """The file to which the server appends."""
    return max((directory / "appendonlydir").glob("*.incr.aof"), key=lambda file: int(file.name.split(".")[-3]))


def test_a_power_cut_loses_the_last_words_and_halves_nothing(tmp_path: Path) -> None:
    """Row 26: again and again under load, the newest part of the file is gone when the server starts."""
    chance = random.Random(SEED)
    with (
        servers.throwaway(servers.VALKEY or servers.REDIS, aof=True) as server,
        crew(server.url, tmp_path, crash_delay=0) as team,
    ):
        worker = team.hire()
        there: list[str] = []
        lost: list[str] = []
        for cut in (1, chance.randrange(2, 400), chance.randrange(400, 3000), chance.randrange(3000, 9000)):
            there += (told := [f"/add/{n}/{cut}" for n in range(30)])
            for uri in told:
                team.rm.submit(uri)
            server.kill()
            file = newest(server.directory)
            with file.open("rb+") as aof:
                aof.truncate(file.stat().st_size - cut)
            server.start()
            audit_in_motion(team.rm.connection, team.rm.core.keys)
            gone = [uri for uri in there if team.rm.status(BatchRequest(uri).key).state is State.UNKNOWN]
            there = there[: len(there) - len(gone)]
            assert not set(gone) & set(there), "what is lost was told last: nothing older is missing"
            lost += gone
        assert 0 < len(lost) < len(there)
        keys = [team.rm.submit(uri).key for uri in lost] + [BatchRequest(uri).key for uri in there]
        assert {status.state for status in team.settle(*keys)} == {State.COMPLETED}
        assert worker.lives
        check(team, *keys)
