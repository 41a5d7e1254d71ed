"""The command line: what it prints where, and its exit codes. In-process where possible, a process where it counts."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
import redis
import servers
from click.testing import CliRunner, Result

import rqarm
from rqarm import BatchRequest, RequestManager
from rqarm.cli import COMMANDS, common, main, waiting
from rqarm.cli.common import FAILURE, NOT_READY, USAGE, json_text
from rqarm.model import BatchStatus, Key, State
from rqarm.queue import Lease
from rqarm.text import brief, duration, plain, size

Run = Callable[..., Result]
ROOT = Path(__file__).parents[1]
HOSTILE = "a\x1b[31mb\x07\u202ec\r\nd\x9be"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RQARM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RQARM_ALLOW_VOLATILE", "1")


@pytest.fixture
def rm(url: str, redis_client: redis.Redis) -> Iterator[RequestManager]:
    with RequestManager(url) as manager:
        yield manager


@pytest.fixture
def run(url: str, redis_client: redis.Redis) -> Run:
    """Run a command in this process against the emptied server."""

    def invoke(*args: str, **options: Any) -> Result:
        return CliRunner().invoke(main, ["-u", url, *args], **options)

    return invoke


def process(*args: str, url: str | None = None, **options: Any) -> subprocess.Popen[str]:
    """The program as its entry point runs it."""
    script = "import sys; from rqarm.cli import main; sys.exit(main())"
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-c", script, *(["-u", url] if url else []), *args]
    return subprocess.Popen(command, env=environment, **(pipes | options))


def finished(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    with process(*args, **options) as running:
        out, err = running.communicate(timeout=60)
    return subprocess.CompletedProcess(running.args, running.returncode, out, err)


@contextmanager
def worker(url: str, *values: Any) -> Iterator[None]:
    """A worker of another kind: takes as many requests as there are values; an exception as value fails its request."""

    def work() -> None:
        with RequestManager(url) as manager:
            for value in values:
                lease = manager.queues.next_request(30)
                assert lease is not None
                lease.fail(value) if isinstance(value, Exception) else lease.finish(value)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def take(rm: RequestManager) -> Any:
    lease = rm.queues.next_request(0)
    assert lease is not None
    return lease


# -- the program


def test_the_entry_point_of_the_package_is_this_group() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["rqarm"] == "rqarm.cli:main"
    done = finished("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"rqarm {rqarm.__version__}\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_in_the_help_is_that_of_the_command(name: str) -> None:
    context = click.Context(main)
    if name not in main.list_commands(context):
        pytest.skip(f"{COMMANDS[name][0]} is not there yet")
    command = main.get_command(context, name)
    assert command is not None
    assert command.name == name
    assert COMMANDS[name][1] == command.get_short_help_str(200)


def test_every_command_and_option_has_help() -> None:
    context = click.Context(main)

    def commands(group: click.Group) -> Iterator[click.Command]:
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            yield command
            if isinstance(command, click.Group):
                yield from commands(command)

    for command in commands(main):
        assert command.help, command.name


def test_help_imports_no_command() -> None:
    script = (
        "import sys\nfrom rqarm.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert not end.code\n"
        "print([name for name in sys.modules if name.startswith(('rqarm.cli.', 'rqarm.worker'))], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "['rqarm.cli.common']\n"
    assert "submit" in done.stdout


# -- exit codes


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["status", "pending"], 0),
        (["status", "failed"], 0),
        (["status", "nothing"], 1),
        (["result", "nothing"], 1),
        (["result", "failed"], 1),
        (["result", "cancelled"], 1),
        (["result", "pending"], 3),
        (["result", "pending", "--timeout", "0.01"], 3),
        (["result", "done"], 0),
        (["result", "done", "-o", "/nonexistent/file"], 1),
        (["wait", "done"], 0),
        (["wait", "done", "failed"], 1),
        (["wait", "done", "pending", "--timeout", "0.01"], 3),
        (["wait", "done", "pending", "--timeout", "0.01", "--json"], 3),
        (["wait", "nothing"], 1),
        (["status", "done", "--watch"], 0),
        (["status", "failed", "--watch"], 1),
        (["submit", "/new"], 0),
        (["submit", "/pending", "--key", "pending", "--timeout", "0.01"], 3),
        (["submit", "/other", "--key", "pending"], 1),
        (["submit", "/a b"], 2),
        (["submit", ""], 2),
        (["submit", "/x", "-p", "novalue"], 2),
        (["submit", "/x", "--ttl", "-1"], 2),
        (["submit", "/x", "--sticky", "--ttl", "1"], 2),
        (["--namespace", "a b", "stats"], 2),
        (["--nothing"], 2),
        (["nothing"], 2),
        (["cancel", "pending"], 0),
        (["cancel", "done"], 0),
        (["cancel", "nothing"], 1),
        (["forget", "done"], 0),
        (["forget", "nothing"], 1),
        (["forget", "pending", "done"], 3),
        (["cache", "info", "pending"], 3),
        (["cache", "info", "nothing"], 1),
        (["cache", "clear"], 2),
        (["key", "/x"], 0),
        (["key", "/%"], 2),
        (["worker"], 2),
        (["worker", "--handlers", "no_such_module"], 2),
    ],
)
def test_exit_codes(rm: RequestManager, run: Run, args: Sequence[str], code: int) -> None:
    rm.cache.put(BatchRequest("/done", key="done"), 1)
    rm.submit(BatchRequest("/failed", key="failed"))
    take(rm).fail(ValueError("no"))
    rm.submit(BatchRequest("/cancelled", key="cancelled"))
    rm.cancel("cancelled")
    rm.submit(BatchRequest("/pending", key="pending"))

    result = run(*args)

    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    if code and args != ["cache", "clear"] and result.stderr.startswith("rqarm:"):
        assert result.stderr.count("\n") == 1, "one line"


def test_nobody_answers_is_4_and_no_password_is_printed() -> None:
    done = finished("-u", f"redis://me:sesame@127.0.0.1:{servers.free_port()}", "stats")
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.startswith("rqarm: cannot reach redis://me:***@127.0.0.1")
    assert "sesame" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_check_tells_in_json_that_nobody_answers() -> None:
    done = finished("-u", f"redis://me:sesame@127.0.0.1:{servers.free_port()}", "check", "--json")
    assert done.returncode == 4
    assert json.loads(done.stdout)["ok"] is False
    assert "sesame" not in done.stdout + done.stderr


def test_a_malformed_url_is_2_and_no_password_is_printed(redis_client: redis.Redis) -> None:
    result = CliRunner().invoke(main, ["-u", "http://me:sesame@host", "stats"])
    assert result.exit_code == 2
    assert "sesame" not in result.output


def test_debug_shows_the_traceback(run: Run) -> None:
    result = run("result", "nothing", env={"RQARM_DEBUG": "1"})
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_a_reader_that_hangs_up_ends_the_program_without_a_word(rm: RequestManager, url: str) -> None:
    rm.cache.put(BatchRequest("/big", key="big"), b"x" * 3_000_000)
    for args in (["ls"], ["result", "big"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = finished(*args, url=url, stdout=writer)
        os.close(writer)
        assert done.returncode == 1
        assert done.stderr == ""


def test_ctrl_c_ends_the_waiting_and_says_that_the_request_goes_on(
    rm: RequestManager, url: str, redis_client: redis.Redis
) -> None:
    with process("submit", "/slow", "--key", "slow", "--wait", url=url) as running:
        servers.eventually(lambda: redis_client.pubsub_numsub("arm:done:slow")[0][1])
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert out == ""
    assert "interrupted; the request goes on: rqarm result slow" in err
    assert rm.status("slow").state is State.PENDING


# -- submit


def test_submit_says_new_then_joined_then_hit(rm: RequestManager, run: Run) -> None:
    key = BatchRequest("/cities", {"country": "FR"}).key
    args = ("submit", "/cities", "-p", "country=FR")
    assert run(*args).output == f"new {key} pending\n"
    assert run(*args).output == f"joined {key} pending\n"
    take(rm).finish(1)
    assert run(*args).output == f"hit {key} completed\n"
    assert run(*args, "--again").output == f"new {key} pending\n"


def test_the_options_of_submit_reach_the_request(rm: RequestManager, run: Run) -> None:
    args = ["--sticky", "--operation", "resize", "--queue", "other", "--priority", "high", "-p", "a=1", "-p", "a=x=y"]
    result = run("submit", "/x", "--key", "mine", *args)
    assert result.output == "new mine pending\n"
    expected = BatchRequest(
        "/x", [("a", "1"), ("a", "x=y")], operation="resize", key="mine", queue="other", priority="high", sticky=True
    )
    assert rm.find("mine") == expected
    run("submit", "/y", "--key", "short", "--ttl", "2.5")
    found = rm.find("short")
    assert found is not None
    assert found.ttl == 2.5


def test_submit_and_wait_writes_the_value_to_stdout_and_all_else_to_stderr(run: Run, url: str) -> None:
    with worker(url, {"rows": [1, 2]}):
        result = run("submit", "/x", "--key", "x", "--wait")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"rows": [1, 2]}
    assert result.stderr == "new x pending\n"


def test_no_bar_is_drawn_when_stderr_is_no_terminal(run: Run, url: str) -> None:
    with worker(url, "text"):
        result = run("submit", "/x", "--wait")
    assert "\r" not in result.stderr
    assert "[" not in result.stderr
    assert result.stdout == "text"


def test_a_bar_is_drawn_on_a_terminal_and_gone_at_the_end(rm: RequestManager, url: str) -> None:
    with on_terminal("submit", "/x", "--key", "x", "--wait", "--timeout", "30", url=url) as terminal:
        terminal.read_until("number 1 in line")
        lease = take(rm)
        lease.renew(0.5)
        terminal.read_until("in progress [############------------] 50%")
        lease.finish(HOSTILE)
        text = terminal.read_to_end()
    assert terminal.code == 0
    shown = text.rpartition("\r")[0].rpartition("\r")[2] if text.endswith("\r") else text
    assert "\x1b" not in text
    assert "a\\x1b[31mb\\x07\\u202ec" in shown.replace("\r", "")


def test_wait_draws_how_far_they_are_on_a_terminal(rm: RequestManager, url: str) -> None:
    for name in ("a", "b"):
        rm.submit(BatchRequest(f"/{name}", key=name))
    with on_terminal("wait", "a", url=url) as terminal:
        terminal.read_until("number 1 in line")
        lease = take(rm)
        lease.renew(0.5, "50 of 100 rows\x1b[31m")
        terminal.read_until("in progress [############------------] 50% 50 of 100 rows\\x1b[31m")
        lease.finish(1)
        terminal.read_until("a completed")
        terminal.read_to_end()
    assert terminal.code == 0
    with on_terminal("wait", "a", "b", url=url) as terminal:
        terminal.read_until("a completed")
        terminal.read_until("[############------------] 50% of 2 have ended")
        take(rm).fail("no")
        terminal.read_until("b failed")
        terminal.read_to_end()
    assert terminal.code == 1
    with on_terminal("wait", "a", "c", "--timeout", "0.7", url=url) as terminal:
        terminal.read_until("c unknown")
    rm.submit(BatchRequest("/d", key="d"))
    with on_terminal("wait", "d", "--timeout", "0.7", url=url) as terminal:
        terminal.read_until("number 1 in line")
        assert "is still pending after 0.7 s" in terminal.read_to_end()
    assert terminal.code == 3


def test_status_shows_progress_with_its_message(rm: RequestManager, run: Run) -> None:
    rm.submit(BatchRequest("/x", key="x"))
    take(rm).renew(0.4, "40 of 100 rows")
    assert "progress    40% 40 of 100 rows\n" in run("status", "x").stdout


def test_a_failed_request_that_was_waited_for_is_told_in_one_line(run: Run, url: str) -> None:
    with worker(url, ValueError(HOSTILE)):
        result = run("submit", "/x", "--key", "x", "--wait")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert (
        result.stderr.splitlines()[-1]
        == "rqarm: request 'x' failed with ValueError: a\\x1b[31mb\\x07\\u202ec\\r\\nd\\x9be"
    )


def test_submit_and_wait_as_json_is_one_document_in_every_case(run: Run, rm: RequestManager, url: str) -> None:
    with worker(url, {"n": 1}, ValueError("no")):
        good = run("submit", "/good", "--wait", "--json")
        bad = run("submit", "/bad", "--wait", "--json")
    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert json.loads(good.stdout)["value"] == {"n": 1}
    assert json.loads(good.stdout)["outcome"] == "new"
    assert json.loads(bad.stdout)["error"]["message"] == "no"
    late = run("submit", "/late", "--timeout", "0.01", "--json")
    assert late.exit_code == 3
    assert json.loads(late.stdout)["state"] == "pending"


def test_a_refused_submit_fails_and_says_why(run: Run) -> None:
    for args in (["submit", "/b"], ["submit", "/b", "--wait"], ["submit", "/b", "--json"]):
        run("submit", "/a")
        result = run(*args, env={"RQARM_MAX_PENDING": "1"})
        assert result.exit_code == 1
        assert "at its limit" in result.stderr


def test_a_recent_failure_that_answers_fails(rm: RequestManager, run: Run) -> None:
    rm.submit("/x")
    take(rm).fail("broken", negative_ttl=60)
    result = run("submit", "/x")
    assert result.exit_code == 1
    assert result.stdout.startswith("negative ")
    assert "broken" in result.stderr


# -- values

ODD = {
    "when": datetime.datetime(2024, 2, 29, 1, 2, 3, tzinfo=datetime.UTC),
    "price": decimal.Decimal("1.10"),
    "id": uuid.UUID(int=1),
    "tags": {"b", "a"},
    "raw": b"\xff",
    "nan": float("nan"),
    "took": datetime.timedelta(seconds=1.5),
    "big": 10**5000,
    "pair": (1, 2),
}


def test_a_value_is_written_as_json_whatever_is_in_it(rm: RequestManager, run: Run) -> None:
    rm.cache.put(BatchRequest("/odd", key="odd"), ODD)
    assert json.loads(run("result", "odd").stdout) == {
        "when": "2024-02-29T01:02:03+00:00",
        "price": "1.10",
        "id": "00000000-0000-0000-0000-000000000001",
        "tags": ["a", "b"],
        "raw": {"base64": "/w=="},
        "nan": "nan",
        "took": 1.5,
        "big": hex(10**5000),
        "pair": [1, 2],
    }


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("Grüße\x1b", "Grüße\x1b".encode()),
        (b"\x00\xff", b"\x00\xff"),
        (rqarm.Result(b"a;b\n", "text/csv", "t.csv"), b"a;b\n"),
        (os.urandom(200_000), None),
        ([1, "ü"], '[\n  1,\n  "ü"\n]\n'.encode()),
    ],
)
def test_what_a_pipe_or_a_file_gets_is_exact(
    rm: RequestManager, run: Run, tmp_path: Path, value: Any, written: bytes | None
) -> None:
    rm.cache.put(BatchRequest("/v", key="v"), value)
    file = tmp_path / "value"
    file.write_bytes(b"what was there before")
    to_stdout = run("result", "v")
    to_file = run("result", "v", "-o", str(file))
    assert to_stdout.stdout_bytes == (value if written is None else written)
    assert file.read_bytes() == to_stdout.stdout_bytes
    assert to_file.stdout == ""
    assert list(tmp_path.iterdir()) == [file], "nothing else is left"


def test_a_large_result_goes_to_a_file_piece_by_piece(
    rm: RequestManager, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(3 << 20)
    rm.cache.put(BatchRequest("/v", key="v"), data)
    monkeypatch.setattr(type(rm.cache), "get", None)
    assert run("result", "v", "-o", str(tmp_path / "v")).exit_code == 0
    assert (tmp_path / "v").read_bytes() == data


def test_a_result_that_breaks_off_leaves_the_file_as_it_was(
    rm: RequestManager, run: Run, tmp_path: Path, redis_client: redis.Redis
) -> None:
    rm.cache.put(BatchRequest("/v", key="v"), os.urandom(3 << 20))
    redis_client.delete(*redis_client.keys("arm:chunk:v:*:2"))
    file = tmp_path / "v"
    file.write_text("before")
    result = run("result", "v", "-o", str(file))
    assert result.exit_code == 1
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_bytes_stay_off_a_terminal(rm: RequestManager, url: str) -> None:
    rm.cache.put(BatchRequest("/v", key="v"), rqarm.Result(b"\x1b[2J" * 9, "image/png", "p.png"))
    with on_terminal("result", "v", url=url) as terminal:
        text = terminal.read_to_end()
    assert terminal.code == 0
    assert text == "rqarm: the value is 36 B of image/png named 'p.png': write it with -o FILE\r\n"


def test_result_as_json_gives_text_as_a_string_and_bytes_in_base64(rm: RequestManager, run: Run) -> None:
    rm.cache.put(BatchRequest("/t", key="t"), "text")
    rm.cache.put(BatchRequest("/b", key="b"), rqarm.Result(b"\xff"))
    assert json.loads(run("result", "t", "--json").stdout) == "text"
    assert json.loads(run("result", "b", "--json").stdout) == {"base64": base64.b64encode(b"\xff").decode()}


def test_result_waits_when_it_is_told_to(rm: RequestManager, run: Run, url: str) -> None:
    rm.submit("/x")
    with worker(url, "late"):
        assert run("result", "/x", "--timeout", "30").stdout == "late"


# -- reads


@pytest.mark.parametrize(
    "args",
    [
        ["status", "done"],
        ["status", "failed"],
        ["status", "nothing"],
        ["status", "done", "--watch"],
        ["result", "done"],
        ["wait", "done", "failed"],
        ["ls"],
        ["ls", "--state", "pending"],
        ["ls", "--state", "in_progress"],
        ["ls", "--state", "quarantined"],
        ["ls", "--state", "cached", "--limit", "1"],
        ["ls", "--queue", "nothing"],
        ["quarantine", "list"],
        ["quarantine", "show", "aside"],
        ["quarantine", "requeue", "aside"],
        ["quarantine", "discard", "aside", "done"],
        ["key", "/x", "-p", "a=1"],
        ["key", "HTTP://Example.ORG:80/x?b=2&a=1", "--explain"],
        ["cache", "ls"],
        ["cache", "info"],
        ["cache", "info", "done"],
        ["stats"],
        ["check"],
        ["submit", "/done", "--key", "done"],
        ["submit", "/done", "--key", "done", "--wait"],
    ],
)
def test_json_is_one_document_and_nothing_else(rm: RequestManager, run: Run, args: Sequence[str]) -> None:
    rm.cache.put(BatchRequest("/done", key="done"), {"text": HOSTILE})
    rm.submit(BatchRequest("/failed?password=sesame", key="failed"))
    take(rm).fail(ValueError(HOSTILE))
    rm.submit(BatchRequest("/aside?password=sesame", key="aside"), payload={"text": HOSTILE})
    take(rm).fail(ValueError(HOSTILE), quarantine=True, api_key="sesame", text=HOSTILE)
    rm.submit(BatchRequest("/running", key="running"))
    lease = take(rm)
    rm.submit(BatchRequest("/pending", key="pending"))

    result = run(*args, "--json")
    lease.release()

    json.loads(result.stdout)
    assert not set(result.stdout) & set("\x1b\x07\x9b\u202e")
    assert "sesame" not in result.output


def test_status_shows_position_and_a_uri_stands_for_its_key(rm: RequestManager, run: Run) -> None:
    rm.submit("/first")
    key = rm.submit("/second?token=sesame").key
    result = run("status", "/second?token=sesame")
    lines = dict(line.split(None, 1) for line in result.stdout.splitlines())
    assert lines["key"] == key
    assert lines["state"] == "pending"
    assert lines["position"] == "2"
    assert lines["uri"] == "/second?token=***"


def test_status_of_a_failure_shows_the_traceback_and_no_control_characters(rm: RequestManager, run: Run) -> None:
    rm.submit(BatchRequest("/x", key="x"))
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        take(rm).fail(error)
    text = run("status", "x").stdout
    assert "error       ValueError: a\\x1b[31mb" in text
    assert "Traceback (most recent call last):" in text
    assert not set(text) & set("\x1b\x07\r\x9b\u202e")


def test_status_watch_prints_a_line_for_each_change(rm: RequestManager, url: str) -> None:
    rm.submit(BatchRequest("/x", key="x"))
    with process("status", "x", "--watch", url=url) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "pending, number 1 in line\n"
        lease = take(rm)
        lease.renew(0.25)
        while (line := running.stdout.readline()) == "in progress\n":
            pass
        assert line == "in progress [######------------------] 25%\n"
        lease.finish(1)
        out, err = running.communicate(timeout=30)
    assert "state       completed" in out
    assert (running.returncode, err) == (0, "")


def test_ls_shows_what_runs_and_then_what_waits_of_all_queues(rm: RequestManager, run: Run) -> None:
    rm.submit(BatchRequest("/running", key="running"))
    lease = take(rm)
    rm.submit(BatchRequest("/a?secret=sesame", key="a"))
    rm.submit(BatchRequest("/b", key="b", queue="other"))
    text = run("ls").stdout
    lease.release()
    rows = [line.split() for line in text.splitlines()]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("KEY", "STATE", "QUEUE"),
        ("running", "in_progress", "arm"),
        ("a", "pending", "arm"),
        ("b", "pending", "other"),
    ]
    assert rows[2][-1] == "/a?secret=***"
    assert [entry["key"] for entry in json.loads(run("ls", "--queue", "other", "--json").stdout)] == ["b"]


def test_ls_says_when_there_is_more(rm: RequestManager, run: Run) -> None:
    rm.submit_many([f"/{n}" for n in range(3)])
    result = run("ls", "--limit", "2")
    assert len(result.stdout.splitlines()) == 3
    assert "more than 2" in result.stderr


def test_wait_prints_each_as_it_ends(rm: RequestManager, run: Run, url: str) -> None:
    rm.submit_many([BatchRequest("/a", key="a"), BatchRequest("/b", key="b")])
    with worker(url, 1, ValueError("no")):
        result = run("wait", "a", "b", "--timeout", "30")
    assert result.stdout.splitlines() == ["a completed", "b failed"]
    assert result.exit_code == 1


def test_key_needs_no_server() -> None:
    nobody = ["-u", "unix:///nonexistent.sock"]
    result = CliRunner().invoke(main, [*nobody, "key", "/x?b=1", "-p", "a=2"])
    assert (result.exit_code, result.output) == (0, BatchRequest("/x?a=2&b=1").key + "\n")
    ignoring = CliRunner(env={"RQARM_IGNORE_PARAMS": "b"}).invoke(main, [*nobody, "key", "/x?b=1", "-p", "a=2"])
    assert ignoring.output == BatchRequest("/x?a=2").key + "\n"


def test_explain_says_which_rule_changed_what_and_what_a_submit_would_do(rm: RequestManager, run: Run) -> None:
    rm.submit("http://example.org/x?a=1&b=2")
    result = run("key", "HTTP://Example.ORG:80/x?b=2&a=1", "--explain")
    assert result.exit_code == 0
    assert "submit      would be joined" in result.stdout
    assert "sort parameters" in result.stdout
    assert "?b=2&a=1" in result.stdout


def test_explain_without_a_server_still_says_the_rules() -> None:
    result = CliRunner().invoke(main, ["-u", "unix:///nonexistent.sock", "key", "/x?b=2&a=1", "--explain"])
    assert result.exit_code == 4
    assert "sort parameters" in result.stdout
    assert "would be" not in result.stdout
    assert "cannot reach" in result.stderr


def test_stats_counts_what_was_done(rm: RequestManager, run: Run) -> None:
    rm.submit("/x")
    rm.submit("/x")
    take(rm).finish(1)
    assert json.loads(run("stats", "--json").stdout) == rm.cache.stats().to_dict()
    text = run("stats").stdout
    assert "joined 1, new 1" in text
    assert "1 temporary, 0 sticky" in text


def test_cache_info_says_what_a_result_is(rm: RequestManager, run: Run) -> None:
    rm.cache.put(BatchRequest("/v", key="v"), rqarm.Result(b"a;b", "text/csv", "t.csv"))
    facts = json.loads(run("cache", "info", "v", "--json").stdout)
    assert (facts["kind"], facts["content_type"], facts["filename"], facts["size"]) == (
        "result",
        "text/csv",
        "t.csv",
        3,
    )
    assert "3 B" in run("cache", "info", "v").stdout


# -- writes


def test_cancel_and_forget_go_on_after_one_that_cannot(rm: RequestManager, run: Run) -> None:
    rm.submit(BatchRequest("/a", key="a"))
    result = run("cancel", "nothing", "a")
    assert result.exit_code == 1
    assert result.stdout == "a cancelled\n"
    assert "nothing" in result.stderr
    assert run("cancel", "a").stdout == "a has ended already\n"
    rm.submit(BatchRequest("/b", key="b"))
    result = run("forget", "b", "a")
    assert result.exit_code == 3
    assert result.stdout == "a forgotten\n"
    assert rm.status("a").state is State.UNKNOWN


def test_clear_temporary_keeps_the_sticky_ones(rm: RequestManager, run: Run) -> None:
    rm.cache.put(BatchRequest("/a", key="a"), 1)
    rm.cache.put(BatchRequest("/b", key="b", sticky=True), 1)
    assert run("cache", "clear", "--temporary").stdout == "1 results forgotten\n"
    assert [found.key for found in rm.cache.list()] == ["b"]
    assert run("cache", "clear", "--yes").stdout == "1 results forgotten\n"
    assert not list(rm.cache.list())


def test_clear_asks_on_a_terminal(rm: RequestManager, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rm.cache.put("/a", 1)
    assert run("cache", "clear").exit_code == 2
    monkeypatch.setattr("rqarm.cli.cache.is_terminal", lambda _: True)
    assert run("cache", "clear", input="n\n").exit_code == 1
    assert len(list(rm.cache.list())) == 1
    assert run("cache", "clear", input="y\n").exit_code == 0
    assert not list(rm.cache.list())


def test_sweep_sets_going_again_what_lost_its_job(rm: RequestManager, run: Run, redis_client: redis.Redis) -> None:
    rm.submit("/x")
    redis_client.delete(*redis_client.keys("rq:*"))
    assert run("sweep").stdout == "0 set going again\n", "it may be on its way"
    servers.eventually(lambda: run("sweep", env={"RQARM_LEASE": "0.001"}).stdout == "1 set going again\n")
    take(rm).finish(1)


def test_the_options_of_the_server_stand_before_or_behind_the_command(url: str, redis_client: redis.Redis) -> None:
    runner = CliRunner()
    for args in (
        ["-u", url, "--namespace", "mine", "submit", "/x"],
        ["submit", "/x", "-u", url, "--namespace", "mine"],
        ["-u", "unix:///nonexistent.sock", "submit", "/x", "-u", url, "--namespace", "mine"],
    ):
        assert runner.invoke(main, args).exit_code == 0
    assert runner.invoke(main, ["submit", "/x"], env={"RQARM_URL": url, "RQARM_NAMESPACE": "mine"}).exit_code == 0
    with RequestManager(url, namespace="mine") as mine:
        assert mine.cache.stats().submissions == {"new": 1, "joined": 3}
    assert not redis_client.keys("arm:*")


# -- check


def test_check_leaves_nothing_behind(rm: RequestManager, run: Run, redis_client: redis.Redis) -> None:
    rm.submit("/x")
    before = {key: redis_client.dump(key) for key in redis_client.keys("*")}
    result = run("check")
    assert {key: redis_client.dump(key) for key in redis_client.keys("*")} == before
    assert "ok       trial run" in result.stdout


def test_check_is_well_when_nothing_waits_and_wrong_when_nobody_works(rm: RequestManager, run: Run) -> None:
    assert run("check").exit_code == 0
    rm.submit("/x")
    result = run("check")
    assert result.exit_code == 1
    assert "bad      workers" in result.stdout


def test_check_tells_of_eviction_that_would_lose_requests(run: Run, redis_client: redis.Redis) -> None:
    redis_client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        result = run("check", "--json")
    finally:
        redis_client.config_set("maxmemory-policy", "noeviction")
    assert result.exit_code == 1
    bad = [one for one in json.loads(result.stdout)["checks"] if one["verdict"] == "bad"]
    assert [one["name"] for one in bad] == ["suitable"]
    assert "allkeys-lru" in bad[0]["text"]


def test_check_tells_of_a_server_that_takes_no_writes(run: Run, redis_client: redis.Redis) -> None:
    redis_client.config_set("maxmemory", "1")
    try:
        result = run("check", "--json")
    finally:
        redis_client.config_set("maxmemory", "0")
    assert result.exit_code == 1
    verdicts = {one["name"]: one["verdict"] for one in json.loads(result.stdout)["checks"]}
    assert verdicts["memory"] == "warning"
    assert verdicts["trial run"] == "bad"


# -- worker

HANDLERS = """
from rqarm import Handlers
handlers = Handlers()

@handlers.route("/double/{n:int}")
def double(request, context, n):
    return {"double": 2 * n}

@handlers.route("/where")
def where(request, context):
    import rqarm
    with rqarm.RequestManager() as rm:
        return rm.settings.url, rm.settings.namespace

@handlers.route("/bad")
def bad(request, context):
    raise ValueError("a\\x1b[31mb\\n12:00 INFO forged")
"""


@pytest.fixture
def handlers_file(tmp_path: Path) -> str:
    path = tmp_path / "my_handlers.py"
    path.write_text(HANDLERS)
    return str(path)


def test_a_burst_runs_what_waits_and_logs_one_line_each(rm: RequestManager, url: str, handlers_file: str) -> None:
    key = rm.submit("/double/4").key
    low = rm.submit(BatchRequest("/double/5", priority="low")).key
    done = finished("worker", "--handlers", f"{handlers_file}:handlers", "--burst", "--name", "me", url=url)
    assert done.returncode == 0, done.stderr
    assert rm.result(key) == {"double": 8}
    assert rm.result(low) == {"double": 10}
    assert rm.status(key).worker == "me"
    assert done.stdout == ""
    assert "me listens on arm-high, arm, arm-low at unix:" in done.stderr
    assert [done.stderr.count(each) for each in (key, low)] == [1, 1]


def test_a_worker_serves_the_queues_and_the_namespace_it_is_told(url: str, rm: RequestManager, tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text(HANDLERS)
    with RequestManager(url, namespace="mine") as mine:
        there = mine.submit(BatchRequest("/double/1", queue="one")).key
        too = mine.submit(BatchRequest("/where", queue="two")).key
        elsewhere = mine.submit("/double/3").key
        args = ("--handlers", "my_module", "--burst", "-q", "one", "two", "--no-scheduler", "--namespace", "mine")
        done = finished("worker", *args, url=url, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert [mine.status(key).state for key in (there, too, elsewhere)] == ["completed", "completed", "pending"]
        assert mine.result(too) == (url, "mine"), "a handler's own manager is at the same place"


def test_the_log_of_a_worker_cannot_be_forged(rm: RequestManager, url: str, handlers_file: str) -> None:
    rm.submit("/bad")
    done = finished("worker", "--handlers", handlers_file, "--burst", url=url)
    assert done.returncode == 0
    assert "\x1b" not in done.stderr
    assert "\n12:00" not in done.stderr


def test_a_worker_warns_of_its_server_once(
    rm: RequestManager, url: str, handlers_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RQARM_ALLOW_VOLATILE")
    rm.submit_many(["/double/1", "/double/2"])
    done = finished("worker", "--handlers", handlers_file, "--burst", url=url)
    assert done.stderr.count("append-only") == 1


def test_check_warns_in_its_own_words_only(url: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RQARM_ALLOW_VOLATILE")
    result = run("check")
    assert "warning  suitable     the server keeps no append-only file" in result.stdout
    assert result.stderr == ""


def test_a_worker_ends_after_max_jobs(rm: RequestManager, url: str, handlers_file: str) -> None:
    keys = [status.key for status in rm.submit_many(["/double/1", "/double/2"])]
    done = finished("worker", "--handlers", handlers_file, "--max-jobs", "1", url=url)
    assert done.returncode == 0
    assert [rm.status(key).state for key in keys] == ["completed", "pending"]


def test_check_sees_a_worker_and_its_scheduler(rm: RequestManager, url: str, run: Run, handlers_file: str) -> None:
    with process("worker", "--handlers", handlers_file, "--name", "me", url=url) as running:
        try:
            servers.eventually(lambda: "ok       workers" in run("check").stdout)
            text = servers.eventually(lambda: "ok       scheduler" in (found := run("check").stdout) and found)
            twin = finished("worker", "--handlers", handlers_file, "--name", "me", "--burst", url=url)
        finally:
            running.terminate()
            running.communicate(timeout=30)
    assert "arm: 1 alive (me)" in text
    assert twin.returncode == 2
    assert "active worker" in twin.stderr


# -- the embedded server


@pytest.mark.skipif(not (servers.VALKEY or servers.REDIS), reason="no server program")
def test_the_embedded_server_starts_serves_and_stops() -> None:
    with servers.short_directory() as home:
        runner = CliRunner(env={"RQARM_HOME": str(home / "state")})
        try:
            assert runner.invoke(main, ["server", "status"]).exit_code == 1
            assert runner.invoke(main, ["submit", "/x"]).stdout.startswith("new ")
            started = runner.invoke(main, ["server", "start"])
            assert started.exit_code == 0
            assert f"unix://{home}" in started.stdout
            found = runner.invoke(main, ["server", "status", "--json"])
            assert found.exit_code == 0
            assert json.loads(found.stdout)["running"] is True
        finally:
            stopped = runner.invoke(main, ["server", "stop"])
        assert stopped.stdout == "stopped\n"
        assert runner.invoke(main, ["server", "stop"]).stdout == "it did not run\n"
        assert json.loads(runner.invoke(main, ["server", "status", "--json"]).stdout)["running"] is False


# -- printing


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("Zürich 東京 👩‍👧", "Zürich 東京 👩‍👧"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("\x7f\x85\x9b", "\\x7f\\x85\\x9b"),
        ("\u2028\u202e\u2066\ufeff\U000e0041", "\\u2028\\u202e\\u2066\\ufeff\\U000e0041"),
        ("\udc80", "\\udc80"),
    ],
)
def test_plain_writes_out_what_a_terminal_would_obey(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_plain_keeps_line_breaks_where_they_are_wanted() -> None:
    assert plain("a\nb\x1b\r", keep="\n\t") == "a\nb\\x1b\\r"


@pytest.mark.parametrize("value", [HOSTILE, {HOSTILE: [HOSTILE, "\U000e0041\udc80"]}, {1: "a", None: 2.5}])
def test_json_is_harmless_and_reads_back(value: Any) -> None:
    text = json_text(value)
    assert all(char.isprintable() or char == "\n" for char in text)
    expected = {"1": "a", "null": 2.5} if isinstance(value, dict) and 1 in value else value
    assert json.loads(text) == expected


def test_keys_that_would_collide_in_json_become_pairs() -> None:
    assert json.loads(json_text({1: "a", "1": "b"})) == [[1, "a"], ["1", "b"]]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0.0 s"), (0.44, "0.4 s"), (12, "12 s"), (99, "99 s"), (100, "1.7 min"), (7200, "2.0 h"), (864_000, "10 d")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (0.0001, "< 1 ms"), (0.004, "4 ms"), (0.9994, "999 ms"), (0.9999, "1.0 s"), (70, "70 s")],
)
def test_what_is_below_a_second_is_told_in_milliseconds(seconds: float, text: str) -> None:
    assert brief(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")])
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"state": State.PENDING, "position": 3, "eta": 12.0}, "pending, number 3 in line, about 12 s"),
        ({"state": State.IN_PROGRESS}, "in progress"),
        (
            {"state": State.IN_PROGRESS, "eta": 5.0, "estimated_time": 10.0},
            "in progress [############------------] 50%, about 5.0 s",
        ),
        ({"state": State.IN_PROGRESS, "progress": 7.0}, "in progress [########################] 100%"),
        ({"state": State.COMPLETED}, "completed"),
    ],
)
def test_the_line_of_the_bar(facts: dict[str, Any], text: str) -> None:
    assert waiting.progress_of(BatchStatus(Key("k"), **facts)) == text


def test_what_rqarm_logs_is_told_once_and_only_during_a_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RQARM_ALLOW_VOLATILE")
    for _ in range(2):
        assert run("stats").stderr.count("append-only") == 1
    assert not any(isinstance(each, common._ToStderr) for each in common.logging.getLogger("rqarm").handlers)


# -- a terminal


class Terminal:
    """What a program writes when stdout and stderr are a terminal."""

    def __init__(self, end: int, running: subprocess.Popen[str]) -> None:
        self._end, self._running = end, running
        self._text = ""
        self.code: int | None = None

    def press(self, keys: bytes) -> None:
        os.write(self._end, keys)

    def forget(self) -> None:
        """What was read so far counts no more."""
        self._text = ""

    def resize(self) -> None:
        self._running.send_signal(signal.SIGWINCH)

    def read_until(self, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in self._text:
            assert time.monotonic() < deadline, self._text
            assert self._read(), self._text

    def read_to_end(self) -> str:
        while self._read():
            pass
        self.code = self._running.wait(30)
        return self._text

    def _read(self) -> bool:
        ready, _, _ = select.select([self._end], [], [], 30)
        assert ready, f"silent for 30 s after {self._text!r}"
        try:
            piece = os.read(self._end, 65_536)
        except OSError:  # Linux says EIO when the other end is closed
            return False
        self._text += piece.decode()
        return bool(piece)


@contextmanager
def on_terminal(*args: str, url: str, is_typed_at: bool = False) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    stdin = theirs if is_typed_at else subprocess.DEVNULL
    try:
        with process(*args, url=url, stdin=stdin, stdout=theirs, stderr=theirs, env={"COLUMNS": "100"}) as running:
            os.close(theirs)
            yield Terminal(ours, running)
    finally:
        os.close(ours)


# -- for operators


@pytest.mark.parametrize("key", [b"q", b"\x1b"])
def test_top_has_a_screen_of_its_own_until_a_key_ends_it(rm: RequestManager, url: str, key: bytes) -> None:
    rm.submit("/cities/FR")
    with on_terminal("top", "--interval", "600", url=url, is_typed_at=True) as terminal:
        terminal.read_until("no worker listens")
        terminal.press(b"x\x1b[A")
        terminal.forget()
        terminal.read_until("no worker listens")
        terminal.forget()
        terminal.resize()
        terminal.read_until("no worker listens")
        terminal.press(key)
        text = terminal.read_to_end()
    assert terminal.code == 0
    assert text.rstrip().endswith("\x1b[?25h\x1b[?1049l")


def test_top_goes_on_when_the_server_is_gone_and_comes_back(tmp_path: Path) -> None:
    with servers.throwaway(servers.VALKEY or servers.REDIS) as server:
        with on_terminal("top", "--interval", "0.2", url=server.url, is_typed_at=True) as terminal:
            terminal.read_until("0 waiting")
            server.kill()
            terminal.read_until("looking again every 0.2 s")
            server.start()
            terminal.forget()
            terminal.read_until("0 waiting")
            terminal.press(b"q")
            terminal.read_to_end()
        assert terminal.code == 0


def test_search_finds_lists_and_says_how_to_go_on(run: Run, rm: RequestManager) -> None:
    for n in range(3):
        rm.submit(BatchRequest(f"/cities/{n}?token=s3cr3t", tags=["geo"] if n else []))
    found = run("search", "cities", "--limit", "2")
    assert found.stdout.count("/cities/") == 2
    assert "s3cr3t" not in found.output
    assert "looked at 2 of 3: --cursor 'pending@arm " in found.stderr
    cursor = found.stderr.split("'")[1]
    assert run("search", "cities", "--cursor", cursor).stdout.count("/cities/2") == 1
    assert run("search", "--tag", "geo").stdout.count("/cities/") == 2
    assert run("search", "--state", "failed").stdout.splitlines()[1:] == []
    document = json.loads(run("search", "--route", "/cities/{n}", "--json").stdout)
    assert (len(document["entries"]), document["cursor"], document["looked_at"], document["total"]) == (3, "", 3, 3)
    assert run("search", "--cursor", "nowhere").exit_code == 2


def test_inspect_shows_a_request_in_full_without_secrets(run: Run, rm: RequestManager) -> None:
    request = BatchRequest("/b/../export?token=s3cr3t&a=1", tags=["red"])
    rm.submit(request, payload={"to": "me"})
    text = run("inspect", request.key)
    assert text.exit_code == 0
    for part in ("state       pending", "given as    /b/../export?token=***", "dot segments", "submit", "Payloads (1)"):
        assert part in text.stdout, part
    document = run("inspect", request.uri, "--json").stdout
    assert json.loads(document)["tags"] == ["red"]
    assert "s3cr3t" not in text.output + document
    assert run("inspect", "never-seen").exit_code == 1


def test_inspect_shows_how_each_attempt_ended(run: Run, rm: RequestManager) -> None:
    key = rm.submit("/slow").key
    for message, end in (("first", Lease.retry), ("second", Lease.fail)):
        lease = take(rm)
        try:
            raise ValueError(message)
        except ValueError as error:
            end(lease, error)
    lines = run("inspect", key).stdout
    assert re.search("1 +retried +.*ValueError: first\n2 +failed +.*ValueError: second\n", lines)
    assert lines.index("Traceback of attempt 1") < lines.index("Traceback of attempt 2")


def test_claims_are_listed_and_released(run: Run, rm: RequestManager) -> None:
    key = rm.submit("/slow?token=s3cr3t").key
    lease = take(rm)
    listed = run("claims")
    assert key in listed.stdout
    assert "s3cr3t" not in listed.output
    assert json.loads(run("claims", "--json").stdout)["entries"][0]["overdue"] is False
    assert run("release", key).stdout == f"{key} released\n"
    again = run("release", key)
    assert (again.exit_code, again.stdout) == (1, f"{key} does not run\n")
    with pytest.raises(rqarm.LeaseLost):
        lease.renew()


def test_workers_are_listed_also_when_there_are_none(run: Run, rm: RequestManager) -> None:
    assert run("workers").stdout.startswith("NAME")
    rm.connection.set("rq:suspended", 1)
    assert "rq resume" in run("workers").stderr
    assert json.loads(run("workers", "--json").stdout) == {"suspended": True, "entries": []}


def test_results_are_pinned_unpinned_and_given_a_time(run: Run, rm: RequestManager) -> None:
    key = rm.cache.put("/x", 1)
    assert run("cache", "pin", "/x").stdout == f"{key} pinned\n"
    assert rm.status(key).sticky
    assert run("cache", "ttl", "60", key).stdout == f"{key} expires in 60 s\n"
    assert run("cache", "unpin", key, "--ttl", "5").stdout == f"{key} unpinned\n"
    assert rm.inspect(key).ttl is not None
    assert run("cache", "ttl", "0", key).exit_code == 2
    pending = rm.submit("/pending").key
    refused = run("cache", "pin", pending)
    assert (refused.exit_code, refused.stdout) == (1, f"{pending} has no result\n")


def test_parts_of_the_cache_are_cleared(run: Run, rm: RequestManager) -> None:
    for uri, tags in (("/a/1", ["red"]), ("/a/2", []), ("/b/1", ["blue"])):
        rm.cache.put(BatchRequest(uri, tags=tags), 1)
    assert run("cache", "clear", "--route", "/a").exit_code == 2, "it asks, and nobody is there"
    assert run("cache", "clear", "--older-than", "60", "--yes").stdout == "0 results forgotten\n"
    assert run("cache", "invalidate", "red", "green").stdout == "1 results forgotten\n"
    assert run("cache", "clear", "--route", "/a", "--yes").stdout == "1 results forgotten\n"
    assert run("cache", "clear", "--route", "/a", "--temporary").exit_code == 2
    assert [entry.uri for entry in rm.cache.list()] == ["/b/1"]


def test_the_cache_is_surveyed(run: Run, rm: RequestManager) -> None:
    rm.cache.put(BatchRequest("/a/1?token=s3cr3t", ttl=30.0), b"x" * 2048)
    text, document = run("cache", "overview").stdout, run("cache", "overview", "--json").stdout
    for part in ("1 temporary, 0 sticky, 2.0 KiB", "to 60 s: 1", "/a", "2.0 KiB"):
        assert part in text, part
    assert json.loads(document)["routes"] == [{"name": "/a", "entries": 1, "size": 2048}]
    assert "s3cr3t" not in text + document


# -- submit --from


def lines_of(result: Result) -> list[list[str]]:
    return [line.split() for line in result.stdout.splitlines()]


def test_every_line_of_a_file_is_submitted(rm: RequestManager, run: Run, tmp_path: Path) -> None:
    rm.cache.put("/hit", 1)
    file = tmp_path / "requests.txt"
    file.write_bytes(
        b"\xef\xbb\xbf/plain?a=1\r\n"
        b"\n"
        b'{"uri": "/json", "params": {"x": ["1", "2"]}, "sticky": true, "priority": "high", "tags": ["t"], "key": "k",'
        b' "payload": {"to": "me"}}\n'
        b'  {"uri": "/json2", "ttl": 60, "queue": "other", "estimated_time": 3}\n'
        b'{"operation": "thumbnail", "params": "n=1"}\n'
        b"/hit\n"
        b"/plain?a=1"
    )
    result = run("submit", "--from", str(file), "--ttl", "30")
    assert (result.exit_code, result.stderr) == (0, "")
    assert lines_of(result) == [["new", "5"], ["hit", "1"], ["all", "6"]]
    assert [rm.find(status.key) for status in rm.queue()] == [
        BatchRequest("/json", {"x": ["1", "2"]}, sticky=True, priority="high", tags=["t"], key="k"),
        BatchRequest("/plain?a=1", ttl=30),
        BatchRequest("", "n=1", operation="thumbnail", ttl=30),
    ]
    (other,) = rm.queue("other")
    assert rm.find(other.key) == BatchRequest("/json2", ttl=60, queue="other", estimated_time=3)
    assert rm.connection.hvals("arm:callbacks:k") == [b"\x81\xa2to\xa2me"]


BAD_LINES = [
    (b"/%zz", "percent"),
    (b"\xff/a", "not UTF-8 (byte 1)"),
    (b'{"uri": "/a"', "not JSON"),
    (b"{" * 100_000, "not JSON"),
    (b'{"uri": "/a", "retries": 3}', "no such field: 'retries'; there are estimated_time, key"),
    (b'{"uri": 7}', "uri"),
    (b'{"uri": "/a", "ttl": "soon"}', "ttl: seconds as a number are needed"),
    (b'{"uri": "/a", "ttl": NaN}', "ttl"),
    (b'{"uri": "/a", "ttl": 1, "sticky": true}', "sticky or ttl, not both"),
    (b'{"uri": "/a", "params": {"x": {"y": 1}}}', "params"),
    (b'{"uri": "/a", "params": 7}', "params"),
    (b'{"uri": "/a", "tags": "t"}', "tags"),
    (b'{"uri": "/a", "key": 7}', "key"),
    (b'{"uri": "/a", "queue": ["q"]}', "queue"),
    (b'{"uri": "/a", "priority": 0}', "priority"),
    (b'{"uri": "/a", "operation": 7}', "operation"),
    (b'{"uri": "/a", "sticky": "yes"}', "sticky"),
    (b'{"payload": 1}', "uri"),
    (b'{"uri": "/a", "payload": ' + b"[" * 100 + b"]" * 100 + b"}", "more than 64 containers"),
    (b'{"uri": "/theirs", "key": "k"}', "already belongs to"),
]


def test_bad_lines_are_told_with_their_number_and_stop_nothing(rm: RequestManager, run: Run, tmp_path: Path) -> None:
    rm.submit(BatchRequest("/mine", key="k"))
    file = tmp_path / "requests.txt"
    file.write_bytes(b"".join(b"/good/%d\n%s\n" % (n, line) for n, (line, _) in enumerate(BAD_LINES)))
    result = run("submit", "--from", str(file))
    assert result.exit_code == 2
    told = sorted(result.stderr.splitlines(), key=lambda line: int(line.split(":")[2]))
    assert len(told) == len(BAD_LINES)
    for n, (line, (_, why)) in enumerate(zip(told, BAD_LINES, strict=True)):
        assert line.startswith(f"rqarm: {file}:{2 * n + 2}: "), line
        assert why in line
    assert lines_of(result) == [["new", str(len(BAD_LINES))], ["not", "taken", str(len(BAD_LINES))]]
    assert len(rm.queue()) == len(BAD_LINES) + 1


def test_a_line_that_does_not_end_is_refused_without_reading_it_into_memory(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rqarm.cli.bulk.MAX_LINE_BYTES", 1_000)
    file = tmp_path / "requests.txt"
    file.write_bytes(b"/a\n/" + b"x" * 5_000 + b"\n/b\n/" + b"y" * 999 + b"\n" + b"z" * 2_500)
    result = run("submit", "--from", str(file))
    assert [line.split(":")[2] for line in result.stderr.splitlines()] == ["2", "4", "5"]
    assert lines_of(result) == [["new", "2"], ["not", "taken", "3"]]


def test_requests_from_stdin_as_json_are_a_status_per_line(rm: RequestManager, run: Run) -> None:
    rm.submit("/joined")
    result = run("submit", "--from", "-", "--json", input="/a?token=x\n/joined\n/%zz\n", env={"RQARM_MAX_PENDING": "2"})
    assert result.exit_code == 2
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(each["uri"], each["outcome"]) for each in documents] == [("/a?token=***", "new"), ("/joined", "joined")]
    assert "<stdin>:3: " in result.stderr
    assert [line.split() for line in result.stderr.splitlines()[1:]] == [
        ["new", "1"],
        ["joined", "1"],
        ["not", "taken", "1"],
    ]
    refused = run("submit", "--from", "-", input="/b\n", env={"RQARM_MAX_PENDING": "2"})
    assert (refused.exit_code, lines_of(refused)) == (1, [["refused", "1"], ["all", "1"]])


def test_waiting_for_all_lines_tells_what_did_not_complete(rm: RequestManager, run: Run, url: str) -> None:
    rm.cache.put("/hit", 1)
    bad = BatchRequest("/bad").key
    with worker(url, 1, ValueError("no")):
        result = run("submit", "--from", "-", "--wait", "--timeout", "30", input="/good\n/hit\n/bad\n")
    assert result.exit_code == 1
    assert lines_of(result)[3:] == [[bad, "failed"], ["completed", "1"], ["failed", "1"]]
    late = run("submit", "--from", "-", "--timeout", "0.01", "--json", input="/late\n/hit\n")
    assert late.exit_code == 3
    documents = {each["uri"]: each for each in map(json.loads, late.stdout.splitlines())}
    assert [(documents[uri]["state"], documents[uri]["outcome"]) for uri in ("/hit", "/late")] == [
        ("completed", "hit"),
        ("pending", "new"),
    ]


@pytest.mark.parametrize(
    "args", [["/uri"], ["-p", "a=1"], ["--key", "k"], ["--again"], ["-o", "-"]], ids=lambda args: args[0]
)
def test_what_makes_no_sense_for_many_is_wrong_usage(run: Run, args: list[str]) -> None:
    result = run("submit", "--from", "-", *args, input="/a\n")
    assert result.exit_code == 2
    assert "cannot be combined with --from" in result.stderr


def test_a_file_that_is_not_there_is_wrong_usage(run: Run, tmp_path: Path) -> None:
    assert run("submit", "--from", str(tmp_path / "none")).exit_code == 2
    assert run("submit", "--from", str(tmp_path)).exit_code == 2


def test_a_bar_shows_how_far_a_file_is(rm: RequestManager, url: str, tmp_path: Path) -> None:
    file = tmp_path / "requests.txt"
    file.write_text("".join(f"/n/{n}\n" for n in range(2500)) + "/%zz\n")
    with on_terminal("submit", "--from", str(file), url=url) as terminal:
        terminal.read_until("submitting")
        text = terminal.read_to_end()
    assert terminal.code == 2
    assert "100%" in text
    assert f"{file}:2501: " in text
    assert len(rm.queue()) == 2500


# -- quarantine


def set_aside(rm: RequestManager, key: str, error: Exception, **info: Any) -> None:
    rm.submit(BatchRequest(f"/{key}?token=sesame", key=key), payload={"for": key})
    take(rm).fail(error, quarantine=True, **info)


def test_the_quarantine_is_listed_newest_first_and_shown_with_everything_but_secrets(
    rm: RequestManager, run: Run
) -> None:
    set_aside(rm, "first", ValueError("no"))
    set_aside(rm, "second", TimeoutError("late"), status_code=504, api_key="sesame")
    listed = run("quarantine", "list")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["KEY", "second", "first"]
    assert "TimeoutError" in listed.stdout
    assert [line.split()[0] for line in run("quarantine", "list", "--exception", "ValueError").stdout.splitlines()] == [
        "KEY",
        "first",
    ]
    shown = run("quarantine", "show", "second")
    lines = dict(line.split(None, 1) for line in shown.stdout.splitlines() if " " in line)
    assert lines["info"] == '{"status_code": 504, "api_key": "***"}'
    assert lines["payloads"] == '[{"for": "second"}]'
    assert lines["reason"] == "asked"
    assert "sesame" not in listed.output + shown.output
    assert run("quarantine", "show", "nothing").exit_code == FAILURE


def test_requeue_and_discard_do_what_is_named_and_the_exit_code_tells_of_the_rest(rm: RequestManager, run: Run) -> None:
    for key in "abc":
        set_aside(rm, key, ValueError(key))
    requeued = run("quarantine", "requeue", "a", "nothing")
    assert (requeued.stdout.splitlines(), requeued.exit_code) == (["a requeued", "nothing unknown"], FAILURE)
    assert rm.status("a").state is State.PENDING
    assert run("quarantine", "discard", "a").exit_code == NOT_READY
    assert run("quarantine", "discard", "--exception", "TypeError").stdout == ""
    discarded = run("quarantine", "discard", "--exception", "ValueError")
    assert (discarded.stdout.splitlines(), discarded.exit_code) == (["b discarded", "c discarded"], 0)
    assert rm.quarantine.count() == 0


@pytest.mark.parametrize("verb", ["requeue", "discard"])
@pytest.mark.parametrize("choice", [(), ("a", "--all"), ("a", "--route", "/x")])
def test_nothing_moves_that_was_not_clearly_chosen(
    rm: RequestManager, run: Run, verb: str, choice: Sequence[str]
) -> None:
    set_aside(rm, "a", ValueError("a"))
    result = run("quarantine", verb, *choice)
    assert result.exit_code == USAGE
    assert "--all" in result.stderr
    assert rm.quarantine.count() == 1
    assert run("quarantine", verb, "--all").exit_code == 0
    assert rm.quarantine.count() == 0
