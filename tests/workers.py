"""Workers for tests: real processes, and RQ's own worker run to the end of the queue in this process."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import redis
import rq
from rq.job import Job
from rq.serializers import JSONSerializer
from servers import eventually

from rqarm import BatchStatus, RequestManager, State, embedded
from rqarm.rqjobs import queue_names

TESTS = Path(__file__).parent
APP = TESTS / "app.py"
#: classes of workers as ``rq worker -w`` takes them
CLASSES = ["rq.worker.Worker", "rq.worker.SimpleWorker", "rq.worker.SpawnWorker", "rqarm.Worker"]
#: so short that a fault shows its end within seconds
LEASE = 2.0
#: how long anything may take in which several leases, delays and process starts add up on a busy machine
PATIENCE = 40.0


class WorkerProcess:
    """``rq worker`` as a process of its own. What it says is in ``log``; what its handlers note is in ``notes``."""

    def __init__(
        self,
        url: str,
        directory: Path,
        kind: str,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        package: Path,
    ) -> None:
        self.kind, self.name = kind, name
        self.log, self.notes = directory / f"{name}.log", directory / "notes"
        self.notes.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            **environment,
            "PYTHONPATH": f"{package}:{TESTS}:{os.environ.get('PYTHONPATH', '')}",
            "NOTES": str(self.notes),
            "RQARM_ALLOW_VOLATILE": "1",
        }
        program = [sys.executable, "-m", "rq.cli", "worker", "-w", kind, "-u", url, "-S", "json", "-n", name]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                embedded._leashed([*program, *arguments]),  # it ends with this process at the latest
                env=environment,
                cwd=directory,  # `python -m` looks there first
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout: float = 15.0) -> int:
        """The exit code, once it has ended by itself."""
        return self._process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL, also to what it started besides horses (those have groups of their own)."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM, SIGKILL when that is not enough; then the horses that it has left behind."""
        if self.lives:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        self.kill()
        for note in self.notes.glob("horse-*"):
            horse, worker = int(note.name.removeprefix("horse-")), note.read_text()
            if worker == self.name and is_alive(horse):
                os.kill(horse, signal.SIGKILL)

    def said(self) -> str:
        """The end of its log."""
        return f"--- {self.name}\n" + "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])


class Crew:
    """Workers on one server, with a namespace and a queue of their own; all are stopped at the end."""

    def __init__(
        self, url: str, directory: Path, crash_delay: float | None = None, handlers: Path = APP, **settings: Any
    ) -> None:
        self._handlers = handlers
        #: where the rqarm of those who are hired from now on lies
        self.package = TESTS.parent
        self.name = f"crew{secrets.token_hex(3)}"
        self.url, self.directory = url, directory / self.name
        self.directory.mkdir()
        self.settings = {"namespace": self.name, "queue": self.name, "lease": LEASE} | settings
        if crash_delay is not None:
            self.settings["crash_delays"] = (float(crash_delay),)
        self.rm = RequestManager(url, allow_volatile=True, **self.settings)
        self.workers: list[WorkerProcess] = []

    def hire(self, kind: str = "rqarm.Worker", *options: str, **settings: Any) -> WorkerProcess:
        """A new worker, once it listens."""
        worker = self.start(kind, *options, **settings)
        self.wait_for(worker)
        return worker

    def start(self, kind: str = "rqarm.Worker", *options: str, **settings: Any) -> WorkerProcess:
        """A new worker that may not listen yet. ``options`` are those of ``rq worker``."""
        name = f"{self.name}-{kind.rpartition('.')[2]}-{len(self.workers)}"
        arguments = (*options, *queue_names(self.name))
        settings = {"handlers": self._handlers} | self.settings | settings
        environment = in_environment(settings)
        worker = WorkerProcess(self.url, self.directory, kind, name, arguments, environment, self.package)
        self.workers.append(worker)
        return worker

    def wait_for(self, worker: WorkerProcess) -> None:
        """Until it listens."""
        listening = (b"idle", b"busy", b"suspended")
        eventually(lambda: not worker.lives or self.state_of(worker) in listening, PATIENCE, f"{worker.name} listens")
        assert worker.lives, worker.said()

    def state_of(self, worker: WorkerProcess) -> bytes | None:
        """What RQ says of a worker."""
        return self.rm.connection.hget(f"rq:worker:{worker.name}", "state")

    def note(self, name: str) -> str:
        """What a handler noted under this name, once it has."""
        path = self.directory / "notes" / name
        eventually(path.exists, PATIENCE, f"a handler notes {name}")
        return path.read_text()

    def running(self, name: str) -> int:
        """The process that runs ``/wait/{name}`` and the like, once it does."""
        return int(self.note(f"running-{name}"))

    def let_go(self, name: str) -> None:
        """Let the handler of ``/wait/{name}`` return."""
        (self.directory / "notes").mkdir(exist_ok=True)
        (self.directory / "notes" / f"go-{name}").touch()

    def field(self, key: str, name: str) -> bytes | None:
        """A field of the record that no status shows."""
        return self.rm.connection.hget(f"{self.name}:status:{key}", name)

    def job(self, key: str) -> Job:
        """RQ's job of a request."""
        job_id = self.field(key, "job_id")
        assert job_id is not None
        return Job.fetch(job_id.decode(), connection=self.rm.connection, serializer=JSONSerializer)

    def shown(self, key: str) -> Job:
        """RQ's job of a running request, once RQ's tools show it."""
        job = self.job(key)

        def is_started() -> bool:
            job.refresh()
            return job.worker_name is not None

        eventually(is_started)
        return job

    def settle(self, *keys: str, timeout: float = PATIENCE) -> list[BatchStatus]:
        """The statuses of requests that have all ended; only looked at, so that waiting heals nothing."""
        read = [self.rm.status(key) for key in keys]

        def all_ended() -> bool:
            read[:] = [status if status.state.ended else self.rm.status(status.key) for status in read]
            return all(status.state.ended for status in read)

        eventually(all_ended, timeout, f"all end: {', '.join(keys)}")
        return read

    def reaches(self, key: str, state: State, timeout: float = PATIENCE) -> BatchStatus:
        """The status of a request, once it is in this state."""

        def found() -> BatchStatus | None:
            status = self.rm.status(key)
            return status if status.state is state else None

        reached: BatchStatus = eventually(found, timeout, f"{key} is {state}")
        return reached

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()
            print(worker.said())
        self.rm.close()


@contextmanager
def crew(url: str, directory: Path, **settings: Any) -> Iterator[Crew]:
    """A crew on the server at ``url``. At the end it prints its logs, which pytest shows when the test has failed.

    ``crash_delay``: seconds between a crash and the next attempt, instead of 1, 5, 25. ``handlers``: the file of them.
    """
    hired = Crew(url, directory, **settings)
    try:
        yield hired
    finally:
        hired.close()


def in_environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as the variables that a process of its own reads them from."""
    return {
        f"RQARM_{name.upper()}": ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in settings.items()
    }


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def own_signals() -> Iterator[None]:
    """Signal handlers as they were, after RQ has put its own."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def burst(client: redis.Redis, *queues: str, kind: type[rq.worker.BaseWorker] = rq.SimpleWorker, **options: Any) -> Any:
    """Run what is queued in this process, until the queues are empty; the worker that did it."""
    with own_signals():
        worker = kind(list(queues or queue_names("arm")), connection=client, serializer=JSONSerializer, **options)
        worker.subscribe = lambda: None  # nobody sends it commands, and the listener takes a second to end
        worker.work(burst=True, logging_level="WARNING")
    return worker


def rq_cli(url: str, *arguments: str) -> str:
    """What an ``rq`` command prints. Fails the test when the command fails."""
    command, *rest = arguments
    done = subprocess.run(
        [sys.executable, "-m", "rq.cli", command, "-u", url, *rest],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def timed(call: Callable[[], Any]) -> float:
    """Seconds that the call takes."""
    began = time.monotonic()
    call()
    return time.monotonic() - began
