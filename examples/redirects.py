"""Redirects: many names for one result. Run it: it needs no worker and no server of yours.

    python examples/redirects.py

A city is asked for by its name, by an old path, and by its code. Only the code computes; the others are aliases of it.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from rqarm import BatchRequest, Context, Handlers, RequestManager, RequestFailed, embedded

CODES = {"paris": "FR-75", "lyon": "FR-69"}

handlers = Handlers()
computed: list[str] = []


@handlers.route("/city/{code}")
def city(request: BatchRequest, context: Context, code: str) -> dict[str, str]:
    """The canonical request."""
    computed.append(code)
    return {"code": code}


@handlers.route("/by-name/{name}")
def by_name(request: BatchRequest, context: Context, name: str) -> object:
    return context.get_or_redirect(f"/city/{CODES[name]}")


@handlers.route("/v1/towns/{name}")
def old_path(request: BatchRequest, context: Context, name: str) -> object:
    raise context.redirect(f"/by-name/{name}")
