"""One execution: what an RQ job of ours runs, under any RQ worker.

``perform`` starts the attempt (or takes over the one that rqarm.Worker started), calls the handler and ends the attempt
in exactly one way: finished, retried, failed, or given up because it is no longer ours. The record is the truth; RQ
hears of a failure only so that its own tools show it.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import redis
import rq
from rq.job import Job
from rq.timeouts import JobTimeoutException

from rqarm import codec, flows
from rqarm.calls import Attempt
from rqarm.codec import Result
from rqarm.context import Context, RetryLater
from rqarm.errors import ConfigError, InvalidRequest, LeaseLost, NoHandler, ResultTooLarge, RqarmError, UnpackableResult
from rqarm.flows import Core
from rqarm.handlers import Handlers, Match, Route
from rqarm.manager import RequestManager
from rqarm.model import Key, State
from rqarm.worker.loading import load_handlers

log = logging.getLogger("rqarm.worker")
T = TypeVar("T")

#: errors that the same arguments bring again: retrying them burns workers
HOPELESS = (ConfigError, InvalidRequest, NoHandler, UnpackableResult, ResultTooLarge)
#: seconds by which the alarm comes after the limit of an async handler, which its event loop keeps better
ALARM_DELAY = 1.0
#: longest wait in seconds before a server that refused the end of an attempt is told again
PATIENCE = 1.0


class TimeLimit(Exception):
    """The handler ran longer than its time limit."""


@dataclass(slots=True)
class _Process:
    """What lives as long as the process: the handlers, a manager for each connection, an event loop."""

    pid: int
    handlers: Handlers | None
    managers: dict[tuple[str, int], RequestManager]
    runner: asyncio.Runner | None = None
    has_async_resources: bool = False


_process = _Process(os.getpid(), None, {})

#: what rqarm.Worker started for the job that the horse is about to run; inherited by the fork
handed_over: dict[str, Attempt | State] = {}


def use_handlers(handlers: Handlers) -> None:
    """The handlers of this process and of the horses that it forks, instead of those of RQARM_HANDLERS."""
    this_process().handlers = handlers


def this_process() -> _Process:
    global _process
    if _process.pid != os.getpid():
        # a fork: handlers and managers are inherited (clients open connections of their own), event loops are not
        _process = _Process(os.getpid(), _process.handlers, _process.managers)
    return _process


def handlers() -> Handlers:
    """The handlers of this process, loaded at the first call. Raises ConfigError."""
    process = this_process()
    if process.handlers is None:
        process.handlers = load_handlers()
    return process.handlers


def close_resources() -> None:
    """Tear down what handlers built in this process: its last job is done. What fails is logged."""
    process = this_process()
    if process.handlers is None:
        return
    try:
        if process.runner is not None and process.has_async_resources:
            process.runner.run(process.handlers.resources.aclose())
        else:
            process.handlers.resources.close()
    except Exception:
        log.exception("a resource was not torn down")
    process.has_async_resources = False


def manager_for(namespace: str, connection: redis.Redis) -> RequestManager:
    """The manager of a namespace on RQ's own connection."""
    managers = this_process().managers
    manager = managers.get((namespace, id(connection)))
    if manager is None:
        manager = managers[namespace, id(connection)] = RequestManager(connection=connection, namespace=namespace)
    return manager


def perform(namespace: str, key: str) -> None:
    """Run the request behind ``key``. This is the function of our RQ jobs; it returns nothing to RQ.

    Raises what the handler raised when the request has failed for good, so that RQ's failed registry shows it.
    """
    job = rq.get_current_job()
    if job is None:
        raise RqarmError("rqarm.worker.perform is run by an RQ worker; to run a request yourself, use rm.queues")
    manager = manager_for(namespace, job.connection)
    attempt = handed_over.pop(job.id, None)
    is_renewed = attempt is not None
    if attempt is None:
        attempt = manager.shell.run(flows.start(manager.core, Key(key), job.id, worker_name(job)))
    if isinstance(attempt, State):
        log.info("%s: superseded, the request is %s", key, attempt)
        return
    try:
        Execution(manager, attempt, worker_name(job), is_renewed).run()
    finally:
        if not is_renewed:
            _sweep_now_and_then(manager)


def worker_name(job: Job) -> str:
    return str(job.worker_name or f"{socket.gethostname()}.{os.getpid()}")


def _sweep_now_and_then(manager: RequestManager) -> None:
    """A plain RQ worker has no maintenance of ours: whoever has just run a job looks for the dead, if nobody has."""
    try:
        manager.shell.run(flows.sweep_if_due(manager.core))
    except (redis.exceptions.RedisError, RqarmError) as error:
        log.warning("the sweep did not run: %s", error)


class Execution:
    """One attempt from handler to its end."""

    def __init__(self, manager: RequestManager, attempt: Attempt, worker: str, is_renewed: bool) -> None:
        self.manager, self.attempt, self.worker = manager, attempt, worker
        self.core: Core = manager.core
        self._is_renewed = is_renewed
        self._lost = threading.Event()
        self._began = time.monotonic()

    def run(self) -> None:
        """Match, call, end. Raises the handler's error when the request has failed for good."""
        route: Route | None = None
        try:
            match = handlers().match(self.attempt.request)
            route = match.route
            with self._renewing():
                value = self._call(match)
                if self._lost.is_set():
                    # a handler that stopped early because of it may have returned half of its answer
                    raise LeaseLost(self.attempt.key, "cancelled or taken over")
                self._insist(flows.finish(self.core, self.attempt, value, sticky=bool(route.sticky), ttl=route.ttl))
            self._tell("completed", route)
        except LeaseLost as lost:
            self._tell(f"given up ({lost.state})", route)
        except BaseException as error:  # noqa: BLE001 -- whatever a handler raises, its request must end
            self._end_badly(error, route)

    # -- the handler

    def _call(self, match: Match) -> Any:
        context = Context(
            self.attempt.request,
            self.attempt.key,
            self.attempt.number,
            self.attempt.kwargs,
            handlers().resources,
            self._report,
            self._lost.is_set,
            self._began + self._limit(match.route),
            self.worker,
        )
        limit = self._limit(match.route)
        with time_limit(limit):
            value = match.call(self.attempt.request, context)
        if inspect.isawaitable(value):
            with time_limit(limit, self._spent() - ALARM_DELAY):
                value = _run_async(value, limit, self._spent())
        if isinstance(value, Result) and isinstance(value.data, Iterator):
            return replace(value, data=self._in_time(value.data, match.route))
        return self._in_time(value, match.route) if inspect.isgenerator(value) else value

    def _in_time(self, pieces: Iterator[Any], route: Route) -> Iterator[Any]:
        """The pieces of a handler's generator: what it does between them counts for its time limit."""
        while True:
            try:
                with time_limit(self._limit(route), self._spent()):
                    piece = next(pieces)
            except StopIteration:
                if self._lost.is_set():
                    raise LeaseLost(self.attempt.key, "cancelled or taken over") from None
                return
            yield piece

    def _limit(self, route: Route) -> float:
        return route.timeout or self.core.settings.timeout

    def _spent(self) -> float:
        return time.monotonic() - self._began

    def _report(self, fraction: float, message: str) -> None:
        try:
            self._do(flows.renew(self.core, self.attempt, (fraction, message)))
        except LeaseLost:
            self._lost.set()
        except redis.exceptions.RedisError as error:
            log.warning("%s: progress was not noted: %s", self.attempt.key, error)

    @contextlib.contextmanager
    def _renewing(self) -> Iterator[None]:
        """Keep the lease while the handler runs, unless the parent does."""
        if self._is_renewed:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._renew, args=(done,), name="rqarm-renew", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _renew(self, done: threading.Event) -> None:
        lease = self.core.settings.lease
        good = time.monotonic()
        while not done.wait(lease / 3):
            sent = time.monotonic()
            try:
                self._do(flows.renew(self.core, self.attempt))
                good = sent
            except LeaseLost:
                self._lost.set()
                return
            except redis.exceptions.RedisError as error:
                log.warning("%s: the lease was not renewed: %s", self.attempt.key, error)
                if time.monotonic() - good > lease * 2 / 3:
                    self._lost.set()

    # -- the end

    def _end_badly(self, error: BaseException, route: Route | None) -> None:
        packed = codec.pack_error(error)
        try:
            delay = self._retry_delay(error, route)
            if delay is not None:
                kwargs = dict(error.kwargs) if isinstance(error, RetryLater) and error.kwargs else None
                self._insist(flows.retry(self.core, self.attempt, packed, delay=delay, kwargs=kwargs))
                self._tell(f"retried in {delay:g} s", route, error)
                return
            self._fail(packed, route)
        except UnpackableResult as unpackable:
            # the arguments of a retry: they can never be stored, so this is the end
            self._fail(codec.pack_error(unpackable), route)
            error = unpackable
        except LeaseLost as lost:
            self._tell(f"given up ({lost.state})", route)
            return
        self._tell("failed", route, error)
        raise error

    def _retry_delay(self, error: BaseException, route: Route | None) -> float | None:
        """Seconds until the next attempt, None = no more."""
        rule = route.retry if route is not None else None
        if isinstance(error, RetryLater):
            if error.delay is not None:
                return error.delay
            return rule.delay(self.attempt.retries + 1, random.random) if rule is not None else 0.0
        if rule is None or isinstance(error, HOPELESS) or not rule.wants(error, self.attempt.retries):
            return None
        return rule.delay(self.attempt.retries + 1, random.random)

    def _fail(self, packed: bytes, route: Route | None) -> None:
        failure_ttl = route.failure_ttl if route is not None else None
        negative_ttl = route.negative_ttl if route is not None else None
        self._insist(flows.fail(self.core, self.attempt, packed, failure_ttl=failure_ttl, negative_ttl=negative_ttl))

    def _do(self, flow: flows.Flow[T]) -> T:
        return self.manager.shell.run(flow)

    def _insist(self, flow: flows.Flow[None]) -> None:
        """Run a flow that ends the attempt, however often the server refuses, as long as the attempt may be ours.

        The work is done and only its end is missing: READONLY, OOM, BUSY and the like must not undo it. Saying it
        again is safe, each step carries the token. Raises LeaseLost when a lease has passed in vain.
        """
        self._do(self._insisting(flow))

    def _insisting(self, flow: flows.Flow[None]) -> flows.Flow[None]:
        for step in flows.steps(flow):
            yield from flows.answered(step, self._until_heard(step.value))

    def _until_heard(self, step: flows.Step) -> flows.Flow[Any]:
        deadline = time.monotonic() + self.core.settings.lease
        refusals = 0
        while True:
            try:
                return (yield step)
            except redis.exceptions.RedisError as error:
                if self._lost.is_set() or time.monotonic() > deadline:
                    self._lost.set()
                    raise LeaseLost(self.attempt.key, "out of reach") from error
                refusals += 1
                pause = min(PATIENCE, 0.05 * 2**refusals) * random.uniform(0.5, 1.0)
                log.warning("%s: the server refused, telling it again in %.1f s: %s", self.attempt.key, pause, error)
                time.sleep(pause)

    def _tell(self, outcome: str, route: Route | None, error: BaseException | None = None) -> None:
        log.log(
            logging.INFO if error is None else logging.WARNING,
            "%s %s: %s by %s in %.3f s%s",
            self.attempt.key,
            self.core.describe(self.attempt.request),
            outcome,
            route.name if route is not None else "no route",
            self._spent(),
            f": {type(error).__name__}: {error}"[:300] if error is not None else "",
        )


def _run_async(value: Awaitable[T], limit: float, spent: float) -> T:
    """Run an async handler on the event loop of this process, its async resources built first."""
    process = this_process()
    if process.runner is None:
        process.runner = asyncio.Runner()
    if not process.has_async_resources:
        try:
            process.runner.run(handlers().resources.start())
        except BaseException:
            if inspect.iscoroutine(value):
                value.close()  # nobody will await it
            raise
        process.has_async_resources = True
    return process.runner.run(_await_in_time(value, limit, spent))


async def _await_in_time(value: Awaitable[T], limit: float, spent: float) -> T:
    """The loop ends the handler at its limit: an alarm may strike another task of the loop, which would swallow it."""
    timeout = asyncio.timeout(limit - spent)
    try:
        async with timeout:
            return await value
    except TimeoutError:
        if timeout.expired():
            raise TimeLimit(_over(limit)) from None
        raise


def _over(limit: float) -> str:
    return f"the handler ran longer than its limit of {limit:g} s"


@contextlib.contextmanager
def time_limit(limit: float, spent: float = 0.0) -> Iterator[None]:
    """Raise TimeLimit in the block after ``limit`` seconds, ``spent`` of them gone; RQ's alarm, if it is sooner, stays.

    Only the main thread of a POSIX process can be interrupted so. Elsewhere RQ's limit and the parent's remain.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    seconds = max(limit - spent, 0.001)
    outer, began = signal.getitimer(signal.ITIMER_REAL)[0], time.monotonic()
    if outer and outer <= seconds:
        with _as_time_limit():
            yield
        return

    def ring(*_: Any) -> None:
        raise TimeLimit(_over(limit))

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - began), 0.001))


@contextlib.contextmanager
def _as_time_limit() -> Iterator[None]:
    try:
        yield
    except JobTimeoutException as error:
        raise TimeLimit(str(error)) from error
