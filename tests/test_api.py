"""The shape of the interface: options by keyword, documented names, and floors that import only
from below."""

import ast
import dataclasses
import graphlib
import inspect
import pathlib
import re
import sys
import types

import pytest
from flax import linen, nnx

import jaxnorm
import jaxnorm.drawing
import jaxnorm.linen
import jaxnorm.nnx
import jaxnorm.optim
from jaxnorm import methods
from jaxnorm.methods._method import options_of

PACKAGE = pathlib.Path(jaxnorm.__file__).parent


def public(module, own=False):
    """What a module shows: its names without those of modules, and, of its own, only what it
    defines."""
    return {
        name: value
        for name, value in vars(module).items()
        if name[0] != "_"
        and not inspect.ismodule(value)
        and (not own or getattr(value, "__module__", "").startswith(module.__name__))
    }


METHODS = public(methods)
RULES = {
    name: value
    for name, value in METHODS.items()
    if isinstance(value, type) and name not in ("Method", "Row")
}
LAYERS = {
    f"{library.__name__.split('.')[-1]}.{name}": value
    for library in (jaxnorm.linen, jaxnorm.nnx)
    for name, value in public(library).items()
}
MODULES = (
    "inference", "folding", "kernels", "schedules", "domains", "positional", "training", "optim",
    "drawing", "probe", "convert",
)  # fmt: skip
OF_MODULES = {
    f"{module}.{name}": value
    for module in MODULES
    for name, value in public(getattr(jaxnorm, module), own=True).items()
}
DOCUMENTED = {
    name: value
    for name, value in (public(jaxnorm) | METHODS | LAYERS | OF_MODULES).items()
    if callable(value)
}
FUNCTIONS = {name: value for name, value in DOCUMENTED.items() if inspect.isfunction(value)}
# what comes first, by position: arrays, moments, shapes, functions, and the numbers that make up a
# method; all else is an option
BY_POSITION = {
    "x", "y", "m", "parts", "weights", "groups", "state", "shape", "x_shape", "kernel",
    "num_ghosts", "num_groups", "batch_size", "num_channels", "num_devices", "running", "batch",
    "bias", "threshold", "scale", "shift", "step", "epoch", "distances", "forward", "num_domains",
    "evaluate", "batches", "loss", "update", "params", "weight_decay", "variables", "model",
    "sizes", "counts", "ax", "axis", "ticks", "name", "row", "epsilon",
    "key", "before", "after", "tree", "alter", "arrays", "names", "layer", "config", "method",
}  # fmt: skip
# of these no paper is known, or the text below says where they come from
WITHOUT_REFERENCE = {
    "Method", "Row", "measured", "applied", "from_config", "to_config", "linen.Norm", "nnx.Norm",
    "nnx.Tap", "nnx.Observation", "nnx.FoldedNorm",
    "inference.ExampleWeights", "convert.Layer", "linen.fold_norms", "optim.norm_mask",
    "optim.decay_mask",
}  # fmt: skip

# the notebooks run what needs matplotlib; variables and a remnant are used through others
WITHOUT_EXAMPLE = {
    "drawing.style", "drawing.draw_row", "drawing.draw_block", "drawing.draw_key",
    "drawing.label_lines", "drawing.plain_log",
    "nnx.Tap", "nnx.Observation", "nnx.FoldedNorm", "nnx.ReplacedNorm",
}  # fmt: skip


def parameters(name):
    """What the Args of a name explain: arguments, or the fields of a class."""
    value = DOCUMENTED[name]
    if isinstance(value, type) and issubclass(value, nnx.Pytree | nnx.Variable):
        own = value.__init__ if "__init__" in vars(value) else lambda self: None
        names = set(inspect.signature(own).parameters) - {"self"}
    else:
        names = set(inspect.signature(value).parameters)
    if isinstance(value, type) and issubclass(value, linen.Module):
        names -= {"parent", "name"}
    if re.search(r"^ +Others: as `flax\.", inspect.getdoc(value), re.M):
        mine = {name for c in value.__mro__ for name in vars(c) if c.__module__[:7] == "jaxnorm"}
        own = getattr(value, "__dataclass_fields__", None)
        names = names & mine if own else names - {"options"}
    return names


def section(name, title):
    """The text of one section of a docstring."""
    found = re.search(
        rf"^{title}:[^\n]*\n(.*?)(?=^\S|\Z)", inspect.getdoc(DOCUMENTED[name]), re.M | re.S
    )
    return found and inspect.cleandoc("\n" + found[1])


def entries(text):
    """The names that a section explains, `a: ...` or `a, b: ...`."""
    heads = re.findall(r"^(\**\w+(?:, \w+)*): ", text or "", re.M)
    return [name.strip("*") for head in heads for name in head.split(", ")]


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


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstrings_are_complete(name):
    doc = inspect.getdoc(DOCUMENTED[name])
    assert re.match(r"[^\n]+\.(\n\n|$)", doc), "a one-line summary"
    assert bool(section(name, "Args")) == bool(parameters(name))
    if name in FUNCTIONS and FUNCTIONS[name].__annotations__.get("return", None) is not None:
        assert section(name, "Returns")
    if (name in FUNCTIONS or name in RULES or name in LAYERS) and name not in WITHOUT_EXAMPLE:
        assert section(name, "Example"), "an example, which runs as a doctest"
    assert "Example" not in doc or ">>> " in doc


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_argument_is_explained(name):
    explained = entries(section(name, "Args"))
    assert len(explained) == len(set(explained))
    assert set(explained) - {"Others"} == parameters(name)


def test_every_docstring_begins_with_one_line():
    """Of the whole package, also what is private."""
    longer = [
        f"{path.relative_to(PACKAGE)}: {getattr(node, 'name', 'the module')}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and not re.match(r"[^\n]*\.(\n\n|$)", ast.get_docstring(node) or ".")
    ]
    assert longer == []


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_what_it_remembers_and_takes(name):
    """The section of `apply` has the options of the rule, and nothing else."""
    method, doc = RULES[name], inspect.getdoc(RULES[name])
    assert dataclasses.is_dataclass(method)
    assert re.search(r"^State: .", doc, re.M)
    explained = entries(section(name, r"Options of apply[^\n]*?"))
    assert len(explained) == len(set(explained))
    assert set(explained) == set(options_of(method.rule))


def test_a_row_says_what_it_remembers_and_takes():
    assert re.search(r"^State: .", inspect.getdoc(methods.Row), re.M)
    assert set(entries(section("Row", "Options of apply"))) == set(options_of(methods.Row.rule))


PAPERS = [
    name
    for name in DOCUMENTED
    if name in METHODS.keys() | LAYERS.keys() | OF_MODULES.keys()
    and name not in WITHOUT_REFERENCE
    and not name.startswith("drawing.")
]


@pytest.mark.parametrize("name", PAPERS)
def test_references_have_a_year_and_an_arxiv_id(name):
    """Or say where the paper is, or that there is none, or whose reference holds."""
    reference = " ".join((section(name, "Reference") or "").split())
    assert reference
    paper = r"\b(19|20)\d\d, (arXiv:\d{4}\.\d{4,5}\b|in the proceedings of ECCV)"
    others = "" if name in METHODS else "|no paper is followed|^See `"
    assert re.search(paper + others, reference)


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


PATHS = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FILES = {module: imported(path) for module, path in PATHS.items()}


def uses(module, other):
    return any(name == other or name.startswith(other + ".") for name in FILES[module])


CORE = (
    "checks", "axes", "blocks", "equations", "picture", "groups", "devices", "meshes", "arithmetic",
    "shared", "xla", "together", "platforms", "passes", "mean_var", "moments", "pooling",
    "standardize", "affine", "normalize", "denormalize", "ghosts", "divisor", "state", "running",
    "averages", "boundary", "sync",
)  # fmt: skip
ABOVE = (
    "_population", "inference", "kernels",
    "methods._fields", "methods._state", "methods._options", "methods._method", "methods._frame",
    "methods._row", "methods._table",
    "methods._renorm", "methods._momentum", "methods._memorized", "methods._switchable",
    "methods._domains", "methods._evonorm", "methods._filter_response", "methods._group_plus",
    "methods._proxy", "methods._moving_average", "methods._carried_over",
    "methods._cross_iteration", "methods._pieces", "methods._batch_group", "methods._config",
    "methods",
    "schedules", "training", "domains", "positional", "folding", "_pairs",
    "probe._trees", "probe._landscape", "probe._depth", "probe._noise", "probe._statistics",
    "probe._power", "probe._calls", "probe._table", "probe",
    "convert._arrays", "convert._debiased", "convert._registry", "convert._torch", "convert._haiku",
    "convert._equinox", "convert._keras", "convert._flax", "convert._sbx", "convert._libraries",
    "convert._model", "convert._settings", "convert",
)  # fmt: skip
OF_LAYERS = ("_flax_rules", "_layers", "_inspection", "_replacing")
FLOORS = (*(f"_core.{name}" for name in CORE), *ABOVE, *OF_LAYERS)


@pytest.mark.parametrize("floor", range(len(FLOORS)), ids=FLOORS)
def test_floors_import_only_from_below(floor):
    module = f"jaxnorm.{FLOORS[floor]}"
    ours = (FILES[module] & set(FILES)) - {"jaxnorm"}
    assert ours <= {"jaxnorm._core", *(f"jaxnorm.{below}" for below in FLOORS[:floor])}
    may_import_names = FLOORS[floor] in (*OF_LAYERS, "_core.boundary")
    assert may_import_names or "jaxnorm" not in FILES[module]


def test_every_file_is_a_floor():
    """Except for the map, the layers, and the tools that need more than JAX."""
    drawing = {"jaxnorm.drawing", "jaxnorm.drawing._style", "jaxnorm.drawing._blocks"}
    above = {"jaxnorm", "jaxnorm._core", "jaxnorm.optim", *drawing}
    layers = {name for name in FILES if name.startswith(("jaxnorm.linen", "jaxnorm.nnx"))}
    assert set(FILES) - above - layers == {f"jaxnorm.{name}" for name in FLOORS}


def test_linen_and_nnx_have_the_same_files():
    of_linen, of_nnx = (
        {path.name for path in (PACKAGE / library).glob("*.py")} for library in ("linen", "nnx")
    )
    assert of_linen - of_nnx == {"_inference.py"}  # for nnx there is Flax's nnx.view
    assert of_nnx <= of_linen


def test_there_is_an_order_to_read_the_files_in():
    graph = {module: (FILES[module] & set(FILES)) - {"jaxnorm"} for module in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises where imports form a cycle


def test_the_core_needs_only_jax():
    for module in FLOORS:
        if module in OF_LAYERS:
            continue
        others = {name.split(".")[0] for name in FILES[f"jaxnorm.{module}"]} - {
            "jax",
            "jaxnorm",
            "numpy",
        }
        assert others <= set(sys.stdlib_module_names), module


@pytest.mark.parametrize("name", CORE)
def test_no_file_of_the_core_names_a_method(name):
    """In code; messages and docstrings may, for example."""
    names = set()
    for node in ast.walk(ast.parse(PATHS[f"jaxnorm._core.{name}"].read_text())):
        names |= {getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname")}
    assert names.isdisjoint(METHODS)
    assert not uses(f"jaxnorm._core.{name}", "jaxnorm.methods")


@pytest.mark.parametrize("module", PATHS)
def test_files_have_at_most_300_lines(module):
    assert len(PATHS[module].read_text().splitlines()) <= 300


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
            if module.removeprefix("jaxnorm.") not in OF_LAYERS:  # what linen and nnx share
                assert not uses(module, "jaxnorm._layers"), module
                assert not uses(module, "jaxnorm._flax_rules"), module


NAMED = {
    **public(jaxnorm), **METHODS, **LAYERS,
    **{name: value for name, value in OF_MODULES.items() if callable(value)},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_the_map_names_everything(name):
    """The docstring of the package lists every public name."""
    assert re.search(rf"\b{name.split('.')[-1]}\b", jaxnorm.__doc__)


def test_the_map_names_every_module():
    modules = {n for n, v in vars(jaxnorm).items() if isinstance(v, types.ModuleType)}
    listed = {name for name in modules if name[0] != "_"}
    assert {name for name in listed if f"{name}." not in jaxnorm.__doc__} == set()


def test_the_package_holds_the_map_and_the_names_and_nothing_else():
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    assert all(isinstance(node, ast.ImportFrom | ast.Import) for node in body[1:])
    assert all(alias.asname == alias.name for node in body[1:] for alias in node.names)
