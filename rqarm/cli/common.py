"""What the commands share: which server, how to print, what an error means for the exit code.

Nothing here knows a command. Text from Redis is somebody else's: whatever goes to a terminal passes ``plain`` first.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click
import redis

from rqarm.browse.claims import Claim
from rqarm.browse.search import CacheEntry
from rqarm.config import Settings
from rqarm.embedded import EmbeddedError
from rqarm.errors import ConfigError, InvalidRequest, ResultNotReady, RqarmError
from rqarm.manager import RequestManager
from rqarm.model import BatchStatus, Key, State
from rqarm.request import BatchRequest
from rqarm.text import SUSPECT, duration, is_unsafe, jsonable, plain
from rqarm.uri import check_key, redact

F = TypeVar("F", bound=Callable[..., Any])

FAILURE, USAGE, NOT_READY, NO_SERVER, INTERRUPTED = 1, 2, 3, 4, 130


# -- which server


@dataclass
class Target:
    """The server and namespace that the options name; None = what RQARM_* says, else the default."""

    url: str | None = None
    namespace: str | None = None

    def settings(self) -> Settings:
        return Settings.load(url=self.url, namespace=self.namespace)

    @contextlib.contextmanager
    def manager(self) -> Iterator[RequestManager]:
        """A manager for one command; what rqarm logs meanwhile goes to stderr."""
        with logged(logging.WARNING), RequestManager(self.url, namespace=self.namespace) as manager:
            yield manager


def _remember(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        setattr(ctx.ensure_object(Target), str(parameter.name), value)


def server_options() -> list[click.Parameter]:
    """--url and --namespace, for the group and for each command; the command's win."""
    return [
        click.Option(
            ["-u", "--url"],
            expose_value=False,
            callback=_remember,
            metavar="URL",
            help="Where Redis is; RQARM_URL. Without one: the embedded server.",
        ),
        click.Option(
            ["--namespace"],
            expose_value=False,
            callback=_remember,
            metavar="NAME",
            help="Prefix of every key; RQARM_NAMESPACE, else arm.",
        ),
    ]


def on_server(command: F) -> F:
    """Give a command --url and --namespace, and the Target as its first argument."""
    known = command.__dict__.setdefault("__click_params__", [])
    known[:0] = reversed(server_options())
    ensured: F = click.make_pass_decorator(Target, ensure=True)(command)  # type: ignore[assignment]
    return ensured


as_json = click.option("--json", "is_json", is_flag=True, help="Print one JSON document.")
limit_option = click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="So many at the most."
)
queue_option = click.option("-q", "--queue", metavar="QUEUE", help="The queue; RQARM_QUEUE, else arm.")
keys_argument = click.argument("keys", nargs=-1, required=True, metavar="KEY...")


def key_of(text: str, settings: Settings) -> Key:
    """The key itself; what cannot be one is taken as a URI. Raises InvalidRequest."""
    try:
        return check_key(text)
    except InvalidRequest:
        return BatchRequest(text).identify(settings.ignore_params).key


class _ToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())


@contextlib.contextmanager
def logged(level: int) -> Iterator[None]:
    """What rqarm logs from this level on goes to stderr, and nothing else of it."""
    log, handler = logging.getLogger("rqarm"), _ToStderr(level)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


# -- errors and exit codes


def complain(message: str) -> None:
    """One line on stderr."""
    click.echo(f"rqarm: {plain(message)}", err=True)


def guarded(run: Callable[[], Any]) -> int:
    """The exit code of a command. Its errors are told in one line; RQARM_DEBUG=1 adds the traceback."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            # a terminal that is not UTF-8 must not end a command in the middle
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        answer = run()
        return answer if isinstance(answer, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as abort:
        is_interrupt = isinstance(abort, KeyboardInterrupt) or isinstance(abort.__cause__, KeyboardInterrupt)
        complain("interrupted" if is_interrupt else "nothing was done")
        return INTERRUPTED if is_interrupt else FAILURE
    except Exception as error:  # noqa: BLE001 -- the last line of defence: people get a sentence, not a traceback
        return tell(error)


def tell(error: Exception) -> int:
    """Print an error; the exit code it stands for."""
    if os.environ.get("RQARM_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    complain(_sentence(error))
    if isinstance(error, EmbeddedError) and error.log:
        click.echo(plain(error.log, keep="\n\t"), err=True)
    return exit_code(error)


def exit_code(error: Exception) -> int:
    """2 for a request or setting that is wrong, 3 for not yet, 4 for no server, 1 for all else."""
    if isinstance(error, InvalidRequest | ConfigError):
        return USAGE
    if isinstance(error, ResultNotReady):
        return NOT_READY
    if isinstance(error, redis.ConnectionError | redis.TimeoutError | EmbeddedError):
        return NO_SERVER
    return FAILURE


def _sentence(error: Exception) -> str:
    if isinstance(error, EmbeddedError):
        return str(error).removesuffix(error.log).rstrip()
    if isinstance(error, RqarmError):
        return str(error)
    if isinstance(error, redis.RedisError):
        return f"the server says: {error}" if str(error) else type(error).__name__
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    return f"{type(error).__name__}: {error} (RQARM_DEBUG=1 shows where)"


def exit_code_of(status: BatchStatus) -> int:
    """For commands that wait: 0 only when there is a result."""
    if status.state.in_flight:
        return NOT_READY
    return 0 if status.state is State.COMPLETED else FAILURE


# -- printing


def json_text(document: Any, indent: int | None = 2) -> str:
    """JSON of anything rqarm can store. What JSON lacks is written as ``jsonable`` says."""
    text = json.dumps(jsonable(document), indent=indent, ensure_ascii=not _speaks_utf8(), allow_nan=False)
    return SUSPECT.sub(lambda match: _json_escape(match[0]), text)


def _json_escape(char: str) -> str:
    if char == "\n" or not is_unsafe(char):  # line breaks here are those of the indentation
        return char
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def _speaks_utf8() -> bool:
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"


def print_json(document: Any) -> None:
    click.echo(json_text(document))


def is_terminal(stream: Any) -> bool:
    return bool(stream.isatty())


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns; on a terminal the last one is cut to its width."""
    lines = [heads, *([plain(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    room = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None
    for line in lines:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        click.echo(text if room is None or len(text) <= room else text[: room - 1] + "…")


def print_pairs(pairs: Iterable[tuple[str, object]]) -> None:
    """A name and its value on a line each."""
    for name, value in pairs:
        click.echo(f"{name:<12}{plain(str(value))}".rstrip())


def shown_uri(status: BatchStatus, settings: Settings) -> str:
    """The URI for people, without secret parameters."""
    return redact(status.uri, settings.secret_params)


def document_of(status: BatchStatus, settings: Settings) -> dict[str, Any]:
    """The status for ``--json``, without secret parameters."""
    return {**status.to_dict(), "uri": shown_uri(status, settings)}


def shown_with_status(view: CacheEntry | Claim, settings: Settings) -> dict[str, Any]:
    """What stands beside a status, and the status for ``--json``."""
    return {**view.to_dict(), "status": document_of(view.status, settings)}


def since(moment: datetime.datetime | None) -> str:
    """How long ago; "" when it never happened."""
    if moment is None:
        return ""
    return duration((datetime.datetime.now(datetime.UTC) - moment).total_seconds())


def print_statuses(listed: list[BatchStatus], settings: Settings, is_json: bool) -> None:
    """A table, or a list for ``--json``."""
    if is_json:
        print_json([document_of(found, settings) for found in listed])
        return
    rows = [
        (
            found.key,
            str(found.state),
            found.queue,
            since(found.ended or found.started or found.submitted),
            str(found.attempts),
            shown_uri(found, settings),
        )
        for found in listed
    ]
    print_table(("KEY", "STATE", "QUEUE", "SINCE", "ATTEMPTS", "URI"), rows)


def each_key(target: Target, keys: tuple[str, ...], do: Callable[[RequestManager, Key], tuple[int, str]]) -> int:
    """Do it with every key, whatever becomes of the others; the worst exit code."""
    worst = 0
    with target.manager() as rm:
        for name in [key_of(text, rm.settings) for text in keys]:
            try:
                code, word = do(rm, name)
                click.echo(f"{name} {word}")
            except RqarmError as error:
                if exit_code(error) not in (FAILURE, NOT_READY):
                    raise
                code = tell(error)
            worst = max(worst, code)
    return worst
