"""Training steps over data, expert and pipe against the same steps on one device: see compare_meshes.py for what is in them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
SLOW = ["data=1", "data=2", "data=8", "expert=2", "expert=4", "data=2,expert=4", "data=2,expert=2x2", "data=2,pipe=2,expert=2"]


def check(dtype, *names):
    script = Path(__file__).with_name("compare_meshes.py")
    # Compiling is most of the time: the code need not be fast.
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}
    flags["PYTHONPATH"] = os.pathsep.join([str(script.parents[2]), *sys.path])
    done = subprocess.run([sys.executable, script, dtype, *names], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["mesh"] for row in rows] == list(names)
    for row in rows:
        assert max(row["loss"], row["gradient"], row["bias"]) <= TOLERANCE[dtype], row


def test_mesh_equals_one_device():
    check("float64", "data=2,expert=2")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_mesh_equals_one_device(dtype):
    check(dtype, *SLOW)
