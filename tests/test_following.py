"""What issue 4 promises of progress and intermediate responses: both managers, and real workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import managers
import pytest
import redis
from click.testing import CliRunner
from managers import PATIENCE
from servers import eventually
from workers import TESTS, Crew, crew

from rqarm import (
    BatchRequest,
    BatchStatus,
    FollowEvent,
    FollowKind,
    RequestCancelled,
    RequestFailed,
    RequestLost,
    RequestUnknown,
    State,
    UnpackableResult,
    WaitTimeout,
    embedded,
    following,
    packing,
)
from rqarm.cli import main
from rqarm.config import Settings
from rqarm.errors import EmissionTooLarge, LeaseLost
from rqarm.flows import RECHECK, Core, Listen, Watch
from rqarm.model import Key, Priority, Token
from rqarm.replies import NO_REQUEST, Attempt, Followed, Found
from rqarm.rqjobs import RqJobs
from rqarm.worker.emitter import Emitter

FOLLOW_APP = TESTS / "follow_app.py"


@pytest.fixture
def threads() -> Iterator[managers.Threads]:
    with managers.threads() as started:
        yield started


def told(event: FollowEvent) -> tuple[Any, ...]:
    """An event as a test writes it."""
    match event.kind:
        case FollowKind.EMITTED | FollowKind.RESULT:
            return str(event.kind), event.value
        case FollowKind.PROGRESS:
            return "progress", event.fraction, event.message
        case FollowKind.DROPPED:
            return "dropped", event.count
        case FollowKind.RESTARTED:
            return ("restarted",)
    return "error", type(event.error)


def followed(rm: Any, key: str, into: list[tuple[Any, ...]] | None = None) -> list[tuple[Any, ...]]:
    heard = [] if into is None else into
    for event in rm.follow(key, PATIENCE):
        heard.append(told(event))
    return heard


def listening(client: redis.Redis, key: str, count: int = 1, namespace: str = "arm") -> None:
    """Return when so many processes follow."""
    channel = f"{namespace}:done:{key}:told"
    eventually(lambda: client.pubsub_numsub(channel)[0][1] >= count, PATIENCE, "a follower subscribes")


def take(rm: Any) -> Any:
    lease = rm.queues.next_request()
    assert lease is not None
    return lease


# -- the managers


def test_a_late_joiner_gets_what_was_emitted_and_then_all_that_comes(
    rm: Any, threads: managers.Threads, redis_client: redis.Redis
) -> None:
    key = rm.submit("/x").key
    lease = take(rm)
    lease.emit({"rows": [1]})
    lease.emit(b"\x00\xff")
    lease.renew(0.5, "half of it")
    heard: list[tuple[Any, ...]] = []
    following = threads.start(followed, rm, key, heard)
    first = [("emitted", {"rows": [1]}), ("emitted", b"\x00\xff"), ("progress", 0.5, "half of it")]
    eventually(lambda: heard == first)
    lease.emit("live")
    eventually(lambda: heard == [*first, ("emitted", "live")])
    lease.renew(0.75)
    eventually(lambda: heard[-1] == ("progress", 0.75, ""))
    lease.finish("all")
    assert following.result(PATIENCE)[-1] == ("result", "all")
    assert [kind for kind, *_ in heard].count("result") == 1


def test_after_the_end_what_was_emitted_is_told_again_and_then_the_result(rm: Any) -> None:
    key = rm.submit("/x").key
    lease = take(rm)
    lease.emit(1)
    lease.emit(2)
    lease.finish(3)
    for _ in range(2):
        assert followed(rm, key) == [("emitted", 1), ("emitted", 2), ("result", 3)]
    assert followed(rm, BatchRequest("/x")) == [("emitted", 1), ("emitted", 2), ("result", 3)]


def test_a_large_result_is_read_whole(rm: Any) -> None:
    key = rm.submit("/x").key
    take(rm).finish(b"x" * (3 << 20))
    ((kind, value),) = followed(rm, key)
    assert (kind, len(value)) == ("result", 3 << 20)


def test_each_way_to_end_badly_is_one_event(rm: Any) -> None:
    failed, cancelled = rm.submit("/failed").key, rm.submit("/cancelled").key
    lease = take(rm)
    lease.emit("so far")
    lease.fail(ValueError("no"))
    rm.cancel(cancelled)
    assert followed(rm, failed) == [("emitted", "so far"), ("error", RequestFailed)]
    assert followed(rm, cancelled) == [("error", RequestCancelled)]
    (*_, end) = rm.follow(failed)
    assert end.error.error["message"] == "no"
    assert end.to_dict()["error"]["type"] == "RequestFailed"


def test_the_record_may_vanish_under_a_follower(rm: Any, threads: managers.Threads, redis_client: redis.Redis) -> None:
    key = rm.submit("/x").key
    following = threads.start(followed, rm, key)
    listening(redis_client, key)
    rm.cancel(key)
    assert following.result(PATIENCE) == [("error", RequestCancelled)]
    key = rm.submit("/y").key
    redis_client.config_resetstat()
    following = threads.start(followed, rm, key)
    listening(redis_client, key)
    eventually(lambda: "cmdstat_evalsha" in redis_client.info("commandstats"), PATIENCE, "it has looked once")
    redis_client.delete(f"arm:status:{key}")
    redis_client.publish(f"arm:done:{key}", "unknown")
    assert following.result(PATIENCE) == [("error", RequestLost)]


def test_there_is_nothing_to_follow_of_an_unknown_request(rm: Any) -> None:
    with pytest.raises(RequestUnknown):
        followed(rm, "nobody")


def test_the_time_of_a_follower_ends_and_the_request_goes_on(rm: Any) -> None:
    key = rm.submit("/x").key
    with pytest.raises(WaitTimeout):
        list(rm.follow(key, timeout=0.01))
    take(rm).finish(1)
    assert followed(rm, key) == [("result", 1)]


@pytest.mark.parametrize("way", ["retry", "release"])
def test_another_attempt_is_told_and_its_emissions_begin_anew(
    rm: Any, threads: managers.Threads, redis_client: redis.Redis, way: str
) -> None:
    key = rm.submit("/x").key
    lease = take(rm)
    lease.emit("old")
    heard: list[tuple[Any, ...]] = []
    following = threads.start(followed, rm, key, heard)
    eventually(lambda: heard == [("emitted", "old")])
    lease.retry("again") if way == "retry" else lease.release()
    eventually(lambda: heard == [("emitted", "old"), ("restarted",)])
    second = take(rm)
    with pytest.raises(LeaseLost):
        lease.emit("of a dead one")
    second.emit("new")
    eventually(lambda: heard[-1] == ("emitted", "new"))
    second.finish("end")
    assert following.result(PATIENCE)[2:] == [("emitted", "new"), ("result", "end")]
    assert followed(rm, key) == [("emitted", "new"), ("result", "end")]


def test_who_has_missed_some_is_told_how_many(rm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqarm.calls.EMISSIONS_KEPT", 2)
    key = rm.submit("/x").key
    lease = take(rm)
    for n in range(5):
        lease.emit(n)
    lease.finish(None)
    assert followed(rm, key) == [("dropped", 3), ("emitted", 3), ("emitted", 4), ("result", None)]


def test_what_cannot_be_emitted_is_refused_before_anything_is_sent(rm: Any) -> None:
    key = rm.submit("/x").key
    lease = take(rm)
    lease.emit("before")
    with pytest.raises(UnpackableResult, match=r"\$\['rows'\]"):
        lease.emit({"rows": object()})
    with pytest.raises(EmissionTooLarge, match="1048576"):
        lease.emit("x" * (1 << 20))
    lease.emit("after")
    lease.finish(1)
    assert followed(rm, key) == [("emitted", "before"), ("emitted", "after"), ("result", 1)]


def test_a_follower_that_goes_away_leaves_nothing_behind(rm: Any, redis_client: redis.Redis) -> None:
    key = rm.submit("/x").key
    lease = take(rm)
    lease.emit(1)
    following = rm.follow(key)
    assert next(iter(following)).value == 1
    listening(redis_client, key)
    following.close()
    eventually(lambda: redis_client.pubsub_numsub(f"arm:done:{key}:told")[0][1] == 0)
    lease.finish(2)


def test_the_status_has_the_message_as_long_as_it_runs(rm: Any) -> None:
    key = rm.submit("/x").key
    lease = take(rm)
    assert rm.status(key).progress_message == ""
    lease.renew(0.4, "40 of 100 rows")
    status = rm.status(key)
    assert (status.progress, status.progress_message) == (0.4, "40 of 100 rows")
    assert status.to_dict()["progress_message"] == "40 of 100 rows"
    lease.finish(1)
    status = rm.status(key)
    assert (status.progress, status.progress_message) == (None, "")


def test_a_waiter_is_not_woken_by_what_is_told_on_the_way(
    rm: Any, threads: managers.Threads, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = rm.submit("/x").key
    lease = take(rm)
    waiting = threads.start(rm.result, key, None)
    managers.watched(redis_client, key)
    before = int(redis_client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0))
    for n in range(20):
        lease.emit(n)
    after = int(redis_client.info("commandstats")["cmdstat_evalsha"]["calls"])
    assert after - before <= 22
    lease.finish(1)
    assert waiting.result(PATIENCE) == 1


# -- the command line


def test_rqarm_follow_prints_what_is_told(rm: Any, url: str) -> None:
    key = rm.submit("/x", payload=None).key
    lease = take(rm)
    lease.emit({"n": 1})
    lease.renew(0.5, "half")
    lease.finish({"all": True})
    run = CliRunner().invoke(main, ["-u", url, "follow", key])
    assert run.exit_code == 0, run.output
    assert run.stdout.splitlines()[0] == '{"n": 1}'
    assert json.loads("".join(run.stdout.splitlines()[1:])) == {"all": True}
    run = CliRunner().invoke(main, ["-u", url, "follow", "--json", "/x"])
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [(line["kind"], line.get("value")) for line in lines] == [("emitted", {"n": 1}), ("result", {"all": True})]


def test_rqarm_follow_exits_as_result_does(rm: Any, url: str) -> None:
    key = rm.submit("/x").key
    take(rm).fail(ValueError("no"))
    run = CliRunner().invoke(main, ["-u", url, "follow", key])
    assert (run.exit_code, run.stdout) == (1, "")
    assert "ValueError: no" in run.stderr
    pending = rm.submit("/y").key
    assert CliRunner().invoke(main, ["-u", url, "follow", "--timeout", "0.01", pending]).exit_code == 3


# -- real workers


@pytest.fixture
def team(home: embedded.PrivateServer, tmp_path: Path) -> Iterator[Crew]:
    with crew(home.url, tmp_path, handlers=FOLLOW_APP, crash_delay=0) as hired:
        yield hired


#: how a worker runs requests
ENGINES = [
    pytest.param("rqarm.Worker", 1, id="warm"),
    pytest.param("rqarm.Worker", 4, id="lanes"),
    pytest.param("rq.worker.Worker", 1, id="rq"),
]


def let_go(team: Crew, name: str, attempt: int, n: int) -> None:
    team.let_go(f"{name}-{attempt}-{n}")


@pytest.mark.parametrize(("worker", "concurrency"), ENGINES)
def test_followers_in_several_processes_all_get_everything(team: Crew, worker: str, concurrency: int) -> None:
    team.hire(worker, concurrency=concurrency)
    key = team.rm.submit("/steps/a/3").key
    program = (
        "import sys; from rqarm import RequestManager\n"
        "rm = RequestManager(sys.argv[1], namespace=sys.argv[2], allow_volatile=True)\n"
        "for event in rm.follow(sys.argv[3], 40):\n"
        "    print(event.kind, event.value, flush=True)"
    )
    command = [sys.executable, "-c", program, team.url, team.name, key]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    with others[0], others[1]:
        listening(team.rm.connection, key, 2, team.name)
        for n in range(3):
            for other in others:
                assert other.stdout is not None
                assert other.stdout.readline() == f"emitted [1, {n}]\n"  # each before the next one is emitted
            let_go(team, "a", 1, n)
        for other in others:
            assert other.stdout is not None
            assert other.stdout.read() == "result a 1\n"
    assert followed(team.rm, key) == [*(("emitted", [1, n]) for n in range(3)), ("result", "a 1")]


@pytest.mark.parametrize(("worker", "concurrency"), ENGINES)
def test_a_follower_is_told_of_a_crash_and_gets_what_the_next_attempt_emits(
    team: Crew, threads: managers.Threads, worker: str, concurrency: int
) -> None:
    hired = team.hire(worker, concurrency=concurrency)
    key = team.rm.submit("/steps/c/2").key
    heard: list[tuple[Any, ...]] = []
    following = threads.start(followed, team.rm, key, heard)
    eventually(lambda: heard == [("emitted", [1, 0])], PATIENCE)
    os.kill(int(team.note("running-c-1")), signal.SIGKILL)
    eventually(lambda: len(heard) >= 3, 2 * PATIENCE, hired.said())
    assert heard == [("emitted", [1, 0]), ("restarted",), ("emitted", [2, 0])]
    for n in range(2):
        let_go(team, "c", 2, n)
    assert following.result(PATIENCE)[3:] == [("emitted", [2, 1]), ("result", "c 2")]


@pytest.mark.parametrize(("worker", "concurrency"), ENGINES)
def test_a_retry_and_a_failure_are_told(team: Crew, threads: managers.Threads, worker: str, concurrency: int) -> None:
    team.hire(worker, concurrency=concurrency)
    key = team.rm.submit("/retried/r").key
    heard: list[tuple[Any, ...]] = []
    following = threads.start(followed, team.rm, key, heard)
    eventually(lambda: heard == [("emitted", [1, 0])], PATIENCE)
    let_go(team, "r", 1, 0)
    eventually(lambda: heard[1:] == [("restarted",), ("emitted", [2, 0])], PATIENCE)
    let_go(team, "r", 2, 0)
    assert following.result(PATIENCE)[-1] == ("result", 2)
    for uri in ("/failing/x", "/async-failing"):
        failed = team.rm.submit(uri).key
        assert followed(team.rm, failed)[-1] == ("error", RequestFailed)
        assert followed(team.rm, failed) == [("emitted", "before it failed"), ("error", RequestFailed)]


def test_a_cancelled_request_is_told_and_its_handler_stops_at_its_next_emission(
    team: Crew, threads: managers.Threads
) -> None:
    team.hire()
    key = team.rm.submit("/steps/s/3").key
    heard: list[tuple[Any, ...]] = []
    following = threads.start(followed, team.rm, key, heard)
    eventually(lambda: heard == [("emitted", [1, 0])], PATIENCE)
    team.rm.cancel(key)
    let_go(team, "s", 1, 0)
    assert following.result(PATIENCE) == [("emitted", [1, 0]), ("error", RequestCancelled)]
    assert team.rm.get("/add/1/2", timeout=PATIENCE) == 3  # the worker goes on
    assert followed(team.rm, key) == [("emitted", [1, 0]), ("error", RequestCancelled)]


@pytest.mark.parametrize(("worker", "concurrency"), ENGINES)
def test_all_that_is_emitted_arrives_in_order_before_the_end(team: Crew, worker: str, concurrency: int) -> None:
    team.hire(worker, concurrency=concurrency)
    count = 300
    keys = [team.rm.submit(uri).key for uri in (f"/many/{count}", f"/async-many/{count}", f"/async-mixed/{count}")]
    team.settle(*keys)
    numbers = [("emitted", n) for n in range(count)]
    assert followed(team.rm, keys[0]) == [*numbers, ("result", count)]
    *emitted, last, (end, turns) = followed(team.rm, keys[1])
    assert (emitted, last, end) == (numbers, ("emitted", "last"), "result")
    assert turns > 10, "the loop stood still"
    assert followed(team.rm, keys[2]) == [*numbers, ("result", None)]


def test_what_a_handler_cannot_emit_is_an_error_in_the_handler(team: Crew) -> None:
    team.hire()
    assert "UnpackableResult: cannot pack the value at $" in team.rm.get("/refused/unpackable", timeout=PATIENCE)
    assert "EmissionTooLarge" in (answer := team.rm.get("/refused/large", timeout=PATIENCE))
    assert "the limit for one is 1048576" in answer


# -- redirects


def test_a_follower_of_an_alias_is_told_what_its_root_tells(
    rm: Any, threads: managers.Threads, redis_client: redis.Redis
) -> None:
    alias = rm.submit("/alias").key
    lease = take(rm)
    lease.emit("mine")
    heard: list[tuple[Any, ...]] = []
    following = threads.start(followed, rm, alias, heard)
    eventually(lambda: heard == [("emitted", "mine")])
    lease.redirect("/root")
    root = take(rm)
    eventually(lambda: heard[1:] == [("restarted",)])
    root.emit("of the root")
    root.renew(0.5, "half")
    eventually(lambda: heard[-1] == ("progress", 0.5, "half"))
    root.finish("both")
    assert following.result(PATIENCE)[2:] == [("emitted", "of the root"), ("progress", 0.5, "half"), ("result", "both")]
    assert followed(rm, alias) == [("emitted", "of the root"), ("result", "both")]
    (end,) = [event for event in rm.follow(alias) if event.is_end]
    assert end.key == alias


def test_a_follower_of_an_alias_is_told_the_end_of_the_alias(rm: Any, threads: managers.Threads) -> None:
    failed, cancelled = rm.submit("/failed").key, rm.submit("/cancelled").key
    for _ in range(2):
        take(rm).redirect("/root")
    root = take(rm)
    assert rm.cancel(cancelled)
    assert followed(rm, cancelled) == [("error", RequestCancelled)]
    root.emit("in vain")
    root.fail("no")
    assert followed(rm, failed) == [("error", RequestFailed)]


def test_a_chain_is_followed_to_where_it_leads(rm: Any, threads: managers.Threads, redis_client: redis.Redis) -> None:
    first = rm.submit("/3").key
    following = threads.start(followed, rm, first)
    for n in (2, 1, 0):
        listening(redis_client, first)
        take(rm).redirect(f"/{n}")
    take(rm).finish("bottom")
    assert following.result(PATIENCE) == [("result", "bottom")]


# -- driven by hand


def looked(state: State, token: str = "7", first: int = 1, *values: Any) -> Followed:
    packed = tuple(packing.pack(value) for value in values)
    return Followed(Found(BatchStatus(Key("k"), state, attempts=1), None), token, first, packed)


def test_a_lost_wake_up_costs_a_look_every_few_seconds() -> None:
    settings = Settings()
    flow = following.follow(Core(settings, RqJobs(settings)), "k", None)
    assert next(flow) == Watch((Key("k"), Key("k:told")))
    assert flow.send(None).argv[2:] == ("", 0)
    assert flow.send(looked(State.IN_PROGRESS, "7", 1, "a")).item.value == "a"
    assert next(flow) == Listen(RECHECK)
    # nobody woke it: it looks after the dead, and reads again behind what it knows
    assert flow.send({}).argv[0] == "SET"
    assert flow.send(False).argv[2:] == ("7", 1)
    assert flow.send(looked(State.IN_PROGRESS, "7", 2, "b")).item.value == "b"
    assert next(flow) == Listen(RECHECK)
    assert flow.send({Key("k:told"): b""}).argv[2:] == ("7", 2)


# -- the emitter


def test_a_root_that_ends_between_the_two_looks_is_no_restart() -> None:
    settings = Settings()
    alias = Followed(Found(BatchStatus(Key("k"), State.PENDING, attempts=1, redirect=Key("root")), None), "7", 1, ())
    flow = following.follow(Core(settings, RqJobs(settings)), "k", None)
    next(flow)
    flow.send(None)
    assert flow.send(alias) == Watch((Key("k"), Key("k:told"), Key("root"), Key("root:told")))
    flow.send(None)
    flow.send(alias)
    assert flow.send(looked(State.IN_PROGRESS, "9", 1, "of the root")).item.value == "of the root"
    assert next(flow) == Listen(RECHECK)
    flow.send({Key("root"): b""})
    flow.send(alias)  # it is still that of before
    assert flow.send(looked(State.COMPLETED, "9", 2)) == Listen(RECHECK), "the end of the alias has woken it already"


class Sent:
    """What an emitter sends, and how the server takes it."""

    def __init__(self, *answers: BaseException | None) -> None:
        self.numbers: list[int] = []
        self._answers = list(answers)
        self.lost = False

    def __call__(self, call: Any) -> str:
        self.numbers.append(call.argv[3])
        answer = self._answers.pop(0) if self._answers else None
        if answer is not None:
            raise answer
        return "emitted"

    def lose(self) -> None:
        self.lost = True

    def emitter(self, ask_beside: Any = None) -> Emitter:
        settings = Settings()
        attempt = Attempt(Key("k"), Token(7), 1, NO_REQUEST, {}, 0, 0, "arm", Priority.DEFAULT)
        return Emitter(Core(settings, RqJobs(settings)), attempt, self.lose, self, ask_beside)


def test_what_the_server_refuses_is_logged_and_the_handler_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    sent = Sent(None, redis.exceptions.OutOfMemoryError("OOM"))
    emitter = sent.emitter()
    for n in range(3):
        emitter.emit(n)
    assert sent.numbers == [1, 2, 3]
    assert "k: what it emitted was refused and is dropped: OOM" in caplog.text


def test_an_attempt_that_is_lost_learns_it_from_its_emission() -> None:
    sent = Sent(LeaseLost("k", "cancelled"))
    with pytest.raises(LeaseLost):
        sent.emitter().emit(1)
    assert sent.lost


async def test_on_a_loop_it_returns_at_once_and_flush_waits_for_all(caplog: pytest.LogCaptureFixture) -> None:
    gate = asyncio.Event()
    sent = Sent(None, redis.exceptions.ConnectionError("gone"), LeaseLost("k", "cancelled"))

    async def ask(call: Any) -> str:
        await gate.wait()
        return sent(call)

    emitter = sent.emitter(ask)
    for n in range(4):
        emitter.emit(n)
    await asyncio.sleep(0)
    assert (sent.numbers, emitter.is_busy) == ([], True)
    gate.set()
    await emitter.flush()
    assert (sent.numbers, emitter.is_busy, sent.lost) == ([1, 2, 3, 4], False, True)
    assert "dropped: gone" in caplog.text


async def test_a_handler_that_never_lets_the_loop_turn_keeps_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqarm.worker.emitter.EMISSIONS_KEPT", 3)
    sent = Sent()

    async def ask(call: Any) -> str:
        return sent(call)

    emitter = sent.emitter(ask)
    for n in range(10):
        emitter.emit(n)
    await emitter.flush()
    assert sent.numbers == [8, 9, 10]
