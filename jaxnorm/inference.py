"""What a normalization that shares statistics between examples does at test time.

Training measures the batch, and inference remembers it: `weigh_example` mixes the remembered
moments with the example's own, `adapt_moments` with those of a batch from another distribution, and
`choose_example_weight` finds how much on held-out data.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import abs2
from jaxnorm._core.axes import resized, single_axis
from jaxnorm._core.checks import check_number
from jaxnorm._core.divisor import corrected
from jaxnorm._core.groups import EACH, Groups, Specification, resolve, row_of
from jaxnorm._core.meshes import in_explicit_meshes
from jaxnorm._core.moments import Moments, inexact, moments
from jaxnorm._core.pooling import approached
from jaxnorm._core.state import pooled_to


@in_explicit_meshes
def weigh_example(
    x: ArrayLike,
    running: Moments,
    groups: Specification,
    *,
    example_weight: ArrayLike,
    weights: ArrayLike | None = None,
    batch_axis: int = 0,
    channel_axis: int | Sequence[int] = -1,
) -> Moments:
    """Inference example weighing: running moments pooled with each example's own.

    With alpha the weight, M and V the running moments of a set, and m and v the example's own over
    the same set,

        mean = (1 - alpha) M + alpha m,
        var = (1 - alpha) V + alpha v + alpha (1 - alpha) |m - M|^2,

    which is `merge` with counts 1 - alpha and alpha. alpha = 0 is plain inference, alpha = 1 uses
    the example alone: instance norm in place of batch norm, group norm in place of batch group
    norm. No example sees another. In training a value that is normalized with n others stays within
    sqrt(n - 1) standard deviations; with B examples in a set, alpha = 1/B gives the same bound at
    inference, and is where to begin a search for the best alpha: see `choose_example_weight`.

    Args:
        x: floating or complex array.
        running: running moments in the statistic's shape with the batch pooled, as
            `running_moments` returns them. Finer ones, such as those of each channel for groups of
            channels, are pooled, each with equal weight.
        groups: the method of training; its batch number does not matter.
        example_weight: alpha, from 0 to 1, a number or a traced scalar. The value of a traced one
            is not looked at: outside of 0 to 1 the formula is extrapolated, and the variance may be
            negative.
        weights: how much each element of x counts in the example's own moments. An example without
            any gets the running ones.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels.

    Returns:
        `Moments` for `normalize`, one for each example, with count 1.

    Raises:
        TypeError: running moments are complex and x is real.
        ValueError: alpha outside of 0 to 1, or running moments that do not pool to the method's
            sets.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxnorm import init_running, methods, running_moments
        >>> x = jnp.array([[4.0], [0.0]])
        >>> state = init_running((1,))  # mean 0, variance 1
        >>> running = running_moments(state, methods.batch_norm(), x.shape)
        >>> m = weigh_example(x, running, methods.batch_norm(), example_weight=0.25)
        >>> m.mean.tolist(), m.var.tolist()
        ([[1.0], [0.0]], [[3.75], [0.75]])

    Reference:
        Four Things Everyone Should Know to Improve Batch Normalization, 2020, arXiv:1906.03548. The
        definition was read in the authors' code, which keeps the second moment where this keeps the
        variance: with alpha = 0 this is exactly the inference of batch normalization.
    """
    x = inexact(x)
    check_number(example_weight, "example_weight", at_least=0, at_most=1)
    sets, fixed = row_of(groups, x.shape, batch_axis, channel_axis)
    if isinstance(sets, Groups):  # the batch may not split as in training
        sets = dataclasses.replace(sets, batch=EACH)
    shape, _ = resolve(sets, x.shape, batch_axis, channel_axis)
    batch = single_axis(batch_axis, x.shape)
    shape = resized(shape, batch, x.shape[batch])  # the same sets inside each example
    own = moments(x, shape, weights=weights, mean=fixed, channel_axis=channel_axis)
    known = _as_known(running, own, batch_axis)
    alpha = jnp.where(own.count > 0, jnp.asarray(example_weight, own.var.dtype), 0)
    # merge's formula without its care for empty parts, which has no derivative with respect to
    # alpha at 0 and 1
    between = alpha * (1 - alpha) * abs2(own.mean - known.mean)
    m = approached(known, own, alpha, jnp.ones_like(own.count))
    return dataclasses.replace(m, var=m.var + between)


@in_explicit_meshes
def adapt_moments(
    running: Moments,
    batch: Moments,
    *,
    source_size: ArrayLike,
    size: ArrayLike | None = None,
    correction: int = 0,
    batch_axis: int = 0,
) -> Moments:
    """Running and batch statistics averaged, for a batch from another distribution.

        mean = (N M + n m) / (N + n),    var = (N V + n v k / (k - correction)) / (N + n)

    with k the elements in a set of the batch, N the number of examples that the running statistics
    are worth and n those of the batch. N = 0 is normalization with the batch's statistics at test
    time. Variances are averaged, see `blend`; `merge` would add the variance between the means.

    Args:
        running: running moments in the statistic's shape with the batch pooled.
        batch: moments of the batch over the same sets.
        source_size: N, 0 or more, in examples; a number or traced scalar.
        size: n, in examples, above 0. None is 1, so that N counts batches.
        correction: 1 divides the batch's variance by k - 1, as the authors' code does. What the
            running variance was divided by stays as it is; theirs is torch's, by k - 1.
        batch_axis: axis of the examples.

    Returns:
        `Moments` for `normalize`, with the count of `batch`. Sets of the batch without elements
        have the running moments.

    Raises:
        ValueError: moments of different shapes, a negative source_size, size or correction.

    Example:
        >>> import jax.numpy as jnp
        >>> running, batch = (
        ...     Moments(jnp.ones((1, 1)), jnp.full((1, 1), t), jnp.ones((1, 1))) for t in (0.0, 4.0)
        ... )
        >>> adapt_moments(running, batch, source_size=48, size=16).mean.tolist()
        [[1.0]]

    Reference:
        Improving robustness against common corruptions by covariate shift adaptation, 2020,
        arXiv:2006.16971. The definition was read in the authors' code, whose `prior` is N / (N +
        n). N = 0: Evaluating Prediction-Time Batch Normalization for Robustness under Covariate
        Shift, 2020, arXiv:2006.10963.
    """
    size = 1 if size is None else size
    check_number(source_size, "source_size", at_least=0)
    check_number(size, "size", above=0)
    check_number(correction, "correction", at_least=0)
    known = _as_known(running, batch, batch_axis)
    source, target = (jnp.asarray(n, batch.var.dtype) for n in (source_size, size))
    share = jnp.where(batch.count > 0, target / (source + target), 0)
    return approached(known, corrected(batch, correction), share, batch.count)


def _as_known(running: Moments, m: Moments, batch_axis: int) -> Moments:
    """Running moments of the sets of m, in its dtypes."""
    known = pooled_to(running, m.mean.shape, batch_axis)
    if jnp.iscomplexobj(known.mean) and not jnp.iscomplexobj(m.mean):
        raise TypeError(
            f"running.mean is complex ({known.mean.dtype}) and the mean of x is {m.mean.dtype}. "
            "Expected both real, or x complex."
        )
    return jax.tree.map(lambda t, like: t.astype(like.dtype), known, m)


class ExampleWeights(NamedTuple):
    """What `choose_example_weight` returns.

    Args:
        alphas: the weights that were tried, ascending.
        values: the mean of what was evaluated for each of them.
        best: the weight with the best finite value, the smallest of several.
    """

    alphas: tuple[float, ...]
    values: tuple[float, ...]
    best: float


def choose_example_weight(
    evaluate: Callable[[jax.Array, Any], tuple[ArrayLike, ArrayLike]],
    batches: Iterable[Any],
    *,
    alphas: Sequence[float] | None = None,
    examples: int | None = None,
    maximize: bool = True,
) -> ExampleWeights:
    """The weight of inference example weighing that does best on held-out data.

    It is one weight for the whole network, and nothing is trained. Every batch is read once and
    evaluated with all weights.

    Args:
        evaluate: (alpha, batch) -> (sum, count), such as the number of right predictions and of
            examples. alpha is a float32 scalar, so that `jax.jit(evaluate)` compiles once.
        batches: held-out data, read once.
        alphas: the weights to try. None tries i / (2 B) for i from 0 to 9, without those above 1.
        examples: B, the examples that shared statistics in training, needed for the default
            weights. 1 / B is the weight with which inference has the bound of training.
        maximize: whether more is better, as for accuracy; False for a loss.

    Returns:
        All weights with their values, and the best.

    Raises:
        ValueError: no batches, no weights or one outside of 0 to 1, neither `alphas` nor
            `examples`, counts that are not all above 0, or no finite value.

    Example:
        >>> def evaluate(alpha, batch):
        ...     return -((alpha - 0.25) ** 2) * len(batch), len(batch)
        >>> choose_example_weight(evaluate, [[1, 2], [3]], examples=4).best
        0.25

    Reference:
        Four Things Everyone Should Know to Improve Batch Normalization, 2020, arXiv:1906.03548, for
        choosing on held-out data; the default weights are those of an
        independent implementation, tensorflow-tabnet. The paper's own were not read.
    """
    if alphas is None:
        if examples is None or not examples >= 1:
            raise ValueError(
                f"Got alphas=None and examples={examples}; expected the weights to try, or the B "
                "of 1/B."
            )
        alphas = [i / (2 * examples) for i in range(10) if i <= 2 * examples]
    alphas = tuple(sorted(map(float, alphas)))
    for alpha in alphas:
        check_number(alpha, "example_weight", at_least=0, at_most=1)
    sums = np.zeros((len(alphas), 2))
    for batch in batches:
        for pair, alpha in zip(sums, alphas, strict=True):  # views, added to in place
            pair += [float(np.asarray(t)) for t in evaluate(jnp.float32(alpha), batch)]
    totals, counts = sums.T
    values = totals / np.where(counts > 0, counts, 1)
    finite = np.isfinite(values)
    if not (counts > 0).all() or not finite.any():
        raise ValueError(
            f"nothing to choose by. Got values {values.tolist()} of counts {counts.tolist()} for "
            f"{alphas}; expected one that is finite, and counts above 0."
        )
    best = int(np.argmax(np.where(finite, values if maximize else -values, -np.inf)))
    return ExampleWeights(alphas, tuple(values.tolist()), alphas[best])
