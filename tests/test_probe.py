"""Probes on cases with known answers, beside their definitions in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as fnnx

from jaxnorm import EACH, Groups, Moments, methods, moments, norm, probe
from jaxnorm.inference import weigh_example

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


class TestAlongGradient:
    @pytest.fixture
    def quadratic(self, x64):
        """L = (w - c)' A (w - c) / 2, and what the definitions say of it, in NumPy."""
        root, w, c = normal(5, 5), normal(5, seed=1), normal(5, seed=2)
        a = root @ root.T / 5
        steps = np.array([0.05, 0.2, 0.4])

        def loss(tree, center):
            d = jnp.concatenate([tree["a"], tree["b"].ravel()]) - center
            return d @ jnp.asarray(a) @ d / 2

        seen = probe.along_gradient(
            loss, {"a": jnp.asarray(w[:2]), "b": jnp.asarray(w[2:, None])}, c, steps=steps
        )
        return seen, a, w - c, steps

    def test_of_a_quadratic_loss(self, quadratic):
        seen, a, d, steps = quadratic
        g = a @ d
        there = [d - s * g for s in steps]
        np.testing.assert_allclose(seen.loss, d @ a @ d / 2, rtol=1e-12)
        np.testing.assert_allclose(seen.gradient_norm, np.linalg.norm(g), rtol=1e-12)
        np.testing.assert_allclose(seen.losses, [t @ a @ t / 2 for t in there], rtol=1e-12)
        changes = [np.linalg.norm(a @ t - g) for t in there]
        np.testing.assert_allclose(seen.gradient_changes, changes, rtol=1e-12)

    def test_smoothness_of_a_quadratic_loss_is_its_curvature_along_the_gradient(self, quadratic):
        seen, a, d, _ = quadratic
        g = a @ d
        along = np.linalg.norm(a @ g) / np.linalg.norm(g)
        np.testing.assert_allclose(seen.smoothness, np.full(3, along), rtol=1e-12)
        assert seen.smoothness.max() <= np.linalg.eigvalsh(a).max()

    def test_smoothness_is_the_largest_curvature_where_the_gradient_is_its_direction(self, x64):
        curvatures = jnp.array([1.0, 2.0, 9.0])

        def loss(w):
            return (curvatures * w**2).sum() / 2

        seen = probe.along_gradient(loss, jnp.array([0.0, 0.0, 3.0]), steps=[0.1, 0.3])
        np.testing.assert_allclose(seen.smoothness, [9.0, 9.0], rtol=1e-12)

    def test_a_linear_loss_has_a_gradient_that_predicts(self):
        seen = probe.along_gradient(lambda w: 3 * w.sum(), jnp.ones(4), steps=[1.0, 2.0])
        np.testing.assert_array_equal(seen.gradient_changes, [0, 0])
        np.testing.assert_array_equal(seen.losses, [12 - 36, 12 - 72])

    def test_smoothness_finds_a_kink_that_only_long_steps_reach(self, x64):
        def loss(w):
            return jnp.where(w > 0, w, -10 * w)

        seen = probe.along_gradient(loss, jnp.array(1.0), steps=[0.5, 2.0])
        np.testing.assert_allclose(seen.gradient_changes, [0, 11])
        np.testing.assert_allclose(seen.smoothness, [0, 5.5])

    def test_complex_parameters_descend(self):
        def loss(w):
            return jnp.abs(w) ** 2

        seen = probe.along_gradient(loss, jnp.array(3 + 4j), steps=[0.25, 0.5])
        np.testing.assert_allclose(seen.losses, [6.25, 0], atol=1e-5)
        np.testing.assert_allclose(seen.smoothness, [2, 2], rtol=1e-5)

    def test_half_precision_is_measured_in_single(self):
        w = jnp.full(4096, 16.0, jnp.float16)  # the sum of squares is beyond float16

        def loss(w):
            return (w.astype(jnp.float32) ** 2).sum() / 2

        seen = probe.along_gradient(loss, w, steps=[0.5])
        np.testing.assert_allclose(seen.gradient_norm, 16 * 64)
        np.testing.assert_allclose(seen.smoothness, [1.0], rtol=1e-6)

    def test_where_nothing_moves_smoothness_is_not_a_number(self):
        seen = probe.along_gradient(lambda w: (w**2).sum(), jnp.zeros(3), steps=[0.1])
        assert np.isnan(seen.smoothness).all() and (seen.losses == 0).all()

    def test_jit_with_traced_steps(self):
        def loss(w, x):
            return jnp.sin(w * x).sum()

        def look(w, x, steps):
            return probe.along_gradient(loss, w, x, steps=steps)

        arguments = jnp.arange(3.0), jnp.ones(3), jnp.array([0.1, 0.2])
        chex.assert_trees_all_close(jax.jit(look)(*arguments), look(*arguments), rtol=1e-5)

    def test_gradient_change(self, x64):
        a, b = normal(7), normal(7, seed=1)
        trees = [{"u": jnp.asarray(t[:3]), "v": [jnp.asarray(t[3:])]} for t in (a, b)]
        np.testing.assert_allclose(probe.gradient_change(*trees), np.linalg.norm(a - b))


class TestDepth:
    def test_l2_by_layer(self, x64):
        kernel, bias, scale = normal(3, 4), normal(4, seed=1), normal(4, seed=2)
        tree = {"Block_0": {"Conv_0": {"kernel": kernel, "bias": bias}}, "Norm_0": {"scale": scale}}
        found = probe.l2_by_layer(tree)
        assert list(found) == ["Block_0/Conv_0", "Norm_0"]
        whole = np.sqrt((kernel**2).sum() + (bias**2).sum())
        np.testing.assert_allclose(found["Block_0/Conv_0"], whole, rtol=1e-12)
        np.testing.assert_allclose(found["Norm_0"], np.linalg.norm(scale), rtol=1e-12)

    def test_l2_by_layer_of_an_nnx_model(self):
        model = fnnx.Sequential(fnnx.Linear(2, 3, rngs=fnnx.Rngs(0)))
        found = probe.l2_by_layer(fnnx.state(model, fnnx.Param))
        assert list(found) == ["layers/0"]
        np.testing.assert_allclose(
            found["layers/0"], np.linalg.norm(model.layers[0].kernel[...]), rtol=1e-6
        )

    def test_gradients_shrink_through_a_linear_network_as_its_weights_say(self, x64):
        """d/dW_1 of a product of scalars a^depth x is a^(depth - 1) x."""
        a, depth = 0.5, 5

        def loss(tree):
            return jnp.prod(jnp.stack([tree[f"l{i}"]["w"] for i in range(depth)]))

        gradients = jax.grad(loss)({f"l{i}": {"w": jnp.asarray(a)} for i in range(depth)})
        for size in probe.l2_by_layer(gradients).values():
            np.testing.assert_allclose(size, a ** (depth - 1))

    @pytest.mark.parametrize("num_groups", [1, 2, EACH])
    def test_effective_learning_rates(self, num_groups, x64):
        kernel = normal(3, 3, 2, 4)
        rates = probe.effective_learning_rates(
            {"k": jnp.asarray(kernel)}, learning_rate=0.3, num_groups=num_groups
        )
        parts = np.split(kernel, 4 if num_groups == EACH else num_groups, axis=-1)
        np.testing.assert_allclose(rates["k"], [0.3 / (p**2).sum() for p in parts], rtol=1e-12)

    def test_it_is_the_learning_rate_of_the_direction(self, x64):
        """Steps from a w with the rate that makes the effective ones equal go the same way."""
        x, w = jnp.asarray(normal(16, 3)), jnp.asarray(normal(3, 4, seed=1))

        def loss(w):
            return jnp.sin(norm(x @ w, methods.batch_norm(), epsilon=0.0)[0]).sum()

        def direction(w, rate):
            rates = probe.effective_learning_rates(w, learning_rate=rate, num_groups=EACH)
            w = w - rate * jax.grad(loss)(w)
            return rates, w / jnp.linalg.norm(w, axis=0, keepdims=True)

        (rates, one), (of_longer, other) = direction(w, 0.1), direction(5 * w, 0.1 * 25)
        np.testing.assert_allclose(rates, of_longer, rtol=1e-12)
        np.testing.assert_allclose(one, other, rtol=1e-9)
        assert np.abs(one - w / jnp.linalg.norm(w, axis=0, keepdims=True)).max() > 1e-3


class TestNoise:
    def test_moments_of_the_noise(self):
        t = probe.noise(KEY, jnp.zeros((64, 8, 8, 16)), Groups(), mean=0.5, std=1.25)
        np.testing.assert_allclose([t.mean(), t.std()], [0.5, 1.25], atol=0.02)
        assert len(np.unique(t)) > 0.9 * t.size

    @pytest.mark.parametrize("row", [methods.group_norm(2), methods.batch_norm(), (4, 1, 3, 1)])
    def test_each_set_has_one_draw(self, row):
        x = jnp.zeros((4, 3, 3, 6), jnp.bfloat16)
        t = probe.noise(KEY, x, row)
        assert t.shape == x.shape and t.dtype == x.dtype
        m = moments(t.astype(jnp.float32), row)
        assert (m.var == 0).all()
        assert len(np.unique(m.mean)) == m.mean.size

    def test_channels_first(self):
        t = probe.noise(KEY, jnp.zeros((2, 4, 3)), Groups(1, 1, 2), channel_axis=1)
        assert (t[:, :2] == t[0, 0, 0]).all() and (t[:, 2:] == t[0, 2, 0]).all()
        assert t[0, 0, 0] != t[0, 2, 0]

    def test_sensitivity_of_a_linear_model(self, x64):
        w, x, d = normal(3, 4), normal(8, 3, seed=1), normal(8, 3, seed=2)
        strengths = np.array([0.1, 1.0, 3.0])

        def forward(s):
            return {"logits": (x + s * d) @ w}

        expected = strengths * np.linalg.norm(d @ w) / np.linalg.norm(x @ w)
        np.testing.assert_allclose(
            probe.sensitivity(forward, strengths=strengths), expected, rtol=1e-12
        )
        jitted = jax.jit(lambda s: probe.sensitivity(forward, strengths=s))
        np.testing.assert_allclose(jitted(strengths), expected, rtol=1e-12)

    def test_a_norm_is_insensitive_to_what_it_removes(self):
        x = jnp.asarray(normal(4, 5, 5, 6), jnp.float32)

        def forward(s):  # contrast and level of each example
            return norm((1 + s) * x + s, methods.layer_norm(), epsilon=0.0)[0]

        def of_batch(s):
            return norm(x.at[0].multiply(1 + s), methods.batch_norm())[0]

        assert probe.sensitivity(forward, strengths=[1.0])[0] < 1e-5
        assert probe.sensitivity(of_batch, strengths=[1.0])[0] > 0.1


class TestStatistics:
    def test_against_numpy(self, x64):
        x = normal(6, 8, 5, 3) * 2 + 1
        batches = jax.vmap(lambda t: moments(t, methods.batch_norm()))(jnp.asarray(x))
        mean, var = np.array([0.5, 1.0, 2.0]), np.array([3.0, 4.0, 5.0])
        population = Moments(None, *(jnp.asarray(t).reshape(1, 1, 3) for t in (mean, var)))
        found = probe.statistics_spread(batches, population=population)
        ratios = x.var((1, 2)) / var
        shifts = (x.mean((1, 2)) - mean) / np.sqrt(var)
        expected = (
            ratios.mean(0), ratios.std(0, ddof=1), shifts.mean(0), shifts.std(0, ddof=1),
            1 / shifts.var(0, ddof=1),
        )  # fmt: skip
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.ravel(), other, rtol=1e-10)

    def test_without_a_population_the_batches_are_it(self, x64):
        x = normal(6, 8, 5, 3)
        batches = jax.vmap(lambda t: moments(t, methods.batch_norm()))(jnp.asarray(x))
        found = probe.statistics_spread(batches)
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        np.testing.assert_allclose(found.var_ratio.ravel(), (x.var((1, 2)) / var).mean(0))
        np.testing.assert_allclose(found.mean_shift.ravel(), np.zeros(3), atol=1e-12)
        shifts = (x.mean((1, 2)) - mean) / np.sqrt(var)
        np.testing.assert_allclose(found.mean_spread.ravel(), shifts.std(0, ddof=1))

    def test_batches_count_by_their_elements(self, x64):
        """As with masks: the pooled mean is that of all elements."""
        m = Moments(*(jnp.array([[a], [b]]) for a, b in ((3.0, 1.0), (0.0, 4.0), (1.0, 1.0))))
        variance = 1 + 3.0  # of means 0, 0, 0, 4
        found = probe.statistics_spread(m)
        np.testing.assert_allclose(found.var_ratio, [1 / variance])
        np.testing.assert_allclose(found.mean_shift, [1 / np.sqrt(variance)])

    @pytest.mark.parametrize("n", [2, 8, 50])
    def test_independent_elements_spread_as_theory_says(self, n):
        x = jnp.asarray(normal(4000, n, 4), jnp.float32)
        batches = jax.vmap(lambda t: moments(t, methods.batch_norm()))(x)
        found = probe.statistics_spread(
            batches, population=Moments(None, *jnp.array([[[0.0] * 4], [[1.0] * 4]]))
        )
        mean = [t.mean() for t in found]
        expected = (n - 1) / n, np.sqrt(2 * (n - 1)) / n, 0, 1 / np.sqrt(n), n
        np.testing.assert_allclose(mean[:2], expected[:2], rtol=0.05)
        np.testing.assert_allclose(mean[2], 0, atol=0.03)
        np.testing.assert_allclose(mean[3:], expected[3:], rtol=0.05)

    def test_elements_that_are_the_same_do_not_count(self):
        x = jnp.repeat(jnp.asarray(normal(4000, 8, 1), jnp.float32), 16, axis=2)
        batches = jax.vmap(lambda t: moments(t, (1, 1)))(x)  # 128 elements of 8 values
        found = probe.statistics_spread(batches).effective_count
        np.testing.assert_allclose(found, [[8]], rtol=0.06)

    def test_complex_means(self, x64):
        m = Moments(jnp.ones((2, 1)), jnp.array([[1j], [-1j]]), jnp.ones((2, 1)))
        population = Moments(None, jnp.zeros(1, complex), jnp.full(1, 4.0))
        found = probe.statistics_spread(m, population=population)
        np.testing.assert_allclose(found.mean_spread, [np.sqrt(0.5)])

    @pytest.mark.parametrize("n", [2, 5, 100])
    def test_the_bound_of_training_is_reached_and_held(self, n):
        x = jnp.zeros((n, 1)).at[0].set(3.0)  # one element against equal ones
        seen = probe.range_excess(x, moments(x, methods.batch_norm()), count=n, epsilon=0.0)
        np.testing.assert_allclose(seen.bound, np.sqrt(n - 1), rtol=1e-6)
        np.testing.assert_allclose(seen.excess, 1, rtol=1e-5)
        assert seen.beyond == 0
        x = jnp.asarray(normal(n, 50) ** 5, jnp.float32)
        assert probe.range_excess(x, moments(x, methods.batch_norm()), count=n).excess <= 1.00001

    def test_against_an_oracle(self):
        x = np.asarray(normal(16, 3, 3, 4) ** 3, np.float32)
        mean, var = np.float32([0.1, 0, 0, 0]), np.float32([1, 2, 3, 4])
        running = Moments(None, *(jnp.asarray(t).reshape(1, 1, 1, 4) for t in (mean, var)))
        z = np.abs((x.astype(np.float64) - mean) / np.sqrt(var + 1e-5))
        seen = jax.jit(lambda x: probe.range_excess(x, running, count=5))(x)
        np.testing.assert_allclose(seen.largest, z.max(), rtol=1e-6)
        np.testing.assert_allclose(seen.beyond, (z > 2).mean(), rtol=1e-6)
        assert 0 < seen.beyond < 1

    def test_weighing_examples_restores_the_bound(self):
        """(N, C): with alpha = 1/n an example stays within sqrt(n - 1), whatever is remembered."""
        x, n = jnp.array([[1e4], [0.5], [-3e3]]), 8
        running = Moments(jnp.ones((1, 1)), jnp.zeros((1, 1)), jnp.ones((1, 1)))
        assert probe.range_excess(x, running, count=n).excess > 1000
        m = weigh_example(x, running, methods.batch_norm(), example_weight=1 / n)
        assert probe.range_excess(x, m, count=n).excess <= 1.0001


class TestChannelPower:
    @pytest.mark.parametrize("axes", [(0, -1), (0, 1), (2, 0)])
    def test_against_numpy(self, axes, x64):
        x = normal(6, 5, 4, 3) * 2 + 1
        batch, channel = axes
        moved = np.moveaxis(x, axes, (0, 1)).reshape(x.shape[batch], x.shape[channel], -1)
        mean, std = moved.mean(-1), moved.std(-1)
        expected = mean.mean(0) ** 2, mean.var(0), std.mean(0) ** 2, std.var(0)
        power = jax.jit(lambda x: probe.channel_power(x, batch_axis=batch, channel_axis=channel))(x)
        for one, other in zip(power, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10)
        np.testing.assert_allclose(power.total, (moved**2).mean((0, 2)), rtol=1e-12)

    def test_complex_parts_add_up(self, x64):
        x = normal(6, 5, 3) + 1j * normal(6, 5, 3, seed=1) + 2
        np.testing.assert_allclose(
            probe.channel_power(x).total, (np.abs(x) ** 2).mean((0, 1)), rtol=1e-12
        )

    def test_collapsed_channels(self):
        """Channels that are constants: layer norm keeps them, batch norm removes them."""
        x = 10 * normal(6) + 0.1 * normal(32, 4, 4, 6, seed=1)
        seen = {
            name: probe.channel_power(norm(x, row, epsilon=0.0)[0])
            for name, row in (("layer", methods.layer_norm()), ("batch", methods.batch_norm()))
        }
        assert seen["layer"].collapse > 0.99
        assert seen["batch"].collapse < 1e-6
        np.testing.assert_allclose(seen["batch"].total, np.ones(6), rtol=1e-5)

    def test_instance_norm_loses_the_variability_of_examples(self):
        x = normal(32, 1, 1, 6) + (1 + normal(32, 1, 1, 6, seed=1) ** 2) * normal(
            32, 4, 4, 6, seed=2
        )

        def of(row):
            return probe.channel_power(norm(x, row, epsilon=0.0)[0])

        assert of(methods.instance_norm()).variability < 1e-6
        np.testing.assert_allclose(of(methods.instance_norm()).within, np.ones(6), rtol=1e-5)
        assert of(methods.batch_norm()).variability > 0.2

    def test_without_positions_all_variation_is_between_examples(self, x64):
        x = normal(32, 6)
        power = probe.channel_power(x)
        np.testing.assert_array_equal(power.within + power.std_variance, np.zeros(6))
        np.testing.assert_allclose(power.mean_variance, x.var(0))
