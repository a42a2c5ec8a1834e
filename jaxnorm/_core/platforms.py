"""What differs by platform: a record of the CPU's choices, and one of all others'.

Formulas are written once and ask the record. All choices leave values as they are but for rounding;
each has the measurement that keeps it. The CPU was measured with jaxlib 0.10.2 (time, temporary
bytes), the others are what XLA's compilation for an H200 needs (bytes that kernels move).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxnorm._core.axes import Shape
from jaxnorm._core.blocks import block_sum, spread
from jaxnorm._core.together import cuts_of, far_apart, spread_together, sums_together
from jaxnorm._core.xla import barrier

Terms = Callable[..., Sequence[jax.Array]]


@dataclasses.dataclass(frozen=True)
class Platform:
    """What a formula asks of the platform that it is lowered for.

    Args:
        alias: tree -> tree, through which each full-size pass reads its arguments.
        sums: (terms, args, shape) -> sums of the tensors terms(*args), in `shape` or finer. It is
            called once for each read of them.
        shares_read: (x's shape, the sums' shape) -> whether several sums take one read.
        spread_all: (vs, x) -> arrays of one shape spread over x, so that in reverse mode their
            cotangents are added up as by `sums`, in one read if possible.
        to_groups: (sums, groups) -> `block_sum`, whose transpose is `to_channels`.
        to_channels: (v, shape) -> `spread` over groups of the last axis.
        as_result: (term, dtype) -> a term of the derivative, as it enters their sum.
        holds_rows: whether it holds a row from the first read to the pass that uses its statistics,
            so that they are taken in as many reads as are exact.
    """

    alias: Callable[[Any], Any]
    sums: Callable[[Terms, Sequence[Any], Shape], list[jax.Array]]
    shares_read: Callable[[Shape, Shape], bool]
    spread_all: Callable[[Sequence[jax.Array], jax.Array], list[jax.Array]]
    to_groups: Callable[[jax.Array, Shape], jax.Array]
    to_channels: Callable[[jax.Array, Shape], jax.Array]
    as_result: Callable[[jax.Array, DTypeLike], jax.Array]
    holds_rows: bool


def by_platform(f: Callable[..., Any], *args: Any) -> Any:
    """f(platform, *args), with the platform known when the program is lowered, not when traced."""
    return lax.platform_dependent(*args, cpu=partial(f, CPU), default=partial(f, OTHERS))


def total(t: jax.Array, shape: Shape, dtype: DTypeLike) -> jax.Array:
    """`block_sum` of t in another dtype, which a full-size t is not stored in."""

    def sums(p: Platform, t: jax.Array) -> jax.Array:
        # By an alias XLA does not know a constant, which takes it seconds to sum as it compiles.
        return block_sum(p.sums(lambda t: [t.astype(dtype)], (p.alias(t),), shape)[0], shape)

    return by_platform(sums, t)


def spread_to_channels(v: jax.Array, shape: Shape) -> jax.Array:
    """A statistic of groups of channels, for each channel of x."""
    return by_platform(lambda p, v: p.to_channels(v, shape), v)


SHORT_ROW = 128
"""Elements of a row up to which XLA:CPU takes two sums of it faster in cuts: layer norm of tokens
with 16, 64 and 96 channels takes 0.73, 0.76 and 0.76 of the time forward. Of longer rows, and of a
sum alone, it makes one loop with what uses them, but for float16."""


def _summed_by_product(sums: jax.Array, groups: Shape) -> jax.Array:
    size = sums.shape[-1] // max(groups[-1], 1)
    if size not in (1, sums.shape[-1]):
        ones = jnp.zeros((size, 2), sums.dtype).at[:, 0].set(1)
        grouped = sums.reshape(*sums.shape[:-1], groups[-1], size)
        sums = jnp.matmul(grouped, ones, precision="highest")[..., 0]
    return block_sum(sums, groups)


def _spread_by_product(v: jax.Array, shape: Shape) -> jax.Array:
    """`spread` by a matrix product, which XLA:CPU never fuses into the full-size loop.

    The loop then reads plain channel vectors instead of dividing every index by the group size:
    bfloat16 group norm is 1.9 times faster forward, 1.4 times in a step. A second, empty row keeps
    XLA from turning the product into a broadcast again.
    """
    size = shape[-1] // max(v.shape[-1], 1)
    if size not in (1, shape[-1]):
        ones = jnp.zeros((2, size), v.dtype).at[0].set(1)
        rows = jnp.stack([v, jnp.zeros_like(v)], -1)
        v = jnp.matmul(rows, ones, precision="highest").reshape(*v.shape[:-1], shape[-1])
    return spread(v, shape)


def _cut_alone(x: jax.Array, sums: Shape) -> bool:
    """Whether a sum is cut also where it is alone.

    An ordinary one reads a float32 copy of a mask or of float16, and is slow for what is far apart.
    """
    return x.dtype in (jnp.bool_, jnp.float16) or far_apart(x.shape, sums)


def _cpu_sums(terms: Terms, args: Sequence[Any], shape: Shape) -> list[jax.Array]:
    tensors = terms(*args)
    x = args[0]
    short = isinstance(x.shape[-1], int) and x.shape[-1] <= SHORT_ROW  # symbolic in jax.export
    cuts = cuts_of(x.shape, shape, rows=short or x.dtype == jnp.float16)
    if cuts and (len(tensors) > 1 or _cut_alone(x, shape)):
        return sums_together(tensors, shape, cuts)
    # Each reads an alias of its own.
    aliases = (terms(*(args if i == 0 else barrier(args))) for i in range(len(tensors)))
    return [block_sum(ts[i], shape) for i, ts in enumerate(aliases)]


def _cpu_spread_all(vs: Sequence[jax.Array], x: jax.Array) -> list[jax.Array]:
    sums = vs[0].shape
    cuts = cuts_of(x.shape, sums, rows=True)
    # XLA would make one slow loop of a sum of rows and the pass that uses it.
    of_rows = sums[-1] != x.shape[-1]
    if cuts and (len(vs) > 1 or of_rows or _cut_alone(x, sums)):
        return spread_together(barrier(vs), x.shape, cuts)
    return [spread(barrier(v), x.shape) for v in vs]


CPU = Platform(
    # Each pass has its own alias of x, without which XLA:CPU stores a float32 copy that several
    # passes share: bfloat16 is 2.6 to 3.4 times slower forward, 1.8 to 2 times in a step.
    alias=barrier,
    # Sums that are cut for a GPU cost 1.6 to 3.9 times the forward pass.
    sums=_cpu_sums,
    shares_read=lambda shape, sums: bool(cuts_of(shape, sums, rows=True)),
    spread_all=_cpu_spread_all,
    to_groups=_summed_by_product,
    to_channels=_spread_by_product,
    # In its own loop each term is stored in the dtype of the result.
    as_result=lambda term, dtype: term.astype(dtype),
    holds_rows=False,
)


def _cut_sums(shape: Shape, channels: Shape) -> Shape:
    """Finer sums than `channels`, with work for every multiprocessor.

    With channels last, XLA gives a sum over everything else one thread block for each 128 channels:
    16 to 24 blocks on 132 multiprocessors. So examples stay apart and rows are cut until there are
    two blocks for each and at most 1024 rows to sum; group norm of (8, 64, 64, 320) then moves 8.1
    times the tensor in a step instead of 16.
    """
    symbolic = not all(isinstance(n, int) for n in shape)  # jax.export
    if symbolic or len(shape) < 3 or 0 in shape or channels[-1] != shape[-1]:
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
    """Whether an axis of n, in so many cuts, has whole shards in a cut or whole cuts in a shard.

    Shards are a power of two.

    A cut across shards would gather x. Where the axis is sharded is not known when the program is
    traced.
    """
    return (n & -n) % cuts == 0 or cuts % (n & -n) == 0


def _sums_of_cuts(terms: Terms, args: Sequence[Any], shape: Shape) -> list[jax.Array]:
    return [block_sum(t, _cut_sums(t.shape, shape)) for t in terms(*args)]


def _spread_by_cuts(v: jax.Array, shape: Shape) -> jax.Array:
    if v.shape[-1] == shape[-1] and v.shape[:-1] != shape[:-1]:
        v = jnp.broadcast_to(v, _cut_sums(shape, v.shape))
    return spread(barrier(v), shape)


OTHERS = Platform(
    alias=lambda tree: tree,  # a GPU wants the passes together
    sums=_sums_of_cuts,
    shares_read=lambda shape, sums: False,
    spread_all=lambda vs, x: [_spread_by_cuts(v, x.shape) for v in vs],
    to_groups=block_sum,
    to_channels=spread,
    as_result=lambda term, dtype: term,
    holds_rows=True,
)
