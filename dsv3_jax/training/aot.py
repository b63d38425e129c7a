"""The training step compiled for Hopper GPUs that need not exist: that it compiles, how long that takes, what memory a device needs.

    python train.py deepseek_v3 --mesh data=2,pipe=16,expert=64 --batch-ramp-from 4096 --dry-run --aot

The program is the one that would run, kernels included, with two exceptions: cuDNN cannot be compiled without a GPU, so that attention is
an empty kernel of the same operands, results and workspace; and without a GPU XLA chooses the algorithms of its own products blindly.
Needs the dependency group `aot`.
"""

import contextlib
import math
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.config import TrainConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model import Decoder, fused_attention
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.precision import recipe
from dsv3_jax.training import dry_run
from dsv3_jax.training.pipeline import check_mesh
from dsv3_jax.training.schedules import Scheduled
from dsv3_jax.training.step import Trainer
from pallas_kernels import aot

DEVICE_BYTES = 80 * 10**9  # of the smallest Hopper cards that this is for


def compile_step(config: TrainConfig) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """The compiled step on config.mesh with first buffers, and the seconds that tracing and compiling took."""
    if not aot.available():
        raise UserError("--aot needs the compiler for CUDA: install the dependency group aot (uv sync --group aot)")
    sizes = meshes.parse(config.mesh)
    if -1 in sizes.values():
        raise UserError(f"--aot needs the size of every mesh axis, and {config.mesh!r} leaves one open")
    check_mesh(config, sizes)
    mesh = meshes.make(config.mesh, aot.hopper(math.prod(sizes.values())))
    decoder = Decoder(config.model, recipe("bf16" if config.precision == "auto" else config.precision), remat=config.remat)
    trainer = Trainer(decoder, config, mesh)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    state = jax.tree.map(place, jax.eval_shape(trainer.init, decoder.abstract_params()), trainer.shardings)
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.sequence_length + 1), jnp.int32, sharding=trainer.batch_sharding)
    with attention_without_cudnn():
        start = time.perf_counter()
        lowered = trainer.jitted(trainer.buffers.size).lower(state, {"tokens": tokens}, Scheduled(1e-4, 0.3, 1e-3))
        traced = time.perf_counter()
        # Or each product's candidates would be compiled one by one; and fusions with a product have no default, so that there are none.
        compiled = lowered.compile({"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False})
    return compiled, {"tracing": traced - start, "compiling": time.perf_counter() - traced}


def report(config: TrainConfig) -> str:
    """What `compile_step` found, as text: seconds, bytes of a device by kind."""
    compiled, seconds = compile_step(config)
    sizes, memory = meshes.parse(config.mesh), compiled.memory_analysis()
    kinds = dry_run.bytes_a_device(config, sizes)
    kept = sum(count for kind, count in kinds.items() if kind.startswith(("masters", "moments", "moving average")))
    about = kinds.pop(dry_run.COMPUTING)
    of_step = {kind: count for kind, count in kinds.items() if not kind.startswith(("masters", "moments", "moving average"))}
    together = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    rows = {
        "arguments (masters, moments, batch)": memory.argument_size_in_bytes,
        "results that are not arguments": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        **{f"  of it {kind}": count for kind, count in of_step.items()},
        "  the rest: what is computed with, sends": memory.temp_size_in_bytes - sum(of_step.values()),
        "together": together,
        "as --dry-run without --aot estimates it": sum(kinds.values()) + about,
    }
    assert memory.argument_size_in_bytes >= kept
    return "\n".join(
        [
            f"compiled for {math.prod(sizes.values())} Hopper GPUs: traced in {seconds['tracing']:.0f} s, compiled in "
            f"{seconds['compiling']:.0f} s; first buffers of the exchange; cuDNN's attention replaced by an empty kernel",
            "bytes a device:",
            *(f"  {kind:<52} {count:>18,}" for kind, count in rows.items()),
            f"{'fits' if together <= DEVICE_BYTES else 'DOES NOT FIT'} into {DEVICE_BYTES:,} bytes",
        ]
    )


@contextlib.contextmanager
def attention_without_cudnn() -> Iterator[None]:
    """Inside, attention on a GPU is an empty kernel with cuDNN's operands, results and workspace."""
    saved = fused_attention._cudnn, fused_attention._cudnn_backward
    fused_attention._cudnn, fused_attention._cudnn_backward = _forward, _backward
    try:
        yield
    finally:
        fused_attention._cudnn, fused_attention._cudnn_backward = saved


def _forward(q, k, v, bias, *, scale, causal):
    rows, length, heads, _ = q.shape
    lse = jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)
    return _empty_kernel([q, k, v] + ([] if bias is None else [bias]), (jax.ShapeDtypeStruct((*q.shape[:3], v.shape[-1]), v.dtype), lse))


def _backward(q, k, v, bias, out, lse, d_out, *, scale):
    workspace = jax.ShapeDtypeStruct(q.shape, jnp.float32)  # where the query gradients are summed
    operands = [q, k, v, out, lse, d_out] + ([] if bias is None else [bias])
    like = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))
    return _empty_kernel(operands, (*like, workspace))[:3]


@jax.named_scope("in_place_of_cudnn")
def _empty_kernel(operands, out_type):
    return plgpu.kernel(lambda *refs: None, out_type=out_type, grid=(1,), grid_names=("x",))(*operands)
