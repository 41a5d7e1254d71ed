"""A file that a handler returns and a reader gets: its bytes, and what its type and name may be."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import quote

from rqarm.errors import UnpackableResult

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
        if not isinstance(self.data, Iterable) and not is_file(self.data):
            raise UnpackableResult("$.data", f"not bytes, str, iterable or file but {type(self.data).__name__}")
        if self.content_type is not None and (reason := content_type_fault(self.content_type)):
            raise UnpackableResult("$.content_type", reason)
        if self.filename is not None and (reason := filename_fault(self.filename)):
            raise UnpackableResult("$.filename", reason)


def content_type_fault(content_type: Any) -> str:
    if type(content_type) is not str or len(content_type) > 255 or not _CONTENT_TYPE.fullmatch(content_type):
        return "must be type/subtype in printable ASCII, at most 255 characters"
    return ""


def filename_fault(filename: Any) -> str:
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


def disposition(kind: str, filename: str) -> str:
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


def is_file(obj: Any) -> bool:
    return callable(getattr(obj, "read", None)) and not isinstance(obj, type)
