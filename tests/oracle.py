"""What the library should return, computed set by set in float64: no reshapes, no JAX, nothing of
the library.

A method is a label of the index, as papers give it: elements with equal labels share statistics.
Values are sums over the elements of one set, and derivatives the closed form on one set.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

Label = Callable[..., tuple]


def set_numbers(
    shape: tuple[int, ...], label: Label, channel_axis: int = -1, batch_axis: int = 0
) -> np.ndarray:
    """For every element the number of its set. `label(n, p, c, N, P, C)` gets indices and sizes, p
    and P as tuples."""
    index = np.indices(shape)
    channel, batch = channel_axis % len(shape), batch_axis % len(shape)
    places = [i for i in range(len(shape)) if i not in (channel, batch)]
    sizes = shape[batch], tuple(shape[i] for i in places), shape[channel]
    labels = label(index[batch], tuple(index[i] for i in places), index[channel], *sizes)
    labels = np.stack([np.broadcast_to(part, shape).ravel() for part in labels])
    return np.unique(labels, axis=1, return_inverse=True)[1].reshape(shape)


def statistic_shape(sets: np.ndarray) -> tuple[int, ...]:
    """How many sets one meets walking along each axis."""
    lines = [
        sets[tuple(slice(None) if i == axis else 0 for i in range(sets.ndim))]
        for axis in range(sets.ndim)
    ]
    return tuple(len(set(line.tolist())) for line in lines)


def at_elements(statistic: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The statistic that serves each element, by its index."""
    index = np.indices(shape)
    return np.asarray(statistic)[
        tuple(i * g // n for i, g, n in zip(index, statistic.shape, shape, strict=True))
    ]


@dataclasses.dataclass
class Normalized:
    """Everything at full size, statistics and their cotangents repeated for the elements of their
    set."""

    count: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    y: np.ndarray
    dx: np.ndarray | None = None
    dw: np.ndarray | None = None
    dscale: np.ndarray | None = None  # before the sum over the elements that share a scale
    dbias: np.ndarray | None = None


def normalized(
    x, sets, *, weights=None, scale=1.0, bias=0.0, epsilon=1e-5, mean=None, gy=None, gm=0.0, gv=0.0
):
    """Statistics, output and, for cotangents gy of y, gm of mean and gv of var, the derivative of
    Re(sum of products).

    With d = x - mean, s^2 = var + epsilon, W = sum w, and g = scale gy,

        A = gm - sum g / s,    B = gv - Re(sum g d) / (2 s^3),
        dx = g / s + w (A + 2 B conj(d)) / W,    dw = (Re(A d) + B (|d|^2 - var)) / W.
    """
    dtype = np.complex128 if np.iscomplexobj(x) else np.float64
    x = np.asarray(x, dtype)
    w = np.broadcast_to(np.asarray(1.0 if weights is None else weights, np.float64), x.shape)
    scale, bias, gm, gv = (np.broadcast_to(np.asarray(t), x.shape) for t in (scale, bias, gm, gv))
    out = Normalized(
        np.zeros(x.shape), np.zeros(x.shape, dtype), np.zeros(x.shape), np.zeros(x.shape, dtype)
    )
    if gy is not None:
        gy = np.asarray(gy, dtype)
        out.dx, out.dw, out.dscale = (
            np.zeros(x.shape, dtype),
            np.zeros(x.shape),
            np.zeros(x.shape, dtype),
        )
        out.dbias = gy.copy()
    for number in np.unique(sets):
        s = sets == number
        known = np.isfinite(x[s]) | (w[s] != 0)  # what does not count may be anything
        xs, ws = np.where(known, x[s], 0), w[s]
        total = ws.sum()
        divisor = total if total > 0 else 1.0
        mu = dtype(0) if mean == 0 else (ws * xs).sum() / divisor
        d = np.where(known, xs - mu, 0)
        v = (ws * abs(d) ** 2).sum() / divisor
        sigma = np.sqrt(v + epsilon)
        out.count[s], out.mean[s], out.var[s] = total, mu, v
        out.y[s] = d / sigma * scale[s] + bias[s]
        if gy is None:
            continue
        g = np.where(known, scale[s] * gy[s], 0)
        a = gm[s][0] - (g / sigma).sum()
        b = gv[s][0] - (g * d).sum().real / (2 * sigma**3)
        a = 0 * a if mean == 0 else a
        out.dx[s] = g / sigma + ws * (a + 2 * b * d.conj()) / divisor
        out.dw[s] = np.where(known, ((a * d).real + b * (abs(d) ** 2 - v)) / divisor, 0)
        out.dscale[s] = gy[s] * d / sigma
    return out


def summed(t: np.ndarray, *axes: int) -> np.ndarray:
    """Sum over all axes but `axes`: the derivative of a scale that has only those."""
    kept = {axis % t.ndim for axis in axes}
    return t.sum(tuple(i for i in range(t.ndim) if i not in kept))
