"""All students of a distillation as one module, with their training loss and their held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_capacity.distillation.data import Rows, model_inputs
from tl_capacity.distillation.keeping import Kept
from tl_capacity.distillation.losses import HELDOUT_LOSS, MATCHES, Output, chunked_losses
from tl_capacity.distillation.settings import DistillSettings
from tl_capacity.distillation.students import output_of
from tl_capacity.errors import HookPointError
from tl_capacity.models.forward import device_of
from tl_capacity.models.hook_points import find_tap_point
from tl_capacity.models.sharding import is_spread
from tl_capacity.runtime.devices import exact, exact_device
from tl_capacity.runtime.scratch import Scratch
from tl_capacity.runtime.seeds import seeded


class Students(nn.Module):
    """All students, with the maps and readouts that each learns, as one module.

    So DDP sums all their gradients in one pass.

    Attributes:
        hooks: where teacher and students are read, besides their last hidden states.
        points: where the teacher is read for features to keep, by the names of its states there.
        maps: of each student, from its hidden states to the teacher's.
        readouts: of each student, of the features to keep.
    """

    def __init__(
        self, models: Sequence[Any], teacher_width: int, settings: DistillSettings, kept: Sequence[Kept] = ()
    ) -> None:
        super().__init__()
        self.models, self.settings, self.scratch = nn.ModuleList(models), settings, Scratch()
        self.hooks = tuple(match.hook for match in settings.hidden)
        self.kept = tuple(kept)
        self.points = {each.state: each.point for each in self.kept}
        with seeded(settings.seed):
            self.maps = nn.ModuleList(
                (
                    nn.ModuleList(nn.Linear(m.config.hidden_size, teacher_width, bias=False) for _ in self.hooks)
                    if self.hooks
                    else nn.ModuleList()
                )
                for m in models
            )
        self.readouts = nn.ModuleList(
            nn.ModuleList(each.new_readout(_width_at(m, each.hook)) for each in self.kept) for m in models
        )

    def forward(
        self,
        tokens: Int[Tensor, "row position"],
        places: Int[Tensor, " token"],
        labels: Int[Tensor, " token"],
        teacher: Output,
        total: int,
    ) -> Float[Tensor, " student"]:
        """The training loss of each student in float64: the sum over these tokens, divided by `total`."""
        hooks = tuple(dict.fromkeys((*self.hooks, *(each.hook for each in self.kept))))
        outputs = [output_of(model, tokens, places, hooks) for model in self.models]
        losses = chunked_losses(teacher, outputs, labels, self.settings.loss, total, self.scratch)
        if not hooks:
            return losses
        terms = self._matched(teacher, outputs, total), self._told(teacher, outputs, total)
        return losses + sum(term for term in terms if term is not None)

    def _matched(self, teacher: Output, outputs: Sequence[Output], total: int) -> Float[Tensor, " student"] | None:
        """The loss that each student pays for its hidden states."""
        if not self.hooks:
            return None
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
        return torch.stack(matched)

    def _told(self, teacher: Output, outputs: Sequence[Output], total: int) -> Float[Tensor, " student"] | None:
        """The loss that each student pays for the features to keep. All students share their latents."""
        if not self.kept:
            return None
        latents = [each.latents(teacher.states[each.state]) for each in self.kept]
        told = []
        for output, readouts in zip(outputs, self.readouts, strict=True):
            read = [
                readout(output.states[each.hook].flatten(1))
                for each, readout in zip(self.kept, readouts, strict=True)  # type: ignore[call-overload]
            ]
            terms = [each.loss(said, z, total) for each, said, z in zip(self.kept, read, latents, strict=True)]
            told.append(torch.stack(terms).sum())
        return torch.stack(told)

    def parameters_of_each(self) -> list[list[nn.Parameter]]:
        """The parameters of each student, its maps and readouts included."""
        each = zip(self.models, self.maps, self.readouts, strict=True)
        return [[*model.parameters(), *maps.parameters(), *readouts.parameters()] for model, maps, readouts in each]


def _width_at(student: Any, hook: str) -> int:
    """Dimensions of a student's activations at a hook point.

    Raises:
        HookPointError: where it has no such hook point, or nothing says how wide it is there.
    """
    width = find_tap_point(student, hook).width
    if width is None:
        raise HookPointError(
            f"features cannot be kept at {hook!r}, because no configuration says how wide a student is there: choose a"
            " hook point such as blocks.1.hook_resid_post"
        )
    return width


@torch.no_grad()
def heldout_losses(
    teacher: Any, students: Students, held: Rows, settings: DistillSettings, accelerator: Any
) -> list[list[float]]:
    """Forward KL from the teacher at T = 1 on the held-out rows, in nats, for each student and each part of the text
    [part, student].

    It is a sum over the tokens of a part. A part is `batch_rows` consecutive rows.
    """
    students.eval()
    starts = range(0, len(held.tokens), settings.batch_rows)
    size = (len(starts), len(students.models))
    device = device_of(students.models[0])
    sums = torch.zeros(size, dtype=torch.float64, device=exact_device(device))
    together = is_spread(teacher)
    for first in range(0, len(starts), accelerator.num_processes):
        part = first + accelerator.process_index
        none_left = part >= len(starts)
        if none_left and not together:
            break
        start = starts[0 if none_left else part]
        tokens, places, labels = model_inputs(held.trimmed(slice(start, start + settings.batch_rows)), device)
        if none_left:
            output_of(teacher, tokens, places)  # the others gather from this process too
            break
        outputs = [output_of(model, tokens, places) for model in (teacher, *students.models)]
        sums[part] = chunked_losses(outputs[0], outputs[1:], labels, HELDOUT_LOSS, total=1, scratch=students.scratch)
    students.train()
    everywhere: list[list[float]] = accelerator.reduce(sums, "sum").tolist()
    return everywhere
