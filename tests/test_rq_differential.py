"""rqarm.Worker leaves in Redis what RQ's own worker leaves: the same mixed workload, key by key."""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest
import redis
import rq
import servers
from rq import Callback, Repeat, Retry
from rq.group import Group
from rq.job import Dependency
from rq.rate_limit import RateLimit
from rq.serializers import JSONSerializer
from workers import APP, PATIENCE, TESTS, WorkerProcess

from rqarm import BatchRequest, RequestManager
from rqarm.rqjobs import queue_names

#: seconds by which two runs of the workload may differ in a time or what is left of a TTL, besides what the runs took
TOLERANCE = 5.0
WORKER = "the-worker"
URIS = ["/add/1/2", "/add/3/4", "/async/5", "/stream/1/300000", "/file", "/fail/1", "/nowhere", "/slow/1"]
#: their values differ from run to run; a hash without one of them is still another hash
VOLATILE = {
    "rq:worker": {"pid", "ip_address", "total_working_time"},
    "arm:status": {"job_id", "ticket", "slot", "token", "done_token"},
    "arm:result": {"owner"},
    "arm:stats": {"*", "/add", "/async", "/file", "/stream"},  # learned run times
}
#: fields whose very names are chance, the minute and the bucket of a time; and what only our worker tells of itself
OWN = {"arm:stats": re.compile(r"m\d+:|run:|wait:|saved:"), "rq:worker": re.compile("rqarm_version$")}
NOTHING = re.compile("(?!)")
#: fields that are msgpack, whose traceback says in which lines of which program the handler was called
PACKED = {("arm:status", "error"), ("arm:status", "request")}
#: a mark of whoever has just swept, gone after a third of a lease
FLEETING = {"arm:swept", "arm:takers"}
_TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)?")
#: a frame of a traceback in RQ's code or ours: how the worker got to the function is its own affair
_FRAME = re.compile(r' *File "[^"]*/(rq|rqarm)/[^"]*", line \d+, in .*\n( {4}.*\n)*')
_RANDOM = re.compile(r"\b[0-9a-f]{32}\b")


@dataclass(frozen=True)
class About:
    """Seconds from the end of the run. The same in both runs, but for when in the run it was noted."""

    seconds: float
    run: float

    def __eq__(self, other: object) -> bool:
        return isinstance(other, About) and abs(self.seconds - other.seconds) <= TOLERANCE + max(self.run, other.run)

    def __hash__(self) -> int:
        return 0


# -- the workload


def enqueue(connection: redis.Redis) -> None:
    """One job for each of RQ's features that a burst shows; each has an id of its own."""
    first, second = (rq.Queue(name, connection=connection, serializer=JSONSerializer) for name in ("first", "second"))
    success, failure = Callback("rqwork.on_success"), Callback("rqwork.on_failure")

    plain = first.enqueue("rqwork.add", 1, 2, job_id="plain", meta={"who": "me"}, description="adds")
    bad = second.enqueue("rqwork.fail", "luck", job_id="bad")
    first.enqueue("rqwork.fail", "luck", job_id="swallowed")
    first.enqueue("rqwork.fail", "luck", job_id="failure-ttl", failure_ttl=100)
    first.enqueue("rqwork.nothing", job_id="no-function")
    first.enqueue("rqwork.add", 1, job_id="wrong-arguments")
    first.enqueue("rqwork.not_json", job_id="not-json")
    first.enqueue("rqwork.over_time", job_id="over-time", job_timeout=1)
    first.enqueue("rqwork.killed", job_id="killed", on_failure=failure)
    first.enqueue("rqwork.leave", 0, job_id="left-0")
    first.enqueue("rqwork.leave", 3, job_id="left-3", retry=Retry(max=1))
    first.enqueue("rqwork.write_meta", job_id="meta")
    first.enqueue("rqwork.enqueue_another", "another", job_id="enqueues")

    first.enqueue("rqwork.add", 1, 2, job_id="kept-not", result_ttl=0)
    first.enqueue("rqwork.add", 1, 2, job_id="kept-for-ever", result_ttl=-1)
    first.enqueue("rqwork.add", 1, 2, job_id="kept-long", result_ttl=5000, ttl=9000)
    second.enqueue("rqwork.add", 1, 2, job_id="at-front", at_front=True)

    first.enqueue("rqwork.fail_first", 2, job_id="retried", retry=Retry(max=2))
    first.enqueue("rqwork.fail_first", 9, job_id="retried-in-vain", retry=Retry(max=2), on_failure=failure)
    first.enqueue("rqwork.fail_first", 9, job_id="retried-later", retry=Retry(max=2, interval=[5000, 6000]))
    first.enqueue("rqwork.add", 1, 2, job_id="repeated", repeat=Repeat(times=2), on_success=success)
    first.enqueue("rqwork.add", 1, 2, job_id="repeated-later", repeat=Repeat(times=1, interval=5000))
    first.enqueue("rqwork.add", 1, 2, job_id="repeated-not-kept", repeat=Repeat(times=1), result_ttl=0)

    first.enqueue("rqwork.add", 1, 2, job_id="calls", on_success=success, on_failure=failure)
    first.enqueue("rqwork.fail", "call", job_id="calls-failure", on_success=success, on_failure=failure)
    first.enqueue("rqwork.add", 1, 2, job_id="bad-callback", on_success=Callback("rqwork.bad_callback"))
    first.enqueue("rqwork.fail", "call", job_id="bad-failure-callback", on_failure=Callback("rqwork.bad_callback"))

    child = second.enqueue("rqwork.add", 3, 4, job_id="child", depends_on=plain)
    first.enqueue("rqwork.add", 3, 4, job_id="grandchild", depends_on=[child, plain])
    first.enqueue("rqwork.add", 3, 4, job_id="orphan", depends_on=bad)
    first.enqueue("rqwork.add", 3, 4, job_id="forgiving", depends_on=Dependency(bad, allow_failure=True))
    first.enqueue("rqwork.add", 3, 4, job_id="child-at-front", depends_on=Dependency(child, enqueue_at_front=True))

    Group.create(connection, name="band").enqueue_many(
        second,
        [
            rq.Queue.prepare_data("rqwork.add", (1, n), job_id=f"member-{n}", result_ttl=0 if n == 2 else 900)
            for n in range(3)
        ],
    )
    for n in range(3):
        first.enqueue("rqwork.add", 1, n, job_id=f"limited-{n}", rate_limit=RateLimit("one", 1))


def submit(url: str) -> None:
    """Requests of ours on all three priorities: they succeed at once, at the second attempt, never, and in vain."""
    with RequestManager(url, allow_volatile=True) as rm:
        rm.submit_many(URIS)
        rm.submit(BatchRequest("/add/7/8", priority="high", sticky=True, tags=()), payload={"for": "a"})
        rm.submit(BatchRequest("/add/7/8", priority="low"), payload={"for": "b"})
        rm.submit(BatchRequest("/add/9/9", priority="low", ttl=77))


def work(url: str, directory: Path, kind: str) -> None:
    """Run the queues to their end with one worker process of this class."""
    directory.mkdir()
    environment = {"RQARM_HANDLERS": str(APP), "PYTHONHASHSEED": "0"}
    # rqarm.Worker looks after a horse every third of a lease; RQ derives TTLs of a running job from that interval
    options = ["--burst", "--job-monitoring-interval", "5", "--exception-handler", "rqwork.handle_exception"]
    options += ["second", "first", *queue_names("arm")]
    worker = WorkerProcess(url, directory, kind, WORKER, options, environment, TESTS.parent)
    try:
        assert worker.wait(PATIENCE * 2) == 0
    finally:
        worker.stop()
        print(worker.said())


# -- what it leaves


class Reader:
    """Reads every key of a server: readable, and without what differs from run to run.

    A ticket of ours becomes its key and its number among the tickets of that key by age; other random ids lose their
    names, times theirs, and numbers that are times become seconds from now.
    """

    def __init__(self, connection: redis.Redis, began: float) -> None:
        self.connection = connection
        self.now = server_time(connection)
        self.run = self.now - began
        self.keys = {key.decode().removeprefix("arm:status:") for key in connection.keys("arm:status:*")}
        self.tickets: dict[str, str] = {}
        numbers: Counter[str] = Counter()
        tickets = [name.decode().removeprefix("rq:job:") for name in connection.keys("rq:job:*-????????")]
        for job_id in sorted(tickets, key=lambda job_id: connection.hget(f"rq:job:{job_id}", "created_at") or b""):
            key = job_id[:-9]
            if key in self.keys:
                self.tickets[job_id] = f"{key}-TICKET-{numbers[key]}"
                numbers[key] += 1

    def dump(self) -> dict[str, Any]:
        """Type, value and what is left of the TTL of each key."""
        found: dict[str, Any] = {}
        for key in self.connection.keys("*"):
            name = self.readable(key.decode())
            if name in FLEETING:
                continue
            assert name not in found, f"two keys look like {name}"
            ttl, kind = self.connection.pttl(key), self.connection.type(key).decode()
            left = ttl if ttl < 0 else About(ttl / 1000, self.run)
            found[name] = {"type": kind, "ttl": left, "value": self._value(key, kind)}
        return found

    def readable(self, text: str) -> str:
        for ticket, name in self.tickets.items():
            text = text.replace(ticket, name)
        text = _RANDOM.sub(lambda found: found[0] if found[0] in self.keys else "RANDOM", text)
        return _TIME.sub("TIME", _FRAME.sub("", text))

    def _value(self, key: bytes, kind: str) -> Any:
        connection = self.connection
        if kind == "string":
            return self._text(connection.get(key))
        if key.startswith(b"arm:noted:"):
            return self._notes(key)
        if kind == "list":
            return [self._text(item) for item in connection.lrange(key, 0, -1)]
        if kind == "set":
            return sorted(self._text(item) for item in connection.smembers(key))
        if kind == "zset":
            return {
                self._text(item): self._number(score) for item, score in connection.zrange(key, 0, -1, withscores=True)
            }
        if key == b"arm:events":
            return self._histories(key)
        if kind == "stream":
            return [self._fields(key, fields) for _, fields in connection.xrange(key)]
        assert kind == "hash", kind
        return self._fields(key, connection.hgetall(key))

    def _notes(self, key: bytes) -> list[list[str]]:
        """What was counted, without the minute and the times that it took; the order is chance."""
        notes = [note.decode().split("\n") for note in self.connection.lrange(key, 0, -1)]
        told = [words[1:4] + words[6:] if key == b"arm:noted:executions" else words[1:3] + words[4:] for words in notes]
        return sorted(words for words in told if words[0] != "released")

    def _histories(self, key: bytes) -> dict[str, list[Any]]:
        """What has happened to each request; not that it was taken ahead and handed back, nor what came between."""
        histories: dict[str, list[Any]] = {}
        for _, fields in self.connection.xrange(key):
            event = self._fields(key, fields)
            history = histories.setdefault(event["key"], [])
            if event["verb"] == "release":
                assert history.pop()["verb"] == "start"
            else:
                history.append(event)
        return histories

    def _fields(self, key: bytes, fields: dict[bytes, bytes]) -> dict[str, Any]:
        family = key.decode().rpartition(":")[0]
        found = {}
        for name, value in sorted((name.decode(), value) for name, value in fields.items()):
            if (key, name) == (b"arm:stats:executions", "released") or OWN.get(family, NOTHING).match(name):
                continue
            if name in VOLATILE.get(family, ()):
                found[name] = "VOLATILE"
            elif (family, name) in PACKED:
                found[name] = self._packed(value)
            elif family == "arm:status" and name.startswith("tried_"):
                found[name] = self._attempt(value)
            else:
                found[name] = self._text(value)
        return found

    def _packed(self, value: bytes) -> Any:
        return self.readable(repr(msgpack.unpackb(value)).replace("\\n", "\n"))

    def _attempt(self, note: bytes) -> list[Any]:
        """How an attempt failed, without its times."""
        pieces = []
        while note:
            length, _, note = note.partition(b":")
            pieces.append(note[: int(length)])
            note = note[int(length) :]
        number, worker, _, _, outcome, error = pieces
        return [number, worker, outcome, self._packed(error)]

    def _text(self, value: bytes) -> Any:
        """A value as people read it. RQ compresses with zlib, and writes base64 into its streams."""
        for decode in (zlib.decompress, lambda data: zlib.decompress(base64.b64decode(data, validate=True))):
            with suppress(zlib.error, binascii.Error):
                value = decode(value)
                break
        text = value.decode(errors="backslashreplace")
        return self._number(float(text)) if re.fullmatch(r"\d{10,16}(\.\d+)?", text) else self.readable(text)

    def _number(self, number: float) -> Any:
        """Unix seconds, milliseconds and microseconds are times; others stay as they are."""
        for unit in (1.0, 1e3, 1e6):
            if 1e9 < number / unit < 1e10:
                return About(number / unit - self.now, self.run)
        return number


def server_time(connection: redis.Redis) -> float:
    seconds, micros = connection.time()
    return float(seconds + micros / 1e6)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each of the two classes leaves of the whole workload."""
    found = {}
    for kind in ("rq.worker.Worker", "rqarm.Worker"):
        directory = tmp_path_factory.mktemp("differential") / "logs"
        with servers.throwaway(servers.VALKEY or servers.REDIS) as server, redis.Redis.from_url(server.url) as client:
            began = server_time(client)
            enqueue(client)
            submit(server.url)
            work(server.url, directory, kind)
            found[kind] = Reader(client, began).dump()
    return found


def test_both_leave_the_same_keys(left: dict[str, dict[str, Any]]) -> None:
    assert sorted(left["rqarm.Worker"]) == sorted(left["rq.worker.Worker"])


def test_both_leave_the_same_in_them(left: dict[str, dict[str, Any]]) -> None:
    theirs, ours = left["rq.worker.Worker"], left["rqarm.Worker"]
    differing = {name: (ours[name], theirs[name]) for name in theirs if name in ours and ours[name] != theirs[name]}
    assert differing == {}
