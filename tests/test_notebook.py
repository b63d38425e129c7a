"""The notebook runs from top to bottom on a run that train.py has just made."""

import os
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "mini"
    corpus = ROOT / "dsv3_jax"
    model = "--model.vocab-size 512 --model.hidden-size 32 --model.num-hidden-layers 2 --model.intermediate-size 64"
    options = f"tiny {model} --data.corpus {corpus} --workdir {directory} --steps 4 --batch-size 2 --sequence-length 64 --eval-every 2"
    one_device = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, ROOT / "train.py", *options.split()], cwd=ROOT, env=one_device, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory


def test_quickstart(run, monkeypatch):
    monkeypatch.setenv("RUN", str(run))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the plot is missing"
    assert any("bits" in output.get("text", "") for output in outputs)
