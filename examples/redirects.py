"""Redirects: many names for one result.

    python examples/redirects.py

A city is asked for by its name, by an old path, and by its code. Only the code computes; the others are aliases of it.
Uses the embedded server, or the one that RQARM_URL names; a worker in this process runs what is queued.
"""

from __future__ import annotations

from rq import SimpleWorker
from rq.serializers import JSONSerializer

from rqarm import BatchRequest, Context, Handlers, RequestManager
from rqarm.rqjobs import queue_names
from rqarm.worker import use_handlers

CODES = {"paris": "FR-75", "lyon": "FR-69"}

handlers = Handlers()


@handlers.route("/city/{code}")
def city(request: BatchRequest, context: Context, code: str) -> dict[str, str]:
    """The canonical request: the only one that computes."""
    print(f"  computing {code}")
    return {"code": code}


@handlers.route("/by-name/{name}")
def by_name(request: BatchRequest, context: Context, name: str) -> object:
    """What is cached is returned as it is; what is not ends this attempt, and the answer comes when it is there."""
    return context.get_or_redirect(f"/city/{CODES[name]}")


@handlers.route("/v1/towns/{name}")
def old_path(request: BatchRequest, context: Context, name: str) -> object:
    """Moved for good. This leads to a redirect, so it is a chain of two."""
    raise context.redirect(f"/by-name/{name}")


def main() -> None:
    use_handlers(handlers)
    with RequestManager(queue="redirects-example", namespace="redirects-example") as rm:
        rm.cache.clear()  # of an earlier run
        uris = ["/v1/towns/paris", "/by-name/paris", "/city/FR-75"]
        keys = [status.key for status in rm.submit_many(uris)]
        queues = queue_names("redirects-example")
        worker = SimpleWorker(list(queues), connection=rm.connection, serializer=JSONSerializer)
        worker.work(burst=True, logging_level="WARNING")
        for uri, status in zip(uris, rm.wait(keys, timeout=30), strict=True):
            leads_to = f" -> {status.redirect}" if status.redirect else ""
            print(f"{uri} {status.state} {rm.result(status.key)}{leads_to}")


if __name__ == "__main__":
    main()
