"""transformers loads what was saved, and computes the same logits. Runs on a CPU too: `pytest -m gpu tests/hub/test_transformers.py`."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import dsv3_jax
from dsv3_jax import hub

pytestmark = pytest.mark.gpu  # for the packages it needs, which are no part of the project: torch and transformers
MODELS = Path(__file__).parents[1] / "data" / "models"
NAMES = ["tiny_s_plain", "tiny_s_yarn_mtp", "tiny_e_fp8_mtp", "tiny_v2_lite", "tiny_v2", "tiny_moonlight"]


# In FP8 only those without partial blocks: transformers refuses to dequantise the others ("not divisible by scale grid").
SAVED = [
    (name, precision) for name in NAMES for precision in ("float32", "bfloat16", "fp8") if (name, precision) != ("tiny_e_fp8_mtp", "fp8")
]


@pytest.mark.parametrize(("name", "precision"), SAVED)
def test_transformers_loads_what_was_saved(name, precision, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = dsv3_jax.load(MODELS / name)
    hub.save(model, tmp_path / "out", precision=precision)
    options = {"attn_implementation": "eager", "dtype": torch.float32, "output_loading_info": True}
    if precision == "fp8":
        pytest.importorskip("accelerate")
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    mtp = f"model.layers.{model.config.num_hidden_layers}."
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(key.startswith(mtp) for key in info["unexpected_keys"])
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 40))
    with torch.no_grad():
        logits = theirs.to(device, torch.float32)(torch.from_numpy(ids).to(device)).logits.float().cpu().numpy()
    ours = dsv3_jax.load(tmp_path / "out", dtype=np.float32, weights="dequantised")
    np.testing.assert_allclose(ours(ids), logits, rtol=0, atol=1e-4)


def test_transformers_reads_the_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = dsv3_jax.load(MODELS / "tiny_s_plain")
    model.tokenizer.config["chat_template"] = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    hub.save(model, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "moved")  # nothing in it depends on where it lies
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "moved")
    for text in ("def f(x):\n    return x", "Übung 世界 😀"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == model.tokenizer.encode(text, add_special_tokens=False)
    messages = [{"role": "user", "content": "hello"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == model.tokenizer.apply_chat_template(messages)
