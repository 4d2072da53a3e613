"""Pictures of figures for the pages, taken in headless Chromium. Needs chromium, chromedriver and selenium."""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from chromium import started

__all__ = ["picture", "started", "take"]
SCALE = 1.5


def picture(browser: Any, figure: go.Figure, size: tuple[int, int], kind: str = "webp") -> bytes:
    """A picture of a figure, as WebP or PNG."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        figure.write_html(page, config={"displayModeBar": False}, default_width=size[0], default_height=size[1])
        browser.get(page.as_uri())
        clip = {"x": 8, "y": 8, "width": size[0], "height": size[1], "scale": SCALE}
        options = {"format": kind, "clip": clip, "captureBeyondViewport": True}
        quality = {"quality": 80} if kind == "webp" else {}
        taken = browser.execute_cdp_cmd("Page.captureScreenshot", {**options, **quality})
    return base64.b64decode(taken["data"])


def take(figure: go.Figure, file: Path, size: tuple[int, int]) -> None:
    """A picture of a figure, as a WebP file."""
    browser = started()
    try:
        file.write_bytes(picture(browser, figure, size))
    finally:
        browser.quit()
