"""Probing: which concepts a linear probe reads off a model's activations, and which of the teacher's features a student
kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_capacity.runtime.lazy import lazily

if TYPE_CHECKING:
    from tl_capacity.probing.activations import Activations as Activations
    from tl_capacity.probing.activations import collect as collect
    from tl_capacity.probing.concepts import LabelledTexts as LabelledTexts
    from tl_capacity.probing.concepts import load_concepts as load_concepts
    from tl_capacity.probing.probes import Probe as Probe
    from tl_capacity.probing.probes import fit_probes as fit_probes
    from tl_capacity.probing.probes import probes_frame as probes_frame
    from tl_capacity.probing.recover import recover_features as recover_features
    from tl_capacity.probing.recoverability import Recoverability as Recoverability
    from tl_capacity.probing.recovery import Recovery as Recovery
    from tl_capacity.probing.recovery import recovery_figure as recovery_figure
    from tl_capacity.probing.saved_probes import Probes as Probes

__getattr__, __all__ = lazily(__name__, __file__)
