"""AsyncRequestManager: the way in for asyncio. The same names, signatures and docstrings as RequestManager."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import redis.asyncio

from rqarm import bulk, connect, flows, following, inline
from rqarm.browse import claims, detail, events, listing, search, workers
from rqarm.browse.claims import ClaimPage
from rqarm.browse.detail import RequestDetail
from rqarm.browse.events import Event
from rqarm.browse.explain import Explanation, explain
from rqarm.browse.search import SearchPage
from rqarm.browse.workers import WorkersView
from rqarm.bulk import AsyncEntries as Entries
from rqarm.bulk import Entry, OnError
from rqarm.cache import AsyncCache
from rqarm.config import Settings
from rqarm.flows import Core
from rqarm.following import FollowEvent
from rqarm.inline import BulkResult, Compute, Mitigation, OnHits
from rqarm.inspect import Overview, overview
from rqarm.manager import RequestManager
from rqarm.model import BatchStatus
from rqarm.quarantine import AsyncQuarantine
from rqarm.queue import AsyncLease, AsyncQueues
from rqarm.request import BatchRequest
from rqarm.rqjobs import RqJobs
from rqarm.shell import GIVEN, AsyncShell, same_docs


@same_docs(RequestManager)
class AsyncRequestManager:
    def __init__(
        self, url: str | None = None, *, connection: redis.asyncio.Redis | None = None, **settings: Any
    ) -> None:
        self.settings = Settings.load(url=url, **settings)
        where = connect.default_url(self.settings) if connection is None else GIVEN
        self.core = Core(self.settings, RqJobs(self.settings))
        self.shell = AsyncShell(self.core.keys, self.settings, where, connection)
        self.cache = AsyncCache(self.core, self.shell)
        self.queues = AsyncQueues(self.core, self.shell)
        self.quarantine = AsyncQuarantine(self.core, self.shell)

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> AsyncRequestManager:
        return cls(url, **settings)

    @property
    def connection(self) -> redis.asyncio.Redis:
        return self.shell.client

    async def submit(
        self, request: BatchRequest | str, *, payload: Any = None, payload_id: str | None = None
    ) -> BatchStatus:
        return await self.shell.run(flows.submit(self.core, request, payload, payload_id=payload_id))

    async def submit_many(self, requests: Iterable[BatchRequest | str]) -> list[BatchStatus]:
        return await self.shell.run(bulk.submit_many(self.core, requests))

    def submit_stream(
        self, requests: Entries, *, chunk: int = bulk.CHUNK, on_error: OnError | None = None
    ) -> AsyncIterator[BatchStatus]:
        return inline.async_submit_stream(self.core, self.shell, requests, chunk, on_error)

    async def bulk_get_or_submit(
        self,
        requests_with_payloads: Iterable[Entry],
        *,
        on_hits: OnHits | None = None,
        mitigation: Mitigation | None = None,
        compute: Compute | None = None,
    ) -> BulkResult[AsyncLease]:
        return await inline.async_get_or_submit(
            self.core, self.shell, requests_with_payloads, on_hits, mitigation, compute
        )

    async def resubmit(
        self, request: BatchRequest | str, *, payload: Any = None, payload_id: str | None = None
    ) -> BatchStatus:
        return await self.shell.run(flows.submit(self.core, request, payload, payload_id=payload_id, again=True))

    async def status(self, key: str) -> BatchStatus:
        return await self.shell.run(flows.status(self.core, key))

    async def full_status(self, key: str) -> BatchStatus:
        return await self.shell.run(flows.full_status(self.core, key))

    async def find(self, key: str) -> BatchRequest | None:
        return await self.shell.run(flows.find(self.core, key))

    async def queue(self, name: str | None = None) -> list[BatchStatus]:
        return await self.shell.run(listing.pending(self.core, name))

    async def result(self, key: str, timeout: float | None = 0) -> Any:
        return await self.shell.run(flows.result(self.core, key, timeout))

    async def get(self, request: BatchRequest | str, timeout: float | None = None) -> Any:
        return await self.shell.run(flows.get(self.core, request, timeout))

    async def get_or_submit(
        self, request: BatchRequest | str, payload: Any = None, *, payload_id: str | None = None
    ) -> tuple[bool, Any]:
        return await self.shell.run(flows.get_or_submit(self.core, request, payload, payload_id=payload_id))

    async def wait(self, keys: str | Iterable[str], timeout: float | None = None) -> list[BatchStatus]:
        return await self.shell.run(flows.wait(self.core, keys, timeout))

    def as_completed(self, keys: Iterable[str], timeout: float | None = None) -> AsyncIterator[BatchStatus]:
        return self.shell.iterate(flows.as_completed(self.core, keys, timeout))

    def follow(self, request: BatchRequest | str, timeout: float | None = None) -> AsyncIterator[FollowEvent]:
        return self.shell.iterate(following.follow(self.core, request, timeout))

    async def cancel(self, key: str) -> bool:
        return await self.shell.run(flows.cancel(self.core, key))

    async def forget(self, key: str) -> bool:
        return await self.shell.run(flows.forget(self.core, key))

    async def explain(self, request: BatchRequest | str) -> Explanation:
        return await self.shell.run(explain(self.core, request))

    async def overview(self) -> Overview:
        return await self.shell.run(overview(self.core))

    async def search(
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
        return await self.shell.run(
            search.search(self.core, text, state=state, route=route, tag=tag, queue=queue, cursor=cursor, limit=limit)
        )

    async def inspect(self, key: str, *, values: bool = False) -> RequestDetail:
        return await self.shell.run(detail.inspect(self.core, key, values=values))

    async def claims(self, *, offset: int = 0, limit: int = 50) -> ClaimPage:
        return await self.shell.run(claims.claims(self.core, offset, limit))

    async def release(self, key: str) -> bool:
        return await self.shell.run(claims.release(self.core, key))

    async def workers(self) -> WorkersView:
        return await self.shell.run(workers.workers(self.core))

    def events(self, since: str | None = None, timeout: float | None = None) -> AsyncIterator[Event]:
        return self.shell.iterate(events.events(self.core, since, timeout))

    async def close(self) -> None:
        await self.shell.close()

    async def __aenter__(self) -> AsyncRequestManager:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
