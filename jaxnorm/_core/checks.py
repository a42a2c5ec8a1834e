"""Values refused at the door where they are known; a traced one cannot be looked at."""

import math
from typing import SupportsIndex, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

T = TypeVar("T")


def known(value: object) -> np.ndarray | None:
    """The value, or None where it cannot be looked at.

    That is where it, or a number in a list, is traced or lies on the devices of other processes.
    """
    hidden = any(
        isinstance(leaf, Tracer) or not getattr(leaf, "is_fully_addressable", True)
        for leaf in jax.tree.leaves(value)
    )
    return None if hidden else np.asarray(jax.device_get(value))


def check_number(
    value: object,
    name: str,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    shape: tuple[int, ...] = (),
) -> None:
    """`value` is a number, or an array of numbers of `shape`, within bounds and not NaN.

    The shape and dtype of a traced value are checked, and its value is not.
    """
    limits = {"of at least": at_least, "above": above, "of at most": at_most}
    bounds = (f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit))
    what = f"a number, or an array of shape {shape} of numbers" if shape else "a number"
    expected = f"expected {what} {' and '.join(bounds)}".rstrip() + "."
    numeric = isinstance(value, int | float | np.generic | np.ndarray | jax.Array)
    if not numeric or not jnp.isdtype(jnp.result_type(value), ("integral", "real floating")):
        raise TypeError(f"{name} is {value!r}; {expected}")
    if np.shape(value) not in ((), shape):
        raise ValueError(f"{name} has shape {np.shape(value)}; {expected}")
    values = known(value)
    if values is None:
        return
    values = values.astype(np.float64)
    if not ((values >= at_least) & (values > above) & (values <= at_most)).all():
        raise ValueError(f"{name} is {value}; {expected}")


def check_epsilon(epsilon: object, name: str = "epsilon") -> None:
    """What is added to a variance is one number, 0 or more.

    With another number for each channel, axes would have to say where these are.
    """
    check_number(epsilon, name, at_least=0)


def as_index(value: object) -> int | None:
    """The integer that `value` is, or None; True and False are none."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, SupportsIndex):
        return None
    return value.__index__()


def check_count(count: object, name: str, at_least: int = 1) -> int:
    """`count` is an integer of at least so much."""
    index = as_index(count)
    if index is None or index < at_least:
        error = TypeError if index is None else ValueError
        raise error(f"{name} is {count!r}; expected an integer of at least {at_least}.")
    return index


def check_flag(flag: T, name: str) -> T:
    """`flag` is True or False, or the integer of one, which Flax's layers take as well.

    Any other value, such as "False" from a command line, would count as true. A traced one is left
    to JAX, which says what it cannot do.
    """
    if isinstance(flag, np.ndarray | np.bool_ | jax.Array):
        valid = flag.dtype == np.bool_ and flag.shape == ()
    else:
        valid = isinstance(flag, int | np.integer) and flag in (0, 1)
    if valid:
        return flag
    raise TypeError(f"{name} is {flag!r}; expected True or False.")
