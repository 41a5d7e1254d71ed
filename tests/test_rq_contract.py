"""Our RQ jobs are RQ's: the same keys as those of its own code, and its tools and workers treat them as such."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import app
import pytest
import redis
import rq
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer
from servers import eventually
from workers import burst, rq_cli

from rqarm import BatchRequest, Handlers, RequestFailed, RequestManager, RqarmError, State, flows
from rqarm.model import Key, Priority
from rqarm.rqjobs import DESCRIPTION_BYTES, GRACE, PERFORM, RESULT_TTL, RqJobs, key_of
from rqarm.worker import equipment, use_handlers
from rqarm.worker.equipment import Equipment

URI = "/cities/FR?min=1"
#: fields of RQ's job whose values are times
TIMES = (b"created_at", b"enqueued_at")


@pytest.fixture
def rm(redis_client: redis.Redis, url: str, monkeypatch: pytest.MonkeyPatch):
    """A manager whose requests this process runs: numbers are added, everything else fails."""
    monkeypatch.setattr(equipment, "_equipment", Equipment())
    monkeypatch.setenv("RQARM_LEASE", "0.2")
    handlers = Handlers()
    runs: list[str] = []

    @handlers.route("/add/{a:int}/{b:int}")
    def add(request: Any, context: Any, a: int, b: int) -> int:
        runs.append(request.uri)
        return a + b

    @handlers.route("/fail")
    def fail(request: Any, context: Any) -> int:
        runs.append(request.uri)
        if len(runs) == 1:
            raise ValueError("the first run fails")
        return len(runs)

    use_handlers(handlers)
    with RequestManager(url, lease=0.2) as manager:
        manager.runs = runs  # type: ignore[attr-defined]
        yield manager


def queue(client: redis.Redis, name: str = "arm") -> rq.Queue:
    return rq.Queue(name, connection=client, serializer=JSONSerializer)


def rqs_job(name: str, client: redis.Redis, job_id: str, description: str) -> Job:
    """The job that RQ's own code makes for a request."""
    return queue(client, name).create_job(
        PERFORM,
        args=("arm",),
        job_id=job_id,
        description=description,
        timeout=3600 + GRACE,
        result_ttl=RESULT_TTL,
        failure_ttl=86_400,
    )


def rqs_keys(client: redis.Redis, job_id: str) -> dict[bytes, Any]:
    """Everything of RQ's on the server, with placeholders for times and for the job's id, without empty fields."""
    found = {}
    for name in client.keys("rq:*"):
        kind = client.type(name)
        value: Any = {
            b"string": client.get,
            b"hash": client.hgetall,
            b"list": lambda name: client.lrange(name, 0, -1),
            b"set": client.smembers,
            b"zset": lambda name: client.zrange(name, 0, -1),
        }[kind](name)
        if kind == b"hash":
            value = {field: b"now" if field in TIMES else text for field, text in value.items() if text}
            value[b"data"] = zlib.decompress(value[b"data"])
        found[name.replace(job_id.encode(), b"ID")] = kind, client.ttl(name), _without(job_id, value)
    return found


def _without(job_id: str, value: Any) -> Any:
    if isinstance(value, bytes):
        return value.replace(job_id.encode(), b"ID")
    if isinstance(value, dict):
        return {field: _without(job_id, text) for field, text in value.items()}
    return type(value)(_without(job_id, item) for item in value)


def our_job(rm: RequestManager, key: str) -> str:
    return rm.connection.hget(f"arm:status:{key}", "job_id").decode()


@pytest.mark.parametrize(
    ("priority", "name"), [("high", "arm-high"), ("default", "arm"), ("low", "arm-low")], ids=["high", "default", "low"]
)
def test_a_submit_leaves_what_enqueue_job_leaves(rm: RequestManager, priority: str, name: str) -> None:
    client = rm.connection
    key = rm.submit(BatchRequest(URI, priority=priority)).key
    job_id = our_job(rm, key)
    ours = rqs_keys(client, job_id)
    client.flushall()
    job = rqs_job(name, client, job_id, URI)
    queue(client, name).enqueue_job(job)
    assert ours == rqs_keys(client, job_id)
    assert sorted(ours) == sorted([b"rq:job:ID", b"rq:queues", f"rq:queue:{name}".encode()])


def test_a_release_leaves_what_enqueue_at_front_leaves(rm: RequestManager) -> None:
    client = rm.connection
    first, second = rm.submit_many(["/a", "/b"])
    lease = rm.queues.next_request()
    assert lease is not None
    lease.release()
    job_id = our_job(rm, first.key)
    assert client.lindex("rq:queue:arm", 0).decode() == job_id
    client.delete(f"rq:job:{our_job(rm, second.key)}")
    client.lrem("rq:queue:arm", 1, our_job(rm, second.key))
    ours = rqs_keys(client, job_id)
    client.flushall()
    queue(client).enqueue_job(rqs_job("arm", client, job_id, "/a"), at_front=True)
    assert ours == rqs_keys(client, job_id)


def test_a_delayed_retry_leaves_what_schedule_job_leaves(rm: RequestManager) -> None:
    client = rm.connection
    key = rm.submit(URI).key
    lease = rm.queues.next_request()
    assert lease is not None
    lease.retry("later", delay=3600)
    job_id = our_job(rm, key)
    ours, due = rqs_keys(client, job_id), client.zscore("rq:scheduled:arm", job_id)
    at = datetime.now(UTC) + timedelta(hours=1)
    client.flushall()
    queue(client).schedule_job(rqs_job("arm", client, job_id, URI), at)
    assert ours == rqs_keys(client, job_id)
    assert due == pytest.approx(at.timestamp(), abs=5)


def test_a_call_up_leaves_what_rqs_scheduler_leaves(rm: RequestManager) -> None:
    """The scheduler queues at the end, we at the front: in an empty queue that is the same."""
    client, core = rm.connection, rm.core
    attempts = []
    for uri in ("/a", "/b"):
        rm.submit(uri)
        attempts.append(rm.shell.run(flows.take(core, None, "me", 0)))
        rm.shell.run(flows.admit(core, attempts[-1], "limit", 1))
    job_id = our_job(rm, attempts[1].key)
    assert client.zscore("rq:scheduled:arm", job_id) is not None
    rm.shell.run(flows.finish(core, attempts[0], "done"))
    ours = rqs_keys(client, job_id)
    assert sorted(ours) == sorted([b"rq:job:ID", b"rq:queues", b"rq:queue:arm"])
    client.flushall()
    queue(client).schedule_job(rqs_job("arm", client, job_id, "/b"), datetime.now(UTC))
    scheduler = RQScheduler(["arm"], connection=client, serializer=JSONSerializer)
    scheduler.acquire_locks()
    scheduler.enqueue_scheduled_jobs()
    scheduler.release_locks()
    assert ours == rqs_keys(client, job_id)


def test_times_are_written_as_rq_writes_them(rm: RequestManager) -> None:
    before = datetime.now(UTC)
    job = Job.fetch(our_job(rm, rm.submit(URI).key), connection=rm.connection, serializer=JSONSerializer)
    for moment in (job.created_at, job.enqueued_at):
        assert moment is not None
        assert before <= moment <= datetime.now(UTC)


def test_fetching_our_job_unpickles_nothing(rm: RequestManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    key = rm.submit(URI).key
    job = Job.fetch(our_job(rm, key), connection=rm.connection, serializer=JSONSerializer)
    assert (job.func_name, job.args, job.kwargs) == (PERFORM, ["arm"], {})
    assert key_of(job.id) == key
    assert job.get_status() is JobStatus.QUEUED
    assert (job.timeout, job.result_ttl, job.failure_ttl) == (3600 + GRACE, RESULT_TTL, 86_400)
    assert re.fullmatch(rf"{key}-[0-9a-f]{{8}}", job.id)


def test_a_job_id_is_never_used_again(rm: RequestManager) -> None:
    jobs = RqJobs(rm.settings)
    tickets = {jobs.enqueue(Key("k"), URI, "arm", Priority.DEFAULT).job_id for _ in range(100)}
    assert len(tickets) == 100


def test_rq_reads_our_job_as_it_reads_its_own(rm: RequestManager) -> None:
    client = rm.connection
    key = rm.submit(URI).key
    ours = Job.fetch(our_job(rm, key), connection=client, serializer=JSONSerializer)
    queue(client).enqueue_job(rqs_job("arm", client, "own", URI))
    own = Job.fetch("own", connection=client, serializer=JSONSerializer)
    left_out = {"_id", "created_at", "enqueued_at"}
    ours_read, own_read = ({n: v for n, v in vars(job).items() if n not in left_out} for job in (ours, own))
    assert ours_read == own_read


def test_a_job_of_the_earlier_form_runs(rm: RequestManager) -> None:
    """It names the key as a second argument."""
    key = rm.submit("/add/1/2").key
    job_id = our_job(rm, key)
    rm.connection.delete(f"rq:job:{job_id}", "rq:queue:arm")
    job = queue(rm.connection).create_job(PERFORM, args=("arm", key), job_id=job_id)
    queue(rm.connection).enqueue_job(job)
    burst(rm.connection)
    assert rm.result(key) == 3


@pytest.mark.parametrize("uri", [URI, "/cities/FR?" + "x" * 1000], ids=["short", "long"])
def test_a_job_that_waits_is_small(rm: RequestManager, uri: str) -> None:
    """A hash with a value above 64 bytes is stored in another way, which takes twice to three times as much."""
    name = f"rq:job:{our_job(rm, rm.submit(uri).key)}"
    assert rm.connection.object("ENCODING", name) == b"listpack"
    assert rm.connection.memory_usage(name) < 512


def test_a_description_shows_no_secret_and_its_middle_is_cut(rm: RequestManager) -> None:
    key = rm.submit(f"/export?api_token=hunter2&long={'x' * 1000}&z=last").key
    job = Job.fetch(our_job(rm, key), connection=rm.connection, serializer=JSONSerializer)
    assert job.description is not None
    assert "hunter2" not in job.description
    assert job.description.startswith("/export?api_token=***&long=xxx")
    assert job.description.endswith("xxx&z=last")
    assert len(job.description) == DESCRIPTION_BYTES


@pytest.mark.parametrize("operation", ["größe 50%", 'say "hi" \\ %(id)s', "🌍" * 15])
def test_a_description_survives_the_replay_unharmed(rm: RequestManager, operation: str) -> None:
    key = rm.submit(BatchRequest("/x", operation=operation)).key
    job = Job.fetch(our_job(rm, key), connection=rm.connection, serializer=JSONSerializer)
    assert job.description == f"{operation} /x"


def test_a_description_is_cut_between_characters(rm: RequestManager) -> None:
    key = rm.submit(BatchRequest("/x", operation="🌍" * 20)).key
    job = Job.fetch(our_job(rm, key), connection=rm.connection, serializer=JSONSerializer)
    assert job.description == "🌍" * 10 + "..." + "🌍" * 4 + " /x"


@pytest.mark.parametrize("how", ["enqueue_job", "schedule_job"])
def test_an_rq_that_queues_with_other_commands_is_refused(
    rm: RequestManager, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    original = getattr(rq.Queue, how)

    def with_one_more(self: rq.Queue, *arguments: Any, pipeline: Any, **named: Any) -> Any:
        job = original(self, *arguments, pipeline=pipeline, **named)
        pipeline.set("rq:new", "1")
        return job

    monkeypatch.setattr(rq.Queue, how, with_one_more)
    jobs = RqJobs(rm.settings)
    with pytest.raises(RqarmError, match="install a release of rq"):
        jobs.schedule(Key("k"), URI, "arm", Priority.DEFAULT, 0 if how == "enqueue_job" else 5)


def test_the_prefix_of_rqs_keys_is_honoured(rm: RequestManager, url: str) -> None:
    script = f"""
from workers import burst
from rqarm import Handlers, RequestManager
from rqarm.worker import use_handlers
handlers = Handlers()
@handlers.route("/double/{{n:int}}")
def double(request, context, n):
    return 2 * n
use_handlers(handlers)
rm = RequestManager({url!r})
key = rm.submit("/double/21").key
print(*sorted(name.decode().partition("-")[0] for name in rm.connection.keys("acme:*")))
print(rm.full_status(key).position)
burst(rm.connection)
print(rm.result(key), rm.connection.keys("rq:*"))
"""
    tests = Path(__file__).parent
    environment = os.environ | {"RQ_KEY_PREFIX": "acme", "PYTHONPATH": f"{tests}:{tests.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    key = BatchRequest("/double/21").key
    assert done.stdout.splitlines() == [f"acme:job:{key} acme:queue:arm acme:queues", "1", "42 []"], done.stderr


# -- RQ's tools


def test_rq_info_counts_what_waits(rm: RequestManager, url: str) -> None:
    rm.submit_many(["/add/1/2", "/add/2/3", BatchRequest("/add/3/4", priority="high")])
    printed = rq_cli(url, "info", "--raw", "--only-queues")
    assert "queue arm 2" in printed
    assert "queue arm-high 1" in printed


def test_rq_requeue_runs_a_failed_request_again(rm: RequestManager, url: str) -> None:
    key = rm.submit("/fail").key
    burst(rm.connection)
    assert rm.status(key).state is State.FAILED
    rq_cli(url, "requeue", "-S", "json", "--queue", "arm", our_job(rm, key))
    burst(rm.connection)
    status = rm.status(key)
    assert (status.state, status.error) == (State.COMPLETED, None)
    assert rm.result(key) == 2


def test_requeueing_an_old_job_of_a_completed_request_runs_nothing(rm: RequestManager, url: str) -> None:
    key = rm.submit("/fail").key
    burst(rm.connection)
    old = our_job(rm, key)
    rm.resubmit("/fail")
    burst(rm.connection)
    rq_cli(url, "requeue", "-S", "json", "--queue", "arm", old)
    burst(rm.connection)
    assert len(rm.runs) == 2
    assert rm.status(key).state is State.COMPLETED


def test_the_same_ticket_three_times_runs_once(rm: RequestManager) -> None:
    key = rm.submit("/add/1/2").key
    rm.connection.rpush("rq:queue:arm", *[our_job(rm, key)] * 2)
    burst(rm.connection)
    assert rm.runs == ["/add/1/2"]
    assert rm.result(key) == 3


def by_the_command(rm: RequestManager, url: str, key: str) -> None:
    rq_cli(url, "empty", "-S", "json", "arm")


def by_emptying(rm: RequestManager, url: str, key: str) -> None:
    queue(rm.connection).empty()


def by_deleting_the_job(rm: RequestManager, url: str, key: str) -> None:
    Job.fetch(our_job(rm, key), connection=rm.connection, serializer=JSONSerializer).delete()


def by_deleting_the_queue(rm: RequestManager, url: str, key: str) -> None:
    rm.connection.delete("rq:queue:arm")


def by_popping(rm: RequestManager, url: str, key: str) -> None:
    rm.connection.lpop("rq:queue:arm")


def by_flushing_rq(rm: RequestManager, url: str, key: str) -> None:
    rm.connection.delete(*rm.connection.keys("rq:*"))


WITHOUT_A_JOB = [by_the_command, by_emptying, by_deleting_the_job, by_flushing_rq]


@pytest.mark.parametrize("lose", WITHOUT_A_JOB)
def test_a_submit_queues_again_what_lost_its_job(rm: RequestManager, url: str, lose: Any) -> None:
    key = rm.submit("/add/1/2").key
    lose(rm, url, key)
    burst(rm.connection)
    assert rm.status(key).state is State.PENDING
    assert rm.submit("/add/1/2").outcome == "new"
    burst(rm.connection)
    assert rm.result(key) == 3


@pytest.mark.parametrize("lose", [*WITHOUT_A_JOB, by_deleting_the_queue, by_popping])
def test_a_sweep_queues_again_what_lost_its_ticket(rm: RequestManager, url: str, lose: Any) -> None:
    key = rm.submit("/add/1/2").key
    lose(rm, url, key)
    assert eventually(rm.queues.sweep) == 1
    assert rm.queues.sweep() == 0
    burst(rm.connection)
    assert rm.result(key) == 3


def test_nothing_is_called_lost_within_a_lease(url: str, redis_client: redis.Redis) -> None:
    with RequestManager(url, lease=60) as rm:
        rm.submit("/add/1/2")
        rm.connection.delete("rq:queue:arm")
        assert rm.queues.sweep() == 0


# -- RQ's workers


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # RQ's worker forks beside its pub/sub thread
@pytest.mark.parametrize("kind", [rq.SimpleWorker, rq.Worker], ids=["SimpleWorker", "Worker"])
def test_rqs_worker_runs_our_jobs_beside_others(rm: RequestManager, kind: type[rq.worker.BaseWorker]) -> None:
    before = queue(rm.connection).enqueue(app.plain, 1)
    key = rm.submit("/add/1/2").key
    after = queue(rm.connection).enqueue(app.plain, 2)
    burst(rm.connection, kind=kind)
    assert rm.result(key) == 3
    assert [job.return_value(refresh=True) for job in (before, after)] == [2, 3]


def test_queues_are_served_by_priority(rm: RequestManager) -> None:
    for priority in ("low", "default", "high"):
        rm.submit(BatchRequest(f"/add/1/{len(priority)}", priority=priority))
    burst(rm.connection)
    assert rm.runs == ["/add/1/4", "/add/1/7", "/add/1/3"]


def test_a_failed_request_stands_in_rqs_failed_registry(rm: RequestManager) -> None:
    key = rm.submit("/fail").key
    burst(rm.connection)
    registry = FailedJobRegistry("arm", connection=rm.connection, serializer=JSONSerializer)
    assert registry.get_job_ids() == [our_job(rm, key)]
    job = Job.fetch(our_job(rm, key), connection=rm.connection, serializer=JSONSerializer)
    result = job.latest_result()
    assert job.get_status() is JobStatus.FAILED
    assert result is not None
    assert "ValueError: the first run fails" in (result.exc_string or "")
    with pytest.raises(RequestFailed, match="the first run fails"):
        rm.result(key)


def test_rq_keeps_nothing_of_a_success(rm: RequestManager) -> None:
    key = rm.submit("/add/1/2").key
    job_id = our_job(rm, key)
    burst(rm.connection)
    client = rm.connection
    assert rm.result(key) == 3
    assert client.keys(f"rq:*{job_id}*") + client.keys("rq:finished:*") == []
    assert client.keys("rq:wip:*") + client.keys("rq:execution*") == []
