"""Names, shapes and dtypes of whole checkpoints, nothing allocated."""

import gzip
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from configs import deepseek_v3
from dsv3_jax import hub

DATA = Path(__file__).parents[1] / "data"
MODELS = DATA / "models"
DTYPES = {"F8_E4M3": np.dtype(jnp.float8_e4m3fn), "BF16": np.dtype(jnp.bfloat16), "F32": np.dtype(np.float32)}


def test_released_checkpoint():
    released = json.loads(gzip.decompress((DATA / "r1_hf_ckpt_params_map.json.gz").read_bytes()))
    expected = {name: (tuple(tensor["shape"]), DTYPES[tensor["dtype"]]) for name, tensor in released.items()}
    listed = hub.tensors(deepseek_v3.model())
    assert len(listed) == 91_991
    assert listed == expected
    assert sum(dtype.itemsize * int(np.prod(shape)) for shape, dtype in listed.values()) == 688_574_839_360


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_unquantised_checkpoints_have_no_scales(precision):
    fp8, plain = hub.tensors(deepseek_v3.model()), hub.tensors(deepseek_v3.model(), precision=precision)
    assert plain.keys() == {name for name in fp8 if not name.endswith("_scale_inv")}
    by_name = {name: dtype for name, (_, dtype) in plain.items()}
    bias = {name for name in by_name if name.endswith("e_score_correction_bias")}
    assert len(bias) == 59 and {by_name[name] for name in bias} == {np.dtype(np.float32)}
    assert {by_name[name] for name in by_name.keys() - bias} == {np.dtype(getattr(jnp, precision))}


@pytest.mark.parametrize("name", ["tiny_s_plain", "tiny_s_yarn_mtp", "tiny_e_fp8_mtp", "tiny_v2_lite", "tiny_v2", "tiny_moonlight"])
def test_reference_checkpoints(name, raw):
    config, _ = hub.config_json.read(MODELS / name)
    precision = "fp8" if "fp8" in name else "float32"
    stored = {tensor: (shape, DTYPES[dtype]) for tensor, (dtype, shape, _) in raw(MODELS / name).items()}
    assert hub.tensors(config, precision=precision) == stored
