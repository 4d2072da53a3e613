"""Names of 0.1 that live elsewhere now are still found where 0.1 had them."""

from __future__ import annotations

import importlib
import sys

import pytest

from tl_capacity.moved import MOVED, find_old_modules

KEPT_IN_PACKAGES = {
    "dictionaries": ("Dictionary", "read_sae_lens"),
    "distillation.losses": ("HiddenMatch", "LogitLoss"),
    "distillation.observed": ("ObservedFloor", "observed_floors"),
    "distillation.run": ("DistillationRun", "StudentCurve"),
    "distillation.students": ("new_student",),
    "distillation.train": ("DistillSettings", "distill"),
    "measurement": ("HookMeasurement", "Measurement", "Provenance"),
    "plan": ("plan",),
    "probing": ("collect", "fit_probes", "load_concepts", "recover_features"),
    "probing.activations": ("Activations", "bag_of_embeddings", "collect", "randomly_initialised"),
    "probing.probes": ("Probe", "difference", "fit_probes"),
    "probing.recover": ("Recovery", "StudentRecovery", "recover_features"),
    "probing.sparse": ("sparse_probes",),
    "recipe": ("argument", "option", "run", "run_file"),
    "report": ("ReportSettings", "Results", "write_report"),
    "report.figures": ("curves_figure", "firing_rate_figure", "floors_figure", "importance_figure", "suite_figure"),
    "report.page": ("ReportSettings", "Results", "find_snippets", "report_page", "write_report"),
    "storage": ("write_json",),
    "toy.predictors": ("Case", "Predictor", "predictors", "smooth_band_floor"),
    "toy.result": ("SweepResult", "run"),
    "toy.sweep": ("SweepSettings",),
    "toy.judging": ("PackingLaw", "accuracy", "at_every_sparsity", "cells", "fit_packing_law", "packing_law"),
}
"""What the documentation of 0.1 imported from packages that are still there."""


@pytest.mark.parametrize("module", MOVED)
def test_old_modules_give_the_names_of_their_homes(module: str) -> None:
    old = importlib.import_module(f"tl_capacity.{module}")
    for name, home in MOVED[module].items():
        assert getattr(old, name) is vars(importlib.import_module(f"tl_capacity.{home}"))[name]


@pytest.mark.parametrize("module", KEPT_IN_PACKAGES)
def test_packages_still_give_the_names_that_were_documented(module: str) -> None:
    found = importlib.import_module(f"tl_capacity.{module}")
    for name in KEPT_IN_PACKAGES[module]:
        assert getattr(found, name).__name__ == name


def test_other_names_are_unknown() -> None:
    with pytest.raises(ImportError, match=r"cannot import name .Nothing. from .tl_capacity\.floors."):
        exec("from tl_capacity.floors import Nothing")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'tl_capacity\.nothing'"):
        importlib.import_module("tl_capacity.nothing")


def test_the_finder_is_there_once() -> None:
    before = list(sys.meta_path)
    find_old_modules()
    assert sys.meta_path == before
