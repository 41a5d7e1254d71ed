"""``rqarm worker --metrics-port``: the metrics of the namespace over HTTP, from a thread of the parent.

It never touches requests, and nothing of it can stop the worker: a server that refuses is a 503, and the next scrape
asks again. It listens on the loopback only, since it asks nobody for a password.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer

from redis.exceptions import RedisError

from rqarm import metrics
from rqarm.errors import ConfigError, RqarmError
from rqarm.inspect import Overview

log = logging.getLogger("rqarm.worker")

LOOPBACK = "127.0.0.1"
#: seconds that a client has to send its request: one is served after the other
PATIENCE = 5.0


class _Answer(BaseHTTPRequestHandler):
    """GET /metrics, and /healthz, which asks no server."""

    timeout = PATIENCE
    server: _Scraped

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._say(200, "ok\n")
        elif path == "/metrics":
            self._say(*self._scrape())
        else:
            self._say(404, "there is /metrics and /healthz\n")

    def _scrape(self) -> tuple[int, str]:
        try:
            return 200, metrics.render(self.server.look())
        except (RedisError, RqarmError, OSError) as error:
            log.warning("no metrics: %s", error)
            return 503, f"# the server does not answer: {type(error).__name__}\n"

    def _say(self, code: int, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", metrics.CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """A scrape every few seconds is no news."""
        log.debug("metrics: " + format, *args)


class _Scraped(HTTPServer):
    def __init__(self, port: int, look: Callable[[], Overview]) -> None:
        self.look = look
        super().__init__((LOOPBACK, port), _Answer)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away, or sent nothing in time."""
        log.debug("a scrape broke off", exc_info=True)


def serve(port: int, look: Callable[[], Overview]) -> int:
    """Answer scrapes from now on with what ``look`` finds; the port (of 0, the one that was free).

    Raises ConfigError when the port cannot be had.
    """
    try:
        server = _Scraped(port, look)
    except OSError as error:
        raise ConfigError(f"--metrics-port {port}: {error.strerror or error}; choose another") from error
    # a forked child would keep the port when its parent is gone
    os.register_at_fork(after_in_child=server.socket.close)
    threading.Thread(target=server.serve_forever, name="rqarm-metrics", daemon=True).start()
    port = int(server.server_address[1])
    log.info("metrics at http://%s:%d/metrics", LOOPBACK, port)
    return port
