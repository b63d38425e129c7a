"""The device mesh from its text form: `data=2,pipe=4,expert=8`.

data: replicas of everything; pipe: stages of the pipeline; expert: experts spread out, the batch too. An axis that is left out has
size 1; one may be -1 and takes the devices that are left.
"""

import math

from dsv3_jax.config import did_you_mean
from dsv3_jax.errors import UserError

AXES = ("data", "pipe", "expert")
EXAMPLE = "for example data=2,pipe=1,expert=4"


def parse(text: str) -> dict[str, int]:
    """The size of every axis, in the order of AXES. Raises UserError on what is not a mesh."""
    sizes = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = part.partition("=")
        if name not in AXES:
            raise UserError(f"unknown mesh axis {name!r}{did_you_mean(name, AXES)}: the axes are {', '.join(AXES)}, {EXAMPLE}")
        if name in sizes:
            raise UserError(f"mesh axis {name!r} is given twice in {text!r}: give it once")
        if not size.removeprefix("-").isdigit() or int(size) < -1 or int(size) == 0:
            raise UserError(f"mesh axis {name}={size!r} needs a size of at least 1, or -1 for what is left, {EXAMPLE}")
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh {text!r} leaves more than one axis open: only one may be -1")
    return {axis: sizes.get(axis, 1) for axis in AXES}


def resolve(text: str, num_devices: int) -> dict[str, int]:
    """`parse` with -1 filled in. Raises UserError where the sizes do not multiply to the number of devices."""
    sizes = parse(text)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        raise UserError(
            f"mesh {text!r} does not match the devices: there are {num_devices}, so its sizes must multiply to {num_devices} "
            f"(--fake-devices N rehearses N devices on a CPU)"
        )
    return sizes


def make(text: str, devices=None):
    """The jax.sharding.Mesh over `devices` (all by default), its axes of type Auto. Raises UserError as `resolve`."""
    import jax

    devices = jax.devices() if devices is None else devices
    sizes = resolve(text, len(devices))
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=devices)
