"""What plugins provide, and what the core asks of models and dictionaries: protocols and small records, without any
implementation.

Importing this room imports neither torch nor TransformerLens, so that listing plugins is cheap.
"""

from tl_capacity.interfaces.capacity import CapacityContext as CapacityContext
from tl_capacity.interfaces.capacity import CapacityLaw as CapacityLaw
from tl_capacity.interfaces.dictionary import BASES as BASES
from tl_capacity.interfaces.dictionary import SparseAutoencoder as SparseAutoencoder
from tl_capacity.interfaces.floors import FloorContext as FloorContext
from tl_capacity.interfaces.floors import FloorPredictor as FloorPredictor
from tl_capacity.interfaces.floors import KLCurve as KLCurve
from tl_capacity.interfaces.floors import WithInterval as WithInterval
from tl_capacity.interfaces.importance import FeatureSums as FeatureSums
from tl_capacity.interfaces.importance import ImportanceEstimator as ImportanceEstimator
from tl_capacity.interfaces.importance import LatentBatch as LatentBatch
from tl_capacity.interfaces.importance import PathGradient as PathGradient
from tl_capacity.interfaces.models import HOOK_IN_BLOCK as HOOK_IN_BLOCK
from tl_capacity.interfaces.models import RESIDUAL_STREAM as RESIDUAL_STREAM
from tl_capacity.interfaces.models import ModelFamily as ModelFamily
from tl_capacity.interfaces.models import NamedModel as NamedModel
from tl_capacity.interfaces.recipe import Recipe as Recipe
from tl_capacity.interfaces.text import Concept as Concept
from tl_capacity.interfaces.text import LabelledText as LabelledText
from tl_capacity.interfaces.text import TokenSource as TokenSource
