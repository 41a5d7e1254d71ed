"""The real rq-dashboard below ``rq/``, with its faults mended.

It runs as an application of its own, asked by ours after the guard has let the request pass, so it shares no settings,
no template names and no connection with a host application. What is mended, in rq-dashboard 0.9:

* Its pages write job descriptions, results and names into HTML as they are. The templates are read through a loader
  that makes every ``<%= %>`` of the browser-side templates an escaping one.
* It unpickles what it finds in Redis, and answers 500 for jobs in JSON. A private copy of its module gets RQ's classes
  with a serializer that reads JSON and shows anything else as "not shown"; what it could not read it writes back
  unchanged.
* It opens a new connection pool for each request. It gets the manager's connection.
* ``GET /requeue/<queue>`` changes something: refused (rqarm.dashboard.security).
* A job or page that is not there is an internal error: it is 404 here.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import redis
from flask import Flask, Response, g, request
from jinja2 import BaseLoader, Environment, FileSystemLoader
from rq import Queue, Worker
from rq.exceptions import DeserializationError, InvalidJobOperation, NoSuchJobError
from rq.job import Job
from rq.registry import FailedJobRegistry
from werkzeug.exceptions import HTTPException, ServiceUnavailable

from rqarm.dashboard.security import refuse_get, rq_policy
from rqarm.errors import RqarmError

#: the copy's name; inside the package, so that its relative imports work
_COPY = "rq_dashboard._web_of_rqarm"

#: what the loader changes in the templates: all of these must be found somewhere, or the release is another one
_CHANGES = (
    ("$('<div/>').text(d.description).html()", "d.description"),
    ("$('<div/>').text(d.exc_info).html()", "d.exc_info"),
    ("<%=", "<%-"),
    ("'{{ queue.name }}'", "{{ queue.name|tojson }}"),
    # underscore's templates run in a sandbox of `with`; the one inline script is ours to vouch for
    ('<script type="text/javascript">', '<script type="text/javascript" nonce="{{ nonce() }}">'),
    (
        '<a class="navbar-brand">RQ-dashboard</a>',
        '<a class="navbar-brand" href="{{ home() }}">&larr; rqarm</a><span class="navbar-brand">RQ jobs</span>',
    ),
)


class Unreadable(dict[str, str]):
    """Stands for bytes that are not JSON. It is a dict because a job's ``meta`` must be one; it keeps the bytes."""

    def __init__(self, raw: bytes) -> None:
        super().__init__({"not shown": f"{len(raw)} bytes that are not JSON"})
        self.raw = raw


class DisplaySerializer:
    """Reads JSON and nothing else, never raises, never unpickles. What it could not read it writes as it was."""

    @staticmethod
    def loads(raw: bytes) -> Any:
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            return Unreadable(raw)

    @staticmethod
    def dumps(value: Any) -> bytes:
        return value.raw if isinstance(value, Unreadable) else json.dumps(value).encode()


class _Job(Job):
    def __init__(self, id: str | None = None, connection: Any = None, serializer: Any = None) -> None:
        super().__init__(id, connection, DisplaySerializer)

    def _deserialize_data(self) -> None:
        try:
            super()._deserialize_data()  # type: ignore[no-untyped-call] # RQ leaves it so
        except DeserializationError:
            self._func_name, self._instance, self._args, self._kwargs = "(a call that is not JSON)", None, (), {}


class _Queue(Queue):
    job_class = _Job

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"serializer": DisplaySerializer, "job_class": _Job}))


class _Worker(Worker):
    @classmethod
    def all(cls, connection: Any = None, **_: Any) -> list[Any]:  # type: ignore[override]
        return super().all(connection, job_class=_Job, queue_class=_Queue, serializer=DisplaySerializer)

    def get_current_job(self) -> Job | None:
        try:
            return super().get_current_job()
        except NoSuchJobError:  # it ended since
            return None


def _requeue_job(job_id: str, connection: Any) -> Job:
    job = _Job.fetch(job_id, connection=connection)
    registry = FailedJobRegistry(job.origin, connection=connection, job_class=_Job, serializer=DisplaySerializer)
    return registry.requeue(job)


class MendedLoader(BaseLoader):
    """rq-dashboard's templates, with _CHANGES made. Raises RqarmError when one of them finds nothing to change."""

    def __init__(self, folder: Path) -> None:
        self._files = FileSystemLoader(folder)
        text = "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".html", ".js"))
        if missing := [old for old, _ in _CHANGES if old not in text]:
            raise RqarmError(f"this release of rq-dashboard has no {missing[0]!r}: install rq-dashboard>=0.9,<0.10")

    def get_source(self, environment: Environment, template: str) -> tuple[str, str, Callable[[], bool]]:
        source, path, is_fresh = self._files.get_source(environment, template)
        for old, new in _CHANGES:
            source = source.replace(old, new)
        return source, path, is_fresh


def is_installed() -> bool:
    return importlib.util.find_spec("rq_dashboard") is not None and importlib.util.find_spec("six") is not None


class RqDashboard:
    """rq-dashboard as a view of ours. ``connection``: asked for at each request, since a manager's may be replaced."""

    def __init__(self, connection: Callable[[], redis.Redis], shown_url: str, *, read_only: bool) -> None:
        self._connection = connection
        self._app = self._build(shown_url, read_only)

    def answer(self, path: str, home: str) -> Response:
        """The answer of rq-dashboard for ``path`` below its root. The guard has let the request pass.

        ``home``: where its pages lead back to.
        """
        refuse_get(path)
        environ = dict(request.environ)
        root = str(request.url_rule).partition("<")[0].rstrip("/")
        environ["SCRIPT_NAME"] += root
        environ["PATH_INFO"] = environ["PATH_INFO"][len(root) :]
        environ["rqarm.home"] = home
        environ["rqarm.nonce"] = g.rqarm_nonce
        self._app.redis_conn = self._connection()  # type: ignore[attr-defined]
        response = cast(Response, Response.from_app(self._app.wsgi_app, environ, buffered=True))
        response.headers["Content-Security-Policy"] = rq_policy(g.rqarm_nonce)
        return response

    def _build(self, shown_url: str, read_only: bool) -> Flask:
        web = _private_copy()
        # every request of rq-dashboard calls this for a client of its own; give it the one there is
        web.__dict__["from_url"] = lambda *_, **__: (None, self._connection())
        folder = Path(str(web.__file__)).parent
        app = Flask("rq_dashboard", static_folder=str(folder / "static"), static_url_path="/static")
        app.jinja_loader = MendedLoader(folder / "templates")
        app.config["RQ_DASHBOARD_REDIS_URL"] = (shown_url,)
        app.config["RQ_DASHBOARD_DISABLE_DELETE"] = read_only
        web.blueprint.template_folder = None
        app.register_blueprint(web.blueprint)
        app.jinja_env.globals["nonce"] = lambda: request.environ["rqarm.nonce"]
        app.jinja_env.globals["home"] = lambda: request.environ["rqarm.home"]
        app.register_error_handler(Exception, _plain_error)
        return app


def _private_copy() -> ModuleType:
    """rq_dashboard.web once more, with safe classes in place of RQ's. The original stays as it is for others."""
    sys.modules.pop(_COPY, None)  # each application needs a blueprint of its own
    origin = importlib.util.find_spec("rq_dashboard.web")
    if origin is None or origin.origin is None:
        raise RqarmError("rq-dashboard is not installed: pip install 'rqarm[dashboard]'")
    spec = importlib.util.spec_from_file_location(_COPY, origin.origin)
    assert spec is not None
    assert spec.loader is not None
    web = importlib.util.module_from_spec(spec)
    sys.modules[_COPY] = web
    spec.loader.exec_module(web)
    for name, ours in {"Job": _Job, "Queue": _Queue, "Worker": _Worker, "requeue_job": _requeue_job}.items():
        if not hasattr(web, name):
            raise RqarmError(f"this release of rq-dashboard has no {name!r}: install rq-dashboard>=0.9,<0.10")
        setattr(web, name, ours)
    web.config.serializer = DisplaySerializer
    return web


def _plain_error(error: Exception) -> tuple[str, int, dict[str, str]]:
    """rq-dashboard's errors as one line of text."""
    if isinstance(error, HTTPException):
        status, text = error.code or 500, error.description or error.name
    elif isinstance(error, NoSuchJobError | LookupError | ValueError | UnboundLocalError):
        # an unknown registry is an UnboundLocalError, an unknown id or page one of the others
        status, text = 404, "There is no such job, queue or page."
    elif isinstance(error, InvalidJobOperation):
        status, text = 409, "The job is not in the state for this any more."
    elif isinstance(error, redis.ConnectionError | redis.TimeoutError):
        status, text = ServiceUnavailable.code, "The server does not answer."
    else:
        raise error
    return text, status, {"Content-Type": "text/plain; charset=utf-8"}
