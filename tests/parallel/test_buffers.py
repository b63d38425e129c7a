"""Buffer sizes against simulated routing: how much is sent for nothing, and how often a step is run again."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.parallel import buffers

TOKENS = 4096  # of a device
V2_LITE = ModelConfig(n_routed_experts=64, num_experts_per_tok=6, n_group=1, topk_group=1, topk_method="greedy")


def simulate(rows_of_step, config, devices, steps=1000):
    """(steps run again, mean over steps and layers of buffer rows / rows of the device that gets most).

    rows_of_step() -> rows [layers, from, to]. No exchange is faster than the device that gets most, so what is sent beyond that is waste.
    """
    sizes, again, padding = buffers.Buffers(buffers.start(config, devices)), 0, []
    for _ in range(steps):
        rows = rows_of_step()
        while True:
            (room,), _ = buffers.rooms(config, [devices], TOKENS, sizes.size)
            if sizes.enough(rows.max() / room):
                break
            again += 1
        padding.append(np.mean(room / rows.mean(1).max(1)))
    return again, np.mean(padding[len(padding) // 4 :])


def chosen_devices(scores, num_choices, devices):
    """bool [tokens, devices]: who gets a token, from scores [tokens, experts]."""
    experts = np.argpartition(-scores, num_choices, axis=1)[:, :num_choices]
    found = np.zeros((len(scores), devices), bool)
    np.put_along_axis(found, experts // (scores.shape[1] // devices), True, axis=1)
    return found


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_padding_on_measured_gate_scores(devices):
    """Tokens drawn with the expert loads of a released model on a narrow domain, which its experts share very unevenly."""
    path = Path(__file__).parents[1] / "data" / "esft_expert_load.json"
    shares = np.array(list(json.loads(path.read_text())["token_scores"].values()))
    rng, goes = np.random.default_rng(0), []
    for share in shares:
        # Gumbel top-k with logits such that the loads come out as measured.
        logits = np.log(np.maximum(share, 1e-4))
        for _ in range(8):
            scores = logits + rng.gumbel(size=(8192, 64))
            loads = np.bincount(np.argpartition(-scores, 6, axis=1)[:, :6].ravel(), minlength=64) / (6 * 8192)
            logits += 0.7 * np.log(np.maximum(share, 1e-4) / np.maximum(loads, 1e-4))
        goes.append(chosen_devices(scores, 6, devices).mean(0))
    goes = np.array(goes)
    assert goes.max() / goes.mean() > {2: 1.0, 4: 1.1, 8: 1.3}[devices]

    def rows_of_step():
        return rng.binomial(TOKENS, np.minimum(goes[:, None], 1), size=(len(goes), devices, devices))

    again, padding = simulate(rows_of_step, V2_LITE, devices)
    assert again <= 1 and padding <= 1.25, (again, padding)


def test_padding_with_a_fresh_router():
    """The first layer of V3 before training: a token id always takes the same experts, and some ids are frequent."""
    config, devices, ids = ModelConfig(), 64, 1000
    rng = np.random.default_rng(0)
    scores = 1 / (1 + np.exp(-rng.normal(size=(ids, 64)) @ rng.normal(size=(64, 256)) * 0.1))
    groups = np.sort(scores.reshape(ids, 8, 32), axis=-1)[..., -2:].sum(-1)
    dropped = np.argsort(-groups, axis=1)[:, 4:]
    grouped = scores.reshape(ids, 8, 32)
    np.put_along_axis(grouped, dropped[..., None], -np.inf, axis=1)
    goes = chosen_devices(scores, 8, devices).astype(float)
    frequency = 1 / (10 + np.arange(1, ids + 1))
    assert (frequency @ goes).max() / (frequency @ goes).mean() > 1.2
    again, padding = simulate(lambda: (rng.multinomial(TOKENS, frequency / frequency.sum(), size=8) @ goes)[None], config, devices)
    assert again <= 1 and padding <= 1.25, (again, padding)


def test_a_measured_run_is_never_run_again():
    """`small` over two devices from its first step on, by what its experts got on one: buffers that hold it all, and shrink."""
    path = Path(__file__).parents[1] / "data" / "small_expert_halves.json"
    fullest, config = np.array(json.loads(path.read_text())["fullest"]), ModelConfig(n_routed_experts=24, num_experts_per_tok=3)
    assert fullest.max() > 1.5
    sizes, padding = buffers.Buffers(buffers.start(config, 2)), []
    for rows in fullest:
        assert sizes.enough(rows / sizes.size)
        padding.append(sizes.size / rows)
    assert np.mean(padding) <= 1.32  # while the router settles
    assert sizes.size / fullest[-100:].mean() <= 1.25  # from then on
    assert buffers.start(ModelConfig(), 64) == 2.0  # with four experts on a device


def test_sizes_grow_at_once_and_shrink_with_patience():
    sizes = buffers.Buffers(2.0)
    start = sizes.size
    assert not sizes.enough(1.4)
    assert sizes.size >= 1.4 * start
    grown = sizes.size
    for _ in range(buffers.PATIENCE):
        assert sizes.size == grown
        assert sizes.enough(0.5)
    assert 0.5 * grown < sizes.size < 0.6 * grown
    assert not sizes.enough(100.0)
    assert sizes.size == math.inf  # room for whatever comes


def test_share_of_devices_is_that_of_random_routing():
    """Against routing drawn at random: group-limited with several devices in a group, and several groups in a device."""
    config, rng = ModelConfig(), np.random.default_rng(0)
    scores = rng.random((20000, 8, 32))
    scores[np.argsort(rng.random((20000, 8)), axis=1) >= 4] = -np.inf
    for devices in (4, 8, 64):
        assert buffers.share(config, devices) == pytest.approx(chosen_devices(scores.reshape(-1, 256), 8, devices).mean(), rel=0.01)


def test_rooms():
    """A node gets half of the tokens at most (4 of 8 groups), a device an eighth of these; no buffer exceeds what could come."""
    config = ModelConfig()
    (to_nodes, within), rows = buffers.rooms(config, [8, 8], 4096, 1.0)
    assert to_nodes == pytest.approx(4096 * buffers.share(config, 8), abs=8)
    assert within == pytest.approx(8 * 4096 * buffers.share(config, 64), abs=8)
    assert rows == 4096 * 8
    assert buffers.rooms(config, [64], 4096, math.inf) == ([4096], 64 * 4096 * 4)
