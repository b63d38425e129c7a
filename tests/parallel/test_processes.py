"""Several processes: who is asked, and that two of them compute as one."""

import os
import socket
import subprocess
import sys

import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.parallel import processes

TWO = """
import sys
from dsv3_jax.parallel import processes
processes.join(sys.argv[1], 2, int(sys.argv[2]))
import jax, jax.numpy as jnp
from dsv3_jax.parallel import mesh
from jax.sharding import NamedSharding, PartitionSpec
rows = NamedSharding(mesh.make("data=2,expert=2"), PartitionSpec(("data", "expert")))
x = jax.make_array_from_process_local_data(rows, jnp.arange(2.0) + 10 * jax.process_index())
seen = []
told = processes.from_first(lambda: seen.append(jax.process_index()) or f"rows-{jax.process_index()}")
print(float(jax.jit(jnp.sum)(x)), processes.any_of(jax.process_index() == 1), processes.any_of(False), told, seen)
"""


def test_two_processes_compute_as_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", TWO, address]
    started = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(2)
    ]
    try:
        for i, process in enumerate(started):
            out, error = process.communicate(timeout=300)
            assert f"22.0 True False rows-0 {[] if i else [0]}" in out.splitlines(), error[-2000:]
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize(
    "environment, found",
    [
        ({}, None),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-2]"}, "slurm"),
        ({"SLURM_NTASKS": "4"}, None),  # a batch script outside of srun
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "ompi"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # any pod
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "k8s"),
    ],
)
def test_which_cluster(environment, found):
    assert processes.cluster(environment) == found


def test_incomplete_flags():
    with pytest.raises(UserError, match="give all three"):
        processes.join(num_processes=2)
    with pytest.raises(UserError, match="must lie in 0"):
        processes.join("localhost:1234", 2, 2)
