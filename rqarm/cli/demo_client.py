"""One client process of ``rqarm demo``: submits, waits, and reports each step as a line of JSON on stdout.

It reads its work from stdin: a JSON list of bursts, each a list of URIs that are submitted at once. Where to is in the
environment, as for every client.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from rqarm.errors import RqarmError
from rqarm.manager import RequestManager
from rqarm.model import Key, State

#: seconds that a client waits for one burst
PATIENCE_S = 120.0


def main() -> None:
    bursts: list[list[str]] = json.load(sys.stdin)
    with RequestManager() as rm:
        for burst in bursts:
            ask(rm, burst, lambda **fields: print(json.dumps(fields), flush=True))


def ask(rm: RequestManager, burst: list[str], report: Callable[..., Any]) -> None:
    """Submit all, then take the results as they come. Reports ``submitted`` and ``done`` for each URI."""
    waiting: dict[Key, list[tuple[str, float]]] = {}

    def done(key: Key, outcome: str, since: float) -> None:
        error = ""
        try:
            rm.result(key)
        except RqarmError as failure:
            error = str(failure)
        report(verb="done", key=key, outcome=outcome, waited=time.monotonic() - since, error=error)

    for uri in burst:
        since = time.monotonic()
        status = rm.submit(uri)
        outcome = str(status.outcome)
        report(verb="submitted", key=status.key, outcome=outcome)
        if status.state is State.COMPLETED:
            done(status.key, outcome, since)
        else:
            waiting.setdefault(status.key, []).append((outcome, since))
    for status in rm.as_completed(list(waiting), timeout=PATIENCE_S):
        for outcome, since in waiting[status.key]:
            done(status.key, outcome, since)


if __name__ == "__main__":
    main()
