"""A headless Chromium for tests and screenshots, as Debian has it (apt-get install chromium chromium-driver)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

#: why there is no browser here; "" = there is one
MISSING = (
    "selenium is not installed (pip install selenium)"
    if find_spec("selenium") is None
    else "no chromium here (apt-get install chromium chromium-driver)"
    if not (shutil.which("chromium") and shutil.which("chromedriver"))
    else ""
)


@contextmanager
def chromium(width: int = 1280, height: int = 900, *, is_dark: bool = False) -> Iterator[Any]:
    """A driver with a profile of its own; the browser ends with the block."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (
        "--headless=new",
        "--no-sandbox",  # CI runs as root in a container
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-extensions",
        "--disable-background-networking",
        "--no-first-run",
        "--hide-scrollbars",
        "--force-color-profile=srgb",
        f"--window-size={width},{height}",
        *(["--blink-settings=preferredColorScheme=0"] if is_dark else ["--blink-settings=preferredColorScheme=1"]),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    try:
        driver.set_page_load_timeout(60)
        yield driver
    finally:
        driver.quit()


def complaints(driver: Any) -> list[str]:
    """What the browser has complained of since the last call: script errors, and what the policy has blocked."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
