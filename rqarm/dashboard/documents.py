"""The documents behind the pages and the API: what RequestManager says, as JSON types, without secrets.

Each takes three round trips at the most. The arguments are text from path and query; what is wrong with them is said by
InvalidRequest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rqarm.dashboard import shown
from rqarm.dashboard.state import Dashboard
from rqarm.errors import InvalidRequest, RqarmError
from rqarm.model import BatchStatus
from rqarm.text import jsonable
from rqarm.uri import check_key

Arguments = Mapping[str, str]
Document = dict[str, Any]

#: entries of a page
PAGE = 50
MOST = 500
_WORDS = re.compile(r"\S+|\s+")
_EVENT_ID = re.compile(r"[0-9]{1,15}(?:-[0-9]{1,15})?")


def overview(dashboard: Dashboard, _: Arguments) -> Document:
    """Everything in one look: queues, hit rate, memory, failures, what needs attention."""
    return {"overview": dashboard.manager.overview().to_dict()}


def requests(dashboard: Dashboard, given: Arguments) -> Document:
    """Search: ?q= ?state= ?route= ?tag= ?queue= ?cursor= ?limit="""
    asked = {name: given.get(name, "").strip() for name in ("q", "state", "route", "tag", "queue")}
    page = dashboard.manager.search(
        asked["q"],
        state=asked["state"] or None,
        route=asked["route"] or None,
        tag=asked["tag"] or None,
        queue=asked["queue"] or None,
        cursor=given.get("cursor", ""),
        limit=_number(given, "limit", PAGE, 1, MOST),
    )
    return {
        "asked": asked,
        "entries": [_status(dashboard, each) for each in page.entries],
        "cursor": page.cursor,
        "looked_at": page.looked_at,
        "total": page.total,
    }


def request(dashboard: Dashboard, given: Arguments) -> Document:
    """One request in full: timeline, attempts, why it has its key, waiters, result."""
    settings = dashboard.manager.settings
    detail = dashboard.manager.inspect(check_key(given["key"]), values=True).redacted(settings.secret_params)
    raw_uri = str(detail.status.uri)
    document = jsonable(detail.to_dict())
    document["kwargs"] = shown.scrubbed(document["kwargs"], settings.secret_params)
    document["payloads"] = shown.scrubbed(document["payloads"], settings.secret_params)
    # the fields in which other text may repeat the request's own
    document["record"] = {name: dashboard.redacted(text) for name, text in document["record"].items()}
    for each in (document["status"], *document["attempts"]):
        _scrub_error(dashboard, each)
    uri = raw_uri or str(detail.key)
    return {
        "title": uri[:120],
        "detail": document,
        "preview": _preview(dashboard, document) if document["result"] else None,
    }


def cache(dashboard: Dashboard, given: Arguments) -> Document:
    """The cache: sizes, ages, times to live, and a page of its entries: ?order= ?cursor= ?limit="""
    order = given.get("order", "") or "-expiry"
    cached = dashboard.manager.cache
    found = cached.overview()
    page = cached.page(order=order, cursor=given.get("cursor", ""), limit=_number(given, "limit", PAGE, 1, MOST))
    return {
        "order": order,
        "cache": {**found.to_dict(), "largest": [_entry(dashboard, each) for each in found.largest]},
        "entries": [_entry(dashboard, each) for each in page.entries],
        "cursor": page.cursor,
        "total": page.total,
        "hot": dashboard.manager.overview().to_dict()["hot"],
    }


def claims(dashboard: Dashboard, given: Arguments) -> Document:
    """What runs: holder, end of the lease, last sign of life; and how full the limits are. ?offset= ?limit="""
    offset, limit = _number(given, "offset", 0, 0, 10**9), _number(given, "limit", PAGE, 1, MOST)
    page = dashboard.manager.claims(offset=offset, limit=limit)
    entries = [{**each.to_dict(), "status": _status(dashboard, each.status)} for each in page.entries]
    return {**page.to_dict(), "entries": entries, "offset": offset}


def workers(dashboard: Dashboard, _: Arguments) -> Document:
    """The workers of our queues: state, requests in hand, counts, heartbeat."""
    return dashboard.manager.workers().to_dict()


def quarantine(dashboard: Dashboard, given: Arguments) -> Document:
    """A page of what was set aside, newest first, grouped by exception: ?cursor= ?limit="""
    page = dashboard.manager.quarantine.page(
        cursor=given.get("cursor", ""), limit=_number(given, "limit", PAGE, 1, MOST)
    )
    entries = [_set_aside(dashboard, each) for each in page.entries]
    return {
        "groups": _groups(entries),
        "shown": len(entries),
        "cursor": page.cursor,
        "looked_at": page.looked_at,
        "total": page.total,
    }


def explain(dashboard: Dashboard, given: Arguments) -> Document:
    """Why the request ?uri= has its key, and what a submit of it would do now."""
    if not given.get("uri"):
        raise InvalidRequest("say which: ?uri=/cities/FR", where="uri")
    found = dashboard.manager.explain(given["uri"]).to_dict()
    for name in ("uri", "canonical", "identity"):
        found[name] = dashboard.redacted(found[name])
    for step in found["steps"]:
        for name in ("before", "after"):
            step[name] = _redacted_part(dashboard, step[name])
    return {"explanation": found}


def events(dashboard: Dashboard, given: Arguments) -> Document:
    """Transitions behind the id ?since=, oldest first, as far as they are kept; ?limit="""
    limit, since = _number(given, "limit", 100, 1, 1_000), given.get("since") or "0"
    if not _EVENT_ID.fullmatch(since):
        raise InvalidRequest(
            f"the id of an event is needed, such as 1700000000000-0, not {ascii(since)[:40]}", where="since"
        )
    found: list[Document] = []
    for each in dashboard.manager.events(since, timeout=0):
        found.append({"id": each.id, "verb": each.verb, "key": str(each.key), "state": each.state})
        if len(found) == limit:
            break
    return {"events": found, "next": found[-1]["id"] if found else since}


# -- parts


def _number(given: Arguments, name: str, default: int, least: int, most: int) -> int:
    text = given.get(name, "")
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 12 or not least <= int(text) <= most:
        raise InvalidRequest(f"a whole number from {least} to {most} is needed, not {ascii(text)[:40]}", where=name)
    return int(text)


def _status(dashboard: Dashboard, status: BatchStatus) -> Document:
    document = status.to_dict()
    _scrub_error(dashboard, document)
    document["uri"] = dashboard.redacted(document["uri"])
    return document


def _scrub_error(dashboard: Dashboard, document: Document) -> None:
    """Take the URI's secrets out of the error, which often repeats it."""
    if document["error"]:
        document["error"] = {
            name: _redacted_lines(dashboard, text) if isinstance(text, str) else text
            for name, text in document["error"].items()
        }


def _redacted_lines(dashboard: Dashboard, text: str) -> str:
    """Word by word, since redact takes what follows a question mark for a query up to the end."""
    return "".join(
        _redacted_part(dashboard, word) if "=" in word or "@" in word else word for word in _WORDS.findall(text)
    )


def _redacted_part(dashboard: Dashboard, part: str) -> str:
    """A part of a URI, which may be a parameter alone."""
    return dashboard.redacted(f"?{part}")[1:] if "=" in part and "?" not in part else dashboard.redacted(part)


def _entry(dashboard: Dashboard, entry: Any) -> Document:
    document: Document = entry.to_dict()
    return {**document, "status": _status(dashboard, entry.status)}


def _set_aside(dashboard: Dashboard, entry: Any) -> Document:
    document: Document = jsonable(entry.to_dict())
    secret = dashboard.manager.settings.secret_params
    document["uri"] = dashboard.redacted(document["uri"])
    for name in ("message", "traceback"):
        document[name] = _redacted_lines(dashboard, document[name])
    for name in ("kwargs", "info"):
        document[name] = shown.scrubbed(document[name], secret)
    del document["payloads"]
    return document


def _groups(entries: list[Document]) -> list[Document]:
    """Entries of the quarantine by exception, the largest group first."""
    counts = Counter(each["exception"] for each in entries)
    return [
        {"exception": name, "count": count, "entries": [each for each in entries if each["exception"] == name]}
        for name, count in counts.most_common()
    ]


def _preview(dashboard: Dashboard, detail: Document) -> Document:
    """The beginning of the stored result, as text. One more round trip, or two when it lies in pieces."""
    result, key = detail["result"], detail["key"]
    if result["missing"]:
        return {"text": "", "is_cut": False, "fault": f"{result['missing']} of its pieces are gone: run it again"}
    try:
        if result["kind"] == "value":
            if result["size"] > shown.PREVIEW_BYTES:
                return {"text": "", "is_cut": True, "fault": ""}
            text, is_cut = shown.json_preview(dashboard.manager.cache.get(key))
        else:
            with dashboard.manager.cache.open(key) as stored:
                text = shown.bytes_preview(stored.read(shown.PREVIEW_CHARS), result["content_type"])
            is_cut = result["size"] > shown.PREVIEW_CHARS
    except RqarmError as error:  # it cannot be read, or has gone between the two looks
        return {"text": "", "is_cut": False, "fault": str(error)}
    return {"text": text, "is_cut": is_cut, "fault": ""}
