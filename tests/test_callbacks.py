"""CapacityCallback with the real `Trainer`, and with TRL's trainers where TRL is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from place import on_cpu, placed
from transformers import Trainer, TrainerCallback, TrainingArguments

from tl_capacity import TokenStream, add_capacity_hooks, load_model, load_sae, observe
from tl_capacity.callbacks import CapacityCallback, KeptFeatures
from tl_capacity.distillation.students import new_student
from tl_capacity.errors import CapacityError
from tl_capacity.results.estimate import Estimate
from tl_capacity.storage.digests import fingerprint

VOCABULARY = 100
ROWS = placed(torch.randint(1, VOCABULARY, (16, 12), generator=torch.Generator().manual_seed(5)))


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options = {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": on_cpu()}
    return TrainingArguments(str(folder), **{**options, **quiet, **changes})


def examples(n: int = 40) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(1, VOCABULARY, (n, 12), generator=torch.Generator().manual_seed(6))
    return [{"input_ids": row, "labels": row} for row in ids]


class Reporter(TrainerCallback):
    """What a tracker such as wandb's is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.told.append((state.global_step, dict(logs)))


def trained(student: Any, folder: Path, make: Callable[[Trainer], TrainerCallback] | None) -> Reporter:
    torch.manual_seed(0)
    reporter = Reporter()
    trainer = Trainer(model=student, args=arguments(folder), train_dataset=examples(), callbacks=[reporter])
    if make is not None:
        trainer.add_callback(make(trainer))
    trainer.train()
    return reporter


def test_it_logs_what_observe_finds(make_model: Callable[..., Any], tmp_path: Path) -> None:
    teacher, student = make_model("gpt2"), make_model("gpt_neox", seed=1)
    before = observe(teacher, {"s": student}, ROWS, progress=False)["s"].judged
    reporter = trained(student, tmp_path, lambda t: CapacityCallback(t, teacher, ROWS, every=2, tokens=176, floor=0.01))
    after = observe(teacher, {"s": student}, ROWS, progress=False)["s"].judged
    told = {step: logs for step, logs in reporter.told if "capacity/heldout_kl" in logs}
    assert list(told) == [0, 2, 4, 5]
    for step, judged in ((0, before), (5, after)):
        assert judged is not None
        kl = judged.figures["kl"]
        found = told[step]
        assert found["capacity/heldout_kl"] == pytest.approx(kl.value, abs=1e-6)
        assert found["capacity/heldout_kl_low"] == pytest.approx(kl.low, abs=1e-6)
        assert found["capacity/agreement"] == pytest.approx(judged.figures["agreement"].value)
        assert found["capacity/above_teacher"] == pytest.approx(judged.figures["above_teacher"].value, abs=1e-6)
        assert found["capacity/predicted_floor"] == 0.01
    first, last = (told[step]["capacity/heldout_kl"] for step in (0, 5))
    assert told[0]["capacity/still_to_go"] == 1
    assert told[5]["capacity/still_to_go"] == pytest.approx((last - 0.01) / (first - 0.01))


@pytest.mark.slow
def test_training_is_as_without_it(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """The student has dropout, so that a draw too many, or a mode that stays, would show."""
    teacher, fingerprints, losses = make_model("gpt2"), [], []
    for make in (None, lambda t: CapacityCallback(t, teacher, ROWS, every=1, tokens=176)):
        student = make_model("gpt_neox", seed=1)
        reporter = trained(student, tmp_path, make)
        fingerprints.append(fingerprint(student))
        losses.append([logs["loss"] for _, logs in reporter.told if "loss" in logs])
        assert student.training
    assert fingerprints[0] == fingerprints[1]
    assert losses[0] == losses[1]
    assert not teacher.training
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


def test_a_floor_may_have_an_interval(make_model: Callable[..., Any], tmp_path: Path) -> None:
    teacher, student = make_model("gpt2"), make_model("gpt_neox", seed=1)
    floor = Estimate(1e9, 0.5, 2e9)
    reporter = trained(
        student, tmp_path, lambda t: CapacityCallback(t, teacher, ROWS, every=9, tokens=176, floor=floor)
    )
    told = [logs for _, logs in reporter.told if "capacity/heldout_kl" in logs]
    assert [logs["capacity/predicted_floor_low"] for logs in told] == [0.5, 0.5]
    assert "capacity/still_to_go" not in told[0]  # the student starts below it


@pytest.mark.slow
def test_on_the_embedded_teacher_with_kept_features(tmp_path: Path) -> None:
    hook, teacher = "blocks.1.hook_resid_post", load_model("embedded")
    _, sae = load_sae(str(teacher.named.saes[hook]))
    stream = TokenStream("embedded:heldout", teacher.tokenizer, context=64)
    with add_capacity_hooks(teacher.model, {hook: sae}) as capacity:
        measured = capacity.run(stream, max_tokens=4_000, progress=False).measurement()[hook]
    student, kept = new_student(teacher.model, 16), KeptFeatures(sae, measured, stream, max_tokens=8_000)
    reporter = Reporter()
    trainer = Trainer(
        model=student,
        args=arguments(tmp_path, max_steps=2),
        train_dataset=[{"input_ids": row, "labels": row} for row in next(iter(stream)).tokens[:, :40].clip(min=0)],
        callbacks=[reporter],
    )
    trainer.add_callback(CapacityCallback(trainer, teacher, stream, every=2, tokens=1_000, kept=kept))
    trainer.train()
    told = [logs for _, logs in reporter.told if "capacity/kept_features" in logs]
    assert len(told) == 2
    for logs in told:
        assert 0 <= logs["capacity/kept_features"] < logs["capacity/kept_features_of_teacher"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"every": 0}, "every = 0, tokens = 8192 and batch_rows = 8 evaluate nothing"),
        ({"stream": np.full((2, 99), 3)}, "rows have 99 positions, more than"),
        ({"stream": np.full((2, 9), 200)}, "token id 200, but the teacher's vocabulary has 100"),
    ],
)
def test_bad_input_is_refused_before_training(
    changes: dict[str, Any], says: str, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = Trainer(model=make_model("gpt_neox"), args=arguments(tmp_path), train_dataset=examples())
    options = {"stream": ROWS, **changes}
    with pytest.raises(CapacityError, match=says):
        CapacityCallback(trainer, make_model("gpt2"), **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "gkd"])
@pytest.mark.filterwarnings("default")  # of TRL's own
def test_with_trainers_of_trl(kind: str, setup: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset

    teacher, student = load_model(str(setup / "model")), new_student(load_model(str(setup / "model")).model, 16)
    teacher.tokenizer.pad_token = teacher.tokenizer.eos_token
    shared = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "max_length": 16,
        "gradient_checkpointing": False,
    }
    if kind == "sft":
        from trl import SFTConfig, SFTTrainer

        texts = [{"text": "w2 w3 w4 w5 w6 w7"}] * 8
        trainer: Any = SFTTrainer(
            student, SFTConfig(**shared), train_dataset=Dataset.from_list(texts), processing_class=teacher.tokenizer
        )
    else:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        teacher.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
        turns = [{"role": "user", "content": "w2 w3"}, {"role": "assistant", "content": "w4 w5 w6"}]
        trainer = GKDTrainer(
            student,
            teacher.model,
            GKDConfig(**shared, max_new_tokens=4, lmbda=0.0),
            train_dataset=Dataset.from_list([{"messages": turns}] * 8),
            processing_class=teacher.tokenizer,
        )
    stream = TokenStream(str(setup / "text.jsonl"), teacher.tokenizer, context=16)
    trainer.add_callback(CapacityCallback(trainer, teacher, stream, every=1, tokens=200))
    trainer.train()
    steps = [entry["step"] for entry in trainer.state.log_history if "capacity/heldout_kl" in entry]
    assert steps == [0, 1, 2]
