"""What every method does, alike: docs/capabilities.md, cell by cell, layouts, state, inference,
errors.

What each of them computes is tested in the file of its own name.
"""

import dataclasses
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
from registry import COUNTS, NAMES, REGISTRY, SHAPE, STATEFUL, C, by_turns, labels

import jaxnorm
from jaxnorm import init_running, methods, norm, normalize
from jaxnorm.methods._frame import averages, remembered

DOCS = pathlib.Path(__file__).parents[1] / "docs"


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
    others = {
        "Method", "Row", "applied", "measured", "batch_group_count", "thresholded_linear_unit"
    }  # fmt: skip
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

    order = [0, 1, -1, 2, 3, 4, 5, 6, 7, -1]  # two ghosts of four examples are then two of five
    if entry.name.endswith("ghosts by size"):
        order = [*range(8), -1, -1, -1, -1]  # and one of four an empty one more

    def padded(t, value=0):
        return np.concatenate([t, np.full_like(t[:1], value)])[order]

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
    if entry.name.endswith("ghosts by size"):
        return
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
    scanned, ys = jit(lambda xs: jax.lax.scan(lambda state, x: entry(x, state)[::-1], first, xs))(
        xs
    )
    step, state = jit(entry), first
    for x, y in zip(xs, ys, strict=True):
        one, state = step(x, state)
        close(one, y, 1e-5, rtol=1e-5)
    close(scanned, state, 1e-5, rtol=1e-5)
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
    np.testing.assert_allclose((ty * back).sum(), (dx * tangent).sum(), rtol=1e-9)
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
            close(y.astype("f4"), wide, tolerance, rtol=tolerance)
            continue
        close(new, new_wide, 1e-6, rtol=1e-6)
        close(y.astype("f4"), wide, 2e-5, rtol=tolerance)


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


@pytest.mark.usefixtures("x64")
@by_turns()
def test_layouts_agree(entry):
    """Channels first, the batch last, and both; with a scale for each example. Inference too."""
    x, scale, state = data(*SHAPE), data(8, C, seed=2), entry.some_state(dtype="f8")

    images = {name for name, t in state.items() if t.shape == SHAPE[1:]}

    def turned(state, features):
        """What has the shape of an example goes with it."""
        return {n: t.transpose(features) if n in images else t for n, t in state.items()}

    def in_order(x, order):
        back, features = np.argsort(order), [i - 1 for i in order if i != 0]
        axes = {"batch_axis": int(back[0]), "channel_axis": int(back[3])}
        arrays = x.transpose(order), turned(state, features)
        y, new = entry(*arrays, scale=scale, **axes)
        evaluated, _ = entry(*arrays, train=False, scale=scale, **axes)
        return *(t.transpose(back) for t in (y, evaluated)), turned(new, np.argsort(features))

    @jit
    def run(x):
        orders = ((0, 1, 2, 3), (0, 3, 1, 2), (1, 2, 0, 3), (1, 3, 2, 0))
        return [in_order(x, order) for order in orders]

    want, *others = run(x)
    for other in others:
        close(other, want)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@every()
def test_groups_of_devices_in_pmap(entry):
    device_groups(entry, over=jax.pmap)


@pytest.mark.usefixtures("x64")
@by_turns([entry for entry in REGISTRY if entry.is_row])
def test_rows_are_what_norm_computes(entry):
    """In training; at inference what their moments of inference make of x."""
    x, method, state = data(*SHAPE), entry.method, entry.some_state(dtype="f8")
    parameters = entry.parameters("f8")
    close(entry(x, state, **parameters)[0], norm(x, method, **parameters)[0])
    used = method.inference_moments(state, SHAPE)
    assert (used is None) == (not state or getattr(method, "example_weight", 0) != 0)
    if used is not None:
        y = normalize(x, used, epsilon=method.epsilon, **parameters)
        close(entry(x, state, train=False, **parameters)[0], y)


@by_turns([entry for entry in REGISTRY if not entry.needs_kernel])  # the layer in front overflows
def test_extremes_of_float16(entry):
    """Numbers whose squares are beyond it."""
    x, run, state = data(*SHAPE, dtype="f4"), jit(entry), entry.init(SHAPE)
    for size in (1e-6, 1e4):
        half = (x * size).clip(-6e4, 6e4).astype("f2")
        y, new = run(half, state)
        wide, new_wide = run(half.astype("f4"), state)
        close(y.astype("f4"), wide, 1e-7, rtol=2**-10)
        close(new, new_wide, 1e-5, rtol=1e-5)


PAST = ("past_gradient", "step")
"""State that is of the step before this batch, or counts batches."""


@by_turns(STATEFUL)
def test_batches_of_nothing_and_of_nan_leave_the_state(entry):
    x, state = data(*SHAPE, dtype="f4"), entry.some_state()
    run = jit(lambda x, w: entry(x, state, weights=w))
    y, new = run(x, np.zeros((8, 1, 1, 1), "f4"))
    assert np.isfinite(y).all()
    for after in (new, run(np.full_like(x, np.nan), np.ones((8, 1, 1, 1), "f4"))[1]):
        for name in state.keys() - set(PAST):
            np.testing.assert_array_equal(after[name], state[name], name)


@by_turns([entry for entry in STATEFUL if entry.each_channel])
def test_unusable_channels_leave_the_state(entry):
    """One without finite moments stays to the bit, in its domain, the others move; y says so."""
    x, state = data(*SHAPE, dtype="f4"), entry.some_state()
    x[1, 0, 0, 2] = np.nan
    y, new = jit(entry)(x, state)
    rows, others = labels(8)[1] if entry.has_labels else ..., [c for c in range(C) if c != 2]
    for name in state.keys() - set(PAST):
        old = state[name]
        np.testing.assert_array_equal(new[name][rows][..., 2], old[rows][..., 2], name)
        moved = [(new[name][..., c] != old[..., c]).any() for c in others]
        assert name in COUNTS or all(moved), name
    assert np.isnan(y[1, 0, 0, 2])
    apart = entry.constructor != "switchable_norm"  # which mixes in the whole example
    assert np.isfinite(y[..., others]).all() == apart


@by_turns()
def test_inference_leaves_the_state_and_examples_do_not_meet(entry):
    x, state = data(*SHAPE, dtype="f4"), entry.some_state()
    run = jit(partial(entry, train=False))
    y, new = run(x, state)
    chex.assert_trees_all_equal(new, state)
    x[1:] = np.nan
    # What is measured in an example is measured twice where another one is not finite.
    measured = not entry.each_channel or entry.constructor in ("switchable_norm", "evonorm_b0")
    close(run(x, state)[0][0], y[0], 2e-6 if measured else 0)


# in training it corrects towards what inference uses
CORRECTED = ("moving_average_norm",)


@by_turns([entry for entry in REGISTRY if entry.constructor not in CORRECTED])
def test_training_differs_from_inference_where_examples_meet(entry):
    x, state = data(*SHAPE, dtype="f4"), entry.some_state()
    x[0] = 2 * x[0] + 1
    trained, evaluated = (jit(partial(entry, train=train))(x, state)[0] for train in (True, False))
    assert (np.abs(trained - evaluated).max() > 1e-3) == bool(state)


SMALLEST = {
    "ghost_batch_norm": (2, C),
    "batch_and_group_norm": (2, C),
    "batch_and_group_norm, ghosts by size": (4, C),
    "batch_group_norm, pieces": (1, 3, C),
}


@by_turns()
def test_one_value_a_set_is_finite(entry):
    """One example without positions, or as little as splits: y, its gradients and the state."""
    x = data(*SMALLEST.get(entry.name, (1, C)), dtype="f4")
    run = jit(partial(differentiated, entry, of_examples=entry.by_example(len(x))))
    chex.assert_tree_all_finite(run(entry.init(x.shape), x, x, parameters=entry.parameters()))


def outputs(entry, x, state, train=True, **options):
    """Shapes and dtypes of y and the state, as far as JAX needs no value of x for them."""
    learned = entry.method.parameters(x.shape[-1])
    f = partial(entry, state=state, train=train, **(learned | options))
    return jax.eval_shape(f, x)


DOOR = {
    "complex x": (TypeError, "is defined for real x.*Got complex64", {"dtype": "c8"}),
    "integer x": (TypeError, r"x must be floating or complex\. Got int32", {"dtype": "i4"}),
    "an option by another name": (
        TypeError,
        r"got an unexpected option mask\. Expected some of .*scale, bias",
        {"mask": None},
    ),
}


AT_THE_DOOR = [
    pytest.param(entry, error, id=f"{entry}-{error}")
    for entry in REGISTRY
    for error in DOOR
    if error != "complex x" or not entry.is_row
]


@pytest.mark.parametrize("entry, error", AT_THE_DOOR)
def test_errors_at_the_door(entry, error):
    kind, message, wrong = DOOR[error]
    x = jnp.ones(SHAPE, wrong.get("dtype", "f4"))
    options = {name: t for name, t in wrong.items() if name == "mask"}
    for train in (True, False):
        with pytest.raises(kind, match=message):
            outputs(entry, x, entry.init(SHAPE), train, **options)


def test_rows_take_complex_x():
    x = data(*SHAPE, dtype="f4") + 1j * data(*SHAPE, seed=1, dtype="f4")
    for entry in REGISTRY:
        if entry.is_row:
            assert outputs(entry, x, entry.init(SHAPE, dtype="c8"))[0].dtype == "c8"


OF_CHANNELS = [
    entry
    for entry in STATEFUL
    if not entry.needs_kernel and entry.constructor not in ("batch_group_norm", "group_norm_plus")
]


@every(OF_CHANNELS)
def test_state_of_other_channels_is_refused(entry):
    """What works on a kernel, and groups, say so in the files of their own names."""
    message = (
        r"got a state with .* of shape \(.*8,?\).* Expected its own state, a dict with .* of shape "
        r"\(.*16,?\).* as its init makes it for x of shape \(8, 16\)"
    )
    for train in (True, False):
        with pytest.raises(ValueError, match=message):
            outputs(entry, jnp.ones((8, 16)), entry.init(SHAPE), train)


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
        r"got a state with mean of shape \(8,\), scale of shape \(8,\)\. Expected .*, as its init",
        {"mean": np.zeros(C), "scale": np.ones(C)},
    ),
    "arrays of other axes": (
        ValueError,
        r"got a state with .*mean of shape \(8, 1, 2, 3, 1\)",
        {n: np.zeros((C, 1, 2, 3, 1)) for n in ("mean", "var")},
    ),
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
@every(STATEFUL)
def test_states_of_others_are_refused(entry, wrong):
    """By what was given and what the method has, in training and in inference."""
    kind, message, state = WRONG_STATES[wrong]
    for train in (True, False):
        with pytest.raises(kind, match=message):
            outputs(entry, jnp.ones(SHAPE), state, train)


def test_the_state_of_batch_normalization_is_not_that_of_renormalization():
    x, state = jnp.ones((6, C)), {"mean": jnp.zeros(C), "var": jnp.ones(C)}
    message = (
        r"batch_renorm got a state with mean of shape \(8,\), var of shape \(8,\)\. Expected its "
        r"own state, a dict with mean of shape \(8,\), std of shape \(8,\), as its init makes"
    )
    with pytest.raises(ValueError, match=message):
        methods.batch_renorm().apply(x, state, train=True)
    with pytest.raises(ValueError, match=r"evonorm_b0 got .* a dict with var of shape \(8,\)"):
        methods.evonorm_b0().apply(x, state, train=True)
    with pytest.raises(
        ValueError, match=r"domain_batch_norm got .* a dict with mean of shape \(2,"
    ):
        methods.domain_batch_norm(2).observe(x, state, domain=0)
    narrow = {"mean": jnp.zeros(C), "var": jnp.ones(1)}
    with pytest.raises(ValueError, match=r"mean of shape \(8,\), var of shape \(1,\)\. Expected"):
        methods.batch_group_norm(C).apply(x, narrow, train=True)


AVERAGING = [entry for entry in STATEFUL if "momentum" in entry.method.options]
AVERAGES = ("mean", "var", "std", "mean_square")
WRONG_MOMENTA = (-1, 2, np.nan, np.full(C, 0.5))


@pytest.mark.parametrize("momentum", WRONG_MOMENTA, ids=str)
@every(AVERAGING)
def test_momentum_that_is_no_weight_is_refused(entry, momentum):
    """Where it is given to `apply`, and as a hyperparameter."""
    message = "momentum .*expected a number of at least 0 and of at most 1"
    with pytest.raises((TypeError, ValueError), match=message):
        outputs(entry, jnp.ones(SHAPE), entry.init(SHAPE), momentum=momentum)
    if isinstance(momentum, np.ndarray):
        message = "momentum=...\\) is an array of shape"
    elif np.isnan(momentum):
        message = "momentum=...\\) is NaN"
    with pytest.raises((TypeError, ValueError), match=message):
        dataclasses.replace(entry.method, momentum=momentum)


@every(AVERAGING)
def test_no_momentum_remembers_nothing_or_is_refused(entry):
    """Rows of the table then always use the batch's statistics."""
    if entry.constructor.startswith(("batch_norm", "ghost", "batch_group", "batch_and_group")):
        method = dataclasses.replace(entry.method, momentum=None)
        assert method.init(SHAPE) == {}
        y, state = method.apply(jnp.ones(SHAPE), {}, train=False)
        assert state == {} and not y.any()
        return
    with pytest.raises(
        (TypeError, ValueError), match="momentum.*(expected a number of at least 0|is None)"
    ):
        method = dataclasses.replace(entry.method, momentum=None)
        outputs(dataclasses.replace(entry, method=method), jnp.ones(SHAPE), entry.init(SHAPE))


@by_turns(AVERAGING)
def test_traced_momentum_never_destroys_the_state(entry):
    """A schedule compiles nothing again. Beyond 0 and 1 it is 0 and 1; NaN leaves the state."""
    x, state, traces = data(*SHAPE, dtype="f4"), entry.some_state(), []

    @jit
    def run(x, momentum):
        traces.append(1)
        return entry(x, state, momentum=momentum)[1]

    for wrong, right in ((-1.0, 0.0), (2.0, 1.0)):
        chex.assert_trees_all_equal(run(x, wrong), run(x, right))
    new, slow, fast = run(x, np.nan), run(x, 0.75), run(x, 0.25)
    assert len(traces) == 1
    for name in state.keys() & set(AVERAGES):
        np.testing.assert_array_equal(new[name], state[name])
        assert np.abs(slow[name] - fast[name]).max() > 1e-3


def averaged(old, new, momentum):
    """Of a state that holds one array, after a batch that is usable."""
    m = jaxnorm.Moments(*(jnp.ones_like(new),) * 3)
    return averages({"mean": old}, m, momentum, mean=new)["mean"]


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
