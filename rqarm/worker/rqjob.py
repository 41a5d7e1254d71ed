"""What a job of ours runs under RQ's own workers: ``perform``. Under rqarm.Worker only a ticket that RQ popped does."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import redis
import rq
from rq.job import Job

from rqarm import flows, tracing
from rqarm.errors import ConfigError, LeaseLost, RqarmError
from rqarm.manager import RequestManager
from rqarm.model import Key, State
from rqarm.rqjobs import key_of
from rqarm.worker import equipment, execution
from rqarm.worker.execution import Drive, Execution, Hold

log = logging.getLogger("rqarm.worker")


def perform(namespace: str, key: str = "") -> None:
    """Run the request of the current RQ job. This is the function of our RQ jobs; it returns nothing to RQ.

    ``key``: given by jobs of an earlier form; else it stands in the job's id.

    Raises what the handler raised when the request has failed for good, so that RQ's failed registry shows it.
    """
    job = rq.get_current_job()
    if job is None:
        raise RqarmError("rqarm.worker.perform is run by an RQ worker; to run a request yourself, use rm.queues")
    key = key or key_of(job.id)
    manager = equipment.manager_for(namespace, job.connection)
    worker = _worker_name(job)
    with suppress(ConfigError):  # told by the execution, which asks again
        equipment.handlers()  # before the lease begins, for an import may take longer than one
    attempt = manager.shell.run(flows.start(manager.core, Key(key), job.id, worker))
    if isinstance(attempt, State):
        log.info("%s: superseded, the request is %s", key, attempt)
        return
    ours = Execution(manager.core, attempt, worker, Hold())
    try:
        with _renewing(manager, ours):
            Drive(ours, manager.shell).run(manager.shell.execute)
    finally:
        _sweep_now_and_then(manager)
        known = equipment.of_this_process().handlers
        if tracing.is_on() or (known is not None and known.resources.are_built):
            _close_with_the_process(job)


def _close_with_the_process(job: Job) -> None:
    """RQ's Worker forks a process for each job and ends it with os._exit; its SimpleWorker runs all in its own."""
    process = equipment.of_this_process()
    try:
        name = f"{rq.Worker.redis_worker_namespace_prefix}{job.worker_name}"
        pid = job.connection.hget(name, "pid")
    except redis.exceptions.RedisError as error:
        log.warning("resources are not torn down, the worker's record was not read: %s", error)
        return
    if pid is not None and int(pid) != os.getpid():
        equipment.close_resources()
    elif not process.closes_at_exit:
        process.closes_at_exit = True
        atexit.register(equipment.close_resources)


def _worker_name(job: Job) -> str:
    return str(job.worker_name or f"{socket.gethostname()}.{os.getpid()}")


def _sweep_now_and_then(manager: RequestManager) -> None:
    """A plain RQ worker has no maintenance of ours: whoever has just run a job looks for the dead, if nobody has."""
    try:
        manager.shell.run(flows.sweep_if_due(manager.core))
        execution.attend(manager)
    except (redis.exceptions.RedisError, RqarmError) as error:
        log.warning("the sweep did not run: %s", error)


@contextmanager
def _renewing(manager: RequestManager, ours: Execution) -> Iterator[None]:
    """Keep the lease from a thread: there is no parent that does."""
    done = threading.Event()
    thread = threading.Thread(target=_renew, args=(manager, ours, done), name="rqarm-renew", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _renew(manager: RequestManager, ours: Execution, done: threading.Event) -> None:
    settings = manager.core.settings
    good = time.monotonic()
    while not done.wait(settings.renewal_or_default):
        sent = time.monotonic()
        try:
            manager.shell.run(flows.renew(manager.core, ours.attempt))
            good = sent
        except LeaseLost:
            ours.hold.lose()
            return
        except redis.exceptions.RedisError as error:
            log.warning("%s: the lease was not renewed: %s", ours.attempt.key, error)
            if time.monotonic() - good > settings.lease * 2 / 3:
                ours.hold.lose()
