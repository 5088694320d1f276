"""Splits, statistics and batches: exact, seeded, and blind to the mesh."""

import numpy as np
import pytest
from files import load_file, table_text
from hypothesis import given, settings
from hypothesis import strategies as st

from jmlp.config.sections import DataConfig
from jmlp.data.batches import (
    PAD,
    BlockSource,
    Span,
    batch_index,
    epoch_index,
    gather,
    order,
    padded_size,
    prefetch,
    steps_per_epoch,
)
from jmlp.data.dataset import Split
from jmlp.data.load import load
from jmlp.data.preparation import draw
from jmlp.errors import DataError

RNG = np.random.default_rng(0)


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 2**32 - 1),
)
def test_draws_are_stratified(counts, fraction, seed):
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    rng = lambda: np.random.Generator(np.random.Philox(key=[seed, 1]))  # noqa: E731
    chosen = draw(y, fraction, rng())
    assert np.array_equal(chosen, draw(y, fraction, rng()))
    assert len(set(chosen.tolist())) == len(chosen)
    taken = np.bincount(y[chosen], minlength=len(counts))
    counts = np.array(counts)
    assert (taken < counts).all()  # a class never gives its last row
    assert (np.abs(taken - counts * fraction) <= 1).all() or (taken >= counts - 1).any()
    if (counts > 2 / (1 - fraction)).all():
        assert taken.sum() == max(1, round(len(y) * fraction))


def test_splits_are_disjoint_and_whole():
    x = np.arange(500, dtype=np.float64)[:, None]
    config = DataConfig(scale="none")
    dataset = load(config, 3, (x, np.arange(500) % 5))
    parts = [dataset.train, dataset.val, dataset.test]
    seen = np.concatenate([part.x[:, 0] for part in parts])
    assert sorted(seen.tolist()) == list(range(500))
    for part in parts:
        assert np.array_equal(part.x[:, 0].astype(int) % 5, part.y)
        assert len(set(np.bincount(part.y).tolist())) == 1
    assert load(config, 3, (x, np.arange(500) % 5)).fingerprint == dataset.fingerprint
    assert load(config, 4, (x, np.arange(500) % 5)).fingerprint != dataset.fingerprint


def test_statistics_are_those_of_training_rows():
    x = RNG.normal(size=(300, 3)) * [1, 1e-8, 1e6] + [0, 1, 1e9]
    dataset = load(DataConfig(), 0, (x, RNG.integers(0, 2, 300)))
    np.testing.assert_allclose(dataset.train.x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(dataset.train.x.std(0), 1, atol=1e-5)
    assert abs(dataset.test.x.mean(0)).max() > 1e-3  # others are not centred by themselves


def test_held_out_rows_do_not_reach_the_statistics():
    x, y = RNG.normal(size=(50, 3)), np.arange(50) % 2
    held_out = {"x_test": RNG.normal(size=(9, 3)), "y_test": np.arange(9) % 2}
    plain = load(DataConfig(), 0, {"x": x, "y": y} | held_out).schema
    held_out["x_test"] = held_out["x_test"] + 100
    assert load(DataConfig(), 0, {"x": x, "y": y} | held_out).schema == plain
    moved = load(DataConfig(), 0, {"x": x + 100, "y": y} | held_out).schema
    assert np.array(moved.x_mean) == pytest.approx(np.array(plain.x_mean) + 100)


def test_extreme_columns():
    huge = RNG.normal(size=40) * 1e300
    tiny = RNG.normal(size=40) * 1e-300
    constant = np.full(40, 0.1)
    stamps = 1.7e9 + np.arange(40.0)
    off = {"val_fraction": 0.0, "test_fraction": 0.0}
    x = np.stack([huge, tiny, constant, stamps], 1)
    got = load(DataConfig(**off), 0, (x, np.arange(40) % 2)).train.x
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[:, [0, 1, 3]].std(0), 1, rtol=1e-4)
    np.testing.assert_allclose(got[:, 2], 0, atol=1e-6)
    x[3, 0] = np.inf
    with pytest.raises(DataError, match="row 3, feature 0: the value is infinite"):
        load(DataConfig(**off), 0, (x, np.arange(40) % 2))
    mean = load(DataConfig(missing="mean", **off), 0, (x, np.arange(40) % 2))
    assert mean.train.x[3, 0] == 0
    dropped = load(DataConfig(missing="drop", **off), 0, (x, np.arange(40) % 2))
    assert dropped.train.rows == 39
    x[:, 1] = np.nan
    with pytest.raises(DataError, match="feature 1 has no value in any training row"):
        load(DataConfig(missing="mean", **off), 0, (x, np.arange(40) % 2))
    far = {"x": np.ones((4, 1)) * [[1], [1 + 1e-9], [1], [1]], "y": [0, 1, 0, 1]}
    far |= {"x_test": [[1e300]], "y_test": [0]}
    with pytest.raises(DataError, match="beyond float32"):
        load(DataConfig(val_fraction=0.0), 0, far)


@pytest.mark.parametrize(
    ("y", "task"),
    [
        (np.arange(60) % 3, "classification"),
        (np.array(["a", "b"] * 30), "classification"),
        (np.arange(60) % 2 == 0, "classification"),
        ((np.arange(60) % 20).astype(float), "classification"),
        (np.arange(60).astype(float), "regression"),
        (np.linspace(0, 1, 60), "regression"),
        (np.linspace(0, 1, 120).reshape(60, 2), "regression"),
        (np.linspace(0, 1, 60)[:, None], "regression"),
    ],
)
def test_task_is_found(y, task):
    dataset = load(DataConfig(), 0, (RNG.normal(size=(60, 2)), y))
    assert dataset.schema.task == task
    assert any(task in note for note in dataset.notes)
    assert dataset.train.y.dtype == (np.int32 if task == "classification" else np.float32)
    if task == "regression":
        assert dataset.train.y.ndim == 2
        np.testing.assert_allclose(dataset.train.y.mean(0), 0, atol=1e-5)


@pytest.mark.parametrize(
    ("y", "config", "said"),
    [
        (np.linspace(0, 1, 60), {"task": "classification"}, "row 1: class 0.01.* not a whole"),
        (
            np.array(["a", "b"] * 30),
            {"task": "regression"},
            "row 0: the target .a. is not a number",
        ),
        (np.arange(60), {"task": "classification"}, "60 different labels in 60 rows"),
        (np.where(np.arange(60) == 7, np.nan, 1.5), {}, "row 7: the target is missing"),
        (np.ones((60, 2, 2)), {}, r"y has shape \(60, 2, 2\)"),
        (np.arange(60) % 3, {"classes": 2}, "row 2: class 2 is out of range"),
    ],
)
def test_targets_refused(y, config, said):
    with pytest.raises(DataError, match=said):
        load(DataConfig(**config), 0, (RNG.normal(size=(60, 2)), y))


@pytest.mark.parametrize("data", [3, (1, 2, 3), {"x": [[1]]}, {"x": [[1]], "y": [1], "z": 1},
                                  ([["a"]], [1]), ({}, {})])  # fmt: skip
def test_arrays_refused(data):
    with pytest.raises(DataError):
        load(DataConfig(), 0, data)


def test_minus_one_and_one_are_two_classes():
    y = np.where(np.arange(60) % 2, 1, -1)
    assert load(DataConfig(), 0, (RNG.normal(size=(60, 2)), y)).schema.classes == (-1, 1)


@pytest.mark.slow
def test_mutated_files_load_or_are_refused(tmp_path):
    """Thousands of damaged files: an answer or a DataError, nothing else."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from files import write_idx

    (tmp_path / "idx").mkdir()
    write_idx(tmp_path / "idx", rows=12, test_rows=4)
    (tmp_path / "t.csv").write_text(table_text(12))
    np.savez(tmp_path / "d.npz", x=RNG.normal(size=(12, 3)), y=np.arange(12) % 2)
    np.savez_compressed(tmp_path / "z.npz", x=RNG.normal(size=(12, 3)), y=np.arange(12) % 2)
    columns = {"a": np.arange(12.0), "kind": ["x", "y"] * 6}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    rng = np.random.default_rng(1)
    cases = [
        ("idx/train-images-idx3-ubyte.gz", tmp_path / "idx", {}),
        ("idx/train-labels-idx1-ubyte.gz", tmp_path / "idx", {}),
        ("t.csv", tmp_path / "t.csv", {"target": "kind"}),
        ("d.npz", tmp_path / "d.npz", {}),
        ("z.npz", tmp_path / "z.npz", {}),
        ("t.parquet", tmp_path / "t.parquet", {"target": "kind"}),
        ("d.npz", tmp_path / "d.npz", {"memory_limit": 0}),
        ("z.npz", tmp_path / "z.npz", {"memory_limit": 0}),
        ("t.parquet", tmp_path / "t.parquet", {"target": "kind", "memory_limit": 0}),
    ]
    outcomes = {"loaded": 0, "refused": 0}
    for name, path, config in cases:
        file = tmp_path / name
        whole = file.read_bytes()
        for trial in range(300):
            data = bytearray(whole)
            if trial % 3 == 0:
                del data[rng.integers(len(data)) :]
            else:
                for _ in range(rng.integers(1, 4)):
                    data[rng.integers(len(data))] = rng.integers(256)
            file.write_bytes(data)
            try:
                load_file(path, **config)
                outcomes["loaded"] += 1
            except DataError:
                outcomes["refused"] += 1
        file.write_bytes(whole)
    assert outcomes["refused"] > 500
    assert outcomes["loaded"] > 50


# Batches.


def test_an_epoch_is_a_permutation_of_seed_and_epoch():
    a = order(1, 2, 100)
    assert sorted(a.tolist()) == list(range(100))
    assert np.array_equal(a, order(1, 2, 100))
    assert not np.array_equal(a, order(1, 3, 100))
    assert not np.array_equal(a, order(2, 2, 100))


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 200), batch=st.integers(1, 60), multiple=st.integers(1, 16))
def test_every_row_is_in_an_epoch_once_whatever_the_padding(rows, batch, multiple):
    width = padded_size(batch, multiple)
    assert width % multiple == 0
    assert batch <= width < batch + multiple
    index = epoch_index(5, 1, rows, batch, width)
    assert index.shape == (steps_per_epoch(rows, batch), width)
    for step, line in enumerate(index):  # the real rows come first and do not depend on width
        real = line[line != PAD]
        assert np.array_equal(real, order(5, 1, rows)[step * batch : (step + 1) * batch])
        assert np.array_equal(line[: len(real)], real)
    assert sorted(index[index != PAD].tolist()) == list(range(rows))


def test_blocks_are_the_epochs_batches_and_each_process_reads_its_slice():
    split = Split(np.arange(23.0, dtype=np.float32)[:, None], np.arange(23, dtype=np.int32))
    spans = [Span(0, 0, 3), Span(0, 3, 2), Span(1, 0, 1), Span(1, 1, 3)]

    def blocks(mine):
        source = BlockSource(split, spans, seed=9, batch_size=5, width=6, steps=3, mine=mine)
        return list(prefetch(source))

    whole = blocks(slice(0, 6))
    for span, block in zip(spans, whole, strict=True):
        index = epoch_index(9, span.epoch, 23, 5, 6)[span.start : span.start + span.steps]
        want = gather(split, index)
        for name in ("x", "y", "weight"):
            assert np.array_equal(block[name][: span.steps], want[name])
        assert block["weight"][span.steps :].sum() == 0
    for low, high in ((0, 2), (2, 6)):
        for part, block in zip(blocks(slice(low, high)), whole, strict=True):
            rows = block.keys() - {"total"}
            assert all(np.array_equal(part[k], block[k][:, low:high]) for k in rows)
            assert np.array_equal(part["total"], block["weight"].sum(1))  # of all processes


def test_a_source_reads_only_its_rows():
    class Counting(np.ndarray):
        taken = 0

        def __getitem__(self, item):
            if isinstance(item, np.ndarray):
                Counting.taken += item.size
            return super().__getitem__(item)

    split = Split(np.zeros((40, 2), np.float32).view(Counting), np.zeros(40, np.int32))
    source = BlockSource(
        split, [Span(0, 0, 4)], seed=0, batch_size=10, width=10, steps=4, mine=slice(0, 5)
    )
    source[0]
    assert Counting.taken == 20  # half of the 40 rows of these four batches


def test_batches_of_evaluation_keep_the_order():
    index = batch_index(np.arange(5), 2, 4)
    assert index.tolist() == [[0, 1, PAD, PAD], [2, 3, PAD, PAD], [4, PAD, PAD, PAD]]
