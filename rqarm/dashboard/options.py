"""How the dashboard is set up: an argument wins over RQARM_DASHBOARD_<NAME>, that over the default."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rqarm.config import chosen_options
from rqarm.errors import ConfigError

PREFIX = "RQARM_DASHBOARD_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """All that can be set. Refuses an address that others can reach when nobody has to say who they are."""

    #: the address it listens on, as the server that runs it is told
    host: str = "127.0.0.1"
    port: int = 9181
    #: basic authentication; both or none
    username: str = ""
    password: str = field(default="", repr=False)
    #: bearer token, for scrapers and programs
    token: str = field(default="", repr=False)
    #: nothing can be changed, in rq-dashboard neither
    read_only: bool = False
    #: other addresses than loopback without credentials
    insecure: bool = False
    #: names under which it is asked for, besides localhost; needed behind a proxy that keeps the Host header
    hosts: tuple[str, ...] = ()
    #: origins of other sites that may send changes, such as ``https://admin.example.com``
    origins: tuple[str, ...] = ()
    #: address of the proxy in front, whose X-Forwarded-For and X-Forwarded-Proto are believed; ``*``: of any
    trusted_proxy: str = ""
    #: seconds between two looks at the server while somebody watches
    interval: float = 2.0
    #: browsers that are fed by server-sent events at a time; each holds a thread. Others ask every few seconds
    streams: int = 24
    #: mount rq-dashboard under ``rq/`` when it is installed
    rq: bool = True

    def __post_init__(self) -> None:
        if bool(self.username) != bool(self.password):
            missing = "password" if self.username else "username"
            raise ConfigError(f"{missing} is missing: basic authentication needs both ({PREFIX}{missing.upper()})")
        if ":" in self.username:
            raise ConfigError("username must not hold a colon: basic authentication ends it there")
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"port must be 0 to 65535, not {self.port}")
        if self.interval <= 0 or self.streams < 0:
            raise ConfigError(f"interval must be above 0 and streams 0 or more: {self.interval!r}, {self.streams!r}")
        if not (self.is_loopback or self.has_credentials or self.insecure):
            raise ConfigError(
                f"host {self.host!r} can be reached by others: set {PREFIX}USERNAME and {PREFIX}PASSWORD, or "
                f"{PREFIX}TOKEN, or insist with --insecure"
            )

    @property
    def has_credentials(self) -> bool:
        return bool(self.username or self.token)

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, **arguments: Any) -> Options:
        """Options from arguments (None = not given), then the environment. Raises ConfigError naming what is wrong."""
        return cls(**chosen_options(cls, PREFIX, arguments, environ))


def is_loopback(host: str) -> bool:
    """Whether the name or address means this machine and nobody else can reach it."""
    name = host.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
