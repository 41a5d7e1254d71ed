"""Mails instead of waiting: every reader of one report gets a mail when it is ready, and the report is made once.

    rqarm worker --handlers examples/callbacks.py
    python examples/callbacks.py ann@example.org bob@example.org

The payload of a submit says who wants the mail. Both submits join one request; its callback gets both payloads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rqarm import BatchRequest, Context, Handlers, InvalidRequest, RequestManager, Retry

#: stands in for a mail server: a line for each mail
OUTBOX = Path("outbox.txt")

handlers = Handlers()


def mail(to: str, text: str) -> None:
    with OUTBOX.open("a") as outbox:
        outbox.write(f"{to}: {text}\n")


@handlers.route("/report/{year:int}", ttl=3600)
def report(request: BatchRequest, context: Context, year: int) -> dict[str, int]:
    if year < 1900:
        raise InvalidRequest("there are no figures before 1900", where="year")
    return {"year": year, "sold": year * 3}


@report.callback(retry=Retry(max=5, interval=[1, 10, 60]), timeout=30)
def report_ready(result: dict[str, int], payloads: list[Any]) -> None:
    """Once for each completion, as a job of its own: when a mail fails, the report is not made again."""
    for payload in payloads:
        mail(payload["to"], f"the report of {result['year']} is ready: {result['sold']} sold")


@report.on_failure
def report_failed(error: dict[str, str], payloads: list[Any], context: Context) -> None:
    """Once for each final failure."""
    for payload in payloads:
        mail(payload["to"], f"no report for {context.request.uri}: {error['message']}")


@handlers.quarantine
def look_at_it(entry: Any) -> None:
    """Once for each request that was set aside, because it killed its workers for instance."""
    mail("operator@example.org", f"somebody should look at {entry}")


def order(rm: RequestManager, year: int, to: str) -> str:
    """Ask for the report by mail: one mail for each address, however often it asks. The outcome."""
    found = rm.submit(report.request(year), payload={"to": to}, payload_id=to)
    if found.value is not None:
        # it is there already, so there is no callback: the answer is in our hands
        report_ready(found.value, [{"to": to}])
    return str(found.outcome)


if __name__ == "__main__":
    with RequestManager() as rm:
        for address in sys.argv[1:] or ["ann@example.org"]:
            print(address, order(rm, 2024, address))
