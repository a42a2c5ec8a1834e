"""Measures a normalization layer at one shape in all libraries: time, memory and compilation."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.cases import FLAX, INTERVAL_COUNT, KINDS, OURS, Case
from benchmarks.floors import Calls, floors, least_passes, passes
from benchmarks.libraries import LIBRARIES, Layer
from benchmarks.shapes import Shape
from benchmarks.timing import Call, compiled, copies, interleaved, normal
from benchmarks.torch_layers import torch_calls

Step = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function to compile, and its arguments."""


def measure(
    method: str,
    shape: Shape,
    dtype: str,
    libraries: Sequence[str],
    torch: Any = None,
    *,
    rounds: int,
    seconds: float,
    compiles: int = 0,
) -> Case:
    """Compiles and times one method at one shape in all libraries; `torch` is its module.

    The times are those of `interleaved` with `rounds` and `seconds`. Our compilation and that of
    flax.linen are sampled `compiles` times.
    """
    dims = shape.on(jax.default_backend())
    x, ct = normal(dims, dtype, 0), normal(dims, dtype, 1)

    @cache
    def arrays(channels_last: bool) -> tuple[list[jax.Array], list[jax.Array]]:
        if channels_last:
            return copies(x), copies(ct)
        return copies(jnp.moveaxis(x, -1, 1)), copies(jnp.moveaxis(ct, -1, 1))

    case = Case(method, shape.name, dims, dtype, {}, {}, {}, {})
    calls: Calls = passes(*arrays(True))
    steps: dict[str, Step] = {}
    for name in libraries:
        x_type = jax.ShapeDtypeStruct(dims, dtype)
        layer = LIBRARIES[name].layer(method, x_type, num_groups=shape.num_groups)
        if layer is not None:
            new, steps[name] = _layer_calls(case, name, layer, *arrays(layer.channels_last))
            calls |= new
    if torch is not None:
        calls |= torch_calls(torch, method, *arrays(True), shape.num_groups)
    times = interleaved(calls, rounds=rounds, seconds=seconds, at_least=INTERVAL_COUNT)
    for name, kind in calls:
        if kind in KINDS:
            case.seconds.setdefault(name, {})[kind] = times[name, kind]
    case.seconds.update(floors(times, least_passes(method, dims, x.dtype.itemsize)))
    if compiles:
        compared = {name: steps[name] for name in (OURS, FLAX[0]) if name in steps}
        case.compile_seconds.update(compile_times(compared, compiles))
    return case


def compile_times(steps: Mapping[str, Step], count: int) -> dict[str, dict[str, list[float]]]:
    """CPU seconds of this process and seconds on the clock that tracing and compiling take, by
    turns. What JAX remembers of earlier samples is forgotten before each."""
    times = {name: {"cpu": [], "wall": []} for name in steps}
    for _ in range(count):
        for name, (f, args) in steps.items():
            jax.clear_caches()
            start = time.process_time()
            _, wall = compiled(f, *args)
            times[name]["cpu"].append(time.process_time() - start)
            times[name]["wall"].append(wall)
    return times


def _layer_calls(
    case: Case, name: str, layer: Layer, xs: list[jax.Array], cts: list[jax.Array]
) -> tuple[Calls, Step]:
    """Compiles a layer; its calls and its step, with memory written into `case`."""

    def apply(params, state, x):
        y, state = layer.train(params, state, x)
        return y.astype(x.dtype), state

    def step(params, state, x, ct):
        y, vjp, state = jax.vjp(
            lambda *args: apply(args[0], state, args[1]), params, x, has_aux=True
        )
        # A cotangent comes after y: passes of forward and backward cannot be one.
        _, ct = lax.optimization_barrier((y, ct))
        return y, state, vjp(ct)

    def backward(params, state, x, ct):
        return jax.vjp(lambda *args: jax.nn.relu(apply(args[0], state, args[1])[0]), params, x)[1](
            ct
        )

    def kept(params, state, x):
        vjp = jax.vjp(lambda *args: apply(args[0], state, args[1])[0], params, x)[1]
        return list({id(t): t for t in jax.tree.leaves(vjp)}.values())

    x, ct = xs[0], cts[0]
    args = jax.tree.map(lambda t: jnp.ones(t.shape, t.dtype), (layer.parameters, layer.state))
    run_forward, _ = compiled(apply, *args, x)
    run_step, _ = compiled(step, *args, x, ct)
    memory = compiled(backward, *args, x, ct)[0].memory_analysis()
    case.temporary[name] = memory.temp_size_in_bytes / x.nbytes
    residuals = jax.eval_shape(kept, *args, x)
    case.kept[name] = sum(t.size * t.dtype.itemsize for t in residuals) / x.nbytes
    return {
        (name, "forward"): Call(lambda i: run_forward(*args, xs[i % len(xs)])),
        (name, "step"): Call(lambda i: run_step(*args, xs[i % len(xs)], cts[i % len(xs)])),
    }, (step, (*args, x, ct))
