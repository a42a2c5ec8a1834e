"""The fields of a method: hyperparameters as Python values, so that methods hash and compare."""

import dataclasses
import math
from types import NoneType
from typing import Any, SupportsIndex, get_args

import jax
import numpy as np
from jax.core import Tracer
from jax.export import is_symbolic_dim

from jaxnorm._core.checks import check_count, check_epsilon, check_flag, check_number


def check_fields(method: Any) -> None:
    """Replace the fields of a method by Python values, once they are known to be such."""
    if getattr(method, "epsilon", 0) is None:
        check_epsilon(None)
    for field in dataclasses.fields(method):
        what = f"{type(method).__name__}({field.name}=...)"
        value = _static(getattr(method, field.name), what)
        if value is None and NoneType not in (type(field.default), *get_args(field.type)):
            raise TypeError(f"{what} is None. Expected a value such as {field.default!r}.")
        if isinstance(field.default, bool):
            check_flag(value, field.name)
        object.__setattr__(method, field.name, value)
    if hasattr(method, "correction"):
        check_count(method.correction, "correction", at_least=0)
    if hasattr(method, "epsilon"):
        check_epsilon(method.epsilon)
    if getattr(method, "momentum", None) is not None:
        check_number(method.momentum, "momentum", at_least=0, at_most=1)


def _is_value(value: Any) -> bool:
    """Whether it is a Size, a Groups or a method."""
    leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(value))  # Moments are a tree of arrays
    return leaf and dataclasses.is_dataclass(value) and not isinstance(value, type)


def _static(value: Any, what: str) -> Any:
    """A hyperparameter as a hashable Python value."""
    if isinstance(value, jax.Array | np.ndarray | Tracer):
        raise TypeError(
            f"{what} is an array of shape {value.shape}. Expected a Python number: methods are "
            "static. Give what changes or is traced to apply."
        )
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, tuple | list):
        return tuple(_static(part, what) for part in value)
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{what} is NaN. Expected a number.")
    if value is None or isinstance(value, bool | int | float | str) or _is_value(value):
        return value
    if is_symbolic_dim(value):  # in a statistic's shape, while a program is exported
        return value
    if isinstance(value, SupportsIndex):
        return value.__index__()
    raise TypeError(
        f"{what} is {value!r}. Expected a number, a string, None, a tuple, Size, Groups or a "
        "method; functions and arrays are given to apply."
    )


def typed(value: Any) -> str:
    """The value as it is typed."""
    return f"float('{value}')" if isinstance(value, float) and math.isinf(value) else repr(value)
