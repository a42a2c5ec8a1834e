"""The table of a model's norms: what it says is what the layers do, and nothing is computed."""

import math
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import mesh
from flax import linen as fnn
from flax import nnx as fnnx
from jax.sharding import PartitionSpec as P
from registry import REGISTRY, SHAPE, by_turns

from benchmarks.hlo import collectives, total
from jaxnorm import EACH, Groups, Row, Size, linen, methods, moments, nnx
from jaxnorm.probe import _table

C = SHAPE[-1]
X = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
BN, GN, LN = methods.batch_norm(), methods.group_norm(4), methods.token_layer_norm()


class Block(fnn.Module):
    @fnn.compact
    def __call__(self, x, _=None):
        x = fnn.LayerNorm()(x)
        return linen.Norm(methods.batch_renorm(), use_running_average=False)(x), None


class Net(fnn.Module):
    """Norms of both libraries, at the top, in modules and in transformations."""

    @fnn.compact
    def __call__(self, x, train):
        x = fnn.Conv(C, (3, 3))(x)
        x = fnn.BatchNorm(use_running_average=not train)(x)
        x = fnn.GroupNorm(num_groups=None, group_size=2)(x)
        x = linen.GroupNorm(num_groups=4)(x)
        x = fnn.InstanceNorm()(x)
        x = linen.RMSNorm()(x)
        x = fnn.LayerNorm(reduction_axes=(1, 2, 3))(x)
        twice = linen.LayerNorm()
        x = twice(2 * twice(x))
        x, _ = Block()(x)
        x = fnn.remat(fnn.LayerNorm)()(x)
        x = fnn.jit(fnn.LayerNorm)()(x)
        axes = {"params": 0, "batch_stats": 0}
        x, _ = fnn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=5)()(x, None)
        x = fnn.Dropout(0.5, deterministic=not train)(x)
        return linen.BatchNorm(use_running_average=not train)(x.mean((1, 2)))


class Twin(fnnx.Module):
    def __init__(self, rngs):
        more = {"rngs": rngs}
        self.first = fnnx.BatchNorm(C, **more)
        self.list = fnnx.List([fnnx.GroupNorm(C, 4, **more), self.first])
        self.dict = fnnx.Dict(
            a=nnx.GroupNorm(C, 4, **more), b=fnnx.RMSNorm(C, **more), c=nnx.InstanceNorm(C, **more)
        )
        self.drop = fnnx.Dropout(0.5, rngs=rngs)

        @fnnx.split_rngs(splits=5)
        @fnnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Norm(C, methods.batch_renorm(), rngs=rngs)

        self.many = make(rngs)

    def __call__(self, x):
        x = self.first(x)
        for layer in (*self.list, self.dict.a, self.dict.b, self.dict.c):
            x = layer(self.drop(x))
        return fnnx.scan(lambda m, x: m(x), in_axes=(0, fnnx.Carry), out_axes=fnnx.Carry)(
            self.many, x
        )


def test_a_linen_model_from_shapes_alone():
    """Of 10^13 elements, which no memory holds."""
    shape = (64, 2**17, 2**17, C)
    table = linen.tabulate_norms(Net(), jax.ShapeDtypeStruct(shape, jnp.float32), train=True)
    renorm, layer = methods.batch_renorm(), methods.layer_norm()
    seen = [(row.path, _table.name_of(row.method), row.copies) for row in table]
    assert seen == [
        ("BatchNorm_0", "batch_norm", 1),
        ("GroupNorm_0", "group_norm(4)", 1),
        ("GroupNorm_1", "group_norm(4)", 1),
        ("InstanceNorm_0", "instance_norm", 1),
        ("RMSNorm_0", "rms_norm", 1),
        ("LayerNorm_0", "layer_norm", 1),
        ("LayerNorm_1", "token_layer_norm", 1),
        ("LayerNorm_1#1", "token_layer_norm", 1),
        ("Block_0/LayerNorm_0", "token_layer_norm", 1),
        ("Block_0/Norm_0", "batch_renorm()", 1),
        ("CheckpointLayerNorm_0", "token_layer_norm", 1),
        ("JitLayerNorm_0", "token_layer_norm", 1),
        ("ScanBlock_0/LayerNorm_0", "token_layer_norm", 5),
        ("ScanBlock_0/Norm_0", "batch_renorm()", 5),
        ("BatchNorm_1", "batch_norm", 1),
    ]
    assert table["BatchNorm_0"].elements == math.prod(shape) // C
    assert table["LayerNorm_0"].elements == math.prod(shape) // 64
    assert table["LayerNorm_0"].method.groups == layer.groups
    assert table["GroupNorm_0"].method == methods.group_norm(4, epsilon=1e-6)
    assert table["RMSNorm_0"].method == methods.rms_norm(epsilon=1e-6)
    assert table["BatchNorm_1"].statistics == ((1, C),) and table["BatchNorm_1"].elements == 64
    assert table["ScanBlock_0/Norm_0"].method == renorm
    assert table["ScanBlock_0/Norm_0"].state_bytes == 5 * 2 * C * 4
    assert table["ScanBlock_0/Norm_0"].sent_bytes == 5 * 4 * C * 4
    assert len(linen.tabulate_norms(Net(), X, train=False)) == len(table)


def test_an_nnx_model_from_shapes_alone():
    """Layers that are shared and scanned; the model stays as it is."""
    model = Twin(fnnx.Rngs(0))
    before, graph = fnnx.to_pure_dict(fnnx.state(model)), fnnx.graphdef(model)
    shape = (64, 2**17, 2**17, C)
    table = nnx.tabulate_norms(model, jax.ShapeDtypeStruct(shape, jnp.float32))
    seen = {(row.layer, _table.name_of(row.method), row.copies) for row in table}
    assert seen == {
        ("BatchNorm", "batch_norm", 1),
        ("GroupNorm", "group_norm(4)", 1),
        ("RMSNorm", "rms_norm", 1),
        ("InstanceNorm", "instance_norm", 1),
        ("Norm", "batch_renorm()", 5),
    }
    twice = [row for row in table if row.layer == "BatchNorm"]
    assert [row.state_bytes for row in twice] == [2 * C * 4, 0]  # it remembers once
    assert twice[1].path == f"{twice[0].path}#1" and len(table) == 7
    assert table["many"].state_bytes == 5 * 2 * C * 4
    assert fnnx.graphdef(model) == graph
    after = fnnx.to_pure_dict(fnnx.state(model))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before, after))
    chosen = nnx.tabulate_norms(model, X, forward=lambda m, x: m.dict.b(m.first(x)))
    assert [row.layer for row in chosen] == ["BatchNorm", "RMSNorm"]


ROWS = (
    BN, methods.ghost_batch_norm(2), methods.ghost_batch_norm(ghost_size=2), GN, LN,
    methods.instance_norm(), methods.layer_norm(), methods.rms_norm(),
    methods.batch_group_norm(4), methods.batch_and_group_norm(2, 4, example_weight=0),
    Row(Groups(Size(4), (2, EACH), 1)),
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_elements_and_shapes_are_those_of_the_moments(row):
    """For linen and nnx alike, channels first too."""
    m = jax.eval_shape(lambda x: moments(x, row), X)
    first = jax.ShapeDtypeStruct((8, C, 8, 3), jnp.float32)
    for table in (
        linen.tabulate_norms(linen.Norm(row), X, use_running_average=False),
        nnx.tabulate_norms(nnx.Norm(C, row, x_shape=SHAPE, rngs=fnnx.Rngs(0)), X),
    ):
        assert table[""].statistics == (m.mean.shape,)
        assert table[""].elements == math.prod(SHAPE) // m.mean.size
    layer = linen.Norm(row, channel_axis=1)
    table = linen.tabulate_norms(layer, first, use_running_average=False)
    assert table[""].statistics == (tuple(m.mean.shape[i] for i in (0, 3, 1, 2)),)


@pytest.mark.parametrize("entry", REGISTRY, ids=str)
def test_every_method_is_in_the_table(entry):
    """With the bytes of its state."""
    row = nnx.tabulate_norms(entry.in_nnx(), X, forward=lambda m, x: m(x, **call(entry)))[""]
    assert row.method == entry.method and row.layer == "Norm"
    assert row.state_bytes == sum(t.size * t.dtype.itemsize for t in entry.init(SHAPE).values())
    assert row.elements == min(math.prod(SHAPE) // math.prod(s) for s in row.statistics)


def call(entry):
    own = {name: t for name, t in entry.options.items() if name != "activation"}
    return own | ({"domain": jnp.zeros(SHAPE[0], int)} if entry.has_labels and not own else {})


@by_turns()
def test_what_is_sent_is_what_a_compiled_step_sends(entry):
    """Forward and backward, of methods in which examples share statistics; 8 devices have 4
    examples each. The second reduction, where rounding would show, is in a branch of its own."""
    local, whole = (4, *SHAPE[1:]), (32, *SHAPE[1:])
    sets = entry.method.sets(local)
    sent = [s.sent for s in sets]
    if None in sent or sum(sent) == 0:
        assert sent and (None in sent or not entry.init(SHAPE))
        return
    state = jax.tree.map(jnp.asarray, entry.init(whole))

    def step(x, scale, dy, domain):
        more = {"domain": domain} if entry.has_labels and "domain" not in entry.options else {}
        y, vjp, new = jax.vjp(
            lambda x, scale: entry(x, state, scale=scale, axis_name="i", **more),
            x,
            scale,
            has_aux=True,
        )
        return vjp(dy)[0], new

    specs = {"in_specs": (P("i"), P(), P("i"), P("i")), "out_specs": (P("i"), P())}
    run = jax.jit(jax.shard_map(step, mesh=mesh("N"), check_vma=False, **specs))
    x = np.ones(whole, "f4")
    program = run.lower(x, np.ones(C, "f4"), x, np.zeros(32, "i4")).compile().as_text()
    assert total(collectives(program)).bytes == 4 * sum(sent)


def test_names_by_which_people_know_the_rows():
    for row, name in (
        (BN, "batch_norm"),
        (methods.ghost_batch_norm(4), "ghost_batch_norm(4)"),
        (methods.ghost_batch_norm(ghost_size=16), "ghost_batch_norm(ghost_size=16)"),
        (methods.batch_group_norm(4), "batch_group_norm(4)"),
        (Row(Groups(1, 1, 4)), "batch_group_norm(4)"),
        (methods.batch_and_group_norm(2, group_size=4), "batch_and_group_norm(2, group_size=4)"),
        (methods.instance_rms_norm(), "instance_rms_norm"),
        (Row(Groups(1, 2, 4)), "Row(Groups(batch=1, spatial=2, channel=4))"),
        (Row(Groups(1, 1, EACH), mean=0), "Row(Groups(batch=1, spatial=1, channel=EACH), mean=0)"),
        (methods.batch_renorm(), "batch_renorm()"),
    ):
        assert _table.name_of(row) == name


def test_few_elements_are_marked():
    """In text and in HTML: 15 are few, 16 are not; here batch norm on maps of 1x1."""
    layer = linen.BatchNorm(use_running_average=False)
    few, enough = (
        linen.tabulate_norms(layer, jax.ShapeDtypeStruct((n, C), jnp.float32)) for n in (15, 16)
    )
    assert few[""].has_few and not enough[""].has_few
    assert "15 !" in str(few) and "fewer than 16 elements" in str(few)
    assert "!" not in str(enough)
    assert repr(few) == str(few)
    for table, bold in ((few, 1), (enough, 0)):
        root = ElementTree.fromstring(f"<div>{table._repr_html_()}</div>")
        lines = root.findall("table/tbody/tr")
        assert sum("bold" in line.get("style", "") for line in lines) == bold
        heads = [t.text for t in root.findall("table/thead/tr/th")]
        assert heads == list(_table.HEADS)
        assert [len(line) for line in lines] == [len(heads)]
        assert [p.text for p in root.findall("p")] == list(table.notes)


def test_the_text_is_aligned_and_html_is_escaped():
    class Named(fnn.Module):
        @fnn.compact
        def __call__(self, x):
            return fnn.LayerNorm()(fnn.BatchNorm(use_running_average=False, name="a<b")(x))

    table = linen.tabulate_norms(Named(), X)
    head, rule, *lines, note, _ = str(table).splitlines()
    between = [i for i, t in enumerate(rule) if t == " "]
    assert all(line.ljust(len(rule))[i] == " " for line in (head, *lines) for i in between)
    assert len(lines) == 2 and note.startswith("2 normalizations; 64 B of state; 128 B sent")
    assert "a&lt;b" in table._repr_html_() and "a<b" not in table._repr_html_()


def test_flax_layers_with_other_axes():
    """What one number per axis cannot say has its shape."""
    for layer, groups, shape in (
        (fnn.BatchNorm(axis=1, use_running_average=False), BN.groups, (1, 8, 1, 1)),
        (fnn.BatchNorm(axis=(1, -1), use_running_average=False), (1, 8, 1, 8), (1, 8, 1, 8)),
        (fnn.LayerNorm(reduction_axes=(2, 3)), Groups(EACH, (EACH, 1), 1), (8, 8, 1, 1)),
        (fnn.LayerNorm(reduction_axes=(0, 3)), Groups(1, EACH, 1), (1, 8, 3, 1)),
        (fnn.GroupNorm(4, reduction_axes=(-1,)), Groups(EACH, EACH, 4), (8, 8, 3, 4)),
    ):
        row = linen.tabulate_norms(layer, X)[""]
        assert row.method.groups == groups and row.statistics == (shape,)
        assert row.elements == math.prod(SHAPE) // math.prod(shape)
    for layer, name in ((fnn.RMSNorm(), "rms_norm"), (fnn.LayerNorm(), "token_layer_norm")):
        row = linen.tabulate_norms(layer, jax.ShapeDtypeStruct((4, C), jnp.float32))[""]
        assert _table.name_of(row.method) == name and row.statistics == ((4, 1),)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="the model calls no normalization. Expected one of Norm"):
        linen.tabulate_norms(fnn.Dense(3), X)
    with pytest.raises(ValueError, match="the model calls no normalization"):
        nnx.tabulate_norms(fnnx.Linear(C, 3, rngs=fnnx.Rngs(0)), X)
    with pytest.raises(TypeError, match="model is function; expected an nnx.Module"):
        nnx.tabulate_norms(lambda x: x, X)
    ghosts = linen.Norm(methods.ghost_batch_norm(3), use_running_average=False)
    with pytest.raises(ValueError, match="Norm at '' cannot normalize its input: batch axis 0"):
        linen.tabulate_norms(ghosts, X)
    with pytest.raises(KeyError, match="no normalization at 'b'; expected one of ''"):
        linen.tabulate_norms(fnn.LayerNorm(), X)["b"]
