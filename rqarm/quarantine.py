"""What was set aside: ``rm.quarantine``. And the one rule of what is.

A failed request that somebody should look at keeps its record, its payloads and its arguments until it is requeued or
discarded. The newest 10,000 are kept (calls.QUARANTINE_KEPT). Poisoned ones and those whose handler asked for it block:
a submit is answered ``negative``. The others are listed, and a submit runs them anew.

The list is read as the keys, newest first, in one command, then entry by entry, a hundred in a round trip. So what is
requeued or comes meanwhile moves nothing under who reads.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rqarm import packing
from rqarm.browse import search
from rqarm.calls import Batch, Call
from rqarm.context import SetAside
from rqarm.errors import InvalidRequest, NoHandler, ResultTooLarge, UnpackableResult
from rqarm.flows import Core, Emit, Flow
from rqarm.handlers import Match
from rqarm.model import Key, Reason, State
from rqarm.mounts import AppRefusal
from rqarm.replies import QuarantineEntry
from rqarm.routes import Route
from rqarm.shell import AsyncShell, Shell, same_docs
from rqarm.templates import takes
from rqarm.text import name_of
from rqarm.uri import check_key, redact

#: entries that one round trip reads; a traceback has 16 KiB at the most
PAGE = 100
#: how often an entry that changes under our hands is looked at again
LOOKS = 3
#: the request itself is at fault: nothing is to be mended here, so it is a plain failure
REFUSALS = (InvalidRequest, NoHandler, AppRefusal)

#: an error type by class or by name, with its module or without
ErrorType = type[BaseException] | str


# -- what is set aside


def reason_for(error: BaseException, route: Route | None) -> str:
    """Why a request that ends with this error is set aside; "" = it is a plain failure."""
    if isinstance(error, SetAside):
        return Reason.ASKED
    if isinstance(error, UnpackableResult | ResultTooLarge):
        return Reason.UNPACKABLE
    if isinstance(error, REFUSALS) or (route is not None and not route.quarantine):
        return ""
    return Reason.EXHAUSTED


def note_for(match: Match | None, kwargs: dict[str, Any], error: BaseException | None = None) -> bytes:
    """What the record does not say of a request that is set aside: its route, its arguments, what the handler added."""
    note: dict[str, Any] = {"kwargs": (match.kwargs if match is not None else {}) | kwargs}
    if match is not None:
        note["route"] = match.route.name
    if isinstance(error, SetAside):
        note["info"] = packing.unpack(error.packed_info)
    return packing.pack(note)


@dataclass(frozen=True, slots=True)
class QuarantinePage:
    """Some of what is set aside, newest first, without payloads; ``cursor`` leads to the next page, "" at the end.

    ``looked_at`` of the ``total`` have been looked at so far, this page included.
    """

    entries: tuple[QuarantineEntry, ...]
    cursor: str
    looked_at: int
    total: int


# -- flows


def page(core: Core, cursor: str, limit: int) -> Flow[QuarantinePage]:
    """A page in two round trips, however many are set aside."""
    place = search.PLACES[search.QUARANTINED]
    found = yield search.search_call(core, place, state=search.QUARANTINED, cursor=cursor, limit=limit)
    calls = tuple(core.calls.entry(each.status.key) for each in found.entries)
    read: list[QuarantineEntry | State] = (yield Batch(calls)) if calls else []
    listed = tuple(each for each in read if isinstance(each, QuarantineEntry))
    return QuarantinePage(listed, found.cursor, found.looked_at, found.total)


def entries(
    core: Core, *, route: str | None, exception: ErrorType | None, reason: str | None, limit: int | None
) -> Flow[None]:
    """Emits the entries, newest first, as far as they are wanted."""
    is_wanted = _filter(route, exception, reason)
    is_any = route is None and exception is None and reason is None
    keys: list[Key] = yield core.calls.set_aside(limit if is_any else None)
    emitted = 0
    for page in _pages(keys):
        for found in (yield Batch(tuple(core.calls.entry(key) for key in page))):
            if emitted == limit:
                return
            if isinstance(found, QuarantineEntry) and is_wanted(found):
                emitted += 1
                yield Emit(found)


def entry(core: Core, key: str) -> Flow[QuarantineEntry | None]:
    """The entry with its payloads."""
    name = check_key(key)
    found, payloads = yield Batch((core.calls.entry(name), core.calls.payloads(name)))
    return replace(found, payloads=payloads) if isinstance(found, QuarantineEntry) else None


def count(core: Core) -> Flow[int]:
    keys: list[Key] = yield core.calls.set_aside()
    return len(keys)


def move(
    core: Core,
    verb: str,
    keys: tuple[str, ...],
    *,
    route: str | None,
    exception: ErrorType | None,
    reason: str | None,
    all: bool,
) -> Flow[dict[Key, str]]:
    """Requeue or discard what is chosen, the oldest first; what became of each."""
    is_chosen = not (route is None and exception is None and reason is None)
    if bool(keys) == (is_chosen or all):
        raise InvalidRequest(
            "say which: keys, or route=, exception=, reason=, or all=True; keys go without the others",
            where=f"quarantine.{verb}",
        )
    is_wanted = _filter(route, exception, reason)
    if keys:
        chosen = list(dict.fromkeys(check_key(key) for key in keys))
    else:
        chosen = yield core.calls.set_aside()
        chosen.reverse()
    words: dict[Key, str] = {}
    for page in _pages(chosen):
        left = page
        for _ in range(LOOKS):
            left = yield from _move_page(core, verb, left, is_wanted, words, is_named=bool(keys))
            if not left:
                break
    return {key: words[key] for key in chosen if key in words}


def _move_page(
    core: Core,
    verb: str,
    keys: list[Key],
    is_wanted: Callable[[QuarantineEntry], bool],
    words: dict[Key, str],
    *,
    is_named: bool,
) -> Flow[list[Key]]:
    """Act on these keys; those that changed meanwhile, to be looked at again."""
    found: list[QuarantineEntry | State] = yield Batch(tuple(core.calls.entry(key) for key in keys))
    wanted: list[QuarantineEntry] = []
    for key, each in zip(keys, found, strict=True):
        if isinstance(each, QuarantineEntry):
            if is_wanted(each):
                wanted.append(each)
        elif is_named:
            words[key] = "in_flight" if each.in_flight else "unknown" if each is State.UNKNOWN else "ended"
    if not wanted:
        return []
    calls = tuple(_call(core, verb, each) for each in wanted)
    again = []
    for each, word in zip(wanted, (yield Batch(calls)), strict=True):
        if word == "superseded":
            again.append(each.key)
        # the same call sent again, because its reply was lost, finds its own work
        words[each.key] = {("requeue", "already"): "requeued", ("discard", "unknown"): "discarded"}.get(
            (verb, word), word
        )
    return again


def _call(core: Core, verb: str, entry: QuarantineEntry) -> Call[str]:
    dismissal = core.jobs.dismiss(entry.job_id, entry.queue, entry.priority)
    if verb == "discard":
        return core.calls.discard(entry, dismissal)
    description = core.describe(entry.request) if entry.request else redact(entry.uri, core.settings.secret_params)
    ticket = core.jobs.enqueue(entry.key, description, entry.queue, entry.priority)
    return core.calls.requeue(entry, ticket, dismissal)


def _pages(keys: list[Key]) -> Iterator[list[Key]]:
    for first in range(0, len(keys), PAGE):
        yield keys[first : first + PAGE]


def _filter(route: str | None, exception: ErrorType | None, reason: str | None) -> Callable[[QuarantineEntry], bool]:
    name = exception
    if isinstance(exception, type):
        name = name_of(exception)

    def is_wanted(entry: QuarantineEntry) -> bool:
        if reason is not None and entry.reason != reason:
            return False
        if name is not None and name not in (entry.exception, entry.exception.rpartition(".")[2]):
            return False
        return route is None or _is_of(entry, route)

    return is_wanted


def _is_of(entry: QuarantineEntry, route: str) -> bool:
    """Whether the entry is the route's. Who finds a dead attempt by its lease knows no routes; a template tells."""
    if entry.route or entry.request is None:
        return entry.route == route
    return takes(route, entry.request)


# -- the part of a manager


class Quarantine:
    """Look at what was set aside, set it going again, or drop it.

    Entries are chosen by key, or by ``route`` (the name), ``exception`` (a type, or its name with or without the
    module; not its subclasses) and ``reason`` (see ``Reason``), which all must hold.
    """

    def __init__(self, core: Core, shell: Shell) -> None:
        self._core, self._shell = core, shell

    def list(
        self,
        route: str | None = None,
        exception: ErrorType | None = None,
        reason: str | None = None,
        limit: int | None = None,
    ) -> Iterator[QuarantineEntry]:
        """The entries, newest first, without payloads. A hundred in a round trip."""
        return self._shell.iterate(entries(self._core, route=route, exception=exception, reason=reason, limit=limit))

    def page(self, *, cursor: str = "", limit: int = 50) -> QuarantinePage:
        """A page of the entries, newest first, in two round trips; at most 500."""
        return self._shell.run(page(self._core, cursor, limit))

    def get(self, key: str) -> QuarantineEntry | None:
        """The entry with its payloads; None when the request is not set aside."""
        return self._shell.run(entry(self._core, key))

    def count(self) -> int:
        """How many are set aside."""
        return self._shell.run(count(self._core))

    def requeue(
        self,
        *keys: str,
        route: str | None = None,
        exception: ErrorType | None = None,
        reason: str | None = None,
        all: bool = False,
    ) -> dict[Key, str]:
        """Run them again, the oldest first, at the end of their lines: what became of each key.

        ``requeued``; or, for a key that was named, ``in_flight``, ``ended`` (not set aside) and ``unknown``. Payloads
        and the arguments that a retry changed stay, crashes and retries start over. ``max_pending`` does not hold them.
        RQ's failed job is deleted. Raises InvalidRequest when nothing says which; all of them only by ``all=True``.
        """
        return self._shell.run(
            move(self._core, "requeue", keys, route=route, exception=exception, reason=reason, all=all)
        )

    def discard(
        self,
        *keys: str,
        route: str | None = None,
        exception: ErrorType | None = None,
        reason: str | None = None,
        all: bool = False,
    ) -> dict[Key, str]:
        """Drop them with their payloads and RQ's failed jobs: what became of each key.

        ``discarded``; or, for a key that was named, ``in_flight``, ``ended`` (not set aside) and ``unknown``. Raises
        InvalidRequest when nothing says which; all of them only by ``all=True``.
        """
        return self._shell.run(
            move(self._core, "discard", keys, route=route, exception=exception, reason=reason, all=all)
        )


@same_docs(Quarantine)
class AsyncQuarantine:
    def __init__(self, core: Core, shell: AsyncShell) -> None:
        self._core, self._shell = core, shell

    def list(
        self,
        route: str | None = None,
        exception: ErrorType | None = None,
        reason: str | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[QuarantineEntry]:
        return self._shell.iterate(entries(self._core, route=route, exception=exception, reason=reason, limit=limit))

    async def page(self, *, cursor: str = "", limit: int = 50) -> QuarantinePage:
        return await self._shell.run(page(self._core, cursor, limit))

    async def get(self, key: str) -> QuarantineEntry | None:
        return await self._shell.run(entry(self._core, key))

    async def count(self) -> int:
        return await self._shell.run(count(self._core))

    async def requeue(
        self,
        *keys: str,
        route: str | None = None,
        exception: ErrorType | None = None,
        reason: str | None = None,
        all: bool = False,
    ) -> dict[Key, str]:
        return await self._shell.run(
            move(self._core, "requeue", keys, route=route, exception=exception, reason=reason, all=all)
        )

    async def discard(
        self,
        *keys: str,
        route: str | None = None,
        exception: ErrorType | None = None,
        reason: str | None = None,
        all: bool = False,
    ) -> dict[Key, str]:
        return await self._shell.run(
            move(self._core, "discard", keys, route=route, exception=exception, reason=reason, all=all)
        )
