"""Every architecture in each of its forms, by the trials that write the table of docs/architectures.md; and what an
architecture that nobody knows is told.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Cli
from transformers import BioGptConfig, CohereConfig, CohereForCausalLM

from tl_capacity.errors import CapacityError, HookPointError
from tl_capacity.models.loading import LoadedModel
from tl_capacity.plugins import unregister_plugin

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("write_families", ROOT / "docs" / "write_families.py")
assert SPEC is not None
assert SPEC.loader is not None
write_families: Any = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = write_families  # its dataclass looks for its module there
SPEC.loader.exec_module(write_families)

BOTH_CLASSES = ("GPT-NeoX, Pythia", "GPT-2", "OPT", "Llama, SmolLM2", "Qwen 3", "Gemma 2")


@pytest.fixture
def tiny(request: pytest.FixtureRequest) -> Iterator[Any]:
    with write_families.tiny_model(request.param) as made:
        yield made


@pytest.mark.parametrize("tiny", BOTH_CLASSES, indirect=True)
def test_each_form_counts_what_a_dense_computation_does_and_all_agree_in_nats(tiny: Any) -> None:
    forms = list(write_families.forms(tiny))
    assert [type(form).__name__ for form in forms[1:]] == ["TransformerBridge", "HookedTransformer"]
    for trial in ("hugging_face", "bridge", "hooked_transformer", "stops", "gradient"):
        getattr(write_families, trial)(tiny)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", write_families.ARCHITECTURES)
def test_the_table_says_what_works(architecture: str) -> None:
    page = write_families.PAGE.read_text(encoding="utf-8")
    found = write_families.reasons(architecture)
    assert write_families.row(architecture, found) in page, "run `python docs/write_families.py`"
    assert write_families.why_not(architecture, found) in page, "run `python docs/write_families.py`"


def test_the_table_has_every_architecture() -> None:
    page = write_families.PAGE.read_text(encoding="utf-8")
    rows = page.split(write_families.BEGIN)[1].split("\n\n")[0].splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(write_families.ARCHITECTURES)


@pytest.mark.slow
def test_a_stale_table_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "families.md"
    page.write_text(f"before\n{write_families.BEGIN}{write_families.END}after\n", encoding="utf-8")
    monkeypatch.setattr(write_families, "PAGE", page)
    monkeypatch.setattr(write_families, "ARCHITECTURES", {"GPT-2": write_families.ARCHITECTURES["GPT-2"]})
    assert write_families.main(["--check"]) == 1
    assert write_families.main([]) == 0
    assert write_families.main(["--check"]) == 0
    content = page.read_text(encoding="utf-8")
    assert content.startswith("before\n")
    assert content.endswith("after\n")
    page.write_text(content.replace("yes", "no", 1), encoding="utf-8")
    assert write_families.main(["--check"]) == 1


def test_a_bridge_that_is_not_its_model(tokenizer: Any) -> None:
    """That of Cohere's models in TransformerLens 3.9."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CohereForCausalLM(CohereConfig(**write_families.SHARED, **small)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) / 10)
    model.config.architectures = [type(model).__name__]  # as a saved model has it
    with pytest.raises(CapacityError, match=r"'cohere' is not the same model, as its logits are off by \d+% of"):
        _ = LoadedModel(model, tokenizer, "local/cohere", None).bridge


def test_an_architecture_that_nobody_knows(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
    }
    monkeypatch.setitem(write_families.ARCHITECTURES, "BioGPT", lambda: BioGptConfig(**write_families.SHARED, **small))
    unknown = (
        r"TransformerLens cannot bridge 'biogpt' \(Could not determine .* from config\): register a model family"
        r" \(docs/families.md\), and tap a residual"
    )
    with write_families.tiny_model("BioGPT") as tiny:
        with pytest.raises(HookPointError, match=r"no model family covers 'biogpt': register one \(docs/families.md\)"):
            write_families.hugging_face(tiny)
        for trial in (write_families.bridge, write_families.measure):
            with pytest.raises(CapacityError, match=unknown):
                trial(tiny)
        with pytest.raises(
            CapacityError,
            match=r"no model family knows how to build students of 'biogpt': register one \(docs/families.md\)",
        ):
            write_families.distill(tiny)
        plugin = tiny.folder / "biogpt.py"
        plugin.write_text(
            "from tl_capacity import hookimpl\n"
            "from tl_capacity.interfaces import ModelFamily\n\n"
            "@hookimpl\n"
            "def register_model_families(register):\n"
            "    register(ModelFamily('biogpt', ('biogpt',), 'biogpt.layers'))\n"
        )
        sae = f"{write_families.HOOK}={tiny.folder / 'sae'}"
        measure = [
            "measure",
            "--model",
            tiny.folder,
            "--sae",
            sae,
            *write_families.source(tiny),
            "--max-fvu",
            "inf",
            "--out",
            tiny.folder / "measured",
        ]
        try:
            code, _, err = cli("--plugin", plugin, *measure)
        finally:
            unregister_plugin(str(plugin))
        assert (code, err) == (0, "")
        tiny.compare(write_families.Measurement.load(tiny.folder / "measured"))
