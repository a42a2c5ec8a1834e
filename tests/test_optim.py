"""Weight decay on scale and bias: of which parameters, towards what, and by which penalty."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as fnn
from flax import nnx as fnnx

import jaxnorm
from jaxnorm import linen, methods, nnx
from jaxnorm.optim import add_norm_decay, decay_mask, norm_mask, norm_penalty

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def standard_promotion():
    """optax multiplies by Python numbers and float32 schedules."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Net(fnn.Module):
    """Norms with and without scale and bias, beside layers that also have a bias or a scale."""

    @fnn.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=True)(fnn.Conv(4, (3, 3))(x))
        x = linen.LayerNorm(use_scale=False)(x)
        x = linen.GroupNorm(2, use_bias=False)(x)
        x = fnn.MultiHeadDotProductAttention(2)(x.reshape(x.shape[0], -1, 4))
        x = fnn.WeightNorm(fnn.Dense(4))(fnn.RMSNorm()(x))
        bias = self.param("bias", fnn.initializers.zeros, (4,))
        return fnn.Embed(3, 4)(jnp.zeros(1, int)) + fnn.Dense(4)(x).mean((0, 1))[None] + bias[None]


def shapes(net, *inputs):
    return jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]


def true_paths(mask):
    leaves = jax.tree_util.tree_flatten_with_path(mask)[0]
    return {"/".join(str(getattr(k, "key", k)) for k in path) for path, value in leaves if value}


def test_norms_are_found_in_linen():
    params = shapes(Net(), jnp.ones((1, 4, 4, 3)))
    found = {
        "BatchNorm_0/scale",
        "BatchNorm_0/bias",
        "LayerNorm_0/bias",
        "GroupNorm_0/scale",
        "RMSNorm_0/scale",
    }
    assert true_paths(norm_mask(params)) == found
    decayed = true_paths(decay_mask(params))
    assert (
        not any(path.endswith("/bias") or path == "bias" for path in decayed)
        and not decayed & found
    )
    assert {
        "Conv_0/kernel",
        "Embed_0/embedding",
        "MultiHeadDotProductAttention_0/query/kernel",
    } <= decayed
    everything = set(true_paths(jax.tree.map(lambda t: True, params)))
    assert true_paths(decay_mask(params, biases=True)) == everything - found


def test_norms_are_found_in_nnx():
    rngs = fnnx.Rngs(0)
    model = fnnx.List(
        [
            fnnx.Linear(2, 3, rngs=rngs),
            nnx.BatchNorm(3, rngs=rngs),
            nnx.LayerNorm(3, use_scale=False, rngs=rngs),
            fnnx.Embed(2, 3, rngs=rngs),
            nnx.Norm(3, methods.group_norm(3), use_bias=False, rngs=rngs),
        ]
    )
    params = fnnx.state(model, fnnx.Param)
    mask = norm_mask(params)
    found = [fnnx.to_pure_dict(mask)[i] for i in range(5)]
    assert found == [
        {"bias": False, "kernel": False},
        {"bias": True, "scale": True},
        {"bias": True},
        {"embedding": False},
        {"scale": True},
    ]
    optimizer = fnnx.Optimizer(
        model, optax.chain(add_norm_decay(0.5), optax.sgd(1.0)), wrt=fnnx.Param
    )
    model[1].scale[...] = jnp.full(3, 3.0)
    kernel = model[0].kernel[...]
    optimizer.update(model, jax.tree.map(jnp.zeros_like, params))
    assert model[1].scale[...].tolist() == [2.0] * 3
    np.testing.assert_array_equal(model[0].kernel[...], kernel)


@pytest.mark.parametrize("use_scale", [False, True])
@pytest.mark.parametrize(
    "method, others",
    [
        (methods.evonorm_b0(), {"v"}),
        (
            methods.filter_response_norm(use_slope=True, use_learned_epsilon=True),
            {"threshold", "slope", "learned_epsilon"},
        ),
        (methods.group_norm_plus(), {"mixture"}),
        (methods.switchable_norm(), {"mean_logits", "var_logits"}),
        (methods.proxy_norm(methods.layer_norm()), {"proxy_scale", "proxy_bias"}),
    ],
    ids=lambda t: type(t).__name__,
)
def test_norms_with_other_parameters(method, others, use_scale):
    layer = linen.Norm(method, use_running_average=True, use_scale=use_scale)
    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.ones((2, 4, 4, 64))))[
        "params"
    ]
    own = {"scale", "bias"} & set(params)
    assert set(params) - own == others and ("scale" in own) == use_scale
    assert true_paths(norm_mask({"net": params})) == {f"net/{name}" for name in own}
    decayed = {f"net/{name}" for name in others if name.startswith("proxy")}
    assert (
        true_paths(decay_mask({"net": params}))
        == true_paths(decay_mask({"net": params}, biases=True))
        == decayed
    )


def test_the_gain_of_a_kernel_does_not_decay_and_other_layers_parameters_of_these_names_do():
    params = {"a": {"kernel": 1.0, "gain": 1.0, "bias": 0.0}, "b": {"v": 1.0, "k": 1.0}}
    assert true_paths(decay_mask(params)) == {"a/kernel", "b/v", "b/k"} and not true_paths(
        norm_mask(params)
    )


PARAMS = {
    "Dense_0": {"kernel": np.array([[2.0, 3.0]]), "bias": np.array([4.0, 5.0])},
    "BatchNorm_0": {"scale": np.array([3.0, 0.5]), "bias": np.array([2.0, -1.0])},
    "LayerNorm_0": {"bias": np.array([-3.0])},
}


@pytest.mark.parametrize("target", [1.0, 0.0])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_the_gradient_and_the_penalty(target, unit_offset, x64):
    params = jax.tree.map(jnp.asarray, PARAMS)
    if unit_offset:
        params["BatchNorm_0"]["scale"] -= 1
    options = {"target": target, "unit_offset": unit_offset}
    decay = add_norm_decay(0.1, **options)
    update, _ = decay.update(jax.tree.map(jnp.ones_like, params), decay.init(params), params)
    zero = {"Dense_0": {"kernel": 0.0, "bias": 0.0}}
    wanted = zero | {
        "BatchNorm_0": {
            "scale": 0.1 * (PARAMS["BatchNorm_0"]["scale"] - target),
            "bias": 0.1 * PARAMS["BatchNorm_0"]["bias"],
        },
        "LayerNorm_0": {"bias": 0.1 * PARAMS["LayerNorm_0"]["bias"]},
    }
    jax.tree.map(
        lambda u, t: np.testing.assert_allclose(u, 1 + t + np.zeros_like(u), rtol=1e-12),
        update,
        wanted,
    )
    gradient = jax.grad(lambda p: norm_penalty(p, 0.1, **options))(params)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u - 1, g, atol=1e-12), update, gradient)
    value = 0.05 * sum((t**2).sum() / 0.01 for t in jax.tree.leaves(wanted) if np.ndim(t))
    np.testing.assert_allclose(norm_penalty(params, 0.1, **options), value, rtol=1e-12)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_nothing_decays_at_initialization(unit_offset):
    layer = linen.BatchNorm(use_running_average=True, unit_offset=unit_offset)
    params = {"norm": layer.init(jax.random.key(0), jnp.ones((1, 3)))["params"]}
    assert float(norm_penalty(params, 1.0, unit_offset=unit_offset)) == 0
    decay = add_norm_decay(1.0, unit_offset=unit_offset)
    update, _ = decay.update(jax.tree.map(jnp.zeros_like, params), decay.init(params), params)
    assert all(not t.any() for t in jax.tree.leaves(update))


def test_a_schedule_and_no_parameters():
    params = jax.tree.map(jnp.asarray, PARAMS)
    decay = add_norm_decay(lambda step: 0.5 * step)
    state = decay.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    first, state = decay.update(zeros, state, params)
    second, _ = decay.update(zeros, state, params)
    assert first["LayerNorm_0"]["bias"].tolist() == [0.0] and second["LayerNorm_0"][
        "bias"
    ].tolist() == [-1.5]
    with pytest.raises(ValueError, match="Got params=None"):
        decay.update(zeros, state)


def test_inside_a_mask_and_a_chain():
    """The usual recipe: weights toward 0, norms toward 1, and other biases not at all."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    optimizer = optax.chain(
        optax.add_decayed_weights(0.1, mask=decay_mask),
        optax.masked(add_norm_decay(0.5), norm_mask),
        optax.sgd(1.0),
    )
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
        new["Dense_0"]["kernel"], 0.9 * PARAMS["Dense_0"]["kernel"], rtol=1e-6
    )
    np.testing.assert_array_equal(new["Dense_0"]["bias"], PARAMS["Dense_0"]["bias"])
    np.testing.assert_allclose(new["BatchNorm_0"]["scale"], [2.0, 0.75], rtol=1e-6)


def test_joint_scaling_through_relu_linear_and_batch_norm_changes_nothing(x64):
    """Why the size of scale and bias is free there, and decaying them is only a choice of step
    size."""
    rng = np.random.default_rng(0)
    x, kernel, scale, bias = (jnp.asarray(rng.normal(size=s)) for s in ((16, 5), (5, 4), 5, 5))

    def chain(scale, bias, x):
        y, _ = jaxnorm.norm(x, methods.batch_norm(), scale=scale, bias=bias, activation=jax.nn.relu)
        return jaxnorm.norm(y @ kernel, methods.batch_norm(), epsilon=1e-30)[0]

    out, pull = jax.vjp(chain, scale, bias, x)
    scaled, pull_scaled = jax.vjp(chain, 7.5 * scale, 7.5 * bias, x)
    np.testing.assert_allclose(scaled, out, atol=1e-12)
    cotangent = jnp.asarray(rng.normal(size=out.shape))
    (gs, gb, gx), (hs, hb, hx) = pull(cotangent), pull_scaled(cotangent)
    np.testing.assert_allclose(hx, gx, atol=1e-12)
    np.testing.assert_allclose(7.5 * hs, gs, atol=1e-12)
    np.testing.assert_allclose(7.5 * hb, gb, atol=1e-12)
    # no gradient along the scaling
    np.testing.assert_allclose(gs @ scale + gb @ bias, 0, atol=1e-12)
