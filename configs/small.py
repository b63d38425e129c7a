"""About 1B parameters (904M and an MTP module of 163M), 0.24B active: for one H100 or H200, trainable in pieces of a few minutes.

    python train.py small --data.corpus /path/to/sources --steps 2000
    python train.py small --data.corpus /path/to/sources --steps 2000        # the same command goes on where it was stopped

V3's own shape in small: q and kv latents, node-limited routing over 8 groups, 128/64/128 head widths and a latent of 512, so that the
Hopper kernels run at the widths they were made for; its own 32k byte-level BPE; rows of 4,096 tokens. Few layers of few, wide experts: at
this size a GPU spends more time on moving activations than on products when they are narrow.
Measured on one H200, steps of one microbatch: 250,200 tokens/s and 46 GiB in bf16, 257,300 and 31 in fp8 (docs/benchmarks/training.md).
"""

import sysconfig

from dsv3_jax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def model() -> ModelConfig:
    return ModelConfig(
        vocab_size=32768,
        hidden_size=1024,
        num_hidden_layers=6,
        intermediate_size=8192,
        num_attention_heads=8,
        q_lora_rank=512,
        first_k_dense_replace=1,
        moe_intermediate_size=2048,
        n_routed_experts=24,
        num_experts_per_tok=3,
        rope_scaling=None,
        max_position_embeddings=4096,
    )


def recipe() -> TrainConfig:
    return TrainConfig(
        model=model(),
        # The sources of the installed Python packages: several hundred MB on a machine with the CUDA stack.
        data=DataConfig(corpus=(sysconfig.get_paths()["purelib"],), heldout_fraction=0.01, fim_rate=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200, decay_start=0.7, decay_end=1.0, tail_start=1.0),
        steps=2000,
        sequence_length=4096,
        batch_size=64,
        microbatch_size=16,
        remat="none",  # there is room
        checkpoint_every=250,
        eval_every=250,
    )
