"""``rqarm worker`` as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from workers import PATIENCE, TESTS, is_alive

from rqarm import embedded


class Command:
    """A process of ``rqarm worker``. What it writes to stderr is in ``said``."""

    def __init__(self, url: str, directory: Path, *arguments: str, **environment: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RQARM_", "RQ_"))}
        notes = directory / "notes"
        notes.mkdir(exist_ok=True)
        clean |= {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "RQARM_ALLOW_VOLATILE": "1", "NOTES": str(notes)}
        clean |= {"RQARM_URL": url}
        self._log = directory / "stderr.log"
        program = [sys.executable, "-m", "rqarm.cli", "worker", *arguments]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                embedded._leashed(program),
                env=clean | environment,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code, once it has ended by itself."""
        return self.process.wait(timeout)

    def children(self) -> list[int]:
        """The live processes that it has started itself."""
        return children(self.pid)


def children(parent: int) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and is_alive(int(place.name)):
                found.append(int(place.name))
    return sorted(found)


def family(parent: int) -> list[int]:
    """Children, their children, and so on."""
    return [each for child in children(parent) for each in (child, *family(child))]


@contextmanager
def command(url: str, directory: Path, *arguments: str, **environment: Any) -> Iterator[Command]:
    """A worker that is killed at the end with all that it has started. Prints its log, which pytest shows."""
    started = Command(url, directory, *arguments, **environment)
    try:
        yield started
    finally:
        rest = family(started.pid)
        started.process.kill()
        started.process.wait()
        for pid in rest:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        print(started.said)


def finished(url: str, directory: Path, *arguments: str, **environment: Any) -> Command:
    """A worker that has ended by itself."""
    with command(url, directory, *arguments, **environment) as started:
        started.wait()
    return started
