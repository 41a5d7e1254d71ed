"""Clients from URLs, errors that say what to do, and the judgement of a server by its INFO."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
import servers
from servers import FaultProxy, eventually, resp_end, short_directory

from rqarm import connect, embedded
from rqarm.config import Settings
from rqarm.connect import ServerUnavailable, check_server, open_async_client, open_client, redact_url, translate
from rqarm.errors import ConfigError, RqarmError, ServerUnsuitable

# URLs


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h", {"host": "h"}),
        ("redis://h:1234/5", {"host": "h", "port": 1234, "db": 5}),
        ("REDIS://h/2", {"host": "h", "db": 2}),
        ("valkey://u:p%40ss@h/1", {"host": "h", "username": "u", "password": "p@ss", "db": 1}),
        ("rediss://h:7", {"host": "h", "port": 7}),
        ("valkeys://h:7", {"host": "h", "port": 7}),
        ("unix:///run/a%20b.sock?db=3", {"path": "/run/a b.sock", "db": 3}),
        ("redis://h?socket_timeout=17&health_check_interval=2", {"socket_timeout": 17.0, "health_check_interval": 2}),
        ("redis+sentinel://u:p@h1,h2:7/main/4", {"username": "u", "password": "p", "db": 4}),
        ("redis+sentinel://h1/main?socket_timeout=17", {"socket_timeout": 17.0, "db": 0}),
    ],
)
def test_what_a_url_says_reaches_the_connection(url: str, expected: dict[str, Any]) -> None:
    for client in (open_client(url), open_async_client(url)):
        options = client.connection_pool.connection_kwargs
        assert {name: options.get(name) for name in expected} == expected
        assert not options.get("decode_responses")


@pytest.mark.parametrize("url", ["rediss://h", "valkeys://h"])
def test_tls_forms_use_tls(url: str) -> None:
    assert open_client(url).connection_pool.connection_class is redis.SSLConnection
    assert open_async_client(url).connection_pool.connection_class is redis.asyncio.SSLConnection


def test_sentinels_and_service_are_read() -> None:
    url = "redis+sentinel://h1,h2:7,[::1]:8,[::2]/my%20main?sentinel_username=su&sentinel_password=sp"
    for client in (open_client(url), open_async_client(url)):
        pool: Any = client.connection_pool
        assert pool.service_name == "my main"
        logins = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]
        assert [(login["host"], login["port"]) for login in logins] == [
            ("h1", 26379),
            ("h2", 7),
            ("::1", 8),
            ("::2", 26379),
        ]
        assert {(login["username"], login["password"]) for login in logins} == {("su", "sp")}
        assert pool.connection_kwargs.get("password") is None


@pytest.mark.parametrize("url", ["redis://h", "unix:///s.sock", "redis+sentinel://h/main"])
def test_settings_are_the_same_for_every_form(url: str) -> None:
    for opener in (open_client, open_async_client):
        options = opener(url).connection_pool.connection_kwargs
        assert options["socket_connect_timeout"] == 5
        assert options["socket_timeout"] == 5
        assert options["health_check_interval"] == 30
        assert options["retry"].get_retries() == 10
        waiting = opener(url, for_waiting=True).connection_pool.connection_kwargs
        assert waiting["socket_timeout"] is None
        assert waiting["socket_connect_timeout"] == 5
        if not url.startswith("unix"):
            assert options["socket_keepalive"] is True
            assert options["socket_keepalive_options"]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "redis+sentinel://"),
        ("localhost:6379", "redis+sentinel://"),
        ("http://h", "redis+sentinel://"),
        ("memcached://u:secret@h", "valkeys://"),
        ("redis://h:secret", "malformed"),
        ("redis://h?db=x", "Invalid value for 'db'"),
        ("redis://h?decode_responses=1", "decode_responses"),
        ("redis+sentinel://h/main?decode_responses=True", "decode_responses"),
        ("redis://h?no_such_option=1", "no_such_option"),
        ("redis://h?protocol=9", "protocol"),
        ("redis+sentinel://h/main?no_such_option=1", "no_such_option"),
        ("unix://", "path"),
        ("redis+sentinel://h", "service"),
        ("redis+sentinel://h/", "service"),
        ("redis+sentinel:///main", "service"),
        ("redis+sentinel://u:secret@h/main/x", "database"),
        ("redis+sentinel://h:0/main", "host"),
        ("redis+sentinel://h:99999/main", "host"),
        ("redis+sentinel://h,,i/main", "host"),
    ],
)
def test_a_wrong_url_is_refused_before_anything_is_sent(url: str, says: str) -> None:
    for opener in (open_client, open_async_client):
        with pytest.raises(ConfigError) as caught:
            opener(url)
        assert says in str(caught.value)
        assert "RQARM_URL" in str(caught.value)
        assert "u:secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/2", "redis://h:1/2"),
        ("redis://u:SECRET@h:1/2", "redis://u:***@h:1/2"),
        ("redis://:SECRET@h", "redis://:***@h"),
        ("redis://SECRET@h", "redis://***@h"),
        ("redis://:SEC/RET@h", "redis://:***@h"),
        ("redis://:SEC?R=ET@h", "redis://:***@h"),
        ("redis://:SEC#R@ET@h", "redis://:***@h"),
        ("redis://:SEC://RET@h", "redis://:***@h"),
        ("u:SECRET@h", "u:***@h"),
        ("unix://u:SECRET@/a.sock", "unix://u:***@/a.sock"),
        ("unix:///a.sock?password=SECRET&db=1", "unix:///a.sock?password=***&db=1"),
        ("unix:///a.sock?db=1&PASSWORD=SECRET", "unix:///a.sock?db=1&PASSWORD=***"),
        ("rediss://h?ssl_password=SECRET", "rediss://h?ssl_password=***"),
        (
            "redis+sentinel://u:SECRET@h,i/s?sentinel_password=SECRET",
            "redis+sentinel://u:***@h,i/s?sentinel_password=***",
        ),
        ("", ""),
    ],
)
def test_redaction(url: str, shown: str) -> None:
    assert redact_url(url) == shown


def test_the_configured_url_wins_over_the_embedded_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "ensure", lambda: "unix:///embedded.sock")
    assert connect.default_url(Settings(url="redis://h")) == "redis://h"
    assert connect.default_url(Settings()) == "unix:///embedded.sock"


# Errors


def test_nobody_there_says_what_to_do(tmp_path: Path) -> None:
    url = f"unix://u:secret@{tmp_path}/none.sock"
    with open_client(url) as client:
        client.get_retry().update_retries(0)
        with pytest.raises(ServerUnavailable) as caught, connect.explain(url):
            client.ping()
    message = str(caught.value)
    assert isinstance(caught.value, RqarmError)
    assert isinstance(caught.value, redis.ConnectionError)
    assert isinstance(caught.value.__cause__, redis.ConnectionError)
    assert caught.value.url == f"unix://u:***@{tmp_path}/none.sock"
    assert caught.value.url in message
    assert "`rqarm server start`" in message
    assert "RQARM_URL" in message
    assert "secret" not in message


async def test_nobody_there_says_so_in_asyncio_too(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/none.sock"
    client = open_async_client(url)
    client.get_retry().update_retries(0)
    with pytest.raises(ServerUnavailable), connect.explain(url):
        await client.ping()
    await client.aclose()


@pytest.mark.parametrize("kind", [redis.ConnectionError, redis.TimeoutError, redis.sentinel.MasterNotFoundError])
def test_silence_is_translated(kind: type[Exception]) -> None:
    translated = translate(kind("so it is"), "redis://h")
    assert isinstance(translated, ServerUnavailable)
    assert "so it is" in str(translated)
    assert translate(translated, "redis://h") is translated
    assert kind.__name__ in str(translate(kind(), "redis://h"))


@pytest.mark.parametrize(
    "kind",
    [
        redis.ReadOnlyError,
        redis.OutOfMemoryError,
        redis.BusyLoadingError,
        redis.AuthenticationError,
        redis.exceptions.AuthorizationError,
        redis.exceptions.MaxConnectionsError,
        redis.ResponseError,
        KeyError,
    ],
)
def test_an_answer_is_not_translated(kind: type[Exception]) -> None:
    error = kind("x")
    assert translate(error, "redis://h") is error
    with pytest.raises(kind) as caught, connect.explain("redis://h"):
        raise error
    assert caught.value is error


# check_server

GOOD = {
    "redis_version": "7.0.15",
    "role": "master",
    "cluster_enabled": 0,
    "maxmemory": 0,
    "maxmemory_policy": "noeviction",
    "aof_enabled": 1,
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"maxmemory_policy": "volatile-lru"},
        {"maxmemory_policy": "volatile-ttl"},
        {"maxmemory": 256 << 20},
        {"redis_version": "7.2.4", "valkey_version": "7.2.0"},
        {"redis_version": "7.2.4", "valkey_version": "9.1.2"},
        {"redis_version": "10.0.0"},
        {"redis_version": 8.0},
    ],
)
def test_a_fit_server_gets_no_warning(change: dict[str, Any]) -> None:
    assert check_server(GOOD | change, allow_volatile=False) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"maxmemory_policy": "allkeys-lru"}, "CONFIG SET maxmemory-policy volatile-lru"),
        ({"maxmemory_policy": "allkeys-random"}, "allkeys-random"),
        ({"cluster_enabled": 1}, "cluster"),
        ({"role": "slave", "master_host": "10.0.0.1", "master_port": 6380}, "replica of 10.0.0.1:6380"),
        ({"role": "replica"}, "redis+sentinel://"),
        ({"redis_version": "6.2.14"}, "Redis 6.2.14"),
        ({"redis_version": "7.2.4", "valkey_version": "7.1.9"}, "Valkey 7.1.9"),
    ],
)
def test_a_server_that_would_lose_requests_is_refused(change: dict[str, Any], says: str) -> None:
    for allow_volatile in (False, True):
        with pytest.raises(ServerUnsuitable) as caught:
            check_server(GOOD | change, allow_volatile=allow_volatile)
        assert says in str(caught.value)


def test_a_server_without_aof_is_warned_about_unless_that_is_wanted() -> None:
    [warning] = check_server(GOOD | {"aof_enabled": 0}, allow_volatile=False)
    assert "CONFIG SET appendonly yes" in warning
    assert check_server(GOOD | {"aof_enabled": 0}, allow_volatile=True) == []


def test_small_memory_is_warned_about() -> None:
    [warning] = check_server(GOOD | {"maxmemory": 3 << 20}, allow_volatile=False)
    assert "3.0 MiB" in warning


def test_what_info_hides_passes() -> None:
    assert check_server({}, allow_volatile=False) == []


def test_a_real_server_is_judged(redis_client: redis.Redis) -> None:
    [warning] = check_server(redis_client.info(), allow_volatile=False)
    assert "append-only" in warning
    redis_client.config_set("maxmemory-policy", "allkeys-lfu")
    try:
        with pytest.raises(ServerUnsuitable, match="allkeys-lfu"):
            check_server(redis_client.info(), allow_volatile=True)
    finally:
        redis_client.config_set("maxmemory-policy", "noeviction")


# Real connections


def test_a_client_gives_bytes(redis_client: redis.Redis) -> None:
    redis_client.set("k", "v")
    assert redis_client.get("k") == b"v"


async def test_an_async_client_gives_bytes(redis_client: redis.Redis, url: str) -> None:
    redis_client.set("k", "v")
    client = open_async_client(url)
    assert await client.get("k") == b"v"
    await client.aclose()


def test_a_waiting_client_outlasts_the_read_timeout(
    redis_client: redis.Redis, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "READ_TIMEOUT_S", 0.1)
    with open_client(url, for_waiting=True) as waiting:
        assert waiting.blpop(["nothing"], timeout=0.5) is None
    with open_client(url) as ordinary:
        ordinary.get_retry().update_retries(0)
        with pytest.raises(redis.TimeoutError):
            ordinary.blpop(["nothing"], timeout=0.5)


@pytest.fixture(params=["valkey", "redis"])
def sentinel_url(request: pytest.FixtureRequest) -> Iterator[str]:
    binary = servers.BINARIES[request.param]
    if binary is None:
        pytest.skip(servers.MISSING[request.param])
    port = servers.free_port()
    args = ("--port", str(port), "--bind", "127.0.0.1", "--requirepass", "pw")
    with (
        servers.throwaway(binary, args=args),
        servers.sentinel(binary, port, extra="sentinel auth-pass mymaster pw\n") as sentinel_port,
    ):
        with redis.Redis(port=sentinel_port) as sentinel:
            eventually(lambda: sentinel.sentinel_masters()["mymaster"]["flags"] == "master", what="the master is seen")
        yield f"redis+sentinel://:pw@127.0.0.1:1,127.0.0.1:{sentinel_port}/mymaster/2"


def test_a_sentinel_url_finds_the_master(sentinel_url: str) -> None:
    with open_client(sentinel_url) as client:
        client.set("k", "v")
        assert client.get("k") == b"v"
        assert client.client_info()["db"] == 2


async def test_a_sentinel_url_finds_the_master_in_asyncio(sentinel_url: str) -> None:
    client = open_async_client(sentinel_url)
    await client.set("k", "v")
    assert await client.get("k") == b"v"
    await client.aclose()


async def test_an_unknown_service_is_unavailable(sentinel_url: str) -> None:
    url = sentinel_url.replace("mymaster", "other")
    with open_client(url) as client:
        client.get_retry().update_retries(0)
        with pytest.raises(ServerUnavailable, match="No master found for 'other'"), connect.explain(url):
            client.ping()


# The fault proxy that other tests rely on


@pytest.fixture
def proxy(redis_client: redis.Redis, server: embedded.PrivateServer) -> Iterator[FaultProxy]:
    with short_directory() as directory, FaultProxy(server.socket, directory / "proxy.sock") as started:
        yield started


@pytest.fixture
def fragile(proxy: FaultProxy) -> Iterator[redis.Redis]:
    """A client through the proxy that does not send anything twice."""
    with redis.Redis.from_url(proxy.url, socket_timeout=0.3) as client:
        client.ping()
        yield client


def test_the_proxy_counts_commands(proxy: FaultProxy, fragile: redis.Redis) -> None:
    proxy.seen.clear()
    fragile.set("k", b"\r\n*1\r\n$4\r\nPING\r\n" * 20_000)
    with fragile.pipeline(transaction=True) as pipe:
        pipe.incr("n").get("k")
        assert len(pipe.execute()[1]) == 20_000 * 16
    assert proxy.commands == ["SET", "MULTI", "INCRBY", "GET", "EXEC"]


@pytest.mark.parametrize(("mode", "applied"), [("before", False), ("after", True), ("mid", True)])
def test_the_proxy_cuts(
    mode: str, applied: bool, proxy: FaultProxy, fragile: redis.Redis, redis_client: redis.Redis
) -> None:
    proxy.arm(mode, at=2, command="incrby")
    assert fragile.incr("n") == 1
    assert fragile.get("n") == b"1"
    assert not proxy.fired.is_set()
    with pytest.raises(redis.ConnectionError):
        fragile.incr("n")
    assert proxy.fired.wait(5)
    assert redis_client.get("n") == (b"2" if applied else b"1")
    assert fragile.get("n") == redis_client.get("n")


def test_the_proxy_cuts_in_the_middle_of_the_reply(proxy: FaultProxy, redis_client: redis.Redis) -> None:
    redis_client.set("k", "0123456789")
    with servers._connect(proxy.url.removeprefix("unix://")) as raw:
        raw.settimeout(5)
        proxy.arm("mid")
        raw.sendall(b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n")
        received = b""
        while more := raw.recv(100):
            received += more
    assert received == b"$10\r\n0123456789\r\n"[:8]


def test_the_proxy_hangs_one_connection(proxy: FaultProxy, fragile: redis.Redis, redis_client: redis.Redis) -> None:
    proxy.arm("hang")
    with pytest.raises(redis.TimeoutError):
        fragile.incr("n")
    assert proxy.fired.is_set()
    assert redis_client.get("n") is None
    assert fragile.incr("n") == 1


def test_replies_before_the_fault_in_a_pipeline_arrive(proxy: FaultProxy, redis_client: redis.Redis) -> None:
    proxy.arm("before", at=3)
    with servers._connect(proxy.url.removeprefix("unix://")) as raw:
        raw.settimeout(5)
        raw.sendall(b"*2\r\n$4\r\nINCR\r\n$1\r\nn\r\n" * 4)
        received = b""
        while more := raw.recv(100):
            received += more
    assert received == b":1\r\n:2\r\n"
    assert redis_client.get("n") == b"2"


def test_our_client_sends_again_after_a_lost_reply(proxy: FaultProxy, redis_client: redis.Redis) -> None:
    with open_client(proxy.url) as client:
        proxy.arm("after", command="INCRBY")
        assert client.incr("n") == 2


async def test_our_async_client_sends_again_after_a_lost_reply(proxy: FaultProxy, redis_client: redis.Redis) -> None:
    client = open_async_client(proxy.url)
    proxy.arm("after", command="INCRBY")
    assert await client.incr("n") == 2
    await client.aclose()


def test_the_proxy_refuses_resets_delays_and_swallows(proxy: FaultProxy, fragile: redis.Redis) -> None:
    proxy.refuse = True
    proxy.reset_all()
    with pytest.raises(redis.ConnectionError):
        fragile.ping()
    proxy.refuse = False
    assert fragile.ping()
    proxy.blackhole = True
    with pytest.raises(redis.TimeoutError):
        fragile.ping()
    proxy.blackhole = False
    assert fragile.ping()
    proxy.delay = 0.5
    with pytest.raises(redis.TimeoutError):
        fragile.ping()
    proxy.delay = 0.0
    assert fragile.ping()


@pytest.mark.parametrize("protocol", [2, 3])
def test_subscriptions_pass_the_proxy(protocol: int, proxy: FaultProxy, redis_client: redis.Redis) -> None:
    with redis.Redis.from_url(proxy.url, protocol=protocol) as client, client.pubsub() as pubsub:
        pubsub.subscribe("c")
        assert pubsub.get_message(timeout=5)["type"] == "subscribe"
        redis_client.publish("c", "hello")
        assert pubsub.get_message(timeout=5)["data"] == b"hello"
        assert client.ping()


def test_the_proxy_listens_on_tcp_too(redis_client: redis.Redis, server: embedded.PrivateServer) -> None:
    with FaultProxy(server.socket) as proxy, redis.Redis.from_url(proxy.url) as client:
        assert client.ping()
        proxy.arm("before")
        with pytest.raises(redis.ConnectionError):
            client.ping()


async def test_many_connections_pass_the_proxy_at_once(proxy: FaultProxy) -> None:
    clients = [open_async_client(proxy.url) for _ in range(50)]
    assert await asyncio.gather(*(client.incr("n") for client in clients))
    for client in clients:
        await client.aclose()


@pytest.mark.parametrize(
    "value",
    [
        b"+OK\r\n",
        b":12\r\n",
        b"$-1\r\n",
        b"$0\r\n\r\n",
        b"$4\r\na\r\nb\r\n",
        b"*-1\r\n",
        b"*0\r\n",
        b"*2\r\n*1\r\n:1\r\n$1\r\nx\r\n",
        b"_\r\n",
        b"%1\r\n+a\r\n*1\r\n:1\r\n",
        b"~1\r\n#t\r\n",
        b"=5\r\ntxt:a\r\n",
        b"|1\r\n+a\r\n+b\r\n:1\r\n",
        b">2\r\n+a\r\n,1.5\r\n",
    ],
)
def test_a_resp_value_ends_where_it_ends(value: bytes) -> None:
    assert [resp_end(value[:cut]) for cut in range(len(value))] == [0] * len(value)
    assert resp_end(value + b"+more\r\n") == len(value)
