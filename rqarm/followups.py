"""What comes after the end of a request: callbacks, failure callbacks, the consumer of the quarantine.

Each is a request of its own, a follow-up: it has a record, attempts, retries and a ticket like any other, so nothing
new is needed for crashes, fences and repeats. The script that ends a request makes its follow-ups in the same step.
Where nobody at hand knows the routes (a sweep by a client finds the death), the failure waits among the unattended
until a worker ``attend``s. A follow-up leaves nothing behind when it has run.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from rqarm import flows, packing
from rqarm.calls import Batch, NextUp
from rqarm.errors import CorruptResult, RqarmError
from rqarm.flows import Core, Flow, value_of
from rqarm.handlers import FollowUpMatch, Handlers, Match
from rqarm.model import OWN_OPERATION, FollowUp, Key, Priority, State
from rqarm.replies import About, Attempt, QuarantineEntry, Unattended
from rqarm.request import BatchRequest

#: unattended failures that one look reads, and looks at the most in one go
PAGE, MOST_PAGES = 100, 10


class FollowUpLost(RqarmError):
    """What a follow-up is about is gone, so it cannot run: the message says what. Another try would end like this."""


def is_follow_up(request: BatchRequest) -> bool:
    """Whether the request is about another one, which has ended."""
    return request.operation.startswith(OWN_OPERATION)


def callback(core: Core, attempt: Attempt, match: Match) -> NextUp | None:
    """The callback of an attempt that is about to complete; None when its route has none."""
    if FollowUp.CALLBACK not in match.handler.hooks:
        return None
    return _of_attempt(core, FollowUp.CALLBACK, attempt)


def on_failure(core: Core, attempt: Attempt, handlers: Handlers, *, is_set_aside: bool) -> tuple[NextUp, ...]:
    """Who is to be told when the attempt fails for good."""
    kinds = (FollowUp.FAILURE, FollowUp.QUARANTINE) if is_set_aside else (FollowUp.FAILURE,)
    return tuple(_of_attempt(core, kind, attempt) for kind in kinds if _wants(handlers, kind, attempt.request))


def prepare(core: Core, attempt: Attempt, match: FollowUpMatch) -> Flow[FollowUpMatch | None]:
    """Fetch what the function of a follow-up is given; None when there is nothing left to do. Raises FollowUpLost."""
    about: About | None
    payloads: list[Any]
    about, payloads = yield Batch((core.calls.about(attempt.key), core.calls.payloads(attempt.key)))
    if about is None:
        raise FollowUpLost(f"nothing is known of what {attempt.key!r} is about: it was submitted by hand, or deleted")
    if match.kind is FollowUp.QUARANTINE:
        entry = yield from _entry(core, about.of)
        return None if entry is None else match.given(about.of, entry)
    if match.kind is FollowUp.FAILURE:
        return match.given(about.of, packing.unpack_error(about.error), payloads)
    if about.stored is None:
        raise FollowUpLost(f"the result of {about.of!r} is not with its callback {attempt.key!r}")
    try:
        value = yield from value_of(core, about.stored)
    except CorruptResult as error:
        raise FollowUpLost(
            f"the result of {about.of!r} is gone before its callback {attempt.key!r}: {error}"
        ) from error
    return match.given(about.of, value, payloads)


def conclude(core: Core, attempt: Attempt) -> Flow[None]:
    """A follow-up has run: nothing of it is kept. Raises LeaseLost."""
    yield core.calls.conclude(attempt)


def finish(core: Core, attempt: Attempt, value: Any, *, sticky: bool, ttl: float | None) -> Flow[list[Any]]:
    """End an attempt well for a holder that has no routes: the payloads, for there is no callback. Raises LeaseLost."""
    if is_follow_up(attempt.request):
        yield from conclude(core, attempt)
        return []
    return (yield from flows.finish(core, attempt, value, sticky=sticky, ttl=ttl, wants_payloads=True))


def attend(core: Core, handlers: Handlers) -> Flow[int]:
    """Make the follow-ups of failures that nobody has seen to and that these handlers want to hear of; how many."""
    made = 0
    for kind in (FollowUp.FAILURE, FollowUp.QUARANTINE):
        if handlers.follows(kind):
            made += yield from _attend_kind(core, handlers, kind)
    return made


def _attend_kind(core: Core, handlers: Handlers, kind: FollowUp) -> Flow[int]:
    """Newest first, so that what nobody wants is never in the way of what is new; what is left is for other workers."""
    made, below = 0, "+inf"
    for _ in range(MOST_PAGES):
        page: list[tuple[Key, int]] = yield core.calls.unattended(kind, below, PAGE)
        if not page:
            break
        below = f"({page[-1][1]}"
        found: list[Unattended] = yield Batch(tuple(core.calls.failed_request(key) for key, _ in page))
        calls = []
        for (key, since), each in zip(page, found, strict=True):
            if each.state == State.FAILED and each.request is not None and _wants(handlers, kind, each.request):
                follow_up = _follow_up(core, kind, each.request, key, since, each.queue, each.priority)
                calls.append(core.calls.attend(key, since, follow_up))
        if calls:
            words: list[str] = yield Batch(tuple(calls))
            made += words.count("attended")
        if len(page) < PAGE:
            break
    return made


def _wants(handlers: Handlers, kind: FollowUp, request: BatchRequest) -> bool:
    """A consumer is not told of its own death: it would die of that as well, for ever."""
    if request.operation.startswith(f"{OWN_OPERATION}{FollowUp.QUARANTINE}"):
        return False
    if kind is FollowUp.QUARANTINE:
        return handlers.follows(kind)
    if is_follow_up(request):
        return False
    handler = handlers.handler_of(request)
    return handler is not None and kind in handler.hooks


def _of_attempt(core: Core, kind: FollowUp, attempt: Attempt) -> NextUp:
    return _follow_up(core, kind, attempt.request, attempt.key, int(attempt.token), attempt.queue, attempt.priority)


def _follow_up(
    core: Core, kind: FollowUp, request: BatchRequest, key: Key, number: int, queue: str, priority: Priority
) -> NextUp:
    """``number`` tells this end of the request from its others."""
    digest = hashlib.blake2b(f"{kind} {key} {number}".encode(), digest_size=16).hexdigest()
    operation = f"{OWN_OPERATION}{kind}:{request.operation}".removesuffix(":")
    about = BatchRequest(
        request.uri, request.params, operation=operation, key=f"cb-{digest}", queue=queue, priority=priority
    )
    identity = core.identify(about)
    return NextUp(kind, about, identity, core.jobs.enqueue(identity.key, core.describe(about), queue, priority))


def _entry(core: Core, key: Key) -> Flow[QuarantineEntry | None]:
    """What the consumer of the quarantine is given; None when the request has left the quarantine since."""
    found, payloads = yield Batch((core.calls.entry(key), core.calls.payloads(key)))
    return replace(found, payloads=payloads) if isinstance(found, QuarantineEntry) else None
