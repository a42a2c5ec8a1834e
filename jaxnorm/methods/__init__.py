"""Every normalization as a value: `Method` is what they have in common, `Row` a row of the table.

    method = methods.batch_renorm(momentum=0.99)  # or methods.group_norm(32)
    state = method.init(x.shape)  # a dict of arrays; {} where nothing is remembered
    y, state = method.apply(x, state, train=True, scale=scale, bias=bias, rmax=1.5)

Rows of the table are `batch_norm`, `ghost_batch_norm`, `batch_and_group_norm`, `instance_norm`,
`group_norm`, `layer_norm`, `token_layer_norm`, `positional_norm`, `rms_norm`, `instance_rms_norm`,
and `batch_group_norm` where it splits channels. They also go into `norm`, `moments` and `pool`. The
other methods put a rule of their own between statistics and their use. `from_config` makes each of
its name and arguments, as configurations and command lines have them, and `to_config` is the way
back.
"""

from jaxnorm.methods._method import Method as Method
from jaxnorm.methods._row import Row as Row
from jaxnorm.methods._frame import applied as applied
from jaxnorm.methods._frame import measured as measured
from jaxnorm.methods._config import from_config as from_config
from jaxnorm.methods._config import to_config as to_config
from jaxnorm.methods._table import batch_and_group_norm as batch_and_group_norm
from jaxnorm.methods._table import batch_norm as batch_norm
from jaxnorm.methods._table import ghost_batch_norm as ghost_batch_norm
from jaxnorm.methods._table import group_norm as group_norm
from jaxnorm.methods._table import instance_norm as instance_norm
from jaxnorm.methods._table import instance_rms_norm as instance_rms_norm
from jaxnorm.methods._table import layer_norm as layer_norm
from jaxnorm.methods._table import positional_norm as positional_norm
from jaxnorm.methods._table import rms_norm as rms_norm
from jaxnorm.methods._table import token_layer_norm as token_layer_norm
from jaxnorm.methods._batch_group import batch_group_count as batch_group_count
from jaxnorm.methods._batch_group import batch_group_norm as batch_group_norm
from jaxnorm.methods._cross_iteration import cross_iteration_norm as cross_iteration_norm
from jaxnorm.methods._domains import domain_batch_norm as domain_batch_norm
from jaxnorm.methods._evonorm import evonorm_b0 as evonorm_b0
from jaxnorm.methods._evonorm import evonorm_s0 as evonorm_s0
from jaxnorm.methods._filter_response import filter_response_norm as filter_response_norm
from jaxnorm.methods._filter_response import thresholded_linear_unit as thresholded_linear_unit
from jaxnorm.methods._group_plus import group_norm_plus as group_norm_plus
from jaxnorm.methods._memorized import memorized_batch_norm as memorized_batch_norm
from jaxnorm.methods._momentum import momentum_batch_norm as momentum_batch_norm
from jaxnorm.methods._moving_average import moving_average_norm as moving_average_norm
from jaxnorm.methods._proxy import proxy_norm as proxy_norm
from jaxnorm.methods._renorm import batch_renorm as batch_renorm
from jaxnorm.methods._switchable import switchable_norm as switchable_norm
