"""RQ's workers that listen to our queues."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from rqarm.browse.claims import ClaimPage, claims_call
from rqarm.calls import Batch, Command
from rqarm.flows import Core, Flow
from rqarm.model import Key, View
from rqarm.replies import text_of

#: RQ workers that are listed at the most, and claims among which their requests are looked for
MOST_WORKERS, MOST_CLAIMS = 1_000, 500


@dataclass(frozen=True, slots=True)
class WorkerView(View):
    """An RQ worker that listens to one of our queues, as it said itself at its last heartbeat.

    ``keys``: the requests that it runs, looked for among the first 500 claims. ``job_id``: the job that RQ's tools
    show. ``version``: of RQ. ``rqarm_version``: "" of RQ's own worker, which tells none.
    """

    name: str
    state: str
    queues: tuple[str, ...]
    keys: tuple[Key, ...]
    job_id: str | None
    succeeded: int
    failed: int
    working_time: float
    born: datetime | None
    heartbeat: datetime | None
    heartbeat_age: float | None
    hostname: str
    pid: int | None
    version: str
    python_version: str
    stopping: bool
    rqarm_version: str


@dataclass(frozen=True, slots=True)
class WorkersView(View):
    """The workers, by name. ``suspended``: `rq suspend` holds all of them."""

    suspended: bool
    entries: tuple[WorkerView, ...]


def workers(core: Core) -> Flow[WorkersView]:
    """RQ's records of the workers that listen to a queue of ours."""
    listed, names, suspended, now, running = yield Batch(
        (
            Command(("SMEMBERS", core.jobs.worker_set), lambda reply: sorted(text_of(each) for each in reply)),
            core.calls.queues(),
            Command(("EXISTS", core.jobs.suspended), bool),
            Command(("TIME",), lambda reply: int(reply[0]) + int(reply[1]) / 1e6),
            claims_call(core, 0, MOST_CLAIMS),
        )
    )
    if not listed:
        return WorkersView(suspended, ())
    listed = listed[:MOST_WORKERS]
    its_names = tuple(core.jobs.worker_fields.values())
    found = yield Batch(tuple(Command(("HMGET", each, *its_names), list) for each in listed))
    ours = {
        name.removeprefix(core.jobs.list_prefix)
        for queue in {*names, core.settings.queue}
        for name in core.jobs.lists(queue)
    }
    views = []
    for each, values in zip(listed, found, strict=True):
        record = {
            name: text_of(value)
            for name, value in zip(core.jobs.worker_fields, values, strict=True)
            if value is not None
        }
        if record and "death" not in record and ours.intersection(record.get("queues", "").split(",")):
            views.append(_worker(each.rpartition(":")[2], record, now, running))
    return WorkersView(suspended, tuple(views))


def _worker(name: str, record: dict[str, str], now: float, running: ClaimPage) -> WorkerView:
    heartbeat = _iso(record.get("heartbeat"))
    return WorkerView(
        name=name,
        state=record.get("state", ""),
        queues=tuple(record["queues"].split(",")),
        keys=tuple(claim.status.key for claim in running.entries if claim.status.worker == name),
        job_id=record.get("job_id"),
        succeeded=int(record.get("succeeded", 0)),
        failed=int(record.get("failed", 0)),
        working_time=float(record.get("working_time", 0)),
        born=_iso(record.get("born")),
        heartbeat=heartbeat,
        heartbeat_age=max(0.0, now - heartbeat.timestamp()) if heartbeat else None,
        hostname=record.get("hostname", ""),
        pid=int(record["pid"]) if record.get("pid", "").isdecimal() else None,
        version=record.get("version", ""),
        python_version=record.get("python_version", ""),
        stopping="stopping" in record,
        rqarm_version=record.get("rqarm_version", ""),
    )


def _iso(text: str | None) -> datetime | None:
    try:
        found = datetime.fromisoformat(text) if text else None
    except ValueError:
        return None
    return found.replace(tzinfo=UTC) if found is not None and found.tzinfo is None else found
