"""Take a picture of every page of the dashboard into docs/img, on a server and with workers of its own.

    python scripts/screenshots.py [DIRECTORY]

Needs Chromium and Selenium, see tests/browsers.py. Look at the pictures before you commit them.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import browsers  # noqa: E402 -- found by the path above
import servers  # noqa: E402
import workers  # noqa: E402
from servers import eventually  # noqa: E402

from rqarm import BatchRequest, RequestManager  # noqa: E402
from rqarm.dashboard import create_app  # noqa: E402
from rqarm.dashboard.serve import serving  # noqa: E402

#: a picture above this does not belong into a repository
MOST_BYTES = 150_000


def main(target: Path) -> int:
    if browsers.MISSING:
        print(browsers.MISSING, file=sys.stderr)
        return 1
    target.mkdir(parents=True, exist_ok=True)
    with (
        servers.throwaway(servers.VALKEY or servers.REDIS) as server,
        tempfile.TemporaryDirectory(dir="/tmp") as directory,
        workers.crew(server.url, Path(directory), crash_delay=0.1, max_attempts=2, lease=10) as crew,
    ):
        pages = fill(crew)
        with serving(create_app(crew.rm)) as url:
            take(url, pages, target)
            for name in ("wait-a", "wait-b"):
                crew.let_go(name)
    too_large = [path.name for path in target.glob("*.png") if path.stat().st_size > MOST_BYTES]
    print(f"{len(list(target.glob('*.png')))} pictures in {target}", *(f"too large: {name}" for name in too_large))
    return 1 if too_large else 0


def fill(crew: Any) -> dict[str, str]:
    """Requests of every kind; page name -> path."""
    rm: RequestManager = crew.rm
    chance = random.Random(7)
    crew.hire("rqarm.Worker", concurrency=1)
    crew.hire("rqarm.Worker")
    crew.hire("rqarm.Worker")
    uris = [f"/add/{chance.randrange(12)}/{chance.randrange(12)}" for _ in range(160)]
    for uri in uris:
        rm.submit(uri)
    for uri in uris[::3]:
        rm.submit(BatchRequest(uri, sticky=chance.random() < 0.3))
    report = rm.submit(BatchRequest("/stream/3/200000", {"token": "s3cret", "b": 2, "a": 1}, sticky=True)).key
    table = rm.submit("/async/7?b=2&a=1&utm_source=x", payload={"email": "anna@example.org"}).key
    failed = [rm.submit(f"/fail/{n}").key for n in range(4)]
    crew.settle(report, table, *failed)
    for name in ("a", "b"):
        rm.submit(f"/wait/wait-{name}", payload={"user": 17})
        crew.running(f"wait-{name}")
    rm.submit("/kill/once")
    for n in range(25):
        rm.submit(BatchRequest(f"/add/{n}/1000", queue="reports", priority="low" if n % 3 else "high"))
    running = BatchRequest("/wait/wait-a").key
    eventually(lambda: rm.overview().states["in_progress"] >= 2, 30)
    return {
        "overview": "",
        "requests": "requests?q=/add",
        "request": f"requests/{table}",
        "request-running": f"requests/{running}",
        "request-failed": f"requests/{failed[0]}",
        "cache": "cache",
        "claims": "claims",
        "quarantine": "quarantine",
        "workers": "workers",
        "rq": "rq/",
        "rq-jobs": "rq/0/view/jobs/reports-low/queued/8/asc/1",
    }


def take(url: str, pages: dict[str, str], target: Path) -> None:
    with browsers.chromium() as driver:
        for name, path in pages.items():
            shoot(driver, url + path, target / f"dashboard-{name}.png")
    with browsers.chromium(is_dark=True) as driver:
        shoot(driver, url, target / "dashboard-overview-dark.png")
    with browsers.chromium(500, 900) as driver:
        # the window has a least width; the page is narrower
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 400, "height": 860, "deviceScaleFactor": 1, "mobile": True},
        )
        shoot(driver, url, target / "dashboard-overview-narrow.png")
        shoot(driver, url + pages["requests"], target / "dashboard-requests-narrow.png")


def shoot(driver: Any, url: str, path: Path) -> None:
    driver.get(url)
    time.sleep(1.5)  # live pages fill themselves; this is no test
    driver.save_screenshot(str(path))
    for told in browsers.complaints(driver):
        print(f"{path.name}: {told}", file=sys.stderr)


if __name__ == "__main__":
    chosen = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "img"
    shutil.rmtree(chosen, ignore_errors=True)
    raise SystemExit(main(chosen))
