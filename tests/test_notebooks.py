"""
The notebooks run, and what is stored in them is fit to be read. `python tests/test_notebooks.py` runs them all and
stores their outputs anew.
"""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(path: Path):
    """The notebook with fresh outputs, and nothing else that differs from run to run."""
    notebook = nbformat.read(path, as_version=4)
    # the kernel is a process of its own: it finds this package as the tests do
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.pop("language_info", None)
    return notebook


def pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    for name in ("PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_DISABLE_PROGRESS_BARS"):
        # put back afterwards
        monkeypatch.setenv(name, os.environ.get(name, ""))
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    assert path.stat().st_size < 400_000 and pictures(stored)
    assert "**What this answers:**" in stored.cells[0].source and "**How long it takes:**" in stored.cells[0].source
    assert not re.search(r"stderr|Warning|/(home|root|tmp|work)/", path.read_text(encoding="utf-8"))
    assert pictures(execute(path)) == pictures(stored)


def test_there_are_four():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


if __name__ == "__main__":
    for path in NOTEBOOKS:
        nbformat.write(execute(path), path)
        print(path.name)
