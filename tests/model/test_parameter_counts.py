"""Parameters of the released models, by shapes alone."""

import jax
import numpy as np
import pytest

from configs import deepseek_v3, moonlight_16b, v2_lite_16b
from dsv3_jax.model import Decoder


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("recipe", "main", "mtp"),
    [
        (deepseek_v3, 671_026_419_200, 11_610_068_224),
        (v2_lite_16b, 15_706_484_224, 0),
        (moonlight_16b, 15_960_110_208, 0),
    ],
)
def test_parameter_counts(recipe, main, mtp):
    decoder = Decoder(recipe.model())
    params = decoder.abstract_params()
    assert params == jax.eval_shape(decoder.init, jax.random.key(0))  # what is drawn has these shapes and dtypes
    assert count(params.pop("mtp", {})) == mtp
    assert count(params) == main
