"""Prepares a corpus from the command line: trains a tokenizer on it (or takes one) and packs it into rows."""

import sys
import time
from pathlib import Path

import tyro

from dsv3_jax import command_line
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.prepare import prepare, train_tokenizer
from dsv3_jax.data.tokenizer import Tokenizer


def main(
    corpus: tuple[str, ...] = ("stdlib",),
    *,
    directory: Path = Path("data"),
    tokenizer: Path | None = None,
    vocab_size: int = 4096,
    sequence_length: int = 512,
    heldout_fraction: float = 0.05,
    fim_rate: float = 0.1,
    seed: int = 0,
) -> None:
    """Tokenize and pack a corpus into fixed rows for training.

    Args:
        corpus: 'stdlib', directories of text, files (.jsonl, .jsonl.gz, .parquet with a field `text`; anything else is text).
        directory: Where the tokenizer and the rows go; what is there from the same settings is reused.
        tokenizer: A folder with tokenizer.json; without it one is trained on the corpus.
        vocab_size: Of the tokenizer that is trained.
        sequence_length: Tokens predicted per row.
        heldout_fraction: Part of the documents held out for evaluation.
        fim_rate: Part of the training documents rearranged for fill-in-the-middle.
        seed: Chooses those documents and where they are cut.
    """
    start = time.perf_counter()
    documents = Corpus(corpus, heldout_fraction=heldout_fraction)
    chosen = Tokenizer.load(tokenizer) if tokenizer else train_tokenizer(documents, vocab_size, directory)
    prepared = prepare(documents, chosen, directory, sequence_length=sequence_length, fim_rate=fim_rate, seed=seed)
    for split, counts in (("train", prepared.train), ("held out", prepared.heldout)):
        print(f"{split:>8}  {counts.documents:,} documents  {counts.bytes:,} bytes  {counts.tokens:,} tokens  {counts.rows:,} rows")
    if prepared.skipped:
        print(f"{'skipped':>8}  {prepared.skipped:,} documents that are not UTF-8")
    if prepared.heldout_gzip9_bits_per_byte is not None:
        print(f"gzip -9 of the held-out documents: {prepared.heldout_gzip9_bits_per_byte:.3f} bits per byte")
    print(f"{prepared.directory}  ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    options = command_line.deferred(main)
    sys.exit(command_line.run(lambda: command_line.parsed(lambda: tyro.cli(options, prog="python -m dsv3_jax.data"))()))
