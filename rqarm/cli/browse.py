"""Commands of an operator: search, one request in full, what runs where, and taking it away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from rqarm.browse.attempts import AttemptView
from rqarm.browse.detail import RequestDetail
from rqarm.browse.search import LONGEST_PAGE, QUARANTINED
from rqarm.cli.common import (
    FAILURE,
    Target,
    as_json,
    complain,
    document_of,
    each_key,
    key_of,
    keys_argument,
    on_server,
    print_json,
    print_pairs,
    print_statuses,
    print_table,
    queue_option,
    shown_uri,
    shown_with_status,
    since,
)
from rqarm.config import Settings
from rqarm.manager import RequestManager
from rqarm.model import Key, State
from rqarm.text import duration, plain, size

STATES = [*(str(state) for state in State if state is not State.UNKNOWN), QUARANTINED]

page_limit = click.option(
    "--limit", type=click.IntRange(1, LONGEST_PAGE), default=50, show_default=True, help="So many at the most."
)


@click.command()
@on_server
@click.argument("text", default="", required=False)
@click.option("--state", type=click.Choice(STATES), help="In this state only.")
@click.option("--route", metavar="ROUTE", help="Of an operation, or a path as it begins: /cities or host/v1/{table}.")
@click.option("--tag", metavar="TAG", help="With this tag only.")
@queue_option
@page_limit
@click.option("--cursor", default="", metavar="CURSOR", help="Go on where a search before ended.")
@as_json
def search(target: Target, text: str, cursor: str, limit: int, is_json: bool, **filters: str | None) -> None:
    """Find requests by key, URI or a part of it, state, route, tag.

    What TEXT names exactly comes first. Looks at 1,000 records at a time until LIMIT are found; with --json at 1,000
    and no more, and prints the cursor to go on from.
    """
    with target.manager() as rm:
        page = rm.search(text, cursor=cursor, limit=limit, **filters)
        if is_json:
            listed = [document_of(entry, rm.settings) for entry in page.entries]
            print_json({**page.to_dict(), "entries": listed})
            return
        found = list(page.entries)
        while page.cursor and len(found) < limit:
            page = rm.search(text, cursor=page.cursor, limit=limit - len(found), **filters)
            found += page.entries
        print_statuses(found, rm.settings, is_json=False)
    if page.cursor:
        complain(f"looked at {page.looked_at} of {page.total}: --cursor '{page.cursor}' goes on")


@click.command()
@on_server
@click.argument("key")
@as_json
def inspect(target: Target, key: str, is_json: bool) -> int:
    """Show everything that is known of a request.

    Its history, why it has its key, lease, RQ job, payloads, result, limits. The exit code is 1 when nothing is known.
    """
    with target.manager() as rm:
        detail = rm.inspect(key_of(key, rm.settings)).redacted(rm.settings.secret_params)
        if is_json:
            print_json(detail.to_dict())
        else:
            _print_detail(detail, rm.settings)
    return FAILURE if detail.status.state is State.UNKNOWN else 0


def _print_detail(detail: RequestDetail, settings: Settings) -> None:
    print_pairs((name, value) for name, value in _pairs(detail, settings) if value not in (None, "", 0))
    if detail.steps:
        click.echo("\nWhy this key:")
        print_table(("RULE", "BEFORE", "AFTER"), [(step.rule, step.before, step.after) for step in detail.steps])
    if detail.timeline:
        click.echo("\nEvents that are still kept:")
        print_table(("ID", "VERB", "STATE"), [(event.id, event.verb, event.state) for event in detail.timeline])
    if len(detail.attempts) > 1:
        click.echo("\nAttempts, of which the newest ten that failed are kept:")
        print_table(_ATTEMPT_HEADS, [_attempt_row(each) for each in detail.attempts])
    if detail.payloads:
        click.echo(f"\nPayloads ({detail.payload_count}):")
        print_table(("ID", "SIZE"), [(payload.id, size(payload.size)) for payload in detail.payloads])
    _print_tracebacks(detail)


_ATTEMPT_HEADS = ("NO", "OUTCOME", "WORKER", "STARTED", "RAN", "ERROR")


def _attempt_row(attempt: AttemptView) -> tuple[str, ...]:
    return (
        str(attempt.number),
        attempt.outcome,
        attempt.worker,
        f"{attempt.started:%Y-%m-%d %H:%M:%S}" if attempt.started else "",
        duration(attempt.ran) if attempt.ran is not None else "",
        f"{attempt.error['type']}: {attempt.error['message']}" if attempt.error else "",
    )


def _print_tracebacks(detail: RequestDetail) -> None:
    """Of each attempt, the last one at the end; else of a failure that no attempt tells."""
    told: list[tuple[str, dict[str, Any] | None]]
    told = [(f"Traceback of attempt {each.number}:\n", each.error) for each in detail.attempts if each.error]
    for title, error in told or [("", detail.status.error)]:
        if error and error.get("traceback"):
            click.echo("\n" + title + plain(str(error["traceback"]).rstrip(), keep="\n\t"))


def _pairs(detail: RequestDetail, settings: Settings) -> Iterator[tuple[str, object]]:
    status = detail.status
    yield "key", detail.key
    yield "state", f"{status.state}, quarantined" if status.quarantined else status.state
    if status.state is State.UNKNOWN:
        return
    yield "uri", shown_uri(status, settings)
    yield "given as", detail.original if detail.original != status.uri else ""
    yield "operation", detail.operation
    yield "options", ", ".join(f"{name} {value}" for name, value in detail.options.items())
    yield "unreadable", detail.unreadable
    yield "queue", status.queue
    for name in ("submitted", "started", "ended"):
        moment = getattr(status, name)
        yield name, f"{moment:%Y-%m-%d %H:%M:%S} UTC, {since(moment)} ago" if moment else ""
    yield "position", status.position
    yield "eta", f"about {duration(status.eta)}" if status.eta is not None else ""
    yield "progress", f"{status.progress:.0%} {detail.progress_message}" if status.progress is not None else ""
    yield "attempts", status.attempts
    yield "retries", detail.retries
    yield "crashes", detail.crashes
    yield "worker", status.worker
    if detail.lease_left is not None:
        left = detail.lease_left
        yield "lease", f"{duration(left)} left" if left > 0 else f"overdue since {duration(-left)}"
    if detail.job_id:
        yield "rq job", f"{detail.job_id} {detail.job_status or '(gone)'}"
    if detail.limit is not None:
        limit = detail.limit
        place = f", {detail.parked_at} in its line" if detail.parked_at else ""
        yield "limit", f"{limit.name}: {limit.running} of {limit.places} run, {limit.parked} parked{place}"
    yield "listeners", detail.listeners
    if detail.result is not None:
        result = detail.result
        missing = f", {result.missing} of {result.chunks} pieces missing" if result.missing else ""
        yield "result", f"{result.kind}, {result.content_type}, {size(result.size)} ({size(result.stored)}){missing}"
    yield "expires", f"in {duration(detail.ttl)}" if detail.ttl is not None else "sticky" if detail.result else ""
    if detail.negative_until is not None and detail.negative_until > detail.seen:
        yield "negative", f"answers submits for {duration((detail.negative_until - detail.seen).total_seconds())}"
    yield "error", f"{status.error.get('type', '')}: {status.error.get('message', '')}" if status.error else ""


@click.command()
@on_server
@page_limit
@as_json
def claims(target: Target, limit: int, is_json: bool) -> None:
    """List what runs: holder, lease, last sign of life."""
    with target.manager() as rm:
        page = rm.claims(limit=limit)
        if is_json:
            shown = [shown_with_status(claim, rm.settings) for claim in page.entries]
            print_json({**page.to_dict(), "entries": shown})
            return
        rows = [
            (
                claim.status.key,
                claim.status.worker or "",
                "OVERDUE" if claim.overdue else duration(claim.left),
                duration(claim.renewed_ago),
                since(claim.status.started),
                shown_uri(claim.status, rm.settings),
            )
            for claim in page.entries
        ]
    print_table(("KEY", "WORKER", "LEFT", "RENEWED", "RUNS FOR", "URI"), rows)
    for limit_use in page.limits:
        use = f"{limit_use.running} of {limit_use.places} run, {limit_use.called} called, {limit_use.parked} parked"
        click.echo(plain(f"limit {limit_use.name}: {use}"))
    if page.next_offset is not None:
        complain(f"there are {page.total}: --limit N shows more")


@click.command()
@on_server
@keys_argument
def release(target: Target, keys: tuple[str, ...]) -> int:
    """Take running requests away from their workers.

    They are next in line, and the attempt does not count. The worker finds out at its next renewal.
    """
    return each_key(target, keys, _released)


def _released(rm: RequestManager, key: Key) -> tuple[int, str]:
    return (0, "released") if rm.release(key) else (FAILURE, "does not run")


@click.command()
@on_server
@as_json
def workers(target: Target, is_json: bool) -> None:
    """List the RQ workers of our queues: state, requests in hand, counts, heartbeat."""
    with target.manager() as rm:
        seen = rm.workers()
    if is_json:
        print_json(seen.to_dict())
        return
    rows = [
        (
            worker.name,
            "stopping" if worker.stopping else worker.state,
            str(worker.succeeded),
            str(worker.failed),
            duration(worker.heartbeat_age) if worker.heartbeat_age is not None else "",
            worker.rqarm_version or "-",
            worker.version,
            ",".join(worker.queues),
            " ".join(worker.keys),
        )
        for worker in seen.entries
    ]
    print_table(("NAME", "STATE", "OK", "FAILED", "HEARTBEAT", "RQARM", "RQ", "QUEUES", "RUNS"), rows)
    if seen.suspended:
        complain("`rq suspend` holds all workers; `rq resume` lets them go on")
