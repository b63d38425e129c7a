"""Division that rounds once, inside of a kernel. Mosaic's own becomes `div.full`, which may be two units off, and then a code is wrong."""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels.quantize.reference import exact_divide


def exact_divide_on(layout, interpret):
    """A function (x, y) -> x / y for float32 arrays in `layout`; in the interpreter, plain JAX."""
    if interpret is not None:
        return exact_divide

    def divide(x, y):
        @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout))
        def exact(_, x, y):
            return x._pointwise(_divide_registers, y)

        return exact(x, plgpu.layout_cast(y, layout))  # a constant has no layout yet

    return divide


def _divide_registers(x, y):
    if not isinstance(x.type, ir.VectorType):
        return llvm.inline_asm(x.type, [x, y], "div.rn.f32 $0, $1, $2;", "=f,f,f")
    for i in range(ir.VectorType(x.type).shape[0]):
        quotient = _divide_registers(vector.extract(x, [], [i]), vector.extract(y, [], [i]))
        x = vector.insert(quotient, x, [], [i])
    return x
