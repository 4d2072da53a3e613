"""`observe` against dense loops in float64 over whole logits, on pairs of every kind, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_families
import torch
from commands import Cli, arguments, students_of
from conftest import D_MODEL
from hypothesis import given, settings
from hypothesis import strategies as st
from place import placed
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import tl_capacity as tlc
from tl_capacity.distillation import DistillationRun, Judged, observe, observed_floors
from tl_capacity.distillation.comparison import likeliest
from tl_capacity.distillation.named_students import students_named
from tl_capacity.errors import CapacityError, TokenSourceError
from tl_capacity.models.loading import LoadedModel
from tl_capacity.text.streams import TokenStream

HOOK = "blocks.1.hook_resid_post"
TEXT = torch.randint(2, 50, (12, 9), generator=torch.Generator().manual_seed(3))
LENGTHS = [9, 9, 2, 5, 9, 9, 3, 9, 7, 9, 9, 4]
ROWS = [{"input_ids": TEXT[:6], "attention_mask": torch.arange(9) < torch.tensor(LENGTHS[:6])[:, None]}]
ROWS += [{"input_ids": TEXT[6:], "attention_mask": torch.arange(9) < torch.tensor(LENGTHS[6:])[:, None]}]
"""Twelve documents of two to nine tokens."""


@torch.no_grad()
def by_hand(teacher: Any, student: Any, logits: int = 50) -> dict[str, np.ndarray[Any, Any]]:
    """The figures of each document by their definition, from whole logits in float64, a row at a time."""
    figures: dict[str, list[float]] = {
        name: [] for name in ("kl", "cross_entropy", "teacher_cross_entropy", "agreement")
    }
    for row, length in zip(TEXT, LENGTHS, strict=True):
        ids = row[None, :length]
        outputs = (model(ids.to(next(model.parameters()).device)) for model in (teacher, student))
        log_p, log_q = (getattr(o, "logits", o)[0, :-1, :logits].double().log_softmax(-1).cpu() for o in outputs)
        figures["kl"].append(float(F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")))
        figures["cross_entropy"].append(float(F.nll_loss(log_q, ids[0, 1:])))
        figures["teacher_cross_entropy"].append(float(F.nll_loss(log_p, ids[0, 1:])))
        figures["agreement"].append(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))
    return {name: np.array(values) for name, values in figures.items()}


def check(run: DistillationRun, name: str, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    judged = run[name].judged
    assert judged is not None
    tokens = np.array(LENGTHS) - 1
    assert (judged.documents, judged.tokens) == (tuple(range(12)), tuple(tokens.tolist()))
    for figure, values in expected.items():
        np.testing.assert_allclose(getattr(judged, figure), values, rtol=1e-5, atol=1e-6, err_msg=figure)
        assert judged.figures[figure].value == pytest.approx((values * tokens).sum() / tokens.sum(), rel=1e-5, abs=1e-6)
    assert run[name].heldout_kl == (judged.figures["kl"].value,)


def other(family: str, **changes: Any) -> Any:
    """A model of some family with other weights than `tiny_families.teacher` gives."""
    config = tiny_families.CONFIGS[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(7)
    model = placed(AutoModelForCausalLM.from_config(config).eval())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that divergences are no rounding errors
    return model


@pytest.mark.parametrize(
    ("family", "of"), [("gpt-neox", "llama"), ("gpt2", "mamba"), ("gemma2", "opt"), ("qwen3", "gpt-neox")]
)
def test_a_student_of_another_family_is_judged_as_by_hand(family: str, of: str) -> None:
    teacher, student = other(family), other(of, num_hidden_layers=3)
    student.train()
    run = observe(teacher, {"a": student, "b": teacher}, ROWS, batch_rows=5, progress=False)
    check(run, "a", by_hand(teacher, student.eval()))
    assert run["b"].judged is not None
    assert run["b"].judged.kl == pytest.approx([0.0] * 12, abs=1e-6)
    assert set(run["b"].judged.agreement) == {1.0}
    assert (run["a"].width, run["a"].start, run.teacher_width) == (32, "given", 32)
    assert run.heldout_tokens == sum(LENGTHS) - 12


@given(st.integers(1, 1_100), st.integers(0, 1_000), st.sampled_from([3.0, 1e6]))
@settings(max_examples=40, deadline=None)
def test_the_likeliest_token_is_the_first_with_the_largest_logit(vocabulary: int, seed: int, levels: float) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = (torch.rand(5, vocabulary, generator=random) * levels).floor() - levels / 2  # with ties
    assert torch.equal(likeliest(logits), logits.argmax(-1))


def test_modes_are_left_as_they_were_and_no_hook_stays() -> None:
    teacher, student = other("gpt-neox").train(), other("llama")
    observe(teacher, {"a": student}, ROWS, progress=False)
    assert teacher.training
    assert not student.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*teacher.modules(), *student.modules()))


@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge"])
def test_models_of_transformer_lens(kind: str, make_model: Callable[..., Any]) -> None:
    teacher, student = make_model(kind), make_model("gpt2")
    run = observe(teacher, {"a": student, "itself": teacher}, ROWS, progress=False)
    check(run, "a", by_hand(teacher, student, logits=100))
    assert run["itself"].heldout_kl == pytest.approx((0.0,), abs=1e-6)
    assert run.teacher_width == run["itself"].width == D_MODEL


def test_logits_that_no_head_gives_are_taken_from_the_model() -> None:
    """Granite divides its logits; its head alone gives others."""
    sizes = {**tiny_families.SHARED, **tiny_families.SIZES}
    torch.manual_seed(1)
    student = placed(GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0, initializer_range=0.3)).eval())
    teacher = other("llama")
    check(observe(teacher, {"a": student}, ROWS, progress=False), "a", by_hand(teacher, student))


def test_padded_matrices_are_cut_to_the_common_part(caplog: pytest.LogCaptureFixture) -> None:
    teacher, student = other("gpt-neox"), other("llama", vocab_size=64, tie_word_embeddings=False)
    run = observe(teacher, {"padded": student}, ROWS, progress=False)
    check(run, "padded", by_hand(teacher, student))
    said = "the student 'padded' has 64 logits: all models are compared on the first 50, which they have in common"
    assert said in caplog.text
    assert run.settings["compared_logits"] == 50
    assert run.settings["logits"] == {"teacher": 50, "padded": 64}


def test_figures_and_their_intervals() -> None:
    random = np.random.default_rng(0)
    kl, tokens = random.gamma(2, size=400), random.integers(5, 60, size=400)
    means = tuple(kl.tolist())
    judged = Judged(tuple(range(400)), tuple(tokens.tolist()), means, means, (0.5,) * 400, (0.25,) * 400)
    found = judged.figures["kl"]
    mean = (kl * tokens).sum() / tokens.sum()
    assert found.value == pytest.approx(mean)
    # The standard error of a ratio of sums over documents, by linearisation (Cochran 1977, § 6.4).
    error = np.sqrt(((tokens * (kl - mean)) ** 2).sum()) / tokens.sum()
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    above = judged.figures["above_teacher"]
    assert (above.value, above.low) == (pytest.approx(mean - 0.5), pytest.approx(found.low - 0.5))
    assert judged.figures["agreement"].show(".2f") == "0.25 [0.25, 0.25]"
    few = Judged(*(column[:7] for column in vars(judged).values() if isinstance(column, tuple)))
    assert few.figures["kl"].low is None
    assert Judged.from_json(json.loads(json.dumps(judged.to_json()))) == judged


def distilled_and_observed(setup: Path, tmp_path: Path, cli: Cli) -> Path:
    """What `observe` wrote of the students of `run distill`, on the documents that this held out."""
    out = tmp_path / "observed"
    code, said, err = cli(
        "observe", "--teacher", setup / "model", "--student", students_of(setup), "--source", setup / "text.jsonl",
        "--held-out", "--tokens", 100, "--context", 32, "--out", out,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "width8-seed0" in said
    assert "KL(teacher ‖ student)" in said
    return out


def test_students_of_a_distillation_have_its_last_loss(setup: Path, tmp_path: Path, cli: Cli) -> None:
    run, distilled = DistillationRun.load(distilled_and_observed(setup, tmp_path, cli)), students_of(setup)
    before = DistillationRun.load(distilled)
    assert (run.heldout_digest, run.heldout_tokens) == (before.heldout_digest, before.heldout_tokens)
    assert (run.teacher, run.fingerprint) == (before.teacher, before.fingerprint)
    assert [student.name for student in run] == [student.name for student in before]
    for student in before:
        assert run[student.name].heldout_kl == pytest.approx(student.heldout_kl[-1:], abs=1e-6)
        assert run[student.name].parameters == student.parameters
        assert run[student.name].body_parameters == student.body_parameters
        assert run.place_of(student.name, "elsewhere") == str((distilled / "students" / student.name).resolve())


@pytest.mark.slow
@pytest.mark.usefixtures("few_replicates", "unchecked")
def test_what_reads_a_distillation_reads_it(setup: Path, tmp_path: Path, cli: Cli) -> None:
    out, measured = distilled_and_observed(setup, tmp_path, cli), tmp_path / "measured"
    assert cli(*arguments(setup, measured, tokens=1_000))[0] == 0
    run = DistillationRun.load(out)
    assert run.save(tmp_path / "again")
    assert DistillationRun.load(tmp_path / "again") == run
    floors = observed_floors(run)
    for floor, student in zip(floors, run, strict=True):
        assert student.judged is not None
        kl = student.judged.figures["kl"]
        assert (floor.value, floor.low, floor.high) == (kl.value, kl.low, kl.high)
        assert floor.taken_as("fit") == floor.taken_as("last_tenth") == kl
        assert floor.falling == 0
    code, said, _ = cli("decompose", measured, out)
    assert code == 0
    assert "2 students were judged as they came" in said
    frame = run.to_frame()
    assert frame["kl"].tolist() == frame["heldout_kl"].tolist() == [s.heldout_kl[0] for s in run]
    assert run.plot().data[0].name == "observed, as they came"
    assert "width8-seed0" in run._repr_html_()
    assert json.loads((out / "distillation.json").read_text())["schema"] == 2
    assert json.loads((students_of(setup) / "distillation.json").read_text())["schema"] == 1


@pytest.mark.slow
def test_a_report_shows_it(setup: Path, tmp_path: Path, cli: Cli) -> None:
    out, measured = distilled_and_observed(setup, tmp_path, cli), tmp_path / "measured"
    assert cli(*arguments(setup, measured, tokens=1_000))[0] == 0
    code, _, _ = cli("report", measured, out, "--no-snippets", "--out", tmp_path / "page.html")
    assert code == 0
    page = (tmp_path / "page.html").read_text()
    assert "Students as they came" in page
    assert "judged as they came: their loss is not a floor" in page


def test_json_has_the_figures(setup: Path, tmp_path: Path, cli: Cli) -> None:
    student = students_of(setup) / "students" / "width8-seed0"
    code, said, _ = cli(
        "observe", "--teacher", setup / "model", "--student", student, "--source", setup / "text.jsonl",
        "--tokens", 300, "--out", tmp_path / "o", "--json",
    )  # fmt: skip
    assert code == 0
    [shown] = json.loads(said)["students"]
    kept = DistillationRun.load(tmp_path / "o")["width8-seed0"].judged
    assert kept is not None
    assert shown["kl"] == kept.figures["kl"].to_json()
    assert (shown["name"], shown["width"], shown["place"]) == ("width8-seed0", 8, str(student.resolve()))


def words(setup: Path, change: Callable[[dict[str, int]], dict[str, int]], split: Any = None) -> Any:
    """The tokenizer in `setup` with another vocabulary, or another way to split words."""
    vocabulary = change({"<s>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, 64)}})
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split or pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", unk_token="<unk>")


def small_llama(vocabulary: int = 64) -> Any:
    torch.manual_seed(0)
    sizes = {**tiny_families.SIZES, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes)).eval()


OTHER_TOKENS = {
    "other ids": (lambda v: {**v, "w5": 6, "w6": 5}, None, r"'w5' is its token 6, and the teacher's 5"),
    "a token more": (lambda v: {**v, "w99": 64}, None, r"only it has the token 'w99'"),
    "tokens fewer": (
        lambda v: {k: i for k, i in v.items() if i < 60},
        None,
        r"only the teacher has .* 'w60' and 3 more",
    ),
    "other words": (lambda v: v, pre_tokenizers.Split("w", "isolated"), r"it cuts 'w"),
}


@pytest.mark.parametrize(("change", "split", "says"), OTHER_TOKENS.values(), ids=OTHER_TOKENS)
def test_a_student_that_needs_other_tokens_is_refused(setup: Path, change: Any, split: Any, says: str) -> None:
    teacher = tlc.load_model(str(setup / "model"))
    student = LoadedModel(small_llama(65), words(setup, change, split), "student", None)
    stream = TokenStream(str(setup / "text.jsonl"), teacher.tokenizer, context=16)
    with pytest.raises(CapacityError, match=rf"^the student 'a' has a different tokenizer from the teacher \({says}"):
        observe(teacher, {"a": student}, stream, progress=False)


def test_a_token_that_was_added_is_no_difference(setup: Path) -> None:
    teacher = tlc.load_model(str(setup / "model"))
    padded = words(setup, lambda v: v)
    padded.add_special_tokens({"pad_token": "<pad>"})
    student = LoadedModel(small_llama(65), padded, "student", None)
    stream = TokenStream(str(setup / "text.jsonl"), teacher.tokenizer, context=16)
    run = observe(teacher, {"a": student}, stream, tokens=200, progress=False)
    assert run.settings["compared_logits"] == 64
    with pytest.raises(CapacityError, match=r"the student 'b' has 60 logits, but there are 64 tokens to predict"):
        observe(
            teacher,
            {"b": LoadedModel(small_llama(60), teacher.tokenizer, "b", None)},
            TokenStream(["w2 w3 w4 w5"], teacher.tokenizer, context=16),
            progress=False,
        )


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"students": {}}, CapacityError, "there is no student to judge"),
        ({"students": {"a": 3}}, CapacityError, "the student 'a' is a int, which predicts no tokens"),
        ({"tokens": 0}, CapacityError, "tokens = 0 and batch_rows = 8 judge nothing"),
        ({"stream": torch.ones(3, 1, dtype=torch.long)}, TokenSourceError, "the text has no token to predict"),
        ({"stream": torch.full((2, 4), 70)}, CapacityError, "token id 70, but the teacher's vocabulary has 50"),
        ({"stream": torch.full((2, 20), 3)}, CapacityError, "rows have 20 positions, more than the teacher's 16"),
    ],
)
def test_bad_input(change: dict[str, Any], kind: type[Exception], says: str) -> None:
    options = {"students": {"a": other("llama")}, "stream": ROWS, **change}
    with pytest.raises(kind, match=says):
        observe(other("gpt-neox"), progress=False, **options)


def test_predictions_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = other("llama")
    with torch.no_grad():
        broken.get_input_embeddings().weight[TEXT[0, 0]] = float("nan")
    with pytest.raises(CapacityError, match="a prediction is NaN or infinite in document 0 or one near it"):
        observe(other("gpt-neox"), {"a": broken}, ROWS, out=tmp_path / "o", progress=False)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--source", "x.txt"], "no student is named: pass --student"),
        (["--student", "model"], "no text is named: pass --source"),
        (["--student", "nowhere", "--source", "text.jsonl"], "'nowhere' cannot be loaded"),
        (["--student", "model", "--student", "model", "--source", "text.jsonl"], "'model' is named twice"),
        (["--student", "model", "--source", "none.jsonl"], "none.jsonl"),
        (
            ["--student", "model", "--source", "text.jsonl", "--context", 64],
            "--context 64 is longer than the 32 positions",
        ),
        (["--student", "model", "--source", "text.jsonl", "--tokens", 0], "--tokens 0 judges nothing"),
        (["--student", "model", "--source", "text.jsonl", "--out", "full"], "already holds a distillation.json"),
    ],
)
def test_bad_input_on_the_command_line(
    options: list[Any], says: str, setup: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "text.jsonl"):
        Path(name).symlink_to(setup / name)
    Path("full").mkdir()
    Path("full/distillation.json").write_text("{}")
    code, _, err = cli("observe", "--teacher", "model", "--out", "out", *options)
    assert code == 2
    assert says in err
    assert err.count("\n") == 1
    assert not Path("out").exists()


def test_students_are_named_by_what_tells_them_apart(setup: Path) -> None:
    names = students_named(["a/final", "b/final", "org/pythia-70m", "org/pythia-70m@step3000"])
    assert list(names) == ["a/final", "b/final", "pythia-70m", "pythia-70m@step3000"]
    assert (names["pythia-70m@step3000"].place, names["pythia-70m@step3000"].revision) == ("org/pythia-70m", "step3000")
    assert list(students_named([str(students_of(setup))])) == ["width8-seed0", "width16-seed0"]


def test_what_was_judged_is_whole_or_refused() -> None:
    run = observe(other("gpt-neox"), {"a": other("llama")}, ROWS, progress=False)
    content = json.loads(json.dumps(run.to_json()))
    assert DistillationRun.from_json(content) == replace(run)
    content["students"][0]["judged"]["kl"].pop()
    with pytest.raises(ValueError, match="of different documents"):
        DistillationRun.from_json(content)
