"""rqarm: a Redis-native work queue with a result cache. Slow requests run once, everybody gets the answer.

Importing it does nothing: no connection, no thread, no file. Start with ``RequestManager`` and ``Handlers``.
"""

from typing import TYPE_CHECKING, Any

from rqarm.aio import AsyncRequestManager
from rqarm.bulk import Hit
from rqarm.context import Context
from rqarm.errors import (
    BulkError,
    ConfigError,
    CorruptResult,
    EmissionTooLarge,
    ForeignData,
    InvalidRequest,
    KeyConflict,
    LeaseLost,
    NoHandler,
    Quarantined,
    RequestCancelled,
    RequestFailed,
    RequestLost,
    RequestUnknown,
    ResultNotReady,
    ResultTooLarge,
    RqarmError,
    ServerUnsuitable,
    UnpackableResult,
    VersionSkew,
    WaitTimeout,
)
from rqarm.following import FollowEvent, FollowKind
from rqarm.handlers import MISS, Handlers
from rqarm.inline import BulkResult
from rqarm.manager import RequestManager
from rqarm.model import BatchStatus, Outcome, Priority, Reason, State
from rqarm.request import BatchRequest
from rqarm.result import Result
from rqarm.routes import Retry
from rqarm.version import __version__ as __version__

if TYPE_CHECKING:
    from rqarm.worker import Worker

__all__ = [
    "MISS",
    "AsyncRequestManager",
    "BatchRequest",
    "BatchStatus",
    "BulkError",
    "BulkResult",
    "ConfigError",
    "Context",
    "CorruptResult",
    "EmissionTooLarge",
    "FollowEvent",
    "FollowKind",
    "ForeignData",
    "Handlers",
    "Hit",
    "InvalidRequest",
    "KeyConflict",
    "LeaseLost",
    "NoHandler",
    "Outcome",
    "Priority",
    "Quarantined",
    "Reason",
    "RequestCancelled",
    "RequestFailed",
    "RequestLost",
    "RequestManager",
    "RequestUnknown",
    "Result",
    "ResultNotReady",
    "ResultTooLarge",
    "Retry",
    "RqarmError",
    "ServerUnsuitable",
    "State",
    "UnpackableResult",
    "VersionSkew",
    "WaitTimeout",
    "Worker",
]


def __getattr__(name: str) -> Any:
    """``rqarm.Worker`` for ``rq worker -w rqarm.Worker``; loaded when asked for, clients do not need it."""
    if name == "Worker":
        from rqarm.worker import Worker

        return Worker
    raise AttributeError(f"module 'rqarm' has no attribute {name!r}")
