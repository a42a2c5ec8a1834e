"""The pages of the repository tell the truth: their examples run, their links lead somewhere, and
the tables of methods and tools have every name."""

import importlib
import inspect
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from registry import REGISTRY, SHAPE

from jaxnorm import linen, methods, nnx

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (
    README,
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "notebooks" / "README.md",
)


def each_page(pages=PAGES):
    names = [str(page.relative_to(ROOT)) for page in pages]
    return pytest.mark.parametrize("page", pages, ids=names)


def examples(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


def programs(page):
    return re.findall(r"```py\n(.*?)```", page.read_text(), re.S)


def run(code, name, namespace):
    """With JAX's default promotions, which users have."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, name, "exec"), namespace)


@pytest.mark.parametrize("code", examples(README), ids=range(len(examples(README))))
def test_each_example_of_the_readme_runs_alone(code):
    run(code, README.name, {})


@each_page([page for page in PAGES if page != README and examples(page)])
def test_examples_of_a_page_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    """After them what is marked py, each in a process of its own, with the files that they left."""
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for code in examples(page):
        run(code, page.name, namespace)
    for code in programs(page):
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ""},
        )


def test_there_are_examples():
    assert len(examples(README)) >= 2
    assert sum(bool(examples(page)) for page in PAGES) >= 4
    assert any(programs(page) for page in PAGES)


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


def table(heading):
    """The rows of a table of docs/methods.md by their first cell, of the table with this first
    column."""
    lines = (ROOT / "docs" / "methods.md").read_text().split(f"\n| {heading} |")[1].split("\n\n")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()[2:]
    ]
    return {row[0]: row[1:] for row in rows}


def arxiv(text):
    return re.findall(r"\d{4}\.\d{5}", text)


BY_NAME = {entry.constructor: entry for entry in reversed(REGISTRY)}


@pytest.mark.parametrize("name", table("method"))
def test_the_table_of_methods_is_true(name):
    """The linked file defines the method, which remembers what it says, and cites the paper."""
    value, remembers, batch, paper = table("method")[name]
    constructor, path = re.fullmatch(r"\[`methods\.(\w+)`\]\((\S+)\)", value).groups()
    function = getattr(methods, constructor)
    linked = (ROOT / "docs" / path).resolve()
    assert linked == pathlib.Path(inspect.getfile(function)).resolve()
    state = BY_NAME[constructor].init(SHAPE)
    assert (remembers == "–") == (state == {}) == (batch == "no / no")
    for words in re.findall(r"^(\w+(?:, \w+)*) \(", remembers):
        assert set(words.split(", ")) <= set(state)
    reference = inspect.getdoc(function).split("Reference:")[1]
    assert paper == "ECCV 2020" if arxiv(paper) == [] else arxiv(paper)[0] in reference


def test_every_method_is_in_the_table():
    listed = {re.search(r"`methods\.(\w+)`", row[0])[1] for row in table("method").values()}
    ours = {name for name, value in vars(methods).items() if name[0] != "_" and callable(value)}
    helpers = {"applied", "measured", "batch_group_count", "thresholded_linear_unit"}
    helpers |= {"from_config", "to_config"}
    assert ours - listed == {"Method", "Row", *helpers}
    assert listed <= ours


@pytest.mark.parametrize("name", table("tool"))
def test_tools_exist_by_the_names_of_the_table(name):
    function, layers, _ = table("tool")[name]
    for dotted in re.findall(r"`(\w+\.\w+)`", function + layers):
        module, last = dotted.split(".")
        assert callable(getattr(importlib.import_module(f"jaxnorm.{module}"), last)), dotted
    for layer in re.findall(r"`([A-Z]\w+)`", layers):
        assert callable(getattr(linen, layer)) and callable(getattr(nnx, layer)), layer


def test_every_layer_is_on_the_page():
    page = (ROOT / "docs" / "methods.md").read_text()
    for library in (linen, nnx):
        layers = {name for name, value in vars(library).items() if isinstance(value, type)}
        missing = {name for name in layers if f"`{name}`" not in page}
        # an nnx model's remnant, variables and report
        known = {"FoldedNorm", "Tap", "Observation", "ReplacedNorm"}
        assert missing <= known, library.__name__
