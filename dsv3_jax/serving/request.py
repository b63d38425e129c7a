"""What is asked of the engine, and what it answers."""

import dataclasses
import hashlib
import math
from array import array
from functools import cached_property
from numbers import Integral, Real
from types import NoneType
from typing import Any, NamedTuple

from dsv3_jax.errors import UserError

MAX_LOGPROBS = 20


class InvalidParameter(UserError):
    """A request that is refused. `parameter` names the field of it that is to blame, `code` is the OpenAI API's word for it."""

    def __init__(self, message: str, parameter: str | None = None, code: str | None = None):
        super().__init__(message)
        self.parameter, self.code = parameter, code


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; names are those of the OpenAI API and of vLLM.

    temperature: 0 takes the most likely token. top_k: 0 keeps all. min_p: drops tokens less likely than min_p times the likeliest.
    seed: decides every draw together with the token's position, whatever else is in the batch. stop: texts that end the answer
    (they are cut off). logprobs: how many alternatives are reported beside each token's log-probability (0..20), None for none.
    presence_penalty, frequency_penalty: taken off the logits of tokens that the answer has, once and once for each time.
    logit_bias: (token id, value added to its logit) pairs. json_schema: the answer is a JSON text of this schema (itself JSON text).
    """

    max_new_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    json_schema: str | None = None

    def __post_init__(self):
        for name, kind, good, allowed in (
            ("max_new_tokens", Integral, lambda value: value >= 1, "an integer of at least 1"),
            ("temperature", Real, lambda value: 0 <= value <= 100, "a number within 0..100"),
            ("top_p", Real, lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
            ("top_k", Integral, lambda value: 0 <= value < 2**31, "an integer of at least 0 (0 keeps all), and below 2**31"),
            ("min_p", Real, lambda value: 0 <= value <= 1, "a number within 0..1"),
            ("seed", Integral, lambda value: True, "an integer"),
            ("stop", tuple, lambda value: all(isinstance(text, str) and text for text in value), "texts, none of them empty"),
            ("presence_penalty", Real, lambda value: -2 <= value <= 2, "a number within -2..2"),
            ("frequency_penalty", Real, lambda value: -2 <= value <= 2, "a number within -2..2"),
            ("logprobs", (Integral, NoneType), lambda value: 0 <= (value or 0) <= MAX_LOGPROBS, f"an integer within 0..{MAX_LOGPROBS}"),
            ("logit_bias", tuple, lambda value: all(map(_is_bias, value)), "pairs of a token id and a finite number"),
            ("json_schema", (str, NoneType), lambda value: True, "JSON text"),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) or not good(value):
                raise InvalidParameter(f"{name} is {value!r}: it must be {allowed}", name)


def _is_bias(pair: Any) -> bool:
    match pair:
        case (Integral(), Real() as value):
            return math.isfinite(value)
    return False


def derive_seed(seed: int, index: int) -> int:
    """The seed of the index-th of several answers: 32 bits, unrelated between neighbouring seeds and indices."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest())


class TokenLogprob(NamedTuple):
    """Log-probability of a token under the model, and the most likely tokens at its place with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt on its way through the engine. Fields after `params` are the engine's."""

    prompt: list[int]
    params: SamplingParams = SamplingParams()
    id: Any = None
    tokens: list[int] = dataclasses.field(default_factory=list)  # prompt and answer
    rank: int = 0  # of the mesh, where it runs
    pages: array = dataclasses.field(default_factory=lambda: array("i"))  # where its latents are; NumPy copies it as it is
    page_keys: list[bytes] = dataclasses.field(default_factory=list)  # of its full pages (cache.page_keys)
    num_cached: int = 0  # tokens whose latents are in the cache
    prefilling: bool = True  # some of its tokens are in no step yet
    in_flight: int = 0  # tokens that steps which have not ended add to the cache, at most
    lives: int = 0  # how often it lost its pages: what a step gives for an earlier life is void
    drafts: list[int] = dataclasses.field(default_factory=list)  # the tokens that the MTP module expects after the last one
    finish_reason: str | None = None  # "stop" | "length" | "abort"
    text: Any = None  # its TextStream, if there is a tokenizer
    shaper: Any = None  # what it adds to the logits, if anything
    is_prepared: bool = False
    admitted: float | None = None  # when it first left the queue (time.monotonic)

    def __post_init__(self):
        self.prompt = [int(token) for token in self.prompt]
        self.tokens = list(self.prompt)

    @cached_property  # asked for in every step
    def max_tokens(self) -> int:
        return len(self.prompt) + self.params.max_new_tokens


class Output(NamedTuple):
    """What one step added to a request: tokens, text that is certain by now, log-probabilities if asked, and why it ended if it did."""

    request: Request
    tokens: list[int]
    text: str
    logprobs: list[TokenLogprob]
    finish_reason: str | None


@dataclasses.dataclass
class Completion:
    """A whole answer. text is cut before a stop text; tokens are all that were made, the end-of-sequence token included."""

    request: Request
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    def extend(self, output: Output) -> None:
        self.tokens += output.tokens
        self.text += output.text
        self.logprobs += output.logprobs
        self.finish_reason = output.finish_reason
