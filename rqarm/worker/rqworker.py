"""rqarm.Worker: an RQ worker with a warm horse for our requests.

The parent never runs a request. It forks the horse, renews the leases of what the horse runs, stops what must stop,
says at once when a horse has died, forks the next one, and sweeps. Ordinary RQ jobs take RQ's own way, a fork for each.
It never exits because the server is busy, read-only or out of memory: it waits and goes on.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import random
import re
import signal
import time
from collections.abc import Callable
from typing import Any, TypeVar

import rq
from redis.exceptions import RedisError
from rq.command import parse_payload
from rq.exceptions import StopRequested
from rq.job import Job
from rq.serializers import JSONSerializer, PickleSerializer
from rq.worker import DequeueStrategy, WorkerStatus

from rqarm import connect, flows
from rqarm.config import Settings
from rqarm.errors import RqarmError
from rqarm.manager import RequestManager
from rqarm.version import __version__
from rqarm.worker import equipment, execution
from rqarm.worker.horse import Order
from rqarm.worker.patience import pause_after
from rqarm.worker.processes import kill_group, leash_forks
from rqarm.worker.stable import Stable

log = logging.getLogger("rqarm.worker")
T = TypeVar("T")

#: seconds until the listener for RQ's commands tries again
DEAF = 1.0
#: what the id of a ticket of ours looks like; one of others that looks like it is recognised later
OURS = re.compile(rb"[\w-]+-[0-9a-f]{8}")


class Worker(rq.Worker):
    """Use it like ``rq.Worker``. Jobs that are not ours run as RQ runs them.

    ``lease`` and the other settings come from RQARM_*. Without a serializer it is RQ's JSON; with RQ's pickle, which
    `rq worker` passes unless it is told ``-S json``, our jobs are read as the JSON they are and only others unpickled.
    """

    def __init__(self, queues: Any, *args: Any, serializer: Any = None, **kwargs: Any) -> None:
        self.settings = Settings.load()
        kwargs["serializer"] = OursAsJson if serializer is PickleSerializer else serializer or JSONSerializer
        super().__init__(queues, *args, **kwargs)
        self._stable = Stable(self)
        self._swept = 0.0
        #: the server's clock minus ours, which never steps; None = not known yet
        self._offset: float | None = None
        self.next_heartbeat = 0.0
        self.shown_state = ""
        #: this process is the warm horse, which tears down its resources when it ends
        self.is_warm = False
        self._most_jobs: int | None = None
        self._rq_jobs = 0
        self._is_forked = self._is_over = False
        self._lists_of: list[rq.Queue] | None = None
        self._lists: tuple[str, ...] = ()

    # -- RQ's rhythm

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """As in RQ. ``max_jobs`` counts requests and jobs."""
        self._most_jobs = inspect.signature(super().work).bind(*args, **kwargs).arguments.get("max_jobs")
        before = self._stable.ended
        self._rq_jobs = -before
        worked = super().work(*args, **kwargs)
        return worked or self._stable.ended > before

    def bootstrap(self, *args: Any, **kwargs: Any) -> None:
        """Raises ConfigError: who cannot load the handlers must not take requests from those who can."""
        equipment.handlers()
        leash_forks()
        super().bootstrap(*args, **kwargs)

    def register_birth(self) -> None:
        """As in RQ, and which rqarm it is: the overview tells an upgrade that is not finished."""
        super().register_birth()  # type: ignore[no-untyped-call]
        self.connection.hset(self.key, "rqarm_version", __version__)

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
        """An idle worker gives a sign of life this often, in seconds, and sweeps."""
        return max(1, int(self.settings.lease / 3))

    @property
    def connection_timeout(self) -> int:
        """Seconds after which a command counts as lost. RQ's are longer than its pop waits, and ours does not wait."""
        return int(connect.READ_TIMEOUT_S)

    def set_state(self, state: str, pipeline: Any = None) -> None:
        if self.is_horse:
            return  # it would say busy when it tells RQ of a failure, and nobody would say idle: the parent knows
        super().set_state(state, pipeline)
        self.shown_state = state

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        self.next_heartbeat = time.monotonic() + self.dequeue_timeout
        try:
            super().heartbeat(timeout, pipeline=pipeline)
        except RedisError as error:
            # RQ's loop would exit. Where it asks next, it asks patiently
            log.warning("no heartbeat: %s", error)
        if not self.is_horse:
            self._sweep_when_due()

    def run_maintenance_tasks(self) -> None:
        self.patiently(super().run_maintenance_tasks)

    def check_for_suspension(self, burst: bool) -> None:
        self.patiently(lambda: super(Worker, self).check_for_suspension(burst))

    def patiently(self, ask: Callable[[], T]) -> T:
        """Ask until the server answers. RQ's own loop would exit on READONLY, OOM, BUSY, LOADING and the like."""
        refusals = 0
        while True:
            try:
                return ask()
            except RedisError as error:
                refusals += 1
                pause = pause_after(refusals)
                log.warning("the server refused, asking again in %.1f s: %s", pause, error)
                time.sleep(pause)

    def _sweep_when_due(self) -> None:
        now = time.monotonic()
        if now < self._swept:
            return
        self._swept = now + self.settings.lease / 3 * random.uniform(0.8, 1.2)
        try:
            manager = equipment.manager_for(self.settings.namespace, self.connection)
            if healed := manager.shell.run(flows.sweep(manager.core)):
                log.warning("set %d requests going again that had died", healed)
            execution.attend(manager)
            self._watch_clock(manager)
            self._restart_scheduler()
        except (RedisError, RqarmError) as error:
            log.warning("the sweep did not run: %s", error)

    def _watch_clock(self, manager: RequestManager) -> None:
        """Tell when the server's clock has stepped by more than a lease: then leases and delays have ended early, or
        end late. Nothing is decided by this.
        """
        asked = time.monotonic()
        told = manager.shell.execute(manager.core.calls.server_time())
        if time.monotonic() - asked > self.settings.lease / 3:
            return  # nobody knows when the server looked
        before, self._offset = self._offset, told - asked
        if before is not None and abs(self._offset - before) > self.settings.lease:
            log.warning("the server's clock has stepped by %+.0f s", self._offset - before)
            manager.shell.execute(manager.core.calls.note_clock_step())

    def _restart_scheduler(self) -> None:
        """RQ looks every ten minutes whether anybody runs the scheduler, and delayed retries wait for it."""
        scheduler = self.scheduler
        if scheduler is None or self._stop_requested:
            return
        if not (scheduler._process and scheduler._process.is_alive()):
            scheduler.acquire_locks(auto_start=True)

    # -- what to run next

    def dequeue_job_and_maintain_ttl(self, timeout: int | None, max_idle_time: int | None = None) -> Any:
        """The next job for RQ's own way. Our requests run inside: they never get there."""
        is_burst, is_over = timeout is None, False
        while True:
            self._check_quota()
            who = self.patiently(self._who_is_next)
            if who == "ours" or (who == "nobody" and not is_burst):
                reason = self._serve(is_burst, max_idle_time)
                is_over = reason == "bored" or (reason == "empty" and is_burst)
                if not is_over and reason != "foreign":
                    continue
            popped = self.patiently(lambda: super(Worker, self).dequeue_job_and_maintain_ttl(None, None))
            if popped is not None:
                self._rq_jobs += 1
            if popped is not None or is_burst or is_over:
                return popped

    def _check_quota(self) -> None:
        """RQ's own loop counts only its jobs. Raises StopRequested when there were enough of both."""
        if self._most_jobs is not None and self._rq_jobs + self._stable.ended >= self._most_jobs:
            self.log.info("Worker %s: finished executing %d jobs, quitting", self.name, self._most_jobs)
            raise StopRequested

    def _who_is_next(self) -> str:
        """``ours``, ``foreign`` or ``nobody``, by the look of the first ticket."""
        with self.connection.pipeline(transaction=False) as pipeline:
            for queue in self._ordered_queues:
                pipeline.lindex(queue.key, 0)
            first = next((job_id for job_id in pipeline.execute() if job_id is not None), None)
        if first is None:
            return "nobody"
        return "ours" if OURS.fullmatch(first) else "foreign"

    def _serve(self, is_burst: bool, max_idle_time: int | None) -> str:
        """Let the horse run requests until something else is to be done: why it came back.

        Raises StopRequested when the worker is to end.
        """
        quota = 0
        if self._most_jobs is not None:
            quota = self._most_jobs - self._rq_jobs - self._stable.ended
        names = tuple(queue.name for queue in self._ordered_queues)
        reason = self._stable.serve(Order(names, quota, is_burst), max_idle_time)
        if self._stop_requested or self._stable.is_leaving:
            raise StopRequested
        if reason == "suspended":
            self.check_for_suspension(is_burst)
        return reason

    # -- RQ's own way, on a server that refuses

    def execute_job(self, job: Job, queue: rq.Queue) -> None:
        self._is_forked = False
        try:
            super().execute_job(job, queue)
        except RedisError as error:
            log.warning("%s: the server refused in the middle of a job: %s", job.id, error)
            self.executions.clear()
            if not self._is_forked:
                # RQ popped it and could not note it: it is in no list any more
                self.patiently(lambda: queue.push_job_id(job.id, at_front=True))
            self.patiently(lambda: self.set_state(WorkerStatus.IDLE))

    def handle_job_failure(
        self,
        job: Job,
        queue: rq.Queue,
        started_job_registry: Any = None,
        exc_string: str = "",
        execution: Any = None,
    ) -> None:
        """RQ stores the traceback as UTF-8, which lone surrogates in a message are not."""
        exc_string = exc_string.encode(errors="backslashreplace").decode()
        super().handle_job_failure(job, queue, started_job_registry, exc_string, execution)

    def maintain_heartbeats(self, job: Job, rq_execution: Any) -> None:
        try:
            super().maintain_heartbeats(job, rq_execution)
        except RedisError as error:
            log.warning("%s: no heartbeat: %s", job.id, error)

    # -- the order of the queues, which RQ changes by its strategy

    @property
    def ordered_queues(self) -> list[rq.Queue]:
        return self._ordered_queues

    @property
    def ordered_lists(self) -> tuple[str, ...]:
        """RQ's names of the lists of these queues."""
        if self._lists_of is not self._ordered_queues:
            self._lists_of, self._lists = self._ordered_queues, tuple(queue.key for queue in self._ordered_queues)
        return self._lists

    def order_queues(self, names: tuple[str, ...]) -> None:
        """As another process of this worker has left them."""
        by_name = {queue.name: queue for queue in self._ordered_queues}
        self._ordered_queues = [by_name[name] for name in names]

    def reorder_after(self, list_name: str) -> None:
        """Something was taken from this list of RQ."""
        if self._dequeue_strategy == DequeueStrategy.DEFAULT and type(self).reorder_queues is rq.Worker.reorder_queues:
            return
        self.reorder_queues(next(queue for queue in self._ordered_queues if queue.key == list_name))
        self._lists_of = None  # RQ shuffles in place

    # -- what RQ asks of a horse

    @property
    def horse_pid(self) -> int:
        """The process that runs something now, RQ's or ours; 0 while idle."""
        return self._horse_pid or self._stable.busy_pid

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Kill the horse with its group. RQ's way kills the worker when there is no horse, or it has no group yet."""
        if pid := self.horse_pid:
            self.log.info("Worker %s: killing horse pid %s", self.name, pid)
            kill_group(pid, sig)

    def wait_for_horse(self) -> Any:
        """RQ waits for its own horse here; ours is buried by the stable."""
        return super().wait_for_horse() if self._horse_pid else (None, None, None)

    def fork_work_horse(self, job: Job, queue: rq.Queue) -> None:
        super().fork_work_horse(job, queue)
        self._is_forked = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(self._horse_pid, self._horse_pid)  # the horse does so too; whoever comes first

    def perform_job(self, job: Job, queue: rq.Queue, rq_execution: Any) -> bool:
        try:
            return bool(super().perform_job(job, queue, rq_execution))
        finally:
            if not self.is_warm:
                equipment.close_resources()

    # -- what people ask of a worker

    def handle_payload(self, message: Any) -> None:
        """RQ's commands. Stopping the job of a request cancels the request."""
        payload = parse_payload(message)
        if payload.get("command") == "stop-job" and self._stable.stop_job(str(payload.get("job_id"))):
            return
        super().handle_payload(message)  # type: ignore[no-untyped-call]

    def request_stop_execution(self, execution_id: str) -> None:
        known = self.executions.get(execution_id)
        if known is None or not self._stable.stop_job(known.job_id):
            super().request_stop_execution(execution_id)

    def request_stop(self, signum: Any, frame: Any) -> None:
        self._stable.halt()
        try:
            super().request_stop(signum, frame)  # type: ignore[no-untyped-call]
        finally:
            self._stable.wake()

    def _shutdown(self) -> None:
        """A worker whose horse runs nothing ends at once; whether it does, only the horse knows for sure."""
        if self._stable.is_serving and not self._stable.busy_pid:
            self._stable.is_leaving = True
        else:
            super()._shutdown()  # type: ignore[no-untyped-call]

    def handle_warm_shutdown_request(self) -> None:
        """Say it where our own lines go: somebody pressed Ctrl-C and waits."""
        if self.horse_pid:
            log.warning("stopping when the request in hand has ended; stop again to hand it back at once")
        super().handle_warm_shutdown_request()  # type: ignore[no-untyped-call]

    def stop_scheduler(self) -> None:
        """While requests run, the scheduler is not waited for: RQ does so in the handler of a signal, for a second or
        more, and meanwhile nobody renews.
        """
        process = self.scheduler._process if self.scheduler is not None else None
        if process is None or process.pid is None:
            return
        with contextlib.suppress(OSError):
            os.kill(process.pid, signal.SIGTERM)
        if self._is_over:
            process.join()

    def teardown(self) -> None:
        self._is_over = True
        if not self.is_horse:
            self._stable.close()
        super().teardown()  # type: ignore[no-untyped-call]

    def _pubsub_exception_handler(self, exc: Exception, pubsub: Any, pubsub_thread: Any) -> None:
        """RQ's listener ends at a BUSY or a LOADING, and no command reaches the worker ever after."""
        if not isinstance(exc, RedisError):
            raise exc
        log.warning("commands are not heard, listening again: %s", exc)
        time.sleep(DEAF)


class OursAsJson:
    """RQ's pickle serializer, except that what is JSON, as our jobs are, is read as JSON and never unpickled."""

    dumps = staticmethod(PickleSerializer.dumps)

    @staticmethod
    def loads(data: bytes) -> Any:
        # a pickle of RQ starts with the byte 0x80
        return JSONSerializer.loads(data) if data[:1] == b"[" else PickleSerializer.loads(data)
