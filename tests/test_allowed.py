"""What `rqarm worker` refuses to run, whatever a client of Redis puts into the queue."""

from __future__ import annotations

import pickle
import socket
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import app
import forbidden
import pytest
import redis
from commands import finished
from rq import Callback, Queue, Retry, Webhook
from rq.exceptions import DeserializationError
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer, PickleSerializer
from workers import APP

from rqarm import RequestManager, embedded
from rqarm.errors import ConfigError
from rqarm.rqjobs import PERFORM
from rqarm.worker.allowed import AllowedJob, FunctionNotAllowed, job_class, worker_options

HANDLERS = ("--handlers", str(APP), "--burst", "--no-scheduler")


@pytest.fixture
def client(home: embedded.PrivateServer) -> Iterator[redis.Redis]:
    with RequestManager(home.url, allow_volatile=True) as manager:
        manager.connection.flushall()
        yield manager.connection


@pytest.fixture
def queue(client: redis.Redis) -> Queue:
    """As a plain client of RQ sees the queue."""
    return Queue("arm", connection=client, serializer=JSONSerializer)


def notes(directory: Path) -> set[str]:
    return {note.name for note in (directory / "notes").iterdir()}


def reason(job: Job) -> str:
    """Why RQ says that it has failed."""
    assert job.get_status() is JobStatus.FAILED
    assert job.id in job.failed_job_registry.get_job_ids()
    result = job.latest_result()
    assert result is not None
    assert result.exc_string is not None
    return result.exc_string.strip().splitlines()[-1]


def pickled(client: redis.Redis) -> Queue:
    return Queue("arm", connection=client, serializer=PickleSerializer)


def by_name(queue: Queue) -> Job:
    return queue.enqueue("forbidden.harm")


def of_the_system(queue: Queue) -> Job:
    return queue.enqueue("os.system", "touch notes/harmed")


def of_the_language(queue: Queue) -> Job:
    return queue.enqueue("eval", "__import__('forbidden').harm()")


def on_an_object(queue: Queue) -> Job:
    job = queue.create_job("format", args=("x",))
    job.data = JSONSerializer.dumps([PERFORM, "an object", [], {}])
    return queue.enqueue_job(job)


def in_a_pickle(queue: Queue) -> Job:
    return pickled(queue.connection).enqueue("forbidden.harm")


def by_unpickling(queue: Queue) -> Job:
    job = queue.create_job(PERFORM, args=("arm", "k"))
    job.data = pickle.dumps((PERFORM, None, (forbidden.Pickled(),), {}))
    return queue.enqueue_job(job)


def by_unpickling_what_is_beside_the_call(queue: Queue) -> Job:
    job = queue.enqueue("forbidden.harm")
    bomb = pickle.dumps(forbidden.Pickled())
    queue.connection.hset(job.key, mapping={"meta": bomb, "result": bomb})
    return job


def on_success(queue: Queue) -> Job:
    return queue.enqueue("app.plain", 1, on_success=Callback("forbidden.harm"))


def on_failure(queue: Queue) -> Job:
    return queue.enqueue("app.plain", "no number", on_failure=Callback("forbidden.harm"))


def on_stopped(queue: Queue) -> Job:
    return queue.enqueue("app.plain", 1, on_stopped=Callback("forbidden.harm"))


def of_one_of_ours(queue: Queue) -> Job:
    return queue.enqueue(PERFORM, "arm", "k" * 32, on_failure=Callback("forbidden.harm"))


def many_times(queue: Queue) -> Job:
    return queue.enqueue("forbidden.harm", retry=Retry(max=1_000_000))


def without_a_form(queue: Queue) -> Job:
    job = queue.create_job("x.y")
    job.data = b'{"not": "a call"}'
    return queue.enqueue_job(job)


def with_fields_that_cannot_be_read(queue: Queue) -> Job:
    job = queue.enqueue("forbidden.harm")
    queue.connection.hset(job.key, mapping={"timeout": b"\xff\xfe", "status": "nonsense", "created_at": "tomorrow"})
    return job


def with_dependencies_of_another_kind(queue: Queue) -> Job:
    job = queue.enqueue("app.plain", 1)
    queue.connection.hset(job.key, "dependency_ids", '{"0": 1}')
    return job


def with_intervals_of_another_kind(queue: Queue) -> Job:
    job = queue.enqueue("app.plain", "no number", retry=Retry(max=2))
    queue.connection.hset(job.key, "retry_intervals", '{"a": "b"}')
    return job


def with_times_beyond_all(queue: Queue) -> Job:
    job = queue.enqueue("app.plain", "no number")
    queue.connection.hset(job.key, mapping={"timeout": 10**30, "failure_ttl": 10**30, "result_ttl": 10**30})
    return job


ATTACKS = [
    by_name,
    of_the_system,
    of_the_language,
    on_an_object,
    in_a_pickle,
    by_unpickling,
    by_unpickling_what_is_beside_the_call,
    on_success,
    on_failure,
    on_stopped,
    of_one_of_ours,
    many_times,
    without_a_form,
    with_fields_that_cannot_be_read,
    with_dependencies_of_another_kind,
    with_intervals_of_another_kind,
    with_times_beyond_all,
]


def test_what_is_not_allowed_is_failed_with_the_reason_and_the_worker_goes_on(
    home: embedded.PrivateServer, queue: Queue, tmp_path: Path
) -> None:
    jobs = [attack(queue) for attack in ATTACKS]
    with RequestManager(home.url, allow_volatile=True) as rm:
        key = rm.submit("/add/1/2").key
        done = finished(home.url, tmp_path, *HANDLERS, "--allow-function", "app.plain")
        assert done.process.returncode == 0
        assert rm.result(key) == 3
    assert notes(tmp_path) == set(), "nothing was imported, unpickled or run"
    for attack, job in zip(ATTACKS, jobs, strict=True):
        assert "FunctionNotAllowed: RQ job" in reason(job), attack
    assert "'os.system' is not one that this worker may run; rqarm worker --allow-function NAME" in reason(jobs[1])
    assert "pickles are read with --allow-any-rq-job only" in reason(jobs[4])
    assert "failure callback 'forbidden.harm'" in reason(jobs[8])
    assert "forbidden.harm" not in "".join(queue.connection.lrange(queue.key, 0, -1))


def test_the_attacks_succeed_where_everything_is_allowed(
    home: embedded.PrivateServer, queue: Queue, tmp_path: Path
) -> None:
    """Else the test above shows nothing."""
    jobs = [in_a_pickle(queue), by_unpickling(queue)]
    done = finished(home.url, tmp_path, *HANDLERS, "--allow-any-rq-job")
    assert done.process.returncode == 0
    assert notes(tmp_path) == {"imported", "harmed"}
    assert jobs[0].get_status() is JobStatus.FINISHED


def test_functions_and_callbacks_that_are_allowed_run(
    home: embedded.PrivateServer, queue: Queue, tmp_path: Path
) -> None:
    first = queue.enqueue("app.plain", 1, on_success=Callback("forbidden.harm"))
    second = queue.enqueue("app.plain", 2)
    finished(home.url, tmp_path, *HANDLERS, "--allow-function", "app.plain", RQARM_ALLOW_FUNCTIONS="forbidden.harm")
    assert [job.get_status() for job in (first, second)] == [JobStatus.FINISHED] * 2
    assert second.return_value() == 3
    assert notes(tmp_path) == {"imported", "harmed"}


@pytest.mark.parametrize("which", ["success", "failure", "stopped"])
def test_rq_gets_no_callback_that_is_not_allowed(client: redis.Redis, which: str) -> None:
    """Wherever RQ runs one: it asks the job, when the rest of the job has been refused or has run."""
    name = f"{which}_callback_name"
    with pytest.raises(FunctionNotAllowed, match=f"{which} callback 'forbidden.harm'"):
        getattr(made(client, ["app.plain", None, [], {}], **{name: b"forbidden.harm"}), f"{which}_callback")
    allowed = made(client, ["app.plain", None, [], {}], **{name: b"app.plain"})
    assert getattr(allowed, f"{which}_callback") is app.plain
    assert getattr(made(client, ["app.plain", None, [], {}]), f"{which}_callback") is None


@pytest.mark.parametrize("kind", [Job, job_class()], ids=["RQ's", "ours"])
def test_maintenance_does_not_run_the_failure_callback_of_an_abandoned_job(
    client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Job]
) -> None:
    """RQ runs it in the worker itself, when another worker has died over the job."""
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    callback = Callback("forbidden.harm")
    job = Job.create("app.plain", connection=client, serializer=JSONSerializer, origin="arm", on_failure=callback)
    job.save()
    job.set_status(JobStatus.STARTED)
    with client.pipeline() as pipeline:
        execution = Execution.create(job, ttl=1, pipeline=pipeline)
        pipeline.execute()
    registry = StartedJobRegistry("arm", client, job_class=kind, serializer=JSONSerializer)
    client.zadd(registry.key, {execution.composite_key: 1})
    registry.cleanup()
    assert job.get_status() is JobStatus.FAILED
    assert notes(tmp_path) == ({"harmed"} if kind is Job else set())


# -- webhooks


@pytest.fixture
def listener() -> Iterator[tuple[str, list[Any]]]:
    """A web server that notes who calls."""
    calls: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    calls.append(connection.recv(4096))
                    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/hook", calls
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("option", [(), ("--allow-any-rq-job",)], ids=["allow-list", "any job"])
def test_the_worker_calls_no_urls_that_a_client_chose(
    home: embedded.PrivateServer, client: redis.Redis, tmp_path: Path, listener: Any, option: tuple[str, ...]
) -> None:
    url, calls = listener
    hooks = [Webhook(url, status) for status in ("finished", "failed")]
    queue = Queue("arm", connection=client, serializer=JSONSerializer)
    job = queue.enqueue("app.plain", 1, webhooks=hooks)
    options = option or ("--allow-function", "app.plain")
    finished(home.url, tmp_path, *HANDLERS, *options)
    if option:
        assert len(calls) == 1
        return
    assert calls == []
    assert "it has webhooks" in reason(job)


# -- the class by itself


def made(client: redis.Redis, envelope: object, **fields: bytes) -> AllowedJob:
    job = job_class(["app.plain"])("j", client, JSONSerializer)
    raw = {
        b"data": zlib.compress(JSONSerializer.dumps(envelope)),
        **{name.encode(): value for name, value in fields.items()},
    }
    job.restore(raw)
    return job


@pytest.mark.parametrize("ask", ["func_name", "func", "instance", "args", "kwargs"])
def test_nothing_can_be_had_from_a_refused_job_however_often_one_asks(client: redis.Redis, ask: str) -> None:
    job = made(client, ["os.system", None, ["true"], {}])
    for _ in range(2):
        with pytest.raises(FunctionNotAllowed, match=r"os\.system"):
            getattr(job, ask)
    assert "os.system" in job.refusal
    assert isinstance(FunctionNotAllowed("j", ""), DeserializationError), "RQ knows how to treat it"


def test_an_allowed_job_is_as_any_other(client: redis.Redis) -> None:
    job = made(client, ["app.plain", None, [1], {"a": 2}])
    assert (job.refusal, job.func_name, job.args, job.kwargs) == ("", "app.plain", [1], {"a": 2})
    assert made(client, [PERFORM, None, ["arm", "k"], {}]).refusal == ""


@pytest.mark.parametrize("name", [["app.plain"], {"app.plain": 1}, None, 7, "app.plain ", "app.Plain", "app", ""])
def test_only_the_very_name_is_allowed(client: redis.Redis, name: object) -> None:
    assert made(client, [name, None, [], {}]).refusal


def test_a_name_of_a_client_does_not_fill_the_log(client: redis.Redis) -> None:
    assert len(made(client, ["x" * 1_000_000 + "\n", None, [], {}]).refusal) < 400
    assert "\n" not in made(client, ["x\ny", None, [], {}]).refusal


@pytest.mark.parametrize(
    "name", ["plain", "app.nothing", "no_such_module.x", "app plain.x", "app.LONGEST", "app..plain"]
)
def test_a_list_with_a_wrong_name_is_refused_at_once(name: str) -> None:
    with pytest.raises(ConfigError, match="--allow-function"):
        worker_options([name])


def test_names_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RQARM_ALLOW_FUNCTIONS", "app.plain, app.plain_pid,")
    options = worker_options(["app.plain_kill"])
    assert options["job_class"].allowed == {PERFORM, "app.plain", "app.plain_pid", "app.plain_kill"}
    assert options["serializer"] is JSONSerializer
    assert AllowedJob.allowed == {PERFORM}, "the list is that of one worker"
