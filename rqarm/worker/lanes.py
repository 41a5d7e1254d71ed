"""A warm horse that runs many requests at a time: ``async def`` handlers on one event loop, others in threads.

A handler that says ``thread_safe=True`` runs beside others of its kind; one that does not waits for the one thread of
those. What all of them say to the server at about the same time goes in one round trip.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, TypeVar

from redis.exceptions import RedisError
from rq.timeouts import TimerDeathPenalty

from rqarm import flows
from rqarm.calls import Batch
from rqarm.errors import LeaseLost, RqarmError
from rqarm.handlers import Match
from rqarm.replies import Attempt
from rqarm.worker import equipment, execution
from rqarm.worker.board import Board
from rqarm.worker.execution import Execution, Flush, Handle, Pause
from rqarm.worker.horse import LEAVING_A_JOB, Horse, Lane, Order, Waiting
from rqarm.worker.limits import Interruptible, await_in_time
from rqarm.worker.patience import pause_after

if TYPE_CHECKING:
    from rqarm.worker.rqworker import Worker

log = logging.getLogger("rqarm.worker")
T = TypeVar("T")

#: steps that one round trip carries at the most. Not many: who has his answer works while the next are on their way
TOGETHER = 64
#: seconds until a server that refused is asked again
PATIENCE = 1.0


class Pump:
    """Ask the server from the event loop, whatever client the worker was given: one thread, one batch after the other.

    What is asked while a batch is on its way goes with the next.
    """

    def __init__(self, ask: Callable[[Batch[Any]], list[Any]]) -> None:
        self._ask = ask
        self._thread = ThreadPoolExecutor(1, "rqarm-pump")
        self._asked: deque[tuple[tuple[Any, ...], asyncio.Future[list[Any]]]] = deque()
        self._pumping: asyncio.Task[None] | None = None

    async def execute(self, step: Any) -> Any:
        """The answer to a Call, a Command or a Batch. Raises its error; those in a Batch that settles are answers."""
        future = asyncio.get_running_loop().create_future()
        self._asked.append((step.steps if isinstance(step, Batch) else (step,), future))
        if self._pumping is None:
            self._pumping = asyncio.create_task(self._pump())
        answers: list[Any] = await future
        if isinstance(step, Batch) and step.settles:
            return answers
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers if isinstance(step, Batch) else answers[0]

    async def _pump(self) -> None:
        loop = asyncio.get_running_loop()
        while self._asked:
            futures: list[tuple[asyncio.Future[list[Any]], int, int]] = []
            steps: list[Any] = []
            while self._asked and len(steps) < TOGETHER:
                more, future = self._asked.popleft()
                futures.append((future, len(steps), len(steps) + len(more)))
                steps += more
            try:
                answers = await loop.run_in_executor(self._thread, self._ask, Batch(tuple(steps), settles=True))
            except Exception as error:  # noqa: BLE001 -- the answer to all of them
                answers = [error] * len(steps)
            for future, start, end in futures:
                if not future.done():
                    future.set_result(answers[start:end])
        self._pumping = None

    async def run(self, call: Callable[[], Any]) -> Any:
        """Something else that talks to the server and blocks."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


async def through(steps: Generator[Any, Any, T], ask: Callable[[Any], Awaitable[Any]]) -> T:
    """The value of a flow, or of an execution, whose steps ``ask`` answers; what that raises belongs to the step."""
    answer: Any = None
    failure: BaseException | None = None
    while True:
        try:
            step = steps.send(answer) if failure is None else steps.throw(failure)
        except StopIteration as end:
            value: T = end.value
            return value
        answer = failure = None
        try:
            answer = await ask(step)
        except BaseException as error:  # noqa: BLE001 -- whatever a handler raises, its request must end
            failure = error


class Company:
    """Who runs beside whom. A suspect, whose processes have died, has its last chance alone: no other can spoil it."""

    def __init__(self) -> None:
        self._running = self._suspects = 0
        self._is_alone = False
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def joined(self, *, is_suspect: bool) -> AsyncIterator[None]:
        """Run in it, when there is nobody who must be alone; a suspect when there is nobody."""
        self._suspects += is_suspect
        if is_suspect or self._suspects or self._is_alone:
            async with self._changed:
                await self._changed.wait_for(
                    lambda: not self._is_alone and not (self._running if is_suspect else self._suspects)
                )
        self._suspects -= is_suspect
        self._running += 1
        self._is_alone = is_suspect
        try:
            yield
        finally:
            self._running -= 1
            self._is_alone = False
            if self._suspects or is_suspect:
                async with self._changed:
                    self._changed.notify_all()


class ManyHorse(Horse):
    """As many requests at a time as the board has lanes."""

    def __init__(self, worker: Worker, board: Board, parent: Connection) -> None:
        super().__init__(worker, board, parent)
        worker.death_penalty_class = TimerDeathPenalty  # RQ is told of failures in a thread, where there is no alarm
        self._lanes = [Lane(self, index) for index in range(board.lanes)]
        self._running: dict[Lane, asyncio.Task[None]] = {}
        self._stoppers: dict[Lane, Callable[[], object]] = {}
        #: those that wait for the thread of those that run alone, or are in it
        self._waiting: dict[Lane, Future[None]] = {}
        self._reports: set[asyncio.Task[None]] = set()
        self._alone = ThreadPoolExecutor(1, "rqarm-alone")
        self._beside = ThreadPoolExecutor(board.lanes, "rqarm-thread")
        self._pump = Pump(self.manager.shell.execute)
        self._refusals = 0

    def serve(self, order: Order) -> str:
        return equipment.event_loop().run(self._serve(order, self.begin(order)))

    async def _serve(self, order: Order, waiting: Waiting) -> str:
        loop = asyncio.get_running_loop()
        self._news, self._heard, self._company = asyncio.Event(), asyncio.Event(), Company()
        loop.add_reader(self.parent.fileno(), self._listen)
        sleeper: asyncio.Task[None] | None = None
        reason = ""
        try:
            while True:
                self._news.clear()
                if sleeper is not None and sleeper.done():
                    sleeper, reason = None, ""
                reason = self.why_stop() or reason or await self._fill()
                is_over = order.is_burst and not self._is_unanswered()
                if not self._running and reason and (reason != "empty" or is_over):
                    return reason
                if reason == "empty" and sleeper is None and not is_over:
                    sleeper = asyncio.create_task(self._sleep(waiting))
                self.board.wait(0 if self._running else self.board.waits_since() or time.monotonic())
                await self._news.wait()
                if reason != "empty" or sleeper is None or sleeper.done():
                    reason = ""
        finally:
            loop.remove_reader(self.parent.fileno())
            if sleeper is not None:
                sleeper.cancel()
                await asyncio.wait([sleeper])
            # in the thread that may still be at it for the sleeper
            await self._pump.run(waiting.close)
            for lane in self._lanes:
                if lane.is_unanswered:
                    lane.is_unanswered = False
                    await self._pump.run(partial(self.give_up, lane.index, lane.number + 1))
            if self._reports:
                await asyncio.wait(self._reports)

    def _is_unanswered(self) -> bool:
        """Whether the server may have given something that did not arrive."""
        return any(lane.is_unanswered for lane in self._lanes)

    async def _fill(self) -> str:
        """Take as much as there is room for; why no more. ``full``: ask again when something has ended."""
        count = 1  # and twice as many each time, for as long as there is enough
        while True:
            free = [lane for lane in self._lanes if lane not in self._running]
            # what the server may have given already comes first
            free = sorted(free, key=lambda lane: not lane.is_unanswered)[:count]
            count = min(2 * count, TOGETHER)
            if self._last:
                free = free[: max(0, self._last - self.ended - self.in_hand - self.promised)]
            if not free or len(self._waiting) > 1:
                return "full"  # more of what runs alone would only be kept from other workers
            for lane in free:
                lane.promise(True)
            answers = await self._pump.execute(Batch(tuple(lane.take() for lane in free), settles=True))
            reason = ""
            for lane, answer in zip(free, answers, strict=True):
                try:
                    reason = lane.took(answer) or reason
                except (RedisError, RqarmError) as error:
                    log.warning("nothing was taken: %s", error)
                    reason = "empty"  # the sleeper has the patience
                if lane.next is not None:
                    self._start(lane)
            if self.unread:
                await self._pump.run(self._hand_back)
            if reason or self.why_stop():
                return reason or "full"

    def _hand_back(self) -> None:
        try:
            self.hand_back()
        except (RedisError, RqarmError) as error:
            log.warning("what cannot be read here was not handed back yet: %s", error)

    async def _sleep(self, waiting: Waiting) -> None:
        """Until something is queued; on an error, a while, also when it may be that something was taken already."""
        if self._is_unanswered():
            self._refusals += 1
            await asyncio.sleep(pause_after(self._refusals))
            self._news.set()
            return
        self._refusals = 0
        loop, heard = asyncio.get_running_loop(), self._heard
        heard.clear()
        files: list[int] = []
        try:
            files = await self._pump.run(waiting.arm)
            for file in files:
                loop.add_reader(file, heard.set)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(heard.wait(), self.settings.lease + 1)
            await self._pump.run(waiting.collect if heard.is_set() else waiting.close)
        except (RedisError, OSError) as error:
            log.warning("what is queued was not heard, asking again in %.1f s: %s", PATIENCE, error)
            await asyncio.sleep(PATIENCE)
        finally:
            for file in files:
                loop.remove_reader(file)
            self._news.set()

    def _listen(self) -> None:
        try:
            for message in self.messages():
                if isinstance(message, tuple) and message[0] == "stop":
                    _, index, number = message
                    lane = self._lanes[index]
                    if lane.number == number and lane in self._stoppers:
                        self._stoppers[lane]()
                elif message == "halt":
                    for future in self._waiting.values():
                        future.cancel()  # no more than the one that runs is finished here
        except EOFError:
            os._exit(1)  # the parent is dead
        self._news.set()

    # -- one lane

    def _start(self, lane: Lane) -> None:
        task = asyncio.create_task(self._run(lane), name=f"lane {lane.index}")
        self._running[lane] = task
        task.add_done_callback(lambda task: self._freed(lane, task))

    def _freed(self, lane: Lane, task: asyncio.Task[None]) -> None:
        del self._running[lane]
        self._news.set()
        if lane.is_unanswered:
            self._heard.set()  # what may be its next one is in no list
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("lane %d stumbled", lane.index, exc_info=error)

    async def _run(self, lane: Lane) -> None:
        """One request after the other, as long as there is a next one."""
        while lane.next is not None:
            attempt, lane.next = lane.next, None
            run, failure = lane.begin(attempt), None
            try:
                async with self._company.joined(is_suspect=self._is_suspect(attempt)):
                    if self.is_halted or not await self._execute(run, lane):
                        await self._pump.run(partial(self.let_go, attempt))
                        lane.clear()
                        continue
            except BaseException as error:  # noqa: BLE001 -- the handler's, and the request has failed for it
                failure = error
            self._stoppers.pop(lane, None)
            if failure is not None or run.outcome in LEAVING_A_JOB:
                await self._pump.run(partial(self.conclude, run, failure))
            lane.end(run, is_good=failure is None)

    def _is_suspect(self, attempt: Attempt) -> bool:
        """Another crash, and it is set aside: that must not be the doing of one beside it."""
        return attempt.crashes >= max(1, self.settings.max_attempts - 1)

    async def _execute(self, run: Execution, lane: Lane) -> bool:
        """False: it has not begun, because the worker stops."""
        if not self._is_async(run):
            return await self._in_thread(run, lane)
        run.began = time.monotonic()
        self.board.begin(lane.index, run.began)
        await self._drive(run, lane)
        return True

    @staticmethod
    def _is_async(run: Execution) -> bool:
        try:
            return inspect.iscoroutinefunction(run.match().handler.function)
        except RqarmError:
            return True  # no handler will be called

    async def _in_thread(self, run: Execution, lane: Lane) -> bool:
        """The whole execution in a thread, which talks to the server by itself. False: the worker stops before it."""
        loop = asyncio.get_running_loop()
        run.loop, run.stopper = loop, Interruptible(run.limit)
        stopper, shell = run.stopper, self.manager.shell
        lost = LeaseLost(run.attempt.key, "cancelled or taken over")
        self._stoppers[lane] = partial(stopper.interrupt, lost)

        def work() -> None:
            run.began = time.monotonic()  # it may have waited for its thread
            self.board.begin(lane.index, run.began)
            alarm = threading.Timer(run.limit, stopper.interrupt)
            alarm.daemon = True
            alarm.start()
            try:
                # how many more may be taken is for the loop to count
                ask = shell.execute if self._last else partial(lane.answer, ask=shell.execute)
                execution.Drive(run, shell).run(ask)
            finally:
                alarm.cancel()

        if run.match().route.thread_safe:
            await loop.run_in_executor(self._beside, work)
            return True
        future = self._alone.submit(work)
        self._waiting[lane] = future

        def stop() -> None:
            if not future.cancel():
                stopper.interrupt(lost)

        self._stoppers[lane] = stop
        try:
            await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancelled():
                raise
            if not run.hold.is_lost():
                return False
            await self._drive(run, lane)  # the attempt is lost: it ends before its handler
        finally:
            del self._waiting[lane]
            self._news.set()
        return True

    async def _drive(self, run: Execution, lane: Lane) -> None:
        """An execution on the event loop."""

        async def answer(step: Any) -> Any:
            if isinstance(step, Handle):
                return await self._call(run, step.match, lane)
            if isinstance(step, Pause):
                return await asyncio.sleep(step.seconds)
            if isinstance(step, Flush):
                return await step.emitter.flush()
            coupled = lane.couple(step)
            if coupled is None:
                return await self._pump.execute(step)
            return lane.uncouple(await self._pump.execute(coupled))

        await through(run.flow(), answer)

    async def _call(self, run: Execution, match: Match, lane: Lane) -> Any:
        await equipment.start_resources()
        if run.hold.is_lost():
            raise LeaseLost(run.attempt.key, "cancelled or taken over")  # nobody could stop it yet
        context = run.context(
            partial(self._report, run),
            self.manager.shell.execute,
            self._pump.execute,
            look_up=partial(run.look_up_in, self.manager.shell),
            look_up_async=lambda target: through(run.look_up(target), self._pump.execute),
            require=partial(run.require_in, self.manager.shell),
            require_async=lambda requests: through(run.require(requests), self._pump.execute),
        )
        handling = asyncio.ensure_future(
            await_in_time(match.call(run.attempt.request, context), run.limit, run.spent())
        )
        self._stoppers[lane] = handling.cancel
        try:
            return await handling
        except asyncio.CancelledError:
            if run.hold.is_lost():
                raise LeaseLost(run.attempt.key, "cancelled or taken over") from None
            raise

    def _report(self, run: Execution, fraction: float, message: str) -> None:
        """Progress goes out beside the handler."""
        (step,) = flows.renew(self.core, run.attempt, (fraction, message))

        async def send() -> None:
            try:
                await self._pump.execute(step)
            except LeaseLost:
                run.hold.lose()
            except (RedisError, RqarmError) as error:
                log.warning("%s: progress was not noted: %s", run.attempt.key, error)

        task = asyncio.create_task(send())
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)
