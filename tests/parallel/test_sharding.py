"""Meshes from text, and where arrays lie on them."""

import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import mesh, sharding
from tests.parallel import make_sharding_table


def test_every_parameter_of_the_671b_recipe():
    """A change of the rules or of the model shows in the diff of the golden file; make_sharding_table.py writes it anew."""
    assert make_sharding_table.table() == json.loads(make_sharding_table.PATH.read_text())


def test_671b_memory():
    """The report's arithmetic: a device of the table's mesh holds 4 of 256 experts, and no two devices keep the same master."""
    sizes = mesh.parse(make_sharding_table.MESH)
    total = kept = 0
    for name, row in make_sharding_table.table().items():
        axes = [axis for entry in row["state"] if entry for axis in ([entry] if isinstance(entry, str) else entry)]
        assert len(axes) == len(set(axes))
        parts = math.prod(sizes[axis] for axis in axes)
        assert parts == 2048 or (parts == 128 and math.prod(row["shape"]) < 1e6), f"{name} is kept {2048 // parts} times"
        total += math.prod(row["shape"])
        kept += math.prod(row["shape"]) / math.prod(sizes[axis] for axis in axes)
        if "/experts/" in name:
            assert row["weight"][row["logical"].index("experts")] == "expert"
    assert total == pytest.approx(671.03e9 + 11.5e9, rel=2e-3)
    assert kept * 8 < 4e9  # float32 master and two bfloat16 moments


def test_split_expert_axis():
    sizes = mesh.parse("data=2,expert=4x8")
    assert sizes == {"data": 2, "pipe": 1, "node": 4, "local": 8}
    assert sharding.weight_spec(("layers", "experts", "embed"), sizes) == PartitionSpec(None, ("node", "local"), None)
    assert sharding.state_spec(("embed", "mlp"), (64, 128), sizes) == PartitionSpec(None, ("data", "node", "local"))
    assert sharding.batch_spec(sizes) == PartitionSpec(("data", "node", "local"))


def test_dimensions_that_do_not_divide_stay_whole():
    sizes = mesh.parse("data=2,expert=4")
    assert sharding.state_spec(("embed", "mlp"), (12, 8), sizes) == PartitionSpec(None, ("data", "expert"))
    assert sharding.state_spec(("embed", "mlp"), (12, 6), sizes) == PartitionSpec(None, None)


def test_what_is_kept_lies_over_pipe_by_another_dimension_than_layers():
    sizes = mesh.parse("data=2,pipe=4,expert=4")
    assert sharding.state_spec(("layers", "embed", "mlp"), (4, 32, 64), sizes) == PartitionSpec(None, "pipe", ("data", "expert"))
    assert sharding.state_spec(("layers", "experts", "embed"), (4, 8, 64), sizes) == PartitionSpec(None, "expert", ("data", "pipe"))
    assert sharding.state_spec(("layers", "embed"), (128, 32), sizes) == PartitionSpec(None, ("data", "expert", "pipe"))


def test_devices_of_a_mesh():
    """`local` is innermost: neighbours lie in one node; and a mesh without some of the axes is served too."""
    made = mesh.make("data=2,expert=2x2")
    assert made.axis_names == ("data", "pipe", "node", "local")
    np.testing.assert_array_equal(np.vectorize(lambda d: d.id)(made.devices).reshape(4, 2), np.arange(8).reshape(4, 2))
    serving = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = sharding.param_shardings(Decoder(ModelConfig()).logical_axes(), serving)
    assert shardings["moe_layers"]["mlp"]["experts"]["down_proj"].spec == PartitionSpec(None, "expert", None, None)
    assert shardings["embed"].spec == PartitionSpec(None, None)


def mesh_of_processes(text, devices_each):
    """Devices in their order, so many to a process."""
    sizes = mesh.parse(text)
    number = np.prod(list(sizes.values()))
    devices = np.array([SimpleNamespace(process_index=i // devices_each) for i in range(number)]).reshape(tuple(sizes.values()))
    return SimpleNamespace(devices=devices, axis_names=tuple(sizes), shape=sizes)


@pytest.mark.parametrize(
    "text, devices_each, shares",
    [
        ("data=4", 1, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ("data=2,expert=2", 2, [(0, 2), (1, 2)]),
        ("pipe=2", 1, [(0, 1), (0, 1)]),  # both need all rows
        ("data=2,pipe=2,expert=2", 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ("data=2,pipe=2,expert=4", 2, [(0, 4), (1, 4), (0, 4), (1, 4), (2, 4), (3, 4), (2, 4), (3, 4)]),
        ("pipe=2,expert=2x2", 8, [(0, 1)]),
    ],
)
def test_rows_of_a_process_are_those_of_its_devices(text, devices_each, shares):
    """Of a batch as it lies over data and expert: ranks of a pipeline have the same."""
    assert [mesh.share_of_rows(mesh_of_processes(text, devices_each), process) for process in range(len(shares))] == shares


def test_devices_across_the_rows_are_refused():
    with pytest.raises(UserError, match="devices of process 0 lie across the mesh data=4, pipe=1, expert=3"):
        mesh.share_of_rows(mesh_of_processes("data=4,expert=3", 8), 0)


@pytest.mark.parametrize(
    "text, said",
    [
        ("data=2,expert=0", "at least 1"),
        ("data=2x2", "at least 1"),
        ("expert=2x", "at least 1"),
        ("data=-1,expert=-1", "only one"),
        ("date=2", "did you mean 'data'"),
        ("data=3", "must multiply to 8"),
    ],
)
def test_what_is_not_a_mesh(text, said):
    with pytest.raises(UserError, match=said):
        mesh.resolve(text, 8)


def test_impossible_meshes_name_the_nearest_choice():
    with pytest.raises(UserError, match="nearest size is expert=64"):
        mesh.check(mesh.parse("expert=48"), ModelConfig(), {})
    with pytest.raises(UserError, match="nearest is batch_size=24"):
        mesh.check(mesh.parse("data=2,expert=2x2"), ModelConfig(), {"batch_size": 22, "microbatch_size": None})
    mesh.check(mesh.parse("data=2,expert=2x2"), ModelConfig(), {"batch_size": 16})
