"""Flax nnx layers: `Norm(features, method)` for every method, and Flax's own replaced.

`BatchNorm`, `GroupNorm`, `LayerNorm`, `InstanceNorm` and `RMSNorm` take the arguments of `flax.nnx`
and hold the same variables under the same names; the docstring of `jaxnorm.linen` says what else
holds for both frameworks. Statistics are computed from x as it comes, in float32 or wider; `dtype`
is the dtype of the output. A `promote_dtype` other than Flax's default is applied to input, state
and parameters as in Flax.
"""

from jaxnorm.nnx._norm import Norm as Norm
from jaxnorm.nnx._norm import Observation as Observation
from jaxnorm.nnx._norm import Tap as Tap
from jaxnorm.nnx._flax_batch_norm import BatchNorm as BatchNorm
from jaxnorm.nnx._flax_group_norms import GroupNorm as GroupNorm
from jaxnorm.nnx._flax_group_norms import InstanceNorm as InstanceNorm
from jaxnorm.nnx._flax_norms import LayerNorm as LayerNorm
from jaxnorm.nnx._flax_norms import RMSNorm as RMSNorm
from jaxnorm.nnx._kernels import WSConv as WSConv
from jaxnorm.nnx._kernels import WSDense as WSDense
from jaxnorm.nnx._positional import DynamicMomentShortcut as DynamicMomentShortcut
from jaxnorm.nnx._probe import alter_norms as alter_norms
from jaxnorm.nnx._probe import record_norms as record_norms
from jaxnorm.nnx._inspection import tabulate_norms as tabulate_norms
from jaxnorm.nnx._replacing import ReplacedNorm as ReplacedNorm
from jaxnorm.nnx._replacing import replace_norms as replace_norms
from jaxnorm.nnx._population import population_statistics as population_statistics
from jaxnorm.nnx._folding import FoldedNorm as FoldedNorm
from jaxnorm.nnx._folding import fold_norms as fold_norms
