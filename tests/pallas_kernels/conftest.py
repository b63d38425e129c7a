"""Every product is tested twice: the plain-JAX reference, and the Hopper kernel in the GPU interpreter, with small tiles."""

import functools
import os

import pytest

os.environ.setdefault("NPROC", "32")  # the interpreter runs each simulated warpgroup in a thread, and with too few of them it waits forever


@pytest.fixture(params=["reference", "hopper"])
def implementation(request):
    """A function that turns the name of a product into its reference, or into its kernel in the interpreter with a given Config."""
    import jax
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.gemm import Config
    from pallas_kernels.grouped_bf16 import hopper as bf16
    from pallas_kernels.grouped_bf16 import reference as bf16_reference
    from pallas_kernels.grouped_matmul import hopper as grouped
    from pallas_kernels.grouped_matmul import reference as grouped_reference
    from pallas_kernels.matmul import hopper as dense
    from pallas_kernels.matmul import reference as dense_reference
    from pallas_kernels.wgrad import hopper as wgrad
    from pallas_kernels.wgrad import reference as wgrad_reference

    plain = (dense_reference, grouped_reference, wgrad_reference, bf16_reference)
    modules = (dense, grouped, wgrad, bf16) if request.param == "hopper" else plain

    def find(op, config=None, num_sms=2):
        function = next(getattr(module, op) for module in modules if hasattr(module, op))
        if request.param == "hopper":
            config = config or Config(64, 64, 2)
            function = functools.partial(function, num_sms=num_sms, config=config, interpret=plgpu.InterpretGPUParams())
        return lambda *operands, **options: jax.jit(functools.partial(function, **options))(*operands)

    find.name = request.param
    return find
