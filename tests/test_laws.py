"""Laws that follow from a method's sets: what may be shifted, scaled and reordered, who sees whom,
and how large y can be.

A method is a row with the labels of its sets, as papers give them. Each law is tried on each row,
also where it must not hold.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compiled import jit
from rows import ROWS

from jaxnorm import Method, kernels, methods

SHAPE = (4, 4, 2, 6)
N, H, W, C = SHAPE
DOMAIN = np.array([0, 0, 1, 1], "i4")
LOGITS = {"mean_logits": np.array([0.3, -0.2, 0.5]), "var_logits": np.array([-0.4, 0.1, 0.7])}

Label = Callable[..., tuple]
CHANNEL: Label = lambda n, p, c, *_: (c,)  # noqa: E731
EXAMPLE: Label = lambda n, p, c, *_: (n,)  # noqa: E731
INSTANCE: Label = lambda n, p, c, *_: (n, c)  # noqa: E731
GROUP: Label = lambda n, p, c, *_: (n, c // 2)  # noqa: E731
POSITION: Label = lambda n, p, c, *_: (n, *p)  # noqa: E731
FEATURE: Label = lambda n, p, c, *_: (*p, c)  # noqa: E731
OWN_DOMAIN: Label = lambda n, p, c, *_: (DOMAIN[n], c)  # noqa: E731
BATCH_GROUP: Label = lambda n, p, c, *_: (c // 2,)  # noqa: E731
QUARTER: Label = lambda n, p, c, *_: (((c * H + p[0]) * W + p[1]) // 12,)  # noqa: E731
ALL: Label = lambda n, p, c, *_: (0 * n,)  # noqa: E731


@dataclasses.dataclass(frozen=True)
class Row:
    """A method, and what its definition says of sets.

    Attributes:
        method: with a momentum of 0; its epsilon is that of the test.
        labels: sets whose elements share statistics.
        shift: sets on which a constant may be added to x, now and in the past; None where the mean
            is not taken out.
        options: of `apply`; those named in `per_unit` are in the unit of 1 / x.
        begin: other options in the first step, on other data, after which the test begins.
        at_inference: options of inference alone.
        first: state before the first step, where it is not that of `init`.
        kernel: of a dense layer in front.
        meeting: labels of what is still shared in inference; None for methods that are tested in
            training alone.
        trains: whether training is tested; else another row does.
        blends: whether x is partly standardized with what is remembered, in training.
        standardizes: whether y has mean 0 and variance var / (var + epsilon) on each set, or the
            square mean where `shift` is None.
        epsilon: 0 where there is more than one, in different units.
    """

    name: str
    method: Method
    labels: tuple[Label, ...]
    shift: Label | None
    options: dict = dataclasses.field(default_factory=dict)
    per_unit: tuple[str, ...] = ()
    begin: dict = dataclasses.field(default_factory=dict)
    at_inference: dict = dataclasses.field(default_factory=dict)
    first: dict = dataclasses.field(default_factory=dict)
    kernel: np.ndarray | None = None
    meeting: tuple[Label, ...] | None = None
    trains: bool = True
    blends: bool = False
    standardizes: bool = False
    epsilon: float = 0.1

    def __str__(self):
        return self.name

    def init(self, dtype):
        """State before the first step."""
        shape = None if self.kernel is None else self.kernel.shape
        state = self.method.init(SHAPE, kernel_shape=shape) | self.first
        return {name: jnp.asarray(t, dtype) for name, t in state.items()}

    def apply(self, x, state, *, train, epsilon, **options):
        if self.kernel is not None:
            options |= {"inputs": x, "kernel": self.kernel}
        if not train:
            options |= self.at_inference
        method = dataclasses.replace(self.method, epsilon=epsilon)
        return method.apply(x, state, train=train, **options)


@dataclasses.dataclass(frozen=True, repr=False)
class weight_standardization(Method):
    """`standardize_kernel` of x as a method."""

    epsilon: float = 1e-5

    def rule(self, x, state, *, train, scale, bias, **options):
        gain = scale * (x.size // C) ** 0.5
        y = kernels.standardize_kernel(x, gain=gain, epsilon=self.epsilon)
        return y + bias[None, None, None], state


def table_rows():
    for row in ROWS:
        method = dataclasses.replace(row.call(SHAPE, -1), momentum=0.0)
        ghosts = "ghost" in row.name or "and_group" in row.name
        remembers = bool(method.init(SHAPE))
        yield Row(
            row.name,
            method,
            (row.label,),
            None if row.mean == 0 else row.label,
            meeting=() if remembers and not ghosts else None,
            standardizes=True,
        )


BEYOND = (
    Row(
        "weighed examples of batch norm",
        methods.batch_norm(momentum=0.0, example_weight=0.25),
        (CHANNEL,),
        CHANNEL,
        meeting=(INSTANCE,),
        trains=False,
    ),
    Row(
        "weighed examples of batch group norm",
        methods.batch_group_norm(3, momentum=0.0),
        (BATCH_GROUP,),
        BATCH_GROUP,
        at_inference={"example_weight": 0.25},
        meeting=(GROUP,),
        trains=False,
    ),
    Row(
        "batch_renorm",
        methods.batch_renorm(rmax=1.05, dmax=0.1, momentum=0.0),
        (CHANNEL,),
        CHANNEL,
        meeting=(),
    ),
    Row(
        "momentum_batch_norm",
        methods.momentum_batch_norm(0.4, momentum=0.0),
        (CHANNEL,),
        CHANNEL,
        begin={"train_momentum": 0.0},
        blends=True,
        meeting=(),
    ),
    *(
        Row(
            f"memorized_batch_norm, {variance}",
            methods.memorized_batch_norm((0.2, 0.3, 0.5), variance),
            (CHANNEL,),
            CHANNEL,
            blends=True,
            meeting=(),
        )
        for variance in ("pool", "blend")
    ),
    Row(
        "switchable_norm",
        methods.switchable_norm(momentum=0.0),
        (INSTANCE, EXAMPLE, CHANNEL),
        ALL,
        LOGITS,
        meeting=(INSTANCE, EXAMPLE),
    ),
    Row(
        "switchable_norm without batch",
        methods.switchable_norm(use_batch=False),
        (INSTANCE, EXAMPLE),
        EXAMPLE,
        {name: t[:2] for name, t in LOGITS.items()},
    ),
    Row(
        "domain_batch_norm",
        methods.domain_batch_norm(2, momentum=0.0),
        (OWN_DOMAIN,),
        OWN_DOMAIN,
        {"domain": DOMAIN},
        meeting=(),
        standardizes=True,
    ),
    Row(
        "filter_response_norm",
        methods.filter_response_norm(use_slope=True),
        (INSTANCE,),
        None,
        {"threshold": np.full(C, -0.7), "slope": np.full(C, 0.2)},
    ),
    Row(
        "evonorm_b0",
        methods.evonorm_b0(momentum=0.0),
        (CHANNEL, INSTANCE),
        None,
        {"v": np.full(C, 0.3)},
        meeting=(INSTANCE,),
    ),
    Row(
        "evonorm_s0",
        methods.evonorm_s0(3),
        (GROUP,),
        None,
        {"v": np.full(C, 0.7)},
        per_unit=("v",),
    ),
    Row(
        "proxy_norm",
        methods.proxy_norm(methods.group_norm(3)),
        (GROUP,),
        GROUP,
        {"activation": jax.nn.silu},
    ),
    Row(
        "group_norm_plus",
        methods.group_norm_plus(3, momentum=0.0),
        (GROUP, FEATURE),
        GROUP,
        meeting=(GROUP,),
        epsilon=0.0,
    ),
    Row(
        "group_norm_plus by channels",
        methods.group_norm_plus(3, per_position=False, momentum=0.0),
        (GROUP, CHANNEL),
        GROUP,
        meeting=(GROUP,),
        epsilon=0.0,
    ),
    Row(
        "batch_group_norm of pieces",
        methods.batch_group_norm(4, momentum=0.0),
        (QUARTER,),
        QUARTER,
        meeting=(),
        standardizes=True,
    ),
    Row(
        "cross_iteration_norm after a layer that does nothing",
        methods.cross_iteration_norm(window=2, momentum=0.0),
        (CHANNEL,),
        CHANNEL,
        kernel=np.eye(C),
        blends=True,
        meeting=(),
    ),
    Row(
        "moving_average_norm",
        methods.moving_average_norm(window=2, average_from=0, correct_from=0, momentum=0.0),
        (CHANNEL,),
        None,
        {"tap": np.full(C, 0.1)},
        first={"step": 2.0},
        meeting=(),
    ),
    Row("standardize_kernel", weight_standardization(), (CHANNEL,), CHANNEL, standardizes=True),
)
METHODS = (*table_rows(), *BEYOND)


@dataclasses.dataclass
class Data:
    """What goes in."""

    x: np.ndarray
    past: np.ndarray
    gy: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    epsilon: float
    unit: float = 1.0


def draw(row) -> Data:
    rng = np.random.default_rng(0)
    big = (rng.normal(size=SHAPE) * rng.uniform(0.5, 2, (N, 1, 1, C)) for _ in range(3))
    return Data(*big, *rng.uniform(0.5, 2, (2, C)), row.epsilon)


def compiled(row, train):
    """The method after a step on the past: y and the derivatives by x, scale and bias, as a
    function of `Data`."""

    def call(x, state, unit, options, train=True, **rest):
        options = options | {name: options[name] / unit for name in row.per_unit}
        return row.apply(x, state, train=train, **options, **rest)

    @partial(jit, static_argnames="epsilon")
    def run(x, past, gy, scale, bias, epsilon, unit):
        affine = {"scale": scale, "bias": bias}
        _, state = call(
            past, row.init(x.dtype), unit, row.options | row.begin, epsilon=epsilon, **affine
        )

        def f(x, state, scale, bias):
            return call(x, state, unit, row.options, train, epsilon=epsilon, scale=scale, bias=bias)

        (y, new), pull = jax.vjp(f, x, state, scale, bias)
        dx, dstate, dscale, dbias = pull((gy, jax.tree.map(jnp.zeros_like, new)))
        from_state = pull((gy, jax.tree.map(jnp.ones_like, new)))[0] - dx
        return {"y": y, "dx": dx, "dscale": dscale, "dbias": dbias}, dstate, from_state

    return lambda data: jax.tree.map(np.asarray, run(**vars(data)))


def sets_of(label):
    return oracle.set_numbers(SHAPE, label)


def in_another_unit(row, data):
    """f(a x, a^2 epsilon) = f(x, epsilon): epsilon is inside the root."""
    a = 3.0
    other = {"x": a * data.x, "past": a * data.past, "epsilon": a**2 * data.epsilon, "unit": a}
    return other, lambda out: out | {"dx": out["dx"] / a}, True


def shifted(row, data):
    """f(x + b) = f(x) where b is constant on sets."""
    sets = sets_of(row.shift or CHANNEL)
    by = np.random.default_rng(1).normal(size=sets.max() + 1)[sets]
    return {"x": data.x + by, "past": data.past + by}, lambda out: out, row.shift is not None


def reordered(axis, order, row, data):
    """f(p x) = p f(x) exactly where the order p takes sets to sets."""
    take = lambda t: np.take(t, order, axis)  # noqa: E731
    one = (lambda t: t[order]) if axis == 3 else lambda t: t
    other = {name: take(getattr(data, name)) for name in ("x", "past", "gy")}
    other |= {name: one(getattr(data, name)) for name in ("scale", "bias")}

    def expected(out):
        return {name: take(t) if t.ndim == 4 else one(t) for name, t in out.items()}

    return (
        other,
        expected,
        all(same_partition(sets_of(label), take(sets_of(label))) for label in row.labels),
    )


def same_partition(a, b):
    pairs = len(set(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)))
    return pairs == len(np.unique(a)) == len(np.unique(b))


LAWS = {"unit": in_another_unit, "shift": shifted} | {
    f"{name} {how}": partial(reordered, axis, order)
    for axis, name in enumerate(("examples", "rows", "columns", "channels"))
    for how, order in (
        ("reversed", np.arange(SHAPE[axis])[::-1]),
        ("rolled", np.roll(np.arange(SHAPE[axis]), 1)),
    )
}


def broken(row, run, data):
    """The laws that do not do as they should."""
    base = run(data)[0]
    for name, law in LAWS.items():
        change, expected, holds = law(row, data)
        got, want = run(dataclasses.replace(data, **change))[0], expected(base)
        error = max(np.abs(got[part] - want[part]).max() for part in want)
        if not (error < 1e-10 if holds else np.abs(got["y"] - want["y"]).max() > 1e-3):
            yield name, "holds" if holds else "does not hold", error


def touched(labels):
    """What shares a set with the first example, directly or by others."""
    out = np.zeros(SHAPE, bool)
    out[0] = True
    for sets in map(sets_of, labels):
        out |= np.isin(sets, sets[out])
    return out


MODES = [
    (row, train)
    for row in METHODS
    for train in (True, False)
    if (row.trains if train else row.meeting is not None)
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "row, train", MODES, ids=[f"{row}-{'train' if train else 'inference'}" for row, train in MODES]
)
def test_laws(row, train):
    run, data = compiled(row, train), draw(row)
    base, dstate, from_state = run(data)
    assert not list(broken(row, run, data))

    # What is remembered is a constant, and gradients do not flow into it; those of a row do, as
    # through update_running and Flax's running statistics.
    assert isinstance(row.method, methods.Row | methods.batch_group_norm) or not from_state.any()
    assert not train or not any(t.any() for t in jax.tree.leaves(dstate))
    if train and row.shift is not None and not row.blends:
        np.testing.assert_allclose(
            np.bincount(sets_of(row.shift).ravel(), base["dx"].ravel()), 0, atol=1e-10
        )

    # an example is seen by those that share a set with it, and by nobody else
    x = data.x.copy()
    x[0] = 3 * x[0] + 1
    changed = run(dataclasses.replace(data, x=x))[0]["y"] != base["y"]
    seen = touched(row.labels if train else row.meeting)
    assert not changed[~seen].any() and changed[seen].mean() > 0.1

    if row.standardizes and train:
        standardized(row, run, data)
    for x in (np.zeros(SHAPE), np.full(SHAPE, 3.0)):  # nothing to divide by but epsilon
        out = run(dataclasses.replace(data, x=x, epsilon=1e-14))
        assert all(np.isfinite(t).all() for t in jax.tree.leaves(out))


def standardized(row, run, data):
    """Moments of y on each set, and its largest value: sqrt(m - 1) for m elements, where one stands
    out."""
    (label,), fixed = row.labels, row.shift is None
    sets, plain = sets_of(label), {"scale": np.ones(C), "bias": np.zeros(C)}
    count = np.bincount(sets.ravel())

    def mean(t):
        return np.bincount(sets.ravel(), t.ravel()) / count

    y = run(dataclasses.replace(data, **plain))[0]["y"]
    var = mean(data.x**2) - (0 if fixed else mean(data.x) ** 2)
    np.testing.assert_allclose(mean(y**2), var / (var + data.epsilon), atol=1e-11)
    if not fixed:
        np.testing.assert_allclose(mean(y), 0, atol=1e-11)
    bound = np.sqrt(count - (0 if fixed else 1))[sets]
    assert (np.abs(y) <= bound).all()
    first = np.zeros(SHAPE)
    first.ravel()[np.unique(sets, return_index=True)[1]] = 1.0
    y = run(dataclasses.replace(data, x=first, epsilon=1e-14, **plain))[0]["y"]
    np.testing.assert_allclose(y[first == 1], bound[first == 1], rtol=1e-9)
