"""In a process that finds this on its path, the clock on the wall is WRONG_BY seconds off; durations are right.

libfaketime would do the same, but time.sleep of Python 3.11 fails with it.
"""

import datetime
import os
import time

_off = float(os.environ["WRONG_BY"])
_right, _time = datetime.datetime, time.time


class _Meta(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _right)


class _Wrong(_right, metaclass=_Meta):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return _right.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls) -> datetime.datetime:
        return _right.fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None)


time.time = lambda: _time() + _off
datetime.datetime = _Wrong  # type: ignore[misc]
