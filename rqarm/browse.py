"""What an operator looks at and does: search, one request in full, the cache, claims, workers.

Every look is a bounded piece of work for the server and at most three round trips, whatever is stored: pages of
indexes, counts, samples; never a walk over the key space. What changes something is a transition like the others.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from typing import Any, TypeVar
from urllib.parse import quote

from rqarm import attempts, codec
from rqarm.calls import (
    NO_REQUEST,
    Attempt,
    Batch,
    Call,
    Command,
    joined,
    ms,
    read_envelope,
    read_events,
    read_status,
    read_words,
    rows,
    text_of,
)
from rqarm.errors import CorruptResult, InvalidRequest, LeaseLost, RequestUnknown, VersionSkew
from rqarm.flows import Core, Event, Flow
from rqarm.keys import URI_FIELDS
from rqarm.model import BatchStatus, Key, Priority, State, Token
from rqarm.request import MAX_SECONDS, MIN_TTL_S, BatchRequest
from rqarm.request import unpack as unpack_request
from rqarm.scripts import script
from rqarm.uri import Step, canonicalize, check_key, family, redact

T = TypeVar("T")

#: records that one page of a search looks at, and the most entries of a page. Source: benchmarks/views.py, 5 to 20 ms
LOOKS, LONGEST_PAGE = 1_000, 500
#: entries that one step of a filtered clear looks at, and of an invalidation
CLEAR_STEP, INVALIDATE_STEP = 500, 100
#: events that are looked at behind each time of a record, and payloads that are listed
WINDOW, PAYLOADS = 200, 100
#: RQ workers that are listed at the most, and claims among which their requests are looked for
MOST_WORKERS, MOST_CLAIMS = 1_000, 500
#: upper ends of the ranges of times to live and ages, in seconds; one more range is above the last
RANGES_S = (60.0, 600.0, 3_600.0, 21_600.0, 86_400.0, 604_800.0, 2_592_000.0)

QUARANTINED = "quarantined"
#: where requests of a state are found, in the words of search.lua; newest first where the index knows
PLACES: dict[str, str] = {
    "": "in_progress pending -failed -cancelled -quarantined -completed",
    State.UNKNOWN: "",
    State.PENDING: "pending",
    State.IN_PROGRESS: "in_progress",
    State.COMPLETED: "-completed",
    State.FAILED: "-failed -quarantined",
    State.CANCELLED: "-cancelled",
    QUARANTINED: "-quarantined",
}
#: the orders of ``rm.cache.page``
ORDERS: dict[str, str] = {"expiry": "completed", "-expiry": "-completed", "size": "-largest"}

_CURSOR = re.compile(r"-?[a-z_]+(?:@\S+)? \S+ \S+ [0-9]{1,15}")
_HASHED = re.compile(r"[0-9a-f]{32}")
_PLACEHOLDER = re.compile(r"(\{[^{}]*\})")
_SITE = re.compile(r"^[A-Za-z][\w+.-]*://(?:[^/?#@]*@)?")
_RESERVED = "/:?#[]@!$&'()*+,;=%~"


class _Plain:
    """``to_dict`` for views."""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types: times in ISO 8601, durations in seconds."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, BatchStatus | _Plain):
        return value.to_dict()
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, IntEnum):
        return value.name.lower()
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    return value


# -- what is seen


@dataclass(frozen=True, slots=True)
class SearchPage(_Plain):
    """Some of what was found. ``cursor`` leads to the next page; "" at the end.

    ``looked_at`` of the ``total`` entries of the indexes have been looked at so far, this page included. A page can be
    short, or empty, and not be the last.
    """

    entries: tuple[BatchStatus, ...]
    cursor: str
    looked_at: int
    total: int


@dataclass(frozen=True, slots=True)
class CacheEntry(_Plain):
    """A cached result. ``size``: stored bytes. ``expires``: None = sticky."""

    status: BatchStatus
    size: int
    expires: datetime | None


@dataclass(frozen=True, slots=True)
class CachePage(_Plain):
    """A page of the cache; ``cursor`` leads to the next, "" at the end."""

    entries: tuple[CacheEntry, ...]
    cursor: str
    total: int


@dataclass(frozen=True, slots=True)
class Range(_Plain):
    """How many lie above the range before and at or below ``upto`` seconds; None = all above."""

    upto: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Share(_Plain):
    """What one name has of a sample: entries, and their stored bytes."""

    name: str
    entries: int
    size: int


@dataclass(frozen=True, slots=True)
class CacheOverview(_Plain):
    """The cache in numbers.

    Exact: ``entries``, ``temporary``, ``sticky``, ``bytes`` (stored) and ``ttl``, the temporary ones by time to live.
    ``ages``, ``routes`` and ``kinds`` count ``sampled`` entries, taken at equal distances from the index by expiry:
    all, when ``sampled`` is ``entries``.
    """

    entries: int
    temporary: int
    sticky: int
    bytes: int
    ttl: tuple[Range, ...]
    largest: tuple[CacheEntry, ...]
    sampled: int
    ages: tuple[Range, ...]
    routes: tuple[Share, ...]
    kinds: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class LimitUse(_Plain):
    """A limit of a route: its places, who runs in one, whose is kept, who waits for one."""

    name: str
    places: int
    running: int
    called: int
    parked: int


@dataclass(frozen=True, slots=True)
class Claim(_Plain):
    """A request that runs. Durations are seconds on the server's clock; ``left`` is below 0 when it is ``overdue``."""

    status: BatchStatus
    token: Token
    lease: float
    lease_until: datetime
    left: float
    renewed_ago: float
    overdue: bool
    limit: str


@dataclass(frozen=True, slots=True)
class ClaimPage(_Plain):
    """Claims, the first to lapse first. ``total`` and ``overdue`` count all; ``next_offset``: None at the end."""

    entries: tuple[Claim, ...]
    total: int
    overdue: int
    next_offset: int | None
    limits: tuple[LimitUse, ...]


@dataclass(frozen=True, slots=True)
class WorkerView(_Plain):
    """An RQ worker that listens to one of our queues, as it said itself at its last heartbeat.

    ``keys``: the requests that it runs, looked for among the first 500 claims. ``job_id``: the job that RQ's tools
    show. ``version``: of RQ. ``rqarm_version``: "" of RQ's own worker, which tells none.
    """

    name: str
    state: str
    queues: tuple[str, ...]
    keys: tuple[Key, ...]
    job_id: str | None
    succeeded: int
    failed: int
    working_time: float
    born: datetime | None
    heartbeat: datetime | None
    heartbeat_age: float | None
    hostname: str
    pid: int | None
    version: str
    python_version: str
    stopping: bool
    rqarm_version: str


@dataclass(frozen=True, slots=True)
class WorkersView(_Plain):
    """The workers, by name. ``suspended``: `rq suspend` holds all of them."""

    suspended: bool
    entries: tuple[WorkerView, ...]


@dataclass(frozen=True, slots=True)
class ResultView(_Plain):
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
class PayloadView(_Plain):
    """A payload of somebody who waits. ``value`` only when it was asked for and can be read."""

    id: str
    size: int
    value: Any = None


@dataclass(frozen=True, slots=True)
class RequestDetail(_Plain):
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
    attempts: tuple[attempts.AttemptView, ...] = ()
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

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types; the request stands in its parts."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self) if each.name != "request"}

    def redacted(self, secret_params: Sequence[str]) -> RequestDetail:
        """The same for people: secret parameters show ``***``, and the request itself is left out."""

        def hide(text: str) -> str:
            return redact(text, secret_params)

        def part(text: str) -> str:
            return hide(text) if "?" in text else hide(f"?{text}")[1:]

        params = [[name, _hidden(name, value, secret_params)] for name, value in self.options.get("params", ())]
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


def _hidden(name: str, value: str | None, secret_params: Sequence[str]) -> str | None:
    """The value of a parameter, unless ``redact`` hides it in a query."""
    query = f"?{quote(name, safe='')}=x"
    return value if redact(query, secret_params) == query else "***"


# -- search


def search(
    core: Core,
    text: str = "",
    *,
    state: str | None = None,
    route: str | None = None,
    tag: str | None = None,
    queue: str | None = None,
    cursor: str = "",
    limit: int = 50,
) -> Flow[SearchPage]:
    """One page. What ``text`` names exactly, as a key or as a URI, comes first on the first page."""
    wanted = str(state or "")
    if wanted not in PLACES:
        known = ", ".join(word for word in PLACES if word)
        raise InvalidRequest(f"one of {known} is needed, not {ascii(wanted)[:60]}", where="state")
    text = text.strip()
    exact = _exact_keys(core, text)
    places = "-with_tag" if tag else PLACES[wanted]
    if _HASHED.fullmatch(text):
        places = ""  # nothing but itself begins with a whole key
    found: _Found = yield search_call(
        core,
        places,
        exact=exact,
        state=wanted,
        queue=queue or "",
        tag=_tag(tag) if tag else "",
        route=route or "",
        texts=_texts(text),
        cursor=cursor,
        limit=limit,
    )
    entries = [entry.status for entry in found.entries]
    if text:
        entries = [entry for entry in entries if entry.key in exact or _shows(core, entry, text)]
    return SearchPage(tuple(entries), found.cursor, found.looked_at, found.total)


def cache_page(core: Core, order: str, cursor: str, limit: int) -> Flow[CachePage]:
    """A page of the cached results in one of ORDERS."""
    if order not in ORDERS:
        raise InvalidRequest(f"one of {', '.join(ORDERS)} is needed, not {ascii(order)[:60]}", where="order")
    found: _Found = yield search_call(core, ORDERS[order], cursor=cursor, limit=limit)
    return CachePage(found.entries, found.cursor, found.total)


@dataclass(frozen=True, slots=True)
class _Found:
    entries: tuple[CacheEntry, ...]
    cursor: str
    looked_at: int
    total: int


def search_call(
    core: Core,
    places: str,
    *,
    exact: Sequence[Key] = (),
    state: str = "",
    queue: str = "",
    tag: str = "",
    route: str = "",
    texts: Sequence[str] = (),
    cursor: str = "",
    limit: int = 50,
) -> Call[_Found]:
    """A page of the indexes that PLACES names, as search.lua filters it."""
    if not 1 <= limit <= LONGEST_PAGE:
        raise InvalidRequest(f"from 1 to {LONGEST_PAGE} entries are allowed, not {limit}", where="limit")
    if cursor and not _CURSOR.fullmatch(cursor):
        raise InvalidRequest("not a cursor of a page before: give it as it came", where="cursor")

    def parse(reply: Any) -> _Found:
        _, behind, looked_at, total, *found = read_words("search", reply)
        return _Found(tuple(_cache_entry(row) for row in rows(found, 4)), text_of(behind), int(looked_at), int(total))

    argv = (
        places,
        " ".join(exact),
        state,
        queue,
        tag,
        *on_route(route),
        json.dumps(list(texts)),
        cursor,
        limit,
        LOOKS,
    )
    return _call(core, "search", core.keys.named("queues"), argv, parse)


def _exact_keys(core: Core, text: str) -> tuple[Key, ...]:
    """The keys that the text can mean: as a key, and as a URI."""
    if not text:
        return ()
    found = []
    for meant in (check_key, lambda uri: BatchRequest(uri).identify(core.settings.ignore_params).key):
        try:
            found.append(meant(text))
        except InvalidRequest:
            continue  # it cannot be that; the rest of the search finds it as a part of a URI
    return tuple(dict.fromkeys(found))


def _texts(text: str) -> list[str]:
    """The forms in which the text can stand in a canonical URI, in lower case."""
    given = (text, text.lower())  # beyond ASCII the two are encoded differently
    encoded = [quote(form, safe=_RESERVED) for form in given]
    forms = [*given, *encoded, *(form.replace("%20", "+") for form in encoded)]
    return list(dict.fromkeys(form.lower() for form in forms if form))


def _shows(core: Core, entry: BatchStatus, text: str) -> bool:
    """Whether the text is in what people may see of an entry: a search must not answer what is in a secret."""
    shown = redact(entry.uri, core.settings.secret_params).lower()
    return entry.key.startswith(text) or any(form in shown for form in _texts(text))


def on_route(route: str) -> tuple[str, str]:
    """A route for the scripts: itself, and the Lua pattern of the beginning of a URI on it.

    It is an operation, or host and path as they begin: whole segments, ``{name}`` is any one of them, ``{name:path}``
    any number.
    """
    if not route:
        return "", ""
    if len(route) > 1_000:
        raise InvalidRequest(f"{len(route)} characters, at most 1,000 are allowed", where="route")
    pieces = []
    for piece in _PLACEHOLDER.split(_SITE.sub("", route).rstrip("/")):
        if _PLACEHOLDER.fullmatch(piece):
            pieces.append("[^?#]+" if piece.endswith(":path}") else "[^/?#]+")
        else:
            pieces.append(re.sub(r"([^A-Za-z0-9])", r"%\1", quote(piece, safe=_RESERVED)))
    return route, f"^{''.join(pieces)}()"


# -- one request


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
        now = _moment(now_ms)
        assert now is not None, "the server has a time"
        if word == "unknown":
            return RequestDetail(key, BatchStatus(key, State.UNKNOWN), now, timeline)
        return _detail(core, key, now, timeline, rest, values)

    argv = (key, core.jobs.job_prefix, WINDOW, PAYLOADS, int(values))
    return _call(core, "inspect", core.keys.status(key), argv, parse)


def _detail(
    core: Core, key: Key, now: datetime, timeline: tuple[Event, ...], rest: list[Any], values: bool
) -> RequestDetail:
    packed, flat, expires_ms, result, payload_count, payloads, job, limit = rest
    stored = {text_of(name): value for name, value in rows(flat, 2)}
    identity = joined(stored.get(name) for name in URI_FIELDS)
    expires, lease_until = _moment(expires_ms), _moment(stored.get("lease_until"))
    request, unreadable = _request_of(stored.get("request"), identity)
    status = read_status(key, packed)
    return RequestDetail(
        key=key,
        status=status,
        seen=now,
        timeline=timeline,
        attempts=attempts.attempts_of(status, stored, now),
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
        negative_until=_moment(stored.get("negative_until")),
        due=_moment(stored.get("due_ms")),
        retries=int(stored.get("retries") or 0),
        crashes=int(stored.get("crashes") or 0),
        kwargs=_kwargs(stored.get("kwargs")),
        progress_message=_message(stored.get("progress")),
        token=Token(int(stored["token"])) if stored.get("token") else None,
        lease_until=lease_until,
        lease_left=_left(lease_until, now),
        job_id=text_of(stored.get("job_id") or ""),
        job_status=text_of(job[0]) if job else None,
        job_worker=text_of(job[1]) if job else "",
        limit=_limit_use(limit[:5]) if limit else None,
        parked_at=int(limit[5]) if limit else 0,
        result=_result_view(result) if result else None,
        payload_count=int(payload_count),
        payloads=tuple(_payload(row, values) for row in rows(payloads, 3)),
        record={name: text_of(value) for name, value in stored.items() if not name.startswith(_UNREADABLE)},
    )


#: what the fields of the record begin with that are not text
_UNREADABLE = ("request", "kwargs", "error", "recall", attempts.FIELD)


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


def _kwargs(packed: bytes | None) -> dict[str, Any]:
    try:
        found = codec.unpack(packed) if packed else {}
    except CorruptResult:
        return {}
    return found if isinstance(found, dict) else {}


def _message(progress: bytes | None) -> str:
    return str(json.loads(progress).get("message") or "") if progress else ""


def _result_view(values: list[Any]) -> ResultView:
    owner, packed, _, chunks, missing, _ = values
    envelope = read_envelope(packed or b"")
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
            value = codec.unpack(packed)
        except CorruptResult:
            value = packed
    return PayloadView(text_of(name), int(size), value)


# -- the cache


def cache_overview(core: Core, sample: int) -> Flow[CacheOverview]:
    """The cache in numbers, from one look; ``sample`` entries are read for what the indexes do not know."""
    answer: CacheOverview = yield survey_call(core, sample)
    return answer


def survey_call(core: Core, sample: int, largest: int = 10) -> Call[CacheOverview]:
    """The look itself; with the ``largest`` entries."""
    if not 1 <= sample <= 2_000:
        raise InvalidRequest(f"from 1 to 2,000 entries are allowed, not {sample}", where="sample")

    def parse(reply: Any) -> CacheOverview:
        _, now_ms, temporary, sticky, size, counts, top, sampled = read_words("survey", reply)
        return _overview(int(now_ms), int(temporary), int(sticky), int(size), counts, rows(top, 4), rows(sampled, 4))

    argv = (sample, largest, json.dumps([ms(upto) for upto in RANGES_S]))
    return _call(core, "survey", core.keys.named("results"), argv, parse)


def _overview(
    now_ms: int,
    temporary: int,
    sticky: int,
    size: int,
    counts: Sequence[int],
    top: list[Sequence[Any]],
    sampled: list[Sequence[Any]],
) -> CacheOverview:
    uptos: tuple[float | None, ...] = (*RANGES_S, None)
    ages: Counter[float | None] = Counter()
    routes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    route_sizes: Counter[str] = Counter()
    kind_sizes: Counter[str] = Counter()
    for ended_ms, stored, identity, packed in sampled:
        age_s = (now_ms - int(ended_ms or now_ms)) / 1000
        ages[next((upto for upto in RANGES_S if age_s <= upto), None)] += 1
        _, operation, uri = (*text_of(identity).split("\n", 2), "", "")[:3]
        name, kind = family(uri, operation), _kind(packed)
        routes[name] += 1
        route_sizes[name] += int(stored)
        kinds[kind] += 1
        kind_sizes[kind] += int(stored)
    return CacheOverview(
        entries=temporary + sticky,
        temporary=temporary,
        sticky=sticky,
        bytes=size,
        ttl=tuple(Range(upto, int(count)) for upto, count in zip(uptos, counts, strict=True)),
        largest=tuple(_cache_entry(row) for row in top),
        sampled=len(sampled),
        ages=tuple(Range(upto, ages[upto]) for upto in uptos),
        routes=tuple(Share(name, n, route_sizes[name]) for name, n in routes.most_common()),
        kinds=tuple(Share(name, n, kind_sizes[name]) for name, n in kinds.most_common()),
    )


def _kind(packed: bytes) -> str:
    if packed == b"redirect":
        return "redirect"
    try:
        return str(read_envelope(packed).kind)
    except (CorruptResult, VersionSkew):
        return "unreadable"


def _cache_entry(row: Sequence[Any]) -> CacheEntry:
    key, packed, score, size = row
    score = text_of(score) if score is not None else "inf"
    expires = None if score in ("inf", "+inf") else _moment(int(float(score)))
    return CacheEntry(read_status(Key(text_of(key)), packed), int(float(size or 0)), expires)


def retain(core: Core, key: str, ttl: float | None) -> Flow[bool]:
    """Keep a result for ``ttl`` seconds from now on; None = for good. False: there is no result to keep."""
    word: str = yield retain_call(core, check_key(key), None if ttl is None else _seconds(ttl, "ttl"))
    if word == "unknown":
        raise RequestUnknown(key)
    return word == "retained"


def retain_call(core: Core, key: Key, ttl: float | None) -> Call[str]:
    """``retained`` | ``no_result`` | ``unknown``."""
    argv = (key, 0 if ttl is None else ms(ttl))
    return _call(core, "retain", core.keys.status(key), argv, lambda reply: str(read_words("retain", reply)[0]))


def clear(core: Core, route: str | None, older_than: float | None, *, temporary_only: bool) -> Flow[int]:
    """Forget the cached results that pass, step by step; how many."""
    age_ms = ms(_seconds(older_than, "older_than")) if older_than is not None else 0
    named, pattern = on_route(route or "")
    cleared, cursor = 0, ""
    while True:
        step: tuple[int, int, str] = yield core.calls.clear(
            temporary_only=temporary_only, step=CLEAR_STEP, route=named, pattern=pattern, age_ms=age_ms, cursor=cursor
        )
        n, looked_at, cursor = step
        cleared += n
        if not looked_at:
            return cleared


def invalidate(core: Core, tags: str | Iterable[str]) -> Flow[int]:
    """Forget the cached results that carry one of the tags, step by step; how many."""
    cleared = 0
    for tag in [tags] if isinstance(tags, str) else list(tags):
        cursor = ""
        while True:
            step: tuple[int, int, str] = yield invalidate_call(core, tag, cursor)
            dropped, looked_at, cursor = step
            cleared += dropped
            if not looked_at:
                break
    return cleared


def invalidate_call(core: Core, tag: str, cursor: str = "") -> Call[tuple[int, int, str]]:
    """One step: (forgotten, looked at, cursor). Go on from the cursor while the second is not 0."""
    index = core.keys.named("tag", tag=_tag(tag))
    return _call(core, "invalidate", index, (tag, INVALIDATE_STEP, cursor), _invalidated)


def _invalidated(reply: Any) -> tuple[int, int, str]:
    _, dropped, looked_at, cursor = read_words("invalidate", reply)
    return int(dropped), int(looked_at), text_of(cursor)


def _tag(tag: object) -> str:
    """A tag that a request can have."""
    return BatchRequest("/", tags=(tag,)).tags[0]  # type: ignore[arg-type] # it is checked there


def _seconds(value: float, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not MIN_TTL_S <= value <= MAX_SECONDS:
        raise InvalidRequest(f"from {MIN_TTL_S:g} to {MAX_SECONDS:g} seconds are allowed", where=where)
    return float(value)


# -- claims


def claims(core: Core, offset: int, limit: int) -> Flow[ClaimPage]:
    """A page of what runs, the first to lapse first."""
    if not 1 <= limit <= LONGEST_PAGE or offset < 0:
        raise InvalidRequest(f"from 1 to {LONGEST_PAGE} entries from 0 on are allowed", where="limit")
    page: ClaimPage = yield claims_call(core, offset, limit)
    return page


def claims_call(core: Core, offset: int = 0, limit: int = 50) -> Call[ClaimPage]:
    """The look itself."""

    def parse(reply: Any) -> ClaimPage:
        _, now_ms, total, overdue, limits, *found = read_words("claims", reply)
        is_last = offset + limit >= int(total)
        return ClaimPage(
            entries=tuple(_claim(row, int(now_ms)) for row in rows(found, 6)),
            total=int(total),
            overdue=int(overdue),
            next_offset=None if is_last else offset + limit,
            limits=tuple(sorted((_limit_use(row) for row in rows(limits, 5)), key=lambda use: use.name)),
        )

    return _call(core, "claims", core.keys.named("leases"), (offset, limit), parse)


def _claim(row: Sequence[Any], now_ms: int) -> Claim:
    key, packed, until, lease, token, limit = row
    until_ms, lease_ms = int(until), int(lease)
    lease_until = _moment(until_ms)
    assert lease_until is not None, "what runs has a lease"
    return Claim(
        status=read_status(Key(text_of(key)), packed),
        token=Token(int(token)),
        lease=lease_ms / 1000,
        lease_until=lease_until,
        left=(until_ms - now_ms) / 1000,
        renewed_ago=(now_ms - until_ms + lease_ms) / 1000,
        overdue=until_ms <= now_ms,
        limit=text_of(limit),
    )


def _limit_use(row: Sequence[Any]) -> LimitUse:
    name, places, running, called, parked = row
    return LimitUse(text_of(name), int(places), int(running), int(called), int(parked))


def release(core: Core, key: str) -> Flow[bool]:
    """Take a running attempt away from its worker; it is next in line and the attempt does not count."""
    name = check_key(key)

    def parse(reply: Any) -> tuple[State, bytes, str, Attempt | None]:
        state, token, queue, priority, *uri = reply
        if state is None:
            raise RequestUnknown(name)
        if token is None or State(text_of(state)) is not State.IN_PROGRESS:
            return State(text_of(state)), b"", "", None
        rank = Priority(int(priority or Priority.DEFAULT))
        attempt = Attempt(name, Token(int(token)), 1, NO_REQUEST, {}, 0, 0, text_of(queue or b""), rank)
        return State.IN_PROGRESS, joined(uri), attempt.queue, attempt

    wanted = ("state", "token", "queue", "priority", *URI_FIELDS)
    _, identity, queue, attempt = yield Command(("HMGET", core.keys.status(name), *wanted), parse)
    if attempt is None:
        return False
    description = redact(text_of(identity).split("\n", 2)[-1], core.settings.secret_params)
    ticket = core.jobs.enqueue_at_front(name, description, queue, attempt.priority)
    try:
        yield core.calls.release(attempt, ticket)
    except LeaseLost:
        return False  # it ended, or another began, between the two
    return True


# -- workers


def workers(core: Core) -> Flow[WorkersView]:
    """RQ's records of the workers that listen to a queue of ours."""
    listed, names, suspended, now, running = yield Batch(
        (
            Command(("SMEMBERS", core.jobs.worker_set), lambda reply: sorted(text_of(each) for each in reply)),
            core.calls.queues(),
            Command(("EXISTS", core.jobs.suspended), bool),
            Command(("TIME",), lambda reply: int(reply[0]) + int(reply[1]) / 1e6),
            claims_call(core, 0, MOST_CLAIMS),
        )
    )
    if not listed:
        return WorkersView(suspended, ())
    listed = listed[:MOST_WORKERS]
    its_names = tuple(core.jobs.worker_fields.values())
    found = yield Batch(tuple(Command(("HMGET", each, *its_names), list) for each in listed))
    ours = {
        name.removeprefix(core.jobs.list_prefix)
        for queue in {*names, core.settings.queue}
        for name in core.jobs.lists(queue)
    }
    views = []
    for each, values in zip(listed, found, strict=True):
        record = {
            name: text_of(value)
            for name, value in zip(core.jobs.worker_fields, values, strict=True)
            if value is not None
        }
        if record and "death" not in record and ours.intersection(record.get("queues", "").split(",")):
            views.append(_worker(each.rpartition(":")[2], record, now, running))
    return WorkersView(suspended, tuple(views))


def _worker(name: str, record: dict[str, str], now: float, running: ClaimPage) -> WorkerView:
    heartbeat = _iso(record.get("heartbeat"))
    return WorkerView(
        name=name,
        state=record.get("state", ""),
        queues=tuple(record["queues"].split(",")),
        keys=tuple(claim.status.key for claim in running.entries if claim.status.worker == name),
        job_id=record.get("job_id"),
        succeeded=int(record.get("succeeded", 0)),
        failed=int(record.get("failed", 0)),
        working_time=float(record.get("working_time", 0)),
        born=_iso(record.get("born")),
        heartbeat=heartbeat,
        heartbeat_age=max(0.0, now - heartbeat.timestamp()) if heartbeat else None,
        hostname=record.get("hostname", ""),
        pid=int(record["pid"]) if record.get("pid", "").isdecimal() else None,
        version=record.get("version", ""),
        python_version=record.get("python_version", ""),
        stopping="stopping" in record,
        rqarm_version=record.get("rqarm_version", ""),
    )


# -- forms


def _call(core: Core, verb: str, key: str, argv: Sequence[Any], parse: Callable[[Any], T]) -> Call[T]:
    return Call(script(verb), (key,), (core.keys.prefix, *argv), parse)


def _moment(unix_ms: Any) -> datetime | None:
    """A time in Unix ms; None for none, and for the server's -1 and -2."""
    if unix_ms is None or int(unix_ms) < 0:
        return None
    return datetime.fromtimestamp(int(unix_ms) / 1000, UTC)


def _left(until: datetime | None, now: datetime) -> float | None:
    return None if until is None else (until - now).total_seconds()


def _iso(text: str | None) -> datetime | None:
    try:
        found = datetime.fromisoformat(text) if text else None
    except ValueError:
        return None
    return found.replace(tzinfo=UTC) if found is not None and found.tzinfo is None else found


def _order(entry_id: str) -> tuple[int, int]:
    unix_ms, _, n = entry_id.partition("-")
    return int(unix_ms), int(n or 0)
