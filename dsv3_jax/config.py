"""Every option there is, as frozen dataclasses.

`ModelConfig` carries the field names of the released `config.json`, so that a Hugging Face checkpoint and a recipe describe a model
in the same words. A recipe (`configs/*.py`) is a function that returns a `TrainConfig`.
"""

import dataclasses
import difflib
from typing import Any, Literal

from dsv3_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN, as `rope_scaling` in config.json (type "yarn")."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture. Defaults are DeepSeek-V3 (671B); names are those of the released config.json."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    intermediate_size: int = 18432
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    first_k_dense_replace: int = 3
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    # noaux_tc: selection bias, groups scored by their two best; greedy: plain top-k; group_limited_greedy (V2): scored by their best.
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    num_nextn_predict_layers: int = 1
    # Hidden state fed to the MTP module: after the main model's final norm (vLLM, SGLang, Megatron) or before it (torchtitan).
    mtp_hidden: Literal["post_norm", "pre_norm"] = "post_norm"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = RopeScaling()
    max_position_embeddings: int = 163840
    initializer_range: float = 0.006
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1

    def __post_init__(self):
        if self.num_hidden_layers < 1 or not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise UserError(f"first_k_dense_replace={self.first_k_dense_replace} must lie in 0..num_hidden_layers={self.num_hidden_layers}")
        if self.qk_rope_head_dim % 2:
            raise UserError(f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: RoPE rotates pairs")
        if self.num_moe_layers or self.num_nextn_predict_layers:
            if self.n_routed_experts % self.n_group:
                raise UserError(f"n_routed_experts={self.n_routed_experts} must be a multiple of n_group={self.n_group}")
            if not 1 <= self.topk_group <= self.n_group:
                raise UserError(f"topk_group={self.topk_group} must lie in 1..n_group={self.n_group}")
            eligible = self.n_routed_experts // self.n_group * self.topk_group
            if not 1 <= self.num_experts_per_tok <= eligible:
                raise UserError(
                    f"num_experts_per_tok={self.num_experts_per_tok} must lie in 1..{eligible}, the experts of topk_group groups"
                )

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values a token leaves in the cache, per layer: post-norm latent and post-RoPE key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    corpus: "stdlib" (the Python standard library's own sources), or paths of directories, .jsonl(.gz), .parquet.
    """

    corpus: tuple[str, ...] = ("stdlib",)
    tokenizer: str | None = None  # directory or tokenizer.json; None trains a byte-level BPE of model.vocab_size on the corpus
    heldout_fraction: float = 0.05
    fim_rate: float = 0.0
    mask_documents: bool = False  # True: attention does not cross documents (post-training); pre-training packs without a mask


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedules (report §4.2). Schedules are in tokens, so that they do not depend on the batch size."""

    learning_rate: float = 2.2e-4
    warmup_steps: int = 2000
    # The report: constant to `constant_tokens`, cosine to `final_ratio` over `cosine_tokens`, then two constant tails.
    constant_tokens: float = 10e12
    cosine_tokens: float = 4.3e12
    cosine_final_ratio: float = 0.1
    first_tail_tokens: float = 333e9
    second_tail_ratio: float = 7.3e-6 / 2.2e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    ema_decay: float | None = None
    # Balance: step of the router bias (0 from `bias_update_until_tokens` on), weight of the sequence-wise loss, weight of the MTP loss.
    bias_update_speed: float = 1e-3
    bias_update_until_tokens: float = 14.3e12
    balance_loss_weight: float = 1e-4
    mtp_loss_weight: float = 0.3
    mtp_loss_weight_tail: float = 0.1
    mtp_tail_from_tokens: float = 10e12


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run: everything a recipe says."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = 1000
    sequence_length: int = 4096
    batch_size: int = 8  # sequences a step, over all devices
    batch_ramp_from: int | None = None  # first batch size; grows linearly in tokens to batch_size over batch_ramp_tokens
    batch_ramp_tokens: float = 0.0
    microbatch_size: int | None = None  # sequences a forward pass, over all devices; None: the whole batch (no gradient accumulation)
    # float32 everywhere; bf16 compute on float32 masters; fp8 (Hopper kernels); fp8_reference: the same recipe in plain JAX.
    precision: Literal["float32", "bf16", "fp8", "fp8_reference"] = "bf16"
    remat: Literal["none", "layer", "norms_and_up"] = "layer"
    seed: int = 0
    deterministic: bool = False  # deterministic GPU reductions, so that a resumed run is bit-equal there too
    mesh: str = "data=-1"
    workdir: str = "runs/{recipe}"
    init_from: str | None = None
    resume: str = "auto"  # auto | never | path of a run or step
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    eval_every: int = 500
    log_every: int = 1
    max_bad_steps: int = 10  # non-finite steps in a row before the run stops


def to_dict(config: Any) -> dict:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: dict, *, where: str = "") -> Any:
    """The inverse of `to_dict`. Raises UserError that names an unknown field and the nearest known one."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    made = {}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"unknown field {where + name!r}{did_you_mean(name, fields)}")
        nested = _NESTED.get((cls, name))
        if nested is not None and isinstance(value, dict):
            value = from_dict(nested, value, where=f"{where}{name}.")
        made[name] = tuple(value) if isinstance(value, list) else value
    return cls(**made)


_NESTED = {
    (ModelConfig, "rope_scaling"): RopeScaling,
    (TrainConfig, "model"): ModelConfig,
    (TrainConfig, "data"): DataConfig,
    (TrainConfig, "optimizer"): OptimizerConfig,
}


def did_you_mean(name: str, known) -> str:
    """' (did you mean ...?)' or ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
