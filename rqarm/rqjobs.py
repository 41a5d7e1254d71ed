"""The only knowledge of RQ's job format.

RQ's own code writes the job, against a pipeline that is never executed; the commands it recorded go to a transition
script, which replays them only if the claim wins. So nothing here says how RQ stores a job, except which values of the
recording differ from job to job, and that RQ reads an empty field like one that is not there. A contract test compares
the keys with those of ``Queue.enqueue_job``.

A job waits in Redis with its request, so it is small: a hash whose values have at most 64 bytes takes a third of one
with a longer value.
"""

from __future__ import annotations

import json
import secrets
import zlib
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from json.encoder import encode_basestring_ascii
from typing import Any

from redis import Redis
from rq import Queue, Worker
from rq.job import Job
from rq.results import Result as RqResult
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer
from rq.suspension import WORKERS_SUSPENDED
from rq.worker_registration import REDIS_WORKER_KEYS, WORKERS_BY_QUEUE_KEY

from rqarm.calls import ParkingTicket, Ticket
from rqarm.config import Settings
from rqarm.errors import RqarmError
from rqarm.model import Key, Priority

#: the function that runs a request; its argument is the namespace, and the key stands in the job's id
PERFORM = "rqarm.worker.perform"
#: seconds that RQ keeps its own record of a job that went well: none, ours says all. Its result stream alone is 4.4 KB
RESULT_TTL = 0
#: seconds beyond our own time limit after which RQ stops the job, should ours have failed to
GRACE = 30
#: longest description, in bytes: hash-max-listpack-value of the servers; a longer value doubles the size of the job
DESCRIPTION_BYTES = 64
#: how much of that is for the end of a longer text; the middle is left out
DESCRIPTION_TAIL = 21
#: the end of a job's id: a hyphen and eight random hex digits
ID_TAIL = 9
#: RQ's queue of each priority, as a suffix of ours
SUFFIXES = {Priority.HIGH: "-high", Priority.DEFAULT: "", Priority.LOW: "-low"}

#: what we call a field of a worker's record, and what RQ calls it
WORKER_FIELDS = {
    "state": "state",
    "queues": "queues",
    "job_id": "current_job",
    "succeeded": "successful_job_count",
    "failed": "failed_job_count",
    "working_time": "total_working_time",
    "born": "birth",
    "heartbeat": "last_heartbeat",
    "death": "death",
    "hostname": "hostname",
    "pid": "pid",
    "version": "version",
    "python_version": "python_version",
    "stopping": "shutdown_requested_date",
    "rqarm_version": "rqarm_version",  # rqarm.Worker's own
}

_ID, _DESCRIPTION = "recorded-00000000", "recorded description"
_EXPECTED = {
    "enqueue": ["SADD", "HSET", "HSET", "RPUSH"],
    "front": ["SADD", "HSET", "HSET", "LPUSH"],
    "schedule": ["SADD", "HSET", "HSET", "ZADD"],
    "recall": ["SADD", "HSET", "HSET", "LPUSH", "ZREM"],
    "dismiss": ["ZREM", "DEL"],
}


def key_of(job_id: str) -> Key:
    """The key of the request that a job id of ours was made for."""
    return Key(job_id[:-ID_TAIL])


def queue_names(queue: str) -> tuple[str, str, str]:
    """RQ's queues of one of ours, in the order in which a worker must listen: high, default, low."""
    high, default, low = (queue + suffix for suffix in SUFFIXES.values())
    return high, default, low


def live_workers(connection: Redis, queue: str) -> set[str]:
    """The names of the live RQ workers of one of our queues; RQ drops the dead ones as it looks."""
    return {str(worker.name) for each in _rq_queues(connection, queue) for worker in Worker.all(queue=each)}


def has_scheduler(connection: Redis, queue: str) -> bool:
    """Whether a worker runs RQ's scheduler for one of our queues; without one, delayed retries wait for the sweep."""
    return bool(connection.exists(*(RQScheduler.get_locking_key(name) for name in queue_names(queue))))


def delayed_jobs(connection: Redis, queue: str) -> int:
    """Jobs that wait for their time in RQ's scheduled registry."""
    return sum(int(each.scheduled_job_registry.count) for each in _rq_queues(connection, queue))


def delete_queue(connection: Redis, queue: str) -> None:
    """Drop RQ's side of one of our queues with the jobs that wait in it."""
    for each in _rq_queues(connection, queue):
        each.delete()


def _rq_queues(connection: Redis, queue: str) -> list[Queue]:
    return [Queue(name, connection=connection, serializer=JSONSerializer) for name in queue_names(queue)]


class RqJobs:
    """RQ jobs as recorded commands, for one namespace."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.job_prefix: str = Job.redis_job_namespace_prefix
        #: the flag of `rq suspend`
        self.suspended: str = WORKERS_SUSPENDED
        #: the set of the names of all workers' records, and what we read in these
        self.worker_set: str = REDIS_WORKER_KEYS
        self.worker_fields = WORKER_FIELDS
        #: of RQ's lists
        self.list_prefix: str = Queue.redis_queue_namespace_prefix
        self._templates: dict[tuple[str, str], _Template] = {}
        self._dismissals: dict[str, str] = {}

    def lists(self, queue: str) -> tuple[str, str, str]:
        """The names of RQ's lists of the queue, by priority."""
        high, default, low = (Queue.redis_queue_namespace_prefix + name for name in queue_names(queue))
        return high, default, low

    def worker_sets(self, queue: str) -> tuple[str, str, str]:
        """The names of RQ's sets of the workers that listen, by priority."""
        high, default, low = (WORKERS_BY_QUEUE_KEY % name for name in queue_names(queue))
        return high, default, low

    def enqueue(self, key: Key, description: str, queue: str, priority: Priority) -> Ticket:
        """A job at the end of the queue."""
        return self._ticket("enqueue", key, description, queue, priority)

    def enqueue_at_front(self, key: Key, description: str, queue: str, priority: Priority) -> Ticket:
        """A job that is next: for an attempt that was handed back."""
        return self._ticket("front", key, description, queue, priority)

    def schedule(self, key: Key, description: str, queue: str, priority: Priority, delay: float) -> Ticket:
        """A job that RQ's scheduler queues after ``delay`` seconds. 0 = at once, without the scheduler."""
        if delay <= 0:
            return self.enqueue(key, description, queue, priority)
        return self._ticket("schedule", key, description, queue, priority, delay)

    def park(self, key: Key, description: str, queue: str, priority: Priority, delay: float) -> ParkingTicket:
        """A job that RQ's scheduler queues after ``delay`` seconds, and what brings it to the front before."""
        ticket = self._ticket("schedule", key, description, queue, priority, delay)
        recall = self._ticket("recall", key, description, queue, priority, job_id=ticket.job_id)
        return ParkingTicket(ticket.job_id, ticket.commands, ticket.data, recall.commands)

    def dismiss(self, job_id: str, queue: str, priority: Priority) -> str:
        """RQ's commands that delete a failed job, as JSON: out of the registry, then the job with its results."""
        name = queue + SUFFIXES[priority]
        recorded = self._dismissals.get(name)
        if recorded is None:
            commands = [[argument.decode() for argument in command] for command in self._record("dismiss", name)]
            recorded = self._dismissals[name] = json.dumps(commands)
        return recorded.replace(_ID, job_id)

    def _ticket(
        self,
        how: str,
        key: Key,
        description: str,
        queue: str,
        priority: Priority,
        delay: float = 0.0,
        job_id: str = "",
    ) -> Ticket:
        name = queue + SUFFIXES[priority]
        template = self._templates.get((how, name))
        if template is None:
            template = self._templates[how, name] = _Template(self._record(how, name))
        return template.fill(key, description, delay, job_id)

    def _record(self, how: str, name: str) -> list[list[bytes]]:
        connection = Redis()  # never connected: RQ asks it only for a pipeline and a version
        queue = Queue(name, connection=connection, serializer=JSONSerializer)
        queue.redis_server_version = (7, 0, 0)
        pipeline = connection.pipeline()
        job = queue.create_job(
            PERFORM,
            args=(self.settings.namespace,),
            job_id=_ID,
            description=_DESCRIPTION,
            timeout=int(self.settings.timeout) + GRACE,
            result_ttl=RESULT_TTL,
            failure_ttl=int(self.settings.failure_ttl),
        )
        if how == "dismiss":
            # Job.delete reads which registry the job is in, and its executions: a failed one has none
            queue.failed_job_registry.remove(job, pipeline=pipeline)
            pipeline.delete(job.key, job.dependents_key, job.dependencies_key, RqResult.get_key(job.id))
        elif how == "schedule":
            queue.schedule_job(job, datetime.now(UTC) + timedelta(hours=1), pipeline=pipeline)
        else:
            queue.enqueue_job(job, pipeline=pipeline, at_front=how != "enqueue")
        if how == "recall":
            queue.scheduled_job_registry.remove(job, pipeline=pipeline)
        encode = connection.get_encoder().encode
        commands = [[_bytes(encode, argument) for argument in command[0]] for command in pipeline.command_stack]
        verbs = [command[0].decode() for command in commands]
        if verbs != _EXPECTED[how]:
            raise RqarmError(
                f"this release of RQ queues a job with {verbs}, not with {_EXPECTED[how]}: install a release of rq "
                "that pyproject.toml admits"
            )
        return commands


class _Template:
    """Recorded commands as the JSON that the prelude replays, with places for what differs from job to job."""

    def __init__(self, commands: list[list[bytes]]) -> None:
        self._data, self._data_at = b"", list[int]()
        lists = []
        for number, command in enumerate(_merged(map(_without_empty_fields, commands)), 1):
            arguments = [self._argument(number, command, position) for position in range(len(command))]
            lists.append(f"[{','.join(arguments)}]")
        self._text = f"[{','.join(lists)},{json.dumps(self._data_at)}]"

    def _argument(self, number: int, command: list[bytes], position: int) -> str:
        """One argument as JSON, or the place of the value that will stand there."""
        verb, argument, field = command[0], command[position], command[position - 1]
        if argument == _DESCRIPTION.encode():
            return "%(description)s"
        if verb == b"HSET" and field == b"data":
            # not compressed: lua/take.lua reads in it whose job it is
            self._data, self._data_at = zlib.compress(zlib.decompress(argument), 0), [number, position + 1]
            return '""'
        if verb == b"HSET" and field in (b"created_at", b"enqueued_at"):
            return '"%(now)s"'
        if verb == b"ZADD" and position == 2:
            return '"%(due)d"'
        return json.dumps(argument.decode()).replace("%", "%%").replace(_ID, "%(id)s")

    def fill(self, key: Key, description: str, delay: float, job_id: str) -> Ticket:
        """The ticket of one job; its id is the key and eight random hex digits, unless it is given."""
        job_id = job_id or f"{key}-{secrets.token_hex(4)}"
        now = datetime.now(UTC)
        commands = self._text % {
            "id": job_id,
            "description": encode_basestring_ascii(_shortened(description)),
            "now": now.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "due": now.timestamp() + delay + 0.999,
        }
        return Ticket(job_id, commands, self._data)


def _merged(commands: Iterable[list[bytes]]) -> list[list[bytes]]:
    """RQ writes the status of a job and then the whole job: one HSET does both, the later value counts."""
    merged: list[list[bytes]] = []
    for command in commands:
        if merged and command[0] == b"HSET" and merged[-1][:2] == command[:2]:
            fields = dict(zip(merged[-1][2::2], merged[-1][3::2], strict=True))
            fields |= dict(zip(command[2::2], command[3::2], strict=True))
            merged[-1] = command[:2] + [part for pair in fields.items() for part in pair]
        else:
            merged.append(command)
    return merged


def _without_empty_fields(command: list[bytes]) -> list[bytes]:
    """Eight of the seventeen fields of a job are empty, which RQ's reader does not tell from missing."""
    if command[0] != b"HSET":
        return command
    pairs = zip(command[2::2], command[3::2], strict=True)
    return command[:2] + [part for pair in pairs if pair[1] for part in pair]


def _shortened(description: str) -> str:
    text = description.encode(errors="replace")
    if len(text) <= DESCRIPTION_BYTES:
        return description
    head, tail = text[: DESCRIPTION_BYTES - DESCRIPTION_TAIL - 3], text[-DESCRIPTION_TAIL:]
    return f"{head.decode(errors='ignore')}...{tail.decode(errors='ignore')}"


def _bytes(encode: Any, argument: Any) -> bytes:
    return bytes(encode(argument.value if hasattr(argument, "value") else argument))
