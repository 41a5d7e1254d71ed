"""RequestManager: the way in for blocking code. Each method says which flow runs; rqarm.shell runs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import redis

from rqarm import bulk, connect, flows, following, inline
from rqarm.browse import claims, detail, events, listing, search, workers
from rqarm.browse.claims import ClaimPage
from rqarm.browse.detail import RequestDetail
from rqarm.browse.events import Event
from rqarm.browse.explain import Explanation, explain
from rqarm.browse.search import SearchPage
from rqarm.browse.workers import WorkersView
from rqarm.bulk import Entries, Entry, OnError
from rqarm.cache import Cache
from rqarm.config import Settings
from rqarm.flows import Core
from rqarm.following import FollowEvent
from rqarm.inline import BulkResult, Compute, Mitigation, OnHits
from rqarm.inspect import Overview, overview
from rqarm.model import BatchStatus
from rqarm.quarantine import Quarantine
from rqarm.queue import Lease, Queues
from rqarm.request import BatchRequest
from rqarm.rqjobs import RqJobs
from rqarm.shell import GIVEN, Shell


class RequestManager:
    """Submit requests, look at them, wait for them.

    Without a URL and without RQARM_URL it uses the embedded server of this user, which it starts when needed. Any
    setting of rqarm.config.Settings can be given by name; durations are seconds. Threads may share one manager, and it
    survives a fork. ``connection``: a redis-py client of your own instead of a URL.
    """

    def __init__(self, url: str | None = None, *, connection: redis.Redis | None = None, **settings: Any) -> None:
        self.settings = Settings.load(url=url, **settings)
        where = connect.default_url(self.settings) if connection is None else GIVEN
        self.core = Core(self.settings, RqJobs(self.settings))
        self.shell = Shell(self.core.keys, self.settings, where, connection)
        #: cached results
        self.cache = Cache(self.core, self.shell)
        #: the pull interface
        self.queues = Queues(self.core, self.shell)
        #: failed requests that were set aside
        self.quarantine = Quarantine(self.core, self.shell)

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> RequestManager:
        """A manager for a server: redis://, rediss://, valkey://, unix://, redis+sentinel://host1,host2/service."""
        return cls(url, **settings)

    @property
    def connection(self) -> redis.Redis:
        """The redis-py client, for what rqarm does not do."""
        return self.shell.client

    def submit(self, request: BatchRequest | str, *, payload: Any = None, payload_id: str | None = None) -> BatchStatus:
        """Answer from the cache, join what is in flight, or queue once; ``outcome`` says which. One round trip.

        A str is taken as a URI. ``payload``: for the callback of the route; it joins the payloads of the claim, and of
        several with one ``payload_id`` (by default a hash of the content) the first counts. None: no payload. A hit has
        no callback. The ``value`` of a hit is filled unless it is large (``inline_bytes``). Sending it again after a
        lost reply is safe.

        Raises InvalidRequest, KeyConflict; redis OutOfMemoryError and ReadOnlyError when the server takes no writes.
        """
        return self.shell.run(flows.submit(self.core, request, payload, payload_id=payload_id))

    def submit_many(self, requests: Iterable[BatchRequest | str]) -> list[BatchStatus]:
        """Submit many, 1,000 in a round trip. Equal requests are sent once; answers stand in the order given.

        All are checked before any is sent: InvalidRequest names the first that is wrong, and nothing was sent. Raises
        BulkError when the server did not take some (KeyConflict, ForeignData, no memory): it has the statuses of the
        others. When the connection fails between two round trips, send all of them again: what was taken is joined.
        """
        return self.shell.run(bulk.submit_many(self.core, requests))

    def submit_stream(
        self, requests: Entries, *, chunk: int = bulk.CHUNK, on_error: OnError | None = None
    ) -> Iterator[BatchStatus]:
        """Submit any number in bounded memory: statuses in the order given, read and sent ``chunk`` at a time.

        Lazy: it submits what you iterate over, and a chunk is read in full before it is sent. ``requests``: requests,
        URIs or (request, payload), on an event loop also from an asynchronous iterable. Equal requests of one chunk are
        sent once. ``on_error(position, error)`` is told what was not taken, also what is no request, and the others go
        on; without it a chunk with an error gives the statuses of its others and then raises BulkError.
        """
        return inline.submit_stream(self.core, self.shell, requests, chunk, on_error)

    def bulk_get_or_submit(
        self,
        requests_with_payloads: Iterable[Entry],
        *,
        on_hits: OnHits | None = None,
        mitigation: Mitigation | None = None,
        compute: Compute | None = None,
    ) -> BulkResult[Lease]:
        """Values for what is cached, a submit for the rest: 1,000 in a round trip. An entry may be (request, payload).

        Equal requests are sent once with all their payloads. ``on_hits`` is called once, with all hits as a tuple of
        Hit, unless there are none; when it raises, all submits are done and the error comes out of here. Large values
        are fetched too. An entry that is wrong stands in ``errors``, and the others are served.

        ``mitigation(request)`` is asked about each new request, when all have been submitted. Those it chooses are
        started for you, in one more round trip, and come as ``leases``, which you must finish, fail or release; where a
        worker was faster it stays a miss. With ``compute(request)`` they are computed here, one after the other,
        stored, and count among the hits. A ``compute`` that raises gives that request back to the workers.
        """
        return inline.get_or_submit(self.core, self.shell, requests_with_payloads, on_hits, mitigation, compute)

    def resubmit(
        self, request: BatchRequest | str, *, payload: Any = None, payload_id: str | None = None
    ) -> BatchStatus:
        """Run the request again whatever is cached; what is in flight is joined. The old result goes at once."""
        return self.shell.run(flows.submit(self.core, request, payload, payload_id=payload_id, again=True))

    def status(self, key: str) -> BatchStatus:
        """What is known of a key; state ``unknown`` when nothing is."""
        return self.shell.run(flows.status(self.core, key))

    def full_status(self, key: str) -> BatchStatus:
        """The status with the exact position in line and the seconds until it is done."""
        return self.shell.run(flows.full_status(self.core, key))

    def find(self, key: str) -> BatchRequest | None:
        """The request behind a key, or None."""
        return self.shell.run(flows.find(self.core, key))

    def queue(self, name: str | None = None) -> list[BatchStatus]:
        """What waits in a queue, next first."""
        return self.shell.run(listing.pending(self.core, name))

    def result(self, key: str, timeout: float | None = 0) -> Any:
        """The value of a request, waiting up to ``timeout`` seconds for it (None = for ever).

        Raises ResultNotReady (WaitTimeout after waiting), RequestFailed, Quarantined, RequestCancelled, RequestUnknown,
        CorruptResult: then submit it again.
        """
        return self.shell.run(flows.result(self.core, key, timeout))

    def get(self, request: BatchRequest | str, timeout: float | None = None) -> Any:
        """Submit and wait: the value. Raises what ``submit`` and ``result`` raise."""
        return self.shell.run(flows.get(self.core, request, timeout))

    def get_or_submit(
        self, request: BatchRequest | str, payload: Any = None, *, payload_id: str | None = None
    ) -> tuple[bool, Any]:
        """(True, value) when it is cached, in the same round trip; else it is submitted: (False, status)."""
        return self.shell.run(flows.get_or_submit(self.core, request, payload, payload_id=payload_id))

    def wait(self, keys: str | Iterable[str], timeout: float | None = None) -> list[BatchStatus]:
        """Sleep until all have ended or ``timeout`` seconds are over; the statuses in the order of the keys."""
        return self.shell.run(flows.wait(self.core, keys, timeout))

    def as_completed(self, keys: Iterable[str], timeout: float | None = None) -> Iterator[BatchStatus]:
        """Each status as its request ends. Raises WaitTimeout when the time is over before all have."""
        return self.shell.iterate(flows.as_completed(self.core, keys, timeout))

    def follow(self, request: BatchRequest | str, timeout: float | None = None) -> Iterator[FollowEvent]:
        """What a request emits and how far it is, as it comes; last its result or its error, also as an event.

        A str is taken as a key; nothing is submitted. What was emitted so far comes first, also after the end, as long
        as the result lives. See ``FollowEvent`` for the kinds. A failure is an event, so the loop ends by itself.

        Raises RequestUnknown when there is nothing to follow, WaitTimeout after ``timeout`` seconds.
        """
        return self.shell.iterate(following.follow(self.core, request, timeout))

    def cancel(self, key: str) -> bool:
        """End a request for everybody who waits for it. False when it had ended already: also by this call, when that
        was sent again because its reply was lost. Raises RequestUnknown.
        """
        return self.shell.run(flows.cancel(self.core, key))

    def forget(self, key: str) -> bool:
        """Drop an ended request with its result. False when it is unknown: also when this call was sent again because
        its reply was lost. Raises ResultNotReady while in flight.
        """
        return self.shell.run(flows.forget(self.core, key))

    def explain(self, request: BatchRequest | str) -> Explanation:
        """The canonical form, which rule changed what, the key, and what a submit would do now. Submits nothing."""
        return self.shell.run(explain(self.core, request))

    def overview(self) -> Overview:
        """Queues, hit rate, memory, failures and what needs attention, in one round trip; it only reads.

        See rqarm.inspect for its fields; ``to_dict`` is JSON-ready.
        """
        return self.shell.run(overview(self.core))

    def search(
        self,
        text: str = "",
        *,
        state: str | None = None,
        route: str | None = None,
        tag: str | None = None,
        queue: str | None = None,
        cursor: str = "",
        limit: int = 50,
    ) -> SearchPage:
        """One page of the requests that pass every filter; ``cursor`` of the answer leads to the next. One round trip.

        ``text``: a key, a URI, or a part of a URI, without regard to case; values of secret parameters are not
        searched. What it names exactly comes first. ``state``: one of State, or ``quarantined``. ``route``: an
        operation, or a path as it begins, ``/cities`` or ``api.example.org/v1/{table}``. A call looks at 1,000 records
        at the most, so a page may be short and not be the last: ``looked_at`` of ``total`` says how far it is.
        Raises InvalidRequest.
        """
        return self.shell.run(
            search.search(self.core, text, state=state, route=route, tag=tag, queue=queue, cursor=cursor, limit=limit)
        )

    def inspect(self, key: str, *, values: bool = False) -> RequestDetail:
        """Everything that is known of one request, its result and payloads without their values.

        ``values``: with the payloads themselves. Two round trips at the most.
        """
        return self.shell.run(detail.inspect(self.core, key, values=values))

    def claims(self, *, offset: int = 0, limit: int = 50) -> ClaimPage:
        """What runs, the first to lapse first: holder, lease, last sign of life; and how full the limits are."""
        return self.shell.run(claims.claims(self.core, offset, limit))

    def release(self, key: str) -> bool:
        """Take a running request away from its worker: it is next in line, and the attempt does not count.

        The worker finds at its next renewal that it has lost it. False when it does not run. Raises RequestUnknown.
        """
        return self.shell.run(claims.release(self.core, key))

    def workers(self) -> WorkersView:
        """The RQ workers that listen to our queues: state, requests in hand, counts, heartbeat. Two round trips."""
        return self.shell.run(workers.workers(self.core))

    def events(self, since: str | None = None, timeout: float | None = None) -> Iterator[Event]:
        """Transitions as they happen, until ``timeout`` seconds pass without one (None = for ever, 0 = what is there).

        ``since``: the id of the last event you saw; "0" = the oldest that is kept; None = only what comes. The last
        10,000 or so are kept.
        """
        return self.shell.iterate(events.events(self.core, since, timeout))

    def close(self) -> None:
        """Give all connections back."""
        self.shell.close()

    def __enter__(self) -> RequestManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
