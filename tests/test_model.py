"""A state machine against a real server: random transitions, faults and zombies on three keys, and a model in Python.

The model is a plain restatement of design.md, without indexes, sums or TTLs: a dict of records, RQ's three lists, the
set of RQ's jobs. After each step the server must agree with it on the answer, the records, the order in line and RQ's
lists; and the state audit must find nothing.

Time does not pass here: what lapses or grows old is set back by hand. ``RQARM_EXPLORE=1000`` runs that many examples
with new random steps instead of the fixed ones.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import servers
from audit import audit
from drive import LIMIT, Rig
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rqarm import connect, embedded, flows, inspect
from rqarm.browse import cached, claims, detail
from rqarm.calls import Call, Command, NextUp, Ticket
from rqarm.model import FollowUp, Key, Priority, State, Token
from rqarm.replies import Attempt, Overdue
from rqarm.request import BatchRequest

EXAMPLES = int(os.environ.get("RQARM_EXPLORE", "0"))
PROFILE = settings(
    max_examples=EXAMPLES or 120,
    stateful_step_count=50,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
#: with other seeds, until every answer was seen: where the machine goes depends on the server's clock too
ROUNDS = 4
HOUR_MS = 3_600_000
URIS = tuple(f"/{n}" for n in range(3))

#: low, so that requests are set aside now and then
MAX_ATTEMPTS = 2
#: low for the same reason: what is kept of an attempt's emissions
MOST_ITEMS, MOST_BYTES = 3, 7
#: notes of failed attempts that a record holds; the prelude has the same
ATTEMPTS_KEPT = 10
VERBS = ("renew", "emit", "admit", "complete", "fail", "retry", "release", "crash", "redirect", "redirect")

uris = st.sampled_from(URIS)
priorities = st.sampled_from(Priority)
seldom = st.sampled_from([False, False, False, True])


@dataclass
class Record:
    """What a request is, as design.md has it."""

    state: str
    order: int = 0
    job_id: str = ""
    priority: int = 1
    sticky: bool = False
    ttl_ms: int = 0
    fallback_ms: int = 0
    token: int = 0
    execution: str = ""
    done_token: int = 0
    attempts: int = 0
    retries: int = 0
    crashes: int = 0
    tried: dict[int, tuple[int, str]] = field(default_factory=dict)  # attempts that failed: number and how, on a ring
    lapsed: bool = False
    delayed: bool = False
    reason: str = ""
    negative: bool = False
    has_result: bool = False
    retained: bool = False  # its life counts from another moment than its end
    life_ms: int = 0
    moved_by: str = ""
    aside_by: str = ""
    untold: set[FollowUp] = field(default_factory=set)  # who has not been told that it was set aside
    place: str = ""  # under the limit: running, called, parked
    emitted: list[tuple[int, int]] = field(default_factory=list)  # number and size of what its attempt has emitted
    traced: int = 0  # number of the attempt that has told its trace context last
    alias: str = ""  # the URI of the request that answers for this one
    redirected_by: int = 0

    def note(self, how: str) -> None:
        """The attempt in hand failed."""
        self.tried[self.attempts % ATTEMPTS_KEPT] = self.attempts, how

    @property
    def is_led(self) -> bool:
        """Redirected, and its root has not ended."""
        return self.state == "pending" and bool(self.alias)

    @property
    def in_flight(self) -> bool:
        return self.state in ("pending", "in_progress")

    @property
    def standing(self) -> tuple[int, int]:
        """The less, the earlier it starts."""
        return self.priority, self.order


@dataclass
class World:
    records: dict[str, Record] = field(default_factory=dict)
    lists: tuple[list[str], list[str], list[str]] = field(default_factory=lambda: ([], [], []))
    jobs: dict[str, str] = field(default_factory=dict)
    payloads: dict[str, set[str]] = field(default_factory=dict)
    taken: tuple[str, str] | None = None  # execution and URI of the last take


def replace_limits(call: Call[str]) -> Call[str]:
    """The same emission, where less is kept."""
    *head, _, _, value = call.argv
    return replace(call, argv=(*head, MOST_ITEMS, MOST_BYTES, value))


#: answers that an execution is counted for; the machine itself says when something is parked, or healed by a submit
ENDS = {
    ("complete", "stored"): "completed",
    ("fail", "failed"): "failed",
    ("retry", "retried"): "retried",
    ("release", "released"): "released",
    ("crash", "requeued"): "crashed",
    ("crash", "quarantined"): "crashed",
    ("cancel", "cancelled"): "cancelled",
    ("revive", "revived"): "revived",
    ("conclude", "concluded"): "concluded",
    **{("redirect", word): "redirected" for word in ("linked", "aliased", "failed", "cancelled")},
}


class Watched(Rig):
    """Notes every answer: a machine that reaches little proves little."""

    seen: ClassVar[set[tuple[str, str]]] = set()
    #: of this machine, since the last flush: what an overview must tell
    submissions: ClassVar[Counter[str]] = Counter()
    executions: ClassVar[Counter[str]] = Counter()

    def reply(self, step: Call[Any] | Command[Any]) -> Any:
        answer = super().reply(step)
        if isinstance(step, Call):
            verb, word = step.script.name, answer[0].decode()
            self.seen.add((verb, word))
            if verb == "submit":
                self.submissions[word] += 1
            elif (verb, word) in ENDS:
                self.executions[ENDS[verb, word]] += 1
        return answer


#: answers that no run of the machine may miss
REACHED = {
    ("submit", "new joined hit negative"),
    ("take", "started empty spent"),
    ("start", "started superseded unknown"),
    ("renew", "renewed lost"),
    ("emit", "emitted already lost"),
    ("trace", "traced lost"),
    ("link", "left linked unknown"),
    ("follow", "found unknown"),
    ("model", "dropped gap"),
    ("admit", "admitted parked lost"),
    ("model", "called"),
    ("complete", "stored already lost"),
    ("fail", "failed lost"),
    ("requeue", "requeued already superseded in_flight ended unknown"),
    ("discard", "discarded superseded in_flight ended unknown"),
    ("retry", "retried already lost"),
    ("release", "released already lost"),
    ("crash", "requeued quarantined already alive"),
    ("conclude", "concluded already"),
    ("attend", "attended already"),
    ("revive", "revived already alive"),
    ("cancel", "cancelled ended unknown"),
    ("forget", "forgotten in_flight unknown"),
    ("put", "stored"),
    ("retain", "retained no_result unknown"),
    ("redirect", "linked aliased failed cancelled gone loop already lost"),
}


class Machine(RuleBasedStateMachine):
    """The rules are what anybody may do at any time."""

    server: embedded.PrivateServer

    def __init__(self) -> None:
        super().__init__()
        self.client = connect.open_client(self.server.url)
        self.client.flushall()
        self.forget_counts()
        self.rig = Watched(self.client, max_attempts=MAX_ATTEMPTS)
        self.world = World()
        self.orders = 0
        self.newest_token = 0
        self.places = 1
        #: everything ever handed out, for zombies and duplicates
        self.attempts: dict[str, list[Attempt]] = {uri: [] for uri in URIS}
        self.tickets: dict[str, list[str]] = {uri: [] for uri in URIS}

    def teardown(self) -> None:
        self.client.close()

    @staticmethod
    def forget_counts() -> None:
        Watched.submissions.clear()
        Watched.executions.clear()

    # -- the model's moves

    def key(self, uri: str) -> Key:
        return BatchRequest(uri).key

    def uri_of(self, job_id: str) -> str:
        return next(uri for uri in URIS if job_id.startswith(self.key(uri)))

    def next_order(self) -> int:
        self.orders += 1
        return self.orders

    def push(self, uri: str, job_id: str, rank: int, *, front: bool = False, delayed: bool = False) -> None:
        """RQ's side of a new ticket."""
        self.tickets[uri].append(job_id)
        self.world.jobs[job_id] = "scheduled" if delayed else "queued"
        if not delayed:
            self.world.lists[rank].insert(0 if front else len(self.world.lists[rank]), job_id)

    def vacate(self, record: Record) -> None:
        record.place = ""
        self.call_up()

    def call_up(self) -> None:
        """Free places go to those who wait, in the order of the line; their tickets go to the front."""
        waiting = sorted(self.placed("parked"), key=lambda record: record.standing)
        chosen = waiting[: max(self.places - len(self.placed("running", "called")), 0)]
        for record in reversed(chosen):
            Watched.seen.add(("model", "called"))
            record.place, record.delayed = "called", False
            self.world.jobs[record.job_id] = "queued"
            self.world.lists[record.priority].insert(0, record.job_id)

    def placed(self, *places: str) -> list[Record]:
        return [record for record in self.world.records.values() if record.place in places]

    def back_in_line(self, record: Record, job_id: str, *, delayed: bool = False) -> None:
        self.vacate(record)
        record.state, record.job_id, record.lapsed, record.delayed = "pending", job_id, False, delayed
        record.token, record.execution = 0, ""
        record.emitted = []

    def has_ticket(self, record: Record) -> bool:
        if record.is_led:
            return True
        delivery = self.world.jobs.get(record.job_id)
        return delivery == "scheduled" or (delivery == "queued" and record.job_id in self.world.lists[record.priority])

    def is_lost(self, record: Record) -> bool:
        return record.state == "pending" and not self.has_ticket(record)

    def is_dead(self, record: Record) -> bool:
        """What a sweep finds: before its time, nobody asks whether a delayed one has its ticket."""
        return self.is_lost(record) and not record.delayed

    def began(self, uri: str, record: Record, execution: str, attempt: Attempt) -> None:
        """An attempt begins: what its holder is told agrees with the model."""
        record.attempts += 1
        record.state, record.execution, record.token = "in_progress", execution, int(attempt.token)
        record.place = "running" if record.place == "called" else ""
        record.lapsed = record.delayed = record.negative = False
        record.reason, record.untold = "", set()
        assert record.token > self.newest_token, "tokens rise"
        self.newest_token = record.token
        assert (attempt.number, attempt.retries, attempt.crashes) == (record.attempts, record.retries, record.crashes)
        assert attempt.request.uri == uri
        self.attempts[uri].append(attempt)

    def landed(self, record: Record, state: str, *, negative: bool = False) -> None:
        record.state, record.token, record.execution, record.lapsed = state, 0, "", False
        self.vacate(record)
        uri = next(uri for uri, other in self.world.records.items() if other is record)
        for alias in self.aliases(uri, "pending"):
            alias.state, alias.negative = state, negative
            if state == "completed":  # with the result of its root, and as long as that
                alias.sticky = record.sticky

    def aliases(self, uri: str, *states: str) -> list[Record]:
        return [record for record in self.world.records.values() if record.alias == uri and record.state in states]

    def drop_aliases(self, uri: str) -> None:
        for alias in self.aliases(uri, "completed"):
            del self.world.records[next(uri for uri, other in self.world.records.items() if other is alias)]

    def holder(self, uri: str) -> Record | None:
        """Whose result answers."""
        record = self.world.records.get(uri)
        return self.world.records.get(record.alias) if record is not None and record.alias else record

    def answers(self, uri: str) -> bool:
        record, holder = self.world.records.get(uri), self.holder(uri)
        return record is not None and record.state == "completed" and holder is not None and holder.has_result

    def lengthened(self, uri: str, *, sticky: bool, ttl_ms: int) -> None:
        """A hit on a request, or on an alias of it."""
        holder = self.holder(uri)
        assert holder is not None
        root = next(uri for uri, other in self.world.records.items() if other is holder)
        if sticky and not holder.sticky:
            for record in [holder, *self.aliases(root, "completed")]:
                record.sticky = True
        elif not holder.sticky and ttl_ms > holder.life_ms:
            holder.life_ms = ttl_ms

    def died(self, uri: str, record: Record, job_id: str, *, delayed: bool) -> str:
        record.crashes += 1
        record.note("crashed")
        if record.crashes >= MAX_ATTEMPTS:
            self.landed(record, "failed")
            record.reason, record.aside_by = "poison", job_id
            record.untold = {FollowUp.FAILURE, FollowUp.QUARANTINE}
            return "quarantined"
        self.back_in_line(record, job_id, delayed=delayed)
        self.push(uri, job_id, record.priority, delayed=delayed)
        return "requeued"

    # -- requests

    @rule(
        uri=uris,
        kind=st.sampled_from(["temporary", "sticky", "ttl"]),
        hours=st.integers(1, 3),
        fallback=st.integers(1, 3),
        priority=priorities,
        payload=st.sampled_from(["", "p", "q"]),
        again=seldom,
        resend=seldom,
    )
    def submit(
        self,
        uri: str,
        kind: str,
        hours: int,
        fallback: int,
        priority: Priority,
        payload: str,
        again: bool,
        resend: bool,
    ) -> None:
        request = BatchRequest(
            uri,
            sticky=kind == "sticky",
            ttl=hours * 3600.0 if kind == "ttl" else None,
            priority=priority,
            estimated_time=float(hours),
        )
        rig = Watched(self.client, ttl=fallback * 3600.0, max_attempts=MAX_ATTEMPTS)
        ticket = rig.ticket(request)
        record = self.world.records.get(uri)
        if resend and record is not None and record.job_id:
            ticket = Ticket(record.job_id, ticket.commands, ticket.data)
        wanted = self.submitted(uri, record, request, fallback, ticket.job_id, payload, again)
        assert rig.word(rig.submit(request, ticket, payload=payload.encode(), again=again)) == wanted

    def submitted(
        self,
        uri: str,
        record: Record | None,
        request: BatchRequest,
        fallback: int,
        job_id: str,
        payload: str,
        again: bool,
    ) -> str:
        ttl_ms, fallback_ms = int((request.ttl or 0) * 1000), fallback * HOUR_MS
        is_mine = record is not None and record.job_id == job_id
        if self.answers(uri) and (not again or is_mine):
            self.lengthened(uri, sticky=request.sticky, ttl_ms=ttl_ms)
            return "hit"
        if record is not None and is_mine:
            return "joined" if record.moved_by == job_id else "new"
        if record is not None and record.in_flight:
            return self.met_in_flight(uri, record, request, ttl_ms, fallback_ms, job_id, payload)
        if record is not None and not again and (record.reason in ("poison", "asked") or record.negative):
            return "negative"
        if record is None or record.state != "failed":
            self.world.payloads.pop(uri, None)
        if record is not None and record.state == "completed":
            self.drop_aliases(uri)
        self.world.records[uri] = Record(
            "pending",
            order=self.next_order(),
            job_id=job_id,
            priority=int(request.priority),
            sticky=request.sticky,
            ttl_ms=ttl_ms,
            fallback_ms=fallback_ms,
        )
        self.keep(uri, payload)
        self.push(uri, job_id, request.priority)
        return "new"

    def met_in_flight(
        self,
        uri: str,
        record: Record,
        request: BatchRequest,
        ttl_ms: int,
        fallback_ms: int,
        job_id: str,
        payload: str,
    ) -> str:
        root = self.world.records[record.alias] if record.is_led else None
        if root is not None and self.is_dead_for_a_submit(root):
            record.alias, root = "", None
            Watched.executions["revived"] += 1
            self.keep(uri, payload)
            outcome = "new"
        elif root is not None:
            self.keep(record.alias, payload)
            outcome = "joined"
            root.sticky |= request.sticky
            root.ttl_ms = max(root.ttl_ms, ttl_ms)
            root.fallback_ms = max(root.fallback_ms, fallback_ms)
        else:
            outcome = ""
            self.keep(uri, payload)
        if outcome:
            pass  # its root has decided
        elif record.state == "in_progress" and record.lapsed:
            Watched.executions["crashed"] += 1
            record.crashes += 1
            record.note("crashed")
            if record.crashes >= MAX_ATTEMPTS:
                self.landed(record, "failed")
                record.reason = "poison"
                record.untold = {FollowUp.FAILURE, FollowUp.QUARANTINE}
                return "negative"
            outcome = "new"
        elif self.is_dead_for_a_submit(record):
            Watched.executions["revived"] += 1
            outcome = "new"
        else:
            outcome = "joined"
        record.sticky |= request.sticky
        record.ttl_ms = max(record.ttl_ms, ttl_ms)
        record.fallback_ms = max(record.fallback_ms, fallback_ms)
        moves = root is None and request.priority < record.priority
        if outcome == "new" or (record.state == "pending" and moves):
            if moves:
                record.priority, record.order = int(request.priority), self.next_order()
            if outcome == "joined":
                record.moved_by = job_id
            self.back_in_line(record, job_id)
            self.push(uri, job_id, request.priority)
        return outcome

    def is_dead_for_a_submit(self, record: Record) -> bool:
        return record.lapsed or (record.state == "pending" and record.job_id not in self.world.jobs)

    @initialize(priority=priorities, places=st.sampled_from([1, 2]), crowded=st.booleans())
    def begin_busy(self, priority: Priority, places: int, crowded: bool) -> None:
        """All requests are there and one runs, or all places are taken: where most histories have got to."""
        self.places = places
        for family in ("submissions", "executions"):
            # notes of nothing, so that the counters are soon added up
            self.client.rpush(self.rig.named("noted", family=family), *["-"] * 92)
        for uri in URIS:
            self.submit_plainly(uri, priority)
        self.take_one()
        while crowded and any(self.world.lists):
            self.take_one()

    @precondition(lambda self: len(self.world.records) < len(URIS) or not any(self.world.lists))
    @rule(priority=priorities)
    def submit_all(self, priority: Priority) -> None:
        for uri in URIS:
            self.submit_plainly(uri, priority)

    def submit_plainly(self, uri: str, priority: Priority) -> None:
        request = BatchRequest(uri, priority=priority, estimated_time=1.0)
        ticket = self.rig.ticket(request)
        record = self.world.records.get(uri)
        wanted = self.submitted(uri, record, request, 24, ticket.job_id, "", again=False)
        assert self.rig.word(self.rig.submit(request, ticket)) == wanted

    @rule(
        uri=uris,
        data=st.data(),
        what=st.sampled_from(["cancel", "forget", "put", "clear", "retain", "take_away", "requeue", "discard"]),
    )
    def manage(self, uri: str, data: st.DataObject, what: str) -> None:
        getattr(self, what)(uri, data)

    def keep(self, uri: str, payload: str) -> None:
        if payload:
            self.world.payloads.setdefault(uri, set()).add(payload)

    def cancel(self, uri: str, data: st.DataObject) -> None:
        record = self.world.records.get(uri)
        wanted = "unknown" if record is None else "cancelled" if record.in_flight else "ended"
        assert self.rig.word(self.rig.calls.cancel(self.key(uri))) == wanted
        if record is not None and record.in_flight:
            record.alias = ""
            self.landed(record, "cancelled")
            self.world.payloads.pop(uri, None)

    def forget(self, uri: str, data: st.DataObject) -> None:
        record = self.world.records.get(uri)
        wanted = "unknown" if record is None else "in_flight" if record.in_flight else "forgotten"
        assert self.rig.word(self.rig.calls.forget(self.key(uri))) == wanted
        if wanted == "forgotten":
            self.drop_aliases(uri)
            del self.world.records[uri]
            self.world.payloads.pop(uri, None)
            self.nobody_knows(uri)

    def nobody_knows(self, uri: str) -> None:
        """The record has just gone, and somebody else still wants something of it."""
        key, seen = self.key(uri), f"{self.key(uri)}-00000000"
        ticket = self.rig.ticket(BatchRequest(uri))
        for call in (
            self.rig.calls.cancel(key),
            self.rig.calls.forget(key),
            self.rig.requeue(key, seen, ticket),
            self.rig.discard(key, seen),
        ):
            assert self.rig.word(call) == "unknown"

    def decided(self, uri: str) -> tuple[str, str, Record | None]:
        """The ticket of an entry as somebody saw it, the word to expect when it is none, and the record when it is."""
        record = self.world.records.get(uri)
        if record is None:
            return f"{self.key(uri)}-00000000", "unknown", None
        if not record.reason:
            return record.job_id, "in_flight" if record.in_flight else "ended", None
        return record.job_id, "", record

    def requeue(self, uri: str, data: st.DataObject) -> None:
        old, refusal, record = self.decided(uri)
        rank = record.priority if record is not None else 1
        ticket = self.rig.ticket(BatchRequest(uri), priority=Priority(rank))
        call = self.rig.requeue(self.key(uri), old, ticket)
        assert self.rig.word(call) == ("requeued" if record is not None else refusal)
        if record is not None:
            self.world.jobs.pop(old, None)
            assert not self.client.exists(self.rig.jobs.job_prefix + old)
            record.state, record.job_id, record.order = "pending", ticket.job_id, self.next_order()
            record.crashes = record.retries = 0
            record.reason, record.negative, record.delayed, record.untold = "", False, False, set()
            record.emitted = []
            self.push(uri, ticket.job_id, rank)
            assert self.rig.word(call) == "already"

    def discard(self, uri: str, data: st.DataObject) -> None:
        old, refusal, record = self.decided(uri)
        call = self.rig.discard(self.key(uri), old)
        assert self.rig.word(call) == ("discarded" if record is not None else refusal)
        if record is not None:
            self.world.jobs.pop(old, None)
            assert not self.client.exists(self.rig.jobs.job_prefix + old)
            del self.world.records[uri]
            self.world.payloads.pop(uri, None)
            assert self.rig.word(call) == "unknown"
            self.nobody_knows(uri)

    @precondition(lambda self: any(record.reason for record in self.world.records.values()))
    @rule(data=st.data(), what=st.sampled_from(["requeue", "discard"]))
    def decide(self, data: st.DataObject, what: str) -> None:
        """Somebody looks at the quarantine."""
        aside = [uri for uri, record in self.world.records.items() if record.reason]
        uri = data.draw(st.sampled_from(aside))
        # first somebody who saw it before it was requeued, and set aside again
        key, seen = self.key(uri), f"{self.key(uri)}-00000000"
        assert self.rig.word(self.rig.requeue(key, seen, self.rig.ticket(BatchRequest(uri)))) == "superseded"
        assert self.rig.word(self.rig.discard(key, seen)) == "superseded"
        getattr(self, what)(uri, data)

    def put(self, uri: str, data: st.DataObject) -> None:
        sticky, twice = data.draw(st.booleans()), data.draw(st.booleans())
        call = self.rig.put(BatchRequest(uri, sticky=sticky), secrets.token_hex(8))
        for _ in range(1 + twice):
            assert self.rig.word(call) == "stored"
        self.drop_aliases(uri)
        record = self.world.records.setdefault(uri, Record("completed"))
        record.alias = ""
        life_ms = int(self.rig.settings.ttl * 1000)
        if record.in_flight:  # who waits for it asked for as much
            sticky, life_ms = sticky or record.sticky, max(life_ms, record.ttl_ms)
        self.stored(uri, record, sticky, life_ms)
        record.traced = 0
        record.emitted = []

    def stored(self, uri: str, record: Record, sticky: bool, life_ms: int) -> None:
        record.has_result, record.sticky, record.life_ms, record.retained = True, sticky, life_ms, False
        self.landed(record, "completed")
        record.reason, record.negative = "", False
        record.untold = set()
        self.world.payloads.pop(uri, None)

    def clear(self, uri: str, data: st.DataObject) -> None:
        temporary_only = data.draw(st.booleans())
        gone = [
            uri
            for uri, record in self.world.records.items()
            if record.state == "completed" and not (temporary_only and record.sticky)
        ]
        assert self.rig.run(cached.clear(self.rig.core, None, None, temporary_only=temporary_only)) == len(gone)
        for uri in gone:
            assert self.world.records[uri].alias in ("", *gone)
        for uri in gone:
            del self.world.records[uri]

    def retain(self, uri: str, data: st.DataObject) -> None:
        ttl = data.draw(st.sampled_from([None, 3600.0, 7200.0]))
        record = self.world.records.get(uri)
        holder, holds = self.holder(uri), self.answers(uri)
        wanted = "unknown" if record is None else "retained" if holds else "no_result"
        assert self.rig.word(cached.retain_call(self.rig.core, Key("nobody-has-it"), ttl)) == "unknown"
        assert self.rig.word(cached.retain_call(self.rig.core, self.key(uri), ttl)) == wanted
        if record is not None and holder is not None and holds:
            for each in [holder, *self.aliases(record.alias or uri, "completed")]:
                each.sticky, each.retained = ttl is None, True

    def take_away(self, uri: str, data: st.DataObject) -> None:
        """An operator releases what runs; its holder learns of it at the next renewal."""
        record = self.world.records.get(uri)
        if record is None:
            return
        runs = record.state == "in_progress"
        assert self.rig.run(claims.release(self.rig.core, self.key(uri))) == runs
        if runs:
            job_id = self.stored_job(uri)
            self.back_in_line(record, job_id)
            record.attempts -= 1
            self.push(uri, job_id, record.priority, front=True)

    # -- attempts

    @precondition(lambda self: any(self.world.lists))
    @rule(asks=st.booleans())
    def take_one(self, asks: bool = True) -> None:
        """As a worker does, for a route with a limit or without."""
        before = self.world.taken
        self.take(resend=False)
        if asks and self.world.taken is not None and self.world.taken != before:
            uri = self.world.taken[1]
            self.ask_for_a_place(uri, self.attempts[uri][-1])

    @precondition(lambda self: any(self.world.lists) or self.world.taken)
    @rule(resend=seldom)
    def take(self, resend: bool) -> None:
        taken = self.world.taken
        is_again = resend and taken is not None
        execution = taken[0] if is_again and taken is not None else secrets.token_hex(8)
        answer = self.rig.ask(self.rig.take(execution))
        if is_again and taken is not None:
            record = self.world.records.get(taken[1])
            if record is None or record.execution != execution:
                assert isinstance(answer, str), "an execution starts once"
                return
            assert isinstance(answer, Attempt)
            assert int(answer.token) == record.token
            return
        uri = self.popped()
        if uri is None:
            assert isinstance(answer, str)
            return
        assert isinstance(answer, Attempt)
        self.began(uri, self.world.records[uri], execution, answer)
        self.world.taken = execution, uri

    @staticmethod
    def forgive(record: Any) -> None:
        """The ticket of a failed request starts it anew."""
        if record.state == "failed":
            record.crashes = record.retries = 0
            record.emitted = []
            record.alias = ""

    @staticmethod
    def may_start(record: Record | None, job_id: str, *, is_own: bool = False) -> bool:
        """``is_own``: whoever has just submitted it starts it; what has failed is not started anew for him."""
        return (
            record is not None
            and record.state in ("pending", "failed")[: 1 if is_own else 2]
            and record.job_id == job_id
            and not record.is_led
        )

    def popped(self) -> str | None:
        """The request that a take starts; superseded tickets in front of it are thrown away."""
        for waiting in self.world.lists:
            while waiting:
                job_id = waiting.pop(0)
                self.world.jobs.pop(job_id, None)
                uri = self.uri_of(job_id)
                record = self.world.records.get(uri)
                if self.may_start(record, job_id):
                    self.forgive(record)
                    return uri
        return None

    @precondition(lambda self: any(self.tickets.values()))
    @rule(data=st.data(), resend=st.booleans(), is_own=st.booleans())
    def start(self, data: st.DataObject, resend: bool, is_own: bool) -> None:
        """An RQ worker delivers a ticket: any, old or twice. Or a client takes its own out of line."""
        uri = data.draw(st.sampled_from([uri for uri in URIS if self.tickets[uri]]))
        record = self.world.records.get(uri)
        tickets = self.tickets[uri][-6:]
        job_id = data.draw(st.sampled_from(tickets[::-1]))
        is_again = resend and record is not None and bool(record.execution)
        execution = record.execution if is_again and record is not None else secrets.token_hex(8)
        rank = record.priority if record is not None else 1
        own_list = self.rig.jobs.lists("arm")[rank] if is_own else ""
        answer = self.rig.ask(self.rig.start(self.key(uri), job_id, execution, own_list=own_list))
        if record is None:
            assert answer is State.UNKNOWN
        elif is_again and record.state == "in_progress":
            assert isinstance(answer, Attempt)
            assert int(answer.token) == record.token
        elif self.may_start(record, job_id, is_own=is_own):
            assert isinstance(answer, Attempt)
            self.forgive(record)
            self.began(uri, record, execution, answer)
            if is_own and job_id in (waiting := self.world.lists[rank]):
                # only what stands in line: another's delivery is that one's to end
                del waiting[len(waiting) - 1 - waiting[::-1].index(job_id)]  # the newest, should there be two
                self.world.jobs.pop(job_id, None)
        else:
            assert answer == record.state

    @precondition(lambda self: any(self.attempts.values()))
    @rule(data=st.data(), verb=st.sampled_from(VERBS))
    def try_to_go_on(self, data: st.DataObject, verb: str) -> None:
        """Somebody who has, or had, an attempt goes on with it: the holder, or a zombie."""
        uri = data.draw(st.sampled_from([uri for uri in URIS if self.attempts[uri]]))
        self.act(uri, data.draw(st.sampled_from(self.attempts[uri][-4:][::-1])), data, verb)

    @precondition(lambda self: self.running())
    @rule(data=st.data(), verb=st.sampled_from(VERBS))
    def go_on(self, data: st.DataObject, verb: str) -> None:
        uri = data.draw(st.sampled_from(self.running()))
        self.act(uri, self.attempts[uri][-1], data, verb)

    @precondition(lambda self: self.running())
    @rule(data=st.data(), verb=st.sampled_from(VERBS))
    def end_well_or_not(self, data: st.DataObject, verb: str) -> None:
        """The same again, so that it is tried more often."""
        self.act((uri := self.running()[0]), self.attempts[uri][-1], data, verb)

    def running(self) -> list[str]:
        return [uri for uri, record in self.world.records.items() if record.state == "in_progress"]

    def act(self, uri: str, attempt: Attempt, data: st.DataObject, verb: str) -> None:
        record = self.world.records.get(uri)
        holds = record is not None and record.state == "in_progress" and record.token == int(attempt.token)
        getattr(self, f"act_{verb}")(uri, record or Record("unknown"), attempt, holds, data)

    def act_renew(self, uri: str, record: Record, attempt: Attempt, holds: bool, data: st.DataObject) -> None:
        call = self.rig.calls.renew(attempt, HOUR_MS, b'{"fraction": 0.5}')
        assert self.rig.word(call) == ("renewed" if holds else "lost")
        if holds:
            record.lapsed = False
        # not rules of their own, which would be drawn in place of those that move states
        self.link(uri, record)
        self.trace(record, attempt, holds)
        self.link(uri, record)

    def act_emit(self, uri: str, record: Record, attempt: Attempt, holds: bool, data: st.DataObject) -> None:
        """The next one, one again, or the next but one: those between were lost on their way."""
        for step in data.draw(st.lists(st.sampled_from([1, 1, 1, 0, 2]), min_size=1, max_size=5)):
            last = record.emitted[-1][0] if record.emitted else 0
            self.emit_one(record, attempt, holds, max(1, last + step), data.draw(st.integers(1, 4)))

    def emit_one(self, record: Record, attempt: Attempt, holds: bool, number: int, size: int) -> None:
        last = record.emitted[-1][0] if record.emitted else 0
        call = replace_limits(self.rig.calls.emit(attempt, number, b"x" * size))
        is_known = number <= last
        assert self.rig.word(call) == ("lost" if not holds else "already" if is_known else "emitted")
        if not holds or is_known:
            return
        if last and number > last + 1:
            Watched.seen.add(("model", "gap"))
            record.emitted = []
        record.emitted.append((number, size))
        while len(record.emitted) > MOST_ITEMS or sum(size for _, size in record.emitted) > MOST_BYTES:
            Watched.seen.add(("model", "dropped"))
            del record.emitted[0]
        assert self.rig.word(call) == "already"

    def trace(self, record: Record, attempt: Attempt, holds: bool) -> None:
        call = self.rig.calls.trace(attempt, f"00-{attempt.number}-1-01")
        assert self.rig.word(call) == ("traced" if holds else "lost")
        if holds:
            record.traced = record.attempts

    def link(self, uri: str, record: Record) -> None:
        """A submit leaves its trace context, or learns that of the execution."""
        is_told = 0 < record.traced == record.attempts
        word = self.rig.word(self.rig.calls.link(BatchRequest(uri).key, "00-9-9-01"))
        has_run = record.state != "pending" or record.is_led
        if has_run and is_told:
            assert word == "linked"
        else:
            assert word == ("left" if record.in_flight else "unknown")

    def act_admit(self, uri: str, record: Record, attempt: Attempt, holds: bool, data: st.DataObject) -> None:
        if holds:
            self.ask_for_a_place(uri, attempt)
        else:
            assert self.rig.word(self.rig.admit(attempt, self.places)) == "lost"

    def ask_for_a_place(self, uri: str, attempt: Attempt) -> None:
        ticket = self.rig.parking_ticket(attempt)
        call = self.rig.admit(attempt, self.places, ticket=ticket)
        wanted = self.asked_for_a_place(uri, self.world.records[uri], ticket.job_id)
        for _ in range(2):
            assert self.rig.word(call) == wanted

    def asked_for_a_place(self, uri: str, record: Record, job_id: str) -> str:
        if record.place == "running":
            return "admitted"
        if len(self.placed("running", "called")) >= self.places:
            last = max(self.placed("called"), key=lambda other: other.standing, default=record)
            if last.standing <= record.standing:
                self.back_in_line(record, job_id, delayed=True)
                self.push(uri, job_id, record.priority, delayed=True)
                record.attempts -= 1
                record.place = "parked"
                Watched.executions["parked"] += 1
                return "parked"
            last.place = ""
        record.place = "running"
        return "admitted"

    def act_complete(self, uri: str, record: Record, attempt: Attempt, holds: bool, data: st.DataObject) -> None:
        sticky, hours = data.draw(st.booleans()), data.draw(st.integers(0, 3))
        up = self.rig.follow_up(attempt) if data.draw(st.booleans()) else None
        payloads = self.world.payloads.get(uri, set())
        call = self.rig.complete(attempt, secrets.token_hex(4), sticky=sticky, ttl_ms=hours * HOUR_MS, follow_up=up)
        is_done = record.state == "completed" and record.done_token == int(attempt.token)
        assert self.rig.word(call) == ("already" if is_done else "stored" if holds else "lost")
        if holds:
            keep = record.sticky or (sticky and record.ttl_ms == 0)
            self.stored(uri, record, keep, record.ttl_ms or hours * HOUR_MS or record.fallback_ms)
            record.done_token = int(attempt.token)
            assert self.rig.word(call) == "already"
            self.told(up, payloads)

    def told(self, up: NextUp | None, payloads: set[str]) -> None:
        """A follow-up was made once, and runs at once: it has the payloads, and leaves nothing behind."""
        if up is None:
            return
        lists, key = self.rig.jobs.lists("arm"), up.request.key
        kept = self.client.hgetall(self.rig.named("callbacks", key=key))
        assert {name.decode() for name in kept} == payloads
        assert sum(self.client.lrem(name, 0, up.ticket.job_id) for name in lists) == 1
        attempt = self.rig.ask(self.rig.start(key, up.ticket.job_id))
        assert isinstance(attempt, Attempt)
        for word in ("concluded", "already"):
            assert self.rig.word(self.rig.calls.conclude(attempt)) == word
        self.client.delete(f"{self.rig.jobs.job_prefix}{up.ticket.job_id}")
        assert not self.client.exists(*(self.rig.named(kind, key=key) for kind in ("status", "followup", "callbacks")))

    @precondition(lambda self: any(record.reason for record in self.world.records.values()))
    @rule(kind=st.sampled_from([FollowUp.FAILURE, FollowUp.QUARANTINE]))
    def attend(self, kind: FollowUp) -> None:
        """A worker sees to what was set aside."""
        uri = next(uri for uri, record in self.world.records.items() if record.reason)
        record = self.world.records[uri]
        attempt = Attempt(
            self.key(uri), Token(0), 1, BatchRequest(uri), {}, 0, 0, queue="arm", priority=Priority(record.priority)
        )
        score = self.client.zscore(self.rig.named("unattended", follow_up=kind), attempt.key)
        assert (score is not None) == (kind in record.untold)
        up = self.rig.follow_up(attempt, kind, int(score or 0))
        call = self.rig.calls.attend(attempt.key, int(score or 0), up)
        assert self.rig.word(call) == ("attended" if kind in record.untold else "already")
        assert self.rig.word(call) == "already"
        if kind in record.untold:
            record.untold.discard(kind)
            self.told(up, self.world.payloads.get(uri, set()))

    def act_fail(self, uri: str, record: Record, attempt: Attempt, holds: bool, data: st.DataObject) -> None:
        negative, reason = data.draw(st.booleans()), data.draw(st.sampled_from(["", "exhausted", "asked"]))
        up = self.rig.follow_up(attempt, FollowUp.FAILURE) if data.draw(st.booleans()) else None
        call = self.rig.fail(
            attempt,
            negative_ms=HOUR_MS if negative else 0,
            reason=reason,
            note=b"n" if reason else b"",
            follow_ups=[up] if up else [],
        )
        is_done = record.state == "failed" and record.done_token == int(attempt.token)
        assert self.rig.word(call) == ("already" if is_done else "failed" if holds else "lost")
        if holds:
            self.landed(record, "failed", negative=negative)
            record.negative, record.done_token, record.reason = negative, int(attempt.token), reason
            record.note("failed")
            record.untold = {FollowUp.FAILURE, FollowUp.QUARANTINE} if reason else set()
            if up is not None:
                record.untold.discard(FollowUp.FAILURE)
                self.told(up, self.world.payloads.get(uri, set()))
                if not reason:
                    self.world.payloads.pop(uri, None)

    def act_retry(self, uri: str, record: Record, attempt: Attempt, holds: bool, data: st.DataObject) -> None:
        delay = data.draw(st.sampled_from([0, 3600]))
        ticket = self.rig.ticket(attempt.request, delay=delay, priority=Priority(record.priority))
        call = self.rig.retry(attempt, ticket, delay_ms=delay * 1000)
        assert self.rig.word(call) == ("retried" if holds else "lost")
        if holds:
            self.back_in_line(record, ticket.job_id, delayed=delay > 0)
            record.retries += 1
            record.note("retried")
            self.push(uri, ticket.job_id, record.priority, delayed=delay > 0)
            assert self.rig.word(call) == "already"

    def act_release(self, uri: str, record: Record, attempt: Attempt, holds: bool, data: st.DataObject) -> None:
        ticket = self.rig.jobs.enqueue_at_front(self.key(uri), uri, "arm", Priority(record.priority))
        call = self.rig.calls.release(attempt, ticket)
        assert self.rig.word(call) == ("released" if holds else "lost")
        if holds:
            self.back_in_line(record, ticket.job_id)
            record.attempts -= 1
            self.push(uri, ticket.job_id, record.priority, front=True)
            assert self.rig.word(call) == "already"

    def act_redirect(self, uri: str, record: Record, attempt: Attempt, holds: bool, data: st.DataObject) -> None:
        self.redirect_to(uri, record, attempt, holds, data.draw(st.sampled_from(URIS)))

    @precondition(lambda self: self.running() and self.ended())
    @rule(data=st.data())
    def redirect_to_what_has_ended(self, data: st.DataObject) -> None:
        uri, target = data.draw(st.sampled_from(self.running())), data.draw(st.sampled_from(self.ended()))
        self.redirect_to(uri, self.world.records[uri], self.attempts[uri][-1], True, target)

    def ended(self) -> list[str]:
        return [uri for uri, record in self.world.records.items() if not record.in_flight]

    def redirect_to(self, uri: str, record: Record, attempt: Attempt, holds: bool, target: str) -> None:
        call = self.rig.redirect(attempt, self.key(target))
        if record.alias and record.redirected_by == int(attempt.token):
            assert self.rig.word(call) == "already"
            return
        wanted = self.redirected(uri, record, target, int(attempt.token)) if holds else "lost"
        assert self.rig.word(call) == wanted
        assert self.rig.word(call) == ("already" if wanted in ("linked", "aliased", "failed", "cancelled") else wanted)

    def redirected(self, uri: str, record: Record, target: str, token: int) -> str:
        aim = self.world.records.get(target)
        root = aim.alias if aim is not None and aim.alias and aim.state in ("pending", "completed") else target
        if target == uri or (aim is not None and aim.in_flight and root == uri):
            return "loop"
        if aim is None or (aim.state == "completed" and not self.answers(target)):
            return "gone"
        led = [record, *self.aliases(uri, "pending")]
        record.state = "pending"
        record.token, record.execution, record.lapsed, record.redirected_by = 0, "", False, token
        record.emitted = []
        self.vacate(record)
        for each in led:
            each.alias = root
        payloads = self.world.payloads.pop(uri, set())
        if aim.in_flight:
            holder = self.world.records[root]
            holder.sticky |= record.sticky
            holder.ttl_ms = max(holder.ttl_ms, record.ttl_ms)
            holder.fallback_ms = max(holder.fallback_ms, record.fallback_ms)
            for payload in payloads:
                self.keep(root, payload)
            return "linked"
        if aim.state == "completed":
            self.lengthened(target, sticky=record.sticky, ttl_ms=record.ttl_ms)
            for each in led:
                each.state, each.sticky = "completed", self.world.records[root].sticky
            return "aliased"
        for each in led:
            each.state, each.negative = aim.state, aim.negative
        if aim.state == "failed" and payloads:
            self.world.payloads[uri] = payloads
        return aim.state

    def act_crash(self, uri: str, record: Record, attempt: Attempt, holds: bool, data: st.DataObject) -> None:
        by_clock = data.draw(st.booleans())
        ticket = self.rig.ticket(attempt.request, priority=Priority(record.priority))
        call = self.rig.crash(self.key(uri), None if by_clock else attempt.token, ticket)
        is_dead = record.state == "in_progress" and record.lapsed if by_clock else holds
        wanted = self.died(uri, record, ticket.job_id, delayed=False) if is_dead else "alive"
        assert self.rig.word(call) == wanted
        assert self.rig.word(call) == ("already" if is_dead else "alive")

    def revive(self, uri: str, data: st.DataObject) -> None:
        """A sweep that was slow: what it found may have changed since."""
        if not self.tickets[uri]:
            return
        record = self.world.records.get(uri)
        old = data.draw(st.sampled_from(self.tickets[uri][-3:][::-1]))
        rank = record.priority if record is not None else 1
        ticket = self.rig.ticket(BatchRequest(uri), priority=Priority(rank))
        found = Overdue(self.key(uri), uri, "arm", Priority(rank), job_id=old)
        call = self.rig.calls.revive(found, ticket)
        if record is not None and record.state == "pending" and record.job_id == old and not record.is_led:
            assert self.rig.word(call) == "revived"
            self.back_in_line(record, ticket.job_id)
            self.push(uri, ticket.job_id, record.priority)
            assert self.rig.word(call) == "already"
        else:
            assert self.rig.word(call) == "alive"

    # -- faults

    @rule(
        uri=uris,
        data=st.data(),
        what=st.sampled_from(["revive", "delete_job", "deliver_twice", "empty_queue", "evict", "flushdb"]),
    )
    def disturb(self, uri: str, data: st.DataObject, what: str) -> None:
        getattr(self, what)(uri, data)

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def lapse(self, data: st.DataObject) -> None:
        uri = data.draw(st.sampled_from(self.running()))
        self.rig.lapse(self.key(uri))
        self.world.records[uri].lapsed = True

    @precondition(lambda self: any(record.lapsed or self.is_dead(record) for record in self.world.records.values()))
    @rule()
    def sweep(self) -> None:
        records = self.world.records
        for uri, record in records.items():
            if record.state == "pending":
                self.rig.age(self.key(uri))
        lapsed = [uri for uri, record in records.items() if record.lapsed]
        lost = [
            uri
            for uri, record in sorted(records.items(), key=lambda item: (item[1].priority, item[1].order))
            if self.is_dead(record)
        ]
        assert self.rig.run(flows.sweep(self.rig.core)) == len(lapsed) + len(lost)
        for uri in lapsed:
            self.died(uri, records[uri], self.stored_job(uri), delayed=True)
        for uri in lost:
            job_id = self.stored_job(uri)
            assert job_id != records[uri].job_id
            self.back_in_line(records[uri], job_id)
            self.push(uri, job_id, records[uri].priority)
        assert self.rig.run(flows.sweep(self.rig.core)) == 0

    def stored_job(self, uri: str) -> str:
        return self.rig.record(self.key(uri))["job_id"]

    def delete_job(self, uri: str, data: st.DataObject) -> None:
        record = self.world.records.get(uri)
        if record is not None and record.job_id:
            self.client.delete(f"{self.rig.jobs.job_prefix}{record.job_id}")
            self.world.jobs.pop(record.job_id, None)

    def deliver_twice(self, uri: str, data: st.DataObject) -> None:
        if self.tickets[uri]:
            rank = data.draw(priorities)
            job_id = data.draw(st.sampled_from(self.tickets[uri][-3:]))
            self.client.rpush(self.rig.jobs.lists("arm")[rank], job_id)
            self.world.lists[rank].append(job_id)

    def empty_queue(self, uri: str, data: st.DataObject) -> None:
        rank = data.draw(priorities)
        self.client.delete(self.rig.jobs.lists("arm")[rank])
        self.world.lists[rank].clear()

    def evict(self, uri: str, data: st.DataObject) -> None:
        self.rig.evict(self.key(uri))
        record = self.world.records.get(uri)
        if record is not None:
            record.has_result = False

    def flushdb(self, uri: str, data: st.DataObject) -> None:
        if data.draw(st.integers(0, 3)) == 3:
            self.client.flushdb()
            self.forget_counts()
            self.world = World()

    # -- what holds after each step

    @invariant()
    def the_server_agrees(self) -> None:
        world = self.world
        assert tuple(self.rig.waiting()) == world.lists
        waiting = [
            (r.priority, r.order, uri) for uri, r in world.records.items() if r.state == "pending" and not r.alias
        ]
        assert self.rig.line() == [self.key(uri) for _, _, uri in sorted(waiting)]
        for uri in URIS:
            self.record_agrees(uri, world.records.get(uri))
            kept = {name.decode() for name in self.client.hgetall(self.rig.named("callbacks", key=self.key(uri)))}
            assert kept == world.payloads.get(uri, set())

    def record_agrees(self, uri: str, record: Record | None) -> None:
        stored = self.rig.record(self.key(uri))
        assert stored.get("state") == (record.state if record is not None else None)
        seen = self.rig.ask(self.rig.calls.follow(self.key(uri), "", 0))
        if record is None:
            assert seen is None
            return
        assert [(n, len(value)) for n, value in enumerate(seen.values, seen.first)] == record.emitted
        assert stored.get("job_id", "") == record.job_id
        assert record.state != "pending" or ("due_ms" in stored) == record.delayed
        assert stored.get("limit") == (LIMIT if record.place else None)
        assert ("recall" in stored) == (record.place == "parked")
        assert stored.get("alias", "") == (self.key(record.alias) if record.alias else "")
        counts = [int(stored.get(name, 0)) for name in ("attempts", "crashes", "retries", "token")]
        assert counts == [record.attempts, record.crashes, record.retries, record.token]
        shown = self.rig.ask(detail.inspect_call(self.rig.core, self.key(uri)))
        noted = [(each.number, each.outcome) for each in shown.attempts if each.error is not None]
        assert noted == sorted(record.tried.values())
        assert stored.get("quarantined", "") == record.reason
        if record.in_flight:
            assert int(stored["priority"]) == record.priority
            assert int(stored["ttl_ms"]) == record.ttl_ms
            assert int(stored["fallback_ttl_ms"]) == record.fallback_ms
        if record.in_flight or self.answers(uri):
            assert stored["sticky"] == str(int(record.sticky))
        if record.has_result and not record.sticky and not record.retained:
            expires = self.client.pexpiretime(self.rig.named("result", key=self.key(uri)))
            assert expires - int(stored["ended_ms"]) == record.life_ms
        assert self.client.exists(self.rig.named("result", key=self.key(uri))) == int(record.has_result)

    @invariant()
    def no_limit_is_exceeded_and_nobody_waits_in_vain(self) -> None:
        taken = len(self.placed("running", "called"))
        assert taken <= self.places
        assert taken == self.places or not self.placed("parked")
        kinds = {kind: self.client.zcard(self.rig.named(kind, limit=LIMIT)) for kind in ("running", "called", "parked")}
        assert kinds == {kind: len(self.placed(kind)) for kind in kinds}

    @invariant()
    def the_counters_tell_what_was_done(self) -> None:
        told = self.rig.run(inspect.overview(self.rig.core))
        assert Counter(told.submissions) == Watched.submissions
        assert Counter(told.executions) == Watched.executions
        by_minute, by_route = Counter[str](), Counter[str]()
        for minute in told.minutes:
            by_minute.update(minute.submissions)
            by_minute.update(minute.executions)
        for route in told.routes:
            by_route.update(route.submissions)
        assert by_minute == Watched.submissions + Watched.executions
        assert by_route == Watched.submissions
        assert sum(route.completed for route in told.routes) == Watched.executions["completed"]
        assert sum(each.hits for each in told.hot) <= Watched.submissions["hit"]

    @invariant()
    def the_audit_finds_nothing(self) -> None:
        lost = [self.key(uri) for uri, record in self.world.records.items() if self.is_lost(record)]
        audit(self.client, self.rig.keys, lost=lost)


@pytest.fixture(scope="module")
def machine_server() -> Iterator[embedded.PrivateServer]:
    binary = servers.VALKEY or servers.REDIS
    if binary is None:
        pytest.skip(servers.MISSING["valkey"])
    with servers.throwaway(binary) as started:
        yield started


def test_no_order_of_transitions_and_faults_makes_server_and_model_disagree(
    machine_server: embedded.PrivateServer,
) -> None:
    Machine.server = machine_server
    for number in range(1 if EXAMPLES else ROUNDS):
        wanderer = Machine if EXAMPLES else seed(number)(Machine)
        run_state_machine_as_test(wanderer, settings=PROFILE)
        missed = {(verb, word) for verb, words in REACHED for word in words.split()} - Watched.seen
        if not missed:
            break
    assert not missed, "the machine wanders too little"
