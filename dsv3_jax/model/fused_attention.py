"""Attention of training and prefill: cuDNN's fused kernels on a Hopper GPU, plain JAX elsewhere, one function for both.

`jax.nn.dot_product_attention(implementation="cudnn")` refuses values narrower than keys, as MLA has them (192 and 128), and checks the
devices of the tracing process, which a compile for another machine has not. So this file, and no other, binds the two primitives under
it, private ones of `jax._src.cudnn`; tests/model/test_fused_attention.py fails when JAX moves or changes them.

Packed documents are kept apart by a mask that is added to the scores, [B, 1, S, S] in bfloat16. cuDNN's own packed layout cannot serve
here: JAX hands it one row offset for keys, values and outputs, right only if all have one width (it gave NaN with 192 and 128).
"""

import functools
import inspect
import json
import os
import re

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.platform import dispatch

_MASKED = -1e30  # what is added to the score of a pair that must not see each other; finite in bfloat16


def causal_attention(q_BSHd, k_BSHd, v_BSHV, scale: float, segment_ids_BS: jax.Array | None = None) -> jax.Array:
    """softmax(q kᵀ scale) v over earlier tokens of the same segment, softmax in float32. -> [B, S, H, V] in v's dtype.

    bfloat16 goes to cuDNN on a GPU, which has no float32. Under `jax.checkpoint`, output and log-sum-exp carry the name "attention".
    """
    bias = None if segment_ids_BS is None else _bias(segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :], q_BSHd.dtype)
    return _causal(q_BSHd, k_BSHd, v_BSHV, bias, scale)


def partial_attention(q_BSHd, k_BSHd, v_BSHV, seen_BST: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """Attention over some of the keys, those that `seen` allows, to be merged with that over others. Not differentiable.

    Returns the output [B, S, H, V] and the log-sum-exp of the scores, float32 [B, H, S]. A query that sees nothing gets a finite output
    and a log-sum-exp so low that `merge` leaves it out.
    """
    return _forward(q_BSHd, k_BSHd, v_BSHV, _bias(seen_BST, q_BSHd.dtype), scale, False)


def merge(*parts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over several sets of keys from that over each, as `partial_attention` gives it; the output is float32."""
    lse = jnp.stack([lse for _, lse in parts])
    total = jax.nn.logsumexp(lse, axis=0)
    weights = jnp.swapaxes(jnp.exp(lse - total), -1, -2)[..., None]
    return jnp.sum(jnp.stack([out.astype(jnp.float32) for out, _ in parts]) * weights, axis=0), total


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _causal(q, k, v, bias, scale):
    return _forward(q, k, v, bias, scale, True)[0]


def _causal_fwd(q, k, v, bias, scale):
    out, lse = (checkpoint_name(x, "attention") for x in _forward(q, k, v, bias, scale, True))
    return out, (q, k, v, bias, out, lse)


@jax.named_scope("attention_core")
def _causal_bwd(scale, saved, d_out):
    q, k, v, bias, out, lse = saved
    if v.dtype == jnp.float32:
        return *_plain_backward(q, k, v, bias, out, lse, d_out, scale=scale), None
    options = {"hopper": _cudnn_backward, "reference": _plain_backward, "scale": scale}
    return *dispatch("causal_attention", None, q, k, v, bias, out, lse, d_out, **options), None


_causal.defvjp(_causal_fwd, _causal_bwd)


@jax.named_scope("attention_core")
def _forward(q, k, v, bias, scale, causal):
    """(output [B, S, H, V], log-sum-exp of the scores float32 [B, H, S])"""
    if v.dtype == jnp.float32:
        return _plain(q, k, v, bias, scale=scale, causal=causal)
    return dispatch("causal_attention", None, q, k, v, bias, hopper=_cudnn, reference=_plain, scale=scale, causal=causal)


def _bias(seen_BST, dtype):
    return jnp.where(seen_BST, 0, _MASKED).astype(dtype)[:, None]


# Plain JAX.


def _plain(q, k, v, bias, *, scale, causal):
    scores, precision = _scores(q, k, bias, scale, causal)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse[..., None]).astype(v.dtype)
    return jnp.einsum("bhst,bthv->bshv", weights, v, precision=precision), lse


def _plain_backward(q, k, v, bias, out, lse, d_out, *, scale):
    """As FlashAttention 2 (Dao 2023, algorithm 2) has it, in one block."""
    scores, precision = _scores(q, k, bias, scale, True)
    weights = jnp.exp(scores - lse[..., None])
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    d_weights = product("bshv,bthv->bhst", d_out, v)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    d_scores = (weights * (d_weights - jnp.swapaxes(delta, 1, 2)[..., None]) * scale).astype(q.dtype)
    dq, dk = product("bhst,bthd->bshd", d_scores, k), product("bhst,bshd->bthd", d_scores, q)
    return dq.astype(q.dtype), dk.astype(k.dtype), product("bhst,bshv->bthv", weights.astype(v.dtype), d_out).astype(v.dtype)


def _scores(q, k, bias, scale, causal):
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("bshd,bthd->bhst", q, k, precision=precision, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return scores, precision


# cuDNN.


def _cudnn(q, k, v, bias, *, scale, causal):
    return tuple(
        cudnn._dot_product_attention_fwd_p_wrapper.bind(*_operands(q, k, v, bias), is_training=True, **_static(bias, scale, causal))
    )


def _cudnn_backward(q, k, v, bias, out, lse, d_out, *, scale):
    operands = _operands(q, k, v, bias)
    return tuple(cudnn._dot_product_attention_bwd_p_wrapper.bind(*operands, lse, out, d_out, **_static(bias, scale, True)))


def _operands(q, k, v, bias):
    unused = jnp.zeros(0, q.dtype)  # lengths, offsets and page tables of layouts that are not used here
    return q, k, v, unused if bias is None else bias, *[unused] * 6


def _static(bias, scale, causal):
    newer = {"score_mod": None} if "score_mod" in inspect.signature(cudnn.dot_product_attention).parameters else {}  # jax 0.12
    return newer | {
        "scale": scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (bias is not None, False),  # is there a bias, and does it need a gradient
        "mask_type": cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }


# With --xla_gpu_deterministic_ops XLA (of jax 0.11.2) makes the plan of a backward pass and then notes in its custom call that it is to be
# deterministic: in the first of several equal ones alone. The others count as planned already, and as their text differs from the first's,
# no plan is found for them when they run ("raw_hash_map<>::at"). So all of them say it from the start.
_made_by_jax = cudnn.create_dot_product_attention_backend_config
_DETERMINISTIC = re.compile(r"--xla_gpu_(deterministic|exclude_nondeterministic)_ops(=true|=1|\s|$)")


def _backend_config(*arguments, **options):
    made = json.loads(_made_by_jax(*arguments, **options))
    if options["is_bwd"] and _DETERMINISTIC.search(os.environ.get("XLA_FLAGS", "")):
        made["cudnn_fmha_backend_config"]["force_deterministic"] = True
    return json.dumps(made)


cudnn.create_dot_product_attention_backend_config = _backend_config
