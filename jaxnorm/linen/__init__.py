"""Flax linen layers: `Norm` for any row of the table of methods, and drop-in replacements for
Flax's own layers.

`BatchNorm`, `GroupNorm`, `LayerNorm`, `InstanceNorm` and `RMSNorm` take Flax's arguments in Flax's
order, create the same parameters (`scale`, `bias`) and running statistics (collection
`batch_stats`: `mean`, `var`) under the same names, and load its checkpoints: changing where they
are imported from is the whole migration. docs/coming_from_flax.md lists each deliberate difference.

Beyond Flax, every layer takes at the call a `scale` and `bias` given per example, (N, C), in place
of its own, and an `activation` that is applied to the output and recomputed in the backward pass;
masks may be real weights. Layers with running statistics take `update_running_average`: by default
they are updated when they are not used. Both at once, or neither, are possible. After Flax's fields
comes `unit_offset`, which stores scale as its distance from 1 (`scale_init` still gives the scale
itself).
"""

from jaxnorm.linen._batch import BatchNorm as BatchNorm
from jaxnorm.linen._evonorm import EvoNormB0 as EvoNormB0
from jaxnorm.linen._evonorm import EvoNormS0 as EvoNormS0
from jaxnorm.linen._frn import FilterResponseNorm as FilterResponseNorm
from jaxnorm.linen._domains import DomainSpecificBatchNorm as DomainSpecificBatchNorm
from jaxnorm.linen._cross_iteration import CrossIterationNorm as CrossIterationNorm
from jaxnorm.linen._group import GroupNorm as GroupNorm
from jaxnorm.linen._group import InstanceNorm as InstanceNorm
from jaxnorm.linen._group_plus import GroupNormPlus as GroupNormPlus
from jaxnorm.linen._folding import fold_norms as fold_norms
from jaxnorm.linen._inference import call_norms_with as call_norms_with
from jaxnorm.linen._inference import population_statistics as population_statistics
from jaxnorm.linen._layer import LayerNorm as LayerNorm
from jaxnorm.linen._layer import RMSNorm as RMSNorm
from jaxnorm.linen._positional import DynamicMomentShortcut as DynamicMomentShortcut
from jaxnorm.linen._proxy import ProxyNorm as ProxyNorm
from jaxnorm.linen._memorized import MemorizedBatchNorm as MemorizedBatchNorm
from jaxnorm.linen._momentum import MomentumBatchNorm as MomentumBatchNorm
from jaxnorm.linen._moving_average import MovingAverageNorm as MovingAverageNorm
from jaxnorm.linen._renorm import BatchRenorm as BatchRenorm
from jaxnorm.linen._rows import BatchAndGroupNorm as BatchAndGroupNorm
from jaxnorm.linen._rows import BatchGroupNorm as BatchGroupNorm
from jaxnorm.linen._rows import GhostBatchNorm as GhostBatchNorm
from jaxnorm.linen._rows import Norm as Norm
from jaxnorm.linen._rows import PositionalNorm as PositionalNorm
from jaxnorm.linen._weights import WSConv as WSConv
from jaxnorm.linen._weights import WSDense as WSDense
from jaxnorm.linen._switchable import SwitchableNorm as SwitchableNorm
