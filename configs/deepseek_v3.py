"""DeepSeek-V3 (671B), pre-trained as in its report.

    python train.py deepseek_v3 --dry-run                                            # parameters and memory, nothing allocated
    python train.py deepseek_v3 --mesh data=2,pipe=16,expert=64 --batch-ramp-from 4096 --dry-run --aot   # compiled for 2,048 GPUs
    python train.py deepseek_v3 --mesh data=2,pipe=16,expert=64 --batch-ramp-from 4096 --data.corpus …      # 2,048 GPUs

Expected (the report): 14.8T tokens in about 243 thousand steps. The report's first 3,072 sequences are 24 microbatches a pipeline on
that mesh, and dualpipev on 16 ranks wants 32: hence 4,096 there, or `--pipeline-schedule zb1p`.
"""

from dsv3_jax.config import DataConfig, ModelConfig, OptimizerConfig, RopeScaling, TrainConfig


def model() -> ModelConfig:
    """The released architecture: config.json of DeepSeek-V3 and R1."""
    return ModelConfig(rope_scaling=RopeScaling())


def recipe() -> TrainConfig:
    return TrainConfig(
        # 4K pre-training comes before YaRN (§4.3): plain RoPE and no softmax-scale correction.
        model=ModelConfig(rope_scaling=None, max_position_embeddings=4096),
        data=DataConfig(corpus=("data",), tokenizer="tokenizer", heldout_fraction=0.001, fim_rate=0.1),
        optimizer=OptimizerConfig(),
        steps=243_000,
        sequence_length=4096,
        batch_size=15360,
        batch_ramp_from=3072,
        # Of one microbatch the operands of the weight gradients are gigabytes, and in lockstep delaying them gains nothing on 16 ranks.
        pipeline_max_delayed=0,
        precision="fp8",
        # The report's choice, "norms_and_up", would keep 98 GB for the 33 half-size microbatches that a rank has in flight.
        remat="layer",
    )
