"""What a user's unit test does with fakeredis: the client's side of everything, without a server.

fakeredis knows no flags of scripts and no INFO; the shells leave both out there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fakeredis
import managers
import pytest
import redis

from rqarm import (
    BatchRequest,
    KeyConflict,
    LeaseLost,
    Outcome,
    RequestCancelled,
    RequestFailed,
    RequestManager,
    ResultNotReady,
    State,
    WaitTimeout,
    flows,
)
from rqarm.scripts import all_scripts

URI = "/cities/FR?min=1"
NEW, JOINED, HIT = Outcome.NEW, Outcome.JOINED, Outcome.HIT


@pytest.fixture(params=managers.KINDS)
def rm(request: pytest.FixtureRequest) -> Iterator[Any]:
    # a server of its own: fakeredis shares one between all clients of a host and port
    server = fakeredis.FakeServer()

    def client(module: Any) -> Any:
        return (fakeredis.FakeRedis if module is redis else fakeredis.FakeAsyncRedis)(server=server)

    with managers.opened(request.param, connection=client) as manager:
        yield manager


@pytest.fixture
def threads() -> Iterator[managers.Threads]:
    with managers.threads() as started:
        yield started


def take(rm: Any) -> Any:
    lease = rm.queues.next_request()
    assert lease is not None
    return lease


def test_fakeredis_gets_the_scripts_without_flags() -> None:
    assert any(script.text.startswith("#!lua") for script in all_scripts())
    assert not [script.name for script in all_scripts() if script.plain_text.startswith("#!")]


def test_emit_and_follow(rm: Any) -> None:
    key = rm.submit(URI).key
    lease = take(rm)
    lease.emit({"n": 1})
    lease.renew(0.5, "half")
    lease.emit({"n": 2})
    first = next(iter(rm.follow(key)))
    assert (first.kind, first.value) == ("emitted", {"n": 1})
    lease.finish("all")
    assert [event.value for event in rm.follow(key)] == [{"n": 1}, {"n": 2}, "all"]


def test_submit_join_run_and_hit(rm: Any) -> None:
    request = BatchRequest(URI, estimated_time=10)
    assert rm.submit(request).outcome is NEW
    assert rm.submit(request, payload={"to": "a"}).outcome is JOINED
    assert rm.full_status(request.key).position == 1
    assert rm.full_status(request.key).eta == 10
    assert rm.find(request.key) == request
    assert [status.uri for status in rm.queue()] == [URI]
    lease = take(rm)
    lease.renew(0.5, "half")
    assert rm.status(request.key).progress == 0.5
    lease.finish({"rows": [1, 2]})
    status = rm.submit(request)
    assert (status.outcome, status.value) == (HIT, {"rows": [1, 2]})
    assert rm.get(request) == rm.result(request.key) == {"rows": [1, 2]}
    assert rm.get_or_submit(request) == (True, {"rows": [1, 2]})
    assert rm.queues.next_request() is None
    assert rm.resubmit(request).outcome is NEW


def test_submit_many(rm: Any) -> None:
    rm.cache.put("/hit", 1)
    statuses = rm.submit_many(["/a", "/hit", "/a", BatchRequest("/b", priority="high")])
    assert [status.outcome for status in statuses] == [NEW, HIT, NEW, NEW]
    assert [take(rm).request.uri for _ in range(2)] == ["/b", "/a"]


def test_fail_retry_release(rm: Any) -> None:
    key = rm.submit(URI).key
    take(rm).release()
    take(rm).retry("busy", page=2)
    lease = take(rm)
    assert (lease.attempt, lease.kwargs) == (2, {"page": 2})
    lease.fail(ValueError("no"), negative_ttl=60)
    assert rm.submit(URI).outcome is Outcome.NEGATIVE
    with pytest.raises(RequestFailed, match="ValueError"):
        rm.result(key)
    with pytest.raises(LeaseLost):
        lease.finish(1)


def test_a_retry_with_a_delay_is_scheduled(rm: Any) -> None:
    rm.submit(URI)
    take(rm).retry("busy", delay=60)
    assert rm.queues.next_request() is None
    assert rm.submit(URI).outcome is JOINED


def test_cancel_and_forget(rm: Any) -> None:
    key = rm.submit(URI).key
    with pytest.raises(ResultNotReady):
        rm.forget(key)
    assert rm.cancel(key) is True
    assert rm.cancel(key) is False
    with pytest.raises(RequestCancelled):
        rm.result(key)
    assert rm.forget(key) is True
    assert rm.status(key).state is State.UNKNOWN


def test_waiters_are_woken(rm: Any, threads: managers.Threads) -> None:
    keys = [status.key for status in rm.submit_many(["/a", "/b", "/c"])]
    waiting = threads.start(rm.wait, keys, managers.PATIENCE)
    getting = threads.start(rm.get, "/a", managers.PATIENCE)
    take(rm).finish("value")
    take(rm).fail("no")
    rm.cancel(keys[2])
    assert getting.result(managers.PATIENCE) == "value"
    states = [status.state for status in waiting.result(managers.PATIENCE)]
    assert states == [State.COMPLETED, State.FAILED, State.CANCELLED]


def test_a_wait_ends_with_its_time(rm: Any) -> None:
    key = rm.submit(URI).key
    with pytest.raises(WaitTimeout):
        rm.result(key, 0.02)
    assert [status.state for status in rm.wait(key, 0.02)] == [State.PENDING]
    with pytest.raises(WaitTimeout):
        list(rm.as_completed([key], 0.02))


def test_the_cache(rm: Any) -> None:
    large = bytes(range(256)) * 20_000
    rm.cache.put(BatchRequest("/sticky", sticky=True), 1)
    key = rm.cache.put(BatchRequest("/large", ttl=60), large)
    assert rm.cache.is_ready(key)
    assert rm.cache.get(key) == large
    with rm.cache.open(key) as file:
        file.seek(2_000_000)
        assert file.read(5) == large[2_000_000:2_000_005]
    assert rm.cache.envelope(key).size == len(large)
    assert [status.uri for status in rm.cache.list()] == ["/large", "/sticky"]
    stats = rm.cache.stats()
    assert (stats.temporary, stats.sticky) == (1, 1)
    assert rm.cache.clear_temporary() == 1
    assert rm.cache.clear() == 1
    with pytest.raises(KeyConflict):
        rm.cache.put(BatchRequest("/b", key=rm.submit(BatchRequest("/a", key="mine")).key), 1)


def test_explain_and_events(rm: Any) -> None:
    assert rm.explain(URI).would is NEW
    rm.submit(URI)
    assert rm.explain(URI).would is JOINED
    assert [event.verb for event in rm.events(since="0", timeout=0.02)] == ["submit"]


def test_a_taker_is_woken_by_a_submit(rm: Any, threads: managers.Threads) -> None:
    taking = threads.start(rm.queues.next_request, managers.PATIENCE)
    rm.submit(URI)
    assert taking.result(managers.PATIENCE).request.uri == URI


def test_a_limit_parks_and_calls_up() -> None:
    with RequestManager(connection=fakeredis.FakeRedis(server=fakeredis.FakeServer())) as rm:
        leases = []
        for uri in ("/1", "/2"):
            rm.submit(uri)
            leases.append(take(rm))
        admitted = [rm.shell.run(flows.admit(rm.core, lease._attempt, "limit", 1)) for lease in leases]
        assert admitted == [True, False]
        assert rm.status(leases[1].key).state is State.PENDING
        leases[0].finish("done")
        assert take(rm).key == leases[1].key


def test_the_sweep_finds_a_lost_ticket(rm: Any) -> None:
    assert rm.queues.sweep() == 0


def test_an_operator_sees_and_acts(rm: Any) -> None:
    rm.cache.put(BatchRequest("/kept", tags=["red"]), 1)
    rm.submit(BatchRequest(URI), payload={"to": "a"})
    key = take(rm).key
    assert [entry.uri for entry in rm.search().entries] == [URI, "/kept"]
    assert [entry.uri for entry in rm.search("cit", route="/cities/{country}").entries] == [URI]
    detail = rm.inspect(key)
    assert (detail.payload_count, [event.verb for event in detail.timeline]) == (1, ["submit", "start"])
    assert rm.claims().entries[0].status.key == key
    assert rm.release(key)
    assert rm.workers().entries == ()
    overview = rm.cache.overview()
    assert (overview.temporary, overview.sampled) == (1, 1)
    assert rm.cache.pin(BatchRequest("/kept").key)
    assert rm.cache.page(order="size").entries[0].expires is None
    assert rm.cache.invalidate("red") == 1
    assert rm.cache.clear(route="/kept") == 0
