"""Documents to fixed rows of tokens on disk, once: what the loader reads by index.

Training rows: every document becomes `[BOS] tokens EOS` (some of them rearranged for fill-in-the-middle), the documents are
concatenated and cut every `sequence_length` tokens. A row has one token more, the first of the next row, so that each token is
predicted once per epoch; what does not fill the last row is left out. Nothing marks documents but their EOS: attention crosses
them, as in DeepSeek-V3's pre-training (report, section 4.1), unless the loader is asked for segment ids.

Held-out rows: every document by itself and whole, in as many rows as it needs, the last one shorter. Each token but BOS is
predicted once, so the sum of the losses over the documents' bytes is their bits per byte.

A finished preparation is a folder with `train.array_record`, `heldout.array_record` and `meta.json`; its name is a hash of
everything that decides its content, so it is reused where nothing changed and never overwritten where something did.
"""

import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import itertools
import json
import math
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from dsv3_jax.data.corpus import Corpus, Document
from dsv3_jax.data.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer, pieces
from dsv3_jax.errors import UserError

FORMAT = 1  # part of the hash: raise it when the same settings would give other rows
BATCH_CHARACTERS = 4 << 20  # tokenized at once, in some hundred MB of memory
RECORD_OPTIONS = "group_size:1,uncompressed"  # one row a group: reading a row by index then reads that row only


@dataclasses.dataclass(frozen=True)
class Counts:
    rows: int = 0
    documents: int = 0
    tokens: int = 0  # of the documents, BOS, EOS and fill-in-the-middle tokens included
    bytes: int = 0  # of the documents' text in UTF-8


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A finished preparation, as `meta.json` in `directory` describes it."""

    directory: Path
    corpus: str
    sequence_length: int
    vocab_size: int  # of the tokenizer
    eos_id: int
    pad_id: int
    train: Counts
    heldout: Counts
    heldout_gzip9_bits_per_byte: float | None  # None where nothing is held out
    skipped: int  # documents left out because they are not UTF-8
    settings: dict  # all that decides the content; the folder's name is a hash of it

    @classmethod
    def open(cls, directory: str | Path) -> "Prepared":
        """Raises UserError where `directory` is not a finished preparation."""
        path = Path(directory) / "meta.json"
        try:
            meta = json.loads(path.read_text())
            return cls(directory=Path(directory), **meta | {split: Counts(**meta[split]) for split in ("train", "heldout")})
        except OSError as error:
            raise UserError(f"{directory} is not a prepared corpus (no meta.json): make one with python -m dsv3_jax.data") from error
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged: remove {directory} and prepare it again") from error

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens in the record files, little-endian."""
        return _dtype(self.vocab_size)


def train_tokenizer(corpus: Corpus, vocab_size: int, directory: str | Path) -> Tokenizer:
    """A tokenizer trained on the corpus without its held-out documents, kept in `directory` and read from there the next time."""
    key = _hash({"format": FORMAT, "corpus": corpus.fingerprint(), "heldout_fraction": corpus.heldout_fraction, "vocab_size": vocab_size})

    def make(folder: Path) -> None:
        documents = corpus.documents("train")
        first = next(documents, None)
        if first is None:
            raise UserError(f"the corpus {corpus} has no training text: give documents that are not empty and are UTF-8, or hold out fewer")
        Tokenizer.train((document.text for document in itertools.chain([first], documents)), vocab_size).save(folder)

    return Tokenizer.load(_make_once(Path(directory), f"tokenizer-{key}", make))


def prepare(
    corpus: Corpus, tokenizer: Tokenizer, directory: str | Path, *, sequence_length: int, fim_rate: float = 0.1, seed: int = 0
) -> Prepared:
    """Tokenizes and packs a corpus into a folder under `directory`, or finds it there.

    sequence_length: tokens predicted per row; rows have one more.
    fim_rate: the part of the training documents that are rearranged for fill-in-the-middle, in prefix-suffix-middle order (0.1 in
    DeepSeek-V3, report section 4.1). `seed` chooses them and where they are cut, each document by its own name.
    Several processes may call this at once: one of them works, the others wait. Raises UserError where the corpus has no training
    text for one row, or nothing to hold out although it should.
    """
    if sequence_length < 1:
        raise UserError(f"sequence_length is {sequence_length}: give at least 1")
    if not 0 <= fim_rate <= 1:
        raise UserError(f"fim_rate is {fim_rate}: give a fraction from 0 to 1")
    if fim_rate:
        try:
            [tokenizer.token_id(token) for token in (FIM_BEGIN, FIM_HOLE, FIM_END)]
        except UserError as error:
            raise UserError(f"{error}, or set fim_rate to 0") from error
    settings = {
        "format": FORMAT,
        "corpus_fingerprint": corpus.fingerprint(),
        "heldout_fraction": corpus.heldout_fraction,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "sequence_length": sequence_length,
        "fim_rate": fim_rate,
        "seed": seed,
    }

    def make(folder: Path) -> None:
        meta = {"corpus": str(corpus)} | _write_rows(folder, corpus, tokenizer, sequence_length, fim_rate, seed) | {"settings": settings}
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")

    key = _hash(settings)
    return Prepared.open(_make_once(Path(directory), f"rows-{key}", make))


def gzip9_bits(raw: bytes) -> int:
    """Bits of what `gzip -9 -n` makes of it (no file name stored)."""
    return 8 * len(gzip.compress(raw, 9, mtime=0))


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Of a summed loss in nats over text of `num_bytes`, e.g. the loss over all held-out rows and `prepared.heldout.bytes`."""
    return nats / math.log(2) / num_bytes


def _write_rows(folder: Path, corpus: Corpus, tokenizer: Tokenizer, sequence_length: int, fim_rate: float, seed: int) -> dict:
    dtype = _dtype(tokenizer.vocab_size)
    writers = {split: ArrayRecordWriter(str(folder / f"{split}.array_record"), RECORD_OPTIONS) for split in ("train", "heldout")}
    counts = {"train": dict.fromkeys(("rows", "documents", "tokens", "bytes"), 0)}
    counts["heldout"] = dict(counts["train"])
    gzip_bits = 0

    def write(split: str, tokens: np.ndarray) -> int:
        """Writes rows of sequence_length + 1 tokens, each starting with the last one of the row before; returns where it stopped."""
        end = len(tokens) - 1 if split == "heldout" else (len(tokens) - 1) // sequence_length * sequence_length
        for start in range(0, end, sequence_length):
            with _os_errors():
                writers[split].write(tokens[start : start + sequence_length + 1].tobytes())
            counts[split]["rows"] += 1
        return end

    stream = np.zeros(0, dtype)
    for batch in _batches(corpus.documents(), lambda document: len(document.text)):
        split_of = ["heldout" if corpus.is_heldout(document.name) else "train" for document in batch]
        rates = [fim_rate if split == "train" else 0.0 for split in split_of]
        encoded = [tokens.astype(dtype) for tokens in _encode(batch, rates, tokenizer, seed)]
        for document, split, tokens in zip(batch, split_of, encoded):
            raw = document.text.encode()
            counts[split]["documents"] += 1
            counts[split]["tokens"] += len(tokens)
            counts[split]["bytes"] += len(raw)
            if split == "heldout":
                gzip_bits += gzip9_bits(raw)
                # A tokenizer without BOS has documents begin after the EOS of the one before, here as in training.
                write(split, tokens if _prefix(tokenizer) else np.concatenate([np.array([tokenizer.eos_id], dtype), tokens]))
        stream = np.concatenate([stream, *(tokens for tokens, split in zip(encoded, split_of) if split == "train")])
        stream = stream[write("train", stream) :]
    for writer in writers.values():
        with _os_errors():
            writer.close()

    if not counts["train"]["rows"]:
        tokens = counts["train"]["tokens"]
        raise UserError(
            f"the corpus {corpus} has {tokens} tokens to train on, less than a row of {sequence_length + 1}: "
            "give more text (UTF-8) or a shorter sequence_length"
        )
    if corpus.heldout_fraction and not counts["heldout"]["documents"]:
        raise UserError(
            f"none of the {counts['train']['documents']} documents of {corpus} falls among the held-out "
            f"{corpus.heldout_fraction:.3g}: give more documents or another heldout_fraction (0 holds nothing out)"
        )
    return {
        "sequence_length": sequence_length,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "train": counts["train"],
        "heldout": counts["heldout"],
        "heldout_gzip9_bits_per_byte": gzip_bits / counts["heldout"]["bytes"] if counts["heldout"]["bytes"] else None,
        "skipped": len(corpus.skipped),
    }


def _batches[T](items: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of items that have BATCH_CHARACTERS together, or a little more."""
    batch, characters = [], 0
    for item in items:
        batch.append(item)
        characters += length(item)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text: BOS or nothing. A document then begins as a prompt will when the model is served."""
    return [token_id for token_id in tokenizer.encode("") if token_id != tokenizer.eos_id]


def _encode(batch: list[Document], fim_rates: list[float], tokenizer: Tokenizer, seed: int) -> Iterator[np.ndarray]:
    """The tokens of each document, its prefix and EOS included. Special tokens that its text spells out stay plain text."""
    prefix, end = _prefix(tokenizer), [tokenizer.eos_id]
    layouts = []  # of each document: lists of ids and strings in their order
    for document, rate in zip(batch, fim_rates):
        rng = random.Random(f"{seed} {document.name}")
        rearranged = rng.random() < rate
        layouts.append([prefix, *(_fill_in_the_middle(document.text, tokenizer, rng) if rearranged else pieces(document.text)), end])
    texts = (part for layout in layouts for part in layout if isinstance(part, str))
    encoded = (
        ids for group in _batches(texts, len) for ids in tokenizer.encode_batch(group, add_special_tokens=False, split_special_tokens=True)
    )
    for layout in layouts:
        yield np.concatenate([np.array(next(encoded) if isinstance(part, str) else part, np.uint32) for part in layout])


def _fill_in_the_middle(text: str, tokenizer: Tokenizer, rng: random.Random) -> Iterator[list[int] | str]:
    """`<fim_begin> prefix <fim_hole> suffix <fim_end> middle`, cut at two characters drawn uniformly."""
    start, end = sorted(rng.randint(0, len(text)) for _ in range(2))
    for token, part in ((FIM_BEGIN, text[:start]), (FIM_HOLE, text[end:]), (FIM_END, text[start:end])):
        yield [tokenizer.token_id(token)]
        yield from pieces(part)


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _hash(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _make_once(directory: Path, name: str, make: Callable[[Path], None]) -> Path:
    """`directory/name`, filled by `make` if it is not there yet: whole, or not at all.

    The lock is released when its process ends, however it ends; what that process left unfinished is then removed.
    """
    final, unfinished = directory / name, directory / f"{name}.unfinished"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not final.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                try:
                    make(unfinished)
                except BaseException:
                    shutil.rmtree(unfinished)
                    raise
                unfinished.rename(final)
    except OSError as error:
        raise UserError(
            f"cannot write to {directory} ({error.strerror or error}): make room or rights there, or give another folder"
        ) from error
    return final


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """What array_record raises of the file system, a RuntimeError of several clauses, the cause first, as an OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).partition(";")[0]) from error
