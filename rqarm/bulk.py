"""Many requests at a time, in as few round trips as there are chunks.

Flows, like those of rqarm.flows, which know one request. The one idea: an entry that is wrong, or that the server
refuses, is an answer like any other, so it hides nobody else's. Positions count the entries of the caller from 0.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, TypeAlias

from rqarm import codec, flows, tracing
from rqarm.calls import Batch, Call, Ticket, ms
from rqarm.errors import BulkError, CorruptResult, InvalidRequest, RqarmError
from rqarm.flows import PIECES, Core, Emit, Flow
from rqarm.model import BatchStatus, Key, Outcome
from rqarm.replies import Attempt, Found, Stored
from rqarm.request import BatchRequest, as_request
from rqarm.result import Result

#: requests that one round trip carries at the most. Each is about 1.5 KB on the way. Trips of 3,000 took as long for
#: each (0.97 to 1.03 of the time, twelve rounds on a noisy machine), trips of 100 a tenth longer; more need memory
CHUNK = 1_000
#: bytes of payloads after which a round trip takes no more requests
TRIP_BYTES = 4 << 20

#: a request or a URI, alone or with its callback payload (None = none)
Entry: TypeAlias = "BatchRequest | str | tuple[BatchRequest | str, Any]"
Entries: TypeAlias = "Iterable[Entry]"
AsyncEntries: TypeAlias = "Iterable[Entry] | AsyncIterable[Entry]"
#: told of what was not taken: its position and why
OnError: TypeAlias = Callable[[int, Exception], object]


@dataclass(frozen=True, slots=True)
class Hit:
    """A request that has its value. ``payloads``: those that came with it in this bulk, in the order given.

    Of what was computed here they are all that the claim had, in no order: there is no callback that would get them.
    """

    request: BatchRequest
    value: Any
    payloads: tuple[Any, ...]
    status: BatchStatus

    @property
    def key(self) -> Key:
        return self.status.key


@dataclass(slots=True)
class Group:
    """Equal requests of one bulk: sent once, with all their payloads."""

    request: BatchRequest
    positions: list[int] = field(default_factory=list)
    payloads: list[Any] = field(default_factory=list)
    packed: dict[str, bytes] = field(default_factory=dict)
    #: what it was sent with, and what became of it
    ticket: Ticket | None = None
    found: Found | None = None
    value: Any = None
    error: Exception | None = None
    #: while the caller holds it; whether the caller has computed the value
    attempt: Attempt | None = None
    is_computed: bool = False

    @property
    def outcome(self) -> Outcome | None:
        return None if self.found is None else self.found.status.outcome

    @property
    def is_hit(self) -> bool:
        return self.error is None and (self.is_computed or self.outcome is Outcome.HIT)

    @property
    def is_miss(self) -> bool:
        return self.error is None and not self.is_hit and self.attempt is None

    @property
    def status(self) -> BatchStatus:
        assert self.found is not None, "an answer was read"
        return self.found.status

    def settle(self, answer: Found | Exception) -> None:
        """Note the answer; a later one replaces it."""
        self.found, self.error = (None, answer) if isinstance(answer, Exception) else (answer, None)
        self.value = None if self.found is None else self.found.status.value

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.packed.values()))


class Gathering:
    """Entries as they come in, equal requests together. What cannot be sent is in ``errors``."""

    def __init__(self, first: int = 0) -> None:
        self.groups: list[Group] = []
        self.errors: dict[int, Exception] = {}
        self.first, self.end, self.size_bytes = first, first, 0
        self._open: dict[BatchRequest, Group] = {}

    def add(self, entry: Entry) -> None:
        position, self.end = self.end, self.end + 1
        try:
            wanted, payload = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
            request = as_request(wanted)
            packed = None if payload is None else flows.pack_payload(payload)
        except RqarmError as error:
            self.errors[position] = error
            return
        group = self._open.get(request)
        if group is None or len(group.packed) >= CHUNK:
            group = self._open[request] = Group(request)
            self.groups.append(group)
        group.positions.append(position)
        if packed is not None:
            group.payloads.append(payload)
            group.packed[packed[0]] = packed[1]
            self.size_bytes += len(packed[1])

    def is_full(self, chunk: int) -> bool:
        return self.end - self.first >= chunk or self.size_bytes >= TRIP_BYTES

    def answers(self) -> Iterator[tuple[int, BatchStatus | Exception]]:
        """What became of each entry, in the order given."""
        found: dict[int, BatchStatus | Exception] = dict(self.errors)
        for group in self.groups:
            answer = group.error or group.status
            found.update(dict.fromkeys(group.positions, answer))
        return ((position, found[position]) for position in range(self.first, self.end))


def gather(entries: Entries) -> Gathering:
    """All entries at once. Raises InvalidRequest for one request in place of many."""
    check_entries(entries)
    gathering = Gathering()
    for entry in entries:
        gathering.add(entry)
    return gathering


def submit_many(core: Core, requests: Iterable[BatchRequest | str]) -> Flow[list[BatchStatus]]:
    """A status for each, in the order given. An invalid one raises before anything is sent.

    Raises BulkError when some were not taken.
    """
    check_entries(requests)
    gathering = gather(map(_without_payload, requests))
    for position, error in gathering.errors.items():
        if isinstance(error, InvalidRequest):
            raise InvalidRequest(
                error.reason, where=f"requests[{position}]: {error.where}".removesuffix(": ")
            ) from None
        raise error
    yield from send(core, gathering.groups)
    return _all_or_bulk_error(list(gathering.answers()))


def submit_stream(core: Core, entries: Entries, chunk: int, on_error: OnError | None) -> Flow[None]:
    """Emits the status of each entry that was taken, in the order given; reads ``chunk`` of them at a time."""
    gathering = Gathering()
    for entry in entries:
        gathering.add(entry)
        if gathering.is_full(chunk):
            yield from submit_gathered(core, gathering, on_error)
            gathering = Gathering(gathering.end)
    yield from submit_gathered(core, gathering, on_error)


def submit_gathered(core: Core, gathering: Gathering, on_error: OnError | None) -> Flow[None]:
    """Emits the status of each entry that was taken. What was not is told to ``on_error``, in the same order.

    Without it: BulkError, when all statuses have been emitted.
    """
    yield from send(core, gathering.groups)
    answers = list(gathering.answers())
    for position, answer in answers:
        if not isinstance(answer, Exception):
            yield Emit(answer)
        elif on_error is not None:
            on_error(position, answer)
    if on_error is None:
        _all_or_bulk_error(answers)


def check_chunk(chunk: int) -> None:
    """Raises InvalidRequest for a number of requests that no round trip carries."""
    if isinstance(chunk, bool) or not isinstance(chunk, int) or not 1 <= chunk <= CHUNK:
        raise InvalidRequest(f"1 to {CHUNK:,} requests go in one round trip, not {chunk!r:.40}", where="chunk")


def check_entries(entries: object) -> None:
    """Raises InvalidRequest for one URI in place of many: each of its letters would be taken for a URI."""
    if isinstance(entries, str | bytes | BatchRequest):
        raise InvalidRequest(f"many are needed, such as a list, not one {type(entries).__name__}", where="requests")


def _without_payload(request: BatchRequest | str) -> Entry:
    # a pair would be taken apart, and its payload be sent by a method that promises none
    return (request, None)


def _all_or_bulk_error(answers: Sequence[tuple[int, BatchStatus | Exception]]) -> list[BatchStatus]:
    errors = {position: answer for position, answer in answers if isinstance(answer, Exception)}
    statuses = [None if isinstance(answer, Exception) else answer for _, answer in answers]
    if errors:
        raise BulkError(statuses, errors)
    return [status for status in statuses if status is not None]


# -- sending


def send(core: Core, groups: Sequence[Group]) -> Flow[None]:
    """Submit each group; its answer, or its error, is noted in it. A corrupt result counts as a miss and runs again."""
    for trip in trips(groups):
        yield from _send(core, trip, again=False)
        if corrupt := [group for group in trip if isinstance(group.error, CorruptResult)]:
            yield from _send(core, corrupt, again=True)


def _send(core: Core, groups: Sequence[Group], *, again: bool) -> Flow[None]:
    span = _span(core, groups) if tracing.is_on() else None
    if span is not None:
        yield from _send_traced(core, groups, again, span)
        return
    calls = tuple(_submit_call(core, group, again) for group in groups)
    answers = yield from _asked(core, calls)
    for group, answer in zip(groups, answers, strict=True):
        group.settle(answer)


def _asked(core: Core, calls: Sequence[Call[Any]]) -> Flow[list[Any]]:
    """The answers to one round trip of submits, errors among them; each with what confirms all of them."""
    answers: list[Any] = yield Batch((*calls, *core.calls.confirmations), settles=True)
    if core.calls.confirmations:
        safe = answers.pop()
        answers = [answer.confirmed(safe) if isinstance(answer, Found) else answer for answer in answers]
    return answers


def _span(core: Core, groups: Sequence[Group]) -> tracing.Span | None:
    queues = {core.queue_of(group.request) for group in groups}
    queue = queues.pop() if len(queues) == 1 else core.settings.queue
    return tracing.submission(queue, messaging__batch__message_count=len(groups))


def _send_traced(core: Core, groups: Sequence[Group], again: bool, span: tracing.Span) -> Flow[None]:
    """One span for all of a round trip: all that is new belongs to it."""
    with span:
        calls: list[Call[Any]] = [_submit_call(core, group, again, span.context) for group in groups]
        if span.is_recording:
            calls += [core.calls.link(core.identify(group.request).key, span.traceparent) for group in groups]
        answers = yield from _asked(core, calls)
        outcomes: Counter[str] = Counter()
        links = []
        for group, answer, linked in zip_longest(groups, answers[: len(groups)], answers[len(groups) :]):
            group.settle(answer)
            outcomes[str(group.outcome or "error")] += 1
            if group.outcome is not Outcome.NEW and isinstance(linked, str):
                links.append(linked)
        span.set(**{f"rqarm__outcomes__{outcome}": n for outcome, n in outcomes.items()})
        span.link(links)


def _submit_call(core: Core, group: Group, again: bool, trace: str = "") -> Call[Found]:
    group.ticket = flows.ticket_for(core, group.request)
    payload, *more = group.packed.items() or (None,)
    return core.calls.submit(
        group.request,
        core.identify(group.request),
        group.ticket,
        payload=payload,
        more=filter(None, more),
        again=again,
        trace=trace,
    )


def trips(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """The groups by round trip: CHUNK of them at the most, or what carries TRIP_BYTES of payloads."""
    trip: list[Group] = []
    size_bytes = 0
    for group in groups:
        trip.append(group)
        size_bytes += group.size_bytes
        if len(trip) >= CHUNK or size_bytes >= TRIP_BYTES:
            yield trip
            trip, size_bytes = [], 0
    if trip:
        yield trip


# -- answers with values


def get_or_submit(core: Core, groups: Sequence[Group]) -> Flow[None]:
    """Submit, and fetch the values of hits that are stored in pieces. One that is corrupt runs again."""
    yield from send(core, groups)
    large = [group for group in groups if group.found is not None and _in_pieces(group.found)]
    broken = []
    for group in large:
        stored = group.found.stored if group.found is not None else None
        assert stored is not None, "_in_pieces looked"
        try:
            group.value = yield from _large_value(core, stored)
        except CorruptResult:
            broken.append(group)
        except RqarmError as error:
            group.settle(error)
    for trip in trips(broken):
        yield from _send(core, trip, again=True)


def _in_pieces(found: Found) -> bool:
    return found.stored is not None and found.stored.inline is None


def _large_value(core: Core, stored: Stored) -> Flow[Any]:
    pieces: list[bytes | None] = []
    for first in range(0, stored.envelope.chunks, PIECES):
        wanted = range(first, min(first + PIECES, stored.envelope.chunks))
        pieces += yield Batch(tuple(core.calls.chunk(stored, n) for n in wanted))
    return codec.decode_chunks(stored.envelope, pieces)


# -- the caller as worker


def start(core: Core, groups: Sequence[Group], worker: str) -> Flow[None]:
    """Start the tickets of new requests; ``attempt`` is set where no worker was faster."""
    for trip in trips(groups):
        answers = yield Batch(tuple(_start_call(core, group, worker) for group in trip), settles=True)
        for group, answer in zip(trip, answers, strict=True):
            group.attempt = answer if isinstance(answer, Attempt) else None


def _start_call(core: Core, group: Group, worker: str) -> Call[Any]:
    request, ticket, key = group.request, group.ticket, group.status.key
    assert ticket is not None, "what is new was sent"
    own_list = core.jobs.lists(core.queue_of(request))[request.priority]
    lease_ms = ms(core.settings.lease)
    return core.calls.start(key, ticket.job_id, secrets.token_hex(8), worker, lease_ms, own_list=own_list)


def finish(core: Core, group: Group, value: Any) -> Flow[None]:
    """Store what the caller computed; the group has it then as a reader would get it. Raises as flows.finish does."""
    assert group.attempt is not None, "only what is held can be finished"
    is_stream = isinstance(value, Iterator | Result) or hasattr(value, "read")
    group.payloads = yield from flows.finish(core, group.attempt, value, wants_payloads=True)
    found: Found = yield core.calls.read(group.attempt.key, with_value=False)
    group.value = (yield from flows.result(core, group.attempt.key)) if is_stream else value
    group.found = replace(found, status=replace(found.status, outcome=group.outcome))
    group.attempt, group.is_computed = None, True


def release(core: Core, groups: Sequence[Group]) -> Flow[None]:
    """Hand back what is held; what is lost already is none of ours any more."""
    # each goes to the front of its queue, so the last one first
    for trip in trips([group for group in reversed(groups) if group.attempt is not None]):
        # the only step of a release is its call
        steps: list[Any] = [next(flows.release(core, group.attempt)) for group in trip if group.attempt is not None]
        yield Batch(tuple(steps), settles=True)
        for group in trip:
            group.attempt = None


def renew(core: Core, groups: Sequence[Group]) -> Flow[None]:
    """Keep what is held. What is lost shows at its finish."""
    held = [group.attempt for group in groups if group.attempt is not None]
    if held:
        yield Batch(tuple(core.calls.renew(attempt, ms(core.settings.lease)) for attempt in held), settles=True)
