"""What to say to Redis, and what its answer means.

No I/O here: a function returns a Call, the managers run it. Keys come from rqarm.keys, reply words from the header of
the script of the same name. Everything in milliseconds is named so; callers speak seconds.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

from rqarm import codec
from rqarm.codec import Envelope
from rqarm.config import Settings
from rqarm.errors import CorruptResult, ForeignData, InvalidRequest, KeyConflict, LeaseLost, RqarmError, VersionSkew
from rqarm.keys import RECORD_FIELDS, URI_FIELDS, Keys
from rqarm.model import BatchStatus, FollowUp, Key, Outcome, Priority, Reason, State, Token
from rqarm.request import BatchRequest
from rqarm.request import unpack as unpack_request
from rqarm.scripts import Script, all_scripts, script
from rqarm.uri import Canonical

T = TypeVar("T")

#: quarantined requests kept at the most; the oldest go first
QUARANTINE_KEPT = 10_000
#: what of an attempt's emissions is kept, in number and in bytes, and how large one may be
EMISSIONS_KEPT, EMITTED_BYTES, EMITTED_MAX = 1_000, 8 << 20, 1 << 20
#: requests that one step of the sweep, clear or browse looks at
STEP = 100


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One transition: which script, with what, and how to read its answer."""

    script: Script
    keys: tuple[str, ...]
    argv: tuple[Any, ...]
    parse: Callable[[Any], T]


@dataclass(frozen=True, slots=True)
class Command(Generic[T]):
    """One plain Redis command. ``waits``: it blocks, so it must not hold a connection that submits need."""

    argv: tuple[Any, ...]
    parse: Callable[[Any], T]
    waits: bool = False


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """Several calls in one round trip; the answer is the list of theirs.

    ``settles``: an error of one stands in the list, and the others' answers are not lost for it.
    """

    steps: tuple[Call[T] | Command[T], ...]
    settles: bool = False


@dataclass(frozen=True, slots=True)
class Ticket:
    """An RQ job that was recorded, not sent: its id, and the commands that create it as prelude.lua replays them.

    ``commands`` is JSON; ``data`` is the one argument in them that is not text.
    """

    job_id: str
    commands: str
    data: bytes


@dataclass(frozen=True, slots=True)
class ParkingTicket(Ticket):
    """A ticket for later. ``recall``: the commands that queue the same job at the front before its time."""

    recall: str


@dataclass(frozen=True, slots=True)
class NextUp:
    """A follow-up that the end of a request makes, should it come to that: the request, its identity, its ticket."""

    kind: FollowUp
    request: BatchRequest
    identity: Canonical
    ticket: Ticket

    @property
    def argv(self) -> tuple[Any, ...]:
        packed = self.request.pack_beside(self.identity.text)
        ticket = self.ticket
        return (self.kind, self.identity.key, self.identity.text, packed, ticket.job_id, ticket.commands, ticket.data)


@dataclass(frozen=True, slots=True)
class About:
    """What a follow-up is about: the request ``of`` this key, its result or its packed error, and the payloads."""

    of: Key
    stored: Stored | None
    error: bytes


@dataclass(frozen=True, slots=True)
class Unattended:
    """A failed request as far as a follow-up of it needs it. ``state`` is "" when there is no record."""

    state: str
    queue: str
    priority: Priority
    request: BatchRequest | None


class Delivery(Protocol):
    """What the calls must know of RQ's names. rqarm.rqjobs implements it."""

    job_prefix: str
    suspended: str

    def lists(self, queue: str) -> tuple[str, str, str]: ...

    def worker_sets(self, queue: str) -> tuple[str, str, str]: ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A result as it lies in Redis: the envelope, who wrote it, and its bytes when they are small."""

    key: Key
    owner: str
    envelope: Envelope
    inline: bytes | None

    def value(self) -> Any:
        """The value of a small result. Raises CorruptResult."""
        assert self.inline is not None, "a chunked result is read by flows.value_of"
        return codec.decode(self.envelope, self.inline)


@dataclass(frozen=True, slots=True)
class Found:
    """A record and, when it was asked for and is there, its result."""

    status: BatchStatus
    stored: Stored | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One execution as its holder sees it. ``number``: 1 = the first; ``retries`` and ``crashes`` came before it."""

    key: Key
    token: Token
    number: int
    request: BatchRequest
    kwargs: dict[str, Any]
    retries: int
    crashes: int
    queue: str
    priority: Priority
    #: seconds that it waited in line; the ticket that was started
    waited: float = 0.0
    job_id: str = ""
    #: RQ's job of the ticket lies there still, and ends with the attempt: no RQ worker is at it
    owns_job: bool = False
    #: trace context of who submitted it; "" = none
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a taker got: an attempt and the RQ list it came from ("" = it had it before); or why it got none.

    ``reason``: ``empty``, ``foreign`` (a job of others is next, in ``list``) or ``suspended``. ``last_event`` comes
    with ``empty``: where the events stood.
    """

    attempt: Attempt | None
    reason: str = ""
    list: str = ""
    last_event: str = ""


@dataclass(frozen=True, slots=True)
class Redirection:
    """What a redirect came to: a word of lua/redirect.lua, and the URIs of a ``loop``."""

    word: str
    chain: tuple[str, ...] = ()


class UnreadableRequest(VersionSkew):
    """An attempt was started whose request this version cannot read. Hand it back: ``attempt`` has all but the request.

    Without that, every worker of this version would cost the request one of its attempts.
    """

    def __init__(self, attempt: Attempt, reason: Exception) -> None:
        super().__init__(f"request {attempt.key!r} cannot be read here and was handed back: {reason}")
        self.attempt = attempt


@dataclass(frozen=True, slots=True)
class Followed:
    """What a follower finds. ``token``: of the attempt that runs or was the last, "" = not known. ``first``: the number
    of the first of ``values``, which are packed. ``found``: the record, with the result of a completed request."""

    found: Found
    token: str
    first: int
    values: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Overdue:
    """A request that the sweep found dead. ``crashes`` counts for a lapsed lease, ``job_id`` is the lost ticket's."""

    key: Key
    uri: str
    queue: str
    priority: Priority
    crashes: int = 0
    job_id: str = ""


@dataclass(frozen=True, slots=True)
class Swept:
    lapsed: tuple[Overdue, ...]
    ticketless: tuple[Overdue, ...]
    cursor: int


@dataclass(frozen=True, slots=True)
class Page:
    """Part of an index, in its order. ``total`` counts the whole index."""

    total: int
    entries: tuple[BatchStatus, ...]


@dataclass(frozen=True, slots=True)
class QuarantineEntry:
    """A request that was set aside, and why.

    ``exception``: the full name of its type; ``message`` and ``traceback`` go with it. ``kwargs``: what the handler was
    called with; of a process that died only what a retry had changed. ``info``: what the handler said beside the
    message. ``route``: "" when nobody was left who knew it. ``when``: aware, in UTC, on the server's clock.
    ``request``: None when another version wrote it. ``payloads``: None when they were not asked for. ``job_id``: of
    RQ's failed job.
    """

    key: Key
    reason: str
    uri: str
    operation: str
    request: BatchRequest | None
    route: str
    queue: str
    priority: Priority
    exception: str
    message: str
    traceback: str
    attempts: int
    crashes: int
    retries: int
    kwargs: dict[str, Any]
    info: dict[str, Any]
    submitted: datetime | None
    started: datetime | None
    when: datetime | None
    worker: str
    job_id: str
    payloads: list[Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same without the request: times in ISO 8601; ``kwargs``, ``info`` and ``payloads`` as they are."""
        named = {name: getattr(self, name) for name in self.__slots__ if name != "request"}
        named["key"], named["priority"] = str(self.key), self.priority.name.lower()
        for name in ("submitted", "started", "when"):
            named[name] = named[name].isoformat() if named[name] is not None else None
        return named


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since the namespace began, and sizes now. ``bytes``: stored results, compressed as they lie."""

    submissions: dict[str, int]
    executions: dict[str, int]
    sweeps: dict[str, int]
    bytes: int
    temporary: int
    sticky: int
    in_progress: int
    quarantined: int
    pending: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Line:
    """One queue: what waits, and who works on it.

    ``oldest_ms`` -1 = nothing waits. ``load_ms``: estimated run times of what waits; ``left_ms``: rest of what runs.
    """

    name: str
    waiting: int
    oldest_ms: int
    load_ms: int
    running: int
    left_ms: int
    workers: int


@dataclass(frozen=True, slots=True)
class LiveWorker:
    """An RQ worker that is alive. ``version`` of rqarm, "" = it does not say."""

    name: str
    state: str
    version: str
    last_heartbeat: str


@dataclass(frozen=True, slots=True)
class Census:
    """The raw numbers of a namespace, which rqarm.inspect reads. ``hot``: key, votes, uri, state, bytes."""

    now_ms: int
    families: dict[str, dict[str, str]]
    lines: tuple[Line, ...]
    workers: tuple[LiveWorker, ...]
    numbers: dict[str, int]
    hot: tuple[tuple[str, int, str, str, int], ...]
    runtimes: dict[str, int]


class Calls:
    """Every transition of one namespace, as values."""

    def __init__(self, keys: Keys, settings: Settings, delivery: Delivery) -> None:
        self.keys, self.settings, self.delivery = keys, settings, delivery

    # -- requests

    def submit(
        self,
        request: BatchRequest,
        identity: Canonical,
        ticket: Ticket,
        *,
        payload: tuple[str, bytes] | None = None,
        more: Iterable[tuple[str, bytes]] = (),
        again: bool = False,
        trace: str = "",
    ) -> Call[Found]:
        """Answer from the cache, join, or claim and queue. ``Found.status.outcome`` says which.

        ``trace``: the trace context of a new claim.

        Raises KeyConflict when the key belongs to another request, CorruptResult when a hit cannot be read, VersionSkew
        on a state this version does not know.
        """
        key, settings = identity.key, self.settings
        queue = request.queue or settings.queue
        argv = (
            identity.text,
            request.pack_beside(identity.text),
            ticket.job_id,
            ticket.commands,
            ticket.data,
            self.delivery.job_prefix,
            queue,
            int(request.priority),
            int(request.sticky),
            ms(request.ttl or 0),
            ms(settings.ttl),
            ms(request.estimated_time or 0),
            request.family,
            payload[0] if payload else "",
            payload[1] if payload else b"",
            settings.max_pending,
            settings.max_attempts,
            int(again),
            _tag_lines(request),
            *itertools.chain.from_iterable(more),
            *((trace,) if trace else ()),
        )

        def parse(reply: Any) -> Found:
            word, *rest = _words("submit", reply)
            if word == "conflict":
                raise KeyConflict(key, identity.text, _text(rest[0]))
            if word == "corrupt":
                raise _unknown_state(key, rest[0])
            if word == "new" and not rest[0]:
                return Found(_new_status(key, request, identity, queue, rest[1]), None)
            stored = _stored(key, rest[1]) if word == "hit" else None
            value = stored.value() if stored is not None and stored.inline is not None else None
            return Found(self._status(key, rest[0], _OUTCOMES[word], value), stored)

        return self._call("submit", key, argv, parse)

    def read(self, key: Key, *, with_value: bool) -> Call[Found]:
        """The record, with the result when wanted. No record: state ``unknown``."""

        def parse(reply: Any) -> Found:
            word, *rest = _words("read", reply)
            if word == "unknown":
                return Found(BatchStatus(key, State.UNKNOWN), None)
            return Found(self._status(key, rest[0]), _stored(key, rest[1]))

        return self._call("read", key, (int(with_value),), parse)

    def follow(self, key: Key, token: str, number: int) -> Call[Followed | None]:
        """What is new for a follower who knows the attempt ``token`` up to ``number``. None: there is no record."""

        def parse(reply: Any) -> Followed | None:
            word, *rest = _words("follow", reply)
            if word == "unknown":
                return None
            packed, current, first, values, stored = rest
            found = Found(_status(key, packed), _stored(key, stored))
            return Followed(found, _text(current), int(first), tuple(values))

        return self._call("follow", key, (token, number), parse)

    def locate(self, key: Key, queue: str) -> Call[BatchStatus]:
        """The record with position and eta; live workers are counted on ``queue``."""

        def parse(reply: Any) -> BatchStatus:
            word, *rest = _words("locate", reply)
            if word == "unknown":
                return BatchStatus(key, State.UNKNOWN)
            position, eta_ms = int(rest[1]), int(rest[2])
            return replace(
                self._status(key, rest[0]),
                position=position if position >= 0 else None,
                eta=eta_ms / 1000 if eta_ms >= 0 else None,
            )

        return self._call("locate", key, self.delivery.worker_sets(queue), parse)

    def find(self, key: Key) -> Command[BatchRequest | None]:
        """The request itself, as it was submitted, or None."""

        def parse(reply: Any) -> BatchRequest | None:
            packed, *uri = reply
            return None if packed is None else unpack_request(packed, _joined(uri))

        return Command(("HMGET", self.keys.status(key), "request", *URI_FIELDS), parse)

    def cancel(self, key: Key) -> Call[tuple[str, State]]:
        """``cancelled`` | ``ended`` | ``unknown``, with the state before."""
        return self._call("cancel", key, (ms(self.settings.failure_ttl),), _word_and_state("cancel"))

    def forget(self, key: Key) -> Call[tuple[str, State]]:
        """``forgotten`` | ``in_flight`` | ``unknown``, with the state before."""
        return self._call("forget", key, (), _word_and_state("forget"))

    def put(
        self, request: BatchRequest, identity: Canonical, owner: str, envelope: Envelope, inline: bytes | None
    ) -> Call[None]:
        """Store a result without an execution. Raises KeyConflict, and RqarmError when chunks are missing."""
        key = identity.key
        argv = (
            identity.text,
            request.pack_beside(identity.text),
            owner,
            request.queue or self.settings.queue,
            int(request.sticky),
            ms(request.ttl or self.settings.ttl),
            *_envelope_argv(envelope, inline),
            _tag_lines(request),
        )

        def parse(reply: Any) -> None:
            word, *rest = _words("put", reply)
            if word == "conflict":
                raise KeyConflict(key, identity.text, _text(rest[0]))
            if word == "torn":
                raise _torn(key, rest[0])

        return self._call("put", key, argv, parse)

    # -- attempts

    def start(
        self, key: Key, job_id: str, execution: str, worker: str, lease_ms: int, *, own_list: str = ""
    ) -> Call[Attempt | State]:
        """The attempt, or the state because of which the ticket is superseded (``unknown``: no record).

        ``execution`` is made by the caller; the same one again gets the same token. ``own_list``: RQ's list that the
        ticket stands in, for a caller who is no RQ worker: ticket and RQ job go with the start.
        """
        job = self.delivery.job_prefix + job_id if own_list else ""

        def parse(reply: Any) -> Attempt | State:
            word, *rest = _words("start", reply)
            if word == "started":
                return _attempt(key, rest)
            return State.UNKNOWN if word == "unknown" else _state(key, rest[0])

        return self._call("start", key, (job_id, execution, worker, lease_ms, own_list, job), parse)

    def take(
        self, lists: Sequence[str], execution: str, taker: str, worker: str, lease_ms: int, *, for_rq: bool = False
    ) -> Call[Taken]:
        """Pop and start the next request of RQ's lists, in their order.

        ``taker`` asks one at a time; the same ``execution`` again gets the same attempt. ``for_rq``: the taker is an RQ
        worker, for which a job of others in front of a list is the next one, and which can be suspended.

        Raises UnreadableRequest.
        """

        def parse(reply: Any) -> Taken:
            word, *rest = _words("take", reply)
            if word == "started":
                attempt = _attempt(Key(_text(rest[0])), rest[2:], owns_job=for_rq)
                return Taken(attempt, list=_text(rest[1]))
            if word == "empty":
                return Taken(None, word, last_event=_text(rest[0]))
            return Taken(None, word, list=_text(rest[0]) if rest else "")

        suspended = self.delivery.suspended if for_rq else ""
        argv = (execution, taker, worker, lease_ms, self.delivery.job_prefix, suspended, *lists)
        return self._index_call("take", self.keys.named("leases"), argv, parse)

    def admit(
        self, attempt: Attempt, limit: str, max_running: int, ticket: ParkingTicket, *, delay_ms: int
    ) -> Call[bool]:
        """True: the attempt has one of the limit's places. False: it was handed back and waits. Raises LeaseLost."""
        waits = (ticket.job_id, ticket.commands, ticket.data, ticket.recall, delay_ms)
        word = _held_word("admit", attempt.key)
        argv = (attempt.token, limit, max_running, *waits, self._own_job(attempt))
        return self._call("admit", attempt.key, argv, lambda reply: word(reply) == "admitted")

    def renew(self, attempt: Attempt, lease_ms: int, progress: bytes = b"") -> Call[int]:
        """Keep an attempt ours for another ``lease_ms``; the new deadline in Unix ms on the server's clock.

        Raises LeaseLost when another attempt holds the key, or nobody: stop the handler.
        """

        def parse(reply: Any) -> int:
            return int(_held(attempt.key, _words("renew", reply))[1])

        return self._call("renew", attempt.key, (attempt.token, lease_ms, progress), parse)

    def emit(self, attempt: Attempt, number: int, packed: bytes) -> Call[str]:
        """``emitted`` | ``already``. Raises LeaseLost. ``number`` counts what the attempt emits, from 1."""
        argv = (attempt.token, number, EMISSIONS_KEPT, EMITTED_BYTES, packed)
        return self._call("emit", attempt.key, argv, _held_word("emit", attempt.key))

    def complete(
        self,
        attempt: Attempt,
        envelope: Envelope,
        inline: bytes | None,
        *,
        sticky: bool,
        ttl_ms: int,
        follow_up: NextUp | None = None,
        wants_payloads: bool = False,
    ) -> Call[list[Any]]:
        """Store the result; the payloads if they are wanted. ``follow_up``: the callback.

        Raises LeaseLost, and RqarmError when chunks are missing.
        """

        def parse(reply: Any) -> list[Any]:
            word, *rest = _held(attempt.key, _words("complete", reply))
            if word == "torn":
                raise _torn(attempt.key, rest[0])
            return [codec.unpack(packed) for packed in (rest[0] if rest and rest[0] else ())]

        job = self._own_job(attempt)
        argv = (attempt.token, int(sticky), ttl_ms, attempt.request.family, job, *_envelope_argv(envelope, inline))
        if follow_up is not None:
            argv += (*follow_up.argv, ms(self.settings.failure_ttl))
        elif wants_payloads:
            argv += ("",)
        return self._call("complete", attempt.key, argv, parse)

    def fail(
        self,
        attempt: Attempt,
        error: bytes,
        *,
        failure_ttl_ms: int,
        negative_ms: int,
        reason: str = "",
        note: bytes = b"",
        follow_ups: Sequence[NextUp] = (),
    ) -> Call[str]:
        """``failed`` | ``already``. With a ``reason`` it is set aside. Raises LeaseLost."""
        told = [argument for each in follow_ups for argument in each.argv]
        argv = (attempt.token, error, failure_ttl_ms, negative_ms, reason, note, QUARANTINE_KEPT, *told)
        return self._call("fail", attempt.key, argv, _held_word("fail", attempt.key))

    def retry(self, attempt: Attempt, ticket: Ticket, *, delay_ms: int, kwargs: bytes, error: bytes) -> Call[str]:
        """``retried`` | ``already``. Raises LeaseLost."""
        job = self._own_job(attempt)
        argv = (attempt.token, ticket.job_id, ticket.commands, ticket.data, delay_ms, kwargs, error, job)
        return self._call("retry", attempt.key, argv, _held_word("retry", attempt.key))

    def release(self, attempt: Attempt, ticket: Ticket) -> Call[str]:
        """``released`` | ``already``. Raises LeaseLost."""
        argv = (attempt.token, ticket.job_id, ticket.commands, ticket.data, self._own_job(attempt))
        return self._call("release", attempt.key, argv, _held_word("release", attempt.key))

    def redirect(
        self,
        attempt: Attempt,
        target: Key,
        *,
        failure_ttl_ms: int,
        is_submitted: bool = True,
        follow_ups: Sequence[NextUp] = (),
    ) -> Call[Redirection]:
        """What has become of the attempt because of the target. Raises LeaseLost.

        ``is_submitted`` = False: only look whether it may be done; ``gone`` says yes. ``follow_ups``: who is told when
        the target has ended already.
        """

        def parse(reply: Any) -> Redirection:
            word, *rest = _held(attempt.key, _words("redirect", reply))
            chain = (_text(uri).split("\n", 2)[-1] for uri in rest[0]) if word == "loop" else ()
            return Redirection(word, tuple(chain))

        argv: tuple[Any, ...] = (attempt.token, target, failure_ttl_ms, int(is_submitted), self._own_job(attempt))
        if is_submitted:
            argv += tuple(part for follow_up in follow_ups for part in follow_up.argv)
        return self._call("redirect", attempt.key, argv, parse)

    def need(
        self, attempt: Attempt, needed: Sequence[Key], ticket: ParkingTicket, *, delay_ms: int
    ) -> Call[Redirection]:
        """The attempt ends, to be called up when all of these have ended: ``waiting``, ``ready`` (none is in flight),
        ``loop``, ``full``, ``already``. Raises LeaseLost.
        """

        def parse(reply: Any) -> Redirection:
            word, *rest = _held(attempt.key, _words("need", reply))
            chain = (_text(uri).split("\n", 2)[-1] for uri in rest[0]) if word == "loop" else ()
            return Redirection(word, tuple(chain))

        waits = (ticket.job_id, ticket.commands, ticket.data, ticket.recall, delay_ms)
        argv = (attempt.token, *waits, self._own_job(attempt), *needed)
        return self._call("need", attempt.key, argv, parse)

    def ticket(self, key: Key) -> Command[tuple[str, str]]:
        """The state of a request and the id of its RQ job; "" for what is not there."""
        argv = ("HMGET", self.keys.status(key), "state", "job_id")
        return Command(argv, lambda reply: (_text(reply[0] or b""), _text(reply[1] or b"")))

    def drop_job(self, attempt: Attempt) -> Command[int]:
        """Delete the RQ job of an attempt."""
        return Command(("UNLINK", self.delivery.job_prefix + attempt.job_id), int)

    def _own_job(self, attempt: Attempt) -> str:
        """RQ's job that ends with the attempt; "" = an RQ worker is at it and ends it."""
        return self.delivery.job_prefix + attempt.job_id if attempt.owns_job else ""

    # -- follow-ups

    def about(self, key: Key) -> Command[About | None]:
        """What a follow-up is about; None when that is gone."""

        def parse(reply: Any) -> About | None:
            of, error, *result = reply
            if of is None:
                return None
            return About(Key(_text(of)), _stored(Key(_text(of)), result), error or LAPSED)

        argv = ("HMGET", self.keys.named("followup", key=key), "of", "error", "owner", "envelope", "bytes", "root")
        return Command(argv, parse)

    def conclude(self, attempt: Attempt) -> Call[str]:
        """End a follow-up that has run: ``concluded`` | ``already``. Raises LeaseLost."""
        return self._call(
            "conclude", attempt.key, (attempt.token, self._own_job(attempt)), _held_word("conclude", attempt.key)
        )

    def unattended(self, kind: FollowUp, below: str, limit: int) -> Command[list[tuple[Key, int]]]:
        """Failures of which nobody has been told, newest first: keys and scores.

        ``below``: "+inf", or "(" and a score.
        """

        def parse(reply: Any) -> list[tuple[Key, int]]:
            # RESP3 answers pairs, RESP2 a flat list
            pairs = reply if reply and isinstance(reply[0], list | tuple) else _rows(reply or [], 2)
            return [(Key(_text(key)), int(float(score))) for key, score in pairs]

        name = self.keys.named("unattended", follow_up=kind)
        return Command(("ZREVRANGEBYSCORE", name, below, "-inf", "WITHSCORES", "LIMIT", 0, limit), parse)

    def failed_request(self, key: Key) -> Command[Unattended]:
        """What a follow-up of a failure takes over from the request."""

        def parse(reply: Any) -> Unattended:
            state, queue, priority, packed, *uri = reply
            try:
                request = None if packed is None else unpack_request(packed, _joined(uri))
            except (VersionSkew, InvalidRequest):
                request = None  # a worker of another version can read it
            return Unattended(_text(state or b""), _text(queue or b""), Priority(int(priority or 1)), request)

        fields = ("state", "queue", "priority", "request", *URI_FIELDS)
        return Command(("HMGET", self.keys.status(key), *fields), parse)

    def attend(self, key: Key, since: int, follow_up: NextUp) -> Call[str]:
        """Tell somebody of a failure: ``attended`` | ``already``."""
        return self._call("attend", key, (since, *follow_up.argv), _word("attend"))

    # -- traces

    def link(self, key: Key, context: str) -> Call[str]:
        """Leave the context of a submit for the execution; the context of that where it is known already, else ""."""

        def parse(reply: Any) -> str:
            word, *rest = _words("link", reply)
            return _text(rest[0]) if word == "linked" else ""

        return self._call("link", key, (context,), parse)

    def trace(self, attempt: Attempt, context: str) -> Call[list[str]]:
        """Tell the context of an attempt that is about to end; those of who has joined it. Raises LeaseLost."""

        def parse(reply: Any) -> list[str]:
            _, contexts = _held(attempt.key, _words("trace", reply))
            return [_text(context) for context in contexts]

        return self._call("trace", attempt.key, (attempt.token, context), parse)

    # -- healing

    def crash(
        self, key: Key, token: Token | None, ticket: Ticket, *, delay_ms: int, error: bytes, note: bytes = b""
    ) -> Call[str]:
        """``requeued`` | ``quarantined`` | ``already`` | ``alive``. Without a token the lease must have lapsed."""
        waits = (ticket.job_id, ticket.commands, ticket.data, delay_ms)
        return self._call("crash", key, (token or "", *waits, self.settings.max_attempts, error, note), _word("crash"))

    def revive(self, found: Overdue, ticket: Ticket) -> Call[str]:
        """``revived`` | ``already`` | ``alive``."""
        return self._call(
            "revive", found.key, (found.job_id, ticket.job_id, ticket.commands, ticket.data), _word("revive")
        )

    def sweep(self, queue: str, cursor: int = 0) -> Call[Swept]:
        """One step of the search for the dead on this queue; go on while ``cursor`` is not 0."""

        def parse(reply: Any) -> Swept:
            _, lapsed, ticketless, cursor = _words("sweep", reply)
            return Swept(
                tuple(replace(_overdue(row), crashes=int(row[4])) for row in _rows(lapsed, 5)),
                tuple(replace(_overdue(row), job_id=_text(row[4])) for row in _rows(ticketless, 5)),
                int(cursor),
            )

        lease_ms = ms(self.settings.lease)
        lists = self.delivery.lists(queue)
        argv = (queue, cursor, STEP, lease_ms, self.delivery.job_prefix, QUARANTINE_KEPT, *lists)
        return self._index_call("sweep", self.keys.named("leases"), argv, parse)

    def queues(self) -> Command[list[str]]:
        """The queues that were ever used, in no order."""
        return Command(("SMEMBERS", self.keys.named("queues")), lambda reply: sorted(_text(name) for name in reply))

    def claim_sweep(self) -> Command[bool]:
        """True for the first who asks within a third of a lease. A throttle, not a lock: sweeps may overlap."""
        argv = ("SET", self.keys.named("swept"), "1", "NX", "PX", ms(self.settings.lease / 3))
        return Command(argv, lambda reply: reply is not None and reply is not False)

    # -- quarantine

    def set_aside(self, limit: int | None = None) -> Command[list[Key]]:
        """The keys of what is in quarantine, newest first."""
        argv = ("ZREVRANGE", self.keys.named("quarantine"), 0, -1 if limit is None else limit - 1)
        return Command(argv, lambda reply: [Key(_text(key)) for key in reply])

    def entry(self, key: Key) -> Command[QuarantineEntry | State]:
        """What is known of a request that is set aside; the state of one that is not."""
        return Command(("HMGET", self.keys.status(key), *_ENTRY_FIELDS), lambda values: _entry(key, values))

    def payloads(self, key: Key) -> Command[list[Any]]:
        """The payloads that were submitted with a request, in no order."""
        name = self.keys.named("callbacks", key=key)
        return Command(("HVALS", name), lambda reply: [codec.unpack(packed) for packed in reply])

    def requeue(self, entry: QuarantineEntry, ticket: Ticket, dismissal: str) -> Call[str]:
        """``requeued`` | ``already`` | ``superseded`` | ``in_flight`` | ``ended`` | ``unknown``."""
        argv = (entry.job_id, ticket.job_id, ticket.commands, ticket.data, dismissal)
        return self._call("requeue", entry.key, argv, _word("requeue"))

    def discard(self, entry: QuarantineEntry, dismissal: str) -> Call[str]:
        """``discarded`` | ``superseded`` | ``in_flight`` | ``ended`` | ``unknown``."""
        return self._call("discard", entry.key, (entry.job_id, dismissal), _word("discard"))

    # -- views

    def outlook(self, key: Key, queue: str) -> tuple[Command[Any], ...]:
        """What a submit looks at beside the record.

        When the failure stops to answer and the lease ends, in Unix ms as text or None; the server's time in seconds
        and microseconds; how many wait in the queue.
        """
        deadlines = ("HMGET", self.keys.status(key), "negative_until", "lease_until")
        waiting = ("ZCARD", self.keys.named("pending", queue=queue))
        return Command(deadlines, list), Command(("TIME",), tuple), Command(waiting, int)

    def browse(self, index: str, offset: int, limit: int) -> Call[Page]:
        """A page of an index by its full key name."""

        def parse(reply: Any) -> Page:
            _, total, *rows = _words("browse", reply)
            return Page(int(total), tuple(self._status(Key(_text(key)), fields) for key, fields in _rows(rows, 2)))

        return self._index_call("browse", index, (offset, limit), parse)

    def clear(
        self,
        *,
        temporary_only: bool,
        step: int = STEP,
        route: str = "",
        pattern: str = "",
        age_ms: int = 0,
        cursor: str = "",
    ) -> Call[tuple[int, int, str]]:
        """One step: (forgotten, looked at, cursor). Go on from the cursor while the second is not 0."""

        def parse(reply: Any) -> tuple[int, int, str]:
            _, cleared, looked_at, behind = _words("clear", reply)
            return int(cleared), int(looked_at), _text(behind)

        argv = ("(+inf" if temporary_only else "+inf", step, route, pattern, age_ms, cursor)
        return self._index_call("clear", self.keys.named("results"), argv, parse)

    def stats(self) -> Call[Stats]:
        """The counters and sizes of the namespace."""

        def parse(reply: Any) -> Stats:
            _, submissions, executions, sweeps, size, temporary, sticky, running, quarantined, waiting = _words(
                "stats", reply
            )
            return Stats(
                submissions=_outcomes(submissions),
                executions=_outcomes(executions),
                sweeps=_outcomes(sweeps),
                bytes=int(size),
                temporary=int(temporary),
                sticky=int(sticky),
                in_progress=int(running),
                quarantined=int(quarantined),
                pending=_counts(waiting),
            )

        return self._index_call("stats", self.keys.named("queues"), (), parse)

    def overview(self) -> Call[Census]:
        """Counters, lines, workers and sizes of the namespace, in one look that only reads."""

        def parse(reply: Any) -> Census:
            _, now_ms, families, lines, workers, numbers, hot, runtimes = _words("overview", reply)
            return Census(
                now_ms=int(now_ms),
                families={_text(name): _texts(counted) for name, counted in _rows(families, 2)},
                lines=tuple(Line(_text(name), *map(int, rest)) for name, *rest in lines),
                workers=tuple(LiveWorker(*map(_text, row)) for row in _rows(workers, 4)),
                numbers=_counts(numbers),
                hot=tuple(
                    (_text(key), int(votes), _text(uri).split("\n", 2)[-1], _text(state), int(float(size)))
                    for key, votes, uri, state, size in _rows(hot, 5)
                ),
                runtimes=_counts(runtimes),
            )

        argv = (self.settings.queue, *self.delivery.worker_sets("*"))
        return self._index_call("overview", self.keys.named("queues"), argv, parse)

    def server_info(self) -> Command[dict[str, Any]]:
        """INFO: memory, statistics and errors of the whole server, as redis-py reads them."""
        argv = ("INFO", "server", "clients", "memory", "stats", "commandstats", "errorstats")
        return Command(argv, lambda reply: dict(reply) if isinstance(reply, dict) else {})

    def waited_for(self) -> Command[int]:
        """How many keys somebody waits for: channels of ours with a subscription."""
        return Command(("PUBSUB", "CHANNELS", self.keys.pubsub_prefix + "*"), len)

    def chunk(self, stored: Stored, n: int) -> Command[bytes | None]:
        """The n-th stored piece of a result, or None when it is gone."""
        return Command(("GET", self.keys.chunk(stored.key, stored.owner, n)), lambda reply: reply)

    def stage(self, key: Key, owner: str, n: int, piece: bytes) -> Command[None]:
        """Write a piece ahead of the commit; it goes away by itself when the commit never comes."""
        life_ms = ms(self.settings.timeout + self.settings.lease)
        return Command(("SET", self.keys.chunk(key, owner, n), piece, "PX", life_ms), lambda _: None)

    def unstage(self, key: Key, owner: str, chunks: int) -> Command[None]:
        """Drop pieces whose commit will not come."""
        return Command(("UNLINK", *(self.keys.chunk(key, owner, n) for n in range(chunks))), lambda _: None)

    def events(self, after: str, *, limit: int = STEP) -> Command[list[tuple[str, dict[str, str]]]]:
        """Events behind the id ``after`` that are there already."""
        return Command(("XRANGE", self.keys.named("events"), f"({after}", "+", "COUNT", limit), _entries)

    def next_events(self, after: str, timeout_ms: int) -> Command[list[tuple[str, dict[str, str]]]]:
        """Events behind the id ``after``, waiting up to ``timeout_ms`` for the first."""

        def parse(reply: Any) -> list[tuple[str, dict[str, str]]]:
            if not reply:
                return []
            streams = reply.values() if isinstance(reply, dict) else [stream[1] for stream in reply]
            entries = next(iter(streams))
            # RESP3 nests the entries of a stream once more than RESP2
            return _entries(entries[0] if entries and isinstance(entries[0], list) else entries)

        argv = ("XREAD", "COUNT", STEP, "BLOCK", timeout_ms, "STREAMS", self.keys.named("events"), after)
        return Command(argv, parse, waits=True)

    def newest_event(self) -> Command[str]:
        """The id of the newest event; ``0-0`` when there is none."""
        argv = ("XREVRANGE", self.keys.named("events"), "+", "-", "COUNT", 1)
        return Command(argv, lambda reply: _entries(reply)[0][0] if reply else "0-0")

    # -- how a call is made

    def _status(self, key: Key, packed: bytes, outcome: Outcome | None = None, value: Any = None) -> BatchStatus:
        """The record as a status; what is completed has a URL where the manager knows one."""
        status = _status(key, packed, outcome, value)
        url = self.settings.result_url
        if url is None or status.state is not State.COMPLETED:
            return status
        return replace(status, url=url.replace("{key}", key))

    def _call(self, verb: str, key: Key, argv: Sequence[Any], parse: Callable[[Any], T]) -> Call[T]:
        return Call(script(verb), (self.keys.status(key),), (self.keys.prefix, key, *argv), parse)

    def _index_call(self, verb: str, index: str, argv: Sequence[Any], parse: Callable[[Any], T]) -> Call[T]:
        return Call(script(verb), (index,), (self.keys.prefix, *argv), parse)


def ms(seconds: float) -> int:
    """Seconds to milliseconds; what is above 0 stays above 0."""
    return max(1, round(seconds * 1000)) if seconds > 0 else 0


def foreign_data(keys: Iterable[str], error: Exception) -> ForeignData:
    """What a WRONGTYPE answer means: somebody else wrote under our names."""
    return ForeignData(
        f"{', '.join(keys)}, or a key of the same request, holds data that rqarm did not write ({error}): look at it "
        "with TYPE, move it away or give rqarm another namespace"
    )


_MISSING = ord("-")
#: stored when a lease lapses and nobody is left to say why
LAPSED = codec.pack_error("LeaseLapsed", "the worker fell silent for longer than its lease", "")


# a dictionary answers ten times as fast as the constructor of an enum
_STATES: dict[bytes, State] = {state.value.encode(): state for state in State}
_OUTCOMES: dict[str, Outcome] = {outcome.value: outcome for outcome in Outcome}
_WORDS: dict[str, dict[bytes, str]] = {s.name: {word.encode(): word for word in s.outcomes} for s in all_scripts()}


def _words(verb: str, reply: Any) -> list[Any]:
    """The reply with its first element as a known word. Raises VersionSkew."""
    if isinstance(reply, list) and reply:
        word = _WORDS[verb].get(reply[0]) if isinstance(reply[0], bytes) else None
        if word is not None:
            return [word, *reply[1:]]
    raise VersionSkew(f"{verb} answered {reply!r:.100}, which this version of rqarm does not know: upgrade all parts")


def _word(verb: str) -> Callable[[Any], str]:
    return lambda reply: str(_words(verb, reply)[0])


def _word_and_state(verb: str) -> Callable[[Any], tuple[str, State]]:
    def parse(reply: Any) -> tuple[str, State]:
        word, *rest = _words(verb, reply)
        return word, State(_text(rest[0])) if rest else State.UNKNOWN

    return parse


def _held(key: Key, words: list[Any]) -> list[Any]:
    if words[0] == "lost":
        raise LeaseLost(key, _text(words[1]))
    return words


def _held_word(verb: str, key: Key) -> Callable[[Any], str]:
    return lambda reply: str(_held(key, _words(verb, reply))[0])


def _envelope_argv(envelope: Envelope, inline: bytes | None) -> tuple[Any, ...]:
    return (envelope.stored, envelope.chunks, _packed_envelope(envelope), inline or b"")


def _tag_lines(request: BatchRequest) -> str:
    """The tags as the record has them: a line break before and behind each; "" = none."""
    return "".join(f"\n{tag}" for tag in request.tags) + "\n" if request.tags else ""


def _packed_envelope(envelope: Envelope) -> bytes:
    """A line ``name=value`` for each field: people read it in redis-cli, and one value is cheaper than ten."""
    parts = [part if isinstance(part, bytes) else part.encode() for part in envelope.to_fields()]
    return b"\n".join(b"%s=%s" % pair for pair in zip(parts[::2], parts[1::2], strict=True))


def _stored(key: Key, values: list[bytes | None]) -> Stored | None:
    if not values or values[0] is None:
        return None
    owner, packed, inline, *root = values
    envelope = _envelope(packed or b"")
    # the result of an alias lies under the key of its root
    return Stored(
        Key(_text(root[0])) if root and root[0] else key,
        _text(owner),
        envelope,
        None if envelope.chunks else inline or b"",
    )


@lru_cache(maxsize=1024)
def _envelope(packed: bytes) -> Envelope:
    """Cached, because what is read often is read with the same envelope, and it takes longer than its value."""
    lines = (line.partition(b"=") for line in packed.split(b"\n"))
    return Envelope.from_fields({name: value for name, _, value in lines})


def _attempt(key: Key, values: list[Any], *, owns_job: bool = False) -> Attempt:
    token, number, packed, kwargs, retries, crashes, queue, priority, job_id, pushed_ms, started_ms, *rest = values
    uri, trace = rest[:3], _text(rest[3]) if len(rest) > 3 else ""
    waited = max(0, int(started_ms) - int(pushed_ms or started_ms)) / 1000

    def attempt(request: BatchRequest, arguments: dict[str, Any]) -> Attempt:
        return Attempt(
            key,
            Token(int(token)),
            int(number),
            request,
            arguments,
            int(retries or 0),
            int(crashes or 0),
            _text(queue),
            Priority(int(priority)),
            waited,
            _text(job_id),
            owns_job,
            trace,
        )

    try:
        return attempt(unpack_request(packed or b"", _joined(uri)), codec.unpack(kwargs) if kwargs else {})
    except (VersionSkew, InvalidRequest, CorruptResult) as reason:
        raise UnreadableRequest(attempt(NO_REQUEST, {}), reason) from reason


#: stands in for a request that cannot be read
NO_REQUEST = BatchRequest("", operation="unreadable")


def _fields(packed: bytes) -> dict[str, bytes | None]:
    """The record as prelude.lua wrote it: netstrings in the order of RECORD_FIELDS, ``-`` for what is missing."""
    fields: dict[str, bytes | None] = {}
    at = 0
    for name in RECORD_FIELDS:
        if packed[at] == _MISSING:
            fields[name] = None
            at += 1
        else:
            colon = packed.index(b":", at)
            start, at = colon + 1, colon + 1 + int(packed[at:colon])
            fields[name] = packed[start:at]
    return fields


def _status(key: Key, packed: bytes, outcome: Outcome | None = None, value: Any = None) -> BatchStatus:
    field = _fields(packed)
    est_ms = int(field["est_ms"] or 0)
    fraction, message = _progress(field["progress"])
    return BatchStatus(
        key=key,
        state=_state(key, field["state"]) if field["state"] else State.UNKNOWN,
        outcome=outcome,
        uri=_text(_joined([field[name] for name in URI_FIELDS])).split("\n", 2)[-1],
        sticky=field["sticky"] == b"1",
        submitted=_time(field["submitted_ms"]),
        started=_time(field["started_ms"]),
        ended=_time(field["ended_ms"]),
        estimated_time=est_ms / 1000 if est_ms else None,
        progress=fraction,
        progress_message=message,
        attempts=int(field["attempts"] or 0),
        error=codec.unpack_error(field["error"] or LAPSED) if field["error"] is not None else None,
        worker=_text(field["worker"]) if field["worker"] else None,
        queue=_text(field["queue"] or b""),
        quarantined=field["quarantined"] is not None,
        reason=_reason(field["quarantined"]),
        redirect=Key(_text(field["alias"])) if field["alias"] else None,
        value=value,
    )


def _reason(word: bytes | None) -> str:
    """Why it was set aside. An earlier form knew one reason and wrote 1 for it."""
    text = _text(word or b"")
    return str(Reason.POISON) if text == "1" else text


_ENTRY_FIELDS = (
    "state", "quarantined", "request", "queue", "priority", "error", "note", "attempts", "crashes", "retries", "kwargs",
    "submitted_ms", "started_ms", "ended_ms", "worker", "job_id", *URI_FIELDS,
)  # fmt: skip


def _entry(key: Key, values: list[bytes | None]) -> QuarantineEntry | State:
    field = dict(zip(_ENTRY_FIELDS, values, strict=True))
    state = _state(key, field["state"]) if field["state"] else State.UNKNOWN
    if state is not State.FAILED or field["quarantined"] is None:
        return state
    identity = _joined(values[-len(URI_FIELDS) :])
    _, operation, uri = [*_text(identity).split("\n", 2), "", ""][:3]
    try:
        request = unpack_request(field["request"] or b"", identity)
    except (VersionSkew, InvalidRequest, CorruptResult):
        request = None
    error, note = codec.unpack_error(field["error"] or LAPSED), _mapping(field["note"])
    return QuarantineEntry(
        key=key,
        reason=_reason(field["quarantined"]),
        uri=uri,
        operation=operation,
        request=request,
        route=str(note.get("route", "")),
        queue=_text(field["queue"] or b""),
        priority=Priority(int(field["priority"] or 1)),
        exception=error["type"],
        message=error["message"],
        traceback=error["traceback"],
        attempts=int(field["attempts"] or 0),
        crashes=int(field["crashes"] or 0),
        retries=int(field["retries"] or 0),
        kwargs={**note.get("kwargs", {}), **_mapping(field["kwargs"])},
        info=note.get("info", {}),
        submitted=_time(field["submitted_ms"]),
        started=_time(field["started_ms"]),
        when=_time(field["ended_ms"]),
        worker=_text(field["worker"] or b""),
        job_id=_text(field["job_id"] or b""),
    )


def _mapping(packed: bytes | None) -> dict[str, Any]:
    """What an entry can be shown without: bytes that cannot be read are left out."""
    try:
        found = codec.unpack(packed) if packed else {}
    except CorruptResult:
        found = {}
    return found if isinstance(found, dict) else {}


def _new_status(key: Key, request: BatchRequest, identity: Canonical, queue: str, fresh: list[int]) -> BatchStatus:
    """The record of a claim that was made now: the caller knows all of it but the time and what was learned."""
    submitted_ms, est_ms = (int(text) for text in fresh)
    return BatchStatus(
        key=key,
        state=State.PENDING,
        outcome=Outcome.NEW,
        uri=identity.uri,
        sticky=request.sticky,
        submitted=datetime.fromtimestamp(submitted_ms / 1000, UTC),
        estimated_time=est_ms / 1000 if est_ms else None,
        queue=queue,
    )


def _joined(pieces: Iterable[bytes | None]) -> bytes:
    return b"".join(piece or b"" for piece in pieces)


def _state(key: Key, word: Any) -> State:
    state = _STATES.get(word)
    if state is None:
        raise _unknown_state(key, word)
    return state


def _unknown_state(key: Key, word: Any) -> VersionSkew:
    return VersionSkew(
        f"request {key!r} is in state {_text(word)!r}, which this version of rqarm does not know: upgrade, or forget it"
    )


def _torn(key: Key, missing: Any) -> RqarmError:
    return RqarmError(f"{int(missing)} pieces of the result of {key!r} are gone before its commit: write it again")


def _progress(packed: bytes | None) -> tuple[float | None, str]:
    if not packed:
        return None, ""
    told = json.loads(packed)
    return float(told["fraction"]), str(told.get("message", ""))


def _time(text: bytes | None) -> datetime | None:
    return datetime.fromtimestamp(int(text) / 1000, UTC) if text else None


def _text(raw: Any) -> str:
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)


def _rows(flat: Sequence[Any], width: int) -> list[Sequence[Any]]:
    return [flat[i : i + width] for i in range(0, len(flat), width)]


def _overdue(row: Sequence[Any]) -> Overdue:
    key, uri, queue, priority, _ = row
    return Overdue(Key(_text(key)), _text(uri).split("\n", 2)[-1], _text(queue), Priority(int(priority)))


def _counts(flat: list[Any]) -> dict[str, int]:
    return {_text(name): int(n) for name, n in _rows(flat, 2)}


def _outcomes(flat: list[Any]) -> dict[str, int]:
    """The counters that are plain words; beside them stand those of ``tally``, whose names have a colon or a number."""
    return {name: int(n) for name, n in _texts(flat).items() if name.replace("_", "").isalpha() and n.isdigit()}


def _texts(flat: list[Any]) -> dict[str, str]:
    return {_text(name): _text(value) for name, value in _rows(flat, 2)}


def _entries(raw: Iterable[Any]) -> list[tuple[str, dict[str, str]]]:
    found = []
    for entry_id, fields in raw:
        pairs = fields.items() if isinstance(fields, dict) else _rows(fields, 2)
        found.append((_text(entry_id), {_text(name): _text(value) for name, value in pairs}))
    return found


# -- for the modules that read answers of scripts of their own (rqarm.browse)

read_words, read_status, read_envelope, read_events = _words, _status, _envelope, _entries
text_of, joined, rows = _text, _joined, _rows
