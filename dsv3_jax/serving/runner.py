"""Runs steps on the device, in a few compiled shapes: rows × width of a prefill, rows of a decode step, pages of the table.

A step is one to three programs that follow each other without a word from the host: `forward` (all layers, logits where they are wanted,
the likeliest tokens), `pick` where a request asks for other tokens or for log-probabilities, and with speculation `draft` (the MTP module).
The caches are donated: they are updated in place. A step starts from what the one before it has sampled on the device, so the host need not
have seen that, sends one array and reads one. On a mesh the rows of all ranks make one step (ranks.py).

A program is one CUDA graph, and a kernel of it that finds an array at another address than in the step before costs the host 1 us, or 20
if it is ours. So a decode step stays where the one before it was: what it leaves overwrites what that one left, which `_forward` is given
to donate, and its scratch memory lies behind everything else, as small arrays that come and go have a gap of their own (`_walls`).
"""

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.model import Decoder
from dsv3_jax.serving.cache import cache_shapes, pages_for
from dsv3_jax.serving.ranks import ONE_DEVICE, WHOLE, Ranks
from dsv3_jax.serving.request import Request
from dsv3_jax.serving.sampler import Asked, Rows, Sampled, greedy, sample
from dsv3_jax.serving.scheduler import Work, round_up

_BATCHES = (1, 8, 32, 64, 128, 256)
_DECODE_ROWS = 8  # at least, and of logits: for one row XLA casts the whole head to float32, and rows of padding cost next to nothing
_WIDTHS = (64, 256, 1024)
_TABLES = (4, 16, 64, 256, 1024)
_DRAFT = ("embed", "final_norm", "lm_head", "mtp")  # parameters that `draft` reads
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

    def prefill_batches(self, width: int) -> tuple[int, ...]:
        """Of rows so wide: up to as many as a step has tokens for, as what is rounded up is computed."""
        most = min(max(self.prefill_tokens // width, 1), self.batches[-1])
        return (*(batch for batch in self.batches if batch < most), most)


def _up_to(largest: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes up to the first that is at least `largest`, which stands for itself if none is."""
    return (*(size for size in sizes if size < largest), next((size for size in sizes if size >= largest), largest))


class Result(NamedTuple):
    """What a step gave: the row of each of its requests; outcome int32 [B, Q], the tokens sampled in each row, with N drafts a step
    [B, Q + 1 + N], how many of them count and the tokens drafted to follow those behind them; log-probabilities, if a request asked for
    some."""

    rows: list[int]
    outcome: jax.Array
    logprobs: Sampled | None


class _Batch(NamedTuple):
    """The requests of a step, their rows, and what it is told of them that stays while they go on. num_pages: pages of each request that
    the table has."""

    requests: list[Request]
    lives: list[int]
    rows: list[int]
    num_pages: list[int]
    inputs: "_Inputs"
    asked: Asked


class Runner:
    """Holds the parameters and the caches on the device.

    Args:
      decoder, params: the model; parameters as `Decoder.decode_params` gives them, where they are used (`Ranks.place`).
      shapes: of its programs.
      num_pages: pages of the pool, those of all ranks together.
      cache_dtype: of the pages; uint8 is the FP8 layout.
      speculate: tokens that the MTP module drafts a step.
      ranks: of the mesh.

    load_LE int32: how many tokens chose each expert of each MoE layer in all steps so far, modulo 2^32; of the next step's after it.
    """

    def __init__(
        self, decoder: Decoder, params: dict, shapes: Shapes, *, num_pages: int, cache_dtype, speculate: int, ranks: Ranks = ONE_DEVICE
    ):
        self.decoder, self.params, self.shapes, self.speculate, self.ranks = decoder, params, shapes, speculate, ranks
        self.read_params()
        self._pages_per_rank = num_pages // ranks.count
        arrays = cache_shapes(decoder.config, num_pages, cache_dtype, mtp=bool(speculate))
        self.caches = {name: ranks.full(array, ranks.pages) for name, array in arrays.items()}
        self.load_LE = ranks.full(jax.ShapeDtypeStruct((decoder.config.num_moe_layers, decoder.config.n_routed_experts), jnp.int32), WHOLE)
        self._left: tuple = ()  # of the last decode step, to be overwritten by the next one
        self._batch: _Batch | None = None  # of the last decode step
        # Of each row of the last step: token, how many counted, drafts. Not the shape of `load_LE`: donated, they might change places.
        self._last = ranks.full(jax.ShapeDtypeStruct((ranks.count * shapes.batches[-1], 2 + speculate), jnp.int32), WHOLE)
        self._row_of: dict[Request, int] = {}  # in the last step
        # XLA's allocator puts an array into the smallest gap that holds it.
        wall, _, other_wall = [ranks.full(jax.ShapeDtypeStruct((ranks.count * _GAP,), jnp.uint8), ranks.rows) for _ in range(3)]
        self._walls = wall, other_wall

    def run(self, work: Work, bias: dict[int, np.ndarray]) -> Result:
        """One step, started on the device: the result's arrays may still be in the making. bias: index of a request -> [W], added to its
        logits; a row with a bias does not speculate, as its next bias depends on the token that is drawn."""
        batch = self._arranged(work)
        inputs = self._inputs(work, batch)
        outcome, sampled = self._launch(
            inputs, chunk=work.chunk, asked=batch.asked, bias={batch.rows[index]: values for index, values in bias.items()}
        )
        self._row_of = dict(zip(work.requests, batch.rows))
        result = Result(batch.rows, outcome, sampled if batch.asked.logprobs else None)
        for array in jax.tree.leaves((result.outcome, result.logprobs)):
            array.copy_to_host_async()
        return result

    def compile(self) -> Iterator[tuple[int, int]]:
        """Compiles every shape and runs it once, on empty rows; yields (done, of how many): nothing is left to compile for greedy
        requests. The first request that draws, filters or wants log-probabilities adds a small program, `pick`."""
        shapes = self.shapes
        prefills = [(b, w, chunk) for w in shapes.widths for b in shapes.prefill_batches(w) for chunk in ("first", "later")]
        yield from self.compile_shapes(prefills + [(b, self.decode_width, None) for b in shapes.decode_batches])

    def compile_shapes(self, shapes: list[tuple[int, int, str | None]]) -> Iterator[tuple[int, int]]:
        """`compile` of those (rows of a rank, width, chunk). Programs of all layers are compiled side by side: the call that follows
        finds what was compiled of its lowering."""
        sizes = itertools.product(shapes, self.shapes.tables)
        steps = [(_Inputs.empty(b * self.ranks.count, w, table, prefill=bool(chunk)), chunk) for (b, w, chunk), table in sizes]
        with ThreadPoolExecutor(_COMPILERS) as pool:
            drafts, compiled = {}, []
            for inputs, chunk in steps:
                programs = [pool.submit(self._lower(inputs, chunk).compile)]
                if self.speculate:  # one for first and later chunks
                    key = inputs.packed.shape, inputs.form
                    drafts[key] = drafts.get(key) or pool.submit(self._lower_draft(inputs).compile)
                    programs.append(drafts[key])
                compiled.append(programs)
            for done, ((inputs, chunk), programs) in enumerate(zip(steps, compiled), 1):
                for program in programs:
                    program.result()
                jax.block_until_ready(self._launch(inputs, chunk=chunk, asked=Asked(), bias={}))
                yield done, len(steps)

    def _lower(self, inputs: "_Inputs", chunk: str | None):
        """`_forward` of such a step."""
        overwritten = () if chunk else self._overwritten(inputs)
        return _forward.lower(*self._operands(), self._put(inputs), self.load_LE, overwritten, form=inputs.form, chunk=chunk)

    def _lower_draft(self, inputs: "_Inputs"):
        """`_draft` of such a step."""
        rows, (width, queries) = len(inputs.packed), inputs.form
        shapes = inputs.packed.shape, (rows, width, self.decoder.config.hidden_size), (rows, queries)
        dtypes, sharding = (jnp.int32, self.decoder.recipe.compute_dtype, jnp.int32), self.ranks.sharding(self.ranks.rows)
        given = [jax.ShapeDtypeStruct(*of, sharding=sharding) for of in zip(shapes, dtypes)]
        return _draft.lower(*self._draft_operands(), *given, form=inputs.form)

    def read_params(self) -> None:
        """Call it where arrays of `params` were exchanged for others: a step takes the leaves as they were then; flattening costs time."""
        self._leaves, self._structure = jax.tree.flatten(self.params)

    @property
    def decode_width(self) -> int:
        """Tokens of a request in a decode step."""
        return 1 + self.speculate

    def _arranged(self, work: Work) -> _Batch:
        """A row for each request. In a decode step those of the last one stay where they were, and others take the rows that are free."""
        num_pages = [len(request.pages) for request in work.requests]
        table, batch = round_up(max(num_pages), self.shapes.tables), self._batch
        same = batch is not None and batch.inputs.table == table and (batch.requests, batch.lives) == (work.requests, work.lives)
        if work.prefill or not same:
            batch = self._new_batch(work, table)
        for row, request, before, now in zip(batch.rows, work.requests, batch.num_pages, num_pages):
            if now > before:
                batch.inputs.fields.page_table[row, before:now] = np.asarray(request.pages[before:]) % self._pages_per_rank
        batch.num_pages[:] = num_pages
        if not work.prefill:
            self._batch = batch
        return batch

    def _new_batch(self, work: Work, table: int) -> _Batch:
        most = max(Counter(request.rank for request in work.requests).values())
        width = round_up(max(work.counts), self.shapes.widths) if work.prefill else self.decode_width
        size = round_up(most, self.shapes.prefill_batches(width) if work.prefill else self.shapes.decode_batches)
        before, kept = self._batch, {}  # of requests that go on: row, and pages that its table has
        if not work.prefill and before and before.inputs.table == table and len(before.inputs.packed) == size * self.ranks.count:
            # What is left of others in a free row is read by nobody: its positions are those of padding.
            inputs = before.inputs
            known = zip(before.requests, before.lives, before.rows, before.num_pages)
            kept = {request: (row, pages) for request, lives, row, pages in known if request.lives == lives}
        else:
            inputs = _Inputs.empty(size * self.ranks.count, width, table, prefill=work.prefill)
        taken = {kept[request][0] for request in work.requests if request in kept}
        free = [(row for row in range(rank * size, (rank + 1) * size) if row not in taken) for rank in range(self.ranks.count)]
        places = [kept.get(request) or (next(free[request.rank]), 0) for request in work.requests]
        rows, num_pages = map(list, zip(*places))
        added = [(row, request) for row, request in zip(rows, work.requests) if request not in kept]
        if added:
            new_rows = [row for row, _ in added]
            inputs.fields.limits[new_rows] = [request.max_tokens for _, request in added]
            inputs.fields.sampling[new_rows] = Rows.of([request.params for _, request in added]).packed()
        return _Batch(work.requests, work.lives, rows, num_pages, inputs, Asked.of([request.params for request in work.requests]))

    def _inputs(self, work: Work, batch: _Batch) -> "_Inputs":
        """The step's host arrays: the batch's, which the device may still be reading for the step before, with this step's tokens."""
        inputs, rows, starts = batch.inputs.copy(), np.asarray(batch.rows), np.asarray(work.starts)
        fields = inputs.fields
        fields.lengths[rows] = starts + np.asarray(work.counts)
        if work.prefill:
            for row, request, count, start in zip(rows, work.requests, work.counts, work.starts):
                tokens = np.asarray(request.tokens[start : start + count + 1], np.int32)
                fields.tokens[row, :count], fields.next_tokens[row, : len(tokens) - 1] = tokens[:count], tokens[1:]
                fields.positions[row, :count] = np.arange(start, start + count)
                fields.last[row] = count - 1
            return inputs
        fields.positions[rows] = starts[:, None] + np.arange(self.decode_width)
        fields.source[rows] = [self._row_of[request] if ahead else -1 for request, ahead in zip(work.requests, work.ahead)]
        fields.tokens[rows, 0] = [request.tokens[start] for request, start in zip(work.requests, work.starts)]
        if self.speculate:
            fields.tokens[rows, 1:] = [request.drafts or [0] * self.speculate for request in work.requests]
        return inputs

    def _put(self, inputs: "_Inputs") -> jax.Array:
        return self.ranks.put(inputs.packed, self.ranks.rows)

    def _operands(self) -> tuple:
        """Of `_forward`, the first."""
        return self.decoder, self.ranks, self._structure, self._leaves, self.caches, self._last

    def _draft_operands(self) -> tuple:
        """Of `_draft`, the first."""
        params, cache = {name: self.params[name] for name in _DRAFT}, {"mtp": self.caches["mtp"]}
        return self.decoder, self.ranks, params, cache, self._last

    def _overwritten(self, inputs: "_Inputs") -> tuple:
        """Logits, hidden states and fed inputs of the last decode step, if this one is of its size, or arrays like them."""
        rows, (width, queries) = len(inputs.packed), inputs.form
        if self._left and self._left[2].shape == inputs.packed.shape:
            return self._left
        logits = jax.ShapeDtypeStruct((rows, queries, self.decoder.config.vocab_size), jnp.float32)
        hidden = jax.ShapeDtypeStruct((rows, width, self.decoder.config.hidden_size), self.decoder.recipe.compute_dtype)
        fed = jax.ShapeDtypeStruct(inputs.packed.shape, jnp.int32)
        return tuple(self.ranks.full(array, self.ranks.rows) for array in (logits, hidden, fed))

    def _launch(self, inputs: "_Inputs", *, chunk: str | None, asked: Asked, bias: dict[int, np.ndarray]) -> tuple[jax.Array, Sampled]:
        """The outcome of a step, and what was sampled. bias: by row."""
        form, ranks = inputs.form, self.ranks
        inputs.fields.may_accept[list(bias)] = 0
        (logits_BQW, hidden_BSD, fed), sampled, self.caches, self.load_LE, self._last = _forward(
            *self._operands(), self._put(inputs), self.load_LE, () if chunk else self._overwritten(inputs), form=form, chunk=chunk
        )
        if not chunk:
            self._left = logits_BQW, hidden_BSD, fed
        asked, bias_BQW = asked._replace(bias=bool(bias)), None
        if bias:
            bias_BQW = np.zeros((len(inputs.packed), 1, logits_BQW.shape[-1]), np.float32)
            for row, values in bias.items():
                bias_BQW[row, 0] = values
        if any(asked):
            sampled, self._last = _pick(ranks, self._last, logits_BQW, fed, bias_BQW, form=form, asked=asked)
        if not self.speculate:
            return sampled.tokens, sampled
        outcome, cache, self._last = _draft(*self._draft_operands(), fed, hidden_BSD, sampled.tokens, form=form)
        self.caches |= cache
        return outcome, sampled


class _Fields(NamedTuple):
    """What a step is told of its rows: tokens, positions (-1: padding), next_tokens [B, S] (-1: the one that is sampled now), last [B, Q]:
    the columns after which a token is sampled, sampling [B, 5]: `Rows.packed`, lengths [B], limits [B]: tokens a row may have, source [B]:
    the row of the step before whose last token this one starts with (-1: none does), may_accept [B]: 0 where the draft does not count,
    page_table [B, pages]."""

    tokens: jax.Array
    positions: jax.Array
    next_tokens: jax.Array
    last: jax.Array
    sampling: jax.Array
    lengths: jax.Array
    limits: jax.Array
    source: jax.Array
    may_accept: jax.Array
    page_table: jax.Array

    @classmethod
    def of(cls, packed, form: tuple[int, int]) -> "_Fields":
        """The columns of one array int32 [B, ...], for (S, Q) of `form`; views of it where it is NumPy's."""
        width, queries = form
        ends = list(itertools.accumulate((width, width, width, queries, len(Rows._fields))))
        wide = [packed[:, start:end] for start, end in zip([0, *ends], ends)]
        return cls(*wide, *(packed[:, ends[-1] + i] for i in range(4)), packed[:, ends[-1] + 4 :])


class _Inputs(NamedTuple):
    """Host arrays of a step: `_Fields` that are views of one array, which is sent as a whole. table: pages of the page table."""

    packed: np.ndarray
    form: tuple[int, int]
    fields: _Fields

    @classmethod
    def empty(cls, batch: int, width: int, table: int, *, prefill: bool) -> "_Inputs":
        form = width, 1 if prefill else width
        packed = np.zeros((batch, 3 * width + form[1] + len(Rows._fields) + 4 + table), np.int32)
        fields = _Fields.of(packed, form)
        for unset in (fields.positions, fields.next_tokens, fields.source):
            unset[:] = -1
        fields.may_accept[:] = 1
        if not prefill:
            fields.last[:] = np.arange(width)
        return cls(packed, form, fields)

    @property
    def table(self) -> int:
        return self.fields.page_table.shape[1]

    def copy(self) -> "_Inputs":
        packed = self.packed.copy()
        return _Inputs(packed, self.form, _Fields.of(packed, self.form))


def _feed(ranks, last, packed, form):
    """The step's fields with what the last step gave to the rows that go on from it, packed again. What is beyond a row's limit, as a step
    may be that was started before its row had ended, is written nowhere."""
    fields = _Fields.of(packed, form)
    token_B, count_B, *drafts_NB = last[fields.source].T
    goes_on_B = fields.source >= 0
    tokens_BS, positions_BS = fields.tokens, fields.positions
    for column, new_B in enumerate((token_B, *drafts_NB)[: form[1]]):
        tokens_BS = tokens_BS.at[:, column].set(jnp.where(goes_on_B, new_B, tokens_BS[:, column]))
    added_B = jnp.where(goes_on_B, count_B, 0)
    moved_BS = positions_BS + added_B[:, None]
    positions_BS = jnp.where((positions_BS >= 0) & (moved_BS < fields.limits[:, None]), moved_BS, -1)
    fields = fields._replace(tokens=tokens_BS, positions=positions_BS, lengths=fields.lengths + added_B)
    fed = jnp.concatenate([x if x.ndim == 2 else x[:, None] for x in fields], axis=1)
    # Held apart: the compiler would compute this again in each layer's kernels.
    return jax.lax.optimization_barrier(ranks.hold(fed, ranks.rows))


def _keep(ranks, last, tokens_BQ, counts_B=1, drafts_BN=None):
    """What the next step may go on from: `last` with the last of the tokens that count, how many do, and the drafts if there are any."""
    counts_B1 = jnp.broadcast_to(counts_B, len(tokens_BQ)).astype(jnp.int32)[:, None]
    kept = [jnp.take_along_axis(tokens_BQ, counts_B1 - 1, axis=1), counts_B1, *([] if drafts_BN is None else [drafts_BN])]
    kept = jnp.concatenate(kept, axis=1)
    return ranks.hold(last.at[: kept.shape[0], : kept.shape[1]].set(kept), WHOLE)


@functools.partial(
    jax.jit,
    static_argnames=("decoder", "ranks", "structure", "form", "chunk"),
    donate_argnames=("caches", "last", "load_LE", "overwritten"),
    keep_unused=True,  # `overwritten` only gives its place away
)
def _forward(decoder, ranks, structure, leaves, caches, last, packed, load_LE, overwritten, *, form, chunk):
    """(Logits [B, Q, W] after the columns `last`, hidden states of all columns, the inputs fed), the likeliest tokens, the new caches, the
    experts' loads with those of this step, and `_keep` of the tokens if there is one in a row."""
    params, fed = jax.tree.unflatten(structure, leaves), _feed(ranks, last, packed, form)

    def on_rank(params, caches, fields):
        where = fields.positions, caches, fields.page_table, fields.lengths
        hidden_BSD, caches, stats = decoder.decode(params, fields.tokens, *where, chunk=chunk)
        wanted_BQD = jnp.take_along_axis(hidden_BSD, fields.last[..., None], axis=1)
        return _logits(decoder, params, decoder.final_norm(params, wanted_BQD)), hidden_BSD, caches, ranks.total(stats.load_E)

    in_specs = (ranks.param_specs(params), ranks.pages, ranks.rows)
    run = ranks.run(on_rank, in_specs, (ranks.rows, ranks.rows, ranks.pages, WHOLE))
    logits_BQW, hidden_BSD, caches, more_LE = run(params, caches, _Fields.of(fed, form))
    load_LE = ranks.hold(load_LE + more_LE.astype(jnp.int32) if load_LE.size else load_LE, WHOLE)
    # The very logits that `_pick` reads, rounded as they are stored: a request that is greedy has one answer in any company.
    logits_BQW = jax.lax.optimization_barrier(logits_BQW)
    tokens_BQ = ranks.hold(greedy(logits_BQW), ranks.rows)
    if form[1] == 1:
        last = _keep(ranks, last, tokens_BQ)
    return (logits_BQW, hidden_BSD, fed), Sampled(tokens_BQ), caches, load_LE, last


@functools.partial(jax.jit, static_argnames=("ranks", "form", "asked"), donate_argnames="last")
def _pick(ranks, last, logits_BQW, fed, bias_BQW, *, form, asked):
    """Tokens as their rows ask for them, and `_keep` of them if there is one in a row."""
    fields = _Fields.of(fed, form)
    new_positions_BQ = jnp.take_along_axis(fields.positions, fields.last, axis=1) + 1
    sampled = sample(logits_BQW, Rows.unpacked(fields.sampling), new_positions_BQ, bias_BQW, asked=asked)
    return sampled, _keep(ranks, last, sampled.tokens) if form[1] == 1 else last


@functools.partial(jax.jit, static_argnames=("decoder", "ranks", "form"), donate_argnames=("caches", "last"))
def _draft(decoder, ranks, params, caches, last, fed, hidden_BSD, tokens_BQ, *, form):
    """[the tokens, how many of them count, those that the MTP module expects after these] in each row, the new cache, and `_keep` of it.

    In a decode step columns 1 and on hold the drafts of the step before: each was the right input if it is what the column before it
    samples now and all before it were right, and then the sample of its own column counts as well. As a draft is one token, not a
    distribution, this is exact for draws as it is for argmax (speculative sampling with a point mass: accepted with probability p(draft),
    and otherwise distributed as p without it).

    Drafts after the first take the module's own state in place of the model's. What these passes write into its pages lies behind what
    counts: the next step writes there again.
    """

    def on_rank(params, caches, fields, hidden_BSD, tokens_BQ):
        rows, last_BQ = jnp.arange(len(tokens_BQ)), fields.last
        right_BN = tokens_BQ[:, :-1] == fields.tokens[:, 1 : form[1]]
        accepted_B = fields.may_accept * jnp.sum(jnp.cumprod(right_BN, axis=1), axis=1, dtype=jnp.int32)
        sampled_BS = jnp.zeros_like(fields.tokens).at[rows[:, None], last_BQ].set(tokens_BQ)
        next_BS, positions_BS = jnp.where(fields.next_tokens < 0, sampled_BS, fields.next_tokens), fields.positions
        column_B, drafts = last_BQ[rows, accepted_B], []
        while len(drafts) < last.shape[1] - 2:
            where = positions_BS, caches, fields.page_table, column_B
            hidden_BSD, caches = decoder.decode_mtp(params, hidden_BSD, next_BS, *where, again=bool(drafts))
            drafts.append(greedy(_logits(decoder, params, hidden_BSD)))
            positions_B, next_BS, column_B = positions_BS[rows, column_B], drafts[-1], jnp.zeros_like(column_B)
            positions_BS = jnp.where((positions_B >= 0) & (positions_B + 1 < fields.limits), positions_B + 1, -1)[:, None]
        return jnp.concatenate(drafts, axis=1), 1 + accepted_B, caches

    in_specs = (ranks.param_specs(params), ranks.pages, *[ranks.rows] * 3)
    run = ranks.run(on_rank, in_specs, (ranks.rows, ranks.rows, ranks.pages))
    drafts_BN, counts_B, caches = run(params, caches, _Fields.of(fed, form), hidden_BSD, tokens_BQ)
    outcome = ranks.hold(jnp.concatenate([tokens_BQ, counts_B[:, None], drafts_BN], axis=1), ranks.rows)
    return outcome, caches, _keep(ranks, last, tokens_BQ, counts_B, drafts_BN)


def _logits(decoder, params, normed_BQD):
    """The head, of `_DECODE_ROWS` rows at least."""
    rows = len(normed_BQD)
    return decoder.head(params, jnp.pad(normed_BQD, ((0, max(_DECODE_ROWS - rows, 0)), (0, 0), (0, 0))))[:rows]
