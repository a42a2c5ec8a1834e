"""How much code there is: nodes of the syntax trees, without docstrings.

`python tests/count_nodes.py [FILE OR FOLDER ...]` counts those of jaxnorm by default.
"""

import ast
import sys
from pathlib import Path


def nodes(path: Path) -> int:
    """The nodes of a file, without docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = 0
    for node in ast.walk(tree):
        has_body = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if has_body and ast.get_docstring(node) is not None:
            docstrings += len(list(ast.walk(node.body[0])))
    return len(list(ast.walk(tree))) - docstrings


if __name__ == "__main__":
    places = [Path(name) for name in sys.argv[1:]] or [Path(__file__).parents[1] / "jaxnorm"]
    files = [f for p in places for f in (sorted(p.rglob("*.py")) if p.is_dir() else [p])]
    print(f"{sum(map(nodes, files)):,} nodes in {len(files)} files")
