"""MLA decode and append against float64 numpy and an independent encoder; every implementation runs the same cases."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.mla_decode import mla_append, mla_decode

PAGE = 64
SCALE = 192**-0.5


def encode_fp8(latent):
    """FlashMLA's FP8 rows [N, 656] of latents [N, 576], written byte by byte with numpy and ml_dtypes only."""
    rows = np.zeros((len(latent), 656), np.uint8)
    for tile in range(4):
        x = latent[:, tile * 128 : (tile + 1) * 128].astype(np.float64)
        scale = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(x).max(-1, keepdims=True) / 448, 1e-4)))
        rows[:, tile * 128 : (tile + 1) * 128] = (x / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        rows[:, 512 + 4 * tile : 516 + 4 * tile] = scale.astype(np.float32).view(np.uint8)
    rows[:, 528:] = latent[:, 512:].astype(ml_dtypes.bfloat16).view(np.uint8)
    return rows


def decode_fp8(rows):
    scales = np.ascontiguousarray(rows[:, 512:528]).view(np.float32)
    codes = np.ascontiguousarray(rows[:, :512]).view(ml_dtypes.float8_e4m3fn)
    rope = np.ascontiguousarray(rows[:, 528:]).view(ml_dtypes.bfloat16)
    return np.concatenate([codes.astype(np.float64) * np.repeat(scales, 128, axis=1), rope.astype(np.float64)], axis=1)


def make_case(seed, lengths, *, heads, num_queries=1, width=576, layout="bfloat16", table_width=None, growth=0.0):
    """(q, pool, page_table, lengths, per-sequence float64 keys). Unused pages and slots are NaN, unused table entries far outside.
    growth: of keys from token to token, so that ever larger scores come."""
    rng = np.random.default_rng(seed)
    used = [-(-n // PAGE) for n in lengths]
    table_width = table_width or max(1, *used)
    num_pages = sum(used) + 3
    order = rng.permutation(num_pages).tolist()
    page_table = np.full((len(lengths), table_width), 2147480000, np.int32)
    if layout == "fp8":
        pool = np.full((num_pages, PAGE, 656), 0xFF, np.uint8)  # NaN codes, NaN scales, NaN bfloat16
    else:
        pool = np.full((num_pages, PAGE, width), np.nan, layout)
    keys = []
    for b, length in enumerate(lengths):
        rows = np.clip(rng.normal(size=(length, width)) / 10, -1, 1) * (1 + growth * np.arange(length)[:, None])
        rows = encode_fp8(rows) if layout == "fp8" else rows.astype(layout)
        page_table[b, : used[b]] = [order.pop() for _ in range(used[b])]
        positions = np.arange(length)
        pool[page_table[b, positions // PAGE], positions % PAGE] = rows
        keys.append(decode_fp8(rows) if layout == "fp8" else rows.astype(np.float64))
    q = np.clip(rng.normal(size=(len(lengths), num_queries, heads, width)), -4, 4)
    q = q.astype(np.float32 if layout == "float32" else ml_dtypes.bfloat16)
    return q, pool, page_table, np.array(lengths, np.int32), keys


def attend_float64(q, keys, value_width=512):
    """Every query by itself, in float64: (out [B, S_q, H, V], lse [B, S_q, H])."""
    B, num_queries, heads, _ = q.shape
    out, lse = np.zeros((B, num_queries, heads, value_width)), np.full((B, num_queries, heads), np.inf)
    for b in range(B):
        for i in range(num_queries):
            seen = keys[b][: max(0, len(keys[b]) - num_queries + i + 1)]
            if len(seen):
                scores = q[b, i].astype(np.float64) @ seen.T * SCALE
                top = scores.max(-1, keepdims=True)
                weights = np.exp(scores - top)
                out[b, i] = weights @ seen[:, :value_width] / weights.sum(-1, keepdims=True)
                lse[b, i] = top[:, 0] + np.log(weights.sum(-1))
    return out, lse


def assert_matches(got, expected, out_tolerance=3e-3, lse_tolerance=1e-5):
    (out, lse), (want_out, want_lse) = (np.asarray(x, np.float64) for x in got), expected
    assert np.isfinite(out).all()
    none = np.isinf(want_lse)  # queries that see no key
    assert (lse[none] == np.inf).all() and (out[none] == 0).all()
    np.testing.assert_allclose(lse[~none], want_lse[~none], rtol=lse_tolerance, atol=lse_tolerance)
    if not none.all():
        error = np.linalg.norm((out - want_out)[~none], axis=-1) / np.linalg.norm(want_out[~none], axis=-1)
        assert error.max() <= out_tolerance


# FlashMLA's own cases (tests/test_flash_mla_dense_decoding.py), with fewer and shorter sequences.
CASES = {
    "one_token": dict(lengths=[1], heads=1),
    "heads_1": dict(lengths=[20, 140], heads=1),
    "heads_3_verify_2": dict(lengths=[20, 140], heads=3, num_queries=2),
    "heads_9_verify_4": dict(lengths=[140, 20, 64], heads=9, num_queries=4),
    "heads_63": dict(lengths=[140], heads=63),
    "heads_128": dict(lengths=[140], heads=128),
    "ragged": dict(lengths=[0, 20, 333, 64, 65, 1], heads=8),
    "ragged_verify_2": dict(lengths=[333, 0, 2, 65, 1, 129], heads=16, num_queries=2),
    "shorter_than_new_tokens": dict(lengths=[2, 3, 1, 4], heads=4, num_queries=4),
    "wide_table": dict(lengths=[70, 0], heads=4, table_width=9),
}


@pytest.mark.parametrize("layout", ["bfloat16", "fp8"])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case, layout):
    *args, keys = make_case(0, layout=layout, **CASES[case])
    assert_matches(mla_decode(*args, softmax_scale=SCALE), attend_float64(args[0], keys))


def test_float32_pool_and_output_are_exact():
    *args, keys = make_case(1, [20, 333, 0], heads=5, num_queries=2, layout="float32")
    got = mla_decode(*args, softmax_scale=SCALE, out_dtype=jnp.float32)
    assert got[0].dtype == jnp.float32
    assert_matches(got, attend_float64(args[0], keys), out_tolerance=3e-6, lse_tolerance=2e-6)


def test_narrow_models():
    *args, keys = make_case(2, [20, 70], heads=2, width=40, layout="float32")
    got = mla_decode(*args, softmax_scale=SCALE, value_width=32, out_dtype=jnp.float32)
    assert_matches(got, attend_float64(args[0], keys, value_width=32), out_tolerance=3e-6, lse_tolerance=2e-6)


def test_lengths_do_not_recompile():
    traces = []

    @jax.jit
    def decode(*args):
        traces.append(1)
        return mla_decode(*args, softmax_scale=SCALE)

    for lengths in ([100, 3], [5, 120]):
        *args, keys = make_case(3, lengths, heads=2, table_width=2)
        args[1] = np.concatenate([args[1], np.full((9 - len(args[1]), *args[1].shape[1:]), np.nan, args[1].dtype)])
        assert_matches(decode(*args), attend_float64(args[0], keys))
    assert len(traces) == 1


@pytest.mark.parametrize("layout", ["float32", "bfloat16", "fp8"])
def test_append_writes_the_named_slots_and_no_others(layout):
    rng = np.random.default_rng(4)
    pool = rng.integers(0, 255, (6, PAGE, 656)).astype(np.uint8) if layout == "fp8" else rng.normal(size=(6, PAGE, 576)).astype(layout)
    page_table = np.array([[4, 1], [2, 6], [-1, 0]], np.int32)  # page 6 and page -1 do not exist
    latent = rng.normal(size=(3, 4, 576)).astype(ml_dtypes.bfloat16) * np.float32(3)
    latent[0, 1, :128] = 0  # a tile of zeros
    latent[0, 2, 128:256] = 1e-7
    positions = np.array([[0, 63, 64, 127], [5, -1, 64, 128], [3, 65, 126, 1000]], np.int32)
    expected = pool.copy()
    for page, slot, b, s in [(4, 0, 0, 0), (4, 63, 0, 1), (1, 0, 0, 2), (1, 63, 0, 3), (2, 5, 1, 0), (0, 1, 2, 1), (0, 62, 2, 2)]:
        expected[page, slot] = encode_fp8(latent[b, s : s + 1])[0] if layout == "fp8" else latent[b, s].astype(layout)
    got = jax.jit(mla_append)(pool, latent, page_table, positions)
    np.testing.assert_array_equal(np.asarray(got), expected)


def test_append_in_chunks_equals_append_at_once():
    rng = np.random.default_rng(5)
    latent = rng.normal(size=(2, 150, 40)).astype(np.float32)
    page_table = np.array([[5, 0, 3], [1, 4, 2]], np.int32)
    positions = np.broadcast_to(np.arange(150, dtype=np.int32), (2, 150))
    at_once = mla_append(np.zeros((6, PAGE, 40), np.float32), latent, page_table, positions)
    pool = np.zeros((6, PAGE, 40), np.float32)
    for start in range(0, 150, 50):
        pool = mla_append(pool, latent[:, start : start + 50], page_table, positions[:, start : start + 50])
    np.testing.assert_array_equal(np.asarray(pool), np.asarray(at_once))
    np.testing.assert_array_equal(np.asarray(pool)[page_table[1]].reshape(-1, 40)[:150], latent[1])


def test_debug_names_the_bad_sequences(capfd):
    q, pool, page_table, lengths, _ = make_case(6, [70, 20, 100], heads=1)
    decode = jax.jit(lambda *args: mla_decode(*args, softmax_scale=SCALE, debug=True))
    jax.block_until_ready(decode(q, pool, page_table, lengths))
    page_table[2, 1] = len(pool)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"outside the pool for sequences \[2\]"):
        jax.block_until_ready(decode(q, pool, page_table, lengths))
        jax.effects_barrier()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"beyond the page table for sequences \[0, 1\]"):
        jax.block_until_ready(decode(q, pool, page_table * 0, np.array([999, -1, 3], np.int32)))
        jax.effects_barrier()


def test_rejects_what_does_not_fit():
    q, pool, page_table, lengths, _ = make_case(7, [20], heads=1)
    with pytest.raises(ValueError, match="q must be"):
        mla_decode(q[..., :512], pool, page_table, lengths, softmax_scale=SCALE)
    with pytest.raises(ValueError, match="656 bytes"):
        mla_decode(q, pool.view(np.uint8), page_table, lengths, softmax_scale=SCALE)
    with pytest.raises(ValueError, match="lengths"):
        mla_decode(q, pool, page_table, lengths[None], softmax_scale=SCALE)
    with pytest.raises(ValueError, match=r"page_table: expected integers, got float32 \[1, 1\]"):
        mla_decode(q, pool, page_table.astype(np.float32), lengths, softmax_scale=SCALE)
    with pytest.raises(ValueError, match=r"page_table: expected no empty axis, got int32 \[1, 0\]"):
        mla_decode(q, pool, page_table[:, :0], lengths * 0, softmax_scale=SCALE)
    with pytest.raises(ValueError, match=r"positions: expected integers, got float32 \[1, 1\]"):
        mla_append(pool, np.zeros((1, 1, 576)), page_table, np.zeros((1, 1), np.float32))
    with pytest.raises(ValueError, match="latent must be"):
        mla_append(pool, np.zeros((1, 1, 512)), page_table, np.zeros((1, 1), np.int32))
