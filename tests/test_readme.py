"""What README.md and the pages of docs/ show runs: README's examples in a fresh namespace each, a page from top to bottom."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))


def examples(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


EXAMPLES = examples(README)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run(code):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # what users have
        exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_run(page):
    namespace = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for code in examples(page.read_text()):
            exec(compile(code, page.name, "exec"), namespace)
    assert namespace, "no examples"


def test_there_are_examples():
    assert len(EXAMPLES) >= 3
    assert PAGES


@pytest.mark.parametrize("page", (ROOT / "README.md", *PAGES), ids=lambda page: page.stem)
def test_linked_files_exist(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []
