"""Indexes from their beginning to their end, and the counters of a namespace."""

from __future__ import annotations

from rqarm.flows import Core, Emit, Flow, collect
from rqarm.model import BatchStatus
from rqarm.replies import Page, Stats


def pending(core: Core, queue: str | None) -> Flow[list[BatchStatus]]:
    """What waits in a queue, next first."""
    index = core.keys.named("pending", queue=queue or core.settings.queue)
    return (yield from collect(entries(core, index)))


def entries(core: Core, index: str, limit: int | None = None, page_size: int = 500) -> Flow[None]:
    """Emits the records of an index in its order, page by page."""
    offset = 0
    while limit is None or offset < limit:
        wanted = page_size if limit is None else min(page_size, limit - offset)
        page: Page = yield core.calls.browse(index, offset, wanted)
        for entry in page.entries:
            yield Emit(entry)
        offset += wanted
        if offset >= page.total:
            return


def stats(core: Core) -> Flow[Stats]:
    answer: Stats = yield core.calls.stats()
    return answer
