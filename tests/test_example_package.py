"""The example package as a stranger would install it: into an environment of its own, and then all that it adds through
the command line.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tl_capacity import Measurement

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parent.parent / "examples" / "tl-capacity-example"
HOOK = "blocks.1.hook_resid_post"
Command = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("example")


@pytest.fixture(scope="module")
def command(folder: Path) -> Command:
    """Runs `tl-capacity` in a fresh environment that has the example installed, and returns what it prints."""
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    (packages,) = folder.glob("venv/lib/python*/site-packages")
    # The heavy packages are shared; `addsitedir` also heeds the .pth files among them, as that of an editable
    # tl-capacity.
    (packages / "shared.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    shutil.copytree(EXAMPLE, folder / "source")  # a build leaves files beside its source
    install = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", folder / "source"]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)

    def run(*arguments: object) -> str:
        found = subprocess.run(
            [python, "-m", "tl_capacity", *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stderr
        return found.stdout

    return run


@pytest.fixture(scope="module")
def measurement(command: Command, folder: Path) -> Path:
    command(
        "measure",
        "--model",
        "embedded",
        "--tokens",
        4000,
        "--importance",
        "mean_ablation",
        "--out",
        folder / "measured",
    )
    return folder / "measured"


@pytest.fixture(scope="module")
def bloom(folder: Path) -> Path:
    """A tiny random BLOOM with a tokenizer, an SAE and text."""
    from sae_lens import TopKSAE, TopKSAEConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    BloomForCausalLM(
        BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(folder / "bloom")
    words = Tokenizer(models.WordLevel({"<s>": 0, **{f"w{i}": i for i in range(1, 50)}}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>").save_pretrained(folder / "bloom")
    TopKSAE(TopKSAEConfig(d_in=32, d_sae=64, k=4)).save_model(str(folder / "bloom" / "sae"))
    texts = np.random.default_rng(0).integers(1, 50, size=(100, 31))
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(f"w{i}" for i in text)}) + "\n" for text in texts)
    )
    return folder / "bloom"


def test_all_six_are_listed(command: Command) -> None:
    found = json.loads(command("plugins", "--json"))
    assert {(row["kind"], row["name"]) for row in found["plugins"] if row["from"] == "example"} == {
        ("importance estimator", "mean_ablation"),
        ("capacity law", "antipodal"),
        ("floor predictor", "lost_share"),
        ("model family", "bloom"),
        ("concept", "asks"),
        ("recipe", "compare-importance"),
    }
    assert found["failures"] == {}


def test_the_estimator_and_the_law_predict_floors(command: Command, measurement: Path) -> None:
    floors = json.loads(
        command(
            "floor", measurement, "--widths", "16,64", "--importance", "mean_ablation", "--law", "antipodal", "--json"
        )
    )
    for floor in floors:
        summary = Measurement.load(measurement)[floor["hook"]].summary
        n, z, squares = summary.n_tokens, summary.arrays["sums"].sum(0), summary.arrays["squares"].sum(0)
        importance = ((squares / n - (z / n) ** 2) * summary.arrays["decoder_norm"] ** 2)[summary.alive]
        lost = np.sort(importance)[::-1][
            2 * floor["width"] :
        ].sum()  # two features for each of the student's dimensions
        assert floor["predicted_floor"] == pytest.approx(lost, rel=1e-6)
        assert floor["unit"] == "activation²"
    assert {floor["width"] for floor in floors} == {16, 64}


def test_the_recipe_compares(command: Command, measurement: Path, folder: Path) -> None:
    out = folder / "compared.json"
    printed = command(
        "run",
        "compare-importance",
        "--measurement",
        measurement,
        "--importance",
        "second_moment,firing_rate",
        "--out",
        out,
    )
    found = json.loads(out.read_text())["rank_correlation"]
    for at in Measurement.load(measurement):
        assert found[at.hook] == pytest.approx(
            spearmanr(at.importance("second_moment"), at.importance("firing_rate")).statistic
        )
        assert f"{at.hook}: rank correlation {found[at.hook]:.3f}" in printed


def test_the_family_is_measured_and_distilled(command: Command, bloom: Path, folder: Path) -> None:
    text = ["--source", folder / "texts.jsonl", "--context", 32]
    command(
        "measure",
        "--model",
        bloom,
        "--sae",
        f"{HOOK}={bloom / 'sae'}",
        *text,
        "--tokens",
        3000,
        "--max-fvu",
        "inf",
        "--out",
        folder / "bloom-measured",
    )
    summary = Measurement.load(folder / "bloom-measured")[HOOK].summary
    assert summary.arrays["counts"].sum() == 4 * summary.n_tokens, "TopK has four active latents on each token"
    size = ["--widths", "16", "--tokens", 1500, "--heldout-tokens", 90, "--evaluations", 2]
    command("run", "distill", "--teacher", bloom, *text, *size, "--out", folder / "bloom-students")
    assert "16" in (folder / "bloom-students" / "distillation.json").read_text()


def test_the_concept_is_probed_for(command: Command, folder: Path) -> None:
    command("run", "probe", "--model", "embedded", "--concepts", "asks", "--no-baselines", "--out", folder / "probed")
    assert (folder / "probed" / "probes.json").exists()
