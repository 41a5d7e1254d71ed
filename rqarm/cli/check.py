"""``rqarm check``: is everything there that requests need?

The only command that talks to Redis beside a manager: INFO, RQ's registries of workers and schedulers, and the removal
of what its own trial run left.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import click
import redis

from rqarm import connect, rqjobs
from rqarm.cli.common import FAILURE, NO_SERVER, Target, as_json, logged, on_server, print_json
from rqarm.errors import RqarmError, ServerUnsuitable
from rqarm.keys import PATTERNS
from rqarm.manager import RequestManager
from rqarm.model import Outcome
from rqarm.replies import Stats
from rqarm.text import plain, size

#: part of maxmemory from which on it is worth a word
NEARLY_FULL = 0.9
#: statistics that the scripts keep under a name of their own, beside one for each family of requests
STATISTICS = ("submissions", "executions", "sweeps", "cache", "runtime", "refusals", "removals")


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look showed. Only ``bad`` makes the command fail."""

    name: str
    verdict: Verdict
    text: str


@click.command()
@on_server
@as_json
def check(target: Target, is_json: bool) -> int:
    """Say whether server, workers and queues are well.

    Runs a request through a namespace of its own, which is removed again. The exit code is 1 when something is wrong, 4
    when nobody answers; warnings do not count.
    """
    url = connect.default_url(target.settings())
    findings: list[Finding] = []
    code = 0
    try:
        # the managers below would log what is a finding here
        with logged(logging.ERROR):
            for finding in _findings(target, url):
                findings.append(finding)
                if not is_json:
                    click.echo(f"{finding.verdict:<8} {finding.name:<12} {plain(finding.text)}")
                if finding.verdict is Verdict.BAD:
                    code = FAILURE
    except (redis.ConnectionError, redis.TimeoutError) as error:
        code = NO_SERVER
        findings.append(Finding("server", Verdict.BAD, str(error)))
        if not is_json:
            raise
    if is_json:
        checks = [{"name": one.name, "verdict": str(one.verdict), "text": one.text} for one in findings]
        print_json({"ok": code == 0, "url": connect.redact_url(url), "checks": checks})
    return code


def _findings(target: Target, url: str) -> Iterator[Finding]:
    settings = target.settings()
    with connect.explain(url), connect.open_client(url) as client:
        info: dict[str, Any] = client.info()
        yield Finding("server", Verdict.OK, f"{_version(info)} at {connect.redact_url(url)}")
        try:
            warnings = connect.check_server(
                info, allow_volatile=settings.allow_volatile, durability=settings.durability
            )
        except ServerUnsuitable as error:
            # every other look would end in the same words
            yield Finding("suitable", Verdict.BAD, str(error))
            return
        yield from (Finding("suitable", Verdict.WARNING, warning) for warning in warnings)
        yield _eviction(info)
        yield _persistence(info)
        yield _memory(info)
        yield _trial(url)
        with RequestManager(connection=client, namespace=settings.namespace) as rm:
            try:
                stats = rm.cache.stats()
            except RqarmError as error:
                yield Finding("records", Verdict.BAD, str(error))
                return
        yield from _queues(client, stats, settings.queue)


def _version(info: dict[str, Any]) -> str:
    name = "valkey" if "valkey_version" in info else "redis"
    return f"{name} {info.get(f'{name}_version', 'of unknown version')}"


def _eviction(info: dict[str, Any]) -> Finding:
    policy = str(info.get("maxmemory_policy", "unknown"))
    if policy == "noeviction":
        return Finding("eviction", Verdict.OK, "noeviction: when memory runs out, submits are refused")
    return Finding("eviction", Verdict.OK, f"{policy}: when memory runs out, temporary results go first")


def _persistence(info: dict[str, Any]) -> Finding:
    if info.get("aof_enabled"):
        if info.get("aof_last_write_status", "ok") != "ok":
            return Finding("persistence", Verdict.BAD, "the append-only file cannot be written: look at the disk")
        return Finding("persistence", Verdict.OK, "append-only file")
    return Finding(
        "persistence", Verdict.OK, "no append-only file: a restart forgets what came after the last snapshot"
    )


def _memory(info: dict[str, Any]) -> Finding:
    used, limit = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0) or 0)
    if not limit:
        return Finding("memory", Verdict.OK, f"{size(used)} used, no limit set (maxmemory)")
    verdict = Verdict.WARNING if used > limit * NEARLY_FULL else Verdict.OK
    return Finding("memory", verdict, f"{size(used)} of {size(limit)} used")


# -- the trial run


def _trial(url: str) -> Finding:
    """Submit, take, finish, hit, forget, where nobody else looks; nothing of it stays."""
    name = f"rqarm-check-{secrets.token_hex(8)}"
    began = time.perf_counter()
    with RequestManager(url, namespace=name, queue=name) as rm:
        try:
            fault = _try(rm, name)
        except (RqarmError, redis.ResponseError) as error:
            fault = str(error)
        finally:
            _remove(rm, name)
    if fault:
        return Finding("trial run", Verdict.BAD, fault)
    took_ms = (time.perf_counter() - began) * 1000
    return Finding("trial run", Verdict.OK, f"submit, take, finish, hit, forget in {took_ms:.0f} ms")


def _try(rm: RequestManager, name: str) -> str:
    """The first thing that is not as it must be; "" when all is well."""
    uri, value = "/check", {"made by": name}
    submitted = rm.submit(uri)
    lease = rm.queues.next_request(0)
    if submitted.outcome is not Outcome.NEW or lease is None or lease.key != submitted.key:
        return "a request that was submitted could not be taken"
    lease.finish(value)
    again = rm.submit(uri)
    if again.outcome is not Outcome.HIT or again.value != value:
        return "a result that was stored did not come back"
    if not rm.forget(submitted.key):
        return "a result could not be forgotten"
    return ""


def _remove(rm: RequestManager, name: str) -> None:
    """Every key that the trial run can have written. By name: a SCAN would walk through the whole server."""
    key = rm.explain("/check").key
    parts: dict[str, list[str]] = {"key": [key], "queue": [name], "family": ["/check", *STATISTICS]}
    wanted = []
    for pattern in PATTERNS.values():
        fields = re.findall(r"{(\w+)}", pattern)
        if all(field in parts for field in fields):
            for values in itertools.product(*[parts[field] for field in fields]):
                wanted.append(rm.core.keys.prefix + pattern.format(**dict(zip(fields, values, strict=True))))
    with contextlib.suppress(redis.ResponseError):
        rm.connection.unlink(*wanted)
        rqjobs.delete_queue(rm.connection, name)


# -- workers and queues


def _queues(client: redis.Redis, stats: Stats, default: str) -> Iterator[Finding]:
    for queue in sorted({default, *stats.pending}):
        waiting = stats.pending.get(queue, 0)
        workers = rqjobs.live_workers(client, queue)
        delayed = rqjobs.delayed_jobs(client, queue)
        yield Finding("queue", Verdict.OK, f"{queue}: {waiting} waiting, {delayed} delayed")
        if workers:
            yield Finding("workers", Verdict.OK, f"{queue}: {len(workers)} alive ({', '.join(sorted(workers))})")
        else:
            yield Finding("workers", _none_alive(waiting), f"{queue}: no RQ worker is alive; start `rqarm worker`")
        if rqjobs.has_scheduler(client, queue):
            yield Finding("scheduler", Verdict.OK, f"{queue}: alive")
        elif workers or delayed:
            text = f"{queue}: none is alive, so delayed retries wait; start a worker without --no-scheduler"
            yield Finding("scheduler", _none_alive(delayed), text)
    if stats.quarantined:
        text = f"{stats.quarantined} requests set aside: rqarm quarantine list"
        yield Finding("quarantine", Verdict.WARNING, text)


def _none_alive(waiting: int) -> Verdict:
    """Somebody must be there only when there is something to do."""
    return Verdict.BAD if waiting else Verdict.WARNING
