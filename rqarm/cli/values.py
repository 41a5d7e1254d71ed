"""Write the value of a request: bytes as they are, text as text, everything else as JSON."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterator
from typing import IO, Any, cast

import click

from rqarm import codec, packing
from rqarm.cli.common import complain, is_terminal, json_text
from rqarm.manager import RequestManager
from rqarm.result import Result
from rqarm.text import plain, size

#: bytes read and written at a time
PIECE = 1 << 20


def write_value(rm: RequestManager, key: str, path: str | None) -> None:
    """Write the result to a file, or to stdout (no path, or ``-``). Raises what ``rm.cache.open`` raises, OSError.

    A file appears when it is complete: what was there before stays until then.
    """
    with rm.cache.open(key) as stored:
        envelope = _envelope(stored)
        if path not in (None, "-"):
            with _replacing(str(path)) as file:
                if envelope.kind == "value":
                    file.write(_value_text(rm, stored).encode())
                else:
                    shutil.copyfileobj(stored, file, PIECE)
            complain(f"the value is in {path}")
        elif envelope.kind == "value":
            click.echo(_value_text(rm, stored), nl=False)
        elif not is_terminal(sys.stdout):
            _copy_to_stdout(stored)
        elif _is_text(envelope):
            _show_text(stored)
        else:
            name = f" named {envelope.filename!r}" if envelope.filename else ""
            complain(f"the value is {size(envelope.size)} of {envelope.content_type}{name}: write it with -o FILE")


def read_value(rm: RequestManager, key: str) -> Any:
    """The whole value, for a JSON document; of a file its bytes."""
    value = rm.cache.get(key)
    return value.data if isinstance(value, Result) else value


def _envelope(stored: IO[bytes]) -> codec.Envelope:
    # one look at the record for the bytes and what they are: a second could meet another result
    return cast("codec.ChunkReader", cast("io.BufferedReader", stored).raw).envelope


def _value_text(rm: RequestManager, stored: IO[bytes]) -> str:
    return json_text(packing.unpack(stored.read(), max_bytes=rm.settings.max_result_bytes)) + "\n"


def _is_text(envelope: codec.Envelope) -> bool:
    kind = envelope.content_type.partition(";")[0].strip().lower()
    return envelope.kind == "text" or kind.startswith("text/") or kind == "application/json" or kind.endswith("+json")


def _show_text(stored: IO[bytes]) -> None:
    """Text of others on a terminal: harmless, and with a line break at its end."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    last = "\n"
    while piece := stored.read(PIECE):
        text = decoder.decode(piece).replace("\r\n", "\n")
        click.echo(plain(text, keep="\n\t"), nl=False)
        last = text[-1:] or last
    if last != "\n":
        click.echo()


def _copy_to_stdout(stored: IO[bytes]) -> None:
    sys.stdout.flush()
    shutil.copyfileobj(stored, sys.stdout.buffer, PIECE)
    sys.stdout.buffer.flush()


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[IO[bytes]]:
    """A file that takes its name when the block ends well. Devices and pipes are written directly."""
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        with open(target, "wb") as file:
            yield file
        return
    part = f"{target}.{os.getpid()}.part"
    try:
        with open(part, "xb") as file:
            yield file
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise
