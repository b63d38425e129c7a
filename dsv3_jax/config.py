"""Every option there is, as frozen dataclasses.

`ModelConfig` carries the field names of the released `config.json`, so that a Hugging Face checkpoint and a recipe describe a model
in the same words. A recipe (`configs/*.py`) is a function that returns a `TrainConfig`.
"""

import dataclasses
import difflib
import math
from typing import Any, Literal

from dsv3_jax.errors import UserError


def _check_at_least(least: int, config: Any, *names: str) -> None:
    """Raises UserError where one of the fields is less, not a number or infinite; None says that there is nothing to check."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"{name}={value} must be at least {least}{' and finite' if isinstance(value, float) else ''}")


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        if not (value := getattr(config, name)) > 0:
            raise UserError(f"{name}={value} must be more than 0")


def _check_not_empty(config: Any, *names: str) -> None:
    """An empty path, as an unset variable of a shell makes it, would be the current folder."""
    for name in names:
        value = getattr(config, name)
        if "" in (value if isinstance(value, tuple) else (value,)):
            raise UserError(f"{name} is empty: name a file or folder, or leave it out")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN, as `rope_scaling` in config.json (type "yarn")."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        _check_at_least(1, self, "factor", "original_max_position_embeddings")
        _check_at_least(0, self, "mscale", "mscale_all_dim")
        _check_positive(self, "beta_fast", "beta_slow")


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
        _check_at_least(1, self, "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
        _check_at_least(1, self, "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        _check_at_least(1, self, "max_position_embeddings")
        _check_at_least(0, self, "n_shared_experts", "num_nextn_predict_layers", "rms_norm_eps", "initializer_range")
        _check_at_least(0, self, "routed_scaling_factor")
        if not 1 < self.rope_theta < math.inf:
            raise UserError(f"rope_theta={self.rope_theta} must be more than 1 and finite")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise UserError(f"first_k_dense_replace={self.first_k_dense_replace} must lie in 0..num_hidden_layers={self.num_hidden_layers}")
        if self.qk_rope_head_dim % 2:
            raise UserError(f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: RoPE rotates pairs")
        if self.num_moe_layers or self.num_nextn_predict_layers:
            _check_at_least(1, self, "moe_intermediate_size", "n_routed_experts", "n_group")
            if self.n_routed_experts % self.n_group:
                raise UserError(f"n_routed_experts={self.n_routed_experts} must be a multiple of n_group={self.n_group}")
            if not 1 <= self.topk_group <= self.n_group:
                raise UserError(f"topk_group={self.topk_group} must lie in 1..n_group={self.n_group}")
            if self.n_group > 1 and self.topk_method == "noaux_tc" and self.n_routed_experts < 2 * self.n_group:
                raise UserError(f"n_group={self.n_group} leaves groups of one expert, and their best two choose a group: use fewer")
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
    """What is trained on."""

    corpus: tuple[str, ...] = ("stdlib",)  # stdlib: the Python standard library's own sources; else directories or files of text
    tokenizer: str | None = None  # a folder with tokenizer.json; None: a byte-level BPE of model.vocab_size trained on the corpus
    cache: str | None = None  # where the prepared rows and the trained tokenizer lie; None: in the run folder
    heldout_fraction: float = 0.05  # share of the documents that are held out
    fim_rate: float = 0.0  # share of the training documents rearranged for fill-in-the-middle (report: 0.1)
    mask_documents: bool = False  # True: attention does not cross documents (post-training); pre-training packs without a mask

    def __post_init__(self):
        _check_not_empty(self, "corpus", "tokenizer", "cache")
        if not 0 <= self.heldout_fraction < 1:
            raise UserError(f"heldout_fraction={self.heldout_fraction} must lie in 0..1, 1 excluded")
        if not 0 <= self.fim_rate <= 1:
            raise UserError(f"fim_rate={self.fim_rate} must lie in 0..1")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the schedules; defaults are the report's (section 4.2).

    Fields that end in _start or _end are places in the run, as fractions of all of its tokens: a short run then goes through the
    same phases as a long one, and they do not depend on the batch size.
    """

    learning_rate: float = 2.2e-4  # its constant maximum
    warmup_steps: int = 2000  # linear from zero
    decay_start: float = 10 / 14.8  # from here on a cosine
    decay_end: float = 14.3 / 14.8  # to here, then constant
    decay_ratio: float = 0.1  # learning rate after the cosine, as a part of the maximum
    tail_start: float = 14.633 / 14.8  # from here on the last constant
    tail_ratio: float = 7.3e-6 / 2.2e-4  # that constant, as a part of the maximum
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices, the embedding and the head among them; norms do not decay
    clip_norm: float = 1.0  # of the global gradient
    moment_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    ema_decay: float | None = None  # of an exponential moving average of the weights, kept beside them
    bias_update_speed: float = 1e-3  # step of the router's selection bias
    bias_update_end: float = 14.3 / 14.8  # it stays as it is from here on
    balance_loss_weight: float = 1e-4
    mtp_loss_weight: float = 0.3
    mtp_loss_weight_tail: float = 0.1
    mtp_tail_start: float = 10 / 14.8

    def __post_init__(self):
        _check_at_least(0, self, "learning_rate", "warmup_steps", "decay_ratio", "tail_ratio", "weight_decay", "bias_update_speed")
        _check_at_least(0, self, "balance_loss_weight", "mtp_loss_weight", "mtp_loss_weight_tail")
        _check_at_least(0, self, "mtp_tail_start", "bias_update_end")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"{name}={value} must lie in 0..1, 1 excluded")
        _check_positive(self, "eps", "clip_norm")
        if not 0 <= self.decay_start <= self.decay_end <= self.tail_start:
            raise UserError("decay_start <= decay_end <= tail_start must hold: they are the phases of the learning rate, in order")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run: everything a recipe says."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = 1000
    sequence_length: int = 4096
    batch_size: int = 8  # sequences a step, over all devices
    batch_ramp_from: int | None = None  # sequences of the first step; grows to batch_size linearly in tokens
    batch_ramp_end: float = 469 / 14800  # where it is reached, as a fraction of the run's tokens
    microbatch_size: int | None = None  # sequences a forward pass, over all devices; None: all, or in a pipeline one for each device
    pipeline_schedule: Literal["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"] = "dualpipev"  # of the mesh axis pipe
    pipeline_max_delayed: int | None = None  # microbatches whose weight gradients a rank puts off at most; None: as many as the schedule
    precision: Literal["auto", "float32", "bf16", "fp8", "fp8_reference"] = "auto"  # auto: bf16 on a GPU, float32 on a CPU
    remat: Literal["none", "layer", "norms_and_up", "norms"] = "layer"  # what the backward pass computes again
    seed: int = 0
    deterministic: bool = False  # deterministic GPU reductions, so that a resumed run is bit-equal there too
    mesh: str = "data=-1"  # sizes of the axes data, pipe, expert; one may be -1: what is left of the devices
    workdir: str = "runs/{recipe}"
    init_from: str | None = None  # parameters to start from: a run folder, one of its steps, or a Hugging Face directory
    resume: str = "auto"  # auto: where the run folder left off; never: only into a new folder; or the path of a run or step
    checkpoint_every: int = 1000  # steps
    keep_checkpoints: int = 3
    eval_every: int = 500  # steps
    eval_rows: int = 64  # held-out rows of an evaluation on the way; the last one takes all
    max_bad_steps: int = 10  # non-finite steps in a row before the run stops
    max_wait: int = 1800  # seconds for a step, compilation included; beyond it a process ends and says for which others it waited

    def __post_init__(self):
        _check_at_least(1, self, "steps", "sequence_length", "batch_size", "batch_ramp_from", "checkpoint_every", "keep_checkpoints")
        _check_at_least(1, self, "eval_every", "eval_rows", "max_bad_steps", "max_wait")
        _check_at_least(0, self, "pipeline_max_delayed")
        _check_not_empty(self, "workdir", "init_from", "resume")
        if not 0 <= self.batch_ramp_end <= 1:
            raise UserError(f"batch_ramp_end={self.batch_ramp_end} must lie in 0..1: it is a fraction of the run's tokens")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed={self.seed} must fit into 64 bits")
        first, micro = self.batch_ramp_from or self.batch_size, self.microbatch_size
        if not 1 <= first <= self.batch_size:
            raise UserError(f"batch_ramp_from={first} must lie in 1..batch_size={self.batch_size}")
        if micro is not None and (micro < 1 or self.batch_size % micro or first % micro):
            ramp = f" and batch_ramp_from={first}" if self.batch_ramp_from else ""
            raise UserError(f"microbatch_size={micro} must divide batch_size={self.batch_size}{ramp}")


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
