"""Runs steps on the device, in a few compiled shapes: rows × width of a prefill, rows of a decode step, pages of the table.

A step is a few programs that follow each other without a word from the host: `forward` (all layers, logits where they are wanted),
`sample`, and with speculation `draft` (the MTP module). The caches are donated: they are updated in place. A step starts from what the one
before it has sampled on the device, so the host need not have seen that, and sends one array. On a mesh the rows of all ranks make one
step (ranks.py).

A program is one CUDA graph, and a kernel of it that finds an array at another address than in the step before costs the host 1 us, or 20
if it is ours. So a decode step stays where the one before it was: what it leaves overwrites what that one left, which `_forward` is given
to donate, and its scratch memory lies behind everything else, as small arrays that come and go have a gap of their own (`_walls`).
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.model import Decoder
from dsv3_jax.serving.cache import cache_shapes, pages_for
from dsv3_jax.serving.ranks import ONE_DEVICE, WHOLE, Ranks
from dsv3_jax.serving.request import Request, SamplingParams
from dsv3_jax.serving.sampler import Rows, Sampled, sample
from dsv3_jax.serving.scheduler import Work, round_up

_BATCHES = (1, 8, 32, 64, 128, 256)
_DECODE_ROWS = 8  # at least, and of logits: for one row XLA casts the whole head to float32, and rows of padding cost next to nothing
_WIDTHS = (64, 256, 1024)
_TABLES = (4, 16, 64, 256, 1024)
_NO_REQUEST = SamplingParams(temperature=0)
_GAP = 8 * 2**20  # bytes: more than all small arrays of two steps
_COMPILERS = 8  # programs that are compiled at once, each by several threads


class Shapes(NamedTuple):
    """The compiled shapes, ascending: rows of a step, width of a prefill row, pages of the table; tokens of a prefill step. Rows and
    tokens are those of one rank."""

    batches: tuple[int, ...]
    widths: tuple[int, ...]
    tables: tuple[int, ...]
    prefill_tokens: int

    @classmethod
    def of(cls, *, max_batch: int, max_length: int, prefill_tokens: int) -> "Shapes":
        """Batches and tables are rounded up to common sizes, so that engines of similar size share programs."""
        longest = min(prefill_tokens, max_length)
        widths = (*(size for size in _WIDTHS if size < longest), longest)
        tables = _up_to(pages_for(max_length), _TABLES)
        if jax.default_backend() == "gpu":
            tables = tables[-1:]  # the kernel reads the pages that a sequence has; the reference reads all of the table
        return cls(_up_to(max(max_batch, _DECODE_ROWS), _BATCHES), widths, tables, prefill_tokens)

    @property
    def decode_batches(self) -> tuple[int, ...]:
        return tuple(batch for batch in self.batches if batch >= _DECODE_ROWS)


def _up_to(largest: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes up to the first that is at least `largest`, which stands for itself if none is."""
    return (*(size for size in sizes if size < largest), next((size for size in sizes if size >= largest), largest))


class Result(NamedTuple):
    """What a step gave: the row of each of its requests, sampled tokens [B, Q] (Q = 2 with speculation, 1 otherwise), with speculation
    how many of them count [B] and the tokens drafted to follow them [B]."""

    rows: list[int]
    sampled: Sampled
    counts: jax.Array | None
    drafts: jax.Array | None


class Runner:
    """Holds the parameters and the caches on the device.

    Args:
      decoder, params: the model; parameters as `Decoder.decode_params` gives them, where they are used (`Ranks.place`).
      shapes: of its programs.
      num_pages: pages of the pool, those of all ranks together.
      cache_dtype: of the pages; uint8 is the FP8 layout.
      speculate: draft one token a step with the MTP module.
      ranks: of the mesh.

    load_LE int32: how many tokens chose each expert of each MoE layer in all steps so far, modulo 2^32; of the next step's after it.
    """

    def __init__(
        self, decoder: Decoder, params: dict, shapes: Shapes, *, num_pages: int, cache_dtype, speculate: bool, ranks: Ranks = ONE_DEVICE
    ):
        self.decoder, self.params, self.shapes, self.speculate, self.ranks = decoder, params, shapes, speculate, ranks
        self._pages_per_rank = num_pages // ranks.count
        arrays = cache_shapes(decoder.config, num_pages, cache_dtype, mtp=speculate)
        self.caches = {name: ranks.full(array, ranks.pages) for name, array in arrays.items()}
        self.load_LE = ranks.full(jax.ShapeDtypeStruct((decoder.config.num_moe_layers, decoder.config.n_routed_experts), jnp.int32), WHOLE)
        self._left: tuple = ()  # of the last decode step, to be overwritten by the next one
        # Of each row of the last step: token, how many counted, draft.
        self._last = ranks.full(jax.ShapeDtypeStruct((3, ranks.count * shapes.batches[-1]), jnp.int32), WHOLE)
        self._row_of: dict[Request, int] = {}  # in the last step
        # XLA's allocator puts an array into the smallest gap that holds it.
        wall, _, other_wall = [ranks.full(jax.ShapeDtypeStruct((ranks.count * _GAP,), jnp.uint8), ranks.rows) for _ in range(3)]
        self._walls = wall, other_wall

    def run(self, work: Work, bias: dict[int, np.ndarray]) -> Result:
        """One step, started on the device: the result's arrays may still be in the making. bias: index of a request -> [W], added to its
        logits; a row with a bias does not speculate, as its next bias depends on the token that is drawn."""
        rows, inputs = self._inputs(work)
        logprobs = any(request.params.logprobs is not None for request in work.requests)
        bias = {rows[index]: values for index, values in bias.items()}
        result = Result(rows, *self._launch(inputs, logprobs=logprobs, chunk=work.chunk, bias=bias))
        self._row_of = dict(zip(work.requests, rows))
        for array in jax.tree.leaves((result.sampled, result.counts, result.drafts)):
            array.copy_to_host_async()
        return result

    def compile(self) -> Iterator[tuple[int, int]]:
        """Compiles every shape and runs it once, on empty rows; yields (done, of how many): nothing is left to compile for greedy
        requests. The first request that draws, filters or wants log-probabilities adds a small sampling program."""
        batches, widths, _, prefill_tokens = self.shapes
        rows = {w: round_up(min(max(prefill_tokens // w, 1), batches[-1]), batches) for w in widths}
        prefills = [(b, w, chunk) for w in widths for b in batches if b <= rows[w] for chunk in ("first", "later")]
        yield from self.compile_shapes(prefills + [(b, self.decode_width, None) for b in self.shapes.decode_batches])

    def compile_shapes(self, shapes: list[tuple[int, int, str | None]]) -> Iterator[tuple[int, int]]:
        """`compile` of those (rows of a rank, width, chunk). Programs of all layers are compiled side by side: the call that follows
        finds what was compiled of its lowering."""
        sizes = itertools.product(shapes, self.shapes.tables)
        steps = [(_Inputs.empty(b * self.ranks.count, w, table, prefill=bool(chunk)), chunk) for (b, w, chunk), table in sizes]
        with ThreadPoolExecutor(_COMPILERS) as pool:
            lowered = (self._lower(inputs, chunk) for inputs, chunk in steps)
            compiled = [pool.submit(program.compile) for program in lowered]
            for done, ((inputs, chunk), program) in enumerate(zip(steps, compiled), 1):
                program.result()
                jax.block_until_ready(self._launch(inputs, logprobs=False, chunk=chunk, bias={}))
                yield done, len(steps)

    def _lower(self, inputs: "_Inputs", chunk: str | None):
        """`_forward` of such a step."""
        packed, form = self._put(inputs), inputs.form
        overwritten = self._overwritten(len(packed), form, chunk)
        return _forward.lower(*self._operands(packed), self.load_LE, overwritten, form=form, chunk=chunk)

    @property
    def decode_width(self) -> int:
        """Tokens of a request in a decode step."""
        return 2 if self.speculate else 1

    def _inputs(self, work: Work) -> tuple[list[int], "_Inputs"]:
        """The row of each request, and host arrays of a step; the rows of a rank are filled from the left."""
        width = round_up(max(work.counts), self.shapes.widths) if work.prefill else self.decode_width
        table = round_up(max(len(request.pages) for request in work.requests), self.shapes.tables)
        used, places = [0] * self.ranks.count, []
        for request in work.requests:
            places.append((request.rank, used[request.rank]))
            used[request.rank] += 1
        batch = round_up(max(used), self.shapes.batches if work.prefill else self.shapes.decode_batches)
        rows = [rank * batch + place for rank, place in places]
        params = [_NO_REQUEST] * (batch * self.ranks.count)
        for row, request in zip(rows, work.requests):
            params[row] = request.params
        inputs = _Inputs.empty(len(params), width, table, prefill=work.prefill, params=params)
        fields = inputs.fields
        fields.limits[rows] = [request.max_tokens for request in work.requests]
        fields.source[rows] = [self._row_of[request] if ahead else -1 for request, ahead in zip(work.requests, work.ahead)]
        fields.lengths[rows] = np.add(work.starts, work.counts)
        for row, request in zip(rows, work.requests):
            fields.page_table[row, : len(request.pages)] = request.pages
        if self.ranks.count > 1:
            fields.page_table[:] %= self._pages_per_rank
        if work.prefill:
            for row, request, count, start in zip(rows, work.requests, work.counts, work.starts):
                tokens = np.asarray(request.tokens[start : start + count + 1], np.int32)
                fields.tokens[row, :count], fields.next_tokens[row, : len(tokens) - 1] = tokens[:count], tokens[1:]
                fields.positions[row, :count] = np.arange(start, start + count)
                fields.last[row] = count - 1
        else:
            fields.tokens[rows, 0] = [request.tokens[start] for request, start in zip(work.requests, work.starts)]
            fields.tokens[rows, 1:] = [[request.draft or 0] * (width - 1) for request in work.requests]
            fields.positions[rows] = np.add.outer(work.starts, np.arange(width))
        return rows, inputs

    def _put(self, inputs: "_Inputs") -> jax.Array:
        return self.ranks.put(inputs.packed, self.ranks.rows)

    def _operands(self, packed: jax.Array) -> tuple:
        """Of `_forward`."""
        return self.decoder, self.ranks, self.params, self.caches, self._last, packed

    def _overwritten(self, rows: int, form: tuple[int, int], chunk: str | None) -> tuple:
        """Logits, hidden states and positions of the last decode step, if this one has as many rows, or arrays like them."""
        if chunk or (self._left and len(self._left[0]) == rows):
            return () if chunk else self._left
        config, (width, queries) = self.decoder.config, form
        logits = jax.ShapeDtypeStruct((rows, queries, config.vocab_size), jnp.float32)
        hidden = jax.ShapeDtypeStruct((rows, width, config.hidden_size), self.decoder.recipe.compute_dtype)
        positions = jax.ShapeDtypeStruct((rows, queries), jnp.int32)
        return tuple(self.ranks.full(array, self.ranks.rows) for array in (logits, hidden, positions))

    def _launch(self, inputs: "_Inputs", *, logprobs: bool, chunk: str | None, bias: dict[int, np.ndarray]) -> tuple:
        """`Result` without its rows, for inputs that have them. bias: by row."""
        packed, form = self._put(inputs), inputs.form
        overwritten = self._overwritten(len(packed), form, chunk)
        logits_BQW, hidden_BSD, self.caches, self.load_LE, new_positions_BQ = _forward(
            *self._operands(packed), self.load_LE, overwritten, form=form, chunk=chunk
        )
        if not chunk:
            self._left = logits_BQW, hidden_BSD, new_positions_BQ
        bias_BQW = np.zeros((*inputs.fields.lengths.shape, 1, logits_BQW.shape[-1]), np.float32) if bias else None
        for row, values in bias.items():
            bias_BQW[row, 0] = values
        sampled = sample(logits_BQW, inputs.rows, new_positions_BQ, logprobs=logprobs, bias_BQW=bias_BQW)
        drafts_B = counts_B = None
        if self.speculate:
            may_accept = np.ones(len(inputs.fields.lengths), bool)
            may_accept[list(bias)] = False
            of_step = hidden_BSD, sampled.tokens, may_accept
            drafts_B, counts_B, self.caches, self._last = _draft(*self._operands(packed), *of_step, form=form, chunk=chunk)
        else:
            self._last = _keep(self.ranks, self._last, sampled.tokens)
        return sampled, counts_B, drafts_B


class _Fields(NamedTuple):
    """What a step is told of its rows: tokens, positions (-1: padding), next_tokens [B, S] (-1: the one that is sampled now), last [B, Q]:
    the columns after which a token is sampled, lengths [B], limits [B]: tokens a row may have, source [B]: the row of the step before
    whose last token this one starts with (-1: none does), page_table [B, pages]."""

    tokens: jax.Array
    positions: jax.Array
    next_tokens: jax.Array
    last: jax.Array
    lengths: jax.Array
    limits: jax.Array
    source: jax.Array
    page_table: jax.Array

    @classmethod
    def of(cls, packed, form: tuple[int, int]) -> "_Fields":
        """The columns of one array int32 [B, ...], for (S, Q) of `form`; views of it where it is NumPy's."""
        width, queries = form
        first = 3 * width + queries
        wide = packed[:, :width], packed[:, width : 2 * width], packed[:, 2 * width : 3 * width], packed[:, 3 * width : first]
        return cls(*wide, packed[:, first], packed[:, first + 1], packed[:, first + 2], packed[:, first + 3 :])


class _Inputs(NamedTuple):
    """Host arrays of a step: `_Fields` that are views of one array, which is sent as a whole, and the sampling parameters."""

    packed: np.ndarray
    form: tuple[int, int]
    fields: _Fields
    rows: Rows

    @classmethod
    def empty(cls, batch: int, width: int, table: int, *, prefill: bool, params: Sequence[SamplingParams] = ()) -> "_Inputs":
        form = width, 1 if prefill else width
        packed = np.zeros((batch, 3 * width + form[1] + 3 + table), np.int32)
        fields = _Fields.of(packed, form)
        for unset in (fields.positions, fields.next_tokens, fields.source):
            unset[:] = -1
        if not prefill:
            fields.last[:] = np.arange(width)
        return cls(packed, form, fields, Rows.of(list(params), batch))


def _feed(ranks, last, packed, form):
    """The step's fields, with what the last step gave to the rows that go on from it, and where the new tokens will stand [B, Q]. What is
    beyond a row's limit, as a step may be that was started before its row had ended, is written nowhere."""
    fields = _Fields.of(packed, form)
    token_B, count_B, draft_B = last[:, fields.source]
    goes_on_B = fields.source >= 0
    tokens_BS, positions_BS = fields.tokens, fields.positions
    tokens_BS = tokens_BS.at[:, 0].set(jnp.where(goes_on_B, token_B, tokens_BS[:, 0]))
    if tokens_BS.shape[1] > 1:
        tokens_BS = tokens_BS.at[:, 1].set(jnp.where(goes_on_B, draft_B, tokens_BS[:, 1]))
    added_B = jnp.where(goes_on_B, count_B, 0)
    moved_BS = positions_BS + added_B[:, None]
    positions_BS = jnp.where((positions_BS >= 0) & (moved_BS < fields.limits[:, None]), moved_BS, -1)
    fields = fields._replace(tokens=tokens_BS, positions=positions_BS, lengths=fields.lengths + added_B)
    new_positions_BQ = jnp.take_along_axis(moved_BS, fields.last, axis=1) + 1
    # Held apart: the compiler would compute this again in each layer's kernels.
    return jax.lax.optimization_barrier(ranks.hold((fields, new_positions_BQ), ranks.rows))


@functools.partial(jax.jit, static_argnames="ranks", donate_argnames="last")
def _keep(ranks, last, sampled_BQ, counts_B=1, drafts_B=0):
    """What the next step may go on from."""
    size = sampled_BQ.shape[0]
    counts_B, drafts_B = (jnp.broadcast_to(x, size).astype(jnp.int32) for x in (counts_B, drafts_B))
    tokens_B = jnp.take_along_axis(sampled_BQ, counts_B[:, None] - 1, axis=1)[:, 0]
    return ranks.hold(last.at[:, :size].set(jnp.stack([tokens_B, counts_B, drafts_B])), WHOLE)


@functools.partial(
    jax.jit,
    static_argnames=("decoder", "ranks", "form", "chunk"),
    donate_argnames=("caches", "load_LE", "overwritten"),
    keep_unused=True,  # `overwritten` only gives its place away
)
def _forward(decoder, ranks, params, caches, last, packed, load_LE, overwritten, *, form, chunk):
    """Logits [B, Q, W] after the columns `last`, hidden states of all columns, the new caches, the experts' loads with those of this step,
    and where the new tokens will stand [B, Q]."""
    fields, new_positions_BQ = _feed(ranks, last, packed, form)

    def on_rank(params, caches, fields):
        where = fields.positions, caches, fields.page_table, fields.lengths
        hidden_BSD, caches, stats = decoder.decode(params, fields.tokens, *where, chunk=chunk)
        wanted_BQD = jnp.take_along_axis(hidden_BSD, fields.last[..., None], axis=1)
        return _logits(decoder, params, decoder.final_norm(params, wanted_BQD)), hidden_BSD, caches, ranks.total(stats.load_E)

    in_specs = (ranks.param_specs(params), ranks.pages, ranks.rows)
    run = ranks.run(on_rank, in_specs, (ranks.rows, ranks.rows, ranks.pages, WHOLE))
    logits_BQW, hidden_BSD, caches, more_LE = run(params, caches, fields)
    load_LE = ranks.hold(load_LE + more_LE.astype(jnp.int32) if load_LE.size else load_LE, WHOLE)
    return logits_BQW, hidden_BSD, caches, load_LE, new_positions_BQ


@functools.partial(jax.jit, static_argnames=("decoder", "ranks", "form", "chunk"), donate_argnames=("caches", "last"))
def _draft(decoder, ranks, params, caches, last, packed, hidden_BSD, sampled_BQ, may_accept_B, *, form, chunk):
    """The token that the MTP module expects after those that were sampled, how many of them count, the new caches, and `_keep` of it.

    In a decode step column 1 holds the draft of the step before: it was the right input if it is what column 0 samples now, and then
    the sample of column 1 counts as well. As the draft is one token, not a distribution, this is exact for draws as it is for argmax
    (speculative sampling with a point mass: accepted with probability p(draft), and otherwise distributed as p without it).
    """

    def on_rank(params, caches, fields, hidden_BSD, sampled_BQ, may_accept_B):
        rows, last_BQ = jnp.arange(len(sampled_BQ)), fields.last
        accepted_B = jnp.zeros(len(sampled_BQ), bool)
        if last_BQ.shape[1] == 2:
            accepted_B = may_accept_B & (sampled_BQ[:, 0] == fields.tokens[:, 1])
        sampled_BS = jnp.zeros_like(fields.tokens).at[rows[:, None], last_BQ].set(sampled_BQ)
        next_BS = jnp.where(fields.next_tokens < 0, sampled_BS, fields.next_tokens)
        where = fields.positions, caches, fields.page_table, fields.lengths
        normed_BSD, caches = decoder.decode_mtp(params, hidden_BSD, next_BS, *where, chunk=chunk)
        normed_BD = normed_BSD[rows, last_BQ[rows, accepted_B.astype(jnp.int32)]]
        drafts_B = jnp.argmax(_logits(decoder, params, normed_BD[:, None])[:, 0], axis=-1).astype(jnp.int32)
        return drafts_B, 1 + accepted_B.astype(jnp.int32), caches

    in_specs = (ranks.param_specs(params), ranks.pages, *[ranks.rows] * 4)
    run = ranks.run(on_rank, in_specs, (ranks.rows, ranks.rows, ranks.pages))
    drafts_B, counts_B, caches = run(params, caches, _feed(ranks, last, packed, form)[0], hidden_BSD, sampled_BQ, may_accept_B)
    return drafts_B, counts_B, caches, _keep(ranks, last, sampled_BQ, counts_B, drafts_B)


def _logits(decoder, params, normed_BQD):
    """The head, of `_DECODE_ROWS` rows at least."""
    rows = len(normed_BQD)
    return decoder.head(params, jnp.pad(normed_BQD, ((0, max(_DECODE_ROWS - rows, 0)), (0, 0), (0, 0))))[:rows]
