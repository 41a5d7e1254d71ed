"""What happens, as it happens: the events of a namespace."""

from __future__ import annotations

from dataclasses import dataclass

from rqarm.calls import ms
from rqarm.flows import RECHECK, Core, Emit, Flow
from rqarm.model import Key


@dataclass(frozen=True, slots=True)
class Event:
    """One transition. ``id`` starts with its time in Unix ms and is what ``since`` takes."""

    id: str
    verb: str
    key: Key
    state: str


def events(core: Core, since: str | None, timeout: float | None) -> Flow[None]:
    """Emits transitions as they happen, oldest first, until ``timeout`` seconds pass without one (None = for ever, 0 =
    only what is there).

    ``since``: an event id to go on behind; "0" = from the oldest that is kept; None = only what comes.
    """
    after: str = since if since is not None else (yield core.calls.newest_event())
    quiet_since = core.clock()
    while True:
        entries = yield core.calls.events(after)
        if not entries:
            left = RECHECK if timeout is None else min(RECHECK, timeout - (core.clock() - quiet_since))
            if left <= 0:
                return
            entries = yield core.calls.next_events(after, ms(left))
        for entry_id, fields in entries:
            after = entry_id
            yield Emit(Event(entry_id, fields.get("verb", ""), Key(fields.get("key", "")), fields.get("state", "")))
            quiet_since = core.clock()
