"""Results by URL: a batch request's ``status.url`` leads to a download with the right type and name.

    python examples/result_url.py                 and in another terminal
    rqarm worker --handlers examples/cities.py
    RQARM_RESULT_URL='http://localhost:8000/results/{key}' rqarm submit --wait -o - --json '/cities/FR'

A WSGI application of the standard library; the same lines work in Flask or Django. Whoever has the URL gets the result:
put your own access control in front.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any
from wsgiref.simple_server import make_server

from rqarm import RequestManager, errors

RESULT_URL = "http://localhost:8000/results/{key}"
BLOCK_BYTES = 65_536
#: what an error of rqarm is to a browser
STATUS = {
    errors.InvalidRequest: "404 Not Found",  # what is no key
    errors.RequestUnknown: "404 Not Found",
    errors.ResultNotReady: "202 Accepted",
    errors.RequestCancelled: "410 Gone",
    errors.RequestFailed: "502 Bad Gateway",
}

Start = Callable[[str, list[tuple[str, str]]], Any]


def create_app(rm: RequestManager) -> Callable[[dict[str, Any], Start], Iterable[bytes]]:
    """GET /results/KEY."""

    def app(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        folder, _, key = environ.get("PATH_INFO", "").rpartition("/")
        if folder != "/results" or environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            start("404 Not Found", [])
            return []
        try:
            file = rm.cache.open(key)
        except tuple(STATUS) as error:
            status = next(STATUS[kind] for kind in type(error).mro() if kind in STATUS)
            start(status, [("Content-Type", "text/plain; charset=utf-8"), ("Retry-After", "1")])
            return [f"{error}\n".encode()]
        # of the bytes in hand: a result that is replaced meanwhile has another
        envelope = file.raw.envelope  # type: ignore[attr-defined]
        if envelope.kind == "value":
            start("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(rm.cache.get(key)).encode()]
        headers = envelope.headers()
        if dict(headers)["ETag"] == environ.get("HTTP_IF_NONE_MATCH"):
            start("304 Not Modified", [(name, value) for name, value in headers if name == "ETag"])
            return []
        start("200 OK", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else blocks(file)

    return app


def blocks(file: IO[bytes]) -> Iterator[bytes]:
    """The file as it is fetched from Redis: a large result is never whole in this process."""
    with file:
        while block := file.read(BLOCK_BYTES):
            yield block


if __name__ == "__main__":
    with (
        RequestManager(result_url=RESULT_URL) as manager,
        make_server("localhost", 8000, create_app(manager)) as server,
    ):
        print(f"results at {RESULT_URL}")
        server.serve_forever()
