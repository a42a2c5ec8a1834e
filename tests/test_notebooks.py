"""Every notebook runs to its end, and is committed as it was run.

`python tests/test_notebooks.py` runs and saves them.
"""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def executed(path: Path, cwd: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run by this interpreter in `cwd` with the jaxnorm of this
    checkout."""
    path_list = [str(ROOT), os.environ.get("PYTHONPATH")]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path_list)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "IPYTHONDIR": str(cwd / "ipython"),
        "JAX_PLATFORMS": "cpu",
    }
    env.pop("MPLBACKEND", None)  # IPython's own: figures become outputs
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(cwd)}},
    )
    client.execute(env=env)
    return notebook


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    # this environment's kernel before the user's
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    executed(path, tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_with_its_pictures(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), (
        "run python tests/test_notebooks.py"
    )
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [
        output
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert path.stat().st_size < 1_500_000


if __name__ == "__main__":
    import tempfile

    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    for path in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        for cell in notebook.cells:
            cell.metadata = {}
        # without the version of whoever ran it
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)
