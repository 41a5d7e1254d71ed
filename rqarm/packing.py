"""Values to msgpack bytes and back; errors too.

What msgpack cannot say is written with one extension type, ``EXT_CODE``; the first byte of its payload names the type:

    t s f   alone as the first element of an array: the array is a tuple, set, frozenset
    i       int beyond 64 bits, big-endian two's complement
    D d h   datetime, date, time in ISO 8601; a trailing "f" is fold=1
    p       timedelta: days, seconds, microseconds, each a 32-bit big-endian int
    n       Decimal as text
    u       UUID, 16 bytes
    c       complex, two 64-bit floats

Values come back as they were, except: bytearray and memoryview become bytes, a time zone becomes its offset at that
moment. NaN, infinities and -0.0 keep. Subclasses (enum members, named tuples, numpy scalars) are refused, because
they would come back as something else. ``msgpack.ExtType`` with another code and ``msgpack.Timestamp`` pass through.
"""

from __future__ import annotations

import os
import struct
import traceback
import uuid
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple

import msgpack

from rqarm.errors import CorruptResult, UnpackableResult
from rqarm.result import Result
from rqarm.text import name_of

#: msgpack extension code of everything listed in the module docstring
EXT_CODE = 82
#: containers inside each other, not counting an empty list or dict; msgpack's own packer stops at 511
MAX_DEPTH = 64
#: items of one container, and containers of one value; 10 million empty lists take 0.8 GB, dicts of one item 2.3 GB
MAX_ITEMS = 10_000_000
#: default of every ``max_bytes`` here, equal to the default of Settings.max_result_bytes
MAX_BYTES = 1 << 30
#: payloads, arguments of retries and notes of quarantine: they lie in memory with every record
MAX_ARGUMENTS_BYTES = 1 << 20
#: bytes kept of an error's message (the head) and traceback (the tail)
MAX_MESSAGE_BYTES = 4_096
MAX_TRACEBACK_BYTES = 16_384
#: where files of ours lie
_HERE = os.path.dirname(__file__) + os.sep

_TAGS: dict[type, Any] = {
    tuple: msgpack.ExtType(EXT_CODE, b"t"),
    set: msgpack.ExtType(EXT_CODE, b"s"),
    frozenset: msgpack.ExtType(EXT_CODE, b"f"),
}
_TAGGED: dict[bytes, type] = {tag.data: kind for kind, tag in _TAGS.items()}
#: how every tag starts: fixext1, our code
_TAG_START = bytes([0xD4, EXT_CODE])
_TIMEDELTA = struct.Struct(">iii")
_COMPLEX = struct.Struct(">dd")


def pack(value: Any) -> bytes:
    """A value as msgpack bytes that ``unpack`` turns back into an equal value of the same types.

    Raises UnpackableResult that says where inside the value and why: change the handler, a retry fails again.

    Rule 14 (faults.md) wants the bytes unpacked before they are stored. Three cheaper checks prove the same. A reader
    refuses depth: ``_scan`` measures it in C (36 us for 60 KB, unpacking takes 520). It refuses more than MAX_ITEMS:
    impossible below MAX_ITEMS bytes, above the bytes are unpacked. It refuses unhashable keys and members: what was a
    key here comes back as its own type, which hashes. The bytes are otherwise msgpack-python's own.
    """
    try:
        packed: bytes = msgpack.Packer(default=_plain, strict_types=True).pack(value)
        if len(packed) > MAX_ITEMS:
            unpack(packed, max_bytes=len(packed))
        elif len(packed) > MAX_DEPTH:
            _scan(packed)
    except MemoryError:
        raise
    except Exception as error:
        # a tzinfo is user code and may raise anything
        raise _blame(value, error) from error
    return packed


def pack_arguments(value: Any) -> bytes:
    """As ``pack``, for what is kept in a record beside the result: payloads, arguments of a retry, notes.

    Raises UnpackableResult, also above MAX_ARGUMENTS_BYTES: store large data elsewhere and pass its name.
    """
    packed = pack(value)
    if len(packed) > MAX_ARGUMENTS_BYTES:
        largest = max(value, key=lambda name: len(pack(value[name]))) if isinstance(value, dict) and value else None
        raise UnpackableResult(
            "$" if largest is None else f"$[{largest!r}]",
            f"{len(packed)} bytes in all are more than {MAX_ARGUMENTS_BYTES}, store it elsewhere and pass its name",
        )
    return packed


def unpack(packed: bytes, *, max_bytes: int = MAX_BYTES) -> Any:
    """The value that ``pack`` was given.

    Raises CorruptResult for any bytes that ``pack`` does not write: depth over MAX_DEPTH, more than MAX_ITEMS items or
    containers, more than ``max_bytes`` bytes, wrong extension payloads. Only MemoryError passes, because it says
    nothing about the bytes.

    Memory: msgpack 1.1 allocates what an array header claims (472 MB for 1 MB, measured; 1.2.4 holds back, 13 MB). The
    scan proves first that the claimed elements are there. What is left, from sys.getsizeof: at most 50 times
    ``len(packed)``, and 2.5 GB for the containers of a value that has MAX_ITEMS of them.
    """
    if len(packed) > max_bytes:
        raise CorruptResult(f"the packed value has {len(packed)} bytes, more than {max_bytes}")
    try:
        if len(packed) > MAX_DEPTH:
            # one byte per container at least: shorter is never deeper
            _scan(packed)
        if len(packed) > MAX_ITEMS:
            return _Reader().unpack(packed, max_array_len=MAX_ITEMS + 1, max_map_len=MAX_ITEMS)
        if _TAG_START in packed:
            return _Reader().unpack(packed)
        return msgpack.unpackb(packed, strict_map_key=False, ext_hook=_restore)
    except (MemoryError, CorruptResult):
        raise
    except Exception as error:
        raise CorruptResult(f"not a packed value: {type(error).__name__}: {error}"[:300]) from error


def _plain(obj: Any) -> Any:
    """What msgpack can say for an object it cannot: its hook for unknown types and ints beyond 64 bits."""
    kind = type(obj)
    if kind is tuple or kind is set or kind is frozenset:
        return [_TAGS[kind], *obj]
    writer = _WRITERS.get(kind)
    if writer is None:
        raise TypeError(_refusal(obj))
    return msgpack.ExtType(EXT_CODE, writer(obj))


def _restore(code: int, payload: bytes) -> Any:
    if code != EXT_CODE:
        return msgpack.ExtType(code, payload)
    return _READERS[payload[:1]](payload[1:])


class _Reader:
    """Unpacks a value with tuples and sets in it, or one so large that its containers must be counted."""

    __slots__ = ("containers", "open_tags")

    def __init__(self) -> None:
        self.open_tags = 0
        self.containers = 0

    def unpack(self, packed: bytes, **limits: int) -> Any:
        if limits:
            limits["object_hook"] = self.on_map  # type: ignore[assignment]
        value = msgpack.unpackb(packed, strict_map_key=False, ext_hook=self.on_ext, list_hook=self.on_array, **limits)
        if self.open_tags:
            raise CorruptResult("not a packed value: the mark of a tuple or set stands in the wrong place")
        return value

    def on_ext(self, code: int, payload: bytes) -> Any:
        if code == EXT_CODE and (kind := _TAGGED.get(payload)):
            self.open_tags += 1
            return kind
        return _restore(code, payload)

    def on_array(self, items: list[Any]) -> Any:
        # a class can only come from on_ext
        kind = items[0] if items and type(items[0]) is type else None
        if kind is not None:
            self.open_tags -= 1
            del items[0]
        self.count(items)
        return items if kind is None else kind(items)

    def on_map(self, items: dict[Any, Any]) -> dict[Any, Any]:
        self.count(items)
        return items

    def count(self, items: Any) -> None:
        self.containers += 1
        if self.containers > MAX_ITEMS or len(items) > MAX_ITEMS:
            raise CorruptResult(f"not a packed value: more than {MAX_ITEMS:,} items or containers")


def _scan(packed: bytes) -> None:
    """Walk the bytes in C without building anything; raise if they are cut, malformed or deeper than MAX_DEPTH.

    msgpack's parser has a fixed stack. Arrays of one element in front use up all of it but MAX_DEPTH levels.
    """
    lead = _lead()
    scanner = msgpack.Unpacker(None, max_buffer_size=len(lead) + len(packed))
    scanner.feed(lead)
    scanner.feed(packed)
    scanner.skip()


@lru_cache(maxsize=1)
def _lead() -> bytes:
    """As many one-element array headers as leave MAX_DEPTH levels of msgpack's stack (1,024 in 1.1 and 1.2).

    Measured, not assumed. The pure Python msgpack has no stack of its own: there MAX_DEPTH does not hold, and the depth
    ends at the interpreter's recursion limit, also with a clean refusal.
    """
    if msgpack.Unpacker.__module__ == "msgpack.fallback":
        return b""
    fits, fails = MAX_DEPTH, 1 << 16
    while fails - fits > 1:
        levels = (fits + fails) // 2
        scanner = msgpack.Unpacker(None)
        scanner.feed(b"\x91" * levels + b"\xc0")
        try:
            scanner.skip()
            fits = levels
        except ValueError:
            fails = levels
    return b"\x91" * (fits - MAX_DEPTH)


def _int_payload(value: int) -> bytes:
    return b"i" + value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)


def _iso_payload(letter: bytes, value: datetime | time) -> bytes:
    if value.tzinfo is not None and value.utcoffset() is None:
        raise TypeError(f"a {type(value).__name__} whose time zone gives no offset; use a fixed offset or none")
    return letter + value.isoformat().encode("ascii") + b"f" * value.fold


def _datetime(payload: bytes) -> datetime:
    if payload.endswith(b"f"):
        return datetime.fromisoformat(payload[:-1].decode("ascii")).replace(fold=1)
    return datetime.fromisoformat(payload.decode("ascii"))


def _time(payload: bytes) -> time:
    if payload.endswith(b"f"):
        return time.fromisoformat(payload[:-1].decode("ascii")).replace(fold=1)
    return time.fromisoformat(payload.decode("ascii"))


def _decimal(payload: bytes) -> Decimal:
    text = payload.decode("ascii")
    value = Decimal(text)
    if str(value) != text:
        # a context without the InvalidOperation trap reads any text as NaN
        raise ValueError("not a decimal number")
    return value


_WRITERS: dict[type, Callable[[Any], bytes]] = {
    int: _int_payload,
    datetime: lambda value: _iso_payload(b"D", value),
    date: lambda value: b"d" + value.isoformat().encode("ascii"),
    time: lambda value: _iso_payload(b"h", value),
    timedelta: lambda value: b"p" + _TIMEDELTA.pack(value.days, value.seconds, value.microseconds),
    Decimal: lambda value: b"n" + str(value).encode("ascii"),
    uuid.UUID: lambda value: b"u" + value.bytes,
    complex: lambda value: b"c" + _COMPLEX.pack(value.real, value.imag),
}
_READERS: dict[bytes, Callable[[bytes], Any]] = {
    b"i": lambda payload: int.from_bytes(payload, "big", signed=True),
    b"D": _datetime,
    b"d": lambda payload: date.fromisoformat(payload.decode("ascii")),
    b"h": _time,
    b"p": lambda payload: timedelta(*_TIMEDELTA.unpack(payload)),
    b"n": _decimal,
    b"u": lambda payload: uuid.UUID(bytes=payload),
    b"c": lambda payload: complex(*_COMPLEX.unpack(payload)),
}
_CONTAINERS = (dict, list, tuple, set, frozenset)
_PLAIN_TYPES = frozenset(
    (type(None), bool, int, float, str, bytes, bytearray, memoryview, msgpack.ExtType, msgpack.Timestamp, *_WRITERS)
)


# --- where a value cannot be packed -----------------------------------------------------------------------------------


class _Place(NamedTuple):
    """An object inside a value and the way to it; ``step`` is the last part of its path."""

    obj: Any
    depth: int
    step: str
    parent: _Place | None

    @property
    def path(self) -> str:
        steps: list[str] = []
        place: _Place | None = self
        while place is not None:
            steps.append(place.step)
            place = place.parent
        return "".join(reversed(steps))


def _blame(value: Any, error: Exception) -> UnpackableResult:
    """The first place in the value that cannot be packed. Slow: runs only after ``pack`` failed."""
    checked: dict[int, int] = {}  # id -> the greatest depth at which everything below was found good
    above: set[int] = set()
    todo: list[tuple[_Place, bool]] = [(_Place(value, 0, "$", None), False)]
    while todo:
        place, is_done = todo.pop()
        if is_done:
            above.discard(id(place.obj))
            checked[id(place.obj)] = place.depth
            continue
        if id(place.obj) in above:
            return UnpackableResult(place.path, "it contains itself")
        if checked.get(id(place.obj), -1) >= place.depth:
            continue
        if reason := _reason(place):
            return UnpackableResult(place.path, reason)
        if type(place.obj) in _CONTAINERS:
            above.add(id(place.obj))
            todo.append((place, True))
            todo.extend((inner, False) for inner in reversed(_inside(place)))
    return UnpackableResult("$", str(error).encode("ascii", "backslashreplace").decode()[:300])


def _inside(place: _Place) -> list[_Place]:
    depth, obj = place.depth + 1, place.obj
    if isinstance(obj, dict):
        places = []
        for key, item in obj.items():
            places.append(_Place(key, depth, f".key({_short(key)})", place))
            places.append(_Place(item, depth, f"[{_short(key)}]", place))
        return places
    if isinstance(obj, list | tuple):
        return [_Place(item, depth, f"[{n}]", place) for n, item in enumerate(obj)]
    return [_Place(item, depth, f".member({_short(item)})", place) for item in obj]


def _reason(place: _Place) -> str:
    """Why this object alone cannot be packed; empty if it can."""
    obj, kind = place.obj, type(place.obj)
    if kind in _CONTAINERS:
        if place.depth >= MAX_DEPTH and (obj or kind in _TAGS):
            return f"more than {MAX_DEPTH} containers inside each other"
        return f"more than {MAX_ITEMS:,} items: return a stream of bytes" if len(obj) > MAX_ITEMS else ""
    if kind not in _PLAIN_TYPES:
        return _refusal(obj)
    try:
        msgpack.Packer(default=_plain, strict_types=True).pack(obj)
    except UnicodeEncodeError as error:
        return f"a str with a lone surrogate (\\u{ord(obj[error.start]):04x}) at character {error.start}"
    except Exception as error:  # noqa: BLE001  a tzinfo is user code; its error becomes the reason
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def _refusal(obj: Any) -> str:
    kind = type(obj)
    name = name_of(kind)
    if isinstance(obj, Enum):
        return f"{name} is an enum: give its value"
    if kind.__module__.partition(".")[0] == "numpy":
        return f"{name} is not a plain Python value: use .item() or .tolist()"
    if isinstance(obj, Result):
        return "a Result cannot stand inside another value: return it alone"
    if isinstance(obj, Iterator):
        return f"{name} is an iterator: make it a list, or return an iterator of bytes alone"
    for plain in (*_CONTAINERS, bool, int, float, str, bytes, datetime, date):
        if isinstance(obj, plain):
            return f"{name} is a kind of {plain.__name__} and would come back as another type: convert it"
    return f"{name} is not a plain value (None, bool, numbers, str, bytes, containers, dates, Decimal, UUID)"


def _short(key: Any) -> str:
    """A key as text for a path: ASCII, at most 60 characters; only plain scalars are asked for their repr."""
    if type(key) in (str, bytes):
        text = ascii(key[:61])
    elif type(key) is int:
        text = str(key) if key.bit_length() < 200 else "<int>"
    elif type(key) in (bool, float, type(None)):
        text = repr(key)
    else:
        text = f"<{type(key).__name__}>"
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- errors -----------------------------------------------------------------------------------------------------------


def pack_error(
    error: BaseException | type[BaseException] | str, message: str | None = None, traceback_text: str | None = None
) -> bytes:
    """An error as the bytes of a record's ``error`` field, at most about 21 KB.

    ``error``: the exception, its type, or a name. Message and traceback are taken from the exception when not given;
    the traceback begins where it leaves rqarm. The message keeps its first 4 KiB, the traceback its last 16 KiB: the
    innermost frames say most.
    """
    if isinstance(error, str):
        name = error
    else:
        kind = error if isinstance(error, type) else type(error)
        name = name_of(kind)
    if isinstance(error, BaseException):
        message = _told(lambda: str(error)) if message is None else message
        if traceback_text is None:
            traceback_text = _told(lambda: _traceback_of(error))
    packed: bytes = msgpack.packb(
        {
            "type": _bounded(name, 255),
            "message": _bounded(message or "", MAX_MESSAGE_BYTES),
            "traceback": _bounded(traceback_text or "", -MAX_TRACEBACK_BYTES),
        }
    )
    return packed


def _traceback_of(error: BaseException) -> str:
    """The traceback from where it leaves rqarm: the way to the handler is the same for all."""
    told = traceback.TracebackException.from_exception(error)
    del told.stack[: next((n for n, frame in enumerate(told.stack) if not frame.filename.startswith(_HERE)), 0)]
    return "".join(told.format())


def unpack_error(packed: bytes) -> dict[str, Any]:
    """``type``, ``message`` and ``traceback`` of ``pack_error``, each a str.

    Raises nothing: bytes that are no error give the type ``unreadable``, because a broken note must not hide that the
    request failed.
    """
    try:
        fields = unpack(packed, max_bytes=1 << 20)
        return {
            "type": _bounded(_text(fields["type"]), 255),
            "message": _bounded(_text(fields["message"]), MAX_MESSAGE_BYTES),
            "traceback": _bounded(_text(fields["traceback"]), -MAX_TRACEBACK_BYTES),
        }
    except (CorruptResult, TypeError, LookupError) as error:
        return {"type": "unreadable", "message": f"the stored error cannot be read: {error}"[:300], "traceback": ""}


def _told(tell: Callable[[], str]) -> str:
    try:
        return tell()
    except Exception as error:  # noqa: BLE001  __str__ is user code; the failure it describes matters more
        return f"<its text cannot be had: {type(error).__name__}>"


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"a {type(value).__name__} where text belongs")
    return value


def _bounded(text: str, max_bytes: int) -> str:
    """At most that many UTF-8 bytes: the head, or with a negative number the tail. Lone surrogates are escaped."""
    raw = text.encode("utf-8", "backslashreplace")
    if len(raw) <= abs(max_bytes):
        return raw.decode()
    if max_bytes < 0:
        return "..." + raw[max_bytes + 3 :].decode("utf-8", "ignore")
    return raw[: max_bytes - 3].decode("utf-8", "ignore") + "..."
