"""Batches from prepared rows: a pure function of (seed, row index), on any number of processes.

The rows of a corpus, shuffled anew each epoch, form one endless sequence; row `i` of it depends on the seed alone. A step takes the
next few of them, so a reader's state is its seed and its step, a batch-size ramp does not disturb the order, and a run continues
with the same batches on any number of processes. Grain's random-access MapDataset over ArrayRecord does the reading.
"""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain
import numpy as np

from dsv3_jax.data.prepare import Prepared
from dsv3_jax.errors import UserError

Batch = dict[str, np.ndarray]
READ_AHEAD = 2  # batches


class Loader:
    """Training batches of a prepared corpus (`directory`: `Prepared.directory`).

    seed: of the order of the rows. segment_ids: whether batches carry what masks attention between documents.
    Of every batch, reader `process_index` of `process_count` gets its slice of the rows, in the order of the indices. Raises
    UserError where the folder is not a whole preparation, held-out rows included: a run should not find that at its end.
    """

    def __init__(self, directory: str | Path, *, seed: int, process_index: int = 0, process_count: int = 1, segment_ids: bool = False):
        self.prepared = Prepared.open(directory)
        self._process = (process_index, process_count)
        self._segment_ids = segment_ids
        source, _ = _open(self.prepared, "train"), _open(self.prepared, "heldout")
        self.num_rows = len(source)  # of one epoch
        self._rows = grain.MapDataset.source(source).shuffle(seed=seed % 2**32).repeat()

    def rows(self, indices: Iterable[int]) -> np.ndarray:
        """int32 [len(indices), sequence_length + 1]: rows of the endless sequence; epoch `e` begins at `e * num_rows`."""
        dtype = self.prepared.dtype
        with _damage_told(self.prepared, "train"):
            return np.stack([np.frombuffer(self._rows[int(index)], dtype) for index in indices]).astype(np.int32)

    def batch(self, first_row: int, num_rows: int) -> Batch:
        """This process's part of the global batch of rows `first_row` to `first_row + num_rows`.

        {"tokens": int32 [num_rows / process_count, S + 1]}: inputs are `[:, :-1]` and targets `[:, 1:]`. With segment ids also
        "segment_ids" and "positions", int32 of the same shape. Raises UserError where the rows do not divide among the processes.
        """
        batch = {"tokens": self.rows(range(first_row, first_row + num_rows)[_part(num_rows, *self._process)])}
        if self._segment_ids:
            batch["segment_ids"], batch["positions"] = segments(batch["tokens"], self.prepared.eos_id)
        return batch

    def batches(self, spans: Iterable[tuple[int, int]], *, prefetch: int = READ_AHEAD) -> Iterator[Batch]:
        """`batch(*span)` of each (first_row, num_rows), in order, the next `prefetch` of them being read by a thread meanwhile."""
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
            pending = deque()
            for span in spans:
                pending.append(pool.submit(self.batch, *span))
                if len(pending) > prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()


def heldout_batches(directory: str | Path, batch_size: int, *, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
    """All held-out rows once, in their order, as {"tokens": int32 [b, S + 1], "loss_mask": float32 [b, S]}, b = batch_size / process_count.

    The mask is 1 where `tokens[:, 1:]` is to be predicted and 0 over padding; the last batch is filled up with empty rows, so that
    every batch has one shape and every process the same number of them. Each token of the held-out documents is predicted once:
    the summed loss over `Prepared.heldout.bytes` is their bits per byte (`prepare.bits_per_byte`).
    """
    prepared = Prepared.open(directory)
    source = _open(prepared, "heldout")
    part = _part(batch_size, process_index, process_count)
    for first in range(0, len(source), batch_size):
        with _damage_told(prepared, "heldout"):
            rows = [np.frombuffer(source[i], prepared.dtype) for i in range(first, first + batch_size)[part] if i < len(source)]
        tokens = np.full((part.stop - part.start, prepared.sequence_length + 1), prepared.pad_id, np.int32)
        mask = np.zeros((part.stop - part.start, prepared.sequence_length), np.float32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
            mask[i, : len(row) - 1] = 1
        yield {"tokens": tokens, "loss_mask": mask}


def segments(tokens_BS: np.ndarray, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(segment_ids, positions), int32 [B, S]: documents numbered from 1 within each row, and places within each document from 0.

    A document ends with its EOS. One that began in an earlier row counts its positions from the start of this one.
    """
    starts = np.zeros_like(tokens_BS, dtype=bool)
    starts[:, 1:] = tokens_BS[:, :-1] == eos_id
    place = np.arange(tokens_BS.shape[1], dtype=np.int32)
    first = np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    return 1 + np.cumsum(starts, axis=1, dtype=np.int32), (place - first).astype(np.int32)


def _part(num_rows: int, process_index: int, process_count: int) -> slice:
    if num_rows % process_count:
        raise UserError(f"a batch of {num_rows} rows does not divide among {process_count} processes: give a multiple of {process_count}")
    size = num_rows // process_count
    return slice(process_index * size, (process_index + 1) * size)


def _open(prepared: Prepared, split: str) -> grain.sources.ArrayRecordDataSource:
    path, expected = _path(prepared, split), getattr(prepared, split).rows
    with _damage_told(prepared, split):
        source = grain.sources.ArrayRecordDataSource(str(path))
        found = len(source)
    if found != expected:
        raise UserError(f"{path} has {found} rows, meta.json says {expected}: remove {prepared.directory} and prepare it again")
    return source


@contextlib.contextmanager
def _damage_told(prepared: Prepared, split: str) -> Iterator[None]:
    """What array_record raises, whatever its C++ gives it (every record has a checksum), as a UserError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read {_path(prepared, split)} ({reason}): remove {prepared.directory} and prepare it again") from error


def _path(prepared: Prepared, split: str) -> Path:
    return prepared.directory / f"{split}.array_record"
