"""StudentCurve: one student of a distillation, and its losses during training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl_capacity.distillation.judged import Judged

GIVEN = "given"
"""The `start` of a student that somebody else trained. It is judged as it came."""


@dataclass(frozen=True)
class StudentCurve:
    """One student and its losses during training.

    Attributes:
        name: of its folder under `students/`, where the run was saved.
        width: d_S.
        seed: of its initial weights.
        start: "random"; "truncated"; "teacher" for the control of the teacher's width that began with its weights; or
            "given" for a student that somebody else trained.
        parameters, body_parameters: their number, and without embeddings and head.
        tokens: predicted tokens seen at each evaluation.
        heldout_kl: forward KL from the teacher at T = 1 on held-out text, in nats per token, at each evaluation.
        train_loss: mean training loss since the evaluation before; NaN-free, so it has one entry less than the others,
            which begin before the first step.
        heldout_parts: predicted tokens and KL in nats of each part of the held-out text, rows that follow one another,
            at the last evaluation; their sum is what the curve ends with. Empty where an earlier version wrote it.
        place: folder or hub id of a given student; others lie in the run's own folder.
        revision: of its weights: a commit of the hub, or a digest of the files.
        judged: how a given student predicts each held-out document; its one evaluation is the mean.
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
    heldout_parts: tuple[tuple[int, float], ...] = ()
    place: str = ""
    revision: str | None = None
    judged: Judged | None = None

    @property
    def given(self) -> bool:
        """Whether somebody else trained this student."""
        return self.start == GIVEN

    def losses(self) -> tuple[tuple[str, tuple[float, ...]], ...]:
        """Training and held-out losses by name."""
        return ("heldout_kl", self.heldout_kl), ("train_loss", self.train_loss)

    def curve(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Tokens and held-out KL [evaluation], without the evaluation before training."""
        return np.array(self.tokens[1:], dtype=np.int64), np.array(self.heldout_kl[1:], dtype=np.float64)

    def kl_by_part(self) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Predicted tokens and KL in nats [part] of the parts of the held-out text that can be resampled.

        The parts are documents for a student that somebody else trained, and `heldout_parts` for the others. None if
        none were kept.
        """
        if self.judged is not None:
            tokens = np.array(self.judged.tokens, dtype=np.float64)
            return tokens, tokens * np.array(self.judged.kl)
        if not self.heldout_parts:
            return None
        tokens, sums = np.array(self.heldout_parts, dtype=np.float64).T
        return tokens, sums

    def to_json(self) -> dict[str, Any]:
        """The curve as a flat JSON object; the figures that a given student was judged by are nested."""
        content = asdict(replace(self, judged=None))
        content["judged"] = None if self.judged is None else self.judged.to_json()
        return {name: value for name, value in content.items() if name not in _NEWER or value}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> StudentCurve:
        """The curve that `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: where it is damaged.
        """
        series = {
            name: tuple(kind(x) for x in content[name])
            for name, kind in (("tokens", int), ("heldout_kl", float), ("train_loss", float))
        }
        if len(series["tokens"]) != len(series["heldout_kl"]) or list(series["tokens"]) != sorted(
            set(series["tokens"])
        ):
            raise ValueError(f"the curve of {content['name']} is not whole")
        judged = content.get("judged")
        parts = tuple((int(tokens), float(kl)) for tokens, kl in content.get("heldout_parts", ()))
        return cls(
            **{
                **content,
                **series,
                "heldout_parts": parts,
                "judged": None if judged is None else Judged.from_json(judged),
            }
        )


_NEWER = ("heldout_parts", "place", "revision", "judged")
"""Fields that earlier versions do not know. They are written only if they hold something."""
