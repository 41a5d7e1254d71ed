"""rqarm.Worker: an RQ worker that keeps our leases.

The parent starts the attempt, so that it always knows what its horse runs; it renews the lease while the horse works,
kills the horse when the lease is lost or the time is over, says at once when a horse has died, and sweeps. RQ does the
rest. It never exits because the server is busy, read-only or out of memory: it waits and goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import random
import secrets
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import rq
from redis.exceptions import RedisError
from rq.executions import Execution as RqExecution
from rq.job import Job
from rq.serializers import JSONSerializer, PickleSerializer
from rq.worker import WorkerStatus

from rqarm import codec, flows
from rqarm.calls import Attempt
from rqarm.config import Settings
from rqarm.errors import LeaseLost, NoHandler, RequestUnknown, RqarmError
from rqarm.manager import RequestManager
from rqarm.model import Key, State
from rqarm.rqjobs import GRACE, PERFORM
from rqarm.worker import execution

log = logging.getLogger("rqarm.worker")
T = TypeVar("T")

#: seconds beyond the handler's limit after which the parent kills a horse that does not listen to it
HARD_GRACE = 5.0
#: longest wait in seconds before a server that refused is asked again
PATIENCE = 5.0
#: seconds until the listener for RQ's commands tries again
DEAF = 1.0
#: states in which an attempt's own end leaves its request
ENDED = (State.COMPLETED, State.FAILED, State.PENDING)
_PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class _Run:
    """The attempt that the horse runs.

    ``death``: why the parent killed it; "" = it did not. ``is_ending``: the attempt has ended, the horse lives on.
    """

    job_id: str
    manager: RequestManager
    attempt: Attempt
    limit: float
    began: float
    renewed: float
    death: str = ""
    is_ending: bool = False


class Worker(rq.Worker):
    """Use it like ``rq.Worker``. Jobs that are not ours run as RQ runs them.

    ``lease`` and the other settings come from RQARM_*. Without a serializer it is RQ's JSON; with RQ's pickle, which
    `rq worker` passes unless it is told ``-S json``, our jobs are read as the JSON they are and only others unpickled.
    """

    def __init__(self, queues: Any, *args: Any, serializer: Any = None, **kwargs: Any) -> None:
        self.settings = Settings.load()
        renewal = max(1, int(self.settings.lease / 3))
        # `rq worker` always passes RQ's own 30 s, in which a lease would lapse
        kwargs["job_monitoring_interval"] = min(kwargs.get("job_monitoring_interval", renewal), renewal)
        kwargs["serializer"] = OursAsJson if serializer is PickleSerializer else serializer or JSONSerializer
        super().__init__(queues, *args, **kwargs)
        self._run: _Run | None = None
        self._swept = 0.0

    # -- RQ's rhythm

    def bootstrap(self, *args: Any, **kwargs: Any) -> None:
        """Raises ConfigError: who cannot load the handlers must not take requests from those who can."""
        execution.handlers()
        super().bootstrap(*args, **kwargs)

    def subscribe(self) -> None:
        """RQ's listening thread must not take the signals that the main thread waits for.

        The kernel prefers the main thread, but not after SIGCONT: then any thread may get the pending alarm, the main
        thread sleeps on beside its horse, and nobody sees that the lease is lost.
        """
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGTERM, signal.SIGINT})
        try:
            super().subscribe()  # type: ignore[no-untyped-call]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    @property
    def dequeue_timeout(self) -> int:
        """An idle worker looks up this often, in seconds: to sweep."""
        return max(1, int(self.settings.lease / 3))

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        try:
            super().heartbeat(timeout, pipeline=pipeline)
        except RedisError as error:
            # RQ's loop would exit. Where it asks next, it asks patiently
            log.warning("no heartbeat: %s", error)
        if not self.is_horse:
            self._sweep_when_due()

    def dequeue_job_and_maintain_ttl(self, timeout: int | None, max_idle_time: int | None = None) -> Any:
        return self._patiently(lambda: super(Worker, self).dequeue_job_and_maintain_ttl(timeout, max_idle_time))

    def run_maintenance_tasks(self) -> None:
        self._patiently(super().run_maintenance_tasks)

    def check_for_suspension(self, burst: bool) -> None:
        self._patiently(lambda: super(Worker, self).check_for_suspension(burst))

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Ask until the server answers. RQ's own loop would exit on READONLY, OOM, BUSY, LOADING and the like."""
        refusals = 0
        while True:
            try:
                return ask()
            except RedisError as error:
                refusals += 1
                pause = min(PATIENCE, 0.1 * 2**refusals) * random.uniform(0.5, 1.0)
                log.warning("the server refused, asking again in %.1f s: %s", pause, error)
                time.sleep(pause)

    def _sweep_when_due(self) -> None:
        now = time.monotonic()
        if now < self._swept:
            return
        self._swept = now + self.settings.lease / 3 * random.uniform(0.8, 1.2)
        try:
            manager = execution.manager_for(self.settings.namespace, self.connection)
            if healed := manager.shell.run(flows.sweep(manager.core)):
                log.warning("set %d requests going again that had died", healed)
        except (RedisError, RqarmError) as error:
            log.warning("the sweep did not run: %s", error)

    # -- one job

    def execute_job(self, job: Job, queue: rq.Queue) -> None:
        # A SIGTERM lets a busy worker finish. RQ notes that later, when the attempt has been started.
        self._state = WorkerStatus.BUSY
        try:
            self._run = self._start(job)
            super().execute_job(job, queue)
        except RedisError as error:
            # RQ popped the job and could not note it, so no horse runs
            log.warning("%s: the server refused in the middle of a job: %s", job.id, error)
            self.executions.clear()
            self._patiently(self._hand_back)
            self._patiently(lambda: self.set_state(WorkerStatus.IDLE))
        except SystemExit:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # somebody impatient must not interrupt what comes now
            with contextlib.suppress(RedisError):
                self._hand_back()
            raise
        finally:
            execution.handed_over.pop(job.id, None)
            self._run = None

    def _start(self, job: Job) -> _Run | None:
        """Start the attempt here, before the fork: the parent must know the token of what it watches over."""
        try:
            if job.func_name != PERFORM:
                return None
            namespace, key = job.args
            manager = execution.manager_for(namespace, self.connection)
            began = time.monotonic()
            # one id for all tries: a start whose reply was lost is then not a second one
            start = partial(flows.start, manager.core, Key(key), job.id, self.name, secrets.token_hex(8))
            attempt = self._patiently(lambda: manager.shell.run(start()))
        except Exception as error:  # noqa: BLE001 -- one bad job must not end the worker
            # It cannot be read, or the record is not ours. The horse meets the same, and RQ notes that it failed.
            log.warning("%s: not started here: %s: %s", job.id, type(error).__name__, error)
            return None
        execution.handed_over[job.id] = attempt
        if isinstance(attempt, State):
            return None
        limit = self._limit_of(attempt, manager)
        # RQ's own limit was written by a client, which knows no routes
        job.timeout = max(int(job.timeout or 0), int(limit) + GRACE)
        return _Run(job.id, manager, attempt, limit, began, began)

    def _limit_of(self, attempt: Attempt, manager: RequestManager) -> float:
        default = manager.settings.timeout
        try:
            return execution.handlers().match(attempt.request).route.timeout or default
        except (NoHandler, RqarmError):
            return default  # the horse will say what is wrong with it

    def fork_work_horse(self, job: Job, queue: rq.Queue) -> None:
        self._obituary = "the process ended without a result (exit code 0)"
        super().fork_work_horse(job, queue)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(self.horse_pid, self.horse_pid)  # the horse does so too; whoever comes first

    def monitor_work_horse(self, job: Job, queue: rq.Queue, rq_execution: RqExecution) -> None:
        run, group = self._run, self.horse_pid
        try:
            super().monitor_work_horse(job, queue, rq_execution)
        except RedisError as error:
            log.warning("%s: the server refused after the horse's end: %s", job.id, error)
        finally:
            _kill_group(group, signal.SIGKILL)  # what the handler left running
        if run is not None:
            self._account_for(run)

    def maintain_heartbeats(self, job: Job, rq_execution: RqExecution) -> None:
        try:
            super().maintain_heartbeats(job, rq_execution)
        except RedisError as error:
            log.warning("%s: no heartbeat: %s", job.id, error)
        if self._run is not None and self._run.job_id == job.id:
            self._watch_over(self._run)

    def _watch_over(self, run: _Run) -> None:
        """Renew the lease; stop the horse when it is lost, or when nobody can say whose it is."""
        sent = time.monotonic()
        try:
            run.manager.shell.run(flows.renew(run.manager.core, run.attempt))
            run.renewed = sent
        except LeaseLost as lost:
            if lost.state in ENDED and not run.is_ending:
                # most likely by the horse itself, which is now telling RQ: a kill would be noted there as a failure
                run.is_ending, run.renewed = True, sent
                return
            run.death = str(lost.state)
            log.warning("%s: %s", run.attempt.key, lost)
        except RedisError as error:
            log.warning("%s: the lease was not renewed: %s", run.attempt.key, error)
        now = time.monotonic()
        if now - run.renewed > run.manager.settings.lease * 2 / 3:
            run.death = "lease"
        elif now - run.began > run.limit + HARD_GRACE:
            run.death = "time limit"
        if run.death:
            self.kill_horse()

    def _account_for(self, run: _Run) -> None:
        """The horse is gone. If its attempt is still open, nobody else can say so."""
        try:
            word = self._patiently(lambda: run.manager.shell.run(self._last_words(run)))
        except (LeaseLost, RequestUnknown):
            return
        if word in ("requeued", "quarantined"):
            log.warning("%s: %s, %s", run.attempt.key, self._obituary, word)

    def _last_words(self, run: _Run) -> flows.Flow[object]:
        core, attempt = run.manager.core, run.attempt
        if run.death == "time limit":
            message = f"the handler did not stop at its limit of {run.limit:g} s and was killed"
            return flows.fail(core, attempt, codec.pack_error(execution.TimeLimit, message, ""))
        if run.death == "stopped":
            return flows.cancel(core, attempt.key)
        return flows.crash(core, attempt, codec.pack_error("WorkHorseDied", self._obituary, ""))

    _obituary = "the process ended without a result"

    def handle_work_horse_killed(self, job: Job, retpid: Any, ret_val: Any, rusage: Any) -> None:
        peak_mib = rusage.ru_maxrss // 1024 if rusage is not None else 0
        if ret_val is not None and os.WIFSIGNALED(ret_val):
            name = signal.Signals(os.WTERMSIG(ret_val)).name
            self._obituary = f"the process was killed by {name}, at most {peak_mib} MiB used"
        elif ret_val is not None:
            self._obituary = f"the process exited with code {os.waitstatus_to_exitcode(ret_val)}"
        super().handle_work_horse_killed(job, retpid, ret_val, rusage)  # type: ignore[no-untyped-call]

    def _pubsub_exception_handler(self, exc: Exception, pubsub: Any, pubsub_thread: Any) -> None:
        """RQ's listener ends at a BUSY or a LOADING, and no command reaches the worker ever after."""
        if not isinstance(exc, RedisError):
            raise exc
        log.warning("commands are not heard, listening again: %s", exc)
        time.sleep(DEAF)

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Kill the horse with its group. RQ's way kills the worker when there is no horse, or it has no group yet."""
        run = self._run
        if run is not None and self._stopped_job_id == run.job_id:
            run.death = "stopped"  # RQ's stop-job and stop-execution: for our requests a cancellation
        if self.horse_pid:
            self.log.info("Worker %s: killing horse pid %s", self.name, self.horse_pid)
            _kill_group(self.horse_pid, sig)

    def _hand_back(self) -> None:
        """The horse does not run, or a cold shutdown has killed it: the request goes back unharmed, next in line."""
        run = self._run
        if run is not None:
            with contextlib.suppress(LeaseLost):
                run.manager.shell.run(flows.release(run.manager.core, run.attempt))

    def handle_warm_shutdown_request(self) -> None:
        """Say it where our own lines go: somebody pressed Ctrl-C and waits."""
        if self.get_state() == WorkerStatus.BUSY:
            log.warning("stopping when the request in hand has ended; stop again to hand it back at once")
        super().handle_warm_shutdown_request()  # type: ignore[no-untyped-call]

    # -- the horse

    def perform_job(self, job: Job, queue: rq.Queue, rq_execution: RqExecution) -> bool:
        try:
            return bool(super().perform_job(job, queue, rq_execution))
        finally:
            execution.close_resources()

    def setup_work_horse_signals(self) -> None:
        super().setup_work_horse_signals()  # type: ignore[no-untyped-call]
        _die_with(self.pid)


class OursAsJson:
    """RQ's pickle serializer, except that what is JSON, as our jobs are, is read as JSON and never unpickled."""

    dumps = staticmethod(PickleSerializer.dumps)

    @staticmethod
    def loads(data: bytes) -> Any:
        # a pickle of RQ starts with the byte 0x80
        return JSONSerializer.loads(data) if data[:1] == b"[" else PickleSerializer.loads(data)


def _kill_group(group: int, sig: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, sig)


def _die_with(parent: int | None) -> None:
    """A horse whose parent was killed must not go on: nobody renews its lease. Linux only; elsewhere it is fenced."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
