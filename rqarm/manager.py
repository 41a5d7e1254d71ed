"""RequestManager: the way in for blocking code. Each method says which flow runs; rqarm.shell runs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import redis

from rqarm import connect, flows
from rqarm.cache import Cache
from rqarm.config import Settings
from rqarm.flows import Core, Event
from rqarm.model import BatchStatus
from rqarm.quarantine import Quarantine
from rqarm.queue import Queues
from rqarm.request import BatchRequest
from rqarm.rqjobs import RqJobs
from rqarm.shell import GIVEN, Shell
from rqarm.views import Explanation, explain


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
        """Submit any number in one round trip. Equal requests are sent once; answers stand in the order given."""
        return self.shell.run(flows.submit_many(self.core, requests))

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
        return self.shell.run(flows.pending(self.core, name))

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

    def cancel(self, key: str) -> bool:
        """End a request for everybody who waits for it. False when it had ended already. Raises RequestUnknown."""
        return self.shell.run(flows.cancel(self.core, key))

    def forget(self, key: str) -> bool:
        """Drop an ended request with its result. False when it is unknown. Raises ResultNotReady while in flight."""
        return self.shell.run(flows.forget(self.core, key))

    def explain(self, request: BatchRequest | str) -> Explanation:
        """The canonical form, which rule changed what, the key, and what a submit would do now. Submits nothing."""
        return self.shell.run(explain(self.core, request))

    def events(self, since: str | None = None, timeout: float | None = None) -> Iterator[Event]:
        """Transitions as they happen, until ``timeout`` seconds pass without one (None = for ever, 0 = what is there).

        ``since``: the id of the last event you saw; "0" = the oldest that is kept; None = only what comes. The last
        10,000 or so are kept.
        """
        return self.shell.iterate(flows.events(self.core, since, timeout))

    def close(self) -> None:
        """Give all connections back."""
        self.shell.close()

    def __enter__(self) -> RequestManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
