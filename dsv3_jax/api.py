"""What a notebook uses: `model = dsv3_jax.load("runs/tiny")`, then call it, differentiate it, generate with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import hub
from dsv3_jax.checkpoint import open_run
from dsv3_jax.config import ModelConfig, OptimizerConfig, from_dict
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.model import Decoder
from dsv3_jax.model.decode_params import unstacked
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.parallel.sharding import param_shardings
from dsv3_jax.precision import BF16, FLOAT32, FP8, Recipe, fp8_axes, from_fp8, has_fp8, to_fp8
from dsv3_jax.serving import SamplingParams
from dsv3_jax.serving import generate as serve
from dsv3_jax.training.loss import loss_and_terms


class Model:
    """A model with its parameters.

    config: ModelConfig. params: pure nested dict of arrays (see dsv3_jax.model.decoder). tokenizer: Tokenizer or None.
    decoder: the functions of the parameters that everything here is made of. recipe: the numeric recipe they compute in.
    """

    def __init__(self, config: ModelConfig, params: dict, tokenizer: Tokenizer | None = None, *, recipe: Recipe = FLOAT32):
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.decoder = Decoder(config, recipe)
        self._logits = jax.jit(self.decoder.logits)
        self._mtp_logits = jax.jit(self._apply_mtp)

    def __call__(self, tokens_BS: Any) -> jax.Array:
        """Next-token logits float32 [B, S, W] of int tokens [B, S]."""
        return self._logits(self.params, self._checked(tokens_BS))

    def mtp(self, tokens_BS: Any) -> jax.Array:
        """Logits float32 [B, S-1, W] of the MTP module: entry i knows the tokens up to i+1 and predicts token i+2."""
        if not self.config.num_nextn_predict_layers:
            raise UserError("this model has no MTP module (num_nextn_predict_layers=0)")
        return self._mtp_logits(self.params, self._checked(tokens_BS, least=2))

    def apply(self, params: dict, tokens_BS: Any, *, positions: Any = None, segment_ids: Any = None) -> jax.Array:
        """Logits float32 [B, S, W] as a pure function of `params`. positions, segment_ids: int32 [B, S]; attention stays in a segment."""
        return self.decoder.logits(params, jnp.asarray(tokens_BS), positions, segment_ids)

    def loss(self, params: dict, batch: dict) -> tuple[jax.Array, dict]:
        """Cross entropy plus 0.3 of the MTP module's, as a pure function of `params`, and its terms.

        batch: {"tokens": int32 [B, S+1]}, optionally "segment_ids" and "positions" of that shape, "loss_mask" [B, S]. The terms, float32
        scalars before their weights, are those of `dsv3_jax.training.loss.loss_and_terms`; the balance loss is among them and not in the
        sum, since its weight belongs to a training run.
        """
        batch = {name: jnp.asarray(value) for name, value in batch.items()}
        return loss_and_terms(self.decoder, params, batch, mtp_loss_weight=OptimizerConfig.mtp_loss_weight, balance_loss_weight=0.0)

    def generate(
        self,
        prompts: str | Sequence,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: str | Sequence[str] | None = None,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> Any:
        """Continues prompts: one text, a list of texts, one list of token ids, or a list of such. New tokens come back, as the same kind.

        temperature 0 takes the likeliest token. top_k 0 keeps all. stop: texts that end an answer. See dsv3_jax.serving for an engine
        that stays alive between calls. Raises UserError for values that make no sense.
        """
        sampling = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Sequence) else stop or (),
            ignore_eos=ignore_eos,
        )
        return serve(self.decoder, self.params, self.tokenizer, prompts, sampling)

    def _apply_mtp(self, params, tokens_BS):
        hidden_BSD = self.decoder(params, tokens_BS[:, :-1]).hidden_BSD
        normed_BSD, _ = self.decoder.mtp(params, hidden_BSD, tokens_BS[:, 1:])
        return self.decoder.head(params, normed_BSD)

    def _checked(self, tokens_BS, least: int = 1) -> np.ndarray:
        """A gather clamps what lies outside the vocabulary in silence, so it is looked at before. least: tokens of a row."""
        try:
            tokens_BS = np.asarray(tokens_BS)
        except ValueError as error:  # of NumPy, for rows of several lengths
            raise UserError("the rows of tokens are not equally long: give integers [batch, sequence]") from error
        if tokens_BS.ndim != 2 or not np.issubdtype(tokens_BS.dtype, np.integer):
            raise UserError(f"tokens are {tokens_BS.dtype} {list(tokens_BS.shape)}: give integers [batch, sequence]")
        if not tokens_BS.shape[0] or tokens_BS.shape[1] < least:
            raise UserError(f"tokens are {list(tokens_BS.shape)}: give at least one row of {least}")
        if not 0 <= tokens_BS.min() <= tokens_BS.max() < self.config.vocab_size:
            raise UserError(f"tokens lie in {tokens_BS.min()}..{tokens_BS.max()}: the vocabulary is 0..{self.config.vocab_size - 1}")
        return tokens_BS.astype(np.int32)


def load(
    path: str | Path, *, step: int | None = None, mesh: Any = None, dtype: Any = None, weights: str = "stored", serving: bool = False
) -> Model:
    """A run folder (or a step's folder in it), or a Hugging Face directory with config.json and safetensors.

    step: of a run; the newest complete one by default.
    mesh: a jax Mesh; parameters are laid out on it as dsv3_jax.parallel.sharding says. None: the first device.
    dtype: float32 or bfloat16, of parameters and computation. None: parameters as stored; computation in float32 on a CPU and in what
        the checkpoint names elsewhere.
    weights: "stored" keeps FP8 weights in FP8 (Hopper multiplies in FP8, other devices dequantise at use), "dequantised" makes them
        `dtype` (float32 by default).
    serving: the layers of a Hugging Face checkpoint by themselves, as the engine wants them, so that little more memory is needed than its
        weights take. Such a model generates; its logits cannot be asked for.
    Raises UserError where the path holds no complete checkpoint that fits its own configuration.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder or a Hugging Face directory")
    if dtype is not None and dtype not in ("float32", "bfloat16", jnp.float32, jnp.bfloat16):  # names, scalar types and dtypes alike
        raise UserError(f"dtype={dtype} is not supported: choose float32 or bfloat16")
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
        raise UserError(f"mesh={mesh!r} is no mesh: give what dsv3_jax.parallel.mesh.make makes, for example, of 'expert=8'")
    if mesh is not None and not meshes.AXES_OF_ARRAYS.issuperset(mesh.axis_names):  # every device would hold everything
        raise UserError(
            f"the mesh has the axes {', '.join(mesh.axis_names)}: weights lie over those that dsv3_jax.parallel.mesh.make makes"
        )
    if weights not in ("stored", "dequantised"):
        raise UserError(f"weights={weights!r} is not known: choose 'stored' or 'dequantised'")
    if hub.is_checkpoint(path):
        if step is not None:
            raise UserError(f"{path} is a Hugging Face directory, which has no steps: leave step out")
        config, values = hub.config_json.read(path)
        options = {"shardings": shardings(config, mesh), "dtype": dtype, "weights": weights}
        params = unstacked(hub.loading.stream(path, **options)) if serving else hub.load(path, **options)[1]
        tokenizer, named = path, hub.config_json.named_dtype(values)
    else:
        saved = open_run(path, step)
        config = from_dict(ModelConfig, saved.config["model"])
        params = saved.params(dtype, shardings(config, mesh, fp8=has_fp8(saved.abstract())))
        if weights == "dequantised":
            params = from_fp8(params, dtype or jnp.float32)
        tokenizer, named = saved.directory.parent / "tokenizer", saved.config.get("precision")
    has_tokenizer = (tokenizer / "tokenizer.json").exists()
    in_float32 = jnp.dtype(dtype) == np.float32 if dtype is not None else named == "float32" or jax.default_backend() == "cpu"
    recipe = FLOAT32 if in_float32 else FP8 if has_fp8(params) and _on_hopper() else BF16
    return Model(config, params, Tokenizer.load(tokenizer) if has_tokenizer else None, recipe=recipe)


def _on_hopper() -> bool:
    return all(getattr(device, "compute_capability", None) == "9.0" for device in jax.local_devices())


def shardings(config: ModelConfig, mesh: Any, *, fp8: bool = False) -> Any:
    """How parameters lie on the mesh, those of weights in FP8 included; None without a mesh."""
    if mesh is None:
        return None
    decoder = Decoder(config)
    axes, shapes = decoder.logical_axes(), decoder.abstract_params()
    if fp8:
        axes, shapes = fp8_axes(axes), jax.eval_shape(to_fp8, shapes)
    found = param_shardings(axes, mesh)
    for (path, sharding), leaf in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(shapes), strict=True):
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            name, sizes = "/".join(key.key for key in path), ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
            raise UserError(f"{name} {list(leaf.shape)} does not divide over the mesh {sizes}: choose sizes that divide it") from error
    return found
