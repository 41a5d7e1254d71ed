"""Ties between processes: a child does not outlive the parent that watches over it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent: int | None) -> None:
    """This process is killed by the kernel when its parent dies, or now if that has happened.

    Linux only; elsewhere it lives on, and the leases fence it. The kernel means the thread that made this process:
    fork and spawn in the main thread. A process forked from this one is not tied.

    Source: prctl(2), PR_SET_PDEATHSIG.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def leash_forks() -> None:
    """What this process forks from now on dies with it: horses at once, and RQ's scheduler, which would go on alone.

    What a horse forks is a handler's own business.
    """
    if not _leashing:
        os.register_at_fork(after_in_child=_leash)
    _leashing.add(os.getpid())


#: processes whose forks die with them
_leashing: set[int] = set()


def _leash() -> None:
    parent = os.getppid()
    if parent in _leashing:
        die_with(parent)


def kill_group(group: int, sig: signal.Signals) -> None:
    """Send a signal to all of a process group that is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, sig)
