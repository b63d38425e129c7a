"""Reads recipes: files of configs/, by their names, or files of a user's own, by their paths. Every command that takes one reads it here.

A recipe is a Python file whose function `recipe` returns the TrainConfig of a run. Its function `model` returns the ModelConfig that a
released checkpoint of this model has, which may take longer contexts than the run does.
"""

import importlib.util
import traceback
from pathlib import Path

from dsv3_jax.config import ModelConfig, TrainConfig, did_you_mean
from dsv3_jax.errors import UserError

FOLDER = Path(__file__).parents[1] / "configs"


def train_config(name: str) -> TrainConfig:
    """What `recipe` of it returns. Raises UserError where there is no such file, or its function fails."""
    return _call(name, "recipe", TrainConfig)


def model_config(name: str) -> ModelConfig:
    """The same of `model`."""
    return _call(name, "model", ModelConfig)


def names() -> list[str]:
    """Those of configs/."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def _call(name: str, function: str, returns: type):
    known = names()
    path = Path(name) if name.endswith(".py") else FOLDER / f"{name}.py"
    if not path.is_file():
        raise UserError(f"unknown recipe {name!r}{did_you_mean(name, known)}: choose one of {', '.join(known)}, or a path of a .py file")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = getattr(module, function)()
    except UserError:
        raise
    except Exception as error:  # whatever a file of the user's own does
        line = next((frame.lineno for frame in traceback.extract_tb(error.__traceback__)[::-1] if frame.filename == str(path)), None)
        place = f"line {line}: " if line else ""
        raise UserError(
            f"the recipe {path} fails ({place}{type(error).__name__}: {error}): it needs a function {function}() that works"
        ) from None
    if not isinstance(found, returns):
        raise UserError(f"{function}() of {path} returns a {type(found).__name__}: it must return a dsv3_jax.config.{returns.__name__}")
    return found
