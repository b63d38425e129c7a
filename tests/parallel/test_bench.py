"""What the benchmark of several GPUs makes of a profile, and of steps that did not happen."""

import jax
import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.parallel import bench, profiles
from dsv3_jax.parallel.schedule import build, simulate
from dsv3_jax.parallel.schedule_table import make_table


def event(start, end, name, op=""):
    return profiles.Event(start * 1e6, end * 1e6, name, op)


@pytest.mark.parametrize("what", ["exchange", "overlap", "step"])
def test_fp8_on_a_cpu_is_one_line(what):
    with pytest.raises(UserError, match="precision='fp8' needs an NVIDIA Hopper GPU"):
        bench.prepare([what, "--mesh", f"data={len(jax.devices())}", "--rows", "128"])


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


def test_ticks_of_a_pipeline():
    """Two ranks of 1f1b, a forward of 1 ms and a backward of 2 (two kernels), in lockstep: a tick ends when both ranks have ended, and 0.5
    ms for the rings later. After the first tick both work 3 ms on the output loss."""
    table = make_table(build("1f1b", num_ranks=2, num_microbatches=2, max_delayed=0))
    tick = "jit(step)/while/body/eval_jaxpr/"
    scopes = {f"a{k}": f"{tick}action/cond/branch_{k}_fun/F0/dot" for k in range(len(table.actions))}
    scopes |= {"loss": f"{tick}output_loss/cond/branch_1_fun/dot", "ring": f"{tick}dynamic_update_slice", "adam": "jit(step)/add"}
    costs = [{"F0": 1, "B0": 2}.get(name, 0) for name in table.actions]
    devices: list[list] = [[event(0, 5, "copy", "adam")], [event(0, 5, "copy", "adam")]]
    now = 5.0
    for number, row in enumerate(table.action):
        for device, kind in zip(devices, row):
            half = costs[kind] / 2
            device += [event(now, now + half, "gemm", f"a{kind}"), event(now + half, now + 2 * half, "nccl")] if half else []
        now += max(costs[kind] for kind in row)
        for device in devices:
            device += [event(now, now + 3, "gemm", "loss")] * (number == 0) + [
                event(now + 3 * (number == 0), now + 3 * (number == 0) + 0.5, "copy", "ring")
            ]
        now += 3.5 if number == 0 else 0.5
    found = profiles.pipelined(devices, [0, 1], scopes, table)
    lockstep = sum(max(costs[kind] for kind in row) for row in table.action)
    free = simulate(table.schedule, {"F": 1, "B": 2, "I": 1, "W": 1})
    assert found.costs == pytest.approx({"F": 1, "B": 2}) and found.loss == pytest.approx(3)
    assert found.took == pytest.approx(lockstep + 0.5 * len(table.action)) and found.bubble == pytest.approx([found.took - 6] * 2)
    assert found.lockstep[0] == pytest.approx(lockstep) and found.lockstep[1] == pytest.approx([lockstep - 6] * 2)
    assert found.free[0] == pytest.approx(free.makespan) and found.free[1] == pytest.approx(free.bubble)
    with pytest.raises(ValueError, match="rank 0 ran 3 actions where its schedule has 4"):
        profiles.pipelined([[e for e in devices[0] if e.op != "a1" or e.start > 6e6], devices[1]], [0, 1], scopes, table)


def test_void_steps_have_no_speed():
    bench.check_room([0.7, 1.0], 1.26, "measured")
    with pytest.raises(UserError, match=r"2 of 3 measured steps are void: up to 1.50 times .* buffers of 1.26 hold .* --size 1.95"):
        bench.check_room([1.2, 1.5, 0.9], 1.26, "measured")
