"""What every method does, alike: docs/capabilities.md, cell by cell, layouts, state, inference,
errors.

What each of them computes is tested in the file of its own name.
"""

import dataclasses
import itertools
import pathlib
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit
from helpers import close, data
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from registry import NAMES, REGISTRY, SHAPE, STATEFUL, C, labels

import jaxnorm
from jaxnorm import init_running, methods, norm
from jaxnorm.methods._frame import averaged, remembered

DOCS = pathlib.Path(__file__).parents[1] / "docs"
TURNS = itertools.count()


def by_turns(entries=REGISTRY):
    """Every fifth entry, from another one in each test; the others in the slow run."""
    turn = next(TURNS)
    return pytest.mark.parametrize(
        "entry",
        [
            pytest.param(entry, id=str(entry), marks=[] if (i + turn) % 5 == 0 else pytest.mark.slow)
            for i, entry in enumerate(entries)
        ],
    )


def every(entries=REGISTRY):
    return pytest.mark.parametrize("entry", entries, ids=str)


PAGES = {
    "the registry of tests": NAMES,
    "docs/methods.md": set(re.findall(r"\w+", (DOCS / "methods.md").read_text())),
    "docs/capabilities.md": set(re.findall(r"\w+", (DOCS / "capabilities.md").read_text())),
    "the map of jaxnorm": set(re.findall(r"\w+", jaxnorm.__doc__)),
}


@pytest.mark.parametrize("page", PAGES)
def test_every_method_is_listed(page):
    public = {name for name, t in vars(methods).items() if callable(t) and not name.startswith("_")}
    others = {"Method", "Row", "batch_group_count", "thresholded_linear_unit"}
    assert public - others - set(PAGES[page]) == set()


def differentiated(entry, state, x, gy, of_examples, parameters, **options):
    """y, the gradients of x and of the parameters, and the next state."""

    def f(x, parameters):
        return entry(x, state, **of_examples, **parameters, **options)

    y, pull, new = jax.vjp(f, x, parameters, has_aux=True)
    return y, pull(gy), new


def along(entry, t):
    """Of one number for each of 8 parts, an array that broadcasts against x with these along the
    axis that devices share."""
    return np.reshape(t, [-1 if i == entry.axis else 1 for i in range(len(SHAPE))])


def masks(entry):
    """Padding, whatever it holds: the rest, its gradient and the state are those without it.
    Weights count elements."""
    x, gy, of_examples = data(*SHAPE), data(*SHAPE, seed=1), entry.by_example(8)
    state, parameters = entry.some_state(dtype="f8"), entry.parameters("f8")

    @jit
    def run(x, gy, weights, of_examples):
        return differentiated(entry, state, x, gy, of_examples, parameters, weights=weights)

    def padded(t, value=0):  # two ghosts of four examples are then two of five
        one = np.full_like(t[:1], value)
        return np.concatenate([t[:2], one, t[2:], one])

    def weight(t):
        return np.reshape(t, (-1, 1, 1, 1))

    y, (dx, dp), new = run(x, gy, weight(np.ones(8)), of_examples)
    kept = padded(np.ones(8, bool), False)
    labelled = {name: padded(t, 1) for name, t in of_examples.items()}
    for value in (1e3, np.nan)[: 1 if entry.needs_kernel else 2]:
        got, (got_dx, got_dp), got_new = run(padded(x, value), padded(gy), weight(kept), labelled)
        close((got[kept], got_dx[kept], got_dp, got_new), (y, dx, dp, new))
        assert not got_dx[~kept].any() and np.isfinite(got).all()
    if not entry.needs_kernel and entry.constructor != "proxy_norm":
        empty = parameters["bias"]
        if entry.constructor == "filter_response_norm":
            empty = np.maximum(empty, parameters["slope"] * empty + parameters["threshold"])
        close(got[~kept], np.broadcast_to(empty, got[~kept].shape), 1e-12)
    twice = np.arange(8).repeat(1 + np.arange(8) % 2)
    y, _, new = run(x, gy, weight(1.0 + np.arange(8) % 2), of_examples)
    of_examples = {name: t[twice] for name, t in of_examples.items()}
    y_twice, _, new_twice = run(x[twice], gy[twice], weight(np.ones(12)), of_examples)
    close((y[twice], new), (y_twice, new_twice))


def synchronization(entry):
    """Several devices compute what one does: value, gradient and state, with uneven weights and a
    device without any. Examples that share nothing need no name of the devices."""
    x, gy, of_examples = data(*SHAPE), data(*SHAPE, seed=1), entry.by_example(8)
    w = np.random.default_rng(2).uniform(0, 1, SHAPE) * along(entry, np.arange(8) > 1)
    w = w[..., :1] if entry.needs_kernel else w
    state = entry.some_state(dtype="f8")

    def f(x, gy, w, of_examples, **options):
        y, (dx, _), new = differentiated(entry, state, x, gy, of_examples, {}, weights=w, **options)
        return y, dx, new

    want = jit(f)(x, gy, w, of_examples)
    mesh = Mesh(np.array(jax.devices()), ("i",), axis_types=(AxisType.Auto,))
    for axis, options in ((entry.axis, {"axis_name": "i"}), (0, {}))[: 1 if state else 2]:
        cut = P(*[None] * axis, "i")
        sharded = jax.shard_map(
            partial(f, **options),
            mesh=mesh,
            in_specs=(cut, cut, cut, P("i")),
            out_specs=(cut, cut, P()),
        )
        close(jit(sharded)(x, gy, w, of_examples), want)


def device_groups(entry, over=jax.vmap):
    """Each group of devices computes what one does with their part."""
    x, gy, of_examples = data(*SHAPE), data(*SHAPE, seed=1), entry.by_example(8)
    state = entry.some_state(dtype="f8")

    def f(x, gy, of_examples, **options):
        y, (dx, _), new = differentiated(entry, state, x, gy, of_examples, {}, **options)
        return y, dx, new

    def split(parts):
        arrays = (np.stack(np.split(t, parts, entry.axis)) for t in (x, gy))
        return *arrays, {name: t.reshape(parts, -1) for name, t in of_examples.items()}

    def joined(t):
        return np.concatenate(list(t), entry.axis)

    halves = jit(jax.vmap(f))(*split(2))
    groups = partial(f, axis_name="i", axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]])
    got = jit(over(groups, axis_name="i"))(*split(8))
    close([joined(t) for t in got[:2]], [joined(t) for t in halves[:2]])
    close(jax.tree.map(lambda t: t[::4], got[2]), halves[2])


def vmap(entry):
    """Values, gradients and state of each."""
    x, gy, of_examples = data(3, *SHAPE), data(3, *SHAPE, seed=1), entry.by_example(8)
    state, parameters = entry.some_state(dtype="f8"), entry.parameters("f8")

    def f(x, gy):
        return differentiated(entry, state, x, gy, of_examples, parameters)

    one = jit(f)
    each = [one(*both) for both in zip(x, gy, strict=True)]
    close(jit(jax.vmap(f))(x, gy), jax.tree.map(lambda *t: jnp.stack(t), *each))


def scan(entry):
    """As the body of a loop, also differentiated. State is float32 in double precision too, and
    every number in it moves."""
    xs, first = data(3, *SHAPE, dtype="f4"), entry.init(SHAPE)
    assert all(t.dtype == jnp.float32 for t in first.values())
    scanned, ys = jit(
        lambda xs: jax.lax.scan(lambda state, x: entry(x, state)[::-1], first, xs)
    )(xs)
    step, state = jit(entry), first
    for x, y in zip(xs, ys, strict=True):
        one, state = step(x, state)
        close(one, y, 1e-5)
    close(scanned, state, 1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(scanned, first)
    moving = first.keys() - {"positions"}
    assert all((np.asarray(scanned[name]) != first[name]).any() for name in moving)

    x, start = data(*SHAPE), entry.some_state(dtype="f8")

    def body(carry, _):
        x, state = carry
        y, state = entry(x, state)
        return (jnp.sin(y), state), None

    def looped(x):
        return jax.lax.scan(body, (x, start), length=2)[0][0].sum()

    def unrolled(x):
        return body(body((x, start), None)[0], None)[0][0].sum()

    close(jit(jax.grad(looped))(x), jit(jax.grad(unrolled))(x), 1e-9)


def forward_mode(entry):
    """A directional derivative is that of reverse mode."""
    x, tangent, back = (data(*SHAPE, seed=seed) for seed in range(3))
    state = entry.some_state(dtype="f8")

    @jit
    def run(x, tangent, back):
        f = partial(entry, state=state)
        _, ty, _ = jax.jvp(f, (x,), (tangent,), has_aux=True)
        _, pull, _ = jax.vjp(f, x, has_aux=True)
        return ty, pull(back)[0], pull(ty)[0]

    ty, dx, back_again = run(x, tangent, back)
    close((ty * back).sum(), (dx * tangent).sum(), 1e-9)
    np.testing.assert_allclose(np.sum(back_again * tangent), np.sum(ty * ty), rtol=1e-11)


def half_precision(entry):
    """bfloat16 and float16 in and out, and between them nothing but rounding; state in float32."""
    run, state = jit(entry), entry.some_state()
    for dtype, tolerance in ((jnp.bfloat16, 2**-7), (jnp.float16, 2**-10)):
        x = jnp.asarray(data(*SHAPE, dtype="f4"), dtype)
        y, new = run(x, state)
        wide, new_wide = run(x.astype("f4"), state)
        assert y.dtype == dtype and all(t.dtype == jnp.float32 for t in new.values())
        if entry.needs_kernel:  # the layer in front rounds too
            continue
        close(new, new_wide, 1e-6)
        close(y.astype("f4"), wide, tolerance, atol=2e-5)


COLUMNS = (masks, synchronization, device_groups, vmap, scan, forward_mode, half_precision)


def table():
    page = (DOCS / "capabilities.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \|(.*)\|$", page, re.M)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_the_page_has_a_row_for_each_method_and_the_columns_tried():
    page = (DOCS / "capabilities.md").read_text()
    header = re.search(r"^\| method \|(.*)\|$", page, re.M)
    assert header and [cell.strip().replace(" ", "_") for cell in header[1].split("|")] == [
        f.__name__ for f in COLUMNS
    ]
    assert list(table()) == list(NAMES)


def cells():
    """By default each method and each column meet one another's."""
    for i, entry in enumerate(REGISTRY):
        for j, column in enumerate(COLUMNS):
            often = (i + j) % len(COLUMNS) == 0 or table()[entry.constructor][j] != "yes"
            marks = () if often else pytest.mark.slow
            yield pytest.param(entry, column, marks=marks, id=f"{entry}-{column.__name__}")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("entry, column", list(cells()))
def test_cell(entry, column):
    """docs/capabilities.md says yes, or the error that is raised."""
    cell = table()[entry.constructor][COLUMNS.index(column)]
    if cell == "yes":
        column(entry)
        return
    error, message = cell.split(": ", 1)
    kind = {"TypeError": TypeError, "ValueError": ValueError}[error]
    with pytest.raises(kind, match=re.escape(message)):
        column(entry)
