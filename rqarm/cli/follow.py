"""``rqarm follow``: what a request tells on its way."""

from __future__ import annotations

import sys

import click

from rqarm.cli.common import Target, as_json, complain, exit_code, is_terminal, json_text, key_of, on_server, tell
from rqarm.cli.values import write_value
from rqarm.cli.waiting import Line, bar, going_on
from rqarm.following import FollowEvent, FollowKind
from rqarm.manager import RequestManager
from rqarm.result import Result
from rqarm.text import plain


@click.command()
@on_server
@click.argument("key")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="No longer than this; it goes on.")
@as_json
def follow(target: Target, key: str, timeout: float | None, is_json: bool) -> int:
    """Show what a request emits and how far it is, then its value.

    What was emitted so far comes first. Each emission is a line of JSON on stdout, behind the last the value as `rqarm
    result` writes it; progress and the like go to stderr. --json: each event is a line of JSON, the last one has the
    result or the error. The exit code is that of `rqarm result`.
    """
    with target.manager() as rm:
        name = key_of(key, rm.settings)
        with going_on([name]), Line() as line:
            code = 0
            for event in rm.follow(name, timeout):
                code = _print_document(event) if is_json else _print(rm, event, line)
    return code


def _print_document(event: FollowEvent) -> int:
    document = event.to_dict()
    if isinstance(event.value, Result):
        document["value"] = event.value.data
    click.echo(json_text(document, indent=None))
    return exit_code(event.error) if event.error is not None else 0


def _print(rm: RequestManager, event: FollowEvent, line: Line) -> int:
    if event.kind is FollowKind.PROGRESS and event.fraction is not None:
        text = f"{bar(event.fraction)} {plain(event.message)}".rstrip()
        if is_terminal(sys.stderr):
            line.draw(text)
        else:
            click.echo(text, err=True)
        return 0
    line.clear()
    if event.kind is FollowKind.EMITTED:
        click.echo(json_text(event.value, indent=None))
    elif event.kind is FollowKind.RESULT:
        write_value(rm, event.key, None)
    elif event.kind is FollowKind.DROPPED:
        complain(f"{event.count} of what was emitted is gone")
    elif event.kind is FollowKind.RESTARTED:
        complain("the attempt is over and another is needed: what it emitted counts no more")
    elif event.error is not None:
        return tell(event.error)
    return 0
