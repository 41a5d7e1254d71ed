"""What no queue on this server can be faster than: a GET, and a message there and one back, p50 in seconds.

On redis-py's connections, without its client: one process sends, another answers.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import part
import redis


def connect() -> redis.Connection:
    # RESP2: in RESP3 a message is a push, which read_response hands to somebody else
    connection = redis.UnixDomainSocketConnection(path=part.SOCKET, protocol=2)
    connection.connect()
    return connection


def ask(connection: redis.Connection, *command: str) -> object:
    connection.send_command(*command)
    return connection.read_response()


def subscribe(channel: str) -> redis.Connection:
    connection = connect()
    ask(connection, "SUBSCRIBE", channel)
    return connection


def answer(parent: int) -> None:
    """The other side of the ping-pong: it ends with the first one."""
    hears, speaks = subscribe("ping"), connect()
    ask(speaks, "LPUSH", "ready", "1")
    while os.getppid() == parent and hears.read_response()[2] != b"end":  # type: ignore[index]
        ask(speaks, "PUBLISH", "pong", "1")


def middle(calls: int, one: Callable[[], object]) -> float:
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        one()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    calls, parent = int(sys.argv[1]), os.getpid()
    child = os.fork()
    if child == 0:
        answer(parent)
        os._exit(0)
    hears, speaks = subscribe("pong"), connect()
    ask(speaks, "SET", "value", "x" * 20)
    ask(speaks, "BLPOP", "ready", str(part.PATIENCE))

    def ping() -> None:
        ask(speaks, "PUBLISH", "ping", "1")
        hears.read_response()

    limits = {"get": middle(calls, lambda: ask(speaks, "GET", "value")), "ping_pong": middle(calls, ping)}
    ask(speaks, "PUBLISH", "ping", "end")
    os.waitpid(child, 0)
    print(json.dumps(limits))


if __name__ == "__main__":
    main()
