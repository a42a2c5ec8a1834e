"""What a page has on the site alone: the contents, the explorer, the pictures."""

import fnmatch
import re
import shutil
from pathlib import Path

from _site.pictures import gallery

CONTENTS = {
    "Start": ["docs/idea", "docs/choosing", "docs/methods", "docs/devices", "docs/faq"],
    "Coming from": ["docs/coming_from_*"],
    "In practice": [
        "docs/changing_norms",
        "docs/recipes*",
        "docs/[!/]*",
        "notebooks/README",
        "notebooks/*",
    ],
    "Measured and understood": [
        "benchmarks/README",
        "benchmarks/FAILURE",
        "benchmarks/CLAIMS",
        "benchmarks/TASKS",
        "docs/probes",
    ],
    "Reference": [
        "docs/capabilities",
        "docs/api/jaxnorm",
        "docs/api/*",
        "CONTRIBUTING",
        "CHANGELOG",
    ],
}
"""The pages of each part as patterns; "In practice" has every page that no other part names."""
EXPLORER = '<iframe class="explorer" src="explorer.html" title="One number per axis"></iframe>'

PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]*)">\s*'
    r'<img src="([^"]*)"\s+alt="([^"]*)"[^>]*>\s*</picture>'
)
"""A figure for dark pages and for light ones, as the repository shows them."""


def on_the_site(app, docname, source):
    """Put in place of comments, which the repository does not show, what only a site can."""
    if docname == app.config.root_doc:
        source[0] += contents(app.env.found_docs - {docname})
    source[0] = PICTURE.sub(of_both_papers, source[0])
    source[0] = source[0].replace("<!-- explorer -->", raw(EXPLORER))
    if "<!-- pictures -->" in source[0]:
        source[0] = source[0].replace("<!-- pictures -->", raw(gallery()))


def of_both_papers(found):
    """The figure that fits the page, whose light or dark the reader may switch."""
    dark, light, alt = found.groups()
    return "\n\n".join(
        f"```{{image}} {path}\n:alt: {alt}\n:class: only-{paper}\n:loading: lazy\n```"
        for path, paper in ((light, "light"), (dark, "dark"))
    )


def contents_may_differ(app, env, added, changed, removed):
    """Whether the start page, which has the contents, is to be read again."""
    return [app.config.root_doc] if added or removed else []


def contents(pages):
    """A table of contents for the side of every page."""
    parts, left = {}, set(pages)
    for part in sorted(CONTENTS, key=lambda part: part == "In practice"):
        parts[part] = []
        for pattern in CONTENTS[part]:
            found = sorted(page for page in left if fnmatch.fnmatch(page, pattern))
            parts[part] += found
            left -= set(found)
    return "".join(
        f"\n\n```{{toctree}}\n:caption: {part}\n:hidden:\n\n" + "\n".join(parts[part]) + "\n```"
        for part in CONTENTS
        if parts[part]
    )


def raw(html):
    return f"```{{raw}} html\n{html}\n```"


def put_files(app, exception):
    """The start page where a server looks for it, and the explorer where the repository has it."""
    if exception is None and app.builder.format == "html":
        out = Path(app.outdir)
        shutil.copyfile(out / "README.html", out / "index.html")
        shutil.copyfile(Path(app.confdir) / "explorer.html", out / "docs" / "explorer.html")


def setup(app):
    app.connect("source-read", on_the_site)
    app.connect("env-get-outdated", contents_may_differ)
    app.connect("build-finished", put_files, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
