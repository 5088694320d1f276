"""Columns by name: of data sets that ship, of years, of files that have no names."""

import numpy as np
import pytest
from files import load_file, write_idx

from jmlp.config import override_config, parse_config
from jmlp.config.sections import DataConfig
from jmlp.data.load import load
from jmlp.errors import ConfigError, DataError

CANCER = {"name": "breast_cancer"}


def test_a_data_set_that_ships_is_a_table():
    whole = load(DataConfig(**CANCER), 0)
    some = load(DataConfig(**CANCER, features=["mean area", "mean radius"]), 0)
    assert some.schema.feature_names == ("mean area", "mean radius")
    assert some.schema.classes == whole.schema.classes == ("malignant", "benign")
    place = whole.schema.feature_names.index("mean area")
    np.testing.assert_allclose(some.train.x[:, 0], whole.train.x[:, place], atol=1e-6)
    area = load(DataConfig(**CANCER, target=["mean area"]), 0).schema
    assert (area.task, area.target_names) == ("regression", ("mean area",))
    assert "mean area" not in area.feature_names
    assert "target" not in area.feature_names  # what it was is known by no measurement
    asked = load(DataConfig(**CANCER, target="mean area", features=["target", "mean radius"]), 0)
    assert asked.schema.feature_names == ("target", "mean radius")
    both = load(DataConfig(**CANCER, target=["mean area", "mean radius"]), 0).schema
    assert both.outputs == 2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"features": ["mean aera"]}, "no column 'mean aera'; did you mean 'mean area'"),
        ({"target": ["price"]}, "no column 'price'"),
        ({"features": ["target", "mean area"]}, "both a feature and a target"),
    ],
)
def test_columns_that_are_not_there(keys, said):
    with pytest.raises(DataError, match=said):
        load(DataConfig(**CANCER, **keys), 0)


@pytest.mark.parametrize("keys", [{"features": ["a"]}, {"target": ["y"]}])
def test_names_for_what_has_none_are_refused(tmp_path, keys):
    np.savez(tmp_path / "rows.npz", x=np.arange(60.0).reshape(30, 2), y=np.arange(30) % 2)
    for path in (tmp_path / "rows.npz", write_idx(tmp_path)):
        with pytest.raises(DataError, match=r"data\.\w+=\['\w'\]: .* has no names of columns"):
            load_file(path, **keys)


def test_a_column_called_by_a_year(tmp_path):
    lines = [f"{i},{i * 0.5},{i % 2}" for i in range(60)]
    (tmp_path / "y.csv").write_text("\n".join(["2019,other,2020", *lines]) + "\n")
    for keys in ({"target": 2020}, {"target": [2020], "features": [2019]}):
        data = parse_config({"data": keys}).data
        schema = load_file(tmp_path / "y.csv", **data.model_dump(exclude_unset=True)).schema
        assert schema.target_names == ("2020",)
        assert schema.feature_names[0] == "2019"
    config = override_config(parse_config({}), ["--data.target=2020", "--data.features=[2019]"])
    assert (config.data.target, config.data.features) == (("2020",), ("2019",))
    for odd in (True, 20.5, [None], {"a": 1}):
        with pytest.raises(ConfigError, match=r"data\.target"):
            parse_config({"data": {"target": odd}})


@pytest.mark.parametrize(
    ("x", "y"), [("X", "Y"), ("X", "y"), ("X_train", "y_train"), ("x_train", "Y_train")]
)
def test_archives_as_people_name_their_arrays(tmp_path, x, y):
    rows = {x: np.arange(60.0).reshape(30, 2), y: np.arange(30) % 2, "X_test": np.ones((3, 2))}
    np.savez(tmp_path / "rows.npz", **rows, Y_test=np.zeros(3, int))
    dataset = load_file(tmp_path / "rows.npz", val_fraction=0.0)
    assert (dataset.train.rows, dataset.test.rows) == (30, 3)


def test_archives_that_do_not_say(tmp_path):
    np.savez(tmp_path / "rows.npz", images=np.ones((3, 2)), labels=np.ones(3))
    with pytest.raises(DataError, match=r"expected arrays x and y .*; it has images, labels"):
        load_file(tmp_path / "rows.npz")
    np.savez(tmp_path / "rows.npz", x=np.ones((3, 2)), X=np.ones((3, 2)), y=np.ones(3))
    with pytest.raises(DataError, match=r"has both 'x\.npy' and 'X\.npy'"):
        load_file(tmp_path / "rows.npz")
