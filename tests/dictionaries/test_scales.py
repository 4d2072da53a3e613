"""Scales: latents whose decoder vectors are zero, decoders that divide by their norms, and SAEs that normalise each
token, whose latents are in another unit than their error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BOS, D_MODEL, SAES
from place import placed

import tl_capacity as tlc
from tl_capacity.dictionaries.adapter import decoder_norms
from tl_capacity.dictionaries.decoding import Decoder
from tl_capacity.dictionaries.dictionary import Dictionary
from tl_capacity.dictionaries.encoding import Encoder
from tl_capacity.dictionaries.loading import load_sae
from tl_capacity.errors import DictionaryError
from tl_capacity.measure.ablation import ablation_kl
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.predict.caveats import error_warnings
from tl_capacity.predict.figures import floors_figure
from tl_capacity.predict.floors import floor_cells
from tl_capacity.probing.activations import collect

MakeSAE = Callable[..., Any]
HOOK = "blocks.1.hook_resid_post"
DEAD = 3
IMPORTANCES = ["second_moment", "decoder_weighted", "firing_rate", "gradient"]


def inputs() -> torch.Tensor:
    return placed(torch.randn(48, D_MODEL, generator=torch.Generator().manual_seed(5)))


def with_a_zero_row(sae: Any) -> Any:
    """The SAE with a latent that fires on every token, and writes nothing."""
    with torch.no_grad():
        sae.W_dec[DEAD] = 0
        for bias in ("b_enc", "b_gate", "b_mag"):
            if getattr(sae, bias, None) is not None:
                getattr(sae, bias)[DEAD] = 50
    return sae


def measured(model: Any, sae: Any, tokens: torch.Tensor, importance: list[str]) -> Any:
    with tlc.add_capacity_hooks(model, {HOOK: sae}, importance=importance, fvu_every=1) as capacity:
        return capacity.run(tokens.split(8), progress=False).measurement()


class TestZeroRows:
    @pytest.mark.parametrize("architecture", [*SAES, "rescaled topk"])
    def test_a_latent_that_writes_nothing_is_dead(self, make_sae: MakeSAE, architecture: str) -> None:
        rescales = {"rescale_acts_by_decoder_norm": True} if architecture == "rescaled topk" else {}
        sae = with_a_zero_row(make_sae(architecture.split()[-1], HOOK, **rescales))
        z = sae.encode(inputs()).to_dense().detach()
        if architecture not in ("matching_pursuit", "rescaled topk"):
            assert (z[:, DEAD] != 0).all()  # SAELens' own encode does not know
        z[:, DEAD] = 0
        tokens, features, values = Encoder(sae)(inputs())
        latents = torch.zeros_like(z)
        latents[tokens, features] = values
        torch.testing.assert_close(latents, z, rtol=1e-5, atol=1e-5)

        decoder = Decoder(sae)
        decoder.settle(inputs())
        written = decoder(
            (tokens, features, values), torch.ones(len(inputs()), dtype=torch.bool, device=inputs().device), inputs()
        )
        if rescales:  # SAELens' own decode divides by the norm of 0
            assert sae.decode(sae.encode(inputs())).isnan().any()
            vectors = torch.nn.functional.normalize(sae.W_dec, dim=1)
            torch.testing.assert_close(written, z @ vectors + sae.b_dec, rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(written, sae.decode(sae.encode(inputs())), rtol=1e-4, atol=1e-4)
        norms = decoder_norms(sae, torch.device("cpu"))
        assert norms[DEAD] == 0
        assert norms.isfinite().all()

    @pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge", "gpt_neox"])
    @pytest.mark.parametrize("rescales", [False, True])
    def test_measured_as_the_sae_without_it(
        self, models_by_kind: dict[str, Any], make_sae: MakeSAE, tokens: torch.Tensor, kind: str, rescales: bool
    ) -> None:
        model = models_by_kind[kind]
        sae = make_sae("topk", HOOK, k=60, rescale_acts_by_decoder_norm=rescales)
        whole = measured(model, sae, tokens, IMPORTANCES)[HOOK]
        with torch.no_grad():
            sae.W_dec[DEAD] = 0
        found = measured(model, sae, tokens, IMPORTANCES)[HOOK]
        expected = whole.summary.arrays["counts"].sum(0)
        assert expected[DEAD] > 0
        expected[DEAD] = 0
        if not rescales:  # there, what is largest depends on the norms
            assert found.summary.arrays["counts"].sum(0).tolist() == expected.tolist()
        assert found.summary.arrays["counts"][:, DEAD].sum() == 0
        assert np.isfinite(found.summary.fvu.value)
        for name in IMPORTANCES:
            assert np.isfinite(found.importance(name)).all()

    @pytest.mark.fidelity(
        source="dictionary_learning", says="a decoder vector of norm 0", obeyed="its latent is dead, and nothing is NaN"
    )
    def test_a_file_of_dictionary_learning(self, neox: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
        draw = torch.Generator().manual_seed(0)
        state = {
            "encoder.weight": torch.randn(40, D_MODEL, generator=draw),
            "encoder.bias": torch.randn(40, generator=draw),
            "decoder.weight": torch.randn(D_MODEL, 40, generator=draw),
            "bias": torch.randn(D_MODEL, generator=draw),
        }
        state["decoder.weight"][:, DEAD] = 0
        (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder", "layer": 1}}')
        torch.save(state, tmp_path / "ae.pt")
        _, sae = load_sae(str(tmp_path))
        norms = state["decoder.weight"].norm(dim=0)
        x = inputs().cpu()
        z = norms * ((x - state["bias"]) @ state["encoder.weight"].T + state["encoder.bias"]).relu()
        torch.testing.assert_close(sae.encode(x), z, rtol=1e-4, atol=1e-4)
        written = (z / norms.clamp(min=1e-30)) @ state["decoder.weight"].T + state["bias"]
        torch.testing.assert_close(sae.decode(z), written, rtol=1e-4, atol=1e-4)
        summary = measured(neox, sae, tokens, IMPORTANCES)[HOOK].summary
        assert summary.n_alive.value == 39
        assert np.isfinite(summary.fvu.value)

    def test_pooled_latents_and_ablations(self, neox: Any, tokenizer: Any, make_sae: MakeSAE) -> None:
        sae = with_a_zero_row(make_sae("standard", HOOK))
        pooled = collect(neox, HOOK, ["w1 w2 w3", "w4 w5"], tokenizer=tokenizer, sae=sae)
        assert not pooled.values[:, DEAD].any()
        assert ablation_kl(neox, HOOK, sae, torch.tensor([[BOS, 1, 2, 3]]), [DEAD]).item() == pytest.approx(0, abs=1e-6)

    def test_decoder_weights_that_are_no_numbers_are_refused(self, neox: Any, make_sae: MakeSAE) -> None:
        sae = make_sae("topk", HOOK)
        with torch.no_grad():
            sae.W_dec[DEAD, 0] = float("nan")
        with pytest.raises(DictionaryError, match=r"has NaN or infinite decoder weights: save it again"):
            tlc.add_capacity_hooks(neox, sae)


@pytest.mark.fidelity(
    source="SAELens",
    says="`rescale_acts_by_decoder_norm`",
    obeyed="each latent writes a vector of norm 1, in FVU, importances and gradients",
)
def test_rescaling_by_decoder_norms_is_as_folding_them_in(neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
    """SAELens folds the norms in so that nothing changes; neither do our figures."""
    sae, folded = (make_sae("topk", HOOK, rescale_acts_by_decoder_norm=True) for _ in range(2))
    folded.fold_W_dec_norm()
    folded.cfg.rescale_acts_by_decoder_norm = False  # all norms are 1 now
    mine, theirs = (measured(neox, each, tokens, IMPORTANCES)[HOOK] for each in (sae, folded))
    assert mine.linear is theirs.linear is True
    assert mine.summary.fvu.value == pytest.approx(theirs.summary.fvu.value, rel=1e-5)
    for name in IMPORTANCES:
        np.testing.assert_allclose(mine.importance(name), theirs.importance(name), rtol=1e-3, atol=1e-7)
    latents = mine.ranked("gradient")[:2].tolist()
    kl = [ablation_kl(neox, HOOK, each, tokens, latents).numpy(force=True) for each in (sae, folded)]
    assert (kl[0] > 0).all()
    np.testing.assert_allclose(*kl, rtol=1e-3)


class TestUnits:
    """Latents of an SAE that normalises each token do not grow with the activations, and its error does."""

    @pytest.mark.fidelity(
        source="SAELens",
        says="`normalize_activations: layer_norm`, `constant_norm_rescale`",
        obeyed="floors are in normalised units, and are not compared with the SAE's error",
    )
    @pytest.mark.parametrize(
        ("architecture", "kind"),
        [
            ("layer_norm", "HookedTransformer"),
            ("layer_norm", "TransformerBridge"),
            ("constant_norm_rescale", "gpt_neox"),
        ],
    )
    def test_floors_and_error_of_different_units_are_not_compared(
        self,
        models_by_kind: dict[str, Any],
        make_sae: MakeSAE,
        tokens: torch.Tensor,
        architecture: str,
        kind: str,
        tmp_path: Path,
    ) -> None:
        sae = make_sae(architecture, HOOK)
        found = measured(models_by_kind[kind], sae, tokens, ["decoder_weighted"])
        found.save(tmp_path / "m")
        for measurement in (found, Measurement.load(tmp_path / "m"), Measurement.merge([found])):
            (sentence,) = error_warnings(measurement, [8, 64])
            assert sentence.endswith("so the two are not compared")
            floors = measurement.floors([8], "decoder_weighted", max_fvu=None)
            assert {floor.unit for floor in floors} == {"normalised activation²"}
            assert measurement[HOOK].unit("second_moment") == "latent²"

    def test_two_units_in_one_table(self, neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
        saes = {HOOK: make_sae("layer_norm", HOOK), "blocks.0.hook_resid_post": make_sae("standard", HOOK)}
        with tlc.add_capacity_hooks(neox, saes, importance=["decoder_weighted"], fvu_every=1) as capacity:
            found = capacity.run(tokens.split(8), progress=False).measurement()
        floors = found.floors([8], "decoder_weighted", max_fvu=None)
        header, rows = floor_cells(floors)
        assert header[4] == "predicted floor"
        ends = {row[0]: row[4] for row in rows}
        assert ends[HOOK].endswith(" normalised activation²")
        assert ends["blocks.0.hook_resid_post"].endswith("] activation²")
        assert "(normalised activation² or activation² per token)" in str(floors_figure(floors).layout)

    def test_they_are_of_different_units(self, make_sae: MakeSAE) -> None:
        sae, x = make_sae("layer_norm", HOOK), inputs()
        grown = [(sae.encode(s * x), (s * x - sae(s * x)).square().sum()) for s in (1, 10)]
        torch.testing.assert_close(grown[0][0], grown[1][0], rtol=1e-2, atol=1e-2)
        assert grown[1][1] > 50 * grown[0][1]

    def test_floors_and_error_of_one_unit_are(self, neox: Any, make_sae: MakeSAE, tokens: torch.Tensor) -> None:
        found = measured(neox, make_sae("standard", HOOK), tokens, ["decoder_weighted"])
        assert any("is below the SAE's own error of" in sentence for sentence in error_warnings(found, [64]))
        assert found[HOOK].unit("decoder_weighted") == "activation²"

    def test_a_transcoder_that_normalises_writes_its_decoder_vectors(
        self, hooked: Any, make_sae: MakeSAE, tokens: torch.Tensor
    ) -> None:
        reads, writes = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
        sae = make_sae("transcoder", reads, writes, normalize_activations="layer_norm")
        with tlc.add_capacity_hooks(hooked, sae, importance=["decoder_weighted"], fvu_every=1) as capacity:
            found = capacity.run(tokens.split(8), progress=False).measurement()[reads]
        assert found.linear is True
        assert found.unit("decoder_weighted") == "activation²"

    def test_a_measurement_that_does_not_say_is_compared(
        self, neox: Any, make_sae: MakeSAE, tokens: torch.Tensor
    ) -> None:
        """As version 0.1 wrote it."""
        found = measured(neox, make_sae("standard", HOOK), tokens, ["decoder_weighted"])
        silent = [replace(hook, linear=None) for hook in found]
        assert error_warnings(silent, [64]) == error_warnings(found, [64])


def test_a_dictionary_whose_decoder_is_all_zero_writes_its_bias() -> None:
    weights = {"W_enc": torch.ones(2, 3), "b_enc": torch.ones(3), "W_dec": torch.zeros(3, 2), "b_dec": torch.ones(2)}
    tokens, _, _ = Encoder(Dictionary("standard", weights))(torch.ones(4, 2))
    assert len(tokens) == 0
