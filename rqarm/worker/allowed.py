"""Which functions of RQ's envelopes a worker runs.

An RQ job names what to import: its function, up to three callbacks. It may hold a pickle, and URLs for the worker to
call. Whoever can write to the queue could so run anything as the worker's user. ``AllowedJob`` runs what is on a list
and reads JSON only. A refused job is failed with the reason by RQ's own machinery; nothing of it is imported,
unpickled or called.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from rq.exceptions import DeserializationError, NoSuchJobError
from rq.job import Job
from rq.serializers import JSONSerializer, PickleSerializer
from rq.utils import import_attribute

from rqarm.errors import ConfigError, RqarmError
from rqarm.rqjobs import PERFORM

VARIABLE = "RQARM_ALLOW_FUNCTIONS"
#: a time in seconds, or a count, that no client means; Redis and Python refuse larger ones in the middle of RQ's work
LARGEST = 10**10
#: characters of a name that a message quotes: a client wrote it
LONGEST_NAME = 200


class FunctionNotAllowed(RqarmError, DeserializationError):
    """The worker must not run this RQ job: its operator allows the function, or its client stops sending it.

    A DeserializationError, so that RQ treats the job as one that it cannot read.
    """

    def __init__(self, job_id: str, reason: str) -> None:
        super().__init__(f"RQ job {job_id} was refused: {reason}")
        self.job_id, self.reason = job_id, reason


def worker_options(names: Iterable[str] = (), any_rq_job: bool = False) -> dict[str, Any]:
    """Arguments for ``rqarm.Worker``: it runs requests and the functions named here and in RQARM_ALLOW_FUNCTIONS.

    ``any_rq_job``: it runs whatever it is sent, pickles too, as RQ does. Raises ConfigError for a name that leads
    nowhere.
    """
    chosen = [name.strip() for name in (*names, *os.environ.get(VARIABLE, "").split(",")) if name.strip()]
    if any_rq_job:
        return {"serializer": PickleSerializer}  # rqarm.Worker reads our own jobs as JSON all the same
    for name in chosen:
        _check_function(name)
    return {"serializer": JSONSerializer, "job_class": job_class(chosen)}


def job_class(names: Iterable[str] = ()) -> type[AllowedJob]:
    """The class of jobs for which these names, and ours, are the list."""
    return type("AllowedJob", (AllowedJob,), {"allowed": frozenset({PERFORM, *names})})


def _check_function(name: str) -> None:
    """A list with a wrong name would refuse jobs one by one, later: say it now."""
    parts = name.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"--allow-function {name!r}: a function is package.module.name")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `rq worker` does
    try:
        found = import_attribute(name)
    except Exception as error:
        raise ConfigError(f"--allow-function {name!r}: cannot import it: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ConfigError(f"--allow-function {name!r}: that is no function, but {found!r}")


class AllowedJob(Job):
    """An RQ job of which nothing can be had unless all of it is allowed.

    Function, instance, arguments are read from one field in one method of RQ's; here it refuses. Callbacks are resolved
    in three properties; these refuse each on its own, because RQ reaches for them when the rest has been refused.
    """

    #: dotted names that may be imported and run
    allowed: frozenset[str] = frozenset({PERFORM})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._flaw = ""

    def restore(self, raw_data: Any) -> None:
        """A field that RQ cannot read would end the worker: such a job is a refused one."""
        try:
            super().restore(raw_data)
            self._check_fields()
        except NoSuchJobError:
            raise
        except Exception as error:  # noqa: BLE001 -- whatever a client may write into the hash
            self._start_over(raw_data)
            self._flaw = f"its hash cannot be read: {type(error).__name__}: {error}"[:LONGEST_NAME]
        if self.webhooks:
            # RQ calls them when the job has ended, also when it was refused
            self.webhooks = []
            self._flaw = "it has webhooks, URLs that the worker would call; --allow-any-rq-job lets it"

    def _check_fields(self) -> None:
        """RQ takes lists and numbers as they come, and stumbles over them where nobody expects it."""
        numbers: list[float | None] = [
            self.timeout,
            self.result_ttl,
            self.failure_ttl,
            self.ttl,
            self.retries_left,
            self.repeats_left,
        ]
        numbers += [self.number_of_retries, self.rate_limit_concurrency]
        for each in (self.retry_intervals, self.repeat_intervals):
            if each is not None and not (
                isinstance(each, list) and all(type(number) in (int, float) for number in each)
            ):
                raise ValueError("intervals that are no list of numbers")
            numbers += each or []
        if any(number is not None and not abs(number) <= LARGEST for number in numbers):
            raise ValueError(f"a number above {LARGEST}")
        if not (isinstance(self._dependency_ids, list) and all(isinstance(each, str) for each in self._dependency_ids)):
            raise ValueError("dependencies that are no list of ids")

    def _start_over(self, raw_data: dict[bytes, bytes]) -> None:
        job_id, connection, serializer = self._id, self.connection, self.serializer
        Job.__init__(self, job_id, connection, serializer)
        self.data = raw_data.get(b"data", b"")
        self.origin = raw_data.get(b"origin", b"").decode(errors="replace")

    @property
    def refusal(self) -> str:
        """Why this job must not run; "" = it may. Imports nothing."""
        try:
            self._deserialize_data()
        except FunctionNotAllowed as refused:
            return refused.reason
        return ""

    @property
    def should_retry(self) -> bool:
        # the next worker may have another list, but a client's million retries must not keep this one busy
        return bool(super().should_retry) and not self.refusal

    def _deserialize_data(self) -> None:
        if self._flaw:
            raise FunctionNotAllowed(self.id, self._flaw)
        try:
            super()._deserialize_data()  # type: ignore[no-untyped-call]
        except DeserializationError as error:
            reason = "its data are not the JSON of a call; pickles are read with --allow-any-rq-job only"
            raise FunctionNotAllowed(self.id, reason) from error.__cause__
        reason = self._objection()
        if reason:
            self.data = self._data  # forget what was read: who asks again is refused again
            raise FunctionNotAllowed(self.id, reason)

    def _objection(self) -> str:
        if self._instance is not None:
            return "it calls a method of an object, which only --allow-any-rq-job lets it"
        named = [
            ("function", self._func_name),
            ("success callback", self._success_callback_name),
            ("failure callback", self._failure_callback_name),
            ("stopped callback", self._stopped_callback_name),
        ]
        for what, name in named:
            if (what == "function" or name) and not self._allows(name):
                return _not_on_the_list(what, name)
        return ""

    def _allows(self, name: object) -> bool:
        return isinstance(name, str) and name in self.allowed

    def _insist(self, what: str, name: str | None) -> None:
        if name and not self._allows(name):
            raise FunctionNotAllowed(self.id, _not_on_the_list(what, name))

    @property
    def success_callback(self) -> Any:
        self._insist("success callback", self._success_callback_name)
        return super().success_callback

    @property
    def failure_callback(self) -> Any:
        self._insist("failure callback", self._failure_callback_name)
        return super().failure_callback

    @property
    def stopped_callback(self) -> Any:
        self._insist("stopped callback", self._stopped_callback_name)
        return super().stopped_callback


def _not_on_the_list(what: str, name: object) -> str:
    shown = repr(name)[:LONGEST_NAME]
    return f"its {what} {shown} is not one that this worker may run; rqarm worker --allow-function NAME adds it"
