"""Real workers: RQ's own classes and rqarm.Worker, and what becomes of requests when a horse or a worker dies."""

from __future__ import annotations

import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import app
import pytest
import redis
import rq
import servers
from audit import audit
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError
from rq.command import send_kill_horse_command, send_stop_job_command
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend
from servers import connections, eventually
from workers import CLASSES, LEASE, TESTS, Crew, burst, crew, is_alive, timed

from rqarm import (
    BatchRequest,
    ConfigError,
    Handlers,
    Quarantined,
    RequestFailed,
    RequestManager,
    Result,
    State,
    Worker,
    connect,
    embedded,
)
from rqarm.calls import Call
from rqarm.rqjobs import PERFORM
from rqarm.shell import Shell
from rqarm.worker import equipment, rqworker, use_handlers
from rqarm.worker.equipment import Equipment

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # RQ forks beside its pub/sub thread


@pytest.fixture(scope="module")
def staff(home: embedded.PrivateServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """One rqarm.Worker that all tests share which must not harm it."""
    with crew(home.url, tmp_path_factory.mktemp("staff"), max_attempts=2) as staff:
        staff.hire()
        yield staff


@pytest.fixture
def team(staff: Crew, request: pytest.FixtureRequest) -> Iterator[Crew]:
    """The shared worker, which must be the same process afterwards and still work. Its log is shown on failure."""
    (worker,) = staff.workers
    yield staff
    print(worker.said())
    assert worker.lives
    number = abs(hash(request.node.nodeid)) % 10**9
    assert staff.rm.get(f"/add/{number}/1", timeout=20) == number + 1


@pytest.mark.parametrize("kind", CLASSES)
def test_every_worker_class_runs_a_mix(home: embedded.PrivateServer, tmp_path: Any, kind: str) -> None:
    with crew(home.url, tmp_path) as hired:
        hired.hire(kind)
        rm = hired.rm
        for status in rm.submit_many(["/add/1/2", "/async/3", "/stream/5/300000", "/file", "/fail/1"]):
            assert status.outcome == "new"
        assert rm.get("/add/1/2", timeout=20) == 3
        assert rm.get("/async/3", timeout=20) == {"n": 3}
        assert len(rm.get("/stream/5/300000", timeout=20)) == 1_500_000
        assert rm.get("/file", timeout=20) == Result(b"a,b\n1,2\n", content_type="text/csv", filename="report.csv")
        (failed,) = hired.settle(BatchRequest("/fail/1").key)
        assert (failed.state, failed.attempts) == (State.FAILED, 2)
        assert rm.cache.stats().in_progress == 0


def test_other_jobs_on_the_queue_run_as_under_rq(team: Crew) -> None:
    queue = rq.Queue(team.name, connection=team.rm.connection, serializer=JSONSerializer)
    good, bad, dead = (queue.enqueue(f) for f in ("app.plain_pid", "app.plain", "app.plain_kill"))
    eventually(lambda: dead.get_status(refresh=True) is JobStatus.FAILED)
    assert good.return_value(refresh=True) != team.workers[0].pid
    assert bad.get_status(refresh=True) is JobStatus.FAILED
    assert "missing 1 required positional argument" in bad.latest_result().exc_string
    assert "signal 9" in dead.latest_result().exc_string


@pytest.mark.parametrize("kind", ["rq.worker.Worker", "rqarm.Worker"])
def test_a_limit_holds_across_workers_in_the_order_of_the_line(
    home: embedded.PrivateServer, tmp_path: Any, kind: str
) -> None:
    """Three workers and two places: the third parks what comes, and runs what has no limit meanwhile."""
    with servers.throwaway(home.binary) as server, crew(server.url, tmp_path) as hired:
        for worker in [hired.start(kind) for _ in range(3)]:
            hired.wait_for(worker)
        rm, names = hired.rm, [str(n) for n in range(12)]
        keys = []
        for name in names:
            keys.append(rm.submit(f"/limited/{name}").key)
            if name in names[:2]:
                hired.running(name)
        parked = f"{hired.name}:parked:/limited/{{name}}"
        eventually(lambda: rm.connection.zcard(parked) == 10, 20, "all others are parked")
        assert rm.get("/add/1/2", timeout=20) == 3
        assert rm.submit("/limited/11").outcome == "joined"
        for name, next_name in zip(names, [*names[2:], "", ""], strict=True):
            hired.let_go(name)
            if next_name:
                hired.running(next_name)
        for status in hired.settle(*keys):
            assert (status.state, status.attempts) == (State.COMPLETED, 1)
        marks = (hired.directory / "notes" / "limited").read_text().split()
        assert [mark[1:] for mark in marks if mark[0] == "+"] == names
        running = list(itertools.accumulate(1 if mark[0] == "+" else -1 for mark in marks))
        assert max(running) == 2
        audit(rm.connection, rm.core.keys)


# -- a horse dies


def test_a_killed_horse_is_noticed_at_once_and_its_request_runs_again(team: Crew) -> None:
    key = team.rm.submit("/wait/killed").key
    horse = team.running("killed")
    os.kill(horse, signal.SIGKILL)
    status = team.reaches(key, State.PENDING, timeout=3)
    assert status.error is not None
    assert "killed by SIGKILL" in status.error["message"]
    team.let_go("killed")
    assert team.rm.result(key, timeout=20) == "killed 2"
    assert team.field(key, "crashes") == b"1"


def test_each_death_is_named_and_the_last_one_quarantines(team: Crew) -> None:
    deaths = {"/kill/named": "killed by SIGKILL", "/exit/0": "exit code 0", "/exit/3": "exited with code 3"}
    keys = [status.key for status in team.rm.submit_many(deaths)]
    for status, text in zip(team.settle(*keys), deaths.values(), strict=True):
        assert (status.state, status.quarantined, status.attempts) == (State.FAILED, True, 2)
        assert status.error is not None
        assert text in status.error["message"]
        with pytest.raises(Quarantined, match=text):
            team.rm.result(status.key)
        assert team.rm.submit(status.uri).outcome == "negative"
    assert (team.directory / "notes" / "kills-named").read_text() == "xx"


def test_a_horse_killed_by_rqs_command_is_a_crash(team: Crew) -> None:
    key = team.rm.submit("/wait/commanded").key
    team.running("commanded")
    send_kill_horse_command(team.rm.connection, team.workers[0].name)
    team.reaches(key, State.PENDING, timeout=3)
    team.let_go("commanded")
    assert team.rm.result(key, timeout=20) == "commanded 2"


def test_sys_exit_is_an_error_not_a_crash(team: Crew) -> None:
    with pytest.raises(RequestFailed, match="SystemExit: 3"):
        team.rm.get("/sys_exit/3", timeout=20)
    assert team.rm.status(BatchRequest("/sys_exit/3").key).reason == "exhausted"


def test_a_handler_that_hears_nothing_is_killed_at_its_limit(team: Crew) -> None:
    key = team.rm.submit("/deaf/one").key
    horse = team.running("one")
    (status,) = team.settle(key)
    assert (status.state, status.attempts, status.reason) == (State.FAILED, 1, "exhausted")
    assert status.error is not None
    assert status.error["type"].endswith("TimeLimit")
    assert "limit of 1 s" in status.error["message"]
    assert not is_alive(horse)


def test_a_handler_that_is_slow_fails_by_its_own_alarm(team: Crew) -> None:
    with pytest.raises(RequestFailed, match=r"TimeLimit.*0\.2 s"):
        team.rm.get("/slow/one", timeout=4)


def test_what_a_handler_leaves_running_is_killed_with_its_horse(team: Crew) -> None:
    child = team.rm.get("/family/one", timeout=20)
    assert is_alive(child)
    os.kill(team.rm.get("/pid/family", timeout=20), signal.SIGKILL)
    eventually(lambda: not is_alive(child))


def test_memory_that_runs_out_is_an_error_of_the_handler(team: Crew) -> None:
    with pytest.raises(RequestFailed, match="MemoryError"):
        team.rm.get("/memory/4096", timeout=20)


# -- somebody wants it stopped


def test_a_cancelled_request_stops_its_horse(team: Crew) -> None:
    key = team.rm.submit("/wait/cancelled").key
    horse = team.running("cancelled")
    assert team.rm.cancel(key) is True
    assert timed(lambda: eventually(lambda: not is_alive(horse))) < 5
    assert team.rm.status(key).state is State.CANCELLED


def test_what_runs_for_longer_than_a_moment_is_shown_by_rqs_tools(team: Crew) -> None:
    (worker,) = team.workers

    def count() -> int:
        return int(team.rm.connection.hget(f"rq:worker:{worker.name}", "successful_job_count") or 0)

    before = count()
    key = team.rm.submit("/wait/seen").key
    job = team.shown(key)
    assert job.get_status() is JobStatus.STARTED
    assert job.id in job.started_job_registry.get_job_ids()
    assert team.state_of(worker) == b"busy"
    (listed,) = rq.Worker.all(queue=rq.Queue(team.name, connection=team.rm.connection, serializer=JSONSerializer))
    assert listed.get_current_job_id() == job.id
    team.let_go("seen")
    assert team.rm.result(key, timeout=20) == "seen 1"
    eventually(lambda: team.state_of(worker) == b"idle")
    assert job.started_job_registry.get_job_ids() == []
    assert not team.rm.connection.exists(job.key)
    assert team.rm.connection.keys("rq:execution*") == []
    eventually(lambda: count() > before)


def test_rqs_stop_command_cancels_the_request(team: Crew) -> None:
    key = team.rm.submit("/wait/stopped").key
    horse = team.running("stopped")
    job = team.shown(key)
    send_stop_job_command(team.rm.connection, job.id, serializer=JSONSerializer)
    status = team.reaches(key, State.CANCELLED)
    assert (status.attempts, is_alive(horse)) == (1, False)
    eventually(lambda: job.get_status(refresh=True) is JobStatus.STOPPED)


def test_a_suspended_worker_takes_nothing_until_it_is_resumed(home: embedded.PrivateServer, tmp_path: Any) -> None:
    with servers.throwaway(home.binary) as server, crew(server.url, tmp_path) as hired:
        worker = hired.hire()
        rm = hired.rm
        running = rm.submit("/wait/suspended").key
        hired.running("suspended")
        suspend(rm.connection)
        waiting = rm.submit("/add/1/2").key
        hired.let_go("suspended")
        eventually(lambda: hired.state_of(worker) == b"suspended")
        assert [rm.status(key).state for key in (running, waiting)] == [State.COMPLETED, State.PENDING]
        resume(rm.connection)
        assert rm.result(waiting, timeout=20) == 3


# -- deploys


def test_a_warm_shutdown_finishes_the_running_request(home: embedded.PrivateServer, tmp_path: Any) -> None:
    with crew(home.url, tmp_path) as hired:
        worker = hired.hire()
        running, waiting = hired.rm.submit_many(["/wait/warm", "/add/1/2"])
        hired.running("warm")
        worker.signal(signal.SIGTERM)
        eventually(lambda: "warm shut down requested" in worker.said())
        hired.let_go("warm")
        assert worker.wait() == 0
        assert hired.rm.result(running.key) == "warm 1"
        assert hired.rm.status(waiting.key).state is State.PENDING


def test_a_cold_shutdown_hands_the_running_request_back(home: embedded.PrivateServer, tmp_path: Any) -> None:
    with crew(home.url, tmp_path) as hired:
        worker = hired.hire()
        running, waiting = hired.rm.submit_many(["/wait/cold", "/add/1/2"])
        horse = hired.running("cold")
        worker.signal(signal.SIGTERM)
        first = time.monotonic()
        eventually(lambda: time.monotonic() - first > 1.1)  # RQ takes no notice of a second one within a second
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert not is_alive(horse)
        status = hired.rm.full_status(running.key)
        assert (status.state, status.position, status.attempts, status.error) == (State.PENDING, 1, 0, None)
        assert hired.field(running.key, "crashes") is None
        hired.let_go("cold")
        hired.hire()
        assert hired.rm.result(running.key, timeout=20) == "cold 1"
        assert hired.rm.result(waiting.key, timeout=20) == 3


def test_a_worker_whose_handlers_cannot_be_loaded_does_not_start(home: embedded.PrivateServer, tmp_path: Any) -> None:
    with crew(home.url, tmp_path) as hired:
        key = hired.rm.submit("/add/1/2").key
        worker = hired.start(handlers="no_such_module:handlers")
        assert worker.wait() != 0
        assert "no_such_module" in worker.said()
        assert (hired.rm.status(key).state, hired.rm.status(key).attempts) == (State.PENDING, 0)


# -- leases and time


def test_a_request_that_runs_for_several_leases_runs_once(team: Crew) -> None:
    key = team.rm.submit("/wait/long").key
    team.running("long")
    began = eventually(lambda: team.rm.status(key).started)
    eventually(lambda: _now(team) - began.timestamp() > 2 * LEASE)
    assert team.rm.queues.sweep() == 0
    team.let_go("long")
    assert team.rm.result(key, timeout=20) == "long 1"


def _now(team: Crew) -> float:
    return float(team.rm.connection.time()[0])


def test_a_horse_that_is_busy_with_rqs_records_is_left_in_peace(team: Crew) -> None:
    """The attempt has ended, the horse not yet."""
    horse = team.rm.get("/pid/epilogue", timeout=20)
    key = team.rm.submit("/epilogue/1.4").key
    (status,) = team.settle(key)
    assert status.state is State.FAILED
    job = team.job(key)
    eventually(lambda: job.get_status(refresh=True) is JobStatus.FAILED)
    assert "an epilogue" in job.latest_result().exc_string
    assert team.rm.get("/pid/after-epilogue", timeout=20) == horse


def test_a_delayed_retry_comes_with_rqs_scheduler(home: embedded.PrivateServer, tmp_path: Any) -> None:
    with crew(home.url, tmp_path, lease=30) as hired:  # no sweep comes before it
        hired.hire("rqarm.Worker", "--with-scheduler")
        assert hired.rm.get("/later/one", timeout=15) == 2


def test_a_delayed_retry_comes_without_a_scheduler_too(team: Crew) -> None:
    assert team.rm.get("/later/two", timeout=20) == 2


# -- bad jobs


def test_a_job_that_cannot_be_read_does_not_end_the_worker(team: Crew) -> None:
    client = team.rm.connection
    pickled = rq.Queue(team.name, connection=client).enqueue(app.plain, 1)
    odd = rq.Queue(team.name, connection=client, serializer=JSONSerializer)
    jobs = [odd.enqueue(PERFORM), odd.enqueue(PERFORM, 1, 2), odd.enqueue(PERFORM, "a b", "c"), odd.enqueue("no.such")]
    for job in [pickled, *jobs]:
        eventually(lambda job=job: job.get_status(refresh=True) is JobStatus.FAILED)


def test_foreign_data_under_our_keys_or_rqs_does_not_end_the_worker(team: Crew) -> None:
    client = team.rm.connection
    status = team.rm.submit("/wait/foreign")
    team.running("foreign")
    foreign, flat = team.rm.submit_many(["/add/7/1", "/add/7/2"])
    job, flat_job = team.job(foreign.key), team.job(flat.key)
    client.set(f"{team.name}:status:{foreign.key}", "somebody else's")
    client.set(flat_job.key, "somebody else's")
    team.let_go("foreign")
    eventually(lambda: job.get_status(refresh=True) is JobStatus.FAILED)
    assert "holds data that rqarm did not write" in job.latest_result().exc_string
    client.delete(f"{team.name}:status:{foreign.key}", flat_job.key)  # until then no sweep comes past them
    assert team.rm.result(status.key) == "foreign 1"
    assert team.rm.result(flat.key, timeout=20) == 9, "the ticket is gone, the request is not"


# -- in this process: what cannot be timed from outside


@pytest.fixture
def rm(redis_client: redis.Redis, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[RequestManager]:
    """A manager whose requests an rqarm.Worker of this process runs, in horses."""
    monkeypatch.setattr(equipment, "_equipment", Equipment())
    monkeypatch.setattr(rqworker, "pause_after", lambda _: 0.05)
    monkeypatch.setattr(rqworker, "DEAF", 0.05)
    monkeypatch.setenv("RQARM_LEASE", "1.5")
    handlers = Handlers()
    handlers.route("/add/{a:int}/{b:int}")(app.add.function)
    handlers.route("/die")(lambda request, context: os._exit(7))
    use_handlers(handlers)
    with RequestManager(url, lease=1.5, allow_volatile=True) as manager:
        yield manager


def refuse(monkeypatch: pytest.MonkeyPatch, verb: str, times: int) -> list[Exception]:
    """Let the server refuse the next calls of a verb; gives what is still to be refused."""
    left: list[Exception] = [ReadOnlyError("READONLY") for _ in range(times)]
    execute = Shell.execute

    def refusing(self: Shell, step: Any) -> Any:
        if left and isinstance(step, Call) and step.script.name == verb:
            raise left.pop()
        return execute(self, step)

    monkeypatch.setattr(Shell, "execute", refusing)
    return left


def work(url: str, kind: type[Worker] = Worker) -> Worker:
    with connect.open_client(url) as client:
        return burst(client, kind=kind)


@pytest.mark.parametrize("verb", ["crash"])
def test_a_refused_transition_of_the_parent_is_sent_again(
    rm: RequestManager, url: str, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    key = rm.submit("/die").key
    left = refuse(monkeypatch, verb, times=3)
    work(url)
    status = rm.status(key)
    assert (left, status.state, status.attempts) == ([], State.PENDING, 1)
    assert status.error is not None
    assert "exited with code 7" in status.error["message"]


def test_a_worker_that_ends_gives_its_connections_back(rm: RequestManager, url: str, redis_client: redis.Redis) -> None:
    key = rm.submit("/die").key
    before = connections(redis_client)
    work(url)
    assert rm.status(key).attempts == 1
    eventually(lambda: connections(redis_client) <= before)


def test_a_job_that_rq_cannot_note_goes_back_to_its_queue(rm: RequestManager, url: str) -> None:
    class Refused(Worker):
        refusals = 2

        def prepare_execution(self, job: Job) -> Any:
            execution = super().prepare_execution(job)
            if self.refusals:
                self.refusals -= 1
                raise OutOfMemoryError("OOM")
            return execution

    queue = rq.Queue("arm", connection=rm.connection, serializer=JSONSerializer)
    job = queue.enqueue("app.plain", 1)
    worker = work(url, Refused)
    assert job.return_value(refresh=True) == 2
    assert (worker.refusals, worker.executions) == (0, {})


def test_a_heartbeat_that_is_refused_does_not_end_the_worker(rm: RequestManager, url: str) -> None:
    class Refused(Worker):
        def heartbeat(self, *arguments: Any, **named: Any) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(redis.Redis, "expire", _refused)
                super().heartbeat(*arguments, **named)

    keys = [status.key for status in rm.submit_many(["/add/1/2", "/add/2/2"])]
    work(url, Refused)
    assert [rm.status(key).state for key in keys] == [State.COMPLETED] * 2


def _refused(*_: Any, **__: Any) -> None:
    raise ReadOnlyError("READONLY")


@pytest.mark.parametrize("error", [ResponseError("BUSY"), ReadOnlyError("READONLY"), redis.ConnectionError("reset")])
def test_the_listener_for_commands_outlives_a_server_that_refuses(
    rm: RequestManager, url: str, error: Exception
) -> None:
    with connect.open_client(url) as client:
        worker = Worker(["arm"], connection=client)
        worker._pubsub_exception_handler(error, None, None)
        with pytest.raises(ValueError):
            worker._pubsub_exception_handler(ValueError(), None, None)


def test_stopping_a_horse_that_is_not_there_stops_nobody(rm: RequestManager, url: str) -> None:
    with connect.open_client(url) as client:
        worker = Worker(["arm"], connection=client)
        worker.kill_horse()
        assert worker.horse_pid == 0


def test_handlers_that_cannot_be_loaded_are_an_error_of_the_operator(
    rm: RequestManager, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equipment, "_equipment", Equipment())
    monkeypatch.setenv("RQARM_HANDLERS", "no_such_module")
    with pytest.raises(ConfigError, match="no_such_module"):
        work(url)
    assert rm.connection.smembers("rq:workers") == set()


def test_a_request_leaves_nothing_behind_in_rq(rm: RequestManager, url: str) -> None:
    key = rm.submit("/add/1/2").key
    job_id = rm.connection.hget(f"arm:status:{key}", "job_id").decode()
    work(url)
    arguments = {"connection": rm.connection, "serializer": JSONSerializer}
    assert StartedJobRegistry("arm", **arguments).get_job_ids(cleanup=False) == []
    assert FailedJobRegistry("arm", **arguments).get_job_ids(cleanup=False) == []
    assert rm.connection.keys(f"rq:*{job_id}*") + rm.connection.keys("rq:execution*") == []


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare")
def test_the_first_process_of_a_container_can_be_a_worker(home: embedded.PrivateServer, tmp_path: Any) -> None:
    """A horse asks whether its parent is alive; process 1 is not a sign that it is not."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a pid namespace")
    with crew(home.url, tmp_path) as hired:
        key = hired.rm.submit("/add/1/2").key
        environment = os.environ | {f"RQARM_{name.upper()}": str(value) for name, value in hired.settings.items()}
        environment |= {"RQARM_HANDLERS": str(TESTS / "app.py"), "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
        worker = [sys.executable, "-m", "rq.cli", "worker", "-w", "rqarm.Worker", "-u", home.url, "-S", "json", "-b"]
        done = subprocess.run(
            [*unshare, *worker, hired.name], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        status = hired.rm.status(key)
        assert (status.state, status.attempts) == (State.COMPLETED, 1), done.stderr


def test_no_job_of_ours_is_pickled(team: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    key = team.rm.submit("/wait/pickled").key
    job = team.shown(key)
    assert (job.func_name, job.args) == (PERFORM, [team.name])
    team.let_go("pickled")
    assert team.rm.result(key, timeout=20) == "pickled 1"
