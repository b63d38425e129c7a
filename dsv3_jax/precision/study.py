"""How far each product of a training step is from float64, by way of quantising: the recipe, and two that the report warns of.

    python -m dsv3_jax.precision.study RUN --batches 6            # a checkpoint's weights on its held-out text

A loss curve of a few thousand steps cannot tell a good recipe from a bad one; this can. The operands of every FP8 product (input, weight,
output gradient) are caught by taps from a BF16 step on real text, and multiplied in float64, exactly and after quantising them:

    recipe           the report's: tiles of 128 for activations and gradients, blocks of 128x128 for weights (§3.3.2)
    per_tensor       one scale for each tensor
    gradient_blocks  the recipe, but output gradients in blocks of 128x128, with which the report's 16B model diverged (appendix B.2)

An error is the root mean square over rows (tokens of y and dx, outputs of dw) of |error of the row| / |row|: a row that is small beside
its neighbours counts as much as they do, and is what coarse scales lose. A scheme stands out by z standard deviations: the mean over
steps of d / the standard deviation of d, where d is the log of its error over the recipe's in the same step, averaged over the products.
(Per-tensor scales need no second quantisation for dw, and so can be ahead there while they fall behind in y and dx.)
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import command_line
from dsv3_jax.errors import UserError
from dsv3_jax.model import Decoder
from dsv3_jax.precision import BF16, FP8_WEIGHTS, Scales, Tap, attach
from dsv3_jax.precision.fp8 import GRADIENT_FLOOR
from dsv3_jax.training.loss import loss_and_terms
from pallas_kernels import Quantized, quantize_blocks, quantize_tiles
from pallas_kernels.quantized import E4M3, E4M3_MAX, num_blocks

SCHEMES = ("recipe", "per_tensor", "gradient_blocks")
PRODUCTS = ("y", "dx", "dw")


class Operands(NamedTuple):
    """Of one product in one layer: x [T, K], w [N, K], dy [T, N]."""

    name: str
    scales: Scales
    x: jax.Array
    w: jax.Array
    dy: jax.Array


def operands_of(decoder: Decoder) -> Callable[[dict, dict], Iterator[Operands]]:
    """A function of (params, batch) that gives the operands of every FP8 product of a step; of the routed experts rows of each layer's
    busiest one, as many as experts average."""
    experts_per_token = decoder.config.num_experts_per_tok

    def taps(params, tokens):
        def tap(path, w):
            stacked, grouped = path[0].key.endswith("_layers"), "experts" in [key.key for key in path]
            shape, rows = w.shape[1:] if stacked else w.shape, tokens * (experts_per_token if grouped else 1)
            zeros = Tap.zeros(rows, shape, decoder.recipe, grouped=grouped)
            return jax.tree.map(lambda x: jnp.zeros((w.shape[0], *x.shape), x.dtype) if stacked else x, zeros)

        return _only_fp8(params, tap)

    @jax.jit
    def catch(params, batch):
        def loss(taps):
            return loss_and_terms(decoder, attach(params, taps), batch, mtp_loss_weight=0.3, balance_loss_weight=1e-4)

        caught, terms = jax.grad(loss, has_aux=True)(taps(params, batch["tokens"][:, 1:].size))
        return caught, terms["load"]

    def operands(params, batch):
        caught, loads = catch(params, batch)
        loads = np.asarray(loads).astype(int)  # [L, E], the MTP layer last
        for path, stash in jax.tree.leaves_with_path(caught, is_leaf=lambda x: isinstance(x, Tap)):
            keys = [key.key for key in path]
            name, stacked = keys[-1].removesuffix("_tap"), keys[0].endswith("_layers")
            w = params
            for key in [*keys[:-1], name]:
                w = w[key]
            for layer in range(w.shape[0]) if stacked else [None]:
                x, dy, w_one = (leaf if layer is None else leaf[layer] for leaf in (stash.x, stash.dy, w))
                label = "/".join([keys[0], *([] if layer is None else [str(layer)]), *keys[1:-1], name])
                if "experts" in keys:
                    load = loads[-1 if layer is None else layer]
                    expert = int(load.argmax())
                    first = int(load[:expert].sum())
                    rows = slice(first, first + len(x) // len(load))
                    x, dy, w_one = x[rows], dy[rows], w_one[expert]
                yield Operands(label, FP8_WEIGHTS[name], x, w_one.reshape(-1, w_one.shape[-1]), dy)

    return operands


def errors(operands: Operands) -> dict[str, dict[str, float]]:
    """{scheme: {"y" | "dx" | "dw": error}} of one product."""
    _, scales, *arrays = operands
    quantised = _quantised(*arrays, scales)
    with jax.enable_x64(True):
        return jax.tree.map(float, _errors(*arrays, quantised))


@functools.partial(jax.jit, static_argnums=3)
def _quantised(x, w, dy, scales):
    """Of each scheme the operands: x and w of y, dy of dx, the transposes of dy and x of dw.

    They leave this program as e4m3: where a conversion to it and the one back are in one program, XLA may drop the pair.
    """
    x_TK = quantize_tiles(x, pow2=scales.input)
    x_KT = quantize_tiles(x_TK.dequantize().T, pow2=scales.input)  # dequantised, transposed, quantised again
    dy_TN, dy_NT = (quantize_tiles(v, pow2=scales.gradient, floor=GRADIENT_FLOOR) for v in (dy, dy.T))
    w_NK = quantize_blocks(w)
    return {
        "recipe": (x_TK, w_NK, dy_TN, dy_NT, x_KT),
        "per_tensor": tuple(map(_per_tensor, (x, w, dy, dy.T, x.T))),
        "gradient_blocks": (x_TK, w_NK, quantize_blocks(dy), quantize_blocks(dy.T), x_KT),
    }


@jax.jit
def _errors(x, w, dy, quantised):
    exact = _products(*(v.astype(jnp.float64) for v in (x, w, dy, dy.T, x.T)))
    ours = {scheme: _products(*(q.dequantize(jnp.float64) for q in operands)) for scheme, operands in quantised.items()}
    return {scheme: {p: _error(y, exact[p]) for p, y in products.items()} for scheme, products in ours.items()}


def study(steps: Iterator[Iterator[Operands]], report: Callable[[str], None] = print) -> dict:
    """Errors of all products of several steps, and by how many standard deviations each scheme stands out from the recipe.

    Raises UserError with fewer than two steps, which have no standard deviation.
    """
    found = [{operands.name: errors(operands) for operands in step} for step in steps]
    if len(found) < 2:
        raise UserError(f"{len(found)} batches have no standard deviation: study at least two, and hold out as much text")
    names = list(found[0])
    table = np.array(
        [[[[one[name][s][p] for p in PRODUCTS] for name in names] for s in SCHEMES] for one in found]
    )  # [step, scheme, name, p]
    report(f"{'error against float64':52s}" + "".join(f"{s + ' ' + p:>20s}" for s in SCHEMES for p in PRODUCTS))
    for index, name in enumerate(names):
        report(f"{name:52s}" + "".join(f"{value:20.4%}" for value in table.mean(0)[:, index].reshape(-1)))
    mean_log = np.log(table).mean(2)  # [step, scheme, p]
    z = {}
    for index, scheme in enumerate(SCHEMES[1:], 1):
        d = mean_log[:, index] - mean_log[:, 0]
        spread = d.std(0, ddof=1)
        z[scheme] = {p: float(m / s) if m else 0.0 for p, m, s in zip(PRODUCTS, d.mean(0), spread)}
        ratios = ", ".join(f"{p} {np.exp(m):.4f} ({z[scheme][p]:+.1f} sd)" for p, m in zip(PRODUCTS, d.mean(0)))
        report(f"error of {scheme} over the recipe's: {ratios}")
    return {"products": names, "schemes": SCHEMES, "errors": table.tolist(), "standard_deviations": z}


def _products(x_TK, w_NK, dy_TN, dy_NT, x_KT):
    return {"y": x_TK @ w_NK.T, "dx": dy_TN @ w_NK, "dw": dy_NT @ x_KT.T}


def _error(ours, exact):
    size = jnp.linalg.norm(exact, axis=-1)
    ratio = jnp.where(size > 0, jnp.linalg.norm(ours - exact, axis=-1) / size, 0)
    return jnp.sqrt(jnp.sum(ratio**2) / jnp.sum(size > 0))


def _per_tensor(v):
    """`v` with the same scale in every tile."""
    scale = jnp.max(jnp.abs(v)).astype(jnp.float32) / E4M3_MAX
    codes = (v.astype(jnp.float32) / scale).astype(E4M3)
    return Quantized.tiles(codes, jnp.full((len(v), num_blocks(v.shape[1])), scale))


def _only_fp8(params, tap):
    taps: dict = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        if path[-1].key in FP8_WEIGHTS:
            inner = taps
            for key in path[:-1]:
                inner = inner.setdefault(key.key, {})
            inner[path[-1].key + "_tap"] = tap(path, leaf)
    return taps


def main() -> None:
    import dsv3_jax
    from dsv3_jax.checkpoint import open_run
    from dsv3_jax.data.corpus import Corpus

    parser = command_line.Parser(description="Errors of FP8 products against float64 on a checkpoint's weights and held-out text.")
    parser.add_argument("run", help="a run folder of train.py")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--rows", type=int, default=1, help="sequences a batch")
    parser.add_argument("--length", type=int, help="tokens of a sequence; default 4096, or as many as the model has positions for")
    parser.add_argument("--output", help="write all errors as JSON here")
    arguments = parser.parse_args()
    model, config = dsv3_jax.load(arguments.run), open_run(arguments.run).config
    longest = model.config.max_position_embeddings
    length = min(4096, longest) if arguments.length is None else arguments.length
    if arguments.batches < 1 or arguments.rows < 1 or not 1 <= length <= longest:
        raise UserError(f"--batches and --rows must be at least 1, --length within 1..{longest}, the positions of this model")
    needed = arguments.batches * arguments.rows * (length + 1)
    tokens: list[int] = []
    for document in Corpus(config["data"]["corpus"], heldout_fraction=config["data"]["heldout_fraction"]).documents("heldout"):
        tokens += model.tokenizer.encode(document.text)
        if len(tokens) >= needed:
            break
    if len(tokens) < needed:  # the same text twice would pass for less spread than there is
        raise UserError(f"the held-out text has {len(tokens)} tokens, and {needed} are asked for: lower --batches, --rows or --length")
    batches = np.array(tokens[:needed], np.int32).reshape(arguments.batches, arguments.rows, length + 1)
    operands = operands_of(Decoder(model.config, BF16, remat="layer"))
    result = study(operands(model.params, {"tokens": jnp.asarray(batch)}) for batch in batches)
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(result, file)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
