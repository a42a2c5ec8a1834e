"""jaxnorm: normalization layers for JAX and Flax from one idea, one number per axis.

Batch, layer, instance, group, ghost batch and batch group normalization standardize x with a mean and a variance that are
shared inside blocks of its indices. On each axis there is one choice: into how many equal, contiguous groups is it split?
1 pools the axis, EACH keeps every index apart, k makes k groups. Those numbers are the shape of the statistic:

    >>> from jaxnorm import EACH, Groups
    >>> x_shape = (64, 8, 8, 256)                                   # batch | spatial, spatial | channel
    >>> Groups(batch=1, spatial=1, channel=EACH).shape(x_shape)     # batch norm
    (1, 1, 1, 256)
    >>> Groups(batch=EACH, spatial=1, channel=EACH).shape(x_shape)  # instance norm
    (64, 1, 1, 256)
    >>> Groups(batch=EACH, spatial=1, channel=32).shape(x_shape)    # group norm
    (64, 1, 1, 32)
    >>> Groups(batch=EACH, spatial=EACH, channel=1).shape(x_shape)  # layer norm of tokens
    (64, 8, 8, 1)

The map, in the order in which the files build on each other:

    to say how axes are split     Groups(batch, spatial, channel), EACH, Size(n)     _groups.py
    with the mean fixed or not    Method(groups, mean=)                              _groups.py
    statistics of x               moments(x, groups) -> Moments(count, mean, var)    _moments.py
    coarser, merged, synced       pool(m, groups), merge(*parts)                     _pooling.py
    averaged                      blend(parts, weights)                              _pooling.py
    apply them to x               normalize(x, m, scale=, bias=)                     _normalize.py
    both at once                  norm(x, groups) -> y, Moments                      _normalize.py
    remember them                 init_running(shape), update_running(state, m),     _running.py
                                  update_cumulative(state, m), running_shape(...),
                                  update_averaged(state, m),
                                  running_moments(state, groups, x_shape)
    several devices               axis_name=, axis_index_groups= of the above        _devices.py
    a method by name              methods.group_norm(32), ...                        methods.py
    a method with a rule between  renorm.batch_renorm(x, state, train=)              renorm.py
    moments and normalize
    at test time                  inference.weigh_example, .adapt_moments,           inference.py
                                  .choose_example_weight
    folded into a linear layer    folding.fold                                       folding.py
    a layer                       linen.Norm(method), nnx.Norm(features, method),    linen/, nnx/
                                  BatchNorm, GroupNorm, LayerNorm, InstanceNorm,
                                  RMSNorm, GhostBatchNorm, BatchGroupNorm,
                                  BatchAndGroupNorm, PositionalNorm
    a whole model at test time    linen., nnx.population_statistics, .fold_norms,    linen/, nnx/
                                  linen.call_norms_with (nnx.view of Flax)
    weight decay of norms         optim.add_norm_decay, .norm_mask, .decay_mask,     optim.py
                                  .norm_penalty

`jaxnorm.linen`, `jaxnorm.nnx` and `jaxnorm.optim` (optax) are imported by name: all other functions need jax alone. Inside,
`_mean_var.py` and the pass in `_normalize.py` are the two full-size computations with their derivatives, and `_xla.py` is what
differs by platform.

Letters: N examples, H x W positions, C channels, G groups of channels; S a set of elements that share statistics; gamma is
`scale`, beta `bias`. Two conventions to remember: `momentum` is the weight of the OLD value, and variances are biased,
divided by n.
"""

from jaxnorm import folding as folding
from jaxnorm import inference as inference
from jaxnorm import methods as methods
from jaxnorm import renorm as renorm
from jaxnorm._groups import EACH as EACH
from jaxnorm._groups import Groups as Groups
from jaxnorm._groups import Method as Method
from jaxnorm._groups import Size as Size
from jaxnorm._moments import Moments as Moments
from jaxnorm._pooling import blend as blend
from jaxnorm._pooling import merge as merge
from jaxnorm._moments import moments as moments
from jaxnorm._pooling import pool as pool
from jaxnorm._normalize import norm as norm
from jaxnorm._normalize import normalize as normalize
from jaxnorm._running import init_running as init_running
from jaxnorm._running import running_moments as running_moments
from jaxnorm._running import running_shape as running_shape
from jaxnorm._running import update_averaged as update_averaged
from jaxnorm._running import update_cumulative as update_cumulative
from jaxnorm._running import update_running as update_running
