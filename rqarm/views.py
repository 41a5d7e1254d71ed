"""Read-only answers that are put together from more than one source: ``explain``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rqarm.calls import Found
from rqarm.flows import Core, Flow
from rqarm.model import Key, Outcome, State
from rqarm.request import BatchRequest, as_request
from rqarm.uri import Step, canonicalize


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a request has its key. ``would``: the outcome that a submit would have now."""

    uri: str
    canonical: str
    identity: str
    key: Key
    steps: tuple[Step, ...]
    state: State
    would: Outcome

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return {
            "uri": self.uri,
            "canonical": self.canonical,
            "identity": self.identity,
            "key": str(self.key),
            "steps": [{"rule": step.rule, "before": step.before, "after": step.after} for step in self.steps],
            "state": str(self.state),
            "would": str(self.would),
        }


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
    found: Found = yield core.calls.read(identity.key, with_value=True)
    return Explanation(
        uri=request.uri,
        canonical=identity.uri,
        identity=identity.text,
        key=identity.key,
        steps=steps,
        state=found.status.state,
        would=_would(found),
    )


def _would(found: Found) -> Outcome:
    status = found.status
    if status.state.in_flight:
        return Outcome.JOINED
    if status.state is State.COMPLETED and found.stored is not None:
        return Outcome.HIT
    return Outcome.NEGATIVE if status.quarantined else Outcome.NEW
