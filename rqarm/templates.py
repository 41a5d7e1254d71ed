"""URI templates: which requests a route takes, and what stands in their paths.

A template is matched against the path of the canonical URI, percent-decoded segment by segment, so that ``%2F`` never
splits one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote

from rqarm.errors import ConfigError, InvalidRequest
from rqarm.request import BatchRequest

#: what may stand in a path segment besides letters, digits and ``-._~`` (RFC 3986, section 3.3, pchar)
_PCHAR = "!$&'()*+,;=:@"
#: RFC 3986, appendix B, without the fragment
_URI = re.compile(r"(?:([^:/?#]+):)?(?://([^/?#]*))?([^?#]*)(?:\?(.*))?", re.DOTALL)
PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
INT = r"[+-]?[0-9]+"
FLOAT = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
#: converter of a placeholder -> (what it matches, the type it gives)
CONVERTERS: dict[str, tuple[str, type]] = {
    "": (r"[^/]+", str),
    "int": (INT, int),
    "float": (FLOAT, float),
    "path": (r".+", str),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A canonical URI in the pieces that matching needs.

    ``site``: scheme and authority, empty when there is no authority. ``path``: still encoded. ``decoded``: the path
    decoded except for ``%25`` and, inside a segment, ``%2F``.
    """

    site: str
    path: str
    decoded: str
    query: str

    @classmethod
    def of(cls, canonical: str) -> Target:
        scheme, authority, path, query = _URI.fullmatch(canonical).groups()  # type: ignore[union-attr]  # fits any text
        if authority is not None:
            return cls(f"{scheme or ''}://{authority}", path, _decode(path), query or "")
        # the canonical form writes a path that starts with // so, lest it read as a host
        path = path.removeprefix("/.") if path.startswith("/.//") else path
        return cls("", path, _decode(path), query or "")


def _decode(path: str) -> str:
    """Every segment decoded, with the two characters escaped that would make the result ambiguous."""
    if "%" not in path:
        return path
    return "/".join(unquote(part).replace("%", "%25").replace("/", "%2F") for part in path.split("/"))


def _plain(decoded: str) -> str:
    return decoded.replace("%2F", "/").replace("%25", "%")


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled URI template. ``pieces`` alternate between literal text, still encoded, and placeholder names."""

    text: str
    site: str
    regex: re.Pattern[str]
    converters: dict[str, str]
    pieces: tuple[str, ...]

    @classmethod
    def compile(cls, text: str) -> Template:
        """Raises ConfigError that says what is wrong with the template."""
        site, path = split_template(text)
        pieces = PLACEHOLDER.split(path)
        converters: dict[str, str] = {}
        for index in range(1, len(pieces), 2):
            name, colon, converter = pieces[index].partition(":")
            if not name.isidentifier() or (colon and converter not in CONVERTERS) or colon + converter == ":":
                known = ", ".join(f"{{name:{each}}}" for each in CONVERTERS if each)
                raise ConfigError(f"template {text!r}: {{{pieces[index]}}} is none of {{name}}, {known}")
            if name in converters:
                raise ConfigError(f"template {text!r}: {{{name}}} stands there twice")
            if index > 1 and not pieces[index - 1]:
                raise ConfigError(f"template {text!r}: text must stand between two placeholders")
            converters[name], pieces[index] = converter, name
        literals = _check_literals(text, pieces[::2])
        regex = re.escape(_decode(literals[0]))
        for name, literal in zip(pieces[1::2], literals[1:], strict=True):
            regex += f"(?P<{name}>{CONVERTERS[converters[name]][0]})" + re.escape(_decode(literal))
        return cls(text, site, re.compile(regex, re.DOTALL), converters, tuple(pieces))

    @classmethod
    def under(cls, prefix: str) -> Template:
        """The template of everything at and below ``prefix``, which has no placeholders."""
        prefix = prefix.removesuffix("/")
        if PLACEHOLDER.search(prefix):
            raise ConfigError(f"prefix {prefix!r}: placeholders cannot stand in a prefix")
        site, path = split_template(prefix or "/")
        path = path.removesuffix("/")
        _check_literals(prefix, [path])
        regex = re.compile(re.escape(_decode(path)) + "(?:/.*)?", re.DOTALL)
        return cls(f"{prefix}/*", site, regex, {}, (path,))

    def match(self, target: Target) -> dict[str, str] | None:
        """The decoded texts of the placeholders, None when the target is not one of ours."""
        if self.site and self.site != target.site:
            return None
        found = self.regex.fullmatch(target.decoded)
        return found and {name: _plain(text) for name, text in found.groupdict().items()}

    def build(self, texts: Mapping[str, str]) -> str:
        """The URI with the placeholders filled in, percent-encoded."""
        uri = quote(self.pieces[0], safe=_PCHAR + "/%")
        for name, literal in zip(self.pieces[1::2], self.pieces[2::2], strict=True):
            safe = _PCHAR + "/" if self.converters[name] == "path" else _PCHAR
            uri += quote(texts[name], safe=safe) + quote(literal, safe=_PCHAR + "/%")
        return f"/.{uri}" if uri.startswith("//") and not self.site else self.site + uri


def split_template(text: str) -> tuple[str, str]:
    """The canonical scheme and authority, and the path as it stands there."""
    if text.startswith("/") and not text.startswith("//"):
        return "", text
    whole = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*://[^/{}?#]+)(/.*)?", text, re.DOTALL)
    if not whole:
        raise ConfigError(
            f"template {text!r} must start with / or with a scheme and a host, such as https://api.x.org/"
        )
    try:
        return Target.of(BatchRequest(f"{whole[1]}/").canonical).site, whole[2] or "/"
    except InvalidRequest as error:
        raise ConfigError(f"template {text!r}: {error}") from error


def _check_literals(text: str, literals: list[str]) -> list[str]:
    joined = "\0".join(literals)
    if "?" in joined or "#" in joined:
        raise ConfigError(f"template {text!r}: ? and # cannot stand there; query parameters come from the signature")
    if "{" in joined or "}" in joined:
        raise ConfigError(f"template {text!r}: a brace stands alone")
    if any(_decode(part) in (".", "..") for part in joined.split("/")):
        raise ConfigError(f"template {text!r}: no canonical URI has the segments . and ..")
    return literals


def takes(name: str, request: BatchRequest) -> bool:
    """Whether a route of this name, which is its template or operation, would take the request."""
    if request.operation:
        return request.operation == name
    try:
        template = Template.compile(name)
    except ConfigError:
        return False
    return template.match(Target.of(request.canonical)) is not None
