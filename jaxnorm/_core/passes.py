"""A derivative along x and small arrays, as few passes over x.

It is linear in the tangents, so that JAX transposes it: in reverse mode a term along x is one pass
over the cotangent, and terms along small arrays are sums of it.
"""

import jax.numpy as jnp


def sum_of_passes(p, dtype, read, derivatives, x, small, tangents):
    """The derivative along the tangents that are there, of x and of small arrays.

    The first tangent is that of x, and None stands where there is none. The term of the i-th is
    derivatives[i](tangent, *read(x), *small), with read(x) anew in each pass: x in the dtype of the
    statistics, and what was seen of it. There is one pass for x, and one for each small array, or
    for all of them.
    """
    passes = _in_passes(p, x.shape, tangents)
    ahead = [[tangents[i] for i in ids] for ids in passes]
    terms = []
    x, small = p.alias((x, small))
    for ids in passes:
        along, *ahead = ahead
        wide, seen = read(x)
        if not _is_spread(along[0].shape, x.shape):
            along = [along[0].astype(wide.dtype)]
        else:
            # The tangent of a small array is spread in two steps, so that in reverse mode the sum
            # over the cotangent is taken in two: at channel resolution, and over groups.
            joint = jnp.broadcast_shapes(*(t.shape for t in along))
            along = [jnp.broadcast_to(t, joint) for t in along]
            along = p.spread_all(along, x)
        parts = [derivatives[i](t, wide, seen, *small) for i, t in zip(ids, along, strict=True)]
        term = p.as_result(sum(parts[1:], parts[0]), dtype)
        # On a CPU every pass reads an alias of its own, made after the pass before: otherwise XLA
        # stores a float32 copy of x that several share. The tangents are tied apart from x,
        # because JAX takes whatever is tied to a tangent for linear, too.
        x, small = p.alias((x, small))
        term, ahead = p.alias((term, ahead))
        terms.append(term)
    return sum(terms[1:], terms[0]).astype(dtype) if terms else None


def _in_passes(p, shape, tangents):
    """Indices of the tangents that are there, in groups that are summed at once in reverse mode.

    Those of small arrays are, rows apart from others, if one of them has the shape that all are
    spread to first. The first tangent is that of x.
    """
    live = [i for i, t in enumerate(tangents) if t is not None]
    small = [i for i in live if _is_spread(tangents[i].shape, shape)]
    passes = [(i,) for i in live if i not in small]
    for of_rows in (True, False):
        ids = [i for i in small if (tangents[i].shape[-1] != shape[-1]) == of_rows]
        joint = jnp.broadcast_shapes(*(tangents[i].shape for i in ids))
        shared = any(tangents[i].shape == joint for i in ids) and p.shares_read(shape, joint)
        passes += [tuple(ids)] if shared else [(i,) for i in ids]
    return passes


def _is_spread(small, shape):
    """Whether an array of shape `small` broadcasts over x and is not as large."""
    return len(small) == len(shape) and small != shape
