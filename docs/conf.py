"""The documentation site: python -m sphinx -W --keep-going -c docs . build/site

The pages are the Markdown files and notebooks of the repository as they stand, so that each of them
is written once and its links hold in the repository and on the site alike. The source folder of
Sphinx is therefore the root of the repository.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import jaxnorm  # noqa: E402, F401  # of this checkout, whatever is installed

project = "jaxnorm"
author = "The jaxnorm authors"
copyright = "the jaxnorm authors, Apache License 2.0"

root_doc = "README"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "benchmarks/CLAIMS.md",
    "benchmarks/FAILURE.md",
    "benchmarks/TASKS.md",
    "docs/*.md",
    "docs/api/*.md",
    "notebooks/*.ipynb",
    "notebooks/README.md",
]
# folders that need not be searched for pages
exclude_patterns = [".*", "build", "dist", "results", "jaxnorm", "tests"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "_site.pages",
    "_site.api",
    "_site.links",
    "_site.checks",
]

# The tests run every notebook, and hold that it is committed with its outputs: the site shows those
# outputs, so that it is built in seconds and shows what the tests saw.
nb_execution_mode = "off"
nb_merge_streams = True
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
# the tables of every shape in benchmarks/README.md are folded away, with small headings
suppress_warnings = ["myst.header"]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings have shapes, which annotations do not
default_role = "py:obj"
napoleon_use_rtype = False
napoleon_custom_sections = [
    ("Options of apply", "params_style"),
    ("Others", "notes_style"),
    ("Reference", "notes_style"),
    ("Fields", "params_style"),
]

html_theme = "furo"
html_title = "jaxnorm"
pygments_dark_style = "github-dark"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#0072b2",
        "color-brand-content": "#0072b2",
    },
    "dark_css_variables": {
        "color-brand-primary": "#56b4e9",
        "color-brand-content": "#56b4e9",
    },
}
