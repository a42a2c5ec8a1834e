"""jaxnorm: normalization layers for JAX and Flax from one idea, one number per axis.

Batch, layer, instance, group, ghost batch and batch group normalization standardize x with a mean
and a variance that are shared inside blocks of its indices. On each axis there is one choice: into
how many equal, contiguous groups is it split? 1 pools the axis, EACH keeps every index apart, k
makes k groups. Those numbers are the shape of the statistic:

    >>> from jaxnorm import EACH, Groups
    >>> x_shape = (64, 8, 8, 256)  # batch | spatial, spatial | channel
    >>> Groups(batch=1, spatial=1, channel=EACH).shape(x_shape)     # batch norm
    (1, 1, 1, 256)
    >>> Groups(batch=EACH, spatial=1, channel=EACH).shape(x_shape)  # instance norm
    (64, 1, 1, 256)
    >>> Groups(batch=EACH, spatial=1, channel=32).shape(x_shape)    # group norm
    (64, 1, 1, 32)
    >>> Groups(batch=EACH, spatial=EACH, channel=1).shape(x_shape)  # layer norm of tokens
    (64, 8, 8, 1)

The map, in the order in which the files of `_core/` build on each other:

    to say how axes are split     Groups(batch, spatial, channel), EACH, Size(n)     groups.py
    with the mean fixed or not    Method(groups, mean=)                              groups.py
    statistics of x               moments(x, groups) -> Moments(count, mean, var)    moments.py
    coarser, merged, synced       pool(m, groups), merge(*parts)                     pooling.py
    averaged                      blend(parts, weights)                              pooling.py
    apply them to x               normalize(x, m, scale=, bias=)                     normalize.py
    both at once                  norm(x, groups) -> y, Moments                      normalize.py
    remember them                 init_running(shape), running_shape(...),           state.py
                                  running_moments(state, groups, x_shape)
                                  update_running(state, m)                           running.py
                                  update_cumulative(state, m),                       averages.py
                                  update_averaged(state, m)
    several devices               axis_name=, axis_index_groups= of the above,
                                  device_groups(num_devices, size=),                 devices.py
                                  sync_running(state, axis_name=)                    sync.py
    a row of the table            methods.group_norm(32), ...                        methods.py

Methods with a rule between `moments` and `normalize`, each in a file of its name. What they
remember is a dict of arrays; `f(x, state, train=)` returns y and the next state:

    towards running statistics    renorm.batch_renorm, momentum.momentum_batch_norm
    over several batches          memorized.memorized_batch_norm, memorized.double_forward,
                                  cross_iteration.cross_iteration_norm,
                                  moving_average.moving_average_norm
    a mixture of statistics       switchable.switchable_norm, group_plus.group_norm_plus
    of several domains            domains.domain_batch_norm, domains.domain_distance,
                                  domains.domain_ensemble
    any number of groups          batch_group.batch_group_norm
    with its activation           frn.filter_response_norm, evonorm.evonorm_b0,
                                  evonorm.evonorm_s0, proxy.proxy_norm
    returned and used later       positional.positional_norm, positional.moment_shortcut
    of a kernel                   kernels.standardize_kernel, kernels.centralize_kernel
    what changes by the step      schedules.batch_renorm_bounds, schedules.cross_iteration_window,
                                  schedules.train_momentum_schedule, schedules.inference_momentum

At test time, and around:

    an example's own statistics   inference.weigh_example, inference.choose_example_weight,
                                  inference.adapt_moments
    into the layer in front       folding.fold
    weight decay of norms         optim.add_norm_decay, optim.norm_mask, optim.decay_mask,
                                  optim.norm_penalty
    layers                        linen.Norm(method), nnx.Norm(features, method), and one named
                                  after each method: linen/, nnx/
    whole models                  population_statistics and fold_norms in linen and nnx

`jaxnorm.linen`, `jaxnorm.nnx` and `jaxnorm.optim` are imported by name: all other functions need
jax alone. In the core, `mean_var.py` and `standardize.py` are the two full-size computations with
their derivatives, and `xla.py` is what differs by platform. `_frame.py` is the frame of the methods
with a rule.

Letters: N examples, H x W positions, C channels, G groups of channels; S a set of elements that
share statistics; gamma is `scale`, beta `bias`. Two conventions to remember: `momentum` is the
weight of the OLD value, and variances are biased, divided by n.
"""

from jaxnorm import domains as domains
from jaxnorm import folding as folding
from jaxnorm import inference as inference
from jaxnorm import kernels as kernels
from jaxnorm import methods as methods
from jaxnorm import positional as positional
from jaxnorm import schedules as schedules
from jaxnorm import training as training
from jaxnorm._core.devices import device_groups as device_groups
from jaxnorm._core.groups import EACH as EACH
from jaxnorm._core.groups import Groups as Groups
from jaxnorm._core.groups import Size as Size
from jaxnorm._core.moments import Moments as Moments
from jaxnorm._core.boundary import blend as blend
from jaxnorm._core.boundary import merge as merge
from jaxnorm._core.boundary import moments as moments
from jaxnorm._core.boundary import pool as pool
from jaxnorm._core.boundary import norm as norm
from jaxnorm._core.boundary import normalize as normalize
from jaxnorm._core.state import init_running as init_running
from jaxnorm._core.state import running_moments as running_moments
from jaxnorm._core.state import running_shape as running_shape
from jaxnorm._core.sync import sync_running as sync_running
from jaxnorm._core.boundary import update_averaged as update_averaged
from jaxnorm._core.boundary import update_cumulative as update_cumulative
from jaxnorm._core.boundary import update_running as update_running
from jaxnorm.methods import Method as Method
from jaxnorm.methods import Row as Row
