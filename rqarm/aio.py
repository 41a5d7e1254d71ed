"""AsyncRequestManager: the way in for asyncio. The same names, signatures and docstrings as RequestManager."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import redis.asyncio

from rqarm import connect, flows
from rqarm.cache import AsyncCache
from rqarm.config import Settings
from rqarm.flows import Core, Event
from rqarm.manager import RequestManager
from rqarm.model import BatchStatus
from rqarm.quarantine import AsyncQuarantine
from rqarm.queue import AsyncQueues
from rqarm.request import BatchRequest
from rqarm.rqjobs import RqJobs
from rqarm.shell import GIVEN, AsyncShell, same_docs
from rqarm.views import Explanation, explain


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
        return await self.shell.run(flows.submit_many(self.core, requests))

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
        return await self.shell.run(flows.pending(self.core, name))

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

    async def cancel(self, key: str) -> bool:
        return await self.shell.run(flows.cancel(self.core, key))

    async def forget(self, key: str) -> bool:
        return await self.shell.run(flows.forget(self.core, key))

    async def explain(self, request: BatchRequest | str) -> Explanation:
        return await self.shell.run(explain(self.core, request))

    def events(self, since: str | None = None, timeout: float | None = None) -> AsyncIterator[Event]:
        return self.shell.iterate(flows.events(self.core, since, timeout))

    async def close(self) -> None:
        await self.shell.close()

    async def __aenter__(self) -> AsyncRequestManager:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
