"""Open a client from a URL, and say what is wrong with the server behind it.

The only module that knows forms of URLs and settings of connections. It sends nothing: a client connects with its first
command, and ``check_server`` judges an INFO that somebody else read.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.asyncio.sentinel
import redis.connection
import redis.sentinel
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.retry import Retry

from rqarm.config import Settings
from rqarm.errors import ConfigError, RqarmError, ServerUnsuitable

FORMS = (
    "redis://[user:password@]host[:port][/db]",
    "rediss://... (TLS)",
    "unix:///path/to.sock[?db=0]",
    "valkey://...",
    "valkeys://...",
    "redis+sentinel://[user:password@]host1[:26379],host2/service[/db]",
)

CONNECT_TIMEOUT_S = 5.0
#: an ordinary command that takes longer counts as lost and is sent again (same ids, so nothing happens twice)
READ_TIMEOUT_S = 5.0
#: an idle connection older than this is tried with PING before it is used
HEALTH_CHECK_S = 30
#: redis.Redis() retries 10 times, redis.Redis.from_url() and Sentinel's master_for() not at all (redis-py 8.1).
#: Ours retry alike: a server that is gone is reported after some 4 s, a restart shorter than that is not noticed.
RETRIES = 10
#: Sentinels answer at once or are down: ask the next one
SENTINEL_TIMEOUT_S = 2.0
#: what is too little memory to work with, rather than a choice
SMALL_MAXMEMORY_BYTES = 64 << 20

OLDEST_REDIS = (7, 0)
OLDEST_VALKEY = (7, 2)
#: that knows WAITAOF
OLDEST_SYNCING_REDIS = (7, 2)

# redis-py leaves these untyped
_Sentinel: Any = redis.sentinel.Sentinel
_AsyncSentinel: Any = redis.asyncio.sentinel.Sentinel
_parse_url: Any = redis.connection.parse_url

_SCHEMES = {"redis": "redis", "rediss": "rediss", "unix": "unix", "valkey": "redis", "valkeys": "rediss"}
_SENTINEL = "redis+sentinel"
_SECRET_OPTION = re.compile(r"((?:^|[?&;])[^=&?#]*(?:pass|secret|token)[^=&#]*=)[^&#]*", re.IGNORECASE)


class ServerUnavailable(RqarmError, redis.ConnectionError):
    """Nobody answers at ``url`` (redacted). Start the server, or correct the URL; then send the same again."""

    def __init__(self, url: str, reason: str) -> None:
        self.url = redact_url(url)
        self.reason = reason
        super().__init__(
            f"cannot reach {self.url}: {reason.rstrip('.')}. Is the server running? `rqarm server start` starts the "
            "embedded one, RQARM_URL names another"
        )


def open_client(url: str, *, for_waiting: bool = False) -> redis.Redis:
    """A client of the server at ``url``. Options in the URL's query win over ours.

    An ordinary command is given up after 5 s and sent again. ``for_waiting``: no limit, for commands that block by
    design and for subscriptions; a dead peer is found by TCP keepalive after some 25 s.

    Raises ConfigError naming the accepted forms. Nothing is sent yet.
    """
    target = _parse(url)
    options = target.options(None if for_waiting else READ_TIMEOUT_S, Retry(_backoff(), RETRIES))
    client: redis.Redis
    if target.sentinels:
        sentinel = _Sentinel(target.sentinels, sentinel_kwargs=target.sentinel_options(Retry(NoBackoff(), 0)))
        over = _MasterOverTls if options.pop("ssl", False) else _Master
        client = sentinel.master_for(target.service, connection_class=over, **options)
    else:
        client = redis.Redis.from_url(target.url, **options)
    _check_options(url, client.connection_pool)
    return client


def open_async_client(url: str, *, for_waiting: bool = False) -> redis.asyncio.Redis:
    """The same for asyncio. Close it with ``aclose()`` in the loop that used it."""
    target = _parse(url)
    options = target.options(None if for_waiting else READ_TIMEOUT_S, redis.asyncio.retry.Retry(_backoff(), RETRIES))
    client: redis.asyncio.Redis
    if target.sentinels:
        sentinel = _AsyncSentinel(
            target.sentinels,
            sentinel_kwargs=target.sentinel_options(redis.asyncio.retry.Retry(NoBackoff(), 0)),
        )
        over = _AsyncMasterOverTls if options.pop("ssl", False) else _AsyncMaster
        client = sentinel.master_for(target.service, redis_class=_AsyncSentinelClient, connection_class=over, **options)
    else:
        client = redis.asyncio.Redis.from_url(target.url, **options)
    _check_options(url, client.connection_pool)
    return client


def default_url(settings: Settings) -> str:
    """The configured URL, else that of this user's embedded server, which is started if need be.

    Raises EmbeddedError when there is no server program or it does not come up.
    """
    if settings.url:
        return settings.url
    from rqarm import embedded  # here: it is POSIX only, and a URL needs no server

    return embedded.ensure()


def redact_url(url: str) -> str:
    """The URL without passwords, fit for messages and logs. Takes malformed ones, and rather hides too much."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    # Up to the last "@" of all: a password that nobody escaped may hold any of "/?#@".
    credentials, at, place = rest.rpartition("@")
    if at:
        user, colon, _ = credentials.partition(":")
        rest = f"{user if colon else ''}{':' if colon else ''}***@{place}"
    return scheme + separator + _SECRET_OPTION.sub(r"\1***", rest)


def translate(error: Exception, url: str) -> Exception:
    """ServerUnavailable for an error that means "nobody answers"; any other error as it is.

    READONLY, OOM, LOADING, a wrong password and an exhausted pool come from somebody who does answer.
    """
    if isinstance(error, ServerUnavailable | redis.BusyLoadingError | redis.AuthenticationError):
        return error
    if isinstance(error, redis.exceptions.AuthorizationError | redis.exceptions.MaxConnectionsError):
        return error
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return ServerUnavailable(url, str(error) or type(error).__name__)
    return error


@contextmanager
def explain(url: str) -> Iterator[None]:
    """Turn errors inside that mean "nobody answers" into ServerUnavailable; works around ``await`` too."""
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        translated = translate(error, url)
        if translated is error:
            raise
        raise translated from error


def check_server(info: Mapping[str, Any], *, allow_volatile: bool, durability: str = "fast") -> list[str]:
    """Warnings about a server, judged by its INFO (redis-py's dict, all default sections). What INFO hides passes.

    Raises ServerUnsuitable for a server that would lose requests: too old, a cluster node, a replica, or one that
    evicts any key; and one that cannot say whether a submit lies on its disk, when ``durability`` is ``synced``.
    ``allow_volatile``: the caller knows that a restart forgets everything.
    """
    _refuse_old(info)
    if durability == "synced":
        _refuse_unsynced(info)
    if _number(info, "cluster_enabled"):
        raise ServerUnsuitable(
            "the server runs in cluster mode, and RQ's keys span its slots: use a server started without "
            "cluster-enabled, with Sentinel if you need failover"
        )
    if str(info.get("role", "master")) != "master":
        master = f"{info.get('master_host', 'the master')}:{info.get('master_port', 6379)}"
        raise ServerUnsuitable(
            f"the server is a replica of {master} and takes no writes: connect to that one, or let "
            "redis+sentinel://host/service find the master"
        )
    policy = str(info.get("maxmemory_policy", ""))
    if policy.startswith("allkeys"):
        raise ServerUnsuitable(
            f"maxmemory-policy is {policy}: when memory runs out the server would delete waiting requests; "
            "`CONFIG SET maxmemory-policy volatile-lru` (evicts results only) or noeviction, in its configuration too"
        )
    warnings = []
    if not allow_volatile and "aof_enabled" in info and not _number(info, "aof_enabled"):
        warnings.append(
            "the server keeps no append-only file: accepted requests are lost when it restarts; "
            "`CONFIG SET appendonly yes`, in its configuration too, or allow_volatile=True (RQARM_ALLOW_VOLATILE=1)"
        )
    maxmemory = _number(info, "maxmemory")
    if 0 < maxmemory < SMALL_MAXMEMORY_BYTES:
        warnings.append(
            f"maxmemory is only {maxmemory / (1 << 20):.1f} MiB: submits are soon refused; "
            "`CONFIG SET maxmemory 256mb` or more"
        )
    return warnings


@dataclass(frozen=True, slots=True)
class _Target:
    """A parsed URL: ``url`` in a form that redis-py takes, or Sentinels and a service."""

    url: str
    over_tcp: bool
    query: Mapping[str, Any]
    sentinels: tuple[tuple[str, int], ...] = ()
    service: str = ""
    sentinel_login: Mapping[str, str] | None = None

    def options(self, read_timeout_s: float | None, retry: Any) -> dict[str, Any]:
        chosen: dict[str, Any] = {
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "socket_timeout": read_timeout_s,
            "health_check_interval": HEALTH_CHECK_S,
            "retry": retry,
        }
        if self.over_tcp:
            chosen |= {"socket_keepalive": True, "socket_keepalive_options": _keepalive()}
        return chosen | dict(self.query)

    def sentinel_options(self, retry: Any) -> dict[str, Any]:
        return {
            "socket_connect_timeout": SENTINEL_TIMEOUT_S,
            "socket_timeout": SENTINEL_TIMEOUT_S,
            "retry": retry,
            **(self.sentinel_login or {}),
        }


class _Master(redis.sentinel.SentinelManagedConnection):
    """Asks the Sentinels each time it connects. redis-py (8.1) does so for the first time only: what it sends again
    goes to the address of before, for a minute, when the old master is silent and not dead.
    """

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if not self._sock:
            self.connect_to(self.connection_pool.get_master_address())  # type: ignore[no-untyped-call]
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]


class _MasterOverTls(_Master, redis.sentinel.SentinelManagedSSLConnection):
    pass


class _AsyncMaster(redis.asyncio.sentinel.SentinelManagedConnection):
    """The same for asyncio."""

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if not self.is_connected:
            await self.connect_to(await self.connection_pool.get_master_address())  # type: ignore[no-untyped-call]
        await super().send_packed_command(command, check_health)


class _AsyncMasterOverTls(_AsyncMaster, redis.asyncio.sentinel.SentinelManagedSSLConnection):
    pass


class _AsyncSentinelClient(redis.asyncio.Redis):
    """A client of the master that closes the connections to the Sentinels with its own."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        pool = self.connection_pool
        if isinstance(pool, redis.asyncio.sentinel.SentinelConnectionPool):
            for sentinel in pool.sentinel_manager.sentinels:
                await sentinel.aclose()


def _parse(url: str) -> _Target:
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or (scheme not in _SCHEMES and scheme != _SENTINEL):
        raise _bad(url, "it must be one of " + ", ".join(FORMS))
    if scheme == _SENTINEL:
        return _parse_sentinel(url, rest)
    plain = f"{_SCHEMES[scheme]}://{rest}"
    query = _query(url, plain)
    if scheme == "unix" and not query.get("path"):
        raise _bad(url, "the path of the socket is missing, as in unix:///run/redis.sock")
    return _Target(plain, scheme != "unix", {})


def _parse_sentinel(url: str, rest: str) -> _Target:
    address, _, query = rest.partition("?")
    authority, _, path = address.partition("/")
    credentials, at, hosts = authority.rpartition("@")
    service, _, db = path.partition("/")
    if not hosts or not service:
        raise _bad(url, f"it must be {FORMS[-1]}")
    if db and not db.isdecimal():
        raise _bad(url, f"the database must be a number, not {db!r}")
    options = _query(url, f"redis://{credentials}{at}unused/{db or 0}?{query}")
    del options["host"]
    login = {
        name: str(options.pop(f"sentinel_{name}")) for name in ("username", "password") if f"sentinel_{name}" in options
    }
    sentinels = tuple(_host_and_port(url, host) for host in hosts.split(","))
    return _Target(url, True, options, sentinels, unquote(service), login)


def _host_and_port(url: str, text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+)(?::(\d{1,5}))?", text)
    if not match or not 0 < int(match[2] or 26379) < 65536:
        raise _bad(url, f"{redact_url(text)!r} is no host[:port]")
    return match[1].strip("[]"), int(match[2] or 26379)


def _query(url: str, plain: str) -> dict[str, Any]:
    """What redis-py reads from the URL. Raises ConfigError when it cannot."""
    try:
        options: dict[str, Any] = dict(_parse_url(plain))
    except ValueError as error:
        # redis-py and urllib quote parts of the URL in theirs, so the text stays out when it may hold a secret.
        reason = str(error) if str(error).startswith("Invalid value for") else "host, port or an option is malformed"
        raise _bad(url, reason) from None
    if "decode_responses" in options:
        raise _bad(url, "decode_responses does not fit: results are bytes; leave it out")
    return options


def _check_options(url: str, pool: Any) -> None:
    """Build one connection without opening it: an unknown option shows here, not with the first command."""
    try:
        pool.connection_class(**pool.connection_kwargs)
    except (TypeError, ValueError, redis.RedisError) as error:
        raise _bad(url, f"an option does not fit: {error}") from None


def _bad(url: str, reason: str) -> ConfigError:
    return ConfigError(f"url (RQARM_URL) {redact_url(url)!r}: {reason}")


def _backoff() -> ExponentialWithJitterBackoff:
    return ExponentialWithJitterBackoff(base=0.01, cap=1.0)


def _keepalive() -> dict[int, int]:
    """First probe after 10 s of silence, then every 5 s, dead after 3: the kernel's own defaults take two hours."""
    idle = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE", None)  # the latter on macOS
    wanted = {idle: 10, getattr(socket, "TCP_KEEPINTVL", None): 5, getattr(socket, "TCP_KEEPCNT", None): 3}
    return {option: value for option, value in wanted.items() if option is not None}


def _number(info: Mapping[str, Any], name: str) -> int:
    return int(info.get(name, 0) or 0)


def _refuse_old(info: Mapping[str, Any]) -> None:
    name, version, numbers = _program(info)
    if numbers and numbers < (OLDEST_VALKEY if name == "Valkey" else OLDEST_REDIS):
        raise ServerUnsuitable(
            f"the server is {name} {version}: upgrade it to Redis {OLDEST_REDIS[0]}.{OLDEST_REDIS[1]} or "
            f"Valkey {OLDEST_VALKEY[0]}.{OLDEST_VALKEY[1]}, or newer"
        )


def _refuse_unsynced(info: Mapping[str, Any]) -> None:
    name, version, numbers = _program(info)
    if name == "Redis" and numbers and numbers < OLDEST_SYNCING_REDIS:
        raise ServerUnsuitable(
            f"durability is synced, and Redis {version} cannot say what lies on its disk (WAITAOF): take Redis "
            f"{OLDEST_SYNCING_REDIS[0]}.{OLDEST_SYNCING_REDIS[1]}, Valkey, or durability=fast"
        )
    if "aof_enabled" in info and not _number(info, "aof_enabled"):
        raise ServerUnsuitable(
            "durability is synced, and the server keeps no append-only file: `CONFIG SET appendonly yes`, in its "
            "configuration too, or durability=fast"
        )


def _program(info: Mapping[str, Any]) -> tuple[str, str, tuple[int, ...]]:
    """Name and version of the server, as text and in numbers; () = it does not say."""
    name, version = "Redis", str(info.get("redis_version", ""))
    if "valkey_version" in info:  # Valkey calls itself Redis 7.2.4 in redis_version
        name, version = "Valkey", str(info["valkey_version"])
    return name, version, tuple(int(part) for part in re.findall(r"\d+", version)[:2])
