"""Tokens/s of transformers' DeepseekV3 training step of a recipe's model on one GPU, to be held beside ours.

    python tests/training/compare_transformers.py --rows 8 16
    python -m dsv3_jax.precision.bench step --precision bf16 --no-mtp --rows 16

Its fastest way that we know of: bfloat16 weights and AdamW moments (ours keeps float32 masters), `grouped_mm` experts, cuDNN attention,
`torch.compile`, fused AdamW, no recomputation. transformers trains no MTP module, so neither side has one.
"""

import argparse
import dataclasses
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3_jax import recipes


def config_of(recipe: str) -> DeepseekV3Config:
    model = recipes.train_config(recipe).model
    names = {field.name for field in dataclasses.fields(model)} & set(DeepseekV3Config.__annotations__)
    values = {name: getattr(model, name) for name in names}
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    return DeepseekV3Config(
        **values, num_key_value_heads=model.num_attention_heads, rope_parameters=rope, num_mtp_layers=0, use_cache=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16], help="sequences of 4,096 tokens a step; one after the other")
    parser.add_argument("--calls", type=int, default=10)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM._from_config(
        config_of(arguments.recipe), attn_implementation="sdpa", experts_implementation="grouped_mm", dtype=torch.bfloat16
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for rows in arguments.rows:
        measure(model, optimizer, rows, arguments.calls)


def measure(model, optimizer, rows: int, calls: int) -> None:
    tokens = torch.randint(0, model.config.vocab_size, (rows, 4096), device="cuda")
    torch._dynamo.reset()  # compiled for this shape alone
    torch.cuda.reset_peak_memory_stats()
    compiled = torch.compile(model, dynamic=False)

    def step():
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
            loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    start = time.perf_counter()
    first = step().item()
    print(f"first step {time.perf_counter() - start:.0f} s, loss {first:.3f}", flush=True)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    torch.cuda.synchronize()
    took = (time.perf_counter() - start) / calls
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"transformers, {rows} rows: {took * 1e3:.1f} ms, {tokens.numel() / took:,.0f} tokens/s, peak memory {peak:.1f} GiB", flush=True)


if __name__ == "__main__":
    main()
