"""The transitions on real servers: each script in each state, with its own and with other ids, once and again.

``TABLE`` is the contract. A word with a star changes what is stored; a word without leaves every byte and every TTL as
it was, except ``noted:submissions`` and ``stats:refusals``, which count refusals too. The words that no state alone
brings about are in ``SPECIAL``; a test holds the two against the headers, so no outcome goes untested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import servers
from audit import audit
from drive import LEASE_MS, STATES, STORED_STATE, Rig, snapshot
from transitions import REQUEST, TARGET, call_of, chunked, heal, last_crash, lose_job, stored

from rqarm import RequestManager, connect, embedded
from rqarm.calls import Call
from rqarm.errors import ForeignData, RqarmError
from rqarm.model import TRANSITIONS, Outcome, State
from rqarm.request import BatchRequest
from rqarm.scripts import all_scripts, script

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
need mine           lost        lost        lost        waiting*     lost        waiting*
need other          lost        lost        lost        lost        lost        lost
need same           lost        already     already     already     already     already
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
need mine           lost        lost        lost        lost        lost        lost        lost        lost
need other          lost        lost        lost        lost        lost        lost        lost        lost
need same           already     already     already     already     already     already     already     already
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
need mine           waiting*     waiting*     lost        lost
need other          lost        lost        lost        lost
need same           already     already     already     already
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
need mine           lost        lost
need other          lost        lost
need same           already     already
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
    ("need", "waiting"): "already",
    ("cancel", "cancelled"): "ended",
    ("forget", "forgotten"): "unknown",
    ("requeue", "requeued"): "already",
    ("discard", "discarded"): "unknown",
}


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


def _full_of_aliases(rig: Rig) -> Call[Any]:
    rig.client.sadd(rig.named("aliases", key=rig.begin(TARGET).key), *(f"alias-{n}" for n in range(1000)))
    return rig.redirect(rig.begin(REQUEST), TARGET.key)


def _ready(rig: Rig) -> Call[Any]:
    rig.seed("completed", TARGET)
    return rig.need(rig.begin(REQUEST), TARGET.key, BatchRequest("/unknown").key)


def _needed_by_the_needed(rig: Rig) -> Call[Any]:
    mine, middle, last = rig.begin(REQUEST), rig.begin(BatchRequest("/middle")), rig.begin(TARGET)
    assert rig.word(rig.need(middle, mine.key)) == "waiting"
    assert rig.word(rig.need(last, middle.key)) == "waiting"
    return rig.need(mine, last.key)


def _too_many_dependents(rig: Rig) -> Call[Any]:
    rig.client.sadd(rig.named("aliases", key=rig.begin(TARGET).key), *(f"alias-{n}" for n in range(1000)))
    return rig.need(rig.begin(REQUEST), TARGET.key)


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


#: (verb, word) -> how to bring it about, and what the repeat answers; None = it writes, so the repeat differs
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
    ("need", "ready"): (_ready, "ready"),
    ("need", "loop"): (_needed_by_the_needed, "loop"),
    ("need", "full"): (_too_many_dependents, "full"),
    ("redirect", "full"): (_full_of_aliases, "full"),
    ("redirect", "loop"): (_loop, "loop"),
    ("redirect", "endless"): (_endless, "endless"),
    ("crash", "quarantined"): (last_crash, "already"),
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


# -- a server that takes no writes


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
