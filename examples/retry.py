"""A handler that is called again later with other arguments, and failures that answer. Run it: python examples/retry.py

A report is built by somebody else; the handler asks again until it is there. Meanwhile the request is claimed: who
submits it joins, who waits goes on waiting.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rqarm import BatchRequest, Context, Handlers, RequestFailed, RequestManager, Retry

handlers = Handlers()


class NotFound(Exception):
    """There is no such report, and there will be none soon."""


@handlers.route(
    "/report/{name}",
    retry=Retry(max=2, interval=[1, 5], jitter=0.1, on=(ConnectionError,)),
    negative_ttl={NotFound: 60, Exception: 0},
)
def report(request: BatchRequest, context: Context, name: str, attempt: int = 1) -> str:
    if name == "none":
        raise NotFound(name)  # not in `on`: no retry. Answers the same request for a minute
    if attempt < 3:
        # not ready yet: ask again in half a second, and remember how often
        raise context.retry(delay=0.5, attempt=attempt + 1)
    return f"{name}, on attempt {attempt}"


def main() -> None:
    command = [sys.executable, "-m", "rqarm.cli", "worker", "--handlers", f"{Path(__file__)}:handlers"]
    worker = subprocess.Popen(command)
    try:
        with RequestManager() as rm:
            print(rm.submit("/report/sales").outcome, rm.submit("/report/sales").outcome)
            print(rm.get("/report/sales", timeout=60))
            for _ in range(2):
                try:
                    rm.get("/report/none", timeout=60)
                except RequestFailed as failed:
                    print(failed.error["type"].rpartition(".")[2], rm.submit("/report/none").outcome)
            print("attempts:", rm.status(BatchRequest("/report/none").key).attempts)
    finally:
        worker.terminate()
        worker.wait()


if __name__ == "__main__":
    main()
