"""Loss of a recipe on the same text in FP8 and, with several seeds, in BF16.

    python -m dsv3_jax.precision.curves run --precision bf16 --seeds 0 1 2 --corpus DIR ... --output curves
    python -m dsv3_jax.precision.curves run --precision fp8 --seeds 0 --corpus DIR ... --output curves --heldout-in bf16 fp8 --study 6
    python -m dsv3_jax.precision.curves compare curves --plot docs/fp8_loss_decay.svg

All runs take the same rows in the same order (their hash is printed); a seed draws the weights. Smoothed: the mean of the last WINDOW
steps. After a run `--heldout-in` takes the loss of all held-out text with its weights, in each precision named: what a forward pass in FP8
costs is told apart from what training in FP8 has lost. `--study`: the errors of its products on that many batches of held-out rows
(precision/study.py).
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections import deque
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import command_line
from dsv3_jax.errors import UserError

WINDOW = 100
AHEAD = 4  # steps that are handed to the device before the first one's losses are read


def run(arguments) -> None:
    from dsv3_jax.data.corpus import Corpus
    from dsv3_jax.data.loader import Loader
    from dsv3_jax.data.prepare import prepare, train_tokenizer
    from dsv3_jax.precision.bench import lowered_step, recipe_config
    from dsv3_jax.precision.recipe import check_devices, recipe
    from dsv3_jax.training import schedules

    for precision in (arguments.precision, *arguments.heldout_in):
        check_devices(recipe(precision))
    config = dataclasses.replace(recipe_config(arguments), steps=arguments.steps)
    # Half of a short run: with a tenth, at 1e-3, a BF16 run of `small` had a gradient of 36 in step 11 and stayed behind.
    optimizer = dataclasses.replace(
        config.optimizer,
        warmup_steps=min(config.optimizer.warmup_steps, arguments.steps // 2),
        learning_rate=arguments.learning_rate or config.optimizer.learning_rate,
    )
    config = dataclasses.replace(config, optimizer=optimizer)
    corpus = Corpus(arguments.corpus, heldout_fraction=config.data.heldout_fraction)
    start = time.perf_counter()
    lowered, init, _ = lowered_step(config)
    compiled = lowered.compile()
    losses = {name: _heldout_loss(config, name) for name in arguments.heldout_in}
    print(f"{config.precision}: traced and compiled in {time.perf_counter() - start:.0f} s", flush=True)
    tokenizer = train_tokenizer(corpus, config.model.vocab_size, arguments.cache)
    rows = prepare(corpus, tokenizer, arguments.cache, sequence_length=config.sequence_length, fim_rate=config.data.fim_rate)
    print(f"{rows.train.bytes:,} bytes of text, {rows.train.tokens:,} tokens ({time.perf_counter() - start:.0f} s)", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    steps = list(schedules.steps(config, 0, 0))[: arguments.until]
    for seed in arguments.seeds:
        name, start = f"{config.precision}, seed {seed}", time.perf_counter()
        path = arguments.output / f"{config.precision}-{seed}.jsonl"
        state, smoothed, digest = _train(compiled, init(seed), steps, Loader(rows.directory, seed=0), path)
        took = time.perf_counter() - start
        tokens = len(steps) * config.batch_size * config.sequence_length
        print(
            f"{name}: {tokens:,} tokens (sha256 {digest[:16]}) in {took:.0f} s ({tokens / took:,.0f} tokens/s), "
            f"loss {smoothed:.4f} over the last {WINDOW} steps",
            flush=True,
        )
        for precision, loss in losses.items():
            print(f"{name}: held-out loss {loss(state.params, rows):.5f} with a forward pass in {precision}", flush=True)
    if arguments.study:
        _study(config, state.params, rows, arguments)


def _train(compiled, state, steps, loader, path):
    """(the state after all steps, the mean loss of the last WINDOW, a hash of all tokens). Losses go to `path` as they come: a run that is
    killed leaves its curve."""
    pending, losses, digest = deque(), [], hashlib.sha256()

    def write(file):
        values = jax.device_get(pending.popleft())
        values["overflow"] = sum(counts.sum() for counts in jax.tree.leaves(values["overflow"]))
        losses.append(float(values["main"]))
        file.write(json.dumps({"step": len(losses)} | {name: float(value) for name, value in values.items()}) + "\n")

    with open(path, "w", buffering=1) as file:
        for step, rows_BS in zip(steps, loader.batches((step.first_row, step.num_rows) for step in steps)):
            digest.update(rows_BS["tokens"].tobytes())
            state, metrics = compiled(state, {"tokens": jnp.asarray(rows_BS["tokens"])}, jax.tree.map(jnp.float32, step.scheduled))
            pending.append({name: metrics[name] for name in ("loss", "main", "mtp", "balance", "grad_norm", "skipped", "overflow")})
            if len(pending) > AHEAD:
                write(file)
        while pending:
            write(file)
    return state, np.mean(losses[-WINDOW:]), digest.hexdigest()


def _heldout_loss(config, precision):
    """A compiled function of (params, rows) that gives the mean loss of a held-out token, the forward pass in that precision."""
    from dsv3_jax.data.loader import heldout_batches
    from dsv3_jax.model import Decoder
    from dsv3_jax.precision.recipe import recipe
    from dsv3_jax.training.loss import next_token_loss

    decoder, (size, length) = Decoder(config.model, recipe(precision)), (config.batch_size, config.sequence_length)
    shapes = {"tokens": jax.ShapeDtypeStruct((size, length + 1), jnp.int32), "loss_mask": jax.ShapeDtypeStruct((size, length), jnp.float32)}
    compiled = jax.jit(lambda params, batch: next_token_loss(decoder, params, batch)[0]).lower(decoder.abstract_params(), shapes).compile()

    def mean(params, rows):
        sums = [compiled(params, jax.tree.map(jnp.asarray, batch)) for batch in heldout_batches(rows.directory, size)]
        nats, count = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
        return nats / count

    return mean


def _study(config, params, rows, arguments) -> None:
    from dsv3_jax.data.loader import heldout_batches
    from dsv3_jax.model import Decoder
    from dsv3_jax.precision import BF16, study

    operands = study.operands_of(Decoder(config.model, BF16, remat="layer"))
    batches = zip(range(arguments.study), heldout_batches(rows.directory, 1))
    result = study.study(operands(params, {"tokens": jnp.asarray(rows_BS["tokens"], jnp.int32)}) for _, rows_BS in batches)
    (arguments.output / f"study-{config.precision}.json").write_text(json.dumps(result))


def compare(arguments) -> None:
    """Prints the relative difference of the smoothed losses at the end of the shortest run, and draws the curves."""
    runs = {path.stem: [json.loads(line)["main"] for line in path.open()] for path in sorted(arguments.curves.glob("*-*.jsonl"))}
    numbers = {precision: sum(name.startswith(f"{precision}-") for name in runs) for precision in ("bf16", "fp8")}
    if numbers["bf16"] < 2 or numbers["fp8"] < 1:
        raise UserError(
            f"{arguments.curves} has {numbers['bf16']} runs in bf16 and {numbers['fp8']} in fp8: "
            "a standard deviation needs two seeds in bf16, and a comparison one in fp8"
        )
    shortest = min(map(len, runs.values()))
    if shortest < WINDOW:
        raise UserError(f"the shortest run of {arguments.curves} has {shortest} steps: the mean of {WINDOW} needs as many")
    runs = {name: losses[:shortest] for name, losses in runs.items()}
    smoothed = {name: np.convolve(losses, np.full(WINDOW, 1 / WINDOW), "valid") for name, losses in runs.items()}
    of = lambda precision: np.stack([losses for name, losses in smoothed.items() if name.startswith(f"{precision}-")])  # noqa: E731
    bf16, fp8 = of("bf16"), of("fp8")
    difference = fp8.mean(0) / bf16.mean(0) - 1
    deviation = bf16.std(0, ddof=1) / bf16.mean(0)
    print(f"mean loss of the {WINDOW} steps to {shortest}: {', '.join(f'{name} {losses[-1]:.4f}' for name, losses in smoothed.items())}")
    print(f"FP8 over the mean of {len(bf16)} BF16 seeds: {difference[-1]:+.3%} (a seed's standard deviation: {deviation[-1]:.3%})")
    seeds = [name.removeprefix("fp8-") for name in runs if name.startswith("fp8-")]
    pairs = [smoothed[f"fp8-{seed}"][-1] / smoothed[f"bf16-{seed}"][-1] - 1 for seed in seeds if f"bf16-{seed}" in runs]
    if len(pairs) > 1:
        error = np.std(pairs, ddof=1) / len(pairs) ** 0.5
        print(f"pairs of a seed: {', '.join(f'{d:+.3%}' for d in pairs)}; mean {np.mean(pairs):+.3%}, standard error {error:.3%}")
    if arguments.plot:
        _plot(smoothed, bf16.mean(0), difference, deviation, arguments.plot)


def _plot(smoothed, mean, difference, deviation, path) -> None:
    """Losses above, below them every run's over the mean of BF16."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(7, 6))
    steps = np.arange(len(difference)) + WINDOW
    for name, losses in smoothed.items():
        style = {"linewidth": 1, "linestyle": "-" if name.startswith("fp8") else "--"}
        [line] = above.plot(steps, losses, label=name, **style)
        below.plot(steps, 100 * (losses / mean - 1), color=line.get_color(), **style)
    above.set(ylabel=f"loss, mean of {WINDOW} steps")
    above.legend()
    below.plot(steps, 100 * difference, color="black", label="the mean of FP8")
    below.fill_between(steps, -200 * deviation, 200 * deviation, alpha=0.2, label="two standard deviations of BF16 seeds")
    below.set(ylabel="over the mean of BF16, %", xlabel="step")
    below.legend(loc="upper left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = command_line.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    one.set_defaults(call=run)
    one.add_argument("--recipe", default="small")
    one.add_argument("--precision", default="fp8")
    one.add_argument("--rows", type=int, default=16)
    one.add_argument("--seeds", type=int, nargs="+", default=[0])
    one.add_argument("--steps", type=int, default=300)
    one.add_argument("--learning-rate", type=float, help="at its highest; the recipe's by default")
    one.add_argument("--until", type=int, help="stop after this one of --steps, to which the schedules belong")
    one.add_argument("--corpus", nargs="+", default=["stdlib"])
    one.add_argument("--cache", default="runs/curves-data", help="where the prepared rows lie")
    one.add_argument("--output", type=Path, default=Path("runs/curves"))
    one.add_argument("--heldout-in", nargs="*", default=[], metavar="PRECISION")
    one.add_argument("--study", type=int, default=0)
    two = commands.add_parser("compare")
    two.set_defaults(call=compare)
    two.add_argument("curves", type=Path)
    two.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    arguments.call(arguments)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
