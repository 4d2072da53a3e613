"""Writes docs/results/splice_controls.json and the tables of docs/results/splice_controls.md:
`python docs/splice_controls.py runs [DEVICE]`.

The folder holds `controls`, a measurement of one dictionary with several importances, and `controls-layers`, one of a
dictionary at each of several layers. Each control is written as soon as it is done; the same command goes on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from splice_greedy import greedy_order
from torch import Tensor
from torch.nn import functional as F
from write_results import RESULTS, filled, table

from tl_capacity import Measurement, Spliced, TokenStream, splice
from tl_capacity.dictionaries.encoding import Encoder, joined
from tl_capacity.dictionaries.reading import reading_of
from tl_capacity.measure.ablation import ablation_kl
from tl_capacity.measure.setup import as_measured, measured_dictionary, measured_teacher
from tl_capacity.measurement.provenance import Provenance
from tl_capacity.models.forward import evaluating
from tl_capacity.models.head import divergences, head_of, last_hidden
from tl_capacity.results.hook import HookMeasurement
from tl_capacity.splicing.variants import Variants
from tl_capacity.text.counting import CountedTokens, CountingRule

WIDTHS = (16, 32, 48, 64, 96)
HELDOUT_TOKENS = 17_500
ABLATED_ROWS = 16
"""Rows of the measured text on which each latent is ablated alone."""
RANDOM_ORDERS = 3
TUNED_WIDTHS = (16, 32, 64)
TUNED_TOKENS = (0, 250_000, 500_000, 1_000_000)
TUNED_ROWS, TUNED_RATE = 16, 5e-4
CONTEXT = 256
GREEDY = "greedy by KL"
PATH = RESULTS / "splice_controls.json"


class Teacher:
    """The teacher of a measurement, its dictionaries, and the text to splice on."""

    def __init__(self, folder: Path, device: str) -> None:
        self.measurement, self.device = Measurement.load(folder), device
        self.provenance: Provenance = self.measurement.provenance
        self.loaded = measured_teacher(folder, self.provenance, device)
        self.model = self.loaded.model
        self.saes = {hook.hook: measured_dictionary(hook, self.loaded, self.provenance) for hook in self.measurement}
        self.rule = CountingRule.recorded(self.provenance.settings)

    def text(self, source: str = "embedded:heldout", rows: int = 8) -> TokenStream:
        """Rows as they were measured."""
        return as_measured(source, self.loaded.tokenizer, self.provenance, CONTEXT, rows)

    def changes(self, hook: HookMeasurement, kept: int) -> Callable[[Tensor, Tensor], Tensor]:
        """A function that replaces an activation [row, position, d] at counted tokens [row, position], keeping so many
        latents.
        """
        sae = self.saes[hook.hook]
        order = np.argsort(-hook.importance(None), kind="stable")
        latents = np.flatnonzero(hook.summary.alive)[order]
        rest = np.setdiff1d(np.arange(hook.summary.d_sae), latents)
        means = torch.from_numpy(hook.summary.arrays["sums"].sum(0) / hook.summary.n_tokens).float()
        order_of_all = torch.from_numpy(np.concatenate([latents, rest])).to(self.device)
        variants = Variants(sae, order_of_all, [kept], means.to(self.device), False)
        encoder = Encoder(sae)

        def change(x: Tensor, counted: Tensor) -> Tensor:
            flat = x.detach()[counted]
            new = x.clone()
            new[counted] = variants(flat, flat, joined(list(encoder.entries(flat))))[0]
            return new

        return change


def spliced_at(
    teacher: Teacher, model: Any, changes: Mapping[str, Callable[[Tensor, Tensor], Tensor]], tokens: int
) -> list[float]:
    """KL(teacher ‖ `model` with changed activations) in nats per token on held-out text, and its standard error over
    documents.
    """
    sums: dict[int, list[float]] = {}
    seen = 0
    with torch.no_grad(), evaluating(model), evaluating(teacher.model):
        for batch in teacher.text():
            if seen >= tokens:
                break
            text = CountedTokens(batch, teacher.rule)
            ids = torch.from_numpy(np.maximum(batch.tokens, 0)).to(teacher.device)
            counted, predicting = text.counted.to(teacher.device), text.valid[:, 1:].to(teacher.device)
            clean = last_hidden(teacher.model, ids)[:, :-1][predicting]
            other = hidden_with(model, ids, counted, changes)[:, :-1][predicting]
            kl = (
                divergences(head_of(model), clean, other[None])[0]
                if model is teacher.model
                else between(teacher.model, model, clean, other)
            )
            for document, value in zip(
                text.groups[text.valid[:, 1:].nonzero()[:, 0]].tolist(), kl.tolist(), strict=True
            ):
                sums.setdefault(document, [0.0, 0.0])
                sums[document][0] += value
                sums[document][1] += 1
            seen += int(text.valid.sum())
    totals = np.array(list(sums.values()))
    mean = totals[:, 0].sum() / totals[:, 1].sum()
    residual = totals[:, 0] - mean * totals[:, 1]
    error = np.sqrt(len(totals) / (len(totals) - 1) * np.square(residual).sum()) / totals[:, 1].sum()
    return [float(mean), float(error)]


def between(teacher: Any, student: Any, clean: Tensor, other: Tensor) -> Tensor:
    """KL of the two models' predictions [token], each by its own head."""
    with torch.no_grad():
        log_p, log_q = (
            F.log_softmax(m.get_output_embeddings()(h), -1) for m, h in ((teacher, clean), (student, other))
        )
        return (log_p.exp() * (log_p - log_q)).sum(-1).double()


def hidden_with(
    model: Any, ids: Tensor, counted: Tensor, changes: Mapping[str, Callable[[Tensor, Tensor], Tensor]]
) -> Tensor:
    """Last hidden states, with the activations at some hook points changed."""
    undo = []
    for hook, change in changes.items():
        point = reading_of(model, None, hook).point
        undo.append(point.edit(partial(_changed, change, counted)))
    try:
        return last_hidden(model, ids)
    finally:
        for remove in undo:
            remove()


def _changed(change: Callable[[Tensor, Tensor], Tensor], counted: Tensor, activation: Tensor) -> Tensor:
    return change(activation, counted)


def ablated_rows(teacher: Teacher) -> tuple[Tensor, Tensor]:
    """The rows of the measured text on which latents are ablated, and where they count [row, position]."""
    rows = np.concatenate(
        [batch.tokens[:, :CONTEXT] for batch in teacher.text("embedded") if batch.tokens.shape[1] == CONTEXT]
    )
    full = torch.from_numpy(rows[(rows >= 0).all(1)][:ABLATED_ROWS]).long()
    counted = torch.from_numpy(teacher.rule.counted(full.numpy()))
    return full.to(teacher.device), counted.to(teacher.device)


def run(teacher: Teacher, **how: Any) -> Spliced:
    """A splice of the one dictionary on held-out text."""
    [hook] = teacher.measurement
    return splice(
        teacher.model, teacher.measurement, teacher.text(), WIDTHS, saes={hook.hook: teacher.saes[hook.hook]},
        max_tokens=HELDOUT_TOKENS, progress=False, **how,
    )  # fmt: skip


def kept_by_width(teacher: Teacher) -> dict[int, int]:
    """How many latents each width keeps, by the theorem's budget."""
    return {f.width: f.features_kept for f in run(teacher).floors(teacher.measurement, WIDTHS)}


def controls_of(result: Spliced, budgets: Mapping[int, int], kind: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """A control for each order of a splice."""
    for curve in result:
        at = {str(width): curve.at(kept) for width, kept in budgets.items()}
        yield (
            f"{curve.order}{kind}",
            {
                "kept": dict(budgets),
                "kl": {width: estimate.value for width, estimate in at.items()},
                "low": {width: estimate.low for width, estimate in at.items()},
                "high": {width: estimate.high for width, estimate in at.items()},
            },
        )


def orders(teacher: Teacher) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run other rankings, other replacements for lost latents, and the SAE's error kept."""
    [hook] = teacher.measurement
    sae = teacher.saes[hook.hook]
    latents = np.flatnonzero(hook.summary.alive)
    draws = np.random.default_rng(0)
    given: dict[str, Sequence[int]] = {f"random {i}": draws.permutation(latents).tolist() for i in range(RANDOM_ORDERS)}
    rows, counted = ablated_rows(teacher)
    alone = ablation_kl(teacher.model, hook.hook, sae, rows, latents.tolist(), counted=counted).cpu().numpy()
    given["ablated alone"] = latents[np.argsort(-alone, kind="stable")].tolist()
    budgets = kept_by_width(teacher)
    every = sorted(set(budgets.values()))
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (
        ("", {"importance": hook.estimators}),
        ("", {"orders": given}),
        (", nothing for the lost", {"lost": "zero"}),
        (", the SAE's error kept", {"keep_error": True}),
    )
    for kind, how in kinds:
        yield from controls_of(run(teacher, **how, kept=every), budgets, kind)


def greedy(teacher: Teacher) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the ranking by greedy elimination."""
    [hook] = teacher.measurement
    sae, budgets = teacher.saes[hook.hook], kept_by_width(teacher)
    point, latents = reading_of(teacher.model, sae, hook.hook).point, np.flatnonzero(hook.summary.alive)
    order = greedy_order(teacher.model, point, sae, *ablated_rows(teacher), latents, budgets.values())
    every = sorted(set(budgets.values()))
    for name, control in controls_of(run(teacher, orders={GREEDY: order}, kept=every), budgets):
        if name == GREEDY:  # the paper's importance comes too
            yield name, control


def layers(teacher: Teacher) -> dict[str, Any]:
    """Splice every layer that has a dictionary at once, each by its own budget."""
    from tl_capacity.theory import kept_features

    found: dict[str, Any] = {"hooks": list(teacher.saes), "kl": {}, "standard_error": {}}
    for width in WIDTHS:
        changes = {}
        for hook in teacher.measurement:
            alive = int(hook.summary.n_alive.value)
            changes[hook.hook] = teacher.changes(hook, int(kept_features(width, hook.summary.alpha.value, alive)))
        found["kl"][str(width)], found["standard_error"][str(width)] = spliced_at(
            teacher, teacher.model, changes, HELDOUT_TOKENS
        )
    return found


def tuned(teacher: Teacher, width: int) -> dict[str, Any]:
    """Splice the teacher, and then train everything above the hook point to work with what is left."""
    from tl_capacity.theory import kept_features

    [hook] = teacher.measurement
    layer = int(hook.hook.split(".")[1])
    kept = int(kept_features(width, hook.summary.alpha.value, int(hook.summary.n_alive.value)))
    changes = {hook.hook: teacher.changes(hook, kept)}
    torch.manual_seed(0)
    model = deepcopy(teacher.model).eval()
    body = model.gpt_neox
    body.embed_in.requires_grad_(False)
    for block in body.layers[: layer + 1]:
        block.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = TUNED_TOKENS[-1] // (TUNED_ROWS * CONTEXT)
    optimizer = torch.optim.AdamW(trained, lr=TUNED_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TUNED_RATE, total_steps=steps + 1, pct_start=0.05)
    found: dict[str, Any] = {"width": width, "kept": kept, "tokens": [], "kl": [], "standard_error": []}

    def evaluate(tokens: int) -> None:
        mean, error = spliced_at(teacher, model, changes, HELDOUT_TOKENS)
        found["tokens"].append(tokens)
        found["kl"].append(mean)
        found["standard_error"].append(error)

    evaluate(0)
    wanted, seen = list(TUNED_TOKENS[1:]), 0
    for batch in teacher.text("runs/embedded-teacher/train.jsonl", TUNED_ROWS):
        text = CountedTokens(batch, teacher.rule)
        ids = torch.from_numpy(np.maximum(batch.tokens, 0)).to(teacher.device)
        counted, predicting = text.counted.to(teacher.device), text.valid[:, 1:].to(teacher.device)
        with torch.no_grad():
            clean = last_hidden(teacher.model, ids)[:, :-1][predicting]
            log_p = F.log_softmax(teacher.model.get_output_embeddings()(clean), -1)
        hidden = hidden_with(model, ids, counted, changes)[:, :-1][predicting]
        log_q = F.log_softmax(model.get_output_embeddings()(hidden), -1)
        loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if schedule.last_epoch < steps:
            schedule.step()
        seen += int(text.valid.sum())
        if seen >= wanted[0]:
            evaluate(seen)
            wanted.pop(0)
            if not wanted:
                break
    return found


def main(runs: Path, device: str = "cpu") -> None:
    """Run what does not exist yet, then fill the page."""
    done: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}

    def add(name: str, result: dict[str, Any], started: float) -> None:
        done[name] = {**result, "seconds": round(time.monotonic() - started, 1)}
        PATH.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(name, result, flush=True)

    if "second_moment" not in done:
        started = time.monotonic()
        for name, result in orders(Teacher(runs / "controls", device)):
            add(name, result, started)
    if GREEDY not in done:
        started = time.monotonic()
        for name, result in greedy(Teacher(runs / "controls", device)):
            add(name, result, started)
    if "every layer" not in done:
        started = time.monotonic()
        add("every layer", layers(Teacher(runs / "controls-layers", device)), started)
    for width in TUNED_WIDTHS:
        if f"tuned {width}" not in done:
            started = time.monotonic()
            add(f"tuned {width}", tuned(Teacher(runs / "controls", device), width), started)
    page = RESULTS / "splice_controls.md"
    text = page.read_text(encoding="utf-8")
    for name, lines in (("controls", ranked(done)), ("tuned", after_tuning(done))):
        text = filled(text, name, lines, "docs/splice_controls.py")
    page.write_text(text, encoding="utf-8")


def ranked(done: Mapping[str, Any]) -> str:
    """A row for each control that has a floor at every width."""
    rows = [
        [name, *(f"{result['kl'][str(width)]:.3f}" for width in WIDTHS)]
        for name, result in done.items()
        if isinstance(result["kl"], dict)
    ]
    return table(["control", *(f"d={width}" for width in WIDTHS)], rows)


def after_tuning(done: Mapping[str, Any]) -> str:
    """A row for each width whose upper layers were trained."""
    results = [done[f"tuned {width}"] for width in TUNED_WIDTHS]
    header = ["width", "kept", *(f"after {tokens:,} tokens" for tokens in TUNED_TOKENS)]
    return table(header, [[str(r["width"]), f"{r['kept']:,}", *(f"{kl:.3f}" for kl in r["kl"])] for r in results])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
