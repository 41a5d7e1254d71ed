"""Requests that need others: context.require, from the transition to real workers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import managers
import pytest
from audit import audit
from bench import Bench
from drive import Rig
from servers import eventually
from workers import Crew, crew

from rqarm import (
    BatchRequest,
    Context,
    Handlers,
    InvalidRequest,
    RequestCancelled,
    RequestFailed,
    Retry,
    State,
    embedded,
    flows,
    needs,
)
from rqarm.context import Needed
from rqarm.errors import NeedLoop
from rqarm.model import Key, Priority
from rqarm.testing import context, drain

APP = Path(__file__).parent / "needs_app.py"


@pytest.fixture
def rig(redis_client: Any) -> Rig:
    return Rig(redis_client)


def key(uri: str) -> Key:
    return BatchRequest(uri).key


def waiting_for(rig: Rig, *needed: str) -> tuple[Any, list[Any]]:
    """A request that waits for others, and the attempts of these."""
    mine = rig.begin(BatchRequest("/mine"))
    others = [rig.begin(BatchRequest(uri)) for uri in needed]
    assert rig.word(rig.need(mine, *(other.key for other in others))) == "waiting"
    audit(rig.client, rig.keys)
    assert rig.waiting() == [[], [], []]
    return mine, others


def is_called(rig: Rig) -> bool:
    audit(rig.client, rig.keys)
    return [entry.rpartition("-")[0] for entry in rig.waiting()[1]] == [key("/mine")]


# -- the transition


def test_it_is_called_up_when_the_last_has_ended_and_not_before(rig: Rig) -> None:
    mine, (one, two) = waiting_for(rig, "/1", "/2")
    record = rig.record(mine.key)
    assert (record["state"], record["attempts"]) == ("pending", "0")
    assert rig.word(rig.complete(one)) == "stored"
    assert not is_called(rig)
    assert rig.word(rig.fail(two)) == "failed"
    assert is_called(rig)
    again = rig.ask(rig.take())
    assert (again.key, again.number) == (mine.key, 1)
    assert not {"needs", "recall", "recall_data", "due_ms"} & rig.record(mine.key).keys()
    assert rig.client.keys("arm:aliases:*") == []


@pytest.mark.parametrize("end", ["complete", "fail", "set_aside", "crash", "cancel", "put", "redirect"])
def test_every_end_of_the_needed_calls_it_up(rig: Rig, end: str) -> None:
    _, (one,) = waiting_for(rig, "/1")
    match end:
        case "complete":
            rig.ask(rig.complete(one))
        case "fail":
            rig.ask(rig.fail(one))
        case "set_aside":
            rig.run(flows.fail(rig.core, one, b"\x80", reason="asked"))
        case "crash":
            while rig.word(rig.crash(one.key, one.token, rig.ticket(one.request))) == "requeued":
                one = rig.ask(rig.take())
        case "cancel":
            rig.ask(rig.calls.cancel(one.key))
        case "put":
            rig.run(flows.put(rig.core, "/1", "value"))
        case "redirect":
            rig.begin(BatchRequest("/elsewhere"))
            assert rig.word(rig.redirect(one, key("/elsewhere"))) == "linked"
    assert is_called(rig)


@pytest.mark.parametrize("change", ["retry", "release"])
def test_another_attempt_of_the_needed_changes_nothing(rig: Rig, change: str) -> None:
    _, (one,) = waiting_for(rig, "/1")
    ticket = rig.ticket(one.request)
    rig.ask(rig.retry(one, ticket) if change == "retry" else rig.calls.release(one, ticket))
    again = rig.ask(rig.take())
    assert again.key == one.key
    rig.ask(rig.complete(again))
    assert is_called(rig)


def test_what_is_needed_twice_or_by_an_alias_is_waited_for_once(rig: Rig) -> None:
    mine, alias, root = (rig.begin(BatchRequest(uri)) for uri in ("/mine", "/alias", "/root"))
    assert rig.word(rig.redirect(alias, root.key)) == "linked"
    assert rig.word(rig.need(mine, alias.key, root.key, alias.key)) == "waiting"
    assert rig.record(mine.key)["needs"].split() == [root.key]
    rig.ask(rig.complete(root))
    assert is_called(rig)


def test_who_was_cancelled_or_moved_up_meanwhile_is_not_called(rig: Rig) -> None:
    mine, (one,) = waiting_for(rig, "/1")
    urgent = BatchRequest("/mine", priority="high")
    assert rig.word(rig.submit(urgent)) == "joined"  # runs at once, and will ask again
    assert len(rig.waiting()[0]) == 1
    rig.ask(rig.complete(one))
    assert rig.waiting()[1] == []
    audit(rig.client, rig.keys)
    assert rig.word(rig.calls.cancel(mine.key)) == "cancelled"
    audit(rig.client, rig.keys)


def test_a_request_that_was_deleted_by_hand_costs_a_delay_and_not_for_ever(rig: Rig) -> None:
    mine, (one,) = waiting_for(rig, "/1")
    rig.client.delete(rig.keys.status(one.key))
    assert rig.run(flows.sweep(rig.core)) == 0, "RQ's scheduler has its ticket"
    rig.client.hset(rig.keys.status(mine.key), mapping={"due_ms": 1, "pushed_ms": 1})
    assert rig.run(flows.sweep(rig.core)) == 1, "and without one a sweep delivers"
    assert rig.ask(rig.take()).key == mine.key


# -- the handler


def test_a_handler_gets_the_results_in_their_order_and_is_called_twice(bench: Bench) -> None:
    bench.route(lambda context: context.require("/double/2", "/double/1"))

    @bench.handlers.route("/double/{n:int}")
    def double(request: BatchRequest, context: Context, n: int) -> int:
        return 2 * n

    status = bench.run()
    assert bench.rm.result(status.key) == [4, 2]
    assert (bench.calls, status.attempts) == (2, 1)
    assert bench.run(BatchRequest("/x", key="again")).state is State.COMPLETED
    assert bench.calls == 3, "what is cached is there at once"


def test_others_are_not_asked_for_when_nothing_is(bench: Bench) -> None:
    bench.route(lambda context: context.require())
    assert bench.rm.result(bench.run().key) == []


async def _both(context: Context) -> Any:
    return await context.arequire("/one", "/two")


def test_an_async_handler_awaits_them(bench: Bench) -> None:
    bench.route(_both)
    bench.handlers.route("/one")(lambda request, context: 1)
    bench.handlers.route("/two")(lambda request, context: 2)
    assert bench.rm.result(bench.run().key) == [1, 2]


def test_a_blocking_require_on_an_event_loop_is_refused(bench: Bench) -> None:
    async def blocking(context: Context) -> Any:
        return context.require("/one")

    bench.route(blocking)
    error = bench.run().error
    assert error is not None
    assert "await context.arequire(...)" in error["message"]


def test_a_failure_meanwhile_is_an_error_in_the_handler_and_an_old_one_runs_again(bench: Bench) -> None:
    broken = [True]

    @bench.handlers.route("/part")
    def part(request: BatchRequest, context: Context) -> str:
        if broken[0]:
            raise OSError("the archive sleeps")
        return "part"

    def needing(context: Context) -> Any:
        try:
            return context.require("/part")
        except RequestFailed as failed:
            return failed.error["message"]

    bench.route(needing)
    assert bench.rm.result(bench.run().key) == "the archive sleeps"
    broken[0] = False
    assert bench.rm.result(bench.run(BatchRequest("/x", key="later")).key) == ["part"]


@pytest.mark.parametrize("size", [10, 300_000])
def test_a_corrupt_result_is_computed_again(bench: Bench, size: int) -> None:
    runs: list[int] = []

    @bench.handlers.route("/part")
    def part(request: BatchRequest, context: Context) -> bytes:
        runs.append(size)
        return os.urandom(size)

    bench.route(lambda context: len(context.require("/part")[0]))
    bench.run("/part")
    client = bench.rm.connection
    if size < 1000:
        client.hset(f"arm:result:{key('/part')}", "bytes", b"spoilt")
    else:
        (chunk,) = client.keys("arm:chunk:*")
        client.set(chunk, b"spoilt", keepttl=True)
    assert bench.rm.result(bench.run().key) == size
    assert len(runs) == 2


def test_a_cancelled_one_is_an_error_too_and_a_negative_answer_ends_it(bench: Bench) -> None:
    def needing(context: Context) -> Any:
        if bench.calls == 2:
            bench.rm.cancel(key("/never"))
        return context.require("/never")

    bench.route(needing)
    bench.handlers.route("/never")(lambda request, context: bench.rm.cancel(context.key))
    error = bench.run().error
    assert error is not None
    assert error["type"].endswith(RequestCancelled.__name__)

    @bench.handlers.route("/negative", negative_ttl=60)
    def negative(request: BatchRequest, context: Context) -> None:
        raise LookupError("gone")

    bench.handlers.route("/late")(lambda request, context: context.require("/negative"))
    assert bench.run("/negative").state is State.FAILED
    status = bench.run("/late")
    assert status.error is not None
    assert "gone" in status.error["message"]


def test_requests_that_need_each_other_fail_with_the_chain(bench: Bench) -> None:
    @bench.handlers.route("/loop/{n:int}", retry=Retry(max=3))
    def loop(request: BatchRequest, context: Context, n: int) -> Any:
        return context.require(f"/loop/{(n + 1) % 3}")

    bench.run("/loop/0")
    error = bench.rm.status(key("/loop/2")).error
    assert error is not None
    assert error["type"].endswith(NeedLoop.__name__)
    assert "/loop/2 -> /loop/0 -> /loop/1 -> /loop/2" in error["message"]
    assert [bench.rm.status(key(f"/loop/{n}")).state for n in range(3)] == [State.FAILED] * 3

    bench.handlers.route("/self")(lambda request, context: context.require("/self"))
    error = bench.run("/self").error
    assert error is not None
    assert "/self -> /self" in error["message"]


def test_the_others_get_queue_and_priority_where_they_do_not_say_better(bench: Bench) -> None:
    bench.route(lambda context: context.require("/a", BatchRequest("/b", queue="other", priority="high")))
    bench.rm.submit(BatchRequest("/x", priority="low"))
    bench.work()
    wanted = {"/a": ("arm", Priority.LOW), "/b": ("other", Priority.HIGH)}
    for uri, (queue, priority) in wanted.items():
        record = bench.rm.connection.hgetall(f"arm:status:{key(uri)}")
        if record[b"state"] != b"failed":  # nobody handles /a, which has run already
            assert (record[b"queue"].decode(), int(record[b"priority"])) == (queue, priority)


def test_a_full_queue_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqarm.redirects.REFUSED_DELAY", 3600.0)
    bench.set(max_pending=1)
    bench.route(lambda context: context.require("/a"))
    bench.rm.submit("/x")
    bench.rm.connection.zadd("arm:pending:arm", {"somebody": 9e18})  # the line is full when /x runs
    bench.work()
    bench.rm.connection.zrem("arm:pending:arm", "somebody")
    status = bench.rm.status(key("/x"))
    assert status.state is State.PENDING
    assert status.error is not None
    assert "max_pending" in status.error["message"]


def test_what_cannot_be_required_is_refused_at_its_line() -> None:
    made = context(found={"/a": 1})
    assert made.require("/a", "/a") == [1, 1]
    with pytest.raises(Needed) as needed:
        made.require("/a", "/b")
    assert [request.uri for request in needed.value.requests] == ["/b"]
    with pytest.raises(InvalidRequest, match="1001 are more than 1000"):
        made.require(*["/a"] * 1001)
    with pytest.raises(InvalidRequest):
        made.require("/%zz")


def test_a_flow_answers_ready_when_all_have_ended_between_the_two_steps(rig: Rig) -> None:
    attempt = rig.begin(BatchRequest("/mine"))
    rig.run(flows.put(rig.core, "/other", "value"))
    assert rig.run(needs.need(rig.core, attempt, [BatchRequest("/other")])) == "ready"
    assert rig.state(attempt.key) is State.IN_PROGRESS


def test_drain_does_not_ask_again_for_who_waits(rqarm_manager: Any) -> None:
    handlers = Handlers()

    @handlers.route("/x")
    def needing(request: BatchRequest, context: Context) -> Any:
        return context.require("/slow")

    @handlers.route("/slow", retry=Retry(max=1, interval=3600))
    def slow(request: BatchRequest, context: Context) -> int:
        return 1 // (context.attempt - 1)

    rqarm_manager.submit("/x")
    told = [(one.uri, one.outcome) for one in drain(rqarm_manager, handlers)]
    assert told == [("/x", "waits for 1"), ("/slow", "retried in 3600 s"), ("/slow", "completed"), ("/x", "completed")]


def test_the_example_runs(rqarm_connection: Any) -> None:
    path = Path(__file__).parents[1] / "examples" / "needs.py"
    done = subprocess.run([sys.executable, path], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["/sales/2025: waits for 12", "/winters/2025: waits for 3"]
    assert sum(line.endswith(": completed") for line in lines) == 14
    assert lines[-1].startswith("the year: ")


# -- workers


@pytest.fixture
def team(home: embedded.PrivateServer, tmp_path: Path) -> Iterator[Crew]:
    with crew(home.url, tmp_path, handlers=APP, crash_delay=0) as hired:
        yield hired


@pytest.mark.parametrize(
    ("kind", "concurrency", "depth"), [("rqarm.Worker", 1, 3), ("rqarm.Worker", 8, 3), ("rq.worker.Worker", 1, 1)]
)
def test_a_tree_of_needs_is_computed_by_one_worker(team: Crew, kind: str, concurrency: int, depth: int) -> None:
    team.hire(kind, concurrency=concurrency)
    began = time.monotonic()
    assert team.rm.get(f"/tree/{depth}", timeout=managers.PATIENCE) == 2**depth
    took = time.monotonic() - began
    runs = (team.directory / "notes" / "leaves").read_text().split()
    assert sorted(runs) == [f"/leaf/{n}" for n in range(2**depth)], "each leaf once"
    if kind == "rqarm.Worker":
        assert took < 10, "pushed, not polled"
    eventually(lambda: team.rm.connection.keys(f"{team.name}:aliases:*") == [])
    audit(team.rm.connection, team.rm.core.keys)
