"""The notebooks: they run from top to bottom, are kept with the outputs and figures of such a run, and their links lead
somewhere; what they say is also a page of the site.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOKS = [pytest.param(path, id=path.stem) for path in sorted((DOCS / "notebooks").glob("*.ipynb"))]
TIMEOUT = 900
"""Seconds for a cell. The slowest needs about ten; a machine with other work may take many times that."""


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS)
def test_runs(path: Path, tmp_path: Path, hub_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and SAEs of the hub are tiny ones under their ids."""
    from tiny_hub import environment

    for name, value in {"OMP_NUM_THREADS": "1", **environment(hub_folder)}.items():
        monkeypatch.setenv(name, value)
    notebook = read(path)
    NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert any("text/html" in output.data for output in shown(notebook)), "no table was shown"


def shown(notebook: Any) -> list[Any]:
    """What a notebook's cells show, apart from printed text."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output for output in outputs if output.output_type in ("display_data", "execute_result")]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_is_kept_with_what_it_shows(path: Path) -> None:
    """Tables as HTML and figures as pictures, which a forge shows; `docs/write_notebooks.py` writes them."""
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.source.strip(), "there is an empty cell"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run docs/write_notebooks.py"
    kinds = {kind for output in shown(notebook) for kind in output.data}
    assert kinds >= ({"text/html"} if path.stem == "estimator" else {"text/html", "image/png"})
    assert not [cell for cell in notebook.cells if cell.cell_type == "code" and any("ename" in o for o in cell.outputs)]
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("name", ["gpt2", "gemma-scope", "pythia"])
def test_a_notebook_of_the_hub_installs_what_it_needs(name: str) -> None:
    """It has a badge, an install cell, ids of the hub, and says whose outputs these are."""
    cells = read(DOCS / "notebooks" / f"{name}.ipynb").cells
    assert "colab.research.google.com" in cells[0].source
    assert "tiny stand-in with random weights" in cells[0].source
    assert "%pip install --quiet tl-capacity" in cells[1].source


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_links_lead_somewhere(path: Path) -> None:
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)\s#]+)", text) if "://" not in link]
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.fixture
def site(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """`site(pages)` builds a site of some pages, given by name and content, and returns its folder; a warning is an
    error.
    """
    pytest.importorskip("material", reason="needs the extra docs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    def make(pages: dict[str, str]) -> Path:
        for name, content in pages.items():
            file = tmp_path / "docs" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
        config = load_config(
            str(DOCS.parent / "mkdocs.yml"),
            docs_dir=str(tmp_path / "docs"),
            site_dir=str(tmp_path / "site"),
            strict=True,
        )
        config.plugins.pop("mkdocstrings")
        build(config)
        return tmp_path / "site"

    return make


CONTENTS = (
    "# Contents\n\n| page | |\n|---|---|\n| [b.md](b.md) | |\n\n## More\n\n### With a group\n\n- In a notebook:"
    " [a](notebooks/a.ipynb) · [C](c.md)\n"
)
NOTEBOOK = """{"cells": [
 {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# A notebook\\n", "See [b](../b.md#in-fétes)."]},
 {"cell_type": "code", "execution_count": null, "id": "b", "metadata": {}, "outputs": [
  {"output_type": "stream", "name": "stdout", "text": ["<i>printed</i>\\n"]},
  {"output_type": "display_data", "metadata": {}, "data": {"text/html": ["<table>\\n\\n", "<td>12</td></table>"]}},
  {"output_type": "display_data", "metadata": {}, "data": {"image/png": "iVBORw0KGgo="}}
 ], "source": ["print('<b>')"]}
], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}"""


def test_the_site_has_notebooks_and_linked_sources(site: Callable[[dict[str, str]], Path], tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "x.py").write_text("x = '<script>alert(1)</script>'\n")
    page = (
        "# B\n\n## In fétes\n\n[x](../code/x.py), [away](https://example.org/x.py), [the"
        " notebook](notebooks/a.ipynb).\n\n```text\n[x](../code/x.py)\n```\n"
    )
    folder = site({"index.md": CONTENTS, "b.md": page, "c.md": "# See\n", "notebooks/a.ipynb": NOTEBOOK})

    written = (folder / "b.html").read_text(encoding="utf-8")
    assert 'href="source/code/x.py.html"' in written
    assert 'href="notebooks/a.ipynb.html"' in written
    assert "With a group" in written  # the navigation has both levels of the contents page's headings
    assert 'href="https://example.org/x.py"' in written
    assert "[x](../code/x.py)" in written  # what stands in a block is no link
    assert "&lt;script&gt;" in (folder / "source/code/x.py.html").read_text(encoding="utf-8")

    notebook = (folder / "notebooks/a.ipynb.html").read_text(encoding="utf-8")
    assert 'href="../b.html#in-fétes"' in notebook
    assert "<h1" in notebook
    assert "&lt;b&gt;" in notebook
    assert "&lt;i&gt;printed" in notebook
    assert "<td>12</td>" in notebook
    assert 'src="data:image/png;base64,iVBORw0KGgo="' in notebook
    assert (folder / "notebooks/a.ipynb").read_text(encoding="utf-8") == NOTEBOOK  # as a download

    assert [
        name
        for name in ("Contents", "More", "A notebook", "See")
        if name not in (folder / "index.html").read_text(encoding="utf-8")
    ] == []


def test_the_site_asks_nothing_of_a_network(site: Callable[[dict[str, str]], Path]) -> None:
    pages = {"b.md": "# B\n\n## In fétes\n", "c.md": "# See\n", "notebooks/a.ipynb": NOTEBOOK}
    folder = site({"index.md": CONTENTS, **pages})
    for page in folder.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe)[^>]*?\b(?:src|href)=\"?([^\"\s>]+)", page.read_text(encoding="utf-8")
        )
        assert loaded
        assert not [address for address in loaded if re.match(r"(?:https?:)?//", address)]
