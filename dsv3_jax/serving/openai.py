"""The OpenAI API's requests and answers as plain JSON values, for batch files and for HTTP alike.

`Api.parse` turns a body into a `Job`: the engine's requests and what is needed to word their answers. Whatever is wrong with a body
raises InvalidParameter with the field that is to blame.
"""

import dataclasses
import json
import re
import time
from typing import Any, NamedTuple

from dsv3_jax.config import did_you_mean
from dsv3_jax.errors import UserError
from dsv3_jax.serving.engine import Engine
from dsv3_jax.serving.request import MAX_LOGPROBS, Completion, InvalidParameter, Output, Request, SamplingParams, TokenLogprob, derive_seed
from dsv3_jax.serving.text import ReasoningSplitter, hold_tool_calls, split_reasoning, tool_calls

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_MAX_CHOICES = 128
_DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI's; a chat may fill the context


class _Field(NamedTuple):
    """What a field may be: a type and limits, in words for the message."""

    types: tuple[type, ...]
    good: Any
    words: str


def _number(low, high, *, whole=False, words=None):
    types = (int,) if whole else (int, float)
    return _Field(types, lambda value: low <= value <= high, words or f"{'an integer' if whole else 'a number'} within {low}..{high}")


_ANY = _Field((object,), lambda value: True, "")
_OBJECT = _Field((dict,), lambda value: True, "an object")
_BOOL = _Field((bool,), lambda value: True, "true or false")
_STRING = _Field((str,), lambda value: True, "a string")
_BOTH = {
    "model": _STRING,
    "temperature": _number(0, 2),
    "top_p": _Field((int, float), lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    "top_k": _number(-1, 2**31 - 1, whole=True, words="an integer below 2**31, -1 or 0 for all tokens"),
    "min_p": _number(0, 1),
    "seed": _number(-(2**63), 2**64 - 1, whole=True),
    "max_tokens": _number(1, 2**31 - 1, whole=True, words="an integer of at least 1, and below 2**31"),
    "n": _number(1, _MAX_CHOICES, whole=True),
    "stop": _Field((str, list), lambda value: _is_stop(value), "a string, or a list of up to 4, none of them empty"),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _Field((dict,), lambda value: _is_bias(value), "an object of token ids to numbers within -100..100"),
    "ignore_eos": _BOOL,
    "stream": _BOOL,
    "stream_options": _OBJECT,
    "response_format": _OBJECT,
    # What only matters to OpenAI's own service.
    **dict.fromkeys(["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"], _ANY),
}
_FIELDS = {
    CHAT: _BOTH
    | {
        "messages": _Field((list,), lambda value: value and all(isinstance(m, dict) for m in value), "a list of at least one message"),
        "max_completion_tokens": _BOTH["max_tokens"],
        "logprobs": _BOOL,
        "top_logprobs": _number(0, MAX_LOGPROBS, whole=True),
        "tools": _Field((list,), lambda value: all(isinstance(tool, dict) for tool in value), "a list of objects"),
        "tool_choice": _Field((str,), lambda value: value in ("auto", "none"), "'auto' or 'none'"),
        "chat_template_kwargs": _OBJECT,
    },
    COMPLETIONS: _BOTH
    | {
        "prompt": _Field((str, list), lambda value: True, "a string, a list of strings, or token ids"),
        "logprobs": _number(0, MAX_LOGPROBS, whole=True),
    },
}


def _is_stop(value):
    values = [value] if isinstance(value, str) else value
    return len(values) <= 4 and all(isinstance(stop, str) and stop for stop in values)


def _is_bias(value):
    return all(re.fullmatch(r"\d{1,9}", key) and _is_number(bias) and -100 <= bias <= 100 for key, bias in value.items())


def _is_number(value):
    return _has_type(value, (int, float))


def _has_type(value, types):
    """isinstance, but true and false are no numbers."""
    return isinstance(value, types) and (not isinstance(value, bool) or bool in types or object in types)


def validate(url: str, body: Any) -> dict:
    """The fields of a body that are not null. Raises InvalidParameter."""
    if not isinstance(body, dict):
        raise InvalidParameter("the body must be a JSON object")
    fields = _FIELDS[url]
    values = {name: value for name, value in body.items() if value is not None}
    for name, value in values.items():
        if (field := fields.get(name)) is None:
            raise InvalidParameter(f"unknown field {name!r}{did_you_mean(name, fields)}", name)
        if not _has_type(value, field.types) or not field.good(value):
            raise InvalidParameter(f"{name} is {json.dumps(value)[:60]}: it must be {field.words}", name)
    return values


@dataclasses.dataclass
class Job:
    """A parsed body. requests: `count` for each prompt. reasoning: the answer starts inside <think>."""

    url: str
    id: str
    model: str
    requests: list[Request]
    count: int = 1
    stream: bool = False
    include_usage: bool = False
    tools: bool = False
    reasoning: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        return self.url == CHAT


class Api:
    """An engine as the OpenAI API sees it.

    Args: the engine; name: of the model; defaults: values for fields that a body leaves out (CLI options); its max_tokens is cut to
    what the context has room for.
    """

    def __init__(self, engine: Engine, name: str, defaults: dict | None = None):
        self.engine, self.name, self.defaults = engine, name, dict(defaults or {})
        self._max_tokens = self.defaults.pop("max_tokens", None)
        if (tokenizer := engine.tokenizer) is not None:
            self._longest_token = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))

    # ---- bodies to jobs

    def parse(self, url: str, body: Any, *, id: str, seed: int) -> Job:
        """seed: what draws come from if the body names none. Raises InvalidParameter, or UserError where the model has no tokenizer."""
        values = self.defaults | validate(url, body)
        if values.get("model", self.name) != self.name:
            raise InvalidParameter(f"the model {values['model']!r} does not exist: this is {self.name!r}", "model", "model_not_found")
        reasoning, count = False, values.get("n", 1)
        if url == CHAT:
            text = self._chat_text(values)
            reasoning = text.rstrip().endswith("<think>")
            prompts = [self._encode(text, add_special_tokens=False)]
        else:
            prompts = _prompts(values)
            if (answers := count * len(prompts)) > _MAX_CHOICES:  # before millions of them are made
                raise InvalidParameter(f"{answers} answers in one request: at most {_MAX_CHOICES}", "n")
            prompts = [self._encode(prompt) for prompt in prompts]
        params = [self._params(url, values, len(prompt)) for prompt in prompts]
        seed = values.get("seed", seed)
        requests = [
            # A single answer draws from the seed itself; of several each needs one of its own.
            Request(prompt, dataclasses.replace(p, seed=seed if count == len(prompts) == 1 else derive_seed(seed, i * count + j)))
            for i, (prompt, p) in enumerate(zip(prompts, params))
            for j in range(count)
        ]
        for request in requests:
            self.engine.prepare(request)
        options = values.get("stream_options", {})
        return Job(
            url,
            id,
            self.name,
            requests,
            count,
            stream=values.get("stream", False),
            include_usage=bool(options.get("include_usage")),
            tools="tools" in values and values.get("tool_choice") != "none",
            reasoning=reasoning,
        )

    def _encode(self, prompt, *, add_special_tokens=True) -> list[int]:
        if isinstance(prompt, list):
            return self.engine.encode(prompt)
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise UserError("this model has no tokenizer: give the prompt as token ids")
        try:
            size = len(prompt.encode())
        except UnicodeEncodeError as error:
            raise InvalidParameter(f"the prompt is not valid Unicode ({error.reason})", "prompt") from error
        most = self.engine.max_length
        if size > most * self._longest_token:  # certainly too long: tokenising it would take its time
            raise InvalidParameter(f"the prompt is longer than the context of {most} tokens", "prompt", "context_length_exceeded")
        return tokenizer.encode(prompt, add_special_tokens=add_special_tokens)

    def _chat_text(self, values: dict) -> str:
        if "messages" not in values:
            raise InvalidParameter("messages is missing: give a list of at least one message", "messages")
        if self.engine.tokenizer is None:
            raise UserError("this model has no tokenizer: use /v1/completions with token ids")
        messages = [_plain(message) for message in values["messages"]]
        tools = values.get("tools") if values.get("tool_choice") != "none" else None
        try:
            return self.engine.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, **values.get("chat_template_kwargs", {})
            )
        except UserError as error:
            raise InvalidParameter(str(error), "messages") from error
        except TypeError as error:
            raise InvalidParameter(f"chat_template_kwargs does not fit ({error})", "chat_template_kwargs") from error

    def _params(self, url: str, values: dict, prompt_length: int) -> SamplingParams:
        most = values.get("max_completion_tokens", values.get("max_tokens"))
        if most is None:
            room = self.engine.scheduler.longest_request - prompt_length
            usual = self._max_tokens or (room if url == CHAT else _DEFAULT_MAX_TOKENS)
            most = max(min(usual, room), 1)
        stop = values.get("stop", ())
        logprobs = values.get("logprobs")
        if url == CHAT:
            if "top_logprobs" in values and not logprobs:
                raise InvalidParameter("top_logprobs needs logprobs to be true", "top_logprobs")
            logprobs = values.get("top_logprobs", 0) if logprobs else None
        return SamplingParams(
            max_new_tokens=most,
            temperature=values.get("temperature", 1.0),
            top_p=values.get("top_p", 1.0),
            top_k=max(values.get("top_k", 0), 0),
            min_p=values.get("min_p", 0.0),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            ignore_eos=values.get("ignore_eos", False),
            logprobs=logprobs,
            presence_penalty=values.get("presence_penalty", 0.0),
            frequency_penalty=values.get("frequency_penalty", 0.0),
            logit_bias=tuple((int(token), float(bias)) for token, bias in values.get("logit_bias", {}).items()),
            json_schema=_schema(values.get("response_format")),
        )

    # ---- answers

    def response(self, job: Job, completions: list[Completion]) -> dict:
        """The whole answer to a job."""
        choices = [self._choice(job, index, completion) for index, completion in enumerate(completions)]
        return self._head(job, streamed=False) | {"choices": choices, "usage": usage(job, completions)}

    def _choice(self, job: Job, index: int, completion: Completion) -> dict:
        with_logprobs = completion.request.params.logprobs is not None
        choice = {"index": index, "finish_reason": completion.finish_reason, "logprobs": None}
        if not job.is_chat:
            if with_logprobs:
                choice["logprobs"] = self._completion_logprobs(completion.logprobs)
            return choice | {"text": completion.text}
        reasoning, content = split_reasoning(completion.text, job.reasoning)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        if job.tools and (calls := tool_calls(content, f"{job.id}_{index}")):
            message |= {"content": content[: calls[0]].strip() or None, "tool_calls": calls[1]}
            choice["finish_reason"] = "tool_calls"
        if with_logprobs:
            choice["logprobs"] = {"content": [self._chat_logprob(entry) for entry in completion.logprobs]}
        return choice | {"message": message}

    def chunk(self, job: Job, index: int, delta: dict, logprobs: list[TokenLogprob], finish_reason: str | None) -> dict:
        """A piece of a streamed answer. delta: of the message, or {"text": …} of a completion."""
        choice: dict[str, Any] = {"index": index, "finish_reason": finish_reason, "logprobs": None}
        if logprobs:
            choice["logprobs"] = (
                {"content": [self._chat_logprob(entry) for entry in logprobs]} if job.is_chat else self._completion_logprobs(logprobs)
            )
        choice |= {"delta": delta} if job.is_chat else delta
        return self._head(job, streamed=True) | {"choices": [choice]} | ({"usage": None} if job.include_usage else {})

    def usage_chunk(self, job: Job, completions: list[Completion]) -> dict:
        """The last piece of a stream whose client asked for usage."""
        return self._head(job, streamed=True) | {"choices": [], "usage": usage(job, completions)}

    def _head(self, job: Job, *, streamed: bool) -> dict:
        kind = ("chat.completion" + (".chunk" if streamed else "")) if job.is_chat else "text_completion"
        return {"id": job.id, "object": kind, "created": job.created, "model": job.model}

    def _token_text(self, token: int) -> str:
        return self.engine.tokenizer.token_bytes(token).decode(errors="replace") if self.engine.tokenizer else str(token)

    def _chat_logprob(self, entry: TokenLogprob) -> dict:
        def one(token, logprob):
            raw = list(self.engine.tokenizer.token_bytes(token))
            return {"token": self._token_text(token), "logprob": _finite(logprob), "bytes": raw}

        return one(entry.token, entry.logprob) | {"top_logprobs": [one(*alternative) for alternative in entry.top]}

    def _completion_logprobs(self, entries: list[TokenLogprob]) -> dict:
        return {
            "tokens": [self._token_text(entry.token) for entry in entries],
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": [{self._token_text(token): _finite(value) for token, value in entry.top} for entry in entries],
        }


class DeltaStream:
    """The deltas of one streamed answer: its text cut into what a client is told piece by piece."""

    def __init__(self, job: Job, index: int):
        self._job, self._index = job, index
        self._reasoning = ReasoningSplitter(job.reasoning)
        self._calls = ""  # text from where tool calls may begin

    def push(self, output: Output) -> tuple[dict, str | None]:
        """(delta, finish reason) after an output of the engine."""
        last = output.finish_reason is not None
        if not self._job.is_chat:
            return {"text": output.text}, output.finish_reason
        reasoning, content = self._reasoning.push(output.text, last=last)
        delta: dict[str, Any] = {"reasoning_content": reasoning} if reasoning else {}
        reason = output.finish_reason
        if self._job.tools:
            content, self._calls = hold_tool_calls(self._calls + content)
            if last and (calls := tool_calls(self._calls, f"{self._job.id}_{self._index}")):
                delta["tool_calls"], reason = [{"index": i} | call for i, call in enumerate(calls[1])], "tool_calls"
            elif last:
                content += self._calls
        if content:
            delta["content"] = content
        return delta, reason


def error_body(error: UserError, kind: str = "invalid_request_error") -> dict:
    """The OpenAI error shape."""
    return {
        "message": str(error),
        "type": kind,
        "param": getattr(error, "parameter", None),
        "code": getattr(error, "code", None),
    }


def usage(job: Job, completions: list[Completion]) -> dict:
    """Tokens in and out. Several answers to one prompt count it once."""
    prompt = sum(len(request.prompt) for request in job.requests[:: job.count])
    answer = sum(len(completion.tokens) for completion in completions)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _prompts(values: dict) -> list:
    """The prompts of a completion: texts or lists of token ids."""
    prompt = values.get("prompt")
    if prompt is None:
        raise InvalidParameter("prompt is missing", "prompt")
    is_ids = lambda value: isinstance(value, list) and value and all(isinstance(t, int) and not isinstance(t, bool) for t in value)  # noqa: E731
    if isinstance(prompt, str) or is_ids(prompt):
        return [prompt]
    if prompt and (all(isinstance(p, str) for p in prompt) or all(is_ids(p) for p in prompt)):
        return prompt
    raise InvalidParameter("prompt must be a string, a list of strings, a list of token ids or a list of such lists", "prompt")


def _plain(message: dict) -> dict:
    """A message whose content is one text: parts are joined."""
    content = message.get("content")
    if not isinstance(message.get("role"), str):
        raise InvalidParameter("a message has no role", "messages")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
            raise InvalidParameter("a message has content parts that are not text: this model reads text only", "messages")
        content = "".join(part["text"] for part in content)
    elif content is not None and not isinstance(content, str):
        raise InvalidParameter("the content of a message must be a string or a list of text parts", "messages")
    return message | {"content": content}


def _schema(response_format: dict | None) -> str | None:
    kind = (response_format or {"type": "text"}).get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return '{"type": "object"}'
    if kind == "json_schema":
        named = response_format.get("json_schema")
        if isinstance(named, dict) and isinstance(named.get("schema"), dict):
            return json.dumps(named["schema"])
        raise InvalidParameter('response_format needs {"json_schema": {"name": …, "schema": {…}}}', "response_format")
    raise InvalidParameter("response_format.type must be 'text', 'json_object' or 'json_schema'", "response_format")


def _finite(logprob: float) -> float:
    """JSON has no −inf; OpenAI writes −9999."""
    return max(logprob, -9999.0)
