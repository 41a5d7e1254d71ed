"""Drive calls and flows by hand, put a request into a state, and look at everything that is stored.

No threads, no waiting and no pool: one client, one step after the other. States are reached through real transitions
only; what a test forges beyond that (a lapsed lease, an evicted result) has a method of its own here.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import redis
from redis.exceptions import NoScriptError

from rqarm import codec, flows, followups, packing
from rqarm.calls import Batch, Call, Command, NextUp, ParkingTicket, Ticket
from rqarm.config import Settings
from rqarm.flows import Core, Emit, Flow
from rqarm.keys import Keys
from rqarm.model import FollowUp, Key, Priority, State, Token
from rqarm.replies import Attempt, Found, QuarantineEntry, Redirection, Taken
from rqarm.request import BatchRequest, as_request
from rqarm.rqjobs import RqJobs

#: what a state is called here: those of rqarm.model, and the kinds of them that scripts tell apart
STATES = (
    "unknown", "pending", "scheduled", "mine", "other", "lapsed", "completed", "sticky", "evicted", "failed",
    "negative", "quarantined", "exhausted", "cancelled", "placed", "full", "called", "parked", "redirected", "aliased",
)  # fmt: skip
#: the word in the record for each
STORED_STATE: dict[str, State] = {
    **{name: State(name) for name in ("unknown", "pending", "completed", "failed", "cancelled")},
    **dict.fromkeys(("scheduled", "called", "parked", "redirected"), State.PENDING),
    **dict.fromkeys(("mine", "other", "lapsed", "placed", "full"), State.IN_PROGRESS),
    **dict.fromkeys(("sticky", "evicted", "aliased"), State.COMPLETED),
    **dict.fromkeys(("negative", "quarantined", "exhausted"), State.FAILED),
}
LEASE_MS = 60_000
#: the limit of a test that needs only one
LIMIT = "/limited/{n}"
ERROR = packing.pack_error("Boom", "it did not work", "")

#: everything stored: name -> (type, value, moment of expiry in Unix ms or -1)
Snapshot = dict[str, tuple[str, Any, int]]


@dataclass(frozen=True)
class Seeded:
    """A request in a state, and what its first holder knows of it.

    ``job_id``: the record's ticket. ``execution`` and ``attempt``: the execution that is, or was, mine; made up where
    there was none.
    """

    request: BatchRequest
    job_id: str
    execution: str
    attempt: Attempt

    @property
    def key(self) -> Key:
        return self.request.key


class Rig:
    """One namespace on one server. Without other settings, nothing in it expires while a test runs."""

    def __init__(self, client: redis.Redis, **settings: Any) -> None:
        self.client = client
        self.settings = Settings(**settings)
        self.jobs = RqJobs(self.settings)
        self.core = Core(self.settings, self.jobs)
        self.calls, self.keys = self.core.calls, self.core.keys

    # -- driving

    def reply(self, step: Call[Any] | Command[Any]) -> Any:
        """What the server answers, as it comes."""
        if isinstance(step, Command):
            return self.client.execute_command(*step.argv)
        argv = ("EVALSHA", step.script.sha, len(step.keys), *step.keys, *step.argv)
        try:
            return self.client.execute_command(*argv)
        except NoScriptError:
            assert self.client.script_load(step.script.text) == step.script.sha
            return self.client.execute_command(*argv)

    def ask(self, step: Any) -> Any:
        """The answer as a flow gets it."""
        if isinstance(step, Batch):
            return [self.ask(each) for each in step.steps]
        assert isinstance(step, Call | Command), f"nobody is here to serve {step}"
        return step.parse(self.reply(step))

    def word(self, call: Call[Any]) -> str:
        """The outcome alone."""
        return str(self.reply(call)[0].decode())

    def run(self, flow: Flow[Any]) -> Any:
        """The value of a flow."""
        return self.watch(flow, [])

    def emitted(self, flow: Flow[Any]) -> list[Any]:
        """What a flow emits."""
        items: list[Any] = []
        self.watch(flow, items)
        return items

    def watch(self, flow: Flow[Any], items: list[Any]) -> Any:
        answer: Any = None
        while True:
            try:
                step = flow.send(answer)
            except StopIteration as end:
                return end.value
            answer = None
            if isinstance(step, Emit):
                items.append(step.item)
            else:
                answer = self.ask(step)

    # -- calls, with the ids in the hand of the test

    def ticket(self, request: BatchRequest, *, delay: float = 0.0, priority: Priority | None = None) -> Ticket:
        rank = request.priority if priority is None else priority
        return self.jobs.schedule(request.key, request.uri, self.core.queue_of(request), rank, delay)

    def front_ticket(self, request: BatchRequest) -> Ticket:
        return self.jobs.enqueue_at_front(request.key, request.uri, self.core.queue_of(request), request.priority)

    def submit(
        self, request: BatchRequest, ticket: Ticket | None = None, *, payload: bytes = b"", again: bool = False
    ) -> Call[Found]:
        packed = (payload.decode(), payload) if payload else None
        return self.calls.submit(
            request, self.core.identify(request), ticket or self.ticket(request), payload=packed, again=again
        )

    def start(
        self, key: Key, job_id: str, execution: str = "", worker: str = "me", *, own_list: str = ""
    ) -> Call[Attempt | State]:
        return self.calls.start(key, job_id, execution or secrets.token_hex(8), worker, LEASE_MS, own_list=own_list)

    def take(self, execution: str = "", worker: str = "me", queue: str = "") -> Call[Attempt | str]:
        """As the pull interface takes; the attempt, or where the events stood."""
        call = self.take_any(self.jobs.lists(queue or self.settings.queue), execution, worker)

        def parse(reply: Any) -> Attempt | str:
            taken = call.parse(reply)
            return taken.attempt if taken.attempt is not None else taken.last_event

        return replace(call, parse=parse)

    def take_any(
        self,
        lists: Sequence[str],
        execution: str = "",
        worker: str = "me",
        *,
        for_rq: bool = False,
        is_last: bool = False,
    ) -> Call[Taken]:
        execution = execution or secrets.token_hex(8)
        return self.calls.take(lists, execution, worker, worker, LEASE_MS, for_rq=for_rq, is_last=is_last)

    def complete(
        self,
        attempt: Attempt,
        value: Any = "value",
        *,
        sticky: bool = False,
        ttl_ms: int = 0,
        follow_up: NextUp | None = None,
    ) -> Call[list[Any]]:
        encoded = codec.encode(value, self.settings)
        assert encoded.inline is not None
        return self.calls.complete(
            attempt, encoded.envelope, encoded.inline, sticky=sticky, ttl_ms=ttl_ms, follow_up=follow_up
        )

    def fail(
        self,
        attempt: Attempt,
        *,
        negative_ms: int = 0,
        reason: str = "",
        note: bytes = b"",
        follow_ups: Sequence[NextUp] = (),
    ) -> Call[str]:
        return self.calls.fail(
            attempt,
            ERROR,
            failure_ttl_ms=86_400_000,
            negative_ms=negative_ms,
            reason=reason,
            note=note,
            follow_ups=follow_ups,
        )

    def need(self, attempt: Attempt, *needed: Key, ticket: ParkingTicket | None = None) -> Call[Redirection]:
        ticket = self.parking_ticket(attempt) if ticket is None else ticket
        return self.calls.need(attempt, needed, ticket, delay_ms=600_000)

    def admit(
        self, attempt: Attempt, max_running: int = 1, limit: str = LIMIT, ticket: ParkingTicket | None = None
    ) -> Call[bool]:
        ticket = ticket or self.parking_ticket(attempt)
        return self.calls.admit(attempt, limit, max_running, ticket, delay_ms=3_600_000)

    def parking_ticket(self, attempt: Attempt) -> ParkingTicket:
        return self.jobs.park(attempt.key, attempt.request.uri, attempt.queue, attempt.priority, 3600.0)

    def retry(self, attempt: Attempt, ticket: Ticket, *, delay_ms: int = 0, kwargs: bytes = b"") -> Call[str]:
        return self.calls.retry(attempt, ticket, delay_ms=delay_ms, kwargs=kwargs, error=ERROR)

    def requeue(self, key: Key, old_job_id: str, ticket: Ticket) -> Call[str]:
        return self.calls.requeue(self.entry(key, old_job_id), ticket, self.dismissal(old_job_id))

    def discard(self, key: Key, old_job_id: str) -> Call[str]:
        return self.calls.discard(self.entry(key, old_job_id), self.dismissal(old_job_id))

    def dismissal(self, job_id: str) -> str:
        return self.jobs.dismiss(job_id, self.settings.queue, Priority.DEFAULT)

    def entry(self, key: Key, job_id: str) -> QuarantineEntry:
        """An entry as somebody saw it, of which only the ticket matters."""
        return QuarantineEntry(
            key,
            "",
            "",
            "",
            None,
            "",
            "arm",
            Priority.DEFAULT,
            "",
            "",
            "",
            0,
            0,
            0,
            {},
            {},
            None,
            None,
            None,
            "",
            job_id,
        )

    def redirect(self, attempt: Attempt, target: Key) -> Call[Redirection]:
        return self.calls.redirect(attempt, target, failure_ttl_ms=86_400_000)

    def crash(self, key: Key, token: Token | None, ticket: Ticket) -> Call[str]:
        return self.calls.crash(key, token, ticket, delay_ms=0, error=ERROR)

    def follow_up(self, attempt: Attempt, kind: FollowUp = FollowUp.CALLBACK, number: int | None = None) -> NextUp:
        """The follow-up of an attempt's end."""
        end = int(attempt.token) if number is None else number
        return followups._follow_up(self.core, kind, attempt.request, attempt.key, end, attempt.queue, attempt.priority)

    def attend(self, attempt: Attempt, kind: FollowUp, since: int | None = None) -> Call[str]:
        """Tell of the failure that waits now, or of another one."""
        score = self.client.zscore(self.named("unattended", follow_up=kind), attempt.key)
        end = int(score or 1) if since is None else since
        return self.calls.attend(attempt.key, end, self.follow_up(attempt, kind, end))

    def put(self, request: BatchRequest, owner: str, value: Any = "put") -> Call[None]:
        encoded = codec.encode(value, self.settings)
        assert encoded.inline is not None
        return self.calls.put(request, self.core.identify(request), owner, encoded.envelope, encoded.inline)

    # -- looking

    def record(self, key: Key) -> dict[str, str]:
        """The status hash as it lies there."""
        fields = self.client.hgetall(self.keys.status(key))
        return {name.decode(): value.decode("latin-1") for name, value in fields.items()}

    def state(self, key: Key) -> State:
        return State(self.record(key).get("state", "unknown"))

    def waiting(self, queue: str = "") -> list[list[str]]:
        """The job ids in RQ's lists: high, default, low."""
        lists = self.jobs.lists(queue or self.settings.queue)
        return [[entry.decode() for entry in self.client.lrange(name, 0, -1)] for name in lists]

    def line(self, queue: str = "") -> list[str]:
        """The keys in line, next first."""
        index = self.keys.named("pending", queue=queue or self.settings.queue)
        return [key.decode() for key in self.client.zrange(index, 0, -1)]

    def named(self, kind: str, **parts: str) -> str:
        return self.keys.named(kind, **parts)

    # -- forging

    def lapse(self, key: Key, ago_ms: int = 1_000) -> None:
        """The holder fell silent for longer than its lease."""
        self.set_lease(key, server_ms(self.client) - ago_ms)

    def set_lease(self, key: Key, lease_until: int) -> None:
        self.client.hset(self.keys.status(key), "lease_until", lease_until)
        self.client.zadd(self.named("leases"), {key: lease_until})

    def evict(self, key: Key) -> None:
        """The server dropped the result to make room."""
        self.client.delete(self.named("result", key=key))

    def age(self, key: Key) -> None:
        """The ticket was queued an hour ago: beyond the patience of every sweep."""
        before = server_ms(self.client) - 3_600_000
        self.client.hset(self.keys.status(key), "pushed_ms", before)
        self.client.zadd(self.named("redirected"), {key: before}, xx=True)

    # -- states

    def begin(self, request: BatchRequest, execution: str = "", worker: str = "me") -> Attempt:
        """Submit and take: the attempt. Nothing else waits."""
        assert self.word(self.submit(request)) == "new"
        attempt = self.ask(self.take(execution, worker, self.core.queue_of(request)))
        assert isinstance(attempt, Attempt)
        assert attempt.key == request.key
        return attempt

    def placed(self, request: BatchRequest | str) -> Attempt:
        """Submit, take and admit: the attempt. Nothing else waits."""
        attempt = self.begin(as_request(request))
        assert self.word(self.admit(attempt)) == "admitted"
        return attempt

    def seed(self, state: str, request: BatchRequest | str = "/slow") -> Seeded:
        """The request in this state."""
        request, execution = as_request(request), secrets.token_hex(8)
        target = self.begin(BatchRequest("/target")) if state in ("redirected", "aliased") else None
        holder = self.placed("/holder") if state in ("full", "called", "parked") else None
        attempt = Attempt(
            request.key, Token(7), 1, request, {}, 0, 0, queue=self.core.queue_of(request), priority=request.priority
        )
        if state == "pending":
            assert self.word(self.submit(request)) == "new"
        elif state not in ("unknown", "cancelled"):
            attempt = self.begin(request, execution)
        match state:
            case "scheduled":
                assert self.word(self.retry(attempt, self.ticket(request, delay=3600), delay_ms=3_600_000)) == "retried"
            case "other":
                assert self.word(self.calls.release(attempt, self.front_ticket(request))) == "released"
                assert isinstance(self.ask(self.take(worker="another")), Attempt)
            case "placed":
                assert self.word(self.admit(attempt)) == "admitted"
            case "called" | "parked":
                assert holder is not None
                assert self.word(self.admit(attempt)) == "parked"
                if state == "called":
                    assert self.word(self.calls.cancel(holder.key)) == "cancelled"
            case "redirected" | "aliased":
                assert target is not None
                assert self.word(self.redirect(attempt, target.key)) == "linked"
                if state == "aliased":
                    assert self.word(self.complete(target)) == "stored"
            case "lapsed":
                self.lapse(request.key)
            case "completed" | "evicted" | "sticky":
                assert self.word(self.complete(attempt, sticky=state == "sticky")) == "stored"
                if state == "evicted":
                    self.evict(request.key)
            case "failed" | "negative":
                assert self.word(self.fail(attempt, negative_ms=3_600_000 if state == "negative" else 0)) == "failed"
            case "exhausted":
                assert self.word(self.fail(attempt, reason="exhausted")) == "failed"
            case "quarantined":
                for _ in range(self.settings.max_attempts - 1):
                    assert self.word(self.crash(request.key, attempt.token, self.ticket(request))) == "requeued"
                    execution = secrets.token_hex(8)
                    attempt = self.ask(self.take(execution))
                assert self.word(self.crash(request.key, attempt.token, self.ticket(request))) == "quarantined"
            case "cancelled":
                assert self.word(self.submit(request)) == "new"
                assert self.word(self.calls.cancel(request.key)) == "cancelled"
        assert self.state(request.key) is STORED_STATE[state]
        job_id = self.record(request.key).get("job_id") or self.ticket(request).job_id
        return Seeded(request, job_id, execution, attempt)


def server_ms(client: redis.Redis) -> int:
    seconds, microseconds = client.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


def snapshot(client: redis.Redis) -> Snapshot:
    """The whole key space, comparable: sets are sorted, hashes are dicts, lists and streams keep their order."""
    names = sorted(client.keys())
    with client.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.type(name)
        types = [kind.decode() for kind in pipeline.execute()]
        # what has expired meanwhile is of type none
        there = [(name, kind) for name, kind in zip(names, types, strict=True) if kind != "none"]
        names, types = [name for name, _ in there], [kind for _, kind in there]
        for name, kind in zip(names, types, strict=True):
            pipeline.execute_command("PEXPIRETIME", name)
            pipeline.execute_command(*(part if part != "KEY" else name for part in _READ[kind]))
        answers = pipeline.execute()
    return {
        name.decode(): (kind, _comparable(kind, value), expires)
        for name, kind, expires, value in zip(names, types, answers[::2], answers[1::2], strict=True)
    }


_READ: dict[str, tuple[Any, ...]] = {
    "string": ("GET", "KEY"),
    "hash": ("HGETALL", "KEY"),
    "list": ("LRANGE", "KEY", 0, -1),
    "set": ("SMEMBERS", "KEY"),
    "zset": ("ZRANGE", "KEY", 0, -1, "WITHSCORES"),
    "stream": ("XRANGE", "KEY", "-", "+"),
}


def _comparable(kind: str, value: Any) -> Any:
    return sorted(value) if kind == "set" else value


def without(stored: Snapshot, *names: str) -> Snapshot:
    """The snapshot without the keys that may change."""
    return {name: entry for name, entry in stored.items() if name not in names}


def jobs_of(client: redis.Redis, jobs: RqJobs) -> Iterator[tuple[str, dict[bytes, bytes], int]]:
    """Every RQ job: id, fields, TTL."""
    for name in client.scan_iter(f"{jobs.job_prefix}*"):
        if client.type(name) == b"hash":
            yield name.decode().removeprefix(jobs.job_prefix), client.hgetall(name), client.pttl(name)


def arguments_of(data: bytes) -> list[Any]:
    """What an RQ job calls: function, instance, arguments, keyword arguments."""
    from zlib import decompress

    call: list[Any] = json.loads(decompress(data))
    return call


__all__ = [
    "ERROR", "LEASE_MS", "LIMIT", "STATES", "STORED_STATE", "Keys", "Rig", "Seeded", "Snapshot", "arguments_of",
    "flows", "jobs_of", "server_ms", "snapshot", "without",
]  # fmt: skip
