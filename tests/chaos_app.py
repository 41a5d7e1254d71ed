"""Handlers for the chaos shows. Each execution notes its begin and its end in a file, which Redis has no part in.

A line is ``begin`` or ``end``, what runs, the process, the attempt; O_APPEND keeps lines of many processes whole.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import resource
import signal
import time
from pathlib import Path

from rqarm import BatchRequest, Context, Handlers

handlers = Handlers()
#: seconds that ``/work`` takes at the least and at the most
SHORTEST, LONGEST = (float(part) for part in os.environ.get("CHAOS_WORK", "0.01,0.05").split(","))
_notes = os.open(os.environ.get("CHAOS_NOTES", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def note(word: str, name: str, context: Context) -> None:
    os.write(_notes, f"{word} {name} {os.getpid()} {context.attempt}\n".encode())


@handlers.route("/work/{n:int}")
def work(request: BatchRequest, context: Context, n: int) -> list[int]:
    """Takes a while that depends on ``n`` only; most are short, some long. The answer tells whose it is."""
    note("begin", f"work/{n}", context)
    time.sleep(SHORTEST + (LONGEST - SHORTEST) * (n * 7919 % 1000 / 1000) ** 3)
    note("end", f"work/{n}", context)
    return [n * n, context.attempt]


# -- poison


@handlers.route("/poison/segfault")
def segfault(request: BatchRequest, context: Context) -> None:
    note("begin", "poison/segfault", context)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


@handlers.route("/poison/exit/{code:int}")
def leave(request: BatchRequest, context: Context, code: int) -> None:
    note("begin", f"poison/exit/{code}", context)
    os._exit(code)


@handlers.route("/poison/killed")
def killed(request: BatchRequest, context: Context) -> int:
    """Ends as the kernel's OOM killer ends it: with memory in use, by SIGKILL."""
    note("begin", "poison/killed", context)
    memory = bytearray(64 << 20)
    memory[:: resource.getpagesize()] = b"x" * len(memory[:: resource.getpagesize()])
    os.kill(os.getpid(), signal.SIGKILL)
    return len(memory)


@handlers.route("/poison/hog")
def hog(request: BatchRequest, context: Context) -> int:
    """Asks for more memory than its limit leaves it. The limit goes with the request: the process may run others."""
    note("begin", "poison/hog", context)
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (32 << 20), before[1]))
    try:
        return len(bytearray(1 << 30))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@handlers.route("/poison/regex", timeout=1.0)
def regex(request: BatchRequest, context: Context) -> bool:
    """Backtracks for ever, in C that looks for signals now and then."""
    note("begin", "poison/regex", context)
    return re.fullmatch(r"(a+)+b", "a" * 60) is not None


@handlers.route("/poison/loop", timeout=1.0)
def loop(request: BatchRequest, context: Context) -> bytes:
    """One call into C that takes a day and looks for no signals."""
    note("begin", "poison/loop", context)
    return hashlib.pbkdf2_hmac("sha256", b"password", b"salt", (1 << 31) - 1)
