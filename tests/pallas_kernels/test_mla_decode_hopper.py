"""The Hopper kernel of MLA decode: its schedule, its results in the GPU interpreter, its lowering and machine code, and on a GPU itself."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import aot, mla_decode
from pallas_kernels.mla_decode import hopper
from pallas_kernels.mla_decode.schedule import BLOCK, MERGING, MIN_SHARE, SETUP, make_schedule
from pallas_kernels.mla_decode.shapes import BENCHMARK, COMPILED, Shape
from tests.pallas_kernels.test_mla_decode import SCALE, assert_matches, attend_float64, make_case

# ---- schedule ----

schedule_of = jax.jit(make_schedule, static_argnames="num_parts")


@pytest.mark.parametrize("num_parts", [7, 132])
@pytest.mark.parametrize("lengths", [[1], [163840], [0, 0, 500, 0], "ragged"])
def test_schedule_covers_every_block_once(lengths, num_parts):
    lengths = np.random.default_rng(0).integers(0, 20000, 57) if lengths == "ragged" else np.array(lengths)
    bounds, pieces = (np.asarray(x) for x in schedule_of(lengths, num_parts=num_parts))
    blocks = np.maximum(-(-lengths // BLOCK), 1)
    visits = [np.zeros(n, int) for n in blocks]
    slots: list[list[int]] = [[] for _ in blocks]
    begun = np.zeros(len(blocks), int)
    largest = 0
    for part in range(num_parts):
        (first, low0), (last, high1) = bounds[part], bounds[part + 1]
        work = 0
        for i, b in enumerate(range(first, last + (high1 > 0))):  # as the kernel walks them
            low, high = low0 if i == 0 else 0, high1 if b == last else blocks[b]
            assert 0 <= low <= high <= blocks[b]
            visits[b][low:high] += 1
            begun[b] += 1
            work += high - low + SETUP
            slots[b].append(2 * part + (i > 0))
        largest = max(largest, work)
    assert all((v == 1).all() for v in visits)
    assert (begun == pieces[:, 0]).all()  # a sequence without tokens is visited too: someone writes its zeros
    for b, (count, first_slot) in enumerate(pieces):
        expected = [first_slot if i == 0 else 2 * (first_slot // 2 + i) for i in range(count)]
        if count > 1:
            assert slots[b] == expected
    total = (blocks + SETUP).sum()
    assert largest <= max(-(-total // num_parts), MIN_SHARE) + MERGING + SETUP


@pytest.mark.parametrize("length,num_parts", [(1024, 66), (4096, 66), (4096, 33), (8192, 66), (16384, 132)])
def test_equal_sequences_are_not_split_where_that_costs_little(length, num_parts):
    bounds, pieces = schedule_of(jnp.full(128, length), num_parts=num_parts)
    assert (np.asarray(pieces)[:, 0] == 1).all()
    largest = np.diff(np.asarray(bounds)[:, 0]).max() * (length // BLOCK + SETUP)
    assert largest <= -(-128 * (length // BLOCK + SETUP) // num_parts) + MERGING


def test_a_single_long_sequence_fills_the_device():
    bounds, pieces = schedule_of(jnp.array([131072]), num_parts=66)
    assert int(pieces[0, 0]) >= 64
    assert int(np.diff(np.asarray(bounds)[:, 1]).max()) <= -(-(1024 + SETUP) // 66)


# ---- interpreter ----


@pytest.fixture
def interpreter(monkeypatch):
    """The kernel on a CPU. The interpreter of jax 0.12 does not know how to store to an accumulator; a plain store does the same."""
    from jax._src.pallas.mosaic_gpu import primitives
    from jax._src.state.primitives import swap_p

    tree = jax.tree_util.tree_structure(())
    monkeypatch.setattr(primitives, "wgmma_accumulator_store", lambda ref, value: swap_p.bind(ref, value, tree=tree))
    return jax.jit(
        functools.partial(hopper.mla_decode, softmax_scale=SCALE, interpret=plgpu.InterpretGPUParams()),
        static_argnames=("num_sms", "out_dtype"),
    )


# Where one key outweighs all others, the largest weight of a row is rounded to bfloat16 (it is 1 only where the reference is the row's
# maximum), and then the output: 2^-9 of it each.
TOLERANCE = {"growing_scores": 2 * 2**-9}
INTERPRETED = {
    "split_verify_2": (dict(lengths=[800, 3, 0, 64], heads=5, num_queries=2), 6),
    "growing_scores": (dict(lengths=[420, 130], heads=3, growth=0.2), 2),
    "fp8_16_rows_split_verify_2": (dict(lengths=[800, 3, 0, 64], heads=5, num_queries=2, layout="fp8"), 6),
    "fp8_32_rows_split_verify_2": (dict(lengths=[800, 3, 0, 64], heads=9, num_queries=2, layout="fp8"), 6),
    "fp8_many_rows_split": (dict(lengths=[800, 1, 0], heads=40, layout="fp8"), 4),
}


@pytest.mark.parametrize("case", INTERPRETED)
def test_interpreted_kernel_matches_float64(case, interpreter):
    arguments, num_sms = INTERPRETED[case]
    *args, keys = make_case(0, **arguments)
    pieces = schedule_of(args[3], num_parts=num_sms // -(-args[0].shape[1] * args[0].shape[2] // 64)).pieces
    assert int(pieces[:, 0].max()) > 1 or "split" not in case
    got = interpreter(*args, num_sms=num_sms, out_dtype=jnp.bfloat16)
    assert_matches(got, attend_float64(args[0], keys), TOLERANCE.get(case, 3e-3))


def test_interpreted_kernel_float32_output_two_tiles_and_a_bad_page(interpreter):
    *args, keys = make_case(1, [140, 20], heads=20, num_queries=4)
    args[2][1, 0] = 999  # outside the pool: the sequence's result is worthless, the other's is not, and nothing else is read
    out, lse = interpreter(*args, num_sms=2, out_dtype=jnp.float32)
    assert out.dtype == jnp.float32
    want_out, want_lse = attend_float64(args[0], keys)
    assert_matches((out[:1], lse[:1]), (want_out[:1], want_lse[:1]))


# ---- compilation ----


def specs(shape: Shape, num_pages=4096):
    pool = jax.ShapeDtypeStruct((num_pages, 64, 656), jnp.uint8) if shape.fp8 else jax.ShapeDtypeStruct((num_pages, 64, 576), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((shape.batch, shape.queries, shape.heads, 576), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((shape.batch, -(-shape.length // 64)), jnp.int32)
    return q, pool, table, jax.ShapeDtypeStruct((shape.batch,), jnp.int32)


decode = jax.jit(functools.partial(mla_decode, softmax_scale=SCALE, implementation="hopper"), static_argnames="out_dtype")
SAMPLE = (Shape(64, 3, 20, 4096), Shape(128, 1, 128, 4096, fp8=True), Shape(128, 1, 16, 4096, fp8=True))


@pytest.mark.parametrize("shape", SAMPLE, ids=str)
def test_lowers_for_a_gpu(shape):
    text = decode.trace(*specs(shape)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 2  # attend and merge


@pytest.mark.slow
@pytest.mark.parametrize("shape", COMPILED + BENCHMARK, ids=str)
def test_lowers_for_a_gpu_all_shapes(shape):
    decode.trace(*specs(shape)).lower(lowering_platforms=("cuda",))


@pytest.mark.skipif(not aot.available(), reason="needs the dependency group aot")
@pytest.mark.parametrize(
    "shape",
    [Shape(64, 1, 128, 4096), Shape(128, 2, 128, 4096), *(Shape(128, 1, heads, 4096, fp8=True) for heads in (16, 32, 128))],
    ids=str,
)
def test_machine_code_does_not_spill(shape):
    with aot.kernels_compiled() as kernels:
        decode.lower(*aot.on_h200(specs(shape))).compile()
    assert len(kernels) == 2
    assert not any(kernel.serialized for kernel in kernels)
    assert max(kernel.spilled_bytes for kernel in kernels) == 0


# ---- on the device ----

# Lengths compile nothing, heads and new tokens do: what differs in lengths only is one batch.
GPU_CASES = {
    "heads_1": dict(lengths=[1, 20, 140], heads=1),
    "heads_3_verify_2": dict(lengths=[20, 140, 0], heads=3, num_queries=2),
    "heads_9_verify_4": dict(lengths=[140, 20, 64, 2, 3, 1, 4], heads=9, num_queries=4),
    "heads_16_verify_2": dict(lengths=[3700, 0, 1, 129, 16000], heads=16, num_queries=2),
    "heads_16_verify_4": dict(lengths=[16384, 0, 1, 4096, 77], heads=16, num_queries=4),
    "heads_63": dict(lengths=[140, 0, 64, 65], heads=63),
    "heads_128": dict(lengths=[140, 0, 20000, 64], heads=128),
    "heads_128_verify_2": dict(lengths=list(np.random.default_rng(2).integers(0, 600, 64)), heads=128, num_queries=2),
    "growing_scores": dict(lengths=[3000, 700, 20], heads=128, growth=0.05),
    "batch_256": dict(lengths=[163840, *np.random.default_rng(3).integers(0, 200, 255)], heads=8),
}


def run_on_the_device(*args, **options):
    return jax.jit(functools.partial(mla_decode, softmax_scale=SCALE, implementation="hopper", **options))(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bfloat16", "fp8"])
@pytest.mark.parametrize("case", GPU_CASES)
def test_on_the_device(case, layout):
    *args, keys = make_case(0, layout=layout, **GPU_CASES[case])
    assert_matches(run_on_the_device(*args), attend_float64(args[0], keys), TOLERANCE.get(case, 3e-3))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bfloat16", "fp8"])
def test_on_the_device_few_thread_blocks_and_float32(layout):
    *args, keys = make_case(1, layout=layout, **GPU_CASES["heads_128_verify_2"])
    out, lse = run_on_the_device(*args, out_dtype=jnp.float32, num_sms=20)
    assert out.dtype == jnp.float32
    assert_matches((out, lse), attend_float64(args[0], keys))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 32])
def test_on_the_device_repeats_have_the_same_bits(heads):
    """Few rows over FP8 pages: four warps hold the same scores, and loads from a page have to be waited for before it is overwritten."""
    *args, _ = make_case(4, [3700, 0, 20, 140, 64, 129, 1, 16000], heads=heads, layout="fp8")
    run = jax.jit(functools.partial(mla_decode, softmax_scale=SCALE, implementation="hopper", out_dtype=jnp.float32))
    first, *others = ([np.asarray(x).view(np.uint32) for x in run(*args)] for _ in range(20))
    for other in others:
        np.testing.assert_array_equal(other[0], first[0])
        np.testing.assert_array_equal(other[1], first[1])


@pytest.mark.gpu
def test_on_the_device_lengths_do_not_recompile():
    q, pool, page_table, _, _ = make_case(3, [4096, 4096], heads=128)
    run = jax.jit(functools.partial(mla_decode, softmax_scale=SCALE, implementation="hopper"))
    pool_rows = pool[page_table].reshape(2, -1, 576).astype(np.float64)
    for lengths in ([4096, 4096], [1, 4000], [0, 300]):
        keys = [rows[:n] for rows, n in zip(pool_rows, lengths)]
        assert_matches(run(q, pool, page_table, np.array(lengths, np.int32)), attend_float64(q.astype(ml_dtypes.bfloat16), keys))
    assert run._cache_size() == 1
