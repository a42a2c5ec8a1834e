"""The norms of whole models replaced: what is carried over, what begins anew, what is refused."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as fnn
from flax import nnx as fnnx

from jaxnorm import Groups, linen, methods, nnx

KEY = jax.random.key(0)
called = fnnx.jit(lambda model, x: model(x))
C = 8
GN = methods.group_norm(4)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(1, 2, shape), jnp.float32)


X = normal(4, 3, 5, C)


class Nested(fnnx.Module):
    """Norms of both libraries in lists, dicts and modules; one of them in two places."""

    def __init__(self, rngs):
        more = {"rngs": rngs}
        self.first = fnnx.BatchNorm(C, momentum=0.5, **more)
        self.list = fnnx.List([fnnx.GroupNorm(C, 2, **more), fnnx.LayerNorm(C, **more), self.first])
        self.dict = fnnx.Dict(a=fnnx.RMSNorm(C, **more), b=fnnx.InstanceNorm(C, **more))
        self.ours = fnnx.Sequential(
            nnx.BatchNorm(C, **more),
            nnx.GroupNorm(C, None, group_size=2, **more),
            nnx.LayerNorm(C, unit_offset=True, **more),
            nnx.Norm(C, methods.switchable_norm(), **more),
        )
        self.plain = fnnx.Linear(C, C, **more)
        for i, (_, t) in enumerate(fnnx.iter_graph(self)):
            if isinstance(t, fnnx.Param):  # no two are alike
                t[...] = t[...] + normal(*t.shape, seed=i) / 8

    def layers(self):
        return (
            self.first, *self.list, self.dict.a, self.dict.b, *self.ours.layers,
        )  # fmt: skip

    def __call__(self, x):
        for layer in self.layers():
            x = layer(self.plain(x))
        return x


def by_hand(model, method, x):
    """The model with another method in place of its norms."""
    states = {}  # of layers, one of which is called twice
    for layer in model.layers():
        scale = layer.scale[...] + int(getattr(layer, "unit_offset", False))
        bias = getattr(layer, "bias", None)
        bias = None if bias is None else bias[...]
        x = model.plain(x)
        state = states.get(id(layer), method.init(x.shape))
        x, states[id(layer)] = method.apply(x, state, train=True, scale=scale, bias=bias)
    return x


PATHS = {
    "first", "list/0", "list/1", "dict/a", "dict/b",
    "ours/layers/0", "ours/layers/1", "ours/layers/2", "ours/layers/3",
}  # fmt: skip


class TestNnx:
    @pytest.mark.parametrize(
        "method",
        [
            pytest.param(GN, marks=pytest.mark.slow),
            pytest.param(methods.batch_norm(), marks=pytest.mark.slow),
            methods.batch_renorm(),
            pytest.param(Groups(1, 1, 2), marks=pytest.mark.slow),
        ],
        ids=str,
    )
    def test_a_model_computes_what_one_made_by_hand_does(self, method):
        model = Nested(fnnx.Rngs(0))
        new, replaced = nnx.replace_norms(model, method, rngs=fnnx.Rngs(1))
        assert {type(layer) for layer in new.layers()} == {nnx.Norm}
        paths = {path.replace("list/2", "first") for path in replaced}
        assert paths == PATHS
        method = new.first.method
        expected = jax.jit(by_hand, static_argnums=(0, 1))(model, method, X)
        np.testing.assert_allclose(called(new, X), expected, atol=2e-4)

    def test_the_model_of_before_stays(self):
        model, twin = Nested(fnnx.Rngs(0)), Nested(fnnx.Rngs(0))
        new, _ = nnx.replace_norms(model, methods.batch_norm(), rngs=fnnx.Rngs(1))
        called(new, X)
        assert fnnx.graphdef(model) == fnnx.graphdef(twin)
        chex.assert_trees_all_equal(*(fnnx.to_pure_dict(fnnx.state(m)) for m in (model, twin)))

    def test_what_is_shared_stays_shared(self):
        model = Nested(fnnx.Rngs(0))
        tied = model.dict.a.scale = model.dict.b.scale
        new, _ = nnx.replace_norms(model, methods.batch_norm(), rngs=fnnx.Rngs(1))
        assert new.first is new.list[2]
        assert new.dict.a.scale is new.dict.b.scale is not tied

    def test_what_is_carried_over_is_reported(self):
        _, replaced = nnx.replace_norms(Nested(fnnx.Rngs(0)), GN, rngs=fnnx.Rngs(1))
        both = ("scale", "bias")
        first = next(r for path, r in replaced.items() if path in ("first", "list/2"))
        assert first == ("BatchNorm", GN, both, (), ("mean", "var"))
        assert replaced["list/0"] == ("GroupNorm", GN, both, (), ())
        assert replaced["dict/a"] == ("RMSNorm", GN, ("scale",), (), ())
        dropped = {"mean", "var", "mean_logits", "var_logits"}
        assert set(replaced["ours/layers/3"].dropped) == dropped
        _, replaced = nnx.replace_norms(
            Nested(fnnx.Rngs(0)), methods.batch_norm(), rngs=fnnx.Rngs(1)
        )
        assert replaced["list/0"].fresh == ("mean", "var")

    @pytest.mark.parametrize(
        "method, carried",
        [
            (methods.batch_norm(momentum=0.9), True),
            (methods.ghost_batch_norm(2), True),
            (methods.batch_and_group_norm(2, 4, example_weight=0.0), True),
            (methods.batch_group_norm(C), True),
            (methods.batch_group_norm(4), False),
            (methods.batch_norm(debias=True), False),
            (methods.batch_norm(momentum=None), False),
            (methods.switchable_norm(), False),  # the same names and shapes
            (methods.batch_renorm(), False),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("library", [fnnx, nnx], ids=["flax", "jaxnorm"])
    def test_running_statistics_are_carried_where_they_mean_the_same(
        self, library, method, carried
    ):
        model = fnnx.Sequential(library.BatchNorm(C, rngs=fnnx.Rngs(0)))
        called(model, X)
        new, replaced = nnx.replace_norms(model, method, rngs=fnnx.Rngs(1))
        names = {"scale", "bias", "mean", "var"} if carried else {"scale", "bias"}
        assert set(replaced["layers/0"].carried) == names
        if carried:
            old, new = (fnnx.view(m, use_running_average=True) for m in (model, new))
            if getattr(method, "running", None) is None:  # else inference pools channels
                np.testing.assert_allclose(called(new, X), called(old, X), atol=1e-6)

    def test_what_a_method_learned_and_remembers_is_carried_to_the_same_method(self):
        layer = nnx.Norm(C, methods.memorized_batch_norm((0.5, 0.5)), rngs=fnnx.Rngs(0))
        called(layer, X)
        new, replaced = nnx.replace_norms(
            layer, methods.memorized_batch_norm((0.2, 0.8)), rngs=fnnx.Rngs(1)
        )
        assert set(replaced[""].carried) == {"scale", "bias", "mean", "var", "count"}
        np.testing.assert_array_equal(new.mean[...], layer.mean[...])
        _, replaced = nnx.replace_norms(
            layer, methods.memorized_batch_norm((0.2, 0.3, 0.5)), rngs=fnnx.Rngs(1)
        )
        assert replaced[""].fresh == ("mean", "var")  # of other shapes

    def test_a_function_chooses(self):
        model = Nested(fnnx.Rngs(0))
        seen = {}

        def choose(path, layer):
            seen[path] = type(layer)
            return GN if isinstance(layer, fnnx.BatchNorm) else None

        new, replaced = nnx.replace_norms(model, choose, rngs=fnnx.Rngs(1))
        assert len(seen) == len(PATHS) and len(replaced) == 1
        assert type(new.first) is nnx.Norm and type(new.list[1]) is fnnx.LayerNorm
        new, replaced = nnx.replace_norms(
            model, GN, rngs=fnnx.Rngs(1), layers=(fnnx.LayerNorm, nnx.LayerNorm)
        )
        assert set(replaced) == {"list/1", "ours/layers/2"}

    def test_fields_of_the_layer_are_kept(self):
        layer = fnnx.BatchNorm(
            C,
            axis=1,
            use_running_average=None,
            use_bias=False,
            dtype=jnp.bfloat16,
            axis_name="i",
            scale_metadata={"note": "mine"},
            rngs=fnnx.Rngs(0),
        )
        new, _ = nnx.replace_norms(layer, methods.batch_norm(), rngs=fnnx.Rngs(1))
        assert (new.channel_axis, new.use_running_average, new.bias) == (1, None, None)
        assert (new.dtype, new.axis_name, new.scale.get_metadata()["note"]) == (
            jnp.bfloat16,
            "i",
            "mine",
        )
        x = normal(2, C, 3)
        y = new(x, use_running_average=True)
        np.testing.assert_array_equal(y, layer(x, use_running_average=True))

    def test_layers_of_a_scan_keep_their_leading_axes(self):
        """As if each had been replaced by itself."""

        class Block(fnnx.Module):
            def __init__(self, rngs):
                self.linear = fnnx.Linear(C, C, rngs=rngs)
                self.norm = fnnx.LayerNorm(C, rngs=rngs)

            def __call__(self, x):
                return self.norm(self.linear(x))

        @fnnx.split_rngs(splits=3)
        @fnnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Block(rngs)

        @fnnx.scan(in_axes=(0, fnnx.Carry), out_axes=fnnx.Carry)
        def through(block, x):
            return block(x)

        blocks = make(fnnx.Rngs(0))
        blocks.norm.scale[...] = normal(3, C, seed=7)
        new, replaced = nnx.replace_norms(blocks, methods.batch_norm(), rngs=fnnx.Rngs(1))
        assert replaced["norm"] == (
            "LayerNorm", new.norm.method, ("scale", "bias"), ("mean", "var"), (),
        )  # fmt: skip
        assert new.norm.mean.shape == new.norm.scale.shape == (3, C)
        graph, state = fnnx.split(new)
        expected = X
        for i in range(3):
            one = fnnx.merge(graph, jax.tree.map(lambda t, i=i: t[i], state))
            expected = called(one, expected)
            mean = one.norm.mean[...]
        np.testing.assert_allclose(fnnx.jit(through)(new, X), expected, atol=1e-5)
        np.testing.assert_allclose(new.norm.mean[...][-1], mean, atol=1e-6)

    def test_the_new_model_trains(self):
        model = fnnx.Sequential(
            fnnx.Linear(C, C, rngs=fnnx.Rngs(0)), fnnx.BatchNorm(C, rngs=fnnx.Rngs(0))
        )
        new, _ = nnx.replace_norms(model, methods.batch_renorm(), rngs=fnnx.Rngs(1))
        gradients = fnnx.jit(fnnx.grad(lambda m, x: (m(x) ** 3).sum()))(new, X)
        assert set(gradients["layers"][1]) == {"scale", "bias"}
        assert jnp.abs(new.layers[1].mean[...]).max() > 0
        new.eval()
        assert new.layers[1].use_running_average
        copy = fnnx.merge(*fnnx.split(new))
        np.testing.assert_array_equal(called(copy, X), called(new, X))


class Net(fnn.Module):
    norm: type = fnn.BatchNorm

    @fnn.compact
    def __call__(self, x, train=True):
        more = {} if self.norm is not fnn.BatchNorm else {"use_running_average": not train}
        x = fnn.Dense(C)(x)
        x = self.norm(**more)(x)
        return fnn.relu(linen.GroupNorm(num_groups=2)(fnn.Dense(C)(x)))


class ByHand(fnn.Module):
    method: object

    @fnn.compact
    def __call__(self, x, train=True):
        for i, (name, more) in enumerate((("BatchNorm_0", {}), ("GroupNorm_0", {}))):
            x = fnn.Dense(C, name=f"Dense_{i}")(x)
            x = linen.Norm(self.method, name=name, **more)(x, use_running_average=not train)
        return fnn.relu(x)


def apply(model, variables, x, train=True):
    run = lambda variables, x: model.apply(  # noqa: E731
        variables, x, train=train, mutable=["batch_stats"]
    )
    return jax.jit(run)(variables, x)


def init(model, x=X):
    return jax.jit(model.init)(KEY, x)


class TestLinen:
    @pytest.mark.parametrize("method", [GN, methods.batch_norm(momentum=0.5)], ids=str)
    def test_a_model_computes_what_one_made_by_hand_does(self, method):
        """With variables of the same names; statistics are used as the call says."""
        hand = ByHand(method)
        expected = init(hand)
        with (
            linen.replace_norms(method) as replaced,
            linen.call_norms_with(use_running_average=False, update_running_average=True),
        ):
            found = init(Net())
            chex.assert_trees_all_equal(found, expected)
            y = apply(Net(), found, X)
        chex.assert_trees_all_equal(y, apply(hand, expected, X))
        assert replaced == {"BatchNorm_0": method, "GroupNorm_0": method}

    @pytest.mark.slow
    def test_parameters_and_statistics_of_before_serve(self):
        """Between batch norms, inference agrees."""
        model = Net()
        variables = init(model)
        _, updates = apply(model, variables, X)
        variables = {**variables, **updates}
        only = lambda path, layer: (  # noqa: E731
            methods.ghost_batch_norm(2) if isinstance(layer, fnn.BatchNorm) else None
        )
        with linen.replace_norms(only) as replaced:
            y, _ = apply(model, variables, X, train=False)
            z, updates = apply(model, variables, X)
        np.testing.assert_allclose(y, apply(model, variables, X, train=False)[0], atol=1e-5)
        assert list(replaced) == ["BatchNorm_0"]
        assert jnp.abs(z - apply(model, variables, X)[0]).max() > 1e-3
        assert updates["batch_stats"]["BatchNorm_0"]["mean"].shape == (C,)

    def test_afterwards_nothing_is_replaced(self):
        """Also under jit, where the model was traced before and inside of the context."""
        model, run = Net(), jax.jit(apply, static_argnums=0)
        variables = init(model)
        before, _ = run(model, variables, X)
        with linen.replace_norms(GN):
            inside, _ = run(model, variables, X)
        with linen.replace_norms(methods.layer_norm()):
            other, _ = run(model, variables, X)
        after, _ = run(model, variables, X)
        np.testing.assert_array_equal(before, after)
        assert jnp.abs(inside - before).max() > 1e-3 < jnp.abs(inside - other).max()

    def test_layers_in_transformations(self):
        """scan, remat and jit: their variables have the same places."""

        class Block(fnn.Module):
            @fnn.compact
            def __call__(self, x, _):
                return fnn.remat(fnn.LayerNorm)()(x), None

        class Deep(fnn.Module):
            @fnn.compact
            def __call__(self, x):
                x = fnn.jit(fnn.LayerNorm)()(x)
                axes = {"params": 0, "batch_stats": 0}
                scan = fnn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
                return scan()(x, None)[0]

        old = init(Deep())
        y = jax.jit(Deep().apply)(old, X)
        with (
            linen.replace_norms(methods.batch_norm()),
            linen.call_norms_with(use_running_average=False, update_running_average=True),
        ):
            new = init(Deep())
            z, updates = jax.jit(partial(Deep().apply, mutable=["batch_stats"]))(new, X)
            assert [row.copies for row in linen.tabulate_norms(Deep(), X)] == [1, 3]
        chex.assert_trees_all_equal_shapes(new["params"], old["params"])
        (leaf,) = {t.shape for t in jax.tree.leaves(updates["batch_stats"]["ScanBlock_0"])}
        assert leaf == (3, C) and jnp.abs(y - z).max() > 1e-3

    def test_the_table_and_the_hooks_see_what_is_there_now(self):
        model = Net()
        variables = init(model)
        with linen.replace_norms(GN):
            table = linen.tabulate_norms(model, X)
            recorded = linen.record_norms(partial(model.apply, train=False))
            y, calls = jax.jit(recorded)(variables, X)
        assert [(row.path, row.layer, row.method) for row in table] == [
            ("BatchNorm_0", "Norm", GN),
            ("GroupNorm_0", "Norm", GN),
        ]
        assert list(calls) == ["BatchNorm_0", "GroupNorm_0"]
        np.testing.assert_array_equal(fnn.relu(calls["GroupNorm_0"].y), y)

    def test_contexts_inside_of_each_other(self):
        """A layer is replaced once, by the innermost context that has a method for it."""
        model = Net()
        variables = init(model)
        with linen.replace_norms(GN) as outer, linen.replace_norms(methods.layer_norm()) as inner:
            y = apply(model, variables, X, train=False)[0]
        assert (len(outer), len(inner)) in {(2, 0), (0, 2)}
        with linen.replace_norms(GN if outer else methods.layer_norm()):
            np.testing.assert_array_equal(y, apply(model, variables, X, train=False)[0])


REFUSED = {
    "an activation twice": (
        methods.evonorm_s0(4),
        lambda: fnnx.LayerNorm(C, rngs=fnnx.Rngs(0)),
        r"LayerNorm at 'layers/0' cannot be evonorm_s0\(num_groups=4\), which is or takes the act",
    ),
    "an activation that its method is given": (
        methods.proxy_norm(GN),
        lambda: fnnx.LayerNorm(C, rngs=fnnx.Rngs(0)),
        "is or takes the activation that follows",
    ),
    "an activation lost": (
        GN,
        lambda: nnx.Norm(C, methods.evonorm_b0(), rngs=fnnx.Rngs(0)),
        r"is evonorm_b0\(\), which is or takes its activation: the model would have none",
    ),
    "channels that do not split": (
        methods.group_norm(3),
        lambda: fnnx.BatchNorm(C, rngs=fnnx.Rngs(0)),
        "BatchNorm at 'layers/0' has 8 channels, which do not split as ",
    ),
    "channels of a rule that do not split": (
        methods.group_norm_plus(3, per_position=False),
        lambda: fnnx.BatchNorm(C, rngs=fnnx.Rngs(0)),
        "has 8 channels, which do not split as group_norm_plus",
    ),
    "positions": (
        methods.batch_group_norm(24),
        lambda: fnnx.BatchNorm(C, rngs=fnnx.Rngs(0)),
        "whose state belongs to one image size. Build it with x_shape",
    ),
    "a shape": (
        methods.Row((1, 1, 1, C)),
        lambda: fnnx.BatchNorm(C, rngs=fnnx.Rngs(0)),
        "which is for x of one shape",
    ),
    "an option of the call": (
        methods.domain_batch_norm(2),
        lambda: fnnx.BatchNorm(C, rngs=fnnx.Rngs(0)),
        r"cannot be domain_batch_norm\(2\), which needs domain at each call",
    ),
    "a layer in front": (
        methods.cross_iteration_norm(),
        lambda: fnnx.BatchNorm(C, rngs=fnnx.Rngs(0)),
        "which needs inputs, kernel at each call",
    ),
    "a tap": (
        methods.moving_average_norm(),
        lambda: fnnx.BatchNorm(C, rngs=fnnx.Rngs(0)),
        "which needs a training step of its own for its tap",
    ),
    "a layer in front of before": (
        GN,
        lambda: nnx.Norm(
            C,
            methods.cross_iteration_norm(),
            layer=fnnx.Linear(C, C, use_bias=False, rngs=fnnx.Rngs(0)),
            rngs=fnnx.Rngs(0),
        ),
        "owns the layer in front of it, which would be lost",
    ),
    "several axes of channels": (
        GN,
        lambda: fnnx.BatchNorm(C, axis=(1, 2), rngs=fnnx.Rngs(0)),
        "has several axes of channels, and Norm has one",
    ),
    "a call of one's own": (
        GN,
        lambda: Activated(C, rngs=fnnx.Rngs(0)),
        "Activated at 'layers/0' has a call of its own: leave it out, by a function",
    ),
    "axes of a scan elsewhere": (
        GN,
        lambda: along_the_last_axis(),
        r"has variables of shapes .*scale \(8, 3\).*: expected \(8,\), after any axes of a scan",
    ),
}


class Activated(fnnx.BatchNorm):
    def __call__(self, x):
        return fnnx.relu(super().__call__(x))


def along_the_last_axis():
    @fnnx.split_rngs(splits=3)
    @fnnx.vmap(in_axes=0, out_axes=1)
    def make(rngs):
        return fnnx.LayerNorm(C, rngs=rngs)

    return make(fnnx.Rngs(0))


@pytest.mark.parametrize("method, layer, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_replaced_is_refused(method, layer, message):
    """Before anything is replaced, and all at once."""
    model = fnnx.Sequential(layer(), fnnx.BatchNorm(C, rngs=fnnx.Rngs(0)))
    first = lambda path, layer: method if path == "layers/0" else GN  # noqa: E731
    with pytest.raises(
        ValueError, match="(?s)layers cannot be replaced, and nothing was: .*" + message
    ):
        nnx.replace_norms(model, first, rngs=fnnx.Rngs(1))


@pytest.mark.parametrize("name", ["an activation twice", "channels that do not split", "a tap"])
def test_linen_refuses_the_same(name):
    method, _, message = REFUSED[name]
    message = message.replace("'layers/0'", "'LayerNorm_0'").replace("BatchNorm at", "LayerNorm at")
    with linen.replace_norms(method), pytest.raises(ValueError, match=message):
        Net(fnn.LayerNorm).init(KEY, X)


def test_all_that_is_refused_is_named():
    rngs = fnnx.Rngs(0)
    model = fnnx.Sequential(*(fnnx.LayerNorm(n, rngs=rngs) for n in (6, 8, 10)))
    with pytest.raises(ValueError) as error:
        nnx.replace_norms(model, GN, rngs=rngs)
    for path, named in (("layers/0", True), ("layers/1", False), ("layers/2", True)):
        assert (f"'{path}'" in str(error.value)) == named


def test_one_activation_for_another():
    model = nnx.Norm(C, methods.evonorm_s0(4), rngs=fnnx.Rngs(0))
    new, replaced = nnx.replace_norms(model, methods.evonorm_s0(2), rngs=fnnx.Rngs(1))
    assert new.method.num_groups == 2 and "v" in replaced[""].carried
