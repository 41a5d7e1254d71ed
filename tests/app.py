"""Handlers for worker processes in tests (RQARM_HANDLERS). Each fault that a test needs has a route.

Handlers leave notes in the directory NOTES, so that a test knows what runs where without asking Redis.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rq.worker

from rqarm import BatchRequest, Context, Handlers, Result, Retry

handlers = Handlers()
notes = Path(os.environ.get("NOTES", "/nonexistent"))
#: seconds after which a handler stops waiting for its test
LONGEST = 60.0


def note(name: str, text: object) -> None:
    """Leave a note; it is there in whole or not at all."""
    draft = notes / f".{name}.{os.getpid()}.{threading.get_ident()}"
    draft.write_text(str(text))
    draft.rename(notes / name)


def wait_for(name: str) -> None:
    deadline = time.monotonic() + LONGEST
    while not (notes / name).exists() and time.monotonic() < deadline:
        time.sleep(0.01)


@handlers.route("/add/{a:int}/{b:int}")
def add(request: BatchRequest, context: Context, a: int, b: int) -> int:
    return a + b


@handlers.route("/async/{n:int}")
async def later(request: BatchRequest, context: Context, n: int) -> dict[str, int]:
    await asyncio.sleep(0.01)
    return {"n": n}


@handlers.route("/stream/{count:int}/{size:int}")
def stream(request: BatchRequest, context: Context, count: int, size: int) -> Iterator[bytes]:
    for n in range(count):
        yield os.urandom(1) * size if n else b"first" * (size // 5)


@handlers.route("/pid/{n}")
def pid(request: BatchRequest, context: Context, n: str) -> int:
    return os.getpid()


@handlers.route("/file")
def file(request: BatchRequest, context: Context) -> Result:
    return Result(b"a,b\n1,2\n", content_type="text/csv", filename="report.csv")


@handlers.route("/fail/{n}", retry=Retry(max=1))
def fail(request: BatchRequest, context: Context, n: str) -> None:
    raise ValueError(f"no {n}")


@handlers.route("/later/{n}", retry=Retry(max=1, interval=1.0))
def once_more(request: BatchRequest, context: Context, n: str) -> int:
    if context.attempt == 1:
        raise ConnectionError("not yet")
    return context.attempt


@handlers.route("/wait/{name}")
def wait(request: BatchRequest, context: Context, name: str) -> str:
    """Runs until the test lets it go; what it returns says which attempt it was."""
    note(f"horse-{os.getpid()}", context.worker)
    note(f"running-{name}", os.getpid())
    note(f"running-{name}-{context.attempt}", os.getpid())
    wait_for(f"go-{name}")
    return f"{name} {context.attempt}"


@handlers.route("/nap/{n:int}")
def nap(request: BatchRequest, context: Context, n: int) -> int:
    """Runs for longer than a renewal of a lease of 2 s."""
    time.sleep(0.8)
    return n


@handlers.route("/turn/{name}")
def turn(request: BatchRequest, context: Context, name: str) -> int:
    """As ``wait``, but each attempt is let go on its own."""
    note(f"horse-{os.getpid()}", context.worker)
    note(f"running-{name}-{context.attempt}", os.getpid())
    wait_for(f"go-{name}-{context.attempt}")
    return context.attempt


@handlers.route("/limited/{name}", max_running=2)
def limited(request: BatchRequest, context: Context, name: str) -> int:
    """As ``wait``, with at most two at the same time; the log says when each began and ended."""
    with (notes / "limited").open("a") as log:
        log.write(f"+{name}\n")
    note(f"horse-{os.getpid()}", context.worker)
    note(f"running-{name}", os.getpid())
    wait_for(f"go-{name}")
    with (notes / "limited").open("a") as log:
        log.write(f"-{name}\n")
    return context.attempt


@handlers.route("/kill/{name}")
def kill(request: BatchRequest, context: Context, name: str) -> None:
    with (notes / f"kills-{name}").open("a") as log:
        log.write("x")
    os.kill(os.getpid(), signal.SIGKILL)


@handlers.route("/exit/{code:int}")
def leave(request: BatchRequest, context: Context, code: int) -> None:
    os._exit(code)


@handlers.route("/sys_exit/{code:int}")
def sys_exit(request: BatchRequest, context: Context, code: int) -> None:
    sys.exit(code)


@handlers.route("/deaf/{name}", timeout=1.0)
def deaf(request: BatchRequest, context: Context, name: str) -> None:
    """Hangs in C with every signal blocked: no alarm wakes it."""
    note(f"horse-{os.getpid()}", context.worker)
    note(f"running-{name}", os.getpid())
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    ctypes.CDLL(None).sleep(int(LONGEST))


@handlers.route("/slow/{name}", timeout=0.2)
def slow(request: BatchRequest, context: Context, name: str) -> None:
    time.sleep(LONGEST)


@handlers.route("/family/{name}")
def family(request: BatchRequest, context: Context, name: str) -> int:
    """Leaves a child behind."""
    return subprocess.Popen(["sleep", str(LONGEST)]).pid


@handlers.route("/memory/{mib:int}")
def memory(request: BatchRequest, context: Context, mib: int) -> int:
    """Asks for more memory than it may have."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (32 << 20), resource.RLIM_INFINITY))
    return len(bytearray(mib << 20))


@handlers.route("/epilogue/{seconds:float}")
def epilogue(request: BatchRequest, context: Context, seconds: float) -> None:
    """Fails at once, but RQ needs a while for what it does after that."""
    original = rq.worker.BaseWorker.handle_job_failure

    def handle_job_failure(*arguments: Any, **named: Any) -> None:
        rq.worker.BaseWorker.handle_job_failure = original
        time.sleep(seconds)
        original(*arguments, **named)

    rq.worker.BaseWorker.handle_job_failure = handle_job_failure
    raise ValueError("an epilogue")


@handlers.route("/mostly/{name}")
def mostly(request: BatchRequest, context: Context, name: str) -> str:
    """Quick, but for names that begin with slow."""
    if name.startswith("slow"):
        note(f"running-{name}", os.getpid())
        wait_for(f"go-{name}")
    return name


@handlers.route("/soak/{n:int}")
def soak(request: BatchRequest, context: Context, n: int) -> int:
    note(f"horse-{os.getpid()}", context.worker)
    time.sleep(0.1)
    return n * n


def plain(n: int) -> int:
    """An ordinary RQ job."""
    return n + 1


def plain_pid() -> int:
    return os.getpid()


def plain_kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
