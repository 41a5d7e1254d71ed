"""rq-dashboard alone, for queues of rqarm; ``rqarm dashboard`` has it built in, with more of its faults mended.

    PYTHONPATH=dashboards rq-dashboard --config rq_dashboard_config --disable-delete \\
        --bind 127.0.0.1 --username NAME --password PASSWORD --redis-url redis://127.0.0.1:6379/0

What this does: rq-dashboard 0.9 unpickles what it finds in Redis, which runs what a stranger wrote there, and answers
500 for jobs in JSON. Here it reads JSON and shows anything else as "not shown". Deleting should be off, since a job
that goes without its request is only queued again; its command line decides that. ``rqarm cancel KEY`` ends a request.

What it cannot do: rq-dashboard does not escape job descriptions, which hold URIs that clients chose, and has no guard
against foreign origins. So keep it on the loopback, behind a password, and only where the clients are trusted. Do not
give ``--json``, which sets the serializer anew, nor ``--debug``.
"""

from __future__ import annotations

import json
import os
from typing import Any

from rq_dashboard import web


class DisplaySerializer:
    """Reads JSON and nothing else, never raises, never unpickles."""

    @staticmethod
    def loads(raw: bytes) -> Any:
        try:
            return json.loads(raw)
        except ValueError:
            return {"not shown": f"{len(raw)} bytes that are not JSON"}

    @staticmethod
    def dumps(value: Any) -> bytes:
        raise TypeError("rq-dashboard is here to look: it writes no jobs")


web.config.serializer = DisplaySerializer

RQ_DASHBOARD_REDIS_URL = (os.environ.get("RQARM_URL", "redis://127.0.0.1:6379/0"),)
RQ_DASHBOARD_POLL_INTERVAL = 5000
# "full args" prints arguments, and with them what people call secret
RQ_DASHBOARD_SHOW_FULL_ARGS = False
RQ_DASHBOARD_DISABLE_DELETE = True
