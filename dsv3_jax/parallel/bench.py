"""Speed of training over several Hopper GPUs of one host, and how much of their communication computation hides.

    python -m dsv3_jax.parallel.bench exchange                     # V3's dispatch and combine over all GPUs: useful bytes a second
    python -m dsv3_jax.parallel.bench step --mesh expert=2         # a recipe's step: tokens/s, losses, exposed communication
    python -m dsv3_jax.parallel.bench overlap --num-sms 112        # V3's layers, forward and backward fused: communication that is hidden

`exchange` quantises, permutes, sends, sorts by expert and brings the rows back; only rows that a token needs count, padding does not.
`step` trains on the standard library's sources; losses of different meshes are comparable. Over `expert` a step whose tokens find no
room in the buffers is void, and no speed is printed where one was. At its learning rate the router of a fresh model sends nearly all to
one device within five steps, which first buffers may not hold; `--learning-rate 0` leaves it as it is drawn, and
`--learning-rate 0 --settle 45 --size 1.41` measures what comes once the bias has balanced it, as it is in most of a run. Over `pipe` it
also prints how long the ticks took, beside what `schedule.simulate` makes of the same actions' times. `overlap`
runs the pipeline's executor on one rank, whose steady state is fused forwards and backwards (communication, exposed: profiles.py). With
NCCL_P2P_DISABLE=1 two GPUs of one host talk as slowly as hosts do.
"""

import argparse
import dataclasses
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax import command_line, recipes
from dsv3_jax.config import ModelConfig, TrainConfig, from_dict, to_dict
from dsv3_jax.errors import UserError
from dsv3_jax.model import Decoder
from dsv3_jax.model.moe import RouterStats, Routing
from dsv3_jax.parallel import buffers, exchange
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.parallel.profiles import Event, busy, kernels_of, measured_times, pipelined, profile, scopes, trace
from dsv3_jax.parallel.schedule import KINDS, build
from dsv3_jax.parallel.schedule_table import Table, make_table
from dsv3_jax.parallel.spread import Spread
from dsv3_jax.precision import FP8_WEIGHTS, Recipe, check_devices, quantise
from dsv3_jax.precision import recipe as named_recipe
from dsv3_jax.precision.bench import flop_per_token, seconds

# Each benchmark is a function of its options that compiles and returns the function that measures and prints.


def exchange_(options) -> Callable[[], None]:
    """Dispatch and combine."""
    mesh = meshes.make(options.mesh or f"expert={len(jax.devices())}")
    cases = [(tokens, skew) for tokens in options.tokens for skew in options.skew]
    compiled = [_Exchange(mesh, options.precision, *case) for case in cases]

    def measure():
        print(
            "| precision | tokens a GPU | skew | fullest device, of the mean | padding | us | useful GB/s a GPU | of it over the link "
            "| two plain all-to-alls of these buffers, us | GB/s a GPU over the link |"
        )
        for case in compiled:
            case.report()

    return measure


class _Exchange:
    """V3's exchange of so many tokens a GPU; skew: standard deviation of the logarithm of the experts' popularity."""

    LOOP = 10

    def __init__(self, mesh, precision: str, tokens: int, skew: float):
        self.precision, self.tokens, self.skew = precision, tokens, skew
        config, numerics, devices = ModelConfig(), _numerics(precision, mesh), meshes.num_expert_parts(mesh.shape)
        spec = PartitionSpec(exchange.expert_axes(mesh.shape))
        rng = np.random.default_rng(0)
        experts_TK = _choices(rng, config, devices * tokens, skew)
        held = config.n_routed_experts // devices
        # Rows that a token needs, by device that sends and device that gets them.
        goes = (experts_TK[..., None] // held == np.arange(devices)).any(axis=1).reshape(devices, tokens, devices).sum(axis=1)
        arriving = np.bincount((experts_TK // held).reshape(-1), minlength=devices)
        self.imbalance = arriving.max() / arriving.mean()
        row = config.hidden_size * (1 + 4 / 128 + 2 if numerics.fp8 else 4)
        self.useful, self.crossing = (goes.sum() / devices * row, (goes.sum() - np.trace(goes)) / devices * row)
        (room,), sorted_room = buffers.rooms(config, [devices], tokens, 1.0)
        needed = max(goes.max() / room, arriving.max() / sorted_room)
        size = next(size for size in buffers.SIZES if size >= needed * buffers.HEADROOM)
        (room,), sorted_room = buffers.rooms(config, [devices], tokens, size)
        self.padding = room * devices / (goes.sum() / devices)
        run = exchange.over_mesh(config, mesh.shape, size)
        load = jnp.zeros(config.n_routed_experts)

        def here(x_TD, experts_TK, weights_TK, y_RD):
            def once(_, carry):
                x, _ = lax.optimization_barrier((x_TD, carry))  # once after the other
                experts = _Idle(numerics, y_RD)
                x, fill = run(x, Routing(experts_TK, weights_TK, RouterStats(load, load[0], load[0])), experts)
                return x, fill, experts.seen

            return lax.fori_loop(0, self.LOOP, once, (jnp.zeros_like(x_TD), jnp.zeros(()), jnp.zeros(())))

        whole = PartitionSpec()
        mapped = jax.shard_map(here, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec, whole, whole), check_vma=False)
        place = NamedSharding(mesh, spec)
        x_TD = rng.standard_normal((len(experts_TK), config.hidden_size), np.float32).astype(numerics.compute_dtype)
        y_RD = jax.ShapeDtypeStruct((devices * sorted_room, config.hidden_size), numerics.compute_dtype)
        operands = x_TD, experts_TK, np.full(experts_TK.shape, 1 / 8, np.float32)
        ones = jax.jit(lambda: jnp.ones(y_RD.shape, y_RD.dtype), out_shardings=place)
        self.arguments = lambda: (*jax.device_put(operands, place), ones())
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in (*operands, y_RD)]
        self.run = jax.jit(mapped).lower(*shapes).compile()
        self.plain = _Plain(mesh, spec, (room * devices, round(row)), self.LOOP)

    def report(self):
        arguments = self.arguments()
        seconds(self.run, *arguments, calls=3)  # a GPU that has been idle is slow at first
        took = seconds(self.run, *arguments, calls=10) / self.LOOP
        sent = sum(found.communication for found in profile(lambda: self.run(*arguments)).values())
        assert float(self.run(*arguments)[1]) <= 1  # the size was chosen for these rows
        sends = f"; NCCL {sent * 1e3 / self.LOOP:.0f} us"
        plain = self.plain.seconds()
        print(
            f"| {self.precision} | {self.tokens} | {self.skew} | {self.imbalance:.2f} | {self.padding:.2f} | {took * 1e6:.0f}{sends} | "
            f"{self.useful / took / 1e9:.0f} | {self.crossing / took / 1e9:.0f} | "
            f"{plain * 1e6:.0f} | {self.plain.crossing / plain / 1e9:.0f} |",
            flush=True,
        )


class _Plain:
    """All-to-alls of as many bytes, a third of them there and then the rest back, and nothing else."""

    def __init__(self, mesh, spec, shape: tuple[int, int], loop: int):
        self.loop, (rows, row), devices = loop, shape, meshes.num_expert_parts(mesh.shape)
        self.crossing = rows * row * (devices - 1) / devices
        widths, place = (row // 3, row - row // 3), NamedSharding(mesh, spec)
        send = lambda x: lax.all_to_all(x, spec[0], 0, 0, tiled=True)  # noqa: E731

        def here(there, back):
            def once(_, parts):
                there, back = lax.optimization_barrier((send(parts[0]), parts[1]))
                return there, send(back)

            return lax.fori_loop(0, loop, once, (there, back))

        mapped = jax.shard_map(here, mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec), check_vma=False)
        make = lambda: tuple(jnp.zeros((rows * devices, width), jnp.uint8) for width in widths)  # noqa: E731
        self.make = jax.jit(make, out_shardings=place).lower().compile()
        self.run = jax.jit(mapped).lower(*(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in jax.eval_shape(make))).compile()

    def seconds(self) -> float:
        parts = self.make()
        seconds(self.run, *parts, calls=3)  # as the exchange itself is measured
        return seconds(self.run, *parts, calls=10) / self.loop


class _Idle:
    """In the place of experts: takes rows and hands out those that are there, at no cost. seen: a value that needs all that came."""

    def __init__(self, numerics, y_RD):
        self.numerics, self.y_RD = numerics, y_RD

    def enter(self, x_TD):
        return quantise(x_TD, self.numerics, FP8_WEIGHTS["gate_up_proj"].input) if self.numerics.fp8 else x_TD

    def __call__(self, x_RD, group_sizes_E, weights_R):
        values, scales = (x_RD.quantised.values, x_RD.quantised.scales()) if self.numerics.fp8 else (x_RD, jnp.zeros(1))
        came, y_RD = lax.optimization_barrier(((values, scales, group_sizes_E, weights_R), self.y_RD))
        self.seen = came[0][0, 0].astype(jnp.float32) + sum(jnp.max(x).astype(jnp.float32) for x in came[1:])
        return y_RD


def _choices(rng, config: ModelConfig, tokens: int, skew: float) -> np.ndarray:
    """Experts int32 [T, K], group-limited, drawn without replacement by the experts' popularity."""
    scores = rng.gumbel(size=(tokens, config.n_routed_experts)) + skew * rng.standard_normal(config.n_routed_experts)
    grouped = scores.reshape(tokens, config.n_group, -1)
    best = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
    out = best < np.sort(best, axis=-1)[:, -config.topk_group, None]
    scores = np.where(out[..., None], -np.inf, grouped).reshape(scores.shape)
    return np.argsort(-scores, axis=-1)[:, : config.num_experts_per_tok].astype(np.int32)


def step(options) -> Callable[[], None]:
    """The training step of a recipe."""
    from dsv3_jax.training.pipeline import check_mesh, schedule
    from dsv3_jax.training.schedules import Scheduled
    from dsv3_jax.training.step import Trainer

    config = recipes.train_config(options.recipe)
    model = from_dict(ModelConfig, to_dict(config.model) | dict(options.model), where="--model ")
    mesh = meshes.make(options.mesh or "data=1", jax.devices()[: options.devices])
    parts = mesh.size // mesh.shape["pipe"]
    profiled_rows, microbatch = options.rows if options.profile_rows is None else options.profile_rows, options.microbatch * parts
    config = dataclasses.replace(
        config,
        model=model,
        batch_size=options.rows,
        batch_ramp_from=None,
        microbatch_size=microbatch,
        precision=options.precision,
        pipeline_schedule=options.schedule,
        pipeline_max_delayed=options.max_delayed,
    )
    if not 1 <= profiled_rows <= options.rows or profiled_rows % microbatch:
        raise UserError(
            f"--profile-rows {profiled_rows} must be a multiple of a microbatch's {microbatch} rows, and at most {options.rows}"
        )
    check_mesh(config, mesh.shape)
    trainer = Trainer(Decoder(config.model, _numerics(config.precision, mesh), remat=options.remat or config.remat), config, mesh)
    first = trainer.buffers.size
    size = options.size or first
    like = lambda tree, places: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)  # noqa: E731
    # Drawn from NumPy's key, an argument, as the loop does it: the same parameters on any mesh.
    key = np.asarray(jax.random.key_data(jax.random.key(0)))
    made = lambda key: trainer.init(trainer.spread.decoder(1.0).init(jax.random.wrap_key_data(key)))  # noqa: E731
    state = like(jax.eval_shape(made, key), trainer.shardings)
    batches = _batches(config, options.steps + 2)
    batch_of = lambda rows: like({"tokens": batches[0][:rows]}, {"tokens": trainer.batch_sharding})  # noqa: E731
    scheduled = Scheduled(options.learning_rate, 0.3, 1e-3)
    start = time.perf_counter()
    init = jax.jit(made, out_shardings=trainer.shardings).lower(key).compile()
    table = make_table(schedule(config, mesh.shape, profiled_rows)) if mesh.shape["pipe"] > 1 else None
    few = config.microbatch_size * (2 * mesh.shape["pipe"] if mesh.shape["pipe"] > 1 else 1)  # as few as any schedule takes
    programs = {(size, options.rows), (size, profiled_rows)}
    if options.settle:
        programs.add((2 * first, few))  # a step without room would not teach the bias
    lowered = {(size, rows): trainer.jitted(size).lower(state, batch_of(rows), scheduled) for size, rows in programs}
    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(lowered, pool.map(lambda one: _compile(one, options), lowered.values())))
    run, profiled, settling = compiled[size, options.rows], compiled[size, profiled_rows], compiled.get((2 * first, few))
    print(f"compiled in {time.perf_counter() - start:.0f} s; {_summary(run)}", flush=True)

    def measure():
        state, losses, fills, settled = init(key), [], [], []
        put = lambda rows: {"tokens": jax.device_put(rows, trainer.batch_sharding)}  # noqa: E731
        place = lambda i, rows: put(batches[i % len(batches)][:rows])  # noqa: E731
        for i in range(options.settle):
            state, metrics = settling(state, place(i, few), Scheduled(0.0, 0.3, 1e-2 if i < options.settle * 2 // 3 else 1e-3))
            settled.append(metrics["fill"])
        if settled:
            check_room(settled, 2 * first, "settling")
            print(f"settled: fill {float(settled[-1]):.2f} of buffers of {2 * first:.2f}", flush=True)
        for i in range(options.steps):
            if i == 2:
                jax.block_until_ready(state)
                start = time.perf_counter()
            state, metrics = run(state, place(i, options.rows), scheduled)
            losses.append(metrics["loss"])
            fills.append(metrics["fill"])
        jax.block_until_ready(state)
        rate = (options.steps - 2) * config.batch_size * config.sequence_length / (time.perf_counter() - start)
        check_room(fills, size, "measured")
        sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        fill = max(map(float, fills))
        flops = rate * flop_per_token(config) / mesh.size / 1e12
        print(
            f"{config.precision} {sizes}: {rate:,.0f} tokens/s, {flops:.0f} TFLOP/s a GPU; fill {fill:.2f} of buffers of {size:.2f}",
            flush=True,
        )
        print("losses", " ".join(f"{float(loss):.4f}" for loss in losses), flush=True)
        devices = trace(lambda: profiled(state, place(-1, profiled_rows), scheduled))
        show_step([events for events in devices if events], profiled, mesh, table)
        if stats := jax.local_devices()[0].memory_stats():  # a CPU has none
            print(f"peak memory {stats['peak_bytes_in_use'] / 2**30:.1f} GiB", flush=True)

    return measure


def show_step(devices: list[list[Event]], compiled: jax.stages.Compiled, mesh: Mesh, table: Table | None) -> None:
    """Prints what a profile of a step shows. table: of its pipeline."""
    if not devices:  # no GPU
        return
    [found] = busy([kernels_of(events, lambda op: "") for events in devices]).values()
    print(f"one step: busy {found.all:.1f} ms, communication {found.communication:.1f} ms, exposed {found.exposed:.1f} ms", flush=True)
    if not table:
        return
    ranks = [int(np.argwhere(mesh.devices == device)[0][list(mesh.axis_names).index("pipe")]) for device in jax.devices()[: mesh.size]]
    ticks = pipelined(devices, ranks, scopes(compiled.as_text()), table)
    costs = ", ".join(f"{name} {ms:.2f}" for name, ms in ticks.costs.items())
    rows = {"measured": (ticks.took, ticks.bubble), "simulated": ticks.free, "simulated in lockstep": ticks.lockstep}
    print(f"ticks, ms; the output loss's {ticks.loss:.1f} apart; actions: {costs}", flush=True)
    for name, (took, bubble) in rows.items():
        print(f"  {name}: {took:.1f}, bubble of each rank {' '.join(f'{ms:.1f}' for ms in bubble)}", flush=True)


def check_room(fills: list, size: float, which: str) -> None:
    """Raises UserError where the buffers of that size were too small in any of these steps: such a step is void, and so is its time."""
    fills = [float(fill) for fill in fills]
    if void := sum(fill > 1 for fill in fills):
        raise UserError(
            f"{void} of {len(fills)} {which} steps are void: up to {max(fills):.2f} times what buffers of {size:.2f} hold had to go "
            f"into one; give --size {size * max(fills) * buffers.HEADROOM:.2f}, or --learning-rate 0 --settle 45 for a router at rest"
        )


def _batches(config: TrainConfig, count: int) -> list[np.ndarray]:
    """Rows of the standard library's sources, pairs of bytes as tokens."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8).astype(np.int32)
    pairs = text[: text.size // 2 * 2].reshape(-1, 2)
    tokens = (pairs[:, 0] * 128 + pairs[:, 1]) % config.model.vocab_size
    shape = count, config.batch_size, config.sequence_length + 1
    return list(np.resize(tokens, np.prod(shape)).reshape(shape))


def overlap(options) -> Callable[[], None]:
    """Layers of V3's widths over `expert`, run by the pipeline's executor on one rank."""
    from dsv3_jax.training.pipeline import pipeline_value_and_grad

    mesh = meshes.make(options.mesh or f"expert={len(jax.devices())}")
    parts = mesh.size // mesh.shape["pipe"]
    # Each GPU holds 8 experts of some 4,096 rows instead of 4 of 8,192, so that routing is not trivial over two of them.
    config = ModelConfig(
        num_hidden_layers=options.layers,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
        vocab_size=1024,
        rope_scaling=None,
        n_routed_experts=8 * parts,
        n_group=1,
        topk_group=1,
        **({"hidden_size": options.width} if options.width else {}),
    )
    numerics = dataclasses.replace(_numerics(options.precision, mesh), num_sms=options.num_sms)
    schedule = build("dualpipev", num_ranks=1, num_microbatches=options.microbatches, max_delayed=options.max_delayed)
    table = make_table(schedule)
    size = options.size or buffers.start(config, meshes.num_expert_parts(mesh.shape))
    decoder = Decoder(config, numerics, remat=options.remat or "norms_and_up", exchange=exchange.over_mesh(config, mesh.shape, size))

    def gradients(params, tokens):
        weights = {"mtp_loss_weight": 0.0, "balance_loss_weight": 1e-4}
        return pipeline_value_and_grad(decoder, params, {"tokens": tokens}, schedule, mesh, **weights)

    spread = Spread(decoder, mesh)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), decoder.abstract_params(), spread.shardings)
    rows = jax.ShapeDtypeStruct((options.microbatches * parts, options.length + 1), jnp.int32, sharding=spread.batch_sharding)
    start = time.perf_counter()
    lowered = jax.jit(gradients, out_shardings=(None, None, spread.shardings)).lower(shapes, rows)
    compiled = _compile(lowered, options)
    print(f"compiled in {time.perf_counter() - start:.0f} s; {_summary(compiled)}", flush=True)
    branch = re.compile(r"/action/cond/branch_(\d+)_fun")

    def measure():
        params = jax.jit(decoder.init, out_shardings=spread.shardings)(jax.random.key(0))
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, rows.shape, np.int32)
        tokens = jax.device_put(tokens, spread.batch_sharding)
        show(compiled, params, tokens)
        if options.measured:
            (events, *_) = trace(lambda: compiled(params, tokens))
            with tempfile.NamedTemporaryFile("w", suffix=".pbtxt") as file:
                file.write(measured_times(events, compiled.as_text(), options.measured))
                file.flush()
                again = lowered.compile({"xla_gpu_pgle_profile_file_or_directory_path": file.name})
            print("compiled again with measured times", flush=True)
            show(again, params, tokens)

    def show(compiled, params, tokens):
        named = scopes(compiled.as_text())

        def group_of(op: str) -> str | None:
            if op not in named:  # the text of an asynchronous collective does not show the name that it runs under
                return None
            found = branch.search(named[op])
            return table.actions[int(found[1])] if found else "outside"

        took = seconds(lambda: compiled(params, tokens)[0], calls=2)
        fill = float(compiled(params, tokens)[1]["fill"])
        if fill > 1:
            raise UserError(f"the buffers of {size:.2f} were too small: give --size {size * fill * buffers.HEADROOM:.2f}")
        print(f"{options.precision}, {options.num_sms or 'all'} SMs: {took * 1e3:.1f} ms; fill {fill:.2f}", flush=True)
        for name, found in profile(lambda: compiled(params, tokens), group_of).items():
            ticks = int((table.action == table.actions.index(name)).sum()) if name in table.actions else 1
            hidden = f", {1 - found.exposed / found.communication:.0%} hidden" if found.communication else ""
            print(
                f"{name}: {ticks} ticks, each {found.all / ticks:.2f} ms; communication {found.communication / ticks:.2f} ms, "
                f"exposed {found.exposed / ticks:.2f} ms{hidden}",
                flush=True,
            )

    return measure


def _numerics(precision: str, mesh: Mesh) -> Recipe:
    """The recipe of that name, which the mesh's devices can run. Raises UserError where they cannot."""
    numerics = named_recipe(precision)
    check_devices(numerics, mesh.devices.flat)
    return numerics


def _compile(lowered: jax.stages.Lowered, options) -> jax.stages.Compiled:
    if options.overlap:
        return lowered.compile()
    return lowered.compile({"xla_gpu_enable_latency_hiding_scheduler": False, "xla_gpu_enable_analytical_sol_latency_estimator": False})


def _summary(compiled) -> str:
    analysis = compiled.memory_analysis()
    return f"arguments {analysis.argument_size_in_bytes / 2**30:.1f} GiB, temporaries {analysis.temp_size_in_bytes / 2**30:.1f} GiB"


def _field(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    if not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=NUMBER")
    return name, int(value)


def parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["exchange", "step", "overlap"])
    parser.add_argument("--mesh", help="expert over all GPUs by default; step: one GPU")
    parser.add_argument("--precision", default="fp8", choices=["float32", "bf16", "fp8", "fp8_reference"])
    parser.add_argument("--size", type=float, help="of the exchange's buffers, for step and overlap; first ones by default (buffers.py)")
    parser.add_argument("--no-overlap", dest="overlap", action="store_false", help="communication beside nothing, for step and overlap")
    parser.add_argument("--max-delayed", type=int, default=0, help="weight gradients that a pipeline's rank puts off at one time")
    parser.add_argument("--remat", help="of step and overlap, instead of the recipe's and norms_and_up (TrainConfig.remat)")
    group = parser.add_argument_group("exchange")
    group.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    group.add_argument("--skew", type=float, nargs="+", default=[0.0, 1.0])
    group = parser.add_argument_group("step")
    group.add_argument("--recipe", default="small")
    group.add_argument("--model", nargs="+", type=_field, default=[], metavar="FIELD=NUMBER", help="of the recipe's model")
    group.add_argument("--devices", type=int, help="of this machine; all by default")
    group.add_argument("--rows", type=int, default=64, help="sequences a step")
    group.add_argument("--profile-rows", type=int, help="of the step that is profiled, where all would take too long")
    group.add_argument("--microbatch", type=int, default=16, help="sequences a forward pass on each device")
    group.add_argument("--schedule", default="dualpipev", choices=KINDS)
    group.add_argument("--steps", type=int, default=10)
    group.add_argument("--learning-rate", type=float, default=3e-4)
    group.add_argument("--settle", type=int, default=0, help="short steps before, with larger buffers; only the router's bias learns")
    group = parser.add_argument_group("overlap")
    group.add_argument("--num-sms", type=int, help="for products; all by default")
    group.add_argument("--measured", type=float, help="compile again with measured times, all-to-alls so many times as long as alone")
    group.add_argument("--layers", type=int, default=4)
    group.add_argument("--width", type=int, help="instead of V3's 7,168")
    group.add_argument("--length", type=int, default=4096)
    group.add_argument("--microbatches", type=int, default=5)
    return parser


def prepare(argv: list[str] | None = None) -> Callable[[], None]:
    """Compile what the command line asks for; the function that is returned measures it."""
    options = parser().parse_args(argv)
    return {"exchange": exchange_, "step": step, "overlap": overlap}[options.what](options)


if __name__ == "__main__":
    sys.exit(command_line.run(lambda: prepare()()))
