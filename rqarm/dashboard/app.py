"""Puts the dashboard together: an application of its own, or a blueprint for another one."""

from __future__ import annotations

import logging
from typing import Any, cast

import redis
from flask import Blueprint, Flask, Response, g, jsonify, render_template, request, url_for
from werkzeug.exceptions import HTTPException, InternalServerError

from rqarm import __version__, metrics
from rqarm.dashboard import actions, pages, shown
from rqarm.dashboard.options import Options
from rqarm.dashboard.security import Guard, harden, new_nonce, note
from rqarm.dashboard.state import Dashboard
from rqarm.embedded import EmbeddedError
from rqarm.errors import (
    ConfigError,
    CorruptResult,
    InvalidRequest,
    KeyConflict,
    RequestCancelled,
    RequestFailed,
    RequestUnknown,
    ResultNotReady,
    RqarmError,
)
from rqarm.manager import RequestManager

log = logging.getLogger("rqarm.dashboard")

#: where the JSON API begins
API = "/api/v1"
#: requests carry a few words at the most
MAX_BODY_BYTES = 65_536
NAME = "rqarm"

#: our errors as HTTP says them
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (InvalidRequest, 400),
    (RequestUnknown, 404),
    (ResultNotReady, 409),
    (RequestFailed, 409),
    (RequestCancelled, 409),
    (KeyConflict, 409),
    (CorruptResult, 410),
    (redis.ConnectionError, 503),
    (redis.TimeoutError, 503),
    (EmbeddedError, 503),
    (redis.RedisError, 502),
    (RqarmError, 500),
)


def create_app(manager: RequestManager | None = None, **options: Any) -> Flask:
    """The dashboard as a WSGI application. ``options`` are those of rqarm.dashboard.Options.

    Raises ConfigError when an option is wrong, or when an address that others can reach has no credentials.
    """
    app = Flask("rqarm.dashboard", static_folder=None, template_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    dashboard = Dashboard(manager, Options.load(**options))
    app.register_blueprint(_blueprint(dashboard))
    # what no view answers is guarded as well, and looks like the rest
    app.before_request(_guarding(dashboard))
    app.after_request(harden)
    for error in (HTTPException, Exception):
        app.register_error_handler(error, _explain)
    return app


def create_blueprint(manager: RequestManager | None = None, **options: Any) -> Blueprint:
    """The dashboard for a Flask application of yours: register it with a ``url_prefix``.

    Its checks come with it: give it credentials, or ``insecure=True`` when your application asks who somebody is
    before it comes here (a ``before_request`` of the application runs first). ``host`` is not used to listen then, but
    says who can reach it: without credentials it answers for localhost and for ``hosts`` only.
    """
    dashboard = Dashboard(manager, Options.load(**options))
    blueprint = _blueprint(dashboard)
    blueprint.before_request(_guarding(dashboard))
    blueprint.after_request(harden)
    for error in (HTTPException, Exception):
        blueprint.register_error_handler(error, _explain)
    return blueprint


def _blueprint(dashboard: Dashboard) -> Blueprint:
    blueprint = Blueprint(
        NAME, __name__, template_folder="templates", static_folder="static", static_url_path="/static"
    )
    blueprint.record_once(lambda state: state.app.extensions.update(rqarm=dashboard))
    blueprint.context_processor(lambda: _for_templates(dashboard))
    for name, filter_ in shown.FILTERS.items():
        blueprint.add_app_template_filter(filter_, f"rqarm_{name}")
    pages.add_to(blueprint, dashboard, API)
    actions.add_to(blueprint, dashboard, API)
    _add_probes(blueprint, dashboard)
    if dashboard.rq is not None:
        _add_rq(blueprint, dashboard)
    return blueprint


def _for_templates(dashboard: Dashboard) -> dict[str, Any]:
    return {
        "rqarm_version": __version__,
        "namespace": dashboard.manager.settings.namespace,
        "read_only": dashboard.options.read_only,
        "nav": [(page.name, page.title) for page in pages.PAGES if "<" not in page.path],
        "has_rq": dashboard.rq is not None,
        "user": g.get("rqarm_user", "-"),
        "is_fragment": request.headers.get("X-Rqarm-Fragment") == "live",
        "done": actions.told(request.args.get("done", "")),
    }


def _guarding(dashboard: Dashboard) -> Any:
    guard = Guard(dashboard.options)

    def check() -> None:
        g.rqarm_nonce = new_nonce()
        guard.check((request.endpoint or "").removeprefix(f"{NAME}."))

    return check


def _add_probes(blueprint: Blueprint, dashboard: Dashboard) -> None:
    @blueprint.get("/healthz")
    def healthz() -> Response:
        """The process answers."""
        return jsonify(status="ok")

    @blueprint.get("/readyz")
    def readyz() -> tuple[Response, int]:
        """The server behind it answers."""
        try:
            info = dashboard.server_info()
        except (redis.RedisError, RqarmError) as error:
            log.warning("not ready: %s", error)
            return jsonify(status="no server"), 503
        told = info if g.rqarm_is_known else {}
        return jsonify(status="ready", **told), 200

    @blueprint.get("/metrics", endpoint="metrics")
    def prometheus() -> Response:
        """For Prometheus; with a token, its scrape configuration has it under `authorization`."""
        return Response(metrics.render(dashboard.manager.overview()), content_type=metrics.CONTENT_TYPE)


def _add_rq(blueprint: Blueprint, dashboard: Dashboard) -> None:
    @blueprint.route("/rq/", defaults={"path": ""}, methods=["GET", "POST"])
    @blueprint.route("/rq/<path:path>", methods=["GET", "POST"])
    def rq(path: str) -> Response:
        """rq-dashboard."""
        assert dashboard.rq is not None
        response = dashboard.rq.answer(path, url_for(".overview"))
        if request.method == "POST":
            note("rq", path, response.status)
        return response


# -- errors


def _explain(error: Exception) -> Response:
    """An error as a page, or as JSON for the API. What nobody expected is logged and not shown."""
    headers: list[tuple[str, str]] = []
    if isinstance(error, HTTPException):
        if error.code is not None and error.code < 400:
            return cast(Response, Response.force_type(error.get_response()))  # a redirect
        status, text, title = error.code or 500, error.description or "", error.name
        headers = [
            pair for pair in error.get_headers() if pair[0].lower() in ("www-authenticate", "allow", "retry-after")
        ]
    else:
        status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
        text = str(error) if isinstance(error, RqarmError | redis.RedisError) else ""
        title = {503: "The server does not answer", 404: "Not found"}.get(status, "This did not work")
        if status == 500:
            log.error("%s %s: %s", request.method, request.path, error, exc_info=error)
            text = text or InternalServerError.description
    if f"{API}/" in request.path:
        document = {"error": {"status": status, "title": title, "message": text}}
        response = jsonify(document)
    elif status in (401, 421, 429):
        # who is not let in sees neither names nor links
        response = Response(f"{title}: {text}\n", mimetype="text/plain")
    else:
        response = Response(render_template("rqarm/error.html", title=title, text=text), mimetype="text/html")
    response.status_code = status
    response.headers.extend(headers)
    return response


__all__ = ["ConfigError", "create_app", "create_blueprint"]
