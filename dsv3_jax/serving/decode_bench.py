"""A serving step against its floor, on random weights made on the device: no checkpoint is needed.

    python -m dsv3_jax.serving.decode_bench moonlight_16b --precision fp8
    python -m dsv3_jax.serving.decode_bench deepseek_v3 --precision fp8 --layers 6 --dense 1     # as many layers as fit

A row of the table is a decode step of so many requests with `--context` tokens each:
  step: back to back without reading a result; engine: with scheduling, reading and handing out of tokens, as they are served;
  kernels: the sum of their times in a profile, gaps between them left out; floor: the longer of the bytes that must be read (weights that
  the step touches, latents) over what a copy reaches on this card, and its FLOP over the data sheet's dense BF16 peak.
`--empty` runs the same number of layers, each next to nothing: what launches cost. `--prefill N` adds a prompt of N tokens.

    JAX_PLATFORMS=cpu python -m dsv3_jax.serving.decode_bench small --empty --host --batch 64 [--speculate [N]]

`--host` times steps of the engine whose programs take and give what they always do, and compute nothing: the host's part. No GPU is needed.
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
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax import command_line, recipes
from dsv3_jax.config import ModelConfig
from dsv3_jax.model import Decoder
from dsv3_jax.parallel import profiles
from dsv3_jax.precision import recipe as named_recipe
from dsv3_jax.precision import to_fp8
from dsv3_jax.serving import runner
from dsv3_jax.serving.cache import pages_for
from dsv3_jax.serving.engine import Engine
from dsv3_jax.serving.ranks import ONE_DEVICE, WHOLE, Ranks
from dsv3_jax.serving.request import Request, SamplingParams
from dsv3_jax.serving.scheduler import Work, round_up

COLUMNS = ("batch", "context", "step ms", "kernels ms", "kernels", "engine ms", "tokens/s", "GB", "floor ms", "floor/step")
COLUMNS += ("floor/engine", "experts")
PEAK = {"bf16": 989e12, "fp8": 1979e12}  # dense FLOP/s of the card, from NVIDIA's data sheet


def random_params(decoder: Decoder, ranks: Ranks = ONE_DEVICE) -> dict:
    """Parameters for `Decoder.decode` that cost no checkpoint: gains are one, all else even around 0; FP8 weights as the recipe stores
    them. Layers of one kind share a program, and each device makes its own part."""
    shapes = decoder.abstract_params()
    if decoder.recipe.fp8:
        shapes = jax.eval_shape(to_fp8, shapes)
    shapes = jax.eval_shape(decoder.decode_params, shapes)
    keys = iter(jax.random.split(jax.random.key(0, impl="rbg"), 1 + decoder.config.num_hidden_layers))

    def make(tree):
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        parts = jax.tree.leaves(ranks.param_specs(tree), is_leaf=lambda part: isinstance(part, PartitionSpec))
        spec = tuple((path[-1].key, leaf.shape, leaf.dtype, part) for (path, leaf), part in zip(leaves, parts, strict=True))
        return jax.tree.unflatten(structure, _random(next(keys), spec, decoder.config.initializer_range, ranks))

    params = {name: [make(layer) for layer in stack] for name, stack in shapes.items() if isinstance(stack, list)}
    return params | make({name: leaf for name, leaf in shapes.items() if name not in params})


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _random(key, spec, std, ranks):
    made = []
    for leaf_key, (name, shape, dtype, part) in zip(jax.random.split(key, len(spec)), spec):
        if name.endswith("norm") or name.endswith("_scale"):
            x = jnp.full(shape, 1 if name.endswith("norm") else std, dtype)
        else:
            width = 3**0.5 * (1 if dtype == jnp.float8_e4m3fn else std)
            part_of = lambda key, shape=shape[1:], dtype=dtype, w=width: jax.random.uniform(key, shape, jnp.float32, -w, w).astype(dtype)  # noqa: E731
            x = jax.lax.map(part_of, jax.random.split(leaf_key, shape[0]), batch_size=-(-shape[0] // 16))  # float32 for a part at a time
        made.append(ranks.hold(x, part))
    return made


def random_model(recipe: str, precision: str, max_length: int | None = None, mesh: Mesh | None = None) -> tuple[Decoder, dict]:
    """A recipe's model, allowed at least so many positions, and random parameters for its `decode`, made where they are used."""
    config = recipes.model_config(recipe)
    config = dataclasses.replace(config, max_position_embeddings=max(config.max_position_embeddings, max_length or 0))
    decoder = Decoder(config, named_recipe(precision))
    return decoder, random_params(decoder, Ranks.of(mesh))


def copy_bandwidth() -> float:
    """Bytes a second that a copy of 2 GiB reads and writes."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: memory is not asked for while the clock runs
    x = jax.block_until_ready(add(jnp.zeros(2**30, jnp.bfloat16)))
    start = time.perf_counter()
    for _ in range(10):
        x = add(x)
    jax.block_until_ready(x)
    return 10 * 2 * x.nbytes / (time.perf_counter() - start)


def fill(engine: Engine, batch: int, context: int, new_tokens: int) -> list[Request]:
    """Requests in the middle of their answers, as if their `context` tokens had been prefilled."""
    rng = np.random.default_rng(0)
    params = SamplingParams(max_new_tokens=new_tokens, temperature=0, ignore_eos=True)
    requests = [Request(rng.integers(0, engine.config.vocab_size, context).tolist(), params) for _ in range(batch)]
    for request in requests:
        engine.add(request)
    engine.scheduler.landed(engine.scheduler.schedule())  # gives all of them their pages
    for request in requests:
        engine.scheduler.cached(request, context - 1)
        request.prefilling = False
    return requests


def decode_floor(engine: Engine, batch: int, context: int, touched_experts: int) -> tuple[float, float]:
    """(bytes that a decode step must read, FLOP that it must do). touched_experts: those that some token chose, over all layers."""
    config, params = engine.config, engine.runner.params
    sizes, counts = Counter(), Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [getattr(key, "key", "") for key in path]
        if names[0] in ("embed", "mtp") or names[-1] in ("k_up_proj", "v_up_proj"):  # the latter are kv_b_proj once more
            continue
        kind = "experts" if "experts" in names else "other"
        sizes[kind] += leaf.nbytes
        counts[kind] += 0 if names[-1].endswith("_scale") else leaf.size
    experts = config.num_moe_layers * config.n_routed_experts
    latents = batch * context * sum(cache[:, 0, 0].nbytes for name, cache in engine.runner.caches.items() if name != "mtp")
    scores = 2 * config.num_hidden_layers * config.num_attention_heads * context * (config.latent_dim + config.kv_lora_rank)
    active = counts["other"] + counts["experts"] * config.num_experts_per_tok / config.n_routed_experts
    return sizes["other"] + sizes["experts"] * touched_experts / max(experts, 1) + latents, batch * (2 * active + scores)


def per_call(function, calls: int) -> float:
    """Seconds of a call, of `calls` that follow each other without waiting."""
    for _ in range(4):  # a CUDA graph is made, and brought up to date, by its first calls
        jax.block_until_ready(function())
    start = time.perf_counter()
    for _ in range(calls):
        out = function()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def kernels(function) -> tuple[Counter, Counter]:
    """Milliseconds of one call's kernels by name, and how many there are."""
    jax.block_until_ready(function())
    milliseconds, count = Counter(), Counter()
    for event in itertools.chain(*profiles.trace(function)):
        name = re.sub(r"[._]?\d+$", "", event.name)
        milliseconds[name] += (event.end - event.start) / 1e6
        count[name] += 1
    return milliseconds, count


def measure(engine: Engine, batch: int, context: int, calls: int, bandwidth: float, show: int) -> None:
    requests = fill(engine, batch, context, 4 * calls + 4)
    work = Work(requests, [engine.runner.decode_width] * batch, [context - 1] * batch, [False] * batch, None, [0] * batch)
    launch = lambda: engine.runner.run(work, {})  # noqa: E731
    before = np.array(engine.runner.load_LE)
    jax.block_until_ready(launch())
    touched = int(np.sum(np.array(engine.runner.load_LE) > before))
    step = per_call(lambda: launch().outcome, calls)
    milliseconds, count = kernels(lambda: launch().outcome)
    num_bytes, flop = decode_floor(engine, batch, context, touched)
    floor = max(num_bytes / bandwidth, flop / PEAK["bf16"])

    engine.step()
    generated, start = engine.stats.generated_tokens, time.perf_counter()
    for _ in range(calls):
        engine.step()
    seconds = time.perf_counter() - start
    rate = (engine.stats.generated_tokens - generated) / seconds
    for request in requests:
        engine.abort(request)
    kernel_ms = sum(milliseconds.values())
    print(
        f"| {batch} | {context} | {step * 1e3:.2f} | {kernel_ms:.2f} | {sum(count.values())} | {seconds / calls * 1e3:.2f} | {rate:,.0f} | "
        f"{num_bytes / 1e9:.2f} | {floor * 1e3:.2f} | {floor / step:.0%} | {floor * calls / seconds:.0%} | {touched} |",
        flush=True,
    )
    for name, ms in milliseconds.most_common(show):
        print(f"    {ms:8.3f} ms {count[name]:5d}  {name}", flush=True)


def compute_nothing() -> None:
    """Puts programs of the same operands and results in the place of the runner's. Seven drafts of ten are right."""
    real = runner._forward.__wrapped__
    static = ("decoder", "ranks", "structure", "form", "chunk")

    @functools.partial(jax.jit, static_argnames=static, donate_argnames=("caches", "last", "load_LE", "overwritten"), keep_unused=True)
    def forward(decoder, ranks, structure, leaves, caches, last, packed, load_LE, overwritten, **options):
        traced = functools.partial(real, decoder, ranks, structure, **options)
        _, sampled, *_ = jax.eval_shape(traced, leaves, caches, last, packed, load_LE, overwritten)
        return overwritten, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sampled), caches, load_LE, last

    @functools.partial(jax.jit, static_argnames=("decoder", "ranks", "form"), donate_argnames=("caches", "last"), keep_unused=True)
    def draft(decoder, ranks, params, caches, last, fed, hidden_BSD, tokens_BQ, **options):
        counts_B = 1 + (jnp.arange(len(tokens_BQ)) % 10 < 7)
        drafts_BN = jnp.zeros((len(tokens_BQ), last.shape[1] - 2), jnp.int32)
        return jnp.concatenate([tokens_BQ, counts_B[:, None].astype(jnp.int32), drafts_BN], axis=1), caches, last

    runner._forward, runner._draft = forward, draft


def host(engine: Engine, batch: int, context: int, calls: int) -> None:
    """Milliseconds of the engine's steps once programs compute nothing."""
    fill(engine, batch, context, 2 * calls + 40)
    seconds = []
    for _ in range(calls + 10):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    least, tenth, half = (1e3 * np.percentile(seconds[10:], percentile) for percentile in (0, 10, 50))
    print(f"host, {batch} requests, {calls} steps: {least:.2f} ms at least, {tenth:.2f} in the quickest tenth, {half:.2f} in the median")


def prefill(engine: Engine, length: int, precision: str, show: int) -> None:
    """A prompt of `length` tokens in chunks of the engine's size."""
    rng, config = np.random.default_rng(1), engine.config

    def once():
        request = Request(rng.integers(0, config.vocab_size, length).tolist(), SamplingParams(max_new_tokens=1, ignore_eos=True))
        engine.add(request)
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        return time.perf_counter() - start

    once()
    seconds = min(once() for _ in range(3))
    counts = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(engine.runner.params):
        names = [getattr(key, "key", "") for key in path]
        if names[0] not in ("embed", "mtp", "lm_head") and not names[-1].endswith(("_scale", "k_up_proj", "v_up_proj")):
            share = config.num_experts_per_tok / config.n_routed_experts if "experts" in names else 1
            counts["active"] += leaf.size * share
    attention = config.num_hidden_layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * length**2
    flop = 2 * counts["active"] * length + attention
    print(
        f"prefill of {length}: {seconds * 1e3:.1f} ms, {length / seconds:,.0f} tokens/s, {flop / seconds / 1e12:.0f} TFLOP/s, "
        f"{flop / seconds / PEAK[precision]:.1%} of the {precision.upper()} peak",
        flush=True,
    )
    if show:
        request = Request(rng.integers(0, config.vocab_size, length).tolist(), SamplingParams(max_new_tokens=1, ignore_eos=True))
        engine.add(request)
        work = engine.scheduler.schedule()
        milliseconds, count = kernels(lambda: engine.runner.run(work, {}).outcome)
        for name, ms in milliseconds.most_common(show):
            print(f"    {ms:8.3f} ms {count[name]:5d}  {name}", flush=True)
        engine.abort(request)


def empty(config: ModelConfig) -> ModelConfig:
    """The same layers with next to nothing in them; the cache keeps the width that the kernel takes."""
    query = config.q_lora_rank and 128
    small = {"hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 128, "q_lora_rank": query, "vocab_size": 1024}
    return dataclasses.replace(config, num_attention_heads=8, **small)


def main() -> None:
    parser = command_line.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="of configs/: its model")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp8"])
    parser.add_argument("--layers", type=int, help="default all")
    parser.add_argument("--dense", type=int, help="dense layers among them; default the model's")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 64, 256])
    parser.add_argument("--context", type=int, nargs="*", default=[2048])
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--fp8-cache", action="store_true")
    parser.add_argument("--empty", action="store_true")
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--prefill", type=int, default=0)
    parser.add_argument("--speculate", type=int, nargs="?", const=1, default=0, metavar="N")
    parser.add_argument("--show", type=int, default=0, help="that many kernels, the longest first")
    options = parser.parse_args()

    config = recipes.model_config(options.recipe)
    if options.layers:
        dense = config.first_k_dense_replace if options.dense is None else options.dense
        config = dataclasses.replace(config, num_hidden_layers=options.layers, first_k_dense_replace=dense)
    config = dataclasses.replace(config, num_nextn_predict_layers=int(options.speculate > 0))
    if options.empty:
        config = empty(config)
    context = max(options.context) + 8 * options.calls + 8
    longest = max(context, options.prefill + 1)
    config = dataclasses.replace(config, max_position_embeddings=max(config.max_position_embeddings, longest))
    decoder = Decoder(config, named_recipe(options.precision))
    bandwidth = 0.0 if options.host else copy_bandwidth()
    start = time.perf_counter()
    params = jax.block_until_ready(random_params(decoder))
    gigabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9
    print(
        f"{options.recipe}{' (empty)' if options.empty else ''}, {config.num_hidden_layers} layers, {options.precision}, "
        f"{'FP8' if options.fp8_cache else 'bf16'} cache: {gigabytes:.1f} GB of weights in {time.perf_counter() - start:.0f} s; "
        f"{jax.local_devices()[0].device_kind}, jax {jax.__version__}, copy {bandwidth / 1e9:.0f} GB/s"
    )
    num_pages = max([1, *options.batch]) * pages_for(context) + pages_for(options.prefill + 1)
    engine = Engine(
        decoder, params, max_batch=max([1, *options.batch]), max_length=longest, num_pages=num_pages,
        prefill_tokens=max(options.prefill, 1024), fp8_cache=options.fp8_cache, speculate=options.speculate,
    )  # fmt: skip
    if not options.fp8_cache:  # not zeros: a card's clock depends on what it moves
        spec, engine.runner.caches = tuple((name, x.shape, x.dtype, WHOLE) for name, x in engine.runner.caches.items()), None
        caches = jax.device_put(_random(jax.random.key(1, impl="rbg"), spec, 1.0, ONE_DEVICE), engine.runner.ranks.devices[0])
        engine.runner.caches = dict(zip([name for name, *_ in spec], caches))
    if options.host:
        compute_nothing()
        for batch in options.batch:
            host(engine, batch, options.context[0], options.calls)
        return
    if options.batch:
        start, rows = time.perf_counter(), sorted({round_up(batch, engine.runner.shapes.decode_batches) for batch in options.batch})
        list(engine.runner.compile_shapes([(batch, engine.runner.decode_width, None) for batch in rows]))
        print(f"decode steps of {len(rows)} batches compiled in {time.perf_counter() - start:.0f} s")
        print(f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|")
    for context in options.context:
        for batch in options.batch:
            measure(engine, batch, context, options.calls, bandwidth, options.show)
    if options.prefill:
        prefill(engine, options.prefill, options.precision, options.show)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
