"""Settings from arguments, environment and defaults."""

from __future__ import annotations

import pytest

from rqarm import flows
from rqarm.config import Settings
from rqarm.errors import ConfigError
from rqarm.flows import Core
from rqarm.rqjobs import RqJobs


def test_crash_delays_are_read_as_numbers() -> None:
    assert Settings.load({"RQARM_CRASH_DELAYS": "0, 0.5,2"}).crash_delays == (0.0, 0.5, 2.0)
    assert Settings.load({}).crash_delays == (1.0, 5.0, 25.0)


@pytest.mark.parametrize("text", ["soon", "1,,x", "-1", "1,-1", "nan", "inf", ","])
def test_crash_delays_that_are_no_pauses_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"(?i)crash_delays"):
        Settings.load({"RQARM_CRASH_DELAYS": text})


def test_patterns_stay_text() -> None:
    assert Settings.load({"RQARM_IGNORE_PARAMS": "utm_*, 1"}).ignore_params == ("utm_*", "1")


def test_the_last_crash_delay_stays() -> None:
    settings = Settings(crash_delays=(0.0, 0.5))
    core = Core(settings, RqJobs(settings))
    assert [flows.crash_delay(core, crashes) for crashes in range(4)] == [0.0, 0.5, 0.5, 0.5]
