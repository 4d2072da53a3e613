"""All students of a distillation as one module, what a step trains them by and what they are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_capacity.distillation.data import Rows, model_inputs
from tl_capacity.distillation.losses import HELDOUT_LOSS, MATCHES, Output, chunked_losses
from tl_capacity.distillation.settings import DistillSettings
from tl_capacity.distillation.students import output_of
from tl_capacity.runtime.devices import exact, exact_device
from tl_capacity.runtime.scratch import Scratch


class Students(nn.Module):
    """All students, and the maps of each from its hidden states to the teacher's, as one module: so DDP sums all their
    gradients in one pass.
    """

    def __init__(self, models: Sequence[Any], teacher_width: int, settings: DistillSettings) -> None:
        super().__init__()
        self.models, self.settings, self.scratch = nn.ModuleList(models), settings, Scratch()
        self.hooks = tuple(match.hook for match in settings.hidden)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.maps = nn.ModuleList(
                (
                    nn.ModuleList(nn.Linear(m.config.hidden_size, teacher_width, bias=False) for _ in self.hooks)
                    if self.hooks
                    else nn.ModuleList()
                )
                for m in models
            )

    def forward(
        self,
        tokens: Int[Tensor, "row position"],
        counted: Bool[Tensor, "row position"],
        labels: Int[Tensor, " token"],
        teacher: Output,
        total: int,
    ) -> Float[Tensor, " student"]:
        """The training loss of each student, in float64: its sum over these tokens, divided by `total`."""
        outputs = [output_of(model, tokens, counted, self.hooks) for model in self.models]
        losses = chunked_losses(
            teacher, outputs, labels, self.settings.loss, total, self.settings.chunk_tokens, self.scratch
        )
        if not self.hooks:
            return losses
        matched = []
        for output, maps in zip(outputs, self.maps, strict=True):
            terms = [
                match.weight
                * exact(
                    MATCHES[match.kind](
                        to_teacher(output.states[match.hook]).float(), teacher.states[match.hook].float()
                    )
                ).sum()
                / total
                for match, to_teacher in zip(self.settings.hidden, maps, strict=True)  # type: ignore[call-overload]
            ]
            matched.append(torch.stack(terms).sum())
        return losses + torch.stack(matched)

    def parameters_of_each(self) -> list[list[nn.Parameter]]:
        """The parameters of each student, its maps included."""
        return [[*model.parameters(), *maps.parameters()] for model, maps in zip(self.models, self.maps, strict=True)]


@torch.no_grad()
def heldout_losses(
    teacher: Any, students: Students, held: Rows, settings: DistillSettings, accelerator: Any
) -> list[float]:
    """Forward KL from the teacher at T = 1 on the held-out rows, of each student, in nats per token."""
    students.eval()
    total = torch.zeros(len(students.models), dtype=torch.float64, device=exact_device(accelerator.device))
    for start in range(
        accelerator.process_index * settings.batch_rows,
        len(held.tokens),
        accelerator.num_processes * settings.batch_rows,
    ):
        tokens, counted, labels = model_inputs(
            held.trimmed(slice(start, start + settings.batch_rows)), accelerator.device
        )
        outputs = [output_of(model, tokens, counted) for model in (teacher, *students.models)]
        total += chunked_losses(
            outputs[0],
            outputs[1:],
            labels,
            HELDOUT_LOSS,
            total=1,
            chunk=settings.chunk_tokens,
            scratch=students.scratch,
        )
    students.train()
    kl: list[float] = (accelerator.reduce(total, "sum") / int(held.predicted.sum())).tolist()
    return kl
