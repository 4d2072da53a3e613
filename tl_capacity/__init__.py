"""tl_capacity: how many features a language model holds, and how narrow a student may be before it must lose some.

Importing it gives every TransformerLens model the method `add_capacity_hooks`; names below are imported when first
used, so that the import stays cheap.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from tl_capacity.hookspecs import hookimpl
from tl_capacity.moved import find_old_modules
from tl_capacity.runtime.lazy import lazily

if TYPE_CHECKING:
    from tl_capacity import theory as theory
    from tl_capacity.dictionaries.loading import load_sae as load_sae
    from tl_capacity.distillation.effective import effective_capacity as effective_capacity
    from tl_capacity.distillation.observation import observe as observe
    from tl_capacity.errors import CapacityError as CapacityError
    from tl_capacity.interfaces import CapacityLaw as CapacityLaw
    from tl_capacity.interfaces import FloorPredictor as FloorPredictor
    from tl_capacity.interfaces import ImportanceEstimator as ImportanceEstimator
    from tl_capacity.measure.attach import HookedModel as HookedModel
    from tl_capacity.measure.attach import add_capacity_hooks as add_capacity_hooks
    from tl_capacity.measure.session import CapacityHooks as CapacityHooks
    from tl_capacity.measurement.measurement import Measurement as Measurement
    from tl_capacity.models.loading import load_model as load_model
    from tl_capacity.plugins import register_importance_estimator as register_importance_estimator
    from tl_capacity.predict.forecasts import Forecasts as Forecasts
    from tl_capacity.predict.predictors import forecasts_of as forecasts_of
    from tl_capacity.predict.spliced import Spliced as Spliced
    from tl_capacity.splicing.splice import splice as splice
    from tl_capacity.text.streams import TokenStream as TokenStream

__version__ = "0.1.0"

__getattr__, _lazy_names = lazily(__name__, __file__)
__all__ = ["__version__", "hookimpl", *_lazy_names]
find_old_modules()


# Waits for TransformerLens instead of importing it, which takes seconds; this mixin is all that its hooked models
# share.
@wrapt.when_imported("transformer_lens.hook_points")
def _give_models_the_method(hook_points: ModuleType) -> None:
    def add_capacity_hooks(self: Any, saes: Any = None, **options: Any) -> Any:
        """Tap this model's hook points with SAEs and count what their features do; see
        `tl_capacity.add_capacity_hooks`.
        """
        from tl_capacity.measure import attach

        return attach.add_capacity_hooks(self, saes, **options)

    hook_points.HookIntrospectionMixin.add_capacity_hooks = add_capacity_hooks


@wrapt.when_imported("torch")
def _settle_vector_math(torch: ModuleType) -> None:
    """Call each function of MKL's vector mathematics on one number, before several threads call it at once.

    MKL chooses a function's kernel at its first call, and a thread that asks meanwhile can be given one with half the
    digits, so that a run's first step is not the same each time (pytorch/pytorch#188792).
    """
    for name in ("cos", "erf", "exp", "expm1", "log", "log1p", "log2", "sin", "sqrt", "tanh"):
        for dtype in (torch.float32, torch.float64):
            getattr(torch, name)(torch.ones(1, dtype=dtype, device="cpu"))
