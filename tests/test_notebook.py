"""The notebook runs from top to bottom on a run that train.py has just made."""

import os
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.micro import one_device, write_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The model and batch of tests/test_train_command.py, so that their programs are compiled once."""
    folder = tmp_path_factory.mktemp("notebook")
    directory, recipe = folder / "run", write_recipe(folder, steps=4, batch_size=4, eval_every=2)
    command = [sys.executable, ROOT / "train.py", recipe, "--workdir", directory]
    done = subprocess.run(command, cwd=ROOT, env=one_device(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory


def test_quickstart(run, monkeypatch):
    monkeypatch.setenv("RUN", str(run))
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the plot is missing"
    assert any("bits" in output.get("text", "") for output in outputs)
