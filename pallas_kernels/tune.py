"""python -m pallas_kernels.tune OP [OP ...]: measures every candidate tile choice at the shapes of an op, on this GPU, and writes
data/<device>.json. OP is one of matmul, grouped_matmul, masked_matmul, wgrad, grouped_wgrad, or all."""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp

from pallas_kernels import bench, tuning
from pallas_kernels.grouped_matmul import hopper as grouped
from pallas_kernels.grouped_matmul import shapes as grouped_shapes
from pallas_kernels.matmul import hopper as dense
from pallas_kernels.matmul import shapes as dense_shapes
from pallas_kernels.platform import device_kind, device_sms
from pallas_kernels.wgrad import hopper as wgrad
from pallas_kernels.wgrad import shapes as wgrad_shapes


def problems(op):
    """(m, n, k, function of operands and config, operands) as `tuning.choose` will be asked for them."""
    if op == "matmul":
        for m, n, k in dense_shapes.MNK:
            yield m, n, k, dense.fp8_matmul, (bench.tiles(0, m, k), bench.blocks(1, n, k))
    elif op == "grouped_matmul":
        for g, rows, n, k in grouped_shapes.GROUPED:
            sizes = jnp.full(g, rows, jnp.int32)
            yield rows, n, k, grouped.grouped_fp8_matmul, (bench.tiles(0, g * rows, k), bench.blocks(1, g, n, k), sizes)
    elif op == "masked_matmul":
        for g, mean, rows, n, k in grouped_shapes.MASKED[:2]:  # the fuller ones: with few rows every choice waits for its weights
            operands = bench.tiles(0, g, rows, k), bench.blocks(1, g, n, k), jnp.full(g, mean, jnp.int32)
            yield min(rows, 128), n, k, grouped.masked_fp8_matmul, operands
    elif op == "wgrad":
        for n, k, tokens in wgrad_shapes.DENSE:
            yield n, k, tokens, wgrad.fp8_wgrad, (bench.tiles(0, n, tokens), bench.tiles(1, k, tokens))
    elif op == "grouped_wgrad":
        for g, tokens, n, k in wgrad_shapes.GROUPED:
            operands = bench.tiles(0, n, g * tokens), bench.tiles(1, k, g * tokens), jnp.full(g, tokens, jnp.int32)
            yield n, k, tokens, wgrad.grouped_fp8_wgrad, operands


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="+", choices=(*tuning.OPS, "all"))
    parser.add_argument("--num-sms", type=int, default=None, help="SMs that the kernels may use; all by default")
    arguments = parser.parse_args()
    bench.require_hopper()
    num_sms = arguments.num_sms or device_sms()
    file = tuning.data_file(device_kind())
    choices = json.loads(file.read_text())["choices"] if file.exists() else []
    for op in tuning.OPS if "all" in arguments.ops else arguments.ops:
        choices = [entry for entry in choices if (entry["op"], entry["num_sms"]) != (op, num_sms)]
        for m, n, k, function, operands in problems(op):
            us, config = min((measure(function, operands, c, num_sms), i, c) for i, c in enumerate(tuning.candidates(op, m)))[::2]
            entry = {"op": op, "m": m, "n": n, "k": k, "num_sms": num_sms, "us": round(us, 2), "config": dataclasses.asdict(config)}
            print(json.dumps(entry), flush=True)
            choices.append(entry)
        file.write_text(json.dumps({"device": device_kind(), "jax": jax.__version__, "choices": choices}, indent=1) + "\n")


def measure(function, operands, config, num_sms):
    return bench.microseconds(lambda *args: function(*args, config=config, num_sms=num_sms), *operands, calls=5)


if __name__ == "__main__":
    main()
