"""Results as files. Whatever a handler has stored, a browser saves it and never shows it as a page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO

from flask import Response
from werkzeug.http import dump_options_header

from rqarm.codec import Envelope
from rqarm.dashboard.security import SANDBOX
from rqarm.dashboard.state import Dashboard
from rqarm.text import jsonable
from rqarm.uri import check_key

#: content types that are told to the browser; any other is bytes
INERT = frozenset({"text/plain", "text/csv", "application/json", "application/pdf", "application/zip", "image/png"})
#: a value up to this size is given as JSON, a larger one as the msgpack that is stored
JSON_BYTES = 16 << 20
PIECE_BYTES = 65_536


def answer(dashboard: Dashboard, key: str) -> Response:
    """The result of a request as a file. Raises what ``rm.cache.get`` raises."""
    cache = dashboard.manager.cache
    name = check_key(key)
    envelope = cache.envelope(name)
    if envelope.kind == "value" and envelope.size <= JSON_BYTES:
        text = json.dumps(jsonable(cache.get(name)), ensure_ascii=False, indent=1).encode()
        return _file(text, "application/json", f"{name}.json", len(text))
    return _file(_pieces(cache.open(name)), envelope.content_type, _filename(envelope, name), envelope.size)


def _file(body: bytes | Iterator[bytes], content_type: str, filename: str, size: int) -> Response:
    kind = content_type.partition(";")[0].strip().lower()
    response = Response(body, content_type=kind if kind in INERT else "application/octet-stream")
    response.headers["Content-Disposition"] = dump_options_header("attachment", {"filename": filename})
    response.headers["Content-Length"] = str(size)
    response.headers["Content-Security-Policy"] = SANDBOX
    return response


def _filename(envelope: Envelope, key: str) -> str:
    """The name that the handler gave, without what means something to a file system."""
    given = re.sub(r'[\x00-\x1f\x7f"\\/:*?<>|]', "_", envelope.filename).strip(". ")
    if given:
        return given[:150]
    return f"{key}.{'msgpack' if envelope.kind == 'value' else 'txt' if envelope.kind == 'text' else 'bin'}"


def _pieces(stored: IO[bytes]) -> Iterator[bytes]:
    with stored:
        while piece := stored.read(PIECE_BYTES):
            yield piece
