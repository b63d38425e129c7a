"""A run of several processes, one for each GPU or for each node: how they find each other, and what only the first of them does.

srun python train.py …                                                    SLURM, OpenMPI and Kubernetes (indexed jobs) say who is who
python train.py --coordinator HOST:PORT --num-processes 2 --process-id 0  anywhere else, once for each process
"""

import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable

from dsv3_jax.errors import UserError

# Seconds. A process that does not answer ends the run on all others within the heartbeat's, and none waits longer than that to leave.
_TIMEOUTS = {"initialization_timeout": 300, "heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 10}
_LONGEST_TEXT = 256  # bytes of what the first process tells the others
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def cluster(environment=os.environ) -> str | None:
    """The cluster that started this process as one of several: "slurm", "ompi", "k8s", or None."""
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in environment:  # within srun, not only sbatch
        return "slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "ompi"
    return "k8s" if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment else None


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes, before JAX is used; nothing happens where there are none.

    All three arguments, or none of them: then the cluster is asked. Raises UserError where they are incomplete or nobody answers.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise UserError("--coordinator HOST:PORT, --num-processes and --process-id belong together: give all three")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process-id {process_id} must lie in 0..{num_processes - 1}, one for each of the processes")
        if not re.fullmatch(r"\S+:\d+", coordinator):
            raise UserError(f"--coordinator {coordinator!r} must be HOST:PORT of the first process")
        found = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    elif name := cluster():
        found = {"cluster_detection_method": name}
    else:
        return
    import jax

    try:
        jax.distributed.initialize(**found, **_TIMEOUTS)
    except Exception as error:  # whatever the runtime raises
        reason = " ".join(str(error).split())
        raise UserError(
            f"the processes of this run did not find each other ({reason}): check the address and that all were started"
        ) from None


def end_with_parent() -> None:
    """Should the process that started this one be killed, this one gets SIGTERM: a supervised run does not outlive its supervisor."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def from_first(function: Callable[[], str]) -> str:
    """What `function` returns in the first process: it runs there alone, and the others are told, and find what it has left on disk."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return function()
    text = function().encode() if jax.process_index() == 0 else b""
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(text.ljust(_LONGEST_TEXT), np.uint8))
    return np.asarray(told).tobytes().decode().rstrip()


def any_of(flag: bool) -> bool:
    """Whether it is set in any process; all of them must ask."""
    import jax
    from jax.experimental import multihost_utils

    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(flag).any())
