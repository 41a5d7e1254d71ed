"""What the tests of the transitions share: requests, and the call of each script in a state."""

from __future__ import annotations

import os
import secrets
from dataclasses import replace
from typing import Any

from drive import LEASE_MS, Rig, Seeded, Snapshot, snapshot, without

from rqarm import codec, flows
from rqarm.browse import cached, claims, detail, search
from rqarm.calls import Call, Ticket
from rqarm.model import FollowUp, Priority, Token
from rqarm.replies import Overdue
from rqarm.request import BatchRequest

REQUEST = BatchRequest("/slow?x=1", key="slow", tags=["red"])
#: same readable key, another request
IMPOSTOR = BatchRequest("/other", key="slow")
#: where redirects lead
TARGET = BatchRequest("/target")


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
        case "need", _:
            rig.word(rig.submit(TARGET))
            waits = rig.parking_ticket(attempt)
            return rig.need(
                attempt, TARGET.key, ticket=replace(waits, job_id=same.job_id) if variant == "same" else waits
            )
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
            named, pattern = search.on_route("/slow" if variant == "route" else "")
            age_ms = 3_600_000 if variant == "old" else 0
            return rig.calls.clear(temporary_only=variant == "temporary", route=named, pattern=pattern, age_ms=age_ms)
        case "stats", _:
            return rig.calls.stats()
        case "overview", _:
            return rig.calls.overview()
        case "search", _:
            return search.search_call(rig.core, search.PLACES[""])
        case "claims", _:
            return claims.claims_call(rig.core)
        case "inspect", _:
            return detail.inspect_call(rig.core, key)
        case "survey", _:
            return cached.survey_call(rig.core, 100)
        case "retain", _:
            return cached.retain_call(rig.core, key, None)
        case "invalidate", _:
            return cached.invalidate_call(rig.core, "red")
    simple: dict[str, Call[Any]] = {"cancel": rig.calls.cancel(key), "forget": rig.calls.forget(key)}
    return simple[verb]


def stored(rig: Rig) -> Snapshot:
    """All but the counters of submissions and refusals: a refusal counts, and counts again when it is repeated."""
    counters = [rig.named("stats", family="refusals"), rig.named("noted", family="submissions")]
    return without(snapshot(rig.client), *counters)


def chunked(rig: Rig) -> codec.Envelope:
    """The envelope of a result in three pieces, none of which is stored."""
    small = replace(rig.settings, inline_bytes=10, chunk_bytes=1_000)
    encoded = codec.encode(os.urandom(2_500), small)
    list(encoded.chunks())
    assert encoded.envelope.chunks == 3
    return encoded.envelope


def last_crash(rig: Rig) -> Call[Any]:
    seeded = rig.seed("mine", REQUEST)
    rig.client.hset(rig.keys.status(seeded.key), "crashes", rig.settings.max_attempts - 1)
    return rig.crash(seeded.key, seeded.attempt.token, rig.ticket(REQUEST))


def heal(rig: Rig) -> int:
    return int(rig.run(flows.sweep(rig.core)))


def lose_job(rig: Rig, seeded: Seeded) -> None:
    rig.client.delete(f"{rig.jobs.job_prefix}{seeded.job_id}")
