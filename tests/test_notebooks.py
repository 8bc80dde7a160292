"""The notebooks of the documentation run from the first cell to the last."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import hata

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_notebook_runs(path, tmp_path, monkeypatch):
    # The package under test, from any folder: PYTHONPATH may be relative.
    monkeypatch.setenv("PYTHONPATH", str(Path(hata.__file__).parents[1]))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
