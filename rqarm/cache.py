"""The results a manager can reach: ``rm.cache``."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import IO, Any

from rqarm import codec, flows
from rqarm.browse import cached, listing, search
from rqarm.browse.cached import CacheOverview
from rqarm.browse.search import CachePage
from rqarm.flows import Core
from rqarm.model import BatchStatus, Key, State
from rqarm.replies import Stats
from rqarm.request import BatchRequest
from rqarm.shell import AsyncShell, Shell, same_docs


class Cache:
    """Cached results: look, read, write, clear."""

    def __init__(self, core: Core, shell: Shell) -> None:
        self._core, self._shell = core, shell

    def is_ready(self, key: str) -> bool:
        """Whether the result can be read now."""
        return self._shell.run(flows.status(self._core, key)).state is State.COMPLETED

    def get(self, key: str) -> Any:
        """The value, without waiting. Raises ResultNotReady, RequestFailed, RequestUnknown, CorruptResult."""
        return self._shell.run(flows.result(self._core, key, 0))

    def open(self, key: str) -> IO[bytes]:
        """The stored bytes before compression as a binary file that can seek.

        Pieces are fetched as they are read; on an event loop, where a read cannot wait, all of them beforehand.
        The bytes of a str, bytes, file or ``Result`` are the data; those of another value are its msgpack form.
        Raises what ``get`` raises.
        """
        stored = self._shell.run(flows.stored_result(self._core, key))

        def fetch(n: int) -> bytes | None:
            return (
                stored.inline if stored.inline is not None else self._shell.execute(self._core.calls.chunk(stored, n))
            )

        return codec.open_reader(stored.envelope, fetch)

    def envelope(self, key: str) -> codec.Envelope:
        """Kind, content type, file name and sizes of a result, in bytes. Raises what ``get`` raises."""
        return self._shell.run(flows.stored_result(self._core, key)).envelope

    def put(self, request: BatchRequest | str, value: Any) -> Key:
        """Store a value as the result of a request without running it; its key.

        Whatever state the request is in, it is completed with this value and its waiters wake. An attempt that runs
        loses its claim. Raises UnpackableResult, ResultTooLarge, KeyConflict.
        """
        return self._shell.run(flows.put(self._core, request, value))

    def list(self, limit: int | None = None) -> Iterator[BatchStatus]:
        """The cached results, soonest to expire first, sticky ones last."""
        return self._shell.iterate(listing.entries(self._core, self._core.keys.named("results"), limit))

    def page(self, *, order: str = "expiry", cursor: str = "", limit: int = 50) -> CachePage:
        """A page of the cached results with their sizes, and the cursor of the next. One round trip.

        ``order``: ``expiry`` (soonest first), ``-expiry`` (sticky ones first) or ``size`` (largest first).
        """
        return self._shell.run(search.cache_page(self._core, order, cursor, limit))

    def overview(self, *, sample: int = 500) -> CacheOverview:
        """The cache in numbers: entries, bytes, times to live, the largest; ages, routes and kinds from a sample.

        One round trip, however much is cached.
        """
        return self._shell.run(cached.overview(self._core, sample))

    def pin(self, key: str) -> bool:
        """Make a result sticky. False when there is none. Raises RequestUnknown."""
        return self._shell.run(cached.retain(self._core, key, None))

    def unpin(self, key: str, ttl: float | None = None) -> bool:
        """Let a result expire, ``ttl`` seconds from now; None = the manager's. False when there is none.

        Raises RequestUnknown.
        """
        return self._shell.run(cached.retain(self._core, key, self._core.settings.ttl if ttl is None else ttl))

    def set_ttl(self, key: str, ttl: float) -> bool:
        """Let a result expire ``ttl`` seconds from now, sooner or later than before. False when there is none.

        Raises RequestUnknown.
        """
        return self._shell.run(cached.retain(self._core, key, ttl))

    def clear(self, *, route: str | None = None, older_than: float | None = None) -> int:
        """Forget every result, sticky ones too: after a data rebuild. How many.

        ``route``: only those of an operation or of a path as it begins, ``/cities`` or ``api.example.org/v1/{table}``.
        ``older_than``: only those that were computed so many seconds ago. Goes through the cache in steps.
        """
        return self._shell.run(cached.clear(self._core, route, older_than, temporary_only=False))

    def clear_temporary(self) -> int:
        """Forget every result that is not sticky. How many."""
        return self._shell.run(cached.clear(self._core, None, None, temporary_only=True))

    def invalidate(self, tags: str | Iterable[str]) -> int:
        """Forget the results that carry one of these tags, sticky ones too. How many.

        What is in flight goes on: when it has read what has changed since, submit it again afterwards.
        """
        return self._shell.run(cached.invalidate(self._core, tags))

    def stats(self) -> Stats:
        """Counters since the namespace began and sizes now; bytes as they lie in Redis."""
        return self._shell.run(listing.stats(self._core))


@same_docs(Cache)
class AsyncCache:
    def __init__(self, core: Core, shell: AsyncShell) -> None:
        self._core, self._shell = core, shell

    async def is_ready(self, key: str) -> bool:
        return (await self._shell.run(flows.status(self._core, key))).state is State.COMPLETED

    async def get(self, key: str) -> Any:
        return await self._shell.run(flows.result(self._core, key, 0))

    async def open(self, key: str) -> IO[bytes]:
        value = await self._shell.run(flows.result_bytes(self._core, key))
        return io.BytesIO(value)

    async def envelope(self, key: str) -> codec.Envelope:
        return (await self._shell.run(flows.stored_result(self._core, key))).envelope

    async def put(self, request: BatchRequest | str, value: Any) -> Key:
        return await self._shell.run(flows.put(self._core, request, value))

    def list(self, limit: int | None = None) -> AsyncIterator[BatchStatus]:
        return self._shell.iterate(listing.entries(self._core, self._core.keys.named("results"), limit))

    async def page(self, *, order: str = "expiry", cursor: str = "", limit: int = 50) -> CachePage:
        return await self._shell.run(search.cache_page(self._core, order, cursor, limit))

    async def overview(self, *, sample: int = 500) -> CacheOverview:
        return await self._shell.run(cached.overview(self._core, sample))

    async def pin(self, key: str) -> bool:
        return await self._shell.run(cached.retain(self._core, key, None))

    async def unpin(self, key: str, ttl: float | None = None) -> bool:
        return await self._shell.run(cached.retain(self._core, key, self._core.settings.ttl if ttl is None else ttl))

    async def set_ttl(self, key: str, ttl: float) -> bool:
        return await self._shell.run(cached.retain(self._core, key, ttl))

    async def clear(self, *, route: str | None = None, older_than: float | None = None) -> int:
        return await self._shell.run(cached.clear(self._core, route, older_than, temporary_only=False))

    async def clear_temporary(self) -> int:
        return await self._shell.run(cached.clear(self._core, None, None, temporary_only=True))

    async def invalidate(self, tags: str | Iterable[str]) -> int:
        return await self._shell.run(cached.invalidate(self._core, tags))

    async def stats(self) -> Stats:
        return await self._shell.run(listing.stats(self._core))
