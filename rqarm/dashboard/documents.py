"""The documents behind the pages and the API: what RequestManager says, as JSON types, without secrets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rqarm.dashboard.state import Dashboard

Arguments = Mapping[str, str]
Document = dict[str, Any]


def overview(dashboard: Dashboard, _: Arguments) -> Document:
    """Everything in one look: queues, hit rate, memory, failures, what needs attention."""
    return {"overview": dashboard.manager.overview().to_dict()}
