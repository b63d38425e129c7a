"""Generate with a model: `python serve.py MODEL [options]`. MODEL is a run folder or a Hugging Face directory.

python serve.py runs/tiny                                            a chat in the terminal
python serve.py runs/tiny --prompt "def main("                       one answer
python serve.py runs/tiny --input in.jsonl --output out.jsonl        a file of requests; started again it goes on where it stopped
python serve.py runs/tiny --http --port 8000                         the OpenAI API
python serve.py MODEL --http --mesh expert=8                         on several devices: requests and experts spread out
python serve.py bench runs/tiny --requests 100                       how fast it is
"""

import argparse
import os
import sys
from pathlib import Path

from dsv3_jax.command_line import Parser
from dsv3_jax.errors import UserError

# Of a GPU's memory, for weights, cache and scratch; JAX takes 0.75. What is left is for CUDA graphs, cuBLAS and NCCL.
_MEMORY = "0.92"


def at_least(low: int):
    """A type of option."""

    def integer(text: str) -> int:
        if (value := int(text)) < low:
            raise argparse.ArgumentTypeError(f"{value} is too small: it must be at least {low}")
        return value

    return integer


def path(text: str) -> Path:
    """A type of option: an empty one, as an unset variable of a shell makes it, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a file or folder")
    return Path(text)


def positive(text: str) -> float:
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def parse(argv: list[str]) -> argparse.Namespace:
    bench = argv[:1] == ["bench"]
    parser = Parser(
        prog="serve.py bench" if bench else "serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("model", type=path, help="run folder or Hugging Face directory")
    option("--step", type=int, help="of a run; default the newest")
    option("--dtype", choices=["float32", "bfloat16"], help="of weights and computation; default as stored, float32 on a CPU")

    engine = parser.add_argument_group("engine")
    engine.add_argument("--mesh", default="", help="devices, for example expert=8 or data=2,expert=4; default the first one")
    engine.add_argument("--fake-devices", type=at_least(1), help="rehearse a mesh on that many devices made of this CPU")
    engine.add_argument("--max-batch", type=at_least(1), default=64, help="requests that decode at once, on all devices together")
    engine.add_argument("--max-length", type=at_least(1), help="tokens of a request, prompt and answer; default what the model allows")
    engine.add_argument("--cache-tokens", type=at_least(1), help="the latent cache; default what is useful and fits into free memory")
    engine.add_argument("--host-cache-tokens", type=at_least(0), default=0, help="host memory for what the cache has no room for")
    engine.add_argument("--redundant-experts", type=at_least(0), default=0, help="copies of busy experts in each layer, beside one of each")
    engine.add_argument(
        "--rebalance-steps", type=at_least(0), default=0, help="plan anew which device has which experts, so often; 0: never"
    )
    engine.add_argument("--prefill-tokens", type=at_least(1), default=1024, help="of a prompt in one step; longer ones are cut into chunks")
    engine.add_argument("--fp8-cache", action="store_true", help="keep latents in FP8")
    engine.add_argument(
        "--speculate", type=at_least(0), nargs="?", const=1, default=0, metavar="N",
        help="draft N tokens a step with the MTP module, 1 if not said, 3 at most: the same answers, sooner",
    )  # fmt: skip

    if bench:
        option("--requests", type=at_least(1), default=100)
        option("--rate", type=positive, help="requests a second; default all at once")
        option("--lengths", choices=["fixed", "random", "mixed", "sharegpt"], default="random", help="see bench.py")
        option("--prompt-tokens", type=at_least(1), default=256, help="all (fixed), most (random, mixed) or mean (sharegpt)")
        option("--answer-tokens", type=at_least(1), default=128, help="the same of answers")
        option("--text", type=path, help="prompts are pieces of this file; default random tokens")
        option("--random", choices=["bf16", "fp8"], help="MODEL is a recipe's name: its model with random weights")
        option("--static", action="store_true", help="fill a batch, wait until all of it has ended, fill the next")
        option("--seed", type=int, default=0)
        return parser.parse_args(argv[1:], argparse.Namespace(bench=True))

    mode = parser.add_argument_group("what to do (default: a chat)").add_mutually_exclusive_group()
    mode.add_argument("--prompt", help="answer this")
    mode.add_argument("--input", type=path, help='.jsonl of OpenAI batch lines or {"prompt": …}, or .txt with a prompt a line')
    mode.add_argument("--http", action="store_true", help="serve the OpenAI API")
    option("--output", type=path, help="of --input: one line for each of its lines, in its order")

    sampling = parser.add_argument_group("sampling (where a request does not say)")
    sampling.add_argument(
        "--max-tokens", type=int, help="of an answer, as far as the context has room; default 256 for a prompt, else the API's"
    )
    sampling.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token")
    sampling.add_argument("--top-p", type=float, default=1.0)
    sampling.add_argument("--top-k", type=int, default=0)
    sampling.add_argument("--min-p", type=float, default=0.0)
    sampling.add_argument("--stop", action="append", default=[], help="text that ends an answer; may be given several times")
    sampling.add_argument("--seed", type=int, default=0)

    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1")
    http.add_argument("--port", type=int, default=8000)
    http.add_argument("--api-key", help="clients must send it; default the environment variable DSV3_API_KEY")
    http.add_argument("--model-name", help="default the folder's name")
    options = parser.parse_args(argv, argparse.Namespace(bench=False))
    if bool(options.input) != bool(options.output):
        parser.error("--input and --output belong together")
    return options


def make_engine(options: argparse.Namespace):
    from dsv3_jax import load
    from dsv3_jax.parallel import mesh as meshes
    from dsv3_jax.serving import Engine
    from dsv3_jax.serving.cache import pages_for

    mesh = meshes.make(options.mesh) if options.mesh else None
    if options.bench and options.random:
        from dsv3_jax.serving.decode_bench import random_model

        decoder, params = random_model(str(options.model), options.random, options.max_length, mesh)
        tokenizer = None
    else:
        model = load(options.model, step=options.step, dtype=options.dtype, mesh=mesh, serving=True)
        decoder, params, tokenizer = model.decoder, model.params, model.tokenizer
    return Engine(
        decoder,
        params,
        tokenizer=tokenizer,
        max_batch=options.max_batch,
        max_length=options.max_length,
        num_pages=None if options.cache_tokens is None else pages_for(options.cache_tokens),
        mesh=mesh,
        redundant_experts=options.redundant_experts,
        rebalance_steps=options.rebalance_steps,
        host_pages=pages_for(options.host_cache_tokens),
        prefill_tokens=options.prefill_tokens,
        fp8_cache=options.fp8_cache,
        speculate=options.speculate,
        consume=True,
    )


def serve(argv: list[str]) -> int:
    options = parse(argv)
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name of the same
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", _MEMORY)
    if options.fake_devices is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={options.fake_devices}".strip()
    from dsv3_jax.serving import commands

    return commands.run(options, lambda: make_engine(options))


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 1 some lines of a batch failed, 2 wrong input, 130 interrupted."""
    try:
        return serve(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
