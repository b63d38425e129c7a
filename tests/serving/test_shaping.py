"""What a request adds to the logits: OpenAI's formula for penalties, and biases."""

import numpy as np
import pytest

from dsv3_jax.serving.request import Request, SamplingParams
from dsv3_jax.serving.shaping import Shaper, is_shaped


@pytest.mark.parametrize("presence, frequency", [(0.5, 0.0), (0.0, 0.25), (-1.0, 2.0)])
def test_penalties_count_the_answer_and_not_the_prompt(presence, frequency):
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency, logit_bias=((1, 3.0), (6, -2.0), (1, 0.5)))
    request = Request([1, 1, 2, 5], params)
    shaper = Shaper(params, 8)
    fixed = np.array([0, 3.5, 0, 0, 0, 0, -2, 0])
    np.testing.assert_array_equal(shaper.bias(request), fixed)
    request.tokens += [3, 1, 3, 3]
    # mu[j] - c[j] * frequency - (c[j] > 0) * presence, c[j] how often the answer has token j
    expected = fixed - np.array([0, frequency + presence, 0, 3 * frequency + presence, 0, 0, 0, 0])
    np.testing.assert_array_equal(shaper.bias(request), expected.astype(np.float32))


def test_who_is_shaped():
    assert not is_shaped(SamplingParams(temperature=0.5, top_k=3, logprobs=2))
    for options in ({"presence_penalty": -0.5}, {"frequency_penalty": 0.5}, {"logit_bias": ((0, 1.0),)}, {"json_schema": "{}"}):
        assert is_shaped(SamplingParams(**options))
