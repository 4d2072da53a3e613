"""Takes the pictures of a report for the docs in headless Chromium: `python docs/make_report_pictures.py report.html`.

At 1280 and 390 pixels, light and dark: the top of the page, and on the phone the list of features. Needs chromium, chromedriver and selenium.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from shutil import which
from typing import Any

from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

FIGURES = Path(__file__).parent / "figures"
PICTURES = ((1280, "light", "body", 1500), (1280, "dark", "#floors", 1400), (390, "light", "body", 1500), (390, "dark", "#features", 1300))
"""Width in pixels, colours, where the picture begins, and how high it is."""
PATIENCE_SECONDS = 300


def browser() -> Any:
    options = webdriver.ChromeOptions()
    options.binary_location = str(which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(which("chromedriver")))
    driver.set_page_load_timeout(PATIENCE_SECONDS)
    driver.command_executor.client_config.timeout = PATIENCE_SECONDS
    return driver


def main() -> None:
    page, driver = Path(sys.argv[1]).resolve(), browser()
    for width, colours, start, height in PICTURES:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 850, "deviceScaleFactor": 1, "mobile": width < 500})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": colours}]})
        driver.get(page.as_uri())
        WebDriverWait(driver, PATIENCE_SECONDS).until(lambda b: b.execute_script("return document.documentElement.dataset.ready"))
        top = driver.execute_script(f"return document.querySelector('{start}').getBoundingClientRect().top + scrollY")
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        picture = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "webp", "quality": 70, "clip": clip, "captureBeyondViewport": True})
        (FIGURES / f"report-{width}-{colours}.webp").write_bytes(base64.b64decode(picture["data"]))
    driver.quit()


if __name__ == "__main__":
    main()
