"""The study tells scales apart: on operands with the outliers and the range that training has; the comparison of curves."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model import Decoder
from dsv3_jax.precision import BF16, Scales, curves
from dsv3_jax.precision.study import SCHEMES, Operands, _quantised, errors, operands_of, study
from tests import draw


def with_a_range_of_tokens(seed):
    """Gradients of tokens that are well predicted are a million times smaller than those of others; a few input channels are huge."""
    rng = np.random.default_rng(seed)
    x, w, dy = (draw.normal(rng, *shape) for shape in ((256, 256), (128, 256), (256, 128)))
    x[:, :2] *= 3e5
    return Operands("toy", Scales(), x, w, dy * 10 ** rng.uniform(-6, 0, (256, 1)).astype(np.float32))


def test_coarse_scales_stand_out():
    found = [errors(with_a_range_of_tokens(seed)) for seed in range(4)]
    by = lambda scheme, product: np.array([one[scheme][product] for one in found])  # noqa: E731
    recipe = {product: by("recipe", product) for product in ("y", "dx", "dw")}
    assert np.all(recipe["dx"] < np.sqrt(2) * 2**-4)  # the bound of two roundings to e4m3
    for scheme in ("per_tensor", "gradient_blocks"):
        assert (by(scheme, "dx") - recipe["dx"]).mean() > 5 * recipe["dx"].std(ddof=1), scheme
    np.testing.assert_array_equal(by("gradient_blocks", "y"), recipe["y"])  # it differs in gradients alone

    lines = []
    result = study(iter([[with_a_range_of_tokens(seed)] for seed in range(4)]), lines.append)
    assert len(lines) == 1 + 1 + 2 and np.array(result["errors"]).shape == (4, 3, 1, 3)
    d = np.log(by("per_tensor", "dx") / recipe["dx"])
    assert np.isclose(result["standard_deviations"]["per_tensor"]["dx"], d.mean() / d.std(ddof=1))
    assert result["standard_deviations"]["per_tensor"]["dx"] > 5 < result["standard_deviations"]["gradient_blocks"]["dx"]
    assert result["standard_deviations"]["gradient_blocks"]["y"] == 0


def test_one_batch_has_no_spread():
    with pytest.raises(UserError, match="at least two"):
        study(iter([[]]))


def test_curves_compared(tmp_path, capsys):
    """Means of the last hundred steps of the shortest run; a spread of BF16 seeds, which one seed has not; pairs of FP8 and BF16 with the
    same seed; runs in the reference are not among those in FP8."""

    def run(name, last, steps=150):
        losses = [9.0] * (steps - 100) + [last - 0.5, last + 0.5] * 50
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"main": loss}) + "\n" for loss in losses))

    compare = lambda: curves.compare(SimpleNamespace(curves=tmp_path, plot=None))  # noqa: E731
    run("bf16-0", 4.0)
    run("fp8-0", 4.2)
    run("fp8_reference-0", 8.0)
    with pytest.raises(UserError, match="1 runs in bf16 and 1 in fp8"):
        compare()
    run("bf16-1", 4.1)
    compare()
    mean, deviation = 4.05, 0.05 * np.sqrt(2)
    printed = capsys.readouterr().out
    assert f"{4.2 / mean - 1:+.3%} (a seed's standard deviation: {deviation / mean:.3%})" in printed and "pairs" not in printed
    run("fp8-1", 4.305)
    run("fp8-2", 5.0)  # no pair
    compare()
    assert "pairs of a seed: +5.000%, +5.000%; mean +5.000%, standard error 0.000%" in capsys.readouterr().out
    run("bf16-2", 5.0, steps=140)
    compare()
    printed = capsys.readouterr().out
    assert "the 100 steps to 140: bf16-0 4.5000, bf16-1 4.5900, bf16-2 5.0000, fp8-0 4.6800" in printed  # of the others ten steps at 9
    (tmp_path / "bf16-2.jsonl").write_text('{"main": 4.0}\n' * 99)
    with pytest.raises(UserError, match="has 99 steps"):
        compare()


def test_what_is_quantised_leaves_its_program_in_e4m3():
    """Within one program XLA drops conversions to e4m3 and back on a GPU, and the error with them."""
    _, scales, *arrays = with_a_range_of_tokens(0)
    for scheme, operands in _quantised(*arrays, scales).items():
        assert all(operand.values.dtype == jnp.float8_e4m3fn for operand in operands), scheme
    found = errors(with_a_range_of_tokens(0))
    assert all(found[scheme][product] > 2**-7 for scheme in SCHEMES for product in ("y", "dx", "dw")), found


def test_the_operands_caught_are_those_of_the_step():
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=0,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
        initializer_range=0.1,
    )
    decoder = Decoder(config, BF16)
    params = draw.parameters(decoder)
    operands = list(operands_of(decoder)(params, {"tokens": np.random.default_rng(1).integers(0, 64, (1, 33)).astype(np.int32)}))
    caught = {one.name.removeprefix("moe_layers/0/"): one for one in operands}
    assert set(caught) == {f"self_attn/{n}" for n in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")} | {
        f"mlp/{who}/{n}" for who in ("experts", "shared_experts") for n in ("gate_up_proj", "down_proj")
    }
    attention = params["moe_layers"]["self_attn"]
    np.testing.assert_array_equal(caught["self_attn/q_proj"].w, attention["q_proj"][0])
    np.testing.assert_array_equal(caught["self_attn/q_proj"].x, caught["self_attn/kv_a_proj_with_mqa"].x)
    assert caught["self_attn/q_proj"].dy.shape == (32, 2 * 16)
    shared = caught["mlp/shared_experts/gate_up_proj"].x.astype(jnp.float32)
    routed = caught["mlp/experts/gate_up_proj"].x.astype(jnp.float32)
    assert all(np.any(np.all(np.asarray(shared) == row, axis=-1)) for row in np.asarray(routed[:4]))  # tokens of the shared expert's input
