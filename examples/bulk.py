"""Many requests at a time: what is cached comes back at once, small misses are computed here, the rest is queued.

    python examples/bulk.py                       and for the slow ones, in another terminal
    rqarm worker --handlers examples/cities.py

A nightly job that fills a dashboard: one panel for the cities of each country. A list of cities takes a millisecond, so
it is not worth the way through the queue. A matrix of distances takes seconds: that is the workers' business.
"""

from __future__ import annotations

from typing import Any

import cities

from rqarm import BatchRequest, BulkResult, Hit, RequestManager, Result

COUNTRIES = ("CH", "FR", "LU", "XX")


def is_small(request: BatchRequest) -> bool:
    """Whether this process answers it itself. Asked for each request that is new, after all have been submitted."""
    return request.canonical.startswith("/cities/")


def compute(request: BatchRequest) -> Result:
    """The same functions as the workers'. What raises here goes back to them."""
    country = request.canonical.removeprefix("/cities/").partition("?")[0]
    chosen = cities.cities_of(cities.handlers.resources.cities, country)
    return Result(cities.cities_csv(chosen), "text/csv; charset=utf-8", f"cities-{country}.csv")


def fill(rm: RequestManager, panels: dict[str, Any]) -> BulkResult[Any]:
    """Put what there is into ``panels``; what is missing comes with the next run."""

    def on_hits(hits: tuple[Hit, ...]) -> None:
        # One call for all of them, so this could be one transaction. The payload says what the value is for.
        for hit in hits:
            for panel in hit.payloads:
                panels[panel] = hit.value

    wanted = [(f"/cities/{country}", f"{country}: cities") for country in COUNTRIES]
    wanted += [(f"/distances/{country}", f"{country}: distances") for country in COUNTRIES[:3]]
    return rm.bulk_get_or_submit(wanted, on_hits=on_hits, mitigation=is_small, compute=compute)


def main(rm: RequestManager) -> None:
    panels: dict[str, Any] = {}
    result = fill(rm, panels)
    for panel, value in sorted(panels.items()):
        print(f"{panel:<16}{len(value.data):>9,} bytes")
    for status in result.misses:
        print(f"{status.uri:<16}{status.outcome}, {status.state}")
    for position, error in result.errors.items():
        print(f"number {position}: {error}")


if __name__ == "__main__":
    with RequestManager() as manager:
        main(manager)
