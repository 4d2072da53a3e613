"""Distillation: a teacher trains narrower students, all at once, and this measures the loss floor that each of them
reaches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_capacity.runtime.lazy import lazily

if TYPE_CHECKING:
    from tl_capacity.distillation.judged import Judged as Judged
    from tl_capacity.distillation.observation import observe as observe
    from tl_capacity.distillation.observed import ObservedFloor as ObservedFloor
    from tl_capacity.distillation.observed import observed_floors as observed_floors
    from tl_capacity.distillation.run import DistillationRun as DistillationRun
    from tl_capacity.distillation.settings import DistillSettings as DistillSettings
    from tl_capacity.distillation.settings import HiddenMatch as HiddenMatch
    from tl_capacity.distillation.settings import KeepFeatures as KeepFeatures
    from tl_capacity.distillation.settings import LogitLoss as LogitLoss
    from tl_capacity.distillation.train import distill as distill

# A saved run is read without importing torch.
__getattr__, __all__ = lazily(__name__, __file__)
