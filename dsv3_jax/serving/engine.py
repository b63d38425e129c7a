"""The engine: requests in, tokens and text out. `add` requests and call `step` while `has_work`; `generate` does both.

engine = Engine(decoder, params, tokenizer=tokenizer)
engine.generate(["def main("], SamplingParams(max_new_tokens=32, temperature=0))
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.errors import UserError
from dsv3_jax.model import Decoder
from dsv3_jax.serving.balance import Balancer
from dsv3_jax.serving.cache import PAGE_SIZE, HostTier, PagePool, memory_for_cache, pages_within
from dsv3_jax.serving.host import HostPages
from dsv3_jax.serving.ranks import Ranks
from dsv3_jax.serving.request import Completion, InvalidParameter, Output, Request, SamplingParams, TokenLogprob, derive_seed
from dsv3_jax.serving.runner import Result, Runner, Shapes
from dsv3_jax.serving.sampler import Sampled
from dsv3_jax.serving.scheduler import Scheduler, Work
from dsv3_jax.serving.shaping import Grammars, Shaper, is_shaped
from dsv3_jax.serving.text import TextStream

_CPU_CACHE = 2**30  # bytes at most, where nobody says how many
_MOST_DRAFTS = 3  # a step: attention in decode steps is made, and tested, for four tokens of a request


@dataclasses.dataclass
class Stats:
    """Totals since the engine was made. drafted, accepted: tokens; accepted_at: by their place among the drafts of a step."""

    prompt_tokens: int = 0  # computed: prefix hits are not counted, what is computed again after a preemption is
    generated_tokens: int = 0
    drafted: int = 0
    accepted_at: list[int] = dataclasses.field(default_factory=list)

    @property
    def accepted(self) -> int:
        return sum(self.accepted_at)

    @property
    def acceptance(self) -> list[float]:
        """Of the drafts at each place of a step the part that was accepted: a second one only counts behind a first that was right."""
        return [accepted * len(self.accepted_at) / max(self.drafted, 1) for accepted in self.accepted_at]


class Engine:
    """Continuous batching over a paged latent cache.

    Args:
      decoder, params: the model; arrays where they shall be used. consume: the layers' parameters are deleted as the engine makes
        its own form of them (`Decoder.decode_params`), so that they are not held twice.
      tokenizer: for text prompts, answers as text, and stop texts.
      max_batch: requests that decode at once.
      max_length: tokens of a request, prompt and answer; default what the model's positions allow.
      num_pages: size of the cache in pages of 64 tokens; default what max_batch requests of max_length can use, within free memory.
      mesh: a jax Mesh with the axes data and expert. Every device then has an equal part of the rows and of the pages, and experts are
        spread over `expert`.
      redundant_experts, rebalance_steps: copies of experts beyond one of each, and how often they change place (see serving.balance;
        0: never).
      host_pages: pages of host memory for what the cache has no room for any more.
      prefill_tokens: tokens of a prefill step, on each device; longer prompts are cut into such chunks.
      fp8_cache: keep latents in FlashMLA's FP8 layout (656 bytes a token and layer).
      speculate: tokens to draft a step with the model's MTP module, 3 at most (0: none). The answers are the same with and without.

    Raises UserError where these do not fit the model or the memory.
    """

    def __init__(
        self,
        decoder: Decoder,
        params: dict,
        *,
        tokenizer=None,
        max_batch: int = 64,
        max_length: int | None = None,
        num_pages: int | None = None,
        mesh: Mesh | None = None,
        redundant_experts: int = 0,
        rebalance_steps: int = 0,
        host_pages: int = 0,
        prefill_tokens: int = 1024,
        fp8_cache: bool = False,
        speculate: int = 0,
        consume: bool = False,
    ):
        config, ranks = decoder.config, Ranks.of(mesh)
        sizes = {"max_batch": max_batch, "max_length": max_length, "prefill_tokens": prefill_tokens, "num_pages": num_pages}
        least = {"num_pages": ranks.count}  # one for each device
        for name, value in sizes.items():
            if value is not None and value < least.get(name, 1):
                raise UserError(f"{name} is {value}: it must be at least {least.get(name, 1)}")
        check_drafts(speculate)
        if speculate and not config.num_nextn_predict_layers:
            raise UserError("this model has no MTP module (num_nextn_predict_layers=0): run it without speculation")
        if (max_length := max_length or config.max_position_embeddings) > config.max_position_embeddings:
            raise UserError(f"max_length is {max_length}: this model has positions for {config.max_position_embeddings} tokens")
        params = ranks.place(ranks.decode_params(decoder, params, consume=consume))
        self.balancer = None
        if redundant_experts or rebalance_steps:  # before the cache is sized: copies of experts take memory
            self.balancer = Balancer(config, params, ranks, redundant=redundant_experts, interval=rebalance_steps)
        dtype = jnp.uint8 if fp8_cache else decoder.recipe.compute_dtype
        shapes = Shapes.of(max_batch=-(-max_batch // ranks.count), max_length=max_length, prefill_tokens=prefill_tokens)
        free = memory_for_cache(ranks.devices, _scratch(decoder, ranks, prefill_tokens))
        fitting = ranks.count * pages_within(_CPU_CACHE // ranks.count if free is None else free, config, dtype, mtp=bool(speculate))
        if fitting < ranks.count:
            raise UserError("no memory is left for the latent cache: use a device with more, or a smaller model")
        if num_pages is None:
            num_pages = min(fitting, ranks.count * shapes.batches[-1] * shapes.tables[-1])
        elif free is not None and num_pages > fitting:
            raise UserError(f"no memory for a cache of {num_pages * PAGE_SIZE} tokens: {fitting * PAGE_SIZE} fit beside the weights")
        num_pages -= num_pages % ranks.count
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length
        self.runner = Runner(
            ranks.decoder(decoder), params, shapes, num_pages=num_pages, cache_dtype=dtype, speculate=speculate, ranks=ranks
        )
        self.pool = PagePool(num_pages, ranks.count, HostTier(host_pages) if host_pages else None)
        self.host = HostPages(self.runner.caches, host_pages, ranks) if host_pages else None
        self.scheduler = Scheduler(
            self.pool,
            max_batch=max_batch,
            max_length=max_length,
            prefill_tokens=prefill_tokens,
            prefill_widths=shapes.widths,
            lookahead=self.runner.decode_width,
        )
        self.stats = Stats(accepted_at=[0] * speculate)
        self._eos = {config.eos_token_id} | ({tokenizer.eos_id} if tokenizer else set())
        self._running: tuple[Work, Result] | None = None  # the step on the device

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """`encode` for this model."""
        return encode(prompt, self.tokenizer, self.config.vocab_size)

    def prepare(self, request: Request) -> None:
        """Checks a request and makes what its answer needs, beside the engine's work: any thread may call it before `add`.

        Raises UserError for a request that can never run.
        """
        params, vocab_size = request.params, self.config.vocab_size
        if self.tokenizer is None and (params.stop or params.json_schema is not None):
            raise UserError("stop texts and JSON schemas need a tokenizer, and this model has none")
        if any(not 0 <= token < vocab_size for token, _ in params.logit_bias):
            raise InvalidParameter(f"logit_bias has token ids outside the vocabulary 0..{vocab_size - 1}", "logit_bias")
        self.scheduler.check(request)
        if self.tokenizer is not None:
            request.text = TextStream(self.tokenizer, params.stop)
        if is_shaped(params):
            matcher = None if params.json_schema is None else self._grammars.matcher(params.json_schema)
            request.shaper = Shaper(params, vocab_size, matcher)
        request.is_prepared = True

    def add(self, request: Request) -> None:
        """Queues a request; raises as `prepare`."""
        if not request.is_prepared:
            self.prepare(request)
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Drops a request and frees its pages; it has no further output."""
        if request.finish_reason is None:
            self.scheduler.finish(request, "abort")

    def compile(self) -> Iterator[tuple[int, int]]:
        """Compiles every shape before the first request; yields (done, of how many)."""
        yield from self.runner.compile()
        if self.host:
            self.runner.caches = self.host.compile(self.runner.caches)

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running or self._running)

    def step(self) -> list[Output]:
        """Starts the next step and returns the output of the one before: the device need not wait for what the host does with it."""
        work, before = self.scheduler.schedule(), self._running
        if self.pool.transfers:
            self.runner.caches = self.host.run(self.runner.caches, self.pool.transfers)
            self.pool.transfers = []
        self._running = (work, self.runner.run(work, self._bias(work))) if work else None
        if work and self.balancer and self.balancer.after_step(self.runner.load_LE):
            self.runner.read_params()
        return self._collect(*before) if before else []

    def generate(self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams]) -> list[Completion]:
        """The answers, in the order of the prompts. With one `params` for all, each prompt draws from a seed of its own."""
        if isinstance(params, SamplingParams):
            params = [dataclasses.replace(params, seed=derive_seed(params.seed, index)) for index in range(len(prompts))]
        requests = [Request(self.encode(prompt), p) for prompt, p in zip(prompts, params, strict=True)]
        for request in requests:
            self.prepare(request)
        for request in requests:
            self.add(request)
        completions = {request: Completion(request) for request in requests}
        while self.has_work:
            for output in self.step():
                completions[output.request].extend(output)
        return list(completions.values())

    def _bias(self, work: Work) -> dict[int, np.ndarray]:
        return {index: request.shaper.bias(request) for index, request in enumerate(work.requests) if request.shaper}

    def _collect(self, work: Work, result: Result) -> list[Output]:
        """Waits for the step and puts its tokens to the requests; those that end give their pages back."""
        rows, logprobs = np.asarray(result.outcome).tolist(), jax.tree.map(np.asarray, result.logprobs)
        stats, eos, num_drafts, outputs = self.stats, self._eos, self.runner.speculate, []
        for index, request, count in self.scheduler.landed(work):
            row = result.rows[index]
            tokens = rows[row]
            if num_drafts:
                *tokens, counted = tokens[:-num_drafts]
                tokens, request.drafts = tokens[:counted], rows[row][-num_drafts:]
            if work.prefill:
                stats.prompt_tokens += count
                if request.num_cached + count < len(request.tokens):
                    self.scheduler.cached(request, request.num_cached + count)
                    continue
            elif num_drafts:
                stats.drafted += num_drafts
                for place in range(counted - 1):
                    stats.accepted_at[place] += 1
            reason = None
            if request.shaper is None and len(request.tokens) + len(tokens) < request.max_tokens and eos.isdisjoint(tokens):
                request.tokens += tokens  # as nearly always
            else:
                tokens, reason = self._append(request, tokens)
            self.scheduler.cached(request, len(request.tokens) - 1)
            if reason:
                self.scheduler.finish(request, reason)
            outputs.append(self._output(request, tokens, [] if logprobs is None else _logprobs(request, tokens, row, logprobs)))
            stats.generated_tokens += len(outputs[-1].tokens)
        return outputs

    def _append(self, request: Request, tokens: list[int]) -> tuple[list[int], str | None]:
        """Adds new tokens to a request up to where it ends: (those, why it ends there if it does)."""
        ends = () if request.params.ignore_eos else self._eos
        room = request.max_tokens - len(request.tokens)
        for used, token in enumerate(tokens, 1):
            request.tokens.append(token)
            reason = "stop" if token in ends else "length" if used == room else None
            if request.shaper and request.shaper.push(token):
                reason = reason or "stop"
            if reason:
                return tokens[:used], reason
        return tokens, None

    def _output(self, request: Request, tokens: list[int], logprobs: list[TokenLogprob]) -> Output:
        """With the text of the tokens; a stop text ends the request."""
        if (stream := request.text) is None:
            return Output(request, tokens, "", logprobs, request.finish_reason)
        text, stopped, used = "", False, 0
        for token in tokens:
            more, stopped = stream.push(token)
            text, used = text + more, used + 1
            if stopped:
                break
        if request.finish_reason is not None and not stopped:
            more, stopped = stream.end()
            text += more
        if stopped:
            if request.finish_reason is None:
                self.scheduler.finish(request, "stop")
            request.finish_reason = "stop"
        return Output(request, tokens[:used], text, logprobs[:used], request.finish_reason)


def check_drafts(speculate: int) -> None:
    """Raises UserError for more drafts a step than there may be."""
    if not 0 <= speculate <= _MOST_DRAFTS:
        raise UserError(f"speculate is {speculate}: a step drafts {_MOST_DRAFTS} tokens at most, or none with 0")


def _scratch(decoder: Decoder, ranks: Ranks, tokens: int) -> int:
    """Bytes that a prefill step of so many tokens on each device works in: a row for every token and each of its experts, as it comes and
    as it goes, if all meet on one device (parallel.replicas). V3 on eight devices: 5.6 GB at 4,096 tokens (XLA: 4.5), on one 0.7 (0.8)."""
    config, parts = decoder.config, ranks.expert_parts
    rows = tokens * parts * min(config.num_experts_per_tok, config.n_routed_experts // parts)
    itemsize = jnp.dtype(decoder.recipe.compute_dtype).itemsize
    return rows * config.hidden_size * ((1 if decoder.recipe.fp8 else itemsize) + itemsize)


def _logprobs(request: Request, tokens: list[int], row: int, sampled: Sampled) -> list[TokenLogprob]:
    """What a request asked for; sampled: as host arrays."""
    if (count := request.params.logprobs) is None:
        return []
    top = sampled.top_tokens[row, :, :count].tolist(), sampled.top_logprobs[row, :, :count].tolist()
    return [TokenLogprob(token, float(sampled.logprobs[row, i]), tuple(zip(top[0][i], top[1][i]))) for i, token in enumerate(tokens)]


def encode(prompt: str | Sequence[int], tokenizer, vocab_size: int) -> list[int]:
    """Token ids of a prompt. Raises UserError for text without a tokenizer, and for what are no ids of the vocabulary."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UserError("this model has no tokenizer: give the prompt as token ids")
        return tokenizer.encode(prompt)
    tokens = np.asarray(prompt, object)
    if tokens.ndim != 1 or not all(isinstance(token, Integral) for token in tokens):
        raise InvalidParameter(f"a prompt is {str(prompt)[:60]}: give a text, or token ids, which are integers", "prompt")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise InvalidParameter(f"the prompt has token ids outside the vocabulary 0..{vocab_size - 1}", "prompt")
    return tokens.tolist()


def generate(decoder: Decoder, params: dict, tokenizer, prompts, sampling: SamplingParams):
    """One prompt or a list of them, as text or token ids; the same kind comes back, new tokens only (`Model.generate`)."""
    if not np.iterable(prompts):
        raise UserError(f"prompts are {prompts!r}: give a text, a list of texts, a list of token ids, or a list of such")
    single = isinstance(prompts, str) or (len(prompts) > 0 and not isinstance(prompts[0], str) and np.ndim(prompts[0]) == 0)
    prompts = [prompts] if single else list(prompts)
    if not prompts:
        return []
    encoded = [encode(prompt, tokenizer, decoder.config.vocab_size) for prompt in prompts]
    longest = min(max(map(len, encoded)) + sampling.max_new_tokens, decoder.config.max_position_embeddings)
    engine = Engine(decoder, params, tokenizer=tokenizer, max_batch=min(len(prompts), 64), max_length=longest)
    answers = [
        completion.text if isinstance(prompt, str) else completion.tokens
        for prompt, completion in zip(prompts, engine.generate(encoded, sampling))
    ]
    return answers[0] if single else answers
