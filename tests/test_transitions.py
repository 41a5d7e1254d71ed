"""The transitions on real servers: each script in each state, with its own and with other ids, once and again.

``TABLE`` is the contract. A word with a star changes what is stored; a word without leaves every byte and every TTL as
it was, except ``noted:submissions`` and ``stats:refusals``, which count refusals too. The words that no state alone
brings about are in ``SPECIAL``; a test holds the two against the headers, so no outcome goes untested.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis
import servers
from audit import audit
from drive import ERROR, LEASE_MS, STATES, STORED_STATE, Rig, Seeded, Snapshot, server_ms, snapshot, without
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rqarm import RequestManager, browse, codec, connect, embedded, flows, followups
from rqarm import calls as calls_module
from rqarm.calls import Attempt, Call, Found, Overdue, Ticket
from rqarm.errors import ForeignData, KeyConflict, LeaseLost, RqarmError
from rqarm.keys import URI_FIELDS
from rqarm.model import TRANSITIONS, FollowUp, Key, Outcome, Priority, State, Token
from rqarm.request import BatchRequest
from rqarm.scripts import all_scripts, script

REQUEST = BatchRequest("/slow?x=1", key="slow", tags=["red"])
#: same readable key, another request
IMPOSTOR = BatchRequest("/other", key="slow")
#: where redirects lead
TARGET = BatchRequest("/target")

# fmt: off
TABLE = ("""
                    unknown     pending     scheduled   mine        other       lapsed
submit new          new*        joined      joined      joined      joined      new*
submit same         new*        new         new         new         new         new
submit again        new*        joined      joined      joined      joined      new*
submit impostor     new*        conflict    conflict    conflict    conflict    conflict
start same          unknown     started*    started*    superseded  superseded  superseded
start other         unknown     superseded  superseded  superseded  superseded  superseded
start repeated      unknown     started*    started*    started     superseded  started
start own           unknown     started*    started*    superseded  superseded  superseded
take new            empty       started*    empty       empty       empty       empty
take repeated       empty       started*    spent       started     spent       started
admit mine          lost        lost        lost        admitted*   lost        admitted*
admit other         lost        lost        lost        lost        lost        lost
admit same          lost        parked      parked      parked      parked      parked
renew mine          lost        lost        lost        renewed*    lost        renewed*
renew other         lost        lost        lost        lost        lost        lost
emit mine           lost        lost        lost        emitted*    lost        emitted*
emit other          lost        lost        lost        lost        lost        lost
link new            unknown     left*       left*       left*       left*       left*
trace mine          lost        lost        lost        traced*     lost        traced*
trace other         lost        lost        lost        lost        lost        lost
complete mine       lost        lost        lost        stored*     lost        stored*
complete other      lost        lost        lost        lost        lost        lost
fail mine           lost        lost        lost        failed*     lost        failed*
fail other          lost        lost        lost        lost        lost        lost
retry mine          lost        lost        lost        retried*    lost        retried*
retry other         lost        lost        lost        lost        lost        lost
retry same          lost        already     already     already     already     already
release mine        lost        lost        lost        released*   lost        released*
release other       lost        lost        lost        lost        lost        lost
release same        lost        already     already     already     already     already
conclude mine       already     lost        lost        concluded*  lost        concluded*
conclude other      already     lost        lost        lost        lost        lost
attend failure      already     already     already     already     already     already
attend quarantine   already     already     already     already     already     already
attend other        already     already     already     already     already     already
crash mine          alive       alive       alive       requeued*   alive       requeued*
crash other         alive       alive       alive       alive       alive       alive
crash clock         alive       alive       alive       alive       alive       requeued*
crash same          alive       already     already     already     already     already
revive mine         alive       revived*    revived*    alive       alive       alive
revive other        alive       alive       alive       alive       alive       alive
revive same         alive       already     already     already     already     already
redirect mine       lost        lost        lost        linked*     lost        linked*
redirect other      lost        lost        lost        lost        lost        lost
cancel -            unknown     cancelled*  cancelled*  cancelled*  cancelled*  cancelled*
forget -            unknown     in_flight   in_flight   in_flight   in_flight   in_flight
requeue mine        unknown     in_flight   in_flight   in_flight   in_flight   in_flight
requeue other       unknown     in_flight   in_flight   in_flight   in_flight   in_flight
requeue same        unknown     already     already     already     already     already
discard mine        unknown     in_flight   in_flight   in_flight   in_flight   in_flight
discard other       unknown     in_flight   in_flight   in_flight   in_flight   in_flight
put new             stored*     stored*     stored*     stored*     stored*     stored*
put impostor        stored*     conflict    conflict    conflict    conflict    conflict
read -              unknown     found       found       found       found       found
follow -            unknown     found       found       found       found       found
locate -            unknown     found       found       found       found       found
browse line         page        page        page        page        page        page
browse results      page        page        page        page        page        page
sweep -             swept       swept       swept       swept       swept       swept
clear all           cleared     cleared     cleared     cleared     cleared     cleared
clear temporary     cleared     cleared     cleared     cleared     cleared     cleared
stats -             stats       stats       stats       stats       stats       stats
overview -          overview    overview    overview    overview    overview    overview
search any          page        page        page        page        page        page
claims -            page        page        page        page        page        page
inspect -           unknown     found       found       found       found       found
survey -            survey      survey      survey      survey      survey      survey
retain sticky       unknown     no_result   no_result   no_result   no_result   no_result
invalidate red      invalidated  invalidated  invalidated  invalidated  invalidated  invalidated
clear route         cleared     cleared     cleared     cleared     cleared     cleared
clear old           cleared     cleared     cleared     cleared     cleared     cleared
""", """
                    completed   sticky      evicted     failed      negative    quarantined exhausted   cancelled
submit new          hit         hit         new*        new*        negative    negative    new*        new*
submit same         hit         hit         new         new         new         new         new         new
submit again        new*        new*        new*        new*        new*        new*        new*        new*
submit impostor     conflict    conflict    conflict    conflict    conflict    conflict    conflict    conflict
start same          superseded  superseded  superseded  started*    started*    started*    started*    superseded
start other         superseded  superseded  superseded  superseded  superseded  superseded  superseded  superseded
start repeated      superseded  superseded  superseded  started*    started*    started*    started*    superseded
start own           superseded  superseded  superseded  superseded  superseded  superseded  superseded  superseded
take new            empty       empty       empty       empty       empty       empty       empty       empty*
take repeated       spent       spent       spent       spent       spent       spent       spent       empty*
admit mine          lost        lost        lost        lost        lost        lost        lost        lost
admit other         lost        lost        lost        lost        lost        lost        lost        lost
admit same          parked      parked      parked      parked      parked      parked      parked      parked
renew mine          lost        lost        lost        lost        lost        lost        lost        lost
renew other         lost        lost        lost        lost        lost        lost        lost        lost
emit mine           lost        lost        lost        lost        lost        lost        lost        lost
emit other          lost        lost        lost        lost        lost        lost        lost        lost
link new            unknown     unknown     unknown     unknown     unknown     unknown     unknown     unknown
trace mine          lost        lost        lost        lost        lost        lost        lost        lost
trace other         lost        lost        lost        lost        lost        lost        lost        lost
complete mine       already     already     already     lost        lost        lost        lost        lost
complete other      lost        lost        lost        lost        lost        lost        lost        lost
fail mine           lost        lost        lost        already     already     lost        already     lost
fail other          lost        lost        lost        lost        lost        lost        lost        lost
retry mine          lost        lost        lost        lost        lost        lost        lost        lost
retry other         lost        lost        lost        lost        lost        lost        lost        lost
retry same          already     already     already     already     already     already     already     already
release mine        lost        lost        lost        lost        lost        lost        lost        lost
release other       lost        lost        lost        lost        lost        lost        lost        lost
release same        already     already     already     already     already     already     already     already
conclude mine       lost        lost        lost        lost        lost        lost        lost        lost
conclude other      lost        lost        lost        lost        lost        lost        lost        lost
attend failure      already     already     already     already     already     attended*   attended*   already
attend quarantine   already     already     already     already     already     attended*   attended*   already
attend other        already     already     already     already     already     already     already     already
crash mine          alive       alive       alive       alive       alive       alive       alive       alive
crash other         alive       alive       alive       alive       alive       alive       alive       alive
crash clock         alive       alive       alive       alive       alive       alive       alive       alive
crash same          already     already     already     already     already     already     already     already
revive mine         alive       alive       alive       alive       alive       alive       alive       alive
revive other        alive       alive       alive       alive       alive       alive       alive       alive
revive same         already     already     already     already     already     already     already     already
redirect other      lost        lost        lost        lost        lost        lost        lost        lost
redirect mine       lost        lost        lost        lost        lost        lost        lost        lost
cancel -            ended       ended       ended       ended       ended       ended       ended       ended
forget -            forgotten*  forgotten*  forgotten*  forgotten*  forgotten*  forgotten*  forgotten*  forgotten*
requeue mine        ended       ended       ended       ended       ended       requeued*   requeued*   ended
requeue other       ended       ended       ended       ended       ended       superseded  superseded  ended
requeue same        already     already     already     already     already     already     already     already
discard mine        ended       ended       ended       ended       ended       discarded*  discarded*  ended
discard other       ended       ended       ended       ended       ended       superseded  superseded  ended
put new             stored*     stored*     stored*     stored*     stored*     stored*     stored*     stored*
put impostor        conflict    conflict    conflict    conflict    conflict    conflict    conflict    conflict
read -              found       found       found       found       found       found       found       found
follow -            found       found       found       found       found       found       found       found
locate -            found       found       found       found       found       found       found       found
browse line         page        page        page        page        page        page        page        page
browse results      page        page        page        page        page        page        page        page
sweep -             swept       swept       swept       swept       swept       swept       swept       swept
clear all           cleared*    cleared*    cleared*    cleared     cleared     cleared     cleared     cleared
clear temporary     cleared*    cleared     cleared*    cleared     cleared     cleared     cleared     cleared
stats -             stats       stats       stats       stats       stats       stats       stats       stats
overview -          overview    overview    overview    overview    overview    overview    overview    overview
search any          page        page        page        page        page        page        page        page
claims -            page        page        page        page        page        page        page        page
inspect -           found       found       found       found       found       found       found       found
survey -            survey      survey      survey      survey      survey      survey      survey      survey
retain sticky       retained*   retained    no_result   no_result   no_result   no_result   no_result   no_result
invalidate red      invalidated* invalidated* invalidated* invalidated invalidated invalidated invalidated invalidated
clear route         cleared*    cleared*    cleared*    cleared     cleared     cleared     cleared     cleared
clear old           cleared     cleared     cleared     cleared     cleared     cleared     cleared     cleared
""", """
                    placed      full        called      parked
submit new          joined      joined      joined      joined
submit same         new         new         new         new
submit again        joined      joined      joined      joined
submit impostor     conflict    conflict    conflict    conflict
start same          superseded  superseded  started*    started*
start other         superseded  superseded  superseded  superseded
start repeated      started     started     started*    started*
start own           superseded  superseded  started*    started*
take new            empty       empty       started*    empty
take repeated       started     started     spent       spent
admit mine          admitted    parked*     lost        lost
admit other         lost        lost        lost        lost
admit same          parked      parked      parked      parked
renew mine          renewed*    renewed*    lost        lost
renew other         lost        lost        lost        lost
emit mine           emitted*    emitted*    lost        lost
emit other          lost        lost        lost        lost
link new            left*       left*       left*       left*
trace mine          traced*     traced*     lost        lost
trace other         lost        lost        lost        lost
complete mine       stored*     stored*     lost        lost
complete other      lost        lost        lost        lost
fail mine           failed*     failed*     lost        lost
fail other          lost        lost        lost        lost
retry mine          retried*    retried*    lost        lost
retry other         lost        lost        lost        lost
retry same          already     already     already     already
release mine        released*   released*   lost        lost
release other       lost        lost        lost        lost
release same        already     already     already     already
conclude mine       concluded*  concluded*  lost        lost
conclude other      lost        lost        lost        lost
attend failure      already     already     already     already
attend quarantine   already     already     already     already
attend other        already     already     already     already
crash mine          requeued*   requeued*   alive       alive
crash other         alive       alive       alive       alive
crash clock         alive       alive       alive       alive
crash same          already     already     already     already
revive mine         alive       alive       revived*    revived*
revive other        alive       alive       alive       alive
revive same         already     already     already     already
redirect mine       linked*     linked*     lost        lost
redirect other      lost        lost        lost        lost
cancel -            cancelled*  cancelled*  cancelled*  cancelled*
forget -            in_flight   in_flight   in_flight   in_flight
requeue mine        in_flight   in_flight   in_flight   in_flight
requeue other       in_flight   in_flight   in_flight   in_flight
requeue same        already     already     already     already
discard mine        in_flight   in_flight   in_flight   in_flight
discard other       in_flight   in_flight   in_flight   in_flight
put new             stored*     stored*     stored*     stored*
put impostor        conflict    conflict    conflict    conflict
read -              found       found       found       found
follow -            found       found       found       found
locate -            found       found       found       found
browse line         page        page        page        page
browse results      page        page        page        page
sweep -             swept       swept       swept       swept
clear all           cleared     cleared     cleared     cleared
clear temporary     cleared     cleared     cleared     cleared
stats -             stats       stats       stats       stats
overview -          overview    overview    overview    overview
search any          page        page        page        page
claims -            page        page        page        page
inspect -           found       found       found       found
survey -            survey      survey      survey      survey
retain sticky       no_result   no_result   no_result   no_result
invalidate red      invalidated  invalidated  invalidated  invalidated
clear route         cleared     cleared     cleared     cleared
clear old           cleared     cleared     cleared     cleared
""", """
                    redirected  aliased
submit new          joined      hit
submit same         new         hit
submit again        joined      new*
submit impostor     conflict    conflict
start same          superseded  superseded
start other         superseded  superseded
start repeated      superseded  superseded
start own           superseded  superseded
take new            empty       empty
take repeated       spent       spent
admit mine          lost        lost
admit other         lost        lost
admit same          parked      parked
renew mine          lost        lost
renew other         lost        lost
emit mine           lost        lost
emit other          lost        lost
complete mine       lost        lost
complete other      lost        lost
fail mine           lost        lost
fail other          lost        lost
retry mine          lost        lost
retry other         lost        lost
retry same          already     already
release mine        lost        lost
release other       lost        lost
release same        already     already
conclude mine       lost        lost
conclude other      lost        lost
attend failure      already     already
attend quarantine   already     already
attend other        already     already
crash mine          alive       alive
crash other         alive       alive
crash clock         alive       alive
crash same          already     already
revive mine         alive       alive
revive other        alive       alive
revive same         already     already
redirect mine       already     already
redirect other      lost        lost
cancel -            cancelled*  ended
forget -            in_flight   forgotten*
requeue mine        in_flight   ended
requeue other       in_flight   ended
requeue same        already     already
discard mine        in_flight   ended
discard other       in_flight   ended
put new             stored*     stored*
put impostor        conflict    conflict
read -              found       found
follow -            found       found
locate -            found       found
browse line         page        page
browse results      page        page
sweep -             swept       swept
clear all           cleared     cleared*
clear temporary     cleared     cleared*
stats -             stats       stats
overview -          overview    overview
search any          page        page
claims -            page        page
inspect -           found       found
survey -            survey      survey
retain sticky       no_result   retained*
invalidate red      invalidated invalidated*
clear route         cleared     cleared*
clear old           cleared     cleared
""")
# fmt: on


def rows() -> Iterator[tuple[str, str, str, str, bool]]:
    for half in TABLE:
        head, *lines = half.strip().splitlines()
        for line in lines:
            verb, variant, *words = line.split()
            for state, word in zip(head.split(), words, strict=True):
                yield verb, variant, state, word.removesuffix("*"), word.endswith("*")


CASES = list(rows())
assert {state for _, _, state, _, _ in CASES} == set(STATES)

#: what is answered when exactly the same call is sent again after it changed something; others repeat their word
SECOND_WORD = {
    ("emit", "emitted"): "already",
    ("complete", "stored"): "already",
    ("fail", "failed"): "already",
    ("retry", "retried"): "already",
    ("release", "released"): "already",
    ("crash", "requeued"): "already",
    ("revive", "revived"): "already",
    ("conclude", "concluded"): "already",
    ("attend", "attended"): "already",
    ("redirect", "linked"): "already",
    ("cancel", "cancelled"): "ended",
    ("forget", "forgotten"): "unknown",
    ("requeue", "requeued"): "already",
    ("discard", "discarded"): "unknown",
}


@pytest.fixture
def rig(redis_client: redis.Redis) -> Rig:
    return Rig(redis_client)


def call_of(rig: Rig, verb: str, variant: str, seeded: Seeded) -> Call[Any]:
    """The call of a row of the table."""
    key, mine = seeded.key, seeded.attempt
    other = replace(mine, token=Token(int(mine.token) + 10**9))
    attempt = other if variant == "other" else mine
    ticket = rig.ticket(REQUEST)
    same = Ticket(seeded.job_id, ticket.commands, ticket.data) if rig.record(key) else ticket
    match verb, variant:
        case "submit", "impostor":
            return rig.submit(IMPOSTOR)
        case "submit", _:
            return rig.submit(REQUEST, same if variant == "same" else ticket, again=variant == "again")
        case "start", "repeated":
            return rig.start(key, seeded.job_id, seeded.execution)
        case "start", "own":
            return rig.start(key, seeded.job_id, own_list=rig.jobs.lists("arm")[REQUEST.priority])
        case "start", _:
            return rig.start(key, seeded.job_id if variant == "same" else ticket.job_id)
        case "take", _:
            return rig.take(seeded.execution if variant == "repeated" else "")
        case "admit", _:
            waits = rig.parking_ticket(attempt)
            return rig.admit(attempt, ticket=replace(waits, job_id=same.job_id) if variant == "same" else waits)
        case "renew", _:
            return rig.calls.renew(attempt, 2 * LEASE_MS)
        case "emit", _:
            return rig.calls.emit(attempt, 1, b"\x01")
        case "link", _:
            return rig.calls.link(key, "00-1-2-01")
        case "trace", _:
            return rig.calls.trace(attempt, "00-3-4-01")
        case "complete", _:
            return rig.complete(attempt)
        case "fail", _:
            return rig.fail(attempt)
        case "retry", _:
            return rig.retry(attempt, same if variant == "same" else ticket)
        case "release", _:
            return rig.calls.release(attempt, same if variant == "same" else ticket)
        case "conclude", _:
            return rig.calls.conclude(attempt)
        case "attend", _:
            kind = FollowUp.QUARANTINE if variant == "quarantine" else FollowUp.FAILURE
            return rig.attend(mine, kind, since=1 if variant == "other" else None)
        case "crash", _:
            token = None if variant == "clock" else attempt.token
            return rig.crash(key, token, same if variant == "same" else ticket)
        case "revive", _:
            lost = ticket.job_id if variant == "other" else seeded.job_id
            found = Overdue(key, REQUEST.uri, "arm", Priority.DEFAULT, job_id=lost)
            return rig.calls.revive(found, same if variant == "same" else rig.ticket(REQUEST))
        case "requeue", _:
            seen = ticket.job_id if variant == "other" else seeded.job_id
            return rig.requeue(key, seen, same if variant == "same" else rig.ticket(REQUEST))
        case "discard", _:
            return rig.discard(key, ticket.job_id if variant == "other" else seeded.job_id)
        case "redirect", _:
            rig.word(rig.submit(TARGET))
            return rig.redirect(attempt, TARGET.key)
        case "put", _:
            return rig.put(IMPOSTOR if variant == "impostor" else REQUEST, secrets.token_hex(8))
        case "read", _:
            return rig.calls.read(key, with_value=True)
        case "follow", _:
            return rig.calls.follow(key, "", 0)
        case "locate", _:
            return rig.calls.locate(key, "arm")
        case "browse", _:
            index = rig.named("results") if variant == "results" else rig.named("pending", queue="arm")
            return rig.calls.browse(index, 0, 10)
        case "sweep", _:
            return rig.calls.sweep("arm")
        case "clear", _:
            named, pattern = browse.on_route("/slow" if variant == "route" else "")
            age_ms = 3_600_000 if variant == "old" else 0
            return rig.calls.clear(temporary_only=variant == "temporary", route=named, pattern=pattern, age_ms=age_ms)
        case "stats", _:
            return rig.calls.stats()
        case "overview", _:
            return rig.calls.overview()
        case "search", _:
            return browse.search_call(rig.core, browse.PLACES[""])
        case "claims", _:
            return browse.claims_call(rig.core)
        case "inspect", _:
            return browse.inspect_call(rig.core, key)
        case "survey", _:
            return browse.survey_call(rig.core, 100)
        case "retain", _:
            return browse.retain_call(rig.core, key, None)
        case "invalidate", _:
            return browse.invalidate_call(rig.core, "red")
    simple: dict[str, Call[Any]] = {"cancel": rig.calls.cancel(key), "forget": rig.calls.forget(key)}
    return simple[verb]


def stored(rig: Rig) -> Snapshot:
    """All but the counters of submissions and refusals: a refusal counts, and counts again when it is repeated."""
    counters = [rig.named("stats", family="refusals"), rig.named("noted", family="submissions")]
    return without(snapshot(rig.client), *counters)


@pytest.mark.parametrize(
    ("verb", "variant", "state", "word", "writes"), CASES, ids=[f"{c[0]}-{c[1]}-{c[2]}" for c in CASES]
)
def test_each_script_in_each_state_answers_as_the_table_says(
    rig: Rig, verb: str, variant: str, state: str, word: str, writes: bool
) -> None:
    seeded = rig.seed(state, REQUEST)
    call = call_of(rig, verb, variant, seeded)
    before = stored(rig)

    assert rig.word(call) == word
    after = stored(rig)
    if writes:
        assert after != before
    else:
        assert after == before
    audit(rig.client, rig.keys)
    move(verb, STORED_STATE[state], rig.state(seeded.key))

    second = SECOND_WORD.get((verb, word), word)
    assert rig.word(call) == second
    if word == "renewed":
        after.pop(rig.named("leases"))  # the lease counts from the second renewal
        after.pop(rig.keys.status(seeded.key))
        assert after.items() <= stored(rig).items()
    else:
        assert stored(rig) == after


def move(verb: str, before: State, after: State) -> None:
    """A change of state is one that the model knows."""
    if before != after:
        assert after in MOVES[verb].get(before, ()), f"{verb} moves {before} to {after}"


#: model.TRANSITIONS, and what has more than one end there: dead claims that heal, put, clear
MOVES: dict[str, dict[State, set[State]]] = {
    verb: {before: {after} for before, after in moves.items()} for verb, moves in TRANSITIONS.items()
}
MOVES["submit"][State.IN_PROGRESS] = {State.PENDING, State.FAILED}
MOVES["crash"][State.IN_PROGRESS] = {State.PENDING, State.FAILED}
MOVES["put"] = {state: {State.COMPLETED} for state in State}
MOVES["clear"] = MOVES["invalidate"] = {State.COMPLETED: {State.UNKNOWN}}


@pytest.mark.parametrize(
    ("verb", "before", "after"),
    [(verb, before, after) for verb, moves in TRANSITIONS.items() for before, after in moves.items()],
)
def test_every_move_of_the_model_is_made(rig: Rig, verb: str, before: State, after: State) -> None:
    seen = set()
    for case_verb, variant, state, _, _ in CASES:
        if case_verb == verb and STORED_STATE[state] is before:
            rig.client.flushdb()
            seeded = rig.seed(state, REQUEST)
            rig.word(call_of(rig, verb, variant, seeded))
            seen.add(rig.state(seeded.key))
    assert after in seen


# -- the words that need more than a state


def _corrupt(rig: Rig) -> Call[Any]:
    rig.client.hset(rig.keys.status(rig.seed("pending", REQUEST).key), "state", "paused")
    return rig.submit(REQUEST)


def _refused(rig: Rig) -> Call[Any]:
    full = Rig(rig.client, max_pending=1)
    rig.seed("pending", "/another")
    return full.submit(REQUEST)


def _torn(rig: Rig) -> Call[Any]:
    attempt = rig.seed("mine", REQUEST).attempt
    encoded = chunked(rig)
    return rig.calls.complete(attempt, encoded, None, sticky=False, ttl_ms=0)


def _torn_put(rig: Rig) -> Call[Any]:
    return rig.calls.put(REQUEST, rig.core.identify(REQUEST), "owner", chunked(rig), None)


def _last_crash(rig: Rig) -> Call[Any]:
    seeded = rig.seed("mine", REQUEST)
    rig.client.hset(rig.keys.status(seeded.key), "crashes", rig.settings.max_attempts - 1)
    return rig.crash(seeded.key, seeded.attempt.token, rig.ticket(REQUEST))


def _foreign(rig: Rig) -> Call[Any]:
    lists = rig.jobs.lists("arm")
    rig.client.rpush(lists[1], "somebody-elses-job")
    return rig.take_any(lists, for_rq=True)


def _suspended(rig: Rig) -> Call[Any]:
    rig.client.set(rig.jobs.suspended, 1)
    rig.seed("pending", REQUEST)
    return rig.take_any(rig.jobs.lists("arm"), for_rq=True)


def _redirected(target: str) -> Callable[[Rig], Call[Any]]:
    def prepare(rig: Rig) -> Call[Any]:
        rig.seed(target, TARGET)
        return rig.redirect(rig.seed("mine", REQUEST).attempt, TARGET.key)

    return prepare


def _loop(rig: Rig) -> Call[Any]:
    target = rig.begin(TARGET)
    assert rig.word(rig.redirect(rig.begin(REQUEST), TARGET.key)) == "linked"
    return rig.redirect(target, REQUEST.key)


def _endless(rig: Rig) -> Call[Any]:
    attempt = rig.begin(BatchRequest("/0"))
    for n in range(1, 21):
        following = rig.begin(BatchRequest(f"/{n}"))
        assert rig.word(rig.redirect(attempt, following.key)) == "linked"
        attempt = following
    return rig.redirect(attempt, rig.begin(TARGET).key)


def chunked(rig: Rig) -> codec.Envelope:
    """The envelope of a result in three pieces, none of which is stored."""
    small = replace(rig.settings, inline_bytes=10, chunk_bytes=1_000)
    encoded = codec.encode(os.urandom(2_500), small)
    list(encoded.chunks())
    assert encoded.envelope.chunks == 3
    return encoded.envelope


#: (verb, word) -> how to bring it about, and what the repeat answers; None = it writes, so the repeat differs
def _emitted_before(rig: Rig) -> Call[Any]:
    attempt = rig.begin(REQUEST)
    assert [rig.word(rig.calls.emit(attempt, number, b"\x01")) for number in (1, 2)] == ["emitted", "emitted"]
    return rig.calls.emit(attempt, 1, b"\x01")


def _own(rig: Rig) -> Call[Any]:
    identity, traced = rig.core.identify(REQUEST), "00-1-2-01 vendor=1"
    assert rig.word(rig.calls.submit(REQUEST, identity, rig.ticket(REQUEST), trace=traced)) == "new"
    return rig.calls.link(identity.key, "00-1-2-01")


def _full(rig: Rig) -> Call[Any]:
    key = rig.seed("pending", REQUEST).key
    for n in range(100):
        assert rig.word(rig.calls.link(key, f"00-{n}-2-01")) == "left"
    return rig.calls.link(key, "00-100-2-01")


def _linked(rig: Rig) -> Call[Any]:
    attempt = rig.begin(REQUEST)
    assert rig.word(rig.calls.trace(attempt, "00-3-4-01")) == "traced"
    return rig.calls.link(attempt.key, "00-1-2-01")


def _spent(rig: Rig) -> Call[Any]:
    lists = rig.jobs.lists("arm")
    rig.seed("pending")
    attempt = rig.ask(rig.take_any(lists, "horse.1", for_rq=True)).attempt
    rig.reply(rig.complete(attempt))
    return rig.take_any(lists, "horse.1", for_rq=True)


SPECIAL: dict[tuple[str, str], tuple[Callable[[Rig], Call[Any]], str]] = {
    ("submit", "corrupt"): (_corrupt, "corrupt"),
    ("submit", "refused"): (_refused, "refused"),
    ("emit", "already"): (_emitted_before, "already"),
    ("link", "own"): (_own, "own"),
    ("link", "full"): (_full, "full"),
    ("link", "linked"): (_linked, "linked"),
    ("complete", "torn"): (_torn, "torn"),
    ("put", "torn"): (_torn_put, "torn"),
    ("redirect", "aliased"): (_redirected("completed"), "already"),
    ("redirect", "failed"): (_redirected("negative"), "already"),
    ("redirect", "cancelled"): (_redirected("cancelled"), "already"),
    ("redirect", "gone"): (_redirected("evicted"), "gone"),
    ("redirect", "loop"): (_loop, "loop"),
    ("redirect", "endless"): (_endless, "endless"),
    ("crash", "quarantined"): (_last_crash, "already"),
    ("take", "foreign"): (_foreign, "foreign"),
    ("take", "suspended"): (_suspended, "suspended"),
    ("take", "spent"): (_spent, "spent"),
}


@pytest.mark.parametrize(("verb", "word"), SPECIAL)
def test_each_word_that_needs_more_than_a_state_is_answered(rig: Rig, verb: str, word: str) -> None:
    prepare, second = SPECIAL[verb, word]
    call = prepare(rig)
    before = stored(rig)
    assert rig.word(call) == word
    after = stored(rig)
    assert (after == before) == (second == word), "a refusal writes nothing"
    assert rig.word(call) == second
    assert stored(rig) == after, "the same ids change nothing"


@pytest.mark.parametrize("known", all_scripts(), ids=lambda known: known.name)
def test_every_outcome_of_every_script_is_in_the_tables(known: Any) -> None:
    words = {word for verb, _, _, word, _ in CASES if verb == known.name}
    words |= {word for verb, word in SPECIAL if verb == known.name}
    assert words == known.outcomes


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
    rig.reply(rig.calls.retry(attempt, rig.ticket(request), delay_ms=1, kwargs=codec.pack({"a": 1}), error=ERROR))
    attempt = rig.ask(rig.take())
    rig.reply(rig.calls.renew(attempt, LEASE_MS, b'{"fraction": 0.5, "message": ""}'))
    assert rig.word(rig.complete(attempt)) == "stored"
    assert rig.record(request.key).keys() == {
        "state", "uri", "request", "job_id", "queue", "priority", "sticky", "est_ms", "submitted_ms", "started_ms",
        "ended_ms", "attempts", "retries", "worker", "done_token",
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


# -- hits


def expiry(rig: Rig, key: Key) -> set[int]:
    """The moments at which the record and the result of a request expire."""
    return {rig.client.pexpiretime(rig.keys.status(key)), rig.client.pexpiretime(rig.named("result", key=key))}


def test_a_hit_makes_a_result_sticky_and_no_hit_makes_it_temporary_again(rig: Rig) -> None:
    seeded = rig.seed("completed")
    assert rig.word(rig.submit(BatchRequest("/slow", sticky=True))) == "hit"
    assert expiry(rig, seeded.key) == {-1}
    audit(rig.client, rig.keys)
    before = stored(rig)
    for weaker in (BatchRequest("/slow"), BatchRequest("/slow", ttl=1), BatchRequest("/slow", ttl=10**8)):
        assert rig.word(rig.submit(weaker)) == "hit"
    assert stored(rig) == before


def test_a_hit_lengthens_the_life_of_a_result_and_never_shortens_it(rig: Rig) -> None:
    seeded = rig.seed("completed")
    (first,) = expiry(rig, seeded.key)
    assert rig.word(rig.submit(BatchRequest("/slow", ttl=10))) == "hit"
    assert expiry(rig, seeded.key) == {first}
    assert rig.word(rig.submit(BatchRequest("/slow", ttl=2 * 86_400))) == "hit"
    ended = int(rig.record(seeded.key)["ended_ms"])
    assert expiry(rig, seeded.key) == {ended + 2 * 86_400_000}
    audit(rig.client, rig.keys)


def test_a_hit_upgrades_every_piece_of_a_large_result(redis_client: redis.Redis) -> None:
    rig = Rig(redis_client, inline_bytes=10, chunk_bytes=1_000)
    rig.run(flows.put(rig.core, "/big", os.urandom(2_500)))
    assert rig.word(rig.submit(BatchRequest("/big", sticky=True))) == "hit"
    audit(rig.client, rig.keys)
    assert {rig.client.pexpiretime(name) for name in rig.client.keys("arm:chunk:*")} == {-1}


# -- TTLs


@pytest.mark.parametrize(
    ("asked_s", "route_ms", "life_ms"), [(None, 0, 86_400_000), (None, 60_000, 60_000), (30, 60_000, 30_000)]
)
def test_the_request_the_route_and_the_manager_say_in_this_order_how_long_a_result_lives(
    rig: Rig, asked_s: float | None, route_ms: int, life_ms: int
) -> None:
    request = BatchRequest("/slow", ttl=asked_s)
    attempt = rig.begin(request)
    rig.reply(rig.complete(attempt, ttl_ms=route_ms))
    assert expiry(rig, request.key) == {int(rig.record(request.key)["ended_ms"]) + life_ms}


def test_a_ttl_that_a_request_asks_for_wins_over_a_sticky_route(rig: Rig) -> None:
    attempt = rig.begin(BatchRequest("/slow", ttl=30))
    rig.reply(rig.complete(attempt, sticky=True))
    assert rig.record(attempt.key)["sticky"] == "0"
    audit(rig.client, rig.keys)


def test_nothing_expires_before_the_end_and_all_of_a_result_at_one_moment(redis_client: redis.Redis) -> None:
    rig = Rig(redis_client, inline_bytes=10, chunk_bytes=1_000)
    seeded = rig.seed("mine")
    rig.reply(rig.submit(seeded.request, payload=b"p"))
    in_flight = {name: entry[2] for name, entry in snapshot(rig.client).items() if name.startswith("arm:")}
    assert set(in_flight.values()) == {-1}
    rig.run(flows.finish(rig.core, seeded.attempt, os.urandom(2_500)))
    deadline = {entry[2] for name, entry in snapshot(rig.client).items() if str(seeded.key) in name}
    assert len(deadline) == 1
    assert len(rig.client.keys("arm:chunk:*")) == 3
    assert deadline == expiry(rig, seeded.key)
    audit(rig.client, rig.keys)


@pytest.mark.parametrize("state", ["completed", "evicted", "failed", "cancelled"])
def test_a_new_claim_after_an_end_expires_no_more(rig: Rig, state: str) -> None:
    seeded = rig.seed(state)
    if state == "failed":
        assert rig.client.pttl(rig.keys.status(seeded.key)) > 0
    assert rig.word(rig.submit(seeded.request, again=True)) == "new"
    audit(rig.client, rig.keys)
    assert not rig.client.exists(rig.named("result", key=seeded.key))


@pytest.mark.parametrize("how", ["submit", "ticket"])
def test_payloads_of_a_failed_request_outlive_it_when_it_runs_again(rig: Rig, how: str) -> None:
    seeded = rig.seed("mine")
    rig.reply(rig.submit(seeded.request, payload=b"p"))
    rig.reply(rig.fail(seeded.attempt))
    callbacks = rig.named("callbacks", key=seeded.key)
    assert rig.client.pttl(callbacks) > 0
    rig.reply(rig.submit(seeded.request) if how == "submit" else rig.start(seeded.key, seeded.job_id))
    assert rig.client.pttl(callbacks) == -1
    assert rig.client.hgetall(callbacks) == {b"p": b"p"}
    audit(rig.client, rig.keys, lost=[seeded.key])


def test_a_failed_record_outlives_its_negative_answer(rig: Rig) -> None:
    attempt = rig.begin(BatchRequest("/slow"))
    rig.reply(rig.calls.fail(attempt, ERROR, failure_ttl_ms=1_000, negative_ms=3_600_000))
    assert rig.client.pttl(rig.keys.status(attempt.key)) > 3_000_000


def test_an_evicted_sticky_result_leaves_the_indexes_with_the_next_claim(rig: Rig) -> None:
    seeded = rig.seed("sticky")
    rig.evict(seeded.key)
    assert rig.word(rig.submit(seeded.request)) == "new"
    assert rig.client.zcard(rig.named("results")) == 0
    rig.reply(rig.fail(rig.ask(rig.take())))
    stats = rig.ask(rig.calls.stats())
    assert (stats.sticky, stats.bytes) == (0, 0)
    audit(rig.client, rig.keys)


# -- large results


def test_a_torn_result_is_refused_and_leaves_the_attempt_as_it_was(redis_client: redis.Redis) -> None:
    rig = Rig(redis_client, inline_bytes=10, chunk_bytes=1_000)
    seeded = rig.seed("mine")
    staged = []
    flow = flows.finish(rig.core, seeded.attempt, os.urandom(2_500))
    step = flow.send(None)
    while not isinstance(step, Call):
        staged.append(step)
        step = flow.send(rig.ask(step))
    rig.client.delete(staged[1].argv[1])
    before = stored(rig)
    with pytest.raises(RqarmError, match="1 pieces"):
        rig.ask(step)
    assert stored(rig) == before
    rig.ask(staged[1])
    assert rig.word(step) == "stored", "written again, it is committed"


def test_a_new_result_takes_the_pieces_of_the_old_one_with_it(redis_client: redis.Redis) -> None:
    rig = Rig(redis_client, inline_bytes=10, chunk_bytes=1_000)
    rig.run(flows.put(rig.core, "/big", os.urandom(2_500)))
    old = set(rig.client.keys("arm:chunk:*"))
    rig.run(flows.put(rig.core, "/big", os.urandom(1_500)))
    assert not old & set(rig.client.keys("arm:chunk:*"))
    audit(rig.client, rig.keys)
    rig.run(flows.forget(rig.core, BatchRequest("/big").key))
    assert rig.client.keys("arm:chunk:*") == []
    audit(rig.client, rig.keys)


@pytest.mark.parametrize("value", ["small", b"x" * 200])
def test_a_put_sent_again_counts_its_bytes_once(redis_client: redis.Redis, value: Any) -> None:
    rig = Rig(redis_client)
    call = rig.put(REQUEST, "owner", value)
    rig.reply(call)
    once = rig.ask(rig.calls.stats()).bytes
    assert once > 0
    rig.reply(call)
    assert rig.ask(rig.calls.stats()).bytes == once
    audit(rig.client, rig.keys)


# -- tokens


def test_tokens_rise_from_attempt_to_attempt_and_over_flushdb(rig: Rig) -> None:
    tokens = []
    for round_ in range(4):
        attempt = rig.begin(BatchRequest("/slow"))
        tokens.append(int(attempt.token))
        rig.reply(rig.calls.release(attempt, rig.front_ticket(attempt.request)))
        tokens.append(int(rig.ask(rig.take()).token))
        if round_ % 2:
            rig.client.flushdb()
        else:
            rig.reply(rig.calls.cancel(attempt.key))
            rig.reply(rig.calls.forget(attempt.key))
    assert tokens == sorted(set(tokens))


def test_tokens_rise_also_when_the_clock_has_been_ahead(rig: Rig) -> None:
    ahead = server_ms(rig.client) * 1000 + 3_600_000_000
    rig.client.set(rig.named("seq"), ahead)
    first = rig.begin(BatchRequest("/a")).token
    second = rig.begin(BatchRequest("/b")).token
    assert ahead < first < second


@pytest.mark.parametrize("verb", ["renew", "complete", "fail", "retry", "release"])
def test_a_zombie_is_told_so_and_changes_nothing(rig: Rig, verb: str) -> None:
    seeded = rig.seed("mine")
    rig.lapse(seeded.key)
    assert rig.run(flows.sweep(rig.core)) == 1
    rig.client.hdel(rig.keys.status(seeded.key), "due_ms")
    assert rig.word(rig.submit(seeded.request, again=True)) == "joined"
    ticket = rig.record(seeded.key)["job_id"]
    assert isinstance(rig.ask(rig.start(seeded.key, ticket, worker="another")), Attempt)
    before = stored(rig)
    with pytest.raises(LeaseLost) as caught:
        rig.ask(call_of(rig, verb, "mine", seeded))
    assert caught.value.state == "in_progress"
    assert stored(rig) == before


# -- take


def test_take_gives_high_before_default_before_low_and_each_in_order(rig: Rig) -> None:
    for uri, priority in (("/l", "low"), ("/d1", "default"), ("/h", "high"), ("/d2", "default")):
        rig.seed("pending", BatchRequest(uri, priority=priority))
    assert [rig.ask(rig.take()).request.uri for _ in range(4)] == ["/h", "/d1", "/d2", "/l"]
    audit(rig.client, rig.keys)


def test_a_job_of_somebody_else_is_not_taken_and_what_stands_behind_it_waits(rig: Rig) -> None:
    (_, default, _) = rig.jobs.lists("arm")
    rig.client.rpush(default, "somebody-elses-job")
    rig.seed("pending")
    before = stored(rig)
    assert isinstance(rig.ask(rig.take()), str)
    rig.client.lset(default, 0, "lookalike-0123abcd")
    rig.client.hset(f"{rig.jobs.job_prefix}lookalike-0123abcd", mapping={"status": "queued", "data": "not ours"})
    assert isinstance(rig.ask(rig.take()), str)
    assert len(stored(rig)[default][1]) == len(before[default][1])


def test_the_ticket_of_a_forgotten_request_does_not_block_the_queue(rig: Rig) -> None:
    seeded = rig.seed("cancelled")
    assert rig.word(rig.calls.forget(seeded.key)) == "forgotten"
    behind = rig.seed("pending", "/behind")
    attempt = rig.ask(rig.take())
    assert isinstance(attempt, Attempt)
    assert attempt.key == behind.key
    assert not rig.client.exists(f"{rig.jobs.job_prefix}{seeded.job_id}")


def test_the_ticket_of_another_namespace_stays_in_a_shared_queue(redis_client: redis.Redis) -> None:
    ours, theirs = Rig(redis_client), Rig(redis_client, namespace="their")
    waiting = theirs.seed("pending")
    assert isinstance(ours.ask(ours.take()), str)
    assert theirs.waiting() == [[], [waiting.job_id], []]
    assert isinstance(theirs.ask(theirs.take()), Attempt)


def test_for_an_rq_worker_a_job_of_somebody_else_is_the_next_one(rig: Rig) -> None:
    high, default, _ = lists = rig.jobs.lists("arm")
    rig.client.rpush(high, "somebody-elses-job")
    seeded = rig.seed("pending")
    taken = rig.ask(rig.take_any(lists, for_rq=True))
    assert (taken.attempt, taken.reason, taken.list) == (None, "foreign", high)
    rig.client.delete(high)
    taken = rig.ask(rig.take_any(lists, for_rq=True))
    assert (taken.attempt.key, taken.list) == (seeded.key, default)


def test_a_ticket_whose_record_somebody_else_has_written_is_left_to_rqs_way(rig: Rig) -> None:
    seeded = rig.seed("pending")
    _, default, _ = lists = rig.jobs.lists("arm")
    rig.client.set(rig.keys.status(seeded.key), "somebody else's")
    before = stored(rig)
    taken = rig.ask(rig.take_any(lists, for_rq=True))
    assert (taken.attempt, taken.reason, taken.list) == (None, "foreign", default)
    assert stored(rig) == before


def test_the_rq_job_of_what_an_rq_worker_takes_lies_there_until_the_attempt_ends(rig: Rig) -> None:
    for end in ("complete", "retry", "release"):
        seeded = rig.seed("pending", f"/{end}")
        (job_id,) = rig.waiting()[1]
        attempt = rig.ask(rig.take_any(rig.jobs.lists("arm"), for_rq=True)).attempt
        assert (attempt.key, attempt.job_id, attempt.owns_job) == (seeded.key, job_id, True)
        assert rig.client.hget(f"{rig.jobs.job_prefix}{job_id}", "status") == b"queued"
        ticket = rig.ticket(attempt.request)
        call = {
            "complete": lambda attempt=attempt: rig.complete(attempt),
            "retry": lambda attempt=attempt, ticket=ticket: rig.retry(attempt, ticket),
            "release": lambda attempt=attempt, ticket=ticket: rig.calls.release(attempt, ticket),
        }[end]()
        rig.reply(call)
        assert not rig.client.exists(f"{rig.jobs.job_prefix}{job_id}")
        rig.client.delete(*rig.jobs.lists("arm"))


def test_a_second_ticket_of_what_an_rq_worker_runs_does_not_cost_it_its_job(rig: Rig) -> None:
    rig.seed("pending")
    (job_id,) = rig.waiting()[1]
    lists = rig.jobs.lists("arm")
    assert rig.ask(rig.take_any(lists, for_rq=True)).attempt is not None
    rig.client.rpush(lists[1], job_id)
    assert rig.ask(rig.take_any(lists, for_rq=True)).reason == "empty"
    assert rig.client.exists(f"{rig.jobs.job_prefix}{job_id}")


def test_an_rq_worker_that_is_suspended_takes_nothing(rig: Rig) -> None:
    rig.seed("pending")
    lists = rig.jobs.lists("arm")
    rig.client.set(rig.jobs.suspended, 1)
    before = stored(rig)
    assert rig.ask(rig.take_any(lists, for_rq=True)).reason == "suspended"
    assert stored(rig) == before
    assert isinstance(rig.ask(rig.take()), Attempt), "the pull interface is no worker of RQ"


def test_a_take_without_lists_finds_only_what_the_same_execution_took(rig: Rig) -> None:
    """How the parent of a dead process learns what that had taken."""
    seeded = rig.seed("pending")
    lists = rig.jobs.lists("arm")
    assert rig.ask(rig.take_any((), "horse.1", for_rq=True)).attempt is None
    attempt = rig.ask(rig.take_any(lists, "horse.1", for_rq=True)).attempt
    rig.client.set(rig.jobs.suspended, 1)
    found = rig.ask(rig.take_any((), "horse.1", for_rq=True))
    assert (found.attempt.key, found.attempt.token, found.list) == (seeded.key, attempt.token, "")
    assert rig.ask(rig.take_any((), "horse.2", for_rq=True)).attempt is None


@pytest.mark.parametrize("end", ["complete", "fail", "release", "cancel"])
def test_an_execution_starts_once(rig: Rig, end: str) -> None:
    """A take of it that was sent before, behind an empty list, may come when what it is for has ended."""
    lists = rig.jobs.lists("arm")
    rig.seed("pending", "/first")
    attempt = rig.ask(rig.take_any(lists, "horse.1", for_rq=True)).attempt
    rig.seed("pending", "/second")
    ends = {
        "complete": lambda: rig.complete(attempt),
        "fail": lambda: rig.fail(attempt),
        "release": lambda: rig.calls.release(attempt, rig.front_ticket(attempt.request)),
        "cancel": lambda: rig.calls.cancel(attempt.key),
    }
    rig.reply(ends[end]())
    before = stored(rig)
    assert rig.ask(rig.take_any(lists, "horse.1", for_rq=True)).reason == "spent"
    assert rig.ask(rig.take_any(lists, "horse.1", for_rq=True, is_last=True)).reason == "spent"
    assert stored(rig) == before, "a refusal writes nothing"
    assert rig.ask(rig.take_any(lists, "horse.2", for_rq=True)).attempt is not None


def test_an_execution_starts_nothing_behind_a_later_one_of_its_taker(rig: Rig) -> None:
    """It may have waited behind another list for as long as that was empty, while the worker was busy with this one."""
    lists = rig.jobs.lists("arm")
    for number in (2, 10):
        rig.seed("pending", f"/{number}")
        rig.reply(rig.complete(rig.ask(rig.take_any(lists, f"horse.{number}", for_rq=True)).attempt))
    rig.seed("pending", "/waits")
    before = stored(rig)
    for is_last in (False, True):
        assert rig.ask(rig.take_any(lists, "horse.2", for_rq=True, is_last=is_last)).reason == "spent"
    assert stored(rig) == before, "a refusal writes nothing"
    assert rig.ask(rig.take_any(lists, "other.2", for_rq=True)).attempt is not None


def test_an_execution_that_is_given_up_starts_nothing(rig: Rig) -> None:
    """Whichever comes first, what a dead horse has sent or the question of its parent: nothing is taken in between."""
    lists = rig.jobs.lists("arm")
    assert rig.ask(rig.take_any((), "horse.1", for_rq=True, is_last=True)).reason == "empty"
    rig.seed("pending")
    assert rig.ask(rig.take_any(lists, "horse.1", for_rq=True)).reason == "spent"
    attempt = rig.ask(rig.take_any(lists, "horse.2", for_rq=True)).attempt
    found = rig.ask(rig.take_any((), "horse.2", for_rq=True, is_last=True))
    assert found.attempt.token == attempt.token


def test_two_takers_of_one_worker_do_not_forget_each_other(rig: Rig) -> None:
    rig.seed("pending", "/a")
    rig.seed("pending", "/b")
    lists = rig.jobs.lists("arm")
    calls = [rig.calls.take(lists, f"x.{lane}", f"w/{lane}", "w", 60_000, for_rq=True) for lane in (0, 1)]
    first = [rig.ask(call).attempt.key for call in calls]
    again = [rig.ask(call).attempt.key for call in calls]
    assert first == again
    assert len(set(first)) == 2


@pytest.mark.parametrize("state", ["failed", "quarantined"])
def test_the_ticket_of_a_failed_request_starts_it_anew_for_a_taker_too(rig: Rig, state: str) -> None:
    """What `rq requeue` does."""
    seeded = rig.seed(state)
    rig.client.hset(rig.keys.status(seeded.key), mapping={"crashes": 2, "retries": 1})
    job_id = rig.record(seeded.key)["job_id"]
    (_, default, _) = rig.jobs.lists("arm")
    rig.client.delete(default)
    rig.client.rpush(default, job_id)
    attempt = rig.ask(rig.take_any(rig.jobs.lists("arm"), for_rq=True)).attempt
    assert (attempt.key, attempt.crashes, attempt.retries, attempt.job_id) == (seeded.key, 0, 0, job_id)
    assert rig.client.ttl(rig.keys.status(seeded.key)) == -1
    rig.reply(rig.complete(attempt))
    audit(rig.client, rig.keys)


def test_a_duplicate_ticket_starts_nothing(rig: Rig) -> None:
    seeded = rig.seed("pending")
    (_, default, _) = rig.jobs.lists("arm")
    rig.client.rpush(default, seeded.job_id, seeded.job_id)
    assert isinstance(rig.ask(rig.take()), Attempt)
    assert isinstance(rig.ask(rig.take()), str)
    assert rig.word(rig.start(seeded.key, seeded.job_id)) == "superseded"
    assert rig.record(seeded.key)["attempts"] == "1"


def test_a_retry_with_new_arguments_hands_them_to_the_next_attempt(rig: Rig) -> None:
    seeded = rig.seed("mine")
    kwargs = codec.pack({"page": 2})
    rig.reply(rig.retry(seeded.attempt, rig.ticket(seeded.request), kwargs=kwargs))
    again = rig.ask(rig.take())
    assert (again.kwargs, again.number, again.retries) == ({"page": 2}, 2, 1)
    rig.reply(rig.retry(again, rig.ticket(seeded.request)))
    assert rig.ask(rig.take()).kwargs == {"page": 2}


def test_a_released_attempt_counts_for_nothing_and_is_next(rig: Rig) -> None:
    first = rig.seed("mine", "/first")
    rig.seed("pending", "/second")
    rig.reply(rig.calls.release(first.attempt, rig.front_ticket(first.request)))
    assert rig.line()[0] == first.key
    again = rig.ask(rig.take())
    assert (again.key, again.number, again.retries, again.crashes) == (first.key, 1, 0, 0)


# -- dead claims


def heal(rig: Rig) -> int:
    return int(rig.run(flows.sweep(rig.core)))


def test_a_lapsed_lease_is_found_and_queued_again_once(rig: Rig) -> None:
    seeded = rig.seed("lapsed")
    assert heal(rig) == 1
    assert heal(rig) == 0
    record = rig.record(seeded.key)
    assert (record["state"], record["crashes"]) == ("pending", "1")
    assert "due_ms" in record, "a crash waits before it runs again"
    audit(rig.client, rig.keys)


def test_a_lease_that_has_not_lapsed_is_left_alone(rig: Rig) -> None:
    rig.seed("mine")
    before = stored(rig)
    assert heal(rig) == 0
    assert stored(rig) == before


def test_a_submit_takes_over_a_lapsed_lease_at_once(rig: Rig) -> None:
    seeded = rig.seed("lapsed")
    assert rig.word(rig.submit(seeded.request)) == "new"
    attempt = rig.ask(rig.take())
    assert (attempt.number, attempt.crashes) == (2, 1)
    audit(rig.client, rig.keys)


@pytest.mark.parametrize("how", ["crash", "sweep", "submit"])
def test_a_request_that_kills_its_workers_is_set_aside_after_max_attempts(rig: Rig, how: str) -> None:
    seeded = rig.seed("mine")
    words = []
    for n in range(rig.settings.max_attempts):
        if n:
            ticket = rig.record(seeded.key)["job_id"]
            assert isinstance(rig.ask(rig.start(seeded.key, ticket)), Attempt)
        token = Token(int(rig.record(seeded.key)["token"]))
        if how == "crash":
            words.append(rig.word(rig.crash(seeded.key, token, rig.ticket(seeded.request))))
            continue
        rig.lapse(seeded.key)
        words.append(str(heal(rig)) if how == "sweep" else rig.word(rig.submit(seeded.request)))
    assert (
        words
        == {
            "crash": ["requeued", "requeued", "quarantined"],
            "sweep": ["1", "1", "1"],
            "submit": ["new", "new", "negative"],
        }[how]
    )
    status = rig.ask(rig.calls.read(seeded.key, with_value=False)).status
    assert (status.state, status.quarantined) == (State.FAILED, True)
    assert status.error is not None
    assert rig.record(seeded.key)["crashes"] == "3"
    assert rig.ask(rig.calls.stats()).executions["crashed"] == 3
    assert rig.ask(rig.calls.stats()).quarantined == 1
    audit(rig.client, rig.keys)
    assert rig.word(rig.submit(seeded.request)) == "negative"
    assert rig.word(rig.submit(seeded.request, again=True)) == "new", "asked for by name, it gets a new life"
    assert rig.ask(rig.take()).crashes == 0


def test_a_damaged_lease_is_shortened_to_one_lease_and_counted(rig: Rig) -> None:
    seeded = rig.seed("mine")
    rig.set_lease(seeded.key, server_ms(rig.client) + 10 * LEASE_MS)
    assert heal(rig) == 0
    left = int(rig.record(seeded.key)["lease_until"]) - server_ms(rig.client)
    assert 0 < left <= LEASE_MS
    assert rig.ask(rig.calls.stats()).sweeps == {"clamped": 1}
    audit(rig.client, rig.keys)
    rig.lapse(seeded.key)
    assert heal(rig) == 1


def test_an_index_entry_without_its_record_is_tidied(rig: Rig) -> None:
    running, waiting = rig.seed("mine"), rig.seed("pending", BatchRequest("/waits", estimated_time=5))
    rig.client.delete(rig.keys.status(running.key), rig.keys.status(waiting.key))
    rig.lapse(Key("never-was"))
    rig.client.delete(rig.keys.status(Key("never-was")))
    rig.client.zadd(rig.named("leases"), {str(running.key): 1})
    assert heal(rig) == 0
    for kind in ("leases", "pending", "load"):
        name = rig.named(kind, queue="arm") if kind != "leases" else rig.named(kind)
        assert not rig.client.exists(name), f"{kind} is left"


def lose_job(rig: Rig, seeded: Seeded) -> None:
    rig.client.delete(f"{rig.jobs.job_prefix}{seeded.job_id}")


def lose_list(rig: Rig, seeded: Seeded) -> None:
    rig.client.delete(*rig.jobs.lists("arm"))


def rq_empty(rig: Rig, seeded: Seeded) -> None:
    from rq import Queue

    Queue("arm", connection=rig.client).empty()


def popped(rig: Rig, seeded: Seeded) -> None:
    rig.client.lpop(rig.jobs.lists("arm")[1])
    rig.client.hset(f"{rig.jobs.job_prefix}{seeded.job_id}", "status", "started")


def flush_rq(rig: Rig, seeded: Seeded) -> None:
    rig.client.delete(*rig.client.keys("rq:*"))


LOSSES = [lose_job, lose_list, rq_empty, popped, flush_rq]


@pytest.mark.parametrize("lose", LOSSES)
def test_a_request_whose_ticket_is_lost_gets_one_new_ticket_in_a_lease(
    rig: Rig, lose: Callable[[Rig, Seeded], None]
) -> None:
    seeded = rig.seed("pending")
    lose(rig, seeded)
    assert heal(rig) == 0, "patience: a worker may have it in hand"
    rig.age(seeded.key)
    assert heal(rig) == 1
    audit(rig.client, rig.keys)
    assert heal(rig) == 0
    assert rig.word(rig.start(seeded.key, seeded.job_id)) == "superseded"
    assert isinstance(rig.ask(rig.start(seeded.key, rig.record(seeded.key)["job_id"])), Attempt)


@pytest.mark.parametrize("verb", ["retry", "release", "crash", "revive", "submit"])
def test_the_job_of_a_replaced_ticket_does_not_stay_for_ever(rig: Rig, verb: str) -> None:
    """Who popped it may have died before telling RQ; then nobody else deletes it."""
    seeded = rig.seed("pending", REQUEST)
    assert rig.client.ttl(f"{rig.jobs.job_prefix}{seeded.job_id}") == -1
    if verb != "revive":
        seeded = replace(seeded, attempt=rig.ask(rig.start(seeded.key, seeded.job_id)))
    if verb == "submit":
        rig.lapse(seeded.key)
    rig.reply(call_of(rig, verb, "mine", seeded))
    current = rig.record(seeded.key)["job_id"]
    assert current != seeded.job_id
    assert rig.client.ttl(f"{rig.jobs.job_prefix}{current}") == -1
    assert 0 < rig.client.ttl(f"{rig.jobs.job_prefix}{seeded.job_id}") <= 86_400


def test_the_end_that_rq_gave_a_replaced_ticket_stays(rig: Rig) -> None:
    seeded = rig.seed("pending")
    attempt = rig.ask(rig.start(seeded.key, seeded.job_id))
    rig.client.expire(f"{rig.jobs.job_prefix}{seeded.job_id}", 60)
    rig.reply(rig.calls.release(attempt, rig.front_ticket(seeded.request)))
    assert 0 < rig.client.ttl(f"{rig.jobs.job_prefix}{seeded.job_id}") <= 60


@pytest.mark.parametrize("lose", [lose_job, rq_empty, flush_rq])
def test_a_submit_gives_a_dead_claim_a_ticket_at_once(rig: Rig, lose: Callable[[Rig, Seeded], None]) -> None:
    seeded = rig.seed("pending")
    lose(rig, seeded)
    assert rig.word(rig.submit(seeded.request)) == "new"
    audit(rig.client, rig.keys)
    assert rig.word(rig.submit(seeded.request)) == "joined"
    assert rig.ask(rig.take()).key == seeded.key


def test_a_deleted_list_with_300_in_line_is_filled_again_each_once_and_in_order(rig: Rig) -> None:
    seeded = [rig.seed("pending", f"/{n}") for n in range(300)]
    lose_list(rig, seeded[0])
    for each in seeded:
        rig.age(each.key)
    assert heal(rig) == 300
    assert [entry.rpartition("-")[0] for entry in rig.waiting()[1]] == [each.key for each in seeded]
    audit(rig.client, rig.keys)
    assert heal(rig) == 0


def test_two_sweeps_at_once_push_each_lost_ticket_once(rig: Rig) -> None:
    for n in range(3):
        rig.age(rig.seed("pending", f"/{n}").key)
    lose_list(rig, Seeded(REQUEST, "", "", None))  # type: ignore[arg-type]
    lapsed = rig.seed("lapsed", "/lapsed")
    for n in range(3):
        rig.age(BatchRequest(f"/{n}").key)
    lose_list(rig, lapsed)
    both = [flows.sweep(rig.core), flows.sweep(rig.core)]
    healed, answers = 0, [rig.ask(flow.send(None)) for flow in both]
    for flow, answer in zip(both, answers, strict=True):
        step = flow.send(answer)
        while True:
            try:
                step = flow.send(rig.ask(step))
            except StopIteration as end:
                healed += end.value
                break
    assert healed == 4
    assert len(rig.waiting()[1]) == 3
    audit(rig.client, rig.keys)


def test_a_request_that_waits_for_its_delay_is_not_pushed_before(rig: Rig) -> None:
    seeded = rig.seed("scheduled")
    rig.age(seeded.key)
    before = stored(rig)
    assert heal(rig) == 0
    assert stored(rig) == before
    rig.client.hset(rig.keys.status(seeded.key), "due_ms", server_ms(rig.client) - 3_600_000)
    assert heal(rig) == 1, "no scheduler runs: the sweep delivers"
    audit(rig.client, rig.keys)


def test_the_oldest_of_too_many_quarantined_requests_go(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqarm.calls.QUARANTINE_KEPT", 2)
    seeded = [rig.seed("quarantined", f"/{n}") for n in range(4)]
    for n, each in enumerate(seeded):
        rig.client.zadd(rig.named("quarantine"), {str(each.key): n})
    heal(rig)
    assert [rig.state(each.key) for each in seeded] == [State.UNKNOWN, State.UNKNOWN, State.FAILED, State.FAILED]
    audit(rig.client, rig.keys)


def test_a_result_that_has_expired_leaves_the_indexes_with_a_sweep(rig: Rig) -> None:
    seeded = rig.seed("completed")
    # due: the record and the result went at their TTL, the index has to follow
    rig.client.delete(rig.keys.status(seeded.key), rig.named("result", key=seeded.key))
    rig.client.zadd(rig.named("results"), {str(seeded.key): 1})
    heal(rig)
    assert rig.client.zcard(rig.named("results")) == 0
    stats = rig.ask(rig.calls.stats())
    assert (stats.temporary, stats.bytes) == (0, 0)
    audit(rig.client, rig.keys)


# -- position and eta


class Line:
    """A queue as three lists: what position and eta should be."""

    def __init__(self) -> None:
        self.lists: tuple[list[str], ...] = ([], [], [])
        self.estimates: dict[str, int] = {}

    def order(self) -> list[str]:
        return [uri for waiting in self.lists for uri in waiting]

    def drop(self, uri: str) -> None:
        for waiting in self.lists:
            if uri in waiting:
                waiting.remove(uri)


LINE_STEPS = st.tuples(
    st.sampled_from(["submit", "submit", "submit", "submit", "take", "cancel"]),
    st.integers(0, 7),
    st.sampled_from(Priority),
    st.integers(0, 90),
)


@given(steps=st.lists(LINE_STEPS, min_size=10, max_size=40))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_position_and_eta_are_those_of_a_naive_model(server: embedded.PrivateServer, steps: list[Any]) -> None:
    with connect.open_client(server.url) as client:
        client.flushdb()
        rig, line = Rig(client), Line()
        for verb, n, priority, estimate in steps:
            uri = f"/{n}"
            if verb == "submit":
                submit_in_line(rig, line, uri, priority, estimate)
            elif verb == "cancel":
                rig.reply(rig.calls.cancel(BatchRequest(uri).key))
                line.drop(uri)
            else:
                attempt = rig.ask(rig.take())
                first = line.order()[:1]
                assert [attempt.request.uri] == first if isinstance(attempt, Attempt) else not first
                if isinstance(attempt, Attempt):
                    line.drop(attempt.request.uri)
                    rig.reply(rig.calls.cancel(attempt.key))
        ahead = 0
        for position, uri in enumerate(line.order(), 1):
            status = rig.ask(rig.calls.locate(BatchRequest(uri).key, "arm"))
            assert status.position == position
            estimate = line.estimates[uri]
            assert status.eta == (ahead + estimate if estimate else None)
            ahead += estimate
        audit(client, rig.keys)


def submit_in_line(rig: Rig, line: Line, uri: str, priority: Priority, estimate: int) -> None:
    word = rig.word(rig.submit(BatchRequest(uri, priority=priority, estimated_time=estimate)))
    if word == "new":
        line.estimates[uri] = estimate
        line.lists[priority].append(uri)
    else:
        assert word == "joined"
        now_at = next(rank for rank, waiting in enumerate(line.lists) if uri in waiting)
        if priority < now_at:
            line.drop(uri)
            line.lists[priority].append(uri)


def test_the_eta_stays_exact_over_the_blocks_of_the_sums(rig: Rig) -> None:
    requests = [BatchRequest(f"/{n}", estimated_time=n % 7 + 1) for n in range(400)]
    for request in requests:
        rig.reply(rig.submit(request))
    for n in range(0, 400, 3):
        rig.reply(rig.calls.cancel(requests[n].key))
    left = [request for n, request in enumerate(requests) if n % 3]
    ahead = list(itertools.accumulate(request.estimated_time or 0 for request in left))
    for n in (0, 1, 84, 85, 86, 170, 171, 265):
        status = rig.ask(rig.calls.locate(left[n].key, "arm"))
        assert (status.position, status.eta) == (n + 1, ahead[n])
    audit(rig.client, rig.keys)


def test_a_request_that_comes_back_after_the_line_was_empty_stands_before_those_that_came_since(rig: Rig) -> None:
    for n in range(5):
        rig.seed("pending", BatchRequest(f"/gone/{n}", estimated_time=1))
    last = rig.seed("pending", BatchRequest("/back", estimated_time=10))
    for _ in range(5):
        rig.reply(rig.calls.cancel(rig.ask(rig.take()).key))
    attempt = rig.ask(rig.take())
    behind = rig.seed("pending", BatchRequest("/behind", estimated_time=4))
    rig.reply(rig.calls.release(attempt, rig.front_ticket(last.request)))
    located = {key: rig.ask(rig.calls.locate(key, "arm")) for key in (last.key, behind.key)}
    assert {key: (status.position, status.eta) for key, status in located.items()} == {
        last.key: (1, 10.0),
        behind.key: (2, 14.0),
    }
    audit(rig.client, rig.keys)


def test_the_workers_that_live_share_the_time_ahead(rig: Rig) -> None:
    for n in range(4):
        rig.seed("pending", BatchRequest(f"/{n}", estimated_time=10))
    last = BatchRequest("/3").key
    assert rig.ask(rig.calls.locate(last, "arm")).eta == 40
    sets = rig.jobs.worker_sets("arm")
    for name in ("rq:worker:a", "rq:worker:b", "rq:worker:dead"):
        rig.client.sadd(sets[1], name)
        rig.client.sadd(sets[0], name)
    for name in ("rq:worker:a", "rq:worker:b"):
        rig.client.hset(name, "state", "busy")
    assert rig.ask(rig.calls.locate(last, "arm")).eta == 20


def test_what_runs_is_at_position_0_and_what_has_ended_has_none(rig: Rig) -> None:
    running = rig.seed("mine", BatchRequest("/runs", estimated_time=100))
    status = rig.ask(rig.calls.locate(running.key, "arm"))
    assert status.position == 0
    assert 90 < status.eta <= 100
    waiting = rig.seed("pending", BatchRequest("/waits", estimated_time=10))
    eta = rig.ask(rig.calls.locate(waiting.key, "arm")).eta
    assert 100 < eta <= 110, "what is left of the running one is ahead"
    rig.reply(rig.complete(running.attempt))
    ended = rig.ask(rig.calls.locate(running.key, "arm"))
    assert (ended.position, ended.eta) == (None, None)


def test_a_run_time_is_learned_for_the_next_of_its_family(rig: Rig) -> None:
    attempt = rig.begin(BatchRequest("/slow/1"))
    rig.client.hincrby(rig.keys.status(attempt.key), "started_ms", -20_000)
    rig.reply(rig.complete(attempt))
    found = rig.ask(rig.submit(BatchRequest("/slow/2")))
    assert 20 <= found.status.estimated_time < 30


# -- clear


def test_clear_temporary_leaves_sticky_results_and_what_is_in_flight(rig: Rig) -> None:
    seeded = {state: rig.seed(state, f"/{state}") for state in ("completed", "sticky", "mine", "failed")}
    assert rig.run(browse.clear(rig.core, None, None, temporary_only=True)) == 1
    states = {state: rig.state(each.key) for state, each in seeded.items()}
    assert states == {
        "completed": State.UNKNOWN,
        "sticky": State.COMPLETED,
        "mine": State.IN_PROGRESS,
        "failed": State.FAILED,
    }
    audit(rig.client, rig.keys)
    assert rig.run(browse.clear(rig.core, None, None, temporary_only=False)) == 1
    assert rig.client.zcard(rig.named("results")) == 0
    audit(rig.client, rig.keys)


def test_clear_works_through_more_than_one_step(rig: Rig) -> None:
    for n in range(230):
        rig.reply(rig.put(BatchRequest(f"/{n}"), f"owner{n}"))
    assert rig.run(browse.clear(rig.core, None, None, temporary_only=False)) == 230
    audit(rig.client, rig.keys)


# -- a server that takes no writes


@pytest.fixture
def full(rig: Rig) -> Iterator[Callable[[], None]]:
    """Call it, and memory is out."""
    yield lambda: bool(rig.client.config_set("maxmemory", 1))
    rig.client.config_set("maxmemory", 0)


def test_out_of_memory_a_new_submit_is_refused_and_writes_nothing(rig: Rig, full: Callable[[], None]) -> None:
    for state in ("unknown", "failed", "cancelled", "evicted", "lapsed"):
        rig.seed(state, f"/{state}")
    full()
    before = stored(rig)
    for state in ("unknown", "failed", "cancelled", "evicted", "lapsed"):
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            rig.reply(rig.submit(BatchRequest(f"/{state}"), payload=b"p"))
    assert stored(rig) == before


def test_out_of_memory_hits_and_plain_joins_are_answered(rig: Rig, full: Callable[[], None]) -> None:
    for state in ("mine", "completed", "sticky", "negative", "quarantined", "pending"):
        rig.seed(state, f"/{state}")
    full()
    before = stored(rig)
    words = {state: rig.word(rig.submit(BatchRequest(f"/{state}"))) for state in ("pending", "mine", "completed")}
    assert words == {"pending": "joined", "mine": "joined", "completed": "hit"}
    assert rig.word(rig.submit(BatchRequest("/sticky"))) == "hit"
    assert rig.word(rig.submit(BatchRequest("/negative"))) == "negative"
    assert rig.word(rig.submit(BatchRequest("/quarantined"))) == "negative"
    assert stored(rig) == before


def test_out_of_memory_attempts_still_start_and_end(rig: Rig, full: Callable[[], None]) -> None:
    lapsed = rig.seed("lapsed", "/lapsed")
    waiting = [rig.seed("pending", f"/{n}") for n in range(7)]
    lost = rig.seed("pending", "/lost")
    lose_job(rig, lost)
    rig.age(lost.key)
    full()
    attempts = [rig.ask(rig.start(each.key, each.job_id)) for each in waiting]
    assert rig.ask(rig.calls.renew(attempts[0], LEASE_MS)) > 0
    assert rig.word(rig.complete(attempts[0])) == "stored"
    assert rig.word(rig.fail(attempts[1])) == "failed"
    assert rig.word(rig.calls.cancel(attempts[2].key)) == "cancelled"
    assert rig.word(rig.calls.release(attempts[3], rig.front_ticket(attempts[3].request))) == "released"
    assert rig.word(rig.retry(attempts[4], rig.ticket(attempts[4].request))) == "retried"
    assert rig.word(rig.crash(attempts[5].key, attempts[5].token, rig.ticket(attempts[5].request))) == "requeued"
    assert rig.word(rig.calls.forget(attempts[1].key)) == "forgotten"
    assert heal(rig) == 2
    assert rig.state(lapsed.key) is State.PENDING
    audit(rig.client, rig.keys)


def test_out_of_memory_a_put_is_refused_and_writes_nothing(rig: Rig, full: Callable[[], None]) -> None:
    rig.seed("pending", REQUEST)
    full()
    before = stored(rig)
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        rig.reply(rig.put(REQUEST, "owner"))
    assert stored(rig) == before


def test_a_replica_refuses_new_submits_and_answers_hits(server: embedded.PrivateServer) -> None:
    with (
        servers.throwaway(server.binary) as replica,
        connect.open_client(replica.url) as client,
        RequestManager(connection=client, allow_volatile=True) as manager,
    ):
        manager.cache.put("/done", "value")
        manager.submit("/waits")
        client.execute_command("REPLICAOF", "127.0.0.1", 1)
        before = snapshot(client)
        with pytest.raises(redis.exceptions.ReadOnlyError):
            manager.submit("/new")
        assert manager.submit("/done").value == "value"
        assert manager.submit("/waits").outcome is Outcome.JOINED
        assert manager.status(BatchRequest("/done").key).state is State.COMPLETED
        assert snapshot(client) == before


# -- through a manager


def test_flushed_scripts_are_loaded_again(redis_client: redis.Redis) -> None:
    with RequestManager(connection=redis_client, allow_volatile=True) as manager:
        manager.submit("/a")
        redis_client.script_flush()
        assert manager.submit("/a").outcome is Outcome.JOINED
        redis_client.script_flush()
        assert [status.outcome for status in manager.submit_many(["/a", "/b"])] == [Outcome.JOINED, Outcome.NEW]
        redis_client.script_flush()
        lease = manager.queues.next_request()
        assert lease is not None
        redis_client.script_flush()
        lease.finish("value")
        assert manager.get("/a") == "value"


@pytest.mark.parametrize("verb", ["submit", "status", "cancel", "forget", "put", "result"])
def test_a_foreign_value_under_a_key_of_ours_is_named_and_left_alone(redis_client: redis.Redis, verb: str) -> None:
    key = BatchRequest("/a").key
    redis_client.set(f"arm:status:{key}", "somebody else's")
    with RequestManager(connection=redis_client, allow_volatile=True) as manager:
        before = snapshot(redis_client)
        act: dict[str, Callable[[], Any]] = {
            "submit": lambda: manager.submit("/a"),
            "status": lambda: manager.status(key),
            "cancel": lambda: manager.cancel(key),
            "forget": lambda: manager.forget(key),
            "put": lambda: manager.cache.put("/a", 1),
            "result": lambda: manager.result(key),
        }
        with pytest.raises(ForeignData, match=f"arm:status:{key}"):
            act[verb]()
        assert snapshot(redis_client) == before


def test_a_state_of_a_later_version_is_refused_by_name(rig: Rig) -> None:
    seeded = rig.seed("completed")
    rig.client.hset(rig.keys.status(seeded.key), "state", "archived")
    for call in (rig.submit(seeded.request), rig.calls.read(seeded.key, with_value=False)):
        with pytest.raises(RqarmError, match="archived"):
            rig.ask(call)


def test_the_scripts_on_the_server_are_those_of_the_package(rig: Rig) -> None:
    for known in all_scripts():
        assert rig.client.script_load(known.text) == known.sha == script(known.name).sha


# -- wake-ups


def woken(pubsub: Any) -> list[tuple[str, str]]:
    """Channel and state of what was published so far; ``bell`` closes the list."""
    heard = []
    while True:
        message = pubsub.get_message(ignore_subscribe_messages=True, timeout=10)
        if message is None:
            continue
        if message["channel"] == b"arm:done:bell":
            return heard
        heard.append((message["channel"].decode(), message["data"].decode().partition(":")[0]))


@pytest.mark.parametrize(
    ("verb", "variant", "state", "word"),
    [
        ("complete", "mine", "mine", "completed"),
        ("fail", "mine", "mine", "failed"),
        ("cancel", "-", "pending", "cancelled"),
        ("cancel", "-", "mine", "cancelled"),
        ("put", "new", "pending", "completed"),
        ("forget", "-", "completed", "unknown"),
        ("complete", "other", "mine", None),
        ("fail", "mine", "other", None),
        ("cancel", "-", "failed", None),
        ("retry", "mine", "mine", None),
        ("crash", "clock", "lapsed", None),
    ],
)
def test_an_end_wakes_who_waits_once_and_nothing_else_does(
    rig: Rig, verb: str, variant: str, state: str, word: str | None
) -> None:
    seeded = rig.seed(state, REQUEST)
    call = call_of(rig, verb, variant, seeded)
    with rig.client.pubsub() as pubsub:
        pubsub.psubscribe("arm:done:*")
        assert pubsub.get_message(timeout=10)["type"] == "psubscribe"
        rig.reply(call)
        rig.reply(call)
        rig.client.publish("arm:done:bell", "")
        assert woken(pubsub) == ([(f"arm:done:{seeded.key}", word)] if word else [])


@pytest.mark.parametrize(("size", "is_told"), [(0, True), (900, True), (1024, False), (200_000, False)])
@pytest.mark.parametrize("how", ["complete", "put"])
def test_a_small_result_goes_with_the_wake_up(redis_client: redis.Redis, how: str, size: int, is_told: bool) -> None:
    rig = Rig(redis_client, inline_bytes=100_000, chunk_bytes=100_000)
    value = os.urandom(size)
    rig.seed("pending", REQUEST)
    attempt = rig.ask(rig.take())
    with rig.client.pubsub() as pubsub:
        pubsub.subscribe(f"arm:done:{REQUEST.key}")
        assert pubsub.get_message(timeout=10)["type"] == "subscribe"
        if how == "complete":
            rig.run(flows.finish(rig.core, attempt, value))
        else:
            rig.run(flows.put(rig.core, REQUEST, value))
        said = pubsub.get_message(timeout=10)["data"]
    found = calls_module.Calls.told(REQUEST.key, said)
    assert len(said) < 1100
    assert (found is not None) == is_told
    assert is_told or said == b"completed"
    assert found is None or (found.stored is not None and found.stored.value() == value)


def test_the_last_crash_wakes_who_waits(rig: Rig) -> None:
    call = _last_crash(rig)
    with rig.client.pubsub() as pubsub:
        pubsub.psubscribe("arm:done:*")
        assert pubsub.get_message(timeout=10)["type"] == "psubscribe"
        rig.reply(call)
        rig.client.publish("arm:done:bell", "")
        assert woken(pubsub) == [(f"arm:done:{REQUEST.key}", "failed")]


def test_foreign_data_does_not_stop_the_sweep(rig: Rig) -> None:
    """Row 61: one bad job hash and one bad record; what is behind them is healed all the same."""
    bad_job, bad_record, lost = (rig.run(flows.submit(rig.core, f"/{name}")).key for name in ("job", "record", "lost"))
    for key in (bad_job, lost):
        rig.client.hset(rig.keys.status(key), "pushed_ms", 1)
    job_id = rig.client.hget(rig.keys.status(bad_job), "job_id").decode()
    rig.client.delete(rig.core.jobs.lists(rig.core.settings.queue)[1])
    rig.client.set(rig.core.jobs.job_prefix + job_id, "not a job")
    rig.client.delete(rig.keys.status(bad_record))
    rig.client.set(rig.keys.status(bad_record), "not a record")
    assert rig.run(flows.sweep(rig.core)) == 2
    attempts = [rig.run(flows.take(rig.core, None, "w", 0)) for _ in range(2)]
    assert {attempt.key for attempt in attempts} == {bad_job, lost}


# -- emit and follow


def emit(rig: Rig, attempt: Attempt, *values: Any, first: int = 1) -> None:
    for number, value in enumerate(values, first):
        assert rig.word(rig.calls.emit(attempt, number, codec.pack(value))) == "emitted"


def emitted(rig: Rig, key: Key) -> list[Any]:
    """What a late joiner is given."""
    seen = rig.ask(rig.calls.follow(key, "", 0))
    return [] if seen is None else [codec.unpack(packed) for packed in seen.values]


@pytest.mark.parametrize("end", ["complete", "sticky", "fail", "cancel"])
def test_what_was_emitted_lives_as_long_as_the_end_of_its_attempt(rig: Rig, end: str) -> None:
    attempt = rig.begin(REQUEST)
    emit(rig, attempt, 1, 2)
    name = rig.named("emitted", key=attempt.key)
    assert rig.client.pexpiretime(name) == -1
    ends = {
        "complete": rig.complete(attempt),
        "sticky": rig.complete(attempt, sticky=True),
        "fail": rig.fail(attempt),
        "cancel": rig.calls.cancel(attempt.key),
    }
    rig.reply(ends[end])
    assert rig.client.pexpiretime(name) == rig.client.pexpiretime(rig.keys.status(attempt.key))
    assert (rig.client.pexpiretime(name) == -1) == (end == "sticky")
    assert emitted(rig, attempt.key) == [1, 2]
    audit(rig.client, rig.keys)


def test_a_hit_that_lengthens_the_result_lengthens_what_was_emitted(rig: Rig) -> None:
    attempt = rig.begin(REQUEST)
    emit(rig, attempt, 1)
    rig.reply(rig.complete(attempt))
    assert rig.word(rig.submit(BatchRequest(REQUEST.uri, key=REQUEST.key, sticky=True))) == "hit"
    assert rig.client.pexpiretime(rig.named("emitted", key=attempt.key)) == -1
    audit(rig.client, rig.keys)


@pytest.mark.parametrize("way", ["retry", "release", "crash", "lapsed submit", "parked", "rq requeue"])
def test_another_attempt_begins_with_nothing_emitted(rig: Rig, way: str) -> None:
    if way == "parked":
        rig.placed("/holder")
    attempt = rig.begin(REQUEST)
    emit(rig, attempt, 1, 2)
    rig.reply(rig.calls.renew(attempt, LEASE_MS, b'{"fraction": 0.5, "message": "half"}'))
    ticket = rig.ticket(REQUEST)
    if way == "lapsed submit":
        rig.lapse(attempt.key)
    elif way == "rq requeue":
        rig.reply(rig.fail(attempt))
    job_id = rig.record(attempt.key)["job_id"]
    calls = {
        "retry": lambda: rig.retry(attempt, ticket),
        "release": lambda: rig.calls.release(attempt, rig.front_ticket(REQUEST)),
        "crash": lambda: rig.crash(attempt.key, attempt.token, ticket),
        "lapsed submit": lambda: rig.submit(REQUEST),
        "parked": lambda: rig.admit(attempt),
        "rq requeue": lambda: rig.start(attempt.key, job_id),
    }
    rig.reply(calls[way]())
    assert not rig.client.exists(rig.named("emitted", key=attempt.key))
    assert {"emitted", "progress"} & rig.record(attempt.key).keys() == set()
    audit(rig.client, rig.keys)


@pytest.mark.parametrize("way", ["resubmit", "forget", "clear", "put", "submit of what failed", "put in flight"])
def test_what_drops_a_result_drops_what_was_emitted(rig: Rig, way: str) -> None:
    attempt = rig.begin(REQUEST)
    emit(rig, attempt, 1)
    if way != "put in flight":
        rig.reply(rig.fail(attempt) if way == "submit of what failed" else rig.complete(attempt))
    calls = {
        "resubmit": rig.submit(REQUEST, again=True),
        "submit of what failed": rig.submit(REQUEST),
        "forget": rig.calls.forget(attempt.key),
        "clear": rig.calls.clear(temporary_only=True),
    }
    rig.reply(calls.get(way) or rig.put(REQUEST, secrets.token_hex(8)))
    assert not rig.client.exists(rig.named("emitted", key=attempt.key))
    assert emitted(rig, attempt.key) == []
    audit(rig.client, rig.keys)


def test_a_list_that_an_earlier_claim_left_behind_counts_for_nothing(rig: Rig) -> None:
    first = rig.begin(REQUEST)
    emit(rig, first, "old")
    rig.reply(rig.complete(first))
    rig.client.delete(rig.keys.status(first.key), rig.named("result", key=first.key))  # the server made room
    second = rig.begin(REQUEST)
    assert emitted(rig, second.key) == []
    emit(rig, second, "new")
    assert emitted(rig, second.key) == ["new"]
    assert rig.client.pexpiretime(rig.named("emitted", key=second.key)) == -1


def test_an_evicted_list_goes_on_with_the_next_number(rig: Rig) -> None:
    attempt = rig.begin(REQUEST)
    emit(rig, attempt, "a", "b")
    rig.client.delete(rig.named("emitted", key=attempt.key))
    emit(rig, attempt, "c", first=3)
    seen = rig.ask(rig.calls.follow(attempt.key, str(attempt.token), 2))
    assert (seen.first, [codec.unpack(packed) for packed in seen.values]) == (3, ["c"])
    audit(rig.client, rig.keys)


def test_the_newest_emissions_are_kept_by_number_and_by_size(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "EMISSIONS_KEPT", 3)
    monkeypatch.setattr(calls_module, "EMITTED_BYTES", 20)
    attempt = rig.begin(REQUEST)
    emit(rig, attempt, *range(5))
    assert emitted(rig, attempt.key) == [2, 3, 4]
    emit(rig, attempt, "x" * 18, first=6)
    assert emitted(rig, attempt.key) == [4, "x" * 18]
    emit(rig, attempt, "y" * 30, first=7)
    assert emitted(rig, attempt.key) == ["y" * 30], "one is always kept"
    audit(rig.client, rig.keys)


def test_out_of_memory_an_emission_is_refused_and_writes_nothing(rig: Rig, full: Callable[[], None]) -> None:
    attempt = rig.begin(REQUEST)
    emit(rig, attempt, 1)
    before = stored(rig)
    full()
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        rig.reply(rig.calls.emit(attempt, 2, b"\x02"))
    assert stored(rig) == before


# -- traces


def test_a_new_claim_keeps_the_trace_of_its_submit_until_it_has_a_result(rig: Rig) -> None:
    def traced(context: str) -> Call[Any]:
        return rig.calls.submit(REQUEST, rig.core.identify(REQUEST), rig.ticket(REQUEST), trace=context, again=True)

    assert rig.word(traced("00-1-2-01")) == "new"
    assert rig.word(traced("00-5-6-01")) == "joined"
    first = rig.ask(rig.take())
    assert isinstance(first, Attempt)
    assert first.trace == "00-1-2-01"
    assert (first.request.uri, first.request.tags, first.key) == (REQUEST.uri, REQUEST.tags, REQUEST.key)
    assert rig.word(rig.retry(first, rig.ticket(REQUEST))) == "retried"
    second = rig.ask(rig.start(first.key, rig.record(first.key)["job_id"]))
    assert isinstance(second, Attempt)
    assert second.trace == "00-1-2-01"
    assert rig.word(rig.complete(second)) == "stored"
    assert "trace" not in rig.record(first.key)


@pytest.mark.parametrize("traced", [True, False])
def test_a_follow_up_belongs_to_the_trace_of_what_made_it(rig: Rig, traced: bool) -> None:
    rig.word(rig.calls.submit(REQUEST, rig.core.identify(REQUEST), rig.ticket(REQUEST), trace="00-1-2-01 a=b"))
    attempt = rig.ask(rig.take())
    assert isinstance(attempt, Attempt)
    if traced:
        assert rig.word(rig.calls.trace(attempt, "00-3-4-01")) == "traced"
    follow_up = followups._of_attempt(rig.core, FollowUp.CALLBACK, attempt)
    encoded = codec.encode(1, rig.settings)
    call = rig.calls.complete(attempt, encoded.envelope, encoded.inline, sticky=False, ttl_ms=0, follow_up=follow_up)
    assert rig.word(call) == "stored"
    assert rig.record(follow_up.identity.key)["trace"] == ("00-3-4-01" if traced else "00-1-2-01 a=b")
    assert rig.record(attempt.key).get("traced") == ("1:00-3-4-01" if traced else None)
    assert "trace" not in rig.record(attempt.key)


def test_the_end_of_a_traced_execution_takes_the_contexts_of_the_joiners_away(rig: Rig) -> None:
    attempt = rig.begin(REQUEST)
    name = rig.named("traces", key=attempt.key)
    assert rig.word(rig.calls.link(attempt.key, "00-1-2-01")) == "left"
    rig.client.sadd(name, "12345 00-8-9-01")
    call = rig.calls.trace(attempt, "00-3-4-01")
    assert call.parse(rig.reply(call)) == ["00-1-2-01"], "what is left of another claim does not count"
    assert rig.word(rig.complete(attempt)) == "stored"
    assert not rig.client.exists(name)
