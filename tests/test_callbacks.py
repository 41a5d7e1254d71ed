"""What comes after the end: payloads, callbacks, failure callbacks, and the consumer of the quarantine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis
from audit import audit
from bench import Bench
from drive import ERROR, Rig, Seeded, server_ms, snapshot
from servers import eventually

from rqarm import (
    BatchRequest,
    ConfigError,
    Handlers,
    InvalidRequest,
    RequestManager,
    Retry,
    State,
    UnpackableResult,
    codec,
    followups,
    packing,
)
from rqarm.calls import NextUp
from rqarm.handlers import HOOK_RETRY, FollowUpMatch, Hook
from rqarm.model import FollowUp, Outcome
from rqarm.replies import Attempt

REQUEST = BatchRequest("/slow?x=1", key="slow")
HOUR_MS = 3_600_000


# -- registering


def test_a_callback_stays_the_function_that_it_is() -> None:
    handlers = Handlers()

    @handlers.route("/x")
    def x(request: Any, context: Any) -> int:
        return 1

    @x.callback
    def ready(result: Any, payloads: Any) -> str:
        return f"{result} {payloads}"

    @x.on_failure(retry=Retry(max=9), timeout=5)
    def failed(error: Any, payloads: Any, context: Any) -> None: ...

    assert ready(1, []) == "1 []"
    assert x.hooks[FollowUp.CALLBACK].route.retry is HOOK_RETRY
    assert (x.hooks[FollowUp.FAILURE].route.retry, x.hooks[FollowUp.FAILURE].route.timeout) == (Retry(max=9), 5)
    assert [hook.takes_context for hook in x.hooks.values()] == [False, True]


def no_payloads(result: Any) -> None: ...


def one_too_many(result: Any, payloads: Any, more: Any) -> None: ...


def generator(result: Any, payloads: Any) -> Iterator[int]:
    yield 1


async def async_generator(result: Any, payloads: Any) -> Any:
    yield 1


@pytest.mark.parametrize("function", [no_payloads, one_too_many, generator, async_generator])
def test_a_function_that_could_not_be_called_is_refused_by_its_name(function: Callable[..., Any]) -> None:
    handler = Handlers().fallback(lambda request, context: 1)
    with pytest.raises(ConfigError, match=function.__qualname__):
        handler.callback(function)
    assert handler.hooks == {}


@pytest.mark.parametrize("options", [{"retry": 3}, {"timeout": 0}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    handler = Handlers().fallback(lambda request, context: 1)
    with pytest.raises(ConfigError, match="lambda"):
        handler.on_failure(**options)(lambda error, payloads: None)


def test_there_is_one_of_each() -> None:
    handlers = Handlers()
    handler = handlers.fallback(lambda request, context: 1)
    for register in (handler.callback, handler.on_failure):
        register(lambda result, payloads: None)
        with pytest.raises(ConfigError):
            register(lambda result, payloads: None)
    handlers.quarantine(lambda entry: None)
    with pytest.raises(ConfigError):
        handlers.quarantine(lambda entry: None)


def test_include_brings_callbacks_and_the_consumer_and_refuses_a_second_one() -> None:
    ours, theirs = Handlers(), Handlers()
    theirs.route("/x")(lambda request, context: 1).callback(lambda result, payloads: None)
    theirs.quarantine(lambda entry: None)
    assert not ours.follows(FollowUp.QUARANTINE)
    ours.include(theirs)
    assert ours.follows(FollowUp.QUARANTINE)
    assert ours.follows(FollowUp.CALLBACK)
    with pytest.raises(ConfigError, match="quarantine already"):
        ours.include(theirs)


def test_nobody_can_have_an_operation_of_rqarm() -> None:
    with pytest.raises(ConfigError, match="rqarm's own"):
        Handlers().operation("rqarm:callback")(lambda request, context: 1)


@pytest.mark.parametrize("operation", ["", "thumbnail", "o" * 200])
def test_a_follow_up_finds_the_function_of_the_request_that_it_is_about(
    operation: str, redis_client: redis.Redis
) -> None:
    handlers, rig = Handlers(), Rig(redis_client)
    handler = handlers.fallback(lambda request, context: 1)
    handler.callback(lambda result, payloads: None)
    request = BatchRequest("/x?a=1", {"b": ["2", "3"]}, operation=operation, priority="high", queue="other")
    attempt = replace(rig.seed("unknown", request).attempt, request=request, queue="other", priority=request.priority)
    follow_up = followups.callback(rig.core, attempt, handlers.match(request))
    assert follow_up is not None
    match = handlers.match(follow_up.request)
    assert isinstance(match, FollowUpMatch)
    assert match.handler is handler.hooks[FollowUp.CALLBACK]
    assert (match.about.canonical, match.about.operation) == (request.canonical, operation)
    assert (follow_up.request.queue, follow_up.request.priority) == ("other", request.priority)


# -- payloads


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"payload": 1, "payload_id": ""}, "payload_id"),
        ({"payload": 1, "payload_id": "i" * 201}, "payload_id"),
        ({"payload": 1, "payload_id": 7}, "payload_id"),
        ({"payload": 1, "payload_id": "\ud800"}, "payload_id"),
        ({"payload_id": "i"}, "payload_id"),
    ],
)
def test_a_bad_payload_is_refused_before_anything_is_sent(
    redis_client: redis.Redis, arguments: dict[str, Any], where: str
) -> None:
    rm = RequestManager(connection=redis_client)
    for method in (rm.submit, rm.resubmit, rm.get_or_submit):
        with pytest.raises(InvalidRequest, match=where):
            method("/x", **arguments)
        for payload in (b"x" * (1 << 20), object()):
            with pytest.raises(UnpackableResult):
                method("/x", payload=payload)
    assert redis_client.dbsize() == 0


def test_the_holder_of_a_lease_gets_the_payloads_of_all_who_joined(redis_client: redis.Redis) -> None:
    rm = RequestManager(connection=redis_client)
    rm.submit("/x", payload="first", payload_id="a")
    rm.submit("/x", payload="ignored", payload_id="a")
    rm.submit("/x", payload={"to": "b"})
    lease = rm.queues.next_request()
    assert lease is not None
    rm.submit("/x", payload="while it runs")
    assert sorted(map(str, lease.finish(1))) == ["first", "while it runs", "{'to': 'b'}"]
    assert rm.submit("/x", payload="too late").outcome is Outcome.HIT
    rm.resubmit("/x", payload="again")
    again = rm.queues.next_request()
    assert again is not None
    assert again.finish(2) == ["again"]
    audit(redis_client, rm.core.keys)


# -- the scripts


def payloads_of(rig: Rig, key: str) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = rig.client.hgetall(rig.named("callbacks", key=key))
    return found


def running(rig: Rig) -> Seeded:
    """A request that runs, with two payloads."""
    seeded = rig.seed("mine", REQUEST)
    for payload in (b"p", b"q"):
        assert rig.word(rig.submit(REQUEST, payload=payload)) == "joined"
    return seeded


def completion(rig: Rig, attempt: Attempt, value: Any = "value", **options: Any) -> Any:
    encoded = codec.encode(value, rig.settings)
    options = {"sticky": False, "ttl_ms": 0} | options
    return rig.calls.complete(attempt, encoded.envelope, encoded.inline, **options)


def test_the_end_of_a_request_makes_its_callback_in_the_same_step_and_once(rig: Rig) -> None:
    attempt = running(rig).attempt
    up = rig.follow_up(attempt)
    call = completion(rig, attempt, follow_up=up)
    assert rig.word(call) == "stored"
    assert rig.state(up.request.key) is State.PENDING
    assert rig.line() == [up.request.key]
    assert rig.waiting()[1] == [up.ticket.job_id]
    assert payloads_of(rig, up.request.key) == {b"p": b"p", b"q": b"q"}
    assert payloads_of(rig, attempt.key) == {}
    audit(rig.client, rig.keys)
    before = snapshot(rig.client)
    assert rig.word(call) == "already"
    assert snapshot(rig.client) == before


def test_a_loser_makes_no_callback(rig: Rig) -> None:
    seeded = rig.seed("other", REQUEST)
    refusals = rig.named("stats", family="refusals")
    before = snapshot(rig.client)
    assert rig.word(completion(rig, seeded.attempt, follow_up=rig.follow_up(seeded.attempt))) == "lost"
    assert rig.word(rig.calls.fail(seeded.attempt, ERROR, failure_ttl_ms=1, negative_ms=0,
                                   follow_ups=[rig.follow_up(seeded.attempt)])) == "lost"  # fmt: skip
    rig.client.delete(refusals)  # they are counted, and that is all
    assert snapshot(rig.client) == before


def test_a_follow_up_counts_neither_as_a_submission_nor_as_a_result(rig: Rig) -> None:
    attempt = rig.seed("mine", REQUEST).attempt
    rig.reply(completion(rig, attempt, follow_up=rig.follow_up(attempt)))
    taken = rig.ask(rig.take())
    assert isinstance(taken, Attempt)
    assert rig.word(rig.calls.conclude(taken)) == "concluded"
    stats = rig.ask(rig.calls.stats())
    assert stats.submissions == {"new": 1}
    assert stats.executions == {"completed": 1, "concluded": 1}
    assert stats.temporary == 1
    names = {name for name in snapshot(rig.client) if "cb-" in name and not name.startswith("rq:")}
    assert names == set(), "nothing of it is kept"


@pytest.mark.parametrize("end", ["forget", "clear", "resubmit", "evict"])
def test_what_becomes_of_the_result_does_not_change_what_its_callback_gets(rig: Rig, end: str) -> None:
    attempt = running(rig).attempt
    up = rig.follow_up(attempt)
    rig.reply(completion(rig, attempt, {"rows": [1]}, follow_up=up))
    match end:
        case "forget":
            assert rig.word(rig.calls.forget(attempt.key)) == "forgotten"
        case "clear":
            assert rig.word(rig.calls.clear(temporary_only=False)) == "cleared"
        case "resubmit":
            assert rig.word(rig.submit(REQUEST, payload=b"new", again=True)) == "new"
        case "evict":
            rig.evict(attempt.key)
    about = rig.ask(rig.calls.about(up.request.key))
    assert (about.of, about.stored.value()) == (attempt.key, {"rows": [1]})
    assert set(payloads_of(rig, up.request.key)) == {b"p", b"q"}
    assert rig.client.pttl(rig.named("followup", key=up.request.key)) == -1


def large(rig: Rig, attempt: Attempt, **options: Any) -> tuple[NextUp, bytes]:
    """Complete with a result in pieces."""
    value = os.urandom(2_500)
    encoded = codec.encode(value, rig.settings)
    for n, piece in encoded.chunks():
        rig.ask(rig.calls.stage(attempt.key, str(attempt.token), n, piece))
    up = rig.follow_up(attempt)
    options = {"sticky": False, "ttl_ms": 1_000} | options
    assert rig.word(rig.calls.complete(attempt, encoded.envelope, None, follow_up=up, **options)) == "stored"
    return up, value


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_the_pieces_of_a_large_result_live_until_its_callback_has_run(
    redis_client: redis.Redis, is_forgotten: bool
) -> None:
    rig = Rig(redis_client, inline_bytes=10, chunk_bytes=1_000)
    attempt = rig.begin(REQUEST)
    up, value = large(rig, attempt)
    chunks = [rig.keys.chunk(attempt.key, str(attempt.token), n) for n in range(3)]
    assert all(rig.client.pttl(chunk) > 80_000_000 for chunk in chunks)
    audit(rig.client, rig.keys)
    result = rig.named("result", key=attempt.key)
    assert 0 < rig.client.pttl(result) <= 1_000
    follow_up = rig.ask(rig.take())
    match = FollowUpMatch(Hook(FollowUp.CALLBACK, lambda result, payloads: None, fallback().route))
    assert rig.run(followups.prepare(rig.core, follow_up, match)).arguments == (value, [])
    if is_forgotten:
        eventually(lambda: not rig.client.exists(result), 5, "the result expires")
    expires = rig.client.pexpiretime(result)
    assert rig.word(rig.calls.conclude(follow_up)) == "concluded"
    if is_forgotten:
        assert rig.client.exists(*chunks) == 0
    else:
        assert {rig.client.pexpiretime(chunk) for chunk in chunks} <= {expires, -2}
    assert rig.state(up.request.key) is State.UNKNOWN


def test_a_callback_whose_large_result_is_gone_says_so(redis_client: redis.Redis) -> None:
    rig = Rig(redis_client, inline_bytes=10, chunk_bytes=1_000)
    attempt = rig.begin(REQUEST)
    large(rig, attempt, sticky=True)
    assert rig.word(rig.calls.forget(attempt.key)) == "forgotten"
    follow_up = rig.ask(rig.take())
    match = FollowUpMatch(Hook(FollowUp.CALLBACK, lambda result, payloads: None, fallback().route))
    with pytest.raises(followups.FollowUpLost, match="the result of 'slow' is gone"):
        rig.run(followups.prepare(rig.core, follow_up, match))


def fallback() -> Any:
    return Handlers().fallback(lambda request, context: 1)


def test_a_failure_makes_its_callback_with_error_and_payloads(rig: Rig) -> None:
    attempt = running(rig).attempt
    up = rig.follow_up(attempt, FollowUp.FAILURE)
    call = rig.calls.fail(attempt, ERROR, failure_ttl_ms=HOUR_MS, negative_ms=0, follow_ups=[up])
    assert rig.word(call) == "failed"
    about = rig.ask(rig.calls.about(up.request.key))
    assert (about.of, about.error, about.stored) == (attempt.key, ERROR, None)
    assert set(payloads_of(rig, up.request.key)) == {b"p", b"q"}
    assert payloads_of(rig, attempt.key) == {}
    audit(rig.client, rig.keys)
    before = snapshot(rig.client)
    assert rig.word(call) == "already"
    assert snapshot(rig.client) == before


def test_a_follow_up_that_fails_expires_whole_and_starts_anew_whole(rig: Rig) -> None:
    attempt = running(rig).attempt
    up = rig.follow_up(attempt)
    rig.reply(completion(rig, attempt, follow_up=up))
    assert rig.word(rig.fail(rig.ask(rig.take()))) == "failed"
    parts = [rig.named(kind, key=up.request.key) for kind in ("status", "followup", "callbacks")]
    assert all(rig.client.pttl(part) > 0 for part in parts)
    assert rig.word(rig.start(up.request.key, up.ticket.job_id)) == "started"
    assert [rig.client.pttl(part) for part in parts] == [-1, -1, -1]
    assert rig.word(rig.calls.cancel(up.request.key)) == "cancelled"
    assert rig.client.exists(*parts[1:]) == 0


def test_a_quarantined_request_keeps_its_payloads_for_its_next_run(rig: Rig) -> None:
    seeded = rig.seed("quarantined", REQUEST)
    rig.client.hset(rig.named("callbacks", key=seeded.key), mapping={str(n): "x" for n in range(5_000)})
    for kind in (FollowUp.FAILURE, FollowUp.QUARANTINE):
        assert rig.word(rig.attend(seeded.attempt, kind)) == "attended"
        assert rig.client.zcard(rig.named("unattended", follow_up=kind)) == 0
    line = rig.line()
    assert len(line) == 2
    assert {len(payloads_of(rig, key)) for key in (*line, seeded.key)} == {5_000}


@pytest.mark.parametrize("way", ["again", "requeue", "put", "forget"])
def test_nobody_is_told_of_what_has_left_the_quarantine(rig: Rig, way: str) -> None:
    seeded = rig.seed("quarantined", REQUEST)
    call = rig.attend(seeded.attempt, FollowUp.FAILURE)
    match way:
        case "again":
            assert rig.word(rig.submit(REQUEST, again=True)) == "new"
        case "requeue":
            assert rig.word(rig.start(seeded.key, seeded.job_id)) == "started"
        case "put":
            assert rig.word(rig.put(REQUEST, "owner")) == "stored"
        case "forget":
            assert rig.word(rig.calls.forget(seeded.key)) == "forgotten"
    assert not rig.client.exists(rig.named("unattended", follow_up="failure"))
    assert not rig.client.exists(rig.named("unattended", follow_up="quarantine"))
    before = snapshot(rig.client)
    assert rig.word(call) == "already"
    assert snapshot(rig.client) == before


# -- who attends


def handlers_for(*kinds: FollowUp, template: str = "/slow") -> Handlers:
    handlers = Handlers()
    handler = handlers.route(template)(lambda request, context: 1)
    if FollowUp.FAILURE in kinds:
        handler.on_failure(lambda error, payloads: None)
    if FollowUp.QUARANTINE in kinds:
        handlers.quarantine(lambda entry: None)
    return handlers


def left(rig: Rig) -> list[int]:
    return [rig.client.zcard(rig.named("unattended", follow_up=kind)) for kind in ("failure", "quarantine")]


def test_a_worker_sees_to_what_it_has_a_function_for_and_leaves_the_rest(rig: Rig) -> None:
    rig.seed("quarantined", REQUEST)
    assert left(rig) == [1, 1]
    assert rig.run(followups.attend(rig.core, Handlers())) == 0
    assert rig.run(followups.attend(rig.core, handlers_for(FollowUp.FAILURE, template="/other"))) == 0
    assert left(rig) == [1, 1]
    assert rig.run(followups.attend(rig.core, handlers_for(FollowUp.FAILURE))) == 1
    assert left(rig) == [0, 1]
    assert rig.run(followups.attend(rig.core, handlers_for(FollowUp.QUARANTINE, template="/other"))) == 1
    assert rig.run(followups.attend(rig.core, handlers_for(FollowUp.FAILURE, FollowUp.QUARANTINE))) == 0
    assert left(rig) == [0, 0]
    assert [rig.ask(rig.calls.find(key)).operation for key in rig.line()] == ["rqarm:failure", "rqarm:quarantine"]


def test_what_nobody_wants_does_not_hide_what_somebody_does(rig: Rig) -> None:
    newest = server_ms(rig.client) * 1000
    seeded = rig.seed("quarantined", REQUEST)
    index = rig.named("unattended", follow_up="failure")
    rig.client.zadd(index, {f"gone-{n}": newest + 10**9 + n for n in range(250)})
    assert rig.run(followups.attend(rig.core, handlers_for(FollowUp.FAILURE))) == 1
    assert rig.client.zscore(index, seeded.key) is None


def test_a_failure_that_nobody_wants_to_hear_of_is_dropped_after_a_day(rig: Rig) -> None:
    rig.seed("quarantined", REQUEST)
    rig.ask(rig.calls.sweep("arm"))
    assert left(rig) == [1, 1]
    a_day_ago = (server_ms(rig.client) - 86_400_000) * 1000
    for kind in ("failure", "quarantine"):
        rig.client.zadd(rig.named("unattended", follow_up=kind), {REQUEST.key: a_day_ago})
    rig.ask(rig.calls.sweep("arm"))
    assert left(rig) == [0, 0]


def test_a_consumer_is_not_told_of_its_own_death(rig: Rig) -> None:
    seeded = rig.seed("quarantined", REQUEST)
    own = rig.follow_up(seeded.attempt, FollowUp.QUARANTINE).request
    handlers = handlers_for(FollowUp.FAILURE, FollowUp.QUARANTINE)
    assert not followups._wants(handlers, FollowUp.QUARANTINE, own)
    assert not followups._wants(handlers, FollowUp.FAILURE, own)
    callback = rig.follow_up(seeded.attempt, FollowUp.CALLBACK).request
    assert followups._wants(handlers, FollowUp.QUARANTINE, callback)
    assert not followups._wants(handlers, FollowUp.FAILURE, callback)


# -- run by RQ's own worker in this process


@pytest.fixture
def bench(bench: Bench, redis_client: redis.Redis) -> Iterator[Bench]:
    yield bench
    audit(redis_client, bench.rm.core.keys)


def test_the_callback_gets_the_result_and_every_payload_once(bench: Bench) -> None:
    @bench.handlers.route("/x")
    def x(request: Any, context: Any) -> list[int]:
        bench.rm.submit("/x", payload="while it runs")
        return [1, 2]

    x.callback(lambda result, payloads: bench.told.append((result, sorted(payloads))))
    for payload in ("a", "b", "a"):
        bench.rm.submit("/x", payload=payload)
    bench.work()
    assert bench.told == [([1, 2], ["a", "b", "while it runs"])]
    assert bench.rm.submit("/x", payload="late").outcome is Outcome.HIT
    bench.work()
    assert len(bench.told) == 1
    bench.rm.resubmit("/x", payload="again")
    bench.work()
    assert bench.told[1:] == [([1, 2], ["again", "while it runs"])]


def test_a_callback_without_payloads_is_called_with_none_of_them(bench: Bench) -> None:
    handler = bench.handlers.route("/x")(lambda request, context: None)
    handler.callback(lambda result, payloads: bench.told.append((result, payloads)))
    bench.rm.submit("/x")
    bench.work()
    assert bench.told == [(None, [])]


def test_an_async_callback_with_a_context_runs_for_the_request_that_has_ended(bench: Bench) -> None:
    handler = bench.handlers.operation("sum")(lambda request, context: 3)

    @handler.callback(timeout=5)
    async def ready(result: Any, payloads: Any, context: Any) -> None:
        bench.told.append((result, context.request.uri, context.request.operation, context.key, context.attempt))

    request = BatchRequest("/x?a=1", operation="sum", key="mine")
    bench.rm.submit(request)
    bench.work()
    assert bench.told == [(3, "/x?a=1", "sum", "mine", 1)]


def test_a_callback_that_raises_is_retried_and_then_fails_without_touching_the_result(bench: Bench) -> None:
    handler = bench.handlers.route("/x")(lambda request, context: "value")

    @handler.callback(retry=Retry(max=2))
    def ready(result: Any, payloads: Any, context: Any) -> None:
        bench.told.append((context.attempt, result, payloads))
        raise ConnectionError("the mail server is down")

    key = bench.rm.submit("/x", payload="p").key
    bench.work()
    assert bench.told == [(n, "value", ["p"]) for n in (1, 2, 3)]
    assert bench.rm.result(key) == "value"
    (failed,) = [event.key for event in bench.rm.events("0", timeout=0) if event.verb == "fail"]
    status = bench.rm.status(failed)
    assert status.state is State.FAILED
    assert status.error is not None
    assert status.error["message"] == "the mail server is down"


def test_a_callback_may_ask_for_its_own_retry(bench: Bench) -> None:
    handler = bench.handlers.route("/x")(lambda request, context: "value")

    @handler.callback(retry=None)
    def ready(result: Any, payloads: Any, context: Any) -> None:
        bench.told.append(dict(context.kwargs))
        if context.attempt == 1:
            raise context.retry(delay=0, page=2)

    bench.rm.submit("/x")
    bench.work()
    assert bench.told == [{}, {"page": 2}]


def test_on_failure_gets_the_error_and_the_payloads_after_the_last_retry(bench: Bench) -> None:
    @bench.handlers.route("/x", retry=Retry(max=1))
    def x(request: Any, context: Any) -> None:
        raise ValueError(f"attempt {context.attempt}")

    x.callback(lambda result, payloads: bench.told.append("a callback"))
    x.on_failure(lambda error, payloads: bench.told.append((error, payloads)))
    bench.rm.submit("/x", payload="p")
    bench.work()
    ((error, payloads),) = bench.told
    assert (error["type"], error["message"], payloads) == ("ValueError", "attempt 2", ["p"])
    assert "attempt 2" in error["traceback"]


def test_on_failure_hears_of_arguments_that_fit_no_handler(bench: Bench) -> None:
    @bench.handlers.route("/number")
    def number(request: Any, context: Any, n: int) -> int:
        return n

    number.on_failure(lambda error, payloads: bench.told.append(error["type"].rpartition(".")[2]))
    bench.rm.submit("/number?n=many")
    bench.work()
    assert bench.told == ["InvalidRequest"]


def test_a_small_result_with_a_short_life_reaches_its_callback(bench: Bench) -> None:
    handler = bench.handlers.route("/x", ttl=0.05)(lambda request, context: "short-lived")

    @handler.callback
    def ready(result: Any, payloads: Any, context: Any) -> None:
        eventually(lambda: not bench.rm.connection.exists(f"arm:result:{context.key}"), 5, "the result expires")
        bench.told.append(result)

    bench.rm.submit("/x")
    bench.work()
    assert bench.told == ["short-lived"]


def test_a_follow_up_that_somebody_made_up_fails_and_says_why(bench: Bench) -> None:
    handler = bench.handlers.route("/x")(lambda request, context: 1)
    handler.callback(lambda result, payloads: bench.told.append(result))
    keys = [
        bench.rm.submit(BatchRequest("/x", operation=name)).key
        for name in ("rqarm:callback", "rqarm:nothing", "rqarm:quarantine", "rqarm:failure")
    ]
    bench.work()
    errors = [bench.rm.status(key).error for key in keys]
    assert [error["type"].rpartition(".")[2] for error in errors if error] == [
        "FollowUpLost",
        "NoHandler",
        "NoHandler",
        "NoHandler",
    ]
    assert bench.told == []


def test_the_consumer_gets_the_entry_of_what_has_killed_its_workers(bench: Bench) -> None:
    bench.handlers.route("/x")(lambda request, context: 1)
    bench.handlers.quarantine(bench.told.append)
    rig = Rig(bench.rm.connection)
    seeded = rig.seed("quarantined", "/x")
    rig.client.hset(rig.named("callbacks", key=seeded.key), "id", packing.pack("p"))
    rig.client.delete(rig.named("swept"))
    bench.rm.submit("/x?other")
    bench.work()
    (entry,) = bench.told
    assert (entry.key, entry.exception, entry.reason) == (seeded.key, "Boom", "poison")
    assert entry.payloads == ["p"]


def test_what_its_last_attempt_sets_aside_is_told_in_the_same_step_and_keeps_its_payloads(bench: Bench) -> None:
    handler = bench.handlers.route("/x")(lambda request, context: {}["missing"])
    handler.on_failure(lambda error, payloads: bench.told.append((error["type"], payloads)))
    bench.handlers.quarantine(lambda entry: bench.told.append((entry.reason, entry.route, entry.payloads)))
    key = bench.rm.submit("/x", payload="p").key
    bench.work()
    assert bench.told == [("KeyError", ["p"]), ("exhausted", "/x", ["p"])]
    handler.callback(lambda result, payloads: bench.told.append((result, payloads)))
    handler.function = lambda request, context: "mended"
    assert bench.rm.quarantine.requeue(key) == {key: "requeued"}
    bench.work()
    assert bench.told[2:] == [("mended", ["p"])]


def test_a_callback_that_fails_for_good_is_set_aside_told_of_and_can_be_requeued(bench: Bench) -> None:
    handler = bench.handlers.route("/x")(lambda request, context: "value")
    failing = [True]

    @handler.callback(retry=None)
    def ready(result: Any, payloads: Any) -> None:
        if failing[0]:
            raise ConnectionError("no mail server")
        bench.told.append((result, payloads))

    bench.handlers.quarantine(lambda entry: bench.told.append((entry.operation, entry.message)))
    bench.rm.submit("/x", payload="p")
    bench.work()
    assert bench.told == [("rqarm:callback", "no mail server")]
    failing[0] = False
    (entry,) = bench.rm.quarantine.list()
    bench.rm.cache.clear()
    bench.rm.quarantine.requeue(entry.key)
    bench.work()
    assert bench.told[1:] == [("value", ["p"])]


def test_a_consumer_that_fails_is_not_told_of_itself(bench: Bench) -> None:
    bench.handlers.route("/x")(lambda request, context: {}["missing"])

    @bench.handlers.quarantine(retry=None)
    def consumer(entry: Any) -> None:
        bench.told.append(entry.operation)
        raise RuntimeError("cannot look at it")

    bench.rm.submit("/x")
    bench.work()
    assert bench.told == [""]
    assert sorted(entry.operation for entry in bench.rm.quarantine.list()) == ["", "rqarm:quarantine"]


def test_the_consumer_is_not_called_for_what_was_decided_before(bench: Bench) -> None:
    bench.handlers.route("/x")(lambda request, context: {}["missing"])
    bench.handlers.quarantine(bench.told.append)
    rig = Rig(bench.rm.connection)
    seeded = rig.seed("quarantined", "/x")
    assert rig.word(rig.attend(seeded.attempt, FollowUp.QUARANTINE)) == "attended"
    assert bench.rm.quarantine.discard(seeded.key) == {seeded.key: "discarded"}
    bench.work()
    assert bench.told == []
    assert [event.verb for event in bench.rm.events("0", timeout=0)][-1] == "conclude"
