"""One execution from ticket to end, run by RQ's SimpleWorker in this process."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench import Bench
from redis.exceptions import OutOfMemoryError, ReadOnlyError
from rq.exceptions import ShutDownImminentException
from rq.registry import FailedJobRegistry
from servers import eventually
from workers import burst, own_signals, timed

from rqarm import (
    BatchRequest,
    BatchStatus,
    Context,
    Result,
    Retry,
    RqarmError,
    State,
    connect,
    flows,
)
from rqarm.calls import Call, Command
from rqarm.model import Key
from rqarm.replies import Attempt
from rqarm.shell import Shell
from rqarm.worker import perform
from rqarm.worker.execution import Execution
from rqarm.worker.limits import time_limit

#: far above what any test needs; a test that reaches it is wrong
LONG = 20.0


def error_of(status: BatchStatus) -> tuple[str, str]:
    assert status.error is not None
    return status.error["type"].rpartition(".")[2], status.error["message"]


def in_background(call: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


# -- results


VALUES = [
    (None, None),
    (42, 42),
    ({"rows": [1, 2.5, "x", b"y", None, True]}, {"rows": [1, 2.5, "x", b"y", None, True]}),
    ("text", "text"),
    (b"bytes", b"bytes"),
    ((1, 2), (1, 2)),
    (Result(b"a,b\n", content_type="text/csv", filename="r.csv"),) * 2,
]


@pytest.mark.parametrize(("returned", "read"), VALUES, ids=[type(value).__name__ for value, _ in VALUES])
def test_what_a_handler_returns_is_what_a_client_reads(bench: Bench, returned: Any, read: Any) -> None:
    bench.route(lambda: returned)
    status = bench.run()
    assert (status.state, status.attempts, status.error) == (State.COMPLETED, 1, None)
    assert bench.rm.result(status.key) == read
    assert bench.verbs() == ["submit", "start", "complete"]


def test_an_async_handler_returns_like_any_other(bench: Bench) -> None:
    async def handler() -> dict[str, int]:
        await asyncio.sleep(0)
        return {"n": 1}

    bench.route(handler)
    assert bench.rm.result(bench.run().key) == {"n": 1}


def test_a_generator_of_bytes_is_stored_piece_by_piece(bench: Bench) -> None:
    bench.set(inline_bytes=100, chunk_bytes=1000, compress_above=10**9)
    pieces = [os.urandom(700) for _ in range(10)]
    bench.handlers.route("/x")(generator_of(lambda: iter(pieces)))
    status = bench.run()
    assert bench.rm.result(status.key) == b"".join(pieces)
    assert len(bench.rm.connection.keys("arm:chunk:*")) == 7


def generator_of(pieces: Callable[[], Iterator[bytes]]) -> Callable[..., Iterator[bytes]]:
    def handler(request: Any, context: Any) -> Iterator[bytes]:
        yield from pieces()

    return handler


def test_a_file_and_a_result_with_pieces_are_read_to_their_end(bench: Bench) -> None:
    text = b"0123456789" * 50_000
    bench.route(lambda: io.BytesIO(text), "/file")
    bench.route(lambda: Result(iter([text, text]), content_type="text/plain"), "/pieces")
    assert bench.rm.result(bench.run("/file").key) == text
    assert bench.rm.result(bench.run("/pieces").key) == Result(text * 2, content_type="text/plain")


# -- life of a result: request > route > manager


@pytest.mark.parametrize(
    ("request_ttl", "route_ttl", "seconds"), [(None, None, 500), (None, 50, 50), (5, 50, 5), (5, None, 5)]
)
def test_a_ttl_is_that_of_the_request_else_of_the_route_else_of_the_manager(
    bench: Bench, request_ttl: float | None, route_ttl: float | None, seconds: float
) -> None:
    bench.set(ttl=500)
    bench.route(lambda: 1, ttl=route_ttl)
    status = bench.run(BatchRequest("/x", ttl=request_ttl))
    assert seconds - 2 < bench.ttl(status.key) <= seconds
    assert bench.rm.status(status.key).sticky is False


@pytest.mark.parametrize(
    ("sticky_request", "request_ttl", "sticky_route", "sticky"),
    [(True, None, False, True), (False, None, True, True), (False, 5, True, False), (False, None, False, False)],
)
def test_sticky_is_that_of_the_request_else_of_the_route(
    bench: Bench, sticky_request: bool, request_ttl: float | None, sticky_route: bool, sticky: bool
) -> None:
    bench.route(lambda: 1, sticky=sticky_route)
    status = bench.run(BatchRequest("/x", sticky=sticky_request, ttl=request_ttl))
    assert status.sticky is sticky
    assert (bench.ttl(status.key) < 0) is sticky


# -- which handler


def test_the_fallback_takes_what_nothing_else_takes(bench: Bench) -> None:
    bench.route(lambda: "route")
    bench.handlers.fallback(lambda request, context: "fallback")
    assert bench.rm.result(bench.run("/x").key) == "route"
    assert bench.rm.result(bench.run("/y").key) == "fallback"


HOPELESS = [
    ("/unknown", "NoHandler", "/unknown"),
    ("/number?n=many", "InvalidRequest", "many"),
    ("/number", "InvalidRequest", "'n'"),
    ("/lambda", "UnpackableResult", r"$['rows'][1]"),
    ("/large", "ResultTooLarge", "10000 bytes"),
    ("/half", "ResultTooLarge", "10000 bytes"),
]


@pytest.mark.parametrize(("uri", "kind", "text"), HOPELESS, ids=[uri for uri, _, _ in HOPELESS])
def test_what_can_only_fail_again_fails_at_once_and_says_why(bench: Bench, uri: str, kind: str, text: str) -> None:
    bench.set(max_result_bytes=10_000, inline_bytes=100, chunk_bytes=1000, compress_above=10**9)
    retry = Retry(max=5)

    def number(request: Any, context: Any, n: int) -> int:
        return n

    bench.handlers.route("/number", retry=retry)(number)
    bench.route(lambda: {"rows": [1, lambda: None]}, "/lambda", retry=retry)
    bench.route(lambda: b"x" * 10_001, "/large", retry=retry)
    bench.handlers.route("/half", retry=retry)(generator_of(lambda: iter([b"x" * 5000] * 3)))
    status = bench.run(uri)
    found, message = error_of(status)
    assert (status.state, found, status.attempts) == (State.FAILED, kind, 1)
    assert text in message
    assert bench.verbs() == ["submit", "start", "fail"]
    assert bench.rm.connection.keys("arm:chunk:*") == []


def test_handlers_that_raise_when_they_are_imported_fail_the_request(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = tmp_path / "explosive.py"
    module.write_text("1 / 0")
    monkeypatch.setenv("RQARM_HANDLERS", str(module))
    key = bench.rm.submit("/x").key
    burst(bench.rm.connection)
    status = bench.rm.status(key)
    assert status.state is State.FAILED
    kind, message = error_of(status)
    assert (kind, "explosive.py" in message, "ZeroDivisionError: division by zero" in message) == (
        "ConfigError",
        True,
        True,
    )


def test_handlers_are_loaded_before_the_lease_begins(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key = bench.rm.submit("/x").key
    module, seen = tmp_path / "slow_to_load.py", tmp_path / "seen"
    module.write_text(
        f"""
from pathlib import Path
from rqarm import Handlers, RequestManager
with RequestManager({bench.url!r}) as rm:
    Path({str(seen)!r}).write_text(rm.status({key!r}).state)
handlers = Handlers()
handlers.fallback(lambda request, context: "done")
"""
    )
    monkeypatch.setenv("RQARM_HANDLERS", str(module))
    burst(bench.rm.connection)
    assert seen.read_text() == "pending"
    assert bench.rm.result(key) == "done"


def test_handlers_that_cannot_be_loaded_fail_the_request_and_say_why(
    bench: Bench, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RQARM_HANDLERS", "no_such_module:handlers")
    key = bench.rm.submit("/x").key
    with connect.open_client(url) as client:
        burst(client)
    found, message = error_of(bench.rm.status(key))
    assert found == "ConfigError"
    assert "no_such_module" in message


# -- shutdown of a worker that runs handlers in its own thread


def second_signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    first = time.monotonic()
    eventually(lambda: time.monotonic() - first > 1.1)  # RQ takes no notice of a second one within a second
    os.kill(os.getpid(), signal.SIGTERM)


def dyno_ends() -> None:
    raise ShutDownImminentException("shut down imminent", {})


@pytest.mark.parametrize("ends", [second_signal, dyno_ends])
def test_a_request_whose_worker_is_made_to_end_is_handed_back(bench: Bench, ends: Callable[[], None]) -> None:
    def handler() -> str:
        if bench.calls == 1:
            ends()
        return "done"

    bench.route(handler)
    status = bench.run()
    if status.state is State.PENDING:  # the worker has stopped
        assert (status.attempts, status.error) == (0, None)
        assert FailedJobRegistry("arm", connection=bench.rm.connection).get_job_ids() == []
        bench.work()
    assert bench.rm.result(status.key) == "done"
    assert bench.verbs() == ["submit", "start", "release", "start", "complete"]


def test_the_traceback_of_a_handler_begins_with_the_handler(bench: Bench) -> None:
    bench.route(lambda: 1 / 0)
    error = bench.run().error
    assert error is not None
    frames = [line for line in error["traceback"].splitlines() if line.startswith("  File")]
    assert "bench.py" in frames[0]
    assert __file__ in frames[-1]
    assert len(frames) == 2, "the bench and the lambda"
    # what rqarm itself refuses has all of it
    error = bench.run("/nobody").error
    assert error is not None
    assert "execution.py" in error["traceback"]


# -- errors and retries


def test_a_handler_that_raises_is_retried_as_often_as_its_route_says(bench: Bench) -> None:
    attempts: list[int] = []

    def handler(context: Context) -> None:
        attempts.append(context.attempt)
        raise ValueError(f"attempt {context.attempt}")

    bench.route(handler, retry=Retry(max=2, interval=0))
    status = bench.run()
    assert attempts == [1, 2, 3]
    assert (status.state, status.attempts) == (State.FAILED, 3)
    assert error_of(status) == ("ValueError", "attempt 3")
    assert "handler" in status.error["traceback"]
    assert bench.verbs() == ["submit", *["start", "retry"] * 2, "start", "fail"]


def test_a_success_after_a_retry_leaves_no_error(bench: Bench) -> None:
    def handler(context: Context) -> int:
        if context.attempt == 1:
            raise ValueError("once")
        return context.attempt

    bench.route(handler, retry=Retry(max=1))
    status = bench.run()
    assert (status.state, status.error, bench.rm.result(status.key)) == (State.COMPLETED, None, 2)


def test_a_retry_that_waits_is_scheduled_and_shows_its_error(bench: Bench) -> None:
    def handler() -> None:
        raise ValueError("not now")

    bench.route(handler, retry=Retry(max=1, interval=60))
    status = bench.run()
    assert (status.state, error_of(status)) == (State.PENDING, ("ValueError", "not now"))
    (due,) = [due for _, due in bench.rm.connection.zrange("rq:scheduled:arm", 0, -1, withscores=True)]
    assert 50 < due - time.time() <= 62


def test_a_handler_may_ask_to_be_called_again_with_other_arguments(bench: Bench) -> None:
    seen: list[tuple[int, dict[str, Any], int]] = []

    def handler(request: Any, context: Context, page: int = 0) -> int:
        seen.append((context.attempt, dict(context.kwargs), page))
        if page < 2:
            raise context.retry(delay=0, page=page + 1)
        return page

    bench.handlers.route("/x")(handler)
    status = bench.run()
    assert seen == [(1, {}, 0), (2, {"page": 1}, 1), (3, {"page": 2}, 2)]
    assert bench.rm.result(status.key) == 2


def test_arguments_of_a_retry_that_cannot_be_stored_end_the_request(bench: Bench) -> None:
    def handler(context: Context) -> None:
        raise context.retry(delay=0, page=object())

    bench.route(handler)
    status = bench.run()
    assert (status.state, error_of(status)[0]) == (State.FAILED, "UnpackableResult")


def test_a_handler_that_exits_fails_and_the_worker_goes_on(bench: Bench) -> None:
    bench.route(lambda: sys.exit(3), "/exit")
    bench.route(lambda: 1, "/x")
    exited, fine = bench.rm.submit_many(["/exit", "/x"])
    bench.work()
    assert error_of(bench.rm.status(exited.key)) == ("SystemExit", "3")
    assert bench.rm.result(fine.key) == 1


@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit, type("Odd", (BaseException,), {})])
def test_whatever_a_handler_raises_ends_its_request(bench: Bench, error: type[BaseException]) -> None:
    def handler() -> None:
        raise error("odd")

    bench.route(handler)
    status = bench.run()
    assert (status.state, error_of(status)) == (State.FAILED, (error.__name__, "odd"))


def test_a_generator_that_raises_half_way_leaves_no_pieces(bench: Bench) -> None:
    bench.set(inline_bytes=100, chunk_bytes=1000, compress_above=10**9)
    staged: list[int] = []

    def pieces() -> Iterator[bytes]:
        for _ in range(5):
            yield os.urandom(1000)
        staged.append(len(bench.rm.connection.keys("arm:chunk:*")))
        raise OSError("the disk is gone")

    bench.handlers.route("/x")(generator_of(pieces))
    status = bench.run()
    assert (status.state, error_of(status)) == (State.FAILED, ("OSError", "the disk is gone"))
    assert staged[0] > 0
    assert bench.rm.connection.keys("arm:chunk:*") + bench.rm.connection.keys("arm:result:*") == []


@pytest.mark.parametrize(("setting", "of_route", "answers"), [(60, None, True), (60, 0.0, False), (0, 60.0, True)])
def test_a_failure_answers_for_as_long_as_route_or_manager_say(
    bench: Bench, setting: float, of_route: float | None, answers: bool
) -> None:
    def handler() -> None:
        raise ValueError("no")

    bench.set(negative_ttl=setting)
    bench.route(handler, negative_ttl=of_route)
    bench.run()
    assert bench.rm.submit("/x").outcome == ("negative" if answers else "new")


def test_an_execution_that_has_ended_leaves_nothing_to_the_garbage_collector(bench: Bench) -> None:
    bench.route(lambda context: context.attempt)
    bench.run("/x")  # loads what there is to load
    gc.collect()
    gc.disable()
    try:
        of_others = [each for each in gc.get_objects() if isinstance(each, Execution | Context)]
        assert bench.run("/x?n=2").state == "completed"
        alive = [each for each in gc.get_objects() if isinstance(each, Execution | Context)]
        assert {id(each) for each in alive} <= {id(each) for each in of_others}
    finally:
        gc.enable()


def test_the_record_of_a_failure_is_kept_as_long_as_the_route_says(bench: Bench) -> None:
    bench.route(lambda: 1 / 0, failure_ttl=50, quarantine=False)
    status = bench.run()
    assert not status.quarantined
    assert 48 < bench.ttl(status.key) <= 50


# -- the server refuses while the work is done


@pytest.mark.parametrize("error", [ReadOnlyError("READONLY"), OutOfMemoryError("OOM")], ids=["READONLY", "OOM"])
@pytest.mark.parametrize("verb", ["complete", "stage", "fail", "retry"])
def test_an_end_that_the_server_refuses_for_a_while_is_told_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, verb: str, error: Exception
) -> None:
    def handler() -> bytes:
        runs.append(1)
        if verb == "fail" or (verb == "retry" and len(runs) == 1):
            raise ValueError("the handler's own")
        return os.urandom(5000)

    runs: list[int] = []
    bench.set(inline_bytes=100, chunk_bytes=1000, compress_above=10**9)
    bench.route(handler, retry=Retry(max=1) if verb == "retry" else None)
    left = refuse(monkeypatch, verb, error, times=3)
    status = bench.run()
    assert left == []
    assert status.state is (State.FAILED if verb == "fail" else State.COMPLETED)
    assert len(runs) == (2 if verb == "retry" else 1)
    if verb == "fail":
        assert error_of(status) == ("ValueError", "the handler's own")


def refuse(monkeypatch: pytest.MonkeyPatch, verb: str, error: Exception, times: int) -> list[Exception]:
    """Let the server refuse the next calls of a verb; gives what is still to be refused."""
    left = [error] * times
    execute = Shell.execute

    def is_it(step: Any) -> bool:
        if isinstance(step, Call):
            return step.script.name == verb
        return verb == "stage" and isinstance(step, Command) and step.argv[0] == "SET"

    def refusing(self: Shell, step: Any) -> Any:
        if left and is_it(step):
            raise left.pop()
        return execute(self, step)

    monkeypatch.setattr(Shell, "execute", refusing)
    return left


def test_a_server_that_refuses_for_longer_than_the_lease_ends_the_attempt_not_the_request(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.set(lease=0.3)
    runs: list[int] = []
    bench.route(lambda: runs.append(1))
    left = refuse(monkeypatch, "complete", ReadOnlyError("READONLY"), times=10_000)
    key = bench.run().key
    assert bench.rm.status(key).state is State.IN_PROGRESS
    left.clear()
    eventually(lambda: bench.rm.queues.sweep() or bench.rm.status(key).state is State.PENDING)
    assert bench.rm.status(key).error is not None


# -- limits


def someone_runs(bench: Bench, uri: str) -> Attempt:
    """A request of the route runs elsewhere, in the only place of its limit."""
    core = bench.rm.core
    bench.rm.submit(uri)
    attempt = bench.rm.shell.run(flows.take(core, None, "elsewhere", 0))
    assert attempt is not None
    assert bench.rm.shell.run(flows.admit(core, attempt, "/x", 1))
    return attempt


def test_a_request_above_the_limit_waits_and_comes_when_there_is_a_place(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[str] = []
    bench.route(lambda request, context: runs.append(f"{request.uri} {context.attempt}"), max_running=1)
    bench.route(lambda: "free", "/free")
    other = someone_runs(bench, "/x?n=1")
    with caplog.at_level("INFO", "rqarm.worker"):
        status = bench.run("/x?n=2")
    assert (status.state, status.attempts, runs) == (State.PENDING, 0, [])
    assert bench.verbs()[-2:] == ["start", "park"]
    assert f"{status.key} /x?n=2: parked by /x, waited" in caplog.text
    assert FailedJobRegistry("arm", connection=bench.rm.connection).get_job_ids() == []
    assert bench.run("/free").state is State.COMPLETED, "others pass"
    bench.rm.shell.run(flows.finish(bench.rm.core, other, "done"))
    bench.work()
    assert bench.rm.status(status.key).state is State.COMPLETED
    assert runs == ["/x?n=2 1"]


@pytest.mark.parametrize("other_is_there", [False, True], ids=["a place", "no place"])
def test_a_server_that_refuses_to_admit_for_a_while_is_asked_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, other_is_there: bool
) -> None:
    bench.route(lambda: "done", max_running=1)
    if other_is_there:
        someone_runs(bench, "/x?n=1")
    left = refuse(monkeypatch, "admit", ReadOnlyError("READONLY"), times=3)
    status = bench.run()
    assert left == []
    assert (status.state, status.error) == (State.PENDING if other_is_there else State.COMPLETED, None)


def test_who_is_cancelled_before_it_is_admitted_does_not_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    execute, runs = Shell.execute, list[int]()

    def cancelling(self: Shell, step: Any) -> Any:
        if isinstance(step, Call) and step.script.name == "admit":
            execute(self, bench.rm.core.calls.cancel(BatchRequest("/x").key))
        return execute(self, step)

    bench.route(lambda: runs.append(1), max_running=1)
    monkeypatch.setattr(Shell, "execute", cancelling)
    assert bench.run().state is State.CANCELLED
    assert runs == []


# -- time


def test_a_handler_is_stopped_at_its_limit(bench: Bench) -> None:
    bench.route(lambda: time.sleep(LONG), timeout=0.1)
    assert timed(bench.run) < LONG / 2
    status = bench.rm.status(BatchRequest("/x").key)
    assert (status.state, error_of(status)[0]) == (State.FAILED, "TimeLimit")
    assert "0.1 s" in error_of(status)[1]


def test_the_limit_of_the_settings_counts_when_the_route_gives_none(bench: Bench) -> None:
    bench.set(timeout=0.1)
    bench.route(lambda: time.sleep(LONG))
    assert error_of(bench.run())[0] == "TimeLimit"


def test_a_time_limit_may_be_retried(bench: Bench) -> None:
    bench.route(lambda context: context.attempt == 2 or time.sleep(LONG), timeout=0.1, retry=Retry(max=1))
    status = bench.run()
    assert (status.state, status.attempts) == (State.COMPLETED, 2)


def test_an_async_handler_is_stopped_at_its_limit_and_stays_stopped(bench: Bench) -> None:
    went_on: list[str] = []
    tidied: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(0.3)
            went_on.append("slow")
        finally:
            tidied.append("slow")

    async def next_one() -> int:
        await asyncio.sleep(0.5)
        return 1

    bench.route(slow, "/slow", timeout=0.1)
    bench.route(next_one, "/next")
    first, second = bench.rm.submit_many(["/slow", "/next"])
    bench.work()
    assert error_of(bench.rm.status(first.key))[0] == "TimeLimit"
    assert bench.rm.result(second.key) == 1
    assert (went_on, tidied) == ([], ["slow"])


def test_an_async_handler_that_blocks_its_loop_is_stopped_too(bench: Bench) -> None:
    async def handler() -> None:
        time.sleep(LONG)

    bench.route(handler, timeout=0.1)
    assert error_of(bench.run())[0] == "TimeLimit"


def test_an_async_handler_with_many_tasks_is_stopped_at_its_limit(bench: Bench) -> None:
    async def spin() -> None:
        while True:
            await asyncio.sleep(0)

    async def handler() -> None:
        background = [asyncio.create_task(spin()) for _ in range(20)]
        await asyncio.sleep(LONG)
        del background

    bench.route(handler, timeout=0.1)
    assert timed(bench.run) < LONG / 2
    assert error_of(bench.rm.status(BatchRequest("/x").key))[0] == "TimeLimit"


def test_a_time_out_of_a_handlers_own_is_not_our_limit(bench: Bench) -> None:
    async def handler() -> None:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(LONG)

    bench.route(handler, timeout=LONG)
    assert error_of(bench.run())[0] == "TimeoutError"


def test_the_time_between_the_pieces_of_a_generator_counts(bench: Bench) -> None:
    def pieces() -> Iterator[bytes]:
        while True:
            time.sleep(0.05)
            yield b"x"

    bench.handlers.route("/x", timeout=0.3)(generator_of(pieces))
    assert error_of(bench.run())[0] == "TimeLimit"


def test_rqs_alarm_is_set_again_after_a_time_limit() -> None:
    with own_signals():
        heard: list[int] = []
        signal.signal(signal.SIGALRM, lambda number, _: heard.append(number))
        signal.setitimer(signal.ITIMER_REAL, 60)
        with time_limit(5):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 5
        left = signal.getitimer(signal.ITIMER_REAL)[0]
        signal.raise_signal(signal.SIGALRM)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert 55 < left <= 60
        assert heard == [signal.SIGALRM]


def test_rqs_alarm_stays_when_it_is_the_sooner_one() -> None:
    with own_signals():
        signal.setitimer(signal.ITIMER_REAL, 5)
        with time_limit(60):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 5
        left = signal.getitimer(signal.ITIMER_REAL)[0]
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert 0 < left <= 5


def test_a_limit_in_a_thread_is_left_to_others() -> None:
    done: list[int] = []

    def in_thread() -> None:
        with time_limit(0.001):
            threading.Event().wait(0.05)
            done.append(1)

    in_background(in_thread).join(LONG)
    assert done == [1]


# -- the lease


def test_the_lease_is_renewed_while_a_handler_runs_longer(bench: Bench) -> None:
    bench.set(lease=0.3)
    runs: list[float] = []

    def handler(context: Context) -> bool:
        runs.append(time.monotonic())
        eventually(lambda: time.monotonic() - runs[0] > 1.0)
        assert bench.rm.queues.sweep() == 0
        return context.cancelled

    bench.route(handler)
    status = bench.run()
    assert (status.state, bench.rm.result(status.key), len(runs)) == (State.COMPLETED, False, 1)
    assert [thread.name for thread in threading.enumerate() if thread.name == "rqarm-renew"] == []


def test_a_handler_sees_that_its_request_was_cancelled(bench: Bench) -> None:
    bench.set(lease=0.3)
    seen: list[bool] = []

    def handler(context: Context) -> str:
        assert not context.cancelled
        bench.rm.cancel(context.key)
        seen.append(eventually(lambda: context.cancelled))
        return "too late"

    bench.route(handler)
    status = bench.run()
    assert (status.state, seen) == (State.CANCELLED, [True])
    assert bench.verbs() == ["submit", "start", "cancel"]


def test_progress_tells_a_handler_at_once_that_its_request_was_cancelled(bench: Bench) -> None:
    def handler(context: Context) -> bool:
        bench.rm.cancel(context.key)
        context.progress(1.0)
        return seen.append(context.cancelled)  # type: ignore[func-returns-value]

    seen: list[bool] = []
    bench.route(handler)
    assert (bench.run().state, seen) == (State.CANCELLED, [True])


@pytest.mark.parametrize("ending", ["result", "error", "retry"])
def test_what_comes_too_late_is_given_up(bench: Bench, caplog: pytest.LogCaptureFixture, ending: str) -> None:
    """The lease has lapsed, another attempt holds the key: this one's end counts for nothing."""
    bench.set(lease=0.3)
    caplog.set_level("INFO", "rqarm.worker")

    def handler(context: Context) -> str:
        if context.attempt > 1:
            return "second"
        take_over(bench, context.key)
        if ending == "error":
            raise ValueError("late")
        if ending == "retry":
            raise context.retry(delay=0)
        return "first"

    bench.route(handler)
    key = bench.rm.submit("/x").key
    bench.work()
    status = bench.rm.status(key)
    assert (status.state, status.attempts, status.worker) == (State.IN_PROGRESS, 2, "another")
    assert "given up (in_progress)" in caplog.text


def take_over(bench: Bench, key: Key) -> None:
    """Another worker finds the lease lapsed and starts the request again."""
    rm, client = bench.rm, bench.rm.connection
    client.hset(f"arm:status:{key}", "lease_until", 0)
    client.zadd("arm:leases", {key: 0})
    rm.shell.run(flows.sweep(rm.core))
    job_id = client.hget(f"arm:status:{key}", "job_id").decode()
    rm.shell.run(flows.start(rm.core, key, job_id, "another"))


def test_progress_shows_in_the_status(bench: Bench) -> None:
    seen: list[float | None] = []

    def handler(context: Context) -> int:
        context.progress(0.25, "a quarter")
        seen.append(bench.rm.status(context.key).progress)
        context.progress(1.0)
        seen.append(bench.rm.status(context.key).progress)
        return 1

    bench.route(handler)
    assert bench.run().progress is None
    assert seen == [0.25, 1.0]


def test_a_running_request_says_who_runs_it(bench: Bench) -> None:
    seen: list[BatchStatus] = []
    bench.route(lambda context: seen.append(bench.rm.full_status(context.key)) or context.worker)
    worker = bench.rm.result(bench.run().key)
    assert (seen[0].state, seen[0].position, seen[0].worker) == (State.IN_PROGRESS, 0, worker)


# -- tickets


@pytest.mark.parametrize("then", ["cancel", "complete", "forget"])
def test_a_superseded_ticket_runs_nothing(bench: Bench, then: str) -> None:
    runs: list[int] = []
    bench.route(lambda: runs.append(1))
    key = bench.rm.submit("/x").key
    if then == "complete":
        bench.rm.cache.put("/x", "put")
    else:
        bench.rm.cancel(key)
    if then == "forget":
        bench.rm.forget(key)
    bench.work()
    states = {"cancel": State.CANCELLED, "complete": State.COMPLETED, "forget": State.UNKNOWN}
    assert (runs, bench.rm.status(key).state) == ([], states[then])
    assert "start" not in bench.verbs()


def test_perform_is_for_rq_workers_only() -> None:
    with pytest.raises(RqarmError, match=r"RQ worker.*rm\.queues"):
        perform("arm", "key")


def test_a_worker_looks_for_the_dead_after_each_job(bench: Bench) -> None:
    bench.set(lease=0.2)
    bench.handlers.fallback(lambda request, context: request.uri)
    lost = bench.rm.submit("/lost").key
    bench.rm.connection.delete("rq:queue:arm")

    def found() -> bool:
        bench.run(f"/{time.monotonic_ns()}")
        return bench.rm.status(lost).state is State.COMPLETED

    eventually(found)


def test_a_sweep_that_fails_is_no_matter_of_the_job(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.route(lambda: 1)
    bench.rm.connection.set("arm:quarantine", "somebody else's")
    assert bench.run().state is State.COMPLETED
    assert bench.rm.connection.keys("rq:failed:*") == []
    assert "the sweep did not run" in caplog.text


# -- resources


def test_a_resource_is_built_once_per_process_and_only_when_used(bench: Bench) -> None:
    built: list[str] = []

    @bench.handlers.resource("db")
    def db() -> SimpleNamespace:
        built.append("db")
        return SimpleNamespace(answer=42)

    @bench.handlers.resource("unused")
    def unused() -> None:
        built.append("unused")

    bench.handlers.fallback(lambda request, context: context.resources.db.answer)
    first, second = bench.run("/1"), bench.run("/2")
    assert [bench.rm.result(status.key) for status in (first, second)] == [42, 42]
    assert built == ["db"]


def test_an_async_resource_lives_on_the_loop_of_the_handlers(bench: Bench) -> None:
    built: list[asyncio.AbstractEventLoop] = []

    @bench.handlers.resource("session")
    async def session() -> asyncio.AbstractEventLoop:
        built.append(asyncio.get_running_loop())
        return built[0]

    async def handler(request: Any, context: Context) -> bool:
        return context.resources.session is asyncio.get_running_loop()

    bench.handlers.fallback(handler)
    assert [bench.rm.result(bench.run(uri).key) for uri in ("/1", "/2")] == [True, True]
    assert len(built) == 1


def test_a_resource_that_cannot_be_built_fails_the_request_and_is_tried_again(bench: Bench) -> None:
    tries: list[int] = []

    @bench.handlers.resource("db")
    def db() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("no route to host")
        return "db"

    bench.route(lambda context: context.resources.db, retry=Retry(max=1))
    status = bench.run()
    assert (status.state, bench.rm.result(status.key)) == (State.COMPLETED, "db")


@pytest.mark.parametrize("first_fails", [True, False])
def test_an_async_resource_that_cannot_be_built_is_tried_again(bench: Bench, first_fails: bool) -> None:
    tries: list[int] = []

    @bench.handlers.resource("session")
    async def session() -> str:
        tries.append(1)
        if first_fails and len(tries) == 1:
            raise OSError("no route to host")
        return "session"

    async def handler(context: Context) -> Any:
        return context.resources.session

    bench.route(handler, retry=Retry(max=1))
    status = bench.run()
    assert (status.state, len(tries)) == (State.COMPLETED, 1 + first_fails)
