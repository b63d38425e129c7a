"""Reference values of the V2-Lite, V2 and Moonlight settings at tiny sizes, made with transformers' DeepseekV2 and DeepseekV3 models.

Needs torch and transformers (5.23 and torch 2.13 on a CPU made the files beside this one), which the project itself does not:

    python -m venv /tmp/hf && /tmp/hf/bin/pip install torch transformers && /tmp/hf/bin/python tests/data/make_v2_moonlight.py

Random weights, float32, eager attention. Each directory gets a checkpoint as transformers saves it and `expected.npz`: ids, logits,
hidden states after each layer, the routers' choices (sorted by expert) and weights, greedy tokens, loss and gradient norms.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent / "models"
SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3, first_k_dense_replace=1,
    num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, max_position_embeddings=2560, initializer_range=0.1,
)  # fmt: skip
YARN = dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=64, beta_fast=32.0, beta_slow=1.0)
MODELS = {
    # softmax, plain top-k, weights not normalised; no query latent; YaRN with mscale 0.707 in both places
    "tiny_v2_lite": ("DeepseekV2", dict(
        q_lora_rank=None, n_group=1, topk_group=1, topk_method="greedy", routed_scaling_factor=1.0, norm_topk_prob=False,
        rope_parameters=YARN | dict(rope_theta=10000.0, mscale=0.707, mscale_all_dim=0.707),
    )),
    # the same router limited to groups, scored by their best expert, and a scaling factor
    "tiny_v2": ("DeepseekV2", dict(
        q_lora_rank=24, n_group=4, topk_group=2, topk_method="group_limited_greedy", routed_scaling_factor=16.0, norm_topk_prob=False,
        rope_parameters=YARN | dict(rope_theta=10000.0, mscale=0.707, mscale_all_dim=0.707),
    )),
    # V3's router with one group, no query latent, no YaRN, another theta and epsilon
    "tiny_moonlight": ("DeepseekV3", dict(
        q_lora_rank=None, n_group=1, topk_group=1, routed_scaling_factor=2.446, norm_topk_prob=True, rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=50000.0), num_nextn_predict_layers=0,
    )),
}  # fmt: skip


def make(name: str, family: str, settings: dict, seed: int) -> None:
    torch.manual_seed(seed)
    config = getattr(transformers, family + "Config")(**SIZES, **settings)
    model = getattr(transformers, family + "ForCausalLM")._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Norms off one and uneven routers, or a mistake in them would not show.
            if "norm" in parameter_name:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.5 if "gate.weight" in parameter_name else 0.1)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1)

    routed, handles = {}, []
    for i, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):
            handles.append(layer.mlp.experts.register_forward_hook(lambda _, inputs, __, i=i: routed.update({i: inputs[1:3]})))
    ids = torch.from_numpy(np.random.default_rng(seed).integers(2, SIZES["vocab_size"], (2, 40)))
    output = model(ids, labels=ids, output_hidden_states=True)
    output.loss.backward()
    for handle in handles:
        handle.remove()
    expected = {"ids": ids, "logits": output.logits, "loss": output.loss}
    for i, hidden in enumerate(output.hidden_states):
        # transformers gives the embedding, then each layer's output, the last one after the final norm
        expected[f"hidden_{i}" if i <= SIZES["num_hidden_layers"] - 1 else "hidden_normed"] = hidden
    for i, (experts, weights) in routed.items():
        order = experts.argsort(dim=-1)
        expected[f"experts_{i}"], expected[f"weights_{i}"] = experts.gather(-1, order), weights.gather(-1, order)
    tokens = ids[:, :12]
    with torch.no_grad():
        for _ in range(16):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    expected["greedy"] = tokens[:, 12:]

    directory = HERE / name
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    grads = dict(model.named_parameters())
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model.save_pretrained(directory / "gradients")  # under checkpoint names: transformers splits its merged weights when it saves
    from safetensors.torch import load_file

    gradients = load_file(directory / "gradients" / "model.safetensors")
    shutil.rmtree(directory / "gradients")
    names = sorted(gradient for gradient in gradients if not gradient.endswith("e_score_correction_bias"))
    assert len(names) >= len(grads)
    expected["grad_names"] = np.array(names)
    expected["grad_norm"] = np.array([gradients[gradient].norm() for gradient in names])
    np.savez_compressed(directory / "expected.npz", **{k: v.detach().numpy() if torch.is_tensor(v) else v for k, v in expected.items()})
    print(name, json.loads((directory / "config.json").read_text()), {k: tuple(v.shape) for k, v in expected.items()})


if __name__ == "__main__":
    for seed, (name, (family, settings)) in enumerate(MODELS.items()):
        make(name, family, settings, seed)
