"""Results to bytes and back: envelopes, chunks.

No I/O and no key names here: the managers write what ``encode`` gives and hand what they read to ``decode``. An
envelope says what the bytes are; the bytes are inline (one field) or cut into chunks that each decode on their own, so
that a reader can seek.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

from rqarm.compression import Encoding, deflate, find_zstd, inflate
from rqarm.config import Settings
from rqarm.errors import ConfigError, CorruptResult, ResultTooLarge, UnpackableResult, VersionSkew
from rqarm.packing import MAX_BYTES, pack, unpack
from rqarm.result import Result, content_type_fault, disposition, filename_fault, is_file

#: Redis refuses longer strings (proto-max-bulk-len)
MAX_CHUNK_BYTES = 512 << 20
#: version of the envelope's fields and of the extension types
VERSION = 1
Kind: TypeAlias = Literal["value", "bytes", "text", "result"]

_CONTENT_TYPES: dict[str, str] = {
    "value": "application/msgpack",
    "bytes": "application/octet-stream",
    "text": "text/plain; charset=utf-8",
    "result": "application/octet-stream",
}


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

    def to_fields(self) -> list[str]:
        """Field, value, field, value, ... Empty and default fields are left out."""
        fields: list[str] = ["v", str(VERSION), "kind", self.kind, "size", str(self.size)]
        fields += ["stored", str(self.stored), "sum", self.checksum]
        if self.content_type != _CONTENT_TYPES[self.kind]:
            fields += ["type", self.content_type]
        if self.filename:
            fields += ["file", self.filename]
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
        if content_type and content_type_fault(content_type):
            raise CorruptResult(f"the envelope's content type {content_type!r} is none")
        filename = _word(fields, b"file")
        if filename and filename_fault(filename):
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
        is_type = self.content_type.isascii() and not content_type_fault(self.content_type)
        return [
            ("Content-Type", self.content_type if is_type else _CONTENT_TYPES["bytes"]),
            ("Content-Length", str(self.size)),
            ("Content-Disposition", disposition("inline" if inline else "attachment", self.filename)),
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


def pack_envelope(envelope: Envelope) -> bytes:
    """A line ``name=value`` for each field: people read it in redis-cli, and one value is cheaper than ten."""
    fields = envelope.to_fields()
    return "\n".join([f"{name}={value}" for name, value in zip(fields[::2], fields[1::2], strict=True)]).encode()


@lru_cache(maxsize=1024)
def unpack_envelope(packed: bytes) -> Envelope:
    """Cached, because what is read often is read with the same envelope, and it takes longer than its value."""
    lines = (line.partition(b"=") for line in packed.split(b"\n"))
    return Envelope.from_fields({name: value for name, _, value in lines})


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
        self._method: Encoding = "zstd" if (zstd is None or zstd) and find_zstd() else "zlib"
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

    @classmethod
    def at_once(cls, source: _Source) -> Encoded:
        """A body that is too small for all decisions: most results are."""
        assert source.body is not None
        body = bytes(source.body)
        encoded = cls.__new__(cls)
        encoded.inline, encoded._source, encoded._is_taken, encoded._is_closed = body, source, False, True
        encoded._encoding = ""
        encoded._seal(len(body), len(body), zlib.crc32(body), 0)
        source.close()
        return encoded

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
        packed = deflate(self._method, raw)
        if len(packed) > len(raw) * 7 // 8:
            return bytes(raw)
        self._encoding = self._method
        return packed

    def _pack_chunk(self, number: int, raw: bytes | memoryview) -> bytes:
        packed: bytes | memoryview = raw
        if self._first is not None:
            packed, self._first = self._first, None
        elif self._encoding:
            packed = deflate(self._encoding, raw)
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
    if zstd and find_zstd() is None:
        raise ConfigError("zstd=True, but this Python has no zstd: install rqarm[zstd]")
    source = _source(value, settings.max_result_bytes)
    if source.body is not None and len(source.body) <= min(settings.inline_bytes, settings.compress_above):
        return Encoded.at_once(source)
    return Encoded(source, settings, zstd)


#: types of most values; what they are not takes long to ask
_PLAIN = frozenset({dict, list, tuple, int, float, bool, type(None)})


def _source(value: Any, max_bytes: int) -> _Source:
    if type(value) in _PLAIN:
        return _body_source(pack(value), "value", max_bytes)
    if isinstance(value, Result):
        content_type = value.content_type or ("text/plain; charset=utf-8" if isinstance(value.data, str) else "")
        source = _raw_source(value.data, "$.data", "result", max_bytes)
        if source is None:
            source = _stream_source(value.data, "$.data", "result", max_bytes)
        return source._replace(content_type=content_type, filename=value.filename or "")
    source = _raw_source(value, "$", "bytes", max_bytes)
    if source is not None:
        return source
    if isinstance(value, Iterator) or is_file(value):
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
    pieces = _read(stream, path) if is_file(stream) else iter(stream)
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
    raw = inflate(envelope.encoding, memoryview(stored)[_PREFIX_BYTES:], envelope.length_of(n))
    if zlib.crc32(raw, n).to_bytes(_PREFIX_BYTES, "big") != stored[:_PREFIX_BYTES]:
        raise CorruptResult(f"chunk {n} of {envelope.chunks} does not match its checksum")
    return raw


def _open_inline(envelope: Envelope, stored: bytes) -> bytes | memoryview:
    if len(stored) != envelope.stored:
        raise CorruptResult(f"there are {len(stored)} stored bytes, the envelope says {envelope.stored}")
    raw = inflate(envelope.encoding, stored, envelope.size)
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
