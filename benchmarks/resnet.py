"""ResNet-50 and its relatives of other depth and width, with norm layers of the caller's choice."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class Bottleneck(nn.Module):
    """Residual block of ResNet-50: 1x1, 3x3 and 1x1 convolutions beside the identity or, where
    shapes differ, a projection.

    Attributes:
        norm: makes a norm layer, which is called as `layer(x, use_running_average=...)`.
        conv: makes a convolution from features, kernel size and strides.
        width: channels inside; outside there are four times as many.
        stride: of the 3x3 convolution.
        symmetric: pad as `ResNet` says.
    """

    norm: Callable[..., Any]
    conv: Callable[..., nn.Module]
    width: int
    stride: int
    symmetric: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv, inference = partial(self.conv, use_bias=False), not train
        y = nn.relu(self.norm()(conv(self.width, (1, 1))(x), use_running_average=inference))
        y = conv(self.width, (3, 3), self.stride, padding=1 if self.symmetric else "SAME")(y)
        y = nn.relu(self.norm()(y, use_running_average=inference))
        # A block begins as the identity.
        norm = self.norm(scale_init=nn.initializers.zeros)
        y = norm(conv(4 * self.width, (1, 1))(y), use_running_average=inference)
        if x.shape != y.shape:
            x = self.norm()(
                conv(4 * self.width, (1, 1), self.stride)(x), use_running_average=inference
            )
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Residual network for images: by default ResNet-50 for 1000 classes.

    Attributes:
        norm: makes a norm layer; see `Bottleneck`.
        conv: makes a convolution; see `Bottleneck`.
        stages: number of blocks in each stage. (3, 4, 23, 3) is ResNet-101, (3, 8, 36, 3)
            ResNet-152.
        width: channels of the stem, and inside the blocks of the first stage; they double from
            stage to stage.
        num_classes: size of the output.
        symmetric: pad both sides alike, as PyTorch does. With a stride of 2 and an even size,
            Flax's SAME pads one less in front than behind.
    """

    norm: Callable[..., Any]
    conv: Callable[..., nn.Module] = nn.Conv
    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    num_classes: int = 1000
    symmetric: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = True) -> jax.Array:
        padding, pool = (3, [(1, 1), (1, 1)]) if self.symmetric else ("SAME", "SAME")
        x = self.conv(self.width, (7, 7), 2, padding=padding, use_bias=False)(x)
        x = nn.relu(self.norm()(x, use_running_average=not train))
        x = nn.max_pool(x, (3, 3), (2, 2), pool)
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                width = self.width * 2**stage
                x = Bottleneck(self.norm, self.conv, width, stride, self.symmetric)(x, train=train)
        return nn.Dense(self.num_classes)(x.mean((1, 2), dtype=jnp.float32))


def torchvision_names(stages: tuple[int, ...] = (3, 4, 6, 3)) -> dict[str, str]:
    """The modules of `ResNet` with `BatchNorm`, by torchvision's names for them.

    `jaxnorm.convert.load_model` takes them; the logits agree with `symmetric=True`.
    """
    names = {"Conv_0": "conv1", "BatchNorm_0": "bn1", "Dense_0": "fc"}
    blocks = [(stage, block) for stage, n in enumerate(stages, 1) for block in range(n)]
    for i, (stage, block) in enumerate(blocks):
        ours, theirs = f"Bottleneck_{i}", f"layer{stage}.{block}"
        for k in range(3):
            names[f"{ours}/Conv_{k}"] = f"{theirs}.conv{k + 1}"
            names[f"{ours}/BatchNorm_{k}"] = f"{theirs}.bn{k + 1}"
        if block == 0:  # the projection
            names[f"{ours}/Conv_3"] = f"{theirs}.downsample.0"
            names[f"{ours}/BatchNorm_3"] = f"{theirs}.downsample.1"
    return names
