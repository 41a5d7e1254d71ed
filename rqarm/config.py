"""Settings: an argument wins over the environment (RQARM_*), the environment over the default.

Durations are seconds here and everywhere in Python; the calls turn them into milliseconds.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from rqarm.errors import ConfigError

DURABILITIES = ("fast", "synced", "replicated")
#: below rqarm.connect.READ_TIMEOUT_S
MAX_DURABLE_TIMEOUT = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that can be set, with its default. ``Settings.load(ttl=60)`` reads the environment for the rest."""

    #: where Redis is; None = the embedded server of this user
    url: str | None = None
    #: prefix of every key of ours
    namespace: str = "arm"
    #: the default queue; its priorities are the RQ queues ``arm-high``, ``arm`` and ``arm-low``
    queue: str = "arm"
    #: life of a temporary result when neither request nor route says otherwise
    ttl: float = 86_400.0
    #: how long the record of a failed or cancelled request can be inspected
    failure_ttl: float = 86_400.0
    #: how long a failure answers the same request again without running it; 0 = not at all
    negative_ttl: float = 0.0
    #: how long a silent worker keeps an execution
    lease: float = 15.0
    #: how often a worker renews its leases; 0 = a third of the lease
    renewal: float = 0.0
    #: crashes of its worker after which a request is quarantined
    max_attempts: int = 3
    #: pause between a crash and the next attempt, by number of crashes; the last one stays. Source: shared/faults.md, 9
    crash_delays: tuple[float, ...] = (1.0, 5.0, 25.0)
    #: run-time limit when the route gives none
    timeout: float = 3_600.0
    #: pending requests per queue above which a submit is refused; 0 = no limit
    max_pending: int = 0
    #: a stored result up to this size lives in one field, a larger one in chunks
    inline_bytes: int = 65_536
    #: raw bytes of one chunk
    chunk_bytes: int = 1_048_576
    #: results above are refused
    max_result_bytes: int = 1 << 30
    #: results above are compressed
    compress_above: int = 4_096
    #: query parameters that do not belong to a request's identity (fnmatch patterns)
    ignore_params: tuple[str, ...] = ()
    #: query parameters whose values never appear in descriptions and logs (fnmatch patterns)
    secret_params: tuple[str, ...] = ("*token*", "*secret*", "*password*", "*passwd*", "*api_key*", "*apikey*", "sig*")
    #: where results are served, with {key} in it; BatchStatus.url of what is completed
    result_url: str | None = None
    #: requests that one worker process runs at a time
    concurrency: int = 1
    #: requests after which a worker replaces the process that runs them; 0 = never
    max_jobs_per_horse: int = 10_000
    #: resident memory in MiB above which that process is replaced, after the request in hand; 0 = no limit
    max_horse_memory: int = 0
    #: how long a worker that is told to stop lets running requests finish; then it hands them back
    shutdown_timeout: float = 25.0
    #: accept a server that forgets everything when it restarts
    allow_volatile: bool = False
    #: when a submit counts as kept: ``fast`` = the server has taken it, ``synced`` = it lies on the server's disk,
    #: ``replicated`` = ``durable_replicas`` replicas have taken it too
    durability: str = "fast"
    durable_replicas: int = 1
    #: how long a submit waits to hear so; then its status says ``durable`` = False, and it is pending all the same
    durable_timeout: float = 2.0

    def __post_init__(self) -> None:
        for name in (
            "ttl",
            "failure_ttl",
            "lease",
            "timeout",
            "max_attempts",
            "concurrency",
            "inline_bytes",
            "chunk_bytes",
            "max_result_bytes",
            "durable_replicas",
            "durable_timeout",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)!r}")
        for name in (
            "negative_ttl",
            "max_pending",
            "compress_above",
            "renewal",
            "max_jobs_per_horse",
            "max_horse_memory",
            "shutdown_timeout",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, not {getattr(self, name)!r}")
        if self.durability not in DURABILITIES:
            raise ConfigError(f"durability must be one of {', '.join(DURABILITIES)}, not {self.durability!r}")
        if self.durable_timeout > MAX_DURABLE_TIMEOUT:
            raise ConfigError(
                f"durable_timeout must be at most {MAX_DURABLE_TIMEOUT:g} s, not {self.durable_timeout:g}: a call that "
                "takes longer counts as lost"
            )
        if self.renewal > self.lease / 2:
            raise ConfigError(f"renewal ({self.renewal:g} s) must be at most half the lease ({self.lease:g} s)")
        if not self.crash_delays or not all(0 <= delay < math.inf for delay in self.crash_delays):
            raise ConfigError(f"crash_delays must be one or more numbers of 0 or more, not {self.crash_delays!r}")
        for name in ("namespace", "queue"):
            text = getattr(self, name)
            if not 1 <= len(text) <= 200 or not text.isascii() or not text.isprintable() or set(text) & set(" :{}*?[]"):
                rule = "1 to 200 printable ASCII characters without spaces and :{}*?[]"
                raise ConfigError(f"{name} must be {rule}, not {text!r}")
        if self.result_url is not None and (fault := _result_url_fault(self.result_url)):
            shown = re.sub("//.*@", "//***@", str(self.result_url))
            raise ConfigError(f"result_url must be like https://host/path/{{key}}: {fault}, not {shown!r}")

    @property
    def renewal_or_default(self) -> float:
        """Seconds between renewals of a lease."""
        return self.renewal or self.lease / 3

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, **arguments: Any) -> Settings:
        """Settings from arguments (None = not given), then RQARM_<NAME>, then defaults.

        Raises ConfigError naming the argument or variable that is wrong.
        """
        try:
            return cls(**chosen_options(cls, "RQARM_", arguments, environ))
        except TypeError as error:
            raise ConfigError(f"a setting has the wrong type: {error}") from error


def _result_url_fault(url: Any) -> str:
    """What is wrong with a template for URLs of results; it goes to clients, so it must hold no password."""
    if not isinstance(url, str) or not url.isascii() or not url.isprintable() or set(url) & set(' "<>\\^`|'):
        return "ASCII text without spaces and other characters that no URL has"
    if url.count("{key}") != 1 or set(url.replace("{key}", "")) & set("{}"):
        return "it must hold {key} once and no other braces"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"it must be a URL ({error})"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return "it must be absolute, http or https"
    if "@" in parts.netloc:
        return "it must hold no user or password"
    return "{key} must stand behind the host" if "{" in parts.netloc else ""


def chosen_options(
    cls: type[Any], prefix: str, arguments: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What is given of the fields of a class: by an argument that is not None, else by its environment variable.

    Raises ConfigError naming the argument or variable that is wrong.
    """
    environ = os.environ if environ is None else environ
    known = {field.name: field for field in fields(cls)}
    if unknown := sorted(set(arguments) - set(known)):
        raise ConfigError(f"no such option: {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = {name: value for name, value in arguments.items() if value is not None}
    for name, field in known.items():
        variable = f"{prefix}{name.upper()}"
        if name not in chosen and (text := environ.get(variable)):
            chosen[name] = _parsed(variable, text, field.default)
    return chosen


def _parsed(variable: str, text: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
        if isinstance(default, int | float):
            return type(default)(text)
        if isinstance(default, tuple):
            parts = tuple(part.strip() for part in text.split(",") if part.strip())
            return tuple(map(float, parts)) if default and isinstance(default[0], float) else parts
    except (ValueError, KeyError):
        kind = "list of numbers" if isinstance(default, tuple) else type(default).__name__
        raise ConfigError(f"{variable}={text!r} is not a {kind}") from None
    return text
