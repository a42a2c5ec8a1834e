"""docs/capabilities.md tells the truth: each cell is tried, and says yes, or the error that it
gives."""

import pathlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxnorm import (
    batch_group,
    cross_iteration,
    domains,
    evonorm,
    frn,
    group_plus,
    memorized,
    methods,
    momentum,
    moving_average,
    norm,
    proxy,
    renorm,
    switchable,
)

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "capabilities.md"
SHAPE = (8, 8, 2, 24)
C = SHAPE[-1]
PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))


def row(method, x, **options):
    return norm(x, method, **options)[0]


def first_step(init, function, x, **options):
    """A method with state, before it has seen anything."""
    return function(x, init(x), train=True, **options)[0]


def of_channels(init):
    return lambda x: init(x.shape[-1])


def mixed_domains(x, *, axis_name=None, **options):
    """Two domains by turns, also where examples are on different devices."""
    start = 0 if axis_name is None else len(x) * jax.lax.axis_index(axis_name)
    state, domain = (
        domains.init_domain_batch_norm(x.shape[-1], 2),
        (start + jnp.arange(len(x), dtype="i4")) % 2,
    )
    return domains.domain_batch_norm(
        x, state, train=True, domain=domain, axis_name=axis_name, **options
    )[0]


def after_dense(x, **options):
    """Cross-iteration norm after a dense layer."""
    kernel = jnp.asarray(np.random.default_rng(9).normal(size=(C, C)), x.dtype)
    state = cross_iteration.init_cross_iteration((C, C))
    function = cross_iteration.cross_iteration_norm
    return function(x @ kernel, state, train=True, inputs=x, kernel=kernel, **options)[0]


def moving(x, **options):
    state, tap = moving_average.init_moving_average(C), jnp.zeros(C)
    return moving_average.moving_average_norm(x, state, train=True, tap=tap, **options)[0]


LOGITS = {"mean_logits": (0.3, -0.2, 0.5), "var_logits": (-0.4, 0.1, 0.7)}
STEPS = {
    "batch_renorm": (
        of_channels(renorm.init_batch_renorm),
        partial(renorm.batch_renorm, rmax=1.5, dmax=0.5),
    ),
    "momentum_batch_norm": (
        of_channels(momentum.init_momentum_batch_norm),
        partial(momentum.momentum_batch_norm, train_momentum=0.4),
    ),
    "memorized_batch_norm": (
        lambda x: memorized.init_memorized_batch_norm(C, 2),
        partial(memorized.memorized_batch_norm, memory_weights=(0.2, 0.3, 0.5)),
    ),
    "switchable_norm": (
        of_channels(switchable.init_switchable_norm),
        partial(switchable.switchable_norm, **LOGITS),
    ),
    "evonorm_b0": (of_channels(evonorm.init_evonorm_b0), partial(evonorm.evonorm_b0, v=(0.7,) * C)),
    "group_norm_plus": (
        lambda x: group_plus.init_group_norm_plus(x.shape),
        partial(group_plus.group_norm_plus, num_groups=4),
    ),
    "batch_group.batch_group_norm": (
        lambda x: batch_group.init_batch_group_norm(16, x.shape),
        partial(batch_group.batch_group_norm, num_groups=16),
    ),
}
# A method as x -> y in training, and the axis of x over which its sets can go on: several devices
# share that one.
CALLS = {
    "batch_norm": (partial(row, methods.batch_norm()), 0),
    "ghost_batch_norm": (partial(row, methods.ghost_batch_norm(1)), 0),
    "batch_group_norm": (partial(row, methods.batch_group_norm(4)), 0),
    "batch_and_group_norm": (partial(row, methods.batch_and_group_norm(1, 4)), 0),
    "instance_norm": (partial(row, methods.instance_norm()), 1),
    "group_norm": (partial(row, methods.group_norm(4)), 1),
    "layer_norm": (partial(row, methods.layer_norm()), 1),
    "token_layer_norm": (partial(row, methods.token_layer_norm()), 3),
    "positional_norm": (partial(row, methods.positional_norm()), 3),
    "rms_norm": (partial(row, methods.rms_norm()), 3),
    **{name: (partial(first_step, *step), 0) for name, step in STEPS.items()},
    "domain_batch_norm": (mixed_domains, 0),
    "cross_iteration_norm": (after_dense, 0),
    "moving_average_norm": (moving, 0),
    "filter_response_norm": (partial(frn.filter_response_norm, threshold=(-0.5,) * C), 1),
    "evonorm_s0": (partial(evonorm.evonorm_s0, v=(0.7,) * C, num_groups=4), 1),
    "proxy_norm": (
        partial(proxy.proxy_norm, method=methods.group_norm(4), activation=jax.nn.silu),
        1,
    ),
}


def normal(seed=0, shape=SHAPE, dtype="f8"):
    return np.random.default_rng(seed).normal(0.5, 2, shape).astype(dtype)


def close(got, want, tolerance=1e-11):
    np.testing.assert_allclose(
        np.asarray(got, "f8"), np.asarray(want, "f8"), rtol=tolerance, atol=tolerance
    )


def masks(call, axis):
    """Under the mask nothing counts, whatever it is; the rest changes when what counts does."""
    mask = np.random.default_rng(3).uniform(size=(8, 8, 2, 1)) < 0.7
    x, other = normal(), normal(1)
    f = partial(call, weights=mask)
    want = f(jnp.asarray(x))
    for under in (other, np.full_like(x, np.nan)):
        close(np.where(mask, f(jnp.where(mask, x, under)), 0), np.where(mask, want, 0))
    assert (
        not np.allclose(np.where(mask, want, 0), np.where(mask, call(jnp.asarray(x)), 0))
        or axis == 3
    )


def over_devices(f, axis):
    devices = Mesh(np.array(jax.devices()), ("i",), axis_types=(AxisType.Auto,))
    spec = P(*[None] * axis, "i")
    return jit(jax.shard_map(f, mesh=devices, in_specs=spec, out_specs=spec))


def synchronization(call, axis):
    """Several devices compute what one does."""
    close(over_devices(partial(call, axis_name="i"), axis)(normal()), call(jnp.asarray(normal())))


def device_groups(call, axis):
    """Each pair of devices computes what one does with their part."""
    got = over_devices(partial(call, axis_name="i", axis_index_groups=PAIRS), axis)(normal())
    parts = [call(jnp.asarray(part)) for part in np.split(normal(), 4, axis)]
    close(got, np.concatenate(parts, axis))


def vmap(call, axis):
    x = normal(shape=(3, *SHAPE))
    close(jit(jax.vmap(call))(x), np.stack([call(jnp.asarray(t)) for t in x]))


def scan(call, axis):
    """As the body of a loop, differentiated."""
    x, f = normal(), lambda x: jnp.sin(call(x))

    def looped(x):
        return jax.lax.scan(lambda x, _: (f(x), None), x, length=2)[0].sum()

    close(jit(jax.grad(looped))(x), jit(jax.grad(lambda x: f(f(x)).sum()))(x), 1e-9)


def forward_mode(call, axis):
    """A directional derivative is that of reverse mode, and of a difference."""
    x, along, back = jnp.asarray(normal()), jnp.asarray(normal(1)), jnp.asarray(normal(2))
    dy = jax.jvp(call, (x,), (along,))[1]
    close((dy * back).sum(), (jax.vjp(call, x)[1](back)[0] * along).sum(), 1e-9)


def half_precision(call, axis):
    """bfloat16 in and out, and between them nothing but its rounding."""
    x = jnp.asarray(normal(), jnp.bfloat16)
    y = call(x)
    assert y.dtype == jnp.bfloat16
    close(y, call(x.astype(jnp.float32)), 2**-7)


COLUMNS = (masks, synchronization, device_groups, vmap, scan, forward_mode, half_precision)


def table():
    rows = re.findall(r"^\| `([\w.]+)` \|(.*)\|$", PAGE.read_text(), re.M)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_the_page_has_a_row_for_each_method_and_the_columns_tried():
    header = re.search(r"^\| method \|(.*)\|$", PAGE.read_text(), re.M)
    assert header and [cell.strip().replace(" ", "_") for cell in header[1].split("|")] == [
        f.__name__ for f in COLUMNS
    ]
    assert list(table()) == list(CALLS)


def cases():
    """Cells of the table of methods are tried by many other tests too; of the rest, each method and
    each column meet here."""
    for i, name in enumerate(CALLS):
        for j, column in enumerate(COLUMNS):
            often = not hasattr(methods, name) and ((i + j) % 7 == 0 or table()[name][j] != "yes")
            marks = () if often else pytest.mark.slow
            yield pytest.param(name, column, marks=marks, id=f"{name}-{column.__name__}")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name, column", list(cases()))
def test_cell(name, column):
    cell, (call, axis) = table()[name][COLUMNS.index(column)], CALLS[name]
    call = jax.jit(call, static_argnames=("axis_name", "axis_index_groups"))
    if cell == "yes":
        column(call, axis)
        return
    error, message = cell.split(": ", 1)
    with pytest.raises(
        {"TypeError": TypeError, "ValueError": ValueError}[error], match=re.escape(message)
    ):
        column(call, axis)
