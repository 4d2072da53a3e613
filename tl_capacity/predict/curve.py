"""Curve: a published importance curve, from which floors are predicted without intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tl_capacity import theory
from tl_capacity.errors import MeasurementError
from tl_capacity.interfaces import CapacityContext
from tl_capacity.plugins import plugins
from tl_capacity.predict.floors import FloorPrediction, checked_widths, floor_numbers, floor_predictions
from tl_capacity.results.estimate import Estimate
from tl_capacity.runtime.checks import checked


@dataclass(frozen=True)
class Curve:
    """A bare importance curve as published, without the sums that intervals need.

    Attributes:
        name: of the layer, or the file.
        importance: [feature] of the alive features, sorted.
        alpha: their sparsity.
        hook_width, teacher_width: d and d_T, for laws that look at them; 0 where they are not known.
    """

    name: str
    importance: NDArray[np.float64]
    alpha: float
    hook_width: int = 0
    teacher_width: int = 0

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Curve:
        """Read `{"sorted_importance": […], "alpha": …}` from a JSON file.

        The teacher's width `d_model` is read if it is there. If `F_alive` is there, it must agree with the list.

        Raises:
            MeasurementError: where the file is no such curve.
        """
        try:
            content = json.loads(Path(path).read_bytes())
            importance, alpha = np.asarray(content["sorted_importance"], dtype=np.float64), float(content["alpha"])
            d_model = content.get("d_model", 0)
            if not isinstance(d_model, int) or d_model < ("d_model" in content):
                raise ValueError(f"d_model = {d_model!r} is not a width")
            theory.refined_floor(importance, 0, alpha)  # raises where these are no importances or no sparsity
        except OSError as problem:
            raise MeasurementError(
                f"{path} cannot be read ({problem.strerror}): pass a measurement folder or a curve's JSON file"
            ) from problem
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as problem:
            raise MeasurementError(
                f"{path} is not an importance curve ({problem}): it needs `sorted_importance`, a list of numbers, and"
                " `alpha`"
            ) from problem
        if content.get("F_alive", len(importance)) != len(importance):
            raise MeasurementError(
                f"{path} says F_alive = {content['F_alive']} but lists {len(importance):,} importances: it is truncated"
                " or altered"
            )
        layer = content.get("layer")
        return cls(f"layer {layer}" if layer is not None else Path(path).stem, importance, alpha, d_model, d_model)

    def floors(self, widths: Sequence[int], law: str | None = None) -> list[FloorPrediction]:
        """Predicted floors without intervals, as a bare curve does not say how uncertain it is.

        `law` None is the default law.
        """
        chosen = plugins().capacity_laws.named(law)
        at = CapacityContext(self.alpha, self.importance, self.hook_width, self.teacher_width)
        widths = checked_widths(widths)
        numbers = floor_numbers(at, widths, chosen)
        return floor_predictions(self.name, widths, list(map(Estimate, numbers)), "as published", "", chosen)
