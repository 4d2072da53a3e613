"""The paper's own SAEs: files laid out as its training script writes them, against the formula written out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOS, D_MODEL

import tl_capacity as tlc
from tl_capacity.dictionaries.loading import load_sae
from tl_capacity.errors import DictionaryError
from tl_capacity.interfaces import SparseAutoencoder
from tl_capacity.measurement.measurement import Measurement

HOOK, D_SAE = "blocks.1.hook_resid_post", 64


def weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=draw)).Q
    encoder = torch.cat([basis, -basis])  # a pair ±w for each direction reconstructs every activation
    return {
        "encoder.weight": encoder,
        "encoder.bias": torch.full((D_SAE,), -0.05),
        "decoder.weight": encoder.T.contiguous(),
        "decoder.bias": 0.01 * torch.randn(D_MODEL, generator=draw),
        "b_pre": 0.1 * torch.randn(D_MODEL, generator=draw),
    }


def saved(path: Path, state: dict[str, Any] | None = None, **config: Any) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    said = {"d_sae": D_SAE, "expansion": D_SAE // D_MODEL, "l1_coeff": 5e-4, "num_tokens": 300_000_000, **config}
    torch.save({"model_state": weights() if state is None else state, "config": said, "step": 7}, path)
    return path


@torch.no_grad()
def expected(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and reconstruction, by the formula."""
    w = weights()
    z = ((x - w["b_pre"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    return z, z @ w["decoder.weight"].T + w["decoder.bias"] + w["b_pre"]


@pytest.mark.fidelity(
    source="the paper's script",
    says="`model_state` with `b_pre`",
    obeyed="b_pre is taken from the input and added to what is written",
)
@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge", "gpt_neox"])
def test_measured_as_the_formula_says(
    models_by_kind: dict[str, Any], tokens: torch.Tensor, tmp_path: Path, kind: str
) -> None:
    model = models_by_kind[kind]
    _, sae = load_sae(str(saved(tmp_path / "sae_layer01_final.pt")))
    assert isinstance(sae, SparseAutoencoder)
    with torch.no_grad():
        if hasattr(model, "run_with_cache"):
            x = model.run_with_cache(tokens)[1][HOOK][tokens != BOS]
        else:
            x = model(tokens, output_hidden_states=True).hidden_states[2][tokens != BOS]
    x = x.cpu()
    z, written = expected(x)
    torch.testing.assert_close(sae.encode(x), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decode(z), written, rtol=1e-4, atol=1e-4)
    with tlc.add_capacity_hooks(model, sae, fvu_every=1, mask_token_ids=[BOS]) as capacity:
        found = capacity.run(tokens.split(8), progress=False).measurement()[HOOK]
    assert found.summary.l0.value == pytest.approx(float((z != 0).sum()) / len(x), rel=1e-3)
    assert found.importance("second_moment").sum() == pytest.approx(float(z.square().sum()) / len(x), rel=1e-4)
    fvu = (x - written).square().sum() / (x - x.mean(0)).square().sum()
    assert found.summary.fvu.value == pytest.approx(float(fvu), rel=1e-3)


@pytest.mark.fidelity(
    source="the paper's script",
    says="a layer in `config`, or in the file's name",
    obeyed="the residual stream after that layer is read; if neither says it, HOOK= is asked for",
)
@pytest.mark.parametrize(
    ("name", "config", "hook"),
    [
        ("sae_layer12_final.pt", {}, "blocks.12.hook_resid_post"),
        ("sae_layer00_50M.pt", {}, "blocks.0.hook_resid_post"),
        ("final.pt", {"layer": 3}, "blocks.3.hook_resid_post"),
        ("Layer-3.pth", {"layer_idx": 3}, "blocks.3.hook_resid_post"),
        ("final.pt", {}, None),
    ],
)
def test_where_it_belongs(tmp_path: Path, name: str, config: dict[str, Any], hook: str | None) -> None:
    assert load_sae(str(saved(tmp_path / name, **config)))[1].cfg.metadata.hook_name == hook


def test_names_that_wrappers_lengthen(tmp_path: Path) -> None:
    longer = {f"_orig_mod.{name}": value for name, value in weights().items()}
    plain, compiled = (load_sae(str(saved(tmp_path / f"{i}.pt", state)))[1] for i, state in enumerate((None, longer)))
    torch.testing.assert_close(plain.state_dict(), compiled.state_dict())


def test_bad_input(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(DictionaryError, match=message) as found:
            load_sae(str(path))
        assert "\n" not in str(found.value)

    without = {name: value for name, value in weights().items() if name != "b_pre"}
    refused(saved(tmp_path / "a.pt", without), r"its model_state lacks b_pre: pass such an SAE, or a folder")
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", r"is not an SAE of the paper's training script")
    refused(saved(tmp_path / "b.pt", weights() | {"b_pre": torch.ones(3)}), r"do not fit together \(.*b_pre \[3\]\)")
    refused(saved(tmp_path / "c.pt", d_sae=65), r"has 64 latents, but its config says d_sae = 65")
    refused(saved(tmp_path / "sae_layer12_final.pt", layer=3), r"of layer 12 by its name, but of layer 3 by its config")
    refused(saved(tmp_path / "d.pt", layer="three"), r"names the layer 'three', which is not a whole number")
    (tmp_path / "e.pt").write_bytes(b"no archive")
    refused(tmp_path / "e.pt", r"cannot be loaded \(.*\): save it again with the paper's training script")
    refused(saved(tmp_path / "f.pt", folder=tmp_path), r"cannot be loaded \(.*\): save it again")  # a Path is no number


def test_a_file_that_runs_code_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Harmful:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    with pytest.raises(DictionaryError, match="cannot be loaded"):
        load_sae(str(saved(tmp_path / "sae_layer01_final.pt", harm=Harmful())))
    assert not ran.exists()


def test_on_the_command_line(
    setup: Path, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "sae_layer01_final.pt")
    shutil.copy(tmp_path / "sae_layer01_final.pt", tmp_path / "final.pt")
    common = ["--model", setup / "model", "--source", setup / "text.jsonl", "--tokens", 400, "--max-fvu", "inf"]
    code, _, error = cli("measure", *common, "--sae", "sae_layer01_final.pt", "--out", "named")
    assert code == 0, error
    code, _, error = cli("measure", *common, "--sae", "final.pt", "--out", "unnamed")
    assert code == 2
    assert "does not name its hook point: pass it as --sae HOOK=final.pt" in error
    assert not (tmp_path / "unnamed").exists()
    code, _, error = cli("measure", *common, "--sae", f"{HOOK}=final.pt", "--out", "told")
    assert code == 0, error
    named, told = (Measurement.load(tmp_path / name)[HOOK] for name in ("named", "told"))
    assert named.sae_digest == told.sae_digest
    assert named.summary.l0 == told.summary.l0
