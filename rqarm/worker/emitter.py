"""What a handler emits, on its way to the server: in order, and never in the way of an event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from redis.exceptions import RedisError

from rqarm.calls import EMISSIONS_KEPT, EMITTED_BYTES, Call
from rqarm.errors import LeaseLost, RqarmError
from rqarm.flows import Core
from rqarm.following import pack_emission
from rqarm.replies import Attempt

log = logging.getLogger("rqarm.worker")


class Emitter:
    """The emissions of one attempt.

    Where no event loop runs, ``emit`` returns when the server has it. On a loop it is queued and sent beside the
    handler, one after the other. The queue keeps what the server would: the newest.
    """

    def __init__(
        self,
        core: Core,
        attempt: Attempt,
        lose: Callable[[], object],
        ask: Callable[[Any], Any],
        ask_beside: Callable[[Any], Awaitable[Any]] | None = None,
    ) -> None:
        """``ask`` blocks; ``ask_beside`` is awaited on the loop, None = ``ask`` in a thread."""
        self._core, self._attempt, self._lose, self._ask = core, attempt, lose, ask
        self._ask_beside = ask_beside or (lambda call: asyncio.to_thread(ask, call))
        self._lock = threading.Lock()
        self._number = 0
        self._queue: deque[tuple[Call[str], int]] = deque()
        self._queued_bytes = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sending: asyncio.Task[None] | None = None

    def emit(self, value: Any) -> None:
        """Raises UnpackableResult, EmissionTooLarge; LeaseLost where no event loop runs."""
        packed = pack_emission(value)
        try:
            loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        with self._lock:
            self._number += 1
            call = self._core.calls.emit(self._attempt, self._number, packed)
            if loop is None and not self.is_busy:
                self._send(call)
                return
            # a thread beside the loop must not overtake what is queued
            self._loop = loop or self._loop
            assert self._loop is not None
            self._queue.append((call, len(packed)))
            self._queued_bytes += len(packed)
            while len(self._queue) > EMISSIONS_KEPT or self._queued_bytes > EMITTED_BYTES:
                self._queued_bytes -= self._queue.popleft()[1]
            self._loop.call_soon_threadsafe(self._begin)

    @property
    def is_busy(self) -> bool:
        """Whether something is queued or on its way."""
        return self._sending is not None or bool(self._queue)

    def _send(self, call: Call[str]) -> None:
        try:
            self._ask(call)
        except LeaseLost:
            self._lose()
            raise
        except (RedisError, RqarmError) as error:
            self._grumble(error)

    def _grumble(self, error: Exception) -> None:
        log.warning("%s: what it emitted was refused and is dropped: %s", self._attempt.key, error)

    def _begin(self) -> None:
        if self._sending is None and self._queue:
            self._sending = asyncio.ensure_future(self._send_all())

    async def _send_all(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._sending = None
                    return
                call, size = self._queue.popleft()
                self._queued_bytes -= size
            try:
                await self._ask_beside(call)
            except LeaseLost:
                self._lose()
            except (RedisError, RqarmError) as error:
                self._grumble(error)

    async def flush(self) -> None:
        """Return when nothing is queued any more. Await it on the loop of the handler."""
        self._begin()
        while self._sending is not None:
            await asyncio.wait([self._sending])
