"""Documents of a corpus, read lazily and in a fixed order, and the choice of those that are held out.

A corpus is one or more sources: `stdlib` (the Python standard library's own source files, which every machine has), a directory
of text or source files, or a single file. Files named `*.jsonl` or `*.jsonl.gz` hold one document a line, `*.parquet` one a row,
both in the field `text`; every other file is one document. A document is held out by a hash of its name, so that the choice
depends neither on the machine nor on which other documents there are.
"""

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from dsv3_jax.errors import UserError, needs_extra

# Folders of the standard library that are not it: its tests, and what was installed beside it.
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

Split = Literal["train", "heldout"]


class Document(NamedTuple):
    name: str  # path relative to its source; records of a file are `path:number`, counted from 1
    text: str


class Corpus:
    """The documents of `sources`: 'stdlib', a path, or a sequence of these.

    `heldout_fraction` of the documents (in expectation) form the split 'heldout', the others 'train'. `skipped` holds the names of
    the documents met so far that are not valid UTF-8. Raises UserError where a source does not exist or has no file.
    """

    def __init__(self, sources: str | Path | Sequence[str | Path], *, heldout_fraction: float = 0.05):
        if not 0 <= heldout_fraction < 1:
            raise UserError(f"heldout_fraction is {heldout_fraction}: give a fraction from 0 up to, not including, 1")
        self.sources = [sources] if isinstance(sources, str | Path) else list(sources)
        self.heldout_fraction = heldout_fraction
        self.skipped: set[str] = set()
        if not self.sources:
            raise UserError("the corpus has no sources: give 'stdlib', a file or a directory")
        self._files = [file for source in self.sources for file in _files(source)]

    def __str__(self) -> str:
        return ", ".join(map(str, self.sources))

    def fingerprint(self) -> str:
        """A hash of every file's name, size and time of change: another value where the corpus may have changed."""
        digest = hashlib.sha256()
        for name, path in self._files:
            stat = path.stat()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def is_heldout(self, name: str) -> bool:
        number = int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big")
        return number < self.heldout_fraction * 2**64

    def documents(self, split: Split | None = None) -> Iterator[Document]:
        """The documents of one split, or all; empty ones are left out. One file at a time is in memory.

        Raises UserError where a file cannot be read, a line is not JSON, or a record has no field `text`.
        """
        for name, path in self._files:
            for document_name, raw in self._records(name, path, split):
                try:
                    text = raw.decode()
                except UnicodeDecodeError:
                    self.skipped.add(document_name)
                    continue
                if text:
                    yield Document(document_name, text)

    def _records(self, name: str, path: Path, split: Split | None) -> Iterator[tuple[str, bytes]]:
        def wanted(document_name: str) -> bool:
            return split is None or self.is_heldout(document_name) == (split == "heldout")

        try:
            if name.endswith((".jsonl", ".jsonl.gz")):
                records = _jsonl_records(path)
            elif name.endswith(".parquet"):
                records = _parquet_records(path)
            else:
                if wanted(name):
                    yield name, path.read_bytes()
                return
            for number, record in enumerate(records, 1):
                if wanted(document_name := f"{name}:{number}"):
                    yield document_name, record()
        except (OSError, EOFError, zlib.error) as error:  # a missing right, a truncated or damaged .gz
            raise UserError(f"cannot read {path} ({error}): make it readable, or leave it out of the corpus") from error


def _files(source: str | Path) -> list[tuple[str, Path]]:
    """(name, path) of every file of a source, in the order of their names."""
    is_stdlib = source == "stdlib"
    root = Path(sysconfig.get_paths()["stdlib"]) if is_stdlib else Path(source)
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise UserError(f"the corpus {source} does not exist: give 'stdlib', a file or a directory")

    def fail(error: OSError):
        raise UserError(f"cannot read {error.filename} ({error.strerror}): make it readable, or leave it out of the corpus")

    found = []
    for folder, subfolders, names in os.walk(root, onerror=fail):
        left_out = STDLIB_LEFT_OUT if is_stdlib else {"__pycache__"}
        subfolders[:] = [name for name in subfolders if name not in left_out and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if (name.endswith(".py") if is_stdlib else not name.startswith(".")) and path.is_file():
                found.append((path.relative_to(root).as_posix(), path))
    if not found:
        raise UserError(f"the corpus {source} has no {'.py files' if is_stdlib else 'files'}: give a source with text in it")
    return sorted(found)


# Both readers yield a function per record, so that records of the other split are not parsed.


def _jsonl_records(path: Path):
    def text(line: bytes, number: int) -> bytes:
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError:
            return line  # not UTF-8: counted as skipped by the caller
        except (ValueError, RecursionError) as error:  # also of a number of too many digits, or of too many brackets
            raise UserError(f"{path} line {number} is not JSON ({error}): correct or remove the line") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise UserError(f"{path} line {number} has no string field 'text': each line must be an object with one")
        return record["text"].encode(errors="surrogatepass")  # a lone surrogate is not UTF-8 and is skipped as such

    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield lambda line=line, number=number: text(line, number) if line.strip() else b""


def _parquet_records(path: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise needs_extra(f"reading {path}", "data") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise UserError(f"{path} has no column 'text' (columns: {', '.join(file.schema_arrow.names)}): rename or add it")
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                column = batch.column("text")
                if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
                    raise UserError(f"{path}: column 'text' has type {column.type}, not string: convert it")
                # As bytes: pyarrow does not check that strings are UTF-8, and `as_py` of a bad one would raise.
                for value in column.cast(pyarrow.large_binary()):
                    yield lambda value=value: value.as_py() or b""
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {path} ({str(error).splitlines()[0]}): is it a whole Parquet file?") from error
