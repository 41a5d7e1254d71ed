"""Submits: claims, joins and refusals on real servers, beyond the words of test_transitions."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from audit import audit
from drive import ERROR, LEASE_MS, Rig, server_ms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transitions import IMPOSTOR, REQUEST, stored

from rqarm import connect, embedded, flows, packing
from rqarm.errors import KeyConflict
from rqarm.keys import URI_FIELDS
from rqarm.model import Outcome, Priority, State
from rqarm.replies import Attempt, Found
from rqarm.request import BatchRequest

# -- submit


def test_a_new_answer_says_what_its_repeat_reads_from_the_record(rig: Rig) -> None:
    request = BatchRequest("/slow?b=2&a=1", sticky=True, priority="low", estimated_time=7.5, queue="bulk")
    call = rig.submit(request)
    first, second = rig.ask(call), rig.ask(call)
    assert first == second
    assert first.status.outcome is Outcome.NEW
    assert first.status.state is State.PENDING


def test_a_submit_sent_again_after_the_request_has_ended_does_not_run_it_again(rig: Rig) -> None:
    for end in ("complete", "fail", "cancel"):
        rig.client.flushdb()
        call = rig.submit(REQUEST, again=True)
        assert rig.word(call) == "new"
        attempt = rig.ask(rig.take())
        assert isinstance(attempt, Attempt)
        last = {
            "complete": rig.complete(attempt),
            "fail": rig.fail(attempt),
            "cancel": rig.calls.cancel(attempt.key),
        }[end]
        rig.reply(last)
        before = stored(rig)
        assert rig.word(call) == ("hit" if end == "complete" else "new")
        assert stored(rig) == before


def test_a_joiner_that_moved_the_job_still_joined_when_it_asks_again(rig: Rig) -> None:
    rig.seed("pending", "/slow")
    call = rig.submit(BatchRequest("/slow", priority="high"))
    assert rig.word(call) == "joined"
    before = stored(rig)
    assert rig.word(call) == "joined"
    assert stored(rig) == before


def test_a_submit_is_delivered_by_one_rq_job_that_names_its_key(rig: Rig) -> None:
    seeded = rig.seed("pending")
    assert rig.waiting() == [[], [seeded.job_id], []]
    for _ in range(3):
        rig.reply(rig.submit(seeded.request))
    assert rig.waiting() == [[], [seeded.job_id], []]
    audit(rig.client, rig.keys)


def test_max_pending_refuses_what_is_new_and_lets_joiners_and_hits_through(redis_client: redis.Redis) -> None:
    rig = Rig(redis_client, max_pending=2)
    done = rig.seed("completed", "/done")
    waiting = [rig.seed("pending", f"/{n}") for n in range(2)]
    found: Found = rig.ask(rig.submit(BatchRequest("/new")))
    assert found.status.outcome is Outcome.REFUSED
    assert found.status.state is State.UNKNOWN
    assert rig.word(rig.submit(waiting[0].request)) == "joined"
    assert rig.word(rig.submit(done.request)) == "hit"
    assert rig.word(rig.submit(done.request, again=True)) == "refused"
    assert rig.word(rig.submit(done.request)) == "hit", "the refused resubmit left the result where it was"
    assert rig.word(rig.submit(BatchRequest("/elsewhere", queue="quiet"))) == "new", "the limit is one queue's"
    rig.reply(rig.calls.cancel(waiting[0].key))
    assert rig.word(rig.submit(BatchRequest("/new"))) == "new"


def test_a_negative_answer_carries_the_error(rig: Rig) -> None:
    seeded = rig.seed("negative")
    found: Found = rig.ask(rig.submit(seeded.request))
    assert found.status.outcome is Outcome.NEGATIVE
    assert found.status.error is not None
    assert found.status.error["type"] == "Boom"


def test_a_negative_answer_ends_at_its_time(rig: Rig) -> None:
    seeded = rig.seed("negative")
    rig.client.hset(rig.keys.status(seeded.key), "negative_until", server_ms(rig.client) - 1)
    assert rig.word(rig.submit(seeded.request)) == "new"


def test_a_conflict_names_the_other_request(rig: Rig) -> None:
    rig.seed("pending", REQUEST)
    with pytest.raises(KeyConflict) as caught:
        rig.ask(rig.submit(IMPOSTOR))
    assert caught.value.theirs == rig.core.identify(REQUEST).text


# -- the identity in pieces


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 192, 193, 5_000])
def test_an_identity_of_any_length_is_compared_and_read_whole(rig: Rig, length: int) -> None:
    uri = "/" + "x" * (length - len("1\n\n/"))
    request = BatchRequest(uri, key="k", sticky=True)
    other, longer, shorter = (BatchRequest(text, key="k") for text in (f"{uri[:-1]}y", f"{uri}x", uri[:-1] or "/a"))
    rig.ask(rig.submit(request))
    assert len("".join(rig.record(request.key).get(name, "") for name in URI_FIELDS)) == max(length, 4)
    for impostor in (other, longer, shorter):
        with pytest.raises(KeyConflict) as caught:
            rig.ask(rig.submit(impostor))
        assert caught.value.theirs == request.identity
        assert rig.word(rig.put(impostor, "owner")) == "conflict"
    assert rig.ask(rig.submit(BatchRequest(uri, key="k"))).status.uri == uri
    assert rig.ask(rig.calls.find(request.key)) == request
    assert rig.ask(rig.take()).request == request
    rig.lapse(request.key)
    assert [found.uri for found in rig.ask(rig.calls.sweep("arm")).lapsed] == [uri]


@pytest.mark.parametrize("length", [70, 190])
def test_the_record_of_a_usual_request_is_stored_as_a_list(rig: Rig, length: int) -> None:
    """One value above 64 bytes, and the server stores the record as a table, which takes twice as much."""
    request = BatchRequest("https://example.org/v1/cities?" + "&".join(f"p{n}=v{n}" for n in range(50))[: length - 33])
    attempt = rig.begin(request, worker="a-host-with-a-name.4711.4711")
    assert rig.client.object("ENCODING", rig.keys.status(request.key)) == b"listpack"
    assert rig.client.memory_usage(rig.keys.status(request.key)) < 1_000
    assert rig.word(rig.complete(attempt)) == "stored"
    assert rig.client.object("ENCODING", rig.keys.status(request.key)) == b"listpack"


def test_a_completed_record_keeps_what_readers_see_and_what_repeats_are_known_by(rig: Rig) -> None:
    request = BatchRequest("/slow", ttl=60)
    attempt = rig.begin(request)
    rig.reply(rig.calls.retry(attempt, rig.ticket(request), delay_ms=1, kwargs=packing.pack({"a": 1}), error=ERROR))
    attempt = rig.ask(rig.take())
    rig.reply(rig.calls.renew(attempt, LEASE_MS, b'{"fraction": 0.5, "message": ""}'))
    assert rig.word(rig.complete(attempt)) == "stored"
    assert rig.record(request.key).keys() == {
        "state", "uri", "request", "job_id", "queue", "priority", "sticky", "est_ms", "submitted_ms", "started_ms",
        "ended_ms", "attempts", "retries", "worker", "done_token", "tried_1",
    }  # fmt: skip
    assert rig.client.hkeys(rig.named("result", key=request.key)) == [b"owner", b"envelope", b"bytes"]


def in_the_earlier_form(rig: Rig, request: BatchRequest) -> None:
    """The record as it was before the identity lay in pieces and the request beside it."""
    status = rig.keys.status(request.key)
    rig.client.hdel(status, *URI_FIELDS)
    rig.client.hset(status, mapping={"uri": request.identity, "request": request.pack()})


EARLIER = BatchRequest("https://api.example.org/v1/cities/FR?min_population=100000&format=csv", key="earlier")


@pytest.mark.parametrize("end", ["complete", "fail", "retry", "release", "lapse", "cancel", "put"])
def test_a_record_of_the_earlier_form_is_joined_found_and_ended(rig: Rig, end: str) -> None:
    rig.seed("pending", EARLIER)
    in_the_earlier_form(rig, EARLIER)
    assert rig.word(rig.submit(EARLIER)) == "joined"
    with pytest.raises(KeyConflict):
        rig.ask(rig.submit(BatchRequest(f"{EARLIER.uri}x", key="earlier")))
    assert rig.ask(rig.calls.read(EARLIER.key, with_value=False)).status.uri == EARLIER.canonical
    assert rig.ask(rig.calls.find(EARLIER.key)) == EARLIER
    attempt = rig.ask(rig.take())
    assert attempt.request == EARLIER
    word, state = {
        "complete": lambda: (rig.word(rig.complete(attempt)), "completed"),
        "fail": lambda: (rig.word(rig.fail(attempt)), "failed"),
        "retry": lambda: (rig.word(rig.retry(attempt, rig.ticket(EARLIER))), "pending"),
        "release": lambda: (rig.word(rig.calls.release(attempt, rig.front_ticket(EARLIER))), "pending"),
        "lapse": lambda: (rig.lapse(EARLIER.key) or rig.run(flows.sweep(rig.core)), "pending"),
        "cancel": lambda: (rig.word(rig.calls.cancel(EARLIER.key)), "cancelled"),
        "put": lambda: (rig.word(rig.put(EARLIER, "owner")), "completed"),
    }[end]()
    assert word
    assert rig.state(EARLIER.key) is State(state)
    assert rig.ask(rig.calls.read(EARLIER.key, with_value=False)).status.uri == EARLIER.canonical
    audit(rig.client, rig.keys)


# -- joins


JOINERS = st.tuples(
    st.sampled_from(["temporary", "sticky", "ttl"]),
    st.integers(1, 5),  # ttl in hours
    st.integers(1, 5),  # ttl of the manager in hours
    st.sampled_from(Priority),
    st.sampled_from(["", "p", "q", "r"]),
)


@given(joiners=st.lists(JOINERS, min_size=1, max_size=5), data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_order_of_joiners_gives_the_same_record(
    server: embedded.PrivateServer, joiners: list[Any], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(joiners))
    with connect.open_client(server.url) as client:
        records = []
        for wanted in (joiners, order):
            client.flushdb()
            for kind, hours, fallback, priority, payload in wanted:
                rig = Rig(client, ttl=3600.0 * fallback)
                request = BatchRequest(
                    "/slow",
                    sticky=kind == "sticky",
                    ttl=3600.0 * hours if kind == "ttl" else None,
                    priority=priority,
                )
                assert rig.word(rig.submit(request, payload=payload.encode())) in ("new", "joined")
            record = rig.record(request.key)
            callbacks = client.hgetall(rig.named("callbacks", key=request.key))
            names = ("state", "sticky", "ttl_ms", "fallback_ttl_ms", "priority", "queue", "attempts")
            records.append(({name: record.get(name) for name in names}, callbacks))
            audit(client, rig.keys)
        assert records[0] == records[1]
        fields, callbacks = records[0]
        assert fields["sticky"] == str(int(any(joiner[0] == "sticky" for joiner in joiners)))
        assert int(fields["ttl_ms"] or 0) == max(j[1] * 3_600_000 if j[0] == "ttl" else 0 for j in joiners)
        assert int(fields["fallback_ttl_ms"] or 0) == max(joiner[2] * 3_600_000 for joiner in joiners)
        assert int(fields["priority"] or 0) == min(joiner[3] for joiner in joiners)
        assert set(callbacks) == {joiner[4].encode() for joiner in joiners} - {b""}


@pytest.mark.parametrize("state", ["pending", "mine"])
def test_a_weaker_joiner_changes_nothing(rig: Rig, state: str) -> None:
    strong = BatchRequest("/slow", sticky=True, priority="high")
    seeded = rig.seed(state, strong)
    rig.reply(rig.submit(BatchRequest("/slow", ttl=7200), payload=b"p"))
    before = stored(rig)
    for weak in (BatchRequest("/slow"), BatchRequest("/slow", ttl=3600), BatchRequest("/slow", priority="low")):
        assert rig.word(rig.submit(weak)) == "joined"
    assert rig.word(rig.submit(BatchRequest("/slow"), payload=b"p")) == "joined"
    assert stored(rig) == before
    assert rig.record(seeded.key)["ttl_ms"] == "7200000"


def test_the_first_payload_under_an_id_stays(rig: Rig) -> None:
    seeded = rig.seed("pending")
    identity = rig.core.identify(seeded.request)
    for payload in (b"first", b"second"):
        call = rig.calls.submit(seeded.request, identity, rig.ticket(seeded.request), payload=("id", payload))
        rig.reply(call)
    assert rig.client.hgetall(rig.named("callbacks", key=seeded.key)) == {b"id": b"first"}


def test_a_joiner_with_a_better_priority_moves_the_job_and_the_old_ticket_is_superseded(rig: Rig) -> None:
    seeded = rig.seed("pending")
    waits, first = rig.seed("pending", "/waits"), rig.seed("pending", BatchRequest("/first", priority="high"))
    ticket = rig.ticket(seeded.request, priority=Priority.HIGH)
    urgent = BatchRequest("/slow", priority="high")
    assert rig.word(rig.submit(urgent, ticket)) == "joined"
    assert rig.waiting()[0][-1] == ticket.job_id
    assert rig.line() == [first.key, seeded.key, waits.key], "the line is that of RQ: at the end of the better queue"
    assert rig.record(seeded.key)["job_id"] == ticket.job_id
    audit(rig.client, rig.keys)
    assert rig.word(rig.start(seeded.key, seeded.job_id)) == "superseded"
    assert [rig.ask(rig.take()).request.uri for _ in range(3)] == ["/first", "/slow", "/waits"]
    assert isinstance(rig.ask(rig.take()), str), "the old ticket starts nothing"


def test_a_running_request_is_not_moved(rig: Rig) -> None:
    seeded = rig.seed("mine")
    assert rig.word(rig.submit(BatchRequest("/slow", priority="high"))) == "joined"
    assert rig.record(seeded.key)["priority"] == "1"
    assert rig.waiting() == [[], [], []]


@pytest.mark.parametrize("state", ["pending", "lapsed"])
def test_who_takes_over_a_dead_claim_brings_its_priority_and_queue(rig: Rig, state: str) -> None:
    seeded = rig.seed(state)
    if state == "pending":
        rig.client.delete(f"{rig.jobs.job_prefix}{seeded.job_id}")
    assert rig.word(rig.submit(BatchRequest("/slow", priority="high", queue="other"))) == "new"
    record = rig.record(seeded.key)
    assert (record["queue"], record["priority"]) == ("other", "0")
    assert rig.line() == []
    assert rig.line("other") == [seeded.key]
    audit(rig.client, rig.keys)
