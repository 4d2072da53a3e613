"""Distillation: exact losses and gradients, resumable training that leaves no student worse for its company, observed
floors.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import CHILDREN, alone, launch, run_in_a_child
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from place import placed
from tl_capacity.recipes.distill import DistillConfig, main
from torch.nn import functional as F

from tl_capacity import recipe
from tl_capacity.distillation import DistillationRun, DistillSettings, HiddenMatch, distill, observed_floors
from tl_capacity.distillation import losses as losses_module
from tl_capacity.distillation.curves import StudentCurve
from tl_capacity.distillation.data import Rows, read
from tl_capacity.distillation.losses import MATCHES, Head, Output, chunked_losses, compiled_divergence
from tl_capacity.distillation.observed import fit_power_law, observed_floor, power_law
from tl_capacity.distillation.settings import LogitLoss
from tl_capacity.errors import CapacityError, HookPointError, MeasurementError, TokenSourceError
from tl_capacity.models import head as head_module
from tl_capacity.models.head import CACHED_LOGITS
from tl_capacity.runtime.compiling import COMPILE
from tl_capacity.runtime.scratch import Scratch
from tl_capacity.storage.digests import fingerprint
from tl_capacity.text.streams import PADDING

VOCABULARY, TOKENS = 23, 37


def output(
    width: int,
    seed: int,
    bias: bool = False,
    cap: float | None = None,
    dtype: torch.dtype = torch.float32,
    vocabulary: int = VOCABULARY,
) -> Output:
    """Random hidden states and a head, sharp enough that divergences are about 1 nat."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: placed(torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype))  # noqa: E731
    head = Head(draw(vocabulary, width).requires_grad_(), draw(vocabulary).requires_grad_() if bias else None, cap)
    return Output(draw(TOKENS, width).requires_grad_(), head)


def labels() -> torch.Tensor:
    return placed(torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(9)))


def logits(of: Output) -> torch.Tensor:
    found = F.linear(of.hidden, of.head.weight, of.head.bias).double()
    return found if of.head.cap is None else of.head.cap * torch.tanh(found / of.head.cap)


def reference(teacher: Output, student: Output, loss: LogitLoss) -> torch.Tensor:
    """The loss as it is defined, with the whole logits of both in float64 and torch's own `kl_div`."""
    log_p, log_q = ((logits(of) / loss.temperature).log_softmax(-1) for of in (teacher, student))
    kl = lambda a, b: F.kl_div(b, a, log_target=True, reduction="sum")  # noqa: E731
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(loss.divergence, loss.beta)
    if beta in (0, 1):
        soft = kl(log_q, log_p) if beta else kl(log_p, log_q)
    else:  # as TRL computes it
        log_m = torch.logsumexp(torch.stack([log_q + log(1 - beta), log_p + log(beta)]), dim=0)
        soft = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    hard = F.cross_entropy(logits(student), labels(), reduction="sum")
    return ((1 - loss.ce_weight) * loss.temperature**2 * soft + loss.ce_weight * hard) / TOKENS


def parts(of: Output) -> list[torch.Tensor]:
    return [part for part in (of.hidden, of.head.weight, of.head.bias) if part is not None]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


LOSSES = [
    LogitLoss(),
    LogitLoss(temperature=2.0),
    LogitLoss("reverse_kl"),
    LogitLoss("reverse_kl", temperature=0.7, ce_weight=0.25),
    LogitLoss("jsd", beta=0.5),
    LogitLoss("jsd", beta=0.1, temperature=3.0, ce_weight=0.5),
    LogitLoss("jsd", beta=0.0),
    LogitLoss("jsd", beta=1.0),
    LogitLoss(ce_weight=1.0),
]


def in_chunks(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Have logits of so many tokens at a time, on any device."""
    monkeypatch.setattr(losses_module, "LOSS_TOKENS", tokens)
    monkeypatch.setattr(head_module, "DEVICE_LOGITS", tokens * VOCABULARY)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize(("chunk", "cached"), [(10, CACHED_LOGITS), (10, 1), (1000, CACHED_LOGITS), (1000, 60)])
@pytest.mark.parametrize(("bias", "cap"), [(False, None), (True, 5.0)])
def test_chunks_are_exact_against_the_definition(
    loss: LogitLoss, chunk: int, cached: int, bias: bool, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks(monkeypatch, chunk)
    monkeypatch.setattr(head_module, "CACHED_LOGITS", cached)
    teacher, students = output(8, 0, bias, cap), [output(width, width, bias, cap) for width in (3, 5)]
    losses = chunked_losses(teacher, students, labels(), loss)
    (losses * placed(torch.tensor([1.0, 2.0], dtype=torch.float64))).sum().backward()
    for i, student in enumerate(students):
        expected = reference(teacher, student, loss)
        assert relative(losses[i], expected) < 1e-5
        for part, gradient in zip(parts(student), torch.autograd.grad(expected * (i + 1), parts(student)), strict=True):
            assert part.grad is not None
            assert relative(part.grad, gradient) < 1e-5
    assert teacher.hidden.grad is None


def gradients_of(loss: LogitLoss) -> list[torch.Tensor]:
    """The losses of two students, and the gradients of their sum."""
    teacher, students = output(8, 0), [output(width, width) for width in (3, 5)]
    losses = chunked_losses(teacher, students, labels(), loss)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), [part for each in students for part in parts(each)])]


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """No divergence was compiled before a test, and what it compiled is not there after it."""
    compiled_divergence.cache_clear()
    yield
    compiled_divergence.cache_clear()


@pytest.mark.usefixtures("nothing_compiled")
def test_divergences_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where compiling fails, all is computed without it, and that is said once."""

    def fails(*_: object) -> None:
        raise RuntimeError("no compiler")

    in_chunks(monkeypatch, 10)
    loss = LogitLoss("jsd", beta=0.3)
    in_steps = gradients_of(loss)
    monkeypatch.setenv(COMPILE, "1")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    for found, expected in zip(gradients_of(loss), in_steps, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert caplog.text.count("torch.compile does not work here (RuntimeError)") == 1


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if not loss.ce_weight], ids=str)
def test_what_is_compiled_writes_to_none_of_its_arguments(loss: LogitLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch 2.11 a compiler for CPUs wrote the gradient over logits that the value still had to be read from."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    logits = placed(torch.randn(5, VOCABULARY))
    log_p = logits.flip(0).log_softmax(-1)
    versions = log_p._version, logits._version
    found = compiled_divergence(loss.divergence, loss.beta, "1")(logits.device, log_p, logits)
    assert found is not None
    assert (log_p._version, logits._version) == versions


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if not loss.ce_weight], ids=str)
def test_compiled_divergences(
    loss: LogitLoss, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Compiled, they give what they give in steps, with chunks of two lengths."""
    in_chunks(monkeypatch, 10)
    in_steps = gradients_of(loss)
    monkeypatch.setenv(COMPILE, "1")
    compiled = gradients_of(loss)
    assert "torch.compile" not in caplog.text
    for found, expected in zip(compiled, in_steps, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1), st.floats(0.5, 4), st.floats(0, 1), st.integers(0, 1000))
def test_gradients_are_those_of_finite_differences(
    beta: float, temperature: float, ce_weight: float, seed: int
) -> None:
    teacher, student = output(4, seed, dtype=torch.float64), output(2, seed + 1, bias=True, dtype=torch.float64)
    loss = LogitLoss("jsd", temperature, beta, ce_weight)

    def of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return chunked_losses(teacher, [Output(hidden, Head(weight, bias))], labels(), loss)[0]

    with pytest.MonkeyPatch.context() as patch:
        in_chunks(patch, 16)
        assert torch.autograd.gradcheck(of, tuple(parts(student)), eps=1e-6, atol=1e-5)


@given(st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_divergences_are_never_negative_and_zero_only_at_the_teacher(beta: float, seed: int) -> None:
    teacher, other = output(4, seed), output(4, seed + 1)
    loss = LogitLoss("jsd", beta=beta)
    same, different = chunked_losses(teacher, [teacher, other], labels(), loss).tolist()
    assert same == pytest.approx(0, abs=1e-6)
    assert different > 0 or not 1e-3 < beta < 0.999


def test_a_loss_without_gradient_is_the_same() -> None:
    teacher, student = output(8, 0), output(3, 1)
    with torch.no_grad():
        without = chunked_losses(teacher, [student], labels(), LogitLoss())
    assert not without.requires_grad
    assert float(without) == float(chunked_losses(teacher, [student], labels(), LogitLoss()).detach())


def test_parts_of_a_batch_add_up() -> None:
    teacher, student = output(8, 0), output(3, 1)
    part = lambda of, rows: Output(of.hidden[rows], of.head)  # noqa: E731
    halves = [
        chunked_losses(part(teacher, rows), [part(student, rows)], labels()[rows], LogitLoss(), total=TOKENS)
        for rows in (slice(0, 20), slice(20, None))
    ]
    assert float(sum(halves).detach()) == pytest.approx(
        float(chunked_losses(teacher, [student], labels(), LogitLoss()).detach()), rel=1e-6
    )
    assert chunked_losses(part(teacher, slice(0)), [part(student, slice(0))], labels()[:0], LogitLoss()).item() == 0


def test_memory_that_is_kept_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and vocabularies of other sizes, in turns, in the memory of the ones before."""
    in_chunks(monkeypatch, 10)
    scratch = Scratch()
    for rows, vocabulary in ((20, 23), (TOKENS, 23), (7, 24), (TOKENS, 23)):
        teacher, student = (output(width, width, vocabulary=vocabulary) for width in (8, 3))
        teacher, student = (Output(of.hidden[:rows], of.head) for of in (teacher, student))
        fresh, kept = (
            float(chunked_losses(teacher, [student], labels()[:rows], LogitLoss(), scratch=s).detach())
            for s in (None, scratch)
        )
        assert fresh == kept > 0


def test_a_teacher_in_lower_precision_is_taken_as_it_is() -> None:
    teacher, student = output(8, 0), output(3, 1)
    rounded = Output(teacher.hidden.bfloat16(), Head(teacher.head.weight.bfloat16()))
    assert chunked_losses(rounded, [student], labels(), LogitLoss()).item() == pytest.approx(
        reference(teacher, student, LogitLoss()).item(), rel=0.05
    )


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"divergence": "mse"}, "'mse' is not a loss to distil with: choose one of forward_kl, reverse_kl, jsd"),
        ({"temperature": 0.0}, "temperature = 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"beta": 1.5}, "beta = 1.5"),
        ({"ce_weight": -0.1}, "ce_weight = -0.1"),
    ],
)
def test_losses_that_make_no_sense_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(CapacityError, match=message):
        LogitLoss(**settings_)


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(CapacityError, match="the student's vocabulary has 24 tokens and the teacher's 23"):
        chunked_losses(output(8, 0), [output(3, 1, vocabulary=24)], labels(), LogitLoss())


def rows(n: int, seed: int = 0, positions: int = 12, vocabulary: int = 100) -> np.ndarray[Any, Any]:
    """Rows of tokens each of which follows from the one before but for some noise, so that there
    is something to learn.
    """
    random = np.random.default_rng(seed)
    found = np.zeros((n, positions), dtype=np.int64)
    for position in range(1, positions):
        found[:, position] = (3 * found[:, position - 1] + 7 + random.integers(0, 3, size=n)) % vocabulary
    return found


SMALL = DistillSettings(tokens=1_500, batch_rows=6, evaluations=10, heldout_tokens=150, lr=3e-3)


def train_tokens() -> np.ndarray[Any, Any]:
    return rows(200)


def losses_of(run: DistillationRun) -> dict[str, tuple[float, ...]]:
    return {student.name: (*student.heldout_kl, *student.train_loss) for student in run}


@pytest.fixture(scope="module")
def teacher(make_model: Callable[..., Any]) -> Any:
    return make_model("gpt_neox")


@pytest.fixture(scope="module")
def finished(teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[DistillationRun, Path]:
    folder = tmp_path_factory.mktemp("distillation") / "run"
    return (
        distill(
            teacher,
            [8, 16],
            train_tokens(),
            settings=replace(SMALL, seeds=(0, 1), control=True),
            out=folder,
            progress=False,
        ),
        folder,
    )


def test_students_learn_and_the_control_starts_at_the_teacher(finished: tuple[DistillationRun, Path]) -> None:
    run, _ = finished
    assert [s.name for s in run] == ["width8-seed0", "width8-seed1", "width16-seed0", "width16-seed1", "control"]
    assert run.widths == (8, 16)
    assert run["control"].heldout_kl[0] == pytest.approx(0, abs=1e-7)
    for student in run.students[:-1]:
        assert student.heldout_kl[-1] < 0.9 * student.heldout_kl[0]
        assert len(student.train_loss) == len(student.heldout_kl) - 1 == 10
        assert student.tokens[0] == 0
        assert student.tokens[-1] == pytest.approx(1_500, abs=66)
    assert run["width8-seed0"].heldout_kl != run["width8-seed1"].heldout_kl


def test_the_heldout_loss_is_the_kl_of_the_saved_student_on_rows_it_never_saw(
    finished: tuple[DistillationRun, Path], teacher: Any
) -> None:
    from transformers import AutoModelForCausalLM

    run, folder = finished
    held = torch.from_numpy(read(train_tokens(), None, SMALL.tokens, SMALL.heldout_tokens, False)[1].tokens).long()
    trained = read(train_tokens(), None, SMALL.tokens, SMALL.heldout_tokens, False)[0].tokens
    assert not {tuple(row) for row in held.tolist()} & {tuple(row) for row in trained.tolist()}
    assert run.heldout_tokens == held[:, 1:].numel()
    for student in run:
        model = placed(AutoModelForCausalLM.from_pretrained(folder / "students" / student.name))
        with torch.no_grad():
            log_p, log_q = (
                m(placed(held)).logits[:, :-1].double().log_softmax(-1).flatten(0, 1).cpu() for m in (teacher, model)
            )
        assert student.heldout_kl[-1] == pytest.approx(
            float(F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")), rel=1e-4, abs=1e-6
        )
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).view(len(held), -1).sum(1)
        parts = zip(held.split(SMALL.batch_rows), kl.split(SMALL.batch_rows), strict=True)
        expected = [(rows[:, 1:].numel(), float(sums.sum())) for rows, sums in parts]
        assert [count for count, _ in student.heldout_parts] == [count for count, _ in expected]
        nats = [part for _, part in student.heldout_parts]
        assert nats == pytest.approx([part for _, part in expected], rel=1e-3, abs=1e-4)
        assert sum(nats) / run.heldout_tokens == student.heldout_kl[-1]


def test_a_student_comes_out_as_if_it_were_alone(finished: tuple[DistillationRun, Path], teacher: Any) -> None:
    run, _ = finished
    alone = distill(teacher, [16], train_tokens(), settings=replace(SMALL, seeds=(1,)), progress=False)
    assert losses_of(alone)["width16-seed1"] == losses_of(run)["width16-seed1"]


def test_the_teacher_is_left_as_it_was(make_model: Callable[..., Any]) -> None:
    model = make_model("gpt_neox")
    before = fingerprint(model)
    distill(model, [8], train_tokens(), settings=replace(SMALL, tokens=200), progress=False)
    assert fingerprint(model) == before
    assert not any(p.grad is not None for p in model.parameters())


def test_a_run_survives_saving(finished: tuple[DistillationRun, Path], teacher: Any) -> None:
    run, folder = finished
    assert DistillationRun.load(folder) == run
    assert not list(folder.glob("checkpoint*"))
    again = distill(
        teacher,
        [8, 16],
        train_tokens(),
        settings=replace(SMALL, seeds=(0, 1), control=True),
        out=folder,
        resume=True,
        progress=False,
    )
    assert again == run
    with pytest.raises(CapacityError, match="already holds a distillation"):
        distill(teacher, [8, 16], train_tokens(), settings=SMALL, out=folder)
    with pytest.raises(
        CapacityError, match=r"with students \[.*\], but this one has .*: resume with the same settings"
    ):
        distill(teacher, [8], train_tokens(), settings=SMALL, out=folder, resume=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.update(schema=99),
        lambda c: c.pop("schema") and None,
        lambda c: c.pop("teacher") and c.update(teachers="x"),
        lambda c: c["students"][0]["heldout_kl"].pop(),
        lambda c: c["students"][0].update(width=None) or c["students"][0]["tokens"].reverse(),
        lambda c: c.update(students=[]),
        lambda c: c["students"][0].update(heldout_kl=["a"] * 11),
    ],
)
def test_a_damaged_run_is_refused(
    finished: tuple[DistillationRun, Path], tmp_path: Path, spoil: Callable[[Any], Any]
) -> None:
    content = json.loads((finished[1] / "distillation.json").read_text())
    spoil(content)
    (tmp_path / "distillation.json").write_text(json.dumps(content))
    with pytest.raises(MeasurementError, match=r"distil again|upgrade"):
        DistillationRun.load(tmp_path)
    with pytest.raises(MeasurementError, match="is not a distillation"):
        DistillationRun.load(tmp_path / "none")


def test_a_loss_that_is_not_finite_stops_with_the_checkpoint_kept(teacher: Any, tmp_path: Path) -> None:
    with pytest.raises(
        CapacityError,
        match=(
            r"width8-seed0 diverged at step \d+, with .*: choose a lower --lr \(the last good checkpoint stays in .*\)"
        ),
    ):
        distill(
            teacher,
            [8],
            train_tokens(),
            settings=replace(SMALL, lr=1e38),
            out=tmp_path,
            progress=False,
            checkpoint_seconds=0.0,
        )
    from tl_capacity.distillation import checkpoint

    kept = checkpoint.read(tmp_path)
    assert kept is not None
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept[1].values())


@pytest.mark.slow
def test_hidden_states_are_matched_through_a_learned_map(teacher: Any) -> None:
    hook = "blocks.1.hook_resid_post"
    plain = distill(teacher, [16], train_tokens(), settings=SMALL, progress=False)
    for kind in MATCHES:
        run = distill(
            teacher,
            [16],
            train_tokens(),
            settings=replace(SMALL, hidden=(HiddenMatch(hook, kind, 2.0),)),
            progress=False,
        )
        (student,) = run
        assert student.train_loss[-1] < student.train_loss[0]
        assert student.train_loss[0] > plain.students[0].train_loss[0]
        assert student.heldout_kl[-1] != plain.students[0].heldout_kl[-1]
        assert student.heldout_kl[0] == plain.students[0].heldout_kl[0], "the judgement is of the logits alone"
    for elsewhere, message in (
        ("blocks.9.hook_resid_post", "is not a hook point of this model"),
        ("blocks.1.hook_mlp_out", "cannot be matched at 'blocks.1.h"),
    ):
        with pytest.raises(HookPointError, match=message):
            distill(
                teacher, [16], train_tokens(), settings=replace(SMALL, hidden=(HiddenMatch(elsewhere),)), progress=False
            )


def test_hidden_losses_are_what_they_say() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 5, 7))
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    np.testing.assert_allclose(MATCHES["mse"](x, y).numpy(force=True), ((a - b) ** 2).mean(1))
    np.testing.assert_allclose(
        MATCHES["cosine"](x, y).numpy(force=True),
        1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1),
    )
    assert HiddenMatch.parse("blocks.3.hook_resid_post=cosine*0.5") == HiddenMatch(
        "blocks.3.hook_resid_post", "cosine", 0.5
    )
    assert HiddenMatch.parse("blocks.3.hook_resid_post") == HiddenMatch("blocks.3.hook_resid_post")
    for text in ("blocks.3.hook_resid_post=l1", "blocks.3.hook_resid_post=mse*x", "blocks.3.hook_resid_post=mse*-1"):
        with pytest.raises(CapacityError):
            HiddenMatch.parse(text)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"schedule": "linear"}, "'linear' is not a learning-rate schedule"),
        ({"mixed_precision": "fp8"}, "'fp8' is not a precision"),
        ({"tokens": 0}, "tokens = 0 trains nothing"),
        ({"lr": -1.0}, "lr = -1.0 trains nothing"),
        ({"warmup": 0.9}, "are not shares of one run"),
        ({"seeds": (1, 1)}, r"seeds = \(1, 1\)"),
        ({"start": "teacher"}, "'teacher' is not a way to start all students"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(CapacityError, match=message):
        replace(SMALL, **settings_)


def test_the_command_line_has_the_defaults_of_the_settings() -> None:
    assert DistillConfig().settings() == DistillSettings()
    given = DistillConfig(loss="jsd", beta=0.1, hidden=("blocks.1.hook_resid_post=cosine*0.5",), lr=1e-4)
    assert given.settings() == DistillSettings(
        loss=LogitLoss("jsd", beta=0.1), hidden=(HiddenMatch("blocks.1.hook_resid_post", "cosine", 0.5),), lr=1e-4
    )


def test_input_that_cannot_be_distilled_is_refused(teacher: Any) -> None:
    def attempt(widths: list[int], text: Any, **more: Any) -> None:
        distill(teacher, widths, text, settings=SMALL, progress=False, **more)

    with pytest.raises(CapacityError, match="cannot build a student of width 17: the nearest widths are 16 and 18"):
        attempt([17], train_tokens())
    with pytest.raises(CapacityError, match="widths = 8,8 name no students, or one twice"):
        attempt([8, 8], train_tokens())
    with pytest.raises(TokenSourceError, match="holds 1,023 tokens to train on, fewer than the 1,500 asked for"):
        attempt([8], rows(100))
    with pytest.raises(TokenSourceError, match="there is no held-out text"):
        attempt([8], train_tokens(), heldout=np.zeros((3, 1), dtype=np.int64))
    with pytest.raises(TokenSourceError, match="none is left to train on"):
        attempt([8], rows(1))
    with pytest.raises(CapacityError, match="token id 150, but the teacher's vocabulary has 100"):
        attempt([8], np.where(train_tokens() == 5, 150, train_tokens()))
    with pytest.raises(CapacityError, match="rows have 40 positions, more than the teacher's 32"):
        attempt([8], rows(200, positions=40))
    with pytest.raises(CapacityError, match="a single process has nobody to share the teacher with"):
        attempt([8], train_tokens(), shard_teacher=True)
    with pytest.raises(CapacityError, match="nothing to resume"):
        attempt([8], train_tokens(), resume=True)
    with pytest.warns(UserWarning, match="width 40 is wider than its teacher"):
        distill(teacher, [40], train_tokens(), settings=replace(SMALL, tokens=100), progress=False)


def test_each_epoch_takes_every_row_once_and_short_rows_count_less() -> None:
    table = rows(10).astype(np.int32)
    table[3, 5:] = PADDING
    text = Rows(table)
    assert text.predicted.tolist() == [11, 11, 11, 4, *[11] * 6]
    batches = [text.batch(step, 4, seed=0) for step in range(5)]  # two epochs
    seen = [tuple(row[row != PADDING]) for batch in batches for row in batch]
    every = sorted(tuple(row[row != PADDING]) for row in table)
    assert sorted(seen[:10]) == sorted(seen[10:]) == every
    assert seen[:10] != seen[10:]
    np.testing.assert_array_equal(text.batch(3, 4, seed=0), batches[3])


def test_padding_changes_nothing(teacher: Any) -> None:
    padded = np.pad(train_tokens(), ((0, 0), (0, 5)), constant_values=PADDING)
    whole, same = (
        distill(teacher, [8], text, settings=replace(SMALL, tokens=300), progress=False)
        for text in (train_tokens(), padded)
    )
    assert losses_of(whole) == losses_of(same)


def test_padding_on_the_left_is_no_text(teacher: Any, tmp_path: Path) -> None:
    """Rows that a mask pads on the left give the curves of the same rows padded at the end, and the held-out loss that
    transformers' own models have with the mask.
    """
    from transformers import AutoModelForCausalLM

    random, curves = np.random.default_rng(4), {}
    lengths = random.integers(3, 12, size=30)
    ids = torch.from_numpy(random.integers(1, 90, size=(30, 12)))
    for side in ("left", "right"):
        place = torch.arange(12) if side == "right" else 11 - torch.arange(12)
        mask = (place < torch.from_numpy(lengths)[:, None]).long()
        shift = np.zeros_like(lengths) if side == "right" else 12 - lengths
        order = (np.arange(12) - shift[:, None]) % 12
        text = {"input_ids": ids.gather(1, torch.from_numpy(order)), "attention_mask": mask}
        settings_ = replace(SMALL, tokens=100)
        curves[side] = distill(
            teacher, [8], text, heldout=text, settings=settings_, out=tmp_path / side, progress=False
        )
        model = placed(AutoModelForCausalLM.from_pretrained(tmp_path / side / "students" / "width8-seed0"))
        run = curves[side]
        rows = int((np.cumsum(lengths - 1) < run.heldout_tokens).sum()) + 1
        assert run.heldout_tokens == int((lengths - 1)[:rows].sum())
        given = {name: placed(value[:rows]) for name, value in text.items()}
        predicts = (given["attention_mask"][:, :-1] * given["attention_mask"][:, 1:]).bool()
        positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            log_p, log_q = (
                m(**given, position_ids=positions).logits[:, :-1][predicts].double().log_softmax(-1)
                for m in (teacher, model)
            )
        kl = float(F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"))
        assert run["width8-seed0"].heldout_kl[-1] == pytest.approx(kl, rel=1e-4)
    assert losses_of(curves["left"]) == losses_of(curves["right"])


@pytest.mark.parametrize("side", ["begins", "ends"])
def test_fillers_without_a_mask_are_said_to_be_text(side: str) -> None:
    text = rows(4)
    text[1] = [0, 0, 0, *text[1][3:]] if side == "begins" else [*text[1][:-3], 0, 0, 0]
    with pytest.warns(UserWarning, match=f"a row {side} with 3 tokens of id 0, and no attention mask came with it"):
        read(text, rows(4), 30, 10, False, special_ids=[0])


def test_schedules_rise_and_fall() -> None:
    cosine, wsd = (
        np.array([replace(SMALL, schedule=name).rate(step, 100) for step in range(100)]) for name in ("cosine", "wsd")
    )
    for rates in (cosine, wsd):
        np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
        assert (np.diff(rates[5:]) <= 0).all()
        assert 0 < rates[-1] < 0.06
    assert (wsd[5:81] == 1).all()


@pytest.fixture(scope="module")
def on_disk(teacher: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    lines = [
        json.dumps({"text": " ".join(f"w{max(1, token)}" for token in row[1:])}) for row in rows(200, positions=31)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def command(on_disk: Path, out: Path, *more: str) -> list[str]:
    given = {
        "teacher": on_disk / "teacher",
        "widths": "8,16",
        "tokens": 4_000,
        "source": on_disk / "text.jsonl",
        "heldout-tokens": 300,
        "evaluations": 8,
    }
    options = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    fixed = ["--context", "32", "--batch-rows", "4", "--threads", "1", "--out", str(out)]
    return ["run", "distill", *options, *fixed, *more]


@pytest.fixture(scope="module")
def undisturbed(on_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillationRun:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    alone(command(on_disk, out))
    return DistillationRun.load(out)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_curves(on_disk: Path, undisturbed: DistillationRun, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = CHILDREN.Process(target=run_in_a_child, args=(command(on_disk, out, "--checkpoint-seconds", "0"),))
    process.start()

    def step() -> int:
        try:
            return int(json.loads((out / "checkpoint.json").read_text())["step"])
        except (OSError, ValueError):
            return -1

    while step() < 5 and process.exitcode is None:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "distillation.json").exists()
    with pytest.raises(CapacityError, match="already holds a distillation: resume it with --resume"):
        recipe.run(main, command(on_disk, out)[2:])
    with pytest.raises(CapacityError, match=r"lr 0\.003, but this one has 0\.01: resume with the same settings"):
        recipe.run(main, command(on_disk, out, "--resume", "--lr", "0.01")[2:])
    alone(command(on_disk, out, "--resume"))
    assert losses_of(DistillationRun.load(out)) == losses_of(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--shard-teacher",)])
def test_two_processes_follow_the_curves_of_one(
    on_disk: Path, undisturbed: DistillationRun, tmp_path: Path, more: tuple[str, ...]
) -> None:
    assert launch([command(on_disk, tmp_path / "run", *more)] * 2) == [0, 0]
    both, one = losses_of(DistillationRun.load(tmp_path / "run")), losses_of(undisturbed)
    for name, losses in one.items():
        np.testing.assert_allclose(both[name], losses, rtol=1e-5)


def curve(floor: float, a: float, b: float, noise: float = 0.0, n: int = 60, seed: int = 0) -> StudentCurve:
    share = np.arange(1, n + 1) / n
    losses = power_law(share, floor, a, b) + noise * np.random.default_rng(seed).normal(size=n)
    return StudentCurve("x", 8, 0, "random", 1, 1, (0, *(int(1e6 * s) for s in share)), (5.0, *map(float, losses)))


@given(st.floats(0, 3), st.floats(0.05, 2), st.floats(0.3, 3))
@settings(max_examples=25, deadline=None)
def test_the_floor_of_an_exact_power_law_is_found(floor: float, a: float, b: float) -> None:
    t = np.linspace(0.1, 1, 50)
    found = fit_power_law(t, power_law(t, floor, a, b))
    np.testing.assert_allclose(power_law(t, *found), power_law(t, floor, a, b), atol=1e-4)
    assert found[0] == pytest.approx(floor, abs=0.02 + 0.02 * a / b)


@pytest.mark.slow
def test_intervals_cover_the_floor_about_as_often_as_they_say() -> None:
    covered = [
        f.low <= 1.0 <= f.high
        for f in (observed_floor(curve(1.0, 0.5, 1.0, noise=0.005, seed=seed)) for seed in range(20))
        if f.low is not None
    ]
    assert len(covered) == 20
    assert sum(covered) >= 13


def test_floors_without_a_fit_are_the_mean_of_the_last_tenth() -> None:
    few = observed_floor(curve(1.0, 0.5, 1.0, n=5))
    assert (few.low, few.high) == (None, None)
    assert few.value == few.last_tenth == pytest.approx(1.5)
    whole = observed_floor(curve(1.0, 0.5, 1.0))
    share = np.arange(55, 61) / 60
    assert whole.last_tenth == pytest.approx(np.mean(1 + 0.5 / share), abs=1e-6)
    assert whole.falling == pytest.approx(whole.last_tenth - whole.value)
    assert (few.last_tenth_low, few.falling_low) == (None, None)
    noisy = observed_floor(curve(1.0, 0.5, 1.0, noise=0.005))
    for low, value, high in (
        (noisy.last_tenth_low, noisy.last_tenth, noisy.last_tenth_high),
        (noisy.falling_low, noisy.falling, noisy.falling_high),
    ):
        assert low is not None
        assert high is not None
        assert low < value < high
        assert high - low < 0.3
    # The mean of six evaluations wavers less than the point to which all of them lead.
    assert noisy.last_tenth_high - noisy.last_tenth_low < noisy.high - noisy.low


@pytest.mark.slow
def test_floors_of_a_run_are_the_same_each_time(finished: tuple[DistillationRun, Path]) -> None:
    run, _ = finished
    floors = observed_floors(run)
    assert floors == observed_floors(run)
    assert [f.name for f in floors] == [s.name for s in run]
    assert all(0 <= f.value <= f.last_tenth + 0.05 for f in floors)
    assert floors[-1].low is None, "a control is not fitted"
