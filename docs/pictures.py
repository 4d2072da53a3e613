"""Pictures of figures for the pages, taken in headless Chromium; needs chromium, chromedriver and selenium."""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

import plotly.graph_objects as go

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from chromium import started


def take(figure: go.Figure, file: Path, size: tuple[int, int]) -> None:
    """A picture of a figure, as WebP."""
    browser = started()
    try:
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "figure.html"
            figure.write_html(page, config={"displayModeBar": False}, default_width=size[0], default_height=size[1])
            browser.get(page.as_uri())
            clip = {"x": 8, "y": 8, "width": size[0], "height": size[1], "scale": 1.5}
            options = {"format": "webp", "quality": 80, "clip": clip, "captureBeyondViewport": True}
            picture = browser.execute_cdp_cmd("Page.captureScreenshot", options)
    finally:
        browser.quit()
    file.write_bytes(base64.b64decode(picture["data"]))
