"""The program `benchmarks.tasks`: each task on cases with a known answer, its cells, its report."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import jit

from benchmarks import plan, residual, training
from benchmarks.cells import Cell, How, Key, Map, Settings
from benchmarks.datasets import Images, load
from benchmarks.norms import METHODS
from benchmarks.serving import Serving
from benchmarks.tasks import TASKS, __main__, adaptation, adversarial, few_shot, search
from benchmarks.tasks import plan as task_plan
from benchmarks.tasks.adversarial import Attack, pgd
from benchmarks.tasks.plan import ALL, FIRST, plans
from benchmarks.tasks.report import markdown
from benchmarks.training import State
from jaxnorm import methods
from jaxnorm.linen import Norm

SHAPES = {"digits": (8, 8, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3)}

WIDTH = 8


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """optax's schedules compare integer steps with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def small(monkeypatch):
    """A network of one stage."""
    for module in (residual, plan):
        monkeypatch.setattr(module, "WIDTHS", (WIDTH,))
        monkeypatch.setattr(module, "STRIDES", {8: {"2x2": (4,)}})


def layers(method, images=4):
    return (METHODS[method].at(images, WIDTH),)


def state_of(net, devices=1):
    optimizer = training.make_optimizer(0.1, 8, 2)
    state = training.initialize(net, optimizer, devices, (8, 8, 1), [0])
    return optimizer, jax.tree.map(lambda t: t[0], state)


class Linear(nn.Module):
    """Logits of two classes, 0 and what a dense layer says."""

    @nn.compact
    def __call__(self, x, *, train):
        logit = nn.Dense(1, name="dense")(x.reshape(len(x), -1))
        return jnp.concatenate([jnp.zeros_like(logit), logit], axis=-1)


def linear(seed=0):
    """Its kernel, (4,), its parameters, images (6, 2, 2, 1) and their labels."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=4).astype(np.float32)
    params = {"dense": {"kernel": jnp.array(w[:, None]), "bias": jnp.zeros(1)}}
    x = rng.uniform(-1, 1, (6, 2, 2, 1)).astype(np.float32)
    return w, params, x, np.array([0, 1, 1, 0, 1, 0])


def worst(w, x, labels, epsilon):
    """The image in the box, and in the range of pixels, whose loss is largest."""
    away = np.where(labels == 1, -1, 1).reshape(-1, 1, 1, 1)
    return np.clip(x + epsilon * away * np.sign(w).reshape(2, 2, 1), -1, 1)


def test_the_attack_finds_the_worst_image_of_a_linear_network():
    w, params, x, labels = linear()

    def loss(pixels):
        logits = Linear().apply({"params": params}, pixels, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array(labels)).sum()

    attack = Attack(0.3, 0.25, 8)  # from one side of the box to the other
    found = pgd(jax.grad(loss), jnp.array(x), jax.random.key(0), attack)
    np.testing.assert_allclose(found, worst(w, x, labels, 0.3), atol=1e-6)


@pytest.mark.parametrize("steps", (0, 1, 7))
def test_an_attack_stays_in_its_box_and_in_the_range_of_pixels(steps):
    x = jnp.array(np.random.default_rng(1).uniform(-1, 1, (50, 2, 2, 1)), jnp.float32)
    attack = partial(pgd, lambda x: jnp.cos(40 * x), attack=Attack(0.2, 0.7, steps))
    found, other = attack(x, jax.random.key(0)), attack(x, jax.random.key(1))
    assert abs(found - x).max() <= 0.2 + 1e-6 and abs(found).max() <= 1
    assert abs(found - x).max() > 0.15 and (found != other).any()  # a random start
    assert (pgd(jnp.cos, x, jax.random.key(0), Attack(0.0, 0.7, steps)) == x).all()


def test_what_withstands_an_attack_on_a_linear_network():
    """Images whose logit is further from 0 than epsilon |w|_1, less what the range cuts off."""
    w, params, x, labels = linear()
    state = State(params, {}, (), jnp.array(0))
    for epsilon in (0.0, 0.1, 0.3):
        logit = (worst(w, x, labels, epsilon).reshape(6, 4) * w).sum(axis=1)
        found = adversarial.withstood(Linear(), state, Images(x, labels), jnp.float32(epsilon))
        np.testing.assert_array_equal(found, (logit > 0) == (labels == 1))


def test_adversarial_training_descends_at_the_attacked_images(monkeypatch):
    """Its gradient is that of the loss there, as if the images were fixed."""
    w, params, x, labels = linear()
    monkeypatch.setattr(adversarial, "TRAINING", Attack(0.3, 0.5, 4))
    batch = Images(jnp.array(x[None]), labels[None])
    objective = partial(adversarial.objective, Linear(), on_devices={}, batch=batch)
    gradient, _ = jax.grad(lambda p: objective(p, key=jax.random.key(0)), has_aux=True)(params)

    def at_the_worst(params):
        logits = Linear().apply({"params": params}, worst(w, x, labels, 0.3), train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array(labels)).mean()

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5), gradient, jax.grad(at_the_worst)(params)
    )


def test_classes_to_train_on_are_not_those_to_test_on():
    seen = set()
    for seed in range(5):
        train, test = few_shot.classes(10, seed)
        assert len(train) == len(test) == 5 and sorted([*train, *test]) == list(range(10))
        labels = np.arange(40, dtype=np.int32) % 10
        kept = few_shot.of_classes(Images(labels, labels), train)
        assert set(kept.labels.tolist()) == set(train.tolist()) and len(kept.labels) == 20
        seen.add(tuple(train))
    assert len(seen) > 1


def test_an_episode_has_other_images_of_each_of_its_classes():
    labels = np.repeat([3, 5, 6, 8, 9], [9, 6, 7, 6, 8])
    found = few_shot.episodes(labels, 4, 6, 50, np.random.default_rng(0))
    assert found.shape == (50, 6, 4)
    for one in found:
        assert len(np.unique(one)) == one.size
        of = labels[one]
        assert (of == of[0]).all() and len(set(of[0].tolist())) == 4
    assert len({tuple(sorted(labels[one][0])) for one in found}) == 5  # all choices of 4 of 5
    for ways, images in ((6, 2), (4, 7)):
        with pytest.raises(ValueError, match=f"at least {ways} with {images} each"):
            few_shot.episodes(labels, ways, images, 1, np.random.default_rng(0))


class Scaled(nn.Module):
    """Pixels, normalized by batch norm."""

    @nn.compact
    def __call__(self, x, *, train):
        x = x.reshape(len(x), -1)
        return Norm(methods.batch_norm(momentum=0.5))(x, use_running_average=not train)


def test_prototypes_of_separable_classes_and_the_statistics_of_episodes():
    """Classes that are points apart are told apart by both statistics. Where a running variance
    drowns the only coordinate that tells classes apart, those of the episode still do."""
    rng = np.random.default_rng(0)
    shape = (3, few_shot.SUPPORT + few_shot.QUERIES, few_shot.WAYS, 1, 2, 1)
    pixels = 1e-4 * rng.normal(size=shape).astype(np.float32)
    pixels[..., 0, 0, 0] += 10 * np.arange(few_shot.WAYS, dtype=np.float32)
    net: nn.Module = Scaled()
    variables = net.init(jax.random.key(0), jnp.zeros((1, 1, 2, 1)), train=False)
    stats = jax.tree.map(lambda t: t[None], variables["batch_stats"])
    state = State(variables["params"], {"batch_stats": stats}, (), jnp.array(0))
    assert set(map(float, few_shot.errors(net, state, pixels).values())) == {0.0}
    bad = jax.tree.map(jnp.copy, stats)
    bad["Norm_0"]["var"] = jnp.array([[1e14, 1e-6]])
    found = few_shot.errors(net, state._replace(on_devices={"batch_stats": bad}), pixels)
    for shots in few_shot.SHOTS:
        assert found[few_shot.name("episode", shots)] == 0
        assert found[few_shot.name("running", shots)] > 20


def test_the_loss_of_an_episode_is_that_of_its_queries():
    """Features are pixels: the loss in closed form, whatever device an image stands on."""
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(4, 8, 1, 2, 1)).astype(np.float32)

    class Flat(nn.Module):
        def __call__(self, x, *, train):
            return x.reshape(len(x), -1)

    loss, _ = few_shot.objective(Flat(), {}, {}, jnp.array(pixels), jax.random.key(0))
    x = pixels.reshape(8, 4, 2).astype(np.float64)
    distance = ((x[4:, :, None] - x[:4].mean(axis=0)) ** 2).sum(axis=-1)  # (queries, of, to)
    log_p = -distance - np.log(np.exp(-distance).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(loss, -np.mean([log_p[:, k, k] for k in range(4)]), rtol=1e-5)


def test_features_get_the_gradient_of_the_domains_reversed(small):
    net = adaptation.AdaptationNet(layers("group"), (4,), 10)
    _, state = state_of(net)
    key = jax.random.key(1)
    source = Images(jax.random.normal(key, (1, 4, 8, 8, 1)), jnp.arange(4)[None])
    target = jax.random.normal(jax.random.key(2), (1, 4, 8, 8, 1))

    @jit
    def gradient(weight):
        batch = source, target, weight
        return jax.grad(
            lambda params: adaptation.objective(net, params, {}, batch, key), has_aux=True
        )(state.params)[0]

    # With weight -1 nothing is reversed: the plain gradient of the sum of both losses.
    plain, none, half = (gradient(jnp.float32(weight)) for weight in (-1.0, 0.0, 0.5))
    for name in ("classes", "hidden", "target"):
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), half[name], plain[name]
        )
    of_domains = jax.tree.map(jnp.subtract, plain["features"], none["features"])
    added = jax.tree.map(jnp.subtract, half["features"], none["features"])
    assert max(abs(t).max() for t in jax.tree.leaves(of_domains)) > 1e-3
    jax.tree.map(
        lambda a, d: np.testing.assert_allclose(a, -0.5 * d, rtol=1e-3, atol=1e-5),
        added,
        of_domains,
    )


def test_domains_have_no_image_in_common():
    one = adaptation.domains("digits", load("digits"), Settings(1024, 512, 1), 0)
    assert one.unlabelled.shape == (1024, 8, 8, 1) and one.test.pixels.shape == (512, 8, 8, 1)
    seen = {image.tobytes() for image in one.unlabelled}
    assert not seen & {image.tobytes() for image in one.test.pixels}
    other = adaptation.domains("fashion_mnist", load("digits"), Settings(1024, 64, 1), 0)
    assert len(other.source.train.labels) == len(other.unlabelled) == 512
    assert other.test.pixels.shape == (64, 8, 8, 1)
    assert (other.test.labels == other.source.test.labels).all()
    assert not (other.test.pixels == other.source.test.pixels).all()


def test_what_alphas_derive():
    """Edges are 0 to 1, 0 and 1 to 2, 0, 1 and 2 to 3; operations none, skip, pool, two
    convolutions."""
    alphas = np.zeros(search.MIX, np.float32)
    alphas[0] = (9, 0, 1, 0, 0)  # none is left out, though it is strongest
    alphas[1] = (0, 2, 0, 0, 0)
    alphas[2] = (0, 0, 0, 3, 0)
    alphas[3] = (0, 1, 0, 0, 0)
    alphas[4] = (5, 0, 0, 0, 5)  # strong beside none, which takes half of the weight
    alphas[5] = (5, 0, 0, 4, 0)  # weaker than the others, because of none
    mix = np.asarray(jax.nn.softmax(search.derive(alphas), axis=-1))
    assert set(mix.ravel().tolist()) == {0.0, 1.0}
    assert mix.argmax(axis=-1).tolist() == [2, 1, 3, 1, 4, 0]


def cell_of(method="group"):
    net = search.SearchNet(layers(method), (4,), 10)
    optimizer, state = state_of(net)
    return net, optimizer, state


def test_a_mix_of_one_operation_is_that_operation(small):
    """A cell of skip connections gives its input, 2 times and 4 times it: each node is the sum of
    all before."""
    cell = search.Cell(layers("group")[0])
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, WIDTH))
    uniform = jnp.full(search.MIX, 0.2)
    variables = jit(partial(cell.init, train=False))(jax.random.key(1), x, uniform)
    apply = jit(partial(cell.apply, train=False))
    skips = jnp.zeros(search.MIX).at[:, search.OPERATIONS.index("skip")].set(1)
    found = apply(variables, x, skips)
    np.testing.assert_allclose(found, jnp.concatenate([x, 2 * x, 4 * x], axis=-1), rtol=1e-6)
    none = jnp.zeros(search.MIX).at[:, 0].set(1)
    assert (apply(variables, x, none) == 0).all()
    first = none.at[0].set(jnp.eye(5)[search.OPERATIONS.index("pool")])
    found = apply(variables, x, first)[..., :WIDTH]
    pooled = np.zeros(x.shape)
    for i, j in np.ndindex(4, 4):  # of the pixels that are there
        pooled[:, i, j] = x[:, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].mean(axis=(1, 2))
    groups = pooled.reshape(2, 16, 4, -1)
    mean, std = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.std))
    normalized = ((groups - mean) / std).reshape(x.shape)
    np.testing.assert_allclose(found, normalized, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_alphas_and_weights_take_turns(small):
    net, optimizer, state = cell_of()
    alphas = search.Alphas(
        jnp.zeros(search.MIX), search.ALPHA_OPTIMIZER.init(jnp.zeros(search.MIX))
    )
    images = Images(
        jax.random.normal(jax.random.key(0), (1, 1, 4, 8, 8, 1)), jnp.zeros((1, 1, 4), int)
    )
    # at the first step of a warm-up the rate is 0
    state = state._replace(optimizer=jax.tree.map(lambda t: t + 1, state.optimizer))
    step = jit(search.train_epoch(net, optimizer))

    def moved(turn):
        (new, chosen), _ = step((state, alphas), (images, jnp.array([turn])))
        unlike = [(a != b).any() for a, b in zip(*map(jax.tree.leaves, (new, state)), strict=True)]
        return any(unlike), bool((chosen.values != alphas.values).any())

    assert moved(True) == (False, True) and moved(False) == (True, False)


def test_steps_of_the_search_are_in_turn_of_two_halves():
    train = Images(np.zeros((130, 8, 8, 1), np.float32), np.arange(130))
    for index in (0, 1):
        found = search._alternating(train, 0, index).labels.reshape(4, 32)
        assert [set((step % 2).tolist()) for step in found] == [{0}, {1}, {0}, {1}]
        assert len(set(found.ravel().tolist())) == 128


def test_all_that_is_planned():
    for quick, names in ((True, FIRST), (False, ALL)):
        planned = plans(TASKS.values(), SHAPES, quick=quick)
        assert len({one.key for one in planned}) == len(planned) == 3 * 4 * len(names)
        assert all(one.measures == (one.key.how.task,) and one.seconds > 0 for one in planned)
        assert {one.key.how.task for one in planned} == set(TASKS)
    assert {one.key for one in plans(TASKS.values(), SHAPES, quick=True)} < {
        one.key for one in planned
    }


def made(task, method, size, errors, more):
    key = Key("digits", "2x2", method, size, How(task=task.name))
    serving = Serving([100 - error for error in errors])
    return Cell(key, Settings(8, None, 1), "", 1, serving, 1.0, 1.0, 1.0, {task.name: more})


@pytest.mark.parametrize(
    "ours, verdict", ((5.0, "seen"), (25.0, "mixed"), (55.0, "not seen")), ids=str
)
def test_the_verdict_on_known_errors(ours, verdict):
    """Of batch group norm against two others, whose errors are 20 and 50."""
    task = TASKS["adversarial"]
    result = Map({"jax": "1"}, {"device": "cpu"})
    for method, size, error in (
        ("batch_group", 2, ours),
        ("batch", 2, 50.0),
        ("group", None, 20.0),
    ):
        spread = [error - 0.1, error, error + 0.1, error + 0.05 * (size or 0)]
        result.add(made(task, method, size, [1.0] * 4, {"half": spread, "attacked": spread}))
    text = markdown(result)
    assert f"| Adversarial training | Handwritten digits | 2 | {verdict} |" in text
    assert f"does better: **{verdict}**" in text
    assert f"| GroupNorm(4) | attacked | {ours - 20:+.1f} ±" in text


def run_of(monkeypatch, tmp_path, tasks):
    """A run of the smallest cells of these tasks."""
    monkeypatch.setattr(task_plan, "FIRST", (("batch_group", 2),))
    monkeypatch.setattr(few_shot, "TEST_EPISODES", 5)
    monkeypatch.setattr(adversarial, "TEST", adversarial.TEST._replace(steps=2))
    for name, task in TASKS.items():
        quick = {8: Settings(256, 128, 2)}
        monkeypatch.setitem(TASKS, name, task._replace(quick=quick))
    run = ["--quick", "--seeds", "3", "--output", str(tmp_path), "--task", *tasks]
    assert __main__.main([*run, "--plan"]) == 0 and not list(tmp_path.iterdir())
    assert __main__.main(run) == 0
    result = Map.load(tmp_path)
    assert len(result.cells) == len(tasks)
    for key, cell in result.cells.items():
        task = TASKS[key.how.task]
        for value in task.values:
            found = cell.errors if value.name == "error" else cell.more[task.name][value.name]
            assert len(found) == 3 and all(0 <= one <= 100 for one in found), (key, value)
    text = (tmp_path / "tasks.md").read_text()
    assert all(f"## {TASKS[name].title}: Handwritten digits" in text for name in tasks)
    return run, result


def test_the_whole_program(small, monkeypatch, tmp_path, capsys):
    run, _ = run_of(monkeypatch, tmp_path, ["few_shot"])
    before = (tmp_path / "cells.json").read_bytes()
    capsys.readouterr()
    assert __main__.main([*run, "--resume"]) == 0
    assert "0 of 1 cells to measure" in capsys.readouterr().out
    assert (tmp_path / "cells.json").read_bytes() == before
    with pytest.raises(SystemExit):
        __main__.main(run)  # without --resume
    with pytest.raises(SystemExit):
        __main__.main(["--task", "detection"])
    assert "invalid choice: 'detection'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    (
        pytest.param("adversarial", marks=pytest.mark.slow),
        pytest.param("adaptation", marks=pytest.mark.rest),
        pytest.param("search", marks=pytest.mark.rest),
    ),
)
def test_another_task(name, small, monkeypatch, tmp_path):
    _, result = run_of(monkeypatch, tmp_path, [name])
    (cell,) = result.cells.values()
    if name == "search":
        shares = [cell.more[name][operation] for operation in search.OPERATIONS[1:]]
        np.testing.assert_allclose(np.sum(shares, axis=0), 100)
