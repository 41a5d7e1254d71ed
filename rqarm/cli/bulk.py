"""``rqarm submit --from``: a request per line, a URI or a JSON object. A wrong line stops none of the others."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import IO, Any

import click

from rqarm.bulk import CHUNK, Entry
from rqarm.cli.common import (
    FAILURE,
    INTERRUPTED,
    NOT_READY,
    USAGE,
    complain,
    document_of,
    exit_code,
    exit_code_of,
    is_terminal,
    json_text,
)
from rqarm.cli.waiting import Line
from rqarm.errors import InvalidRequest
from rqarm.manager import RequestManager
from rqarm.model import BatchStatus, Outcome
from rqarm.request import BatchRequest

#: a request has 48 KiB at the most; the rest is for its payload
MAX_LINE_BYTES = 16 << 20
#: what a JSON line may say
FIELDS = frozenset(
    ("uri", "params", "operation", "sticky", "ttl", "key", "queue", "priority", "estimated_time", "tags", "payload")
)
#: what people are told of a submit that is not ``durable``
NOT_DURABLE = (
    "the server has taken it, and did not say within durable_timeout that it is safe (durability): it may be lost if "
    "the server breaks down now; then submit it again"
)


class Lines:
    """The requests in a file. ``options``: those of the command, for what a line does not say itself.

    ``waiting`` has the numbers of the lines that were given out, first in first; who settles one takes it from there.
    """

    def __init__(self, file: IO[bytes], name: str, options: dict[str, Any], say: Callable[[str], None]) -> None:
        self._file, self._name, self._options, self._say = file, name, options, say
        self.waiting: deque[int] = deque()
        #: lines that are no request, and all that were not taken
        self.read_bytes = self.invalid = self.bad = 0

    def __iter__(self) -> Iterator[Entry]:
        number = 0
        while line := self._file.readline(MAX_LINE_BYTES + 1):
            number += 1
            self.read_bytes += len(line)
            try:
                entry = self._entry(line, is_first=number == 1)
            except InvalidRequest as error:
                self.invalid += 1
                self.refuse(number, error)
                continue
            if entry is not None:
                self.waiting.append(number)
                yield entry

    def refuse(self, number: int, error: Exception) -> None:
        """Tell what is wrong with a line."""
        self.bad += 1
        self._say(f"{self._name}:{number}: {error}")

    def _entry(self, line: bytes, *, is_first: bool) -> Entry | None:
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = self._file.readline(MAX_LINE_BYTES)
                self.read_bytes += len(line)
            raise InvalidRequest(f"the line is longer than {MAX_LINE_BYTES:,} bytes")
        try:
            text = line.decode("utf-8-sig" if is_first else "utf-8").strip(" \t\r\n")
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"the line is not UTF-8 (byte {error.start + 1})") from None
        if not text:
            return None
        return self._from_json(text) if text.startswith("{") else BatchRequest(text, **self._options)

    def _from_json(self, text: str) -> Entry:
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"not JSON: {error}"[:300]) from None
        if unknown := sorted(set(fields) - FIELDS):
            named = ", ".join(map(ascii, unknown))[:100]
            raise InvalidRequest(f"no such field: {named}; there are {', '.join(sorted(FIELDS))}")
        payload = fields.pop("payload", None)
        chosen = {**self._options, **{name: value for name, value in fields.items() if value is not None}}
        if "ttl" in fields and fields["ttl"] is not None and "sticky" not in fields:
            chosen["sticky"] = False
        if fields.get("sticky") and "ttl" not in fields:
            chosen["ttl"] = None
        return (BatchRequest(chosen.pop("uri", ""), chosen.pop("params", None), **chosen), payload)


class Progress:
    """How far a file is: a bar when its size is known, else a count; nothing where nobody looks."""

    def __init__(self, file: IO[bytes]) -> None:
        self._is_shown = is_terminal(sys.stderr)
        self._size, self._done = _size_of(file), 0
        self._bar: Any = None
        self._line = Line()

    def __enter__(self) -> Progress:
        if self._is_shown and self._size:
            self._bar = click.progressbar(length=self._size, label="submitting", file=sys.stderr)
            self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)
        self._line.__exit__()

    def draw(self, read_bytes: int, requests: int) -> None:
        if self._bar is not None:
            self._bar.update(read_bytes - self._done)
            self._done = read_bytes
        elif self._is_shown:
            self._line.draw(f"{requests:,} submitted")

    def say(self, message: str) -> None:
        """A line of its own, above what is drawn."""
        if self._is_shown:
            click.echo(f"\r{'':<{shutil.get_terminal_size().columns - 1}}\r", nl=False, err=True)
        complain(message)


def _size_of(file: IO[bytes]) -> int:
    with contextlib.suppress(OSError, AttributeError, ValueError):
        return os.fstat(file.fileno()).st_size
    return 0


def submit_from(
    rm: RequestManager, name: str, options: dict[str, Any], *, is_waiting: bool, timeout: float | None, is_json: bool
) -> int:
    """Submit the requests in a file (``-``: standard input); the exit code. Only keys to wait for are kept."""
    outcomes: Counter[str] = Counter()
    awaited: list[tuple[str, Outcome | None]] = []
    worst = unsafe = 0

    def note(status: BatchStatus) -> None:
        nonlocal worst, unsafe
        outcomes[str(status.outcome)] += 1
        unsafe += status.durable is False
        if is_waiting and status.state.in_flight:
            awaited.append((status.key, status.outcome))
        elif is_json:
            _print_line(rm, status)
        if status.outcome in (Outcome.NEGATIVE, Outcome.REFUSED):
            worst = max(worst, FAILURE)

    def refuse(_: int, error: Exception) -> None:
        nonlocal worst
        lines.refuse(lines.waiting.popleft(), error)
        worst = max(worst, exit_code(error))

    with click.open_file(name, "rb") as file:
        progress = Progress(file)
        lines = Lines(file, "<stdin>" if name == "-" else name, options, progress.say)
        try:
            with progress:
                for count, status in enumerate(rm.submit_stream(lines, on_error=refuse), 1):
                    lines.waiting.popleft()
                    note(status)
                    if count % CHUNK == 1:
                        progress.draw(lines.read_bytes, count)
                progress.draw(lines.read_bytes, outcomes.total())
        except KeyboardInterrupt:
            _summarize(outcomes, lines.bad, is_json)
            complain("interrupted; what was submitted goes on, and can be submitted again")
            raise click.exceptions.Exit(INTERRUPTED) from None
    _summarize(outcomes, lines.bad, is_json)
    if unsafe:
        complain(f"{unsafe:,} of these: {NOT_DURABLE}")
    if lines.invalid:
        worst = max(worst, USAGE)
    return max(worst, _wait_for_all(rm, awaited, timeout, is_json)) if is_waiting else worst


def _wait_for_all(
    rm: RequestManager, awaited: list[tuple[str, Outcome | None]], timeout: float | None, is_json: bool
) -> int:
    """Wait until all have ended, as many at a time as go in a round trip; the exit code."""
    deadline = None if timeout is None else time.monotonic() + timeout
    worst, states = 0, Counter[str]()
    try:
        for first in range(0, len(awaited), CHUNK):
            keys, outcomes = zip(*awaited[first : first + CHUNK], strict=True)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            for status, outcome in zip(rm.wait(keys, left), outcomes, strict=True):
                worst = max(worst, exit_code_of(status))
                states[str(status.state)] += 1
                if is_json:
                    _print_line(rm, replace(status, outcome=outcome))
                elif exit_code_of(status):
                    click.echo(f"{status.key} {status.state}")
    except KeyboardInterrupt:
        complain("interrupted; the requests go on")
        raise click.exceptions.Exit(INTERRUPTED) from None
    for state, count in sorted(states.items()):
        click.echo(f"{state:<12}{count:>9,}", err=is_json)
    if worst == NOT_READY:
        complain(f"the time is over ({timeout:g} s); the requests go on")
    return worst


def _print_line(rm: RequestManager, status: BatchStatus) -> None:
    click.echo(json_text(document_of(status, rm.settings), indent=None))


def _summarize(outcomes: Counter[str], bad: int, is_json: bool) -> None:
    """How many had each outcome; beside ``--json`` that goes to stderr."""
    for outcome in Outcome:
        if outcomes[outcome]:
            click.echo(f"{outcome:<12}{outcomes[outcome]:>9,}", err=is_json)
    click.echo(f"{'not taken':<12}{bad:>9,}" if bad else f"{'all':<12}{outcomes.total():>9,}", err=is_json)
