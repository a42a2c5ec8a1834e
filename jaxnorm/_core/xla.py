"""What differs by platform, each piece with the measurement that keeps it.

All pieces leave values as they are; they decide which arrays XLA stores and which loops it joins.
Measured on XLA:CPU of jaxlib 0.10.2 (time, temporary bytes) and on XLA's compilation for an H200
(bytes that kernels move).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import core, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxnorm._core.axes import Shape
from jaxnorm._core.blocks import block_sum, spread

# lax.optimization_barrier, but derivatives pass through and only linear operands are transposed:
# from jax 0.11 on the original fails to transpose when some operands are constants. It gives each
# full-size pass its own alias of x, without which XLA:CPU stores a float32 copy that several passes
# share (bfloat16 forward 2.6-3.4 times slower, step 1.8-2 times).
_barrier = Primitive("jaxnorm_barrier")
_barrier.multiple_results = True
_barrier.def_impl(lambda *ts: list(ts))
_barrier.def_abstract_eval(lambda *ts: list(ts))
mlir.register_lowering(
    _barrier, mlir.lower_fun(lambda *ts: lax.optimization_barrier(ts), multiple_results=True)
)
ad.primitive_jvps[_barrier] = lambda ts, dts: (_barrier.bind(*ts), list(dts))
batching.primitive_batchers[_barrier] = lambda ts, dims: (_barrier.bind(*ts), dims)


def _transpose(cts: list[Any], *ts: Any) -> list[Any]:
    linear = [ad.is_undefined_primal(t) for t in ts]
    live = [i for i, ct in enumerate(cts) if linear[i] and type(ct) is not ad.Zero]
    out = dict(zip(live, _barrier.bind(*(cts[i] for i in live)), strict=True)) if live else {}
    return [out.get(i, ct) if linear[i] else None for i, ct in enumerate(cts)]


ad.primitive_transposes[_barrier] = _transpose


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


def by_platform(f: Callable[..., Any], *args: Any) -> Any:
    """f(cpu, *args), with cpu known when the program is lowered, not when it is traced."""
    return lax.platform_dependent(*args, cpu=partial(f, True), default=partial(f, False))


@partial(jax.jit, static_argnums=(0, 1))
def kept_small(f: Callable[..., Any], static: Any, *args: Any) -> Any:
    """f(static, *args), checkpointed: reverse mode keeps the arguments, x and small arrays, not
    what f makes of them.

    Under jit, because outside of it every call would compile the branches of `by_platform` again.
    """
    return jax.checkpoint(partial(f, static), prevent_cse=False)(*args)


def first_sums(cpu: bool, shape: Shape, channels: Shape) -> Shape:
    """Shape of the sums that are taken at full size, finer than `channels` on a GPU.

    With channels last, XLA gives a sum over everything else one thread block for each 128 channels:
    16 to 24 blocks on 132 multiprocessors. So examples stay apart and rows are cut until there are
    two blocks for each and at most 1024 rows to sum; group norm of (8, 64, 64, 320) then moves 8.1
    times the tensor in a step instead of 16. On the CPU the cut costs 1.6 to 3.9 times the forward
    pass.
    """
    symbolic = not all(isinstance(n, int) for n in shape)  # jax.export
    if cpu or symbolic or len(shape) < 3 or 0 in shape or channels[-1] != shape[-1]:
        return channels
    if math.prod(channels) * 64 > math.prod(shape):
        return channels
    blocks, rows = shape[0] * -(-shape[-1] // 128), math.prod(shape[1:-1])
    cuts = [
        t
        for t in range(channels[1], shape[1] + 1, channels[1])
        if shape[1] % t == 0 and _keeps_shards(t, shape[1])
    ]
    cut = next((t for t in cuts if t * blocks >= 264 and rows // t <= 1024), cuts[-1])
    return (shape[0], cut, *channels[2:])


def _keeps_shards(cuts: int, n: int) -> bool:
    """Whether an axis of n in so many cuts has whole shards in a cut or whole cuts in a shard, for
    shards a power of two.

    A cut across shards would gather x. Where the axis is sharded is not known when the program is
    traced.
    """
    return (n & -n) % cuts == 0 or cuts % (n & -n) == 0


def by_first_sums(cpu: bool, v: jax.Array, shape: Shape) -> jax.Array:
    """v as it is, through the shape of the first sums: read backwards, its cotangent is summed in
    two stages."""
    if not cpu and v.shape[-1] == shape[-1] and v.shape[:-1] != shape[:-1]:
        v = jnp.broadcast_to(v, first_sums(cpu, shape, v.shape))
    return spread(barrier(v), shape)


def to_groups(cpu: bool, sums: jax.Array, groups: Shape) -> jax.Array:
    """`block_sum` whose transpose is `to_channels`."""
    size = sums.shape[-1] // max(groups[-1], 1)
    if cpu and size not in (1, sums.shape[-1]):
        ones = jnp.zeros((size, 2), sums.dtype).at[:, 0].set(1)
        grouped = sums.reshape(*sums.shape[:-1], groups[-1], size)
        sums = jnp.matmul(grouped, ones, precision="highest")[..., 0]
    return block_sum(sums, groups)


def to_channels(cpu: bool, v: jax.Array, shape: Shape) -> jax.Array:
    """`spread` over groups of the last axis as a matrix product on the CPU.

    XLA:CPU never fuses a product into the full-size loop, which then reads plain channel vectors
    instead of dividing every index by the group size: bfloat16 group norm is 1.9 times faster
    forward, 1.4 times in a step. A second, empty row keeps XLA from turning the product into a
    broadcast again.
    """
    size = shape[-1] // max(v.shape[-1], 1)
    if cpu and size not in (1, shape[-1]):
        ones = jnp.zeros((2, size), v.dtype).at[0].set(1)
        v = jnp.matmul(jnp.stack([v, jnp.zeros_like(v)], -1), ones, precision="highest").reshape(
            *v.shape[:-1], shape[-1]
        )
    return spread(v, shape)
