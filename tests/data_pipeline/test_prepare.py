"""Preparation: the rows on disk say what the documents say, and a preparation is whole or not there."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from dsv3_jax.data import prepare as prepare_module
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.prepare import Prepared, bits_per_byte, gzip9_bits, prepare, train_tokenizer
from dsv3_jax.data.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer
from dsv3_jax.errors import UserError


def rows(prepared, split):
    reader = ArrayRecordReader(str(prepared.directory / f"{split}.array_record"))
    return [np.frombuffer(record, prepared.dtype).tolist() for record in reader.read_all()]


def joined(rows, length):
    """The tokens of consecutive rows, checking that each starts with the last token of the one before."""
    tokens = rows[0][:1]
    for row in rows:
        assert row[0] == tokens[-1] and len(row) == length + 1
        tokens += row[1:]
    return tokens


def split_documents(tokens, eos_id):
    """Complete documents of a token stream, without their EOS, and what is left at the end."""
    documents, rest = [], tokens
    while eos_id in rest:
        end = rest.index(eos_id)
        documents.append(rest[:end])
        rest = rest[end + 1 :]
    return documents, rest


def test_training_rows_hold_every_training_document_once_in_order(prepared, corpus, tokenizer):
    texts = [document.text for document in corpus.documents("train")]
    tokens = joined(rows(prepared, "train"), 32)
    documents, _ = split_documents(tokens, tokenizer.eos_id)
    assert all(document[0] == tokenizer.bos_id for document in documents)
    decoded = [tokenizer.decode(document) for document in documents]
    assert decoded == texts[: len(decoded)]
    left_out = prepared.train.tokens - len(tokens)
    assert 0 <= left_out < 32  # what does not fill a row
    assert len(texts) - len(decoded) <= 1 or left_out  # only the end of the stream is missing
    assert prepared.train.documents == len(texts) and prepared.train.bytes == sum(len(text.encode()) for text in texts)
    assert prepared.train.rows == len(rows(prepared, "train"))


def test_heldout_documents_are_scored_whole_each_token_once(prepared, corpus, tokenizer):
    texts = [document.text for document in corpus.documents("heldout")]
    found, current = [], []
    for row in rows(prepared, "heldout"):
        if row[0] == tokenizer.bos_id and not current:
            current = row
        else:
            assert row[0] == current[-1]
            current = current + row[1:]
        assert len(row) == 33 or row[-1] == tokenizer.eos_id  # only the last row of a document is shorter
        assert len(row) >= 2  # each row predicts something
        if current[-1] == tokenizer.eos_id:
            found.append(tokenizer.decode(current[:-1]))
            current = []
    assert found == texts and not current
    assert prepared.heldout.bytes == sum(len(text.encode()) for text in texts)
    assert prepared.heldout.tokens - prepared.heldout.documents == sum(len(row) - 1 for row in rows(prepared, "heldout"))


def test_rows_do_not_depend_on_how_much_is_tokenized_at_once(prepared, corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 3000)
    small = prepare(corpus, tokenizer, tmp_path, sequence_length=32, fim_rate=0)
    for split in ("train", "heldout"):
        assert rows(small, split) == rows(prepared, split)


def test_eos_ends_documents_and_nothing_else(folder, tokenizer, tmp_path):
    """A document that spells out EOS must not look like two."""
    corpus = Corpus(folder / "120.txt", heldout_fraction=0)
    tokens = joined(rows(prepare(corpus, tokenizer, tmp_path, sequence_length=1, fim_rate=0), "train"), 1)
    assert tokens.count(tokenizer.eos_id) == 1 and tokens[-1] == tokenizer.eos_id
    assert tokenizer.decode(tokens) == (folder / "120.txt").read_text(encoding="utf-8")


def test_fill_in_the_middle(corpus, tokenizer, tmp_path):
    begin, hole, end = (tokenizer.token_id(token) for token in (FIM_BEGIN, FIM_HOLE, FIM_END))
    texts = [document.text for document in corpus.documents("train")]

    def train_documents(rate, seed):
        prepared = prepare(corpus, tokenizer, tmp_path, sequence_length=16, fim_rate=rate, seed=seed)
        plain = [row for row in rows(prepared, "heldout") if begin not in row]
        assert len(plain) == prepared.heldout.rows  # held-out documents stay as they are
        return split_documents(joined(rows(prepared, "train"), 16), tokenizer.eos_id)[0]

    documents = train_documents(1.0, 0)
    lengths = set()
    for document, text in zip(documents, texts):
        assert document[:2] == [tokenizer.bos_id, begin]
        hole_at, end_at = document.index(hole), document.index(end)
        prefix, suffix, middle = document[2:hole_at], document[hole_at + 1 : end_at], document[end_at + 1 :]
        assert tokenizer.decode(prefix) + tokenizer.decode(middle) + tokenizer.decode(suffix) == text
        lengths.add((len(prefix), len(middle)))
    assert len(lengths) > len(documents) / 2  # cut at many places

    # By chance alone, at rate 0.5 and with some 90 documents.
    chosen = [begin in document for document in train_documents(0.5, 0)]
    assert 0.3 < np.mean(chosen) < 0.7
    assert chosen == [begin in document for document in train_documents(0.5, 0)]
    assert chosen != [begin in document for document in train_documents(0.5, 1)]


def test_tokenizer_without_bos(corpus, tokenizer, tmp_path):
    """Documents begin after the EOS of the one before, in held-out rows too, so that their first token is scored."""
    library = json.loads(tokenizer._json) | {"post_processor": None}
    without = Tokenizer(json.dumps(library), {key: tokenizer.config[key] for key in ("bos_token", "eos_token", "pad_token")})
    prepared = prepare(corpus, without, tmp_path, sequence_length=32, fim_rate=0)
    heldout = rows(prepared, "heldout")
    assert heldout[0][0] == without.eos_id
    assert sum(len(row) - 1 for row in heldout) == prepared.heldout.tokens
    assert not any(without.bos_id in row for row in [*heldout, *rows(prepared, "train")])


def test_vocabularies_beyond_16_bits(corpus, tokenizer, tmp_path):
    library = json.loads(tokenizer._json)
    library["added_tokens"] += [{**library["added_tokens"][0], "id": 100_000, "content": "<｜last｜>"}]
    for token in library["added_tokens"][:2]:  # BOS and EOS get large ids, as FIM and chat tokens have in the released vocabulary
        del library["model"]["vocab"][token["content"]]
        token["id"] += 90_000
        library["model"]["vocab"][token["content"]] = token["id"]
    large = Tokenizer(json.dumps(library | {"post_processor": None}), tokenizer.config)
    assert large.eos_id > 1 << 16
    prepared = prepare(corpus, large, tmp_path, sequence_length=32, fim_rate=0)
    documents, _ = split_documents(joined(rows(prepared, "train"), 32), large.eos_id)
    texts = [document.text for document in corpus.documents("train")]
    assert [large.decode(document) for document in documents] == texts[: len(documents)]


def test_preparation_is_reused_until_something_changes(folder, tokenizer, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "corpus")

    def run(sequence_length=32, heldout_fraction=0.2, tokenizer=tokenizer, **options):
        corpus = Corpus(copy, heldout_fraction=heldout_fraction)
        return prepare(corpus, tokenizer, tmp_path / "out", sequence_length=sequence_length, **options)

    first = run()
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_write_rows", None)  # would be called where rows are made
        assert run() == first
    other_tokenizer = Tokenizer.train(["abc abc"], 266)
    others = [run(sequence_length=31), run(heldout_fraction=0.21), run(fim_rate=0.2), run(seed=1), run(tokenizer=other_tokenizer)]
    (copy / "new.txt").write_text("new")
    others.append(run())
    assert len({prepared.directory for prepared in [first, *others]}) == 7
    assert Prepared.open(first.directory) == first  # what was there is still there


def test_same_corpus_elsewhere_gives_the_same_rows(folder, tokenizer, prepared, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "corpus")
    again = prepare(Corpus(copy, heldout_fraction=0.2), tokenizer, tmp_path / "out", sequence_length=32, fim_rate=0)
    for split in ("train", "heldout"):
        assert rows(again, split) == rows(prepared, split)


INTERRUPTED = """
import sys, time
from dsv3_jax.data import prepare as p
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.tokenizer import Tokenizer
def stop(*args):
    (args[0] / "train.array_record").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
p._write_rows = stop
p.prepare(Corpus(sys.argv[1], heldout_fraction=0.2), Tokenizer.load(sys.argv[2]), sys.argv[3], sequence_length=32, fim_rate=0)
"""


def test_killed_preparation_is_not_taken_for_a_finished_one(folder, tokenizer, prepared, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    out = tmp_path / "out"
    command = [sys.executable, "-c", INTERRUPTED, str(folder), str(tmp_path / "tokenizer"), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    assert [path.name for path in out.glob("rows-*")] == [f"{prepared.directory.name}.unfinished"]
    again = prepare(Corpus(folder, heldout_fraction=0.2), tokenizer, out, sequence_length=32, fim_rate=0)
    assert rows(again, "train") == rows(prepared, "train")
    assert not list(out.glob("*.unfinished"))


def test_processes_that_prepare_at_once_make_it_once(tmp_path):
    script = """
import pathlib, sys, time
from dsv3_jax.data.prepare import _make_once
def make(folder):
    with open(sys.argv[1] + "/made", "a") as file: file.write("x")
    time.sleep(0.5)
    (folder / "whole").touch()
assert (_make_once(pathlib.Path(sys.argv[1]), "rows", make) / "whole").exists()
"""
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(300) for process in processes] == [0, 0, 0]
    assert (tmp_path / "made").read_text() == "x"


def test_failure_leaves_nothing_behind(folder, tokenizer, tmp_path):
    with pytest.raises(UserError, match="shorter sequence_length"):
        prepare(Corpus(folder), tokenizer, tmp_path, sequence_length=10**6, fim_rate=0)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_train_tokenizer_is_kept_and_sees_no_heldout_text(tmp_path, monkeypatch):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text("common words here " * 20)
    corpus = Corpus(folder, heldout_fraction=0.3)
    secret = next(iter(corpus.documents("heldout"))).name
    (folder / secret).write_text("zyxwvut " * 1000)
    corpus = Corpus(folder, heldout_fraction=0.3)
    tokenizer = train_tokenizer(corpus, 300, tmp_path / "out")
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    assert b" common" in tokens and not any(b"zy" in token for token in tokens)
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "train", None)
        assert train_tokenizer(corpus, 300, tmp_path / "out").fingerprint == tokenizer.fingerprint
    assert train_tokenizer(corpus, 270, tmp_path / "out").vocab_size == 270


def test_gzip9_bits_equal_the_command(prepared, corpus):
    lines = [
        f"line {i * i % 997} of a text with some words in it\n" * 3 + "".join(chr(97 + i * j % 26) for j in range(40)) for i in range(60)
    ]
    texts = ["\n".join(lines[:20]), "\n".join(lines[20:]), "x"]
    expected = [8 * 484, 8 * 750, 8 * 21]  # what `gzip -9 -n` of gzip 1.12 makes of each
    found = [gzip9_bits(text.encode()) for text in texts]
    assert found == pytest.approx(expected, rel=5e-3)  # deflate is not written by the same code everywhere
    heldout = [document.text.encode() for document in corpus.documents("heldout")]
    assert prepared.heldout_gzip9_bits_per_byte == sum(map(gzip9_bits, heldout)) / len(b"".join(heldout))


def test_bits_per_byte():
    # A uniform guess over 256 bytes costs ln 256 nats a byte: 8 bits.
    assert bits_per_byte(1000 * np.log(256), 1000) == pytest.approx(8)


class FullDisk:
    """A writer of records on one: what array_record does then."""

    def __init__(self, path, options):
        pass

    def write(self, record):
        raise RuntimeError("write() failed: No space left on device; writing x.array_record; at byte 4096")


def test_errors_are_one_line(folder, tokenizer, tmp_path, monkeypatch):
    def message(function):
        with pytest.raises(UserError) as error:
            function()
        assert "\n" not in str(error.value)
        return str(error.value)

    corpus = Corpus(folder)
    assert "at least 1" in message(lambda: prepare(corpus, tokenizer, tmp_path, sequence_length=0))
    assert "fim_rate" in message(lambda: prepare(corpus, tokenizer, tmp_path, sequence_length=8, fim_rate=1.5))
    no_fim = Tokenizer(tokenizer._json.replace(FIM_HOLE, "<other>"), tokenizer.config)
    assert FIM_HOLE in (text := message(lambda: prepare(corpus, no_fim, tmp_path, sequence_length=8))) and "fim_rate to 0" in text
    one = Corpus(folder / "000.txt", heldout_fraction=1e-9)
    assert "none of the 1 documents" in message(lambda: prepare(one, tokenizer, tmp_path, sequence_length=1, fim_rate=0))
    latin = Corpus(folder / "latin.txt", heldout_fraction=0)
    assert "has 0 tokens" in message(lambda: prepare(latin, tokenizer, tmp_path, sequence_length=8, fim_rate=0))
    assert "no training text" in message(lambda: train_tokenizer(latin, 300, tmp_path))
    (tmp_path / "file").write_text("")
    assert "cannot write" in message(lambda: prepare(corpus, tokenizer, tmp_path / "file", sequence_length=8, fim_rate=0))
    assert "not a prepared corpus" in message(lambda: Prepared.open(tmp_path))
    (tmp_path / "meta.json").write_text('{"rows"')
    assert f"remove {tmp_path} and prepare it again" in message(lambda: Prepared.open(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot write to .*\(write.. failed: No space left on device\)"):
        patch.setattr(prepare_module, "ArrayRecordWriter", FullDisk)
        prepare(corpus, tokenizer, tmp_path, sequence_length=8, fim_rate=0)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    assert "is not a tokenizer" in message(lambda: Tokenizer.load(tmp_path))


def test_skipped_documents_are_counted(prepared):
    assert prepared.skipped == 1


def test_command_line(folder, tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "dsv3_jax.data", *map(str, arguments)], capture_output=True, text=True, timeout=300)

    arguments = ["--corpus", folder, "--directory", tmp_path, "--vocab-size", 300, "--sequence-length", 16]
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    prepared = Prepared.open(next(tmp_path.glob("rows-*")))
    assert f"{prepared.train.bytes:,} bytes" in result.stdout and "1 documents that are not UTF-8" in result.stdout
    assert run(*arguments).stdout.splitlines()[:-1] == result.stdout.splitlines()[:-1]
    failed = run("--corpus", tmp_path / "nothing")
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.count("\n") == 1 and "does not exist" in failed.stderr
