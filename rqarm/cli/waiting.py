"""Wait for a request, with a line on the terminal that says how far it is."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Self

import click

from rqarm.cli.common import INTERRUPTED, complain, is_terminal
from rqarm.errors import WaitTimeout
from rqarm.manager import RequestManager
from rqarm.model import BatchStatus, State
from rqarm.text import duration, plain

#: seconds between two looks at the position and the progress; the end itself is heard of at once
LOOK = 0.5
BAR_CHARS = 24


@contextlib.contextmanager
def going_on(keys: Sequence[str]) -> Iterator[None]:
    """Ctrl-C ends the waiting, not the request: say so."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(err=True)
        what = (
            f"the request goes on: rqarm result {keys[0]}" if len(keys) == 1 else "the requests go on: rqarm status KEY"
        )
        complain(f"interrupted; {what}")
        raise click.exceptions.Exit(INTERRUPTED) from None


def wait_for(rm: RequestManager, key: str, timeout: float | None) -> BatchStatus:
    """The status at the end of the request, or when ``timeout`` seconds are over."""
    with going_on([key]):
        if not is_terminal(sys.stderr):
            return rm.wait(key, timeout)[0]
        with Line() as line:
            for status in follow(rm, key, timeout):
                line.draw(progress_of(status))
        return status


def follow(rm: RequestManager, key: str, timeout: float | None) -> Iterator[BatchStatus]:
    """The full status, again and again until the request has ended or the time is over. One at least."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        status = rm.full_status(key)
        yield status
        left = LOOK if deadline is None else min(LOOK, deadline - time.monotonic())
        if not status.state.in_flight or left <= 0:
            return
        rm.wait(key, left)


def each_ended(rm: RequestManager, keys: Sequence[str], timeout: float | None) -> Iterator[BatchStatus]:
    """As ``rm.as_completed``; on a terminal with a line that says how far they are."""
    if not is_terminal(sys.stderr):
        yield from rm.as_completed(keys, timeout)
        return
    deadline = None if timeout is None else time.monotonic() + timeout
    waiting = list(dict.fromkeys(keys))
    total = len(waiting)
    with Line() as line:
        while True:
            left = LOOK if deadline is None else max(0.0, min(LOOK, deadline - time.monotonic()))
            statuses = rm.wait(waiting, left)
            ended = [status for status in statuses if not status.state.in_flight]
            if ended:
                line.clear()
            yield from ended
            waiting = [status.key for status in statuses if status.state.in_flight]
            if not waiting:
                return
            first = rm.full_status(waiting[0])
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeout(first.key, first.state, timeout or 0.0)
            line.draw(progress_of(first) if total == 1 else f"{bar(1 - len(waiting) / total)} of {total} have ended")


class Line:
    """One line on stderr that is drawn over and gone at the end."""

    def __init__(self) -> None:
        self._drawn = 0

    def draw(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]
        sys.stderr.write(f"\r{text:<{self._drawn}}")
        sys.stderr.flush()
        self._drawn = len(text)

    def clear(self) -> None:
        """Make room for a line on stdout."""
        if self._drawn:
            sys.stderr.write(f"\r{'':<{self._drawn}}\r")
            sys.stderr.flush()
            self._drawn = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


def progress_of(status: BatchStatus) -> str:
    """``pending, number 3 in line, about 12 s`` or ``in progress [######------] 50 %, about 4 s``."""
    text = str(status.state).replace("_", " ")
    if status.state is State.PENDING and status.position:
        text += f", number {status.position} in line"
    fraction = _fraction(status)
    if status.state is State.IN_PROGRESS and fraction is not None:
        text += f" {bar(fraction)}"
    if status.state is State.IN_PROGRESS and status.progress_message:
        text += f" {status.progress_message}"
    if status.state.in_flight and status.eta:
        text += f", about {duration(status.eta)}"
    return plain(text)


def bar(fraction: float) -> str:
    """``[######------] 50%``."""
    done = round(fraction * BAR_CHARS)
    return f"[{'#' * done}{'-' * (BAR_CHARS - done)}] {fraction:.0%}"


def _fraction(status: BatchStatus) -> float | None:
    if status.progress is not None:
        return min(max(status.progress, 0.0), 1.0)
    if status.eta is not None and status.estimated_time:
        return min(max(1 - status.eta / status.estimated_time, 0.0), 0.99)
    return None
