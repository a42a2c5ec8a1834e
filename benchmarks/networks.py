"""A training step of whole networks with our normalization layers and with Flax's.

    python -m benchmarks.networks  # ResNet-50 and a U-Net: about 3 minutes on 2 cores
    python -m benchmarks.networks --networks unet --batch 2 --image 32

The two differ in the module that their norm classes come from, and in nothing else; they start from
the same parameters. Prints step time, peak memory, compile time and the loss of the first step;
writes networks.json. `--seconds 0` measures what compiling costs and no steps but one round.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.typing import DTypeLike
from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

import jaxnorm.linen
from benchmarks.files import write
from benchmarks.measure import compile_times
from benchmarks.options import count, folder, number, positive
from benchmarks.resnet import ResNet
from benchmarks.timing import (
    Call,
    about,
    compiled,
    heading,
    interleaved,
    progress_bar,
    restart_with_environment,
)

NORMS: dict[str, Any] = {"jaxnorm": jaxnorm.linen, "flax.linen": flax.linen}
"""Where the norm classes come from."""


def resnet50(norms: Any, dtype: DTypeLike) -> ResNet:
    """ResNet-50 with batch norm, whose class `norms` has, for 1000 classes."""
    return ResNet(partial(norms.BatchNorm, dtype=dtype), partial(nn.Conv, dtype=dtype))


class UNet(nn.Module):
    """A small U-Net with group norm, from an image to one of as many channels."""

    norms: ModuleType
    dtype: DTypeLike
    widths: tuple[int, ...] = (64, 128, 256)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(nn.Conv, kernel_size=(3, 3), dtype=self.dtype)
        norm = partial(self.norms.GroupNorm, dtype=self.dtype)
        channels, skips = x.shape[-1], []
        x = conv(self.widths[0])(x)
        for width in self.widths:
            x = conv(width)(nn.silu(norm()(x)))
            skips.append(x)
            x = conv(width, strides=2)(nn.silu(norm()(x)))
        for width, skip in zip(self.widths[::-1], skips[::-1], strict=True):
            x = jnp.concatenate(
                [jax.image.resize(x, (*skip.shape[:-1], x.shape[-1]), "nearest"), skip], -1
            )
            x = conv(width)(nn.silu(norm()(x)))
        return conv(channels)(nn.silu(norm()(x))).astype(jnp.float32)


class Network(NamedTuple):
    """A network and the examples to train it with."""

    make: Callable[[ModuleType, DTypeLike], nn.Module]
    target: Callable[[jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    batch: int
    image: int


NETWORKS = {
    "resnet50": Network(
        resnet50,
        lambda images: jnp.arange(images.shape[0]),
        optax.losses.softmax_cross_entropy_with_integer_labels,
        batch=8,
        image=64,
    ),
    "unet": Network(
        UNet, lambda images: jnp.roll(images, 1, 1), optax.losses.squared_error, batch=4, image=64
    ),
}


class Measured(NamedTuple):
    """A network with the norms of one library; bytes are those of arguments, results and
    temporaries together, and compilations are measured in CPU seconds of all threads."""

    network: str
    norms: str
    batch: int
    image: int
    dtype: str
    seconds: list[float]
    peak_bytes: int
    compile_seconds: list[float]
    loss: float


def measure(
    name: str,
    *,
    dtype: str,
    batch: int | None,
    image: int | None,
    rounds: int,
    seconds: float,
    compiles: int,
    on_part: Callable[[str], object],
) -> list[Measured]:
    """Times the training step of one network with all norms, and samples its compilation
    `compiles` times; `on_part` hears what comes next."""
    network = NETWORKS[name]
    batch, image = batch or network.batch, image or network.image
    images = jax.random.normal(jax.random.key(0), (batch, image, image, 3))
    optimizer = optax.sgd(0.01, momentum=0.9)
    variables = dict(jax.jit(network.make(jaxnorm.linen, dtype).init)(jax.random.key(1), images))
    found, calls, steps = {}, {}, {}
    for norms, module in NORMS.items():
        on_part(f"{name}: compiling with {norms}")
        model = network.make(module, dtype)
        state = jax.tree.map(jnp.copy, (variables, optimizer.init(variables["params"])))
        # Shapes, because the training donates its state.
        shapes = jax.eval_shape(lambda *args: args, state, images, network.target(images))
        steps[norms] = partial(_step, model, optimizer, network.loss), shapes
        step, _ = compiled(steps[norms][0], *shapes, donate_argnums=0)
        memory = step.memory_analysis()
        peak = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        )
        training = _Training(step, state, images, network.target(images))
        loss = float(training.run(0))
        found[norms] = Measured(
            name,
            norms,
            batch,
            image,
            dtype,
            [],
            peak - memory.alias_size_in_bytes,
            [],
            loss,
        )
        calls[norms] = Call(training.run)
    on_part(f"{name}: training")
    times = interleaved(calls, rounds=rounds, seconds=seconds)
    on_part(f"{name}: compiling {compiles} times")
    samples = compile_times(steps, compiles)
    return [
        one._replace(seconds=times[norms], compile_seconds=samples[norms]["cpu"])
        for norms, one in found.items()
    ]


def _step(
    model: nn.Module,
    optimizer: Any,
    loss: Callable[..., jax.Array],
    state: Any,
    images: jax.Array,
    target: jax.Array,
) -> tuple[Any, jax.Array]:
    """Variables and optimizer state after a step, and the loss before it."""
    variables, optimizer_state = state
    others = {name: value for name, value in variables.items() if name != "params"}

    def mean_loss(params: Any) -> tuple[jax.Array, Any]:
        y, updated = model.apply({"params": params, **others}, images, mutable=list(others))
        return loss(y, target).mean(), updated

    (value, updated), grads = jax.value_and_grad(mean_loss, has_aux=True)(variables["params"])
    updates, optimizer_state = optimizer.update(grads, optimizer_state, variables["params"])
    return (
        {"params": optax.apply_updates(variables["params"], updates), **updated},
        optimizer_state,
    ), value


class _Training:
    """A training that continues from call to call, since a step donates its memory."""

    def __init__(self, step: Callable[..., Any], state: Any, images: jax.Array, target: jax.Array):
        self.step, self.state, self.examples = step, state, (images, target)

    def run(self, _: int) -> jax.Array:
        self.state, loss = self.step(self.state, *self.examples)
        return loss


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns
    its exit status."""
    args = vars(_parser().parse_args(argv))
    networks, output = args.pop("networks"), args.pop("output")
    console = Console(width=None if sys.stdout.isatty() else 150)
    facts = about(("jaxnorm", "jax", "jaxlib", "flax", "optax", "numpy"))
    measured: list[Measured] = []
    interrupted = False
    try:
        with progress_bar(console) as progress:
            task, done = (
                progress.add_task("", total=len(networks) * (len(NORMS) + 2)),
                itertools.count(),
            )
            for name in networks:
                on_part = partial(_show, progress, task, done)
                measured += measure(name, on_part=on_part, **args)
            progress.update(task, completed=next(done))
    except KeyboardInterrupt:
        console.print("Interrupted: what was measured follows.")
        interrupted = True
    if not measured:
        return 130
    write(
        output / "networks.json",
        json.dumps({"about": facts, "networks": [one._asdict() for one in measured]}, indent=1),
    )
    console.print(heading(facts), highlight=False)
    _print(console, measured)
    console.print(f"In {output}: networks.json", highlight=False)
    return 130 if interrupted else 0


def _show(progress: Progress, task: TaskID, done: Iterator[int], description: str) -> None:
    progress.update(task, description=description, completed=next(done))


def _print(console: Console, measured: Sequence[Measured]) -> None:
    table = Table(
        box=box.SIMPLE_HEAD,
        caption="ratio: our time over Flax's, median over the rounds or compilations",
        caption_justify="left",
    )
    for head in (
        "network",
        "x",
        "dtype",
        "norms",
        "step ms",
        "ratio",
        "peak MB",
        "compile CPU s",
        "ratio",
        "loss",
    ):
        table.add_column(head, no_wrap=True)
    for one in measured:
        flax = next(
            other
            for other in measured
            if other.network == one.network and other.norms == "flax.linen"
        )
        ratio = np.median(np.divide(one.seconds, flax.seconds))
        numbers = (
            f"{np.percentile(one.seconds, 25) * 1e3:.1f}",
            f"{ratio:.2f}",
            f"{one.peak_bytes / 1e6:.0f}",
        )
        table.add_row(
            one.network,
            f"{one.batch}x{one.image}x{one.image}x3",
            one.dtype,
            one.norms,
            *numbers,
            *_compilation(one, flax),
            f"{one.loss:.5f}",
        )
    console.print(table, highlight=False)


def _compilation(one: Measured, flax: Measured) -> tuple[str, str]:
    """The median of its CPU seconds, and of the ratios to those of Flax's."""
    if not one.compile_seconds:
        return "–", "–"
    ratio = np.median(np.divide(one.compile_seconds, flax.compile_seconds))
    return f"{np.median(one.compile_seconds):.1f}", f"{ratio:.2f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.networks",
        description="A training step of whole networks with our norms and with Flax's.",
    )
    add = parser.add_argument
    add(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        default=list(NETWORKS),
        metavar="NETWORK",
        help=f"of {', '.join(NETWORKS)}",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the activations (default: %(default)s)",
    )
    add(
        "--batch",
        type=positive,
        metavar="N",
        help="images per step (default: 8 for resnet50, 4 for unet)",
    )
    add("--image", type=positive, metavar="N", help="height and width (default: 64)")
    add("--rounds", type=positive, default=9, metavar="N", help="default: %(default)s")
    add(
        "--seconds",
        type=number(at_least=0),
        default=40,
        metavar="S",
        help="per network, after which no round starts (default: %(default)s)",
    )
    add(
        "--compiles",
        type=count,
        default=3,
        metavar="N",
        help="times that each step is compiled, by turns with the other (default: %(default)s)",
    )
    add(
        "--output",
        type=folder,
        default="results/networks",
        metavar="FOLDER",
        help="default: %(default)s",
    )
    return parser


if __name__ == "__main__":
    restart_with_environment()
    raise SystemExit(main())
