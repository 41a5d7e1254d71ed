"""What the tests of packing and codec share: when two values are the same, and a bound on memory."""

from __future__ import annotations

import contextlib
import math
import struct
import tracemalloc
from datetime import datetime, time
from decimal import Decimal


def same(one, other):
    """Equal in value and type all the way down; NaN is NaN and -0.0 is not 0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack(">d", one) == struct.pack(">d", other) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, Decimal):
        return one.as_tuple() == other.as_tuple()
    if isinstance(one, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, set | frozenset):
        return len(one) == len(other) and all(any(same(mine, theirs) for theirs in other) for mine in one)
    if isinstance(one, datetime | time):
        return one == other and one.fold == other.fold and one.utcoffset() == other.utcoffset()
    return one == other


@contextlib.contextmanager
def traced(max_bytes):
    """What runs in the block holds less memory than that at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < max_bytes
    finally:
        tracemalloc.stop()
