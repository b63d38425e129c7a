"""Converts checkpoints, and measures how fast they load.

python -m dsv3_jax.hub to-orbax HF_DIR RUN_DIR

python -m dsv3_jax.hub to-hf RUN OUT_DIR --precision fp8

python -m dsv3_jax.hub bench [HF_DIR]
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dsv3_jax import command_line
from dsv3_jax.errors import UserError


def to_orbax(source: Annotated[Path, tyro.conf.Positional], run: Annotated[Path, tyro.conf.Positional], mesh: str | None = None) -> None:
    """Make a run folder, with one step 0, of a Hugging Face directory, one parameter in memory at a time. Weights keep their formats.

    Args:
        source: The Hugging Face directory.
        run: The run folder, which is new or empty.
        mesh: Devices to hold a parameter meanwhile, as in train.py, e.g. expert=8; by default the first one.
    """
    from dsv3_jax.api import shardings
    from dsv3_jax.checkpoint import save_streaming
    from dsv3_jax.config import TrainConfig, to_dict
    from dsv3_jax.data.tokenizer import Tokenizer
    from dsv3_jax.hub import config_json, loading
    from dsv3_jax.parallel.mesh import make

    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run} is not an empty directory: give a new run folder")
    model, values = config_json.read(source)
    tokenizer = Tokenizer.load(source) if (source / "tokenizer.json").exists() else None
    # What the checkpoint is computed in where it is loaded.
    config = to_dict(TrainConfig(model=model, precision="float32" if config_json.named_dtype(values) == "float32" else "auto"))
    save_streaming(run, 0, config, loading.stream(source, shardings=shardings(model, make(mesh) if mesh else None)))
    if tokenizer is not None:
        tokenizer.save(run / "tokenizer")
    (run / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(f"{run}: one step, 0; generate with python serve.py {run}, train on with python train.py ... --init-from {run}")


def to_hf(
    run: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    precision: Literal["float32", "bfloat16", "fp8"] = "bfloat16",
    step: int | None = None,
) -> None:
    """Make a Hugging Face directory of a run's checkpoint, one parameter in memory at a time.

    Args:
        run: The run folder, or a step's folder in it.
        out: The directory to write, which is new or empty.
        precision: Of the weights; fp8 is the released block format.
        step: Which step; by default the newest complete one.
    """
    from dsv3_jax.checkpoint import open_run
    from dsv3_jax.config import ModelConfig, from_dict
    from dsv3_jax.data.tokenizer import Tokenizer
    from dsv3_jax.hub.saving import write

    saved = open_run(run, step)
    saved.verify(lambda name: name.startswith("params/"))
    tokenizer = saved.directory.parent / "tokenizer"
    config = from_dict(ModelConfig, saved.config["model"])
    write(config, saved.abstract(), saved.leaves, Tokenizer.load(tokenizer) if tokenizer.exists() else None, out, precision)
    print(f"{out}: step {saved.step} in {precision}")


def bench(directory: Annotated[Path | None, tyro.conf.Positional] = None, rounds: int = 4) -> None:
    """Time loading onto the first device, cold files, beside dd on the same files.

    Args:
        directory: A Hugging Face directory; by default one of 2 GB in FP8 is made here, and removed afterwards.
        rounds: How often; the first one compiles.
    """
    from dsv3_jax.hub.bench import run

    run(directory, rounds)


def main() -> None:
    commands = {name: command_line.deferred(function) for name, function in {"to-orbax": to_orbax, "to-hf": to_hf, "bench": bench}.items()}
    options = {"prog": "python -m dsv3_jax.hub", "description": __doc__}
    command_line.parsed(lambda: tyro.extras.subcommand_cli_from_dict(commands, **options))()


if __name__ == "__main__":
    sys.exit(command_line.run(main))
