"""A run of seconds: its model, and for tests that start train.py its corpus and its recipe."""

import os
from pathlib import Path

from dsv3_jax.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    first_k_dense_replace=1,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    rope_scaling=None,
    max_position_embeddings=256,
)

RECIPE = """
from dsv3_jax.config import *

def recipe():
    return TrainConfig(
        model={model!r},
        data=DataConfig(corpus=({corpus!r},), heldout_fraction=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        sequence_length=32, remat="none", {fields},
    )
"""


def one_device() -> dict:
    """The environment of a command that sees one CPU device and compiles fast, started by `python`. Such commands find each other's
    programs."""
    others = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "UV")}
    return others | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def write_corpus(folder: Path) -> Path:
    """Forty small documents in `folder`, which is made."""
    folder.mkdir()
    for i in range(40):
        lines = [f"def function_{i}_{j}(x):\n    return x + {i * j % 17} * {j}\n" for j in range(20)]
        (folder / f"file{i:02}.py").write_text("\n".join(lines))
    return folder


def write_recipe(folder: Path, **fields) -> Path:
    """The path of a recipe in `folder`, with these fields of TrainConfig, of a run on a corpus beside it."""
    recipe = folder / "micro.py"
    corpus = write_corpus(folder / "corpus")
    given = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    recipe.write_text(RECIPE.format(model=MODEL, corpus=str(corpus), fields=given))
    return recipe
