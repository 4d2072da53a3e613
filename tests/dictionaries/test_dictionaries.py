"""Dictionaries in plain torch against formulas written out, against SAELens and scikit-learn; files of other trainers,
laid out here as those write them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from commands import Cli
from conftest import BOS, D_MODEL
from place import placed
from safetensors.torch import save_file
from sklearn.decomposition import PCA
from torch import nn

import tl_capacity as tlc
from tl_capacity.dictionaries.adapter import check_dictionary, dictionary_digest, target_hook
from tl_capacity.dictionaries.bases import BasisSpec, NeuronBasis, PCABasis, activations
from tl_capacity.dictionaries.dictionary import Dictionary
from tl_capacity.dictionaries.formats import read_sae_lens, sparsify_hooks
from tl_capacity.dictionaries.loading import load_sae
from tl_capacity.errors import CapacityError, DictionaryError, HookPointError
from tl_capacity.interfaces import SparseAutoencoder
from tl_capacity.models.loading import load_model
from tl_capacity.text.streams import TokenStream

MakeSAE = Callable[..., Any]
HOOK = "blocks.1.hook_resid_post"
D_SAE, K = 40, 5


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5


@pytest.fixture
def x() -> torch.Tensor:
    return random(30, D_MODEL, seed=9) * 2


def largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row, found by sorting, and zero elsewhere."""
    found = torch.zeros_like(values)
    for row, kept in zip(values, found, strict=True):
        for place in row.argsort(descending=True)[:k]:
            kept[place] = row[place]
    return found


class TestSparsify:
    """`cfg.json` and `sae.safetensors`: encoder.weight [feature, d], encoder.bias, W_dec [feature, d], b_dec and, with
    a skip connection, W_skip.
    """

    def weights(self) -> dict[str, torch.Tensor]:
        return {
            "encoder.weight": random(D_SAE, D_MODEL, seed=1),
            "encoder.bias": random(D_SAE, seed=2),
            "W_dec": random(D_SAE, D_MODEL, seed=3),
            "b_dec": random(D_MODEL, seed=4),
        }

    def save(self, folder: Path, weights: dict[str, torch.Tensor], **changes: Any) -> str:
        folder.mkdir(parents=True)
        config = {
            "activation": "topk",
            "expansion_factor": 32,
            "normalize_decoder": True,
            "num_latents": D_SAE,
            "k": K,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "d_in": D_MODEL,
        }
        (folder / "cfg.json").write_text(json.dumps(config | changes))
        save_file(weights, folder / "sae.safetensors")
        return str(folder)

    @pytest.mark.fidelity(
        source="sparsify", says="`activation: topk`, `k`", obeyed="the k largest latents of each token are kept"
    )
    def test_topk(self, tmp_path: Path, x: torch.Tensor) -> None:
        w = self.weights()
        _, sae = load_sae(self.save(tmp_path / "layers.1", w))
        z = largest(((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu(), K)
        torch.testing.assert_close(sae.encode(x), z)
        torch.testing.assert_close(sae.decode(z), z @ w["W_dec"] + w["b_dec"])
        assert isinstance(sae, SparseAutoencoder)
        assert sae.cfg.metadata.hook_name == HOOK
        assert target_hook(sae, HOOK) is None

    @pytest.mark.fidelity(
        source="sparsify", says="`activation: groupmax`, `k`", obeyed="the largest latent of each of k groups is kept"
    )
    def test_groupmax(self, tmp_path: Path, x: torch.Tensor) -> None:
        w = self.weights()
        _, sae = load_sae(self.save(tmp_path / "layers.1", w, activation="groupmax"))
        positive = ((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
        expected = torch.cat([largest(group, 1) for group in positive.split(D_SAE // K, dim=1)], dim=1)
        torch.testing.assert_close(sae.encode(x), expected)

    @pytest.mark.fidelity(
        source="sparsify",
        says="`transcode`, `skip_connection`",
        obeyed="its output, with the skip connection's part, is compared with the module's output",
    )
    def test_transcoder_with_a_skip_connection(self, tmp_path: Path, bridge: Any, tokens: torch.Tensor) -> None:
        w = self.weights() | {"W_skip": random(D_MODEL, D_MODEL, seed=5)}
        _, sae = load_sae(self.save(tmp_path / "layers.1.mlp", w, transcode=True, skip_connection=True))
        assert (sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out) == (
            "blocks.1.mlp.hook_in",
            "blocks.1.mlp.hook_out",
        )
        with tlc.add_capacity_hooks(bridge, sae, fvu_every=1, mask_token_ids=[BOS]) as capacity:
            summary = capacity.run(tokens.split(8)).measurement()["blocks.1.mlp.hook_in"].summary
        _, cache = bridge.run_with_cache(tokens)
        inputs, targets = (
            cache[name][tokens != BOS].cpu() for name in ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out")
        )
        z = largest(
            (inputs @ w["encoder.weight"].T + w["encoder.bias"]).relu(), K
        )  # a transcoder does not subtract b_dec, which is the output's
        written = z @ w["W_dec"] + w["b_dec"] + inputs @ w["W_skip"].T
        assert summary.arrays["counts"].sum() == (z != 0).sum()
        fvu = (targets - written).square().sum() / (targets - targets.mean(0)).square().sum()
        assert summary.fvu.value == pytest.approx(float(fvu), rel=1e-4)

    @pytest.mark.parametrize("name", ["layers.1", "layers.1/seed0"])
    def test_the_run_that_it_is_of(self, tmp_path: Path, name: str) -> None:
        run = {"model": "EleutherAI/pythia-70m", "dataset": "NeelNanda/pile-10k", "ctx_len": 256}
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text(json.dumps(run))
        said = load_sae(self.save(tmp_path / "run" / name, self.weights()))[1].cfg.metadata
        assert (said.model_name, said.dataset_path, said.context_size) == tuple(run.values())
        (tmp_path / "run" / "config.json").write_text(json.dumps({"model": {"type": "x"}, "ctx_len": "long"}))
        said = load_sae(str(tmp_path / "run" / name))[1].cfg.metadata
        assert (said.model_name, said.dataset_path, said.context_size) == (None, None, None)
        assert said.hook_name == HOOK

    @pytest.mark.parametrize(
        ("name", "transcodes", "reads", "writes"),
        [
            ("layers.11", False, "blocks.11.hook_resid_post", None),
            ("gpt_neox.layers.2", False, "blocks.2.hook_resid_post", None),
            ("h.0.mlp", False, "blocks.0.mlp.hook_out", None),
            ("layers.2.attention", False, "blocks.2.attn.hook_out", None),
            ("layers.2.self_attn", True, "blocks.2.attn.hook_in", "blocks.2.attn.hook_out"),
            ("layers.2.mlp.down_proj", False, "layers.2.mlp.down_proj", None),
            ("h.2.ln_2", True, "h.2.ln_2.input", "h.2.ln_2"),
            ("layers.2/seed1", False, "blocks.2.hook_resid_post", None),
            ("embed_tokens", False, "hook_embed", None),
            ("layers.2.mlp", True, "blocks.2.mlp.hook_in", "blocks.2.mlp.hook_out"),
            ("layers.2", True, "blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"),
            ("best", False, None, None),
        ],
    )
    def test_where_it_belongs(self, name: str, transcodes: bool, reads: str | None, writes: str | None) -> None:
        found = sparsify_hooks(Path("somewhere") / name, transcodes)
        assert (found.hook_name, found.hook_name_out) == (reads, writes)

    def test_bad_input(self, tmp_path: Path) -> None:
        whole = self.weights()
        with pytest.raises(DictionaryError, match="lack b_dec: save it again"):
            load_sae(self.save(tmp_path / "a", {k: v for k, v in whole.items() if k != "b_dec"}))
        with pytest.raises(DictionaryError, match=r"do not fit together \(.*W_dec \[39, 32\]"):
            load_sae(self.save(tmp_path / "b", whole | {"W_dec": random(D_SAE - 1, D_MODEL, seed=3)}))
        with pytest.raises(DictionaryError, match="k = 41 does not fit the 40 latents"):
            load_sae(self.save(tmp_path / "c", whole, k=41))
        with pytest.raises(DictionaryError, match="'softmax' is not an architecture that can be read"):
            load_sae(self.save(tmp_path / "d", whole, activation="softmax"))
        with pytest.raises(DictionaryError, match="largest latents of either sign"):
            load_sae(self.save(tmp_path / "e", whole, signed=True))
        for i, k in enumerate((5.5, True, "5", float("inf"), -1)):
            with pytest.raises(
                DictionaryError,
                match=rf"cannot be loaded \(k = {k!r} is not a whole number\): save it again with sparsify",
            ):
                load_sae(self.save(tmp_path / f"k{i}", whole, k=k))
        damaged = Path(self.save(tmp_path / "f", whole))
        (damaged / "sae.safetensors").write_bytes((damaged / "sae.safetensors").read_bytes()[:200])
        with pytest.raises(DictionaryError, match=r"cannot be loaded \(.*\): save it again with sparsify"):
            load_sae(str(damaged))


class TestDictionaryLearning:
    """`config.json` with trainer and buffer, and `ae.pt`, the state dictionary of one of its classes."""

    linear: ClassVar[dict[str, torch.Tensor]] = {
        "encoder.weight": random(D_SAE, D_MODEL, seed=1),
        "decoder.weight": random(D_MODEL, D_SAE, seed=3),
    }
    plain: ClassVar[dict[str, torch.Tensor]] = {
        "W_enc": random(D_MODEL, D_SAE, seed=1),
        "W_dec": random(D_SAE, D_MODEL, seed=3),
    }
    b_enc, b_dec = random(D_SAE, seed=2), random(D_MODEL, seed=4)
    gates: ClassVar[dict[str, torch.Tensor]] = {
        "r_mag": random(D_SAE, seed=5),
        "gate_bias": random(D_SAE, seed=6),
        "mag_bias": random(D_SAE, seed=7),
    }
    topk: ClassVar[dict[str, torch.Tensor]] = {
        "encoder.bias": b_enc,
        "b_dec": b_dec,
        "k": torch.tensor(K, dtype=torch.int),
        "threshold": torch.tensor(0.3),
    }
    states: ClassVar[dict[str, dict[str, torch.Tensor]]] = {
        "AutoEncoder": linear | {"bias": b_dec, "encoder.bias": b_enc},
        "AutoEncoderNew": linear | {"encoder.bias": b_enc, "decoder.bias": b_dec},
        "GatedAutoEncoder": linear | {"decoder_bias": b_dec, **gates},
        "AutoEncoderTopK": linear | topk,
        "BatchTopKSAE": linear | topk,
        "MatryoshkaBatchTopKSAE": (
            plain
            | {
                "b_enc": b_enc,
                **{k: v for k, v in topk.items() if k != "encoder.bias"},
                "group_sizes": torch.tensor([10, 30]),
            }
        ),
        "JumpReluAutoEncoder": plain | {"b_enc": b_enc, "b_dec": b_dec, "threshold": torch.full((D_SAE,), 0.4)},
    }

    def save(self, folder: Path, kind: str, **trainer: Any) -> str:
        folder.mkdir(parents=True)
        settings = {
            "dict_class": kind,
            "activation_dim": D_MODEL,
            "dict_size": D_SAE,
            "k": K,
            "layer": 1,
            "lm_name": "EleutherAI/pythia-70m",
        }
        content = {
            "trainer": {**settings, "submodule_name": "resid_post_layer_1", **trainer},
            "buffer": {"ctx_len": 128, "d_submodule": D_MODEL},
        }
        (folder / "config.json").write_text(json.dumps(content))
        torch.save(self.states[kind], folder / "ae.pt")
        return str(folder)

    def expected(self, kind: str, x: torch.Tensor) -> torch.Tensor:
        """Latents, from the formulas of each class's `encode`."""
        bare = self.linear["encoder.weight"].T if "encoder.weight" in self.states[kind] else self.plain["W_enc"]
        centred = x if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - self.b_dec
        if kind == "GatedAutoEncoder":
            open_gates = (centred @ bare + self.gates["gate_bias"]) > 0
            return open_gates * (self.gates["r_mag"].exp() * (centred @ bare) + self.gates["mag_bias"]).relu()
        z = (centred @ bare + self.b_enc).relu()
        if kind == "AutoEncoderTopK":
            return largest(z, K)
        if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            return torch.where(z > 0.3, z, 0)
        if kind == "JumpReluAutoEncoder":
            return torch.where(z > 0.4, z, 0)
        return z

    @pytest.mark.fidelity(
        source="dictionary_learning", says="`dict_class`", obeyed="latents follow that class's own formula"
    )
    @pytest.mark.parametrize("kind", states)
    def test_every_class(self, tmp_path: Path, x: torch.Tensor, kind: str) -> None:
        _, sae = load_sae(self.save(tmp_path / kind, kind))
        z, decoder = (
            self.expected(kind, x),
            (self.linear["decoder.weight"].T if "decoder.weight" in self.states[kind] else self.plain["W_dec"]),
        )
        assert 0 < (z != 0).float().mean() < 0.9
        norms = (
            decoder.norm(dim=1) if kind == "AutoEncoder" else torch.ones(D_SAE)
        )  # its own loader scales decoder vectors to norm 1
        torch.testing.assert_close(sae.encode(x), z * norms, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sae.decode(z * norms), z @ decoder + self.b_dec, rtol=1e-4, atol=1e-5)
        assert sae.cfg.metadata.hook_name == HOOK
        assert sae.cfg.metadata.context_size == 128
        assert sae.cfg.metadata.model_name == "EleutherAI/pythia-70m"

    def test_measured_like_any_other(self, tmp_path: Path, neox: Any, tokens: torch.Tensor) -> None:
        _, sae = load_sae(self.save(tmp_path / "trainer_0", "AutoEncoderTopK"))
        with tlc.add_capacity_hooks(neox, sae, importance=["gradient"], fvu_every=1) as capacity:
            found = capacity.run(tokens.split(8)).measurement()[HOOK]
        x = neox(tokens, output_hidden_states=True).hidden_states[2][tokens != BOS].detach().cpu()
        assert (
            found.summary.arrays["counts"].sum(0).tolist() == (self.expected("AutoEncoderTopK", x) != 0).sum(0).tolist()
        )
        assert found.importance("gradient").sum() > 0
        assert found.architecture == "topk"

    @pytest.mark.parametrize(
        ("trainer", "hook"),
        [
            ({"submodule_name": None}, HOOK),
            ({"submodule_name": "mlp_out_layer_1"}, "blocks.1.mlp.hook_out"),
            ({"submodule_name": "attention_1"}, "blocks.1.attn.hook_out"),
            ({"submodule_name": "something"}, None),
            ({"layer": None}, None),
        ],
    )
    def test_where_it_belongs(self, tmp_path: Path, trainer: dict[str, Any], hook: str | None) -> None:
        assert load_sae(self.save(tmp_path / "d", "AutoEncoder", **trainer))[1].cfg.metadata.hook_name == hook

    def test_bad_input(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(
            DictionaryError,
            match=r"'IdentityDict' of dictionary_learning, which cannot be read: choose one of AutoEncoder, ",
        ):
            load_sae(self.save(tmp_path / "a", "AutoEncoder", dict_class="IdentityDict"))
        for i, layer in enumerate((float("inf"), "1", 1.0, [1], True)):
            with pytest.raises(
                DictionaryError,
                match=r"cannot be loaded \(layer = .* is not a whole number\): save it again with dictionary_learning",
            ):
                load_sae(self.save(tmp_path / f"layer{i}", "AutoEncoder", layer=layer))
        folder = Path(self.save(tmp_path / "ctx", "AutoEncoder"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "buffer": {"ctx_len": "x"}}))
        with pytest.raises(DictionaryError, match="ctx_len = 'x' is not a whole number"):
            load_sae(str(folder))
        folder = Path(self.save(tmp_path / "b", "BatchTopKSAE"))
        torch.save(self.states["BatchTopKSAE"] | {"threshold": torch.tensor(-1.0)}, folder / "ae.pt")
        with pytest.raises(DictionaryError, match="before its threshold was set"):
            load_sae(str(folder))
        (folder / "ae.pt").write_bytes(b"no archive")
        with pytest.raises(DictionaryError, match=r"cannot be loaded \(.*\): save it again with dictionary_learning"):
            load_sae(str(folder))

    def test_a_pickle_that_runs_code_is_not_run(self, tmp_path: Path) -> None:
        folder = Path(self.save(tmp_path / "a", "AutoEncoder"))
        ran = tmp_path / "ran"

        class Harmful:
            def __reduce__(self) -> Any:
                return (Path.touch, (ran,))

        torch.save({"encoder.weight": Harmful()}, folder / "ae.pt")
        with pytest.raises(DictionaryError, match="cannot be loaded"):
            load_sae(str(folder))
        assert not ran.exists()


@pytest.mark.fidelity(
    source="sparsify",
    says="`model` and `ctx_len` of the run's `config.json`",
    obeyed="rows are as long as in training; a warning names another model",
)
@pytest.mark.fidelity(
    source="dictionary_learning",
    says="`lm_name`, `ctx_len`",
    obeyed="rows are as long as in training; a warning names another model",
)
@pytest.mark.parametrize("trainer", ["sparsify", "dictionary_learning"])
def test_the_model_and_the_rows_that_it_names(
    tmp_path: Path, setup: Path, cli: Cli, caplog: pytest.LogCaptureFixture, trainer: str
) -> None:
    if trainer == "sparsify":
        folder = TestSparsify().save(tmp_path / "run" / "layers.1", TestSparsify().weights())
        run = {"model": "EleutherAI/pythia-70m", "ctx_len": 12}
        (tmp_path / "run" / "config.json").write_text(json.dumps(run))
    else:
        folder = TestDictionaryLearning().save(tmp_path / "trainer_0", "AutoEncoderTopK")
        config = json.loads((tmp_path / "trainer_0" / "config.json").read_text())
        (tmp_path / "trainer_0" / "config.json").write_text(json.dumps({**config, "buffer": {"ctx_len": 12}}))
    options = ["--source", setup / "text.jsonl", "--tokens", "200", "--max-fvu", "inf", "--out", tmp_path / "out"]
    code, _, error = cli("measure", "--model", setup / "model", "--sae", folder, *options)
    assert code == 0, error
    assert "says that it was trained on 'EleutherAI/pythia-70m'" in caplog.text
    assert tlc.Measurement.load(tmp_path / "out").provenance.settings["context"] == 12


class TestSAELensFoldersWithoutSAELens:
    @pytest.mark.parametrize("architecture", ["standard", "standard_with_input_bias", "topk", "jumprelu"])
    def test_equal_to_saelens(self, tmp_path: Path, make_sae: MakeSAE, x: torch.Tensor, architecture: str) -> None:
        theirs = make_sae(architecture, HOOK)
        theirs.save_model(tmp_path / "sae")
        mine = read_sae_lens(tmp_path / "sae")
        mine, x = placed(mine), placed(x)
        torch.testing.assert_close(mine.encode(x), theirs.encode(x))
        torch.testing.assert_close(mine.decode(mine.encode(x)), theirs.decode(theirs.encode(x)))
        assert mine.cfg.metadata.hook_name == HOOK
        assert dictionary_digest(mine) == dictionary_digest(theirs)

    def test_altered_fields_are_refused(self, tmp_path: Path, make_sae: MakeSAE) -> None:
        make_sae("topk", HOOK).save_model(tmp_path / "sae")
        config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
        for changes in (
            {"k": 5.5},
            {"apply_b_dec_to_input": "x"},
            {"metadata": {"hook_name": 3}},
            {"metadata": {"context_size": [1]}},
            {"metadata": []},
        ):
            (tmp_path / "sae" / "cfg.json").write_text(json.dumps({**config, **changes}))
            with pytest.raises(ValueError, match=r"is not (a whole number|true or false|a text|an object)"):
                read_sae_lens(tmp_path / "sae")

    @pytest.mark.parametrize("architecture", ["layer_norm", "gated", "matching_pursuit"])
    def test_what_it_cannot_read_is_refused(self, tmp_path: Path, make_sae: MakeSAE, architecture: str) -> None:
        make_sae(architecture, HOOK).save_model(tmp_path / "sae")
        with pytest.raises(DictionaryError, match="cannot be read without SAELens"):
            read_sae_lens(tmp_path / "sae")


class TestNeurons:
    def test_each_dimension_is_a_feature(self, x: torch.Tensor) -> None:
        basis = NeuronBasis(D_MODEL, HOOK)
        check_dictionary(basis, HOOK)
        torch.testing.assert_close(basis.encode(x), x)
        torch.testing.assert_close(basis.decode(x), x)
        torch.testing.assert_close(basis.W_dec, torch.eye(D_MODEL))

    def test_the_largest_of_either_sign_are_kept(self, x: torch.Tensor) -> None:
        kept = NeuronBasis(D_MODEL, HOOK, k=4).encode(x)
        torch.testing.assert_close(kept.abs(), largest(x.abs(), 4))
        assert (kept < 0).any()
        with pytest.raises(
            DictionaryError, match=r"k = 33 does not fit the neurons basis at .*: choose a number from 1 to its 32"
        ):
            NeuronBasis(D_MODEL, HOOK, k=33)


class TestPCA:
    @pytest.fixture
    def stretched(self) -> torch.Tensor:
        """Activations far from the origin with a clear order of variances."""
        return (
            random(500, D_MODEL, seed=0)
            * torch.linspace(3, 0.2, D_MODEL)
            @ torch.linalg.qr(random(D_MODEL, D_MODEL, seed=1))[0]
            + 7
        )

    def basis(self, x: torch.Tensor, k: int | None = None) -> PCABasis:
        return PCABasis(x.double().mean(0), torch.cov(x.double().T), HOOK, k)

    def test_equal_to_scikit_learn(self, stretched: torch.Tensor) -> None:
        basis, reference = self.basis(stretched), PCA().fit(stretched.numpy(force=True))
        for mine, theirs in zip(basis.W_dec.numpy(force=True), reference.components_, strict=True):
            assert abs(float(mine @ theirs)) == pytest.approx(1, abs=1e-3)
        np.testing.assert_allclose(
            basis.encode(stretched).abs().numpy(force=True),
            np.abs(reference.transform(stretched.numpy(force=True))),
            atol=0.02,
        )
        torch.testing.assert_close(basis.decode(basis.encode(stretched)), stretched, atol=1e-4, rtol=1e-4)

    def test_signs_are_settled(self, stretched: torch.Tensor) -> None:
        rows = self.basis(stretched).W_dec
        assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()
        torch.testing.assert_close(rows, self.basis(-stretched).W_dec, rtol=1e-3, atol=1e-4)

    def test_keeping_k_loses_what_the_rest_holds(self, stretched: torch.Tensor) -> None:
        whole, kept = self.basis(stretched).encode(stretched), self.basis(stretched, k=6).encode(stretched)
        assert ((kept != 0).sum(1) == 6).all()
        lost = (self.basis(stretched, k=6).decode(kept) - stretched).square().sum(1)
        torch.testing.assert_close(lost, whole.square().sort(dim=1).values[:, :-6].sum(1), rtol=1e-3, atol=1e-3)

    def test_fitted_to_a_model(self, neox: Any, tokenizer: Any, texts: list[str]) -> None:
        stream = TokenStream(texts, tokenizer, context=32, batch_rows=4)
        fitted = BasisSpec("pca", HOOK).fit(neox, stream, tokens=10**9)
        x = torch.cat(list(activations(neox, HOOK, stream)))
        reference = PCA().fit(x.double().numpy(force=True))
        np.testing.assert_allclose(fitted.b_dec.numpy(force=True), reference.mean_, rtol=1e-4, atol=1e-5)
        assert min(abs(np.diag(fitted.W_dec.numpy(force=True) @ reference.components_.T))) == pytest.approx(1, abs=1e-2)

    def test_only_the_first_tokens(self, neox: Any, tokenizer: Any, texts: list[str]) -> None:
        stream = TokenStream(texts, tokenizer, context=32, batch_rows=4)
        first = next(activations(neox, HOOK, stream))
        few = BasisSpec("pca", HOOK).fit(neox, stream, tokens=len(first))
        np.testing.assert_allclose(few.b_dec.numpy(force=True), first.mean(0).numpy(force=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("neurons:blocks.3.mlp.hook_post", BasisSpec("neurons", "blocks.3.mlp.hook_post")),
        ("pca:blocks.3.hook_resid_post,k=24", BasisSpec("pca", "blocks.3.hook_resid_post", 24)),
        ("gpt2-small-res-jb/blocks.8.hook_resid_pre", None),
        ("pca", None),
        ("blocks.1.hook_resid_post=folder", None),
    ],
)
def test_specifications(spec: str, expected: BasisSpec | None) -> None:
    assert BasisSpec.parse(spec) == expected
    assert expected is None or str(expected) == spec


def test_bad_specifications(neox: Any, tokenizer: Any) -> None:
    for spec in ("pca:", "neurons:blocks.3.mlp.hook_post,k=", "pca:blocks.3.hook_resid_post;k=3"):
        with pytest.raises(DictionaryError, match="names no basis: write"):
            BasisSpec.parse(spec)
    stream = TokenStream(["w1 w2 w3"], tokenizer)
    with pytest.raises(HookPointError, match="is not a hook point that the family of"):
        BasisSpec("pca", "blocks.1.ln2.hook_normalized").fit(neox, stream)
    with pytest.raises(HookPointError, match=r"such as .*blocks\.1\.hook_resid_post.*, or wrap"):
        BasisSpec("pca", "blocks.1.hook_resid").fit(neox, stream)
    with pytest.raises(CapacityError, match="has no token to count"):
        BasisSpec("neurons", HOOK).fit(neox, TokenStream(np.full((2, 5), BOS), tokenizer))


def test_a_dictionary_of_ones_own(neox: Any, tokens: torch.Tensor) -> None:
    """The protocol alone, with none of this package's or SAELens' classes."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W_dec = nn.Parameter(random(D_SAE, D_MODEL, seed=3))
            self.cfg = type("Config", (), {"d_in": D_MODEL, "d_sae": D_SAE})()

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.W_dec.T - 2).relu()

        def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
            return feature_acts @ self.W_dec

    own = placed(Own())
    with tlc.add_capacity_hooks(neox, {HOOK: own}, importance=["gradient"], fvu_every=1) as capacity:
        found = capacity.run(tokens.split(8)).measurement()[HOOK]
    x = neox(tokens, output_hidden_states=True).hidden_states[2][tokens != BOS].detach()
    assert found.summary.arrays["counts"].sum() == (own.encode(x) != 0).sum()
    assert found.importance("gradient").sum() > 0
    decoder = own.W_dec.detach()
    same = Dictionary(
        "standard",
        {
            "W_enc": decoder.T,
            "b_enc": decoder.new_full((D_SAE,), -2),
            "W_dec": decoder,
            "b_dec": decoder.new_zeros(D_MODEL),
        },
    )
    with tlc.add_capacity_hooks(neox, {HOOK: same}) as capacity:
        assert (
            capacity.run(tokens.split(8)).measurement()[HOOK].summary.arrays["counts"] == found.summary.arrays["counts"]
        ).all()


def test_a_basis_is_fitted_again_as_it_was(setup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the text of the measurement: rows as long as an SAE beside it wants them, and batches of as many rows."""
    from sae_lens import SAE

    from tl_capacity.measure.job import measure
    from tl_capacity.measure.settings import MeasureSettings
    from tl_capacity.measure.setup import measured_dictionary

    sae = SAE.load_from_disk(setup / "sae")
    sae.cfg.metadata.context_size = 12
    sae.save_model(tmp_path / "sae")
    monkeypatch.setattr(BasisSpec, "fit", partialmethod(BasisSpec.fit, tokens=50))
    measurement = measure(
        MeasureSettings(
            str(setup / "model"),
            tmp_path / "m",
            (str(tmp_path / "sae"), f"pca:{HOOK},k=4"),
            tokens=300,
            source=str(setup / "text.jsonl"),
            batch_rows=3,
            progress=False,
        )
    )
    assert measurement.provenance.settings["context"] == 12
    for measured in measurement:
        found = measured_dictionary(measured, load_model(str(setup / "model")), measurement.provenance)
        assert dictionary_digest(found) == measured.sae_digest
