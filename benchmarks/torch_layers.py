"""Torch's functions of the same layers and its passes over memory, as calls to time."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.floors import Calls
from benchmarks.libraries import TOKEN_METHODS
from benchmarks.timing import Call


def torch_calls(
    torch: Any, method: str, xs: Sequence[jax.Array], cts: Sequence[jax.Array], num_groups: int
) -> Calls:
    """Calls of a method in both layouts, and of passes over memory; `torch` is the module."""
    gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    dtype = getattr(torch, xs[0].dtype.name)
    images = xs[0].ndim == 4 and method not in TOKEN_METHODS
    torch.backends.cudnn.benchmark = True

    def to_torch(ts: Sequence[jax.Array]) -> list[Any]:
        t = torch.from_numpy(np.array(ts[0], np.float32)).to(
            device="cuda" if gpu else "cpu", dtype=dtype
        )
        return [t.clone() for _ in ts]

    def on_inputs(f: Callable[[Any, Any], Any], xs: list[Any], cts: list[Any]) -> Call:
        return Call(
            lambda i: f(xs[i % len(xs)], cts[i % len(xs)]),
            lambda _: torch.cuda.synchronize() if gpu else None,
        )

    last = to_torch(xs), to_torch(cts)
    flat = [x.flatten() for x in last[0]], [ct.flatten() for ct in last[1]]
    calls = {
        ("torch", "copy"): on_inputs(lambda x, ct: x.clone(), *flat),
        ("torch", "sum"): on_inputs(lambda x, ct: torch.sum(x, dtype=torch.float32), *flat),
        ("torch", "dot"): on_inputs(torch.dot, *flat),
        ("torch", "ternary"): on_inputs(lambda x, ct: torch.add(ct, x, alpha=2), *flat),
    }
    layouts = {"torch_last": last}
    if images:  # torch counts channels second, wherever they are in memory
        second = [[t.movedim(-1, 1) for t in ts] for ts in last]
        layouts["torch_last"] = second[0], second[1]
        layouts["torch_first"] = (
            [x.contiguous() for x in second[0]],
            [ct.contiguous() for ct in second[1]],
        )
    for name, (tensors, cotangents) in layouts.items():
        layer = _layer(torch, method, tensors[0], num_groups)
        if layer is None:
            break
        # Group norm may hand channels first to a network that has them last, which then needs a
        # copy.
        memory_format = (
            torch.channels_last if images and name == "torch_last" else torch.contiguous_format
        )
        forward = partial(_forward, layer[0], memory_format)
        tensors = [x.requires_grad_() for x in tensors]
        calls[name, "forward"] = on_inputs(
            lambda x, ct, forward=forward: forward(x), tensors, cotangents
        )
        calls[name, "step"] = on_inputs(
            partial(_step, torch, forward, layer[1]), tensors, cotangents
        )
    return calls


def _forward(f: Callable[[Any], Any], memory_format: Any, x: Any) -> Any:
    return f(x).contiguous(memory_format=memory_format)


def _step(
    torch: Any, forward: Callable[[Any], Any], params: tuple[Any, ...], x: Any, ct: Any
) -> Any:
    y = forward(x)
    return y, torch.autograd.grad(y, (x, *params), ct)


def _layer(
    torch: Any, method: str, x: Any, num_groups: int
) -> tuple[Callable[[Any], Any], tuple[Any, ...]] | None:
    """Torch's function of x, with running statistics in batch norm, and its parameters."""
    functional, channels = torch.nn.functional, x.shape[-1 if method in TOKEN_METHODS else 1]
    # Where x is narrower, batch norm takes float32 parameters, the others those of x's dtype.
    dtype = torch.float32 if method == "batch" else x.dtype
    options = {"device": x.device, "dtype": dtype}
    weight, bias = (
        torch.ones(channels, **options).requires_grad_(),
        torch.zeros(channels, **options).requires_grad_(),
    )
    mean, var = torch.zeros(channels, **options), torch.ones(channels, **options)
    f = {
        "batch": lambda x: functional.batch_norm(x, mean, var, weight, bias, training=True),
        "group": lambda x: functional.group_norm(x, num_groups, weight, bias),
        "instance": lambda x: functional.instance_norm(x, weight=weight, bias=bias),
        "token_layer": lambda x: functional.layer_norm(x, (channels,), weight, bias),
        "rms": lambda x: functional.rms_norm(x, (channels,), weight, 1e-6),
    }.get(method)
    return None if f is None else (f, (weight,) if method == "rms" else (weight, bias))
