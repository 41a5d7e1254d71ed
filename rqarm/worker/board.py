"""What a warm horse runs, in memory that it shares with its parent.

The horse writes, the parent reads, and neither waits for the other: a message for every job would cost more than most
jobs. A lane is one attempt at a time; a horse has as many as it runs at once. Only the parent writes the flags.
"""

from __future__ import annotations

import marshal
import mmap
import secrets
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rqarm.model import Key, Priority, Token
from rqarm.replies import NO_REQUEST, Attempt
from rqarm.request import BatchRequest

#: bytes of a lane: a head, and two pages of which the head says which one counts
_PAGE = 4096
_LANE = 64 + 2 * _PAGE
_HEADER = 64
#: numbers of the header: attempts ended, those that were good, microseconds worked; then whether there is a message
_COUNTERS = struct.Struct("<QQQ")
_BELL_AT, _IDLE_AT, _SEEN_AT = 32, 40, 48
_NUMBER = struct.Struct("<I")
_SIZE = struct.Struct("<H")
_MOMENT = struct.Struct("<d")
#: instead of a moment: the handler has ended, and the server has not yet confirmed it
RESTING = -1.0
#: where in a lane's head the parent writes the number of the turn that must stop, and the horse when its turn began
_STOP_AT, _BEGAN_AT = 8, 16


@dataclass(frozen=True, slots=True)
class Turn:
    """One attempt on one lane. ``began``, on the clock of time.monotonic(), which processes share, and ``limit``:
    seconds. One that has not begun, ``began`` 0, was taken ahead and waits for the one that runs; one that is RESTING
    has ended.
    """

    lane: int
    number: int
    key: Key
    token: Token
    attempt: int
    retries: int
    crashes: int
    queue: str
    priority: Priority
    job_id: str
    began: float
    limit: float

    def as_attempt(self, request: BatchRequest = NO_REQUEST) -> Attempt:
        """The attempt as its holder sees it, which is what ends it; the request only counts for a new ticket."""
        return Attempt(
            self.key,
            self.token,
            self.attempt,
            request,
            {},
            self.retries,
            self.crashes,
            self.queue,
            self.priority,
            job_id=self.job_id,
            owns_job=True,
        )


class Board:
    """Shared memory for ``lanes`` lanes. Made before the fork."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        #: tells the turns of this horse from those of others
        self.nonce = secrets.token_hex(4)
        self._memory = mmap.mmap(-1, _HEADER + lanes * _LANE)
        self.watch(time.monotonic())

    def close(self) -> None:
        self._memory.close()

    # -- the horse writes

    def show(self, lane: int, number: int, attempt: Attempt | None, began: float = 0.0, limit: float = 0.0) -> None:
        """From now the lane is at this turn; without an attempt it waits, ``number`` being its last turn.

        The page that does not count is written first, so that a horse that dies in the middle leaves the old one.
        """
        told: tuple[str | int | float, ...] = (number,)
        if attempt is not None:
            told = (
                number,
                str(attempt.key),
                int(attempt.token),
                attempt.number,
                attempt.retries,
                attempt.crashes,
                attempt.queue,
                int(attempt.priority),
                attempt.job_id,
                limit,
            )
        packed = marshal.dumps(told)
        if len(packed) > _PAGE - _SIZE.size:
            raise ValueError(f"{len(packed)} bytes do not fit on the board")
        base = _HEADER + lane * _LANE
        turned = (_NUMBER.unpack_from(self._memory, base)[0] + 1) & 0xFFFFFFFF
        at = base + 64 + turned % 2 * _PAGE
        _SIZE.pack_into(self._memory, at, len(packed))
        self._memory[at + _SIZE.size : at + _SIZE.size + len(packed)] = packed
        _MOMENT.pack_into(self._memory, base + _BEGAN_AT, began)
        _NUMBER.pack_into(self._memory, base, turned)

    def begin(self, lane: int, began: float) -> None:
        """What was taken ahead on this lane runs from now."""
        _MOMENT.pack_into(self._memory, _HEADER + lane * _LANE + _BEGAN_AT, began)

    def wait(self, since: float) -> None:
        """Nothing runs and nothing is queued since this moment; 0 = that is over."""
        _MOMENT.pack_into(self._memory, _IDLE_AT, since)

    def count(self, seconds: float, *, is_good: bool) -> None:
        """One more attempt has ended; good is what RQ counts as a success: the handler has not failed for good."""
        ended, good, worked = _COUNTERS.unpack_from(self._memory, 0)
        _COUNTERS.pack_into(self._memory, 0, ended + 1, good + is_good, worked + int(seconds * 1e6))

    def must_stop(self, lane: int, number: int) -> bool:
        """Whether the parent has said that this turn is no longer ours."""
        return bool(_NUMBER.unpack_from(self._memory, _HEADER + lane * _LANE + _STOP_AT)[0] == number)

    def is_called(self) -> bool:
        """Whether the parent has sent a message since the last time. Looking here is cheaper than at the pipe."""
        if not self._memory[_BELL_AT]:
            return False
        self._memory[_BELL_AT] = 0
        return True

    def watched_at(self) -> float:
        """When the parent looked last."""
        (seen,) = _MOMENT.unpack_from(self._memory, _SEEN_AT)
        return float(seen)

    # -- the parent reads

    def watch(self, now: float) -> None:
        """The parent has looked, and renewed what was due."""
        _MOMENT.pack_into(self._memory, _SEEN_AT, now)

    def call(self) -> None:
        """A message is on its way, or will be at once."""
        self._memory[_BELL_AT] = 1

    def counters(self) -> tuple[int, int, float]:
        """Attempts ended, those that were good, seconds worked, since the board was made."""
        ended, good, worked = _COUNTERS.unpack_from(self._memory, 0)
        return ended, good, worked / 1e6

    def waits_since(self) -> float:
        """Since when the horse has nothing to do; 0 = it has."""
        (since,) = _MOMENT.unpack_from(self._memory, _IDLE_AT)
        return float(since)

    def turns(self) -> Iterator[Turn]:
        """What runs now."""
        for lane in range(self.lanes):
            _, turn = self.look(lane)
            if turn is not None:
                yield turn

    def look(self, lane: int) -> tuple[int, Turn | None]:
        """The number of the lane's last turn, and that turn while it runs."""
        base = _HEADER + lane * _LANE
        while True:
            turned = _NUMBER.unpack_from(self._memory, base)[0]
            if not turned:
                return 0, None
            at = base + 64 + turned % 2 * _PAGE
            (size,) = _SIZE.unpack_from(self._memory, at)
            packed = self._memory[at + _SIZE.size : at + _SIZE.size + size]
            (began,) = _MOMENT.unpack_from(self._memory, base + _BEGAN_AT)
            if _NUMBER.unpack_from(self._memory, base)[0] == turned:
                break
        number, *told = marshal.loads(packed)
        if not told:
            return number, None
        key, token, attempt, retries, crashes, queue, priority, job_id, limit = told
        return number, Turn(
            lane,
            number,
            Key(key),
            Token(token),
            attempt,
            retries,
            crashes,
            queue,
            Priority(priority),
            job_id,
            began,
            limit,
        )

    def stop(self, lane: int, number: int) -> None:
        """Tell the handler of this turn, by ``context.cancelled``, that it should stop; or that it must not begin."""
        _NUMBER.pack_into(self._memory, _HEADER + lane * _LANE + _STOP_AT, number)

    def allow(self, lane: int) -> None:
        """Nothing on this lane needs to stop."""
        self.stop(lane, 0)
