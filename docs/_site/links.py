"""Links to files of the repository that are no pages: to the reference, to the file, or none."""

import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

from _site.api import public_names


def follow(app, doctree):
    here = Path(app.env.doc2path(app.env.docname)).parent
    for node in list(doctree.findall(addnodes.download_reference)):
        text, target = node.astext(), node["reftarget"]
        if target.endswith("explorer.html"):
            link = nodes.reference("", "", *node.children, refuri="explorer.html", internal=True)
            node.replace_self(link)
        elif entry := entry_of(text, target):
            link = addnodes.pending_xref(
                "", *node.children, refdomain="py", reftype="obj", reftarget=entry,
                refexplicit=True, refdoc=app.env.docname,
            )  # fmt: skip
            node.replace_self(link)
    for node in list(doctree.findall(addnodes.pending_xref)):
        if node.get("reftype") == "myst" and (here / node["reftarget"]).is_dir():
            node.replace_self(nodes.inline("", "", *node.children))


def entry_of(text, target):
    """`methods.batch_norm` with a link to its file is an entry of the reference."""
    if not target.endswith(".py") or "jaxnorm/" not in target:
        return None
    module, _, name = (re.findall(r"[\w.]+", text) or [""])[0].rpartition(".")
    module = f"jaxnorm.{module}" if module else "jaxnorm"
    return f"{module}.{name}" if name in public_names().get(module, {}) else None


def setup(app):
    app.connect("doctree-read", follow, priority=100)  # before files to download are collected
    return {"parallel_read_safe": True, "parallel_write_safe": True}
