"""Commands about the embedded server of this user."""

from __future__ import annotations

import click

from rqarm import embedded
from rqarm.cli.common import FAILURE, as_json, print_json, print_pairs
from rqarm.text import duration, size


@click.group()
def server() -> None:
    """The embedded server of this user.

    It is used when no URL is given (--url, RQARM_URL) and is started when it is needed. RQARM_HOME says where it lives.
    """


@server.command()
@as_json
def status(is_json: bool) -> int:
    """Say how the server is; the exit code is 1 when it does not run."""
    found = embedded.status()
    if is_json:
        print_json(found.to_dict())
    else:
        _print(found)
    return 0 if found.running else FAILURE


@server.command()
def start() -> None:
    """Start the server unless it runs."""
    _print(embedded.start())


@server.command()
@click.option("--timeout", type=click.FloatRange(min=0), default=10.0, show_default=True, metavar="SECONDS")
def stop(timeout: float) -> None:
    """Stop the server; its data stay."""
    click.echo("stopped" if embedded.stop(timeout=timeout) else "it did not run")


def _print(found: embedded.ServerStatus) -> None:
    pairs: list[tuple[str, object]] = [
        ("running", "yes" if found.running else "no"),
        ("url", found.url),
        ("home", found.home),
    ]
    if found.version:
        pairs.append(("version", found.version))
    if found.pid is not None:
        pairs.append(("process", found.pid))
    if found.uptime_s is not None:
        pairs.append(("up", duration(found.uptime_s)))
    if found.used_memory is not None:
        pairs.append(("memory", size(found.used_memory)))
    if found.keys is not None:
        pairs.append(("keys", found.keys))
    print_pairs(pairs)
