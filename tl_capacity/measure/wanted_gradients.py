"""The gradients that importance estimators ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tl_capacity.errors import CapacityError
from tl_capacity.interfaces import PathGradient
from tl_capacity.measure.losses import LOSSES
from tl_capacity.measure.tap import Tap


@dataclass(frozen=True)
class WantedGradients:
    """The gradients that the importance estimators of some taps need.

    Attributes:
        losses: names of losses.
        paths: losses along paths.
        asking: the first estimator that needs one; None where none does.
    """

    losses: tuple[str, ...]
    paths: tuple[PathGradient, ...]
    asking: str | None

    @classmethod
    def by(cls, taps: Sequence[Tap]) -> WantedGradients:
        """The gradients that the estimators of these taps need.

        Raises:
            CapacityError: where one asks for the gradient of an unknown loss.
        """
        estimators = [estimator for tap in taps for estimator in tap.estimators]
        wanted = {loss for estimator in estimators for loss in estimator.gradient_of}
        losses = sorted(loss for loss in wanted if isinstance(loss, str))
        paths = sorted((path for path in wanted if isinstance(path, PathGradient)), key=lambda path: path.name)
        if unknown := {*losses, *(path.loss for path in paths)} - set(LOSSES):
            raise CapacityError(
                f"there is no gradient of {', '.join(sorted(unknown))}: let the estimator's gradient_of name some of "
                f"{', '.join(LOSSES)}"
            )
        asking = next((estimator.name for estimator in estimators if estimator.gradient_of), None)
        return cls(tuple(losses), tuple(paths), asking)

    def __bool__(self) -> bool:
        return bool(self.losses or self.paths)

    def __str__(self) -> str:
        return ", ".join([*self.losses, *(path.name for path in self.paths)])

    def check_possible(self, model: Any) -> None:
        """Refuse to run if PyTorch records nothing to differentiate.

        Raises:
            CapacityError: under `torch.inference_mode`, or where the model was loaded under it.
        """
        if self and (torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters())):
            raise CapacityError(
                f"the importance estimator {self.asking!r} needs the gradient of {self}, which torch.inference_mode "
                "does not record: load the model and call run() outside of it"
            )
