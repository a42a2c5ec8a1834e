"""docs/capabilities.md tells the truth: each cell is tried, and says yes, or the error that it gives."""

import pathlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxnorm import methods, norm, renorm

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "capabilities.md"
SHAPE = (8, 8, 2, 8)
PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7]]


def row(method, x, **options):
    return norm(x, method, **options)[0]


def stateful(init, function, x, **options):
    return function(x, init(x.shape[-1]), train=True, **options)[0]


# A method as x -> y in training, and the axis of x over which its sets can go on: several devices share that one.
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
    "batch_renorm": (partial(stateful, renorm.init_batch_renorm, partial(renorm.batch_renorm, rmax=1.5, dmax=0.5)), 0),
}


def normal(seed=0, shape=SHAPE, dtype="f8"):
    return np.random.default_rng(seed).normal(0.5, 2, shape).astype(dtype)


def close(got, want, tolerance=1e-11):
    np.testing.assert_allclose(np.asarray(got, "f8"), np.asarray(want, "f8"), rtol=tolerance, atol=tolerance)


def masks(call, axis):
    """Under the mask nothing counts, whatever it is; the rest changes when what counts does."""
    mask = np.random.default_rng(3).uniform(size=(8, 8, 2, 1)) < 0.7
    x, other = normal(), normal(1)
    f = partial(call, weights=mask)
    want = f(jnp.asarray(x))
    for under in (other, np.full_like(x, np.nan)):
        close(np.where(mask, f(jnp.where(mask, x, under)), 0), np.where(mask, want, 0))
    assert not np.allclose(np.where(mask, want, 0), np.where(mask, call(jnp.asarray(x)), 0)) or axis == 3


def over_devices(f, axis):
    devices = Mesh(np.array(jax.devices()), ("i",), axis_types=(AxisType.Auto,))
    spec = P(*[None] * axis, "i")
    return jax.jit(jax.shard_map(f, mesh=devices, in_specs=spec, out_specs=spec))


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
    close(jax.vmap(call)(x), np.stack([call(jnp.asarray(t)) for t in x]))


def scan(call, axis):
    """As the body of a loop, differentiated."""
    x, f = normal(), lambda x: jnp.sin(call(x))

    def looped(x):
        return jax.lax.scan(lambda x, _: (f(x), None), x, length=2)[0].sum()

    close(jax.jit(jax.grad(looped))(x), jax.grad(lambda x: f(f(x)).sum())(x), 1e-9)


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
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE.read_text(), re.M)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_the_page_has_a_row_for_each_method_and_the_columns_tried():
    header = re.search(r"^\| method \|(.*)\|$", PAGE.read_text(), re.M)
    assert header and [cell.strip().replace(" ", "_") for cell in header[1].split("|")] == [f.__name__ for f in COLUMNS]
    assert list(table()) == list(CALLS)


def cases():
    """Rows of the table of methods are tried by many other tests too."""
    return [pytest.param(name, marks=pytest.mark.slow) if hasattr(methods, name) else name for name in CALLS]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("column", COLUMNS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", cases())
def test_cell(name, column):
    cell = table()[name][COLUMNS.index(column)]
    if cell == "yes":
        column(*CALLS[name])
        return
    error, message = cell.split(": ", 1)
    with pytest.raises({"TypeError": TypeError, "ValueError": ValueError}[error], match=re.escape(message)):
        column(*CALLS[name])
