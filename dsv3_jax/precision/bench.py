"""Speed and memory of training in FP8 and BF16 on one Hopper GPU.

    python -m dsv3_jax.precision.bench layers    # four MoE layers of V3, the share of one of 64 expert-parallel GPUs, by class of kernel
    python -m dsv3_jax.precision.bench step      # the training step of a recipe: tokens/s, FLOP utilisation, peak memory
    python -m dsv3_jax.precision.bench memory    # bytes of that step, compiled only (no GPU needed): what each technique saves

`layers` is DeepSeek's public training trace (deepseek-ai/profile-data, train.json: H800, 112 SMs, communication hidden) without the
communication: one sequence of 4,096 tokens, 4 routed experts with 8,192 rows each, the shared expert, forward and backward with routing,
permutation, quantisation and recomputation.
"""

import argparse
import dataclasses
import functools
import itertools
import re
import sys
import time
from collections import Counter

import jax
import jax.numpy as jnp

from dsv3_jax import command_line, recipes
from dsv3_jax.config import ModelConfig, TrainConfig
from dsv3_jax.model import Decoder
from dsv3_jax.model.moe import combine, dispatch
from dsv3_jax.parallel import profiles
from dsv3_jax.precision import attach, check_devices, forms
from dsv3_jax.precision import recipe as named_recipe

WITHOUT_GRAPHS = {"xla_gpu_graph_min_graph_size": 1_000_000}  # kernels in CUDA graphs do not carry the names of their operations
PEAK = {"bf16": 989e12, "fp8": 1979e12}  # dense FLOP/s of the card, from NVIDIA's data sheet
LAYERS, LOCAL_EXPERTS = 4, 4
V3_FLOP = 16.45e12  # of one layer and one sequence, forward and backward, attention counted causal
TRACE_MS = {"weight gradients": 32.8, "grouped products": 22.9, "attention": 22.0, "dense products": 18.8, "casts, transposes": 15.6}
TRACE_MS |= {"other": 17.5}
CLASSES = {  # of a kernel, by the scope its operation was made in
    "weight gradients": r"weight_gradient",
    "grouped products": r"grouped_product",
    "dense products": r"dense_product",
    "attention": r"attention_core",
    "casts, transposes": r"casts_and_transposes|convert_element_type|transpose$",
}


def card_share(config: ModelConfig, precision: str, num_sms: int | None = None):
    """(function, arguments): gradients of LAYERS of `config`'s MoE layers by their weights, experts reduced to the card's share.

    The router runs over all experts; each row then goes to one of LOCAL_EXPERTS in turn, so that all have the same number. Each layer
    has arrays of its own: nothing is stacked.
    """
    config = dataclasses.replace(
        config, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, vocab_size=1024, rope_scaling=None
    )

    def exchange(x_TD, routing, experts):
        slots = jnp.arange(routing.experts_TK.size, dtype=jnp.int32).reshape(routing.experts_TK.shape)
        local = routing._replace(experts_TK=slots % LOCAL_EXPERTS, stats=routing.stats._replace(load_E=jnp.zeros(LOCAL_EXPERTS)))
        dispatched = dispatch(experts.enter(x_TD), local)
        y_RD = experts(dispatched.x_RD, dispatched.group_sizes_E, dispatched.weights_R)
        return combine(y_RD, dispatched, x_TD.shape[0]), routing.stats.fill

    numerics = dataclasses.replace(named_recipe(precision), num_sms=num_sms)
    decoder = Decoder(config, numerics, remat="norms_and_up", exchange=exchange)

    def parameters(key):
        layer = jax.eval_shape(lambda stacked: jax.tree.map(lambda leaf: leaf[0], stacked), decoder.abstract_params()["moe_layers"])
        experts = layer["mlp"]["experts"]
        layer["mlp"]["experts"] = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((LOCAL_EXPERTS, *leaf.shape[1:]), leaf.dtype), experts)
        leaves, structure = jax.tree.flatten(layer)
        keys = jax.random.split(key, len(leaves))
        made = [jnp.ones(s.shape) if s.ndim == 1 else 0.02 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves)]
        return jax.tree.unflatten(structure, made)

    def gradients(layers, made, x_BSD, d_x_BSD):
        where = decoder.positions(jnp.zeros(x_BSD.shape[:2], jnp.int32))

        def objective(layers):
            x = x_BSD
            for params, form in zip(layers, made):
                x, _ = decoder.layer("moe_layers", attach(params, form), x, where)
            return jnp.sum((x * d_x_BSD).astype(jnp.float32))

        return jax.grad(objective)(layers)

    def arguments(length):
        layers = [jax.jit(parameters)(key) for key in jax.random.split(jax.random.key(0), LAYERS)]
        once_a_step = jax.jit(lambda params: forms(params, numerics))
        shape = (1, length, config.hidden_size)
        x, d_x = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(1)))
        return layers, [once_a_step(params) for params in layers], x, d_x

    return jax.jit(gradients), arguments


def seconds(function, *arguments, calls: int = 10) -> float:
    """A call's time, of `calls` back to back."""
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    for _ in range(calls):
        out = function(*arguments)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def kernels(compiled, *arguments) -> Counter:
    """{(kernel, scope of its operation): milliseconds} of one call; scopes are read from the compiled program."""
    scopes, milliseconds = profiles.scopes(compiled.as_text()), Counter()
    for event in itertools.chain(*profiles.trace(lambda: compiled(*arguments))):
        milliseconds[event.name, scopes.get(event.op, "")] += (event.end - event.start) / 1e6
    return milliseconds


def by_class(milliseconds: Counter) -> Counter:
    """Milliseconds of `kernels` by class."""
    sums = Counter()
    for (_, scope), ms in milliseconds.items():
        sums[classify(scope)] += ms
    return sums


def print_profile(milliseconds: Counter, count: int = 30) -> None:
    print(", ".join(f"{name} {ms:.1f}" for name, ms in by_class(milliseconds).most_common()), f"= {milliseconds.total():.1f} ms of kernels")
    for (kernel, scope), ms in milliseconds.most_common(count):
        print(f"{ms:9.2f}  {kernel[:50]:50s}  {scope[-110:]}")


def classify(scope: str) -> str:
    return next((name for name, pattern in CLASSES.items() if re.search(pattern, scope)), "other")


def v3_layers(arguments) -> None:
    print(f"{'':20s}{'ms':>9s}{'TFLOP/s':>9s}" + "".join(f"{name:>19s}" for name in TRACE_MS))
    trace = "".join(f"{ms:19.1f}" for ms in TRACE_MS.values())
    print(f"{'DeepSeek, 112 SMs':20s}{129.0:9.1f}{LAYERS * V3_FLOP / 129.0e-3 / 1e12:9.0f}{trace}")
    numerics = named_recipe(arguments.precision)
    for num_sms in arguments.num_sms:
        function, make = card_share(ModelConfig(), arguments.precision, num_sms)
        operands = make(4096)
        lowered = function.lower(*operands)
        took = seconds(lowered.compile(), *operands)
        milliseconds = kernels(lowered.compile(WITHOUT_GRAPHS), *operands)
        sums = by_class(milliseconds)
        classes = "".join(f"{sums[name]:19.1f}" for name in TRACE_MS)
        label = f"{arguments.precision}, {num_sms} SMs"
        print(f"{label:20s}{took * 1e3:9.1f}{LAYERS * V3_FLOP / took / 1e12:9.0f}{classes}", flush=True)
        if arguments.profile:
            print_profile(milliseconds)
    once_a_step = jax.jit(lambda layers: [forms(params, numerics) for params in layers])
    print(f"the weights as products read them, once a step: {seconds(once_a_step, operands[0]) * 1e3:.2f} ms")


def lowered_step(config: TrainConfig):
    """(the traced training step, a function that makes its state, its other arguments) of a recipe on one device, random tokens."""
    from dsv3_jax.training.schedules import Scheduled
    from dsv3_jax.training.step import Trainer

    trainer = Trainer(Decoder(config.model, named_recipe(config.precision), remat=config.remat), config)
    shape = (config.batch_size, config.sequence_length + 1)
    batch = {"tokens": jax.random.randint(jax.random.key(1), shape, 0, config.model.vocab_size)}
    init = jax.jit(lambda key: trainer.init(Decoder(config.model).init(key)))
    rest = batch, jax.tree.map(jnp.float32, Scheduled(1e-4, 0.3, 1e-3))
    one = functools.partial(trainer._step, trainer.spread.decoder(trainer.buffers.size))
    lowered = jax.jit(one, donate_argnums=0).lower(jax.eval_shape(init, jax.random.key(0)), *rest)
    return lowered, lambda seed=0: init(jax.random.key(seed)), rest


def flop_per_token(config: TrainConfig) -> float:
    """Of the model, forward and backward: 6 a weight that a token meets (the embedding's none, the head also for MTP), and attention's
    scores, causal: half of them. What is computed again does not count."""
    model = config.model
    shapes = Decoder(model).abstract_params()
    del shapes["embed"]
    met = lambda path: model.num_experts_per_tok / model.n_routed_experts if "experts" in (key.key for key in path) else 1  # noqa: E731
    weights = sum(met(path) * leaf.size for path, leaf in jax.tree.leaves_with_path(shapes))
    weights += model.num_nextn_predict_layers * shapes["lm_head"].size
    blocks = model.num_hidden_layers + model.num_nextn_predict_layers
    return 6 * weights + 3 * blocks * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim) * config.sequence_length


def step(arguments) -> None:
    """One precision a process, because the peak of memory is the process's."""
    config = recipe_config(arguments)
    start = time.perf_counter()
    lowered, init, rest = lowered_step(config)
    compiled = lowered.compile()
    print(f"traced and compiled in {time.perf_counter() - start:.0f} s", flush=True)
    state = init()
    for _ in range(3):
        state, metrics = compiled(state, *rest)
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    for _ in range(arguments.calls):
        state, metrics = compiled(state, *rest)
    jax.block_until_ready((state, metrics))
    took = (time.perf_counter() - start) / arguments.calls
    rate = config.batch_size * config.sequence_length / took
    flop = flop_per_token(config)
    peak = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30
    print(
        f"{config.precision}, {config.batch_size} rows: {took * 1e3:.1f} ms, {rate:,.0f} tokens/s, {rate * flop / PEAK['bf16']:.1%} of the "
        f"BF16 peak ({flop / 1e9:.3f} GFLOP/token), peak memory {peak:.1f} GiB, loss {float(metrics['loss']):.3f}",
        flush=True,
    )
    if arguments.profile:
        print_profile(kernels(lowered.compile(WITHOUT_GRAPHS), state, *rest), 60)


def memory(arguments) -> None:
    """Arguments (weights, moments) and temporaries (activations, gradients) of the step, one technique at a time, compiled as in
    training/aot.py: needs its packages and no GPU."""
    from dsv3_jax.training import aot

    base = dataclasses.replace(recipe_config(arguments), mesh="data=1")
    print(f"{'precision':10s}{'remat':14s}{'moments':10s}{'state GiB':>11s}{'temporary GiB':>15s}")
    for precision, remat, moments in (
        ("bf16", "none", "float32"),
        ("bf16", "none", "bfloat16"),
        ("fp8", "none", "bfloat16"),
        ("bf16", "norms", "bfloat16"),
        ("fp8", "norms", "bfloat16"),
        ("bf16", "norms_and_up", "bfloat16"),
        ("fp8", "norms_and_up", "bfloat16"),
        ("fp8", "layer", "bfloat16"),
    ):
        optimizer = dataclasses.replace(base.optimizer, moment_dtype=moments)
        compiled, _ = aot.compile_step(dataclasses.replace(base, precision=precision, remat=remat, optimizer=optimizer))
        analysis = compiled.memory_analysis()
        sizes = f"{analysis.argument_size_in_bytes / 2**30:11.2f}{analysis.temp_size_in_bytes / 2**30:15.2f}"
        print(f"{precision:10s}{remat:14s}{moments:10s}{sizes}", flush=True)


def recipe_config(arguments) -> TrainConfig:
    """The recipe of that name with the options of a command: one microbatch a step, of `rows` sequences."""
    config = recipes.train_config(arguments.recipe)
    rows = arguments.rows or config.microbatch_size or config.batch_size
    if getattr(arguments, "no_mtp", False):
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_nextn_predict_layers=0))
    remat = getattr(arguments, "remat", None) or config.remat
    return dataclasses.replace(
        config, precision=arguments.precision, remat=remat, batch_size=rows, microbatch_size=None, batch_ramp_from=None
    )


def main() -> None:
    parser = command_line.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "step", "memory"])
    parser.add_argument("--recipe", default="small", help="of configs/, for step and memory")
    parser.add_argument("--precision", default="fp8", choices=["bf16", "fp8"], help="for step and layers")
    parser.add_argument("--num-sms", type=int, nargs="+", default=[132, 112], help="SMs that products run on, for layers")
    parser.add_argument("--rows", type=int, help="sequences a step; the recipe's microbatch by default")
    parser.add_argument("--no-mtp", action="store_true", help="without the MTP module, as transformers trains the model (step, memory)")
    parser.add_argument("--remat", choices=["none", "norms", "norms_and_up", "layer"], help="the recipe's by default (step)")
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="also the kernels of one call that take longest (step, layers)")
    arguments = parser.parse_args()
    if arguments.what != "memory":
        check_devices(named_recipe("fp8"))
    {"layers": v3_layers, "step": step, "memory": memory}[arguments.what](arguments)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
