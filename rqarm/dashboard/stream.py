"""Live pages: one thread looks at the server, however many browsers watch, and only while one does.

A look is two round trips: the overview, and the events since the last look. Each browser's stream takes what concerns
its page: the overview page itself, or the word that something has changed, upon which the browser asks for its page
again.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import redis

from rqarm.calls import Batch
from rqarm.errors import RqarmError
from rqarm.flows import Core, Flow
from rqarm.manager import RequestManager
from rqarm.model import State

log = logging.getLogger("rqarm.dashboard")

#: events that one look takes in; when more have come, everything counts as changed
MOST_EVENTS = 500
#: looks that are kept for slow browsers
KEPT = 30
#: seconds of silence after which a stream says that it is still there: proxies cut silent ones
SILENCE = 15.0
#: every so many looks a page is asked for again though nothing happened: ages and heartbeats move on by themselves
PULSE = 5


@dataclass(frozen=True)
class Look:
    """What one look saw. ``states``: key -> last state, of what moved; None = too many to tell."""

    number: int
    overview: Any = None
    states: dict[str, str] | None = field(default_factory=dict)
    trouble: str = ""


def news(core: Core, after: str) -> Flow[tuple[list[tuple[str, dict[str, str]]], str]]:
    """The events behind the id ``after`` ("" = none), and the newest id. One round trip."""
    calls = core.calls
    if not after:
        newest = yield calls.newest_event()
        return [], newest
    steps: tuple[Any, ...] = (calls.events(after, limit=MOST_EVENTS), calls.newest_event())
    events, newest = yield Batch(steps)
    return events, newest


class Poller:
    """The thread, and those who wait for what it sees."""

    def __init__(self, manager: RequestManager, interval: float, most: int) -> None:
        self._manager, self._interval, self._most = manager, interval, most
        self._looks: deque[Look] = deque(maxlen=KEPT)
        self._changed = threading.Condition()
        self._clients = 0
        self._number = 0
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._wake = threading.Event()

    def enter(self) -> bool:
        """Take a place for one browser; False when all are taken. Starts the thread for the first."""
        with self._changed:
            if self._is_closed or self._clients >= self._most:
                return False
            self._clients += 1
            if self._thread is None or not self._thread.is_alive():
                self._wake.clear()
                self._thread = threading.Thread(target=self._run, name="rqarm-dashboard", daemon=True)
                self._thread.start()
            return True

    def leave(self) -> None:
        """Give the place back; the thread ends with the last."""
        with self._changed:
            self._clients -= 1
            if self._clients == 0:
                self._wake.set()

    @property
    def clients(self) -> int:
        return self._clients

    def looks(self, after: int, timeout: float) -> list[Look] | None:
        """The looks behind number ``after``, waiting for the first; [] = the time is over, None = it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._number > after, timeout)
            if self._is_closed:
                return None
            return [each for each in self._looks if each.number > after]

    @property
    def number(self) -> int:
        """The number of the last look."""
        return self._number

    def close(self) -> None:
        """End the thread and every stream."""
        with self._changed:
            self._is_closed = True
            self._wake.set()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(5)

    def _run(self) -> None:
        after = ""
        while True:
            seen, after = self._look(after)
            with self._changed:
                self._looks.append(seen)
                self._number = seen.number
                self._changed.notify_all()
            self._wake.wait(self._interval)
            with self._changed:
                if self._is_closed or self._clients == 0:
                    self._thread = None
                    return
                self._wake.clear()

    def _look(self, after: str) -> tuple[Look, str]:
        number = self._number + 1
        try:
            overview = self._manager.overview()
            events, newest = self._manager.shell.run(news(self._manager.core, after))
        except (redis.RedisError, RqarmError) as error:
            log.warning("the dashboard cannot look at the server: %s", error)
            return Look(number, trouble="the server does not answer"), after
        states = None if len(events) >= MOST_EVENTS else {each["key"]: each["state"] for _, each in events}
        return Look(number, overview, states), newest


def feed(
    poller: Poller, page: str, key: str, render: Callable[[Look], str], is_gone: Callable[[], bool]
) -> Iterator[str]:
    """The events of one browser, as text/event-stream. ``render`` makes the overview page of a look."""
    after = poller.number
    is_busy = True  # until an event says that the request of this page has ended
    yield "retry: 3000\n\n"
    try:
        while not is_gone():
            looks = poller.looks(after, SILENCE)
            if looks is None:
                return
            if not looks:
                yield ": still here\n\n"
                continue
            after = looks[-1].number
            if looks[-1].trouble:
                yield event("trouble", looks[-1].trouble)
            elif page == "overview":
                yield event("page", render(looks[-1]))
            elif key:
                is_busy, concerns = _concerns(looks, key, is_busy)
                yield event("changed", "") if concerns else ": nothing new\n\n"
            elif any(each.states is None or each.states or each.number % PULSE == 0 for each in looks):
                yield event("changed", "")
            else:
                yield ": nothing new\n\n"
    finally:
        poller.leave()


def _concerns(looks: list[Look], key: str, was_busy: bool) -> tuple[bool, bool]:
    """Whether the request moves still, and whether its page must be asked for again."""
    is_busy, concerns = was_busy, was_busy
    for each in looks:
        if each.states is None or key in each.states:
            concerns = True
        if each.states is not None and key in each.states:
            is_busy = each.states[key] in (State.PENDING, State.IN_PROGRESS)
    return is_busy, concerns


def event(name: str, text: str) -> str:
    """One event; JSON, since its lines must not break."""
    return f"event: {name}\ndata: {json.dumps(text)}\n\n"
