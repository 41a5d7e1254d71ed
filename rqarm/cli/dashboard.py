"""``rqarm dashboard``: the pages for operators, served on this machine."""

from __future__ import annotations

import logging
import sys

import click

from rqarm.cli.common import Target, on_server
from rqarm.errors import ConfigError
from rqarm.manager import RequestManager


@click.command()
@on_server
@click.option("--host", metavar="ADDRESS", help="Where to listen; RQARM_DASHBOARD_HOST, else 127.0.0.1.")
@click.option(
    "--port", type=click.IntRange(0, 65_535), metavar="PORT", help="RQARM_DASHBOARD_PORT, else 9181; 0 = any."
)
@click.option(
    "--username",
    metavar="NAME",
    help="Ask for this name; the password is RQARM_DASHBOARD_PASSWORD. RQARM_DASHBOARD_TOKEN: a bearer token.",
)
@click.option("--read-only", is_flag=True, default=None, help="Show everything and change nothing.")
@click.option("--insecure", is_flag=True, default=None, help="Listen on any address without credentials.")
def dashboard(
    target: Target,
    host: str | None,
    port: int | None,
    username: str | None,
    read_only: bool | None,
    insecure: bool | None,
) -> None:
    """Serve the dashboard: queues, requests, cache, claims, quarantine, workers.

    It listens on this machine only, unless it has credentials. They come from the environment, where other users
    cannot read them as they can a command line.
    """
    try:
        from rqarm.dashboard import create_app
        from rqarm.dashboard.serve import Server
    except ImportError as error:
        raise ConfigError(f"the dashboard needs {error.name}: pip install 'rqarm[dashboard]'") from error
    _log_to_stderr()
    with RequestManager(target.url, namespace=target.namespace) as manager:
        app = create_app(manager, host=host, port=port, username=username, read_only=read_only, insecure=insecure)
        server = Server(app)
        click.echo(f"rqarm dashboard on {server.url} (Ctrl-C ends it)")
        server.run()


def _log_to_stderr() -> None:
    """Changes and troubles, with their time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("rqarm")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
