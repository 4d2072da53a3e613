"""The report on splicing: the curve with its floors, what students are worth, and one line where neither is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Cli
from measurements import curve_at, measurement_of_counts, students_with

from tl_capacity.distillation.effective import effective_capacity
from tl_capacity.errors import MeasurementError
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.predict.spliced import Spliced
from tl_capacity.report import ReportSettings, Results, report_page
from tl_capacity.report.parts import Section
from tl_capacity.report.sections import all_sections
from tl_capacity.report.story import story_of
from tl_capacity.storage.digests import digest

pytestmark = pytest.mark.usefixtures("few_replicates")

COUNTS = (64 * np.ceil(120 / np.arange(1, 201))).astype(np.int64)
MEASURED = measurement_of_counts(COUNTS)
CURVE = curve_at(MEASURED.hooks[0], lambda kept: 0.05 + 3 * (1 - np.log1p(kept) / np.log1p(200)))
SPLICED = Spliced((CURVE,))
WIDTHS = (2, 4, 8)
STUDENTS = students_with({2: [1.9], 4: [1.3, 1.35], 8: [0.8]})


def figures(page: str) -> dict[str, Any]:
    drawn: dict[str, Any] = json.loads(page.split('id="figure-data">')[1].split("</script>")[0])
    return drawn


def section(page: str, name: str) -> str:
    return page.split(f'<section id="{name}">')[1].split("</section>")[0]


def filled(results: Results, name: str) -> Section:
    """A section before it is put into a page."""
    sections = all_sections(story_of(results, ReportSettings(), {}, ""))
    return next(each for each in sections if each.id == name)


def numbers(trace: dict[str, Any], axis: str) -> list[float]:
    """What a trace has on an axis, which plotly may have packed."""
    values = trace[axis]
    if isinstance(values, dict):
        import base64

        return np.frombuffer(base64.b64decode(values["bdata"]), dtype=np.dtype(values["dtype"])).tolist()
    return list(values)


@pytest.fixture(scope="module")
def page() -> str:
    return report_page(Results(MEASURED, run=STUDENTS, spliced=SPLICED))


def test_the_curve_and_the_floors_are_those_of_the_splice(page: str) -> None:
    curve, marked = figures(page)["spliced"]["data"][:2]
    assert numbers(curve, "x") == list(CURVE.kept)
    assert numbers(curve, "y") == pytest.approx([CURVE.at(kept).value for kept in CURVE.kept])
    floors = SPLICED.floors(MEASURED, WIDTHS)
    assert numbers(marked, "x") == [floor.features_kept for floor in floors]
    assert numbers(marked, "y") == pytest.approx([floor.floor.value for floor in floors])
    shown = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", section(page, "spliced")))
    for floor in floors:
        assert f" {floor.features_kept:,} {floor.floor.value:.4g}"[:9] in shown
    said = " ".join(re.sub(r"<[^>]+>", "", page).split())
    assert f"predicted was {floors[-1].floor.brief('.3g')}, with nothing fitted" in said
    assert "with every latent kept the KL is" in page


def test_what_students_are_worth_is_drawn_beside_the_law(page: str) -> None:
    found = effective_capacity(MEASURED, SPLICED, STUDENTS)
    worth = figures(page)["effective"]["data"][0]
    assert numbers(worth, "x") == list(WIDTHS)
    assert numbers(worth, "y") == pytest.approx([row.per_dimension.value for row in found.rows if row.per_dimension])
    assert found.verdict()[0][:40] in page
    assert "a student that is not fully trained is worth more" in page.lower()


@pytest.mark.slow
def test_without_a_splice_or_students_one_line_says_how() -> None:
    nothing = report_page(Results(MEASURED))
    for name in ("spliced", "effective"):
        assert "<figure>" not in section(nothing, name)
        assert section(nothing, name).count('<details class="missing"><summary>') == 1
        assert "tl-capacity run splice" in section(nothing, name)
    unobserved = Results(MEASURED, spliced=SPLICED)
    assert filled(unobserved, "spliced").figures
    assert filled(unobserved, "effective").command.startswith("tl-capacity run distill")
    beyond = Results(MEASURED, run=students_with({8: [0.01]}), spliced=SPLICED)
    assert filled(beyond, "effective").missing.startswith("Students of every width are worth more than all features")


def test_of_a_splice_of_another_measurement_there_is_no_page() -> None:
    with pytest.raises(MeasurementError, match="the splice is of other dictionaries"):
        report_page(Results(MEASURED, spliced=Spliced((replace(CURVE, sae_digest="1" * 64),))))


def test_on_the_command_line(tmp_path: Path, cli: Cli) -> None:
    MEASURED.save(tmp_path / "m")
    measured = digest((tmp_path / "m" / "measurement.json").read_bytes())
    Spliced((CURVE,), {"measured": measured}).save(tmp_path / "beside")
    SPLICED.save(tmp_path / "far" / "away")
    page = tmp_path / "page.html"
    for paths, named in (
        ([tmp_path / "m"], None),
        ([tmp_path / "m"], tmp_path / "far" / "away"),
        ([tmp_path / "m", tmp_path / "far"], None),
    ):
        assert Results.load(paths, named).spliced is not None
    code, _, err = cli("report", tmp_path / "m", "--splice", tmp_path / "far" / "away", "--no-snippets", "-o", page)
    assert code == 0, err
    assert 'data-figure="spliced"' in page.read_text()
    code, _, err = cli("report", tmp_path / "m", "--splice", tmp_path / "m", "--no-snippets", "-o", page)
    assert code == 2
    assert err.count("\n") == 1
    Spliced((CURVE,), {"measured": measured}).save(tmp_path / "another")
    several = Results.load([tmp_path / "m"])
    assert several.spliced is None
    assert "choose one with --splice" in filled(several, "spliced").missing


def test_floors_in_nats_beside_the_others(tmp_path: Path, cli: Cli) -> None:
    MEASURED.save(tmp_path / "m")
    measured = digest((tmp_path / "m" / "measurement.json").read_bytes())
    Spliced((CURVE,), {"measured": measured}).save(tmp_path / "s")
    command = ["floor", tmp_path / "m", "--widths", "2,4,400"]
    code, out, err = cli(*command, "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    floors = SPLICED.floors(Measurement.load(tmp_path / "m"), [2, 4, 400])
    in_nats = [row for row in rows if row.get("predictor") == "splice"]
    assert [row["predicted_floor"] for row in in_nats] == [floor.floor.value for floor in floors]
    assert {row["unit"] for row in in_nats} == {"nats per token"}
    notes = rows[0]["notes"]
    assert all(row["notes"] == notes for row in rows)
    assert any("every feature fits into width 400" in note for note in notes)
    assert any(str(tmp_path / "s") in note for note in notes)
    assert any("where it was checked, students reached" in note for note in notes)
    code, out, _ = cli(*command)
    assert code == 0
    assert "Floors of the spliced teacher, with nothing fitted" in out
    assert "nats per token per token" not in out
    few = Spliced((replace(curve_at(MEASURED.hooks[0], lambda kept: 1 / (1 + kept), groups=4)),)).save(tmp_path / "few")
    code, out, _ = cli(*command, "--splice", few)
    assert code == 0
    assert "there are too few documents for an interval: splice on more text" in " ".join(out.split())
    (tmp_path / "curve.json").write_text(json.dumps({"sorted_importance": [1.0, 0.5], "alpha": 0.9}))
    for path, more, says in (
        (tmp_path / "curve.json", few, "a published curve has no splice"),
        (tmp_path / "m", tmp_path / "m", "splice.json cannot be read"),
    ):
        code, out, err = cli("floor", path, "--widths", "2", "--splice", more)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert says in err
