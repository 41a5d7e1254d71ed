"""The root conftest of RQ's test suite as rq_suite.py runs it; also imported by every Python that a test starts.

It leads connections to the port that RQ's tests have written into them to the private server, puts rqarm.Worker where
RQ's Worker stood, takes the chosen tests, and writes down what became of each. RQ's other workers (SimpleWorker,
SpawnWorker, RoundRobinWorker ...) stay RQ's: they are not what is replaced.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RQS_PORT = 6379
HERE = ("127.0.0.1", "::1", "localhost")
_connect = socket.socket.connect


def lead_to(port: int) -> None:
    """Whoever on this machine asks for RQ's port gets ours: the tests know no setting for it."""

    def connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] in HERE and address[1] == RQS_PORT:
            address = (address[0], port, *address[2:])
        _connect(self, address)

    socket.socket.connect = connect  # type: ignore[method-assign, assignment]


def swap_worker() -> None:
    """Every name that stands for RQ's Worker in RQ's modules stands for ours."""
    import rq.cli
    import rq.worker_pool
    from rq.serializers import PickleSerializer

    import rqarm

    class Worker(rqarm.Worker):
        """As `rq worker` makes it: with RQ's default serializer, pickle, which the tests take for granted."""

        def __init__(self, queues: Any, *args: Any, serializer: Any = None, **options: Any) -> None:
            super().__init__(queues, *args, serializer=serializer or PickleSerializer, **options)

    rqs = rq.Worker
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "rq":
            for attribute, value in list(vars(module).items()):
                if value is rqs:
                    setattr(module, attribute, Worker)


if port := os.environ.get("RQ_SUITE_PORT"):
    lead_to(int(port))
if os.environ.get("RQ_SUITE_SWAP"):
    swap_worker()

# -- under pytest

_pid = os.getpid()
_seen: dict[str, dict[str, Any]] = {}


def _note(**line: Any) -> None:
    # a horse that came back into pytest must not report
    if os.getpid() == _pid:
        with Path(os.environ["RQ_SUITE_LOG"]).open("a") as log:
            log.write(json.dumps(line) + "\n")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    plan = json.loads(os.environ["RQ_SUITE_PLAN"])
    if plan["only"] is not None:
        chosen = [item for item in items if item.nodeid in plan["only"]]
    elif plan["shard"] == plan["shards"]:
        chosen = [item for item in items if item.nodeid == plan["longest"]]
    else:
        # the slow tests stand together in RQ's files: this spreads them, and keeps their order
        chosen = [item for item in items if item.nodeid != plan["longest"]][plan["shard"] :: plan["shards"]]
    items[:] = [item for item in chosen if item.nodeid not in plan["done"]]
    _note(collected=len(items))


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    _note(started=nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    test = _seen.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "why": ""})
    test["seconds"] += report.duration
    if report.outcome != "passed" and test["outcome"] != "failed":
        test.update(outcome=report.outcome, why=_why(report))


def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
    _note(test=nodeid, **_seen.pop(nodeid, {"outcome": "failed", "seconds": 0.0, "why": "no report"}))


def pytest_sessionfinish(exitstatus: int) -> None:
    _note(finished=int(exitstatus))


def _why(report: Any) -> str:
    """The last lines that pytest marks as the error, or the reason of a skip."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return "\n".join(_errors(report.longreprtext))[-2000:]


def _errors(text: str) -> Iterator[str]:
    lines = text.splitlines()
    yield from (line for line in lines if line.startswith("E  "))
    yield from lines[-1:]
