"""What training minimises (report §2.1.2, §2.2): next-token cross entropy, multi-token prediction, sequence-wise balance.

loss = main + mtp_loss_weight · mtp + balance_loss_weight · balance
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.model import Decoder
from dsv3_jax.model.moe import RouterStats
from dsv3_jax.precision import Tap, weight_gradient
from pallas_kernels.cross_entropy import cross_entropy_gradient, log_sum_exp

# Logits of so many entries at a time exist (1 GiB in float32), whatever the batch and the vocabulary.
LOGITS_AT_ONCE = 2**28


class Targets(NamedTuple):
    """What each position predicts. tokens [B, S] int32; weights [B, S] float32, 0 where nothing is to be predicted."""

    tokens_BS: jax.Array
    weights_BS: jax.Array


class NumTargets(NamedTuple):
    """How many targets (the sum of their weights) the means of `main` and `mtp` go over; float32 scalars."""

    main: jax.Array
    mtp: jax.Array


def targets(batch: dict, ahead: int) -> Targets:
    """The targets `ahead` tokens after each of the S input positions: 1 for the main model, 2 for MTP.

    A target beyond the row, outside the loss mask, or in another segment than its position weighs nothing.
    """
    tokens = batch["tokens"][:, ahead:]
    if (mask := batch.get("loss_mask")) is not None:
        weights = mask[:, ahead - 1 :].astype(jnp.float32)
    else:
        weights = jnp.ones(tokens.shape, jnp.float32)
    if (segments := batch.get("segment_ids")) is not None:
        weights = weights * (segments[:, ahead:] == segments[:, :-ahead])
    return Targets(*(jnp.pad(x, ((0, 0), (0, ahead - 1))) for x in (tokens, weights)))


def num_targets(batch: dict) -> NumTargets:
    """Targets of a batch."""
    return NumTargets(*(jnp.sum(targets(batch, ahead).weights_BS) for ahead in (1, 2)))


def loss_and_terms(
    decoder: Decoder,
    params: dict,
    batch: dict,
    *,
    mtp_loss_weight: Any,
    balance_loss_weight: Any,
    over: NumTargets | None = None,
) -> tuple[jax.Array, dict]:
    """The loss of a batch and its terms.

    batch: "tokens" int32 [B, S+1]; optionally "segment_ids" (attention and prediction stay within a segment) and "positions" of the
    same shape, and "loss_mask" [B, S], 1 where tokens[:, 1:] is to be predicted. The weights may be arrays (they follow schedules).
    over: what the two cross entropies are divided by; the batch's own number of targets by default. A part of a larger batch hands
    its share of the larger one's, so that the parts' mean is the whole's loss.

    Returns (loss, terms): float32 scalars "main", "mtp", "balance" (each before its weight; balance is summed over layers and averaged
    over sequences), "fill", more than 1 if the exchange of experts had no room for some tokens (`RouterStats`; the rest is then void), and
    "load" [L, E], the tokens each expert of each MoE layer got (the MTP layer last).
    """
    config, where = decoder.config, _where(batch)
    over = over or num_targets(batch)
    hidden_BSD, stats = decoder(params, batch["tokens"][:, :-1], *where)
    main, mtp, mtp_stats = after_layers(decoder, params, hidden_BSD, batch, over)
    moe_stats = [stats, mtp_stats] if config.num_moe_layers else [mtp_stats]
    load_LE, balance_L, fill_L = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *moe_stats)
    load_LE, fill = lax.stop_gradient((load_LE, jnp.max(fill_L, initial=0)))
    balance = jnp.sum(balance_L)
    loss = main + mtp_loss_weight * mtp + balance_loss_weight * balance
    return loss, {"main": main, "mtp": mtp, "balance": balance, "fill": fill, "load": load_LE}


def after_layers(
    decoder: Decoder, params: dict, hidden_BSD: jax.Array, batch: dict, over: NumTargets, axis: str | None = None
) -> tuple[jax.Array, jax.Array, RouterStats]:
    """The part of `loss_and_terms` that follows the last layer of the main model: its cross entropy, and the MTP module with its own.

    axis: as `cross_entropy` has it. Returns (main, mtp, router statistics of the MTP layer, leaves [1, ...], or [0, ...] where there is
    none).
    """
    main = cross_entropy(decoder, params, decoder.final_norm(params, hidden_BSD), targets(batch, 1), axis) / jnp.maximum(over.main, 1)
    if not decoder.config.num_nextn_predict_layers:
        none = jnp.zeros((0,), jnp.float32)
        return main, jnp.zeros((), jnp.float32), RouterStats(jnp.zeros((0, decoder.config.n_routed_experts), jnp.float32), none, none)
    # The last position's next token is known and its target is not: it runs along without weight, which keeps S a round number.
    predicted_BSD, stats = decoder.mtp(params, hidden_BSD, batch["tokens"][:, 1:], *_where(batch))
    mtp = cross_entropy(decoder, params, predicted_BSD, targets(batch, 2), axis) / jnp.maximum(over.mtp, 1)
    return main, mtp, jax.tree.map(lambda x: x[None], stats)


def next_token_loss(decoder: Decoder, params: dict, batch: dict) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """((summed −log p of the next tokens in nats, how many there are), fill), float32: evaluation, without the MTP module."""
    target, params = targets(batch, 1), decoder.layers(params)
    hidden_BSD, stats = decoder(params, batch["tokens"][:, :-1], *_where(batch))
    loss = cross_entropy(decoder, params, decoder.final_norm(params, hidden_BSD), target)
    return (loss, jnp.sum(target.weights_BS)), jnp.max(stats.fill)


def _where(batch):
    """Positions and segment ids of the inputs."""
    return tuple(batch[name][:, :-1] if name in batch else None for name in ("positions", "segment_ids"))


def cross_entropy(decoder: Decoder, params: dict, normed_BSD: jax.Array, target: Targets, axis: str | None = None) -> jax.Array:
    """Weighted sum of −log p(target) in nats, float32, from hidden states after their norm.

    The head runs over pieces of the sequence. When differentiated, each piece's gradient is taken at once (it is linear in the sum's
    own cotangent), so that neither the logits of all tokens nor a second pass over them is needed.

    axis: of a mesh, inside `shard_map`, whose devices all hold these rows. Each runs the head over its part of every row; the mean over
    the devices is the sum, and of the head's gradients the gradient, while that of the hidden states is whole on each.
    """
    if axis is None:
        return _cross_entropy(decoder, params["lm_head"], normed_BSD, target)
    return lax.axis_size(axis) * _cross_entropy(decoder, params["lm_head"], *_part_of(axis, normed_BSD, target))


def _part_of(axis, normed_BSD, target):
    """This device's part of each row, padded with targets of no weight."""
    devices, length = lax.axis_size(axis), normed_BSD.shape[1]
    size = -(-length // devices)

    def part(x):
        x = jnp.pad(x, ((0, 0), (0, devices * size - length), *[(0, 0)] * (x.ndim - 2)))
        return lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * size, size, axis=1)

    @jax.custom_vjp
    def whole_gradient(x):
        return part(x)

    def gather(_, dx):
        return ((lax.all_gather(dx, axis, axis=1, tiled=True) / devices)[:, :length],)  # the sum was multiplied by their number

    whole_gradient.defvjp(lambda x: (part(x), None), gather)
    return whole_gradient(normed_BSD), jax.tree.map(part, target)


def _losses(logits_BSW, lse_BS, target):
    """The weighted sum of −log p(target)."""
    chosen_BS1 = jnp.take_along_axis(logits_BSW, target.tokens_BS[..., None], axis=-1)
    return jnp.sum((lse_BS - chosen_BS1[..., 0]) * target.weights_BS)


def _pieces(decoder, normed_BSD, target):
    """Cut along the sequence (the batch axis may lie over devices): leaves [pieces, B, s, ...], padded with targets of no weight."""
    batch, length = normed_BSD.shape[:2]
    count = min(length, -(-batch * length * decoder.config.vocab_size // LOGITS_AT_ONCE))
    size = -(-length // count)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, (normed_BSD, target))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(decoder, lm_head, normed_BSD, target):
    def add(total, piece):
        normed_BSD, target = piece
        logits_BSW = decoder.head({"lm_head": lm_head}, normed_BSD)
        return total + _losses(logits_BSW, log_sum_exp(logits_BSW), target), None

    return lax.scan(add, jnp.zeros((), jnp.float32), _pieces(decoder, normed_BSD, target))[0]


def _cross_entropy_fwd(decoder, lm_head, normed_BSD, target):
    recipe = decoder.recipe.unquantised
    head = lm_head.astype(recipe.compute_dtype)  # once, not once a piece; its gradient stays in float32

    def add(sums, piece):
        normed_BSD, target = piece
        logits_BSW, head_vjp = jax.vjp(lambda x: decoder.head({"lm_head": head}, x), normed_BSD)
        logits_TW, targets = logits_BSW.reshape(-1, logits_BSW.shape[-1]), [x.reshape(-1) for x in target]
        dlogits_TW, lse_T = cross_entropy_gradient(logits_TW, *targets, dtype=recipe.compute_dtype)
        loss = _losses(logits_BSW, lse_T.reshape(target.tokens_BS.shape), target)
        operands = Tap(normed_BSD.reshape(-1, normed_BSD.shape[-1]).astype(recipe.compute_dtype), dlogits_TW)
        dhead = weight_gradient(operands, lm_head.shape, None, recipe)
        return (sums[0] + loss, sums[1] + dhead), *head_vjp(dlogits_TW.reshape(logits_BSW.shape).astype(jnp.float32))

    zeros = jnp.zeros((), jnp.float32), jnp.zeros(lm_head.shape, jnp.float32)
    (loss, dhead), dnormed_pieces = lax.scan(add, zeros, _pieces(decoder, normed_BSD, target))
    dnormed = jnp.moveaxis(dnormed_pieces, 0, 1).reshape(normed_BSD.shape[0], -1, normed_BSD.shape[-1])[:, : normed_BSD.shape[1]]
    return loss, (dhead.astype(lm_head.dtype), dnormed)


def _cross_entropy_bwd(decoder, saved, cotangent):
    dhead, dnormed = saved
    return dhead * cotangent.astype(dhead.dtype), dnormed * cotangent.astype(dnormed.dtype), None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
