"""Handlers for the worker processes of tests/test_quarantine_workers.py. They are mended when the note ``mended`` is
there."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from rqarm import BatchRequest, Context, Handlers

handlers = Handlers()
notes = Path(os.environ.get("NOTES", "/nonexistent"))


@handlers.route("/{how}/{n:int}", timeout=30)
def handler(request: BatchRequest, context: Context, how: str, n: int) -> Any:
    with (notes / f"runs-{how}-{n}").open("a") as log:
        log.write("x")
    if (notes / "mended").exists():
        return f"{how} mended"
    if how == "poison":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "asked":
        raise context.quarantine("broken", status_code=503)
    if how == "exhausted":
        raise ValueError("boom")
    return {"rows": [object()]}


@handlers.route("/report", timeout=30)
def report(request: BatchRequest, context: Context) -> Any:
    attempt = context.kwargs.get("attempt", 1)
    with (notes / "runs-report").open("a") as log:
        log.write("x")
    if attempt < 2:
        raise context.retry(delay=float(os.environ.get("DELAY", "1")), attempt=attempt + 1)
    return attempt
