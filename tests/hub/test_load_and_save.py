"""Checkpoints in and out: bit for bit, on meshes, in pieces; and what is refused."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import dsv3_jax
from dsv3_jax import hub
from dsv3_jax.errors import UserError
from dsv3_jax.hub import loading, safetensors_io, saving
from dsv3_jax.hub.names import tensors_of

MODELS = Path(__file__).parents[1] / "data" / "models"
E4M3 = ml_dtypes.float8_e4m3fn


def equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and x.shape == y.shape, path
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8), err_msg=str(path))


def by_name(params, config) -> dict[str, np.ndarray]:
    """The tensors of the parameters by their checkpoint names."""
    params = jax.device_get(params)
    return {part.name: functools.reduce(lambda tree, key: tree[key], part.path, params)[part.index] for part in tensors_of(config)}


# ---- round trips


@pytest.mark.parametrize(
    ("name", "precision"), [("tiny_s_plain", "float32"), ("tiny_s_yarn_mtp", "float32"), ("tiny_e_fp8_mtp", "fp8"), ("tiny_v2", "float32")]
)
def test_round_trip_of_a_checkpoint(name, precision, raw, tmp_path):
    """What is loaded and saved is what was there, in every byte of every tensor, MTP and its copies included."""
    model = dsv3_jax.load(MODELS / name)
    hub.save(model, tmp_path / "out", precision=precision)
    assert raw(tmp_path / "out") == raw(MODELS / name)
    again = dsv3_jax.load(tmp_path / "out")
    assert again.config == model.config
    equal_trees(again.params, model.params)
    if model.tokenizer is not None:
        assert again.tokenizer.encode("def f(x): 1") == model.tokenizer.encode("def f(x): 1")
        assert again.tokenizer.chat_template == model.tokenizer.chat_template


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "fp8"])
def test_round_trip_of_parameters(precision, raw, tmp_path):
    """float32 parameters in each precision, against roundings made with numpy; saving what was loaded changes nothing more."""
    model = dsv3_jax.load(MODELS / "tiny_s_yarn_mtp")
    hub.save(model, tmp_path / "a", precision=precision)
    original, saved = load_file(MODELS / "tiny_s_yarn_mtp" / "model.safetensors"), raw(tmp_path / "a")
    for name, value in original.items():
        expected = {name: ("F32", value)}
        if precision != "float32" and not name.endswith("e_score_correction_bias"):
            expected = {name: ("BF16", value.astype(ml_dtypes.bfloat16))}
        if name + "_scale_inv" in saved:
            codes, scales = quantised(value)
            expected = {name: ("F8_E4M3", codes), name + "_scale_inv": ("F32", scales)}
        for key, (dtype, array) in expected.items():
            assert saved[key] == (dtype, array.shape, array.tobytes()), key
    assert any(key.endswith("_scale_inv") for key in saved) == (precision == "fp8")
    hub.save(dsv3_jax.load(tmp_path / "a"), tmp_path / "b", precision=precision)
    assert raw(tmp_path / "b") == saved


def quantised(w):
    """128x128 blocks, scale amax / 448 (1 for a block of zeros), in float32."""
    codes = np.zeros(w.shape, E4M3)
    scales = np.ones([-(-size // 128) for size in w.shape], np.float32)
    for i, j in np.ndindex(*scales.shape):
        block = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        amax = np.abs(w[block]).max()
        scales[i, j] = amax / np.float32(448) if amax else 1
        codes[block] = (w[block] / scales[i, j]).astype(E4M3)
    return codes, scales


def test_tokenizer_and_generation_config_are_saved(tmp_path):
    model = dsv3_jax.load(MODELS / "tiny_s_plain")
    model.tokenizer.config["chat_template"] = "{{ messages[0].content }}"
    hub.save(model, tmp_path / "out")
    assert dsv3_jax.load(tmp_path / "out").tokenizer.chat_template == "{{ messages[0].content }}"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, 1)


# ---- FP8


def test_dequantised_weights_are_bit_equal():
    expected = np.load(MODELS / "tiny_e_fp8_mtp" / "expected.npz")
    config, params = hub.load(MODELS / "tiny_e_fp8_mtp", weights="dequantised", dtype=jnp.float32)
    tensors = by_name(params, config)
    checked = [name for name in expected if name.startswith("dequant::")]
    assert len(checked) == 4
    for name in checked:
        np.testing.assert_array_equal(tensors[name.removeprefix("dequant::")], expected[name])
    for name, total, squares in zip(*(expected["dequant_" + key] for key in ("checksum_names", "sum", "sumsq"))):
        w = tensors[name].astype(np.float64)
        np.testing.assert_allclose([w.sum(), (w * w).sum()], [total, squares], rtol=1e-5, atol=1e-5)


def test_dequantised_to_bfloat16_is_the_rounded_product():
    _, exact = hub.load(MODELS / "tiny_e_fp8_mtp", weights="dequantised", dtype=jnp.float32)
    _, rounded = hub.load(MODELS / "tiny_e_fp8_mtp", weights="dequantised", dtype=jnp.bfloat16)
    bias = ("moe_layers", "mlp", "gate", "e_score_correction_bias")
    for (path, x), y in zip(jax.tree.leaves_with_path(exact), jax.tree.leaves(rounded)):
        keys = tuple(key.key for key in path)
        dtype = np.float32 if keys[-1] == bias[-1] else ml_dtypes.bfloat16
        np.testing.assert_array_equal(np.asarray(x).astype(dtype), np.asarray(y), err_msg=str(keys))


def test_stored_keeps_codes_and_scales(raw):
    _, params = hub.load(MODELS / "tiny_e_fp8_mtp", dtype=jnp.float32)
    assert params["mtp"]["eh_proj"].dtype == np.float32
    experts = params["moe_layers"]["mlp"]["experts"]
    assert experts["gate_up_proj"].dtype == E4M3 and experts["gate_up_proj"].shape == (1, 6, 2, 136, 160)
    assert experts["gate_up_proj_scale"].dtype == np.float32 and experts["gate_up_proj_scale"].shape == (1, 6, 2, 2, 2)
    dtype, shape, data = raw(MODELS / "tiny_e_fp8_mtp")["model.layers.1.mlp.experts.4.up_proj.weight_scale_inv"]
    assert (dtype, shape) == ("F32", (2, 2))
    assert np.asarray(experts["gate_up_proj_scale"][0, 4, 1]).tobytes() == data


# ---- several files, meshes, slabs


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_tensors_lie_at_multiples_of_their_items(tmp_path, length):
    """Readers that map a file want that; names make headers of any length, and the first tensor by name has an odd number of bytes."""
    a, b, c = "a" * length, "b", "c"
    values = {a: np.arange(3).astype(jnp.float8_e4m3fn), b: np.arange(5).astype(jnp.bfloat16), c: np.float32([7])}
    with safetensors_io.Writer(tmp_path / "x", {name: (value.shape, value.dtype) for name, value in values.items()}) as writer:
        for name in (b, c, a):
            writer.write(name, values[name])
    for name, stored in safetensors_io.read_header(tmp_path / "x").items():
        assert stored.offset % stored.dtype.itemsize == 0
        stored.read((slice(0, len(values[name])),), out := np.empty_like(values[name]))
        np.testing.assert_array_equal(out, values[name])


def test_fp8_weights_are_saved_as_they_are(tmp_path):
    """Codes that do not reach 448, as with scales that are powers of two: quantised anew they would be others."""
    model = dsv3_jax.load(MODELS / "tiny_e_fp8_mtp")
    halved = lambda leaf: (leaf.astype(jnp.float32) / 2).astype(leaf.dtype) if leaf.dtype == jnp.float8_e4m3fn else leaf  # noqa: E731
    model.params = jax.tree.map(halved, model.params)
    hub.save(model, tmp_path / "out", precision="fp8")
    equal_trees(dsv3_jax.load(tmp_path / "out").params, model.params)


def test_several_files_with_an_index(raw, tmp_path, monkeypatch):
    model = dsv3_jax.load(MODELS / "tiny_e_fp8_mtp")
    monkeypatch.setattr(saving, "_SHARD_BYTES", 300_000)
    hub.save(model, tmp_path / "out", precision="fp8")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        assert (tmp_path / "out" / file).stat().st_size < 300_000 + 50_000  # and its header
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = raw(tmp_path / "out")
    assert tensors == raw(MODELS / "tiny_e_fp8_mtp")
    assert index["weight_map"].keys() == tensors.keys() and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors.values())
    # A weight and its scales lie in one file.
    assert all(index["weight_map"][name.removesuffix("_scale_inv")] == file for name, file in index["weight_map"].items())
    equal_trees(dsv3_jax.load(tmp_path / "out").params, model.params)


@pytest.mark.parametrize(("name", "weights"), [("tiny_s_plain", "stored"), ("tiny_e_fp8_mtp", "stored"), ("tiny_e_fp8_mtp", "dequantised")])
def test_on_a_mesh(name, weights):
    """Experts lie over `expert`, the rest is everywhere; every value is where one device would have it."""
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    alone, spread = dsv3_jax.load(MODELS / name, weights=weights), dsv3_jax.load(MODELS / name, weights=weights, mesh=mesh)
    equal_trees(alone.params, spread.params)
    down = spread.params["moe_layers"]["mlp"]["experts"]["down_proj"]
    assert {shard.data.shape[1] for shard in down.addressable_shards} == {down.shape[1] // 2}
    assert len(spread.params["embed"].sharding.device_set) == 4
    ids = np.arange(24).reshape(2, 12)
    np.testing.assert_allclose(spread(ids), alone(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights", ["stored", "dequantised"])
def test_sharded_along_rows_and_columns(weights, monkeypatch):
    """Slices that cut through scale blocks, read in slabs of a few tensors."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    _, alone = hub.load(MODELS / "tiny_e_fp8_mtp", weights=weights)

    def spec(leaf):
        axes = [None] * leaf.ndim
        for axis, name in ((-1, "y"), (-2, "x")):
            if leaf.ndim >= 2 and leaf.shape[axis] % mesh.shape[name] == 0:
                axes[axis] = name
        return NamedSharding(mesh, PartitionSpec(*axes))

    monkeypatch.setattr(loading, "_SLAB_BYTES", 40_000)
    _, spread = hub.load(MODELS / "tiny_e_fp8_mtp", weights=weights, shardings=jax.tree.map(spec, alone))
    equal_trees(alone, spread)
    assert {shard.data.shape for shard in spread["moe_layers"]["mlp"]["experts"]["gate_up_proj"].addressable_shards} == {(1, 6, 2, 68, 80)}


def test_a_mesh_that_does_not_divide_is_refused():
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    with pytest.raises(UserError, match=r"experts/.* does not divide over the mesh expert=4"):
        dsv3_jax.load(MODELS / "tiny_e_fp8_mtp", mesh=mesh)


PEAK = """
import resource, sys
import jax
from dsv3_jax import hub
from dsv3_jax.hub import loading
loading._SLAB_BYTES = int(sys.argv[3])
hub.load(sys.argv[2])  # everything that is imported and compiled once
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
_, params = hub.load(sys.argv[1])
print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.parametrize("slab_bytes", [8 * 2**20, 512 * 2**20])
def test_host_memory_stays_at_the_result_and_a_few_tensors(tmp_path, slab_bytes):
    """A fresh process loads 270 MB, most of it experts of 1 MB a tensor, and its peak grows by little more than that."""
    config = dsv3_jax.config.ModelConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=5,
        first_k_dense_replace=1,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        moe_intermediate_size=512,
        n_routed_experts=20,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
    )
    shapes = dsv3_jax.model.Decoder(config).abstract_params()
    model = dsv3_jax.Model(config, jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes))
    hub.save(model, tmp_path / "large", precision="float32")
    run = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "large", MODELS / "tiny_s_plain", str(slab_bytes)],
        capture_output=True,
        text=True,
        env={"JAX_PLATFORMS": "cpu", "PATH": ""},
        cwd=Path(__file__).parents[2],
        check=True,
    )
    grown, result = map(int, run.stdout.split())
    assert result > 260e6
    assert grown < result + 60e6, (grown, result)


# ---- bad input


def rewrite(directory, change):
    """Rewrites model.safetensors with the safetensors package after `change` has worked on its tensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def refused(directory, message, **options):
    with pytest.raises(UserError, match=message) as error:
        dsv3_jax.load(directory, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_tensors_are_named(copy_of):
    directory = copy_of("tiny_s_plain")
    gone = [f"model.layers.2.mlp.experts.{e}.up_proj.weight" for e in range(5)]
    rewrite(directory, lambda tensors: [tensors.pop(name) for name in gone])
    message = refused(directory, "5 missing")
    assert all(name in message for name in gone[:3]) and "and 2 more" in message


def test_unknown_tensors_are_named(copy_of):
    directory = copy_of("tiny_s_plain")
    rewrite(directory, lambda tensors: tensors.update({"model.layers.1.mlp.experts.8.up_proj.weight": np.zeros((32, 64), np.float32)}))
    refused(directory, r"1 not of this model: model\.layers\.1\.mlp\.experts\.8\.up_proj\.weight")


def test_wrong_shapes_are_named(copy_of):
    directory = copy_of("tiny_s_plain")
    rewrite(directory, lambda tensors: tensors.update({"lm_head.weight": np.zeros((384, 63), np.float32)}))
    refused(directory, r"1 wrongly shaped: lm_head.weight is \[384, 63\] and should be \[384, 64\]")


def test_rotary_buffers_are_passed_over(copy_of):
    directory = copy_of("tiny_s_plain")
    rewrite(directory, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}))
    equal_trees(dsv3_jax.load(directory).params, dsv3_jax.load(MODELS / "tiny_s_plain").params)


@pytest.mark.parametrize("rows_at_a_time", [4096, 150])
def test_an_mtp_module_with_its_own_head_is_refused(copy_of, monkeypatch, rows_at_a_time):
    monkeypatch.setattr(loading, "_COMPARED_ROWS", rows_at_a_time)
    directory = copy_of("tiny_s_yarn_mtp")
    rewrite(directory, lambda tensors: tensors["model.layers.2.shared_head.head.weight"].__setitem__((200, 3), 7.0))
    refused(directory, "model.layers.2.shared_head.head.weight differs from lm_head.weight")


@pytest.mark.parametrize("keep", [4, 1000, -1])
def test_a_file_that_is_cut_short(copy_of, keep):
    directory = copy_of("tiny_s_plain")
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:keep])
    refused(directory, "model.safetensors is cut short")


def test_a_file_that_is_too_long(copy_of):
    directory = copy_of("tiny_s_plain")
    with open(directory / "model.safetensors", "ab") as file:
        file.write(b"x")
    refused(directory, "is too long")


def test_a_damaged_header(copy_of):
    directory = copy_of("tiny_s_plain")
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[8:11] = b"???"
    (directory / "model.safetensors").write_bytes(data)
    refused(directory, "has a damaged header")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": ["384", "64"], "data_offsets": [0, 98304]},
        {"dtype": "F32", "shape": [384, 64], "data_offsets": [0]},
        {"dtype": "F32", "shape": [384, 64], "data_offsets": ["0", "98304"]},
        {"dtype": "F32", "shape": [-1, 64], "data_offsets": [256, 0]},
        {"dtype": "F32", "shape": [384, 64], "data_offsets": [-98304, 0]},
        {"shape": [384, 64], "data_offsets": [0, 98304]},
        None,
    ],
)
def test_a_header_of_other_values(copy_of, entry):
    directory = copy_of("tiny_s_plain")
    data = (directory / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]) | {"lm_head.weight": entry}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    refused(directory, "has a damaged header")


@pytest.mark.parametrize("index", [[], {"weight_map": None}, {"weight_map": {"lm_head.weight": 1}}])
def test_an_index_of_other_values(copy_of, index):
    directory = copy_of("tiny_s_plain")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(directory, "is not an index of safetensors files")


def test_a_shard_is_missing_or_cut_short(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_SHARD_BYTES", 300_000)
    hub.save(dsv3_jax.load(MODELS / "tiny_s_plain"), tmp_path / "out", precision="float32")
    *others, last = sorted((tmp_path / "out").glob("*.safetensors"))
    data = last.read_bytes()
    last.write_bytes(data[:-1])
    refused(tmp_path / "out", f"{last.name} is cut short")
    last.unlink()
    refused(tmp_path / "out", f"lacks {last.name} of the {len(others) + 1} files")


def test_the_index_says_which_file_a_tensor_is_read_from(copy_of):
    """Whatever else lies in the files. What it names must be there, and what it leaves out is missing."""
    directory = copy_of("tiny_s_plain")
    tensors = load_file(directory / "model.safetensors")
    others = {"lm_head.weight": np.zeros_like(tensors["lm_head.weight"]), "not of this model": np.zeros(3, np.float32)}
    save_file(others, directory / "other.safetensors")

    def write(**files):
        index = {"weight_map": dict.fromkeys(tensors, "model.safetensors") | files}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    write()
    equal_trees(dsv3_jax.load(directory).params, dsv3_jax.load(MODELS / "tiny_s_plain").params)
    write(**{"lm_head.weight": "other.safetensors"})
    assert not np.asarray(dsv3_jax.load(directory).params["lm_head"]).any()
    write(**{"model.norm.weight": "other.safetensors"})
    refused(directory, "names files that lack model.norm.weight")
    write(**{"old": "other.safetensors"})
    refused(directory, "names files that lack old")
    del tensors["lm_head.weight"]
    write()
    refused(directory, "1 missing: lm_head.weight")


def test_fp8_without_scales(copy_of):
    directory = copy_of("tiny_e_fp8_mtp")
    header = int.from_bytes((directory / "model.safetensors").read_bytes()[:8], "little")
    data = (directory / "model.safetensors").read_bytes()
    renamed = data[: 8 + header].replace(b"layers.1.self_attn.o_proj.weight_scale_inv", b"layers.1.self_attn.o_proj.weight_scale_xxx")
    (directory / "model.safetensors").write_bytes(renamed + data[8 + header :])
    refused(directory, "1 missing: model.layers.1.self_attn.o_proj.weight_scale_inv; 1 not of this model")


def test_layers_in_different_dtypes(copy_of):
    directory = copy_of("tiny_s_plain")
    name = "model.layers.2.self_attn.o_proj.weight"
    rewrite(directory, lambda tensors: tensors.update({name: tensors[name].astype(np.float16)}))
    refused(directory, f"{name} is float16 and model.layers.1.self_attn.o_proj.weight is float32: store all layers and experts alike")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "architecture Qwen3ForCausalLM is not supported"),
        ({"n_routed_experts": 16}, "missing"),
        ({"num_nextn_predict_layers": 1}, "missing"),
        ({"num_hidden_layers": 2}, "not of this model"),
    ],
)
def test_a_config_of_another_model(copy_of, change, message):
    directory = copy_of("tiny_s_plain")
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | change))
    refused(directory, message)


def test_directories_that_are_no_model(tmp_path, copy_of):
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "holds no complete checkpoint")
    directory = copy_of("tiny_s_plain")
    (directory / "config.json").write_text("{")
    refused(directory, "config.json is not valid JSON")
    (directory / "config.json").unlink()
    refused(directory, "cannot read .*config.json")
    directory = copy_of("tiny_v2")
    (directory / "model.safetensors").unlink()
    refused(directory, "has neither model.safetensors.index.json nor model.safetensors")
    refused(MODELS / "tiny_s_plain", "which has no steps", step=3)
    refused(MODELS / "tiny_s_plain", "weights='fp8' is not known", weights="fp8")
    refused(MODELS / "tiny_s_plain", "dtype=.*int32.* is not supported: choose float32 or bfloat16", dtype=np.int32)
    refused(MODELS / "tiny_s_plain", "dtype=half is not supported", dtype="half")
    refused(MODELS / "tiny_s_plain", "mesh='expert=2' is no mesh", mesh="expert=2")
    refused(MODELS / "tiny_s_plain", "the mesh has the axes x: ", mesh=jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]))


def test_saving_is_refused_before_anything_is_written(tmp_path):
    model = dsv3_jax.load(MODELS / "tiny_s_plain")
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not an empty directory"):
        hub.save(model, tmp_path)
    with pytest.raises(UserError, match="precision='int8' is not known"):
        hub.save(model, tmp_path / "out", precision="int8")
    with pytest.raises(UserError, match="precision='int8' is not known"):
        hub.tensors(model.config, precision="int8")
    del model.params["moe_layers"]["mlp"]["experts"]["down_proj"]
    with pytest.raises(UserError, match="parameter moe_layers/mlp/experts/down_proj is missing"):
        hub.save(model, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "mine.txt"]


def test_tokens_outside_the_vocabulary_are_refused():
    model = dsv3_jax.load(MODELS / "tiny_s_plain")
    bad = [
        ([[0, 384]], "0..384: the vocabulary is 0..383"),
        ([1, 2], "give integers"),
        ([[0.5]], "give integers"),
        ([[1, 2], [3]], "not equally long"),
    ]
    for tokens, message in [*bad, (np.zeros((1, 0), int), "at least one row of 1"), (np.zeros((0, 4), int), "at least one row of 1")]:
        with pytest.raises(UserError, match=message):
            model(tokens)
    with pytest.raises(UserError, match="no MTP module"):
        model.mtp([[1, 2, 3]])
