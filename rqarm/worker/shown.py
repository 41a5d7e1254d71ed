"""What RQ's own tools see of a request that the warm horse runs.

RQ writes a dozen commands before and after each job. Most requests end before anybody could look, so these are spared:
only what runs for longer than a moment is shown, by RQ's own code, and hidden again when it has ended.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError, WatchError
from rq.exceptions import NoSuchJobError
from rq.executions import Execution as RqExecution
from rq.job import Job
from rq.queue import Queue
from rq.utils import now as rq_now

from rqarm.worker.board import Turn

if TYPE_CHECKING:
    from rqarm.worker.rqworker import Worker

log = logging.getLogger("rqarm.worker")

#: seconds that a request runs before RQ's tools hear of it
SHOW_AFTER = 0.25


class Shown:
    """One execution in RQ's registries. Without a job there was none to show."""

    def __init__(self, job: Job | None = None, execution: RqExecution | None = None) -> None:
        self._job, self._execution = job, execution

    @property
    def is_real(self) -> bool:
        return self._execution is not None

    @classmethod
    def when_long(cls, worker: Worker, turn: Turn, now: float) -> Shown | None:
        """Show the turn when it runs for long enough; None = not yet."""
        if now - turn.began < SHOW_AFTER:
            return None
        try:
            return cls._show(worker, turn)
        except RedisError as error:
            log.warning("%s: not shown in RQ: %s", turn.key, error)
            return None

    @classmethod
    def _show(cls, worker: Worker, turn: Turn) -> Shown:
        try:
            job, _ = fetch_job(worker, turn.job_id)
        except NoSuchJobError:
            return cls()
        with worker.connection.pipeline() as pipeline:
            # the horse deletes the job when the request ends: from here on that undoes what follows
            pipeline.watch(job.key)
            if not pipeline.exists(job.key):
                return cls()
            pipeline.multi()
            ttl = worker.get_heartbeat_ttl(job)
            execution = RqExecution.create(job, ttl, pipeline=pipeline, worker_name=worker.name)
            job.prepare_for_execution(worker.name, pipeline=pipeline)
            try:
                pipeline.execute()
            except WatchError:
                return cls()
        worker.executions[execution.id] = execution
        return cls(job, execution)

    def refresh(self, worker: Worker) -> None:
        """The execution is alive."""
        if self._job is not None and self._execution is not None:
            worker.maintain_heartbeats(self._job, self._execution)

    def hide(self, worker: Worker) -> None:
        """The execution has ended. What the job's end leaves in RQ is written by who ends it."""
        if self._job is None or self._execution is None:
            return
        try:
            with worker.connection.pipeline() as pipeline:
                worker.cleanup_execution(self._job, pipeline, self._execution)
                pipeline.execute()
        except RedisError as error:
            log.warning("%s: still shown as running in RQ, which finds out: %s", self._job.id, error)
        self._job = self._execution = None

    @staticmethod
    def mourn(worker: Worker, turn: Turn, shown: Shown | None, death: str, end: tuple[int, int, Any], why: str) -> None:
        """RQ's own machinery notes that the job's process died: registry, result, handler of dead horses."""
        try:
            job, queue = fetch_job(worker, turn.job_id)
            execution = shown._execution if shown is not None else None
            job.ended_at = rq_now()
            if death == "stopped":
                worker._stopped_job_id = job.id
                worker._handle_stopped_job(job, queue, execution)  # type: ignore[arg-type]
                return
            worker.handle_work_horse_killed(job, *end)  # type: ignore[no-untyped-call]
            worker.handle_job_failure(job, queue=queue, exc_string=f"Work-horse terminated: {why}", execution=execution)
        except NoSuchJobError:
            log.debug("%s: its RQ job %s is gone", turn.key, turn.job_id)
        except Exception:
            # a handler of the operator's own, or a server that refuses: the request has been accounted for
            log.exception("%s: RQ was not told of the death", turn.key)


def fetch_job(worker: Worker, job_id: str) -> tuple[Job, Queue]:
    """RQ's job and its queue, as RQ's own path would have them. Raises NoSuchJobError."""
    job = worker.job_class.fetch(job_id, connection=worker.connection, serializer=worker.serializer)
    queue = worker.queue_class(
        job.origin, connection=worker.connection, job_class=worker.job_class, serializer=worker.serializer
    )
    return job, queue
