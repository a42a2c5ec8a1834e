"""Flax linen layers: `Norm(method)` for every method, and drop-in replacements for Flax's own.

`BatchNorm`, `GroupNorm`, `LayerNorm`, `InstanceNorm` and `RMSNorm` are subclasses of Flax's: they
have its fields in its order. They create the same parameters (`scale`, `bias`) and running
statistics (collection `batch_stats`: `mean`, `var`) under the same names, and load its checkpoints:
changing where they are imported from is the whole migration. docs/coming_from_flax.md lists each
deliberate difference.

Beyond Flax, every layer takes at the call a `scale` and `bias` in place of its own, given per
example, (N, C), or in x's rank, such as (N, H, W, C), and an `activation` that is applied to the
output and recomputed in the backward pass; masks may be real weights. Layers with running
statistics take `update_running_average`: by default they are updated when they are not used. Both
at once, or neither, are possible. After Flax's fields comes `unit_offset`, which stores scale as
its distance from 1 (`scale_init` still gives the scale itself), and in `BatchNorm` the `correction`
of the running variance.
"""

from jaxnorm.linen._norm import Norm as Norm
from jaxnorm.linen._flax_batch_norm import BatchNorm as BatchNorm
from jaxnorm.linen._flax_group_norms import GroupNorm as GroupNorm
from jaxnorm.linen._flax_group_norms import InstanceNorm as InstanceNorm
from jaxnorm.linen._flax_norms import LayerNorm as LayerNorm
from jaxnorm.linen._flax_norms import RMSNorm as RMSNorm
from jaxnorm.linen._kernels import WSConv as WSConv
from jaxnorm.linen._kernels import WSDense as WSDense
from jaxnorm.linen._positional import DynamicMomentShortcut as DynamicMomentShortcut
from jaxnorm.linen._inference import call_norms_with as call_norms_with
from jaxnorm.linen._probe import alter_norms as alter_norms
from jaxnorm.linen._probe import record_norms as record_norms
from jaxnorm.linen._inspection import tabulate_norms as tabulate_norms
from jaxnorm.linen._replacing import replace_norms as replace_norms
from jaxnorm.linen._population import population_statistics as population_statistics
from jaxnorm.linen._folding import fold_norms as fold_norms
