"""Of the built pages: every link inside the site leads somewhere, and no page is heavy."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.util import logging

logger = logging.getLogger(__name__)
HEAVIEST = 2_000_000
"""Bytes of a page with all that it loads, in light or in dark."""


class Page(HTMLParser):
    """The ids of a page, what it links to, and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = set(), set(), set()
        self.unseen = {"only-light": set(), "only-dark": set()}
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = {name: value or "" for name, value in attrs}
        self.ids |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if "href" in attrs:
            (self.loads if tag == "link" else self.links).add(attrs["href"])
        if "src" in attrs:
            self.loads.add(attrs["src"])
            for paper in self.unseen.keys() & attrs.get("class", "").split():
                self.unseen[paper].add(attrs["src"])


def faults(out):
    """What is wrong with the site in the folder `out`, in words."""
    pages = {path: Page(path) for path in sorted(out.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(out)
        files = {"": path}
        for link in sorted(page.links | page.loads):
            url = urlsplit(link)
            if url.scheme or url.netloc:
                if url.scheme not in ("http", "https", "mailto", "data") or " " in link:
                    yield f"{name}: {link} is no address"
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.is_file():
                yield f"{name}: there is no {link}"
            elif url.fragment and target in pages:
                if unquote(url.fragment) not in pages[target].ids:
                    yield f"{name}: {link} has no such place"
            if link in page.loads and target.is_file():
                files[link] = target
        weight = max(
            sum(file.stat().st_size for file in {files[link] for link in files.keys() - unseen})
            for unseen in page.unseen.values()
        )
        if weight > HEAVIEST:
            yield f"{name} has {weight / 1e6:.1f} MB with all that it loads"


def check(app, exception):
    if exception is None and app.builder.format == "html":
        for fault in faults(Path(app.outdir).resolve()):
            logger.warning(fault)


def setup(app):
    app.connect("build-finished", check, priority=900)  # when all files are there
    return {"parallel_read_safe": True, "parallel_write_safe": True}
