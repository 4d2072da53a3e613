"""Measurement: what was counted at every hook point, with model, text and settings; save, load, merge."""

from __future__ import annotations

from tl_capacity.measurement.measurement import Measurement as Measurement
from tl_capacity.measurement.provenance import Provenance as Provenance
from tl_capacity.results.hook import HookMeasurement as HookMeasurement

__all__ = ["HookMeasurement", "Measurement", "Provenance"]
