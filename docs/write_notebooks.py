"""Runs the notebooks and stores them with their outputs: `python docs/write_notebooks.py [NAME…]`.

Models and SAEs of the hub are the tests' tiny stand-ins, since no hub is asked. A figure is stored as a picture, which
a forge shows without running anything. Needs chromium, chromedriver and selenium.
"""

from __future__ import annotations

import base64
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
from nbclient import NotebookClient
from pictures import picture, started

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import tiny_hub

NOTEBOOKS = Path(__file__).parent / "notebooks"
FIGURE = "application/vnd.plotly.v1+json"
SIZE = (900, 420)
TIMEOUT = 900
"""Most seconds for a cell."""


def run(notebook: Any, folder: Path) -> None:
    """Run all cells of a notebook in a folder. The outputs are in its cells afterwards."""
    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()


def stored(outputs: list[Any], browser: Any) -> list[Any]:
    """Outputs as they are stored: without standard error, and with each figure as a picture."""
    kept = [output for output in outputs if output.get("name") != "stderr"]
    for output in kept:
        if figure := output.get("data", {}).pop(FIGURE, None):
            image = picture(browser, go.Figure(figure["data"], figure["layout"]), SIZE, "png")
            output["data"] = {"image/png": base64.b64encode(image).decode()}
    return kept


def main() -> None:
    """Run and write the named notebooks, or all of them."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PLOTLY_RENDERER": "plotly_mimetype", "TOKENIZERS_PARALLELISM": "false"}
    browser = started()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tiny_hub.fill(folder)
            os.environ |= tiny_hub.environment(folder)
            work = folder / "work"
            work.mkdir()
            for path in sorted(NOTEBOOKS.glob("*.ipynb")):
                if path.stem in sys.argv[1:] or not sys.argv[1:]:
                    notebook = nbformat.read(path, as_version=4)
                    run(notebook, work)
                    for cell in notebook.cells:
                        cell.metadata.pop("execution", None)
                        if cell.cell_type == "code":
                            cell.outputs = stored(cell.outputs, browser)
                    nbformat.write(notebook, path)
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
