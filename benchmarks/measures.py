"""What a claim measures of a trained network beside its test error: functions from the network to
values in % for each seed, by name."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from benchmarks.cells import Key
from benchmarks.datasets import Images
from benchmarks.norms import Layer
from benchmarks.residual import ResidualNet
from benchmarks.serving import percent, serve
from benchmarks.shifts import DOMAINS, SHIFTS, UNKNOWN, mnist_like_digits
from benchmarks.training import (
    State,
    Trained,
    compiled,
    correct,
    in_chunks,
    initialize,
    mean_loss,
    stack,
)
from jaxnorm import methods
from jaxnorm.domains import domain_ensemble
from jaxnorm.inference import choose_example_weight
from jaxnorm.linen import call_norms_with

Values = dict[str, list[float]]


def recalibrated(trained: Trained, key: Key) -> Values:
    """The error with the statistics of the population in place of the running ones."""
    others = serve(trained, key.batch_size or key.how.step).others
    if others is None:
        raise ValueError(f"{key} has no statistics to replace. Expected a row of the table.")
    return {"error": [100 - value for value in others.population]}


def weighed(trained: Trained, key: Key) -> Values:
    """The error with example weighing, by the weight that does best on validation images."""
    size = key.batch_size or key.how.step

    def hits(alpha: jax.Array, state: State, images: Images) -> jax.Array:
        return correct(trained.net, state, images, example_weight=alpha).mean()

    first = trained.splits[0]
    state_of = partial(_of_seed, trained.state)
    on_validation, _ = compiled(hits, jnp.float32(0), state_of(0), first.validation)
    on_test, _ = compiled(hits, jnp.float32(0), state_of(0), first.test)
    found: Values = {"error": [], "alpha": []}
    for seed, split in enumerate(trained.splits):
        state = state_of(seed)
        best = choose_example_weight(
            lambda alpha, images, state=state: (on_validation(alpha, state, images), 1.0),
            [split.validation],
            examples=size,
        ).best
        found["alpha"].append(best)
        found["error"].append(100 - 100 * float(on_test(jnp.float32(best), state, split.test)))
    return found


def shifted(trained: Trained, key: Key) -> Values:
    """The error on shifted test images with the running statistics, and with those of these test
    images (`_adapted`)."""
    test = stack(split.test for split in trained.splits)
    evaluate, _ = compiled(jax.vmap(partial(correct, trained.net)), trained.state, test)
    with call_norms_with(use_running_average=False, update_running_average=False):
        adapt, _ = compiled(jax.vmap(partial(correct, trained.net)), trained.state, test)
    found: Values = {}
    for name in ("noisy", UNKNOWN):
        images = test._replace(pixels=SHIFTS[name](test.pixels))
        found[name] = _errors(evaluate(trained.state, images))
        found[f"{name}_adapted"] = _errors(adapt(trained.state, images))
    return found


def domains(trained: Trained, key: Key) -> Values:
    """The error on test images of all domains of the training (`known`), and on those of unknown
    ones: `faint`, and `mnist` where images are like scikit-learn's digits.

    Where each domain had a device, its statistics are those of this device: a known domain is
    served by its own, an unknown one by all of them, as its own statistics weigh them.
    """
    apart = key.how.order == "domains_apart"
    net = _of_domains(trained.net) if apart else trained.net
    known, unknown = (_of_domain, _by_ensemble) if apart else (_shared, _shared)
    test = stack(split.test for split in trained.splits)
    evaluate, _ = compiled(_each_seed(known, net), trained.state, test, jnp.array(0))
    each = [
        _errors(evaluate(trained.state, _shifted(test, name), jnp.array(i)))
        for i, name in enumerate(DOMAINS)
    ]
    found = {"known": np.mean(each, axis=0).tolist()}
    strangers = {UNKNOWN: _shifted(test, UNKNOWN)}
    if key.data == "digits":
        strangers["mnist"] = stack([mnist_like_digits()] * len(trained.splits))
    for name, images in strangers.items():
        evaluate, _ = compiled(_each_seed(unknown, net), trained.state, images, jnp.array(0))
        found[name] = _errors(evaluate(trained.state, images, jnp.array(0)))
    return found


def gradient_agreement(trained: Trained, key: Key) -> Values:
    """How alike the gradients of two steps with other images are: the mean cosine between those of
    `AGREEMENT_STEPS` steps, with the parameters that the training starts from and with those at its
    end. It is 1 without gradient noise and 0 where noise is all there is."""
    net, state = trained.net, trained.state
    size = key.batch_size or key.how.step
    train = stack(split.train for split in trained.splits)
    seeds, used = len(trained.splits), AGREEMENT_STEPS * key.how.step

    def cut(t: jax.Array) -> jax.Array:
        shape = (seeds, AGREEMENT_STEPS, key.how.step // size, size)
        return t[:, :used].reshape(*shape, *t.shape[2:])

    batches = jax.tree.map(cut, train)
    shape = train.pixels.shape[2:]
    first = initialize(net, optax.identity(), key.how.step // size, shape, range(seeds))
    agree, _ = compiled(jax.vmap(partial(_agreement, net)), _untrained(state), batches)
    return {
        "start": np.asarray(agree(_untrained(first), batches)).tolist(),
        "end": np.asarray(agree(_untrained(state), batches)).tolist(),
    }


AGREEMENT_STEPS = 8

MEASURES: Mapping[str, Callable[[Trained, Key], Values]] = MappingProxyType(
    {
        "recalibrated": recalibrated,
        "weighed": weighed,
        "shifted": shifted,
        "domains": domains,
        "gradient_agreement": gradient_agreement,
    }
)


def _untrained(state: State) -> State:
    """Without what only an update needs."""
    return state._replace(optimizer=None, key=None)


def _agreement(net: ResidualNet, state: State, batches: Images) -> jax.Array:
    """Of one seed: `batches` has the axes steps, devices and images."""
    gradient = jax.grad(mean_loss, has_aux=True)

    def flat(batch: Images) -> jax.Array:
        found, _ = gradient(state.params, {}, state.on_devices, batch, net, jnp.array(1.0))
        return ravel_pytree(found)[0]

    vectors = jax.lax.map(flat, batches)
    length = jnp.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / jnp.where(length > 0, length, 1)
    return cosines(unit)


def cosines(unit: jax.Array) -> jax.Array:
    """The mean cosine between two of these vectors of length 1, (number, size)."""
    count = len(unit)
    return (jnp.sum(unit.sum(axis=0) ** 2) - jnp.sum(unit**2)) / (count * (count - 1))


def _errors(hits: jax.Array) -> list[float]:
    return [100 - value for value in percent(hits)]


def _of_seed(state: State, seed: int) -> State:
    return jax.tree.map(lambda t: t[seed], state)


def _shifted(images: Images, name: str) -> Images:
    return images._replace(pixels=np.ascontiguousarray(SHIFTS[name](images.pixels)))


def _of_domains(net: ResidualNet) -> ResidualNet:
    """Batch norm whose devices had a domain each, as the method that knows all domains: its state
    is theirs."""
    method = methods.domain_batch_norm(len(DOMAINS))
    layers: tuple[Layer, ...] = tuple(layer._replace(method=method) for layer in net.layers)
    return net.clone(layers=layers)


def _each_seed(hits: Callable[..., jax.Array], net: ResidualNet) -> Callable[..., jax.Array]:
    """For all seeds, one after the other, for they may need much memory."""

    def each(state: State, images: Images, domain: jax.Array) -> jax.Array:
        return jax.lax.map(lambda one: hits(net, *one, domain), (state, images))

    return each


def _shared(net: ResidualNet, state: State, images: Images, domain: jax.Array) -> jax.Array:
    return correct(net, state, images)


def _of_domain(net: ResidualNet, state: State, images: Images, domain: jax.Array) -> jax.Array:
    variables = {"params": state.params, **state.on_devices}

    def some(images: Images) -> jax.Array:
        logits: Any = net.apply(variables, images.pixels, train=False, domain=domain)
        return logits.argmax(axis=-1) == images.labels

    return in_chunks(some, images)


def _by_ensemble(net: ResidualNet, state: State, images: Images, domain: jax.Array) -> jax.Array:
    variables = {"params": state.params, **state.on_devices}

    def some(images: Images) -> jax.Array:
        def forward(domain: jax.Array) -> tuple[jax.Array, Any]:
            logits, seen = net.apply(
                variables, images.pixels, train=False, domain=domain, mutable=["observations"]
            )
            return jax.nn.softmax(logits), seen["observations"]

        mean, _ = domain_ensemble(forward, len(DOMAINS))
        return mean.argmax(axis=-1) == images.labels

    return in_chunks(some, images)
