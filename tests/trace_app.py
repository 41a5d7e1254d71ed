"""Handlers that trace, for worker processes in tests (RQARM_HANDLERS). Spans go to the file ``spans`` among the notes.

A BatchSpanProcessor with a delay above any test: what is in the file was flushed by the end of a process.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from app import note, notes, wait_for
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from rqarm import BatchRequest, Context, Handlers, Retry


class FileExporter(SpanExporter):
    """A span as a line of JSON."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with (notes / "spans").open("a") as file:
            file.write("".join(span.to_json(indent=None) + "\n" for span in spans))
        return SpanExportResult.SUCCESS


provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(FileExporter(), schedule_delay_millis=600_000))
trace.set_tracer_provider(provider)
tracer = trace.get_tracer("handlers")
handlers = Handlers()


@handlers.route("/inner/{name}")
def inner(request: BatchRequest, context: Context, name: str) -> str:
    with tracer.start_as_current_span(f"inner {name}"):
        return f"{os.getpid()}"


@handlers.route("/beside/{name}", thread_safe=True)
def beside(request: BatchRequest, context: Context, name: str) -> str:
    with tracer.start_as_current_span(f"inner {name}"):
        return threading.current_thread().name


@handlers.route("/async/{name}")
async def later(request: BatchRequest, context: Context, name: str) -> str:
    await asyncio.sleep(0)
    with tracer.start_as_current_span(f"inner {name}"):
        await asyncio.sleep(0)
    return name


@handlers.route("/pieces/{name}")
def pieces(request: BatchRequest, context: Context, name: str) -> Iterator[bytes]:
    for n in range(2):
        with tracer.start_as_current_span(f"inner {name}"):
            yield b"%d" % n


@handlers.route("/again/{name}", retry=Retry(max=1))
def again(request: BatchRequest, context: Context, name: str) -> int:
    if context.attempt == 1:
        raise ValueError("not yet")
    return context.attempt


@handlers.route("/wait/{name}")
def wait(request: BatchRequest, context: Context, name: str) -> str:
    note(f"running-{name}", os.getpid())
    wait_for(f"go-{name}")
    return name


@inner.callback
def told(result: Any, payloads: list[Any]) -> None:
    with tracer.start_as_current_span("callback"):
        note(f"told-{result}", payloads)
