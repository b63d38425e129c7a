"""Recipes as every command reads them: by name or path, and what is wrong in one line."""

import argparse
import dataclasses
import sys

import pytest

from dsv3_jax import recipes
from dsv3_jax.config import ModelConfig, TrainConfig
from dsv3_jax.errors import UserError


@pytest.mark.parametrize("name", sorted(path.stem for path in recipes.FOLDER.glob("[a-z]*.py")))
def test_a_recipe_trains_the_model_that_it_serves(name):
    """Up to the length of its contexts, which pretraining keeps short."""
    config, model = recipes.train_config(name), recipes.model_config(name)
    assert isinstance(config, TrainConfig) and isinstance(model, ModelConfig)
    of_contexts = {"rope_scaling": model.rope_scaling, "max_position_embeddings": model.max_position_embeddings}
    assert dataclasses.replace(config.model, **of_contexts) == model


def _parallel_bench(name):
    from dsv3_jax.parallel import bench

    bench.prepare(["step", "--recipe", name])


def _precision_bench(name):
    from dsv3_jax.precision import bench

    bench.recipe_config(argparse.Namespace(recipe=name))


def _decode_bench(name):
    from dsv3_jax.serving import decode_bench

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["decode_bench", name])
        decode_bench.main()


@pytest.mark.parametrize("command", [recipes.train_config, recipes.model_config, _parallel_bench, _precision_bench, _decode_bench])
def test_an_unknown_recipe_is_one_line(command):
    with pytest.raises(UserError, match=r"^unknown recipe 'smal' \(did you mean 'small'\?\): choose one of deepseek_v3, .*$"):
        command("smal")


def test_a_function_of_another_kind_is_one_line(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def recipe():\n    return 3\n")
    with pytest.raises(UserError, match=r"^recipe\(\) of .*mine.py returns a int: it must return a dsv3_jax.config.TrainConfig$"):
        recipes.train_config(str(path))
