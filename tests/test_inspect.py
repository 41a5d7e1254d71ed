"""The overview: counters are right, it costs one round trip, and it says what needs attention."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import resources
from typing import Any

import fakeredis
import managers
import pytest
import redis
from drive import LEASE_MS, Rig, server_ms

from rqarm import BatchRequest, RequestManager, RqarmError, inspect
from rqarm.browse import cached
from rqarm.inspect import Histogram, Overview
from rqarm.rqjobs import queue_names

URI = "/cities/FR"
#: as many notes are added up at a time; MOST_NOTED in lua/prelude/counters.lua
SETTLED = 100


def look(rig: Rig) -> Overview:
    return rig.run(inspect.overview(rig.core))


def finish(rm: Any, value: Any = 1) -> None:
    rm.queues.next_request(0).finish(value)


def codes(found: Overview) -> list[str]:
    return [each.code for each in found.attention]


def test_an_overview_is_one_round_trip_however_many_queues(rm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rm.submit_many([BatchRequest(f"/c/{n}", queue=f"queue-{n}") for n in range(30)])
    rm.overview()
    with managers.round_trips(monkeypatch) as sent:
        found = rm.overview()
    assert len(sent) == 1
    assert [line.name for line in found.queues] == sorted(f"queue-{n}" for n in range(30))


def test_submissions_are_counted_by_outcome_minute_and_route(rm: Any) -> None:
    rm.submit(URI)
    rm.submit(URI)
    finish(rm)
    for _ in range(3):
        rm.submit(URI)
    found = rm.overview()
    counts = {"hit": 3, "joined": 1, "new": 1}
    assert found.submissions == counts
    assert len(found.minutes) == 60
    assert merged(minute.submissions for minute in found.minutes[-2:]) == counts
    assert (found.hit_rate.effective, found.hit_rate_hour) == (0.8, found.hit_rate)
    (route,) = found.routes
    assert (route.name, route.submissions, route.completed) == ("/cities", counts, 1)


def merged(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in counts:
        for word, n in each.items():
            total[word] = total.get(word, 0) + n
    return total


def test_the_document_is_json_and_has_what_is_computed(rm: Any) -> None:
    rm.submit(URI)
    document = json.loads(json.dumps(rm.overview().to_dict()))
    assert document["hit_rate"]["effective"] == 0
    assert document["saved"]["seconds"] == 0
    assert set(document) == set(re.findall(r"\w+", named_in_the_docstring()))


def named_in_the_docstring() -> str:
    """The list of fields that the module promises to those who read the document."""
    assert inspect.__doc__ is not None
    return inspect.__doc__.split("``Overview``:", 1)[1].split("``server``", 1)[0]


# -- what is counted


def test_a_hit_saves_the_run_of_its_result_and_a_join_the_estimate(rig: Rig) -> None:
    """The times are forged: nobody waits for a run."""
    key = rig.seed("completed", BatchRequest(URI)).key
    rig.client.hset(rig.keys.status(key), mapping={"started_ms": 1_000, "ended_ms": 4_500})
    rig.ask(rig.submit(BatchRequest(URI)))
    estimated = BatchRequest("/other/1", estimated_time=20.0)
    for _ in range(3):
        rig.ask(rig.submit(estimated))
    saved = look(rig).saved
    assert (saved.executions, saved.hit_seconds, saved.joined_seconds, saved.seconds) == (3, 3.5, 40.0, 43.5)


def test_a_value_that_was_put_saves_nothing_that_is_known(rm: Any) -> None:
    rm.cache.put(URI, 1)
    rm.submit(URI)
    assert (rm.overview().saved.executions, rm.overview().saved.seconds) == (1, 0)


def test_ends_are_counted_by_queue_with_their_times(rig: Rig) -> None:
    for number, queue in enumerate(["one", "one", "two"]):
        seeded = rig.seed("mine", BatchRequest(f"/r/{number}", queue=queue))
        begun = server_ms(rig.client) - 40_000
        rig.client.hset(rig.keys.status(seeded.key), mapping={"started_ms": begun, "pushed_ms": begun - 700})
        rig.ask(rig.fail(seeded.attempt) if number == 1 else rig.complete(seeded.attempt))
    found = look(rig)
    assert [(line.name, line.completed, line.failed) for line in found.queues] == [("one", 1, 1), ("two", 1, 0)]
    run, wait = found.histograms["run_seconds"]["one"], found.histograms["wait_seconds"]["one"]
    assert (run.count, run.counts[run.bounds.index(60.0)]) == (2, 2)
    assert (wait.count, wait.sum, wait.counts[wait.bounds.index(1.0)]) == (2, 1.4, 2)
    assert 30 < (found.queues[0].run_p50 or 0) < (found.queues[0].run_p95 or 0) < 60
    assert found.histograms["result_bytes"][""].count == 2


def test_the_bounds_of_the_histograms_are_those_of_the_scripts() -> None:
    lua = resources.files("rqarm").joinpath("lua/prelude/counters.lua").read_text("utf-8")
    for name, bounds in (("TIMES_MS", inspect.TIMES_MS), ("SIZES", inspect.SIZES)):
        written = re.search(rf"^local {name} = {{(.*)}}$", lua, re.MULTILINE)
        assert written is not None
        assert tuple(map(int, written[1].split(","))) == bounds


def test_a_histogram_estimates_its_quantiles() -> None:
    histogram = Histogram(bounds=(1.0, 10.0, 100.0), counts=(0, 8, 0, 2), sum=0.0)
    assert histogram.quantile(0.5) == pytest.approx(1 + 9 * 5 / 8)
    assert histogram.quantile(0.95) == 100.0
    assert Histogram((1.0,), (0, 0), 0.0).quantile(0.5) is None


def test_an_attempt_that_speaks_too_late_is_counted_with_the_reason(rig: Rig) -> None:
    late = rig.seed("cancelled", BatchRequest("/late/1"))
    assert rig.word(rig.complete(late.attempt)) == "lost"
    assert look(rig).refusals == {"late": 1}
    # its lease lapsed, another worker runs it and then ends it: every word of the first is one too many
    first = rig.seed("mine", BatchRequest("/twice/1")).attempt
    ticket = rig.ticket(first.request)
    rig.ask(rig.crash(first.key, first.token, ticket))
    second = rig.ask(rig.calls.start(first.key, ticket.job_id, "execution-2", "another", LEASE_MS))
    assert rig.word(rig.calls.renew(first, LEASE_MS)) == "lost"
    rig.ask(rig.complete(second))
    assert rig.word(rig.complete(first)) == "lost"
    found = look(rig)
    assert found.refusals == {"duplicate": 2, "late": 1}
    assert "duplicate_executions" in codes(found)


def test_the_routes_that_are_counted_apart_are_limited(rig: Rig) -> None:
    for number in range(130):
        rig.ask(rig.submit(BatchRequest(f"/route{number}/x")))
    found = look(rig)
    assert len(found.routes) == 101
    (rest,) = [route for route in found.routes if route.name == "*"]
    assert rest.submissions == {"new": 30}


@pytest.mark.parametrize("uri", ["/4711081500/x", "/7587f3c3c6d40f442cc674eeaaf5b641", "/" + "long" * 20])
def test_a_part_of_a_uri_that_is_no_name_is_no_label(rig: Rig, uri: str) -> None:
    rig.ask(rig.submit(BatchRequest(uri)))
    assert [route.name for route in look(rig).routes] == ["*"]


def test_keys_that_are_asked_for_often_are_hot(rig: Rig) -> None:
    for number in range(300):
        rig.seed("completed", BatchRequest(f"/cold/{number}?token=x"))
    for _ in range(20):
        for number in range(3):
            rig.ask(rig.submit(BatchRequest(f"/cold/{number}?token=x")))
    for number in range(3, 300):
        rig.ask(rig.submit(BatchRequest(f"/cold/{number}?token=x")))
    hot = look(rig).hot
    assert {each.uri for each in hot[:3]} == {f"/cold/{number}?token=***" for number in range(3)}
    assert 10 <= hot[2].hits <= hot[0].hits <= 20
    fields = rig.client.hkeys(rig.named("stats", family="submissions"))
    assert len([field for field in fields if re.fullmatch(rb"h\d+", field)]) <= 256


def test_what_was_hot_hours_ago_gives_way(rig: Rig) -> None:
    key = rig.seed("completed", BatchRequest(URI)).key
    cell, hour = f"h{int(key[-2:], 16)}", server_ms(rig.client) // 3_600_000
    rig.client.hset(rig.named("stats", family="submissions"), cell, f"80 {hour - 3} {key}")
    assert look(rig).hot[0].hits in (9, 10)
    rig.ask(rig.submit(BatchRequest(URI)))
    assert look(rig).hot[0].hits in (10, 11)


def test_minutes_are_not_mixed_up_when_the_ring_goes_round(rig: Rig) -> None:
    often(rig, BatchRequest("/x/1"))
    found = look(rig)
    minute = found.minutes[-1].at // 60
    counters = rig.named("stats", family="submissions")
    rig.client.hset(counters, f"m{minute % 64}:new", f"{minute - 64} 500")
    rig.client.hset(counters, f"m{(minute - 5) % 64}:hit", f"{minute - 5} 7")
    assert look(rig).minutes[-6].submissions == {"hit": 7}
    for number in range(SETTLED):
        rig.ask(rig.submit(BatchRequest(f"/x/{number + 2}")))
        assert sum(each.submissions.get("new", 0) for each in look(rig).minutes[-2:]) == number + 1
    assert look(rig).submissions["new"] == SETTLED + 1


def test_foreign_data_in_the_counters_stop_nothing(rig: Rig) -> None:
    rig.client.hset(rig.named("stats", family="submissions"), mapping={"new": "many", "hit": "x"})
    rig.client.set(rig.named("stats", family="executions"), "somebody's")
    seeded = rig.seed("mine", BatchRequest(URI))
    assert rig.word(rig.complete(seeded.attempt)) == "stored"
    rig.client.rpush(rig.named("noted", family="submissions"), "what?", "1\nhit\n/a\nx\n")
    often(rig, BatchRequest(URI))
    assert look(rig).submissions["hit"] == SETTLED + 1
    settle(rig)
    rig.client.set(rig.named("noted", family="submissions"), "somebody's")
    assert rig.ask(rig.submit(BatchRequest(URI))).status.outcome == "hit"
    assert look(rig).submissions["hit"] == SETTLED + 1


def often(rig: Rig, request: BatchRequest, times: int = SETTLED) -> None:
    for _ in range(times):
        rig.ask(rig.submit(request))


def test_the_notes_are_added_up_before_they_are_many(rig: Rig) -> None:
    """Before and after, a reader is told the same."""
    rig.seed("completed", BatchRequest(URI))
    notes = rig.named("noted", family="submissions")
    for number in range(1, 2 * SETTLED + 2):
        rig.ask(rig.submit(BatchRequest(URI)))
        found = look(rig)
        assert (found.submissions["hit"], found.hot[0].hits, found.routes[0].submissions["hit"]) == (number,) * 3
        assert rig.client.llen(notes) == (number + 1) % SETTLED, "the first note is of the seed"
    assert rig.client.object("encoding", rig.named("stats", family="submissions")) == b"hashtable"


def test_what_was_noted_hours_ago_is_not_of_this_hour(rig: Rig) -> None:
    minute = server_ms(rig.client) // 60_000
    for ago in (0, 59, 60, 64, 1000, -3):
        rig.client.rpush(rig.named("noted", family="submissions"), f"{minute - ago}\nnew\n/x\n0\n")
    for more in range(2):
        found = look(rig)
        assert found.submissions == {"new": 6 + more}
        assert sum(each.submissions.get("new", 0) for each in found.minutes) == 2 + more
        settle(rig)


def settle(rig: Rig) -> None:
    """By notes of nothing, and one of a submit."""
    notes = rig.named("noted", family="submissions")
    rig.client.rpush(notes, *["-"] * (SETTLED - rig.client.llen(notes) - 1))
    rig.ask(rig.submit(BatchRequest("/settle/1")))
    assert not rig.client.exists(notes)


# -- the cache


def test_bytes_are_told_by_kind_through_every_change(rig: Rig) -> None:
    temporary = rig.seed("completed", BatchRequest("/t/1"))
    rig.seed("sticky", BatchRequest("/s/1"))
    each = look(rig).cache.bytes // 2
    assert (look(rig).cache.temporary_bytes, look(rig).cache.sticky_bytes) == (each, each)
    rig.ask(rig.submit(BatchRequest("/t/1", sticky=True)))
    assert (look(rig).cache.temporary_bytes, look(rig).cache.sticky_bytes) == (0, 2 * each)
    rig.ask(rig.calls.forget(temporary.key))
    assert (look(rig).cache.temporary_bytes, look(rig).cache.sticky_bytes) == (0, each)
    rig.run(cached.clear(rig.core, None, None, temporary_only=False))
    assert (look(rig).cache.bytes, look(rig).cache.sticky_bytes) == (0, 0)
    assert look(rig).removals == {"cleared": 2}


def test_a_result_that_expires_and_comes_back_at_once_is_counted_once(rig: Rig) -> None:
    """Before, its bytes stayed in the sum for ever when it was stored again before a sweep had seen it go."""
    first = rig.seed("completed", BatchRequest(URI))
    size = look(rig).cache.bytes
    rig.client.delete(rig.keys.status(first.key), rig.named("result", key=first.key))
    rig.seed("completed", BatchRequest(URI))
    assert look(rig).cache.bytes == size
    assert look(rig).removals == {"expired": 1}


def test_results_that_go_are_counted_by_reason(rig: Rig) -> None:
    rig.seed("evicted", BatchRequest("/evicted/1"))
    rig.seed("completed", BatchRequest("/again/1"))
    rig.ask(rig.submit(BatchRequest("/evicted/1")))
    rig.ask(rig.submit(BatchRequest("/again/1"), again=True))
    assert look(rig).removals == {"lost": 1, "replaced": 1}


# -- queues and workers


def test_a_queue_tells_its_oldest_whatever_its_priority(rig: Rig) -> None:
    old = BatchRequest("/low/1", priority="low")
    key = rig.seed("pending", old).key
    rig.seed("pending", BatchRequest("/high/1", priority="high"))
    line = rig.named("pending", queue="arm")
    (score,) = (score for name, score in rig.client.zrange(line, 0, -1, withscores=True) if name.decode() == key)
    rig.client.zadd(line, {key: score - 900e6})
    found = look(rig)
    assert 900 <= (found.queues[0].oldest or 0) < 960
    assert codes(found) == ["no_workers"]
    register(rig, "arm")
    assert codes(look(rig)) == ["stale_queue"]


def register(rig: Rig, queue: str, **fields: str) -> None:
    """An RQ worker as RQ writes it."""
    name = f"rq:worker:w-{queue}"
    rig.client.hset(name, mapping={"state": "busy", **fields})
    for each in queue_names(queue):
        rig.client.sadd(f"rq:workers:{each}", name)


def test_the_tail_is_the_load_by_the_workers(rig: Rig) -> None:
    for number in range(4):
        rig.seed("pending", BatchRequest(f"/x/{number}", estimated_time=30.0))
    assert look(rig).queues[0].tail_eta == 120
    register(rig, "arm")
    rig.client.hset("rq:worker:second", mapping={"state": "idle"})
    rig.client.sadd("rq:workers:arm", "rq:worker:second", "rq:worker:dead")
    found = look(rig)
    assert (found.queues[0].workers, found.queues[0].tail_eta) == (2, 60)
    assert (found.workers.total, found.workers.busy) == (2, 1)


def test_what_runs_is_told_by_queue_and_what_is_silent(rig: Rig) -> None:
    rig.seed("mine", BatchRequest("/a/1", queue="one"))
    rig.seed("mine", BatchRequest("/a/2", queue="two"))
    key = rig.seed("mine", BatchRequest("/a/3", queue="two")).key
    rig.client.zadd(rig.named("leases"), {key: server_ms(rig.client) - 5_000})
    found = look(rig)
    assert {line.name: line.running for line in found.queues} == {"one": 1, "two": 2}
    assert (found.overdue, found.states["in_progress"]) == (1, 3)
    assert 5 <= found.overdue_seconds < 60
    assert "leases_overdue" in codes(found)


def test_workers_of_another_version_are_a_skew(rig: Rig) -> None:
    register(rig, "arm", rqarm_version="0.0.9")
    rig.seed("pending", BatchRequest(URI))
    found = look(rig)
    assert found.workers.versions == {"0.0.9": 1}
    assert codes(found) == ["version_skew"]


# -- the server


def test_memory_and_evictions_need_attention(rig: Rig) -> None:
    found = look(rig)
    assert found.server is not None
    assert found.server.used_memory > 0
    full = replace(found.server, max_memory=100, memory_ratio=0.96, evicted_keys=3)
    assert [(each.level, each.code) for each in inspect._server_attention(full)] == [
        ("critical", "memory_high"),
        ("warning", "evictions"),
    ]


def test_failures_need_attention_when_they_are_many(rig: Rig) -> None:
    for number in range(12):
        seeded = rig.seed("mine", BatchRequest(f"/f/{number}"))
        rig.ask(rig.fail(seeded.attempt) if number % 2 else rig.complete(seeded.attempt))
    assert codes(look(rig)) == ["failures_high"]


def test_scripts_that_end_in_an_error_are_counted_by_the_server(rig: Rig) -> None:
    before = look(rig).server
    with pytest.raises(redis.ResponseError):
        rig.client.evalsha(rig.client.script_load("return redis.call('HGET', 'one')"), 0)
    with pytest.raises(redis.exceptions.NoScriptError):
        rig.client.evalsha("0" * 40, 0)
    after = look(rig).server
    assert before is not None
    assert after is not None
    assert after.script_errors - before.script_errors == 1


def test_a_server_that_does_not_tell_is_no_error(rig: Rig) -> None:
    flow = inspect.overview(rig.core)
    batch = next(flow)
    answers = [rig.ask(batch.steps[0]), redis.ResponseError("NOPERM"), redis.ResponseError("NOPERM")]
    with pytest.raises(StopIteration) as end:
        flow.send(answers)
    assert (end.value.value.server, end.value.value.waiters) == (None, None)


def test_a_server_that_refuses_the_look_is_an_error(rig: Rig) -> None:
    flow = inspect.overview(rig.core)
    next(flow)
    with pytest.raises(RqarmError):
        flow.send([RqarmError("no"), {}, 0])


def test_under_fakeredis_there_is_an_overview_without_a_server() -> None:
    with RequestManager(connection=fakeredis.FakeRedis(server=fakeredis.FakeServer())) as manager:
        manager.submit(URI)
        manager.submit(URI)
        finish(manager)
        found = manager.overview()
    assert (found.submissions, found.executions) == ({"joined": 1, "new": 1}, {"completed": 1})
    assert found.server is None


def test_keys_that_somebody_waits_for_are_counted(rig: Rig) -> None:
    with rig.client.pubsub() as listening:
        listening.subscribe(rig.named("done", key="a"), rig.named("done", key="b"), "another")
        for _ in range(3):
            assert listening.get_message(timeout=managers.PATIENCE) is not None
        assert look(rig).waiters == 2
