"""Every error rqarm raises of its own.

One root. A lost race is an outcome, not an error; ``redis.exceptions.*`` pass through unwrapped. Each leaf says in its
message whose fault it is and what to do now, and carries the facts as attributes.
"""

from __future__ import annotations

from typing import Any


class RqarmError(Exception):
    """The root: ``except RqarmError`` catches everything that rqarm itself raises."""


class InvalidRequest(RqarmError, ValueError):
    """The caller's URI, parameters, key or options are not usable. Nothing was sent."""

    def __init__(self, reason: str, *, where: str = "") -> None:
        super().__init__(f"{where}: {reason}" if where else reason)
        self.reason = reason
        self.where = where


class ConfigError(RqarmError, ValueError):
    """A setting is wrong: the message names the argument or RQARM_* variable."""


class KeyConflict(RqarmError):
    """Two different requests claim one key: a readable key was given twice, or two hashes collided."""

    def __init__(self, key: str, mine: str, theirs: str) -> None:
        super().__init__(
            f"key {key!r} already belongs to {theirs!r}, not to {mine!r}: give this request another key=, or forget "
            "the other one first"
        )
        self.key, self.mine, self.theirs = key, mine, theirs


class BulkError(RqarmError):
    """Some of many requests were not taken; the others were. The first reason is ``__cause__``.

    ``statuses``: one for each request in the order given, None for one that was not taken. ``errors``: why, by position
    (the first is 0). Sending all of them again is safe: what was taken is joined.
    """

    def __init__(self, statuses: list[Any], errors: dict[int, Exception]) -> None:
        first = min(errors)
        count = f"{len(errors)} of {len(statuses)} requests were" if len(errors) != 1 else "1 request was"
        super().__init__(
            f"{count} not taken, the others were; number {first}, the first is 0: {errors[first]}; "
            "statuses and errors say which"
        )
        self.statuses, self.errors = statuses, errors
        self.__cause__ = errors[first]


class RequestUnknown(RqarmError, LookupError):
    """No record of this key: never submitted, expired, forgotten. Submit it."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"no request {key!r} is known: it was never submitted, has expired or was forgotten; submit it"
        )
        self.key = key


class ResultNotReady(RqarmError):
    """The request is still pending or in progress. Wait for it, or ask later."""

    def __init__(self, key: str, state: str) -> None:
        super().__init__(f"request {key!r} is {state}: wait for it with wait() or get(), or ask again later")
        self.key, self.state = key, state


class WaitTimeout(ResultNotReady, TimeoutError):
    """The time the caller gave is over; the request goes on and nobody else is touched."""

    def __init__(self, key: str, state: str, timeout: float) -> None:
        RqarmError.__init__(self, f"request {key!r} is still {state} after {timeout:g} s; it goes on, ask again later")
        self.key, self.state, self.timeout = key, state, timeout


class Refused(ResultNotReady):
    """The queue is at its limit; nothing was accepted. Try again later."""

    def __init__(self, key: str, queue: str) -> None:
        super().__init__(key, f"refused, queue {queue!r} is at its limit (max_pending)")


class RequestFailed(RqarmError):
    """The request ended without a result. ``error`` holds type, message and traceback of the handler's error."""

    def __init__(self, key: str, error: dict[str, Any] | None = None) -> None:
        self.key = key
        self.error = error or {}
        kind = self.error.get("type", "unknown error")
        super().__init__(f"request {key!r} failed with {kind}: {self.error.get('message', '')}".rstrip(": "))


class Quarantined(RequestFailed):
    """The request killed its worker too often (or asked for it) and is set aside until requeued or discarded."""


class RequestCancelled(RqarmError):
    """Somebody cancelled the request. Submit it again if it is still wanted."""

    def __init__(self, key: str) -> None:
        super().__init__(f"request {key!r} was cancelled; submit it again if it is still wanted")
        self.key = key


class RequestLost(RequestUnknown):
    """The record vanished while somebody waited for it (FLUSHDB, failover). Submit it again."""

    def __init__(self, key: str) -> None:
        RqarmError.__init__(self, f"the record of {key!r} vanished (flushed, or lost in a failover): submit it again")
        self.key = key


class LeaseLost(RqarmError):
    """This attempt no longer holds the key: stop the work, its result would be refused."""

    def __init__(self, key: str, state: str) -> None:
        super().__init__(f"the lease of {key!r} is lost, the request is {state}: stop, the result would be refused")
        self.key, self.state = key, state


class NoHandler(RqarmError):
    """No route or operation takes the request. Register a handler or correct the URI."""


class AliasesFull(RqarmError):
    """So many lead to a request, or need it, that no more are taken. When it has ended, use its value."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"request {key!r} has too many aliases and dependents already: when it has ended, use its value"
        )
        self.key = key


class RedirectLoop(RqarmError):
    """Redirects that lead back to where they began, or on and on. ``chain``: the URIs one after the other.

    A handler is wrong: let one of them compute the result. The request fails and is not retried.
    """

    def __init__(self, chain: tuple[str, ...], reason: str) -> None:
        super().__init__(f"{reason}: {' -> '.join(chain)}; let one of them compute the result")
        self.chain = chain


class NeedLoop(RedirectLoop):
    """Requests that need each other's results: none of them could ever go on. ``chain``: the URIs."""


class ResultTooLarge(RqarmError):
    """The result is over ``max_result_bytes``. Nothing was stored."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the result is larger than max_result_bytes ({limit} bytes): raise it or return less")
        self.limit = limit


class EmissionTooLarge(ResultTooLarge):
    """What a handler emits is over the limit for one value. Nothing was stored."""

    def __init__(self, size: int, limit: int) -> None:
        RqarmError.__init__(
            self, f"what is emitted takes {size} bytes packed, the limit for one is {limit}: emit less, or return it"
        )
        self.size, self.limit = size, limit


class UnpackableResult(RqarmError, TypeError):
    """A value cannot be stored; ``path`` says where inside the value, such as ``$['rows'][3]``."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot pack the value at {path}: {reason}")
        self.path, self.reason = path, reason


class CorruptResult(RqarmError):
    """Stored bytes do not match their checksum or format. The entry counts as a miss: submit runs it again."""


class VersionSkew(RqarmError):
    """The server answered a word this version does not know: another version of rqarm runs beside it. Upgrade."""


class ForeignData(RqarmError):
    """Another program wrote under one of our keys. The message names what to look at."""


class ServerUnsuitable(RqarmError):
    """The server's settings would lose requests (allkeys-* eviction, cluster mode, a replica, too old)."""
