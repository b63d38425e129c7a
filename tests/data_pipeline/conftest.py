"""A small corpus on disk, a tokenizer trained on it, and both prepared."""

import random

import pytest

from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.prepare import prepare
from dsv3_jax.data.tokenizer import EOS, Tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """120 files of 0 to some thousand bytes, one of which spells out EOS and one of which is not UTF-8."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["def", "return", "self", "世界", "naïve", "\n", "    ", "(x)", "0123", "😀"]
    for i in range(120):
        (folder / f"{i:03}.txt").write_text(" ".join(rng.choices(words, k=int(rng.random() ** 3 * 1000))), encoding="utf-8")
    (folder / "120.txt").write_text(f"before{EOS}after", encoding="utf-8")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    return folder


@pytest.fixture(scope="session")
def corpus(folder):
    return Corpus(folder, heldout_fraction=0.2)


@pytest.fixture(scope="session")
def tokenizer(corpus):
    return Tokenizer.train((document.text for document in corpus.documents()), 400)


@pytest.fixture(scope="session")
def prepared(corpus, tokenizer, tmp_path_factory):
    return prepare(corpus, tokenizer, tmp_path_factory.mktemp("prepared"), sequence_length=32, fim_rate=0)
