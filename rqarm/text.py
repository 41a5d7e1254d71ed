"""Text of others made harmless: for a terminal, for a log. And how people and JSON read values.

What comes from Redis, a URI or a handler's error may hold control characters. Whoever shows it passes it through
``plain`` first.
"""

from __future__ import annotations

import base64
import datetime
import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

#: what is worth a look: everything but printable ASCII
SUSPECT = re.compile(r"[^\x20-\x7e]")


def plain(text: str, keep: str = "") -> str:
    """The text with what would move a cursor, turn or hide text, or end a line written out, except ``keep``."""
    if text.isascii() and text.isprintable():
        return text
    return SUSPECT.sub(lambda match: match[0] if match[0] in keep else _written_out(match[0]), text)


def is_unsafe(char: str) -> bool:
    # joiners are format characters too, but scripts and emoji need them
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in "\u200c\u200d"


def _written_out(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii") if is_unsafe(char) else char


# -- for people


def duration(seconds: float) -> str:
    """About how long: ``0.4 s``, ``12 s``, ``3 min``, ``2.5 h``, ``4 d``."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    for limit, unit, size in ((99.5, "s", 1.0), (5_970, "min", 60.0), (172_800, "h", 3_600.0)):
        if seconds < limit:
            amount = seconds / size
            return f"{amount:.0f} {unit}" if amount >= 10 or unit == "s" else f"{amount:.1f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def brief(seconds: float) -> str:
    """As ``duration``, and below a second in milliseconds: ``4 ms``."""
    if 0 < seconds < 0.0005:
        return "< 1 ms"
    return f"{seconds * 1000:.0f} ms" if 0 < seconds < 0.9995 else duration(seconds)


def size(count: int) -> str:
    """Bytes for people: ``812 B``, ``1.5 MiB``."""
    units, amount = ["B", "KiB", "MiB", "GiB", "TiB"], float(count)
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        del units[0]
    return f"{amount:.1f} {units[0]}" if amount != count else f"{count} B"


def name_of(thing: Any) -> str:
    """The full name of a function or class: its module and name; of a built-in one the name alone."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    return f"{module}.{name}".removeprefix("builtins.") if module and name else repr(thing)


# -- for JSON


def jsonable(value: Any) -> Any:
    """The value in JSON's types.

    Dates and times in ISO 8601, timedelta in seconds, Decimal, UUID and complex as text, bytes as {"base64": ...}, sets
    as lists, NaN and infinities as text, integers beyond Python's limit for decimal digits as hexadecimal text. A dict
    whose keys are not all text gets their text; if two are then the same, it is a list of pairs.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if value.bit_length() < 4_000 else hex(value)
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return _jsonable_mapping(value)
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((jsonable(item) for item in value), key=repr)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    return str(value)


def _jsonable_mapping(value: Mapping[Any, Any]) -> Any:
    named = {_json_name(name): jsonable(item) for name, item in value.items()}
    if len(named) == len(value):
        return named
    return [[jsonable(name), jsonable(item)] for name, item in value.items()]


def _json_name(name: Any) -> str:
    if isinstance(name, str):
        return name
    simple = jsonable(name)
    return simple if isinstance(simple, str) else json.dumps(simple)
