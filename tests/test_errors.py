"""Every error at the door says what is wrong, what it got, what it expects and what to do."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as fnnx
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxnorm import (
    EACH,
    Groups,
    Moments,
    Row,
    Size,
    blend,
    convert,
    denormalize,
    device_groups,
    folding,
    init_running,
    kernels,
    linen,
    merge,
    methods,
    moments,
    nnx,
    norm,
    normalize,
    pool,
    positional,
    probe,
    running_moments,
    update_averaged,
    update_cumulative,
    update_running,
)

NHWC, NCHW = (8, 4, 4, 6), (8, 3, 16, 16)
BN = methods.batch_norm()


def ones(*shape, dtype="f4"):
    return jnp.ones(shape, dtype)


def given(*shape):
    return Moments(ones(*shape), ones(*shape), ones(*shape))


# (error, what its message must say, the call)
ERRORS = {
    "channels that do not split": (
        ValueError,
        r"channel axis -1 of x has size 30, which does not split into 32 equal groups\. Got x of "
        r"shape \(64, 8, 8, 30\) and "
        r"channel=32; expected a divisor of 30: 1, 2, 3, 5, 6, 10, 15, 30",
        lambda: methods.group_norm(32).groups.shape((64, 8, 8, 30)),
    ),
    "channels that do not split, channels first": (
        ValueError,
        r"channel axis 1 of x has size 30, which does not split into 4",
        lambda: methods.group_norm(4).groups.shape((64, 30, 8, 8), channel_axis=1),
    ),
    "a short last batch": (
        ValueError,
        r"batch axis 0 of x has size 50, which does not split into 16 equal groups\..*short last "
        r"batch.*drop it, or pad it to "
        r"64 and give the padding weights=0",
        lambda: methods.ghost_batch_norm(16).groups.shape((50, 8, 8, 6)),
    ),
    "ghosts of a size": (
        ValueError,
        r"size 50, which does not split into groups of 16 elements.*pad it to 64",
        lambda: methods.ghost_batch_norm(ghost_size=16).groups.shape((50, 6)),
    ),
    "positions that do not split": (
        ValueError,
        r"spatial axis 1 of x has size 4, which does not split into 3 equal groups.*spatial=3; "
        "expected a divisor of 4: 1, 2, 4",
        lambda: Groups(1, (3, 1), EACH).shape(NHWC),
    ),
    "more groups than elements": (
        ValueError,
        "does not split into 7 equal",
        lambda: moments(ones(*NHWC), Groups(channel=7)),
    ),
    "another number of spatial axes": (
        ValueError,
        (
            r"spatial=\(1, 2, 3\) names 3 spatial axes\. Got x of shape \(8, 4, 4, 6\), which has "
            r"2; expected one value for each"
        ),
        lambda: Groups(1, (1, 2, 3), 1).shape(NHWC),
    ),
    "zero groups": (
        ValueError,
        r"Groups\(channel=0\): expected a positive number",
        lambda: methods.group_norm(0),
    ),
    "negative groups": (
        ValueError,
        r"Groups\(batch=-2\): expected a positive",
        lambda: Groups(batch=-2),
    ),
    "fractions of groups": (
        ValueError,
        r"Groups\(spatial=0.5\): expected a positive",
        lambda: Groups(spatial=(1, 0.5)),
    ),
    "True groups": (
        ValueError,
        r"Groups\(channel=True\): expected a positive",
        lambda: Groups(channel=True),
    ),
    "groups of no elements": (
        ValueError,
        r"Size\(n\) is 0; expected an integer of at least 1",
        lambda: Size(0),
    ),
    "one axis for batch and channels": (
        ValueError,
        (
            "batch_axis and channel_axis are both axis 0.*Expected two different axes; x needs a "
            "rank of 2 or more"
        ),
        lambda: Groups().shape((8,)),
    ),
    "an axis that is not there": (
        ValueError,
        (
            r"axis 4 is not an axis of x\. Got x of shape \(8, 4, 4, 6\); expected an integer from "
            r"-4 to 3"
        ),
        lambda: norm(ones(*NHWC), BN, channel_axis=4),
    ),
    "a batch axis that is not there": (
        ValueError,
        "axis -5 is not an axis of x",
        lambda: norm(ones(*NHWC), BN, batch_axis=-5),
    ),
    "an axis that is no number": (
        ValueError,
        "axis 'c' is not an axis",
        lambda: Groups().shape(NHWC, channel_axis="c"),
    ),
    "several channel axes for one number": (
        ValueError,
        (
            r"Groups has one number for the channels, but channel_axis=\(1, 3\) names 2 "
            r"axes.*statistic's shape as a tuple"
        ),
        lambda: norm(ones(*NHWC), BN, channel_axis=(1, 3)),
    ),
    "a statistic of another rank": (
        ValueError,
        (
            r"groups of shape \(1, 6\) does not fit x of shape \(8, 4, 4, 6\)\. Expected the same "
            r"rank, with each size a divisor"
        ),
        lambda: norm(ones(*NHWC), (1, 6)),
    ),
    "a statistic that does not divide": (
        ValueError,
        r"groups of shape \(1, 1, 1, 4\)",
        lambda: moments(ones(*NHWC), (1, 1, 1, 4)),
    ),
    "groups that are none": (
        TypeError,
        (
            r"groups is a Groups, a row of the table or the statistic's shape\. Got 32; expected "
            r"for example.*group_norm\(32\)"
        ),
        lambda: norm(ones(*NHWC), 32),
    ),
    "a name for groups": (TypeError, "Got 'batch'", lambda: norm(ones(*NHWC), "batch")),
    "a method of no groups": (
        TypeError,
        r"Row\(groups\) takes a Groups\. Got 3; expected Groups",
        lambda: Row(3),
    ),
    "another fixed mean": (
        ValueError,
        (
            "mean is None .* or 0 .* Got 1.5. To compute sums about a value near the mean.* pass "
            "it as center"
        ),
        lambda: moments(ones(*NHWC), BN, mean=1.5),
    ),
    "a fixed mean of a method": (
        ValueError,
        "mean is None .* Got False",
        lambda: Row(Groups(), mean=False),
    ),
    "integers": (
        TypeError,
        (
            r"x must be floating or complex\. Got int32, shape \(8, 6\); convert it, for example "
            r"x\.astype"
        ),
        lambda: norm(ones(8, 6, dtype="i4"), BN),
    ),
    "integers to normalize": (
        TypeError,
        "x must be floating or complex",
        lambda: normalize(ones(8, 6, dtype="i4"), given(1, 6)),
    ),
    "booleans": (TypeError, "Got bool", lambda: moments(np.ones((8, 6), bool), BN)),
    "a scalar": (ValueError, "x must have axes.*expected for example", lambda: norm(1.0, (1,))),
    "weights of one example each, unaligned": (
        ValueError,
        r"weights of shape \(8,\) do not broadcast against x of shape \(8, 4, 4, 6\)\. Expected "
        r"sizes of 1 or "
        r"x's own.*\(N, 1, 1, 1\)",
        lambda: norm(ones(*NHWC), BN, weights=ones(8)),
    ),
    "weights of a higher rank": (
        ValueError,
        "do not broadcast",
        lambda: norm(ones(8, 6), BN, weights=ones(1, 8, 6)),
    ),
    "complex weights": (
        TypeError,
        "weights must be boolean or real. Got complex64; expected for example a boolean mask",
        lambda: norm(ones(8, 6), BN, weights=ones(8, 6, dtype="c8")),
    ),
    "a center of another shape": (
        ValueError,
        (
            r"center of shape \(6,\) does not fit statistics of shape \(1, 1, 1, 6\)\. Expected "
            r"that shape"
        ),
        lambda: moments(ones(*NHWC), BN, center=ones(6)),
    ),
    "a scale on NCHW data": (
        ValueError,
        r"scale has shape \(3,\), but axis -1 of x, shape \(8, 3, 16, 16\), has size 16\."
        r".*looks like NCHW data: pass channel_axis=1",
        lambda: normalize(ones(*NCHW), given(1, 1, 1, 1), scale=ones(3)),
    ),
    "a bias of the wrong size": (
        ValueError,
        r"bias has shape \(5,\).*has size 6\. Expected \(6,\), \(8, 6\) per example, or 4 axes "
        r"that broadcast against x",
        lambda: norm(ones(*NHWC), BN, bias=ones(5)),
    ),
    "a scale of the right size for another axis": (
        ValueError,
        r"Axis 2 has that size: pass channel_axis=2",
        lambda: norm(ones(8, 3, 5, 6), BN, scale=ones(5)),
    ),
    "a scale of x's rank that does not broadcast": (
        ValueError,
        r"scale has shape \(1, 2, 1, 6\).*or 4 axes that broadcast against x",
        lambda: norm(ones(*NHWC), BN, scale=ones(1, 2, 1, 6)),
    ),
    "a scale for each token without its axis of examples": (
        ValueError,
        r"scale has shape \(4, 4, 6\).*write its axes of size 1: \(1, 4, 4, 6\)",
        lambda: norm(ones(*NHWC), BN, scale=ones(4, 4, 6)),
    ),
    "two axes in the order of x, where they mean (N, C)": (
        ValueError,
        r"scale has shape \(6, 8\).*Expected \(6,\), \(8, 6\) per example\.",
        lambda: norm(ones(6, 8), (1, 8), scale=ones(6, 8), batch_axis=1, channel_axis=0),
    ),
    "a scalar scale": (
        ValueError,
        r"scale has shape \(\)",
        lambda: norm(ones(*NHWC), BN, scale=2.0),
    ),
    "a scale for each group": (
        ValueError,
        r"scale has shape \(3,\)",
        lambda: norm(ones(*NHWC), methods.group_norm(3), scale=ones(3)),
    ),
    "a complex scale of real x": (
        TypeError,
        "scale is complex .complex64",
        lambda: norm(ones(8, 6), BN, scale=ones(6, dtype="c8")),
    ),
    "moments that are none": (
        TypeError,
        r"m must be Moments, such as moments\(x, groups\) returns\. Got tuple",
        lambda: normalize(ones(8, 6), (1, 1, 1)),
    ),
    "moments that do not divide": (
        ValueError,
        r"m\.var of shape \(1, 4\) does not fit x of shape \(8, 6\)",
        lambda: normalize(ones(8, 6), given(1, 4)),
    ),
    "a running state as moments": (
        ValueError,
        r"m\.var of shape \(6,\) does not fit x of shape \(8, 6\)\..*if m is one, pass "
        r"running_moments\(m, groups, x\.shape\)",
        lambda: normalize(ones(8, 6), init_running((6,))),
    ),
    "integers to denormalize": (
        TypeError,
        r"y must be floating or complex\. Got int32, shape \(8, 6\); convert it, for example y\.as",
        lambda: denormalize(ones(8, 6, dtype="i4"), given(1, 6)),
    ),
    "no moments to denormalize": (
        TypeError,
        "m must be Moments.* Got tuple",
        lambda: denormalize(ones(8, 6), (1, 1, 1)),
    ),
    "a running state to denormalize": (
        ValueError,
        r"if m is one, pass running_moments\(m, groups, x\.shape\)",
        lambda: denormalize(ones(8, 6), init_running((6,))),
    ),
    "a scale of 0 to undo": (
        ValueError,
        r"scale is 0 in 2 of 6 places\. Expected none: what was multiplied by 0 does not come back",
        lambda: denormalize(ones(8, 6), given(1, 6), scale=jnp.array([1.0, 0, 2, 3, 0, 1])),
    ),
    "an epsilon for each channel to undo": (
        ValueError,
        r"epsilon has shape \(6,\); expected a number of at least 0",
        lambda: denormalize(ones(8, 6), given(1, 6), epsilon=ones(6)),
    ),
    "a bias of another shape to undo": (
        ValueError,
        r"bias has shape \(3,\).*Expected \(6,\)",
        lambda: denormalize(ones(8, 6), given(1, 6), bias=ones(3)),
    ),
    "a real x of complex y": (
        TypeError,
        "dtype float32 cannot hold the result",
        lambda: denormalize(ones(8, 6, dtype="c8"), given(1, 6), dtype="f4"),
    ),
    "complex moments of real x": (
        TypeError,
        "mean is complex",
        lambda: normalize(ones(8, 6), Moments(ones(1, 6), ones(1, 6, dtype="c8"), ones(1, 6))),
    ),
    "an integer y": (
        TypeError,
        "dtype int32 cannot hold the result",
        lambda: norm(ones(8, 6), BN, dtype="i4"),
    ),
    "a real y of complex x": (
        TypeError,
        "dtype float32 cannot hold",
        lambda: norm(ones(8, 6, dtype="c8"), BN, dtype="f4"),
    ),
    "pooling to a finer shape": (
        ValueError,
        r"does not fit x of shape \(1, 6\)",
        lambda: pool(given(1, 6), (8, 6)),
    ),
    "merging nothing": (
        ValueError,
        r"merge needs one or more moments of equal shape\. Got shapes \[\]",
        lambda: merge(),
    ),
    "merging unequal shapes": (
        ValueError,
        r"merge needs .* equal shape\. Got shapes \[\(1, 6\), \(1, 3\)\]",
        lambda: merge(given(1, 6), given(1, 3)),
    ),
    "blending nothing": (ValueError, "blend needs one or more", lambda: blend([], [])),
    "blending with too few weights": (
        ValueError,
        "one weight for each part. Got 2 parts and 1 weights",
        lambda: blend([given(1, 6)] * 2, [0.5]),
    ),
    "both a number and a size of groups": (
        ValueError,
        "Got num_groups=3 and group_size=2; expected exactly one of the two",
        lambda: methods.group_norm(3, group_size=2),
    ),
    "neither number nor size of groups": (
        ValueError,
        "num_groups=None and group_size=None; expected",
        lambda: methods.group_norm(),
    ),
    "neither number nor size of ghosts": (
        ValueError,
        "num_ghosts=None and ghost_size=None",
        lambda: methods.ghost_batch_norm(),
    ),
    "ghosts without groups": (
        ValueError,
        "num_groups=None and group_size=None",
        lambda: methods.batch_and_group_norm(2),
    ),
    "pieces across rows": (
        ValueError,
        (
            r"batch_group_norm\(18\) is no row of the table for x of shape \(8, 4, 6, 6\): "
            r"expected a number of groups that divides the 6 channels\. Call its apply"
        ),
        lambda: norm(ones(8, 4, 6, 6), methods.batch_group_norm(18)),
    ),
    "pieces across rows and columns": (
        ValueError,
        r"batch_group_norm\(36\) is no row of the table",
        lambda: methods.batch_group_norm(36).shape((8, 4, 4, 6)),
    ),
    "pieces across channels": (
        ValueError,
        r"batch_group_norm\(9\) is no row of the table",
        lambda: norm(ones(8, 4, 6, 6), methods.batch_group_norm(9)),
    ),
    "pieces of vectors": (
        ValueError,
        r"12 groups do not divide the features of x.*\(8, 6\); expected a divisor of 6",
        lambda: methods.batch_group_norm(12).init((8, 6)),
    ),
    "pieces that are whole parts of channels": (
        ValueError,
        r"batch_group_norm\(12\) is no row.*Groups\(batch=1, spatial=\(parts, 1\), channel=EACH\)",
        lambda: moments(ones(*NHWC), methods.batch_group_norm(12)),
    ),
    "state of another number of channels": (
        ValueError,
        r"running statistics of shape \(6,\) do not fit x of shape \(8, 5\).*feed x of that size",
        lambda: running_moments(init_running((6,)), BN, (8, 5)),
    ),
    "moments of another number of channels": (
        ValueError,
        r"moments of shape \(1, 5\) do not fit running statistics of shape \(6,\)",
        lambda: update_running(init_running((6,)), given(1, 5)),
    ),
    "a dict as running statistics": (
        TypeError,
        r"state is a dict; expected Moments, .*Moments\(None, d\['mean'\], d\['var'\]\)",
        lambda: update_running({"mean": ones(6), "var": ones(6)}, given(1, 6)),
    ),
    "a dict as running statistics, cumulative": (
        TypeError,
        r"state is a dict; expected Moments",
        lambda: update_cumulative({"mean": ones(6), "var": ones(6)}, given(1, 6)),
    ),
    "a dict as running statistics, averaged": (
        TypeError,
        r"state is a dict; expected Moments",
        lambda: update_averaged({"mean": ones(6), "var": ones(6)}, given(1, 6)),
    ),
    "a dict as running statistics that serve": (
        TypeError,
        r"state is a dict; expected Moments",
        lambda: running_moments({"mean": ones(6), "var": ones(6)}, BN, (8, 6)),
    ),
    "an array as running statistics": (
        TypeError,
        r"state is a .*; expected Moments, such as init_running\(shape\)",
        lambda: update_running(ones(6), given(1, 6)),
    ),
    "a batch's moments as a tuple": (
        TypeError,
        r"m is a tuple; expected Moments",
        lambda: update_running(init_running((6,)), (ones(1, 6), ones(1, 6))),
    ),
    "a var of another shape than the mean": (
        ValueError,
        r"state\.mean has shape \(6,\) and state\.var \(1,\)\. Expected one shape",
        lambda: update_running(Moments(None, ones(6), ones(1)), given(1, 6)),
    ),
    "a var of another shape that serves": (
        ValueError,
        r"state\.mean has shape \(6,\) and state\.var \(1,\)",
        lambda: running_moments(Moments(None, ones(6), ones(1)), BN, (8, 6)),
    ),
    "a batch's var of another shape than its mean": (
        ValueError,
        r"m\.mean has shape \(1, 6\) and m\.var \(1,\)",
        lambda: update_running(init_running((6,)), Moments(ones(1, 6), ones(1, 6), ones(1))),
    ),
    "running statistics as a batch's": (
        ValueError,
        r"m has no count\. Expected a batch's moments",
        lambda: update_running(init_running((6,)), init_running((6,))),
    ),
    "a cumulative average without count": (
        ValueError,
        r"needs a count\. Got running statistics without one; make them by init_running",
        lambda: update_cumulative(init_running((6,)), given(1, 6)),
    ),
}


def layer(library, name, *args, call=(), mask=None, **options):
    """A layer of either library, made and called for x of shape (8, 4, 4, 6)."""
    x, given = ones(*NHWC), {} if mask is None else {"mask": mask}
    if library is linen:
        return getattr(linen, name)(*args, **options).init(jax.random.key(0), x, *call, **given)
    return getattr(nnx, name)(6, *args, rngs=fnnx.Rngs(0), **options)(x, *call, **given)


X = ones(*NHWC)
EVONORM_B0 = methods.evonorm_b0()
DOMAIN = methods.domain_batch_norm(2)
PIECES = methods.batch_group_norm(12)
FOLD = partial(folding.fold, ones(3, 6), None, init_running((6,)))


def applied(method, *, train=True, **options):
    """y and the state after a first step of a method on X."""
    front = {"kernel_shape": (6, 6)} if isinstance(method, methods.cross_iteration_norm) else {}
    return method.apply(X, method.init(NHWC, **front), train=train, **options)


# every method with a rule of its own, and what its apply needs
RULES = {
    EVONORM_B0: {},
    DOMAIN: {"domain": 1},
    PIECES: {},
    methods.evonorm_s0(2): {},
    methods.filter_response_norm(use_learned_epsilon=True): {},
    methods.proxy_norm(methods.layer_norm()): {},
    methods.batch_renorm(): {"rmax": 1.5, "dmax": 0.5},
    methods.momentum_batch_norm(): {"train_momentum": 0.4},
    methods.memorized_batch_norm((0.2, 0.3, 0.5)): {},
    methods.cross_iteration_norm(): {"inputs": X, "kernel": jnp.eye(6)},
    methods.moving_average_norm(): {"tap": jnp.zeros(6)},
    methods.group_norm_plus(2): {},
    methods.switchable_norm(): {"mean_logits": (0.1, 0.2, 0.3)},
}
RULES = {type(method).__name__: (method, options) for method, options in RULES.items()}
EPSILONS = {
    "negative": (ValueError, "epsilon is -1; expected a number of at least 0", -1),
    "NaN": (ValueError, "epsilon is nan; expected a number of at least 0", float("nan")),
    "None": (TypeError, "epsilon is None; expected a number of at least 0", None),
    "a string": (TypeError, "epsilon is '1e-5'; expected a number", "1e-5"),
    "True": (TypeError, "epsilon is True; expected a number", True),
    "for each channel": (
        ValueError,
        r"epsilon has shape \(6,\); expected a number of at least 0",
        np.full(6, 1e-5, "f4"),
    ),
    "complex": (TypeError, "epsilon is .*complex64", np.complex64(1)),
}
# a method is static, so that what is no Python number is refused by its kind
EPSILONS_OF_METHODS = EPSILONS | {
    "None": (TypeError, r"\(epsilon=\.\.\.\) is None\. Expected a value such as", None),
    "NaN": (ValueError, r"\(epsilon=\.\.\.\) is NaN\. Expected a number", float("nan")),
    "for each channel": (
        TypeError,
        r"\(epsilon=\.\.\.\) is an array of shape \(6,\)\. Expected a Python number",
        np.full(6, 1e-5, "f4"),
    ),
    "complex": (TypeError, r"\(epsilon=\.\.\.\) is \(1\+0j\)\. Expected a number", np.complex64(1)),
}
TAKE_EPSILON = {
    "norm": partial(norm, X, BN),
    "normalize": partial(normalize, X, given(1, 1, 1, 6)),
    "standardize_kernel": partial(kernels.standardize_kernel, X),
    "fold": FOLD,
    "moment_shortcut": partial(positional.moment_shortcut, X, given(8, 4, 4, 1)),
}
METHODS_TAKE_EPSILON = {
    **{name: partial(dataclasses.replace, method) for name, (method, _) in RULES.items()},
    "batch_norm": methods.batch_norm,
    "group_norm": partial(methods.group_norm, 3),
    **{
        f"{library.__name__}.LayerNorm": partial(layer, library, "LayerNorm")
        for library in (linen, nnx)
    },
}
ERRORS |= {
    f"epsilon of {name}, {kind}": (error, message, partial(call, epsilon=value))
    for calls, epsilons in (
        (TAKE_EPSILON, EPSILONS),
        (METHODS_TAKE_EPSILON, EPSILONS_OF_METHODS),
    )
    for i, (name, call) in enumerate(calls.items())
    for j, (kind, (error, message, value)) in enumerate(epsilons.items())
    if name in ("norm", "evonorm_b0", "fold") or (i + j) % 3 == 0
    if not (name == "norm" and value is None)  # there it is the row's
}
ERRORS |= {
    "a learned epsilon for each channel": (
        ValueError,
        r"learned_epsilon has shape \(6,\); expected a number",
        lambda: applied(
            methods.filter_response_norm(use_learned_epsilon=True), learned_epsilon=ones(6)
        ),
    ),
    "a negative epsilon of the proxy": (
        ValueError,
        "proxy_epsilon is -1.0; expected a number of at least 0",
        lambda: methods.proxy_norm(methods.layer_norm(), proxy_epsilon=-1.0),
    ),
}

NEGATIVE = "weights say how much each element counts. Got -1.* among them; expected .*at least 0"
ERRORS |= {
    "negative weights": (ValueError, NEGATIVE, lambda: norm(X, BN, weights=-ones(8, 1, 1, 1))),
    "a negative weight of a list": (
        ValueError,
        NEGATIVE,
        lambda: moments(ones(2, 3), (1, 3), weights=[[1.0], [-1.0]]),
    ),
    "one negative weight of NumPy, closed over by jit": (
        ValueError,
        NEGATIVE,
        lambda: jax.jit(lambda x: norm(x, BN, weights=np.array([1.0, -1.0] * 3)))(X),
    ),
    "negative weights in half precision": (
        ValueError,
        NEGATIVE,
        lambda: moments(X, BN, weights=-ones(6, dtype="bfloat16")),
    ),
    "NaN weights": (
        ValueError,
        "Got nan among them",
        lambda: normalize(X, given(1, 1, 1, 6), weights=np.nan),
    ),
    "negative weights of an evonorm": (
        ValueError,
        NEGATIVE,
        lambda: applied(EVONORM_B0, train=False, weights=-ones(6)),
    ),
    **{
        f"a negative mask of {library.__name__}.{name}{args}, {use}": (
            ValueError,
            NEGATIVE,
            partial(layer, library, name, *args, call=(use,), mask=-np.ones(6, "f4")),
        )
        for library in (linen, nnx)
        for name, *args in (("BatchNorm",), ("Norm", BN), ("Norm", EVONORM_B0))
        for use in (True, False)
    },
}

FLAG = "train is 'False'; expected True or False"
USE = "use_running_average is {}; expected True or False"
ERRORS |= {
    **{
        f"train of {name}": (TypeError, FLAG, partial(applied, method, train="False", **options))
        for name, (method, options) in RULES.items()
    },
    "train of a row": (TypeError, FLAG, lambda: applied(BN, train="False")),
    "train, a number": (TypeError, "train is 2; expected True", lambda: applied(PIECES, train=2)),
    "train, nothing": (
        TypeError,
        "train is None; expected",
        lambda: applied(PIECES, train=None),
    ),
    "train, an array": (
        TypeError,
        r"train is array\(\[ ?True\]\)",
        lambda: applied(PIECES, train=np.array([True])),
    ),
    **{
        f"{given} of {library.__name__}.{name}{args}": (TypeError, USE.format(repr(given)), call)
        for library in (linen, nnx)
        for name, *args in (("BatchNorm",), ("Norm", BN), ("Norm", EVONORM_B0))
        for given, call in {
            "False": partial(layer, library, name, *args, call=("False",)),
            2: partial(layer, library, name, *args, use_running_average=2),
        }.items()
    },
    "an update of linen that is no flag": (
        TypeError,
        "update_running_average is 'no'; expected True or False",
        lambda: linen.BatchNorm(use_running_average=True).init(
            jax.random.key(0), X, update_running_average="no"
        ),
    ),
    "an update of nnx that is no flag": (
        TypeError,
        "update_running_average is 'no'; expected True or False",
        lambda: nnx.Norm(6, EVONORM_B0, rngs=fnnx.Rngs(0))(X, update_running_average="no"),
    ),
    "a view of nnx that is no flag": (
        TypeError,
        USE.format("'False'"),
        lambda: fnnx.view(nnx.BatchNorm(6, rngs=fnnx.Rngs(0)), use_running_average="False")(X),
    ),
}

UNNAMED = "axis_index_groups needs one named axis. Got axis_name=None; expected a single name"
ERRORS |= {
    "device groups without an axis": (
        ValueError,
        UNNAMED,
        lambda: norm(X, BN, axis_index_groups=[[0, 1]]),
    ),
    **{
        f"device groups of {library.__name__}.{name}{args} without an axis": (
            ValueError,
            UNNAMED,
            partial(layer, library, name, *args, axis_index_groups=[[0, 1]]),
        )
        for library in (linen, nnx)
        for name, *args in (
            ("BatchNorm",),
            ("LayerNorm",),
            ("Norm", BN),
            ("Norm", methods.filter_response_norm()),
        )
        if not (library is linen and (name == "BatchNorm" or BN in args))
    },
    "device groups of linen.BatchNorm without an axis": (
        ValueError,
        UNNAMED,
        partial(layer, linen, "BatchNorm", call=(True,), axis_index_groups=[[0, 1]]),
    ),
    "groups of no devices": (
        ValueError,
        "size is 0; expected an integer of at least 1",
        lambda: device_groups(8, size=0),
    ),
    "groups of three of eight devices": (
        ValueError,
        r"8 devices do not split into groups of 3\. Expected .*: \[1, 2, 4, 8\]",
        lambda: device_groups(8, size=3),
    ),
}

ROW = r"method is a value of jaxnorm\.methods or a Groups\. Got {}; expected for example methods"
ERRORS |= {
    **{
        f"{count} groups of features": (
            TypeError if count == 2.5 else ValueError,
            f"num_groups is {count}; expected an integer of at least 1",
            partial(methods.batch_group_norm, count),
        )
        for count in (0, -1, 2.5)
    },
    "groups of an evonorm that do not divide": (
        ValueError,
        r"channel axis -1 of x has size 6, which does not split into 32 equal groups.*expected a "
        "divisor of 6: 1, 2, 3, 6",
        lambda: applied(methods.evonorm_s0()),
    ),
    "groups of an evonorm that do not divide, channels first": (
        ValueError,
        "channel axis 1 of x has size 6, which does not split into 4 equal groups.*divisor of 6",
        lambda: methods.evonorm_s0(4).apply(ones(2, 6, 4), {}, train=True, channel_axis=1),
    ),
    "groups of an evonorm in a layer": (
        ValueError,
        "size 6, which does not split into 32 equal groups",
        lambda: layer(linen, "Norm", methods.evonorm_s0()),
    ),
    "half a quantile": (
        TypeError,
        "num_quantiles is 0.5; expected an integer of at least 1",
        lambda: methods.proxy_norm(methods.layer_norm(), num_quantiles=0.5),
    ),
    "a name for the method of a proxy": (
        TypeError,
        r"proxy_norm\(method\) takes a row of the table\. Got 'layer'; expected for example",
        lambda: methods.proxy_norm("layer"),
    ),
    "a rule for the method of a proxy": (
        TypeError,
        r"proxy_norm\(method\) takes a row of the table\. Got evonorm_s0\(\)",
        lambda: methods.proxy_norm(methods.evonorm_s0()),
    ),
    "a method that was not called": (
        TypeError,
        ROW.format("<function layer_norm at .*>"),
        lambda: layer(linen, "Norm", methods.layer_norm),
    ),
    "a rule that was not called": (
        TypeError,
        ROW.format("<class .*batch_renorm'>"),
        lambda: layer(nnx, "Norm", methods.batch_renorm),
    ),
    "a name for a method of nnx": (
        TypeError,
        ROW.format("'layer'"),
        lambda: layer(nnx, "Norm", "layer"),
    ),
}

ERRORS |= {
    "a rule where statistics are asked for": (
        TypeError,
        r"batch_renorm\(\) has a rule of its own.*call its apply",
        lambda: norm(X, methods.batch_renorm()),
    ),
    "a hyperparameter that is an array": (
        TypeError,
        r"batch_renorm\(rmax=\.\.\.\) is an array of shape \(\)\..*Give what changes or is "
        "traced to apply",
        lambda: methods.batch_renorm(rmax=jnp.float32(2)),
    ),
    "a hyperparameter that is a function": (
        TypeError,
        r"evonorm_b0\(momentum=\.\.\.\) is <function",
        lambda: methods.evonorm_b0(momentum=lambda step: 0.9),
    ),
    "an option of another method": (
        TypeError,
        "batch_renorm got an unexpected option domain. Expected some of rmax, dmax, momentum",
        lambda: applied(methods.batch_renorm(), domain=1),
    ),
    "an epsilon at apply": (
        TypeError,
        "batch_renorm got an unexpected option epsilon",
        lambda: applied(methods.batch_renorm(), epsilon=1e-3),
    ),
    "an option that is missing": (
        TypeError,
        "domain_batch_norm needs domain",
        lambda: applied(DOMAIN),
    ),
    "complex x of a rule": (
        TypeError,
        "evonorm_b0 is defined for real x. Got complex64",
        lambda: EVONORM_B0.apply(ones(8, 6, dtype="c8"), EVONORM_B0.init((8, 6)), train=True),
    ),
    "state of another method": (
        ValueError,
        r"batch_renorm got a state with mean of shape \(6,\), var of shape \(6,\)\. Expected its "
        r"own state, a dict with mean of shape \(6,\), std of shape \(6,\), as its init makes it "
        r"for x of shape \(8, 4, 4, 6\): state belongs to one method and number of channels",
        lambda: methods.batch_renorm().apply(X, BN.init(NHWC), train=True),
    ),
    "state of a method without": (
        ValueError,
        r"evonorm_s0 got a state with var of shape \(6,\)\. Expected its own state, \{\}",
        lambda: methods.evonorm_s0(2).apply(X, EVONORM_B0.init(NHWC), train=True),
    ),
    "moments as state": (
        TypeError,
        r"Row got a Moments. Expected its own state, a dict with mean of shape \(6,\), var",
        lambda: BN.apply(X, init_running((6,)), train=True),
    ),
    "an example's weight in training": (
        ValueError,
        r"example_weight=0.5 weighs an example against running statistics\. Got train=True",
        lambda: applied(BN, example_weight=0.5),
    ),
    "a parameter that the method does not have": (
        ValueError,
        r"slope was given to filter_response_norm\(\), which has none\. Expected use_slope=True",
        lambda: applied(methods.filter_response_norm(), slope=ones(6)),
    ),
    "an option of another method, linen": (
        TypeError,
        r"a layer with evonorm_b0\(\) got an unexpected option domain. Expected some of mask",
        lambda: linen.Norm(EVONORM_B0).init(jax.random.key(0), X, False, domain=1),
    ),
    "an option of another method, nnx": (
        TypeError,
        r"a layer with evonorm_b0\(\) got an unexpected option domain. Expected some of .*momentum",
        lambda: nnx.Norm(6, EVONORM_B0, rngs=fnnx.Rngs(0))(X, domain=1),
    ),
    "initializers of what is not learned": (
        ValueError,
        r"inits has tau, which evonorm_b0\(\) does not learn\. Expected some of v",
        lambda: nnx.Norm(6, EVONORM_B0, inits={"tau": jnp.ones}, rngs=fnnx.Rngs(0)),
    ),
    "a layer in front of a method that does not work on it": (
        ValueError,
        r"layer=\.\.\. was given for evonorm_b0\(\), which does nothing with the layer in front",
        lambda: nnx.Norm(
            6, EVONORM_B0, layer=fnnx.Linear(6, 6, rngs=fnnx.Rngs(0)), rngs=fnnx.Rngs(0)
        ),
    ),
}

DISAGREE = r"{0}\.mean has shape \(1, 6\) and {0}\.var \(1,\)\. Expected one shape"
ERRORS |= {
    "a variance of another rank": (
        ValueError,
        DISAGREE.format("m"),
        lambda: normalize(ones(8, 6), Moments(ones(1, 6), ones(1, 6), ones(1))),
    ),
    "a variance that would broadcast": (
        ValueError,
        r"m\.mean has shape \(1, 6\) and m\.var \(1, 1\)",
        lambda: normalize(ones(8, 6), Moments(ones(1, 6), ones(1, 6), ones(1, 1))),
    ),
    "one running variance to fold": (
        ValueError,
        r"running\.mean has shape \(6,\) and running\.var \(1,\)",
        lambda: folding.fold(ones(3, 6), None, Moments(None, ones(6), ones(1))),
    ),
    "a path along the gradient without steps": (
        ValueError,
        r"steps has shape \(\)\. Expected \(K,\)",
        lambda: probe.along_gradient(jnp.sum, ones(3), steps=0.1),
    ),
    "a step up the gradient": (
        ValueError,
        r"steps is \[ 0\.1 -0\.1\]; expected .* above 0",
        lambda: probe.along_gradient(jnp.sum, ones(3), steps=jnp.array([0.1, -0.1])),
    ),
    "integer parameters to differentiate by": (
        TypeError,
        r"params has int32 of shape \(\) at 'b'\. Expected floating or complex",
        lambda: probe.along_gradient(lambda p: p["a"], {"a": ones(), "b": 3}, steps=[0.1]),
    ),
    "no parameters to differentiate by": (
        ValueError,
        r"params has no arrays\. Got \{\}; expected a tree",
        lambda: probe.along_gradient(lambda p: 0.0, {}, steps=[0.1]),
    ),
    "gradients of different trees": (
        ValueError,
        r"before and after are trees of different arrays\. Got .*\(3,\).*\(4,\)",
        lambda: probe.gradient_change({"a": ones(3)}, {"a": ones(4)}),
    ),
    "layers of integers": (
        TypeError,
        r"tree has int32 of shape \(2,\) at 'a'",
        lambda: probe.l2_by_layer({"a": ones(2, dtype="i4")}),
    ),
    "weights whose channels do not split": (
        ValueError,
        r"params has an array of shape \(3, 6\) at 'kernel'\. Its last axis does not split into "
        r"num_groups=4 equal",
        lambda: probe.effective_learning_rates(
            {"kernel": ones(3, 6)}, learning_rate=0.1, num_groups=4
        ),
    ),
    "no groups of weights": (
        ValueError,
        "num_groups is 0; expected EACH or an integer of at least 1",
        lambda: probe.effective_learning_rates(ones(3), learning_rate=0.1, num_groups=0),
    ),
    "a negative learning rate": (
        ValueError,
        "learning_rate is -0.1; expected a number of at least 0",
        lambda: probe.effective_learning_rates(ones(3), learning_rate=-0.1),
    ),
    "noise of a negative deviation": (
        ValueError,
        "std is -1.0; expected a number of at least 0",
        lambda: probe.noise(jax.random.key(0), ones(4, 6), BN, std=-1.0),
    ),
    "noise for integers": (
        TypeError,
        "x must be floating or complex. Got int32",
        lambda: probe.noise(jax.random.key(0), ones(4, 6, dtype="i4"), BN),
    ),
    "one strength of a disturbance": (
        ValueError,
        r"strengths has shape \(\)\. Expected \(K,\)",
        lambda: probe.sensitivity(lambda s: s, strengths=0.1),
    ),
    "outputs whose shape depends on the strength": (
        ValueError,
        r"forward\(0\) and forward\(strength\) are trees of different arrays",
        lambda: probe.sensitivity(lambda s: ones(1 if s == 0 else 2), strengths=[0.1]),
    ),
    "the spread of one batch": (
        ValueError,
        r"batches has moments of shape \(1, 6\)\. Expected those of two or more batches",
        lambda: probe.statistics_spread(given(1, 6)),
    ),
    "the spread of arrays": (
        TypeError,
        "batches must be Moments",
        lambda: probe.statistics_spread(ones(2, 6)),
    ),
    "a population of another shape": (
        ValueError,
        r"population has moments of shape \(6,\)\. Expected .*\(1, 6\)",
        lambda: probe.statistics_spread(given(2, 1, 6), population=given(6)),
    ),
    "the range of one element": (
        ValueError,
        "count is 1; expected a number above 1",
        lambda: probe.range_excess(ones(4, 6), given(1, 6), count=1),
    ),
    "examples that are channels": (
        ValueError,
        r"batch_axis=0 and channel_axis=-2 are one axis of x of shape \(4, 6\)",
        lambda: probe.channel_power(ones(4, 6), channel_axis=-2),
    ),
    "the power of integers": (
        TypeError,
        "x must be floating or complex. Got int32",
        lambda: probe.channel_power(ones(4, 6, dtype="i4")),
    ),
    "a model without norms to record, linen": (
        ValueError,
        "forward called none of the layers that are looked for. Expected one of Norm, BatchNorm",
        lambda: linen.record_norms(lambda: 3)(),
    ),
    "a model without norms to record, nnx": (
        ValueError,
        "forward called none of the layers that are looked for",
        lambda: nnx.record_norms(lambda m: 3)(fnnx.Linear(1, 1, rngs=fnnx.Rngs(0))),
    ),
    "no model to record": (
        TypeError,
        r"the first argument is ArrayImpl; expected the nnx\.Module",
        lambda: nnx.record_norms(lambda x: x)(ones(3)),
    ),
    "layers to record by name": (
        TypeError,
        "layers is 'BatchNorm'; expected a class of layers or a tuple",
        lambda: linen.record_norms(lambda: 3, layers="BatchNorm"),
    ),
    "an altered output of another dtype": (
        ValueError,
        r"alter returned bfloat16 of shape \(4, 6\) for the output of ''\. Expected float32",
        lambda: nnx.alter_norms(lambda m, x: m(x), lambda path, y: y.astype("bfloat16"))(
            nnx.LayerNorm(6, rngs=fnnx.Rngs(0)), ones(4, 6)
        ),
    ),
    "a dict to fold": (
        TypeError,
        "running must be Moments.* Got dict",
        lambda: folding.fold(ones(3, 6), None, {"mean": ones(6), "var": ones(6)}),
    ),
    "a scale of other channels to fold": (
        ValueError,
        r"scale has shape \(4,\)\. Expected \(6,\), one number for each output channel",
        lambda: FOLD(scale=ones(4)),
    ),
    "a bias of another rank to fold": (
        ValueError,
        r"bias has shape \(1, 6\)\. Expected \(6,\)",
        lambda: folding.fold(ones(3, 6), ones(1, 6), init_running((6,))),
    ),
    "a configuration of another type": (
        TypeError,
        r"a configuration is text or a dict\. Got list, \['group_norm', 4\]; expected for example",
        lambda: methods.from_config(["group_norm", 4]),
    ),
    "a method by a wrong name": (
        ValueError,
        r"configuration 'GroupNorm:4' cannot be read: 'GroupNorm' is no method; the nearest are "
        r"group_norm, .*\. Expected one of batch_and_group_norm, ",
        lambda: methods.from_config("GroupNorm:4"),
    ),
    "a field by a wrong name": (
        ValueError,
        r"batch_renorm has no 'r_max'; the nearest are rmax, dmax.* Expected rmax, dmax, momentum",
        lambda: methods.from_config("batch_renorm:r_max=3"),
    ),
    "a field of a row by a wrong name, in a dict": (
        ValueError,
        r"\{'name': 'batch_norm', 'eps': 0\} cannot be read: batch_norm has no 'eps'; the nearest "
        r"are epsilon\. Expected epsilon, momentum, correction",
        lambda: methods.from_config({"name": "batch_norm", "eps": 0}),
    ),
    "a nested field by a wrong name": (
        ValueError,
        r"group_norm has no 'groups'; the nearest are num_groups, .*Expected num_groups, group_s",
        lambda: methods.from_config({"name": "proxy_norm", "method": "group_norm:groups=4"}),
    ),
    "a configuration without its number": (
        ValueError,
        r"missing a required argument: 'num_domains' for domain_batch_norm\. Expected "
        r"domain_batch_norm\(num_domains, momentum=0.99, epsilon=1e-05\)",
        lambda: methods.from_config("domain_batch_norm"),
    ),
    "a configuration with too many numbers": (
        ValueError,
        r"too many positional arguments for group_norm\. Expected group_norm\(num_groups=None, ",
        lambda: methods.from_config("group_norm:4,5"),
    ),
    "a configuration with a number twice": (
        ValueError,
        "an argument of group_norm is there twice or has no name. Expected each once",
        lambda: methods.from_config("group_norm:num_groups=4,num_groups=5"),
    ),
    "a configuration of no form": (
        ValueError,
        r"'group_norm\(4' cannot be read: it is no name with arguments\. Expected name:argument,",
        lambda: methods.from_config("group_norm(4"),
    ),
    "a configuration as deep as the parser": (
        ValueError,
        r"\(\(\(\.\.\. cannot be read: it is no name with arguments",
        lambda: methods.from_config("(" * 5000),
    ),
    "a configuration to be evaluated": (
        ValueError,
        r"'2 \* 16' is no literal\. Expected numbers, strings in quotes, True, False, None, tuples",
        lambda: methods.from_config("group_norm:2*16"),
    ),
    "a string without quotes": (
        ValueError,
        "'pooled' is no method. Expected one of",
        lambda: methods.from_config("batch_norm:ghost_update=pooled"),
    ),
    "a configuration of no method": (
        ValueError,
        r"'Size:4' cannot be read: Size\(4\) is no method\. Expected the name of one",
        lambda: methods.from_config("Size:4"),
    ),
    "a dict without a name": (
        ValueError,
        r"its keys are 'type'\. Expected the key 'name' with the name of a method",
        lambda: methods.from_config({"type": "group_norm"}),
    ),
    "a value that its method refuses": (
        ValueError,
        r"'batch_norm:momentum=2' cannot be read: momentum is 2; expected a number of at least 0",
        lambda: methods.from_config("batch_norm:momentum=2"),
    ),
    "norms replaced by a name": (
        TypeError,
        r"method is a value of jaxnorm.methods or a Groups\. Got 'group_norm'",
        lambda: nnx.replace_norms(
            nnx.LayerNorm(6, rngs=fnnx.Rngs(0)), "group_norm", rngs=fnnx.Rngs(0)
        ),
    ),
    "norms replaced by a name in linen": (
        TypeError,
        r"method is a value of jaxnorm.methods or a Groups\. Got 'group_norm'",
        lambda: linen.replace_norms("group_norm").__enter__(),
    ),
    "norms replaced where there are none": (
        ValueError,
        "there is nothing to replace in the model. Expected one of Layer, BatchNorm, GroupNorm",
        lambda: nnx.replace_norms(fnnx.Linear(6, 6, rngs=fnnx.Rngs(0)), BN, rngs=fnnx.Rngs(0)),
    ),
    "norms of a function replaced": (
        TypeError,
        "model is function; expected an nnx.Module",
        lambda: nnx.replace_norms(lambda x: x, BN, rngs=fnnx.Rngs(0)),
    ),
    "norms replaced by groups that do not divide": (
        ValueError,
        r"layers cannot be replaced, and nothing was: LayerNorm at '' has 6 channels, which do not "
        r"split as Row\(.*\) says\. Expected a method that does what the model expects",
        lambda: nnx.replace_norms(
            nnx.LayerNorm(6, rngs=fnnx.Rngs(0)), methods.group_norm(4), rngs=fnnx.Rngs(0)
        ),
    ),
    "a table without norms": (
        ValueError,
        "the model calls no normalization. Expected one of Layer, BatchNorm, GroupNorm",
        lambda: nnx.tabulate_norms(fnnx.Linear(6, 6, rngs=fnnx.Rngs(0)), X),
    ),
    "a configuration of what is no method": (
        TypeError,
        r"method is a value of jaxnorm.methods or a Groups\. Got 'group_norm:4'",
        lambda: methods.to_config("group_norm:4"),
    ),
}


# arrays of other libraries
OF_TORCH = {"running_mean": np.ones(3), "running_var": np.ones(3)}
EMA = {"average": np.ones(3), "counter": 1}
RENORM = {f"moving_{name}": np.ones(3) for name in ("mean", "variance", "stddev")}
TREE = {"params": {"Dense_0": {"kernel": np.ones((2, 3))}}}

ERRORS |= {
    "names that torch does not have": (
        ValueError,
        "from_torch got the unknown name gamma; the unknown name scale; arrays of different "
        r"shapes, bias \(2,\), weight \(3,\)\. Expected the arrays of one layer, of one shape "
        "and with names among weight, bias, running_mean.*a whole model is for load_model",
        lambda: convert.from_torch(
            {"gamma": 1.0, "scale": 1.0, "weight": np.ones(3), "bias": np.ones(2)}
        ),
    ),
    "half of the statistics of torch": (
        ValueError,
        "from_torch got running_mean without running_var",
        lambda: convert.from_torch({"running_mean": np.ones(3)}),
    ),
    "standard deviations for torch": (
        ValueError,
        r"to_torch got the unknown name std; mean without var\. Expected .* among scale, bias",
        lambda: convert.to_torch({}, methods.batch_renorm().init(NHWC)),
    ),
    "averages of haiku without their decay": (
        ValueError,
        "from_haiku got decay_rate=None for a layer with running statistics. Expected the "
        "decay_rate of the layer",
        lambda: convert.from_haiku({"mean_ema": EMA, "var_ema": EMA}),
    ),
    "a decay of one": (
        ValueError,
        "to_haiku got decay_rate=1, with which an average never moves",
        lambda: convert.to_haiku({}, BN.init(NHWC), decay_rate=1.0),
    ),
    "averages of haiku of two layers": (
        ValueError,
        "from_haiku got averages after 1 and 2 calls. Expected those of one layer",
        lambda: convert.from_haiku(
            {"mean_ema": EMA, "var_ema": EMA | {"counter": 2}}, decay_rate=0.9
        ),
    ),
    "a count that differs between channels": (
        ValueError,
        "to_equinox got a count that differs between channels, from 0.5 to 1.0.*Expected one "
        "number",
        lambda: convert.to_equinox(
            {}, {"mean": np.ones(2), "var": np.ones(2), "count": np.array([0.5, 1.0])}
        ),
    ),
    "two pairs of averages for equinox": (
        ValueError,
        "to_equinox got averages for training that are not those for inference. Expected equal",
        lambda: convert.to_equinox(
            {}, methods.momentum_batch_norm().init(NHWC) | {"mean": ones(6)}
        ),
    ),
    "two pairs of averages of keras": (
        ValueError,
        "from_keras got renorm_mean and renorm_stddev that are not moving_mean and moving_stddev. "
        "Expected equal ones",
        lambda: convert.from_keras(
            RENORM | {"renorm_mean": np.zeros(3), "renorm_stddev": np.ones(3)}
        ),
    ),
    "a layer that no library has": (
        ValueError,
        r"no layer 'torch.nn.BatchNorm' is known\. Did you mean torch.BatchNorm\dd or .*\? "
        "Expected one of torch.BatchNorm1d",
        lambda: convert.settings("torch.nn.BatchNorm"),
    ),
    "arguments of another library": (
        TypeError,
        "torch.BatchNorm2d has no argument epsilon, decay that is known here. Expected some of "
        "eps, momentum, affine",
        lambda: convert.settings("torch.nn.BatchNorm2d", epsilon=1e-3, decay=0.9),
    ),
    "a layer without what it needs": (
        TypeError,
        "haiku.BatchNorm needs create_scale, create_offset, decay_rate. Expected some of",
        lambda: convert.settings("haiku.BatchNorm"),
    ),
    "axes of a layer norm that mean another thing for each rank": (
        ValueError,
        r"no such method here\. Got axis=\(1, 2\); expected -1, or all axes but the first",
        lambda: convert.settings(
            "haiku.LayerNorm", axis=(1, 2), create_scale=True, create_offset=True
        ),
    ),
    "a clipping that keras alone has": (
        ValueError,
        r"Got renorm_clipping=\{'rmax': 3\}; expected rmin=1/rmax, or neither",
        lambda: convert.settings(
            "keras.layers.BatchNormalization", renorm=True, renorm_clipping={"rmax": 3}
        ),
    ),
    "a library that is not known": (
        ValueError,
        "library is one of 'torch', 'haiku', 'equinox', 'keras', 'sbx', 'flax'. Got 'tensorflow'",
        lambda: convert.load_model(TREE, {}, {}, library="tensorflow"),
    ),
    "a model whose names do not fit": (
        ValueError,
        "load_model found 3 mismatches between the tree and torch:\n  Dense_0 has no name\n  fc is "
        "in names and not in the tree\n  fc.weight is not used\nExpected a name for each",
        lambda: convert.load_model(TREE, {"fc.weight": np.ones((3, 2))}, {"fc": "fc"}),
    ),
    "a model of other shapes": (
        ValueError,
        r"Dense_0/kernel has shape \(2, 3\) here and \(5, 4\) from 'fc'",
        lambda: convert.load_model(TREE, {"fc.weight": np.ones((4, 5))}, {"Dense_0": "fc"}),
    ),
}


@pytest.mark.parametrize("error, message, call", ERRORS.values(), ids=ERRORS.keys())
def test_errors(error, message, call):
    with pytest.raises(error, match="(?s)" + message):
        call()


def test_flags_are_booleans_of_any_kind():
    """Of Python, NumPy and JAX; a traced one is JAX's to refuse."""
    for yes, no in ((True, False), (np.True_, np.False_), (jnp.array(True), jnp.array(False))):
        ours, theirs = (applied(PIECES, train=flag)[1]["mean"] for flag in (yes, no))
        assert (ours != theirs).all()
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(lambda train: applied(PIECES, train=train))(True)


def test_what_is_traced_is_not_looked_at():
    """Under jit and derivatives the same calls compile, and compute what they are asked to."""

    def f(epsilon, weights):
        return norm(X, BN, epsilon=epsilon, weights=weights)[0]

    assert np.isnan(jax.jit(f)(-1.0, ones(6))).all()
    assert jnp.isfinite(jax.grad(lambda w: f(1e-3, w).sum())(-ones(6))).all()
    with pytest.raises(ValueError, match=r"epsilon has shape \(6,\)"):
        jax.jit(f)(ones(6), ones(6))


@pytest.mark.parametrize("groups", (None, ((0,), (1,))), ids=("", "device groups"))
def test_an_axis_of_vmap_in_a_checked_shard_map(groups):
    """JAX's own sum fails there by an assertion without words; without the check it is right."""
    x = np.random.default_rng(0).normal(size=(4, 2, 5, 6)).astype("f4")
    mesh = Mesh(np.array(jax.devices()[:2]), ("device",), axis_types=(AxisType.Auto,))
    options = {"axis_name": "part", "axis_index_groups": groups}

    def mapped(f, check):
        f = jax.vmap(jax.vmap(f, axis_name="part"))
        return jax.jit(
            jax.shard_map(
                f, mesh=mesh, in_specs=P("device"), out_specs=P("device"), check_vma=check
            )
        )

    def f(x):
        return norm(x, BN, epsilon=0.0, **options)[0]

    whole = (1, 2) if groups is None else 2
    want = (x - x.mean(whole, keepdims=True)) / x.std(whole, keepdims=True)
    np.testing.assert_allclose(mapped(f, False)(x), want, atol=1e-4)
    try:
        mapped(lambda x: jax.lax.psum(x, "part"), True)(x)
    except AssertionError:
        message = "JAX has no sum over 'part', an axis of vmap, inside shard_map.check_vma=True"
        with pytest.raises(NotImplementedError, match=message):
            mapped(f, True)(x)
    else:  # a JAX that has mended it
        np.testing.assert_allclose(mapped(f, True)(x), want, atol=1e-4)


def test_nothing_is_refused_without_need():
    """What looks like the cases above and is right."""
    assert Groups(spatial=[1, 2]).spatial == (1, 2)
    assert hash(Groups(spatial=[1, 2])) == hash(Groups(spatial=(1, 2)))
    x = ones(*NHWC)
    assert norm(x, BN, scale=ones(8, 6))[0].shape == NHWC
    assert norm(x, (8, 1, 1, 1), scale=ones(4, 6), channel_axis=(1, 3))[0].shape == NHWC
    for shape in ((1, 1, 1, 6), (8, 1, 4, 1), (1, 1, 1, 1), NHWC):
        assert norm(x, BN, scale=ones(*shape), bias=ones(*shape))[0].shape == NHWC
    assert norm(ones(8, 6), BN, scale=ones(8, 1), bias=ones(1, 6))[0].shape == (8, 6)
    assert norm(x, BN, mean=0.0)[1].mean.shape == (1, 1, 1, 6)
    assert norm(ones(8, 6), methods.layer_norm(), weights=True)[0].shape == (8, 6)
    assert norm(np.ones((8, 6), "f4"), list((8, 1)), scale=np.ones(6, "i4"))[0].dtype == "f4"


def test_negative_weights_in_a_list_are_refused_under_jit():
    x = jnp.arange(8.0).reshape(4, 2)
    weighed = jax.jit(lambda x, w: norm(x, BN, weights=[[1.0], [1.0], [1.0], [w]])[0])
    assert jnp.isfinite(weighed(x, 0.5)).all()
    with pytest.raises(ValueError, match=NEGATIVE):
        jax.jit(lambda x: norm(x, BN, weights=[[1.0], [1.0], [1.0], [-1.0]])[0])(x)


@pytest.mark.parametrize("flag", [0, np.False_, np.int32(0), False])
def test_flags_are_what_flax_takes(flag):
    x = X + jnp.arange(len(X), dtype=X.dtype).reshape(-1, *(1,) * (X.ndim - 1))
    layer_of_linen = linen.BatchNorm()
    variables = layer_of_linen.init(jax.random.key(0), x, use_running_average=True)
    y, _ = layer_of_linen.apply(variables, x, use_running_average=flag, mutable=["batch_stats"])
    expected, _ = layer_of_linen.apply(
        variables, x, use_running_average=False, mutable=["batch_stats"]
    )
    np.testing.assert_array_equal(y, expected)
