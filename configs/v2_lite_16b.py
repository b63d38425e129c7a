"""DeepSeek-V2-Lite (15.7B parameters, 2.4B active): the router of V2 (softmax scores, greedy top-k, no selection bias) in the same code.

    python train.py v2_lite_16b --dry-run
    model = dsv3_jax.load("DeepSeek-V2-Lite")                   # the released weights

Schedule: DeepSeek-V2 report, appendix B (there two steps of x0.316 at 80% and 90%; here a cosine between them).
"""

from dsv3_jax.config import DataConfig, ModelConfig, OptimizerConfig, RopeScaling, TrainConfig


def model() -> ModelConfig:
    """config.json of DeepSeek-V2-Lite."""
    return ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=27,
        intermediate_size=10944,
        num_attention_heads=16,
        q_lora_rank=None,
        first_k_dense_replace=1,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        n_group=1,
        topk_group=1,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        num_nextn_predict_layers=0,
        rope_scaling=RopeScaling(mscale=0.707, mscale_all_dim=0.707),
        initializer_range=0.006,
        bos_token_id=100000,
        eos_token_id=100001,
    )


def recipe() -> TrainConfig:
    return TrainConfig(
        model=model(),
        data=DataConfig(corpus=("data",), tokenizer="tokenizer", heldout_fraction=0.001),
        optimizer=OptimizerConfig(
            learning_rate=4.2e-4, decay_start=0.8, decay_end=0.9, decay_ratio=0.1, tail_start=0.9, tail_ratio=0.1, balance_loss_weight=1e-3
        ),
        steps=302_000,
        sequence_length=4096,
        batch_size=4608,
        remat="norms_and_up",
    )
