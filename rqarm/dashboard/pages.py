"""What there is to see. One function per page makes its document; a page shows it, the API answers with it.

A document holds JSON types only, with secrets taken out: nothing that the API would not tell stands on a page. Each
costs three round trips at the most, whatever the number of queues, requests or results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, current_app, jsonify, render_template, request, stream_with_context, url_for
from werkzeug.exceptions import NotFound, ServiceUnavailable

from rqarm.dashboard import charts, documents, downloads, stream
from rqarm.dashboard.state import Dashboard
from rqarm.errors import RequestUnknown
from rqarm.inspect import STATES
from rqarm.model import State
from rqarm.uri import check_key

Arguments = Mapping[str, str]
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Page:
    """One page: its name is that of the view and the template. ``document``: from the arguments in path and query."""

    name: str
    path: str
    title: str
    document: Callable[[Dashboard, Arguments], Document]


PAGES = (
    Page("overview", "/", "Overview", documents.overview),
    Page("requests", "/requests", "Requests", documents.requests),
    Page("request", "/requests/<key>", "Request", documents.request),
    Page("cache", "/cache", "Cache", documents.cache),
    Page("claims", "/claims", "Claims", documents.claims),
    Page("quarantine", "/quarantine", "Quarantine", documents.quarantine),
    Page("workers", "/workers", "Workers", documents.workers),
)

#: of the API only
MORE: dict[str, Callable[[Dashboard, Arguments], Document]] = {
    "/explain": documents.explain,
    "/events": documents.events,
}


def add_to(blueprint: Blueprint, dashboard: Dashboard, api: str) -> None:
    """The pages, the same as JSON, and what belongs to them."""
    for page in PAGES:
        _add_page(blueprint, dashboard, page)
        _add_json(
            blueprint,
            dashboard,
            f"api_{page.name}",
            api + (page.path if page.path != "/" else "/overview"),
            page.document,
        )
    for path, document in MORE.items():
        _add_json(blueprint, dashboard, f"api_{path[1:]}", api + path, document)
    _add_stream(blueprint, dashboard)

    @blueprint.get("/requests/<key>/download")
    def download(key: str) -> Response:
        """The result as a file."""
        return downloads.answer(dashboard, key)

    @blueprint.get(f"{api}/requests/<key>/result")
    def api_result(key: str) -> Response:
        """The result as a file."""
        return downloads.answer(dashboard, key)

    @blueprint.get(f"{api}/")
    def api_index() -> Response:
        """Every path of the API, from the routes themselves."""
        return jsonify(_index(blueprint, api))


def _arguments(path: Mapping[str, Any]) -> Arguments:
    return {**request.args.to_dict(), **path}


def _add_page(blueprint: Blueprint, dashboard: Dashboard, page: Page) -> None:
    def view(**path: str) -> str:
        return _render(page, page.document(dashboard, _arguments(path)))

    view.__doc__ = page.title
    blueprint.add_url_rule(page.path, page.name, view)


def _add_json(
    blueprint: Blueprint,
    dashboard: Dashboard,
    name: str,
    path: str,
    document: Callable[[Dashboard, Arguments], Document],
) -> None:
    def view(**given: str) -> Response:
        told = document(dashboard, _arguments(given))
        if "detail" in told and told["detail"]["status"]["state"] == State.UNKNOWN:
            raise RequestUnknown(check_key(given["key"]))
        return jsonify(told)

    view.__doc__ = document.__doc__
    blueprint.add_url_rule(path, name, view)


def _render(page: Page, document: Document) -> str:
    context = {"page": page.name, "title": page.title, "charts": charts, "states": STATES, **document}
    return render_template(f"rqarm/{page.name}.html", **context)


def _add_stream(blueprint: Blueprint, dashboard: Dashboard) -> None:
    pages = {page.name: page for page in PAGES}

    @blueprint.get("/stream", endpoint="stream")
    def live() -> Response:
        """Server-sent events for one page."""
        name, key = request.args.get("page", ""), request.args.get("key", "")
        if name not in pages:
            raise NotFound("There is no such page.")
        if not dashboard.poller.enter():
            # not an error for the browser: EventSource stops, and the page is asked for every few seconds instead
            raise ServiceUnavailable("Too many watch already.")

        def render(seen: stream.Look) -> str:
            return _render(pages["overview"], {"overview": seen.overview.to_dict(), "is_fragment": True})

        is_gone = request.environ.get("waitress.client_disconnected", lambda: False)
        events = stream.feed(dashboard.poller, name, key, render, is_gone)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return Response(stream_with_context(events), mimetype="text/event-stream", headers=headers)


def _index(blueprint: Blueprint, api: str) -> Document:
    prefix = f"{blueprint.name}."
    home = url_for(".overview").rstrip("/")
    paths = [
        {
            "path": rule.rule.removeprefix(home),
            "method": "POST" if "POST" in (rule.methods or ()) else "GET",
            "does": (current_app.view_functions[rule.endpoint].__doc__ or "").strip().splitlines()[0],
        }
        for rule in current_app.url_map.iter_rules()
        if rule.endpoint.startswith(prefix) and f"{api}/" in rule.rule
    ]
    return {"paths": sorted(paths, key=lambda each: (each["path"], each["method"]))}
