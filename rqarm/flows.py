"""How to wait, and everything else that takes more than one step.

A flow is a generator. It yields what it needs (a Call, a Command, a Batch, Watch, Listen, Emit) and is sent the answer;
the managers drive it, blocking or on an event loop, and a test drives it by hand. No I/O, no Redis client, no thread
here. The clock is the monotonic one; the server's time never meets it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from rqarm import codec, packing, tracing
from rqarm.calls import Batch, Call, Calls, Command, NextUp, ParkingTicket, Ticket, ms
from rqarm.config import Settings
from rqarm.errors import (
    CorruptResult,
    InvalidRequest,
    Quarantined,
    Refused,
    RequestCancelled,
    RequestFailed,
    RequestLost,
    RequestUnknown,
    ResultNotReady,
    WaitTimeout,
)
from rqarm.keys import Keys
from rqarm.model import BatchStatus, Key, Outcome, Priority, State
from rqarm.replies import LAPSED, Attempt, Found, Overdue, Stored, Swept, Taken, UnreadableRequest
from rqarm.request import BatchRequest, as_request
from rqarm.uri import Canonical, check_key, redact

T = TypeVar("T")

#: seconds after which a waiter reads the record again, woken or not: a lost wake-up costs this at the most
RECHECK = 5.0
#: seconds that a waiter trusts that nothing has happened to a request that was new a moment ago
FRESH = 0.002
#: seconds until a request that this version cannot read is offered again
UNREADABLE_DELAY = 5.0
#: seconds until RQ's scheduler offers a parked request again. It is called up long before; this is for the case that
#: the place was lost with its holder's record and nobody sweeps.
PARK_DELAY = 600.0
#: pieces of a large result that one round trip fetches
PIECES = 8
MAX_PAYLOAD_ID_CHARS = 200


@dataclass(frozen=True, slots=True)
class Watch:
    """From now to the end of the flow: hear of these keys. Answered when the subscription stands.

    ``is_sure`` = False: answered at once, and what happens until the subscription stands may not be heard. Who asks for
    the same keys again then waits for it to stand.
    """

    keys: tuple[Key, ...]
    is_sure: bool = True


@dataclass(frozen=True, slots=True)
class Listen:
    """Wait for a wake-up of a watched key, at most ``timeout`` seconds.

    The answer is the keys that woke, each with what was said of it; b"" = that does not count.
    """

    timeout: float


@dataclass(frozen=True, slots=True)
class Emit:
    """One item for the caller of a flow that gives many."""

    item: Any


Step = Call[Any] | Command[Any] | Batch[Any] | Watch | Listen | Emit
Flow = Generator[Step, Any, T]


class Jobs(Protocol):
    """Who records RQ jobs. rqarm.rqjobs implements it."""

    job_prefix: str
    suspended: str
    worker_set: str
    worker_fields: dict[str, str]
    list_prefix: str

    def lists(self, queue: str) -> tuple[str, str, str]: ...

    def worker_sets(self, queue: str) -> tuple[str, str, str]: ...

    def enqueue(self, key: Key, description: str, queue: str, priority: Priority) -> Ticket: ...

    def enqueue_at_front(self, key: Key, description: str, queue: str, priority: Priority) -> Ticket: ...

    def schedule(self, key: Key, description: str, queue: str, priority: Priority, delay: float) -> Ticket: ...

    def park(self, key: Key, description: str, queue: str, priority: Priority, delay: float) -> ParkingTicket: ...

    def dismiss(self, job_id: str, queue: str, priority: Priority) -> str: ...


@dataclass(slots=True)
class Habit:
    """What the last call of a manager was like, for the next one will mostly be alike. Never more than a hint.

    ``waits``: the last ``get`` found nothing in the cache.
    """

    waits: bool = False


@dataclass(frozen=True)
class Core:
    """What every flow of one manager needs."""

    settings: Settings
    jobs: Jobs
    clock: Callable[[], float] = time.monotonic
    habit: Habit = field(default_factory=Habit)
    keys: Keys = field(init=False)
    calls: Calls = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", Keys(self.settings.namespace))
        object.__setattr__(self, "calls", Calls(self.keys, self.settings, self.jobs))

    def identify(self, request: BatchRequest) -> Canonical:
        """The identity of a request under this manager's ``ignore_params``."""
        return request.identify(self.settings.ignore_params)

    def describe(self, request: BatchRequest) -> str:
        """What people read of a request in RQ's lists and in logs: no secrets."""
        text = self.identify(request).uri
        if "?" in text or "@" in text:
            text = redact(text, self.settings.secret_params)
        return f"{request.operation} {text}".rstrip() if request.operation else text

    def queue_of(self, request: BatchRequest) -> str:
        return request.queue or self.settings.queue


# -- requests


def submit(
    core: Core,
    request: BatchRequest | str,
    payload: Any = None,
    *,
    payload_id: str | None = None,
    again: bool = False,
) -> Flow[BatchStatus]:
    """Submit; a hit carries its value when that is small. A corrupt result counts as a miss and runs again."""
    request, packed = as_request(request), pack_payload(payload, payload_id)
    try:
        found = yield from _submitted(core, request, packed, again)
    except CorruptResult:
        found = yield from _submitted(core, request, packed, True)
    return found.status


def _submitted(core: Core, request: BatchRequest, payload: tuple[str, bytes] | None, again: bool) -> Flow[Found]:
    if tracing.is_on():
        return (yield from _submit_traced(core, request, payload, again))
    call = _submit_call(core, request, payload, again)
    if not core.calls.confirmations:
        found: Found = yield call
        return found
    answer, safe = yield Batch((call, *core.calls.confirmations), settles=True)
    return _confirmed(answer, safe)


def _confirmed(answer: Found | Exception, safe: Any) -> Found:
    if isinstance(answer, Exception):
        raise answer
    return answer.confirmed(safe)


def _submit_call(
    core: Core, request: BatchRequest, payload: tuple[str, bytes] | None, again: bool, trace: str = ""
) -> Call[Found]:
    identity, ticket = core.identify(request), ticket_for(core, request)
    return core.calls.submit(request, identity, ticket, payload=payload, again=again, trace=trace)


def _submit_traced(core: Core, request: BatchRequest, payload: tuple[str, bytes] | None, again: bool) -> Flow[Found]:
    """The same with a span around it. Who joins leaves the span's context, in the same round trip."""
    key = core.identify(request).key
    span = tracing.submission(core.queue_of(request), messaging__message__id=key, rqarm__request=core.describe(request))
    if span is None:
        found: Found = yield _submit_call(core, request, payload, again)
        return found
    with span:
        call = _submit_call(core, request, payload, again, span.context)
        links = (core.calls.link(key, span.traceparent),) if span.is_recording else ()
        answers: list[Any] = yield Batch((call, *links, *core.calls.confirmations), settles=True)
        found, *linked = answers
        if isinstance(found, Exception):
            raise found
        if core.calls.confirmations:
            found = _confirmed(found, linked.pop())
        span.set(rqarm__outcome=found.status.outcome, rqarm__state=found.status.state)
        if found.status.outcome is not Outcome.NEW:
            span.link(context for context in linked if isinstance(context, str))
        return found


def ticket_for(core: Core, request: BatchRequest) -> Ticket:
    """The RQ job that a submit queues when its claim wins."""
    key = core.identify(request).key
    return core.jobs.enqueue(key, core.describe(request), core.queue_of(request), request.priority)


def pack_payload(payload: Any, payload_id: str | None = None) -> tuple[str, bytes] | None:
    """A payload as it is stored: its id, by default the hash of its content, and its bytes. None: there is none.

    Raises UnpackableResult, also for one that is too large, and InvalidRequest for a bad id.
    """
    if payload is None:
        if payload_id is not None:
            raise InvalidRequest("an id of a payload needs a payload", where="payload_id")
        return None
    packed = packing.pack_arguments(payload)
    if payload_id is None:
        return hashlib.blake2b(packed, digest_size=8).hexdigest(), packed
    if not isinstance(payload_id, str) or not 1 <= len(payload_id) <= MAX_PAYLOAD_ID_CHARS:
        raise InvalidRequest(f"text of 1 to {MAX_PAYLOAD_ID_CHARS} characters is needed", where="payload_id")
    try:
        payload_id.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("text without lone surrogates is needed", where="payload_id") from None
    return payload_id, packed


def status(core: Core, key: str) -> Flow[BatchStatus]:
    found: Found = yield core.calls.read(check_key(key), with_value=False)
    return found.status


def full_status(core: Core, key: str) -> Flow[BatchStatus]:
    """The status with position and eta. The workers counted are those of the request's own queue."""
    first: BatchStatus = yield core.calls.locate(check_key(key), core.settings.queue)
    if first.state is not State.PENDING or first.queue == core.settings.queue:
        return first
    located: BatchStatus = yield core.calls.locate(first.key, first.queue)
    return located


def find(core: Core, key: str) -> Flow[BatchRequest | None]:
    request: BatchRequest | None = yield core.calls.find(check_key(key))
    return request


def cancel(core: Core, key: str) -> Flow[bool]:
    word, _ = yield core.calls.cancel(check_key(key))
    if word == "unknown":
        raise RequestUnknown(key)
    return bool(word == "cancelled")


def forget(core: Core, key: str) -> Flow[bool]:
    word, state = yield core.calls.forget(check_key(key))
    if word == "in_flight":
        raise ResultNotReady(key, f"{state} and cannot be forgotten; cancel it first, or")
    return bool(word == "forgotten")


# -- results


def result(core: Core, key: str, timeout: float | None = 0) -> Flow[Any]:
    """The value of a request that was submitted before. ``timeout``: 0 = do not wait, None = for ever."""
    key = check_key(key)
    found: Found = yield core.calls.read(key, with_value=True)
    if found.status.state.in_flight and timeout != 0:
        found = yield from _wait_for(core, key, timeout)
    return (yield from found_value(core, found))


def get(core: Core, request: BatchRequest | str, timeout: float | None = None) -> Flow[Any]:
    """Submit and wait: the value."""
    request = as_request(request)
    if core.habit.waits:
        # before the submit, so that the end cannot be sooner than the subscription
        yield Watch((core.identify(request).key,), is_sure=False)
    _, answer = yield from get_or_submit(core, request, None, value_only=True)
    core.habit.waits = isinstance(answer, BatchStatus)
    if not isinstance(answer, BatchStatus):
        return answer
    found = yield from _wait_for(core, answer.key, timeout, is_fresh=answer.outcome is Outcome.NEW)
    return (yield from found_value(core, found))


def get_or_submit(
    core: Core,
    request: BatchRequest | str,
    payload: Any,
    *,
    payload_id: str | None = None,
    value_only: bool = False,
) -> Flow[tuple[bool, Any]]:
    """(True, value) on a hit, else (False, status). With ``value_only`` a negative answer raises."""
    request, packed = as_request(request), pack_payload(payload, payload_id)
    try:
        found = yield from _submitted(core, request, packed, False)
        if found.stored is not None and found.stored.inline is not None:
            return True, found.status.value
        if found.stored is not None:
            return True, (yield from found_value(core, found))
    except CorruptResult:
        found = yield from _submitted(core, request, packed, True)
    if value_only and found.status.outcome in (Outcome.NEGATIVE, Outcome.REFUSED):
        raise unsuccessful(found.status)
    return False, found.status


def found_value(core: Core, found: Found) -> Flow[Any]:
    """The value of what was found. Raises what its state means when it has none."""
    if found.status.state is not State.COMPLETED:
        raise unsuccessful(found.status)
    if found.stored is None:
        raise RequestUnknown(found.status.key)
    return (yield from value_of(core, found.stored))


def value_of(core: Core, stored: Stored) -> Flow[Any]:
    """The value of a stored result. Raises CorruptResult."""
    if stored.inline is not None:
        return stored.value()
    return codec.decode_chunks(stored.envelope, (yield from _pieces(core, stored)))


def _pieces(core: Core, stored: Stored) -> Flow[list[bytes | None]]:
    """The stored pieces of a large result; None for one that is gone."""
    pieces: list[bytes | None] = []
    for first in range(0, stored.envelope.chunks, PIECES):
        wanted = range(first, min(first + PIECES, stored.envelope.chunks))
        pieces += yield Batch(tuple(core.calls.chunk(stored, n) for n in wanted))
    return pieces


def unsuccessful(status: BatchStatus) -> Exception:
    """Why there is no value."""
    if status.outcome is Outcome.REFUSED:
        return Refused(status.key, status.queue)
    if status.state is State.FAILED:
        return (Quarantined if status.is_blocked else RequestFailed)(status.key, status.error)
    if status.state is State.CANCELLED:
        return RequestCancelled(status.key)
    if status.state is State.UNKNOWN:
        return RequestUnknown(status.key)
    return ResultNotReady(status.key, status.state)


def stored_result(core: Core, key: str) -> Flow[Stored]:
    """The stored form, for readers that fetch piece by piece."""
    found: Found = yield core.calls.read(check_key(key), with_value=True)
    if found.status.state is not State.COMPLETED:
        raise unsuccessful(found.status)
    if found.stored is None:
        raise RequestUnknown(found.status.key)
    return found.stored


def result_bytes(core: Core, key: str) -> Flow[bytes]:
    """The whole of a result as the bytes it had before compression."""
    stored = yield from stored_result(core, key)
    pieces: Sequence[bytes | None] = [stored.inline]
    if stored.inline is None:
        pieces = yield from _pieces(core, stored)
    return codec.open_reader(stored.envelope, lambda n: pieces[n]).read()


# -- waiting


def wait(core: Core, keys: str | Iterable[str], timeout: float | None) -> Flow[list[BatchStatus]]:
    """The statuses in the order of the keys, when all have ended or the time is over."""
    wanted = [check_key(key) for key in ([keys] if isinstance(keys, str) else keys)]
    known: dict[Key, BatchStatus] = {}
    yield from collect(_settle(core, wanted, timeout, known, at_once=True))
    return [known[key] for key in wanted]


def as_completed(core: Core, keys: Iterable[str], timeout: float | None) -> Flow[None]:
    """Emits each status as its request ends. Raises WaitTimeout for the first key that has not, when time is over."""
    wanted = [check_key(key) for key in keys]
    known: dict[Key, BatchStatus] = {}
    left = set(wanted)

    def ask(step: Step) -> Flow[Any]:
        if isinstance(step, Emit):
            left.discard(step.item.status.key)
            step = Emit(step.item.status)
        return (yield step)

    yield from through(_settle(core, wanted, timeout, known), ask)
    for key in wanted:
        if key in left:
            raise WaitTimeout(key, known[key].state, timeout or 0.0)


def _wait_for(core: Core, key: Key, timeout: float | None, *, is_fresh: bool = False) -> Flow[Found]:
    known: dict[Key, BatchStatus] = {}
    settling = _settle(core, [key], timeout, known, with_value=True, is_fresh=is_fresh)
    ended = yield from collect(settling)
    if not ended:
        raise WaitTimeout(key, known[key].state, timeout or 0.0)
    found: Found = ended[0]
    if found.status.state is State.UNKNOWN:
        raise RequestLost(key)
    return found


def _settle(
    core: Core,
    keys: Sequence[Key],
    timeout: float | None,
    known: dict[Key, BatchStatus],
    *,
    with_value: bool = False,
    is_fresh: bool = False,
    at_once: bool = False,
) -> Flow[None]:
    """Emits a Found for each key as it ends (or is unknown); returns at the end or when the time is over. ``at_once``:
    the caller can wait for the last of them, so those that woke are read together.

    Subscribe, then read, then wait: a result that comes between reading and waiting has left its wake-up behind. The
    record is the answer and the wake-up a hint, so everything is read again every RECHECK seconds. A small result comes
    with its wake-up: then who wants the value is spared the read.
    """
    deadline = None if timeout is None else core.clock() + timeout
    waiting = dict.fromkeys(keys)
    woken: dict[Key, bytes] = {}
    if is_fresh and (timeout is None or timeout > FRESH):
        # no worker was as quick as this, so neither the confirmation nor the first read is worth waiting for
        yield Watch(tuple(waiting), is_sure=False)
        woken = yield Listen(FRESH)
        if not woken:
            yield Watch(tuple(waiting))
    else:
        yield Watch(tuple(waiting))
    asked: Sequence[Key] = tuple(waiting)
    while True:
        told = [core.calls.told(key, woken.get(key, b"")) for key in asked] if with_value else []
        answers = [found for found in told if found is not None]
        if len(answers) < len(asked):
            answers = yield Batch(tuple(core.calls.read(key, with_value=with_value) for key in asked))
        for found in answers:
            known[found.status.key] = found.status
            if not found.status.state.in_flight:
                del waiting[found.status.key]
                yield Emit(found)
        left = RECHECK if deadline is None else min(RECHECK, deadline - core.clock())
        if not waiting or left <= 0:
            return
        until = core.clock() + left
        woken = yield Listen(left)
        if at_once and woken:
            woken = yield from _more_woken(core, waiting, woken, until)
        if not woken:
            # nobody may be there to notice that a worker died: whoever waits does. A favour: when it fails (memory is
            # out, foreign data among the leases) the wait goes on, and the read says what is wrong with this request.
            with contextlib.suppress(Exception):
                yield from sweep_if_due(core)
        asked = [key for key in waiting if key in woken]
        if not asked or (at_once and deadline is not None and core.clock() >= deadline):
            asked = tuple(waiting)


def _more_woken(core: Core, waiting: Iterable[Key], woken: dict[Key, bytes], until: float) -> Flow[dict[Key, bytes]]:
    """Those that woke, and that wake until all who wait have, nobody does any more, or the time is over."""
    asleep, known = set(waiting) - woken.keys(), dict(woken)
    while asleep and (left := until - core.clock()) > 0:
        more: dict[Key, bytes] = yield Listen(left)
        if not more:
            break
        asleep -= more.keys()
        known |= more
    return known


def through(flow: Flow[T], ask: Callable[[Step], Flow[Any]]) -> Flow[T]:
    """A flow whose every step is asked by ``ask``, and which gets its errors; the answer is that of the flow."""
    answer: Any = None
    failure: Exception | None = None
    while True:
        try:
            step = flow.send(answer) if failure is None else flow.throw(failure)
        except StopIteration as end:
            value: T = end.value
            return value
        answer = failure = None
        try:
            answer = yield from ask(step)
        except Exception as error:  # noqa: BLE001 -- raised again inside that flow
            failure = error


def collect(flow: Flow[Any]) -> Flow[list[Any]]:
    """What the flow emits, as a list; every other step goes on to the driver."""
    items = []

    def ask(step: Step) -> Flow[Any]:
        if isinstance(step, Emit):
            items.append(step.item)
            return None
        return (yield step)

    yield from through(flow, ask)
    return items


# -- attempts


def take(core: Core, queue: str | None, taker: str, timeout: float | None) -> Flow[Attempt | None]:
    """Pop and start the next request of the queue, waiting up to ``timeout`` seconds (None = for ever) for one."""
    lists = core.jobs.lists(queue or core.settings.queue)
    deadline = None if timeout is None else core.clock() + timeout
    while True:
        call = core.calls.take(lists, secrets.token_hex(8), taker, taker, ms(core.settings.lease))
        taken: Taken = yield from _or_hand_back(core, call)
        if taken.attempt is not None:
            return taken.attempt
        left = RECHECK if deadline is None else min(RECHECK, deadline - core.clock())
        if left <= 0:
            return None
        if taken.reason != "spent":  # it ended while the reply was lost
            yield core.calls.next_events(taken.last_event, ms(left))


def start(core: Core, key: Key, job_id: str, worker: str, execution: str = "") -> Flow[Attempt | State]:
    """Begin the execution that an RQ job asks for; a State when its ticket is superseded.

    ``execution``: made up by who may have to ask again; the same one gets the same attempt.

    Raises UnreadableRequest: another version wrote it, and it was handed back.
    """
    call = core.calls.start(key, job_id, execution or secrets.token_hex(8), worker, ms(core.settings.lease))
    answer: Attempt | State = yield from _or_hand_back(core, call)
    return answer


def _or_hand_back(core: Core, call: Call[Any]) -> Flow[Any]:
    """Start; what cannot be read here goes back, without using up an attempt, for a worker that can."""
    try:
        return (yield call)
    except UnreadableRequest as skew:
        yield from hand_back_unread(core, skew.attempt)
        raise


def hand_back_unread(core: Core, attempt: Attempt) -> Flow[None]:
    """Release an attempt whose request this version cannot read; it is offered again a little later."""
    ticket = core.jobs.schedule(attempt.key, attempt.key, attempt.queue, attempt.priority, UNREADABLE_DELAY)
    yield core.calls.release(attempt, ticket)


def admit(core: Core, attempt: Attempt, limit: str, max_running: int) -> Flow[bool]:
    """Get the attempt one of the ``max_running`` places under ``limit``, before its handler is called.

    False: there is none. The attempt is over and counts for nothing; it comes back when there is one. Raises LeaseLost.
    """
    description = core.describe(attempt.request)
    ticket = core.jobs.park(attempt.key, description, attempt.queue, attempt.priority, PARK_DELAY)
    admitted: bool = yield core.calls.admit(attempt, limit, max_running, ticket, delay_ms=ms(PARK_DELAY))
    return admitted


def renew(core: Core, attempt: Attempt, progress: tuple[float, str] | None = None) -> Flow[None]:
    """Keep the attempt. Raises LeaseLost."""
    noted = json.dumps({"fraction": progress[0], "message": progress[1]}).encode() if progress else b""
    yield core.calls.renew(attempt, ms(core.settings.lease), noted)


def finish(
    core: Core,
    attempt: Attempt,
    value: Any,
    *,
    sticky: bool = False,
    ttl: float | None = None,
    follow_up: NextUp | None = None,
    wants_payloads: bool = False,
) -> Flow[list[Any]]:
    """Store the value and wake the waiters. ``ttl`` and ``sticky`` are the route's wishes, ``follow_up`` its callback.

    Answers the payloads if they are wanted, which is instead of a callback. Raises LeaseLost, UnpackableResult,
    ResultTooLarge; and what an iterator of bytes raises on its way.
    """
    owner = str(attempt.token)
    envelope, inline = yield from _stage(core, attempt.key, owner, value)
    payloads: list[Any] = yield core.calls.complete(
        attempt,
        envelope,
        inline,
        sticky=sticky,
        ttl_ms=ms(ttl or 0),
        follow_up=follow_up,
        wants_payloads=wants_payloads,
    )
    return payloads


def put(core: Core, request: BatchRequest | str, value: Any) -> Flow[Key]:
    """Store a value as the result of a request without running it."""
    request = as_request(request)
    identity, owner = core.identify(request), secrets.token_hex(8)
    envelope, inline = yield from _stage(core, identity.key, owner, value)
    yield core.calls.put(request, identity, owner, envelope, inline)
    return identity.key


def _stage(core: Core, key: Key, owner: str, value: Any) -> Flow[tuple[codec.Envelope, bytes | None]]:
    """Write the pieces of a large value ahead of its commit; drop them when the value ends in an error."""
    encoded = codec.encode(value, core.settings)
    staged = 0
    try:
        for n, piece in encoded.chunks():
            yield core.calls.stage(key, owner, n, piece)
            staged = n + 1
    except Exception:
        encoded.close()
        if staged:
            yield core.calls.unstage(key, owner, staged)
        raise
    return encoded.envelope, encoded.inline


def fail(
    core: Core,
    attempt: Attempt,
    error: bytes,
    *,
    failure_ttl: float | None = None,
    negative_ttl: float | None = None,
    reason: str = "",
    note: bytes = b"",
    follow_ups: Sequence[NextUp] = (),
) -> Flow[None]:
    """End the request without a result; with a ``reason`` (see ``Reason``) it is set aside.

    ``follow_ups`` are of who is to be told. Raises LeaseLost.
    """
    settings = core.settings
    yield core.calls.fail(
        attempt,
        error,
        failure_ttl_ms=ms(settings.failure_ttl if failure_ttl is None else failure_ttl),
        negative_ms=ms(settings.negative_ttl if negative_ttl is None else negative_ttl),
        reason=reason,
        note=note,
        follow_ups=follow_ups,
    )


def retry(core: Core, attempt: Attempt, error: bytes, *, delay: float, kwargs: dict[str, Any] | None) -> Flow[None]:
    """Run the request again after ``delay`` seconds, its claim held. Raises LeaseLost, UnpackableResult."""
    packed = packing.pack_arguments(kwargs) if kwargs else b""
    ticket = _ticket_again(core, attempt, delay)
    yield core.calls.retry(attempt, ticket, delay_ms=ms(delay), kwargs=packed, error=error)


def release(core: Core, attempt: Attempt) -> Flow[None]:
    """Hand the attempt back; it counts for nothing and is next in line. Raises LeaseLost."""
    description = core.describe(attempt.request)
    ticket = core.jobs.enqueue_at_front(attempt.key, description, attempt.queue, attempt.priority)
    yield core.calls.release(attempt, ticket)


def drop_job(core: Core, attempt: Attempt) -> Flow[None]:
    """Delete the RQ job of an attempt that was given up, unless its ticket still counts."""
    state, job_id = yield core.calls.ticket(attempt.key)
    if job_id != attempt.job_id or state not in (State.PENDING, State.IN_PROGRESS, State.FAILED):
        yield core.calls.drop_job(attempt)


def crash(core: Core, attempt: Attempt, error: bytes, note: bytes = b"") -> Flow[str]:
    """The process of an attempt is dead: ``requeued`` (with a delay), ``quarantined``, ``already`` or ``alive``."""
    delay = crash_delay(core, attempt.crashes)
    word: str = yield core.calls.crash(
        attempt.key, attempt.token, _ticket_again(core, attempt, delay), delay_ms=ms(delay), error=error, note=note
    )
    return word


def _ticket_again(core: Core, attempt: Attempt, delay: float) -> Ticket:
    return core.jobs.schedule(attempt.key, core.describe(attempt.request), attempt.queue, attempt.priority, delay)


def crash_delay(core: Core, crashes: int) -> float:
    """Seconds until the next attempt after ``crashes`` earlier ones."""
    delays = core.settings.crash_delays
    return delays[min(crashes, len(delays) - 1)]


def sweep(core: Core, queue: str | None = None) -> Flow[int]:
    """Find the dead of a queue (None = of all) and set them going again: how many. Safe anywhere, at any time."""
    queues: list[str] = [queue] if queue is not None else (yield core.calls.queues())
    healed = 0
    for name in queues or [core.settings.queue]:
        healed += yield from _sweep_queue(core, name)
    return healed


def _sweep_queue(core: Core, queue: str) -> Flow[int]:
    healed, cursor = 0, 0
    while True:
        swept: Swept = yield core.calls.sweep(queue, cursor)
        calls: list[Call[str]] = [_heal_lapsed(core, found) for found in swept.lapsed]
        calls += [core.calls.revive(found, _ticket_of(core, found, 0.0)) for found in swept.ticketless]
        if calls:
            words: list[str] = yield Batch(tuple(calls))
            healed += sum(word in ("requeued", "quarantined", "revived") for word in words)
        cursor = swept.cursor
        if not cursor and len(swept.lapsed) == 0:
            return healed


def sweep_if_due(core: Core) -> Flow[int]:
    """Sweep unless somebody has, anywhere, within a third of a lease."""
    mine: bool = yield core.calls.claim_sweep()
    if not mine:
        return 0
    return (yield from sweep(core))


def _heal_lapsed(core: Core, found: Overdue) -> Call[str]:
    delay = crash_delay(core, found.crashes)
    return core.calls.crash(found.key, None, _ticket_of(core, found, delay), delay_ms=ms(delay), error=LAPSED)


def _ticket_of(core: Core, found: Overdue, delay: float) -> Ticket:
    description = redact(found.uri, core.settings.secret_params)
    return core.jobs.schedule(found.key, description, found.queue, found.priority, delay)
