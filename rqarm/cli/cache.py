"""Commands about cached results, and the counters."""

from __future__ import annotations

import itertools
import sys

import click

from rqarm import metrics
from rqarm.cli.common import (
    Target,
    as_json,
    complain,
    is_terminal,
    key_of,
    on_server,
    print_json,
    print_pairs,
    size,
)
from rqarm.cli.requests import print_statuses


@click.group()
def cache() -> None:
    """Look at cached results, and clear them."""


@cache.command("ls")
@on_server
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="So many at the most.")
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
@click.option("--yes", is_flag=True, help="Do not ask.")
def clear(target: Target, temporary: bool, yes: bool) -> None:
    """Forget cached results: every one, sticky ones too, or the temporary ones."""
    if not temporary and not yes:
        if not is_terminal(sys.stdin):
            raise click.UsageError("this forgets sticky results too: say --yes, or --temporary to keep those")
        click.confirm("Forget every cached result, sticky ones too?", abort=True, err=True)
    with target.manager() as rm:
        cleared = rm.cache.clear_temporary() if temporary else rm.cache.clear()
    click.echo(f"{cleared} results forgotten")


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
