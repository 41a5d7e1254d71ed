"""The words of the system and the moves between them.

States, outcomes and the status value as a client sees it. No I/O and no Redis: the scripts in lua/ make the moves, the
table here says which there are, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from enum import IntEnum, StrEnum
from pathlib import PurePath
from typing import Any, ClassVar, NewType

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


class FollowUp(StrEnum):
    """What a request can be followed by: a request of its own that is about it."""

    CALLBACK = "callback"
    FAILURE = "failure"
    QUARANTINE = "quarantine"


#: how the operations of follow-ups begin; no handler of a user can be for them
OWN_OPERATION = "rqarm:"


class Reason(StrEnum):
    """Why a request was set aside. Who reads a record of another version may find other words."""

    #: its attempts died without a word, ``max_attempts`` times
    POISON = "poison"
    #: its handler asked for it
    ASKED = "asked"
    #: its last attempt ended in an exception
    EXHAUSTED = "exhausted"
    #: its result, or the arguments of a retry, cannot be stored
    UNPACKABLE = "unpackable"


#: the reasons after which a submit does not run the request again; lua/prelude has them too, and a test compares
BLOCKING = frozenset({Reason.POISON, Reason.ASKED})


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
    "emit": {State.IN_PROGRESS: State.IN_PROGRESS},
    "complete": {State.IN_PROGRESS: State.COMPLETED},
    "fail": {State.IN_PROGRESS: State.FAILED},
    "retry": {State.IN_PROGRESS: State.PENDING},
    "release": {State.IN_PROGRESS: State.PENDING},
    "conclude": {State.IN_PROGRESS: State.UNKNOWN},
    "redirect": {State.IN_PROGRESS: State.PENDING},
    "need": {State.IN_PROGRESS: State.PENDING},
    "revive": {State.PENDING: State.PENDING},
    "crash": {State.IN_PROGRESS: State.PENDING},
    "requeue": {State.FAILED: State.PENDING},
    "discard": {State.FAILED: State.UNKNOWN},
    "cancel": {State.PENDING: State.CANCELLED, State.IN_PROGRESS: State.CANCELLED},
    "retain": {State.COMPLETED: State.COMPLETED},
    "forget": {
        State.COMPLETED: State.UNKNOWN,
        State.FAILED: State.UNKNOWN,
        State.CANCELLED: State.UNKNOWN,
    },
}


class View:
    """A dataclass that people and programs are shown."""

    __slots__ = ()
    #: fields and properties that ``to_dict`` leaves out
    hidden: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types, with what is computed. Times are in ISO 8601, durations in seconds."""
        document: dict[str, Any] = _plain(self)
        return document


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        computed = [name for name, member in vars(type(value)).items() if isinstance(member, property)]
        hidden = value.hidden if isinstance(value, View) else ()
        names = [*(each.name for each in fields(value)), *computed]
        return {name: _plain(getattr(value, name)) for name in names if name not in hidden}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, StrEnum | PurePath):
        return str(value)
    if isinstance(value, IntEnum):
        return value.name.lower()
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return value


@dataclass(frozen=True, slots=True)
class BatchStatus(View):
    """What is known of one request at one moment.

    Times are aware datetimes in UTC from the server's clock. ``position``: 1 = next to start, 0 = in progress, None =
    not asked for or not in flight. ``eta`` and ``estimated_time`` are seconds. ``progress`` (0 to 1) and its message
    are what the handler told last, while it runs. ``error`` has type, message and traceback. ``reason``: why it is
    ``quarantined``, see ``Reason``; "" when it is not. ``redirect``: the key of the request whose result answers, or
    will answer, this one. ``durable``: whether a submit is known to be as safe as the setting ``durability`` asks; None
    = nothing was asked. ``value`` is filled on a hit only, and left out of ``to_dict``.
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
    progress_message: str = ""
    attempts: int = 0
    error: dict[str, Any] | None = None
    worker: str | None = None
    queue: str = ""
    quarantined: bool = False
    reason: str = ""
    redirect: Key | None = None
    durable: bool | None = None
    value: Any = field(default=None, repr=False, compare=False)
    hidden: ClassVar[tuple[str, ...]] = ("value", "is_blocked")

    @property
    def is_blocked(self) -> bool:
        """Set aside so that a submit does not run it again: somebody must decide."""
        return self.quarantined and self.reason in BLOCKING
