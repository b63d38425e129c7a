"""What DeepSeek-V3 is, readable on one device. Nothing here knows a mesh.

Shape letters that end array names:
    B batch · S sequence · T tokens (B·S flattened) · D model width · H heads · N nope head width · R rope head width · V value head width
    Q query latent · C key/value latent · E routed experts · K experts per token · G expert groups · F feed-forward width · L layers
    W vocabulary · P pages
Logical axis names of parameters (mapped to mesh axes elsewhere): layers embed heads q_latent kv_latent mlp experts vocab.
"""

from dsv3_jax.model.decoder import Decoder, Output

__all__ = ["Decoder", "Output"]
