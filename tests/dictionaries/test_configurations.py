"""Configurations that earlier versions of SAELens wrote: they are obeyed, with SAELens and without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_MODEL
from safetensors.torch import save_file

from tl_capacity.dictionaries.configurations import up_to_date
from tl_capacity.dictionaries.formats import read_sae_lens
from tl_capacity.dictionaries.loading import load_sae
from tl_capacity.errors import DictionaryError

HOOK, D_SAE, K = "blocks.1.hook_resid_post", 40, 5
READERS: dict[str, Callable[[Path], Any]] = {
    "with SAELens": lambda folder: load_sae(str(folder))[1],
    "without": read_sae_lens,
}
OLD = {
    "model_name": "gpt2-small",
    "hook_point": HOOK,
    "hook_point_layer": 1,
    "hook_point_head_index": None,
    "d_in": D_MODEL,
    "d_sae": D_SAE,
    "expansion_factor": 4,
    "dtype": "torch.float32",
    "device": "cpu",
    "context_size": 16,
    "dataset_path": "Skylion007/openwebtext",
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": K},
    "normalize_activations": False,
    "finetuning_scaling_factor": False,
    "sae_lens_training_version": None,
}
"""As version 3 wrote it, before architectures."""


def weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_MODEL, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_MODEL), "b_dec": (D_MODEL,)}
    return {name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()}


def saved(folder: Path, config: dict[str, Any], more: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(weights() | (more or {}), folder / "sae_weights.safetensors")
    return folder


@pytest.mark.fidelity(
    source="SAELens before 6",
    says="`activation_fn_str: topk`, `activation_fn_kwargs`, whatever the architecture",
    obeyed="the k largest latents of each token are kept",
)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"architecture": "standard", "normalize_activations": "none", "apply_b_dec_to_input": True},
        {"activation_fn_str": None, "activation_fn": "topk", "normalize_activations": None},
        {"metadata": {"sae_lens_version": "6.0.0", "hook_name": HOOK}, "normalize_activations": "none"},
    ],
    ids=["version 3", "version 5", "renamed", "version 6"],
)
def test_topk_beside_the_architecture(tmp_path: Path, reader: str, change: dict[str, Any]) -> None:
    config = {name: value for name, value in (OLD | change).items() if value is not None or name not in change}
    sae = READERS[reader](saved(tmp_path / "sae", config))
    w, x = weights(), torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(9))
    before = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    least = before.sort(dim=1, descending=True).values[:, K - 1 : K]
    torch.testing.assert_close(sae.encode(x).to_dense(), torch.where(before >= least, before, 0), rtol=1e-4, atol=1e-4)
    assert sae.cfg.metadata.hook_name == HOOK


@pytest.mark.parametrize("reader", READERS)
def test_relu_is_relu(tmp_path: Path, reader: str) -> None:
    sae = READERS[reader](saved(tmp_path / "sae", OLD | {"activation_fn_str": "relu", "activation_fn_kwargs": {}}))
    w, x = weights(), torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(9))
    expected = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    torch.testing.assert_close(sae.encode(x), expected, rtol=1e-4, atol=1e-4)
    metadata = sae.cfg.metadata
    assert (metadata.model_name, metadata.context_size, metadata.prepend_bos) == ("gpt2-small", 16, True)


@pytest.mark.fidelity(
    source="SAELens before 6",
    says="`activation_fn_str: tanh-relu`, `finetuning_scaling_factor`",
    obeyed="refused, because SAELens 6 would drop it silently",
)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_more_is_refused(tmp_path: Path, reader: str) -> None:
    read = READERS[reader]
    with pytest.raises(DictionaryError, match=r"'tanh-relu' is no longer in SAELens, .*: choose another SAE"):
        read(saved(tmp_path / "tanh", OLD | {"activation_fn_str": "tanh-relu"}))
    with pytest.raises((DictionaryError, ValueError), match="activation_fn is topk, and activation_fn_kwargs has no k"):
        read(saved(tmp_path / "k", OLD | {"activation_fn_kwargs": {}}))
    with pytest.raises(DictionaryError, match=r"scaling_factor"):
        read(
            saved(
                tmp_path / "scaled", OLD | {"finetuning_scaling_factor": True}, {"scaling_factor": torch.full((40,), 2)}
            )
        )
    ones = saved(tmp_path / "ones", OLD | {"finetuning_scaling_factor": True}, {"scaling_factor": torch.ones(D_SAE)})
    assert "scaling_factor" not in read(ones).state_dict()


def test_a_boolean_normalisation_is_the_scaling_that_encode_leaves_out() -> None:
    assert up_to_date(OLD | {"normalize_activations": True})["normalize_activations"] == "expected_average_only_in"
    assert up_to_date(OLD | {"normalize_activations": False})["normalize_activations"] == "none"
