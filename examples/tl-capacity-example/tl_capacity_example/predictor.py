"""A floor predictor: what a student cannot hold, as a share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tl_capacity.interfaces import FloorContext, FloorPredictor


class LostShare(FloorPredictor):
    """The share of all importance that lies on the features that a width loses.

    It has no unit, so that layers and importances can be compared; a factor makes nats of it.
    """

    name = "lost_share"
    unit = "share of the importance"
    summary = "share of the importance that the lost features have"
    constants = 1

    def floors(self, widths: Sequence[int], at: FloorContext) -> Sequence[float] | None:
        kept = np.append(0.0, np.cumsum(np.sort(at.features.importance)[::-1]))
        if not kept[-1]:
            return None  # nothing that could be shared
        return [float(1 - kept[at.kept(width)] / kept[-1]) for width in widths]
