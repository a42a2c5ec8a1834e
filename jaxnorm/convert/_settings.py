"""The method of a normalization layer of another library."""

import difflib
import inspect
from typing import Any

from jaxnorm.convert._registry import LAYERS, Settings

NO_METHOD = {
    "num_features", "num_channels", "channels", "input_size", "device", "dtype", "param_dtype",
    "name", "process_group", "cross_replica_axis", "cross_replica_axis_index_groups", "axis_name",
    "axis_index_groups", "data_format", "param_axis", "inference", "use_running_average",
    "use_fast_variance", "force_float32_reductions", "promote_dtype", "rngs", "warm_up_steps",
    "synchronized", "trainable",
}  # fmt: skip
"""Arguments that make no other method: sizes, dtypes, devices, schedules."""
ENDINGS = ("_init", "_initializer", "_regularizer", "_constraint", "_metadata")
"""How names of others end."""


def settings(layer: str, **arguments: Any) -> Settings:
    """The arguments of our `Norm` for a normalization layer of another library.

    They are for `linen.Norm(**settings(...))` and `nnx.Norm(features, **settings(...), rngs=rngs)`;
    the method alone is `settings(...)["method"]`. Arguments that are not given have the other
    library's defaults, so that epsilon, momentum and the divisor of the running variance are its.
    Channels are the last axis here: give `Norm` the `channel_axis` where they stay elsewhere.

    A cumulative average, PyTorch's `momentum=None`, is a matter of state: `from_torch(arrays,
    momentum=None)` puts a count into it, with which the average is cumulative. The method has the
    momentum 1, so that nothing but this count moves it.

    Args:
        layer: the library and the layer: "torch.nn.BatchNorm2d", "haiku.LayerNorm",
            "equinox.nn.GroupNorm", "keras.layers.BatchNormalization", "flax.linen.RMSNorm",
            "sbx.BatchRenorm".
        **arguments: of that layer, by its names for them. Those that make no other method, such as
            sizes, devices and initializers, may be given and are ignored. Where a layer norm is
            over several axes, x has one axis before them.

    Returns:
        A dict of `method`, `use_scale` and `use_bias`.

    Raises:
        TypeError: an argument that the layer does not have, or one that is missing.
        ValueError: an unknown layer, with the names near it; an argument for which there is no
            method here.

    Example:
        >>> settings("torch.nn.BatchNorm2d", momentum=0.25, affine=False)
        {'method': Row(Groups(batch=1, spatial=1, channel=EACH), momentum=0.75, correction=1),
         'use_scale': False, 'use_bias': False}
        >>> settings("keras.layers.LayerNormalization")["method"]
        Row(Groups(batch=EACH, spatial=EACH, channel=1), epsilon=0.001)

    Reference:
        The layers' own signatures; no paper is followed.
    """
    parts = layer.split(".")
    key = f"{parts[0]}.{parts[-1]}"
    if key not in LAYERS:
        near = difflib.get_close_matches(key, LAYERS, n=3, cutoff=0.5)
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"no layer {layer!r} is known.{meant} Expected one of {', '.join(LAYERS)}."
        )
    function = LAYERS[key]
    taken = inspect.signature(function).parameters
    needed = [n for n, p in taken.items() if p.default is p.empty and n not in arguments]
    wrong = [name for name in arguments if name not in taken and not _is_no_method(name)]
    if needed or wrong:
        got = [f"needs {', '.join(needed)}"] * bool(needed)
        got += [f"has no argument {', '.join(wrong)} that is known here"] * bool(wrong)
        raise TypeError(f"{key} {' and '.join(got)}. Expected some of {', '.join(taken)}.")
    return function(**{name: value for name, value in arguments.items() if name in taken})


def _is_no_method(name: str) -> bool:
    return name in NO_METHOD or name.endswith(ENDINGS)
