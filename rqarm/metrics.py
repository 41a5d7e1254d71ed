"""The overview as Prometheus text: for ``/metrics`` of the dashboard and of a worker, and ``rqarm stats --prometheus``.

Counters live in Redis, so every process says the same; scrape one. No label holds a key or a URI. docs/metrics.md says
what each metric means.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rqarm.inspect import STATES, Histogram, Overview
from rqarm.model import Outcome

#: what an answer with ``render`` is, version 0.0.4 of the format
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: routes and queues that are shown; the smallest are summed up under "*"
MOST_LABELS = 100

#: words that are there with 0 before the first is counted: a rate needs a beginning
SUBMISSIONS = (*map(str, Outcome), "conflict", "corrupt")
EXECUTIONS = (
    *("completed", "concluded", "redirected", "failed", "retried", "crashed"),
    *("cancelled", "released", "parked", "waiting", "revived"),
)
REFUSALS = ("duplicate", "late")
REMOVALS = ("expired", "cleared", "replaced", "lost")

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Metric:
    """One family. A sample is the end of its name ("" but for histograms), its labels and its value."""

    name: str
    kind: str
    help: str
    samples: tuple[tuple[str, Labels, float], ...]


def render(overview: Overview) -> str:
    """The text of a scrape."""
    lines = []
    for metric in metrics(overview):
        lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
        lines += [
            f"{metric.name}{suffix}{_labels(labels)} {_number(value)}" for suffix, labels, value in metric.samples
        ]
    return "\n".join(lines) + "\n"


def metrics(overview: Overview) -> Iterator[Metric]:
    """Every metric, also those without a sample: what is not there yet is known by its name."""
    yield from _requests(overview)
    yield from _executions(overview)
    yield from _queues(overview)
    yield from _cache(overview)
    yield from _server(overview)


def _requests(found: Overview) -> Iterator[Metric]:
    yield _counter("submissions_total", "Submits by what they came to.", _by("outcome", found.submissions, SUBMISSIONS))
    routes = _largest({route.name: sum(route.submissions.values()) for route in found.routes})
    counted: dict[tuple[str, str], float] = {}
    for route in found.routes:
        for outcome, count in route.submissions.items():
            label = (routes[route.name], outcome)
            counted[label] = counted.get(label, 0) + count
    yield _counter(
        "route_submissions_total",
        "Submits by route (operation, or host and first path segment) and outcome.",
        [({"route": route, "outcome": outcome}, count) for (route, outcome), count in counted.items()],
    )
    saved = {"hit": found.saved.hit_seconds, "joined": found.saved.joined_seconds}
    yield _counter(
        "saved_seconds_total",
        "Run time that was not spent: of a hit, that of its result; of a join, the estimate.",
        _by("outcome", saved),
    )
    yield _counter("saved_executions_total", "Executions that hits and joins did not need.", found.saved.executions)
    yield _gauge(
        "requests", "Requests by state; completed: with a result that is cached.", _by("state", _states(found))
    )
    yield _gauge(
        "waited_keys", "Requests whose end at least one process waits for, of this server.", _known(found.waiters)
    )


def _states(found: Overview) -> dict[str, int]:
    return {state: found.states[state] for state in STATES}


def _executions(found: Overview) -> Iterator[Metric]:
    yield _counter("executions_total", "Attempts by how they ended.", _by("outcome", found.executions, EXECUTIONS))
    yield _counter("retries_total", "Attempts that ended in a retry.", found.executions.get("retried", 0))
    routes = _largest({route.name: route.completed for route in found.routes})
    completed: dict[str, float] = {}
    for route in found.routes:
        completed[routes[route.name]] = completed.get(routes[route.name], 0) + route.completed
    yield _counter("route_completed_total", "Executions that completed, by route.", _by("route", completed))
    yield _gauge(
        "route_run_seconds",
        "Learned run time of a route, a weighted mean of its last runs.",
        [
            ({"route": route.name}, route.run_mean)
            for route in found.routes
            if route.run_mean is not None and routes[route.name] == route.name
        ],
    )
    yield _counter(
        "duplicate_executions_total",
        "Attempts that were refused because another one ran, or had ended, their request. Should stay 0.",
        found.refusals.get("duplicate", 0),
    )
    yield _counter(
        "refusals_total",
        "Attempts that held their request no more, by reason.",
        _by("reason", found.refusals, REFUSALS),
    )
    yield _histogram("run_seconds", "Run time of attempts that completed or failed, by queue.", found, "run_seconds")
    yield _histogram("wait_seconds", "Time that they waited in line before, by queue.", found, "wait_seconds")
    yield _counter(
        "clock_steps_total",
        "Steps of the server's clock by more than a lease, counted by each worker that has seen one.",
        found.sweeps.get("clock_steps", 0),
    )
    yield _counter(
        "leases_clamped_total",
        "Leases that ended too far ahead, because the server's clock was put back, and were shortened.",
        found.sweeps.get("clamped", 0),
    )
    yield _gauge("leases_overdue", "Executions whose worker is silent beyond its lease.", found.overdue)
    yield _gauge("lease_overdue_seconds", "For how long the first of them is overdue.", found.overdue_seconds)


def _queues(found: Overview) -> Iterator[Metric]:
    queues = found.queues[:MOST_LABELS]
    yield _gauge("queue_waiting", "Requests in line.", [({"queue": q.name}, q.waiting) for q in queues])
    yield _gauge(
        "queue_oldest_seconds",
        "Since the oldest in line was given its place; 0 when nothing waits.",
        [({"queue": q.name}, q.oldest or 0.0) for q in queues],
    )
    yield _gauge(
        "queue_tail_seconds",
        "Estimated time until what is last in line is done; 0 when unknown.",
        [({"queue": q.name}, q.tail_eta or 0.0) for q in queues],
    )
    yield _gauge("queue_running", "Requests that run.", [({"queue": q.name}, q.running) for q in queues])
    yield _gauge("queue_workers", "Live workers that listen.", [({"queue": q.name}, q.workers) for q in queues])
    ends = [({"queue": q.name, "outcome": "completed"}, q.completed) for q in queues]
    ends += [({"queue": q.name, "outcome": "failed"}, q.failed) for q in queues]
    yield _counter("queue_executions_total", "Attempts that completed or failed, by queue.", ends)
    yield _gauge("workers", "Live workers of all queues.", found.workers.total)
    yield _gauge("workers_busy", "Workers that run something.", found.workers.busy)


def _cache(found: Overview) -> Iterator[Metric]:
    cache = found.cache
    entries = {"temporary": cache.temporary, "sticky": cache.sticky}
    stored = {"temporary": cache.temporary_bytes, "sticky": cache.sticky_bytes}
    yield _gauge("cache_entries", "Cached results.", _by("kind", entries))
    yield _gauge("cache_bytes", "Bytes of cached results, as they lie in Redis.", _by("kind", stored))
    yield _counter(
        "cache_removals_total", "Results that are no more, by reason.", _by("reason", found.removals, REMOVALS)
    )
    yield _histogram("result_bytes", "Stored size of results.", found, "result_bytes", label="")


def _server(found: Overview) -> Iterator[Metric]:
    server = found.server
    whole = "Of the whole server"
    yield _gauge("up", "1: this answer is from the server.", 1)
    yield _gauge("server_memory_bytes", f"{whole}: memory in use.", _known(server.used_memory if server else None))
    yield _gauge(
        "server_memory_limit_bytes", f"{whole}: maxmemory; 0 = no limit.", _known(server.max_memory if server else None)
    )
    yield _counter(
        "server_evicted_keys_total",
        f"{whole}, since it started: keys thrown out to make room, ours and others'.",
        _known(server.evicted_keys if server else None),
    )
    yield _counter(
        "server_script_errors_total",
        f"{whole}, since it started: calls of scripts that ended in an error, ours and others'.",
        _known(server.script_errors if server else None),
    )
    labels = {
        "version": found.version,
        "python": platform.python_version(),
        "server": server.name if server else "",
        "server_version": server.version if server else "",
    }
    yield _gauge("build_info", "1, with the versions as labels.", [(labels, 1)])
    yield _gauge(
        "workers_by_version",
        "Live workers by their version of rqarm; empty: it tells none.",
        _by("version", found.workers.versions),
    )
    yield _gauge("attention", "What needs attention, by code; see the overview.", _by("code", _codes(found)))


def _codes(found: Overview) -> dict[str, int]:
    codes: dict[str, int] = {}
    for each in found.attention:
        codes[each.code] = codes.get(each.code, 0) + 1
    return codes


# -- samples


Values = float | Iterable[tuple[Labels, float]]


def _counter(name: str, text: str, values: Values) -> Metric:
    return Metric(f"rqarm_{name}", "counter", text, _samples(values))


def _gauge(name: str, text: str, values: Values) -> Metric:
    return Metric(f"rqarm_{name}", "gauge", text, _samples(values))


def _known(value: float | None) -> Values:
    """A value that the server may refuse to tell: then there is no sample."""
    return [] if value is None else value


def _samples(values: Values) -> tuple[tuple[str, Labels, float], ...]:
    if isinstance(values, int | float):
        return (("", {}, values),)
    return tuple(("", labels, value) for labels, value in values)


def _by(label: str, values: Mapping[str, float], known: Iterable[str] = ()) -> list[tuple[Labels, float]]:
    return [({label: name}, value) for name, value in {**dict.fromkeys(known, 0), **values}.items()]


def _histogram(name: str, text: str, found: Overview, kind: str, label: str = "queue") -> Metric:
    samples: list[tuple[str, Labels, float]] = []
    for value, histogram in list(found.histograms[kind].items())[:MOST_LABELS]:
        own = {label: value} if label else {}
        samples += [("_bucket", {**own, "le": bound}, count) for bound, count in _cumulative(histogram)]
        samples += [("_sum", own, histogram.sum), ("_count", own, histogram.count)]
    return Metric(f"rqarm_{name}", "histogram", text, tuple(samples))


def _cumulative(histogram: Histogram) -> Iterator[tuple[str, int]]:
    total = 0
    for bound, count in zip((*map(_number, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        total += count
        yield bound, total


def _largest(sizes: Mapping[str, float]) -> dict[str, str]:
    """Name -> label: its own for the largest, "*" for the rest."""
    kept = sorted(sizes, key=lambda name: (-sizes[name], name))[:MOST_LABELS]
    return {name: name if name in kept else "*" for name in sizes}


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    return repr(int(value)) if value == int(value) else repr(float(value))
