"""How often devices wait for each other: collectives of layers, on simulated devices and compiled
for TPUs."""

import csv
import json

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from benchmarks import collectives, hlo, pods, tpu
from benchmarks.hlo import Array, Collective, total
from benchmarks.sharded import CHANNELS, NORMS, Case, of_layer, of_network

VECTOR = 4 * CHANNELS
"""Bytes of a float32 for each channel."""

on_tpu = pytest.mark.skipif(tpu.unavailable() is not None, reason=str(tpu.unavailable()))
PLATFORMS = ["cpu", pytest.param("v5e:2x4", marks=on_tpu)]
IN_MAPS = [
    ("cpu", "shard_map"),
    ("cpu", "pmap"),
    pytest.param("v5e:2x4", "shard_map", marks=on_tpu),
]


def of(platform, method, context, what, library="jaxnorm"):
    devices = jax.devices() if platform == "cpu" else tpu.chips(platform)
    found = of_layer(Case(method, context, what, library), devices, group=4, dtype="bfloat16")
    assert found is not None
    return found


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("context", ("jit", "shard_map"))
def test_synchronized_batch_norm_waits_once_forward_and_once_backward(platform, context):
    """For two vectors each; gradients of scale and bias, and running statistics, travel along."""
    forward, backward, step = (
        of(platform, "batch", context, what) for what in ("forward", "backward", "step")
    )
    assert total(forward)[:4] == (1, 2 * VECTOR, 1, 0)
    assert total(backward)[:4] == (2, 4 * VECTOR, 2, 0)
    assert (total(step).number, total(step).depth, total(step).predicates) == (2, 2, 0)
    assert total(step).bytes <= 6 * VECTOR
    assert {one.code for one in step} == {"all-reduce"}
    assert {one.group_size for one in step} == {8}


@pytest.mark.parametrize(("platform", "context"), IN_MAPS)
@pytest.mark.parametrize("method", ("ghost", "group", "layer"))
def test_maps_send_nothing_where_sets_are_local(platform, context, method):
    assert of(platform, method, context, "backward") == []


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("method", ("ghost", "group_channels"))
def test_jit_sends_no_vector_where_sets_are_local(platform, method):
    """At most a bit, about which all devices agree: whether the variance is taken again."""
    found = total(of(platform, method, "jit", "backward"))
    assert (found.number, found.bytes, found.branches) == (0, 0, 0)
    assert found.predicates <= 1


@pytest.mark.parametrize("platform", PLATFORMS)
def test_split_channels_in_a_map_send_nothing(platform):
    """Not in a whole step either: the gradients of scale and bias are split like channels."""
    assert of(platform, "group_channels", "shard_map", "step") == []


def test_two_passes_show():
    """The counts can differ: Flax's two-pass variance waits twice."""
    layer = flax.linen.BatchNorm(use_running_average=False, use_fast_variance=False, axis_name="i")
    x = jnp.ones((16, 4))
    mesh = Mesh(np.array(jax.devices()), ("i",), axis_types=(AxisType.Auto,))
    f = jax.shard_map(
        lambda v, x: layer.apply(v, x, mutable=["batch_stats"])[0],
        mesh=mesh,
        in_specs=(P(), P("i")),
        out_specs=P("i"),
    )
    text = jax.jit(f).lower(layer.init(jax.random.key(0), x), x).compile().as_text()
    assert total(hlo.collectives(text)) == (2, 32, 2, 0, 0, 0)


@pytest.mark.slow
def test_a_network_waits_for_every_layer():
    """53 norms, four of which run beside another, in both passes; and once for the gradients."""
    totals = {
        name: total(
            of_network(name, "shard_map", jax.devices(), group=4, dtype="float32", image=32)
        )
        for name in ("jaxnorm", "local")
    }
    assert totals["jaxnorm"].depth == 2 * 49 + 1
    assert totals["local"][:5] == (1, totals["local"].bytes, 1, 0, 0)
    assert 102e6 < totals["local"].bytes < totals["jaxnorm"].bytes < 103e6


def test_libraries_without_the_layer():
    assert (
        of_layer(
            Case("ghost", "jit", "forward", "flax.linen"), jax.devices(), group=4, dtype="float32"
        )
        is None
    )


def test_program(tmp_path, capsys):
    """What is printed and what is written agree, and what another library refuses is noted."""
    methods = [
        "--methods",
        "batch",
        "batch_index_groups",
        "--contexts",
        "shard_map",
        "--passes",
        "forward",
    ]
    libraries = ["--libraries", "jaxnorm", "flax.linen"]
    assert collectives.main(["--quick", *methods, *libraries, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "collectives.json").read_text())
    by_cell = {(row["program"], row["library"]): row for row in saved["results"]}
    assert by_cell["batch", "jaxnorm"]["number"] == by_cell["batch", "flax.linen"]["number"] == 1
    assert by_cell["batch_index_groups", "flax.linen"]["number"] is None
    assert by_cell["batch_index_groups", "flax.linen"]["note"] == "NotImplementedError"
    assert "1 | 2048 | 1 (+1)" in printed
    with (tmp_path / "collectives.csv").open() as file:
        assert [row["program"] for row in csv.DictReader(file)] == [
            row["program"] for row in saved["results"]
        ]
    assert saved["model"] == {}


def all_reduce(size, devices, conditional=False):
    return Collective("all-reduce", (Array("f32", (size,)),), devices, conditional, 1)


def test_model_of_a_pod():
    """Hops there and back along each axis, rings in half, and twice the bytes over all links."""
    # 2x4, two lines
    assert pods.V5E.all_reduce_seconds(8, 0) == pytest.approx((2 * 1 + 2 * 3) * 1e-6)
    assert pods.V5E.all_reduce_seconds(256, 0) == pytest.approx((16 + 16) * 1e-6)  # two rings of 16
    assert pods.V5P.all_reduce_seconds(4096, 0) == pytest.approx(3 * 16e-6)
    assert pods.V5E.all_reduce_seconds(1, 1e9) == 0
    bytes_alone = pods.V5E.all_reduce_seconds(256, 1e9) - pods.V5E.all_reduce_seconds(256, 0)
    assert bytes_alone == pytest.approx(2 * 255 / 256 * 1e9 / 2e11)
    for pod in pods.PODS:
        times = [pod.all_reduce_seconds(chips, 2048) for chips in pod.shapes]
        assert min(times) > 0
        assert pod.all_reduce_seconds(max(pod.shapes), 2048) == max(times)


def test_model_counts_what_always_runs():
    """Over all chips, within groups and across them; a slice of another size has other groups."""
    found = [
        all_reduce(10, 64),
        all_reduce(20, 16),
        all_reduce(30, 4),
        all_reduce(40, 64, conditional=True),
    ]
    sizes = pods.rounds(found, 64, 16)
    assert sizes == [(40, "all"), (80, "group"), (120, "across")]
    # 4x8x8 chips: 20 hops there and back, 10 of them inside a group of 2x2x4, which is open; six
    # links of 100 GB/s a chip
    across = (20 - 10) * 1e-6 + 2 * 15 / 16 * 120 / 6e11
    expected = pods.V5P.all_reduce_seconds(256, 40) + pods.V5P.all_reduce_seconds(16, 80) + across
    sent = 2 * (255 / 256 * 40 + 15 / 16 * 80 + 15 / 16 * 120)
    assert pods.cost(pods.V5P, 256, 16, sizes) == pytest.approx((expected, sent))
    with pytest.raises(
        ValueError, match="all-reduces over all devices, groups of 16 or across them"
    ):
        pods.rounds([all_reduce(10, 2)], 64, 16)


def test_model_is_drawn(tmp_path):
    curves = {
        pod.name: {NORMS["jaxnorm"].title: dict.fromkeys(pod.shapes, pods.Cost(1e-3, 1e6))}
        for pod in pods.PODS
    }
    pods.draw(curves, tmp_path / "model.png")
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")
