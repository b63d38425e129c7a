"""The buffers of an FP8 step as XLA compiles it for a Hopper GPU, read from the scheduled program: what the table of recipe.py allows, and
nothing else, is kept of the forward pass in bfloat16; weights of FP8 linears have no bfloat16 copy."""

import math
import re
from collections import Counter
from typing import NamedTuple

import pytest

from dsv3_jax.config import ModelConfig, TrainConfig
from dsv3_jax.training.aot import compile_step
from pallas_kernels import aot

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not aot.available(), reason="needs the dependency group aot")]

ROWS, LENGTH = 2, 1120  # seven divides every array of tokens and no weight
TOKENS = ROWS * LENGTH
MODEL = ModelConfig(  # every kind of activation has a width of its own
    vocab_size=1408,
    hidden_size=512,
    num_hidden_layers=2,
    intermediate_size=1152,
    num_attention_heads=2,
    q_lora_rank=768,
    kv_lora_rank=128,
    qk_nope_head_dim=128,
    v_head_dim=128,
    first_k_dense_replace=1,
    moe_intermediate_size=128,
    n_routed_experts=8,
    num_experts_per_tok=5,
    n_group=1,
    topk_group=1,
    rope_scaling=None,
    max_position_embeddings=LENGTH,
)
LARGE = 64 * TOKENS  # elements: smaller arrays are tables, scales and router scores


class Buffer(NamedTuple):
    """dtype, elements; scope: of the operation that writes it; readers: scopes of those that read it."""

    dtype: str
    size: int
    scope: str
    readers: list[str]


@pytest.fixture(scope="module")
def buffers() -> list[Buffer]:
    """All arrays that the compiled step writes, in the order in which it does."""
    config = TrainConfig(
        model=MODEL, batch_size=ROWS, sequence_length=LENGTH, precision="fp8", remat="norms_and_up", mesh="data=1", checkpoint_every=1
    )
    text = compile_step(config)[0].as_text()
    assert "is_scheduled=true" in text
    [entry] = re.findall(r"^ENTRY [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    return _buffers(entry)


def _buffers(entry: str) -> list[Buffer]:
    written, same = {}, {}  # (instruction, index of its results) -> Buffer; instruction -> what it is another name of
    for line in entry.splitlines():
        name, types, operation, operands = re.match(r"\s*(?:ROOT )?%([\w.-]+) = (.*?) ([\w-]+)\((.*?)\)(?:, |$)", line).groups()
        scope = found[1] if (found := re.search(r'op_name="([^"]*)"', line)) else ""
        operands = re.findall(r"%([\w.-]+)", operands)
        if operation == "get-tuple-element":
            same[name] = (operands[0], int(re.search(r"index=(\d+)", line)[1]))
        elif operation == "bitcast":
            same[name] = same.get(operands[0], (operands[0], 0))
        else:
            if operation != "tuple":
                for operand in operands:
                    if (place := same.get(operand, (operand, 0))) in written:
                        written[place].readers.append(scope)
            if operation not in ("parameter", "constant", "tuple"):
                for i, (dtype, shape) in enumerate(re.findall(r"(\w+)\[([\d,]*)\]", types)):
                    written[name, i] = Buffer(dtype, math.prod(int(n) for n in shape.split(",") if n), scope, [])
    return list(written.values())


def is_backward(scope: str) -> bool:
    return "transpose(" in scope


def test_no_weight_of_an_fp8_linear_is_copied_in_bf16(buffers):
    """What is no array of tokens and in bfloat16, in the forward and the backward pass, is a weight that the table leaves alone."""
    weights = {buffer.size for buffer in buffers if buffer.dtype == "bf16" and "jvp(" in buffer.scope and buffer.size % 7}
    head, eh_proj = MODEL.vocab_size * MODEL.hidden_size, 2 * MODEL.hidden_size**2
    router = MODEL.n_routed_experts * MODEL.hidden_size  # in float32: three or six parts of its products
    assert {size for size in weights if size > 64 * 128} - {3 * router, 6 * router} == {head, eh_proj}


def test_kept_for_the_backward_pass_is_what_the_table_says(buffers):
    """Values a token, by dtype."""
    layers, others = Counter(), Counter()
    for dtype, size, scope, readers in buffers:
        if size >= LARGE and size % 7 == 0 and not is_backward(scope) and any(map(is_backward, readers)):
            (layers if "jit(layer)" in scope else others)[dtype, size // TOKENS] += 1
    c = MODEL
    assert layers == {
        ("bf16", c.hidden_size): 3,  # the residual stream after attention, and between the layers
        ("bf16", c.q_lora_rank): 2,
        ("bf16", c.latent_dim): 2,
        ("bf16", c.num_attention_heads * c.v_head_dim): 2,
        ("f8e4m3fn", c.num_experts_per_tok * c.hidden_size): 1,  # dispatched tokens
        ("f8e4m3fn", c.num_experts_per_tok * 2 * c.moe_intermediate_size): 1,  # gate and up of the routed experts
        ("f8e4m3fn", 2 * c.moe_intermediate_size): 1,  # of the shared one
        ("f8e4m3fn", 2 * c.intermediate_size): 1,  # and of the dense layer
    }
    assert others == {
        ("bf16", c.hidden_size): 5,  # the embedding, the last layer's output; MTP's two inputs, its residual stream after attention
        ("bf16", c.q_lora_rank): 1,
        ("bf16", c.latent_dim): 1,
        ("bf16", c.num_attention_heads * c.v_head_dim): 1,
        ("f8e4m3fn", c.num_experts_per_tok * c.hidden_size): 1,
        ("f8e4m3fn", c.num_experts_per_tok * 2 * c.moe_intermediate_size): 1,
        ("f8e4m3fn", 2 * c.moe_intermediate_size): 1,
        ("bf16", 2 * c.vocab_size): 1,  # gradients of the logits, of the main model's and of MTP's
    }
