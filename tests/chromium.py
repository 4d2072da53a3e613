"""Headless Chromium, and a report opened in it: for the tests, the docs' pictures and the benchmark."""

from __future__ import annotations

from pathlib import Path
from shutil import which
from typing import Any

BROWSER, DRIVER = which("chromium"), which("chromedriver")
MISSING = "chromium and chromedriver are not installed: apt-get install chromium chromium-driver"
PATIENCE_SECONDS = 300


def started() -> Any:
    """A browser; `quit` it in the end."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(PATIENCE_SECONDS)
    driver.command_executor.client_config.timeout = PATIENCE_SECONDS
    return driver


def opened(browser: Any, page: Path, width: int = 1280, scheme: str = "light") -> Any:
    """The browser with the page, all figures drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 850, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(page.as_uri())
    WebDriverWait(browser, PATIENCE_SECONDS).until(
        lambda b: b.execute_script("return document.documentElement.dataset.ready")
    )
    return browser
