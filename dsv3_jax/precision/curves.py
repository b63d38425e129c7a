"""Loss of a recipe on the same text in FP8 and, with several seeds, in BF16.

    python -m dsv3_jax.precision.curves run --precision bf16 --seeds 0 1 2 --corpus DIR ... --output curves
    python -m dsv3_jax.precision.curves run --precision fp8 --seeds 0 --corpus DIR ... --output curves --study 6
    python -m dsv3_jax.precision.curves compare curves --plot docs/fp8_loss.svg

All runs take the same rows in the same order; a seed draws the weights. Smoothed: the mean of the last WINDOW steps. `--study`: after a
run, the errors of its products on that many batches of held-out rows (precision/study.py).
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import command_line
from dsv3_jax.errors import UserError

WINDOW = 100


def run(arguments) -> None:
    from dsv3_jax.data.corpus import Corpus
    from dsv3_jax.data.loader import Loader
    from dsv3_jax.data.prepare import prepare, train_tokenizer
    from dsv3_jax.precision.bench import lowered_step, recipe_config
    from dsv3_jax.precision.recipe import check_devices, recipe
    from dsv3_jax.training import schedules

    check_devices(recipe(arguments.precision))
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
    lowered, init, (batch, _) = lowered_step(config)
    compiled = lowered.compile()
    print(f"{config.precision}: traced and compiled in {time.perf_counter() - start:.0f} s", flush=True)
    tokenizer = train_tokenizer(corpus, config.model.vocab_size, arguments.cache)
    rows = prepare(corpus, tokenizer, arguments.cache, sequence_length=config.sequence_length, fim_rate=config.data.fim_rate)
    print(f"{rows.train.bytes:,} bytes of text, {rows.train.tokens:,} tokens ({time.perf_counter() - start:.0f} s)", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    steps = list(schedules.steps(config, 0, 0))[: arguments.until]
    for seed in arguments.seeds:
        state, kept, start = init(seed), [], time.perf_counter()
        for step, rows_BS in zip(steps, Loader(rows.directory, seed=0).batches((step.first_row, step.num_rows) for step in steps)):
            tokens = jnp.asarray(rows_BS["tokens"], batch["tokens"].dtype)
            state, metrics = compiled(state, {"tokens": tokens}, jax.tree.map(jnp.float32, step.scheduled))
            kept.append({name: metrics[name] for name in ("loss", "main", "mtp", "balance", "grad_norm", "skipped", "overflow")})
        kept = jax.device_get(kept)
        took = time.perf_counter() - start
        with open(arguments.output / f"{config.precision}-{seed}.jsonl", "w") as file:
            for number, values in enumerate(kept, 1):
                values["overflow"] = sum(counts.sum() for counts in jax.tree.leaves(values["overflow"]))
                file.write(json.dumps({"step": number} | {name: float(value) for name, value in values.items()}) + "\n")
        tokens_seen = len(kept) * config.batch_size * config.sequence_length
        print(
            f"{config.precision}, seed {seed}: {tokens_seen:,} tokens in {took:.0f} s ({tokens_seen / took:,.0f} tokens/s), "
            f"loss {np.mean([values['main'] for values in kept[-WINDOW:]]):.4f} over the last {WINDOW} steps",
            flush=True,
        )
    if arguments.study:
        _study(config, state.params, rows, arguments)


def _study(config, params, rows, arguments) -> None:
    from dsv3_jax.data.loader import heldout_batches
    from dsv3_jax.model import Decoder
    from dsv3_jax.precision import BF16, study

    operands = study.operands_of(Decoder(config.model, BF16, remat="layer"))
    batches = zip(range(arguments.study), heldout_batches(rows.directory, 1))
    result = study.study(operands(params, {"tokens": jnp.asarray(rows_BS["tokens"], jnp.int32)}) for _, rows_BS in batches)
    (arguments.output / f"study-{config.precision}.json").write_text(json.dumps(result))


def compare(arguments) -> None:
    """Prints the relative difference of the smoothed losses, and draws the curves."""
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
    print(f"smoothed loss at the end: {', '.join(f'{name} {losses[-1]:.4f}' for name, losses in smoothed.items())}")
    print(f"FP8 over the mean of {len(bf16)} BF16 seeds: {difference[-1]:+.3%} (a seed's standard deviation: {deviation[-1]:.3%})")
    if arguments.plot:
        _plot(smoothed, difference, deviation, arguments.plot)


def _plot(smoothed, difference, deviation, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(7, 6))
    steps = np.arange(len(difference)) + WINDOW
    for name, losses in smoothed.items():
        above.plot(steps, losses, label=name, linewidth=1, linestyle="-" if name.startswith("fp8") else "--")
    above.set(ylabel=f"loss, mean of {WINDOW} steps")
    above.legend()
    below.plot(steps, 100 * difference, label="FP8 over the mean of BF16")
    below.fill_between(steps, -200 * deviation, 200 * deviation, alpha=0.2, label="two standard deviations of BF16 seeds")
    below.set(ylabel="%", xlabel="step")
    below.legend()
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
    one.add_argument("--study", type=int, default=0)
    two = commands.add_parser("compare")
    two.set_defaults(call=compare)
    two.add_argument("curves", type=Path)
    two.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    arguments.call(arguments)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
