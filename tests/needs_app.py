"""Handlers that need each other's results, for worker processes in tests (RQARM_HANDLERS)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rqarm import BatchRequest, Context, Handlers

handlers = Handlers()


@handlers.route("/tree/{depth:int}")
def tree(request: BatchRequest, context: Context, depth: int, at: int = 0) -> int:
    """The number of leaves below."""
    kind = "/leaf/" if depth == 1 else f"/tree/{depth - 1}?at="
    return sum(context.require(f"{kind}{2 * at}", f"{kind}{2 * at + 1}"))


@handlers.route("/leaf/{n:int}")
async def leaf(request: BatchRequest, context: Context, n: int) -> Any:
    with (Path(os.environ["NOTES"]) / "leaves").open("a") as notes:
        notes.write(f"{request.uri}\n")
    return 1
