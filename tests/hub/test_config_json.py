"""config.json of the released models, and what is refused."""

import dataclasses

import pytest

from configs import deepseek_v3, moonlight_16b, v2_lite_16b
from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.errors import UserError
from dsv3_jax.hub import config_json

QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
# The fields of the released files that say something about the model, as they stand there.
COMMON = {
    "attention_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "kv_lora_rank": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
}
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
V3 = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "num_hidden_layers": 61, "intermediate_size": 18432, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "rope_theta": 10000, "num_nextn_predict_layers": 1,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "max_position_embeddings": 163840, "initializer_range": 0.02,
    "bos_token_id": 0, "eos_token_id": 1, "quantization_config": QUANTIZATION, "aux_loss_alpha": 0.001, "seq_aux": True,
}  # fmt: skip
KIMI_K2 = V3 | {
    "model_type": "kimi_k2", "vocab_size": 163840, "first_k_dense_replace": 1, "n_routed_experts": 384, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 2.827, "num_attention_heads": 64, "num_key_value_heads": 64, "rope_theta": 50000.0,
    "num_nextn_predict_layers": 0, "max_position_embeddings": 131072, "bos_token_id": 163584, "eos_token_id": 163585,
    "rope_scaling": {
        "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip
# No num_nextn_predict_layers.
V2_LITE = COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
    "num_hidden_layers": 27, "intermediate_size": 10944, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
    "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": None, "rope_theta": 10000, "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "max_position_embeddings": 163840, "initializer_range": 0.006, "bos_token_id": 100000, "eos_token_id": 100001,
}  # fmt: skip
# No rope_scaling at all.
MOONLIGHT = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 163840, "hidden_size": 2048,
    "num_hidden_layers": 27, "intermediate_size": 11264, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.446, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": None, "rope_theta": 50000.0, "rms_norm_eps": 1e-5, "num_nextn_predict_layers": 0,
    "max_position_embeddings": 8192, "initializer_range": 0.02, "bos_token_id": 163584, "eos_token_id": 163586,
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "recipe"), [(V3, deepseek_v3), (V2_LITE, v2_lite_16b), (MOONLIGHT, moonlight_16b)], ids=["v3", "v2_lite", "moonlight"]
)
def test_released_files_are_the_recipes(values, recipe):
    ours = dataclasses.replace(recipe.model(), initializer_range=values["initializer_range"])  # the report's is not the file's
    assert config_json.parse(values) == ours


def test_kimi_k2():
    config = config_json.parse(KIMI_K2)
    assert config.rope_scaling == RopeScaling(factor=32.0, beta_fast=1.0, beta_slow=1.0)
    assert (config.n_routed_experts, config.num_attention_heads, config.routed_scaling_factor) == (384, 64, 2.827)
    assert config.num_nextn_predict_layers == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("values", [V3, KIMI_K2, V2_LITE, MOONLIGHT], ids=["v3", "kimi_k2", "v2_lite", "moonlight"])
def test_what_is_written_is_read_back(values, precision):
    config = config_json.parse(values)
    written = config_json.render(config, precision)
    assert config_json.parse(written) == config
    assert written["architectures"] == values["architectures"]
    assert ("quantization_config" in written) == (precision == "fp8")
    # Every released field that we write has its released value.
    same = (values.keys() & written.keys()) - {"torch_dtype", "quantization_config", "model_type"}
    assert {name: written[name] for name in same} == {name: values[name] for name in same}


def test_the_other_reading_of_mtp_is_written():
    config = ModelConfig(mtp_hidden="pre_norm")
    assert config_json.parse(config_json.render(config, "bfloat16")) == config


@pytest.mark.parametrize(
    ("values", "absent"),
    [
        # configuration_deepseek.py of DeepSeek-V3 and of DeepSeek-V2-Lite; an MTP module is there only where the file says so.
        (V3, {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "initializer_range": 0.02, "norm_topk_prob": True, "topk_method": "noaux_tc"}),
        (V3, {"scoring_func": "sigmoid", "num_nextn_predict_layers": 0, "rope_scaling": None}),
        (V2_LITE, {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "n_group": 1, "topk_group": 1}),
        (V2_LITE, {"n_shared_experts": 0, "routed_scaling_factor": 1.0, "initializer_range": 0.02}),
    ],
)
def test_what_a_file_leaves_out(values, absent):
    config = config_json.parse({name: value for name, value in values.items() if name not in absent})
    assert {name: getattr(config, name) for name in absent} == absent


def test_what_yarn_leaves_out():
    assert config_json.parse(V3 | {"rope_scaling": YARN}).rope_scaling == RopeScaling(mscale=1.0, mscale_all_dim=0.0)


@pytest.mark.parametrize("name", ["n_group", "topk_group", "routed_scaling_factor", "n_shared_experts"])
def test_v3_must_say(name):
    """Its class has the values of the 671B for these, which another model's need not be."""
    with pytest.raises(UserError, match=f"lacks {name}"):
        config_json.parse({key: value for key, value in V3.items() if key != name})


def test_rope_parameters_of_transformers_5():
    values = {name: value for name, value in V3.items() if name not in ("rope_scaling", "rope_theta")}
    values["rope_parameters"] = {name: value for name, value in V3["rope_scaling"].items() if name != "type"}
    values["rope_parameters"] |= {"rope_type": "yarn", "rope_theta": 10000.0}
    assert config_json.parse(values) == config_json.parse(V3)
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 50000.0}
    assert config_json.parse(values).rope_scaling is None and config_json.parse(values).rope_theta == 50000.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            "LlamaForCausalLM is not supported: only DeepseekV3ForCausalLM and DeepseekV2ForCausalLM",
        ),
        ({"architectures": None, "model_type": "qwen3_moe"}, "qwen3_moe is not supported"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        ({"rope_interleave": False}, "rope_interleave=False is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "of type 'linear' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, "rope_scaling lacks original_max_position_embeddings"),
        ({"rope_scaling": YARN | {"attention_factor": 2}}, "rope_scaling has the unknown attention_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .* is not supported"),
        ({"quantization_config": QUANTIZATION | {"weight_block_size": [64, 64]}}, "quantization_config .* is not supported"),
        ({"n_group": 7}, "n_routed_experts=256 must be a multiple of n_group=7"),
        ({"eos_token_id": [1, 2]}, "eos_token_id=.1, 2. is not supported: a whole number or null is"),
        ({"hidden_size": 7168.0}, "hidden_size=7168.0 is not supported: a whole number is"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True is not supported: a whole number is"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1 is not supported: true or false is"),
        ({"rope_theta": 0}, "rope_theta=0 must be more than 1"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor=nan must be at least 0 and finite"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' is not supported: an object or null is"),
        ({"rope_scaling": YARN | {"factor": "40"}}, "rope_scaling.factor='40' is not supported: a number is"),
        ({"rope_scaling": YARN | {"beta_slow": 0}}, "beta_slow=0 must be more than 0"),
        ({"quantization_config": "fp8"}, "quantization_config='fp8' is not supported: an object or null is"),
        ({"architectures": 3}, "architecture 3 is not supported"),
        ({"architectures": None, "model_type": None}, "names no architecture"),
        ({"scoring_func": "tanh"}, "scoring_func='tanh' is not supported: 'sigmoid' or 'softmax' is"),
    ],
)
def test_refused(change, message):
    with pytest.raises(UserError, match=message) as error:
        config_json.parse(V3 | change, "dir/config.json")
    assert str(error.value).startswith("dir/config.json") and "\n" not in str(error.value)
