"""What changes during a run (report §4.2): learning rate, batch size, weight of the MTP loss, speed of the router bias.

Pure functions, on the host, of the step (counted from 0) and of the tokens that came before it; both are Python integers, because
14.8 trillion tokens fit neither int32 nor float32.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from dsv3_jax.config import TrainConfig


class Scheduled(NamedTuple):
    """What a step is handed besides its batch."""

    learning_rate: float
    mtp_loss_weight: float
    bias_update_speed: float


class Step(NamedTuple):
    """One step of a run: its number, the rows (sequences) before it and in it, the tokens before it, and what is scheduled for it."""

    number: int
    first_row: int
    num_rows: int
    tokens: int
    scheduled: Scheduled


def total_tokens(config: TrainConfig) -> float:
    """The tokens of the whole run: `steps` of them, the first of which are smaller where the batch size ramps up."""
    first, last, ramp = config.batch_ramp_from or config.batch_size, config.batch_size, config.batch_ramp_end
    if first == last:
        return float(config.steps * last * config.sequence_length)
    # Tokens per step rise linearly with the tokens t seen: steps = ∫ dt / batch(t), here for a run of one token.
    steps_per_sequence = ramp * math.log(last / first) / (last - first) + (1 - ramp) / last
    return config.steps / steps_per_sequence * config.sequence_length


def batch_size(config: TrainConfig, tokens: int) -> int:
    """Sequences of the step that begins after `tokens`.

    A multiple of `microbatch_size` (of `batch_ramp_from` where there is none): each size that occurs is compiled once.
    """
    first, last = config.batch_ramp_from or config.batch_size, config.batch_size
    progress = tokens / (config.batch_ramp_end * total_tokens(config)) if first != last and config.batch_ramp_end else 1.0
    if progress >= 1:
        return last
    unit = config.microbatch_size or first
    return min(last, max(first, round((first + (last - first) * progress) / unit) * unit))


def learning_rate(config: TrainConfig, step: int, tokens: int) -> float:
    """Linear warm-up in steps, constant, cosine, and two constant tails."""
    o, progress = config.optimizer, tokens / total_tokens(config)
    if step < o.warmup_steps:
        return o.learning_rate * (step + 1) / o.warmup_steps
    if progress < o.decay_start:
        return o.learning_rate
    if progress < o.decay_end:
        fraction = (progress - o.decay_start) / (o.decay_end - o.decay_start)
        return o.learning_rate * (o.decay_ratio + (1 - o.decay_ratio) * 0.5 * (1 + math.cos(math.pi * fraction)))
    return o.learning_rate * (o.decay_ratio if progress < o.tail_start else o.tail_ratio)


def scheduled(config: TrainConfig, step: int, tokens: int) -> Scheduled:
    """All that is scheduled for a step."""
    o, progress = config.optimizer, tokens / total_tokens(config)
    return Scheduled(
        learning_rate=learning_rate(config, step, tokens),
        mtp_loss_weight=o.mtp_loss_weight if progress < o.mtp_tail_start else o.mtp_loss_weight_tail,
        bias_update_speed=o.bias_update_speed if progress < o.bias_update_end else 0.0,
    )


def steps(config: TrainConfig, start: int = 0, first_row: int = 0) -> Iterator[Step]:
    """The steps of a run from number `start` on, before which `first_row` rows were consumed."""
    for number in range(start, config.steps):
        tokens = first_row * config.sequence_length
        num_rows = batch_size(config, tokens)
        yield Step(number, first_row, num_rows, tokens, scheduled(config, number, tokens))
        first_row += num_rows
