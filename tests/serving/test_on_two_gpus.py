"""The engine on two Hopper GPUs, against whole forward passes of one."""

import jax
import numpy as np
import pytest
from test_on_gpu import CONFIG, LIMITS, PARAMS, PROMPTS, against_a_whole_pass

from dsv3_jax.model import Decoder
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.precision import recipe, to_fp8
from dsv3_jax.serving import Engine

pytestmark = pytest.mark.multi_gpu


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("mesh", ["data=2", "expert=2"])
def test_tokens_of_two_gpus_are_the_likeliest_too(precision, mesh):
    """With experts that have copies and move meanwhile, where they are spread out."""
    params = jax.jit(Decoder(CONFIG).init)(jax.random.key(0))
    params["moe_layers"]["mlp"]["gate"]["e_score_correction_bias"] += 0.05 * np.arange(16)  # the last experts are busy
    reference = Decoder(CONFIG), params
    if precision == "fp8":
        params = jax.jit(to_fp8)(params)
        reference = Decoder(CONFIG, recipe("fp8_reference")), params
    balance = dict(redundant_experts=4, rebalance_steps=8) if mesh == "expert=2" else {}
    lengths, options = PROMPTS["long"]
    engine = Engine(
        Decoder(CONFIG, recipe(precision)), params, mesh=meshes.make(mesh, jax.devices()[:2]), max_batch=16, num_pages=256,
        **options, **balance,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in lengths]
    far, error = against_a_whole_pass(reference, prompts, engine.generate(prompts, PARAMS))
    print(f"{precision}, {mesh}: {far:.1%} of the tokens are not the likeliest, log-probabilities differ by {error:.4f}")
    assert far < LIMITS[precision, False][0] and error < LIMITS[precision, False][1]
    assert engine.pool.num_free == engine.pool.num_pages
    if balance:
        print(engine.balancer.stats)
        assert engine.balancer.stats.moved_replicas
