"""What runs: claims, their leases and limits; and how one is taken from its worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rqarm.browse.search import LONGEST_PAGE
from rqarm.calls import Call, Command
from rqarm.errors import InvalidRequest, LeaseLost, RequestUnknown
from rqarm.flows import Core, Flow
from rqarm.keys import URI_FIELDS
from rqarm.model import BatchStatus, Key, Priority, State, Token, View
from rqarm.replies import NO_REQUEST, Attempt, joined, moment, read_status, read_words, rows, text_of, uri_in
from rqarm.uri import check_key, redact


@dataclass(frozen=True, slots=True)
class LimitUse(View):
    """A limit of a route: its places, who runs in one, whose is kept, who waits for one."""

    name: str
    places: int
    running: int
    called: int
    parked: int


@dataclass(frozen=True, slots=True)
class Claim(View):
    """A request that runs. Durations are seconds on the server's clock; ``left`` is below 0 when it is ``overdue``."""

    status: BatchStatus
    token: Token
    lease: float
    lease_until: datetime
    left: float
    renewed_ago: float
    overdue: bool
    limit: str


@dataclass(frozen=True, slots=True)
class ClaimPage(View):
    """Claims, the first to lapse first. ``total`` and ``overdue`` count all; ``next_offset``: None at the end."""

    entries: tuple[Claim, ...]
    total: int
    overdue: int
    next_offset: int | None
    limits: tuple[LimitUse, ...]


def claims(core: Core, offset: int, limit: int) -> Flow[ClaimPage]:
    """A page of what runs, the first to lapse first."""
    if not 1 <= limit <= LONGEST_PAGE or offset < 0:
        raise InvalidRequest(f"from 1 to {LONGEST_PAGE} entries from 0 on are allowed", where="limit")
    page: ClaimPage = yield claims_call(core, offset, limit)
    return page


def claims_call(core: Core, offset: int = 0, limit: int = 50) -> Call[ClaimPage]:
    """The look itself."""

    def parse(reply: Any) -> ClaimPage:
        _, now_ms, total, overdue, limits, *found = read_words("claims", reply)
        is_last = offset + limit >= int(total)
        return ClaimPage(
            entries=tuple(_claim(row, int(now_ms)) for row in rows(found, 6)),
            total=int(total),
            overdue=int(overdue),
            next_offset=None if is_last else offset + limit,
            limits=tuple(sorted((limit_use(row) for row in rows(limits, 5)), key=lambda use: use.name)),
        )

    return core.calls.index_call("claims", core.keys.named("leases"), (offset, limit), parse)


def _claim(row: Sequence[Any], now_ms: int) -> Claim:
    key, packed, until, lease, token, limit = row
    until_ms, lease_ms = int(until), int(lease)
    lease_until = moment(until_ms)
    assert lease_until is not None, "what runs has a lease"
    return Claim(
        status=read_status(Key(text_of(key)), packed),
        token=Token(int(token)),
        lease=lease_ms / 1000,
        lease_until=lease_until,
        left=(until_ms - now_ms) / 1000,
        renewed_ago=(now_ms - until_ms + lease_ms) / 1000,
        overdue=until_ms <= now_ms,
        limit=text_of(limit),
    )


def limit_use(row: Sequence[Any]) -> LimitUse:
    name, places, running, called, parked = row
    return LimitUse(text_of(name), int(places), int(running), int(called), int(parked))


def release(core: Core, key: str) -> Flow[bool]:
    """Take a running attempt away from its worker; it is next in line and the attempt does not count."""
    name = check_key(key)

    def parse(reply: Any) -> tuple[State, bytes, str, Attempt | None]:
        state, token, queue, priority, *uri = reply
        if state is None:
            raise RequestUnknown(name)
        if token is None or State(text_of(state)) is not State.IN_PROGRESS:
            return State(text_of(state)), b"", "", None
        rank = Priority(int(priority or Priority.DEFAULT))
        attempt = Attempt(name, Token(int(token)), 1, NO_REQUEST, {}, 0, 0, text_of(queue or b""), rank)
        return State.IN_PROGRESS, joined(uri), attempt.queue, attempt

    wanted = ("state", "token", "queue", "priority", *URI_FIELDS)
    _, identity, queue, attempt = yield Command(("HMGET", core.keys.status(name), *wanted), parse)
    if attempt is None:
        return False
    description = redact(uri_in(identity), core.settings.secret_params)
    ticket = core.jobs.enqueue_at_front(name, description, queue, attempt.priority)
    try:
        yield core.calls.release(attempt, ticket)
    except LeaseLost:
        return False  # it ended, or another began, between the two
    return True
