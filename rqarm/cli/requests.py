"""Commands about single requests: submit, look, wait, fetch, end."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import click

from rqarm.browse import listing
from rqarm.cli.bulk import NOT_DURABLE, submit_from
from rqarm.cli.common import (
    FAILURE,
    NO_SERVER,
    Target,
    as_json,
    complain,
    document_of,
    each_key,
    exit_code,
    exit_code_of,
    is_terminal,
    key_of,
    keys_argument,
    limit_option,
    on_server,
    print_json,
    print_pairs,
    print_statuses,
    print_table,
    queue_option,
    shown_uri,
    since,
    tell,
)
from rqarm.cli.values import read_value, write_value
from rqarm.cli.waiting import each_ended, follow, going_on, progress_of, wait_for
from rqarm.config import Settings
from rqarm.errors import RequestFailed, RqarmError, WaitTimeout
from rqarm.manager import RequestManager
from rqarm.model import BatchStatus, Key, Outcome, State
from rqarm.request import BatchRequest
from rqarm.text import duration, plain
from rqarm.uri import Canonical, canonicalize, redact_error


def _pairs(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    pairs = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{plain(text)!r} is not NAME=VALUE")
        pairs.append((name, value))
    return tuple(pairs)


params = click.option(
    "-p", "--param", "params", multiple=True, callback=_pairs, metavar="NAME=VALUE", help="A parameter; repeatable."
)
operation = click.option("--operation", default="", metavar="NAME", help="The operation that handles it.")
output = click.option(
    "-o", "--output", metavar="FILE", type=click.Path(), help="Write the value there, when it is complete; - is stdout."
)
seconds = click.FloatRange(min=0)


# -- submit and its value


@click.command()
@on_server
@click.argument("uri", default="", required=False)
@click.option(
    "--from",
    "source",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help="Submit every line of it, a URI or a JSON object; - is stdin.",
)
@params
@operation
@click.option("--sticky", is_flag=True, help="The result stays until it is cleared.")
@click.option("--ttl", type=float, metavar="SECONDS", help="How long the result lives.")
@click.option("--key", metavar="KEY", help="A readable key instead of the hash.")
@queue_option
@click.option("--priority", type=click.Choice(["high", "default", "low"]), default="default", show_default=True)
@click.option("--again", is_flag=True, help="Run it again whatever is cached.")
@click.option("--wait", "is_waiting", is_flag=True, help="Wait for the value and write it; so do -o and --timeout.")
@click.option("--timeout", type=seconds, metavar="SECONDS", help="Wait no longer than this; the request goes on.")
@output
@as_json
def submit(
    target: Target,
    uri: str,
    source: str | None,
    params: tuple[tuple[str, str], ...],
    is_waiting: bool,
    timeout: float | None,
    output: str | None,
    again: bool,
    is_json: bool,
    **options: Any,
) -> int:
    """Submit a request, and wait for its value if you like.

    Prints the outcome (new, joined, hit, stale, negative, refused), the key and the state. With --wait that goes to
    stderr, and the value to stdout.

    --from FILE: a line is a URI, or JSON like {"uri": "/a", "params": {"x": "1"}, "ttl": 60, "payload": ...}. Lines
    that are wrong are told with their number, and the others are submitted. Prints how many had each outcome; with
    --json a status per line. --wait waits until all have ended, and writes no values.
    """
    if source is not None:
        given = {"URI": uri, "--param": params, "--key": options.pop("key"), "--again": again, "--output": output}
        if wrong := [name for name, value in given.items() if value]:
            raise click.UsageError(f"{', '.join(wrong)} cannot be combined with --from")
        with target.manager() as rm:
            is_waiting = is_waiting or timeout is not None
            return submit_from(rm, source, options, is_waiting=is_waiting, timeout=timeout, is_json=is_json)
    request = BatchRequest(uri, params or None, **options)
    with target.manager() as rm:
        status = rm.resubmit(request) if again else rm.submit(request)
        with going_on([status.key]):
            is_waiting = is_waiting or output is not None or timeout is not None
            if not is_json:
                click.echo(f"{status.outcome} {status.key} {status.state}", err=is_waiting)
            if status.outcome is Outcome.REFUSED:
                name = status.queue or request.queue or rm.settings.queue
                complain(f"queue {name} is at its limit (max_pending): try again later")
            if status.durable is False:
                complain(NOT_DURABLE)
            if not is_waiting or status.outcome is Outcome.REFUSED:
                return _leave_submitted(rm, status, is_json)
            ended = wait_for(rm, status.key, timeout) if status.state.in_flight else status
            return _deliver(rm, replace(ended, outcome=status.outcome), output, timeout, is_json)


def _leave_submitted(rm: RequestManager, status: BatchStatus, is_json: bool) -> int:
    if is_json:
        print_json(document_of(status, rm.settings))
    if status.outcome is Outcome.NEGATIVE:
        tell(RequestFailed(status.key, status.error))
    return FAILURE if status.outcome in (Outcome.NEGATIVE, Outcome.REFUSED) else 0


@click.command()
@on_server
@click.argument("key")
@click.option("--timeout", type=seconds, default=0.0, metavar="SECONDS", help="Wait so long for it; 0 = do not.")
@output
@as_json
def result(target: Target, key: str, timeout: float, output: str | None, is_json: bool) -> int:
    """Write the value of a request.

    Bytes as they are, text as text, other values as JSON. --json: any value as JSON, bytes as {"base64": ...}.
    """
    with target.manager() as rm:
        name = key_of(key, rm.settings)
        status = rm.status(name)
        if timeout and status.state.in_flight:
            status = wait_for(rm, name, timeout)
        if status.state.in_flight and timeout:
            raise WaitTimeout(name, status.state, timeout)
        if is_json and output is None:
            print_json(read_value(rm, name))
        else:
            write_value(rm, name, output)
    return 0


def _deliver(rm: RequestManager, status: BatchStatus, output: str | None, timeout: float | None, is_json: bool) -> int:
    """The value of a request that was waited for, or why there is none."""
    document = document_of(status, rm.settings)
    if status.state is State.COMPLETED:
        if is_json and output is None:
            document["value"] = read_value(rm, status.key)
        else:
            write_value(rm, status.key, output)
    if is_json:
        print_json(document)
    if status.state is State.COMPLETED:
        return 0
    if status.state.in_flight:
        return tell(WaitTimeout(status.key, status.state, timeout or 0.0))
    try:
        rm.result(status.key)
    except RqarmError as error:
        return tell(error)
    return FAILURE


# -- look


@click.command()
@on_server
@click.argument("key")
@click.option("--watch", is_flag=True, help="Go on until the request has ended; then the exit code is that of wait.")
@as_json
def status(target: Target, key: str, watch: bool, is_json: bool) -> int:
    """Show what is known of a request.

    State, position in line, progress, seconds until it is done, error. The exit code is 1 only when nothing is known.
    """
    with target.manager() as rm:
        name = key_of(key, rm.settings)
        found = rm.full_status(name)
        if watch and found.state.in_flight:
            found = _watch(rm, name, is_quiet=is_json)
        if is_json:
            print_json(document_of(found, rm.settings))
        else:
            _print_status(found, rm.settings)
    if watch:
        return exit_code_of(found)
    return FAILURE if found.state is State.UNKNOWN else 0


def _watch(rm: RequestManager, key: Key, *, is_quiet: bool) -> BatchStatus:
    """The last status; on the way a line for each change, drawn over on a terminal."""
    if is_quiet or is_terminal(sys.stderr):
        return wait_for(rm, key, None)
    last = ""
    with going_on([key]):
        for found in follow(rm, key, None):
            # not the seconds left: they change with every look
            line = progress_of(replace(found, eta=None, estimated_time=None))
            if line != last and found.state.in_flight:
                click.echo(line)
            last = line
    return found


def _print_status(status: BatchStatus, settings: Settings) -> None:
    pairs: list[tuple[str, object]] = [("key", status.key), ("state", status.state)]
    if status.state is State.UNKNOWN:
        print_pairs(pairs)
        return
    pairs += [("uri", shown_uri(status, settings)), ("queue", status.queue)]
    for name in ("submitted", "started", "ended"):
        moment = getattr(status, name)
        if moment is not None:
            pairs.append((name, f"{moment:%Y-%m-%d %H:%M:%S} UTC, {since(moment)} ago"))
    if status.position:
        pairs.append(("position", status.position))
    if status.progress is not None and status.state is State.IN_PROGRESS:
        pairs.append(("progress", f"{status.progress:.0%} {status.progress_message}"))
    if status.eta is not None:
        pairs.append(("eta", f"about {duration(status.eta)}"))
    if status.attempts:
        pairs.append(("attempts", status.attempts))
    if status.worker:
        pairs.append(("worker", status.worker))
    if status.sticky:
        pairs.append(("sticky", "yes"))
    if status.quarantined:
        pairs.append(("quarantined", status.reason))
    error = redact_error(status.error, settings.secret_params) if status.error else {}
    if error:
        pairs.append(("error", f"{error.get('type', '')}: {error.get('message', '')}"))
    print_pairs(pairs)
    if error.get("traceback"):
        click.echo(plain(str(error["traceback"]).rstrip(), keep="\n\t"))


@click.command()
@on_server
@click.option("-q", "--queue", metavar="QUEUE", help="Of this queue only.")
@click.option("--state", type=click.Choice(["pending", "in_progress", "quarantined", "cached"]), help="One state only.")
@limit_option
@as_json
def ls(target: Target, queue: str | None, state: str | None, limit: int, is_json: bool) -> None:
    """List requests: what waits and runs, or one state.

    Pending ones are next first, cached ones soonest to expire first.
    """
    with target.manager() as rm:
        listed = list(itertools.islice(_listed(rm, state, queue), limit + 1))
        print_statuses(listed[:limit], rm.settings, is_json)
    if len(listed) > limit:
        complain(f"there are more than {limit}: --limit N shows more")


def _listed(rm: RequestManager, state: str | None, queue: str | None) -> Iterator[BatchStatus]:
    if state == "cached":
        found = rm.cache.list()
    elif state == "quarantined":
        found = _browse(rm, "quarantine")
    else:
        running = _browse(rm, "leases") if state != "pending" else iter(())
        waiting = _pending(rm, queue) if state != "in_progress" else iter(())
        found = itertools.chain(running, waiting)
    return (status for status in found if queue is None or status.queue == queue)


def _pending(rm: RequestManager, queue: str | None) -> Iterator[BatchStatus]:
    names = [queue] if queue else sorted(rm.cache.stats().pending)
    for name in names:
        yield from _browse(rm, "pending", queue=name)


def _browse(rm: RequestManager, index: str, **parts: str) -> Iterator[BatchStatus]:
    return rm.shell.iterate(listing.entries(rm.core, rm.core.keys.named(index, **parts)))


@click.command()
@on_server
@click.argument("uri", default="", required=False)
@params
@operation
@click.option(
    "--explain", "is_explaining", is_flag=True, help="Say which rule changed what, and what a submit would do."
)
@as_json
def key(
    target: Target, uri: str, params: tuple[tuple[str, str], ...], operation: str, is_explaining: bool, is_json: bool
) -> int:
    """Print the key of a request; it needs no server.

    Only what a submit would do now (--explain) is asked of the server.
    """
    settings = target.settings()
    request = BatchRequest(uri, params or None, operation=operation)
    form = canonicalize(
        uri, params or None, operation=operation, ignore_params=settings.ignore_params, explain=is_explaining
    )
    document: dict[str, Any] = {"uri": uri, "canonical": form.uri, "identity": form.text, "key": form.key}
    code = 0
    if is_explaining:
        state, would, code = _would(target, request)
        document["steps"] = [{"rule": step.rule, "before": step.before, "after": step.after} for step in form.steps]
        document |= {"state": state, "would": would}
    if is_json:
        print_json(document)
    elif is_explaining:
        _print_explanation(form, document)
    else:
        click.echo(form.key)
    return code


def _would(target: Target, request: BatchRequest) -> tuple[str | None, str | None, int]:
    """State, outcome and exit code. Without a server there are no words, but the rest holds."""
    try:
        with target.manager() as rm:
            found = rm.explain(request)
    except Exception as error:
        if exit_code(error) != NO_SERVER:
            raise
        return None, None, tell(error)
    return str(found.state), str(found.would), 0


def _print_explanation(form: Canonical, document: dict[str, Any]) -> None:
    print_pairs([("key", form.key), ("canonical", form.uri), ("identity", form.text.replace("\n", " | "))])
    if document["would"] is not None:
        print_pairs([("state", document["state"]), ("submit", f"would be {document['would']}")])
    click.echo()
    if not form.steps:
        click.echo("No rule changed anything.")
        return
    print_table(("RULE", "BEFORE", "AFTER"), [(step.rule, step.before, step.after) for step in form.steps])


# -- wait and end


@click.command()
@on_server
@keys_argument
@click.option("--timeout", type=seconds, metavar="SECONDS", help="Wait no longer than this; the requests go on.")
@as_json
def wait(target: Target, keys: tuple[str, ...], timeout: float | None, is_json: bool) -> int:
    """Wait until requests have ended.

    Prints the key and state of each as it ends. Exit code 0: all completed; 1: one failed, was cancelled or is unknown;
    3: the time is over.
    """
    with target.manager() as rm:
        names = [key_of(text, rm.settings) for text in keys]
        with going_on(names):
            if is_json:
                statuses = rm.wait(names, timeout)
                print_json([document_of(found, rm.settings) for found in statuses])
                return max(exit_code_of(found) for found in statuses)
            code = 0
            for found in each_ended(rm, names, timeout):
                click.echo(f"{found.key} {found.state}")
                code = max(code, exit_code_of(found))
    return code


@click.command()
@on_server
@keys_argument
def cancel(target: Target, keys: tuple[str, ...]) -> int:
    """End requests for everybody who waits for them."""
    return each_key(target, keys, lambda rm, key: (0, "cancelled" if rm.cancel(key) else "has ended already"))


@click.command()
@on_server
@keys_argument
def forget(target: Target, keys: tuple[str, ...]) -> int:
    """Drop ended requests with their results.

    What is still in flight stays (exit code 3): cancel it first.
    """
    return each_key(target, keys, lambda rm, key: (0, "forgotten") if rm.forget(key) else (FAILURE, "unknown"))


@click.command()
@on_server
@queue_option
def sweep(target: Target, queue: str | None) -> None:
    """Set going again what died in a queue without a word.

    Workers and whoever waits do it by themselves; this does it now.
    """
    with target.manager() as rm:
        healed = rm.queues.sweep(queue)
    click.echo(f"{healed} set going again")
