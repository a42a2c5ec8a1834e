"""The normalizations of an nnx model replaced by others."""

import math
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
from flax import nnx

from jaxnorm import _replacing
from jaxnorm._core.axes import Shape
from jaxnorm.methods import Method
from jaxnorm.nnx._norm import Norm
from jaxnorm.nnx._probe import NORMS
from jaxnorm.probe import _calls

Model = TypeVar("Model", bound=nnx.Module)


class ReplacedNorm(NamedTuple):
    """What became of a layer in `replace_norms`.

    Args:
        was: the name of its class.
        method: that it has now.
        carried: names of variables that are those of before.
        fresh: names of variables that begin anew.
        dropped: names of variables that are gone.

    Reference:
        A tool of this library; no paper is followed.
    """

    was: str
    method: Method
    carried: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]


def replace_norms(
    model: Model,
    method: _replacing.Choice,
    *,
    rngs: nnx.Rngs,
    layers: type | tuple[type, ...] = NORMS,
) -> tuple[Model, dict[str, ReplacedNorm]]:
    """A copy of a model in which normalizations are `Norm` of another method.

    Flax's own layers and those of this library are found anywhere in the model; a layer that is in
    several places is replaced by one. Each keeps its number of channels, axis, dtypes, named axes
    and `use_running_average`; epsilon and momentum are the method's. Scale and bias are carried
    over, and there are such variables where there were some. So is what a layer remembers and what
    its method learns, where names, shapes and meaning are the same: running statistics of each
    channel, between batch norm of any kind. All else begins anew. Layers that were made by
    `nnx.vmap`, for a scan, keep their leading axes. Optimizers are made for the new model.

    Args:
        model: of nnx; stays as it is, and shares its arrays with the copy.
        method: a value of `jaxnorm.methods`, or a function (path, layer) -> the method of a layer,
            or None to leave it.
        rngs: random number streams for the initializers.
        layers: the classes that are replaced, with their subclasses: by default all normalizations
            of jaxnorm and Flax.

    Returns:
        The copy, and a dict from the path of a layer, such as "blocks/0/norm", to its
        `ReplacedNorm`.

    Raises:
        TypeError: model is no `nnx.Module`, method no method, `layers` that are not classes.
        ValueError: no layer is found. Or the model would not be what it seems: a method that
            carries its activation or loses one, needs an option at the call or a layer in front, or
            does not split the channels; a layer with several axes of channels, with variables of
            unknown shapes or with a call of its own. The error names all of them.

    Example:
        >>> from jaxnorm import methods
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs))
        >>> model, replaced = replace_norms(model, methods.group_norm(2), rngs=rngs)
        >>> model.layers[1].method
        Row(Groups(batch=EACH, spatial=1, channel=2))
        >>> replaced["layers/1"].carried, replaced["layers/1"].dropped
        (('scale', 'bias'), ('mean', 'var'))

    Reference:
        A tool of this library; no paper is followed.
    """
    types = _calls.check_layers(layers)
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model is {type(model).__name__}; expected an nnx.Module.")
    copy = nnx.clone(model)
    found = {
        "/".join(map(str, path)): layer
        for path, layer in nnx.iter_modules(copy)
        if isinstance(layer, types)
    }
    if not found:
        names = ", ".join(t.__name__ for t in types)
        raise ValueError(f"there is nothing to replace in the model. Expected one of {names}.")
    choices = {path: _replacing.chosen(method, path, layer) for path, layer in found.items()}
    taken = {path: choice for path, choice in choices.items() if choice is not None}
    _replacing.refuse(
        {
            f"{type(found[path]).__name__} at {path!r}": _reasons(found[path], choice)
            for path, choice in taken.items()
        }
    )
    return copy, {path: _replace(found[path], choice, rngs) for path, choice in taken.items()}


def _reasons(layer: Any, method: Method) -> list[str]:
    """Why a method cannot take a layer's place."""
    channels = _num_features(layer)
    reasons = list(_replacing.reasons_against(layer, method, channels, positions=True))
    if _leading(layer) is None:
        shapes = ", ".join(f"{name} {t.shape}" for name, t in _of_channels(layer).items())
        reasons.append(
            f"has variables of shapes {shapes}: expected ({channels},), after any axes of a scan"
        )
    return reasons


def _num_features(layer: Any) -> int:
    """The channels of a layer; Flax's GroupNorm does not keep their number."""
    own = getattr(layer, "num_features", None)
    own = layer.num_groups * layer.group_size if own is None else own
    return math.prod(own) if isinstance(own, tuple) else own


def _variables(layer: Any) -> dict[str, nnx.Variable]:
    return {name: t for name, t in vars(layer).items() if isinstance(t, nnx.Variable)}


def _of_channels(layer: Any) -> dict[str, nnx.Variable]:
    """The variables that have a number for each channel, whatever the method."""
    names = ["scale", "bias", *(["mean", "var"] if not hasattr(layer, "method") else [])]
    return {name: t for name, t in _variables(layer).items() if name in names}


def _leading(layer: Any) -> Shape | None:
    """The axes in front of the channels, over which a scan runs; None where that is unclear."""
    shapes = {tuple(t.shape) for t in _of_channels(layer).values()}
    if not shapes:
        return ()
    shape, *others = shapes
    return None if others or shape[-1:] != (_num_features(layer),) else shape[:-1]


def _replace(layer: Any, method: Method, rngs: nnx.Rngs) -> ReplacedNorm:
    """Make a layer a `Norm` in place, wherever it is referred to."""
    channels, leading, before = _num_features(layer), _leading(layer), _variables(layer)
    given = ("dtype", "param_dtype", "axis_name", "axis_index_groups", "promote_dtype")
    new: Any = Norm(
        channels,
        method,
        use_running_average=getattr(layer, "use_running_average", False),
        use_scale="scale" in before,
        use_bias="bias" in before,
        unit_offset=getattr(layer, "unit_offset", False),
        batch_axis=getattr(layer, "batch_axis", 0),
        channel_axis=_replacing.channel_axis_of(layer),
        rngs=rngs,
        **{name: getattr(layer, name) for name in given},
    )
    same = _replacing.state_means_the_same(_replacing.method_before(layer), method, channels)
    carried = []
    for name, variable in _variables(new).items():
        value = variable.get_value()
        value = jnp.broadcast_to(value, (*leading, *value.shape)) if leading else value
        own = before.get(name)
        if own is not None and own.shape == value.shape and (same or name in ("scale", "bias")):
            setattr(new, name, own)
            carried.append(name)
        else:
            variable.set_value(value)
    was, names = type(layer).__name__, tuple(_variables(new))
    # The object stays and is another: all that refers to it has the new layer.
    vars(layer).clear()
    vars(layer).update(vars(new))
    object.__setattr__(layer, "__class__", Norm)
    return ReplacedNorm(
        was=was,
        method=new.method,
        carried=tuple(carried),
        fresh=tuple(name for name in names if name not in carried),
        dropped=tuple(name for name in before if name not in carried),
    )
