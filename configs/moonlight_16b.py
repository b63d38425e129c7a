"""Moonlight-16B-A3B (Moonshot AI): a V3-type model of 15.96B parameters, 2.2B of them active without embeddings.

    python train.py moonlight_16b --dry-run
    model = dsv3_jax.load("Moonlight-16B-A3B")                  # the released weights

Here with AdamW; the released model was trained with Muon. Schedule: Moonlight report §3.3.
"""

from dsv3_jax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def model() -> ModelConfig:
    """config.json of Moonlight-16B-A3B."""
    return ModelConfig(
        vocab_size=163840,
        hidden_size=2048,
        num_hidden_layers=27,
        intermediate_size=11264,
        num_attention_heads=16,
        q_lora_rank=None,
        first_k_dense_replace=1,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.446,
        num_nextn_predict_layers=0,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
        rope_scaling=None,
        max_position_embeddings=8192,
        initializer_range=0.02,
        bos_token_id=163584,
        eos_token_id=163586,
    )


def recipe() -> TrainConfig:
    return TrainConfig(
        model=model(),
        data=DataConfig(corpus=("data",), tokenizer="tokenizer", heldout_fraction=0.001),
        optimizer=OptimizerConfig(
            learning_rate=4.2e-4,
            decay_start=33 / 5700,
            decay_end=5.2 / 5.7,
            tail_start=5.2 / 5.7,
            tail_ratio=0.1,
            bias_update_end=5.2 / 5.7,
        ),
        steps=170_000,
        sequence_length=8192,
        batch_size=4096,
        batch_ramp_from=2048,
        batch_ramp_end=200 / 5700,
        remat="norms_and_up",
    )
