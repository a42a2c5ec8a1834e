"""What could hang runs in processes of its own, which end by themselves: two processes that train
as one, and large means on some devices only, which make devices disagree on whether a second
reduction is needed.

As a script, this file is one of those processes.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm import linen, methods, norm

LIMIT = 120
"""Seconds after which a process ends itself."""

DEVICES, ROWS = 8, 128
MIRRORED = [[0, 7], [1, 6], [2, 5], [3, 4]]
"""Pairs of devices of which each spans both processes."""


def pairs(x, axis_name):
    """Batch normalization over pairs of devices; where the batch is whole, over the rows that they
    would have."""
    if axis_name:
        return norm(x, methods.batch_norm(), axis_name=axis_name, axis_index_groups=MIRRORED)[0]
    order = sum(MIRRORED, [])
    y = norm(
        x.reshape(DEVICES, -1, x.shape[-1])[np.array(order)].reshape(x.shape),
        methods.ghost_batch_norm(len(MIRRORED)),
    )[0]
    return y.reshape(DEVICES, -1, x.shape[-1])[np.argsort(order)].reshape(x.shape)


class Net(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        wide = {"param_dtype": jnp.float64}
        batch = linen.BatchNorm(
            False, axis_name=self.axis_name, momentum=0.9, force_float32_reductions=False, **wide
        )
        ghosts = methods.ghost_batch_norm(ghost_size=ROWS // DEVICES // 2, momentum=None)
        x = nn.relu(batch(nn.Dense(8, **wide)(x)))
        x = linen.GroupNorm(2, **wide)(nn.Dense(8, **wide)(x))
        x = nn.relu(linen.Norm(ghosts, **wide)(x))
        return nn.Dense(1, **wide)(
            pairs(nn.Dense(8, **wide)(x), None if self.is_initializing() else self.axis_name)
        )


def placed(x, mesh, spec):
    """x on the devices of all processes, each of which has all of x."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


def training(context):
    """Losses, parameters and running statistics of three steps of gradient descent, as this process
    has them."""
    rng = np.random.default_rng(0)
    data = [rng.normal(3, 1, (3, ROWS, 6)), rng.normal(size=(3, ROWS, 1))]
    axis_name, net = ("data", Net("data")) if context == "pmap" else (None, Net())
    variables = jax.tree.map(np.asarray, jax.jit(Net().init)(jax.random.key(0), data[0][0]))
    params, stats, losses = variables["params"], variables["batch_stats"], []

    def step(params, stats, x, y):
        def loss(params):
            out, new = net.apply({"params": params, "batch_stats": stats}, x, mutable="batch_stats")
            return jnp.square(out - y).mean(), new["batch_stats"]

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        value, grads = lax.pmean((value, grads), axis_name) if axis_name else (value, grads)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), new

    if context == "pmap":
        step = jax.pmap(step, "data", in_axes=(None, None, 0, 0))
        mine = slice(
            jax.process_index() * jax.local_device_count(),
            (jax.process_index() + 1) * jax.local_device_count(),
        )
        data = [t.reshape(3, DEVICES, -1, t.shape[-1])[:, mine] for t in data]
    elif context == "jit":
        mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
        data = [placed(t, mesh, P(None, "data")) for t in data]
        step = jax.jit(step, out_shardings=NamedSharding(mesh, P()))
    else:
        step = jax.jit(step)
    for i in range(3):
        out = step(params, stats, *(t[i] for t in data))
        if context == "pmap":  # equal on all devices to the bit
            out = jax.tree.map(lambda t: [np.asarray(s.data) for s in t.addressable_shards], out)
            out = jax.tree.map(lambda t: t[0][0], out, is_leaf=lambda t: isinstance(t, list))
        value, params, stats = jax.tree.map(np.asarray, out)
        losses.append(value)
    return jax.tree.leaves((losses, params, stats))


def large_means():
    """A mean of 1e4 standard deviations in some of the sets only, in float32."""
    x = np.random.default_rng(1).normal(size=(DEVICES, 4, 6)).astype("f4")
    x[[0, 1, 2, 3, 5, 7]] += np.float32(1e4)
    method, halves, columns = (
        methods.batch_norm(),
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[0, 4], [1, 5], [2, 6], [3, 7]],
    )
    mine = slice(
        jax.process_index() * jax.local_device_count(),
        (jax.process_index() + 1) * jax.local_device_count(),
    )
    for groups in (halves, MIRRORED):
        y = jax.pmap(
            lambda x, g=groups: norm(x, method, axis_name="i", axis_index_groups=g)[0], "i"
        )(x[mine])
        check(y, x, groups, first=mine.start)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("i", "j"), axis_types=(AxisType.Auto,) * 2)
    for name, groups in (("j", halves), ("i", columns), (("i", "j"), [list(range(DEVICES))])):
        local = lambda x, name=name: norm(x[0], method, axis_name=name)[0][None]  # noqa: E731
        f = jax.shard_map(local, mesh=mesh, in_specs=P(("i", "j")), out_specs=P(("i", "j")))
        check(jax.jit(f)(placed(x, mesh, P(("i", "j")))), x, groups)


def check(y, x, groups, first=0):
    """The parts of y that this process has, against each group standardized in float64. pmap counts
    from its own `first`."""
    want = np.empty(x.shape)
    for group in groups:
        rows = x[group].astype("f8")
        want[group] = (rows - rows.mean((0, 1))) / np.sqrt(rows.var((0, 1)) + 1e-5)
    for shard in y.addressable_shards:
        index = first + (shard.index[0].start or 0)
        np.testing.assert_allclose(
            shard.data, want[index : index + 1], atol=4 * np.finfo("f4").eps * 1e4
        )


def main(port, processes, rank, out):
    """One process: what it computes goes to a file."""
    signal.alarm(LIMIT)
    jax.config.update("jax_enable_x64", True)
    if processes > 1:
        address = f"127.0.0.1:{port}"
        jax.distributed.initialize(
            address, processes, rank, initialization_timeout=60, coordinator_bind_address=address
        )
    assert (jax.process_count(), jax.device_count()) == (processes, DEVICES)
    large_means()
    if processes > 1:
        for context in ("pmap", "jit"):
            np.savez(Path(out, f"{context}{rank}.npz"), *training(context))


def launch(processes, out):
    """Run the processes to their end, or end them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    root = Path(__file__).parent.parent
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")} | {
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": (
            f"--xla_force_host_platform_device_count={DEVICES // processes} "
            "--xla_backend_optimization_level=0"
        ),
    }
    env |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"} if processes > 1 else {}
    commands = [
        [sys.executable, __file__, str(port), str(processes), str(rank), str(out)]
        for rank in range(processes)
    ]
    logs = [Path(out, f"log{rank}") for rank in range(processes)]
    running = []
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("w") as file:
                running.append(
                    subprocess.Popen(
                        command, env=env, cwd=root, stdout=file, stderr=subprocess.STDOUT
                    )
                )
        codes, deadline = [None], time.monotonic() + LIMIT + 10
        # one that fails leaves the other waiting
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.05)
            codes = [p.poll() for p in running]
    finally:
        for p in running:
            p.kill()
            p.wait()
    assert codes == [0] * processes, "\n".join(
        f"process {rank}: {log.read_text()[-3000:]}" for rank, log in enumerate(logs)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_two_processes_train_as_one_device_and_do_not_hang(tmp_path):
    launch(2, tmp_path)
    want = training("one device")
    for context in ("pmap", "jit"):
        for rank in range(2):
            with np.load(tmp_path / f"{context}{rank}.npz") as got:
                for a, b in zip(got.values(), want, strict=True):
                    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_devices_of_one_process_that_disagree_do_not_hang(tmp_path):
    launch(1, tmp_path)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
