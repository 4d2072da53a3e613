"""Forecasts: saved and read again whole, and refused where they are damaged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tl_capacity.errors import CapacityError, MeasurementError
from tl_capacity.predict.forecasts import Forecast, Forecasts, spliced_and_forecasts
from tl_capacity.predict.spliced import Spliced
from tl_capacity.predict.spliced_curve import SplicedCurve
from tl_capacity.results.estimate import Estimate
from tl_capacity.storage.files import SEAL

HOOK = "blocks.1.hook_resid_post"
RECORDS = (
    Forecast("pca_splice", 16, Estimate(1.5, 1.25, 1.75), HOOK),
    Forecast("pca_splice", 32, Estimate(0.5, 0.25, 0.75), HOOK),
    Forecast("rank_bound", 32, Estimate(0.0625)),
    Forecast("<i>", 16, Estimate(2.0), HOOK, "<sae>", "<law>", "<order>", "latent²"),
)
ABOUT = {"model": "embedded", "revision": None, "tokens": 400, "seconds": 1.5, "versions": {"numpy": np.__version__}}


def forecasts(records: tuple[Forecast, ...] = RECORDS) -> Forecasts:
    return Forecasts(records, ABOUT, ("a note <b>",))


def test_round_trip(tmp_path: Path) -> None:
    folder = forecasts().save(tmp_path / "deep" / "run")
    assert Forecasts.load(folder) == Forecasts.load(folder / "forecasts.json") == forecasts()
    assert Forecasts.from_json(json.loads(json.dumps(forecasts().to_json()))) == forecasts()
    assert json.loads((folder / "forecasts.json").read_text())["forecasts"][0] == {
        "predictor": "pca_splice",
        "hook": HOOK,
        "sae": "",
        "law": "",
        "order": "",
        "width": 16,
        "value": 1.5,
        "low": 1.25,
        "high": 1.75,
        "unit": "nats per token",
    }


def test_read_by_predictor() -> None:
    assert forecasts().floors("pca_splice", HOOK) == {16: Estimate(1.5, 1.25, 1.75), 32: Estimate(0.5, 0.25, 0.75)}
    assert forecasts().floors("rank_bound") == {32: Estimate(0.0625)}
    assert forecasts().floors("rank_bound", HOOK) == {}
    assert [list(widths) for widths in forecasts().series.values()] == [[16, 32], [32], [16]]


def test_shown() -> None:
    frame = forecasts().to_frame()
    assert list(frame["width"]) == [16, 32, 32, 16]
    assert list(frame["value"]) == [1.5, 0.5, 0.0625, 2.0]
    assert list(Forecasts(()).to_frame().columns) == list(frame.columns)
    header, rows = forecasts().cells()
    assert header[-2:] == ["16", "32"]
    assert rows[0][-2:] == ["1.500 [1.250, 1.750]", "0.5000 [0.2500, 0.7500]"]
    assert rows[2][header.index("unit")] == "latent²"
    assert forecasts(RECORDS[2:3]).cells()[0] == ["predictor", "unit", "32"]
    html = forecasts()._repr_html_()
    assert not re.search("<(i|sae|law|order|b)>", html)
    assert "&lt;sae&gt;" in html
    console = Console(width=200, record=True)
    console.print(forecasts())
    assert "note: a note <b>" in console.export_text()


def test_drawn() -> None:
    assert [list(trace.y) for trace in forecasts().plot().data] == [[1.5, 0.5], [0.0625]]
    assert [list(trace.y) for trace in forecasts(RECORDS[3:]).plot().data] == [[2.0]]
    with pytest.raises(CapacityError, match="nothing to draw"):
        Forecasts(()).plot()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"predictor": ""}, "lacks the predictor's name"),
        ({"unit": ""}, "lacks the predictor's name or the unit"),
        ({"width": 0}, "is not for a student width"),
        ({"width": 1.5}, "is not for a student width"),
        ({"floor": Estimate(float("nan"))}, "is nan: a floor is a finite number of at least 0"),
        ({"floor": Estimate(-1.0)}, "is -1: a floor"),
        ({"floor": Estimate(1.0, 2.0, 3.0)}, r"outside its own interval \[2, 3\]"),
        ({"floor": Estimate(1.0, 0.5, float("nan"))}, "outside its own interval"),
        ({"floor": Estimate(1.0, 0.5)}, "one end of an interval without the other"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_no_forecast(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CapacityError, match=words):
        Forecast(**{"predictor": "mine", "width": 16, "floor": Estimate(1.0), **changes})


def test_one_width_twice() -> None:
    with pytest.raises(CapacityError, match="'rank_bound' forecasts the floor of width 32 twice: keep one"):
        Forecasts((RECORDS[2], RECORDS[2]))


def without(*path: Any) -> Callable[[Any], None]:
    def take_out(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return take_out


def changed(value: Any, *path: Any) -> Callable[[Any], None]:
    def put(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return put


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without("forecasts"), "lacks 'forecasts': forecast again"),
        (without("schema"), "lacks 'schema'"),
        (without("forecasts", 0, "high"), "lacks 'high'"),
        (changed(2, "schema"), "schema 2, and this version reads up to 1: upgrade"),
        (changed("0", "schema"), "has schema '0', which is not a whole number: it was altered"),
        (changed(None, "forecasts"), "holds no forecasts"),
        (changed("1.5", "forecasts", 0, "value"), "holds no forecasts .value = '1.5'."),
        (changed(None, "forecasts", 0, "low"), "one end of an interval"),
        (changed(True, "forecasts", 0, "width"), "is not for a student width"),
        (changed(7, "forecasts", 0, "hook"), "hook = 7"),
        (changed(32, "forecasts", 0, "width"), "twice"),
    ],
)
def test_damaged(tmp_path: Path, damage: Callable[[Any], None], words: str) -> None:
    """Also where whoever changed the file took the hash out."""
    file = forecasts().save(tmp_path) / "forecasts.json"
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    with pytest.raises(MeasurementError, match=r"forecasts\.json"):
        Forecasts.load(tmp_path)
    del content[SEAL]
    file.write_text(json.dumps(content))
    with pytest.raises(MeasurementError, match=rf"forecasts\.json.*{words}"):
        Forecasts.load(tmp_path)


def test_not_there_or_cut_off(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"forecasts\.json"):
        Forecasts.load(tmp_path)
    file = forecasts().save(tmp_path) / "forecasts.json"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(MeasurementError, match="forecast again"):
        Forecasts.load(tmp_path)


def test_another_teacher_is_refused() -> None:
    forecasts().check_teacher("embedded")
    Forecasts(RECORDS).check_teacher("any")
    with pytest.raises(MeasurementError, match="are of the teacher 'embedded' and not of 'gpt2'"):
        forecasts().check_teacher("gpt2")


def test_a_folder_of_either_kind(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"holds neither splice\.json nor forecasts\.json"):
        spliced_and_forecasts(tmp_path)
    forecasts().save(tmp_path)
    assert spliced_and_forecasts(tmp_path) == (None, forecasts())
    assert spliced_and_forecasts(tmp_path / "forecasts.json") == (None, forecasts())
    kl, tokens = np.array([[2.0, 1.0]]), np.array([1])
    curve = SplicedCurve(HOOK, "sae", "0", "topk", 8, "second_moment", "mean", False, (0, 9), kl, tokens)
    Spliced((curve,)).save(tmp_path)
    spliced, beside = spliced_and_forecasts(tmp_path)
    assert spliced is not None
    assert spliced.curves[0].kept == (0, 9)
    assert beside == forecasts()
    assert spliced_and_forecasts(tmp_path / "splice.json")[1] is None
    with pytest.raises(MeasurementError, match="holds neither"):
        spliced_and_forecasts(tmp_path / "absent.json")
