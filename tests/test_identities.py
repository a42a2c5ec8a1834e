"""The web of equivalences: methods that are one where their definitions meet, each in values and
all gradients.

A row says that two functions are the same: one of the library, and another of the library or a
closed form.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit
from jax import lax
from scipy import special

import jaxnorm
from jaxnorm import EACH, Groups, Method, Moments, kernels, methods, norm, normalize
from jaxnorm.kernels import centralize_kernel
from jaxnorm.positional import moment_shortcut

X = (4, 4, 2, 6)
N, H, W, C = X
E = 1e-3
Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """A claim: two functions of arrays of these shapes are the same, and so are their derivatives
    by each array."""

    claim: str
    left: Function
    right: Function
    shapes: tuple[tuple[int, ...], ...] = (X, (C,), (C,))

    def __str__(self):
        return self.claim


def table(method: Method | Groups | tuple[int, ...], epsilon: float = E) -> Function:
    """A row of the table of methods, of x and perhaps scale and bias."""
    return lambda x, *affine: norm(x, method, epsilon=epsilon, **named(affine))[0]


def named(affine):
    return dict(zip(("scale", "bias"), affine, strict=False))


def wide(state):
    """In double precision: what is remembered is not rounded."""
    return jax.tree.map(lambda t: jnp.asarray(t, jnp.float64), state)


def applied(method: Method, state=None, train=True, **options) -> Function:
    """A method, by default before its first step, as a function of x and perhaps scale and bias."""

    def f(x, *affine):
        before = method.init(x.shape) if state is None else state
        return method.apply(x, wide(before), train=train, **options, **named(affine))[0]

    return f


def of_parts(function: Function, count: int, **names) -> Function:
    """The function of each of `count` equal parts of the batch."""
    split = lambda x: x.reshape(count, -1, *x.shape[1:])  # noqa: E731
    return lambda x, *rest: jax.vmap(lambda part: function(part, *rest), **names)(split(x)).reshape(
        x.shape
    )


def pulled_back(function: Function) -> Function:
    """The gradient by x: a function of x and the cotangent."""
    return lambda x, g: jax.vjp(function, x)[1](g)[0]


def centered(function: Function, axes) -> Function:
    return lambda x, *rest: function(x - x.mean(axes, keepdims=True), *rest)


def product(x, kernel):
    return jnp.matmul(x, kernel)


m, BGN, BAG = methods, methods.batch_group_norm, methods.batch_and_group_norm
bn = table(m.batch_norm())
EACH_FEATURE = Groups(batch=1, spatial=EACH, channel=EACH)
ONE, VECTORS = (1, H, W, C), (N, C)

REDUCTIONS = [
    Row(claim, table(left), table(right), (shape, (C,), (C,)))
    for claim, left, right, shape in (
        ("batch norm of one example is instance norm", m.batch_norm(), m.instance_norm(), ONE),
        ("batch norm is C batch groups", m.batch_norm(), BGN(C), X),
        ("batch norm is one ghost", m.batch_norm(), m.ghost_batch_norm(1), X),
        ("batch norm is a ghost of N", m.batch_norm(), m.ghost_batch_norm(ghost_size=N), X),
        ("N ghosts are instance norm", m.ghost_batch_norm(N), m.instance_norm(), X),
        ("ghosts of one are instance norm", m.ghost_batch_norm(ghost_size=1), m.instance_norm(), X),
        ("instance norm is C groups", m.instance_norm(), m.group_norm(C), X),
        ("one group is layer norm", m.group_norm(1), m.layer_norm(), X),
        ("group size is C / G", m.group_norm(3), m.group_norm(group_size=2), X),
        ("layer norm of vectors is that of tokens", m.layer_norm(), m.token_layer_norm(), VECTORS),
        ("positional norm is token layer norm", m.positional_norm(), m.token_layer_norm(), X),
        ("one batch group of one example is layer norm", BGN(1), m.layer_norm(), ONE),
        ("batch groups of one example are group norm", BGN(3), m.group_norm(3), ONE),
        ("C batch groups of one example are instance norm", BGN(C), m.instance_norm(), ONE),
        ("each feature apart pools the batch alone", EACH_FEATURE, (1, H, W, C), X),
        ("one batch group is the whole tensor", BGN(1), (1, 1, 1, 1), X),
        ("(B, G) = (N, C) is batch norm", BAG(ghost_size=N, num_groups=C), m.batch_norm(), X),
        ("(B, C) is ghost batch norm", BAG(2, C), m.ghost_batch_norm(2), X),
        ("(1, C) is instance norm", BAG(ghost_size=1, num_groups=C), m.instance_norm(), X),
        ("(1, G) is group norm", BAG(ghost_size=1, num_groups=3), m.group_norm(3), X),
        ("(1, 1) is layer norm", BAG(ghost_size=1, num_groups=1), m.layer_norm(), X),
        ("(N, G) is batch group norm", BAG(1, 3), BGN(3), X),
        ("(N, 1) is the whole tensor", BAG(1, 1), (1, 1, 1, 1), X),
    )
]


def flat_pieces(parts: int) -> Function:
    """Batch group norm by the reshape of the paper's implementations: channel, row, column, cut
    into C * parts pieces."""

    def f(x, scale, bias):
        t = jnp.moveaxis(x, -1, 1).reshape(N, parts * C, -1)
        d = t - t.mean((0, 2), keepdims=True)
        t = d / jnp.sqrt((d**2).mean((0, 2), keepdims=True) + E)
        return (
            jnp.moveaxis(t.reshape(N, C, H, W), 1, -1) * scale[None, None, None]
            + bias[None, None, None]
        )

    return f


def position_by_position(x, *affine):
    return table(m.layer_norm())(x.reshape(-1, C), *affine).reshape(x.shape)


RESHAPED = [
    Row(
        "ghost batch norm is batch norm of each part", table(m.ghost_batch_norm(2)), of_parts(bn, 2)
    ),
    Row("instance norm is batch norm of each example", table(m.instance_norm()), of_parts(bn, N)),
    Row(
        "batch norm over a named axis is that of the batch",
        of_parts(
            lambda x, *affine: norm(x, m.batch_norm(), epsilon=E, axis_name="i", **named(affine))[
                0
            ],
            2,
            axis_name="i",
        ),
        bn,
    ),
    Row(
        "batch norm over pairs of devices is ghost batch norm",
        of_parts(
            lambda x, *affine: norm(
                x,
                m.batch_norm(),
                epsilon=E,
                axis_name="i",
                axis_index_groups=[[0, 1], [2, 3]],
                **named(affine),
            )[0],
            4,
            axis_name="i",
        ),
        table(m.ghost_batch_norm(2)),
    ),
    Row(
        "token layer norm is layer norm of all positions",
        table(m.token_layer_norm()),
        position_by_position,
    ),
    Row(
        "rms norm of centered channels is token layer norm",
        centered(table(m.rms_norm()), -1),
        table(m.token_layer_norm()),
    ),
    *(
        Row(
            f"{parts} C batch groups are the flat pieces",
            applied(BGN(parts * C, epsilon=E)),
            flat_pieces(parts),
        )
        for parts in (1, 2, 4, 8)
    ),
    *(
        Row(
            f"{parts} C batch groups are a row of parts",
            applied(BGN(parts * C, epsilon=E)),
            table(Groups(batch=1, spatial=spatial, channel=EACH)),
        )
        for parts, spatial in ((2, (2, 1)), (4, (4, 1)), (8, (4, 2)))
    ),
]

ALONE = np.array([-np.inf, -np.inf, 0.0])


def past(seed, shape=(C,), low=0.5):
    """Something remembered."""
    return np.random.default_rng(seed).uniform(low, 3, shape)


RUNNING = {"mean": past(1), "var": past(2)}
OLD_TRAINING = {"mean": past(3), "var": past(4)}
TRAINING = {f"train_{name}": t for name, t in OLD_TRAINING.items()}
REMEMBERED = {"mean": past(5, (2, C)), "var": past(6, (2, C)), "count": np.full(C, 2.0)}
BANK = {"mean": past(7, (3, C)), "var": past(8, (3, C))}


def served(x, *affine, mean=RUNNING["mean"], var=RUNNING["var"]):
    """Inference by running statistics."""
    along = Moments(
        jnp.ones((1, 1, 1, C)), *(jnp.asarray(t).reshape(1, 1, 1, C) for t in (mean, var))
    )
    return normalize(x, along, epsilon=E, **named(affine))


def crossed(window, rho=1.0, size=3):
    """Cross-iteration norm of a dense layer, after its first batches with another kernel."""

    def f(x, kernel, *affine):
        method = m.cross_iteration_norm(window=size, epsilon=E)
        state = wide(method.init(X, kernel_shape=(C, C)))
        rng = np.random.default_rng(11)
        for _ in range(2):
            inputs, old = jnp.asarray(rng.normal(1, 2, X)), jnp.asarray(rng.normal(size=(C, C)))
            _, state = method.apply(
                product(inputs, old), state, train=True, inputs=inputs, kernel=old
            )
        options = {"inputs": x, "kernel": kernel, "window": window, "rho": rho}
        return method.apply(product(x, kernel), state, train=True, **options, **named(affine))[0]

    return f


def of_dense(function):
    return lambda x, kernel, *affine: function(product(x, kernel), *affine)


CROSS = m.cross_iteration_norm(epsilon=E)
FIRST_CROSS = CROSS.init(X, kernel_shape=(C, C))


def cross(state, train=True, **options):
    """Cross-iteration norm of a dense layer."""

    def f(x, kernel, *affine):
        in_front = {"inputs": x, "kernel": kernel}
        return applied(CROSS, state, train, **in_front, **options)(product(x, kernel), *affine)

    return f


DENSE = (X, (C, C), (C,), (C,))
BACKBONE = [
    Row(f"{name} is batch norm", left, bn)
    for name, left in {
        "renorm(1, 0)": applied(
            m.batch_renorm(rmax=1.0, dmax=0.0, epsilon=E), {"mean": past(1), "std": past(2)}
        ),
        "momentum(0)": applied(
            m.momentum_batch_norm(epsilon=E), RUNNING | TRAINING, train_momentum=0.0
        ),
        "memorized, all weight on the batch": applied(
            m.memorized_batch_norm((0, 0, 1), epsilon=E), REMEMBERED
        ),
        "memorized, blended, all weight on the batch": applied(
            m.memorized_batch_norm((0, 0, 1), variance="blend", epsilon=E), REMEMBERED
        ),
        "memorized, nothing yet": applied(m.memorized_batch_norm((0.3, 0.2, 0.5), epsilon=E)),
        "switchable, batch alone": applied(
            m.switchable_norm(epsilon=E), RUNNING, mean_logits=ALONE, var_logits=ALONE
        ),
        "domain of one": applied(m.domain_batch_norm(1, epsilon=E), domain=0),
        "domain of several": applied(
            m.domain_batch_norm(3, epsilon=E), BANK, domain=np.full(N, 2, "i4")
        ),
        "batch group(C)": applied(BGN(C, epsilon=E)),
    }.items()
] + [
    Row("cross-iteration of no window is batch norm", crossed(0), of_dense(bn), DENSE),
    Row(
        "cross-iteration, nothing yet, is batch norm",
        cross(FIRST_CROSS, rho=0.5),
        of_dense(bn),
        DENSE,
    ),
]

SERVED = {
    "momentum(1)": applied(
        m.momentum_batch_norm(epsilon=E),
        TRAINING | {"mean": past(9), "var": past(10)},
        train_momentum=1.0,
    ),
    "momentum, served,": applied(m.momentum_batch_norm(epsilon=E), TRAINING | RUNNING, train=False),
    "renorm": applied(
        m.batch_renorm(epsilon=E),
        {"mean": RUNNING["mean"], "std": np.sqrt(RUNNING["var"] + E)},
        train=False,
    ),
    "switchable, batch alone,": applied(
        m.switchable_norm(epsilon=E), RUNNING, train=False, mean_logits=ALONE, var_logits=ALONE
    ),
    "memorized, one batch,": applied(
        m.memorized_batch_norm((0.3, 0.7), epsilon=E),
        {name: t[None] for name, t in RUNNING.items()} | {"count": np.ones(C)},
        train=False,
    ),
    "domain": applied(
        m.domain_batch_norm(2, epsilon=E),
        {name: np.stack([2 * t, t]) for name, t in RUNNING.items()},
        train=False,
        domain=1,
    ),
    "batch norm": applied(m.batch_norm(epsilon=E), RUNNING, train=False),
    "batch group(C)": applied(BGN(C, epsilon=E), RUNNING, train=False),
}
INFERENCE = [
    Row(
        f"{name} is inference by the state",
        left,
        partial(served, **OLD_TRAINING) if name == "momentum(1)" else served,
    )
    for name, left in SERVED.items()
] + [
    Row(
        "cross-iteration is inference by the state",
        cross(FIRST_CROSS | RUNNING, train=False),
        of_dense(served),
        DENSE,
    ),
]


def last_of(function):
    """Of a batch in two halves, the function of the whole at the second, the first being a
    constant."""
    return lambda x, *rest: function(
        jnp.concatenate([lax.stop_gradient(x[: N // 2]), x[N // 2 :]]), *rest
    )[N // 2 :]


def memorized_halves(x, *affine):
    method = m.memorized_batch_norm((0.5, 0.5), epsilon=E)
    _, state = method.apply(x[: N // 2], wide(method.init(X)), train=True)
    return method.apply(x[N // 2 :], state, train=True, **named(affine))[0]


def crossed_halves(rho):
    def f(x, kernel, *affine):
        method, y = m.cross_iteration_norm(window=1, rho=rho, epsilon=E), product(x, kernel)
        state, options = (
            wide(method.init(X, kernel_shape=(C, C))),
            {"kernel": kernel, "train": True},
        )
        _, state = method.apply(y[: N // 2], state, inputs=x[: N // 2], **options)
        return method.apply(y[N // 2 :], state, inputs=x[N // 2 :], **options, **named(affine))[0]

    return f


CONCATENATED = [
    Row(
        "memorized with equal weights is batch norm of both batches", memorized_halves, last_of(bn)
    ),
    *(
        Row(
            f"cross-iteration of a constant kernel is batch norm of both batches, rho={rho}",
            crossed_halves(rho),
            lambda x, kernel, *affine: last_of(bn)(product(x, kernel), *affine),
            DENSE,
        )
        for rho in (0.0, 1.0)
    ),
    Row(
        "domains by turns are ghosts",
        applied(m.domain_batch_norm(3, epsilon=E), BANK, domain=np.array([0, 0, 1, 1], "i4")),
        table(m.ghost_batch_norm(2)),
    ),
]


def moving(window=3, late=True):
    """Moving average norm with r = 1, as long as it uses the batch alone: late with a window of
    one, or early."""
    method = m.moving_average_norm(window, average_from=0, correct_from=100, epsilon=E)
    state = method.init(X) | {
        "step": np.array(10.0 if late else 1.0),
        "mean_square": past(1),
    }
    return applied(method, state, tap=np.zeros(C))


MEAN_SQUARE = table(jaxnorm.Row(Groups(batch=1, spatial=1, channel=-1), mean=0))
Q = np.sqrt(2) * special.erfinv(2 * (np.arange(200) + 0.5) / 200 - 1)


def group_plus(mixture, **fields):
    return applied(m.group_norm_plus(3, epsilon=E, **fields), mixture=mixture)


def after_group_norm(method):
    return lambda x, *affine: table(method)(table(m.group_norm(3))(x), *affine)


def std_of(x, axes):
    return jnp.sqrt(x.var(axes, keepdims=True) + E)


def proxy_of_identity(x, scale, bias):
    """Without an activation the proxy is a normal variable, scaled and shifted; its grid's variance
    is var(Q)."""
    return (
        table(m.group_norm(3))(x, scale / jnp.sqrt(scale**2 * Q.var() + 0.03))
        + 0 * bias[None, None, None]
    )


def s0(v, num_groups=3):
    return applied(m.evonorm_s0(num_groups, epsilon=E), v=np.full(C, v))


def b0(v, train=True):
    return applied(m.evonorm_b0(epsilon=E), {"var": past(2)}, train, v=np.full(C, v))


def switched(**shares):
    """Switchable norm by its shares of instance, layer and, if given, batch statistics."""
    logits = np.array([-np.inf if share == 0 else np.log(share) for share in shares.values()])
    method = m.switchable_norm(use_batch="batch" in shares, epsilon=E)
    state = RUNNING if "batch" in shares else {}
    return applied(method, state, mean_logits=logits, var_logits=logits)


def less_mean_of_groups(x):
    t = x.reshape(*x.shape[:-1], 3, -1)
    return (t - t.mean((1, 2, 4), keepdims=True)).reshape(x.shape)


def affine(y, scale, bias):
    return y * scale[None, None, None] + bias[None, None, None]


SINGLE = (ONE, (C,), (C,))
FRN = m.filter_response_norm(use_threshold=False, epsilon=E)
frn, frn_row = applied(FRN), table(m.instance_rms_norm())


def thresholded(threshold):
    return applied(m.filter_response_norm(epsilon=E), threshold=threshold)


OTHERS = [
    Row(*row)
    for row in (
        (
            "switchable, instance alone",
            switched(instance=1, layer=0, batch=0),
            table(m.instance_norm()),
        ),
        ("switchable, layer alone", switched(instance=0, layer=1, batch=0), table(m.layer_norm())),
        (
            "switchable without batch, layer alone",
            switched(instance=0, layer=1),
            table(m.layer_norm()),
        ),
        (
            "switchable of one example: batch is instance",
            switched(instance=0.2, layer=0.3, batch=0.5),
            switched(instance=0.5, layer=0.3, batch=0.2),
            SINGLE,
        ),
        ("batch group norm in training is its row", applied(BGN(3, epsilon=E)), table(BGN(3))),
        (
            "one batch group of one example in training is layer norm",
            applied(BGN(1, epsilon=E)),
            table(m.layer_norm()),
            SINGLE,
        ),
        ("moving average of one batch is the mean square", moving(window=1), MEAN_SQUARE),
        ("moving average in its first steps is the mean square", moving(late=False), MEAN_SQUARE),
        (
            "moving average of centered channels is batch norm",
            centered(moving(window=1), (0, 1, 2)),
            bn,
        ),
        ("filter response norm is its row", frn, frn_row),
        (
            "filter response norm of centered channels is instance norm",
            centered(frn, (1, 2)),
            table(m.instance_norm()),
        ),
        (
            "filter response norm of one example is moving average norm",
            frn,
            moving(window=1),
            SINGLE,
        ),
        (
            "a threshold of 0 is relu",
            thresholded(np.zeros(C)),
            lambda *args: jax.nn.relu(frn_row(*args)),
        ),
        (
            "no threshold is minus infinity",
            thresholded(np.full(C, -np.inf)),
            frn_row,
        ),
        (
            "learned epsilon adds up",
            applied(
                m.filter_response_norm(
                    use_threshold=False, use_learned_epsilon=True, epsilon=E / 2
                ),
                learned_epsilon=-E / 2,
            ),
            frn_row,
        ),
        (
            "positional norm in training is its row",
            applied(m.positional_norm(epsilon=E)),
            table(m.positional_norm()),
        ),
        (
            "the shortcut undoes positional norm",
            lambda x: moment_shortcut(
                *norm(x, m.positional_norm(epsilon=E)),
                epsilon=E,
            ),
            lambda x: x,
            (X,),
        ),
        ("GN+ of a large mixture is group norm", group_plus(40.0), table(m.group_norm(3))),
        (
            "GN+ of a very negative mixture pools the batch",
            group_plus(-1e3),
            after_group_norm(EACH_FEATURE),
        ),
        (
            "so it does by channels",
            group_plus(-1e3, per_position=False),
            after_group_norm(m.batch_norm()),
        ),
        (
            "GN+ of one example is a part of group norm",
            group_plus(0.4),
            lambda x, scale, bias: table(m.group_norm(3))(x, scale / (1 + np.exp(-0.4)), bias),
            SINGLE,
        ),
        (
            "proxy norm without activation is scaled",
            applied(m.proxy_norm(m.group_norm(3), epsilon=E)),
            proxy_of_identity,
        ),
        (
            "S0 of centered groups with v = 0 is half of group norm",
            lambda x, *rest: s0(0.0)(less_mean_of_groups(x), *rest),
            lambda x, scale, bias: table(m.group_norm(3))(x, scale / 2, bias),
        ),
        (
            "S0 with large v is relu over the deviation",
            s0(1e9, C),
            lambda x, *rest: affine(jax.nn.relu(x) / std_of(x, (1, 2)), *rest),
        ),
        (
            "B0 of a centered example with v = 0 is instance norm",
            centered(b0(0.0), (1, 2)),
            table(m.instance_norm()),
            SINGLE,
        ),
        (
            "B0 of one example divides by a line",
            b0(0.7),
            lambda x, *rest: affine(x / (std_of(x, (1, 2)) + jax.nn.relu(0.7 * x)), *rest),
            SINGLE,
        ),
        (
            "B0 in inference has the state's deviation",
            b0(0.7, train=False),
            lambda x, *rest: affine(
                x
                / jnp.maximum(
                    jnp.sqrt(past(2) + E).reshape(1, 1, 1, C), 0.7 * x + std_of(x, (1, 2))
                ),
                *rest,
            ),
        ),
    )
]

KERNEL = (3, 2, 4, 6)
KERNELS = [
    Row(*row)
    for row in (
        (
            "a standardized kernel is batch norm of it",
            partial(kernels.standardize_kernel, epsilon=E),
            bn,
            (KERNEL,),
        ),
        (
            "a kernel's fan-in is one axis",
            partial(kernels.standardize_kernel, epsilon=E),
            lambda k: kernels.standardize_kernel(k.reshape(-1, C), epsilon=E).reshape(KERNEL),
            (KERNEL,),
        ),
        (
            "a gain is a scale",
            lambda k, gain: kernels.standardize_kernel(k, gain=gain, epsilon=E),
            lambda k, gain: bn(k, gain / np.sqrt(24)),
            (KERNEL, (C,)),
        ),
        (
            "a standardized kernel does not see a w + b",
            lambda k, a, b: kernels.standardize_kernel(affine(k, 1 + a**2, b), epsilon=0.0),
            lambda k, a, b: kernels.standardize_kernel(k, epsilon=0.0),
            (KERNEL, (C,), (C,)),
        ),
        (
            "standardizing again changes nothing",
            lambda k: kernels.standardize_kernel(
                kernels.standardize_kernel(k, epsilon=0.0), epsilon=0.0
            ),
            partial(kernels.standardize_kernel, epsilon=0.0),
            (KERNEL,),
        ),
        ("centralizing is in standardizing", lambda k: bn(centralize_kernel(k)), bn, (KERNEL,)),
        (
            "centralized kernels give a convolution of constants 0",
            lambda k, c: product(jnp.broadcast_to(c, (2, 24)), centralize_kernel(k).reshape(-1, C)),
            lambda k, c: jnp.zeros((2, C)),
            (KERNEL, (1, 1)),
        ),
    )
]


def closed_form(x, g, *, axes=(0, 1, 2), share=1.0, mean=None, center=None, var=None):
    """(g - a mean(g) - a (x - c) / s mean(g x_hat)) / s; `mean` 0 leaves out the first mean."""
    own = x.mean(axes, keepdims=True)
    free = mean is not None and np.ndim(mean) == 0
    used = own if mean is None else mean
    var = (jnp.square(x - used)).mean(axes, keepdims=True) if var is None else var
    s = jnp.sqrt(var + E)
    x_hat = (x - used) / s
    center = used if center is None else center
    first = 0 if free else share * g.mean(axes, keepdims=True)
    return (g - first - share * (x - center) / s * (g * x_hat).mean(axes, keepdims=True)) / s


def along(t):
    return jnp.asarray(t).reshape(1, 1, 1, C)


def of_momentum(weight):
    def f(x, g):
        own, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
        mean, var = (
            weight * along(old) + (1 - weight) * t
            for old, t in zip(OLD_TRAINING.values(), (own, var), strict=True)
        )
        return closed_form(x, g, share=1 - weight, mean=mean, center=own, var=var)

    return f


def of_memory(variance):
    def f(x, g):
        means = [*map(along, REMEMBERED["mean"]), x.mean((0, 1, 2), keepdims=True)]
        variances = [*map(along, REMEMBERED["var"]), x.var((0, 1, 2), keepdims=True)]
        shares = (0.2, 0.3, 0.5)
        mean = sum(a * t for a, t in zip(shares, means, strict=True))
        var = sum(a * t for a, t in zip(shares, variances, strict=True))
        if variance == "pool":
            var = var + sum(a * (t - mean) ** 2 for a, t in zip(shares, means, strict=True))
        center = means[-1] if variance == "blend" else mean
        return closed_form(x, g, share=0.5, mean=mean, center=center, var=var)

    return f


def of_renorm(x, g):
    """r times batch norm's; r is a constant."""
    r = jnp.sqrt(x.var((0, 1, 2), keepdims=True) + E) / along(past(2))
    return lax.stop_gradient(r) * closed_form(x, g)


GRADIENTS = [
    Row(f"gradient of {name}", pulled_back(left), right, (X, X))
    for name, left, right in (
        ("batch norm", bn, closed_form),
        ("layer norm", table(m.layer_norm()), partial(closed_form, axes=(1, 2, 3))),
        ("rms norm", table(m.rms_norm()), partial(closed_form, axes=(3,), mean=0.0)),
        ("filter response norm", frn, partial(closed_form, axes=(1, 2), mean=0.0)),
        ("inference", served, lambda x, g: g / jnp.sqrt(along(RUNNING["var"]) + E)),
        (
            "momentum",
            applied(m.momentum_batch_norm(epsilon=E), TRAINING | RUNNING, train_momentum=0.4),
            of_momentum(0.4),
        ),
        *(
            (
                f"memorized, {variance}",
                applied(
                    m.memorized_batch_norm((0.2, 0.3, 0.5), variance=variance, epsilon=E),
                    REMEMBERED,
                ),
                of_memory(variance),
            )
            for variance in ("pool", "blend")
        ),
        (
            "renorm without bounds",
            applied(
                m.batch_renorm(rmax=1e6, dmax=1e6, epsilon=E), {"mean": past(1), "std": past(2)}
            ),
            of_renorm,
        ),
    )
]

ROWS = [*REDUCTIONS, *RESHAPED, *BACKBONE, *INFERENCE, *CONCATENATED, *OTHERS, *KERNELS, *GRADIENTS]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_identity(row):
    """Output, and the derivatives by x and all parameters."""
    rng = np.random.default_rng(0)

    def differentiated(f, arrays):
        y, pull = jax.vjp(f, *arrays)
        return y, *pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    @jit
    def both(*arrays):
        return [differentiated(f, arrays) for f in (row.left, row.right)]

    left, right = both(*(rng.normal(0.5, 2, shape) for shape in row.shapes))
    for ours, theirs in zip(left, right, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)
