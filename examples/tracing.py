"""A request that is traced from its submit to its callback. The spans go to the terminal.

pip install 'rqarm[otel]' opentelemetry-sdk
python examples/tracing.py                      # starts its worker itself
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from rqarm import BatchRequest, Context, Handlers, RequestManager

handlers = Handlers()
tracer = trace.get_tracer("example")


def line(span: ReadableSpan) -> str:
    """One span as one line. Without this the exporter prints JSON."""
    context, parent = span.context, span.parent
    links = ", ".join(f"{link.context.span_id:016x}" for link in span.links)
    return (
        f"{span.resource.attributes['service.name']:8}{span.name:16} span {context.span_id:016x}"
        f" in trace {context.trace_id:032x}"
        + (f", child of {parent.span_id:016x}" if parent else "")
        + (f", linked to {links}" if links else "")
        + "\n"
    )


def set_provider(service: str) -> None:
    """Whoever wants spans sets a provider: the worker where its handlers are, a client where it starts.

    Here each span goes out at once. In earnest: BatchSpanProcessor with an OTLPSpanExporter.
    """
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=line)))
    trace.set_tracer_provider(provider)


if __name__ != "__main__":
    set_provider("worker")


@handlers.route("/report/{year:int}", ttl=60)
def report(request: BatchRequest, context: Context, year: int) -> str:
    with tracer.start_as_current_span("query"):
        time.sleep(0.05)
    return f"report of {year}"


@report.callback
def mail(result: str, payloads: list[Any]) -> None:
    with tracer.start_as_current_span("mail"):
        print(f"{result} to {', '.join(sorted(payloads))}", flush=True)


def main() -> None:
    """Two people want the same report: two traces, one execution, which links to the one who came second."""
    set_provider("client")
    request = report.request(time.time_ns() // 1_000_000_000)  # one that is not cached
    with RequestManager() as rm:
        for person in ("Ada", "Grace"):
            with tracer.start_as_current_span(f"page of {person}"):
                key = rm.submit(request, payload=person).key
        command = [sys.executable, "-m", "rqarm.cli", "worker", "--burst", "--handlers", f"{Path(__file__)}:handlers"]
        subprocess.run(command, check=True)
        print(rm.result(key))


if __name__ == "__main__":
    main()
