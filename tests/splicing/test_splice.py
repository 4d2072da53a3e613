"""Splicing against SAELens' own evaluation, and against a dense loop that runs the whole model for each variant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Cli, arguments
from conftest import BOS, KINDS
from dense import kl_per_token, logits_with
from place import placed

from tl_capacity import CapacityError, Measurement, add_capacity_hooks, splice
from tl_capacity.dictionaries.adapter import decoder_vectors
from tl_capacity.errors import DictionaryError, HookPointError, MeasurementError
from tl_capacity.plugins import plugins
from tl_capacity.predict.laws import context_at, kept_features
from tl_capacity.predict.spliced import Spliced
from tl_capacity.storage.files import SEAL

MakeSAE = Callable[..., Any]
HOOK = "blocks.1.hook_resid_post"


def measured(model: Any, saes: Any, tokens: torch.Tensor, masked: tuple[int, ...] = (BOS,)) -> Measurement:
    with add_capacity_hooks(model, saes, mask_token_ids=masked) as capacity:
        capacity.run(tokens, progress=False)
        return capacity.measurement()


def spliced(model: Any, sae: Any, tokens: torch.Tensor, hook: str = HOOK, **options: Any) -> tuple[Spliced, Any]:
    measurement = measured(model, {hook: sae}, tokens)
    return splice(model, measurement, tokens, saes={hook: sae}, progress=False, **options), measurement[hook]


def dense(
    model: Any,
    sae: Any,
    tokens: torch.Tensor,
    kept: list[int],
    means: torch.Tensor,
    keep_error: bool = False,
    hook: str = HOOK,
) -> float:
    """The same in a loop: every latent in memory, the whole model once more."""

    def change(x: torch.Tensor) -> torch.Tensor:
        latents = sae.encode(x).to_dense()
        written = torch.zeros(len(means), dtype=torch.bool, device=x.device)
        written[kept] = True
        new = sae.decode(torch.where(written, latents, means.to(latents)))
        if keep_error:
            new = new + x - sae.decode(latents)
        return torch.where((tokens == BOS)[..., None], x, new)

    clean = logits_with(model, hook, lambda x: x, tokens)
    return kl_per_token(clean, logits_with(model, hook, change, tokens))


def means_of(hook: Any) -> torch.Tensor:
    return torch.from_numpy(hook.summary.arrays["sums"].sum(0) / hook.summary.n_tokens)


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_a_dense_loop_has_it(
    models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str, architecture: str
) -> None:
    model, sae = models_by_kind[kind], make_sae(architecture, HOOK)
    result, hook = spliced(model, sae, tokens, kept=[5, 17])
    [curve] = result
    ranked = hook.ranked().tolist()
    assert curve.kept == (0, 5, 17, len(ranked))
    for kept in (0, 5, 17):
        expected = dense(model, sae, tokens, ranked[:kept], means_of(hook))
        assert curve.at(kept).value == pytest.approx(expected, rel=2e-4, abs=1e-6)
    everything = dense(model, sae, tokens, list(range(64)), means_of(hook))
    assert curve.error.value == pytest.approx(everything, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize(("lost", "keep_error"), [("zero", False), ("mean", True), ("zero", True)])
def test_what_stands_for_the_lost(
    neox: Any, make_sae: MakeSAE, tokens: torch.Tensor, lost: str, keep_error: bool
) -> None:
    sae = make_sae("topk", HOOK)
    result, hook = spliced(neox, sae, tokens, kept=[5], lost=lost, keep_error=keep_error)
    means = means_of(hook) if lost == "mean" else torch.zeros(64, dtype=torch.float64)
    [curve] = result
    expected = dense(neox, sae, tokens, hook.ranked().tolist()[:5], means, keep_error)
    assert curve.at(5).value == pytest.approx(expected, rel=2e-4, abs=1e-6)
    if keep_error:
        assert curve.error.value == pytest.approx(0, abs=1e-6)


def test_all_latents_are_the_reconstruction_that_saelens_evaluates(
    hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor
) -> None:
    from sae_lens.evals import get_recons_loss
    from sae_lens.training.activation_scaler import ActivationScaler

    sae = make_sae("standard", HOOK)
    measurement = measured(hooked, {HOOK: sae}, tokens, masked=())
    [curve] = splice(hooked, measurement, tokens, saes={HOOK: sae}, kept=[0], progress=False)
    theirs = get_recons_loss(sae, hooked, ActivationScaler(), tokens, compute_kl=True, compute_ce_loss=False)
    assert curve.error.value == pytest.approx(float(theirs["kl_div_with_sae"][:, :-1].mean()), rel=1e-4)


def test_no_latent_is_the_mean_of_the_reconstruction(neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    sae = make_sae("standard", HOOK)
    result, hook = spliced(neox, sae, tokens, kept=[0])
    constant = (placed(means_of(hook)) @ decoder_vectors(sae).double() + sae.b_dec.detach().double()).float()
    other = logits_with(neox, HOOK, lambda x: torch.where((tokens == BOS)[..., None], x, constant), tokens)
    expected = kl_per_token(logits_with(neox, HOOK, lambda x: x, tokens), other)
    [curve] = result
    assert curve.at(0).value == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder"])
@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge"])
def test_transcoders_replace_what_they_write(
    models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str, architecture: str
) -> None:
    model = models_by_kind[kind]
    source, target = "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"
    sae = make_sae(architecture, source, target)
    result, hook = spliced(model, sae, tokens, source, kept=[7])
    ranked, means = hook.ranked().tolist(), means_of(hook).float()
    _, cache = model.run_with_cache(tokens, return_type=None)
    read = cache[source if source in cache else "blocks.1.hook_in"]
    latents = sae.encode(read)
    kept = torch.zeros(64, dtype=torch.bool, device=latents.device)
    kept[ranked[:7]] = True
    written = sae.decode(torch.where(kept, latents, means.to(latents)))
    if hasattr(sae, "W_skip"):
        written = written + read @ sae.W_skip.T
    other = logits_with(model, target, lambda x: torch.where((tokens == BOS)[..., None], x, written), tokens)
    [curve] = result
    assert curve.at(7).value == pytest.approx(
        kl_per_token(logits_with(model, target, lambda x: x, tokens), other), rel=5e-4
    )


def test_padding_and_documents(neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    """Rows of several lengths give what each gives alone."""
    sae = make_sae("standard", HOOK)
    rows = [tokens[i, : 6 + i] for i in range(12)]
    measurement = measured(neox, {HOOK: sae}, tokens)
    table = torch.full((12, 17), BOS)
    mask = torch.zeros(12, 17, dtype=torch.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)], mask[i, : len(row)] = row, 1
    options: dict[str, Any] = {"saes": {HOOK: sae}, "kept": [4], "progress": False}
    [together] = splice(neox, measurement, {"input_ids": table, "attention_mask": mask}, **options)
    alone = [next(iter(splice(neox, measurement, row[None], **options))) for row in rows]
    np.testing.assert_allclose(together.kl.sum(0), np.sum([curve.kl.sum(0) for curve in alone], 0), rtol=1e-4)
    assert together.tokens.sum() == sum(len(row) - 1 for row in rows)


def test_widths_laws_and_orders(neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    sae = make_sae("standard", HOOK)
    measurement = measured(neox, {HOOK: sae}, tokens)
    hook = measurement[HOOK]
    shuffled = np.random.default_rng(0).permutation(hook.ranked())
    laws = [law.name for law in plugins().capacity_laws]
    result = splice(
        neox, measurement, tokens, [2, 4], saes=sae, laws=laws, orders={"random": shuffled.tolist()}, progress=False
    )
    assert [curve.order for curve in result] == [hook.estimator().name, "random"]
    for law in plugins().capacity_laws:
        for floor in result.floors(measurement, [2, 4], law.name):
            kept = kept_features(law, floor.width, context_at(hook, hook.importance(), hook.summary.alpha.value))
            curve = next(c for c in result if c.order == floor.order)
            assert floor.features_kept == kept
            assert kept in curve.kept
            assert floor.floor.value == curve.kl.sum(0)[curve.kept.index(kept)] / curve.tokens.sum()
    expected = dense(neox, sae, tokens, shuffled[:9].tolist(), means_of(hook))
    [again] = splice(
        neox, measurement, tokens, saes=sae, kept=[9], orders={hook.estimator().name: shuffled.tolist()}, progress=False
    )
    assert again.at(9).value == pytest.approx(expected, rel=2e-4)


def test_a_curve_is_read_both_ways(neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    [curve], _ = spliced(neox, make_sae("standard", HOOK), tokens)
    for kept in curve.kept[1:-1]:
        estimate = curve.at(kept)
        assert estimate.low is not None
        assert estimate.low <= estimate.value <= estimate.high
        needed = curve.features_for(estimate.value)
        assert needed is not None
        assert needed.value <= kept
        assert curve.at(needed.value).value <= estimate.value
    assert curve.features_for(curve.mean.min() / 2) is None
    assert curve.features_for(10.0).value == 0
    with pytest.raises(CapacityError, match="cannot stay at"):
        curve.at(curve.alive + 1)


def test_round_trip_and_tables(neox: Any, make_sae: MakeSAE, tokens: torch.Tensor, tmp_path: Path) -> None:
    result, hook = spliced(neox, make_sae("standard", HOOK), tokens)
    result.save(tmp_path)
    again = Spliced.load(tmp_path)
    assert again.to_json() == json.loads(json.dumps(result.to_json()))
    assert again.floors([hook], [3])[0].floor == result.floors([hook], [3])[0].floor
    assert len(again.to_frame()) == sum(len(curve.kept) for curve in result)
    assert [len(trace.x) for trace in again.plot().data] == [len(curve.kept) for curve in result]
    assert "KL (nats per token)" in again._repr_html_()
    content = json.loads((tmp_path / "splice.json").read_text())
    content["curves"][0]["kl"][0].pop()
    (tmp_path / "splice.json").write_text(json.dumps(content))
    with pytest.raises(MeasurementError, match=r"SHA-256 of its content is not the recorded one.*: splice again"):
        Spliced.load(tmp_path)
    del content[SEAL]  # as earlier versions wrote it
    (tmp_path / "splice.json").write_text(json.dumps(content))
    with pytest.raises(MeasurementError, match=r"lacks or garbles .*: splice again"):
        Spliced.load(tmp_path)


def test_refusals(hooked: Any, neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    sae = make_sae("standard", HOOK)
    measurement = measured(neox, {HOOK: sae}, tokens)
    with pytest.raises(DictionaryError, match="is not one that was measured there"):
        splice(neox, measurement, tokens, saes={HOOK: make_sae("standard", HOOK, seed=1)})
    with pytest.raises(CapacityError, match="width 0 is not a student width"):
        splice(neox, measurement, tokens, [0], saes=sae)
    with pytest.raises(CapacityError, match="features cannot stay"):
        splice(neox, measurement, tokens, kept=[65], saes=sae)
    with pytest.raises(CapacityError, match="choose one of mean, zero"):
        splice(neox, measurement, tokens, saes=sae, lost="nothing")
    with pytest.raises(CapacityError, match="pass a permutation"):
        splice(neox, measurement, tokens, saes=sae, orders={"mine": [1, 1]})
    with pytest.raises(CapacityError, match="the text has no token to predict"):
        splice(neox, measurement, tokens[:, :1], saes=sae)
    last = "unembed.hook_out"
    wide = make_sae("standard", last, d_in=100)
    with pytest.raises(HookPointError, match="did not fire before the model's head"):
        splice(hooked, measured(hooked, {last: wide}, tokens), tokens, saes={last: wide})
    changed = make_sae("layer_norm", HOOK)
    with pytest.raises(DictionaryError, match="does not write the sum of its decoder vectors"):
        splice(neox, measured(neox, {HOOK: changed}, tokens), tokens, saes={HOOK: changed})


def test_on_the_command_line(cli: Cli, setup: Path, tmp_path: Path) -> None:
    assert cli(*arguments(setup, tmp_path / "m"))[0] == 0
    command = ["run", "splice", tmp_path / "m", "--widths", "2,4", "--tokens", 400, "--out", tmp_path / "s"]
    code, out, err = cli(*command)
    assert code == 0, err
    measurement, result = Measurement.load(tmp_path / "m"), Spliced.load(tmp_path / "s")
    for floor in result.floors(measurement, [2, 4]):
        assert f"{floor.features_kept:,}" in out
    code, out, _ = cli(*command)
    assert code == 0
    assert "already holds a splice.json of these settings" in out
    code, _, err = cli(*command[:4], "8", *command[5:])
    assert code == 2
    assert "of other settings (widths = [2, 4])" in err


@pytest.mark.slow
def test_a_plan_in_nats(cli: Cli, setup: Path, tmp_path: Path) -> None:
    assert cli(*arguments(setup, tmp_path / "m"))[0] == 0
    assert cli("run", "splice", tmp_path / "m", "--tokens", 400, "--out", tmp_path / "s")[0] == 0
    measurement, result = Measurement.load(tmp_path / "m"), Spliced.load(tmp_path / "s")
    [curve] = result
    target = (curve.at(0).value + curve.error.value) / 2
    command = ["plan", tmp_path / "m", "--splice", tmp_path / "s", "--json"]
    code, out, err = cli(*command, "--target-loss", target)
    assert code == 0, err
    answer = json.loads(out)
    width = int(answer["hooks"][0]["width"]["value"])
    within, below = (next(iter(result.floors(measurement, [w]))).floor.value for w in (width, max(1, width - 1)))
    assert within <= target
    assert width == 1 or below > target
    assert answer["unit"] == "nats per token"
    shown = {cost["width"]: cost["floor"]["value"] for cost in answer["costs"]}
    assert shown == {w: result.floors(measurement, [w])[0].floor.value for w in shown}
    code, _, err = cli(*command, "--target-loss", curve.error.value / 2)
    assert code == 2
    assert "the dictionary is the limit and not the width" in err
    code, _, err = cli(*command, "--keep", 0.5)
    assert code == 2
    assert "pass a target_loss" in err
