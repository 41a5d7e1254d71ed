"""Requests that need others: the attempt ends, and begins again when the others have ended.

The handler is called anew then, from its start, and finds what it asks for. No worker waits meanwhile. Two steps,
because a script can create one RQ job: submit what is missing like any client, end the attempt. A crash between them
costs an attempt; the others just run. No I/O here, as in rqarm.flows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rqarm import bulk, flows
from rqarm.calls import Batch, ms
from rqarm.context import Needed
from rqarm.errors import AliasesFull, CorruptResult, NeedLoop
from rqarm.flows import PARK_DELAY, Core, Flow
from rqarm.model import BatchStatus, Outcome, Priority, State
from rqarm.replies import Attempt, Found, Redirection
from rqarm.request import BatchRequest
from rqarm.uri import redact


def values_of(core: Core, attempt: Attempt, requests: Sequence[BatchRequest]) -> Flow[list[Any]]:
    """The results of all requests, in their order. Raises Needed when some are missing.

    One that has ended without a result since this request was submitted raises what ``result`` would: RequestFailed,
    Quarantined, RequestCancelled. One that did so before may run again, and what is corrupt does at once.
    """
    keys = [core.identify(request).key for request in requests]
    mine, *found = yield Batch(
        (core.calls.read(attempt.key, with_value=False), *(core.calls.read(key, with_value=True) for key in keys))
    )
    values, missing = [], []
    for request, each in zip(requests, found, strict=True):
        if each.stored is not None:
            try:
                values.append((yield from flows.value_of(core, each.stored)))
            except CorruptResult:
                yield from flows.submit(core, _with_wishes(attempt, request), again=True)
                missing.append(request)
        elif _has_failed_since(each, mine):
            raise flows.unsuccessful(each.status)
        else:
            missing.append(request)
    if missing:
        raise Needed(tuple(missing))
    return values


def _has_failed_since(found: Found, mine: Found) -> bool:
    ended, since = found.status.ended, mine.status.submitted
    is_over = found.status.state in (State.FAILED, State.CANCELLED)
    return is_over and ended is not None and (since is None or ended >= since)


def need(core: Core, attempt: Attempt, requests: Sequence[BatchRequest]) -> Flow[str]:
    """Submit what is missing and end the attempt until all of it has ended: ``waiting``. ``ready``: it has already.

    The others get this request's queue, and its priority if that is better. Raises LeaseLost. Refused, AliasesFull,
    NeedLoop, BulkError, and RequestFailed for one that is answered by its failure: the attempt is still ours.
    """
    wanted = [_with_wishes(attempt, request) for request in requests]
    statuses: list[BatchStatus] = yield from bulk.submit_many(core, wanted)
    for status in statuses:
        if status.outcome in (Outcome.NEGATIVE, Outcome.REFUSED):
            raise flows.unsuccessful(status)
    description = core.describe(attempt.request)
    ticket = core.jobs.park(attempt.key, description, attempt.queue, attempt.priority, PARK_DELAY)
    keys = [status.key for status in statuses]
    came: Redirection = yield core.calls.need(attempt, keys, ticket, delay_ms=ms(PARK_DELAY))
    if came.word == "loop":
        raise NeedLoop(tuple(redact(uri, core.settings.secret_params) for uri in came.chain), "they need each other")
    if came.word == "full":
        raise AliasesFull(keys[0])
    return came.word


def _with_wishes(attempt: Attempt, request: BatchRequest) -> BatchRequest:
    return request.with_options(
        queue=request.queue or attempt.queue or None,
        priority=Priority(min(request.priority, attempt.priority)),
        sticky=request.sticky,
        ttl=request.ttl,
    )
