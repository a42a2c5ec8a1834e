"""A small residual network for 8x8 images whose normalization is chosen from outside."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnorm import Method
from jaxnorm.linen import Norm

WIDTHS: tuple[int, ...] = (12, 24, 48)
"""Channels of the three stages; the stem has those of the first."""

STRIDES = {"1x1": (2, 2, 2), "2x2": (2, 2, 1)}
"""Strides of the stages, by the size of the last feature map: 8 -> 4 -> 2 -> 1 or 8 -> 4 -> 2 -> 2."""

MOMENTUM = 0.9
"""Weight of the old value in the running statistics, per step."""


def patches(x: jax.Array, stride: int) -> jax.Array:
    """The zero-padded 3x3 surroundings of every `stride`-th pixel: (N, H, W, C) -> (N, H / stride, W / stride, 9 C)."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1)


class Conv3x3(nn.Module):
    """3x3 convolution without bias, written as patches times a matrix.

    On a CPU `jax.lax.conv` is several times slower than this once it stands inside `vmap` and `scan`.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.Dense(self.features, use_bias=False, kernel_init=nn.initializers.he_normal())
        return dense(patches(x, self.stride))


class Block(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + norm(x W)), where W is a 1x1 convolution with the stride of the block."""

    norm: Callable[..., nn.Module]
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = Conv3x3(self.features, self.stride)(x)
        y = nn.relu(self.norm(self.features, name="norm_1")(y, use_running_average=not train))
        y = Conv3x3(self.features)(y)
        y = self.norm(self.features, name="norm_2")(y, use_running_average=not train)
        shortcut = nn.Dense(self.features, use_bias=False)(x[:, :: self.stride, :: self.stride])
        shortcut = self.norm(self.features, name="norm_shortcut")(shortcut, use_running_average=not train)
        return nn.relu(y + shortcut)


class ResidualNet(nn.Module):
    """Stem, a block per stage, mean over the last map, linear classifier: ten convolutions, each normalized.

    Attributes:
        methods: the normalization at each of the widths 12, 24 and 48.
        strides: the stride of each stage, a value of `STRIDES`.
        num_classes: size of the output.
    """

    methods: tuple[Method, ...]
    strides: tuple[int, ...] = STRIDES["1x1"]
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        by_width = dict(zip(WIDTHS, self.methods, strict=True))

        def norm(features: int, name: str) -> Norm:
            return Norm(by_width[features], momentum=MOMENTUM, name=name)

        x = Conv3x3(WIDTHS[0])(x)
        x = nn.relu(norm(WIDTHS[0], name="norm_stem")(x, use_running_average=not train))
        for features, stride in zip(WIDTHS, self.strides, strict=True):
            x = Block(norm, features, stride)(x, train=train)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))
