"""What fails for good is set aside, looked at, mended and requeued. Run it: python examples/quarantine.py

Invoices come from an archive. One of its pages is broken, and one answers with something that cannot be stored. Both
requests keep their error, arguments and payloads until somebody decides.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rqarm import BatchRequest, Context, Handlers, RequestManager, Retry

handlers = Handlers()


@handlers.route("/invoice/{number:int}", retry=Retry(max=1))
def invoice(request: BatchRequest, context: Context, number: int) -> object:
    is_mended = os.environ.get("ARCHIVE") == "mended"
    if number == 502 and not is_mended:
        # trying again would not help: somebody must look at the archive
        raise context.quarantine("the archive is broken", status_code=502, shelf="B7")
    if number == 7 and not is_mended:
        return {"lines": [object()]}  # no worker can store this
    if number < 0:
        raise ValueError(f"{number} is no invoice")  # exhausted after one retry
    return f"invoice {number}"


def work(archive: str) -> None:
    """A worker that runs what is queued and ends."""
    command = [sys.executable, "-m", "rqarm.cli", "worker", "--burst", "--handlers", f"{Path(__file__)}:handlers"]
    subprocess.run(command, env={**os.environ, "ARCHIVE": archive}, check=True)


def main() -> None:
    with RequestManager() as rm:
        keys = [rm.submit(f"/invoice/{n}", payload={"customer": n}).key for n in (1, 502, 7, -3)]
        work("broken")
        for entry in rm.quarantine.list():
            print(f"{entry.reason}: {entry.uri}: {entry.message} {entry.info or ''}".rstrip())
        # nobody is asked again for what somebody must look at first
        print("submit:", rm.submit("/invoice/502").outcome)
        # the archive is mended; what never was an invoice goes
        dropped = rm.quarantine.discard(exception=ValueError)
        requeued = rm.quarantine.requeue(route="/invoice/{number:int}")
        print(f"{len(dropped)} discarded, {len(requeued)} requeued")
        work("mended")
        print([rm.result(key) for key in keys[:3]], "left:", rm.quarantine.count())


if __name__ == "__main__":
    main()
