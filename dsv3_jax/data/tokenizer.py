"""Byte-level BPE tokenizers in the released DeepSeek layout: load, train, encode, decode (also token by token), chat templates.

A tokenizer is a folder with `tokenizer.json` (Hugging Face `tokenizers`) and `tokenizer_config.json` (special tokens, whether BOS
is put first, chat template; a `chat_template.jinja` beside it comes first). A byte-level tokenizer covers all 256 bytes, so every
text comes back exactly.
"""

import codecs
import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from dsv3_jax.errors import UserError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
# The first ids of a trained vocabulary. Those of a chat are there from the start, because a vocabulary cannot grow later.
SPECIAL_TOKENS = (BOS, EOS, PAD, FIM_BEGIN, FIM_HOLE, FIM_END, USER, ASSISTANT, THINK, END_THINK)

# The released tokenizer splits text by these, one after the other, before merges are applied: digits in runs of 1-3; runs of
# Chinese and Japanese; words with the character before them, punctuation with the line breaks after it, white space.
PRE_TOKENIZER_PATTERNS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"""
    r"|\s+(?!\S)|\s+",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '" + ASSISTANT + "' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


class Tokenizer:
    """A byte-level BPE tokenizer; make one with `load` or `train`."""

    def __init__(self, tokenizer_json: str, config: dict[str, Any]):
        self._json = tokenizer_json
        self.config = config
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if not isinstance(self._tokenizer.decoder, decoders.ByteLevel):
            raise UserError("tokenizer.json is not of a byte-level tokenizer (its decoder is not ByteLevel): DeepSeek's tokenizers are")
        if "add_bos_token" in config or "add_eos_token" in config:  # as Hugging Face's Llama tokenizers read these two
            self._tokenizer.post_processor = _bos_eos(
                (self._special("bos_token"), self.bos_id) if config.get("add_bos_token") else None,
                (self._special("eos_token"), self.eos_id) if config.get("add_eos_token") else None,
            )

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Reads tokenizer.json and, where they are there, tokenizer_config.json and chat_template.jinja. Raises UserError."""
        directory = Path(directory)
        try:
            text = (directory / "tokenizer.json").read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read {directory}/tokenizer.json ({error.strerror}): give a folder that has one") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{directory}/tokenizer.json is not a tokenizer ({error}): restore the file") from error
        config_path, template_path = directory / "tokenizer_config.json", directory / "chat_template.jinja"
        try:
            config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
        except ValueError as error:
            raise UserError(f"{config_path} is not valid JSON ({error}): restore the file") from error
        if not isinstance(config, dict):
            raise UserError(f"{config_path} is no JSON object: restore the file")
        try:
            if template_path.exists():
                config["chat_template"] = template_path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{template_path} is not a text ({error}): restore the file") from error
        templates = config.get("chat_template")
        for template in templates if isinstance(templates, list) else []:
            if not isinstance(template, dict) or not {"name", "template"} <= template.keys():
                raise UserError(f"{config_path}: chat_template is a list of {template!r}, not of named templates: restore the file")
        try:
            return cls(text, config)
        except UserError:
            raise
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise UserError(f"{directory}/tokenizer.json is not a tokenizer ({error}): restore the file") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE over `texts`, special tokens and 256 bytes included in `vocab_size`; smaller where merges run out.

        Deterministic: the same texts in the same order give the same tokenizer.
        """
        smallest = len(SPECIAL_TOKENS) + 256
        if vocab_size < smallest:
            raise UserError(f"vocab_size is {vocab_size}: a byte-level tokenizer needs at least {smallest} (special tokens and 256 bytes)")
        tokenizer = tokenizers.Tokenizer(models.BPE())
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZER_PATTERNS]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[AddedToken(token, normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
        tokenizer.post_processor = _bos_eos((BOS, tokenizer.token_to_id(BOS)), None)
        written = json.loads(tokenizer.to_str())
        for token in written["added_tokens"]:
            # Decoding keeps <think>, which is part of an answer's text, as with the released tokenizer. (The trainer marks all.)
            token["special"] = token["content"] not in (THINK, END_THINK)
        config = {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": CHAT_TEMPLATE,
        }
        return cls(json.dumps(written, ensure_ascii=False, indent=2), config)

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as `load`, transformers and vLLM read them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self._json, encoding="utf-8")
        (directory / "tokenizer_config.json").write_text(json.dumps(self.config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    # ---- vocabulary

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's embedding may have more rows."""
        return len(self._token_bytes)

    def token_id(self, token: str) -> int:
        """The id of a token written out, e.g. `tokenizer.token_id(FIM_HOLE)`. Raises UserError where there is none."""
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(f"the tokenizer has no token {token}: use one that has it")
        return token_id

    def _special(self, key: str) -> str:
        token = self.config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str):
            raise UserError(f"tokenizer_config.json names no {key}: add it")
        return token

    def special_id(self, key: str) -> int | None:
        """The id of what tokenizer_config.json names as `key` ("bos_token", "eos_token", ...); None where it names nothing."""
        return self.token_id(self._special(key)) if self.config.get(key) else None

    @cached_property
    def bos_id(self) -> int:
        return self.token_id(self._special("bos_token"))

    @cached_property
    def eos_id(self) -> int:
        return self.token_id(self._special("eos_token"))

    @cached_property
    def pad_id(self) -> int:
        """EOS where the tokenizer names no padding token."""
        found = self.special_id("pad_token")
        return self.eos_id if found is None else found

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides how text is encoded."""
        return hashlib.sha256(f"{self.bos_id} {self.eos_id}\n{self._json}".encode()).hexdigest()

    # ---- text to ids

    def encode(self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False) -> list[int]:
        """Token ids. `add_special_tokens` puts BOS first (and EOS last) where tokenizer_config.json says so.

        `split_special_tokens=True` takes special tokens written out in the text for plain text, as is right for documents and for
        what strangers wrote: no text can then end a document or open a turn.
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens, split_special_tokens=split_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True, split_special_tokens: bool = False) -> list[list[int]]:
        """`encode` of each text, on all cores. Raises UserError where one has no UTF-8 form: half a surrogate pair."""
        tokenizer = self._without_special_tokens if split_special_tokens else self._tokenizer
        try:
            return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]
        except TypeError as error:
            raise UserError("a text is not valid Unicode: take out what UTF-8 cannot write (half a surrogate pair)") from error

    @cached_property
    def _without_special_tokens(self) -> tokenizers.Tokenizer:
        # `encode_special_tokens` of `tokenizers` leaves added tokens that are not marked special, as the released FIM and chat ones.
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(json.loads(self._json) | {"added_tokens": [], "post_processor": None}))
        tokenizer.post_processor = self._tokenizer.post_processor
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    # ---- ids to text

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        """The bytes of every id (empty where an id is not in use), by the rule of the ByteLevel decoder."""
        byte_of = _byte_of_character()
        vocabulary = self._tokenizer.get_vocab()
        table = [b""] * (max(vocabulary.values()) + 1)
        for token, token_id in vocabulary.items():
            try:
                table[token_id] = bytes([byte_of[character] for character in token])
            except KeyError:  # an added token, written as itself
                table[token_id] = token.encode()
        return table

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, possibly part of a character; empty for an id outside the vocabulary."""
        return self._token_bytes[token_id] if 0 <= token_id < len(self._token_bytes) else b""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text; ill-formed UTF-8 becomes U+FFFD, ids outside the vocabulary nothing."""
        skip = self.special_ids if skip_special_tokens else ()
        return b"".join(self.token_bytes(i) for i in ids if i not in skip).decode(errors="replace")

    def stream(self, *, skip_special_tokens: bool = True) -> "StreamDecoder":
        """A decoder that is fed one token at a time."""
        return StreamDecoder(self, skip_special_tokens)

    # ---- chats

    @property
    def chat_template(self) -> str | None:
        return self._template(with_tools=False)

    def _template(self, with_tools: bool) -> str | None:
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("tool_use") if with_tools and "tool_use" in named else named.get("default")
        return template

    def apply_chat_template(
        self, messages: Sequence[dict], *, tools: list[dict] | None = None, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The text of a chat, special tokens written out: encode it with `add_special_tokens=False`.

        messages: {"role", "content", ...} dicts of plain JSON values; `variables` are handed to the template. Templates come with
        checkpoints, so they run in jinja2's sandbox. Raises UserError where there is no template or it refuses the messages.
        """
        source = self._template(with_tools=tools is not None)
        if source is None:
            raise UserError("the tokenizer has no chat template: give a prompt instead of messages, or add chat_template.jinja beside it")
        special = {key: self._special(key) for key in self.config if key.endswith("_token") and isinstance(self.config[key], str | dict)}
        try:
            # Through JSON: a template then sees plain values only, with no methods of the caller's objects.
            values = json.loads(json.dumps({"messages": list(messages), "tools": tools, "documents": None} | variables))
            return _environment().from_string(source).render(special | values | {"add_generation_prompt": add_generation_prompt})
        except Exception as error:  # whatever a foreign template may raise over foreign messages
            reason = " ".join(str(error).split())
            raise UserError(f"the chat template does not take these messages ({reason}): correct their roles and contents") from error


class StreamDecoder:
    """Text as soon as its UTF-8 is complete. All that `step` returns, and `end` after the last token, is `decode` of all tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token_id: int) -> str:
        return "" if token_id in self._skip else self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def end(self) -> str:
        return self._utf8.decode(b"", final=True)


# Where any token before ends: a line break with no other in the white space after it (`\s*[\r\n]+` above takes all of them).
_LINE_END = re.compile(r"\n(?=[^\S\r\n]*\S)")


def pieces(text: str, size: int = 1 << 18) -> Iterator[str]:
    """Cuts a long text into parts of `size` to 2 `size` characters that are encoded as the whole would be.

    `tokenizers` needs some hundred bytes a token while it encodes, so a file of hundreds of MB does not go in at once. The cut is
    at a line end; where there is none within 2 `size` characters it may divide a token.
    """
    start = 0
    while len(text) - start > 2 * size:
        line_end = _LINE_END.search(text, start + size, start + 2 * size)
        end = line_end.end() if line_end else start + 2 * size
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _bos_eos(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> processors.TemplateProcessing:
    specials = [special for special in (bos, eos) if special]
    sides = [bos[0]] if bos else [], [eos[0]] if eos else []
    return processors.TemplateProcessing(single=[*sides[0], "$A", *sides[1]], special_tokens=specials)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted: printable Latin-1 stands for itself, the others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks an assistant's words in newer templates; the text is what stands inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """jinja2 as transformers sets it up for chat templates."""

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment
