"""Every error at the door says what is wrong, what it got, what it expects and what to do."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm import (
    EACH,
    Groups,
    Method,
    Moments,
    Size,
    blend,
    init_running,
    merge,
    methods,
    moments,
    norm,
    normalize,
    pool,
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
        r"channel axis -1 of x has size 30, which does not split into 32 equal groups\. Got x of"
        r" shape \(64, 8, 8, 30\) and "
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
        r"batch axis 0 of x has size 50, which does not split into 16 equal groups\..*short last"
        r" batch.*drop it, or pad it to "
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
            r"spatial=\(1, 2, 3\) names 3 spatial axes\. Got x of shape \(8, 4, 4, 6\), which has"
            r" 2; expected one value for each"
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
        "Got 0; expected an integer of at least 1",
        lambda: Size(0),
    ),
    "one axis for batch and channels": (
        ValueError,
        (
            "batch_axis and channel_axis are both axis 0.*Expected two different axes; x needs a"
            " rank of 2 or more"
        ),
        lambda: Groups().shape((8,)),
    ),
    "an axis that is not there": (
        ValueError,
        (
            r"axis 4 is not an axis of x\. Got x of shape \(8, 4, 4, 6\); expected an integer from"
            r" -4 to 3"
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
            r"Groups has one number for the channels, but channel_axis=\(1, 3\) names 2"
            r" axes.*statistic's shape as a tuple"
        ),
        lambda: norm(ones(*NHWC), BN, channel_axis=(1, 3)),
    ),
    "a statistic of another rank": (
        ValueError,
        (
            r"groups of shape \(1, 6\) does not fit x of shape \(8, 4, 4, 6\)\. Expected the same"
            r" rank, with each size a divisor"
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
            r"groups is a Groups, a Method or the statistic's shape\. Got 32; expected for"
            r" example.*group_norm\(32\)"
        ),
        lambda: norm(ones(*NHWC), 32),
    ),
    "a name for groups": (TypeError, "Got 'batch'", lambda: norm(ones(*NHWC), "batch")),
    "a method of no groups": (
        TypeError,
        r"Method\(groups\) takes a Groups\. Got 3; expected Groups",
        lambda: Method(3),
    ),
    "another fixed mean": (
        ValueError,
        (
            "mean is None .* or 0 .* Got 1.5. To compute sums about a value near the mean.* pass it"
            " as center"
        ),
        lambda: moments(ones(*NHWC), BN, mean=1.5),
    ),
    "a fixed mean of a method": (
        ValueError,
        "mean is None .* Got False",
        lambda: Method(Groups(), mean=False),
    ),
    "integers": (
        TypeError,
        (
            r"x must be floating or complex\. Got int32, shape \(8, 6\); convert it, for example"
            r" x\.astype"
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
        r"weights of shape \(8,\) do not broadcast against x of shape \(8, 4, 4, 6\)\. Expected"
        r" sizes of 1 or "
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
            r"center of shape \(6,\) does not fit statistics of shape \(1, 1, 1, 6\)\. Expected"
            r" that shape"
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
        r"bias has shape \(5,\).*has size 6\. Expected \(6,\), or \(8, 6\) per example",
        lambda: norm(ones(*NHWC), BN, bias=ones(5)),
    ),
    "a scale of the right size for another axis": (
        ValueError,
        r"Axis 2 has that size: pass channel_axis=2",
        lambda: norm(ones(8, 3, 5, 6), BN, scale=ones(5)),
    ),
    "a scale that would broadcast": (
        ValueError,
        r"scale has shape \(1, 1, 1, 6\)",
        lambda: norm(ones(*NHWC), BN, scale=ones(1, 1, 1, 6)),
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
        r"m\.var of shape \(6,\)",
        lambda: normalize(ones(8, 6), init_running((6,))),
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
            r"18 groups of x of shape \(8, 4, 6, 6\) are not whole parts of every channel\."
            r" Expected a divisor of the 6 channels"
        ),
        lambda: methods.batch_group_norm(18, (8, 4, 6, 6)),
    ),
    "pieces across rows and columns": (
        ValueError,
        "36 groups .* not whole parts",
        lambda: methods.batch_group_norm(36, (8, 4, 4, 6)),
    ),
    "pieces across channels": (
        ValueError,
        "not whole parts",
        lambda: methods.batch_group_norm(9, (8, 4, 4, 6)),
    ),
    "pieces of vectors": (
        ValueError,
        "12 groups .* not whole parts",
        lambda: methods.batch_group_norm(12, (8, 6)),
    ),
    "pieces without a shape": (
        ValueError,
        "does not split into 12",
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
        r"state is a dict; expected Moments\(None, d\['mean'\], d\['var'\]\)",
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
        r"state has a mean of shape \(6,\) and a var of shape \(1,\)\. Expected .* equal shapes",
        lambda: update_running(Moments(None, ones(6), ones(1)), given(1, 6)),
    ),
    "a var of another shape that serves": (
        ValueError,
        r"state has a mean of shape \(6,\) and a var of shape \(1,\)",
        lambda: running_moments(Moments(None, ones(6), ones(1)), BN, (8, 6)),
    ),
    "a batch's var of another shape than its mean": (
        ValueError,
        r"m has a mean of shape \(1, 6\) and a var of shape \(1,\)",
        lambda: update_running(init_running((6,)), Moments(ones(1, 6), ones(1, 6), ones(1))),
    ),
    "running statistics as a batch's": (
        ValueError,
        r"m has no count\. Expected a batch's moments",
        lambda: update_running(init_running((6,)), init_running((6,))),
    ),
    "a cumulative average without count": (
        ValueError,
        r"needs a count\. Got a state without one; make it by init_running\(counted=True\)",
        lambda: update_cumulative(init_running((6,)), given(1, 6)),
    ),
}


@pytest.mark.parametrize("error, message, call", ERRORS.values(), ids=ERRORS.keys())
def test_errors(error, message, call):
    with pytest.raises(error, match="(?s)" + message):
        call()


def test_nothing_is_refused_without_need():
    """What looks like the cases above and is right."""
    assert Groups(spatial=[1, 2]).spatial == (1, 2)
    assert hash(Groups(spatial=[1, 2])) == hash(Groups(spatial=(1, 2)))
    x = ones(*NHWC)
    assert norm(x, BN, scale=ones(8, 6))[0].shape == NHWC
    assert norm(x, (8, 1, 1, 1), scale=ones(4, 6), channel_axis=(1, 3))[0].shape == NHWC
    assert norm(x, BN, mean=0.0)[1].mean.shape == (1, 1, 1, 6)
    assert norm(ones(8, 6), methods.layer_norm(), weights=True)[0].shape == (8, 6)
    assert norm(np.ones((8, 6), "f4"), list((8, 1)), scale=np.ones(6, "i4"))[0].dtype == "f4"
