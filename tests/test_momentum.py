"""Momentum Batch Normalization: its definition, gradient and limits, and the schedules."""

from functools import partial

import chex
import jax
import numpy as np
import pytest
from compiled import jit
from helpers import close, data

from jaxnorm import methods
from jaxnorm.schedules import inference_momentum, train_momentum_schedule

SHAPE, E = (6, 3, 4), 1e-3
METHOD = methods.momentum_batch_norm(momentum=0.7, epsilon=E)


def some_state():
    rng = np.random.default_rng(9)
    return {name: rng.uniform(0.5, 4, 4) for name in ("train_mean", "train_var", "mean", "var")}


@jit
def differentiated(x, gy, state, weight):
    y, pull, new = jax.vjp(
        lambda x: METHOD.apply(x, state, train=True, train_momentum=weight),
        x,
        has_aux=True,
    )
    return y, pull(gy)[0], new


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_definition_and_closed_form_of_the_gradient(weight):
    """The batch keeps 1 - lambda of the gradient through statistics, centred at the batch's own
    mean."""
    x, g, state = data(*SHAPE), data(*SHAPE, seed=1), some_state()
    y, dx, new = differentiated(x, g, state, weight)
    mean, var = x.mean((0, 1)), x.var((0, 1))
    blended = {
        "train_mean": weight * state["train_mean"] + (1 - weight) * mean,
        "train_var": weight * state["train_var"] + (1 - weight) * var,
    }
    inference = {"mean": 0.7 * state["mean"] + 0.3 * mean, "var": 0.7 * state["var"] + 0.3 * var}
    s = np.sqrt(blended["train_var"] + E)
    x_hat = (x - blended["train_mean"]) / s
    gradient = (g - (1 - weight) * (g.mean((0, 1)) + (x - mean) / s * (g * x_hat).mean((0, 1)))) / s
    close((y, dx, dict(new)), (x_hat, gradient, blended | inference))
    evaluated = jit(lambda x, state: METHOD.apply(x, state, train=False)[0])(x, new)
    close(evaluated, (x - inference["mean"]) / np.sqrt(inference["var"] + E))  # whatever lambda is


@pytest.mark.usefixtures("x64")
def test_empty_sets_are_normalized_with_the_old_training_statistics():
    x, state = data(*SHAPE), some_state()
    method = methods.momentum_batch_norm(0.4, epsilon=E)
    y, new = jit(lambda x: method.apply(x, state, train=True, weights=np.zeros((1, 1, 1))))(x)
    close((y, dict(new)), ((x - state["train_mean"]) / np.sqrt(state["train_var"] + E), state))


def test_training_needs_the_weight_and_inference_does_not():
    x, state = data(*SHAPE).astype("f4"), METHOD.init(SHAPE)
    METHOD.apply(x, state, train=False)
    with pytest.raises(
        ValueError, match=r"Got train_momentum=None; expected 0 .* to 1.*train_momentum_schedule"
    ):
        METHOD.apply(x, state, train=True)
    given, later = methods.momentum_batch_norm(0.4), methods.momentum_batch_norm()
    chex.assert_trees_all_equal(
        given.apply(x, state, train=True), later.apply(x, state, train=True, train_momentum=0.4)
    )


def test_schedule_is_the_papers_and_is_data():
    """In the paper's form rho^(T / (T - 1) max(T - t, 0)) - rho^T; epochs change without compiling
    again."""
    epochs = 200
    table = {
        2: (0, 0.061, 0.186, 0.436, 0.9375),
        8: (0, 0.102, 0.248, 0.456, 0.75),
        32: (0,) * 5,
        64: (0,) * 5,
    }

    @partial(jit, static_argnames="size")
    @chex.assert_max_traces(n=len(table))
    def schedule(t, size):
        return train_momentum_schedule(t, epochs=epochs, batch_size=size)

    for size, values in table.items():
        rho = min(size / 32, 1) ** (1 / epochs)
        got = np.array([schedule(t, size) for t in range(1, epochs + 1)])
        paper = [
            rho ** (epochs / (epochs - 1) * max(epochs - t, 0)) - rho**epochs
            for t in range(1, epochs + 1)
        ]
        np.testing.assert_allclose(got, paper, atol=1e-6)
        np.testing.assert_allclose(got[[0, 49, 99, 149, 199]], values, atol=6e-4)
        assert (np.diff(got) >= 0).all()
        assert schedule(0, size) == 0 and schedule(300, size) == got[-1]
    assert [round(inference_momentum(m), 5) for m in (2, 8, 32)] == [0.99344, 0.974, 0.9]
    assert inference_momentum(64, base=0.8) == 0.8**2
    with pytest.raises(ValueError, match="Got epochs=1; expected 2 or more"):
        train_momentum_schedule(1, epochs=1, batch_size=2)
    with pytest.raises(ValueError, match="Got batch_size=0 and ideal_batch_size=32"):
        inference_momentum(0)
    with pytest.raises(ValueError, match="Got batch_size=nan"):
        inference_momentum(np.nan)
    with pytest.raises(ValueError, match="base is 1.5; expected"):
        inference_momentum(2, base=1.5)


def test_weights_of_the_old_statistics_are_weights():
    """Refused where known; a traced one beyond 0 or 1 is clipped, and NaN stores nothing."""
    x, state = data(*SHAPE).astype("f4"), METHOD.init(SHAPE)
    for wrong in (-1, 2, np.nan, np.full(4, 0.5)):
        with pytest.raises(ValueError, match="train_momentum .*expected a number of at least 0"):
            METHOD.apply(x, state, train=True, train_momentum=wrong)
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match="train_momentum .*expected a number of at least 0"):
            methods.momentum_batch_norm(wrong)
    run = jit(lambda weight: METHOD.apply(x, state, train=True, train_momentum=weight))
    for wrong, right in ((-1.0, 0.0), (2.0, 1.0)):
        np.testing.assert_array_equal(run(wrong)[0], run(right)[0])
    new = run(np.nan)[1]
    for name in ("train_mean", "train_var"):
        np.testing.assert_array_equal(new[name], state[name])


def test_what_normalizes_is_what_is_stored():
    """Also where the mean is far from 0: the blend is taken the same way."""
    x = (data(*SHAPE) + 1e4).astype("f4")
    method = methods.momentum_batch_norm(0.9)
    state = method.init(SHAPE) | {"train_mean": np.full(4, 1e4, "f4")}
    y, new = jit(lambda x: method.apply(x, state, train=True))(x)
    std = np.sqrt(np.float64(new["train_var"]) + 1e-5)
    np.testing.assert_allclose(y, (x - np.float64(new["train_mean"])) / std, rtol=1e-5, atol=1e-5)
