"""Corpora: which documents come, in which order and split, and what is said about the ones that cannot be read."""

import gzip
import json
import os
import sys

import pyarrow
import pyarrow.parquet
import pytest

from dsv3_jax.data.corpus import Corpus
from dsv3_jax.errors import UserError


def names(corpus, split=None):
    return [document.name for document in corpus.documents(split)]


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_stdlib_is_its_own_sources_without_tests_and_installed_packages():
    found = names(Corpus("stdlib"))
    assert {"json/decoder.py", "asyncio/base_events.py", "argparse.py"} <= set(found)
    assert all(name.endswith(".py") for name in found)
    folders = {part for name in found for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert found == sorted(found)


def test_stdlib_text_is_what_python_imported():
    text = {document.name: document.text for document in Corpus("stdlib").documents()}
    with open(json.decoder.__file__, encoding="utf-8", newline="") as file:
        assert text["json/decoder.py"] == file.read()


def test_splits_are_disjoint_complete_and_near_the_fraction():
    corpus = Corpus("stdlib", heldout_fraction=0.2)
    train, heldout = names(corpus, "train"), names(corpus, "heldout")
    assert sorted(train + heldout) == names(corpus)
    assert 0.1 < len(heldout) / len(train + heldout) < 0.3
    assert set(names(Corpus("stdlib", heldout_fraction=0.1), "heldout")) < set(heldout)  # a smaller part is a part of it


def test_holding_out_depends_on_the_name_alone(tmp_path):
    for folder, count in (("few", 50), ("many", 100)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            (tmp_path / folder / f"{i}.txt").write_text(f"{folder} {i}")
    few, many = (set(names(Corpus(tmp_path / folder, heldout_fraction=0.3), "heldout")) for folder in ("few", "many"))
    assert few and few == {name for name in many if int(name.removesuffix(".txt")) < 50}


def test_directory_files_come_byte_for_byte_and_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "x.txt").write_bytes("line\r\nende\u2028\ufeff".encode())
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfwith mark")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git" / "config").write_text("no")
    os.mkfifo(tmp_path / "pipe")  # would block if it were read
    documents = list(Corpus(tmp_path, heldout_fraction=0).documents())
    assert documents == [("a.md", "\ufeffwith mark"), ("b/x.txt", "line\r\nende\u2028\ufeff")]


def test_jsonl_gz_parquet_and_lists_of_sources(tmp_path):
    texts = ["one", "two\nlines", "", "三"]
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    (tmp_path / "a.jsonl").write_text(lines + "\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": [*texts, None], "n": range(5)}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("plain")
    expected = [(f"{file}:{i}", texts[i - 1]) for file in ("a.jsonl", "b.jsonl.gz", "c.parquet") for i in (1, 2, 4)] + [("d.txt", "plain")]
    assert list(Corpus(tmp_path).documents()) == expected
    assert list(Corpus([tmp_path / "d.txt", str(tmp_path / "a.jsonl")]).documents()) == [expected[-1], *expected[:3]]
    split = Corpus(tmp_path, heldout_fraction=0.5)
    assert sorted(names(split, "train") + names(split, "heldout")) == [name for name, _ in expected]


def test_what_is_not_utf8_is_skipped_and_counted(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n{"text": "lone \\ud800"}\n')
    bad = pyarrow.array([b"ok", b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "b.parquet")
    corpus = Corpus(tmp_path)
    for _ in range(2):  # a second pass does not count them again
        assert names(corpus) == ["a.jsonl:1", "b.parquet:1", "good.txt"]
        assert corpus.skipped == {"latin.txt", "a.jsonl:2", "a.jsonl:3", "b.parquet:2"}


def test_fingerprint_follows_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    first = Corpus(tmp_path).fingerprint()
    assert Corpus(tmp_path).fingerprint() == first
    (tmp_path / "b.txt").write_text("two")
    second = Corpus(tmp_path).fingerprint()
    (tmp_path / "b.txt").write_text("twö")
    third = Corpus(tmp_path).fingerprint()
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    fourth = Corpus(tmp_path).fingerprint()
    (tmp_path / "c.txt").write_text("öwt")  # as long as before
    os.utime(tmp_path / "c.txt", ns=(0, 1))
    assert len({first, second, third, fourth, Corpus(tmp_path).fingerprint()}) == 5


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', ("line 2", "not JSON")),
        ("a.jsonl", b'{"text": "x", "n": ' + b"1" * 5000 + b"}\n", ("line 1", "not JSON")),
        ("a.jsonl", b"[" * 100_000 + b"\n", ("line 1", "not JSON")),
        ("a.jsonl", b'{"body": "x"}\n', ("line 1", "'text'")),
        ("a.jsonl", b'["x"]\n', ("line 1", "'text'")),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:-20], ("a.jsonl.gz", "cannot read")),
        ("a.jsonl.gz", b"not gzip", ("a.jsonl.gz", "cannot read")),
        ("a.parquet", b"not parquet", ("a.parquet", "cannot read")),
    ],
)
def test_damaged_files_are_named_in_one_line(tmp_path, file, content, words):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(Corpus(tmp_path).documents())
    assert all(word in one_line(error) for word in words)


def test_parquet_without_text_column_and_without_pyarrow(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'text'.*content"):
        list(Corpus(tmp_path).documents())
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="int64, not string"):
        list(Corpus(tmp_path).documents())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs the extra `data`"):
        list(Corpus(tmp_path).documents())


def test_sources_that_are_not_there_or_empty(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Corpus(tmp_path / "nothing")
    with pytest.raises(UserError, match="has no files"):
        Corpus(tmp_path)
    with pytest.raises(UserError, match="no sources"):
        Corpus([])
    with pytest.raises(UserError, match="heldout_fraction"):
        Corpus("stdlib", heldout_fraction=1.0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_without_the_right_to_read(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(UserError) as error:
        list(Corpus(tmp_path).documents())
    assert "a.txt" in one_line(error)
