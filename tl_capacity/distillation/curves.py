"""StudentCurve: one student of a distillation and its losses on the way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StudentCurve:
    """One student and its losses.

    Attributes:
        name: of its folder under `students/`, where the run was saved.
        width: d_S.
        seed: of its initial weights.
        start: "random", or "teacher" for the control of the teacher's width that began with its weights.
        parameters, body_parameters: their number, and without embeddings and head.
        tokens: predicted tokens seen at each evaluation.
        heldout_kl: forward KL from the teacher at T = 1 on held-out text, in nats per token, at each evaluation.
        train_loss: mean training loss since the evaluation before; NaN-free, so it has one entry less than the others,
            which begin before the first step.
    """

    name: str
    width: int
    seed: int
    start: str
    parameters: int
    body_parameters: int
    tokens: tuple[int, ...] = ()
    heldout_kl: tuple[float, ...] = ()
    train_loss: tuple[float, ...] = ()

    def losses(self) -> tuple[tuple[str, tuple[float, ...]], ...]:
        """Both losses by name."""
        return ("heldout_kl", self.heldout_kl), ("train_loss", self.train_loss)

    def curve(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Tokens and held-out KL [evaluation], without the one before training."""
        return np.array(self.tokens[1:], dtype=np.int64), np.array(self.heldout_kl[1:], dtype=np.float64)
