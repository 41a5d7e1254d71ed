"""Values to bytes and back: msgpack, result envelopes, chunks.

No I/O and no key names here: the managers write what ``encode`` gives and hand what they read to ``decode``. An
envelope says what the bytes are; the bytes are inline (one field) or cut into chunks that each decode on their own, so
that a reader can seek.

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

import io
import os
import re
import struct
import traceback
import unicodedata
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from importlib import import_module
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias
from urllib.parse import quote

import msgpack

from rqarm.config import Settings
from rqarm.errors import ConfigError, CorruptResult, ResultTooLarge, UnpackableResult, VersionSkew

#: msgpack extension code of everything listed in the module docstring
EXT_CODE = 82
#: containers inside each other, not counting an empty list or dict; msgpack's own packer stops at 511
MAX_DEPTH = 64
#: items of one container, and containers of one value; 10 million empty lists take 0.8 GB, dicts of one item 2.3 GB
MAX_ITEMS = 10_000_000
#: default of every ``max_bytes`` here, equal to the default of Settings.max_result_bytes
MAX_BYTES = 1 << 30
#: Redis refuses longer strings (proto-max-bulk-len)
MAX_CHUNK_BYTES = 512 << 20
#: version of the envelope's fields and of the extension types
VERSION = 1
#: payloads, arguments of retries and notes of quarantine: they lie in memory with every record
MAX_ARGUMENTS_BYTES = 1 << 20
#: bytes kept of an error's message (the head) and traceback (the tail)
MAX_MESSAGE_BYTES = 4_096
MAX_TRACEBACK_BYTES = 16_384
#: where files of ours lie
_HERE = os.path.dirname(__file__) + os.sep

Kind: TypeAlias = Literal["value", "bytes", "text", "result"]
Encoding: TypeAlias = Literal["", "zlib", "zstd"]

_CONTENT_TYPES: dict[str, str] = {
    "value": "application/msgpack",
    "bytes": "application/octet-stream",
    "text": "text/plain; charset=utf-8",
    "result": "application/octet-stream",
}


# --- values -----------------------------------------------------------------------------------------------------------

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
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
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


# --- what a handler returns and a reader gets -------------------------------------------------------------------------

_CONTENT_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+(;[ -~]*)?")
#: characters that turn the direction of text: "gpj.exe" can be shown as "exe.jpg" with them
_TURNS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True, slots=True)
class Result:
    """A file to store as it is, with its type and name for whoever downloads it.

    ``data``: bytes, str (stored as UTF-8), an iterable of bytes or an open binary file, which is read from where it
    stands and closed. A reader gets a Result whose ``data`` is bytes.

    Raises UnpackableResult when the content type is not ``type/subtype`` in ASCII, or the file name is not a plain one.
    """

    data: bytes | str | Iterable[bytes] | BinaryIO
    content_type: str | None = None
    filename: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.data, Iterable) and not _is_file(self.data):
            raise UnpackableResult("$.data", f"not bytes, str, iterable or file but {type(self.data).__name__}")
        if self.content_type is not None and (reason := _content_type_fault(self.content_type)):
            raise UnpackableResult("$.content_type", reason)
        if self.filename is not None and (reason := _filename_fault(self.filename)):
            raise UnpackableResult("$.filename", reason)


def _content_type_fault(content_type: Any) -> str:
    if type(content_type) is not str or len(content_type) > 255 or not _CONTENT_TYPE.fullmatch(content_type):
        return "must be type/subtype in printable ASCII, at most 255 characters"
    return ""


def _filename_fault(filename: Any) -> str:
    if type(filename) is not str or filename in ("", ".", "..") or len(filename) > 255:
        return "must be a file name of 1 to 255 characters"
    for char in filename:
        if char in "/\\" or char in _TURNS or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp"):
            return f"must not contain {char!a}"
    return ""


#: what a quoted name may hold for every browser. Not %, which some decode, nor what ends a parameter for a poor parser
_PLAIN_NAME = re.compile(r"[A-Za-z0-9 !#$&'()+,.@\[\]^_`{}~-]+")
#: attr-char of RFC 8187; the others are percent-encoded
_ATTR_CHARS = "!#$&+-.^_`|~"


def _disposition(kind: str, filename: str) -> str:
    """A Content-Disposition that names the file in ASCII, and in UTF-8 beside it where ASCII cannot."""
    # nothing of this is in a name that was stored; an envelope can be made by hand
    name = re.sub("[\x00-\x1f\x7f-\x9f/\\\\\ud800-\udfff]", "_", filename)
    if not name.strip("."):
        return kind
    if _PLAIN_NAME.fullmatch(name):
        return f'{kind}; filename="{name}"'
    ascii_name = "".join(map(_plain_letter, name))
    return f"{kind}; filename=\"{ascii_name}\"; filename*=UTF-8''{quote(name, safe=_ATTR_CHARS)}"


def _plain_letter(char: str) -> str:
    """``e`` for an e with accents, ``_`` for what ASCII has nothing like."""
    if unicodedata.combining(char):
        return ""
    letters = unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()
    return letters if _PLAIN_NAME.fullmatch(letters) else "_"


def _is_file(obj: Any) -> bool:
    return callable(getattr(obj, "read", None)) and not isinstance(obj, type)


# --- envelopes --------------------------------------------------------------------------------------------------------


_CHECKSUM = re.compile("[0-9a-f]{8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What the stored bytes of a result are.

    ``size``: bytes before compression. ``stored``: bytes in Redis. ``chunks``: 0 = inline; else chunk n holds
    ``chunk_bytes`` bytes from n * ``chunk_bytes`` on, the last one the rest. ``checksum``: CRC-32 of the bytes before
    compression, 8 hex digits.

    CRC-32, because it guards against damage and not against forgers (who could write the checksum as well), and costs
    0.06 us on small results and 0.25 ms per MB; BLAKE2b-64 costs 0.4 us and 1.1 ms (measured).
    """

    kind: Kind
    size: int
    stored: int
    checksum: str
    content_type: str = ""
    filename: str = ""
    encoding: Encoding = ""
    chunks: int = 0
    chunk_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.content_type:
            object.__setattr__(self, "content_type", _CONTENT_TYPES[self.kind])

    def to_fields(self) -> list[str | bytes]:
        """Field, value, field, value, ...: the arguments of HSET. Empty and default fields are left out."""
        fields: list[str | bytes] = ["v", str(VERSION), "kind", self.kind, "size", str(self.size)]
        fields += ["stored", str(self.stored), "sum", self.checksum]
        if self.content_type != _CONTENT_TYPES[self.kind]:
            fields += ["type", self.content_type]
        if self.filename:
            fields += ["file", self.filename.encode()]
        if self.encoding:
            fields += ["enc", self.encoding]
        if self.chunks:
            fields += ["chunks", str(self.chunks), "chunk", str(self.chunk_bytes)]
        return fields

    @classmethod
    def from_fields(cls, fields: Mapping[bytes, bytes]) -> Envelope:
        """The envelope in the fields of a result hash; fields of others are ignored.

        Raises VersionSkew when a newer rqarm wrote it: upgrade this one. Raises CorruptResult when a field is missing
        or contradicts another: the entry counts as a miss.
        """
        version = _number(fields, b"v")
        if version != VERSION:
            raise VersionSkew(f"the result has envelope version {version}, this rqarm reads {VERSION}: upgrade it")
        kind = _word(fields, b"kind")
        encoding = _word(fields, b"enc")
        checksum = _word(fields, b"sum")
        if kind not in _CONTENT_TYPES or encoding not in ("", "zlib", "zstd"):
            raise CorruptResult(f"the envelope names an unknown kind {kind!r} or encoding {encoding!r}")
        if not _CHECKSUM.fullmatch(checksum):
            raise CorruptResult(f"the envelope's checksum is {checksum!r}, not 8 hex digits")
        content_type = _word(fields, b"type")
        if content_type and _content_type_fault(content_type):
            raise CorruptResult(f"the envelope's content type {content_type!r} is none")
        filename = _word(fields, b"file")
        if filename and _filename_fault(filename):
            raise CorruptResult(f"the envelope's file name {filename!r} is none")
        envelope = cls(
            kind=kind,  # type: ignore[arg-type]
            size=_number(fields, b"size"),
            stored=_number(fields, b"stored"),
            checksum=checksum,
            content_type=content_type,
            filename=filename,
            encoding=encoding,  # type: ignore[arg-type]
            chunks=_number(fields, b"chunks", b"0"),
            chunk_bytes=_number(fields, b"chunk", b"0"),
        )
        envelope._check_lengths()
        return envelope

    def _check_lengths(self) -> None:
        if self.chunks == 0:
            holds = self.chunk_bytes == 0
        else:
            holds = 0 < self.chunk_bytes <= MAX_CHUNK_BYTES and self.chunks == -(-self.size // self.chunk_bytes)
        if holds and not self.encoding:
            holds = self.stored == self.size + _PREFIX_BYTES * self.chunks
        if not holds:
            raise CorruptResult(
                f"the envelope's lengths disagree: size {self.size}, stored {self.stored}, {self.chunks} chunks of "
                f"{self.chunk_bytes}"
            )

    def headers(self, *, inline: bool = False) -> list[tuple[str, str]]:
        """The HTTP headers with which the bytes of ``cache.open`` can be served, as WSGI takes them.

        All ASCII and without line breaks, whatever the name is. ``inline``: a browser may show it instead of saving it;
        only for types that run nothing, because the page would be one of yours. The ETag changes with the bytes.

        Source: RFC 6266 (Content-Disposition), RFC 8187 (names beyond ASCII), RFC 9110 (ETag).
        """
        is_type = self.content_type.isascii() and not _content_type_fault(self.content_type)
        return [
            ("Content-Type", self.content_type if is_type else _CONTENT_TYPES["bytes"]),
            ("Content-Length", str(self.size)),
            ("Content-Disposition", _disposition("inline" if inline else "attachment", self.filename)),
            ("ETag", f'"{self.checksum}-{self.size:x}"'),
            ("X-Content-Type-Options", "nosniff"),
        ]

    def length_of(self, n: int) -> int:
        """Bytes before compression in chunk n (0 = all, if inline)."""
        if not self.chunks:
            return self.size
        return min(self.chunk_bytes, self.size - n * self.chunk_bytes)


def _word(fields: Mapping[bytes, bytes], name: bytes) -> str:
    try:
        return fields.get(name, b"").decode()
    except UnicodeDecodeError as error:
        raise CorruptResult(f"the envelope's field {name.decode()} is not text") from error


def _number(fields: Mapping[bytes, bytes], name: bytes, default: bytes = b"") -> int:
    digits = fields.get(name, default)
    # 15 digits: a petabyte, exact as a Lua number too
    if not digits.isdigit() or len(digits) > 15:
        raise CorruptResult(f"the envelope's field {name.decode()} is {digits[:40]!r}, not a number")
    return int(digits)


# --- compression ------------------------------------------------------------------------------------------------------

#: every chunk starts with the CRC-32 of its bytes before compression, seeded with its number, big-endian: a reader that
#: seeks has no other check, and two swapped chunks are seen
_PREFIX_BYTES = 4
#: zlib level 6 packs 1,000-row lists 12 % smaller than level 1 and takes five times as long (40 against 8 ms per MB)
_ZLIB_LEVEL = 1
#: the library's own default; 0.3 to 5 ms per MB
_ZSTD_LEVEL = 3


class _Zstd(NamedTuple):
    compress: Callable[[bytes | memoryview], bytes]
    #: stored bytes, expected length -> bytes; raises ValueError, never builds more than the length + 1
    inflate: Callable[[bytes | memoryview, int], bytes]


@lru_cache(maxsize=1)
def _zstd() -> _Zstd | None:
    """Zstandard from Python 3.14, else from the package zstandard, else None."""
    try:
        return _stdlib_zstd(import_module("compression.zstd"))
    except ImportError:
        pass
    try:
        return _package_zstd(import_module("zstandard"))
    except ImportError:
        return None


def _stdlib_zstd(zstd: Any) -> _Zstd:
    def inflate(packed: bytes | memoryview, length: int) -> bytes:
        decompressor = zstd.ZstdDecompressor()
        try:
            raw: bytes = decompressor.decompress(packed, length + 1)
        except zstd.ZstdError as error:
            raise ValueError(str(error)) from error
        if not decompressor.eof or decompressor.unused_data:
            raise ValueError("cut or followed by other bytes")
        return raw

    return _Zstd(lambda raw: bytes(zstd.compress(raw, _ZSTD_LEVEL)), inflate)


def _package_zstd(zstandard: Any) -> _Zstd:
    def inflate(packed: bytes | memoryview, length: int) -> bytes:
        try:
            # the frame says its length and the library allocates it at once
            if zstandard.frame_content_size(packed) != length:
                raise ValueError("the frame has another length")
            return bytes(zstandard.ZstdDecompressor().decompress(packed, length, allow_extra_data=False))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error

    # a compressor must not be shared between threads; a new one costs 20 us
    return _Zstd(lambda raw: bytes(zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(raw)), inflate)


def _zlib_inflate(packed: bytes | memoryview, length: int) -> bytes:
    decompressor = zlib.decompressobj()
    try:
        raw = decompressor.decompress(packed, length + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not decompressor.eof or decompressor.unused_data:
        raise ValueError("cut, longer than the envelope says, or followed by other bytes")
    return raw


def _inflate(encoding: Encoding, packed: bytes | memoryview, length: int) -> bytes | memoryview:
    """Exactly ``length`` bytes, or CorruptResult. Builds at most one byte more, whatever the bytes claim (row 59)."""
    try:
        if encoding == "zlib":
            raw: bytes | memoryview = _zlib_inflate(packed, length)
        elif encoding == "zstd":
            zstd = _zstd()
            if zstd is None:
                # not CorruptResult: that counts as a miss, and the request would run again and again
                raise VersionSkew(
                    "the result is compressed with zstd and this Python cannot read it: install rqarm[zstd] here, or "
                    "switch zstd off where results are written"
                )
            raw = zstd.inflate(packed, length)
        else:
            raw = packed
    except ValueError as error:
        raise CorruptResult(f"the stored bytes are not {encoding}: {error}") from error
    if len(raw) != length:
        raise CorruptResult(f"the stored bytes hold {len(raw)} bytes, the envelope says {length}")
    return raw


# --- encoding ---------------------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """A value as bytes: ``body`` if they are all here, else ``pieces``; ``close`` when they are no longer needed."""

    kind: Kind
    body: memoryview | None
    pieces: Iterator[bytes]
    close: Callable[[], object]
    content_type: str = ""
    filename: str = ""


class Encoded:
    """A value on its way to Redis.

    ``inline`` has the stored bytes of a small result, and ``envelope`` is ready. Else ``inline`` is None: take
    ``chunks()`` to the end, then ``envelope`` is ready. ``close()`` when you stop before the end.
    """

    def __init__(self, source: _Source, settings: Settings, zstd: bool | None) -> None:
        self.inline: bytes | None = None
        self._envelope: Envelope | None = None
        self._source = source
        self._settings = settings
        self._zstd = _zstd() if zstd is None or zstd else None
        self._body = source.body
        self._head = b""
        self._first: bytes | None = None
        self._encoding: Encoding = ""
        self._is_taken = self._is_closed = False
        try:
            self._try_inline()
        except BaseException:
            self.close()
            raise

    @property
    def envelope(self) -> Envelope:
        """What was encoded. Raises RuntimeError before the last chunk was taken: its size is not known yet."""
        if self._envelope is None:
            raise RuntimeError("the envelope is ready when all chunks were taken")
        return self._envelope

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """Number and stored bytes of each chunk, once; none for an inline result.

        Raises ResultTooLarge and UnpackableResult as soon as they show, and what the handler's iterator raises. Then
        drop the chunks written so far. The source is closed in every case.
        """
        if self._is_taken:
            raise RuntimeError("the chunks were taken already")
        self._is_taken = True
        return iter(()) if self.inline is not None else self._chunks()

    def close(self) -> None:
        """Close the handler's file or generator. Harmless twice."""
        if not self._is_closed:
            self._is_closed = True
            self._source.close()

    def _chunks(self) -> Iterator[tuple[int, bytes]]:
        size = stored = checksum = number = 0
        try:
            for raw in self._raws():
                packed = self._pack_chunk(number, raw)
                size += len(raw)
                stored += len(packed)
                checksum = zlib.crc32(raw, checksum)
                yield number, packed
                number += 1
            self._seal(size, stored, checksum, number)
        finally:
            self.close()

    def _try_inline(self) -> None:
        """Read ahead one chunk and decide: inline or chunks, compressed or not."""
        settings = self._settings
        if self._body is None:
            self._read_ahead(max(settings.inline_bytes, settings.chunk_bytes))
        raw = self._body if self._body is not None else memoryview(self._head)
        is_all = self._body is not None and len(raw) <= max(settings.inline_bytes, settings.chunk_bytes)
        first = raw if is_all and len(raw) <= settings.inline_bytes else raw[: settings.chunk_bytes]
        packed = self._try_compress(first) if len(raw) > settings.compress_above else bytes(first)
        if not is_all or len(first) < len(raw) or len(packed) > settings.inline_bytes:
            self._first = packed
            return
        self.inline = packed
        self._seal(len(raw), len(packed), zlib.crc32(raw), 0)
        self.close()

    def _read_ahead(self, limit: int) -> None:
        """Take more than ``limit`` bytes of the stream, or all it has: then they are a body like any other."""
        head = bytearray()
        for piece in self._source.pieces:
            head += piece
            if len(head) > limit:
                self._head = bytes(head)
                return
        self._body = memoryview(bytes(head))

    def _try_compress(self, raw: memoryview) -> bytes:
        """Settle the encoding on these bytes: compressed only if that saves an eighth."""
        packed = self._zstd.compress(raw) if self._zstd else zlib.compress(raw, _ZLIB_LEVEL)
        if len(packed) > len(raw) * 7 // 8:
            return bytes(raw)
        self._encoding = "zstd" if self._zstd else "zlib"
        return packed

    def _pack_chunk(self, number: int, raw: bytes | memoryview) -> bytes:
        packed: bytes | memoryview = raw
        if self._first is not None:
            packed, self._first = self._first, None
        elif self._encoding == "zlib":
            packed = zlib.compress(raw, _ZLIB_LEVEL)
        elif self._encoding == "zstd" and self._zstd:
            packed = self._zstd.compress(raw)
        return b"".join((zlib.crc32(raw, number).to_bytes(_PREFIX_BYTES, "big"), packed))

    def _raws(self) -> Iterator[bytes | memoryview]:
        """The bytes in pieces of exactly ``chunk_bytes``, the last one shorter."""
        length, body = self._settings.chunk_bytes, self._body
        if body is not None:
            yield from (body[start : start + length] for start in range(0, len(body), length))
            return
        kept, self._head = bytearray(self._head), b""
        while True:
            while len(kept) < length and (piece := next(self._source.pieces, None)) is not None:
                kept += piece
            if not kept:
                return
            yield bytes(memoryview(kept)[:length])
            del kept[:length]

    def _seal(self, size: int, stored: int, checksum: int, chunks: int) -> None:
        self._envelope = Envelope(
            kind=self._source.kind,
            size=size,
            stored=stored,
            checksum=f"{checksum:08x}",
            content_type=self._source.content_type,
            filename=self._source.filename,
            encoding=self._encoding,
            chunks=chunks,
            chunk_bytes=self._settings.chunk_bytes if chunks else 0,
        )


def encode(value: Any, settings: Settings, *, zstd: bool | None = None) -> Encoded:
    """Make a handler's value ready to be stored.

    bytes, str, Result, iterators of bytes and open binary files are stored as they are, everything else as msgpack. A
    result is inline when its bytes fit one chunk and take at most ``inline_bytes`` when stored. Over
    ``compress_above`` bytes it is compressed if its first chunk shrinks by an eighth (a stream is known to be over
    once that many bytes were read ahead, at most one chunk). An iterator is read only as far as the next chunk needs.

    ``zstd``: None = when this Python has it, False = zlib, because some reader lacks it. zstd is 5 to 30 times as fast.

    Raises UnpackableResult with the place inside the value, ResultTooLarge over ``max_result_bytes``, ConfigError when
    the settings cannot be met here.
    """
    if settings.chunk_bytes > MAX_CHUNK_BYTES - _PREFIX_BYTES - (1 << 20):
        # room for bytes that grow when compressed
        raise ConfigError(f"chunk_bytes must stay below {MAX_CHUNK_BYTES} bytes, Redis's longest string, by 1 MiB")
    if zstd and _zstd() is None:
        raise ConfigError("zstd=True, but this Python has no zstd: install rqarm[zstd]")
    return Encoded(_source(value, settings.max_result_bytes), settings, zstd)


def _source(value: Any, max_bytes: int) -> _Source:
    if isinstance(value, Result):
        content_type = value.content_type or ("text/plain; charset=utf-8" if isinstance(value.data, str) else "")
        source = _raw_source(value.data, "$.data", "result", max_bytes)
        if source is None:
            source = _stream_source(value.data, "$.data", "result", max_bytes)
        return source._replace(content_type=content_type, filename=value.filename or "")
    source = _raw_source(value, "$", "bytes", max_bytes)
    if source is not None:
        return source
    if isinstance(value, Iterator) or _is_file(value):
        return _stream_source(value, "$", "bytes", max_bytes)
    return _body_source(pack(value), "value", max_bytes)


def _raw_source(data: Any, path: str, kind: Kind, max_bytes: int) -> _Source | None:
    """bytes and str as they are; None for anything else."""
    if type(data) is str:
        try:
            return _body_source(data.encode(), "text" if kind == "bytes" else kind, max_bytes)
        except UnicodeEncodeError as error:
            raise UnpackableResult(path, f"a str with a lone surrogate at character {error.start}") from error
    if isinstance(data, bytes | bytearray | memoryview):
        return _body_source(data, kind, max_bytes)
    return None


def _body_source(body: bytes | bytearray | memoryview, kind: Kind, max_bytes: int) -> _Source:
    view = memoryview(body)
    # only contiguous bytes can be cast
    view = view.cast("B") if view.c_contiguous and view.nbytes else memoryview(view.tobytes())
    if len(view) > max_bytes:
        raise ResultTooLarge(max_bytes)
    return _Source(kind, view, iter(()), _nothing_to_close)


def _nothing_to_close() -> None:
    pass


def _stream_source(stream: Any, path: str, kind: Kind, max_bytes: int) -> _Source:
    pieces = _read(stream, path) if _is_file(stream) else iter(stream)
    close = getattr(stream, "close", None)
    return _Source(kind, None, _checked(pieces, path, max_bytes), close if callable(close) else _nothing_to_close)


def _read(file: Any, path: str) -> Iterator[Any]:
    while True:
        piece = file.read(65_536)
        if not isinstance(piece, bytes | bytearray):
            raise UnpackableResult(path, f"the file gives {type(piece).__name__}, not bytes: open it in binary mode")
        if not piece:
            return
        yield piece


def _checked(pieces: Iterator[Any], path: str, max_bytes: int) -> Iterator[bytes]:
    size = 0
    for n, piece in enumerate(pieces):
        if not isinstance(piece, bytes | bytearray | memoryview):
            raise UnpackableResult(
                f"{path}[{n}]", f"an iterator must give bytes, not {type(piece).__name__}; return a list for values"
            )
        size += piece.nbytes if isinstance(piece, memoryview) else len(piece)
        if size > max_bytes:
            raise ResultTooLarge(max_bytes)
        yield bytes(piece)


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode(envelope: Envelope, stored: bytes, *, max_bytes: int = MAX_BYTES) -> Any:
    """The value of an inline result.

    Raises CorruptResult when length, checksum or format do not match: the entry counts as a miss. Raises ResultTooLarge
    when it is over ``max_bytes``, and VersionSkew when it needs zstd and this Python has none: both are for the
    operator, running the request again would not help.
    """
    if envelope.size > max_bytes:
        raise ResultTooLarge(max_bytes)
    if envelope.chunks:
        raise CorruptResult(f"the result has {envelope.chunks} chunks, not inline bytes")
    return _value(envelope, bytes(_open_inline(envelope, stored)), max_bytes)


def decode_chunks(envelope: Envelope, chunks: Iterable[bytes | None], *, max_bytes: int = MAX_BYTES) -> Any:
    """The value of a result from its chunks in order (an inline result counts as one chunk, its inline bytes).

    A None is a missing chunk. Raises as ``decode`` does. Memory: the result and one chunk.
    """
    if envelope.size > max_bytes:
        raise ResultTooLarge(max_bytes)
    joined = io.BytesIO()  # getvalue() hands the bytes over without a copy
    stored = checksum = count = 0
    for count, chunk in enumerate(chunks, 1):
        if count > max(envelope.chunks, 1):
            raise CorruptResult(f"there are more than the {envelope.chunks} chunks of the envelope")
        raw = _open(envelope, count - 1, chunk)
        checksum = zlib.crc32(raw, checksum)
        stored += len(chunk or b"")
        joined.write(raw)
    if count != max(envelope.chunks, 1) or stored != envelope.stored or f"{checksum:08x}" != envelope.checksum:
        raise CorruptResult(
            f"{count} chunks of {stored} bytes with checksum {checksum:08x} are not the {envelope.chunks} of "
            f"{envelope.stored} bytes with {envelope.checksum} that the envelope names"
        )
    return _value(envelope, joined.getvalue(), max_bytes)


def _value(envelope: Envelope, raw: bytes, max_bytes: int) -> Any:
    if envelope.kind == "value":
        return unpack(raw, max_bytes=max_bytes)
    if envelope.kind == "text":
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise CorruptResult(f"the text is not UTF-8: {error}") from error
    if envelope.kind == "result":
        return Result(raw, envelope.content_type, envelope.filename or None)
    return raw


def _open(envelope: Envelope, n: int, stored: bytes | None) -> bytes | memoryview:
    """The bytes of chunk n, or of the inline field, checked."""
    if stored is None:
        raise CorruptResult(f"chunk {n} of {envelope.chunks} is missing")
    if not envelope.chunks:
        return _open_inline(envelope, stored)
    raw = _inflate(envelope.encoding, memoryview(stored)[_PREFIX_BYTES:], envelope.length_of(n))
    if zlib.crc32(raw, n).to_bytes(_PREFIX_BYTES, "big") != stored[:_PREFIX_BYTES]:
        raise CorruptResult(f"chunk {n} of {envelope.chunks} does not match its checksum")
    return raw


def _open_inline(envelope: Envelope, stored: bytes) -> bytes | memoryview:
    if len(stored) != envelope.stored:
        raise CorruptResult(f"there are {len(stored)} stored bytes, the envelope says {envelope.stored}")
    raw = _inflate(envelope.encoding, stored, envelope.size)
    if f"{zlib.crc32(raw):08x}" != envelope.checksum:
        raise CorruptResult("the stored bytes do not match their checksum")
    return raw


class ChunkReader(io.RawIOBase):
    """A result as a read-only file that can seek: the bytes before compression, whatever the kind.

    ``fetch(n)`` gives the stored bytes of chunk n, or None; for an inline result ``fetch(0)`` gives the inline bytes.
    Only the chunks that are read are fetched, and the last one is kept. Each is checked against its own checksum.

    Raises CorruptResult and VersionSkew as ``decode`` does, from the call that reads.
    """

    def __init__(self, envelope: Envelope, fetch: Callable[[int], bytes | None]) -> None:
        super().__init__()
        self.envelope = envelope
        self._fetch = fetch
        self._position = 0
        self._number = -1
        self._chunk: bytes | memoryview = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._refuse_closed()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; past the end is allowed and reads nothing. Raises ValueError before the start."""
        self._refuse_closed()
        if whence not in (io.SEEK_SET, io.SEEK_CUR, io.SEEK_END):
            raise ValueError(f"whence must be 0, 1 or 2, not {whence}")
        position = offset + (0, self._position, self.envelope.size)[whence]
        if position < 0:
            raise ValueError(f"cannot seek to {position}")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer up to the end of the current chunk; 0 at the end."""
        self._refuse_closed()
        with memoryview(buffer) as view, view.cast("B") as target:
            piece = self._piece()[: len(target)]
            target[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def readall(self) -> bytes:
        """Everything from here on, chunk by chunk."""
        self._refuse_closed()
        joined = io.BytesIO()
        while piece := self._piece():
            joined.write(piece)
            self._position += len(piece)
        return joined.getvalue()

    def _piece(self) -> memoryview:
        """From the position to the end of its chunk; empty at the end."""
        if self._position >= self.envelope.size:
            return memoryview(b"")
        number, start = divmod(self._position, self.envelope.chunk_bytes or self.envelope.size)
        if number != self._number:
            self._number = -1
            self._chunk = _open(self.envelope, number, self._fetch(number))
            self._number = number
        return memoryview(self._chunk)[start:]

    def _refuse_closed(self) -> None:
        if self.closed:
            raise ValueError("the result is closed")


def open_reader(envelope: Envelope, fetch: Callable[[int], bytes | None]) -> io.BufferedReader:
    """A ChunkReader with the buffer that small reads want."""
    return io.BufferedReader(ChunkReader(envelope, fetch), 65_536)


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
        name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
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
