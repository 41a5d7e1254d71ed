"""What can be done. Each action is a POST, from a form of a page or to the API, and is logged with who asked for it.

The guard has looked at credentials, origin and read-only before one of these runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, jsonify, redirect, request, url_for

from rqarm.dashboard.security import note
from rqarm.dashboard.state import Dashboard
from rqarm.errors import InvalidRequest, RequestUnknown
from rqarm.model import Key
from rqarm.uri import check_key

Arguments = Mapping[str, str]


#: words for: nothing was done
IDLE = frozenset({"ended", "joined", "unknown", "in_flight", "no_result", "not_running", "superseded"})


@dataclass(frozen=True, slots=True)
class Done:
    """What came of an action: a word of TOLD, what it was done to, and how many were touched."""

    word: str
    target: str
    count: int


def _one(word: str, key: Key) -> Done:
    """What came of an action on one request."""
    return Done(word, key, 0 if word in IDLE else 1)


@dataclass(frozen=True, slots=True)
class Action:
    """``back``: the page to go to afterwards, unless the form names another of PAGES."""

    name: str
    path: str
    do: Callable[[Dashboard, Arguments], Done]
    back: str = "request"


#: pages that a form may name as the one to go back to
PAGES = ("overview", "requests", "request", "cache", "claims", "quarantine")

#: what a page says of an outcome; {n} = how many
TOLD = {
    "cancelled": "Cancelled, for everybody who waited for it.",
    "ended": "It had ended already: nothing was done.",
    "resubmitted": "It runs again.",
    "joined": "It is in flight already: nothing was started.",
    "forgotten": "Forgotten, with its result.",
    "unknown": "There is no such request any more.",
    "in_flight": "It is in flight: nothing was done.",
    "superseded": "It was set aside again meanwhile: nothing was done.",
    "pinned": "Its result stays until it is cleared.",
    "unpinned": "Its result expires again.",
    "retained": "Its result lives as long as you said, from now on.",
    "no_result": "It has no stored result: nothing was done.",
    "released": "Handed back: it is next in line.",
    "not_running": "It does not run: nothing was done.",
    "cleared": "Cleared {n} results.",
    "requeued": "Requeued {n} of them.",
    "discarded": "Discarded {n} of them.",
}


def told(word: str) -> str:
    """The sentence for ``?done=word`` or ``?done=word:n``; "" for anything else, so that a link cannot put words in."""
    name, _, count = word.partition(":")
    return TOLD.get(name, "").format(n=f"{int(count):,}" if count.isdecimal() and len(count) < 12 else "some")


def add_to(blueprint: Blueprint, dashboard: Dashboard, api: str) -> None:
    """Each action for the pages' forms and for the API."""
    for action in ACTIONS:
        _add_form(blueprint, dashboard, action)
        _add_json(blueprint, dashboard, action, api)


def _add_form(blueprint: Blueprint, dashboard: Dashboard, action: Action) -> None:
    def view(**path: str) -> Response:
        done = _run(dashboard, action, {**request.form.to_dict(), **path})
        back = request.form.get("back", "")
        page = back if back in PAGES else action.back
        if page == "request" and "key" not in path:
            page = "overview"
        values: dict[str, Any] = {"done": f"{done.word}:{done.count}"} | (path if page == "request" else {})
        where = url_for(f".{page}", **values)
        response: Response = redirect(where, 303)  # type: ignore[assignment]
        return response

    view.__doc__ = action.do.__doc__
    blueprint.add_url_rule(action.path, f"do_{action.name}", view, methods=["POST"])


def _add_json(blueprint: Blueprint, dashboard: Dashboard, action: Action, api: str) -> None:
    def view(**path: str) -> Response:
        done = _run(dashboard, action, {**_given(), **path})
        if done.word == "unknown":
            raise RequestUnknown(check_key(done.target))
        return jsonify(outcome=done.word, target=done.target, count=done.count)

    view.__doc__ = action.do.__doc__
    blueprint.add_url_rule(api + action.path, f"api_do_{action.name}", view, methods=["POST"])


def _given() -> Arguments:
    """The arguments in the body: a form, or a JSON object of texts and numbers."""
    if not request.is_json:
        return request.form.to_dict()
    given = request.get_json(silent=True)
    if not isinstance(given, dict) or not all(isinstance(value, str | int | float) for value in given.values()):
        raise InvalidRequest("a JSON object of texts and numbers is needed", where="body")
    return {name: str(value) for name, value in given.items()}


def _run(dashboard: Dashboard, action: Action, given: Arguments) -> Done:
    target = given.get("key", "")
    try:
        done = action.do(dashboard, given)
    except Exception as error:
        note(action.name, target, f"{type(error).__name__}: {error}")
        raise
    note(action.name, done.target, f"{done.word} ({done.count})")
    return done


# -- requests


def cancel(dashboard: Dashboard, given: Arguments) -> Done:
    """End a request for everybody who waits for it."""
    key = check_key(given["key"])
    return _one("cancelled" if dashboard.manager.cancel(key) else "ended", key)


def resubmit(dashboard: Dashboard, given: Arguments) -> Done:
    """Run a request again, whatever is cached."""
    key = check_key(given["key"])
    found = dashboard.manager.find(key)
    if found is None:
        raise RequestUnknown(key)
    status = dashboard.manager.resubmit(found)
    return _one("joined" if status.outcome == "joined" else "resubmitted", key)


def forget(dashboard: Dashboard, given: Arguments) -> Done:
    """Drop an ended request with its result."""
    key = check_key(given["key"])
    return _one("forgotten" if dashboard.manager.forget(key) else "unknown", key)


def release(dashboard: Dashboard, given: Arguments) -> Done:
    """Take a running request away from its worker: it is next in line, and the attempt does not count."""
    key = check_key(given["key"])
    return _one("released" if dashboard.manager.release(key) else "not_running", key)


# -- results


def pin(dashboard: Dashboard, given: Arguments) -> Done:
    """Make a result sticky."""
    key = check_key(given["key"])
    return _one("pinned" if dashboard.manager.cache.pin(key) else "no_result", key)


def unpin(dashboard: Dashboard, given: Arguments) -> Done:
    """Let a sticky result expire, after the usual time."""
    key = check_key(given["key"])
    return _one("unpinned" if dashboard.manager.cache.unpin(key) else "no_result", key)


def set_ttl(dashboard: Dashboard, given: Arguments) -> Done:
    """Let a result expire after ``seconds`` from now on."""
    key = check_key(given["key"])
    return _one("retained" if dashboard.manager.cache.set_ttl(key, _seconds(given)) else "no_result", key)


def clear_temporary(dashboard: Dashboard, _: Arguments) -> Done:
    """Forget every result that is not sticky."""
    return Done("cleared", "temporary", dashboard.manager.cache.clear_temporary())


def clear_route(dashboard: Dashboard, given: Arguments) -> Done:
    """Forget the results of ``route``, sticky ones too."""
    route = given.get("route", "").strip()
    if not route:
        raise InvalidRequest("say which: a path as it begins, such as /cities, or an operation", where="route")
    return Done("cleared", f"route {route}", dashboard.manager.cache.clear(route=route))


def invalidate(dashboard: Dashboard, given: Arguments) -> Done:
    """Forget the results that carry ``tag``, sticky ones too."""
    tag = given.get("tag", "").strip()
    if not tag:
        raise InvalidRequest("say which tag", where="tag")
    return Done("cleared", f"tag {tag}", dashboard.manager.cache.invalidate(tag))


# -- the quarantine


def requeue(dashboard: Dashboard, given: Arguments) -> Done:
    """Run what was set aside again: ``key``, or all of ``exception``, ``route``, ``reason``."""
    return _moved("requeued", given, dashboard.manager.quarantine.requeue)


def discard(dashboard: Dashboard, given: Arguments) -> Done:
    """Drop what was set aside: ``key``, or all of ``exception``, ``route``, ``reason``."""
    return _moved("discarded", given, dashboard.manager.quarantine.discard)


def _moved(word: str, given: Arguments, move: Callable[..., Mapping[Key, str]]) -> Done:
    if key := given.get("key", ""):
        (outcome,) = move(check_key(key)).values()
        return _one(outcome, Key(key))
    chosen = {name: given[name] for name in ("exception", "route", "reason") if given.get(name)}
    words = move(**chosen)
    return Done(word, str(chosen), sum(each == word for each in words.values()))


def _seconds(given: Arguments) -> float:
    text = given.get("seconds", "").strip()
    try:
        return float(text)
    except ValueError:
        raise InvalidRequest(f"a number of seconds is needed, not {ascii(text)[:40]}", where="seconds") from None


ACTIONS: tuple[Action, ...] = (
    Action("cancel", "/requests/<key>/cancel", cancel),
    Action("resubmit", "/requests/<key>/resubmit", resubmit),
    Action("forget", "/requests/<key>/forget", forget, back="requests"),
    Action("release", "/requests/<key>/release", release),
    Action("pin", "/requests/<key>/pin", pin),
    Action("unpin", "/requests/<key>/unpin", unpin),
    Action("ttl", "/requests/<key>/ttl", set_ttl),
    Action("clear_temporary", "/cache/clear-temporary", clear_temporary, back="cache"),
    Action("clear_route", "/cache/clear-route", clear_route, back="cache"),
    Action("invalidate", "/cache/invalidate", invalidate, back="cache"),
    Action("requeue", "/quarantine/<key>/requeue", requeue, back="quarantine"),
    Action("discard", "/quarantine/<key>/discard", discard, back="quarantine"),
    Action("requeue_group", "/quarantine/requeue", requeue, back="quarantine"),
    Action("discard_group", "/quarantine/discard", discard, back="quarantine"),
)
