"""The price of chosen features: on a planted teacher whose features and prices are known, and on a tiny model against
loops over whole logits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import HOOK, Cli, arguments, concept_of
from safetensors.numpy import load_file
from torch.nn import functional as F

from tl_capacity import add_capacity_hooks
from tl_capacity.distillation import DistillationRun, DistillSettings, KeepFeatures, distill
from tl_capacity.errors import MeasurementError
from tl_capacity.placement import Placement
from tl_capacity.placement.divergence import divergence_by_group
from tl_capacity.placement.pricing import PricedStudent, Tally, prices_of
from tl_capacity.probing import recover_features
from tl_capacity.probing.splitting import HELD_OUT, split
from tl_capacity.report import Results, report_page
from tl_capacity.results.estimate import Estimate
from tl_capacity.text.counting import CountingRule
from tl_capacity.text.streams import TokenStream

# A planted teacher

BITS, NARROW = 8, 4
STRONG, WEAK = 3.0, 1.5
"""Log-odds with which a token's first four bits, and its other four, are those of the next token."""
PLANTED_HOOK = "blocks.0.hook_resid_post"


def bit_signs() -> torch.Tensor:
    """The bits of each token id, as −1 and 1 [token, bit]."""
    return 2.0 * ((torch.arange(2**BITS)[:, None] >> torch.arange(BITS)) & 1) - 1


def planted_teacher() -> Any:
    """A Llama whose stream is the bits of the token, and whose next token keeps each bit with known odds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": BITS, "intermediate_size": BITS, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=2**BITS, max_position_embeddings=16, rms_norm_eps=1e-8, bos_token_id=0, **sizes)
    )
    odds = torch.tensor([STRONG] * 4 + [WEAK] * 4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(bit_signs())
        model.lm_head.weight.copy_(bit_signs() * odds / 2)
    return model.eval()


def information(odds: float) -> float:
    """What a bit with such odds says of the next token, in nats: ln 2 − H(σ(odds))."""
    p = 1 / (1 + np.exp(-odds))
    return log(2) + p * log(p) + (1 - p) * log(1 - p)


def planted_sae() -> Any:
    """A dictionary whose feature i fires where bit i is set."""
    from sae_lens import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=BITS, d_sae=BITS, apply_b_dec_to_input=False))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(BITS))
        sae.W_dec.copy_(torch.eye(BITS))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_planted_features_are_kept_where_they_are_asked_for_and_cost_what_they_say(tmp_path: Path) -> None:
    """A student of width 4 tells at most four of eight independent bits: the half-spaces of more than n bits cannot
    split n dimensions into all of their combinations. By itself it keeps the four that say most of the next token;
    asked for the other four it keeps these, at the price of what the first say more. What four bits leave is the most
    that a student loses, as it may mix a little of the other bits in.
    """
    from transformers import AutoModelForCausalLM

    teacher, sae = planted_teacher(), planted_sae()
    text = np.random.default_rng(0).integers(0, 2**BITS, size=(1_000, 16))
    with add_capacity_hooks(teacher, {PLANTED_HOOK: sae}, mask_token_ids=()) as capacity:
        measured = capacity.run(text[:200], progress=False).measurement()[PLANTED_HOOK]
    students, models = [], {}
    for weight in (0.0, 100.0):
        keep = (KeepFeatures(PLANTED_HOOK, (4, 5, 6, 7), weight),) if weight else ()
        run = distill(
            teacher,
            [NARROW],
            text[200:],
            settings=DistillSettings(tokens=150_000, repeat=True, evaluations=4, lr=3e-2, batch_rows=16, keep=keep),
            saes={PLANTED_HOOK: sae},
            out=tmp_path / f"{weight:g}",
            progress=False,
        )
        models[f"{weight:g}"] = AutoModelForCausalLM.from_pretrained(
            tmp_path / f"{weight:g}" / "students" / run.students[0].name
        ).eval()
    recovery = recover_features(
        teacher, sae, models, text[:200], measured=measured, rule=CountingRule(), progress=False
    )
    kl, tokens = divergence_by_group(
        teacher, models, [batch for _, batch in split(text[:200], (HELD_OUT,))], progress=False
    )
    students = [PricedStudent(name, NARROW, float(name), 0, kl[name]) for name in models]
    asked = np.arange(BITS) >= 4
    without, with_them = prices_of(recovery, students, tokens, asked)
    assert (without.chosen.value, without.others.value) == (0, 4)
    assert (with_them.chosen.value, with_them.others.value) == (4, 0)
    price = 4 * (information(STRONG) - information(WEAK))
    for found, lost in ((without, WEAK), (with_them, STRONG)):
        assert 0.75 * 4 * information(lost) < found.kl.value < 4 * information(lost)
    assert with_them.paid is not None
    assert with_them.per_feature is not None
    assert with_them.paid.value == pytest.approx(price, rel=0.15)
    assert with_them.per_feature.value == pytest.approx(with_them.paid.value / 4)


# The arithmetic of prices


def test_a_price_is_what_is_paid_for_what_is_gained_on_the_same_documents() -> None:
    draw = np.random.default_rng(0)
    paid, gained = draw.normal(0.4, 0.02, 400), draw.normal(8, 1, 400)
    price = Tally.of(0.4, paid).per(Tally.of(8.0, gained))
    assert price is not None
    drawn = (paid - paid.mean() + 0.4) / (gained - gained.mean() + 8)
    assert price.value == pytest.approx(0.05)
    assert price.low == pytest.approx(np.percentile(drawn, 2.5), rel=0.02)
    assert price.high == pytest.approx(np.percentile(drawn, 97.5), rel=0.02)


def test_nothing_gained_has_no_price_and_what_may_be_nothing_no_interval() -> None:
    draw = np.random.default_rng(0)
    paid = Tally.of(0.4, draw.normal(0.4, 0.02, 400))
    assert paid.per(Tally.of(0.0, draw.normal(0, 1, 400))) is None
    assert paid.per(Tally.of(-2.0, draw.normal(-2, 1, 400))) is None
    assert paid.per(Tally.of(1.0, draw.normal(1, 1, 400))) == Estimate(0.4 / 1.0)
    assert paid.per(Tally(4.0, None)) == Estimate(0.4 / 4.0)


def test_what_seeds_and_documents_share_cancels_in_a_difference() -> None:
    draw = np.random.default_rng(0)
    shared = draw.normal(size=200)
    one, other = Tally.of(3.0, 3 + shared), Tally.of(1.0, 1 + shared)
    difference = one.less(other).estimate
    assert (difference.value, difference.low, difference.high) == pytest.approx((2, 2, 2))
    mean = Tally.mean([one, other])
    assert mean.value == 2
    np.testing.assert_allclose(mean.replicates, 2 + shared - shared.mean())


# The command


def command(measured: Path, setup: Path, out: Path, *more: object) -> list[object]:
    """One width, two seeds, two weights, on few tokens."""
    given = ["--widths", "8", "--seeds", "0,1", "--start", "random", "--weights", 2, "--out", out, "--threads", 1]
    text = ["--source", setup / "text.jsonl", "--heldout", measured / "heldout.jsonl"]
    few = ["--tokens", 800, "--heldout-tokens", 200, "--evaluations", 2, "--judge-tokens", 5_000, "--tau", 0.7]
    return ["run", "placement", measured / "measurement", *given, *text, *few, "--context", 32, *more]


@pytest.fixture(scope="module")
def measured(setup: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measurement, held-out text, and a file with features."""
    from tl_capacity.cli import main

    folder = tmp_path_factory.mktemp("placement")
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments(setup, folder / "measurement")])
    assert not stopped.value.code
    draw = np.random.default_rng(7)
    texts = [" ".join(f"w{i}" for i in draw.zipf(1.3, size=70) % 62 + 2) for _ in range(80)]
    (folder / "heldout.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "features.json").write_text(json.dumps({"hook": HOOK, "features": [3, 8, 21, 40]}))
    return folder


@pytest.fixture(scope="module")
def placed(measured: Path, setup: Path) -> Path:
    from tl_capacity.cli import main

    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in command(measured, setup, measured / "whole", "--keep", measured / "features.json")])
    assert not stopped.value.code
    return measured / "whole"


@pytest.mark.slow
def test_the_price_list_is_what_loops_over_logits_and_the_features_file_say(
    placed: Path, measured: Path, setup: Path
) -> None:
    from tl_capacity.models.loading import load_model

    placement = Placement.load(placed)
    assert [(p.width, p.weight, p.seeds) for p in placement] == [
        (8, 0, (0, 1)),
        (8, 2, (0, 1)),
    ]
    teacher = load_model(str(setup / "model"), device="cpu")
    stream = TokenStream(str(measured / "heldout.jsonl"), teacher.tokenizer, context=32)
    batches = [torch.from_numpy(batch.tokens) for _, batch in split(stream, (HELD_OUT,), 5_000)]
    features = load_file(placed / f"features-{HOOK}.safetensors")
    asked, judged = np.isin(features["features"], [3, 8, 21, 40]), features["judged"].astype(bool)
    assert (placement.n_chosen, placement.n_others) == ((asked & judged).sum(), (~asked & judged).sum())
    for price in placement:
        for place, seed in enumerate(price.seeds):
            name = f"width{price.width}-seed{seed}"
            folder = placed / f"weight-{price.weight:g}" / "students" / name
            student, total, count = load_model(str(folder), device="cpu").model, 0.0, 0
            for ids in batches:
                for row in ids:
                    row = row[row >= 0][None]
                    with torch.no_grad():
                        p, q = (m(row).logits[0, :-1].double().log_softmax(-1) for m in (teacher.model, student))
                    total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
                    count += len(p)
            assert price.by_seed["kl"][place] == pytest.approx(total / count, rel=1e-5)
            kept = (features[f"weight {price.weight:g}, {name}/student/auroc"] >= 0.7) & judged
            assert price.by_seed["chosen"][place] == (kept & asked).sum()
            assert price.by_seed["others"][place] == (kept & ~asked).sum()
        assert price.kl.value == pytest.approx(np.mean(price.by_seed["kl"]))
        assert price.kl.low is not None
        assert price.kl.low < price.kl.value
    without, asked_for = placement.prices
    assert without.paid is without.gained is without.per_feature is None
    assert asked_for.paid is not None
    assert asked_for.gained is not None
    assert asked_for.paid.value == pytest.approx(asked_for.kl.value - without.kl.value)
    assert asked_for.gained.value == pytest.approx(asked_for.chosen.value - without.chosen.value)
    if asked_for.per_feature is not None:
        assert asked_for.per_feature.value == pytest.approx(asked_for.paid.value / asked_for.gained.value)


@pytest.mark.slow
def test_students_of_weight_0_are_those_of_the_plain_command(placed: Path) -> None:
    assert "keep" not in DistillationRun.load(placed / "weight-0").settings
    [keep] = DistillationRun.load(placed / "weight-2").settings["keep"]
    assert keep == {"hook": HOOK, "features": [3, 8, 21, 40], "weight": 2.0}


@pytest.mark.slow
def test_a_run_that_broke_off_goes_on_to_the_same_bytes(
    placed: Path, measured: Path, setup: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tl_capacity.recipes import placement as recipe

    out = tmp_path / "torn"
    keep = ["--keep", measured / "features.json"]
    shutil.copytree(placed / "weight-0", out / "weight-0")  # as if it had ended here

    def stops(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(recipe, "divergence_by_group", stops)
        cli(*command(measured, setup, out, *keep))
    assert not (out / "placement.json").exists()
    code, said, err = cli(*command(measured, setup, out, *keep))
    assert code == 0, err
    assert (out / "placement.json").read_bytes() == (placed / "placement.json").read_bytes()
    assert not list(out.glob("*.checkpoint*"))
    code, said, err = cli(*command(measured, setup, out, *keep))
    assert code == 0
    assert "already holds a placement.json of these settings" in said
    code, said, err = cli(*command(measured, setup, out, *keep, "--tau", 0.9))
    assert code != 0
    assert "of other settings (tau = 0.7)" in err


@pytest.mark.slow
def test_a_concept_is_probed_and_the_figure_and_report_show_it(
    measured: Path, setup: Path, tmp_path: Path, cli: Cli
) -> None:
    keep = ["--keep", f"concept:{concept_of(setup)}", "--concept-features", 3]
    code, said, err = cli(*command(measured, setup, tmp_path / "out", *keep))
    assert code == 0, err
    placement = Placement.load(tmp_path / "out")
    assert (placement.concept, len(placement.features)) == ("few", 3)
    assert all(price.probe is not None and 0.4 < price.probe.value <= 1 for price in placement)
    assert "probe" in placement.teacher
    assert "weight" in said
    assert (tmp_path / "out" / "placement.html").exists()
    code, _, err = cli(
        "report", measured / "measurement", tmp_path / "out", "--no-snippets", "--out", tmp_path / "report.html"
    )
    assert code == 0, err
    assert "that carry the concept" in (tmp_path / "report.html").read_text()


def test_a_price_list_survives_saving_and_shows_itself(placed: Path, tmp_path: Path) -> None:
    placement = Placement.load(placed)
    assert Placement.load(placement.save(tmp_path)) == placement
    frame = placement.to_frame()
    assert frame["kl"].tolist() == [price.kl.value for price in placement]
    figure = placement.plot()
    assert [trace.name for trace in figure.data] == ["width 8"]
    assert list(figure.data[0].y) == [0.0, placement.prices[1].paid.value]  # type: ignore[union-attr]
    assert "width" in placement._repr_html_()
    header, rows = placement.cells()
    assert all(len(row) == len(header) for row in rows)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.update(schema=9),
        lambda content: content.pop("schema"),
        lambda content: content.update(prices=[]),
        lambda content: content["prices"][0].update(kl=None),
        lambda content: content["prices"][0].update(width="wide"),
        lambda content: content.pop("teacher"),
        lambda content: content.update(features=None),
    ],
)
def test_an_altered_price_list_is_refused(placed: Path, tmp_path: Path, spoil: Callable[[Any], Any]) -> None:
    content = json.loads((placed / "placement.json").read_text())
    spoil(content)
    (tmp_path / "placement.json").write_text(json.dumps(content))
    with pytest.raises(MeasurementError, match=r"placement.json"):
        Placement.load(tmp_path)


def test_a_price_list_of_a_newer_version_is_refused_in_one_sentence(placed: Path, tmp_path: Path) -> None:
    content = json.loads((placed / "placement.json").read_text())
    (tmp_path / "placement.json").write_text(json.dumps(content | {"schema": 2}))
    with pytest.raises(MeasurementError, match=r"placement.json has schema 2, .* reads up to 1: upgrade tl-capacity$"):
        Placement.load(tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "no feature is chosen: pass --keep"),
        (["--keep", "missing.json"], "missing.json cannot be read"),
        (["--keep", "{few}"], "feature 64 of"),
        (["--keep", "concept:nothing"], "nothing"),
        (["--keep", "{features}", "--weights", "-1"], "--weights -1 is not a weight of a loss"),
        (["--keep", "{features}", "--weights", "nan"], "--weights nan is not a weight of a loss"),
        (["--keep", "{features}", "--judge-tokens", "200"], "ask for --judge-tokens"),
        (["--keep", "{features}", "--lr", "-1"], "lr = -1.0 trains nothing"),
        (["--keep", "{features}", "--widths", "17"], "cannot build a student of width 17"),
    ],
)
def test_what_cannot_be_priced_is_refused_in_a_sentence(
    measured: Path, setup: Path, tmp_path: Path, cli: Cli, more: list[str], message: str
) -> None:
    (tmp_path / "few.json").write_text(json.dumps({"hook": HOOK, "features": [1, 64]}))
    given = [part.format(few=tmp_path / "few.json", features=measured / "features.json") for part in more]
    code, _, err = cli(*command(measured, setup, tmp_path / "out", *given))
    assert code != 0
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "placement.json").exists()


def test_what_a_reader_must_know_is_said(placed: Path) -> None:
    placement = Placement.load(placed)
    price = replace(placement.prices[1], gained=Estimate(0.0), per_feature=None)
    said = "\n".join(
        replace(
            placement, prices=(replace(placement.prices[0], seeds=(0,)), replace(price, seeds=(0,))), n_chosen=3
        ).notes()
    )
    assert "width 8, weight 2: students keep no more of the chosen features than without" in said
    assert "1 of the 4 chosen features fire too rarely" in said
    assert "students have one seed" in said


@pytest.mark.slow
def test_the_report_has_a_section_on_it_or_says_why_not(placed: Path, measured: Path) -> None:
    from tl_capacity import Measurement

    measurement = Measurement.load(measured / "measurement")
    text = report_page(Results(measurement, placement=json.loads((placed / "placement.json").read_text())))
    assert "What choosing the kept features costs" in text
    assert "The price list" in text
    assert "run placement again" in report_page(Results(measurement, placement={"schema": 1}))
