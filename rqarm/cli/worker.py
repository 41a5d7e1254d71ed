"""``rqarm worker``: an rqarm.Worker on the RQ queues of our queues, or a supervisor of several."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import click
from click.core import ParameterSource

from rqarm import connect
from rqarm.cli.common import Target, on_server
from rqarm.config import Settings
from rqarm.errors import ConfigError
from rqarm.manager import RequestManager
from rqarm.rqjobs import queue_names

log = logging.getLogger("rqarm.worker")

#: options that are settings of the worker
SETTINGS = ("concurrency", "max_jobs_per_horse", "max_horse_memory", "shutdown_timeout")
#: seconds beyond its workers' shutdown timeout after which a supervisor kills them
PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says, but for server and namespace."""

    names: tuple[str, ...]
    specs: tuple[str, ...]
    queues: tuple[str, ...]
    workers: int | None
    name: str | None
    burst: bool
    max_jobs: int | None
    concurrency: int | None
    max_jobs_per_horse: int | None
    max_horse_memory: int | None
    shutdown_timeout: float | None
    scheduler: bool
    functions: tuple[str, ...]
    any_rq_job: bool
    metrics_port: int | None
    log_format: str
    verbose: int
    supervisor: int | None
    ready: int | None
    successor_of: int | None


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
@click.option(
    "-n", "--workers", type=click.IntRange(min=1), metavar="N", help="Run N worker processes and restart the dead."
)
@click.option(
    "--name", metavar="NAME", help="The name of the worker; one is made up otherwise. With -n: NAME-1, NAME-2."
)
@click.option("--burst", is_flag=True, help="End when the queues are empty.")
@click.option("--max-jobs", type=click.IntRange(min=1), metavar="N", help="End after so many jobs.")
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    metavar="N",
    help="Run N requests at a time: async handlers, and those that are thread_safe. RQARM_CONCURRENCY.",
)
@click.option(
    "--max-jobs-per-horse",
    type=click.IntRange(min=0),
    metavar="N",
    help="Replace the process that runs requests after so many. RQARM_MAX_JOBS_PER_HORSE.",
)
@click.option(
    "--max-horse-memory",
    type=click.IntRange(min=0),
    metavar="MIB",
    help="Replace it when it holds more than this. RQARM_MAX_HORSE_MEMORY.",
)
@click.option(
    "--shutdown-timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="When told to stop, hand back what has not ended by then. RQARM_SHUTDOWN_TIMEOUT.",
)
@click.option(
    "--with-scheduler/--no-scheduler",
    "scheduler",
    default=True,
    show_default=True,
    help="Queue what was delayed, such as retries, when its time has come.",
)
@click.option(
    "--allow-function",
    "functions",
    multiple=True,
    metavar="DOTTED.NAME",
    help="Run ordinary RQ jobs, and callbacks, with this function; repeatable. RQARM_ALLOW_FUNCTIONS.",
)
@click.option(
    "--allow-any-rq-job", "any_rq_job", is_flag=True, help="Run whatever is in the queue, unpickling it, as RQ does."
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65_535),
    metavar="PORT",
    help="Answer Prometheus at http://127.0.0.1:PORT/metrics; 0: any free port.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Lines for people, or one JSON object a line.",
)
@click.option("-v", "--verbose", count=True, help="Log what RQ does as well; -vv: everything.")
@click.option("--supervisor", type=int, hidden=True, help="The process that started this one, and with which it ends.")
@click.option("--ready", type=int, hidden=True, help="The pipe on which the supervisor waits for a word.")
@click.option("--successor-of", type=int, hidden=True, help="The process that was killed under this name.")
@click.pass_context
def worker(ctx: click.Context, /, target: Target, **given: object) -> int:
    """Run requests: an RQ worker with your handlers.

    It serves each QUEUE by priority (high, default, low), one queue after the other. Ordinary RQ jobs on the same
    queues run if their function is allowed. Ctrl-C ends it after the request that runs; a second one hands that
    request back.
    """
    options = Options(**given)  # type: ignore[arg-type]
    # The worker, whoever starts it, reads its settings from the environment.
    os.environ |= {f"RQARM_{name.upper()}": str(given[name]) for name in SETTINGS if given[name] is not None}
    from rqarm.worker import logs

    logs.to_stderr(options.log_format, options.verbose)
    if options.workers is not None:
        return _supervise(ctx, target, options, options.workers)
    _work(target, options)
    return 0


def _supervise(ctx: click.Context, target: Target, options: Options, count: int) -> int:
    from rqarm.worker.supervisor import Supervisor

    if target.url is not None:
        os.environ["RQARM_URL"] = target.url  # not as an argument: it may hold a password
    if target.namespace is not None:
        os.environ["RQARM_NAMESPACE"] = target.namespace
    # -m puts the working directory in front of everything, which the entry point does not
    isolated = [] if os.getcwd() in sys.path or "" in sys.path else ["-P"]
    _serve_metrics(target, options)
    again = arguments(ctx, without=("workers", "name", "names", "metrics_port"))
    command = [sys.executable, *isolated, "-m", "rqarm.cli", "worker", *again]
    queues = [argument for name in options.names for argument in ("--queue", name)]
    ends = options.burst or options.max_jobs is not None
    patience = Settings.load().shutdown_timeout + PATIENCE
    return Supervisor([*command, *queues], count, options.name, ends=ends, patience=patience).run()


def arguments(ctx: click.Context, without: Collection[str] = ()) -> Iterator[str]:
    """The options that were given on the command line, once more; those that set the server aside."""
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if name in without or not parameter.expose_value or not isinstance(parameter, click.Option):
            continue
        if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[name]
        if parameter.is_flag:
            yield parameter.opts[-1] if value else parameter.secondary_opts[-1]
        elif parameter.count:
            yield from [parameter.opts[-1]] * value
        else:
            for each in value if parameter.multiple else [value]:
                yield from (parameter.opts[-1], str(each))


def _work(target: Target, options: Options) -> None:
    from rqarm.worker import Worker, load_handlers, use_handlers
    from rqarm.worker.allowed import worker_options
    from rqarm.worker.logs import rq_level
    from rqarm.worker.processes import die_with
    from rqarm.worker.supervisor import bury_predecessor, report_ready

    if options.supervisor is not None:
        die_with(options.supervisor)
    settings = target.settings()
    handlers = load_handlers(options.specs)
    if not list(handlers):
        raise ConfigError("no handlers: name them with --handlers module:name or RQARM_HANDLERS")
    use_handlers(handlers)
    allowed = worker_options(options.functions, options.any_rq_job)
    url = connect.default_url(settings)
    _check(url, settings)
    # The worker, the processes that it forks, and a handler's own RequestManager() read the environment.
    os.environ |= {"RQARM_URL": url, "RQARM_NAMESPACE": settings.namespace}
    logical = list(dict.fromkeys((*options.queues, *options.names))) or [settings.queue]
    listened = [rq_queue for queue in logical for rq_queue in queue_names(queue)]
    with connect.open_client(url, for_waiting=True) as client:
        bury_predecessor(client, options.name, options.successor_of)
        try:
            running = Worker(listened, name=options.name, connection=client, **allowed)
            log.info("%s listens on %s at %s", running.name, ", ".join(listened), connect.redact_url(url))
            log.info("%d handlers: %s", len(handlers.routes), ", ".join(route.name for route in handlers.routes))
            _serve_metrics(target, options)
            report_ready(options.ready)
            running.work(
                burst=options.burst,
                max_jobs=options.max_jobs,
                with_scheduler=options.scheduler,
                logging_level=rq_level(options.verbose),
            )
        except ValueError as error:
            # RQ has no class of its own for a name that is taken
            if "active worker" not in str(error):
                raise
            raise ConfigError(f"--name: {error}") from error


def _serve_metrics(target: Target, options: Options) -> None:
    """In the process that the caller has started: the supervisor, or the only worker."""
    if options.metrics_port is None:
        return
    from rqarm.worker import scrape

    # they show what is there, whether or not it would survive a restart
    manager = RequestManager(target.url, namespace=target.namespace, allow_volatile=True)
    scrape.serve(options.metrics_port, manager.overview)


def _check(url: str, settings: Settings) -> None:
    """Refuse a server that would lose requests before any is taken: the first call of a manager judges it."""
    with RequestManager(url, namespace=settings.namespace) as rm:
        rm.cache.stats()
    # Said once: the worker's own manager would say it again.
    os.environ["RQARM_ALLOW_VOLATILE"] = "1"
