"""What the views of one dashboard share."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

from rqarm import connect
from rqarm.dashboard.options import Options
from rqarm.dashboard.rq import RqDashboard, is_installed
from rqarm.dashboard.stream import Poller
from rqarm.manager import RequestManager
from rqarm.uri import redact

log = logging.getLogger("rqarm.dashboard")


class Dashboard:
    """A manager, the options, and rq-dashboard when it is there."""

    def __init__(self, manager: RequestManager | None, options: Options) -> None:
        self.manager = RequestManager() if manager is None else manager
        self.options = options
        self.poller = Poller(self.manager, options.interval, options.streams)

    def close(self) -> None:
        """End the streams. The manager stays: who gave it closes it."""
        self.poller.close()

    @cached_property
    def rq(self) -> RqDashboard | None:
        """rq-dashboard, or None when it is not wanted or not installed."""
        if not self.options.rq:
            return None
        if not is_installed():
            log.warning("rq-dashboard is not installed: no RQ pages (pip install 'rqarm[dashboard]')")
            return None
        url = connect.redact_url(self.manager.settings.url or "unix://embedded")
        return RqDashboard(lambda: self.manager.connection, url, read_only=self.options.read_only)

    def redacted(self, uri: str) -> str:
        """A URI without secrets, for people, logs and JSON."""
        return redact(uri, self.manager.settings.secret_params)

    def server_info(self) -> dict[str, Any]:
        """Which server it is. Raises what redis-py raises when it does not answer."""
        info: dict[str, Any] = self.manager.connection.info("server")
        name = "valkey" if "valkey_version" in info else "redis"
        return {"server": name, "version": str(info.get(f"{name}_version", ""))}
