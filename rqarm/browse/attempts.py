"""How the attempts of a request ended: ``RequestDetail.attempts``.

An attempt that failed leaves a note in the record, the newest ten; ``note_attempt`` in the prelude writes it. Of
the last one that has left none the record itself tells. So what completes at once costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rqarm import packing
from rqarm.model import BatchStatus, State, View
from rqarm.replies import LAPSED

#: what the fields of the record begin with that hold notes
FIELD = "tried_"
#: netstrings of a note
PIECES = 6


@dataclass(frozen=True, slots=True)
class AttemptView(View):
    """One attempt.

    ``outcome``: running, completed, failed, retried, crashed, cancelled, redirected. ``ran``: seconds on the server's
    clock; of one that runs, up to now. ``error`` has type, message and traceback.
    """

    number: int
    outcome: str
    worker: str
    started: datetime | None
    ended: datetime | None
    ran: float | None
    error: dict[str, Any] | None


def attempts_of(status: BatchStatus, record: Mapping[str, bytes], now: datetime) -> tuple[AttemptView, ...]:
    """What is known of each attempt, the first one first. What somebody else wrote there is left out."""
    notes = [_read(value) for name, value in record.items() if name.startswith(FIELD)]
    known = {note.number: note for note in notes if note is not None and note.number <= status.attempts}
    if status.attempts and status.attempts not in known and (outcome := _last(status)):
        ended = None if status.state is State.IN_PROGRESS else status.ended
        error = status.error if outcome == "failed" else None
        known[status.attempts] = _view(status.attempts, outcome, status.worker or "", status.started, ended, now, error)
    return tuple(known[number] for number in sorted(known))


def _last(status: BatchStatus) -> str:
    """How the last attempt ended that has left no note; "" when there is no telling."""
    if status.redirect is not None:
        return "redirected"
    if status.state is State.IN_PROGRESS:
        return "running"
    return str(status.state) if status.state.ended else ""


def _read(packed: bytes) -> AttemptView | None:
    pieces, rest = [], packed
    try:
        for _ in range(PIECES):
            length, _, rest = rest.partition(b":")
            pieces.append(rest[: int(length)])
            rest = rest[int(length) :]
        number, worker, started_ms, ended_ms, outcome, error = pieces
        return _view(
            int(number),
            outcome.decode("ascii"),
            worker.decode("utf-8", "replace"),
            _moment(started_ms),
            _moment(ended_ms),
            None,
            packing.unpack_error(error or LAPSED),
        )
    except (ValueError, OverflowError):
        return None


def _view(
    number: int,
    outcome: str,
    worker: str,
    started: datetime | None,
    ended: datetime | None,
    now: datetime | None,
    error: dict[str, Any] | None,
) -> AttemptView:
    until = ended or now
    ran = (until - started).total_seconds() if until is not None and started is not None else None
    return AttemptView(number, outcome, worker, started, ended, ran, error)


def _moment(unix_ms: bytes) -> datetime | None:
    return datetime.fromtimestamp(int(unix_ms) / 1000, UTC) if unix_ms else None
