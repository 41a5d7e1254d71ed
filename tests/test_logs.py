"""What a worker writes to stderr: lines that cannot be forged, JSON that always parses."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from commands import command, finished
from rq import Queue
from rq.serializers import JSONSerializer

from rqarm import RequestManager, embedded
from rqarm.worker.logs import LONGEST_LINE, JsonFormatter, PrintedLines, TextFormatter

HOSTILE = "/a\n2026-01-01 00:00:00,000 INFO rqarm.worker: forged\r\x1b[31m\u2028\x85x"

HANDLERS = """
import sys, threading, warnings
from rqarm import Handlers
handlers = Handlers()

@handlers.route("/fine/{n:int}")
def fine(request, context, n):
    return n

@handlers.route("/noisy")
def noisy(request, context):
    warnings.warn("of two\\nlines")
    print("printed\\nin lines", file=sys.stderr)
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    raise ValueError("a\\nb\\x1b[31m\\udc80")
"""


def record(message: str = "m", *args: Any, name: str = "rqarm.worker", **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord(name, logging.INFO, __file__, 1, message, args, extra.pop("exc_info", None))
    vars(made).update(extra)
    return made


def raised(message: str) -> Any:
    try:
        raise ValueError(message)
    except ValueError:
        return sys.exc_info()


# -- lines for people


def test_a_uri_ends_no_line_and_moves_no_cursor() -> None:
    text = TextFormatter().format(record("%s: completed", HOSTILE))
    assert text.isprintable()
    assert r"/a\n2026-01-01" in text


def test_no_line_of_others_looks_like_the_start_of_a_record() -> None:
    text = TextFormatter().format(record("of RQ\n%s", HOSTILE, name="rq.worker", exc_info=raised(HOSTILE)))
    first, *rest = text.split("\n")
    assert first.endswith("rq.worker: of RQ")
    assert len(rest) > 3
    assert all(line.startswith("    ") for line in rest)
    assert all(line.isprintable() for line in rest)


# -- JSON


def parsed(made: logging.LogRecord) -> dict[str, Any]:
    text = JsonFormatter().format(made)
    assert text.isascii()
    assert "\n" not in text
    document: dict[str, Any] = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return document


def test_the_facts_of_a_job_are_fields_of_their_own() -> None:
    error = {"type": "ValueError", "message": HOSTILE}
    facts = {"key": "k", "uri": HOSTILE, "route": "/a", "outcome": "failed", "wait_s": 0.5, "run_s": 1.25}
    facts |= {"attempt": 2, "worker": "w", "error": error}
    made = record("k %s: failed", "/a", rqarm=facts)
    made.created, made.process = 1767225600.1234, 7
    fixed = {"time": "2026-01-01T00:00:00.123Z", "level": "INFO", "logger": "rqarm.worker", "pid": 7}
    assert parsed(made) == fixed | {"message": "k /a: failed"} | facts


def test_a_traceback_is_one_field() -> None:
    document = parsed(record(exc_info=raised(HOSTILE), stack_info="a\nstack"))
    assert document["exception"].startswith("Traceback")
    assert document["exception"].endswith(HOSTILE)
    assert document["stack"] == "a\nstack"


def test_facts_replace_no_field_of_the_record() -> None:
    document = parsed(
        record("true", rqarm={"message": "forged", "level": "DEBUG", "logger": "x", "time": "", "key": "k"})
    )
    assert (document["message"], document["level"], document["logger"], document["key"]) == (
        "true",
        "INFO",
        "rqarm.worker",
        "k",
    )


def test_what_json_lacks_is_written_all_the_same() -> None:
    facts = {"nan": float("nan"), "inf": [-float("inf")], "bytes": b"\xff", "lone": "\udc80", 3: {4: (1, None, True)}}
    document = parsed(record("\udc80", rqarm=facts))
    assert document["nan"] is None
    assert document["inf"] == [None]
    assert document["bytes"] == r"b'\xff'"
    assert document["lone"] == document["message"] == "\udc80"
    assert document["3"] == {"4": [1, None, True]}


@pytest.mark.parametrize("facts", [None, 7, "text", ["list"]])
def test_facts_that_are_none_are_left_out(facts: object) -> None:
    assert set(parsed(record(rqarm=facts))) == {"time", "level", "logger", "pid", "message"}


# -- what is printed


@pytest.fixture
def told() -> Iterator[list[str]]:
    """The lines that the logger ``stderr`` has told."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda made: lines.append(made.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("stderr")
    log.addHandler(handler)
    log.propagate = False
    yield lines
    log.propagate = True
    log.removeHandler(handler)


def test_printed_lines_become_records(told: list[str]) -> None:
    lines = PrintedLines(io.StringIO())
    print("one", "and", "a half", end="", file=lines)
    assert told == []
    print(" %s\ntwo\n\n", file=lines)
    assert told == ["one and a half %s", "two"]
    lines.write("the end")
    lines.drain()
    lines.drain()
    assert told[2:] == ["the end"]
    lines.write("x" * (LONGEST_LINE + 1))
    assert len(told) == 4


def test_logging_that_fails_does_not_log_itself(told: list[str]) -> None:
    stream = io.StringIO()
    lines = PrintedLines(stream)
    failing = logging.Handler()
    failing.emit = lambda made: print("broken", file=lines)  # type: ignore[method-assign]
    logging.getLogger("stderr").addHandler(failing)
    try:
        print("x", file=lines)
    finally:
        logging.getLogger("stderr").removeHandler(failing)
    assert stream.getvalue() == "broken\n"


# -- a worker


@pytest.fixture
def handlers(tmp_path: Path) -> str:
    path = tmp_path / "noisy.py"
    path.write_text(HANDLERS)
    return str(path)


def documents(said: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said.splitlines()]


@pytest.mark.parametrize("verbose", [(), ("-vv",)], ids=["plain", "all of RQ"])
def test_every_line_that_a_worker_writes_is_json(
    home: embedded.PrivateServer, handlers: str, tmp_path: Path, verbose: tuple[str, ...]
) -> None:
    with RequestManager(home.url, allow_volatile=True) as rm:
        fine, noisy = (status.key for status in rm.submit_many(["/fine/1", "/noisy"]))
        Queue("arm", connection=rm.connection, serializer=JSONSerializer).enqueue("os.system", "true")
        done = finished(home.url, tmp_path, "--handlers", handlers, "--burst", "--log-format", "json", *verbose)
        assert done.process.returncode == 0
        rm.forget(fine)
        rm.forget(noisy)
    told = documents(done.said)
    assert all({"time", "level", "logger", "pid", "message"} <= set(each) for each in told)
    messages = [each["message"] for each in told]
    for key in (fine, noisy):
        assert len([each for each in told if key in each["message"] and each["logger"] == "rqarm.worker"]) == 1
    assert "printed" in messages
    assert "in lines" in messages
    assert any(each["logger"] == "py.warnings" and "of two\nlines" in each["message"] for each in told)
    assert any("ZeroDivisionError" in each.get("exception", "") for each in told), "an error in a thread"
    assert any("FunctionNotAllowed" in message for message in messages), "a traceback of RQ"


def test_the_error_that_ends_a_worker_is_json_too(tmp_path: Path) -> None:
    with servers.short_directory() as nowhere:
        done = finished(f"unix://{nowhere}/none", tmp_path, "--handlers", "no_such_module", "--log-format", "json")
    assert done.process.returncode == 2
    (document,) = documents(done.said)
    assert "cannot import 'no_such_module'" in document["message"]


def test_the_supervisor_writes_json_too(home: embedded.PrivateServer, handlers: str, tmp_path: Path) -> None:
    with command(home.url, tmp_path, "-n", "2", "--handlers", handlers, "--burst", "--log-format", "json") as running:
        assert running.wait() == 0
    told = documents(running.said)
    assert told[0]["message"].startswith("worker 1 started, process ")
    assert len({each["pid"] for each in told}) == 3
