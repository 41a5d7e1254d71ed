"""`rqarm worker -n N`: real processes, killed, stopped and misconfigured."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
import servers
from commands import Command, children, command, family, finished
from servers import eventually
from workers import APP, PATIENCE, TESTS, is_alive

from rqarm import RequestManager, State, embedded
from rqarm.cli.worker import arguments, worker
from rqarm.worker.supervisor import Backoff

HANDLERS = ("--handlers", str(APP))


@pytest.fixture
def rm(home: embedded.PrivateServer) -> Iterator[RequestManager]:
    with RequestManager(home.url, allow_volatile=True, lease=2.0) as manager:
        manager.connection.flushall()
        yield manager


@contextmanager
def supervised(rm: RequestManager, directory: Path, *options: str, count: int = 2) -> Iterator[Command]:
    """A supervisor, once its workers listen."""
    arguments = ("-n", str(count), "--name", "me", *(options or HANDLERS))
    with command(str(rm.settings.url), directory, *arguments, RQARM_LEASE="2") as running:
        eventually(lambda: listening(rm, running) == count, PATIENCE, "all workers listen")
        yield running


def listening(rm: RequestManager, running: Command) -> int:
    """How many workers RQ knows that are live children of the supervisor."""
    live = running.children()
    pids = [rm.connection.hget(name, "pid") for name in rm.connection.smembers("rq:workers")]
    return sum(pid is not None and int(pid) in live for pid in pids)


def note(directory: Path, name: str) -> str:
    path = directory / "notes" / name
    eventually(path.exists, PATIENCE, f"a handler notes {name}")
    return path.read_text()


def let_go(directory: Path, name: str) -> None:
    (directory / "notes" / f"go-{name}").touch()


def ended(pids: list[int]) -> bool:
    return not any(is_alive(pid) for pid in pids)


# -- the dead


def test_a_killed_worker_is_replaced_under_its_name_and_nothing_is_lost(rm: RequestManager, tmp_path: Path) -> None:
    with supervised(rm, tmp_path) as running:
        before = running.children()
        key = rm.submit("/turn/a").key
        note(tmp_path, "running-a-1")
        name = str(rm.status(key).worker)
        killed = int(rm.connection.hget(f"rq:worker:{name}", "pid"))
        everyone = [killed, *family(killed)]
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: ended(everyone), 5, "the horse and the scheduler died with their worker")
        eventually(lambda: listening(rm, running) == 2, PATIENCE, "another one listens")
        (new,) = set(running.children()) - set(before)
        assert int(rm.connection.hget(f"rq:worker:{name}", "pid")) == new
        let_go(tmp_path, "a-2")
        assert rm.result(key, timeout=20) == 2
        (other,) = set(before) - {killed}
        os.kill(other, signal.SIGSTOP)
        try:
            assert rm.get("/add/1/2", timeout=20) == 3, "the new one works"
        finally:
            os.kill(other, signal.SIGCONT)
    assert f"{name} was killed by SIGKILL, starting it again in 0." in running.said


def test_the_supervisor_is_killed_and_everything_goes_with_it(rm: RequestManager, tmp_path: Path) -> None:
    with supervised(rm, tmp_path) as running:
        rm.submit("/wait/b")
        note(tmp_path, "running-b")
        everyone = eventually(
            lambda: len(found := family(running.pid)) >= 4 and found, 20, "2 workers, scheduler, horse"
        )
        running.signal(signal.SIGKILL)
        running.process.wait()
        eventually(lambda: ended(everyone), 5, "workers, horses and schedulers are gone")


# -- shutdown


@pytest.mark.parametrize(
    ("number", "again"), [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)], ids=["TERM", "INT"]
)
def test_a_signal_lets_the_workers_finish(
    rm: RequestManager, tmp_path: Path, number: signal.Signals, again: signal.Signals
) -> None:
    with supervised(rm, tmp_path) as running:
        keys = [rm.submit(f"/wait/{name}").key for name in "ab"]
        waiting = rm.submit("/add/1/2").key
        note(tmp_path, "running-a")
        note(tmp_path, "running-b")
        pids = running.children()
        running.signal(number)
        running.signal(again)  # at once: it counts as the same one
        eventually(lambda: "the workers end after the requests in hand" in running.said)
        for name in "ab":
            let_go(tmp_path, name)
        assert running.wait() == 0
        assert ended(pids)
    assert [rm.status(key).state for key in keys] == [State.COMPLETED] * 2
    assert [rm.status(key).attempts for key in keys] == [1, 1]
    assert rm.status(waiting).state is State.PENDING
    assert "all 2 workers have ended" in running.said
    assert "hand back what they run" not in running.said


def test_a_second_signal_hands_the_requests_back(rm: RequestManager, tmp_path: Path) -> None:
    with supervised(rm, tmp_path) as running:
        key = rm.submit("/wait/a").key
        note(tmp_path, "running-a")
        running.signal(signal.SIGTERM)
        eventually(lambda: "the workers end after" in running.said)
        began = time.monotonic()
        eventually(lambda: time.monotonic() - began > 1.1, what="it is not the same signal")
        running.signal(signal.SIGTERM)
        assert running.wait() == 0
        status = rm.status(key)
        assert status.state is State.PENDING
        assert rm.connection.hget(f"arm:status:{key}", "crashes") in (None, b"0")


def test_ctrl_c_in_a_terminal_reaches_the_workers_once(rm: RequestManager, tmp_path: Path) -> None:
    """The terminal sends it to the whole group of the supervisor."""
    with supervised(rm, tmp_path) as running:
        key = rm.submit("/wait/a").key
        note(tmp_path, "running-a")
        group = os.getpgid(running.pid)
        assert group not in {os.getpgid(pid) for pid in family(running.pid)}
        os.killpg(group, signal.SIGINT)
        eventually(lambda: "SIGINT: the workers end after" in running.said)
        let_go(tmp_path, "a")
        assert running.wait() == 0
        assert rm.status(key).state is State.COMPLETED


# -- a wrong configuration


def test_handlers_that_cannot_be_loaded_end_it_at_once_and_are_told_once(home: Any, tmp_path: Path) -> None:
    done = finished(home.url, tmp_path, "-n", "4", "--handlers", "no_such_module")
    assert done.process.returncode == 2
    assert done.said.count("cannot import 'no_such_module'") == 1
    assert done.said.count(" started, process ") == 1


def test_no_server_ends_it_with_the_code_of_one_worker(tmp_path: Path) -> None:
    with servers.short_directory() as nowhere:
        done = finished(f"unix://{nowhere}/none", tmp_path, "-n", "2", *HANDLERS)
    assert done.process.returncode == 4


def test_a_configuration_that_turns_bad_ends_all(rm: RequestManager, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(APP.read_text())
    with supervised(rm, tmp_path, "--handlers", str(mine)) as running:
        key = rm.submit("/wait/a").key
        note(tmp_path, "running-a")
        busy = int(rm.connection.hget(f"rq:worker:{rm.status(key).worker}", "pid"))
        (idle,) = set(running.children()) - {busy}
        mine.write_text("import no_such_module")
        os.kill(idle, signal.SIGKILL)
        eventually(lambda: "nothing is started again" in running.said, PATIENCE)
        let_go(tmp_path, "a")
        assert running.wait() == 2
        assert rm.status(key).state is State.COMPLETED, "the other one was let finish"
    assert running.said.count("No module named 'no_such_module'") == 1


# -- burst


def test_a_burst_ends_when_all_have_ended(rm: RequestManager, tmp_path: Path) -> None:
    keys = [status.key for status in rm.submit_many([f"/add/{n}/1" for n in range(20)])]
    done = finished(str(rm.settings.url), tmp_path, "-n", "2", "--burst", *HANDLERS)
    assert done.process.returncode == 0
    assert [rm.status(key).state for key in keys] == [State.COMPLETED] * 20
    assert done.said.count(" started, process ") == 2


def test_a_worker_that_is_killed_in_a_burst_is_replaced(rm: RequestManager, tmp_path: Path) -> None:
    key = rm.submit("/turn/a").key
    rest = [rm.submit(f"/add/{n}/1").key for n in range(3)]
    options = ("-n", "1", "--burst", "--name", "me", *HANDLERS)
    with command(str(rm.settings.url), tmp_path, *options, RQARM_LEASE="2") as running:
        note(tmp_path, "running-a-1")
        (child,) = running.children()
        os.kill(child, signal.SIGKILL)
        assert running.wait() == 0
    assert [rm.status(each).state for each in rest] == [State.COMPLETED] * 3
    assert rm.status(key).state is not State.FAILED, "its lease has to lapse first"


# -- the pauses

CHILD = """
import os, pathlib, signal, sys, time
with open(pathlib.Path(sys.argv[1]) / "starts", "a") as starts:
    starts.write(f"{time.monotonic()}\\n")
"""
READY = """
os.write(int(sys.argv[sys.argv.index("--ready") + 1]), b"+")
"""
PARENT = """
import logging, sys
from rqarm.worker import supervisor
logging.basicConfig(level=logging.INFO)
supervisor.COLD = supervisor.INSIST = 0.3
backoff = supervisor.Backoff(first=0.1, longest=0.4, reset=float(sys.argv[3]))
command = [sys.executable, sys.argv[1], sys.argv[2]]
sys.exit(supervisor.Supervisor(command, 1, backoff=backoff, patience=0.2).run())
"""


@contextmanager
def parent(directory: Path, child: str, reset: float = 60.0) -> Iterator[subprocess.Popen[str]]:
    """A supervisor of one child that is no worker."""
    script, log = directory / "child.py", directory / "log"
    script.write_text(CHILD + child)
    with log.open("w") as written:
        running = subprocess.Popen(
            embedded._leashed([sys.executable, "-c", PARENT, str(script), str(directory), str(reset)]),
            env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
            stderr=written,
            text=True,
        )
    try:
        yield running
    finally:
        running.kill()
        running.wait()
        print(log.read_text())


def starts(directory: Path) -> list[float]:
    path = directory / "starts"
    return [float(line) for line in path.read_text().split()] if path.exists() else []


def test_who_dies_at_once_is_started_again_ever_more_slowly(tmp_path: Path) -> None:
    with parent(tmp_path, READY + "sys.exit(1)") as running:
        moments = eventually(lambda: len(found := starts(tmp_path)) >= 6 and found, 20)
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == 0
    pauses = [after - before for before, after in itertools.pairwise(moments)]
    assert all(pause >= least for pause, least in zip(pauses, [0.05, 0.1, 0.2, 0.2, 0.2], strict=False)), pauses


def test_who_has_lived_for_a_while_is_started_again_as_after_its_first_death(tmp_path: Path) -> None:
    with parent(tmp_path, READY + "time.sleep(0.2); sys.exit(1)", reset=0.1):
        eventually(lambda: len(starts(tmp_path)) >= 5, 20)
    said = (tmp_path / "log").read_text()
    assert said.count("starting it again in 0.1 s") == said.count("starting it again")


def test_who_does_not_end_is_killed(tmp_path: Path) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" + READY + "time.sleep(60)"
    with parent(tmp_path, deaf) as running:
        (child,) = eventually(lambda: starts(tmp_path) and children(running.pid), 20)
        eventually(lambda: "SIGTERM" in ignored(child), 10, "the child is deaf")
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == 1
        assert not is_alive(child)


def ignored(pid: int) -> set[str]:
    (mask,) = (line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigIgn" in line)
    return {number.name for number in signal.Signals if int(mask, 16) >> (number - 1) & 1}


def test_the_pause_doubles_up_to_a_limit_and_varies_by_half() -> None:
    backoff = Backoff(first=0.5, longest=30)
    most = [backoff.pause(deaths, lambda: 1.0) for deaths in range(1, 9)]
    assert most == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert [backoff.pause(deaths, lambda: 0.0) for deaths in range(1, 9)] == [pause / 2 for pause in most]
    assert backoff.pause(10_000, lambda: 1.0) == 30


# -- the command line of a child


def test_the_children_get_every_option_but_those_that_are_the_supervisors() -> None:
    given = ["-u", "redis://:secret@h", "-n", "3", "--name", "me", "--handlers", "a:b", "--handlers", "c d:e", "-vv"]
    given += ["--no-scheduler", "--burst", "--max-jobs=7", "-q", "one", "two", "--log-format", "json"]
    given += ["--allow-function", "m.f"]
    context = worker.make_context("worker", list(given), obj=None, parent=click.Context(click.Group()))
    again = list(arguments(context, without=("workers", "name", "names")))
    expected = "--handlers a:b --handlers c_d:e --queue one --burst --max-jobs 7 --no-scheduler --allow-function m.f"
    expected += " --log-format json --verbose --verbose"
    assert again == [word.replace("_", " ") for word in expected.split()]
    repeated = worker.make_context("worker", [*again], parent=click.Context(click.Group()))
    mine = {name: value for name, value in context.params.items() if name not in ("workers", "name", "names")}
    assert {name: repeated.params[name] for name in mine} == mine
