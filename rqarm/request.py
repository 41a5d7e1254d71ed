"""BatchRequest: what a caller wants, as an immutable value.

Owns the options of a request, their checks and the packed form that Redis keeps. The rules of identity are in
rqarm.uri; how long a result lives when the request does not say is the manager's business. The one idea: everything is
checked when the request is made, so what exists is valid, and unpack goes through the same checks as a caller.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any, Final, NoReturn

import msgpack  # type: ignore[import-untyped, unused-ignore] # it ships no types

from rqarm.config import Settings
from rqarm.errors import InvalidRequest, VersionSkew
from rqarm.model import Key, Priority
from rqarm.uri import MAX_PARAMS, Canonical, Pair, Params, canonicalize, check_key, family, normalize_params, redact

#: of the packed form, and of the one that lies beside an identity
SCHEMA, SCHEMA_BESIDE = 1, 2
#: a valid request cannot be larger: URI 32 KiB in UTF-8, parameters 8, tags 8
MAX_PACKED_BYTES = 65_536
MAX_TAGS = 20
MAX_TAG_CHARS = 100
MAX_QUEUE_CHARS = 100
#: Redis counts the life of a result in whole milliseconds, and 0 would mean sticky
MIN_TTL_S = 0.001
#: 317 years; beyond it the caller means sticky
MAX_SECONDS = 1e10

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NOT_IN_QUEUE = re.compile(r"[^\x21-\x7e]|[:{}*?\[\]]")
_WORDS: Final = MappingProxyType({priority.name.lower(): priority for priority in Priority})
_SECRET_PARAMS = Settings().secret_params


class BatchRequest:
    """A web request to be answered in the background: URI, parameters and options.

    ``params`` come after those in the URI: a mapping of name to one value or a list of them, a query string, or
    (name, value) pairs. ``operation`` names a handler; with it the URI may be empty. ``ttl``: seconds the result
    lives; None leaves it to the route and the settings. ``sticky``: it lives until the data are rebuilt, so it excludes
    ``ttl``. ``key``: a readable key in place of the hash. ``queue``: None is the manager's. ``priority``: ``high``,
    ``default`` or ``low``. ``estimated_time``: seconds the handler will need, when the caller knows better than the
    statistics. ``tags``: labels by which results can be invalidated; their order does not count.

    Two requests are equal when identity, key and options are. Raises InvalidRequest that names the argument.
    """

    __slots__ = (
        "_forms",
        "_given_key",
        "estimated_time",
        "operation",
        "params",
        "priority",
        "queue",
        "sticky",
        "tags",
        "ttl",
        "uri",
    )

    #: the URI as given
    uri: str
    #: ``params`` as given: decoded (name, value) pairs in the order given, without those of the URI; a value of None is
    #: a bare name. For all parameters see ``query``.
    params: tuple[Pair, ...]
    operation: str
    sticky: bool
    ttl: float | None
    queue: str | None
    priority: Priority
    estimated_time: float | None
    #: sorted, without repeats
    tags: tuple[str, ...]
    _given_key: Key | None
    _forms: dict[tuple[str, ...], Canonical]

    def __init__(
        self,
        uri: str,
        params: Params | None = None,
        *,
        operation: str = "",
        sticky: bool = False,
        ttl: float | None = None,
        key: str | None = None,
        queue: str | None = None,
        priority: str | Priority = "default",
        estimated_time: float | None = None,
        tags: Iterable[str] = (),
    ) -> None:
        pairs = normalize_params(params) if params is not None else ()
        form = canonicalize(uri, pairs, operation=operation)
        if not isinstance(sticky, bool):
            raise InvalidRequest(f"True or False is needed, not {type(sticky).__name__}", where="sticky")
        if ttl is not None:
            ttl = _seconds(ttl, "ttl", MIN_TTL_S)
            if sticky:
                raise InvalidRequest("a sticky result does not expire: give sticky or ttl, not both", where="ttl")
        given = check_key(key) if key is not None else None
        put = object.__setattr__
        put(self, "uri", str.__str__(uri))
        put(self, "params", pairs)
        put(self, "operation", str.__str__(operation))
        put(self, "sticky", sticky)
        put(self, "ttl", ttl)
        put(self, "queue", _queue(queue) if queue is not None else None)
        put(self, "priority", _priority(priority))
        put(self, "estimated_time", None if estimated_time is None else _seconds(estimated_time, "estimated_time", 0.0))
        put(self, "tags", _tags(tags) if tags != () else ())
        put(self, "_given_key", given)
        put(self, "_forms", {(): _with_key(form, given)})

    @property
    def canonical(self) -> str:
        """The canonical URI with all parameters."""
        return self._forms[()].uri

    @property
    def identity(self) -> str:
        """The text behind the hash; the readable key does not change it."""
        return self._forms[()].text

    @property
    def key(self) -> Key:
        """The readable key that was given, else the hash of the identity; no parameter is ignored."""
        return self._forms[()].key

    @property
    def has_readable_key(self) -> bool:
        return self._given_key is not None

    @property
    def family(self) -> str:
        """A coarse name for requests that take about as long; see rqarm.uri.family."""
        return family(self._forms[()], self.operation)

    @property
    def query(self) -> dict[str, list[str]]:
        """All parameters, decoded, those of the URI first; a bare name counts as an empty value. A new dict."""
        query: dict[str, list[str]] = {}
        for name, value in self._forms[()].params:
            query.setdefault(name, []).append(value or "")
        return query

    def identify(self, ignore_params: tuple[str, ...] = ()) -> Canonical:
        """The canonical form without the ignored parameters; kept for the next call.

        Its ``key`` is the readable key if one was given. Raises InvalidRequest when a pattern is not text.
        """
        form = self._forms.get(ignore_params)
        if form is None:
            form = canonicalize(self.uri, self.params, operation=self.operation, ignore_params=ignore_params)
            form = _with_key(form, self._given_key)
            self._forms[ignore_params] = form
        return form

    def with_options(self, *, queue: str | None, priority: Priority, sticky: bool, ttl: float | None) -> BatchRequest:
        """The same request, asked for in another way."""
        return BatchRequest(
            self.uri,
            self.params or None,
            operation=self.operation,
            sticky=sticky,
            ttl=ttl,
            key=self._given_key,
            queue=queue,
            priority=priority,
            estimated_time=self.estimated_time,
            tags=self.tags,
        )

    def pack(self) -> bytes:
        """The request as a msgpack map with a schema version; what is at its default is left out."""
        fields: dict[str, Any] = {"v": SCHEMA, "u": self.uri}
        if self.params:
            fields["p"] = self.params
        if self.operation:
            fields["o"] = self.operation
        if self.sticky:
            fields["s"] = True
        if self.ttl is not None:
            fields["t"] = _short(self.ttl)
        if self._given_key is not None:
            fields["k"] = self._given_key
        if self.queue is not None:
            fields["q"] = self.queue
        if self.priority is not Priority.DEFAULT:
            fields["r"] = self.priority.name.lower()
        if self.estimated_time is not None:
            fields["e"] = _short(self.estimated_time)
        if self.tags:
            fields["g"] = self.tags
        packed: bytes = msgpack.packb(fields)
        return packed

    def pack_beside(self, identity: str) -> bytes:
        """The packed form for a place where the identity stands as well: without what the two have in common.

        The smaller of the two forms. It takes 2 us and a fourth of the bytes, since the URI is most of a request.
        """
        packed = self.pack()
        deflate = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 1, zlib.Z_DEFAULT_STRATEGY, identity.encode())
        beside: bytes = msgpack.packb({"v": SCHEMA_BESIDE, "z": deflate.compress(packed) + deflate.flush()})
        return beside if len(beside) < len(packed) else packed

    def _options(self) -> tuple[object, ...]:
        return (
            self.identity,
            self.key,
            self.sticky,
            self.ttl,
            self.queue,
            self.priority,
            self.estimated_time,
            self.tags,
        )

    def __eq__(self, other: object) -> bool:
        return self._options() == other._options() if isinstance(other, BatchRequest) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        """Short, and without secrets: a traceback or a log prints it."""
        shown = redact(self.canonical, _SECRET_PARAMS)
        parts = [repr(shown if len(shown) <= 100 else f"{shown[:97]}...")]
        parts += [
            f"{name}={value!r}"
            for name, value in (
                ("operation", self.operation),
                ("sticky", self.sticky),
                ("ttl", self.ttl),
                ("key", self._given_key and str(self._given_key)),
                ("queue", self.queue),
            )
            if value
        ]
        if self.priority is not Priority.DEFAULT:
            parts.append(f"priority={self.priority.name.lower()!r}")
        return f"BatchRequest({', '.join(parts)})"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a BatchRequest is immutable: make a new one to change {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a BatchRequest is immutable: {name} stays")

    def __reduce__(self) -> tuple[Any, ...]:
        return unpack, (self.pack(),)


_FIELDS: Final = MappingProxyType(
    {
        "p": "params",
        "o": "operation",
        "s": "sticky",
        "t": "ttl",
        "k": "key",
        "q": "queue",
        "r": "priority",
        "e": "estimated_time",
        "g": "tags",
    }
)


def as_request(request: BatchRequest | str) -> BatchRequest:
    """The request itself, or one for a URI. Raises InvalidRequest for anything else."""
    if isinstance(request, BatchRequest):
        return request
    if isinstance(request, str):
        return BatchRequest(request)
    raise InvalidRequest(f"a BatchRequest or a URI is needed, not {type(request).__name__}", where="request")


def unpack(blob: bytes, identity: bytes = b"") -> BatchRequest:
    """The request that ``pack``, or ``pack_beside`` the identity, wrote, with the same key. The bytes are not trusted.

    Raises VersionSkew when a version of rqarm with another schema wrote them: upgrade. Raises InvalidRequest for all
    else that is no request: some other program wrote them.
    """
    if not isinstance(blob, bytes | bytearray | memoryview):
        raise InvalidRequest(f"bytes are needed, not {type(blob).__name__}", where="packed request")
    fields = _fields(bytes(blob))
    if fields["v"] == SCHEMA_BESIDE and isinstance(fields.get("z"), bytes):
        fields = _fields(_inflated(fields["z"], identity))
    if fields["v"] != SCHEMA:
        raise VersionSkew(
            f"a request was packed with schema {fields['v']}, this version of rqarm reads {SCHEMA}: upgrade rqarm here"
        )
    if unknown := [name for name in fields if name not in ("v", "u") and name not in _FIELDS]:
        raise VersionSkew(f"a packed request has unknown fields ({ascii(unknown)[:80]}): upgrade rqarm here")
    if "u" not in fields:
        raise InvalidRequest("the URI is missing", where="packed request")
    options = {_FIELDS[name]: value for name, value in fields.items() if name in _FIELDS}
    return BatchRequest(fields["u"], **options)


def _inflated(deflated: bytes, identity: bytes) -> bytes:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS, identity)
    try:
        packed = inflate.decompress(deflated, MAX_PACKED_BYTES)
    except zlib.error:
        raise InvalidRequest("the bytes do not belong to this identity", where="packed request") from None
    if not inflate.eof:
        raise InvalidRequest("the bytes are cut, or too many", where="packed request")
    return packed


def _fields(packed: bytes) -> dict[Any, Any]:
    if len(packed) > MAX_PACKED_BYTES:
        reason = f"{len(packed):,} bytes, at most {MAX_PACKED_BYTES:,} are possible"
        raise InvalidRequest(reason, where="packed request")
    try:
        fields = msgpack.unpackb(packed, max_array_len=MAX_PARAMS, max_map_len=32, max_ext_len=0)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise InvalidRequest(f"not msgpack of a request ({type(error).__name__})", where="packed request") from None
    if not isinstance(fields, dict) or "v" not in fields or type(fields["v"]) is not int:
        raise InvalidRequest("no map with a schema version", where="packed request")
    return fields


def _with_key(form: Canonical, key: Key | None) -> Canonical:
    return form if key is None else Canonical(form.uri, form.text, key)


def _seconds(value: object, where: str, minimum: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"seconds as a number are needed, not {type(value).__name__}", where=where)
    if not minimum <= value <= MAX_SECONDS:
        shown = f"{float(value):g}" if isinstance(value, float) else "an integer out of range"
        least = f"{minimum:g}"
        raise InvalidRequest(f"from {least} to {MAX_SECONDS:g} seconds are allowed, not {shown}", where=where)
    return float(value)


def _short(seconds: float) -> float | int:
    """The same number in fewer bytes of msgpack."""
    return int(seconds) if math.trunc(seconds) == seconds else seconds


def _queue(name: object) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_QUEUE_CHARS or _NOT_IN_QUEUE.search(name):
        reason = f"a queue name is 1 to {MAX_QUEUE_CHARS} printable ASCII characters without spaces and :{{}}*?[]"
        raise InvalidRequest(reason, where="queue")
    return str.__str__(name)


def _priority(word: object) -> Priority:
    if isinstance(word, Priority):
        return word
    if isinstance(word, str) and word in _WORDS:
        return _WORDS[word]
    shown = ascii(word[:40]) if isinstance(word, str) else type(word).__name__
    raise InvalidRequest(f"one of {', '.join(_WORDS)} is needed, not {shown}", where="priority")


def _tags(tags: object) -> tuple[str, ...]:
    if not isinstance(tags, list | tuple | set | frozenset):
        raise InvalidRequest(f"a list, tuple or set of text is needed, not {type(tags).__name__}", where="tags")
    if len(tags) > MAX_TAGS:
        raise InvalidRequest(f"{len(tags)} tags, at most {MAX_TAGS} are allowed", where="tags")
    for tag in tags:
        if not isinstance(tag, str) or not 1 <= len(tag) <= MAX_TAG_CHARS or _CONTROL.search(tag):
            reason = f"a tag is 1 to {MAX_TAG_CHARS} characters of text without control characters"
            raise InvalidRequest(reason, where="tags")
    return tuple(sorted({str.__str__(tag) for tag in tags}))
