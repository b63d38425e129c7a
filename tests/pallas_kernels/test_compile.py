"""What can be checked of the kernels without a GPU: every real shape lowers, and no tile choice spills registers."""

import functools

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels import aot, tuning
from pallas_kernels.gemm import SMEM_BYTES, Problem, gemm
from pallas_kernels.grouped_bf16 import shapes as bf16_shapes
from pallas_kernels.grouped_matmul import shapes as grouped_shapes
from pallas_kernels.grouped_matmul.hopper import grouped_fp8_matmul, masked_fp8_matmul
from pallas_kernels.matmul import shapes as dense_shapes
from pallas_kernels.quantize import shapes as quantize_shapes
from pallas_kernels.wgrad import shapes as wgrad_shapes

BF16 = jnp.bfloat16


@pytest.fixture(autouse=True)
def choices_of_an_h200(monkeypatch):
    """What is compiled for an H200 has the tile choices measured on one."""
    monkeypatch.setattr(tuning, "device_kind", lambda: "NVIDIA H200")


needs_compiler = pytest.mark.skipif(not aot.available(), reason="needs the dependency group aot")


def array(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


def tiles(*shape):
    return jax.eval_shape(pk.quantize_tiles, array(*shape))


def blocks(*shape):
    return jax.eval_shape(pk.quantize_blocks, array(*shape))


def sizes(groups):
    return array(groups, dtype=jnp.int32)


def cases():
    """(name, function, arguments) of every op at every shape of its shapes.py."""
    for m, n, k in dense_shapes.MNK:
        yield f"dense-{m}-{n}-{k}", pk.fp8_matmul, (tiles(m, k), blocks(n, k))
    for g, rows, n, k in grouped_shapes.GROUPED:
        yield f"grouped-{g}x{rows}-{n}-{k}", pk.grouped_fp8_matmul, (tiles(g * rows, k), blocks(g, n, k), sizes(g))
    for g, _, rows, n, k in grouped_shapes.MASKED:
        yield f"masked-{g}x{rows}-{n}-{k}", pk.masked_fp8_matmul, (tiles(g, rows, k), blocks(g, n, k), sizes(g))
    for n, k, tokens in wgrad_shapes.DENSE:
        yield f"wgrad-{n}-{k}-{tokens}", accumulate(pk.fp8_wgrad), (tiles(n, tokens), tiles(k, tokens), array(n, k, dtype=jnp.float32))
    for g, rows, n, k in wgrad_shapes.GROUPED:
        operands = tiles(n, g * (rows + 128)), tiles(k, g * (rows + 128)), sizes(g)
        yield f"grouped-wgrad-{g}x{rows}-{n}-{k}", accumulate(pk.grouped_fp8_wgrad), (*operands, array(g, n, k, dtype=jnp.float32))
    for g, rows, n, k, transposed in bf16_shapes.MATMUL:
        op = functools.partial(pk.grouped_bf16_matmul, transposed=transposed)
        yield f"bf16-{g}x{rows}-{n}-{k}", op, (array(g * rows, k), array(g, *((n, k) if transposed else (k, n))), sizes(g))
    for g, rows, n, k in bf16_shapes.WGRAD:
        yield f"bf16-wgrad-{g}x{rows}-{n}-{k}", pk.grouped_bf16_wgrad, (array(g * rows, n), array(g * rows, k), sizes(g))
    for rows, cols in quantize_shapes.ROWS_COLS:
        yield f"quantize-{rows}-{cols}", pk.quantize_tiles, (array(rows, cols),)
        yield f"swiglu-{rows}-{cols}", pk.swiglu_quantize, (array(rows, cols),)
        yield f"rmsnorm-{rows}-{cols}", pk.rmsnorm_quantize, (array(rows, cols), array(cols))
        yield f"requantize-{rows}-{cols}", pk.requantize_transposed, (tiles(rows, cols), sizes(4))
        yield f"both-{rows}-{cols}", pk.quantize_both, (array(rows, cols),)
        yield f"swiglu-both-{rows}-{cols}", pk.swiglu_quantize_both, (array(rows, cols),)
        yield f"swiglu-backward-{rows}-{cols}", pk.swiglu_backward, (tiles(rows, 2 * cols), array(rows, cols), array(rows), sizes(4))


def accumulate(op):
    return lambda *operands: op(*operands[:-1], accumulate=operands[-1])


CASES = {name: (function, arguments) for name, function, arguments in cases()}
# one of each kind of tile choice
SAMPLE = [
    *(f"dense-{m}-{n}-{k}" for m, n, k in [(64, 7168, 16384), (64, 4096, 7168), (64, 32768, 512), (128, 24576, 1536), (128, 7168, 2048)]),
    *("dense-4096-2112-7168", "dense-4096-7168-16384", "grouped-4x8192-4096-7168", "grouped-256x256-4096-7168", "masked-32x4096-4096-7168"),
    *("wgrad-7168-4096-8192", "grouped-wgrad-4x8192-4096-7168", "quantize-4096-7168", "swiglu-4096-7168", "rmsnorm-4096-7168"),
    *("bf16-24x8192-4096-1024", "bf16-24x8192-1024-4096", "bf16-64x6-2816-2048", "bf16-wgrad-24x8192-4096-1024"),
    *(f"{op}-4096-7168" for op in ("requantize", "both", "swiglu-both", "swiglu-backward")),
]


@pytest.mark.parametrize("name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_every_shape_lowers_for_cuda(name):
    function, arguments = CASES[name]
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@needs_compiler
@pytest.mark.parametrize("name", SAMPLE)
def test_no_register_spills(name):
    function, arguments = CASES[name]
    with aot.kernels_compiled() as kernels:
        jax.jit(function).lower(*aot.on_h200(arguments)).compile()
    assert len(kernels) == 1
    assert kernels[0].spilled_bytes == 0 and not kernels[0].serialized


@needs_compiler
def test_accumulation_is_in_place():
    function, arguments = CASES["grouped-wgrad-4x8192-4096-7168"]
    stats = jax.jit(function, donate_argnums=3).lower(*aot.on_h200(arguments)).compile().memory_analysis()
    assert stats.alias_size_in_bytes == 4 * 4096 * 7168 * 4 and stats.temp_size_in_bytes < 2**20


@needs_compiler
def test_codes_read_in_their_own_program_are_codes():
    """Of a conversion to e4m3 and the one back XLA makes nothing on a GPU, and the reference would quantise nothing there."""
    quantise = functools.partial(pk.quantize_tiles, implementation="reference")  # of blocks it keeps the codes in any case
    text = jax.jit(lambda x: quantise(x).dequantize()).lower(*aot.on_h200((array(256, 512),))).compile().as_text()
    assert "f8e4m3fn" in text


def test_no_row_tile_is_added_twice():
    """Where two CTAs share b and the row tiles are odd in number, the second of the last pair has no tile; once it repeated the first's."""
    assert tuning.choose("wgrad", 2112, 7168, 8192, 132).multicast == "b" and -(-2112 // 128) % 2 == 1
    arguments = tiles(2112, 8192), tiles(7168, 8192), array(2112, 7168, dtype=jnp.float32)
    jax.jit(accumulate(pk.fp8_wgrad)).trace(*arguments).lower(lowering_platforms=("cuda",))  # or gemm refuses it
    problem = Problem(7168, arguments[-1], units=17, unit=lambda i: None, accumulate=True)
    with pytest.raises(ValueError, match="17 row tiles for clusters of 2"):
        gemm(tuning.Config(128, 128, 2, "m", 2, "b"), problem, None, (), num_sms=4)


def test_masked_row_tiles_share_no_weights():
    """Neighbours may be of two groups: no choice has them share b, and one that did would be refused."""
    masked = [
        e for file in tuning.DATA.glob("*.json") for e in tuning.json.loads(file.read_text())["choices"] if e["op"] == "masked_matmul"
    ]
    configs = [tuning.Config(**e["config"]) for e in masked] + tuning.candidates("masked_matmul", 128)
    assert masked and all(config.cluster == 1 or config.multicast == "a" for config in configs)
    shared = functools.partial(masked_fp8_matmul, config=tuning.Config(128, 128, 2, "m", 2, "b"))
    with pytest.raises(ValueError, match="neighbouring row tiles may be of two groups"):
        jax.eval_shape(shared, tiles(2, 256, 256), blocks(2, 128, 256), sizes(2))


@pytest.mark.parametrize("op", tuning.OPS)
@pytest.mark.parametrize("m", [1, 100, 4096])
def test_candidates_fit_into_shared_memory(op, m):
    for config in tuning.candidates(op, m) + tuning.more_candidates(op, m):
        for dtype in (jnp.bfloat16,) if op == "grouped_bf16" else (jnp.bfloat16, jnp.float32):
            assert tuning.shared_memory(config, op, dtype) <= SMEM_BYTES


@pytest.mark.parametrize("file", sorted(tuning.DATA.glob("*.json")), ids=lambda file: file.stem)
def test_tune_would_find_every_choice(file):
    for entry in tuning.json.loads(file.read_text())["choices"]:
        op, m = entry["op"], entry["m"]
        assert tuning.Config(**entry["config"]) in tuning.candidates(op, m) + tuning.more_candidates(op, m), entry


@pytest.mark.parametrize("rows", [1, 8, 64, 100, 500, 4096])
def test_grouped_choices_store_rows_of_whole_lines(rows):
    """A TMA copy begins at a multiple of 128 bytes of SMEM, and the rows at a group's end are copied one by one."""
    for groups, n, k in [(16, 512, 256), (64, 2816, 2048), (64, 2048, 1408), (256, 4096, 7168), (256, 7168, 2048)]:
        config = tuning.choose("grouped_matmul", rows, n, k, 132, groups)
        assert config.staged(jnp.bfloat16) * 2 % 128 == 0
    narrow = tuning.Config(64, 32, 2)
    operands = tiles(100, 256), blocks(4, 128, 256), sizes(4)
    with pytest.raises(ValueError, match="rows of 128 bytes"):
        jax.eval_shape(lambda *x: grouped_fp8_matmul(*x, config=narrow), *operands)


def test_checked_in_choices_are_of_known_ops():
    for file in tuning.DATA.glob("*.json"):
        for entry in tuning.json.loads(file.read_text())["choices"]:
            assert entry["op"] in tuning.OPS
            tuning.Config(**entry["config"])


def test_every_dense_shape_has_a_measured_choice_of_its_kind():
    """The nearest one may be for another number of row tiles: 4096 x 7168 with 64 rows once took a tile of 128."""
    measured = {(e["m"], e["n"], e["k"]) for e in tuning._measured("NVIDIA H200") if e["op"] == "matmul" and e["num_sms"] == 132}
    assert measured >= {(m, n, k) for m in (64, 128, 4096) for n, k in dense_shapes.NK}


def test_any_number_of_rows_finds_a_choice_and_fewer_sms_the_same(monkeypatch):
    """Choices of one op, n and k hold for every m of the same kind of row tiles, for any number of SMs, and on a card without data."""
    entries = [
        {"op": "matmul", "m": m, "n": 7168, "k": 2048, "groups": 1, "num_sms": 132, "config": vars(tuning.Config(64, cols, 2))}
        for m, cols in ((64, 16), (128, 32), (4096, 64))
    ]
    monkeypatch.setattr(tuning, "_measured", lambda kind: entries)
    chosen = {m: tuning.choose("matmul", m, 7168, 2048, 112).tile_n for m in (1, 64, 100, 200, 3000, 100_000)}
    assert chosen == {1: 16, 64: 16, 100: 32, 200: 32, 3000: 64, 100_000: 64}
    assert tuning.choose("matmul", 700, 7168, 2048, 132) in tuning.candidates("matmul", 700)  # between the kinds: estimated


def test_a_card_without_data_uses_anothers():
    assert tuning._measured("NVIDIA H20") == tuning._measured("NVIDIA H100 80GB HBM3") != []
