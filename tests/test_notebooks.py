"""Every notebook runs to its end out of the repository, and is committed as it was run.

`python tests/test_notebooks.py` runs and saves them.
"""

import ast
import os
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

TRAIN = {"batch_size", "domains", "inference", "why"}
"""Those that train networks."""

SLOW = TRAIN | {"ghosts_and_devices", "migrating", "one_image", "your_own"}
"""Run by the slow tests alone."""

UNOPTIMIZED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

MODULES = {"scikit-learn": "sklearn", "pillow": "PIL"}
"""The module of a package, where it has another name."""


def executed(path: Path, folder: Path, *, quick: bool) -> nbformat.NotebookNode:
    """The notebook with its outputs, run by this interpreter in an empty folder, from which of this
    checkout it sees the package alone."""
    work, packages = folder / "work", folder / "packages"
    work.mkdir()
    packages.mkdir()
    (packages / "jaxnorm").symlink_to(ROOT / "jaxnorm")
    path_list = [str(packages), os.environ.get("PYTHONPATH")]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(part for part in path_list if part and part != str(ROOT)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "IPYTHONDIR": str(folder / "ipython"),
        "JAX_PLATFORMS": "cpu",
    }
    env.pop("MPLBACKEND", None)  # IPython's own: figures become outputs
    # most of the time of those that hardly train is compilation
    env["XLA_FLAGS"] = UNOPTIMIZED if quick and path.stem not in TRAIN else ""
    env.pop("JAXNORM_QUICK", None)
    if quick:
        env["JAXNORM_QUICK"] = "1"
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600 if quick else 3600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(work)}},
    )
    client.execute(env=env)
    return notebook


def code_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


RUN = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])
    for path in NOTEBOOKS
]


@pytest.mark.parametrize("path", RUN)
def test_runs(path, tmp_path, monkeypatch):
    # this environment's kernel before the user's
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    executed(path, tmp_path, quick=True)


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_is_committed_with_its_pictures(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = code_of(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), (
        "run python tests/test_notebooks.py"
    )
    outputs = [output for cell in code for output in cell.outputs]
    assert any({"image/png", "image/jpeg"} & set(output.get("data", {})) for output in outputs)
    assert not [
        output
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert path.stat().st_size < 650_000


@each_notebook
def test_names_no_path_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    texts = [cell.source for cell in notebook.cells]
    for output in (output for cell in code_of(notebook) for output in cell.outputs):
        texts.append(output.get("text", ""))
        texts += [t for kind, t in output.get("data", {}).items() if kind.startswith("text/")]
    path_of_a_machine = r"(?<![\w.:/])/(?:home|root|tmp|usr|work|Users)/\S*|\w:\\\w+"
    assert not [found for text in texts for found in re.findall(path_of_a_machine, text)]


@each_notebook
def test_ends_in_an_assertion(path):
    last = ast.parse(code_of(nbformat.read(path, as_version=4))[-1].source)
    assert any(
        isinstance(node, ast.Assert)
        or (isinstance(node, ast.Attribute) and node.attr.startswith("assert_"))
        for node in ast.walk(last)
    )


@each_notebook
def test_imports_what_the_extra_installs(path):
    """So that it runs when it is copied out of the repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = project["dependencies"] + project["optional-dependencies"]["notebooks"]
    packages = {re.split(r"[^\w-]", name)[0] for name in required} | {"jaxnorm", "numpy"}
    allowed = {MODULES.get(name, name.replace("-", "_")) for name in packages}
    source = "\n".join(cell.source for cell in code_of(nbformat.read(path, as_version=4)))
    imported = {
        name
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert {name.split(".")[0] for name in imported} <= allowed | sys.stdlib_module_names


if __name__ == "__main__":
    import tempfile

    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    for path in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder), quick=False)
        for cell in notebook.cells:
            cell.metadata = {}
        # without the version of whoever ran it
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)
