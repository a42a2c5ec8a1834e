"""How the benchmarks take time: several computations side by side in one process, in rounds, on
inputs that are not cached."""

import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ENVIRONMENT = {
    # glibc hands large arrays back to the system, and every new one then costs thousands of page
    # faults, more than normalization itself. All libraries alike keep them instead.
    "MALLOC_TOP_PAD_": str(4 * 10**9),
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(8 * 10**9),
    # JAX would take most of a GPU's memory, and other libraries need some.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    # A program found on disk would pass for one that was compiled.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}

ROTATED_BYTES = 64 * 2**20
"""Inputs are rotated until they come to so many bytes, more than last-level caches hold: an input
is cold when it is used."""

MAX_ROTATED = 128
"""But there are at most so many inputs, since tiny ones cost as much as their dispatch whether
cached or not."""

BEST_OF = 3
"""Calls a visit, of which the fastest counts: the first pays for what the computation before left
in the caches."""

VISIT_SECONDS = 2e-3
"""Short calls are repeated for so long in a visit: three of some microseconds are easily all
disturbed."""

MIN_ROUNDS = 3

ENQUEUED_SECONDS = 5e-3
"""On an accelerator calls are enqueued for so long before waiting for them, so that launches
overlap with work."""


Key = TypeVar("Key", bound=Hashable)


class Call(NamedTuple):
    """A computation to time: `run(i)` starts it on the i-th input, counted around; `wait` returns
    when its result is there."""

    run: Callable[[int], Any]
    wait: Callable[[Any], object] = jax.block_until_ready


def restart_with_environment() -> None:
    """Starts the program again with `ENVIRONMENT`, which takes effect only at the start."""
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, sys.orig_argv, os.environ | ENVIRONMENT)


def interleaved(
    calls: Mapping[Key, Call], *, rounds: int, seconds: float, at_least: int = MIN_ROUNDS
) -> dict[Key, list[float]]:
    """Seconds of each call in each round.

    Every round visits every call, so that what slows the machine down for a while slows all of them
    down; their order is drawn anew, so that none always runs after the same other. After `seconds`,
    and `at_least` so many rounds, no other round starts.
    """
    enqueued = {name: _enqueued(call) for name, call in calls.items()}
    tries = {name: _tries(call, enqueued[name]) for name, call in calls.items()}
    times: dict[Key, list[float]] = {name: [] for name in calls}
    order, random_order = list(calls), random.Random(0)
    end, index = time.perf_counter() + seconds, 0
    for done in range(rounds):
        if done >= at_least and time.perf_counter() > end:
            break
        random_order.shuffle(order)
        for name in order:
            best = float("inf")
            for _ in range(tries[name]):
                best = min(best, _seconds(calls[name], enqueued[name], index))
                index += enqueued[name]
            times[name].append(best)
    return times


def _enqueued(call: Call) -> int:
    """How many calls to enqueue at a time; also warms the call up."""
    _seconds(call, 1, 0)
    if jax.default_backend() == "cpu":
        return 1
    return int(np.clip(ENQUEUED_SECONDS / _seconds(call, 1, 1), 1, 200))


def _tries(call: Call, enqueued: int) -> int:
    """How often to try a call in a visit, of which the fastest counts."""
    seconds = enqueued * min(_seconds(call, enqueued, index) for index in range(BEST_OF))
    return int(np.clip(VISIT_SECONDS / seconds, BEST_OF, 100))


def _seconds(call: Call, count: int, index: int) -> float:
    start = time.perf_counter()
    out = None
    for i in range(index, index + count):
        out = call.run(i)
    call.wait(out)
    return (time.perf_counter() - start) / count


def normal(shape: Sequence[int], dtype: str, seed: int) -> jax.Array:
    """An array of mean 1/2 and variance 1."""
    return (jax.random.normal(jax.random.key(seed), shape) + 0.5).astype(dtype)


def copies(x: jax.Array) -> list[jax.Array]:
    """Equal arrays at different places, as many as it takes to fill the caches."""
    count = int(np.clip(-(-ROTATED_BYTES // x.nbytes), 1, MAX_ROTATED))
    return [x, *(jnp.array(x, copy=True) for _ in range(count - 1))]


def compiled(f: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, float]:
    """f compiled for these arguments, and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    return jax.jit(f, **options).lower(*args).compile(), time.perf_counter() - start


def about(packages: Sequence[str]) -> dict[str, Any]:
    """What a figure has to be published with: device, date, command, commit and versions."""
    device = jax.devices()[0]
    return {
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "cpu_count": (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "commit": _commit(),
        "versions": (
            {"python": platform.python_version()}
            | {name: v for name in packages if (v := _version(name))}
        ),
    }


def heading(about: Mapping[str, Any]) -> str:
    """`about` in a line, for titles of tables."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['device']} ({about['cpu_count']} cores), {about['date'][:10]}, commit "
        f"{about['commit']}; {versions}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def progress_bar(console: Console) -> Progress:
    """What is measured now, how much is done and how long the rest takes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, speed_estimate_period=3600)
