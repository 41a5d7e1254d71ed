"""What Prometheus gets: the text is valid, the numbers are those of the overview, and the worker's port survives."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis
import servers
from commands import Command, command
from drive import Rig
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from servers import eventually
from test_inspect import look
from workers import APP, PATIENCE

from rqarm import BatchRequest, __version__, embedded, inspect, metrics
from rqarm.inspect import STATES, Overview

ROOT = Path(__file__).parent.parent
HANDLERS = ("--handlers", str(APP))


@pytest.fixture
def busy(rig: Rig) -> Rig:
    """A namespace in which everything has happened once."""
    for state in ("completed", "sticky", "mine", "failed", "cancelled", "quarantined", "lapsed", "parked"):
        rig.seed(state, BatchRequest(f"/{state}/1"))
    request = BatchRequest("/queue/1", queue='a"b\\c')
    for _ in range(2):
        rig.ask(rig.submit(request))
    rig.ask(rig.submit(BatchRequest("/completed/1")))
    return rig


def parsed(text: str) -> dict[str, Metric]:
    """By Prometheus' own parser. It drops the ending of counters."""
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(family: Metric, label: str) -> dict[str, float]:
    return {sample.labels[label]: sample.value for sample in family.samples}


def test_the_parser_of_prometheus_reads_every_sample(busy: Rig) -> None:
    text = metrics.render(look(busy))
    families = parsed(text)
    written = [line for line in text.splitlines() if not line.startswith("#")]
    assert sum(len(family.samples) for family in families.values()) == len(written)
    assert {family.type for family in families.values()} == {"counter", "gauge", "histogram"}
    assert all(family.documentation for family in families.values())
    assert all(name.startswith("rqarm_") for name in families)


def test_the_samples_are_the_numbers_of_the_overview(busy: Rig) -> None:
    found = look(busy)
    families = parsed(metrics.render(found))
    submissions = values(families["rqarm_submissions"], "outcome")
    assert {word: count for word, count in submissions.items() if count} == found.submissions
    assert values(families["rqarm_requests"], "state") == {state: found.states[state] for state in STATES}
    assert (found.states["failed"], found.states["cancelled"]) == (1, 1)
    assert values(families["rqarm_cache_entries"], "kind") == {"temporary": 1, "sticky": 1}
    assert values(families["rqarm_queue_waiting"], "queue")['a"b\\c'] == 1
    assert families["rqarm_leases_overdue"].samples[0].value == 1


def test_a_counter_is_there_before_the_first_is_counted(rig: Rig) -> None:
    families = parsed(metrics.render(look(rig)))
    assert values(families["rqarm_executions"], "outcome") == dict.fromkeys(metrics.EXECUTIONS, 0)
    assert families["rqarm_duplicate_executions"].samples[0].value == 0


def test_words_that_scripts_count_are_known_beforehand() -> None:
    """What is counted but not listed appears with its first count, and a rate misses that one."""
    counted: dict[str, set[str]] = {}
    for file in (ROOT / "rqarm" / "lua").rglob("*.lua"):
        lua = file.read_text("utf-8")
        for family, word in re.findall(r"\bcount\('(\w+)', '(\w+)'\)", lua):
            counted.setdefault(family, set()).add(word)
    assert counted["executions"] <= set(metrics.EXECUTIONS)


def test_histograms_are_cumulative_and_end_in_infinity(busy: Rig) -> None:
    family = parsed(metrics.render(look(busy)))["rqarm_run_seconds"]
    buckets = [sample for sample in family.samples if sample.name.endswith("_bucket")]
    (count,) = [sample.value for sample in family.samples if sample.name.endswith("_count")]
    heights = [sample.value for sample in buckets]
    assert heights == sorted(heights)
    assert (buckets[-1].labels["le"], heights[-1]) == ("+Inf", count)
    assert count == 3


def test_no_label_holds_a_key_or_a_uri(busy: Rig) -> None:
    text = metrics.render(look(busy))
    keys = [name.decode().rpartition(":")[2] for name in busy.client.keys("arm:status:*")]
    assert keys
    assert not any(key in text for key in keys)
    assert "/1" not in text.replace('queue="a', "")


def test_labels_are_limited(rig: Rig) -> None:
    for number in range(150):
        rig.ask(rig.submit(BatchRequest("/x", operation=f"operation-{number % 15}{chr(97 + number // 15)}")))
    routes = {sample.labels["route"] for sample in parsed(metrics.render(look(rig)))["rqarm_route_submissions"].samples}
    assert len(routes) <= metrics.MOST_LABELS + 1
    assert "*" in routes


def test_what_the_server_does_not_tell_has_no_sample(rig: Rig) -> None:
    families = parsed(metrics.render(replace(look(rig), server=None, waiters=None)))
    assert families["rqarm_server_memory_bytes"].samples == []
    assert families["rqarm_waited_keys"].samples == []


def test_the_page_of_metrics_names_every_metric_with_its_labels() -> None:
    """docs/metrics.md against what is rendered."""
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    shown = dict(re.findall(r"^\| `(rqarm_\w+)` \| (\w+) \|", page, re.MULTILINE))
    assert shown == {metric.name: metric.kind for metric in metrics.metrics(empty())}


def empty() -> Overview:
    """The overview of a namespace that nobody has used."""
    import fakeredis

    from rqarm import RequestManager

    with RequestManager(connection=fakeredis.FakeRedis(server=fakeredis.FakeServer())) as manager:
        return manager.shell.run(inspect.overview(manager.core))


# -- the command line


def rqarm(url: str, *arguments: str) -> str:
    environment = {"RQARM_ALLOW_VOLATILE": "1", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-m", "rqarm.cli", *arguments, "--url", url],
        env=environment, capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip


def test_stats_prints_the_metrics(busy: Rig, url: str) -> None:
    families = parsed(rqarm(url, "stats", "--prometheus"))
    assert values(families["rqarm_submissions"], "outcome")["hit"] == 1


def test_top_prints_one_frame_without_a_terminal(busy: Rig, url: str) -> None:
    frame = rqarm(url, "top", "--once")
    assert "\x1b" not in frame
    assert "no worker listens to it" in frame
    assert re.search(r'^a"b\\c +1 ', frame, re.MULTILINE)
    assert re.search(r"^cache +1 temporary, 1 sticky", frame, re.MULTILINE)


# -- the port of a worker


@pytest.fixture
def home() -> Iterator[embedded.PrivateServer]:
    """A server of its own: the workers that it knows are counted, and those that were killed stay for a while."""
    with servers.throwaway(servers.VALKEY or servers.REDIS) as server:
        yield server


def scraped(running: Command, path: str = "/metrics") -> tuple[int, str]:
    match = eventually(lambda: re.search(r"metrics at http://127\.0\.0\.1:(\d+)/metrics", running.said), PATIENCE)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{match[1]}{path}", timeout=PATIENCE) as answer:
            assert path != "/metrics" or answer.headers["Content-Type"] == metrics.CONTENT_TYPE
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("many", [(), ("-n", "2")], ids=["worker", "supervisor"])
def test_a_worker_answers_prometheus(home: embedded.PrivateServer, tmp_path: Path, many: tuple[str, ...]) -> None:
    with command(home.url, tmp_path, *HANDLERS, *many, "--metrics-port", "0") as running:
        count = len(many) or 1

        def workers() -> float:
            code, text = scraped(running)
            return code == 200 and parsed(text)["rqarm_workers"].samples[0].value

        eventually(lambda: workers() == count, PATIENCE)
        families = parsed(scraped(running)[1])
        assert values(families["rqarm_workers_by_version"], "version") == {__version__: count}
        assert scraped(running, "/healthz") == (200, "ok\n")
        assert scraped(running, "/other")[0] == 404
        # of two workers only their supervisor has a port
        assert len(re.findall("metrics at http", running.said)) == 1


def test_a_server_that_refuses_is_a_503_and_then_again_metrics(home: embedded.PrivateServer, tmp_path: Path) -> None:
    with (
        command(home.url, tmp_path, *HANDLERS, "--metrics-port", "0") as running,
        redis.Redis.from_url(home.url) as client,
    ):
        assert eventually(lambda: scraped(running)[0] == 200, PATIENCE)
        client.rename("arm:queues", "kept") if client.exists("arm:queues") else None
        client.set("arm:queues", "somebody's")
        assert scraped(running)[0] == 503
        client.delete("arm:queues")
        assert scraped(running)[0] == 200
        assert running.process.poll() is None


def test_a_port_that_is_taken_is_told(home: embedded.PrivateServer, tmp_path: Path) -> None:
    with command(home.url, tmp_path, *HANDLERS, "--metrics-port", "0") as running:
        taken = eventually(lambda: re.search(r"127\.0\.0\.1:(\d+)/metrics", running.said), PATIENCE)[1]
        second = tmp_path / "second"
        second.mkdir()
        with command(home.url, second, *HANDLERS, "--metrics-port", taken) as refused:
            assert refused.wait() == 2
            assert f"--metrics-port {taken}" in refused.said
