"""Quarantine, retries and negative answers: through both managers, and run by RQ's own worker in this process."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import managers
import pytest
import redis
import rq
from audit import audit
from bench import Bench
from redis.exceptions import OutOfMemoryError
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer
from workers import rq_cli

from rqarm import (
    BatchRequest,
    ConfigError,
    CorruptResult,
    InvalidRequest,
    Outcome,
    Quarantined,
    Reason,
    RequestFailed,
    RequestManager,
    Retry,
    State,
    UnpackableResult,
    packing,
)
from rqarm.model import BLOCKING
from rqarm.replies import QuarantineEntry
from rqarm.routes import Route

URI = "/slow"


@pytest.fixture
def rm(kind: str, url: str, redis_client: redis.Redis) -> Iterator[Any]:
    with managers.opened(kind, url) as manager:
        yield manager
    audit(redis_client, RequestManager(url).core.keys)


def take(rm: Any) -> Any:
    lease = rm.queues.next_request()
    assert lease is not None
    return lease


def aside(rm: Any, uri: str = URI, error: Exception | None = None, payload: Any = None, **info: Any) -> str:
    key: str = rm.submit(uri, payload=payload).key
    take(rm).fail(error or ValueError("no"), quarantine=True, **info)
    return key


def keys_of(entries: Any) -> list[str]:
    return [entry.key for entry in entries]


# -- entries


def test_an_entry_has_all_that_is_known(rm: Any) -> None:
    request = BatchRequest("/slow?token=t", operation="export", queue="bulk", priority="low")
    key = rm.submit(request, payload="a").key
    rm.submit(request, payload={"b": 1})
    lease = rm.queues.next_request(queue="bulk")
    lease.retry("once more", page=2)
    lease = rm.queues.next_request(queue="bulk")
    try:
        raise TimeoutError("too late") from OSError("the cause")
    except TimeoutError as error:
        lease.fail(error, quarantine=True, status_code=504)
    entry = rm.quarantine.get(key)
    assert isinstance(entry, QuarantineEntry)
    assert (entry.key, entry.reason, entry.uri, entry.operation) == (key, Reason.ASKED, "/slow?token=t", "export")
    assert entry.request.uri == "/slow?token=t"
    assert (entry.exception, entry.message) == ("TimeoutError", "too late")
    assert "the cause" in entry.traceback
    assert (entry.attempts, entry.retries, entry.crashes) == (2, 1, 0)
    assert (entry.kwargs, entry.info) == ({"page": 2}, {"status_code": 504})
    assert sorted(map(str, entry.payloads)) == ["a", "{'b': 1}"]
    assert (entry.queue, entry.priority.name, entry.payloads is None) == ("bulk", "LOW", False)
    assert entry.submitted <= entry.started <= entry.when
    assert entry.to_dict()["when"] == entry.when.isoformat()
    status = rm.status(key)
    assert (status.quarantined, status.reason, status.is_blocked) == (True, "asked", True)
    assert status.to_dict()["reason"] == "asked"


def test_what_is_not_set_aside_is_no_entry(rm: Any) -> None:
    key = rm.submit(URI).key
    assert rm.quarantine.get(key) is None
    take(rm).fail("plainly")
    assert rm.quarantine.get(key) is None
    assert rm.quarantine.get("unknown") is None
    assert list(rm.quarantine.list()) == []


def test_the_list_is_newest_first_and_chosen_by_route_error_reason_and_limit(
    rm: Any, redis_client: redis.Redis
) -> None:
    keys = [aside(rm, f"/page/{n}", TimeoutError("late") if n % 2 else LookupError("none")) for n in range(5)]
    for n, key in enumerate(keys):
        redis_client.zadd("arm:quarantine", {key: 1_000 + n})
    named = aside(rm, "/other", CorruptResult("bad"))
    redis_client.zadd("arm:quarantine", {named: 2_000})
    newest = [named, *keys[::-1]]
    listed = rm.quarantine.list
    assert keys_of(listed()) == newest
    assert keys_of(listed(limit=2)) == newest[:2]
    assert keys_of(listed(exception="TimeoutError")) == [keys[3], keys[1]]
    assert keys_of(listed(exception=TimeoutError, limit=1)) == [keys[3]]
    assert keys_of(listed(exception="CorruptResult")) == keys_of(listed(exception="rqarm.errors.CorruptResult"))
    assert keys_of(listed(exception=CorruptResult)) == [named]
    assert keys_of(listed(route="/page/{n:int}")) == newest[1:], "a lease knows no routes; the template tells"
    assert keys_of(listed(route="/page/{n:int}", exception="LookupError")) == [keys[4], keys[2], keys[0]]
    assert keys_of(listed(reason="asked")) == newest
    assert keys_of(listed(reason="poison")) == keys_of(listed(route="no such")) == []
    assert rm.quarantine.count() == 6


def test_a_list_is_read_a_hundred_in_a_round_trip(rm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(120):
        aside(rm, f"/page/{n}")
    with managers.round_trips(monkeypatch) as sent:
        assert len(list(rm.quarantine.list())) == 120
    assert len(sent) == 3


def test_a_page_is_two_round_trips_and_its_cursor_leads_to_the_next(
    rm: Any, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (rm.quarantine.page().entries, rm.quarantine.page().cursor) == ((), "")
    keys = [aside(rm, f"/page/{n}") for n in range(5)]
    for n, key in enumerate(keys):
        redis_client.zadd("arm:quarantine", {key: 1_000 + n})
    with managers.round_trips(monkeypatch) as sent:
        first = rm.quarantine.page(limit=2)
    assert len(sent) == 2
    assert (keys_of(first.entries), first.looked_at, first.total) == ([keys[4], keys[3]], 2, 5)
    rm.quarantine.discard(keys[3])
    second = rm.quarantine.page(cursor=first.cursor, limit=2)
    assert keys_of(second.entries) == [keys[2], keys[1]], "what goes meanwhile leaves nothing out"
    last = rm.quarantine.page(cursor=second.cursor, limit=2)
    assert (keys_of(last.entries), last.cursor) == ([keys[0]], "")
    with pytest.raises(InvalidRequest, match="limit"):
        rm.quarantine.page(limit=501)


def test_a_list_is_not_upset_by_what_moves_meanwhile(rm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqarm.quarantine.PAGE", 2)
    keys = {aside(rm, f"/page/{n}") for n in range(7)}
    seen = []
    for entry in rm.quarantine.list():
        seen.append(entry.key)
        assert rm.quarantine.requeue(entry.key) == {entry.key: "requeued"}
        if len(seen) < 4:
            rm.submit(f"/more/{len(seen)}")
            aside_now = next(lease for lease in iter(lambda: take(rm), None) if "/more/" in lease.request.uri)
            aside_now.fail("x", quarantine=True)
    assert set(seen) == keys
    assert len(seen) == 7


# -- requeue and discard


def test_a_requeued_request_runs_again_with_its_payloads_and_arguments(rm: Any, redis_client: redis.Redis) -> None:
    key = rm.submit(URI, payload="p").key
    take(rm).retry("once more", page=2)
    take(rm).fail("broken", quarantine=True, seen=True)
    ahead = rm.submit("/ahead").key
    assert rm.quarantine.requeue(key) == {key: "requeued"}
    status = rm.full_status(key)
    assert (status.state, status.position, status.error, status.quarantined) == (State.PENDING, 2, None, False)
    assert rm.submit(URI, payload="q").outcome == Outcome.JOINED
    assert redis_client.hlen(f"arm:callbacks:{key}") == 2
    assert redis_client.ttl(f"arm:callbacks:{key}") == -1
    assert take(rm).key == ahead
    lease = take(rm)
    assert (lease.key, lease.kwargs, lease.attempt) == (key, {"page": 2}, 3)
    lease.finish("value")
    assert rm.result(key) == "value"
    assert redis_client.hget(f"arm:status:{key}", "note") is None
    assert rm.quarantine.count() == 0


def test_who_waits_after_a_requeue_gets_the_result(rm: Any, redis_client: redis.Redis) -> None:
    key = aside(rm)
    rm.quarantine.requeue(key)
    with managers.threads() as threads:
        waiting = threads.start(rm.result, key, 20)
        managers.watched(redis_client, key)
        take(rm).finish(1)
        assert waiting.result(20) == 1


def test_discard_leaves_nothing(rm: Any, redis_client: redis.Redis) -> None:
    key = aside(rm, payload="p")
    assert rm.quarantine.discard(key) == {key: "discarded"}
    assert rm.quarantine.discard(key) == {key: "unknown"}
    assert not [name for name in redis_client.keys("*") if key.encode() in name]
    assert rm.submit(URI).outcome == Outcome.NEW


@pytest.mark.parametrize("verb", ["requeue", "discard"])
def test_what_cannot_be_moved_is_told_and_the_others_are_moved(rm: Any, verb: str) -> None:
    wanted, done = aside(rm, "/a"), "requeued" if verb == "requeue" else "discarded"
    flying = rm.submit("/flying").key
    lease = take(rm)
    waiting = rm.submit("/waiting").key
    rm.cache.put("/ready", 1)
    ready = BatchRequest("/ready").key
    move = getattr(rm.quarantine, verb)
    words = move(flying, wanted, waiting, ready, "nothing", wanted)
    assert words == {flying: "in_flight", wanted: done, waiting: "in_flight", ready: "ended", "nothing": "unknown"}
    assert list(words) == [flying, wanted, waiting, ready, "nothing"]
    lease.finish(1)
    assert rm.result(flying) == 1


def test_a_choice_moves_what_it_says_and_nothing_else(rm: Any) -> None:
    late = [aside(rm, f"/page/{n}", TimeoutError("late")) for n in range(3)]
    other = aside(rm, "/other", TimeoutError("late"))
    none = aside(rm, "/page/9", LookupError("none"))
    assert rm.quarantine.requeue(route="/page/{n:int}", exception=TimeoutError) == dict.fromkeys(late, "requeued")
    assert sorted(keys_of(rm.quarantine.list())) == sorted([other, none])
    assert rm.quarantine.discard(reason="poison") == {}
    assert rm.quarantine.discard(all=True) == dict.fromkeys([other, none], "discarded")
    assert rm.quarantine.count() == 0


@pytest.mark.parametrize("verb", ["requeue", "discard"])
@pytest.mark.parametrize(("keys", "choice"), [((), {}), (("a",), {"all": True}), (("a",), {"route": "/x"})])
def test_nothing_moves_unless_it_is_clear_what(rm: Any, verb: str, keys: Any, choice: Any) -> None:
    aside(rm)
    with pytest.raises(InvalidRequest, match="all=True"):
        getattr(rm.quarantine, verb)(*keys, **choice)
    assert rm.quarantine.count() == 1


def test_an_entry_that_changes_under_our_hands_is_looked_at_again(rm: Any, kind: str, url: str) -> None:
    """Somebody else requeues it, and it fails again, between our look and our act."""
    key = aside(rm)
    seen = rm.quarantine.get(key)
    rm.quarantine.requeue(key)
    take(rm).fail("again", quarantine=True)
    calls, jobs = rm.core.calls, rm.core.jobs
    with RequestManager(url) as other:
        stale = calls.discard(seen, jobs.dismiss(seen.job_id, seen.queue, seen.priority))
        assert other.shell.execute(stale) == "superseded"
    assert rm.quarantine.discard(key) == {key: "discarded"}


def test_memory_that_is_out_refuses_a_requeue_and_changes_nothing(rm: Any, redis_client: redis.Redis) -> None:
    key = aside(rm)
    before = managers.snapshot(redis_client)
    redis_client.config_set("maxmemory", 1)
    try:
        with pytest.raises(OutOfMemoryError):
            rm.quarantine.requeue(key)
        assert managers.snapshot(redis_client) == before
        assert rm.quarantine.discard(key) == {key: "discarded"}
    finally:
        redis_client.config_set("maxmemory", 0)


def test_a_full_quarantine_loses_its_oldest_but_no_killer(rm: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqarm.calls.QUARANTINE_KEPT", 3)
    killer = aside(rm, "/killer")
    failed = []
    for n in range(4):
        failed.append(rm.submit(f"/{n}").key)
        attempt = take(rm)._attempt
        error = packing.pack_error("E", "m", "")
        with RequestManager(url) as other:
            other.shell.execute(
                other.core.calls.fail(attempt, error, failure_ttl_ms=1, negative_ms=0, reason="exhausted")
            )
    assert set(keys_of(rm.quarantine.list())) == {killer, *failed[-2:]}
    assert rm.status(failed[0]).state is State.UNKNOWN


def test_a_failure_without_reason_is_a_plain_one(rm: Any, redis_client: redis.Redis) -> None:
    key = rm.submit(URI, payload="p").key
    take(rm).fail("plainly")
    assert rm.status(key).quarantined is False
    assert redis_client.ttl(f"arm:status:{key}") > 0


def test_info_that_cannot_be_stored_leaves_the_lease(rm: Any) -> None:
    rm.submit(URI)
    lease = take(rm)
    for wrong in object(), b"x" * (packing.MAX_ARGUMENTS_BYTES + 1):
        with pytest.raises(UnpackableResult, match="info"):
            lease.fail("no", quarantine=True, wrong=wrong)
        with pytest.raises(UnpackableResult, match="wrong"):
            lease.retry("no", wrong=wrong)
    lease.finish(1)


def test_a_payload_that_is_too_large_is_refused_and_nothing_is_sent(rm: Any, redis_client: redis.Redis) -> None:
    with pytest.raises(UnpackableResult, match="1048576"):
        rm.submit(URI, payload=b"x" * (packing.MAX_ARGUMENTS_BYTES + 1))
    assert redis_client.keys("arm:status:*") == []


def test_the_reasons_that_block_are_the_same_in_the_scripts() -> None:
    prelude = resources.files("rqarm").joinpath("lua/prelude/quarantine.lua").read_text("utf-8")
    (table,) = re.findall(r"local BLOCKING = \{(.*)\}", prelude)
    assert set(re.findall(r"(\w+)(?:'\])? = true", table)) == {"1", *BLOCKING}


def test_a_record_of_an_earlier_version_is_poison(rm: Any, redis_client: redis.Redis) -> None:
    key = aside(rm)
    redis_client.hset(f"arm:status:{key}", "quarantined", 1)
    assert (rm.status(key).reason, rm.quarantine.get(key).reason) == ("poison", "poison")
    assert rm.submit(URI).outcome == Outcome.NEGATIVE
    redis_client.hset(f"arm:status:{key}", "request", b"\xc1")
    assert rm.quarantine.get(key).request is None
    assert rm.quarantine.requeue(key) == {key: "requeued"}
    rm.cancel(key)


# -- what a submit is told


def test_explain_knows_what_a_submit_would_be_answered(kind: str, url: str, redis_client: redis.Redis) -> None:
    with managers.opened(kind, url, max_pending=1) as rm:

        def agree(uri: str, outcome: str) -> None:
            assert rm.explain(uri).would == outcome
            assert rm.submit(uri).outcome == outcome

        rm.submit("/negative")
        take(rm).fail("no", negative_ttl=60)
        aside(rm, "/blocked")
        rm.submit("/lapsed")
        take(rm)
        redis_client.hset(f"arm:status:{BatchRequest('/lapsed').key}", "lease_until", 1)
        agree("/negative", "negative")
        agree("/blocked", "negative")
        agree("/lapsed", "new")
        agree("/lapsed", "joined")
        agree("/full", "refused")
        agree("/negative", "negative")


# -- run by a worker


@pytest.fixture
def bench(bench: Bench, redis_client: redis.Redis) -> Iterator[Bench]:
    yield bench
    audit(redis_client, bench.rm.core.keys)


def ask(context: Any) -> None:
    raise context.quarantine("the archive is broken", status_code=503)


def boom(context: Any) -> None:
    raise ValueError("boom")


def unpackable(context: Any) -> Any:
    return {"rows": [object()]}


REASONS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("asked", ask, "rqarm.context.SetAside"),
    ("exhausted", boom, "ValueError"),
    ("unpackable", unpackable, "rqarm.errors.UnpackableResult"),
]


@pytest.mark.parametrize(("reason", "handler", "exception"), REASONS, ids=[each[0] for each in REASONS])
def test_what_a_handler_ends_with_is_set_aside_for_its_reason(
    bench: Bench, redis_client: redis.Redis, reason: str, handler: Callable[[Any], Any], exception: str
) -> None:
    bench.route(handler, retry=Retry(max=1))
    status = bench.run(payload="p")
    assert (status.state, status.reason) == (State.FAILED, reason)
    assert status.attempts == (2 if reason == "exhausted" else 1)
    entry = bench.rm.quarantine.get(status.key)
    assert entry is not None
    assert (entry.reason, entry.exception, entry.route) == (reason, exception, "/x")
    assert (entry.payloads, entry.retries) == (["p"], int(reason == "exhausted"))
    assert "handler" in entry.traceback or reason == "unpackable"
    if reason == "asked":
        assert (entry.message, entry.info) == ("the archive is broken", {"status_code": 503})
    assert bench.rm.connection.ttl(f"arm:status:{status.key}") == -1
    before = bench.calls
    raised = Quarantined if reason == "asked" else RequestFailed
    with pytest.raises(RequestFailed) as caught:
        bench.rm.result(status.key)
    assert type(caught.value) is raised
    assert bench.rm.submit("/x").outcome == ("negative" if reason == "asked" else "new")
    bench.work()
    assert (bench.calls > before) == (reason != "asked")
    assert bench.rm.quarantine.count() == 1


def test_the_arguments_of_the_handler_are_in_the_entry(bench: Bench) -> None:
    @bench.handlers.route("/report/{name}", name="reports")
    def report(request: Any, context: Any, name: str, page: int = 1, size: int = 10) -> None:
        if page == 1:
            raise context.retry(delay=0, page=2, extra="e")
        raise ValueError(name)

    status = bench.run("/report/a?size=5")
    (entry,) = bench.rm.quarantine.list(route="reports")
    assert entry.key == status.key
    assert entry.kwargs == {"name": "a", "size": 5, "page": 2, "extra": "e"}


@pytest.mark.parametrize("uri", ["/no/handler", "/x?n=many", "/refused"])
def test_refusals_of_the_request_are_plain_failures(bench: Bench, uri: str) -> None:
    @bench.handlers.route("/x")
    def handler(request: Any, context: Any, n: int) -> None: ...

    @bench.handlers.route("/refused")
    def refuse(request: Any, context: Any) -> None:
        raise InvalidRequest("not this one")

    status = bench.run(uri)
    assert (status.state, status.quarantined, status.reason) == (State.FAILED, False, "")
    assert bench.rm.connection.ttl(f"arm:status:{status.key}") > 0
    assert bench.rm.quarantine.count() == 0


def test_a_route_can_do_without_quarantine_but_for_what_asks_for_it(bench: Bench) -> None:
    bench.route(boom, "/boom", quarantine=False)
    bench.route(ask, "/ask", quarantine=False)
    assert bench.run("/boom").quarantined is False
    assert bench.run("/ask").reason == "asked"


@pytest.mark.parametrize("what", ["retry", "quarantine"])
@pytest.mark.parametrize(("value", "text"), [(object(), r"\['page'\]"), ("x" * (1 << 20), r"\['page'\].*1048576")])
def test_arguments_that_cannot_be_stored_end_the_request_where_they_are_given(
    bench: Bench, what: str, value: Any, text: str
) -> None:
    def handler(context: Any) -> None:
        if context.attempt == 1:
            raise context.retry(delay=0, good=1)
        raise getattr(context, what)(page=value)

    bench.route(handler, retry=Retry(max=5))
    status = bench.run(payload="p")
    assert (status.state, status.attempts, status.reason) == (State.FAILED, 2, "unpackable")
    entry = bench.rm.quarantine.get(status.key)
    assert entry is not None
    assert re.search(text, entry.message)
    assert "in handler" in entry.traceback
    assert (entry.kwargs, entry.payloads) == ({"good": 1}, ["p"])


def test_a_retry_with_the_arguments_of_the_last_attempt_counts_on(bench: Bench) -> None:
    def handler(context: Any) -> Any:
        attempt = context.kwargs.get("attempt", 1)
        if attempt < 4:
            raise context.retry(delay=0, attempt=attempt + 1)
        return attempt

    bench.route(handler)
    assert bench.rm.result(bench.run().key) == 4


# -- negative answers


class Gone(LookupError):
    pass


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(Gone("g"), "negative"), (LookupError("l"), "new"), (KeyError("k"), "new"), (OSError("o"), "negative")],
)
def test_a_failure_answers_as_long_as_its_closest_type_says(bench: Bench, error: Exception, outcome: str) -> None:
    def handler(context: Any) -> None:
        raise error

    bench.rm.close()
    bench.rm = RequestManager(bench.url, negative_ttl=60)
    bench.route(handler, negative_ttl={LookupError: 0, Gone: 60})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RQARM_NEGATIVE_TTL", "60")
        status = bench.run()
    assert bench.rm.explain("/x").would == outcome
    answered = bench.rm.submit("/x")
    assert answered.outcome == outcome
    if outcome == "negative":
        assert answered.error == status.error
        with pytest.raises(RequestFailed, match=type(error).__name__):
            bench.rm.get("/x", timeout=5)
        bench.work()
        assert bench.calls == 1


@pytest.mark.parametrize("wrong", [{ValueError: -1}, {"ValueError": 1}, {int: 1}, {ValueError: "long"}])
def test_a_mapping_that_makes_no_sense_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="negative_ttl"):
        Route(name="x", template="/x", negative_ttl=wrong)


# -- RQ's own tools


@pytest.mark.parametrize("verb", ["requeue", "discard"])
def test_a_decision_takes_the_failed_job_out_of_rq_and_needs_none(
    bench: Bench, redis_client: redis.Redis, verb: str
) -> None:
    bench.route(boom)
    key = bench.run().key
    registry = FailedJobRegistry("arm", connection=redis_client, serializer=JSONSerializer)
    (job_id,) = registry.get_job_ids()
    entry = bench.rm.quarantine.get(key)
    assert entry is not None
    assert entry.job_id == job_id
    before = {name for name in redis_client.keys("rq:*") if job_id.encode() in name}
    assert before >= {b"rq:job:" + job_id.encode()}
    assert set(getattr(bench.rm.quarantine, verb)(key).values()) == {f"{verb.rstrip('e')}ed"}
    assert registry.get_job_ids() == []
    assert not [name for name in redis_client.keys("rq:*") if job_id.encode() in name]
    if verb == "requeue":
        bench.work()
        assert bench.calls == 2
        (again,) = registry.get_job_ids()
        assert again != job_id
        rq.job.Job.fetch(again, connection=redis_client, serializer=JSONSerializer).delete()
        redis_client.delete("rq:failed:arm")
        assert getattr(bench.rm.quarantine, verb)(key) == {key: "requeued"}, "RQ's job is gone"


@pytest.mark.parametrize(("reason", "handler", "exception"), REASONS, ids=[each[0] for each in REASONS])
def test_rq_requeue_starts_what_was_set_aside_anew(
    bench: Bench, url: str, redis_client: redis.Redis, reason: str, handler: Callable[[Any], Any], exception: str
) -> None:
    bench.route(lambda context: handler(context) if context.attempt == 1 else "mended")
    status = bench.run(payload="p")
    assert status.reason == reason
    rq_cli(url, "requeue", "--all", "--queue", "arm", "-S", "json")
    assert bench.rm.quarantine.count() == 1, "until a worker has it"
    bench.work()
    assert bench.rm.result(status.key) == "mended"
    assert bench.rm.quarantine.count() == 0
    assert redis_client.zcard("rq:failed:arm") == 0
