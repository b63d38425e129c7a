"""Parameters as decoding reads them."""

import jax
import jax.numpy as jnp

from dsv3_jax.model import Decoder
from dsv3_jax.precision import BF16
from tests import draw, micro


def test_everything_but_the_router_is_in_the_compute_dtype():
    """Scores in bfloat16 would choose other experts than training did."""
    decoder = Decoder(micro.MODEL, BF16)
    params = decoder.decode_params(draw.parameters(decoder))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params["moe_layers"][0]["mlp"].pop("gate")))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params["mtp"]["layer"]["mlp"].pop("gate")))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
