"""Commands about cached results, and the counters."""

from __future__ import annotations

import itertools
import sys

import click

from rqarm import metrics
from rqarm.browse.cached import Range
from rqarm.cli.common import (
    FAILURE,
    Target,
    as_json,
    complain,
    each_key,
    is_terminal,
    key_of,
    keys_argument,
    limit_option,
    on_server,
    print_json,
    print_pairs,
    print_statuses,
    print_table,
    shown_uri,
    shown_with_status,
)
from rqarm.text import duration, size


@click.group()
def cache() -> None:
    """Look at cached results, keep them, and clear them."""


@cache.command("ls")
@on_server
@limit_option
@as_json
def list_cached(target: Target, limit: int, is_json: bool) -> None:
    """List the cached results, soonest to expire first, sticky ones last."""
    with target.manager() as rm:
        listed = list(itertools.islice(rm.cache.list(limit + 1), limit + 1))
        print_statuses(listed[:limit], rm.settings, is_json)
    if len(listed) > limit:
        complain(f"there are more than {limit}: --limit N shows more")


@cache.command()
@on_server
@click.argument("key", required=False)
@as_json
def info(target: Target, key: str | None, is_json: bool) -> None:
    """Say what one result is, or how much is cached."""
    with target.manager() as rm:
        if key is not None:
            name = key_of(key, rm.settings)
            envelope = rm.cache.envelope(name)
            facts: dict[str, object] = {
                "key": name,
                "kind": envelope.kind,
                "content_type": envelope.content_type,
                "filename": envelope.filename or None,
                "size": envelope.size,
                "stored": envelope.stored,
                "encoding": envelope.encoding or None,
                "chunks": envelope.chunks,
            }
        else:
            numbers = rm.cache.stats()
            facts = {"temporary": numbers.temporary, "sticky": numbers.sticky, "bytes": numbers.bytes}
    if is_json:
        print_json(facts)
        return
    shown = {name: size(value) if name in _BYTES and isinstance(value, int) else value for name, value in facts.items()}
    print_pairs((name.replace("_", " "), value) for name, value in shown.items() if value is not None)


_BYTES = ("size", "stored", "bytes")


@cache.command()
@on_server
@click.option("--temporary", is_flag=True, help="Only results that would expire by themselves.")
@click.option("--route", metavar="ROUTE", help="Only of an operation, or a path as it begins: /cities or host/v1.")
@click.option("--older-than", type=float, metavar="SECONDS", help="Only what was computed so long ago.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def clear(target: Target, temporary: bool, route: str | None, older_than: float | None, yes: bool) -> None:
    """Forget cached results: every one, sticky ones too, or some."""
    if temporary and (route is not None or older_than is not None):
        raise click.UsageError("--temporary goes with no other choice")
    if not temporary and not yes:
        if not is_terminal(sys.stdin):
            raise click.UsageError("this forgets sticky results too: say --yes, or --temporary to keep those")
        what = "every cached result" if route is None and older_than is None else "these cached results"
        click.confirm(f"Forget {what}, sticky ones too?", abort=True, err=True)
    with target.manager() as rm:
        cleared = rm.cache.clear_temporary() if temporary else rm.cache.clear(route=route, older_than=older_than)
    click.echo(f"{cleared} results forgotten")


@cache.command()
@on_server
@click.argument("tags", nargs=-1, required=True, metavar="TAG...")
def invalidate(target: Target, tags: tuple[str, ...]) -> None:
    """Forget the cached results that carry one of these tags, sticky ones too."""
    with target.manager() as rm:
        cleared = rm.cache.invalidate(tags)
    click.echo(f"{cleared} results forgotten")


@cache.command()
@on_server
@keys_argument
def pin(target: Target, keys: tuple[str, ...]) -> int:
    """Make results sticky."""
    return each_key(target, keys, lambda rm, key: _retained(rm.cache.pin(key), "pinned"))


@cache.command()
@on_server
@keys_argument
@click.option("--ttl", type=float, metavar="SECONDS", help="So long from now; else RQARM_TTL.")
def unpin(target: Target, keys: tuple[str, ...], ttl: float | None) -> int:
    """Let results expire."""
    return each_key(target, keys, lambda rm, key: _retained(rm.cache.unpin(key, ttl), "unpinned"))


@cache.command("ttl")
@on_server
@click.argument("seconds", type=float)
@keys_argument
def set_ttl(target: Target, seconds: float, keys: tuple[str, ...]) -> int:
    """Let results expire so many seconds from now, sooner or later than before."""
    return each_key(
        target, keys, lambda rm, key: _retained(rm.cache.set_ttl(key, seconds), f"expires in {seconds:g} s")
    )


def _retained(is_done: bool, word: str) -> tuple[int, str]:
    return (0, word) if is_done else (FAILURE, "has no result")


@cache.command()
@on_server
@click.option("--sample", type=click.IntRange(1, 2_000), default=500, show_default=True, help="Entries to look at.")
@as_json
def overview(target: Target, sample: int, is_json: bool) -> None:
    """Say what fills the cache: times to live, ages, routes, the largest."""
    with target.manager() as rm:
        seen = rm.cache.overview(sample=sample)
        largest = [shown_with_status(entry, rm.settings) for entry in seen.largest]
        rows = [(size(entry.size), entry.status.key, shown_uri(entry.status, rm.settings)) for entry in seen.largest]
    if is_json:
        print_json({**seen.to_dict(), "largest": largest})
        return
    print_pairs(
        [
            ("entries", f"{seen.temporary} temporary, {seen.sticky} sticky, {size(seen.bytes)}"),
            ("live for", _ranges(seen.ttl)),
            ("ages", f"{_ranges(seen.ages)} (of {seen.sampled} looked at)"),
            ("kinds", ", ".join(f"{share.name} {share.entries}" for share in seen.kinds) or "none"),
        ]
    )
    click.echo(f"\nRoutes, of {seen.sampled} looked at:")
    print_table(("ENTRIES", "BYTES", "ROUTE"), [(str(s.entries), size(s.size), s.name) for s in seen.routes])
    click.echo("\nThe largest:")
    print_table(("BYTES", "KEY", "URI"), rows)


def _ranges(ranges: tuple[Range, ...]) -> str:
    counted = [each for each in ranges if each.count]
    return (
        ", ".join(
            f"to {duration(each.upto)}: {each.count}" if each.upto is not None else f"longer: {each.count}"
            for each in counted
        )
        or "none"
    )


@click.command()
@on_server
@as_json
@click.option("--prometheus", is_flag=True, help="Print all metrics in the text format of Prometheus.")
def stats(target: Target, is_json: bool, prometheus: bool) -> None:
    """Print counters and sizes of the namespace.

    Submissions by outcome and executions by end since the namespace began; what waits, runs and is cached now.
    """
    if prometheus and is_json:
        raise click.UsageError("--prometheus and --json are two formats: choose one")
    with target.manager() as rm:
        if prometheus:
            click.echo(metrics.render(rm.overview()), nl=False)
            return
        numbers = rm.cache.stats()
    if is_json:
        print_json(numbers.to_dict())
        return
    for title, counts in (
        ("submissions", numbers.submissions),
        ("executions", numbers.executions),
        ("sweeps", numbers.sweeps),
        ("pending", numbers.pending),
    ):
        print_pairs([(title, ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none")])
    print_pairs(
        [
            ("in progress", numbers.in_progress),
            ("quarantined", numbers.quarantined),
            ("cached", f"{numbers.temporary} temporary, {numbers.sticky} sticky, {size(numbers.bytes)}"),
        ]
    )
