"""An rqarm.Worker whose horse dies once between the take and the board, for each request under ``/orphan/``."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import rqarm
from rqarm.worker.board import Board

_show = Board.show


def show(self: Board, lane: int, number: int, attempt: Any, *rest: Any) -> None:
    if attempt is not None and attempt.request.uri.startswith("/orphan/"):
        mark = Path(os.environ["NOTES"]) / attempt.request.uri.replace("/", "-")
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    _show(self, lane, number, attempt, *rest)


Board.show = show  # type: ignore[method-assign]
Worker = rqarm.Worker
