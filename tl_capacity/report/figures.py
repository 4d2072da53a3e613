"""The figures of the report, each drawn in the room of the result that it shows."""

from __future__ import annotations

from tl_capacity.distillation.figures import curves_figure as curves_figure
from tl_capacity.distillation.figures import observed_figure as observed_figure
from tl_capacity.measurement.figures import firing_rate_figure as firing_rate_figure
from tl_capacity.measurement.figures import importance_figure as importance_figure
from tl_capacity.predict.figures import floors_figure as floors_figure
from tl_capacity.predict.figures import spliced_figure as spliced_figure
from tl_capacity.predict.figures import suite_figure as suite_figure
from tl_capacity.probing.figures import thresholds_figure as thresholds_figure
from tl_capacity.show.figures import series_figure as series_figure
