"""The span of one execution. The flow of the execution knows nothing of it: its steps pass through here.

The span is active while the flow and the handler run, not while somebody else's step is answered: a horse has several
executions on their way in one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import redis

from rqarm import packing, tracing
from rqarm.calls import Call
from rqarm.context import RetryLater
from rqarm.errors import RqarmError

if TYPE_CHECKING:
    from rqarm.worker.execution import Execution

log = logging.getLogger("rqarm.worker")

#: the transitions after which an attempt has counted
ENDINGS = frozenset({"complete", "conclude", "fail", "redirect", "retry"})


def traced(run: Execution, steps: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
    """The steps of an execution, with a span around them in a process that traces."""
    span = _begin(run)
    if span is None:
        yield from steps
        return
    run.span, end_ns = span, None
    answer: Any = None
    failure: BaseException | None = None
    try:
        while True:
            with span.active():
                step = steps.send(answer) if failure is None else steps.throw(failure)
            answer = failure = None
            try:
                if isinstance(step, Call) and step.script.name in ENDINGS:
                    if end_ns is None:
                        yield from _meet(run, span)
                    end_ns = tracing.now_ns()
                    answer = yield step
                elif isinstance(step, Call):
                    answer = yield step
                else:
                    with span.active():
                        answer = yield step
            except GeneratorExit:
                steps.close()
                raise
            except BaseException as error:  # noqa: BLE001 -- it belongs to the flow
                failure = error
    except StopIteration:
        return
    finally:
        _end(run, span, end_ns)


def _begin(run: Execution) -> tracing.Span | None:
    attempt = run.attempt
    return tracing.execution(
        attempt.queue,
        attempt.trace,
        messaging__message__id=attempt.key,
        messaging__client__id=run.worker,
        rqarm__request=run.core.describe(attempt.request),
        rqarm__route=run.family,
        rqarm__attempt=attempt.number,
        rqarm__retries=attempt.retries,
        rqarm__crashes=attempt.crashes,
        rqarm__wait_s=attempt.waited,
    )


def _meet(run: Execution, span: tracing.Span) -> Generator[Any, Any, None]:
    """Before the end: link to those who have joined, and let those find the span who come from now on."""
    if not span.is_recording:
        return
    try:
        span.link((yield run.core.calls.trace(run.attempt, span.traceparent)))
    except (redis.exceptions.RedisError, RqarmError) as error:
        # the end itself will find out what is wrong
        log.debug("%s: its trace was not noted: %s", run.attempt.key, error)


def _end(run: Execution, span: tracing.Span, end_ns: int | None) -> None:
    outcome, error = run.outcome.partition(" in ")[0].partition(" to ")[0], run.error
    span.set(rqarm__outcome=outcome)
    if error is not None and outcome in ("failed", "retried") and not isinstance(error, RetryLater):
        told = packing.unpack_error(packing.pack_error(error))
        # the same value may be written in one way in the URI as given, and in another in the canonical one
        request, secret = run.attempt.request, run.core.settings.secret_params
        texts = [
            tracing.conceal(told[name], (request.uri, request.canonical), secret) for name in ("message", "traceback")
        ]
        span.fail(told["type"], texts[0][: tracing.MESSAGE_CHARS], texts[1][-tracing.TRACEBACK_CHARS :])
    span.end(end_ns)
