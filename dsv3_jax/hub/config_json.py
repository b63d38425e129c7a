"""config.json of the DeepSeek family <-> ModelConfig.

Field names are the same; this file knows what a released config.json leaves out, what it may say that the model does not do, and how
YaRN is written down (`rope_scaling`, or `rope_parameters` in files of transformers 5).
"""

import dataclasses
import json
import typing
from pathlib import Path

from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.errors import UserError

# What a field is where config.json lacks it, by architecture: as the released configuration classes have it. Fields in neither table nor
# file are an error.
_ABSENT = {
    "num_nextn_predict_layers": 0,
    "mtp_hidden": "post_norm",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": None,
}
_ARCHITECTURES = {
    "DeepseekV3ForCausalLM": _ABSENT | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True},  # Moonlight, K2 too
    "DeepseekV2ForCausalLM": _ABSENT
    | {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False}
    | {"n_group": 1, "topk_group": 1, "n_shared_experts": 0, "routed_scaling_factor": 1.0},
}
_MODEL_TYPES = {"deepseek_v3": "DeepseekV3ForCausalLM", "kimi_k2": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}
# Fields that must have this value where they are there: nothing else is implemented.
_ONLY = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
    "rope_interleave": True,
}
_QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def read(directory: Path) -> tuple[ModelConfig, dict]:
    """The model that directory/config.json describes, and the file as it is. Raises UserError."""
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give a Hugging Face model directory") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object: give a Hugging Face model directory")
    return parse(values, path), values


def parse(values: dict, where: str | Path = "config.json") -> ModelConfig:
    """The model that the fields of a config.json describe. Raises UserError, which begins with `where`."""
    absent = _ARCHITECTURES[_architecture(values, where)]
    for name, only in _ONLY.items():
        if values.get(name, only) != only:
            raise UserError(f"{where}: {name}={values[name]!r} is not supported: only {only!r} is")
    quantization = _nested(values, "quantization_config", where)
    if quantization and any(quantization.get(name) != _QUANTIZATION[name] for name in ("quant_method", "weight_block_size")):
        raise UserError(f"{where}: quantization_config {quantization} is not supported: only quant_method fp8 in blocks of [128, 128] is")
    values = _with_rope_scaling(values, where)
    # A field that is null says as little as one that is absent, except q_lora_rank and rope_scaling, where null is a value.
    given = {name: value for name, value in values.items() if value is not None or name in ("q_lora_rank", "rope_scaling")}
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    if missing := sorted(fields - given.keys() - absent.keys()):
        raise UserError(f"{where} lacks {', '.join(missing)}: use the config.json that came with the model")
    made = absent | {name: value for name, value in given.items() if name in fields}
    return _make(ModelConfig, made, where)


def named_dtype(values: dict) -> str | None:
    """What a config.json says that the model is computed in, e.g. "bfloat16"."""
    return values.get("torch_dtype") or values.get("dtype")  # transformers 5 writes the second


def render(config: ModelConfig, precision: str) -> dict:
    """The config.json of a checkpoint in that precision, in the released field names; read by transformers, vLLM and SGLang too."""
    architecture = "DeepseekV3ForCausalLM" if config.topk_method == "noaux_tc" else "DeepseekV2ForCausalLM"
    values = dataclasses.asdict(config)
    if config.mtp_hidden == _ABSENT["mtp_hidden"]:
        del values["mtp_hidden"]  # not a released field: written only where it says something
    if config.rope_scaling is not None:
        values["rope_scaling"] |= {"type": "yarn"}
    model_type = next(name for name, value in _MODEL_TYPES.items() if value == architecture)
    values |= {"architectures": [architecture], "model_type": model_type, "num_key_value_heads": config.num_attention_heads}
    values |= {name: only for name, only in _ONLY.items() if name not in ("mlp_bias", "rope_interleave")}
    values |= {"attention_dropout": 0.0, "use_cache": True, "torch_dtype": "float32" if precision == "float32" else "bfloat16"}
    if precision == "fp8":
        values["quantization_config"] = _QUANTIZATION
    return dict(sorted(values.items()))


def _architecture(values: dict, where: str | Path) -> str:
    named, model_type = values.get("architectures"), values.get("model_type")
    if not named and not model_type:
        raise UserError(f"{where} names no architecture: give a Hugging Face model directory")
    named = str(named[0] if named and isinstance(named, list) else named or _MODEL_TYPES.get(str(model_type), model_type))
    if named not in _ARCHITECTURES:
        raise UserError(f"{where}: architecture {named} is not supported: only {' and '.join(_ARCHITECTURES)} are")
    return named


def _nested(values: dict, name: str, where: str | Path) -> dict:
    """The object that a field holds; an empty one where the field is null or absent."""
    found = values.get(name)
    if not isinstance(found, dict | None):
        raise UserError(f"{where}: {name}={found!r} is not supported: an object or null is")
    return dict(found or {})


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}


def _make(cls: type, values: dict, where: str | Path, prefix: str = "") -> typing.Any:
    """The config of those fields. Raises UserError that names the first with a value of another type than its own."""
    for name, kind in typing.get_type_hints(cls).items():
        value, allowed = values[name], typing.get_args(kind) or (kind,)
        if typing.get_origin(kind) is typing.Literal:
            fits, shown = value in allowed, map(repr, allowed)
        else:  # by the type itself, since True is an int to Python; JSON writes 1.0 as 1 as well
            fits = type(value) in allowed or (float in allowed and type(value) is int)
            shown = (_KINDS[kind] for kind in allowed if kind in _KINDS)
        if not fits:
            raise UserError(f"{where}: {prefix}{name}={value!r} is not supported: {' or '.join(shown)} is")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _with_rope_scaling(values: dict, where: str | Path) -> dict:
    """The values with `rope_scaling` a RopeScaling or None, and `rope_theta`, whichever way the file says it."""
    scaling = _nested(values, "rope_parameters", where) or _nested(values, "rope_scaling", where)
    values = values | ({"rope_theta": scaling["rope_theta"]} if "rope_theta" in scaling else {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return values | {"rope_scaling": None}
    if kind != "yarn":
        raise UserError(f"{where}: rope_scaling of type {kind!r} is not supported: only 'yarn' is")
    defaults = {field.name: field.default for field in dataclasses.fields(RopeScaling)}
    defaults["mscale_all_dim"] = 0.0  # where it is absent, the softmax scale is not corrected
    lacking = {"factor", "original_max_position_embeddings"} - scaling.keys()
    unknown = scaling.keys() - defaults.keys() - {"type", "rope_type", "rope_theta"}
    if lacking or unknown:
        raise UserError(f"{where}: rope_scaling {'lacks' if lacking else 'has the unknown'} {', '.join(sorted(lacking or unknown))}")
    made = {name: scaling.get(name, default) for name, default in defaults.items()}
    return values | {"rope_scaling": _make(RopeScaling, made, where, "rope_scaling.")}
