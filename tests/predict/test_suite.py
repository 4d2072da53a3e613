"""Several SAEs at one hook point: what is told apart, the curve of d* over L0, and the sentence about it."""

from __future__ import annotations

import io
from collections.abc import Callable
from math import e, log
from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_MODEL
from measurements import measurement_of_counts
from rich.console import Console

import tl_capacity as tlc
from tl_capacity import theory
from tl_capacity.dictionaries.bases import NeuronBasis
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.plugins import plugins
from tl_capacity.predict.floors import hook_floors
from tl_capacity.predict.suite import suites

MakeSAE = Callable[..., Any]
HOOK, OTHER = "blocks.1.hook_resid_post", "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def measured(models_by_kind: dict[str, Any], make_sae: MakeSAE) -> Measurement:
    """Three TopK SAEs of rising k, given in another order, and one at another layer."""
    tokens = torch.from_numpy(np.random.default_rng(3).integers(1, 100, size=(64, 20)))
    saes = {
        HOOK: [make_sae("topk", HOOK, d_sae=256, k=k) for k in (8, 2, 16)],
        OTHER: make_sae("topk", OTHER, d_sae=256, k=4),
    }
    with tlc.add_capacity_hooks(models_by_kind["gpt_neox"], saes, fvu_every=1) as capacity:
        for tap, name in zip(capacity.taps, ("k8", "k2", "k16", "other"), strict=True):
            tap.name = name
        return capacity.run(tokens.split(16)).measurement()


def text(shown: Any) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(shown)
    return console.export_text()


def test_only_hooks_with_several_saes_are_suites(measured: Measurement) -> None:
    (suite,) = suites(measured)
    assert suite.hook == HOOK
    assert [one.sae for one in suite.saes] == ["k2", "k8", "k16"]
    assert suites([one for one in measured if one.hook == OTHER]) == []


def test_the_curve_is_the_identity(measured: Measurement) -> None:
    (suite,) = suites(measured)
    for one, (l0, width) in zip(suite.saes, suite.curve, strict=True):
        features = one.summary.n_alive.value
        assert width == pytest.approx(l0 * log(features / l0), rel=1e-9)
        assert width == pytest.approx(theory.critical_width(features, theory.sparsity(l0, features)), rel=1e-9)


def test_the_exponent_is_the_slope_on_logarithms(measured: Measurement) -> None:
    (suite,) = suites(measured)
    l0, width = np.log(suite.curve).T
    slope = ((l0 - l0.mean()) * (width - width.mean())).sum() / ((l0 - l0.mean()) ** 2).sum()
    assert suite.exponent == pytest.approx(slope, rel=1e-9)
    # With F fixed, d ln d*/d ln L0 = 1 − 1/ln(F/L0), which falls with L0.
    features = [one.summary.n_alive.value for one in suite.saes]
    local = [1 - 1 / log(f / x) for f, (x, _) in zip(features, suite.curve, strict=True)]
    assert suite.exponent == pytest.approx(np.mean(local), abs=0.15)


def test_the_statement_has_the_figures() -> None:
    """100 features that fire equally often, 1, 2 and 4 at a time: d* is L0 · ln(100/L0), so 4.605, 7.824 and 12.876."""
    counts = [np.full(100, 128 * l0) for l0 in (2, 1, 4)]
    (suite,) = suites(measurement_of_counts(*counts, hook=HOOK, tokens=12_800))
    assert suite.statement() == (
        "blocks.1.hook_resid_post: d* lies between 4.6 and 12.9 (2.80-fold) over 3 dictionaries with L0 from 1.0 to"
        " 4.0, about as L0^0.74: twice the L0 gives 1.67 times the d*"
    )


def test_equal_l0(models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    saes = [make_sae("topk", HOOK, d_sae=width, k=3, seed=width) for width in (128, 256)]
    with tlc.add_capacity_hooks(models_by_kind["gpt_neox"], {HOOK: saes}) as capacity:
        (suite,) = suites(capacity.run(tokens.split(8)).measurement())
    assert suite.exponent is None
    assert suite.statement().endswith(
        "over 2 dictionaries of nearly the same L0: this much comes from other differences between them"
    )


def test_a_dense_dictionary_is_no_point_of_the_curve(
    models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor
) -> None:
    """Every neuron is active on every token, and half of a basis is more than F/e of it."""
    saes = [
        NeuronBasis(D_MODEL, HOOK),
        NeuronBasis(D_MODEL, HOOK, k=D_MODEL // 2),
        make_sae("topk", HOOK, d_sae=256, k=3),
    ]
    with tlc.add_capacity_hooks(models_by_kind["gpt_neox"], {HOOK: saes}) as capacity:
        (suite,) = suites(capacity.run(tokens.split(8)).measurement())
    assert [one.summary.l0.value for one in suite.saes] == pytest.approx([3, D_MODEL // 2, D_MODEL])
    assert [l0 for l0, _ in suite.curve] == pytest.approx([3])
    assert all(l0 < one.summary.n_alive.value / e for one, (l0, _) in zip(suite.saes, suite.curve, strict=False))
    assert (
        suite.statement()
        == "blocks.1.hook_resid_post: 1 of 3 dictionaries is sparse (L0 < F/e), so they do not show how d*"
        " depends on the dictionary"
    )
    assert "undefined" in suite.cells()[1][2]


def test_budget_tells_saes_of_one_hook_apart(measured: Measurement) -> None:
    budget = measured.budget([4, 16], max_fvu=None)
    shown = text(budget)
    for name in ("k8", "k2", "k16"):
        assert f"{HOOK}, {name}" in shown
    assert f"{OTHER} (d={D_MODEL})" in shown
    assert f"d* over the dictionaries at {HOOK}" in shown
    assert "over 3 dictionaries with L0 from 2.0 to 16.0, about as L0^" in " ".join(shown.split())
    assert [(f.hook, f.width) for f in budget.floors][:4] == [
        (f"{HOOK}, k8", 4),
        (f"{HOOK}, k8", 16),
        (f"{HOOK}, k2", 4),
        (f"{HOOK}, k2", 16),
    ]
    law = plugins().capacity_laws["compressed_sensing"]
    assert [f.predicted_floor for f in budget.floors[2:4]] == [
        f.predicted_floor for f in hook_floors(measured.hooks[1], [4, 16], "second_moment", law)
    ]
    assert f"{HOOK}, k16" in budget._repr_html_()


def test_one_sae_for_each_hook_is_shown_as_before(measured: Measurement) -> None:
    single = Measurement(tuple(one for one in measured if one.sae in ("k8", "other")))
    shown = text(single.budget([4], max_fvu=None))
    assert "d* over the dictionaries" not in shown
    assert ", k8" not in shown
