"""Primitives that JAX does not have, and a checkpoint: what XLA is told beside the formulas.

They leave values as they are, and decide which arrays are stored and which loops are joined.
Measured on XLA:CPU of jaxlib 0.10.2 (time, temporary bytes) and on XLA's compilation for an H200
(bytes that kernels move).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# lax.optimization_barrier, but derivatives pass through and only linear operands are transposed:
# from jax 0.11 on the original fails to transpose when some operands are constants. It gives each
# full-size pass its own alias of x, without which XLA:CPU stores a float32 copy that several passes
# share (bfloat16 forward 2.6-3.4 times slower, step 1.8-2 times).
_barrier = Primitive("jaxnorm_barrier")
_barrier.multiple_results = True
_barrier.def_impl(lambda *ts: list(ts))
_barrier.def_abstract_eval(lambda *ts: list(ts))


def _separated(*ts: jax.Array) -> list[jax.Array]:
    # Without axes of one element, which XLA could not drop any more on the other side: a pass with
    # an array (..., 1) in it takes up to twice as long on a CPU.
    ones = [tuple(i for i, n in enumerate(t.shape) if n == 1) for t in ts]
    ts = lax.optimization_barrier([lax.squeeze(t, axes) for t, axes in zip(ts, ones, strict=True)])
    return [lax.expand_dims(t, axes) for t, axes in zip(ts, ones, strict=True)]


mlir.register_lowering(_barrier, mlir.lower_fun(_separated, multiple_results=True))
ad.primitive_jvps[_barrier] = lambda ts, dts: (_barrier.bind(*ts), list(dts))
batching.primitive_batchers[_barrier] = lambda ts, dims: (_barrier.bind(*ts), dims)


def _transpose(cts: list[Any], *ts: Any) -> list[Any]:
    linear = [ad.is_undefined_primal(t) for t in ts]
    live = [i for i, ct in enumerate(cts) if linear[i] and type(ct) is not ad.Zero]
    out = dict(zip(live, _barrier.bind(*(cts[i] for i in live)), strict=True)) if live else {}
    return [out.get(i, ct) if linear[i] else None for i, ct in enumerate(cts)]


ad.primitive_transposes[_barrier] = _transpose


# Sums of several arrays over one axis in one loop, and the broadcast that is their transpose. A
# reduction of several operands alone is neither linear nor transposed in JAX.
_sums, _broadcasts = Primitive("jaxnorm_sums"), Primitive("jaxnorm_broadcasts")


def _reduced(*ts: jax.Array, axis: int) -> list[jax.Array]:
    count = len(ts)
    if count == 1:  # beside zeros, because XLA makes an ordinary sum of a single operand
        ts = (*ts, *map(jnp.zeros_like, ts))
    zeros = tuple(np.zeros((), t.dtype) for t in ts)
    out = list(lax.reduce(ts, zeros, lambda p, q: tuple(map(lax.add, p, q)), (axis,)))
    if count == 1:
        out = [out[0] + out[1]]
    # XLA would join this sum to the next.
    return lax.optimization_barrier([jnp.expand_dims(t, axis) for t in out])


def _broadcast(*ts: jax.Array, axis: int, size: int) -> list[jax.Array]:
    return [
        lax.broadcast_in_dim(t, (*t.shape[:axis], size, *t.shape[axis + 1 :]), range(t.ndim))
        for t in lax.optimization_barrier(ts)
    ]


def _resized(axis: int, size: int, *ts: Any) -> list[Any]:
    return [t.update(shape=(*t.shape[:axis], size, *t.shape[axis + 1 :])) for t in ts]


def _live(p: Primitive, ts: Sequence[Any], **options: Any) -> list[Any]:
    """p of those that are not known to be 0."""
    live = [i for i, t in enumerate(ts) if type(t) is not ad.Zero]
    out = dict(zip(live, p.bind(*(ts[i] for i in live), **options), strict=True)) if live else {}
    return [out.get(i) for i in range(len(ts))]


def _register(
    p: Primitive, f: Callable[..., Any], sizes: Sequence[str], transpose: Callable[..., Any]
) -> None:
    """p computes f, linear in all arrays and with keywords of these names."""
    p.multiple_results = True
    p.def_impl(jax.jit(f, static_argnames=sizes))
    mlir.register_lowering(p, mlir.lower_fun(f, multiple_results=True))
    ad.primitive_transposes[p] = transpose
    ad.primitive_jvps[p] = lambda ts, dts, **options: (
        p.bind(*ts, **options),
        p.bind(*map(ad.instantiate_zeros, dts), **options),
    )

    def batched(ts, dims, *, axis, **options):
        size = next(t.shape[d] for t, d in zip(ts, dims, strict=True) if d is not None)
        ts = [batching.bdim_at_front(t, d, size) for t, d in zip(ts, dims, strict=True)]
        return p.bind(*ts, axis=axis + 1, **options), [0] * len(ts)

    batching.primitive_batchers[p] = batched


_register(
    _sums,
    _reduced,
    ["axis"],
    lambda cts, *ts, axis: _live(_broadcasts, cts, axis=axis, size=ts[0].aval.shape[axis]),
)
_register(
    _broadcasts,
    _broadcast,
    ["axis", "size"],
    lambda cts, *ts, axis, size: _live(_sums, cts, axis=axis),
)
_sums.def_abstract_eval(lambda *ts, axis: _resized(axis, 1, *ts))
_broadcasts.def_abstract_eval(lambda *ts, axis, size: _resized(axis, size, *ts))


def sum_axis(ts: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    """Each summed over the axis, whose size becomes 1, in one loop."""
    return _sums.bind(*ts, axis=axis)


def broadcast_axis(ts: Sequence[jax.Array], axis: int, size: int) -> list[jax.Array]:
    """Each repeated along the axis, which has one element; the transpose of `sum_axis`."""
    return _broadcasts.bind(*ts, axis=axis, size=size)


# jnp.all over the axes of vmap as well, so that a lax.cond on it stays one: with a predicate for
# each mapped instance it would become a select, and both branches would run (H200: 4.1 instead of
# 3.0 times the tensor moved forward).
_all = Primitive("jaxnorm_all")
_all.def_impl(jnp.all)
_all.def_abstract_eval(lambda t: core.ShapedArray((), jnp.bool_))
mlir.register_lowering(_all, mlir.lower_fun(jnp.all, multiple_results=False))
batching.primitive_batchers[_all] = lambda ts, dims: (_all.bind(*ts), None)


def all_true(t: jax.Array) -> jax.Array:
    """Whether t is true everywhere, in every instance of an enclosing vmap."""
    return _all.bind(t)


def barrier(tree: Any) -> Any:
    """The leaves of `tree`, each computed before anything that uses one of the results."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, _barrier.bind(*leaves))


@partial(jax.jit, static_argnums=(0, 1))
def kept_small(f: Callable[..., Any], static: Any, *args: Any) -> Any:
    """f(static, *args), checkpointed.

    Reverse mode keeps the arguments, x and small arrays, not what f makes of them.

    Under jit, because outside of it every call would compile the branches of
    `platforms.by_platform` again.
    """
    return jax.checkpoint(partial(f, static), prevent_cse=False)(*args)
