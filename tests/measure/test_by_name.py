"""What a session names instead of loading it: SAEs, bases and text, the same as when they are loaded by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

import tl_capacity as tlc
from tl_capacity.dictionaries.bases import BasisSpec
from tl_capacity.dictionaries.releases import releases_for
from tl_capacity.errors import CapacityError, DictionaryError, TokenSourceError
from tl_capacity.hookspecs import hookimpl
from tl_capacity.interfaces import NamedModel
from tl_capacity.models.loading import load_model
from tl_capacity.plugins import register_plugin, unregister_plugin
from tl_capacity.text.streams import TokenStream

HOOK, LATER = "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"
KINDS = ("HookedTransformer", "TransformerBridge", "gpt_neox")
Make = Callable[..., Any]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, models_by_kind: dict[str, Any]) -> Any:
    return models_by_kind[request.param]


def called(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model under another name, as `from_pretrained` gives it one."""
    config, field = (model.cfg, "model_name") if hasattr(model, "cfg") else (model.config, "name_or_path")
    monkeypatch.setattr(config, field, name)
    return model


def same_counts(mine: Any, theirs: Any) -> None:
    assert [(h.hook, h.sae_digest) for h in mine] == [(h.hook, h.sae_digest) for h in theirs]
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(one.summary.arrays["counts"], other.summary.arrays["counts"])


@pytest.fixture
def folder(make_sae: Make, tmp_path: Path) -> Path:
    make_sae("standard", HOOK).save_model(tmp_path / "sae")
    return tmp_path / "sae"


@pytest.fixture
def text(tmp_path: Path, texts: list[str]) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return path


@pytest.fixture
def registered(folder: Path, text: Path, tokenizer: Any) -> Iterator[None]:
    """A model named `tiny`, with an SAE and text of its own."""

    class Plugin:
        @hookimpl
        def register_models(self, register: Callable[[NamedModel], None]) -> None:
            register(NamedModel("tiny", lambda: (None, tokenizer), saes={HOOK: folder}, corpus=str(text)))

    register_plugin(Plugin(), "tiny")
    yield
    unregister_plugin("tiny")


class TestWithoutAnArgument:
    @pytest.mark.parametrize("kind", ["HookedSAETransformer", "SAETransformerBridge"])
    def test_the_saes_that_the_model_carries(
        self, make_model: Make, make_sae: Make, tokens: torch.Tensor, kind: str
    ) -> None:
        model, saes = make_model(kind), [make_sae("standard", HOOK), make_sae("topk", LATER)]
        for sae in saes:
            model.add_sae(sae, use_error_term=True)
        with model.add_capacity_hooks() as capacity:
            mine = capacity.run(tokens).measurement()
        model.reset_saes()
        with model.add_capacity_hooks(saes) as capacity:
            same_counts(mine, capacity.run(tokens).measurement())

    @pytest.mark.usefixtures("registered")
    def test_the_saes_that_come_with_its_name(
        self, model: Any, make_sae: Make, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        called(model, "tiny", monkeypatch)
        with tlc.add_capacity_hooks(model) as capacity:
            mine = capacity.run(tokens).measurement()
        with tlc.add_capacity_hooks(model, make_sae("standard", HOOK)) as capacity:
            same_counts(mine, capacity.run(tokens).measurement())
        assert [hook.sae for hook in mine] == [f"tiny/{HOOK}"], "as the command line names it"
        with tlc.add_capacity_hooks(model, mine[HOOK].sae) as capacity:
            same_counts(mine, capacity.run(tokens).measurement())

    def test_the_embedded_teacher(self) -> None:
        model = load_model("embedded").model
        with tlc.add_capacity_hooks(model) as capacity:
            found = capacity.run("embedded:heldout", 300, progress=False).measurement()
        assert [hook.sae for hook in found] == [f"embedded/blocks.{layer}.hook_resid_post" for layer in (1, 3, 5)]
        assert found.provenance.source == "embedded:heldout"
        assert found.provenance.settings["context"] == 256

    @pytest.mark.parametrize(
        ("name", "of"), [("gpt2", "gpt2-small"), ("google/gemma-2-9b", "gemma-2-9b"), ("gpt2-small", "gpt2-small")]
    )
    def test_releases_to_paste(self, neox: Any, name: str, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
        directory = get_pretrained_saes_directory()
        with pytest.raises(DictionaryError, match=f"none comes with the model {name!r}: pass one of") as refused:
            tlc.add_capacity_hooks(called(neox, name, monkeypatch))
        pasted = re.findall(r"'([^']+/[^']+)'", str(refused.value).partition(": ")[2])
        assert len(pasted) > 2
        for each in pasted:
            release, _, sae_id = each.partition("/")
            assert sae_id in directory[release].saes_map
            assert directory[release].model.rpartition("/")[2] in (of, name)
        own = {release for release, entry in directory.items() if entry.model in (of, name)}
        assert own <= {release.name for release in releases_for(name)[: len(own) + 20]}

    @pytest.mark.parametrize(("name", "near"), [("EleutherAI/pythia-410m", "pythia-70m"), ("x/y/z", "")])
    def test_releases_of_other_models(self, neox: Any, name: str, near: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(
            DictionaryError, match=r"none comes with the model .* pass a folder, RELEASE/SAE_ID"
        ) as says:
            tlc.add_capacity_hooks(called(neox, name, monkeypatch))
        assert ("which may be other models: '" in str(says.value)) == bool(near)
        assert near in str(says.value)


class TestByName:
    def test_folders(self, model: Any, folder: Path, make_sae: Make, tokens: torch.Tensor) -> None:
        with tlc.add_capacity_hooks(model, make_sae("standard", HOOK)) as capacity:
            wanted = capacity.run(tokens).measurement()
        for given in (str(folder), folder, [folder], {HOOK: str(folder)}, f"{HOOK}={folder}"):
            with tlc.add_capacity_hooks(model, given) as capacity:
                same_counts(capacity.run(tokens).measurement(), wanted)

    def test_beside_saes_in_memory(self, model: Any, folder: Path, make_sae: Make, tokens: torch.Tensor) -> None:
        with tlc.add_capacity_hooks(model, [folder, make_sae("topk", LATER), f"neurons:{HOOK},k=3"]) as capacity:
            found = capacity.run(tokens).measurement()
        assert [(h.hook, h.sae) for h in found] == [
            (HOOK, str(folder)),
            (LATER, "TopKSAE with 64 latents"),
            (HOOK, f"neurons:{HOOK},k=3"),
        ]
        assert found.hooks[2].summary.l0.value == 3

    def test_components_of_a_text(
        self, model: Any, text: Path, tokenizer: Any, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream = TokenStream(str(text), tokenizer, CONTEXT)
        basis = BasisSpec("pca", HOOK, 4).fit(model, stream, progress=False)
        with tlc.add_capacity_hooks(model, f"pca:{HOOK},k=4", text=stream) as capacity:
            mine = capacity.run(tokens).measurement()
        with tlc.add_capacity_hooks(model, basis) as capacity:
            same_counts(mine, capacity.run(tokens).measurement())

    @pytest.mark.usefixtures("registered")
    def test_components_of_the_model_s_own_text(
        self, neox: Any, text: Path, tokenizer: Any, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream = TokenStream(str(text), tokenizer, CONTEXT)
        called(neox, "tiny", monkeypatch)
        basis = BasisSpec("pca", HOOK, 4).fit(neox, stream, progress=False)
        with tlc.add_capacity_hooks(neox, f"pca:{HOOK},k=4") as capacity:
            mine = capacity.run(tokens).measurement()
        with tlc.add_capacity_hooks(neox, basis) as capacity:
            same_counts(mine, capacity.run(tokens).measurement())

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ("gpt2-small-res-jb/blocks.99.hook_resid_pre", "has no SAE 'blocks.99.hook_resid_pre': choose one of its"),
            ("nowhere", "there is no folder 'nowhere'"),
            (f"pca:{HOOK}", "needs text to be fitted to, and no text comes with the model"),
            ({LATER: f"neurons:{HOOK}"}, f"is a basis of {HOOK}, but is given for {LATER}"),
            ("pca:", "names no basis"),
        ],
    )
    def test_what_cannot_be_had(self, model: Any, given: Any, says: str) -> None:
        with pytest.raises(CapacityError, match=re.escape(says)):
            tlc.add_capacity_hooks(model, given)


class TestTextByName:
    @pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge"])
    def test_with_the_model_s_tokenizer(
        self, models_by_kind: dict[str, Any], make_sae: Make, text: Path, tokenizer: Any, kind: str
    ) -> None:
        model, sae = models_by_kind[kind], make_sae("standard", HOOK)
        for source in (str(text), text):
            with tlc.add_capacity_hooks(model, sae) as capacity:
                mine = capacity.run(source).measurement()
            with tlc.add_capacity_hooks(model, sae) as capacity:
                theirs = capacity.run(TokenStream(str(text), tokenizer, CONTEXT)).measurement()
            same_counts(mine, theirs)
            assert mine.provenance.difference(theirs.provenance) is None

    def test_with_the_tokenizer_beside_a_folder(
        self, neox: Any, make_sae: Make, text: Path, tokenizer: Any, tmp_path: Path
    ) -> None:
        neox.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        model = type(neox).from_pretrained(tmp_path / "model")
        with tlc.add_capacity_hooks(model, make_sae("standard", HOOK)) as capacity:
            mine = capacity.run(text).measurement()
        with tlc.add_capacity_hooks(neox, make_sae("standard", HOOK)) as capacity:
            same_counts(mine, capacity.run(TokenStream(str(text), tokenizer, CONTEXT)).measurement())

    def test_without_any(self, neox: Any, make_sae: Make, text: Path) -> None:
        with (
            tlc.add_capacity_hooks(neox, make_sae("standard", HOOK)) as capacity,
            pytest.raises(TokenSourceError, match=r"the model has no tokenizer, and none can be loaded by its name"),
        ):
            capacity.run(text)

    def test_a_source_that_is_none(self, hooked: Any, make_sae: Make) -> None:
        with (
            tlc.add_capacity_hooks(hooked, make_sae("standard", HOOK)) as capacity,
            pytest.raises(TokenSourceError, match=r"nothing\.jsonl"),
        ):
            capacity.run("nothing.jsonl")
