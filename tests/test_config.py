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


@pytest.mark.parametrize(
    "url", ["https://api.example/batch/{key}", "http://[::1]:8080/r?key={key}&x=1", "https://example.org/#/{key}"]
)
def test_a_url_of_results_is_taken(url: str) -> None:
    assert Settings.load({"RQARM_RESULT_URL": url}).result_url == url


@pytest.mark.parametrize(
    "url",
    [
        "https://api.example/batch/",
        "https://api.example/{key}/{key}",
        "https://api.example/{key}/{name}",
        "https://api.example/{key}}",
        "/batch/{key}",
        "//api.example/{key}",
        "ftp://api.example/{key}",
        "javascript:alert('{key}')",
        "https:///{key}",
        "https://{key}.example/",
        "https://user:secret@api.example/{key}",
        "https://api.example:99999/{key}",
        "https://api.example/a b/{key}",
        "https://api.example/\n{key}",
        "https://api.exämple/{key}",
        "https://[::1/{key}",
    ],
)
def test_what_is_no_url_of_results_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="result_url must be like https://host/path/") as raised:
        Settings.load({"RQARM_RESULT_URL": url})
    assert "secret" not in str(raised.value)


def test_a_url_of_results_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="result_url"):
        Settings.load({}, result_url=7)
