"""What a lone request cannot be faster than on this machine: its hops and its scripts, with hardly any Python beside.

    python benchmarks/floor.py [--calls 1000] [--server redis]

Two processes on bare connections of redis-py, in turns within one run; p50 in microseconds.

hops       RPUSH to a worker that blocks on the list, PUBLISH back to who waits. What every queue with a worker pays.
scripts    The same hops with the transitions of rqarm: submit; take, sent behind the BLMOVE; complete, whose wake-up
           brings the value. All commands are packed before; nobody looks for a route or calls a handler.
server     What the server needs for these three scripts (INFO commandstats), of `scripts`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import redis
from worker import server_binary

from rqarm import BatchRequest, RequestManager, codec, embedded, flows
from rqarm.calls import Call

LEASE_MS = 60_000


class Wire:
    """One bare connection."""

    def __init__(self, path: str) -> None:
        # RESP2: in RESP3 a message is a push, which read_response hands to somebody else
        self.connection = redis.UnixDomainSocketConnection(path=path, protocol=2)
        self.connection.connect()

    def pack(self, *commands: tuple[Any, ...]) -> bytes:
        return b"".join(self.connection.pack_commands(commands))

    def send(self, packed: bytes) -> None:
        self.connection._sock.sendall(packed)

    def read(self) -> Any:
        return self.connection.read_response()

    def ask(self, *command: Any) -> Any:
        self.send(self.pack(command))
        return self.read()


def as_command(call: Call[Any]) -> tuple[Any, ...]:
    return ("EVALSHA", call.script.sha, len(call.keys), *call.keys, *call.argv)


def hops(path: str, calls: int) -> list[float]:
    child = os.fork()
    if child == 0:
        wire = Wire(path)
        while wire.ask("BLPOP", "jobs", "0")[1] != b"end":
            wire.ask("PUBLISH", "done", "1")
        os._exit(0)
    hears, speaks = Wire(path), Wire(path)
    hears.ask("SUBSCRIBE", "done")
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        speaks.ask("RPUSH", "jobs", "1")
        hears.read()
        taken.append(time.perf_counter() - began)
    speaks.ask("RPUSH", "jobs", "end")
    os.waitpid(child, 0)
    return taken


def scripts(path: str, calls: int, manager: RequestManager) -> list[float]:
    core = manager.core
    lists = core.jobs.lists(core.settings.queue)
    requests = [BatchRequest(f"/floor/{time.time_ns()}/{n}") for n in range(calls)]
    child = os.fork()
    if child == 0:
        _serve(Wire(path), manager, requests)
        os._exit(0)
    hears, speaks = Wire(path), Wire(path)
    packed = [speaks.pack(as_command(flows._submit_call(core, request, None, False))) for request in requests]
    taken = []
    for request, submit in zip(requests, packed, strict=True):
        while not any(entry["cmd"] == "blmove" for entry in manager.connection.client_list()):  # type: ignore[union-attr]
            continue
        hears.ask("SUBSCRIBE", core.keys.done(request.key))
        began = time.perf_counter()
        speaks.send(submit)
        assert speaks.read()[0] == b"new"
        said = hears.read()[2]
        taken.append(time.perf_counter() - began)
        assert said.startswith(b"completed:"), said
        hears.ask("UNSUBSCRIBE", core.keys.done(request.key))
    os.waitpid(child, 0)
    assert not manager.connection.llen(lists[1])
    return taken


def _serve(wire: Wire, manager: RequestManager, requests: list[BatchRequest]) -> None:
    """Take and complete, as a worker does, one after the other."""
    core = manager.core
    lists, encoded = core.jobs.lists(core.settings.queue), codec.encode(1, core.settings)
    block = ("BLMOVE", lists[1], lists[1], "LEFT", "LEFT", "0")
    takes = [
        wire.pack(block, as_command(core.calls.take(lists, f"{os.getpid()}.{n}", "w", "w", LEASE_MS, for_rq=True)))
        for n in range(len(requests))
    ]
    for take in takes:
        wire.send(take)
        wire.read()
        started = core.calls.take(lists, "", "", "", 0, for_rq=True).parse(wire.read()).attempt
        assert started is not None
        complete = core.calls.complete(started, encoded.envelope, encoded.inline, sticky=False, ttl_ms=0)
        assert wire.ask(*as_command(complete))[0] == b"stored"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--server", help="valkey (the embedded one, default), redis, or a program")
    options = parser.parse_args()
    rounds: dict[str, list[float]] = {"hops": [], "scripts": [], "server": []}
    with (
        tempfile.TemporaryDirectory(prefix="rqarm-") as place,
        embedded.private(Path(place), binary=server_binary(options.server)) as server,
        RequestManager(server.url, allow_volatile=True) as manager,
    ):
        path, client = str(server.socket), manager.connection
        manager.submit("/floor/warm")  # each script is on the server from here on
        with manager.queues.next_request(5) as lease:  # type: ignore[union-attr]
            lease.finish(1)
        for _ in range(5):
            rounds["hops"] += hops(path, options.calls // 5)
            client.config_resetstat()
            rounds["scripts"] += scripts(path, options.calls // 5, manager)
            spent: Any = client.info("commandstats")
            rounds["server"].append(spent["cmdstat_evalsha"]["usec"] / (options.calls // 5) / 1e6)
    for name, seconds in rounds.items():
        print(f"{name:<9}{1e6 * statistics.median(seconds):7.0f} us")


if __name__ == "__main__":
    main()
