"""What one worker process does: jobs per second, latency, round trips and bytes, against other queues, in one run.

    python benchmarks/worker.py [--only rqarm,rq] [--rounds 5] [--jobs 5000] [--quick] [--async] [--server redis]

Each contender has a script in benchmarks/peers, which says why it is set as it is, and a virtual environment of its
own, kept in --venvs; rqarm runs from this checkout in the environment of this command. All use one private server by
its unix socket, empty before each measure. Every contender runs in every round, one after the other, so that a noisy
machine is noisy for all. What counts are the ratios within a round.

jobs/s       No-op jobs are queued, then one worker starts. Each job notes when it ran; the rate is from the first to
             the last, or to what ran within --seconds. So the start of the worker does not count.
p50, p99     Submit one job to an idle worker and wait for its result, again and again.
commands     Commands of the server for each job during the first measure, those inside scripts included (INFO
             commandstats), the start of the worker as well.
trips        Requests that the server read from its clients (INFO total_reads_processed) for each job, likewise.
bytes        used_memory for each job, when it waits and when it has ended; the result is the number 1. rqarm's capped
             stream of events aside.

rqarm also gets all jobs at once while its worker is idle, and that must not be much slower: then it also submits. The
others are not asked for that, since most of them are slower to submit than to run.

A contender that cannot be installed or fails is listed with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import redis

from rqarm import RequestManager, embedded

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).resolve().parent / "peers"
#: seconds that a worker may take from its start to its first job, and a client to its end
START, CLIENT, INSTALL = 30.0, 120.0, 600.0
#: seconds that a worker has to end when asked
STOP = 10.0
#: seconds in which the last results are stored behind the last job; and at most, should the machine be busy
SETTLE, CORRECT = 0.2, 10.0
MARK = 8


class Failed(Exception):
    """A contender cannot go on; the message is for the table."""


@dataclass(frozen=True, slots=True)
class Contender:
    """``packages``: what its environment holds, the first one's version is shown; none = this checkout."""

    name: str
    script: str
    packages: tuple[str, ...] = ()
    options: str = ""


CONTENDERS = (
    Contender("rqarm", "with_rqarm.py"),
    Contender("rq", "with_rq.py", ("rq~=3.0", "redis[hiredis]")),
    Contender("rq-simple", "with_rq.py", ("rq~=3.0", "redis[hiredis]"), "simple"),
    # saq 0.26.4 uses typing_extensions without saying so
    Contender("saq", "with_saq.py", ("saq[redis,hiredis]", "uvloop", "typing_extensions")),
    Contender("arq", "with_arq.py", ("arq", "redis[hiredis]", "uvloop")),
    Contender("streaq", "with_streaq.py", ("streaq", "uvloop")),
    Contender("taskiq", "with_taskiq.py", ("taskiq", "taskiq-redis", "redis[hiredis]", "uvloop")),
    Contender("taskiq-list", "with_taskiq.py", ("taskiq", "taskiq-redis", "redis[hiredis]", "uvloop"), "list"),
    Contender("dramatiq", "with_dramatiq.py", ("dramatiq[redis]", "redis[hiredis]")),
    Contender("huey", "with_huey.py", ("huey", "redis[hiredis]")),
    Contender("celery", "with_celery.py", ("celery[redis]", "redis[hiredis]")),
)


# -- environments


def python_of(contender: Contender, venvs: Path) -> Path:
    """The interpreter that has the contender's packages; they are installed once. Raises Failed."""
    if not contender.packages:
        return Path(sys.executable)
    packages = sorted(contender.packages)
    digest = hashlib.sha256("\n".join([sys.version, *packages]).encode()).hexdigest()[:12]
    home = venvs / f"{Path(contender.script).stem}-{digest}"
    python = home / "bin" / "python"
    if (home / "complete").exists():
        return python
    uv = shutil.which("uv") or shutil.which("uv", path=os.path.dirname(sys.executable))
    try:
        shutil.rmtree(home, ignore_errors=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        if uv:
            run([uv, "venv", "--quiet", "--python", sys.executable, home], INSTALL)
            run([uv, "pip", "install", "--quiet", "--python", python, *packages], INSTALL)
        else:
            run([sys.executable, "-m", "venv", home], INSTALL)
            run([python, "-m", "pip", "install", "--quiet", *packages], INSTALL)
        (home / "complete").touch()
    except OSError as error:
        raise Failed(f"not installed: {error}") from error
    except Failed as failed:
        raise Failed(f"not installed: {failed}") from failed
    return python


def version_of(contender: Contender, python: Path) -> str:
    if not contender.packages:
        return "checkout"
    package = contender.packages[0].partition("[")[0].partition("~")[0]
    return run([python, "-c", f"import importlib.metadata as m; print(m.version({package!r}))"], CLIENT).strip()


def run(command: Sequence[object], timeout: float, env: dict[str, str] | None = None) -> str:
    """What the command says. Raises Failed with the end of what it complained about."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise Failed(f"{Path(words[0]).name} {' '.join(words[1:3])} took longer than {timeout:g} s") from None
    if done.returncode:
        raise Failed(last_line(done.stderr or done.stdout) or f"exit code {done.returncode}")
    return done.stdout


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


# -- one contender on the server


@dataclass(slots=True)
class Stage:
    """The server and the files of a run."""

    server: embedded.PrivateServer
    client: redis.Redis
    directory: Path

    @property
    def marks(self) -> Path:
        return self.directory / "marks"

    def clear(self) -> None:
        # SYNC: Valkey frees in the background else, and the memory of the one before is still there
        self.client.execute_command("FLUSHALL", "SYNC")
        self.marks.write_bytes(b"")

    def count(self) -> int:
        return self.marks.stat().st_size // MARK

    def times(self) -> list[float]:
        """When the jobs ran, in seconds of time.monotonic(), which all processes share."""
        packed = self.marks.read_bytes()
        return sorted(struct.unpack(f"{len(packed) // MARK}d", packed[: len(packed) // MARK * MARK]))

    def memory(self) -> int:
        events = self.client.memory_usage("arm:events", samples=0) or 0
        return int(self.client.info("memory")["used_memory"]) - int(events)

    def traffic(self) -> tuple[int, int]:
        """Commands and reads so far. A look is one of each itself, which the next look sees."""
        info = self.client.info("commandstats", "stats")
        calls = sum(int(value["calls"]) for name, value in info.items() if name.startswith("cmdstat_"))
        return calls, int(info["total_reads_processed"])


@dataclass(slots=True)
class Player:
    """A contender that is installed."""

    contender: Contender
    python: Path
    stage: Stage

    def command(self, *words: object) -> list[str]:
        return [str(self.python), str(PEERS / self.contender.script), *map(str, words)]

    def environment(self, **more: str) -> dict[str, str]:
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("RQARM_", "PYTHONPATH"))}
        keep |= {"BENCH_URL": self.stage.server.url, "BENCH_MARKS": str(self.stage.marks)}
        keep |= {"BENCH_OPTIONS": self.contender.options}
        if not self.contender.packages:
            # the throwaway server keeps no file, for any contender
            keep |= {"PYTHONPATH": str(ROOT), "RQARM_URL": self.stage.server.url, "RQARM_ALLOW_VOLATILE": "1"}
        return keep | more

    def ask(self, *words: object) -> Any:
        """Run the contender's client. Raises Failed."""
        return json.loads(run(self.command(*words), CLIENT, self.environment()).splitlines()[-1])

    @contextlib.contextmanager
    def worker(self, **more: str) -> Iterator[Callable[[], None]]:
        """Run the contender's worker; what is given raises Failed when it has ended."""
        log = self.stage.directory / f"{self.contender.name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command("worker"),
                env=self.environment(**more),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

        def check() -> None:
            if process.poll() is not None:
                raise Failed(f"its worker ended ({process.returncode}): {last_line(log.read_text(errors='replace'))}")

        try:
            yield check
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: what it left behind
            process.wait()

    def wait_for(self, claim: Callable[[], bool], check: Callable[[], None], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not claim():
            check()
            if time.monotonic() > deadline:
                raise Failed(f"{what} not within {timeout:g} s")
            time.sleep(0.02)


@dataclass(slots=True)
class Measured:
    """One contender in one round; latencies in milliseconds."""

    jobs_s: float = math.nan
    commands: float = math.nan
    trips: float = math.nan
    pending_bytes: float = math.nan
    finished_bytes: float = math.nan
    p50: float = math.nan
    p99: float = math.nan


FIGURES = tuple(Measured.__dataclass_fields__)


def throughput(player: Player, jobs: int, seconds: float) -> Measured:
    stage = player.stage
    stage.clear()
    empty = stage.memory()
    ids = player.ask("enqueue", jobs)
    pending = (stage.memory() - empty) / jobs
    commands, reads = stage.traffic()
    with player.worker() as check:
        player.wait_for(lambda: stage.count() > 1, check, START, "two jobs were")
        end = time.monotonic() + seconds
        while stage.count() < jobs and time.monotonic() < end:
            check()
            time.sleep(0.02)
        if stage.count() == jobs:
            time.sleep(SETTLE)
        more_commands, more_reads = stage.traffic()
        times = stage.times()
        # jobs overtake one another a little, so only those that must have ended are looked at
        verify(player, ids[: max(1, len(times) // 2)], check)
    ran = stage.count()
    finished = (stage.memory() - empty - pending * (jobs - ran)) / ran
    return Measured(
        jobs_s=(len(times) - 1) / (times[-1] - times[0]),
        commands=(more_commands - commands - 1) / len(times),
        trips=(more_reads - reads - 1) / len(times),
        pending_bytes=pending,
        finished_bytes=finished,
    )


def flood(player: Player, jobs: int, seconds: float) -> float:
    """Jobs per second of a worker that was idle when they came, from the first to the last."""
    stage = player.stage
    stage.clear()
    with player.worker() as check:
        player.ask("latency", 1, 3)
        stage.marks.write_bytes(b"")
        player.ask("enqueue", jobs)
        player.wait_for(lambda: stage.count() == jobs, check, seconds, "the jobs that came at once were")
        times = stage.times()
    return (len(times) - 1) / (times[-1] - times[0])


def verify(player: Player, ids: list[str], check: Callable[[], None]) -> None:
    """See that the results are there. Raises Failed."""
    deadline = time.monotonic() + CORRECT
    while (said := player.ask("check", *ids))["right"] != len(ids):
        check()
        if time.monotonic() > deadline:
            raise Failed(f"of {len(ids)} results only {said['right']} were right: {said['why']}")


def latency(player: Player, calls: int) -> tuple[float, float]:
    """p50 and p99 in milliseconds."""
    player.stage.clear()
    with player.worker() as check:
        taken = sorted(player.ask("latency", calls, max(3, calls // 10)))
        check()
    return 1e3 * statistics.median(taken), 1e3 * taken[min(len(taken) - 1, math.ceil(len(taken) * 0.99) - 1)]


def limits(player: Player, calls: int) -> dict[str, float]:
    """p50 in milliseconds of a GET and of a PUB/SUB ping-pong."""
    player.stage.clear()
    said = run([player.python, PEERS / "limits.py", calls], CLIENT, player.environment())
    return {name: 1e3 * seconds for name, seconds in json.loads(said).items()}


def naps(player: Player, options: str, width: int, requests: int = 1000, nap: float = 0.1) -> dict[str, float]:
    """Requests that sleep, on one worker: seconds, as multiples of the ideal.

    ``drain``: all are queued, then the worker starts; from the first start to the last completion. ``client``: from the
    submit to an idle worker to the last result in the client's hands.
    """
    stage, ideal = player.stage, math.ceil(requests / width) * nap
    stage.clear()
    with RequestManager(stage.server.url, allow_volatile=True) as manager:
        keys = [status.key for status in manager.submit_many(f"/nap/{n}" for n in range(requests))]
        with player.worker(BENCH_OPTIONS=options) as check:
            player.wait_for(lambda: stage.count() > 0, check, START, "a request was")
            manager.wait(keys, timeout=CLIENT)
            ends = [int(event.id.partition("-")[0]) for event in manager.events("0", 0) if event.verb == "complete"]
            if len(ends) != requests:
                raise Failed(f"of {requests} requests only {len(ends)} were completed within {CLIENT:g} s")
            first = stage.times()[0] + time.time() - time.monotonic()
            began = time.monotonic()
            more = [status.key for status in manager.submit_many(f"/nap/more/{n}" for n in range(requests))]
            late = [status.key for status in manager.wait(more, timeout=CLIENT) if status.state != "completed"]
            client = time.monotonic() - began
            if late:
                raise Failed(f"{len(late)} of {requests} requests did not complete within {CLIENT:g} s")
    return {"drain": (max(ends) / 1e3 - first) / ideal, "client": client / ideal}


# -- the run


@dataclass(slots=True)
class Report:
    server: str
    jobs: int
    calls: int
    machine: str = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    versions: dict[str, str] = field(default_factory=dict)
    limits: list[dict[str, float]] = field(default_factory=list)
    rounds: list[dict[str, Measured]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    naps: list[dict[str, float]] = field(default_factory=list)
    floods: list[float] = field(default_factory=list)

    def middle(self, name: str, figure: str) -> float:
        return median(getattr(one[name], figure) for one in self.rounds if name in one)

    def ratio(self, figure: str, others: Sequence[str], best: Callable[[Iterator[float]], float] = max) -> float:
        """rqarm's figure through the best one of the others, the median over the rounds."""
        ratios = []
        for one in self.rounds:
            present = [name for name in others if name in one and name != "rqarm"]
            if "rqarm" in one and present:
                ratios.append(getattr(one["rqarm"], figure) / best(getattr(one[name], figure) for name in present))
        return median(iter(ratios))


def median(numbers: Iterator[float]) -> float:
    real = [number for number in numbers if not math.isnan(number)]
    return statistics.median(real) if real else math.nan


def compete(stage: Stage, options: argparse.Namespace, report: Report) -> None:
    say = functools.partial(print, file=sys.stderr, flush=True)
    ours = Player(CONTENDERS[0], Path(sys.executable), stage)
    players = []
    for contender in CONTENDERS:
        if contender.name not in options.only:
            continue
        try:
            python = python_of(contender, options.venvs)
            report.versions[contender.name] = version_of(contender, python)
            players.append(Player(contender, python, stage))
        except Failed as failed:
            report.failed[contender.name] = str(failed)
    for number in range(options.rounds):
        report.limits.append(limits(ours, max(100, options.calls)))
        report.rounds.append({})
        for player in players:
            name = player.contender.name
            if name in report.failed:
                continue
            say(f"round {number + 1} of {options.rounds}: {name}", end="")
            try:
                # the latency first: what a server keeps for ever, such as scripts, is then no part of the bytes
                p50, p99 = latency(player, options.calls)
                measured = throughput(player, options.jobs, options.seconds)
                measured.p50, measured.p99 = p50, p99
                report.rounds[-1][name] = measured
                say(f" {measured.jobs_s:.0f} jobs/s, {measured.p50:.2f} ms")
            except Failed as failed:
                report.failed[name] = f"round {number + 1}: {failed}"
                say(f" {failed}")
        if "rqarm" in options.only and "rqarm, at once" not in report.failed:
            try:
                report.floods.append(flood(ours, options.jobs, CLIENT))
            except Failed as failed:
                report.failed["rqarm, at once"] = str(failed)
        if options.naps and "rqarm --async" not in report.failed:
            try:
                report.naps.append(naps(ours, f"--concurrency {options.concurrency}", options.concurrency))
            except Failed as failed:
                report.failed["rqarm --async"] = str(failed)


def show(report: Report) -> None:
    rounds = f"{len(report.rounds)} rounds, {report.jobs} jobs, {report.calls} submits for the latency"
    print(f"{report.server}; {report.machine}\nmedians of {rounds}\n")
    head = ("jobs/s", "p50 ms", "p99 ms", "commands", "trips", "pending B", "finished B")
    print(f"{'':<13}{'version':<10}" + "".join(f"{title:>11}" for title in head))
    for name, version in report.versions.items():
        if not any(name in one for one in report.rounds):
            continue
        row = [report.middle(name, figure) for figure in ("jobs_s", "p50", "p99", "commands", "trips")]
        row += [report.middle(name, figure) for figure in ("pending_bytes", "finished_bytes")]
        shown = (f"{value:>11.{digits}f}" for value, digits in zip(row, (0, 2, 2, 1, 2, 0, 0), strict=True))
        print(f"{name:<13}{version:<10}" + "".join(shown))
    for name, title in (("get", "a GET"), ("ping_pong", "PUB/SUB there and back")):
        print(f"the limit: {title}, p50 {median(one[name] for one in report.limits):.3f} ms")
    played = [name for name in report.versions if any(name in one for one in report.rounds)]
    peers = [name for name in played if name != "rqarm"]
    if "rqarm" in played and peers:
        print(f"\n{'rqarm against':<24}{'jobs/s':>10}{'p50':>10}")
        for name in peers:
            print(f"{name:<24}{report.ratio('jobs_s', [name]):>10.2f}{report.ratio('p50', [name]):>10.2f}")
        best = report.ratio("jobs_s", peers), report.ratio("p50", peers, min)
        print(f"{'the best in each round':<24}{best[0]:>10.2f}{best[1]:>10.2f}")
        print(
            "aims: 50 times rq's jobs/s, more than the best; 0.8 of the best p50; at most 1 trip, 1200 B pending, "
            "1000 B finished"
        )
    if report.floods:
        print(f"rqarm, {report.jobs} jobs at once for an idle worker: {median(iter(report.floods)):.0f} jobs/s")
    if report.naps:
        for name, title in (("drain", "start to end"), ("client", "submit to result")):
            times = median(one[name] for one in report.naps)
            print(f"1000 requests that sleep 100 ms, {title}: {times:.2f} times the ideal (aim 1.3)")
    if report.failed:
        print("\nnot measured, or not to the end:")
        for name, reason in report.failed.items():
            print(f"{name:<15} {reason}")


def server_binary(name: str | None) -> str | None:
    """``redis``: the redis-server on PATH; a path; None = the embedded Valkey."""
    if name in (None, "valkey"):
        return None
    found = shutil.which("redis-server" if name == "redis" else name)
    if found is None:
        raise SystemExit(f"--server {name}: no such program")
    return found


def arguments() -> argparse.Namespace:
    names = [contender.name for contender in CONTENDERS]
    place = Path(tempfile.gettempdir()) / f"rqarm-benchmark-{os.getuid()}"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=names, help=f"some of {','.join(names)}")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--jobs", type=int, help="queued for each throughput")
    parser.add_argument("--calls", type=int, help="submits for each latency")
    parser.add_argument("--seconds", type=float, help="longest time of a throughput")
    parser.add_argument("--quick", action="store_true", help="one small round: does it work?")
    parser.add_argument("--async", dest="naps", action="store_true", help="also 1000 async requests that sleep 100 ms")
    parser.add_argument("--concurrency", type=int, default=200, help="of the worker for --async")
    parser.add_argument("--server", help="valkey (the embedded one, default), redis, or a program")
    parser.add_argument("--venvs", type=Path, default=place, help="where the environments are kept: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every round")
    options = parser.parse_args()
    if unknown := set(options.only) - set(names):
        parser.error(f"--only: no such contender: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    small = {"rounds": 1, "jobs": 200, "calls": 20, "seconds": 3.0}
    usual = {"rounds": 5, "jobs": 5000, "calls": 300, "seconds": 5.0}
    for name, value in (small if options.quick else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = arguments()
    with (
        tempfile.TemporaryDirectory(prefix="rqarm-") as place,
        embedded.private(Path(place), binary=server_binary(options.server)) as server,
        redis.Redis(unix_socket_path=str(server.socket)) as client,
    ):
        info = client.info("server")
        name = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"
        report = Report(name, options.jobs, options.calls)
        compete(Stage(server, client, Path(place)), options, report)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=1) + "\n")


if __name__ == "__main__":
    main()
