"""The demo tells its story in forty lines, says what it is, and ranks nothing; its recorded figures are the page's."""

from __future__ import annotations

import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from commands import Cli, parse
from tl_capacity.recipes.demo import STAGES, WIDTHS
from tl_capacity.recipes.demo_summary import CONVERGED, LEAGUE, MANY, Found
from tl_capacity.recipes.pythia_floor import PRESETS

from tl_capacity.distillation.league import MIN_WIDTHS
from tl_capacity.predict.record import all_checks, record_of

ROOT = Path(__file__).parent.parent.parent
TABLE_ROW = re.compile(r"^│ (.+) │$", re.MULTILINE)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a demo said, and its folder."""
    from tl_capacity.cli import main

    out = tmp_path_factory.mktemp("demo") / "demo"
    with redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit, match="0"):
        main(["run", "demo", "--tokens", "2000", "--out", str(out)])
    return said.getvalue(), out


@pytest.mark.slow
def test_it_tells_its_story_in_forty_lines(told: tuple[str, Path]) -> None:
    said, out = told
    lines, found = said.splitlines(), Found.load(out)
    assert len(lines) <= 40
    rows = [[cell.strip() for cell in row.split("│")] for row in TABLE_ROW.findall(said)]
    assert [row[0] for row in rows] == ["layer 1", "layer 3", "layer 5", *map(str, WIDTHS)]
    for row, hook in zip(rows, found.measurement, strict=False):
        assert row[1].startswith(f"{hook.summary.n_alive.value:,.0f} [")
    for row, floor, student in zip(rows[3:], found.floors, found.observed, strict=True):
        assert row[1] == f"{floor.features_kept / floor.alive:.0%}"
        assert row[3].startswith(f"{floor.floor.value:.2f} [")
        assert row[4] == f"{student.last_tenth:.2f}"
    sentences = re.findall(r"[^.]+(?:\.\d+[^.]*)*\.", said.partition("By the theory")[2].partition("\n\n")[0])
    assert len(sentences) == 3
    assert "smoke test" in sentences[2]
    record = record_of(*found.floors[0].key)
    assert record is not None
    assert f"{record.low:.1f} to {record.high:.1f} times" in " ".join(said.split())
    assert not re.search("explains best|ahead|place", said)
    repeated = {line for line in lines if line.strip(" ┏┓┡┩└┘━─┳╇┴╃") and lines.count(line) > 1}
    assert not repeated
    opened = next(line for line in lines if line.startswith("The report")).split()[-1]
    page = Path(opened).read_text(encoding="utf-8")
    for section in ("training", "recoverability", "spliced"):
        shown = page.partition(f'<section id="{section}">')[2].partition("</section>")[0]
        assert '<div class="plot"' in shown
    assert '"snippets": true' in page
    for line in lines[-2:]:
        parse(shlex.split(line.partition("tl-capacity ")[2]))


@pytest.mark.slow
def test_a_rerun_continues_and_verbose_prints_the_rest(cli: Cli, told: tuple[str, Path]) -> None:
    _, out = told
    before = (out / "students" / "distillation.json").read_bytes()
    code, said, _ = cli("run", "demo", "--tokens", 2_000, "--out", out, "--verbose")
    assert code == 0
    assert (out / "students" / "distillation.json").read_bytes() == before
    assert "Feature capacity" in said
    assert "Observed floors" in said
    code, _, said = cli("run", "demo", "--tokens", 3_000, "--out", out)
    assert code == 2
    assert "choose another --out" in said


def test_the_recorded_figures_are_those_of_the_page() -> None:
    page = (ROOT / CONVERGED).read_text(encoding="utf-8")
    league = page.partition("<!-- league, by")[2].partition("**By L∞")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in league.splitlines() if line.startswith("| ")]
    fitted = {row[0]: row for row in rows}
    for (name, error), cell in zip(LEAGUE, (fitted["0"][2], fitted["2"][2], fitted["2"][3]), strict=True):
        assert cell.startswith(f"{error}: ")
        candidate = cell.partition(": ")[2].split()[0]
        assert f"({candidate}" in name
    assert PRESETS["full"]["tokens"] == MANY


def test_what_predictions_are_compared_with_is_what_the_pages_say() -> None:
    reached: dict[int, list[float]] = {}
    first = (ROOT / CONVERGED).read_text(encoding="utf-8")
    for width, floor in re.findall(r"^\| (\d+) \| 0 \| ([\d.]+) \|", first, re.MULTILINE):
        reached.setdefault(int(width), []).append(float(floor))
    later = (ROOT / "docs" / "results" / "splice.md").read_text(encoding="utf-8")
    curves = later.partition("<!-- curves, by")[2].partition("<!-- end of curves")[0]
    for line in curves.splitlines()[3:]:
        width, _, _, _, last_tenth, *_ = (cell.strip() for cell in line.split("|")[1:-1])
        reached.setdefault(int(width), []).append(float(last_tenth))
    recorded = {check.width: check.observed for check in all_checks() if check.teacher == "embedded"}
    assert set(recorded) == set(reached)
    for width, observed in recorded.items():
        assert observed == pytest.approx(sum(reached[width]) / len(reached[width]), abs=0.005)


def test_it_trains_too_few_widths_to_rank_anything() -> None:
    assert len(WIDTHS) < MIN_WIDTHS
    assert len(STAGES) == 5
