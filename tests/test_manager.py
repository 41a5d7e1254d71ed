"""Every public method of both managers, each claim once, on real servers."""

from __future__ import annotations

import inspect
import io
import json
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

import managers
import pytest
import redis
import redis.sentinel
from managers import blocked, queued, snapshot, watched
from servers import connections, eventually

from rqarm import (
    AsyncRequestManager,
    BatchRequest,
    BatchStatus,
    ConfigError,
    InvalidRequest,
    KeyConflict,
    LeaseLost,
    Outcome,
    Quarantined,
    RequestCancelled,
    RequestFailed,
    RequestManager,
    RequestUnknown,
    Result,
    ResultNotReady,
    ResultTooLarge,
    State,
    UnpackableResult,
    WaitTimeout,
)
from rqarm.cache import AsyncCache, Cache
from rqarm.queue import AsyncLease, AsyncQueues, Lease, Queues

URI = "/cities/FR?min=1"
NEW, JOINED, HIT = Outcome.NEW, Outcome.JOINED, Outcome.HIT
#: bytes that no compression shortens enough to fit inline
LARGE = bytes((i * i * 31 + (i >> 8) * 17 + (i >> 3)) & 0xFF for i in range(1000)) * 3000


@pytest.fixture
def opened(kind: str, url: str, redis_client: redis.Redis) -> Callable[..., Any]:
    """A manager with settings of its own."""
    return lambda **settings: managers.opened(kind, url, **settings)


@pytest.fixture
def threads() -> Iterator[managers.Threads]:
    with managers.threads() as started:
        yield started


def take(rm: Any, queue: str | None = None) -> Any:
    lease = rm.queues.next_request(queue=queue)
    assert lease is not None
    return lease


def answer(rm: Any, request: BatchRequest | str, value: Any = 1, **options: Any) -> str:
    """Submit, run, finish."""
    key = rm.submit(request).key
    lease = take(rm)
    assert lease.key == key
    lease.finish(value, **options)
    return str(key)


def fail(rm: Any, request: BatchRequest | str, error: Exception | None = None, **options: Any) -> str:
    key = rm.submit(request).key
    take(rm).fail(error or ValueError("no such country"), **options)
    return str(key)


def quarantine(rm: Any, request: BatchRequest | str = URI) -> str:
    """A request whose taker fell silent once too often. The manager has a short lease and allows one attempt."""
    key = rm.submit(request).key
    take(rm)
    eventually(lambda: rm.queues.sweep() == 1)
    return str(key)


FRAGILE: dict[str, Any] = {"lease": 0.001, "max_attempts": 1}


# -- one face


@pytest.mark.parametrize(
    ("blocking", "looping"),
    [(RequestManager, AsyncRequestManager), (Cache, AsyncCache), (Queues, AsyncQueues), (Lease, AsyncLease)],
)
def test_both_kinds_have_the_same_names_signatures_and_docstrings(blocking: type, looping: type) -> None:
    def face(kind: type) -> dict[str, Any]:
        return {name: member for name, member in vars(kind).items() if not name.startswith("_")}

    assert list(face(blocking)) == list(face(looping))
    assert inspect.getdoc(blocking) == inspect.getdoc(looping)
    for name, member in face(blocking).items():
        twin = face(looping)[name]
        assert type(member) is type(twin), name
        assert member.__doc__ == twin.__doc__, name
        functions = [m.fget if isinstance(m, property) else getattr(m, "__func__", m) for m in (member, twin)]
        one, other = (inspect.signature(function) for function in functions)
        assert one.parameters == other.parameters, name
        assert one.return_annotation == _blocking(other.return_annotation), name


def _blocking(annotation: str) -> str:
    return re.sub(r"redis\.asyncio\.", "redis.", re.sub(r"\bAsync", "", annotation))


def test_constructors_take_the_same_arguments() -> None:
    one, other = inspect.signature(RequestManager), inspect.signature(AsyncRequestManager)
    assert list(one.parameters) == list(other.parameters)


# -- submit


def test_a_new_request_is_pending_and_queued_once(rm: Any, redis_client: redis.Redis) -> None:
    request = BatchRequest(URI, sticky=True, estimated_time=2.5)
    status = rm.submit(request)
    assert (status.outcome, status.state, status.key, status.queue) == (NEW, State.PENDING, request.key, "arm")
    assert (status.uri, status.sticky, status.estimated_time, status.attempts) == (request.canonical, True, 2.5, 0)
    assert status.value is status.started is status.ended is status.error is status.position is None
    assert abs(status.submitted - datetime.now(UTC)) < timedelta(minutes=1)
    assert [job.rpartition(b"-")[0].decode() for job in queued(redis_client)] == [request.key]


def test_a_str_is_taken_as_a_uri(rm: Any) -> None:
    assert rm.submit(URI).key == BatchRequest(URI).key


@pytest.mark.parametrize("wrong", [None, 7, b"/cities", "/a\n", "/%zz"])
def test_what_is_no_request_is_refused_and_writes_nothing(rm: Any, redis_client: redis.Redis, wrong: Any) -> None:
    for ask in (rm.submit, rm.resubmit, rm.get, rm.get_or_submit, rm.explain, lambda r: rm.submit_many([URI, r])):
        with pytest.raises(InvalidRequest):
            ask(wrong)
    assert redis_client.dbsize() == 0


def test_what_is_in_flight_is_joined(rm: Any, redis_client: redis.Redis) -> None:
    first = rm.submit(URI)
    again = rm.submit(URI)
    assert (again.outcome, again.state, again.submitted) == (JOINED, State.PENDING, first.submitted)
    assert len(queued(redis_client)) == 1
    lease = take(rm)
    running = rm.submit(URI)
    assert (running.outcome, running.state, running.attempts) == (JOINED, State.IN_PROGRESS, 1)
    assert running.started is not None
    lease.finish(1)


def test_a_hit_carries_its_value(rm: Any, redis_client: redis.Redis) -> None:
    answer(rm, URI, {"rows": [1, 2]})
    status = rm.submit(URI)
    assert (status.outcome, status.state, status.value) == (HIT, State.COMPLETED, {"rows": [1, 2]})
    assert status.submitted <= status.started <= status.ended
    assert not queued(redis_client)


def test_a_large_hit_leaves_the_value_where_it_is(rm: Any) -> None:
    answer(rm, URI, LARGE)
    status = rm.submit(URI)
    assert (status.outcome, status.value) == (HIT, None)
    assert rm.get_or_submit(URI) == (True, LARGE)


def test_a_failure_answers_for_its_negative_ttl(rm: Any, redis_client: redis.Redis) -> None:
    fail(rm, URI, negative_ttl=60)
    status = rm.submit(URI)
    assert (status.outcome, status.state, status.error["type"]) == (Outcome.NEGATIVE, State.FAILED, "ValueError")
    assert not queued(redis_client)
    with pytest.raises(RequestFailed):
        rm.get(URI)
    assert rm.get_or_submit(URI)[1].outcome is Outcome.NEGATIVE


def test_a_failure_without_negative_ttl_runs_again(rm: Any) -> None:
    fail(rm, URI)
    status = rm.submit(URI)
    assert (status.outcome, status.state, status.error) == (NEW, State.PENDING, None)


def test_a_cancelled_request_runs_again(rm: Any) -> None:
    rm.cancel(rm.submit(URI).key)
    assert rm.submit(URI).outcome is NEW


def test_a_full_queue_refuses_and_writes_nothing(opened: Any, redis_client: redis.Redis) -> None:
    with opened(max_pending=1) as rm:
        rm.submit("/a")
        before = snapshot(redis_client)
        status = rm.submit("/b")
        assert (status.outcome, status.state) == (Outcome.REFUSED, State.UNKNOWN)
        with pytest.raises(ResultNotReady, match="max_pending"):
            rm.get("/b")
        assert rm.submit("/a").outcome is JOINED
        assert snapshot(redis_client) == before


def test_a_quarantined_request_is_not_run_again(opened: Any) -> None:
    with opened(**FRAGILE) as rm:
        key = quarantine(rm)
        status = rm.submit(URI)
        assert (status.outcome, status.state, status.quarantined) == (Outcome.NEGATIVE, State.FAILED, True)
        for ask in (lambda: rm.get(URI), lambda: rm.result(key)):
            with pytest.raises(Quarantined) as caught:
                ask()
            assert (caught.value.key, caught.value.error["type"]) == (key, "LeaseLapsed")
        assert rm.cache.stats().quarantined == 1


def test_resubmit_runs_what_is_cached_and_the_old_result_goes_at_once(rm: Any, redis_client: redis.Redis) -> None:
    key = answer(rm, URI, "old")
    status = rm.resubmit(URI)
    assert (status.outcome, status.state, status.value) == (NEW, State.PENDING, None)
    with pytest.raises(ResultNotReady):
        rm.result(key)
    take(rm).finish("new")
    assert rm.result(key) == "new"


def test_resubmit_joins_what_is_in_flight(rm: Any, redis_client: redis.Redis) -> None:
    rm.submit(URI)
    assert rm.resubmit(URI).outcome is JOINED
    assert len(queued(redis_client)) == 1


def test_resubmit_frees_the_failed_and_the_quarantined(opened: Any) -> None:
    with opened(**FRAGILE) as rm:
        fail(rm, "/failed", negative_ttl=60)
        assert rm.resubmit("/failed").outcome is NEW
        rm.cancel(BatchRequest("/failed").key)
        quarantine(rm)
        assert rm.resubmit(URI).outcome is NEW


def test_a_readable_key_belongs_to_one_request(rm: Any, redis_client: redis.Redis) -> None:
    rm.submit(BatchRequest("/a", key="report-2024"))
    before = snapshot(redis_client)
    with pytest.raises(KeyConflict, match="another key=") as caught:
        rm.submit(BatchRequest("/b", key="report-2024"))
    assert caught.value.key == "report-2024"
    with pytest.raises(KeyConflict):
        rm.cache.put(BatchRequest("/b", key="report-2024"), 1)
    assert snapshot(redis_client) == before


def test_a_payload_is_kept_once_however_often_it_is_submitted(rm: Any, redis_client: redis.Redis) -> None:
    for payload in ({"to": "a"}, {"to": "b"}, {"to": "a"}):
        rm.submit(URI, payload=payload)
    rm.get_or_submit(URI, {"to": "c"})
    rm.resubmit(URI, payload={"to": "b"})
    assert redis_client.hlen(f"arm:callbacks:{BatchRequest(URI).key}") == 3
    with pytest.raises(UnpackableResult):
        rm.submit(URI, payload=object())


def test_a_joiner_in_a_hurry_moves_the_request_up_and_a_weaker_one_leaves_it(rm: Any) -> None:
    rm.submit("/first")
    rm.submit("/second")
    rm.submit(BatchRequest("/second", priority="high"))
    rm.submit(BatchRequest("/second", priority="low"))
    assert [status.uri for status in rm.queue()] == ["/second", "/first"]
    assert take(rm).request.uri == "/second"


# -- submit_many


def test_submitting_nothing_says_nothing_to_the_server(rm: Any, redis_client: redis.Redis) -> None:
    assert rm.submit_many([]) == []
    assert redis_client.dbsize() == 0


def test_a_thousand_are_answered_in_their_order(rm: Any) -> None:
    uris = [f"/n/{n}" for n in range(1000)]
    statuses = rm.submit_many(uri for uri in uris)
    assert [status.uri for status in statuses] == uris
    assert {status.outcome for status in statuses} == {NEW}
    assert [status.uri for status in rm.queue()] == uris


def test_repeats_in_a_batch_collapse(rm: Any, redis_client: redis.Redis) -> None:
    statuses = rm.submit_many(["/a", "/b", "/a", BatchRequest("/a"), "/b"])
    assert [status.uri for status in statuses] == ["/a", "/b", "/a", "/a", "/b"]
    assert [status.outcome for status in statuses] == [NEW] * 5
    assert len(queued(redis_client)) == 2
    assert len(rm.submit_many(["/a"])) == 1


def test_one_batch_has_every_outcome(rm: Any) -> None:
    answer(rm, "/hit", 7)
    fail(rm, "/negative", negative_ttl=60)
    rm.submit("/joined")
    statuses = rm.submit_many(["/new", "/joined", "/hit", "/negative"])
    assert [status.outcome for status in statuses] == [NEW, JOINED, HIT, Outcome.NEGATIVE]
    assert statuses[2].value == 7


def test_each_request_of_a_batch_keeps_its_options(rm: Any, redis_client: redis.Redis) -> None:
    batch = [
        BatchRequest("/a", queue="other"),
        BatchRequest("/b", priority="low", sticky=True),
        BatchRequest("/c", priority="high", ttl=60),
        BatchRequest("/b", priority="high"),
    ]
    statuses = rm.submit_many(batch)
    assert [status.outcome for status in statuses] == [NEW, NEW, NEW, JOINED]
    assert [status.queue for status in statuses] == ["other", "arm", "arm", "arm"]
    assert [status.uri for status in rm.queue("other")] == ["/a"]
    assert rm.status(statuses[1].key).sticky
    line = [status.uri for status in rm.queue()]
    assert sorted(line) == ["/b", "/c"]
    assert [take(rm).request.uri for _ in line] == line


# -- where results are served


def test_what_is_completed_has_a_url_and_nothing_else(opened: Callable[..., Any], rm: Any) -> None:
    with opened(result_url="https://api.example/batch/{key}/result") as told:
        status = told.submit(URI)
        key, url = status.key, f"https://api.example/batch/{status.key}/result"
        assert status.url is told.submit(URI).url is told.status(key).url is None
        assert [each.url for each in told.queue()] == [None]
        lease = take(told)
        assert told.full_status(key).url is None
        lease.finish(1)
        assert [told.submit(URI).url, told.status(key).url, told.full_status(key).url] == [url] * 3
        assert [status.url for status in told.wait([key])] == [url]
        assert [status.url for status in told.cache.list()] == [url]
        assert told.status(key).to_dict()["url"] == url
        assert told.status(fail(told, "/failed")).url is None
        # it is the manager's, not the record's
        assert rm.status(key).url is None


# -- looking


def test_nothing_is_known_of_a_key_that_was_never_submitted(rm: Any) -> None:
    key = BatchRequest(URI).key
    assert rm.status(key) == rm.full_status(key) == BatchStatus(key, State.UNKNOWN)
    assert rm.find(key) is None
    assert not rm.cache.is_ready(key)


@pytest.mark.parametrize("wrong", ["", "a b", "é", "x" * 201, None])
def test_a_key_that_is_none_is_refused_everywhere(rm: Any, wrong: Any) -> None:
    asked: list[Callable[[Any], Any]] = [rm.status, rm.full_status, rm.find, rm.cancel, rm.forget, rm.result]
    asked += [rm.cache.is_ready, rm.cache.get, rm.cache.open, rm.cache.envelope, lambda key: rm.wait([key])]
    asked.append(lambda key: list(rm.as_completed([key])))
    for ask in asked:
        with pytest.raises(InvalidRequest):
            ask(wrong)


def test_a_status_follows_the_request_and_is_ready_for_json(rm: Any) -> None:
    key = rm.submit(URI).key
    assert rm.status(key).state is State.PENDING
    lease = take(rm)
    status = rm.status(key)
    assert (status.state, status.attempts, status.outcome) == (State.IN_PROGRESS, 1, None)
    assert status.worker
    lease.finish(1)
    plain = json.loads(json.dumps(rm.status(key).to_dict()))
    assert (plain["state"], plain["key"], plain["uri"]) == ("completed", key, URI)
    assert datetime.fromisoformat(plain["ended"]).tzinfo is not None
    assert "value" not in plain


def test_the_full_status_knows_the_place_in_line_and_the_time_to_go(rm: Any) -> None:
    keys = [rm.submit(BatchRequest(f"/n/{n}", estimated_time=10)).key for n in range(3)]
    found = [rm.full_status(key) for key in keys]
    assert [status.position for status in found] == [1, 2, 3]
    assert [status.eta for status in found] == [10, 20, 30]
    first = rm.submit(BatchRequest("/hurry", estimated_time=5, priority="high")).key
    assert [rm.full_status(key).position for key in (first, *keys)] == [1, 2, 3, 4]
    lease = take(rm)
    running = rm.full_status(first)
    assert running.position == 0
    assert 0 < running.eta <= 5
    assert 10 < rm.full_status(keys[0]).eta <= 15
    lease.finish(1)
    ended = rm.full_status(first)
    assert (ended.position, ended.eta) == (None, None)


def test_the_place_in_another_queue_counts_there(rm: Any) -> None:
    rm.submit("/here")
    key = rm.submit(BatchRequest("/there", queue="other")).key
    assert (rm.full_status(key).position, rm.full_status(key).queue) == (1, "other")


def test_find_gives_the_request_as_it_was_submitted(rm: Any) -> None:
    request = BatchRequest("/a?x=1", {"y": ["2", "3"]}, sticky=True, tags=("t",), priority="high", queue="q")
    key = rm.submit(request).key
    assert rm.find(key) == request
    assert rm.find(key).params == request.params


def test_the_queue_is_first_in_first_out_within_a_priority(rm: Any) -> None:
    line = [("/1", "default"), ("/2", "low"), ("/3", "high"), ("/4", "default"), ("/5", "high")]
    for uri, priority in line:
        rm.submit(BatchRequest(uri, priority=priority))
    expected = ["/3", "/5", "/1", "/4", "/2"]
    assert [status.uri for status in rm.queue()] == expected
    assert [take(rm).request.uri for _ in line] == expected
    assert rm.queue() == []


# -- results


def test_result_says_why_there_is_none(rm: Any) -> None:
    key = BatchRequest(URI).key
    with pytest.raises(RequestUnknown, match="submit it"):
        rm.result(key)
    rm.submit(URI)
    with pytest.raises(ResultNotReady) as pending:
        rm.result(key)
    assert (pending.value.state, isinstance(pending.value, WaitTimeout)) == ("pending", False)
    with pytest.raises(WaitTimeout, match=r"pending after 0\.02 s") as late:
        rm.result(key, timeout=0.02)
    assert (late.value.key, late.value.state, late.value.timeout) == (key, "pending", 0.02)
    assert isinstance(late.value, TimeoutError)
    lease = take(rm)
    with pytest.raises(WaitTimeout, match="in_progress"):
        rm.get(URI, timeout=0.02)
    lease.fail(KeyError("country"))
    with pytest.raises(RequestFailed) as failed:
        rm.result(key)
    assert (failed.value.key, failed.value.error["type"]) == (key, "KeyError")
    assert "country" in failed.value.error["message"]
    rm.submit(URI)
    rm.cancel(key)
    with pytest.raises(RequestCancelled, match="submit it again"):
        rm.result(key)


def test_result_sleeps_until_the_value_is_there(rm: Any, threads: managers.Threads, redis_client: redis.Redis) -> None:
    key = rm.submit(URI).key
    waiting = threads.start(rm.result, key, None)
    watched(redis_client, key)
    take(rm).finish({"n": 1})
    assert waiting.result(2) == {"n": 1}


def test_get_submits_and_waits_and_later_hits(rm: Any, threads: managers.Threads, redis_client: redis.Redis) -> None:
    waiting = threads.start(rm.get, URI)
    eventually(lambda: queued(redis_client))
    take(rm).finish("value")
    assert waiting.result(managers.PATIENCE) == "value"
    assert rm.get(URI, timeout=0) == "value"


def test_get_raises_what_ended_the_request(rm: Any, threads: managers.Threads, redis_client: redis.Redis) -> None:
    key = BatchRequest(URI).key
    failing = threads.start(rm.get, URI)
    watched(redis_client, key)
    take(rm).fail("no such country")
    assert isinstance(failing.exception(2), RequestFailed)
    assert failing.exception().error == {"type": "Failed", "message": "no such country", "traceback": ""}  # type: ignore[union-attr]
    cancelled = threads.start(rm.get, URI)
    watched(redis_client, key)
    rm.cancel(key)
    assert isinstance(cancelled.exception(2), RequestCancelled)


def test_get_with_no_time_submits_all_the_same(rm: Any) -> None:
    with pytest.raises(WaitTimeout):
        rm.get(URI, timeout=0)
    assert rm.submit(URI).outcome is JOINED


def test_get_or_submit_gives_the_value_or_the_status(rm: Any) -> None:
    hit, status = rm.get_or_submit(URI)
    assert (hit, status.outcome) == (False, NEW)
    assert rm.get_or_submit(URI)[1].outcome is JOINED
    take(rm).finish(None)
    assert rm.get_or_submit(URI) == (True, None)


VALUES: list[Any] = [
    None, True, False, 0, -1, 1 << 63, 1 << 100, -(1 << 100), 1.5, float("inf"), "", "naïve ☃", b"", b"\x00\xff", [],
    {}, [1, [2, [3]]], {"a": 1, 2: "b", (3, 4): "c", None: 0}, (1, (2,)), {1, 2}, frozenset({"x"}), Decimal("1.10"),
    datetime(2024, 2, 29, 12, 30, 15, 123456), datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=-5))),
    date(2024, 2, 29), time(23, 59, 59, 999999), timedelta(days=-1, microseconds=1),
    uuid.UUID(int=7), 1 + 2j, Result(b"a,b\n", "text/csv", "report.csv"), "long " * 30_000, list(range(50_000)),
]  # fmt: skip


def test_values_come_back_as_they_were(rm: Any) -> None:
    for n, value in enumerate(VALUES):
        key = answer(rm, f"/finished/{n}", value)
        rm.cache.put(f"/put/{n}", value)
        for found in (rm.result(key), rm.cache.get(key), rm.get(f"/put/{n}"), rm.get_or_submit(f"/put/{n}")[1]):
            assert found == value
            assert type(found) is type(value)


def test_streams_are_stored_as_bytes(rm: Any) -> None:
    assert rm.result(answer(rm, "/iterator", iter([b"a", b"b"] * 3))) == b"ababab"
    assert rm.result(answer(rm, "/file", io.BytesIO(LARGE))) == LARGE
    found = rm.result(answer(rm, "/result", Result(iter([LARGE, b"end"]), "image/png", "map.png")))
    assert (found.data, found.content_type, found.filename) == (LARGE + b"end", "image/png", "map.png")


# -- waiting


def test_wait_gives_the_statuses_in_the_order_of_the_keys(
    rm: Any, threads: managers.Threads, redis_client: redis.Redis
) -> None:
    keys = [status.key for status in rm.submit_many(["/a", "/b", "/c"])]
    waiting = threads.start(rm.wait, [keys[2], keys[0], keys[1], keys[0]])
    watched(redis_client, *keys)
    take(rm).finish(1)
    take(rm).fail("no")
    rm.cancel(keys[2])
    statuses = waiting.result(2)
    assert [status.key for status in statuses] == [keys[2], keys[0], keys[1], keys[0]]
    assert [status.state for status in statuses[:3]] == [State.CANCELLED, State.COMPLETED, State.FAILED]


def test_wait_takes_one_key_none_and_the_unknown(rm: Any) -> None:
    key = answer(rm, URI)
    assert [status.state for status in rm.wait(key)] == [State.COMPLETED]
    assert rm.wait([]) == []
    assert [status.state for status in rm.wait(["nobody", key])] == [State.UNKNOWN, State.COMPLETED]


def test_wait_ends_with_its_time_and_says_how_things_stand(rm: Any) -> None:
    done, pending = answer(rm, "/done"), rm.submit("/pending").key
    for timeout in (0, 0.02):
        assert [status.state for status in rm.wait([pending, done], timeout)] == [State.PENDING, State.COMPLETED]


def test_as_completed_gives_each_as_it_ends(rm: Any, redis_client: redis.Redis) -> None:
    keys = [status.key for status in rm.submit_many(["/a", "/b", "/c"])]
    leases = {lease.key: lease for lease in (take(rm), take(rm), take(rm))}
    ended = rm.as_completed(keys, managers.PATIENCE)
    for key in reversed(keys):
        leases[key].finish(1)
        status = next(ended)
        assert (status.key, status.state) == (key, State.COMPLETED)
    assert list(ended) == []
    eventually(lambda: redis_client.pubsub_channels("arm:done:?*") == [], what="nothing is watched any more")


def test_as_completed_raises_when_the_time_is_over(rm: Any) -> None:
    done, pending = answer(rm, "/done"), rm.submit("/pending").key
    ended = rm.as_completed([pending, done], 0.02)
    assert next(ended).key == done
    with pytest.raises(WaitTimeout) as late:
        next(ended)
    assert late.value.key == pending
    assert list(rm.as_completed([])) == []


def test_as_completed_can_be_left_early(rm: Any, redis_client: redis.Redis) -> None:
    done, pending = answer(rm, "/done"), rm.submit("/pending").key
    ended = rm.as_completed([done, pending])
    assert next(ended).key == done
    assert redis_client.pubsub_numsub(f"arm:done:{pending}")[0][1] == 1
    ended.close()
    eventually(lambda: redis_client.pubsub_channels("arm:done:?*") == [], what="nothing is watched any more")


# -- ends


def test_cancel_wakes_everybody_who_waits(rm: Any, threads: managers.Threads, redis_client: redis.Redis) -> None:
    key = rm.submit(URI).key
    waiting = [threads.start(rm.result, key, None) for _ in range(3)]
    watched(redis_client, key)
    assert rm.cancel(key) is True
    for future in waiting:
        assert isinstance(future.exception(2), RequestCancelled)
    assert rm.cancel(key) is False


def test_cancel_ends_a_running_attempt(rm: Any) -> None:
    key = rm.submit(URI).key
    lease = take(rm)
    assert rm.cancel(key) is True
    for end in (lease.renew, lambda: lease.finish(1), lambda: lease.fail("x"), lambda: lease.retry("x"), lease.release):
        with pytest.raises(LeaseLost, match="cancelled") as lost:
            end()
        assert (lost.value.key, lost.value.state) == (key, "cancelled")
    assert rm.status(key).state is State.CANCELLED


def test_cancel_of_the_unknown_and_of_the_ended(rm: Any) -> None:
    with pytest.raises(RequestUnknown):
        rm.cancel("nobody")
    assert rm.cancel(answer(rm, URI)) is False
    assert rm.get(URI) == 1


def test_a_cancelled_request_is_not_taken(rm: Any) -> None:
    rm.cancel(rm.submit(URI).key)
    rm.submit("/next")
    assert take(rm).request.uri == "/next"


def test_forget_drops_what_has_ended(rm: Any, redis_client: redis.Redis) -> None:
    key = answer(rm, URI, LARGE)
    assert rm.forget(key) is True
    assert rm.forget(key) is False
    assert rm.status(key).state is State.UNKNOWN
    assert not [name for name in redis_client.scan_iter() if key.encode() in name]
    assert rm.cache.stats().bytes == 0
    assert rm.forget(fail(rm, "/failed")) is True


def test_what_is_in_flight_cannot_be_forgotten(rm: Any) -> None:
    key = rm.submit(URI).key
    with pytest.raises(ResultNotReady, match="cancel it first"):
        rm.forget(key)
    rm.cancel(key)
    assert rm.forget(key) is True


# -- explain


def test_explain_says_why_a_request_has_its_key_and_submits_nothing(rm: Any, redis_client: redis.Redis) -> None:
    request = BatchRequest("HTTP://Example.org:80/a/../b?y=2&x=1")
    told = rm.explain(request)
    assert (told.canonical, told.key) == (request.canonical, request.key)
    assert told.canonical == "http://example.org/b?x=1&y=2"
    assert told.identity == request.identity
    assert len(told.steps) > 1
    assert json.loads(json.dumps(told.to_dict()))["would"] == "new"
    assert redis_client.dbsize() == 0


def test_explain_names_the_ignored_parameters(opened: Any) -> None:
    with opened(ignore_params=("utm_*",)) as rm:
        assert rm.explain("/a?utm_source=x&b=1").canonical == "/a?b=1"
        assert rm.submit("/a?b=1&utm_source=y").key == rm.explain("/a?b=1").key


def test_explain_says_what_a_submit_would_do(opened: Any) -> None:
    with opened(**FRAGILE) as rm:
        quarantine(rm)
        assert rm.explain(URI).would is Outcome.NEGATIVE
    with opened() as rm:
        rm.submit("/joined")
        take(rm)
        answer(rm, "/hit")
        fail(rm, "/failed")
        would = {uri: rm.explain(uri).would for uri in ("/joined", "/hit", "/failed", "/unheard-of")}
        assert would == {uri: rm.submit(uri).outcome for uri in would}


# -- cache


def test_is_ready_when_the_result_can_be_read(rm: Any) -> None:
    key = rm.submit(URI).key
    assert not rm.cache.is_ready(key)
    lease = take(rm)
    assert not rm.cache.is_ready(key)
    lease.finish(1)
    assert rm.cache.is_ready(key)
    assert not rm.cache.is_ready(fail(rm, "/failed"))


def test_the_cache_says_why_there_is_no_result(rm: Any) -> None:
    pending, failed = rm.submit("/pending").key, None
    take(rm)
    failed = fail(rm, "/failed")
    for read in (rm.cache.get, rm.cache.open, rm.cache.envelope):
        with pytest.raises(RequestUnknown):
            read("nobody")
        with pytest.raises(ResultNotReady):
            read(pending)
        with pytest.raises(RequestFailed):
            read(failed)


def test_open_reads_and_seeks_in_small_and_large_results(rm: Any) -> None:
    for value in (b"0123456789", LARGE):
        with rm.cache.open(rm.cache.put(URI, value)) as file:
            assert file.seekable()
            assert file.read(4) == value[:4]
            assert file.seek(-5, io.SEEK_END) == len(value) - 5
            assert file.read() == value[-5:]
            middle = len(value) // 2
            file.seek(middle)
            assert file.read(3) == value[middle : middle + 3]
            file.seek(0)
            assert b"".join(iter(lambda file=file: file.read(700_001), b"")) == value
    with rm.cache.open(rm.cache.put("/text", "é")) as file:
        assert file.read() == "é".encode()


def test_one_connection_serves_call_after_call_and_one_that_was_closed_is_replaced(
    url: str, redis_client: redis.Redis
) -> None:
    def ids() -> set[str]:
        return {entry["id"] for entry in redis_client.client_list()}

    others = ids()
    with RequestManager(url, allow_volatile=True) as manager:
        manager.find(manager.submit("/a").key)  # a script and a plain command
        (only,) = ids() - others
        redis_client.client_kill_filter(_id=only)
        assert manager.submit("/b").outcome == "new"
        assert len(ids() - others - {only}) == 1
    eventually(lambda: ids() <= others, what="nothing stays open")


def test_open_fetches_the_pieces_that_are_read(
    opened: Any, kind: str, monkeypatch: pytest.MonkeyPatch, redis_client: redis.Redis
) -> None:
    with opened(chunk_bytes=100_000, inline_bytes=1000) as rm:
        key = rm.cache.put(URI, LARGE)
        assert rm.cache.envelope(key).chunks == len(LARGE) // 100_000
        with managers.round_trips(monkeypatch) as sent:
            file = rm.cache.open(key)
            file.seek(2_000_000)
            assert file.read(10) == LARGE[2_000_000:2_000_010]
        # the asyncio file cannot fetch while it is read: it has all pieces at once, eight in a round trip
        assert len(sent) == (2 if kind == "blocking" else 5)


def test_the_envelope_describes_the_result(rm: Any) -> None:
    envelope = rm.cache.envelope(rm.cache.put(URI, Result(LARGE, "text/csv", "report.csv")))
    assert (envelope.content_type, envelope.filename, envelope.size) == ("text/csv", "report.csv", len(LARGE))
    assert envelope.chunks == -(-len(LARGE) // (1 << 20))
    assert rm.cache.envelope(rm.cache.put("/small", [1])).kind == "value"


def test_put_answers_the_request_without_running_it(rm: Any, redis_client: redis.Redis) -> None:
    key = rm.cache.put(BatchRequest(URI, ttl=60), "put")
    assert key == BatchRequest(URI).key
    assert rm.submit(URI).outcome is HIT
    assert rm.get(URI) == "put"
    assert 0 < redis_client.pttl(f"arm:result:{key}") <= 60_000
    rm.cache.put(URI, "put again")
    assert rm.get(URI) == "put again"


def test_put_wakes_who_waits_and_fences_who_runs(rm: Any, threads: managers.Threads, redis_client: redis.Redis) -> None:
    waiting = threads.start(rm.get, URI)
    watched(redis_client, BatchRequest(URI).key)
    lease = take(rm)
    rm.cache.put(URI, "put")
    assert waiting.result(2) == "put"
    with pytest.raises(LeaseLost):
        lease.finish("late")
    assert rm.get(URI) == "put"


def test_put_makes_a_pending_a_failed_and_a_quarantined_request_complete(opened: Any) -> None:
    with opened(**FRAGILE) as rm:
        quarantine(rm)
        fail(rm, "/failed")
        rm.submit("/pending")
        for uri in (URI, "/failed", "/pending"):
            rm.cache.put(uri, uri)
            assert rm.get(uri) == uri
        assert rm.queues.next_request() is None
        assert (rm.queue(), rm.cache.stats().quarantined) == ([], 0)


def test_what_cannot_be_put_leaves_nothing_behind(opened: Any, redis_client: redis.Redis) -> None:
    with opened(max_result_bytes=1_000_000, chunk_bytes=100_000, inline_bytes=1000) as rm:
        with pytest.raises(UnpackableResult):
            rm.cache.put(URI, object())
        with pytest.raises(ResultTooLarge):
            rm.cache.put(URI, iter([LARGE[:300_000]] * 4))
    assert redis_client.dbsize() == 0


def test_list_gives_the_soonest_to_expire_first_and_the_sticky_last(rm: Any) -> None:
    for uri, ttl in (("/b", 200), ("/a", 100), ("/sticky", None), ("/c", 300)):
        rm.cache.put(BatchRequest(uri, ttl=ttl, sticky=ttl is None), uri)
    assert [status.uri for status in rm.cache.list()] == ["/a", "/b", "/c", "/sticky"]
    assert [status.uri for status in rm.cache.list(limit=2)] == ["/a", "/b"]
    assert [status.sticky for status in rm.cache.list()] == [False, False, False, True]


def test_clear_temporary_keeps_the_sticky_and_clear_keeps_none(rm: Any, redis_client: redis.Redis) -> None:
    for n in range(150):
        rm.cache.put(f"/n/{n}", n)
    rm.cache.put(BatchRequest("/sticky", sticky=True), LARGE)
    rm.submit("/pending")
    stats = rm.cache.stats()
    assert (stats.temporary, stats.sticky, stats.pending) == (150, 1, {"arm": 1})
    assert rm.cache.clear_temporary() == 150
    assert rm.cache.clear_temporary() == 0
    assert [status.uri for status in rm.cache.list()] == ["/sticky"]
    assert rm.cache.clear() == 1
    assert not [*redis_client.scan_iter("arm:result:*"), *redis_client.scan_iter("arm:chunk:*")]
    assert rm.submit("/pending").outcome is JOINED
    stats = rm.cache.stats()
    assert (stats.temporary, stats.sticky, stats.bytes) == (0, 0, 0)


def test_stats_count_outcomes_and_ends(rm: Any) -> None:
    answer(rm, "/a")
    rm.submit("/a")
    fail(rm, "/b")
    rm.submit("/c")
    rm.submit("/c")
    take(rm)
    stats = rm.cache.stats()
    assert stats.submissions == {"new": 3, "hit": 1, "joined": 1}
    assert stats.executions == {"completed": 1, "failed": 1}
    assert (stats.in_progress, stats.pending) == (1, {"arm": 0})
    assert stats.bytes > 0
    assert json.dumps(stats.to_dict())


# -- the life of a result


def lives(client: redis.Redis, key: str) -> set[int]:
    """Whole seconds that are left to the record, the result and its pieces; -1 = for ever."""
    names = [f"arm:status:{key}", f"arm:result:{key}", *client.scan_iter(f"arm:chunk:{key}:*")]
    return {-(-client.pttl(name) // 1000) for name in names}


@pytest.mark.parametrize("value", [1, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    ("options", "route", "seconds"),
    [
        ({}, {}, 500),
        ({}, {"ttl": 50}, 50),
        ({"ttl": 5000}, {"ttl": 50}, 5000),
        ({"ttl": 20}, {"ttl": 50}, 20),
        ({"ttl": 20}, {"sticky": True}, 20),
        ({"sticky": True}, {"ttl": 50}, 0),
        ({}, {"sticky": True}, 0),
    ],
)
def test_the_request_outranks_the_route_and_the_route_the_manager(
    opened: Any, redis_client: redis.Redis, options: Any, route: Any, seconds: int, value: Any
) -> None:
    with opened(ttl=500) as rm:
        key = answer(rm, BatchRequest(URI, **options), value, **route)
        assert lives(redis_client, key) == {seconds or 0}
        assert rm.status(key).sticky is (seconds == 0)


def test_the_longest_wish_of_all_who_joined_counts(rm: Any, redis_client: redis.Redis) -> None:
    rm.submit(BatchRequest(URI, ttl=100))
    rm.submit(BatchRequest(URI, ttl=300))
    rm.submit(BatchRequest(URI, ttl=200))
    key = take(rm).key
    rm.submit(BatchRequest("/sticky", sticky=False))
    rm.submit(BatchRequest("/sticky", sticky=True))
    rm.submit(BatchRequest("/sticky", ttl=5))
    other = take(rm)
    assert redis_client.pttl(f"arm:status:{key}") == -1
    other.finish(1)
    assert lives(redis_client, other.key) == {0}


def test_a_hit_lengthens_the_life_of_a_result_and_never_shortens_it(rm: Any, redis_client: redis.Redis) -> None:
    key = answer(rm, BatchRequest(URI, ttl=100), LARGE)
    assert rm.submit(BatchRequest(URI, ttl=50)).outcome is HIT
    assert lives(redis_client, key) == {100}
    rm.submit(BatchRequest(URI, ttl=1000))
    assert lives(redis_client, key) == {1000}
    rm.submit(BatchRequest(URI, sticky=True))
    assert lives(redis_client, key) == {0}
    rm.submit(BatchRequest(URI, ttl=10))
    assert lives(redis_client, key) == {0}
    assert rm.status(key).sticky


def test_a_result_that_expired_is_run_again(rm: Any) -> None:
    key = answer(rm, BatchRequest(URI, ttl=0.02))
    eventually(lambda: rm.status(key).state is State.UNKNOWN)
    assert rm.submit(URI).outcome is NEW


def test_a_failure_can_be_inspected_for_its_ttl(opened: Any, redis_client: redis.Redis) -> None:
    with opened(failure_ttl=70, negative_ttl=30) as rm:
        key = fail(rm, URI)
        assert rm.submit(URI).outcome is Outcome.NEGATIVE
        assert 0 < redis_client.pttl(f"arm:status:{key}") <= 70_000
        key = fail(rm, "/longer", negative_ttl=100)
        assert 70_000 < redis_client.pttl(f"arm:status:{key}") <= 100_000


# -- the pull interface


def test_an_empty_queue_gives_none(rm: Any) -> None:
    assert rm.queues.next_request() is None
    assert rm.queues.next_request(0.02) is None
    assert rm.queues.next_request(timeout=0, queue="other") is None


def test_a_taker_is_woken_by_a_submit(rm: Any, threads: managers.Threads, redis_client: redis.Redis) -> None:
    for uri in ("/a", "/b"):
        taking = threads.start(rm.queues.next_request, None)
        blocked(redis_client)
        rm.submit(uri)
        assert taking.result(2).request.uri == uri


def test_a_taker_of_one_queue_is_not_given_the_work_of_another(rm: Any) -> None:
    rm.submit(BatchRequest(URI, queue="other"))
    assert rm.queues.next_request() is None
    assert take(rm, "other").request.uri == URI


def test_a_lease_knows_its_request(rm: Any) -> None:
    request = BatchRequest("/a", {"x": "1"}, tags=("t",))
    rm.submit(request)
    lease = take(rm)
    assert (lease.request, lease.key, lease.kwargs, lease.attempt) == (request, request.key, {}, 1)
    rm.submit("/b")
    assert take(rm).token > lease.token


def test_renew_keeps_the_lease_and_notes_the_progress(opened: Any, redis_client: redis.Redis) -> None:
    with opened(lease=30) as rm:
        key = rm.submit(URI).key
        lease = take(rm)
        redis_client.hset(f"arm:status:{key}", "lease_until", 1)
        lease.renew(0.25, "reading")
        assert rm.status(key).progress == 0.25
        lease.renew()
        assert rm.status(key).progress == 0.25
        assert rm.queues.sweep() == 0
        lease.finish(1)
        assert rm.status(key).progress is None


def test_an_end_that_is_said_twice_is_said_once(rm: Any) -> None:
    rm.submit("/a")
    lease = take(rm)
    lease.finish(1)
    lease.finish(2)
    assert rm.get("/a") == 1
    rm.submit("/b")
    lease = take(rm)
    lease.fail("one")
    lease.fail("two")
    assert rm.status(lease.key).error["message"] == "one"
    with pytest.raises(LeaseLost):
        lease.finish(1)


def test_what_cannot_be_stored_leaves_the_lease_as_it_is(opened: Any, redis_client: redis.Redis) -> None:
    def broken() -> Iterator[bytes]:
        yield LARGE
        raise OSError("the disk is gone")

    with opened(max_result_bytes=4_000_000) as rm:
        rm.submit(URI)
        lease = take(rm)
        for value, error in ((object(), UnpackableResult), (LARGE * 2, ResultTooLarge), (broken(), OSError)):
            with pytest.raises(error):
                lease.finish(value)
            assert not list(redis_client.scan_iter("arm:chunk:*"))
        lease.finish("small")
        assert rm.get(URI) == "small"


def test_a_retry_runs_again_with_changed_arguments(rm: Any) -> None:
    key = rm.submit(URI).key
    take(rm).retry(OSError("busy"), page=2)
    status = rm.status(key)
    assert (status.state, status.error["type"], status.attempts) == (State.PENDING, "OSError", 1)
    lease = take(rm)
    assert (lease.kwargs, lease.attempt) == ({"page": 2}, 2)
    lease.retry("again")
    assert take(rm).kwargs == {"page": 2}
    with pytest.raises(UnpackableResult):
        lease.retry("x", page=object())


def test_a_retry_with_a_delay_is_not_delivered_yet(rm: Any, redis_client: redis.Redis) -> None:
    key = rm.submit(URI).key
    take(rm).retry("busy", delay=60)
    assert rm.queues.next_request() is None
    assert rm.submit(URI).outcome is JOINED
    assert redis_client.zcard("rq:scheduled:arm") == 1
    assert rm.queues.sweep() == 0
    assert rm.status(key).state is State.PENDING


def test_what_is_released_is_next_and_does_not_count(rm: Any) -> None:
    rm.submit_many(["/a", "/b"])
    take(rm).release()
    assert rm.full_status(BatchRequest("/a").key).position == 1
    lease = take(rm)
    assert (lease.request.uri, lease.attempt) == ("/a", 1)


def test_a_block_that_raises_fails_the_request_and_one_that_falls_out_releases_it(rm: Any) -> None:
    key = rm.submit(URI).key
    with take(rm):
        pass
    assert rm.status(key).state is State.PENDING
    with suppress(KeyboardInterrupt), take(rm):
        raise KeyboardInterrupt
    assert rm.status(key).state is State.PENDING
    with pytest.raises(ZeroDivisionError), take(rm):
        print(1 / 0)
    status = rm.status(key)
    assert (status.state, status.error["type"]) == (State.FAILED, "ZeroDivisionError")
    rm.submit(URI)
    with take(rm) as lease:
        lease.finish("done")
    assert rm.get(URI) == "done"


def test_the_sweep_requeues_what_fell_silent_and_fences_who_wakes_late(opened: Any) -> None:
    with opened(lease=0.001) as rm:
        key = rm.submit(URI).key
        lease = take(rm)
        eventually(lambda: rm.queues.sweep() == 1)
        assert rm.status(key).state is State.PENDING
        with pytest.raises(LeaseLost, match="pending"):
            lease.finish(1)
        assert rm.queues.sweep("other") == 0


def test_the_sweep_gives_a_lost_ticket_again(opened: Any, redis_client: redis.Redis) -> None:
    with opened(lease=0.001) as rm:
        rm.submit(URI)
        redis_client.delete("rq:queue:arm")
        eventually(lambda: rm.queues.sweep() == 1)
        assert take(rm).request.uri == URI


# -- events


def test_events_tell_every_transition_in_order(rm: Any) -> None:
    key = answer(rm, URI)
    rm.forget(key)
    other = rm.submit("/other").key
    rm.cancel(other)
    seen = list(rm.events(since="0", timeout=0.02))
    assert [(event.verb, event.key, event.state) for event in seen] == [
        ("submit", key, "pending"),
        ("start", key, "in_progress"),
        ("complete", key, "completed"),
        ("forget", key, "unknown"),
        ("submit", other, "pending"),
        ("cancel", other, "cancelled"),
    ]
    assert [event.verb for event in rm.events(since=seen[2].id, timeout=0.02)] == ["forget", "submit", "cancel"]
    assert list(rm.events(timeout=0.02)) == []
    assert list(rm.events(since="0", timeout=0)) == seen


def test_events_come_as_they_happen(rm: Any, threads: managers.Threads, redis_client: redis.Redis) -> None:
    rm.submit("/before")
    events = rm.events()
    following = threads.start(next, events)
    blocked(redis_client)
    rm.submit("/after")
    assert following.result(2).key == BatchRequest("/after").key
    events.close()


# -- managers


def test_a_setting_that_does_not_exist_is_refused(url: str) -> None:
    for kind in (RequestManager, AsyncRequestManager):
        with pytest.raises(ConfigError, match="colour"):
            kind(url, colour="red")


def test_the_url_comes_from_the_environment(
    kind: str, url: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RQARM_URL", url)
    with managers.opened(kind) as rm:
        assert rm.submit(URI).outcome is NEW
        assert rm.settings.url == url
    assert redis_client.exists("arm:status:" + BatchRequest(URI).key)


def test_from_url_takes_settings(url: str, redis_client: redis.Redis) -> None:
    with RequestManager.from_url(url, namespace="mine", queue="slow", allow_volatile=True) as rm:
        assert rm.submit(URI).queue == "slow"
        assert rm.connection.exists("mine:status:" + BatchRequest(URI).key)
    assert isinstance(AsyncRequestManager.from_url(url), AsyncRequestManager)


def test_namespaces_do_not_see_each_other(opened: Any) -> None:
    with opened(namespace="one", queue="one") as one, opened(namespace="two", queue="two") as two:
        one.submit(URI)
        assert two.status(BatchRequest(URI).key).state is State.UNKNOWN
        assert two.queues.next_request() is None


def test_closing_gives_all_connections_back(opened: Any, redis_client: redis.Redis) -> None:
    before = connections(redis_client)
    with opened() as rm:
        rm.wait(rm.submit(URI).key, 0.01)
        rm.queues.next_request(0.01, queue="other")
        assert connections(redis_client) - before
    eventually(lambda: connections(redis_client) <= before)


def test_a_given_client_is_left_open(kind: str, url: str, redis_client: redis.Redis) -> None:
    before = connections(redis_client)
    with managers.opened(kind, connection=lambda module: module.Redis.from_url(url)) as rm:
        key = rm.submit(URI).key
        rm.wait(key, 0.01)
        opened = connections(redis_client) - before
        rm.close()
        eventually(lambda: len(opened - connections(redis_client)) == 1, what="only what the manager opened is closed")
        assert len(opened) == 2
        assert rm.wait(key, 0.01)[0].state is State.PENDING


def test_a_closed_manager_opens_again_when_it_is_asked(rm: Any, redis_client: redis.Redis) -> None:
    before = connections(redis_client)
    key = rm.submit(URI).key
    for _ in range(2):
        assert rm.wait(key, 0.01)[0].state is State.PENDING
        assert connections(redis_client) - before
        rm.close()
        rm.close()
        eventually(lambda: connections(redis_client) <= before)


@pytest.mark.parametrize("protocol", [2, 3])
def test_both_protocols_do(kind: str, url: str, redis_client: redis.Redis, protocol: int) -> None:
    with managers.opened(kind, connection=lambda module: module.Redis.from_url(url, protocol=protocol)) as rm:
        rm.submit(URI)
        with managers.threads() as threads:
            waiting = threads.start(rm.get, URI)
            watched(redis_client, BatchRequest(URI).key)
            take(rm).finish([1])
            assert waiting.result(2) == [1]
        assert len(list(rm.events(since="0", timeout=0.02))) == 3
        assert rm.cache.stats().executions == {"completed": 1}


def test_a_client_that_decodes_is_refused_with_the_reason(kind: str, url: str) -> None:
    with (
        pytest.raises(ConfigError, match="decode_responses"),
        managers.opened(kind, connection=lambda module: module.Redis.from_url(url, decode_responses=True)),
    ):
        pass


# -- round trips


def test_every_outcome_of_a_submit_is_one_round_trip(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(max_pending=1) as rm:
        answer(rm, "/hit", [1])
        fail(rm, "/negative", negative_ttl=60)
        answer(rm, "/upgrade")
        cases = [
            ("/new", NEW),
            ("/new", JOINED),
            (BatchRequest("/new", priority="high"), JOINED),
            ("/other", Outcome.REFUSED),
            ("/hit", HIT),
            (BatchRequest("/upgrade", sticky=True), HIT),
            ("/negative", Outcome.NEGATIVE),
        ]
        for request, outcome in cases:
            with managers.round_trips(monkeypatch) as sent:
                assert rm.submit(request, payload={"n": 1}).outcome is outcome
            assert len(sent) == 1, outcome


def test_a_thousand_submits_are_one_round_trip(rm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rm.submit("/warm-up")
    with managers.round_trips(monkeypatch) as sent:
        rm.submit_many(f"/n/{n}" for n in range(1000))
    assert len(sent) == 1


def test_a_hit_is_one_round_trip(rm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    key = answer(rm, URI, {"rows": [1]})
    for ask in (lambda: rm.get(URI), lambda: rm.get_or_submit(URI)[1], lambda: rm.cache.get(key)):
        with managers.round_trips(monkeypatch) as sent:
            assert ask() == {"rows": [1]}
        assert len(sent) == 1
