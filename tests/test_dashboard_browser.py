"""A real browser drives every page and every action of the dashboard, against a real server and real workers."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import browsers
import pytest
import rq
import servers
import workers
from flask import Flask
from servers import eventually

from rqarm import BatchRequest, RequestManager, Result
from rqarm.dashboard import create_app
from rqarm.dashboard.serve import serving
from rqarm.dashboard.stream import Poller

pytestmark = [
    pytest.mark.skipif(bool(browsers.MISSING), reason=browsers.MISSING),
    # Selenium leaves sockets to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PATIENCE = 40.0
#: what would set a mark if any of it ran or became an element
HOSTILE = '\'"><img src=x onerror="window.pwned=1"><script>window.pwned=1</script>{{7*7}}<%= 1 %>'


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browsers.chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[workers.Crew]:
    binary = servers.VALKEY or servers.REDIS
    with servers.throwaway(binary) as server, workers.crew(server.url, tmp_path_factory.mktemp("crew")) as crew:
        crew.hire()
        yield crew


@pytest.fixture(scope="module")
def app(crew: workers.Crew) -> Flask:
    return create_app(crew.rm, interval=0.2)


@pytest.fixture(scope="module")
def url(app: Flask) -> Iterator[str]:
    with serving(app) as url:
        yield url


@pytest.fixture
def poller(app: Flask) -> Poller:
    found: Poller = app.extensions["rqarm"].poller
    return found


@pytest.fixture(autouse=True)
def no_complaints(driver: Any) -> Iterator[None]:
    """No script error, nothing that the policy had to block, no mark of a hostile text."""
    browsers.complaints(driver)
    yield
    assert not driver.execute_script("return window.pwned")
    assert [told for told in browsers.complaints(driver) if "favicon" not in told] == []


class Window:
    """What a person does and sees."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, path: str) -> None:
        self.driver.get(self.url + path)

    def text(self, selector: str = "main") -> str:
        return str(self.driver.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def shows(self, text: str, selector: str = "main") -> None:
        """Wait for a text without reloading the page."""
        eventually(
            lambda: text.lower() in self.text(selector).lower(), PATIENCE, f"{text!r} in {self.text(selector)!r}"
        )

    def lacks(self, text: str, selector: str = "main") -> None:
        eventually(lambda: text.lower() not in self.text(selector).lower(), PATIENCE, f"no {text!r}")

    def find(self, kind: str, text: str, near: str = "") -> Any:
        """The first link, button or summary with this text, inside the row or card that has ``near``."""
        script = """
            const [kind, text, near] = arguments;
            const own = (each) => { const copy = each.cloneNode(true);
                copy.querySelectorAll('.hidden').forEach((x) => x.remove()); return copy.textContent.trim(); };
            return [...document.querySelectorAll(kind)].find((each) => own(each) === text && each.checkVisibility() &&
                (!near || (each.closest('tr, section') || document.body).textContent.includes(near)));
        """
        return eventually(lambda: self.driver.execute_script(script, kind, text, near), PATIENCE, f"{kind} {text}")

    def press(self, text: str, near: str = "", kind: str = "button") -> None:
        """Press it; again when a live page has replaced it meanwhile."""

        def pressed() -> bool:
            from selenium.common.exceptions import StaleElementReferenceException

            try:
                self.find(kind, text, near).click()
            except StaleElementReferenceException:
                return False
            return True

        eventually(pressed, PATIENCE, f"press {text}")

    def press_twice(self, text: str, sure: str, near: str = "") -> None:
        """An action that asks again."""
        self.press(text, near, kind="summary")
        self.press(sure, near)

    def fill(self, name: str, text: str) -> None:
        from selenium.common.exceptions import WebDriverException

        def filled() -> bool:
            try:
                box = self.driver.find_element("css selector", f"[name={name}]")
                box.clear()
                box.send_keys(text)
            except WebDriverException:  # a live page has replaced it meanwhile
                return False
            return bool(box.get_attribute("value") == text)

        eventually(filled, PATIENCE, f"{name} takes {text}")


@pytest.fixture
def window(driver: Any, url: str) -> Window:
    return Window(driver, url)


def test_the_overview_moves_by_itself(window: Window, crew: workers.Crew) -> None:
    window.open("")
    window.shows("Submissions per minute")
    window.shows("live", "#live-state")
    before = crew.rm.overview().submissions.get("new", 0)
    crew.rm.get(f"/add/{before}/41", timeout=PATIENCE)
    crew.rm.submit(f"/add/{before}/41")
    window.shows(f"{crew.name}", "#live tbody")
    window.shows("%", "dl.figures")
    assert window.driver.execute_script("return document.querySelectorAll('svg.chart rect').length") >= 1


def test_every_page_is_there_and_reachable_by_its_links(window: Window) -> None:
    window.open("")
    for link, says in {
        "Requests": "Key or part of a URI",
        "Cache": "Time to live",
        "Claims": "runs",
        "Workers": "listen",
        "Overview": "Queues",
    }.items():
        window.press(link, kind="nav a")
        window.shows(says)
        assert window.text("nav a[aria-current]") == link
    window.press("RQ jobs", kind="nav a")
    eventually(lambda: "registered queues" in window.text("body"), PATIENCE)
    window.press("← rqarm", kind="a")
    window.shows("Submissions per minute")


def test_a_request_is_found_watched_and_cancelled(window: Window, crew: workers.Crew) -> None:
    status = crew.rm.submit("/wait/browser?b=2&a=1", payload={"who": HOSTILE})
    crew.running("browser")
    window.open("requests")
    window.fill("q", "wait/browser")
    window.press("Search")
    window.shows("in progress", "#live")
    window.press("/wait/browser?a=1&b=2", kind="a")
    window.shows("sort parameters")
    window.shows("1 payload")
    window.shows("window.pwned=1")
    window.shows("start")
    window.press_twice("Cancel", "Yes, cancel it for everybody")
    window.shows("Cancelled, for everybody", ".notice")
    window.shows("cancelled", "#state")
    assert crew.rm.status(status.key).state == "cancelled"


def test_a_page_of_a_request_follows_it_to_its_end(window: Window, crew: workers.Crew) -> None:
    status = crew.rm.submit("/wait/follow")
    crew.running("follow")
    window.open(f"requests/{status.key}")
    window.shows("in progress", "#state")
    window.shows("Lease")
    crew.let_go("follow")
    window.shows("completed", "#state")
    window.shows("follow 1", "pre")
    told = "return document.getElementById('announce').textContent"
    eventually(lambda: window.driver.execute_script(told) == "completed", PATIENCE, "a screen reader hears of it")


def test_a_result_is_pinned_kept_run_again_and_forgotten(window: Window, crew: workers.Crew) -> None:
    key = crew.rm.submit("/add/20/22").key
    crew.settle(key)
    window.open(f"requests/{key}")
    window.shows("42", "pre")
    window.press("Pin")
    window.shows("stays until it is cleared", ".notice")
    window.shows("never (sticky)")
    window.press("Unpin")
    window.shows("expires again", ".notice")
    window.fill("seconds", "5000")
    window.press("Set")
    window.shows("as long as you said", ".notice")
    assert 4_000 < (crew.rm.inspect(key).ttl or 0) <= 5_000
    window.press("Resubmit")
    window.shows("It runs again", ".notice")
    window.shows("completed", "#state")
    window.press_twice("Forget", "Yes, forget it and its result")
    window.shows("Forgotten", ".notice")
    assert crew.rm.status(key).state == "unknown"


def test_a_claim_is_released(window: Window, crew: workers.Crew) -> None:
    key = crew.rm.submit("/turn/claimed").key
    crew.note("running-claimed-1")
    window.open("claims")
    window.shows("/turn/claimed")
    window.press_twice("Release", "Yes, take it from its worker", near="/turn/claimed")
    window.shows("Handed back", ".notice")
    crew.let_go("claimed-1")
    crew.let_go("claimed-2")
    crew.settle(key)


def test_the_cache_is_cleared_in_parts(window: Window, crew: workers.Crew) -> None:
    crew.rm.cache.put(BatchRequest("/browser-a/1"), 1)
    crew.rm.cache.put(BatchRequest("/browser-b/1", tags=("browser",)), 1)
    sticky = crew.rm.cache.put(BatchRequest("/browser-c/1", sticky=True), 1)
    window.open("cache")
    window.shows("/browser-a/1")
    window.press("Pin", near="/browser-a/1")
    window.shows("stays until", ".notice")
    window.fill("route", "/browser-a")
    window.press("Clear route")
    window.shows("Cleared 1 results", ".notice")
    window.lacks("/browser-a/1")
    window.fill("tag", "browser")
    window.press("Clear tag")
    window.shows("Cleared 1 results", ".notice")
    window.press("Largest", kind="a")
    window.shows("/browser-c/1")
    summary = window.find("summary", "Clear temporary results…")
    summary.click()
    window.driver.execute_script("arguments[0].parentElement.querySelector('button').click()", summary)
    window.shows("Cleared", ".notice")
    assert crew.rm.cache.overview().temporary == 0
    assert crew.rm.status(sticky).state == "completed"


def test_workers_are_shown(window: Window, crew: workers.Crew) -> None:
    window.open("workers")
    window.shows(crew.workers[0].name)
    key = crew.rm.submit("/wait/shown").key
    crew.running("shown")
    window.shows(key)
    window.shows("busy")
    crew.let_go("shown")
    crew.settle(key)


def test_hostile_text_does_nothing_on_any_page(window: Window, crew: workers.Crew) -> None:
    """Stored XSS: in URIs, parameters, payloads, results, file names, errors, tags, progress and RQ's jobs."""
    rm: RequestManager = crew.rm
    keys = [
        rm.submit(
            BatchRequest("/hostile", {"q": HOSTILE, HOSTILE: "1"}, queue="xss", tags=("<b>x",)), payload=HOSTILE
        ).key,
        rm.cache.put(BatchRequest("/hostile-value", {"q": HOSTILE}), {HOSTILE: HOSTILE}),
        rm.cache.put("/hostile-text", HOSTILE),
        rm.cache.put("/hostile-html", Result(HOSTILE.encode(), content_type="text/html", filename="<img src=x>.html")),
        rm.submit(BatchRequest("/hostile-op", {"q": HOSTILE}, operation=HOSTILE.replace("\n", ""), queue="xss")).key,
    ]
    for ended in ("fail", "run"):
        rm.submit(BatchRequest(f"/hostile-{ended}", {"q": HOSTILE}, queue="pull"), payload={HOSTILE: HOSTILE})
        lease = rm.queues.next_request(queue="pull")
        assert lease is not None
        keys.append(lease.key)
        if ended == "fail":
            lease.fail(ValueError(HOSTILE))
        else:
            lease.renew(0.5, HOSTILE)
    evil, ours = hostile_jobs(rm)
    pages = [
        "",
        "requests",
        "requests?q=hostile",
        "cache",
        "claims",
        "workers",
        *(f"requests?{name}={quote(HOSTILE)}" for name in ("done", "q")),
    ]
    pages += [f"requests/{key}" for key in keys]
    pages += ["rq/", "rq/0/view/workers", "rq/0/view/jobs/xss/queued/50/asc/1", "rq/0/view/jobs/evil/failed/50/asc/1"]
    pages += [f"rq/0/view/job/{job_id}" for job_id in (*evil, *ours)]
    for page in pages:
        window.open(page)
        if page.startswith("rq/"):
            # its pages fill in the browser
            eventually(lambda: "Loading..." not in window.text("body"), PATIENCE, page)
        if page.startswith("rq/0/view/job/"):
            window.shows("xss" if page.rpartition("/")[2] in ours else "onerror", "#job-data")
        assert not window.driver.execute_script("return window.pwned"), page
        assert window.driver.execute_script("return document.querySelectorAll('img').length") == 0, page
    window.open(f"requests/{keys[5]}")
    window.shows("<script>window.pwned=1</script>")


def hostile_jobs(rm: RequestManager) -> tuple[list[str], list[str]]:
    """RQ jobs of others with the text in every field, and those of our requests; their ids."""
    queue = rq.Queue("evil", connection=rm.connection)
    queue.enqueue("os.getcwd", description=HOSTILE, meta={"m": HOSTILE})
    job = queue.create_job("os.getcwd", description=HOSTILE, meta={"m": HOSTILE})
    job.set_status("failed")
    job.save()
    queue.failed_job_registry.add(job, ttl=1000)
    rm.connection.hset(job.key, "data", pickle.dumps(HOSTILE))
    return [job.id, *queue.job_ids], rq.Queue("xss", connection=rm.connection).job_ids


def test_rq_jobs_are_deleted_and_emptied_in_rq_dashboard(window: Window, crew: workers.Crew) -> None:
    key = crew.rm.submit(BatchRequest("/to-be-emptied", queue="emptied")).key
    window.open("rq/0/view/jobs/emptied/queued/8/asc/1")
    window.shows("/to-be-emptied", "#jobs")
    window.press("Empty queue", kind="a")
    window.press("Yes", kind="#confirmation-modal-yes")
    window.shows("No jobs.", "#jobs")
    # the claim heals: a submit makes a new ticket
    assert crew.rm.submit(BatchRequest("/to-be-emptied", queue="emptied")).key == key
    assert rq.Queue("emptied", connection=crew.rm.connection).count == 1


def test_a_hidden_tab_costs_nothing(window: Window, poller: Poller) -> None:
    window.open("workers")
    eventually(lambda: poller.clients == 1, PATIENCE, "the page watches")
    window.driver.execute_script(
        "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    eventually(lambda: poller.clients == 0, PATIENCE, "the stream is closed")
    assert window.text("#live-state") == "paused"
    window.driver.execute_script(
        "Object.defineProperty(document, 'hidden', {value: false, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    eventually(lambda: poller.clients == 1, PATIENCE, "the page watches again")


def test_it_is_usable_by_keyboard_and_at_400_pixels(window: Window, crew: workers.Crew) -> None:
    window.open("requests")
    from selenium.webdriver.common.keys import Keys

    body = window.driver.find_element("css selector", "body")
    body.send_keys(Keys.TAB)
    assert window.driver.switch_to.active_element.text == "Skip to the content"
    window.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert window.driver.execute_script("return document.activeElement.id") == "main"
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    window.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for page in ("", "requests", "cache", "claims", "workers"):
            window.open(page)
            wide = window.driver.execute_script("return document.documentElement.scrollWidth")
            assert wide <= 400, (page, wide)
    finally:
        window.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_what_a_screen_reader_needs_is_there(window: Window, crew: workers.Crew) -> None:
    script = """
        const faults = [];
        document.querySelectorAll('input:not([type=hidden]), select').forEach((each) => {
            if (!each.labels.length && !each.ariaLabel) faults.push('no label: ' + each.name); });
        document.querySelectorAll('button, a, summary').forEach((each) => {
            if (!each.textContent.trim()) faults.push('no text: ' + each.outerHTML.slice(0, 80)); });
        document.querySelectorAll('thead th').forEach((each) => {
            if (each.scope !== 'col') faults.push('no scope: ' + each.textContent); });
        document.querySelectorAll('svg').forEach((each) => {
            if (each.getAttribute('role') !== 'img' || !each.getAttribute('aria-label')) faults.push('svg'); });
        const ids = [...document.querySelectorAll('[id]')].map((each) => each.id);
        ids.forEach((id, n) => { if (ids.indexOf(id) !== n) faults.push('twice: ' + id); });
        document.querySelectorAll('[aria-labelledby]').forEach((each) => {
            if (!document.getElementById(each.getAttribute('aria-labelledby'))) faults.push('names nobody'); });
        if (document.querySelectorAll('h1').length !== 1) faults.push('h1');
        if (!document.documentElement.lang || !document.title) faults.push('lang or title');
        return faults;
    """
    key = crew.rm.cache.put("/reader", 1)
    for page in ("", "requests", "cache", "claims", "workers", f"requests/{key}", "nowhere"):
        window.open(page)
        assert window.driver.execute_script(script) == [], page
    browsers.complaints(window.driver)  # that /nowhere is 404


def test_what_was_set_aside_is_requeued_and_discarded(window: Window, crew: workers.Crew) -> None:
    keys = []
    for n in range(3):
        keys.append(crew.rm.submit(BatchRequest(f"/aside/{n}", {"q": HOSTILE}, queue="aside")).key)
        lease = crew.rm.queues.next_request(queue="aside")
        assert lease is not None
        lease.fail(ValueError(HOSTILE), quarantine=True)
    window.open("quarantine")
    window.shows("ValueError")
    window.shows("onerror")
    window.press("Requeue", near="/aside/0")
    window.shows("Requeued 1 of them", ".notice")
    assert crew.rm.status(keys[0]).state == "pending"
    window.press_twice("Discard", "Yes, drop it", near="/aside/1")
    window.shows("Discarded 1 of them", ".notice")
    assert crew.rm.status(keys[1]).state == "unknown"
    window.press_twice("Discard all…", "Yes, drop all of this exception", near="ValueError")
    window.shows("Discarded 1 of them", ".notice")
    window.shows("Nothing is set aside")
