"""The words of the system and the moves between them.

States, outcomes and the status value as a client sees it. No I/O and no Redis: the scripts in lua/ make the moves, the
table here says which there are, and a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import Any, NewType

Key = NewType("Key", str)
Token = NewType("Token", int)


class State(StrEnum):
    """Where a request is. ``unknown``: there is no record of it."""

    UNKNOWN = "unknown"
    PENDING = "pending"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def in_flight(self) -> bool:
        return self in (State.PENDING, State.IN_PROGRESS)

    @property
    def ended(self) -> bool:
        return self in (State.COMPLETED, State.FAILED, State.CANCELLED)


class Outcome(StrEnum):
    """What a submit did."""

    NEW = "new"
    JOINED = "joined"
    HIT = "hit"
    STALE = "stale"
    NEGATIVE = "negative"
    REFUSED = "refused"


class Priority(IntEnum):
    """Rank of a request inside its queue; lower starts earlier. Each rank is an RQ queue of its own."""

    HIGH = 0
    DEFAULT = 1
    LOW = 2


#: verb -> {state before: state after}; what is not listed is refused and writes nothing. A submit of what is completed
#: moves only when it insists (resubmit) or the result is gone; ``crash`` ends in ``failed`` at its limit; ``admit``
#: moves only when there is no place; ``redirect`` ends as its target when that has ended; ``put`` goes from every
#: state to ``completed``.
TRANSITIONS: dict[str, dict[State, State]] = {
    "submit": {
        State.UNKNOWN: State.PENDING,
        State.COMPLETED: State.PENDING,
        State.FAILED: State.PENDING,
        State.CANCELLED: State.PENDING,
    },
    "start": {State.PENDING: State.IN_PROGRESS, State.FAILED: State.IN_PROGRESS},
    "take": {State.PENDING: State.IN_PROGRESS},
    "admit": {State.IN_PROGRESS: State.PENDING},
    "renew": {State.IN_PROGRESS: State.IN_PROGRESS},
    "complete": {State.IN_PROGRESS: State.COMPLETED},
    "fail": {State.IN_PROGRESS: State.FAILED},
    "retry": {State.IN_PROGRESS: State.PENDING},
    "release": {State.IN_PROGRESS: State.PENDING},
    "redirect": {State.IN_PROGRESS: State.PENDING},
    "revive": {State.PENDING: State.PENDING},
    "crash": {State.IN_PROGRESS: State.PENDING},
    "cancel": {State.PENDING: State.CANCELLED, State.IN_PROGRESS: State.CANCELLED},
    "forget": {
        State.COMPLETED: State.UNKNOWN,
        State.FAILED: State.UNKNOWN,
        State.CANCELLED: State.UNKNOWN,
    },
}


@dataclass(frozen=True, slots=True)
class BatchStatus:
    """What is known of one request at one moment.

    Times are aware datetimes in UTC from the server's clock. ``position``: 1 = next to start, 0 = in progress, None =
    not asked for or not in flight. ``eta`` and ``estimated_time`` are seconds. ``error`` has type, message and
    traceback. ``redirect``: the key of the request whose result answers, or will answer, this one. ``value`` is filled
    on a hit only, and left out of ``to_dict``.
    """

    key: Key
    state: State
    outcome: Outcome | None = None
    uri: str = ""
    url: str | None = None
    sticky: bool = False
    submitted: datetime | None = None
    started: datetime | None = None
    ended: datetime | None = None
    position: int | None = None
    eta: float | None = None
    estimated_time: float | None = None
    progress: float | None = None
    attempts: int = 0
    error: dict[str, Any] | None = None
    worker: str | None = None
    queue: str = ""
    quarantined: bool = False
    redirect: Key | None = None
    value: Any = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types: times in ISO 8601, words as strings, no value."""
        names = [name for name in self.__slots__ if name != "value"]
        return {name: _plain(getattr(self, name)) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, StrEnum) else value
