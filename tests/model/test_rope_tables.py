"""Rotary tables and softmax scales against the published implementations' (tests/data/yarn_tables.npz)."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.model import rope

DATA = Path(__file__).parents[1] / "data"
META = json.loads((DATA / "yarn_meta.json").read_text())
FIELDS = {field.name for field in dataclasses.fields(RopeScaling)}


@pytest.mark.parametrize("case", META)
def test_tables(case):
    given = META[case]["config"]
    scaling = given["rope_scaling"] and RopeScaling(**{k: v for k, v in given["rope_scaling"].items() if k in FIELDS})
    config = ModelConfig(
        rope_theta=given["rope_theta"],
        qk_rope_head_dim=given["qk_rope_head_dim"],
        qk_nope_head_dim=given["qk_nope_head_dim"],
        rope_scaling=scaling,
    )
    expected = {
        key.removeprefix(case + "/"): value for key, value in np.load(DATA / "yarn_tables.npz").items() if key.startswith(case + "/")
    }
    np.testing.assert_allclose(rope.inverse_frequencies(config), expected["inv_freq"], rtol=3e-7)
    np.testing.assert_allclose(rope.softmax_scale(config), META[case]["softmax_scale"], rtol=1e-6)
    positions = expected["positions"].astype(np.int32)
    for actual, name in zip(rope.tables(config, positions), ("cos", "sin")):
        error = np.abs(np.asarray(actual) - expected[name])
        assert np.all(error <= 1e-6 + 2e-7 * positions[:, None]), error.max()


def test_v2_lite_softmax_scale():
    """192^-1/2 (0.1 · 0.707 ln 40 + 1)², cos and sin untouched: both mscales are the same."""
    config = ModelConfig(rope_scaling=RopeScaling(mscale=0.707, mscale_all_dim=0.707))
    np.testing.assert_allclose(rope.softmax_scale(config), 0.1147214, rtol=1e-6)
    cos, sin = rope.tables(config, np.arange(8, dtype=np.int32))
    np.testing.assert_allclose(np.hypot(cos, sin), 1, rtol=1e-6)
