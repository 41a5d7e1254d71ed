"""The warm horse: the forked process that runs one request after the other.

It takes its work itself: the end of one request and the start of the next are one round trip. It shows on the board
what it runs, so its parent can renew, stop, and account for a death. When nothing is queued it waits without popping,
so what it waits for cannot be lost with it. What is not ours, it leaves to the parent.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import resource
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, zip_longest
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from rq.exceptions import NoSuchJobError

from rqarm import flows
from rqarm.calls import Batch, Call, Command, ms
from rqarm.errors import LeaseLost, RqarmError
from rqarm.manager import RequestManager
from rqarm.replies import Attempt, Taken, UnreadableRequest
from rqarm.shell import Sent, Shell
from rqarm.worker import equipment, execution
from rqarm.worker.board import RESTING, Board
from rqarm.worker.execution import Execution, Hold
from rqarm.worker.limits import Alarm
from rqarm.worker.logs import PrintedLines
from rqarm.worker.patience import pause_after
from rqarm.worker.shown import fetch_job

if TYPE_CHECKING:
    from rqarm.worker.rqworker import Worker

log = logging.getLogger("rqarm.worker")

#: the transitions with which an attempt ends: the next one is taken in the same round trip
ENDINGS = frozenset({"complete", "conclude", "fail", "retry", "release"})
#: outcomes of which the transition does not delete RQ's job of the old ticket
LEAVING_A_JOB = ("given up",)
#: seconds below which the requests of a route are quick, on average, and the weight of the newest in that average
QUICK, NEWEST = 0.005, 0.2
#: all routes together; no route has this name
ALL = "\n"
#: places on the board of a horse with one request at a time: one that ends, one that runs, and two taken ahead
PLACES = 4
#: requests and seconds between two looks at the memory, whichever come first
LOOKS = 50
LOOK_AFTER = 0.5
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Order:
    """What the parent wants.

    ``queues``: RQ's names in the order in which they are served. ``quota``: requests at the most, 0 = any number.
    ``is_burst``: come back when nothing is queued.
    """

    queues: tuple[str, ...]
    quota: int
    is_burst: bool


class Waiting:
    """Learn that one of RQ's lists holds something, without taking it out; and take it in the same answer.

    BLMOVE from the left of a list to the left of the same list changes nothing and blocks while it is empty. One
    connection for each list; what waits on the server stays there from one wait to the next. A server looks at what is
    sent behind a command that blocks when that is over: a take behind it needs no round trip of its own.
    """

    def __init__(self, shell: Shell, lists: tuple[str, ...], seconds: float) -> None:
        self._shell, self._lists, self._seconds = shell, lists, seconds
        self._pool: Any = shell.client.connection_pool
        #: what waits on the server, by its socket: list, connection, and what was sent behind the command that blocks
        self._armed: dict[int, tuple[str, Any, Call[Taken] | None]] = {}
        self._sockets: dict[str, int] = {}
        #: connections that wait for their next turn
        self._spare: list[Any] = []

    def arm(self, take: Call[Taken] | None = None) -> list[int]:
        """Wait on the server; the sockets on which it will say so. Raises RedisError, OSError."""
        try:
            return [self._sockets.get(name) or self._ask(name, take) for name in self._lists]
        except (RedisError, OSError):
            self.close()
            raise

    def collect(self, ready: Iterable[int] | None = None) -> list[tuple[Call[Taken], Taken | Exception]]:
        """Hear what the server has said: the takes that it has answered, and how. ``ready``: the sockets on which it
        has, when that is known. Raises RedisError, OSError.
        """
        told: list[tuple[Call[Taken], Taken | Exception]] = []
        try:
            if ready is None:
                ready = select.select(list(self._armed), [], [], 0)[0] if self._armed else ()
            for socket in ready:
                name, connection, take = self._armed[socket]
                connection.read_response()
                if take is not None:
                    told.append((take, self._answer(take, connection)))
                del self._armed[socket], self._sockets[name]
                self._spare.append(connection)
        except (RedisError, OSError):
            self.close()
            raise
        return told

    def _answer(self, take: Call[Taken], connection: Any) -> Taken | Exception:
        try:
            return self._shell.answer(take, connection)
        except (RedisConnectionError, RedisTimeoutError, OSError):
            raise
        except (RedisError, RqarmError) as error:
            return error

    def wait(self, other: int, take: Call[Taken]) -> Taken | Exception | None:
        """Sleep until a list or the file ``other`` has something, or the time is over. The answer to the take, if it
        has come. Raises RedisError, OSError.
        """
        told = self.collect()
        if not any(asked is take for asked, _ in told):
            ready, _, _ = select.select([other, *self.arm(take)], [], [], self._seconds + 1)
            if not ready:
                self.close()  # the server should have said so by now
            told = self.collect(socket for socket in ready if socket != other)
        answers = [answer for asked, answer in told if asked is take]
        # two lists may answer: the one first, with nothing, and then the other
        return next((answer for answer in answers if _has_begun(answer)), answers[-1] if answers else None)

    def _ask(self, name: str, take: Call[Taken] | None) -> int:
        connection = self._spare.pop() if self._spare else self._pool.get_connection()
        block = Command(("BLMOVE", name, name, "LEFT", "LEFT", f"{self._seconds:.3f}"), bytes)
        try:
            connection.send_packed_command(self._shell.packed(block, *(() if take is None else (take,))))
        except (RedisError, OSError):
            self._spare.append(connection)  # what is closed, is closed with the others
            raise
        socket = int(connection._sock.fileno())
        self._armed[socket], self._sockets[name] = (name, connection, take), socket
        return socket

    def close(self) -> None:
        """What was sent may be done all the same."""
        for connection in [*self._spare, *(connection for _, connection, _ in self._armed.values())]:
            connection.disconnect()
            self._pool.release(connection)
        for what in (self._armed, self._sockets, self._spare):
            what.clear()


def _has_begun(taken: Taken | Exception) -> bool:
    return isinstance(taken, UnreadableRequest) or (isinstance(taken, Taken) and taken.attempt is not None)


class Lane:
    """One request at a time: the one that runs, and the next, which was taken when that ended."""

    def __init__(self, horse: Horse, index: int) -> None:
        self._horse, self.index = horse, index
        self.number = 0
        self.next: Attempt | None = None
        #: the next turn was asked for, and nobody knows whether the server has given it
        self.is_unanswered = False
        self._is_promised = False

    def promise(self, holds: bool) -> None:
        """Whether a request is being taken, or was taken and has not begun: it counts where the number is limited."""
        if self._horse.is_counting:
            self._horse.promised += holds - self._is_promised
            self._is_promised = holds

    def take(self) -> Call[Taken]:
        """Ask for the next one."""
        return self._horse.take(self.index, self.number + 1)

    def took(self, taken: Taken | Exception) -> str:
        """What was taken is next; else why nothing was. Raises what the server refused with."""
        self.promise(False)
        self.is_unanswered = True
        attempt, reason = self._horse.took(taken)
        self.is_unanswered = False
        if attempt is not None or isinstance(taken, UnreadableRequest):
            self.number += 1
        elif reason == "spent":
            self.number += 1
            self._horse.board.show(self.index, self.number, None)
            reason = ""
        if attempt is not None:
            self.next = attempt
            self.promise(True)
        return reason

    def begin(self, attempt: Attempt) -> Execution:
        """It is in hand, and the parent knows; it runs when the board says that it has begun."""
        horse, number = self._horse, self.number
        run = Execution(horse.core, attempt, horse.worker.name, Hold(lambda: horse.board.must_stop(self.index, number)))
        self.promise(False)
        horse.in_hand += 1
        horse.board.show(self.index, self.number, attempt, 0.0, run.limit)
        return run

    def end(self, run: Execution, *, is_good: bool) -> None:
        """It has ended."""
        self.clear()
        self._horse.ended += 1
        self._horse.board.count(run.spent(), is_good=is_good)

    def clear(self) -> None:
        """It is not in hand any more; when nothing is next, the parent knows that the lane is free."""
        if self.next is None:
            self.promise(False)
            self._horse.board.show(self.index, self.number, None)
        self._horse.in_hand -= 1

    def couple(self, step: Any) -> Batch[Any] | None:
        """With the end of an attempt, take the next in the same round trip. None: the step goes alone."""
        if not is_ending(step) or self.next is not None:
            return None
        self.promise(False)
        if self._horse.why_stop():
            return None
        self.promise(True)
        return Batch((step, self.take()), settles=True)

    def uncouple(self, answers: list[Any]) -> Any:
        """The answer to the step; what was taken with it is next. Raises the step's error."""
        answer, taken = answers
        try:
            self.took(taken)
        except (RedisError, RqarmError) as error:
            log.warning("the next request was not taken: %s", error)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def answer(self, step: Any, ask: Callable[[Any], Any]) -> Any:
        """Ask the server in this thread."""
        coupled = self.couple(step)
        return ask(step) if coupled is None else self.uncouple(ask(coupled))


class Horse:
    """The child's side: what one lane and many have in common."""

    def __init__(self, worker: Worker, board: Board, parent: Connection) -> None:
        self.worker, self.board, self.parent = worker, board, parent
        self.settings = worker.settings
        self.manager: RequestManager = equipment.manager_for(self.settings.namespace, worker.connection)
        self.core = self.manager.core
        #: requests that run, and that have ended
        self.in_hand, self.ended = 0, 0
        #: requests that are being taken or have not begun yet, where there is a quota
        self.promised = 0
        #: what was started but cannot be read by this version
        self.unread: list[Attempt] = []
        self._last, self.is_halted = 0, False
        self._looked, self._next_look, self._is_heavy = 0, 0.0, False

    def run(self) -> None:
        """Obey orders until there are none any more."""
        with contextlib.suppress(EOFError):
            while (order := self.parent.recv()) is not None:
                if isinstance(order, Order):  # else it belonged to the order before
                    self.parent.send((self.serve(order), tuple(queue.name for queue in self.worker.ordered_queues)))
        equipment.close_resources()

    def serve(self, order: Order) -> str:
        """Run requests until there is a reason to come back; which."""
        raise NotImplementedError

    def begin(self, order: Order) -> Waiting:
        """Make ready for an order; what tells when something is queued."""
        self.worker.order_queues(order.queues)
        self._last = self.ended + order.quota if order.quota else 0
        self.is_halted = False
        self.board.wait(0)
        return Waiting(self.manager.shell, self.lists(), self.settings.lease)

    @property
    def is_counting(self) -> bool:
        """Whether there is a quota."""
        return self._last > 0

    def lists(self) -> tuple[str, ...]:
        """RQ's lists in the order that is next."""
        return self.worker.ordered_lists

    def take(self, lane: int, number: int) -> Call[Taken]:
        """Ask for the next request of the lists, to be the lane's turn of this number."""
        name = self.worker.name
        execution = execution_id(self.board.nonce, lane, number)
        return self.core.calls.take(
            self.lists(), execution, taker(name, lane), name, ms(self.settings.lease), for_rq=True
        )

    def took(self, taken: Taken | Exception) -> tuple[Attempt | None, str]:
        """What was taken, and else why nothing was. Raises what the server refused with."""
        if isinstance(taken, UnreadableRequest):
            self.unread.append(taken.attempt)
            log.warning("%s", taken)
            return None, ""
        if isinstance(taken, Exception):
            raise taken
        if taken.attempt is not None and taken.list:
            self.worker.reorder_after(taken.list)
        return taken.attempt, taken.reason

    def messages(self) -> Iterator[Any]:
        """What the parent has said meanwhile. A ``halt`` counts at once."""
        while self.parent.poll():
            message = self.parent.recv()
            self.is_halted = self.is_halted or message == "halt"
            yield message

    def why_stop(self) -> str:
        """Why nothing more is taken beside, or instead of, what is in hand; "" = go on."""
        if self.is_halted:
            return "stopped"
        if time.monotonic() - self.board.watched_at() > self.settings.lease / 2:
            return "deserted"  # nobody renews: it comes back, and waits for the parent
        if self._last and self.ended + self.in_hand + self.promised >= self._last:
            return "quota"
        return "worn" if self._is_worn() else ""

    def _is_worn(self) -> bool:
        """Whether this process should be replaced."""
        done = self.ended + self.in_hand
        if self.settings.max_jobs_per_horse and done >= self.settings.max_jobs_per_horse:
            return True
        if not self.settings.max_horse_memory or not done or self._is_heavy:
            return self._is_heavy
        now = time.monotonic()
        if done - self._looked >= LOOKS or now >= self._next_look:
            self._looked, self._next_look = done, now + LOOK_AFTER
            self._is_heavy = resident_mib() > self.settings.max_horse_memory
        return self._is_heavy

    def let_go(self, attempt: Attempt) -> None:
        """It was taken and must not begin: another worker gets it."""
        try:
            self.manager.shell.run(flows.release(self.core, attempt))
        except LeaseLost:
            log.debug("%s: handed back before", attempt.key)
        except (RedisError, RqarmError) as error:
            log.warning("%s: not handed back, its lease ends: %s", attempt.key, error)

    def give_up(self, lane: int, number: int) -> None:
        """What was asked for and never answered: should the server have given it, it goes back; else it never will."""
        asked = taken_as(self.core, self.board, self.worker.name, lane, number, is_last=True)
        try:
            taken = self.manager.shell.execute(asked)
            if taken.attempt is not None:
                self.manager.shell.run(flows.release(self.core, taken.attempt))
            self.board.show(lane, number, None)
        except (RedisError, RqarmError) as error:
            log.warning("a request may be lost to us until its lease ends: %s", error)

    def hand_back(self) -> None:
        """Release what cannot be read here. Raises RedisError, RqarmError."""
        while self.unread:
            with contextlib.suppress(LeaseLost):  # then somebody else sees to it
                self.manager.shell.run(flows.hand_back_unread(self.core, self.unread[-1]))
            self.unread.pop()

    def conclude(self, run: Execution, error: BaseException | None) -> None:
        """What is left to do in RQ when a request has not simply completed."""
        try:
            if error is not None:
                self._tell_rq(run.attempt, error)
            elif run.outcome in LEAVING_A_JOB:
                self.manager.shell.run(flows.drop_job(self.core, run.attempt))
        except NoSuchJobError:
            log.debug("%s: its RQ job %s is gone", run.attempt.key, run.attempt.job_id)
        except (RedisError, RqarmError) as refusal:
            log.warning("%s: RQ was not told of its end: %s", run.attempt.key, refusal)
        except Exception:
            log.exception("%s: RQ could not note its end", run.attempt.key)

    def _tell_rq(self, attempt: Attempt, error: BaseException) -> None:
        """RQ's own machinery notes the failure: registry, result, exception handlers."""
        worker = self.worker
        job, queue = fetch_job(worker, attempt.job_id)
        job.perform = partial(_raise, error)  # type: ignore[method-assign]
        job.redis_server_version = worker.get_redis_server_version()  # type: ignore[no-untyped-call]
        worker.perform_job(job, queue, worker.prepare_execution(job))


class OneHorse(Horse):
    """One request at a time, in the main thread, where an alarm can end it.

    Behind requests of quick routes the next one is taken ahead, and nobody waits for the server: it stores one result
    and hands out the request after the next while this process is at the next. What was taken ahead and has to wait,
    because the one before it is slow, goes back; if that was not to be known, the parent sees to it.
    """

    def __init__(self, worker: Worker, board: Board, parent: Connection) -> None:
        super().__init__(worker, board, parent)
        #: the last turn that was asked for; a turn's place on the board is its number modulo the lanes
        self._number = 0
        #: taken and not begun
        self._ahead: deque[_Ride] = deque()
        #: ended, and the server has not answered yet; with each of them something is taken
        self._resting: deque[_Ride] = deque()
        self._reason = ""
        #: the horse has waited for the one that runs, and nothing stood behind that
        self._is_lone = False
        #: turns that were asked for, and of which nobody knows whether the server has given them
        self._unanswered: deque[int] = deque()
        #: the take of one of them that waits on the server, behind an empty list
        self._armed: Call[Taken] | None = None
        #: a wait has failed, and the take behind it may have begun something
        self._is_unheard = False
        #: seconds that a request of a route takes, on average
        self._paces: dict[str, float] = {}
        self._alarm = Alarm()

    def serve(self, order: Order) -> str:
        waiting = self.begin(order)
        self._reason = ""
        try:
            reason = self._serve(order, waiting)
        finally:
            waiting.close()
        self._armed = None
        while self._unanswered:
            number = self._unanswered.popleft()
            self.give_up(number % self.board.lanes, number)
        return reason

    def _serve(self, order: Order, waiting: Waiting) -> str:
        while True:
            while self._resting and not (self._ahead and self._is_quick(self._ahead[0])):
                self._settle()
            if self._ahead:
                self._run(self._ahead.popleft())
                continue
            reason = self.why_stop() or self._patiently(self._ask)
            if reason == "empty" and not order.is_burst:
                self._patiently(lambda: self._sleep(waiting))
            elif reason:
                return reason

    def why_stop(self) -> str:
        if self.board.is_called():
            for _ in self.messages():
                pass  # a stop of what runs is on the board
        return super().why_stop()

    def _ask(self) -> str:
        """Take the next one; why there is none. What the last round trip has said is not asked again."""
        if self._reason:
            reason, self._reason = self._reason, ""
            return reason
        self.hand_back()
        number = self._next_turn()
        try:
            taken: Taken | Exception = self.manager.shell.execute(self._take(number))
        except UnreadableRequest as unread:
            taken = unread
        return self._heard(number, taken)

    def _next_turn(self) -> int:
        """The turn to ask for: one that was never answered, else a new one."""
        if not self._unanswered:
            self._number += 1
            self._unanswered.append(self._number)
        return self._unanswered[0]

    def _heard(self, number: int, taken: Taken | Exception) -> str:
        """The answer for the turn that is asked for."""
        if self._armed is not None and isinstance(taken, Taken) and taken.reason not in ("", "spent"):
            return taken.reason  # it has not begun, and the server has another call for it
        self._unanswered.popleft()
        self._armed = None
        return self._took(number, taken)

    def _take(self, number: int) -> Call[Taken]:
        return self.take(number % self.board.lanes, number)

    def _took(self, number: int, taken: Taken | Exception) -> str:
        """What was taken is ahead; else why nothing was. Raises what the server refused with."""
        attempt, reason = self.took(taken)
        lane = number % self.board.lanes
        if attempt is None:
            self.board.show(lane, number, None)
            reason = "" if reason == "spent" else reason
        else:
            self.in_hand += 1
            hold = Hold(lambda: self.board.must_stop(lane, number))
            run = Execution(self.core, attempt, self.worker.name, hold)
            run.stopper = self._alarm
            self.board.show(lane, number, attempt, 0.0, run.limit)
            self._ahead.append(_Ride(number, lane, run, execution.Drive(run, self.manager.shell)))
        return reason

    def _run(self, ride: _Ride) -> None:
        """Call the handler, and begin the end."""
        if not self._is_quick(ride):
            while self._ahead:
                self._let_go(self._ahead.pop())  # the last one first: each goes to the front
        ride.run.began = time.monotonic()
        self.board.wait(0)
        # that it has begun must be seen before we look whether it may
        self.board.begin(ride.lane, ride.run.began)
        if self.is_halted or ride.run.hold.is_lost():
            self._let_go(ride)
            return
        self._alarm.limit = ride.run.limit
        failure: BaseException | None = None
        try:
            ride.step = ride.drive.run(self.manager.shell.execute, rests_at=is_ending)
        except BaseException as error:  # noqa: BLE001 -- the handler's, and the request has failed for it
            failure = error
        ride.run.end_clock()
        self._learn(ride)
        if ride.step is None:
            self._conclude(ride, failure)
        else:
            self._end(ride)

    def _learn(self, ride: _Ride) -> None:
        spent = ride.run.spent()
        for family in (ride.run.family, ALL):
            known = self._paces.get(family, spent)
            self._paces[family] = known + NEWEST * (spent - known)

    def _is_quick(self, ride: _Ride) -> bool:
        """Whether its like are quick, and those before it were: else what is taken ahead would mostly go back."""
        pace = self._paces.get(ALL, math.inf)
        return max(pace, self._paces.get(ride.run.family, pace)) < QUICK

    def _end(self, ride: _Ride) -> None:
        """Tell the server of the end, and take what is next with it; hear what it says of the one before."""
        wanted = 0
        if self._is_lone:
            # there is most likely nothing to take: the end goes alone, and waiting on the server is also asking
            self._is_lone, self._reason = False, "empty"
        if not self._reason and not self._unanswered and not self.why_stop():
            asked = sum(len(resting.numbers) for resting in self._resting)
            wanted = (2 if self._is_quick(ride) else 1) - len(self._ahead) - asked
            wanted = max(0, min(wanted, self._room() - asked))
        ride.numbers = tuple(range(self._number + 1, self._number + 1 + wanted))
        self._number += wanted
        ride.sent = self.manager.shell.send(Batch((ride.step, *map(self._take, ride.numbers)), settles=True))
        self.board.begin(ride.lane, RESTING)
        self._resting.append(ride)
        if len(self._resting) > 1:
            self._settle()

    def _room(self) -> int:
        """How many more may be taken in place of the one that ends."""
        ends = [end for end in (self._last, self.settings.max_jobs_per_horse) if end]
        return max(0, min(ends) - self.ended - self.in_hand) if ends else PLACES

    def _settle(self) -> None:
        """Hear what the server says of the one that has rested longest, and finish it."""
        ride = self._resting.popleft()
        assert ride.sent is not None
        try:
            answers = self.manager.shell.receive(ride.sent)
        except (RedisError, RqarmError) as error:
            answers = [error]
        self._go_on(ride, answers)

    def _go_on(self, ride: _Ride, answers: list[Any]) -> None:
        answer, *taken = answers
        for number, each in zip_longest(ride.numbers, taken, fillvalue=answer):
            try:
                self._reason = self._took(number, each) or self._reason
            except (RedisError, RqarmError) as error:
                log.warning("the next request was not taken: %s", error)
                self._unanswered.append(number)
        ride.drive.answer(answer)
        failure: BaseException | None = None
        try:
            ride.drive.run(self.manager.shell.execute)
        except BaseException as error:  # noqa: BLE001 -- the handler's, and the request has failed for it
            failure = error
        self._conclude(ride, failure)

    def _conclude(self, ride: _Ride, failure: BaseException | None) -> None:
        self.conclude(ride.run, failure)
        self._clear(ride)
        self.ended += 1
        self.board.count(ride.run.spent(), is_good=failure is None)

    def _let_go(self, ride: _Ride) -> None:
        self.let_go(ride.run.attempt)
        self._clear(ride)

    def _clear(self, ride: _Ride) -> None:
        self.in_hand -= 1
        self.board.show(ride.lane, ride.number, None)

    def _sleep(self, waiting: Waiting) -> str:
        """Until something is queued, or the parent speaks. What was queued has been taken then."""
        self.board.wait(self.board.waits_since() or time.monotonic())
        if self._is_unheard:
            self._reason = self._ask()  # it would be in no list any more
            self._is_unheard = False
            return ""
        number = self._next_turn()
        self._armed = self._armed or self._take(number)
        self._is_unheard = True
        taken = waiting.wait(self.parent.fileno(), self._armed)
        self._is_unheard = False
        self._is_lone = not (isinstance(taken, Taken) and taken.left)
        if taken is None or self.board.is_called():
            for _ in self.messages():
                pass
        if isinstance(taken, Taken | UnreadableRequest):
            self._reason = self._heard(number, taken)
        return ""

    def _patiently(self, ask: Callable[[], str]) -> str:
        """Ask until the server answers or the parent says something."""
        for refusals in count(1):
            try:
                return ask()
            except (RedisError, RqarmError, OSError) as error:
                pause = pause_after(refusals)
                log.warning("the server refused, asking again in %.1f s: %s", pause, error)
                if self.parent.poll(pause):
                    break
        return ""


@dataclass(slots=True)
class _Ride:
    """One turn of OneHorse. ``step``: with which it ends; ``numbers``: the turns that are taken with that."""

    number: int
    lane: int
    run: Execution
    drive: execution.Drive
    step: Any = None
    numbers: tuple[int, ...] = ()
    sent: Sent | None = None


def is_ending(step: Any) -> bool:
    """Whether this is the step with which an attempt ends."""
    return isinstance(step, Call) and step.script.name in ENDINGS


def taker(worker: str, lane: int) -> str:
    """Who asks for the work of a lane."""
    return f"{worker}/{lane}"


def execution_id(nonce: str, lane: int, number: int) -> str:
    """The id of a lane's turn. So the parent of a dead horse can ask what the turn not yet on the board has taken."""
    return f"{nonce}.{lane}.{number}"


def taken_as(core: flows.Core, board: Board, worker: str, lane: int, number: int, *, is_last: bool) -> Call[Taken]:
    """What this turn has taken. ``is_last``: it takes nothing any more, whatever is still on its way."""
    execution, lease_ms = execution_id(board.nonce, lane, number), ms(core.settings.lease)
    return core.calls.take((), execution, taker(worker, lane), worker, lease_ms, for_rq=True, is_last=is_last)


def resident_mib() -> float:
    """Memory of this process that lies in RAM."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / _MIB
    except OSError:
        # no /proc: the peak is all that is known; macOS counts bytes, others KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / _MIB if sys.platform == "darwin" else peak / 1024


def _raise(error: BaseException) -> None:
    raise error


def gallop(worker: Worker, board: Board, parent: Connection) -> None:
    """The life of a horse, from the fork to its end. Never returns."""
    code = 1
    try:
        random.seed()
        for stream in (sys.stdout, sys.stderr):
            # what a handler has printed must not be lost with the process
            with contextlib.suppress(AttributeError, ValueError, OSError):
                stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # systemd tells the whole group; the parent decides. A function, because what is ignored stays so in children.
        signal.signal(signal.SIGTERM, lambda *_: None)
        make(worker, board, parent).run()
        code = 0
    except BaseException:
        log.exception("the horse stumbled")
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError, OSError):
                if isinstance(stream, PrintedLines):
                    stream.drain()
                stream.flush()
        os._exit(code)


def make(worker: Worker, board: Board, parent: Connection) -> Horse:
    """The engine that fits the concurrency."""
    if worker.settings.concurrency == 1:
        return OneHorse(worker, board, parent)
    from rqarm.worker.lanes import ManyHorse

    return ManyHorse(worker, board, parent)
