"""Fixtures that start real servers. Every xdist worker has its own: a session fixture lives in one process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import managers
import pytest
import redis
import servers
from bench import Bench
from drive import Rig

from rqarm import connect, embedded
from rqarm.worker import equipment
from rqarm.worker.equipment import Equipment


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> None:
    """A shell has its background jobs ignore Ctrl-C, and so would all that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", params=["valkey", "redis"])
def server(request: pytest.FixtureRequest) -> Iterator[embedded.PrivateServer]:
    """A server of each kind found on this machine."""
    binary = servers.BINARIES[request.param]
    if binary is None:
        pytest.skip(servers.MISSING[request.param])
    with servers.throwaway(binary) as started:
        yield started


@pytest.fixture(scope="module")
def home() -> Iterator[embedded.PrivateServer]:
    """One server of one kind for a module, which the tests of worker processes share."""
    with servers.throwaway(servers.VALKEY or servers.REDIS) as server:
        yield server


@pytest.fixture
def url(server: embedded.PrivateServer) -> str:
    return server.url


@pytest.fixture
def redis_client(server: embedded.PrivateServer) -> Iterator[redis.Redis]:
    """A client of the emptied server."""
    with connect.open_client(server.url) as client:
        client.flushall()
        yield client


@pytest.fixture
def rig(redis_client: redis.Redis) -> Rig:
    """The default namespace on the emptied server, with every id in the hand of the test."""
    return Rig(redis_client)


@pytest.fixture
def full(rig: Rig) -> Iterator[Callable[[], None]]:
    """Call it, and memory is out."""
    yield lambda: bool(rig.client.config_set("maxmemory", 1))
    rig.client.config_set("maxmemory", 0)


@pytest.fixture
def bench(redis_client: redis.Redis, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Handlers, a manager, and a worker of RQ's own in this process."""
    monkeypatch.setattr(equipment, "_equipment", Equipment())
    made = Bench(url, monkeypatch)
    yield made
    made.close()


@pytest.fixture(params=managers.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """The blocking and the asyncio manager: what is promised of one is promised of both."""
    return str(request.param)


@pytest.fixture
def rm(kind: str, url: str, redis_client: redis.Redis) -> Iterator[Any]:
    with managers.opened(kind, url) as manager:
        yield manager
