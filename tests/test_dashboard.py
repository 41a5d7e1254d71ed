"""The dashboard on real servers: who is let in, what a page says and costs, and that text of others stays text."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import managers
import pytest
import redis
import rq
import servers
from flask import Flask
from flask.testing import FlaskClient
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq.job import Job
from rq.serializers import JSONSerializer
from servers import eventually

from rqarm import BatchRequest, RequestManager, Result
from rqarm.dashboard import Options, create_app, create_blueprint
from rqarm.dashboard import stream as stream_module
from rqarm.dashboard.security import Strikes
from rqarm.dashboard.serve import serving
from rqarm.dashboard.stream import Look
from rqarm.errors import ConfigError

ROOT = Path(__file__).parent.parent
HOSTILE = "<script>alert(1)</script>"
#: how long anything may take on a busy machine
PATIENCE = 30.0
PASSWORD = "geheim ü"


@pytest.fixture
def manager(url: str, redis_client: redis.Redis) -> Iterator[RequestManager]:
    with RequestManager(url, allow_volatile=True) as manager:
        yield manager


def browser(manager: RequestManager, **options: Any) -> FlaskClient:
    return create_app(manager, **options).test_client()


@pytest.fixture
def client(manager: RequestManager) -> FlaskClient:
    return browser(manager)


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


# -- where it listens, who gets in


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "dash.example.com", ""])
def test_an_address_that_others_reach_needs_credentials(host: str) -> None:
    with pytest.raises(ConfigError, match="can be reached by others"):
        Options.load({}, host=host)
    assert Options.load({}, host=host, insecure=True).host == host
    assert Options.load({}, host=host, token="t").host == host
    assert Options.load({}, host=host, username="u", password="p").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert Options.load({}, host=host).is_loopback


def test_options_come_from_the_environment_and_arguments_win() -> None:
    environ = {
        "RQARM_DASHBOARD_PORT": "1234",
        "RQARM_DASHBOARD_HOSTS": "a.example, b.example",
        "RQARM_DASHBOARD_READ_ONLY": "yes",
        "RQARM_DASHBOARD_USERNAME": "u",
        "RQARM_DASHBOARD_PASSWORD": "p",
    }
    options = Options.load(environ, port=99, read_only=None)
    assert (options.port, options.hosts, options.read_only) == (99, ("a.example", "b.example"), True)
    assert options.has_credentials
    assert "p'" not in repr(options)


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"RQARM_DASHBOARD_PORT": "many"}, "RQARM_DASHBOARD_PORT"),
        ({"RQARM_DASHBOARD_PORT": "70000"}, "port"),
        ({"RQARM_DASHBOARD_USERNAME": "u"}, "PASSWORD"),
        ({"RQARM_DASHBOARD_PASSWORD": "p"}, "USERNAME"),
        ({"RQARM_DASHBOARD_USERNAME": "a:b", "RQARM_DASHBOARD_PASSWORD": "p"}, "colon"),
        ({"RQARM_DASHBOARD_READ_ONLY": "perhaps"}, "RQARM_DASHBOARD_READ_ONLY"),
        ({"RQARM_DASHBOARD_INTERVAL": "0"}, "interval"),
    ],
)
def test_a_wrong_option_is_named(environ: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Options.load(environ)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such option: pasword"):
        Options.load({}, pasword="x")


GUARDED = ["/", "/requests", "/rq/", "/rq/0/data/queues.json", "/api/v1/overview", "/stream?page=overview", "/nowhere"]


@pytest.mark.parametrize("path", GUARDED)
def test_without_credentials_nothing_is_shown(manager: RequestManager, path: str) -> None:
    client = browser(manager, username="anna", password=PASSWORD, token="t0ken")
    for headers in (
        {},
        basic("anna", "wrong"),
        basic("otto", PASSWORD),
        {"Authorization": "Bearer t0ke"},
        {"Authorization": "Basic %%%"},
        {"Authorization": "Basic " + base64.b64encode(b"\xff\xfe:x").decode()},
        {"Authorization": "Digest x"},
        {"Authorization": "Bearer "},
    ):
        answer = client.get(path, headers=headers)
        assert answer.status_code == 401, headers
        challenges = answer.headers.getlist("WWW-Authenticate")
        assert any(each.lower().startswith("basic") for each in challenges)
        assert any(each.lower().startswith("bearer") for each in challenges)
        assert b"arm" not in answer.data.replace(b"rqarm", b"")


def test_credentials_let_in(manager: RequestManager) -> None:
    client = browser(manager, username="anna", password=PASSWORD, token="t0ken")
    assert client.get("/api/v1/", headers=basic("anna", PASSWORD)).status_code == 200
    assert client.get("/api/v1/", headers={"Authorization": "Bearer t0ken"}).status_code == 200
    only_token = browser(manager, token="t0ken")
    assert only_token.get("/api/v1/", headers=basic("", "")).status_code == 401


def test_a_token_is_no_password_and_the_other_way_round(manager: RequestManager) -> None:
    client = browser(manager, username="anna", password=PASSWORD, token="t0ken")
    assert client.get("/api/v1/", headers=basic("anna", "t0ken")).status_code == 401
    assert client.get("/api/v1/", headers={"Authorization": "Bearer geheim"}).status_code == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "", "a@b"]
)
def test_a_foreign_name_for_this_machine_is_refused(client: FlaskClient, host: str) -> None:
    """DNS rebinding: a page of evil.example that has bound its name to 127.0.0.1."""
    assert client.get("/api/v1/", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "localhost:9181", "127.0.0.1:9181", "[::1]:9181", "LOCALHOST"])
def test_our_own_names_are_answered(client: FlaskClient, host: str) -> None:
    assert client.get("/api/v1/", headers={"Host": host}).status_code == 200


def test_further_names_are_answered_when_they_are_named(manager: RequestManager) -> None:
    client = browser(manager, hosts=("dash.example",))
    assert client.get("/api/v1/", headers={"Host": "dash.example:80"}).status_code == 200
    assert client.get("/api/v1/", headers={"Host": "other.example"}).status_code == 421
    # who has no credentials learns nothing under any name
    assert browser(manager, token="t").get("/api/v1/", headers={"Host": "evil.example"}).status_code == 401


def test_who_guesses_is_stopped(manager: RequestManager, caplog: pytest.LogCaptureFixture) -> None:
    client = browser(manager, username="anna", password=PASSWORD, token="t0ken")
    other = {"REMOTE_ADDR": "192.0.2.9"}
    assert client.get("/").status_code == 401, "no credentials are no guess"
    with caplog.at_level(logging.WARNING, "rqarm.dashboard"):
        for n in range(Strikes.MOST):
            path = "/readyz" if n == 0 else "/api/v1/"
            assert client.get(path, headers=basic("anna", f"wrong{n}")).status_code == (200 if n == 0 else 401)
    assert caplog.messages == ["wrong credentials from 127.0.0.1"] * Strikes.MOST
    for headers in (basic("anna", "wrong"), basic("anna", PASSWORD), {"Authorization": "Bearer t0ken"}, {}):
        answer = client.get("/api/v1/", headers=headers)
        assert (answer.status_code, answer.json["error"]["status"]) == (429, 429)
        assert 0 < int(answer.headers["Retry-After"]) <= Strikes.WINDOW_S
    assert "version" not in client.get("/readyz", headers=basic("anna", PASSWORD)).json
    assert client.get("/", headers=basic("anna", PASSWORD)).mimetype == "text/plain"
    assert client.get("/api/v1/", headers=basic("anna", PASSWORD), environ_overrides=other).status_code == 200


def test_strikes_are_forgotten_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Strikes, "ADDRESSES", 3)
    now = [100.0]
    strikes = Strikes(lambda: now[0])
    for n in range(Strikes.MOST):
        now[0] = 100.0 + n
        strikes.add(f"2001:db8::{n}")
    assert strikes.wait("2001:db8::ffff") == 100.0 + Strikes.WINDOW_S - now[0], "one network is one"
    assert strikes.wait("2001:db8:0:1::1") == strikes.wait("unix") == 0
    now[0] = 100.0 + Strikes.WINDOW_S
    assert strikes.wait("2001:db8::1") == 0
    for n in range(4):
        strikes.add(f"192.0.2.{n}")
    assert len(strikes._times) == 3


@pytest.mark.parametrize(
    ("trusted", "address"), [("", "127.0.0.1"), ("127.0.0.1", "192.0.2.7"), ("192.0.2.1", "127.0.0.1")]
)
def test_behind_a_proxy_that_is_trusted_the_log_names_who_asked(
    manager: RequestManager, caplog: pytest.LogCaptureFixture, trusted: str, address: str
) -> None:
    with (
        caplog.at_level(logging.INFO, "rqarm.dashboard"),
        serving(create_app(manager, trusted_proxy=trusted, rq=False)) as url,
    ):
        asked = urllib.request.Request(
            f"{url}api/v1/cache/clear-temporary", method="POST", headers={"X-Forwarded-For": "192.0.2.7"}
        )
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            assert json.load(answer)["outcome"] == "cleared"
    noted = [record.getMessage() for record in caplog.records if record.name == "rqarm.dashboard"]
    assert noted == [f"-@{address} clear_temporary temporary: cleared (0)"]


# -- changes


FOREIGN = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost"},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:81"},
    {"Origin": "http://[bad"},
]
OWN = [
    {},
    {"Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none"},
    {"Origin": "http://localhost"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "null"},
]


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize(
    "path", ["/requests/{key}/cancel", "/api/v1/requests/{key}/cancel", "/rq/queue/arm/queued/empty"]
)
def test_another_site_changes_nothing(
    manager: RequestManager, client: FlaskClient, path: str, headers: dict[str, str]
) -> None:
    key = manager.submit("/a").key
    answer = client.post(path.format(key=key), headers=headers)
    assert answer.status_code == 403
    assert manager.status(key).state == "pending"
    assert rq.Queue("arm", connection=manager.connection).count == 1


@pytest.mark.parametrize("headers", OWN)
def test_our_own_pages_and_programs_change(
    manager: RequestManager, client: FlaskClient, headers: dict[str, str]
) -> None:
    key = manager.submit("/a").key
    answer = client.post(f"/api/v1/requests/{key}/cancel", headers=headers)
    assert answer.status_code == 200
    assert answer.json == {"outcome": "cancelled", "target": key, "count": 1}
    assert manager.status(key).state == "cancelled"


def test_an_origin_that_is_trusted_may_change(manager: RequestManager) -> None:
    key = manager.submit("/a").key
    client = browser(manager, origins=("https://admin.example",))
    headers = {"Sec-Fetch-Site": "cross-site", "Origin": "https://admin.example"}
    assert client.post(f"/api/v1/requests/{key}/cancel", headers=headers).status_code == 200


def test_a_get_changes_nothing(manager: RequestManager) -> None:
    """Every rule that takes POST refuses GET, and rq-dashboard's own ways to change something by GET are shut."""
    app = create_app(manager)
    client, key = app.test_client(), manager.submit("/a").key
    changing = [
        rule.rule for rule in app.url_map.iter_rules() if "POST" in (rule.methods or ()) and "/rq/" not in rule.rule
    ]
    assert len(changing) >= 6
    for rule in changing:
        assert client.get(rule.replace("<key>", key)).status_code == 405, rule
    assert client.get("/rq/requeue/arm").status_code == 405
    assert client.get("/rq/queue/arm/queued/empty").status_code == 405
    assert manager.status(key).state == "pending"


def test_read_only_refuses_every_change(manager: RequestManager) -> None:
    app = create_app(manager, read_only=True)
    client, key = app.test_client(), manager.submit("/a").key
    job_id = rq.Queue("arm", connection=manager.connection).job_ids[0]
    paths = [rule.rule.replace("<key>", key) for rule in app.url_map.iter_rules() if "POST" in (rule.methods or ())]
    paths += [f"/rq/job/{job_id}/delete", f"/rq/job/{job_id}/requeue", "/rq/requeue/arm"]
    paths += ["/rq/queue/arm/queued/empty", "/rq/queue/arm/compact"]
    for path in paths:
        assert client.post(path.replace("<path:path>", "x")).status_code == 403, path
    assert manager.status(key).state == "pending"
    assert rq.Queue("arm", connection=manager.connection).job_ids == [job_id]


def test_a_change_is_logged_with_who_and_what(manager: RequestManager, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rqarm.dashboard")
    client = browser(manager, username="anna", password=PASSWORD)
    key = manager.submit("/a").key
    client.post(f"/requests/{key}/cancel", headers=basic("anna", PASSWORD))
    client.post("/requests/nobody%0D%0A/cancel", headers=basic("anna", PASSWORD))
    client.post("/rq/queue/arm/compact", headers=basic("anna", PASSWORD))
    told = [record.getMessage() for record in caplog.records]
    assert f"anna@127.0.0.1 cancel {key}: cancelled (1)" in told
    assert any("anna@127.0.0.1 cancel nobody" in line and "InvalidRequest" in line for line in told)
    assert any(line.startswith("anna@127.0.0.1 rq queue/arm/compact: 200") for line in told)
    assert not any("\n" in line or "\r" in line for line in told)


# -- what every answer tells the browser


@pytest.mark.parametrize("path", ["/", "/healthz", "/api/v1/", "/nowhere", "/static/dashboard.css", "/api/v1/nowhere"])
def test_every_answer_is_hardened(client: FlaskClient, path: str) -> None:
    with client.get(path) as answer:
        headers = answer.headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "same-origin"


def test_an_unknown_path_is_a_page_or_json(client: FlaskClient) -> None:
    page, api = client.get("/nowhere"), client.get("/api/v1/nowhere")
    assert (page.status_code, page.mimetype) == (404, "text/html")
    assert (api.status_code, api.mimetype) == (404, "application/json")
    assert api.json["error"]["status"] == 404


# -- health


def test_health_needs_no_credentials_and_says_little(manager: RequestManager) -> None:
    client = browser(manager, token="t0ken", host="0.0.0.0")
    assert client.get("/healthz", headers={"Host": "10.1.2.3"}).json == {"status": "ok"}
    assert client.get("/readyz", headers={"Host": "10.1.2.3"}).json == {"status": "ready"}
    told = client.get("/readyz", headers={"Authorization": "Bearer t0ken"}).json
    assert told["server"] in ("redis", "valkey")
    assert told["version"][0].isdigit()


def test_not_ready_when_the_server_is_gone() -> None:
    with RequestManager("redis://127.0.0.1:1", allow_volatile=True) as manager:
        client = browser(manager)
        assert client.get("/healthz").status_code == 200
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json) == (503, {"status": "no server"})
        assert client.get("/api/v1/overview").status_code == 503


# -- rq-dashboard


def finished_pickle(manager: RequestManager, bomb: bytes | None = None) -> Job:
    """A failed job of somebody who uses RQ's pickles."""
    queue = rq.Queue("other", connection=manager.connection)
    job = queue.create_job("os.getcwd", description=HOSTILE, meta={"who": {1, 2}})
    job.save()
    job.failure_ttl = 100
    queue.failed_job_registry.add(job, ttl=100)
    job.set_status("failed")
    if bomb is not None:
        manager.connection.hset(job.key, mapping={"data": bomb, "meta": bomb})
    return job


def test_rq_dashboard_shows_our_jobs(manager: RequestManager, client: FlaskClient) -> None:
    key = manager.submit(f"/a?q={HOSTILE}&token=geheim").key
    assert client.get("/rq/").status_code == 200
    queues = client.get("/rq/0/data/queues.json").json["queues"]
    assert {queue["name"]: queue["count"] for queue in queues if queue["count"]} == {"arm": 1}
    jobs = client.get("/rq/0/data/jobs/arm/queued/8/asc/1.json").json["jobs"]
    assert [job["id"].startswith(key) for job in jobs] == [True]
    assert "geheim" not in jobs[0]["description"]
    told = client.get(f"/rq/0/data/job/{jobs[0]['id']}.json").json
    assert (told["status"], told["origin"]) == ("queued", "arm")
    for page in ("queues", "jobs", "workers", f"job/{jobs[0]['id']}"):
        assert client.get(f"/rq/0/view/{page}", follow_redirects=True).status_code == 200
    with client.get("/rq/static/js/jquery-3.5.1.min.js") as script:
        assert script.status_code == 200


def test_rq_dashboard_never_unpickles(manager: RequestManager, client: FlaskClient) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("it was unpickled",))

    bomb = pickle.dumps(Bomb())
    job = finished_pickle(manager, bomb)
    worker = rq.Worker(["other"], connection=manager.connection, name="busy-one")
    worker.register_birth()
    worker.set_state("busy")
    worker.prepare_execution(job)
    workers = client.get("/rq/0/data/workers.json")
    assert workers.status_code == 200
    assert [each["current_job"]["job_id"] for each in workers.json["workers"]] == [job.id]
    assert client.get(f"/rq/0/data/job/{job.id}.json").status_code == 200
    assert client.get("/rq/0/data/jobs/other/failed/8/asc/1.json").status_code == 200
    assert client.get(f"/rq/0/view/job/{job.id}").status_code == 200
    assert client.post(f"/rq/job/{job.id}/requeue").status_code == 200
    stored = manager.connection.hgetall(job.key)
    # what could not be read was written back as it was
    assert stored[b"meta"] == bomb
    assert rq.Queue("other", connection=manager.connection).job_ids == [job.id]


def test_rq_dashboard_requeues_foreign_jobs_whole(manager: RequestManager, client: FlaskClient) -> None:
    job = finished_pickle(manager)
    assert client.post("/rq/requeue/other").json == {"status": "OK", "count": 1}
    again = Job.fetch(job.id, connection=manager.connection)
    assert (again.func_name, again.meta, again.get_status()) == ("os.getcwd", {"who": {1, 2}}, "queued")


def test_rq_dashboard_writes_no_text_into_html_unescaped(manager: RequestManager, client: FlaskClient) -> None:
    """Its templates fill in the browser: every place must be an escaping one. The browser test shows that it works."""
    manager.submit("/a")
    job_id = rq.Queue("arm", connection=manager.connection).job_ids[0]
    pages = ["queues", "jobs", "workers", f"job/{job_id}", "jobs/arm/failed/8/asc/1"]
    for page in pages:
        text = client.get(f"/rq/0/view/{page}", follow_redirects=True).text
        assert "<%-" in text
        assert "<%=" not in text
        assert ".text(d." not in text
    hostile = client.get("/rq/0/view/jobs/x'%5C%3Cscript%3E/queued/8/asc/1").text
    assert "<script>" not in hostile.replace("<script>\n", "")
    assert "val('x" not in hostile


def test_rq_dashboard_has_a_policy_with_a_nonce(client: FlaskClient) -> None:
    first, second = client.get("/rq/"), client.get("/rq/")
    policy = first.headers["Content-Security-Policy"]
    nonce = policy.partition("'nonce-")[2].partition("'")[0]
    assert f'nonce="{nonce}"' in first.text
    assert first.text.count("nonce=") == 1
    assert "script-src 'self' 'nonce-" in policy
    assert nonce not in second.text


@pytest.mark.parametrize(
    "path",
    [
        "0/data/job/nobody.json",
        "0/view/job/nobody",
        "7/view/queues",
        "0/data/jobs/arm/nonsense/8/asc/1.json",
        "nowhere",
        "0/data/job/%00.json",
    ],
)
def test_rq_dashboard_says_not_found(client: FlaskClient, path: str) -> None:
    assert client.get(f"/rq/{path}").status_code == 404


def test_rq_dashboard_of_the_host_application_stays_as_it_is(manager: RequestManager) -> None:
    import rq_dashboard.web

    create_app(manager)
    create_app(manager)
    assert rq_dashboard.web.Job is Job
    assert rq_dashboard.web.config.serializer is not JSONSerializer


# -- inside another application


def test_the_blueprint_brings_its_checks(manager: RequestManager) -> None:
    host = Flask("host")

    @host.get("/")
    def home() -> str:
        return "home"

    host.register_blueprint(create_blueprint(manager, token="t0ken"), url_prefix="/arm")
    client = host.test_client()
    allowed = {"Authorization": "Bearer t0ken"}
    assert client.get("/").text == "home"
    assert "Content-Security-Policy" not in client.get("/").headers
    assert client.get("/arm/api/v1/").status_code == 401
    answer = client.get("/arm/api/v1/", headers=allowed)
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    page = client.get("/arm/rq/", headers=allowed)
    assert "/arm/rq/static/" in page.text
    assert 'href="/arm/"' in page.text
    assert client.get("/arm/rq/0/data/queues.json", headers=allowed).status_code == 200


def test_the_api_lists_its_paths(client: FlaskClient) -> None:
    paths = client.get("/api/v1/").json["paths"]
    assert {"path": "/api/v1/overview", "method": "GET"}.items() <= paths[
        [p["path"] for p in paths].index("/api/v1/overview")
    ].items()
    assert all(each["does"] for each in paths)


# -- what the pages say


@pytest.fixture
def filled(manager: RequestManager) -> dict[str, str]:
    """A request of each kind, with text that would do harm if it were taken for HTML; name -> key."""
    keys = {
        "pending": manager.submit(
            BatchRequest(f"/p/{quote(HOSTILE)}?q={quote(HOSTILE)}&token=geheim", tags=("t<b>",))
        ).key,
        "completed": manager.cache.put(BatchRequest("/c?x=1&token=geheim"), {"html": HOSTILE, "n": 1}),
        "text": manager.cache.put(BatchRequest("/t", sticky=True), HOSTILE * 1000),
        "html": manager.cache.put(
            BatchRequest("/h"), Result(HOSTILE.encode(), content_type="text/html", filename='x".html')
        ),
    }
    manager.submit(BatchRequest("/f?password=geheim", queue="q2"), payload={"to": HOSTILE, "password": "geheim"})
    lease = manager.queues.next_request(queue="q2")
    assert lease is not None
    try:
        raise ValueError(f"{HOSTILE} at /f?password=geheim")
    except ValueError as error:
        lease.fail(error)
    keys["failed"] = lease.key
    manager.submit(BatchRequest("/r", queue="q3"))
    running = manager.queues.next_request(queue="q3")
    assert running is not None
    running.renew(0.5, HOSTILE)
    keys["running"] = running.key
    return keys


def every_path(keys: dict[str, str]) -> list[str]:
    pages = ["", "requests", "requests?state=failed", "cache", "cache?order=size", "claims", "workers", "quarantine"]
    return [f"/{page}" for page in pages] + [f"/requests/{key}" for key in keys.values()]


def test_every_page_escapes_what_others_wrote(client: FlaskClient, filled: dict[str, str]) -> None:
    for path in every_path(filled):
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert HOSTILE not in answer.text, path
        assert "geheim" not in answer.text, path
        page = answer.text
        assert page.count("<script") == 1  # ours, with a source
        assert "<style" not in page
        assert " style=" not in page
        assert "onclick" not in page
    # it is there, as text
    assert "&lt;script&gt;" in client.get(f"/requests/{filled['failed']}").text
    assert "&lt;script&gt;" in client.get(f"/requests/{filled['completed']}").text


def test_the_api_tells_no_secret_and_is_json(client: FlaskClient, filled: dict[str, str]) -> None:
    paths = [path.replace("/", "/api/v1/", 1) for path in every_path(filled)]
    paths[0] = "/api/v1/overview"
    paths += [f"/api/v1/explain?uri={quote('/c?token=geheim&b=2&a=1')}", "/api/v1/events"]
    for path in paths:
        answer = client.get(path)
        assert (answer.status_code, answer.mimetype) == (200, "application/json"), path
        assert "geheim" not in answer.text, path


def test_a_request_in_full(client: FlaskClient, manager: RequestManager, filled: dict[str, str]) -> None:
    key = filled["failed"]
    told = client.get(f"/api/v1/requests/{key}").json["detail"]
    assert told["status"]["state"] == "failed"
    assert told["status"]["error"]["type"] == "ValueError"
    assert "/f?password=***" in told["status"]["error"]["message"]
    assert [event["verb"] for event in told["timeline"]] == ["submit", "start", "fail"]
    (attempt,) = told["attempts"]
    assert (attempt["number"], attempt["outcome"]) == (1, "failed")
    assert "/f?password=***" in attempt["error"]["message"]
    assert "Traceback (most recent call last)" in attempt["error"]["traceback"]
    assert told["payloads"][0]["value"] == {"to": HOSTILE, "password": "***"}
    running = client.get(f"/requests/{filled['running']}").text
    assert "50.0%" in running
    unknown = client.get("/requests/nobody")
    assert (unknown.status_code, "No request with the key" in unknown.text) == (200, True)
    assert client.get("/requests/a b").status_code == 400


def test_a_preview_is_short_text(client: FlaskClient, filled: dict[str, str]) -> None:
    told = client.get(f"/api/v1/requests/{filled['text']}").json["preview"]
    assert told["is_cut"]
    assert len(told["text"]) == 4_000
    value = client.get(f"/api/v1/requests/{filled['completed']}").json["preview"]
    assert json.loads(value["text"]) == {"html": HOSTILE, "n": 1}


@pytest.mark.parametrize("path", ["/requests/{}/download", "/api/v1/requests/{}/result"])
def test_a_result_is_downloaded_and_never_shown(client: FlaskClient, filled: dict[str, str], path: str) -> None:
    with client.get(path.format(filled["html"])) as answer:
        assert answer.data == HOSTILE.encode()
        assert answer.headers["Content-Type"] == "application/octet-stream"
        assert answer.headers["Content-Disposition"] == "attachment; filename=x_.html"
        assert "sandbox" in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    with client.get(path.format(filled["completed"])) as answer:
        assert answer.json == {"html": HOSTILE, "n": 1}
        assert answer.headers["Content-Disposition"] == f"attachment; filename={filled['completed']}.json"
    with client.get(path.format(filled["text"])) as answer:
        assert answer.text == HOSTILE * 1000
        assert int(answer.headers["Content-Length"]) == len(answer.data)
    assert client.get(path.format(filled["pending"])).status_code == 409
    assert client.get(path.format("nobody")).status_code == 404


def test_search_finds_and_pages(client: FlaskClient, manager: RequestManager) -> None:
    manager.submit_many([f"/cities/{n}" for n in range(12)])
    first = client.get("/api/v1/requests?q=/cities&limit=5").json
    assert len(first["entries"]) == 5
    second = client.get("/api/v1/requests", query_string={"q": "/cities", "limit": 50, "cursor": first["cursor"]}).json
    found = [each["uri"] for page in (first, second) for each in page["entries"]]
    assert sorted(found) == sorted(f"/cities/{n}" for n in range(12))
    page = client.get("/requests?q=/cities/11")
    assert "/cities/11" in page.text
    assert "/cities/10" not in page.text


@pytest.mark.parametrize(
    "path",
    [
        "requests?state=odd",
        "requests?limit=0",
        "requests?limit=x",
        "requests?cursor=x",
        "cache?order=x",
        "claims?offset=-1",
        "explain",
        "events?since=x",
    ],
)
def test_a_wrong_argument_is_named(client: FlaskClient, path: str) -> None:
    answer = client.get(f"/api/v1/{path}")
    assert answer.status_code == 400
    assert answer.json["error"]["message"].partition(":")[0] in (
        "state",
        "limit",
        "cursor",
        "order",
        "offset",
        "uri",
        "since",
    )


def test_notices_come_from_us_only(client: FlaskClient) -> None:
    assert "Cleared 12 results." in client.get("/cache?done=cleared:12").text
    assert 'class="card notice"' not in client.get("/cache?done=your+password+please").text
    assert "some results" in client.get("/cache?done=cleared:<b>").text


# -- what can be done


@pytest.mark.parametrize("body", ["{bad", "[]", "7", '{"exception": {"a": 1}}', '{"exception": null}', ""])
def test_a_body_that_is_no_object_of_texts_is_refused(client: FlaskClient, body: str) -> None:
    answer = client.post("/api/v1/quarantine/requeue", data=body, content_type="application/json")
    assert (answer.status_code, answer.json["error"]["status"]) == (400, 400)
    assert "a JSON object of texts and numbers is needed" in answer.json["error"]["message"]


def test_a_body_that_is_too_large_is_refused_in_json(manager: RequestManager) -> None:
    with serving(create_app(manager, rq=False)) as url:
        asked = urllib.request.Request(f"{url}api/v1/cache/clear-route", data=b"x" * 100_000)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(asked, timeout=PATIENCE)
        assert (refused.value.code, json.load(refused.value)["error"]["status"]) == (413, 413)


def test_of_an_unknown_key_the_api_says_not_found(client: FlaskClient) -> None:
    for path in ("requests/nobody", "requests/nobody/result"):
        assert client.get(f"/api/v1/{path}").status_code == 404
    for action in ("cancel", "resubmit", "forget", "release", "pin", "unpin"):
        answer = client.post(f"/api/v1/requests/nobody/{action}")
        assert (answer.status_code, "nobody" in answer.json["error"]["message"]) == (404, True), action
    for action in ("requeue", "discard"):
        assert client.post(f"/api/v1/quarantine/nobody/{action}").status_code == 404
    assert client.post("/requests/nobody/forget").headers["Location"] == "/requests?done=unknown:0"


def test_what_was_not_done_is_not_counted(client: FlaskClient, manager: RequestManager) -> None:
    key = manager.cache.put("/done", 1)
    for action in ("cancel", "release"):
        answer = client.post(f"/api/v1/requests/{key}/{action}").json
        assert (answer["outcome"] in ("ended", "not_running"), answer["count"]) == (True, 0)
    assert client.post(f"/api/v1/requests/{key}/pin").json == {"outcome": "pinned", "target": key, "count": 1}


def test_actions_on_a_request(client: FlaskClient, manager: RequestManager) -> None:
    key = manager.cache.put("/a", 1)
    api = f"/api/v1/requests/{key}"
    assert client.post(f"{api}/pin").json["outcome"] == "pinned"
    assert manager.status(key).sticky
    assert client.post(f"{api}/unpin").json["outcome"] == "unpinned"
    assert not manager.status(key).sticky
    assert client.post(f"{api}/ttl", json={"seconds": 100}).json["outcome"] == "retained"
    assert 90 < manager.inspect(key).ttl <= 100
    assert client.post(f"{api}/ttl", data={"seconds": "nan"}).status_code == 400
    assert client.post(f"{api}/ttl", json=[1]).status_code == 400
    assert client.post(f"{api}/resubmit").json["outcome"] == "resubmitted"
    assert client.post(f"{api}/resubmit").json["outcome"] == "joined"
    assert client.post(f"{api}/forget").status_code == 409
    lease = manager.queues.next_request()
    assert lease is not None
    assert client.post(f"{api}/release").json["outcome"] == "released"
    assert manager.status(key).state == "pending"
    assert client.post(f"{api}/release").json["outcome"] == "not_running"
    assert client.post(f"{api}/cancel").json["outcome"] == "cancelled"
    assert client.post(f"{api}/cancel").json["outcome"] == "ended"
    assert client.post(f"{api}/forget").json["outcome"] == "forgotten"
    assert client.post(f"{api}/cancel").status_code == 404
    assert manager.status(key).state == "unknown"


def test_actions_on_the_cache(client: FlaskClient, manager: RequestManager) -> None:
    for name in ("/a/1", "/a/2", "/b/1"):
        manager.cache.put(name, 1)
    manager.cache.put(BatchRequest("/c", tags=("old",), sticky=True), 1)
    assert client.post("/api/v1/cache/clear-route", json={"route": "/a"}).json == {
        "outcome": "cleared",
        "target": "route /a",
        "count": 2,
    }
    assert client.post("/api/v1/cache/clear-route").status_code == 400
    answer = client.post("/cache/clear-temporary", data={"back": "cache"})
    assert (answer.status_code, answer.headers["Location"]) == (303, "/cache?done=cleared:1")
    assert client.post("/api/v1/cache/invalidate", data={"tag": "old"}).json["count"] == 1
    assert manager.cache.stats().sticky == 0


def test_a_form_leads_back_to_our_pages_only(client: FlaskClient, manager: RequestManager) -> None:
    key = manager.submit("/a").key
    for back in ("https://evil.example", "//evil.example", "nowhere", "do_cancel"):
        answer = client.post(f"/requests/{key}/cancel", data={"back": back})
        assert answer.headers["Location"].startswith(f"/requests/{key}?done=")
    assert (
        client.post(f"/requests/{key}/cancel", data={"back": "requests"}).headers["Location"]
        == "/requests?done=ended:0"
    )


# -- what it costs


def test_a_page_costs_three_round_trips_at_the_most(
    manager: RequestManager, filled: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.submit_many([BatchRequest(f"/many/{n}", queue=f"queue{n}") for n in range(30)])
    for n in range(60):
        manager.cache.put(f"/cached/{n}", "x" * (70_000 if n == 7 else 10))
    client = browser(manager)
    paths = [*every_path({**filled, "large": BatchRequest("/cached/7").key}), "/api/v1/explain?uri=/a", "/readyz"]
    for path in paths:
        client.get(path)  # scripts are loaded, the server is checked
    for path in paths:
        with managers.round_trips(monkeypatch) as sent:
            assert client.get(path).status_code == 200
        assert 1 <= len(sent) <= 3, (path, sent)


# -- live


class Stream:
    """An open stream of server-sent events."""

    def __init__(self, url: str) -> None:
        self._answer = urllib.request.urlopen(url, timeout=PATIENCE)

    def next(self, name: str) -> Any:
        """The data of the next event of this name."""
        found = ""
        while True:
            line = self._answer.readline().decode()
            assert line, f"the stream ended before {name}"
            if line.startswith("event: "):
                found = line.removeprefix("event: ").strip()
            elif line.startswith("data: ") and found == name:
                return json.loads(line.removeprefix("data: "))

    def drain(self) -> None:
        """Read to the end, which comes when the server ends the stream."""
        self._answer.read()

    def close(self) -> None:
        self._answer.close()


@contextmanager
def live(manager: RequestManager, **options: Any) -> Iterator[tuple[str, Any]]:
    """A dashboard that listens; its URL and its poller."""
    app = create_app(manager, **({"interval": 0.05} | options))
    with serving(app) as url:
        yield url, app.extensions["rqarm"].poller


def test_one_thread_feeds_every_browser_and_ends_with_the_last(manager: RequestManager) -> None:
    with live(manager) as (url, poller):
        assert threads_named("rqarm-dashboard") == 0
        streams = [Stream(f"{url}stream?page=overview") for _ in range(3)]
        for stream in streams:
            assert "Nothing was ever submitted" in stream.next("page")
        assert threads_named("rqarm-dashboard") == 1
        assert poller.clients == 3
        manager.submit(f"/{quote(HOSTILE)}")
        for stream in streams:
            while "<th scope" not in (page := stream.next("page")):
                pass
            assert HOSTILE not in page
            stream.close()
        eventually(lambda: poller.clients == 0 and threads_named("rqarm-dashboard") == 0, PATIENCE, "the poller ends")


def test_a_page_of_one_request_hears_of_that_one(manager: RequestManager) -> None:
    mine, other = manager.cache.put("/mine", 1), "/other"
    looks = [Look(1, states={}), Look(2, states={"other": "pending"}), Look(3, states={mine: "completed"})]
    assert stream_module._concerns(looks[:2], mine, False) == (False, False)
    assert stream_module._concerns(looks, mine, False) == (False, True)
    assert stream_module._concerns([Look(4, states={mine: "in_progress"})], mine, False) == (True, True)
    assert stream_module._concerns([Look(5, states={})], mine, True) == (True, True)
    assert stream_module._concerns([Look(6, states=None)], mine, False) == (False, True)
    with live(manager) as (url, _):
        stream = Stream(f"{url}stream?page=request&key={mine}")
        stream.next("changed")
        manager.submit(other)
        manager.cache.put("/mine", 2)
        stream.next("changed")
        stream.close()


def test_too_many_watchers_are_told_so(manager: RequestManager) -> None:
    with live(manager, streams=1) as (url, _):
        first = Stream(f"{url}stream?page=workers")
        first.next("changed")
        with pytest.raises(urllib.error.HTTPError) as caught:
            Stream(f"{url}stream?page=workers")
        assert caught.value.code == 503
        caught.value.close()
        first.close()
        # the place is free again
        eventually(lambda: is_open(f"{url}stream?page=workers"), PATIENCE, "a place is free")


def is_open(url: str) -> bool:
    try:
        Stream(url).close()
    except urllib.error.HTTPError as error:
        error.close()
        return False
    return True


def test_streams_end_with_the_dashboard(manager: RequestManager) -> None:
    with live(manager) as (url, poller):
        stream = Stream(f"{url}stream?page=overview")
        stream.next("page")
        poller.close()
        stream.drain()
        assert threads_named("rqarm-dashboard") == 0
        stream.close()


def test_a_server_that_is_gone_is_told_and_found_again(tmp_path: Any) -> None:
    binary = servers.VALKEY or servers.REDIS
    with servers.throwaway(binary) as server, RequestManager(server.url, allow_volatile=True) as manager:
        manager.connection.connection_pool.connection_kwargs["retry"] = Retry(NoBackoff(), 0)
        with live(manager) as (url, _):
            stream = Stream(f"{url}stream?page=overview")
            stream.next("page")
            server.kill()
            assert stream.next("trouble") == "the server does not answer"
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"{url}api/v1/overview", timeout=PATIENCE)
            assert caught.value.code == 503
            caught.value.close()
            server.start()
            stream.next("page")
            stream.close()


def threads_named(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


# -- the command


def test_the_command_serves_until_it_is_told_to_stop(url: str, redis_client: redis.Redis, tmp_path: Path) -> None:
    environ = {**os.environ, "RQARM_ALLOW_VOLATILE": "1", "RQARM_DASHBOARD_TOKEN": "t0ken", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rqarm.cli", "dashboard", "--url", url, "--port", "0"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        where = re.search(r"http://127\.0\.0\.1:\d+/", told)
        assert where, told
        asked = urllib.request.Request(f"{where[0]}api/v1/overview", headers={"Authorization": "Bearer t0ken"})
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            assert json.load(answer)["overview"]["namespace"] == "arm"
        process.terminate()
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--port", "99999"], ["--username", "anna"]])
def test_the_command_refuses_what_is_not_safe(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "rqarm.cli", "dashboard", "--url", "redis://127.0.0.1:1", *arguments]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_metrics_need_credentials_and_are_prometheus(manager: RequestManager) -> None:
    manager.submit("/a")
    client = browser(manager, token="t0ken")
    assert client.get("/metrics").status_code == 401
    answer = client.get("/metrics", headers={"Authorization": "Bearer t0ken"})
    assert answer.mimetype == "text/plain"
    assert 'rqarm_submissions_total{outcome="new"} 1' in answer.text


def test_the_page_on_it_names_every_path_and_option(client: FlaskClient) -> None:
    text = (ROOT / "docs" / "dashboard.md").read_text()
    told = re.findall(r"^\| `(/api/v1/[^`]*)` \|", text, re.MULTILINE)
    assert sorted(told) == sorted(each["path"] for each in client.get("/api/v1/").json["paths"])
    for each in dataclasses.fields(Options):
        assert f"`RQARM_DASHBOARD_{each.name.upper()}`" in text
    for path in ("healthz", "readyz", "metrics", "stream"):
        assert f"| `/{path}` |" in text


def test_the_quarantine_by_exception(client: FlaskClient, manager: RequestManager) -> None:
    keys = set_aside(manager, "/q/1", "/q/2?token=geheim", "/q/3")
    told = client.get("/api/v1/quarantine").json
    assert (told["total"], told["shown"]) == (3, 3)
    assert [(group["exception"], group["count"]) for group in told["groups"]] == [("ValueError", 3)]
    page = client.get("/quarantine").text
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert "geheim" not in page
    assert client.post(f"/api/v1/quarantine/{keys[0]}/requeue").json["outcome"] == "requeued"
    assert manager.status(keys[0]).state == "pending"
    assert client.post(f"/api/v1/quarantine/{keys[0]}/requeue").json["outcome"] == "in_flight"
    assert client.post(f"/api/v1/quarantine/{keys[1]}/discard").json["outcome"] == "discarded"
    assert manager.status(keys[1]).state == "unknown"
    assert client.post("/api/v1/quarantine/discard").status_code == 400
    assert client.post("/api/v1/quarantine/requeue", json={"exception": "KeyError"}).json["count"] == 0
    answer = client.post("/quarantine/requeue", data={"exception": "ValueError"})
    assert answer.headers["Location"] == "/quarantine?done=requeued:1"
    assert manager.status(keys[2]).state == "pending"


def test_the_quarantine_is_paged(client: FlaskClient, manager: RequestManager) -> None:
    keys = set_aside(manager, *(f"/q/{n}" for n in range(7)))
    seen, path = [], "/api/v1/quarantine?limit=3"
    while path:
        told = client.get(path).json
        assert told["total"] == 7
        seen += [entry["key"] for group in told["groups"] for entry in group["entries"]]
        assert (told["shown"] <= 3, told["looked_at"]) == (True, len(seen))
        path = told["cursor"] and f"/api/v1/quarantine?limit=3&cursor={quote(told['cursor'])}"
    assert sorted(seen) == sorted(keys)

    first = client.get("/quarantine?limit=3").text
    assert "1 to 3 of 7" in first
    link = re.search('rel="next" href="([^"]+)"', first)
    assert link is not None
    assert "4 to 7 of 7" in client.get(html.unescape(link[1])).text
    assert "rel=" not in client.get("/quarantine").text.partition("<main")[2]
    assert client.get("/api/v1/quarantine?cursor=nowhere").status_code == 400


def set_aside(manager: RequestManager, *uris: str) -> list[str]:
    """Requests that their handler wanted to be looked at; their keys."""
    keys = [manager.submit(BatchRequest(uri)).key for uri in uris]
    for uri in uris:
        lease = manager.queues.next_request()
        assert lease is not None
        lease.fail(ValueError(f"{HOSTILE} {uri}"), quarantine=True, password="geheim")
    return keys
