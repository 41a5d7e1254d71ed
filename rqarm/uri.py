"""The canonical form of a request, and the key that follows from it.

Owns the rules, the limits and the hash. It knows no request options and no Redis. The one idea: two texts get one
canonical form only if the rules below say that they ask for the same thing; in doubt they stay apart, because a
needless second run is cheaper than a wrong answer.

The rules, version 1. RFC numbers say where they come from; what is not listed is kept as it is.

* Form (RFC 3986 §3, §4.2): a URI, a path such as ``/cities/FR?x=1``, ``//host/path``, or a rootless name such as
  ``report/7``. The URI may be empty only when an operation is given. ``http``, ``https``, ``ws``, ``wss`` and ``ftp``
  need a host; only ``file`` may have an empty one (RFC 8089).
* Scheme: lower case (§6.2.2.1).
* Host: lower case; non-ASCII names by UTS 46 and IDNA 2008 (RFC 5891), ``xn--`` labels must be in their one correct
  spelling; IPv4 in plain dotted form only; IPv6 as eight groups shortened by RFC 5952 §4, without dotted tail and
  zone. A trailing dot is kept: it is another name in the DNS. ``_`` is allowed. Userinfo is refused: credentials do
  not belong in the identity of a request.
* Port: without leading zeros; the scheme's own port and an empty port are dropped (§6.2.3).
* Path: non-ASCII is written as escaped UTF-8, escapes in upper case, escaped unreserved characters are decoded
  (§6.2.2.2), then dot segments are removed (§5.2.4). Escaped reserved characters stay as they are: ``%2F`` is not
  ``/`` (§2.2). An empty path after a host is ``/``. A rootless name has no base, so it must not have dot segments;
  after ``scheme:`` they are kept. When removing dot segments would leave a path that reads as ``//host``, it is written
  ``/.//`` (as WHATWG URL does).
* Query: form data (WHATWG URL §5.1): split at ``&`` and the first ``=``, ``+`` is a space, escapes are UTF-8. Empty
  pieces (``a&&b``, a final ``?``) are no parameters. ``a`` and ``a=`` differ. ``;`` is data.
* ``params`` come after those in the URI; ignored ones are dropped; the rest is sorted by name in code point order. The
  order of values of one name is kept. In names and values everything is escaped but letters, digits, ``-._~,/:@``.
* Fragment: dropped (§3.5: it never reaches a server).
* Text is not normalised outside the host: composed and decomposed é differ, as they do for every web server.
* Refused, saying where: raw control characters, white space and lone surrogates anywhere; bad escapes; escapes that are
  not UTF-8; in the path raw ``" < > [ ] \\ ^ ` { | }`` (in the query they are data: browsers send them so); more than
  8,192 characters or 1,000 parameters. Escaped control characters, and those in ``params``, are data.

The rules depend on neither urllib nor the Python version: urlsplit deletes tabs and differs between releases, and
ipaddress writes mapped addresses differently since 3.13.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from ipaddress import IPv6Address
from operator import itemgetter

import idna

from rqarm.errors import InvalidRequest
from rqarm.model import OWN_OPERATION, Key

#: of the rules; it starts the hash input, so later rules cannot alias old keys
VERSION = 1
#: characters of a URI as given, of a parameter and of the canonical URI; servers commonly stop at 8 KiB
MAX_CHARS = 8_192
MAX_PARAMS = 1_000
MAX_OPERATION_CHARS = 200
#: so much longer is that of a follow-up, which holds the operation that it is about
MAX_OWN_PREFIX_CHARS = 30
#: characters of a family
MAX_FAMILY_CHARS = 100
#: integers above this size must be given as text: Python's own limit for writing them out can be moved
MAX_INT_BITS = 4_096

Scalar = str | int | float | bool
#: a decoded parameter; None is a bare name, ``a`` and not ``a=``
Pair = tuple[str, str | None]
Params = Mapping[str, Scalar | Sequence[Scalar]] | Sequence[tuple[str, Scalar | None]] | str

_DEFAULT_PORTS = {"http": "80", "ws": "80", "https": "443", "wss": "443", "ftp": "21"}

# RFC 3986 appendix B; DOTALL, so that it splits any text.
_SPLIT = re.compile(r"(?:([^:/?#]+):)?(?://([^/?#]*))?([^?#]*)(?:\?([^#]*))?(?:#(.*))?", re.DOTALL)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*")
# A fixed list: str.isspace() and \s follow the Unicode version of the Python.
_FORBIDDEN = re.compile("[\x00-\x20\x7f-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff\ud800-\udfff]")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_ESCAPE_RUN = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
_WIDE = re.compile(r"[^\x00-\x7f]+")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_PATH_ILLEGAL = re.compile(r'["<>\[\]\\^`{|}]')
_QUOTED = re.compile(r"[^A-Za-z0-9\-._~,/:@]+")
_is_plain = re.compile(r"[A-Za-z0-9\-._~,/:@]*").fullmatch
_OPERATION = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_\-]{0,61}[a-z0-9_])?")
_NUMBER_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = re.compile(rf"{_OCTET}(?:\.{_OCTET}){{3}}")
_KEY = re.compile(r"[A-Za-z0-9_\-]{1,200}")

# A URI whose part before the query is canonical already, and whose query needs only splitting and sorting. It must
# accept nothing that _base would change: no escapes, ports, numeric hosts or `--` labels; `/.` is looked for apart.
_FAST = re.compile(
    r"((?:(?:https?|wss?|ftp)://(?=[^/]{1,63}/)[a-z][a-z0-9]*(?:[.\-][a-z][a-z0-9]*)*(?=/)|(?!//))"
    r"/[A-Za-z0-9\-._~!$&'()*+,;=:@/]*)"
    r"(?:\?([A-Za-z0-9\-._~,/:@=&]*))?"
).fullmatch
_first = itemgetter(0)


@dataclass(frozen=True, slots=True)
class Step:
    """One rule that changed something; ``before`` and ``after`` are the part it changed, secrets included."""

    rule: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Canonical:
    """The canonical form of one request.

    ``uri`` is for reading and is itself canonical. ``text`` is the identity: version, operation and URI on a line
    each; neither can hold a line break, so no two requests share a text. ``key`` is the BLAKE2b-128 of its UTF-8.
    ``steps`` is filled when canonicalize was asked to explain.
    """

    uri: str
    text: str
    key: Key
    steps: tuple[Step, ...] = field(default=(), compare=False)

    @property
    def path(self) -> str:
        """The path as it stands in the canonical URI, still escaped."""
        match = _SPLIT.match(self.uri)
        return match[3] if match else ""

    @property
    def params(self) -> tuple[Pair, ...]:
        """All parameters, decoded, in canonical order."""
        return parse_query(self.uri.partition("?")[2], where="uri")


def canonicalize(
    uri: str,
    params: Params | None = None,
    *,
    operation: str = "",
    ignore_params: Sequence[str] = (),
    explain: bool = False,
) -> Canonical:
    """The canonical form of a URI with ``params`` merged in, by the rules of this module.

    ``params``: see normalize_params. ``ignore_params`` are fnmatch patterns on the decoded name, with regard to case;
    what they match does not count for the identity. Doing it twice changes nothing: the canonical URI of a canonical
    URI, with the same operation, is itself.

    Raises InvalidRequest whose ``where`` names the character (counted from 1) or the parameter: correct the request.

    Measured on Python 3.11: 4 us for a path with one parameter or an https URI with two, 10 to 13 us with ports or
    escapes. Not cached: requests differ, and a hit would save little beside the round trip that follows.
    """
    if type(uri) is not str:
        uri = _exact(uri, "uri")
    if operation or type(operation) is not str:
        operation = _check_operation(operation)
    steps: list[Step] | None = [] if explain else None
    pairs: list[tuple[str, str]]
    if not explain and len(uri) <= MAX_CHARS and (match := _FAST(uri)) and "/." not in match[1]:
        base, query = match.groups()
        pairs = _query_fast(query) if query else []
    else:
        base, pairs = _parse(uri, bool(operation), steps)
    if params is not None:
        before = pairs[:] if explain else pairs
        _merge(pairs, params)
        if explain:
            _note(steps, "merge params", _join("", before), _join("", pairs))
    if len(pairs) > MAX_PARAMS:
        raise InvalidRequest(f"{len(pairs):,} parameters, at most {MAX_PARAMS:,} are allowed", where=_source(params))
    if ignore_params:
        pairs = _drop_ignored(pairs, ignore_params, steps)
    if len(pairs) > 1:
        before = pairs
        pairs = sorted(pairs, key=_first)
        if explain:
            _note(steps, "sort parameters", _join("", before), _join("", pairs))
    canonical = _join(base, pairs)
    if len(canonical) > MAX_CHARS:
        reason = f"{len(canonical):,} characters in canonical form, at most {MAX_CHARS:,} are allowed"
        raise InvalidRequest(reason, where=_source(params))
    text = f"{VERSION}\n{operation}\n{canonical}"
    key = Key(blake2b(text.encode(), digest_size=16).hexdigest())
    return Canonical(canonical, text, key, tuple(steps) if steps else ())


def normalize_params(params: Params | None) -> tuple[Pair, ...]:
    """Parameters as decoded (name, value) pairs in the order given.

    Takes a query string (a leading ``?`` is allowed), a mapping, or (name, value) pairs, the form that comes out. A
    list or tuple as value is a repeated parameter, an empty one none. bool becomes ``true`` or ``false``, int its
    decimal digits, float its repr (so 1 and 1.0 differ). None in a pair is a bare name; in a mapping it is refused,
    because callers mean "not given" by it as often as "empty". Multi-dicts of werkzeug and Django (``lists()``) and
    Starlette (``multi_items()``) give all their values; ``items()`` would lose the repeated ones.

    Raises InvalidRequest with ``where`` such as ``params['x']``.
    """
    if params is None:
        return ()
    if isinstance(params, str):
        text = _exact(params, "params")
        lead = text.startswith("?")
        if "#" in text:
            raise InvalidRequest("a raw '#': write %23", where=_at("params", text.index("#")))
        _check_raw(text, "params")
        return parse_query(text[lead:], where="params", offset=int(lead))
    pairs: list[Pair] = []
    for key, value in _items(params):
        if not isinstance(key, str):
            raise InvalidRequest(f"a parameter name is text, not {type(key).__name__}", where="params")
        where = _param(key)
        name = _text(key, where)
        if isinstance(value, _BareName):
            if not name:
                raise InvalidRequest("a bare name cannot be empty", where=where)
            pairs.append((name, None))
        elif isinstance(value, list | tuple):
            pairs.extend((name, _text(each, where)) for each in value)
        else:
            pairs.append((name, _text(value, where)))
        if len(pairs) > MAX_PARAMS:
            raise InvalidRequest(f"more than {MAX_PARAMS:,} parameters", where="params")
    return tuple(pairs)


def parse_query(query: str, *, where: str = "query", offset: int = 0) -> tuple[Pair, ...]:
    """The decoded pairs of form data, in the order given; ``a`` is (a, None), ``a=`` is (a, "").

    ``where`` and ``offset`` (characters before the query) place an error. Raises InvalidRequest when an escape is not
    UTF-8 or there are too many parameters. Source: WHATWG URL §5.1, but strict about UTF-8.
    """
    pairs: list[Pair] = []
    for piece in query.split("&"):
        if piece:
            name, equals, value = piece.partition("=")
            decoded = _unescape(name.replace("+", " "), where, offset)
            at = offset + len(name) + 1
            pairs.append((decoded, _unescape(value.replace("+", " "), where, at) if equals else None))
        offset += len(piece) + 1
    if len(pairs) > MAX_PARAMS:
        raise InvalidRequest(f"{len(pairs):,} parameters, at most {MAX_PARAMS:,} are allowed", where=where)
    return tuple(pairs)


def check_key(text: str) -> Key:
    """A readable key, unchanged. Raises InvalidRequest when it is not 1 to 200 letters, digits, ``_`` or ``-``.

    RQ allows no more in the job id that starts with it.
    """
    if not isinstance(text, str) or not _KEY.fullmatch(text):
        shown = ascii(text[:40]) if isinstance(text, str) else type(text).__name__
        raise InvalidRequest(f"a key is 1 to 200 ASCII letters, digits, '_' or '-', not {shown}", where="key")
    return Key(_exact(text, "key"))


def family(uri: str | Canonical, operation: str = "") -> str:
    """A coarse name for requests that take about as long: the operation, else host and first path segment.

    ``/cities/FR?x=1`` is ``/cities``, ``https://api.x.org/v1/items`` is ``api.x.org/v1``, ``urn:isbn:1`` is
    ``urn:isbn``. At most 100 characters. Never raises.
    """
    if operation:
        return operation[:MAX_FAMILY_CHARS]
    match = _SPLIT.match(uri.uri if isinstance(uri, Canonical) else uri)
    if match is None:  # cannot be: the pattern takes any text
        return ""
    scheme, authority, path = match[1], match[2], match[3]
    rooted = path.startswith("/")
    first = path[rooted:].partition("/")[0]
    first = f"/{first}" if rooted else first.partition(":")[0]
    if authority is not None:
        first = authority.rpartition("@")[2] + first
    elif scheme is not None:
        first = f"{scheme}:{first}"
    return first[:MAX_FAMILY_CHARS]


def redact(uri: str, secret_params: Sequence[str]) -> str:
    """The text with secret parameter values and any userinfo replaced by ``***``. Never raises, whatever the text.

    ``secret_params`` are fnmatch patterns on the decoded name, without regard to case. Works on text that
    canonicalize refuses, since that is what gets logged, and hides too much rather than too little: it looks in the
    fragment (OAuth puts tokens there) and behind ``;`` and a second ``?`` as well. What is no text becomes ``***``.
    """
    if not isinstance(uri, str):
        return "***"
    uri = str.__str__(uri)
    if "@" in uri:
        uri = _USERINFO_ODD.sub(r"\1***@", uri)
        uri = _USERINFO.sub(r"\1***@", uri)
    start = _TAIL.search(uri)
    if start is None:
        return uri
    is_secret = _secret_names(secret_params)
    if is_secret is None:
        return uri
    cut = start.end()
    pieces = _SEPARATOR.split(uri[cut:])
    return uri[:cut] + "".join(_redact_piece(piece, is_secret) for piece in pieces)


def is_secret(name: str, secret_params: Sequence[str]) -> bool:
    """Whether ``redact`` hides the value of a parameter of this name, which is decoded."""
    matches = _secret_names(secret_params)
    return matches is not None and matches(name.lower()) is not None


def _secret_names(secret_params: Sequence[str]) -> Callable[[str], object] | None:
    names = (secret_params,) if isinstance(secret_params, str) else secret_params
    patterns = tuple(name.lower() for name in names if isinstance(name, str))
    return _matcher(patterns) if patterns else None


_TAIL = re.compile(r"[?#]")
_SEPARATOR = re.compile(r"([&#])")
_NAME = re.compile(r"(?:^|[;?])([^=;?]*)=")
# Userinfo at the start of a text, also with backslashes or without `//`; and in a URI that is a parameter's value.
_USERINFO = re.compile(r"((?:^[^/\\?#:]*:[/\\]*|^[/\\]{2,}|[=:]//))[^/\\?#&]*@")
# A password with a raw `/`, `?` or `#`: what follows the host's colon is no port, so everything up to the last @ goes.
_USERINFO_ODD = re.compile(r"^((?:[^/\\?#:]*:)?[/\\]{2,})[^/\\?#:\[\]]*:(?![0-9]*(?:[/\\?#]|$)).*@", re.DOTALL)


def _redact_piece(piece: str, is_secret: Callable[[str], object]) -> str:
    name, equals, _ = piece.partition("=")
    if not equals:
        return piece
    if is_secret(_decode_loosely(name)):
        return f"{name}=***"
    for match in _NAME.finditer(piece):
        if is_secret(_decode_loosely(match[1])):
            return piece[: match.end()] + "***"
    return piece


def _decode_loosely(name: str) -> str:
    if "%" in name:
        name = _ESCAPE_RUN.sub(lambda run: bytes.fromhex(run[0].replace("%", "")).decode(errors="replace"), name)
    return name.replace("+", " ").lower()


# -- the URI ---------------------------------------------------------------------------------------------------------


def _parse(uri: str, has_operation: bool, steps: list[Step] | None) -> tuple[str, list[tuple[str, str]]]:
    """The canonical part before the query, and the parameters as (name, escaped pair)."""
    if len(uri) > MAX_CHARS:
        raise InvalidRequest(f"{len(uri):,} characters, at most {MAX_CHARS:,} are allowed", where="uri")
    _check_raw(uri, "uri")
    match = _SPLIT.match(uri)
    if match is None:  # cannot be: the pattern takes any text
        raise InvalidRequest("not a URI", where="uri")
    scheme, authority, path, query, fragment = match.groups()
    if fragment is not None:
        _note(steps, "drop fragment", f"#{fragment}", "")
    base = ""
    if scheme is not None:
        base = _scheme(scheme, steps)
        if base in _DEFAULT_PORTS and authority is None:
            raise InvalidRequest(f"{base} needs a host: {base}://host/path", where=_at("uri", match.end(1)))
    if authority is not None:
        host = _authority(authority, match.start(2), base, steps)
        base = f"{base}://{host}" if scheme is not None else f"//{host}"
    elif scheme is not None:
        base += ":"
    elif path.startswith(":"):
        raise InvalidRequest("the scheme before ':' is missing: start a path with '/'", where=_at("uri", 0))
    base += _path(path, match.start(3), scheme is not None, authority is not None, steps)
    if not base and not has_operation:
        raise InvalidRequest("the URI is empty: give a URI or an operation", where="uri")
    if not query:
        if query is not None:
            _note(steps, "drop empty query", "?", "")
        return base, []
    pairs = [(name, _escape(name, value)) for name, value in parse_query(query, where="uri", offset=match.start(4))]
    pieces = [piece for piece in query.split("&") if piece]
    _note(steps, "drop empty parameters", query, "&".join(pieces))
    _note(steps, "normalise escapes of parameters", "&".join(pieces), "&".join(pair for _, pair in pairs))
    return base, pairs


def _check_raw(text: str, label: str) -> None:
    """Refuse what no component may hold."""
    if len(text) > MAX_CHARS:
        raise InvalidRequest(f"{len(text):,} characters, at most {MAX_CHARS:,} are allowed", where=label)
    if bad := _FORBIDDEN.search(text):
        raise InvalidRequest(_describe(bad[0]), where=_at(label, bad.start()))
    if bad := _BAD_ESCAPE.search(text):
        reason = "an invalid percent escape: write a '%' itself as %25"
        raise InvalidRequest(reason, where=_at(label, bad.start()))


def _describe(char: str) -> str:
    code = ord(char)
    if char == " ":
        return "a raw space: write %20"
    if code < 0x20 or 0x7F <= code < 0xA0:
        return f"a raw control character U+{code:04X}"
    if 0xD800 <= code <= 0xDFFF:
        return f"a lone surrogate U+{code:04X}, it has no UTF-8"
    return f"raw white space U+{code:04X}: percent-encode it"


def _scheme(scheme: str, steps: list[Step] | None) -> str:
    if not _SCHEME.fullmatch(scheme):
        reason = "what comes before the first ':' is not a scheme: start a path with '/', or write %3A"
        raise InvalidRequest(reason, where=_at("uri", 0))
    _note(steps, "lower-case scheme", scheme, scheme.lower())
    return scheme.lower()


def _authority(authority: str, at: int, scheme: str, steps: list[Step] | None) -> str:
    if "@" in authority:
        reason = "userinfo: credentials do not belong in the identity of a request; give them to the handler's settings"
        raise InvalidRequest(reason, where=_at("uri", at))
    host, port = authority, ""
    if (colon := authority.rfind(":")) > authority.rfind("]"):
        host, port = authority[:colon], authority[colon + 1 :]
    try:
        name = _host(host) if host or scheme != "file" else ""
    except ValueError as error:
        raise InvalidRequest(str(error), where=_at("uri", at)) from None
    if name != host.lower():
        _note(steps, "IPv6 form" if host.startswith("[") else "IDNA host", host, name)
    else:
        _note(steps, "lower-case host", host, name)
    if colon < len(host):
        return name
    number = port.lstrip("0")
    if port and not (number.isascii() and number.isdigit() and len(number) <= 5 and int(number) <= 65_535):
        raise InvalidRequest("the port is not a number from 1 to 65535", where=_at("uri", at + colon + 1))
    _note(steps, "normalise port", f":{port}", f":{number}" if number else "")
    if number and number != _DEFAULT_PORTS.get(scheme):
        return f"{name}:{number}"
    if number:
        _note(steps, "drop default port", f":{number}", "")
    return name


@lru_cache(maxsize=512)  # few hosts, many requests; IDNA takes tens of microseconds
def _host(host: str) -> str:
    """The canonical host. Raises ValueError with the reason."""
    if host.startswith("["):
        if not host.endswith("]"):
            raise ValueError("the IPv6 address does not end with ']'")
        return f"[{_ipv6(host[1:-1])}]"
    try:
        name = _unescape(host, "uri", 0)
    except InvalidRequest as error:
        raise ValueError(error.reason) from None
    if not name:
        raise ValueError("the host is empty")
    if len(name) > 254:
        raise ValueError("the host is longer than 253 characters")
    if name.isascii():
        name = name.lower()
    elif "\u1e9e" in name:
        # Unicode 15.1 changed its mapping from ss to ß: the key would follow the release of the idna package.
        raise ValueError("the host has a capital sharp s: write ß or ss")
    else:
        name = _uts46(name)
    labels = name.split(".")
    dot = "." if len(labels) > 1 and not labels[-1] else ""
    if dot:
        labels.pop()
    if _NUMBER_LABEL.fullmatch(labels[-1]):
        if not _IPV4.fullmatch(name):
            raise ValueError("the host ends in a number and is no IPv4 address in plain dotted form")
        return name
    name = ".".join([_label(label) for label in labels])
    if len(name) > 253:
        raise ValueError("the host is longer than 253 characters")
    return name + dot


def _uts46(name: str) -> str:
    try:
        return idna.uts46_remap(name, std3_rules=False)
    except (idna.IDNAError, ValueError):
        raise ValueError("the host is not a valid international domain name") from None


def _label(label: str) -> str:
    if not label.isascii() or label.startswith("xn--"):
        try:
            name = idna.alabel(idna.ulabel(label)).decode("ascii")
        except (idna.IDNAError, ValueError, IndexError):
            raise ValueError("the host is not a valid international domain name") from None
        if label.isascii() and label != name:
            raise ValueError("the host has an xn-- label in a wrong spelling")
        label = name
    if not _LABEL.fullmatch(label):
        raise ValueError("the host has an empty or too long label, or a character that no host may have")
    return label


def _ipv6(text: str) -> str:
    """RFC 5952 §4: lower-case groups, the first longest run of at least two zero groups as ``::``."""
    if "%" in text:
        raise ValueError("an IPv6 zone names an interface of this machine: leave it out")
    try:
        packed = IPv6Address(text).packed
    except ValueError:
        raise ValueError("not an IPv6 address") from None
    groups = [f"{packed[i] << 8 | packed[i + 1]:x}" for i in range(0, 16, 2)]
    for length in range(8, 1, -1):
        for start in range(9 - length):
            if all(group == "0" for group in groups[start : start + length]):
                return ":".join(groups[:start]) + "::" + ":".join(groups[start + length :])
    return ":".join(groups)


def _path(path: str, at: int, has_scheme: bool, has_host: bool, steps: list[Step] | None) -> str:
    if bad := _PATH_ILLEGAL.search(path):
        reason = f"a raw {bad[0]!r} in the path: write %{ord(bad[0]):02X}"
        raise InvalidRequest(reason, where=_at("uri", at + bad.start()))
    if "%" in path:
        _unescape(path, "uri", at)
    if not path.isascii():
        before, path = path, _WIDE.sub(_percent, path)
        _note(steps, "percent-encode non-ASCII", before, path)
    if "%" in path:
        before, path = path, _ESCAPE.sub(lambda escape: escape[0].upper(), path)
        _note(steps, "upper-case escapes", before, path)
        before, path = path, _ESCAPE.sub(_decode_unreserved, path)
        _note(steps, "decode unreserved", before, path)
    if not path:
        if has_host:
            _note(steps, "empty path becomes /", "", "/")
        return "/" if has_host else ""
    if not path.startswith("/"):
        segments = path.split("/")
        if not has_scheme and ("." in segments or ".." in segments):
            reason = "dot segments in a relative path have no base to start from: begin the path with '/'"
            raise InvalidRequest(reason, where=_at("uri", at))
        return path
    before, path = path, _remove_dot_segments(path) if "/." in path else path
    if path.startswith("//") and not has_host:
        path = "/." + path
    _note(steps, "remove dot segments", before, path)
    return path


def _remove_dot_segments(path: str) -> str:
    """RFC 3986 §5.2.4 for a path that starts with ``/``."""
    kept: list[str] = []
    segment = ""
    for segment in path[1:].split("/"):
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segment in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)


def _decode_unreserved(escape: re.Match[str]) -> str:
    char = chr(int(escape[0][1:], 16))
    return char if char in _UNRESERVED else escape[0]


def _percent(run: re.Match[str]) -> str:
    return "".join([f"%{byte:02X}" for byte in run[0].encode()])


def _unescape(text: str, label: str, at: int) -> str:
    """Escapes decoded as strict UTF-8. Raw characters are whole, so each run of escapes must be valid by itself."""
    if "%" not in text:
        return text

    def decode(run: re.Match[str]) -> str:
        try:
            return bytes.fromhex(run[0].replace("%", "")).decode()
        except UnicodeDecodeError as error:
            where = _at(label, at + run.start() + 3 * error.start)
            raise InvalidRequest("the percent escape is not UTF-8", where=where) from None

    return _ESCAPE_RUN.sub(decode, text)


# -- parameters ------------------------------------------------------------------------------------------------------


class _BareName:
    """Stands for the None of a pair, which is a bare name; the None of a mapping is an error."""


_BARE = _BareName()


def _items(params: object) -> Iterable[tuple[object, object]]:
    """(name, value or values) of whatever holds parameters."""
    if type(params) is dict:
        return params.items()
    for name in ("lists", "multi_items"):
        method = getattr(params, name, None)
        if callable(method):
            return list(method())
    if isinstance(params, Mapping):
        return params.items()
    if isinstance(params, list | tuple):
        return [_pair(pair) for pair in params]
    kind = type(params).__name__
    raise InvalidRequest(f"params are a mapping, a query string or (name, value) pairs, not {kind}", where="params")


def _pair(pair: object) -> tuple[object, object]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise InvalidRequest("a list of params holds (name, value) pairs only", where="params")
    name, value = pair
    if isinstance(value, list | tuple):
        raise InvalidRequest("a pair holds one value: repeat the pair", where=_param(name))
    return name, _BARE if value is None else value


def _text(value: object, where: str) -> str:
    """A parameter's value as text; the methods of the base types, so that enums and NumPy floats cannot differ."""
    if isinstance(value, str):
        if len(value) > MAX_CHARS:
            raise InvalidRequest(f"{len(value):,} characters, at most {MAX_CHARS:,} are allowed", where=where)
        return _exact(value, where)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        if value.bit_length() > MAX_INT_BITS:
            raise InvalidRequest("the integer is too large: give it as text", where=where)
        return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value)
    if value is None:
        raise InvalidRequest("None has no text: leave the parameter out, or give '' for an empty value", where=where)
    raise InvalidRequest(f"{type(value).__name__} has no agreed text: give a str, int, float or bool", where=where)


def _exact(text: str, where: str) -> str:
    """A plain str with the same characters. Raises InvalidRequest for other types and lone surrogates."""
    if not isinstance(text, str):
        raise InvalidRequest(f"text is needed, not {type(text).__name__}", where=where)
    if not text.isascii() and (bad := _SURROGATE.search(text)):
        raise InvalidRequest(_describe(bad[0]), where=_at(where, bad.start()))
    return str.__str__(text)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _query_fast(query: str) -> list[tuple[str, str]]:
    """Parameters of a query in which nothing but a second ``=`` in a value would need escaping."""
    pairs = []
    for piece in query.split("&"):
        name, equals, value = piece.partition("=")
        if "=" in value:
            pairs.append((name, f"{name}={value.replace('=', '%3D')}"))
        elif name or equals:
            pairs.append((name, piece))
    return pairs


def _merge(pairs: list[tuple[str, str]], params: Params) -> None:
    """Append params as (name, escaped pair)."""
    if type(params) is not dict:
        pairs.extend([(name, _escape(name, value)) for name, value in normalize_params(params)])
        return
    for name, value in params.items():
        if type(value) is str and type(name) is str and _is_plain(name) and _is_plain(value):
            pairs.append((name, f"{name}={value}"))
        else:
            pairs.extend([(name, _escape(name, value)) for name, value in normalize_params({name: value})])


def _escape(name: str, value: str | None) -> str:
    quoted = name if _is_plain(name) else _QUOTED.sub(_percent, name)
    if value is None:
        return quoted
    return f"{quoted}={value if _is_plain(value) else _QUOTED.sub(_percent, value)}"


def _drop_ignored(
    pairs: list[tuple[str, str]], patterns: Sequence[str], steps: list[Step] | None
) -> list[tuple[str, str]]:
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise InvalidRequest("a list of patterns is needed", where="ignore_params")
    is_ignored = _matcher(tuple(patterns))
    kept = []
    for name, pair in pairs:
        if is_ignored(name):
            _note(steps, "ignore parameter", pair, "")
        else:
            kept.append((name, pair))
    return kept


@lru_cache(maxsize=128)
def _matcher(patterns: tuple[str, ...]) -> Callable[[str], object]:
    """fnmatchcase for several patterns in one regular expression."""
    return re.compile("|".join([fnmatch.translate(pattern) for pattern in patterns])).match


def _join(base: str, pairs: list[tuple[str, str]]) -> str:
    return f"{base}?{'&'.join([pair for _, pair in pairs])}" if pairs else base


def _check_operation(operation: str) -> str:
    operation = _exact(operation, "operation")
    if not operation:
        return ""
    reserved = MAX_OWN_PREFIX_CHARS if operation.startswith(OWN_OPERATION) else 0
    if len(operation) > MAX_OPERATION_CHARS + reserved:
        reason = f"{len(operation):,} characters, at most {MAX_OPERATION_CHARS} are allowed"
        raise InvalidRequest(reason, where="operation")
    if not _OPERATION.fullmatch(operation) or operation[0] == " " or operation[-1] == " ":
        raise InvalidRequest("control characters, line breaks and outer spaces are not allowed", where="operation")
    return operation


# -- where and what --------------------------------------------------------------------------------------------------


def _at(label: str, index: int) -> str:
    return f"{label} at character {index + 1}"


def _param(name: object) -> str:
    shown = ascii(name[:40]) if isinstance(name, str) else type(name).__name__
    return f"params[{shown}]"


def _source(params: object) -> str:
    return "uri" if params is None else "uri and params"


def _note(steps: list[Step] | None, rule: str, before: str, after: str) -> None:
    if steps is not None and before != after:
        steps.append(Step(rule, before, after))
