"""What an operator must see in one look: the data of the dashboard's overview, of ``rqarm top`` and of the metrics.

One round trip, whatever the number of queues, requests or results; it only reads. How it is shown is others' affair.

``Overview``: at, version, namespace, server, states, submissions, executions, refusals, removals, sweeps,
    hit_rate, hit_rate_hour, saved, minutes, queues, workers, cache, hot, routes, histograms, overdue, overdue_seconds,
    waiters, attention
``server`` (``Server``, None when INFO is refused): name, version, used_memory, max_memory, memory_ratio, policy,
    evicted_keys, expired_keys, script_errors, clients, uptime
``states``: STATES, of which failed are those that are not set aside; and of the pending: parked, called
``hit_rate``, ``hit_rate_hour`` (``HitRate``): hit, joined, new (counts), hit_ratio, joined_ratio, new_ratio, effective
``saved`` (``Saved``): executions, seconds, hit_seconds, joined_seconds
``minutes`` (60 of ``Minute``, oldest first): at, submissions, executions (word -> count)
``queues`` (``QueueLine``): name, waiting, oldest, tail_eta, running, completed, failed, run_p50, run_p95, workers
``workers`` (``Workers``): total, busy, versions (version -> count; "" = not told)
``cache`` (``CacheSizes``): temporary, sticky, bytes, temporary_bytes, sticky_bytes
``hot`` (``HotKey``): key, uri (redacted), hits, state, bytes
``routes`` (``RouteLine``): name, submissions, completed, run_mean
``attention`` (``Attention``): level ("critical", "warning"), code, text, queue; empty when all is well
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rqarm.calls import Batch
from rqarm.flows import Core, Flow
from rqarm.model import Key, View
from rqarm.replies import Census
from rqarm.uri import redact
from rqarm.version import __version__

#: minutes of the series
MINUTES = 60
#: outcomes of a submit that needed no execution of its own
ANSWERED = ("hit", "stale", "joined")
#: of requests, as ``Overview.states`` counts them; ``parked`` and ``called`` are pending
STATES = ("pending", "in_progress", "completed", "failed", "cancelled", "quarantined")
#: hot keys that are shown
HOTTEST = 10
#: the oldest in line has waited this many seconds: somebody should look
STALE_SECONDS = 600.0
#: share of the server's memory limit
MEMORY_HIGH, MEMORY_CRITICAL = 0.8, 0.95
#: share of the executions of the last minutes that failed, of so many at least
FAILURES_HIGH, FAILURES_MINUTES, FAILURES_LEAST = 0.2, 10, 10


@dataclass(frozen=True, slots=True)
class Server:
    """What INFO says; of the whole server, not of our namespace. ``max_memory`` 0 = no limit.

    ``script_errors``: scripts that raised an error, without those that the server did not know yet (NOSCRIPT).
    """

    name: str
    version: str
    used_memory: int
    max_memory: int
    memory_ratio: float | None
    policy: str
    evicted_keys: int
    expired_keys: int
    script_errors: int
    clients: int
    uptime: int


@dataclass(frozen=True, slots=True)
class HitRate:
    """How submits were answered. ``effective``: without an execution of their own; None when there were none."""

    hit: int
    joined: int
    new: int

    @property
    def total(self) -> int:
        return self.hit + self.joined + self.new

    @property
    def hit_ratio(self) -> float | None:
        return self.hit / self.total if self.total else None

    @property
    def joined_ratio(self) -> float | None:
        return self.joined / self.total if self.total else None

    @property
    def new_ratio(self) -> float | None:
        return self.new / self.total if self.total else None

    @property
    def effective(self) -> float | None:
        return (self.hit + self.joined) / self.total if self.total else None


@dataclass(frozen=True, slots=True)
class Saved:
    """What hits and joins did not cost. A hit saves the run that made its result, a join the estimate of the one it
    joined."""

    executions: int
    hit_seconds: float
    joined_seconds: float

    @property
    def seconds(self) -> float:
        return self.hit_seconds + self.joined_seconds


@dataclass(frozen=True, slots=True)
class Minute:
    """One minute; ``at`` is its beginning in Unix seconds."""

    at: int
    submissions: dict[str, int]
    executions: dict[str, int]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts by upper bound, as Prometheus has them but not cumulative; the last one, ``inf``, is what lies above."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """An estimate: a straight line inside the bucket, its lower bound above the last. None when it is empty."""
        rank, below = share * self.count, 0
        for i, count in enumerate(self.counts):
            if count and below + count >= rank:
                low = self.bounds[i - 1] if i else 0.0
                high = self.bounds[i] if i < len(self.bounds) else low
                return low + (high - low) * (rank - below) / count
            below += count
        return None


@dataclass(frozen=True, slots=True)
class QueueLine:
    """One queue. Seconds; ``oldest``: since its first was given its place; ``tail_eta``: until what is last is done.

    ``run_p50`` and ``run_p95`` are estimates from the histogram of all runs since the namespace began.
    """

    name: str
    waiting: int
    oldest: float | None
    tail_eta: float | None
    running: int
    completed: int
    failed: int
    run_p50: float | None
    run_p95: float | None
    workers: int


@dataclass(frozen=True, slots=True)
class Workers:
    """Live RQ workers of all queues. ``versions`` of rqarm; "" = an RQ worker, which tells none."""

    total: int
    busy: int
    versions: dict[str, int]


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """Stored results and their bytes, as they lie in Redis."""

    temporary: int
    sticky: int
    bytes: int
    sticky_bytes: int

    @property
    def temporary_bytes(self) -> int:
        return max(self.bytes - self.sticky_bytes, 0)


@dataclass(frozen=True, slots=True)
class HotKey:
    """A request that is asked for often. ``hits``: about as many, older ones count half with each hour."""

    key: Key
    uri: str
    hits: int
    state: str
    bytes: int


@dataclass(frozen=True, slots=True)
class RouteLine:
    """A family of requests: operation, or host and first path segment; "*" = the others. ``run_mean`` in seconds."""

    name: str
    submissions: dict[str, int]
    completed: int
    run_mean: float | None


@dataclass(frozen=True, slots=True)
class Attention:
    """Something that somebody should look at. ``code`` is a word for programs, ``text`` a sentence for people."""

    level: str
    code: str
    text: str
    queue: str | None = None


@dataclass(frozen=True, slots=True)
class Overview(View):
    """One look at a namespace. Counters count since the namespace began."""

    at: float
    version: str
    namespace: str
    server: Server | None
    states: dict[str, int]
    submissions: dict[str, int]
    executions: dict[str, int]
    refusals: dict[str, int]
    removals: dict[str, int]
    sweeps: dict[str, int]
    hit_rate: HitRate
    hit_rate_hour: HitRate
    saved: Saved
    minutes: tuple[Minute, ...]
    queues: tuple[QueueLine, ...]
    workers: Workers
    cache: CacheSizes
    hot: tuple[HotKey, ...]
    routes: tuple[RouteLine, ...]
    #: run_seconds and wait_seconds by queue; result_bytes under ""
    histograms: dict[str, dict[str, Histogram]]
    #: leases whose end is past, and for how long the first of them
    overdue: int
    overdue_seconds: float
    #: subscriptions to the end of a request: of one process and one key each; None when the server does not say
    waiters: int | None
    attention: tuple[Attention, ...]


def overview(core: Core) -> Flow[Overview]:
    """Everything in one round trip. What the server refuses to tell (INFO, PUBSUB) is None."""
    calls = core.calls
    census, info, waiters = yield Batch((calls.overview(), calls.server_info(), calls.waited_for()), settles=True)
    if isinstance(census, Exception):
        raise census
    return _overview(
        core,
        census,
        None if isinstance(info, Exception) else server_of(info),
        None if isinstance(waiters, Exception) else waiters,
    )


def _overview(core: Core, census: Census, server: Server | None, waiters: int | None) -> Overview:
    submissions, executions = census.families["submissions"], census.families["executions"]
    minute = census.now_ms // 60_000
    recent = {name: _ring(census.families[name], minute) for name in ("submissions", "executions")}
    minutes = tuple(
        Minute((minute - ago) * 60, dict(recent["submissions"][minute - ago]), dict(recent["executions"][minute - ago]))
        for ago in reversed(range(MINUTES))
    )
    hour: Counter[str] = sum((Counter(each.submissions) for each in minutes), Counter())
    histograms = {
        "run_seconds": _histograms(executions, "run", TIMES_MS, 1000),
        "wait_seconds": _histograms(executions, "wait", TIMES_MS, 1000),
        "result_bytes": _histograms(executions, "size", SIZES, 1),
    }
    numbers = census.numbers
    cached = census.families["cache"]
    totals = words(submissions)
    found = Overview(
        at=census.now_ms / 1000,
        version=__version__,
        namespace=core.settings.namespace,
        server=server,
        states={
            "pending": numbers["pending"],
            "parked": numbers["parked"],
            "called": numbers["called"],
            "in_progress": numbers["in_progress"],
            "completed": numbers["temporary"] + numbers["sticky"],
            "quarantined": numbers["quarantined"],
            "failed": numbers["failed"],
            "cancelled": numbers["cancelled"],
        },
        submissions=totals,
        executions=words(executions),
        refusals=words(census.families["refusals"]),
        removals=words(census.families["removals"]),
        sweeps=words(census.families["sweeps"]),
        hit_rate=_hit_rate(totals),
        hit_rate_hour=_hit_rate(hour),
        saved=Saved(
            executions=sum(totals.get(word, 0) for word in ANSWERED),
            hit_seconds=(_int(submissions, "saved:hit") + _int(submissions, "saved:stale")) / 1000,
            joined_seconds=_int(submissions, "saved:joined") / 1000,
        ),
        minutes=minutes,
        queues=tuple(_queue_line(line, executions, histograms["run_seconds"]) for line in census.lines),
        workers=Workers(
            total=len(census.workers),
            busy=sum(worker.state == "busy" for worker in census.workers),
            versions=dict(Counter(worker.version for worker in census.workers)),
        ),
        cache=CacheSizes(
            temporary=numbers["temporary"],
            sticky=numbers["sticky"],
            bytes=max(_int(cached, "bytes"), 0),
            sticky_bytes=max(_int(cached, "sticky_bytes"), 0),
        ),
        hot=tuple(
            HotKey(Key(key), redact(uri, core.settings.secret_params), hits, state, size)
            for key, hits, uri, state, size in census.hot[:HOTTEST]
        ),
        routes=_routes(submissions, executions, census.runtimes),
        histograms=histograms,
        overdue=numbers["overdue"],
        overdue_seconds=numbers["overdue_ms"] / 1000,
        waiters=waiters,
        attention=(),
    )
    return _with_attention(found)


# -- counters


_WORD, _NUMBER = re.compile("[a-z_]+"), re.compile("-?[0-9]+")


def words(family: Mapping[str, str]) -> dict[str, int]:
    """The counters of a family that are plain words: the outcomes."""
    return {name: _number(value) for name, value in sorted(family.items()) if _WORD.fullmatch(name)}


def _number(text: str) -> int:
    """0 for what somebody else wrote there."""
    return int(text) if _NUMBER.fullmatch(text) else 0


def _int(family: Mapping[str, str], field: str) -> int:
    return _number(family.get(field, "0"))


def _ring(family: Mapping[str, str], now: int) -> dict[int, Counter[str]]:
    """Minute -> word -> count, from the ring; see ``add_up`` in the prelude. What is older is left over."""
    series: dict[int, Counter[str]] = {now - ago: Counter() for ago in range(MINUTES)}
    for field, value in family.items():
        slot, _, word = field.partition(":")
        if slot[:1] == "m" and slot[1:].isdigit():
            minute, _, count = value.partition(" ")
            if _number(minute) in series:
                series[_number(minute)][word] += _number(count)
    return series


def _hit_rate(counts: Mapping[str, int]) -> HitRate:
    return HitRate(
        hit=counts.get("hit", 0) + counts.get("stale", 0), joined=counts.get("joined", 0), new=counts.get("new", 0)
    )


#: upper bounds of the histograms; lua/prelude/counters.lua has the same
TIMES_MS = (5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000, 1800000, 3600000)
SIZES = tuple(256 * 4**n for n in range(12))


def _histograms(family: Mapping[str, str], kind: str, bounds: tuple[int, ...], scale: int) -> dict[str, Histogram]:
    """Queue -> histogram. Fields are ``kind:bound:queue`` and ``kind:sum:queue``."""
    found: dict[str, dict[str, int]] = {}
    for field, value in family.items():
        name, _, rest = field.partition(":")
        bound, _, queue = rest.partition(":")
        if name == kind:
            found.setdefault(queue, {})[bound] = _number(value)
    return {
        queue: Histogram(
            bounds=tuple(bound / scale for bound in bounds),
            counts=tuple(counts.get(str(bound), 0) for bound in (*bounds, "+")),
            sum=counts.get("sum", 0) / scale,
        )
        for queue, counts in sorted(found.items())
    }


def _queue_line(line: Any, executions: Mapping[str, str], runs: Mapping[str, Histogram]) -> QueueLine:
    run = runs.get(line.name)
    ahead = line.load_ms + line.left_ms
    return QueueLine(
        name=line.name,
        waiting=line.waiting,
        oldest=line.oldest_ms / 1000 if line.oldest_ms >= 0 else None,
        tail_eta=ahead / 1000 / max(line.workers, 1) if line.waiting and ahead else None,
        running=line.running,
        completed=_int(executions, f"q:completed:{line.name}"),
        failed=_int(executions, f"q:failed:{line.name}"),
        run_p50=run.quantile(0.5) if run else None,
        run_p95=run.quantile(0.95) if run else None,
        workers=line.workers,
    )


def _routes(
    submissions: Mapping[str, str], executions: Mapping[str, str], runtimes: Mapping[str, int]
) -> tuple[RouteLine, ...]:
    by_route: dict[str, dict[str, int]] = {}
    completed: Counter[str] = Counter()
    for family, field, value in (
        *(("submissions", *item) for item in submissions.items()),
        *(("executions", *item) for item in executions.items()),
    ):
        mark, _, rest = field.partition(":")
        word, _, route = rest.partition(":")
        if mark != "r":
            continue
        if family == "submissions":
            by_route.setdefault(route, {})[word] = _number(value)
        elif word == "completed":
            completed[route] += _number(value)
    return tuple(
        RouteLine(
            name,
            dict(sorted(by_route.get(name, {}).items())),
            completed[name],
            runtimes[name] / 1000 if name != "*" and name in runtimes else None,
        )
        for name in sorted(by_route.keys() | completed.keys())
    )


# -- the server


def server_of(info: Mapping[str, Any]) -> Server | None:
    """From redis-py's dict of INFO; None when it says nothing of memory."""
    if "used_memory" not in info:
        return None
    used, limit = int(info["used_memory"]), int(info.get("maxmemory", 0))
    is_valkey = "valkey_version" in info
    return Server(
        name="valkey" if is_valkey else "redis",
        version=str(info.get("valkey_version" if is_valkey else "redis_version", "")),
        used_memory=used,
        max_memory=limit,
        memory_ratio=used / limit if limit else None,
        policy=str(info.get("maxmemory_policy", "")),
        evicted_keys=int(info.get("evicted_keys", 0)),
        expired_keys=int(info.get("expired_keys", 0)),
        script_errors=_script_errors(info),
        clients=int(info.get("connected_clients", 0)),
        uptime=int(info.get("uptime_in_seconds", 0)),
    )


def _script_errors(info: Mapping[str, Any]) -> int:
    """Calls of EVALSHA that failed in the script, or were refused before it because memory was out."""
    evalsha = info.get("cmdstat_evalsha", {})
    unknown = info.get("errorstat_NOSCRIPT", {})
    failed = int(evalsha.get("failed_calls", 0)) + int(evalsha.get("rejected_calls", 0))
    return max(failed - int(unknown.get("count", 0)), 0)


# -- attention


def _with_attention(found: Overview) -> Overview:
    return replace(found, attention=tuple(_attention(found)))


def _attention(found: Overview) -> Iterable[Attention]:
    for queue in found.queues:
        if queue.waiting and not queue.workers:
            text = f"{queue.waiting} requests wait in {queue.name!r} and no worker listens to it"
            yield Attention("critical", "no_workers", text, queue.name)
        elif queue.oldest is not None and queue.oldest > STALE_SECONDS:
            text = f"the oldest request in {queue.name!r} has waited for {queue.oldest:.0f} s"
            yield Attention("warning", "stale_queue", text, queue.name)
    if found.overdue:
        text = f"{found.overdue} executions are silent beyond their lease, the first for {found.overdue_seconds:.0f} s"
        yield Attention("warning", "leases_overdue", text)
    yield from _server_attention(found.server)
    ended: Counter[str] = Counter()
    for minute in found.minutes[-FAILURES_MINUTES:]:
        ended.update(minute.executions)
    bad = ended["failed"] + ended["crashed"]
    tried = bad + ended["completed"]
    if tried >= FAILURES_LEAST and bad / tried > FAILURES_HIGH:
        text = f"{bad} of {tried} executions failed in the last {FAILURES_MINUTES} minutes"
        yield Attention("warning", "failures_high", text)
    if found.states["quarantined"]:
        text = f"{found.states['quarantined']} requests are set aside in the quarantine"
        yield Attention("warning", "quarantined", text)
    if found.refusals.get("duplicate"):
        text = f"{found.refusals['duplicate']} executions ran beside another of the same request; one result counted"
        yield Attention("warning", "duplicate_executions", text)
    told = sorted(version for version in found.workers.versions if version)
    if len({*told, found.version}) > 1:
        text = f"workers run rqarm {', '.join(told)}, this is {found.version}: finish the upgrade"
        yield Attention("warning", "version_skew", text)


def _server_attention(server: Server | None) -> Iterable[Attention]:
    if server is None or server.memory_ratio is None:
        return
    if server.memory_ratio > MEMORY_HIGH:
        level = "critical" if server.memory_ratio > MEMORY_CRITICAL else "warning"
        text = f"the server uses {server.memory_ratio:.0%} of the memory that it may use"
        yield Attention(level, "memory_high", text)
        if server.evicted_keys:
            text = f"the server has thrown out {server.evicted_keys} keys since it started, to make room"
            yield Attention("warning", "evictions", text)
