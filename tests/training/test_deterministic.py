"""`--deterministic` on a GPU: two runs of train.py give the same bits."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.checkpoint import open_run
from tests.micro import write_recipe

REPOSITORY = Path(__file__).parents[2]
WIDTHS = {"hidden-size": 256, "intermediate-size": 256, "moe-intermediate-size": 128, "q-lora-rank": 128, "kv-lora-rank": 128}
WIDTHS |= {"qk-nope-head-dim": 128, "qk-rope-head-dim": 64, "v-head-dim": 128, "num-hidden-layers": 3}  # two equal MoE layers


@pytest.mark.gpu
def test_two_runs_are_equal_bit_for_bit(tmp_path):
    recipe = write_recipe(tmp_path, steps=4, batch_size=16)
    options = [option for name, value in WIDTHS.items() for option in (f"--model.{name}", str(value))]
    options += ["--precision", "bf16", "--sequence-length", "256", "--deterministic"]
    params = []
    for name in ("one", "other"):
        command = [sys.executable, "train.py", str(recipe), "--workdir", str(tmp_path / name), *options]
        subprocess.run(command, cwd=REPOSITORY, check=True)
        params.append(open_run(tmp_path / name, step=4).params())
    jax.tree.map(np.testing.assert_array_equal, *params)
