"""Commands about what was set aside: look at it, run it again, drop it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from rqarm.cli.common import (
    FAILURE,
    NOT_READY,
    Target,
    as_json,
    complain,
    json_text,
    key_of,
    limit_option,
    on_server,
    print_json,
    print_pairs,
    print_table,
    since,
)
from rqarm.config import Settings
from rqarm.model import Reason
from rqarm.replies import QuarantineEntry
from rqarm.text import plain
from rqarm.uri import is_secret, redact

F = TypeVar("F", bound=Callable[..., Any])

#: what became of a key that was named, and the exit code it stands for
_CODES = {"in_flight": NOT_READY, "ended": FAILURE, "unknown": FAILURE, "superseded": NOT_READY}
_WORDS = {
    "in_flight": "is in flight",
    "ended": "is not set aside",
    "superseded": "was set aside again meanwhile: look at it, and repeat the command",
}


def chosen(command: F) -> F:
    """The options that choose entries."""
    for option in (
        click.option("--reason", type=click.Choice([str(each) for each in Reason]), help="Set aside for this only."),
        click.option("--exception", metavar="TYPE", help="Of this error only, with its module or without."),
        click.option("--route", metavar="NAME", help="Of this route only: its template, operation or name."),
    ):
        command = option(command)
    return command


@click.group()
def quarantine() -> None:
    """Look at failed requests that were set aside, and decide."""


@quarantine.command("list")
@on_server
@chosen
@limit_option
@as_json
def list_entries(
    target: Target, route: str | None, exception: str | None, reason: str | None, limit: int, is_json: bool
) -> None:
    """List what is set aside, newest first."""
    with target.manager() as rm:
        found = rm.quarantine.list(route=route, exception=exception, reason=reason, limit=limit + 1)
        listed = list(itertools.islice(found, limit + 1))
        settings = rm.settings
    if is_json:
        print_json([_document(entry, settings) for entry in listed[:limit]])
    else:
        rows = [
            (
                entry.key,
                entry.reason,
                since(entry.when),
                str(entry.attempts),
                entry.exception.rpartition(".")[2],
                redact(entry.uri, settings.secret_params) or entry.operation,
            )
            for entry in listed[:limit]
        ]
        print_table(("KEY", "REASON", "SINCE", "ATTEMPTS", "EXCEPTION", "URI"), rows)
    if len(listed) > limit:
        complain(f"there are more than {limit}: --limit N shows more")


@quarantine.command()
@on_server
@click.argument("key")
@as_json
def show(target: Target, key: str, is_json: bool) -> int:
    """Show one entry with everything that is known.

    The exit code is 1 when the request is not set aside.
    """
    with target.manager() as rm:
        name = key_of(key, rm.settings)
        entry = rm.quarantine.get(name)
        settings = rm.settings
    if entry is None:
        complain(f"{name} is not set aside")
        return FAILURE
    document = _document(entry, settings)
    if is_json:
        print_json(document)
        return 0
    texts = ("kwargs", "info", "payloads")
    pairs = [(field, value) for field, value in document.items() if field != "traceback" and field not in texts]
    pairs += [(field, json_text(document[field], indent=None)) for field in texts]
    print_pairs((field, value) for field, value in pairs if value not in (None, "", "{}", "[]"))
    if entry.traceback:
        click.echo(plain(entry.traceback.rstrip(), keep="\n\t"))
    return 0


def named_or_chosen(command: F) -> F:
    """Keys, or the options that choose entries, or all."""
    command = as_json(click.option("--all", "is_all", is_flag=True, help="All of them.")(command))
    return click.argument("keys", nargs=-1, metavar="[KEY]...")(chosen(command))


@quarantine.command()
@on_server
@named_or_chosen
def requeue(target: Target, **options: Any) -> int:
    """Run entries again: by key, by route, exception and reason, or all.

    Exit code 1 when a KEY is not set aside, 3 when it is in flight already; the others are requeued.
    """
    return _move(target, "requeue", **options)


@quarantine.command()
@on_server
@named_or_chosen
def discard(target: Target, **options: Any) -> int:
    """Drop entries with their payloads: by key, by route, exception and reason, or all.

    Exit code 1 when a KEY is not set aside, 3 when it is in flight; the others are discarded.
    """
    return _move(target, "discard", **options)


def _move(
    target: Target,
    verb: str,
    *,
    keys: tuple[str, ...],
    route: str | None,
    exception: str | None,
    reason: str | None,
    is_all: bool,
    is_json: bool,
) -> int:
    is_chosen = is_all or not (route is None and exception is None and reason is None)
    if bool(keys) == is_chosen:
        raise click.UsageError("name KEYs, or choose by --route, --exception and --reason, or say --all")
    with target.manager() as rm:
        names = [key_of(text, rm.settings) for text in keys]
        act = rm.quarantine.requeue if verb == "requeue" else rm.quarantine.discard
        words = act(*names, route=route, exception=exception, reason=reason, all=is_all)
    if is_json:
        print_json({str(key): word for key, word in words.items()})
    else:
        for key, word in words.items():
            click.echo(f"{key} {_WORDS.get(word, word)}")
        if not keys:
            moved = sum(word not in _CODES for word in words.values())
            complain(f"{moved} {'requeued' if verb == 'requeue' else 'discarded'}")
    # what was in nobody's command may have moved by itself
    return max((_CODES.get(word, 0) for word in words.values()), default=0) if keys else 0


def _document(entry: QuarantineEntry, settings: Settings) -> dict[str, Any]:
    """The entry for people, without the values of secret parameters."""
    document = {**entry.to_dict(), "uri": redact(entry.uri, settings.secret_params)}
    if document["payloads"] is None:
        del document["payloads"]
    for field in ("kwargs", "info"):
        document[field] = _redacted(document[field], settings)
    return document


def _redacted(named: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    return {name: "***" if is_secret(name, settings.secret_params) else value for name, value in named.items()}
