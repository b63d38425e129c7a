"""python -m pallas_kernels.tune OP [OP ...]: measures tile choices at the shapes of an op, on this GPU, and writes data/<device>.json.
OP is one of those of tuning.OPS, or all."""

import argparse
import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp

from pallas_kernels import aot, bench, tuning
from pallas_kernels.grouped_bf16 import hopper as bf16
from pallas_kernels.grouped_bf16 import shapes as bf16_shapes
from pallas_kernels.grouped_matmul import hopper as grouped
from pallas_kernels.grouped_matmul import shapes as grouped_shapes
from pallas_kernels.matmul import hopper as dense
from pallas_kernels.matmul import shapes as dense_shapes
from pallas_kernels.platform import device_kind, device_sms
from pallas_kernels.tuning import Case
from pallas_kernels.wgrad import hopper as wgrad
from pallas_kernels.wgrad import shapes as wgrad_shapes


def cases(op):
    """Those that `tuning.choose` tells apart, each with the number of rows of `a` in all."""
    if op == "matmul":
        return [(Case(op, m, n, k), m) for m, n, k in dense_shapes.MNK if m in (64, 128, 4096)]
    if op == "grouped_matmul":
        shapes = grouped_shapes.GROUPED + grouped_shapes.DECODE
        return [(Case(op, rows, n, k, groups), groups * rows) for groups, rows, n, k in shapes if rows != 4096]
    if op == "masked_matmul":  # m: the expected count
        return [(Case(op, mean, n, k, groups), rows) for groups, mean, rows, n, k in grouped_shapes.MASKED]
    if op == "wgrad":
        return [(Case(op, n, k, tokens), n) for n, k, tokens in wgrad_shapes.DENSE]
    if op == "grouped_bf16":
        return [(Case(op, rows, n, k, groups), groups * rows) for groups, rows, n, k, _ in bf16_shapes.MATMUL]
    if op == "grouped_bf16_wgrad":
        return [(Case(op, n, k, rows, groups), groups * rows) for groups, rows, n, k in bf16_shapes.WGRAD]
    return [(Case(op, n, k, tokens, groups), n) for groups, tokens, n, k in wgrad_shapes.GROUPED]


def build(case, rows):
    """The kernel of a case, a function of operands and config, and random operands."""
    op, m, n, k, groups = case
    if op == "matmul":
        return dense.fp8_matmul, (bench.tiles(0, m, k), bench.blocks(1, n, k))
    if op == "grouped_matmul":
        return grouped.grouped_fp8_matmul, (bench.tiles(0, rows, k), bench.blocks(1, groups, n, k), jnp.full(groups, m, jnp.int32))
    if op == "masked_matmul":
        counts = jnp.linspace(0.7 * m, 1.3 * m, groups).astype(jnp.int32)
        return grouped.masked_fp8_matmul, (bench.tiles(0, groups, rows, k), bench.blocks(1, groups, n, k), counts)
    if op == "grouped_bf16":
        transposed = next(case[-1] for case in bf16_shapes.MATMUL if case[:4] == (groups, m, n, k))
        x, w = bench.normal(0, rows, k), bench.normal(1, groups, *((n, k) if transposed else (k, n)))
        return functools.partial(bf16.grouped_bf16_matmul, transposed=transposed), (x, w, jnp.full(groups, m, jnp.int32))
    if op == "grouped_bf16_wgrad":
        return bf16.grouped_bf16_wgrad, (bench.normal(0, rows, m), bench.normal(1, rows, n), jnp.full(groups, k, jnp.int32))
    operands = bench.tiles(0, m, groups * k), bench.tiles(1, n, groups * k)
    if op == "wgrad":
        return wgrad.fp8_wgrad, operands
    return wgrad.grouped_fp8_wgrad, (*operands, jnp.full(groups, k, jnp.int32))


_built = {}  # the case at hand, in each process


def measure(task):
    """[(microseconds, bytes spilled, config)] of every config of a task; what does not run is said and left out."""
    (case, rows), configs, num_sms = task
    if case not in _built:
        _built.clear()  # first: two cases may not fit
        _built[case] = build(case, rows)
    function, operands = _built[case]
    times = []
    for config in configs:
        try:
            with aot.kernels_compiled() as kernels:
                kernel = bench.compiled(functools.partial(function, config=config, num_sms=num_sms), *operands)
            us = bench.microseconds(kernel, *operands, calls=5)
            times.append((us, sum(kernel.spilled_bytes for kernel in kernels), config))
        except Exception as error:
            print(f"{case}: {config} does not run: {type(error).__name__}: {error}"[:500], flush=True)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="+", choices=(*tuning.OPS, "all"))
    parser.add_argument("--num-sms", type=int, default=None, help="SMs that the kernels may use; all by default")
    arguments = parser.parse_args()
    bench.require_hopper()
    num_sms = arguments.num_sms or device_sms()
    ops = tuning.OPS if "all" in arguments.ops else arguments.ops
    tasks = []
    for case, rows in sorted((case for op in ops for case in cases(op)), key=lambda case: -case[0].m * case[0].groups):
        configs = tuning.candidates(case.op, case.m) + tuning.more_candidates(case.op, case.m)
        part = 4 if case.groups == 1 else len(configs)  # large operands in one process only
        tasks += [((case, rows), configs[i : i + part], num_sms) for i in range(0, len(configs), part)]

    times = {case: [] for (case, _), *_ in tasks}
    for ((case, _), *_), result in bench.in_processes(measure, tasks):
        if isinstance(result, Exception):
            print(f"{case}: {type(result).__name__}: {result}"[:500], flush=True)
            continue
        times[case] += result
        for us, spilled, config in result:
            print(f"{case}: {us:.2f} us, {spilled} bytes spilled, {config}", flush=True)
    file = tuning.data_file(device_kind())
    choices = json.loads(file.read_text())["choices"] if file.exists() else []
    choices = [entry for entry in choices if (entry["op"], entry["num_sms"]) not in {(op, num_sms) for op in ops}]
    for case, measured in times.items():
        if not measured:
            sys.exit(f"{case}: nothing could be measured; nothing was written")
        us, _, config = min(measured, key=lambda row: row[0] * (1.01 if row[1] else 1))  # spills are not worth a hundredth
        choices.append(case._asdict() | {"num_sms": num_sms, "us": round(us, 2), "config": dataclasses.asdict(config)})
    choices.sort(key=lambda entry: (tuning.OPS.index(entry["op"]), entry["num_sms"], entry["groups"], entry["m"], entry["n"], entry["k"]))
    file.write_text(json.dumps({"device": device_kind(), "jax": jax.__version__, "choices": choices}, indent=1) + "\n")


if __name__ == "__main__":
    main()
