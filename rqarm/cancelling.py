"""A coroutine that is cancelled ends, whatever library it waits in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cancellable() -> Iterator[None]:
    """A cancellation that the block has swallowed is raised at its end.

    redis-py sends with ``asyncio.wait_for``. Until Python 3.11 that gives back what is done and forgets that it was
    cancelled meanwhile, and a waiter that somebody has cancelled goes on waiting.

    Source: https://github.com/python/cpython/issues/86296, mended in Python 3.12.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    yield
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError
