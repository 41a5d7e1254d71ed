"""Handlers for tests of redirects (RQARM_HANDLERS): chains that meet, and a death between the two steps of one."""

from __future__ import annotations

import os
import signal
from typing import Any

from app import note, notes, wait_for

from rqarm import BatchRequest, Context, Handlers, calls
from rqarm.model import Key
from rqarm.replies import Attempt

handlers = Handlers()
#: A -> B -> C -> D and F -> E -> B
NEXT = {"A": "B", "B": "C", "C": "D", "F": "E", "E": "B"}


def computed(tag: str, name: str) -> str:
    with (notes / f"computed-{tag}").open("a") as log:
        log.write(f"{name}\n")
    return f"{tag}: {name}"


@handlers.route("/chain/{tag}/{name}", thread_safe=True)
def chain(request: BatchRequest, context: Context, tag: str, name: str) -> Any:
    note(f"horse-{os.getpid()}", context.worker)
    if name in NEXT:
        return context.get_or_redirect(f"/chain/{tag}/{NEXT[name]}")
    note(f"running-{tag}", os.getpid())
    wait_for(f"go-{tag}")
    return computed(tag, name)


@handlers.route("/async-chain/{tag}/{name}")
async def async_chain(request: BatchRequest, context: Context, tag: str, name: str) -> Any:
    note(f"horse-{os.getpid()}", context.worker)
    if name in NEXT:
        return await context.aget_or_redirect(f"/async-chain/{tag}/{NEXT[name]}")
    return computed(tag, name)


@handlers.route("/blocking/{name}")
async def blocking(request: BatchRequest, context: Context, name: str) -> Any:
    return context.get_or_redirect(f"/chain/{name}/D")


@handlers.route("/cut/{name}")
def cut(request: BatchRequest, context: Context, name: str) -> Any:
    note(f"horse-{os.getpid()}", context.worker)
    raise context.redirect(f"/chain/cut-{name}/D")


def die_between_the_steps() -> None:
    """The first attempt at ``/cut`` dies when its target is submitted and it does not lead there yet."""
    redirect = calls.Calls.redirect

    def fatal(self: calls.Calls, attempt: Attempt, target: Key, **options: Any) -> Any:
        if attempt.request.uri.startswith("/cut/") and attempt.number == 1 and options.get("is_submitted"):
            note(f"cut-{target}", os.getpid())
            os.kill(os.getpid(), signal.SIGKILL)
        return redirect(self, attempt, target, **options)

    calls.Calls.redirect = fatal  # type: ignore[method-assign]


die_between_the_steps()
