"""Keep chosen features: what the teacher's dictionaries say of them, and the readout that trains students to
keep them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_capacity.dictionaries.adapter import check_dictionary, dictionary_digest
from tl_capacity.dictionaries.chosen import ChosenLatents, chosen_latents
from tl_capacity.dictionaries.reading import reading_of
from tl_capacity.distillation.curves import StudentCurve
from tl_capacity.distillation.data import Rows, model_inputs
from tl_capacity.distillation.losses import feature_loss
from tl_capacity.distillation.settings import KeepFeatures
from tl_capacity.errors import CapacityError, HookPointError
from tl_capacity.interfaces import CapacityContext
from tl_capacity.models.forward import activation_at, at_places, device_of
from tl_capacity.models.hook_points import TapPoint
from tl_capacity.models.loading import LoadedModel
from tl_capacity.plugins import plugins
from tl_capacity.predict.laws import kept_features, knows_enough
from tl_capacity.runtime.devices import exact
from tl_capacity.runtime.logs import log

SEEN_TOKENS = 32_768
"""Most tokens of training text from which firing rates are taken."""
SEEN_NUMBERS = 2**24
"""Most activations of these tokens, or latents of chosen features, in memory at once: 64 MB."""


@dataclass(frozen=True)
class Kept:
    """Features that students are to keep, and what the teacher's dictionary says of them.

    Attributes:
        point: where the teacher is read, as the dictionary saw its activations.
        latents: of the chosen features.
    """

    wanted: KeepFeatures
    point: TapPoint
    latents: ChosenLatents

    @property
    def hook(self) -> str:
        """The hook point at which students are read."""
        return self.wanted.hook

    @property
    def state(self) -> str:
        """The name of the teacher's activations there, so that they differ from matched hidden states."""
        return f"features at {self.hook}"

    def new_readout(self, width: int) -> nn.Linear:
        """A new readout of a student's activations: logits of firing, then values.

        It starts with each feature's firing rate and mean, and knows nothing else.
        """
        readout, rate = nn.Linear(width, 2 * len(self.latents.features)), self.latents.rate
        nn.init.zeros_(readout.weight)
        with torch.no_grad():
            readout.bias.copy_(torch.cat([rate.logit(), self.latents.mean]))
        return readout

    def loss(
        self, readout: Float[Tensor, "token told"], latents: Float[Tensor, "token chosen"], total: int
    ) -> Float[Tensor, ""]:
        """The weighted loss of a readout on some tokens, in float64: the sum, divided by `total`."""
        logits, values = readout.float().chunk(2, dim=-1)
        latents = latents.to(readout.device)
        rate, square = (each.to(latents) for each in (self.latents.rate, self.latents.square))
        told = feature_loss(logits, values, latents, rate, square)
        return exact(told).sum() * self.wanted.weight / total


def dictionaries_of(
    teacher: Any, keep: Sequence[KeepFeatures], saes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The dictionary at each hook point where features are to be kept.

    A given dictionary comes first, then the one that the teacher brings.

    Raises:
        CapacityError: where there is none, or it cannot be read as it is.
    """
    from tl_capacity.dictionaries.loading import load_sae

    named = teacher.named if isinstance(teacher, LoadedModel) else None
    bundled = named.saes if named is not None else {}
    loaded = {}
    for hook in dict.fromkeys(wanted.hook for wanted in keep):
        if saes is not None and hook in saes:
            sae = saes[hook]
        elif hook in bundled:
            _, sae = load_sae(str(bundled[hook]), str(device_of(teacher.model)))
        else:
            known = ", ".join({**bundled, **(saes or {})}) or "none"
            raise CapacityError(
                f"there is no dictionary at {hook!r} to keep features of (dictionaries are at: {known}): pass one with"
                " --sae, or as saes in Python"
            )
        check_dictionary(sae, hook)
        loaded[hook] = sae
    return loaded


def digests_of(saes: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the weights of each dictionary, by its hook point."""
    return {hook: dictionary_digest(sae) for hook, sae in saes.items()}


@torch.no_grad()
def features_to_keep(
    model: Any, keep: Sequence[KeepFeatures], saes: Mapping[str, Any], text: Rows, batch_rows: int
) -> tuple[Kept, ...]:
    """The features that students are to keep, with what the teacher's dictionaries say of them on the beginning of a
    text.

    Args:
        model: the teacher, in evaluation mode.
        text: of which the first rows are read.

    Raises:
        HookPointError: where the teacher has no such hook point.
        CapacityError: where a feature is none of its dictionary, or none of them ever fires.
    """
    kept = []
    for wanted in keep:
        sae = saes[wanted.hook]
        reading = reading_of(model, sae, wanted.hook)
        for note in reading.notes:
            log.warning(note)
        activations = _activations(model, reading.point, text, batch_rows, len(wanted.features))
        latents = chosen_latents(sae, wanted.features, activations)
        if latents.silent:
            named = ", ".join(f"{feature:,}" for feature in latents.silent[:5])
            named += f" and {len(latents.silent) - 5:,} more" if len(latents.silent) > 5 else ""
            log.warning(
                f"{wanted.hook}: features {named} never fire on {latents.tokens:,} tokens of the text, so"
                " students cannot learn to keep them: train on text on which they fire"
            )
        if latents.agreement < 1:
            log.info(
                f"{wanted.hook}: latents compete in this dictionary, so thresholds stand in for the competition; those"
                f" of the {len(wanted.features):,} chosen features give {latents.agreement:.1%} of their firings"
            )
        kept.append(Kept(wanted, reading.point, latents))
    return tuple(kept)


def over_budget(kept: Sequence[Kept], widths: Sequence[int], teacher_width: int) -> list[str]:
    """A warning for each width that should keep more features than the default capacity law allows.

    The law uses the sparsity that the text showed.
    """
    law, notes = plugins().capacity_laws.default, []
    for each in kept:
        squares = each.latents.squares.cpu().numpy()
        alpha = 1 - each.latents.l0 / len(squares)
        at = CapacityContext(alpha, squares, each.point.width or 0, teacher_width)
        if not (0 < alpha < 1 and knows_enough(law, at)):
            continue
        for width in dict.fromkeys(widths):
            budget, chosen = kept_features(law, width, at), len(each.wanted.features)
            if chosen > budget:
                notes.append(
                    f"{chosen:,} features are to be kept at {each.hook}, but the capacity law {law.name!r} gives a"
                    f" student of width {width:,} only {budget:,}: expect that some are lost"
                )
    return notes


def drowned(students: Sequence[StudentCurve]) -> list[str]:
    """A warning for each student whose held-out KL has just risen above its first value."""
    return [
        f"the held-out KL of {student.name} is {student.heldout_kl[-1]:.4g} nats per token after"
        f" {student.tokens[-1]:,} tokens, but was {student.heldout_kl[0]:.4g} before training: the features to keep"
        " outweigh the distillation, so choose a lower --keep-weight"
        for student in students
        if student.start != "teacher" and risen(student.heldout_kl) and not risen(student.heldout_kl[:-1])
    ]


def risen(losses: Sequence[float]) -> bool:
    """Whether a student's last held-out loss is above its first."""
    return len(losses) > 1 and losses[-1] > losses[0]


def _activations(model: Any, point: TapPoint, text: Rows, batch_rows: int, chosen: int) -> Float[Tensor, "token ..."]:
    """What the dictionary reads on the first rows of a text, at the tokens that have a next one."""
    device, parts, tokens, most = device_of(model), [], 0, SEEN_TOKENS
    for start in range(0, len(text.tokens), batch_rows):
        ids, places, _ = model_inputs(text.trimmed(slice(start, start + batch_rows)), device)
        seen = activation_at(model, point, ids)
        if seen is None:
            raise HookPointError(f"{point.name} did not fire: keep features at a hook point that the teacher runs")
        parts.append(at_places(seen, places))
        tokens += len(parts[-1])
        most = min(SEEN_TOKENS, max(1, SEEN_NUMBERS // max(chosen, seen[0, 0].numel())))
        if tokens >= most:
            break
    return torch.cat(parts)[:most]
