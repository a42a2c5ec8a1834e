"""The fields of a method: hyperparameters as Python values, so that methods hash and compare."""

import dataclasses
import inspect
import math
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import (
    Annotated,
    Any,
    NamedTuple,
    SupportsIndex,
    TypeVar,
    dataclass_transform,
    final,
    get_args,
)

import jax
import numpy as np
from jax.export import is_symbolic_dim
from jax.typing import ArrayLike

from jaxnorm._core.checks import check_count, check_flag, check_number

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def as_value(method: type[T]) -> type[T]:
    """The class of a method of the library: a frozen dataclass that prints as `Method` says.

    Its rule hands x to functions of the library alone, which take it as `Shared`.
    """
    method.reads_shared = True  # type: ignore[attr-defined]  # of `Method`
    return final(dataclasses.dataclass(frozen=True, repr=False)(method))


class Bounds(NamedTuple):
    """The numbers that a field, or an option of a rule, takes: it is annotated with them.

    Fields are checked when a method is made, options when it is applied.
    """

    at_least: int
    at_most: float = math.inf


Count = Annotated[int, Bounds(1)]
NotNegative = Annotated[ArrayLike, Bounds(0)]
OneOrMore = Annotated[ArrayLike, Bounds(1)]
Share = Annotated[ArrayLike, Bounds(0, 1)]

BY_NAME = {"epsilon": NotNegative, "momentum": Share, "correction": Annotated[int, Bounds(0)]}
"""Fields that mean the same in every method, also in one of the user's own."""


def check_value(value: Any, annotation: Any, name: str) -> None:
    """`value` is within the bounds of its annotation; None stands for no value."""
    for part in (annotation, *get_args(annotation)):  # `Share`, or that of `Share | None`
        for bounds in getattr(part, "__metadata__", ()):
            if value is None or not isinstance(bounds, Bounds):
                continue
            if part.__origin__ is int:
                check_count(value, name, bounds.at_least)
            else:
                check_number(value, name, **bounds._asdict())


def check_fields(method: Any, options: Mapping[str, inspect.Parameter]) -> None:
    """Replace the fields of a method by Python values, once they are known to be such.

    A field has the bounds of its annotation, and of the option that stands in its place.
    """
    for field in dataclasses.fields(method):
        name, what = field.name, f"{type(method).__name__}({field.name}=...)"
        value = _static(getattr(method, name), what)
        if value is None and NoneType not in (type(field.default), *get_args(field.type)):
            raise TypeError(f"{what} is None. Expected a value such as {field.default!r}.")
        if isinstance(field.default, bool):
            check_flag(value, name)
        option = options[name].annotation if name in options else None
        for annotation in (field.type, option, BY_NAME.get(name)):
            check_value(value, annotation, name)
        object.__setattr__(method, name, value)


def check_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Options are given by names that are known."""
    if unknown := sorted(set(given) - set(known)):
        raise TypeError(
            f"{what} got an unexpected option {', '.join(unknown)}. Expected some of "
            f"{', '.join(known)}."
        )


def _static(value: Any, what: str) -> Any:
    """A hyperparameter as a hashable Python value."""
    if isinstance(value, jax.Array | np.ndarray):
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
    # a size that is not known stands in a statistic's shape while a program is exported
    if isinstance(value, bool | int | float | str | None) or is_symbolic_dim(value):
        return value
    # a Size, a Groups or a method; Moments are a tree of arrays
    is_dataclass = dataclasses.is_dataclass(value) and not isinstance(value, type)
    if is_dataclass and jax.tree_util.all_leaves([value]):
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
