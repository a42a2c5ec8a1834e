"""Methods by name: every repr and every dict is read as the method it came from, and nothing is
evaluated on the way. What cannot be read is in the catalogue of tests/test_errors.py."""

import dataclasses
import json

import pytest
from registry import REGISTRY
from test_values import METHODS

from jaxnorm import EACH, Groups, Method, Row, Size, methods
from jaxnorm.methods import from_config, to_config

every = pytest.mark.parametrize("method", METHODS, ids=str)
GN = methods.group_norm(4)


def same(method, other):
    return type(method) is type(other) and method == other and repr(method) == repr(other)


@every
def test_its_repr_is_read(method):
    assert same(from_config(repr(method)), method)


@every
def test_its_dict_survives_json(method):
    """In strict JSON, which has no infinity."""
    text = json.dumps(to_config(method), allow_nan=False)
    assert same(from_config(json.loads(text)), method)


@pytest.mark.parametrize("entry", REGISTRY, ids=str)
def test_every_constructor_is_known_by_its_name(entry):
    """With its arguments by name: those that differ from their default."""
    if isinstance(entry.method, Row):
        assert isinstance(from_config(CONSTRUCTED[entry.constructor]), Row)
    else:
        fields = {f.name: getattr(entry.method, f.name) for f in dataclasses.fields(entry.method)}
        text = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        assert same(from_config(f"{entry.constructor}:{text}"), entry.method)


CONSTRUCTED = {
    "batch_norm": "batch_norm",
    "ghost_batch_norm": "ghost_batch_norm:2",
    "batch_and_group_norm": "batch_and_group_norm:ghost_size=2,num_groups=4",
    "instance_norm": "instance_norm:epsilon=1e-3",
    "group_norm": "group_norm:4",
    "layer_norm": "layer_norm",
    "token_layer_norm": "token_layer_norm()",
    "positional_norm": "positional_norm:",
    "rms_norm": "rms_norm",
    "instance_rms_norm": "instance_rms_norm",
}


@pytest.mark.parametrize(
    "config, method",
    [
        ("group_norm:4", GN),
        (" group_norm : 4 ", GN),
        ("group_norm(4)", GN),
        ("group_norm:num_groups=4", GN),
        ({"name": "group_norm", "num_groups": 4}, GN),
        (GN, GN),
        (GN.groups, GN),
        ("Groups(channel=4, spatial=1)", GN),
        ("ghost_batch_norm:ghost_size=16", methods.ghost_batch_norm(ghost_size=16)),
        ("batch_norm:momentum=None,debias=True", methods.batch_norm(momentum=None, debias=True)),
        ("batch_norm:example_weight='share'", methods.batch_norm(example_weight="share")),
        ("batch_renorm:inf,dmax=inf", methods.batch_renorm(float("inf"), float("inf"))),
        (
            {"name": "batch_renorm", "rmax": "inf", "epsilon": 0},
            methods.batch_renorm(float("inf"), epsilon=0),
        ),
        ("memorized_batch_norm:[0.5,0.5]", methods.memorized_batch_norm((0.5, 0.5))),
        ("proxy_norm:group_norm(4)", methods.proxy_norm(GN)),
        ("proxy_norm:layer_norm,num_quantiles=50", methods.proxy_norm(methods.layer_norm(), 50)),
        ({"name": "proxy_norm", "method": "group_norm:4"}, methods.proxy_norm(GN)),
        (
            {"name": "proxy_norm", "method": {"name": "group_norm", "num_groups": 4}},
            methods.proxy_norm(GN),
        ),
        (
            "Row:Groups(batch=Size(4),spatial=(2,EACH),channel=1),mean=0",
            Row(Groups(Size(4), (2, EACH), 1), mean=0),
        ),
        (
            {
                "name": "Row",
                "groups": {
                    "name": "Groups",
                    "batch": {"name": "Size", "n": 4},
                    "spatial": [2, "EACH"],
                    "channel": 1,
                },
            },
            Row(Groups(Size(4), (2, EACH), 1)),
        ),
    ],
    ids=str,
)
def test_several_ways_to_write_it(config, method):
    assert same(from_config(config), method)


def test_what_a_dict_looks_like():
    """To be read by people as well: defaults are left out, and EACH has its name."""
    assert to_config(methods.batch_renorm(dmax=float("inf"))) == {
        "name": "batch_renorm",
        "dmax": "inf",
    }
    sets = {"name": "Groups", "batch": "EACH", "spatial": 1, "channel": 4}
    assert to_config(GN) == to_config(GN.groups) == {"name": "Row", "groups": sets}


@dataclasses.dataclass(frozen=True)
class Floored(Method):
    """A method of one's own."""

    inner: Row
    floor: float = 1.0

    def rule(self, x, state, *, train, floor, **options):
        return x, state


def test_methods_of_ones_own():
    method = Floored(GN, 0.5)
    for config in (repr(method), to_config(method), "Floored:group_norm(4),floor=0.5"):
        assert same(from_config(config, also=[Floored]), method)
    with pytest.raises(ValueError, match="'Floored' is no method"):
        from_config(repr(method))


def test_nothing_is_evaluated(monkeypatch):
    """Neither names of Python nor arithmetic, attributes, comprehensions and f-strings."""
    monkeypatch.setattr("builtins.open", lambda *args: pytest.fail("was called"))
    for argument in (
        "open('x')", "__import__('os')", "1+1", "2**9", "(1).real", "[1][0]", "[t for t in (1,)]",
        "f'{1}'", "lambda: 1", "1 if 1 else 2", "not 1", "{1}", "{}", "...", "b'1'", "1j", "*(1,)",
        "+1", "float(1)", "float('nan')", "--1", "True and 1", "1 < 2", "(t := 1)",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="cannot be read"):
            from_config(f"group_norm:{argument}")
