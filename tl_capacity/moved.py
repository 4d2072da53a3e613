"""Modules of version 0.1 that no longer have a file. Importing one still gives its public names, from where they live
now.

Only what the documentation of 0.1 named is kept. New code imports from the rooms, which the values of `MOVED` name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from tl_capacity.runtime.lazy import from_homes

MOVED: Mapping[str, Mapping[str, str]] = {
    "ablation": {"ablation_kl": "measure.ablation"},
    "attach": {
        "CapacityHooks": "measure.session",
        "HookedModel": "measure.attach",
        "add_capacity_hooks": "measure.attach",
        "hook_names": "models.hook_points",
        "library_versions": "runtime.versions",
    },
    "bases": {"BasisSpec": "dictionaries.bases"},
    "decompose": {
        "Candidate": "distillation.candidates",
        "Decomposition": "distillation.decomposition",
        "Fit": "distillation.fitting",
        "Points": "distillation.candidates",
        "decompose": "distillation.decomposition",
        "decompose_floors": "distillation.decomposition",
    },
    "floors": {
        "Budget": "predict.budget",
        "Curve": "predict.curve",
        "FloorPrediction": "predict.floors",
        "error_warnings": "predict.caveats",
    },
    "loading": {
        "LoadedModel": "models.loading",
        "load_model": "models.loading",
        "load_sae": "dictionaries.loading",
    },
    "measuring": {"MeasureSettings": "measure.settings", "measure": "measure.job"},
    "statistics": {"LatentBatch": "interfaces"},
    "summary": {"Estimate": "results.estimate", "FeatureSummary": "results.summary"},
    "tokens": {"TokenBatch": "text.streams", "TokenStream": "text.streams", "documents": "text.streams"},
}
"""Old module → public name → the module below `tl_capacity` where it lives now."""


class OldModules(MetaPathFinder, Loader):
    """Finds the modules of `MOVED`, which have no file."""

    def find_spec(
        self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module, if its name is an old one."""
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == "tl_capacity" and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its names, each imported on first use."""
        moved = MOVED[module.__name__.rpartition(".")[2]]
        homes = {name: f"tl_capacity.{home}" for name, home in moved.items()}
        module.__doc__ = f"Its names moved: {', '.join(f'{name} to {home}' for name, home in homes.items())}."
        module.__dict__.update(__all__=sorted(homes), __getattr__=from_homes(module.__name__, homes))


def find_old_modules() -> None:
    """Let old modules be imported. Calling it again changes nothing."""
    if not any(isinstance(finder, OldModules) for finder in sys.meta_path):
        sys.meta_path.append(OldModules())
