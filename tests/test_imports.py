"""The arrows between the packages (docs/architecture.md): a module may import what stands left of it, never what stands right."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each line may import the lines above it and its own package.
LAYERS = [
    ["pallas_kernels", "dsv3_jax.errors", "dsv3_jax.compilation_cache"],
    ["dsv3_jax.config", "dsv3_jax.command_line"],
    ["dsv3_jax.recipes"],
    ["dsv3_jax.precision"],
    ["dsv3_jax.model"],
    ["dsv3_jax.parallel", "dsv3_jax.hub", "dsv3_jax.checkpoint", "dsv3_jax.data"],
    ["dsv3_jax.training", "dsv3_jax.serving"],
    ["dsv3_jax.api"],
    ["configs"],
    ["train", "serve"],
]
RANK = {package: rank for rank, packages in enumerate(LAYERS) for package in packages}
# Exceptions, each with its reason: commands of a library package that stand above it (`python -m ...`) may use the public interface.
COMMANDS = {"__main__", "bench", "tune", "study", "curves"}


def _package(name: str) -> str | None:
    parts = name.split(".")
    for length in (2, 1):
        if ".".join(parts[:length]) in RANK:
            return ".".join(parts[:length])
    return None


def _sources():
    paths = [*ROOT.glob("dsv3_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py"), *ROOT.glob("configs/*.py")]
    return [path for path in [*paths, ROOT / "train.py", ROOT / "serve.py"] if path.exists() and path.stem not in COMMANDS]


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    own = _package(module)
    if module == "dsv3_jax":
        return  # exports the interface lazily: see test_importing_the_package_is_cheap
    assert own is not None, f"{module} stands in no layer of docs/architecture.md"
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            other = _package(name)
            assert other is None or other == own or RANK[other] < RANK[own], f"{module} imports {name}"


def test_importing_the_package_is_cheap():
    code = "import sys, dsv3_jax, dsv3_jax.config, dsv3_jax.errors; assert 'jax' not in sys.modules, 'jax was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
