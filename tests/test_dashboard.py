"""The dashboard on real servers: who is let in, what a page says and costs, and that text of others stays text."""

from __future__ import annotations

import base64
import logging
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import rq
from flask import Flask
from flask.testing import FlaskClient
from rq.job import Job
from rq.serializers import JSONSerializer

from rqarm import BatchRequest, RequestManager, __version__
from rqarm.dashboard import Options, create_app, create_blueprint
from rqarm.errors import ConfigError

HOSTILE = "<script>alert(1)</script>"
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
    """Every rule of the application that takes POST refuses GET, and rq-dashboard's own ways to change by GET are shut."""
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
    assert BatchRequest
    assert __version__
