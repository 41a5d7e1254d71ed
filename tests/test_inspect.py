"""The overview: counters are right, it costs one round trip, and it says what needs attention."""

from __future__ import annotations

import json
import re
from typing import Any

import managers
import pytest
import redis
from drive import Rig

from rqarm import BatchRequest, inspect
from rqarm.inspect import Overview

URI = "/cities/FR"


@pytest.fixture
def rig(redis_client: redis.Redis) -> Rig:
    return Rig(redis_client)


def look(rig: Rig) -> Overview:
    return rig.run(inspect.overview(rig.core))


def finish(rm: Any, value: Any = 1) -> None:
    rm.queues.next_request(0).finish(value)


def codes(found: Overview) -> list[str]:
    return [each.code for each in found.attention]


def test_an_overview_is_one_round_trip_however_many_queues(rm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rm.submit_many([BatchRequest(f"/c/{n}", queue=f"queue-{n}") for n in range(30)])
    rm.overview()
    with managers.round_trips(monkeypatch) as sent:
        found = rm.overview()
    assert len(sent) == 1
    assert [line.name for line in found.queues] == sorted(f"queue-{n}" for n in range(30))


def test_submissions_are_counted_by_outcome_minute_and_route(rm: Any) -> None:
    rm.submit(URI)
    rm.submit(URI)
    finish(rm)
    for _ in range(3):
        rm.submit(URI)
    found = rm.overview()
    counts = {"hit": 3, "joined": 1, "new": 1}
    assert found.submissions == counts
    assert len(found.minutes) == 60
    assert merged(minute.submissions for minute in found.minutes[-2:]) == counts
    assert (found.hit_rate.effective, found.hit_rate_hour) == (0.8, found.hit_rate)
    (route,) = found.routes
    assert (route.name, route.submissions, route.completed) == ("/cities", counts, 1)


def merged(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in counts:
        for word, n in each.items():
            total[word] = total.get(word, 0) + n
    return total


def test_the_document_is_json_and_has_what_is_computed(rm: Any) -> None:
    rm.submit(URI)
    document = json.loads(json.dumps(rm.overview().to_dict()))
    assert document["hit_rate"]["effective"] == 0
    assert document["saved"]["seconds"] == 0
    assert set(document) == set(re.findall(r"\w+", named_in_the_docstring()))


def named_in_the_docstring() -> str:
    """The list of fields that the module promises to those who read the document."""
    assert inspect.__doc__ is not None
    return inspect.__doc__.split("``Overview``:", 1)[1].split("``server``", 1)[0]
