"""One client of a chaos show, as a process: submits every request several times, in an order of its own, and waits.

Exits with 0 when every request had its result, and that was right. Tells on stdout what was not. It resubmits what the
server did not confirm, which is what clients are told to do.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from redis.exceptions import ConnectionError, TimeoutError

from rqarm import RequestManager, State

T = TypeVar("T")


def patiently(ask: Callable[[], T], deadline: float) -> T:
    """The answer, also when the server is away for a while: it is being restarted."""
    while True:
        try:
            return ask()
        except (ConnectionError, TimeoutError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def main(seed: int, distinct: int, times: int, window: int, patience: float) -> int:
    """``window``: requests under way before it waits for half of them; 0 = it never waits before the end."""
    deadline = time.monotonic() + patience
    order = [n for n in range(distinct) for _ in range(times)]
    random.Random(seed).shuffle(order)
    keys: dict[int, str] = {}
    under_way: list[str] = []
    with RequestManager() as rm:

        def ended(wanted: list[str]) -> list[Any]:
            return patiently(lambda: rm.wait(wanted, max(0.0, deadline - time.monotonic())), deadline)

        for n in order:
            status = patiently(lambda n=n: rm.submit(f"/work/{n}"), deadline)  # type: ignore[misc]
            keys[n] = status.key
            under_way.append(status.key)
            if window and len(under_way) >= window:
                half = window // 2
                ended(under_way[:half])
                del under_way[:half]
        wrong = [
            f"{s.key} is {s.state}: {s.error}" for s in ended(list(keys.values())) if s.state is not State.COMPLETED
        ]
        if not wrong:
            answers = {n: patiently(lambda key=key: rm.result(key), deadline) for n, key in keys.items()}  # type: ignore[misc]
            wrong = [f"/work/{n} gave {answer!r}" for n, answer in answers.items() if answer[0] != n * n]
    print("\n".join(wrong), end="", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(*(int(argument) for argument in sys.argv[1:5]), float(sys.argv[5])))
