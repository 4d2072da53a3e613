"""Results show themselves in IPython: tables and figure in a notebook, tables in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from measurements import measurement_of_counts
from nbclient import NotebookClient

COUNTS = np.arange(64, 0, -1) * 64
CELLS = """from tl_capacity import Measurement; measurement = Measurement.load({folder!r}); measurement
measurement.budget()
measurement.budget([4, 8])"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return measurement_of_counts(COUNTS, COUNTS).save(tmp_path / "measurement")


@pytest.mark.slow
def test_a_notebook_shows_table_and_figure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    cells = [nbformat.v4.new_code_cell(line) for line in CELLS.format(folder=str(folder)).splitlines()]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, kernel_name="python3", timeout=600).execute()
    shown = [[list(output.data) for output in cell.outputs if "data" in output] for cell in notebook.cells]
    table, figure = "text/html", "application/vnd.plotly.v1+json"
    assert [[(table in kinds, figure in kinds) for kinds in cell] for cell in shown] == [
        [(True, False), (False, True)],
        [(True, False)],
        [(True, False), (False, True)],
    ]
    drawn = notebook.cells[2].outputs[1]["data"][figure]
    expected = [f.predicted_floor.value for f in measurement_of_counts(COUNTS).budget([4, 8]).floors]
    assert len(drawn["data"]) == 2
    assert len(drawn["data"][0]["x"]) == len(expected)


def test_ipython_in_a_terminal_prints_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    try:
        result = shell.run_cell(CELLS.format(folder=str(folder)))
        assert result.success, result.error_in_exec
    finally:
        InteractiveShell.clear_instance()
    out = capsys.readouterr().out
    assert "Feature capacity" in out
    assert "Predicted floors" in out
    assert "IPython" not in out


def test_a_result_without_a_table_of_its_own_shows_its_frame() -> None:
    from tl_capacity.probing.recoverability import Recoverability

    row: dict[str, Any] = {"width": 8, "kept": 5, "student": "<b>", "hook": "h", "n_features": 9}
    html = Recoverability.from_json([row])._repr_html_()
    assert html.startswith("<table")
    assert "&lt;b&gt;" in html
