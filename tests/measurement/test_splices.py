"""Splices of a measurement: found where they lie beside it, and refused where they are of another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measurements import curve_at, measurement_of_counts

from tl_capacity.errors import MeasurementError
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.measurement.splices import splice_of, splices_beside
from tl_capacity.predict.spliced import Spliced
from tl_capacity.storage.digests import digest
from tl_capacity.storage.files import SEAL

MEASURED = measurement_of_counts((64 * np.ceil(120 / np.arange(1, 201))).astype(np.int64))
CURVE = curve_at(MEASURED.hooks[0], lambda kept: 1 / (1 + kept))


def spliced_in(folder: Path, measurement: Path, **about: Any) -> Path:
    """A splice of a measurement's file."""
    measured = digest((measurement / "measurement.json").read_bytes())
    return Spliced((CURVE,), {"model": "unnamed model", "measured": measured, **about}).save(folder)


@pytest.mark.parametrize("place", ["measured", "measured/splice", "anything"])
def test_a_splice_beside_the_measurement_is_found(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MEASURED.save(tmp_path / "measured")
    measurement = Measurement.load(tmp_path / "measured")
    assert splice_of(measurement, tmp_path / "measured", None) == (None, [])
    spliced_in(tmp_path / place, tmp_path / "measured")
    # Of another file, and no splice at all.
    Spliced((CURVE,), {"measured": "0" * 64}).save(tmp_path / "another")
    Spliced((CURVE,)).save(tmp_path / "of a session")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "splice.json").write_text("{")
    spliced, [said] = splice_of(measurement, tmp_path / "measured", None)
    assert spliced is not None
    assert len(spliced.curves) == 1
    assert place in said
    monkeypatch.chdir(tmp_path / "measured")
    assert len(splices_beside(Path())) == 1


def test_of_several_none_is_chosen(tmp_path: Path) -> None:
    MEASURED.save(tmp_path / "measured")
    for name in ("a", "b"):
        spliced_in(tmp_path / name, tmp_path / "measured")
    spliced, [said] = splice_of(Measurement.load(tmp_path / "measured"), tmp_path / "measured", None)
    assert spliced is None
    assert "choose one with --splice" in said
    assert splice_of(MEASURED, tmp_path / "measured", tmp_path / "b")[0] is not None


def test_a_splice_of_another_teacher_or_dictionary_is_refused(tmp_path: Path) -> None:
    MEASURED.save(tmp_path / "measured")
    here = Measurement.load(tmp_path / "measured")
    named = replace(here, provenance=replace(here.provenance, revision="a" * 40))
    for about, curve, says in (
        ({"model": "another"}, CURVE, "the splice is of the model 'another' and the measurement of 'unnamed model'"),
        ({"revision": "b" * 40}, CURVE, "the splice is of the revision 'bbb"),
        ({}, replace(CURVE, sae_digest="1" * 64), "the splice is of other dictionaries"),
        ({}, replace(CURVE, hook="blocks.9.hook_resid_post"), "the splice is of other dictionaries"),
    ):
        Spliced((curve,), about).save(tmp_path / "s")
        with pytest.raises(MeasurementError, match=says):
            splice_of(named, tmp_path / "measured", tmp_path / "s")
    content = json.loads((tmp_path / "s" / "splice.json").read_text())
    del content[SEAL]  # of its content as it was
    content["schema"] = 2
    (tmp_path / "s" / "splice.json").write_text(json.dumps(content))
    with pytest.raises(MeasurementError, match=r"json has schema 2, and this version reads up to 1: upgrade"):
        splice_of(named, tmp_path / "measured", tmp_path / "s")
    del content["schema"]
    (tmp_path / "s" / "splice.json").write_text(json.dumps(content))
    with pytest.raises(MeasurementError, match=r"json lacks or garbles 'schema': splice again"):
        splice_of(named, tmp_path / "measured", tmp_path / "s")
