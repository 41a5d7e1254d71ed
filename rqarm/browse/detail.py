"""One request in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, ClassVar

from rqarm import packing
from rqarm.browse.attempts import FIELD, AttemptView, attempts_of
from rqarm.browse.claims import LimitUse, limit_use
from rqarm.browse.events import Event
from rqarm.calls import Batch, Call, Command
from rqarm.codec import unpack_envelope
from rqarm.errors import CorruptResult, InvalidRequest, VersionSkew
from rqarm.flows import Core, Flow
from rqarm.keys import URI_FIELDS
from rqarm.model import BatchStatus, Key, Priority, State, Token, View
from rqarm.replies import joined, moment, read_events, read_mapping, read_status, read_words, rows, text_of
from rqarm.request import BatchRequest
from rqarm.request import unpack as unpack_request
from rqarm.uri import Step, canonicalize, check_key, is_secret, redact

#: events that are looked at behind each time of a record, and payloads that are listed
WINDOW, PAYLOADS = 200, 100


@dataclass(frozen=True, slots=True)
class ResultView(View):
    """What a result is, without its value. ``missing``: pieces that the server has lost; then it cannot be read."""

    kind: str
    content_type: str
    filename: str
    size: int
    stored: int
    encoding: str
    chunks: int
    missing: int
    owner: str


@dataclass(frozen=True, slots=True)
class PayloadView(View):
    """A payload of somebody who waits. ``value`` only when it was asked for and can be read."""

    id: str
    size: int
    value: Any = None


@dataclass(frozen=True, slots=True)
class RequestDetail(View):
    """Everything that is known of one request.

    ``attempts``: what is known of each, with its error. ``request``: as it was submitted, None when it cannot be read
    here (``unreadable`` says why). ``original``: the URI as it was given. ``steps``: why it has its key. ``timeline``:
    its events that are still kept and were found. ``listeners``: processes that wait for it. ``expires``: None =
    nothing expires. Durations are seconds.
    """

    key: Key
    status: BatchStatus
    seen: datetime
    timeline: tuple[Event, ...]
    attempts: tuple[AttemptView, ...] = ()
    request: BatchRequest | None = None
    unreadable: str = ""
    original: str = ""
    operation: str = ""
    identity: str = ""
    steps: tuple[Step, ...] = ()
    tags: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    expires: datetime | None = None
    ttl: float | None = None
    negative_until: datetime | None = None
    due: datetime | None = None
    retries: int = 0
    crashes: int = 0
    kwargs: dict[str, Any] = field(default_factory=dict)
    progress_message: str = ""
    token: Token | None = None
    lease_until: datetime | None = None
    lease_left: float | None = None
    job_id: str = ""
    job_status: str | None = None
    job_worker: str = ""
    limit: LimitUse | None = None
    parked_at: int = 0
    result: ResultView | None = None
    payload_count: int = 0
    payloads: tuple[PayloadView, ...] = ()
    listeners: int = 0
    record: dict[str, str] = field(default_factory=dict)
    # it stands in its parts
    hidden: ClassVar[tuple[str, ...]] = ("request",)

    def redacted(self, secret_params: Sequence[str]) -> RequestDetail:
        """The same for people: secret parameters show ``***``, and the request itself is left out."""

        def hide(text: str) -> str:
            return redact(text, secret_params)

        def part(text: str) -> str:
            return hide(text) if "?" in text else hide(f"?{text}")[1:]

        params = [
            [name, "***" if is_secret(name, secret_params) else value] for name, value in self.options.get("params", ())
        ]
        return replace(
            self,
            status=replace(self.status, uri=hide(self.status.uri)),
            request=None,
            original=hide(self.original),
            identity=hide(self.identity),
            steps=tuple(replace(step, before=part(step.before), after=part(step.after)) for step in self.steps),
            options={**self.options, "params": params} if params else self.options,
            record={name: value for name, value in self.record.items() if name not in URI_FIELDS},
        )


def inspect(core: Core, key: str, *, values: bool = False) -> Flow[RequestDetail]:
    """Everything about one request; ``values`` with the payloads themselves."""
    name = check_key(key)
    detail: RequestDetail
    located: BatchStatus
    detail, located, listeners = yield Batch(
        (inspect_call(core, name, values), core.calls.locate(name, core.settings.queue), _listeners(core, name))
    )
    if located.state is State.PENDING and located.queue != core.settings.queue:
        located = yield core.calls.locate(name, located.queue)
    status = detail.status
    if located.state is status.state:  # else it has moved on between the two
        status = replace(status, position=located.position, eta=located.eta)
    return replace(detail, status=status, listeners=listeners)


def _listeners(core: Core, key: Key) -> Command[int]:
    def parse(reply: Any) -> int:
        counts = list(reply.values()) if isinstance(reply, dict) else [pair[-1] for pair in rows(_flat(reply), 2)]
        return int(counts[0]) if counts else 0

    return Command(("PUBSUB", "NUMSUB", core.keys.done(key)), parse)


def _flat(reply: Any) -> list[Any]:
    return [part for each in reply for part in (each if isinstance(each, list | tuple) else (each,))]


def inspect_call(core: Core, key: Key, values: bool = False) -> Call[RequestDetail]:
    """The look itself; position, eta and listeners are not in it."""

    def parse(reply: Any) -> RequestDetail:
        word, now_ms, events, *rest = read_words("inspect", reply)
        timeline = tuple(
            Event(entry_id, its.get("verb", ""), key, its.get("state", ""))
            for entry_id, its in sorted(read_events(events), key=lambda entry: _order(entry[0]))
        )
        now = moment(now_ms)
        assert now is not None, "the server has a time"
        if word == "unknown":
            return RequestDetail(key, BatchStatus(key, State.UNKNOWN), now, timeline)
        return _detail(core, key, now, timeline, rest, values)

    argv = (key, core.jobs.job_prefix, WINDOW, PAYLOADS, int(values))
    return core.calls.index_call("inspect", core.keys.status(key), argv, parse)


def _detail(
    core: Core, key: Key, now: datetime, timeline: tuple[Event, ...], rest: list[Any], values: bool
) -> RequestDetail:
    packed, flat, expires_ms, result, payload_count, payloads, job, limit = rest
    stored = {text_of(name): value for name, value in rows(flat, 2)}
    identity = joined(stored.get(name) for name in URI_FIELDS)
    expires, lease_until = moment(expires_ms), moment(stored.get("lease_until"))
    request, unreadable = _request_of(stored.get("request"), identity)
    status = read_status(key, packed)
    return RequestDetail(
        key=key,
        status=status,
        seen=now,
        timeline=timeline,
        attempts=attempts_of(status, stored, now),
        request=request,
        unreadable=unreadable,
        original=request.uri if request is not None else status.uri,
        operation=text_of(identity).split("\n", 2)[1] if identity.count(b"\n") > 1 else "",
        identity=text_of(identity),
        steps=_steps(core, request),
        tags=request.tags if request is not None else (),
        options=_options(request),
        expires=expires,
        ttl=_left(expires, now),
        negative_until=moment(stored.get("negative_until")),
        due=moment(stored.get("due_ms")),
        retries=int(stored.get("retries") or 0),
        crashes=int(stored.get("crashes") or 0),
        kwargs=read_mapping(stored.get("kwargs")),
        progress_message=status.progress_message,
        token=Token(int(stored["token"])) if stored.get("token") else None,
        lease_until=lease_until,
        lease_left=_left(lease_until, now),
        job_id=text_of(stored.get("job_id") or ""),
        job_status=text_of(job[0]) if job else None,
        job_worker=text_of(job[1]) if job else "",
        limit=limit_use(limit[:5]) if limit else None,
        parked_at=int(limit[5]) if limit else 0,
        result=_result_view(result) if result else None,
        payload_count=int(payload_count),
        payloads=tuple(_payload(row, values) for row in rows(payloads, 3)),
        record={name: text_of(value) for name, value in stored.items() if not name.startswith(_UNREADABLE)},
    )


#: what the fields of the record begin with that are not text
_UNREADABLE = ("request", "kwargs", "error", "recall", FIELD)


def _request_of(packed: bytes | None, identity: bytes) -> tuple[BatchRequest | None, str]:
    try:
        return unpack_request(packed or b"", identity), ""
    except (VersionSkew, InvalidRequest) as reason:
        return None, str(reason)


def _steps(core: Core, request: BatchRequest | None) -> tuple[Step, ...]:
    if request is None:
        return ()
    ignored = core.settings.ignore_params
    form = canonicalize(request.uri, request.params, operation=request.operation, ignore_params=ignored, explain=True)
    return form.steps


def _options(request: BatchRequest | None) -> dict[str, Any]:
    """What was asked for beside the URI; only what is not at its default."""
    if request is None:
        return {}
    asked = {
        "params": [list(pair) for pair in request.params],
        "sticky": request.sticky,
        "ttl": request.ttl,
        "key": str(request.key) if request.has_readable_key else None,
        "queue": request.queue,
        "priority": None if request.priority is Priority.DEFAULT else request.priority.name.lower(),
        "estimated_time": request.estimated_time,
        "tags": list(request.tags),
    }
    return {name: value for name, value in asked.items() if value}


def _result_view(values: list[Any]) -> ResultView:
    owner, packed, _, chunks, missing, _ = values
    envelope = unpack_envelope(packed or b"")
    return ResultView(
        kind=envelope.kind,
        content_type=envelope.content_type,
        filename=envelope.filename,
        size=envelope.size,
        stored=envelope.stored,
        encoding=envelope.encoding,
        chunks=int(chunks),
        missing=int(missing),
        owner=text_of(owner),
    )


def _payload(row: Sequence[Any], values: bool) -> PayloadView:
    name, size, packed = row
    value = None
    if values:
        try:
            value = packing.unpack(packed)
        except CorruptResult:
            value = packed
    return PayloadView(text_of(name), int(size), value)


def _left(until: datetime | None, now: datetime) -> float | None:
    return None if until is None else (until - now).total_seconds()


def _order(entry_id: str) -> tuple[int, int]:
    unix_ms, _, n = entry_id.partition("-")
    return int(unix_ms), int(n or 0)
