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
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, Tracer):
            return None
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return None
    return np.asarray(jax.device_get(value))


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
    bounds = [f"of at least {at_least:g}"] * (at_least > -math.inf)
    bounds += [f"above {above:g}"] * (above > -math.inf)
    bounds += [f"of at most {at_most:g}"] * (at_most < math.inf)
    what = "a number" if not shape else f"a number, or an array of shape {shape} of numbers"
    expected = f"expected {what} {' and '.join(bounds)}".rstrip() + "."
    if (
        not isinstance(value, int | float | np.generic | np.ndarray | jax.Array)
        or value is True
        or value is False
    ):
        raise TypeError(f"{name} is {value!r}; {expected}")
    dtype = jnp.result_type(value)
    if not jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{name} has dtype {dtype}; {expected}")
    if np.shape(value) not in ((), shape):
        raise ValueError(f"{name} has shape {np.shape(value)}; {expected}")
    values = known(value)
    if values is None:
        return
    values = values.astype(np.float64)
    if not ((values >= at_least) & (values > above) & (values <= at_most)).all() and values.size:
        raise ValueError(f"{name} is {value}; {expected}")


def check_epsilon(epsilon: object, name: str = "epsilon") -> None:
    """What is added to a variance is one number, 0 or more.

    With another number for each channel, axes would have to say where these are.
    """
    check_number(epsilon, name, at_least=0)


def check_count(count: object, name: str, at_least: int = 1) -> int:
    """`count` is an integer of at least so much."""
    if not isinstance(count, SupportsIndex) or isinstance(count, bool | np.bool_):
        raise TypeError(f"{name} is {count!r}; expected an integer of at least {at_least}.")
    if count.__index__() < at_least:
        raise ValueError(f"{name} is {count!r}; expected an integer of at least {at_least}.")
    return count.__index__()


def check_flag(flag: T, name: str) -> T:
    """`flag` is True or False, or the integer of one, which Flax's layers take as well.

    Any other value, such as "False" from a command line, would count as true. A traced one is left
    to JAX, which says what it cannot do.
    """
    if isinstance(flag, int | np.integer | np.bool_) and flag in (0, 1):
        return flag
    if (
        isinstance(flag, np.ndarray | jax.Array)
        and np.shape(flag) == ()
        and jnp.issubdtype(flag.dtype, jnp.bool_)
    ):
        return flag
    raise TypeError(f"{name} is {flag!r}; expected True or False.")
