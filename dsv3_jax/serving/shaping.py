"""What a request adds to the logits before a token is drawn: penalties, biases, and −inf where a JSON schema forbids a token."""

import json

import numpy as np

from dsv3_jax.errors import needs_extra
from dsv3_jax.serving.request import InvalidParameter, Request, SamplingParams


def is_shaped(params: SamplingParams) -> bool:
    """Whether a request adds anything."""
    return bool(params.presence_penalty or params.frequency_penalty or params.logit_bias or params.json_schema is not None)


class Shaper:
    """The bias of one request. grammar: a `Grammar`'s matcher, if it has a schema."""

    def __init__(self, params: SamplingParams, vocab_size: int, matcher=None):
        self._params, self._matcher, self._size = params, matcher, vocab_size
        self._fixed = np.zeros(vocab_size, np.float32)
        for token, value in params.logit_bias:
            self._fixed[token] += value

    def bias(self, request: Request) -> np.ndarray:
        """float32 [W] for the request's next token."""
        counts = np.bincount(request.tokens[len(request.prompt) :], minlength=self._size)
        bias = self._fixed - self._params.frequency_penalty * counts - self._params.presence_penalty * (counts > 0)
        bias = bias.astype(np.float32)
        if self._matcher is not None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            allowed = np.unpackbits(bits, bitorder="little", count=self._size if 8 * len(bits) >= self._size else None).astype(bool)
            bias[: len(allowed)][~allowed] = -np.inf
            bias[len(allowed) :] = -np.inf
        return bias

    def push(self, token: int) -> bool:
        """Takes a new token of the answer; True when the grammar can go no further."""
        if self._matcher is None:
            return False
        return not self._matcher.consume_token(token) or self._matcher.is_stopped()


class Grammars:
    """JSON schemas to matchers over a tokenizer's vocabulary (llguidance). A failed import tells what to install."""

    def __init__(self, tokenizer):
        try:
            import llguidance
        except ImportError as error:
            raise needs_extra("a JSON schema", "serve") from error
        self._llguidance = llguidance
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer)))

    def matcher(self, schema: str):
        """A matcher at the start of a JSON text of that schema. Raises InvalidParameter for a schema that is none."""
        try:
            # Without this any amount of white space is legal, and a model that is unsure writes nothing else.
            grammar = json.loads(schema)
            if isinstance(grammar, dict):
                grammar = {"x-guidance": {"whitespace_flexible": False}} | grammar
            matcher = self._llguidance.LLMatcher(self._tokenizer, self._llguidance.LLMatcher.grammar_from_json_schema(json.dumps(grammar)))
            problem = matcher.get_error() if matcher.is_error() else None
        except ValueError as error:
            problem = str(error)
        if problem:
            raise InvalidParameter(f"the JSON schema is not usable ({' '.join(problem.split())[:200]})", "response_format")
        return matcher


class _Vocabulary:
    """The tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, None
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
