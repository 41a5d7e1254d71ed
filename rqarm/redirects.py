"""Redirects: one request lets another one answer.

Three steps, because a script can create one RQ job, that of its own key: look whether it may be done, submit the target
like any client, end the attempt as its alias. A crash between them costs an attempt; the
target just runs.
No I/O here, as in rqarm.flows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rqarm import flows
from rqarm.calls import NextUp, ms
from rqarm.context import Redirected
from rqarm.errors import (
    AliasesFull,
    CorruptResult,
    RedirectLoop,
    Refused,
    RequestCancelled,
    RequestFailed,
    RequestLost,
    RequestUnknown,
    ResultNotReady,
)
from rqarm.flows import Core, Flow
from rqarm.model import BatchStatus, Outcome, Priority, State
from rqarm.replies import Attempt, Redirection
from rqarm.request import BatchRequest, as_request
from rqarm.uri import redact

#: seconds until a request is tried again whose target was refused, because a queue or its set of aliases is full
REFUSED_DELAY = 5.0
#: times that a target is submitted which vanishes before anybody can lead to it
PATIENCE = 5

#: the state of an attempt's request after each word; the words that are missing do not end it
_ENDS = {
    "aliased": State.COMPLETED,
    "linked": State.PENDING,
    "failed": State.FAILED,
    "cancelled": State.CANCELLED,
}


def look_up(core: Core, target: BatchRequest) -> Flow[Any]:
    """The cached result of another request. Raises Redirected when there is none."""
    try:
        return (yield from flows.result(core, core.identify(target).key))
    except CorruptResult:
        raise Redirected(target, again=True) from None
    except (ResultNotReady, RequestUnknown, RequestFailed, RequestCancelled):
        raise Redirected(target) from None


def redirect(
    core: Core,
    attempt: Attempt,
    target: BatchRequest | str,
    *,
    again: bool = False,
    failure_ttl: float | None = None,
    follow_ups: Sequence[NextUp] = (),
) -> Flow[str]:
    """End an attempt by leading to another request, which is submitted or joined: the word of lua/redirect.lua.

    The target gets what this request was given, where it does not say better itself: queue, priority, sticky, TTL.
    ``failure_ttl``: how long this request can be inspected, should the target fail. ``follow_ups``: who is told should
    the target have ended already; else the target's own are, with the payloads of both.

    Raises LeaseLost. Refused (the target's queue is full), AliasesFull, RedirectLoop, KeyConflict, RequestLost: the
    attempt is still ours.
    """
    request = _with_wishes(attempt, as_request(target))
    key = core.identify(request).key
    failure_ttl_ms = ms(core.settings.failure_ttl if failure_ttl is None else failure_ttl)
    is_submitted = False
    for _ in range(PATIENCE):
        # what would be refused must not leave a target behind: it might go on with the next
        came: Redirection = yield core.calls.redirect(
            attempt, key, failure_ttl_ms=failure_ttl_ms, is_submitted=is_submitted, follow_ups=follow_ups
        )
        if came.word == "loop":
            raise RedirectLoop(tuple(redact(uri, core.settings.secret_params) for uri in came.chain), "a redirect loop")
        if came.word == "endless":
            chain = ("...", core.describe(attempt.request), core.describe(request))
            raise RedirectLoop(chain, "too many redirects in a row")
        if came.word == "full":
            raise AliasesFull(key)
        if came.word != "gone":
            return came.word
        status: BatchStatus = yield from flows.submit(core, request, again=again)
        if status.outcome is Outcome.REFUSED:
            raise Refused(status.key, status.queue)
        is_submitted = True
    raise RequestLost(key)


def redirected(core: Core, attempt: Attempt, target: BatchRequest | str) -> Flow[State]:
    """The same for who holds a lease: what the request is now."""
    word = yield from redirect(core, attempt, target)
    if word in _ENDS:
        return _ENDS[word]
    # a repeat of what was done: the record knows
    status = yield from flows.status(core, attempt.key)
    return status.state


def name_of(core: Core, target: BatchRequest) -> str:
    """What people read of a target: no secrets."""
    return core.describe(target)


def _with_wishes(attempt: Attempt, target: BatchRequest) -> BatchRequest:
    mine = attempt.request
    sticky = target.sticky or mine.sticky
    return target.with_options(
        queue=target.queue or attempt.queue or None,
        priority=Priority(min(target.priority, attempt.priority)),
        sticky=sticky,
        ttl=None if sticky else max(target.ttl or 0, mine.ttl or 0) or None,
    )
