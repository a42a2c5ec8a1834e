"""The pages of the repository tell the truth: their examples run, their links lead somewhere, and
the table of methods has every layer."""

import importlib
import pathlib
import re

import jax
import pytest

import jaxnorm.linen
import jaxnorm.nnx

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (
    README,
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
)


def each_page(pages=PAGES):
    names = [str(page.relative_to(ROOT)) for page in pages]
    return pytest.mark.parametrize("page", pages, ids=names)


def examples(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


def run(code, name, namespace):
    """With JAX's default promotions, which users have."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, name, "exec"), namespace)


@pytest.mark.parametrize("code", examples(README), ids=range(len(examples(README))))
def test_each_example_of_the_readme_runs_alone(code):
    run(code, README.name, {})


@each_page([page for page in PAGES if page != README and examples(page)])
def test_examples_of_a_page_run_from_top_to_bottom(page):
    namespace = {}
    for code in examples(page):
        run(code, page.name, namespace)


def test_there_are_examples():
    assert len(examples(README)) >= 2
    assert sum(bool(examples(page)) for page in PAGES) >= 4


def anchors(page):
    """As GitHub makes them of the headings."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    """Those to files of this repository: file and anchor."""
    found = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text())
    return [(page.parent / path if path else page, anchor) for path, anchor in found]


@each_page()
def test_links_lead_somewhere(page):
    assert [str(path) for path, _ in links(page) if not path.exists()] == []
    assert [
        (str(path), anchor)
        for path, anchor in links(page)
        if anchor and anchor not in anchors(path)
    ] == []


def test_the_readme_links_to_every_page():
    linked = {path.resolve() for path, _ in links(README)}
    assert {page for page in PAGES if page != README} <= linked


@each_page()
def test_lines_have_at_most_100_characters(page):
    """Except for tables, pictures and long commands, which cannot be broken."""
    prose = re.sub(r"```bash\n.*?```", "", page.read_text(), flags=re.S)
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "!["))]
    assert [line for line in lines if len(line) > 100] == []


# names of the table of methods that are not a function or a layer, or not of both frameworks alike
NOT_LAYERS = {"example_weight="}


def methods():
    table = (ROOT / "docs" / "methods.md").read_text().split("\n## ")[0]
    rows = [
        line.strip("|").split("|")
        for line in table.splitlines()
        if line.startswith("| ") and "---" not in line
    ]
    return {
        row[0].strip(): [re.findall(r"`([\w.=]+)`", cell) for cell in row[1:3]] for row in rows[1:]
    }


@pytest.mark.parametrize("name", methods())
def test_methods_exist_by_the_names_of_the_table(name):
    functions, layers = methods()[name]
    module = None
    for function in functions:
        *path, last = function.split(".")
        module = importlib.import_module(".".join(["jaxnorm", *path])) if path else module
        assert callable(getattr(module, last)), function
    for layer in set(layers) - NOT_LAYERS:
        *path, last = layer.split(".")
        for framework in path or ("linen", "nnx"):
            assert callable(getattr(getattr(jaxnorm, framework), last)), layer


def test_every_layer_is_in_the_table():
    listed = {layer for _, layers in methods().values() for layer in layers}
    for framework in (jaxnorm.linen, jaxnorm.nnx):
        ours = {
            name
            for name, value in vars(framework).items()
            if isinstance(value, type) and "Norm" in name
        }
        assert ours - {"Norm", "FoldedNorm"} <= listed, framework.__name__
