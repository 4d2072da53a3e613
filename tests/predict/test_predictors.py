"""Floor predictors: what each says, where it is asked, and what none may give."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Cli
from conftest import BOS
from measurements import measurement_of_counts

from tl_capacity import FloorPredictor, Measurement, add_capacity_hooks, forecasts_of, hookimpl
from tl_capacity.dictionaries.bases import PCABasis
from tl_capacity.errors import CapacityError, MeasurementError, PluginError
from tl_capacity.interfaces import CapacityContext, FloorContext
from tl_capacity.plugins import plugins, register_plugin, unregister_plugin
from tl_capacity.predict.forecasts import Forecast, Forecasts
from tl_capacity.predict.predictors import constants_of, contexts_of, importances_of
from tl_capacity.predict.spliced import Spliced
from tl_capacity.predict.spliced_curve import SplicedCurve
from tl_capacity.results.estimate import Estimate
from tl_capacity.text.documents import DOCUMENT_GROUPS

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
WIDTHS = (1, 2, 4, 16)
MODEL_NEEDED = ("pca_splice", "truncated_start", "rank_bound")


@pytest.fixture(scope="module")
def measurement() -> Measurement:
    """Two hook points of width 16, whose 200 features have L0s of 20 and 10."""
    return measurement_of_counts(np.arange(1, 201) * 64, np.arange(1, 201) * 32, tokens=64_000)


@pytest.fixture
def register() -> Iterator[Callable[[FloorPredictor], None]]:
    """Registers predictors for one test."""
    names: list[str] = []

    def add(predictor: Any) -> None:
        class Plugin:
            @hookimpl
            def register_floor_predictors(self, register: Callable[[Any], None]) -> None:
                register(predictor)

        names.append(register_plugin(Plugin(), f"predictors of a test {len(names)}"))

    yield add
    for name in names:
        unregister_plugin(name)


class Mine(FloorPredictor):
    """Gives what it is told to."""

    name, summary = "mine", "for a test"

    def __init__(self, answer: Any, **claims: Any) -> None:
        vars(self).update(claims)
        self.answer, self.asked = answer, list[FloorContext]()

    def floors(self, widths: Sequence[int], at: FloorContext) -> Any:
        self.asked.append(at)
        return self.answer(widths) if callable(self.answer) else self.answer


def spliced(measurement: Measurement, groups: int = DOCUMENT_GROUPS) -> Spliced:
    """A curve at the first hook point, as of a teacher that was run on so many document groups."""
    hook, kept = measurement.hooks[0], (0, 20, 60, 120, 200)
    noise = np.random.default_rng(0).uniform(0.8, 1.2, (groups, 1))
    kl = 50 * noise * np.array([3.0, 1.5, 0.8, 0.3, 0.1])
    tokens = np.full(groups, 50)
    order = hook.estimator().name
    return Spliced(
        (SplicedCurve(hook.hook, hook.sae, hook.sae_digest, "standard", 16, order, "mean", False, kept, kl, tokens),)
    )


@pytest.mark.usefixtures("few_replicates")
def test_features_say_what_the_predicted_floors_say(measurement: Measurement) -> None:
    found = forecasts_of(measurement, WIDTHS)
    refined = {record: record.floor for record in found if record.predictor == "importance"}
    importances = importances_of(measurement.hooks[0])
    asked = [(importance, law.name) for importance in importances for law in plugins().capacity_laws]
    assert set(importances) >= {"second_moment", "decoder_weighted", "firing_rate"}
    assert len(refined) == len(HOOKS) * len(asked) * len(WIDTHS)
    for importance, law in asked:
        for floor in measurement.budget(WIDTHS, importance, law, max_fvu=None).floors:
            (record,) = (
                each
                for each in refined
                if (each.hook, each.order, each.law, each.width) == (floor.hook, importance, law, floor.width)
            )
            assert record.floor.value == pytest.approx(floor.predicted_floor.value, rel=1e-12)
            assert (record.unit, record.sae) == (floor.unit, measurement[floor.hook].sae)
            if importance == importances[0]:
                naive = found.series["naive", floor.hook, record.sae, law, ""][floor.width]
                assert naive.floor.value == pytest.approx(floor.naive_floor.value, rel=1e-12)


def test_rivals_that_only_the_width_decides(measurement: Measurement) -> None:
    found = forecasts_of(measurement, [3, 12], parameters={3: 10, 12: 160})
    closed = {
        "constant": [1, 1],
        "1/d": [1 / 3, 1 / 12],
        "1/√d": [3**-0.5, 12**-0.5],
        "power law in d": [1 / 3, 1 / 12],
    }
    for name, floors in {**closed, "power law in parameters": [0.1, 1 / 160]}.items():
        assert [floor.value for floor in found.floors(name).values()] == pytest.approx(floors)
    assert not forecasts_of(measurement, [3], parameters={4: 1}).floors("power law in parameters")


@pytest.mark.usefixtures("few_replicates")
def test_splice_is_read_off_the_curve(measurement: Measurement) -> None:
    curves = spliced(measurement)
    found = [record for record in forecasts_of(measurement, WIDTHS, curves) if record.predictor == "splice"]
    read = [floor for law in plugins().capacity_laws for floor in curves.floors(measurement, WIDTHS, law.name)]
    assert {(f.hook, f.sae, f.order, f.law, f.width): f.floor for f in read} == {
        (f.hook, f.sae, f.order, f.law, f.width): f.floor for f in found
    }
    assert all(record.floor.low is not None and record.unit == "nats per token" for record in found)
    few = next(r for r in forecasts_of(measurement, [2], spliced(measurement, 2)) if r.predictor == "splice")
    assert (few.floor.low, few.floor.high) == (None, None)


def test_what_the_model_was_run_for_is_read_from_forecasts(measurement: Measurement) -> None:
    elsewhere = "blocks.2.hook_resid_post"
    known = Forecasts(
        (
            Forecast("pca_splice", 2, Estimate(1.0, 0.5, 1.5), HOOKS[1]),
            Forecast("pca_splice", 4, Estimate(0.75), HOOKS[1]),
            Forecast("pca_splice", 4, Estimate(0.25), elsewhere),
            Forecast("pca_tail", 4, Estimate(7.0), elsewhere, unit="activation²"),
            Forecast("rank_bound", 4, Estimate(0.125)),
            Forecast("somebody's", 4, Estimate(9.0)),
        )
    )
    found = forecasts_of(measurement, WIDTHS, forecasts=known)
    assert found.floors("pca_splice", HOOKS[1]) == {2: Estimate(1.0, 0.5, 1.5), 4: Estimate(0.75)}
    assert found.floors("pca_splice", elsewhere) == {4: Estimate(0.25)}
    assert found.floors("pca_splice", HOOKS[0]) == {}
    assert found.floors("pca_tail", elsewhere) == {4: Estimate(7.0)}
    assert found.floors("rank_bound") == {4: Estimate(0.125)}
    assert [r.floor for r in forecasts_of((), [4], forecasts=known) if r.predictor == "rank_bound"] == [Estimate(0.125)]
    assert not [record for record in found if record.predictor == "truncated_start"]


def test_where_floors_come_from_is_kept(measurement: Measurement) -> None:
    curves = replace(spliced(measurement, 2), about={"model": "mine", "tokens": 100})
    known = Forecasts((Forecast("rank_bound", 4, Estimate(0.5)),), {"model": "mine"}, ("not certified",))
    found = forecasts_of(measurement, [4], curves, known)
    assert found.about == {"model": "mine", "spliced": curves.about, "forecasts": known.about}
    assert {"not certified", *curves.notes()} < set(found.notes)
    with pytest.raises(MeasurementError, match="are of the teacher 'another' and not of 'mine'"):
        forecasts_of(measurement, [4], curves, replace(known, about={"model": "another"}))


@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge"])
def test_the_tail_of_the_spectrum(
    models_by_kind: dict[str, Any], make_sae: Any, tokens: torch.Tensor, kind: str
) -> None:
    """Against the squared singular values of the centred activations."""
    model, hook = models_by_kind[kind], HOOKS[1]
    seen = "blocks.1.hook_out" if kind == "TransformerBridge" else hook
    with torch.no_grad():
        x = model.run_with_cache(tokens)[1][seen][tokens != BOS].double()
    centred = x - x.mean(0)
    variances = torch.linalg.svdvals(centred).square() / len(x)
    basis = PCABasis(x.mean(0), centred.T @ centred / len(x), hook)
    for saes in ([basis], [basis, make_sae("topk", hook)]):
        with add_capacity_hooks(model, {hook: saes}, mask_token_ids=(BOS,)) as capacity:
            measured = capacity.run(tokens, progress=False).measurement()
        found = forecasts_of(measured, [1, 5, 31, 32, 40])
        tail = [float(variances[width:].sum()) for width in (1, 5, 31, 32, 40)]
        expected = pytest.approx(tail, rel=1e-4, abs=1e-5 * float(variances.sum()))
        assert [floor.value for floor in found.floors("pca_tail", hook).values()] == expected
        assert {r.unit for r in found if r.predictor == "pca_tail"} == {"activation²"}
        assert any(record.predictor == "importance" for record in found) == (len(saes) == 2)


def test_a_basis_of_the_largest_coordinates_has_no_spectrum(neox: Any, tokens: torch.Tensor) -> None:
    basis = PCABasis(torch.zeros(32).double(), torch.eye(32).double(), HOOKS[1], k=4)
    with add_capacity_hooks(neox, {HOOKS[1]: basis}) as capacity:
        measured = capacity.run(tokens, progress=False).measurement()
    found = forecasts_of(measured, [4])
    assert not found.floors("pca_tail", HOOKS[1])
    assert any(re.search("no forecast by .*pca_tail.*: run tl-capacity run rivals", n) for n in found.notes)


@pytest.mark.parametrize(
    ("claims", "contexts"),
    [
        ({}, 2 * 3 * 3),
        ({"varies_with": ("hook", "law")}, 2 * 3),
        ({"varies_with": ("importance",)}, 3),
        ({"varies_with": ()}, 1),
        ({"knows_features": False}, 2),
        ({"knows_features": False, "varies_with": ()}, 1),
    ],
)
def test_a_predictor_is_asked_once_for_what_it_varies_with(
    measurement: Measurement, register: Callable[[Any], None], claims: dict[str, Any], contexts: int
) -> None:
    mine = Mine(lambda widths: [1 / width for width in widths], **claims)
    register(mine)
    found = [record for record in forecasts_of(measurement, WIDTHS) if record.predictor == "mine"]
    assert len(mine.asked) == contexts
    assert len({record.series for record in found}) == contexts
    assert len(found) == contexts * len(WIDTHS)
    assert mine.asked[0].kept(2) == measurement.floors([2], max_fvu=None)[0].features_kept.value


def test_numbers_of_any_kind_are_taken(measurement: Measurement, register: Callable[[Any], None]) -> None:
    mine = Mine(None, varies_with=())
    register(mine)
    for answer, floors in (
        (np.array([1.0, 0.5]), {2: Estimate(1.0), 4: Estimate(0.5)}),
        ((Estimate(1.0, 0.5, 2.0), 0), {2: Estimate(1.0, 0.5, 2.0), 4: Estimate(0.0)}),
        ([None, 0.5], {4: Estimate(0.5)}),
        ([None, None], {}),
        (None, {}),
    ):
        mine.answer = answer
        found = forecasts_of(measurement, [2, 4])
        assert found.floors("mine") == floors
        assert any(re.search(r"no forecast by .*\bmine\b", note) for note in found.notes) == (not floors)


def raising(widths: Sequence[int]) -> Any:
    raise ZeroDivisionError("no such disk")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([1.0, float("nan")], "gives nan at width 4, but a finite number of at least 0 is needed: fix it$"),
        ([float("inf"), 1.0], "gives inf at width 2"),
        ([1.0, -1.0], "gives -1 at width 4"),
        ([1.0], "gives 1 floors for 2 widths, but one for each is needed: fix it$"),
        ([1.0, 1.0, 1.0], "gives 3 floors for 2 widths"),
        (["many", 1.0], r"failed in line \d+ of .*could not convert string to float: 'many'\): fix it, or choose"),
        (3.0, r"failed in line \d+ of .*'float' object is not iterable"),
        (raising, rf"failed in line \d+ of {re.escape(__file__)} \(ZeroDivisionError: no such disk\): fix it"),
    ],
)
def test_what_no_predictor_may_give_is_one_sentence(
    measurement: Measurement, register: Callable[[Any], None], answer: Any, says: str
) -> None:
    register(Mine(answer))
    with pytest.raises(PluginError, match=f"^the floor predictor 'mine' {says}") as caught:
        forecasts_of(measurement, [2, 4])
    assert "\n" not in str(caught.value)


def test_a_predictor_that_overrides_nothing_says_so(measurement: Measurement, register: Callable[[Any], None]) -> None:
    register(type("Nothing", (FloorPredictor,), {"name": "nothing"})())
    with pytest.raises(PluginError, match=r"'nothing' does not override floors\(\)"):
        forecasts_of(measurement, [2])


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        (
            {"unit": "latent²"},
            "'mine' in 'latent²' with constants = 0, which would make its floors nats per token",
        ),
        ({"exponent_is_free": True}, "'mine' in 'nats per token' and a free exponent with constants = 0"),
        ({"constants": -1}, "'mine' with constants = -1: give a whole number"),
        ({"constants": 1.5}, r"'mine' with constants = 1\.5: give a whole number"),
        ({"varies_with": ("layer",)}, "'mine' that varies with 'layer': choose from hook, importance, law"),
        ({"name": ""}, "without a name: give it a `name` attribute"),
        ({"unit": ""}, "without a unit: give it a `unit` attribute"),
    ],
)
def test_claims_that_cannot_be_are_refused(register: Callable[[Any], None], claims: dict[str, Any], says: str) -> None:
    register(Mine(None, **claims))
    with pytest.raises(PluginError, match=f"'predictors of a test 0' registers a floor predictor {says}"):
        plugins()


def test_what_is_no_predictor_is_refused(register: Callable[[Any], None]) -> None:
    register(type("Other", (), {"name": "other", "unit": "1"})())
    with pytest.raises(PluginError, match="'other' that is not a FloorPredictor: subclass"):
        plugins()


def test_constants_of_a_floor(measurement: Measurement) -> None:
    """An importance in nats needs no factor; one in other units does."""
    at = FloorContext(HOOKS[0], "sae0", "fisher", "nats per token")
    importance = plugins().floor_predictors["importance"]
    assert importance.unit_at(at) == "nats per token"
    in_nats = Forecast("importance", 2, Estimate(1.0), unit="nats per token")
    in_latents = Forecast("importance", 2, Estimate(1.0), unit="latent²")
    assert (constants_of(in_nats), constants_of(in_latents)) == (0, 1)
    found = {record.predictor: constants_of(record) for record in forecasts_of(measurement, [2], spliced(measurement))}
    assert (found["splice"], found["1/d"], found["power law in d"]) == (0, 1, 2)
    with pytest.raises(PluginError, match="there is no floor predictor named 'gone'"):
        constants_of(Forecast("gone", 2, Estimate(1.0)))


def test_built_in_claims() -> None:
    """In nats with nothing fitted is only what the teacher was run for; a rival knows no features."""
    claims = {p.name: (p.constants, p.needs_model, p.knows_features, p.is_bound) for p in plugins().floor_predictors}
    assert [name for name, (constants, *_) in claims.items() if not constants] == ["splice", *MODEL_NEEDED]
    assert [name for name, (_, needs_model, *_) in claims.items() if needs_model] == ["splice", *MODEL_NEEDED]
    assert [name for name, (*_, knows, _) in claims.items() if knows] == ["importance", "naive", "splice"]
    assert [name for name, (*_, bound) in claims.items() if bound] == ["rank_bound"]
    assert plugins().floor_predictors.default.name == "importance"
    assert all(p.summary and p.made_by for p in plugins().floor_predictors if p.needs_model)


def test_refusals_and_no_width(measurement: Measurement) -> None:
    with pytest.raises(CapacityError, match="width 0 is not a student width"):
        forecasts_of(measurement, [0])
    assert forecasts_of(measurement, ()) == Forecasts(())
    assert "run tl-capacity run splice, and pass what it wrote" in " ".join(forecasts_of(measurement, [2]).notes)


def test_kept_in_a_context_is_whole() -> None:
    at = FloorContext(features=CapacityContext(0.9, np.ones(50)), budget=lambda width: 100 * 0.29 * width)
    assert (at.kept(1), at.kept(2)) == (29, 50)
    assert len(list(contexts_of(()))) == 1


def test_a_predictor_in_one_file(cli: Cli, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from tl_capacity import FloorPredictor, hookimpl\n"
        "class Half(FloorPredictor):\n"
        "    name, summary, constants, unit = 'half', 'a half', 1, 'shares'\n"
        "    def floors(self, widths, at): return [0.5] * len(widths)\n"
        "@hookimpl\n"
        "def register_floor_predictors(register): register(Half())\n"
    )
    code, out, err = cli("--plugin", mine, "plugins", "--json")
    try:
        assert code == 0, err
        (row,) = (row for row in json.loads(out)["plugins"] if row["name"] == "half")
        assert row == {
            "kind": "floor predictor",
            "name": "half",
            "from": str(mine),
            "summary": "a half",
            "unit": "shares",
            "constants": 1,
            "needs_model": False,
            "knows_features": True,
            "is_bound": False,
        }
        assert forecasts_of(measurement_of_counts(np.arange(1, 201) * 64, tokens=64_000), [2]).floors("half", HOOKS[0])
        shown = " ".join(cli("plugins")[1].replace("│", " ").split())
        assert "a half; unit: shares, constants fitted: 1" in shown
        assert "nothing is fitted, needs the model, knows no features, a lower bound" in shown
    finally:
        unregister_plugin(str(mine))
