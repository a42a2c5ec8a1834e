"""The parts of the site: what its checks find, how docstrings become its pages, and its contents.

`.ci/run` builds the whole of it, with warnings as errors.
"""

import importlib
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="the extra docs is not installed")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site():
    """The modules of docs/_site by name."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        names = ("api", "checks", "docstrings", "pages", "pictures")
        yield {name: importlib.import_module(f"_site.{name}") for name in names}
    finally:
        sys.path.remove(str(ROOT / "docs"))


def written(folder, **pages):
    for name, html in pages.items():
        (folder / f"{name}.html").write_text(html)
    return folder


def test_a_sound_site_has_no_faults(site, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"0" * 1000)
    written(
        tmp_path,
        one='<a href="two.html#here">two</a> <img src="picture.png"> <a href="#top">up</a>'
        '<p id="top"></p> <a href="https://example.com/a">away</a>',
        two='<p id="here"></p>',
    )
    assert list(site["checks"].faults(tmp_path)) == []


@pytest.mark.parametrize(
    "html, fault",
    [
        ('<a href="nothing.html">x</a>', "there is no nothing.html"),
        ('<img src="nothing.png">', "there is no nothing.png"),
        ('<a href="#nowhere">x</a>', "has no such place"),
        ('<a href="two.html#nowhere">x</a>', "has no such place"),
        ('<a href="https://example.com/a b">x</a>', "is no address"),
        ('<a href="htp://example.com">x</a>', "is no address"),
        ('<script src="large.js"></script>', "2.1 MB"),
    ],
)
def test_faults_are_found(site, tmp_path, html, fault):
    (tmp_path / "large.js").write_text("0" * 2_100_000)
    written(tmp_path, one=html, two="")
    (found,) = site["checks"].faults(tmp_path)
    assert "one.html" in found and fault in found


def test_of_figures_for_light_and_dark_one_counts(site, tmp_path):
    pairs = ('<img class="only-light" src="a.js">', '<img class="only-dark align" src="b.js">')
    for name in "ab":
        (tmp_path / f"{name}.js").write_text("0" * 1_200_000)
    assert list(site["checks"].faults(written(tmp_path, one="".join(pairs)))) == []
    heavy = pairs[0] + '<img src="b.js">'
    assert len(list(site["checks"].faults(written(tmp_path, one=heavy)))) == 1


def test_figures_for_light_and_dark_follow_the_page(site):
    html = """<picture>
      <source media="(prefers-color-scheme: dark)" srcset="a_dark.png">
      <img src="a.png" alt="A figure">
    </picture>"""
    source = site["pages"].PICTURE.sub(site["pages"].of_both_papers, f"before\n\n{html}\n")
    assert "<" not in source
    assert "```{image} a.png\n:alt: A figure\n:class: only-light\n" in source
    assert "```{image} a_dark.png\n:alt: A figure\n:class: only-dark\n" in source


def test_docstrings_become_rst(site):
    doc = """\
        Standardize *x*, as `norm(x,
        row)` and `moments` do.

            y = (x - mean) * |scale|

        With x_ and 2 ** 3 in words:

            >>> 1 + 1
            2

        Args:
            **fields: of `Row`, 0 * 1.

        Options of apply, beside others:
            rmax: 1 | 2.
        """
    lines = site["docstrings"].as_rst(textwrap.dedent(doc).splitlines())
    assert "\n".join(lines) == textwrap.dedent(
        r"""        Standardize \*x\*, as ``norm(x, row)`` and `moments` do.

        .. code-block:: text

            y = (x - mean) * |scale|

        With x\_ and 2 \*\* 3 in words:

        .. code-block:: pycon

            >>> 1 + 1
            2

        Args:
            \*\*fields: of `Row`, 0 \* 1.

        Options of apply:
            rmax: 1 \| 2."""
    )


def test_every_page_is_in_the_contents_once(site):
    pages = {"docs/idea", "docs/recipes", "docs/something_new", "docs/coming_from_flax"}
    pages |= {"docs/api/jaxnorm", "docs/api/methods", "notebooks/a", "benchmarks/README"}
    listed = [line for line in site["pages"].contents(pages).splitlines() if "/" in line]
    assert sorted(listed) == sorted(pages)
    assert listed.index("docs/api/jaxnorm") < listed.index("docs/api/methods")
    assert listed.index("docs/recipes") < listed.index("docs/something_new")


def test_every_public_name_has_one_page(site):
    """Of the names that tests/test_api.py wants documented."""
    from test_api import DOCUMENTED

    found = [id(value) for names in site["api"].public_names().values() for value in names.values()]
    assert len(found) == len(set(found))
    assert {id(value) for value in DOCUMENTED.values()} <= set(found)


def test_pictures_take_the_colours_of_the_page(site):
    svg = site["pictures"].picture("group_norm(3)")
    assert svg.startswith('<svg role="img" aria-label="The sets of group_norm')
    assert "var(--color-foreground-primary)" in svg and "var(--color-background-primary)" in svg
    assert "#333333" not in svg and svg.count("<path") > 3 * 4 * 4 * 6 / 2
