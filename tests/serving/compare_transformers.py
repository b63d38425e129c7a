"""Tokens/s of transformers' `generate` of a recipe's model on one GPU, to be held beside ours.

    python tests/serving/compare_transformers.py --batch 64 --context 2048
    python -m dsv3_jax.serving.decode_bench moonlight_16b --precision bf16 --batch 64

bfloat16, random weights, greedy, `grouped_mm` experts, PyTorch's attention. Sequences start in the middle of their answers on both sides:
its cache (of latents, since version 5; every step makes keys and values of all heads of it) is filled with noise, so that no prompt is
timed.
"""

import argparse
import dataclasses
import time

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from dsv3_jax.recipes import model_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="moonlight_16b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    options = parser.parse_args()
    config = model_config(options.recipe)
    names = {field.name for field in dataclasses.fields(config)} & set(DeepseekV3Config.__annotations__)
    theirs = DeepseekV3Config(
        **{name: getattr(config, name) for name in names}, num_key_value_heads=config.num_attention_heads,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, num_mtp_layers=0,
    )  # fmt: skip
    torch.manual_seed(0)
    start = time.perf_counter()
    with torch.device("cuda"), torch.inference_mode():
        model = DeepseekV3ForCausalLM._from_config(
            theirs, attn_implementation="sdpa", experts_implementation="grouped_mm", dtype=torch.bfloat16
        ).eval()
        cache = DynamicCache(config=theirs)
        for layer in range(config.num_hidden_layers):
            latent, rope_key = (
                torch.randn(options.batch, 1, options.context, width, dtype=torch.bfloat16)
                for width in (config.kv_lora_rank, config.qk_rope_head_dim)
            )
            cache.update(latent, rope_key, layer)
        prompts = torch.randint(0, config.vocab_size, (options.batch, options.context + 1))

        def generate(tokens):
            torch.cuda.synchronize()
            start = time.perf_counter()
            limits = dict(max_new_tokens=tokens, min_new_tokens=tokens)
            model.generate(prompts, attention_mask=torch.ones_like(prompts), past_key_values=cache, do_sample=False, **limits)
            torch.cuda.synchronize()
            cache.crop(options.context)
            return time.perf_counter() - start

        print(f"model and cache in {time.perf_counter() - start:.0f} s, first token in {generate(1):.1f} s", flush=True)
        took = generate(options.tokens)
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"transformers, {torch.cuda.get_device_name()}, batch {options.batch}, context {options.context}: "
        f"{took / options.tokens * 1e3:.1f} ms a step, {options.batch * options.tokens / took:,.0f} tokens/s, peak memory {memory:.1f} GiB"
    )


if __name__ == "__main__":
    main()
