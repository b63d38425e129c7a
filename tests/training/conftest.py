"""A model and a run small enough to be trained in seconds."""

import dataclasses

import pytest

from dsv3_jax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from tests.micro import MODEL, write_corpus


@pytest.fixture(scope="session")
def micro_model() -> ModelConfig:
    return dataclasses.replace(MODEL, max_position_embeddings=64, initializer_range=0.05)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Forty small documents."""
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="session")
def micro_config(micro_model, corpus, tmp_path_factory):
    """A function: TrainConfig of a short run with the fields given put over it. Runs share their prepared rows."""
    cache = tmp_path_factory.mktemp("rows")

    def make(**fields) -> TrainConfig:
        config = TrainConfig(
            model=micro_model,
            data=DataConfig(corpus=(str(corpus),), cache=str(cache), heldout_fraction=0.1),
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, bias_update_speed=0.01),
            steps=6,
            sequence_length=32,
            batch_size=8,
            remat="none",
            checkpoint_every=2,
            eval_every=3,
        )
        return dataclasses.replace(config, **fields)

    return make
