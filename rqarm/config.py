"""Settings: an argument wins over the environment (RQARM_*), the environment over the default.

Durations are seconds here and everywhere in Python; the calls turn them into milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from rqarm.errors import ConfigError


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
    #: crashes of its worker after which a request is quarantined
    max_attempts: int = 3
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
    #: accept a server that forgets everything when it restarts
    allow_volatile: bool = False

    def __post_init__(self) -> None:
        for name in (
            "ttl",
            "failure_ttl",
            "lease",
            "timeout",
            "max_attempts",
            "inline_bytes",
            "chunk_bytes",
            "max_result_bytes",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)!r}")
        for name in ("negative_ttl", "max_pending", "compress_above"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, not {getattr(self, name)!r}")
        for name in ("namespace", "queue"):
            text = getattr(self, name)
            if not text or not text.isascii() or not text.isprintable() or set(text) & set(" :{}*?[]"):
                raise ConfigError(f"{name} must be printable ASCII without spaces and :{{}}*?[], not {text!r}")

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, **arguments: Any) -> Settings:
        """Settings from arguments (None = not given), then RQARM_<NAME>, then defaults.

        Raises ConfigError naming the argument or variable that is wrong.
        """
        environ = os.environ if environ is None else environ
        known = {field.name: field for field in fields(cls)}
        if unknown := sorted(set(arguments) - set(known)):
            raise ConfigError(f"no such setting: {', '.join(unknown)}; there are {', '.join(known)}")
        chosen = {name: value for name, value in arguments.items() if value is not None}
        for name, field in known.items():
            variable = f"RQARM_{name.upper()}"
            if name not in chosen and (text := environ.get(variable)):
                chosen[name] = _parse(variable, text, field.default)
        try:
            return cls(**chosen)
        except TypeError as error:
            raise ConfigError(f"a setting has the wrong type: {error}") from error


def _parse(variable: str, text: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
        if isinstance(default, int | float):
            return type(default)(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{variable}={text!r} is not a {type(default).__name__}") from None
    if isinstance(default, tuple):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text
