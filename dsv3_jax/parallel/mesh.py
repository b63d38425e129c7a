"""The device mesh from its text form: `data=2,pipe=4,expert=8`.

data: replicas of everything; pipe: stages of the pipeline; expert: experts spread out, the batch too. An axis that is left out has
size 1; one may be -1 and takes the devices that are left. `expert=4x8` splits it into 4 nodes of 8 devices each, the mesh axes `node` and
`local`, so that a token crosses between nodes once for each node and not for each device.
"""

import math
import re
from collections.abc import Mapping

from dsv3_jax.config import ModelConfig, did_you_mean
from dsv3_jax.errors import UserError

AXES = ("data", "pipe", "expert")
AXES_OF_ARRAYS = {*AXES, "node", "local"}  # of the mesh that is made
EXAMPLE = "for example data=2,pipe=1,expert=4"


def parse(text: str) -> dict[str, int]:
    """The size of every mesh axis, in their order: data, pipe, expert (or node, local). Raises UserError on what is not a mesh."""
    sizes = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = part.partition("=")
        if name not in AXES:
            raise UserError(f"unknown mesh axis {name!r}{did_you_mean(name, AXES)}: the axes are {', '.join(AXES)}, {EXAMPLE}")
        if name in sizes:
            raise UserError(f"mesh axis {name!r} is given twice in {text!r}: give it once")
        if not re.fullmatch(r"-1|[1-9]\d*" + (r"|[1-9]\d*x[1-9]\d*" if name == "expert" else ""), size):
            raise UserError(f"mesh axis {name}={size!r} needs a size of at least 1, or -1 for what is left, {EXAMPLE}")
        sizes[name] = size
    if list(sizes.values()).count("-1") > 1:
        raise UserError(f"mesh {text!r} leaves more than one axis open: only one may be -1")
    sizes = {axis: sizes.get(axis, "1") for axis in AXES}
    if "x" in sizes["expert"]:
        sizes["node"], sizes["local"] = sizes.pop("expert").split("x")
    return {axis: int(size) for axis, size in sizes.items()}


def resolve(text: str, num_devices: int) -> dict[str, int]:
    """`parse` with -1 filled in. Raises UserError where the sizes do not multiply to the number of devices."""
    sizes = parse(text)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        raise UserError(
            f"mesh {text!r} does not match the devices: there are {num_devices}, so its sizes must multiply to {num_devices} "
            f"(train.py and serve.py rehearse N devices on a CPU with --fake-devices N)"
        )
    return sizes


def make(text: str, devices=None):
    """The jax.sharding.Mesh over `devices` (all by default), its axes of type Auto. Raises UserError as `resolve`."""
    import jax

    devices = jax.devices() if devices is None else devices
    sizes = resolve(text, len(devices))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes), devices=devices)


def num_expert_parts(sizes: Mapping[str, int]) -> int:
    """The size of `expert`, split or not."""
    return sizes.get("expert", 1) * sizes.get("node", 1) * sizes.get("local", 1)


def share_of_rows(mesh, process: int) -> tuple[int, int]:
    """(index, count): the devices of a process hold the index-th of `count` equal parts of a batch's rows, which lie over data x expert.

    Processes of different ranks of `pipe` may hold the same part. Raises UserError where the devices of a process hold no such part.
    """
    import numpy as np

    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    by_rank = np.moveaxis(owners, mesh.axis_names.index("pipe"), 0).reshape(mesh.shape["pipe"], -1)
    mine = np.flatnonzero((by_rank == process).any(axis=0))
    index, count = mine[0] // len(mine), by_rank.shape[1] // len(mine)
    if by_rank.shape[1] % len(mine) or not np.array_equal(mine, index * len(mine) + np.arange(len(mine))):
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise UserError(
            f"the devices of process {process} lie across the mesh {sizes}: choose an expert size that its devices divide, or fill"
        )
    return int(index), int(count)


def check(sizes: Mapping[str, int], model: ModelConfig, batches: Mapping[str, int | None]) -> None:
    """Raises UserError, with the nearest valid choice, where the experts or the batch do not divide over the mesh.

    batches: sequences by the name of the field that says so, None for what is not set.
    """
    experts = num_expert_parts(sizes)
    if (model.num_moe_layers or model.num_nextn_predict_layers) and model.n_routed_experts % experts:
        valid = _nearest(experts, [n for n in range(1, model.n_routed_experts + 1) if model.n_routed_experts % n == 0])
        raise UserError(f"{model.n_routed_experts} routed experts do not divide over expert={experts}: the nearest size is expert={valid}")
    parts = sizes.get("data", 1) * experts
    for name, size in batches.items():
        if size is not None and size % parts:
            nearest = max(parts, round(size / parts) * parts)
            raise UserError(
                f"{name}={size} does not divide over data x expert = {parts} devices, each of which takes its rows: "
                f"the nearest is {name}={nearest}"
            )


def _nearest(size: int, choices: list[int]) -> int:
    return min(choices, key=lambda choice: (abs(choice - size), -choice))
