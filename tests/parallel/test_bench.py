"""What the benchmark of several GPUs makes of a profile, and of steps that did not happen."""

import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.parallel import bench, profiles


def event(start, end, name, op=""):
    return profiles.Event(start * 1e6, end * 1e6, name, op)


def test_exposed_communication():
    """One device: a product from 0 to 4 and one from 6 to 9; something is sent from 3 to 6, of an operation that is not in the program's
    text, and from 7 to 8, of none."""
    compute = [event(0, 4, "gemm", "dot.1"), event(6, 9, "gemm", "dot.2")]
    sends = [event(3, 6, "ncclDevKernel_SendRecv", "all-to-all.1"), event(7, 8, "ncclDevKernel_SendRecv")]
    groups = {"dot.1": "F", "dot.2": "B"}
    busy = profiles.busy([profiles.kernels_of(sorted(compute + sends), groups.get)])
    assert busy["F"] == pytest.approx((3, 2, 6)) and busy["B"] == pytest.approx((1, 0, 3))


def test_measured_times():
    """Attention is two kernels an execution; of the all-to-alls one carries half of what the other does, and one nearly nothing."""
    text = """
  %a2a.1 = ((bf16[2048,1024]{1,0}), bf16[2048,1024]{1,0}) all-to-all-start(%x), channel_id=1
  %done.1 = bf16[2048,1024]{1,0} all-to-all-done(%a2a.1)
  %a2a.2 = ((bf16[4096,1024]{1,0}), bf16[4096,1024]{1,0}) all-to-all-start(%y), channel_id=2
  ROOT %done.2 = bf16[4096,1024]{1,0} all-to-all-done(%a2a.2)
  %a2a.3 = ((f32[64,8]{1,0}), f32[64,8]{1,0}) all-to-all-start(%z), channel_id=3
"""
    events = [
        event(0, 1, "softmax", "attention"),
        event(1, 3, "dq", "attention"),
        event(3, 4, "softmax", "attention"),
        event(4, 6, "dq", "attention"),
    ]
    events += [event(0, 3, "ncclDevKernel", "other"), event(3, 6, "ncclDevKernel", "other"), event(6, 6.1, "ncclDevKernel", "other")]
    lines = profiles.measured_times(events, text, 2.0).splitlines()
    assert 'costs { name: "attention" cost_us: 3000.0 }' in lines
    assert 'latencies { source: "a2a.1" target: "done.1" latency_us: 4000.0 }' in lines
    assert 'latencies { source: "a2a.2" target: "done.2" latency_us: 8000.0 }' in lines
    assert not any("a2a.3" in line for line in lines)


def test_void_steps_have_no_speed():
    bench.check_room([0.7, 1.0], 1.26, "measured")
    with pytest.raises(UserError, match=r"2 of 3 measured steps are void: up to 1.50 times .* buffers of 1.26 hold .* --size 1.95"):
        bench.check_room([1.2, 1.5, 0.9], 1.26, "measured")
