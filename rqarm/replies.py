"""What Redis answers: the values that the calls give, and how they are read from what the scripts return.

Words come from the header of the script; one that is not there is from another version, and raises VersionSkew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, ClassVar

from rqarm import codec, packing
from rqarm.codec import Envelope, unpack_envelope
from rqarm.errors import CorruptResult, ForeignData, InvalidRequest, LeaseLost, RqarmError, VersionSkew
from rqarm.keys import RECORD_FIELDS, URI_FIELDS
from rqarm.model import BatchStatus, Key, Outcome, Priority, Reason, State, Token, View
from rqarm.request import BatchRequest
from rqarm.request import unpack as unpack_request
from rqarm.scripts import all_scripts
from rqarm.uri import Canonical


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

    def confirmed(self, answer: Any) -> Found:
        """The same with what the server said about its safety; an error counts as no."""
        return replace(self, status=replace(self.status, durable=answer is True))


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
    """What a taker got: an attempt, the RQ list it came from ("" = it had it before) and how many wait in its queue; or
    why it got none.

    ``reason``: ``empty``, ``foreign`` (a job of others is next, in ``list``), ``suspended``, or ``spent`` (what this
    execution took has ended: ask as another). ``last_event`` comes with ``empty``: where the events stood.
    """

    attempt: Attempt | None
    reason: str = ""
    list: str = ""
    last_event: str = ""
    left: int = 0


@dataclass(frozen=True, slots=True)
class Redirection:
    """What a redirect or a need came to: a word of lua/redirect.lua or lua/need.lua, and the URIs of a ``loop``."""

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
class QuarantineEntry(View):
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
    hidden: ClassVar[tuple[str, ...]] = ("request",)


@dataclass(frozen=True, slots=True)
class Stats(View):
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


# -- words

_WORDS: dict[str, dict[bytes, str]] = {s.name: {word.encode(): word for word in s.outcomes} for s in all_scripts()}


def read_words(verb: str, reply: Any) -> list[Any]:
    """The reply with its first element as a known word. Raises VersionSkew."""
    if isinstance(reply, list) and reply:
        word = _WORDS[verb].get(reply[0]) if isinstance(reply[0], bytes) else None
        if word is not None:
            return [word, *reply[1:]]
    raise VersionSkew(f"{verb} answered {reply!r:.100}, which this version of rqarm does not know: upgrade all parts")


def word_of(verb: str) -> Callable[[Any], str]:
    """Reads a reply that is a word."""
    return lambda reply: str(read_words(verb, reply)[0])


def word_and_state(verb: str) -> Callable[[Any], tuple[str, State]]:
    """Reads a reply that is a word and the state before, which is ``unknown`` when there was no record."""

    def parse(reply: Any) -> tuple[str, State]:
        word, *rest = read_words(verb, reply)
        return word, State(text_of(rest[0])) if rest else State.UNKNOWN

    return parse


def held(key: Key, words: list[Any]) -> list[Any]:
    """The reply to who holds an attempt. Raises LeaseLost when another does, or nobody."""
    if words[0] == "lost":
        raise LeaseLost(key, text_of(words[1]))
    return words


def held_word(verb: str, key: Key) -> Callable[[Any], str]:
    """Reads a reply that is a word, to who holds an attempt. Raises LeaseLost."""
    return lambda reply: str(held(key, read_words(verb, reply))[0])


def redirection(verb: str, key: Key) -> Callable[[Any], Redirection]:
    """Reads what a redirect, or a need, came to, to who holds the attempt. Raises LeaseLost."""

    def parse(reply: Any) -> Redirection:
        word, *rest = held(key, read_words(verb, reply))
        return Redirection(word, tuple(map(uri_in, rest[0])) if word == "loop" else ())

    return parse


def foreign_data(keys: Iterable[str], error: Exception) -> ForeignData:
    """What a WRONGTYPE answer means: somebody else wrote under our names."""
    return ForeignData(
        f"{', '.join(keys)}, or a key of the same request, holds data that rqarm did not write ({error}): look at it "
        "with TYPE, move it away or give rqarm another namespace"
    )


def torn(key: Key, missing: Any) -> RqarmError:
    return RqarmError(f"{int(missing)} pieces of the result of {key!r} are gone before its commit: write it again")


# -- a record, its result, its attempt

_MISSING = ord("-")
# a dictionary answers ten times as fast as the constructor of an enum
_STATES: dict[bytes, State] = {state.value.encode(): state for state in State}
_PRIORITIES: dict[int, Priority] = {priority.value: priority for priority in Priority}
OUTCOMES: dict[str, Outcome] = {outcome.value: outcome for outcome in Outcome}
#: stored when a lease lapses and nobody is left to say why
LAPSED = packing.pack_error("LeaseLapsed", "the worker fell silent for longer than its lease", "")
#: stands in for a request that cannot be read
NO_REQUEST = BatchRequest("", operation="unreadable")


def read_status(key: Key, packed: bytes, outcome: Outcome | None = None, value: Any = None) -> BatchStatus:
    """The record as it is packed in every answer. Raises VersionSkew on a state this version does not know."""
    field = _fields(packed)
    est_ms = int(field["est_ms"] or 0)
    fraction, message = _progress(field["progress"])
    return BatchStatus(
        key=key,
        state=read_state(key, field["state"]) if field["state"] else State.UNKNOWN,
        outcome=outcome,
        uri=uri_in(joined([field[name] for name in URI_FIELDS])),
        sticky=field["sticky"] == b"1",
        submitted=moment(field["submitted_ms"]),
        started=moment(field["started_ms"]),
        ended=moment(field["ended_ms"]),
        estimated_time=est_ms / 1000 if est_ms else None,
        progress=fraction,
        progress_message=message,
        attempts=int(field["attempts"] or 0),
        error=packing.unpack_error(field["error"] or LAPSED) if field["error"] is not None else None,
        worker=text_of(field["worker"]) if field["worker"] else None,
        queue=text_of(field["queue"] or b""),
        quarantined=field["quarantined"] is not None,
        reason=_reason(field["quarantined"]),
        redirect=Key(text_of(field["alias"])) if field["alias"] else None,
        value=value,
    )


def status_of_new(key: Key, request: BatchRequest, identity: Canonical, queue: str, fresh: list[int]) -> BatchStatus:
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


def _fields(packed: bytes) -> dict[str, bytes | None]:
    """The record as the prelude packed it: netstrings in the order of RECORD_FIELDS, ``-`` for what is missing."""
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


def read_state(key: Key, word: Any) -> State:
    state = _STATES.get(word)
    if state is None:
        raise unknown_state(key, word)
    return state


def unknown_state(key: Key, word: Any) -> VersionSkew:
    told = text_of(word)
    return VersionSkew(
        f"request {key!r} is in state {told!r}, which this version of rqarm does not know: upgrade, or forget it"
    )


def _progress(packed: bytes | None) -> tuple[float | None, str]:
    if not packed:
        return None, ""
    told = json.loads(packed)
    return float(told["fraction"]), str(told.get("message", ""))


def _reason(word: bytes | None) -> str:
    """Why it was set aside. An earlier form knew one reason and wrote 1 for it."""
    text = text_of(word or b"")
    return str(Reason.POISON) if text == "1" else text


def moment(unix_ms: Any) -> datetime | None:
    """A time in Unix ms; None for none, and for the server's -1 and -2."""
    at_ms = int(unix_ms) if unix_ms else -1
    return datetime.fromtimestamp(at_ms / 1000, UTC) if at_ms >= 0 else None


def read_stored(key: Key, values: list[bytes | None]) -> Stored | None:
    """A result as the scripts answer it: owner, envelope, inline bytes, and the key of the root of an alias."""
    if not values or values[0] is None:
        return None
    owner, packed, inline, *root = values
    envelope = unpack_envelope(packed or b"")
    # the result of an alias lies under the key of its root
    return Stored(
        Key(text_of(root[0])) if root and root[0] else key,
        text_of(owner),
        envelope,
        None if envelope.chunks else inline or b"",
    )


def read_attempt(key: Key, values: list[Any], *, owns_job: bool = False) -> Attempt:
    """What was started. Raises UnreadableRequest."""
    token, number, packed, kwargs, retries, crashes, queue, priority, job_id, pushed_ms, started_ms, *rest = values
    uri, trace = rest[:3], text_of(rest[3]) if len(rest) > 3 else ""
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
            text_of(queue),
            _PRIORITIES[int(priority)],
            waited,
            text_of(job_id),
            owns_job,
            trace,
        )

    try:
        return attempt(unpack_request(packed or b"", joined(uri)), packing.unpack(kwargs) if kwargs else {})
    except (VersionSkew, InvalidRequest, CorruptResult) as reason:
        raise UnreadableRequest(attempt(NO_REQUEST, {}), reason) from reason


# -- what is set aside, what is dead

#: the fields of a record that ``read_entry`` reads
ENTRY_FIELDS = (
    "state", "quarantined", "request", "queue", "priority", "error", "note", "attempts", "crashes", "retries", "kwargs",
    "submitted_ms", "started_ms", "ended_ms", "worker", "job_id", *URI_FIELDS,
)  # fmt: skip


def read_entry(key: Key, values: list[bytes | None]) -> QuarantineEntry | State:
    """What ENTRY_FIELDS say of a request that is set aside; the state of one that is not."""
    field = dict(zip(ENTRY_FIELDS, values, strict=True))
    state = read_state(key, field["state"]) if field["state"] else State.UNKNOWN
    if state is not State.FAILED or field["quarantined"] is None:
        return state
    identity = joined(values[-len(URI_FIELDS) :])
    _, operation, uri = [*text_of(identity).split("\n", 2), "", ""][:3]
    try:
        request = unpack_request(field["request"] or b"", identity)
    except (VersionSkew, InvalidRequest, CorruptResult):
        request = None
    error, note = packing.unpack_error(field["error"] or LAPSED), read_mapping(field["note"])
    return QuarantineEntry(
        key=key,
        reason=_reason(field["quarantined"]),
        uri=uri,
        operation=operation,
        request=request,
        route=str(note.get("route", "")),
        queue=text_of(field["queue"] or b""),
        priority=Priority(int(field["priority"] or 1)),
        exception=error["type"],
        message=error["message"],
        traceback=error["traceback"],
        attempts=int(field["attempts"] or 0),
        crashes=int(field["crashes"] or 0),
        retries=int(field["retries"] or 0),
        kwargs={**note.get("kwargs", {}), **read_mapping(field["kwargs"])},
        info=note.get("info", {}),
        submitted=moment(field["submitted_ms"]),
        started=moment(field["started_ms"]),
        when=moment(field["ended_ms"]),
        worker=text_of(field["worker"] or b""),
        job_id=text_of(field["job_id"] or b""),
    )


def read_mapping(packed: bytes | None) -> dict[str, Any]:
    """What a request can be shown without: bytes that cannot be read are left out."""
    try:
        found = packing.unpack(packed) if packed else {}
    except CorruptResult:
        found = {}
    return found if isinstance(found, dict) else {}


def read_overdue(row: Sequence[Any]) -> Overdue:
    key, uri, queue, priority, _ = row
    return Overdue(Key(text_of(key)), uri_in(uri), text_of(queue), Priority(int(priority)))


# -- counters, events and lists


def read_texts(flat: list[Any]) -> dict[str, str]:
    return {text_of(name): text_of(value) for name, value in rows(flat, 2)}


def read_counts(flat: list[Any]) -> dict[str, int]:
    return {text_of(name): int(n) for name, n in rows(flat, 2)}


def read_outcomes(flat: list[Any]) -> dict[str, int]:
    """The counters that are plain words; the names of the others have a colon or a number."""
    return {name: int(n) for name, n in read_texts(flat).items() if name.replace("_", "").isalpha() and n.isdigit()}


def read_events(raw: Iterable[Any]) -> list[tuple[str, dict[str, str]]]:
    found = []
    for entry_id, fields in raw:
        pairs = fields.items() if isinstance(fields, dict) else rows(fields, 2)
        found.append((text_of(entry_id), {text_of(name): text_of(value) for name, value in pairs}))
    return found


def joined(pieces: Iterable[bytes | None]) -> bytes:
    return b"".join(piece or b"" for piece in pieces)


def text_of(raw: Any) -> str:
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)


def uri_in(identity: Any) -> str:
    """The URI of an identity, which has a version and the operation in front of it."""
    return text_of(identity).split("\n", 2)[-1]


def rows(flat: Sequence[Any], width: int) -> list[Sequence[Any]]:
    return [flat[i : i + width] for i in range(0, len(flat), width)]
