"""Why a request has its key, and what a submit of it would do now."""

from __future__ import annotations

from dataclasses import dataclass

from rqarm.calls import Batch
from rqarm.flows import Core, Flow
from rqarm.model import Key, Outcome, State, View
from rqarm.replies import Found
from rqarm.request import BatchRequest, as_request
from rqarm.uri import Step, canonicalize


@dataclass(frozen=True, slots=True)
class Explanation(View):
    """Why a request has its key. ``would``: the outcome that a submit would have now."""

    uri: str
    canonical: str
    identity: str
    key: Key
    steps: tuple[Step, ...]
    state: State
    would: Outcome


def explain(core: Core, request: BatchRequest | str) -> Flow[Explanation]:
    """Look, submit nothing. The answer can be out of date when you read it."""
    request = as_request(request)
    identity = core.identify(request)
    steps = canonicalize(
        request.uri,
        request.params,
        operation=request.operation,
        ignore_params=core.settings.ignore_params,
        explain=True,
    ).steps
    record = core.calls.read(identity.key, with_value=True)
    found, *outlook = yield Batch((record, *core.calls.outlook(identity.key, core.queue_of(request))))
    return Explanation(
        uri=request.uri,
        canonical=identity.uri,
        identity=identity.text,
        key=identity.key,
        steps=steps,
        state=found.status.state,
        would=_would(core, found, *outlook),
    )


def _would(core: Core, found: Found, deadlines: list[bytes | None], time: tuple[int, int], waiting: int) -> Outcome:
    """What lua/submit.lua would say, but that it looks for the ticket of what is pending, too."""
    status, now_ms = found.status, int(time[0]) * 1000 + int(time[1]) // 1000
    negative_until, lease_until = (int(deadline or 0) for deadline in deadlines)
    if status.state is State.PENDING or (status.state is State.IN_PROGRESS and lease_until > now_ms):
        return Outcome.JOINED
    if status.state is State.IN_PROGRESS:
        return Outcome.NEW
    if status.state is State.COMPLETED and found.stored is not None:
        return Outcome.HIT
    if status.state is State.FAILED and (status.is_blocked or negative_until > now_ms):
        return Outcome.NEGATIVE
    is_full = 0 < core.settings.max_pending <= waiting
    return Outcome.REFUSED if is_full else Outcome.NEW
