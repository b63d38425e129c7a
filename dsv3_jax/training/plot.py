"""A picture of a run: `python -m dsv3_jax.training.plot RUN picture.png`. Needs matplotlib (the extra `plots`)."""

import json
import math
import sys
from pathlib import Path

from dsv3_jax import command_line
from dsv3_jax.checkpoint import open_run
from dsv3_jax.data.prepare import Prepared
from dsv3_jax.errors import UserError, needs_extra
from dsv3_jax.training import loop


def draw(run: Path, output: Path) -> None:
    """Loss of every step, and bits per byte of the held-out text beside gzip's. Raises UserError where the run has no metrics."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise needs_extra("a picture", "plots") from None
    try:
        text = (run / "metrics.jsonl").read_text()
        metrics = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # a killed run's last line may be half a line
    except OSError as error:
        raise UserError(f"cannot read {run / 'metrics.jsonl'} ({error.strerror}): give a run folder") from error
    except ValueError as error:
        raise UserError(f"{run / 'metrics.jsonl'} is damaged ({error}): take out the lines that are not JSON") from error
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, bits = figure.subplots(1, 2)
    for name, label in (("main", "next token"), ("mtp", "the one after (MTP)")):
        if points := [(m["step"], m[name]) for m in metrics if m.get(name)]:  # 0 in a model without MTP
            loss.plot(*zip(*points), label=label, linewidth=1)
    heldout = [(m["step"], m["heldout_loss"]) for m in metrics if "heldout_loss" in m]
    if not heldout:
        raise UserError(f"{run} has no held-out loss yet: train on, or hold text out (data.heldout_fraction)")
    loss.plot(*zip(*heldout), "ko", markersize=4, label="next token, held out")
    loss.set(xlabel="step", ylabel="nats per token")
    loss.legend(frameon=False)

    prepared = _prepared(run)
    tokens = (prepared.heldout.tokens - prepared.heldout.documents) / prepared.heldout.bytes  # a byte; the first of a document is given
    coded = [nats * tokens / math.log(2) for _, nats in heldout]
    bits.plot([step for step, _ in heldout], coded, "ko-", markersize=4, linewidth=1)
    gzip = prepared.heldout_gzip9_bits_per_byte
    bits.axhline(gzip, color="tab:red", linewidth=1)
    bits.annotate(f"gzip -9: {gzip:.2f}", (1, gzip), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="tab:red")
    for m in metrics:
        if "heldout_bits_per_byte" in m:  # at the end, of all held-out text
            end = m["step"], m["heldout_bits_per_byte"]
            bits.annotate(f"{end[1]:.2f}", end, xytext=(0, -6), textcoords="offset points", ha="right", va="top")
    bits.set(xlabel="step", ylabel="bits per byte of held-out text", xlim=(0, None), ylim=(0, 1.15 * max(gzip, *coded)))
    for axes in (loss, bits):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(output, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot draw {output} ({error}): give a .png, .svg or .pdf in a folder that can be written") from error


def _prepared(run: Path) -> Prepared:
    """The rows that the run's newest checkpoint was trained on."""
    saved = open_run(run)
    cache = Path(saved.config["data"]["cache"] or run / "data")
    return Prepared.open(cache / saved.load({"data": loop.POSITION})["data"]["rows"])


def main(argv: list[str]) -> int:
    return command_line.run(lambda: _draw(argv))


def _draw(argv: list[str]) -> None:
    parser = command_line.Parser(prog="python -m dsv3_jax.training.plot", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("output", type=Path, help="the picture; its suffix says the format")
    options = parser.parse_args(argv)
    draw(options.run, options.output)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
