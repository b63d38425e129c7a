"""The smallest whole run: a V3-type model on the Python standard library's own sources, on two CPU cores.

    python train.py

Expected: 1.83 bits per byte on held-out files where gzip -9 takes 2.09, in 5 to 6 minutes on two cores (docs/benchmarks/two_cores.md).
"""

from dsv3_jax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def model() -> ModelConfig:
    return ModelConfig(
        vocab_size=4096,
        hidden_size=192,
        num_hidden_layers=4,
        intermediate_size=512,
        num_attention_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=1,
        moe_intermediate_size=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        rope_scaling=None,
        max_position_embeddings=256,
        initializer_range=0.02,
    )


def recipe() -> TrainConfig:
    return TrainConfig(
        model=model(),
        data=DataConfig(heldout_fraction=0.04),
        # A run this short needs a faster bias: the report's 0.001 a step would not move a selection in 200.
        optimizer=OptimizerConfig(
            learning_rate=4e-3, warmup_steps=40, decay_start=0.3, decay_end=1.0, tail_start=1.0, bias_update_speed=0.02
        ),
        steps=200,
        sequence_length=256,
        batch_size=8,
        remat="none",
        checkpoint_every=100,
        eval_every=100,
    )
