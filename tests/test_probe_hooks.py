"""Hooks of linen and nnx record what layers see, and change nothing unless they are asked to."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as fnn
from flax import nnx as fnnx

from jaxnorm import linen, methods, nnx

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


class Block(fnn.Module):
    method: object = methods.batch_norm()

    @fnn.compact
    def __call__(self, x, train=True):
        x = fnn.Conv(4, (3, 3))(x)
        x = fnn.relu(linen.Norm(self.method)(x, use_running_average=not train))
        x = fnn.Conv(4, (1, 1))(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.GroupNorm(num_groups=2)(x)
        return fnn.LayerNorm()(x)  # Flax's own


class Twin(fnnx.Module):
    def __init__(self, rngs):
        self.conv = fnnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norms = fnnx.List(
            [
                nnx.Norm(4, methods.batch_norm(), rngs=rngs),
                nnx.BatchNorm(4, rngs=rngs),
                nnx.GroupNorm(4, num_groups=2, rngs=rngs),
                fnnx.LayerNorm(4, rngs=rngs),
            ]
        )

    def __call__(self, x):
        x = self.conv(x)
        for layer in self.norms:
            x = fnnx.relu(layer(x))
        return x


X = jnp.asarray(normal(4, 5, 5, 3), jnp.float32)


def called(model, x):
    return model(x)


@pytest.fixture(scope="module")
def variables():
    return Block().init(KEY, X)


class TestLinenHooks:
    @staticmethod
    def forward(variables, x, train=True):
        return Block().apply(variables, x, train=train, mutable=["batch_stats"])

    @pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
    def test_outputs_and_state_are_the_same_bits(self, variables, wrap):
        expected = wrap(self.forward)(variables, X)
        outputs, calls = wrap(linen.record_norms(self.forward))(variables, X)
        chex.assert_trees_all_equal(outputs, expected)
        assert set(calls) == {"Norm_0", "BatchNorm_0", "GroupNorm_0", "LayerNorm_0"}

    def test_calls_are_in_order_and_hold_what_the_layers_saw(self, variables):
        (y, _), calls = linen.record_norms(self.forward)(variables, X)
        assert list(calls) == ["Norm_0", "BatchNorm_0", "GroupNorm_0", "LayerNorm_0"]
        np.testing.assert_array_equal(calls["LayerNorm_0"].y, y)
        np.testing.assert_array_equal(calls["LayerNorm_0"].x, calls["GroupNorm_0"].y)
        np.testing.assert_array_equal(calls["GroupNorm_0"].x, calls["BatchNorm_0"].y)
        conv = fnn.Conv(4, (3, 3)).apply({"params": variables["params"]["Conv_0"]}, X)
        np.testing.assert_allclose(calls["Norm_0"].x, conv, rtol=1e-6)

    def test_gradients_are_the_same_bits(self, variables):
        weight = jnp.asarray(normal(4, 5, 5, 4), jnp.float32)

        def loss(forward, params):
            out = forward({**variables, "params": params}, X)
            (y, _), calls = out if forward is not self.forward else (out, None)
            return (y * weight).sum(), calls

        recorded = linen.record_norms(self.forward)
        params = variables["params"]

        def of(f):
            return jax.jit(jax.grad(lambda p: loss(f, p), has_aux=True))(params)

        (expected, _), (found, calls) = of(self.forward), of(recorded)
        chex.assert_trees_all_equal(found, expected)
        assert calls["Norm_0"].x.shape == (4, 5, 5, 4)

    def test_inference_and_keywords(self, variables):
        (y, updates), calls = linen.record_norms(self.forward)(variables, x=X, train=False)
        np.testing.assert_array_equal(y, self.forward(variables, X, train=False)[0])
        assert len(calls) == 4

    def test_altered_by_nothing_nothing_changes(self, variables):
        altered = linen.alter_norms(self.forward, lambda path, y: y)
        chex.assert_trees_all_equal(altered(variables, X), self.forward(variables, X))

    def test_altered_outputs_are_used(self, variables):
        paths = []

        def alter(path, y):
            paths.append(path)
            return y.at[0].set(7.0) if path == "LayerNorm_0" else y

        y, _ = linen.alter_norms(self.forward, alter)(variables, X)
        expected, _ = self.forward(variables, X)
        np.testing.assert_array_equal(y, expected.at[0].set(7.0))
        assert paths == ["Norm_0", "BatchNorm_0", "GroupNorm_0", "LayerNorm_0"]

    def test_gradients_by_what_comes_out_of_a_norm(self, variables):
        """An addition of zeros: the derivative with respect to the activations."""
        at = "LayerNorm_0"

        def loss(zeros):
            def alter(path, y):
                return y + zeros if path == at else y

            return (linen.alter_norms(self.forward, alter)(variables, X)[0] ** 2).sum()

        (y, _), _ = linen.record_norms(self.forward)(variables, X)
        np.testing.assert_allclose(jax.grad(loss)(jnp.zeros_like(y)), 2 * y, rtol=1e-6)

    def test_a_layer_that_is_called_twice(self):
        class Twice(fnn.Module):
            @fnn.compact
            def __call__(self, x):
                layer = linen.LayerNorm()
                return layer(2 * layer(x))

        variables = Twice().init(KEY, X)
        y, calls = linen.record_norms(Twice().apply)(variables, X)
        assert list(calls) == ["LayerNorm_0", "LayerNorm_0#1"]
        np.testing.assert_array_equal(calls["LayerNorm_0#1"].x, 2 * calls["LayerNorm_0"].y)

    def test_layers_of_other_classes(self, variables):
        _, calls = linen.record_norms(self.forward, layers=fnn.Conv)(variables, X)
        assert list(calls) == ["Conv_0", "Conv_1"]

    def test_values_do_not_leave_a_transformation(self):
        class Remat(fnn.Module):
            @fnn.compact
            def __call__(self, x):
                return fnn.remat(linen.LayerNorm)()(x)

        variables = Remat().init(KEY, X)
        with pytest.raises(ValueError, match="inside of a transformation within forward"):
            linen.record_norms(Remat().apply)(variables, X)

    def test_a_function_that_was_compiled_before_does_not_hide_its_layers(self, variables):
        forward = jax.jit(self.forward)
        expected, _ = forward(variables, X)
        with pytest.raises(ValueError, match="inside of a transformation within forward"):
            linen.record_norms(forward)(variables, X)
        with pytest.raises(ValueError, match="inside of a transformation within forward"):
            linen.record_norms(forward)(variables, X)
        np.testing.assert_array_equal(forward(variables, X)[0], expected)

    def test_vmap_around_it(self, variables):
        batches = jnp.stack([X, X + 1])
        _, calls = jax.vmap(linen.record_norms(self.forward), in_axes=(None, 0))(variables, batches)
        _, one = linen.record_norms(self.forward)(variables, batches[1])
        np.testing.assert_allclose(calls["Norm_0"].x[1], one["Norm_0"].x, rtol=1e-5, atol=1e-5)

    def test_afterwards_nothing_is_recorded(self, variables):
        linen.record_norms(self.forward)(variables, X)
        _, calls = linen.record_norms(self.forward)(variables, X)
        self.forward(variables, X)
        assert len(calls) == 4


class TestNnxHooks:
    @pytest.mark.parametrize("wrap", [lambda f: f, fnnx.jit], ids=["eager", "jit"])
    def test_outputs_and_state_are_the_same_bits(self, wrap):
        one, other = Twin(fnnx.Rngs(0)), Twin(fnnx.Rngs(0))
        expected = wrap(called)(one, X)
        y, calls = wrap(nnx.record_norms(called))(other, X)
        np.testing.assert_array_equal(y, expected)
        assert set(calls) == {f"norms/{i}" for i in range(4)}
        chex.assert_trees_all_equal(*(fnnx.to_pure_dict(fnnx.state(m)) for m in (one, other)))
        assert fnnx.graphdef(one) == fnnx.graphdef(other)

    def test_calls_are_in_order_and_hold_what_the_layers_saw(self):
        model = Twin(fnnx.Rngs(0))
        y, calls = nnx.record_norms(called)(model, X)
        assert list(calls) == [f"norms/{i}" for i in range(4)]
        np.testing.assert_array_equal(calls["norms/0"].x, model.conv(X))
        np.testing.assert_array_equal(fnnx.relu(calls["norms/3"].y), y)
        np.testing.assert_array_equal(calls["norms/3"].x, fnnx.relu(calls["norms/2"].y))

    def test_gradients_are_the_same_bits(self):
        weight = jnp.asarray(normal(4, 5, 5, 4), jnp.float32)
        recorded = nnx.record_norms(called)

        def plain(model, x):
            return (called(model, x) * weight).sum()

        def loss(model, x):
            y, calls = recorded(model, x)
            return (y * weight).sum(), calls

        expected = fnnx.jit(fnnx.grad(plain))(Twin(fnnx.Rngs(0)), X)
        found, calls = fnnx.jit(fnnx.grad(loss, has_aux=True))(Twin(fnnx.Rngs(0)), X)
        chex.assert_trees_all_equal(fnnx.to_pure_dict(found), fnnx.to_pure_dict(expected))
        assert calls["norms/1"].x.shape == (4, 5, 5, 4)

    def test_the_model_keeps_its_classes(self):
        model = Twin(fnnx.Rngs(0))
        classes = [type(layer) for layer in model.norms]
        nnx.record_norms(called)(model, X)
        assert [type(layer) for layer in model.norms] == classes

        def fails(model, x):
            model(x)
            raise RuntimeError

        with pytest.raises(RuntimeError):
            nnx.record_norms(fails)(model, X)
        assert [type(layer) for layer in model.norms] == classes
        assert len(nnx.record_norms(called)(model, X)[1]) == 4

    def test_altered_outputs_are_used(self):
        def alter(path, y):
            return y.at[0].set(7.0) if path == "norms/3" else y

        y = nnx.alter_norms(called, alter)(Twin(fnnx.Rngs(0)), X)
        np.testing.assert_array_equal(y, called(Twin(fnnx.Rngs(0)), X).at[0].set(7.0))

    def test_a_layer_that_is_called_twice_and_a_model_that_is_a_layer(self):
        layer = nnx.LayerNorm(3, rngs=fnnx.Rngs(0))
        _, calls = nnx.record_norms(lambda layer, x: layer(2 * layer(x)))(layer, X)
        assert list(calls) == ["", "#1"]
        np.testing.assert_array_equal(calls["#1"].x, 2 * calls[""].y)

    def test_layers_of_other_classes(self):
        _, calls = nnx.record_norms(called, layers=fnnx.Conv)(Twin(fnnx.Rngs(0)), X)
        assert list(calls) == ["conv"]

    @pytest.mark.parametrize(
        "forward",
        [fnnx.jit(called), fnnx.remat(called), lambda model, x: fnnx.clone(model)(x)],
        ids=["jit", "remat", "clone"],
    )
    def test_values_do_not_leave_a_transformation(self, forward):
        with pytest.raises(ValueError, match="inside of a transformation within forward"):
            nnx.record_norms(forward)(Twin(fnnx.Rngs(0)), X)


def test_both_frameworks_record_the_same():
    x = jnp.asarray(normal(4, 6) * 3 + 1, jnp.float32)
    layer = linen.Norm(methods.batch_norm(epsilon=0.0))
    variables = layer.init(KEY, x, use_running_average=False)

    def apply(v, x):
        return layer.apply(v, x, use_running_average=False, mutable=["batch_stats"])

    _, one = linen.record_norms(apply)(variables, x)
    twin = nnx.Norm(6, methods.batch_norm(epsilon=0.0), rngs=fnnx.Rngs(0))
    _, other = nnx.record_norms(called)(twin, x)
    chex.assert_trees_all_equal(one[""], other[""])
    sets = oracle.set_numbers(x.shape, lambda n, p, c, N, P, C: (c,))
    expected = oracle.normalized(np.asarray(x), sets, epsilon=0.0)
    np.testing.assert_allclose(one[""].y, expected.y, rtol=1e-5, atol=1e-5)
