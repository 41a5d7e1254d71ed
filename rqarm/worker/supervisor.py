"""One process that keeps N worker processes running: ``rqarm worker -n N``.

Each child is a worker like any other; the supervisor knows neither Redis nor handlers. It starts the first child alone:
what ends that one before it is ready (handlers that cannot be loaded, no server) would end all of them, so the error
is told once, and the supervisor ends with the same code. Later a child that dies is started again, after a pause that
doubles while it keeps dying; but one that ends with the code of a wrong configuration ends all.

The children have process groups of their own, so Ctrl-C in a terminal reaches the supervisor only, which passes it on
once. They die with it.
"""

from __future__ import annotations

import logging
import os
import random
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from redis import Redis
from rq import Worker
from rq.serializers import JSONSerializer

from rqarm.worker.patience import pause_after

log = logging.getLogger("rqarm.worker")

#: exit code of a wrong configuration, as in rqarm.cli: whoever starts it again gets the same
MISCONFIGURED = 2
#: exit code when a child had to be killed, or died of a signal before anything ran
FAILURE = 1
#: seconds within which a second signal is the same one: RQ's workers ignore it too
TWICE = 1.0
#: seconds between two cold signals, for a child that was not ready to hear the first
INSIST = 1.5
#: seconds that a child has for a cold shutdown before it is killed
COLD = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds before a dead child is started again: doubled at each death in a row, with jitter.

    A child that has lived for ``reset`` starts a new row. Source: the shape is Kubernetes' CrashLoopBackOff, whose 10 s
    to 5 min would leave a single crash unanswered for long.
    """

    first: float = 0.5
    longest: float = 30.0
    reset: float = 60.0

    def pause(self, deaths: int, chance: Callable[[], float] = random.random) -> float:
        """The pause after so many deaths in a row, 1 or more: between half and all of what the doubling gives."""
        return pause_after(deaths, first=self.first, longest=self.longest, chance=chance)


@dataclass(slots=True)
class Child:
    """One of the N places. ``due``: when to start it; None = it runs, or waits for the first, or has ended."""

    number: int
    name: str
    process: subprocess.Popen[bytes] | None = None
    ready: int | None = None
    due: float | None = None
    began: float = 0.0
    deaths: int = 0
    dead: int | None = None


class Supervisor:
    """Runs ``command`` N times, with ``--supervisor`` and what else a child must know behind it.

    ``name``: the children are called ``name-1`` and so on; without one each makes up its own. ``ends``: a child that
    ends with code 0 is done (burst, a number of jobs); else it is started again. ``patience``: seconds that a warm
    shutdown may take before it becomes a cold one; None = as long as the requests in hand.
    """

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        name: str | None = None,
        *,
        ends: bool = False,
        patience: float | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        self.command, self.name, self.ends, self.patience = list(command), name, ends, patience
        self.backoff = backoff or Backoff()
        self.children = [Child(n, f"{name}-{n}" if name else f"worker {n}") for n in range(1, count + 1)]
        self.children[0].due = 0.0
        self.code = 0
        self._one_was_ready = False
        self._signals: list[tuple[int, float]] = []
        self._warm_since: float | None = None
        self._cold_since: float | None = None
        self._insist_at = 0.0
        self._wake = -1

    def run(self) -> int:
        """Until all have ended; the exit code for this process.

        0: asked to stop, or all were done. 1: a child had to be killed. Otherwise the code of the child that could not
        start, or whose configuration is wrong.
        """
        with self._listening():
            while True:
                now = time.monotonic()
                self._bury(now)
                self._obey(now)
                self._start_due(now)
                if not any(child.process or child.due is not None for child in self.children):
                    break
                self._sleep(now)
        log.info("all %d workers have ended", len(self.children))
        return self.code

    # -- what happens

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Signals wake the loop through a pipe and are handled there, one after the other."""
        wake, waker = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(waker, False)
        before = {number: signal.getsignal(number) for number in (*_SIGNALS, signal.SIGCHLD)}
        previous = signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda heard, _: self._signals.append((heard, time.monotonic())))
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._wake = wake
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous)
            for end in (wake, waker):
                os.close(end)

    def _sleep(self, now: float) -> None:
        moments = [child.due for child in self.children if child.due is not None]
        if self._cold_since is not None:
            moments += [self._insist_at, self._cold_since + COLD]
        elif self._warm_since is not None and self.patience is not None:
            moments.append(self._warm_since + self.patience)
        timeout = max(0.0, min(moments) - now) if moments else None
        pipes = [child.ready for child in self.children if child.ready is not None]
        heard, _, _ = select.select([self._wake, *pipes], [], [], timeout)
        if self._wake in heard:
            with suppress(BlockingIOError):
                os.read(self._wake, 4096)
        for child in self.children:
            if child.ready in heard:
                self._hear(child)

    def _hear(self, child: Child) -> None:
        """A child says that it is ready; or it has closed its pipe without a word, and its end follows."""
        assert child.ready is not None
        is_ready = os.read(child.ready, 1) != b""
        self._close_pipe(child)
        if is_ready and not self._one_was_ready:
            self._one_was_ready = True
            if self._warm_since is None:
                for other in self.children[1:]:
                    other.due = 0.0

    def _close_pipe(self, child: Child) -> None:
        if child.ready is not None:
            os.close(child.ready)
            child.ready = None

    # -- children

    def _start_due(self, now: float) -> None:
        for child in self.children:
            if child.due is not None and child.due <= now:
                self._start(child)

    def _start(self, child: Child) -> None:
        ready, told = os.pipe()
        options = ["--supervisor", str(os.getpid()), "--ready", str(told)]
        if self.name:
            options += ["--name", child.name]
            if child.dead is not None:
                options += ["--successor-of", str(child.dead)]
        try:
            child.process = subprocess.Popen(
                [*self.command, *options],
                stdin=subprocess.DEVNULL,
                pass_fds=[told],
                process_group=0,
            )
        except OSError as error:
            # no memory, no process left: the next try may go well
            os.close(ready)
            child.deaths += 1
            child.due = time.monotonic() + self.backoff.pause(child.deaths)
            log.warning("%s cannot be started: %s", child.name, error)
            return
        finally:
            os.close(told)
        child.ready, child.due, child.began = ready, None, time.monotonic()
        log.info("%s started, process %d", child.name, child.process.pid)

    def _bury(self, now: float) -> None:
        for child in self.children:
            if child.process is None or child.process.poll() is None:
                continue
            code, pid = child.process.returncode, child.process.pid
            if child.ready is not None and select.select([child.ready], [], [], 0)[0]:
                self._hear(child)
            self._close_pipe(child)
            _kill_group(pid)  # what it has left behind
            child.process, child.dead = None, pid
            self._decide(child, code, now)

    def _decide(self, child: Child, code: int, now: float) -> None:
        """What becomes of the place of a child that has ended."""
        if self._warm_since is not None or (code == 0 and self.ends):
            log.log(logging.INFO if code == 0 else logging.WARNING, "%s %s", child.name, _how(code))
            return
        if code == MISCONFIGURED or (code != 0 and not self._one_was_ready):
            self.code = code if code > 0 else FAILURE
            log.error("%s %s, and would again: nothing is started again", child.name, _how(code))
            self._stop(now)
            return
        if now - child.began >= self.backoff.reset:
            child.deaths = 0
        child.deaths += 1
        pause = self.backoff.pause(child.deaths)
        child.due = now + pause
        log.warning("%s %s, starting it again in %.1f s", child.name, _how(code), pause)

    # -- the end

    def _obey(self, now: float) -> None:
        """The first signal is a warm shutdown, one that comes later than TWICE a cold one."""
        while self._signals:
            number, moment = self._signals.pop(0)
            if self._warm_since is None:
                log.warning("%s: the workers end after the requests in hand; once more hands these back", _name(number))
                self._stop(now)
            elif self._cold_since is None and moment - self._warm_since >= TWICE:
                log.warning("%s: the workers hand back what they run", _name(number))
                self._cold_since = self._insist_at = now
        self._press(now)

    def _stop(self, now: float) -> None:
        self._warm_since = now
        for child in self.children:
            child.due = None
        self._signal_all(signal.SIGTERM)

    def _press(self, now: float) -> None:
        """Say it again where it has to be said again; at last, kill."""
        if self._cold_since is None:
            if self._warm_since is None or self.patience is None or now < self._warm_since + self.patience:
                return
            log.warning("the workers did not end within %g s: they hand back what they run", self.patience)
            self._cold_since = self._insist_at = now
        if now >= self._cold_since + COLD:
            for child in self.children:
                if child.process is not None:
                    log.error("%s does not end, killing process %d", child.name, child.process.pid)
                    self.code = self.code or FAILURE
                    _kill_group(child.process.pid)
            self._cold_since = now
        if now >= self._insist_at:
            self._insist_at = now + INSIST
            self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: signal.Signals) -> None:
        for child in self.children:
            if child.process is not None:
                child.process.send_signal(number)


def _how(code: int) -> str:
    return f"ended with code {code}" if code >= 0 else f"was killed by {_name(-code)}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


# -- in the child


def report_ready(pipe: int | None) -> None:
    """Tell the supervisor that the others may start."""
    if pipe is not None:
        with suppress(BrokenPipeError):
            os.write(pipe, b"+")
        os.close(pipe)


def bury_predecessor(connection: Redis, name: str | None, pid: int | None) -> None:
    """Take a name from the worker that was killed under it: for seven minutes RQ would hold it for alive.

    Only if the registration is that of process ``pid`` on this machine; the supervisor saw it end.
    """
    if name is None or pid is None:
        return
    key = Worker.redis_worker_namespace_prefix + name
    dead = Worker.find_by_key(key, connection, serializer=JSONSerializer)
    if dead is not None and (dead.pid, dead.hostname) == (pid, socket.gethostname()):
        dead.register_death()
