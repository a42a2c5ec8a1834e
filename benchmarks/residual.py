"""A small residual network whose normalization is chosen from outside."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.norms import NO_ACTIVATION, NUM_GROUPS, Layer
from jaxnorm.linen import Norm

WIDTHS: tuple[int, ...] = (12, 24, 48)
"""Channels of the three stages; the stem has those of the first."""

STRIDES = {
    8: {"1x1": (2, 2, 2), "2x2": (2, 2, 1), "4x4": (2, 1, 1)},
    28: {"1x1": (4, 4, 2), "2x2": (4, 4, 1), "4x4": (2, 2, 2), "7x7": (2, 2, 1)},
    32: {"1x1": (4, 4, 2), "2x2": (4, 4, 1), "4x4": (2, 2, 2), "8x8": (2, 2, 1)},
}
"""Strides of the stages, by the size of the image and that of the last feature map."""


def patches(x: jax.Array, stride: int) -> jax.Array:
    """The zero-padded 3x3 surroundings of every `stride`-th pixel: (N, H, W, C) -> (N, H / stride,
    W / stride, 9 C)."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        padded[:, i : i + height : stride, j : j + width : stride]
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(shifted, axis=-1)


class Unit(nn.Module):
    """A convolution without bias, its normalization and relu, or the layer that is both.

    The convolution is written as patches times a matrix. On a CPU `jax.lax.conv` is several times
    slower than this once it stands inside `vmap` and `scan`.

    Attributes:
        layer: the normalization.
        features: channels of the output.
        stride: of the convolution.
        size: of its kernel, 3 or 1.
        activate: whether an activation follows.
        noise: in training a normal number with this standard deviation is added to the output of
            the normalization, one for each image and each of `NUM_GROUPS` groups of channels.
    """

    layer: Layer
    features: int
    stride: int = 1
    size: int = 3
    activate: bool = True
    noise: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, done: jax.Array, **options: Any) -> jax.Array:
        layer = self.layer if self.activate or not self.layer.activates else NO_ACTIVATION
        x = patches(x, self.stride) if self.size == 3 else x[:, :: self.stride, :: self.stride]
        kernel_init = (
            nn.initializers.he_normal() if self.size == 3 else nn.initializers.lecun_normal()
        )
        dense: Any = self.layer.dense(
            features=self.features, use_bias=False, kernel_init=kernel_init, name="conv"
        )  # type: ignore[call-arg]
        if layer.schedule and train:
            options = {**layer.schedule(done), **options}
        options = {"use_running_average": not train, "activation": layer.activation, **options}
        if layer.method.in_front is None:
            y = Norm(layer.method, name="norm")(dense(x), **options)
        else:
            y = Norm(layer.method, layer=dense, name="norm")(x, **options)
        if train and self.noise:
            y = self._noisy(y)
        return nn.relu(y) if self.activate and not layer.activates else y

    def _noisy(self, y: jax.Array) -> jax.Array:
        drawn = jax.random.normal(self.make_rng("noise"), (len(y), 1, 1, NUM_GROUPS), y.dtype)
        return y + self.noise * jnp.repeat(drawn, y.shape[-1] // NUM_GROUPS, axis=-1)


class Block(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + norm(x W)), where W is a 1x1 convolution with the
    stride of the block; without the residual path relu(norm(conv(relu(norm(conv(x))))))."""

    layer: Layer
    features: int
    stride: int
    residual: bool = True
    noise: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, **now: Any) -> jax.Array:
        unit = partial(Unit, self.layer, self.features, noise=self.noise)
        y = unit(self.stride, name="unit_1")(x, **now)
        y = unit(activate=not self.residual, name="unit_2")(y, **now)
        if not self.residual:
            return y
        shortcut = unit(self.stride, size=1, activate=False, name="shortcut")(x, **now)
        return nn.relu(y + shortcut)


class ResidualNet(nn.Module):
    """Stem, a block per stage, mean over the last map, linear classifier: ten convolutions, each
    normalized.

    Attributes:
        layers: the normalization at each of the widths 12, 24 and 48.
        strides: the stride of each stage, as in `STRIDES`.
        num_classes: size of the output; None for the mean over the last map alone.
        residual: whether blocks have their residual path.
        noise: see `Unit`; its random numbers are those of the stream "noise".
    """

    layers: tuple[Layer, ...]
    strides: tuple[int, ...] = STRIDES[8]["1x1"]
    num_classes: int | None = 10
    residual: bool = True
    noise: float = 0.0

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, done: jax.Array | float = 1.0, **options: Any
    ) -> jax.Array:
        """Logits of images x; `done` is the finished part of the training, for layers with a
        schedule, and `options` are those of every normalization."""
        now = {"train": train, "done": jnp.asarray(done), **options}
        x = Unit(self.layers[0], WIDTHS[0], noise=self.noise, name="stem")(x, **now)
        for layer, features, stride in zip(self.layers, WIDTHS, self.strides, strict=True):
            x = Block(layer, features, stride, self.residual, self.noise)(x, **now)
        features = x.mean(axis=(1, 2))
        return features if self.num_classes is None else nn.Dense(self.num_classes)(features)
