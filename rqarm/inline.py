"""A bulk with its hits in the caller's hands, and the caller as a worker for some of the misses.

What the two managers do around the flows of rqarm.bulk: call the caller's functions, and keep the leases
meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import redis.exceptions

from rqarm import bulk
from rqarm.bulk import AsyncEntries, Entries, Entry, Gathering, Group, Hit, OnError
from rqarm.errors import InvalidRequest
from rqarm.flows import Core
from rqarm.model import BatchStatus, Outcome
from rqarm.queue import AsyncLease, Lease, taker
from rqarm.request import BatchRequest
from rqarm.shell import AsyncShell, Shell

L = TypeVar("L", Lease, AsyncLease)
log = logging.getLogger("rqarm")

#: gets all hits, in one call; on an event loop it may be a coroutine function
OnHits: TypeAlias = Callable[[tuple[Hit, ...]], object]
#: whether the caller computes a new miss itself
Mitigation: TypeAlias = Callable[[BatchRequest], object]
#: the value of a request; on an event loop a coroutine function, or a plain one, which gets a thread
Compute: TypeAlias = Callable[[BatchRequest], Any]


@dataclass(frozen=True, slots=True)
class BulkResult(Generic[L]):
    """What became of a bulk; every request is in one of the four.

    ``hits``: have their value. ``misses``: status with outcome ``new``, ``joined``, ``negative`` or ``refused``.
    ``leases``: started for the caller, who must end them. ``errors``: what was not taken and why, by position in the
    bulk (the first is 0); a request whose ``compute`` failed stands here too, and goes back to the workers.
    """

    hits: tuple[Hit, ...]
    misses: tuple[BatchStatus, ...]
    leases: tuple[L, ...]
    errors: dict[int, Exception]


def get_or_submit(
    core: Core,
    shell: Shell,
    entries: Iterable[Entry],
    on_hits: OnHits | None,
    mitigation: Mitigation | None,
    compute: Compute | None,
) -> BulkResult[Lease]:
    """See RequestManager.bulk_get_or_submit."""
    _check(mitigation, compute)
    for name, function in (("on_hits", on_hits), ("compute", compute)):
        if inspect.iscoroutinefunction(function):
            raise InvalidRequest("a coroutine function needs an AsyncRequestManager", where=name)
    gathering = bulk.gather(entries)
    groups = gathering.groups
    shell.run(bulk.get_or_submit(core, groups))
    try:
        if mitigation is not None:
            shell.run(bulk.start(core, _chosen(groups, mitigation), taker()))
        if compute is not None:
            with _kept(core, shell, groups):
                for group in _held(groups):
                    _compute(core, shell, group, compute)
        hits = _hits(groups)
        if on_hits is not None and hits:
            on_hits(hits)
    except BaseException:
        # nobody would end them, and workers would wait for a lease
        with contextlib.suppress(redis.exceptions.RedisError):
            shell.run(bulk.release(core, groups))
        raise
    leases = tuple(Lease(core, shell, group.attempt) for group in groups if group.attempt is not None)
    return BulkResult(hits, _misses(groups), leases, _errors(gathering))


def _compute(core: Core, shell: Shell, group: Group, compute: Compute) -> None:
    try:
        shell.run(bulk.finish(core, group, compute(group.request)))
    except Exception as error:  # noqa: BLE001 -- the caller's function may raise anything; it is told with the others
        with contextlib.suppress(redis.exceptions.RedisError):
            shell.run(bulk.release(core, [group]))
        group.attempt, group.error = None, error


@contextlib.contextmanager
def _kept(core: Core, shell: Shell, groups: Sequence[Group]) -> Iterator[None]:
    """Renew what is held until the block ends, however long a function of the caller takes."""
    is_over = threading.Event()

    def renew() -> None:
        while not is_over.wait(core.settings.renewal_or_default):
            try:
                shell.run(bulk.renew(core, groups))
            except redis.exceptions.RedisError as error:
                log.warning("leases of a bulk could not be renewed, the next try follows: %s", error)

    thread = threading.Thread(target=renew, name="rqarm-bulk", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


async def async_get_or_submit(
    core: Core,
    shell: AsyncShell,
    entries: Iterable[Entry],
    on_hits: OnHits | None,
    mitigation: Mitigation | None,
    compute: Compute | None,
) -> BulkResult[AsyncLease]:
    """The same on an event loop."""
    _check(mitigation, compute)
    gathering = bulk.gather(entries)
    groups = gathering.groups
    await shell.run(bulk.get_or_submit(core, groups))
    try:
        if mitigation is not None:
            await shell.run(bulk.start(core, _chosen(groups, mitigation), taker()))
        if compute is not None:
            async with _async_kept(core, shell, groups):
                for group in _held(groups):
                    await _async_compute(core, shell, group, compute)
        hits = _hits(groups)
        if on_hits is not None and hits:
            answer = on_hits(hits)
            if inspect.isawaitable(answer):
                await answer
    except BaseException:
        with contextlib.suppress(redis.exceptions.RedisError):
            await shell.run(bulk.release(core, groups))
        raise
    leases = tuple(AsyncLease(core, shell, group.attempt) for group in groups if group.attempt is not None)
    return BulkResult(hits, _misses(groups), leases, _errors(gathering))


async def _async_compute(core: Core, shell: AsyncShell, group: Group, compute: Compute) -> None:
    try:
        if inspect.iscoroutinefunction(compute):
            value = await compute(group.request)
        else:
            # a thread, because on the loop it would hold up the renewals
            value = await asyncio.to_thread(compute, group.request)
        await shell.run(bulk.finish(core, group, value))
    except Exception as error:  # noqa: BLE001 -- as above
        with contextlib.suppress(redis.exceptions.RedisError):
            await shell.run(bulk.release(core, [group]))
        group.attempt, group.error = None, error


@contextlib.asynccontextmanager
async def _async_kept(core: Core, shell: AsyncShell, groups: Sequence[Group]) -> AsyncIterator[None]:
    async def renew() -> None:
        while True:
            await asyncio.sleep(core.settings.renewal_or_default)
            try:
                await shell.run(bulk.renew(core, groups))
            except redis.exceptions.RedisError as error:
                log.warning("leases of a bulk could not be renewed, the next try follows: %s", error)

    task = asyncio.create_task(renew())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _check(mitigation: Mitigation | None, compute: Compute | None) -> None:
    if compute is not None and mitigation is None:
        raise InvalidRequest("mitigation is needed, to say which requests are computed here", where="compute")
    if inspect.iscoroutinefunction(mitigation):
        # what it returns is true for every request
        raise InvalidRequest("it is asked without waiting: give a plain function", where="mitigation")


def _chosen(groups: Sequence[Group], mitigation: Mitigation) -> list[Group]:
    return [group for group in groups if group.outcome is Outcome.NEW and mitigation(group.request)]


def _held(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if group.attempt is not None]


def _hits(groups: Sequence[Group]) -> tuple[Hit, ...]:
    found = [group for group in groups if group.is_hit]
    return tuple(Hit(group.request, group.value, tuple(group.payloads), group.status) for group in found)


def _misses(groups: Sequence[Group]) -> tuple[BatchStatus, ...]:
    return tuple(group.status for group in groups if group.is_miss)


def _errors(gathering: Gathering) -> dict[int, Exception]:
    errors = dict(gathering.errors)
    for group in gathering.groups:
        if group.error is not None:
            errors.update(dict.fromkeys(group.positions, group.error))
    return dict(sorted(errors.items()))


# -- streams


def submit_stream(
    core: Core, shell: Shell, entries: Entries, chunk: int, on_error: OnError | None
) -> Iterator[BatchStatus]:
    """See RequestManager.submit_stream."""
    bulk.check_chunk(chunk)
    bulk.check_entries(entries)
    return shell.iterate(bulk.submit_stream(core, entries, chunk, on_error))


def async_submit_stream(
    core: Core, shell: AsyncShell, entries: AsyncEntries, chunk: int, on_error: OnError | None
) -> AsyncIterator[BatchStatus]:
    """The same on an event loop, also of what comes asynchronously."""
    bulk.check_chunk(chunk)
    bulk.check_entries(entries)
    if isinstance(entries, AsyncIterable):
        return _async_stream(core, shell, entries, chunk, on_error)
    return shell.iterate(bulk.submit_stream(core, entries, chunk, on_error))


async def _async_stream(
    core: Core, shell: AsyncShell, entries: AsyncIterable[Entry], chunk: int, on_error: OnError | None
) -> AsyncIterator[BatchStatus]:
    gathering = Gathering()
    async for entry in entries:
        gathering.add(entry)
        if gathering.is_full(chunk):
            async for status in shell.iterate(bulk.submit_gathered(core, gathering, on_error)):
                yield status
            gathering = Gathering(gathering.end)
    async for status in shell.iterate(bulk.submit_gathered(core, gathering, on_error)):
        yield status
