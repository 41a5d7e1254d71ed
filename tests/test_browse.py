"""What an operator sees and does, on both managers and both servers: each claim of the docstrings once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import managers
import pytest
from audit import audit
from drive import Rig, server_ms
from servers import eventually
from workers import crew

from rqarm import BatchRequest, InvalidRequest, LeaseLost, RequestManager, RequestUnknown, State
from rqarm.browse import claims, search

LIMIT = "/limited/{n}"


def keys_of(page: Any) -> list[str]:
    return [str(entry.key) for entry in page.entries]


def uris_of(page: Any) -> list[str]:
    return [entry.uri for entry in page.entries]


def walked(rm: Any, **filters: Any) -> list[Any]:
    """Every page of a search."""
    pages = [rm.search(**filters)]
    while pages[-1].cursor:
        pages.append(rm.search(**filters, cursor=pages[-1].cursor))
        assert len(pages) < 200, "a walk ends"
    return pages


@pytest.fixture
def one_of_each(rig: Rig) -> dict[str, str]:
    """A request in each state, by the state: its key."""
    wanted = ("mine", "completed", "failed", "quarantined", "cancelled", "sticky", "pending")
    return {name: str(rig.seed(name, f"/{name}/x").key) for name in wanted}


# -- search


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ("pending", {"pending"}),
        ("in_progress", {"mine"}),
        ("completed", {"completed", "sticky"}),
        ("failed", {"failed", "quarantined"}),
        ("cancelled", {"cancelled"}),
        ("quarantined", {"quarantined"}),
        ("unknown", set()),
        (None, {"pending", "mine", "completed", "sticky", "failed", "quarantined", "cancelled"}),
    ],
)
def test_a_search_finds_each_state_once(rm: Any, one_of_each: dict[str, str], state: str, names: set[str]) -> None:
    page = rm.search(state=state)
    assert sorted(keys_of(page)) == sorted(one_of_each[name] for name in names)
    assert page.cursor == ""
    assert page.looked_at == page.total


def test_what_has_moved_on_is_found_where_it_is_now_and_once(rm: Any, rig: Rig) -> None:
    keys = {name: rig.seed(name, f"/{name}").key for name in ("cancelled", "failed")}
    for name in keys:
        rm.resubmit(f"/{name}")
    assert sorted(keys_of(rm.search())) == sorted(keys.values())
    assert rm.search(state="failed").entries == rm.search(state="cancelled").entries == ()
    rm.cache.put("/failed", 1)
    assert keys_of(rm.search(state="completed")) == [keys["failed"]]
    rm.cancel(keys["cancelled"])
    assert sorted(keys_of(rm.search())) == sorted(keys.values())


@pytest.mark.parametrize("limit", [1, 2, 3, 500])
def test_pages_of_any_size_give_everything_once(rm: Any, one_of_each: dict[str, str], limit: int) -> None:
    pages = walked(rm, limit=limit)
    assert sorted(key for page in pages for key in keys_of(page)) == sorted(one_of_each.values())
    assert all(len(page.entries) <= limit for page in pages)
    assert pages[-1].looked_at == pages[-1].total == 7


def test_a_key_and_a_uri_find_their_request_first(rm: Any, rig: Rig) -> None:
    uri = "https://API.example.org/v1/b?y=2&x=1"
    wanted = rig.seed("completed", uri)
    named = rig.seed("failed", BatchRequest("/named", key="my-report"))
    rig.seed("pending", "/wraps?u=https://api.example.org/v1/b?x=1")
    assert keys_of(rm.search(wanted.key)) == [wanted.key]
    assert keys_of(rm.search("my-report")) == [named.key]
    assert keys_of(rm.search(uri))[0] == wanted.key
    assert keys_of(rm.search("https://api.example.org:443/v1/./b?x=1&y=2")) == [wanted.key]
    assert keys_of(rm.search(wanted.key, state="pending")) == [], "the other filters hold for it as well"


def test_a_text_is_found_in_any_form_that_a_uri_can_have_it(rm: Any, rig: Rig) -> None:
    seeded = [rig.seed("completed", uri).key for uri in ("/Städte/Köln?q=a+b", "/other")]
    for text in ("städte", "KÖLN", "a b", "%C3%B6ln", seeded[0][:6]):
        assert keys_of(rm.search(text)) == [seeded[0]], text
    assert rm.search("Rom").entries == ()


def test_a_search_does_not_tell_what_is_in_a_secret(rm: Any, rig: Rig) -> None:
    uri = "/export?token=s3cr3t&year=2026"
    key = rig.seed("completed", uri).key
    assert keys_of(rm.search("year=2026")) == [key]
    assert rm.search("s3cr").entries == ()
    assert rm.search("token=s").entries == ()
    assert keys_of(rm.search(uri)) == [key], "who knows all of it may find it"


@pytest.mark.parametrize(
    ("route", "found"),
    [
        ("/cities", {"/cities", "/cities/FR", "/cities/FR/x?a=1", "/cities?a=1"}),
        ("/cities/", {"/cities", "/cities/FR", "/cities/FR/x?a=1", "/cities?a=1"}),
        ("/cities/{country}", {"/cities/FR", "/cities/FR/x?a=1"}),
        ("/cities/{country}/x", {"/cities/FR/x?a=1"}),
        ("/{all:path}/x", {"/cities/FR/x?a=1"}),
        ("/cit", set()),
        ("/Cities", set()),
        ("api.example.org/v1", {"https://api.example.org/v1/cities"}),
        ("https://me@api.example.org/v1", {"https://api.example.org/v1/cities"}),
        ("urn:isbn", {"urn:isbn:1"}),
        ("thumbnail", {"/cities#op"}),
        ("/a%25b.c", {"/a%25b.c"}),
        ("/.*", set()),
        ("/größe", {"/gr%C3%B6%C3%9Fe/1"}),
    ],
)
def test_a_route_is_an_operation_or_the_beginning_of_a_path(rm: Any, rig: Rig, route: str, found: set[str]) -> None:
    uris = ["/cities", "/cities/FR", "/cities/FR/x?a=1", "/cities?a=1", "/citiesandmore", "/größe/1"]
    uris += ["https://api.example.org/v1/cities", "urn:isbn:1", "/a%25b.c"]
    for uri in uris:
        rm.submit(uri)
    rm.submit(BatchRequest("/cities", operation="thumbnail"))
    shown = {f"{status.uri}#op" if rm.find(status.key).operation else status.uri for status in walk(rm, route)}
    assert shown == found


def walk(rm: Any, route: str) -> list[Any]:
    return [entry for page in walked(rm, route=route, limit=2) for entry in page.entries]


def test_a_search_by_tag_reads_the_index_of_the_tag_only(rm: Any, rig: Rig) -> None:
    for n in range(20):
        rm.submit(f"/{n}")
    tagged = [rm.submit(BatchRequest(f"/t/{n}", tags=["red", "a\tb"[:1]])).key for n in range(3)]
    page = rm.search(tag="red")
    assert sorted(keys_of(page)) == sorted(tagged)
    assert page.total == 3
    assert keys_of(rm.search(tag="red", state="cancelled")) == []
    rm.cancel(tagged[0])
    assert keys_of(rm.search(tag="red", state="cancelled")) == [tagged[0]]
    assert rm.search(tag="re").entries == ()


def test_a_search_of_one_queue_reads_its_line_only(rm: Any) -> None:
    for n in range(4):
        rm.submit(BatchRequest(f"/{n}", queue="bulk" if n else None))
    page = rm.search(queue="bulk", state="pending")
    assert (len(page.entries), page.total) == (3, 3)
    assert uris_of(page) == ["/1", "/2", "/3"], "next first"


def test_a_call_looks_at_a_bounded_number_and_says_how_far_it_is(rm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(25):
        rm.submit(f"/{n}")
    rm.submit("/wanted")
    monkeypatch.setattr(search, "LOOKS", 10)
    pages = walked(rm, text="wanted", state="pending")
    assert [page.looked_at for page in pages] == [10, 20, 26]
    assert {page.total for page in pages} == {26}
    assert [uris_of(page) for page in pages] == [[], [], ["/wanted"]]


@pytest.mark.parametrize("gone", ["first", "last", "anchor"])
def test_a_walk_leaves_nothing_out_when_entries_go_between_its_pages(rm: Any, gone: str) -> None:
    for n in range(10):
        rm.cache.put(BatchRequest(f"/{n}", ttl=1000.0 + n), n)
    first = rm.search(state="completed", limit=4)
    left = [entry.key for entry in first.entries]
    rm.forget({"first": left[0], "last": left[2], "anchor": left[3]}[gone])
    second = rm.search(state="completed", limit=500, cursor=first.cursor)
    assert uris_of(first) + uris_of(second) == [f"/{n}" for n in range(9, -1, -1)]


def test_entries_with_equal_scores_are_walked_once(rm: Any) -> None:
    for n in range(7):
        rm.cache.put(BatchRequest(f"/{n}", sticky=True), n)
    found = [uri for page in walked(rm, state="completed", limit=2) for uri in uris_of(page)]
    assert sorted(found) == [f"/{n}" for n in range(7)]


@pytest.mark.parametrize(
    ("filters", "where"),
    [
        ({"state": "lost"}, "state"),
        ({"limit": 0}, "limit"),
        ({"limit": 501}, "limit"),
        ({"cursor": "elsewhere"}, "cursor"),
        ({"cursor": "-completed x\ny z 1"}, "cursor"),
        ({"tag": "a\nb"}, "tags"),
        ({"route": "/" + "x" * 1000}, "route"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(rm: Any, filters: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        rm.search(**filters)
    assert caught.value.where == where


def test_what_somebody_else_wrote_does_not_stop_a_search(rm: Any, rig: Rig) -> None:
    good, bad = (rig.seed("pending", f"/{n}") for n in range(2))
    rig.client.delete(rig.keys.status(bad.key))
    rig.client.set(rig.keys.status(bad.key), "not ours")
    assert keys_of(rm.search()) == [good.key]


def test_what_has_ended_without_a_result_is_counted_while_it_is_there(rm: Any, rig: Rig) -> None:
    def counts() -> tuple[int, int, int]:
        states = rm.overview().states
        return states["failed"], states["cancelled"], states["quarantined"]

    failed, anew = rig.seed("failed", "/a"), rig.seed("failed", "/b")
    cancelled, put = rig.seed("cancelled", "/c"), rig.seed("cancelled", "/d")
    rig.seed("quarantined", "/e")
    assert counts() == (2, 2, 1)
    rm.submit(anew.request)
    rm.cache.put(put.request, "value")
    assert counts() == (1, 1, 1)
    assert rig.word(rig.start(failed.key, failed.job_id)) == "started"
    rm.forget(cancelled.key)
    assert counts() == (0, 0, 1)


def test_the_sweep_takes_out_what_has_expired(rm: Any, rig: Rig) -> None:
    gone, stays = rig.seed("failed", "/gone"), rig.seed("failed", "/stays")
    rig.client.delete(rig.keys.status(gone.key))
    assert rm.overview().states["failed"] == 2
    assert rm.queues.sweep() == 0
    assert rm.overview().states["failed"] == 1
    assert keys_of(rm.search(state="failed")) == [stays.key]


def test_the_index_of_failures_is_bounded(rm: Any, rig: Rig) -> None:
    index = rig.named("ended", state="failed")
    rig.client.zadd(index, {f"old{n}": n for n in range(10_000)})
    key = rig.seed("failed").key
    assert rig.client.zcard(index) == 10_000
    assert rig.client.zrange(index, -1, -1) == [key.encode()]
    assert keys_of(rm.search(state="failed")) == [key]


# -- one request


def test_a_request_is_shown_in_full(rm: Any, rig: Rig) -> None:
    request = BatchRequest("/Export/../export?b=2&a=1", tags=["red"], priority="high", ttl=3600, queue="bulk")
    rm.submit(request, payload={"to": "me"})
    rm.submit(BatchRequest("/export?a=1&b=2", queue="bulk"), payload={"to": "you"})
    rm.submit(BatchRequest("/before", priority="high", queue="bulk", estimated_time=5))
    detail = rm.inspect(request.key)
    assert detail.request == request
    assert (detail.original, detail.status.uri) == ("/Export/../export?b=2&a=1", "/export?a=1&b=2")
    assert detail.identity == request.identity
    assert [step.rule for step in detail.steps] == [step.rule for step in rm.explain(request).steps] != []
    assert detail.tags == ("red",)
    assert detail.options == {"ttl": 3600.0, "queue": "bulk", "priority": "high", "tags": ["red"]}
    assert (detail.status.state, detail.status.position) == (State.PENDING, 1)
    assert detail.job_id.startswith(request.key)
    assert detail.job_status == "queued"
    assert (detail.expires, detail.token, detail.lease_until, detail.result, detail.limit) == (None,) * 5
    assert detail.payload_count == 2
    assert [payload.value for payload in detail.payloads] == [None, None]
    assert {payload.value["to"] for payload in rm.inspect(request.key, values=True).payloads} == {"me", "you"}
    assert [event.verb for event in detail.timeline] == ["submit"]
    json.dumps(detail.to_dict())


def test_a_running_request_shows_its_lease_and_its_history(rm: Any, rig: Rig) -> None:
    seeded = rig.seed("other")  # released by the first, taken by another
    rig.client.hset(rig.keys.status(seeded.key), "progress", json.dumps({"fraction": 0.5, "message": "half"}))
    detail = rm.inspect(seeded.key)
    assert (detail.status.worker, detail.status.attempts, detail.status.progress) == ("another", 1, 0.5)
    assert detail.progress_message == "half"
    assert detail.token == int(rig.record(seeded.key)["token"])
    assert 0 < detail.lease_left <= 60
    assert [event.verb for event in detail.timeline] == ["submit", "start", "release", "start"]
    assert sorted(event.id for event in detail.timeline) == [event.id for event in detail.timeline]


def test_each_attempt_is_told_with_how_it_ended(rm: Any, rig: Rig) -> None:
    attempt = rig.begin(BatchRequest("/slow"), worker="first")
    rig = Rig(rig.client, max_attempts=5)
    assert rig.word(rig.retry(attempt, rig.ticket(attempt.request))) == "retried"
    for worker in ("second", "third"):
        attempt = rig.ask(rig.take(worker=worker))
        assert rig.word(rig.crash(attempt.key, attempt.token, rig.ticket(attempt.request))) == "requeued"
    attempt = rig.ask(rig.take(worker="fourth"))

    told = rm.inspect(attempt.key).attempts
    assert [(each.number, each.worker, each.outcome) for each in told] == [
        (1, "first", "retried"),
        (2, "second", "crashed"),
        (3, "third", "crashed"),
        (4, "fourth", "running"),
    ]
    assert all(each.started <= each.ended and each.ran >= 0 for each in told[:3])
    assert [each.error and each.error["type"] for each in told] == ["Boom", "Boom", "Boom", None]
    assert (told[3].ended, told[3].ran >= 0) == (None, True)

    assert rig.word(rig.complete(attempt)) == "stored"
    last = rm.inspect(attempt.key).attempts[3]
    assert (last.outcome, last.ended, last.error) == ("completed", rm.status(attempt.key).ended, None)
    assert json.loads(json.dumps(rm.inspect(attempt.key).to_dict()))["attempts"][0]["outcome"] == "retried"
    assert not any("Boom" in text for text in rm.inspect(attempt.key).record.values())


@pytest.mark.parametrize(
    ("state", "outcome"),
    [("mine", "running"), ("completed", "completed"), ("failed", "failed"), ("aliased", "redirected")],
)
def test_a_first_attempt_is_told_by_the_state(rm: Any, rig: Rig, state: str, outcome: str) -> None:
    seeded = rig.seed(state)
    (only,) = rm.inspect(seeded.key).attempts
    assert (only.number, only.outcome, only.worker) == (1, outcome, "" if state == "aliased" else "me")
    assert (only.error is not None) == (state == "failed")


def test_an_attempt_that_a_submit_found_dead_is_told(rm: Any, rig: Rig) -> None:
    seeded = rig.seed("lapsed")
    rm.submit(seeded.request)
    (only,) = rm.inspect(seeded.key).attempts
    assert (only.outcome, only.worker, only.error["type"]) == ("crashed", "me", "LeaseLapsed")


def test_the_newest_attempts_are_kept_and_a_new_claim_begins_anew(rm: Any, rig: Rig) -> None:
    attempt = rig.begin(BatchRequest("/slow"))
    for _ in range(13):
        assert rig.word(rig.retry(attempt, rig.ticket(attempt.request))) == "retried"
        attempt = rig.ask(rig.take())
    assert [each.number for each in rm.inspect(attempt.key).attempts] == list(range(4, 15))
    assert rig.word(rig.fail(attempt)) == "failed"
    rm.submit(attempt.request)
    assert rm.inspect(attempt.key).attempts == ()


def test_a_note_that_somebody_else_wrote_is_left_out(rm: Any, rig: Rig) -> None:
    seeded = rig.seed("mine")
    for n, note in enumerate(("", "x", "1:x", "99:1", "1:7" * 6, "1:9,,,,,", "-3:")):
        rig.client.hset(rig.keys.status(seeded.key), f"tried_{n}", note)
    assert [each.number for each in rm.inspect(seeded.key).attempts] == [1]


def test_events_are_found_however_many_came_between(rm: Any, rig: Rig) -> None:
    seeded = rig.seed("mine")
    with rig.client.pipeline(transaction=False) as pipeline:
        for n in range(1_000):
            pipeline.xadd(rig.named("events"), {"verb": "submit", "key": f"k{n}", "state": "pending"})
        pipeline.execute()
    assert rig.word(rig.complete(seeded.attempt)) == "stored"
    with rig.client.pipeline(transaction=False) as pipeline:
        for n in range(1_000):
            pipeline.xadd(rig.named("events"), {"verb": "submit", "key": f"k{n}", "state": "pending"})
        pipeline.execute()
    assert [event.verb for event in rm.inspect(seeded.key).timeline] == ["submit", "start", "complete"]


def test_a_result_is_described_and_not_read(rm: Any) -> None:
    large, small = BatchRequest("/large", ttl=600), BatchRequest("/small", sticky=True)
    rm.cache.put(large, bytes(i % 251 for i in range(2_000)) * 2_000)
    rm.cache.put(small, {"a": 1})
    detail = rm.inspect(large.key)
    envelope = rm.cache.envelope(large.key)
    assert detail.result.chunks == envelope.chunks
    assert (detail.result.kind, detail.result.size, detail.result.missing) == ("bytes", 4_000_000, 0)
    assert 590 < detail.ttl <= 600
    kept = rm.inspect(small.key)
    assert (kept.ttl, kept.expires, kept.result.chunks) == (None, None, 0)


def test_lost_pieces_of_a_result_are_counted(rm: Any, rig: Rig) -> None:
    request = BatchRequest("/large")
    rm.cache.put(request, os.urandom(3_000_000))
    owner = rm.inspect(request.key).result.owner
    rig.client.delete(rig.keys.chunk(request.key, owner, 1))
    assert rm.inspect(request.key).result.missing == 1


def test_a_failure_shows_its_error_and_until_when_it_answers(rm: Any, rig: Rig) -> None:
    detail = rm.inspect(rig.seed("negative").key)
    assert detail.status.error["type"] == "Boom"
    assert detail.negative_until > detail.seen
    assert detail.ttl > 0


def test_the_place_under_a_limit_is_shown(rm: Any, rig: Rig) -> None:
    parked = rig.seed("parked", "/limited/2").key
    detail = rm.inspect(parked)
    assert detail.limit == claims.LimitUse(LIMIT, 1, 1, 0, 1)
    assert detail.parked_at == 1
    (limit,) = rm.claims().limits
    assert limit == detail.limit


def test_who_waits_is_counted(rm: Any, url: str, rig: Rig) -> None:
    key = rig.seed("pending").key
    with managers.threads() as threads, managers.opened("blocking", url) as other:
        waiting = threads.start(other.wait, key)
        managers.watched(rig.client, key)
        assert rm.inspect(key).listeners == 1
        rm.cancel(key)
        waiting.result(10)
    eventually(lambda: rm.inspect(key).listeners == 0, what="the listener is gone")


def test_of_what_is_gone_the_events_are_left(rm: Any, rig: Rig) -> None:
    key = rig.seed("completed").key
    rm.forget(key)
    detail = rm.inspect(key)
    assert detail.status.state is State.UNKNOWN
    assert [event.verb for event in detail.timeline] == ["submit", "start", "complete", "forget"]
    assert rm.inspect("never-seen").timeline == ()


def test_a_request_that_another_version_wrote_is_shown_without_it(rm: Any, rig: Rig) -> None:
    key = rig.seed("pending").key
    rig.client.hset(rig.keys.status(key), "request", b"\x81\xa1v\x63")
    detail = rm.inspect(key)
    assert detail.request is None
    assert "schema 99" in detail.unreadable
    assert detail.status.uri == detail.original == "/slow"


def test_nothing_that_is_shown_to_people_holds_a_secret(rm: Any) -> None:
    request = BatchRequest("https://H/x/../y?Token=s3cr3t&a=1", {"api_key": "s3cr3t", "b": "2"})
    rm.submit(request)
    detail = rm.inspect(request.key)
    assert "s3cr3t" in json.dumps(detail.to_dict())
    shown = detail.redacted(rm.settings.secret_params)
    assert "s3cr3t" not in json.dumps(shown.to_dict())
    assert shown.options["params"] == [["api_key", "***"], ["b", "2"]]


# -- the cache


def test_the_overview_counts_what_is_there(rm: Any) -> None:
    for n in range(6):
        rm.cache.put(BatchRequest(f"/short/{n}", ttl=30.0), n)
    for n in range(3):
        rm.cache.put(BatchRequest(f"/week/{n}", ttl=500_000.0), b"x" * 1000 * (n + 1))
    rm.cache.put(BatchRequest("/kept", sticky=True), "kept")
    seen = rm.cache.overview()
    assert (seen.entries, seen.temporary, seen.sticky, seen.sampled) == (10, 9, 1, 10)
    assert seen.bytes == rm.cache.stats().bytes
    assert {upto.upto: upto.count for upto in seen.ttl if upto.count} == {60.0: 6, 604_800.0: 3}
    assert sum(age.count for age in seen.ages) == 10
    assert {share.name: share.entries for share in seen.routes} == {"/short": 6, "/week": 3, "/kept": 1}
    assert {share.name: share.entries for share in seen.kinds} == {"value": 6, "bytes": 3, "text": 1}
    assert sum(share.size for share in seen.routes) == seen.bytes
    assert [entry.status.uri for entry in seen.largest][:3] == ["/week/2", "/week/1", "/week/0"]
    json.dumps(seen.to_dict())


def test_an_alias_is_counted_as_one(rm: Any, rig: Rig) -> None:
    rig.seed("aliased")
    kinds = {share.name: share.entries for share in rm.cache.overview().kinds}
    assert kinds == {"text": 1, "redirect": 1}


def test_a_sample_is_taken_at_equal_distances(rm: Any) -> None:
    for n in range(40):
        rm.cache.put(BatchRequest(f"/{'first' if n < 20 else 'second'}/{n}", ttl=1000.0 + n), n)
    seen = rm.cache.overview(sample=10)
    assert seen.sampled == 10
    assert {share.name: share.entries for share in seen.routes} == {"/first": 5, "/second": 5}
    with pytest.raises(InvalidRequest):
        rm.cache.overview(sample=0)


def test_an_empty_cache_is_one_too(rm: Any) -> None:
    seen = rm.cache.overview()
    assert (seen.entries, seen.bytes, seen.sampled, seen.largest) == (0, 0, 0, ())
    assert rm.cache.page().entries == ()


def test_pages_of_the_cache_have_sizes_and_expiry(rm: Any) -> None:
    for n in range(5):
        rm.cache.put(BatchRequest(f"/{n}", ttl=1000.0 - n), b"x" * (100 + n))
    rm.cache.put(BatchRequest("/kept", sticky=True), b"")
    by_size = rm.cache.page(order="size")
    assert [(entry.status.uri, entry.size) for entry in by_size.entries][:2] == [("/4", 104), ("/3", 103)]
    soonest = rm.cache.page(limit=2)
    assert [entry.status.uri for entry in soonest.entries] == ["/4", "/3"]
    assert soonest.total == 6
    rest = rm.cache.page(cursor=soonest.cursor)
    assert [entry.status.uri for entry in rest.entries] == ["/2", "/1", "/0", "/kept"]
    assert (rest.entries[-1].expires, rest.cursor) == (None, "")
    assert rm.cache.page(order="-expiry").entries[0].status.uri == "/kept"
    with pytest.raises(InvalidRequest):
        rm.cache.page(order="age")


def test_a_result_is_pinned_and_unpinned(rm: Any, rig: Rig) -> None:
    key = rig.seed("completed").key
    assert rm.cache.pin(key)
    assert rm.status(key).sticky
    assert (rm.inspect(key).ttl, rm.cache.clear_temporary()) == (None, 0)
    audit(rig.client, rig.keys)
    assert rm.cache.unpin(key)
    assert not rm.status(key).sticky
    assert rm.settings.ttl - 5 < rm.inspect(key).ttl <= rm.settings.ttl
    assert rm.cache.unpin(key, 60)
    assert 55 < rm.inspect(key).ttl <= 60
    assert rm.cache.set_ttl(key, 3600)
    assert 3595 < rm.inspect(key).ttl <= 3600
    audit(rig.client, rig.keys)


def test_the_pieces_of_a_result_live_as_long_as_it(rm: Any, rig: Rig) -> None:
    request = BatchRequest("/large")
    rm.cache.put(request, os.urandom(2_500_000))
    for change in (rm.cache.pin, rm.cache.unpin, lambda key: rm.cache.set_ttl(key, 100)):
        assert change(request.key)
        audit(rig.client, rig.keys)


@pytest.mark.parametrize("state", ["pending", "mine", "failed", "cancelled", "evicted"])
def test_where_there_is_no_result_nothing_is_retained(rm: Any, rig: Rig, state: str) -> None:
    key = rig.seed(state).key
    before = managers.snapshot(rig.client)
    assert not rm.cache.pin(key)
    assert not rm.cache.set_ttl(key, 60)
    assert managers.snapshot(rig.client) == before


def test_what_is_unknown_or_no_time_cannot_be_retained(rm: Any, rig: Rig) -> None:
    with pytest.raises(RequestUnknown):
        rm.cache.pin("never-seen")
    key = rig.seed("completed").key
    for ttl in (0, -1, 1e11, float("nan")):
        with pytest.raises(InvalidRequest):
            rm.cache.set_ttl(key, ttl)


def test_a_route_is_cleared_and_nothing_else(rm: Any, rig: Rig) -> None:
    for n in range(1_200):
        rm.cache.put(BatchRequest(f"/{'cities' if n % 3 else 'roads'}/{n}", sticky=n % 7 == 0), n)
    assert rm.cache.clear(route="/cities") == 800
    assert rm.cache.clear(route="/cities") == 0
    assert {entry.uri.split("/")[1] for entry in rm.cache.list()} == {"roads"}
    assert rm.cache.stats().temporary + rm.cache.stats().sticky == 400
    audit(rig.client, rig.keys)


def test_what_is_older_is_cleared(rm: Any, rig: Rig) -> None:
    for n in range(4):
        rm.cache.put(f"/{n}", n)
        ended_ms = server_ms(rig.client) - n * 3_600_000
        rig.client.hset(rig.keys.status(BatchRequest(f"/{n}").key), "ended_ms", ended_ms)
    assert rm.cache.clear(older_than=5_400) == 2
    assert sorted(entry.uri for entry in rm.cache.list()) == ["/0", "/1"]
    assert rm.cache.clear(route="/1", older_than=5_400) == 0


# -- tags


def test_a_tag_is_invalidated_with_all_its_results(rm: Any, rig: Rig) -> None:
    for n in range(250):
        tags = [["red"], ["red", "blue"], ["blue"], []][n % 4]
        rm.cache.put(BatchRequest(f"/{n}", tags=tags, sticky=n % 5 == 0), n)
    running = rm.submit(BatchRequest("/running", tags=["red"]))
    assert rm.cache.invalidate("red") == 126
    assert rm.cache.invalidate(["red", "green"]) == 0
    assert rm.status(running.key).state is State.PENDING
    left = {int(entry.uri[1:]) % 4 for entry in rm.cache.list()}
    assert left == {2, 3}
    audit(rig.client, rig.keys)
    assert rm.cache.invalidate(["blue"]) == 62


def test_the_tags_that_count_are_those_of_the_result(rm: Any, rig: Rig) -> None:
    red, blue = (BatchRequest("/x", tags=[tag]) for tag in ("red", "blue"))
    rm.cache.put(red, 1)
    rm.cache.put(blue, 2)
    assert rm.cache.invalidate("red") == 0
    assert rm.cache.get(red.key) == 2
    rm.cache.put(BatchRequest("/x"), 3)
    assert rm.cache.invalidate("blue") == 0
    assert rm.resubmit(red).state is State.PENDING
    assert keys_of(rm.search(tag="red")) == [red.key]
    audit(rig.client, rig.keys)


def test_the_indexes_of_tags_do_not_grow_with_what_has_expired(rm: Any, rig: Rig) -> None:
    for n in range(100):
        request = BatchRequest(f"/{n}", tags=["red", f"day-{n}"])
        rm.cache.put(request, n)
        rig.client.delete(rig.keys.status(request.key), rig.named("result", key=request.key))
    assert rig.client.zcard(rig.named("tagged")) <= 2
    assert rig.client.zcard(rig.named("tag", tag="red")) <= 2
    assert len(rig.client.keys(rig.named("tag", tag="day-*"))) <= 2


def test_a_request_without_tags_pays_nothing_for_them(rm: Any, rig: Rig) -> None:
    key = rm.submit("/plain").key
    rm.cache.put("/other", 1)
    assert "tags" not in rig.record(key)
    assert rig.client.keys(rig.named("tag", tag="*")) == []
    assert not rig.client.exists(rig.named("tagged"))


# -- claims


def test_claims_show_who_holds_what_until_when(rm: Any, rig: Rig) -> None:
    late = rig.seed("mine", "/late").key
    rig.set_lease(late, server_ms(rig.client) - 5_000)
    fresh = rig.seed("mine", "/fresh").key
    page = rm.claims()
    assert keys_of_claims(page) == [late, fresh]
    assert (page.total, page.overdue, page.next_offset) == (2, 1, None)
    overdue, held = page.entries
    assert overdue.overdue
    assert overdue.left == pytest.approx(-5, abs=2)
    assert (held.overdue, held.status.worker, held.lease) == (False, "me", 60.0)
    assert held.left == pytest.approx(60, abs=5)
    assert held.renewed_ago == pytest.approx(0, abs=5)
    assert held.token == int(rig.record(fresh)["token"])
    first = rm.claims(limit=1)
    assert (keys_of_claims(first), first.next_offset) == ([late], 1)
    assert keys_of_claims(rm.claims(offset=1, limit=1)) == [fresh]
    json.dumps(page.to_dict())


def keys_of_claims(page: Any) -> list[str]:
    return [claim.status.key for claim in page.entries]


def test_what_is_taken_away_is_next_in_line_and_its_holder_learns_of_it(rm: Any, rig: Rig) -> None:
    rm.submit("/first")
    lease = rm.queues.next_request()
    rm.submit("/second")
    assert rm.release(lease.key)
    status = rm.full_status(lease.key)
    assert (status.state, status.position, status.attempts) == (State.PENDING, 1, 0)
    for end in (lease.renew, lambda: lease.finish(1)):
        with pytest.raises(LeaseLost):
            end()
    audit(rig.client, rig.keys)
    again = rm.queues.next_request()
    assert again.key == lease.key
    again.finish("once")
    assert rm.result(lease.key) == "once"


@pytest.mark.parametrize("state", ["pending", "completed", "failed", "quarantined", "cancelled", "parked"])
def test_what_does_not_run_cannot_be_taken_away(rm: Any, rig: Rig, state: str) -> None:
    key = rig.seed(state).key
    before = managers.snapshot(rig.client)
    assert not rm.release(key)
    assert managers.snapshot(rig.client) == before
    with pytest.raises(RequestUnknown):
        rm.release("never-seen")


# -- workers


def test_a_live_worker_is_shown_with_what_it_runs_and_loses_what_is_released(url: str, tmp_path: Path) -> None:
    with crew(url, tmp_path) as hired:
        rm = hired.rm
        assert rm.workers().entries == ()
        worker = hired.hire()
        rm.get("/add/1/2", timeout=30)
        key = rm.submit("/turn/x").key
        hired.reaches(key, State.IN_PROGRESS)
        (seen,) = rm.workers().entries
        assert (seen.name, seen.keys, seen.pid) == (worker.name, (key,), worker.pid)
        assert seen.heartbeat_age < 60
        assert seen.version.startswith("3.")
        eventually(lambda: rm.workers().entries[0].succeeded == 1, 30, "the worker counts")
        token = rm.inspect(key).token
        assert rm.release(key)

        def runs_again() -> bool:
            found = rm.inspect(key)
            return found.status.state is State.IN_PROGRESS and found.token > token

        eventually(runs_again, 30, "the worker gave it up and took it anew")
        hired.let_go("x-1")
        (ended,) = hired.settle(key)
        assert (ended.state, ended.attempts) == (State.COMPLETED, 1)
        rm.connection.set("rq:suspended", 1)
        assert rm.workers().suspended


# -- the example


def test_the_example_reports_what_is_there(rig: Rig, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    import operator_page

    with RequestManager(url, allow_volatile=True) as manager:
        manager.cache.put("/cities/FR?token=s3cr3t", b"1234")
        rig.seed("mine", "/slow/1")
        assert operator_page.report(manager, "cities") == [
            "cache: 1 temporary, 0 sticky, 4 bytes",
            "  100% /cities",
            "running: 1, overdue: 0",
            "  me: /slow/1",
            "found for 'cities', looked at 2 of 2:",
            "  completed /cities/FR?token=***",
        ]


# -- what it costs


def test_every_view_is_three_round_trips_at_the_most(
    rm: Any, one_of_each: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    views = {
        "search": lambda: rm.search("x", route="/pending"),
        "inspect": lambda: rm.inspect(one_of_each["pending"]),
        "claims": rm.claims,
        "workers": rm.workers,
        "release": lambda: rm.release(one_of_each["mine"]),
        "overview": rm.cache.overview,
        "page": rm.cache.page,
        "pin": lambda: rm.cache.pin(one_of_each["completed"]),
    }
    for view in views.values():
        view()  # scripts are loaded
    counts = {}
    for name, view in views.items():
        with managers.round_trips(monkeypatch) as sent:
            view()
        counts[name] = len(sent)
    assert counts == dict.fromkeys(views, 1) | {"release": 1}
