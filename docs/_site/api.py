"""The reference: one page for each public module with every public name, and a warning, which ends
the build, for a name that has no docstring or no entry."""

import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

from sphinx.util import logging
from sphinx.util.inspect import stringify_signature

import jaxnorm
from _site.docstrings import as_rst
from _site.pictures import CALLS, picture

logger = logging.getLogger(__name__)
PICTURES = {f"jaxnorm.methods.{call.partition('(')[0]}": call for call in CALLS}


def public_modules():
    """The package and its modules without an underscore."""
    found = (module.name for module in pkgutil.iter_modules(jaxnorm.__path__))
    names = [f"jaxnorm.{name}" for name in found if name[0] != "_"]
    return {name: importlib.import_module(name) for name in (*sorted(names), "jaxnorm")}


@functools.cache
def public_names():
    """The names of each module, each value where it is found first: `jaxnorm.Row` is an entry of
    `jaxnorm.methods`."""
    seen, found = set(), {}
    for module, contents in public_modules().items():
        own = {
            name: value
            for name, value in vars(contents).items()
            if name[0] != "_"
            and not inspect.ismodule(value)
            and getattr(value, "__module__", "").startswith(module)
            and id(value) not in seen
        }
        found[module] = own
        seen |= {id(value) for value in own.values()}
    return found


def write_pages(app):
    """Markdown in docs/api, which is made anew by every build."""
    folder = Path(app.confdir) / "api"
    folder.mkdir(exist_ok=True)
    pages = {f"{module.split('.')[-1]}.md": page(module) for module in public_names()}
    for path in folder.glob("*.md"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:  # else Sphinx would read it again
            path.write_text(text)


def page(module):
    names = ", ".join(public_names()[module])
    numbers = (name for name, value in vars(jaxnorm).items() if isinstance(value, int))
    constants = numbers if module == "jaxnorm" else ()
    return "\n".join(
        (
            f"# {module}\n\n```{{eval-rst}}",
            f".. automodule:: {module}\n   :members: {names}\n   :special-members: __call__\n",
            *(f".. autodata:: jaxnorm._core.groups.{name}\n" for name in constants),
            "```\n",
        )
    )


def process(app, what, name, obj, options, lines):
    lines[:] = as_rst(lines)
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # else napoleon takes what stands before a colon for a type
    if name in PICTURES:
        svg = ["", ".. raw:: html", "", f'   <div class="row">{picture(PICTURES[name])}</div>', ""]
        end = lines.index("") if "" in lines else len(lines)
        lines[end:end] = svg


def skip(app, what, name, obj, skip, options):
    """Initializers and dtypes, the defaults of a layer's fields, are no members of it; nor are the
    fields of a named tuple, which its docstring explains."""
    foreign = callable(obj) and not getattr(obj, "__module__", "").startswith("jaxnorm")
    numbered = (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
    return True if foreign or numbered else None


def sign(app, what, name, obj, options, signature, returns):
    """Defaults as they are written, without fields that linen adds to every module."""
    if signature is None:
        return None
    if what == "class" and signature == "(*args, **kwargs)":  # of the metaclass of nnx
        full = inspect.signature(obj.__init__)
        own = full.replace(parameters=list(full.parameters.values())[1:])
        signature = stringify_signature(own, show_annotation=False)
    signature = re.sub(r", parent=<[^>]*>, name=None", "", signature)
    signature = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", signature)
    function = r"(?:<PjitFunction of )?<function (\w+)(?:\.<locals>\.\w+)?(?: at 0x\w+)?>+"
    return re.sub(function, r"\1", signature), returns


def warn_of_missing(app, exception):
    if exception is not None:
        return
    entries = app.env.domains["py"].objects
    for module, names in public_names().items():
        for name, value in names.items():
            if f"{module}.{name}" not in entries:
                logger.warning("%s.%s has no entry in the reference", module, name)
            if not inspect.getdoc(value):
                logger.warning("%s.%s has no docstring", module, name)


def setup(app):
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", sign)
    app.connect("autodoc-skip-member", skip)
    app.connect("build-finished", warn_of_missing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
