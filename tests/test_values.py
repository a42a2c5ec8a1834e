"""Methods are values: they print as they are typed, compare, hash and pickle by their fields, and
take numbers alone."""

import dataclasses
import pickle
from typing import Annotated
from xml.etree import ElementTree

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import NAMES, REGISTRY, SHAPE

import jaxnorm
from jaxnorm import EACH, Groups, Method, Row, Size, methods

METHODS = (
    *(entry.method for entry in REGISTRY),
    Row(Groups(batch=Size(4), spatial=(2, EACH), channel=1), mean=0, two_pass=True),
    Row((1, 1, 3, 8), momentum=None),
    methods.batch_norm(correction=1, ghost_update="sequential", example_weight=0.25),
    methods.batch_group_norm(4, momentum=None, debias=True),
    methods.batch_renorm(rmax=float("inf"), dmax=float("inf")),
    methods.memorized_batch_norm((0, 1e-30, 1), "blend"),
    methods.proxy_norm(methods.layer_norm(epsilon=1e-3), num_quantiles=50),
)
every = pytest.mark.parametrize("method", METHODS, ids=str)
NUMBERS = [
    pytest.param(entry.method, field.name, id=f"{entry}-{field.name}")
    for entry in {type(entry.method): entry for entry in REGISTRY}.values()
    for field in dataclasses.fields(entry.method)
    if isinstance(getattr(entry.method, field.name), int | float)
]


def test_each_kind_of_method_is_here():
    kinds = {name for name, t in vars(methods).items() if isinstance(t, type)} - {"Method"}
    assert {type(method).__name__ for method in METHODS} == kinds
    assert kinds <= {*NAMES, "Row"}


@every
def test_its_repr_can_be_typed(method):
    twin = eval(repr(method), vars(jaxnorm) | vars(methods))
    assert type(twin) is type(method) and twin == method and repr(twin) == repr(method)


def test_its_repr_is_short():
    for method, words in (
        (methods.batch_renorm(), "batch_renorm()"),
        (methods.batch_renorm(2, epsilon=1e-3), "batch_renorm(rmax=2, epsilon=0.001)"),
        (methods.batch_renorm(dmax=float("inf")), "batch_renorm(dmax=float('inf'))"),
        (methods.domain_batch_norm(3), "domain_batch_norm(3)"),
        (methods.group_norm(4), "Row(Groups(batch=EACH, spatial=1, channel=4))"),
        (
            methods.proxy_norm(methods.group_norm(4, epsilon=0.0)),
            "proxy_norm(Row(Groups(batch=EACH, spatial=1, channel=4), epsilon=0.0))",
        ),
    ):
        assert repr(method) == words


@every
def test_equal_fields_are_an_equal_method(method):
    twin = dataclasses.replace(method)
    assert twin is not method and twin == method and hash(twin) == hash(method)
    assert pickle.loads(pickle.dumps(method)) == method
    other = dataclasses.replace(method, epsilon=0.125)
    assert other != method and other.epsilon == 0.125 and len({method, twin, other}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.epsilon = 0.0


def test_methods_differ_from_one_another():
    assert len(set(METHODS)) == len({repr(method) for method in METHODS})


def test_equal_methods_are_compiled_once():
    @chex.assert_max_traces(n=1)
    def step(method, x):
        return method.apply(x, method.init(x.shape), train=True)

    run = jax.jit(step, static_argnums=0)
    for _ in range(2):
        run(methods.batch_renorm(rmax=1.5), jnp.ones((4, 2)))


@pytest.mark.parametrize("method, field", NUMBERS)
def test_an_array_is_given_to_apply(method, field):
    """Also one that is traced."""
    value = getattr(method, field)
    for array in (jnp.asarray(value), np.asarray(value)):
        with pytest.raises(TypeError, match=rf"\({field}=...\) is an array.*Give .* to apply"):
            dataclasses.replace(method, **{field: array})
    with pytest.raises(TypeError, match=rf"\({field}=...\) is an array.*Give .* to apply"):
        jax.jit(lambda t: dataclasses.replace(method, **{field: t}).epsilon)(value)


def test_an_array_in_a_tuple_is_refused():
    with pytest.raises(TypeError, match=r"\(memory_weights=...\) is an array.*Give .* to apply"):
        methods.memorized_batch_norm((0.5, jnp.ones(())))
    with pytest.raises(TypeError, match=r"\(memory_weights=...\) is an array of shape \(3,\)"):
        methods.memorized_batch_norm(np.ones(3))


def test_scalars_of_numpy_are_numbers():
    """They come out of arithmetic, and print as numbers."""
    method = methods.batch_renorm(np.float64(2.0), momentum=np.float32(0.5))
    assert method == methods.batch_renorm(2.0, momentum=0.5)
    assert repr(method) == "batch_renorm(rmax=2.0, momentum=0.5)"
    assert methods.domain_batch_norm(np.int64(3)) == methods.domain_batch_norm(3)
    weights = [np.float32(0.5), np.float32(0.25)]
    assert methods.memorized_batch_norm(weights) == methods.memorized_batch_norm((0.5, 0.25))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (np.nan, r"batch_renorm\(rmax=...\) is NaN"),
        (jnp.sin, r"batch_renorm\(rmax=...\) is .*functions and arrays are given to apply"),
        ({}, r"batch_renorm\(rmax=...\) is {}\. Expected a number"),
    ],
)
def test_what_is_no_number_is_refused(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        methods.batch_renorm(rmax=wrong)


@pytest.mark.parametrize("entry", REGISTRY, ids=str)
def test_unknown_options_are_refused_by_name(entry):
    """An epsilon belongs to the method, and is unknown to apply."""
    x = jnp.ones(SHAPE, jnp.float32)
    state = entry.init(SHAPE)
    for name in ("epsilon", "momentun"):
        with pytest.raises(TypeError, match=rf"got an unexpected option {name}\. Expected some of"):
            entry(x, state, **{name: 0.1})
        with pytest.raises(TypeError, match=rf"got an unexpected option {name}\. Expected some of"):
            entry(x, state, train=False, **{name: 0.1})


@pytest.mark.parametrize("entry", REGISTRY, ids=str)
def test_options_are_those_of_apply(entry):
    """What is learned can be given, and so can a momentum; every name is taken."""
    options = set(entry.method.options)
    assert {*entry.method.parameters(8)} <= options
    assert hasattr(entry.method, "momentum") == ("momentum" in options)
    assert not options & {"epsilon", "scale", "bias", "train", "weights"}


def test_an_option_takes_precedence_over_its_field():
    """None leaves it to the field."""
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (8, 4)), jnp.float32)
    method = methods.batch_renorm(rmax=1.1, dmax=0.1, momentum=0.5)
    state = method.init(x.shape)
    for given, fields in (
        ({"dmax": 0.2}, {"dmax": 0.2}),
        ({"rmax": 1.5, "momentum": 0.9}, {"rmax": 1.5, "momentum": 0.9}),
        ({"rmax": None, "momentum": None}, {}),
    ):
        other = dataclasses.replace(method, **fields)
        chex.assert_trees_all_equal(
            method.apply(x, state, train=True, **given), other.apply(x, state, train=True)
        )


@dataclasses.dataclass(frozen=True)
class Halved(Method):
    """A method of one's own, in arithmetic on x."""

    factor: float = 0.5

    def rule(self, x, state, *, train, factor, **options):
        return (x * jnp.asarray(factor, x.dtype)).astype(x.dtype), state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_method_of_ones_own_gets_an_array(dtype):
    """Also where a derivative is taken in half precision, for which rules of the library read x in
    another form."""
    x = jnp.arange(6, dtype=dtype).reshape(2, 3)
    step = jax.jit(jax.grad(lambda x: Halved().apply(x, {}, train=True)[0].sum()))
    np.testing.assert_array_equal(step(x), jnp.full((2, 3), 0.5, dtype))
    y, _ = Halved().apply(x, {}, train=True, factor=0.25)
    np.testing.assert_array_equal(y, 0.25 * x.astype("float32"))


@dataclasses.dataclass(frozen=True)
class Counted(Method):
    """One that remembers how many steps it took, and the sum of an option."""

    size: Annotated[float, "an annotation of its author's"] = 1.0

    def first_state(self, num_channels):
        return {"size": jnp.zeros(num_channels), "steps": jnp.zeros(())}

    def rule(self, x, state, *, train, size, **options):
        return x, {"size": state["size"] + size, "steps": state["steps"] + 1}


def test_the_state_of_a_method_of_ones_own_is_checked():
    """By names and shapes, before the rule sees it; annotations of others say nothing to us."""
    x, method = jnp.ones((2, 3)), Counted()
    _, state = method.apply(x, method.init(x.shape), train=True)
    assert jax.tree.map(jnp.shape, state) == {"size": (3,), "steps": ()}
    for wrong in ({}, {"size": jnp.zeros(3)}, method.init((2, 4)), {**state, "more": 0.0}):
        with pytest.raises(
            ValueError, match=r"Counted got .*a dict with size of shape \(3,\), steps of shape \(\)"
        ):
            method.apply(x, wrong, train=True)
    with pytest.raises(TypeError, match="Counted got a list. Expected its own state"):
        method.apply(x, [], train=True)


@pytest.mark.parametrize("train", (True, False))
def test_options_are_within_the_bounds_of_their_fields(train):
    """In training and in inference."""
    x = jnp.ones((4, 6))
    kernel = {"inputs": x, "kernel": jnp.eye(6)}
    for method, wrong, more in (
        (methods.batch_renorm(), {"rmax": 0.5}, {}),
        (methods.batch_renorm(), {"dmax": -1.0}, {}),
        (methods.momentum_batch_norm(), {"train_momentum": 1.5}, {}),
        (methods.moving_average_norm(), {"correct_from": -1}, {"tap": jnp.zeros(6)}),
        (methods.cross_iteration_norm(), {"rho": 2.0}, kernel),
        (methods.cross_iteration_norm(), {"window": -1}, kernel),
    ):
        name = next(iter(wrong))
        state = method.init(x.shape, **({"kernel_shape": (6, 6)} if more is kernel else {}))
        with pytest.raises(ValueError, match=f"{name} is .*; expected a number of at least"):
            method.apply(x, state, train=train, **wrong, **more)
        with pytest.raises(ValueError, match=f"{name} is .*; expected a"):
            dataclasses.replace(method, **wrong)


def test_flags_and_corrections_are_checked_when_a_method_is_made():
    for make in (
        lambda: methods.filter_response_norm(use_threshold="False"),
        lambda: methods.group_norm_plus(4, per_position="no"),
        lambda: methods.switchable_norm(use_batch=3),
        lambda: Row(Groups(1, 1, EACH), two_pass="no"),
        lambda: methods.batch_renorm(momentum=None),
        lambda: methods.memorized_batch_norm(None),
    ):
        with pytest.raises((TypeError, ValueError), match="expected|Expected"):
            make()
    for make in (methods.group_norm_plus, methods.batch_group_norm):
        with pytest.raises(ValueError, match="correction is -1"):
            make(4, correction=-1)


def test_what_makes_no_sense_is_refused():
    """A momentum where nothing is averaged, options of init by another name, an array as shape."""
    x = jnp.ones((4, 2, 6))
    for method in (
        methods.layer_norm(),
        methods.batch_norm(momentum=None),
        methods.switchable_norm(use_batch=False),
        methods.batch_group_norm(4, None),
    ):
        with pytest.raises(ValueError, match="momentum=0.3 was given, and there is no state"):
            method.apply(x, {}, train=True, momentum=0.3)
    with pytest.raises(TypeError, match="init got an unexpected option channel_axes"):
        methods.batch_renorm().init(x.shape, channel_axes=1)
    with pytest.raises(TypeError, match="Got an array; expected x.shape"):
        methods.batch_renorm().init(x)
    with pytest.raises(ValueError, match="both axis 0 of x"):
        methods.batch_renorm().apply(jnp.ones(3), methods.batch_renorm().init((3,)), train=False)
    with pytest.raises(TypeError, match="example_weight is 'bogus'"):
        method = methods.ghost_batch_norm(ghost_size=2)
        method.apply(x, method.init(x.shape), train=False, example_weight="bogus")
    with pytest.raises(TypeError, match="a row of the table or the statistic's shape"):
        jaxnorm.norm(x, methods.batch_renorm)


def test_a_count_stands_in_the_state_of_debiased_averages_alone():
    x = jnp.ones((4, 2, 6))
    for one, other in ((True, False), (False, True)):
        method, of_other = (methods.batch_norm(debias=t) for t in (one, other))
        with pytest.raises(ValueError, match="Row got a state with"):
            method.apply(x, of_other.init(x.shape), train=True)


@pytest.mark.parametrize(
    "row, sets",
    [
        (methods.batch_norm(), 6),
        (methods.layer_norm(), 4),
        (methods.instance_norm(), 24),
        (methods.token_layer_norm(), 16),
        (methods.batch_and_group_norm(2, 3), 6),
        (methods.batch_group_norm(32), 2),
        (Row(Groups(batch=EACH, spatial=(), channel=1)), 4),  # for x without positions
        (Row(Groups(batch=Size(16), spatial=(2, 1), channel=EACH)), 24),
    ],
    ids=str,
)
def test_a_picture_of_the_sets(row, sets):
    """A rectangle for each of 4 x 4 x 6 elements, apart and inside the frame; as many sets as are
    said, of which neighbours differ in colour."""
    html = row._repr_html_()
    root = ElementTree.fromstring(f"<p>{html.replace('<br>', '')}</p>")
    svg = root.find("svg")
    places = {(float(r.get("x")), float(r.get("y"))): r.get("fill") for r in svg}
    assert len(places) == len(svg) == 4 * 4 * 6
    assert max(x for x, _ in places) + 11 <= float(svg.get("width"))
    assert max(y for _, y in places) + 11 <= float(svg.get("height"))
    for of_axis in zip(*places, strict=True):
        assert min(np.diff(sorted(set(of_axis)))) >= 11  # no element lies on another
    assert f"; {sets} sets here" in html and root.find("code").text.startswith("Groups(")
    assert len(set(places.values())) == min(sets, 6)
