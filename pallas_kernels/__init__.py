"""Kernels for NVIDIA Hopper in JAX's Pallas: block-scaled FP8 products, grouped bfloat16 products, quantisation, and MLA decode. Each op
has a plain-JAX reference.

    a, b = quantize_tiles(x), quantize_blocks(w)      # x [M, K], w [N, K]
    y = fp8_matmul(a, b)                              # x @ w.T, bfloat16 [M, N]

`python -m pallas_kernels.OP.bench` times an op, `python -m pallas_kernels.tune OP` regenerates its tile choices for the device it runs on.
"""

from pallas_kernels.cross_entropy import cross_entropy_gradient
from pallas_kernels.gather_rows import gather_rows
from pallas_kernels.grouped_bf16 import grouped_bf16_matmul, grouped_bf16_wgrad
from pallas_kernels.grouped_matmul import grouped_fp8_matmul, masked_fp8_matmul
from pallas_kernels.matmul import fp8_matmul
from pallas_kernels.mla_decode import mla_append, mla_decode
from pallas_kernels.quantize import (
    quantize_blocks,
    quantize_both,
    quantize_tiles,
    requantize_transposed,
    rmsnorm_quantize,
    swiglu_backward,
    swiglu_quantize,
    swiglu_quantize_both,
)
from pallas_kernels.quantized import Quantized
from pallas_kernels.scatter_rows import scatter_rows
from pallas_kernels.swiglu import swiglu_gradient
from pallas_kernels.wgrad import fp8_wgrad, grouped_fp8_wgrad

__all__ = [
    "Quantized",
    "cross_entropy_gradient",
    "fp8_matmul",
    "fp8_wgrad",
    "gather_rows",
    "grouped_bf16_matmul",
    "grouped_bf16_wgrad",
    "grouped_fp8_matmul",
    "grouped_fp8_wgrad",
    "masked_fp8_matmul",
    "mla_append",
    "mla_decode",
    "quantize_blocks",
    "quantize_both",
    "quantize_tiles",
    "requantize_transposed",
    "rmsnorm_quantize",
    "scatter_rows",
    "swiglu_backward",
    "swiglu_gradient",
    "swiglu_quantize",
    "swiglu_quantize_both",
]
