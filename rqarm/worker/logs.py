"""What a worker process writes to stderr: lines for people, or one JSON object a line for machines.

The library itself adds no handlers. A record that tells the end of a job carries its facts in ``record.rqarm``, a dict;
as JSON they are fields of their own. Messages hold text of others (URIs, errors), which must forge no line.
"""

from __future__ import annotations

import atexit
import io
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

from rq import logutils

from rqarm.text import plain

#: what is printed without an end of line becomes a record at this many characters
LONGEST_LINE = 8192


def to_stderr(form: str = "text", verbose: int = 0) -> None:
    """One line for each request; RQ's own lines with ``verbose`` 1, everything with 2.

    RQ adds no handler of its own where the root has one. As JSON, warnings, uncaught errors and what is printed to
    sys.stderr become records too. What a library of C or a child process writes to the descriptor does not.
    """
    as_json = form == "json"
    stream = sys.stderr.stream if isinstance(sys.stderr, PrintedLines) else sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=logging.DEBUG if verbose > 1 else logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("rqarm").setLevel(logging.DEBUG if verbose > 1 else logging.INFO)
    logutils.colorizer.notty = True  # its escape sequences would be written out
    if as_json:
        _make_records_of_all_else(stream)


def rq_level(verbose: int) -> str:
    """What RQ's own loggers tell; RQ has set them to INFO."""
    return ("WARNING", "INFO", "DEBUG")[min(verbose, 2)]


class TextFormatter(logging.Formatter):
    """A line for each record; tracebacks, and messages of others that have several lines, are indented.

    No control characters, and no line that looks like the start of another record.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        #: the last second of which a time was written, and as what
        self._second = 0, ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        second, text = self._second
        if second != int(record.created):
            second = int(record.created)
            text = time.strftime(self.default_time_format, self.converter(second))
            self._second = second, text
        return f"{text},{int(record.msecs):03d}"

    def formatMessage(self, record: logging.LogRecord) -> str:
        # ours are one line: a line break in them is a URI's or an error's
        is_ours = record.name.partition(".")[0] == "rqarm"
        record.message = plain(record.message, keep="" if is_ours else "\n\t")
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record), keep="\n\t").replace("\n", "\n    ")


class JsonFormatter(logging.Formatter):
    """One object of JSON in one line of ASCII, whatever the record holds.

    ``time`` (ISO 8601, UTC), ``level``, ``logger``, ``pid``, ``message``; then the facts of ``record.rqarm``, and
    ``exception`` with the traceback.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        facts = getattr(record, "rqarm", None)
        if isinstance(facts, Mapping):
            entry |= {name: fact for name, fact in _in_json(facts).items() if name not in entry}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        elif record.exc_text:
            entry["exception"] = record.exc_text
        if record.stack_info:
            entry["stack"] = record.stack_info
        return json.dumps(entry)


def _in_json(value: Any) -> Any:
    """The value in JSON's types: NaN and infinities are null, what JSON lacks is text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _in_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(item) for item in value]
    return str(value)


class PrintedLines(io.TextIOBase):
    """Stands for sys.stderr: each line that is printed becomes a record of the logger ``stderr``."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._mine = threading.local()  # threads do not end each other's lines, and a fork finds no lock held

    def write(self, text: str, /) -> int:
        if getattr(self._mine, "is_telling", False):
            return self.stream.write(text)  # logging itself has failed, and says so here
        *lines, rest = (getattr(self._mine, "begun", "") + text).split("\n")
        if len(rest) > LONGEST_LINE:
            lines, rest = [*lines, rest], ""
        self._mine.begun = rest
        self._tell(lines)
        return len(text)

    def drain(self) -> None:
        """Tell what was begun and not ended: the process ends."""
        begun, self._mine.begun = getattr(self._mine, "begun", ""), ""
        self._tell([begun])

    def _tell(self, lines: list[str]) -> None:
        self._mine.is_telling = True
        try:
            for line in lines:
                if line.strip():
                    _printed.warning("%s", line)
        finally:
            self._mine.is_telling = False

    def flush(self) -> None:
        self.stream.flush()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.stream.fileno()


_printed = logging.getLogger("stderr")
_uncaught = logging.getLogger("rqarm.worker")


def _make_records_of_all_else(stream: TextIO) -> None:
    logging.captureWarnings(True)
    lines = PrintedLines(stream)
    sys.stderr = lines
    sys.excepthook = _tell_uncaught
    threading.excepthook = lambda told: _tell_uncaught(told.exc_type, told.exc_value, told.exc_traceback)
    atexit.register(lines.drain)


def _tell_uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if error is not None and not issubclass(kind, SystemExit):
        _uncaught.critical("an error that nobody caught: %s", kind.__name__, exc_info=(kind, error, trace))
