"""``rqarm worker``: an rqarm.Worker on the RQ queues of our queues."""

from __future__ import annotations

import logging
import os

import click

from rqarm import connect
from rqarm.cli.common import Target, on_server, plain
from rqarm.config import Settings
from rqarm.errors import ConfigError
from rqarm.manager import RequestManager
from rqarm.rqjobs import queue_names

log = logging.getLogger("rqarm.worker")


@click.command()
@on_server
@click.argument("names", nargs=-1, metavar="[QUEUE]...")
@click.option(
    "--handlers",
    "specs",
    multiple=True,
    metavar="MODULE:NAME",
    help="Your Handlers, as package.module:name or file.py:name; repeatable. RQARM_HANDLERS.",
)
@click.option("-q", "--queue", "queues", multiple=True, metavar="QUEUE", help="The same as an argument; repeatable.")
@click.option("-n", "--name", metavar="NAME", help="The name of the worker; one is made up otherwise.")
@click.option("--burst", is_flag=True, help="End when the queues are empty.")
@click.option("--max-jobs", type=click.IntRange(min=1), metavar="N", help="End after so many jobs.")
@click.option(
    "--with-scheduler/--no-scheduler",
    "scheduler",
    default=True,
    show_default=True,
    help="Queue what was delayed, such as retries, when its time has come.",
)
@click.option("-v", "--verbose", count=True, help="Log what RQ does as well; -vv: everything.")
def worker(
    target: Target,
    names: tuple[str, ...],
    specs: tuple[str, ...],
    queues: tuple[str, ...],
    name: str | None,
    burst: bool,
    max_jobs: int | None,
    scheduler: bool,
    verbose: int,
) -> None:
    """Run requests: an RQ worker with your handlers.

    It serves each QUEUE by priority (high, default, low), one queue after the other. Ordinary RQ jobs on the same
    queues run too. Ctrl-C ends it after the request that runs; a second one hands that request back.
    """
    log_to_stderr(verbose)
    settings = target.settings()
    from rqarm.worker import Worker, load_handlers, use_handlers

    handlers = load_handlers(specs)
    if not list(handlers):
        raise ConfigError("no handlers: name them with --handlers module:name or RQARM_HANDLERS")
    use_handlers(handlers)
    url = connect.default_url(settings)
    _check(url, settings)
    # The worker, the processes that it forks, and a handler's own RequestManager() read the environment.
    os.environ |= {"RQARM_URL": url, "RQARM_NAMESPACE": settings.namespace}
    logical = list(dict.fromkeys((*queues, *names))) or [settings.queue]
    listened = [rq_queue for queue in logical for rq_queue in queue_names(queue)]
    with connect.open_client(url, for_waiting=True) as client:
        try:
            running = Worker(listened, name=name, connection=client)
            log.info("%s listens on %s at %s", running.name, ", ".join(listened), connect.redact_url(url))
            log.info("%d handlers: %s", len(handlers.routes), ", ".join(route.name for route in handlers.routes))
            running.work(burst=burst, max_jobs=max_jobs, with_scheduler=scheduler, logging_level=rq_level(verbose))
        except ValueError as error:
            # RQ has no class of its own for a name that is taken
            if "active worker" not in str(error):
                raise
            raise ConfigError(f"-n/--name: {error}") from error


def _check(url: str, settings: Settings) -> None:
    """Refuse a server that would lose requests before any is taken: the first call of a manager judges it."""
    with RequestManager(url, namespace=settings.namespace) as rm:
        rm.cache.stats()
    # Said once: the worker's own manager would say it again.
    os.environ["RQARM_ALLOW_VOLATILE"] = "1"


def log_to_stderr(verbose: int) -> None:
    """One line for each request; RQ's own lines with -v. RQ adds no handler of its own where there is one."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Harmless("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.DEBUG if verbose > 1 else logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("rqarm").setLevel(logging.DEBUG if verbose > 1 else logging.INFO)


def rq_level(verbose: int) -> str:
    """What RQ's own loggers tell; RQ has set them to INFO."""
    return ("WARNING", "INFO", "DEBUG")[min(verbose, 2)]


class _Harmless(logging.Formatter):
    """Messages hold text of others: no control characters, and no line that looks like the start of another record."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record), keep="\n\t").replace("\n", "\n    ")
