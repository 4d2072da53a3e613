"""What works on TransformerLens 4 without SAELens; run by itself in an environment that has them so, since one
environment cannot hold both versions.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tl_capacity as tlc
from tl_capacity.dictionaries.bases import NeuronBasis
from tl_capacity.dictionaries.dictionary import Dictionary
from tl_capacity.dictionaries.loading import load_sae
from tl_capacity.errors import DictionaryError
from tl_capacity.measure.ablation import ablation_kl
from tl_capacity.measure.job import measure
from tl_capacity.measure.settings import MeasureSettings
from tl_capacity.measurement.measurement import Measurement
from tl_capacity.models.loading import load_model
from tl_capacity.plugins import plugins
from tl_capacity.text.streams import TokenStream, documents

HOOK, TOKENS = "blocks.3.hook_resid_post", 400


class Own(nn.Module):
    """The protocol alone: `encode`, `decode`, `W_dec`, `cfg`."""

    def __init__(self) -> None:
        super().__init__()
        self.W_dec = nn.functional.normalize(torch.randn(300, 128, generator=torch.Generator().manual_seed(0)), dim=1)
        self.cfg = type("Config", (), {"d_in": 128, "d_sae": 300})()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.W_dec.T - 10).relu()

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        return feature_acts @ self.W_dec


def counted(model: Any, sae: Any, stream: TokenStream, importance: list[str]) -> Measurement:
    with tlc.add_capacity_hooks(model, {HOOK: sae}, importance=importance, mask_token_ids=[0, 1]) as capacity:
        return capacity.run(stream, max_tokens=TOKENS, progress=False).measurement()


def main() -> None:
    assert importlib.metadata.version("transformer-lens").startswith("4."), "this checks TransformerLens 4"
    assert importlib.util.find_spec("sae_lens") is None, "this checks an environment without SAELens"
    assert not plugins().failures, plugins().failures

    plain, bridged = load_model("embedded"), load_model("embedded").bridge
    stream = TokenStream("embedded", plain.tokenizer, context=64)
    _, sae = load_sae(str(plain.named.saes[HOOK]))
    assert isinstance(sae, Dictionary)
    for dictionary in (sae, Own()):
        for importance in (["second_moment"], ["gradient", "fisher", "integrated_gradients"]):
            direct, through = (counted(model, dictionary, stream, importance)[HOOK] for model in (plain.model, bridged))
            # Two forward passes round differently, which turns a latent on or off at its threshold now and then.
            difference = abs(direct.summary.arrays["counts"].sum(0) - through.summary.arrays["counts"].sum(0)).sum()
            assert difference <= 1e-3 * direct.summary.arrays["counts"].sum(), difference
            for name in set(importance) - {"fisher"}:  # whose draws are decided by the last bits of the logits
                mine, theirs = (
                    found.summary.importance(found.estimator(name).compute, name).sum() for found in (direct, through)
                )
                assert abs(mine / theirs - 1) < 0.01, (name, mine, theirs)
    assert hasattr(bridged, "add_capacity_hooks")

    rows = torch.from_numpy(
        next(iter(TokenStream("embedded", plain.tokenizer, context=32, batch_rows=2))).tokens
    ).clamp(min=0)
    assert (ablation_kl(bridged, HOOK, sae, rows, [0, 1, 2]) >= 0).all()
    with bridged.add_capacity_hooks(NeuronBasis(128, HOOK, k=8), mask_token_ids=[0, 1]) as capacity:
        bridged(rows)
    assert abs(capacity.measurement()[HOOK].summary.l0.value - 8) < 1e-9

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "text.txt"
        source.write_text("\n\n".join(islice(documents("embedded"), 10)))
        saes = (
            HOOK,
            f"pca:{HOOK},k=24",
            "neurons:blocks.3.mlp.hook_post,k=24",
            "neurons:blocks.2.attn.hook_z,k=8",
            "neurons:blocks.2.hook_attn_out,k=16",
        )
        measured = measure(
            MeasureSettings("embedded", Path(folder) / "out", saes, tokens=TOKENS, source=str(source), progress=False)
        )
        assert [round(one.summary.l0.value) for one in measured] == [24, 24, 24, 8, 16]
        assert Measurement.load(Path(folder) / "out").provenance.versions["transformer-lens"].startswith("4.")

    said = ""
    try:
        load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    except DictionaryError as problem:
        said = str(problem)
    assert "is not installed for this TransformerLens" in said
    print(f"TransformerLens {importlib.metadata.version('transformer-lens')} without SAELens: all of this works")


if __name__ == "__main__":
    main()
