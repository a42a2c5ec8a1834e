"""Normalization layers of PyTorch."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import jaxnorm.methods as methods
from jaxnorm.convert._arrays import Layer, ours, renamed, split
from jaxnorm.convert._registry import Settings, Shape, last_axes, made, over, rms_over, settings_of

NAMES = {
    "weight": "scale",
    "bias": "bias",
    "running_mean": "mean",
    "running_var": "var",
    "num_batches_tracked": "calls",
}
TOGETHER = (("running_mean", "running_var"),)


def from_torch(arrays: Mapping[str, Any], *, momentum: float | None = 0.1) -> Layer:
    """A normalization layer's part of a PyTorch state dict as parameters and state.

    The layers are `BatchNorm1d` to `3d`, `SyncBatchNorm`, `InstanceNorm1d` to `3d`, `GroupNorm`,
    `LayerNorm` and `RMSNorm`, with and without parameters and running statistics. Every array is
    copied as it is. PyTorch stores the unbiased variance: so does training that goes on here with
    `correction=1`, which `settings` sets.

    Args:
        arrays: by PyTorch's names, without the layer's own: `weight`, `bias`, `running_mean`,
            `running_var`, `num_batches_tracked`; tensors, of bfloat16 too, or NumPy arrays.
        momentum: of the PyTorch layer. With None it averages cumulatively: the state then has a
            count, `batches`, with which layers and methods here do the same.

    Returns:
        `Layer(params, state)`. `num_batches_tracked` becomes `calls` in the state, which counts
        updates and changes nothing else.

    Raises:
        ValueError: unknown or missing names, arrays of different shapes: all in one message.

    Example:
        >>> arrays = {
        ...     "weight": np.ones(2, "f4"), "bias": np.zeros(2, "f4"),
        ...     "running_mean": np.array([3, 5], "f4"), "running_var": np.array([4, 9], "f4"),
        ...     "num_batches_tracked": np.array(7),
        ... }
        >>> params, state = from_torch(arrays)
        >>> sorted(params), state["mean"].tolist(), int(state["calls"])
        (['bias', 'scale'], [3.0, 5.0], 7)

    Reference:
        PyTorch's modules; no paper is followed.
    """
    found = renamed(
        arrays, NAMES, "from_torch", together=TOGETHER, scalars=("num_batches_tracked",)
    )
    if "calls" in found:
        calls = found["calls"] = found["calls"].astype(np.int32)
        if momentum is None and "mean" in found:
            found["batches"] = np.full(found["var"].shape, calls, np.float32)
    return split(found)


def to_torch(params: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: a layer's part of a PyTorch state dict.

    `torch.from_numpy` makes tensors of it, and `torch.from_dlpack(jnp.asarray(t))` where t is
    bfloat16, which NumPy alone does not know.

    Args:
        params: `scale` and `bias`, or what there is of them.
        state: `mean` and `var`; `calls` becomes `num_batches_tracked`. A `count` of a debiased
            average has no place there and is left out: PyTorch goes on with the average itself.

    Returns:
        Arrays by PyTorch's names. Without `calls` there is no `num_batches_tracked`, which
        `load_state_dict` then leaves as it is.

    Raises:
        ValueError: what PyTorch has no place for, arrays of different shapes.

    Example:
        >>> arrays = to_torch({"scale": np.ones(2)}, {"mean": np.zeros(2), "var": np.ones(2)})
        >>> sorted(arrays)
        ['running_mean', 'running_var', 'weight']

    Reference:
        See `from_torch`.
    """
    names = {name: theirs for theirs, name in NAMES.items()}
    found = ours(params, state, (*names, "count", "batches"), "to_torch")
    if "calls" in found:
        found["calls"] = found["calls"].astype(np.int64)
    return {names[name]: t for name, t in found.items() if name in names}


@settings_of("torch.BatchNorm1d", "torch.BatchNorm2d", "torch.BatchNorm3d", "torch.SyncBatchNorm")
def _batch_norm(
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    track_running_stats: bool = True,
    bias: bool = True,
) -> Settings:
    old = _old(momentum) if track_running_stats else None
    return made(
        methods.batch_norm(epsilon=eps, momentum=old, correction=1), affine, affine and bias
    )


@settings_of("torch.InstanceNorm1d", "torch.InstanceNorm2d", "torch.InstanceNorm3d")
def _instance_norm(
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = False,
    track_running_stats: bool = False,
    bias: bool = True,
) -> Settings:
    row = methods.instance_norm(epsilon=eps)
    if track_running_stats:  # inference uses the average over examples
        row = methods.ghost_batch_norm(
            ghost_size=1,
            ghost_update="averaged",
            epsilon=eps,
            momentum=_old(momentum),
            correction=1,
        )
    return made(row, affine, affine and bias)


def _old(momentum: float | None) -> float:
    """The weight of the old value; where a count moves the average, nothing else does."""
    return 1.0 if momentum is None else 1 - momentum


@settings_of("torch.GroupNorm")
def _group_norm(
    num_groups: int, eps: float = 1e-5, affine: bool = True, bias: bool = True
) -> Settings:
    return made(methods.group_norm(num_groups, epsilon=eps), affine, affine and bias)


@settings_of("torch.LayerNorm")
def _layer_norm(
    normalized_shape: Shape = 1,
    eps: float = 1e-5,
    elementwise_affine: bool = True,
    bias: bool = True,
) -> Settings:
    row = over(last_axes(normalized_shape), eps, "normalized_shape")
    return made(row, elementwise_affine, elementwise_affine and bias)


@settings_of("torch.RMSNorm")
def _rms_norm(
    normalized_shape: Shape = 1,
    eps: float | None = None,
    elementwise_affine: bool = True,
    dtype: Any = None,
) -> Settings:
    if eps is None:  # that of the dtype in which it computes, of half precision in float32
        eps = float(np.finfo(np.float64 if "float64" in str(dtype) else np.float32).eps)
    row = rms_over(last_axes(normalized_shape), eps, "normalized_shape")
    return made(row, elementwise_affine, False)
