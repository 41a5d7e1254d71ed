"""One execution, from ticket to end, whoever runs it.

``Execution`` is a flow: it matches, has the handler called, and ends the attempt in exactly one way: finished,
retried, failed, or given up because it is no longer ours. Who drives it calls the handler and keeps its time:
``Drive`` here, for ``perform`` and the horse; the lanes of rqarm.worker.lanes have drivers of their own.

The record is the truth; RQ hears of a failure only so that its own tools show it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import time
import traceback
from collections.abc import Awaitable, Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, TypeVar

import redis
from rq.exceptions import ShutDownImminentException
from rq.worker import BaseWorker

from rqarm import flows, followups, needs, packing, redirects, tracing
from rqarm.calls import NextUp
from rqarm.context import Context, Needed, Redirected, RetryLater, SetAside
from rqarm.errors import (
    AliasesFull,
    ConfigError,
    InvalidRequest,
    LeaseLost,
    NoHandler,
    RedirectLoop,
    Refused,
    ResultTooLarge,
    RqarmError,
    UnpackableResult,
)
from rqarm.flows import Core
from rqarm.handlers import MISS, FollowUpMatch, Match
from rqarm.manager import RequestManager
from rqarm.quarantine import note_for, reason_for
from rqarm.replies import Attempt
from rqarm.request import BatchRequest
from rqarm.result import Result
from rqarm.routes import Route
from rqarm.shell import Shell
from rqarm.worker import equipment
from rqarm.worker.emitter import Emitter
from rqarm.worker.limits import ALARM_DELAY, Alarm, Interruptible, await_in_time, in_time, time_limit
from rqarm.worker.patience import pause_after
from rqarm.worker.traced import traced

log = logging.getLogger("rqarm.worker")
T = TypeVar("T")

#: errors that the same arguments bring again: retrying them burns workers
HOPELESS = (
    ConfigError,
    InvalidRequest,
    NoHandler,
    RedirectLoop,
    UnpackableResult,
    ResultTooLarge,
    SetAside,
    followups.FollowUpLost,
)
#: longest wait in seconds before a server that refused the end of an attempt is told again
PATIENCE = 1.0


def on_failure(core: Core, attempt: Attempt, *, is_set_aside: bool) -> tuple[NextUp, ...]:
    """Who is to be told when the attempt fails for good."""
    try:
        return followups.on_failure(core, attempt, equipment.handlers(), is_set_aside=is_set_aside)
    except ConfigError:
        return ()  # handlers that cannot be loaded are why it fails


def attend(manager: RequestManager) -> None:
    """See to failures of which nobody has been told. Raises RedisError, RqarmError."""
    if made := manager.shell.run(followups.attend(manager.core, equipment.handlers())):
        log.info("%d follow-ups of requests whose processes had died were queued", made)


class Hold:
    """Whether the attempt may still be ours."""

    def __init__(self, is_taken_away: Callable[[], bool] = lambda: False) -> None:
        """``is_taken_away`` asks somebody who also watches."""
        self._is_lost = False
        self._is_taken_away = is_taken_away

    def is_lost(self) -> bool:
        return self._is_lost or self._is_taken_away()

    def lose(self) -> None:
        self._is_lost = True


@dataclass(frozen=True, slots=True)
class Handle:
    """A step of an execution: call the handler, answer with its value or its error."""

    match: Match


@dataclass(frozen=True, slots=True)
class Pause:
    """A step of an execution: do nothing for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Flush:
    """A step of an execution: wait until what the handler emitted has been sent."""

    emitter: Emitter


#: an execution, step by step
Steps = Generator[flows.Step | Handle | Pause | Flush, Any, None]


class Drive:
    """An execution on its way, in this thread. It can rest at a step and go on later."""

    def __init__(self, execution: Execution, shell: Shell) -> None:
        self._steps, self._shell, self._execution = execution.flow(), shell, execution
        self._answer: Any = None
        self._failure: BaseException | None = None

    def run(self, ask: Callable[[Any], Any], rests_at: Callable[[Any], bool] = lambda _: False) -> Any:
        """On to the end, None, or to the first step to rest at, which ``ask`` is not asked.

        Raises the handler's error when the request has failed for good.
        """
        while True:
            try:
                step = self._steps.send(self._answer) if self._failure is None else self._steps.throw(self._failure)
            except StopIteration:
                return None
            self._answer = self._failure = None
            if rests_at(step):
                return step
            try:
                if isinstance(step, Handle):
                    self._answer = self._execution.call(step.match, self._shell)
                elif isinstance(step, Pause):
                    time.sleep(step.seconds)
                elif isinstance(step, Flush):
                    self._execution.flush(step.emitter)
                else:
                    self._answer = ask(step)
            except BaseException as error:  # noqa: BLE001 -- whatever a handler raises, its request must end
                self._failure = error

    def answer(self, answer: Any) -> None:
        """The answer, or the error, of the step at which it rests."""
        if isinstance(answer, BaseException):
            self._failure = answer
        else:
            self._answer = answer


class Execution:
    """One attempt from handler to its end."""

    def __init__(self, core: Core, attempt: Attempt, worker: str, hold: Hold) -> None:
        self.core, self.attempt, self.worker, self.hold = core, attempt, worker, hold
        self.began = time.monotonic()
        self.outcome = ""
        #: with which it ended, also when another attempt follows
        self.error: BaseException | None = None
        #: where this process traces, while it runs
        self.span: tracing.Span | None = None
        #: the loop that runs beside this thread, when there is one
        self.loop: asyncio.AbstractEventLoop | None = None
        #: how the handler can be stopped from another thread
        self.stopper: Interruptible | Alarm | None = None
        self._match: Match | None = None
        self._context: Context | None = None
        self._emitter: Emitter | None = None
        #: seconds that the attempt may take
        self.limit = self._limit()
        self._ended = 0.0
        #: what the handler looked up last: another request and its result
        self._found: tuple[BatchRequest, Any] | None = None

    def flow(self) -> Steps:
        """Match, call, end. Raises the handler's error when the request has failed for good."""
        return traced(self, self._flow()) if tracing.is_on() else self._flow()

    def _flow(self) -> Steps:
        route: Route | None = None
        try:
            match = self.match()
            route = match.route
            if route.max_running is not None and not (yield from self._admit(route, route.max_running)):
                self._tell("parked", route)
                return
            self._check()
            given: Match | None = match
            if isinstance(match, FollowUpMatch):
                given = yield from self._insist(followups.prepare(self.core, self.attempt, match))
            value = None if given is None else (yield from self._handle(given))
            while isinstance(value, Needed) and given is not None:
                if not (yield from self._need(value, route)):
                    return
                value = yield from self._handle(given)
            self._check()
            if isinstance(value, Redirected):
                yield from self._redirect(value, match)
                return
            yield from self._insist(self._finish(match, value))
            self._tell("completed", route)
        except LeaseLost as lost:
            self._tell("given up", route, lost)
        except BaseException as error:  # noqa: BLE001 -- whatever a handler raises, its request must end
            yield from self._end_badly(error, route)

    def _handle(self, match: Match) -> Generator[Any, Any, Any]:
        """What the handler returned, or where it sent us: a value that is another request's is not stored again."""
        try:
            value = yield Handle(match)
        except (Redirected, Needed) as wish:
            return wish
        finally:
            if self._emitter is not None and self._emitter.is_busy:
                yield Flush(self._emitter)
        if self._found is not None and value is self._found[1]:
            return Redirected(self._found[0])
        return value

    def _finish(self, match: Match, value: Any) -> flows.Flow[Any]:
        if isinstance(match, FollowUpMatch):
            return followups.conclude(self.core, self.attempt)
        route, follow_up = match.route, followups.callback(self.core, self.attempt, match)
        return flows.finish(self.core, self.attempt, value, sticky=route.sticky, ttl=route.ttl, follow_up=follow_up)

    # -- redirects

    def _redirect(self, redirected: Redirected, match: Match) -> Generator[Any, Any, None]:
        route, callback = match.route, followups.callback(self.core, self.attempt, match)
        told = on_failure(self.core, self.attempt, is_set_aside=False)
        redirect = redirects.redirect(
            self.core,
            self.attempt,
            redirected.target,
            again=redirected.again,
            failure_ttl=route.failure_ttl,
            follow_ups=told if callback is None else (callback, *told),
        )
        try:
            word = yield from self._insist(redirect)
        except Refused as refused:
            yield from self._try_again_for(refused, route)
            return
        except AliasesFull as full:
            try:
                value = yield from self._insist(redirects.look_up(self.core, redirected.target))
            except Redirected:
                yield from self._try_again_for(full, route)
                return
            yield from self._insist(self._finish(match, value))
            self._tell("completed", route)
            return
        self._tell(f"redirected to {redirects.name_of(self.core, redirected.target)}, {word}", route)

    def _try_again_for(self, refusal: Exception, route: Route) -> Generator[Any, Any, None]:
        """The target takes nobody at the moment."""
        packed, delay = packing.pack_error(refusal), redirects.REFUSED_DELAY
        yield from self._insist(flows.retry(self.core, self.attempt, packed, delay=delay, kwargs=None))
        self._tell(f"retried in {delay:g} s", route, refusal)

    def look_up(self, target: BatchRequest) -> flows.Flow[Any]:
        """The cached result of another request. Raises Redirected when there is none."""
        value = yield from redirects.look_up(self.core, target)
        self._found = target, value
        return value

    def look_up_in(self, shell: Shell, target: BatchRequest) -> Any:
        _refuse_on_a_loop("aget_or_redirect")
        return shell.run(self.look_up(target))

    def _need(self, needed: Needed, route: Route) -> Generator[Any, Any, bool]:
        """Whether the handler can be called again now, because what it needs has ended. Else the attempt is over."""
        try:
            word = yield from self._insist(needs.need(self.core, self.attempt, needed.requests))
        except (Refused, AliasesFull) as refusal:
            yield from self._try_again_for(refusal, route)
            return False
        if word != "ready":
            self._tell(f"waits for {len(needed.requests)}", route)
        return bool(word == "ready")

    def require(self, requests: tuple[BatchRequest, ...]) -> flows.Flow[list[Any]]:
        """The results of other requests. Raises Needed when some are missing."""
        return needs.values_of(self.core, self.attempt, requests)

    def require_in(self, shell: Shell, requests: tuple[BatchRequest, ...]) -> Any:
        _refuse_on_a_loop("arequire")
        return shell.run(self.require(requests))

    def _check(self) -> None:
        """A handler that stopped early because the attempt is lost may have returned half of its answer."""
        if self.hold.is_lost():
            raise LeaseLost(self.attempt.key, "cancelled or taken over")

    def _admit(self, route: Route, max_running: int) -> Generator[Any, Any, bool]:
        """Whether the route's limit has a place. Else the attempt was handed back: there is nothing more to do."""
        admission = flows.admit(self.core, self.attempt, route.name, max_running)
        is_admitted: bool = yield from self._insist(admission)
        return is_admitted

    # -- the handler

    def call(self, match: Match, shell: Shell) -> Any:
        """Call the handler in this thread, within its time limit."""
        limit = self.limit
        context = self.context(
            lambda *report: self._report(shell, *report),
            shell.execute,
            look_up=partial(self.look_up_in, shell),
            look_up_async=lambda target: asyncio.to_thread(shell.run, self.look_up(target)),
            require=partial(self.require_in, shell),
            require_async=lambda requests: asyncio.to_thread(shell.run, self.require(requests)),
        )
        with self.stopper or time_limit(limit, self.spent()):
            value = match.call(self.attempt.request, context)
        if inspect.isawaitable(value):
            value = self._await(value, limit)
            if value is MISS and not match.handler.is_async:
                value = self._call_after_all(match, context, limit)
        return self._in_time(value, limit)

    def _await(self, value: Awaitable[Any], limit: float) -> Any:
        with time_limit(limit, self.spent() - ALARM_DELAY):
            return self._run_async(value, limit)

    def _call_after_all(self, match: Match, context: Context, limit: float) -> Any:
        """Call the handler whose async look-up had nothing, in the time that is left."""
        if isinstance(self.stopper, Alarm):
            self.stopper.limit = limit - self.spent()
        with self.stopper or time_limit(limit, self.spent()):
            return match.call(self.attempt.request, context, has_looked=True)

    def _run_async(self, value: Awaitable[Any], limit: float) -> Any:
        """Run an async handler to its end on the loop of this process."""
        handling = self._with_resources(value, limit)
        if self.loop is not None:
            return asyncio.run_coroutine_threadsafe(handling, self.loop).result()
        return equipment.event_loop().run(handling if self.span is None else tracing.within(self.span, handling))

    async def _with_resources(self, value: Awaitable[Any], limit: float) -> Any:
        try:
            await equipment.start_resources()
        except BaseException:
            if inspect.iscoroutine(value):
                value.close()  # nobody will await it
            raise
        return await await_in_time(value, limit, self.spent())

    def context(
        self,
        report: Callable[[float, str], object],
        ask: Callable[[Any], Any],
        ask_beside: Callable[[Any], Awaitable[Any]] | None = None,
        **ways: Any,
    ) -> Context:
        """What the handler gets. ``ask`` answers a step and blocks, ``ask_beside`` is awaited where a loop runs.

        ``ways``: how the context looks up results, see Context.
        """

        def emit(value: Any) -> None:
            if self.hold.is_lost():
                raise LeaseLost(self.attempt.key, "cancelled or taken over")
            if self._emitter is None:
                self._emitter = Emitter(self.core, self.attempt, self.hold.lose, ask, ask_beside)
            self._emitter.emit(value)

        self._context = Context(
            self.attempt.request,
            self.attempt.key,
            self.attempt.number,
            self.attempt.kwargs,
            equipment.handlers().resources,
            report,
            self.hold.is_lost,
            self.began + self.limit,
            self.worker,
            emit=emit,
            **ways,
        )
        return self._context

    def flush(self, emitter: Emitter) -> None:
        """Wait in this thread until what an async handler emitted has been sent."""
        if self.loop is not None:
            asyncio.run_coroutine_threadsafe(emitter.flush(), self.loop).result()
        else:
            equipment.event_loop().run(emitter.flush())

    def match(self) -> Match:
        """The route that takes the request. Raises NoHandler, InvalidRequest, ConfigError."""
        if self._match is None:
            self._match = equipment.handlers().match(self.attempt.request)
        return self._match

    @property
    def family(self) -> str:
        """The route, for statistics; "" = none takes the request."""
        return self._match.route.name if self._match is not None else ""

    def end_clock(self) -> None:
        """From now on nothing counts for the handler's time."""
        self._ended = time.monotonic()

    def _limit(self) -> float:
        try:
            return self.match().route.timeout or self.core.settings.timeout
        except RqarmError:
            return self.core.settings.timeout  # no handler will be called

    def _in_time(self, value: Any, limit: float) -> Any:
        """A value in pieces counts for the time limit while a handler makes them."""
        if isinstance(value, Result) and isinstance(value.data, Iterator):
            return replace(value, data=self._pieces(value.data, limit))
        return self._pieces(value, limit) if isinstance(value, Generator) else value

    def _pieces(self, pieces: Iterator[Any], limit: float) -> Iterator[Any]:
        yield from in_time(pieces, limit, self.spent)
        self._check()

    def spent(self) -> float:
        """Seconds since it began, until the handler's value was there."""
        return (self._ended or time.monotonic()) - self.began

    def _report(self, shell: Shell, fraction: float, message: str) -> None:
        try:
            shell.run(flows.renew(self.core, self.attempt, (fraction, message)))
        except LeaseLost:
            self.hold.lose()
        except redis.exceptions.RedisError as error:
            log.warning("%s: progress was not noted: %s", self.attempt.key, error)

    # -- the end

    def _end_badly(self, error: BaseException, route: Route | None) -> Steps:
        try:
            if _is_shutdown(error):
                yield from self._insist(flows.release(self.core, self.attempt))
                self._tell("handed back", route)
                return
            delay = self._retry_delay(error, route)
            if delay is not None:
                kwargs = dict(error.kwargs) if isinstance(error, RetryLater) and error.kwargs else None
                yield from self._insist(
                    flows.retry(self.core, self.attempt, packing.pack_error(error), delay=delay, kwargs=kwargs)
                )
                self._tell(f"retried in {delay:g} s", route, error)
                return
            yield from self._fail(error)
        except UnpackableResult as unpackable:
            # the arguments of a retry: they can never be stored, so this is the end
            yield from self._fail(unpackable)
            error = unpackable
        except LeaseLost as lost:
            self._tell("given up", route, lost)
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

    def _fail(self, error: BaseException) -> Steps:
        yield from self._insist(fail_for_good(self.core, self.attempt, error, self._match))

    def _insist(self, flow: flows.Flow[T]) -> Generator[Any, Any, T]:
        """Run a flow around the handler, however often the server refuses, as long as the attempt may be ours.

        When the work is done and only its end is missing, READONLY, OOM, BUSY and the like must not undo it. Saying it
        again is safe, each step carries the token. Raises LeaseLost when a lease has passed in vain.
        """
        return (yield from flows.through(flow, self._until_heard))

    def _until_heard(self, step: flows.Step) -> Generator[Any, Any, Any]:
        deadline = time.monotonic() + self.core.settings.lease
        for refusals in count(1):
            try:
                return (yield step)
            except redis.exceptions.RedisError as error:
                if self.hold.is_lost() or time.monotonic() > deadline:
                    self.hold.lose()
                    raise LeaseLost(self.attempt.key, "out of reach") from error
                pause = pause_after(refusals, first=0.1, longest=PATIENCE)
                log.warning("%s: the server refused, telling it again in %.1f s: %s", self.attempt.key, pause, error)
            yield Pause(pause)

    def _tell(self, outcome: str, route: Route | None, error: BaseException | None = None) -> None:
        """The one line of this attempt."""
        self.outcome, self.error = outcome, error
        if isinstance(error, LeaseLost):
            outcome, error = f"{outcome} ({error.state})", None
        is_found = self._context is not None and self._context.is_found
        tell(self.core, self.attempt, self.worker, route, outcome, self.spent(), error, is_found=is_found)
        self._context = None  # it leads back here: else only the garbage collector would find the two


def _refuse_on_a_loop(better: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError(f"this blocks the event loop: write `await context.{better}(...)` in an async handler")


def _is_shutdown(error: BaseException) -> bool:
    """Whether an RQ worker that runs handlers in this thread is made to end, which is not the request's fault.

    HerokuWorker raises an exception of its own in the handler. SimpleWorker's second signal raises SystemExit there, as
    a handler may do itself: who raised it is told by the traceback.
    """
    if not isinstance(error, SystemExit):
        return isinstance(error, ShutDownImminentException)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_code is BaseWorker.request_force_stop.__code__


def fail_for_good(core: Core, attempt: Attempt, error: BaseException, match: Match | None) -> flows.Flow[None]:
    """End the request with this error as its route wants it: set aside, or with a record for a while."""
    route = match.route if match is not None else None
    reason = reason_for(error, route)
    yield from flows.fail(
        core,
        attempt,
        packing.pack_error(error),
        failure_ttl=route.failure_ttl if route is not None else None,
        negative_ttl=route.negative_for(error) if route is not None else None,
        reason=reason,
        note=note_for(match, attempt.kwargs, error) if reason else b"",
        follow_ups=on_failure(core, attempt, is_set_aside=bool(reason)),
    )


def tell(
    core: Core,
    attempt: Attempt,
    worker: str,
    route: Route | None,
    outcome: str,
    ran: float,
    error: BaseException | None = None,
    *,
    is_found: bool = False,
) -> None:
    """Log the one line of an attempt. ``record.rqarm`` has it in pieces. ``is_found``: the route's look-up had it."""
    level = logging.INFO if error is None else logging.WARNING
    if not log.isEnabledFor(level):
        return
    uri, name = core.describe(attempt.request), route.name if route is not None else None
    told: dict[str, Any] = {
        "key": attempt.key,
        "uri": uri,
        "route": name,
        "outcome": outcome,
        "attempt": attempt.number,
        "wait_s": round(attempt.waited, 3),
        "run_s": round(ran, 4),
        "worker": worker,
    }
    if is_found:
        told["by"] = "lookup"
    by = f"lookup of {name}" if is_found else name or "no route"
    text = f"{attempt.key} {uri}: {outcome} by {by}, waited {attempt.waited:.3f} s, ran {ran:.3f} s"
    if error is not None:
        told["error"] = {"type": type(error).__name__, "message": str(error)[:300]}
        text += f": {type(error).__name__}: {error}"[:300]
    # not by log.log, which looks for its caller every time
    record = logging.LogRecord(log.name, level, "", 0, text, None, None)
    record.rqarm = told
    log.handle(record)


class WorkHorseDied(Exception):
    """The process that ran the request is dead. The message says what is known of it."""
