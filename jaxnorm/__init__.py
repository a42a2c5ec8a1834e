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

The primitive is `norm(x, row)`, which is `moments` followed by `normalize`. In the order in which
the files of `_core/` build on each other:

    to say how axes are split     Groups(batch, spatial, channel), EACH, Size(n)
    statistics of x               moments(x, groups) -> Moments(count, mean, var)
    coarser, merged, averaged     pool(m, groups), merge(*parts), blend(parts, weights)
    apply them to x               normalize(x, m, scale=, bias=)
    the way back                  denormalize(y, m, scale=, bias=)
    both at once                  norm(x, groups) -> y, Moments
    remember them                 init_running(shape), running_shape(groups, x_shape),
                                  update_running(state, m), update_cumulative(state, m),
                                  update_averaged(state, m),
                                  running_moments(state, groups, x_shape)
    several devices               axis_name=, axis_index_groups= of the above,
                                  device_groups(num_devices, size=),
                                  sync_running(state, axis_name=)

A method is a value, a `Method` with its hyperparameters. What it remembers is a dict of arrays:

    state = method.init(x.shape)
    y, state = method.apply(x, state, train=True, scale=, bias=)

    rows of the table, a `Row`    methods.batch_norm, ghost_batch_norm, batch_and_group_norm,
                                  instance_norm, group_norm, layer_norm, token_layer_norm,
                                  positional_norm, rms_norm, instance_rms_norm
    any number of groups          methods.batch_group_norm, batch_group_count
    towards running statistics    methods.batch_renorm, momentum_batch_norm
    over several batches          methods.memorized_batch_norm, cross_iteration_norm,
                                  moving_average_norm
    a mixture of statistics       methods.switchable_norm, group_norm_plus
    of several domains            methods.domain_batch_norm
    with its activation           methods.filter_response_norm, thresholded_linear_unit,
                                  evonorm_b0, evonorm_s0, proxy_norm
    in a rule of your own         methods.measured, applied
    by name, in a configuration   methods.from_config, to_config

Rows also go into `norm`, `moments` and `pool`; each of the others has a rule and a file of its own
in `methods/`. Around them:

    what changes by the step      schedules.batch_renorm_bounds, train_momentum_schedule,
                                  inference_momentum, cross_iteration_window
    a training step               training.double_forward
    moments used later            positional.moment_shortcut, scale_and_shift
    kernels                       kernels.standardize_kernel, centralize_kernel
    an example at test time       inference.weigh_example, choose_example_weight (which returns
                                  ExampleWeights), adapt_moments
    unknown domains               domains.domain_weights, domain_ensemble
    into the layer in front       folding.fold
    from PyTorch and others       convert.from_torch, to_torch, from_haiku, to_haiku, from_equinox,
                                  to_equinox, from_keras, to_keras, from_sbx, to_sbx (a Layer),
                                  settings; whole models: load_model, dump_model
    weight decay of norms         optim.add_norm_decay, norm_mask, decay_mask, norm_penalty
    measuring a training run      probe.along_gradient (which returns AlongGradient),
                                  gradient_change, l2_by_layer, effective_learning_rates, noise,
                                  sensitivity, statistics_spread (StatisticsSpread), range_excess
                                  (RangeExcess), channel_power (ChannelPower), NormCall,
                                  NormTable, NormRow
    pictures of the sets          drawing.style, draw_row, draw_block, draw_key
    the look of figures           drawing.colour_of, label_lines, plain_log

In Flax, `linen.Norm(method)` and `nnx.Norm(features, method, rngs=)` carry every method (with `Tap`
and `Observation`, two kinds of nnx variables). The rest of `linen/` and `nnx/`:

    in place of Flax's own        BatchNorm, GroupNorm, LayerNorm, InstanceNorm, RMSNorm
    standardized kernels          WSConv, WSDense
    scale and shift of moments    DynamicMomentShortcut
    whole models                  population_statistics, fold_norms (which leaves a FoldedNorm in
                                  nnx), record_norms, alter_norms, tabulate_norms,
                                  replace_norms (with a ReplacedNorm for each in nnx),
                                  linen.call_norms_with

`linen`, `nnx`, `optim` and `drawing` are imported by name: all else needs jax alone. In the core,
`equations.py` has both full-size computations as they stand in the literature, `mean_var.py` and
`standardize.py` the same with their derivatives, `platforms.py` what differs by platform, and
`together.py` and `passes.py` how sums share a read.

Letters: N examples, H x W positions, C channels, G groups of channels; S a set of elements that
share statistics; gamma is `scale`, beta `bias`. Two conventions to remember: `momentum` is the
weight of the OLD value, and variances are biased, divided by n.
"""

from jaxnorm import convert as convert
from jaxnorm import domains as domains
from jaxnorm import folding as folding
from jaxnorm import inference as inference
from jaxnorm import kernels as kernels
from jaxnorm import methods as methods
from jaxnorm import positional as positional
from jaxnorm import probe as probe
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
from jaxnorm._core.boundary import denormalize as denormalize
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
