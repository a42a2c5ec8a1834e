"""The shape of the interface: options by keyword, documented names, and floors that import only
from below."""

import ast
import graphlib
import inspect
import pathlib
import re
import sys

import pytest
from rows import ROWS

import jaxnorm
from jaxnorm import methods

PACKAGE = pathlib.Path(jaxnorm.__file__).parent
PUBLIC = {
    name: value
    for name, value in vars(jaxnorm).items()
    if not name.startswith("_") and not inspect.ismodule(value)
}
METHODS = {
    name: f
    for name, f in vars(methods).items()
    if inspect.isfunction(f) and f.__module__ == methods.__name__ and name[0] != "_"
}
DOCUMENTED = {name: v for name, v in (PUBLIC | METHODS).items() if callable(v)}
FUNCTIONS = {name: v for name, v in DOCUMENTED.items() if inspect.isfunction(v)}
# what comes first, by position: arrays, moments, shapes, and the numbers that make up a method; all
# else is an option
BY_POSITION = {
    "x", "m", "parts", "weights", "groups", "state", "shape", "x_shape", "kernel", "num_ghosts",
    "num_groups", "batch_size", "num_channels", "num_devices",
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_keyword_only(name):
    positional = [
        p
        for p in inspect.signature(FUNCTIONS[name]).parameters.values()
        if p.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert {p.name for p in positional} <= BY_POSITION
    if name not in METHODS:
        assert all(p.default is inspect.Parameter.empty for p in positional)


def sections(name):
    return set(
        re.findall(
            r"^ *(Args|Returns|Raises|Example|Reference):$", inspect.getdoc(DOCUMENTED[name]), re.M
        )
    )


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstrings_are_complete(name):
    doc = inspect.getdoc(DOCUMENTED[name])
    assert re.match(r"[^\n]+[.:]\n\n", doc), "a one-line summary"
    expected = {"Returns", "Example"} if name in FUNCTIONS else set()
    if inspect.signature(DOCUMENTED[name]).parameters:
        expected |= {"Args"}
    if name in METHODS:
        expected |= {"Reference"}
    assert expected <= sections(name)
    if "Example" in sections(name):
        assert ">>> " in doc


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_argument_is_explained(name):
    args = re.search(r"^ *Args:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(DOCUMENTED[name]), re.M | re.S)
    parameters = inspect.signature(DOCUMENTED[name]).parameters
    assert [
        p for p in parameters if not re.search(rf"^ +\**{p}: ", args[1] if args else "", re.M)
    ] == []


@pytest.mark.parametrize("name", METHODS)
def test_references_have_a_year_and_an_arxiv_id(name):
    reference = inspect.getdoc(METHODS[name]).split("Reference:")[1]
    assert re.search(r"\b(19|20)\d\d,\s+arXiv:\d{4}\.\d{4,5}\b", reference)


def test_every_method_has_a_row():
    """A method without a label of its sets is not tested."""
    returning = {
        name
        for name, f in METHODS.items()
        if inspect.signature(f).return_annotation is methods.Method
    }
    assert returning == {row.method_name for row in ROWS}
    assert set(METHODS) - returning == {"batch_group_count"}
    for row in ROWS:
        assert f"{row.method_name}(" in inspect.getsource(row.call)


def imported(path):
    """Modules that a file imports, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


FILES = {module_of(path): imported(path) for path in sorted(PACKAGE.rglob("*.py"))}


def uses(module, other):
    return any(name == other or name.startswith(other + ".") for name in FILES[module])


CORE = (
    "checks", "axes", "blocks", "equations", "groups", "devices", "meshes", "arithmetic", "shared",
    "xla", "platforms", "mean_var", "moments", "pooling", "standardize", "normalize", "ghosts",
    "divisor", "state", "running", "averages", "sync",
)  # fmt: skip
FLOORS = (
    *(f"_core.{name}" for name in CORE),
    "_population", "methods", "_frame", "inference", "folding",
)  # fmt: skip


@pytest.mark.parametrize("floor", range(len(FLOORS)), ids=FLOORS)
def test_floors_import_only_from_below(floor):
    module = f"jaxnorm.{FLOORS[floor]}"
    ours = {name for name in FILES if name != "jaxnorm" and uses(module, name)}
    assert ours <= {"jaxnorm._core", *(f"jaxnorm.{below}" for below in FLOORS[:floor])}
    assert "jaxnorm" not in FILES[module]


def test_every_file_of_the_core_is_a_floor():
    assert {name for name in FILES if name.startswith("jaxnorm._core.")} == {
        f"jaxnorm._core.{name}" for name in CORE
    }


def test_there_is_an_order_to_read_the_files_in():
    graph = {module: (FILES[module] & set(FILES)) - {"jaxnorm"} for module in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises where imports form a cycle


def test_the_core_needs_only_jax():
    for module in FLOORS:
        others = {name.split(".")[0] for name in FILES[f"jaxnorm.{module}"]} - {
            "jax",
            "jaxnorm",
            "numpy",
        }
        assert others <= set(sys.stdlib_module_names), module


def test_nothing_imports_the_flax_modules():
    for module in FILES:
        for flavour, other in (("jaxnorm.linen", "jaxnorm.nnx"), ("jaxnorm.nnx", "jaxnorm.linen")):
            if not module.startswith(flavour):
                assert not uses(module, flavour), f"{module} imports {flavour}"
            else:
                assert not uses(module, other), f"{module} imports {other}"


def test_flax_is_imported_only_by_the_flax_modules():
    for module in FILES:
        if not module.startswith(("jaxnorm.linen", "jaxnorm.nnx")):
            assert module == "jaxnorm._flax_rules" or not uses(module, "flax"), module
            if module != "jaxnorm._layers":  # what linen and nnx share is theirs
                assert not uses(module, "jaxnorm._layers"), module
                assert not uses(module, "jaxnorm._flax_rules"), module


def test_the_map_names_everything():
    """The docstring of the package lists every public name."""
    assert [name for name in PUBLIC if not re.search(rf"\b{name}\b", jaxnorm.__doc__ or "")] == []


def test_the_package_holds_the_map_and_the_names_and_nothing_else():
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    assert all(isinstance(node, ast.ImportFrom | ast.Import) for node in body[1:])
    assert all(alias.asname == alias.name for node in body[1:] for alias in node.names)
