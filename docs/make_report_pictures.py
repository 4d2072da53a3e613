"""Takes the pictures of a report for the docs, in headless Chromium: `python docs/make_report_pictures.py report.html`.

At 1280 and 390 pixels, light and dark: the top of the page, and on the phone the list of features. Needs chromium,
chromedriver and selenium.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from chromium import opened, started

FIGURES = Path(__file__).parent / "figures"
PICTURES = (
    (1280, "light", "body", 1500),
    (1280, "dark", "#floors", 1400),
    (390, "light", "body", 1500),
    (390, "dark", "#features", 1300),
)
"""Width in pixels, colour scheme, where the picture begins, and how high it is."""


def main() -> None:
    page, browser = Path(sys.argv[1]).resolve(), started()
    for width, colours, start, height in PICTURES:
        opened(browser, page, width, colours)
        top = browser.execute_script(f"return document.querySelector('{start}').getBoundingClientRect().top + scrollY")
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        picture = browser.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "webp", "quality": 70, "clip": clip, "captureBeyondViewport": True}
        )
        (FIGURES / f"report-{width}-{colours}.webp").write_bytes(base64.b64decode(picture["data"]))
    browser.quit()


if __name__ == "__main__":
    main()
