"""How safe a submit is: it says so when the setting ``durability`` asks, and never more than the server has said.

Real servers. One that syncs its file at every write, and one that never does: what it has not synced is not durable.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import managers
import pytest
import redis
import servers
from click.testing import CliRunner
from servers import eventually

from rqarm import BatchRequest, ConfigError, RequestManager, connect, embedded
from rqarm.cli import main
from rqarm.errors import ServerUnsuitable

pytestmark = pytest.mark.skipif(servers.VALKEY is None, reason=servers.MISSING["valkey"])

#: seconds that a submit may wait for what never comes
SHORT = 0.2


@pytest.fixture(scope="module")
def syncing() -> Iterator[embedded.PrivateServer]:
    with servers.throwaway(servers.VALKEY, aof=True, args=("--appendfsync", "always")) as server:
        yield server


@pytest.fixture(scope="module")
def lazy() -> Iterator[embedded.PrivateServer]:
    """It has a file, and leaves it to the system when that lies on the disk."""
    with servers.throwaway(servers.VALKEY, aof=True, args=("--appendfsync", "no")) as server:
        yield server


@pytest.fixture
def sure(kind: str, syncing: embedded.PrivateServer) -> Iterator[Any]:
    with managers.opened(kind, syncing.url, durability="synced") as manager:
        yield manager


@pytest.fixture
def unsure(kind: str, lazy: embedded.PrivateServer) -> Iterator[Any]:
    with managers.opened(kind, lazy.url, durability="synced", durable_timeout=SHORT) as manager:
        yield manager


def test_nothing_is_said_where_nothing_was_asked(rm: Any) -> None:
    assert rm.submit("/x").durable is None
    assert [status.durable for status in rm.submit_many(["/x", "/y"])] == [None, None]


def test_what_lies_on_the_disk_is_durable(sure: Any, kind: str) -> None:
    first = sure.submit(f"/disk/{kind}")
    assert (first.outcome, first.durable) == ("new", True)
    joined = sure.submit(f"/disk/{kind}")
    assert (joined.outcome, joined.durable) == ("joined", True)
    assert first.to_dict()["durable"] is True
    assert sure.status(first.key).durable is None  # nobody asks twice


def test_what_does_not_in_time_is_pending_all_the_same(unsure: Any) -> None:
    status = unsure.submit("/lazy")
    assert (status.state, status.durable) == ("pending", False)
    assert unsure.status(status.key).state == "pending"


def test_who_joins_what_is_not_safe_yet_is_not_told_that_it_is(lazy: embedded.PrivateServer, kind: str) -> None:
    with managers.opened(kind, lazy.url) as other:
        other.submit("/others")
    with managers.opened(kind, lazy.url, durability="synced", durable_timeout=SHORT) as rm:
        joined = rm.submit("/others")
    assert (joined.outcome, joined.durable) == ("joined", False)


def test_a_thousand_wait_once(sure: Any, unsure: Any) -> None:
    for manager, expected in ((sure, True), (unsure, False)):
        names = [f"/many/{n}" for n in range(20)]
        assert {status.durable for status in manager.submit_many(names)} == {expected}
        assert {status.durable for status in manager.submit_stream(names, chunk=7)} == {expected}
        assert {status.durable for status in manager.bulk_get_or_submit(names).misses} == {expected}


def test_the_confirmation_is_behind_a_call_that_was_sent_again(unsure: Any, lazy: embedded.PrivateServer) -> None:
    """A server that had forgotten the script has written nothing when it confirms for the first time."""
    with connect.open_client(lazy.url) as client:
        client.script_flush()
        assert unsure.submit("/forgotten").durable is False
        client.script_flush()
        assert {status.durable for status in unsure.submit_many(["/forgotten/1", "/forgotten/2"])} == {False}


def test_an_error_of_one_leaves_the_others_confirmed(sure: Any) -> None:
    key = "shared-key"
    sure.submit(BatchRequest("/one", key=key))
    errors: dict[int, Exception] = {}
    entries = [BatchRequest("/two", key=key), "/three"]
    statuses = list(sure.submit_stream(entries, on_error=lambda at, error: errors.update({at: error})))
    assert [status.durable for status in statuses] == [True]
    assert list(errors) == [0]


def test_a_server_without_a_file_is_refused(url: str, redis_client: redis.Redis) -> None:
    with (
        RequestManager(url, durability="synced", allow_volatile=True) as rm,
        pytest.raises(ServerUnsuitable, match="durability is synced"),
    ):
        rm.submit("/x")
    assert not redis_client.keys("arm:*")


def test_a_server_that_cannot_say_is_refused() -> None:
    old = {"redis_version": "7.0.15", "aof_enabled": 1}
    with pytest.raises(ServerUnsuitable, match=r"Redis 7\.0\.15 cannot say.*WAITAOF"):
        connect.check_server(old, allow_volatile=False, durability="synced")
    assert connect.check_server(old, allow_volatile=False, durability="replicated") == []
    for new in ({"redis_version": "7.2.0"}, {"redis_version": "7.2.4", "valkey_version": "7.2.5"}):
        assert connect.check_server({**new, "aof_enabled": 1}, allow_volatile=False, durability="synced") == []


def test_what_replicas_have_is_durable(kind: str) -> None:
    port = servers.free_port()
    link = ("--bind", "127.0.0.1", "--protected-mode", "no", "--port", str(port), "--repl-diskless-sync-delay", "0")
    options: dict[str, Any] = {"durability": "replicated", "durable_timeout": SHORT}
    with servers.throwaway(servers.VALKEY, args=link) as master:
        with managers.opened(kind, master.url, **options) as rm:
            assert rm.submit("/alone").durable is False
        with (
            servers.throwaway(servers.VALKEY, args=("--replicaof", f"127.0.0.1 {port}")) as replica,
            connect.open_client(replica.url) as client,
        ):
            eventually(lambda: client.info("replication")["master_link_status"] == "up", what="the replica follows")
            with managers.opened(kind, master.url, **options | {"durable_timeout": 4.0}) as rm:
                assert rm.submit("/two").durable is True
            with managers.opened(kind, master.url, **options, durable_replicas=2) as rm:
                assert rm.submit("/three").durable is False


def test_the_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="durability must be one of fast, synced, replicated, not 'safe'"):
        RequestManager("redis://x", durability="safe")
    with pytest.raises(ConfigError, match="durable_timeout must be at most 4 s"):
        RequestManager("redis://x", durable_timeout=5)
    with pytest.raises(ConfigError, match="durable_replicas must be above 0"):
        RequestManager("redis://x", durable_replicas=0)
    monkeypatch.setenv("RQARM_DURABILITY", "replicated")
    assert RequestManager("redis://x").settings.durability == "replicated"
    assert connect.READ_TIMEOUT_S > 4.0, "a confirmation that comes late must not count as a lost reply"


def test_the_command_line_says_what_is_not_safe(
    lazy: embedded.PrivateServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"URL": lazy.url, "DURABILITY": "synced", "DURABLE_TIMEOUT": "0.1"}.items():
        monkeypatch.setenv(f"RQARM_{name}", value)
    one = CliRunner().invoke(main, ["submit", "/cli"])
    assert (one.exit_code, one.stdout.split()[0]) == (0, "new")
    assert "did not say within durable_timeout" in one.stderr
    file = tmp_path / "requests"
    file.write_text("/cli/1\n/cli/2\n")
    many = CliRunner().invoke(main, ["submit", "--from", str(file)])
    assert many.exit_code == 0
    assert "2 of these" in many.stderr
