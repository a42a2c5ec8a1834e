"""What every method between moments and normalize does alike: masks, devices, transformations,
layers, errors.

What each method computes is tested in the file of its own name.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxnorm import (
    batch_group,
    domains,
    evonorm,
    init_running,
    linen,
    memorized,
    methods,
    momentum,
    renorm,
    switchable,
)
from jaxnorm import nnx as layers_nnx
from jaxnorm._frame import averaged, remembered

C = 4
LOGITS = {"mean_logits": np.array([0.3, -0.2, 0.5]), "var_logits": np.array([-0.4, 0.1, 0.7])}
TWO_LOGITS = {name: t[:2] for name, t in LOGITS.items()}


@dataclasses.dataclass(frozen=True)
class Case:
    """A method: function(x, state, train=, **call), and the layer that is to do the same."""

    name: str
    function: Callable
    init: Callable
    layer: str
    construct: dict = dataclasses.field(default_factory=dict)
    call: dict = dataclasses.field(default_factory=dict)
    parameters: dict = dataclasses.field(default_factory=dict)
    by_example: bool = False  # whether the call takes domain=(N,)

    def __call__(self, x, state, domain, train=True, **options):
        call = self.call | ({"domain": domain} if self.by_example else {})
        return self.function(
            x, state, train=train, **(self.construct_options | call | self.parameters | options)
        )

    @property
    def construct_options(self):
        return {
            name: value
            for name, value in self.construct.items()
            if name not in ("num_domains", "use_batch")
        }

    def __str__(self):
        return self.name


CASES = (
    Case(
        "renorm",
        renorm.batch_renorm,
        renorm.init_batch_renorm,
        "BatchRenorm",
        {"momentum": 0.7},
        {"rmax": 1.1, "dmax": 0.2},
    ),
    Case(
        "momentum",
        momentum.momentum_batch_norm,
        momentum.init_momentum_batch_norm,
        "MomentumBatchNorm",
        {"momentum": 0.7},
        {"train_momentum": 0.4},
    ),
    Case(
        "memorized",
        memorized.memorized_batch_norm,
        partial(memorized.init_memorized_batch_norm, memory_size=2),
        "MemorizedBatchNorm",
        {"memory_weights": (0.2, 0.3, 0.5)},
    ),
    Case(
        "switchable",
        switchable.switchable_norm,
        switchable.init_switchable_norm,
        "SwitchableNorm",
        {"momentum": 0.7},
        parameters=LOGITS,
    ),
    Case(
        "switchable without batch",
        switchable.switchable_norm,
        lambda channels: {},
        "SwitchableNorm",
        {"use_batch": False},
        parameters=TWO_LOGITS,
    ),
    Case(
        "domain",
        domains.domain_batch_norm,
        partial(domains.init_domain_batch_norm, num_domains=3),
        "DomainSpecificBatchNorm",
        {"num_domains": 3, "momentum": 0.7},
        {"domain": 1},
    ),
    Case(
        "domains",
        domains.domain_batch_norm,
        partial(domains.init_domain_batch_norm, num_domains=3),
        "DomainSpecificBatchNorm",
        {"num_domains": 3, "momentum": 0.7},
        by_example=True,
    ),
)
STATEFUL = [case for case in CASES if case.init(C)]


def some(*names, of=CASES):
    """All cases, those of other names only in the full product."""
    marked = [
        case if case.name in names else pytest.param(case, marks=pytest.mark.slow) for case in of
    ]
    return pytest.mark.parametrize("case", marked, ids=str)


close = partial(chex.assert_trees_all_close, rtol=1e-11, atol=1e-11)


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(1, 2, shape)


def labels(n):
    """Domains 0 and 2 of three: the second is absent."""
    return (np.arange(n) * 7 % 3 % 2 * 2).astype("i4")


def some_state(case, dtype="f8"):
    """After a training step, so that no number in it is special."""
    rng = np.random.default_rng(9)
    state = jax.tree.map(
        lambda t: (np.asarray(t) + rng.uniform(0.1, 0.5, t.shape)).astype(dtype), case.init(C)
    )
    return state | ({"count": np.ones(C, dtype)} if "count" in state else {})


@pytest.mark.usefixtures("x64")
@some("renorm", "memorized", "switchable")
def test_state_is_float32_and_a_fixed_point(case):
    """Also in double precision: a scan carries it, and a loop gives the same."""
    xs, start = data(3, 6, 2, C).astype("f4"), case.init(C)
    assert all(t.dtype == jnp.float32 for t in start.values())
    run = jit(
        lambda state, xs: jax.lax.scan(lambda state, x: case(x, state, labels(6))[::-1], state, xs)
    )
    scanned, ys = run(start, xs)
    step, state = jit(lambda x, state: case(x, state, labels(6))), start
    for x, y in zip(xs, ys, strict=True):
        one, state = step(x, state)
        close(one, y, rtol=1e-5, atol=1e-5)
    close(scanned, state, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(scanned, start)
    if state:
        assert all((scanned[name] != start[name]).any() for name in start)


@pytest.mark.usefixtures("x64")
@some("memorized", "switchable", "domains")
def test_transformations_and_layouts_agree(case):
    """Forward and reverse mode, vmap, channels first, the batch last, per-example scale: one set of
    values."""
    x, gy, state, domain = data(6, 2, 3, C), data(6, 2, 3, C, seed=1), some_state(case), labels(6)
    scale = data(6, C, seed=2)

    @jit
    def run(x, gy):
        f = partial(case, state=state, domain=domain, scale=scale)
        y, pull, new = jax.vjp(f, x, has_aux=True)
        _, ty, _ = jax.jvp(f, (x,), (gy,), has_aux=True)
        stacked = jax.vmap(f)(jnp.stack([x, x[::-1]]))
        first = case(jnp.moveaxis(x, -1, 1), state, domain, scale=scale, channel_axis=1)
        last = case(jnp.moveaxis(x, 0, 2), state, domain, scale=scale, batch_axis=2)
        back = jax.tree.map(lambda t: t[0], stacked), (jnp.moveaxis(first[0], 1, -1), first[1])
        return (y, new), (*back, (jnp.moveaxis(last[0], 2, 0), last[1])), pull(ty)[0], ty

    want, others, dx, ty = run(x, gy)
    for other in others:
        close(other, want)
    np.testing.assert_allclose(np.sum(dx * gy), np.sum(ty * ty), rtol=1e-11)


def padded(t, value=0):
    return np.concatenate([t[:2], np.full_like(t[:1], value), t[2:], np.full_like(t[:2], value)])


@pytest.mark.usefixtures("x64")
@some("renorm", "switchable", "domains")
def test_what_is_masked_touches_nothing(case):
    """Padding, whatever it holds: the rest, its gradient and the state are those without it.
    Weights count elements."""
    x, gy, state, domain = data(6, 2, C), data(6, 2, C, seed=1), some_state(case), labels(6)

    @jit
    def run(x, gy, domain, weights):
        y, pull, new = jax.vjp(lambda x: case(x, state, domain, weights=weights), x, has_aux=True)
        return y, pull(gy)[0], new

    y, dx, new = run(x, gy, domain, np.ones((6, 1, 1)))
    mask = padded(np.ones((6, 1, 1), bool), False)
    kept = mask.ravel()
    for value in (1e3, np.nan):
        y_padded, dx_padded, new_padded = run(padded(x, value), padded(gy), padded(domain, 1), mask)
        close((y_padded[kept], dx_padded[kept], new_padded), (y, dx, new))
        assert not dx_padded[~kept].any() and np.isfinite(y_padded).all()
    twice = np.arange(6).repeat(1 + np.arange(6) % 2)
    weights = (1.0 + np.arange(6) % 2).reshape(6, 1, 1)
    y, _, new = run(x, gy, domain, weights)
    y_twice, _, new_twice = run(x[twice], gy[twice], domain[twice], np.ones((9, 1, 1)))
    close((y[twice], new), (y_twice, new_twice))


def differentiated(case, state, x, w, gy, domain, **options):
    y, pull, new = jax.vjp(lambda x: case(x, state, domain, weights=w, **options), x, has_aux=True)
    return y, pull(gy)[0], new


@pytest.mark.usefixtures("x64")
@some("momentum", "switchable", "domains")
def test_devices_together_are_one(case):
    """Value, gradient and state, with uneven weights and a device without any."""
    x, gy, state, domain = data(16, 2, C), data(16, 2, C, seed=1), some_state(case), labels(16)
    w = np.random.default_rng(2).uniform(0, 1, (16, 1, 1)) * (np.arange(16) > 1).reshape(16, 1, 1)
    f = partial(differentiated, case)
    want = jit(f)(state, x, w, gy, domain)
    mesh, cut = Mesh(np.array(jax.devices()), "i"), P("i")
    shard = partial(jax.shard_map, mesh=mesh, in_specs=(P(), *(cut,) * 4))
    close(
        jit(shard(partial(f, axis_name="i"), out_specs=(cut, cut, P())))(state, x, w, gy, domain),
        want,
    )


@pytest.mark.usefixtures("x64")
@some("renorm", "domains")
def test_groups_of_devices_are_batches_of_their_own(case):
    x, gy, state, domain = data(8, 2, C), data(8, 2, C, seed=1), some_state(case), labels(8)
    f = partial(differentiated, case, state)
    halves = jit(jax.vmap(lambda *args: f(*args)))
    args = (x, np.ones((8, 1, 1)), gy, domain)
    want = halves(*(t.reshape(2, 4, *t.shape[1:]) for t in args))
    groups = jit(
        jax.vmap(
            partial(f, axis_name="i", axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]]), axis_name="i"
        )
    )
    y, dx, new = groups(*(t[:, None] for t in args))
    close((y[:, 0], dx[:, 0]), jax.tree.map(lambda t: t.reshape(8, 2, C), want[:2]))
    close(jax.tree.map(lambda t: t[::4], new), want[2])


@some("renorm", "switchable", "domains")
def test_half_precision_is_computed_in_single(case):
    x, state, domain = jnp.asarray(data(6, 2, 3, C), "bfloat16"), some_state(case, "f4"), labels(6)
    y, new = jit(lambda x: case(x, state, domain))(x)
    wide, new_wide = jit(lambda x: case(x, state, domain))(x.astype("f4"))
    assert y.dtype == jnp.bfloat16 and all(t.dtype == jnp.float32 for t in new.values())
    close(new, new_wide, rtol=1e-6, atol=1e-6)
    close(y, wide.astype("bfloat16"), rtol=2**-7, atol=1e-2)


@some("memorized", "momentum", "domains", of=STATEFUL)
def test_unusable_sets_leave_the_state(case):
    """Channel by channel: one without finite moments stays to the bit, in its domain, the others
    move; y says so."""
    x, state, domain = data(6, 2, C).astype("f4"), some_state(case, "f4"), labels(6)
    x[1, 0, 2] = np.nan
    run = jit(lambda x, w: case(x, state, domain, weights=w))
    y, new = run(x, np.ones((1, 1, 1), "f4"))
    rows = labels(6)[1] if case.by_example else ...
    for name, old in state.items():
        np.testing.assert_array_equal(new[name][rows][..., 2], old[rows][..., 2])
        assert all((new[name][..., c] != old[..., c]).any() for c in (0, 1, 3))
    assert np.isnan(y[1, 0, 2]) and np.isfinite(y[..., [0, 1, 3]]).all() == (
        "switchable" not in case.name
    )
    y, new = run(x, np.zeros((1, 1, 1), "f4"))
    chex.assert_trees_all_equal(new, state)
    assert np.isfinite(y[2:]).all()


@some("momentum", "switchable", "domains", of=STATEFUL)
def test_inference_leaves_the_state_and_examples_do_not_meet(case):
    x, state, domain = data(6, 2, C).astype("f4"), some_state(case, "f4"), labels(6)
    run = jit(lambda x, domain: case(x, state, domain, train=False))
    y, new = run(x, domain)
    chex.assert_trees_all_equal(new, state)
    x[1:] = np.nan
    np.testing.assert_array_equal(run(x, domain)[0][0], y[0])


@some("renorm", "momentum", "switchable", "domains")
def test_one_value_a_set_is_finite(case):
    """One example without positions: y and its gradient."""
    x, state = data(1, C).astype("f4"), case.init(C)
    chex.assert_tree_all_finite(
        jit(partial(differentiated, case))(state, x, np.ones((1, 1)), x, labels(1))
    )


@some("renorm", "momentum", "memorized", "switchable", "switchable without batch", "domains")
def test_layers_in_linen_and_nnx_are_the_function(case):
    """Two steps of training, with a mask, and inference of another batch size; parameters and state
    by the same names."""
    x, few, mask = (
        data(6, 2, C).astype("f4"),
        data(3, 2, C, seed=1).astype("f4"),
        np.arange(6).reshape(6, 1, 1) < 5,
    )
    values = {"scale": data(C, seed=2).astype("f4"), "bias": data(C, seed=3).astype("f4")}
    values |= {name: t.astype("f4") for name, t in case.parameters.items()}
    ours = getattr(linen, case.layer)(**case.construct)
    theirs = getattr(layers_nnx, case.layer)(C, **case.construct, rngs=nnx.Rngs(0))
    for name, value in values.items():
        getattr(theirs, name)[...] = jnp.asarray(value)

    def call(n):
        return case.call | ({"domain": labels(n)} if case.by_example else {})

    variables = jit(lambda x: ours.init(jax.random.key(0), x, use_running_average=True, **call(1)))(
        few[:1]
    )
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, values)
    stats = variables.get("batch_stats", {})
    chex.assert_trees_all_equal(stats, case.init(C))
    state = case.init(C)

    @partial(jit, static_argnames="use")
    def in_linen(stats, x, mask, use):
        more = {} if use else {"mutable": "batch_stats"}
        options = {"use_running_average": use, "mask": mask, **call(len(x)), **more}
        out = ours.apply({"params": values, "batch_stats": stats}, x, **options)
        return (out, stats) if use else (out[0], out[1].get("batch_stats", {}))

    @nnx.jit(static_argnames="use")
    def in_nnx(layer, x, mask, use):
        return layer(x, use_running_average=use, mask=mask, **call(len(x)))

    @partial(jit, static_argnames="train")
    def in_function(state, x, mask, train):
        options = {name: value for name, value in values.items() if name in ("scale", "bias")}
        return case(x, state, labels(len(x)), train, weights=mask, **options)

    for t, use in ((x, False), (x[::-1], False), (few, True)):
        y, state = in_function(state, t, mask[: len(t)], not use)
        y_linen, stats = in_linen(stats, t, mask[: len(t)], use)
        y_nnx = in_nnx(theirs, t, mask[: len(t)], use)
        close((y_linen, y_nnx), (y, y), rtol=1e-5, atol=1e-5)
        close(
            (stats, {name: getattr(theirs, name)[...] for name in state}),
            (state, state),
            rtol=1e-5,
            atol=1e-5,
        )


def test_layers_use_and_update_apart():
    """What normalizes, and whether the batch enters the state; initializing does neither."""
    x, case = data(6, 2, C).astype("f4"), CASES[0]
    layer = linen.BatchRenorm()
    variables = jit(partial(layer.init, use_running_average=False))(jax.random.key(0), x)
    chex.assert_trees_all_equal(variables["batch_stats"], case.init(C))
    (trained, new), (evaluated, _) = (
        jit(partial(renorm.batch_renorm, train=t))(x, case.init(C)) for t in (True, False)
    )
    for use, update in ((True, True), (False, False)):
        flags = {
            "use_running_average": use,
            "update_running_average": update,
            "mutable": "batch_stats",
        }
        y, stats = jit(partial(layer.apply, **flags))(variables, x)
        close(y, evaluated if use else trained, rtol=1e-5, atol=1e-5)
        close(stats["batch_stats"], new if update else case.init(C), rtol=1e-5, atol=1e-5)


ERRORS = {
    "complex x": (
        TypeError,
        r"is defined for real x\. Got complex64, shape \(6, 4\)",
        {"dtype": "c8"},
    ),
    "integer x": (TypeError, r"x must be floating or complex\. Got int32", {"dtype": "i4"}),
    "an option by another name": (
        TypeError,
        r"unexpected keyword argument mask\. Expected some of scale, bias",
        {"mask": 1},
    ),
    "state of other channels": (
        ValueError,
        r"state of shape \(.*4,?\) has 4 channels, x of shape \(6, 5\) has 5",
        {"channels": 5},
    ),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_errors_at_the_door(case, error):
    kind, message, wrong = ERRORS[error]
    x = jnp.ones((6, wrong.get("channels", C)), wrong.get("dtype", "f4"))
    for train in (True, False):
        with pytest.raises(kind, match=message):
            case(x, case.init(C), labels(6), train, **({"mask": None} if "mask" in wrong else {}))


AVERAGING = [case for case in STATEFUL if "momentum" in case.construct]
WRONG_STATES = {
    "the running statistics of batch normalization": (
        TypeError,
        "got a Moments. Expected its own state, a dict with",
        init_running((C,)),
    ),
    "nothing": (TypeError, "got a NoneType. Expected its own state", None),
    "an empty dict": (ValueError, "got a state with nothing in it. Expected", {}),
    "names of another method": (
        ValueError,
        r"got a state with mean of shape \(4,\), scale of shape \(4,\)\. Expected .*, as init_",
        {"mean": np.zeros(C), "scale": np.ones(C)},
    ),
    "arrays of other axes": (
        ValueError,
        r"got a state with .*mean of shape \(4, 1, 2, 3\)",
        {n: np.zeros((C, 1, 2, 3)) for n in ("mean", "var", "std")},
    ),
}
SHARED = [case for case in STATEFUL if case.name != "switchable"]  # whose state may be {}


@pytest.mark.parametrize("wrong", WRONG_STATES)
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_states_of_others_are_refused(case, wrong):
    """By what was given and what the method has, in training and in inference."""
    kind, message, state = WRONG_STATES[wrong]
    for train in (True, False):
        with pytest.raises(kind, match=message):
            case(jnp.ones((6, C)), state, labels(6), train)


def test_the_state_of_batch_normalization_is_not_that_of_renormalization():
    x, state = jnp.ones((6, C)), {"mean": jnp.zeros(C), "var": jnp.ones(C)}
    message = (
        r"batch_renorm got a state with mean of shape \(4,\), var of shape \(4,\)\. Expected its "
        r"own state, a dict with mean of 1 axis, std of 1 axis, as init_batch_renorm makes"
    )
    with pytest.raises(ValueError, match=message):
        renorm.batch_renorm(x, state, train=True)
    with pytest.raises(ValueError, match="evonorm_b0 got .* a dict with var of 1 axis"):
        evonorm.evonorm_b0(x, state, train=True, v=jnp.ones(C))
    with pytest.raises(ValueError, match="domain_batch_norm got .* mean of 2 axes, var of 2 axes"):
        domains.domain_distance(x, state, domain=0)
    narrow = {"mean": jnp.zeros(C), "var": jnp.ones(1)}
    with pytest.raises(ValueError, match=r"state of 4 groups, with var of shape \(1,\)"):
        batch_group.batch_group_norm(x, narrow, train=True, num_groups=C)


WRONG_MOMENTA = (-1, 2, np.nan, None, np.full(C, 0.5))


@pytest.mark.parametrize("momentum", WRONG_MOMENTA, ids=str)
@pytest.mark.parametrize("case", AVERAGING, ids=str)
def test_momentum_that_is_no_weight_is_refused(case, momentum):
    """By the functions, and by the layers; traced, NaN leaves the state."""
    x = jnp.ones((6, C))
    message = "momentum .*expected a number of at least 0 and of at most 1"
    with pytest.raises((TypeError, ValueError), match=message):
        case(x, case.init(C), labels(6), momentum=momentum)
    call = case.call | ({"domain": labels(6)} if case.by_example else {})
    construct = case.construct | {"momentum": momentum}
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(layers_nnx, case.layer)(C, **construct, rngs=nnx.Rngs(0))(x, **call)
    layer = getattr(linen, case.layer)(**construct)
    with pytest.raises((TypeError, ValueError), match=message):
        layer.init(jax.random.key(0), x, use_running_average=False, **call)


@pytest.mark.parametrize("layer", ["BatchNorm", "GhostBatchNorm"])
@pytest.mark.parametrize("momentum", WRONG_MOMENTA, ids=str)
def test_layers_of_the_table_check_their_momentum(layer, momentum):
    """Whether or not they update; `None` keeps no statistics where that has a meaning."""
    more = {"ghost_size": 1} if layer == "GhostBatchNorm" else {}
    x, flags = jnp.ones((6, C)), {"use_running_average": True}
    ours = getattr(linen, layer)(momentum=momentum, **more)
    theirs = getattr(layers_nnx, layer)(C, momentum=momentum, rngs=nnx.Rngs(0), **more)
    calls = (lambda: ours.init(jax.random.key(0), x, **flags), lambda: theirs(x, **flags))
    for call in calls:
        if momentum is None and more:
            call()
            continue
        with pytest.raises((TypeError, ValueError), match="momentum .*expected a number of at lea"):
            call()


@pytest.mark.parametrize("case", AVERAGING, ids=str)
def test_traced_momentum_never_destroys_the_state(case):
    x, state = data(6, 2, C).astype("f4"), some_state(case, "f4")
    run = jit(lambda x, momentum: case(x, state, labels(6), momentum=momentum)[1])
    averages = [n for n in state if not n.startswith("train_")]
    for wrong, right in ((-1.0, 0.0), (2.0, 1.0)):
        chex.assert_trees_all_equal(run(x, wrong), run(x, right))
    new = run(x, np.nan)
    chex.assert_trees_all_equal(*({n: t[n] for n in averages} for t in (new, state)))


def test_averages_are_exact_at_both_ends():
    """The new value at momentum 0 and the old one at 1, to the bit, however far they are apart."""
    old, new = jnp.array([1e8, 1.7]), jnp.array([1.2345678, -3e8])
    np.testing.assert_array_equal(averaged(old, new, 0.0), new)
    np.testing.assert_array_equal(averaged(old, new, 1.0), old)


def test_what_is_stored_is_finite():
    """Checked in the dtype of the state, which a checkpoint may have made narrow."""
    old, new = jnp.ones(3, jnp.float16), jnp.array([7e4, np.nan, 3.0])
    np.testing.assert_array_equal(averaged(old, new, 0.0), [1, 1, 3])
    np.testing.assert_array_equal(remembered(old, new), [1, 1, 3])
    with pytest.warns(UserWarning, match="float16: .* an average with momentum 0.99"):
        averaged(old, new, 0.99)


@pytest.mark.parametrize("name", ["BatchRenorm", "EvoNormS0"])
def test_layers_refuse_options_of_other_names(name):
    x = jnp.ones((6, 32))
    message = (
        "unexpected keyword argument weights at the call of a layer. Expected the layer's own or "
        "some of mask, scale"
    )
    with pytest.raises(TypeError, match=message):
        getattr(linen, name)().init(jax.random.key(0), x, use_running_average=True, weights=1)
    with pytest.raises(TypeError, match=message):
        getattr(layers_nnx, name)(32, rngs=nnx.Rngs(0))(x, weights=1)


def test_nnx_layers_promote_running_statistics_and_take_no_hook():
    """As `nnx.Norm`; a hook that would not be called is refused."""
    x, options = (
        jnp.ones((6, C), jnp.bfloat16),
        {"use_scale": False, "use_bias": False, "rngs": nnx.Rngs(0)},
    )
    norm = layers_nnx.Norm(C, methods.batch_norm(), **options)
    assert layers_nnx.BatchRenorm(C, **options)(x).dtype == norm(x).dtype == jnp.float32
    assert layers_nnx.BatchRenorm(C, dtype=jnp.bfloat16, **options)(x).dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="promote_dtype"):
        layers_nnx.BatchRenorm(C, promote_dtype=lambda arrays, dtype: arrays, **options)
    with pytest.raises(ValueError, match="promote_dtype=.*not groups of channels"):
        layers_nnx.BatchGroupNorm(
            6, 4, x_shape=(1, 2, 6), promote_dtype=lambda arrays, dtype: arrays, rngs=nnx.Rngs(0)
        )
