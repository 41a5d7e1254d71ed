"""What a handler may ask and say while it runs.

No I/O here: the worker gives a ``Context`` the callables that do it. One Context belongs to one attempt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rqarm import packing
from rqarm.errors import InvalidRequest, LeaseLost, RqarmError
from rqarm.model import Key
from rqarm.request import BatchRequest, as_request

if TYPE_CHECKING:
    from rqarm.resources import Resources

#: a progress bar needs no more than this, and each report is a write to Redis
SECONDS_BETWEEN_REPORTS = 1.0
#: requests that a handler can require at once: one script looks at all of them
MOST_NEEDED = 1000


class RetryLater(Exception):
    """Raised by a handler to end this attempt and be called again; made by ``Context.retry``.

    ``delay``: seconds until the next attempt, None = what the route's ``retry`` says. ``kwargs``: arguments that the
    next attempt gets instead of those of this one. Raises UnpackableResult where they are given, so that the traceback
    shows who did.
    """

    def __init__(self, delay: float | None = None, kwargs: Mapping[str, Any] | None = None) -> None:
        if delay is not None and not 0 <= delay < math.inf:
            raise ValueError(f"delay must be 0 or more seconds, not {delay!r}")
        packing.pack_arguments(dict(kwargs or {}))
        super().__init__("at once" if delay == 0 else f"after {delay:g} s" if delay else "after the route's interval")
        self.delay = delay
        self.kwargs: Mapping[str, Any] = MappingProxyType(dict(kwargs or {}))


class SetAside(Exception):
    """Raised by a handler to end the request and have it kept until somebody decides; made by ``Context.quarantine``.

    ``info``: what else should be known. It is packed here: UnpackableResult is raised where it is given.
    """

    def __init__(self, message: str = "", info: Mapping[str, Any] | None = None) -> None:
        self.packed_info = packing.pack_arguments(dict(info or {}))
        super().__init__(message)
        self.message = message
        self.info: Mapping[str, Any] = MappingProxyType(dict(info or {}))


class Redirected(Exception):
    """Raised by a handler to end this attempt because another request has, or will have, the answer.

    Made by ``Context.redirect``, raised by ``Context.get_or_redirect``; let it pass. ``again``: run the target whatever
    is cached, because what is cached cannot be read.
    """

    def __init__(self, target: BatchRequest, *, again: bool = False) -> None:
        super().__init__(f"to {target.uri}")
        self.target, self.again = target, again


class Needed(Exception):
    """Raised by ``Context.require`` to end this attempt until other requests have ended; let it pass."""

    def __init__(self, requests: tuple[BatchRequest, ...]) -> None:
        super().__init__(", ".join(request.uri for request in requests))
        self.requests = requests


class Context:
    """One attempt as its handler sees it.

    ``attempt``: 1 = the first. ``kwargs``: the arguments that the attempt before changed by ``retry``.
    ``resources``: what ``Handlers.resource`` built. ``deadline``: when the attempt is stopped, on the clock of
    ``time.monotonic()``; None = never. ``worker``: the name of the worker.
    """

    __slots__ = (
        "_clock",
        "_emit",
        "_is_cancelled",
        "_look_up",
        "_look_up_async",
        "_report",
        "_reported",
        "_require",
        "_require_async",
        "attempt",
        "deadline",
        "is_found",
        "key",
        "kwargs",
        "request",
        "resources",
        "worker",
    )

    def __init__(
        self,
        request: BatchRequest,
        key: Key,
        attempt: int,
        kwargs: Mapping[str, Any],
        resources: Resources,
        report: Callable[[float, str], object],
        is_cancelled: Callable[[], bool],
        deadline: float | None = None,
        worker: str = "",
        *,
        clock: Callable[[], float] = time.monotonic,
        emit: Callable[[Any], object] = lambda _: None,
        look_up: Callable[[BatchRequest], Any] | None = None,
        look_up_async: Callable[[BatchRequest], Awaitable[Any]] | None = None,
        require: Callable[[tuple[BatchRequest, ...]], list[Any]] | None = None,
        require_async: Callable[[tuple[BatchRequest, ...]], Awaitable[list[Any]]] | None = None,
    ) -> None:
        self.request = request
        self.key = key
        self.attempt = attempt
        self.kwargs: Mapping[str, Any] = MappingProxyType(dict(kwargs))
        self.resources = resources
        self.deadline = deadline
        self.worker = worker
        self._report = report
        self._is_cancelled = is_cancelled
        self._clock = clock
        self._look_up = look_up
        self._look_up_async = look_up_async
        self._require = require
        self._require_async = require_async
        self._reported = -math.inf
        self._emit = emit
        #: whether the route's look-up had the value, so that the handler was not called
        self.is_found = False

    @property
    def cancelled(self) -> bool:
        """True when the attempt should stop: somebody cancelled the request, or another attempt holds it."""
        return self._is_cancelled()

    def check(self) -> None:
        """Stop here when the attempt should stop. Call it now and then in long loops, above all in generators.

        Raises LeaseLost; let it pass. What a handler returns after that would be refused.
        """
        if self.cancelled:
            raise LeaseLost(self.key, "cancelled or taken over")

    def progress(self, fraction: float, message: str = "") -> None:
        """Tell those who ask for the status how much is done: 0.0 = nothing, 1.0 = all.

        At most one report a second goes out and the others are dropped, so call it as often as you like; 1.0 always
        goes out. Raises ValueError outside 0..1.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"progress is a fraction from 0 to 1, not {fraction!r}")
        now = self._clock()
        if fraction < 1 and now - self._reported < SECONDS_BETWEEN_REPORTS:
            return
        self._reported = now
        self._report(float(fraction), message)

    def emit(self, value: Any) -> None:
        """An intermediate response: whoever follows the request gets it now, who comes later gets it first.

        A value as a result may be one, but no bytes in pieces, no file and no ``Result``, and 1 MiB packed at the most.
        Each is a round trip. In an ``async def`` handler it goes out beside the handler, in the order in which it was
        emitted; all of it before the end of the attempt. The newest 1,000 (8 MiB) are kept as long as the result.

        Raises UnpackableResult, EmissionTooLarge, and LeaseLost when the attempt should stop. What the server refuses
        is logged and dropped: the computation is worth more.
        """
        self._emit(value)

    def retry(self, delay: float | None = None, **kwargs: Any) -> RetryLater:
        """The exception to raise to be called again: ``raise context.retry(delay=30, page=2)``.

        ``delay`` in seconds, None = what the route's ``retry`` says. ``kwargs`` replace arguments of the same name in
        the next call; all of them are in its ``context.kwargs``. Raises ValueError for a negative delay,
        UnpackableResult for what cannot be stored.
        """
        return RetryLater(delay, kwargs)

    def quarantine(self, message: str = "", /, **info: Any) -> SetAside:
        """The exception to raise to set the request aside: ``raise context.quarantine("gone", status_code=410)``.

        It is not tried again, and a submit does not run it, until somebody requeues or discards it. ``info`` is kept
        with it; ``message`` can be given by name. Raises UnpackableResult for what cannot be stored.
        """
        return SetAside(message or str(info.pop("message", "")), info)

    def redirect(self, target: BatchRequest | str) -> Redirected:
        """The exception to raise when another request has the answer: ``raise context.redirect("/cities/FR")``.

        This request becomes an alias of the target, which is submitted, or joined, as a request of its own. Both answer
        with one result, stored once. Raises InvalidRequest.
        """
        return Redirected(_as_target(target))

    def get_or_redirect(self, target: BatchRequest | str) -> Any:
        """The cached result of the target; without one this attempt ends, as by ``raise context.redirect(target)``.

        Return the value as it is: then this request becomes an alias here too, and nothing is stored twice. In an
        ``async def`` handler it is ``await context.aget_or_redirect(target)``.

        Raises Redirected: let it pass. InvalidRequest.
        """
        request = _as_target(target)
        if self._look_up is None:
            raise RqarmError("only a worker can look up results: this Context was made by hand, without look_up")
        return self._look_up(request)

    async def aget_or_redirect(self, target: BatchRequest | str) -> Any:
        """The same for ``async def`` handlers: others run while the server is asked."""
        request = _as_target(target)
        if self._look_up_async is None:
            raise RqarmError("only a worker can look up results: this Context was made by hand, without look_up_async")
        return await self._look_up_async(request)

    def require(self, *requests: BatchRequest | str) -> list[Any]:
        """The results of other requests, in their order: ``one, two = context.require("/one", "/two")``.

        When some are missing, they are submitted and this attempt ends; when all have ended, the handler is called
        again, from its start. No worker waits meanwhile, and it counts for nothing. So ask for all of them at once,
        before anything else. In an ``async def`` handler it is ``await context.arequire(...)``.

        Raises Needed: let it pass. RequestFailed, Quarantined, RequestCancelled for one that has ended so meanwhile;
        InvalidRequest.
        """
        wanted = _as_needed(requests)
        if self._require is None:
            raise RqarmError("only a worker can require results: this Context was made by hand, without require")
        return self._require(wanted)

    async def arequire(self, *requests: BatchRequest | str) -> list[Any]:
        """The same for ``async def`` handlers: others run while the server is asked."""
        wanted = _as_needed(requests)
        if self._require_async is None:
            raise RqarmError("only a worker can require results: this Context was made by hand, without require_async")
        return await self._require_async(wanted)


def _as_needed(requests: tuple[BatchRequest | str, ...]) -> tuple[BatchRequest, ...]:
    if len(requests) > MOST_NEEDED:
        raise InvalidRequest(f"{len(requests)} are more than {MOST_NEEDED}", where="requests")
    return tuple(map(as_request, requests))


def _as_target(target: BatchRequest | str) -> BatchRequest:
    try:
        return as_request(target)
    except InvalidRequest as error:
        where = f"redirect target {error.where}" if error.where else "redirect target"
        raise InvalidRequest(error.reason, where=where) from error
