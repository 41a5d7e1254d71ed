"""What to say to Redis.

No I/O here: a function returns a Call, the managers run it. Keys come from rqarm.keys, what answers become is in
rqarm.replies. Everything in milliseconds is named so; callers speak seconds. A call that only one view of an operator
needs stands with it in rqarm.browse.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

from rqarm import packing
from rqarm.codec import Envelope, pack_envelope
from rqarm.config import Settings
from rqarm.errors import InvalidRequest, KeyConflict, VersionSkew
from rqarm.keys import URI_FIELDS, Keys
from rqarm.model import BatchStatus, FollowUp, Key, Outcome, Priority, State, Token
from rqarm.replies import (
    ENTRY_FIELDS,
    LAPSED,
    OUTCOMES,
    About,
    Attempt,
    Census,
    Followed,
    Found,
    Line,
    LiveWorker,
    Overdue,
    Page,
    QuarantineEntry,
    Redirection,
    Stats,
    Stored,
    Swept,
    Taken,
    Unattended,
    held,
    held_word,
    joined,
    read_attempt,
    read_counts,
    read_entry,
    read_events,
    read_outcomes,
    read_overdue,
    read_state,
    read_status,
    read_stored,
    read_texts,
    read_words,
    redirection,
    rows,
    status_of_new,
    text_of,
    torn,
    unknown_state,
    uri_in,
    word_and_state,
    word_of,
)
from rqarm.request import BatchRequest
from rqarm.request import unpack as unpack_request
from rqarm.scripts import Script, script
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
    """An RQ job that was recorded, not sent: its id, and the commands that create it as the prelude replays them.

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


class Delivery(Protocol):
    """What the calls must know of RQ's names. rqarm.rqjobs implements it."""

    job_prefix: str
    suspended: str

    def lists(self, queue: str) -> tuple[str, str, str]: ...

    def worker_sets(self, queue: str) -> tuple[str, str, str]: ...


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
            word, *rest = read_words("submit", reply)
            if word == "conflict":
                raise KeyConflict(key, identity.text, text_of(rest[0]))
            if word == "corrupt":
                raise unknown_state(key, rest[0])
            if word == "new" and not rest[0]:
                return Found(status_of_new(key, request, identity, queue, rest[1]), None)
            stored = read_stored(key, rest[1]) if word == "hit" else None
            value = stored.value() if stored is not None and stored.inline is not None else None
            return Found(self._status(key, rest[0], OUTCOMES[word], value), stored)

        return self._call("submit", key, argv, parse)

    @cached_property
    def confirmations(self) -> tuple[Command[bool], ...]:
        """What stands behind submits in their round trip: whether they are as safe as the settings ask. () = not asked.

        It waits for what its connection has written so far. Redis: WAITAOF, WAIT.
        """
        settings = self.settings
        within = ms(settings.durable_timeout)
        if settings.durability == "synced":
            return (Command(("WAITAOF", 1, 0, within), lambda reply: int(reply[0]) >= 1),)
        if settings.durability == "replicated":
            wanted = settings.durable_replicas
            return (Command(("WAIT", wanted, within), lambda reply: int(reply) >= wanted),)
        return ()

    def read(self, key: Key, *, with_value: bool) -> Call[Found]:
        """The record, with the result when wanted. No record: state ``unknown``."""

        def parse(reply: Any) -> Found:
            word, *rest = read_words("read", reply)
            if word == "unknown":
                return Found(BatchStatus(key, State.UNKNOWN), None)
            return Found(self._status(key, rest[0]), read_stored(key, rest[1]))

        return self._call("read", key, (int(with_value),), parse)

    @staticmethod
    def told(key: Key, said: bytes) -> Found | None:
        """The end of a request as its wake-up tells it, with the result; None = it does not, read the record."""
        word, _, rest = said.partition(b":")
        size, is_told, packed = rest.partition(b":")
        if word != b"completed" or not is_told or not size.isdigit():
            return None
        stored = read_stored(key, [b"", packed[: int(size)], packed[int(size) :]])
        return Found(BatchStatus(key, State.COMPLETED), stored)

    def follow(self, key: Key, token: str, number: int) -> Call[Followed | None]:
        """What is new for a follower who knows the attempt ``token`` up to ``number``. None: there is no record."""

        def parse(reply: Any) -> Followed | None:
            word, *rest = read_words("follow", reply)
            if word == "unknown":
                return None
            packed, current, first, values, stored = rest
            found = Found(read_status(key, packed), read_stored(key, stored))
            return Followed(found, text_of(current), int(first), tuple(values))

        return self._call("follow", key, (token, number), parse)

    def locate(self, key: Key, queue: str) -> Call[BatchStatus]:
        """The record with position and eta; live workers are counted on ``queue``."""

        def parse(reply: Any) -> BatchStatus:
            word, *rest = read_words("locate", reply)
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
            return None if packed is None else unpack_request(packed, joined(uri))

        return Command(("HMGET", self.keys.status(key), "request", *URI_FIELDS), parse)

    def cancel(self, key: Key) -> Call[tuple[str, State]]:
        """``cancelled`` | ``ended`` | ``unknown``, with the state before."""
        return self._call("cancel", key, (ms(self.settings.failure_ttl),), word_and_state("cancel"))

    def forget(self, key: Key) -> Call[tuple[str, State]]:
        """``forgotten`` | ``in_flight`` | ``unknown``, with the state before."""
        return self._call("forget", key, (), word_and_state("forget"))

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
            word, *rest = read_words("put", reply)
            if word == "conflict":
                raise KeyConflict(key, identity.text, text_of(rest[0]))
            if word == "torn":
                raise torn(key, rest[0])

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
            word, *rest = read_words("start", reply)
            if word == "started":
                return read_attempt(key, rest)
            return State.UNKNOWN if word == "unknown" else read_state(key, rest[0])

        return self._call("start", key, (job_id, execution, worker, lease_ms, own_list, job), parse)

    def take(
        self,
        lists: Sequence[str],
        execution: str,
        taker: str,
        worker: str,
        lease_ms: int,
        *,
        for_rq: bool = False,
        is_last: bool = False,
    ) -> Call[Taken]:
        """Pop and start the next request of RQ's lists, in their order.

        ``taker`` asks one at a time; the same ``execution`` again gets the same attempt, or nothing when that has
        ended. ``for_rq``: the taker is an RQ worker, for which a job of others in front of a list is the next one, and
        which can be suspended. ``is_last``: a call of this ``execution`` that is still on its way starts nothing.

        Raises UnreadableRequest.
        """

        def parse(reply: Any) -> Taken:
            word, *rest = read_words("take", reply)
            if word == "started":
                attempt = read_attempt(Key(text_of(rest[0])), rest[3:], owns_job=for_rq)
                return Taken(attempt, list=text_of(rest[1]), left=int(rest[2]))
            if word == "empty":
                return Taken(None, word, last_event=text_of(rest[0]))
            return Taken(None, word, list=text_of(rest[0]) if rest else "")

        suspended = self.delivery.suspended if for_rq else ""
        argv = (execution, taker, worker, lease_ms, self.delivery.job_prefix, suspended, int(is_last), *lists)
        return self.index_call("take", self.keys.named("leases"), argv, parse)

    def admit(
        self, attempt: Attempt, limit: str, max_running: int, ticket: ParkingTicket, *, delay_ms: int
    ) -> Call[bool]:
        """True: the attempt has one of the limit's places. False: it was handed back and waits. Raises LeaseLost."""
        waits = (ticket.job_id, ticket.commands, ticket.data, ticket.recall, delay_ms)
        word = held_word("admit", attempt.key)
        argv = (attempt.token, limit, max_running, *waits, self._own_job(attempt))
        return self._call("admit", attempt.key, argv, lambda reply: word(reply) == "admitted")

    def renew(self, attempt: Attempt, lease_ms: int, progress: bytes = b"") -> Call[int]:
        """Keep an attempt ours for another ``lease_ms``; the new deadline in Unix ms on the server's clock.

        Raises LeaseLost when another attempt holds the key, or nobody: stop the handler.
        """

        def parse(reply: Any) -> int:
            return int(held(attempt.key, read_words("renew", reply))[1])

        return self._call("renew", attempt.key, (attempt.token, lease_ms, progress), parse)

    def emit(self, attempt: Attempt, number: int, packed: bytes) -> Call[str]:
        """``emitted`` | ``already``. Raises LeaseLost. ``number`` counts what the attempt emits, from 1."""
        argv = (attempt.token, number, EMISSIONS_KEPT, EMITTED_BYTES, packed)
        return self._call("emit", attempt.key, argv, held_word("emit", attempt.key))

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
            word, *rest = held(attempt.key, read_words("complete", reply))
            if word == "torn":
                raise torn(attempt.key, rest[0])
            return [packing.unpack(packed) for packed in (rest[0] if rest and rest[0] else ())]

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
        return self._call("fail", attempt.key, argv, held_word("fail", attempt.key))

    def retry(self, attempt: Attempt, ticket: Ticket, *, delay_ms: int, kwargs: bytes, error: bytes) -> Call[str]:
        """``retried`` | ``already``. Raises LeaseLost."""
        job = self._own_job(attempt)
        argv = (attempt.token, ticket.job_id, ticket.commands, ticket.data, delay_ms, kwargs, error, job)
        return self._call("retry", attempt.key, argv, held_word("retry", attempt.key))

    def release(self, attempt: Attempt, ticket: Ticket) -> Call[str]:
        """``released`` | ``already``. Raises LeaseLost."""
        argv = (attempt.token, ticket.job_id, ticket.commands, ticket.data, self._own_job(attempt))
        return self._call("release", attempt.key, argv, held_word("release", attempt.key))

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
        argv: tuple[Any, ...] = (attempt.token, target, failure_ttl_ms, int(is_submitted), self._own_job(attempt))
        if is_submitted:
            argv += tuple(part for follow_up in follow_ups for part in follow_up.argv)
        return self._call("redirect", attempt.key, argv, redirection("redirect", attempt.key))

    def need(
        self, attempt: Attempt, needed: Sequence[Key], ticket: ParkingTicket, *, delay_ms: int
    ) -> Call[Redirection]:
        """The attempt ends, to be called up when all of these have ended: ``waiting``, ``ready`` (none is in flight),
        ``loop``, ``full``, ``already``. Raises LeaseLost.
        """
        waits = (ticket.job_id, ticket.commands, ticket.data, ticket.recall, delay_ms)
        argv = (attempt.token, *waits, self._own_job(attempt), *needed)
        return self._call("need", attempt.key, argv, redirection("need", attempt.key))

    def ticket(self, key: Key) -> Command[tuple[str, str]]:
        """The state of a request and the id of its RQ job; "" for what is not there."""
        argv = ("HMGET", self.keys.status(key), "state", "job_id")
        return Command(argv, lambda reply: (text_of(reply[0] or b""), text_of(reply[1] or b"")))

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
            return About(Key(text_of(of)), read_stored(Key(text_of(of)), result), error or LAPSED)

        argv = ("HMGET", self.keys.named("followup", key=key), "of", "error", "owner", "envelope", "bytes", "root")
        return Command(argv, parse)

    def conclude(self, attempt: Attempt) -> Call[str]:
        """End a follow-up that has run: ``concluded`` | ``already``. Raises LeaseLost."""
        return self._call(
            "conclude", attempt.key, (attempt.token, self._own_job(attempt)), held_word("conclude", attempt.key)
        )

    def unattended(self, kind: FollowUp, below: str, limit: int) -> Command[list[tuple[Key, int]]]:
        """Failures of which nobody has been told, newest first: keys and scores.

        ``below``: "+inf", or "(" and a score.
        """

        def parse(reply: Any) -> list[tuple[Key, int]]:
            # RESP3 answers pairs, RESP2 a flat list
            pairs = reply if reply and isinstance(reply[0], list | tuple) else rows(reply or [], 2)
            return [(Key(text_of(key)), int(float(score))) for key, score in pairs]

        name = self.keys.named("unattended", follow_up=kind)
        return Command(("ZREVRANGEBYSCORE", name, below, "-inf", "WITHSCORES", "LIMIT", 0, limit), parse)

    def failed_request(self, key: Key) -> Command[Unattended]:
        """What a follow-up of a failure takes over from the request."""

        def parse(reply: Any) -> Unattended:
            state, queue, priority, packed, *uri = reply
            try:
                request = None if packed is None else unpack_request(packed, joined(uri))
            except (VersionSkew, InvalidRequest):
                request = None  # a worker of another version can read it
            return Unattended(text_of(state or b""), text_of(queue or b""), Priority(int(priority or 1)), request)

        fields = ("state", "queue", "priority", "request", *URI_FIELDS)
        return Command(("HMGET", self.keys.status(key), *fields), parse)

    def attend(self, key: Key, since: int, follow_up: NextUp) -> Call[str]:
        """Tell somebody of a failure: ``attended`` | ``already``."""
        return self._call("attend", key, (since, *follow_up.argv), word_of("attend"))

    # -- traces

    def link(self, key: Key, context: str) -> Call[str]:
        """Leave the context of a submit for the execution; the context of that where it is known already, else ""."""

        def parse(reply: Any) -> str:
            word, *rest = read_words("link", reply)
            return text_of(rest[0]) if word == "linked" else ""

        return self._call("link", key, (context,), parse)

    def trace(self, attempt: Attempt, context: str) -> Call[list[str]]:
        """Tell the context of an attempt that is about to end; those of who has joined it. Raises LeaseLost."""

        def parse(reply: Any) -> list[str]:
            _, contexts = held(attempt.key, read_words("trace", reply))
            return [text_of(context) for context in contexts]

        return self._call("trace", attempt.key, (attempt.token, context), parse)

    # -- healing

    def crash(
        self, key: Key, token: Token | None, ticket: Ticket, *, delay_ms: int, error: bytes, note: bytes = b""
    ) -> Call[str]:
        """``requeued`` | ``quarantined`` | ``already`` | ``alive``. Without a token the lease must have lapsed."""
        waits = (ticket.job_id, ticket.commands, ticket.data, delay_ms)
        return self._call(
            "crash", key, (token or "", *waits, self.settings.max_attempts, error, note), word_of("crash")
        )

    def revive(self, found: Overdue, ticket: Ticket) -> Call[str]:
        """``revived`` | ``already`` | ``alive``."""
        return self._call(
            "revive", found.key, (found.job_id, ticket.job_id, ticket.commands, ticket.data), word_of("revive")
        )

    def sweep(self, queue: str, cursor: int = 0) -> Call[Swept]:
        """One step of the search for the dead on this queue; go on while ``cursor`` is not 0."""

        def parse(reply: Any) -> Swept:
            _, lapsed, ticketless, cursor = read_words("sweep", reply)
            return Swept(
                tuple(replace(read_overdue(row), crashes=int(row[4])) for row in rows(lapsed, 5)),
                tuple(replace(read_overdue(row), job_id=text_of(row[4])) for row in rows(ticketless, 5)),
                int(cursor),
            )

        lease_ms = ms(self.settings.lease)
        lists = self.delivery.lists(queue)
        argv = (queue, cursor, STEP, lease_ms, self.delivery.job_prefix, QUARANTINE_KEPT, *lists)
        return self.index_call("sweep", self.keys.named("leases"), argv, parse)

    def queues(self) -> Command[list[str]]:
        """The queues that were ever used, in no order."""
        return Command(("SMEMBERS", self.keys.named("queues")), lambda reply: sorted(text_of(name) for name in reply))

    def claim_sweep(self) -> Command[bool]:
        """True for the first who asks within a third of a lease. A throttle, not a lock: sweeps may overlap."""
        argv = ("SET", self.keys.named("swept"), "1", "NX", "PX", ms(self.settings.lease / 3))
        return Command(argv, lambda reply: reply is not None and reply is not False)

    def server_time(self) -> Command[float]:
        """Seconds since 1970 on the server's clock; only ever compared with what this has answered before."""
        return Command(("TIME",), lambda reply: int(reply[0]) + int(reply[1]) / 1e6)

    def note_clock_step(self) -> Command[int]:
        """The server's clock has stepped: count it."""
        return Command(("HINCRBY", self.keys.named("stats", family="sweeps"), "clock_steps", 1), int)

    # -- quarantine

    def set_aside(self, limit: int | None = None) -> Command[list[Key]]:
        """The keys of what is in quarantine, newest first."""
        argv = ("ZREVRANGE", self.keys.named("quarantine"), 0, -1 if limit is None else limit - 1)
        return Command(argv, lambda reply: [Key(text_of(key)) for key in reply])

    def entry(self, key: Key) -> Command[QuarantineEntry | State]:
        """What is known of a request that is set aside; the state of one that is not."""
        return Command(("HMGET", self.keys.status(key), *ENTRY_FIELDS), lambda values: read_entry(key, values))

    def payloads(self, key: Key) -> Command[list[Any]]:
        """The payloads that were submitted with a request, in no order."""
        name = self.keys.named("callbacks", key=key)
        return Command(("HVALS", name), lambda reply: [packing.unpack(packed) for packed in reply])

    def requeue(self, entry: QuarantineEntry, ticket: Ticket, dismissal: str) -> Call[str]:
        """``requeued`` | ``already`` | ``superseded`` | ``in_flight`` | ``ended`` | ``unknown``."""
        argv = (entry.job_id, ticket.job_id, ticket.commands, ticket.data, dismissal)
        return self._call("requeue", entry.key, argv, word_of("requeue"))

    def discard(self, entry: QuarantineEntry, dismissal: str) -> Call[str]:
        """``discarded`` | ``superseded`` | ``in_flight`` | ``ended`` | ``unknown``."""
        return self._call("discard", entry.key, (entry.job_id, dismissal), word_of("discard"))

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
            _, total, *found = read_words("browse", reply)
            return Page(int(total), tuple(self._status(Key(text_of(key)), fields) for key, fields in rows(found, 2)))

        return self.index_call("browse", index, (offset, limit), parse)

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
            _, cleared, looked_at, behind = read_words("clear", reply)
            return int(cleared), int(looked_at), text_of(behind)

        argv = ("(+inf" if temporary_only else "+inf", step, route, pattern, age_ms, cursor)
        return self.index_call("clear", self.keys.named("results"), argv, parse)

    def stats(self) -> Call[Stats]:
        """The counters and sizes of the namespace."""

        def parse(reply: Any) -> Stats:
            _, submissions, executions, sweeps, size, temporary, sticky, running, quarantined, waiting = read_words(
                "stats", reply
            )
            return Stats(
                submissions=read_outcomes(submissions),
                executions=read_outcomes(executions),
                sweeps=read_outcomes(sweeps),
                bytes=int(size),
                temporary=int(temporary),
                sticky=int(sticky),
                in_progress=int(running),
                quarantined=int(quarantined),
                pending=read_counts(waiting),
            )

        return self.index_call("stats", self.keys.named("queues"), (), parse)

    def overview(self) -> Call[Census]:
        """Counters, lines, workers and sizes of the namespace, in one look that only reads."""

        def parse(reply: Any) -> Census:
            _, now_ms, families, lines, workers, numbers, hot, runtimes = read_words("overview", reply)
            return Census(
                now_ms=int(now_ms),
                families={text_of(name): read_texts(counted) for name, counted in rows(families, 2)},
                lines=tuple(Line(text_of(name), *map(int, rest)) for name, *rest in lines),
                workers=tuple(LiveWorker(*map(text_of, row)) for row in rows(workers, 4)),
                numbers=read_counts(numbers),
                hot=tuple(
                    (text_of(key), int(votes), uri_in(uri), text_of(state), int(float(size)))
                    for key, votes, uri, state, size in rows(hot, 5)
                ),
                runtimes=read_counts(runtimes),
            )

        argv = (self.settings.queue, *self.delivery.worker_sets("*"))
        return self.index_call("overview", self.keys.named("queues"), argv, parse)

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
        return Command(("XRANGE", self.keys.named("events"), f"({after}", "+", "COUNT", limit), read_events)

    def next_events(self, after: str, timeout_ms: int) -> Command[list[tuple[str, dict[str, str]]]]:
        """Events behind the id ``after``, waiting up to ``timeout_ms`` for the first."""

        def parse(reply: Any) -> list[tuple[str, dict[str, str]]]:
            if not reply:
                return []
            streams = reply.values() if isinstance(reply, dict) else [stream[1] for stream in reply]
            entries = next(iter(streams))
            # RESP3 nests the entries of a stream once more than RESP2
            return read_events(entries[0] if entries and isinstance(entries[0], list) else entries)

        argv = ("XREAD", "COUNT", STEP, "BLOCK", timeout_ms, "STREAMS", self.keys.named("events"), after)
        return Command(argv, parse, waits=True)

    def newest_event(self) -> Command[str]:
        """The id of the newest event; ``0-0`` when there is none."""
        argv = ("XREVRANGE", self.keys.named("events"), "+", "-", "COUNT", 1)
        return Command(argv, lambda reply: read_events(reply)[0][0] if reply else "0-0")

    # -- how a call is made

    def _status(self, key: Key, packed: bytes, outcome: Outcome | None = None, value: Any = None) -> BatchStatus:
        """The record as a status; what is completed has a URL where the manager knows one."""
        status = read_status(key, packed, outcome, value)
        url = self.settings.result_url
        if url is None or status.state is not State.COMPLETED:
            return status
        return replace(status, url=url.replace("{key}", key))

    def _call(self, verb: str, key: Key, argv: Sequence[Any], parse: Callable[[Any], T]) -> Call[T]:
        return Call(script(verb), (self.keys.status(key),), (self.keys.prefix, key, *argv), parse)

    def index_call(self, verb: str, index: str, argv: Sequence[Any], parse: Callable[[Any], T]) -> Call[T]:
        """A call whose first key is ``index``, by its full name, and whose arguments are only these."""
        return Call(script(verb), (index,), (self.keys.prefix, *argv), parse)


def ms(seconds: float) -> int:
    """Seconds to milliseconds; what is above 0 stays above 0."""
    return max(1, round(seconds * 1000)) if seconds > 0 else 0


def _envelope_argv(envelope: Envelope, inline: bytes | None) -> tuple[Any, ...]:
    return (envelope.stored, envelope.chunks, pack_envelope(envelope), inline or b"")


def _tag_lines(request: BatchRequest) -> str:
    """The tags as the record has them: a line break before and behind each; "" = none."""
    return "".join(f"\n{tag}" for tag in request.tags) + "\n" if request.tags else ""
