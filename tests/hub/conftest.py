"""Checkpoints as bytes, read by the safetensors package, not by the code under test."""

import shutil
from pathlib import Path

import pytest
import safetensors

MODELS = Path(__file__).parents[1] / "data" / "models"


@pytest.fixture
def raw():
    """raw(directory) -> {name: (dtype, shape, bytes)} of all its safetensors files."""

    def read(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        tensors = {}
        for path in sorted(Path(directory).glob("*.safetensors")):
            for name, tensor in safetensors.deserialize(path.read_bytes()):
                assert name not in tensors
                tensors[name] = tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"])
        return tensors

    return read


@pytest.fixture
def copy_of(tmp_path):
    """copy_of("tiny_s_plain") -> a directory that may be damaged."""

    def copy(name: str) -> Path:
        target = tmp_path / f"copy_{name}"
        shutil.copytree(MODELS / name, target)
        return target

    return copy
