"""Many requests at a time: bulk_get_or_submit, submit_many and submit_stream, on real servers and on fakeredis."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import fakeredis
import managers
import pytest
import redis
import servers
from managers import queued, snapshot
from redis.exceptions import OutOfMemoryError
from servers import eventually
from workers import burst, crew

from rqarm import (
    AsyncRequestManager,
    BatchRequest,
    BulkError,
    ForeignData,
    InvalidRequest,
    KeyConflict,
    LeaseLost,
    Outcome,
    RequestManager,
    Result,
    State,
    UnpackableResult,
    bulk,
    embedded,
)

NEW, JOINED, HIT, NEGATIVE = Outcome.NEW, Outcome.JOINED, Outcome.HIT, Outcome.NEGATIVE
#: bytes that no compression shortens enough to fit inline
LARGE = os.urandom(3_000_000)


@pytest.fixture(params=[f"{kind}, {server}" for kind in managers.KINDS for server in ("valkey", "redis", "fakeredis")])
def rm(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Both managers on both servers and on fakeredis."""
    kind, _, name = request.param.partition(", ")
    if name == "fakeredis":
        fake = fakeredis.FakeServer()

        def client(module: Any) -> Any:
            return (fakeredis.FakeRedis if module is redis else fakeredis.FakeAsyncRedis)(server=fake)

        with managers.opened(kind, connection=client) as manager:
            manager.__dict__["raw"] = fakeredis.FakeRedis(server=fake)
            yield manager
        return
    server = request.getfixturevalue("both")[name]
    if server is None:
        pytest.skip(servers.MISSING[name])
    with redis.Redis(unix_socket_path=str(server.socket)) as raw:
        raw.flushall()
        with managers.opened(kind, server.url) as manager:
            manager.__dict__["raw"] = raw
            yield manager


@pytest.fixture(scope="module")
def both() -> Iterator[dict[str, embedded.PrivateServer | None]]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield {
            name: None if binary is None else stack.enter_context(servers.throwaway(binary))
            for name, binary in servers.BINARIES.items()
        }


def take(rm: Any, queue: str | None = None) -> Any:
    lease = rm.queues.next_request(queue=queue)
    assert lease is not None
    return lease


def payloads_of(rm: Any, key: str) -> set[bytes]:
    return set(rm.raw.hvals(f"arm:callbacks:{key}"))


def rq_leavings(client: redis.Redis) -> list[bytes]:
    """What stands in RQ's lists, and the jobs that it knows."""
    lists = [entry for name in client.scan_iter("rq:queue:*") for entry in client.lrange(name, 0, -1)]
    return [*lists, *client.scan_iter("rq:job:*")]


# -- bulk_get_or_submit


def test_one_bulk_has_every_outcome_and_one_call_of_on_hits(rm: Any) -> None:
    rm.cache.put("/small", {"n": 1})
    rm.cache.put("/large", LARGE)
    rm.submit("/joined")
    rm.submit("/failed")
    rm.cancel(rm.submit("/again").key)
    joined, failed = take(rm), take(rm)
    assert (joined.request.uri, failed.request.uri) == ("/joined", "/failed")
    failed.fail("no", negative_ttl=60)
    calls: list[Any] = []
    result = rm.bulk_get_or_submit(
        [("/small", "s"), "/large", ("/joined", "j"), "/failed", BatchRequest("/new"), "/again"], on_hits=calls.append
    )
    assert [(hit.request.uri, hit.value, hit.payloads) for hit in result.hits] == [
        ("/small", {"n": 1}, ("s",)),
        ("/large", LARGE, ()),
    ]
    assert [hit.key for hit in result.hits] == [BatchRequest(uri).key for uri in ("/small", "/large")]
    assert {hit.status.outcome for hit in result.hits} == {HIT}
    assert calls == [result.hits]
    assert [(status.uri, status.outcome) for status in result.misses] == [
        ("/joined", JOINED),
        ("/failed", NEGATIVE),
        ("/new", NEW),
        ("/again", NEW),
    ]
    assert (result.leases, result.errors) == ((), {})


def test_an_empty_bulk_says_nothing_to_the_server(rm: Any) -> None:
    result = rm.bulk_get_or_submit([], on_hits=pytest.fail, mitigation=pytest.fail)
    assert (result.hits, result.misses, result.leases, result.errors) == ((), (), (), {})
    assert rm.raw.dbsize() == 0


def test_a_thousand_are_one_round_trip_and_the_next_another(
    rm: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "fakeredis" in request.node.name:
        pytest.skip("no socket to count on")
    rm.cache.put("/n/7", 7)
    rm.bulk_get_or_submit(["/warm-up"])
    with managers.round_trips(monkeypatch) as sent:
        result = rm.bulk_get_or_submit([(f"/n/{n}", n) for n in range(1000)])
    assert len(sent) == 1
    assert ([hit.value for hit in result.hits], len(result.misses)) == ([7], 999)
    with managers.round_trips(monkeypatch) as sent:
        assert len(rm.bulk_get_or_submit(f"/m/{n}" for n in range(1001)).misses) == 1001
    assert len(sent) == 2


def test_payloads_end_a_round_trip_early(rm: Any, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    if "fakeredis" in request.node.name:
        pytest.skip("no socket to count on")
    monkeypatch.setattr(bulk, "TRIP_BYTES", 1000)
    rm.bulk_get_or_submit(["/warm-up"])
    with managers.round_trips(monkeypatch) as sent:
        rm.bulk_get_or_submit([(f"/{n}", bytes(500)) for n in range(5)])
    assert len(sent) == 3


def test_equal_requests_are_sent_once_with_all_their_payloads(rm: Any) -> None:
    entries = [("/a", 1), "/b", ("/a", 2), ("/a", 1), ("/./a", 3), "/a"]
    result = rm.bulk_get_or_submit(entries)
    assert [(status.uri, status.outcome) for status in result.misses] == [("/a", NEW), ("/b", NEW)]
    assert len(queued(rm.raw)) == 2
    assert payloads_of(rm, BatchRequest("/a").key) == {b"\x01", b"\x02", b"\x03"}
    rm.cancel(BatchRequest("/a").key)
    rm.cache.put("/a", "value")
    (hit,) = rm.bulk_get_or_submit(entries).hits
    assert hit.payloads == (1, 2, 1, 3)


def test_a_request_may_have_thousands_of_payloads(rm: Any) -> None:
    result = rm.bulk_get_or_submit([("/a", n) for n in range(2500)])
    assert {status.uri for status in result.misses} == {"/a"}
    assert len(queued(rm.raw)) == 1
    assert rm.raw.hlen(f"arm:callbacks:{BatchRequest('/a').key}") == 2500


def test_wrong_entries_are_told_and_the_others_served(rm: Any) -> None:
    rm.submit(BatchRequest("/mine", key="k"))
    rm.cache.put("/hit", 1)
    rm.raw.set(f"arm:status:{BatchRequest('/foreign').key}", "not ours")
    rm.cache.put("/corrupt", "x")
    rm.raw.hset(f"arm:result:{BatchRequest('/corrupt').key}", "bytes", b"y")
    hits: list[Any] = []
    result = rm.bulk_get_or_submit(
        [
            "/%zz",
            "/hit",
            (BatchRequest("/theirs", key="k"), "p"),
            ("/payload", object()),
            None,
            "/foreign",
            ("/fine", "p"),
            ("/a", 1, 2),
            "/corrupt",
        ],
        on_hits=hits.extend,
    )
    assert {position: type(error) for position, error in result.errors.items()} == {
        0: InvalidRequest,
        2: KeyConflict,
        3: UnpackableResult,
        4: InvalidRequest,
        5: ForeignData,
        7: InvalidRequest,
    }
    assert list(result.errors) == sorted(result.errors)
    assert [hit.value for hit in hits] == [1]
    assert [(status.uri, status.outcome) for status in result.misses] == [("/fine", NEW), ("/corrupt", NEW)]
    assert rm.status(BatchRequest("/payload").key).state is State.UNKNOWN, "nothing half-visible"
    assert payloads_of(rm, "k") == set()


def test_a_large_value_that_is_damaged_runs_again(rm: Any) -> None:
    rm.cache.put("/large", LARGE)
    key = BatchRequest("/large").key
    owner = rm.raw.hget(f"arm:result:{key}", "owner").decode()
    rm.raw.delete(f"arm:chunk:{key}:{owner}:1")
    result = rm.bulk_get_or_submit(["/large", "/b"], on_hits=pytest.fail)
    assert [(status.uri, status.outcome) for status in result.misses] == [("/large", NEW), ("/b", NEW)]
    assert len(queued(rm.raw)) == 2


def test_on_hits_that_raises_loses_nothing(rm: Any) -> None:
    rm.cache.put("/hit", 1)

    def on_hits(hits: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        rm.bulk_get_or_submit(["/hit", "/new", "/started"], on_hits=on_hits, mitigation=lambda r: r.uri == "/started")
    assert rm.status(BatchRequest("/new").key).state is State.PENDING
    # what was started for the caller went back, to the front
    assert [take(rm).request.uri for _ in range(2)] == ["/started", "/new"]


# -- mitigation


def test_what_mitigation_chooses_is_started_for_the_caller(rm: Any) -> None:
    rm.cache.put("/hit", 1)
    rm.submit("/joined")
    asked = []

    def mitigation(request: BatchRequest) -> bool:
        asked.append(request.uri)
        return request.uri != "/b"

    result = rm.bulk_get_or_submit(
        ["/hit", "/joined", "/a", "/b", BatchRequest("/c", queue="other", priority="high")], mitigation=mitigation
    )
    assert asked == ["/a", "/b", "/c"]
    assert [status.uri for status in result.misses] == ["/joined", "/b"]
    assert [lease.request.uri for lease in result.leases] == ["/a", "/c"]
    lease = result.leases[0]
    assert (lease.attempt, rm.status(lease.key).state) == (1, State.IN_PROGRESS)
    # no worker meets the tickets
    assert len(rq_leavings(rm.raw)) == 4
    assert [take(rm).request.uri for _ in range(2)] == ["/joined", "/b"]
    assert rm.queues.next_request() is None
    assert rm.queues.next_request(queue="other") is None
    assert rq_leavings(rm.raw) == []
    assert rm.submit("/a").outcome is JOINED
    lease.renew()
    lease.finish({"n": 1})
    assert rm.get("/a") == {"n": 1}
    result.leases[1].fail("no")
    assert rm.status(result.leases[1].key).state is State.FAILED
    assert rq_leavings(rm.raw) == []


def test_a_lease_can_go_back(rm: Any) -> None:
    (lease,) = rm.bulk_get_or_submit(["/a"], mitigation=lambda _: True).leases
    lease.release()
    again = take(rm)
    assert (again.request.uri, again.attempt) == ("/a", 1), "it counts for nothing"
    with pytest.raises(LeaseLost):
        lease.finish(1)


def test_a_thousand_started_are_one_more_round_trip(
    rm: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "fakeredis" in request.node.name:
        pytest.skip("no socket to count on")
    warm = rm.bulk_get_or_submit(["/warm-up"], mitigation=lambda _: True)
    with managers.round_trips(monkeypatch) as sent:
        result = rm.bulk_get_or_submit([f"/n/{n}" for n in range(1000)], mitigation=lambda _: True)
    assert (len(sent), len(warm.leases), len(result.leases)) == (2, 1, 1000)


def test_a_worker_that_is_faster_makes_it_a_miss(rm: Any) -> None:
    """The predicate is asked between the submit and the start: that is when the worker comes."""
    raced: list[Any] = []

    def mitigation(request: BatchRequest) -> bool:
        fast = RequestManager(connection=rm.raw, allow_volatile=True)
        lease = fast.queues.next_request()
        assert lease is not None
        raced.append(lease)
        if request.uri == "/failed":
            lease.fail("no")
        return True

    result = rm.bulk_get_or_submit(["/running", "/failed"], mitigation=mitigation, compute=pytest.fail)
    assert (result.leases, result.hits, result.errors) == ((), (), {})
    assert [status.uri for status in result.misses] == ["/running", "/failed"]
    assert rm.status(raced[1].key).state is State.FAILED, "it is not started anew"
    raced[0].finish("the worker's")
    assert rm.get("/running") == "the worker's"


def test_what_is_computed_counts_among_the_hits(rm: Any) -> None:
    rm.cache.put("/hit", 0)
    hits: list[Any] = []

    def compute(request: BatchRequest) -> Any:
        if request.uri == "/b":  # somebody joins meanwhile
            RequestManager(connection=rm.raw).submit("/b", payload="late")
        return {"uri": request.uri}

    result = rm.bulk_get_or_submit(
        [("/hit", "h"), ("/a", "p"), "/b", "/left"],
        on_hits=hits.append,
        mitigation=lambda request: request.uri != "/left",
        compute=compute,
    )
    assert [(hit.request.uri, hit.value, hit.payloads, hit.status.outcome) for hit in result.hits] == [
        ("/hit", 0, ("h",), HIT),
        ("/a", {"uri": "/a"}, ("p",), NEW),
        ("/b", {"uri": "/b"}, ("late",), NEW),
    ]
    assert {hit.status.state for hit in result.hits} == {State.COMPLETED}
    assert hits == [result.hits]
    assert result.leases == ()
    assert [status.uri for status in result.misses] == ["/left"]
    assert rm.get("/a") == {"uri": "/a"}
    assert len(rq_leavings(rm.raw)) == 2, "the list entry and the job of the one that was left"


def test_computed_streams_and_files_come_back_as_a_reader_gets_them(rm: Any) -> None:
    values = {"/stream": iter([b"a", b"b"]), "/file": Result(iter([b"c"]), "text/csv", "c.csv"), "/large": LARGE}
    result = rm.bulk_get_or_submit(list(values), mitigation=lambda _: True, compute=lambda r: values[r.uri])
    assert [hit.value for hit in result.hits] == [b"ab", Result(b"c", "text/csv", "c.csv"), LARGE]


def test_a_compute_that_fails_gives_that_request_back(rm: Any) -> None:
    def compute(request: BatchRequest) -> Any:
        if request.uri == "/raises":
            raise ValueError("not here")
        return object() if request.uri == "/unpackable" else 1

    result = rm.bulk_get_or_submit(
        ["/raises", "/fine", "/unpackable", "/raises"], mitigation=lambda _: True, compute=compute
    )
    assert [hit.request.uri for hit in result.hits] == ["/fine"]
    assert {position: type(error) for position, error in result.errors.items()} == {
        0: ValueError,
        2: UnpackableResult,
        3: ValueError,
    }
    assert (result.misses, result.leases) == ((), ())
    assert {take(rm).request.uri for _ in range(2)} == {"/raises", "/unpackable"}


def test_a_value_for_what_was_cancelled_meanwhile_is_refused(rm: Any) -> None:
    other = RequestManager(connection=rm.raw, allow_volatile=True)

    def compute(request: BatchRequest) -> int:
        other.cancel(request.key)
        return 1

    result = rm.bulk_get_or_submit(["/a"], mitigation=lambda _: True, compute=compute)
    assert [type(error) for error in result.errors.values()] == [LeaseLost]
    assert rm.status(BatchRequest("/a").key).state is State.CANCELLED


def test_an_interrupt_gives_back_all_that_is_held(rm: Any) -> None:
    class Stop(BaseException):
        pass

    def compute(request: BatchRequest) -> int:
        if request.uri == "/b":
            raise Stop
        return 1

    with pytest.raises(Stop):
        rm.bulk_get_or_submit(["/a", "/b", "/c"], mitigation=lambda _: True, compute=compute)
    assert rm.get("/a") == 1
    assert [take(rm).request.uri for _ in range(2)] == ["/b", "/c"]


def test_a_mitigation_that_raises_leaves_all_to_the_workers(rm: Any) -> None:
    answers = {"/a": True}
    with pytest.raises(KeyError, match="/b"):
        rm.bulk_get_or_submit(["/a", "/b"], mitigation=lambda request: answers[request.uri])
    assert [take(rm).request.uri for _ in range(2)] == ["/a", "/b"]


def test_compute_without_mitigation_is_refused_before_anything_is_sent(rm: Any) -> None:
    with pytest.raises(InvalidRequest, match="compute: mitigation is needed"):
        rm.bulk_get_or_submit(["/a"], compute=lambda _: 1)
    assert rm.raw.dbsize() == 0


def test_one_request_in_place_of_many_is_refused(rm: Any) -> None:
    for one in ("/abc", BatchRequest("/abc")):
        for ask in (rm.submit_many, rm.submit_stream, rm.bulk_get_or_submit):
            with pytest.raises(InvalidRequest, match="requests: many are needed"):
                ask(one)
    assert rm.raw.dbsize() == 0


def test_a_coroutine_function_that_nobody_would_await_is_refused(rm: Any) -> None:
    async def function(request: Any) -> bool:
        return False

    with pytest.raises(InvalidRequest, match="mitigation: it is asked without waiting"):
        rm.bulk_get_or_submit(["/a"], mitigation=function)
    if isinstance(rm, RequestManager):
        for options in ({"on_hits": function}, {"mitigation": lambda _: True, "compute": function}):
            with pytest.raises(InvalidRequest, match="needs an AsyncRequestManager"):
                rm.bulk_get_or_submit(["/a"], **options)
    assert rm.raw.dbsize() == 0


@pytest.fixture
def threads() -> Iterator[managers.Threads]:
    with managers.threads() as started:
        yield started


def test_leases_are_renewed_while_something_is_computed(
    kind: str, url: str, redis_client: redis.Redis, threads: managers.Threads
) -> None:
    go = threading.Event()
    with managers.opened(kind, url, lease=0.6) as rm:
        waiting = threads.start(
            rm.bulk_get_or_submit, ["/a", "/b"], mitigation=lambda _: True, compute=lambda r: (go.wait(20), r.uri)[1]
        )
        name = f"arm:status:{BatchRequest('/b').key}"
        eventually(lambda: redis_client.hget(name, "state") == b"in_progress")
        first = int(redis_client.hget(name, "lease_until") or 0)
        eventually(lambda: int(redis_client.hget(name, "lease_until") or 0) > first + 1_200, what="two leases pass")
        assert rm.queues.sweep() == 0
        go.set()
        assert [hit.value for hit in waiting.result(managers.PATIENCE).hits] == ["/a", "/b"]
        assert not redis_client.hexists(name, "crashes")


async def test_on_a_loop_on_hits_and_compute_may_be_coroutines(url: str, redis_client: redis.Redis) -> None:
    seen: list[Any] = []

    async def compute(request: BatchRequest) -> str:
        await asyncio.sleep(0)
        return request.uri

    async def on_hits(hits: Any) -> None:
        await asyncio.sleep(0)
        seen.extend(hit.value for hit in hits)

    async with AsyncRequestManager(url, allow_volatile=True) as rm:
        await rm.bulk_get_or_submit(["/a", "/b"], on_hits=on_hits, mitigation=lambda _: True, compute=compute)
        assert seen == ["/a", "/b"]
        # a task that is cancelled while it computes gives back what it holds
        computing = asyncio.Event()

        async def endless(request: BatchRequest) -> None:
            computing.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(rm.bulk_get_or_submit(["/c", "/d"], mitigation=lambda _: True, compute=endless))
        await computing.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert {status.state for status in await rm.wait([BatchRequest(u).key for u in ("/c", "/d")], 0)} == {
            State.PENDING
        }


def test_rqs_own_worker_that_popped_the_ticket_ends_its_job(url: str, redis_client: redis.Redis) -> None:
    """It popped before the start: it finds the ticket superseded, and nothing of it stays."""
    with RequestManager(url, allow_volatile=True) as rm:

        def mitigation(request: BatchRequest) -> bool:
            redis_client.lpop("rq:queue:arm")
            return True

        (lease,) = rm.bulk_get_or_submit(["/a"], mitigation=mitigation).leases
        (job,) = list(redis_client.scan_iter("rq:job:*"))
        redis_client.rpush("rq:queue:arm", job.removeprefix(b"rq:job:"))
        burst(redis_client)
        assert list(redis_client.scan_iter("rq:job:*")) == []
        lease.finish("mine")
        assert rm.get("/a") == "mine"


@pytest.mark.parametrize("worker", ["rqarm.Worker", "rq.worker.Worker"])
def test_beside_a_busy_worker_every_request_has_one_execution(
    worker: str, tmp_path: Any, request: pytest.FixtureRequest
) -> None:
    binary = servers.VALKEY or servers.REDIS
    with servers.throwaway(binary) as server, crew(server.url, tmp_path, lease=15.0) as hired:
        hired.hire(worker)
        computed: list[str] = []

        def compute(request: BatchRequest) -> int:
            computed.append(request.uri)
            return -1

        uris = [f"/add/{n}/1" for n in range(60)]
        result = hired.rm.bulk_get_or_submit(
            uris, mitigation=lambda request: int(request.uri.split("/")[2]) % 2 == 0, compute=compute
        )
        assert result.errors == {}
        statuses = hired.settle(*(BatchRequest(uri).key for uri in uris))
        assert {status.state for status in statuses} == {State.COMPLETED}
        assert {status.attempts for status in statuses} == {1}
        values = {uri: hired.rm.cache.get(BatchRequest(uri).key) for uri in uris}
        assert sorted(uri for uri, value in values.items() if value == -1) == sorted(computed)
        assert len(computed) + len([value for value in values.values() if value > 0]) == 60
        client = hired.rm.connection
        eventually(lambda: rq_leavings(client) == [], what="RQ's jobs are gone")


# -- submit_many


def test_a_conflict_of_one_does_not_hide_the_others(rm: Any) -> None:
    rm.submit(BatchRequest("/mine", key="k"))
    rm.raw.set(f"arm:status:{BatchRequest('/foreign').key}", "not ours")
    with pytest.raises(BulkError) as raised:
        rm.submit_many(["/a", BatchRequest("/theirs", key="k"), "/foreign", "/b", BatchRequest("/theirs", key="k")])
    error = raised.value
    assert [status and status.uri for status in error.statuses] == ["/a", None, None, "/b", None]
    assert {position: type(each) for position, each in error.errors.items()} == {
        1: KeyConflict,
        2: ForeignData,
        4: KeyConflict,
    }
    assert "3 of 5 requests were not taken" in str(error)
    assert error.__cause__ is error.errors[1]
    assert len(queued(rm.raw)) == 3


def test_an_invalid_request_is_named_and_nothing_is_sent(rm: Any) -> None:
    for wrong in ("/%zz", None, ("/a", "payload")):
        with pytest.raises(InvalidRequest, match=r"requests\[2\]"):
            rm.submit_many(["/a", "/b", wrong, "/c"])
    assert rm.raw.dbsize() == 0


def test_more_than_a_round_trip_keeps_its_order(rm: Any) -> None:
    uris = [f"/{n % 1010}" for n in range(1200)]
    statuses = rm.submit_many(uris)
    assert [status.uri for status in statuses] == uris
    assert len(queued(rm.raw)) == 1010


@pytest.fixture(scope="module")
def tiny() -> Iterator[embedded.PrivateServer]:
    with servers.throwaway(servers.VALKEY or servers.REDIS) as server:
        yield server


def test_without_memory_hits_are_served_and_the_others_told(kind: str, tiny: embedded.PrivateServer) -> None:
    with redis.Redis(unix_socket_path=str(tiny.socket)) as raw, managers.opened(kind, tiny.url) as rm:
        raw.flushall()
        rm.cache.put("/hit", 1)
        raw.config_set("maxmemory", 1)
        try:
            result = rm.bulk_get_or_submit(["/new", "/hit"])
            assert ([hit.value for hit in result.hits], type(result.errors[0])) == ([1], OutOfMemoryError)
            with pytest.raises(BulkError) as raised:
                rm.submit_many(["/new", "/hit"])
            assert isinstance(raised.value.errors[0], OutOfMemoryError)
            assert raised.value.statuses[1].value == 1
        finally:
            raw.config_set("maxmemory", 0)
        assert snapshot(raw).keys().isdisjoint({f"arm:status:{BatchRequest('/new').key}".encode()})


# -- submit_stream


def test_a_stream_reads_and_sends_a_chunk_at_a_time(rm: Any) -> None:
    read = itertools.count()
    statuses = rm.submit_stream((f"/{next(read)}" for _ in range(25)), chunk=10)
    assert rm.raw.dbsize() == 0, "nothing is sent before somebody asks"
    first = next(statuses)
    assert (first.uri, first.outcome, next(read)) == ("/0", NEW, 10)
    assert len(queued(rm.raw)) == 10
    assert [status.uri for status in statuses] == [f"/{n}" for n in range(1, 10)] + [f"/{n}" for n in range(11, 26)]
    assert list(rm.submit_stream([])) == []


def test_a_stream_takes_payloads_and_equal_requests(rm: Any) -> None:
    statuses = list(rm.submit_stream([("/a", 1), "/b", ("/a", 2), "/b", ("/a", 3)], chunk=4))
    assert [(status.uri, status.outcome) for status in statuses] == [
        ("/a", NEW),
        ("/b", NEW),
        ("/a", NEW),
        ("/b", NEW),
        ("/a", JOINED),
    ]
    assert payloads_of(rm, BatchRequest("/a").key) == {b"\x01", b"\x02", b"\x03"}


def test_a_stream_tells_what_is_wrong_in_its_place_and_goes_on(rm: Any) -> None:
    rm.submit(BatchRequest("/mine", key="k"))
    told: list[Any] = []
    statuses = rm.submit_stream(
        ["/0", "/%zz", "/2", BatchRequest("/theirs", key="k"), ("/4", object()), "/5"],
        chunk=2,
        on_error=lambda position, error: told.append((position, type(error))),
    )
    for status in statuses:
        told.append(status.uri)
    assert told == ["/0", (1, InvalidRequest), "/2", (3, KeyConflict), (4, UnpackableResult), "/5"]


def test_a_stream_without_on_error_raises_behind_the_chunk(rm: Any) -> None:
    got: list[str] = []
    stream = rm.submit_stream(["/0", "/1", "/2", "/%zz", "/4", "/5"], chunk=3)
    with pytest.raises(BulkError) as raised:
        got.extend(status.uri for status in stream)
    assert got == ["/0", "/1", "/2", "/4", "/5"]
    assert list(raised.value.errors) == [3]
    assert [status and status.uri for status in raised.value.statuses] == [None, "/4", "/5"]


@pytest.mark.parametrize("chunk", [0, -1, 1001, 1.5, True, None])
def test_a_chunk_that_no_round_trip_carries_is_refused_at_once(rm: Any, chunk: Any) -> None:
    with pytest.raises(InvalidRequest, match="chunk"):
        rm.submit_stream(["/a"], chunk=chunk)


def test_what_the_input_raises_comes_out_and_what_was_sent_stays(rm: Any) -> None:
    def uris() -> Iterator[str]:
        yield from ("/0", "/1", "/2")
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        list(rm.submit_stream(uris(), chunk=2))
    assert len(queued(rm.raw)) == 2


async def test_on_a_loop_a_stream_takes_asynchronous_input(url: str, redis_client: redis.Redis) -> None:
    async def uris() -> AsyncIterator[str]:
        for n in range(25):
            await asyncio.sleep(0)
            yield "/%zz" if n == 12 else f"/{n}"

    async with AsyncRequestManager(url, allow_volatile=True) as rm:
        wrong: list[int] = []
        stream = rm.submit_stream(uris(), chunk=10, on_error=lambda position, _: wrong.append(position))
        assert [status.uri async for status in stream] == [f"/{n}" for n in range(25) if n != 12]
        assert wrong == [12]


def test_a_stream_is_sent_in_bounded_memory(url: str, redis_client: redis.Redis) -> None:
    """Five times the requests take no more memory here than the first chunks did."""

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            for status in rm.submit_stream(f"/{count}/{n}" for n in range(count)):
                assert status.outcome is NEW
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    with RequestManager(url, allow_volatile=True) as rm:
        peak(10)
        assert peak(10_000) < 1.3 * peak(2_000)


def test_a_corrupt_result_in_a_stream_runs_again(rm: Any) -> None:
    rm.cache.put("/a", "x")
    rm.raw.hset(f"arm:result:{BatchRequest('/a').key}", "bytes", b"y")
    assert [status.outcome for status in rm.submit_stream(["/a", "/b"])] == [NEW, NEW]
