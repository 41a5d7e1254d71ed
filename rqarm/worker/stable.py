"""The parent's side of a warm horse: fork it, give it orders, watch over what it runs, and account for its death."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq.worker import WorkerStatus

from rqarm import flows, packing
from rqarm.calls import Batch, ms
from rqarm.errors import LeaseLost, RequestUnknown, RqarmError
from rqarm.handlers import Match
from rqarm.manager import RequestManager
from rqarm.model import State
from rqarm.quarantine import note_for
from rqarm.replies import Attempt, Taken, UnreadableRequest
from rqarm.shell import sibling
from rqarm.worker import equipment, execution
from rqarm.worker.board import Board, Turn
from rqarm.worker.execution import WorkHorseDied
from rqarm.worker.horse import PLACES, Order, gallop, taken_as
from rqarm.worker.limits import TimeLimit
from rqarm.worker.patience import pause_after
from rqarm.worker.processes import kill_group
from rqarm.worker.shown import Shown

if TYPE_CHECKING:
    from rqarm.worker.rqworker import Worker

log = logging.getLogger("rqarm.worker")

#: seconds between two looks at a horse that is busy, and at one that waits for work; at most half a renewal
TICK, IDLE_TICK = 0.25, 1.0
#: seconds beyond the handler's limit after which the parent kills a horse that does not listen to it
HARD_GRACE = 5.0
#: seconds that a handler has to stop by itself when its request is cancelled
CANCEL_GRACE = 1.0
#: seconds that a horse without work has to tear down its resources
RETIREMENT = 10.0
#: seconds that the server has at the least to answer a renewal
LEAST_PATIENCE = 0.25
#: states in which an attempt's own end leaves its request
ENDED = (State.COMPLETED, State.FAILED, State.PENDING)


@dataclass(slots=True)
class _Run:
    """One turn that the horse runs. ``death``: why the parent stops it; "" = it does not. ``doomed``: when it kills."""

    turn: Turn
    renewed: float
    shown: Shown | None = None
    death: str = ""
    doomed: float = 0.0
    is_ending: bool = False
    #: nothing waits behind it any more
    is_alone: bool = False


@dataclass(slots=True)
class _Animal:
    """A forked horse."""

    pid: int
    board: Board
    line: Connection
    file: int | None
    #: whoever holds it knows that the process has not been reaped, or that ``is_gone``
    life: threading.Lock = field(default_factory=threading.Lock)
    is_gone: threading.Event = field(default_factory=threading.Event)

    def tell(self, message: Any) -> None:
        """Something in the middle of an order."""
        with contextlib.suppress(OSError):
            self.line.send(message)
        self.board.call()

    def close(self) -> None:
        with self.life:
            self.is_gone.set()
            self.board.close()
        self.line.close()
        if self.file is not None:
            os.close(self.file)


class Stable:
    """At most one horse at a time, for one worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.settings = worker.settings
        self._horse: _Animal | None = None
        self._runs: dict[tuple[int, int], _Run] = {}
        self._ended_before = 0
        self._told: tuple[int, float] = (0, 0.0)
        self._stopped_jobs: set[str] = set()
        self._manager: RequestManager | None = None
        #: the main thread is with the horse, and is to come back for good
        self.is_serving, self.is_leaving = False, False
        #: a pipe that wakes the main thread; a worker that only looks at another has none
        self._ear = self._bell = -1
        #: seconds between two looks at a horse that is busy, and at one that waits for work
        self._tick = min(TICK, self.settings.renewal_or_default / 2)
        self._idle_tick = min(IDLE_TICK, self.settings.renewal_or_default / 2)

    @property
    def ended(self) -> int:
        """Requests that have ended under this worker."""
        return self._ended_before + (self._horse.board.counters()[0] if self._horse is not None else 0)

    @property
    def manager(self) -> RequestManager:
        """A manager that does not wait longer for the server than a lease can stand: a renewal that is lost with its
        connection is sent again on another one before two thirds of the lease are over.
        """
        if self._manager is None:
            left = self.settings.lease * 2 / 3 - self.settings.renewal_or_default
            patience = max(LEAST_PATIENCE, left / 2 - self._tick)
            options = {"socket_timeout": patience, "socket_connect_timeout": patience, "retry": Retry(NoBackoff(), 1)}
            client = sibling(self.worker.connection, **options)
            self._manager = RequestManager(connection=client, namespace=self.settings.namespace)
        return self._manager

    # -- for other threads and signal handlers

    def wake(self) -> None:
        """The main thread looks now."""
        if self._bell >= 0:
            with contextlib.suppress(BlockingIOError):
                os.write(self._bell, b".")

    def halt(self) -> None:
        """The horse takes nothing more, whatever keeps the main thread busy. Safe in a signal handler."""
        horse = self._horse
        if horse is not None:
            horse.tell("halt")

    @property
    def busy_pid(self) -> int:
        """The horse, while it runs something; else 0."""
        horse = self._horse
        return horse.pid if horse is not None and any(turn.began > 0 for turn in horse.board.turns()) else 0

    def stop_job(self, job_id: str) -> bool:
        """Cancel the request of a running RQ job. False: it does not run here."""
        horse = self._horse
        if horse is None or all(turn.job_id != job_id for turn in horse.board.turns()):
            return False
        self._stopped_jobs.add(job_id)
        self.wake()
        return True

    # -- orders

    def serve(self, order: Order, max_idle_time: float | None) -> str:
        """Let the horse run requests until it has a reason to come back; which.

        ``empty`` (in burst mode), ``foreign``, ``suspended``, ``quota``, ``stopped``; ``bored`` after ``max_idle_time``
        seconds without work.
        """
        worker = self.worker
        quota_end = self.ended + order.quota if order.quota else 0
        worker.set_state(WorkerStatus.IDLE)
        # whoever asks us to stop must know that there may be something to finish
        worker._state = WorkerStatus.BUSY
        stillborn = 0
        if self._bell < 0:
            self._ear, self._bell = os.pipe()
            os.set_blocking(self._ear, False)
            os.set_blocking(self._bell, False)
        self.is_serving = True
        try:
            while True:
                if order.quota:
                    order = Order(order.queues, quota_end - self.ended, order.is_burst)
                before = self.ended
                reason, names = self._ride(order, max_idle_time)
                if names:
                    worker.order_queues(names)
                    order = Order(names, order.quota, order.is_burst)
                if reason not in ("worn", "dead"):
                    return reason
                if quota_end and self.ended >= quota_end:
                    return "quota"
                if worker._stop_requested or self.is_leaving:
                    return "stopped"
                stillborn = stillborn + 1 if reason == "dead" and self.ended == before else 0
                if stillborn > 1:
                    time.sleep(pause_after(stillborn))
        except SystemExit:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # somebody impatient must not interrupt what comes now
            self._end_horse("shutdown")
            raise
        finally:
            self.is_serving = False
            worker._state = WorkerStatus.IDLE

    def _ride(self, order: Order, max_idle_time: float | None) -> tuple[str, tuple[str, ...]]:
        """One horse, one order: why it ended, and RQ's queues in the order that is next."""
        horse = self._horse or self._fork()
        horse.board.watch(time.monotonic())
        try:
            horse.line.send(order)
        except OSError:
            return self._mourn(horse), ()
        is_halted, deadline = False, 0.0
        is_bored = False
        while True:
            now = time.monotonic()
            if (self.worker._stop_requested or self.is_leaving or is_bored) and not is_halted:
                is_halted, deadline = True, now + self.settings.shutdown_timeout
                horse.tell("halt")
            if is_halted and now > deadline:
                log.warning("not finished within %g s: handed back", self.settings.shutdown_timeout)
                self._end_horse("shutdown")
                return "stopped", ()
            pause = self._tick
            if (idle_since := horse.board.waits_since()) and not is_halted:
                pause = self._idle_tick
                if max_idle_time is not None:
                    pause = max(0.0, min(pause, max_idle_time - (now - idle_since)))
                    is_bored = now - idle_since >= max_idle_time
            message = self._hear(horse, pause)
            if message == "dead":
                return self._mourn(horse), ()
            if message is not None:
                reason, names = message
                self._watch(horse)
                if reason == "worn":
                    self.retire()
                return "bored" if is_bored and reason == "stopped" else reason, names
            self._watch(horse)
            self._maintain()

    def _hear(self, horse: _Animal, pause: float) -> Any:
        """What the horse says within ``pause`` seconds: ``dead`` when that is all it can say, None for nothing."""
        sources: list[Any] = [horse.line, self._ear]
        if horse.file is not None:
            sources.append(horse.file)
        ready = wait(sources, pause)
        if self._ear in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._ear, 4096)
        if horse.line in ready:
            try:
                return horse.line.recv()
            except (EOFError, OSError):
                return "dead"
        return "dead" if horse.file in ready else None

    def _fork(self) -> _Animal:
        board = Board(self.settings.concurrency if self.settings.concurrency > 1 else PLACES)
        ours, theirs = Pipe()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError, OSError):
                stream.flush()  # what is buffered would be printed twice
        pid = os.fork()
        if pid == 0:
            try:
                os.setpgrp()
                self.worker._is_horse = self.worker.is_warm = True
                ours.close()
            finally:
                gallop(self.worker, board, theirs)
        theirs.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)  # the horse does so too; whoever comes first
        file = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
        self._horse = horse = _Animal(pid, board, ours, file)
        threading.Thread(target=self._guard, args=(horse,), name="guard", daemon=True).start()
        return horse

    def retire(self) -> None:
        """End a horse that runs nothing; it tears down what handlers have built."""
        horse = self._horse
        if horse is None:
            return
        with contextlib.suppress(OSError):
            horse.line.send(None)
        wait([horse.line if horse.file is None else horse.file], RETIREMENT)
        self._bury(horse)

    def close(self) -> None:
        """The worker ends: no horse, and nothing of the parent's own stays open."""
        self.retire()
        if self._manager is not None:
            client = self._manager.connection
            self._manager.close()
            client.close()
            client.connection_pool.disconnect()
            self._manager = None
        if self._bell >= 0:
            os.close(self._ear)
            os.close(self._bell)
            self._ear = self._bell = -1

    # -- watching

    def _guard(self, horse: _Animal) -> None:
        """In a thread: renew while the main thread waits for a server that is silent, and end a horse whose leases run
        out all the same.
        """
        looked, pause = time.monotonic(), self._tick
        while not horse.is_gone.wait(pause):
            now = time.monotonic()
            with horse.life:
                if horse.is_gone.is_set():
                    return
                # what was handed back stands on the board until the horse looks at it, and has no lease any more
                runs = [run for turn in horse.board.turns() if (run := self._run_of(turn, now)).death != "ahead"]
                # who was stopped leaves the first word to the main thread, which asks whether the lease still holds
                was_awake = now - looked < self.settings.lease / 3
                if was_awake and any(now - run.renewed > self.settings.lease * 2 / 3 for run in runs):
                    log.warning("no lease was renewed for two thirds of one: the work horse is killed")
                    kill_group(horse.pid, signal.SIGKILL)
                    return
                pause = self._idle_tick if horse.board.waits_since() else self._tick
            due = self.settings.renewal_or_default + self._tick
            self._renew([run for run in runs if not run.death and now - run.renewed >= due], now)
            looked = time.monotonic()

    def _run_of(self, turn: Turn, now: float) -> _Run:
        """What is known of a turn; it counts as renewed when it began."""
        return self._runs.setdefault((turn.lane, turn.number), _Run(turn, turn.began if turn.began > 0 else now))

    def _watch(self, horse: _Animal) -> None:
        """Renew, show, stop: all that the horse runs now."""
        now = time.monotonic()
        horse.board.watch(now)
        turns = {(turn.lane, turn.number): turn for turn in horse.board.turns()}
        for gone in [self._runs.pop(place) for place in list(self._runs) if place not in turns]:
            if gone.shown is not None:
                gone.shown.hide(self.worker)
        for turn in turns.values():
            self._run_of(turn, now).turn = turn  # what was taken ahead begins later
        runs = list(self._runs.values())
        self._renew(
            [run for run in runs if not run.death and now - run.renewed >= self.settings.renewal_or_default], now
        )
        self._free_the_waiting(horse, now)
        for run in runs:
            if run.shown is not None and run.renewed == now:
                run.shown.refresh(self.worker)
            self._judge(horse, run, now)
            if run.shown is None and not run.death and run.turn.began > 0:
                run.shown = Shown.when_long(self.worker, run.turn, now)
        if any(run.doomed and now >= run.doomed for run in runs):
            kill_group(horse.pid, signal.SIGKILL)
        self._tell_rq(horse, is_busy=any(run.shown is not None and run.shown.is_real for run in runs))

    def _free_the_waiting(self, horse: _Animal, now: float) -> None:
        """What was taken ahead goes to others when the one before it takes long, though its like are quick."""
        runs = list(self._runs.values())
        long = [run for run in runs if run.turn.began > 0 and now - run.turn.began > TICK and not run.is_alone]
        if self.settings.concurrency > 1 or not long:
            return
        try:
            for run in runs:
                if not run.turn.began and not run.death and self._may_not_begin(horse, run.turn.lane, run.turn.number):
                    run.death = "ahead"
                    self._account_for(run, "")
            for lane, number in self._unshown(horse.board):
                if self._may_not_begin(horse, lane, number):
                    attempt = self._taken_as(horse.board, lane, number)
                    if attempt is None:
                        horse.board.allow(lane)
                    else:
                        self._release(attempt)
            long[0].is_alone = True
        except (RedisError, RqarmError) as error:
            log.warning("what was taken ahead was not handed back: %s", error)

    @staticmethod
    def _may_not_begin(horse: _Animal, lane: int, number: int) -> bool:
        """Forbid a turn. False: the horse was first, and has begun it or hands it back itself."""
        horse.board.stop(lane, number)
        last, turn = horse.board.look(lane)
        if last < number or (turn is not None and turn.number == number and not turn.began):
            return True
        horse.board.allow(lane)
        return False

    def _renew(self, runs: list[_Run], now: float) -> None:
        if not runs:
            return
        core = self.manager.core
        calls = [core.calls.renew(run.turn.as_attempt(), ms(self.settings.lease)) for run in runs]
        try:
            answers = self.manager.shell.execute(Batch(tuple(calls), settles=True))
        except (RedisError, RqarmError) as error:
            log.warning("leases were not renewed: %s", error)
            return
        for run, answer in zip(runs, answers, strict=True):
            if not isinstance(answer, Exception):
                run.renewed = now
            elif isinstance(answer, LeaseLost) and answer.state in ENDED and (run.turn.began < 0 or not run.is_ending):
                # most likely by the horse itself, which is now telling RQ
                run.is_ending, run.renewed = True, now
            elif isinstance(answer, LeaseLost):
                run.death = run.death or str(answer.state)
                log.warning("%s: %s", run.turn.key, answer)
            else:
                log.warning("%s: the lease was not renewed: %s", run.turn.key, answer)

    def _judge(self, horse: _Animal, run: _Run, now: float) -> None:
        """Whether the horse must die for what it runs."""
        if run.doomed or run.death == "ahead":
            return
        if run.turn.job_id in self._stopped_jobs:
            self._stopped_jobs.discard(run.turn.job_id)
            run.death, run.doomed = "stopped", now
            if self.settings.concurrency > 1:
                # others run beside it: it gets the chance to stop alone
                run.doomed = now + CANCEL_GRACE
                self._cancel(run)
        elif run.death:
            run.doomed = now + CANCEL_GRACE
        elif now - run.renewed > self.settings.lease * 2 / 3:
            run.death, run.doomed = "lease", now
        elif run.turn.began > 0 and now - run.turn.began > run.turn.limit + HARD_GRACE:
            run.death, run.doomed = "time limit", now
        if run.doomed:
            horse.board.stop(run.turn.lane, run.turn.number)
            horse.tell(("stop", run.turn.lane, run.turn.number))

    def _cancel(self, run: _Run) -> None:
        try:
            self.manager.shell.run(flows.cancel(self.manager.core, run.turn.key))
        except (RedisError, RqarmError) as error:
            log.warning("%s: not cancelled: %s", run.turn.key, error)

    def _tell_rq(self, horse: _Animal, *, is_busy: bool) -> None:
        """The worker's own record in RQ: its state and its counters."""
        worker = self.worker
        _, completed, seconds = horse.board.counters()
        state = WorkerStatus.BUSY if is_busy else WorkerStatus.IDLE
        known, worked = self._told
        is_news = completed > known and (not self._runs or completed - known >= 1000)
        if state == worker.shown_state and not is_news:
            return
        try:
            with worker.connection.pipeline() as pipeline:
                if state != worker.shown_state:
                    worker.set_state(state, pipeline=pipeline)
                    worker._state = WorkerStatus.BUSY
                if completed > known:
                    pipeline.hincrby(worker.key, "successful_job_count", completed - known)
                    pipeline.hincrbyfloat(worker.key, "total_working_time", seconds - worked)
                pipeline.execute()
            self._told = (completed, seconds)
        except RedisError as error:
            log.warning("the worker's record was not updated: %s", error)

    def _maintain(self) -> None:
        worker = self.worker
        if time.monotonic() >= worker.next_heartbeat:
            worker.heartbeat()
        if worker.should_run_maintenance_tasks:
            worker.run_maintenance_tasks()

    # -- ends

    def _end_horse(self, death: str) -> None:
        """Kill the horse; what it runs ends as ``death`` says."""
        horse = self._horse
        if horse is None:
            return
        for turn in horse.board.turns():
            run = self._runs.setdefault((turn.lane, turn.number), _Run(turn, turn.began))
            run.death = run.death or death
        kill_group(horse.pid, signal.SIGKILL)
        self._mourn(horse)

    def _mourn(self, horse: _Animal) -> str:
        """The horse is dead. What it left open, nobody else can end so soon."""
        horse_runs = self._last_runs(horse)
        orphans = self._orphans(horse)
        pid, status, usage = self._bury(horse)
        obituary = _obituary(status, usage)
        is_killed_for_one = any(run.doomed for run in horse_runs)
        for run in horse_runs:
            if not run.turn.began:
                run.death = "ahead"
            elif not run.death:
                run.death = "beside" if is_killed_for_one else "crash"
            self.worker.patiently(lambda run=run: self._account_for(run, obituary))  # type: ignore[misc]
            if run.death in ("crash", "time limit", "lease", "stopped"):
                Shown.mourn(self.worker, run.turn, run.shown, run.death, (pid, status, usage), obituary)
            elif run.shown is not None:
                run.shown.hide(self.worker)
        for attempt in orphans:
            self.worker.patiently(lambda attempt=attempt: self._release(attempt))  # type: ignore[misc]
        return "dead"

    def _last_runs(self, horse: _Animal) -> list[_Run]:
        runs = []
        for turn in horse.board.turns():
            run = self._runs.pop((turn.lane, turn.number), None) or _Run(turn, turn.began)
            run.turn = turn  # as the board has it now
            runs.append(run)
        for run in list(self._runs.values()):  # the guard may add one
            if run.shown is not None:
                run.shown.hide(self.worker)
        self._runs.clear()
        return runs

    def _orphans(self, horse: _Animal) -> list[Attempt]:
        """What the horse had taken but not yet shown: no handler has seen it."""
        board = horse.board
        found = [
            self.worker.patiently(lambda turn=turn: self._taken_as(board, *turn, is_dead=True))  # type: ignore[misc]
            for turn in self._unshown(board)
        ]
        return [attempt for attempt in found if attempt is not None]

    def _taken_as(self, board: Board, lane: int, number: int, *, is_dead: bool = False) -> Attempt | None:
        """What the horse has taken to be this turn. If it is dead, what it has sent takes nothing any more."""
        call = taken_as(self.manager.core, board, self.worker.name, lane, number, is_last=is_dead)
        try:
            taken: Taken = self.manager.shell.execute(call)
        except UnreadableRequest as unread:
            return unread.attempt
        return taken.attempt

    def _unshown(self, board: Board) -> list[tuple[int, int]]:
        """The turns that may have been taken, and are not on the board yet."""
        last = [board.look(lane)[0] for lane in range(board.lanes)]
        if self.settings.concurrency > 1:
            return [(lane, number + 1) for lane, number in enumerate(last)]
        return [(number % board.lanes, number) for number in (max(last) + 1, max(last) + 2)]

    def _account_for(self, run: _Run, obituary: str) -> None:
        """End the attempt as the death of its process says, and say so."""
        core, shell = self.manager.core, self.manager.shell
        request = shell.run(flows.find(core, run.turn.key))
        if request is None:
            return
        attempt = run.turn.as_attempt(request)
        outcome = run.death
        error: Exception | None = None
        try:
            if run.death == "time limit":
                message = f"the handler did not stop at its limit of {run.turn.limit:g} s and was killed"
                outcome, error = "failed", TimeLimit(message)
                shell.run(execution.fail_for_good(core, attempt, error, self._match(attempt)))
            elif run.death == "stopped":
                outcome = "cancelled"
                shell.run(flows.cancel(core, attempt.key))
            elif run.death in ("shutdown", "beside", "ahead"):
                outcome = "handed back"
                shell.run(flows.release(core, attempt))
            elif run.death in ("crash", "lease"):
                error = WorkHorseDied(obituary)
                note = note_for(self._match(attempt), attempt.kwargs)
                outcome = shell.run(flows.crash(core, attempt, packing.pack_error("WorkHorseDied", obituary, ""), note))
                if outcome not in ("requeued", "quarantined"):
                    raise LeaseLost(attempt.key, outcome)
                if outcome == "quarantined":
                    execution.attend(self.manager)
            else:
                outcome = f"given up ({run.death})"
                shell.run(flows.drop_job(core, attempt))
        except (LeaseLost, RequestUnknown):
            # it has ended by itself, and said so, before it died
            run.death = "ended"
            shell.run(flows.drop_job(core, attempt))
            return
        ran = time.monotonic() - run.turn.began if run.turn.began > 0 else 0.0
        match = self._match(attempt)
        execution.tell(core, attempt, self.worker.name, match.route if match else None, outcome, ran, error)

    @staticmethod
    def _match(attempt: Attempt) -> Match | None:
        try:
            return equipment.handlers().match(attempt.request)
        except RqarmError:
            return None

    def _release(self, attempt: Attempt) -> None:
        with contextlib.suppress(LeaseLost):
            self.manager.shell.run(flows.release(self.manager.core, attempt))

    def _bury(self, horse: _Animal) -> tuple[int, int, Any]:
        """Reap the process; what its handlers left running goes with it."""
        kill_group(horse.pid, signal.SIGKILL)
        pid, status, usage = horse.pid, 0, None
        with horse.life, contextlib.suppress(ChildProcessError):
            horse.is_gone.set()
            self._runs.clear()
            pid, status, usage = os.wait4(horse.pid, 0)
        self._tell_rq(horse, is_busy=False)
        self._ended_before += horse.board.counters()[0]
        self._told = (0, 0.0)
        self._horse = None
        horse.close()
        return pid, status, usage


def _obituary(status: int, usage: Any) -> str:
    """What is known of a death, for the record."""
    peak_mib = usage.ru_maxrss // 1024 if usage is not None else 0
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"the process was killed by {name}, at most {peak_mib} MiB used"
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return "the process ended without a result (exit code 0)"
    return f"the process exited with code {code}, at most {peak_mib} MiB used"
