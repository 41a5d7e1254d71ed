"""The cache in numbers, and what is done to it: results kept longer, cleared, invalidated."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rqarm.browse.search import CacheEntry, cache_entry, on_route, tag_of
from rqarm.calls import Call, ms
from rqarm.codec import unpack_envelope
from rqarm.errors import CorruptResult, InvalidRequest, RequestUnknown, VersionSkew
from rqarm.flows import Core, Flow
from rqarm.model import Key, View
from rqarm.replies import read_words, rows, text_of
from rqarm.request import MAX_SECONDS, MIN_TTL_S
from rqarm.uri import check_key, family

#: entries that one step of a filtered clear looks at, and of an invalidation
CLEAR_STEP, INVALIDATE_STEP = 500, 100
#: upper ends of the ranges of times to live and ages, in seconds; one more range is above the last
RANGES_S = (60.0, 600.0, 3_600.0, 21_600.0, 86_400.0, 604_800.0, 2_592_000.0)


@dataclass(frozen=True, slots=True)
class Range(View):
    """How many lie above the range before and at or below ``upto`` seconds; None = all above."""

    upto: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Share(View):
    """What one name has of a sample: entries, and their stored bytes."""

    name: str
    entries: int
    size: int


@dataclass(frozen=True, slots=True)
class CacheOverview(View):
    """The cache in numbers.

    Exact: ``entries``, ``temporary``, ``sticky``, ``bytes`` (stored) and ``ttl``, the temporary ones by time to live.
    ``ages``, ``routes`` and ``kinds`` count ``sampled`` entries, taken at equal distances from the index by expiry:
    all, when ``sampled`` is ``entries``.
    """

    entries: int
    temporary: int
    sticky: int
    bytes: int
    ttl: tuple[Range, ...]
    largest: tuple[CacheEntry, ...]
    sampled: int
    ages: tuple[Range, ...]
    routes: tuple[Share, ...]
    kinds: tuple[Share, ...]


def overview(core: Core, sample: int) -> Flow[CacheOverview]:
    """The cache in numbers, from one look; ``sample`` entries are read for what the indexes do not know."""
    answer: CacheOverview = yield survey_call(core, sample)
    return answer


def survey_call(core: Core, sample: int, largest: int = 10) -> Call[CacheOverview]:
    """The look itself; with the ``largest`` entries."""
    if not 1 <= sample <= 2_000:
        raise InvalidRequest(f"from 1 to 2,000 entries are allowed, not {sample}", where="sample")

    def parse(reply: Any) -> CacheOverview:
        _, now_ms, temporary, sticky, size, counts, top, sampled = read_words("survey", reply)
        return _overview(int(now_ms), int(temporary), int(sticky), int(size), counts, rows(top, 4), rows(sampled, 4))

    argv = (sample, largest, json.dumps([ms(upto) for upto in RANGES_S]))
    return core.calls.index_call("survey", core.keys.named("results"), argv, parse)


def _overview(
    now_ms: int,
    temporary: int,
    sticky: int,
    size: int,
    counts: Sequence[int],
    top: list[Sequence[Any]],
    sampled: list[Sequence[Any]],
) -> CacheOverview:
    uptos: tuple[float | None, ...] = (*RANGES_S, None)
    ages: Counter[float | None] = Counter()
    routes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    route_sizes: Counter[str] = Counter()
    kind_sizes: Counter[str] = Counter()
    for ended_ms, stored, identity, packed in sampled:
        age_s = (now_ms - int(ended_ms or now_ms)) / 1000
        ages[next((upto for upto in RANGES_S if age_s <= upto), None)] += 1
        _, operation, uri = (*text_of(identity).split("\n", 2), "", "")[:3]
        name, kind = family(uri, operation), _kind(packed)
        routes[name] += 1
        route_sizes[name] += int(stored)
        kinds[kind] += 1
        kind_sizes[kind] += int(stored)
    return CacheOverview(
        entries=temporary + sticky,
        temporary=temporary,
        sticky=sticky,
        bytes=size,
        ttl=tuple(Range(upto, int(count)) for upto, count in zip(uptos, counts, strict=True)),
        largest=tuple(cache_entry(row) for row in top),
        sampled=len(sampled),
        ages=tuple(Range(upto, ages[upto]) for upto in uptos),
        routes=tuple(Share(name, n, route_sizes[name]) for name, n in routes.most_common()),
        kinds=tuple(Share(name, n, kind_sizes[name]) for name, n in kinds.most_common()),
    )


def _kind(packed: bytes) -> str:
    if packed == b"redirect":
        return "redirect"
    try:
        return str(unpack_envelope(packed).kind)
    except (CorruptResult, VersionSkew):
        return "unreadable"


def retain(core: Core, key: str, ttl: float | None) -> Flow[bool]:
    """Keep a result for ``ttl`` seconds from now on; None = for good. False: there is no result to keep."""
    word: str = yield retain_call(core, check_key(key), None if ttl is None else _seconds(ttl, "ttl"))
    if word == "unknown":
        raise RequestUnknown(key)
    return word == "retained"


def retain_call(core: Core, key: Key, ttl: float | None) -> Call[str]:
    """``retained`` | ``no_result`` | ``unknown``."""
    argv = (key, 0 if ttl is None else ms(ttl))
    return core.calls.index_call(
        "retain", core.keys.status(key), argv, lambda reply: str(read_words("retain", reply)[0])
    )


def clear(core: Core, route: str | None, older_than: float | None, *, temporary_only: bool) -> Flow[int]:
    """Forget the cached results that pass, step by step; how many."""
    age_ms = ms(_seconds(older_than, "older_than")) if older_than is not None else 0
    named, pattern = on_route(route or "")
    cleared, cursor = 0, ""
    while True:
        step: tuple[int, int, str] = yield core.calls.clear(
            temporary_only=temporary_only, step=CLEAR_STEP, route=named, pattern=pattern, age_ms=age_ms, cursor=cursor
        )
        n, looked_at, cursor = step
        cleared += n
        if not looked_at:
            return cleared


def invalidate(core: Core, tags: str | Iterable[str]) -> Flow[int]:
    """Forget the cached results that carry one of the tags, step by step; how many."""
    cleared = 0
    for tag in [tags] if isinstance(tags, str) else list(tags):
        cursor = ""
        while True:
            step: tuple[int, int, str] = yield invalidate_call(core, tag, cursor)
            dropped, looked_at, cursor = step
            cleared += dropped
            if not looked_at:
                break
    return cleared


def invalidate_call(core: Core, tag: str, cursor: str = "") -> Call[tuple[int, int, str]]:
    """One step: (forgotten, looked at, cursor). Go on from the cursor while the second is not 0."""
    index = core.keys.named("tag", tag=tag_of(tag))
    return core.calls.index_call("invalidate", index, (tag, INVALIDATE_STEP, cursor), _invalidated)


def _invalidated(reply: Any) -> tuple[int, int, str]:
    _, dropped, looked_at, cursor = read_words("invalidate", reply)
    return int(dropped), int(looked_at), text_of(cursor)


def _seconds(value: float, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not MIN_TTL_S <= value <= MAX_SECONDS:
        raise InvalidRequest(f"from {MIN_TTL_S:g} to {MAX_SECONDS:g} seconds are allowed", where=where)
    return float(value)
