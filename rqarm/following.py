"""Intermediate responses: what an attempt emits, and how its followers hear of it.

A follower watches two channels, that of the end and that of what is told on the way, and reads behind what it knows
when one of them wakes it. The record and the list are the truth; a lost wake-up costs RECHECK seconds at the most.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from rqarm import packing
from rqarm.calls import EMITTED_MAX
from rqarm.errors import EmissionTooLarge, RequestLost, RequestUnknown, RqarmError, WaitTimeout
from rqarm.flows import RECHECK, Core, Emit, Flow, Listen, Watch, found_value, sweep_if_due
from rqarm.keys import Keys
from rqarm.model import Key, State
from rqarm.replies import Attempt, Followed
from rqarm.request import BatchRequest
from rqarm.uri import check_key


class FollowKind(StrEnum):
    """What a follower is told. ``result`` and ``error`` are the end; exactly one of them comes."""

    EMITTED = "emitted"
    PROGRESS = "progress"
    DROPPED = "dropped"
    RESTARTED = "restarted"
    RESULT = "result"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class FollowEvent:
    """One thing that a follower is told; what an event does not speak of has its default.

    ``emitted``: a ``value``, the ``number``-th of the attempt. ``progress``: a ``fraction`` and a ``message``; only the
    newest is told. ``dropped``: ``count`` emissions are gone before this follower had them. ``restarted``: the attempt
    is over and another is needed, drop what you have of it. ``result``: the ``value``. ``error``: the exception that
    ``RequestManager.result`` would raise, in ``error``. ``attempt``: 1 = the first.
    """

    kind: FollowKind
    key: Key
    attempt: int = 0
    value: Any = field(default=None, repr=False)
    number: int = 0
    fraction: float | None = None
    message: str = ""
    count: int = 0
    error: Exception | None = None

    @property
    def is_end(self) -> bool:
        return self.kind in (FollowKind.RESULT, FollowKind.ERROR)

    def to_dict(self) -> dict[str, Any]:
        """What the event says, by name; the value as it is, the error as type and message."""
        told: dict[str, Any] = {"kind": str(self.kind), "key": self.key, "attempt": self.attempt}
        if self.kind is FollowKind.ERROR:
            told["error"] = {"type": type(self.error).__name__, "message": str(self.error)}
            return told
        names = {"emitted": ("number", "value"), "progress": ("fraction", "message"), "dropped": ("count",)}
        names["result"] = ("value",)
        return told | {name: getattr(self, name) for name in names.get(self.kind, ())}


def pack_emission(value: Any) -> bytes:
    """Raises UnpackableResult, EmissionTooLarge."""
    packed = packing.pack(value)
    if len(packed) > EMITTED_MAX:
        raise EmissionTooLarge(len(packed), EMITTED_MAX)
    return packed


def emit(core: Core, attempt: Attempt, number: int, packed: bytes) -> Flow[None]:
    """Tell an intermediate response, the ``number``-th of the attempt. Raises LeaseLost."""
    yield core.calls.emit(attempt, number, packed)


def follow(core: Core, request: BatchRequest | str, timeout: float | None) -> Flow[None]:
    """Emits FollowEvents, the end last. Raises RequestUnknown, WaitTimeout."""
    key = check_key(request) if isinstance(request, str) else core.identify(request).key
    deadline = None if timeout is None else core.clock() + timeout
    known = _Known(key)
    watched: Key | None = None
    yield Watch((key, Keys.told(key)))
    while True:
        seen: Followed | None = yield core.calls.follow(key, known.token, known.number)
        if seen is None:
            if not known.is_there:
                raise RequestUnknown(key)
            yield Emit(FollowEvent(FollowKind.ERROR, key, error=RequestLost(key)))
            return
        root = seen.found.status.redirect
        if root is not None and root != watched:
            watched = root
            yield Watch((key, Keys.told(key), root, Keys.told(root)))
            continue
        if root is not None:
            seen = yield from _as_its_root(core, seen, root, known)
        for event in known.news(seen):
            yield Emit(event)
        status = seen.found.status
        if not status.state.in_flight:
            yield Emit((yield from _end(core, key, seen)))
            return
        left = RECHECK if deadline is None else min(RECHECK, deadline - core.clock())
        if left <= 0:
            raise WaitTimeout(key, status.state, timeout or 0.0)
        woken: dict[Key, bytes] = yield Listen(left)
        if not woken:
            # as in every wait: nobody may be there to notice that a worker died. When it fails, the wait goes on.
            with contextlib.suppress(Exception):
                yield from sweep_if_due(core)


def _as_its_root(core: Core, seen: Followed, root: Key, known: _Known) -> Flow[Followed]:
    """An alias as its root is: that computes. One that ended without a result tells its own end."""
    if seen.found.status.state not in (State.PENDING, State.COMPLETED):
        return seen
    of_root: Followed | None = yield core.calls.follow(root, known.token, known.number)
    if of_root is None or of_root.found.status.state.in_flight != seen.found.status.state.in_flight:
        # a root that vanished, or ended between the two looks: the next look at the alias says what became of it
        return replace(seen, token=known.token, values=()) if seen.found.status.state.in_flight else seen
    return of_root


def _end(core: Core, key: Key, seen: Followed) -> Flow[FollowEvent]:
    attempts = seen.found.status.attempts
    try:
        value = yield from found_value(core, seen.found)
    except RqarmError as error:
        return FollowEvent(FollowKind.ERROR, key, attempts, error=error)
    return FollowEvent(FollowKind.RESULT, key, attempts, value=value)


class _Known:
    """What one follower has been told."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.is_there = False
        #: the attempt of which something was told, and the last number of its emissions that was
        self.token, self.number = "", 0
        self._progress: tuple[float | None, str] = (None, "")

    def news(self, seen: Followed) -> Iterator[FollowEvent]:
        """What has not been told yet."""
        status, self.is_there = seen.found.status, True
        if self.token and self.token != seen.token and (seen.token or status.state.in_flight):
            self.token, self.number, self._progress = "", 0, (None, "")
            yield FollowEvent(FollowKind.RESTARTED, self.key, status.attempts)
        if seen.values:
            yield from self._emissions(seen, status.attempts)
        progress = status.progress, status.progress_message
        if status.state is State.IN_PROGRESS and progress[0] is not None and progress != self._progress:
            self.token, self._progress = seen.token, progress
            yield FollowEvent(FollowKind.PROGRESS, self.key, status.attempts, fraction=progress[0], message=progress[1])

    def _emissions(self, seen: Followed, attempt: int) -> Iterator[FollowEvent]:
        self.token = seen.token
        lost = seen.first - self.number - 1
        if lost:
            yield FollowEvent(FollowKind.DROPPED, self.key, attempt, count=lost)
        for number, packed in enumerate(seen.values, seen.first):
            self.number = number
            value = packing.unpack(packed)
            yield FollowEvent(FollowKind.EMITTED, self.key, attempt, value=value, number=number)
