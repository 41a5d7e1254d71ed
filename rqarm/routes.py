"""What is known of a handler without its function: its options, and when an attempt is worth a retry."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from rqarm.errors import ConfigError, InvalidRequest, NoHandler, ResultTooLarge, UnpackableResult
from rqarm.model import Priority
from rqarm.mounts import AppRefusal
from rqarm.request import BatchRequest

#: a second try of these ends like the first
_HOPELESS = (InvalidRequest, NoHandler, AppRefusal, UnpackableResult, ResultTooLarge)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and when a failed attempt is tried again.

    ``max``: retries after the first attempt. ``interval``: seconds before each; of a sequence the last one repeats.
    ``jitter``: the share of the interval that is added at random at most, 0.1 = up to 10 %. ``on``: the errors that
    are worth it. Raises ConfigError for values that make no sense.
    """

    max: int
    interval: float | Sequence[float] = 0.0
    jitter: float = 0.0
    on: tuple[type[BaseException], ...] = (Exception,)

    def __post_init__(self) -> None:
        if not isinstance(self.max, int) or isinstance(self.max, bool) or self.max < 0:
            raise ConfigError(f"Retry: max must be a whole number, 0 or more, not {self.max!r}")
        if isinstance(self.interval, Sequence):
            object.__setattr__(self, "interval", tuple(self.interval))
        if not self._intervals:
            raise ConfigError("Retry: interval must not be empty")
        for seconds in self._intervals:
            _check_number("Retry: interval", seconds, at_least=0)
        _check_number("Retry: jitter", self.jitter, at_least=0)
        kinds = self.on if isinstance(self.on, tuple) else (self.on,)
        if not kinds or not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
            raise ConfigError(f"Retry: on must be exception classes, not {self.on!r}")
        object.__setattr__(self, "on", kinds)

    @property
    def _intervals(self) -> tuple[float, ...]:
        return tuple(self.interval) if isinstance(self.interval, Sequence) else (self.interval,)

    def delay(self, nth_retry: int, random: Callable[[], float]) -> float:
        """Seconds before the ``nth_retry`` (1 = the first). ``random`` gives 0..1, such as ``random.random``."""
        intervals = self._intervals
        seconds = intervals[min(max(nth_retry, 1), len(intervals)) - 1]
        return seconds * (1 + self.jitter * random()) if self.jitter else float(seconds)

    def wants(self, exc: BaseException, retries_so_far: int) -> bool:
        """Whether to try again after ``exc``. Never when the request or its result is at fault."""
        return retries_so_far < self.max and isinstance(exc, self.on) and not isinstance(exc, _HOPELESS)


class Options(TypedDict, total=False):
    """The options of a route: see ``Route``."""

    ttl: float | None
    sticky: bool
    timeout: float | None
    retry: Retry | None
    queue: str | None
    priority: str | Priority | None
    estimated_time: float | None
    failure_ttl: float | None
    negative_ttl: float | Mapping[type[BaseException], float] | None
    quarantine: bool
    thread_safe: bool
    max_running: int | None
    name: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What is known of a handler without its function. None = the settings decide.

    ``name`` tells routes apart in statistics; it is the template or operation unless given. Either ``template`` or
    ``operation`` is set; neither is for the fallback. ``ttl``, ``failure_ttl``, ``negative_ttl``: seconds that a
    result, the record of a failure, and a failure as an answer live; ``negative_ttl`` may say it per type of error.
    ``quarantine``: whether a request whose last attempt raises is set aside. ``timeout``: seconds that an attempt may
    take. ``estimated_time``: seconds it usually takes. ``max_running``: how many requests of this route run at the same
    time on all workers; they are counted under ``name``. ``thread_safe``: a handler that is not ``async def`` may run
    beside others in threads (``rqarm worker --concurrency``). Raises ConfigError for values that make no sense.
    """

    name: str
    template: str = ""
    operation: str = ""
    ttl: float | None = None
    sticky: bool = False
    timeout: float | None = None
    retry: Retry | None = None
    queue: str | None = None
    priority: str | Priority | None = None
    estimated_time: float | None = None
    failure_ttl: float | None = None
    negative_ttl: float | Mapping[type[BaseException], float] | None = None
    quarantine: bool = True
    thread_safe: bool = False
    max_running: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isprintable() or not self.name:
            raise ConfigError(f"name must be printable text, not {self.name!r}")
        for option in ("timeout", "failure_ttl"):
            if getattr(self, option) is not None:
                _check_number(option, getattr(self, option), above=0)
        if isinstance(self.negative_ttl, Mapping):
            object.__setattr__(self, "negative_ttl", types.MappingProxyType(_checked_ttls(self.negative_ttl)))
        elif self.negative_ttl is not None:
            _check_number("negative_ttl", self.negative_ttl, at_least=0)
        limit = self.max_running
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ConfigError(f"max_running must be a whole number, 1 or more, not {limit!r}")
        if self.retry is not None and not isinstance(self.retry, Retry):
            raise ConfigError(f"retry must be a Retry, such as Retry(max=3), not {self.retry!r}")
        try:
            BatchRequest("/", **self.for_request())
        except InvalidRequest as error:
            raise ConfigError(str(error)) from error

    def negative_for(self, error: BaseException) -> float | None:
        """Seconds that this error answers the same request, None = the settings say. The closest type counts."""
        if isinstance(self.negative_ttl, Mapping):
            ttls = self.negative_ttl
            return next((ttls[kind] for kind in type(error).__mro__ if kind in ttls), None)
        return self.negative_ttl

    def for_request(self) -> dict[str, Any]:
        """The options that a request of this route carries; what the route leaves open is left out."""
        names = ("operation", "sticky", "ttl", "queue", "priority", "estimated_time")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def _check_number(what: str, value: object, *, at_least: float = -math.inf, above: float = -math.inf) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"{what} must be a number, not {value!r}")
    if value < at_least or value <= above:
        raise ConfigError(
            f"{what} must be {f'{at_least:g} or more' if above == -math.inf else 'above 0'}, not {value!r}"
        )


def _checked_ttls(ttls: Mapping[type[BaseException], float]) -> dict[type[BaseException], float]:
    for kind, seconds in ttls.items():
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            raise ConfigError(f"negative_ttl: {kind!r} is no exception class")
        _check_number(f"negative_ttl for {kind.__name__}", seconds, at_least=0)
    return dict(ttls)
