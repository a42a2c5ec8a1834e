"""How libraries store whole models: the names and layouts of linear layers beside the norms."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxnorm.convert._arrays import Arrays, Layer, as_numpy, split
from jaxnorm.convert._equinox import from_equinox, to_equinox
from jaxnorm.convert._flax import from_flax, to_flax
from jaxnorm.convert._haiku import from_haiku, to_haiku
from jaxnorm.convert._keras import from_keras, to_keras
from jaxnorm.convert._sbx import from_sbx, to_sbx
from jaxnorm.convert._torch import from_torch, to_torch


class Library(NamedTuple):
    """A library's names for the arrays of a model.

    Args:
        read: a normalization layer's arrays -> `Layer`.
        write: parameters and state -> its arrays.
        linear: our names of what dense and convolution layers have -> theirs.
        embedding: their name of an embedding's array.
        outputs_first: whether kernels are (O, I, ...), as of NCHW, instead of (..., I, O).
        separator: between the names of modules and arrays.
    """

    read: Callable[..., Layer]
    write: Callable[..., Arrays]
    linear: Mapping[str, str]
    embedding: str
    outputs_first: bool = False
    separator: str = "/"

    def arrays_of(self, wanted: set[str], theirs: Mapping[str, Any], **options: Any) -> Arrays:
        """A module's arrays by our names; `wanted` are those that it has here."""
        names = self._names(wanted)
        if names is None:
            layer = self.read(theirs, **options)
            return layer.params | layer.state
        found = {own: as_numpy(theirs[name]) for own, name in names.items() if name in theirs}
        if "kernel" in found and self.outputs_first:
            found["kernel"] = np.moveaxis(found["kernel"], (0, 1), (-1, -2))
        if "bias" in found:
            found["bias"] = found["bias"].reshape(-1)
        rest = {name: as_numpy(t) for name, t in theirs.items() if name not in names.values()}
        return found | rest

    def arrays_for(self, own: Arrays, **options: Any) -> Arrays:
        """The inverse: a module's arrays by their names."""
        names = self._names(set(own))
        if names is None:
            params, state = split(own)
            return self.write(params, state, **options)
        found = dict(own)
        if "kernel" in found and self.outputs_first:
            found["kernel"] = np.moveaxis(found["kernel"], (-1, -2), (0, 1))
        return {names.get(name, name): t for name, t in found.items()}

    def _names(self, own: set[str]) -> Mapping[str, str] | None:
        """Our names -> theirs, of layers that do not normalize."""
        if "kernel" in own:
            return self.linear
        return {"embedding": self.embedding} if "embedding" in own else None


def _linear(kernel: str, bias: str) -> dict[str, str]:
    return {"kernel": kernel, "bias": bias}


LIBRARIES = {
    "torch": Library(from_torch, to_torch, _linear("weight", "bias"), "weight", True, "."),
    "haiku": Library(from_haiku, to_haiku, _linear("w", "b"), "embeddings"),
    "equinox": Library(from_equinox, to_equinox, _linear("weight", "bias"), "weight", True),
    "keras": Library(from_keras, to_keras, _linear("kernel", "bias"), "embeddings"),
    "sbx": Library(from_sbx, to_sbx, _linear("kernel", "bias"), "embedding"),
    "flax": Library(from_flax, to_flax, _linear("kernel", "bias"), "embedding"),
}
