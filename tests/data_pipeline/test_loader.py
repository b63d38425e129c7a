"""The loader: batches depend on (seed, row index) and on nothing else."""

import shutil
from collections import Counter

import grain
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.loader import Loader, heldout_batches, segments
from dsv3_jax.data.prepare import bits_per_byte, prepare
from dsv3_jax.errors import UserError


def stored(prepared, split="train"):
    reader = ArrayRecordReader(str(prepared.directory / f"{split}.array_record"))
    return [tuple(np.frombuffer(record, prepared.dtype).tolist()) for record in reader.read_all()]


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_global_batches_are_equal_on_any_number_of_processes(prepared, process_count):
    one = Loader(prepared.directory, seed=3)
    readers = [Loader(prepared.directory, seed=3, process_index=i, process_count=process_count) for i in range(process_count)]
    for first in (0, 8, 8 * prepared.train.rows):
        parts = [reader.batch(first, 8)["tokens"] for reader in readers]
        assert all(part.shape == (8 // process_count, 33) and part.dtype == np.int32 for part in parts)
        np.testing.assert_array_equal(np.concatenate(parts), one.batch(first, 8)["tokens"])


def test_each_process_reads_only_its_rows(prepared, monkeypatch):
    loader = Loader(prepared.directory, seed=0, process_index=1, process_count=4)
    asked = []
    rows = loader.rows
    monkeypatch.setattr(loader, "rows", lambda indices: asked.extend(indices) or rows(indices))
    loader.batch(100, 8)
    assert asked == [102, 103]


def test_every_row_once_per_epoch_and_another_order_in_the_next(prepared):
    loader = Loader(prepared.directory, seed=0)
    n = loader.num_rows
    assert n == prepared.train.rows > 50
    epochs = [[tuple(row) for row in loader.rows(range(e * n, (e + 1) * n)).tolist()] for e in range(3)]
    expected = Counter(stored(prepared))
    assert all(Counter(epoch) == expected for epoch in epochs)
    orders = [*epochs, stored(prepared)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.mean([a == b for a, b in zip(one, other)]) < 0.2  # places that happen to agree


def test_seed_chooses_the_order(prepared):
    first, same, other = (Loader(prepared.directory, seed=seed).batch(0, 32)["tokens"] for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)
    Loader(prepared.directory, seed=2**40 + 1).batch(0, 1)  # any integer will do
    Loader(prepared.directory, seed=-1).batch(0, 1)


def test_the_order_is_grains_and_stays_as_it_was(prepared):
    """If the second assertion fails after an upgrade of Grain, runs begun before it do not continue with the same batches."""
    source = stored(prepared)
    order = [source.index(tuple(row)) for row in Loader(prepared.directory, seed=0).rows(range(6)).tolist()]
    assert order == [grain.MapDataset.range(len(source)).shuffle(seed=0).repeat()[i] for i in range(6)]
    thousand = grain.MapDataset.range(1000).shuffle(seed=0).repeat()
    assert [thousand[i] for i in (0, 1, 2, 1000, 1001, 1002)] == [134, 133, 624, 733, 7, 614]  # Grain 0.2.18


def test_resuming_and_batch_size_ramp_do_not_disturb_the_order(prepared):
    rows = Loader(prepared.directory, seed=1).rows(range(40))
    ramp = [(0, 2), (2, 2), (4, 4), (8, 8), (16, 8), (24, 16)]
    batches = [batch["tokens"] for batch in Loader(prepared.directory, seed=1).batches(ramp)]
    np.testing.assert_array_equal(np.concatenate(batches), rows)
    resumed = [batch["tokens"] for batch in Loader(prepared.directory, seed=1).batches(ramp[3:], prefetch=0)]
    for one, other in zip(batches[3:], resumed, strict=True):
        np.testing.assert_array_equal(one, other)


def test_batches_reads_ahead_no_further_than_asked_and_stops(prepared):
    asked = []

    def endless():
        while True:
            asked.append(len(asked))
            yield 4 * asked[-1], 4

    batches = Loader(prepared.directory, seed=0).batches(endless(), prefetch=2)
    next(batches)
    assert len(asked) == 3
    next(batches)
    assert len(asked) == 4
    batches.close()


def test_errors_of_the_reading_thread_reach_the_caller(prepared):
    with pytest.raises(UserError, match="multiple of 2"):
        list(Loader(prepared.directory, seed=0, process_count=2).batches([(0, 3)]))


def test_segments_against_a_loop():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4, (20, 17))
    ids, positions = segments(tokens, 1)
    assert ids.dtype == positions.dtype == np.int32
    for row, row_ids, row_positions in zip(tokens, ids, positions):
        segment, position = 1, 0
        for token, found_id, found_position in zip(row, row_ids, row_positions):
            assert (found_id, found_position) == (segment, position)
            position += 1
            if token == 1:
                segment, position = segment + 1, 0


def test_segment_ids_come_where_asked(prepared, tokenizer):
    assert Loader(prepared.directory, seed=0).batch(0, 2).keys() == {"tokens"}
    batch = Loader(prepared.directory, seed=0, segment_ids=True).batch(0, 64)
    tokens, ids, positions = batch["tokens"], batch["segment_ids"], batch["positions"]
    assert ids.shape == positions.shape == tokens.shape
    begins = tokens[:, 1:] == tokenizer.bos_id
    assert begins.any()
    np.testing.assert_array_equal(begins, np.diff(ids, axis=1) == 1)
    np.testing.assert_array_equal(begins, positions[:, 1:] == 0)


@pytest.mark.parametrize("process_count", [1, 2])
def test_heldout_batches_predict_every_token_once(prepared, process_count):
    source = stored(prepared, "heldout")
    parts = [list(heldout_batches(prepared.directory, 6, process_index=i, process_count=process_count)) for i in range(process_count)]
    assert len({len(part) for part in parts}) == 1
    found, predicted = [], 0
    for batches in zip(*parts):
        tokens = np.concatenate([batch["tokens"] for batch in batches])
        mask = np.concatenate([batch["loss_mask"] for batch in batches])
        assert tokens.shape == (6, 33) and mask.shape == (6, 32)
        predicted += int(mask.sum())
        for row, row_mask in zip(tokens, mask):
            length = int(row_mask.sum())
            assert row_mask[:length].all() and (row[length + 1 :] == prepared.pad_id).all()
            if length:
                found.append(tuple(row[: length + 1].tolist()))
    assert found == source
    assert predicted == prepared.heldout.tokens - prepared.heldout.documents  # all but the BOS of each document
    assert len(source) % 6  # so that the last batch was filled up


def test_bits_per_byte_of_a_uniform_model(prepared, corpus):
    """Every token at ln(vocab) nats: bits per byte must be the documents' tokens times log2(vocab) over their bytes."""
    nats = sum(batch["loss_mask"].sum() for batch in heldout_batches(prepared.directory, 4)) * np.log(400)
    tokens = prepared.heldout.tokens - prepared.heldout.documents
    num_bytes = sum(len(document.text.encode()) for document in corpus.documents("heldout"))
    assert bits_per_byte(nats, prepared.heldout.bytes) == pytest.approx(tokens * np.log2(400) / num_bytes)


def test_nothing_held_out(folder, tokenizer, tmp_path):
    prepared = prepare(Corpus(folder, heldout_fraction=0), tokenizer, tmp_path, sequence_length=32)
    assert prepared.heldout.rows == 0 and prepared.heldout_gzip9_bits_per_byte is None
    assert list(heldout_batches(prepared.directory, 4)) == []


def test_damaged_folders_are_refused_in_one_line(prepared, tmp_path):
    def message(folder):
        with pytest.raises(UserError) as error:
            Loader(folder, seed=0)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "not a prepared corpus" in message(tmp_path)
    copy = shutil.copytree(prepared.directory, tmp_path / "copy")
    whole = (copy / "train.array_record").read_bytes()
    (copy / "train.array_record").write_bytes(whole[: len(whole) // 2])
    assert "train.array_record" in message(copy)
    damaged = bytearray(whole)
    damaged[len(whole) // 4] ^= 1  # in the middle of the rows: found when one is read that lies there
    (copy / "train.array_record").write_bytes(damaged)
    loader = Loader(copy, seed=0)
    with pytest.raises(UserError, match=r"cannot read .*train.array_record \(.*hash mismatch.* and prepare it again"):
        loader.rows(range(loader.num_rows))
    (copy / "train.array_record").write_bytes(whole)
    (copy / "heldout.array_record").write_bytes(b"")
    assert "heldout.array_record" in message(copy)
    (copy / "train.array_record").unlink()
    assert "train.array_record" in message(copy)
    shutil.copy(prepared.directory / "heldout.array_record", copy / "train.array_record")
    assert "meta.json says" in message(copy)
