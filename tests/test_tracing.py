"""What docs/tracing.md promises: the spans, how they hang together, and what it costs who does not trace."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import managers
import pytest
import redis
from drive import Rig
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NoOpTracerProvider, SpanKind, StatusCode, TraceState
from workers import CLASSES, TESTS, burst, crew

from rqarm import BatchRequest, BulkError, Context, Handlers, KeyConflict, RequestManager, Retry, tracing
from rqarm.worker import equipment, use_handlers
from rqarm.worker.equipment import Equipment

TRACE_APP = TESTS / "trace_app.py"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
#: what a request keeps of who traces
FIELDS = ("trace", "traced")


class Spans:
    """The spans that have ended, by name."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span

    @property
    def submits(self) -> list[ReadableSpan]:
        return self.named("submit arm")

    @property
    def executions(self) -> list[ReadableSpan]:
        return self.named("execute arm")

    def text(self) -> str:
        return "".join(span.to_json() for span in self.exporter.get_finished_spans())


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    """A provider for this test only: OpenTelemetry lets a process set one once."""
    found = Spans()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(found.exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return found


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Handlers]:
    monkeypatch.setattr(equipment, "_equipment", Equipment())
    made = Handlers()
    yield made
    runner = equipment.of_this_process().runner
    if runner is not None:
        runner.close()


def work(handlers: Handlers, client: redis.Redis) -> None:
    use_handlers(handlers)
    burst(client)


def ids(span: ReadableSpan) -> tuple[int, int]:
    return span.context.trace_id, span.context.span_id


def linked(span: ReadableSpan) -> set[tuple[int, int]]:
    return {(link.context.trace_id, link.context.span_id) for link in span.links}


def is_child(child: ReadableSpan, parent: ReadableSpan) -> bool:
    return child.parent is not None and (child.parent.trace_id, child.parent.span_id) == ids(parent)


# -- a submit and its execution


def test_a_new_request_and_its_execution_are_one_trace(
    rm: Any, spans: Spans, handlers: Handlers, redis_client: redis.Redis
) -> None:
    seen = []

    @handlers.route("/x/{n:int}")
    def handle(request: BatchRequest, context: Context, n: int) -> int:
        seen.append(trace.get_current_span().get_span_context().span_id)
        return n

    status = rm.submit("/x/1?api_key=hidden")
    work(handlers, redis_client)

    submit, execute = spans.submits[0], spans.executions[0]
    assert (submit.kind, execute.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert is_child(execute, submit)
    assert seen == [execute.context.span_id]
    common = {
        "messaging.system": "rqarm",
        "messaging.destination.name": "arm",
        "messaging.message.id": status.key,
        "rqarm.request": "/x/1?api_key=***",
    }
    assert submit.attributes == common | {
        "messaging.operation.name": "submit",
        "messaging.operation.type": "send",
        "rqarm.outcome": "new",
        "rqarm.state": "pending",
    }
    told = dict(execute.attributes or {})
    assert told.pop("rqarm.wait_s") >= 0
    assert told.pop("messaging.client.id")
    assert told == common | {
        "messaging.operation.name": "execute",
        "messaging.operation.type": "process",
        "rqarm.route": "/x/{n:int}",
        "rqarm.attempt": 1,
        "rqarm.retries": 0,
        "rqarm.crashes": 0,
        "rqarm.outcome": "completed",
    }
    assert (submit.links, execute.links) == ((), ())
    assert "hidden" not in spans.text()


def test_a_submit_is_a_child_of_the_span_around_it(rm: Any, spans: Spans) -> None:
    with trace.get_tracer("web").start_as_current_span("web") as web:
        rm.submit("/x")
    assert is_child(spans.submits[0], web)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["get_or_submit", "submit_many", "submit_stream", "bulk"])
def test_every_way_to_submit_carries_the_trace(
    rm: Any, way: str, spans: Spans, handlers: Handlers, redis_client: redis.Redis
) -> None:
    @handlers.route("/x/{n}")
    def handle(request: BatchRequest, context: Context, n: str) -> str:
        return n

    uris = ["/x/1"] if way == "get_or_submit" else ["/x/1", "/x/2"]
    if way == "get_or_submit":
        rm.get_or_submit(uris[0], payload="p")
    elif way == "submit_many":
        rm.submit_many(uris)
    elif way == "submit_stream":
        list(rm.submit_stream([(uri, "payload") for uri in uris]))
    else:
        rm.bulk_get_or_submit([(uri, payload) for uri in uris for payload in "abc"])
    work(handlers, redis_client)

    (submit,) = spans.submits
    assert len(spans.executions) == len(uris)
    assert all(is_child(execute, submit) for execute in spans.executions)
    if way != "get_or_submit":
        assert submit.attributes is not None
        assert submit.attributes["messaging.batch.message_count"] == 2
        assert submit.attributes["rqarm.outcomes.new"] == 2


def test_payloads_arrive_beside_a_trace(rm: Any, spans: Spans, handlers: Handlers, redis_client: redis.Redis) -> None:
    told = []

    @handlers.route("/x")
    def handle(request: BatchRequest, context: Context) -> int:
        return 1

    @handle.callback
    def ready(result: int, payloads: list[str]) -> None:
        told.append((result, sorted(payloads)))

    rm.bulk_get_or_submit([("/x", payload) for payload in "abc"])
    work(handlers, redis_client)
    assert told == [(1, ["a", "b", "c"])]
    first, callback = spans.executions
    assert is_child(first, spans.submits[0])
    assert is_child(callback, first), "what comes after an execution is its child"


# -- joiners and hits


def test_the_execution_links_to_who_joined_before_it_and_while_it_ran(
    rm: Any, spans: Spans, handlers: Handlers, redis_client: redis.Redis, url: str
) -> None:
    @handlers.route("/x")
    def handle(request: BatchRequest, context: Context) -> int:
        with RequestManager(url) as beside, trace.get_tracer("test").start_as_current_span("a trace of its own", {}):  # type: ignore[arg-type]
            beside.submit("/x")
        return 1

    for _ in range(2):
        rm.submit("/x")
    rm.submit_many(["/x"])
    work(handlers, redis_client)

    new, joined, bulk, during = spans.submits
    (execute,) = spans.executions
    assert is_child(execute, new)
    assert linked(execute) == {ids(joined), ids(bulk), ids(during)}
    assert len({joined.context.trace_id, bulk.context.trace_id, execute.context.trace_id}) == 3
    assert redis_client.keys("arm:traces:*") == []

    hits = [rm.submit("/x"), rm.submit_many(["/x"])[0]]
    assert {str(hit.outcome) for hit in hits} == {"hit"}
    assert [linked(span) for span in spans.submits[4:]] == [{ids(execute)}] * 2


def test_a_joiner_behind_the_last_look_links_to_the_execution_itself(
    rm: Any, spans: Spans, redis_client: redis.Redis
) -> None:
    rig = Rig(redis_client)
    attempt = rig.begin(BatchRequest("/x"))
    assert rig.word(rig.calls.trace(attempt, TRACEPARENT)) == "traced"
    rm.submit("/x")
    assert linked(spans.submits[0]) == {(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331)}


def test_what_joined_an_earlier_claim_is_none_of_the_next_ones(
    rm: Any, spans: Spans, handlers: Handlers, redis_client: redis.Redis
) -> None:
    @handlers.route("/x")
    def handle(request: BatchRequest, context: Context) -> int:
        return 1

    rm.submit("/x")
    key = rm.submit("/x").key
    rm.cancel(key)
    rm.submit("/x")
    work(handlers, redis_client)
    assert linked(spans.executions[0]) == set()


def test_a_claim_keeps_a_hundred_joiners(redis_client: redis.Redis) -> None:
    rig = Rig(redis_client)
    key = rig.seed("pending", BatchRequest("/x")).key
    for n in range(100):
        assert rig.word(rig.calls.link(key, f"{n}")) == "left"
    assert rig.word(rig.calls.link(key, "one more")) == "full"
    assert rig.word(rig.calls.link(key, "5")) == "left", "it is there already"
    assert 0 < redis_client.pttl(f"arm:traces:{key}") <= 24 * 3600 * 1000


def test_the_target_of_a_redirect_belongs_to_the_trace_of_who_redirects(
    rm: Any, spans: Spans, handlers: Handlers, redis_client: redis.Redis
) -> None:
    @handlers.route("/old")
    def old(request: BatchRequest, context: Context) -> Any:
        raise context.redirect("/new")

    @handlers.route("/new")
    def new(request: BatchRequest, context: Context) -> int:
        return 1

    rm.submit("/old")
    work(handlers, redis_client)
    first, target = spans.submits
    leads, computes = spans.executions
    assert is_child(leads, first)
    assert is_child(target, leads)
    assert is_child(computes, target)
    assert leads.attributes is not None
    assert leads.attributes["rqarm.outcome"] == "redirected"
    rm.submit("/old")
    assert linked(spans.submits[2]) == {ids(leads)}


# -- bad ends


def test_a_retry_is_a_span_of_its_own_in_the_same_trace(
    rm: Any, spans: Spans, handlers: Handlers, redis_client: redis.Redis
) -> None:
    @handlers.route("/x", retry=Retry(max=1))
    def handle(request: BatchRequest, context: Context) -> int:
        if context.attempt == 1:
            raise ValueError("not yet")
        return 1

    rm.submit("/x")
    rm.submit("/x")
    work(handlers, redis_client)
    first, second = spans.executions
    assert is_child(first, spans.submits[0])
    assert is_child(second, spans.submits[0])
    assert (first.status.status_code, second.status.status_code) == (StatusCode.ERROR, StatusCode.UNSET)
    assert [span.attributes and span.attributes["rqarm.outcome"] for span in (first, second)] == [
        "retried",
        "completed",
    ]
    assert [span.attributes and span.attributes["rqarm.attempt"] for span in (first, second)] == [1, 2]
    assert linked(first) == linked(second) == {ids(spans.submits[1])}


def test_an_asked_for_retry_is_no_error(rm: Any, spans: Spans, handlers: Handlers, redis_client: redis.Redis) -> None:
    @handlers.route("/x")
    def handle(request: BatchRequest, context: Context) -> int:
        if context.attempt == 1:
            raise context.retry(delay=0)
        return 1

    rm.submit("/x")
    work(handlers, redis_client)
    assert [span.status.status_code for span in spans.executions] == [StatusCode.UNSET] * 2


def test_a_failing_handler_is_told_without_the_secrets_of_the_request(
    rm: Any, spans: Spans, handlers: Handlers, redis_client: redis.Redis
) -> None:
    @handlers.route("/x")
    def handle(request: BatchRequest, context: Context) -> int:
        raise RuntimeError(f"404 for {request.uri} with {dict(request.query)}")

    rm.submit(BatchRequest("/x?Token=a%2Fb&n=17&from=http://me:word@host/", {"api_key": "k&y"}))
    work(handlers, redis_client)
    (execute,) = spans.executions
    assert execute.status.status_code is StatusCode.ERROR
    assert execute.attributes is not None
    assert execute.attributes["error.type"] == "RuntimeError"
    assert execute.attributes["rqarm.outcome"] == "failed"
    (event,) = execute.events
    assert event.name == "exception"
    assert "n=17" in str(event.attributes), "what is no secret is told"
    assert "raise RuntimeError" in str(event.attributes)
    for secret in ("a%2Fb", "a/b", "k&y", "k%26y", "word@host"):
        assert secret not in spans.text(), secret


def test_no_handler_is_an_error_of_the_execution(
    rm: Any, spans: Spans, handlers: Handlers, redis_client: redis.Redis
) -> None:
    rm.submit("/nobody?token=hidden")
    work(handlers, redis_client)
    (execute,) = spans.executions
    assert execute.attributes is not None
    assert execute.attributes["error.type"] == "rqarm.errors.NoHandler"
    assert "rqarm.route" not in execute.attributes
    assert "hidden" not in spans.text()


def test_a_refused_submit_is_an_error_without_its_text(rm: Any, spans: Spans) -> None:
    rm.submit(BatchRequest("/x?token=hidden", key="mine"))
    with pytest.raises(KeyConflict):
        rm.submit(BatchRequest("/y?token=hidden", key="mine"))
    with pytest.raises(BulkError):
        rm.submit_many([BatchRequest("/y?token=hidden", key="mine")])
    _, single, bulk = spans.submits
    assert single.attributes is not None
    assert bulk.attributes is not None
    assert single.attributes["error.type"] == "rqarm.errors.KeyConflict"
    assert bulk.attributes["rqarm.outcomes.error"] == 1
    assert "hidden" not in spans.text()


# -- what others write


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"nonsense",
        b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01",
        b"ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        TRACEPARENT.upper().encode(),
        b"\xff\xfe\x00",
        TRACEPARENT.encode() + b"-more",
        b"x" * 100_000,
    ],
)
def test_a_context_that_is_none_is_as_good_as_none(
    hostile: bytes, spans: Spans, handlers: Handlers, redis_client: redis.Redis, url: str
) -> None:
    @handlers.route("/x")
    def handle(request: BatchRequest, context: Context) -> int:
        return 1

    with RequestManager(url) as manager:
        key = manager.submit("/x").key
        submitted = redis_client.hget(f"arm:status:{key}", "submitted_ms")
        redis_client.hset(f"arm:status:{key}", "trace", hostile)
        redis_client.sadd(f"arm:traces:{key}", submitted + b" " + hostile, hostile)
        work(handlers, redis_client)
        assert manager.result(key) == 1
        redis_client.hset(f"arm:status:{key}", "traced", b"1:" + hostile)
        assert manager.submit("/x").value == 1
    (execute,) = spans.executions
    assert execute.parent is None
    assert linked(execute) == linked(spans.submits[1]) == set()


def test_a_bad_tracestate_does_not_cost_the_trace(
    spans: Spans, handlers: Handlers, redis_client: redis.Redis, url: str
) -> None:
    @handlers.route("/x")
    def handle(request: BatchRequest, context: Context) -> int:
        return 1

    with RequestManager(url) as manager:
        key = manager.submit("/x").key
        redis_client.hset(f"arm:status:{key}", "trace", f"{TRACEPARENT} {'a=b,' * 1000}")
        work(handlers, redis_client)
    (execute,) = spans.executions
    assert execute.parent is not None
    assert not execute.parent.trace_state


def test_the_tracestate_travels_up_to_a_limit(spans: Spans, url: str, redis_client: redis.Redis) -> None:
    tracer = trace.get_tracer("web")
    with RequestManager(url) as manager:
        for name, state in (("short", "v"), ("long", "v" * 250)):
            entries = [(f"vendor{n}", state) for n in range(3)]
            parent = trace.SpanContext(1, 2, True, trace.TraceFlags(1), TraceState(entries))
            with tracer.start_as_current_span("web", trace.set_span_in_context(trace.NonRecordingSpan(parent))):
                key = manager.submit(f"/{name}").key
            traceparent, _, kept = redis_client.hget(f"arm:status:{key}", "trace").decode().partition(" ")
            assert len(traceparent) == 55
            assert kept == ("vendor0=v,vendor1=v,vendor2=v" if name == "short" else "")


def test_somebody_elses_data_under_our_name_does_not_stop_a_submit_or_an_execution(
    rm: Any, spans: Spans, handlers: Handlers, redis_client: redis.Redis
) -> None:
    @handlers.route("/x")
    def handle(request: BatchRequest, context: Context) -> int:
        return 1

    key = rm.submit("/x").key
    redis_client.set(f"arm:traces:{key}", "mine")
    assert str(rm.submit("/x").outcome) == "joined"
    work(handlers, redis_client)
    assert rm.result(key) == 1
    assert len(spans.executions) == 1


def test_the_identity_of_a_request_does_not_change(rm: Any, spans: Spans) -> None:
    request = BatchRequest("/x?a=1")
    status = rm.submit(request)
    assert status.key == request.key
    found = rm.find(status.key)
    assert found == request
    assert hash(found) == hash(request)


def test_the_pull_interface_tells_the_context(rm: Any, spans: Spans) -> None:
    rm.submit("/x")
    lease = rm.queues.next_request()
    submit = spans.submits[0].context
    assert lease.trace.startswith(f"00-{submit.trace_id:032x}-{submit.span_id:016x}-")
    lease.finish(1)


# -- nobody traces


def sent(monkeypatch: pytest.MonkeyPatch, url: str, client: redis.Redis) -> tuple[list[int], set[str], list[str]]:
    """The bytes of each round trip of a submit, a join and a hit; the fields of the record; what the server has run."""
    client.flushall()
    client.config_resetstat()
    with managers.round_trips(monkeypatch) as trips, RequestManager(url) as manager:
        key = manager.submit("/x").key
        manager.submit("/x")
        fields = set(client.hkeys(f"arm:status:{key}"))
        manager.queues.next_request().finish(1)
        manager.submit("/x")
    commands = sorted(f"{name} {stat['calls']}" for name, stat in client.info("commandstats").items())
    return [sum(map(len, trip)) for trip in trips], {name.decode() for name in fields}, commands


def test_without_a_provider_nothing_is_sent_or_kept(
    monkeypatch: pytest.MonkeyPatch, url: str, redis_client: redis.Redis
) -> None:
    assert not tracing.is_on()
    sent(monkeypatch, url, redis_client)  # the scripts are loaded
    trips, fields, commands = sent(monkeypatch, url, redis_client)
    assert not fields & set(FIELDS)
    assert redis_client.keys("arm:traces:*") == []
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", NoOpTracerProvider())
    assert sent(monkeypatch, url, redis_client) == (trips, fields, commands)


def test_what_is_not_sampled_carries_its_context_and_leaves_no_links(
    monkeypatch: pytest.MonkeyPatch, rm: Any, redis_client: redis.Redis
) -> None:
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", TracerProvider(sampler=ALWAYS_OFF))
    key = rm.submit("/x").key
    rm.submit("/x")
    flags = redis_client.hget(f"arm:status:{key}", "trace").rpartition(b"-")[2]
    assert int(flags, 16) & trace.TraceFlags.SAMPLED == 0
    assert redis_client.keys("arm:traces:*") == []


def test_opentelemetry_need_not_be_there(url: str, redis_client: redis.Redis, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['opentelemetry'] = None\n"  # an import of it is an ImportError
        "import rqarm, rqarm.tracing\n"
        f"with rqarm.RequestManager({url!r}) as rm: print(rm.submit('/x').outcome, rm.submit_many(['/y'])[0].outcome)\n"
        "with rm.queues.next_request() as lease: lease.finish(1)\n"
        "print(rqarm.tracing.is_on())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "RQARM_ALLOW_VOLATILE": "1"}
    told = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert told.stdout == "new new\nFalse\n"


# -- worker processes


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("kind", "concurrency"), [*((kind, 1) for kind in CLASSES), ("rqarm.Worker", 3)])
def test_worker_processes_export_what_they_ran(
    home: Any, tmp_path: Path, spans: Spans, kind: str, concurrency: int
) -> None:
    paths = ("/inner/a", "/beside/b", "/async/c", "/pieces/d", "/again/e")
    with crew(home.url, tmp_path, handlers=TRACE_APP, concurrency=concurrency) as hired:
        keys = [hired.rm.submit(path, payload=path if path == "/inner/a" else None).key for path in paths]
        keys.append(hired.rm.submit("/wait/f").key)
        worker = hired.start(kind, *(["--with-scheduler"] if kind != "rqarm.Worker" else []))
        hired.running("f")
        hired.rm.submit("/wait/f")
        hired.let_go("f")
        hired.settle(*keys)
        hired.note(f"told-{hired.rm.result(keys[0])}")
        worker.stop()
        told = read(tmp_path / hired.name / "notes" / "spans")

    by_id = {span["context"]["span_id"]: span for span in told}
    submits = {span.attributes["messaging.message.id"]: span for span in spans.exporter.get_finished_spans()[:6]}  # type: ignore[index]
    executions = [span for span in told if span["name"].startswith("execute")]
    assert len(executions) == 8, "six, a retry and a callback"
    for execution_span in executions:
        key = execution_span["attributes"]["messaging.message.id"]
        if key in submits:
            assert execution_span["parent_id"] == f"0x{submits[key].context.span_id:016x}"
        else:
            assert by_id[execution_span["parent_id"]]["attributes"]["messaging.message.id"] == keys[0]
    for name in "abcd":
        children = [span for span in told if span["name"] == f"inner {name}"]
        assert len(children) == (2 if name == "d" else 1)
        for child in children:
            assert by_id[child["parent_id"]]["attributes"]["messaging.message.id"] == keys["abcd".index(name)]
    (waited,) = (span for span in executions if span["attributes"]["messaging.message.id"] == keys[5])
    joiner = spans.exporter.get_finished_spans()[6]
    assert [link["context"]["span_id"] for link in waited["links"]] == [f"0x{joiner.context.span_id:016x}"]
    outcomes = [span["attributes"]["rqarm.outcome"] for span in executions]
    assert sorted(outcomes) == ["completed"] * 7 + ["retried"]


def test_spans_of_requests_that_run_at_the_same_time_do_not_mix(spans: Spans) -> None:
    """The event loop of a process has a context of its own; each execution is current in its own task only."""

    async def child(span: tracing.Span | None, barrier: asyncio.Barrier) -> int:
        async def inner() -> int:
            await barrier.wait()
            return trace.get_current_span().get_span_context().span_id

        return await tracing.within(span, inner())

    async def both() -> list[int]:
        barrier = asyncio.Barrier(3)
        return await asyncio.gather(*(child(span, barrier) for span in (one, two, None)))

    one, two = tracing.execution("arm", ""), tracing.execution("arm", TRACEPARENT)
    assert one is not None
    assert two is not None
    wanted = [int(span.traceparent.split("-")[2], 16) for span in (one, two)]
    assert asyncio.run(both()) == [*wanted, 0]
