"""The shows of scripts/chaos.py with small counts and a fixed seed. tests/chaos.py says what each does and inspects."""

from __future__ import annotations

import sys
from pathlib import Path

import chaos
import pytest

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="horses are found in /proc"),
]

SEED = 1
#: how often each show hurts, and how many distinct requests flow meanwhile
SIZES = {
    "kills": (25, 150),
    "stops": (4, 30),
    "restarts": (2, 80),
    "emptied": (2, 100),
    "poison": (1, 40),
    "rolling": (3, 100),
}


@pytest.mark.parametrize("show", list(chaos.SHOWS))
def test_nothing_is_lost_and_nothing_counts_twice(show: str, tmp_path: Path) -> None:
    count, distinct = SIZES[show]
    report = chaos.SHOWS[show](tmp_path, SEED, count, distinct)
    print(report)
    assert report.violations == []
