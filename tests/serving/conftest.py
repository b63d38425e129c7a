"""Small models with random weights and the tokens that other software generates from them (tests/data/models)."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.hub import load
from dsv3_jax.model import Decoder

MODELS = Path(__file__).parents[1] / "data" / "models"


@cache
def load_oracle(name: str) -> SimpleNamespace:
    """A checkpoint in float32 and what is known of it. Cached, so that all tests share compiled programs."""
    config, params = load(MODELS / name, weights="dequantised", dtype=np.float32)
    expected = dict(np.load(MODELS / name / "expected.npz"))
    return SimpleNamespace(
        path=MODELS / name, config=config, params=params, decoder=Decoder(config), tokenizer=Tokenizer.load(MODELS / name), **expected
    )


@pytest.fixture(scope="session")
def oracle():
    return load_oracle


@pytest.fixture(scope="session")
def plain():
    return load_oracle("tiny_s_plain")


TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}"
    "{% for m in messages %}{% if m.role == 'alien' %}{{ raise_exception('unknown role') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {{ start }}{% endif %}"
)


@pytest.fixture(scope="session")
def chatty(plain):
    """`plain` whose tokenizer has a chat template."""
    tokenizer = plain.tokenizer
    return SimpleNamespace(**vars(plain) | {"tokenizer": Tokenizer(tokenizer._json, tokenizer.config | {"chat_template": TEMPLATE})})


@pytest.fixture(scope="session")
def with_mtp():
    return load_oracle("tiny_s_yarn_mtp")
