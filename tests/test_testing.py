"""What rqarm.testing gives to the tests of others."""

from __future__ import annotations

import asyncio
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from rqarm import BatchRequest, Context, Handlers, LeaseLost, RequestManager, Retry, RqarmError, State, embedded
from rqarm.connect import open_client
from rqarm.context import Redirected
from rqarm.testing import WORKER, context, drain
from rqarm.worker import equipment

pytest_plugins = ["pytester"]


@pytest.fixture(params=["server", "fakeredis"])
def manager(request: pytest.FixtureRequest, home: embedded.PrivateServer) -> Iterator[RequestManager]:
    """On a real server, and on what users have who have none."""
    server = fakeredis.FakeServer()
    fake = request.param == "fakeredis"
    with fakeredis.FakeRedis(server=server) if fake else open_client(home.url) as client:
        client.flushall()
        with RequestManager(connection=client, allow_volatile=True) as rm:
            yield rm


@pytest.fixture
def handlers() -> Handlers:
    return Handlers()


def told(ran: list[Any]) -> list[tuple[str, str]]:
    return [(one.uri, one.outcome) for one in ran]


def test_drain_runs_what_waits_in_order_of_priority_and_in_every_queue(
    manager: RequestManager, handlers: Handlers
) -> None:
    @handlers.route("/double/{n:int}")
    def double(request: BatchRequest, context: Context, n: int) -> int:
        return 2 * n

    low, high = BatchRequest("/double/1", priority="low"), BatchRequest("/double/2", priority="high")
    keys = [manager.submit(request).key for request in (low, high, BatchRequest("/double/3", queue="other"))]
    ran = drain(manager, handlers)
    assert told(ran) == [("/double/2", "completed"), ("/double/1", "completed"), ("/double/3", "completed")]
    assert (ran[0].key, ran[0].route, ran[0].attempt, ran[0].error) == (keys[1], "/double/{n:int}", 1, None)
    assert [manager.result(key) for key in keys] == [2, 4, 6]
    assert manager.status(keys[0]).worker == WORKER
    assert drain(manager, handlers) == []


def test_drain_runs_callbacks_redirects_and_retries_without_their_delays(
    manager: RequestManager, handlers: Handlers
) -> None:
    heard: list[Any] = []

    @handlers.route("/old/{name}")
    def old(request: BatchRequest, context: Context, name: str) -> Any:
        return context.get_or_redirect(f"/new/{name}")

    @handlers.route("/new/{name}", retry=Retry(max=1, interval=3600))
    def new(request: BatchRequest, context: Context, name: str) -> str:
        if context.attempt == 1:
            raise OSError("not yet")
        return name

    @new.callback
    def ready(result: str, payloads: list[Any]) -> None:
        heard.append((result, payloads))

    key = manager.submit("/old/x", payload="me").key
    first = drain(manager, handlers, with_delayed=False)
    assert [outcome for _, outcome in told(first)] == ["redirected to /new/x, linked", "retried in 3600 s"]
    assert isinstance(first[1].error, OSError)
    rest = drain(manager, handlers)
    assert told(rest) == [("/new/x", "completed"), ("/new/x", "completed")]
    assert rest[1].operation == "rqarm:callback"
    assert manager.result(key) == "x"
    assert heard == [("x", ["me"])]
    assert manager.connection.keys("rq:job:*") == []


def test_a_chain_of_callbacks_runs_to_its_end(manager: RequestManager, handlers: Handlers) -> None:
    @handlers.route("/step/{n:int}")
    def step(request: BatchRequest, context: Context, n: int) -> int:
        return n

    @step.callback
    def then(result: int, payloads: list[Any]) -> None:
        if result < 3:
            manager.submit(step.request(result + 1))

    manager.submit(step.request(1))
    ran = [one.uri for one in drain(manager, handlers) if not one.operation]
    assert ran == ["/step/1", "/step/2", "/step/3"]


def test_drain_goes_on_behind_a_failure_or_raises_it(manager: RequestManager, handlers: Handlers) -> None:
    @handlers.route("/{n:int}")
    def inverse(request: BatchRequest, context: Context, n: int) -> float:
        return 1 / n

    manager.submit_many(["/0", "/1"])
    ran = drain(manager, handlers)
    assert told(ran) == [("/0", "failed"), ("/1", "completed")]
    assert isinstance(ran[0].error, ZeroDivisionError)
    manager.submit("/0")
    with pytest.raises(ZeroDivisionError):
        drain(manager, handlers, reraise=True)
    assert manager.status(ran[0].key).state is State.FAILED


def test_drain_does_not_go_on_for_ever(manager: RequestManager, handlers: Handlers) -> None:
    @handlers.route("/x")
    def never(request: BatchRequest, context: Context) -> None:
        raise context.retry(delay=60)

    manager.submit("/x")
    with pytest.raises(RqarmError, match="5 attempts"):
        drain(manager, handlers, most=5)


def test_drain_leaves_what_waits_for_a_place_of_the_test(manager: RequestManager, handlers: Handlers) -> None:
    @handlers.route("/x/{n:int}", max_running=1)
    def limited(request: BatchRequest, context: Context, n: int) -> int:
        if n == 0:  # while it runs, another one finds no place
            other = manager.submit("/x/1").key
            assert [one.outcome for one in drain(manager, handlers)] == ["parked"]
            assert manager.status(other).state is State.PENDING
        return n

    manager.submit("/x/0")
    assert [one.outcome for one in drain(manager, handlers)] == ["completed", "completed"]


def test_each_drain_has_resources_and_a_loop_of_its_own(manager: RequestManager, handlers: Handlers) -> None:
    made: list[str] = []

    @handlers.resource("db")
    def db() -> Iterator[str]:
        made.append("up")
        yield "db"
        made.append("down")

    @handlers.route("/x/{n:int}")
    async def handler(request: BatchRequest, context: Context, n: int) -> str:
        await asyncio.sleep(0)
        return str(context.resources.db)

    before = equipment.of_this_process()
    for n in range(2):
        manager.submit(f"/x/{n}")
        assert told(drain(manager, handlers)) == [(f"/x/{n}", "completed")]
    assert made == ["up", "down"] * 2
    assert equipment.of_this_process() is before


# -- a handler alone


def test_a_context_keeps_what_the_handler_says(handlers: Handlers) -> None:
    handlers.resource("db")(lambda: "db")

    @handlers.route("/x")
    def handler(request: BatchRequest, context: Context, page: int = 1) -> Any:
        context.progress(0.5, "half")
        context.emit([page, context.attempt, context.kwargs["page"]])
        return [context.resources.db, context.get_or_redirect("/y?b=1&a=2")]

    made = context("/x", attempt=2, kwargs={"page": 7}, handlers=handlers, found={"/y?a=2&b=1": "cached"})
    assert handler(made.request, made, page=7) == ["db", "cached"]
    assert made.reports == [(0.5, "half")]
    assert made.emitted == [[7, 2, 7]]
    with pytest.raises(Redirected):
        made.get_or_redirect("/z")
    made.is_cancelled = True
    with pytest.raises(LeaseLost):
        made.check()


async def test_a_context_looks_up_on_a_loop_too() -> None:
    assert await context(found={"/y": 1}).aget_or_redirect("/y") == 1


# -- the plugin


def test_pytest_finds_the_plugin() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"rqarm.testing": "rqarm.testing"}


SUITE = """
    import os
    import fakeredis
    import pytest
    from rqarm import Handlers, RequestManager
    from rqarm.testing import drain

    handlers = Handlers()

    @handlers.route("/double/{n:int}")
    def double(request, context, n):
        return 2 * n

    @pytest.mark.parametrize("n", [1, 1])
    def test_each_test_has_an_empty_server(rqarm_manager, n):
        assert rqarm_manager.submit("/double/1").outcome == "new"
        assert [ran.outcome for ran in drain(rqarm_manager, handlers)] == ["completed"]
        assert rqarm_manager.submit("/double/1").value == 2

    def test_what_the_program_opens_is_the_same_server(rqarm_manager, rqarm_server):
        assert os.environ["RQARM_URL"] == rqarm_server.url
        with RequestManager() as rm:
            key = rm.submit("/double/2").key
        assert rqarm_manager.status(key).state == "pending"

    class TestWithoutAServer:
        @pytest.fixture
        def rqarm_connection(self):
            return fakeredis.FakeRedis()

        def test_on_fakeredis(self, rqarm_manager):
            key = rqarm_manager.submit("/double/4").key
            drain(rqarm_manager, handlers)
            assert rqarm_manager.result(key) == 8
"""


def test_the_fixtures_give_a_manager_to_the_tests_of_others(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE)
    done = pytester.runpytest_subprocess(
        "-p", "rqarm.testing", "-p", "no:randomly", "-p", "no:asyncio", "-W", "error", "-q"
    )
    done.assert_outcomes(passed=4)
    assert not list(Path(pytester.path).glob("rqarm-*"))


def test_the_tests_of_the_page_pass(pytester: pytest.Pytester) -> None:
    page = (Path(__file__).parents[1] / "docs" / "testing.md").read_text("utf-8")
    blocks = re.findall(r"<!-- run -->\n```python\n(.*?)```", page, re.DOTALL)
    pytester.makepyfile(**{f"test_block_{n}": block for n, block in enumerate(blocks)})
    done = pytester.runpytest_subprocess("-p", "rqarm.testing", "-p", "no:asyncio", "-W", "error", "-q")
    done.assert_outcomes(passed=3)


def test_the_fixtures_are_explained(pytester: pytest.Pytester) -> None:
    done = pytester.runpytest_subprocess("-p", "rqarm.testing", "--fixtures")
    done.stdout.fnmatch_lines(["*rqarm_server*", "*rqarm_connection*", "*rqarm_manager*"])
