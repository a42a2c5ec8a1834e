"""What devices send each other, read off compiled programs: how many collectives, of how many
bytes, one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import mesh, parts, spec
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.hlo import Total, collectives, total
from jaxnorm import device_groups, methods, norm

SHAPE = (16, 8, 3, 6)
X = np.ones(SHAPE, "f4")


def counted(f, *args) -> Total:
    return total(collectives(f.lower(*args).compile().as_text()))


def gradient(f):
    return lambda x, *rest: jax.grad(lambda x: jnp.sin(f(x, *rest)).sum())(x)


# Methods that are synchronized over an axis_name, with x of shape (16, 1, 3, 6) on each device: the
# number of statistics, and of sums for each of them.
SYNCED = {
    "batch_norm": (methods.batch_norm(), 6, 2),
    "ghost_batch_norm": (methods.ghost_batch_norm(4), 24, 2),
    "group_norm": (methods.group_norm(3), 48, 2),
    "layer_norm": (methods.layer_norm(), 16, 2),
    "token_layer_norm": (methods.token_layer_norm(), 48, 2),
    "rms_norm": (methods.rms_norm(), 48, 1),
    "instance_norm": (methods.instance_norm(), 96, 2),
    "batch_group_norm": (methods.batch_group_norm(3), 3, 2),
}


def shard_map(check_vma):
    def run(f, *args):
        return counted(
            jax.jit(
                jax.shard_map(
                    f, mesh=mesh("H"), in_specs=spec("H"), out_specs=spec("H"), check_vma=check_vma
                )
            ),
            *args,
        )

    return run


def pmap(f, *args):
    return counted(jax.pmap(f, "i"), *(parts(t, "H") for t in args))


RUNS = {"pmap": pmap, "shard_map": shard_map(True), "shard_map unchecked": shard_map(False)}


@pytest.mark.parametrize(
    "context, name",
    [
        pytest.param(
            context, name, marks=[pytest.mark.slow] * (c > 0 and (c + m) % 8 > 0 or m in (2, 6))
        )
        for c, context in enumerate(("shard_map", "pmap", "shard_map unchecked"))
        for m, name in enumerate(SYNCED)
    ],
)
def test_one_collective_forward_and_one_backward(context, name):
    """All sums in one, and no count, which is known. The second reduction, where rounding would
    show, is one more in a branch."""
    method, size, sums = SYNCED[name]
    f = lambda x: norm(x, method, axis_name="i")[0]  # noqa: E731
    looks = int(sums == 2)
    once = sums * size * 4
    assert RUNS[context](f, X) == Total(1, once, 1, 0, looks, looks * once)
    assert RUNS[context](gradient(f), X) == Total(2, 2 * once, 2, 0, looks, looks * once)


def test_part_of_the_devices_always_looks_twice():
    """By groups of indices, and by one axis of two: 2 forward and 1 backward, because the parts may
    disagree."""
    halves = device_groups(8, size=4)
    options = {"axis_name": "i", "axis_index_groups": halves}
    grouped = lambda x: norm(x, methods.batch_norm(), **options)[0]  # noqa: E731
    member = lambda x: norm(x, methods.batch_norm(), axis_name="j")[0]  # noqa: E731
    for f, cut in ((grouped, "H"), (member, "NH")):

        def run(f, cut=cut):
            return counted(
                jax.jit(jax.shard_map(f, mesh=mesh(cut), in_specs=spec(cut), out_specs=spec(cut))),
                X,
            )

        assert (run(f).number, run(f).depth, run(f).branches) == (2, 2, 0)
        assert (run(gradient(f)).number, run(gradient(f)).depth) == (3, 3)


def test_counts_of_weights_ride_along():
    f = lambda x, w: norm(x, methods.batch_norm(), weights=w, axis_name="i")[0]  # noqa: E731
    w = np.ones((16, 8, 3, 1), "f4")
    assert shard_map(False)(f, X, w)[:3] == (1, 2 * 6 * 4 + 4, 1)
    assert shard_map(False)(gradient(f), X, w)[:3] == (2, 4 * 6 * 4 + 4, 2)


def sharded(f, cut, kind, shape=SHAPE, jit=jax.jit):
    return counted(
        jit(f), jax.device_put(np.ones(shape, "f4"), NamedSharding(mesh(cut, kind), spec(cut)))
    )


C = 4 * 6
GATHERED = 2 * 4 * X.size
"""Bytes of x and its square. On a CPU rows are added first, and where every device has one, Shardy
gathers them, because it splits no reduction of several operands."""

# method, cut -> number, bytes and depth of the collectives that always run forward; bytes and depth
# with backward, where XLA of jax 0.12 sends independent sums apart. One bit is apart.
WHOLE = [
    (methods.batch_norm(), "N", (1, 2 * C, 1), (4 * C, 2)),
    (methods.batch_group_norm(3), "N", (1, 2 * C, 1), (4 * C, 2)),
    (methods.group_norm(3), "N", (0, 0), (0,)),
    (methods.instance_norm(), "N", (0, 0), (0,)),
    (methods.token_layer_norm(), "N", (0, 0), (0,)),
    (methods.rms_norm(), "N", (0, 0), (0,)),
    (methods.ghost_batch_norm(8), "N", (0, 0), (0,)),
    (methods.ghost_batch_norm(16), "N", (0, 0), (0,)),
    (methods.batch_and_group_norm(8, 3), "N", (0, 0), (0,)),
    (methods.ghost_batch_norm(4), "N", (1, 2 * C), None),
    (methods.ghost_batch_norm(2), "N", (1, 2 * C), None),
    (methods.batch_norm(), "H", (2, GATHERED, 1), None),
    (methods.group_norm(3), "H", (2, GATHERED, 1), None),
    (methods.rms_norm(), "H", (0, 0), (0,)),
    (methods.batch_norm(), "NC", (1, C), None),
    (methods.group_norm(2), "NC", (0, 0), (0,)),
    (methods.rms_norm(), "NC", (1, 4 * 8 * 3 * 4), None),
    (methods.token_layer_norm(), "NC", (2,), None),
]


@pytest.mark.parametrize(
    "method, cut, forward, both",
    [pytest.param(*case, marks=[pytest.mark.slow] * (i % 3 > 0)) for i, case in enumerate(WHOLE)],
)
def test_whole_arrays(method, cut, forward, both):
    """Under jit; on a mesh with Explicit axes what is sent is the same, to the byte."""
    f = lambda x: norm(x, method)[0]  # noqa: E731
    got = sharded(f, cut, AxisType.Auto)
    back = sharded(gradient(f), cut, AxisType.Auto)
    assert got[: len(forward)] == forward
    assert both is None or back[1 : 1 + len(both)] == both
    gathered = forward[1:2] == (GATHERED,)
    assert gathered or back.number <= forward[0] + 2
    assert gathered or max(got.bytes, back.bytes, back.branch_bytes) <= 4 * X.size / 2
    assert sharded(f, cut, AxisType.Explicit) == got
    assert sharded(gradient(f), cut, AxisType.Explicit) == back


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
@pytest.mark.parametrize("weighted", (False, True))
def test_ghosts_across_shards_gather_sums(weighted, kind):
    """Three ghosts of 16 examples on eight devices of six: what is gathered is a sum for each
    example, not the example."""
    shape = (48, 8, 8, 6)
    w = np.ones((48, 8, 8, 1), "f4")
    w = jax.device_put(w, NamedSharding(mesh("N", kind), spec("N")))

    def f(x, w):
        return norm(x, methods.ghost_batch_norm(3), weights=w if weighted else None)[0]

    x = jax.device_put(np.ones(shape, "f4"), NamedSharding(mesh("N", kind), spec("N")))
    for g in (f, gradient(f)):
        found = collectives(jax.jit(g).lower(x, w).compile().as_text())
        assert max(one.bytes for one in found) <= 48 * 6 * 4
        assert any(one.code == "all-gather" for one in found)  # so the ghosts do straddle


@pytest.mark.parametrize("channels, sent", [(768, 8), (96, 48)])
@pytest.mark.parametrize("method", (methods.token_layer_norm(), methods.rms_norm()))
def test_rows_across_shards(method, channels, sent):
    """On a CPU a row is added in parts, and Shardy gathers what they hold: eight numbers of a long
    row, half of a short one."""
    x = jax.ShapeDtypeStruct(
        (16, 32, channels), jnp.float32, sharding=NamedSharding(mesh("N"), P(None, None, "i"))
    )
    for g in (f := lambda x: norm(x, method)[0], gradient(f)):
        found = collectives(jax.jit(g).lower(x).compile().as_text())
        assert max(one.bytes for one in found) <= 4 * 16 * 32 * sent
        assert any(one.bytes > 1 for one in found)  # so the rows do lie across devices


@pytest.mark.parametrize("shape", [(64, 48, 32, 6), (4, 48, 512, 6)])
def test_cuts_of_a_gpu_keep_shards(shape, monkeypatch):
    """A GPU sums parts of the rows first; where the height is sharded they hold no rows of two
    devices."""
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    jax.clear_caches()
    for g in (f := lambda x: norm(x, methods.group_norm(3))[0], gradient(f)):
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh("H"), spec("H")))
        found = collectives(jax.jit(g).lower(x).compile().as_text())
        assert {one.code for one in found} == {"all-reduce"}
    jax.clear_caches()
