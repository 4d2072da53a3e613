"""Keeping chosen features: the loss as it is defined, and students that are trained with it."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import CHILDREN, Cli, alone, concept_of, launch, run_in_a_child
from hypothesis import given, settings
from hypothesis import strategies as st
from place import placed
from sklearn.metrics import log_loss

from tl_capacity.distillation import DistillationRun, DistillSettings, HiddenMatch, KeepFeatures, distill
from tl_capacity.distillation.losses import feature_loss
from tl_capacity.errors import CapacityError, DictionaryError, HookPointError

HOOK = "blocks.1.hook_resid_post"
SMALL = DistillSettings(tokens=1_500, batch_rows=6, evaluations=10, heldout_tokens=150)


def rows(n: int = 200) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(0)
    found = np.zeros((n, 12), dtype=np.int64)
    for position in range(1, 12):
        found[:, position] = (3 * found[:, position - 1] + 7 + random.integers(0, 3, size=n)) % 100
    return found


def told(tokens: int = 60, chosen: int = 5, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Logits, values, latents, rates and mean squares of some features."""
    draw = torch.Generator().manual_seed(seed)
    logits, values = torch.randn(2, tokens, chosen, generator=draw, dtype=torch.float64)
    latents = torch.rand(tokens, chosen, generator=draw, dtype=torch.float64)
    latents = latents * (torch.rand(tokens, chosen, generator=draw) < 0.3)
    latents[0] = 0.7
    return logits, values, latents, (latents != 0).double().mean(0), latents.square().mean(0)


def test_the_loss_is_what_scikit_learn_and_a_loop_say() -> None:
    logits, values, latents, rate, square = told()
    expected = []
    for i in range(latents.shape[1]):
        fires = (latents[:, i] != 0).numpy(force=True)
        cross = log_loss(fires, torch.sigmoid(logits[:, i]).numpy(force=True), labels=[False, True])
        entropy = log_loss(fires, np.full(len(fires), float(rate[i])), labels=[False, True])
        strength = sum(float(values[t, i] - latents[t, i]) ** 2 for t in np.flatnonzero(fires)) / len(fires)
        expected.append((cross / entropy + strength / float(square[i])) / 2)
    found = feature_loss(logits, values, latents, rate, square)
    assert float(found.mean()) == pytest.approx(np.mean(expected))


def test_nothing_told_is_one_and_all_told_is_nothing() -> None:
    _, values, latents, rate, square = told()
    blind = feature_loss(rate.logit().expand_as(latents), 0 * values, latents, rate, square)
    assert float(blind.mean()) == pytest.approx(1)
    sure = torch.where(latents != 0, 50.0, -50.0).double()
    assert float(feature_loss(sure, latents, latents, rate, square).mean()) == pytest.approx(0, abs=1e-9)


@given(st.integers(0, 1000), st.floats(0.1, 10))
@settings(max_examples=25, deadline=None)
def test_the_loss_is_never_negative_and_knows_no_unit(seed: int, unit: float) -> None:
    logits, values, latents, rate, square = told(seed=seed)
    loss = feature_loss(logits, values, latents, rate, square)
    assert (loss >= 0).all()
    torch.testing.assert_close(feature_loss(logits, unit * values, unit * latents, rate, unit**2 * square), loss)


@pytest.fixture(scope="module")
def teacher(make_model: Callable[..., Any]) -> Any:
    return make_model("gpt_neox")


@pytest.fixture(scope="module")
def sae(make_sae: Callable[..., Any]) -> Any:
    return make_sae("topk")


@pytest.fixture(scope="module")
def features(teacher: Any, sae: Any) -> tuple[int, ...]:
    """Six features that fire here and there."""
    with torch.no_grad():
        x = teacher(placed(torch.from_numpy(rows(20))), output_hidden_states=True).hidden_states[2]
    rate = (sae.encode(x.flatten(0, 1)) != 0).float().mean(0)
    return tuple(torch.nonzero((rate > 0.05) & (rate < 0.5)).view(-1)[:6].tolist())


def losses_of(run: DistillationRun) -> dict[str, tuple[float, ...]]:
    return {student.name: (*student.heldout_kl, *student.train_loss) for student in run}


def trained(teacher: Any, sae: Any, settings_: DistillSettings, **more: Any) -> DistillationRun:
    return distill(teacher, [8, 16], rows(), settings=settings_, saes={HOOK: sae}, progress=False, **more)


def test_the_first_training_loss_is_the_divergence_and_what_nothing_told_costs(
    teacher: Any, sae: Any, features: tuple[int, ...]
) -> None:
    """Before the first step a readout knows the rates alone; where a value is not 0 but the mean where it fires, the
    second term is the variance's share.
    """
    one_step = replace(SMALL, tokens=60, evaluations=1)
    plain = trained(teacher, sae, one_step)
    kept = trained(teacher, sae, replace(one_step, keep=(KeepFeatures(HOOK, features, 2.0),)))
    for mine, its in zip(kept, plain, strict=True):
        assert mine.heldout_kl[0] == its.heldout_kl[0], "students are judged by the divergence alone"
        assert 0.6 < mine.train_loss[0] - its.train_loss[0] < 2.2


def test_it_goes_with_every_other_option(teacher: Any, sae: Any, features: tuple[int, ...]) -> None:
    keep = KeepFeatures(HOOK, features, 1.0)
    other = KeepFeatures("blocks.0.hook_resid_post", features[:2], 0.5)
    with_all = replace(
        SMALL,
        tokens=300,
        keep=(keep, other),
        hidden=(HiddenMatch(HOOK, "mse", 0.1),),
        control=True,
        start="truncated",
        schedule="wsd",
    )
    run = distill(
        teacher,
        [8, 16],
        rows(),
        settings=with_all,
        saes={HOOK: sae, "blocks.0.hook_resid_post": sae},
        progress=False,
    )
    assert all(np.isfinite(losses).all() for losses in losses_of(run).values())
    assert run["control"].heldout_kl[0] == pytest.approx(0, abs=1e-6)


def test_a_student_comes_out_as_if_it_were_alone(teacher: Any, sae: Any, features: tuple[int, ...]) -> None:
    keep = replace(SMALL, tokens=300, keep=(KeepFeatures(HOOK, features),))
    alone_ = distill(teacher, [16], rows(), settings=keep, saes={HOOK: sae}, progress=False)
    assert losses_of(alone_)["width16-seed0"] == losses_of(trained(teacher, sae, keep))["width16-seed0"]


class StoppedError(Exception):
    """What ends a run in its middle."""


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    teacher: Any, sae: Any, features: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = replace(SMALL, tokens=420, evaluations=2, keep=(KeepFeatures(HOOK, features),))
    whole = trained(teacher, sae, keep, out=tmp_path / "whole", checkpoint_seconds=0.0)
    take, taken = torch.optim.AdamW.step, []

    def step(self: Any, *given: Any, **named: Any) -> Any:
        taken.append(None)
        if len(taken) == 5:
            raise StoppedError
        return take(self, *given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(StoppedError):
            trained(teacher, sae, keep, out=tmp_path / "torn", checkpoint_seconds=0.0)
    with pytest.raises(CapacityError, match=r"keep .*features.*, but this one has"):
        trained(
            teacher,
            sae,
            replace(keep, keep=(KeepFeatures(HOOK, features[1:]),)),
            out=tmp_path / "torn",
            resume=True,
        )
    resumed = trained(teacher, sae, keep, out=tmp_path / "torn", resume=True)
    assert losses_of(resumed) == losses_of(whole)
    for student in whole:
        first, second = (
            (tmp_path / which / "students" / student.name / "model.safetensors").read_bytes()
            for which in ("whole", "torn")
        )
        assert first == second
    assert DistillationRun.load(tmp_path / "torn").settings["keep"] == [
        {"hook": HOOK, "features": list(features), "weight": 1.0}
    ]


def test_a_run_from_before_there_were_features_to_keep_goes_on(teacher: Any, sae: Any, tmp_path: Path) -> None:
    run = distill(teacher, [8], rows(), settings=replace(SMALL, tokens=100), out=tmp_path, progress=False)
    assert "keep" not in run.settings
    assert "dictionaries" not in run.settings


def test_what_cannot_be_kept_is_refused(
    teacher: Any, sae: Any, features: tuple[int, ...], make_sae: Callable[..., Any]
) -> None:
    def attempt(*keep: KeepFeatures, **more: Any) -> None:
        given = {"saes": {HOOK: sae}} | more
        distill(teacher, [8], rows(), settings=replace(SMALL, keep=keep), progress=False, **given)

    with pytest.raises(DictionaryError, match="no feature 64 in a dictionary of 64"):
        attempt(KeepFeatures(HOOK, (64,)))
    with pytest.raises(
        CapacityError, match=r"no dictionary at 'blocks.0.hook_resid_post'.*\(dictionaries are at: blocks.1"
    ):
        attempt(KeepFeatures("blocks.0.hook_resid_post", features))
    with pytest.raises(HookPointError, match="is not a hook point of this model"):
        attempt(KeepFeatures("blocks.9.hook_resid_post", features), saes={"blocks.9.hook_resid_post": sae})
    with pytest.raises(CapacityError, match=r"blocks\.1\.hook_resid_post is named twice"):
        attempt(KeepFeatures(HOOK, (1,)), KeepFeatures(HOOK, (2,)))
    for wrong, message in (
        (((), 1.0), "no feature to keep at"),
        (((3, 3), 1.0), "feature 3 is named twice"),
        (((-1,), 1.0), "-1 is not a feature number"),
        (((1,), 0.0), "weight = 0 keeps no features"),
        (((1,), float("nan")), "weight = nan keeps no features"),
    ):
        with pytest.raises(CapacityError, match=message):
            KeepFeatures(HOOK, *wrong)


def test_more_features_than_the_budget_and_a_loss_that_is_drowned_are_said(
    teacher: Any, make_sae: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    dense = make_sae("standard")
    with torch.no_grad():
        dense.b_enc += 2
        x = teacher(placed(torch.from_numpy(rows(40))), output_hidden_states=True).hidden_states[2]
        fires = (dense.encode(x.flatten(0, 1)) != 0).any(0)
    every = tuple(torch.nonzero(fires).view(-1).tolist())
    with caplog.at_level(logging.WARNING, logger="tl_capacity"):
        distill(
            teacher,
            [2],
            rows(),
            settings=replace(SMALL, tokens=600, lr=0.1, keep=(KeepFeatures(HOOK, every, 1e4),)),
            saes={HOOK: dense},
            progress=False,
        )
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert f"{len(every)} features are to be kept at {HOOK}, but the capacity law" in said
    assert "gives a student of width 2 only" in said
    assert "the features to keep outweigh the distillation, so choose a lower --keep-weight" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"hook": "blocks.1.hook_resid_post"}', "names no features"),
        ('{"hook": "blocks.1.hook_resid_post", "features": [1.5]}', "names no features"),
        ('{"hook": "blocks.1.hook_resid_post", "features": "17"}', "names no features"),
        ('{"features": [1]}', "does not say where its features are"),
        ("[]", "does not say where its features are|no feature is named|names no features"),
        ("{", "cannot be read"),
    ],
)
def test_a_file_that_names_no_features_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(CapacityError, match=message):
        KeepFeatures.load(tmp_path / "f.json")


def test_a_file_names_features_of_one_hook_point_or_several(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text('[{"hook": "a", "features": [1, 2]}, {"hook": "b", "features": [3]}]')
    assert KeepFeatures.load(tmp_path / "f.json") == (KeepFeatures("a", (1, 2)), KeepFeatures("b", (3,)))
    (tmp_path / "bare.json").write_text("[4, 5]")
    assert KeepFeatures.load(tmp_path / "bare.json", "c") == (KeepFeatures("c", (4, 5)),)


def command(setup: Path, out: Path, *more: object) -> list[object]:
    given = ["--teacher", setup / "model", "--source", setup / "text.jsonl", "--widths", "8,16", "--sae", setup / "sae"]
    small = ["--tokens", 1_500, "--heldout-tokens", 300, "--evaluations", 4, "--context", 32, "--threads", 1]
    return ["run", "distill", *given, *small, "--out", out, *more]


@pytest.mark.slow
def test_the_command_keeps_the_features_of_a_file_and_of_a_concept(cli: Cli, setup: Path, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(json.dumps({"features": [0, 1, 2]}))
    keep = ["--keep", tmp_path / "f.json", "--keep-weight", 0.5]
    code, _, err = cli(*command(setup, tmp_path / "file", *keep))
    assert code == 0, err
    assert DistillationRun.load(tmp_path / "file").settings["keep"] == [
        {"hook": HOOK, "features": [0, 1, 2], "weight": 0.5}
    ]
    concept = ["--keep", f"concept:{concept_of(setup)}", "--concept-features", 3]
    code, _, err = cli(*command(setup, tmp_path / "concept", *concept))
    assert code == 0, err
    [kept] = DistillationRun.load(tmp_path / "concept").settings["keep"]
    assert (kept["hook"], len(kept["features"])) == (HOOK, 3)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (["--keep", "nothing.json"], "--keep nothing.json names no features: pass a JSON file"),
        (["--keep", "concept:nothing"], "nothing"),
        (["--keep", "concept:embedded"], "name one, as concept:"),
        (["--keep", "concept:question", "--keep-hook", "blocks.2.hook_resid_post"], "there is no dictionary at"),
    ],
)
def test_the_command_refuses_in_a_sentence(
    cli: Cli, setup: Path, tmp_path: Path, keep: list[object], message: str
) -> None:
    code, _, err = cli(*command(setup, tmp_path / "out", *keep))
    assert code != 0
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "distillation.json").exists()


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_bytes_and_two_processes_follow(setup: Path, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(json.dumps({"hook": HOOK, "features": [0, 1, 2, 3]}))
    keep = ["--keep", tmp_path / "f.json"]
    whole, torn, both = tmp_path / "whole", tmp_path / "torn", tmp_path / "both"
    alone(command(setup, whole, *keep))
    killed = [str(a) for a in command(setup, torn, *keep, "--checkpoint-seconds", 0)]
    process = CHILDREN.Process(target=run_in_a_child, args=(killed,))
    process.start()

    def step() -> int:
        try:
            return int(json.loads((torn / "checkpoint.json").read_text())["step"])
        except (OSError, ValueError):
            return -1

    while step() < 2 and process.exitcode is None:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    alone(command(setup, torn, *keep, "--resume"))
    for name in ("width8-seed0", "width16-seed0"):
        first, second = ((out / "students" / name / "model.safetensors").read_bytes() for out in (whole, torn))
        assert first == second
    alone(command(setup, tmp_path / "half", *keep, "--mixed-precision", "bf16"))
    half = losses_of(DistillationRun.load(tmp_path / "half"))
    assert all(np.isfinite(losses).all() for losses in half.values())
    assert launch([command(setup, both, *keep)] * 2) == [0, 0]
    one, two = losses_of(DistillationRun.load(whole)), losses_of(DistillationRun.load(both))
    for name, losses in one.items():
        np.testing.assert_allclose(two[name], losses, rtol=1e-5)
