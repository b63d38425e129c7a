"""Two processes, each with one device: each reads its own experts only."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "data" / "models" / "tiny_e_fp8_mtp"

# Prints the bytes read of each kind of tensor, and checks the shard against the files read by the safetensors package.
PROCESS = """
import sys
import jax
import numpy as np
import safetensors

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import dsv3_jax
from dsv3_jax import hub
from dsv3_jax.errors import UserError
from dsv3_jax.hub.safetensors_io import Stored
from dsv3_jax.parallel.mesh import make

read, name_at = {"experts": 0, "others": 0}, {}
stored_read = Stored.read

def counted(self, slices, out):
    read["experts" if (self.path, self.offset) in experts else "others"] += out.nbytes
    stored_read(self, slices, out)

from pathlib import Path
tensors = hub.loading.open_checkpoint(Path(sys.argv[3]))
experts = {(stored.path, stored.offset) for name, stored in tensors.items() if ".experts." in name}
Stored.read = counted
model = dsv3_jax.load(sys.argv[3], mesh=make("expert=2"))
total = sum(stored.dtype.itemsize * int(np.prod(stored.shape)) for name, stored in tensors.items() if ".experts." in name)
assert read["experts"] * 2 == total, (read, total)

files = {name: tensor["data"] for name, tensor in safetensors.deserialize((Path(sys.argv[3]) / "model.safetensors").read_bytes())}
(shard,) = model.params["moe_layers"]["mlp"]["experts"]["down_proj"].addressable_shards
first = 3 * jax.process_index()
assert shard.data.shape == (1, 3, 160, 136) and shard.index[1] == slice(first, first + 3)
for i in range(3):
    assert np.asarray(shard.data[0, i]).tobytes() == bytes(files[f"model.layers.1.mlp.experts.{first + i}.down_proj.weight"])
try:
    hub.save(model, sys.argv[4])
    raise SystemExit("saved")
except UserError as error:
    assert "several processes" in str(error)
print("good", flush=True)
"""


@pytest.mark.slow
def test_each_process_reads_its_slices(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {"JAX_PLATFORMS": "cpu", "PATH": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(i), MODEL, tmp_path / "out"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for i in range(2)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and "good" in output, errors[-3000:]
