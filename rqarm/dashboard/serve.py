"""Listens for browsers: waitress, with a thread for each stream and some for everything else."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import waitress
from flask import Flask
from waitress import wasyncore

from rqarm.dashboard.state import Dashboard

#: threads for pages, besides those that streams hold
PAGE_THREADS = 8


class Server:
    """A dashboard that listens. ``url``: where, with the port it got when 0 was asked for."""

    def __init__(self, app: Flask, host: str | None = None, port: int | None = None) -> None:
        self._dashboard: Dashboard = app.extensions["rqarm"]
        options = self._dashboard.options
        host, port = host or options.host, options.port if port is None else port
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        self._server: Any = waitress.create_server(
            app,
            host=host.strip("[]"),
            port=port,
            threads=PAGE_THREADS + options.streams,
            ident=None,
            # more than Flask takes, so that the answer to a larger one is ours
            max_request_body_size=1 << 20,
            channel_timeout=60,
            clear_untrusted_proxy_headers=True,
            **_proxy(options.trusted_proxy),
        )
        shown = f"[{host.strip('[]')}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.effective_port}/"

    def run(self) -> None:
        """Answer until SIGTERM or SIGINT."""
        signal.signal(signal.SIGTERM, _stop)
        try:
            self._server.run()
        finally:
            self.close()

    def close(self) -> None:
        """End all streams, and stop listening."""
        self._dashboard.close()
        self._server.close()


def _proxy(address: str) -> dict[str, Any]:
    """Waitress's settings for a proxy in front: the log, and the limit of wrong log-ins, see who is behind it."""
    if not address:
        return {}
    return {"trusted_proxy": address, "trusted_proxy_headers": {"x-forwarded-for", "x-forwarded-proto"}}


def _stop(_: int, __: Any) -> None:
    raise SystemExit(0)


@contextmanager
def serving(app: Flask, port: int = 0) -> Iterator[str]:
    """The dashboard in a thread of this process, for tests and screenshots; gives its URL."""
    server = Server(app, "127.0.0.1", port)
    thread = threading.Thread(target=server._server.run, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server._dashboard.close()
        server._server.task_dispatcher.shutdown()
        # in its own thread: under its select, closed sockets are errors
        server._server.trigger.pull_trigger(partial(wasyncore.close_all, server._server._map, True))
        thread.join(5)
