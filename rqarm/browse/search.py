"""Pages of the indexes, filtered: the search, and the cache in its orders."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote

from rqarm.calls import Call
from rqarm.errors import InvalidRequest
from rqarm.flows import Core, Flow
from rqarm.model import BatchStatus, Key, State, View
from rqarm.replies import moment, read_status, read_words, rows, text_of
from rqarm.request import BatchRequest
from rqarm.uri import check_key, redact

#: records that one page of a search looks at, and the most entries of a page. Source: benchmarks/views.py, 5 to 20 ms
LOOKS, LONGEST_PAGE = 1_000, 500
QUARANTINED = "quarantined"
#: where requests of a state are found, in the words of search.lua; newest first where the index knows
PLACES: dict[str, str] = {
    "": "in_progress pending -failed -cancelled -quarantined -completed",
    State.UNKNOWN: "",
    State.PENDING: "pending",
    State.IN_PROGRESS: "in_progress",
    State.COMPLETED: "-completed",
    State.FAILED: "-failed -quarantined",
    State.CANCELLED: "-cancelled",
    QUARANTINED: "-quarantined",
}
#: the orders of ``rm.cache.page``
ORDERS: dict[str, str] = {"expiry": "completed", "-expiry": "-completed", "size": "-largest"}

_CURSOR = re.compile(r"-?[a-z_]+(?:@\S+)? \S+ \S+ [0-9]{1,15}")
_HASHED = re.compile(r"[0-9a-f]{32}")
_PLACEHOLDER = re.compile(r"(\{[^{}]*\})")
_SITE = re.compile(r"^[A-Za-z][\w+.-]*://(?:[^/?#@]*@)?")
_RESERVED = "/:?#[]@!$&'()*+,;=%~"


@dataclass(frozen=True, slots=True)
class SearchPage(View):
    """Some of what was found. ``cursor`` leads to the next page; "" at the end.

    ``looked_at`` of the ``total`` entries of the indexes have been looked at so far, this page included. A page can be
    short, or empty, and not be the last.
    """

    entries: tuple[BatchStatus, ...]
    cursor: str
    looked_at: int
    total: int


@dataclass(frozen=True, slots=True)
class CacheEntry(View):
    """A cached result. ``size``: stored bytes. ``expires``: None = sticky."""

    status: BatchStatus
    size: int
    expires: datetime | None


@dataclass(frozen=True, slots=True)
class CachePage(View):
    """A page of the cache; ``cursor`` leads to the next, "" at the end."""

    entries: tuple[CacheEntry, ...]
    cursor: str
    total: int


def search(
    core: Core,
    text: str = "",
    *,
    state: str | None = None,
    route: str | None = None,
    tag: str | None = None,
    queue: str | None = None,
    cursor: str = "",
    limit: int = 50,
) -> Flow[SearchPage]:
    """One page. What ``text`` names exactly, as a key or as a URI, comes first on the first page."""
    wanted = str(state or "")
    if wanted not in PLACES:
        known = ", ".join(word for word in PLACES if word)
        raise InvalidRequest(f"one of {known} is needed, not {ascii(wanted)[:60]}", where="state")
    text = text.strip()
    exact = _exact_keys(core, text)
    places = "-with_tag" if tag else PLACES[wanted]
    if _HASHED.fullmatch(text):
        places = ""  # nothing but itself begins with a whole key
    found: _Found = yield search_call(
        core,
        places,
        exact=exact,
        state=wanted,
        queue=queue or "",
        tag=tag_of(tag) if tag else "",
        route=route or "",
        texts=_texts(text),
        cursor=cursor,
        limit=limit,
    )
    entries = [entry.status for entry in found.entries]
    if text:
        entries = [entry for entry in entries if entry.key in exact or _shows(core, entry, text)]
    return SearchPage(tuple(entries), found.cursor, found.looked_at, found.total)


def cache_page(core: Core, order: str, cursor: str, limit: int) -> Flow[CachePage]:
    """A page of the cached results in one of ORDERS."""
    if order not in ORDERS:
        raise InvalidRequest(f"one of {', '.join(ORDERS)} is needed, not {ascii(order)[:60]}", where="order")
    found: _Found = yield search_call(core, ORDERS[order], cursor=cursor, limit=limit)
    return CachePage(found.entries, found.cursor, found.total)


@dataclass(frozen=True, slots=True)
class _Found:
    entries: tuple[CacheEntry, ...]
    cursor: str
    looked_at: int
    total: int


def search_call(
    core: Core,
    places: str,
    *,
    exact: Sequence[Key] = (),
    state: str = "",
    queue: str = "",
    tag: str = "",
    route: str = "",
    texts: Sequence[str] = (),
    cursor: str = "",
    limit: int = 50,
) -> Call[_Found]:
    """A page of the indexes that PLACES names, as search.lua filters it."""
    if not 1 <= limit <= LONGEST_PAGE:
        raise InvalidRequest(f"from 1 to {LONGEST_PAGE} entries are allowed, not {limit}", where="limit")
    if cursor and not _CURSOR.fullmatch(cursor):
        raise InvalidRequest("not a cursor of a page before: give it as it came", where="cursor")

    def parse(reply: Any) -> _Found:
        _, behind, looked_at, total, *found = read_words("search", reply)
        return _Found(tuple(cache_entry(row) for row in rows(found, 4)), text_of(behind), int(looked_at), int(total))

    argv = (
        places,
        " ".join(exact),
        state,
        queue,
        tag,
        *on_route(route),
        json.dumps(list(texts)),
        cursor,
        limit,
        LOOKS,
    )
    return core.calls.index_call("search", core.keys.named("queues"), argv, parse)


def _exact_keys(core: Core, text: str) -> tuple[Key, ...]:
    """The keys that the text can mean: as a key, and as a URI."""
    if not text:
        return ()
    found = []
    for meant in (check_key, lambda uri: BatchRequest(uri).identify(core.settings.ignore_params).key):
        try:
            found.append(meant(text))
        except InvalidRequest:
            continue  # it cannot be that; the rest of the search finds it as a part of a URI
    return tuple(dict.fromkeys(found))


def _texts(text: str) -> list[str]:
    """The forms in which the text can stand in a canonical URI, in lower case."""
    given = (text, text.lower())  # beyond ASCII the two are encoded differently
    encoded = [quote(form, safe=_RESERVED) for form in given]
    forms = [*given, *encoded, *(form.replace("%20", "+") for form in encoded)]
    return list(dict.fromkeys(form.lower() for form in forms if form))


def _shows(core: Core, entry: BatchStatus, text: str) -> bool:
    """Whether the text is in what people may see of an entry: a search must not answer what is in a secret."""
    shown = redact(entry.uri, core.settings.secret_params).lower()
    return entry.key.startswith(text) or any(form in shown for form in _texts(text))


def on_route(route: str) -> tuple[str, str]:
    """A route for the scripts: itself, and the Lua pattern of the beginning of a URI on it.

    It is an operation, or host and path as they begin: whole segments, ``{name}`` is any one of them, ``{name:path}``
    any number.
    """
    if not route:
        return "", ""
    if len(route) > 1_000:
        raise InvalidRequest(f"{len(route)} characters, at most 1,000 are allowed", where="route")
    pieces = []
    for piece in _PLACEHOLDER.split(_SITE.sub("", route).rstrip("/")):
        if _PLACEHOLDER.fullmatch(piece):
            pieces.append("[^?#]+" if piece.endswith(":path}") else "[^/?#]+")
        else:
            pieces.append(re.sub(r"([^A-Za-z0-9])", r"%\1", quote(piece, safe=_RESERVED)))
    return route, f"^{''.join(pieces)}()"


def cache_entry(row: Sequence[Any]) -> CacheEntry:
    key, packed, score, size = row
    score = text_of(score) if score is not None else "inf"
    expires = None if score in ("inf", "+inf") else moment(int(float(score)))
    return CacheEntry(read_status(Key(text_of(key)), packed), int(float(size or 0)), expires)


def tag_of(tag: object) -> str:
    """A tag that a request can have."""
    return BatchRequest("/", tags=(tag,)).tags[0]  # type: ignore[arg-type] # it is checked there
