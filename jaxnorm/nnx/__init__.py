"""Flax nnx layers: `Norm` for any row of the table of methods, and drop-in replacements for Flax's
own layers.

`BatchNorm`, `GroupNorm`, `LayerNorm`, `InstanceNorm` and `RMSNorm` take the arguments of `flax.nnx`
and hold the same variables under the same names; the docstring of `jaxnorm.linen` says what else
holds for both frameworks. Statistics are computed from x as it comes, in float32 or wider; `dtype`
is the dtype of the output. A `promote_dtype` other than Flax's default is applied to input,
statistics and parameters as in Flax; only these layers and rows of the table take one.
"""

from jaxnorm.nnx._batch import BatchNorm as BatchNorm
from jaxnorm.nnx._evonorm import EvoNormB0 as EvoNormB0
from jaxnorm.nnx._evonorm import EvoNormS0 as EvoNormS0
from jaxnorm.nnx._frn import FilterResponseNorm as FilterResponseNorm
from jaxnorm.nnx._domains import DomainDistance as DomainDistance
from jaxnorm.nnx._domains import DomainSpecificBatchNorm as DomainSpecificBatchNorm
from jaxnorm.nnx._cross_iteration import CrossIterationNorm as CrossIterationNorm
from jaxnorm.nnx._group import GroupNorm as GroupNorm
from jaxnorm.nnx._group import InstanceNorm as InstanceNorm
from jaxnorm.nnx._group_plus import GroupNormPlus as GroupNormPlus
from jaxnorm.nnx._folding import FoldedNorm as FoldedNorm
from jaxnorm.nnx._folding import fold_norms as fold_norms
from jaxnorm.nnx._inference import population_statistics as population_statistics
from jaxnorm.nnx._layer import LayerNorm as LayerNorm
from jaxnorm.nnx._layer import RMSNorm as RMSNorm
from jaxnorm.nnx._positional import DynamicMomentShortcut as DynamicMomentShortcut
from jaxnorm.nnx._proxy import ProxyNorm as ProxyNorm
from jaxnorm.nnx._memorized import MemorizedBatchNorm as MemorizedBatchNorm
from jaxnorm.nnx._momentum import MomentumBatchNorm as MomentumBatchNorm
from jaxnorm.nnx._moving_average import MovingAverageNorm as MovingAverageNorm
from jaxnorm.nnx._moving_average import Tap as Tap
from jaxnorm.nnx._renorm import BatchRenorm as BatchRenorm
from jaxnorm.nnx._rows import BatchAndGroupNorm as BatchAndGroupNorm
from jaxnorm.nnx._rows import BatchGroupNorm as BatchGroupNorm
from jaxnorm.nnx._rows import GhostBatchNorm as GhostBatchNorm
from jaxnorm.nnx._rows import Norm as Norm
from jaxnorm.nnx._rows import PositionalNorm as PositionalNorm
from jaxnorm.nnx._weights import WSConv as WSConv
from jaxnorm.nnx._weights import WSDense as WSDense
from jaxnorm.nnx._switchable import SwitchableNorm as SwitchableNorm
