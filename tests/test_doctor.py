"""The doctor: for each check a set-up in which it finds something, and a healthy one in which it finds nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import HOOK, Cli, arguments

from tl_capacity import Measurement
from tl_capacity.doctor import CHANGE, OK, STOP, Finding, costs, examine, examine_folder
from tl_capacity.doctor.examination import settings_of
from tl_capacity.errors import CapacityError
from tl_capacity.measure.job import measure
from tl_capacity.measure.settings import MeasureSettings

pytestmark = pytest.mark.usefixtures("few_replicates")


@pytest.fixture
def settings(setup: Path, tmp_path: Path) -> MeasureSettings:
    return MeasureSettings(
        model=str(setup / "model"), out=tmp_path / "out", saes=(str(setup / "sae"),), source=str(setup / "text.jsonl")
    )


@pytest.fixture
def sae_with(setup: Path, tmp_path: Path) -> Callable[..., str]:
    """`sae_with(change, **metadata)`: a copy of the SAE that fits, changed."""

    def make(change: Callable[[Any], None] = lambda sae: None, **metadata: Any) -> str:
        from sae_lens import SAE

        sae = SAE.load_from_disk(setup / "sae")
        for name, value in metadata.items():
            setattr(sae.cfg.metadata, name, value)
        with torch.no_grad():
            change(sae)
        sae.save_model(tmp_path / "changed")
        return str(tmp_path / "changed")

    return make


def worst(findings: list[Finding], check: str) -> Finding:
    """The worst of what a check found."""
    return max((f for f in findings if f.check == check), key=lambda f: (OK, CHANGE, STOP).index(f.level))


def test_a_healthy_set_up(settings: MeasureSettings) -> None:
    findings = examine(settings)
    checks = [
        "model",
        "SAE",
        "context",
        "BOS",
        "vocabulary",
        "hook",
        "first position",
        "FVU",
        "duration",
        "memory",
        "disk",
    ]
    assert [(f.check, f.level) for f in findings] == [(check, OK) for check in checks]
    assert not settings.out.exists()


@pytest.mark.parametrize(
    ("change", "check", "says"),
    [
        ({"model": "./nowhere"}, "model", "is neither a folder nor a hub id"),
        ({"saes": ("./nowhere",)}, "SAE", "there is no folder"),
        ({"saes": ()}, "SAE", "no SAE was given"),
        ({"source": "missing.txt"}, "text", "there is no file"),
        ({"source": None}, "text", "no text to measure"),
        ({"context": 64}, "text", "longer than the model's 32"),
    ],
)
def test_what_is_not_there(settings: MeasureSettings, change: dict[str, Any], check: str, says: str) -> None:
    finding = worst(examine(replace(settings, **change)), check)
    assert finding.level == STOP
    assert says in finding.says


def test_rows_longer_than_those_the_sae_knows(settings: MeasureSettings, sae_with: Callable[..., str]) -> None:
    known = replace(settings, saes=(sae_with(context_size=16),))
    assert worst(examine(replace(known, context=32)), "context") == Finding(
        "context", CHANGE, "rows have 32 positions, but the SAE was trained on 16: pass --context 16"
    )
    assert worst(examine(known), "context").level == OK


@pytest.mark.parametrize(("trained", "given", "says"), [(True, False, "pass --bos"), (False, True, "pass --no-bos")])
def test_bos_as_the_sae_was_trained(
    settings: MeasureSettings, sae_with: Callable[..., str], trained: bool, given: bool, says: str
) -> None:
    sae = sae_with(prepend_bos=trained)
    wrong = worst(examine(replace(settings, saes=(sae,), prepend_bos=given)), "BOS")
    assert wrong.level == CHANGE
    assert says in wrong.says
    assert worst(examine(replace(settings, saes=(sae,), prepend_bos=trained)), "BOS").level == OK


def test_a_tokenizer_without_bos(settings: MeasureSettings, setup: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = Path(shutil.copytree(setup / "model", tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(model)
    # As in TransformerLens, a row then begins with EOS.
    assert worst(examine(replace(settings, model=str(model))), "BOS").says.startswith("rows begin with BOS (id 0)")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    assert "the tokenizer has none" in worst(examine(replace(settings, model=str(model))), "BOS").says
    assert worst(examine(replace(settings, model=str(model), prepend_bos=False)), "BOS").level == OK


def test_another_models_tokenizer(settings: MeasureSettings, setup: Path, tmp_path: Path) -> None:
    from transformers import GPTNeoXForCausalLM

    model = Path(shutil.copytree(setup / "model", tmp_path / "model"))
    small = GPTNeoXForCausalLM.from_pretrained(model)
    small.resize_token_embeddings(40)
    small.save_pretrained(model)
    findings = examine(replace(settings, model=str(model)))
    assert worst(findings, "vocabulary").level == STOP
    assert "the model's vocabulary has 40" in worst(findings, "vocabulary").says
    assert "hook" not in {f.check for f in findings}  # its embedding could not even be asked
    with pytest.raises(
        CapacityError,
        match=r"the text has token id \d+, but the model's vocabulary has 40: use the model's own",
    ):
        measure(replace(settings, model=str(model)))
    for basis in ("pca", "neurons"):
        with pytest.raises(CapacityError, match="but the model's vocabulary has 40"):
            measure(replace(settings, model=str(model), saes=(f"{basis}:{HOOK}",)))


def test_text_that_the_tokenizer_does_not_know(settings: MeasureSettings, tmp_path: Path) -> None:
    text = tmp_path / "foreign.jsonl"
    text.write_text("".join(json.dumps({"text": " ".join(["w3", "w4", "w5", "quux"] * 10)}) + "\n" for _ in range(40)))
    finding = worst(examine(replace(settings, source=str(text))), "vocabulary")
    assert finding.level == CHANGE
    assert "of the tokens are unknown" in finding.says


def test_normalisation_that_is_not_folded_in(settings: MeasureSettings, setup: Path, tmp_path: Path) -> None:
    sae = Path(shutil.copytree(setup / "sae", tmp_path / "sae"))
    config = json.loads((sae / "cfg.json").read_text())
    (sae / "cfg.json").write_text(json.dumps({**config, "normalize_activations": "expected_average_only_in"}))
    finding = worst(examine(replace(settings, saes=(str(sae),))), "normalisation")
    assert finding.level == STOP
    assert "fold_activation_norm_scaling_factor" in finding.says


@pytest.mark.parametrize(
    ("sae", "says"),
    [
        ("blocks.9.hook_resid_post=SETUP/sae", "did you mean"),
        ("SETUP/wide", "d_in is 48"),
        ("blocks.1.attn.hook_result=SETUP/sae", "did not fire"),
    ],
)
def test_hooks_that_cannot_be_tapped(settings: MeasureSettings, setup: Path, sae: str, says: str) -> None:
    findings = examine(replace(settings, saes=(sae.replace("SETUP", str(setup)), str(setup / "sae"))))
    assert worst(findings, "hook").level == STOP
    assert says in worst(findings, "hook").says
    assert [f for f in findings if f.check == "hook" and f.level == OK], "the other SAE is checked all the same"


def test_a_first_position_that_outweighs_the_others(settings: MeasureSettings, setup: Path, tmp_path: Path) -> None:
    from transformers import GPTNeoXForCausalLM

    model = Path(shutil.copytree(setup / "model", tmp_path / "model"))
    sink = GPTNeoXForCausalLM.from_pretrained(model)
    with torch.no_grad():
        sink.get_input_embeddings().weight[3] *= 1000
    sink.save_pretrained(model)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": " ".join(["w3", *["w4", "w5", "w6"] * 10])}) + "\n" for _ in range(40)))
    without = replace(settings, model=str(model), source=str(text), prepend_bos=False)
    finding = worst(examine(without), "first position")
    assert finding.level == CHANGE
    assert "--skip-first-positions 1" in finding.says
    assert worst(examine(replace(without, skip_first_positions=1)), "first position").level == OK


def test_an_sae_that_does_not_fit(settings: MeasureSettings, sae_with: Callable[..., str]) -> None:
    sae = sae_with(lambda sae: sae.W_dec.mul_(-1))
    findings = examine(replace(settings, saes=(sae,)))
    assert worst(findings, "FVU").level == STOP
    assert "the wrong hook point, the wrong model" in worst(findings, "FVU").says
    assert "duration" not in {f.check for f in findings}
    assert worst(examine(replace(settings, saes=(sae,), max_fvu=float("inf"))), "FVU").level == CHANGE


def test_an_sae_that_was_trained_on_scaled_activations(settings: MeasureSettings, sae_with: Callable[..., str]) -> None:
    """Its threshold lies far above the activations as they are, so that it explains nothing of them."""
    finding = worst(examine(replace(settings, saes=(sae_with(lambda sae: sae.b_enc.fill_(-0.3)),))), "FVU")
    assert finding.level in (CHANGE, STOP)
    assert "fold in the factor first, with sae.fold_activation_norm_scaling_factor(" in finding.says


def test_an_sae_that_was_trained_on_centred_activations(
    settings: MeasureSettings, setup: Path, tmp_path: Path, sae_with: Callable[..., str]
) -> None:
    """Activations have a large common part in all dimensions, which centring takes out; the SAE writes nothing in that
    direction.
    """
    from transformers import GPTNeoXForCausalLM

    model = Path(shutil.copytree(setup / "model", tmp_path / "model"))
    shifted = GPTNeoXForCausalLM.from_pretrained(model)
    with torch.no_grad():
        shifted.get_input_embeddings().weight += 3 * torch.randn(64, 1)
    shifted.save_pretrained(model)

    def blind(sae: Any) -> None:
        sae.W_dec -= sae.W_dec.mean(1, keepdim=True)
        sae.W_enc.copy_(sae.W_dec.T)

    finding = worst(examine(replace(settings, model=str(model), saes=(sae_with(blind),))), "FVU")
    assert finding.level in (CHANGE, STOP)
    assert "with them centred over the dimensions" in finding.says


def test_time_memory_and_disk(settings: MeasureSettings, tmp_path: Path) -> None:
    findings = examine(replace(settings, tokens=10**12))
    assert " h" in worst(findings, "duration").says
    assert costs.memory(10**15).level == STOP
    assert costs.memory(10**9, available=10**9 - 1).level == STOP
    assert costs.memory(10**9, available=10**9).level == OK
    assert costs.disk(tmp_path / "deep" / "out", 10**6).level == OK
    assert costs.disk(tmp_path / "deep" / "out", 10**18).level == STOP
    (tmp_path / "file").write_text("")
    assert "is a file" in costs.disk(tmp_path / "file" / "out", 0).says
    assert costs.disk(Path("/proc/out"), 10**3).level == STOP  # a file system on which nothing can be made


@pytest.fixture
def measured(cli: Cli, setup: Path, tmp_path: Path) -> Path:
    """A measurement of copies of model and SAE, which can be changed afterwards."""
    for name in ("model", "sae"):
        shutil.copytree(setup / name, tmp_path / name)
    shutil.copy(setup / "text.jsonl", tmp_path)
    assert cli(*arguments(tmp_path, tmp_path / "m"))[0] == 0
    return tmp_path


def test_a_folder_that_is_whole(measured: Path, cli: Cli) -> None:
    assert {f.level for f in examine_folder(measured / "m")} == {OK}
    code, out, err = cli("doctor", measured / "m", "--json")
    assert (code, err) == (0, "")
    assert "holds a complete measurement" in json.loads(out)[0]["says"]


@pytest.mark.slow
def test_a_folder_with_a_basis(measured: Path, cli: Cli) -> None:
    """A basis has no file: it is fitted to the text again, and is the same."""
    basis = f"pca:{HOOK},k=4"
    assert cli(*arguments(measured, measured / "bases", "--sae", basis))[0] == 0
    findings = examine_folder(measured / "bases")
    assert [f.says for f in findings if f.level == STOP] == []
    assert [f.says for f in findings if f.check == "SAE"][1].startswith(basis)


def test_an_importance_that_needs_a_backward_pass(measured: Path, cli: Cli) -> None:
    """It runs the model more often than once for each batch."""
    options = ("--model", measured / "model", "--sae", measured / "sae", "--source", measured / "text.jsonl")
    code, out, err = cli("doctor", *options, "--importance", "gradient", "--json")
    assert (code, err) == (0, "")
    assert {finding["level"] for finding in json.loads(out)} == {OK}


def test_a_folder_whose_model_or_sae_has_changed(measured: Path) -> None:
    from sae_lens import SAE
    from transformers import GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM.from_pretrained(measured / "model")
    sae = SAE.load_from_disk(measured / "sae")
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.01
        sae.W_dec *= 1.01
    model.save_pretrained(measured / "model")
    sae.save_model(measured / "sae")
    findings = examine_folder(measured / "m")
    assert "was" in worst(findings, "model").says
    assert (worst(findings, "model").level, worst(findings, "SAE").level) == (STOP, STOP)


def test_a_folder_that_is_damaged(measured: Path) -> None:
    (measured / "m" / "measurement.json").write_text("{")
    findings = examine_folder(measured / "m")
    assert [(f.check, f.level) for f in findings] == [("folder", STOP)]
    assert [(f.check, f.level) for f in examine_folder(measured)] == [("folder", STOP)]


def test_the_exit_code_tells_the_result(cli: Cli, setup: Path, tmp_path: Path) -> None:
    options = ["--model", setup / "model", "--source", setup / "text.jsonl", "--out", tmp_path / "out"]
    code, out, err = cli("doctor", *options, "--sae", setup / "sae")
    assert (code, err) == (0, "")
    assert HOOK in out
    code, out, err = cli("doctor", *options, "--sae", setup / "wide")
    assert code == 2
    assert "d_in is 48" in out
    assert err.startswith("error: 1 of ")
    assert not (tmp_path / "out").exists()
    for neither_or_both in ([], [tmp_path, "--model", setup / "model"]):
        code, _, err = cli("doctor", *neither_or_both)
        assert code == 2
        assert "pass a folder or --model" in err


def test_settings_are_read_back_from_a_measurement(measured: Path, setup: Path, tmp_path: Path, cli: Cli) -> None:
    more = (
        "--no-bos",
        "--context",
        16,
        "--batch-rows",
        4,
        "--shard",
        "1/3",
        "--skip-first-positions",
        2,
        "--alive-threshold",
        1e-4,
        "--fvu-every",
        3,
        "--importance",
        "gradient",
    )
    assert cli(*arguments(measured, tmp_path / "other", *more))[0] == 0
    read = settings_of(Measurement.load(tmp_path / "other"), tmp_path / "other", 7, "auto")
    wanted = MeasureSettings(
        model=str(measured / "model"),
        out=tmp_path / "other",
        saes=(f"{HOOK}={measured / 'sae'}",),
        tokens=7,
        source=str(measured / "text.jsonl"),
        context=16,
        batch_rows=4,
        prepend_bos=False,
        importance=("gradient",),
        alive_threshold=1e-4,
        fvu_every=3,
        skip_first_positions=2,
        shard=(1, 3),
    )
    assert read == wanted
