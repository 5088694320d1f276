"""Every source of the table: a data set by name trains, and what is no file of a kind is said."""

from pathlib import Path

import numpy as np
import pytest

from jmlp.config.data import DATA_SETS, DataConfig
from jmlp.data import SOURCES
from jmlp.data.dataset import Columns
from jmlp.data.load import load
from jmlp.errors import DataError

NAMES = sorted(DATA_SETS.words())
ENDINGS = sorted(name for name in SOURCES if name.startswith("."))


@pytest.mark.parametrize("name", NAMES)
def test_a_data_set_by_name_is_read(name):
    dataset, again = (load(DataConfig(name=name), 0) for _ in range(2))
    schema, rows = dataset.schema, dataset.train.rows
    assert rows > 50 and dataset.val.rows and dataset.test.rows
    assert dataset.train.x.shape == (rows, schema.features)
    assert np.isfinite(dataset.train.x).all() and np.isfinite(dataset.train.y).all()
    np.testing.assert_array_equal(dataset.train.x, again.train.x)
    raw = SOURCES[name](Path(name), Columns()).train
    assert len(raw.x) == rows + dataset.val.rows + dataset.test.rows
    assert len(raw.feature_names) == schema.features


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_of_that_ending_that_is_none_is_refused_by_name(ending, tmp_path):
    noise = np.random.default_rng(0).bytes(1000)
    for number, content in enumerate((b"", noise, b"\0" * 100, b"\n\n\n")):
        path = tmp_path / f"rows{number}{ending}"
        path.write_bytes(content)
        with pytest.raises(DataError, match=path.name) as caught:
            load(DataConfig(path=str(path)), 0)
        assert len(str(caught.value)) < 1000
    missing = tmp_path / f"none{ending}"
    with pytest.raises(DataError, match=missing.name):
        load(DataConfig(path=str(missing)), 0)
