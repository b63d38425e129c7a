"""What the benchmark of several GPUs makes of a profile."""

import types

import pytest

from dsv3_jax.parallel import bench


def event(start, end, name, op=None):
    stats = [] if op is None else [("hlo_op", op)]
    return types.SimpleNamespace(start_ns=start * 1e6, duration_ns=(end - start) * 1e6, name=name, stats=stats)


def test_exposed_communication(monkeypatch):
    """One device: a product from 0 to 4 and one from 6 to 9; something is sent from 3 to 6, of an operation that is not in the program's
    text, and from 7 to 8, of none."""
    compute = [event(0, 4, "gemm", "dot.1"), event(6, 9, "gemm", "dot.2")]
    sends = [event(3, 6, "ncclDevKernel_SendRecv", "all-to-all.1"), event(7, 8, "ncclDevKernel_SendRecv")]
    lines = [types.SimpleNamespace(name=f"Stream #{i}", events=events) for i, events in enumerate((compute, sends))]
    plane = types.SimpleNamespace(lines=[*lines, types.SimpleNamespace(name="XLA Ops", events=compute)])
    groups = {"dot.1": "F", "dot.2": "B"}
    busy = bench.busy([bench._kernels(plane, groups.get)])
    assert busy["F"] == pytest.approx((3, 2, 6)) and busy["B"] == pytest.approx((1, 0, 3))
