"""Chaos shows: clients, workers and a server as real processes, which are hurt while requests flow.

Each show hurts in its own way and then makes the same inspection: every request has one result, nothing ran more often
than what was killed explains, and nothing is left over in Redis. ``tests/test_chaos.py`` runs them with small counts,
``scripts/chaos.py`` with large ones.

A worker is known by its command line only (``rqarm worker``), and its horse as a child with a process group of its own;
so Linux is needed. ``max_attempts`` is so high that no kill quarantines: that is the subject of the show ``poison``.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import servers
from audit import audit
from redis.exceptions import RedisError
from rq import Queue
from rq.job import Job
from rq.registry import ScheduledJobRegistry, StartedJobRegistry
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer
from servers import eventually
from workers import in_environment, rq_cli

import rqarm
from rqarm import BatchStatus, RequestManager, State, embedded
from rqarm.rqjobs import queue_names

TESTS = Path(__file__).parent
#: where the rqarm under test was found; a mutant of it lies elsewhere
PACKAGE = Path(rqarm.__file__).parent.parent
#: seconds after which a show that makes no progress has failed
PATIENCE = 60.0
#: a count of crashes that no request reaches
NEVER = 1_000_000


# -- processes


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    group: int
    session: int
    is_alive: bool


def processes() -> list[Process]:
    """All of this machine, by /proc."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                state, parent, group, session = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:4]
                found.append(Process(int(entry), int(parent), int(group), int(session), state not in "ZX"))
    return found


def send(pid: int, number: signal.Signals) -> bool:
    """False when it is gone already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


class Worker:
    """``rqarm worker`` in a session of its own."""

    def __init__(self, number: int, directory: Path, environment: dict[str, str]) -> None:
        self.log = directory / f"worker-{number}.log"
        command = [sys.executable, "-m", "rqarm.cli", "worker", "--handlers", str(TESTS / "chaos_app.py")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                embedded._leashed(command),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        #: we have sent it a signal that ends it
        self.is_doomed = False
        #: RQ has shown it idle or busy
        self.has_listened = False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def family(self) -> list[Process]:
        """The live processes of its session besides itself."""
        return [each for each in processes() if each.session == self.pid != each.pid and each.is_alive]

    def horses(self) -> list[int]:
        """Its children with a group of their own; RQ's scheduler stays in the worker's."""
        return [each.pid for each in self.family() if each.group == each.pid]

    def end(self, number: signal.Signals) -> bool:
        self.is_doomed = True
        return self.exit_code is None and send(self.pid, number)


class Notes:
    """What handlers noted: the count of executions that does not come from Redis."""

    def __init__(self, path: Path) -> None:
        self.path, self._read = path, 0
        self.begins: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        #: process -> what it runs, as far as it has noted
        self.running: dict[int, str] = {}
        path.write_bytes(b"")

    def look(self) -> Notes:
        with self.path.open("rb") as notes:
            notes.seek(self._read)
            lines = notes.read()
        self._read += len(lines)
        for line in lines.decode().splitlines():
            word, name, pid, _ = line.split()
            if word == "begin":
                self.begins[name] += 1
                self.running[int(pid)] = name
            else:
                self.ends[name] += 1
                self.running.pop(int(pid), None)
        return self


# -- a stage: server, workers, clients


@dataclass
class Report:
    """What a show did and found. ``violations`` is what must be empty."""

    show: str
    seed: int
    server: str
    numbers: dict[str, int | float] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    directory: Path | None = None

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {number:g}" for name, number in self.numbers.items())
        lines = [f"{self.show} (seed {self.seed}, {self.server}): {numbers}", *(f"  - {v}" for v in self.violations)]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Load:
    """``distinct`` requests, each submitted ``times`` times by each client; ``work``: seconds of a handler.

    ``window``: requests that a client has under way at the most; 0 = it submits all at once. ``patience``: seconds that
    it has for all of them.
    """

    distinct: int = 500
    times: int = 2
    clients: int = 4
    window: int = 40
    work: tuple[float, float] = (0.01, 0.05)
    patience: float = 3 * PATIENCE


class Stage:
    """One show: a server with AOF, a namespace, workers that are replaced when they end, clients, and a seed."""

    def __init__(
        self, report: Report, directory: Path, server: embedded.PrivateServer, load: Load, workers: int, **settings: Any
    ) -> None:
        self.report, self.directory, self.server, self.load = report, directory, server, load
        self.chance = random.Random(report.seed)
        self.name = f"chaos{secrets.token_hex(3)}"
        self.settings = {"namespace": self.name, "queue": self.name, "max_attempts": NEVER} | settings
        self.rm = RequestManager(server.url, **self.settings)
        self.notes = Notes(directory / "notes")
        self.environment = {
            **os.environ,
            **in_environment(self.settings | {"url": server.url}),
            "PYTHONPATH": f"{PACKAGE}:{TESTS}",
            "CHAOS_NOTES": str(self.notes.path),
            "CHAOS_WORK": ",".join(map(str, load.work)),
        }
        self.hired: list[Worker] = []
        self.live: list[Worker] = []
        self.clients: list[subprocess.Popen[bytes]] = []
        self.kills = 0
        self.orphans = 0
        self._wanted = workers
        self._began = time.monotonic()

    # -- workers

    def tend(self) -> Stage:
        """Replace workers that have ended, as a supervisor does; one that ended by itself is a violation."""
        for worker in [each for each in self.live if each.exit_code is not None]:
            self.live.remove(worker)
            if not worker.is_doomed:
                self.wrong(f"{worker.log.name} ended by itself with {worker.exit_code}")
            self._bury(worker)
        while sum(not worker.is_doomed for worker in self.live) < self._wanted:
            self.hire()
        return self

    def hire(self) -> Worker:
        worker = Worker(len(self.hired), self.directory, self.environment)
        self.hired.append(worker)
        self.live.append(worker)
        return worker

    def _bury(self, worker: Worker) -> None:
        """What a dead worker leaves: its horses must go with it; RQ's scheduler does not, so somebody must end it."""
        with suppress(AssertionError):
            eventually(lambda: not worker.horses(), 5)
        for each in worker.family():
            if each.group == each.pid:
                self.wrong(f"{worker.log.name} is dead for 5 s and its horse {each.pid} lives")
            else:
                self.orphans += 1
            send(each.pid, signal.SIGKILL)

    def listening(self) -> list[Worker]:
        """The workers that have looked for work and were not told to end. Before, RQ's do not even obey signals."""
        if not all(worker.has_listened for worker in self.live):
            self._ask_who_listens()
        return [each for each in self.live if each.has_listened and not each.is_doomed and each.exit_code is None]

    def _ask_who_listens(self) -> None:
        with suppress(RedisError):
            client = self.rm.connection
            states = [client.hmget(name, "pid", "state") for name in client.smembers("rq:workers")]
            pids = {int(pid) for pid, state in states if state in (b"idle", b"busy")}
            for worker in self.live:
                worker.has_listened |= worker.pid in pids

    def until(self, claim: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
        """Wait for the claim, with a supervisor at work."""
        return eventually(lambda: self.tend() and claim(), timeout, what)

    def all_listen(self) -> Stage:
        self.until(lambda: len(self.listening()) >= self._wanted, "all workers listen")
        return self

    # -- clients

    def open(self) -> Stage:
        """Start the clients."""
        load = self.load
        for number in range(load.clients):
            seed = self.report.seed * 1000 + number
            arguments = (seed, load.distinct, load.times, load.window, load.patience)
            with (self.directory / f"client-{number}.log").open("wb") as log:
                self.clients.append(
                    subprocess.Popen(
                        embedded._leashed([sys.executable, str(TESTS / "chaos_client.py"), *map(str, arguments)]),
                        env=self.environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                    )
                )
        return self

    def instants(self, count: int) -> Iterator[int]:
        """``count`` random instants, spread over the whole of the load: by executions begun, then a random pause."""
        points = sorted(self.chance.uniform(0.02, 0.95) * self.load.distinct for _ in range(count))
        for number, point in enumerate(points):
            self.until(lambda point=point: len(self.notes.look().begins) >= point, f"{point:.0f} requests were begun")
            threading.Event().wait(self.chance.uniform(0, self.load.work[1]))
            yield number

    # -- the inspection

    def wrong(self, violation: str) -> None:
        self.report.violations.append(violation)

    def check(self, holds: Any, violation: str) -> None:
        if not holds:
            self.wrong(violation)

    def inspect(self, extra: int, *, exactly: bool = False, failed: int = 0) -> None:
        """Wait for the end of the load, then look at everything.

        ``extra``: executions that what was done explains. ``exactly``: there must be no more and no less than one each.
        ``failed``: requests of the show that end without a result.
        """
        self._clients_end()
        self._all_is_quiet()
        self._workers_end()
        self._rq_maintains()
        self._executions(extra, exactly)
        self._results(failed)
        self._nothing_is_left()
        self.report.numbers |= {"seconds": round(time.monotonic() - self._began, 1)}

    def _clients_end(self) -> None:
        deadline = time.monotonic() + self.load.patience
        for number, client in enumerate(self.clients):
            with suppress(AssertionError):
                self.until(lambda client=client: client.poll() is not None, "", deadline - time.monotonic())
            said = (self.directory / f"client-{number}.log").read_text()
            self.check(client.returncode == 0, f"client {number} ended with {client.returncode}: {said[-2000:]}")

    def _all_is_quiet(self) -> None:
        client = self.rm.connection

        def busy() -> dict[str, Any]:
            stats = self.rm.cache.stats()
            lists = {f"list {q}": client.llen(f"rq:queue:{q}") for q in queue_names(self.name)}
            delayed = {f"scheduled {q}": client.zcard(f"rq:scheduled:{q}") for q in queue_names(self.name)}
            left = {"in progress": stats.in_progress, "pending": sum(stats.pending.values())}
            return {name: number for name, number in (left | lists | delayed).items() if number}

        try:
            self.until(lambda: not any("scheduled" not in name for name in busy()), "nothing waits or runs")
            # A superseded ticket may wait for a scheduler: RQ starts another one up to ten minutes after the last died.
            self.report.numbers["stranded"] = self._rq_schedules()
            self.until(lambda: not busy(), "the last tickets are superseded")
        except AssertionError:
            self.wrong(f"{PATIENCE:g} s after the clients' end there is still work: {busy()}")

    def _rq_schedules(self) -> int:
        """What a scheduler does when the time of what is left has come; how many there were."""
        registries = [ScheduledJobRegistry(name, connection=self.rm.connection) for name in queue_names(self.name)]
        scheduler = RQScheduler(queue_names(self.name), connection=self.rm.connection, serializer=JSONSerializer)
        scheduler.prepare_registries(queue_names(self.name))
        left = sum(registry.count for registry in registries)

        def none_left() -> bool:
            scheduler.enqueue_scheduled_jobs()
            return not any(registry.count for registry in registries)

        self.until(none_left, "all delays are over")
        return left

    def _workers_end(self) -> None:
        last = list(self.all_listen().live)
        for worker in last:
            worker.end(signal.SIGTERM)
        for worker in last:
            with suppress(AssertionError):
                eventually(lambda worker=worker: worker.exit_code is not None, 15)
            self.check(worker.exit_code == 0, f"{worker.log.name}: SIGTERM when idle ended with {worker.exit_code}")
            self._bury(worker)

    def _rq_maintains(self) -> None:
        """What RQ's maintenance does when its times have come (90 s and 10 min): executions of dead workers end."""
        for name in queue_names(self.name):
            queue = Queue(name, connection=self.rm.connection, serializer=JSONSerializer)
            StartedJobRegistry(queue=queue).cleanup(time.time() + 3600)

    def _executions(self, extra: int, exactly: bool) -> None:
        notes, distinct = self.notes.look(), self.load.distinct
        begins = {name: count for name, count in notes.begins.items() if name.startswith("work/")}
        total = sum(begins.values())
        crashed = self.rm.cache.stats().executions.get("crashed", 0)
        self.report.numbers |= {
            "distinct": distinct,
            "submits": distinct * self.load.times * len(self.clients),
            "executions": total,
            "cut off": total - sum(notes.ends.values()),
            "ended twice": sum(count > 1 for count in notes.ends.values()),
            "crashes": crashed,
            "orphans": self.orphans,
        }
        twice = [name for name, count in begins.items() if count > 1]
        self.check(len(begins) == distinct, f"{len(begins)} of {distinct} requests ran")
        if exactly:
            self.check(total == distinct, f"{total} executions of {distinct}: twice ran {twice[:10]}")
            self.check(not crashed, f"{crashed} crashes were counted, and nothing was killed")
        else:
            self.check(total <= distinct + extra, f"{total} executions of {distinct} requests, {extra} are explained")

    def _results(self, failed: int) -> None:
        client, distinct = self.rm.connection, self.load.distinct
        stats = self.rm.cache.stats()
        self.check(stats.executions.get("completed") == distinct, f"{stats.executions} instead of {distinct} completed")
        stream = client.xinfo_stream(f"{self.name}:events")
        if stream["entries-added"] != stream["length"]:
            self.wrong(f"only {stream['length']} of {stream['entries-added']} events are kept: take fewer requests")
        ends = Counter(event.key for event in self.rm.events("0", timeout=0) if event.verb == "complete")
        twice = [key for key, count in ends.items() if count != 1]
        self.check(not twice, f"completed twice: {twice}")
        self.check(len(ends) == distinct, f"{len(ends)} of {distinct} requests were completed")
        last = {key: self.rm.status(key).attempts for key in ends}
        late = [key for key, attempts in last.items() if self.rm.result(key)[1] != attempts]
        self.check(not late, f"the result is that of an attempt that was superseded: {late}")
        self.check(
            stats.quarantined == failed,
            f"{stats.quarantined} set aside, not {failed}; {stats.executions.get('failed', 0)} ended in an exception",
        )
        numbers = {"revived": stats.executions.get("revived", 0), "released": stats.executions.get("released", 0)}
        self.report.numbers |= numbers

    def _nothing_is_left(self) -> None:
        client = self.rm.connection
        try:
            audit(client, self.rm.core.keys)
        except AssertionError as breach:
            self.wrong(str(breach))
        for pattern in ("lock:*", "leases", "pending:*", "load:*", "callbacks:*"):
            left = client.keys(f"{self.name}:{pattern}")
            self.check(not left, f"left over: {left}")
        prefix: str = Job.redis_job_namespace_prefix
        jobs = [name for name in client.keys(f"{prefix}*") if client.ttl(name) == -1]
        stories = [f"{name.decode()} {client.hget(name, 'status')}" for name in jobs[:5]]
        self.check(not jobs, f"{len(jobs)} RQ jobs will stay for ever: {stories}")
        for pattern in ("rq:wip:*", "rq:queue:*", "rq:scheduled:*", "rq:execution*", "rq:worker*:executions"):
            left = [name for name in client.keys(pattern) if client.ttl(name) == -1]
            self.check(not left, f"left over: {left}")

    def close(self) -> None:
        for client in self.clients:
            if client.poll() is None:
                client.kill()
            client.wait()
        for worker in self.hired:
            for each in worker.family():
                send(each.pid, signal.SIGKILL)
            if worker.exit_code is None:
                worker.end(signal.SIGKILL)
                worker._process.wait()
        self.rm.close()


@contextmanager
def stage(show: str, seed: int, directory: Path, load: Load, workers: int = 3, **settings: Any) -> Iterator[Stage]:
    """A stage with workers that listen. Everything that was started is gone afterwards; logs stay in ``directory``."""
    binary = servers.VALKEY or servers.REDIS
    with servers.throwaway(binary, aof=True) as server:
        report = Report(show, seed, server.binary.name, directory=directory)
        built = Stage(report, directory, server, load, workers, **settings)
        try:
            yield built.all_listen()
        finally:
            built.close()


# -- the shows


def kills(directory: Path, seed: int, count: int, distinct: int = 500) -> Report:
    """``kill -9`` of horses (half), workers, and workers with all that is theirs, at random instants under load."""
    settings = {"lease": 3.0, "crash_delays": (0.0, 0.5)}
    # long enough for the load to outlast the kills: workers need a second to start
    load = Load(distinct=distinct, work=(0.01, max(0.05, count / distinct)))
    with stage("kills", seed, directory, load, **settings) as show:
        show.open()
        numbers = Counter[str]()
        for number in show.instants(count):
            if _is_over(show):
                show.wrong(f"the load ended after {number} of {count} kills: take more requests")
                break
            numbers[_kill(show)] += 1
        show.report.numbers |= numbers
        show.inspect(extra=show.kills)
    return show.report


def _kill(show: Stage) -> str:
    """Kill one; what it was."""
    if show.chance.random() < 0.5:

        def horse_falls() -> bool:
            horses = sorted(horse for worker in show.live for horse in worker.horses())
            return bool(horses) and send(show.chance.choice(horses), signal.SIGKILL)

        if show.until(lambda: horse_falls() or (_is_over(show) and "none"), "there is a horse") == "none":
            return "nobody"
        show.kills += 1
        return "horses"
    victim = show.until(lambda: (found := show.listening()) and show.chance.choice(found), "a worker listens")
    family = victim.family()
    show.kills += victim.end(signal.SIGKILL)
    if show.chance.random() < 0.6:
        return "workers"
    for each in family:  # as a container is killed
        send(each.pid, signal.SIGKILL)
    return "containers"


def stops(directory: Path, seed: int, count: int, distinct: int = 0) -> Report:
    """SIGSTOP of a worker, its horse or both beyond the lease, and SIGCONT: who comes too late is refused."""
    lease = 2.0
    load = Load(distinct=distinct or max(60, 10 * count), window=2, work=(0.2, 3.0), patience=60 + 8 * count)
    with stage("stops", seed, directory, load, workers=4, lease=lease, crash_delays=(0.0, 0.5)) as show:
        show.open()
        numbers = Counter[str]()
        frozen: dict[Worker, Iterator[None]] = {}

        def thaw() -> int:
            """Move each of the frozen on; how many there are still."""
            for worker in [worker for worker, steps in frozen.items() if next(steps, frozen) is frozen]:
                del frozen[worker]
            return len(frozen)

        for number in range(count):
            threading.Event().wait(show.chance.uniform(0, 0.2))
            show.until(lambda: thaw() < 2, "somebody is thawed")
            found = show.until(lambda: (thaw() < 4 and _at_work(show, frozen)) or _is_over(show), "a worker works")
            if not isinstance(found, tuple):
                show.wrong(f"the load ended after {number} of {count} stops: take more requests")
                break
            worker, horse = found
            kind = ("both", "worker", "both", "horse")[number % 4]
            frozen[worker] = _freeze(show, worker, horse, kind, lease)
            numbers[kind] += 1
        show.until(lambda: not thaw(), "all are thawed")
        show.report.numbers |= numbers
        show.inspect(extra=count - numbers["horse"])
        late = show.report.numbers["ended twice"]
        show.check(late or count < 4, "no attempt came to its end too late: the show has shown nothing")
    return show.report


def _freeze(show: Stage, worker: Worker, horse: int, kind: str, lease: float) -> Iterator[None]:
    """Stop it; beyond its lease, when another runs the request or nobody will, let it go on: the horse first."""
    name = show.notes.running.get(horse, "")
    frozen = {"both": (worker.pid, horse), "worker": (worker.pid,), "horse": (horse,)}[kind]
    stopped = [pid for pid in frozen if send(pid, signal.SIGSTOP)]
    begins, since = show.notes.look().begins[name], time.monotonic()
    while time.monotonic() - since < lease * 1.2:
        yield
    patience = {"both": 10 * lease, "worker": 2 * lease, "horse": 0}[kind]
    while show.notes.look().begins[name] == begins and time.monotonic() - since < patience:
        yield
    for pid in reversed(stopped):
        send(pid, signal.SIGCONT)
        since = time.monotonic()
        while show.notes.look().running.get(horse) == name and time.monotonic() - since < show.load.work[1]:
            yield


def _at_work(show: Stage, frozen: Container[Worker]) -> tuple[Worker, int] | None:
    """A worker whose horse runs a handler now."""
    running, workers = show.notes.look().running, [each for each in show.listening() if each not in frozen]
    found = [(worker, horse) for worker in workers for horse in worker.horses() if horse in running]
    return show.chance.choice(found) if found else None


def _is_over(show: Stage) -> bool:
    return all(client.poll() is not None for client in show.clients)


def restarts(directory: Path, seed: int, count: int, distinct: int = 500) -> Report:
    """The server is killed and started again on its append-only file."""
    with stage("restarts", seed, directory, Load(distinct=distinct), lease=5.0, crash_delays=(0.0, 0.5)) as show:
        show.open()
        for _ in show.instants(count):
            show.server.kill()
            show.server.start()
        show.report.numbers["restarts"] = count
        show.inspect(extra=0)
    return show.report


def emptied(directory: Path, seed: int, count: int, distinct: int = 500) -> Report:
    """``rq empty`` on all queues while requests wait in them: the sweep brings every ticket back."""
    # long enough for the load to outlast the start of a command
    load = Load(distinct=distinct, window=0, work=(0.05, 0.2))
    with stage("emptied", seed, directory, load, lease=2.0) as show:
        show.open()
        for _ in show.instants(count):
            rq_cli(show.server.url, "empty", *queue_names(show.name))
        show.report.numbers["emptied"] = count
        show.inspect(extra=0, exactly=True)
        show.check(show.report.numbers["revived"], "no ticket was lost: the show has shown nothing")
    return show.report


def rolling(directory: Path, seed: int, count: int, distinct: int = 500) -> Report:
    """SIGTERM of two workers at a time, their successors beside them, again and again."""
    with stage("rolling", seed, directory, Load(distinct=distinct), workers=4, lease=5.0) as show:
        show.open()
        leaving: list[Worker] = []
        for _ in show.instants(count):
            show.until(lambda: len(show.listening()) >= 2, "two workers listen")
            leaving += (pair := show.chance.sample(show.listening(), 2))
            for worker in pair:
                worker.end(signal.SIGTERM)
        show.until(lambda: all(worker.exit_code is not None for worker in leaving), "all that were told to end have")
        for worker in leaving:
            show.check(worker.exit_code == 0, f"{worker.log.name}: SIGTERM ended it with {worker.exit_code}")
        show.report.numbers["terminated"] = len(leaving)
        show.inspect(extra=0, exactly=True)
    return show.report


@dataclass(frozen=True)
class Poison:
    """``told``: what the stored reason must tell. ``attempts``: how often it runs before it is given up."""

    uri: str
    is_blocked: bool
    told: tuple[str, ...]
    attempts: int


POISONS = (
    Poison("/poison/segfault", True, ("SIGSEGV",), 3),
    Poison("/poison/exit/7", True, ("code 7",), 3),
    Poison("/poison/exit/0", True, ("code 0",), 3),
    Poison("/poison/killed", True, ("SIGKILL", "MiB"), 3),
    Poison("/poison/hog", False, ("MemoryError",), 1),
    Poison("/poison/regex", False, ("TimeLimit", "limit of 1 s"), 1),
    Poison("/poison/loop", False, ("TimeLimit", "limit of 1 s"), 1),
)


def poison(directory: Path, seed: int, count: int, distinct: int = 500) -> Report:
    """Requests that kill, fill or hang their process, ``count`` of each kind, among others that flow."""
    load = Load(distinct=distinct)
    with stage("poison", seed, directory, load, lease=3.0, max_attempts=3, crash_delays=(0.0, 0.5)) as show:
        show.open()
        doses = [(poison, show.rm.submit(f"{poison.uri}?dose={n}")) for n in range(count) for poison in POISONS]
        before = list(show.live)
        keys = [status.key for _, status in doses]
        with suppress(AssertionError):
            show.until(
                lambda: all(status.state.ended for status in map(show.rm.status, keys)), "the poisonous ones end"
            )
        for each, submitted in doses:
            _is_judged(show, each, show.rm.status(submitted.key))
        show.check(show.tend().live == before, "a poison has cost a worker")
        begins = show.notes.look().begins
        for each in POISONS:
            ran, name = begins[each.uri[1:]], each.uri
            show.check(ran == count * each.attempts, f"{name} ran {ran} times instead of {count * each.attempts}")
        show.report.numbers["poisonous"] = len(doses)
        show.inspect(extra=0, failed=len(doses))
    return show.report


def _is_judged(show: Stage, dose: Poison, status: BatchStatus) -> None:
    error = str(status.error)
    show.check(
        status.state is State.FAILED and status.quarantined and status.is_blocked == dose.is_blocked,
        f"{dose.uri} is {status.state}, set aside: {status.reason}, {error}",
    )
    for word in dose.told:
        show.check(word in error, f"the reason of {dose.uri} does not tell {word!r}: {error}")


SHOWS: dict[str, Callable[..., Report]] = {
    show.__name__: show for show in (kills, stops, restarts, emptied, poison, rolling)
}
