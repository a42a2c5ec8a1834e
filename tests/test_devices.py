"""Several devices: however the batch is divided, values and gradients are those of one device."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm import methods, moments, norm, pool

DEVICES, SHAPE = 8, (16, 2, 6)
BATCH = oracle.set_numbers(SHAPE, lambda n, p, c, N, P, C: (c,))
BATCH_GROUP = oracle.set_numbers(SHAPE, lambda n, p, c, N, P, C: (c * 3 // C,))
QUARTERS = oracle.set_numbers(SHAPE, lambda n, p, c, N, P, C: (n * 4 // N, c))


def normal(shape=SHAPE, seed=0, dtype="f8"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def mesh(*shape):
    shape = shape or (DEVICES,)
    devices = np.array(jax.devices()).reshape(shape)
    return Mesh(devices, ("i", "j")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def cut(x):
    return x.reshape(DEVICES, -1, *x.shape[1:])


def with_pmap(f):
    return lambda *args: jax.tree.map(
        lambda t: t.reshape(-1, *t.shape[2:]), jax.pmap(f, "i")(*map(cut, args))
    )


def with_vmap(f):
    def g(*args):
        return jax.tree.map(
            lambda t: t.reshape(-1, *t.shape[2:]), jax.vmap(f, axis_name="i")(*map(cut, args))
        )

    return jax.jit(g)


def with_shard_map(f, check_vma=True):
    return jax.jit(
        jax.shard_map(f, mesh=mesh(), in_specs=P("i"), out_specs=P("i"), check_vma=check_vma)
    )


CONTEXTS = {
    "pmap": with_pmap,
    "vmap": with_vmap,
    "shard_map": with_shard_map,
    "shard_map unchecked": partial(with_shard_map, check_vma=False),
}
contexts = pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())


def differentiated(method, weighted, **options):
    """Per-device function of (x, weights, cotangent): output, statistics for each example, dx."""

    def f(x, w, gy):
        def g(x):
            y, m = norm(x, method, weights=w if weighted else None, axis_name="i", **options)
            return y, m

        y, pull, m = jax.vjp(g, x, has_aux=True)
        # one row for each example, so that every output is cut like x
        rows = jax.tree.map(lambda t: jnp.broadcast_to(t[:1], (x.shape[0], *t.shape[1:])), m)
        return y, *pull(gy), rows.count, rows.mean, rows.var

    return f


def compare(context, method, sets, w=None, x=None, atol=1e-11, **options):
    x = normal() if x is None else x
    gy = normal(seed=1).astype(x.dtype)
    f = context(differentiated(method, w is not None, **options))
    w = np.ones((16, 1, 1)) if w is None else w
    y, dx, count, mean, var = f(x, w.astype(x.dtype), gy)
    o = oracle.normalized(x, sets, weights=w, gy=gy)
    np.testing.assert_allclose(y, o.y, atol=atol)
    np.testing.assert_allclose(dx, o.dx, atol=atol)
    for got, want in ((count, o.count), (mean, o.mean), (var, o.var)):
        np.testing.assert_allclose(
            oracle.at_elements(np.asarray(got), SHAPE), want, rtol=1e-6, atol=atol
        )


@pytest.mark.usefixtures("x64")
@contexts
@pytest.mark.parametrize(
    "method, sets",
    [(methods.batch_norm(), BATCH), (methods.batch_group_norm(3), BATCH_GROUP)],
    ids=("BN", "BGN"),
)
def test_sets_that_span_all_devices(context, method, sets):
    """Weighted by count: uneven weights, and devices without any valid element."""
    w = np.random.default_rng(2).uniform(0, 1, (16, 1, 1)) * (np.arange(16) % 5 > 0).reshape(
        16, 1, 1
    )
    w[4:6], w[14:] = 0, 0
    compare(context, method, sets, w)
    if method == methods.batch_norm():
        compare(context, method, sets)


@pytest.mark.usefixtures("x64")
@contexts
def test_groups_of_devices_are_ghost_batches(context):
    """Two devices, or one, of two examples each; groups need not be neighbours."""
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    w = np.random.default_rng(2).uniform(0, 1, (16, 1, 1))
    w[2:4] = 0
    compare(context, methods.batch_norm(), QUARTERS, w, axis_index_groups=pairs)


@pytest.mark.usefixtures("x64")
def test_groups_of_devices_that_are_not_neighbours():
    far = oracle.set_numbers(SHAPE, lambda n, p, c, N, P, C: (n // 2 % 2, c))
    compare(
        with_shard_map, methods.batch_norm(), far, axis_index_groups=[[0, 2, 4, 6], [7, 5, 3, 1]]
    )
    alone = oracle.set_numbers(SHAPE, lambda n, p, c, N, P, C: (n // 2, c))
    compare(with_vmap, methods.batch_norm(), alone, axis_index_groups=[[i] for i in range(8)])


@pytest.mark.usefixtures("x64")
def test_unnamed_axes_are_ghosts_of_the_devices():
    local = oracle.set_numbers(SHAPE, lambda n, p, c, N, P, C: (n // 2, c))
    x = normal()
    y = with_shard_map(lambda x: norm(x, methods.batch_norm())[0])(x)
    np.testing.assert_allclose(y, oracle.normalized(x, local).y, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "method, sets",
    [
        (methods.batch_norm(), BATCH),
        (methods.batch_group_norm(3), BATCH_GROUP),
        (methods.ghost_batch_norm(4), QUARTERS),
        (
            methods.group_norm(3),
            oracle.set_numbers(SHAPE, lambda n, p, c, N, P, C: (n, c * 3 // C)),
        ),
    ],
    ids=("BN", "BGN", "ghost", "GN"),
)
def test_plain_jit_of_sharded_arrays_is_global(method, sets):
    x, gy = (jax.device_put(t, NamedSharding(mesh(), P("i"))) for t in (normal(), normal(seed=1)))

    @jax.jit
    def f(x, gy):
        y, pull = jax.vjp(lambda x: norm(x, method)[0], x)
        return y, *pull(gy)

    y, dx = f(x, gy)
    o = oracle.normalized(normal(), sets, gy=normal(seed=1))
    np.testing.assert_allclose(y, o.y, atol=1e-12)
    np.testing.assert_allclose(dx, o.dx, atol=1e-11)


@contexts
@pytest.mark.parametrize("center", (None, 1e4))
def test_large_means_on_all_devices(context, center):
    """mean / std = 1e4 in float32, and different on every device."""
    x = (normal() + 1e4).astype("f4") + np.repeat(np.arange(8, dtype="f4"), 2).reshape(16, 1, 1)
    options = {} if center is None else {"center": np.full((1, 1, 6), center, "f4")}
    compare(
        context,
        methods.batch_norm(),
        BATCH,
        x=x,
        atol=4 * float(np.finfo("f4").eps) * (np.sqrt(32) + 1e4),
        **options,
    )


def test_the_running_mean_is_the_center_over_devices_alone():
    """It never changes y, so what shows is whether y is computed with it."""
    method, x = methods.batch_norm(), normal((8, 4, 6), dtype="f4")

    def running_means(**options):
        def f(mean, x):
            return method.apply(x, {"mean": mean, "var": jnp.ones(6)}, train=True, **options)[0]

        over = jax.jit(jax.vmap(f, in_axes=(None, 0), axis_name="i"))
        arguments = re.search(r"@main\((.*?)\) ->", over.lower(np.zeros(6, "f4"), x).as_text())[1]
        return arguments.count("tensor<6xf32>")

    assert (running_means(axis_name="i"), running_means()) == (1, 0)


PARTS = [
    ((2, 4), "j", None, 2),
    ((2, 4), "j", [[0, 1], [2, 3]], 4),
    ((8,), "i", [[0, 1, 2, 3], [4, 5, 6, 7]], 2),
]


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("axes, name, groups, sets", PARTS, ids=str)
def test_large_means_on_part_of_the_devices(axes, name, groups, sets, check_vma):
    """Cancellation in one half of a mesh only: devices that disagree about a second round must not
    hang."""
    x = normal((16, 2, 6), dtype="f4") + np.repeat([0, 1e4], 8).astype("f4").reshape(16, 1, 1)
    spec = P(("i", "j")[: len(axes)])
    f = jax.shard_map(
        lambda x: norm(x, methods.batch_norm(), axis_name=name, axis_index_groups=groups)[0],
        mesh=mesh(*axes),
        in_specs=spec,
        out_specs=spec,
        check_vma=check_vma,
    )
    # not every backend is as patient as the CPU
    assert " conditional(" not in jax.jit(f).lower(x).compile().as_text()
    numbers = oracle.set_numbers(SHAPE, lambda n, p, c, N, P, C: (n * sets // N, c))
    np.testing.assert_allclose(
        jax.jit(f)(x), oracle.normalized(x, numbers).y, atol=4 * float(np.finfo("f4").eps) * 1e4
    )


@pytest.mark.usefixtures("x64")
def test_several_axis_names():
    """Over both axes of a mesh, and over vmap inside shard_map."""
    x = normal()
    f = jax.shard_map(
        lambda x: norm(x, methods.batch_norm(), axis_name=("i", "j"))[0],
        mesh=mesh(2, 4),
        in_specs=P(("i", "j")),
        out_specs=P(("i", "j")),
    )
    want = oracle.normalized(x, BATCH).y
    np.testing.assert_allclose(jax.jit(f)(x), want, atol=1e-12)
    inner = jax.vmap(
        lambda t: norm(t[None], methods.batch_norm(), axis_name=("i", "v"))[0][0], axis_name="v"
    )
    # check_vma=True takes no sum over a mapped and a mesh axis at once (jax 0.10 to 0.12)
    np.testing.assert_allclose(with_shard_map(inner, check_vma=False)(x), want, atol=1e-12)


@pytest.mark.usefixtures("x64")
@contexts
def test_pooling_over_devices_is_exact(context):
    """Local moments pooled afterwards are the synchronized ones, also within groups."""
    w = np.random.default_rng(2).uniform(0, 1, (16, 1, 1))
    w[2:4] = 0

    def f(x, w):
        local = moments(x, methods.instance_norm(), weights=w)
        pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
        both = [pool(local, (1, 1, 6), axis_name="i", axis_index_groups=g) for g in (None, pairs)]
        return jax.tree.map(lambda t: jnp.broadcast_to(t, (2, 1, 6)), both)

    whole, quarters = context(f)(normal(), w)
    for m, sets in ((whole, BATCH), (quarters, QUARTERS)):
        o = oracle.normalized(normal(), sets, weights=w)
        for name in ("count", "mean", "var"):
            got = np.broadcast_to(getattr(m, name), SHAPE)
            np.testing.assert_allclose(got, getattr(o, name), atol=1e-12, err_msg=name)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check_vma", (True, False))
def test_gradient_of_a_sharded_function(check_vma):
    """Differentiated from outside shard_map, scale and weights included, once and twice."""
    x, w, scale = normal(), np.random.default_rng(2).uniform(0.1, 1, (16, 1, 1)), normal((6,), 3)

    def local(x, w, scale):
        return jnp.sin(norm(x, methods.batch_norm(), weights=w, scale=scale, axis_name="i")[0])

    sharded = jax.shard_map(
        local, mesh=mesh(), in_specs=(P("i"), P("i"), P()), out_specs=P("i"), check_vma=check_vma
    )

    def single(x, w, s):
        return jnp.sin(norm(x, methods.batch_norm(), weights=w, scale=s)[0])

    @partial(jax.jit, static_argnums=0)
    def run(f, *args):
        g = jax.grad(lambda *args: (f(*args) * normal(seed=1)).sum(), (0, 1, 2))
        return g(*args), jax.jvp(g, args, jax.tree.map(jnp.cos, args))[1]

    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-11),
        run(sharded, x, w, scale),
        run(single, x, w, scale),
    )


def collectives(f, *args):
    """The element counts of each all-reduce of the compiled program, also inside conditions."""
    program = f.lower(*args).compile().as_text()
    shapes = [
        line.split(" all-reduce", 1)[0]
        for line in program.splitlines()
        if re.search(r" all-reduce(-start)?\(", line)
    ]
    return [
        [
            math.prod(map(int, filter(None, dims.split(","))))
            for dims in re.findall(r"\w\[([\d,]*)\]", s)
        ]
        for s in shapes
    ]


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("masked", (False, True))
def test_one_collective_forward_and_one_backward(masked, check_vma):
    """Of small arrays, and one more in the condition of a second round; remat that saves statistics
    by name adds none."""
    x, w = normal(dtype="f4"), np.arange(16.0, dtype="f4").reshape(16, 1, 1)

    def f(x, w):
        return norm(x, methods.batch_norm(), axis_name="i", weights=w if masked else None)[0]

    def gradient(f):
        return with_shard_map(
            lambda x, w: jax.grad(lambda x: jnp.sin(f(x, w)).sum())(x), check_vma=check_vma
        )

    policies = jax.checkpoint_policies
    named = policies.save_only_these_names("jaxnorm_synced_moments")
    programs = {
        "forward": (with_shard_map(f, check_vma=check_vma), 1),
        "backward": (gradient(f), 2),
        "saved by name": (gradient(jax.checkpoint(f, policy=named)), 2),
    }
    for name, (program, rounds) in programs.items():
        sizes = collectives(program, x, w)
        assert max(max(size) for size in sizes) <= 6, (
            f"{name}: all-reduce of full-size arrays, {sizes}"
        )
        assert len(sizes) == rounds + 1, name
    again = collectives(gradient(jax.checkpoint(f, policy=policies.nothing_saveable)), x, w)
    assert len(again) > 2 + 1  # so the name matters


@pytest.mark.parametrize("check_vma", (True, False))
def test_gradients_of_scale_and_bias_cross_devices_summed(check_vma):
    """Scale and bias are equal on all devices: their cotangents are summed over a device's part
    first."""

    def f(x, scale, bias):
        y = norm(x, methods.batch_norm(), scale=scale, bias=bias, axis_name="i")[0]
        return jax.lax.psum(jnp.sin(y).sum(), "i")

    sharded = jax.shard_map(
        f, mesh=mesh(), in_specs=(P("i"), P(), P()), out_specs=P(), check_vma=check_vma
    )
    sizes = collectives(
        jax.jit(jax.grad(sharded, (0, 1, 2))),
        normal(dtype="f4"),
        normal((6,), 1, "f4"),
        normal((6,), 2, "f4"),
    )
    assert max(max(size) for size in sizes) <= 6, f"all-reduce of full-size arrays, {sizes}"


BAD_GROUPS = {
    "unequal": [[0, 1, 2], [3, 4, 5], [6, 7]],
    "incomplete": [[0, 1], [2, 3]],
    "out of range": [[0, 1, 2, 3], [4, 5, 6, 8]],
    "twice": [[0, 1, 2, 3], [3, 4, 5, 6]],
    "negative": [[0, 1, 2, 3], [4, 5, 6, -1]],
    "empty": [],
}


@contexts
@pytest.mark.parametrize("groups", BAD_GROUPS.values(), ids=BAD_GROUPS.keys())
def test_bad_groups_of_devices_are_refused(context, groups):
    for f in (
        lambda x: norm(x, methods.batch_norm(), axis_name="i", axis_index_groups=groups)[0],
        lambda x: (
            pool(moments(x, (2, 1, 6)), (1, 1, 6), axis_name="i", axis_index_groups=groups).mean
        ),
    ):
        with pytest.raises(
            ValueError,
            match=r"equal size that name every index.*axis 'i' of size 8; expected each of 0 to 7",
        ):
            context(f)(normal(dtype="f4"))


def test_names_that_are_not_bound():
    for call in (
        lambda: norm(jnp.ones((4, 6)), methods.batch_norm(), axis_name="batch"),
        lambda: pool(moments(jnp.ones((4, 6)), (4, 6)), (1, 6), axis_name="batch"),
    ):
        with pytest.raises(
            NameError,
            match=r"unbound axis name: 'batch'.*pmap, shard_map or vmap.*plain jit leave it out",
        ):
            call()
    with pytest.raises(
        ValueError, match="axis_index_groups needs one named axis. Got axis_name=None"
    ):
        norm(jnp.ones((4, 6)), methods.batch_norm(), axis_index_groups=[[0]])
    with pytest.raises(TypeError, match=r"list of lists of device indices. Got \[0, 1\]"):
        with_vmap(lambda x: norm(x, (1, 1, 6), axis_name="i", axis_index_groups=[0, 1])[0])(
            normal(dtype="f4")
        )


def of_parts(x, groups=None):
    """Cross-device batch normalization of each of four devices' part."""
    return norm(x, methods.batch_norm(), axis_name="i", axis_index_groups=groups)[0]


def loss_of(y):
    return (y**3).sum()


def mapped(f):
    return jax.vmap(f, axis_name="i")


ORDERS = {
    "grad vmap": lambda f: jax.grad(lambda x: loss_of(mapped(f)(x))),
    "grad jit vmap": lambda f: jax.grad(jax.jit(lambda x: loss_of(mapped(f)(x)))),
    "jit grad vmap": lambda f: jax.jit(jax.grad(lambda x: loss_of(mapped(f)(x)))),
    "jit grad jit vmap": lambda f: jax.jit(jax.grad(jax.jit(lambda x: loss_of(mapped(f)(x))))),
    "grad vmap jit": lambda f: jax.grad(lambda x: loss_of(mapped(jax.jit(f))(x))),
    "grad jit vmap jit": lambda f: jax.grad(jax.jit(lambda x: loss_of(mapped(jax.jit(f))(x)))),
    "grad remat jit vmap": lambda f: jax.grad(
        jax.checkpoint(jax.jit(lambda x: loss_of(mapped(f)(x))))
    ),
    "grad jit pmap": lambda f: jax.grad(jax.jit(lambda x: loss_of(jax.pmap(f, axis_name="i")(x)))),
    "jvp jit vmap, reversed": lambda f: (
        lambda x: jax.linear_transpose(
            lambda t: jax.jvp(jax.jit(lambda x: loss_of(mapped(f)(x))), (x,), (t,))[1], x
        )(1.0)[0]
    ),
    "vjp jit vmap jit": lambda f: (
        lambda x: jax.vjp(jax.jit(lambda x: loss_of(mapped(jax.jit(f))(x))), x)[1](1.0)[0]
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "groups",
    [None, pytest.param([[0, 1], [2, 3]], marks=pytest.mark.slow)],
    ids=["all", "groups"],
)
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_gradient_jit_and_map(order, groups):
    """JAX may take the derivative when the map has been left: see `devices.axes_named`."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 3, 6)), jnp.float32)

    def whole(x):
        parts = x.reshape(1 if groups is None else 2, -1, 3, 6)
        return jax.vmap(lambda part: norm(part, methods.batch_norm())[0])(parts)

    expected = jax.grad(lambda x: loss_of(whole(x)))(x)
    found = ORDERS[order](partial(of_parts, groups=groups))(x)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("outer", [jax.grad, jax.hessian], ids=["reverse", "forward over reverse"])
def test_second_derivatives_outside_of_jit_and_map(outer):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3)), jnp.float32)
    of_map = jax.jit(lambda x: loss_of(mapped(of_parts)(x)))
    of_whole = lambda x: loss_of(norm(x.reshape(4, 3), methods.batch_norm())[0])  # noqa: E731
    if outer is jax.grad:
        both = [jax.grad(lambda x, f=f: (jax.grad(f)(x) ** 2).sum()) for f in (of_map, of_whole)]
    else:
        both = [jax.hessian(f) for f in (of_map, of_whole)]
    np.testing.assert_allclose(both[0](x), both[1](x), rtol=1e-3, atol=1e-3)
