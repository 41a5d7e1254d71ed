"""The state audit: what must be true of the key space between any two transitions.

``audit`` reads everything once and fails with the list of all that is wrong. It takes nothing on trust from the
scripts: sums are added up anew, indexes are compared with the records they point at, both ways.

A breach is tolerated only where the design says so: an entry of the results index may outlive its result (TTL,
eviction, DEL) until the sweep or the next claim; ``lost`` names the requests whose ticket a test took away.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import Any
from zlib import decompress

import redis
from drive import Snapshot, arguments_of, server_ms, snapshot
from rq.job import Job

from rqarm.keys import Keys

STRIDE = 2.5e15
RADIX = 128
IN_FLIGHT = ("pending", "in_progress")
#: how long a server lets writers wait for an audit at the most
PAUSE_MS = 10_000
#: keys of ours that may carry a TTL: a result and its record, and the throttle of the sweep
MAY_EXPIRE = ("status:", "result:", "chunk:", "callbacks:", "followup:", "emitted:", "aliases:", "traces:", "swept")
RQ_LIST = "rq:queue:"
TICKET = re.compile(r"^(?P<key>[A-Za-z0-9_-]+)-[0-9a-f]{8}$")


def audit(client: redis.Redis, keys: Keys, *, lost: Collection[str] = ()) -> None:
    """Fails the test unless every invariant holds. ``lost``: keys whose RQ ticket was taken away or put elsewhere."""
    now_ms = server_ms(client)
    breaches = _Audit(snapshot(client), keys, now_ms, lost).breaches()
    assert not breaches, "\n".join(["the key space is inconsistent:", *breaches])


def audit_in_motion(client: redis.Redis, keys: Keys) -> None:
    """The same where workers run: nobody writes meanwhile, for what changes between two reads looks wrong."""
    client.client_pause(PAUSE_MS, all=False)
    try:
        audit(client, keys)
    finally:
        client.client_unpause()


class _Audit:
    def __init__(self, stored: Snapshot, keys: Keys, now_ms: int, lost: Collection[str]) -> None:
        self.stored, self.keys, self.now_ms, self.lost = stored, keys, now_ms, lost
        prefix = keys.status("")  # type: ignore[arg-type]
        self.records: dict[str, dict[str, str]] = {
            name.removeprefix(prefix): _texts(value)
            for name, (_, value, _) in stored.items()
            if name.startswith(prefix)
        }
        self.found: list[str] = []

    def breaches(self) -> list[str]:
        self._nothing_in_flight_expires()
        self._leases()
        self._lines()
        self._loads()
        self._results()
        self._quarantine()
        self._emissions()
        self._tickets()
        self._limits()
        self._views()
        self._counters()
        self._redirects()
        return self.found

    def _check(self, holds: Any, claim: str) -> None:
        if not holds:
            self.found.append(f"- {claim}")

    def _value(self, kind: str, **parts: str) -> Any:
        entry = self.stored.get(self.keys.named(kind, **parts))
        return None if entry is None else entry[1]

    def _zset(self, kind: str, **parts: str) -> dict[str, float]:
        return {member.decode(): score for member, score in self._value(kind, **parts) or []}

    def _expiry(self, kind: str, **parts: str) -> int | None:
        entry = self.stored.get(self.keys.named(kind, **parts))
        return None if entry is None else entry[2]

    def _in_state(self, *states: str) -> dict[str, dict[str, str]]:
        return {key: record for key, record in self.records.items() if record.get("state") in states}

    def _nothing_in_flight_expires(self) -> None:
        for name, (_, _, expires) in self.stored.items():
            if name.startswith(self.keys.prefix) and expires >= 0:
                own = name.removeprefix(self.keys.prefix)
                self._check(own.startswith(MAY_EXPIRE), f"{name} has a TTL")
        for key in self._in_state(*IN_FLIGHT):
            for kind in ("status", "callbacks", "followup", "emitted"):
                expires = self._expiry(kind, key=key)
                self._check(expires in (-1, None), f"{kind} of {key} in flight has a TTL")

    def _in_line(self) -> dict[str, dict[str, str]]:
        return {key: record for key, record in self._in_state("pending").items() if "alias" not in record}

    def _leases(self) -> None:
        leases = self._zset("leases")
        running = self._in_state("in_progress")
        self._check(leases.keys() == running.keys(), f"leases {sorted(leases)} are not those of {sorted(running)}")
        for key, record in running.items():
            self._check({"token", "exec", "lease_until"} <= record.keys(), f"{key} runs without token, exec or lease")
            self._check(leases.get(key) == float(record.get("lease_until", "nan")), f"lease of {key}: index and record")
        for key in self.records.keys() - running.keys():
            held = {"token", "exec", "lease_until"} & self.records[key].keys()
            self._check(not held, f"{key} is {self.records[key].get('state')} and still has {held}")

    def _queues(self) -> set[str]:
        prefix = self.keys.named("pending", queue="")
        stored = {name.removeprefix(prefix) for name in self.stored if name.startswith(prefix)}
        return stored | {record["queue"] for record in self._in_line().values()}

    def _lines(self) -> None:
        for queue in self._queues():
            line = self._zset("pending", queue=queue)
            waiting = {key: r for key, r in self._in_line().items() if r["queue"] == queue}
            self._check(line.keys() == waiting.keys(), f"line {queue} {sorted(line)} is not {sorted(waiting)}")
            for key, record in waiting.items():
                score = int(record["priority"]) * STRIDE + int(record["ticket"])
                self._check(line.get(key) == score, f"{key} stands at {line.get(key)}, not at {score}")
            known = self._value("queues") or []
            self._check(not waiting or queue.encode() in known, f"queue {queue} is used and not listed")

    def _loads(self) -> None:
        prefix = self.keys.named("load", queue="")
        for queue in self._queues() | {n.removeprefix(prefix) for n in self.stored if n.startswith(prefix)}:
            waiting = [r for r in self._in_line().values() if r["queue"] == queue]
            load = {name: int(sum_ms) for name, sum_ms in _texts(self._value("load", queue=queue) or {}).items()}
            self._check(waiting or not load, f"load of {queue} outlives its line: {load}")
            wanted: Counter[str] = Counter()
            for record in waiting:
                rank, n = record["slot"].split(":")
                self._check(rank == record["priority"], f"slot {record['slot']} of priority {record['priority']}")
                self._check(int(n) <= load.get(f"{rank}n", 0), f"slot {record['slot']} was never given out")
                for field in (f"{rank}t", *(f"{rank}{level}:{int(n) // RADIX**level}" for level in range(3))):
                    wanted[field] += int(record["est_ms"])
            sums = {name: sum_ms for name, sum_ms in load.items() if sum_ms and name[1:] not in ("n", "f")}
            wanted_sums = {name: sum_ms for name, sum_ms in wanted.items() if sum_ms}
            self._check(sums == wanted_sums, f"load of {queue} is {sums}, the line adds up to {wanted_sums}")
            self._check(all(sum_ms >= 0 for sum_ms in load.values()), f"load of {queue} is below 0: {load}")

    def _results(self) -> None:
        index, sizes = self._zset("results"), self._zset("sizes")
        prefix = self.keys.named("result", key="")
        results = {n.removeprefix(prefix): entry for n, entry in self.stored.items() if n.startswith(prefix)}
        # by callbacks that have not run yet
        prefix = self.keys.named("followup", key="")
        needed = {entry[1].get(b"of", b"").decode() for n, entry in self.stored.items() if n.startswith(prefix)}
        for key, (_, value, expires) in results.items():
            fields = _texts(value)
            record = self.records.get(key, {})
            self._check(record.get("state") == "completed", f"{key} has a result and is {record.get('state')}")
            self._check(index.get(key) == (expires if expires >= 0 else float("inf")), f"{key}: index and TTL disagree")
            self._check(self._expiry("status", key=key) == expires, f"{key}: record and result expire apart")
            sticky = record.get("sticky") == "1"
            self._check(sticky == (expires < 0), f"{key}: sticky is {sticky}, it expires at {expires}")
            for n in range(int(fields.get("chunks", 0))):
                chunk = self._expiry("chunk", key=key, owner=fields["owner"], n=str(n))
                is_right = chunk == expires or (chunk is not None and key in needed and chunk > expires)
                self._check(is_right, f"{key}: chunk {n} expires at {chunk}, the result at {expires}")
        for key, due_ms in index.items():
            if key not in results and due_ms > self.now_ms:
                state = self.records.get(key, {}).get("state", "unknown")
                self._check(state in ("completed", "unknown"), f"{key} is {state} and still in the results index")
        self._check(sizes.keys() == index.keys(), f"sizes of {sorted(sizes)}, results of {sorted(index)}")
        counted = int((self._value("stats", family="cache") or {}).get(b"bytes", 0))
        self._check(counted == sum(sizes.values()), f"{counted} bytes are counted, {sum(sizes.values())} are stored")

    def _counters(self) -> None:
        """What was noted is added up from one look to the next, so the sums agree whenever one looks."""
        for family in ("submissions", "executions"):
            notes = self._value("noted", family=family) or []
            self._check(len(notes) < 100, f"{len(notes)} notes of {family} wait to be added up")
            counted = _texts(self._value("stats", family=family) or {})
            totals = {word: int(n) for word, n in counted.items() if word.isalpha()}
            sums: dict[str, Counter[str]] = {kind: Counter() for kind in ("m", "r", "q", "run", "wait", "size")}
            for name, value in counted.items():
                kind, _, rest = name.partition(":")
                kind, word = ("m" if re.fullmatch(r"m\d+", kind) else kind), rest.partition(":")[0]
                if kind in sums and word != "sum":
                    sums[kind][word if kind in "mrq" else kind] += int(value.split()[-1])
            self._check(sums["m"] <= Counter(totals), f"{family} by minute: {sums['m']}, in all {totals}")
            by_route = Counter(totals) if family == "submissions" else Counter(completed=totals.get("completed", 0))
            self._check(sums["r"] == by_route, f"{family} by route: {sums['r']}, in all {totals}")
            if family == "executions":
                ends = Counter({word: totals.get(word, 0) for word in ("completed", "failed")})
                self._check(sums["q"] == ends, f"ends by queue: {sums['q']}, in all {totals}")
                times = [sums["run"].total(), sums["wait"].total(), sums["size"].total()]
                wanted = [ends.total(), ends.total(), ends["completed"]]
                self._check(times == wanted, f"histograms of {times}, not of {wanted}")

    def _emissions(self) -> None:
        prefix = self.keys.named("emitted", key="")
        for name, (_, items, expires) in self.stored.items():
            if not name.startswith(prefix):
                continue
            key, (head, *values) = name.removeprefix(prefix), items
            token, first, size = (int(part) for part in head.split(b":"))
            record = self.records.get(key, {})
            self._check(record.get("emitted") == str(token), f"{key}: its record does not know what {token} emitted")
            running = record.get("token")
            self._check(running in (None, str(token)), f"{key}: {token} emitted and {running} runs")
            self._check(values and first >= 1, f"{key}: nothing is left of what it emitted")
            self._check(size == sum(map(len, values)), f"{key}: {size} bytes are noted, what it emitted has others")
            life = self._expiry("status", key=key)
            self._check(life is None or expires == life, f"{key}: record and emissions expire apart")
        for key in self._in_state("pending"):
            self._check("emitted" not in self.records[key], f"{key} is pending and still has what an attempt emitted")

    def _quarantine(self) -> None:
        aside = {key for key, record in self._in_state("failed").items() if "quarantined" in record}
        index = self._zset("quarantine")
        self._check(index.keys() == aside, f"quarantine {sorted(index)}, records say {sorted(aside)}")
        for key, record in self.records.items():
            marked = bool({"quarantined", "note"} & record.keys())
            self._check(not marked or record.get("state") == "failed", f"{key} is marked as quarantined")
        for key in aside:
            self._check(self._expiry("status", key=key) == -1, f"{key} is quarantined and expires")
            payloads = self._expiry("callbacks", key=key)
            self._check(payloads in (None, -1), f"{key} is quarantined and its payloads expire")
        for kind in ("failure", "quarantine"):
            waiting = self._zset("unattended", follow_up=kind).keys()
            self._check(waiting <= aside, f"unattended {sorted(waiting)}, quarantined {sorted(aside)}")

    def _views(self) -> None:
        """The indexes that only views and invalidations read hold all that they must; they may hold more."""
        for state in ("failed", "cancelled"):
            listed = self._zset("ended", state=state).keys()
            ended = {key for key, record in self._in_state(state).items() if "quarantined" not in record}
            self._check(ended <= listed, f"{sorted(ended - listed)} are {state} and not listed")
            # what has expired stays until a sweep looks
            others = listed & self.records.keys() - ended
            self._check(not others, f"{sorted(others)} are listed as {state}")
        for key, record in self.records.items():
            tags = record.get("tags", "")
            self._check(not tags or key + tags in self._zset("tagged"), f"{key} is not among those with tags")
            for tag in tags.split("\n")[1:-1]:
                self._check(key in self._zset("tag", tag=tag), f"{key} has tag {tag} and is not in its index")

    def _limits(self) -> None:
        """Each limit's places and those who wait for one; nobody waits while there is room."""
        places = {name: int(n) for name, n in _texts(self._value("limits") or {}).items()}
        kinds = ("running", "called", "parked")
        prefixes = {kind: self.keys.named(kind, limit="") for kind in kinds}
        stored = {name.removeprefix(p) for name in self.stored for p in prefixes.values() if name.startswith(p)}
        for limit in stored | places.keys() | {r["limit"] for r in self.records.values() if "limit" in r}:
            wanted: dict[str, set[str]] = {kind: set() for kind in kinds}
            for key, record in self.records.items():
                if record.get("limit") == limit:
                    waits = "parked" if "recall" in record else "called"
                    wanted["running" if record["state"] == "in_progress" else waits].add(key)
            for kind in kinds:
                found = self._zset(kind, limit=limit).keys()
                self._check(found == wanted[kind], f"{kind} under {limit} {sorted(found)}, not {sorted(wanted[kind])}")
            for key, score in self._zset("parked", limit=limit).items():
                record = self.records.get(key, {})
                in_line = self._zset("pending", queue=record.get("queue", "")).get(key)
                self._check(score == in_line, f"{key} is parked at {score} and stands at {in_line}")
            room = places.get(limit, 0) - len(wanted["running"]) - len(wanted["called"])
            self._check(limit in places, f"nobody knows the places under {limit}")
            self._check(not wanted["parked"] or room <= 0, f"{room} places under {limit}, and {wanted['parked']} wait")
        for key, record in self.records.items():
            waits = {"recall", "recall_data"} & record.keys()
            self._check(
                not waits or (record["state"] == "pending" and {"limit", "needs"} & record.keys()),
                f"{key} is not parked: {waits}",
            )
            self._check("limit" not in record or record["state"] in IN_FLIGHT, f"{key} has ended under a limit")

    def _redirects(self) -> None:
        """Aliases in flight are known to their root, and to the sweep; those that have ended well, to the indexes."""
        led = {key: r for key, r in self._in_state("pending").items() if "alias" in r}
        index = self._zset("redirected")
        self._check(index.keys() == led.keys(), f"redirected {sorted(index)}, records say {sorted(led)}")
        for key, record in led.items():
            root = self.records.get(record["alias"], {})
            known = self._value("aliases", key=record["alias"]) or []
            self._check(key.encode() in known, f"{record['alias']} does not know its alias {key}")
            self._check(self._expiry("aliases", key=record["alias"]) == -1, f"the aliases of {record['alias']} expire")
            in_flight = root.get("state") in IN_FLIGHT and "alias" not in root
            self._check(in_flight or key in self.lost, f"{key} leads to {record['alias']}, which is not in flight")
            self._check("token" not in record, f"{key} is redirected and runs")
        for key, record in self.records.items():
            for root in record.get("needs", "").split():
                known = self._value("aliases", key=root) or []
                self._check(
                    record["state"] != "pending" or key.encode() in known, f"{root} does not know that {key} needs it"
                )
        prefix = self.keys.named("aliases", key="")
        for name, (_, members, _) in self.stored.items():
            for key in (m.decode() for m in members) if name.startswith(prefix) else ():
                root = name.removeprefix(prefix)
                record = self.records.get(key, {"alias": root})
                # who needed it and was moved up or cancelled stays until it ends
                is_known = record.get("alias") == root or self.records.get(root, {}).get("state") in IN_FLIGHT
                self._check(is_known, f"{key} neither leads to {root} nor needs it")
        results = self._zset("results")
        for key, record in self._in_state("completed").items():
            if "alias" in record:
                expires = self._expiry("status", key=key)
                due = float("inf") if expires == -1 else expires
                self._check(results.get(key) == due, f"alias {key}: index and TTL disagree")
                self._check(self._expiry("result", key=key) is None, f"alias {key} has a result of its own")
        for key in self._in_state("in_progress"):
            self._check("alias" not in self.records[key], f"{key} runs and is an alias")

    def _tickets(self) -> None:
        prefix: str = Job.redis_job_namespace_prefix
        jobs = {n.removeprefix(prefix): entry for n, entry in self.stored.items() if n.startswith(prefix)}
        for job_id, (_, value, _) in jobs.items():
            if value.keys() <= {b"last_heartbeat"}:
                # RQ ended it between our two looks; its heartbeat may put that field back, sees it, and deletes it
                continue
            if not decompress(value[b"data"]).startswith(b"["):
                continue  # an ordinary job, pickled: ours never are
            call = arguments_of(value[b"data"])
            if call[0] == "rqarm.worker.perform" and call[2][0] == self.keys.namespace:
                match = TICKET.match(job_id)
                self._check(match and call[2] == [self.keys.namespace], f"job {job_id} calls for {call[2]}")
        for key, record in self._in_line().items():
            if key not in self.lost:
                self._delivery(key, record, jobs.get(record["job_id"]))

    def _delivery(self, key: str, record: dict[str, str], job: tuple[str, Any, int] | None) -> None:
        """A pending request has one ticket, and that stands where its record says."""
        if job is None:
            self._check(False, f"the ticket of {key} is gone")
            return
        self._check(job[2] == -1, f"the ticket of {key} expires")
        name = record["queue"] + ("-high", "", "-low")[int(record["priority"])]
        entries = (self.stored.get(RQ_LIST + name) or ("list", [], -1))[1]
        scheduled = (self.stored.get(f"rq:scheduled:{name}") or ("zset", [], -1))[1]
        places = [*entries, *(member for member, _ in scheduled)].count(record["job_id"].encode())
        self._check(places >= 1, f"the ticket of {key} is not in {name}")


def _texts(fields: dict[bytes, bytes]) -> dict[str, str]:
    return {name.decode(): value.decode("latin-1") for name, value in fields.items()}
