"""What README.md and the pages of docs/ show runs: README's examples in a fresh namespace each, a
page from top to bottom."""

import importlib
import pathlib
import re

import jax
import pytest

import jaxnorm.linen
import jaxnorm.nnx

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))


def examples(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


EXAMPLES = examples(README)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run(code):
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):  # what users have
        exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "page", [page for page in PAGES if examples(page.read_text())], ids=lambda page: page.stem
)
def test_pages_run(page):
    namespace = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for code in examples(page.read_text()):
            exec(compile(code, page.name, "exec"), namespace)


def test_there_are_examples():
    assert len(EXAMPLES) >= 3
    assert any(examples(page.read_text()) for page in PAGES)


@pytest.mark.parametrize("page", (ROOT / "README.md", *PAGES), ids=lambda page: page.stem)
def test_linked_files_exist(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


# names of the table of methods that are not a function or a layer, or not of both frameworks alike
NOT_LAYERS = {"example_weight="}


def methods():
    table = README.split("\n## Methods\n")[1].split("\n## ")[0]
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
